"""Rows put by index into a tensor that has other rows than the error: experts on tokens, images among words."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire

from .checks import build, check, handed_back, labels, one_pass, randn

N, T = 4, 6
IDS = labels(N, T, classes=20)
FEW = torch.where(torch.arange(N * T).reshape(N, T) < 3, 1, 2)  # expert 1 has three rows, all of the first sample
CLASSES, TOKEN_CLASSES = labels(N), labels(N, T)


def index_add(out, chosen, y):
    return out.flatten(0, 1).index_add(0, chosen.flatten().nonzero()[:, 0], y).view_as(out)


def by_mask(out, chosen, y):
    out = out.flatten(0, 1).clone()
    out[chosen.flatten()] = y
    return out.view(N, T, -1)


def by_mask_of_tokens(out, chosen, y):
    out = out.clone()
    out[chosen] = y
    return out


def by_two_indices(out, chosen, y):
    sample, token = chosen.nonzero().unbind(1)
    return out.index_put((sample, token - T), y, accumulate=True)


PUTS = [index_add, by_mask, by_mask_of_tokens, by_two_indices]


class Experts(nn.Module):
    """Nothing lies below the experts that the rows of tokens could be followed to: the index above them has to do."""

    def __init__(self, put=index_add, pooled=True, frozen=False):
        super().__init__()
        self.table = nn.Embedding(20, 6).requires_grad_(not frozen)
        self.up = nn.ModuleList(nn.Linear(6, 7) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(7, 6) for _ in range(2))
        self.head = nn.Linear(6, 4)
        self.put, self.pooled = put, pooled

    def forward(self, ids):
        h = self.table(ids)
        out = torch.zeros_like(h)
        for i, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            chosen = ids % 2 == i
            out = self.put(out, chosen, down(torch.tanh(up(h[chosen]))))
        h = torch.tanh(h + out)
        return self.head(h.mean(1) if self.pooled else h)


def loss(out):
    return F.cross_entropy(out, CLASSES)


def token_loss(out):
    return F.cross_entropy(out.flatten(0, 1), TOKEN_CLASSES.flatten())


@pytest.mark.parametrize("frozen", [False, True], ids=["embedding", "frozen"])
@pytest.mark.parametrize("put", PUTS)
@pytest.mark.parametrize("ids", [IDS, FEW], ids=["any", "few"])
def test_experts_get_the_errors_of_their_own_samples(put, frozen, ids):
    model, _ = check(lambda: Experts(put, frozen=frozen), ids, loss, "dfa", outputs=["head"])
    for x in (ids, ids.flip(0)):
        seen = handed_back(model, x, loss, "down.0", "down.1")
        e, B = rewire.output_error(model), rewire.feedback(model)
        for i in (0, 1):
            samples = (x % 2 == i).nonzero()[:, 0]
            torch.testing.assert_close(seen[f"down.{i}"], [e[samples] @ B[f"down.{i}"]])


@pytest.mark.parametrize("frozen", [False, True], ids=["embedding", "frozen"])
@pytest.mark.parametrize("put", PUTS)
def test_experts_get_the_errors_of_their_own_tokens(put, frozen):
    model, _ = check(lambda: Experts(put, pooled=False, frozen=frozen), IDS, token_loss, "dfa", outputs=["head"])
    seen = handed_back(model, IDS, token_loss, "down.0", "down.1")
    e, B = rewire.output_error(model), rewire.feedback(model)
    for i in (0, 1):
        torch.testing.assert_close(seen[f"down.{i}"], [e[i == IDS % 2] @ B[f"down.{i}"]])


@pytest.mark.parametrize("rule", ["sdfa", "fitted(context=3)", "fitted(every=1)"])
def test_other_rules(rule):
    check(Experts, IDS, loss, rule, outputs=["head"])


class Pixels(nn.Module):
    """The same for pixels, and an error for each of them that a convolution made."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 1).requires_grad_(False)
        self.up, self.down, self.head = nn.Linear(6, 7), nn.Linear(7, 6), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        h = self.stem(x).permute(0, 2, 3, 1)
        flat = h.flatten(0, 2)
        out = torch.zeros_like(flat).index_add(0, torch.tensor(PIXELS), self.down(torch.tanh(self.up(flat[PIXELS]))))
        return self.head(torch.tanh(h + out.view_as(h)).permute(0, 3, 1, 2))


PIXELS = [17, 0, 4, 9, 5]


def pixel_loss(out):
    return F.cross_entropy(out, labels(2, 3, 3))


def test_pixels():
    x = randn(2, 2, 3, 3)
    model, _ = check(Pixels, x, pixel_loss, "dfa", outputs=["head"], statuses={"stem": "frozen"})
    (got,) = handed_back(model, x, pixel_loss, "down")["down"]
    e, B = rewire.output_error(model), rewire.feedback(model)
    samples, rows, columns = [1, 0, 0, 1, 0], [2, 0, 1, 0, 1], [2, 0, 1, 0, 2]
    torch.testing.assert_close(got, e[samples, :, rows, columns] @ B["down"])


class NoRows(nn.Module):
    """Seven rows of four samples, made out of all of them by a product."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 6))
        self.up, self.down, self.head = nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(6, 4)

    def forward(self, mix):
        out = torch.zeros(7, 6, dtype=mix.dtype)
        out = out.index_add(0, torch.tensor([0, 2, 5]), self.down(torch.tanh(self.up(self.table[:3]))))
        return self.head(torch.tanh(mix @ out))


def test_no_way_to_what_rows_are_put_into():
    model = rewire.convert(build(NoRows), "dfa")
    message = r"layer 'down'.*\(7,\) rows.*error of shape \(4, 4\).*layers=\{'down': 'bp'\}"
    with pytest.raises(rewire.RoutingError, match=message):
        one_pass(model, randn(N, 7), loss)


PATCHES = 4
# For each token of two texts, whether there is a patch of an image in its place.
ONE_EACH = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1, 1, 0]]).bool()
ONE = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0, 0, 0, 0]]).bool()
TWO_AND_ONE = torch.tensor([[1, 1, 1, 1, 0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1, 1, 1, 0]]).bool()
IN_TWO_TEXTS = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 1, 0]]).bool()
TEXT = labels(2, 10, classes=7)


class Attention(nn.Module):
    """Every position looks at those before it."""

    def forward(self, h):
        ones = torch.ones(h.shape[1], h.shape[1], dtype=h.dtype).tril()
        return h + ones @ h / ones.sum(1, keepdim=True)


def expanded(h, mask, patches):
    return h.masked_scatter(mask[..., None].expand_as(h), patches)


def broadcast(h, mask, patches):
    return h.masked_scatter(mask[..., None], patches)


def in_place(h, mask, patches):
    return h.clone().masked_scatter_(mask[..., None], patches)


class Images(nn.Module):
    """A tower with a class token in front of its patches, which are put into a text; errors at its words."""

    def __init__(self, put=expanded, packed=False, folded=False, pooled=False):
        super().__init__()
        self.patch, self.first = nn.Linear(5, 6), nn.Parameter(torch.randn(6))
        self.tower, self.project = nn.Linear(6, 6), nn.Linear(6, 8)
        self.words, self.mid, self.head = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.attention = Attention()
        self.put, self.packed, self.folded, self.pooled = put, packed, folded, pooled

    def forward(self, text, mask, images):
        h = self.patch(images)
        if self.packed:
            h = torch.tanh(self.tower(h.reshape(1, -1, 6)))
        else:
            h = torch.cat([self.first.expand(len(h), 1, 6), h], 1)
            h = self.attention(torch.tanh(self.tower(h)))[:, 1:]
        h = self.project(h.flatten(0, 1) if self.folded else h)
        h = self.put(self.words(text), mask, torch.cat([*h]) if h.dim() > 2 else h)
        h = self.attention(torch.tanh(self.mid(self.attention(h))))
        return self.head(h.mean(1) if self.pooled else h)


def words_alone(mask):
    """Nothing is predicted where images are."""
    classes = labels(2, 10).masked_fill(mask, -100)

    def loss(out):
        if out.dim() == 2:
            return F.cross_entropy(out, classes[:, -1].abs() % 4)
        return F.cross_entropy(out.flatten(0, 1), classes.flatten())

    return loss


@pytest.mark.parametrize("put", [expanded, broadcast, in_place])
@pytest.mark.parametrize("options", [{}, {"folded": True}, {"pooled": True}], ids=["plain", "folded", "pooled"])
@pytest.mark.parametrize(
    ("mask", "samples"),
    [(ONE_EACH, [0, 1]), (ONE, [1]), (TWO_AND_ONE, [0, 0, 1])],
    ids=["one each", "one", "two and one"],
)
def test_images_get_the_mean_error_of_their_own_text(mask, samples, options, put):
    inputs, loss = (TEXT, mask, randn(len(samples), PATCHES, 5)), words_alone(mask)
    model, _ = check(lambda: Images(put, **options), inputs, loss, "dfa", outputs=["head"])
    seen = handed_back(model, inputs, loss, "tower", "project")
    e, B = rewire.output_error(model), rewire.feedback(model)
    e = e if options.get("pooled") else e.mean(1)
    for name in ("tower", "project"):
        (got,) = seen[name]
        rows = len(got.flatten(0, -2)) // len(samples)
        torch.testing.assert_close(got.flatten(0, -2), (e[samples] @ B[name]).repeat_interleave(rows, 0))
    assert model.first.grad.abs().min() > 0


@pytest.mark.parametrize("mask", [TWO_AND_ONE, IN_TWO_TEXTS], ids=["two and one", "in two texts"])
def test_images_one_behind_the_other(mask):
    """They look like a single sample, and an image may go to more than one text."""
    samples = mask.nonzero()[:, 0]
    inputs, loss = (TEXT, mask, randn(len(samples) // PATCHES, PATCHES, 5)), words_alone(mask)
    model, _ = check(lambda: Images(packed=True), inputs, loss, "dfa", outputs=["head"], zero=["first"])
    (got,) = handed_back(model, inputs, loss, "project")["project"]
    torch.testing.assert_close(got[0], rewire.output_error(model).mean(1)[samples] @ rewire.feedback(model)["project"])


def test_numbers_are_no_rows():
    """A mask that is another for each feature puts nothing in its place whole: shapes have to tell."""
    mask = torch.zeros(2, 5, 6, dtype=torch.bool)
    mask[0, :4, 0] = mask[1, :, 1:4] = True

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            h = torch.tanh(self.b(torch.tanh(self.a(x))))
            return self.head(h.new_ones(2, 5, 6).masked_scatter(mask, h))

    x = randn(4, 5)
    model = rewire.convert(build(Net), "dfa", scale=0.3)
    for _ in range(2):
        (got,) = handed_back(model, x, lambda out: out.square().mean(), "b")["b"]
        e, B = rewire.output_error(model), rewire.feedback(model)
        torch.testing.assert_close(got, e.mean(1)[[0, 0, 1, 1]] @ B["b"])
