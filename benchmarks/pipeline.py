"""Pipeline-parallel training on paper: what each schedule of a step costs, with backprop and with a direct rule.

    python benchmarks/pipeline.py
    python benchmarks/pipeline.py --stages 8 --microbatches 8 16 32 --steps 4 --draw

A model is cut into P stages, each on a device of its own, and a batch into M microbatches. For one microbatch a stage
does three pieces of work of about the same arithmetic:

    F  forward                    1 unit
    X  gradient of its input      1 unit; a direct rule has none
    W  gradient of its weights    1 unit

F of a stage waits for F of the stage before. Under backprop X waits for X of the stage after; under a direct rule W
waits for e alone, which is there once the last stage has done its F. Weights change between steps, at each stage when
its own last W of the step is done, and its next F waits for that: so every schedule computes the same gradients as no
pipeline at all.

Schedules:
    gpipe    backprop: all F of a step, then all X and W              Huang et al. 2019, 1811.06965
    1f1b     backprop: backwards as early as they can be               Narayanan et al. 2021, 2006.09503 (flushed)
    split    as 1f1b, and W put off to when there is nothing else      after Qi et al. 2024, 2401.10241
    direct   a direct rule: F first, until P microbatches wait for their W

A step's time is the time between the ends of one step and the next, once they repeat; its bubble is the share of that
in which the devices wait. Communication is free unless --delay says otherwise.
"""

from __future__ import annotations

import argparse
import heapq
from dataclasses import dataclass, replace

SCHEDULES = ("gpipe", "1f1b", "split", "direct")


@dataclass(frozen=True, order=True)
class Task:
    """One piece of work: F, X or W (or B, which is X and W in one) of a microbatch at a stage."""

    step: int
    micro: int
    stage: int
    kind: str


@dataclass(frozen=True)
class Pipeline:
    """What is simulated; times in units of one F."""

    schedule: str
    stages: int
    microbatches: int
    steps: int = 1
    forward: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0
    delay: float = 0.0

    def duration(self, kind: str) -> float:
        return {
            "F": self.forward,
            "X": self.input_gradient,
            "W": self.weight_gradient,
            "B": self.input_gradient + self.weight_gradient,
        }[kind]

    @property
    def kinds(self) -> tuple[str, ...]:
        return {"gpipe": ("F", "B"), "1f1b": ("F", "B"), "split": ("F", "X", "W"), "direct": ("F", "W")}[self.schedule]

    @property
    def work(self) -> float:
        """Of one stage in one step."""
        return self.microbatches * sum(map(self.duration, self.kinds))

    def needs(self, task: Task) -> list[Task]:
        """Tasks that have to end before this one; those of other stages ``delay`` earlier."""
        step, micro, stage, last = task.step, task.micro, task.stage, self.stages - 1
        if task.kind == "F":
            return [Task(step, micro, stage - 1, "F")] if stage else []
        if task.kind == "W":
            return [Task(step, micro, last, "F")] if self.schedule == "direct" else [Task(step, micro, stage, "X")]
        return [Task(step, micro, stage + 1, task.kind)] if stage < last else [Task(step, micro, stage, "F")]

    def choose(self, ready: list[Task], stage: int, waiting: int) -> Task | None:
        """What a free stage does next, if anything. ``waiting``: its microbatches between F and their last piece."""
        by_kind = {kind: min((t for t in ready if t.kind == kind), default=None) for kind in self.kinds}
        limit = {"gpipe": self.microbatches, "direct": self.stages}.get(self.schedule, self.stages - stage)
        if waiting >= limit:
            by_kind["F"] = None
        order = "FBW" if self.schedule in ("gpipe", "direct") else "BXFW"
        return next((by_kind[kind] for kind in order if by_kind.get(kind) is not None), None)


def simulate(pipe: Pipeline) -> dict[Task, tuple[float, float]]:
    """Start and end of every task: each stage, whenever it is free, does what its schedule would have it do."""
    at_stage = [
        [
            Task(step, micro, stage, kind)
            for step in range(pipe.steps)
            for micro in range(pipe.microbatches)
            for kind in pipe.kinds
        ]
        for stage in range(pipe.stages)
    ]
    spans: dict[Task, tuple[float, float]] = {}
    free, waiting = [0.0] * pipe.stages, [0] * pipe.stages
    # What makes room for another F. "split" gives up flat memory for less waiting: X is enough there.
    closing = "X" if pipe.schedule == "split" else pipe.kinds[-1]
    moments = [0.0]
    while any(at_stage):
        now = heapq.heappop(moments)
        while moments and moments[0] == now:
            heapq.heappop(moments)
        for stage, tasks in enumerate(at_stage):
            if free[stage] > now or not tasks:
                continue
            step = min(t.step for t in tasks)  # the weights of the next step are not there before
            ready = [t for t in tasks if t.step == step and _ready(pipe, t, spans, now)]
            task = pipe.choose(ready, stage, waiting[stage])
            if task is None:
                continue
            end = now + pipe.duration(task.kind)
            spans[task] = (now, end)
            free[stage] = end
            tasks.remove(task)
            waiting[stage] += (task.kind == "F") - (task.kind == closing)
            for moment in {end, end + pipe.delay}:
                heapq.heappush(moments, moment)
    return spans


def _ready(pipe: Pipeline, task: Task, spans: dict[Task, tuple[float, float]], now: float) -> bool:
    for need in pipe.needs(task):
        if need not in spans or spans[need][1] + (pipe.delay if need.stage != task.stage else 0.0) > now:
            return False
    own = Task(task.step, task.micro, task.stage, "F")
    return task.kind == "F" or (own in spans and spans[own][1] <= now)


@dataclass(frozen=True)
class Outcome:
    """Of one pipeline.

    Attributes:
        first: time of a single step, from its first F to its last piece of work.
        step: time a step adds once steps repeat.
        bubble: share of ``step`` in which devices wait.
        waiting: most microbatches a stage holds between F and its last use of their activations.
    """

    first: float
    step: float
    bubble: float
    waiting: int


def outcome(pipe: Pipeline) -> Outcome:
    """Simulate ``pipe`` for as many steps as it has, at least three."""
    steps = max(pipe.steps, 3)
    spans = simulate(replace(pipe, steps=steps))
    ends = [max(end for task, (_, end) in spans.items() if task.step == step) for step in range(steps)]
    step = ends[-1] - ends[-2]
    return Outcome(ends[0], step, 1 - pipe.work / step, most_waiting(pipe, spans))


def most_waiting(pipe: Pipeline, spans: dict[Task, tuple[float, float]]) -> int:
    """The most microbatches any stage keeps activations of at a time, from the start of F to the end of its W."""
    most = 0
    for stage in range(pipe.stages):
        events: list[tuple[float, int]] = []
        for task, (start, end) in spans.items():
            if task.stage == stage and task.kind == "F":
                events.append((start, 1))
            elif task.stage == stage and task.kind == pipe.kinds[-1]:
                events.append((end, -1))
        held = 0
        for _, change in sorted(events):
            held += change
            most = max(most, held)
    return most


def draw(pipe: Pipeline) -> str:
    """One line a stage, one character a unit of time, microbatches by their last digit; for whole numbers."""
    spans = simulate(pipe)
    length = round(max(end for _, end in spans.values()))
    lines = []
    for stage in range(pipe.stages):
        cells = ["."] * length
        for task, (start, end) in spans.items():
            if task.stage == stage:
                mark = str(task.micro % 10) if task.kind == "F" else chr(ord("a") + task.micro % 26)
                cells[round(start) : round(end)] = [mark] * (round(end) - round(start))
        lines.append(f"  stage {stage}  {''.join(cells)}")
    return "\n".join(lines)


def table(stages: list[int], microbatches: list[int], steps: int, delay: float) -> str:
    """All schedules for all sizes; the speed-up is against 1f1b."""
    lines = [
        "stages  microbatches  schedule  first step  each step  bubble  microbatches held  speed-up = work × bubble",
    ]
    for p in stages:
        for m in microbatches:
            found = {s: outcome(Pipeline(s, p, m, steps, delay=delay)) for s in SCHEDULES}
            reference = found["1f1b"]
            for name, one in found.items():
                work = Pipeline("1f1b", p, m).work / Pipeline(name, p, m).work
                total = reference.step / one.step
                lines.append(
                    f"{p:6}  {m:12}  {name:8}  {one.first:10.1f}  {one.step:9.1f}  {one.bubble:6.1%}  {one.waiting:17}"
                    f"  {total:8.2f} = {work:4.2f} × {total / work:.2f}"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--microbatches", nargs="+", type=int, default=[4, 8, 32])
    parser.add_argument("--steps", type=int, default=4, help="to simulate, at least 3 (default 4)")
    parser.add_argument("--delay", type=float, default=0.0, help="of anything sent between stages, in units of one F")
    parser.add_argument("--draw", action="store_true", help="draw two steps of 4 stages and 4 microbatches")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes only")
    options = parser.parse_args()
    if options.quick:
        options.stages, options.microbatches = options.stages[:1], options.microbatches[:1]
    print(table(options.stages, options.microbatches, options.steps, options.delay))
    if options.draw:
        for schedule in SCHEDULES:
            print(f"\n{schedule}: digits are forwards, letters what follows them, dots waiting")
            print(draw(Pipeline(schedule, 4, 4, steps=2)))


if __name__ == "__main__":
    main()
