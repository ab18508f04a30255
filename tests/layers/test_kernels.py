"""Weight gradients of convolutions under direct rules, where other kernels than oneDNN's make them."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rewire
from rewire import kernels
from rewire.kernels import at_once, by_patches, by_sample, with_rows_behind
from rewire.swap import states_of

from ..reference import layers, networks
from ..rules.checks import parameters, used_feedback

# The convolution, the (height, width) of its input, and what makes its weight's gradient.
CHOICES = {
    "pixels, large map": (lambda: nn.Conv2d(4, 6, 1), (5, 7), by_sample),
    "pixels, small map": (lambda: nn.Conv2d(6, 7, 1), (2, 2), at_once),
    "pixels, more channels than places": (lambda: nn.Conv2d(30, 28, 1), (4, 6), None),
    "every second pixel": (lambda: nn.Conv2d(4, 6, 1, stride=2), (5, 7), None),
    "pixels with a margin": (lambda: nn.Conv2d(4, 6, 1, padding=1), (5, 7), None),
    "pixels in groups": (lambda: nn.Conv2d(4, 6, 1, groups=2), (5, 7), None),
    "each channel, two rows": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 5), with_rows_behind),
    "each channel, one row, no bias": (lambda: nn.Conv2d(6, 6, 3, 1, 1, 1, 6, False), (1, 1), with_rows_behind),
    "each channel, three rows": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (3, 2), None),
    "each channel, other kernel": (lambda: nn.Conv2d(6, 6, 5, padding=2, groups=6), (2, 2), None),
    "each channel, every second place": (lambda: nn.Conv2d(6, 6, 3, 2, 1, groups=6), (2, 4), None),
    "each channel, twice": (lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6), (2, 2), None),
    "many channels, small map": (lambda: nn.Conv2d(8, 16, 3, padding=1), (2, 4), by_patches),
    "many channels, every second place": (lambda: nn.Conv2d(16, 8, (3, 2), (2, 3), (1, 0)), (4, 4), by_patches),
    "many channels, large map": (lambda: nn.Conv2d(8, 16, 3, padding=1), (3, 3), None),
    "few channels": (lambda: nn.Conv2d(8, 15, 3, padding=1), (2, 2), None),
    "with holes": (lambda: nn.Conv2d(8, 16, 2, dilation=2), (3, 3), None),
    "as large as before": (lambda: nn.Conv2d(8, 16, 3, padding="same"), (2, 2), None),
    "a margin that is no zeros": (lambda: nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular"), (2, 2), None),
}
every = pytest.mark.parametrize("make, space, expected", CHOICES.values(), ids=CHOICES.keys())
chosen = {name: case for name, case in CHOICES.items() if case[2] is not None}
ours = pytest.mark.parametrize("make, space, expected", chosen.values(), ids=chosen.keys())


@pytest.fixture(autouse=True)
def many(monkeypatch):
    monkeypatch.setattr(kernels, "MANY", 128)


@pytest.fixture
def used(monkeypatch):
    """What calls have chosen."""
    seen = []
    plain = kernels.choose
    monkeypatch.setattr(kernels, "choose", lambda module, x: seen.append(plain(module, x)) or seen[-1])
    return seen


def net(make, space):
    torch.manual_seed(0)
    conv = make()
    first = nn.Conv2d(2, conv.in_channels, 3, padding=1, stride=(1, 1))
    features = conv(torch.zeros(1, conv.in_channels, *space)).numel()
    parts = OrderedDict(first=first, tanh=nn.Tanh(), conv=conv, flat=nn.Flatten(), head=nn.Linear(features, 3))
    return nn.Sequential(parts), torch.randn(5, 2, *space)


def settled(model, x, rule="dfa", **options):
    rewire.convert(model, rule, **options)
    for _ in range(2):
        step(model, x)
    return model


def step(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y


@every
def test_values(make, space, expected, used):
    against_loops(make, space)
    assert used[-1] is expected


def against_loops(make, space):
    model, x = net(make, space)
    settled(model, x)
    y = step(model, x)
    network = networks.Network(
        (name, layers.describe(m) if hasattr(m, "weight") else getattr(networks, type(m).__name__)())
        for name, m in model.named_children()
    )
    weights = {name: p.astype(float) for name, p in parameters(model).items()}
    B = {name: b.astype(float) for name, b in used_feedback(model).items() if name != "first"}
    reference = network.run(x.double().numpy(), weights, networks.sum_of_squares, None, "dfa", B)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.double(), torch.from_numpy(reference.grads[name]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.double(), torch.from_numpy(reference.y), rtol=1e-4, atol=1e-4)


@ours
def test_second_derivatives(make, space, expected):
    model, _ = net(make, space)
    conv = model.conv.double()
    x = torch.randn(2, conv.in_channels, *space, dtype=torch.float64)
    delta = torch.randn_like(conv(x)).requires_grad_()
    how = conv.weight.shape, conv.stride, conv.padding
    assert torch.autograd.gradcheck(lambda d: expected(d, x, *how), delta)
    gradients = torch.autograd.grad(conv(x), conv.weight, delta)
    torch.testing.assert_close(expected(delta, x, *how), gradients[0])


@ours
@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_frozen_parameters(make, space, expected, frozen, used):
    model, x = net(make, space)
    settled(model, x)
    whole = copy.deepcopy(model)
    for name, p in model.conv.named_parameters():
        p.requires_grad_(frozen not in (name, "both"))
    used.clear()
    step(model, x), step(whole, x)
    assert expected in used
    for (name, p), q in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert (p.grad is None) == (not p.requires_grad)
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q[1].grad, msg=name)


@ours
def test_with_what_else_there_is(make, space, expected, used, tmp_path):
    """Copies, pickles, channels_last, other dtypes, autocast, recomputed activations, a sample by itself."""
    model, x = net(make, space)
    settled(model, x)
    gradient = model.conv.weight.grad.clone()
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        step(same, x)
        assert used[-1] is expected
        torch.testing.assert_close(same.conv.weight.grad, gradient)
    recomputed = copy.deepcopy(model)
    recomputed.zero_grad()
    body, head = recomputed[:4], recomputed[4:]
    head(checkpoint(body, x, use_reentrant=False)).square().sum().backward()
    torch.testing.assert_close(recomputed.conv.weight.grad, gradient)
    with torch.autocast("cpu", torch.bfloat16):
        step(copy.deepcopy(model), x)
    assert used[-1] is None
    step(copy.deepcopy(model).double(), x.double())
    assert used[-1] is None
    last = copy.deepcopy(model)
    step(last, x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last.conv.weight.grad, gradient)


class Recomputed(nn.Sequential):
    """Runs all below its head again in the backward, if told so. The last thing that is run saves what it made."""

    again = False

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False) if self.again else self.body(x))

    def body(self, x):
        for module in [*self][:-1]:
            x = module(x)
        return x.tanh()


def twins(rule):
    """One of them runs its layers again."""
    model, x = net(*CHOICES["pixels, large map"][:2])
    plain, recomputed = (Recomputed(OrderedDict(copy.deepcopy(model).named_children())) for _ in range(2))
    recomputed.again = True
    return rewire.convert(plain, rule), rewire.convert(recomputed, rule), x


@pytest.mark.parametrize(
    "rule", ["fitted", "grape", "dkp", "anchored(rule=dfa, every=3)", "switch(first=bp, then=dfa, at=2)"]
)
def test_run_again_under_rules_that_count_passes(rule, used):
    """The output error is there by then, so a pass is over; and in some passes feedback that learns gets its place."""
    plain, recomputed, x = twins(rule)
    for _ in range(6):
        step(plain, x), step(recomputed, x)
        for p, q in zip(plain.parameters(), recomputed.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    assert by_sample in used


@pytest.mark.parametrize("before", [True, False])
def test_what_is_saved_does_not_depend_on_the_way_through_a_call(before, monkeypatch):
    plain, recomputed, x = twins("dfa")
    for _ in range(3):
        step(plain, x), step(recomputed, x)
    wiring = states_of(recomputed.conv)[0].wiring
    monkeypatch.setattr(type(wiring), "settle", lambda self: None)  # as on one rank alone
    wiring.unsettled = before
    recomputed.zero_grad()
    y = recomputed(x)
    wiring.unsettled = not before
    y.square().sum().backward()
    torch.testing.assert_close(recomputed.conv.weight.grad, plain.conv.weight.grad)


def test_an_input_changed_before_the_backward():
    model, x = net(*CHOICES["pixels, large map"][:2])
    settled(model, x)
    h = model[:2](x)
    y = model[2:](h)
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("rule, cut", [("dfa", True), ("sdfa", True), ("fa", False), ("bp", False)])
def test_only_where_the_input_needs_no_gradient(rule, cut, used):
    model, x = net(*CHOICES["pixels, large map"][:2])
    settled(model, x, rule)
    used.clear()
    step(model, x)
    assert (by_sample in used) == cut


def test_a_forward_of_its_own_is_kept(used):
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    model, x = net(lambda: Standardised(4, 6, 1), (5, 7))
    settled(model, x)
    step(model, x)
    assert kernels.forward_for(Standardised) is None
    torch.testing.assert_close(model.conv.weight.grad.sum(), torch.tensor(0.0), atol=1e-4, rtol=0)


class Counted(nn.Module):
    calls = 0

    def forward(self, weight):
        self.calls += 1
        return 2 * weight


@pytest.mark.parametrize("after", [False, True])
def test_a_parametrized_weight_is_made_once(after, used):
    model, x = net(*CHOICES["pixels, large map"][:2])
    made = Counted()
    if not after:
        nn.utils.parametrize.register_parametrization(model.conv, "weight", made)
    settled(model, x)
    if after:
        nn.utils.parametrize.register_parametrization(model.conv, "weight", made)
    made.calls = 0
    step(model, x)
    assert made.calls == 1 and used[-1] is by_sample
    twin = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernels, "choose", lambda module, x: None)
        step(twin, x)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@ours
def test_breaking_it_is_found(make, space, expected, monkeypatch):
    def wrong(delta, x, shape, stride, padding):
        return 1.01 * expected(delta, x, shape, stride, padding)

    plain = kernels.choose
    monkeypatch.setattr(kernels, "choose", lambda module, x: wrong if plain(module, x) is expected else None)
    with pytest.raises(AssertionError):
        against_loops(make, space)


@pytest.mark.parametrize("scale", ["auto", 0.3])
def test_an_input_that_comes_to_need_a_gradient(scale):
    """Thawed layers below, or a generator in front of a discriminator: what is fed back has to arrive there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 6, 1), nn.Tanh(), nn.Flatten(), nn.Linear(96, 3))
    model = rewire.convert(model, "dfa", scale=scale)
    x, y = torch.randn(4, 3, 4, 4), torch.tensor([0, 1, 2, 1])
    model[0].requires_grad_(False)
    for _ in range(3):
        nn.functional.cross_entropy(model(x), y).backward()
    model.requires_grad_(True)
    for _ in range(3):
        model.zero_grad()
        h = torch.tanh(model[0](x)).detach()
        nn.functional.cross_entropy(model(x), y).backward()
    e, B = rewire.output_error(model), rewire.feedback(model)["2"]
    fed = torch.einsum("nk,k...->n...", e, B.reshape(3, 4, 4, 4)) * (1 - h**2)
    torch.testing.assert_close(
        model[0].weight.grad[:, :, 0, 0], torch.einsum("nohw,nihw->oi", fed, x), rtol=1e-4, atol=1e-6
    )
    x.requires_grad_()
    for _ in range(3):
        nn.functional.cross_entropy(model(x), y).backward()
    assert x.grad is not None and x.grad.any()


def test_transforms_of_a_settled_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Tanh(), nn.Flatten(), nn.Linear(96, 3))
    model = rewire.convert(model, "dfa", scale=0.3)
    x, y = torch.randn(4, 3, 4, 4), torch.tensor([0, 1, 2, 1])
    for _ in range(3):
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
    params = dict(model.named_parameters())
    found = torch.func.grad(lambda p: nn.functional.cross_entropy(torch.func.functional_call(model, p, (x,)), y))(
        params
    )
    for name, p in params.items():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)
