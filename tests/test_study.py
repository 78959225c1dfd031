"""`cvm study`: a study is measured once, evaluated at each draw of prices, and shown; bad input is a sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cvmcore import plugins
from cvmcore.backend import Option
from cvmcore.cli import main
from cvmcore.errors import InputError
from cvmcore.study import Column, Findings, Study, StudyContext, run

calls: list[str] = []


def measure(context: StudyContext) -> int:
    calls.append("measure")
    context.progress(1, 2, "half")
    return int(context.options["n"])


def evaluate(measured: int, context: StudyContext) -> Findings:
    """Whether n faults cost more than one table of hole punches: hangs on prices that are not sure."""
    calls.append("evaluate")
    ns = context.profile("swprot").ns_by_item()
    mine, theirs = measured * ns["fault_fixed"], 10 * ns["punch_hole_call"]
    verdict = "faults" if mine > theirs else "holes"
    rows: list[dict[str, Any]] = [{"what": "faults", "ns": float(mine)}, {"what": "holes", "ns": float(theirs)}]
    for row in rows:
        row["dearer"] = row["what"] == verdict
    return Findings(rows, ["nothing"], ["both"], ["a note"], f"the dearer are {verdict}", verdict, "dearer")


def draw(findings: Findings, figure: Any) -> None:
    figure.add_subplot().bar([0, 1], [row["ns"] for row in findings.rows])


COLUMNS = (Column("what", "what"), Column("ns", "cost", "ns", 1))
OPTIONS = (Option("n", 6, "how many faults"),)
TRY = Study("try", "which is dearer?", "nobody", COLUMNS, measure, evaluate, draw, OPTIONS)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls.clear()

    class Entry:
        def load(self) -> Study:
            return TRY

    found = plugins.Found("try", "test", "0", "", Entry())  # type: ignore[arg-type]
    real = plugins.installed
    studies = {"try": found}
    monkeypatch.setattr(plugins, "installed", lambda group: studies if group == "cvmcore.studies" else real(group))


def test_measured_once_and_evaluated_at_each_draw() -> None:
    outcome = run(TRY, {}, draws=20, seed=3)

    assert calls == ["measure", *["evaluate"] * 21]
    assert outcome.findings.verdict == "holes"
    assert 0 < outcome.flips < 20
    assert outcome.others == {"faults": outcome.flips}
    assert outcome.row_flips == [outcome.flips] * 2
    assert run(TRY, {}, draws=20, seed=3).flips == outcome.flips
    assert run(TRY, {"n": "1000"}, draws=20).flips == 0


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match="study try has no option 'm'"):
        run(TRY, {"m": "1"})
    assert calls == []


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == 0
    assert "which is dearer?" in capsys.readouterr().out
    assert main(["study", "try", "--uncertainty", "20", "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    for text in ("cost, ns", "5,000.0", "calibrated: nothing", "predicted: both", "a note", "the dearer are holes"):
        assert text in shown
    assert "20 times: other verdicts in" in shown
    assert "flips of 20" in shown
    assert main(["study", "try", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["verdict"], told["rows"][1]["what"], told["draws"]) == ("holes", "holes", 0)


def test_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    for arguments in (["nothing"], ["try", "-s", "n=x"], ["try", "-s", "n"], ["try", "--plot", "out.txt"]):
        assert main(["study", *arguments]) == 2
        told = capsys.readouterr()
        assert told.err.startswith("cvm: ") and told.err.count("\n") == 1 and not told.out
    assert calls == []


def test_plot(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.svg"

    assert main(["study", "try", "--plot", str(path)]) == 0

    assert path.read_text().startswith("<?xml")
