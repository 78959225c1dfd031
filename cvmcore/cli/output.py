"""What the commands print: tables and JSON on standard output, one sentence on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from cvmcore.errors import CvmError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from cvmcore.backend import Backend
    from cvmcore.study import Study
    from cvmcore.workloads import Workload

WRONG, BAD_INPUT, INTERRUPTED = 1, 2, 130
"""Exit codes."""
PIPED_WIDTH = 140


def complain(what: object) -> None:
    """One sentence on standard error."""
    typer.echo(f"cvm: {' '.join(str(what).split())}", err=True)


def say(what: RenderableType) -> None:
    """Print to standard output. No figure is ever cut: a line may rather be longer than the terminal is wide."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_WIDTH
    least = Measurement.get(console, console.options.update(max_width=10_000), what).minimum
    console.width = max(console.width, least + 1)  # rich counts a table without edges one too short
    with _writing():
        console.print(what)
        sys.stdout.flush()


def say_json(text: str) -> None:
    """Print JSON to standard output."""
    with _writing():
        typer.echo(text)


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        forget_output()
        raise CvmError(f"standard output: cannot be written: {error.strerror or error}") from None


def forget_output() -> None:
    """Nobody can have what is still buffered for standard output; it must not raise once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def dump(value: object) -> None:
    import json

    say_json(json.dumps(value, indent=2))


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, fold: bool = True) -> Table:
    """Plain columns with titles; all but the first are folded where the terminal is narrow, or none."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    rows = list(rows)
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for number, title in enumerate(titles):
        width = max((len(row[number]) for row in rows), default=0)
        made.add_column(title, min_width=width if number == 0 or not fold else None, overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def option_rows(owner: Backend | Workload | Study) -> list[dict[str, Any]]:
    return [
        {"name": o.name, "default": o.default, "choices": list(o.choices), "help": o.help} for o in owner.options
    ]


def described(name: str, summary: str, owner: Backend | Workload) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("option", "default", "values", "meaning"):
        made.add_column(title)
    for option in owner.options:
        values = " | ".join(option.choices) or ("text" if isinstance(option.default, str) else "number")
        made.add_row(option.name, str(option.default), values, option.help)
    return Group(Text(f"{name}: {summary}", style="bold"), made if owner.options else Text("It has no options."))
