"""Every invariant fires: the state is corrupted by hand, and the row that watches over it says so, with its number.

And what they are for: the checker finds a core that forgets to flush, to close a frame, to allocate before the lock.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest
from fakes import MEDIATED, MIRROR, PINNING, Box, FakeMirror, backend_of

from cvmcore.backend import Backend
from cvmcore.backends.default import DEFAULT
from cvmcore.backends.swprot import SWPROT
from cvmcore.effects import Steps
from cvmcore.errors import InvariantViolation, UapiError
from cvmcore.events import Event
from cvmcore.hookspecs import hookimpl
from cvmcore.host import Host
from cvmcore.mem import invalidate
from cvmcore.mem.attributes import Attributes
from cvmcore.mem.frames import Frames
from cvmcore.mem.gmem import HUGE
from cvmcore.mem.mmulock import Frame
from cvmcore.mem.slots import MIXED, Memslot
from cvmcore.mem.tdp import FRAME_SHIFT, FROZEN, PRESENT, WRITABLE, TableCache, Tdp
from cvmcore.pages import Sel, array_of, run
from cvmcore.plugins import load_all_backends
from cvmcore.runner import load_profile_for
from cvmcore.testing.invariants import (
    INVARIANTS,
    Checker,
    Invariant,
    Snapshot,
    State,
    Step,
    When,
    check,
    check_gone,
    switched_on,
)
from cvmcore.tlb import Tlb
from cvmcore.types import (
    Access,
    Capabilities,
    HostMode,
    HostVerdict,
    HostView,
    MemoryFault,
    Mmio,
    Retry,
    Stopped,
    Use,
)
from cvmcore.vm import Vm

SHIPPED = {"default", "swprot", "sev", "sev-es", "snp", "tdx", "pkvm"}
GFN = 3
"""A gfn that every box below has mapped and written."""


class Owning(FakeMirror):
    """No mirror, but a trusted party that can keep frames from the host: those in `owned`."""

    def __init__(self) -> None:
        super().__init__(Capabilities(private_by_attribute=True))
        self.owned: set[int] = set()

    @hookimpl
    def gmem_prepare(self, pfns: Sel) -> None:
        self.owned |= set(array_of(pfns).tolist())

    @hookimpl
    def gmem_invalidate(self, host: HostView, pfns: Sel) -> Sel:
        self.owned -= set(array_of(pfns).tolist())
        return pfns

    @hookimpl
    def guest_access(self, pfns: Sel) -> Any:
        return Access(0, pfns)

    @hookimpl
    def host_access(self, host: HostView, pfns: Sel, write: bool, mode: HostMode) -> HostVerdict:
        return HostVerdict.OWNER_FAULT if self.owned & set(array_of(pfns).tolist()) else HostVerdict.OK


OWNING = backend_of("owning", Owning)


class Limiting(Owning):
    """Owning, and says how large its frames may be mapped."""

    limit = 0

    @hookimpl
    def max_mapping_level(self, pfns: Sel) -> int:
        return self.limit


LIMITING = backend_of("limiting", Limiting)


class Watched(Box):
    """A box with a checker on it, some pages written, and a step to compare with."""

    def __init__(self, backend: Backend = SWPROT, **host: Any) -> None:
        super().__init__(backend, **host)
        self.checker = Checker.on(self.host)
        self.machine.guest.write(slice(GFN, GFN + 4, 1), private=self.private)
        self.checker.check(self.vm)
        self.before = Snapshot.of(State(self.vm))

    def destroy_and_look(self) -> None:
        self.machine.destroy()
        self.checker.check_idle()

    @property
    def table(self) -> Any:
        """The 4K entries of the root that serves the guest's own accesses."""
        return self.root().entries[1]

    @property
    def slot(self) -> Memslot:
        return self.vm.slots.by_id[0]

    def frame_of(self, gfn: int) -> int:
        return int(self.table[gfn]) >> FRAME_SHIFT

    def step(self, call: str = "", *events: Event, error: UapiError | None = None, **arguments: Any) -> Step:
        """What happened since the box was made, as a step."""
        step = Step(self.vm, self.before, call, arguments, list(events), error)
        step.after = Snapshot.of(State(self.vm))
        return step

    def event(self, kind: str, name: str, phase: str = "at", **fields: Any) -> Event:
        return Event(0, "main", kind, name, phase, vm=self.vm.id, **fields)

    def hook(self, name: str, gfn: int = GFN, level: int = 1, phase: str = "begin", **fields: Any) -> Event:
        return self.event("hook", name, phase, gfns=slice(gfn, gfn + 1, 1), level=level, n=1, **fields)

    def exit(self, reason: Any) -> Event:
        return self.event("exit", type(reason).__name__, info={"exit": reason})


ROWS = {row.check.__name__: row for row in INVARIANTS}

Corrupt = Callable[[Watched], "tuple[object, ...] | None"]
"""Breaks something; returns what the row is to look at where that is more than the state of the VM."""


@attrs.frozen
class Case:
    row: Invariant
    backend: Backend
    corrupt: Corrupt
    host: dict[str, Any]


CASES: list[Case] = []


def breaks(row: str, backend: Backend = SWPROT, **host: Any) -> Callable[[Corrupt], Corrupt]:
    def add(corrupt: Corrupt) -> Corrupt:
        CASES.append(Case(ROWS[row], backend, corrupt, host))
        return corrupt

    return add


# ---- 1 to 9: slots, bindings, leaves ------------------------------------------------------------------------------


@breaks("slots_apart")
def _(b: Watched) -> None:
    b.vm.slots.replace(None, Memslot(7, 10, 20, 0, 0))


@breaks("slots_apart")
def _(b: Watched) -> None:
    b.slot.flags |= 1


@breaks("gmem_slots_fixed")
def _(b: Watched) -> tuple[object, ...]:
    b.slot.hva += 4096
    return (b.step(),)


@breaks("bindings_match")
def _(b: Watched) -> None:
    b.vm.gmem_files[0].bindings.clear()


@breaks("bindings_match")
def _(b: Watched) -> None:
    b.vm.gmem_files[0].bindings *= 2


@breaks("leaves_in_slots")
def _(b: Watched) -> None:
    b.vm.slots.replace(b.slot, None)


@breaks("leaves_in_valid_slots")
def _(b: Watched) -> None:
    b.slot.invalid = True


@breaks("roots_follow_attributes", MIRROR)
def _(b: Watched) -> None:
    b.vm.attributes.words[GFN] = 0


@breaks("private_from_gmem")
def _(b: Watched) -> None:
    b.vm.attributes.words[GFN] = 0


@breaks("one_root_each", MIRROR)
def _(b: Watched) -> None:
    b.vm.tdp.direct.entries[1][GFN] = b.table[GFN]


@breaks("private_frames_once")
def _(b: Watched) -> None:
    b.table[GFN] = b.table[GFN + 1]


@breaks("huge_leaves_fit", backing="2m")
def _(b: Watched) -> None:
    b.root().entries[2][0] += 1 << FRAME_SHIFT


@breaks("huge_leaves_fit", backing="2m")
def _(b: Watched) -> None:
    b.vm.attributes.words[100] = 0


@breaks("huge_leaves_allowed", backing="2m")
def _(b: Watched) -> None:
    b.slot.lpage[2][0] |= MIXED


@breaks("huge_leaves_allowed", DEFAULT, backing="2m")
def _(b: Watched) -> None:
    b.slot.flags |= 1


@breaks("huge_leaves_backed", backing="2m")
def _(b: Watched) -> None:
    """The folio was split, and the leaf stayed."""
    b.inode.words[:512] &= ~np.uint32(HUGE)


@breaks("huge_leaves_backed", DEFAULT, backing="2m")
def _(b: Watched) -> None:
    b.vm.mm.mappings[0].words[7] &= ~np.uint32(1)


@breaks("huge_leaves_backed", LIMITING, backing="2m")
def _(b: Watched) -> None:
    b.host.ops.hooks["max_mapping_level"].fn.__self__.limit = 1


@breaks("mixed_is_true")
def _(b: Watched) -> None:
    b.vm.attributes.words[600] = 0


@breaks("mixed_is_true")
def _(b: Watched) -> None:
    b.slot.lpage[2][0] = np.uint32(0x7FFF_FFFF)


# ---- 10 to 13: external tables ------------------------------------------------------------------------------------


@breaks("mirror_equals_external", MIRROR)
def _(b: Watched) -> None:
    b.table[GFN] = 0


@breaks("mirror_equals_external", MIRROR)
def _(b: Watched) -> None:
    del b.vm.arch.entries[1, GFN]


@breaks("mirror_equals_external", MIRROR)
def _(b: Watched) -> None:
    b.vm.arch.entries[1, 900] = "leaf", 77


@breaks("mirror_equals_external", MEDIATED)
def _(b: Watched) -> None:
    b.vm.arch.entries[1, GFN] = "leaf", 77


@breaks("mirror_equals_external", MIRROR)
def _(b: Watched) -> None:
    """Nobody can tell: a backend with an external table says what is in it."""
    del b.host.ops.hooks["read_private_spte"]


@breaks("nothing_frozen", MIRROR)
def _(b: Watched) -> None:
    b.table[GFN + 20] = FROZEN


@breaks("entries_in_tables")
def _(b: Watched) -> None:
    b.root().entries[2][0] = 0


@breaks("entries_in_tables")
def _(b: Watched) -> None:
    b.root().leaves[1] += 1


@breaks("order_of_tables", MIRROR)
def _(b: Watched) -> tuple[object, ...]:
    return b.checker.trace, b.hook("set_private_spte", 600)


@breaks("order_of_tables", MIRROR)
def _(b: Watched) -> tuple[object, ...]:
    return b.checker.trace, b.hook("free_private_spt", 0, 2)


@breaks("entries_change_once", MIRROR)
def _(b: Watched) -> tuple[object, ...]:
    return b.checker.trace, b.hook("set_private_spte")


@breaks("entries_change_once", MIRROR)
def _(b: Watched) -> tuple[object, ...]:
    return b.checker.trace, b.hook("remove_private_spte", GFN + 20)


@breaks("entries_change_once", MIRROR)
def _(b: Watched) -> tuple[object, ...]:
    """A hook about an entry whose hook has not ended yet."""
    b.checker.trace.note(b.hook("set_private_spte", GFN + 20))
    return b.checker.trace, b.hook("set_private_spte", GFN + 20)


@breaks("entries_change_once", MIRROR)
def _(b: Watched) -> tuple[object, ...]:
    return b.checker.trace, b.hook("promote_private_spt", 0, 2)


@breaks("frames_stay")
def _(b: Watched) -> tuple[object, ...]:
    b.table[GFN] += 1 << FRAME_SHIFT
    return (b.step(),)


# ---- 14 to 18: invalidation, TLBs, frames -------------------------------------------------------------------------


@breaks("no_invalidation")
def _(b: Watched) -> None:
    b.vm.frame.in_progress += 1


@breaks("no_invalidation")
def _(b: Watched) -> None:
    """The notifier's start has come, and not its end."""
    b.vm.active_count += 1


@breaks("no_invalidation", policies={"mmu_lock": "sharded"})
def _(b: Watched) -> None:
    """One shard was forgotten at the end."""
    b.vm.frame.add(0, 8)
    Frame.drop(b.vm.frame)


@breaks("frame_is_sound")
def _(b: Watched) -> None:
    b.vm.active_count -= 1


@breaks("frame_is_sound", policies={"mmu_lock": "sharded"})
def _(b: Watched) -> None:
    b.vm.frame.add(0, 8)
    b.vm.frame.drop(0, 8)
    b.vm.frame.parts[1].seq -= 1


@breaks("frame_is_sound")
def _(b: Watched) -> None:
    b.vm.frame.seq += 1


@breaks("frame_is_sound")
def _(b: Watched) -> None:
    b.vm.frame.add(7, 7)


@breaks("tlbs_are_fresh")
def _(b: Watched) -> None:
    b.vm.vcpus[0].tlb.entries[GFN, True] = b.frame_of(GFN) + 1, True


@breaks("tlbs_are_fresh")
def _(b: Watched) -> None:
    """A TLB that still writes where the tables have taken the right away."""
    b.table[GFN] &= ~np.uint32(WRITABLE)


@breaks("leaves_reach_memory")
def _(b: Watched) -> None:
    b.host.frames.use[b.frame_of(GFN)] = Use.FREE


@breaks("leaves_are_current")
def _(b: Watched) -> None:
    b.inode.words[GFN] += 1 << FRAME_SHIFT


@breaks("tlbs_reach_memory")
def _(b: Watched) -> None:
    b.vm.vcpus[0].tlb.entries[900, True] = 5000, True


@breaks("one_owner_each")
def _(b: Watched) -> None:
    b.inode.words[700] = b.inode.words[GFN]


@breaks("one_owner_each", MIRROR)
def _(b: Watched) -> None:
    b.host.frames.use[int(State(b.vm).mirror_tables[0])] = Use.FREE


@breaks("free_frames_are_the_hosts", OWNING)
def _(b: Watched) -> None:
    b.host.frames.use[b.frame_of(GFN)] = Use.FREE


@breaks("reclaimed_once", OWNING)
def _(b: Watched) -> tuple[object, ...]:
    b.host.frames.use[b.frame_of(GFN)] = Use.FREE
    return b.checker.trace, b.hook("memslot_prepare")


@breaks("reclaimed_once", MIRROR)
def _(b: Watched) -> tuple[object, ...]:
    """The external table still maps it."""
    b.host.frames.use[b.frame_of(GFN)] = Use.FREE
    return b.checker.trace, b.hook("memslot_prepare")


@breaks("reclaimed_once", OWNING)
def _(b: Watched) -> tuple[object, ...]:
    """It was free for a moment, and is the VMM's by now."""
    b.host.frames.use[b.frame_of(GFN)] = Use.ANON
    return b.checker.trace, b.hook("memslot_prepare")


def reclaim(b: Watched, *pfns: int) -> tuple[object, ...]:
    return b.checker.trace, attrs.evolve(b.hook("gmem_invalidate"), pfns=np.array(pfns))


@breaks("reclaimed_from_a_file", OWNING)
def _(b: Watched) -> tuple[object, ...]:
    """It has been given back before."""
    pfn = b.frame_of(GFN)
    b.punch(GFN, 1)
    return reclaim(b, pfn)


@breaks("reclaimed_from_a_file", OWNING)
def _(b: Watched) -> tuple[object, ...]:
    return reclaim(b, b.frame_of(GFN), b.frame_of(GFN))


@breaks("taken_back_once", MIRROR)
def _(b: Watched) -> tuple[object, ...]:
    return b.checker.trace, attrs.evolve(b.hook("remove_private_spte"), pfns=slice(900, 901, 1))


@breaks("leaves_are_defined")
def _(b: Watched) -> None:
    b.inode.words[GFN] &= ~np.uint32(1)


@breaks("leaves_are_prepared", OWNING)
def _(b: Watched) -> tuple[object, ...]:
    b.checker.trace.prepared[:] = 0
    return b.checker.trace, b.event("fault", "fault", gfns=slice(GFN, GFN + 1, 1), level=1, info={"private": True})


@breaks("new_pages_are_clear")
def _(b: Watched) -> tuple[object, ...]:
    """A page comes with what its frame held before."""
    b.machine.guest.read(slice(700, 701, 1), private=b.private)
    b.host.memory.stamp[b.frame_of(700)] = 5
    return (b.step("read", gfns=slice(700, 701, 1), private=b.private),)


@breaks("new_pages_are_clear", DEFAULT)
def _(b: Watched) -> tuple[object, ...]:
    b.machine.guest.read(slice(700, 701, 1), private=b.private)
    b.host.memory.stamp[b.frame_of(700)] = 5
    return (b.step("prefault", start=700, end=701),)


# ---- 19 to 22: what calls change ----------------------------------------------------------------------------------


@breaks("punch_is_exact")
def _(b: Watched) -> tuple[object, ...]:
    """The page is still there."""
    return (b.step("punch", inode=b.inode, start=GFN, n=1),)


@breaks("punch_is_exact")
def _(b: Watched) -> tuple[object, ...]:
    """Its neighbour is gone, too."""
    b.punch(GFN, 2)
    return (b.step("punch", inode=b.inode, start=GFN, n=1),)


@breaks("punch_is_exact")
def _(b: Watched) -> tuple[object, ...]:
    """A neighbour lost its content."""
    b.host.memory.stamp[b.frame_of(GFN + 1)] = 0
    b.punch(GFN, 1)
    return (b.step("punch", inode=b.inode, start=GFN, n=1),)


@breaks("conversion_is_exact")
def _(b: Watched) -> tuple[object, ...]:
    b.set_private(5, 1, False)
    return (b.step("set_memory_attributes", start=0, end=1, value=0),)


@breaks("views_are_apart")
def _(b: Watched) -> tuple[object, ...]:
    """A shared write that changes a private page."""
    b.host.memory.stamp[b.frame_of(GFN)] += 1
    return (b.step("write", gfns=slice(GFN, GFN + 1, 1), private=False),)


@breaks("views_are_apart")
def _(b: Watched) -> tuple[object, ...]:
    """A private write that changes the page beside."""
    b.host.memory.stamp[b.frame_of(GFN + 1)] += 1
    return (b.step("write", gfns=slice(GFN, GFN + 1, 1), private=True),)


@breaks("conversion_is_whole")
def _(b: Watched) -> tuple[object, ...]:
    b.set_private(0, 1, False)
    error = UapiError(errno.ENOMEM, "KVM_SET_MEMORY_ATTRIBUTES", "")
    return (b.step("set_memory_attributes", error=error, start=0, end=2, value=0),)


@breaks("conversion_is_whole")
def _(b: Watched) -> tuple[object, ...]:
    b.set_private(0, 1, False)
    return (b.step("set_memory_attributes", start=0, end=2, value=0),)


@breaks("conversion_is_whole")
def _(b: Watched) -> tuple[object, ...]:
    """Nothing changes, and yet something was zapped."""
    return (b.step("set_memory_attributes", b.event("zap", "zap_leaf", gfns=run(0, 1)), start=0, end=2, value=8),)


@breaks("attributes_stay")
def _(b: Watched) -> tuple[object, ...]:
    b.vm.attributes.words[5] = 0
    return (b.step("close"),)


# ---- 23 to 26: faults and exits -----------------------------------------------------------------------------------


@breaks("leaves_have_causes")
def _(b: Watched) -> tuple[object, ...]:
    b.table[900] = 900 << FRAME_SHIFT | PRESENT
    return (b.step(),)


@breaks("leaves_have_causes")
def _(b: Watched) -> tuple[object, ...]:
    b.table[GFN] = 0
    return (b.step(),)


@breaks("faults_leak_nothing")
def _(b: Watched) -> tuple[object, ...]:
    b.vm.gmem_files[0].refs += 1
    return (b.step("read"),)


@breaks("faults_leak_nothing", MIRROR)
def _(b: Watched) -> tuple[object, ...]:
    b.host.frames.alloc(1, Use.TABLE)
    return (b.step("read"),)


@breaks("faults_leak_nothing")
def _(b: Watched) -> tuple[object, ...]:
    b.host.frames.pin(slice(b.frame_of(GFN), b.frame_of(GFN) + 1, 1))
    return (b.step("read"),)


@breaks("faults_leak_nothing", PINNING)
def _(b: Watched) -> tuple[object, ...]:
    b.host.frames.pin(b.host.frames.alloc(1, Use.GMEM))
    return (b.step("read"),)


@breaks("faults_repeat", MIRROR)
def _(b: Watched) -> tuple[object, ...]:
    return (b.step("prefault", b.hook("set_private_spte"), start=GFN, end=GFN + 2),)


@breaks("faults_repeat")
def _(b: Watched) -> tuple[object, ...]:
    b.table[900] = 900 << FRAME_SHIFT | PRESENT
    return (b.step("prefault", start=GFN, end=GFN + 2),)


@breaks("mismatch_is_a_memory_fault")
def _(b: Watched) -> tuple[object, ...]:
    return (b.step("read", b.exit(Mmio(1 << 40, False)), private=True),)


@breaks("mismatch_is_a_memory_fault")
def _(b: Watched) -> tuple[object, ...]:
    return (b.step("read", b.exit(Mmio(GFN << 12, False)), private=False),)


@breaks("faults_are_of_their_kind")
def _(b: Watched) -> tuple[object, ...]:
    """A shared access was let through to a private page."""
    return (b.step("read", b.event("fault", "fault", gfns=slice(GFN, GFN + 1, 1), level=1, info={"private": False})),)


@breaks("memory_faults_are_whole")
def _(b: Watched) -> tuple[object, ...]:
    """Guests accept through the private view."""
    return (b.step("accept", b.exit(MemoryFault(GFN << 12, 0))),)


@breaks("memory_faults_are_whole")
def _(b: Watched) -> tuple[object, ...]:
    return (b.step("", b.exit(MemoryFault(0x3010, 8))),)


@breaks("memory_faults_are_whole")
def _(b: Watched) -> tuple[object, ...]:
    return (b.step("read", b.exit(MemoryFault(0x3000, 0)), private=True),)


# ---- 27 to 30: files and VMs --------------------------------------------------------------------------------------


@breaks("files_hold_their_size")
def _(b: Watched) -> None:
    b.inode.allocated += 1


@breaks("files_keep_their_size")
def _(b: Watched) -> tuple[object, ...]:
    b.inode.npages += 1
    return (b.step(),)


@breaks("files_hold_the_vm")
def _(b: Watched) -> None:
    b.slot.gmem = None


@breaks("files_hold_the_vm")
def _(b: Watched) -> None:
    b.vm.users = 0


@breaks("files_hold_the_vm")
def _(b: Watched) -> None:
    b.vm.gmem_files.clear()


@breaks("memory_lives_with_the_inode")
def _(b: Watched) -> tuple[object, ...]:
    """A file is gone, and its memory is still mapped."""
    b.vm.gmem_files.clear()
    return (b.step(),)


@breaks("memory_lives_with_the_inode")
def _(b: Watched) -> tuple[object, ...]:
    """A file is gone, and its memory was not freed."""
    b.inode.files.clear()
    b.vm.gmem_files.clear()
    b.table[GFN : GFN + 4] = 0
    return (b.step(),)


@breaks("dead_vms_rest")
def _(b: Watched) -> tuple[object, ...]:
    b.vm.bug("for the test")
    return b.checker.trace, b.hook("vcpu_enter")


@breaks("dead_vms_rest")
def _(b: Watched) -> tuple[object, ...]:
    b.vm.bug("for the test")
    b.checker.trace.buried.add(b.vm.id)
    return b.checker.trace, b.hook("set_private_spte")


@breaks("dead_vms_answer_eio")
def _(b: Watched) -> tuple[object, ...]:
    b.before = attrs.evolve(b.before, dead=True)
    return (b.step("write", error=UapiError(errno.EINVAL, "KVM_RUN", "")),)


@breaks("nothing_is_left")
def _(b: Watched) -> None:
    """It was not destroyed at all."""


@breaks("tables_are_taken_down", MIRROR)
def _(b: Watched) -> tuple[object, ...]:
    return b.checker.trace, b.event("vm", "destroy")


# ---- 31, 32: locks and pins ---------------------------------------------------------------------------------------


@breaks("locks_are_held", MIRROR)
def _(b: Watched) -> tuple[object, ...]:
    """Without mmu_lock."""
    return b.checker.trace, b.hook("remove_private_spte")


@breaks("locks_are_held", MIRROR)
def _(b: Watched) -> tuple[object, ...]:
    """Under the read side."""
    b.host.drive.held.take(b.vm.mmu_lock.all[0], False)
    return b.checker.trace, b.hook("remove_private_spte")


@breaks("locks_are_held", MIRROR)
def _(b: Watched) -> tuple[object, ...]:
    """On an entry that is not frozen."""
    b.host.drive.held.take(b.vm.mmu_lock.all[0], False)
    return b.checker.trace, b.hook("set_private_spte", GFN + 20)


@breaks("locks_are_held", MIRROR)
def _(b: Watched) -> tuple[object, ...]:
    """Under a lock that it must not meet."""
    b.host.drive.held.take(b.vm.mmu_lock.all[0], False)
    return b.checker.trace, b.hook("pin_pfn")


@breaks("leaves_are_pinned", PINNING)
def _(b: Watched) -> None:
    b.host.frames.pins[b.frame_of(GFN)] = 0


@breaks("one_pin_each", PINNING)
def _(b: Watched) -> tuple[object, ...]:
    b.host.frames.pins[b.frame_of(GFN)] += 1
    return (b.step(),)


@breaks("pins_end_with_their_slot", PINNING)
def _(b: Watched) -> tuple[object, ...]:
    """The slot went, and its pins did not."""
    step = b.step("memslot")
    step.after.slots.clear()
    return (step,)


@breaks("locked_within_limit", PINNING)
def _(b: Watched) -> None:
    b.vm.memlock_pages = -1


@breaks("locked_within_limit", PINNING)
def _(b: Watched) -> None:
    b.host.memlock_limit_bytes, b.vm.memlock_pages = 4096, 2


def subject(row: Invariant, box: Watched, made: tuple[object, ...] | None) -> tuple[object, ...]:
    return made if made is not None else (State(box.vm),)


LARGE = pytest.mark.assumes(max_private_level=3, needs_accept=False)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=f"{case.row.number}-{case.row.check.__name__}-{i}",
            marks=LARGE if "backing" in case.host else (),
        )
        for i, case in enumerate(CASES)
    ],
)
def test_row_fires(case: Case) -> None:
    """What is corrupted is found by the row it concerns, under its number, and told with what went before."""
    box = Watched(case.backend, **case.host)
    if box.stands_in and not case.row.needs(box.vm.caps):
        pytest.skip(f"needs {case.row.needs.name}")
    assert case.row.needs(box.vm.caps), f"{case.row.needs.name} is not what this backend has"
    if case.row.when in (When.ANY, When.QUIET):
        case.row.enforce(box.host, State(box.vm))

    made = case.corrupt(box)
    with pytest.raises(InvariantViolation) as caught:
        case.row.enforce(box.host, *subject(case.row, box, made))

    assert caught.value.number == case.row.number
    assert case.row.text in str(caught.value)


def test_every_row_has_a_case() -> None:
    assert {row.check.__name__ for row in INVARIANTS} == {case.row.check.__name__ for case in CASES}


def test_all_32_are_there() -> None:
    assert sorted({row.number for row in INVARIANTS}) == list(range(1, 33))
    assert [row.number for row in INVARIANTS] == sorted(row.number for row in INVARIANTS)


@pytest.mark.assumes(has_mirror=False)
def test_corrupt_states_are_found_by_check() -> None:
    """`check` looks at everything; a violation carries gfn, pfn, states and the last events."""
    box = Watched()
    pfn = box.frame_of(GFN)
    box.table[GFN] = box.table[GFN + 1]

    with pytest.raises(InvariantViolation) as caught:
        check(box.vm)

    found = caught.value
    assert found.number in (5, 7, 16)
    assert (found.gfn, found.pfn) == (GFN, pfn + 1)
    assert found.states


def test_step_safe_rows_leave_out_the_others() -> None:
    """In the middle of an invalidation the quiet rows do not hold, and are not looked at."""
    box = Watched()
    box.vm.frame.add(0, 1)

    check(box.vm, quiet=False)
    with pytest.raises(InvariantViolation, match="invariant 14"):
        check(box.vm)


# ---- which apply where --------------------------------------------------------------------------------------------


def capabilities_of(backend: Backend) -> Capabilities:
    """What a backend says of its VM type, asked on a host of its own."""
    host = Host(backend, load_profile_for(backend, None), nr_frames=1 << 12)
    return host.capabilities(backend.vm_type, host.options)


def test_every_invariant_is_switched_on_by_a_vm_type() -> None:
    """One that no backend switches on is dead. Asked of what is installed; needs all that is shipped."""
    good, bad = load_all_backends()
    good = {"default": DEFAULT, "swprot": SWPROT, **good}
    on = {row.check.__name__ for backend in good.values() for row in switched_on(capabilities_of(backend))}
    dead = {name for name in ROWS if name not in on}
    missing = [f"{name}: {bad.get(name, 'is not installed')}" for name in sorted(SHIPPED - good.keys())]
    if missing:
        pytest.skip(f"needs every shipped backend; {'; '.join(missing)}; so far {len(dead)} rows are not switched on")

    assert dead == set()


def test_capabilities_decide() -> None:
    """What the reference says of where each applies: 6 needs a mirror, 10 to 12 external tables, 32 pins, ..."""

    def numbers(**caps: Any) -> set[int]:
        return {row.number for row in switched_on(Capabilities(**caps))}

    plain, private = numbers(), numbers(private_by_attribute=True)
    mirror = numbers(private_by_attribute=True, has_mirror=True)
    mediated = numbers(mediated_root=True, gmem_backed=False, needs_pin=True, converts_in_place=True)

    assert private - plain == {5, 7, 9, 20, 21, 22, 25, 26}
    assert mirror - private == {4, 6, 10, 11}
    assert private - mirror == {5}
    assert {10, 11, 12, 32} <= mediated
    assert not {2, 4, 5, 19, 27, 28} & mediated
    # Of 17 and 18 what is true without a guest_memfd, too: of frames that external tables map, and of new pages.
    without_files = Capabilities(mediated_root=True, gmem_backed=False)
    assert {"reclaimed_once", "taken_back_once", "new_pages_are_clear"} == {
        row.check.__name__ for row in INVARIANTS if row.number in (17, 18) and row.needs(without_files)
    }
    in_place = switched_on(Capabilities(private_by_attribute=True, converts_in_place=True))
    assert "views_are_apart" not in {row.check.__name__ for row in in_place}


# ---- the checker finds broken cores ---------------------------------------------------------------------------------


def exercise(backend: Backend, **host: Any) -> None:
    """A little of everything, checked after every call."""
    box = Watched(backend, vcpus=2, **host)
    guest = box.machine.guest
    guest.read(slice(GFN, GFN + 2, 1), vcpu=1, private=box.private)
    if box.private:
        box.set_private(GFN, 1, False)
        box.punch(GFN + 1)
        guest.write(slice(GFN, GFN + 1, 1), private=False)
    box.process.migrate_pages(box.hva, 8 * 4096)
    guest.write(slice(400, 700, 1), private=box.private)
    box.checker.check(box.vm)
    box.destroy()
    box.checker.check_idle()


@pytest.mark.parametrize("backing", ["4k", "2m"])
@pytest.mark.parametrize("backend", [DEFAULT, SWPROT, MIRROR, MEDIATED, PINNING, OWNING], ids=lambda b: b.name)
def test_sound_core_passes(backend: Backend, backing: str) -> None:
    exercise(backend, backing=backing)


def not_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tlb, "flush", lambda self, start, end: None)


def not_zapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def zap(self: Tdp, root: Any, index: Any, level: int, *more: Any) -> Steps[int]:
        return 0
        yield

    monkeypatch.setattr(Tdp, "zap_leaves", zap)


def not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(vm: Vm, ranges: Any) -> Steps[None]:
        return
        yield

    monkeypatch.setattr(invalidate, "end", end)


def not_tracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attributes, "track_mixed", lambda self, slot, start, end: None)


def freed_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages go back to the host before anybody was told."""
    free = Frames._release

    def early(self: Frames, pfns: Sel) -> None:
        free(self, pfns)
        self.use[1] = Use.FREE

    monkeypatch.setattr(Frames, "_release", early)


@pytest.mark.assumes(has_mirror=False)
@pytest.mark.parametrize(
    ("broken", "numbers"),
    [(not_flushed, {15, 16}), (not_zapped, {5, 16}), (not_ended, {14}), (not_tracked, {9}), (freed_early, {16})],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_broken_core_is_found(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[[pytest.MonkeyPatch], None], numbers: set[int]
) -> None:
    broken(monkeypatch)

    with pytest.raises(InvariantViolation) as caught:
        exercise(SWPROT)

    assert caught.value.number in numbers, caught.value


def test_allocation_under_mmu_lock_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """31: a walk that does not use the caches allocates where it must not."""
    monkeypatch.setattr(TableCache, "take", lambda self, n: self.frames.alloc(n, Use.TABLE))

    with pytest.raises(InvariantViolation, match="allocated under mmu_lock") as caught:
        Watched(MIRROR)

    assert caught.value.number == 31


def test_leak_is_found() -> None:
    """30: a frame that nobody gives back, and a pin."""
    for leak in (lambda f: f.alloc(1, Use.META), lambda f: f.pin(slice(9, 10, 1))):
        box = Watched()
        leak(box.host.frames)

        with pytest.raises(InvariantViolation, match="invariant 30"):
            box.destroy_and_look()


def test_a_vm_that_is_gone_is_empty() -> None:
    box = Watched()
    box.machine.destroy()

    check_gone(box.vm)


def test_locked_pages_are_excused_where_this_vm_leaked_them() -> None:
    """30: a page that the vendor lost stays charged. What somebody else lost is no excuse."""
    box = Watched(PINNING)
    box.machine.destroy()
    box.vm.memlock_pages = 2
    box.host.frames.leak(box.host.frames.alloc(9, Use.GMEM), "another VM's")
    with pytest.raises(InvariantViolation, match="invariant 30"):
        check_gone(box.vm)

    check_gone(box.vm, lost=2)


def test_pins_are_excused_where_they_are_on_leaked_frames() -> None:
    """30: a leaked frame that has lost its pin does not make up for a pin that somebody forgot."""
    box = Watched()
    frames = box.host.frames
    leaked = frames.alloc(2, Use.GMEM)
    frames.pin(leaked)
    frames.leak(leaked, "the vendor has lost them")
    box.destroy_and_look()

    frames.unpin(leaked)
    frames.pin(slice(9, 10, 1))
    with pytest.raises(InvariantViolation, match="invariant 30"):
        box.checker.check_idle()


# ---- the checker itself -------------------------------------------------------------------------------------------


@pytest.mark.assumes(confidential=False)
def test_checker_looks_after_every_call() -> None:
    box = Watched()
    before = box.checker.checks
    box.set_private(0, 1, False)
    box.machine.guest.write(slice(9, 10, 1))

    assert box.checker.checks == before + 2


def test_step_keeps_error_and_events() -> None:
    """A call looked at from both sides: its error, its hooks, the gfns of its events."""
    box = Watched(MIRROR)
    with box.checker.step(box.vm, "set_memory_attributes", start=0, end=0, value=8) as step:
        box.fd.set_memory_attributes(0, 0, 8)
    assert step.error is not None and step.error.errno == errno.EINVAL

    with box.checker.step(box.vm, "set_memory_attributes", start=GFN, end=GFN + 1, value=0) as step:
        box.set_private(GFN, 1, False)
    assert [e.name for e in step.hooks()] == ["remove_private_spte", "flush_remote_tlbs"]
    assert step.gfns("zap").tolist() == [GFN]


def test_checker_changes_nothing() -> None:
    """Looking charges nothing, counts no hook call and emits no event: the clock is as without it."""
    costs = []
    for watched in (False, True):
        box = Box(MIRROR)
        if watched:
            Checker.on(box.host)
        box.machine.guest.write(slice(3, 9, 1))
        box.set_private(4, 1, False)
        hooks = {name: hook.calls for name, hook in box.host.ops.hooks.items()}
        costs.append((box.host.meter.now_ns, box.host.meter.counts, hooks, len(box.events.events)))

    assert costs[0] == costs[1]


def test_faults_that_are_refused_leave_no_trace() -> None:
    """23: link and set answer busy, and nothing but empty tables may stay."""
    for hook in ("link_private_spt", "set_private_spte"):
        box = Watched(MIRROR)
        box.hw.refuse(hook, 1, 0, Retry())
        with box.checker.step(box.vm, "write", gfns=slice(900, 901, 1), private=True) as step:
            assert box.touch(900) is None
        assert any(isinstance(e.info.get("result"), Stopped) for e in step.events)


def test_rows_say_what_they_need() -> None:
    for row in INVARIANTS:
        assert row.text and row.needs.name
        assert row.quiet_only == (row.when is When.QUIET)

