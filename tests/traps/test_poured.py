"""Rows put by index into a tensor that has other rows than the error: experts on tokens, an error for each sample."""

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
