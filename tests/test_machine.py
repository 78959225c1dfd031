"""The state machine over the whole UAPI, with invariants and content checked after every step, on every backend."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from cvmcore.backend import GROUP
from cvmcore.plugins import installed, load_backend
from cvmcore.testing.machine import uapi_machine

QUICK = settings(
    max_examples=12,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

@pytest.mark.parametrize("backing", ["4k", "2m"])
@pytest.mark.parametrize("backend", sorted(installed(GROUP)))
def test_uapi_machine(backend: str, backing: str) -> None:
    """Random calls, right and wrong, and random guest actions: nothing that must hold is broken, nothing is lost."""
    run_state_machine_as_test(uapi_machine(load_backend(backend), backing=backing), settings=QUICK)

