"""The ``rewire`` command. Errors are one line on stderr; exit code 2 says the request was wrong.

One file per command.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import click

import rewire
from rewire.cli.ablate import ablate
from rewire.cli.inspect import inspect
from rewire.cli.report import report
from rewire.cli.train import train
from rewire.errors import InputError


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed while running, 2 wrong request, 130 interrupted."""
    _replace_what_cannot_be_written()
    try:
        code = _rewire.main(args=args, prog_name="rewire", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        message = error.format_message()
        if "unexpected extra argument" in message:
            message += " (several names go in quotes: --rules 'bp fa dfa')"
        _fail(message, 2)
    except InputError as error:
        _fail(str(error), 2)
    except rewire.RewireError as error:
        _fail(str(error), 1)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)


def _replace_what_cannot_be_written() -> None:
    """A stream without Γ or ± gets a ? in its place: results are not lost for a character."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _fail(message: str, code: int) -> None:
    print(f"rewire: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: rewire ablate --model mlp --rules 'bp fa dfa'",
)
@click.version_option(rewire.__version__, message="rewire %(version)s")
@click.pass_context
def _rewire(context: click.Context) -> None:
    """Change how errors travel backwards through PyTorch models."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


_rewire.add_command(ablate)
_rewire.add_command(inspect)
_rewire.add_command(report)
_rewire.add_command(train)
