"""Feedback that is drawn anew in every pass, in compiled graphs."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import rewire
from rewire.swap import state_of

from .nets import Mixed, Tokens, chain, error, images, one_graph, pair, same, step, tokens, vectors


def gradients(model, data):
    step(model, data)
    return [p.grad.clone() for p in model.parameters()]


def test_each_pass_has_its_own_draw_and_it_is_the_equations():
    model = rewire.convert(chain(), "brsf", scale=0.5)
    step(model, vectors(6))
    compiled = one_graph(model)
    x, _ = data = vectors(6)
    seen = []
    for _ in range(3):
        step(compiled, data)
        B = rewire.feedback(model)["4"]  # the newest draw
        assert torch.equal(B.sign(), model[4].weight.sign())
        h = model[:2](x), model[:4](x)
        delta = error(model, data) @ B * (1 - h[1] ** 2)
        torch.testing.assert_close(model[2].weight.grad, delta.T @ h[0], rtol=1e-4, atol=1e-6)
        seen.append(B)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_two_passes_at_a_time_have_a_draw_each():
    model, twin = pair(Mixed, images, "brsf")
    compiled = one_graph(model)
    step(compiled, images(6)), step(twin, images(6))
    for m in (compiled, twin):
        m.zero_grad()
        losses = [F.cross_entropy(m(x), y) for x, y in (images(6), images(6))]
        for loss in reversed(losses):
            loss.backward()
    same(twin, model)


def test_a_forward_without_gradients_draws_nothing():
    model, twin = pair(Mixed, images, "brsf")
    compiled = one_graph(model)
    step(compiled, images(6)), step(twin, images(6))
    with torch.no_grad():
        compiled(images(6)[0])
    step(compiled, images(6)), step(twin, images(6))
    same(twin, model)


def test_eager_and_compiled_passes_count_together():
    model, twin = pair(Tokens, tokens, "brsf")
    compiled = one_graph(model)
    for m in (compiled, model, compiled, model, model, compiled):
        step(m, tokens(6)), step(twin, tokens(6))
        same(twin, model)


def test_copies_go_on_by_themselves():
    model = pair(Mixed, images, "brsf")[0]
    compiled = one_graph(model)
    step(compiled, images(6))
    twin = copy.deepcopy(model)
    again = one_graph(copy.deepcopy(model))
    first = gradients(compiled, images(6))
    for m in (twin, again):
        for a, b in zip(first, gradients(m, images(6)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert state_of(model.wide).draws == state_of(twin.wide).draws == 3


def test_a_saved_configuration_has_the_count(tmp_path):
    model = pair(Mixed, images, "brsf")[0]
    compiled = one_graph(model)
    for _ in range(3):
        step(compiled, images(6))
    rewire.save_config(model, tmp_path / "config.json")
    other = Mixed()
    other.load_state_dict(model.state_dict())
    rewire.load_config(other, tmp_path / "config.json")
    step(compiled, images(6)), step(other, images(6))
    same(other, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_and_inductor(dtype):
    model, twin = pair(Mixed, images, "brsf")
    compiled = torch.compile(model, fullgraph=True)
    for n in (6, 4):
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            step(compiled, images(n)), step(twin, images(n))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.grad.dtype is torch.float32
            loose = {"rtol": 0.1, "atol": 0.02} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
            torch.testing.assert_close(p.grad, q.grad, **loose)


class Again(nn.Module):
    """A part that is run again in the backward."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = checkpoint(lambda h: torch.tanh(self.inner(h)), h, use_reentrant=False)
        return self.head(h)


def test_what_is_run_again_in_the_backward_uses_the_number_after():
    """The count has gone on by then. So numbers are others than in eager mode, and still new ones in every pass."""
    model, twin = pair(Again, vectors, "brsf")
    compiled = one_graph(model)
    for _ in range(3):
        step(compiled, vectors(6))
        state_of(twin.inner).draws += 1
        step(twin, vectors(6))
        state_of(twin.inner).draws -= 1
        same(twin, model)


@pytest.mark.parametrize("uses", [True, False])
def test_rules_of_ones_own(uses):
    class Anew(rewire.LocalRule):
        """δ through numbers drawn in each pass, with or without the weight."""

        redraw = True
        uses_weight = uses

        def backward_weight(self, weight, random, scale):
            return random + weight if uses else random

    model, twin = pair(Mixed, images, Anew())
    compiled = one_graph(model)
    for n in (6, 4):
        step(compiled, images(n)), step(twin, images(n))
        same(twin, model)
