"""Section 4.2 and 2.5: epochs, who is inside, and what BLOCK + TRACK + kick buys."""

from __future__ import annotations

from typing import Any

import pytest

from cvmcore.pages import run
from cvmcore_tdx.errors import describe


def remove(world: Any, gfn: int) -> str:
    return describe(world.module.tdh_mem_page_remove(world.tdr, 0, run(gfn, 1)).status)


def track(world: Any) -> str:
    return describe(world.module.tdh_mem_track(world.tdr).status)


def enter(world: Any, i: int = 0) -> None:
    world.ok(world.module.tdh_vp_enter(world.tdvprs[i]))


def leave(world: Any, i: int = 0) -> None:
    world.module.td_exit(world.tdvprs[i])


def test_nobody_inside(world: Any) -> None:
    """TRACK alone is enough then."""
    world.run()
    world.map(run(0, 1), run(60, 1))
    world.block(run(0, 1))

    assert remove(world, 0) == "TDX_TLB_TRACKING_NOT_DONE|RCX"
    assert track(world) == "TDX_SUCCESS"
    assert remove(world, 0) == "TDX_SUCCESS"


def test_track_then_kick(world: Any) -> None:
    """While a vCPU of the old epoch is inside, TRACK is not enough; its exit is. Coming back does not matter."""
    world.run(nr_vcpus=2)
    world.map(run(0, 1), run(60, 1))
    enter(world)
    world.block(run(0, 1))

    assert track(world) == "TDX_SUCCESS"
    assert remove(world, 0) == "TDX_TLB_TRACKING_NOT_DONE|RCX"
    enter(world, 1)  # enters in the new epoch: harmless
    assert remove(world, 0) == "TDX_TLB_TRACKING_NOT_DONE|RCX"
    leave(world)
    enter(world)
    assert remove(world, 0) == "TDX_SUCCESS"


def test_a_kick_before_the_track_is_no_use(world: Any) -> None:
    """A vCPU that was kicked and came back before TRACK counts for the old epoch again."""
    world.run()
    world.map(run(0, 1), run(60, 1))
    enter(world)
    world.block(run(0, 1))
    leave(world)
    enter(world)

    assert track(world) == "TDX_SUCCESS"
    assert remove(world, 0) == "TDX_TLB_TRACKING_NOT_DONE|RCX"


def test_two_tracks_need_the_kick_between_them(world: Any) -> None:
    """The epoch goes on only when nobody of the previous one is inside."""
    world.run()
    enter(world)

    assert track(world) == "TDX_SUCCESS"
    assert track(world) == "TDX_PREVIOUS_TLB_EPOCH_BUSY"
    leave(world)
    assert track(world) == "TDX_SUCCESS"


def test_one_track_serves_all_blocks_before_it(world: Any) -> None:
    """n x BLOCK, one TRACK and kick, n x REMOVE; what was blocked later is not served."""
    world.run()
    world.map(run(0, 9), run(60, 9))
    enter(world)
    for gfn in range(8):
        world.block(run(gfn, 1))
    track(world)
    leave(world)
    world.block(run(8, 1))

    result = world.module.tdh_mem_page_remove(world.tdr, 0, run(0, 9))

    assert (result.done, describe(result.status)) == (8, "TDX_TLB_TRACKING_NOT_DONE|RCX")


@pytest.mark.parametrize("inside", ["nobody", "old", "new", "both"])
@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_many_tracks_are_tracks_one_by_one(new_world: Any, inside: str, n: int) -> None:
    """track(n) does as often what one does as one can."""
    worlds = []
    for _ in range(2):
        world = new_world().run(nr_vcpus=2)
        if inside in ("old", "both"):
            enter(world)
            track(world)
        if inside in ("new", "both"):
            enter(world, 1)
        worlds.append(world)
    together, single = worlds

    result = together.module.tdh_mem_track(together.tdr, n)
    done, status = 0, 0
    while done < n and not status:
        status = single.module.tdh_mem_track(single.tdr).status
        done += not status

    assert (result.done, result.status) == (done, status)
    assert together.snapshot() == single.snapshot()


def test_td_epoch_lock(world: Any, busy: Any) -> None:
    """TRACK and VP.ENTER exclude each other by the epoch's lock."""
    world.run()
    lock, m = world.td.epoch_lock, world.module

    tracked = busy(m.tdh_mem_track.steps(world.tdr), lock.try_write)
    entered = busy(m.tdh_vp_enter.steps(world.tdvprs[0]), lock.try_read)

    assert describe(tracked.status) == describe(entered) == "TDX_OPERAND_BUSY|TD_EPOCH"


def test_build_needs_neither(world: Any) -> None:
    """Before the TD can run a mapped page can be removed, moved or split at once."""
    world.build()
    world.tables(1024, 2)
    world.aug(run(0, 2), run(60, 2))
    world.aug(run(1024, 1), run(1024, 1), level=1)

    assert remove(world, 0) == "TDX_SUCCESS"
    world.done(world.module.tdh_mem_page_relocate(world.tdr, run(1, 1), run(70, 1)), 1)
    world.done(world.module.tdh_mem_page_demote(world.tdr, 1, run(1024, 1), run(world.control(), 1)), 1)
    world.check()


def test_a_vcpu_inside_is_busy(world: Any) -> None:
    """It holds its TDVPR: it can neither enter twice nor be flushed."""
    world.run()
    enter(world)
    m, tdvpr = world.module, world.tdvprs[0]

    assert describe(m.tdh_vp_enter(tdvpr)) == "TDX_OPERAND_BUSY|RCX"
    assert describe(m.tdh_vp_flush(tdvpr)) == "TDX_OPERAND_BUSY|RCX"
