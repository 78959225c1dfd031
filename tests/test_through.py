"""`pytest --cvm-backend NAME`: the tests of the core, run through another backend."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cvmcore.backend import GROUP
from cvmcore.plugins import installed

TESTS = Path(__file__).parent
PATHS = ("test_invalidate.py", "test_slots.py", "test_mm.py")
"""Those of the invalidation paths, which differ most; all of the core's tests take minutes for each backend."""


def through(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    return subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(installed(GROUP).keys() - {"default", "swprot"}))
def test_the_tests_of_the_core_pass_through(name: str) -> None:
    """Most run; capabilities alone are reasons to skip."""
    done = through("--cvm-backend", name, *(str(TESTS / path) for path in PATHS))

    assert done.returncode == 0, done.stdout[-2000:]
    passed, skipped = (int(n) for n in re.findall(r"(\d+) (?:passed|skipped)", done.stdout.splitlines()[-1]))
    assert passed > 3 * skipped > 0
    for line in done.stdout.splitlines():
        assert not line.startswith("SKIPPED") or re.search(r": (assumes|needs) ", line), line


def test_one_backend_at_a_time() -> None:
    done = through("--cvm-backend", "snp", "--cvm-backend", "tdx", str(TESTS / "test_through.py"))

    assert done.returncode == 4
    assert "--cvm-backend: the tests of the core run through one backend at a time" in done.stderr


def test_a_backend_that_is_not_there() -> None:
    done = through("--cvm-backend", "sgx", str(TESTS / "test_through.py"))

    assert done.returncode == 4
    assert "--cvm-backend: there is no backend 'sgx' here; installed: default, " in done.stderr
