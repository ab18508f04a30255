"""A layer that turns (N, T, F) into (T, N, F) for itself, inside a model that has the batch in front."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire

from .checks import build, check, handed_back, labels, randn

N, T, PADDED = 2, 11, 16  # 16 is 8 parts for each of 2 samples, too
X, Y = randn(N, T, 5), labels(N, T)


def loss(out):
    return F.cross_entropy(out.flatten(0, 1), Y.flatten())


class Turned(nn.Module):
    """``first``: what comes before the turn is a layer; else it is a table's rows."""

    def __init__(self, first=True):
        super().__init__()
        self.first = nn.Linear(5, 6) if first else nn.Parameter(torch.randn(5, 6))
        self.inner, self.middle, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = self.first(x) if isinstance(self.first, nn.Module) else x @ self.first
        h = F.pad(torch.tanh(h), (0, 0, 0, PADDED - T))
        h = torch.tanh(self.inner(h.transpose(0, 1))).transpose(0, 1)
        return self.head(torch.tanh(self.middle(h))[:, :T])


@pytest.mark.parametrize("first", [True, False], ids=["after a layer", "after a table"])
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_verified(rule, first):
    check(lambda: Turned(first), X, loss, rule, outputs=["head"])


@pytest.mark.parametrize("first", [True, False], ids=["after a layer", "after a table"])
def test_each_row_gets_its_own_samples_error(first):
    model = rewire.convert(build(Turned, first), "dfa", scale=0.3)
    for _ in range(3):
        (got,) = handed_back(model, X, loss, "inner")["inner"]
    e, B = rewire.output_error(model), rewire.feedback(model)["inner"]
    for i in range(N):
        for t in range(PADDED):  # the mean of the errors that position t of 16 lies over, of 11
            low, high = t * T // PADDED, -(-(t + 1) * T // PADDED)
            torch.testing.assert_close(got[t, i], e[i, low:high].mean(0) @ B)


class Patches(nn.Module):
    """Tokens of an image, permuted to (T, N, F), as detection transformers have them."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.middle = nn.Conv2d(5, 6, 1), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        h = torch.tanh(self.stem(x)).flatten(2).permute(2, 0, 1)  # (16, 2, 6)
        h = h + torch.tanh(self.inner(h))
        return self.head(torch.tanh(self.middle(h)).mean(0))


def test_tokens_of_an_image():
    """Nothing else in the model shows an order, and 16 is a multiple of 2: no guess is needed, nor said."""
    x = randn(2, 5, 4, 4)
    model, _ = check(Patches, x, lambda out: F.cross_entropy(out, labels(2)), "dfa", outputs=["head"])
    seen = handed_back(model, x, lambda out: F.cross_entropy(out, labels(2)), "inner", "middle")
    e, B = rewire.output_error(model), rewire.feedback(model)
    torch.testing.assert_close(seen["middle"][0], (e @ B["middle"]).expand(16, 2, 6))
