"""Rows without a batch dimension that meet every sample: texts compared to each video."""

import warnings

import pytest
import torch
from torch import nn

import rewire

from .checks import build, check, handed_back, one_pass, randn

HOW = {
    "unsqueezed and expanded": lambda text, videos: text.unsqueeze(0).expand(len(videos), -1, -1) * videos[:, None],
    "expanded": lambda text, videos: text.expand(len(videos), *text.shape) + videos[:, None],
    "broadcast": lambda text, videos: text + videos[:, None],
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
