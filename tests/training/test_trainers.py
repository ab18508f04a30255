"""Converted models in other people's training loops: each step is what a loop written out here makes of it."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import rewire

from ..plain import SCALE, cross_entropy, error, mlp, randn, rule_gradients, same, states, weights

EXAMPLES = Path(__file__).parents[2] / "examples"
RULES = pytest.mark.parametrize("rule", ["dfa", "fa"])
X = randn(24, 5, seed=1)
Y = torch.arange(24) % 4
BATCHES = list(zip(X.split(4), Y.split(4), strict=True))


class Classifier(nn.Module):
    """A model as ``transformers.Trainer`` wants it: it returns its loss."""

    def __init__(self, rule):
        super().__init__()
        self.net = mlp()
        rewire.convert(self.net, rule, scale=SCALE)

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def by_hand(rule, batches, lr=0.1, clip=None):
    """SGD on the equations; one entry of ``batches`` is a list of micro-batches, averaged."""
    net = rewire.convert(mlp(), rule, scale=SCALE)
    for micro in batches:
        net.zero_grad()
        net(micro[0][0]).sum().backward()  # only to have feedback made
        feedback = rewire.feedback(net)
        total = {}
        for x, y in micro:
            layers = weights(net)
            loss_of = cross_entropy(y)
            e = error(loss_of, states(layers, x)[-1])
            for name, g in rule_gradients(rule, layers, x, e, feedback).items():
                total[name] = total.get(name, 0) + g / len(micro)
        with torch.no_grad():
            norm = torch.cat([total[name].flatten() for name, _ in net.named_parameters()]).norm()
            factor = 1.0 if clip is None else min(1.0, clip / (float(norm) + 1e-6))
            for name, p in net.named_parameters():
                p -= lr * factor * total[name]
    return net


def agree(net, wanted, tol=1e-10):
    for (name, p), q in zip(net.named_parameters(), wanted.parameters(), strict=True):
        same(p, q, name, tol)


def pairs():
    """Two micro-batches to a step."""
    return [BATCHES[i : i + 2] for i in range(0, len(BATCHES), 2)]


# -- loops of one's own ---------------------------------------------------------------------------------------------


@RULES
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_accumulating_over_micro_batches_is_the_whole_batch(rule, parts):
    """Also while scales are being measured: the parts' sizes add up to the whole's."""
    whole, parted = (rewire.convert(mlp(), rule) for _ in range(2))
    for _ in range(3):
        for net, count in ((whole, 1), (parted, parts)):
            net.zero_grad()
            losses = [F.cross_entropy(net(x), y) / count for x, y in zip(X.chunk(count), Y.chunk(count), strict=True)]
            sum(losses).backward()
        for p, q in zip(whole.parameters(), parted.parameters(), strict=True):
            same(p.grad, q.grad)
    assert rewire.scales(whole) == pytest.approx(rewire.scales(parted), rel=1e-12)


@RULES
def test_one_micro_batch_after_the_other(rule):
    net = rewire.convert(mlp(), rule, scale=SCALE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for micro in pairs():
        optimizer.zero_grad()
        for x, y in micro:
            (F.cross_entropy(net(x), y) / 2).backward()
        optimizer.step()
    agree(net, by_hand(rule, pairs()))


@RULES
def test_clipping_sees_the_rule_s_gradients(rule):
    net = rewire.convert(mlp(), rule, scale=SCALE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for x, y in BATCHES:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        optimizer.step()
    agree(net, by_hand(rule, [[b] for b in BATCHES], clip=0.05))


@RULES
def test_schedulers_step_as_they_do(rule):
    net = rewire.convert(mlp(), rule, scale=SCALE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    before = [p.detach().clone() for p in net.parameters()]
    for x, y in BATCHES[:3]:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        lr, grads = optimizer.param_groups[0]["lr"], [p.grad.clone() for p in net.parameters()]
        optimizer.step()
        scheduler.step()
        before = [p - lr * g for p, g in zip(before, grads, strict=True)]
    assert optimizer.param_groups[0]["lr"] == 0.025
    for p, q in zip(net.parameters(), before, strict=True):
        same(p, q)


@RULES
def test_bfloat16_autocast(rule):
    """As near to float64 as bfloat16 is; feedback is the same, rounded."""
    exact, low = mlp(), mlp().float()
    for net in (exact, low):
        rewire.convert(net, rule, scale=SCALE)
    for _ in range(2):
        exact.zero_grad(), low.zero_grad()
        F.cross_entropy(exact(X), Y).backward()
        with torch.autocast("cpu", torch.bfloat16):
            out = low(X.float())
            assert out.dtype is torch.bfloat16
            loss = F.cross_entropy(out, Y)
        loss.backward()
    for p, q in zip(exact.parameters(), low.parameters(), strict=True):
        assert q.grad.dtype is torch.float32
        assert (p.grad - q.grad).norm() <= 0.03 * p.grad.norm()
    for name, B in rewire.feedback(exact).items():
        same(B, rewire.feedback(low)[name].double(), name, 0.01)


@RULES
def test_an_average_of_the_weights(rule):
    net = rewire.convert(mlp(), rule, scale=SCALE)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    wanted = [p.detach().clone() for p in net.parameters()]
    for i, (x, y) in enumerate(BATCHES):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        average.update_parameters(net)
        new = [p.detach() for p in net.parameters()]
        wanted = [0.9 * a + 0.1 * p if i else p.clone() for a, p in zip(wanted, new, strict=True)]
    for p, q in zip(average.module.parameters(), wanted, strict=True):
        same(p, q)
    plain = mlp()
    plain.load_state_dict(average.module.state_dict())
    assert torch.equal(average(X), plain(X))
    # The copy is a model of its own: converted and restored without the other.
    rewire.restore(average)
    assert type(average.module[0]) is nn.Linear and "Rewired" in type(net[0]).__name__
    rewire.convert(average, "usf")
    F.cross_entropy(average(X), Y).backward()
    assert {row.rule for row in rewire.summary(net).rows} == {rule}
    net.zero_grad()
    F.cross_entropy(net(X), Y).backward()
    layers = weights(net)
    e = error(cross_entropy(Y), states(layers, X)[-1])
    for name, g in rule_gradients(rule, layers, X, e, rewire.feedback(net)).items():
        if name != "x":
            same(net.get_parameter(name).grad, g, name)


@RULES
def test_stopping_early_and_going_back_to_the_best(rule):
    """What early stopping does: keep the best state_dict, load it into the same converted model, go on."""
    net = rewire.convert(mlp(), rule, scale=SCALE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def steps(batches):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

    steps(BATCHES[:2])
    best = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        net(X)  # validation in between
    steps(BATCHES[2:])
    net.load_state_dict(best)
    steps(BATCHES[4:])
    agree(net, by_hand(rule, [[b] for b in (*BATCHES[:2], *BATCHES[4:])]))


# -- trainers -------------------------------------------------------------------------------------------------------


def loader(size=4):
    return DataLoader(TensorDataset(X, Y), batch_size=size)


@RULES
@pytest.mark.parametrize("compiled", [False, True])
def test_transformers_trainer(rule, compiled, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = Classifier(rule)
    if compiled:
        torch._dynamo.reset()
        counters.clear()
        model(X[:4], Y[:4])["loss"].backward()  # as docs/training.md says
        model.zero_grad()
    settings = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.05,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        torch_compile=compiled,
        torch_compile_backend="aot_eager" if compiled else None,
    )

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    InOrder(model, settings, train_dataset=rows).train()
    agree(model.net, by_hand(rule, pairs(), clip=0.05))
    if compiled:
        assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


@RULES
def test_lightning(rule):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = rewire.convert(mlp(), rule, scale=SCALE)
            self.validated = 0

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, _):
            self.validated += 1
            self.log("worse", float(self.validated))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    stop = lightning.pytorch.callbacks.EarlyStopping("worse", patience=1)
    lightning.Trainer(
        max_epochs=9,
        accelerator="cpu",
        precision="64-true",
        accumulate_grad_batches=2,
        gradient_clip_val=0.05,
        callbacks=[stop],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, loader(), loader(24))
    assert stop.stopped_epoch == 1  # two epochs: the second was no better
    agree(module.net, by_hand(rule, [*pairs(), *pairs()], clip=0.05))


@RULES
def test_accelerate(rule):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = rewire.convert(mlp(), rule, scale=SCALE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net, optimizer, batches = accelerator.prepare(net, optimizer, loader())
    for x, y in batches:
        with accelerator.accumulate(net):
            accelerator.backward(F.cross_entropy(net(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
    agree(accelerator.unwrap_model(net), by_hand(rule, pairs(), clip=0.05))


# -- examples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "least"), [("plain", 0.8), ("accelerate", 0.8), ("lightning", 0.8), ("transformers", 0.5)]
)
def test_examples(name, least):
    """Each is at most 40 lines, one of them new, and learns (chance is 0.1; the most frequent count, 0.32)."""
    if name != "plain":
        pytest.importorskip(name)
    path = EXAMPLES / f"train_{name}.py"
    lines = path.read_text().splitlines()
    assert len(lines) <= 40
    assert sum("# new" in line for line in lines) == 1
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(epochs=3) > least
