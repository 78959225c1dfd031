"""Sections 2.6, 4.4 and 7.1: what the guest meets, what becomes of content, what the host can do to TD memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cvmcore.memory import SCRAMBLED
from cvmcore.pages import run
from cvmcore.types import HostVerdict, Walk
from cvmcore_tdx.errors import describe
from cvmcore_tdx.hw import Accept, SeptState

S = SeptState
HKID = 65

# state of the entry found -> (at the level asked for, above it, read, write); None: the state does not exist there
MEETS: dict[SeptState, tuple[Accept, Accept | None, Walk | None, Walk | None]] = {
    S.FREE: (Accept.EPT_VIOLATION, Accept.EPT_VIOLATION, Walk.MISS, Walk.MISS),
    S.REMOVED: (Accept.EPT_VIOLATION, Accept.EPT_VIOLATION, Walk.MISS, Walk.MISS),
    S.MAPPED: (Accept.ALREADY_ACCEPTED, Accept.ALREADY_ACCEPTED, Walk.OK, Walk.OK),
    S.BLOCKED: (Accept.EPT_VIOLATION, Accept.EPT_VIOLATION, Walk.MISS, Walk.MISS),
    S.PENDING: (Accept.ACCEPTED, Accept.EPT_VIOLATION_LARGER, Walk.UNACCEPTED, Walk.UNACCEPTED),
    S.PENDING_BLOCKED: (Accept.EPT_VIOLATION, Accept.EPT_VIOLATION, Walk.MISS, Walk.MISS),
    S.BLOCKEDW: (Accept.ALREADY_ACCEPTED, Accept.ALREADY_ACCEPTED, Walk.OK, Walk.MISS),
    S.EXPORTED_BLOCKEDW: (Accept.ALREADY_ACCEPTED, Accept.ALREADY_ACCEPTED, Walk.OK, Walk.MISS),
    S.EXPORTED_DIRTY: (Accept.ALREADY_ACCEPTED, Accept.ALREADY_ACCEPTED, Walk.OK, Walk.OK),
    S.EXPORTED_DIRTY_BLOCKEDW: (Accept.ALREADY_ACCEPTED, Accept.ALREADY_ACCEPTED, Walk.OK, Walk.MISS),
    S.PENDING_BLOCKEDW: (Accept.EPT_VIOLATION, Accept.EPT_VIOLATION, Walk.MISS, Walk.MISS),
    S.PENDING_EXPORTED_BLOCKEDW: (Accept.EPT_VIOLATION, Accept.EPT_VIOLATION, Walk.MISS, Walk.MISS),
    S.PENDING_EXPORTED_DIRTY: (
        Accept.ACCEPTED, Accept.EPT_VIOLATION_LARGER, Walk.UNACCEPTED, Walk.UNACCEPTED,
    ),
    S.PENDING_EXPORTED_DIRTY_BLOCKEDW: (Accept.EPT_VIOLATION, Accept.EPT_VIOLATION, Walk.MISS, Walk.MISS),
    S.NL_MAPPED: (Accept.SIZE_MISMATCH, None, None, None),
    S.NL_BLOCKED: (Accept.EPT_VIOLATION, Accept.EPT_VIOLATION, Walk.MISS, Walk.MISS),
}  # fmt: skip
AFTER = {S.PENDING: S.MAPPED, S.PENDING_EXPORTED_DIRTY: S.EXPORTED_DIRTY}


def name_of(value: Any) -> str:
    return getattr(value, "name", str(value))


AT_LEVEL = [(state, level) for state in S for level in (0, 1) if level or state < 24]  # no tables at 4K


@pytest.mark.parametrize(("state", "level"), AT_LEVEL, ids=name_of)
def test_accept_at_level(world: Any, state: SeptState, level: int) -> None:
    """ACCEPT of a page for which the walk ends at the level asked for."""
    world.run()
    gfn, pfn = (7, 70) if level == 0 else (1024, 1024)
    world.tables(gfn, level + 1)
    world.plant(level, gfn, state, pfn)
    world.memory.write(run(pfn, 1), 1234, HKID)
    before = world.snapshot()

    result = world.module.tdg_mem_page_accept(world.tdr, level, run(gfn, 1))

    expected = MEETS[state][0]
    assert Accept(result.outcome) is expected
    if expected is Accept.ACCEPTED:
        assert world.entry(level, gfn) == (AFTER[state], pfn)
        assert world.memory.read(run(pfn, 1), HKID)[0] == 0
    else:
        assert world.snapshot() == before


@pytest.mark.parametrize("state", [s for s in S if s is not S.NL_MAPPED], ids=name_of)
def test_accept_below_what_is_found(world: Any, state: SeptState) -> None:
    """ACCEPT of a 4K page where the walk stops at 2M."""
    expected = MEETS[state][1]
    world.run()
    world.tables(1024, 2)
    world.plant(1, 1024, state, 1024)
    before = world.snapshot()

    result = world.module.tdg_mem_page_accept(world.tdr, 0, run(1030, 2))

    assert Accept(result.outcome) is expected
    assert world.snapshot() == before


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize(("state", "level"), [c for c in AT_LEVEL if c[0] is not S.NL_MAPPED], ids=name_of)
def test_access(world: Any, state: SeptState, level: int, write: bool) -> None:
    """Reads and writes of a page by the state of its leaf, small or large."""
    expected = MEETS[state][3 if write else 2]
    world.run()
    gfn, pfn = (7, 70) if level == 0 else (1024, 1024)
    world.tables(gfn, level + 1)
    world.plant(level, gfn, state, pfn)

    result = world.module.guest_access(world.tdr, run(gfn + (0 if level == 0 else 9), 1), write)

    assert Walk(result.status) is expected
    if expected is Walk.OK:
        assert result.pfns == slice(70, 71, 1) if level == 0 else slice(1033, 1034, 1)


def test_statuses_of_accept(world: Any) -> None:
    """What the guest sees in RAX; nothing where the call ended in an exit instead."""
    world.run()
    world.tables(1024, 2)
    world.map(run(1024, 1), run(1024, 1), level=1)
    accept = world.module.tdg_mem_page_accept

    assert accept(world.tdr, 1, run(0, 1)).status() == (0xC000_0B0B << 32) + 1
    assert describe(accept(world.tdr, 0, run(1030, 1)).status()) == "TDX_PAGE_ALREADY_ACCEPTED|level 1"
    assert accept(world.tdr, 0, run(5, 1)).status() is None
    world.aug(run(5, 1), run(50, 1))
    mixed = accept(world.tdr, 0, np.array([5, 1030, 1536]))
    assert [mixed.status(i) for i in range(3)] == [0, 0x0000_0B0A << 32 | 1, None]


def test_what_the_host_learns_of_an_accept(world: Any) -> None:
    """Extended exit qualification: level asked for [2:0], level found [5:3], state found [13:6], leaf [14]."""
    world.run()
    world.tables(1024, 2)
    world.aug(run(1024, 1), run(1024, 1), level=1)
    accept = world.module.tdg_mem_page_accept

    assert accept(world.tdr, 0, run(1030, 1)).violation() == 0 | 1 << 3 | 2 << 6 | 1 << 14  # PENDING, 2M
    assert accept(world.tdr, 1, run(1536, 1)).violation() == 1 | 1 << 3 | 0 << 6  # FREE
    assert accept(world.tdr, 0, run(5, 1)).violation() == 0
    world.block(run(0, 1), level=1)
    assert accept(world.tdr, 0, run(5, 1)).violation() == 0 | 1 << 3 | 129 << 6  # NL_BLOCKED
    both = accept(world.tdr, 0, np.array([5, 1030]))
    assert [both.violation(i) for i in range(2)] == [1 << 3 | 129 << 6, None]
    assert accept(world.tdr, 1, run(1024, 1)).violation() is None


def test_a_mixed_batch(world: Any) -> None:
    """Each page of an access stands for itself, an accept ends at the first that is not accepted; frames are given for
    those that are OK."""
    world.run()
    world.tables(1024, 2)
    world.tables(512, 1)
    world.map(run(1024, 1), run(1024, 1), level=1)
    world.map(run(0, 4), np.array([90, 70, 71, 72]))
    world.aug(run(512, 4), run(100, 4))
    gfns = np.array([0, 1, 2, 3, 4, 512, 515, 600, 1024, 1500, 1536, 1 << 20])

    walk = world.module.guest_access(world.tdr, gfns, True)

    assert walk.status.tolist() == [0, 0, 0, 0, 1, 2, 2, 1, 0, 0, 1, 1]
    assert walk.pfns[walk.status == 0].tolist() == [90, 70, 71, 72, 1024, 1500]
    accepted = world.module.tdg_mem_page_accept(world.tdr, 0, gfns)
    assert accepted.outcome.tolist() == [1, 1, 1, 1, 3, 6, 6, 6, 6, 6, 6, 6]
    assert world.entry(0, 515) == (S.PENDING, 103)
    assert [accepted.status(i) for i in (0, 4, 5)] == [0x0000_0B0A << 32, None, None]
    accepted = world.module.tdg_mem_page_accept(world.tdr, 0, gfns[5:])
    assert accepted.outcome.tolist() == [0, 0, 3, 6, 6, 6, 6]
    assert [world.entry(0, gfn) for gfn in (512, 513, 515)] == [(S.MAPPED, 100), (S.PENDING, 101), (S.MAPPED, 103)]


def test_pages_right_behind_one_that_is_refused_for_the_same_reason(world: Any) -> None:
    """The host has to do the same for each of them, so that they are told together; then nothing is reached."""
    world.run(1024)
    world.tables(512, 1)
    world.aug(run(512, 2), run(100, 2))
    world.aug(run(520, 1), run(102, 1))

    accepted = world.module.tdg_mem_page_accept(world.tdr, 0, np.array([512, 514, 515, 516, 520, 521]))

    assert accepted.outcome.tolist() == [0, 3, 3, 3, 6, 6]
    assert world.entry(0, 520) == (S.PENDING, 102)


def test_pages_of_both_sizes_in_one_state(world: Any) -> None:
    """Small and large pages side by side, all mapped or all pending."""
    world.run(512)
    world.tables(1024, 2)
    world.aug(run(512, 512), run(2000, 512))
    world.aug(run(1024, 1), run(1024, 1), level=1)
    gfns = run(1000, 40)

    pending = world.module.guest_access(world.tdr, gfns, True)
    accepted = world.module.tdg_mem_page_accept(world.tdr, 0, gfns)
    world.accept(run(1024, 1), level=1)
    walk = world.module.guest_access(world.tdr, gfns, True)

    assert pending.status == Walk.UNACCEPTED
    assert accepted.outcome.tolist() == [Accept.ACCEPTED] * 24 + [Accept.EPT_VIOLATION_LARGER] * 16
    assert walk.status == Walk.OK
    assert walk.pfns.tolist() == [*range(2488, 2512), *range(1024, 1040)]


def test_content(world: Any) -> None:
    """ADD copies, AUG shows nothing, ACCEPT zeroes, moving and splitting keep, REMOVE loses."""
    world.build()
    m, memory, tdr = world.module, world.memory, world.tdr
    memory.write(run(300, 1), 777, 0)
    world.done(m.tdh_mem_page_add(tdr, run(3, 1), run(60, 1), run(300, 1)), 1)
    assert memory.read(run(60, 1), HKID)[0] == 777
    assert memory.read(run(60, 1), 0)[0] == SCRAMBLED
    world.ok(m.tdh_mr_finalize(tdr))
    memory.write(run(61, 1), 888, 0)
    world.aug(run(4, 1), run(61, 1))
    assert memory.read(run(61, 1), 0)[0] == 888
    world.accept(run(4, 1))
    assert memory.read(run(61, 1), HKID)[0] == 0

    memory.write(run(61, 1), 999, HKID)  # the guest's own write
    world.block(run(4, 1))
    world.track()
    moved = m.tdh_mem_page_relocate(tdr, run(4, 1), run(62, 1))
    assert moved.pfns == slice(61, 62, 1)
    assert memory.read(run(62, 1), HKID)[0] == 999
    assert world.entry(0, 4) == (S.MAPPED, 62)
    world.block(run(4, 1))
    world.track()
    removed = m.tdh_mem_page_remove(tdr, 0, run(4, 1))
    assert removed.pfns == slice(62, 63, 1)
    world.map(run(4, 1), run(62, 1))
    assert memory.read(run(62, 1), HKID)[0] == 0


def test_split_and_merge_keep_content(world: Any) -> None:
    """A 2M page demoted and promoted again holds what it held."""
    world.run()
    world.tables(1024, 2)
    m, tdr = world.module, world.tdr
    world.map(run(1024, 1), run(1024, 1), level=1)
    stamps = np.arange(1, 513, dtype=np.uint32)
    world.memory.write(run(1024, 512), stamps, HKID)

    for split in (True, False):
        world.block(run(1024, 1), level=1)
        world.track()
        if split:
            world.done(m.tdh_mem_page_demote(tdr, 1, run(1024, 1), run(world.control(), 1)), 1)
        else:
            world.done(m.tdh_mem_page_promote(tdr, 1, run(1024, 1)), 1)
        walk = m.guest_access(tdr, run(1024, 512), True)
        assert (walk.status, walk.pfns) == (0, slice(1024, 1536, 1))
        np.testing.assert_array_equal(world.memory.read(walk.pfns, HKID), stamps)
        world.check()


def test_relocate_of_mixed_pages(world: Any) -> None:
    """Accepted pages move with their content, pending ones have none; old frames of the batch can be targets."""
    world.run()
    world.map(run(0, 2), run(60, 2))
    world.aug(run(2, 2), run(62, 2))
    world.memory.write(run(60, 4), [1, 2, 3, 4], HKID)
    world.block(run(0, 4))
    world.track()

    result = world.module.tdh_mem_page_relocate(world.tdr, run(0, 4), np.array([80, 60, 61, 62]))

    world.done(result, 4)
    assert [world.entry(0, gfn) for gfn in range(4)] == [
        (S.MAPPED, 80), (S.MAPPED, 60), (S.PENDING, 61), (S.PENDING, 62),
    ]  # fmt: skip
    assert world.memory.read(np.array([80, 60]), HKID).tolist() == [1, 2]
    world.check()


def test_the_host_looks_at_td_memory(new_world: Any) -> None:
    """It reads zeros, or ciphertext where there is no logical integrity; its own pages are none of the module's."""
    for zeros, verdict in ((True, HostVerdict.ZEROS), (False, HostVerdict.CIPHERTEXT)):
        world = new_world(reads_zeros=zeros).run()
        world.map(run(0, 4), run(60, 4))

        assert world.module.host_access(run(64, 4), True) is HostVerdict.OK
        assert world.module.host_access(run(63, 4), False) is verdict
        assert world.module.guest_access(world.tdr, run(0, 4), False).status == Walk.OK


def test_the_host_writes_td_memory(world: Any) -> None:
    """The write goes through; the TD's next access of that page is a machine check, and the TD is dead."""
    world.run()
    world.map(run(0, 4), run(60, 4))
    m = world.module

    assert m.host_access(run(61, 1), True) is HostVerdict.POISONED
    assert m.guest_access(world.tdr, run(2, 2), False).status == Walk.OK
    walk = m.guest_access(world.tdr, run(0, 4), False)
    assert walk.status.tolist() == [Walk.OK, Walk.DENIED, Walk.OK, Walk.OK]
    assert describe(m.tdh_mem_page_aug(world.tdr, 0, run(9, 1), run(70, 1)).status) == "TDX_TD_FATAL"
    assert m.guest_access(world.tdr, run(0, 4), False).status == Walk.DENIED


def test_the_host_writes_a_large_page_or_a_control_page(new_world: Any) -> None:
    """A frame within a 2M page counts as well; a page that only the module reads kills the TD at once."""
    world = new_world().run()
    world.tables(1024, 2)
    world.map(run(1024, 1), run(1024, 1), level=1)
    assert world.module.host_access(run(1100, 1), True) is HostVerdict.POISONED
    assert world.module.guest_access(world.tdr, run(1100, 1), True).status == Walk.DENIED

    other = new_world().run()
    assert other.module.host_access(run(other.tdr, 1), True) is HostVerdict.POISONED
    assert other.td.fatal


def test_the_module_reads_what_the_host_has_written(new_world: Any) -> None:
    """MR.EXTEND and RELOCATE read the page: machine check, the TD is dead; pages before it are done."""
    built = new_world().build()
    m, tdr = built.module, built.tdr
    built.done(m.tdh_mem_page_add(tdr, run(0, 2), run(60, 2), run(300, 2)), 2)
    m.host_access(run(61, 1), True)
    result = m.tdh_mr_extend(tdr, 0, 32)
    assert (result.done, describe(result.status), built.td.fatal) == (16, "TDX_TD_FATAL", True)

    world = new_world().run()
    world.map(run(0, 2), run(60, 2))
    world.aug(run(2, 1), run(62, 1))
    world.block(run(0, 3))
    world.track()
    m = world.module
    m.host_access(run(62, 1), True)
    assert m.tdh_mem_page_relocate(world.tdr, run(2, 1), run(72, 1)).status == 0  # pending: nothing to read
    m.host_access(run(61, 1), True)
    result = m.tdh_mem_page_relocate(world.tdr, run(0, 2), run(70, 2))
    assert (result.done, describe(result.status), result.pfns) == (1, "TDX_TD_FATAL", run(60, 1))
    assert (world.entry(0, 0), world.entry(0, 1)) == ((S.MAPPED, 70), (S.BLOCKED, 61))
    assert world.td.fatal


def test_a_page_that_left_the_td_is_whole_again(world: Any) -> None:
    """Poison ends when the page is removed, or zeroed by an accept."""
    world.run()
    world.map(run(0, 2), run(60, 2))
    world.aug(run(2, 1), run(62, 1))
    m = world.module
    m.host_access(run(61, 2), True)
    world.accept(run(2, 1))
    assert m.guest_access(world.tdr, run(2, 1), True).status == Walk.OK
    world.block(run(1, 1))
    world.track()
    m.tdh_mem_page_remove(world.tdr, 0, run(1, 1))
    world.map(run(1, 1), run(61, 1))

    assert m.guest_access(world.tdr, run(0, 3), True).status == Walk.OK


def test_a_td_that_cannot_run(world: Any) -> None:
    """There is no guest before finalisation, nor after the key is gone."""
    world.build()
    with pytest.raises(ValueError):
        world.module.guest_access(world.tdr, run(0, 1), True)
    world.ok(world.module.tdh_mr_finalize(world.tdr))
    assert world.module.guest_access(world.tdr, run(0, 1), True).status == Walk.MISS
    world.end()
    with pytest.raises(ValueError):
        world.module.tdg_mem_page_accept(world.tdr, 0, run(0, 1))


def test_a_page_that_left_the_td_is_the_hosts_once_it_is_flushed_and_cleared(new_world: Any) -> None:
    """Until then lines of the TD may come over what the host writes, and its key is in memory: both have to go."""
    for steps in (("wbinvd", "clear"), ("clear", "wbinvd"), ("wbinvd under another key", "clear"), ("clear",)):
        world = new_world().run()
        world.map(run(0, 4), run(60, 4))
        world.memory.write(run(60, 4), 7, HKID)
        world.block(run(0, 2))
        world.track()
        m = world.module
        world.done(m.tdh_mem_page_remove(world.tdr, 0, run(0, 2)), 2)
        assert m.host_access(run(60, 1), True) is HostVerdict.POISONED
        for step in steps:
            assert m.host_access(run(60, 2), True) is HostVerdict.POISONED
            if step == "clear":
                world.memory.clear(run(60, 2))
            else:
                world.done(m.tdh_phymem_page_wbinvd(run(60, 2), HKID if step == "wbinvd" else m.global_hkid), 2)
        left = HostVerdict.OK if len(steps) == 2 and "wbinvd" in steps else HostVerdict.POISONED

        assert m.host_access(run(60, 2), True) is left
        assert m.host_access(run(60, 2), False) is HostVerdict.OK
        world.check()


def test_cache_wb_writes_back_the_lines_of_all_pages_that_left_the_td(new_world: Any) -> None:
    """TDH.PHYMEM.CACHE.WB, once for each package, is for every line under the HKID, wherever in memory it is."""
    world = new_world(nr_frames=(1 << 21) + 512).run()
    pages = np.array([60, (1 << 20) + 5, (1 << 21) + 7])
    world.map(run(0, 3), pages)
    world.block(run(0, 3))
    world.track()
    m = world.module
    world.done(m.tdh_mem_page_remove(world.tdr, 0, run(0, 3)), 3)
    world.memory.clear(pages)
    for pfn in pages.tolist():
        assert m.host_access(run(pfn, 1), True) is HostVerdict.POISONED

    world.end()

    assert m.host_access(pages, True) is HostVerdict.OK
