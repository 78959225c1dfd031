"""Studies `hugepages` and `mirror`: what they count, what they conclude, what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from cvmcore.cli import main
from cvmcore.errors import InputError
from cvmcore.study import Outcome, run
from cvmcore_tdx.studies import HUGEPAGES, MIRROR, NEVER

SMALL = {"mem": "32", "ratio": "2", "rounds": "2"}


@pytest.fixture(scope="module")
def hugepages() -> Outcome:
    return run(HUGEPAGES, SMALL, draws=3)


def row(outcome: Outcome, **wanted: Any) -> dict[str, Any]:
    return next(r for r in outcome.findings.rows if all(r[k] == v for k, v in wanted.items()))


def test_what_comes_back(hugepages: Outcome) -> None:
    """A brings back everything, C what is used, B nothing; nothing is lost."""
    for scenario in ("dirty-log", "conversions"):
        got = {m: row(hugepages, scenario=scenario, merge=m) for m in ("none", "scan", "fault", "block")}

        assert [got[m]["all"] for m in got] == [0, 100, 0, 25]
        assert [got[m]["hot"] for m in got] == [0, 100, 0, 100]
        assert (got["none"]["recovery"], got["fault"]["recovery"]) == (NEVER, NEVER)
        assert got["scan"]["wasted"] >= 12 == 16 - 4
        assert got["block"]["wasted"] == 0
        assert all(r["intact"] for r in got.values())
    assert row(hugepages, scenario="dirty-log", merge="scan")["leaves"]["TDH.MEM.PAGE.PROMOTE"] == 16
    assert row(hugepages, scenario="conversions", merge="fault")["refused"] > 0
    assert row(hugepages, scenario="dirty-log", merge="fault")["seamcalls"] == 0


def test_what_it_concludes(hugepages: Outcome) -> None:
    found = hugepages.findings

    assert found.verdict == "dirty-log: block; conversions: block"
    assert "option C (block) costs" in found.conclusion
    assert hugepages.draws == 3


def test_a_read_at_every_step() -> None:
    """Four reads for a 4K fault, three for a large one; as many SEAMCALLs more, and so much longer."""
    outcome = run(MIRROR, {"mem": "16"}, draws=1)

    for workload, reads in (("in order", 4), ("scattered", 4), ("punched and back", 4), ("large pages", 3)):
        mirror, truth = (row(outcome, workload=workload, walker=w) for w in ("mirror", "seamcall"))
        assert (mirror["reads"], truth["reads"]) == (0, reads)
        assert truth["seamcalls"] - mirror["seamcalls"] == reads
        assert mirror["faults"] == truth["faults"]
        assert truth["fault"] == pytest.approx(mirror["fault"] + reads * 1200 - 60)
        assert 0 < truth["even"] < 100
    waits = [row(outcome, workload="beside holes", walker="seamcall", vcpus=n)["slower"] for n in (1, 4, 16)]
    assert min(waits) > 1
    assert outcome.findings.verdict == "mirror"


@pytest.mark.parametrize(("study", "given"), [(HUGEPAGES, "mem=2"), (HUGEPAGES, "hot=100"), (MIRROR, "mem=0")])
def test_bad_options(study: Any, given: str) -> None:
    name, value = given.split("=")

    with pytest.raises(InputError, match=f"option {name}: {value} is not from"):
        run(study, {name: value})


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "mirror", "-s", "mem=4", "--json"]) == 0
    assert '"verdict"' in capsys.readouterr().out
