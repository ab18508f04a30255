"""kp, wm, ldfa and pfa over whole training runs, against NumPy: gradients, the optimizer, and what feedback learns.

The reference knows what each layer keeps at the start, the data and the equations; everything after that is its own.
"""

import copy
import functools
import io
import math
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import rewire
from rewire.feedback import quick_normal
from rewire.rules import resolve

from ..plain import randn
from ..ranks import run_ranks
from ..reference import networks

TOL = 1e-8
LR, MOMENTUM, DECAY = 0.1, 0.9, 0.02
RULES = ["kp", "wm(rate=0.3, samples=7)", "ldfa(rank=3)", "ldfa(rank=3, align=False)", "pfa(expand=2)"]
RULES += ["pfa(expand=1, orthogonal=True)", "wm(every=2, rate=0.5)"]


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4))


def cnn():
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 2, (2, 3), dilation=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(2 * 4 * 4, 4),
    )


NETS = {"mlp": (mlp, (6, 5)), "cnn": (cnn, (6, 4, 5, 7))}


def problem(net, seed=0):
    make, shape = NETS[net]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().double()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    return model, x, torch.randint(4, (shape[0],), generator=generator)


def kept(model):
    return {name: t.detach().numpy().copy() for name, t in model.state_dict().items() if "rewire_" in name}


def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)


def steps(model, opt, x, y, count):
    for _ in range(count):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()


# -- the reference -------------------------------------------------------------------------------------


def to_matrix(module, W):
    """(outputs, what each is made of), entry by entry."""
    if not isinstance(module, nn.ConvTranspose2d):
        return W.reshape(len(W), -1)
    ins, per, *k = W.shape
    g = module.groups
    M = np.zeros((per * g, ins // g, *k))
    for i in range(ins):
        for o in range(per):
            M[(i // (ins // g)) * per + o, i % (ins // g)] = W[i, o]
    return M.reshape(per * g, -1)


def from_matrix(module, M, shape):
    if not isinstance(module, nn.ConvTranspose2d):
        return M.reshape(shape)
    ins, per, *k = shape
    g = module.groups
    M = M.reshape(per * g, ins // g, *k)
    W = np.zeros(shape)
    for i in range(ins):
        for o in range(per):
            W[i, o] = M[(i // (ins // g)) * per + o, i % (ins // g)]
    return W


class Layer:
    """What one layer keeps, and the equations."""

    def __init__(self, name, module, rule, state):
        self.name, self.module, self.rule = name, module, rule
        self.kept = {key.rpartition("rewire_")[2]: t for key, t in state.items() if key.startswith(f"{name}.rewire_")}
        self.velocity = {}
        self.mirrored = 0

    def feedback(self, W):
        k = self.kept
        if "B" in k:
            return k["B"]
        M = k["P"].T @ k["Q"].T if "P" in k else k["A"] @ k["R"]
        return from_matrix(self.module, M, W.shape)

    def mirror(self, W, seed):
        self.mirrored += 1
        columns = to_matrix(self.module, W).shape[1]
        noise = quick_normal(
            (self.rule.samples, columns), seed=seed, name=f"{self.name}:mirror", draw=self.mirrored, scale=1.0
        )
        noise = noise.numpy().astype(np.float64)
        M = to_matrix(self.module, W)
        follows = np.zeros(M.shape)
        for xi in noise:
            follows += np.outer(M @ xi, xi) / len(noise)
        B = to_matrix(self.module, self.kept["B"])
        new = (1 - self.rule.rate) * B + self.rule.rate * follows
        self.kept["B"] = from_matrix(self.module, new, W.shape)

    def gradients(self, dW):
        name = self.rule.name
        if name == "kp":
            return {"B": dW}
        if name == "ldfa" and self.rule.align:
            return {"Q": (self.kept["P"] @ to_matrix(self.module, dW)).T}
        return {"R": self.kept["A"].T @ to_matrix(self.module, dW)} if name == "pfa" else {}

    def oja(self, delta):
        P = self.kept["P"]
        rows = np.moveaxis(delta, 1, -1).reshape(-1, P.shape[1])
        C = sum(np.outer(d, d) for d in rows)
        C = C / np.trace(C)
        self.kept["P"] = P + self.rule.rate * P @ C @ (np.eye(len(C)) - P.T @ P)

    def step(self, grads):
        for key, g in grads.items():
            self.kept[key] = sgd(self.kept[key], g, self.velocity, key)


def sgd(value, gradient, velocity, key):
    g = gradient + DECAY * value
    velocity[key] = MOMENTUM * velocity[key] + g if key in velocity else g
    return value - LR * velocity[key]


def trained_by_reference(model, rule, x, y, count, seed):
    """Parameters and what is kept after ``count`` steps, before the next forward."""
    network = networks.mirror(model)
    state = kept(model)
    params = {n: p.detach().numpy().copy() for n, p in model.named_parameters() if "rewire_" not in n}
    layers = {n: Layer(n, m, rule, state) for n, m in model.named_children() if n in network.layers}
    velocity = {}
    for i in range(count):
        for name, layer in layers.items():
            if rule.every and i % rule.every == 0:
                layer.mirror(params[f"{name}.weight"], seed)
        B = {n: layer.feedback(params[f"{n}.weight"]) for n, layer in layers.items()}
        result = network.run(x.numpy(), params, networks.cross_entropy, y.numpy(), "fa", B)
        for name, layer in layers.items():
            grads = layer.gradients(result.grads[f"{name}.weight"])
            if rule.watches:
                layer.oja(result.deltas[name])  # with the P of this pass, as were the gradients
            layer.step(grads)
        params = {n: sgd(p, result.grads[n], velocity, n) for n, p in params.items()}
    for name, layer in layers.items():
        params |= {f"{name}.rewire_{key}": t for key, t in layer.kept.items() if key not in ("mirrored", "passes")}
    return params


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("rule", RULES)
def test_against_the_reference(net, rule):
    model, x, y = problem(net)
    rewire.convert(model, rule, seed=5)
    rule = model[0]._rewire.rule
    expected = trained_by_reference(model, rule, x, y, 6, seed=5)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    steps(model, optimizer(model), x, y, 6)
    ours = model.state_dict()
    for name, value in expected.items():
        off = np.abs(ours[name].numpy() - value).max()
        assert off <= TOL, f"{name}: off by {off}"
        fixed = name.endswith("rewire_A") or (name.endswith("rewire_Q") and not rule.trained)
        assert torch.equal(ours[name], before[name]) == fixed, name


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    "rule", ["kp", "wm(every=0)", "ldfa(rank=2)", "pfa(expand=3)", "pfa(expand=1, orthogonal=True)"]
)
def test_what_is_kept_at_the_start(net, rule):
    model, _, _ = problem(net)
    plain = copy.deepcopy(model)
    rewire.convert(plain, "fa", seed=3)
    rewire.convert(model, rule, seed=3)
    state = kept(model)
    for name, R in rewire.feedback(plain).items():
        get = lambda what, name=name: state[f"{name}.rewire_{what}"]  # noqa: E731
        B = rewire.feedback(model)[name]
        s = plain.get_submodule(name).weight.std().item()
        if f"{name}.rewire_B" in state:
            assert torch.equal(B, R)
        elif f"{name}.rewire_P" in state:
            P = get("P")
            assert np.abs(P @ P.T - np.eye(len(P))).max() < 1e-6
            assert abs(get("Q").std() / (s * math.sqrt(P.shape[1] / len(P))) - 1) < 0.5
        else:
            A = get("A")
            near = 1e-6 if "orthogonal" in rule else 1.5
            assert np.abs(A @ A.T - np.eye(len(A))).max() < near
            assert A.shape[1] == model.get_submodule(name)._rewire.rule.expand * len(A)
            assert abs(get("R").std() / s - 1) < 0.35
        assert 0.4 < B.std().item() / s < 1.8


# -- learning, and what it says when there is none ------------------------------------------------------


@pytest.mark.parametrize("rule", ["kp", "wm"])
def test_angles_after_training_on_digits(rule):
    from importlib.util import module_from_spec, spec_from_file_location

    path = Path(__file__).parents[2] / "examples" / "weight_angles.py"
    spec = spec_from_file_location("weight_angles", path)
    example = module_from_spec(spec)
    spec.loader.exec_module(example)
    model, accuracy = example.train(rule)
    angles = example.angles(model)
    assert set(angles) == {"0", "2", "4"}
    assert all(angle < 10 for angle in angles.values()), angles
    assert accuracy > 0.93


def test_an_optimizer_that_does_not_hold_the_feedback():
    model, x, y = problem("mlp")
    opt = optimizer(model)
    rewire.convert(model, "kp")
    with pytest.warns(rewire.RewireWarning, match=r"'0', '2', '4'.*Build the optimizer after convert"):
        steps(model, opt, x, y, 8)
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        steps(model, opt, x, y, 8)


@pytest.mark.parametrize("rule", ["kp", "pfa(expand=1)"])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-3])
def test_nothing_decays(rule, weight_decay):
    model, x, y = problem("mlp")
    rewire.convert(model, rule)
    opt = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=weight_decay)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        steps(model, opt, x, y, 305)
    texts = [str(w.message) for w in said if issubclass(w.category, rewire.RewireWarning)]
    assert len(texts) == (weight_decay == 0.0), texts
    assert all("weight_decay" in t and "'0', '2', '4'" in t for t in texts)


def test_adam_s_steps_of_feedback_and_weight_do_not_belong_together():
    """kp's have the same gradient, entry by entry; pfa's do not, and what is said is no mere lack of decay."""
    for rule in ("kp", "pfa(expand=1)"):
        model, x, y = problem("mlp")
        rewire.convert(model, rule)
        opt = torch.optim.AdamW(model.parameters(), lr=0.005, weight_decay=0.2)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            steps(model, opt, x, y, 305)
        texts = [str(w.message) for w in said if issubclass(w.category, rewire.RewireWarning)]
        assert len(texts) == (rule != "kp"), texts
        assert all("a weight_decay, or a larger one" in t and "use SGD" in t for t in texts)


def test_never_mirrored():
    model, x, y = problem("mlp")
    rewire.convert(model, "wm(every=0)")
    opt = optimizer(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, opt, x, y, 60)
    with pytest.warns(rewire.RewireWarning, match=r"'0', '2', '4'.*without a mirror step"):
        steps(model, opt, x, y, 60)


def test_mirror_touches_nothing_else():
    model, x, y = problem("cnn")
    model.insert(1, nn.BatchNorm2d(6).double())
    rewire.convert(model, "wm(every=0, samples=50, rate=0.05)", layers={"8": "bp"})
    steps(model, optimizer(model), x, y, 2)
    F.cross_entropy(model(x), y).backward()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    random, B = torch.get_rng_state(), rewire.feedback(model)
    angles = rewire.mirror(model, steps=300)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]) == ("rewire_" not in name or name.endswith("passes")), name
    assert set(angles) == set(B) == {"0", "3", "5"}
    for name, found in rewire.feedback(model).items():
        W = model.get_submodule(name).weight.detach()
        angle = math.degrees(math.acos(F.cosine_similarity(found.flatten(), W.flatten(), 0)))
        assert abs(angle - angles[name]) < 1e-6
        columns = W[0].numel() if not isinstance(model.get_submodule(name), nn.ConvTranspose2d) else 3 * 4
        settled = math.degrees(math.atan(math.sqrt(columns * 0.05 / (2 * 50))))
        assert 0.5 * settled < angle < 1.6 * settled, (name, angle, settled)
        assert abs(found.norm() / W.norm() - 1) < 0.1


def test_mirror_is_the_step_that_training_takes():
    by_hand, x, _y = problem("mlp")
    by_itself = copy.deepcopy(by_hand)
    rewire.convert(by_hand, "wm(every=0)")
    rewire.convert(by_itself, "wm")
    rewire.mirror(by_hand, steps=4)
    for _ in range(4):
        by_itself(x).sum().backward()  # weights stay
    for name, B in rewire.feedback(by_itself).items():
        assert torch.equal(B, rewire.feedback(by_hand)[name])


def test_mirror_is_refused():
    model, _, _ = problem("mlp")
    with pytest.raises(rewire.ConversionError, match="not converted"):
        rewire.mirror(model)
    rewire.convert(model, "kp")
    with pytest.raises(rewire.ConversionError, match="no layer"):
        rewire.mirror(model)
    with pytest.raises(rewire.ConversionError, match="steps"):
        rewire.mirror(model, steps=0)


# -- the mechanism ---------------------------------------------------------------------------------------

ALL = ["kp", "wm", "ldfa(rank=3)", "pfa(expand=2)"]


@pytest.mark.parametrize("rule", ALL)
def test_forward_is_bitwise_the_same(rule):
    for net in NETS:
        model, x, _ = problem(net)
        for dtype in (torch.float32, torch.float64):
            model.to(dtype)
            plain = model(x.to(dtype))
            rewire.convert(model, rule)
            assert torch.equal(model(x.to(dtype)), plain)
            rewire.restore(model)
            assert not [n for n in model.state_dict() if "rewire" in n]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("rule", ALL)
def test_resumed_bit_by_bit(net, rule):
    model, x, y = problem(net)
    rewire.convert(model, rule.replace("wm", "wm(every=3)"))
    opt = optimizer(model)
    steps(model, opt, x, y, 5)
    file = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), file)
    steps(model, opt, x, y, 5)

    other, _, _ = problem(net, seed=1)
    rewire.convert(other, rule.replace("wm", "wm(every=3)"))
    file.seek(0)
    weights, optimizer_state = torch.load(file)
    other.load_state_dict(weights)
    again = optimizer(other)
    again.load_state_dict(optimizer_state)
    steps(other, again, x, y, 5)
    for name, t in model.state_dict().items():
        assert torch.equal(t, other.state_dict()[name]), name


@pytest.mark.parametrize("rule", ALL)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_go_on_alike(rule, how):
    model, x, y = problem("cnn")
    rewire.convert(model, rule)
    steps(model, optimizer(model), x, y, 3)
    model.state_dict()  # what the last pass has shown is taken in
    other = how(model)
    steps(model, optimizer(model), x, y, 3)
    steps(other, optimizer(other), x, y, 3)
    for name, t in model.state_dict().items():
        assert torch.equal(t, other.state_dict()[name]), name


@pytest.mark.parametrize("rule", ALL)
def test_a_plain_checkpoint_loads(rule):
    model, x, y = problem("mlp")
    plain = {n: t.clone() for n, t in model.state_dict().items()}
    rewire.convert(model, rule)
    steps(model, optimizer(model), x, y, 2)
    before = rewire.feedback(model)
    model.load_state_dict(plain)
    assert all(torch.equal(B, before[name]) for name, B in rewire.feedback(model).items())
    assert torch.equal(model[0].weight, plain["0.weight"])
    with pytest.raises(RuntimeError, match="rewire_nothing"):
        model.load_state_dict({**model.state_dict(), "0.rewire_nothing": torch.zeros(1)})


def gradients(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def same(a, b, tol=1e-12):
    assert a.keys() == b.keys()
    for name, g in a.items():
        assert (g is None) == (b[name] is None), name
        assert g is None or (g - b[name]).abs().max() <= tol, name


@pytest.mark.parametrize("rule", ALL)
def test_use_rule_and_back(rule):
    model, x, y = problem("mlp")
    plain = copy.deepcopy(model)
    rewire.convert(model, rule)
    steps(model, optimizer(model), x, y, 2)
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if "rewire" not in n})
    F.cross_entropy(plain(x), y).backward()
    B = rewire.feedback(model)
    model.zero_grad()
    with rewire.use_rule(model, "bp"):
        F.cross_entropy(model(x), y).backward()
    for name, p in plain.named_parameters():
        assert (model.get_parameter(name).grad - p.grad).abs().max() < 1e-12
    if rule == "kp":  # what is trained follows its weight there too
        assert torch.equal(model[2].rewire_B.grad, model[2].weight.grad)
    assert all(torch.equal(b, B[name]) for name, b in rewire.feedback(model).items())
    model.zero_grad()
    with rewire.use_rule(model, "dfa"):
        F.cross_entropy(model(x), y).backward()
    assert model[2].weight.grad is not None
    steps(model, optimizer(model), x, y, 2)
    other, _, _ = problem("mlp")
    rewire.convert(other, "fa")
    with pytest.raises(rewire.ConversionError, match="learns"), rewire.use_rule(other, rule):
        pass


@pytest.mark.parametrize("rule", ALL)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(rule, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            for module in self.inner[:-1]:
                x = checkpoint(module, x, use_reentrant=reentrant)
            return self.inner[-1](x)

    model, x, y = problem("cnn")
    x.requires_grad_()
    rewire.convert(model, rule, output="7")
    other = copy.deepcopy(model)
    wrapped = Checkpointed(other)
    one, two = optimizer(model), optimizer(other)
    steps(model, one, x, y, 1)
    steps(other, two, x, y, 1)  # roles are known after it, as re-entrant checkpointing needs
    for _ in range(4):
        steps(model, one, x, y, 1)
        steps(wrapped, two, x, y, 1)
    for name, t in model.state_dict().items():
        assert (t - other.state_dict()[name]).abs().max() < 1e-10, name


@pytest.mark.parametrize("rule", ALL)
def test_a_pass_hands_back_what_its_forward_found(rule):
    """Two forwards, then their backwards: each as if it were alone."""
    model, x, y = problem("mlp")
    rewire.convert(model, rule.replace("wm", "wm(rate=0.5)"))
    steps(model, optimizer(model), x, y, 2)
    one = F.cross_entropy(model(x), y)
    B = {n: b.clone() for n, b in rewire.feedback(model).items()}
    model._modules["0"]._rewire.wiring.passes += 1  # another pass in between
    two = F.cross_entropy(model(2 * x), y)
    model.zero_grad()
    one.backward()
    params = {n: p.detach().numpy() for n, p in model.named_parameters()}
    feedback = {n: b.numpy() for n, b in B.items()}
    expected = networks.mirror(model).run(x.numpy(), params, networks.cross_entropy, y.numpy(), "fa", feedback)
    for name, g in expected.grads.items():
        assert np.abs(model.get_parameter(name).grad.numpy() - g).max() < 1e-12, name
    two.backward()
    if rule.startswith("wm"):
        assert not torch.equal(rewire.feedback(model)["2"], B["2"])


@pytest.mark.parametrize("rule", ["kp", "ldfa(rank=3)", "pfa(expand=2)"])
def test_an_optimizer_step_between_forward_and_backward(rule):
    model, x, y = problem("mlp")
    rewire.convert(model, rule)
    opt = optimizer(model)
    steps(model, opt, x, y, 1)
    loss = F.cross_entropy(model(x), y)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an in"):
        loss.backward()


@pytest.mark.parametrize("rule", ["kp", "pfa(expand=2)"])
def test_gradients_add_up_and_do_not_share_memory(rule):
    model, x, y = problem("cnn")
    rewire.convert(model, rule)
    F.cross_entropy(model(x), y).backward()
    once = gradients(model)
    F.cross_entropy(model(x), y).backward()
    for name, g in gradients(model).items():
        assert (g - 2 * once[name]).abs().max() < 1e-12
    pointers = [p.grad.data_ptr() for p in model.parameters()]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("rule", ALL)
def test_in_place_operations_after_the_layer(rule):
    model, x, y = problem("mlp")
    model[1] = model[3] = nn.ReLU()
    rewire.convert(model, rule)
    other = copy.deepcopy(model)
    other[1] = nn.ReLU(inplace=True)
    other[3] = nn.ReLU(inplace=True)
    for m in (model, other):
        steps(m, optimizer(m), x, y, 4)
    for name, t in model.state_dict().items():
        assert torch.equal(t, other.state_dict()[name]), name


@pytest.mark.parametrize("rule", ALL)
def test_autocast_and_two_byte_weights(rule):
    model, x, y = problem("mlp")
    model.float()
    rewire.convert(model, rule)
    opt = optimizer(model)
    for _ in range(3):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x.float()), y)
        loss.backward()
        opt.step()
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    verified = rewire.verify(model, x.float(), lambda out: F.cross_entropy(out, y))
    assert verified.ok, str(verified)
    small, x, y = problem("mlp")
    small.bfloat16()
    rewire.convert(small, rule)
    steps(small, optimizer(small), x.bfloat16(), y, 3)
    assert all(torch.isfinite(t).all() for t in small.state_dict().values())


def test_deltas_that_are_not_finite_teach_nothing():
    model, x, y = problem("mlp")
    rewire.convert(model, "ldfa(rank=3)")
    steps(model, optimizer(model), x, y, 2)
    P = model.state_dict()["2.rewire_P"].clone()
    (F.cross_entropy(model(x), y) * float("inf")).backward()
    assert torch.equal(model.state_dict()["2.rewire_P"], P)
    (F.cross_entropy(model(x), y) * 0).backward()
    assert torch.equal(model.state_dict()["2.rewire_P"], P)
    F.cross_entropy(model(x), y).backward()
    assert not torch.equal(model.state_dict()["2.rewire_P"], P)


def test_p_finds_the_subspace_of_the_errors():
    """Rank 2 deltas: P's two rows come to span what they span."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 9).double(), nn.Identity())
    rewire.convert(layer, "ldfa(rank=2, rate=0.5)")
    plane = torch.linalg.qr(torch.randn(9, 2, dtype=torch.float64)).Q
    for _ in range(200):
        y = layer(torch.randn(20, 6, dtype=torch.float64))
        y.backward(torch.randn(20, 2, dtype=torch.float64) @ plane.T)
    P = layer.state_dict()["0.rewire_P"]
    assert (P.T @ P - plane @ plane.T).abs().max() < 0.05


# -- weights that others use ------------------------------------------------------------------------------


class Borrower(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.first, self.child, self.last = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(8, 4)
        self.how = how

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if self.how == "called":
            h = self.child(h)
        elif self.how == "linear":
            h = F.linear(h, self.child.weight, self.child.bias)
        elif self.how == "product":
            h = h @ self.child.weight.t() + self.child.bias
        elif self.how == "turned":
            h = (self.child.weight @ h.t()).t() + self.child.bias
        else:  # two parts
            w, b = self.child.weight, self.child.bias
            h = torch.cat([F.linear(h, w[:3], b[:3]), F.linear(h, w[3:], b[3:])], -1)
        return self.last(torch.tanh(h))


@pytest.mark.parametrize("rule", ALL)
@pytest.mark.parametrize("how", ["linear", "product", "turned", "parts"])
def test_weights_used_by_another_module(rule, how):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Borrower("called").double()
    other = copy.deepcopy(model)
    other.how = how
    _, x, y = problem("mlp")
    for m in (model, other):
        rewire.convert(m, rule)
        steps(m, optimizer(m), x, y, 4)
    for name, t in model.state_dict().items():
        # what is seen of deltas in parts lacks the moments between the parts
        if not (how == "parts" and rule.startswith("ldfa")):
            assert (t - other.state_dict()[name]).abs().max() < 1e-10, name
    verified = rewire.verify(other, x, lambda out: F.cross_entropy(out, y))
    assert verified.ok, str(verified)


def test_moments_of_deltas_seen_in_parts():
    """P C, with a C that has the moments within each part, and none between them."""
    rule = resolve("ldfa(rank=2)")
    P, delta = randn(2, 8, seed=1), randn(9, 8, seed=2)
    C, found = np.zeros((8, 8)), 0.0
    for rows in (slice(0, 3), slice(3, 8)):
        for d in delta[:, rows].numpy():
            C[rows, rows] += np.outer(d, d)
        sums = rule.gather(delta[:, rows], {"P": P}, rows)
        found = found + sums["PC"].numpy()
    np.testing.assert_allclose(found, P.numpy() @ C, atol=1e-12)


@pytest.mark.parametrize("rule", ["kp", "pfa(expand=2)"])
def test_something_made_of_the_weight_by_another_module(rule):
    model = Borrower("linear").double()
    model.forward = lambda x: model.last(F.linear(model.first(x), model.child.weight * 2))
    _, x, _ = problem("mlp")

    class Scaled(Borrower):
        def forward(self, x):
            return self.last(F.linear(self.first(x), self.child.weight * 2))

    model = Scaled("").double()
    rewire.convert(model, rule)
    with pytest.raises(rewire.PassError, match="'child'"):
        model(x)


@pytest.mark.parametrize("rule", ALL)
def test_attention(rule):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(5, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            x = self.embed(x)
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    model = Attention().double()
    rewire.convert(model, rule)
    x, y = torch.randn(6, 3, 5, dtype=torch.float64), torch.randint(4, (6,))
    first = {name: B.clone() for name, B in rewire.feedback(model).items()}
    assert set(first) == {"embed", "attention.in_proj", "attention.out_proj", "head"}
    steps(model, optimizer(model), x, y, 4)
    for name, B in rewire.feedback(model).items():
        assert not torch.equal(B, first[name]), name
    verified = rewire.verify(model, x, lambda out: F.cross_entropy(out, y))
    assert verified.ok, str(verified)
    if rule == "kp":
        assert torch.equal(model.attention.rewire_in_proj_B.grad, model.attention.in_proj_weight.grad)
    rewire.restore(model)
    assert not [n for n in model.state_dict() if "rewire" in n]


# -- refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["kp", "ldfa", "pfa"])
def test_weights_that_cannot_be_followed(rule):
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(rewire.ConversionError, match=r"'2'.*parametrization"):
        rewire.convert(model, rule)
    rewire.convert(model, rule, layers={"2": "fa"})

    class Own(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight - self.weight.mean())

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4))
    with pytest.raises(rewire.ConversionError, match=r"'1'.*forward of its own"):
        rewire.convert(model, rule)

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(rewire.ConversionError, match=r"'0'.*shared \(0.weight, 1.weight\)"):
        rewire.convert(model, rule)
    assert not [n for n in model.state_dict() if "rewire" in n]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("wm(samples=0)", "samples"),
        ("wm(rate=2)", "rate"),
        ("wm(every=-1)", "every"),
        ("ldfa(rank=0)", "rank"),
        ("ldfa(rate=0)", "rate"),
        ("pfa(expand=1.5)", "expand"),
        ("kp(decay=0.1)", "no option 'decay'"),
    ],
)
def test_options(rule, message):
    with pytest.raises(rewire.ConversionError, match=message):
        rewire.convert(mlp(), rule)


def test_written():
    for rule in ("kp", "wm", "wm(every=3, rate=0.1)", "ldfa(rank=4, align=False)", "pfa(orthogonal=True)"):
        model = rewire.convert(mlp(), rule)
        assert repr(model[0]._rewire.rule) == rule
        assert rule in str(model[0])


# -- elsewhere --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ALL)
def test_torch_func(rule):
    model, x, y = problem("mlp")
    rewire.convert(model, rule.replace("wm", "wm(every=0)"))
    F.cross_entropy(model(x), y).backward()
    P = {n: t.clone() for n, t in model.state_dict().items()}
    model.load_state_dict(P)
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.load_state_dict(P)
    params = {n: p.detach() for n, p in model.named_parameters()}
    feedback = {n: b.numpy() for n, b in rewire.feedback(model).items()}

    def loss(params):
        return F.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.func.grad(loss)(params)
    numbers = {n: p.numpy() for n, p in params.items()}
    reference = networks.mirror(model).run(x.numpy(), numbers, networks.cross_entropy, y.numpy(), "fa", feedback)
    for name, g in reference.grads.items():
        assert np.abs(found[name].numpy() - g).max() < 1e-12, name
    if rule == "kp":
        assert torch.equal(found["2.rewire_B"], found["2.weight"])
    assert expected.keys() == found.keys()

    def one(params, x, y):
        return F.cross_entropy(torch.func.functional_call(model, params, (x[None],)), y[None])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        each = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(params, x, y)
    for name, g in found.items():
        assert (each[name].mean(0) - g).abs().max() < 1e-12, name


def test_torch_func_says_what_does_not_learn():
    model, x, y = problem("mlp")
    rewire.convert(model, "ldfa(rank=2)")
    F.cross_entropy(model(x), y).backward()
    params = {n: p.detach() for n, p in model.named_parameters()}
    with pytest.warns(rewire.RewireWarning, match=r"torch\.func"):
        torch.func.grad(lambda p: F.cross_entropy(torch.func.functional_call(model, p, (x,)), y))(params)


@pytest.mark.parametrize("rule", ALL)
def test_compile(rule):
    model, x, y = problem("mlp")
    rewire.convert(model, rule)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager")
    steps(model, optimizer(model), x, y, 4)
    steps(compiled, optimizer(other), x, y, 4)
    for name, t in model.state_dict().items():
        assert (t - other.state_dict()[name]).abs().max() < 1e-10, name
    torch._dynamo.reset()
    with pytest.raises(Exception, match="rewire"):
        torch.compile(other, backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()


def test_compile_below_an_output_that_learns():
    model, x, y = problem("mlp")
    rewire.convert(model, "dfa", layers={"4": "kp"}, scale=0.1)
    steps(model, optimizer(model), x, y, 2)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager")
    steps(model, optimizer(model), x, y, 2)
    steps(compiled, optimizer(other), x, y, 2)
    torch._dynamo.reset()
    for name, t in model.state_dict().items():
        assert (t - other.state_dict()[name]).abs().max() < 1e-10, name


def test_mixed_with_direct_rules_and_blocks():
    model, x, y = problem("mlp")
    rewire.convert(model, "kp", layers={"2": "dfa"}, scale=0.1)
    steps(model, optimizer(model), x, y, 3)
    verified = rewire.verify(model, x, lambda out: F.cross_entropy(out, y))
    assert verified.ok, str(verified)
    with pytest.raises(rewire.ConversionError, match="block"):
        rewire.convert(model, "kp", blocks=["2"])


def test_frozen_weights():
    model, x, y = problem("mlp")
    model[2].weight.requires_grad_(False)
    rewire.convert(model, "kp")
    steps(model, optimizer(model), x, y, 3)
    assert model[2].rewire_B.grad is None and not model[2].rewire_B.requires_grad
    assert model[0].rewire_B.grad is not None


@pytest.mark.parametrize("rule", ALL)
def test_materialised_after_conversion(rule):
    model, x, y = problem("mlp")
    with torch.device("meta"):
        empty = mlp().double()
    rewire.convert(empty, rule)
    rewire.convert(model, rule)
    empty.to_empty(device="cpu")
    empty.load_state_dict({n: t for n, t in model.state_dict().items() if "rewire" not in n})
    for m in (model, empty):
        steps(m, optimizer(m), x, y, 3)
    for name, t in model.state_dict().items():
        assert torch.allclose(t, empty.state_dict()[name], atol=1e-12), name


@pytest.mark.parametrize("rule", ALL)
def test_verify_leaves_learning_alone(rule):
    model, x, y = problem("cnn")
    rewire.convert(model, rule)
    other = copy.deepcopy(model)
    one, two = optimizer(model), optimizer(other)
    for _ in range(3):
        verified = rewire.verify(other, x, lambda out: F.cross_entropy(out, y))
        assert verified.ok, str(verified)
        steps(model, one, x, y, 1)
        steps(other, two, x, y, 1)
    for name, t in model.state_dict().items():
        assert torch.equal(t, other.state_dict()[name]), name


@pytest.mark.parametrize("what", ["follow", "feedback"])
@pytest.mark.parametrize("rule", ["kp", "ldfa(rank=3)", "pfa(expand=2)"])
def test_verify_sees_what_is_wrong(rule, what, monkeypatch):
    model, x, y = problem("mlp")
    rewire.convert(model, rule)
    steps(model, optimizer(model), x, y, 2)
    cls = type(model[0]._rewire.rule)
    right = getattr(cls, what)
    if what == "follow":
        monkeypatch.setattr(cls, what, lambda *args: {n: 1.01 * t for n, t in right(*args).items()})
    else:
        monkeypatch.setattr(cls, what, lambda *args: 1.01 * right(*args))
    verified = rewire.verify(model, x, lambda out: F.cross_entropy(out, y))
    assert {layer.status for layer in verified.layers[1:]} == {"wrong"}, str(verified)


# -- several processes --------------------------------------------------------------------------------------

RANK = """
import sys, torch
import torch.distributed as dist
import rewire
from torch import nn
from torch.nn.parallel import DistributedDataParallel

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
data = torch.load(f"{folder}/data.pt")
x, y = data["x"].chunk(2)[rank], data["y"].chunk(2)[rank]
found = {}
for rule in data["rules"]:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    model.load_state_dict(data["model"])
    ddp = DistributedDataParallel(rewire.convert(model, rule))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9, weight_decay=0.02)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(x), y).backward()
        optimizer.step()
    ddp(x)  # what the last pass has shown
    found[rule] = {name: t.clone() for name, t in model.state_dict().items()}
try:
    model.load_state_dict(data["model"], strict=False)
    rewire.convert(DistributedDataParallel(rewire.restore(model)), "kp")(x)
except Exception as problem:
    found["late"] = repr(problem)
torch.save(found, f"{folder}/rank{rank}.pt")
del model, ddp, optimizer
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes(tmp_path):
    """Two ranks on half a batch each learn what one process learns on all of it."""
    model, x, y = problem("mlp")
    rules = [*ALL, "wm(every=2)"]
    plain = copy.deepcopy(model.state_dict())
    torch.save({"x": x, "y": y, "model": plain, "rules": rules}, tmp_path / "data.pt")
    ranks = run_ranks(tmp_path, "-c", RANK)
    for found in ranks:
        assert "convert first, then wrap" in found["late"]
        for rule in rules:
            alone = copy.deepcopy(model)
            rewire.convert(alone, rule)
            steps(alone, optimizer(alone), x, y, 4)
            alone(x)
            for name, t in alone.state_dict().items():
                assert (t - found[rule][name]).abs().max() < 1e-10, (rule, name)


@pytest.mark.parametrize("how", ["prune", "weight norm"])
@pytest.mark.parametrize("rule", ["kp", "pfa"])
def test_a_weight_that_is_made_of_others_later_on_is_said(rule, how):
    torch.manual_seed(0)
    model = rewire.convert(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Linear(7, 3)), rule)
    x, y = torch.randn(8, 5), torch.randint(3, (8,))
    F.cross_entropy(model(x), y).backward()
    if how == "prune":
        prune.l1_unstructured(model[2], "weight", 0.3)
    else:
        nn.utils.parametrizations.weight_norm(model[2])
    with pytest.warns(rewire.RewireWarning, match="'2'.*made of other parameters.*no gradient"):
        for _ in range(3):
            F.cross_entropy(model(x), y).backward()


@pytest.mark.parametrize("rule", ["kp", "pfa", "wm(every=1)", "ldfa"])
def test_checkpointing_that_keeps_products(rule):
    """What a layer learns in its forward is no product of the model's."""
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    torch.manual_seed(0)
    plain = rewire.convert(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Linear(7, 3)).double(), rule)
    kept = copy.deepcopy(plain)
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,))
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, products)
    for _ in range(4):
        plain.zero_grad(), kept.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        F.cross_entropy(checkpoint(kept, x, use_reentrant=False, context_fn=contexts), y).backward()
        for p, q in zip(plain.parameters(), kept.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad)
