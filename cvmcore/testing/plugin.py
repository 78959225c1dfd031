"""The pytest plugin: `--cvm-backend NAME`, and the fixture `cvm_backend`.

A test that asks for `cvm_backend` runs once for every installed backend; with `--cvm-backend NAME` (may be repeated)
for those alone. `cvmcore.testing.suite` is such a test: the conformance suite of whatever is installed.
"""

from __future__ import annotations

from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--cvm-backend`."""
    group = parser.getgroup("cvmcore")
    group.addoption(
        "--cvm-backend", action="append", default=[], metavar="NAME",
        help="run tests that are for every backend through this one only; may be repeated",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Marks of the tests that cvmcore makes."""
    config.addinivalue_line("markers", "slow: takes more than a few seconds; `-m 'not slow'` leaves it out")


def chosen(config: pytest.Config) -> list[str]:
    """The names of the backends to run with: those of `--cvm-backend`, or all that are installed."""
    from cvmcore.backend import GROUP
    from cvmcore.plugins import installed

    asked: list[str] = list(dict.fromkeys(config.getoption("--cvm-backend")))
    there = installed(GROUP)
    for name in asked:
        if name not in there:
            raise pytest.UsageError(f"--cvm-backend: there is no backend '{name}' here; installed: {', '.join(there)}")
    return asked or sorted(there)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize `cvm_backend` by name, and `cvm_check`, `cvm_setting` beside it where they are asked for."""
    names = metafunc.fixturenames
    if "cvm_check" in names:
        from cvmcore.plugins import load_backend
        from cvmcore.testing.conformance import cases

        found = [
            pytest.param(name, one, setting, id=f"{name}-{one.name}[{setting}]")
            for name in chosen(metafunc.config)
            for one, setting in cases(load_backend(name))
        ]
        metafunc.parametrize(("cvm_backend_name", "cvm_check", "cvm_setting"), found)
    elif "cvm_backend_name" in names:
        metafunc.parametrize("cvm_backend_name", chosen(metafunc.config))


@pytest.fixture
def cvm_backend(cvm_backend_name: str) -> Any:
    """A backend (`cvmcore.backend.Backend`): every installed one in turn, or those of `--cvm-backend`."""
    from cvmcore.plugins import load_backend

    return load_backend(cvm_backend_name)
