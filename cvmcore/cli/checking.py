"""`cvm check`: is a backend right?"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cvmcore.cli.arguments import AsJson, whole
from cvmcore.cli.output import WRONG, complain, dump, say, table
from cvmcore.errors import InputError

if TYPE_CHECKING:
    from cvmcore.testing.conformance import Outcome


SHOWN = 4
"""How many checks that fail alike are named."""


def check(
    name: Annotated[str, typer.Argument(metavar="BACKEND", help="See `cvm backends`.")],
    only: Annotated[
        list[str], typer.Option("-k", "--check", metavar="NAME", help="Only checks that begin so; may be repeated.")
    ] = [],  # noqa: B006
    stop: Annotated[bool, typer.Option("-x", "--stop", help="Stop at the first check that fails.")] = False,
    effort: Annotated[
        int,
        typer.Option(
            "--effort", metavar="N", help="How many times as long random checks go on.", parser=whole("--effort", 1)
        ),
    ] = 1,
    script: Annotated[
        Path | None, typer.Option("--script", metavar="OUT", help="Write the calls that lead to a failure (cvm uapi).")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Run the conformance suite on a backend.

    Hooks, invariants, content, failures, leaks, random calls.
    """
    from cvmcore.outfile import OutFile
    from cvmcore.plugins import load_backend
    from cvmcore.progress import Bar
    from cvmcore.testing.conformance import CHECKS, cases, need_hypothesis, run_check

    need_hypothesis()
    backend = load_backend(name)
    asked = [case for case in cases(backend) if not only or case[0].name.startswith(tuple(only))]
    if not asked:
        raise InputError(f"no check begins with {' or '.join(only)}; there are {', '.join(c.name for c in CHECKS)}")
    outcomes: list[Outcome] = []
    with Bar(name) as bar:
        for i, (one, setting) in enumerate(asked):
            bar(i, len(asked), f"{one.name} {setting}")
            # Shrinking random calls takes minutes, and tells nothing where a check of a few calls has failed before.
            wanted = script is not None and not any(outcome.script for outcome in outcomes)
            shrink = wanted or all(outcome.status != "failed" for outcome in outcomes)
            outcomes.append(run_check(one, backend, setting, effort=effort, shrink=shrink, script=wanted))
            if stop and outcomes[-1].status == "failed":
                break
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    written = next((outcome.script for outcome in failed if outcome.script), [])
    if script is not None and written:
        with OutFile(script) as out:
            out.put("".join(line + "\n" for line in written))
    if as_json:
        dump({"backend": name, "checks": [_row(outcome) for outcome in outcomes], "failed": len(failed)})
    else:
        _show(outcomes)
    if failed:
        if script is not None and not written:
            complain(f"{script} is not written: no check that failed does so by UAPI calls alone")
        elif script is None and not as_json:
            first = failed[0].check.name
            typer.echo(f"the calls that lead to it, for `cvm uapi`: cvm check {name} -k {first} --script OUT")
        complain(f"{name} fails {len(failed)} of {len(outcomes)} checks")
        return WRONG
    return 0


def _row(outcome: Outcome) -> dict[str, object]:
    return {
        "check": outcome.check.name, "asks": outcome.check.text, "setting": str(outcome.setting),
        "status": outcome.status, "why": outcome.why, "seconds": round(outcome.seconds, 3),
    }  # fmt: skip


def _by_reason(outcomes: list[Outcome]) -> dict[str, list[Outcome]]:
    """What failed, in the order of the checks, by what the first one said: which page it was about is left aside."""
    found: dict[str, list[Outcome]] = {}
    whys: dict[str, str] = {}
    for outcome in outcomes:
        if outcome.status == "failed":
            alike = re.sub(r"0x[0-9a-f]+|(?<=gfn )\d+", "#", outcome.why)
            found.setdefault(whys.setdefault(alike, outcome.why), []).append(outcome)
    return found


def _show(outcomes: list[Outcome]) -> None:
    """A line for each check, with the settings in which it passed; then what failed, and what was skipped, and why."""
    rows = []
    for name in dict.fromkeys(outcome.check.name for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.check.name == name]
        counts = Counter(outcome.status for outcome in mine)
        said = ", ".join(f"{n} {status}" for status, n in counts.items())
        rows.append((name, said, f"{sum(o.seconds for o in mine):.1f} s", mine[0].check.text))
    say(table(("check", "settings", "time", "what it asks"), rows))
    skipped = {(o.check.name, o.why) for o in outcomes if o.status == "skipped"}
    for name, why in sorted(skipped):
        typer.echo(f"skipped {name}: {why}")
    for why, mine in _by_reason(outcomes).items():
        first, *more = [f"{outcome.check.name} [{outcome.setting}]" for outcome in mine]
        typer.echo(f"FAILED {first}: {why}")
        if more:
            typer.echo(f"  so do {len(more)} more: {', '.join(more[:SHOWN])}{', ...' if len(more) > SHOWN else ''}")
    n = Counter(outcome.status for outcome in outcomes)
    seconds = sum(outcome.seconds for outcome in outcomes)
    typer.echo(f"{n['passed']} passed, {n['failed']} failed, {n['skipped']} skipped in {seconds:.1f} s")
