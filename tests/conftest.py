"""Makes `fakes` importable: under pytest's importlib mode the tests' folder is not on the path."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fakes

ASSUMES = "assumes(**capabilities): what a test takes for granted of the VM type that it is run through"


def pytest_configure(config: pytest.Config) -> None:
    """With `--cvm-backend NAME` the tests of the core run through that backend: see `fakes.StandIn`."""
    from cvmcore.plugins import load_backend
    from cvmcore.testing.plugin import chosen

    config.addinivalue_line("markers", ASSUMES)
    if config.getoption("--cvm-backend"):
        names = chosen(config)
        if len(names) > 1:
            raise pytest.UsageError("--cvm-backend: the tests of the core run through one backend at a time")
        fakes.stand_in = fakes.StandIn.of(load_backend(names[0]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A capability is the only reason to skip."""
    if fakes.stand_in is None:
        return
    assumed = {name: value for mark in item.iter_markers("assumes") for name, value in mark.kwargs.items()}
    if lacks := fakes.stand_in.lacks(assumed):
        pytest.skip(f"assumes {', '.join(lacks)}")
