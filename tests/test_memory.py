"""Physical memory: stamps and keys of frames."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvmcore.memory import INTERNED, SCRAMBLED, ZERO, Memory
from cvmcore.pages import Sel, run

KEY, OTHER = 7, 8


def scattered(*pfns: int) -> Sel:
    return np.array(pfns, np.int64)


def test_power_on_reads_zero_through_the_plain_view() -> None:
    memory = Memory(16)

    assert memory.read(run(0, 16), 0).tolist() == [ZERO] * 16


def test_foreign_key_reads_noise() -> None:
    """Neither content nor zeros, in either direction."""
    memory = Memory(16)
    memory.write(run(2, 2), 5, KEY)
    memory.write(run(4, 1), 6, 0)

    assert memory.read(run(2, 3), KEY).tolist() == [5, 5, SCRAMBLED]
    assert memory.read(run(2, 3), OTHER).tolist() == [SCRAMBLED] * 3
    assert memory.read(run(2, 3), 0).tolist() == [SCRAMBLED, SCRAMBLED, 6]


def test_one_stamp_for_all_or_one_for_each() -> None:
    memory = Memory(16)

    memory.write(scattered(9, 3, 5), np.array([1, 2, 3], np.uint32), KEY)
    memory.write(run(0, 2), 4, 0)

    assert memory.read(scattered(3, 5, 9), KEY).tolist() == [2, 3, 1]
    assert memory.read(run(0, 3), 0).tolist() == [4, 4, 0]


def test_clear_through_a_key() -> None:
    """Zeros for the owner of the key, noise for everybody else."""
    memory = Memory(16)
    memory.write(run(0, 4), 9, 0)

    memory.clear(run(1, 2), KEY)

    assert memory.read(run(0, 4), KEY).tolist() == [SCRAMBLED, ZERO, ZERO, SCRAMBLED]
    assert memory.read(run(0, 4), 0).tolist() == [9, SCRAMBLED, SCRAMBLED, 9]


def test_host_copy_carries_plain_content_only() -> None:
    memory = Memory(16)
    memory.write(run(0, 1), 5, 0)
    memory.write(run(1, 1), 6, KEY)

    memory.copy_raw(run(0, 2), run(8, 2))

    assert memory.read(run(8, 2), 0).tolist() == [5, SCRAMBLED]
    assert memory.read(run(9, 1), KEY).tolist() == [SCRAMBLED]
    assert memory.read(run(1, 1), KEY).tolist() == [6]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=8))
def test_interned_bytes_come_back(contents: list[bytes]) -> None:
    memory = Memory(1)

    stamps = [memory.intern(content) for content in contents]

    for content, stamp in zip(contents, stamps, strict=True):
        page = content.ljust(4096, b"\0")
        assert memory.bytes_of(stamp) == page
        assert stamp == ZERO if not content.strip(b"\0") else INTERNED <= stamp < SCRAMBLED
    by_page = {content.ljust(4096, b"\0"): stamp for content, stamp in zip(contents, stamps, strict=True)}
    assert [by_page[content.ljust(4096, b"\0")] for content in contents] == stamps


def test_plain_stamps_repeat_themselves() -> None:
    assert Memory(1).bytes_of(0x01020304) == bytes([4, 3, 2, 1]) * 1024
    assert Memory(1).bytes_of(ZERO) == bytes(4096)


def test_a_page_has_4096_bytes() -> None:
    with pytest.raises(ValueError, match="4097"):
        Memory(1).intern(bytes(4097))
