"""Memory attributes: a word per gfn, and which large blocks are mixed (kvm-core.md section 6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import M2, MIRROR, PAGE, Box
from hypothesis import given, settings
from hypothesis import strategies as st

from cvmcore.backends.swprot import SWPROT
from cvmcore.mem.attributes import PRIVATE, Attributes
from cvmcore.mem.slots import MIXED, Memslot
from cvmcore.pages import sort_unique
from cvmcore.types import PG_LEVEL_1G, PG_LEVEL_2M, order_of

GUEST_MEMFD = 4
NR = 4 * 512 + 100


def attributes_of(*ranges: tuple[int, int]) -> Attributes:
    """Attributes with these gfns [start, end) private."""
    attributes = Attributes()
    attributes.cover(NR)
    for start, end in ranges:
        attributes.store(start, end, PRIVATE)
    return attributes


def mixed_blocks(words: Any, slot: Memslot, level: int) -> list[int]:
    """By the book: blocks fully inside the slot whose attributes are not uniform."""
    size = 1 << order_of(level)
    return [
        block
        for block in range(slot.base_gfn // size, -(-slot.end_gfn // size))
        if block * size >= slot.base_gfn
        and (block + 1) * size <= slot.end_gfn
        and len({int(word) for word in words[block * size : (block + 1) * size]}) > 1
    ]


def tracked(slot: Memslot, level: int) -> list[int]:
    """Blocks whose MIXED bit is set."""
    return [int(i) + (slot.base_gfn >> order_of(level)) for i in np.flatnonzero(slot.lpage[level] & MIXED)]


# ---- words ----------------------------------------------------------------------------------------------------------


def test_absent_means_shared() -> None:
    attributes = attributes_of((3, 5))

    assert attributes.of(slice(2, 6, 1)).tolist() == [0, 8, 8, 0]
    assert attributes.of(slice(NR + (1 << 21), NR + (1 << 21) + 2, 1)).tolist() == [0, 0]
    end = len(attributes.words)
    assert attributes.of(sort_unique([3, end - 1, end, end + 5])).tolist() == [8, 0, 0, 0]
    assert attributes.of(slice(end - 2, end + 2, 1)).tolist() == [0] * 4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), max_size=4), st.integers(0, 90), st.integers(1, 40))
def test_uniform(ranges: list[tuple[int, int]], start: int, n: int) -> None:
    attributes = attributes_of(*[(low, low + length) for low, length in ranges])
    values = {int(word) for word in attributes.of(slice(start, start + n, 1))}

    assert attributes.uniform(start, start + n, PRIVATE) == (values == {PRIVATE})
    assert attributes.uniform(start, start + n, 0) == (values == {0})


def test_uniform_beyond_what_was_ever_set() -> None:
    attributes = attributes_of((0, NR))
    end = len(attributes.words)

    assert attributes.uniform(end + 5, end + 9, 0)
    assert not attributes.uniform(end + 5, end + 9, PRIVATE)
    assert not attributes.uniform(0, end + 9, PRIVATE)
    assert not attributes.uniform(0, end + 9, 0)


# ---- mixed bits -----------------------------------------------------------------------------------------------------

CHANGES = st.lists(
    st.tuples(
        st.integers(0, NR - 1) | st.sampled_from([0, 511, 512, 1024, 1536, 2048]),
        st.integers(1, NR) | st.sampled_from([1, 512, 1024]),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(CHANGES, st.sampled_from([0, 100, 512]), st.sampled_from([100, 1024, NR]))
def test_mixed_bits_follow_every_change(changes: list[tuple[int, int, bool]], base: int, n: int) -> None:
    """Row 9: mixed(block) <=> attributes non-uniform, for each block fully inside a slot."""
    box = Box(SWPROT, 8)
    fd = box.fd.create_guest_memfd(NR * PAGE)
    gfn = 1 << 18  # aligned to 1 GiB
    box.fd.set_user_memory_region2(1, GUEST_MEMFD, (gfn + base) * PAGE, n * PAGE, box.process.mmap(NR * PAGE), fd, 0)
    slot = box.vm.slots.by_id[1]

    for start, length, private in changes:
        box.set_private(gfn + start, length, private)
        for level in (PG_LEVEL_2M, PG_LEVEL_1G):
            assert tracked(slot, level) == mixed_blocks(box.vm.attributes.words, slot, level)


@settings(max_examples=40, deadline=None)
@given(CHANGES, st.sampled_from([0, 100, 512]), st.sampled_from([100, 1024, NR]))
def test_a_new_slot_finds_what_is_mixed(changes: list[tuple[int, int, bool]], base: int, n: int) -> None:
    """Row 22: attributes survive slot delete and create; creation computes all from the attribute array."""
    box = Box(SWPROT, 8)
    gfn = 1 << 18
    for start, length, private in changes:
        box.set_private(gfn + start, length, private)

    box.fd.set_user_memory_region2(1, 0, (gfn + base) * PAGE, n * PAGE, box.process.mmap(NR * PAGE))

    slot = box.vm.slots.by_id[1]
    for level in (PG_LEVEL_2M, PG_LEVEL_1G):
        assert tracked(slot, level) == mixed_blocks(box.vm.attributes.words, slot, level)


def test_a_mixed_block_of_1g() -> None:
    """1G = any child mixed or child attribute differs."""
    box = Box(SWPROT, 2 << 18, nr_frames=1 << 12)
    slot = box.vm.slots.by_id[0]

    box.set_private(5, private=False)
    assert (tracked(slot, PG_LEVEL_2M), tracked(slot, PG_LEVEL_1G)) == ([0], [0])
    box.set_private(0, 512, private=False)
    assert (tracked(slot, PG_LEVEL_2M), tracked(slot, PG_LEVEL_1G)) == ([], [0])
    box.set_private(512, (1 << 18) - 512, private=False)
    assert (tracked(slot, PG_LEVEL_2M), tracked(slot, PG_LEVEL_1G)) == ([], [])
    box.set_private((1 << 18) - 1, 2)
    assert (tracked(slot, PG_LEVEL_2M), tracked(slot, PG_LEVEL_1G)) == ([511], [0])


def test_counts_beside_the_mixed_bit_stay() -> None:
    """Low bits count reasons, bit 31 is mixed: they do not disturb each other."""
    box = Box(SWPROT, 1000)
    slot = box.vm.slots.by_id[0]
    assert slot.lpage[PG_LEVEL_2M].tolist() == [0, 1]

    box.set_private(500, 20, private=False)
    assert slot.lpage[PG_LEVEL_2M].tolist() == [int(MIXED), 1]
    box.set_private(500, 20)
    assert slot.lpage[PG_LEVEL_2M].tolist() == [0, 1]


# ---- the edges of a conversion --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end", "want"),
    [
        (600, 601, (512, 1024)),
        (512, 1024, (512, 1024)),
        (512, 1025, (512, 1536)),
        (511, 1024, (0, 1024)),
        (600, 1500, (512, 1536)),
        (2060, 2061, (2060, 2061)),
        (2000, 2061, (1536, 2061)),
    ],
)
def test_edges_that_may_be_mapped_large(start: int, end: int, want: tuple[int, int]) -> None:
    """Blocks at head and tail that lie in the slot; the last block of this slot does not."""
    slot = Memslot(0, 0, NR, 0, 0)
    slot.alloc_lpage_info()

    assert Attributes().with_edges(slot, start, end) == want


def test_edges_that_are_mixed_already() -> None:
    slot = Memslot(0, 0, NR, 0, 0)
    slot.alloc_lpage_info()
    slot.lpage[PG_LEVEL_2M][1] |= MIXED

    assert Attributes().with_edges(slot, 600, 1500) == (600, 1536)


def test_attributes_survive_their_slot_and_their_file() -> None:
    """Row 22."""
    box = Box(MIRROR, 16)
    box.set_private(4, 4, private=False)

    box.fd.set_user_memory_region2(0, 0, 0, 0)
    box.process.close(box.gmem)

    assert box.vm.attributes.of(slice(2, 10, 1)).tolist() == [8, 8, 0, 0, 0, 0, 8, 8]
    fd = box.fd.create_guest_memfd(M2)
    box.fd.set_user_memory_region2(0, GUEST_MEMFD, 0, M2, box.hva, fd, 0)
    assert box.touch(3) is None
    assert box.touch(4) is not None
