"""Rows without a batch dimension that meet every sample: texts compared to each video."""

import warnings

import pytest
import torch
from torch import nn

import rewire
from rewire.rules.direct import DFA

from .checks import build, check, handed_back, one_pass, randn

HOW = {
    "unsqueezed and expanded": lambda text, videos: text.unsqueeze(0).expand(len(videos), -1, -1) * videos[:, None],
    "expanded": lambda text, videos: text.expand(len(videos), *text.shape) + videos[:, None],
    "broadcast": lambda text, videos: text + videos[:, None],
    "cropped": lambda text, videos: (text + videos[:, None]).narrow(1, 0, len(text)),
    "residual": lambda text, videos: text[None] + torch.tanh(text * videos[:, None]).softmax(-1),
}


class Compared(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.token, self.text, self.video = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(4, 7)
        self.mid, self.head = nn.Linear(7, 7), nn.Linear(7, 3)
        self.how = how

    def forward(self, tokens, video):
        pooled = torch.tanh(self.token(tokens))[torch.arange(len(tokens)), torch.ones(len(tokens), dtype=int)]
        both = HOW[self.how](torch.tanh(self.text(pooled)), torch.tanh(self.video(video)))
        return self.head(both + torch.tanh(self.mid(both)))


def inputs(texts, videos):
    return randn(texts, 9, 5), randn(videos, 4, seed=1)


def loss(out):
    return (out - torch.arange(out.numel()).reshape(out.shape) / 10).square().mean()


@pytest.mark.parametrize("options", [{}, {"output": "head"}], ids=["found", "asked"])
@pytest.mark.parametrize("sizes", [(3, 3), (4, 2), (2, 4)])
@pytest.mark.parametrize("how", HOW)
def test_values(how, sizes, options):
    """From the first pass on, also where there are as many texts as videos."""
    model, given = rewire.convert(build(Compared, how), "dfa", scale=0.3, **options), inputs(*sizes)
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("error" if sizes == (4, 2) else "ignore")
            seen = handed_back(model, given, loss, "text")
            e, B = rewire.output_error(model), rewire.feedback(model)
        torch.testing.assert_close(seen["text"], [e.mean(0) @ B["text"]])


@pytest.mark.parametrize("sizes", [(3, 3), (4, 2)])
@pytest.mark.parametrize("how", HOW)
def test_verify(how, sizes):
    check(
        lambda: Compared(how),
        inputs(*sizes),
        loss,
        "dfa",
        outputs=["head"],
        warned=("head", "mid") if len(set(sizes)) == 1 else (),
    )


def test_what_has_a_batch_keeps_it():
    """Square shapes, transposes and broadcasts that are none of the batch."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):  # (3, 3, 4)
            h = torch.tanh(self.a(x))
            h = h + h.mean(1, keepdim=True) + h[:, :1]
            return self.head(torch.tanh(self.b(torch.tanh(h))) + h)

    model, x = rewire.convert(build(Net), "dfa", scale=0.3), randn(3, 3, 4).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = handed_back(model, x, loss, "b")
        for _ in range(2):
            one_pass(model, x, loss)
    torch.testing.assert_close(seen["b"], [rewire.output_error(model) @ rewire.feedback(model)["b"]])


PUT = {
    "expanded": lambda p, n: p.expand(n, -1, -1),
    "unsqueezed and expanded": lambda p, n: p.unsqueeze(0).expand(n, -1, -1),
    "repeated": lambda p, n: p.repeat(n, 1, 1),
    "unsqueezed and repeated": lambda p, n: p[None].repeat(n, 1, 1),
    "broadcast": lambda p, n: p + torch.zeros(n, 1, 1, dtype=p.dtype),
}
ENDS = {
    "positions": lambda h, head: head(h)[:, 4:],
    "their own": lambda h, head: head(h[:, 4:]),
    "the first alone": lambda h, head: head(h[:, :1]),
    "first": lambda h, head: head(h[:, 0]),
    "mean": lambda h, head: head(h.mean(1)),
}


class Prompted(nn.Module):
    """Four rows made of a table, in front of each sample's own."""

    def __init__(self, put, end="positions", last=False):
        super().__init__()
        self.table, self.low, self.make = nn.Parameter(randn(4, 6)), nn.Linear(6, 6), nn.Linear(6, 8)
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.mix = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.put, self.end, self.last = put, end, last

    def forward(self, x):
        prompt = PUT[self.put](self.make(torch.tanh(self.low(self.table))), len(x))
        rows = [prompt, self.embed(x)]
        h = self.mix(torch.cat(rows[::-1] if self.last else rows, 1))
        return ENDS[self.end](h, self.head)


@pytest.mark.parametrize("samples", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("put", "end"),
    [
        *((put, "positions") for put in PUT),
        ("expanded", "first"),
        ("repeated", "mean"),
        ("expanded", "their own"),
        ("expanded", "the first alone"),
    ],
)
def test_a_prompt_sees_the_mean_over_all(put, end, samples):
    """However many samples there are: row i is no more sample i's than any other's."""
    model, x = rewire.convert(build(Prompted, put, end, samples == 8), "dfa", scale=0.3), randn(samples, 9, 5)
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            seen = handed_back(model, x, loss, "make", "mix.linear2")
        e, B = rewire.output_error(model), rewire.feedback(model)
        torch.testing.assert_close(seen["make"], [(e.flatten(0, -2).mean(0) @ B["make"]).expand(4, -1)])
        if e.dim() == 2 or e.shape[1] == 13:  # what has a batch keeps it
            own = e if e.dim() == 3 else e[:, None].expand(-1, 13, -1)
            torch.testing.assert_close(seen["mix.linear2"], [own @ B["mix.linear2"]])


@pytest.mark.parametrize("samples", [3, 4])
@pytest.mark.parametrize("end", ENDS)
def test_verify_of_a_prompt(end, samples):
    zero = ("make.",) if end == "positions" else ()  # errors of their own places are all that comes down there
    check(lambda: Prompted("expanded", end), randn(samples, 9, 5), loss, "dfa", outputs=["head"], zero=zero)


def test_a_smaller_last_batch():
    model = rewire.convert(build(Prompted, "expanded"), "dfa", scale=0.3)
    for samples in (4, 4, 3, 1):
        seen = handed_back(model, randn(samples, 9, 5), loss, "make")
        e, B = rewire.output_error(model), rewire.feedback(model)
        torch.testing.assert_close(seen["make"], [(e.flatten(0, -2).mean(0) @ B["make"]).expand(4, -1)])


OWN = {
    "picked and broadcast": lambda h: h[torch.arange(len(h))] + h[:1],
    "minus the mean": lambda h: h - h.mean(0),
    "minus a number": lambda h: h - h[:, 0].mean(),
    "beside one expanded": lambda h: torch.cat([h[:1].expand(len(h), -1), h], 1)[:, 3:],
}


@pytest.mark.parametrize("how", OWN)
def test_rows_that_feed_others_too_keep_their_own(how):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(9 if "beside" in how else 6, 3)

        def forward(self, x):
            return self.head(OWN[how](torch.tanh(self.b(torch.tanh(self.a(x))))))

    model, x = rewire.convert(build(Net), "dfa", scale=0.3), randn(4, 5)
    for _ in range(2):
        seen = handed_back(model, x, loss, "b")
        torch.testing.assert_close(seen["b"], [rewire.output_error(model) @ rewire.feedback(model)["b"]])


class Steps(nn.Module):
    """(T, N, F): one vector a sample is expanded along T as a prompt is along the batch."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.low, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.mix, self.how = nn.Parameter(randn(6, 6, seed=3)), how

    def forward(self, x, about):
        given = self.b(torch.tanh(self.low(about)))
        h = torch.tanh(self.a(x) + given)
        # A product after which nobody can tell which dimension has the samples.
        return self.head(torch.bmm(h, self.mix.expand(len(x), -1, -1)) if self.how == "product" else h)


@pytest.mark.parametrize(("how", "about", "steps"), [("product", (4, 6), 7), ("sum", (1, 4, 6), 4)])
def test_one_vector_a_sample_for_all_steps_of_a_sequence_keeps_its_sample(how, about, steps):
    model = rewire.convert(build(Steps, how), DFA(layout="sequence_first"), scale=0.3)
    for _ in range(2):
        seen = handed_back(model, (randn(steps, 4, 5), randn(*about, seed=2)), loss, "b")
        wanted = rewire.output_error(model).mean(0) @ rewire.feedback(model)["b"]
        torch.testing.assert_close(seen["b"], [wanted.reshape(about)])


@pytest.mark.parametrize("end", ["mean", "last", "max"])
def test_as_many_steps_as_samples(end):
    class Net(Steps):
        def forward(self, x, about):
            h = torch.tanh(self.a(x) + self.b(torch.tanh(self.low(about))))
            return self.head({"mean": h.mean(0), "last": h[-1], "max": h.amax(0)}[end])

    model = rewire.convert(build(Net, end), "dfa", scale=0.3)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seen = handed_back(model, (randn(4, 4, 5), randn(4, 6, seed=2)), loss, "b")
        torch.testing.assert_close(seen["b"], [rewire.output_error(model) @ rewire.feedback(model)["b"]])


STEPS = {"positions": 13, "their own": 9, "the first alone": 1}  # that the head sees


@pytest.mark.parametrize("rule", ["sdfa", "dkp", "fitted", "drtp"])
@pytest.mark.parametrize("end", ENDS)
def test_a_prompt_under_other_rules(end, rule):
    """Nothing that they make of an error, or learn from it, needs a row for each of the input's."""
    model, steps = rewire.convert(build(Prompted, "expanded", end), rule), STEPS.get(end)
    labels = torch.zeros((3, steps) if steps else 3, dtype=torch.long)
    for _ in range(4):
        with rewire.targets(labels):
            seen = handed_back(model, randn(3, 9, 5), loss, "make")
    assert (seen["make"][0] - seen["make"][0][:1]).abs().max() < 1e-12


def test_copies_behind_one_another_are_of_some_samples_each():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))).repeat(2, 1))

    model = rewire.convert(build(Net), "dfa", scale=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, other = handed_back(model, randn(2, 5), loss, "b")["b"][0]
    assert not torch.allclose(one, other)


class Table(nn.Module):
    """Rows beside those of every sample, made of a table of which shapes show that it has no batch."""

    def __init__(self, *shape):
        super().__init__()
        self.table, self.low, self.make = nn.Parameter(randn(*shape)), nn.Linear(6, 6), nn.Linear(6, 8)
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        made = self.make(torch.tanh(self.low(self.table)))
        return self.head(torch.tanh(torch.cat([self.embed(x), made.expand(*x.shape[:-2], -1, -1)], -2)))


@pytest.mark.parametrize("samples", [2, 4])
def test_a_table_of_one_row_for_all(samples):
    """(1, K, F), where K is N too."""
    model = rewire.convert(build(Table, 1, 4, 6), "dfa", scale=0.3)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            seen = handed_back(model, randn(samples, 9, 5), loss, "make")
        mean = rewire.output_error(model).mean((0, 1)) @ rewire.feedback(model)["make"]
        torch.testing.assert_close(seen["make"], [mean.expand(1, 4, -1)])


@pytest.mark.parametrize(("table", "x"), [((1, 4, 6), (2, 9, 5)), ((4, 6), (1, 9, 5))])
def test_what_shapes_show_is_left_to_them(table, x):
    """Passes in which rows go their own way take longer."""
    model = rewire.convert(build(Table, *table), "dfa", scale=0.3)
    for _ in range(2):
        one_pass(model, randn(*x), loss)
    assert not model.head._rewire.wiring.pours
