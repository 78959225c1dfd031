"""What a vendor's code asks of its trusted party is found in the code of both."""

from __future__ import annotations

import enum
import sys
from typing import ClassVar

import pytest

from cvmcore.testing.trusted import calls_made, statuses_of


class Said(enum.IntEnum):
    FINE = 0
    BUSY = 1
    WRONG_STATE = 2
    TOO_LARGE = 3
    NEVER_SAID = 4


TABLE = {"taken": Said.WRONG_STATE}
ALL = [TABLE]


def too_large(n: int) -> Said:
    return Said.TOO_LARGE if n > 5 else Said.FINE


class Part:
    """A part of the hardware."""

    def flush(self) -> Said:
        return Said.BUSY


class Hardware:
    """A trusted party."""

    names: ClassVar[str] = "x"

    def __init__(self) -> None:
        self.part = Part()
        self.locked = False

    def add(self, n: int) -> Said:
        return self._check() or too_large(n)

    def _check(self) -> Said:
        return Said.BUSY if self.locked else ALL[0].get("free", Said.FINE)

    def read(self) -> int:
        return 0

    def unused(self) -> Said:
        return Said.NEVER_SAID


def vendor(hw: Hardware) -> None:
    """A vendor's code."""
    if hw.add(1) or hw.read():
        hw.part.flush()


def test_calls_are_those_that_the_code_names() -> None:
    assert calls_made([sys.modules[__name__]], Hardware()) == {"add", "read", "part.flush"}


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        ("add", {Said.FINE, Said.BUSY, Said.WRONG_STATE, Said.TOO_LARGE}),
        ("read", set()),
        ("unused", {Said.NEVER_SAID}),
        ("part.flush", {Said.BUSY}),
    ],
)
def test_statuses_are_found_behind_helpers_and_tables(operation: str, said: set[Said]) -> None:
    assert set(statuses_of(Hardware(), operation, Said)) == said
