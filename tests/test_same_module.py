"""After conversion it is still the same module, and after ``restore`` it is what it was."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import rewire

from .plain import (
    SCALE,
    check,
    cross_entropy,
    error,
    mlp,
    randn,
    rule_gradients,
    same,
    seeded,
    settled,
    states,
    weights,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),  # the model's input has no gradient
    pytest.mark.filterwarnings("ignore:layer .* did not run:rewire.RewireWarning"),
]
RULES = ("bp", "fa", "usf", "brsf", "frsf", "dfa", "sdfa", "drtp", "shallow")
LABELS = torch.tensor([0, 3, 1, 2, 0, 1])
LOSS = cross_entropy(LABELS)
X = randn(6, 5, seed=1)


class ResidualBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.na = nn.BatchNorm2d(width)
        self.b = nn.Conv2d(width, width, 3, padding=1, groups=2, bias=False)
        self.nb = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(x + self.nb(self.b(self.relu(self.na(self.a(x))))))


def resnet():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        ResidualBlock(4),
        nn.Dropout2d(0.3),
        ResidualBlock(4),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(16, 4),
    )


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding="valid", groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular", dilation=2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.LazyLinear(4),
    )


def cnn_of_known_size():
    model = cnn()
    model(torch.zeros(1, 2, 8, 8))
    return model


def tokens():
    return nn.Sequential(
        nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)
    )


NETS = {
    "mlp": (lambda: mlp().float(), (6, 5)),
    "cnn": (cnn_of_known_size, (6, 2, 8, 8)),
    "resnet": (resnet, (6, 2, 8, 8)),
    "tokens": (tokens, (6, 3, 5)),
}


def net(name):
    make, shape = NETS[name]
    return seeded(make).float(), randn(*shape, seed=3, dtype=torch.float32)


def loss_of(y):
    return F.cross_entropy(y if y.dim() == 2 else y.mean(1), LABELS)


def train_pass(model, x):
    with rewire.targets(LABELS if x.dim() != 3 else LABELS[:, None].expand(6, x.shape[1])):
        loss = loss_of(model(x))
    loss.backward()
    return loss


def snapshot(model):
    """What makes up a model, module by module, in order."""
    return [
        (
            name,
            module,
            type(module),
            list(module.__dict__),
            {k: v if isinstance(v, dict) is False else (type(v), list(v.items())) for k, v in module.__dict__.items()},
            type(module).forward,
        )
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def assert_same_snapshot(before, after, ordered=True):
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert old[0] == new[0] and old[1] is new[1] and old[2] is new[2] and old[5] is new[5], old[0]
        assert old[3] == new[3] or (not ordered and sorted(old[3]) == sorted(new[3])), (
            f"{old[0]}: attributes {set(old[3]) ^ set(new[3])}"
        )
        for key, value in old[4].items():
            if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], list):
                assert value[0] is new[4][key][0]
                ours = new[4][key][1]
                assert [k for k, _ in value[1]] == [k for k, _ in ours], f"{old[0]}.{key}"
                assert all(a is b for (_, a), (_, b) in zip(value[1], ours, strict=True)), f"{old[0]}.{key}"
            else:
                assert value is new[4][key] or value == new[4][key], f"{old[0]}.{key}"


# -- what conversion leaves alone ------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NETS)
def test_state_dict_parameters_and_names_are_the_same(name, rule):
    model, x = net(name)
    plain = copy.deepcopy(model)
    objects = [
        *model.named_parameters(),
        *model.named_buffers(),
        *model.named_modules(),
        *model.named_children(),
    ]
    types = [type(m) for m in model.modules()]
    assert rewire.convert(model, rule) is model
    train_pass(model, x)
    train_pass(model, x)
    now = [*model.named_parameters(), *model.named_buffers(), *model.named_modules(), *model.named_children()]
    assert [n for n, _ in now] == [n for n, _ in objects]
    assert all(a is b for (_, a), (_, b) in zip(now, objects, strict=True))
    assert all(isinstance(m, t) for m, t in zip(model.modules(), types, strict=True))
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    for key in theirs:
        if "running" not in key and "num_batches" not in key:
            assert torch.equal(ours[key], theirs[key]), key
    assert ours._metadata == theirs._metadata
    # loadable both ways
    other, _ = net(name)
    for p in other.parameters():
        p.data.add_(1.0)
    other.load_state_dict(ours, strict=True)
    model.load_state_dict(other.state_dict(), strict=True)
    plain.load_state_dict(ours, strict=True)
    assert all(torch.equal(plain.state_dict()[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_forward_is_bitwise_the_same(name, rule, training, grad):
    plain, x = net(name)
    model = rewire.convert(copy.deepcopy(plain), rule)
    for _ in range(3):  # unsettled, settled
        plain.train(training)
        model.train(training)
        outputs = []
        for m in (plain, model):
            torch.manual_seed(7)
            with torch.set_grad_enabled(grad):
                outputs.append(m(x))
        assert torch.equal(*outputs)
        assert outputs[0].stride() == outputs[1].stride()
        assert outputs[0].requires_grad == outputs[1].requires_grad
        for (k, a), (_, b) in zip(plain.state_dict().items(), model.state_dict().items(), strict=True):
            assert torch.equal(a, b), k
        model.train()
        plain.train()
        torch.manual_seed(8)
        train_pass(model, x)
        torch.manual_seed(8)
        plain(x)  # moves the running statistics just as far


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_an_optimizer_from_before_trains_it(rule):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewire.convert(model, rule, scale=SCALE)
    before = [p.detach().clone() for p in model.parameters()]
    LOSS(model(X)).backward()
    layers = weights(model)
    wanted = rule_gradients(rule, layers, X, error(LOSS, states(layers, X)[-1]), rewire.feedback(model))
    optimizer.step()
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        same(p, old - 0.1 * wanted[name], name)


@pytest.mark.parametrize("rule", ["bp", "fa", "dfa"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_see_the_right_tensors(rule, when):
    model = mlp()
    seen = {}

    def add_hooks():
        for name, m in model.named_children():
            m.register_forward_pre_hook(lambda m, args, n=name: seen.__setitem__(("pre", n), args[0]))
            m.register_forward_hook(lambda m, args, out, n=name: seen.__setitem__(("out", n), (args[0], out)))
            m.register_full_backward_pre_hook(lambda m, g, n=name: seen.__setitem__(("delta", n), g[0]))
            m.register_full_backward_hook(lambda m, gi, go, n=name: seen.__setitem__(("back", n), (gi[0], go[0])))

    if when == "before":
        add_hooks()
    rewire.convert(model, rule, scale=SCALE)
    if when == "after":
        add_hooks()
    for _ in range(2):
        seen.clear()
        model.zero_grad()
        LOSS(model(X)).backward()
        layers = weights(model)
        h = states(layers, X)
        W = {n: W for n, W, _ in layers}
        B = rewire.feedback(model)
        e = error(LOSS, h[-1])
        check(model, rule_gradients(rule, layers, X, e, B))
        delta = e
        for i, n in ((2, "4"), (1, "2"), (0, "0")):
            same(seen["pre", n], h[i])
            same(seen["out", n][0], h[i])
            same(seen["out", n][1], h[i] @ W[n].T + layers[i][2])
            same(seen["delta", n], delta, f"delta at {n}")
            same(seen["back", n][1], delta)
            if i:
                back = {"bp": lambda: delta @ W[n], "fa": lambda: delta @ B[n], "dfa": lambda: e @ B[n]}[rule]()  # noqa: B023
                same(seen["back", n][0], back, f"grad_input of {n}")
                delta = back * (1 - h[i] ** 2)
                same(seen["delta", str(2 * i - 1)], back)
            else:
                assert seen["back", n][0] is None


def test_forward_hooks_that_replace_tensors_still_do():
    model = mlp()
    model[2].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    model[2].register_forward_hook(lambda m, args, out: out + 1)
    plain = copy.deepcopy(model)
    rewire.convert(model, "dfa", scale=SCALE)
    for _ in range(2):
        y = model(X)
        assert torch.equal(y, plain(X))
        LOSS(y).backward()
    handle = model[4].register_forward_hook(lambda m, args, out: out * 0)
    assert not model(X).any()
    handle.remove()
    assert torch.equal(model(X), plain(X))


# -- copies and files ---------------------------------------------------------------------------------------


def gradients_after(model, x):
    model.zero_grad()
    train_pass(model, x)
    return [p.grad.clone() for p in model.parameters()]


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_file])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("later", [False, True], ids=["unused", "trained"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_copies_train_as_the_original(way, rule, later, name):
    model, x = net(name)
    rewire.convert(model, rule, seed=4, derivative={nn.Tanh: lambda_free_derivative})
    if later:
        train_pass(model, x)
        train_pass(model, x)
        model.zero_grad()
    twin = way(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert repr(twin) == repr(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q) and p is not q
    for _ in range(3):
        ours, theirs = gradients_after(model, x), gradients_after(twin, x)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert rewire.scales(model) == rewire.scales(twin)
    a, b = rewire.feedback(model), rewire.feedback(twin)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    # and they are separate: restoring one leaves the other
    rewire.restore(twin)
    assert rewire.summary(model).rows[0].converted and not rewire.summary(twin).rows[0].converted
    gradients_after(model, x)


def lambda_free_derivative(a):
    return 1 / (1 + a**2)


def test_a_file_opened_in_another_process(tmp_path):
    model = mlp()
    rewire.convert(model, "dfa", seed=4)
    settled(model, X, LOSS)
    torch.save(model, tmp_path / "model.pt")
    pickle.dump(model, (tmp_path / "model.pkl").open("wb"))
    LOSS(model(X)).backward()
    torch.save([p.grad for p in model.parameters()], tmp_path / "grads.pt")
    torch.save((X, LABELS), tmp_path / "data.pt")
    code = """
import pickle, sys, torch
x, labels = torch.load("data.pt")
wanted = torch.load("grads.pt")
for model in (torch.load("model.pt", weights_only=False), pickle.load(open("model.pkl", "rb"))):
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(x), labels).backward()
    for p, g in zip(model.parameters(), wanted):
        assert torch.equal(p.grad, g)
    import rewire
    assert len(rewire.scales(model)) == 2
    assert type(rewire.restore(model)[0]) is torch.nn.Linear
print("fine")
"""
    out = run_python(code, tmp_path)
    assert out.strip() == "fine"


def run_python(code, folder, **environment):
    import os
    from pathlib import Path

    root = str(Path(rewire.__file__).parents[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    env["PYTHONPATH"] = os.pathsep.join([root, env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_part_of_a_model_can_be_copied():
    model = rewire.convert(mlp(), "dfa", scale=SCALE)
    settled(model, X, LOSS)
    part = copy.deepcopy(model[2:])
    size = len(pickle.dumps(part))
    assert size < 20_000
    h = states(weights(model), X)[1].requires_grad_()
    LOSS(part(h)).backward()
    same(h.grad, error(LOSS, states(weights(model), X)[-1]) @ rewire.feedback(model)["2"])


def test_files_hold_no_feedback():
    def size(m):
        return len(pickle.dumps(m))

    plain = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10))
    for rule in ("dfa", "fa"):
        model = rewire.convert(copy.deepcopy(plain), rule)
        for _ in range(2):
            model(torch.randn(4, 300)).square().sum().backward()
        model.zero_grad(set_to_none=True)
        assert size(model) < size(plain) + 15_000


# -- dtype and device -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fa", "brsf", "dfa", "sdfa"])
@pytest.mark.parametrize("how", ["to", "half", "bfloat16", "double", "float"])
@pytest.mark.parametrize("name", ["mlp", "resnet"])
@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
def test_other_dtypes(rule, how, name, later):
    model, x = net(name)
    rewire.convert(model, rule)
    if later:
        train_pass(model, x)
        train_pass(model, x)
        model.zero_grad()
    dtype = {"to": torch.bfloat16, "half": torch.float16}.get(how) or getattr(torch, how)
    model = model.to(torch.bfloat16) if how == "to" else getattr(model, how)()
    for _ in range(3):
        model.zero_grad()
        loss_of(model(x.to(dtype)).float()).backward()
        for n, p in model.named_parameters():
            assert p.dtype == dtype and p.grad.dtype == dtype, n
            assert p.grad.isfinite().all(), n
    for B in rewire.feedback(model).values():
        assert B.dtype == dtype
    assert sum(bool(p.grad.any()) for p in model.parameters()) >= 4


def test_a_double_pass_after_conversion_in_float_is_exact():
    model = rewire.convert(mlp().float(), "dfa", scale=SCALE)
    model(X.float()).sum().backward()
    model.double().zero_grad()
    LOSS(model(X)).backward()
    layers = weights(model)
    check(model, rule_gradients("dfa", layers, X, error(LOSS, states(layers, X)[-1]), rewire.feedback(model)))


@pytest.mark.parametrize("rule", ["dfa", "fa"])
@pytest.mark.parametrize("scale", [SCALE, "auto"])
def test_meta_device(rule, scale):
    plain = mlp()
    with torch.device("meta"):
        model = mlp_on_current_device()
    rewire.convert(model, rule, scale=scale, seed=4)
    str(rewire.summary(model))
    model.to_empty(device="cpu")
    model.load_state_dict(plain.state_dict(), strict=True)
    reference = rewire.convert(copy.deepcopy(plain), rule, scale=scale, seed=4)
    for _ in range(2):
        for m in (model, reference):
            m.zero_grad()
            LOSS(m(X)).backward()
        layers = weights(model)
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    check(model, rule_gradients(rule, layers, X, error(LOSS, states(layers, X)[-1]), rewire.feedback(model)))
    a, b = rewire.feedback(model), rewire.feedback(reference)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def mlp_on_current_device():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4)).double()


@pytest.mark.parametrize("rule", ["dfa", "fa", "frsf"])
def test_autocast_on_the_cpu(rule):
    plain, x = net("mlp")
    low, full = (rewire.convert(copy.deepcopy(plain), rule) for _ in range(2))
    for _ in range(3):
        for model in (low, full):
            model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = low(x)
            loss = F.cross_entropy(y.float(), LABELS)
        assert y.dtype == torch.bfloat16
        loss.backward()
        F.cross_entropy(full(x), LABELS).backward()
        for (n, p), q in zip(low.named_parameters(), full.parameters(), strict=True):
            assert p.grad.dtype == torch.float32 and p.grad.isfinite().all()
            assert (p.grad - q.grad).norm() < 0.05 * q.grad.norm(), n


@pytest.mark.parametrize("rule", ["dfa", "fa"])
def test_training_under_autocast_learns(rule):
    model, x = net("mlp")
    rewire.convert(model, rule)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), LABELS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


# -- special modules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["dfa", "fa", "usf"])
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights(rule, norm):
    """delta at each layer's output and the layer's input give the gradient of W as used; backprop does the rest."""
    plain = mlp()
    for i in (0, 2, 4):
        norm(plain[i])
    plain.eval()  # spectral_norm moves its vectors when training
    model = rewire.convert(copy.deepcopy(plain), rule, scale=SCALE)
    assert list(model.state_dict()) == list(plain.state_dict())
    for _ in range(2):
        model.zero_grad()
        y = model(X)
        assert torch.equal(y, plain(X))
        LOSS(y).backward()
        B = rewire.feedback(model)
        layers = [(n, m.weight.detach(), m.bias.detach()) for n, m in plain.named_children() if hasattr(m, "bias")]
        e = error(LOSS, states(layers, X)[-1])
        if rule == "usf":
            for n, W, _ in layers:
                same(B[n], SCALE * torch.sign(W), n)
        wanted = rule_gradients("dfa" if rule == "dfa" else "fa", layers, X, e, B)
        for n, m in plain.named_children():
            if not hasattr(m, "bias"):
                continue
            same(model.get_submodule(n).bias.grad, wanted[f"{n}.bias"])
            originals = [p for k, p in m.named_parameters() if k != "bias"]
            exact = torch.autograd.grad(m.weight, originals, wanted[f"{n}.weight"])
            ours = [p.grad for k, p in model.get_submodule(n).named_parameters() if k != "bias"]
            for a, b in zip(ours, exact, strict=True):
                same(a, b, n)
    rewire.restore(model)
    assert [type(m) for m in model.modules()] != [] and repr(model) == repr(plain)


def test_parametrization_registered_after_conversion_comes_off_first():
    model = rewire.convert(mlp(), "dfa", scale=SCALE)
    before = snapshot(model)
    parametrizations.weight_norm(model[2])
    with pytest.raises(rewire.ConversionError, match="'2'"):
        rewire.restore(model)
    with pytest.raises(rewire.ConversionError, match="'2'"):
        rewire.convert(model, "fa")
    torch.nn.utils.parametrize.remove_parametrizations(model[2], "weight")
    assert [s[2] for s in snapshot(model)] == [s[2] for s in before]
    assert type(rewire.restore(model)[2]) is nn.Linear


@pytest.mark.parametrize("rule", ["dfa", "fa"])
def test_tied_weights(rule):
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))
    model[4].weight = model[2].weight
    rewire.convert(model, rule, scale=SCALE)
    assert model[4].weight is model[2].weight
    assert len(list(model.parameters())) == 5
    for _ in range(2):
        model.zero_grad()
        LOSS(model(X)).backward()
        layers = weights(model)
        wanted = rule_gradients(rule, layers, X, error(LOSS, states(layers, X)[-1]), rewire.feedback(model))
        wanted["2.weight"] = wanted["2.weight"] + wanted.pop("4.weight")
        check(model, wanted)
    copied = copy.deepcopy(model)
    assert copied[4].weight is copied[2].weight


@pytest.mark.parametrize("rule", RULES)
def test_a_model_that_is_one_layer(rule):
    model = seeded(nn.Linear, 5, 4)
    before, text = snapshot(model), repr(model)
    assert rewire.convert(model, rule, scale=SCALE) is model
    x = X.clone().requires_grad_()
    with rewire.targets(LABELS):
        y = model(x)
    LOSS(y).backward()
    e = error(LOSS, X @ model.weight.detach().T + model.bias.detach())
    check(model, {"weight": e.T @ X, "bias": e.sum(0)})
    if rule in ("fa", "dfa"):
        same(x.grad, e @ rewire.feedback(model)[""])
    if rule == "bp":
        same(x.grad, e @ model.weight)
    same(rewire.output_error(model), e)
    rewire.restore(model)
    model.zero_grad()
    assert repr(model) == text
    assert_same_snapshot(before, snapshot(model))


def test_one_module_at_two_places():
    shared = seeded(nn.Linear, 6, 6)
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1)))
    model[2] = model[4] = shared
    names = [n for n, _ in model.named_modules(remove_duplicate=False)]
    rewire.convert(model, "dfa", layers={"4": "fa"}, scale=SCALE)
    assert [n for n, _ in model.named_modules(remove_duplicate=False)] == names
    assert model[2] is model[4]
    assert {r.name: r.rule for r in rewire.summary(model).rows} == {"0": "dfa", "2": "fa"}
    rewire.restore(model)
    assert type(shared) is nn.Linear


# -- restore -----------------------------------------------------------------------------------------------------


def hooked(model):
    leaves = [m for m in model.modules() if not list(m.children())]
    leaves[0].register_forward_hook(lambda m, a, o: None)
    leaves[-1].register_full_backward_hook(lambda m, a, b: None)
    return model


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("passes", [0, 1, 3])
def test_restore_leaves_no_trace(name, rule, passes):
    model, x = net(name)
    hooked(model)
    text = repr(model)
    before = snapshot(model)
    activations = {type(m): torch.ones_like for m in model.modules() if type(m) in (nn.Tanh, nn.ReLU, nn.GELU)}
    rewire.convert(model, rule, derivative=activations)
    for _ in range(passes):
        train_pass(model, x)
    model.zero_grad()
    assert rewire.restore(model) is model
    assert repr(model) == text
    assert_same_snapshot(before, snapshot(model))
    for p in model.parameters():
        assert not p._backward_hooks
        assert set(vars(p)) == set()
    twin = copy.deepcopy(model)
    for m in (model, twin):
        torch.manual_seed(3)
        loss_of(m(x)).backward()
    plain, _ = net(name)
    plain.load_state_dict(twin.state_dict())
    assert all(p.grad is not None for p in model.parameters())


def test_restore_gives_backprop_back():
    model, plain = mlp(), mlp()
    rewire.convert(model, "dfa", skip="cut", scale=SCALE)
    settled(model, X, LOSS)
    rewire.restore(model)
    for m in (model, plain):
        LOSS(m(X)).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_restore_of_an_unconverted_model_does_nothing():
    model = mlp()
    before = snapshot(model)
    assert rewire.restore(rewire.restore(model)) is model
    assert_same_snapshot(before, snapshot(model))


def test_a_graph_from_before_restore_still_follows_the_rule():
    model = rewire.convert(mlp(), "dfa", scale=SCALE)
    settled(model, X, LOSS)
    B = rewire.feedback(model)
    loss = LOSS(model(X))
    rewire.restore(model)
    loss.backward()
    layers = weights(model)
    check(model, rule_gradients("dfa", layers, X, error(LOSS, states(layers, X)[-1]), B))


# -- conversions that fail, and conversions that follow one another -------------------------------------------------


class NotARule:
    pass


def raises_half_way(name, module):
    if name == "2":
        raise ZeroDivisionError(name)
    return "fa"


FAILING = {
    "unknown rule": (dict(rule="dfaa"), "did you mean 'dfa'"),
    "rule class": (dict(rule=rewire.LocalRule), "pass an instance"),
    "no rule": (dict(rule=NotARule()), "rule"),
    "rule None": (dict(rule=None), "rule"),
    "pattern": (dict(layers={"9*": "fa"}), "no layer fits '9\\*'"),
    "pattern, nearly": (dict(layers={"fourr": "fa"}), "no layer fits 'fourr'.*did you mean 'four'"),
    "type": (dict(layers={nn.Conv2d: "fa"}), "no layer fits type Conv2d"),
    "pattern of no kind": (dict(layers={3: "fa"}), "name pattern or a module type"),
    "rule in layers": (dict(layers={"four": "backprop"}), "unknown rule 'backprop'"),
    "layers of no kind": (dict(layers=["four"]), "layers"),
    "callable's rule": (dict(layers=lambda n, m: "shalow" if n == "2" else None), "did you mean 'shallow'"),
    "output": (dict(output="fuor"), "no layer is named 'fuor'.*did you mean 'four'"),
    "output, an activation": (dict(output="1"), "no layer is named '1'"),
    "outputs": (dict(output=["four", "five"]), "no layer is named 'five'"),
    "no output": (dict(output=[]), "output"),
    "skip": (dict(skip="kep"), "'keep' or 'cut'.*'kep'"),
    "feedback": (dict(feedback="danse"), "did you mean 'dense'"),
    "scale word": (dict(scale="atuo"), "scale is 'auto'"),
    "scale zero": (dict(scale=0.0), "positive"),
    "scale negative": (dict(scale=-0.1), "positive"),
    "scale nan": (dict(scale=float("nan")), "positive"),
    "scale bool": (dict(scale=True), "positive"),
    "scale by name": (dict(scale={"for": 0.1}), "no layer is named 'for'.*did you mean 'four'"),
    "scale by name, bad": (dict(scale={"four": None}), "positive"),
    "seed": (dict(seed="0"), "seed is an int"),
    "seed float": (dict(seed=1.5), "seed is an int"),
    "derivative type": (dict(derivative={"ReLU": torch.sign}), "module type"),
    "derivative function": (dict(derivative={nn.Tanh: 1.0}), "function"),
    "derivative absent": (dict(derivative={nn.ReLU: torch.sign}), "no ReLU module"),
    "derivative of a layer": (dict(derivative={nn.Linear: torch.sign}), "activations only"),
    "blocks": (dict(blocks=["fouur"]), "no module fits 'fouur'.*did you mean 'four'"),
    "blocks type": (dict(blocks=nn.Conv2d), "no module fits type Conv2d"),
    "blocks under a local rule": (dict(rule="fa", blocks=["two"]), "'two'.*direct rule"),
}


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.zero, self.one = nn.Linear(5, 7), nn.Tanh()
        self.two = nn.Sequential(nn.Linear(7, 6), nn.Tanh())
        self.four = nn.Linear(6, 4)

    def forward(self, x):
        return self.four(self.two(self.one(self.zero(x))))


@pytest.mark.parametrize("what", FAILING)
@pytest.mark.parametrize("earlier", [False, True], ids=["unconverted", "converted"])
def test_a_conversion_that_fails_leaves_the_model_as_it_was(what, earlier):
    arguments, message = FAILING[what]
    if what == "output, an activation":
        arguments = dict(output="one")
        message = "no layer is named 'one'"
    if what == "callable's rule":
        arguments = dict(layers=lambda n, m: "shalow" if n == "four" else None)
    model = seeded(Named)
    if earlier:
        rewire.convert(model, "dfa", scale=SCALE, seed=9, derivative={nn.Tanh: lambda_free_derivative})
        settled(model, X, LOSS)
        LOSS(model(X)).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
    before, text = snapshot(model), repr(model)
    with pytest.raises(rewire.ConversionError, match=f"(?s){message}"):
        rewire.convert(model, **arguments)
    assert repr(model) == text
    assert_same_snapshot(before, snapshot(model))
    if earlier:
        LOSS(model(X)).backward()
        for p, g in zip(model.parameters(), gradients, strict=True):
            assert torch.equal(p.grad, g)


@pytest.mark.parametrize("earlier", [False, True], ids=["unconverted", "converted"])
def test_a_callable_that_raises_half_way(earlier):
    model = mlp()
    if earlier:
        rewire.convert(model, "dfa", scale=SCALE)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        rewire.convert(model, "dfa", layers=raises_half_way)
    assert_same_snapshot(before, snapshot(model))


@pytest.mark.parametrize("earlier", [False, True], ids=["unconverted", "converted"])
def test_what_cannot_be_converted_at_all(earlier):
    with pytest.raises(rewire.ConversionError, match="Module"):
        rewire.convert(lambda x: x)
    with pytest.raises(rewire.ConversionError, match="no layer"):
        rewire.convert(nn.Sequential(nn.Tanh(), nn.LayerNorm(3)))
    with pytest.raises(rewire.ConversionError, match="lazy"):
        rewire.convert(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)))
    model = mlp()
    if earlier:
        rewire.convert(model, "fa")
    model[2].forward = lambda x: x
    before = snapshot(model)
    with pytest.raises(rewire.ConversionError, match="'2'"):
        rewire.convert(model, "dfa")
    assert_same_snapshot(before, snapshot(model), ordered=False)


@pytest.mark.parametrize("first", ["bp", "fa", "dfa"])
@pytest.mark.parametrize("second", ["bp", "fa", "dfa"])
def test_converting_twice_replaces(first, second):
    model, once = mlp(), mlp()
    rewire.convert(model, first, seed=1, scale=0.7, skip="cut", derivative={nn.Tanh: torch.ones_like}, output="4")
    settled(model, X, LOSS)
    rewire.convert(model, second, seed=2, scale=SCALE)
    rewire.convert(once, second, seed=2, scale=SCALE)
    assert [type(m) for m in model.modules()] == [type(m) for m in once.modules()]
    assert repr(model) == repr(once)
    for _ in range(2):
        for m in (model, once):
            m.zero_grad()
            LOSS(m(X)).backward()
        layers = weights(model)
        e = error(LOSS, states(layers, X)[-1])
        check(model, rule_gradients(second, layers, X, e, rewire.feedback(model)))
        for p, q in zip(model.parameters(), once.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    rewire.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in mlp().modules()]


def test_converting_a_part_of_a_converted_model_and_the_whole_afterwards():
    model = rewire.convert(mlp(), "fa", scale=SCALE)
    rewire.convert(model[2], "bp")
    LOSS(model(X)).backward()
    layers = weights(model)
    e = error(LOSS, states(layers, X)[-1])
    B = {**rewire.feedback(model), "2": model[2].weight.detach()}
    check(model, rule_gradients("fa", layers, X, e, B))
    rewire.convert(model, "dfa", scale=SCALE)
    model.zero_grad()
    LOSS(model(X)).backward()
    check(model, rule_gradients("dfa", layers, X, e, rewire.feedback(model)))
