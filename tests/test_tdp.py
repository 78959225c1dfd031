"""The page tables: roots and their entries, and set_entry, the only writer (kvm-core.md sections 1, 2 and 6)."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from fakes import MEDIATED, MIRROR, PAGE, Box, sel
from hypothesis import given, settings
from hypothesis import strategies as st

from cvmcore.backends.default import DEFAULT
from cvmcore.backends.swprot import SWPROT
from cvmcore.effects import FAULT_COMMIT, FAULT_FREEZE, FAULT_HOOK, Effect, Steps, drain
from cvmcore.errors import UapiError
from cvmcore.mem.tdp import FRAME_SHIFT, FROZEN, PRESENT, TABLE, WRITABLE, Root, TableCache
from cvmcore.pages import array_of, contiguous, run, sort_unique, words_of
from cvmcore.types import PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K, Batch, Fatal, Filter, Reason, Retry, Use, Walk

NR = 4 * 512


def root_with(*leaves: tuple[int, int, int]) -> Root:
    """A root with leaves (level, block, pfn) and the tables above them; small leaves of even pfn are writable."""
    root = Root(Filter.BOTH, end_gfn=NR)
    for level, block, pfn in leaves:
        for above in range(level + 1, 5):
            root.entries[above][block >> 9 * (above - level)] = PRESENT | TABLE
        root.entries[level][block] = pfn << FRAME_SHIFT | PRESENT | (WRITABLE if pfn % 2 == 0 else 0)
        root.leaves[level] += 1
    return root


# ---- entries --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 1 << 26), max_size=30, unique=True), st.integers(0, 15))
def test_words_of(pfns: list[int], bits: int) -> None:
    """frame << 5 | state, up to 2**26 frames (256 GiB)."""
    words = words_of(contiguous(np.array(pfns, np.int64)), bits)

    assert words.dtype == np.uint32
    assert words.tolist() == [pfn << 5 | bits for pfn in pfns]


def test_leaf_words_of_a_run_of_large_pages() -> None:
    assert words_of(run(512, 3, 512), 5).tolist() == [512 << 5 | 5, 1024 << 5 | 5, 1536 << 5 | 5]


def test_an_untouched_root_costs_nothing() -> None:
    root = Root(Filter.BOTH, end_gfn=1 << 30)

    assert root.table_bytes == 4096
    assert root.pages_mapped == 0
    assert [len(root.entries[level]) for level in range(1, 5)] == [1 << 30, 1 << 21, 1 << 12, 1 << 3]


# ---- what the CPU does ----------------------------------------------------------------------------------------------

SMALL = st.dictionaries(st.integers(0, 2 * 512 - 1), st.integers(1, 5000), max_size=30)
LARGE = st.dictionaries(st.integers(2, 3), st.integers(1, 9).map(lambda n: n * 512), max_size=2)
GFNS = st.lists(st.integers(0, NR - 1), min_size=1, max_size=40) | st.integers(0, NR - 40).map(
    lambda start: list(range(start, start + 40))
)


@settings(max_examples=60, deadline=None)
@given(SMALL, LARGE, GFNS, st.booleans())
def test_lookup_walks(small: dict[int, int], large: dict[int, int], numbers: list[int], write: bool) -> None:
    """Each gfn by itself: the leaf of whatever level that maps it, and whether it may be written."""
    root = root_with(*[(1, gfn, pfn) for gfn, pfn in small.items()], *[(2, block, pfn) for block, pfn in large.items()])
    gfns = sort_unique(np.array(numbers))
    want: dict[int, tuple[int, int]] = {gfn: (pfn, 1) for gfn, pfn in small.items() if not write or pfn % 2 == 0}
    for block, pfn in large.items():
        want.update({(block << 9) + i: (pfn + i, 2) for i in range(512)})

    status, pfns, levels = root.lookup(gfns, write)

    pages = array_of(gfns).tolist()
    ok = [s == Walk.OK for s in np.broadcast_to(np.asarray(status), len(pages)).tolist()]
    assert ok == [gfn in want for gfn in pages]
    for at, gfn in enumerate(pages):
        if ok[at]:
            level = levels if isinstance(levels, int) else int(levels[at])
            assert (int(array_of(pfns)[at]), level) == want[gfn]


def test_lookup_of_one_kind_is_one_status() -> None:
    root = root_with((1, 3, 10), (1, 4, 12))

    assert root.lookup(slice(3, 5, 1), True)[0] == Walk.OK
    assert root.lookup(slice(5, 9, 1), False)[0] == Walk.MISS


def test_a_frozen_entry_translates_nothing() -> None:
    root = root_with((1, 3, 10))
    root.entries[1][4] = FROZEN

    status, _, _ = root.lookup(slice(3, 5, 1), False)

    assert np.asarray(status).tolist() == [Walk.OK, Walk.MISS]


# ---- walking --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(SMALL, LARGE, st.integers(0, NR - 1), st.integers(1, NR))
def test_leaves_in_a_range(small: dict[int, int], large: dict[int, int], start: int, n: int) -> None:
    """Every leaf that overlaps the range, at its own level, the largest first; nothing else."""
    root = root_with(*[(1, gfn, pfn) for gfn, pfn in small.items()], *[(2, block, pfn) for block, pfn in large.items()])
    end = min(start + n, NR)

    found = [(level, block) for level, index in root.leaves_in(start, end) for block in array_of(index).tolist()]

    want = [(2, block) for block in sorted(large) if block << 9 < end and start < (block + 1) << 9]
    want += [(1, gfn) for gfn in sorted(small) if start <= gfn < end]
    assert found == want


@settings(max_examples=40, deadline=None)
@given(SMALL, LARGE, st.integers(0, NR - 1))
def test_level_at(small: dict[int, int], large: dict[int, int], gfn: int) -> None:
    root = root_with(*[(1, gfn, pfn) for gfn, pfn in small.items()], *[(2, block, pfn) for block, pfn in large.items()])

    assert root.level_at(gfn) == (2 if gfn >> 9 in large else 1 if gfn in small else 0)


def test_level_beyond_the_root() -> None:
    assert root_with((1, 3, 10)).level_at(1 << 40) == 0


def test_a_range_with_the_leaves_that_overlap_it() -> None:
    root = root_with((1, 3, 10), (2, 2, 512), (2, 3, 1024))

    assert root.widened(3, 4) == (3, 4)
    assert root.widened(1030, 1031) == (1024, 1536)
    assert root.widened(3, 1540) == (3, 2048)
    assert root.widened(900, 901) == (900, 901)


# ---- which roots there are ------------------------------------------------------------------------------------------


@pytest.mark.assumes(has_mirror=False)
def test_roots_of_the_vm_types() -> None:
    """A mirror root exists only if the VM has an external table."""
    swprot, mirrored, other = Box(SWPROT, 8).vm.tdp, Box(MIRROR, 8).vm.tdp, Box(MEDIATED, 8).vm.tdp

    assert swprot.mirror is None
    assert (swprot.direct.kind, swprot.direct.external) == (Filter.BOTH, False)
    assert mirrored.mirror is not None
    assert (mirrored.mirror.kind, mirrored.mirror.mirror, mirrored.direct.kind) == (Filter.PRIVATE, True, Filter.SHARED)
    assert other.mirror is None
    assert (other.direct.external, other.direct.flat, other.direct.mirror) == (True, True, False)
    assert [mirrored.root_for(private) for private in (True, False)] == [mirrored.mirror, mirrored.direct]
    assert [other.root_for(private) for private in (True, False)] == [other.direct] * 2


def test_a_fast_zap_replaces_the_direct_root() -> None:
    """The mirror survives."""
    box = Box(MIRROR, 8)
    box.touch(3)
    mirror_root, direct = box.vm.tdp.mirror, box.vm.tdp.direct

    assert box.vm.tdp.fast_zap() is direct

    assert box.vm.tdp.mirror is mirror_root
    assert box.vm.tdp.invalid == [direct]
    assert len(box.vm.tdp.direct.entries[1]) == len(direct.entries[1])
    box.vm.tdp.drop_root(direct)
    assert box.vm.tdp.invalid == []


# ---- set_entry ------------------------------------------------------------------------------------------------------


def steps_of(steps: Steps[Any], seen: list[Any], look: Any) -> Any:
    """Run an operation, noting points and what `look` sees there."""
    try:
        while True:
            effect: Effect = next(steps)
            if effect in (FAULT_FREEZE, FAULT_HOOK, FAULT_COMMIT):
                seen.append((effect.name, look()))
    except StopIteration as stop:
        return stop.value


@pytest.mark.parametrize("refused", [None, 0, 1, 2])
def test_a_mirror_entry_is_frozen_until_the_hook_returns(refused: int | None) -> None:
    """Compare-exchange to FROZEN, hook, then the new value, or the old one from where the hook stopped."""
    box = Box(MIRROR, 8)
    box.touch(7)
    root = box.root()
    if refused is not None:
        box.hw.refuse("set_private_spte", 1, refused, Retry())
    pfns = box.inode.populate(slice(2, 5, 1))
    batch = Batch(box.vm.slots.by_id[0], 1, slice(2, 5, 1), pfns)
    new = words_of(pfns, PRESENT | WRITABLE)
    seen: list[Any] = []

    steps = box.vm.tdp.set_entry(root, 1, slice(2, 5, 1), new, "set_private_spte", {"batch": batch})
    stop = steps_of(steps, seen, lambda: root.entries[1][2:5].tolist())

    done = 3 if refused is None else refused
    want = [*new.tolist()[:done], *[0] * (3 - done)]
    assert seen == [("fault.freeze", [FROZEN] * 3), ("fault.hook", [FROZEN] * 3), ("fault.commit", want)]
    assert root.entries[1][2:5].tolist() == want
    assert (None if stop is None else (stop.done, stop.reason)) == (None if refused is None else (refused, Retry()))


def test_a_direct_entry_is_written_at_once() -> None:
    box = Box(SWPROT, 8)
    root = box.root()

    assert list(box.vm.tdp.set_entry(root, 1, sel(2, 5), words_of(sel(9, 10), PRESENT))) == []
    assert root.entries[1][[2, 5]].tolist() == [9 << 5 | 1, 10 << 5 | 1]


def test_counts_of_leaves_and_tables() -> None:
    """Table pages by level, for their memory; leaves by level."""
    for backend in (SWPROT, MIRROR):
        box = Box(backend, 2048)
        box.touch(sel(3, 4, 600, 1100))
        root = box.root()
        assert (root.leaves[1:4], root.tables[2:5]) == ([4, 0, 0], [3, 1, 1])
        assert root.table_bytes == 6 * 4096
        assert root.pages_mapped == 4
        box.punch(4)
        assert (root.leaves[1], root.tables[2:5]) == (3, [3, 1, 1])


def test_a_mediated_root_has_no_table_pages() -> None:
    box = Box(MEDIATED, 2048)

    box.touch(sel(3, 600))

    assert box.root().table_bytes == 0
    assert Use.TABLE not in box.host.frames.outstanding()
    assert box.hw.trace[-1] == ("set", 3, 2, 1)


# ---- split ----------------------------------------------------------------------------------------------------------


@pytest.mark.assumes(dirty_logging=True)
def test_split_of_a_direct_leaf_keeps_every_translation() -> None:
    """512 children inherit permissions; no flush."""
    box = Box(DEFAULT, 1024, backing="2m")
    hva = box.process.mmap(512 * PAGE)
    box.process.write(hva, 1, 1)
    box.fd.set_user_memory_region2(1, 2, 1 << 30, 512 * PAGE, hva)
    box.touch(600)
    box.read(1 << 18)
    pfns = {gfn: box.pfn(gfn) for gfn in (512, 777, 1023, 1 << 18)}
    tlb = dict(box.vm.vcpus[0].tlb.entries)
    tdp = box.vm.tdp

    for gfn in (512, 1 << 18):
        assert drain(tdp.split(tdp.direct, gfn, 2)) is None

    assert {gfn: box.pfn(gfn) for gfn in pfns} == pfns
    assert [(box.level(gfn), box.writable(gfn)) for gfn in pfns] == [(1, True)] * 3 + [(1, False)]
    assert box.vm.vcpus[0].tlb.entries == tlb
    assert box.host.meter.counts["hugepage_split"] == 2


def test_split_of_a_mirror_leaf_keeps_content() -> None:
    box = Box(MIRROR, 1024, backing="2m")
    box.touch(slice(512, 1024, 1))

    cache = TableCache(box.host.frames)
    cache.topup(1)
    assert drain(box.vm.tdp.split(box.root(), 512, 2, cache)) is None

    box.check_mirror()
    assert box.read(sel(512, 777, 1023)) == [1512, 1777, 2023]
    assert (box.root().leaves[1:3], box.root().tables[2]) == ([512, 0], 1)


@pytest.mark.parametrize("reason", [Retry(), Fatal(errno.EIO)])
def test_a_refused_split_keeps_the_huge_leaf(reason: Any) -> None:
    """The reason is returned, the table page freed."""
    box = Box(MIRROR, 1024, backing="2m")
    box.touch(600)
    tables = box.host.frames.outstanding()[Use.TABLE]
    box.hw.refuse("split_private_spt", 1, 0, reason)

    cache = TableCache(box.host.frames)
    cache.topup(1)
    stop = drain(box.vm.tdp.split(box.root(), 512, 2, cache))

    assert stop is not None
    assert stop.reason == reason
    assert (box.level(600), box.host.frames.outstanding()[Use.TABLE]) == (2, tables)
    box.check_mirror()


# ---- promote --------------------------------------------------------------------------------------------------------


def small_block(box: Box) -> None:
    """Block 0 mapped by 512 small leaves on a large folio."""
    box.set_private(5, private=False)
    box.touch(slice(0, 5, 1), private=True)
    box.touch(slice(6, 512, 1), private=True)
    box.set_private(5)
    box.touch(5, private=True)


def test_promote_keeps_content_and_gives_the_table_back() -> None:
    box = Box(MIRROR, 1024, backing="2m")
    small_block(box)
    tdp, root = box.vm.tdp, box.root()
    tables = box.host.frames.outstanding()[Use.TABLE]
    assert tdp.can_be_huge(root, 0, 2) == box.pfn(0)

    assert drain(tdp.promote(root, 0, 2)) is None

    assert (box.level(100), root.leaves[1:3], root.tables[2]) == (2, [0, 1], 0)
    assert box.host.frames.outstanding()[Use.TABLE] == tables - 1
    assert box.read(slice(3, 8, 1)) == [1003, 1004, 1005, 1006, 1007]
    box.check_mirror()
    box.destroy()


@pytest.mark.parametrize("reason", [Retry(), Fatal(errno.EBUSY)])
def test_a_refused_promotion_changes_nothing(reason: Any) -> None:
    """Failure unblocks and keeps 4K."""
    box = Box(MIRROR, 1024, backing="2m")
    small_block(box)
    before = box.root().entries[1].tolist(), box.root().entries[2].tolist()
    box.hw.refuse("promote_private_spt", 1, 0, reason)

    stop = drain(box.vm.tdp.promote(box.root(), 0, 2))

    assert stop is not None
    assert (box.root().entries[1].tolist(), box.root().entries[2].tolist()) == before
    box.check_mirror()


def test_what_cannot_be_promoted() -> None:
    """Need contiguous pfns and equal state: a missing page, other frames, other rights, no table."""
    box = Box(MIRROR, 1536, backing="2m")
    small_block(box)
    tdp, root = box.vm.tdp, box.root()
    entries = root.entries[1]

    def changed(gfn: int, word: int) -> int | None:
        old = int(entries[gfn])
        entries[gfn] = word
        answer = tdp.can_be_huge(root, 0, 2)
        entries[gfn] = old
        return answer

    assert changed(7, 0) is None
    assert changed(0, 0) is None
    assert changed(7, FROZEN) is None
    assert changed(7, int(entries[8])) is None
    assert changed(7, int(entries[7]) & ~WRITABLE) is None
    assert changed(7, int(entries[7]) | 8) == box.pfn(0)
    assert tdp.can_be_huge(root, 512, 2) is None
    box.touch(600)
    assert tdp.can_be_huge(root, 512, 2) is None


def test_pages_on_small_folios_cannot_be_promoted() -> None:
    box = Box(MIRROR, 512)
    box.touch(slice(0, 512, 1))

    assert box.vm.tdp.can_be_huge(box.root(), 0, 2) is None


def giant() -> Box:
    """1 GiB of guest memory mapped by one leaf: 512 large pages on aligned frames, promoted."""
    box = Box(MIRROR, 1 << 18, backing="2m", nr_frames=(2 << 18) + 1024)
    box.host.frames.alloc((1 << 18) - 1, Use.ANON)  # so that the guest's memory starts on an aligned frame
    box.vcpus[0].pre_fault_memory(0, PAGE << 18)
    assert drain(box.vm.tdp.promote(box.root(), 0, PG_LEVEL_1G)) is None
    return box


def test_a_1g_leaf() -> None:
    box = giant()

    box.touch(sel(5, 600, 100_000))

    assert (box.level(100_000), box.pfn(100_000)) == (3, (1 << 18) + 100_000)
    assert box.read(sel(5, 599, 600, 100_000)) == [1005, 0, 1600, 101_000]
    assert box.root().leaves[1:4] == [0, 0, 1]
    assert box.root().lookup(sel(5, 600), True)[2] == 3
    box.check_mirror()


def test_a_range_within_a_1g_leaf() -> None:
    """Split at 1G first, then at 2M: at most two blocks per level."""
    box = giant()
    box.touch(sel(5, 699, 900, 1023, 100_000))
    box.hw.trace.clear()

    box.set_private(700, 200, private=False)

    assert [call for call in box.hw.trace if call[0] == "split"] == [("split", 0, 1, 3), ("split", 512, 1, 2)]
    assert [box.level(gfn) for gfn in (5, 699, 700, 899, 900, 100_000)] == [2, 1, 0, 0, 1, 2]
    assert box.read(sel(5, 699, 900, 1023, 100_000)) == [1005, 1699, 1900, 2023, 101_000]
    box.check_mirror()


# ---- before the VM runs ---------------------------------------------------------------------------------------------


def test_map_private() -> None:
    """kvm_tdp_mmu_map_private_pfn: level 4K, through the set hook; anything but FIXED is -EIO."""
    box = Box(MIRROR, 1024, backing="2m")
    slot = box.vm.slots.by_id[0]
    batch = Batch(slot, PG_LEVEL_4K, slice(3, 6, 1), box.inode.populate(slice(3, 6, 1)))

    drain(box.vm.map_private(batch))

    assert (box.mapped(), box.level(3)) == ([3, 4, 5], 1)
    box.check_mirror()
    with pytest.raises(UapiError) as caught:
        drain(box.vm.map_private(batch))
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(("reason", "error"), [(Retry(), errno.EBUSY), (Fatal(errno.EFAULT), errno.EIO)], ids=str)
@pytest.mark.parametrize("hook", ["link_private_spt", "set_private_spte"])
def test_map_private_that_is_refused(hook: str, reason: Reason, error: int) -> None:
    """Busy is told apart, as by the ioctl that loads an image; all else is EIO."""
    box = Box(MIRROR, 1024)
    slot = box.vm.slots.by_id[0]
    batch = Batch(slot, PG_LEVEL_4K, slice(3, 6, 1), box.inode.populate(slice(3, 6, 1)))
    box.hw.refuse(hook, 1, 0, reason)

    with pytest.raises(UapiError) as caught:
        drain(box.vm.map_private(batch))

    assert (caught.value.errno, box.mapped()) == (error, [])
    box.check_mirror()


# ---- rights ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(SMALL, st.integers(0, 1023), st.integers(1, 1024))
def test_write_protect(small: dict[int, int], start: int, n: int) -> None:
    """Small leaves in the range lose write access, and only those; returns how many had it."""
    box = Box(DEFAULT, NR)
    root = root_with(*[(1, gfn, pfn) for gfn, pfn in small.items()])

    protected = box.vm.tdp.write_protect(root, slice(start, min(start + n, 1024), 1))

    had = [gfn for gfn, pfn in small.items() if pfn % 2 == 0]
    lost = [gfn for gfn in had if start <= gfn < start + n]
    assert protected == len(lost)
    writable = np.flatnonzero(root.entries[1] & WRITABLE).tolist()
    assert writable == sorted(set(had) - set(lost))
    assert np.flatnonzero(root.entries[1] & PRESENT).tolist() == sorted(small)


# ---- freeing --------------------------------------------------------------------------------------------------------


def test_tables_of_a_mirror_are_freed_bottom_up() -> None:
    """Each through free_external_spt, after its children (row 12)."""
    box = Box(MIRROR, 4 << 9)
    box.touch(sel(3, 600, 1200, 1700))
    box.punch(0, 4 << 9)
    box.hw.trace.clear()

    drain(box.vm.tdp.free_mirror())

    assert [(call[1], call[2], call[3]) for call in box.hw.trace] == [(0, 4, 2), (0, 1, 3), (0, 1, 4)]
    assert box.vm.arch.entries == {}
    assert Use.TABLE not in box.host.frames.outstanding()
    assert all(not root.any() for root in box.root().entries)


def test_tables_that_the_vendor_keeps_are_leaked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warn, forget (leak) the table page."""
    box = Box(MIRROR, 1024)
    box.touch(sel(3, 600))

    def keep(vm: Any, gfns: Any, level: int, tables: Any) -> Any:
        for gfn, frame in zip(array_of(gfns).tolist(), array_of(tables).tolist(), strict=True):
            vm.arch.drop(gfn, level, "table", frame)
        if level > PG_LEVEL_2M:
            return tables
        vm.host.frames.leak(tables, "kept")
        return slice(0, 0, 1)

    monkeypatch.setattr(box.host.ops.hooks["free_private_spt"], "fn", keep)
    monkeypatch.setattr(box.host.ops.hooks["free_private_spt"], "arguments", ("vm", "gfns", "level", "tables"))
    box.destroy()

    assert box.host.frames.leaked() == 2
