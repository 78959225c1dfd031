"""The VMM's address space (kernel: struct mm_struct): mappings at hvas, the frames behind them, and mmu notifiers.

KVM gets shared memory from here by GUP, and hears through notifiers when the host takes pages away.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.effects import Steps
from cvmcore.errors import UapiError
from cvmcore.pages import (
    EMPTY,
    IntArray,
    Sel,
    Words,
    all_zero,
    array_of,
    blocks,
    contiguous,
    count,
    expand,
    first,
    frames_of,
    heads,
    last,
    shift,
    take,
    where,
    words_of,
    zeros,
)
from cvmcore.types import PAGE_SHIFT, PG_LEVEL_2M, PG_LEVEL_4K, Use

if TYPE_CHECKING:
    from cvmcore.host import Host
    from cvmcore.mem.gmem import GmemFile

_BASE = 0x7F00_0000_0000
_GIB = 1 << 30
TASK_SIZE = 1 << 47

HUGE = 1
"""Flag of a mapping word: the page is part of a large page of 2 MiB."""


class Notifier(Protocol):
    """Whoever mirrors this address space (kernel: struct mmu_notifier)."""

    def unmap_hva_range(self, hva_page: int, n: int, take_away: Steps[None]) -> Steps[None]:
        """Hva pages [hva_page, hva_page + n) go away: open a frame, zap, run `take_away`, close the frame."""

    def release(self) -> Steps[None]:
        """The address space itself goes away (mmu_notifier_ops.release): drop every mapping, nobody uses it now."""


@attrs.define(eq=False)
class Mapping:
    """One mapping: hva pages [start, start + npages), and what stands behind them.

    words: uint32 by page of the mapping, pfn << 5 | flags, 0 where nothing was touched yet (anonymous memory).
    For a mapping of a guest_memfd the frames are the inode's, from page `pgoff` on.
    """

    start: int
    npages: int
    backing_level: int
    words: Words
    gmem: GmemFile | None = None
    pgoff: int = 0
    locked: bool = False
    """mlock(2): the pages are not given back on advice."""

    @property
    def end(self) -> int:
        return self.start + self.npages

    @property
    def usable_end(self) -> int:
        """Behind the last page that can be touched: a guest_memfd may be shorter than its mapping, or not shared."""
        if self.gmem is None:
            return self.end
        return min(self.end, self.start + max(0, self.gmem.inode.npages - self.pgoff)) if (
            self.gmem.inode.init_shared
        ) else self.start


class Mm:
    """One process address space. hva pages are hva >> 12."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.mappings: list[Mapping] = []
        self.notifiers: list[Notifier] = []
        self.seq = 0
        """How often pages went away or moved."""
        self._next = _BASE >> PAGE_SHIFT

    # ---- mappings ---------------------------------------------------------------------------------------------

    def map(self, npages: int, backing_level: int = PG_LEVEL_4K, gmem: GmemFile | None = None, pgoff: int = 0) -> int:
        """A new mapping at an address aligned to 1 GiB (so that large pages fit); returns its hva."""
        words = zeros(0 if gmem else npages, np.uint32)
        mapping = Mapping(self._next, npages, backing_level, words, gmem, pgoff)
        self.mappings.append(mapping)
        self._next += -(-npages // (_GIB >> PAGE_SHIFT)) * (_GIB >> PAGE_SHIFT) + (_GIB >> PAGE_SHIFT)
        return mapping.start << PAGE_SHIFT

    def find(self, hva_page: int) -> Mapping | None:
        """The mapping that covers an hva page (kernel: vma_lookup)."""
        i = bisect_right(self.mappings, hva_page, key=lambda m: m.start) - 1
        if i >= 0 and hva_page < self.mappings[i].start + self.mappings[i].npages:
            return self.mappings[i]
        return None

    # ---- GUP --------------------------------------------------------------------------------------------------

    def resident_level(self, hva_page: int) -> int:
        """Level at which the host maps this page: what limits KVM's mapping level."""
        mapping = self.find(hva_page)
        if mapping is None or mapping.gmem is not None:
            return PG_LEVEL_4K
        return PG_LEVEL_2M if int(mapping.words[hva_page - mapping.start]) & HUGE else PG_LEVEL_4K

    def huge_blocks(self, hva_pages: Sel) -> npt.NDArray[np.bool_] | bool:
        """Which of the pages are, or will be once touched, part of a large page: one bool for all, or one each."""
        mapping = self.find(first(hva_pages))
        if mapping is None or mapping.gmem is not None or mapping.backing_level < PG_LEVEL_2M:
            return False
        return large_blocks(mapping.words, shift(hva_pages, -mapping.start), HUGE)

    def gup(self, hva_pages: Sel, call: str = "get_user_pages") -> Sel:
        """`fault_in`, and charge `gup_4k` a page."""
        self.host.meter.charge("gup_4k", count(hva_pages))
        return self.fault_in(hva_pages, call)

    def fault_in(self, hva_pages: Sel, call: str = "get_user_pages") -> Sel:
        """Frames behind hva pages of one mapping, allocated and cleared where they were not yet.

        Raises UapiError(EFAULT) where nothing is mapped, ENOMEM where the host is full (no small page is faulted in
        then).
        """
        mapping = self.find(first(hva_pages))
        if mapping is None or last(hva_pages) >= mapping.start + mapping.npages:
            raise UapiError(errno.EFAULT, call, f"hva {first(hva_pages) << PAGE_SHIFT:#x} is not mapped")
        index = shift(hva_pages, -mapping.start)
        if mapping.gmem is not None:
            if last(hva_pages) >= mapping.usable_end:
                raise UapiError(errno.EFAULT, call, "SIGBUS: beyond the file, or its memory is not shared")
            return mapping.gmem.inode.populate(shift(index, mapping.pgoff))
        words = take(mapping.words, index)
        if all_zero(words):
            absent = index
        elif np.count_nonzero(words) == len(words):
            return frames_of(words)
        else:
            absent = where(index, words == 0)
        if mapping.backing_level >= PG_LEVEL_2M:
            self._fault_in_large(mapping, absent)
            absent = where(absent, take(mapping.words, absent) == 0)
        pfns = self._fault_in(mapping, absent)
        return pfns if count(pfns) == len(words) else frames_of(take(mapping.words, index))

    def holds(self, hva_pages: Sel, pfns: Sel) -> bool:
        """Whether these frames stand behind these hva pages of one mapping."""
        mapping = self.find(first(hva_pages))
        if mapping is None or mapping.gmem is not None:
            return mapping is not None
        words = take(mapping.words, shift(hva_pages, -mapping.start)) >> np.uint32(5)
        return not np.count_nonzero(words != array_of(pfns))

    def fault_in_large(self, hva_pages: Sel) -> Sel:
        """First frames of the large pages at these hva pages (heads of blocks that `huge_blocks` named); only of the
        first of them, where the host has no more."""
        mapping = self.find(first(hva_pages))
        assert mapping is not None
        index = shift(hva_pages, -mapping.start)
        self._fault_in_large(mapping, index)
        return leading_large(take(mapping.words, index), HUGE)

    def _fault_in_large(self, mapping: Mapping, index: Sel) -> None:
        """Large pages for the empty blocks that the pages lie in, for as many as the host has."""
        host = self.host
        empty = empty_blocks(mapping.words, array_of(blocks(index, 9)))
        if len(empty) and count(blocks_2m := host.frames.alloc(len(empty), Use.ANON, 9)):
            empty = empty[: count(blocks_2m)]
            pages = expand(heads(contiguous(empty), 9), 9)
            pfns = expand(blocks_2m, 9)
            host.memory.clear(pfns)
            mapping.words[pages] = words_of(pfns, HUGE)
            host.meter.charge("page_clear_2m", len(empty))

    def _fault_in(self, mapping: Mapping, absent: Sel) -> Sel:
        """New frames, cleared, behind absent pages."""
        host = self.host
        pfns = host.frames.alloc(count(absent), Use.ANON)
        host.memory.clear(pfns)
        host.meter.charge("page_clear_4k", count(absent))
        mapping.words[absent] = words_of(pfns, 0)
        return pfns

    # ---- the host takes pages away ----------------------------------------------------------------------------

    def take_away(self, hva: int, size_bytes: int) -> Steps[None]:
        """madvise(MADV_DONTNEED): pages are zapped, then freed; pinned frames live on without an owner.

        Mapping by mapping, as the kernel does: what is mapped goes, then UapiError(ENOMEM) where there were holes.
        EINVAL where hva is not page aligned, and at the first mapping that is locked.
        """
        start, n = self._pages("madvise", hva, size_bytes)
        if n == 0:
            return
        there = 0
        for mapping, pages in list(self.ranges(start, n)):
            if mapping.locked:
                raise UapiError(errno.EINVAL, "madvise", f"hva {first(pages) << PAGE_SHIFT:#x} is locked")
            there += count(pages)
            yield from self._notify(first(pages), count(pages), self._drop(mapping, shift(pages, -mapping.start)))
        if there < n:
            raise UapiError(errno.ENOMEM, "madvise", f"hva {hva:#x} is not wholly mapped")

    def _drop(self, mapping: Mapping, index: Sel) -> Steps[None]:
        """The frames behind pages of a mapping are freed; those of a guest_memfd stay in it."""
        if mapping.gmem is None:
            words = take(mapping.words, index)
            if np.count_nonzero(words):
                used = where(index, words != 0)
                self.host.frames.free(frames_of(take(mapping.words, used)))
                self._break_huge(mapping, used)
                mapping.words[used] = 0
                self.seq += 1
        return
        yield

    def migrate(self, hva: int, size_bytes: int) -> Steps[int]:
        """The host compacts: each present page that is not pinned moves to another frame, as long as there are free
        ones. Returns pages moved. A large page moves where no page of it is pinned.

        Content is copied as the host sees it, so an encrypted page arrives as noise (reference: sev.md 1).
        """
        mapping, start, n = self._range("migrate_pages", hva, size_bytes)
        moved = 0

        def move() -> Steps[None]:
            nonlocal moved
            index = slice(start - mapping.start, start - mapping.start + n, 1)
            words = mapping.words[index]
            movable = np.flatnonzero(words)
            movable = movable[~self._pinned(words[movable])]
            movable = movable[: self.host.frames.available]
            if len(movable):
                pages = contiguous(movable + index.start)
                old = frames_of(take(mapping.words, pages))
                new = self.host.frames.alloc(len(movable), Use.ANON)
                self.host.memory.copy_raw(old, new)
                self.host.meter.charge("host_copy_4k", len(movable))
                self._break_huge(mapping, pages)
                mapping.words[pages] = words_of(new, 0)
                self.seq += 1
                self.host.frames.free(old)
                moved = len(movable)
            return
            yield

        yield from self._notify(start, n, move())
        return moved

    def _pinned(self, words: Words) -> npt.NDArray[np.bool_]:
        """Whether each page is held where it is: a pin anywhere in a large page holds all of it (one folio)."""
        pins, frames = self.host.frames.pins, words >> np.uint32(5)
        pinned: npt.NDArray[np.bool_] = pins[frames] != 0
        large = np.flatnonzero(words & np.uint32(HUGE))
        if len(large):
            blocks, at = np.unique(frames[large] >> 9, return_inverse=True)
            held = np.any(pins[(blocks[:, None] << 9) + np.arange(512, dtype=np.uint32)], axis=1)
            pinned[large] |= held[at]
        return pinned

    def unmap(self, hva: int, size_bytes: int) -> Steps[None]:
        """munmap: whatever is mapped in the range goes, mappings are cut at its ends.

        UapiError(EINVAL) where hva is not page aligned or the range is empty.
        """
        start, n = self._pages("munmap", hva, size_bytes)
        if n == 0:
            raise UapiError(errno.EINVAL, "munmap", "the range is empty")
        self._cut(start)
        self._cut(start + n)
        gone = [mapping for mapping, _ in self.ranges(start, n)]
        if not gone:
            return

        def drop() -> Steps[None]:
            for mapping in gone:
                yield from self._drop(mapping, slice(0, mapping.npages, 1))

        yield from self._notify(start, n, drop())
        self.mappings = [mapping for mapping in self.mappings if mapping not in gone]
        self.seq += 1
        for mapping in gone:
            if mapping.gmem is not None:
                yield from mapping.gmem.put()

    def _cut(self, at: int) -> None:
        """Make a mapping begin at this hva page, if it lies inside one. A large page that is cut becomes small."""
        mapping = self.find(at)
        if mapping is None or mapping.start == at:
            return
        head = at - mapping.start
        if at & 511 and mapping.backing_level >= PG_LEVEL_2M:
            self._break_huge(mapping, slice(head, head + 1, 1))
            self._cut((at | 511) + 1)
        tail = attrs.evolve(
            mapping, start=at, npages=mapping.npages - head, words=mapping.words[head:], pgoff=mapping.pgoff + head,
            backing_level=PG_LEVEL_4K if at & 511 else mapping.backing_level,
        )  # fmt: skip
        mapping.npages, mapping.words = head, mapping.words[:head]
        if mapping.gmem is not None:
            mapping.gmem.refs += 1
        self.mappings.insert(self.mappings.index(mapping) + 1, tail)

    def lock(self, hva: int, size_bytes: int) -> None:
        """mlock, without a limit: the pages are faulted in and stay.

        Raises UapiError: ENOMEM for a hole (what is before it is locked, not faulted in) or a page that cannot be
        touched, EAGAIN where the host is full.
        """
        start, n = self._pages("mlock", hva & ~4095, size_bytes + (hva & 4095))
        self._cut(start)
        self._cut(start + n)
        at = start
        for mapping, pages in self.ranges(start, n):
            if first(pages) > at:
                break
            mapping.locked = True
            at = mapping.end
        if at < start + n:
            raise UapiError(errno.ENOMEM, "mlock", f"hva {at << PAGE_SHIFT:#x} is not mapped")
        at = start
        for low, stop in self.touchable(start, n):
            try:
                self.gup(slice(low, stop, 1), "mlock")
            except UapiError as error:
                full = error.errno == errno.ENOMEM
                raise UapiError(errno.EAGAIN if full else errno.ENOMEM, "mlock", error.why) from None
            at = stop
        if n and at < start + n:
            raise UapiError(errno.ENOMEM, "mlock", f"hva {at << PAGE_SHIFT:#x} cannot be touched")

    def touchable(self, start: int, n: int) -> Iterator[tuple[int, int]]:
        """Hva pages [low, stop) of one mapping each, in order, up to the first that cannot be touched."""
        at = start
        while at < start + n:
            mapping = self.find(at)
            stop = min(mapping.usable_end, start + n) if mapping is not None else at
            if stop <= at:
                return
            yield at, stop
            at = stop

    def teardown(self) -> Steps[None]:
        """The address space goes away (exit_mmap): notifiers drop all they mirror and hear no more, then all memory is
        given back."""
        notifiers, self.notifiers = self.notifiers, []
        for notifier in notifiers:
            yield from notifier.release()
        for mapping in list(self.mappings):
            yield from self.unmap(mapping.start << PAGE_SHIFT, mapping.npages << PAGE_SHIFT)

    def _notify(self, start: int, n: int, work: Steps[None]) -> Steps[None]:
        """Run work inside every notifier's invalidation frame."""
        for notifier in self.notifiers:
            work = notifier.unmap_hva_range(start, n, work)
        yield from work

    @staticmethod
    def _pages(call: str, hva: int, size_bytes: int) -> tuple[int, int]:
        """(first hva page, pages) of a range. UapiError(EINVAL) where it cannot be one."""
        if hva & 4095 or hva < 0 or size_bytes < 0 or hva + size_bytes > TASK_SIZE:
            raise UapiError(errno.EINVAL, call, "hva must be a whole page, and the range one of user space")
        return hva >> PAGE_SHIFT, -(-size_bytes // 4096)

    def _range(self, call: str, hva: int, size_bytes: int) -> tuple[Mapping, int, int]:
        if hva & 4095 or size_bytes <= 0:
            raise UapiError(errno.EINVAL, call, "hva and size must be whole pages")
        start, n = hva >> PAGE_SHIFT, -(-size_bytes // 4096)
        mapping = self.find(start)
        if mapping is None or start + n > mapping.start + mapping.npages:
            raise UapiError(errno.ENOMEM, call, f"hva {hva:#x} is not mapped")
        return mapping, start, n

    @staticmethod
    def _break_huge(mapping: Mapping, pages: Sel) -> None:
        if mapping.backing_level >= PG_LEVEL_2M:
            for block in array_of(blocks(pages, 9)).tolist():
                mapping.words[block << 9 : (block + 1) << 9] &= np.uint32(0xFFFF_FFFF ^ HUGE)

    # ---- plain access of the VMM ------------------------------------------------------------------------------

    def ranges(self, hva_page: int, n: int) -> Iterator[tuple[Mapping, Sel]]:
        """The parts of an hva range that are mapped, each within one mapping."""
        for mapping in self.mappings:
            low, high = max(hva_page, mapping.start), min(hva_page + n, mapping.start + mapping.npages)
            if low < high:
                yield mapping, slice(low, high, 1)

    def present(self, mapping: Mapping, hva_pages: Sel) -> Sel:
        """Frames that stand behind the pages now, none faulted in."""
        if mapping.gmem is not None:
            return EMPTY
        words = take(mapping.words, shift(hva_pages, -mapping.start))
        return frames_of(words[words != 0])


def empty_blocks(words: Words, numbers: IntArray) -> IntArray:
    """Of these blocks of 512 pages, those that lie wholly in the array and hold nothing."""
    numbers = numbers[(numbers + 1) << 9 <= len(words)]
    rows = words[: len(words) & -512].reshape(-1, 512)
    empty: IntArray = numbers[~(rows[contiguous(numbers)] != 0).any(axis=1)]
    return empty


def large_blocks(words: Words, index: Sel, flag: int) -> npt.NDArray[np.bool_]:
    """Which pages are part of a large page (its words have `flag`), or will be once touched: their block is empty."""
    numbers = array_of(blocks(index, 9))
    large = np.zeros(len(numbers), bool)
    inside = numbers[(numbers + 1) << 9 <= len(words)]
    first_words = words[inside << 9]
    large[: len(inside)] = (first_words & np.uint32(flag)) != 0
    large[np.searchsorted(numbers, empty_blocks(words, inside[first_words == 0]))] = True
    return large[np.searchsorted(numbers, array_of(index) >> 9)]


def leading_large(words: Words, flag: int) -> Sel:
    """Frames of the leading words that have `flag`: first pages of large pages."""
    small = (words & np.uint32(flag)) == 0
    n = int(np.argmax(small)) if np.count_nonzero(small) else len(words)
    return contiguous(words[:n] >> 5, 512)
