"""Low-rank adapters beside a layer, and frozen layers: a wrapped layer is one layer, what is frozen costs nothing."""

import contextlib
import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire
from rewire.passes import call_at

from ..plain import SCALE, chain_gradients, cross_entropy, error, mlp, randn, same, states, weights

X = randn(6, 5, seed=1)
LABELS = torch.arange(6) % 4
LOSS = cross_entropy(LABELS)
WIDTHS = (5, 7, 6, 6, 4)  # layers 0, 2, 4, 6


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter, as adapter libraries write it, by nobody in particular."""

    def __init__(self, inner, rank=2, seed=0):
        super().__init__()
        self.inner = inner.requires_grad_(False)
        n_out, n_in = inner.weight.shape
        self.down, self.up = nn.Linear(n_in, rank, bias=False), nn.Linear(rank, n_out, bias=False)
        self.down.weight.data = randn(rank, n_in, seed=10 + seed)
        self.up.weight.data = randn(n_out, rank, seed=20 + seed)

    @property
    def weight(self):
        return self.inner.weight

    @property
    def bias(self):
        return self.inner.bias

    def forward(self, x):
        return self.inner(x) + self.up(self.down(x)) / 2


def adapted():
    model = mlp(WIDTHS)
    for i in (0, 2, 4):
        model[i] = Adapted(model[i], seed=i)
    return model


def peft_on(model, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=1, target_modules=["0", "2", "4"], **options)  # scaled by 1/2
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for i in (0, 2, 4):
        lora = model.base_model.model[i]
        lora.lora_A["default"].weight.data = randn(*lora.lora_A["default"].weight.shape, seed=10 + i)
        lora.lora_B["default"].weight.data = randn(*lora.lora_B["default"].weight.shape, seed=20 + i)
    return model


PEFT = "base_model.model."


def parts(model):
    """[(i, W, b, A, B)] of a model with adapters at 0, 2 and 4; A and B None at the head."""
    found = []
    seq = model if isinstance(model, nn.Sequential) else model.base_model.model
    for i in (0, 2, 4, 6):
        m = seq[i]
        if hasattr(m, "down"):
            pair = m.down.weight, m.up.weight
        elif hasattr(m, "lora_A"):
            pair = m.lora_A["default"].weight, m.lora_B["default"].weight
        else:
            pair = None, None
        found.append((i, m.weight, m.bias, *pair))
    return [tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in row) for row in found]


def wanted(model, feedback, hand_back):
    """Gradients of all A and B by layer, and of the head, from the equations.

    hand_back: (i, delta, e, A, B) -> what layer i hands back.
    """
    rows, h = parts(model), [X]
    for i, W, b, A, B in rows:
        y = h[-1] @ W.T + b + (0 if A is None else h[-1] @ A.T @ B.T / 2)
        h.append(y if i == 6 else torch.tanh(y))
    e = delta = error(LOSS, h[-1])
    found = {}
    for k in (3, 2, 1, 0):
        i, W, _, A, B = rows[k]
        if A is None:
            found[i] = (delta.T @ h[k],)
        else:
            found[i] = (delta @ B / 2).T @ h[k], delta.T @ (h[k] @ A.T) / 2
        if i:
            delta = hand_back(i, delta, e, A, B) * (1 - h[k] ** 2)
    return found


def actual(model):
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad and p.dim() > 1:
            found.setdefault(int(name.removeprefix(PEFT)[0]), []).append(p.grad)
        elif not p.requires_grad:
            assert p.grad is None
    return found


def parts_frozen(model):
    """Adapter libraries freeze the head too, unless they are told not to."""
    return not any(p.requires_grad for name, p in model.named_parameters() if name.removeprefix(PEFT)[0] == "6")


def check(model, hand_back):
    for _ in range(3):
        model.zero_grad()
        LOSS(model(X)).backward()
    expected = wanted(model, rewire.feedback(model), hand_back)
    got = actual(model)
    assert got.keys() == expected.keys() - ({6} if parts_frozen(model) else set())
    for i in got:
        for g, w in zip(got[i], expected[i], strict=True):
            same(g, w, str(i))


def as_one(model, rule, prefix):
    """What a wrapped layer, one with its adapter, hands back."""
    fed = rewire.feedback(model)
    if rule == "dfa":
        return lambda i, delta, e, A, B: e @ fed[f"{prefix}{i}"]
    beside = lambda A, B: 0 if A is None else B @ A / 2  # noqa: E731
    return lambda i, delta, e, A, B: delta @ (fed[f"{prefix}{i}"] + beside(A, B))


@pytest.mark.parametrize("make", [adapted, lambda: peft_on(mlp(WIDTHS))], ids=["ours", "peft"])
@pytest.mark.parametrize("rule", ["dfa", "fa"])
def test_an_adapted_layer_is_one_layer(make, rule):
    model = make()
    prefix = "" if isinstance(model, nn.Sequential) else PEFT
    keys, before = set(model.state_dict()), model(X)
    rewire.convert(model, rule, scale=SCALE)
    assert set(model.state_dict()) == keys and torch.equal(model(X), before)
    LOSS(model(X)).backward()
    check(model, as_one(model, rule, prefix))
    report = rewire.verify(model, X, LOSS)
    assert report.ok, str(report)
    assert [layer.name for layer in report.layers] == [f"{prefix}{i}" for i in (0, 2, 4, 6)]
    rows = {row.name: row for row in rewire.summary(model).rows}
    one = rows[f"{prefix}2"]
    assert one.rule == rule and one.converted and "one layer with what is beside its" in one.note
    inside = [row for name, row in rows.items() if name.startswith(f"{prefix}2.")]
    assert len(inside) == 3 and all(row.rule == "bp" and not row.converted for row in inside)
    assert sorted("has its rule" in row.note for row in inside) == [False, False, True]
    rewire.restore(model)
    assert not any("Rewired" in type(m).__name__ for m in model.modules())


def test_switching_rules_on_an_adapted_layer():
    model = rewire.convert(adapted(), "dfa", scale=SCALE)
    LOSS(model(X)).backward()
    with rewire.use_rule(model, "fa"):
        LOSS(model(X)).backward()
        check(model, as_one(model, "fa", ""))
    check(model, as_one(model, "dfa", ""))


@pytest.mark.parametrize("rule", ["dfa", "fa"])
def test_adapters_added_to_a_converted_model_keep_backprop(rule):
    """The base layer hands back by its rule, the adapter beside it its own exact share."""
    model = peft_on(rewire.convert(mlp(WIDTHS), rule, scale=SCALE))
    LOSS(model(X)).backward()
    fed = rewire.feedback(model)

    def hand_back(i, delta, e, A, B):
        own = (e if rule == "dfa" else delta) @ fed[str(i)]
        return own if A is None else own + delta @ B @ A / 2

    check(model, hand_back)
    assert rewire.verify(model, X, LOSS).ok
    notes = {row.name.removeprefix(PEFT): row.note for row in rewire.summary(model).rows}
    assert notes["2.lora_A.default"] == "can be converted"  # converting again makes one layer of them
    rewire.convert(model, rule, scale=SCALE)
    LOSS(model(X)).backward()
    check(model, as_one(model, rule, PEFT))


def test_a_copied_head_is_part_of_the_model_once_it_is_converted_again():
    model = peft_on(rewire.convert(mlp(WIDTHS), "dfa", scale=SCALE), modules_to_save=["6"])
    with pytest.warns(rewire.RewireWarning, match="feeds a copy of layer '6'.*Convert the whole model again"):
        LOSS(model(X)).backward()
    rewire.convert(model, "dfa", scale=SCALE)
    model.zero_grad()
    LOSS(model(X)).backward()
    check(model, as_one(model, "dfa", PEFT))
    roles = {row.name: row.role for row in rewire.summary(model).rows if row.converted}
    assert roles[f"{PEFT}6"] == "output"
    assert rewire.verify(model, X, LOSS).ok


def test_whole_copies_that_feed_each_other_are_no_copied_parts(recwarn):
    first = rewire.convert(mlp((5, 6, 5)), "dfa", scale=SCALE)
    second = copy.deepcopy(first)
    for _ in range(3):
        second(first(X)).sum().backward()
    assert not [w for w in recwarn if issubclass(w.category, rewire.RewireWarning)]


def test_adapters_come_off_as_they_do():
    model = peft_on(mlp(WIDTHS))
    out = model(X)
    rewire.convert(model, "dfa", scale=SCALE)
    LOSS(model(X)).backward()
    with model.disable_adapter():
        same(model(X), mlp(WIDTHS)(X))
    model.merge_adapter()
    same(model(X), out)
    model.unmerge_adapter()
    twin = copy.deepcopy(model)
    plain = rewire.restore(model).merge_and_unload()
    same(plain(X), out)
    assert type(plain[0]) is nn.Linear
    twin.zero_grad()
    LOSS(twin(X)).backward()
    check(twin, as_one(twin, "dfa", PEFT))


@pytest.mark.parametrize("rule", ["dfa", "fa", "usf"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_transformer_with_adapters(rule, name):
    """Weights stored transposed; wrappers several modules down; a head that is trained in a copy."""
    peft = pytest.importorskip("peft")
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    if name == "gpt2":
        base = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2))
        config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, lora_dropout=0.1)
    else:
        small = BertConfig(
            vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, num_labels=3
        )
        base = BertForSequenceClassification(small)
        config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = peft.get_peft_model(base, config)
    for parameter_name, p in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(p)
    model.train()
    rewire.convert(model, rule)
    tokens = torch.randint(11, (3, 8))
    inputs = {"input_ids": tokens, "labels": tokens if name == "gpt2" else torch.tensor([0, 1, 2])}
    for _ in range(2):
        model(**inputs).loss.backward()
    report = rewire.verify(model, inputs, lambda out: out.loss)
    assert report.ok, str(report)
    live = [layer.name for layer in report.layers if layer.status == "live"]
    assert any(n.endswith("c_fc" if name == "gpt2" else "value") for n in live)
    assert not any("lora" in layer.name or "base_layer" in layer.name for layer in report.layers)
    if name == "bert":
        assert any(n.endswith("classifier") for n in live)
    for parameter_name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, parameter_name


def test_a_convolution_with_adapters():
    peft = pytest.importorskip("peft")
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0", "2"], modules_to_save=["5"]))
    for rule in ("dfa", "fa"):
        rewire.convert(model, rule, feedback="channel")
        for _ in range(2):
            model(torch.randn(4, 1, 6, 6)).square().sum().backward()
        report = rewire.verify(model, torch.randn(4, 1, 6, 6), lambda y: y.square().sum())
        assert report.ok, str(report)
        assert {layer.name.removeprefix(PEFT) for layer in report.layers} == {"0", "2", "5"}


def test_patterns_fit_the_wrapper_and_the_layer_it_stands_for():
    def rules(layers):
        model = rewire.convert(adapted(), "dfa", layers=layers)
        return {row.name: row.rule for row in rewire.summary(model).rows if row.converted}

    everywhere = dict.fromkeys("0246", "dfa")
    assert rules(None) == everywhere
    assert rules({"2": "fa"}) == everywhere | {"2": "fa"}
    assert rules({"*.inner": "bp"}) == dict.fromkeys("024", "bp") | {"6": "dfa"}
    assert rules({nn.Linear: "fa"}) == dict.fromkeys("0246", "fa")
    assert rules({Adapted: "fa"}) == dict.fromkeys("024", "fa") | {"6": "dfa"}
    with pytest.raises(rewire.ConversionError, match="no layer fits"):
        rules({"*.down": "fa"})


class Hollow(nn.Module):
    """Shows a layer's weight, and has nothing of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["inner"], name)

    def forward(self, x):
        return self.inner(x)


class Shy(Adapted):
    """Does not show its bias: not a layer to the outside."""

    @property
    def bias(self):
        raise RuntimeError("no bias here")


def test_what_is_no_wrapper_is_left_as_it_is():
    model = nn.Sequential(Hollow(nn.Linear(5, 6)), Shy(nn.Linear(6, 5)), nn.Linear(5, 4)).double()
    rewire.convert(model, "dfa")
    names = {row.name for row in rewire.summary(model).rows if row.converted}
    assert names == {"0.inner", "1.inner", "1.down", "1.up", "2"}


def test_a_wrapper_that_shows_nothing_is_one_layer_if_it_is_named_a_block():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Shy(nn.Linear(6, 5)), nn.Linear(5, 4)).double()
    rewire.convert(model, "dfa", blocks=[Shy])
    train(model)
    report = rewire.verify(model, X, LOSS)
    assert report.ok and [layer.name for layer in report.layers] == ["0", "2", "3"]


# -- frozen layers --------------------------------------------------------------------------------------------------


def half_frozen(rule, **options):
    """The two lowest layers of four are frozen."""
    model = mlp(WIDTHS)
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    return rewire.convert(model, rule, **options)


def train(model, steps=3):
    for _ in range(steps):
        model.zero_grad()
        LOSS(model(X)).backward()
    return model


@pytest.mark.parametrize("rule", ["dfa", "fa", "usf", "brsf", "shallow", "bp"])
def test_a_frozen_backbone_takes_no_part(rule):
    model = train(half_frozen(rule))
    hidden = X
    for module in model[:4]:
        if isinstance(module, nn.Linear):
            y = module(hidden)
            assert y.grad_fn is None and call_at(y) is None
            assert not y.requires_grad
        hidden = module(hidden)
    assert not any(m._rewire.randoms or m._rewire.made for m in (model[0], model[2]))  # no feedback was made
    if rule in ("dfa", "shallow"):
        assert not {"0", "2"} & rewire.feedback(model).keys()
    rows = {row.name: row for row in rewire.summary(model).rows}
    for name in ("0", "2"):
        assert rows[name].feedback_bytes == 0 and rows[name].feedback_shape is None
        if rule != "bp":
            assert rows[name].note == "neither it nor anything below it trains: costs nothing; frozen"
    assert "costs nothing" not in rows["4"].note
    report = rewire.verify(model, X, LOSS)
    assert report.ok, str(report)
    assert [layer.status for layer in report.layers[:2]] == ["frozen"] * 2
    assert model[0]._rewire.wiring.certain  # nothing is kept waiting for them


@pytest.mark.parametrize("rule", ["dfa", "fa"])
@pytest.mark.parametrize("later", [False, True], ids=["from the start", "thawed"])
def test_a_frozen_backbone_that_is_thawed(rule, later):
    """From then on every layer hands back as if it had never been frozen."""
    reference = train(rewire.convert(mlp(WIDTHS), rule, scale=SCALE))
    model = half_frozen(rule, scale=SCALE)
    if later:
        train(model)
    model.requires_grad_()
    train(model)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        same(p.grad, q.grad, name, tol=1e-14)
    model[0].requires_grad_(False)
    train(model)
    assert model[0].weight.grad is None
    same(model[2].weight.grad, reference[2].weight.grad)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.attention = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        h = torch.tanh(self.a(x))[:, None].expand(-1, 3, -1)
        h = self.attention(h, h, h, need_weights=False)[0]
        return self.head(torch.tanh(self.b(h)).mean(1))


@pytest.mark.parametrize("rule", ["dfa", "fa", "usf", "brsf"])
def test_what_is_frozen_and_thawed_on_the_way_is_said(rule):
    """Gradual unfreezing, from a model that has trained as a whole."""

    def costs_nothing():
        return [row.name for row in rewire.summary(model).rows if "costs nothing" in row.note]

    def passes():
        for _ in range(2):
            model(x).square().sum().backward()

    model, x = rewire.convert(Attending(), rule), torch.randn(6, 5)
    passes()
    passes()
    assert not costs_nothing()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("head"))
    passes()
    below = ["a", "attention.in_proj", "attention.out_proj", "b"]
    assert costs_nothing() == below
    for name in ("b", "attention", "a"):
        model.get_submodule(name).requires_grad_()
        passes()
        del below[[part.split(".")[0] for part in below].index(name) :]
        assert costs_nothing() == below
    model.requires_grad_(False)
    model(x)
    model.a.requires_grad_()
    passes()
    assert not costs_nothing()  # all above the lowest take part
    assert model.head._rewire.wiring.certain  # of the role of each: no need to find out again


def test_what_is_thawed_measures_its_scale_then():
    model = train(half_frozen("dfa"))
    assert rewire.scales(model).keys() == {"6"}
    before = rewire.scales(model)["6"]
    model.requires_grad_()
    model.zero_grad()
    LOSS(model(X)).backward()  # measures: layers 2 and 4 hand back backprop's gradient, 6 its feedback
    layers = weights(model)
    e = error(LOSS, states(layers, X)[-1])
    hand_back = lambda name, delta: e @ rewire.feedback(model)["6"] if name == "6" else delta @ dict(W)[name]  # noqa: E731
    W = [(name, w) for name, w, _ in layers]
    for name, g in chain_gradients(layers, X, e, hand_back).items():
        if name != "x":
            same(model.get_parameter(name).grad, g, name)
    assert rewire.scales(model).keys() == {"2", "4", "6"} and rewire.scales(model)["6"] == before
    assert rewire.verify(model, X, LOSS).ok


def calls_made(function):
    """How many Python functions run."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("rule", ["dfa", "fa", "brsf"])
def test_a_frozen_layer_runs_next_to_no_python(rule):
    model = train(half_frozen(rule))
    layer = model[0]
    plain = nn.Linear(5, 7).double()
    more = calls_made(lambda: layer(X)) - calls_made(lambda: plain(X))
    assert more <= 7, more


def test_a_frozen_block_takes_no_part():
    model = nn.Sequential(
        nn.Sequential(nn.Linear(5, 7), nn.Tanh()), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4)
    ).double()
    model[0].requires_grad_(False)
    rewire.convert(model, "dfa", blocks=["0"])
    train(model)
    assert call_at(model[0](X)) is None
    assert rewire.verify(model, X, LOSS).layers[0].status == "frozen"


def test_a_frozen_backbone_compiles():
    model = train(half_frozen("dfa"))
    plain = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    LOSS(compiled(X)).backward()
    for p, g in zip((p for p in model.parameters() if p.requires_grad), plain, strict=True):
        same(p.grad, g)
    torch._dynamo.reset()


@contextlib.contextmanager
def weight_from_outside(model):
    """``torch.func.functional_call``: the module's parameters are frozen, the weight it is given is not."""
    given = {"0.weight": model[0].weight.detach().clone().requires_grad_()}
    yield given, lambda x: torch.func.functional_call(model, given, (x,))


@pytest.mark.parametrize("rule", ["dfa", "fa"])
def test_a_frozen_layer_that_is_given_a_weight_trains_that(rule):
    model = rewire.convert(mlp().requires_grad_(False), rule, scale=SCALE)
    thawed = rewire.convert(mlp(), rule, scale=SCALE)
    with weight_from_outside(model) as (given, call):
        for _ in range(3):
            given["0.weight"].grad = None
            LOSS(call(X)).backward()
            thawed.zero_grad()
            LOSS(thawed(X)).backward()
        same(given["0.weight"].grad, thawed[0].weight.grad)
        assert F.linear(X, given["0.weight"]).requires_grad


class AdaptedLinear(nn.Linear):
    """A wrapper that is a linear layer by its class, and has no weight of its own."""

    def __init__(self, inner, rank=2):
        nn.Module.__init__(self)
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self.inner = inner.requires_grad_(False)
        self.down = nn.Linear(inner.in_features, rank, bias=False).double()
        self.up = nn.Linear(rank, inner.out_features, bias=False).double()

    weight = Adapted.weight
    bias = Adapted.bias
    forward = Adapted.forward


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_a_wrapper_that_is_a_linear_layer_is_one_layer(rule):
    model = mlp(WIDTHS)
    model[2] = AdaptedLinear(model[2])
    rewire.convert(model, rule, scale=SCALE)
    for _ in range(3):
        LOSS(model(X)).backward()
    result = rewire.verify(model, X, LOSS)
    assert result.ok, str(result)
    assert [layer.name for layer in result.layers] == ["0", "2", "4", "6"]


class Turning(nn.Module):
    """Two products in a row: of a matrix that is made anew each time, and of the wrapped layer's weight."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.low = nn.Parameter(randn(2, 6, seed=30))
        self.register_buffer("rest", randn(4, 6, seed=31))

    weight = Adapted.weight
    bias = Adapted.bias

    def forward(self, x):
        return F.linear(F.linear(x, torch.cat([self.low, self.rest])), self.inner.weight, self.inner.bias)


def test_an_adapters_matrix_of_the_layers_shape_is_not_the_layers_weight():
    """What the weight's operation hands back is B's; from there on all is exact."""
    model = mlp(WIDTHS)
    model[4] = Turning(model[4])
    rewire.convert(model, "fa", scale=SCALE)
    seen = {}

    def note(module, args, y):
        seen["x"] = args[0]
        args[0].retain_grad()
        y.register_hook(lambda g: seen.update(delta=g))

    model[4].register_forward_hook(note)
    LOSS(model(X)).backward()
    fed = seen["delta"] @ rewire.feedback(model)["4"]
    same(model[4].low.grad, (fed.t() @ seen["x"])[:2])
    same(seen["x"].grad, fed @ torch.cat([model[4].low, model[4].rest]))
