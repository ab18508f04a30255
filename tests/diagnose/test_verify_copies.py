"""What ``verify`` has to get right about models that it copies and layers that come and go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rewire


class Dropped(nn.Module):
    """Layers that are skipped at random, as LayerDrop does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.middle = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for layer in self.middle:
            if not self.training or torch.rand(()) < 0.3:
                h = torch.tanh(layer(h))
        y: Tensor = self.head(h)
        return y


def loss(y: Tensor) -> Tensor:
    return (y - 1).square().mean()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("trained", [0, 1, 3])
@pytest.mark.filterwarnings("ignore::rewire.RewireWarning")
def test_a_layer_that_runs_for_the_first_time_while_watched_is_not_called_wrong(seed: int, trained: int) -> None:
    torch.manual_seed(seed)
    model, x = rewire.convert(Dropped(), "dfa"), torch.randn(5, 4)
    for _ in range(trained):
        loss(model(x)).backward()

    proof = rewire.verify(model, x, loss)

    assert proof.ok, str(proof)
    assert {layer.status for layer in proof.layers} <= {"live", "first layer", "not run"}


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_verify_leaves_parametrized_layers_of_the_model_alone(rule: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 2)
    )
    rewire.convert(model, rule)
    x = torch.randn(5, 4)
    before = model(x).detach()

    assert rewire.verify(model, x, loss).ok

    assert torch.equal(model(x).detach(), before)
    assert nn.utils.parametrize.is_parametrized(model[2], "weight")
    rewire.restore(model)
    assert torch.equal(model(x).detach(), before)


class Keeps(nn.Module):
    """Keeps a tensor of its last forward, with its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 2)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = torch.tanh(self.a(x))
        y: Tensor = self.b(self.last)
        return y


def test_a_model_that_keeps_tensors_of_its_last_forward_can_be_verified() -> None:
    torch.manual_seed(0)
    model, x = rewire.convert(Keeps(), "dfa"), torch.randn(5, 4)
    loss(model(x)).backward()
    kept = model.last

    assert rewire.verify(model, x, loss).ok
    assert model.last is kept


class Key(nn.Module):
    """Attention does not feel its key's bias: that gradient is zero but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inward(x)
        attention = (self.query(h) @ self.key(h).transpose(1, 2)).softmax(-1)
        y: Tensor = self.head(attention @ self.value(h))
        return y


@pytest.mark.parametrize("seed", range(5))
def test_a_gradient_that_cancels_to_rounding_is_exact(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = rewire.convert(Key(), "fa"), torch.randn(3, 11, 8)
    proof = rewire.verify(model, x, loss)
    assert proof.ok, str(proof)


@pytest.mark.filterwarnings("ignore::rewire.RewireWarning")
def test_below_a_head_of_zeros_feedback_is_as_large_as_below_an_initialised_one() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(5, 4)
    nn.init.zeros_(model[4].weight)
    rewire.convert(model, "dfa")

    proof = rewire.verify(model, x, loss)
    assert [layer.status for layer in proof.layers] == ["first layer", "live", "live"], str(proof)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss(model(x)).backward()
        optimizer.step()
    assert rewire.scales(model) == pytest.approx({"2": 18**-0.5, "4": 18**-0.5})
    rows = {row.name: row.note for row in rewire.summary(model).rows}
    assert "backprop handed back zero" in rows["2"]
