"""The host's page allocator, against a plain dict of frames."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvmcore.errors import InvariantViolation, UapiError
from cvmcore.mem.frames import Frames
from cvmcore.pages import Sel, array_of, contiguous
from cvmcore.types import Use

NR = 2100
LOW, HIGH = (Use.GMEM, Use.ANON), (Use.TABLE, Use.META)


def pages(sel: Sel) -> list[int]:
    return [int(page) for page in array_of(sel)]


def sel(*pfns: int) -> Sel:
    return contiguous(np.array(pfns, np.int64))


# ---- allocation -----------------------------------------------------------------------------------------------------


def test_frame_0_is_never_handed_out() -> None:
    """So that a zero word can mean: no frame."""
    frames = Frames(4)

    assert pages(frames.alloc(3, Use.ANON)) == [1, 2, 3]
    assert frames.available == 0


def test_the_lowest_free_frames_are_handed_out() -> None:
    frames = Frames(NR)
    frames.alloc(10, Use.GMEM)
    frames.free(sel(2, 5, 6))

    assert pages(frames.alloc(5, Use.ANON)) == [2, 5, 6, 11, 12]


def test_tables_come_from_the_top() -> None:
    frames = Frames(NR)

    assert pages(frames.alloc(2, Use.TABLE)) == [NR - 2, NR - 1]
    assert pages(frames.alloc(1, Use.META)) == [NR - 3]


@pytest.mark.parametrize("use", [Use.GMEM, Use.TABLE])
def test_a_full_host_takes_nothing(use: Use) -> None:
    """ENOMEM where there are not so many; nothing is taken."""
    frames = Frames(10)
    frames.alloc(5, Use.ANON)

    with pytest.raises(UapiError) as caught:
        frames.alloc(5, use)

    assert caught.value.errno == errno.ENOMEM
    assert frames.available == 4
    assert len(pages(frames.alloc(4, use))) == 4


def test_large_pages_are_aligned_and_may_be_fewer() -> None:
    """With align_order 9: the heads of the lowest wholly free blocks, as many as there are."""
    frames = Frames(NR)
    assert pages(frames.alloc(1, Use.GMEM, 9)) == [512]

    assert pages(frames.alloc(5, Use.GMEM, 9)) == [1024, 1536]
    assert pages(frames.alloc(1, Use.GMEM, 9)) == []
    frames.free(slice(1024, 1536, 1))
    assert pages(frames.alloc(2, Use.GMEM, 9)) == [1024]


def test_a_block_with_one_frame_in_use_is_no_large_page() -> None:
    frames = Frames(NR)
    frames.alloc(600, Use.ANON)
    frames.free(slice(1, 600, 1))

    assert pages(frames.alloc(1, Use.GMEM, 9)) == [1024]


def test_nothing_asked_nothing_given() -> None:
    frames = Frames(8)

    assert pages(frames.alloc(0, Use.ANON)) == []
    frames.free(sel())
    assert frames.in_use == 0


OPERATION = st.one_of(
    st.tuples(st.just("alloc"), st.sampled_from(LOW + HIGH), st.integers(1, 40)),
    st.tuples(st.just("large"), st.just(Use.GMEM), st.integers(1, 2)),
    st.tuples(st.just("free"), st.integers(0, 1 << 30), st.integers(1, 60)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(OPERATION, max_size=25))
def test_frames_are_a_dict_of_uses(operations: list[tuple[str, int, int]]) -> None:
    frames = Frames(NR)
    model = dict.fromkeys(range(1, NR), Use.FREE)

    for kind, what, n in operations:
        free = [pfn for pfn, use in model.items() if use == Use.FREE]
        if kind == "free":
            used = [pfn for pfn, use in model.items() if use != Use.FREE]
            start = what % len(used) if used else 0
            gone = used[start : start + n]
            frames.free(sel(*gone))
            model.update(dict.fromkeys(gone, Use.FREE))
            continue
        if kind == "large":
            whole = [b for b in range(1, NR // 512) if all(model[b * 512 + i] == Use.FREE for i in range(512))]
            assert pages(frames.alloc(n, what, 9)) == [b * 512 for b in whole[:n]]
            model.update(dict.fromkeys((b * 512 + i for b in whole[:n] for i in range(512)), Use(what)))
            continue
        want = free[:n] if what in LOW else free[-n:]
        if len(free) < n:
            with pytest.raises(UapiError):
                frames.alloc(n, what)
            continue
        assert pages(frames.alloc(n, what)) == want
        model.update(dict.fromkeys(want, Use(what)))

    assert frames.use[1:].tolist() == list(model.values())
    used = [use for use in model.values() if use != Use.FREE]
    assert (frames.in_use, frames.available) == (len(used), NR - 1 - len(used))
    assert frames.outstanding() == {use: used.count(use) for use in set(used)}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 500), max_size=20, unique=True), st.integers(1, 60))
def test_a_batch_gets_the_frames_that_its_pages_get(holes: list[int], n: int) -> None:
    batch, single = Frames(NR), Frames(NR)
    for frames in (batch, single):
        frames.alloc(500, Use.ANON)
        for hole in holes:
            frames.free(sel(hole))

    got = pages(batch.alloc(n, Use.GMEM))

    assert got == [page for _ in range(n) for page in pages(single.alloc(1, Use.GMEM))]
    assert (batch.use == single.use).all()


# ---- freeing --------------------------------------------------------------------------------------------------------


def test_a_frame_is_freed_once() -> None:
    frames = Frames(16)
    frames.alloc(4, Use.GMEM)
    frames.free(sel(2))

    with pytest.raises(InvariantViolation, match="freed that is not in use"):
        frames.free(slice(1, 4, 1))
    assert [int(use) for use in frames.use[1:5]] == [Use.GMEM, Use.FREE, Use.GMEM, Use.GMEM]


def test_leaked_frames_never_come_back() -> None:
    """Taken out of circulation for good, and listed."""
    frames = Frames(8)
    frames.alloc(4, Use.GMEM)

    frames.leak(sel(2, 3), "the module kept them")

    assert frames.leaked() == 2
    assert frames.leaks[0][0] == "the module kept them"
    assert frames.outstanding() == {Use.GMEM: 2}
    assert pages(frames.alloc(frames.available, Use.ANON)) == [5, 6, 7]
    frames.free(sel(1, 2))  # their owner gives up all that it had
    assert frames.leaked() == 2
    assert pages(frames.alloc(frames.available, Use.ANON)) == [1]


def test_a_frame_whose_memory_failed_is_not_handed_out_again() -> None:
    """Its user keeps it; given up, pinned or not, it is listed as leaked."""
    frames = Frames(8)
    frames.alloc(4, Use.GMEM)
    frames.fail(2)
    frames.fail(3)
    frames.pin(sel(3))

    frames.free(slice(1, 5, 1))
    assert (frames.leaked(), frames.outstanding()) == (1, {Use.ORPHAN: 1})
    frames.unpin(sel(3))

    assert [why for why, _ in frames.leaks] == ["its memory failed"] * 2
    assert pages(frames.alloc(frames.available, Use.ANON)) == [1, 4, 5, 6, 7]


# ---- pins -----------------------------------------------------------------------------------------------------------


def test_a_pinned_frame_lives_on_without_an_owner() -> None:
    """Until the last pin is dropped."""
    frames = Frames(16)
    frames.alloc(4, Use.ANON)
    frames.pin(slice(1, 4, 1))
    frames.pin(sel(2))

    frames.free(slice(1, 5, 1))
    assert [int(use) for use in frames.use[1:5]] == [Use.ORPHAN, Use.ORPHAN, Use.ORPHAN, Use.FREE]
    frames.unpin(slice(1, 4, 1))

    assert [int(use) for use in frames.use[1:5]] == [Use.FREE, Use.ORPHAN, Use.FREE, Use.FREE]
    assert (frames.pins_held, frames.pins_taken, frames.in_use) == (1, 4, 1)
    frames.unpin(sel(2))
    assert (frames.pins_held, frames.in_use) == (0, 0)


def test_a_pin_does_not_outlive_itself() -> None:
    frames = Frames(16)
    frames.alloc(4, Use.ANON)
    frames.pin(sel(2))
    frames.unpin(sel(2))

    frames.free(slice(1, 5, 1))

    assert frames.in_use == 0


def test_unpin_without_a_pin() -> None:
    frames = Frames(16)
    frames.alloc(4, Use.ANON)
    frames.pin(sel(1, 3))

    with pytest.raises(InvariantViolation, match="unpinned that is not pinned"):
        frames.unpin(slice(1, 4, 1))
    assert frames.pins[:5].tolist() == [0, 1, 0, 1, 0]
