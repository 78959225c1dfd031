"""Section 2.3: which of several failing checks decides, and what the statuses look like."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cvmcore.effects import Effect
from cvmcore.pages import run
from cvmcore_tdx.errors import Operand, Status, code, describe, is_busy, operand
from cvmcore_tdx.hw import LifeCycle, OpState, SeptState, Tdmr

S = SeptState


def status(result: Any) -> str:
    return describe(result if isinstance(result, int) else result.status)


def test_numbers() -> None:
    """The numbers are the ABI's: code in the high half, operand in the low one."""
    busy = Status.TDX_OPERAND_BUSY | Operand.SEPT_TREE

    assert busy == 0x8000_0200_0000_0092
    assert (code(busy), operand(busy), is_busy(busy)) == (Status.TDX_OPERAND_BUSY, 146, True)
    assert describe(busy) == "TDX_OPERAND_BUSY|SEPT_TREE"
    assert Status.TDX_TD_FATAL == 0xE000_0604 << 32
    assert Status.TDX_EPT_PAGE_NOT_FREE == 0xC000_0B0E << 32
    assert describe(Status.TDX_PAGE_SIZE_MISMATCH | 1) == "TDX_PAGE_SIZE_MISMATCH|level 1"
    assert describe(0x1234 << 32) == "0x0000123400000000"


def broken(world: Any, row: int) -> tuple[dict[str, Any], tuple[Effect, ...]]:
    """Make row `row` of the error order fail for an AUG of gfn 5 onto frame 60; arguments and taken locks."""
    td = world.td
    arguments: dict[str, Any] = {}
    busy: tuple[Effect, ...] = ()
    match row:
        case 1:
            arguments["tdr"] = 61
        case 2:
            td.fatal = True
        case 3:
            td.op_state = OpState.POST_EXPORT
        case 4:
            arguments["level"] = 2
        case 5:
            arguments["gfns"] = run(1 << 35, 1)
        case 6:
            busy = (td.tree.try_read,)
        case 7:
            arguments["gfns"] = arguments.get("gfns", run(600, 1))
        case 8:
            td.held[(0, 5)] = td.lock
            td.held[(0, 600)] = td.lock
        case 9:
            world.plant(0, 5, S.MAPPED, 77)
        case 12:
            world.plant(0, 9, S.MAPPED, 60)
    return arguments, busy


EXPECTED = {
    1: "TDX_PAGE_METADATA_INCORRECT|RDX",
    2: "TDX_TD_FATAL",
    3: "TDX_OP_STATE_INCORRECT",
    4: "TDX_OPERAND_INVALID|RCX",
    5: "TDX_OPERAND_INVALID|RCX",
    6: "TDX_OPERAND_BUSY|SEPT_TREE",
    7: "TDX_EPT_WALK_FAILED|RCX",
    8: "TDX_OPERAND_BUSY|RCX",
    9: "TDX_EPT_ENTRY_STATE_INCORRECT|RCX",
    12: "TDX_PAGE_METADATA_INCORRECT|R8",
}


@pytest.mark.parametrize(("first", "second"), [(a, b) for a in EXPECTED for b in EXPECTED if a <= b])
def test_the_earlier_row_wins(world: Any, busy: Any, first: int, second: int) -> None:
    """With two rows failing at once, the answer is that of the earlier one; and nothing has changed."""
    world.run()
    arguments: dict[str, Any] = {"tdr": world.tdr, "level": 0, "gfns": run(5, 1), "pfns": run(60, 1)}
    locks: tuple[Effect, ...] = ()
    for row in (second, first):
        more, taken = broken(world, row)
        arguments |= more
        locks += taken
    before = world.snapshot()

    result = busy(world.module.tdh_mem_page_aug.steps(**arguments), *locks)

    assert (result.done, status(result)) == (0, EXPECTED[first])
    assert world.snapshot() == before


def test_rows_of_the_state_of_the_td(world: Any, busy: Any) -> None:
    """Fatal before life cycle before TDCS pages before the op-state lock before the op state."""
    world.run()
    td, m = world.td, world.module

    def aug(*locks: Effect) -> str:
        return status(busy(m.tdh_mem_page_aug.steps(world.tdr, 0, run(5, 1), run(60, 1)), *locks))

    td.op_state = OpState.POST_EXPORT
    assert aug() == "TDX_OP_STATE_INCORRECT"
    assert aug(td.op_state_lock.try_read) == "TDX_OPERAND_BUSY|OP_STATE"
    td.nr_tdcx -= 1
    assert aug(td.op_state_lock.try_read) == "TDX_TDCS_NOT_ALLOCATED"
    td.life_cycle = LifeCycle.TD_BLOCKED
    assert aug(td.op_state_lock.try_read) == "TDX_TD_KEYS_NOT_CONFIGURED"
    td.fatal = True
    assert aug(td.op_state_lock.try_read) == "TDX_TD_FATAL"
    assert aug(td.lock.try_read) == "TDX_OPERAND_BUSY|RDX"


BUILD, AUG, SEPT_ADD, SHRINK, TRACK, ENTER = range(6)
ALLOWED = {  # section 2.5
    OpState.UNINITIALIZED: set(),
    OpState.INITIALIZED: {BUILD, AUG, SEPT_ADD, SHRINK, TRACK},
    OpState.RUNNABLE: {AUG, SEPT_ADD, SHRINK, TRACK, ENTER},
    OpState.LIVE_EXPORT: {AUG, SEPT_ADD, SHRINK, TRACK, ENTER},
    OpState.PAUSED_EXPORT: {SHRINK, TRACK},
    OpState.POST_EXPORT: {SHRINK, TRACK},
}


@pytest.mark.parametrize("op_state", ALLOWED, ids=lambda state: state.name)
def test_leaves_by_op_state(new_world: Any, op_state: OpState) -> None:
    """Which leaves an op state allows; the others say TDX_OP_STATE_INCORRECT, and change nothing."""
    pages, free = run(5, 1), run(60, 1)
    leaves: list[tuple[int, Any]] = [
        (BUILD, lambda m, w: m.tdh_mem_page_add(w.tdr, pages, free, run(300, 1))),
        (BUILD, lambda m, w: m.tdh_mr_extend(w.tdr, 0)),
        (BUILD, lambda m, w: m.tdh_mr_finalize(w.tdr)),
        (BUILD, lambda m, w: m.tdh_vp_init(w.tdvprs[0])),
        (AUG, lambda m, w: m.tdh_mem_page_aug(w.tdr, 0, pages, free)),
        (SEPT_ADD, lambda m, w: m.tdh_mem_sept_add(w.tdr, 1, run(512, 1), free)),
        (SHRINK, lambda m, w: m.tdh_mem_range_block(w.tdr, 0, pages)),
        (SHRINK, lambda m, w: m.tdh_mem_range_unblock(w.tdr, 0, pages)),
        (SHRINK, lambda m, w: m.tdh_mem_page_relocate(w.tdr, pages, free)),
        (SHRINK, lambda m, w: m.tdh_mem_page_demote(w.tdr, 1, run(0, 1), free)),
        (SHRINK, lambda m, w: m.tdh_mem_page_promote(w.tdr, 1, run(0, 1))),
        (SHRINK, lambda m, w: m.tdh_mem_page_remove(w.tdr, 0, pages)),
        (SHRINK, lambda m, w: m.tdh_mem_sept_remove(w.tdr, 1, run(0, 1))),
        (TRACK, lambda m, w: m.tdh_mem_track(w.tdr)),
        (ENTER, lambda m, w: m.tdh_vp_enter(w.tdvprs[0])),
    ]
    for kind, leaf in leaves:
        world = new_world().build()
        world.td.op_state = op_state
        before = world.snapshot()

        answer = status(leaf(world.module, world))

        assert (answer != "TDX_OP_STATE_INCORRECT") == (kind in ALLOWED[op_state]), leaf
        assert answer != "TDX_OP_STATE_INCORRECT" or world.snapshot() == before


def test_blocked_before_tracked_before_the_operand_page(world: Any) -> None:
    """Rows 10, 11 and 12 of a demote."""
    world.run()
    m = world.module
    world.tables(1024, 2)
    world.map(run(1024, 1), run(1024, 1), level=1)
    used = world.tdr

    def demote(page: int) -> str:
        return status(m.tdh_mem_page_demote(world.tdr, 1, run(1024, 1), run(page, 1)))

    assert demote(used) == "TDX_GPA_RANGE_NOT_BLOCKED|RCX"
    world.block(run(1024, 1), level=1)
    assert demote(used) == "TDX_TLB_TRACKING_NOT_DONE|RCX"
    world.track()
    assert demote(used) == "TDX_PAGE_METADATA_INCORRECT|R8"
    m.interrupt_pending = True
    assert demote(used) == "TDX_PAGE_METADATA_INCORRECT|R8"
    assert demote(world.control()) == "TDX_INTERRUPTED_RESTARTABLE"
    assert demote(world.control()) == "TDX_SUCCESS"
    world.check()


def test_interrupts_do_not_stop_an_enhanced_demote(new_world: Any) -> None:
    """A module with ENHANCED_DEMOTE_INTERRUPTIBILITY does not answer TDX_INTERRUPTED_RESTARTABLE."""
    world = new_world(enhanced_demote=True).run()
    world.tables(1024, 2)
    world.map(run(1024, 1), run(1024, 1), level=1)
    world.block(run(1024, 1), level=1)
    world.track()
    world.module.interrupt_pending = True

    assert world.module.tdh_mem_page_demote(world.tdr, 1, run(1024, 1), run(world.control(), 1)).status == 0


def test_relocate_tests_its_target_early(world: Any) -> None:
    """The new frame being the old one is found before block and track are asked for."""
    world.run()
    world.map(run(5, 1), run(60, 1))
    relocate = world.module.tdh_mem_page_relocate

    assert status(relocate(world.tdr, run(5, 1), run(60, 1))) == "TDX_OPERAND_INVALID|R8"
    assert status(relocate(world.tdr, run(5, 1), run(61, 1))) == "TDX_GPA_RANGE_NOT_BLOCKED|RCX"


@pytest.mark.parametrize(
    ("level", "pfn", "expected"),
    [
        (0, 0, "TDX_PAGE_METADATA_INCORRECT|R8"),  # reserved
        (0, -1, "TDX_OPERAND_ADDR_RANGE_ERROR|R8"),
        (0, 1 << 20, "TDX_OPERAND_ADDR_RANGE_ERROR|R8"),
        (0, 1 << 18, "TDX_OPERAND_ADDR_RANGE_ERROR|R8"),  # in a TDMR that is not initialised yet
        (1, 513, "TDX_OPERAND_INVALID|R8"),
        (1, (1 << 20) + 1, "TDX_OPERAND_INVALID|R8"),
        (1, 1 << 20, "TDX_OPERAND_ADDR_RANGE_ERROR|R8"),
        (1, 0, "TDX_PAGE_METADATA_INCORRECT|R8"),  # a 4K page of it is reserved
        (1, 512, "TDX_SUCCESS"),
        (0, 512, "TDX_SUCCESS"),
    ],
)
def test_operand_page(new_world: Any, level: int, pfn: int, expected: str) -> None:
    """Row 12: aligned, then in an initialised TDMR, then PT_NDA at any size."""
    tdmrs = [Tdmr(0, 1 << 18, reserved=((0, 8),)), Tdmr(1 << 18, 1 << 19)]
    world = new_world(nr_frames=1 << 19, tdmrs=tdmrs)
    world.next_control = 1 << 17
    world.module.tdh_sys_tdmr_init(0, 256)
    assert world.module.tdh_sys_tdmr_init(1 << 18, 255).done == 255
    world.run()
    world.tables(1024, 2)

    result = world.module.tdh_mem_page_aug(world.tdr, level, run(7 if level == 0 else 1024, 1), run(pfn, 1))

    assert status(result) == expected


def test_tdmr_init_ends_with_the_region(new_world: Any) -> None:
    """256 calls of 1024 entries make 1 GiB usable; there is nothing to initialise afterwards."""
    world = new_world(nr_frames=1 << 19, tdmrs=[Tdmr(0, 1 << 18)])

    assert world.module.tdh_sys_tdmr_init(0, 300).done == 256
    assert world.module.tdh_sys_tdmr_init(0).done == 0
    assert status(world.module.tdh_sys_tdmr_init(5)) == "TDX_OPERAND_INVALID|RCX"
    world.next_control = 1 << 17
    world.create()


def test_a_large_page_needs_all_of_its_frames(world: Any) -> None:
    """AUG of 2M fails where one 4K page, or a 2M page around a 4K page, belongs to somebody."""
    world.run()
    world.tables(2048, 2)
    aug = world.module.tdh_mem_page_aug
    world.aug(run(0, 1), run(1024 + 300, 1))

    assert status(aug(world.tdr, 1, run(2048, 1), run(1024, 1))) == "TDX_PAGE_METADATA_INCORRECT|R8"
    world.aug(run(2048, 1), run(2048, 1), level=1)
    assert status(aug(world.tdr, 0, run(1, 1), run(2048 + 77, 1))) == "TDX_PAGE_METADATA_INCORRECT|R8"
    both = aug(world.tdr, 1, run(2560, 2, 512), np.array([1536, 1024]))
    assert (both.done, status(both)) == (1, "TDX_PAGE_METADATA_INCORRECT|R8")


def test_promote_conditions(world: Any) -> None:
    """Children all mapped or all pending, contiguous, from an aligned frame; a failed promote leaves it blocked."""
    world.run()
    world.tables(512, 1)
    world.map(run(0, 511), run(1024, 511))
    world.map(run(512, 512), run(2049, 512))
    promote = world.module.tdh_mem_page_promote
    both = np.array([0, 512])

    def after_block(gfn: int) -> str:
        if world.entry(1, gfn)[0] is S.NL_MAPPED:
            world.block(run(gfn, 1), level=1)
            world.track()
        return status(promote(world.tdr, 1, run(gfn, 1)))

    assert after_block(512) == "TDX_EPT_INVALID_PROMOTE_CONDITIONS|RCX"  # not aligned
    assert after_block(0) == "TDX_EPT_INVALID_PROMOTE_CONDITIONS|RCX"  # one is missing
    assert world.entry(1, 0)[0] is S.NL_BLOCKED
    assert world.module.tdh_mem_range_unblock(world.tdr, 1, both).done == 2
    world.aug(run(511, 1), run(1024 + 511, 1))
    assert after_block(0) == "TDX_EPT_INVALID_PROMOTE_CONDITIONS|RCX"  # one is pending
    world.module.tdh_mem_range_unblock(world.tdr, 1, run(0, 1))
    world.accept(run(511, 1))
    table = world.entry(1, 0)[1]
    world.block(run(0, 1), level=1)
    world.track()
    world.module.interrupt_pending = True
    assert after_block(0) == "TDX_INTERRUPTED_RESTARTABLE"
    promoted = promote(world.tdr, 1, run(0, 1))
    assert (status(promoted), promoted.pfns) == ("TDX_SUCCESS", slice(table, table + 1, 1))
    assert world.entry(1, 0) == (S.MAPPED, 1024)
    world.check()


def test_sept_remove_wants_an_empty_table(world: Any) -> None:
    """A table with a child is not removed."""
    world.build()
    world.aug(run(3, 1), run(60, 1))
    remove = world.module.tdh_mem_sept_remove
    table = world.entry(1, 0)[1]

    assert status(remove(world.tdr, 1, run(0, 1))) == "TDX_EPT_PAGE_NOT_FREE|RCX"
    world.done(world.module.tdh_mem_page_remove(world.tdr, 0, run(3, 1)), 1)
    removed = remove(world.tdr, 1, run(0, 1))
    assert (status(removed), removed.pfns) == ("TDX_SUCCESS", slice(table, table + 1, 1))
    world.check()


def test_wbinvd_wants_free_pages(world: Any) -> None:
    """Only pages that belong to nobody any more, under a private HKID."""
    world.run()
    world.map(run(0, 2), run(60, 2))
    wbinvd = world.module.tdh_phymem_page_wbinvd

    result = wbinvd(run(58, 4), 65)
    assert (result.done, status(result)) == (2, "TDX_PAGE_METADATA_INCORRECT|RCX")
    assert status(wbinvd(run(58, 1), 3)) == "TDX_OPERAND_INVALID|RCX"
    assert status(wbinvd(run(58, 1), 64)) == "TDX_SUCCESS"  # the module's own HKID, for TDRs


def test_misuse_of_the_api(world: Any) -> None:
    """What no caller of the real module could even say raises ValueError."""
    world.run()
    m = world.module

    with pytest.raises(ValueError):
        m.tdh_mem_page_aug(world.tdr, 0, run(0, 2), run(60, 3))
    with pytest.raises(ValueError):
        m.tdg_mem_page_accept(world.tdr, 0, run(1 << 35, 1))
    with pytest.raises(ValueError):
        m.guest_access(world.tdr, run(1 << 35, 1), True)
    with pytest.raises(ValueError):
        m.guest_access(61, run(0, 1), True)
    with pytest.raises(ValueError):
        m.td_exit(world.tdvprs[0])
    with pytest.raises(ValueError):
        m.tdh_mem_page_add(world.tdr, run(0, 1), run(60, 1), run(60, 1))
    assert m.tdh_mem_page_aug(world.tdr, 0, slice(0, 0, 1), slice(0, 0, 1)).done == 0
