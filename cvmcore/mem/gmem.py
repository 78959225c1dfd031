"""guest_memfd (kernel: virt/kvm/guest_memfd.c): the inode is the memory, a file is one VM's view with its bindings.

Frames leave an inode only through `GmemInode.truncate`, which gives the backend the pfns (`gmem_invalidate`) and
nothing else: no VM, slot or gfn need exist any more.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.effects import Lock, Steps
from cvmcore.errors import UapiError
from cvmcore.mem.mm import empty_blocks, large_blocks, leading_large
from cvmcore.pages import (
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
    part,
    take,
    where,
    words_of,
    zeros,
)
from cvmcore.types import GUEST_MEMFD_FLAG_INIT_SHARED, PG_LEVEL_2M, Use

if TYPE_CHECKING:
    from cvmcore.host import Host
    from cvmcore.mem.slots import Memslot
    from cvmcore.vm import Vm

EHWPOISON = 133
"""Linux's number; not every Python's errno module has it."""

UPTODATE, HUGE, POISON = 1, 2, 4
"""Flags of a word: content is defined; part of a 2M folio; the memory failed."""


class GmemInode:
    """The memory: words (uint32) by page index, pfn << 5 | flags, 0 where nothing is allocated."""

    def __init__(self, host: Host, npages: int, flags: int, level: int) -> None:
        self.host = host
        self.npages = npages
        self.flags = flags
        self.level = level
        """Largest folio: PG_LEVEL_4K or PG_LEVEL_2M."""
        self.words: Words = zeros(npages, np.uint32)
        self.allocated = 0
        self.files: list[GmemFile] = []
        self.invalidate_lock = Lock("invalidate_lock", 40)

    @property
    def init_shared(self) -> bool:
        return bool(self.flags & GUEST_MEMFD_FLAG_INIT_SHARED)

    def huge_blocks(self, index: Sel) -> npt.NDArray[np.bool_] | bool:
        """Which pages are, or will be once allocated, in a 2M folio: one bool for all, or one each."""
        if self.level < PG_LEVEL_2M:
            return False
        return large_blocks(self.words, index, HUGE)

    def folio_order(self, index: Sel) -> tuple[int, int]:
        """Order of the folios behind allocated pages, and for how many leading pages it is the same."""
        if self.level < PG_LEVEL_2M:
            return 0, count(index)
        huge = (take(self.words, index) & np.uint32(HUGE)) != 0
        differs = huge != huge[0]
        return 9 if huge[0] else 0, int(np.argmax(differs)) if np.count_nonzero(differs) else len(huge)

    def allocate(self, index: Sel) -> Words:
        """Make sure that folios stand at the pages, not yet zeroed; their words. Raises UapiError(ENOMEM) half way."""
        words = take(self.words, index)
        present = int(np.count_nonzero(words))
        if present == len(words):
            return words
        absent = index if present == 0 else where(index, words == 0)
        if self.level >= PG_LEVEL_2M:
            self._allocate_large(absent)
            absent = where(absent, take(self.words, absent) == 0)
        if count(absent):
            self._allocate(absent)
        return take(self.words, index)

    def _allocate(self, absent: Sel, zeroed: bool = False) -> Sel:
        """Small folios for absent pages, zeroed at once or left as they are; their frames. Raises UapiError(ENOMEM)
        half way."""
        frames, meter, wanted = self.host.frames, self.host.meter, count(absent)
        n = min(wanted, frames.available)
        pfns = frames.alloc(n, Use.GMEM)
        self.words[part(absent, 0, n)] = words_of(pfns, UPTODATE if zeroed else 0)
        self.allocated += n
        meter.charge("gmem_alloc_4k", n)
        if zeroed:
            self.host.memory.clear(pfns)
            meter.charge("page_clear_4k", n)
        if n < wanted:
            raise UapiError(errno.ENOMEM, "kvm_gmem_get_folio", f"the host had {n} of {wanted} free frames")
        return pfns

    def _allocate_large(self, index: Sel) -> None:
        """2M folios for the empty blocks that the pages lie in, for as many as the host has."""
        empty = empty_blocks(self.words, array_of(blocks(index, 9)))
        if len(empty) and count(blocks_2m := self.host.frames.alloc(len(empty), Use.GMEM, 9)):
            empty = empty[: count(blocks_2m)]
            pages = expand(heads(contiguous(empty), 9), 9)
            self.words[pages] = words_of(expand(blocks_2m, 9), HUGE)
            self.allocated += count(pages)
            self.host.meter.charge("gmem_alloc_4k", len(empty))

    def populate(self, index: Sel) -> Sel:
        """Frames of the pages, allocated and zeroed where they were not yet (the frames in batch order).

        Raises UapiError: ENOMEM where the host is full, EHWPOISON where a page's memory failed.
        """
        if self.level < PG_LEVEL_2M and all_zero(take(self.words, index)):
            return self._allocate(index, zeroed=True)
        words = self.allocate(index)
        defined = words & np.uint32(UPTODATE)
        n = int(np.count_nonzero(defined))
        if np.count_nonzero(words & np.uint32(POISON)):
            page = first(where(index, (words & np.uint32(POISON)) != 0))
            raise UapiError(EHWPOISON, "kvm_gmem_get_pfn", f"the memory at index {page:#x} failed")
        if n != len(words):
            self._zero(index if n == 0 else where(index, defined == 0))
        return frames_of(words)

    def usable(self, index: Sel) -> int:
        """How many leading pages are allocated and not poisoned."""
        words = take(self.words, index)
        stops = (words == 0) | ((words & np.uint32(POISON)) != 0)
        return int(np.argmax(stops)) if np.count_nonzero(stops) else len(words)

    def populate_large(self, index: Sel) -> Sel:
        """First frames of the 2M folios at these pages (heads of blocks that `huge_blocks` named), zeroed; only of the
        first of them, where the host has no more."""
        self._allocate_large(index)
        words = take(self.words, index)
        pfns = leading_large(words, HUGE)
        index, words = part(index, 0, count(pfns)), words[: count(pfns)]
        defined = words & np.uint32(UPTODATE)
        if np.count_nonzero(defined) != len(words):
            self._zero(where(index, defined == 0))
        return pfns

    def _zero(self, index: Sel) -> None:
        memory, meter = self.host.memory, self.host.meter
        words = take(self.words, index)
        if self.level >= PG_LEVEL_2M:
            huge = (words & np.uint32(HUGE)) != 0
            if np.count_nonzero(huge):
                folios = blocks(where(index, huge), 9)
                pages = expand(heads(folios, 9), 9)
                memory.clear(frames_of(take(self.words, pages)))
                self.words[pages] |= np.uint32(UPTODATE)
                meter.charge("page_clear_2m", count(folios))
                index = where(index, ~huge)
                if not count(index):
                    return
                words = take(self.words, index)
        memory.clear(frames_of(words))
        self.words[index] = words | np.uint32(UPTODATE)
        meter.charge("page_clear_4k", count(index))

    def truncate(self, start: int, n: int) -> Steps[int]:
        """Free the folios at [start, start + n): the backend takes them back by pfn, then the host has them.

        Returns the number of pages freed. A 2M folio that is cut loses its other pages' largeness, not the pages.
        """
        freed = 0
        stop = min(start + n, self.npages)
        for low in range(start, stop, 1 << 18):
            if self.allocated == 0:
                break  # a file may be far larger than what it holds
            window = slice(low, min(low + (1 << 18), stop), 1)
            words = self.words[window]
            held = int(np.count_nonzero(words))
            if held == 0:
                continue
            index = window if held == len(words) else where(window, words != 0)
            pfns = frames_of(take(self.words, index))
            if self.level >= PG_LEVEL_2M:
                for block in {first(index) >> 9, last(index) >> 9}:
                    self.words[block << 9 : (block + 1) << 9] &= np.uint32(0xFFFF_FFFF ^ HUGE)
            self.words[index] = 0
            self.allocated -= held
            freed += held
            self.host.meter.charge("punch_hole_4k", held)
            yield from self.host.free_gmem(pfns)
        return freed

    def poison(self, index: int) -> None:
        """The memory at a page fails (kvm_gmem_error_folio); the folio is kept, in small pages, and the next lookup
        says so. Nothing happens where nothing is allocated."""
        if index < self.npages and self.words[index]:
            self.words[index] |= np.uint32(POISON)
            self.host.frames.fail(int(self.words[index]) >> 5)
            self.words[index & ~511 : (index | 511) + 1] &= np.uint32(0xFFFF_FFFF ^ HUGE)


@attrs.define(eq=False)
class GmemFile:
    """One VM's view of an inode: bindings of page ranges to memslots (at most one slot per index)."""

    inode: GmemInode
    vm: Vm
    bindings: list[tuple[int, int, Memslot]] = attrs.field(factory=list)
    """(first index, pages, slot), sorted."""
    refs: int = 1
    """Descriptors and mappings that hold the file open."""

    def bound(self, start: int, n: int) -> list[tuple[int, int, Memslot]]:
        """Bindings that intersect [start, start + n)."""
        return [b for b in self.bindings if b[0] < start + n and start < b[0] + b[1]]

    def bind(self, slot: Memslot) -> None:
        self.bindings.append((slot.gmem_pgoff, slot.npages, slot))
        self.bindings.sort(key=lambda b: b[0])

    def unbind(self, slot: Memslot) -> None:
        self.bindings = [b for b in self.bindings if b[2] is not slot]

    def put(self) -> Steps[None]:
        """Drop one reference; the last one releases the file (kvm_gmem_release)."""
        self.refs -= 1
        if self.refs == 0:
            yield from self.vm.gmem_release(self)


