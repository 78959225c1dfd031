"""The conformance suite as a test module: `pytest --pyargs cvmcore.testing.suite --cvm-backend NAME`."""

from __future__ import annotations

from typing import Any

import pytest

from cvmcore.backend import Backend
from cvmcore.testing.conformance import run_check


def test_conformance(cvm_backend: Backend, cvm_check: Any, cvm_setting: Any) -> None:
    """A check of `cvmcore.testing.conformance` in one setting."""
    outcome = run_check(cvm_check, cvm_backend, cvm_setting)
    if outcome.status == "skipped":
        pytest.skip(outcome.why)
    if outcome.error is not None:
        raise outcome.error
