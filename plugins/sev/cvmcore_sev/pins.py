"""Long-term pins of SEV and SEV-ES guests' memory: on demand, by what a slot's mappings hold, or of a whole range.

Sources: demand pinning, RFC v1, Mar 2022; kernel: svm/sev.c:sev_pin_memory.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

import numpy as np

from cvmcore.errors import UapiError
from cvmcore.pages import PIECE_RUN, Sel, Words, array_of, contiguous, count, part, take, where, zeros
from cvmcore.types import (
    PAGES_2M,
    PG_LEVEL_1G,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    Batch,
    Fatal,
    HostView,
    InstallResult,
    Stopped,
    VmView,
    order_of,
    pages_per_level,
)
from cvmcore_sev.ghcb import split_2m

_LEVEL_SHIFT: Final = np.uint32(28)
_PFN: Final = np.uint32((1 << 28) - 1)


class PinMetadata:
    """Pins of one memslot, at `slot.arch`: level << 28 | pfn of the page that a mapping pinned, by its head's offset.

    One element a mapping, whatever its level; 0: none. (The RFC keeps a bitmap beside the pfns.)
    """

    def __init__(self, npages: int) -> None:
        self.pins: Words = zeros(npages, np.uint32)

    def held(self) -> Iterator[tuple[Sel, int]]:
        """First frames of pinned pages, and the pages' level, by pieces of the slot."""
        for start in range(0, len(self.pins), PIECE_RUN):
            words = self.pins[start : start + PIECE_RUN]
            if np.count_nonzero(words):
                yield from self.pages(words)

    def behind(self, heads: Words, level: int) -> tuple[Words, Words]:
        """Offsets and frames of the other 4K pages of large mappings at these heads, where none has its own pin."""
        inside = np.arange(1, pages_per_level(level), dtype=np.uint32)
        offsets = (heads[:, None] + inside).ravel()
        pfns = ((self.pins[heads] & _PFN)[:, None] + inside).ravel()
        bare = self.pins[offsets] == 0
        return offsets[bare], pfns[bare]

    @staticmethod
    def pages(words: Words) -> Iterator[tuple[Sel, int]]:
        """What elements say: first frames and level, one pair for each level."""
        levels = words >> _LEVEL_SHIFT
        for level in (PG_LEVEL_4K, PG_LEVEL_2M, PG_LEVEL_1G):
            some = levels == level
            if np.count_nonzero(some):
                yield contiguous((words[some] & _PFN).astype(np.int64), pages_per_level(level)), level


def sev_pin_pfn(vm: VmView, batch: Batch) -> InstallResult:
    """Pin one page, the head, of every mapping; a frame that another replaces is flushed and unpinned first."""
    metadata: PinMetadata | None = batch.slot.arch
    if metadata is None or batch.level > PG_LEVEL_1G:
        vm.bug("an encrypted page is mapped that cannot be pinned")
        return Stopped(0, Fatal(errno.EIO, "no pinning metadata, or level above 1G"))
    index, pfns = batch.indexes, batch.pfns
    old = take(metadata.pins, index)
    if np.count_nonzero(old):
        moved = (old & _PFN) != array_of(pfns).astype(np.uint32)
        levels = old >> _LEVEL_SHIFT
        _repin(vm, metadata, where(index, moved & (levels > batch.level)), batch.level)
        old = take(metadata.pins, index).copy()
        missing = moved | (levels < batch.level)
        if not np.count_nonzero(missing):
            return None
        for gone, level in metadata.pages(old[missing]):
            vm.host.meter.charge("cacheline_flush_4k", count(gone) << order_of(level))
            sev_unpin_memory(vm.host, [gone], level)
        index = where(index, missing)
        pfns = contiguous(array_of(pfns)[missing], pages_per_level(batch.level))
    host, order = vm.host, order_of(batch.level)
    host.frames.pin(pfns, order)
    host.meter.charge("gup_pin_4k", count(pfns))
    host.meter.charge("cacheline_flush_4k", count(pfns) << order)
    mark = batch.level << int(_LEVEL_SHIFT)
    if isinstance(pfns, slice):
        low = mark | pfns.start
        metadata.pins[index] = np.arange(low, low + pfns.stop - pfns.start, pfns.step or 1, dtype=np.uint32)
    else:
        metadata.pins[index] = pfns | mark
    return None


def _repin(vm: VmView, metadata: PinMetadata, index: Sel, level: int) -> None:
    """Large mappings that were split lose the pin at their head: their other pages get their own first.

    The RFC does not, and leaves them mapped and unpinned.
    """
    words = take(metadata.pins, index)
    for large in range(level + 1, PG_LEVEL_1G + 1):
        split = words >> _LEVEL_SHIFT == large
        if np.count_nonzero(split):
            offsets, pfns = metadata.behind(array_of(where(index, split)).astype(np.uint32), large)
            vm.host.frames.pin(contiguous(pfns.astype(np.int64)))
            vm.host.meter.charge("gup_pin_4k", len(pfns))
            metadata.pins[offsets] = pfns | (PG_LEVEL_4K << int(_LEVEL_SHIFT))


def sev_pin_memory(vm: VmView, hva: int, size_bytes: int, call: str) -> tuple[Sel, ...]:
    """Pin a range of the VMM's memory, and flush it. UapiError(ENOMEM) where not all of the range is there."""
    host = vm.host
    try:
        found = vm.gup_range(hva, size_bytes)
    except UapiError as error:
        raise UapiError(errno.ENOMEM, call, f"only a part of the range could be pinned ({error.why})") from None
    for pfns in found:
        n = count(pfns)
        large = 0
        if host.backing_level >= PG_LEVEL_2M:
            stretches = (contiguous(array_of(part(pfns, low, high))) for low, high in contig_runs(pfns))
            large = sum(count(split_2m(stretch)[0]) for stretch in stretches)
        host.frames.pin(pfns)
        host.meter.charge("gup_pin_2m", large)
        host.meter.charge("gup_pin_4k", n - large * PAGES_2M)
        host.meter.charge("cacheline_flush_4k", n)
    return tuple(found)


def sev_unpin_memory(host: HostView, pinned: list[Sel] | tuple[Sel, ...], level: int = PG_LEVEL_4K) -> None:
    """Give up pins of pages of a level, by their heads."""
    for pfns in pinned:
        host.frames.unpin(pfns, order_of(level))
        host.meter.charge("gup_unpin_4k", count(pfns))


def contig_runs(pfns: Sel) -> Iterator[tuple[int, int]]:
    """Positions [start, stop) of physically contiguous stretches."""
    if isinstance(pfns, slice):
        yield 0, count(pfns)
        return
    yield from pairwise([0, *(np.flatnonzero(pfns[1:] != pfns[:-1] + 1) + 1).tolist(), len(pfns)])
