"""One of two processes: runs every case and saves what it found. ``python -m tests.distributed.worker RANK FOLDER``."""

import hashlib
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rewire

from . import cases
from .cases import RULES, STEPS, STRUCTURED, build, half, loss_of, optimizer_of, state_of, train

CASES = {}


def case(name, *values):
    def register(function):
        for value in values or (None,):
            CASES[name if value is None else f"{name}, {value}"] = (function, () if value is None else (value,))
        return function

    return register


def halves(rank, steps=STEPS, first=0):
    return [half(step, rank) for step in range(first, first + steps)]


def shard(model):
    for block in model[:-1]:
        fully_shard(block)
    return fully_shard(model)


def parallel(model, how):
    return DistributedDataParallel(model) if how == "ddp" else shard(model)


def digests(model):
    return {
        name: hashlib.sha256(B.contiguous().numpy().tobytes()).hexdigest() for name, B in rewire.feedback(model).items()
    }


def after(model, x):
    """What a forward more takes in, as a rank alone cannot."""
    model(x)
    return rewire.scales(getattr(model, "module", model))


@case("ddp", *RULES, *STRUCTURED)
def ddp(rank, rule):
    model = rewire.convert(build(), rule)
    run = DistributedDataParallel(model)
    train(model, halves(rank), run=run)
    found = state_of(model)
    scales = after(run, half(0, rank)[0])
    return found, scales, digests(model)


@case("fsdp", *RULES, *STRUCTURED)
def fsdp(rank, rule):
    model = shard(rewire.convert(build(), rule))
    train(model, halves(rank))
    found = state_of(model)
    return found, after(model, half(0, rank)[0]), digests(model) if rule == "dfa" else {}


@case("converted last", "ddp", "fsdp")
def converted_last(rank, how):
    model = build()
    run = parallel(model, how)
    rewire.convert(model, "dfa")
    train(model, halves(rank), run=run)
    return state_of(model), after(run, half(0, rank)[0])


@case("no_sync", "dfa", "fa")
def no_sync(rank, rule):
    """Two micro-batches to a step, gradients exchanged after the second."""
    model = rewire.convert(build(), rule)
    run = DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    for step in range(0, 2 * STEPS, 2):
        optimizer.zero_grad()
        with run.no_sync():
            loss_of(run, *half(step, rank)).backward()
        loss_of(run, *half(step + 1, rank)).backward()
        optimizer.step()
    return state_of(model)


@case("join", "dfa", "fa")
def join(rank, rule):
    """Rank 0 has a step more than rank 1."""
    model = rewire.convert(build(), rule)
    run = DistributedDataParallel(model)
    with Join([run]):
        train(model, halves(rank, STEPS if rank == 0 else STEPS - 1), run=run)
    return state_of(model)


@case("fewer samples", "dfa", "fa")
def fewer(rank, rule):
    """Of the last batch rank 0 has three samples, rank 1 one."""
    model = rewire.convert(build(), rule)
    run = DistributedDataParallel(model)
    x, labels = cases.batch(STEPS, 4)
    part = slice(0, 3) if rank == 0 else slice(3, 4)
    train(model, [*halves(rank), (x[part], labels[part])], run=run)
    return state_of(model)


@case("compiled ddp", "dfa", "fa")
def compiled(rank, rule):
    model = rewire.convert(cases.Net(build()), rule)
    run = DistributedDataParallel(model)
    optimizer = train(model, halves(rank, 1), run=run)
    torch._dynamo.reset()
    train(model, halves(rank, STEPS - 1, first=1), optimizer, run=torch.compile(run, backend="aot_eager"))
    return state_of(model)


@case("compiled in buckets", True, False)
def buckets(rank, cut):
    """PyTorch cuts the graph of a compiled DistributedDataParallel that has several buckets."""
    torch.manual_seed(0)
    model = rewire.convert(
        cases.Net(nn.Sequential(*[cases.Block(300, 300) for _ in range(3)])).double(), "dfa", scale=0.1
    )
    run = DistributedDataParallel(model, bucket_cap_mb=1)
    x, labels = torch.randn(2, 300, dtype=torch.float64), torch.arange(2)
    for _ in range(2):
        loss_of(run, x, labels).backward()
    model.zero_grad()
    loss_of(run, x, labels).backward()
    wanted = model.body[0].linear.weight.grad.clone()
    model.zero_grad()
    torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch(optimize_ddp=cut):
            loss_of(torch.compile(run, backend="aot_eager"), x, labels).backward()
    except Exception as problem:
        return str(problem)
    return float((model.body[0].linear.weight.grad - wanted).abs().max())


class Sometimes(nn.Module):
    """A layer that runs in some passes only, drawn by each rank for itself."""

    def __init__(self):
        super().__init__()
        self.body, self.middle = build(), nn.Linear(6, 6).double()
        with torch.no_grad():
            self.middle.weight.copy_(torch.eye(6) / 2)
            self.middle.bias.zero_()
        self.runs = iter(())

    def forward(self, x):
        for i, module in enumerate(self.body):
            x = module(x)
            if i == 1 and next(self.runs):
                x = self.middle(x)
        return x


@case("not on every rank")
def sometimes(rank):
    model = rewire.convert(Sometimes(), "dfa")
    run = DistributedDataParallel(model, find_unused_parameters=True)
    # First on one rank only, and later on the other: ranks must not wait for each other's measurements.
    model.runs = iter([rank == 0, rank == 1, True, True])
    train(model, halves(rank), run=run)
    return state_of(model), after(run, half(0, rank)[0])


@case("never at first")
def never_at_first(rank):
    model = rewire.convert(Sometimes(), "dfa")
    run = DistributedDataParallel(model, find_unused_parameters=True)
    model.runs = iter([False, rank == 0, rank == 1, True])
    train(model, halves(rank), run=run)
    return state_of(model), after(run, half(0, rank)[0])


@case("a rank looks by itself")
def alone(rank):
    """Rank 0 runs a forward of its own between the measuring pass and the next."""
    model = rewire.convert(build(), "dfa")
    run = DistributedDataParallel(model)
    optimizer = train(model, halves(rank, 1), run=run)
    if rank == 0:
        model(half(0, rank)[0])
        rewire.summary(model), rewire.scales(model)
    train(model, halves(rank, STEPS - 1, first=1), optimizer, run=run)
    return state_of(model)


@case("by hand")
def by_hand(rank):
    """Gradients averaged by hand: nothing tells that the ranks belong together."""
    import warnings

    model = rewire.convert(build(), "dfa")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(model, halves(rank))
    return [str(w.message) for w in said]


@case("checkpoint")
def checkpoint(rank):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = shard(rewire.convert(build(), "dfa"))
    optimizer = train(model, halves(rank))
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=f"{FOLDER}/checkpoint")
    scales = after(model, half(0, rank)[0])
    train(model, halves(rank, 2, first=STEPS), optimizer)
    return state_of(model), scales


def stages(model, group=None, numbers=(0, 1)):
    """Two stages of two layers each, for micro-batches of four."""
    from torch.distributed.pipelining import PipelineStage

    x, _ = cases.batch(0)
    halfway, out = (torch.zeros(4, n, dtype=torch.float64, requires_grad=True) for n in (cases.WIDTHS[2], 4))
    parts = (model[:2], x[:4], halfway), (model[2:], halfway, out)
    return [
        PipelineStage(part, i, 2, torch.device("cpu"), input_args=(ins,), output_args=(outs,), group=group)
        for i, (part, ins, outs) in enumerate(parts)
        if i in numbers
    ]


@case("pipeline", "bp", *cases.LOCAL)
def pipeline(rank, rule):
    from torch.distributed.pipelining import ScheduleGPipe

    model = rewire.convert(build(), rule)
    (stage,) = stages(model, numbers=(rank,))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=nn.functional.cross_entropy)
    x, labels = cases.batch(0)
    for _ in range(2):
        model.zero_grad()
        schedule.step(x) if rank == 0 else schedule.step(target=labels, losses=[])
    return state_of(stage.submod)


@case("pipeline without e", "new", "trained")
def pipeline_without_e(rank, when):
    """Both stages on one rank, so that the other one waits for nobody."""
    from torch.distributed.pipelining import ScheduleInterleaved1F1B

    group = [dist.new_group([r]) for r in (0, 1)][rank]
    model = rewire.convert(build(), "dfa", scale=0.3)
    x, labels = cases.batch(0)
    if when == "trained":
        train(model, [(x, labels)] * 2)
    schedule = ScheduleInterleaved1F1B(stages(model, group), n_microbatches=2, loss_fn=nn.functional.cross_entropy)
    try:
        schedule.step(x, target=labels, losses=[])
    except Exception as problem:
        return str(problem) + str(problem.__cause__ or "")
    return "nothing was said"


@case("tensor parallel", "fa", "dfa")
def tensor_parallel(rank, rule):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = rewire.convert(build(), rule, scale=0.3)
    plain = rewire.convert(build(), rule, scale=0.3, layers={"[01].*": "bp"})
    mesh = init_device_mesh("cpu", (2,))
    for m in (model, plain):
        parallelize_module(m, mesh, {"0.linear": ColwiseParallel(), "1.linear": RowwiseParallel()})
    for _ in range(2):
        plain.zero_grad()
        loss_of(plain, *cases.batch(0)).backward()
    try:
        loss_of(model, *cases.batch(0)).backward()
    except rewire.PassError as problem:
        return str(problem), state_of(plain)
    return "nothing was said", state_of(plain)


def main():
    global FOLDER
    rank, FOLDER = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{FOLDER}/store", rank=rank, world_size=2, timeout=timedelta(seconds=300)
    )
    found = {}
    for name, (function, args) in CASES.items():
        try:
            found[name] = function(rank, *args)
        except Exception:
            print(f"rank {rank}, {name}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            raise
    torch.save(found, f"{FOLDER}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
