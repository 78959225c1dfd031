"""The command `cvm`: one module for each group of commands, all of them registered here.

Everything heavy is imported inside the commands, so that `cvm --help` answers at once. A `CvmError` becomes one
sentence on standard error and exit code 2; 1 says that a run found something wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from cvmcore import __version__
from cvmcore.cli.checking import check
from cvmcore.cli.explaining import explain
from cvmcore.cli.installed import backends, hooks, workloads
from cvmcore.cli.kernels import calibrate, diff_fuzz, from_strace, record, uapi
from cvmcore.cli.launching import launch
from cvmcore.cli.measuring import bench
from cvmcore.cli.newbackend import new_backend
from cvmcore.cli.output import BAD_INPUT, INTERRUPTED, WRONG, complain, forget_output
from cvmcore.cli.running import compare, run
from cvmcore.cli.scripts import hw
from cvmcore.cli.studies import study
from cvmcore.errors import CvmError

_CLICK_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
"""Base of all that the command line parser complains about (click's, or typer's own copy of it)."""

app = typer.Typer(
    name="cvm",
    help="cvmcore: how KVM manages the memory of confidential VMs, run as a model on every backend side by side.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="cvm", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except CvmError as error:
        complain(error)
        return BAD_INPUT
    except _CLICK_ERROR as error:
        message = error.format_message()  # type: ignore[attr-defined]
        complain(message.rstrip("."))
        return BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        forget_output()  # whoever read has gone
        return WRONG


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"cvm {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """cvmcore: how KVM manages the memory of confidential VMs, run as a model on every backend side by side."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for command in (
    backends, workloads, hooks, run, compare, study, launch, hw, uapi, diff_fuzz, calibrate, record,
    from_strace, explain, bench, new_backend, check,
):  # fmt: skip
    app.command()(command)
