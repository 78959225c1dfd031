"""What keeps content keeps it in any order: split, promote, block, unblock, relocate, removal beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvmcore.pages import run
from cvmcore.types import Walk
from cvmcore_tdx.hw import SeptState as S

MOVES = st.lists(st.sampled_from(["demote", "promote", "block", "unblock", "relocate", "track", "remove"]), max_size=14)
HEAD, PFN = 512, 1024


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=MOVES, inside=st.booleans())
def test_content_survives(new_world: Any, moves: list[str], inside: bool) -> None:
    """A block of 2M with something else in each page; whatever the leaves answer, what is still mapped reads as before,
    and every entry is in a state of the table."""
    world = new_world().run()
    m, tdr = world.module, world.tdr
    world.map(run(HEAD, 1), run(PFN, 1, 512), level=1)
    stamps = np.arange(1, 513, dtype=np.uint32)
    m.memory.write(run(PFN, 512), stamps, world.td.hkid)
    if inside:
        world.ok(m.tdh_vp_enter(world.tdvprs[0]))
    spare, gone = 3000, set()
    for turn, move in enumerate(moves):
        page = HEAD + turn * 37 % 512
        is_table = world.entry(1, HEAD)[0] in (S.NL_MAPPED, S.NL_BLOCKED)
        match move:
            case "demote":
                m.tdh_mem_page_demote(tdr, 1, run(HEAD, 1), run(world.control(), 1))
            case "promote":
                m.tdh_mem_page_promote(tdr, 1, run(HEAD, 1))
            case "block":
                small = is_table and turn % 2 == 0
                m.tdh_mem_range_block(tdr, 0 if small else 1, run(page if small else HEAD, 1))
            case "unblock":
                for level, gfn in ((1, HEAD), *((0, HEAD + i) for i in range(512) if is_table)):
                    m.tdh_mem_range_unblock(tdr, level, run(gfn, 1))
            case "relocate":
                if m.tdh_mem_page_relocate(tdr, run(page, 1), run(spare, 1)).done:
                    spare += 1
            case "track":
                m.tdh_mem_track(tdr)
            case "remove":
                if is_table and m.tdh_mem_page_remove(tdr, 0, run(page, 1)).done:
                    gone.add(page - HEAD)
        for level in (0, 1, 2):
            assert set(world.td.state_counts(level)) <= set(S)
    if inside:
        m.td_exit(world.tdvprs[0])
    m.tdh_mem_track(tdr)
    m.tdh_mem_track(tdr)
    m.tdh_mem_range_unblock(tdr, 1, run(HEAD, 1))
    for i in range(512):
        m.tdh_mem_range_unblock(tdr, 0, run(HEAD + i, 1))

    access = m.guest_access(tdr, run(HEAD, 512), False)
    status = np.broadcast_to(np.asarray(access.status), 512)
    left = np.array([i for i in range(512) if i not in gone])
    assert (status[left] == Walk.OK).all()
    pfns = np.arange(512) + access.pfns.start if isinstance(access.pfns, slice) else access.pfns
    assert np.array_equal(m.memory.read(pfns[left], world.td.hkid), stamps[left])
    world.check()
