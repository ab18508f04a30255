"""``alignment`` and ``verify`` on models inside wrappers: the numbers of the model inside."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import rewire
from rewire import ConversionError

torch.manual_seed(0)
X, Y = torch.randn(32, 12), torch.randint(5, (32,))


def loss(out):
    return F.cross_entropy(out, Y)


def trained(rule):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 5))
    model = rewire.convert(net, rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss(model(X)).backward()
        optimizer.step()
    return model


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


def inner_compiled(model):
    model.compile(backend="eager")
    return model


WRAPPERS = {
    "compiled": compiled,
    "compiled in place": inner_compiled,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "both": lambda model: compiled(DistributedDataParallel(model)),
}


@pytest.mark.parametrize("rule", ["fa", "dfa"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_numbers_are_those_of_the_model_inside(rule, wrapper, alone):
    model = trained(rule)
    expected = rewire.alignment(copy.deepcopy(model), X, loss).record()
    wrapped = WRAPPERS[wrapper](model)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    assert rewire.alignment(wrapped, X, loss).record() == expected
    assert list(expected["layers"]) == ["0", "2", "4"]
    assert rewire.verify(wrapped, X, loss).ok
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_other_process_is_waited_for(alone, monkeypatch):
    """Whoever measures on one rank alone must not run into a collective."""
    wrapped = DistributedDataParallel(trained("dfa"))
    monkeypatch.setattr(DistributedDataParallel, "forward", lambda *_: pytest.fail("the wrapper ran"))
    assert rewire.alignment(wrapped, X, loss).gamma is not None


def test_a_model_that_cannot_be_copied_is_one_clear_error(alone):
    from torch.distributed.fsdp import fully_shard

    model = trained("dfa")
    fully_shard(model)
    with pytest.raises(ConversionError, match=r"works on a copy, and FSDPSequential cannot be copied: .*deepcopy"):
        rewire.alignment(model, X, loss)


@pytest.mark.parametrize("rule", ["fitted(every=2)", "dkp"])
def test_learned_feedback_is_that_of_the_next_step(rule):
    """What the last pass has shown counts, whether or not a checkpoint was taken in between."""
    measured = rewire.alignment(trained(rule), X, loss).record()
    saved = trained(rule)
    saved.state_dict()
    assert rewire.alignment(saved, X, loss).record() == measured
