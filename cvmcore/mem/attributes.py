"""Memory attributes: a word per gfn that user space sets (kernel: kvm->mem_attr_array), and the mixed tracking."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cvmcore.mem.slots import MIXED
from cvmcore.pages import Sel, array_of, grown, last, take, zeros
from cvmcore.types import KVM_MEMORY_ATTRIBUTE_PRIVATE, PG_LEVEL_1G, PG_LEVEL_2M, order_of, pages_per_level

if TYPE_CHECKING:
    from cvmcore.mem.slots import Memslot

PRIVATE = KVM_MEMORY_ATTRIBUTE_PRIVATE


class Attributes:
    """uint8 by gfn; absent gfns are shared. Exists apart from memslots and outlives them."""

    def __init__(self) -> None:
        self.words: npt.NDArray[np.uint8] = zeros(0, np.uint8)

    def cover(self, end_gfn: int) -> None:
        """Make room up to end_gfn (kernel: xa_reserve). MemoryError where there is none."""
        self.words = grown(self.words, end_gfn)

    def of(self, gfns: Sel) -> npt.NDArray[np.uint8]:
        """Attributes of sorted gfns; beyond the covered end they are shared."""
        if last(gfns) < len(self.words):
            return take(self.words, gfns)
        pages = array_of(gfns)
        words = np.zeros(len(pages), np.uint8)
        covered = pages[pages < len(self.words)]
        words[: len(covered)] = self.words[covered]
        return words

    def uniform(self, start: int, end: int, value: int) -> bool:
        """Whether all gfns [start, end) have this value (kvm_range_has_memory_attributes)."""
        part = self.words[start:end]
        if value == 0:
            return not np.count_nonzero(part)
        return len(part) == end - start and not np.count_nonzero(part != value)

    def store(self, start: int, end: int, value: int) -> None:
        self.words[start:end] = value

    def is_mixed(self, level: int, block: int) -> bool:
        """Whether a block's attributes are not uniform, by looking at each gfn."""
        part = self.words[block << order_of(level) : (block + 1) << order_of(level)]
        if len(part) < pages_per_level(level):
            return bool(np.count_nonzero(part))
        return bool(np.count_nonzero(part != part[0]))

    def track_mixed(self, slot: Memslot, start: int, end: int) -> None:
        """Recompute the MIXED bits of the blocks that [start, end) touches and that lie wholly in the slot.

        Blocks covered by the range are uniform; only its head and its tail need a look, the smaller level first.
        """
        start, end = max(start, slot.base_gfn), min(end, slot.end_gfn)
        if start >= end:
            return
        for level in (PG_LEVEL_2M, PG_LEVEL_1G):
            order = order_of(level)
            low, high = start >> order, (end - 1 >> order) + 1
            base = slot.base_gfn >> order
            info = slot.lpage[level]
            info[low - base : high - base] &= ~MIXED
            edges = {low, high - 1} if (high - low) > 1 else {low}
            for block in edges:
                inside = block << order >= slot.base_gfn and (block + 1) << order <= slot.end_gfn
                covered = start <= block << order and (block + 1) << order <= end
                if inside and not covered and self.is_mixed(level, block):
                    info[block - base] |= MIXED

    def with_edges(self, slot: Memslot, start: int, end: int) -> tuple[int, int]:
        """[start, end) of a slot, widened to the large blocks at its head and tail that may still be mapped large: they
        lie in the slot and are not mixed yet (kvm_arch_pre_set_memory_attributes)."""
        low, high = start, end
        for level in (PG_LEVEL_2M, PG_LEVEL_1G):
            order = order_of(level)
            for block in {start >> order, end - 1 >> order}:
                head, tail = block << order, (block + 1) << order
                if head >= slot.base_gfn and tail <= slot.end_gfn:
                    if not slot.lpage[level][block - (slot.base_gfn >> order)] & MIXED:
                        low, high = min(low, head), max(high, tail)
        return low, high

    def init_slot(self, slot: Memslot) -> None:
        """A new slot: MIXED bits of all its blocks from the attributes (kvm_mmu_init_memslot_memory_attributes)."""
        for level in (PG_LEVEL_2M, PG_LEVEL_1G):
            order = order_of(level)
            base = slot.base_gfn >> order
            low, high = -(-slot.base_gfn // (1 << order)), slot.end_gfn >> order
            if low >= high:
                continue
            part = self.words[low << order : high << order]
            if not len(part) or not np.count_nonzero(part):
                continue
            rows = part.reshape(-1, 1 << order)
            mixed = (rows != rows[:, :1]).any(axis=1)
            slot.lpage[level][low - base : high - base][mixed] |= MIXED
