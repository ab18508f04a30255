"""``nn.MultiheadAttention`` in compiled graphs."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import rewire
from rewire import traced_attention

from .nets import error, one_graph, pair, same, step

RULES = ["bp", "fa", "usf", "frsf", "brsf", "dfa", "sdfa", "drtp", "shallow"]


class Net(nn.Module):
    """An encoder, then queries from one place and keys and values from another, of ``width`` each."""

    def __init__(self, batch_first=True, width=8, cls=nn.MultiheadAttention):
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Linear(5, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.other = nn.Linear(8, width)
        self.cross = cls(8, 2, batch_first=batch_first, kdim=width, vdim=width)
        self.head = nn.Linear(8, 3)

    def forward(self, x, **options):
        h = self.encoder(self.embed(x), **options)
        other = torch.tanh(self.other(h))
        h = h + self.cross(h, other, other, need_weights=False)[0]
        return self.head(h.mean(1 if self.batch_first else 0))


def sequences(n):
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, 7, 5, generator=g), torch.randint(0, 3, (n,), generator=g)


def turned(n):
    x, y = sequences(n)
    return x.transpose(0, 1).contiguous(), y


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_one_graph_same_gradients(rule, batch_first):
    data = sequences if batch_first else turned
    model, twin = pair(lambda: Net(batch_first), data, rule)
    fast = one_graph(model)
    for n in (6, 4, 3):
        step(fast, data(n)), step(twin, data(n))
        same(twin, model)
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]


@pytest.mark.parametrize("rule", ["fa", "frsf", "dfa"])
def test_with_inductor(rule):
    model, twin = pair(Net, sequences, rule)
    step(torch.compile(model, fullgraph=True), sequences(6)), step(twin, sequences(6))
    same(twin, model)


@pytest.mark.parametrize("rule", ["fa", "frsf", "dfa"])
def test_keys_and_values_of_another_width(rule):
    model, twin = pair(lambda: Net(width=6), sequences, rule)
    step(one_graph(model), sequences(6)), step(twin, sequences(6))
    same(twin, model)
    assert model.cross.q_proj_weight.grad is not None


@pytest.mark.parametrize("options", [{"skip": "cut"}, {"feedback": "lowrank"}, {"feedback": "shared"}], ids=str)
def test_walls_and_structures(options):
    model, twin = pair(Net, sequences, "dfa", **options)
    step(one_graph(model), sequences(6)), step(twin, sequences(6))
    same(twin, model)


def test_other_rules_for_some_projections():
    layers = {"cross.in_proj": "bp", "cross.out_proj": "fa", "encoder.layers.0.self_attn.in_proj": "frsf"}
    model, twin = pair(Net, sequences, "dfa", layers=layers)
    step(one_graph(model), sequences(6)), step(twin, sequences(6))
    same(twin, model)


class Alone(nn.Module):
    """Attention with nothing between its input and its projections, and nothing behind it."""

    def __init__(self):
        super().__init__()
        self.below = nn.Linear(5, 4)
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, x):
        h = torch.tanh(self.below(x))
        return self.attention(h, h, h)[0][:, 0]


def test_values_and_an_attention_as_output():
    model, twin = pair(Alone, sequences, "dfa")
    step(one_graph(model), sequences(6)), step(twin, sequences(6))
    same(twin, model)
    assert rewire.output_error(twin) is not None


class Values(nn.Module):
    """All that reaches the output is the mean of what is made of the values."""

    def __init__(self):
        super().__init__()
        self.below = nn.Linear(5, 4)
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.below(x))
        return self.head(self.attention(h, h, h)[0].mean(1))


def test_values_against_the_equation():
    """e reaches all tokens of a sample, by the B of each layer; the softmax in between is backprop's."""
    model, _ = pair(Values, sequences, "dfa")
    step(one_graph(model), sequences(6))
    x, y = sequences(6)
    e = error(model, (x, y))
    B = rewire.feedback(model)
    with torch.no_grad():
        h = torch.tanh(model.below(x))
    delta = (e @ B["attention.in_proj"])[:, None] * (1 - h**2)
    torch.testing.assert_close(model.below.bias.grad, delta.sum((0, 1)), rtol=1e-4, atol=1e-6)
    packed = F.linear(h, model.attention.in_proj_weight, model.attention.in_proj_bias).detach().requires_grad_()
    q, k, v = packed.chunk(3, -1)
    heard = ((q @ k.mT / 2).softmax(-1) @ v * (e @ B["attention.out_proj"])[:, None]).sum()
    (at,) = torch.autograd.grad(heard, packed)
    expected = torch.einsum("nto,nti->oi", at, h)
    torch.testing.assert_close(model.attention.in_proj_weight.grad, expected, rtol=1e-4, atol=1e-6)


def test_masks_and_autocast():
    model, twin = pair(Net, sequences, "dfa")
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    hidden = torch.zeros(6, 7).bool()
    hidden[:, 5:] = True
    fast = one_graph(model)
    for m in (fast, twin):
        m.zero_grad()
        x, y = sequences(6)
        F.cross_entropy(m(x, mask=mask, is_causal=True, src_key_padding_mask=hidden.float() * -1e9), y).backward()
    same(twin, model)
    for m in (fast, twin):
        with torch.autocast("cpu", torch.bfloat16):
            step(m, sequences(6))
    for (name, p), q in zip(twin.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0.05, atol=0.02, msg=name)


def test_frozen_projections():
    model, twin = pair(Net, sequences, "dfa")
    for m in (model, twin):
        for p in (*m.embed.parameters(), m.cross.in_proj_weight, *m.cross.out_proj.parameters()):
            p.requires_grad_(False)
        step(m, sequences(6))
    step(one_graph(model), sequences(6)), step(twin, sequences(6))
    same(twin, model)


def test_another_rule_for_a_while_and_no_more_graphs():
    model, twin = pair(Net, sequences, "dfa")
    fast = one_graph(model)
    for _ in range(3):
        for m, other in ((fast, model), (twin, twin)):
            with rewire.use_rule(other, "bp"):
                step(m, sequences(6))
        same(twin, model)
        step(fast, sequences(6)), step(twin, sequences(6))
        same(twin, model)
    assert counters["stats"]["unique_graphs"] == 2


def test_two_models_do_not_mix():
    for seed in (0, 1):
        model, twin = pair(Net, sequences, "dfa", seed=seed)
        step(one_graph(model), sequences(6)), step(twin, sequences(6))
        same(twin, model)


class Own(nn.MultiheadAttention):
    def forward(self, query, key, value, **options):
        return super().forward(query, key, 2 * value, **options)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_a_forward_of_its_own_runs_outside(rule):
    model, twin = pair(lambda: Net(cls=Own), sequences, rule)
    fast = torch.compile(model, backend="aot_eager")
    if rule == "dfa":
        with pytest.warns(rewire.RewireWarning, match="layer 'cross.in_proj' cannot be part of a compiled graph"):
            step(fast, sequences(6))
    else:
        step(fast, sequences(6))
    step(twin, sequences(6))
    same(twin, model)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_evaluation_and_a_copy(rule):
    model, _ = pair(Net, sequences, rule)
    model.eval()
    fast = one_graph(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(sequences(6)[0]), model(sequences(6)[0]))
    copied = copy.deepcopy(model)
    step(copied, sequences(6)), step(model, sequences(6))
    step(one_graph(copied), sequences(6))
    same(model, copied)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_breaking_it_is_found(monkeypatch, rule):
    model, twin = pair(Net, sequences, rule)
    step(twin, sequences(6))
    # The rows of the weight that keys and values meet, taken for those of the queries.
    monkeypatch.setattr(traced_attention, "input_of", lambda state, view, weight, mixes: min(1, view is not weight))
    step(one_graph(model), sequences(6))
    with pytest.raises(AssertionError):
        same(twin, model)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_a_vision_transformer(rule):
    pytest.importorskip("torchvision")
    from torchvision.models.vision_transformer import VisionTransformer

    def net():
        model = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)
        nn.init.normal_(model.heads.head.weight)  # zeros, as it is made
        return model

    def images(n):
        g = torch.Generator().manual_seed(n)
        return torch.randn(n, 3, 32, 32, generator=g), torch.randint(0, 3, (n,), generator=g)

    model, twin = pair(net, images, rule)
    step(one_graph(model), images(4)), step(twin, images(4))
    same(twin, model)
