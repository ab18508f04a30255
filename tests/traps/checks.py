"""What every trap is put through, under a local and a direct rule."""

from __future__ import annotations

import copy
import warnings

import torch
from torch.utils.checkpoint import checkpoint

import rewire
from rewire.passes import backward_id

RULES = ("fa", "dfa")
BLOCKS = {
    "": lambda forward: forward(),
    "checkpointed": lambda forward: checkpoint(forward, use_reentrant=False),
    "nested": lambda forward: checkpoint(lambda: checkpoint(forward, use_reentrant=False), use_reentrant=False),
}
block = ""  # what training passes run in, set by the fixture of that name


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels(*shape, classes=4, seed=0):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def build(make, *args, seed=0, **kwargs):
    """A model in float64 with weights from ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(*args, **kwargs).double()


def call(model, inputs):
    def forward():
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)

    return BLOCKS[block](forward) if torch.is_grad_enabled() else forward()


def one_pass(model, inputs, loss, seed=1):
    model.zero_grad()
    torch.manual_seed(seed)
    loss(call(model, inputs)).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def handed_back(model, inputs, loss, *names):
    """One pass: what these layers hand back to their inputs, a list for each of them in the order of its calls."""
    calls = {name: [] for name in names}
    hooks = []
    for name in names:

        def watch(module, args, seen=calls[name]):
            if backward_id() != -1:  # a block that is run again has no backward of its own
                return
            place = len(seen)
            seen.append(None)
            args[0].register_hook(lambda g: seen.__setitem__(place, g))

        hooks.append(model.get_submodule(name).register_forward_pre_hook(watch))
    one_pass(model, inputs, loss)
    for hook in hooks:
        hook.remove()
    return calls


def check(
    make,
    inputs,
    loss,
    rule,
    *,
    outputs=None,
    warned=(),
    zero=(),
    not_run=(),
    statuses=None,
    passes=2,
    ok=True,
    **options,
):
    """Convert, train, compare with backprop, verify, restore.

    Args:
        make: builds the model.
        outputs: names of the output layers that have to be found.
        warned: strings, each of which has to be in a warning, and each warning has to have one.
        zero: parameters (beginnings of names) that may have no gradient, because nothing is handed to them.
        not_run: layers that do not run in this pass.
        statuses: of verify, by layer, where they are not just live.

    Returns:
        The converted model after its passes, and the verification.
    """
    plain = build(make)
    before = {name: t.clone() for name, t in plain.state_dict().items()}
    types = [type(m) for m in plain.modules()]
    wanted = one_pass(plain, inputs, loss)
    model = rewire.convert(build(make), rule, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(passes):
            got = one_pass(model, inputs, loss)
    said = [str(w.message) for w in caught if issubclass(w.category, rewire.RewireWarning)]
    for text in warned:
        assert any(text in message for message in said), f"no warning about {text!r}: {said}"
    for message in said:
        assert any(text in message for text in warned), f"unexpected: {message}"
    for name, gradient in wanted.items():
        if gradient is None:
            assert got[name] is None or not got[name].any(), f"{name} has a gradient under {rule}, not under backprop"
            continue
        assert got[name] is not None, f"{name} has no gradient under {rule}"
        assert torch.isfinite(got[name]).all(), name
        if gradient.any() and not name.startswith(tuple(zero)):
            assert got[name].any(), f"the gradient of {name} is zero under {rule}"
    summary = {row.name: row for row in rewire.summary(model).rows}
    if outputs is not None:
        found = {name for name, row in summary.items() if row.role == "output"}
        assert found == set(outputs), f"output layers {found}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = rewire.verify(model, inputs, loss)
    assert result.ok == ok, str(result)
    for layer in result.layers:
        expected = (statuses or {}).get(layer.name)
        if expected is not None:
            assert layer.status == expected, str(result)
        elif layer.name in not_run:
            assert layer.status == "not run", str(result)
        else:
            assert layer.status in ("live", "first layer"), f"{layer.name}: {layer.status}\n{result}"
    _check_restore(model, before, types, plain, inputs)
    return model, result


def _check_restore(model, before, types, plain, inputs):
    restored = rewire.restore(copy.deepcopy(model))
    assert [type(m) for m in restored.modules()] == types
    assert set(restored.state_dict()) == set(before)
    for name, parameter in restored.named_parameters():
        assert torch.equal(parameter, before[name]), name
    for m in restored.modules():
        assert not m._forward_hooks and not m._forward_pre_hooks
        assert not any("rewire" in attribute for attribute in vars(m))
    fresh = copy.deepcopy(plain)
    fresh.load_state_dict(restored.state_dict())
    for m in (fresh, restored):
        m.eval()
    torch.manual_seed(2)
    a = call(fresh, inputs)
    torch.manual_seed(2)
    b = call(restored, inputs)
    for x, y in zip(*(torch.utils._pytree.tree_leaves(t) for t in (a, b)), strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
