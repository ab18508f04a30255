"""``nn.MultiheadAttention`` and what is made of it: every projection is under its rule, and nothing else changes.

The reference is an attention of matrix products written here, whose projections hand back what the test says.
"""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire
from rewire.passes import call_of, upstream

N, T, S, E, HEADS = 3, 4, 4, 6, 2


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Query, key and value from linear layers of their own, an attention, and a head on every position."""

    def __init__(self, same="qkv", kdim=None, vdim=None, batch_first=True, need_weights=False, mask=None, **options):
        super().__init__()
        self.same, self.batch_first, self.need_weights = same, batch_first, need_weights
        self.q = nn.Linear(3, E)
        self.k = nn.Linear(3, kdim or E)
        self.v = nn.Linear(3, vdim or E)
        self.attention = nn.MultiheadAttention(E, HEADS, kdim=kdim, vdim=vdim, batch_first=batch_first, **options)
        self.head = nn.Linear(E, 2)
        self.biased = nn.Linear(E, S) if mask == "made" else None
        self.mask = {
            None: {},
            "made": {},
            "causal": {"attn_mask": torch.ones(T, S, dtype=torch.bool).triu(1)},
            "float": {"attn_mask": draw(T, S, seed=8)},
            "padding": {"key_padding_mask": torch.arange(S).expand(N, S) >= torch.tensor([[4], [2], [3]])},
        }[mask]

    def inputs(self, q, k, v):
        q = torch.tanh(self.q(q))
        k = q if self.same == "qkv" else torch.tanh(self.k(k))
        return q, k, k if self.same in ("kv", "qkv") else torch.tanh(self.v(v))

    def forward(self, q, k, v):
        given = self.inputs(q, k, v)
        mask = self.mask if self.biased is None else {"attn_mask": self.biased(given[0]).repeat_interleave(HEADS, 0)}
        if not self.batch_first:
            unique = {id(t): t.transpose(0, 1) for t in given}
            given = [unique[id(t)] for t in given]
        y, _ = self.attention(*given, need_weights=self.need_weights, **mask)
        if not self.batch_first:
            y = y.transpose(0, 1)
        return self.head(torch.tanh(y))


class Handback(torch.autograd.Function):
    """x W^T + b, with its own gradients for W and b, and for x what ``back(delta)`` gives."""

    @staticmethod
    def forward(ctx, x, weight, bias, back):
        ctx.save_for_backward(x)
        ctx.back, ctx.biased = back, bias is not None
        y = x @ weight.T
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, delta):
        (x,) = ctx.saved_tensors
        rows = delta.flatten(0, -2)
        back = ctx.back(delta) if ctx.needs_input_grad[0] else None
        return back, rows.T @ x.flatten(0, -2), rows.sum(0) if ctx.biased else None, None


def reference(net, inputs, rule, e_holder):
    """The output of ``net`` under ``rule``, from its parameters and feedback, by hand."""
    B = rewire.feedback(net)
    m, s = net.attention, net.same
    p = {name: t.detach().requires_grad_(t.requires_grad) for name, t in net.named_parameters()}

    def layer(name, x, weight, bias, rows=slice(None), row=None):
        def back(delta):
            if rule == "dfa":
                return e_holder["e"] @ B[name if row is None else f"{name}#{row}"]
            return delta @ B[name][rows]

        return Handback.apply(x, weight, bias, back)

    def simple(name, x):
        return layer(name, x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def projected(q, k, v):
        bias = p.get("attention.in_proj_bias")
        cut = [slice(0, E), slice(E, 2 * E), slice(2 * E, 3 * E)]
        biases = [None if bias is None else bias[c] for c in cut]
        if m.in_proj_weight is None:
            names = [f"attention.{part}_proj" for part in "qkv"]
            given = zip(names, (q, k, v), biases, strict=True)
            return [layer(name, x, p[f"{name}_weight"], b) for name, x, b in given]
        W, name = p["attention.in_proj_weight"], "attention.in_proj"
        if s == "qkv":
            return layer(name, q, W, bias).chunk(3, -1)
        if s == "kv":
            kv = layer(name, k, W[E:], None if bias is None else bias[E:], slice(E, 3 * E), 1 + E)
            return [layer(name, q, W[:E], biases[0], cut[0], 1), *kv.chunk(2, -1)]
        given = zip((q, k, v), cut, biases, strict=True)
        return [layer(name, x, W[c], b, c, 1 + c.start) for x, c, b in given]

    q = torch.tanh(layer("q", inputs[0], p["q.weight"], p["q.bias"]))
    k = q if s == "qkv" else torch.tanh(layer("k", inputs[1], p["k.weight"], p["k.bias"]))
    v = k if s in ("kv", "qkv") else torch.tanh(layer("v", inputs[2], p["v.weight"], p["v.bias"]))
    made = None if net.biased is None else simple("biased", q).unsqueeze(1)
    q, k, v = projected(q, k, v)
    if m.bias_k is not None:
        k = torch.cat([k, p["attention.bias_k"].expand(N, 1, E)], 1)
        v = torch.cat([v, p["attention.bias_v"].expand(N, 1, E)], 1)
    if m.add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros(N, 1, E)], 1) for t in (k, v))
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(E // HEADS)
    scores = scores if made is None else scores + made
    for kind, mask in net.mask.items():
        mask = mask[:, None, None] if kind == "key_padding_mask" else mask
        mask = F.pad(mask, (0, scores.shape[-1] - mask.shape[-1]))
        scores = scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
    return p, simple("head", torch.tanh(simple("attention.out_proj", mixed)))


VARIANTS = [
    {},
    {"batch_first": False},
    {"same": "kv"},
    {"same": "kv", "batch_first": False},
    {"same": ""},
    {"same": "", "kdim": 5, "vdim": 7},
    {"same": "", "kdim": 5, "vdim": 7, "batch_first": False},
    {"need_weights": True},
    {"same": "kv", "mask": "causal"},
    {"same": "kv", "mask": "float", "need_weights": True},
    {"same": "kv", "mask": "padding"},
    {"same": "kv", "mask": "made"},
    {"same": "", "mask": "made", "need_weights": True},
    {"same": "kv", "add_bias_kv": True, "need_weights": True},
    {"same": "kv", "add_bias_kv": True, "add_zero_attn": True, "mask": "padding"},
    {"bias": False},
]


def seeded(**options):
    torch.manual_seed(0)
    return Net(**options).double()


@pytest.mark.parametrize("rule", ["dfa", "fa"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_values(rule, options):
    check_values(seeded(**options), rule)


@pytest.mark.parametrize("rule", ["dfa", "fa"])
@pytest.mark.parametrize("frozen", ["k", "kv", "qkv", "attention"])
def test_values_where_something_is_frozen(rule, frozen):
    net = seeded(same="")
    for name in ["attention"] if frozen == "attention" else frozen:
        net.get_submodule(name).requires_grad_(False)
    check_values(net, rule)


class Twice(Net):
    """Uses its attention's weight itself as well."""

    def forward(self, q, k, v):
        y, _ = self.attention(*self.inputs(q, k, v), need_weights=False)
        return self.head(torch.tanh(y) + torch.tanh(F.linear(y, self.attention.in_proj_weight[:E])))


@pytest.mark.parametrize("rule", ["fa", "brsf"])
def test_no_short_way_where_somebody_else_watches_for_the_same_weight(rule):
    torch.manual_seed(0)
    net = Twice().double()
    net.k = net.v = nn.Identity()
    rewire.convert(net, rule)
    (state,) = net.attention._rewire.states
    x = draw(N, T, 3)
    drawn = set()
    for _ in range(4):
        before = state.draws
        net(x, x, x).square().sum().backward()
        drawn.add(state.draws - before)
    assert drawn == {2 if rule == "brsf" else 0}


def test_functions_put_in_the_place_of_others(monkeypatch):
    net = seeded()
    inputs = draw(N, T, 3), draw(N, S, 3, seed=1), draw(N, S, 3, seed=2)
    rewire.convert(net, "dfa")
    before = net(*inputs)
    calls = []
    own = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(0) or own(*a, **k))
    assert torch.equal(net(*inputs), before)
    assert calls == [0]
    monkeypatch.undo()
    assert torch.equal(net(*inputs), before)
    assert calls == [0]


@pytest.mark.parametrize("rule", ["dfa", "fa"])
@pytest.mark.parametrize("options", [{}, {"same": "kv"}, {"same": ""}], ids=str)
def test_values_of_a_settled_attention(rule, options):
    """Where all layers run there is nothing to wait for; nor where those that do not are gone."""
    net = seeded(**options)
    for name in {"": "", "kv": "v", "qkv": "kv"}[net.same]:
        setattr(net, name, nn.Identity())
    check_values(net, rule)


def check_values(net, rule):
    rewire.convert(net, rule, scale=0.3)
    inputs = draw(N, T, 3), draw(N, S, 3, seed=1), draw(N, S, 3, seed=2)
    weight = draw(N, T, 2, seed=3)
    for _ in range(3):
        net.zero_grad()
        (net(*inputs).sigmoid() * weight).sum().backward()
        holder = {}
        p, y = reference(net, inputs, rule, holder)
        y.register_hook(lambda e, holder=holder: holder.update(e=e))
        (y.sigmoid() * weight).sum().backward()
        for name, parameter in net.named_parameters():
            wanted = p[name].grad
            if wanted is None:
                assert parameter.grad is None, name
            else:
                torch.testing.assert_close(parameter.grad, wanted, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("rule", ["fa", "frsf", "brsf", "usf"])
def test_a_settled_attention_takes_the_short_way_under_local_rules(monkeypatch, rule):
    net = rewire.convert(seeded(), rule)
    x = draw(N, T, 3)
    while rewire.hosts._ATTRIBUTE in vars(net):  # it waits for layers that do not run
        net(x, x, x).square().sum().backward()
    monkeypatch.setattr(rewire.hosts.uses, "call", None)
    net(x, x, x).square().sum().backward()


def test_a_settled_attention_takes_the_short_way(monkeypatch):
    """And the walk through its graph a short cut."""
    net = rewire.convert(seeded(same=""), "dfa")
    inputs = draw(N, T, 3), draw(N, S, 3, seed=1), draw(N, S, 3, seed=2)
    for _ in range(2):
        net(*inputs).square().sum().backward()
    monkeypatch.setattr(rewire.hosts.uses, "call", None)
    y = net(*inputs)
    calls = {call.state.name: call for call in upstream([y.grad_fn], net.head._rewire.wiring)}
    out = calls["attention.out_proj"]
    assert [call_of(source).state.name for source in out.sources] == ["attention.in_proj"] * 3
    y.square().sum().backward()


@pytest.mark.parametrize("rule", ["usf", "frsf", "sdfa", "shallow"])
@pytest.mark.parametrize("options", [{}, {"same": "kv"}, {"same": "", "kdim": 5, "vdim": 7}], ids=str)
def test_other_rules_are_live(rule, options):
    net = rewire.convert(seeded(**options), rule)
    inputs = draw(N, T, 3), draw(N, S, 3, seed=1), draw(N, S, 3, seed=2)
    for _ in range(2):
        net(*inputs).square().sum().backward()
    result = rewire.verify(net, inputs, lambda y: y.square().sum())
    assert result.ok, str(result)
    assert {layer.status for layer in result.layers if layer.name.startswith("attention")} == {"live"}


def test_as_many_positions_as_samples():
    """(T, N, E) and (N, T, E) look the same then; the module knows which it has."""
    net = rewire.convert(seeded(batch_first=True), "dfa", scale=0.3)
    inputs = (draw(N, N, 3),) * 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rewire.RewireWarning)
        net(*inputs).square().sum().backward()
        net.zero_grad()
        net(*inputs).square().sum().backward()
    holder = {}
    p, y = reference(net, inputs, "dfa", holder)
    y.register_hook(lambda e: holder.update(e=e))
    y.square().sum().backward()
    for name, parameter in net.named_parameters():
        if p[name].grad is not None:
            torch.testing.assert_close(parameter.grad, p[name].grad, msg=name)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("rule", ["bp", "fa", "dfa"])
def test_batches_without_samples(rule, batch_first):
    net = rewire.convert(seeded(batch_first=batch_first), rule)
    for n in (N, N, 0):
        net.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rewire.RewireWarning)
            net(*(draw(n, T, 3),) * 3).square().sum().backward()
    for name, parameter in net.named_parameters():
        if not name.startswith(("k.", "v.")):
            assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_unbatched(rule):
    """PyTorch projects queries, keys and values apart then: each part of the weight has a feedback of its own."""
    net = rewire.convert(seeded(), rule, scale=0.3)
    inputs = (draw(T, 3),) * 3
    for _ in range(2):
        net(*inputs).square().sum().backward()
    result = rewire.verify(net, inputs, lambda y: y.square().sum())
    assert result.ok, str(result)
    if rule == "dfa":
        assert {f"attention.in_proj#{1 + i * E}" for i in range(3)} <= rewire.feedback(net).keys()


class Encoder(nn.Module):
    def __init__(self, batch_first=True, norm_first=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
        self.embed = nn.Linear(3, 8)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)))


@pytest.mark.parametrize("rule", ["fa", "dfa"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_encoder(rule, batch_first, norm_first):
    torch.manual_seed(0)
    model = Encoder(batch_first, norm_first).double()
    plain = copy.deepcopy(model)
    rewire.convert(model, rule)
    x = draw(3, 5, 3)
    assert torch.equal(model(x), plain(x))
    for _ in range(2):
        model(x).square().sum().backward()
    result = rewire.verify(model, x, lambda y: y.square().sum())
    assert result.ok and sum(layer.status == "live" for layer in result.layers) == 9, str(result)
    rows = {row.name: row for row in rewire.summary(model).rows}
    assert rows["encoder.layers.0.self_attn.in_proj"].converted
    assert rows["encoder.layers.0.self_attn.out_proj"].converted


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_encoder_and_decoder(rule):
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True).double()
    rewire.convert(model, rule)
    inputs = draw(3, 5, 8), draw(3, 4, 8, seed=1)
    loss = lambda y: (y * draw(3, 4, 8, seed=2)).sum()  # noqa: E731
    for _ in range(2):
        loss(model(*inputs)).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    result = rewire.verify(model, inputs, loss)
    assert result.ok, str(result)


@pytest.mark.parametrize("grad", [True, False])
def test_fast_path_in_evaluation_is_taken_and_bitwise_the_same(monkeypatch, grad):
    torch.manual_seed(0)
    model = Encoder().eval()
    plain = copy.deepcopy(model)
    rewire.convert(model, "dfa")
    taken = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: taken.append(1) or fast(*a))
    x = draw(3, 5, 3).float()
    with torch.set_grad_enabled(grad):
        assert torch.equal(model(x), plain(x))
    assert len(taken) == (0 if grad else 4)


def test_measuring_pass_is_backprop():
    net, plain = rewire.convert(seeded(same="kv"), "dfa"), seeded(same="kv")
    inputs = draw(N, T, 3), draw(N, S, 3, seed=1), draw(N, S, 3, seed=2)
    for model in (net, plain):
        model(*inputs).square().sum().backward()
    for (name, a), b in zip(net.named_parameters(), plain.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)
    scales = rewire.scales(net)
    assert {"attention.in_proj", "attention.out_proj"} <= set(scales)


def test_same_module_after_all():
    model, plain = rewire.convert(seeded(), "dfa", scale=0.3), seeded()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert isinstance(model.attention, nn.MultiheadAttention)
    inputs = draw(N, T, 3), None, None
    model(*inputs).sum().backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for m in (model, twin):
            m.zero_grad()
            m(*inputs).sum().backward()
        for (name, a), b in zip(model.named_parameters(), twin.named_parameters(), strict=True):
            assert a.grad is None or torch.equal(a.grad, b[1].grad), name
    rewire.restore(model)
    assert type(model.attention) is nn.MultiheadAttention
    assert repr(model) == repr(plain) and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(model.modules(), plain.modules(), strict=True))


@pytest.mark.parametrize("pattern", ["attention", "attention.*", nn.MultiheadAttention])
def test_patterns_cover_the_whole_attention(pattern):
    model = rewire.convert(seeded(), "fa", layers={pattern: "bp"})
    rules = {row.name: row.rule for row in rewire.summary(model).rows if row.converted}
    assert rules == {
        "q": "fa", "k": "fa", "v": "fa", "attention.in_proj": "bp", "attention.out_proj": "bp", "head": "fa",
    }  # fmt: skip


def test_as_a_block():
    model = rewire.convert(seeded(), "dfa", blocks=["attention"], scale=0.3)
    inputs = draw(N, T, 3), None, None
    for _ in range(2):
        model(*inputs).sum().backward()
    assert rewire.verify(model, inputs, lambda y: y.sum()).ok


def test_nothing_that_trains_takes_the_ordinary_way():
    net = seeded()
    for p in net.attention.parameters():
        p.requires_grad_(False)
    rewire.convert(net, "dfa", scale=0.3)
    inputs = draw(N, T, 3), None, None
    for _ in range(2):
        net.zero_grad()
        net(*inputs).square().sum().backward()
    assert net.q.weight.grad is not None and bool(net.q.weight.grad.any())  # fed back through the frozen attention
    assert rewire.verify(net, inputs, lambda y: y.square().sum()).ok


def test_function_called_with_weights_of_children():
    """As CLIP's attention pooling does."""

    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.lower = nn.Linear(3, E)
            self.q, self.k, self.v, self.out = (nn.Linear(E, E) for _ in range(4))
            self.head = nn.Linear(E, 2)

        def forward(self, x):
            x = torch.tanh(self.lower(x)).transpose(0, 1)
            bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
            y, _ = F.multi_head_attention_forward(
                x.mean(0, keepdim=True), x, x, E, HEADS, None, bias, None, None, False, 0.0,
                self.out.weight, self.out.bias, use_separate_proj_weight=True,
                q_proj_weight=self.q.weight, k_proj_weight=self.k.weight, v_proj_weight=self.v.weight,
            )  # fmt: skip
            return self.head(y[0])

    for rule in ("fa", "dfa"):
        torch.manual_seed(0)
        model = rewire.convert(Pool().double(), rule)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                model(draw(N, T, 3)).square().sum().backward()
        result = rewire.verify(model, draw(N, T, 3), lambda y: y.square().sum())
        assert result.ok and sum(layer.status == "live" for layer in result.layers) == 5, str(result)


@pytest.mark.parametrize("same", ["kv", ""], ids=["waits for a layer", "settled"])
@pytest.mark.parametrize("rule", ["dfa", "fa"])
def test_under_torch_func(rule, same):
    net = rewire.convert(seeded(same=same), rule, scale=0.3, output="head")
    inputs = draw(N, T, 3), draw(N, S, 3, seed=1), draw(N, S, 3, seed=2)
    for _ in range(2):
        net.zero_grad()
        net(*inputs).square().sum().backward()
    p = {name: t.detach() for name, t in net.named_parameters()}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(net, p, inputs).square().sum())(p)
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


class Last(nn.Module):
    """An attention at the very end, whose output the loss sees as the model has it, or its mean."""

    def __init__(self, batch_first):
        super().__init__()
        self.stem = nn.Linear(3, E)
        self.attention = nn.MultiheadAttention(E, HEADS, batch_first=batch_first)

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        return self.attention(h, h, h, need_weights=False)[0]


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("of", [lambda y: y, lambda y: y.mean(-2)], ids=["positions", "mean"])
@pytest.mark.parametrize("rule", ["dfa", "fa"])
def test_an_attention_as_the_output_layer(rule, of, compiled):
    """However its dimensions are ordered, each position is handed back its own error."""
    x, weight = draw(N, T + 1, 3), draw(N, T + 1, E, seed=4)
    found = []
    for batch_first in (True, False):
        torch.manual_seed(0)
        model = rewire.convert(Last(batch_first).double(), rule, scale=0.3)

        def loss(y, batch_first=batch_first):
            return (of(y if batch_first else y.transpose(0, 1)) * of(weight)).sum()

        inputs = x if batch_first else x.transpose(0, 1)
        loss(model(inputs)).backward()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for _ in range(2):
            model.zero_grad()
            loss(run(inputs)).backward()
        found.append([p.grad.clone() for p in model.parameters()])
        if not compiled:
            assert rewire.verify(model, inputs, loss).ok
            e = rewire.output_error(model)
            if rule == "dfa":
                assert e.shape == (*inputs.shape[:2], E)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_what_an_attention_as_the_output_layer_hands_back():
    """e B of the definition, position by position."""
    torch.manual_seed(0)
    model = rewire.convert(Last(True).double(), "dfa", scale=0.3)
    x, weight = draw(N, T + 1, 3), draw(N, T + 1, E, seed=4)
    for _ in range(2):
        model.zero_grad()
        (model(x) * weight).sum().backward()
    B = rewire.feedback(model)["attention.out_proj"]
    W = model.attention.in_proj_weight.detach().clone().requires_grad_()
    q, k, v = (
        t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (torch.tanh(model.stem(x)).detach() @ W.T).chunk(3, -1)
    )
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    (expected,) = torch.autograd.grad(mixed, W, weight @ B)
    torch.testing.assert_close(model.attention.in_proj_weight.grad, expected)
