"""What was seen of a host so far: external tables as the vendor was told of them, frames that are the guests'."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cvmcore.events import Event
from cvmcore.host import Host
from cvmcore.mem.tdp import TOP
from cvmcore.pages import IntArray, array_of, blocks, count, zeros
from cvmcore.sched import Held, Lockdep
from cvmcore.testing.state import ABSENT, IS_LEAF, IS_TABLE
from cvmcore.types import PG_LEVEL_4K, Stopped, Use, order_of
from cvmcore.vm import Vm

BUSY = 3
"""Kind of an entry whose hook has begun and not ended."""

ENTRY_HOOKS = frozenset({
    "link_private_spt", "set_private_spte", "remove_private_spte", "free_private_spt", "split_private_spt",
    "promote_private_spt",
})  # fmt: skip
MUST_BE = {
    "link_private_spt": ABSENT,
    "set_private_spte": ABSENT,
    "remove_private_spte": IS_LEAF,
    "free_private_spt": IS_TABLE,
    "split_private_spt": IS_LEAF,
    "promote_private_spt": IS_TABLE,
}
"""What an entry must be when a hook about it begins."""
_BECOMES = {
    "link_private_spt": IS_TABLE,
    "set_private_spte": IS_LEAF,
    "remove_private_spte": ABSENT,
    "free_private_spt": ABSENT,
    "split_private_spt": IS_TABLE,
    "promote_private_spt": IS_LEAF,
}
"""What an entry is when the hook has done its work."""


def entries_of(event: Event) -> tuple[int, IntArray]:
    """(level, entry indexes) that an entry hook is about."""
    assert event.gfns is not None
    return event.level, array_of(blocks(event.gfns, order_of(event.level)))


class Shadow:
    """An external table as the vendor was told of it: kinds of entries by level, from the begin and end of hooks."""

    def __init__(self) -> None:
        self.kinds: list[npt.NDArray[np.uint8]] = [np.zeros(0, np.uint8) for _ in range(TOP + 1)]

    def level(self, level: int, index: IntArray) -> npt.NDArray[np.uint8]:
        """The kinds of a level, with room for these entries."""
        end = int(index.max()) + 1 if len(index) else 0
        if end > len(self.kinds[level]):
            larger = np.zeros(max(end, 2 * len(self.kinds[level])), np.uint8)
            larger[: len(self.kinds[level])] = self.kinds[level]
            self.kinds[level] = larger
        return self.kinds[level]

    def children(self, level: int, at: int) -> npt.NDArray[np.uint8]:
        """Kinds of the 512 entries in the table that entry `at` of a level points to."""
        below = self.level(level - 1, np.array([(at << 9) + 511]))
        return below[at << 9 : (at + 1) << 9]

    def left(self) -> int:
        """Entries that are not absent."""
        return sum(int(np.count_nonzero(kinds)) for kinds in self.kinds)


class Trace:
    """What was seen of a host so far: its external tables, the frames that are the guests', VMs that are dead."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.shadows: dict[int, Shadow] = {}
        self.prepared: npt.NDArray[np.uint8] = zeros(host.nr_frames, np.uint8)
        """Frames that gmem_prepare or launch_update made the guest's, and that were not reclaimed since."""
        self.held_by_tables: npt.NDArray[np.uint8] = zeros(host.nr_frames, np.uint8)
        """By how many leaves of external tables, of any VM, each frame is mapped, as the vendors were told."""
        self.lost: dict[int, int] = {}
        """By VM: pinned pages that a hook for this VM has leaked. They stay pinned, and charged."""
        self._leaks = len(host.frames.leaks)
        self.running: list[int] = []
        """Pages of the hook calls that run now, the innermost last."""
        self.buried: set[int] = set()
        """VMs that were dead already when the call that runs now began."""

    def vm(self, event: Event) -> Vm | None:
        """The VM of an event; None for the host's own, and for one that is being made."""
        return next((vm for vm in self.host.vms if vm.id == event.vm), None)

    def shadow(self, event: Event) -> Shadow:
        """The external table of the event's VM."""
        return self.shadows.setdefault(event.vm, Shadow())

    @property
    def held(self) -> Held | None:
        """The locks that the running operation holds, where the host is driven by Lockdep."""
        return self.host.drive.held if isinstance(self.host.drive, Lockdep) else None

    def note(self, event: Event) -> None:
        """Take an event in, after it was looked at."""
        if event.kind == "vm" and event.name == "destroy":
            self.shadows.pop(event.vm, None)
        if event.kind != "hook":
            return
        if event.phase == "begin":
            self.running.append(event.n)
        elif self.running:
            self.running.pop()
        if event.name in ENTRY_HOOKS:
            self._note_entries(event)
        if event.phase != "end":
            return
        self._note_leaks(event.vm)
        if event.pfns is None or "injected" in event.info:
            return
        if event.name in ("set_private_spte", "remove_private_spte"):
            pfns = array_of(event.pfns)[: _done(event, event.level) << order_of(event.level)]
            self.held_by_tables[pfns] += np.uint8(1 if event.name == "set_private_spte" else 255)
        if event.name in ("gmem_prepare", "launch_update") and self.host.ops.has("gmem_invalidate"):
            pfns = array_of(event.pfns)[: _done(event)]
            self.prepared[pfns[self.host.frames.use[pfns] == Use.GMEM]] = 1
        elif event.name == "gmem_invalidate":
            self.prepared[event.pfns] = 0

    def _note_leaks(self, vm_id: int) -> None:
        """What was leaked since the last hook ended, this one has leaked."""
        frames = self.host.frames
        for _, pfns in frames.leaks[self._leaks :]:
            pinned = int(np.count_nonzero(frames.pins[pfns]))
            self.lost[vm_id] = self.lost.get(vm_id, 0) + pinned
        self._leaks = len(frames.leaks)

    def _note_entries(self, event: Event) -> None:
        level, index = entries_of(event)
        shadow = self.shadow(event)
        kinds = shadow.level(level, index)
        if event.phase == "begin":
            kinds[index] = BUSY
            return
        done = 0 if "injected" in event.info else _done(event, level)
        kinds[index[:done]] = _BECOMES[event.name]
        kinds[index[done:]] = MUST_BE[event.name]
        if done and event.name in ("split_private_spt", "promote_private_spt"):
            shadow.children(level, int(index[0]))[:] = IS_LEAF if event.name == "split_private_spt" else ABSENT


def _done(event: Event, level: int = PG_LEVEL_4K) -> int:
    """How many elements of its batch a hook that ended did."""
    result = event.info.get("result")
    if isinstance(result, Stopped):
        return result.done
    return count(event.gfns) if event.gfns is not None else 0
