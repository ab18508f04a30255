"""A trained model leaves: restored, exported, compiled for inference, as ONNX. Its outputs stay what they were."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import rewire
from rewire.errors import PassError
from rewire.swap import states_of
from tests.checkpoint.resume import Net, Sequence

X = torch.randn(6, 1, 6, 6, generator=torch.Generator().manual_seed(3))


def outputs(result):
    return list(result) if isinstance(result, (tuple, list)) else [result]


def trained(kind, rule, **options):
    torch.manual_seed(0)
    model = rewire.convert(kind(), rule, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        torch.stack([y.square().mean() for y in outputs(model(X))]).sum().backward()
        optimizer.step()
    return model.eval()


def plain(kind, model):
    """A model that was never converted, with the same parameters."""
    other = kind().eval()
    other.load_state_dict(model.state_dict())
    return other


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(outputs(a), outputs(b), strict=True))


def exported(model, **options):
    return torch.export.export(model, (X,), **options).module()(X)


CASES = [(Net, "fa"), (Net, "dfa"), (Sequence, "fa"), (Sequence, "dfa")]


@pytest.mark.parametrize(("kind", "rule"), CASES)
def test_a_restored_model_gives_what_it_gave_and_exports_as_if_never_converted(kind, rule):
    model = trained(kind, rule)
    with torch.no_grad():
        before = model(X)
    converted = exported(model)
    rewire.restore(model)
    with torch.no_grad():
        assert same(model(X), before)
        assert same(plain(kind, model)(X), before)
    # PyTorch may choose another kernel for an exported attention; so: bit by bit what it makes of a plain model.
    expected = exported(plain(kind, model))
    assert same(exported(model), expected)
    assert same(converted, expected)
    if kind is Net:
        assert same(expected, before)


@pytest.mark.parametrize(("kind", "rule"), [(Net, "dfa"), (Sequence, "fa")])
@pytest.mark.parametrize("strict", [False, True])
def test_a_converted_model_exports_its_forward(kind, rule, strict):
    model = trained(kind, rule)
    with torch.no_grad():
        expected = exported(plain(kind, model), strict=strict)
        assert same(exported(model, strict=strict), expected)
    names = {str(node.target) for node in torch.export.export(model, (X,), strict=strict).graph.nodes}
    assert not any("rewire" in name for name in names)


@pytest.mark.parametrize(("kind", "rule"), CASES)
def test_a_converted_model_in_training_mode_says_what_to_do(kind, rule):
    model = trained(kind, rule).train()
    with pytest.raises(PassError, match=r"rewire.restore\(model\) first"):
        exported(model)
    with pytest.raises(Exception, match=r"rewire.restore\(model\) first"):  # Dynamo puts it in an error of its own
        exported(model, strict=True)
    torch._dynamo.reset()
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    with torch.no_grad():
        exported(model)
    # And it still trains under its rule.
    torch.stack([y.square().mean() for y in outputs(model(X))]).sum().backward()
    assert rewire.output_error(model) is not None


def operations(traced):
    return [node.kind() for node in traced.inlined_graph.nodes()]


@pytest.mark.parametrize("rule", ["bp", "fa", "dfa", "kp", "grape"])
@pytest.mark.parametrize("kind", [Net, Sequence])
def test_traced_by_jit(kind, rule):
    """In eval mode the forward alone, as of a model that was never converted; and it still trains under its rule."""
    model = trained(kind, rule)
    other = plain(kind, rewire.restore(copy.deepcopy(model)))
    # PyTorch's own check fails for an attention, whether converted or not.
    ours, theirs = (torch.jit.trace(m, X, check_trace=kind is Net) for m in (model, other))
    assert operations(ours) == operations(theirs)
    assert same(ours(X), theirs(X))
    for m in (ours, theirs):
        m.zero_grad()
        torch.stack([y.square().mean() for y in outputs(m(X))]).sum().backward()
    for name, p in other.named_parameters():
        assert torch.equal(model.get_parameter(name).grad, p.grad), name
    with pytest.raises(PassError, match=r"traced program .* rewire.restore\(model\) first"):
        torch.jit.trace(model.train(), X, check_trace=False)
    with torch.no_grad():
        torch.jit.trace(model, X, check_trace=False)
    assert not any(state.busy for module in model.modules() for state in states_of(module))
    assert rewire.verify(model.eval(), X, lambda y: torch.stack([h.square().mean() for h in outputs(y)]).sum()).ok


def test_traced_by_jit_with_another_derivative_and_a_block():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), inner, nn.Tanh(), nn.Linear(8, 3)).eval()
    other = copy.deepcopy(model)
    rewire.convert(model, "dfa", blocks=["3"], derivative={nn.Tanh: torch.ones_like})
    ours, theirs = (torch.jit.trace(m, X) for m in (model, other))
    assert operations(ours) == operations(theirs)
    assert same(ours(X), theirs(X))
    torch.jit.save(ours, io.BytesIO())
    with pytest.raises(PassError, match="traced program"):
        torch.jit.trace(model.train()[2], X.requires_grad_(False) + 0.0)


def test_drawn_by_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    model = trained(Net, "dfa").train()
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(model, X)
    assert model.training and any(file.stat().st_size > 1000 for file in tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "rule"), [(Net, "dfa"), (Sequence, "fa")])
def test_compiled_for_inference(kind, rule):
    model = trained(kind, rule)
    with torch.inference_mode():
        # Inductor may add in another order than eager mode: so, what it makes of a plain model.
        expected = torch.compile(plain(kind, model), fullgraph=True)(X)
        torch._dynamo.reset()
        assert same(torch.compile(model, fullgraph=True)(X), expected)
        torch._dynamo.reset()
        rewire.restore(model)
        assert same(torch.compile(model, fullgraph=True)(X), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize(("kind", "rule"), [(Net, "dfa"), (Sequence, "fa")])
def test_onnx(kind, rule):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = trained(kind, rule)
    with torch.no_grad():
        before = outputs(model(X))
    for restored in (False, True):
        if restored:
            rewire.restore(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(model, (X,), dynamo=True, verbose=False)
        file = io.BytesIO()
        program.save(file)
        session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: X.numpy()})
        for y, expected in zip(found, before, strict=True):
            torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-5, atol=1e-6)
