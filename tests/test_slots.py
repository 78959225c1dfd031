"""Memslots: lookup, geometry, and what is tracked per slot (kvm-core.md sections 1, 6 and 8)."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import M2, PAGE, Box
from hypothesis import given, settings
from hypothesis import strategies as st

from cvmcore.backends.default import DEFAULT
from cvmcore.backends.swprot import SWPROT
from cvmcore.errors import UapiError
from cvmcore.mem.slots import Memslot, Memslots
from cvmcore.pages import Sel, array_of, part, sort_unique
from cvmcore.types import KVM_MEM_LOG_DIRTY_PAGES, PG_LEVEL_1G, PG_LEVEL_2M

GUEST_MEMFD = 4


def slot(number: int, base: int, n: int, hva_page: int = 0, **more: object) -> Memslot:
    return Memslot(number, base, n, hva_page << 12, 0, **more)  # type: ignore[arg-type]


LAYOUT = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 20)), max_size=6)
"""(pages, gap before) of slots, from gfn 0 on."""

SCATTERED = st.lists(st.integers(0, 320), min_size=1, max_size=40)
RUN = st.integers(0, 300).map(lambda start: list(range(start, start + 30)))


def slots_of(layout: list[tuple[int, int]]) -> tuple[Memslots, dict[int, int]]:
    """The slots, and the slot number of each gfn."""
    slots, owner, base = Memslots(), {}, 0
    for number, (n, gap) in enumerate(layout):
        base += gap
        slots.replace(None, slot(number, base, n, hva_page=1000 * number))
        owner.update(dict.fromkeys(range(base, base + n), number))
        base += n
    return slots, owner


@settings(max_examples=50, deadline=None)
@given(LAYOUT)
def test_find(layout: list[tuple[int, int]]) -> None:
    slots, owner = slots_of(layout)

    for gfn in range(320):
        found = slots.find(gfn)
        assert (found.id if found else None) == owner.get(gfn)


@settings(max_examples=50, deadline=None)
@given(LAYOUT, st.integers(0, 300), st.integers(1, 60))
def test_overlapping(layout: list[tuple[int, int]], start: int, n: int) -> None:
    slots, owner = slots_of(layout)

    found = [s.id for s in slots.overlapping(start, start + n)]

    assert found == sorted({owner[gfn] for gfn in range(start, start + n) if gfn in owner})


@settings(max_examples=60, deadline=None)
@given(LAYOUT, SCATTERED | RUN)
def test_split_names_the_slot_of_each_gfn(layout: list[tuple[int, int]], gfns: list[int]) -> None:
    """Positions of a batch with the slot that holds them, in order; None between slots."""
    slots, owner = slots_of(layout)
    batch: Sel = sort_unique(np.array(gfns))

    found = [
        (gfn, s.id if s else None)
        for start, stop, s in slots.split(batch)
        for gfn in array_of(part(batch, start, stop)).tolist()
    ]

    assert found == [(gfn, owner.get(gfn)) for gfn in sorted(set(gfns))]


@settings(max_examples=50, deadline=None)
@given(LAYOUT, st.integers(0, 5), st.integers(0, 40), st.integers(1, 40))
def test_in_hva_range(layout: list[tuple[int, int]], number: int, start: int, n: int) -> None:
    """The gfns through which a range of the VMM's memory shows."""
    slots, _ = slots_of(layout)

    found = slots.in_hva_range(1000 * number + start, n)

    want = [s for s in slots if s.id == number and start < s.npages]
    assert [(s.id, low, high) for s, low, high in found] == [
        (s.id, s.base_gfn + start, min(s.base_gfn + start + n, s.end_gfn)) for s in want
    ]


def test_two_slots_may_show_the_same_memory() -> None:
    slots = Memslots()
    slots.replace(None, slot(0, 0, 10, hva_page=100))
    slots.replace(None, slot(1, 50, 10, hva_page=105))

    assert [(s.id, low, high) for s, low, high in slots.in_hva_range(104, 3)] == [(0, 4, 7), (1, 50, 52)]


def test_address_spaces_are_apart() -> None:
    """as_id in the high 16 bits of the slot: the same gfns may be in both."""
    slots = Memslots()
    slots.replace(None, slot(1, 0, 10))
    slots.replace(None, slot(1 << 16 | 1, 5, 10))

    found = slots.find(7, as_id=1)
    assert found is not None
    assert (found.as_id, found.base_gfn) == (1, 5)
    assert [s.as_id for s in slots.overlapping(7, 8)] == [0, 1]
    assert [s.as_id for s in slots.overlapping(7, 8, as_id=0)] == [0]


def test_every_change_is_a_new_generation() -> None:
    """MMIO entries are guarded by the generation."""
    slots = Memslots()
    old, new = slot(0, 0, 10), slot(0, 20, 10)

    slots.replace(None, old)
    slots.replace(old, new)
    slots.replace(new, None)

    assert (slots.generation, list(slots)) == (3, [])


# ---- lpage_info -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "n", "hva_page", "at_2m"),
    [
        (0, 1024, 0, [0, 0]),
        (512, 1024, 1024, [0, 0]),
        (0, 1000, 0, [0, 1]),
        (100, 924, 100, [1, 0]),
        (100, 1000, 100, [1, 0, 1]),
        (100, 300, 100, [2]),
        (0, 1024, 1, [1, 1]),
        (100, 924, 101, [1, 1]),
    ],
)
def test_blocks_that_may_not_be_large(base: int, n: int, hva_page: int, at_2m: list[int]) -> None:
    """First and last block where base or end is unaligned for the level; all where base and hva differ modulo it."""
    info = slot(0, base, n, hva_page)
    info.alloc_lpage_info()

    assert info.lpage[PG_LEVEL_2M].tolist() == at_2m
    assert all(info.lpage[PG_LEVEL_1G])


def test_blocks_of_1g() -> None:
    info = slot(0, 1 << 18, 3 << 18, 5 << 18)
    info.alloc_lpage_info()
    off = slot(0, 1 << 18, 3 << 18, (5 << 18) + 512)
    off.alloc_lpage_info()

    assert info.lpage[PG_LEVEL_1G].tolist() == [0, 0, 0]
    assert off.lpage[PG_LEVEL_1G].tolist() == [1, 1, 1]
    assert not off.lpage[PG_LEVEL_2M].any()


def test_the_guest_memfd_offset_counts_like_the_hva() -> None:
    """Model gmem likewise with pgoff; a gmem-only slot has no other backing."""
    private = Memslot(0, 0, 1024, 0, GUEST_MEMFD, gmem_pgoff=1)
    private.alloc_lpage_info()
    gmem_only = Memslot(0, 0, 1024, 1 << 12, GUEST_MEMFD, gmem_only=True)
    gmem_only.alloc_lpage_info()

    assert private.lpage[PG_LEVEL_2M].tolist() == [1, 1]
    assert gmem_only.lpage[PG_LEVEL_2M].tolist() == [0, 0]


def test_a_moved_slot_has_new_geometry() -> None:
    box = Box(DEFAULT, 8, backing="2m")
    hva = box.process.mmap(2 * M2)
    box.fd.set_user_memory_region2(1, 0, 1 << 30, 2 * M2, hva)
    assert box.vm.slots.by_id[1].lpage[PG_LEVEL_2M].tolist() == [0, 0]

    box.fd.set_user_memory_region2(1, 0, (1 << 30) + PAGE, 2 * M2, hva)

    assert box.vm.slots.by_id[1].lpage[PG_LEVEL_2M].tolist() == [1, 1, 1]


# ---- bindings -------------------------------------------------------------------------------------------------------


def test_bindings_point_back() -> None:
    """Row 2: each index is bound to at most one slot; slot.file set <=> binding entries point back to it."""
    box = Box(SWPROT, 16)
    fd = box.fd.create_guest_memfd(16 * PAGE)
    file = box.process.files[fd]
    hva = box.process.mmap(16 * PAGE)
    box.fd.set_user_memory_region2(1, GUEST_MEMFD, 64 * PAGE, 4 * PAGE, hva, fd, 8 * PAGE)
    box.fd.set_user_memory_region2(2, GUEST_MEMFD, 32 * PAGE, 6 * PAGE, hva, fd, 2 * PAGE)

    assert [(start, n, s.id) for start, n, s in file.bindings] == [(2, 6, 2), (8, 4, 1)]
    assert all(s.gmem is file for _, _, s in file.bindings)
    assert [s.id for _, _, s in file.bound(7, 2)] == [2, 1]
    box.fd.set_user_memory_region2(2, 0, 0, 0)
    assert [(start, n, s.id) for start, n, s in file.bindings] == [(8, 4, 1)]


def test_a_slot_that_is_refused_late_is_not_bound() -> None:
    box = Box(SWPROT, 16)
    fd = box.fd.create_guest_memfd(16 * PAGE)

    with pytest.raises(UapiError):
        box.fd.set_user_memory_region2(1, GUEST_MEMFD, 1 << 48, 4 * PAGE, 0, fd, 0)

    assert box.process.files[fd].bindings == []


# ---- dirty logging --------------------------------------------------------------------------------------------------


def logging(box: Box, on: bool) -> None:
    box.fd.set_user_memory_region2(0, int(on), 0, len(box.vm.slots.by_id[0].lpage[2]) * M2, box.hva)


@pytest.mark.assumes(dirty_logging=True)
def test_enabling_the_log_splits_and_write_protects() -> None:
    """Eager split on enabling dirty log; both views translate equally."""
    box = Box(DEFAULT, 1024, backing="2m")
    box.touch(slice(0, 700, 1))
    before = {gfn: box.pfn(gfn) for gfn in (5, 511, 512, 1000)}

    logging(box, True)

    assert {gfn: box.pfn(gfn) for gfn in before} == before
    assert (box.root().leaves[1], box.root().leaves[2]) == (1024, 0)
    assert not any(box.writable(gfn) for gfn in before)
    assert box.vm.vcpus[0].tlb.entries == {}
    assert box.fd.get_dirty_log(0).sum() == 0


@pytest.mark.assumes(dirty_logging=True)
def test_the_log_tells_what_was_written() -> None:
    box = Box(DEFAULT, 512)
    logging(box, True)
    box.touch(slice(3, 6, 1))

    assert np.flatnonzero(box.fd.get_dirty_log(0)).tolist() == [3, 4, 5]
    assert box.fd.get_dirty_log(0).sum() == 0
    box.touch(4)
    assert np.flatnonzero(box.fd.get_dirty_log(0)).tolist() == [4]


@pytest.mark.assumes(dirty_logging=True)
def test_a_read_does_not_dirty_a_protected_page() -> None:
    box = Box(DEFAULT, 512)
    box.touch(slice(3, 6, 1))
    logging(box, True)

    box.read(slice(3, 6, 1))

    assert box.fd.get_dirty_log(0).sum() == 0


@pytest.mark.assumes(dirty_logging=True)
def test_a_read_fault_does_not_dirty_a_protected_page() -> None:
    """It finds the page mapped, and protected still."""
    box = Box(DEFAULT, 8)
    box.fd.set_user_memory_region2(1, KVM_MEM_LOG_DIRTY_PAGES, 1 << 30, 4 * PAGE, box.process.mmap(4 * PAGE))
    box.touch(1 << 18)
    box.fd.get_dirty_log(1)

    box.vcpus[0].pre_fault_memory(1 << 30, 2 * PAGE)

    # The page that was not there comes writable, so nobody would hear of a write to it.
    assert list(box.fd.get_dirty_log(1)) == [0, 1, 0, 0]


@pytest.mark.assumes(dirty_logging=True)
def test_a_write_through_the_tlb_is_logged() -> None:
    """Getting the log takes write access away and flushes, so that the next write is seen."""
    box = Box(DEFAULT, 512)
    logging(box, True)
    box.touch(3)
    assert np.flatnonzero(box.fd.get_dirty_log(0)).tolist() == [3]

    box.touch(3)

    assert np.flatnonzero(box.fd.get_dirty_log(0)).tolist() == [3]


@pytest.mark.assumes(needs_pin=False)
def test_ending_the_log_brings_large_pages_back() -> None:
    """A table whose block may be huge and has any present leaf is replaced by a huge leaf, then one flush."""
    box = Box(DEFAULT, 1536, backing="2m")
    box.touch(slice(0, 1536, 1))
    logging(box, True)
    box.touch(slice(0, 600, 1))
    box.process.madvise_dontneed(box.hva + 1100 * PAGE, PAGE)

    logging(box, False)

    assert [box.level(gfn) for gfn in (5, 600, 1030)] == [2, 2, 1]
    assert box.read(slice(598, 602, 1)) == [1598, 1599, 1600, 1601]
    assert box.vm.slots.by_id[0].dirty is None
    assert box.host.meter.counts["hugepage_merge"] == 2


@pytest.mark.assumes(dirty_logging=True)
def test_a_move_may_end_the_log() -> None:
    box = Box(DEFAULT, 8)
    hva = box.process.mmap(4 * PAGE)
    box.fd.set_user_memory_region2(1, KVM_MEM_LOG_DIRTY_PAGES, 1 << 30, 4 * PAGE, hva)

    box.fd.set_user_memory_region2(1, 0, 1 << 31, 4 * PAGE, hva)

    with pytest.raises(UapiError, match="ENOENT"):
        box.fd.get_dirty_log(1)


@pytest.mark.assumes(needs_pin=False)
def test_a_recovered_page_keeps_its_rights() -> None:
    """A read-only slot stays read-only."""
    box = Box(DEFAULT, 8, backing="2m")
    hva = box.process.mmap(M2)
    box.process.write(hva, 5, 1)
    gfn = 1 << 18
    box.fd.set_user_memory_region2(1, 2 | 1, 1 << 30, M2, hva)
    box.read(gfn)

    box.fd.set_user_memory_region2(1, 2, 1 << 30, M2, hva)

    assert (box.level(gfn), box.writable(gfn)) == (2, False)
    assert box.touch(gfn) is not None
