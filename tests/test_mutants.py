"""The places that tests/mutants changes are there; that the kit catches the bugs, `make mutants` says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "mutants"))

from bugs import BUGS

from cvmcore.testing.conformance import CHECKS


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_place_is_there(bug: object) -> None:
    """Once, so that a bug is what its story says. Moved code: move the text in tests/mutants/bugs.py along."""
    module, old = bug.module, bug.old  # type: ignore[attr-defined]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        pytest.skip(f"{module} is not installed")

    assert Path(spec.origin).read_text(encoding="utf-8").count(old) == 1


def test_the_record_names_bugs_and_checks_that_exist() -> None:
    """What is tried first is there: `tests/mutants/run.py --record` writes it anew."""
    recorded = json.loads((Path(__file__).parent / "mutants" / "caught.json").read_text(encoding="utf-8"))
    checks = {check.name for check in CHECKS}

    by = {bug.name: recorded[bug.name] for bug in BUGS if bug.name in recorded}
    assert len(by) > len(BUGS) // 2
    assert all(said.startswith("vendor: ") or said.partition(" [")[0] in checks for said in by.values()), by
