"""The places that tests/mutants changes are there; that the kit catches the bugs, `make mutants` says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "mutants"))

from bugs import BUGS


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_place_is_there(bug: object) -> None:
    """Once, so that a bug is what its story says. Moved code: move the text in tests/mutants/bugs.py along."""
    module, old = bug.module, bug.old  # type: ignore[attr-defined]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        pytest.skip(f"{module} is not installed")

    assert Path(spec.origin).read_text(encoding="utf-8").count(old) == 1
