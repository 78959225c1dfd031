"""`cvm hw`, `cvm uapi`: scripts, JSON lines in and JSON lines out."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from cvmcore.cli.arguments import BackendOptions, Backing, Kernel, Policies, parse_pairs
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
        _show_operations(operations, as_json)
        return
    with _reading(script) as lines:
        for answer in play(operations, lines, "standard input" if script == "-" else script):
            say_json(json.dumps(answer))


def uapi(
    script: Annotated[
        str | None, typer.Argument(metavar="SCRIPT", help="JSON lines; - is standard input; without: what there is.")
    ] = None,
    backend: Annotated[str, typer.Option("--backend", metavar="NAME", help="See `cvm backends`.")] = "default",
    option: BackendOptions = [],  # noqa: B006
    policy: Policies = [],  # noqa: B006
    backing: Backing = "4k",
    kernel: Kernel = "6.18",
    state: Annotated[
        bool, typer.Option("--state", help="Behind each call, what stands in the guest_memfd files.")
    ] = False,
    as_json: Listing = False,
) -> None:
    """Do what a VMM and its guest do, line by line.

    One call a line, one answer a line (docs/live.md). Without a script: the calls.
    """
    import json

    from cvmcore.modelfront import model_front
    from cvmcore.uapiscript import Script

    options, policies = parse_pairs(option, "-o"), parse_pairs(policy, "-p")
    front = model_front(backend, kernel=kernel, backing=backing, options=options, policies=policies)
    play = Script(front)
    if script is None:
        _show_operations(play.operations, as_json)
        return
    with _reading(script) as lines:
        for answer in play.play(lines, "standard input" if script == "-" else script):
            say_json(json.dumps(answer | {"state": play.state()} if state else answer))
    front.close()


def _show_operations(operations: Mapping[str, Operation], as_json: bool) -> None:
    from cvmcore.script import described

    rows = described(operations)
    if as_json:
        dump({"operations": [{"name": name, "arguments": takes, "help": does} for name, takes, does in rows]})
    else:
        say(table(("operation", "arguments", "what it does"), rows))


def _reading(path: str) -> AbstractContextManager[Iterable[str]]:
    """A text file, or standard input."""
    if path == "-":
        return nullcontext(sys.stdin)
    try:
        return open(path, encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
