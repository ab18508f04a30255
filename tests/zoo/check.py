"""One model under one rule: everything that conversion promises, checked."""

from __future__ import annotations

import hashlib
import math
import random
import time
import warnings
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import rewire
from rewire.diagnose.match import largest
from rewire.diagnose.watch import copy_of
from rewire.errors import RewireWarning
from rewire.preview import call
from rewire.specs import Example, resolve
from rewire.specs.losses import default_loss


def check(spec: str, rule: str, feedback: str = "channel") -> dict[str, Any]:
    """Convert, train two passes, verify, step, restore. A row of results; ``problems`` is empty if all is well."""
    start = time.perf_counter()
    return check_example(resolve(spec).build(), rule, feedback) | {"seconds": round(time.perf_counter() - start, 1)}


def check_example(example: Example, rule: str, feedback: str = "channel") -> dict[str, Any]:
    """As :func:`check`, for something built already. The model is used up."""
    model, inputs, loss_fn = example
    row: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "own_loss": loss_fn is default_loss and _own_loss(model, inputs),
    }
    problems: list[str] = []
    plain = copy_of(model)
    before = _digests(model)
    classes = [type(m) for m in model.modules()]
    attributes = _attributes(model)
    unchanged = _forward(model, inputs)
    reference = _gradients(plain, inputs, loss_fn)
    plain.zero_grad()
    for parameter in plain.parameters():  # it gets others before it runs again: the largest models fill the memory
        parameter.data = parameter.data.new_empty(0)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rewire.convert(model, rule, feedback=feedback)
        if before != _digests(model):
            problems.append("state_dict changed by convert")
        if not _equal(unchanged, _forward(model, inputs)):
            problems.append("forward changed by convert")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        _gradients(model, inputs, loss_fn)
        optimizer.step()  # many start with a head of zeros, below which nothing is to be seen before a step
        gradients = _gradients(model, inputs, loss_fn)
        optimizer.step()
        model.zero_grad()
        stepped = _digests(model)
        proof = rewire.verify(model, inputs, loss_fn)
    row["warnings"] = sorted({str(w.message) for w in caught if issubclass(w.category, RewireWarning)})

    wanted = {name for name, size in reference.items() if math.isfinite(size)}
    row["backprop_not_finite"] = len(reference) - len(wanted)
    if missing := sorted(wanted - gradients.keys()):
        problems.append(f"{len(missing)} parameters without a gradient: {', '.join(missing[:3])}")
    if bad := sorted(n for n in wanted & gradients.keys() if not math.isfinite(gradients[n])):
        problems.append(f"{len(bad)} gradients not finite: {', '.join(bad[:3])}")
    row["zero"] = sorted(n for n in wanted & gradients.keys() if gradients[n] == 0 and reference[n] != 0)

    row["layers"] = dict(Counter(layer.status for layer in proof.layers))
    if not proof.ok:
        wrong = [layer for layer in proof.layers if layer.status in ("dead", "unrouted", "wrong")]
        problems.append(
            f"verify: {len(wrong)} not ok: " + "; ".join(f"{w.name} {w.status} ({w.note})" for w in wrong[:3])
        )
    kept: Counter[str] = Counter()
    for entry in rewire.summary(model).rows:
        if not entry.converted and "elementwise" not in entry.note:
            kept[f"{entry.type}: {entry.note}"] += 1
    row["on_backprop"] = dict(kept)

    if stepped == before:
        problems.append("the optimizer step changed nothing")
    if _digests(model) != stepped:
        problems.append("state_dict changed by verify")
    rewire.restore(model)
    if _digests(model) != stepped:
        problems.append("state_dict changed by restore")
    if [type(m) for m in model.modules()] != classes:
        problems.append("classes not restored")
    if _attributes(model) != attributes:
        problems.append("restore left attributes or hooks")
    for parameter, other in zip(plain.parameters(), model.parameters(), strict=True):
        parameter.data = other.data
    now = _tensors(model)
    with torch.no_grad():
        for key, value in _tensors(plain).items():
            if value.data_ptr() != now[key].data_ptr():
                value.copy_(now[key])
    if not _equal(_forward(plain, inputs), _forward(model, inputs)):
        problems.append("forward after restore differs")
    return {**row, "ok": not problems, "problems": problems}


def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def _own_loss(model: nn.Module, inputs: Any) -> bool:
    _seed()
    return getattr(call(copy_of(model), inputs), "loss", None) is not None


def _gradients(model: nn.Module, inputs: Any, loss_fn: Any) -> dict[str, float]:
    """One training pass; the largest magnitude in each gradient that there is, by parameter. nan and inf show."""
    model.train()
    model.zero_grad()
    _seed()
    loss_fn(call(model, inputs)).backward()
    return {name: largest(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def _forward(model: nn.Module, inputs: Any) -> list[Tensor] | None:
    """What the model returns in eval mode; None if it cannot be evaluated on what it trains on."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    _seed()
    try:
        with torch.no_grad():
            return [y for y in tree_leaves(call(model, inputs)) if isinstance(y, Tensor)]
    except (RuntimeError, NotImplementedError) as error:
        if "nms" in str(error) or "ops" in str(error):
            return None  # detectors: their compiled operations are missing
        raise
    finally:
        for module, mode in modes:
            module.training = mode


def _equal(a: list[Tensor] | None, b: list[Tensor] | None) -> bool:
    if a is None or b is None:
        return a is b
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(_bits(x), _bits(y)) for x, y in zip(a, b, strict=True)
    )


def _bits(x: Tensor) -> Tensor:
    """So that a nan equals itself, and minus zero is not zero."""
    return x.detach().contiguous().flatten().view(torch.uint8) if x.is_floating_point() and x.numel() else x


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}


def _digests(model: nn.Module) -> dict[str, bytes]:
    """What stands for every tensor of the state dict, bit for bit."""
    return {
        key: hashlib.blake2b(value.detach().contiguous().flatten().view(torch.uint8).numpy(), digest_size=16).digest()
        for key, value in _tensors(model).items()
    }


def _attributes(model: nn.Module) -> list[tuple[Any, ...]]:
    return [
        (name, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_always_called))
        for name, m in model.named_modules()
    ]
