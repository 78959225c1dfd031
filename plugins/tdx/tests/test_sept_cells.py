"""Every cell of leaf x state x level, against the table of the reference (section 2.2) written out again here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cvmcore.pages import run
from cvmcore_tdx.errors import Operand, Status, describe
from cvmcore_tdx.hw import MEM_LEAVES, OpState, SeptState

S = SeptState
ALL = list(S)
TABLES = (S.NL_MAPPED, S.NL_BLOCKED)
LEAVES = [s for s in ALL if s not in (S.FREE, S.REMOVED, *TABLES)]

# leaf -> (levels, {allowed state: state afterwards}), module 1.5, TD in build (nothing has to be blocked).
CELLS: dict[str, tuple[tuple[int, ...], dict[SeptState, SeptState]]] = {
    "page_add": ((0,), {S.FREE: S.MAPPED}),
    "sept_add": ((1, 2, 3), {S.FREE: S.NL_MAPPED}),
    "page_aug": ((0, 1), {S.FREE: S.PENDING, S.REMOVED: S.PENDING}),
    "range_block": (
        (0, 1, 2, 3),
        {
            S.NL_MAPPED: S.NL_BLOCKED,
            S.MAPPED: S.BLOCKED,
            S.PENDING: S.PENDING_BLOCKED,
            S.BLOCKEDW: S.BLOCKED,
            S.PENDING_BLOCKEDW: S.PENDING_BLOCKED,
        },
    ),
    "range_unblock": (
        (0, 1, 2, 3),
        {S.NL_BLOCKED: S.NL_MAPPED, S.BLOCKED: S.MAPPED, S.PENDING_BLOCKED: S.PENDING},
    ),
    "page_relocate": (
        (0,),
        {
            S.MAPPED: S.MAPPED,
            S.BLOCKED: S.MAPPED,
            S.PENDING: S.PENDING,
            S.PENDING_BLOCKED: S.PENDING,
            S.BLOCKEDW: S.MAPPED,
            S.EXPORTED_BLOCKEDW: S.EXPORTED_DIRTY,
            S.EXPORTED_DIRTY: S.EXPORTED_DIRTY,
            S.EXPORTED_DIRTY_BLOCKEDW: S.EXPORTED_DIRTY,
            S.PENDING_BLOCKEDW: S.PENDING,
            S.PENDING_EXPORTED_BLOCKEDW: S.PENDING_EXPORTED_DIRTY,
            S.PENDING_EXPORTED_DIRTY: S.PENDING_EXPORTED_DIRTY,
            S.PENDING_EXPORTED_DIRTY_BLOCKEDW: S.PENDING_EXPORTED_DIRTY,
        },
    ),
    "page_demote": (
        (1, 2),
        dict.fromkeys((S.MAPPED, S.BLOCKED, S.PENDING, S.PENDING_BLOCKED), S.NL_MAPPED),
    ),
    "page_promote": ((1, 2), {S.NL_MAPPED: S.MAPPED, S.NL_BLOCKED: S.MAPPED}),
    "page_remove": (
        (0, 1, 2),
        dict.fromkeys(
            (S.MAPPED, S.BLOCKED, S.PENDING, S.PENDING_BLOCKED, S.BLOCKEDW, S.PENDING_BLOCKEDW), S.FREE
        ),
    ),
    "sept_remove": ((1, 2, 3), {S.NL_MAPPED: S.FREE, S.NL_BLOCKED: S.FREE}),
    "sept_rd": ((0, 1, 2, 3), {s: s for s in S}),
    "mr_extend": ((0,), {S.MAPPED: S.MAPPED}),
}
NEEDS_BLOCK = {"page_relocate", "page_demote", "page_promote", "page_remove", "sept_remove"}
BLOCKED = (S.NL_BLOCKED, S.BLOCKED, S.PENDING_BLOCKED)
NEVER_TRACKED = (S.FREE, S.REMOVED, S.EXPORTED_BLOCKEDW, S.PENDING_EXPORTED_BLOCKEDW)

GFN = 0
PAGE = {0: 100, 1: 1024, 2: 0}  # where the page of a level lies; 2: 1 GiB, more than the machine has, see below
NEW = 3000
SOURCE = 3001
TABLE = 3002


def call(world: Any, leaf: str, level: int) -> object:
    m, tdr, page = world.module, world.tdr, run(GFN, 1)
    match leaf:
        case "page_add":
            return m.tdh_mem_page_add(tdr, page, run(NEW, 1), run(SOURCE, 1))
        case "sept_add":
            return m.tdh_mem_sept_add(tdr, level, page, run(NEW, 1))
        case "page_aug":
            return m.tdh_mem_page_aug(tdr, level, page, run(NEW if level == 0 else 4096, 1))
        case "page_relocate":
            return m.tdh_mem_page_relocate(tdr, page, run(NEW, 1))
        case "page_demote":
            return m.tdh_mem_page_demote(tdr, level, page, run(NEW, 1))
        case "mr_extend":
            return m.tdh_mr_extend(tdr, GFN << 12)
        case _:
            return getattr(m, f"tdh_mem_{leaf}")(tdr, level, page)


def refusal(leaf: str, state: SeptState) -> int:
    if leaf == "range_block" and state in BLOCKED:
        return Status.TDX_GPA_RANGE_ALREADY_BLOCKED
    if leaf == "mr_extend":
        return Status.TDX_EPT_ENTRY_NOT_PRESENT | Operand.RCX
    return Status.TDX_EPT_ENTRY_STATE_INCORRECT | Operand.RCX


def possible(state: SeptState, level: int) -> bool:
    """Tables stand at 2M and above; pages at 4K, 2M, and, promoted, 1G."""
    if state in (S.FREE, S.REMOVED):
        return True
    if state in TABLES:
        return level >= 1
    return level <= 1  # a 1G page does not fit into this machine; test_large_pages_of_1g has one that does


def prepared(world: Any, state: SeptState, level: int, leaf: str) -> Any:
    world.init()
    world.vcpu()
    world.tables(GFN, level + 1)
    world.plant(level, GFN, state, TABLE if state in TABLES else PAGE.get(level, 0))
    if leaf == "page_promote" and state in TABLES and level == 1:
        for i in range(512):
            world.plant(0, GFN + i, S.MAPPED, 1024 + i)
    return world


CASES = [
    (leaf, state, level)
    for leaf, (levels, _) in CELLS.items()
    for level in levels
    for state in ALL
    if possible(state, level) and not (leaf == "page_promote" and level == 2 and state in TABLES)
]


@pytest.mark.parametrize(("leaf", "state", "level"), CASES, ids=lambda v: getattr(v, "name", str(v)))
def test_cell(world: Any, leaf: str, state: SeptState, level: int) -> None:
    """The leaf takes exactly the states of its row to exactly their next state, and refuses others untouched."""
    world = prepared(world, state, level, leaf)
    before = world.snapshot()

    result = call(world, leaf, level)

    after = CELLS[leaf][1].get(state)
    if after is None:
        assert (result.done, describe(result.status)) == (0, describe(refusal(leaf, state)))
        assert world.snapshot() == before
        assert result.found.state is state
        assert result.found.level == level
    else:
        assert (result.done, describe(result.status)) == (1, "TDX_SUCCESS")
        assert world.entry(level, GFN)[0] is after
    if leaf != "mr_extend" and state is not S.REMOVED:
        world.check()


@pytest.mark.parametrize(("leaf", "state", "level"), CASES, ids=lambda v: getattr(v, "name", str(v)))
def test_cell_while_the_td_runs(world: Any, leaf: str, state: SeptState, level: int) -> None:
    """Then what could be in a TLB must be blocked, then tracked; and nothing can be added any more."""
    world = prepared(world, state, level, leaf)
    world.td.op_state = OpState.RUNNABLE
    before = world.snapshot()

    result = call(world, leaf, level)

    if leaf in ("page_add", "mr_extend"):
        expected = int(Status.TDX_OP_STATE_INCORRECT)
    elif CELLS[leaf][1].get(state) is None:
        expected = refusal(leaf, state)
    elif leaf in NEEDS_BLOCK and state not in BLOCKED and state not in NEVER_TRACKED:
        expected = Status.TDX_GPA_RANGE_NOT_BLOCKED | Operand.RCX
    else:
        expected = 0  # planted as blocked long ago: BEPOCH 0 counts as tracked
    assert describe(result.status) == describe(expected)
    if expected:
        assert world.snapshot() == before


GIANT = [
    (leaf, state)
    for leaf, (levels, _) in CELLS.items() if 2 in levels
    for state in LEAVES
]  # fmt: skip


@pytest.mark.parametrize("runs", [False, True], ids=["build", "running"])
@pytest.mark.parametrize(("leaf", "state"), GIANT, ids=lambda v: getattr(v, "name", str(v)))
def test_cell_of_a_1g_page(new_world: Any, leaf: str, state: SeptState, runs: bool) -> None:
    """The same for a leaf of 1G, on a machine that has room for one."""
    world = new_world(nr_frames=1 << 19)
    world.init()
    world.vcpu()
    world.tables(GFN, 3)
    world.plant(2, GFN, state, 0)
    world.td.op_state = OpState.RUNNABLE if runs else world.td.op_state
    m, tdr, page = world.module, world.tdr, run(GFN, 1)
    free = run(world.control(), 1)

    match leaf:
        case "sept_add":
            result = m.tdh_mem_sept_add(tdr, 2, page, free)
        case "page_demote":
            result = m.tdh_mem_page_demote(tdr, 2, page, free)
        case _:
            result = getattr(m, f"tdh_mem_{leaf}")(tdr, 2, page)

    after = CELLS[leaf][1].get(state)
    expected = 0 if after is not None else refusal(leaf, state)
    if after is not None and runs and leaf in NEEDS_BLOCK and state not in BLOCKED and state not in NEVER_TRACKED:
        expected = Status.TDX_GPA_RANGE_NOT_BLOCKED | Operand.RCX
    assert describe(result.status) == describe(expected)
    assert world.entry(2, GFN)[0] is (state if expected or after is None else after)


def test_every_leaf_is_covered() -> None:
    """The cells above are the module's leaves on guest memory, all of them."""
    names = {leaf.name.removeprefix("TDH.").removeprefix("MEM.").replace(".", "_").lower() for leaf in MEM_LEAVES}

    assert names == set(CELLS)


@pytest.mark.parametrize("leaf", [leaf for leaf in CELLS if leaf not in ("page_add", "page_relocate", "mr_extend")])
@pytest.mark.parametrize("level", [-1, 0, 1, 2, 3, 4])
def test_levels(world: Any, leaf: str, level: int) -> None:
    """A level that is none of the leaf's is an invalid operand, whatever stands there."""
    world.build()

    result = call(world, leaf, level)

    invalid = result.status == Status.TDX_OPERAND_INVALID | Operand.RCX
    assert invalid == (level not in CELLS[leaf][0])


def test_5_level_tree(world: Any) -> None:
    """With a GPA width of 52 the root's entries are those of 256T, and private gfns reach further."""
    world.init(gpaw=52)
    high = 1 << 38  # the last private gfn is below bit 39
    page = run(high, 1)

    assert world.module.tdh_mem_sept_add(world.tdr, 4, page, run(NEW, 1)).status == 0
    assert world.entry(4, high) == (S.NL_MAPPED, NEW)
    outside = world.module.tdh_mem_sept_add(world.tdr, 4, run(1 << 39, 1), run(NEW + 1, 1))
    assert describe(outside.status) == "TDX_OPERAND_INVALID|RCX"


STOPS = [S.FREE, S.NL_BLOCKED, S.MAPPED, S.BLOCKED, S.PENDING, S.PENDING_BLOCKED]


@pytest.mark.parametrize("state", STOPS)
def test_walk_stops_above(world: Any, state: SeptState) -> None:
    """A 4K request under a 2M entry that is no open table fails alike, and reports the entry where it stopped."""
    world.init()
    world.tables(GFN, 2)
    world.plant(1, GFN, state, TABLE if state in TABLES else PAGE[1])

    result = world.module.tdh_mem_range_block(world.tdr, 0, run(GFN + 7, 1))

    assert describe(result.status) == "TDX_EPT_WALK_FAILED|RCX"
    assert (result.found.level, result.found.state) == (1, state)


def test_a_blocked_parent_leaves_its_children_as_they_were(world: Any) -> None:
    """Blocking a 1G range hides all below at once; unblocking brings it back unchanged."""
    world.run()
    m = world.module
    world.map(run(0, 4), run(50, 4))

    world.block(run(0, 1), level=2)

    assert world.entry(0, 1) == (S.MAPPED, 51)
    assert describe(m.tdh_mem_range_block(world.tdr, 0, run(1, 1)).status) == "TDX_EPT_WALK_FAILED|RCX"
    assert m.guest_access(world.tdr, run(0, 4), True).status == 1
    assert describe(m.tdh_mem_range_unblock(world.tdr, 2, run(0, 1)).status) == "TDX_TLB_TRACKING_NOT_DONE|SEPT_TREE"
    world.track()
    assert m.tdh_mem_range_unblock(world.tdr, 2, run(0, 1)).status == 0
    assert m.guest_access(world.tdr, run(0, 4), True).status == 0


def test_sept_add_allows_an_existing_table(world: Any) -> None:
    """With the flag, what is a table already stays, and its page is not taken."""
    world.init()
    world.tables(GFN, 2)
    pages = run(NEW, 2)
    gfns = np.array([0, 512])
    world.module.tdh_mem_sept_add(world.tdr, 1, run(0, 1), run(TABLE, 1))

    refused = world.module.tdh_mem_sept_add(world.tdr, 1, gfns, pages)
    allowed = world.module.tdh_mem_sept_add(world.tdr, 1, gfns, pages, allow_existing=True)

    assert (refused.done, describe(refused.status)) == (0, "TDX_EPT_ENTRY_STATE_INCORRECT|RCX")
    assert allowed.done == 2
    assert world.entry(1, 0) == (S.NL_MAPPED, TABLE)
    assert world.entry(1, 512) == (S.NL_MAPPED, NEW + 1)
    world.check()


def test_large_pages_of_1g(new_world: Any) -> None:
    """A 1G page arises by promotion only, and can be demoted, blocked and removed."""
    world = new_world(nr_frames=1 << 19)
    world.near = 1 << 19
    m = world.run().module
    gfns = run(512, 511, 512)
    world.map(gfns, run(512, 511, 512), level=1)
    aug = m.tdh_mem_page_aug(world.tdr, 1, run(0, 1), run(0, 1, 512))
    assert describe(aug.status) == "TDX_EPT_ENTRY_STATE_INCORRECT|RCX"  # the build tables stand there
    done_ = m.tdh_mem_range_block(world.tdr, 1, run(0, 1))
    assert done_.done == 1
    world.track()
    assert m.tdh_mem_sept_remove(world.tdr, 1, run(0, 1)).status == 0
    world.map(run(0, 1), run(0, 1, 512), level=1)
    world.block(run(0, 1), level=2)
    world.track()

    promoted = m.tdh_mem_page_promote(world.tdr, 2, run(0, 1))

    assert promoted.status == 0
    assert world.entry(2, 0) == (S.MAPPED, 0)
    assert m.nr_large == [0, 0, 1]
    world.check()
    walk = m.guest_access(world.tdr, run(1000, 8), True)
    assert (walk.status, walk.pfns) == (0, slice(1000, 1008, 1))
    world.block(run(0, 1), level=2)
    world.track()
    assert m.tdh_mem_page_demote(world.tdr, 2, run(0, 1), promoted.pfns).status == 0
    assert world.entry(1, 3 << 9) == (S.MAPPED, 3 << 9)
    world.check()
