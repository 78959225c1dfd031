"""`cvm study`: questions about designs, answered with numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cvmcore.cli.arguments import AsJson, Seed, parse_pairs, whole
from cvmcore.cli.output import complain, dump, option_rows, say, table
from cvmcore.cli.running import plotting
from cvmcore.errors import InputError, PluginError

if TYPE_CHECKING:
    from cvmcore.study import Outcome, Study


def study(
    name: Annotated[str | None, typer.Argument(metavar="STUDY", help="Which; without it, all are listed.")] = None,
    option: Annotated[
        list[str], typer.Option("-s", "--study-option", metavar="NAME=VALUE", help="A study's option; may be repeated.")
    ] = [],  # noqa: B006
    uncertainty: Annotated[
        int,
        typer.Option(
            "--uncertainty",
            metavar="N",
            help="Also at N draws of prices, as sure as they are.",
            parser=whole("--uncertainty"),
        ),
    ] = 0,
    seed: Seed = 0,
    as_json: AsJson = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="OUT", help="Draw the findings: .svg, .png or .pdf.")
    ] = None,
) -> None:
    """Answer a question about a design with numbers."""
    from cvmcore.progress import Bar
    from cvmcore.study import load_study
    from cvmcore.study import run as run_study

    if name is None:
        _list_studies(as_json)
        return
    chosen = load_study(name)
    if plot is not None and chosen.draw is None:
        raise InputError(f"study {name} draws nothing")
    with plotting(plot) as picture:
        with Bar(name) as bar:
            outcome = run_study(chosen, parse_pairs(option, "-s"), draws=uncertainty, seed=seed, progress=bar)
        if picture is not None and chosen.draw is not None:
            draw = chosen.draw
            picture.paint(lambda figure: draw(outcome.findings, figure))
    _show_study(chosen, outcome, as_json)


def _list_studies(as_json: bool) -> None:
    from cvmcore.plugins import installed
    from cvmcore.study import GROUP, load_study

    found: list[Study] = []
    bad: list[PluginError] = []
    for one in installed(GROUP):
        try:
            found.append(load_study(one))
        except PluginError as error:
            bad.append(error)
    if as_json:
        dump({"studies": [{"name": s.name, "question": s.question, "source": s.source, "options": option_rows(s)}
                           for s in found]})  # fmt: skip
    else:
        say(table(("study", "question", "options"), [
            (s.name, s.question, ", ".join(option.name for option in s.options)) for s in found
        ]))
    for reason in bad:
        complain(reason)


def _show_study(chosen: Study, outcome: Outcome, as_json: bool) -> None:
    findings = outcome.findings
    if as_json:
        dump({
            "study": chosen.name, "question": chosen.question, "source": chosen.source,
            "rows": [row | ({"flips": outcome.row_flips[i]} if outcome.row_flips else {})
                     for i, row in enumerate(findings.rows)],
            "calibrated": findings.calibrated, "predicted": findings.predicted, "notes": findings.notes,
            "conclusion": findings.conclusion, "verdict": str(findings.verdict), "draws": outcome.draws,
            "flips": outcome.flips, "other_verdicts": {str(v): n for v, n in outcome.others.items()},
        })
        return
    from rich.console import Group
    from rich.text import Text

    columns = chosen.columns
    titles = [f"{c.title}, {c.unit}" if c.unit else c.title for c in columns]
    rows = [[_figure(row.get(c.name), c.digits) for c in columns] for row in findings.rows]
    if outcome.row_flips:
        titles.append(f"flips of {outcome.draws}")
        rows = [[*row, str(n)] for row, n in zip(rows, outcome.row_flips, strict=True)]
    told = [f"calibrated: {text}" for text in findings.calibrated]
    told += [f"predicted: {text}" for text in findings.predicted]
    told += [*findings.notes, "", findings.conclusion]
    if outcome.draws:
        told.append(f"prices drawn within their confidence {outcome.draws} times: other verdicts in {outcome.flips}")
        told += [f"  {n} x {verdict}" for verdict, n in outcome.others.items()]
    heading = Text(f"{chosen.name}: {chosen.question}", style="bold")
    made = table(titles, rows)
    for number, column in enumerate(made.columns):
        column.min_width = max(len(titles[number]), *(len(row[number]) for row in rows))
    say(Group(heading, Text(f"source: {chosen.source}"), "", made, "", *map(Text, told)))


def _figure(value: Any, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:,.{digits}f}" if isinstance(value, float) else str(value)
