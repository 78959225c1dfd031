"""A batch is its pages one by one; and no sequence of leaves leaves the table of the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvmcore.pages import as_sel, contiguous, run
from cvmcore_tdx.errors import describe
from cvmcore_tdx.hw import Accept, SeptState

S = SeptState
RELAXED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

GFNS = 24
"""The pages of the games: gfns 0 to 23 of a block with a table, frames 64 to 127; 2M pages 1024 to 4095."""
LARGE = [1024, 1536, 2048, 2560]
SMALL_LEAVES = ("aug", "block", "unblock", "track", "remove", "relocate", "accept", "add")
LARGE_LEAVES = ("aug2m", "block2m", "unblock2m", "remove2m", "demote", "promote", "sept_remove", "sept_add")

Move = tuple[str, list[int], list[int]]

gfn_lists = st.lists(st.integers(0, GFNS - 1), min_size=1, max_size=10, unique=True).map(sorted)
pfn_lists = st.lists(st.integers(64, 95), min_size=10, max_size=10)
large_lists = st.lists(st.sampled_from(LARGE), min_size=1, max_size=4, unique=True).map(sorted)
large_pfns = st.lists(st.sampled_from([*LARGE, 3072, 1025]), min_size=4, max_size=4)
small_moves = st.tuples(st.sampled_from(SMALL_LEAVES), gfn_lists, pfn_lists)
large_moves = st.tuples(st.sampled_from(LARGE_LEAVES), large_lists, large_pfns)
moves = st.lists(st.one_of(small_moves, large_moves), min_size=1, max_size=14)


def sel(pages: list[int], step: int = 1) -> Any:
    return contiguous(np.array(pages, np.int64), step)


def play(world: Any, move: Move) -> tuple[int, str, list[int]]:
    """One leaf on the move's pages; how many it did, the status, the frames it gave back."""
    name, gfns, pfns = move
    m, tdr, n = world.module, world.tdr, len(gfns)
    small, large = sel(gfns), sel(gfns, 512)
    match name:
        case "aug":
            result = m.tdh_mem_page_aug(tdr, 0, small, sel(pfns[:n]))
        case "add":
            result = m.tdh_mem_page_add(tdr, small, sel(pfns[:n]), sel([200 + gfn for gfn in gfns]))
        case "aug2m":
            result = m.tdh_mem_page_aug(tdr, 1, large, sel(pfns[:n], 512))
        case "block" | "block2m":
            result = m.tdh_mem_range_block(tdr, int(name == "block2m"), large if name == "block2m" else small)
        case "unblock" | "unblock2m":
            result = m.tdh_mem_range_unblock(tdr, int(name == "unblock2m"), large if name == "unblock2m" else small)
        case "remove" | "remove2m":
            result = m.tdh_mem_page_remove(tdr, int(name == "remove2m"), large if name == "remove2m" else small)
        case "track":
            result = m.tdh_mem_track(tdr, n)
        case "relocate":
            result = m.tdh_mem_page_relocate(tdr, small, sel(pfns[:n]))
        case "demote":
            result = m.tdh_mem_page_demote(tdr, 1, large, tables_for(gfns))
        case "promote":
            result = m.tdh_mem_page_promote(tdr, 1, large)
        case "sept_remove":
            result = m.tdh_mem_sept_remove(tdr, 1, large)
        case "sept_add":
            result = m.tdh_mem_sept_add(tdr, 1, large, tables_for(gfns))
        case "accept":
            accepted = m.tdg_mem_page_accept(tdr, 0, small) if world.runs else None
            if accepted is None:
                return 0, "", []
            outcome = np.broadcast_to(np.asarray(accepted.outcome), n).tolist()
            refused = next((i for i, one in enumerate(outcome) if one > Accept.ALREADY_ACCEPTED), n)
            assert set(outcome[refused:]) <= {Accept.NOT_REACHED, *outcome[refused : refused + 1]}
            return 0, str(outcome[: refused + 1]), []
        case _:
            raise AssertionError(name)
    back = result.pfns
    given_back = list(range(back.start, back.stop, back.step or 1)) if isinstance(back, slice) else back.tolist()
    return result.done, describe(result.status), given_back


def tables_for(gfns: list[int]) -> npt.NDArray[np.int64]:
    """A table page for each 2M gfn, the same one whoever asks."""
    return as_sel(np.array([5000 + gfn // 512 for gfn in gfns]))


def one_by_one(world: Any, move: Move) -> tuple[int, str, list[int]]:
    """The same leaf page by page in order, until one does not succeed."""
    name, gfns, pfns = move
    if name == "track":
        pages: list[Move] = [(name, [0], []) for _ in gfns]
    else:
        pages = [(name, [gfn], [pfns[i]]) for i, gfn in enumerate(gfns)]
    done, back, outcomes = 0, [], []
    for page in pages:
        n, status, frames = play(world, page)
        if name == "accept":
            outcomes.append(status.strip("[]"))
            if status and int(outcomes[-1]) > Accept.ALREADY_ACCEPTED:
                break
            continue
        done += n
        back += frames
        if status != "TDX_SUCCESS":
            return done, status, back
    if name == "accept":
        return 0, f"[{', '.join(outcomes)}]" if outcomes[0] else "", []
    return done, "TDX_SUCCESS", back


def start(new_world: Any, runs: bool) -> Any:
    world = new_world()
    world.build()
    world.tables(1024, 2)
    world.memory.write(run(200, GFNS), np.arange(GFNS) + 1, 0)
    if runs:
        world.ok(world.module.tdh_mr_finalize(world.tdr))
    world.runs = runs
    return world


@RELAXED
@given(moves=moves, runs=st.booleans(), inside=st.booleans())
def test_a_batch_is_its_pages_one_by_one(new_world: Any, moves: list[Move], runs: bool, inside: bool) -> None:
    """Same end state, same count, same first failure, same frames given back; after every move."""
    together, single = start(new_world, runs), start(new_world, runs)
    for world in (together, single):
        if inside and runs:
            world.ok(world.module.tdh_vp_enter(world.tdvprs[0]))
    for move in moves:
        assert play(together, move) == one_by_one(single, move)
        assert together.snapshot() == single.snapshot()


@RELAXED
@given(moves=moves, runs=st.booleans())
def test_any_sequence_keeps_the_tables_whole(new_world: Any, moves: list[Move], runs: bool) -> None:
    """After any leaf, refused or not: a tree, each frame in one entry, PAMT and counters in step."""
    world = start(new_world, runs)
    for move in moves:
        before = world.snapshot()
        done, _, _ = play(world, move)
        world.check()
        if done == 0 and move[0] != "accept":
            assert world.snapshot() == before


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("n", [1, 3, 700, 40000])
def test_shapes(new_world: Any, n: int, scattered: bool) -> None:
    """Runs and scattered pages of any length, beyond a piece as well, end in the same state."""
    world = new_world(nr_frames=1 << 18).init()
    world.vcpu()
    step = 3 if scattered else 1
    gfns = np.arange(n) * step
    for gfn in range(0, n * step + 512, 512):
        world.tables(gfn)
    world.ok(world.module.tdh_mr_finalize(world.tdr))
    pages = as_sel(gfns)

    world.map(pages, run(10, n))
    walk = world.module.guest_access(world.tdr, pages, True)
    assert (walk.status, walk.pfns) == (0, slice(10, 10 + n, 1))
    world.block(pages)
    world.done(world.module.tdh_mem_track(world.tdr, n), n)
    removed = world.module.tdh_mem_page_remove(world.tdr, 0, pages)

    world.done(removed, n)
    assert world.td.state_counts(0) == {}
    world.check()


def test_making_a_module_is_cheap(new_world: Any) -> None:
    """A machine of 256 GiB costs nothing until it is touched."""
    import time

    best = 1.0
    for _ in range(20):
        begin = time.perf_counter()
        new_world(nr_frames=1 << 26)
        best = min(best, time.perf_counter() - begin)

    assert best < 2e-3
