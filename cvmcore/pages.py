"""Page selectors and lazily backed arrays: the two things that make a batch as cheap as its pages allow.

A `Sel` names pages (gfns, pfns, file indexes) in one of two shapes: a `slice` for a contiguous run, or a sorted,
unique `int64` array for scattered ones. Array code takes either without asking which: `table[sel]` is a view for a
run, and `take(table, sel)` a gather for scattered pages. A run of large pages is a slice whose step is the page's
size in 4K frames. Nothing here knows what the pages are for.

Sources of the rules: measured trials of two layouts (docs/design.md, 'Fast pages').
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int64]
Words: TypeAlias = npt.NDArray[np.uint32]
Sel: TypeAlias = slice | IntArray

EMPTY: slice = slice(0, 0, 1)

PIECE_SCATTERED = 32768
"""Pages per piece of a scattered batch. Smaller ones would stay in a nearer cache, but what a piece costs whatever
its size (some 10,000 to 20,000 bytecodes) would weigh more than the misses."""
PIECE_RUN = 131072
"""Pages per piece of a run."""

_NORESERVE: int | None = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else None)
"""Python names the flag from 3.13 on; the number is Linux' on x86 and Arm."""

_MAPPED_BYTES = 1 << 18
"""From this size on an array is a mapping of its own, so that untouched pages cost nothing and are given back."""

_watchers: list[list[mmap.mmap]] = []


@contextmanager
def mappings_made() -> Iterator[list[mmap.mmap]]:
    """The mappings behind all large arrays that are made meanwhile: for measurements, which back or clear them."""
    made: list[mmap.mmap] = []
    _watchers.append(made)
    try:
        yield made
    finally:
        _watchers.pop()


def zeros(n: int, dtype: npt.DTypeLike, *, huge: bool = False) -> npt.NDArray[Any]:
    """An array of n zeros that costs memory only where it is touched.

    `huge` asks for large host pages: faster to fill in order, dearer for a sparse guest.
    Raises MemoryError where the address space itself is not to be had.
    """
    nbytes = n * np.dtype(dtype).itemsize
    if nbytes < _MAPPED_BYTES or _NORESERVE is None:
        return np.zeros(n, dtype)
    try:
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    except OSError as error:
        raise MemoryError(f"cannot reserve {nbytes} bytes of address space") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    for made in _watchers:
        made.append(mapping)
    return np.frombuffer(mapping, dtype)


def grown(array: npt.NDArray[Any], n: int) -> npt.NDArray[Any]:
    """The array with at least n elements: itself, or a larger one with the old content and zeros behind it."""
    if n <= len(array):
        return array
    larger = zeros(max(n, 4 * len(array)), array.dtype)
    for start in range(0, len(array), 1 << 20):
        part = array[start : start + (1 << 20)]
        if part.any():
            larger[start : start + len(part)] = part
    return larger


# ---- selectors ------------------------------------------------------------------------------------------------


def run(start: int, n: int, step: int = 1) -> slice:
    """The run of n pages from start; `step` is the page size in 4K frames."""
    return slice(start, start + n * step, step)


def as_sel(pages: npt.ArrayLike) -> Sel:
    """Sorted unique pages as a selector; a contiguous array becomes a run."""
    array = np.asarray(pages, np.int64)
    n = len(array)
    if n == 0:
        return EMPTY
    low = int(array[0])
    if int(array[-1]) - low == n - 1:
        return slice(low, low + n, 1)
    return array


def small_pages(sel: Sel) -> Sel:
    """4K pages as a selector. A slice may leave some out; elsewhere a step says how large pages are."""
    return as_sel(array_of(sel)) if isinstance(sel, slice) and sel.step not in (None, 1) else sel


def below(sel: Sel, end: int) -> int:
    """How many of the sorted 4K pages lie below `end`."""
    if isinstance(sel, slice):
        return max(0, min(count(sel), end - int(sel.start)))
    return int(np.searchsorted(sel, end))


def leading(holds: npt.NDArray[np.bool_]) -> int:
    """How many of the first elements hold."""
    return len(holds) if np.count_nonzero(holds) == len(holds) else int(np.argmin(holds))


def contiguous(pages: npt.NDArray[Any], step: int = 1) -> Sel:
    """Pages in any order as a selector: a run if each is `step` above the one before, else the array itself."""
    n = len(pages)
    if n == 0:
        return EMPTY
    low = int(pages[0])
    if n == 1 or (
        int(pages[-1]) - low == (n - 1) * step
        and int(np.count_nonzero(pages[1:] - pages[:-1] != np.asarray(step).astype(pages.dtype))) == 0
    ):
        return slice(low, low + n * step, step)
    return pages.astype(np.int64)


def all_zero(values: npt.NDArray[Any]) -> bool:
    """Whether all are zero. Reductions are the fastest way for long arrays, not for short ones."""
    return not (np.count_nonzero(values) if len(values) < 4096 else np.maximum.reduce(values))


def run_of(words: Words, shift: int = 5) -> slice | None:
    """Where each word, a frame above `shift` flag bits, is one frame above the one before with the same flags: the run
    of frames. None where they are no run; the words must not be none."""
    n, low = len(words), int(words[0])
    if n > 1 and (
        int(words[-1]) - low != (n - 1) << shift
        or np.count_nonzero(words[1:] - words[:-1] == words.dtype.type(1 << shift)) < n - 1
    ):
        return None
    return slice(low >> shift, (low >> shift) + n, 1)


def frames_of(words: Words, shift: int = 5) -> Sel:
    """The frames above `shift` flag bits of the words, in any order; a run where they are one."""
    if not len(words):
        return EMPTY
    frames = run_of(words, shift)
    return frames if frames is not None else contiguous(words >> words.dtype.type(shift))


def words_of(frames: Sel, flags: int, shift: int = 5) -> Words:
    """Words of frames (pages of 4K, or larger ones by their step) above `shift` flag bits."""
    if isinstance(frames, slice):
        step = (frames.step or 1) << shift
        return np.arange(frames.start << shift | flags, frames.stop << shift | flags, step, dtype=np.uint32)
    words: Words = frames.astype(np.uint32)
    words <<= np.uint32(shift)
    words |= np.uint32(flags)
    return words


def sort_unique(pages: npt.ArrayLike) -> Sel:
    """Any page numbers below 2**32, as a selector: sorted on 32-bit keys, duplicates dropped, a run detected.

    The one entrance of scattered pages: everything behind it takes sorted unique pages for granted.
    """
    return as_sel(_distinct(np.sort(np.asarray(pages).astype(np.uint32))))


def _distinct(keys: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sorted keys, each once."""
    if len(keys) < 2:
        return keys
    keep = np.empty(len(keys), bool)
    keep[0] = True
    np.not_equal(keys[1:], keys[:-1], out=keep[1:])
    return keys[keep]


def count(sel: Sel) -> int:
    """How many pages."""
    if type(sel) is slice:
        if sel.step == 1:
            n: int = sel.stop - sel.start
            return n if n > 0 else 0
        return len(range(sel.start, sel.stop, sel.step or 1))
    return len(sel)


def first(sel: Sel) -> int:
    """The first page; the selector must not be empty."""
    return sel.start if type(sel) is slice else int(sel[0])


def last(sel: Sel) -> int:
    """The last page; the selector must not be empty."""
    if type(sel) is slice:
        return sel.stop - 1 if sel.step == 1 else range(sel.start, sel.stop, sel.step or 1)[-1]
    return int(sel[-1])


def array_of(sel: Sel) -> IntArray:
    """The pages as an int64 array."""
    return np.arange(sel.start, sel.stop, sel.step or 1, dtype=np.int64) if isinstance(sel, slice) else sel


def each(sel: Sel) -> Sequence[int]:
    """The pages as Python's own numbers: for a few of them."""
    return range(sel.start, sel.stop, sel.step or 1) if isinstance(sel, slice) else sel.tolist()


def take(table: npt.NDArray[Any], sel: Sel) -> npt.NDArray[Any]:
    """The table's values at the pages: a view for a run (copy before you write!), a gather for scattered pages."""
    return table[sel] if type(sel) is slice else table.take(sel)


def shift(sel: Sel, delta: int) -> Sel:
    """Every page moved by delta: gfns to file indexes, say."""
    if delta == 0:
        return sel
    return slice(sel.start + delta, sel.stop + delta, sel.step) if isinstance(sel, slice) else sel + delta


def part(sel: Sel, start: int, stop: int) -> Sel:
    """The pages at positions [start, stop)."""
    if type(sel) is slice:
        if start == 0 and sel.start + stop * (sel.step or 1) >= sel.stop:
            return sel
        chosen = range(sel.start, sel.stop, sel.step or 1)[start:stop]
        return slice(chosen.start, chosen.stop, chosen.step)
    return sel if start == 0 and stop >= len(sel) else sel[start:stop]


def where(sel: Sel, mask: npt.NDArray[np.bool_]) -> Sel:
    """The pages at which the mask holds. The slow branch: a mixed batch."""
    step = (sel.step or 1) if isinstance(sel, slice) else 1
    positions = np.flatnonzero(mask)
    chosen = first(sel) + positions * step if isinstance(sel, slice) else sel[positions]
    return contiguous(chosen, step)


def pieces(sel: Sel, start: int = 0) -> Iterable[tuple[int, int]]:
    """Positions [low, high) of the cache-sized pieces that a batch is walked in, from `start` on."""
    n = count(sel)
    size = PIECE_RUN if isinstance(sel, slice) else PIECE_SCATTERED
    if n - start <= size:
        return ((start, n),) if start < n else ()
    return [(low, min(n, low + size)) for low in range(start, n, size)]


def blocks(sel: Sel, order: int) -> Sel:
    """The unique blocks of 2**order pages that the pages lie in, as block numbers."""
    if order == 0:
        return sel
    if isinstance(sel, slice):
        if sel.stop <= sel.start:
            return EMPTY
        step = max(1, (sel.step or 1) >> order)
        return slice(sel.start >> order, (last(sel) >> order) + 1, step)
    return as_sel(_distinct(sel >> order))


def heads(block_sel: Sel, order: int) -> Sel:
    """The first pages of blocks: block numbers to page numbers, a run keeping its step."""
    if order == 0:
        return block_sel
    if isinstance(block_sel, slice):
        step = (block_sel.step or 1) << order
        return slice(block_sel.start << order, (block_sel.start << order) + count(block_sel) * step, step)
    return block_sel << order


def expand(head_sel: Sel, order: int) -> Sel:
    """All pages of the large pages whose first pages are given, in order."""
    if order == 0:
        return head_sel
    size = 1 << order
    if isinstance(head_sel, slice) and (head_sel.step == size or count(head_sel) <= 1):
        return slice(head_sel.start, head_sel.start + count(head_sel) * size, 1)
    return (array_of(head_sel)[:, None] + np.arange(size)).ravel()
