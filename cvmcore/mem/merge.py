"""When small private pages become large again (the policy `merge`).

A table of an external root cannot be zapped so that the next fault maps it large, as a direct root's can: the content
would be lost. It is merged instead (`Tdp.promote`): blocked, flushed, promoted. Who starts that, and when?

`none`: nobody, as upstream. `scan`: a recovery thread looks at tables and merges every full one (kernel: the NX
recovery thread is the model for it). `fault`: a fault checks behind itself. One that a large page could have served,
had there not been a table, maps what the table lacks and merges it (series of 2023); one that was about a small page
merges the table if that is full now. `block`: the recovery thread blocks full tables; the guest's
next access to one faults, and that fault merges it, so that nothing is merged which nobody uses.

What is asked of a block before: it may be large (one attribute, within one slot, a large folio behind it, not logged),
and all 512 entries are there, with the same rights, on contiguous frames from an aligned one. Whether all of them are
in the same state the trusted party alone knows: it refuses, and the table is unblocked again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cvmcore.effects import Steps
from cvmcore.mem.mmulock import SHARD_ORDER, drop, write
from cvmcore.mem.tdp import PRESENT, TABLE, Root
from cvmcore.pages import IntArray, Sel, array_of, as_sel, heads, shift
from cvmcore.types import PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K, order_of, pages_per_level

if TYPE_CHECKING:
    from cvmcore.mem.slots import Memslot
    from cvmcore.vm import Vm

_OPEN = np.uint32(PRESENT | TABLE)


class Merge:
    """`none`. The others add a recovery pass, or have faults merge."""

    in_faults = False
    """Whether a fault that finds a table where a leaf of 2M could be fills the table and merges it."""
    has_thread = False
    """Whether there is a recovery thread: somebody has to call `recover` from time to time."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.merged = 0
        self.refused = 0
        """Merges that the trusted party refused."""
        self.blocked = 0
        """Tables that were blocked, to be merged when somebody uses them."""
        self._next = 0  # gfn at which the thread goes on

    # ---- what may be large ------------------------------------------------------------------------------------

    def _allowed(self, root: Root, slot: Memslot, level: int, index: Sel) -> npt.NDArray[np.bool_]:
        """Which entries at a level may be leaves, as far as slot, attributes and backing go."""
        heads_of, order = heads(index, order_of(level)), order_of(level)
        info = slot.lpage[level]
        at = array_of(index) - (slot.base_gfn >> order)
        allowed: npt.NDArray[np.bool_] = info.take(at) == 0
        if slot.logs_dirty or slot.gmem is None:
            allowed[:] = False
        elif level == PG_LEVEL_2M:
            allowed &= slot.gmem.inode.huge_blocks(shift(heads_of, slot.to_index(heads_of)))
        return allowed

    def may_merge(self, root: Root, slot: Memslot, level: int, at: int) -> bool:
        """Whether the table at an entry could become a leaf now (mmu_lock held)."""
        if level > self.vm.caps.max_promoted_level or not self.vm.caps.promotes:
            return False
        whole = slot.base_gfn <= at << order_of(level) and (at + 1) << order_of(level) <= slot.end_gfn
        return (
            whole
            and bool(self._allowed(root, slot, level, slice(at, at + 1, 1))[0])
            and self.vm.tdp.can_be_huge(root, at << order_of(level), level) is not None
        )

    def _full_tables(self, root: Root, slot: Memslot, level: int, start: int) -> Iterator[int]:
        """Entry indexes at a level, from gfn `start` of the slot on, of open tables that could be leaves. Looking at
        the 512 entries of each that may be large is charged."""
        order = order_of(level)
        for run in root.under_tables(level, max(start, -(-slot.base_gfn >> order) << order), slot.end_gfn):
            low, high = run.start, min(run.stop, slot.end_gfn >> order)
            index: Sel = slice(low, high, 1)
            if low >= high:
                continue
            found = (root.entries[level][low:high] & _OPEN) == _OPEN
            if np.count_nonzero(found):
                found &= self._allowed(root, slot, level, index)
            for at in (np.flatnonzero(found) + low).tolist():
                self.vm.host.meter.charge("table_scan")
                if self.vm.tdp.can_be_huge(root, at << order, level) is not None:
                    yield at

    # ---- merging ----------------------------------------------------------------------------------------------

    def merge(self, root: Root, slot: Memslot, level: int, at: int) -> Steps[bool]:
        """Merge the table at an entry if it can be, blocked or not; what is blocked and cannot be is unblocked
        (mmu_lock held for write). Returns whether there is a leaf now."""
        word = int(root.entries[level][at])
        if not word & TABLE:
            return bool(word & PRESENT)
        if self.may_merge(root, slot, level, at):
            stop = yield from self.vm.tdp.promote(root, at << order_of(level), level)
            self.merged += stop is None
            self.refused += stop is not None
            return stop is None
        if not word & PRESENT:
            yield from self.vm.tdp.unblock(root, level, slice(at, at + 1, 1))
        return False

    def locked_merge(self, root: Root, slot: Memslot, level: int, at: int) -> Steps[bool]:
        """`merge`, under mmu_lock."""
        locks = self.vm.mmu_lock.covering(slice(at << order_of(level), (at + 1) << order_of(level), 1))
        yield from write(locks)
        merged = yield from self.merge(root, slot, level, at)
        yield from drop(locks)
        return merged

    # ---- the recovery thread ----------------------------------------------------------------------------------

    def recover(self, nr_tables: int) -> Steps[int]:
        """One pass of the recovery thread: at most so many tables, from where the last pass stopped. Returns with how
        many it did something."""
        yield from ()
        return 0

    def _slots(self) -> list[tuple[Memslot, int]]:
        """Slots with private memory behind the last pass, and where in each to begin."""
        slots = [slot for slot in self.vm.slots if slot.gmem is not None and slot.end_gfn > self._next]
        return [(slot, max(slot.base_gfn, self._next)) for slot in slots]


class ScanMerge(Merge):
    """`scan`: merge every full table, whoever uses it or not."""

    has_thread = True

    def recover(self, nr_tables: int) -> Steps[int]:
        root = self.vm.tdp.mirror
        if root is None:
            return 0
        done = 0
        for level in (PG_LEVEL_2M, PG_LEVEL_1G):
            if level > self.vm.caps.max_promoted_level:
                break
            for slot, start in self._slots():
                for at in self._full_tables(root, slot, level, start if level == PG_LEVEL_2M else slot.base_gfn):
                    if done == nr_tables:
                        return done
                    self._next = (at + 1) << order_of(level)
                    if slot in self.vm.slots:
                        done += yield from self.locked_merge(root, slot, level, at)
        self._next = 0
        return done


class FaultMerge(Merge):
    """`fault`: no thread."""

    in_faults = True


class BlockMerge(Merge):
    """`block`: the thread blocks, and faults on what it has blocked merge."""

    has_thread = True

    def recover(self, nr_tables: int) -> Steps[int]:
        root = self.vm.tdp.mirror
        if root is None:
            return 0
        done = 0
        for slot, start in self._slots():
            while done < nr_tables and slot in self.vm.slots:
                index = self._some(root, slot, start, nr_tables - done)
                if not len(index):
                    break
                start = self._next = int(index[-1] + 1) << order_of(PG_LEVEL_2M)
                blocked = yield from self._block(root, slot, index)
                done += blocked
                if blocked < len(index):
                    return done
            if done == nr_tables:
                return done
        self._next = 0
        return done

    def _some(self, root: Root, slot: Memslot, start: int, limit: int) -> IntArray:
        """At most so many full tables of the slot from gfn `start` on, all within one range that mmu_lock covers."""
        index: list[int] = []
        for at in self._full_tables(root, slot, PG_LEVEL_2M, start):
            if len(index) == limit or (index and (at ^ index[0]) >> SHARD_ORDER - 9):
                break
            index.append(at)
        return np.array(index, np.int64)

    def _block(self, root: Root, slot: Memslot, index: IntArray) -> Steps[int]:
        """Block tables that still can be merged: one flush serves all of them."""
        locks = self.vm.mmu_lock.covering(heads(index, order_of(PG_LEVEL_2M)))
        yield from write(locks)
        still = [at for at in index.tolist() if self.may_merge(root, slot, PG_LEVEL_2M, at)]
        still = [at for at in still if int(root.entries[PG_LEVEL_2M][at]) & PRESENT]
        done = 0
        if still:
            stop = yield from self.vm.tdp.block(root, PG_LEVEL_2M, as_sel(np.array(still, np.int64)))
            done = len(still) if stop is None else stop.done
        yield from drop(locks)
        self.blocked += done
        return done + len(index) - len(still)


MERGES: dict[str, type[Merge]] = {"none": Merge, "scan": ScanMerge, "fault": FaultMerge, "block": BlockMerge}
"""By the name of the policy."""


def absent_in(root: Root, gfn: int) -> Sel:
    """The 4K gfns of a 2M block that have no entry."""
    start = gfn & -pages_per_level(PG_LEVEL_2M)
    words = root.entries[PG_LEVEL_4K][start : start + pages_per_level(PG_LEVEL_2M)]
    return as_sel((np.flatnonzero(words == 0) + start).astype(np.int64))
