"""``rewire inspect``: what conversion does to a model, before anything is trained."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

import rewire
from rewire.ablation.inputs import positive
from rewire.cli.options import setting
from rewire.cli.words import pairs, words
from rewire.diagnose.arithmetic import Arithmetic, arithmetic
from rewire.errors import ConversionError, InputError
from rewire.preview import call
from rewire.specs import Example, resolve
from rewire.structures import NAMES
from rewire.summary import Summary, summary


@click.command(epilog="Example: rewire inspect torchvision:resnet18 --rule dfa --layers 'conv1=bp' --feedback channel")
@click.argument("spec")
@click.option("--rule", default="dfa", show_default=True, help="For all layers that --layers does not name.")
@click.option(
    "--layers", multiple=True, metavar="PATTERN=RULE", help="Rules by layer name; may be repeated, later wins."
)
@click.option("--output", multiple=True, metavar="NAME", help="The output layer (or layers).  [default: found]")
@click.option(
    "--feedback",
    default="dense",
    show_default=True,
    help=f"Of direct rules: {' or '.join(NAMES)}; with options, 'lowrank(rank=8)'.",
)
@click.option("--blocks", multiple=True, metavar="PATTERN", help="Modules fed back as one unit.")
@click.option("--skip", default="keep", show_default=True, help="keep or cut.")
@click.option("--scale", default="auto", show_default=True, help="auto or a number.")
@click.option("--batch", type=int, default=2, show_default=True, help="Samples in the random batch.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights, inputs and feedback.")
@click.option("--verify", "check", is_flag=True, help="Prove on the batch that each layer's rule is live.")
def inspect(
    spec: str,
    rule: str,
    layers: Sequence[str],
    output: Sequence[str],
    feedback: str,
    blocks: Sequence[str],
    skip: str,
    scale: str,
    batch: int,
    seed: int,
    check: bool,
) -> int:
    """Show what a rule does to a model: layers, feedback and its memory, what stays on backprop and why, arithmetic.

    SPEC is torchvision:NAME, timm:NAME, hf:MODEL_TYPE (bert, vit, ...: its configuration made tiny), hf:PATH of a
    configuration, or package.module:function, which returns a model or (model, inputs). Weights and inputs are
    random; nothing is downloaded. With --verify, exit code 1 says that some layer's rule is not what happened.
    """
    positive("batch", batch)
    positive("seed", seed, zero=True)
    chosen = _by_pattern(layers)
    example = _example(spec, batch, seed)
    screen = Console() if Console().is_terminal or "COLUMNS" in os.environ else Console(width=140)
    plain = copy.deepcopy(example.model)
    try:
        rewire.convert(
            example.model,
            rule,
            layers=chosen,
            output=words(output) or None,
            feedback=feedback,
            blocks=words(blocks) or None,
            skip=skip,
            scale=setting(scale),
            seed=seed,
        )
    except ConversionError as error:
        raise InputError(str(error)) from error
    if too_large := _too_large(example):
        screen.print(too_large[0])
        screen.print(f"Not run: {too_large[1]}", highlight=False, markup=False)
        return 1 if check else 0
    _settle(example)
    ours = arithmetic(*example)
    screen.print(summary(example.model))
    screen.print(_compared(rule if not chosen else f"{rule}, ...", ours, arithmetic(plain, *example[1:])))
    if not check:
        return 0
    proof = rewire.verify(*example)
    screen.print(proof)
    return 0 if proof.ok else 1


def _by_pattern(layers: Sequence[str]) -> dict[str | type[nn.Module], str | rewire.Rule] | None:
    return {pattern: rule for pattern, rule in pairs("--layers", "layer1.*=fa", layers).items()} or None


def _example(spec: str, batch: int, seed: int) -> Example:
    example = resolve(spec).build(batch, seed)
    if example.inputs is None:
        raise InputError(f"{spec} returned (model, None): return the model alone, or (model, inputs)")
    return example


def _too_large(example: Example) -> tuple[Summary, str] | None:
    """What feedback would cost, and why it is not made, if it would take more than half of the memory free."""
    try:
        expected = summary(example.model, example.inputs)
    except Exception:  # some models cannot run in eval mode on what they train on; the run itself says why
        return None
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
    if expected.feedback_bytes <= free / 2:
        return None
    return expected, (
        f"feedback would need {expected.feedback_bytes / 1e9:.1f} GB of {free / 1e9:.1f} GB free. "
        "--feedback channel needs one value per channel; --blocks feeds fewer places"
    )


def _settle(example: Example) -> None:
    """The passes in which output layers are found and scales are measured."""
    for _ in range(2):
        example.loss_fn(call(example.model, example.inputs)).backward()  # type: ignore[no-untyped-call]
        rewire.scales(example.model)  # takes in what the pass has shown
    example.model.zero_grad()


def _compared(name: str, ours: Arithmetic, plain: Arithmetic) -> Table:
    size, unit = next((u for u in _UNITS if plain.step >= u[0]), _UNITS[-1])
    table = Table(title=f"arithmetic of a training step, {unit}")
    for column in ("", "forward", "backward", "step"):
        table.add_column(column, justify="right" if column else "left")
    rows = [(a.forward, a.backward, a.step) for a in (plain, ours)]
    for label, row in zip(("backprop", name), rows, strict=True):
        table.add_row(Text(label), *(f"{flops / size:.4g}" for flops in row))
    table.add_section()
    table.add_row("ratio", *(f"{b / a:.3f}" if a else "-" for a, b in zip(*rows, strict=True)))
    return table


_UNITS = ((1e9, "GFLOP"), (1e6, "MFLOP"), (1, "FLOP"))
