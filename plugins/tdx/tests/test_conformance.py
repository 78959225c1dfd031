"""The backends of this plugin conform: hooks, invariants, content, failures, leaks."""

from __future__ import annotations

import pytest

from cvmcore.plugins import load_backend
from cvmcore.testing.conformance import CHECKS, Setting, conformance, run_check

pytestmark = pytest.mark.slow

test_tdx = conformance("tdx")


@pytest.mark.parametrize("merge", ["none", "block"])
def test_every_try_lock_of_large_pages_is_busy(merge: str) -> None:
    """All of them, of which the suite takes a few: large pages are split, and merged."""
    check = next(one for one in CHECKS if one.name == "failure.busy")
    setting = Setting("2m", (("page_aug", "2m"),), (("merge", merge),))

    outcome = run_check(check, load_backend("tdx"), setting, effort=1000)

    assert outcome.status == "passed", outcome.why
