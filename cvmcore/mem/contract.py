"""What an invalidation tells the vendor: the policy `invalidation`, with the contracts that mail 002 weighs.

A vendor may have to take pages back from the guest before the host has them (hook gmem_invalidate). `decoupled`, as
upstream: gfns are zapped by range, and pages handed over by frame where the inode frees them. The others have one
callback by gfn for everything, and differ in the word it hears: who must act before pages are freed acts on each
callback whose word can mean that, and finds the frames by walking memslot and file. `untold` is what came before
them all, a callback that hears nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs
import numpy as np

from cvmcore.effects import Steps
from cvmcore.pages import Sel, count, frames_of, take, where
from cvmcore.types import Filter, Use

if TYPE_CHECKING:
    from cvmcore.host import Host
    from cvmcore.mem.gmem import GmemInode
    from cvmcore.vm import Vm


class Cause(enum.Enum):
    """Why gfns are invalidated."""

    NOTIFIER = "the VMM's memory moves or goes away"
    TO_PRIVATE = "the attribute becomes private"
    TO_SHARED = "the attribute becomes shared"
    PUNCH_HOLE = "a hole is punched"
    RELEASE = "the file is closed"


_ZAPS = {
    Cause.NOTIFIER: Filter.SHARED,
    Cause.TO_PRIVATE: Filter.SHARED,
    Cause.TO_SHARED: Filter.PRIVATE,
    Cause.PUNCH_HOLE: Filter.PRIVATE,
    Cause.RELEASE: Filter.PRIVATE,
}
"""The mappings that each cause is about."""
_FREES = (Cause.PUNCH_HOLE, Cause.RELEASE)


@attrs.frozen
class Contract:
    """words: what the callback by gfn hears of each cause. by_pfn: pages are handed over by frame when they go."""

    words: Mapping[Cause, str]
    by_pfn: bool = False

    def _may_mean(self, cause: Cause) -> list[Cause]:
        return [other for other, word in self.words.items() if word == self.words[cause]]

    def kinds(self, cause: Cause, meant: Filter) -> Filter:
        """The mappings to zap: those that are meant, or both kinds where the word does not say which."""
        return meant if len({_ZAPS[one] for one in self._may_mean(cause)}) == 1 else Filter.BOTH

    def cleans(self, cause: Cause) -> bool:
        """Whether the vendor takes pages back in the callback: where its word can mean that they will be freed."""
        return not self.by_pfn and any(one in _FREES for one in self._may_mean(cause))

    def callback(self, vm: Vm, cause: Cause, parts: list[tuple[GmemInode, int, int]]) -> Steps[None] | None:
        """The vendor's part of the callback, mmu_lock held for write; None where there is none. parts: inode and page
        indexes [start, end) behind each range."""
        if not self.cleans(cause) or not vm.host.ops.has("gmem_invalidate"):
            return None
        return self._clean(vm.host, parts)

    def _clean(self, host: Host, parts: list[tuple[GmemInode, int, int]]) -> Steps[None]:
        for inode, start, end in parts:
            host.meter.charge("memslot_walk")
            host.meter.charge("gmem_lookup_4k", end - start)
            words = inode.words[start:end]
            pfns = frames_of(words[words != 0])
            if count(pfns):
                yield from host.ops.call("gmem_invalidate", count(pfns), host=host, pfns=pfns)

    def free(self, host: Host, pfns: Sel) -> Steps[Sel]:
        """Frames leave an inode; returns those that the host may have."""
        if not host.ops.has("gmem_invalidate"):
            return pfns
        if self.by_pfn:
            free: Sel = yield from host.ops.call("gmem_invalidate", count(pfns), host=host, pfns=pfns)
            return free
        kept = take(host.frames.use, pfns) == Use.LEAKED  # what a callback could not take back
        return where(pfns, ~kept) if np.count_nonzero(kept) else pfns


_PRIVATE, _SHARED = "SET_MEM_ATTR(private)", "SET_MEM_ATTR(shared)"
_FLAGS = {Cause.NOTIFIER: "", Cause.TO_PRIVATE: _PRIVATE, Cause.TO_SHARED: _SHARED}

CONTRACTS: dict[str, Contract] = {
    "decoupled": Contract({cause: kinds.name or "" for cause, kinds in _ZAPS.items()}, by_pfn=True),
    "flags3": Contract(_FLAGS | {Cause.PUNCH_HOLE: "GMEM_PUNCH_HOLE", Cause.RELEASE: "GMEM_RELEASE"}),
    "flags2": Contract(_FLAGS | {Cause.PUNCH_HOLE: "GMEM", Cause.RELEASE: "GMEM"}),
    "attributes": Contract(_FLAGS | {Cause.PUNCH_HOLE: _SHARED, Cause.RELEASE: _SHARED}),
    "untold": Contract(dict.fromkeys(Cause, "")),
}
"""By the name of the policy."""
