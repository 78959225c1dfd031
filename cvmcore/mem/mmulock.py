"""What guards a VM's page tables: mmu_lock, and the frame that invalidations open under it (kernel: kvm->mmu_lock,
mmu_invalidate_seq, mmu_invalidate_in_progress).

The policy `mmu_lock` says how it is made. `rw`: one rwlock for all of the VM, as upstream. `sharded`: one rwlock and
one frame for each GiB of gfns, the subtree below one entry of the third level, so that no leaf spans two; whoever
changes several takes them in ascending order. What hangs above the shards is only ever linked, by compare-exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from cvmcore.effects import Lock, Steps
from cvmcore.pages import Sel, count, last

RANK_MMU = 60
SHARD_ORDER = 18
"""A shard is a GiB: the largest leaf."""
NR_SHARDS = 64
"""Shards share locks and frames beyond so many."""

Seen: TypeAlias = "int | dict[int, int]"
"""What `Frame.snapshot` gives: how many invalidations had ended."""


class Frame:
    """The nesting count, range and sequence of one VM's invalidations (mmu_invalidate_*)."""

    def __init__(self) -> None:
        self.seq = 0
        self.in_progress = 0
        self.opened = 0
        """Invalidations that ever began: seq counts those that ended."""
        self.start = 0
        self.end = 0

    @property
    def parts(self) -> list[Frame]:
        """This frame, and those that it is the sum of."""
        return [self]

    def add(self, start: int, end: int) -> None:
        """One more invalidation, of gfns [start, end): the first one sets the range, nested ones widen it."""
        if self.in_progress:
            start, end = min(self.start, start), max(self.end, end)
        self.start, self.end = start, end
        self.opened += 1
        self.in_progress += 1

    def drop(self, start: int = 0, end: int = 0) -> None:
        """The invalidation of gfns [start, end) is over: seq first, then in_progress."""
        self.seq += 1
        self.in_progress -= 1

    def snapshot(self, gfns: Sel) -> Seen:
        """What a fault on these gfns notes before it looks up its pages."""
        return self.seq

    def moved(self, seen: Seen, gfns: Sel) -> bool:
        """Whether an invalidation that these gfns must heed ended since the snapshot."""
        return self.seq != seen

    def blocks(self, gfns: Sel) -> bool:
        """Whether a gfn lies in a range that is being invalidated (mmu_invalidate_retry_gfn)."""
        if not self.in_progress or not count(gfns):
            return False
        if isinstance(gfns, slice):
            return gfns.start < self.end and self.start < last(gfns) + 1
        return bool(np.searchsorted(gfns, self.end) > np.searchsorted(gfns, self.start))


class ShardedFrame(Frame):
    """A frame for each shard, and over all of them the sums."""

    def __init__(self) -> None:
        super().__init__()
        self._shards: dict[int, Frame] = {}

    @property
    def parts(self) -> list[Frame]:
        return [self, *self._shards.values()]

    def add(self, start: int, end: int) -> None:
        super().add(start, end)
        for shard in shards_of(slice(start, end, 1)):
            self._shards.setdefault(shard, Frame()).add(start, end)

    def drop(self, start: int = 0, end: int = 0) -> None:
        super().drop()
        for shard in shards_of(slice(start, end, 1)):
            self._shards[shard].drop()

    def snapshot(self, gfns: Sel) -> Seen:
        return {shard: self._shards[shard].seq if shard in self._shards else 0 for shard in shards_of(gfns)}

    def moved(self, seen: Seen, gfns: Sel) -> bool:
        assert isinstance(seen, dict)
        return any(shard in self._shards and self._shards[shard].seq != seen[shard] for shard in shards_of(gfns))

    def blocks(self, gfns: Sel) -> bool:
        return any(shard in self._shards and self._shards[shard].blocks(gfns) for shard in shards_of(gfns))


def shards_of(gfns: Sel) -> Sequence[int]:
    """The shards of some gfns, ascending."""
    if not count(gfns):
        return ()
    if isinstance(gfns, slice):
        low, high = gfns.start >> SHARD_ORDER, (last(gfns) >> SHARD_ORDER) + 1
        if high - low >= NR_SHARDS:
            return range(NR_SHARDS)
        if low // NR_SHARDS == (high - 1) // NR_SHARDS:
            return range(low % NR_SHARDS, (high - 1) % NR_SHARDS + 1)
        return sorted(shard % NR_SHARDS for shard in range(low, high))
    shards: list[int] = np.unique((gfns >> SHARD_ORDER) % NR_SHARDS).tolist()
    return shards


class MmuLock:
    """`rw`: one rwlock for all page tables of a VM."""

    def __init__(self, vm_id: int) -> None:
        self.all: tuple[Lock, ...] = (Lock(f"vm{vm_id}.mmu_lock", RANK_MMU),)
        """Every lock there is: who changes all of the tables takes them."""
        self.frame = Frame()

    def covering(self, gfns: Sel) -> tuple[Lock, ...]:
        """The locks to take, in this order, before entries of these gfns are looked at (read) or zapped (write)."""
        return self.all


class ShardedMmuLock(MmuLock):
    """`sharded`: a rwlock for each GiB of gfns."""

    def __init__(self, vm_id: int) -> None:
        self.all = tuple(Lock(f"vm{vm_id}.mmu_lock[{shard}]", RANK_MMU) for shard in range(NR_SHARDS))
        self.frame = ShardedFrame()

    def covering(self, gfns: Sel) -> tuple[Lock, ...]:
        return tuple(self.all[shard] for shard in shards_of(gfns))


MMU_LOCKS: dict[str, type[MmuLock]] = {"rw": MmuLock, "sharded": ShardedMmuLock}
"""By the name of the policy."""


def read(locks: Sequence[Lock]) -> Steps[None]:
    """Take locks for read, in order."""
    for lock in locks:
        yield lock.read


def write(locks: Sequence[Lock]) -> Steps[None]:
    """Take locks for write, in order."""
    for lock in locks:
        yield lock.write


def drop(locks: Sequence[Lock]) -> Steps[None]:
    """Drop locks, the last first."""
    for lock in reversed(locks):
        yield lock.release
