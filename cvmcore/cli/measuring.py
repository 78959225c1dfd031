"""`cvm bench`: what the model itself costs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from cvmcore.cli.arguments import AsJson, parse_backends
from cvmcore.cli.output import WRONG, complain, dump, say, table


def bench(
    rows: Annotated[list[str] | None, typer.Argument(metavar="ROW", help="Some rows only, as random_ns.")] = None,
    backends: Annotated[
        str | None, typer.Option("--backends", metavar="A,B,C", help="Which, in this order; else all installed ones.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller guests, fewer rounds.")] = False,
    check: Annotated[
        Path | None, typer.Option("--check", metavar="FILE", help="Compare with recorded ratios; 1: got slower.")
    ] = None,
    record: Annotated[Path | None, typer.Option("--record", metavar="FILE", help="Record the ratios there.")] = None,
    as_json: AsJson = False,
) -> int:
    """Measure what the model itself costs.

    A fault, a page, a guest: beside the least that numpy could pay here. docs/bench.md has the rows.
    """
    from cvmcore import bench as bench_
    from cvmcore.backend import GROUP
    from cvmcore.outfile import OutFile
    from cvmcore.plugins import installed
    from cvmcore.progress import Bar

    size = bench_.QUICK if quick else bench_.FULL
    old = bench_.recorded(check, size) if check is not None else {}
    names = list(installed(GROUP)) if backends is None else parse_backends(backends)
    with nullcontext() if record is None else OutFile(record) as out:
        with Bar("bench") as bar:
            results = bench_.measure(rows or list(bench_.ROWS), names, size, bar)
            slower = bench_.check(results, old, lambda row, name: bench_.measure([row], [name], size, bar)[0])
        if out is not None:
            bench_.record(out, results, size)
    if as_json:
        dump(bench_.to_json(results, size))
    else:
        titles, cells = bench_.table(results)
        say(table(titles, cells))
    for sentence in slower:
        complain(sentence)
    return WRONG if slower else 0
