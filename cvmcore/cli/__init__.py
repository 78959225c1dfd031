"""The command `cvm`: one module for each group of commands, all of them in the table below.

A command's module is imported when it is used, and what is heavy inside it, so that `cvm --help` answers at once. A
`CvmError` becomes one sentence on standard error and exit code 2; 1 says that a run found something wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cvmcore import __version__
from cvmcore.cli.output import BAD_INPUT, INTERRUPTED, WRONG, complain, forget_output
from cvmcore.errors import CvmError

_CLICK_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
"""Base of all that the command line parser complains about (click's, or typer's own copy of it)."""

COMMANDS = {
    "backends": ("installed", "List the installed backends; imports none of them."),
    "workloads": ("installed", "List the installed workloads, or show one with its options."),
    "hooks": ("installed", "Show the hooks, and which backend implements which."),
    "run": ("running", "Run a workload on one backend."),
    "compare": ("running", "Run a workload on several backends, side by side."),
    "explain": ("explaining", "Show the life of one page in a run."),
    "study": ("studies", "Answer a question about a design with numbers."),
    "launch": ("launching", "Launch a firmware image and print its digest."),
    "hw": ("scripts", "Drive trusted hardware by itself, line by line."),
    "uapi": ("kernels", "Do what a VMM and its guest do, line by line."),
    "diff-fuzz": ("kernels", "Compare the model and /dev/kvm by made-up calls."),
    "record": ("kernels", "Record a real VM, or a program, for `cvm run trace`."),
    "from-strace": ("kernels", "Turn a VMM's calls, recorded by strace, into a script."),
    "calibrate": ("kernels", "Write a profile with this machine's own prices."),
    "check": ("checking", "Run the conformance suite on a backend."),
    "explore": ("exploring", "Run a small race in every interleaving."),
    "new-backend": ("newbackend", "Write an installable plugin to start from."),
    "bench": ("measuring", "Measure what the model itself costs."),
}
"""The module of each command, whose function has its name, and what the list of commands says of it."""


class Commands(TyperGroup):
    """The commands of the table, each imported when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"cvmcore.cli.{COMMANDS[cmd_name][0]}")
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(cmd_name)(getattr(module, cmd_name.replace("-", "_")))
        return typer.main.get_command(alone)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


app = typer.Typer(
    name="cvm",
    cls=Commands,
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
