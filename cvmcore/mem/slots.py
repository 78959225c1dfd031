"""Memslots (kernel: struct kvm_memory_slot, kvm_main.c) and what is tracked per slot: lpage_info, dirty bitmap."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.pages import Sel, Words, count, first, last, part, zeros
from cvmcore.types import (
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    PG_LEVEL_1G,
    PG_LEVEL_2M,
    order_of,
    pages_per_level,
)

if TYPE_CHECKING:
    from cvmcore.mem.gmem import GmemFile

MIXED = np.uint32(1 << 31)
"""lpage_info bit: the block's attributes are not uniform (KVM_LPAGE_MIXED_FLAG)."""


@attrs.define(eq=False, slots=False)
class Memslot:
    """A range of gfns with what backs it. `id` holds the address space in its high 16 bits."""

    id: int
    base_gfn: int
    npages: int
    hva: int
    flags: int
    gmem: GmemFile | None = None
    gmem_pgoff: int = 0
    gmem_only: bool = False
    """Shared and private faults both use guest_memfd (its file may be mapped)."""
    invalid: bool = False
    """The transient copy that is installed while the slot goes away: faults on it retry."""
    arch: Any = None
    lpage: dict[int, Words] = attrs.field(factory=dict)
    """disallow_lpage by level (2M, 1G): per block that touches the slot, a count, and the MIXED bit."""
    dirty: npt.NDArray[np.uint8] | None = None
    """One byte per page while the slot's dirty pages are logged."""

    @property
    def end_gfn(self) -> int:
        return self.base_gfn + self.npages

    @property
    def as_id(self) -> int:
        return self.id >> 16

    @property
    def has_gmem(self) -> bool:
        return bool(self.flags & KVM_MEM_GUEST_MEMFD)

    @property
    def logs_dirty(self) -> bool:
        return bool(self.flags & KVM_MEM_LOG_DIRTY_PAGES)

    @property
    def read_only(self) -> bool:
        return bool(self.flags & KVM_MEM_READONLY)

    @property
    def hva_page(self) -> int:
        return self.hva >> 12

    def to_index(self, gfns: Sel) -> int:
        """What to add to a gfn to get the index in the slot's guest_memfd."""
        return self.gmem_pgoff - self.base_gfn

    def alloc_lpage_info(self) -> None:
        """Forbid large pages where base, end, hva or guest_memfd offset are not aligned alike
        (x86.c:kvm_alloc_memslot_metadata; the guest_memfd offset is treated like the hva)."""
        for level in (PG_LEVEL_2M, PG_LEVEL_1G):
            order, size = order_of(level), pages_per_level(level)
            n = (self.end_gfn - 1 >> order) - (self.base_gfn >> order) + 1
            info = zeros(n, np.uint32)
            if self.base_gfn & (size - 1):
                info[0] = 1
            if self.end_gfn & (size - 1):
                info[-1] += 1
            backed_by_hva = not self.has_gmem or not self.gmem_only
            if (backed_by_hva and (self.hva_page ^ self.base_gfn) & (size - 1)) or (
                self.has_gmem and (self.gmem_pgoff ^ self.base_gfn) & (size - 1)
            ):
                info[:] = 1
            self.lpage[level] = info


class Memslots:
    """The slots of one VM: never overlapping within an address space, found by gfn."""

    def __init__(self) -> None:
        self.by_id: dict[int, Memslot] = {}
        self._sorted: list[Memslot] = []
        self.generation = 0

    def __iter__(self) -> Iterator[Memslot]:
        return iter(self._sorted)

    def replace(self, old: Memslot | None, new: Memslot | None) -> None:
        """Swap one slot for another, or add, or drop (the active set changes at once; readers hold SRCU)."""
        if old is not None:
            self._sorted.remove(old)
            del self.by_id[old.id]
        if new is not None:
            self.by_id[new.id] = new
            self._sorted.append(new)
            self._sorted.sort(key=lambda s: (s.as_id, s.base_gfn))
        self.generation += 1

    def find(self, gfn: int, as_id: int = 0) -> Memslot | None:
        """The slot that holds a gfn (kernel: gfn_to_memslot), valid or not."""
        i = bisect_right(self._sorted, (as_id, gfn), key=lambda s: (s.as_id, s.base_gfn)) - 1
        if i >= 0 and (slot := self._sorted[i]).as_id == as_id and gfn < slot.end_gfn:
            return slot
        return None

    def overlapping(self, start: int, end: int, as_id: int | None = None) -> list[Memslot]:
        """Slots that intersect gfns [start, end), in one address space or in all."""
        return [
            s
            for s in self._sorted
            if s.base_gfn < end and start < s.end_gfn and (as_id is None or s.as_id == as_id)
        ]

    def in_hva_range(self, hva_page: int, n: int) -> list[tuple[Memslot, int, int]]:
        """(slot, first gfn, end gfn) of every part of a slot that lies in an hva range
        (kernel: kvm_for_each_memslot_in_hva_range)."""
        found = []
        for slot in self._sorted:
            low, high = max(hva_page, slot.hva_page), min(hva_page + n, slot.hva_page + slot.npages)
            if low < high:
                found.append((slot, slot.base_gfn + low - slot.hva_page, slot.base_gfn + high - slot.hva_page))
        return found

    def split(self, gfns: Sel) -> list[tuple[int, int, Memslot | None]]:
        """Positions [start, stop) of a gfn batch with the slot that holds them (None: no slot), in order."""
        n = count(gfns)
        start = 0
        parts: list[tuple[int, int, Memslot | None]] = []
        while start < n:
            gfn = first(gfns) if start == 0 else first(part(gfns, start, start + 1))
            slot = self.find(gfn)
            if slot is not None and last(gfns) < slot.end_gfn:
                stop = n
            else:
                bound = slot.end_gfn if slot is not None else min(
                    (s.base_gfn for s in self._sorted if s.base_gfn > gfn), default=1 << 52
                )
                if isinstance(gfns, slice):
                    stop = min(n, bound - gfns.start)
                else:
                    stop = int(np.searchsorted(gfns, bound))
            parts.append((start, stop, slot))
            start = stop
        return parts
