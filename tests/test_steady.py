"""What the short ways through a call leave at tensors: hooks, and weights that were exchanged."""

import copy

import pytest
import torch
from torch import nn

import rewire
from rewire.errors import PassError
from rewire.swap import state_of

from .plain import check, mlp, randn, rule_gradients, settled, weights

X = randn(6, 5)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def loss_of(y):
    return nn.functional.cross_entropy(y, LABELS)


def ready(rule, passes=4, **options):
    return settled(rewire.convert(mlp(), rule, **options), X, loss_of, passes)


def e_of(y):
    return (y.detach().softmax(-1) - nn.functional.one_hot(LABELS, 4)) / len(y)


# -- hooks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_hooks_of_the_users_see_what_is_handed_back(rule):
    model = ready(rule)
    seen = []
    for name in ("0", "2", "4"):
        model.get_submodule(name).register_forward_hook(
            lambda m, args, y, name=name: y.register_hook(lambda g: seen.append((name, g.clone()))) and None
        )
    y = model(X)
    loss_of(y).backward()
    assert [name for name, _ in seen] == ["4", "2", "0"]
    for name, delta in seen:  # the gradient of a bias is the sum of what arrives at the output
        torch.testing.assert_close(delta.sum(0), model.get_submodule(name).bias.grad)
    torch.testing.assert_close(seen[0][1], e_of(y))


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_a_hook_of_the_users_that_changes_a_gradient(rule):
    model = ready(rule)
    model[2].register_forward_hook(lambda m, args, y: y.register_hook(lambda g: 0 * g) and None)
    loss_of(model(X)).backward()
    assert not model[2].weight.grad.any() and model[4].weight.grad.any()
    assert model[0].weight.grad.any() == (rule == "dfa")


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_hooks_after_a_change_in_place_see_what_came_after_it(rule):
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 4)).double()
    settled(rewire.convert(model, rule), X, loss_of, 4)
    seen = []
    h = model[0](X)
    before = h.grad_fn
    h = model[1](h)
    assert h.grad_fn is not before
    h.register_hook(lambda g: seen.append(g.clone()))
    loss_of(model[2](h)).backward()
    (after,) = seen
    torch.testing.assert_close(model[0].bias.grad, (after * (h > 0)).sum(0))
    assert not torch.equal(after, after * (h > 0))


def test_hooks_of_ours_are_gone_once_the_error_is_sure_to_come():
    model = ready("dfa")
    outputs = []
    model[2].register_forward_hook(lambda m, args, y: outputs.append(y) and None)
    y = model(X)
    assert not outputs[0]._backward_hooks
    loss_of(y).backward()
    with pytest.raises(PassError, match="layer '2' got a gradient, but no output error can reach it"):
        model[:3](X).sum().backward()


def test_a_hook_of_the_users_beside_the_check():
    model = ready("dfa")
    h = model[:3](X)
    seen = []
    handle = h.register_hook(seen.append)
    with pytest.raises(PassError, match="no output error can reach it"):
        h.sum().backward()
    handle.remove()
    with pytest.raises(PassError, match="no output error can reach it"):
        model[:3](X).sum().backward()


# -- exchanged weights --------------------------------------------------------------------------------------


def swapped(model):
    return [state_of(m).swap is not None for m in model if isinstance(m, nn.Linear)]


def test_small_layers_with_fixed_feedback_take_the_short_way():
    assert swapped(ready("fa")) == [False, True, True]
    assert swapped(ready("frsf")) == [False] * 3  # W is read in the backward
    assert swapped(ready("brsf")) == [False] * 3
    assert swapped(copy.deepcopy(ready("fa"))) == [False] * 3  # until its next pass


@pytest.mark.parametrize("copies", [False, True])
def test_the_gradients_are_those_of_the_rule(copies):
    model = ready("fa")
    for _ in range(3):
        model = copy.deepcopy(model) if copies else model
        model.zero_grad()
        y = model(X)
        loss_of(y).backward()
        check(model, rule_gradients("fa", weights(model), X, e_of(y), rewire.feedback(model)))
        torch.testing.assert_close(y, mlp_of(model)(X), rtol=0, atol=0)
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad)


def mlp_of(model):
    plain = mlp()
    plain.load_state_dict(model.state_dict())
    return plain


def test_after_a_change_of_dtype():
    model = ready("fa").float()
    y = model(X.float())
    loss_of(y).backward()
    B = rewire.feedback(model)
    assert B["4"].dtype is torch.float32
    single = rule_gradients("fa", weights(model), X.float(), e_of(y), B)
    check(model, single, tol=1e-5)


def test_feedback_changed_in_place_is_what_is_used():
    model = ready("fa")
    with torch.no_grad():
        rewire.feedback(model)["4"].mul_(-3)
    y = model(X)
    loss_of(y).backward()
    check(model, rule_gradients("fa", weights(model), X, e_of(y), rewire.feedback(model)))


def test_the_weight_may_not_change_before_the_backward():
    """As under backprop: no gradient without a word for another weight than the forward's."""
    model = ready("fa")
    loss = loss_of(model(X))
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_twice_through_one_graph():
    model = ready("fa")
    loss = loss_of(model(X))
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for p, g in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters(frozen):
    model = ready("fa")
    getattr(model[2], frozen).requires_grad_(False)
    y = model(X)
    loss_of(y).backward()
    expected = rule_gradients("fa", weights(model), X, e_of(y), rewire.feedback(model))
    del expected[f"2.{frozen}"]
    check(model, expected)
