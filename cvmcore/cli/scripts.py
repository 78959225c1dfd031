"""`cvm hw`, and what it shares with `cvm uapi`: scripts, JSON lines in and JSON lines out."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from cvmcore.cli.output import dump, say, say_json, table
from cvmcore.errors import InputError

if TYPE_CHECKING:
    from cvmcore.script import Operation

Listing = Annotated[bool, typer.Option("--json", help="JSON in place of the table; answers are JSON anyway.")]


def hw(
    name: Annotated[str, typer.Argument(metavar="BACKEND", help="Whose hardware.")],
    script: Annotated[
        str | None, typer.Argument(metavar="SCRIPT", help="JSON lines; - is standard input; without: what there is.")
    ] = None,
    as_json: Listing = False,
) -> None:
    """Drive trusted hardware by itself, line by line.

    One operation a line, one answer a line. Without a script: the operations.
    """
    import json

    from cvmcore.hwscript import load_hardware
    from cvmcore.script import play

    operations = load_hardware(name)
    if script is None:
        show_operations(operations, as_json)
        return
    with reading(script) as lines:
        for answer in play(operations, lines, "standard input" if script == "-" else script):
            say_json(json.dumps(answer))


def show_operations(operations: Mapping[str, Operation], as_json: bool) -> None:
    """What there is, with arguments."""
    from cvmcore.script import described

    rows = described(operations)
    if as_json:
        dump({"operations": [{"name": name, "arguments": takes, "help": does} for name, takes, does in rows]})
    else:
        say(table(("operation", "arguments", "what it does"), rows))


def reading(path: str) -> AbstractContextManager[Iterable[str]]:
    """A text file, or standard input."""
    if path == "-":
        return nullcontext(sys.stdin)
    try:
        return open(path, encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
