"""The selector algebra, against plain sets and lists of page numbers; lazily backed arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvmcore.pages import (
    EMPTY,
    PIECE_RUN,
    PIECE_SCATTERED,
    Sel,
    array_of,
    as_sel,
    below,
    blocks,
    contiguous,
    count,
    expand,
    first,
    grown,
    heads,
    last,
    leading,
    part,
    pieces,
    run,
    shift,
    small_pages,
    sort_unique,
    take,
    where,
    zeros,
)

SOME = settings(max_examples=40, deadline=None)
PAGES = st.integers(0, 5000)
SCATTERED = st.lists(PAGES, max_size=60)
RUNS = st.builds(lambda start, n: list(range(start, start + n)), PAGES, st.integers(0, 60))
SETS = SCATTERED | RUNS
"""Any page numbers: repeated, in any order; or a run."""


def pages(sel: Sel) -> list[int]:
    """What a selector means: the pages, in order."""
    return [int(page) for page in (range(sel.start, sel.stop, sel.step or 1) if isinstance(sel, slice) else sel)]


@SOME
@given(SETS)
def test_sort_unique_is_a_sorted_set(numbers: list[int]) -> None:
    sel = sort_unique(np.array(numbers, np.int64))

    assert pages(sel) == sorted(set(numbers))


@SOME
@given(SETS)
def test_as_sel_keeps_sorted_unique_pages(numbers: list[int]) -> None:
    want = sorted(set(numbers))

    assert pages(as_sel(np.array(want, np.int64))) == want


@SOME
@given(SETS)
def test_a_run_is_a_slice_and_nothing_else_is(numbers: list[int]) -> None:
    """Two shapes: array code may index a run without building an array of its pages."""
    want = sorted(set(numbers))

    is_run = not want or want == list(range(want[0], want[0] + len(want)))

    assert isinstance(sort_unique(np.array(numbers, np.int64)), slice) == is_run


@SOME
@given(SETS, st.sampled_from([1, 512]))
def test_contiguous_keeps_any_order(numbers: list[int], step: int) -> None:
    """Frames need not be sorted; a run of large pages is a slice that steps by their size."""
    want = [page * step for page in dict.fromkeys(numbers)]

    sel = contiguous(np.array(want, np.int64), step)

    assert pages(sel) == want
    in_order = want == list(range(want[0], want[0] + len(want) * step, step)) if want else True
    assert isinstance(sel, slice) == in_order


@SOME
@given(SETS)
def test_contiguous_takes_words(numbers: list[int]) -> None:
    """Frame numbers come as uint32 words; differences must not wrap."""
    want = sorted(set(numbers), reverse=True)

    assert pages(contiguous(np.array(want, np.uint32))) == want


@SOME
@given(SETS)
def test_count_first_last_array(numbers: list[int]) -> None:
    want = sorted(set(numbers))
    sel = sort_unique(np.array(numbers, np.int64))

    assert count(sel) == len(want)
    assert array_of(sel).tolist() == want
    assert array_of(sel).dtype == np.int64
    if want:
        assert (first(sel), last(sel)) == (want[0], want[-1])


@SOME
@given(SETS, st.integers(0, 60), st.integers(0, 60))
def test_part_is_a_slice_of_the_list(numbers: list[int], start: int, length: int) -> None:
    want = sorted(set(numbers))
    start = min(start, len(want))
    stop = min(start + length, len(want))

    assert pages(part(sort_unique(np.array(numbers, np.int64)), start, stop)) == want[start:stop]


@SOME
@given(st.integers(0, 40), st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_part_of_a_run_of_large_pages(block: int, n: int, start: int, length: int) -> None:
    sel = run(block * 512, n, 512)
    want = [(block + i) * 512 for i in range(n)]
    start = min(start, n)

    assert pages(sel) == want
    assert pages(part(sel, start, min(start + length, n))) == want[start : start + length]


@SOME
@given(SETS, st.integers(0, 1000))
def test_shift_moves_every_page(numbers: list[int], delta: int) -> None:
    want = sorted(set(numbers))

    assert pages(shift(sort_unique(np.array(numbers, np.int64)), delta)) == [page + delta for page in want]


@SOME
@given(SETS, st.data())
def test_where_keeps_pages_under_the_mask(numbers: list[int], data: st.DataObject) -> None:
    want = sorted(set(numbers))
    mask = data.draw(st.lists(st.booleans(), min_size=len(want), max_size=len(want)))
    sel = sort_unique(np.array(numbers, np.int64))
    if not want:
        return

    kept = where(sel, np.array(mask, bool))

    assert pages(kept) == [page for page, keep in zip(want, mask, strict=True) if keep]


@SOME
@given(st.integers(0, 40), st.integers(1, 20), st.data())
def test_where_on_large_pages_keeps_their_step(block: int, n: int, data: st.DataObject) -> None:
    mask = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))

    kept = where(run(block * 512, n, 512), np.array(mask, bool))

    assert pages(kept) == [(block + i) * 512 for i in range(n) if mask[i]]


@SOME
@given(SETS)
def test_take_looks_up_each_page(numbers: list[int]) -> None:
    table = np.arange(6000, dtype=np.uint32) * 7
    want = sorted(set(numbers))

    assert take(table, sort_unique(np.array(numbers, np.int64))).tolist() == [page * 7 for page in want]


@SOME
@given(SETS)
def test_a_selector_indexes_for_writing(numbers: list[int]) -> None:
    table = np.zeros(6000, np.uint8)

    table[sort_unique(np.array(numbers, np.int64))] = 1

    assert np.flatnonzero(table).tolist() == sorted(set(numbers))


@SOME
@given(SETS, st.sampled_from([0, 1, 9]))
def test_blocks_are_the_set_of_block_numbers(numbers: list[int], order: int) -> None:
    want = sorted({page >> order for page in numbers})

    assert pages(blocks(sort_unique(np.array(numbers, np.int64)), order)) == want


@SOME
@given(SETS, st.sampled_from([0, 1, 9]))
def test_heads_are_the_first_pages_of_blocks(numbers: list[int], order: int) -> None:
    sel = sort_unique(np.array(numbers, np.int64))
    want = sorted({page >> order << order for page in numbers})

    assert pages(heads(blocks(sel, order), order)) == want


@SOME
@given(SETS, st.sampled_from([0, 1, 9]))
def test_expand_covers_whole_blocks(numbers: list[int], order: int) -> None:
    sel = sort_unique(np.array(numbers, np.int64))
    numbered = sorted({page >> order for page in numbers})
    want = [page for block in numbered for page in range(block << order, block + 1 << order)]

    assert pages(expand(heads(blocks(sel, order), order), order)) == want


@SOME
@given(st.lists(st.integers(0, 40), unique=True, max_size=12))
def test_expand_keeps_the_order_of_frames(frames: list[int]) -> None:
    """Frames behind large pages come in any order; page i of the result is behind gfn i."""
    want = [page for frame in frames for page in range(frame * 512, frame * 512 + 512)]

    assert pages(expand(contiguous(np.array(frames, np.int64) * 512, 512), 9)) == want


@SOME
@given(st.integers(0, 3), st.integers(0, 12))
def test_blocks_of_a_run_of_large_pages(block: int, n: int) -> None:
    """Indexes of 2M entries, and of the 1G entries above them."""
    sel = run(block * 512, n, 512)

    assert pages(blocks(sel, 9)) == list(range(block, block + n))
    assert pages(blocks(sel, 18)) == sorted({(block + i) >> 9 for i in range(n)})


@SOME
@given(st.integers(0, 3), st.integers(0, 12))
def test_heads_of_a_run_is_a_run(block: int, n: int) -> None:
    sel = heads(slice(block, block + n, 1), 9)

    assert isinstance(sel, slice)
    assert pages(sel) == [(block + i) * 512 for i in range(n)]


@pytest.mark.parametrize("n", [0, 1, PIECE_SCATTERED, PIECE_SCATTERED + 1, PIECE_RUN, 3 * PIECE_RUN + 5])
@pytest.mark.parametrize("step", [1, 2])
def test_pieces_cover_the_batch_in_order(n: int, step: int) -> None:
    sel: Sel = slice(7, 7 + n, 1) if step == 1 else np.arange(n, dtype=np.int64) * 2
    size = PIECE_RUN if step == 1 else PIECE_SCATTERED

    found = list(pieces(sel))

    assert [page for low, high in found for page in (low, high)][1:-1:2] == [high for _, high in found[:-1]]
    assert sum(high - low for low, high in found) == n
    assert all(0 < high - low <= size for low, high in found)


@SOME
@given(PAGES, st.integers(0, 60), st.integers(1, 9))
def test_small_pages_have_no_step(start: int, n: int, step: int) -> None:
    """A slice may leave pages out; what comes of it is those pages, and a slice only where it leaves out none."""
    sel = slice(start, start + n * step, step)
    small = small_pages(sel)
    assert pages(small) == pages(sel)
    assert not isinstance(small, slice) or small.step == 1
    assert small_pages(slice(3, 7)) == slice(3, 7)


@SOME
@given(SETS, PAGES)
def test_below_counts_pages_under_an_end(numbers: list[int], end: int) -> None:
    sel = sort_unique(numbers)
    assert below(sel, end) == sum(page < end for page in set(numbers))


@SOME
@given(st.lists(st.booleans(), max_size=20))
def test_leading_counts_up_to_the_first_that_does_not_hold(holds: list[bool]) -> None:
    assert leading(np.array(holds, bool)) == [*holds, False].index(False)


def test_empty() -> None:
    assert count(EMPTY) == 0
    assert pages(as_sel([])) == pages(sort_unique([])) == pages(contiguous(np.zeros(0, np.int64))) == []
    assert pages(blocks(EMPTY, 9)) == pages(heads(EMPTY, 9)) == pages(expand(EMPTY, 9)) == []


# ---- arrays ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("n", [0, 1, 1 << 10, 1 << 20])
def test_zeros_are_zeros_and_can_be_written(n: int, huge: bool) -> None:
    array = zeros(n, np.uint32, huge=huge)

    assert len(array) == n
    assert array.dtype == np.uint32
    assert not array.any()
    array[n // 2 :] = 3
    assert np.count_nonzero(array) == n - n // 2


def test_zeros_costs_nothing_until_touched() -> None:
    """2**34 words are 64 GiB; only what is written is there."""
    array = zeros(1 << 34, np.uint32)

    array[12_345_678_901] = 5

    assert array[12_345_678_900:12_345_678_902].tolist() == [0, 5]


def test_zeros_beyond_the_address_space() -> None:
    with pytest.raises(MemoryError):
        zeros(1 << 60, np.uint8)


@SOME
@given(st.lists(st.integers(0, 255), max_size=50), st.integers(0, 200))
def test_grown_keeps_content(content: list[int], n: int) -> None:
    array = grown(np.array(content, np.uint8), n)

    assert len(array) >= n
    assert array[: len(content)].tolist() == content
    assert not array[len(content) :].any()


def test_grown_copies_across_pieces() -> None:
    array = zeros(3 << 20, np.uint8)
    array[[0, 1 << 20, (3 << 20) - 1]] = 1, 2, 3

    larger = grown(array, 4 << 20)

    assert larger[[0, 1 << 20, (3 << 20) - 1]].tolist() == [1, 2, 3]
    assert np.count_nonzero(larger) == 3
    assert grown(larger, 10) is larger
