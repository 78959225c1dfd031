"""Test-only backends, and a VM small enough to look at as a whole.

`FakeMirror` is the smallest trusted party that checks what kvm-core.md section 8 (rows 10 to 13) asks of the core: its
table is a plain dict, and it refuses a child without its parent, a set on present and a remove on absent. The same
class serves as a mediated backend (every entry of the only root through hooks, no table pages).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.backend import Backend
from cvmcore.backends.default import DEFAULT
from cvmcore.backends.swprot import SWPROT
from cvmcore.cost import COMMON, COMMON_PROFILE, Profile, load_profile
from cvmcore.errors import InvariantViolation
from cvmcore.events import Event
from cvmcore.guest import Machine
from cvmcore.hookspecs import API_VERSION, hookimpl
from cvmcore.host import Host
from cvmcore.mem.tdp import FRAME_SHIFT, PRESENT, TABLE, WRITABLE, Root
from cvmcore.observers import observes
from cvmcore.pages import Sel, array_of, contiguous, count, first, heads, part
from cvmcore.runner import load_profile_for
from cvmcore.sched import Lockdep
from cvmcore.types import (
    PAGE_BYTES,
    PG_LEVEL_4K,
    PG_LEVEL_512G,
    Access,
    Batch,
    Capabilities,
    ExitReason,
    Fatal,
    HostView,
    InstallResult,
    Reason,
    Stopped,
    VmView,
    Walk,
    order_of,
    pages_per_level,
)
from cvmcore.uapi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, Process, VcpuFd, VmFd
from cvmcore.vcpu import Accept, Touch
from cvmcore.vm import Vm

PROFILE = load_profile(COMMON_PROFILE, required=COMMON, resolve=lambda name: COMMON_PROFILE)
PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
PAGE = PAGE_BYTES
M2 = 512 * PAGE
"""Bytes of a 2M page."""


# ---- the trusted party ----------------------------------------------------------------------------------------------


class TrustedTable:
    """One VM's external page table: (level, block) -> ("leaf" | "table", frame). `flat`: leaves need no tables."""

    def __init__(self, flat: bool) -> None:
        self.flat = flat
        self.entries: dict[tuple[int, int], tuple[str, int]] = {}
        self.accepted: set[int] = set()
        self.blocked: set[tuple[int, int]] = set()

    def _key(self, gfn: int, level: int) -> tuple[int, int]:
        if gfn & (pages_per_level(level) - 1):
            raise InvariantViolation(f"an entry of level {level} at an unaligned gfn", number=8, gfn=gfn)
        return level, gfn >> order_of(level)

    def _parent(self, gfn: int, level: int) -> None:
        if self.flat or level == PG_LEVEL_512G:
            return
        if self.entries.get((level + 1, gfn >> order_of(level + 1)), ("", 0))[0] != "table":
            raise InvariantViolation(f"a child of level {level} without its parent", number=12, gfn=gfn)
        self.reachable(gfn, level)

    def reachable(self, gfn: int, level: int) -> None:
        """No table above an entry is blocked."""
        for above in range(level + 1, PG_LEVEL_512G + 1):
            if (above, gfn >> order_of(above)) in self.blocked:
                raise InvariantViolation(f"an entry of level {level} below a blocked table", number=12, gfn=gfn)

    def put(self, gfn: int, level: int, kind: str, frame: int) -> None:
        """A non-present entry becomes a leaf or a table."""
        key = self._key(gfn, level)
        self._parent(gfn, level)
        if key in self.entries:
            raise InvariantViolation("set on present", number=13, gfn=gfn)
        if kind == "leaf" and frame & (pages_per_level(level) - 1):
            raise InvariantViolation("a leaf on an unaligned frame", number=8, gfn=gfn, pfn=frame)
        self.entries[key] = kind, frame

    def drop(self, gfn: int, level: int, kind: str, frame: int) -> None:
        """A present entry becomes non-present; a table must be empty."""
        key = self._key(gfn, level)
        if self.entries.get(key) != (kind, frame):
            raise InvariantViolation("remove on absent", number=13, gfn=gfn, states={"entry": self.entries.get(key)})
        self.reachable(gfn, level)
        if kind == "table" and self.children(gfn, level):
            raise InvariantViolation("a table is freed before its children", number=12, gfn=gfn)
        del self.entries[key]
        if kind == "leaf":
            self.accepted -= set(range(gfn, gfn + pages_per_level(level)))

    def children(self, gfn: int, level: int) -> list[tuple[int, int]]:
        """Keys of the entries in the table that the entry at `level` points to."""
        at = gfn >> order_of(level)
        return [key for key in self.entries if key[0] == level - 1 and key[1] >> 9 == at]

    def walk(self, gfn: int) -> tuple[int, int] | None:
        """(frame, level) that a 4K gfn translates to."""
        for level in range(PG_LEVEL_512G, 0, -1):
            if (level, gfn >> order_of(level)) in self.blocked:
                return None
            kind, frame = self.entries.get((level, gfn >> order_of(level)), ("", 0))
            if kind == "leaf":
                return frame + (gfn & (pages_per_level(level) - 1)), level
        return None


@attrs.define
class Refusal:
    """A hook stops: at its n-th call after `done` pages, or (gfn given) when it first comes to that gfn."""

    hook: str
    reason: Reason
    nth: int = 0
    done: int = 0
    gfn: int | None = None


class FakeMirror:
    """A backend with an external table. `refuse` and `refuse_at` make its install hooks stop."""

    def __init__(self, caps: Capabilities) -> None:
        self.caps = caps
        self.host: Any = None
        self.refusals: list[Refusal] = []
        self.calls: dict[str, int] = {}
        self.trace: list[tuple[Any, ...]] = []
        """("hook", first gfn or pfn, pages, ...) of every call that changes something."""

    # ---- what tests say ----

    def refuse(self, hook: str, nth: int, done: int, reason: Reason) -> None:
        """The n-th call of the hook from now on (1: the next) does `done` pages and stops."""
        self.refusals.append(Refusal(hook, reason, nth=self.calls.get(hook, 0) + nth, done=done))

    def refuse_at(self, hook: str, gfn: int, reason: Reason) -> None:
        """The hook stops once when it comes to this gfn."""
        self.refusals.append(Refusal(hook, reason, gfn=gfn))

    def _stop(self, vm: VmView, hook: str, gfns: Sel) -> Stopped | None:
        self.calls[hook] = self.calls.get(hook, 0) + 1
        n = count(gfns)
        found: list[tuple[int, Refusal]] = []
        for refusal in self.refusals:
            if refusal.hook != hook:
                continue
            if refusal.gfn is not None:
                done = int(np.searchsorted(array_of(gfns), refusal.gfn))
                if done < n and int(array_of(gfns)[done]) == refusal.gfn:
                    found.append((done, refusal))
            elif refusal.nth == self.calls[hook] and refusal.done < n:
                found.append((refusal.done, refusal))
        if not found:
            return None
        done, refusal = min(found, key=lambda f: f[0])
        self.refusals.remove(refusal)
        if isinstance(refusal.reason, Fatal):
            vm.bug(refusal.reason.why or "told to")
        return Stopped(done, refusal.reason)

    def _log(self, hook: str, pages: Sel, *more: object) -> None:
        if count(pages):
            self.trace.append((hook, first(pages), count(pages), *more))

    # ---- hooks ----

    @hookimpl
    def host_init(self, host: HostView) -> None:
        self.host = host
        host.hw = self

    @hookimpl
    def capabilities(self, vm_type: str, options: dict[str, Any]) -> Capabilities:
        return self.caps

    @hookimpl
    def vm_init(self, vm: VmView) -> None:
        vm.arch = TrustedTable(flat=self.caps.mediated_root)

    @hookimpl
    def vm_pre_destroy(self, vm: VmView) -> None:
        self.trace.append(("vm_pre_destroy",))

    @hookimpl
    def vm_destroy(self, vm: VmView) -> None:
        self.trace.append(("vm_destroy",))
        if vm.arch.entries:
            raise InvariantViolation("tables are left at vm_destroy", number=30, states={"entries": vm.arch.entries})

    @hookimpl
    def link_private_spt(self, vm: VmView, gfns: Sel, level: int, tables: Sel) -> InstallResult:
        stop = self._stop(vm, "link_private_spt", gfns)
        done = count(gfns) if stop is None else stop.done
        for gfn, frame in zip(array_of(gfns)[:done].tolist(), array_of(tables)[:done].tolist(), strict=True):
            vm.arch.put(gfn, level, "table", frame)
        self._log("link", part(gfns, 0, done), level)
        return stop

    @hookimpl
    def set_private_spte(self, vm: VmView, batch: Batch) -> InstallResult:
        stop = self._stop(vm, "set_private_spte", batch.gfns)
        done = batch.part(0, len(batch) if stop is None else stop.done)
        for gfn, pfn in zip(array_of(done.gfns).tolist(), array_of(done.pfns).tolist(), strict=True):
            vm.arch.put(gfn, batch.level, "leaf", pfn)
        if self.caps.zap_destroys_content and len(done):
            vm.host.memory.clear(done.all_pfns, vm.key)
        self._log("set", done.gfns, batch.level)
        return stop

    @hookimpl
    def remove_private_spte(self, vm: VmView, batch: Batch) -> None:
        for gfn, pfn in zip(array_of(batch.gfns).tolist(), array_of(batch.pfns).tolist(), strict=True):
            vm.arch.drop(gfn, batch.level, "leaf", pfn)
        self._log("remove", batch.gfns, batch.level)

    @hookimpl
    def free_private_spt(self, vm: VmView, gfns: Sel, level: int, tables: Sel) -> Sel:
        for gfn, frame in zip(array_of(gfns).tolist(), array_of(tables).tolist(), strict=True):
            vm.arch.drop(gfn, level, "table", frame)
        self._log("free", gfns, level)
        return tables

    @hookimpl
    def split_private_spt(self, vm: VmView, gfn: int, level: int, table: int) -> InstallResult:
        stop = self._stop(vm, "split_private_spt", slice(gfn, gfn + 1, 1))
        if stop is None:
            kind, pfn = vm.arch.entries.pop((level, gfn >> order_of(level)))
            if kind != "leaf":
                raise InvariantViolation("a table is split", gfn=gfn)
            vm.arch.put(gfn, level, "table", table)
            size = pages_per_level(level - 1)
            for i in range(512):
                vm.arch.put(gfn + i * size, level - 1, "leaf", pfn + i * size)
            self._log("split", slice(gfn, gfn + 1, 1), level)
        return stop

    @hookimpl
    def promote_private_spt(
        self, vm: VmView, gfn: int, level: int, pfn: int, table: int, blocked: bool
    ) -> InstallResult:
        stop = self._stop(vm, "promote_private_spt", slice(gfn, gfn + 1, 1))
        if blocked != ((level, gfn >> order_of(level)) in vm.arch.blocked):
            raise InvariantViolation("a table is said to be blocked, and is not, or the other way round", gfn=gfn)
        vm.arch.blocked.discard((level, gfn >> order_of(level)))
        if stop is None:
            children = vm.arch.children(gfn, level)
            if len(children) != 512:
                raise InvariantViolation("a table that is not full is merged", gfn=gfn)
            for key in children:
                del vm.arch.entries[key]
            del vm.arch.entries[level, gfn >> order_of(level)]
            vm.arch.put(gfn, level, "leaf", pfn)
            self._log("promote", slice(gfn, gfn + 1, 1), level)
        return stop

    @hookimpl
    def block_private_spt(self, vm: VmView, gfns: Sel, level: int) -> InstallResult:
        stop = self._stop(vm, "block_private_spt", gfns)
        done = count(gfns) if stop is None else stop.done
        for gfn in array_of(gfns)[:done].tolist():
            key = level, gfn >> order_of(level)
            if vm.arch.entries[key][0] != "table" or key in vm.arch.blocked:
                raise InvariantViolation("what is blocked is no open table", gfn=gfn)
            vm.arch.blocked.add(key)
        self._log("block", part(gfns, 0, done), level)
        return stop

    @hookimpl
    def unblock_private_spt(self, vm: VmView, gfns: Sel, level: int) -> None:
        for gfn in array_of(gfns).tolist():
            vm.arch.blocked.remove((level, gfn >> order_of(level)))
        self._log("unblock", gfns, level)

    @hookimpl
    def flush_remote_tlbs(self, vm: VmView, start: int, end: int) -> bool:
        self.trace.append(("flush", start, end))
        return False

    @hookimpl
    def gmem_invalidate(self, host: HostView, pfns: Sel) -> Sel:
        self._log("gmem_invalidate", pfns)
        return pfns

    @hookimpl
    def memory_reclaimed(self, vm: VmView, nr_pages: int) -> None:
        self.trace.append(("memory_reclaimed", nr_pages))

    @hookimpl
    def memslot_free(self, vm: VmView, slot: Any) -> None:
        self.trace.append(("memslot_free", slot.id))

    @hookimpl
    def guest_accept(self, vm: VmView, gfns: Sel, level: int) -> Access:
        table: TrustedTable = vm.arch
        status = np.zeros(count(gfns), np.uint8)
        for i, gfn in enumerate(array_of(gfns).tolist()):
            found = table.walk(gfn)
            if found is None:
                status[i] = Walk.MISS
            elif found[1] != level:
                status[i] = Walk.LARGER if found[1] > level else Walk.SMALLER
            else:
                pages = range(gfn, gfn + pages_per_level(level))
                table.accepted |= set(pages)
                vm.host.memory.clear(slice(found[0], found[0] + len(pages), 1), vm.key)
        return Access(_uniform(status), slice(0, 0, 1))

    @hookimpl
    def guest_access(self, vm: VmView, gfns: Sel, write: bool, private: bool) -> Access:
        table: TrustedTable = vm.arch
        n = count(gfns)
        status, pfns = np.zeros(n, np.uint8), np.zeros(n, np.int64)
        for i, gfn in enumerate(array_of(gfns).tolist()):
            found = table.walk(gfn)
            if found is None:
                status[i] = Walk.MISS
            elif self.caps.needs_accept and private and gfn not in table.accepted:
                status[i] = Walk.UNACCEPTED
            else:
                pfns[i] = found[0]
        return Access(_uniform(status), contiguous(pfns))


    @hookimpl
    def read_private_spte(
        self, vm: VmView, gfns: Sel, level: int
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        table: TrustedTable = vm.arch
        blocks = array_of(gfns) >> order_of(level)
        state, frame = np.zeros(len(blocks), np.uint8), np.zeros(len(blocks), np.int64)
        for (at, block), (kind, number) in table.entries.items():
            if at == level:
                asked = slice(*np.searchsorted(blocks, (block, block + 1)))
                state[asked] = 1 if kind == "leaf" else 4 if (at, block) in table.blocked else 2
                frame[asked] = number
        return state, frame


class FakePins(FakeMirror):
    """Pins frames of a mediated root, prepares guest_memfd pages, tops up caches: the install hooks before the lock."""

    @hookimpl
    def topup(self, vm: VmView, nr_pages: int) -> InstallResult:
        return self._stop(vm, "topup", slice(0, nr_pages, 1))

    @hookimpl
    def gmem_prepare(self, vm: VmView, gfns: Sel, pfns: Sel, max_order: int) -> InstallResult:
        stop = self._stop(vm, "gmem_prepare", gfns)
        self._log("prepare", part(gfns, 0, count(gfns) if stop is None else stop.done), max_order)
        return stop

    @hookimpl
    def pin_pfn(self, vm: VmView, batch: Batch, write: bool) -> InstallResult:
        stop = self._stop(vm, "pin_pfn", batch.gfns)
        done = batch.part(0, len(batch) if stop is None else stop.done)
        vm.host.frames.pin(done.all_pfns)
        self._log("pin", done.gfns)
        return stop

    @hookimpl
    def unpin_pfn(self, vm: VmView, batch: Batch) -> None:
        vm.host.frames.unpin(batch.all_pfns)
        self._log("unpin", batch.gfns)

    @hookimpl
    def remove_private_spte(self, vm: VmView, batch: Batch) -> None:
        super().remove_private_spte(vm, batch)
        vm.host.frames.unpin(batch.all_pfns)


def _uniform(status: Any) -> Any:
    return int(status[0]) if len(status) and not np.count_nonzero(status != status[0]) else status


def backend_of(name: str, make: Callable[[], object]) -> Backend:
    """A backend that no entry point knows."""
    return Backend(
        name=name,
        vendor=name,
        vm_type=name,
        summary="for tests only",
        api_version=API_VERSION,
        make=make,
        profile=Path(COMMON_PROFILE),
    )


def mirror(**caps: Any) -> Backend:
    """A backend with a mirror root; capabilities may be overridden."""
    have = {"private_by_attribute": True, "has_mirror": True, "promotes": True, **caps}
    return backend_of("mirror", lambda: FakeMirror(Capabilities(**have)))


def mediated(**caps: Any) -> Backend:
    """A backend all of whose entries are installed by hooks; guest memory is the VMM's own."""
    have = {
        "mediated_root": True,
        "converts_in_place": True,
        "gmem_backed": False,
        "max_private_level": PG_LEVEL_4K,
        "max_shared_level": PG_LEVEL_4K,
        **caps,
    }
    return backend_of("mediated", lambda: FakeMirror(Capabilities(**have)))


def pinning() -> Backend:
    """A mediated backend that also pins, prepares and tops up; private by attribute, so that guest_memfd is used."""
    caps = Capabilities(
        mediated_root=True,
        private_by_attribute=True,
        needs_pin=True,
        max_private_level=PG_LEVEL_4K,
        max_shared_level=PG_LEVEL_4K,
    )
    return backend_of("pinning", lambda: FakePins(caps))


MIRROR = mirror(zap_destroys_content=True)
MEDIATED = mediated()
PINNING = pinning()
ALL = {"default": DEFAULT, "swprot": SWPROT, "mirror": MIRROR, "mediated": MEDIATED}


# ---- observers ------------------------------------------------------------------------------------------------------


class Recorder:
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    @observes
    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def said(self, *kinds: str) -> list[str]:
        """kind:name of the events of these kinds (all without any), "end" phases left out."""
        return [f"{e.kind}:{e.name}" for e in self.events if e.phase != "end" and (not kinds or e.kind in kinds)]

    def clear(self) -> None:
        self.events.clear()


# ---- another backend in the place of the core's own -----------------------------------------------------------------


@attrs.define
class StandIn:
    """The backend of `--cvm-backend`: it stands for the one of the core's own two whose VM type is like its."""

    backend: Backend
    profile: Profile
    caps: Capabilities

    @classmethod
    def of(cls, backend: Backend) -> StandIn:
        """With its own prices, and the capabilities of a VM with the default options."""
        profile = load_profile_for(backend, None)
        caps = Machine(Host(backend, profile, nr_frames=1 << 10), 16 * PAGE).vm.vm.caps
        return cls(backend, profile, caps)

    @property
    def like(self) -> Backend:
        """Which of the two: private memory by attribute tells them apart."""
        return SWPROT if self.caps.private_by_attribute else DEFAULT

    def lacks(self, assumed: dict[str, Any]) -> list[str]:
        """What a test assumes and the VM type has not, a phrase each."""
        have = attrs.asdict(self.caps)
        return [f"{name}={value!r}, here {have[name]!r}" for name, value in assumed.items() if have[name] != value]


stand_in: StandIn | None = None
"""Set by conftest.py."""


# ---- a small VM -----------------------------------------------------------------------------------------------------


class Box:
    """A Machine (one slot from gfn 0, all private where the VM type has it) with short names for what tests ask."""

    def __init__(
        self,
        backend: Backend = SWPROT,
        pages: int = 1024,
        *,
        vcpus: int = 1,
        nr_frames: int = 1 << 14,
        observers: Iterable[object] = (),
        **host: Any,
    ) -> None:
        self.events = Recorder()
        profile = PROFILE
        self.stands_in = stand_in is not None and stand_in.like is backend
        if self.stands_in:
            backend, profile = stand_in.backend, stand_in.profile
        self.host = Host(
            backend, profile, nr_frames=nr_frames, observers=[self.events, *observers], drive=Lockdep(), **host
        )
        self.machine = Machine(self.host, pages * PAGE, vcpus=vcpus)
        self.machine.launch()
        self.events.clear()

    @property
    def process(self) -> Process:
        return self.machine.process

    @property
    def fd(self) -> VmFd:
        return self.machine.vm

    @property
    def vm(self) -> Vm:
        return self.machine.vm.vm

    @property
    def vcpus(self) -> list[VcpuFd]:
        return self.machine.vcpus

    @property
    def hw(self) -> Any:
        return self.host.hw

    @property
    def hva(self) -> int:
        return self.machine.regions[0].hva

    @property
    def gmem(self) -> int:
        return self.machine.regions[0].gmem_fd

    @property
    def inode(self) -> Any:
        return self.process.files[self.gmem].inode

    @property
    def private(self) -> bool:
        """Whether the guest's ordinary memory is private here."""
        return self.vm.caps.private_by_attribute

    # ---- the guest ----

    def touch(
        self, gfns: Sel | int, *, write: bool = True, private: bool | None = None, vcpu: int = 0, stamps: Any = None
    ) -> ExitReason | None:
        """One guest access; the exit, or None where it was completed. Writes stamp 1000 + gfn."""
        return self.access(self.action(gfns, write=write, private=private, stamps=stamps), vcpu)

    def access(self, action: Touch, vcpu: int = 0) -> ExitReason | None:
        """The guest of a stand-in accepts first where it has to, since the core's own two never do."""
        if self.stands_in and action.private and self.vm.caps.needs_accept:
            leave = self.vcpus[vcpu].run(Accept(action.gfns))
            if leave is not None:
                return leave
        return self.vcpus[vcpu].run(action)

    def action(
        self, gfns: Sel | int, *, write: bool = True, private: bool | None = None, stamps: Any = None
    ) -> Touch:
        pages = slice(gfns, gfns + 1, 1) if isinstance(gfns, int) else gfns
        if stamps is None:
            stamps = (array_of(pages) + 1000).astype(np.uint32)
        return Touch(pages, write=write, private=self.private if private is None else private, stamps=stamps)

    def read(self, gfns: Sel | int, *, private: bool | None = None, vcpu: int = 0) -> list[int]:
        """Stamps that the guest reads; the access must not exit."""
        action = self.action(gfns, write=False, private=private)
        assert self.access(action, vcpu) is None
        assert action.seen is not None
        return [int(stamp) for stamp in action.seen]

    def accept(self, gfns: Sel, level: int = PG_LEVEL_4K) -> ExitReason | None:
        return self.vcpus[0].run(Accept(gfns, level=level))

    # ---- the VMM ----

    def set_private(self, gfn: int, n: int = 1, private: bool = True) -> None:
        self.fd.set_memory_attributes(gfn * PAGE, n * PAGE, 8 if private else 0)

    def punch(self, index: int, n: int = 1, fd: int | None = None) -> None:
        self.process.fallocate(self.gmem if fd is None else fd, PUNCH, index * PAGE, n * PAGE)

    # ---- what is there ----

    def root(self, private: bool | None = None) -> Root:
        return self.vm.tdp.root_for(self.private if private is None else private)

    def level(self, gfn: int, private: bool | None = None) -> int:
        """Level of the leaf that maps gfn, 0 for none."""
        return self.root(private).level_at(gfn)

    def pfn(self, gfn: int, private: bool | None = None) -> int:
        """The frame that gfn is mapped to."""
        level = self.level(gfn, private)
        assert level, f"gfn {gfn:#x} is not mapped"
        word = int(self.root(private).entries[level][gfn >> order_of(level)])
        return (word >> FRAME_SHIFT) + (gfn & (pages_per_level(level) - 1))

    def writable(self, gfn: int, private: bool | None = None) -> bool:
        level = self.level(gfn, private)
        return bool(int(self.root(private).entries[level][gfn >> order_of(level)]) & WRITABLE)

    def mapped(self, private: bool | None = None) -> list[int]:
        """All 4K gfns that leaves cover."""
        found: list[int] = []
        for level, index in self.root(private).leaves_in(0, self.vm.tdp.end_gfn):
            for head in array_of(heads(index, order_of(level))).tolist():
                found += range(head, head + pages_per_level(level))
        return sorted(found)

    @property
    def seq(self) -> int:
        return self.vm.frame.seq

    @property
    def idle(self) -> bool:
        """No invalidation is under way."""
        return self.vm.frame.in_progress == 0

    def check_mirror(self) -> None:
        """Rows 10 and 11: the core's record equals the trusted table, entry by entry, and nothing is frozen."""
        root = self.vm.tdp.mirror or self.vm.tdp.direct
        have: dict[tuple[int, int], tuple[str, int]] = {}
        for level in range(PG_LEVEL_4K, PG_LEVEL_512G + 1):
            for index in np.flatnonzero(root.entries[level]).tolist():
                word = int(root.entries[level][index])
                blocked = (level, index) in self.vm.arch.blocked
                assert bool(word & PRESENT) != blocked, f"frozen, or not blocked: level {level}, {index:#x}"
                if not (root.flat and word & TABLE):
                    have[level, index] = ("table" if word & TABLE else "leaf", word >> FRAME_SHIFT)
        assert have == self.vm.arch.entries

    def destroy(self) -> None:
        """The process ends; nothing may be left."""
        self.machine.destroy()
        assert self.machine.leftovers() == []


def sel(*gfns: int) -> Sel:
    """Scattered or contiguous gfns."""
    return contiguous(np.array(gfns, np.int64))
