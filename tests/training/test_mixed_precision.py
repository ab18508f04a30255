"""Half precision: gradients within the tolerance of the dtype of those that float64 gives.

The reference is the NumPy one, on the weights as the model has them (rounded, where it is kept in half precision) and
the feedback that it says it used.
"""

import contextlib
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire

from ..rules.checks import Problem, numpy, used_feedback

RULES = ("bp", "fa", "usf", "frsf", "brsf", "dfa", "sdfa", "drtp", "shallow")
# Eight times the rounding of one number: three layers, forward and backward.
TOLERANCE = {torch.bfloat16: 8 * 2**-8, torch.float16: 8 * 2**-11}
HALF = list(TOLERANCE)


def to_head_in_float(module, args):
    return tuple(a.float() for a in args)


def prepared(problem, how, dtype):
    """The problem's model and x in this precision, and the context to run it in."""
    model, x = problem.model, problem.x.float()
    if how == "autocast":
        model.float()
        return x, torch.autocast("cpu", dtype)
    model.to(dtype)
    if how == "head in float32":
        head = model[-1].float()
        head.register_forward_pre_hook(to_head_in_float)
    return x.to(dtype), contextlib.nullcontext()


def compare(grads, expected, tolerance):
    """Frobenius norm of the difference in a layer's weight and bias, in units of that of what is expected."""
    for layer in {name.rpartition(".")[0] for name in grads}:
        names = [name for name in grads if name.startswith(f"{layer}.")]
        ours = np.concatenate([grads[name].ravel() for name in names])
        wanted = np.concatenate([expected[name].ravel() for name in names])
        assert np.isfinite(ours).all(), layer
        size = np.linalg.norm(wanted)
        off = np.linalg.norm(ours - wanted) / size if size else np.linalg.norm(ours)
        assert off < tolerance, f"{layer}: {off:.4f} off"


def gradients(model):
    assert all(p.grad.dtype is p.dtype for p in model.parameters())
    return numpy({name: p.grad for name, p in model.named_parameters()})


def check(problem, rule, x, context, dtype):
    for _ in range(2):
        problem.model.zero_grad()
        with rewire.targets(problem.labels) if rule == "drtp" else contextlib.nullcontext(), context:
            y = problem.model(x)
            loss = F.cross_entropy(y.float(), problem.labels)
        loss.backward()
    problem.x = x.double()
    expected = problem.reference(rule, used_feedback(problem.model))
    compare(gradients(problem.model), expected.grads, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("how", ["autocast", "all of it", "head in float32"])
@pytest.mark.parametrize("rule", RULES)
def test_rules(rule, how, net, dtype):
    problem = Problem(net)
    x, context = prepared(problem, how, dtype)
    rewire.convert(problem.model, rule, scale=0.3)
    check(problem, rule, x, context, dtype)
    e = rewire.output_error(problem.model)
    wanted = torch.float32 if how == "head in float32" else dtype
    assert rule == "bp" or e.dtype is wanted


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("how", ["autocast", "all of it", "head in float32"])
@pytest.mark.parametrize("structure", ["lowrank", "seeded", "channel", "sparse", "shared", "orthogonal", "ternary"])
def test_structures(structure, how, dtype):
    problem = Problem("cnn")
    x, context = prepared(problem, how, dtype)
    rewire.convert(problem.model, "dfa", scale=0.3, feedback=structure)
    check_structure(problem, x, context, dtype)


@pytest.mark.parametrize("how", ["autocast", "all of it", "head in float32"])
@pytest.mark.parametrize("structure", [rewire.structures.Dense, rewire.structures.LowRank, rewire.structures.Shared])
def test_feedback_in_bfloat16_on_request(structure, how):
    problem = Problem("cnn")
    x, context = prepared(problem, how, torch.bfloat16)
    rewire.convert(problem.model, "dfa", scale=0.3, feedback=structure(dtype=torch.bfloat16))
    check_structure(problem, x, context, torch.bfloat16)
    half = rewire.summary(problem.model).feedback_bytes
    rewire.convert(problem.model, "dfa", scale=0.3, feedback=structure(dtype=torch.float32))
    check_structure(problem, x, context, torch.bfloat16)
    assert half * 2 == rewire.summary(problem.model).feedback_bytes


def check_structure(problem, x, context, dtype):
    """As :func:`check`; a B with a value per channel is spread over positions for the reference."""
    for _ in range(2):
        problem.model.zero_grad()
        with context:
            y = problem.model(x)
            loss = F.cross_entropy(y.float(), problem.labels)
        loss.backward()
    problem.x = x.double()
    B = used_feedback(problem.model)
    if B["2"].ndim == 2:
        shape = problem.model[0](x).shape
        B["2"] = np.broadcast_to(B["2"][:, :, None, None], (4, *shape[1:]))
    expected = problem.reference("dfa", B)
    compare(gradients(problem.model), expected.grads, TOLERANCE[dtype])


@pytest.mark.parametrize("how", ["autocast", "all of it"])
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_verify_and_auto_scale(rule, how):
    problem = Problem("cnn")
    x, context = prepared(problem, how, torch.bfloat16)
    rewire.convert(problem.model, rule)

    def loss(y):
        return F.cross_entropy(y.float(), problem.labels)

    with context:
        for _ in range(2):
            loss(problem.model(x)).backward()
        result = rewire.verify(problem.model, x, loss)
    assert result.ok, str(result)
    if rule == "dfa":
        scales = rewire.scales(problem.model)
        exact = Problem("cnn")
        rewire.convert(exact.model, "dfa")
        for _ in range(2):
            F.cross_entropy(exact.model(exact.x), exact.labels).backward()
        for name, scale in rewire.scales(exact.model).items():
            assert scales[name] == pytest.approx(scale, rel=0.03)


def step(model, x, labels, scaler=None):
    model.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(model(x).float(), labels)
    (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is not None:
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 1024  # nothing was infinite


@pytest.mark.parametrize("scale", ["auto", 0.3])
@pytest.mark.parametrize("rule", ["fa", "usf", "frsf", "dfa", "shallow"])
def test_gradient_scaler(rule, scale):
    """What these rules hand back grows with the loss, so unscaled gradients are those without a scaler."""
    grads = {}
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        problem = Problem("cnn")
        model, x = problem.model.float(), problem.x.float()
        rewire.convert(model, rule, scale=scale)
        for _ in range(3):
            step(model, x, problem.labels, scaler)
        grads[scaler is None] = gradients(model)
    compare(grads[False], grads[True], TOLERANCE[torch.float16])


def test_infinite_first_steps_of_a_scaler_set_no_scale():
    """A scaler starts too high; the measuring pass is then the first finite one."""
    problem = Problem("cnn")
    model, x = problem.model.half(), problem.x.half()
    rewire.convert(model, "dfa")
    with pytest.warns(rewire.RewireWarning, match="not finite"):
        (F.cross_entropy(model(x).float(), problem.labels) * 2.0**40).backward()
        model(x)
    assert not rewire.scales(model)
    model.zero_grad()
    F.cross_entropy(model(x).float(), problem.labels).backward()
    assert set(rewire.scales(model)) == {"2", "5"}


# -- memory formats ----------------------------------------------------------------------------------------


def images(dims):
    torch.manual_seed(0)
    conv = nn.Conv2d if dims == 4 else nn.Conv3d
    norm = nn.BatchNorm2d if dims == 4 else nn.BatchNorm3d
    return nn.Sequential(
        conv(3, 8, 3, padding=1),
        norm(8),
        nn.ReLU(),
        conv(8, 8, 3, padding=1),
        nn.ReLU(),
        conv(8, 8, 1),
        nn.Flatten(2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


CASES = [(rule, "dense") for rule in ("fa", "usf", "frsf", "dfa", "sdfa", "shallow")]
CASES += [("dfa", structure) for structure in ("channel", "lowrank", "seeded")]


@pytest.mark.parametrize("rule, feedback", CASES)
@pytest.mark.parametrize("dims", FORMATS)
def test_channels_last_is_kept(dims, rule, feedback):
    """Outputs, and what comes back to them, lie in memory as under backprop; values are those of the usual order."""
    x = torch.randn(2, 3, *(5,) * (dims - 2), generator=torch.Generator().manual_seed(1))

    def run(name, format):
        model = images(dims).to(memory_format=format)
        if name != "bp":
            rewire.convert(model, name, scale=0.3, feedback=feedback)
        for _ in range(2):
            model.zero_grad()
            h, kept = x.to(memory_format=format), {}
            for i, module in enumerate(model):
                h = module(h)
                if h.dim() == dims:
                    kept[i, "output"] = h.is_contiguous(memory_format=format)

                    def note(g, i=i, kept=kept):
                        kept[i, "gradient"] = g.is_contiguous(memory_format=format)

                    h.register_hook(note)
            h.square().sum().backward()
        return gradients(model), kept

    usual, _ = run(rule, torch.contiguous_format)
    grads, kept = run(rule, FORMATS[dims])
    _, plain = run("bp", FORMATS[dims])
    for name, expected in usual.items():
        np.testing.assert_allclose(grads[name], expected, rtol=1e-4, atol=1e-4)
    lost = [key for key in plain if plain[key] and not kept[key]]
    assert not lost and sum(plain.values()) > len(plain) / 2


# -- streaming ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("how", ["autocast", "all of it"])
def test_streamed(how, dtype):
    problem = Problem("cnn")
    x, context = prepared(problem, how, dtype)
    rewire.convert(problem.model, "dfa", scale=0.3, skip="cut")

    def loss(y):
        return F.cross_entropy(y.float(), problem.labels)

    with context:
        loss(problem.model(x)).backward()
        problem.model.zero_grad()
        rewire.backward_streamed(problem.model, x, loss)
    problem.x = x.double()
    expected = problem.reference("dfa", used_feedback(problem.model))
    compare(gradients(problem.model), expected.grads, TOLERANCE[dtype])


def test_no_warning():
    problem = Problem("cnn")
    x, context = prepared(problem, "autocast", torch.bfloat16)
    rewire.convert(problem.model, "dfa")
    with warnings.catch_warnings(), context:
        warnings.simplefilter("error")
        for _ in range(3):
            F.cross_entropy(problem.model(x).float(), problem.labels).backward()
