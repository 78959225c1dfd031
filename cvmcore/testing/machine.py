"""A hypothesis state machine over the whole UAPI of one small VM, and a model in plain Python beside it.

`uapi_machine(backend)` gives a `RuleBasedStateMachine`: hypothesis makes up sequences of what a VMM, a guest and the
host's memory management may do, in any order. The model knows what stands in every page (dicts, one page at a time)
and which errno or exit each call must give; it asks a VM type's capabilities what is lost and when, nothing else.
After every step the content of all pages that the model knows is compared with what stands in memory, and all
invariants are looked at (`cvmcore.testing.invariants`).

Needs hypothesis (`pip install cvmcore[test]`).
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeAlias

import attrs
import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from cvmcore.backend import Backend
from cvmcore.errors import InvariantViolation, UapiError
from cvmcore.host import Host
from cvmcore.mem.gmem import EHWPOISON, GmemInode
from cvmcore.memory import SCRAMBLED
from cvmcore.observers import FaultInjector, Log
from cvmcore.pages import Sel, array_of, as_sel
from cvmcore.plugins import load_backend
from cvmcore.runner import load_profile_for
from cvmcore.sched import Lockdep
from cvmcore.testing.invariants import Checker, Step
from cvmcore.testing.recorder import Recorder
from cvmcore.types import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    PAGE_BYTES,
    PG_LEVEL_2M,
    ExitReason,
    Fatal,
    GuestException,
    HostVerdict,
    MapGpaRange,
    MemoryFault,
    Mmio,
    Retry,
    Shutdown,
    Stopped,
)
from cvmcore.uapi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, Process
from cvmcore.vcpu import Accept, Convert, Touch

END = 2048
"""gfns that the machine plays with, and pages of the VMM's memory."""
FIRST = 1024
"""gfns of the slot that it begins with."""
NR_FRAMES = 1 << 14
SLOTS = 4
MOST_FILES = 4

Content: TypeAlias = "dict[int, tuple[int | None, bool]]"
"""What stands in a page: the stamp (None: nobody can say) and whether it was written as private."""

PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
BLAME = {"punch": 19, "convert": 20, "set_memory_attributes": 20, "memslot": 22, "close": 28}
"""The invariant that a lost page breaks, by the call that lost it; 18 where a page is read that nobody wrote."""

INJECTED: dict[str, Callable[[], Any]] = {
    "topup": lambda: Stopped(0, Fatal(errno.ENOMEM)),
    "gmem_prepare": lambda: Stopped(0, Fatal(errno.EIO)),
    "pin_pfn": lambda: Stopped(0, Retry()),
    "link_private_spt": lambda: Stopped(0, Retry()),
    "set_private_spte": lambda: Stopped(0, Retry()),
    "split_private_spt": lambda: Stopped(0, Retry()),
    "memslot_prepare": lambda: UapiError(errno.ENOMEM, "memslot_prepare", "told to"),
}
"""How each hook that may fail is made to fail, before it did anything."""
FATAL = {"topup": errno.ENOMEM, "gmem_prepare": errno.EIO}
"""The errno that a fault ends with where these hooks fail; after the others it is tried again."""

SPLITS_WHERE_IT_CAN = ("write", "read", "accept", "prefault", "split")
"""Calls that do not fail where a page cannot be split: faults are tried again, and dirty logging leaves it large."""

edges = st.sampled_from([0, 1, 100, 255, 256, 500, 511, 512, 513, 700, 1000, 1023, 1024, 1100, 1535, 1536, 2000, 2047])
runs = st.builds(
    lambda start, n: range(start, min(END, start + n)), edges, st.sampled_from([1, 1, 2, 3, 13, 64, 300, 512, 600])
)
scattered = st.lists(st.integers(0, END - 1), min_size=1, max_size=6, unique=True).map(sorted)
pages = st.one_of(runs.map(list), scattered)
seldom = st.sampled_from([False, False, False, True])
bases = st.sampled_from([0, 256, 512, 700, 1024, 1100, 1536])
skews = st.sampled_from([0, 0, 256, 3])
sizes = st.sampled_from([1, 64, 256, 512, 700, 1024])


@attrs.define(eq=False)
class File:
    """The model of a guest_memfd."""

    inode: GmemInode
    npages: int
    flags: int
    fds: list[int]
    hva: int = 0
    """Where the VMM has mapped it; 0: nowhere."""
    content: Content = attrs.field(factory=dict)
    accepted: set[int] = attrs.field(factory=set)
    poisoned: set[int] = attrs.field(factory=set)
    delta: int | None = None
    """gfn minus index of its first binding: where a page has an owner who knows its gfn, it stays at it."""

    @property
    def open(self) -> bool:
        return bool(self.fds or self.hva)


@attrs.define(eq=False)
class Slot:
    """The model of a memslot; `page` is its first page in the VMM's memory."""

    id: int
    base: int
    npages: int
    page: int
    flags: int
    file: File | None = None
    pgoff: int = 0
    gmem_only: bool = False
    written: set[int] = attrs.field(factory=set)
    """gfns that the guest wrote since the dirty log was last read."""
    touched: set[int] = attrs.field(factory=set)
    """gfns that anybody faulted in since then."""

    def __contains__(self, gfn: int) -> bool:
        return self.base <= gfn < self.base + self.npages

    @property
    def gfns(self) -> range:
        return range(self.base, self.base + self.npages)


class OneShot(FaultInjector):
    """A fault injector that is armed for the next call of a hook."""

    def __init__(self) -> None:
        super().__init__("", 1, None)

    def aim(self, hook: str) -> None:
        self.hook, self.seen, self.answer = hook, 0, INJECTED[hook]() if hook else None

    @property
    def fired(self) -> str:
        return self.hook if self.seen else ""


class UapiMachine(RuleBasedStateMachine):
    """The rules; `uapi_machine` binds them to a backend."""

    backend: ClassVar[Backend]
    host_options: ClassVar[dict[str, Any]]
    last_script: ClassVar[list[str]] = []
    """What the last example did, as lines for `cvm uapi`."""

    def __init__(self) -> None:
        super().__init__()
        self.injector = OneShot()
        self.host = Host(
            self.backend, load_profile_for(self.backend, None), nr_frames=NR_FRAMES, observers=[Log(8), self.injector],
            drive=Lockdep(), **self.host_options,
        )
        self.checker = Checker.on(self.host)
        self.recorder = Recorder(self.backend.name, self.host_options["backing"], self.host_options["options"] or {})
        type(self).last_script = self.recorder.lines
        self.process: Any = self.recorder.of(Process(self.host))
        self.fd = self.process.create_vm()
        self.vm = self.fd.vm
        self.caps = self.vm.caps
        self.two_kinds = self.caps.private_by_attribute or self.caps.confidential
        """Whether the guest has private and shared accesses at all."""
        self.in_place = self.two_kinds and not self.caps.private_by_attribute
        self.tied = self.caps.needs_accept or self.caps.encrypts
        """Whether a page's owner knows its gfn."""

        self.area = self.process.mmap(END * PAGE_BYTES)
        mapping = self.process.mm.find(self.area >> 12)
        assert mapping is not None
        self.mapping = mapping
        self.vmm: Content = {}
        """The VMM's memory by page."""
        self.detached: Content = {}
        """By gfn: pages that the guest keeps, though the VMM's memory has another one there by now."""
        self.regions: list[tuple[int, int]] = []
        """(hva, size) that the VMM has registered."""
        self.files: list[File] = []
        self.slots: dict[int, Slot] = {}
        self.private: set[int] = set()
        """gfns whose attribute is private."""
        self.guest_shared: set[int] = set()
        """gfns that a guest without attributes uses as shared."""
        self.ran = False
        self.stamp = 1
        self.steps = 0
        self.last = ""

        if self.caps.private_by_attribute:
            self.create_file(FIRST, 0)
            self.create_slot(0, 0, FIRST, 0, True, 0, 0)
            self.set_attributes(range(FIRST), True)
        else:
            self.create_slot(0, 0, FIRST, 0, False, 0, 0)
        self.vcpus = [self.fd.create_vcpu(i) for i in range(2)]
        self.fd.launch_finish()

    # ---- the model ----------------------------------------------------------------------------------------------

    def slot_at(self, gfn: int) -> Slot | None:
        return next((slot for slot in self.slots.values() if gfn in slot), None)

    def from_gmem(self, slot: Slot, private: bool) -> bool:
        return slot.gmem_only or (private and self.caps.private_by_attribute)

    def place(self, gfn: int, private: bool) -> tuple[Content, int] | None:
        """Where the content of a gfn is kept for this kind of access."""
        slot = self.slot_at(gfn)
        if slot is None:
            return None
        if self.from_gmem(slot, private):
            return (slot.file.content, gfn - slot.base + slot.pgoff) if slot.file is not None else None
        if gfn in self.detached:
            return self.detached, gfn
        return self.vmm, gfn - slot.base + slot.page

    def kind_of(self, gfn: int) -> bool:
        """Whether the guest's own access to a gfn is private."""
        if self.caps.private_by_attribute:
            return gfn in self.private
        return self.two_kinds and gfn not in self.guest_shared

    def expected(self, gfn: int, private: bool) -> int | None:
        """What a read of the gfn must find; None where nobody can say."""
        place = self.place(gfn, private)
        assert place is not None
        store, key = place
        if key not in store:
            return 0 if self.caps.fresh_is_zero or not private else None
        stamp, kind = store[key]
        return None if kind != private and self.caps.encrypts else stamp

    def mapped(self, gfn: int, private: bool) -> bool:
        level: int = self.vm.tdp.root_for(private).level_at(gfn)
        return level > 0

    def trouble(self, gfn: int, private: bool, write: bool) -> tuple[str, int] | None:
        """How a fault on the gfn ends where it cannot be resolved: ("fault" or "mmio", errno)."""
        slot = self.slot_at(gfn)
        if self.caps.private_by_attribute and private != (gfn in self.private):
            return "fault", errno.EFAULT
        if slot is None:
            return ("fault", errno.EFAULT) if private and self.caps.private_by_attribute else ("mmio", 0)
        if write and slot.flags & KVM_MEM_READONLY:
            return "mmio", 0
        if self.from_gmem(slot, private):
            if slot.file is None:
                return "fault", errno.EFAULT
            if gfn - slot.base + slot.pgoff in slot.file.poisoned:
                return "fault", EHWPOISON
        return None

    def accepted(self, gfn: int) -> bool:
        slot = self.slot_at(gfn)
        return slot is not None and slot.file is not None and gfn - slot.base + slot.pgoff in slot.file.accepted

    def zap(self, file: File, indexes: Iterable[int]) -> None:
        """Private pages lose their mappings: where that is all that they are, their content."""
        if self.caps.zap_destroys_content:
            for index in indexes:
                file.content.pop(index, None)
                file.accepted.discard(index)

    def next_stamp(self) -> int:
        self.stamp += 1
        return self.stamp

    # ---- calling ------------------------------------------------------------------------------------------------

    @contextmanager
    def call(self, name: str, *expect: int, **arguments: Any) -> Iterator[Step]:
        """A call with the errnos that it may end with (0: it may succeed), looked at from both sides."""
        self.last, was_dead = name, self.vm.dead
        self.steps += 1
        if self.injector.fired:
            self.injector.aim("")
        with self.checker.step(self.vm, name, **arguments) as step:
            yield step
        allowed = set(expect) or {0}
        fired = self.injector.fired
        if fired == "memslot_prepare":
            allowed = {errno.ENOMEM}
        elif fired == "split_private_spt" and name not in SPLITS_WHERE_IT_CAN:
            allowed = {errno.EAGAIN}
        if was_dead and name in DEAD_EIO:
            allowed = {errno.EIO}
        got = step.error.errno if step.error is not None else 0
        if got not in allowed:
            names = ", ".join(errno.errorcode.get(e, "success") for e in allowed)
            raise AssertionError(f"{name} {arguments}: expected {names}, got {step.error or 'success'}")

    @precondition(lambda self: any(map(self.host.ops.has, INJECTED)))
    @rule(pick=st.integers(0, 5))
    def inject(self, pick: int) -> None:
        """The next call of a hook fails."""
        hooks = [hook for hook in sorted(INJECTED) if self.host.ops.has(hook)]
        self.aim(hooks[pick % len(hooks)])

    def aim(self, hook: str) -> None:
        """The next call of this hook fails; of none where it is empty."""
        if hook or (self.injector.hook and not self.injector.fired):
            answer = INJECTED[hook]() if hook else None
            reason = answer.reason if isinstance(answer, Stopped) else answer
            self.recorder.fail_next(hook, getattr(reason, "errno", 0))
        self.injector.aim(hook)

    @invariant()
    def content_is_intact(self) -> None:
        """Every page holds what the model says."""
        if not self.vm.dead and not self.vm.destroyed:
            for file in self.files:
                self._compare(file.content, file.inode.words)
            self._compare(self.vmm, self.mapping.words)
            for gfn, (stamp, private) in self.detached.items():
                _, pfns, _ = self.vm.tdp.root_for(private).lookup(slice(gfn, gfn + 1, 1), False)
                self._compare({0: (stamp, private)}, array_of(pfns) << 5)

    def _compare(self, content: Content, words: Any) -> None:
        for private in (False, True):
            known = [(key, stamp) for key, (stamp, kind) in content.items() if stamp is not None and kind == private]
            if not known:
                continue
            index, stamps = (np.array(column) for column in zip(*known, strict=True))
            frames = (words[index] >> 5).astype(np.int64)
            # A page of zeros that nobody touched has no frame yet.
            found = np.where(frames, self.host.memory.read(frames, self.vm.key if private else 0), 0)
            wrong = np.flatnonzero(found != stamps)
            if len(wrong):
                i = int(wrong[0])
                raise InvariantViolation(
                    f"a page lost its content in {self.last}", number=BLAME.get(self.last, 0), pfn=int(frames[i]),
                    states={"index": int(index[i]), "holds": _say(int(found[i])), "was": _say(int(stamps[i]))},
                    events=self.host.last_events(),
                )

    # ---- guest_memfd --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.caps.gmem_backed)
    @rule(npages=st.sampled_from([256, 512, 700, 1024]), flags=st.sampled_from([0, 0, 1, 3, 4]))
    def create_file(self, npages: int, flags: int) -> None:
        """KVM_CREATE_GUEST_MEMFD."""
        known = GUEST_MEMFD_FLAG_MMAP | (GUEST_MEMFD_FLAG_INIT_SHARED if self.caps.gmem_init_shared else 0)
        if flags & known == flags and self.tied:
            flags = 0
        good = self.caps.gmem_backed and not flags & ~known
        if good and sum(file.open for file in self.files) >= MOST_FILES:
            return
        with self.call("create_guest_memfd", 0 if good else errno.EINVAL) as step:
            step.result = self.fd.create_guest_memfd(npages * PAGE_BYTES, flags)
        if step.error is None:
            self.files.append(File(self.process.files[step.result].inode, npages, flags, [step.result]))

    def _file(self, pick: int) -> File | None:
        files = [file for file in self.files if file.fds]
        return files[pick % len(files)] if files else None

    @precondition(lambda self: self.caps.gmem_backed)
    @rule(pick=st.integers(0, 3))
    def dup(self, pick: int) -> None:
        """dup(2): the file lives until its last descriptor is closed."""
        if (file := self._file(pick)) is not None and len(file.fds) < 3:
            with self.call("dup") as step:
                step.result = self.process.dup(file.fds[0])
            file.fds.append(step.result)

    @precondition(lambda self: self.steps > 8)
    @rule(pick=st.integers(0, 3), sure=seldom)
    def close(self, pick: int, sure: bool) -> None:
        """close(2): the last one releases the file, and its memory."""
        if not sure or (file := self._file(pick)) is None:
            return
        fd = file.fds.pop()
        with self.call("close"):
            self.process.close(fd)
        if not file.open:
            for slot in self.slots.values():
                if slot.file is file:
                    slot.file = None
            self.files.remove(file)
        with self.call("close", 0 if fd in self.process.files else errno.EBADF):
            self.process.dup(fd) if fd in self.process.files else self.process.close(fd)

    @precondition(lambda self: self.caps.gmem_backed)
    @rule(pick=st.integers(0, 3), run=runs)
    def punch(self, pick: int, run: range) -> None:
        """fallocate(PUNCH_HOLE)."""
        if (file := self._file(pick)) is None:
            return
        n = max(0, min(len(run), file.npages - run.start))
        with self.call("punch", inode=file.inode, start=run.start, n=n) as step:
            self.process.fallocate(file.fds[0], PUNCH, run.start * PAGE_BYTES, len(run) * PAGE_BYTES)
        if step.error is None:
            for index in range(run.start, run.start + n):
                file.content.pop(index, None)
                file.accepted.discard(index)
                file.poisoned.discard(index)

    @precondition(lambda self: self.caps.gmem_backed)
    @rule(pick=st.integers(0, 3), run=runs)
    def allocate(self, pick: int, run: range) -> None:
        """fallocate without PUNCH_HOLE."""
        if (file := self._file(pick)) is not None:
            with self.call("fallocate", 0 if run.stop <= file.npages else errno.EINVAL):
                size = len(run) * PAGE_BYTES
                self.process.fallocate(file.fds[0], FALLOC_FL_KEEP_SIZE, run.start * PAGE_BYTES, size)

    @precondition(lambda self: self.steps > 8)
    @rule(pick=st.integers(0, 3), index=edges, sure=seldom)
    def memory_failure(self, pick: int, index: int, sure: bool) -> None:
        """The hardware loses a page of a guest_memfd."""
        if not sure or (file := self._file(pick)) is None or index >= file.npages:
            return
        was_there = bool(file.inode.words[index])
        with self.call("memory_failure") as step:
            self.process.memory_failure(file.fds[0], index * PAGE_BYTES)
        if step.error is None and was_there:
            file.content.pop(index, None)
            file.accepted.discard(index)
            file.poisoned.add(index)

    @precondition(lambda self: self.caps.gmem_backed)
    @rule(pick=st.integers(0, 3), run=runs, write=st.booleans())
    def touch_file(self, pick: int, run: range, write: bool) -> None:
        """The VMM reads or writes a guest_memfd that it has mapped."""
        file = self._file(pick)
        if file is None or run.stop > file.npages:
            return
        if not file.flags & GUEST_MEMFD_FLAG_MMAP:
            with self.call("mmap", errno.ENODEV):
                self.process.mmap_gmem(file.fds[0], 0, file.npages * PAGE_BYTES)
            return
        if not file.hva:
            file.hva = self.process.mmap_gmem(file.fds[0], 0, file.npages * PAGE_BYTES)
        hva = file.hva + run.start * PAGE_BYTES
        shared = file.flags & GUEST_MEMFD_FLAG_INIT_SHARED
        broken = file.poisoned.intersection(run)
        with self.call("mapping", 0 if shared and not broken else EHWPOISON if shared else errno.EFAULT) as step:
            if write:
                stamp = self.next_stamp()
                self.process.write(hva, stamp, len(run))
            else:
                step.result = self.process.read(hva, len(run))[1]
        if step.error is None and write:
            file.content.update((index, (stamp, False)) for index in run)
        elif step.error is None:
            self._same(step.result, [(index, file.content.get(index, (0, False))[0]) for index in run])

    # ---- memslots -----------------------------------------------------------------------------------------------

    @rule(base=bases, npages=sizes, skew=skews, pick=st.integers(0, 3), with_file=st.booleans())
    def fill_gap(self, base: int, npages: int, skew: int, pick: int, with_file: bool) -> None:
        """A new slot where there is none, as a VMM would make it."""
        free = next((i for i in range(SLOTS) if i not in self.slots), None)
        if free is not None and self.slot_at(base) is None:
            end = min((slot.base for slot in self.slots.values() if slot.base > base), default=END)
            self.create_slot(free, base, min(npages, end - base), skew, with_file, pick, 0)

    @rule(
        slot_id=st.integers(0, SLOTS - 1), base=bases, npages=sizes, skew=skews,
        with_file=st.booleans(), pick=st.integers(0, 3), flags=st.sampled_from([0, 0, 0, 1, 2, 8]),
    )  # fmt: skip
    def create_slot(
        self, slot_id: int, base: int, npages: int, skew: int, with_file: bool, pick: int, flags: int
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2 with a size: create, or whatever the arguments then mean."""
        file = self._file(pick) if with_file else None
        npages = min(npages, END - base)
        page, pgoff = (base + skew) % END, base + skew
        if not self.caps.private_by_attribute and self.two_kinds:
            page = base
        page = min(page, END - npages)
        if file is not None:
            pgoff %= file.npages
            if self.tied and file.delta is not None:
                pgoff = base - file.delta
        if flags & KVM_MEM_LOG_DIRTY_PAGES and not self.caps.dirty_logging:
            flags = 0
        if flags & KVM_MEM_READONLY and not self.caps.read_only_slots:
            flags = 0
        expect = [self._region_errno(slot_id, base, npages, page, file, pgoff, flags)]
        if flags and self.host.ops.has("memslot_prepare"):
            expect.append(errno.EPERM)  # the vendor may have its own mind about flags
        old = self.slots.get(slot_id)
        with self.call("memslot", *expect) as step:
            self.fd.set_user_memory_region2(
                slot_id, flags | (KVM_MEM_GUEST_MEMFD if file is not None else 0), base * PAGE_BYTES,
                npages * PAGE_BYTES, self.area + page * PAGE_BYTES, file.fds[0] if file is not None else -1,
                pgoff * PAGE_BYTES,
            )  # fmt: skip
        if step.error is not None:
            return
        new = Slot(slot_id, base, npages, page, flags, file, pgoff, file is not None and bool(file.flags & 1))
        if old is not None:
            # The bitmap moves with the slot.
            new.written = {gfn + base - old.base for gfn in old.written}
            new.touched = {gfn + base - old.base for gfn in old.touched}
            if flags & ~old.flags & KVM_MEM_LOG_DIRTY_PAGES:
                new.written, new.touched = set(), set()
        if file is not None and (file.delta is None or not file.inode.allocated):
            file.delta = base - pgoff
        self.slots[slot_id] = new

    def _region_errno(
        self, slot_id: int, base: int, npages: int, page: int, file: File | None, pgoff: int, flags: int
    ) -> int:
        """What the call must answer, in KVM's order."""
        old = self.slots.get(slot_id)
        if flags & ~3 or (file is not None and flags):
            return errno.EINVAL
        if file is not None and pgoff < 0 <= pgoff + npages:
            return errno.EINVAL  # offset + size wraps
        if old is not None:
            # A slot that was created with a file keeps the flag, also when the file is gone.
            if file is not None or old.id in self.gmem_slots or (old.npages, old.page) != (npages, page):
                return errno.EINVAL
            if (old.flags ^ flags) & KVM_MEM_READONLY:
                return errno.EINVAL
            if (old.base, old.flags) == (base, flags):
                return 0
        moved = old is None or old.base != base
        clash = [s for s in self.slots.values() if s is not old and s.base < base + npages and base < s.base + s.npages]
        if moved and clash:
            return errno.EEXIST
        if file is not None:
            if pgoff < 0 or pgoff + npages > file.npages:
                return errno.EINVAL
            bound = [s for s in self.slots.values() if s.file is file]
            if any(s.pgoff < pgoff + npages and pgoff < s.pgoff + s.npages for s in bound):
                return errno.EINVAL if self.host.kernel == "6.18" else errno.EEXIST
        if old is not None and moved and self.caps.memslots_fixed_after_run and self.ran:
            return errno.EPERM
        return 0

    @property
    def gmem_slots(self) -> set[int]:
        """Ids of the slots that were created with a file."""
        return {slot.id for slot in self.vm.slots if slot.has_gmem}

    @precondition(lambda self: self.steps > 8)
    @rule(slot_id=st.integers(0, SLOTS - 1), sure=seldom)
    def delete_slot(self, slot_id: int, sure: bool) -> None:
        """KVM_SET_USER_MEMORY_REGION2 with size 0."""
        slot = self.slots.get(slot_id)
        if not sure and slot is not None:
            return
        fixed = self.caps.memslots_fixed_after_run and self.ran
        with self.call("memslot", errno.EINVAL if slot is None else errno.EPERM if fixed else 0) as step:
            self.fd.set_user_memory_region2(slot_id, 0, 0, 0)
        if slot is not None and not (step.error is not None and step.error.errno in (errno.EPERM, errno.EIO)):
            self._lost_with(slot)
            if step.error is None:
                del self.slots[slot_id]

    def _lost_with(self, slot: Slot) -> None:
        if slot.file is not None:
            self.zap(slot.file, [g - slot.base + slot.pgoff for g in slot.gfns if g in self.private])

    @precondition(lambda self: self.steps > 8)
    @rule(slot_id=st.integers(0, SLOTS - 1), base=bases)
    def move_slot(self, slot_id: int, base: int) -> None:
        """The same slot at another gpa."""
        if (slot := self.slots.get(slot_id)) is not None and base + slot.npages <= END and not self.in_place:
            skew = slot.page - base
            self.create_slot(slot_id, base, slot.npages, skew % END, False, 0, slot.flags)

    @rule(slot_id=st.integers(0, SLOTS - 1))
    def toggle_dirty_log(self, slot_id: int) -> None:
        """KVM_MEM_LOG_DIRTY_PAGES on or off."""
        slot = self.slots.get(slot_id)
        if slot is not None and self.caps.dirty_logging:
            flags = slot.flags ^ KVM_MEM_LOG_DIRTY_PAGES
            self.create_slot(slot_id, slot.base, slot.npages, (slot.page - slot.base) % END, False, 0, flags)

    @rule(slot_id=st.integers(0, SLOTS))
    def get_dirty_log(self, slot_id: int) -> None:
        """KVM_GET_DIRTY_LOG: all that was written is in it, and nothing that nobody faulted in."""
        slot = self.slots.get(slot_id)
        logged = slot is not None and slot.flags & KVM_MEM_LOG_DIRTY_PAGES
        with self.call("get_dirty_log", 0 if logged else errno.ENOENT) as step:
            step.result = self.fd.get_dirty_log(slot_id)
        if step.error is None:
            assert slot is not None
            dirty = {slot.base + int(i) for i in np.flatnonzero(step.result)}
            assert slot.written <= dirty, f"written and not logged: {sorted(slot.written - dirty)[:4]}"
            assert dirty <= slot.touched, f"logged and not touched: {sorted(dirty - slot.touched)[:4]}"
            slot.written, slot.touched = set(), set()

    # ---- attributes ---------------------------------------------------------------------------------------------

    @precondition(lambda self: self.caps.private_by_attribute)
    @rule(run=runs, private=st.booleans())
    def set_attributes(self, run: range, private: bool) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES, whatever the guest thinks of it."""
        value = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        expect = 0 if self.caps.private_by_attribute else errno.ENOTTY
        with self.call("set_memory_attributes", expect, start=run.start, end=run.stop, value=value) as step:
            self.fd.set_memory_attributes(run.start * PAGE_BYTES, len(run) * PAGE_BYTES, value)
        if step.error is None:
            self._attributes_are(run, private)

    def _attributes_are(self, gfns: Iterable[int], private: bool) -> None:
        for gfn in gfns:
            slot = self.slot_at(gfn)
            if private:
                self.private.add(gfn)
            elif gfn in self.private:
                self.private.remove(gfn)
                if slot is not None and slot.file is not None:
                    self.zap(slot.file, [gfn - slot.base + slot.pgoff])

    # ---- regions that the VMM registers -------------------------------------------------------------------------

    @precondition(lambda self: self.host.ops.has("register_region"))
    @rule(run=runs)
    def register_region(self, run: range) -> None:
        """KVM_MEMORY_ENCRYPT_REG_REGION of a part of the VMM's memory, also of one that is registered already."""
        hva, size = self.area + run.start * PAGE_BYTES, len(run) * PAGE_BYTES
        with self.call("register_region"):
            self.fd.register_region(hva, size)
        if not self.vm.dead:
            self.regions.append((hva, size))

    @precondition(lambda self: self.regions)
    @rule(pick=st.integers(0, 5))
    def unregister_region(self, pick: int) -> None:
        """KVM_MEMORY_ENCRYPT_UNREG_REGION of exactly what was registered: the host may move it again."""
        hva, size = self.regions[pick % len(self.regions)]
        with self.call("unregister_region"):
            self.fd.unregister_region(hva, size)
        if not self.vm.dead:
            self.regions.remove((hva, size))

    # ---- the host's memory management ---------------------------------------------------------------------------

    @rule(run=runs)
    def madvise(self, run: range) -> None:
        """The VMM gives pages of its own memory back."""
        with self.call("madvise"):
            self.process.madvise_dontneed(self.area + run.start * PAGE_BYTES, len(run) * PAGE_BYTES)
        for slot in self.slots.values():
            if not self.caps.honours_notifiers:
                for gfn in slot.gfns:
                    page = gfn - slot.base + slot.page
                    if page in run and gfn not in self.detached and self.mapped(gfn, False):
                        self.detached[gfn] = self.vmm.get(page, (0, self.kind_of(gfn)))
        for page in run:
            self.vmm.pop(page, None)

    @rule(run=runs)
    def migrate(self, run: range) -> None:
        """The host moves pages to other frames: what is pinned stays, what is plain arrives."""
        words = self.mapping.words[run.start : run.stop]
        frames = (words >> np.uint32(5)).astype(np.int64)
        pins = self.host.frames.pins
        # A pin on the head of a large page holds all of it.
        held = (pins[frames] != 0) | ((words & np.uint32(1) != 0) & (pins[frames & -512] != 0))
        with self.call("migrate"):
            self.process.migrate_pages(self.area + run.start * PAGE_BYTES, len(run) * PAGE_BYTES)
        for page, pinned in zip(run, held.tolist(), strict=True):
            if page in self.vmm and self.vmm[page][1] and self.caps.encrypts and not pinned:
                self.vmm[page] = None, True

    @rule(run=runs, write=st.booleans())
    def touch_memory(self, run: range, write: bool) -> None:
        """The VMM reads or writes its own memory: what is private there it must not see."""
        hva = self.area + run.start * PAGE_BYTES
        protected = [page for page in run if self.in_place and self.vmm.get(page, (0, False))[1]]
        if self.in_place:
            for page in protected[:8]:
                self._must_not_see(page)
            return
        with self.call("mapping") as step:
            if write:
                stamp = self.next_stamp()
                step.result = self.process.write(hva, stamp, len(run))
            else:
                step.result, seen = self.process.read(hva, len(run))
        assert step.result is HostVerdict.OK, step.result
        if write:
            self.vmm.update((page, (stamp, False)) for page in run)
        else:
            self._same(seen, [(page, self.vmm.get(page, (0, False))[0]) for page in run])

    def _must_not_see(self, page: int) -> None:
        stamp = self.vmm[page][0]
        with self.call("mapping") as step:
            step.result = self.process.read(self.area + page * PAGE_BYTES, 1)
        verdict, seen = step.result
        assert stamp in (None, 0) or int(seen[0]) != stamp, f"the host reads private page {page:#x} ({verdict.name})"

    # ---- the guest ----------------------------------------------------------------------------------------------

    @rule(gfns=pages, vcpu=st.integers(0, 1), private=st.booleans())
    def write(self, gfns: list[int], vcpu: int, private: bool) -> None:
        """The guest writes pages that it has, of one kind."""
        self._use(gfns, vcpu, private, True)

    @rule(gfns=pages, vcpu=st.integers(0, 1), private=st.booleans())
    def read(self, gfns: list[int], vcpu: int, private: bool) -> None:
        """The guest reads pages that it has, of one kind."""
        self._use(gfns, vcpu, private, False)

    def _use(self, gfns: list[int], vcpu: int, private: bool, write: bool) -> None:
        for kind in (private, not private):
            fit = [g for g in gfns if self.kind_of(g) == kind and self.trouble(g, kind, write) is None]
            if fit:
                self.touch(fit, write, False, vcpu)
                return

    @rule(gfns=pages, write=st.booleans(), wrong=seldom, vcpu=st.integers(0, 1))
    def touch(self, gfns: list[int], write: bool, wrong: bool, vcpu: int) -> None:
        """The guest touches pages of one kind, or (wrong) takes them for the other kind, or has no such pages."""
        private = self.kind_of(gfns[0])
        if not self.caps.private_by_attribute:
            gfns = [gfn for gfn in gfns if self.kind_of(gfn) == private]
        elif wrong:
            private = not private
        if self.caps.private_by_attribute and not self.caps.has_mirror:
            # Where one root serves both, nothing tells the kinds apart once a page is mapped.
            gfns = [gfn for gfn in gfns if (gfn in self.private) == private or not self.mapped(gfn, private)]
        if not gfns:
            return
        if private and self.caps.needs_accept:
            if write:
                for block in sorted({gfn // 512 for gfn in gfns}):
                    self.accept_block(block, vcpu)
            new = [gfn for gfn in gfns if self.trouble(gfn, True, True) is None and not self.accepted(gfn)]
            if new and not self._accept(new, vcpu):
                return
        self._access(gfns, private, write, vcpu)

    def _access(self, gfns: list[int], private: bool, write: bool, vcpu: int) -> None:
        n = next((i for i, gfn in enumerate(gfns) if self.trouble(gfn, private, write)), len(gfns))
        stamps = np.array([self.next_stamp() for _ in gfns], np.uint32)
        action = Touch(_sel(gfns), write=write, private=private, stamps=stamps)
        with self.call("write" if write else "read", gfns=_sel(gfns), private=private) as step:
            step.result = self.vcpus[vcpu].run(action)
        if step.error is not None:
            return
        self.ran = True
        leave: ExitReason | None = step.result
        fatal = FATAL.get(self.injector.fired)
        if fatal is not None and isinstance(leave, MemoryFault | Shutdown) and leave.errno == fatal:
            assert action.done <= n
        else:
            self._left(leave, gfns, n, private, write)
            assert action.done == n, f"{action.done} pages are done of the {n} before the exit"
        for i, gfn in enumerate(gfns[: action.done]):
            place = self.place(gfn, private)
            slot = self.slot_at(gfn)
            assert place is not None and slot is not None
            slot.touched.add(gfn)
            if write:
                slot.written.add(gfn)
                place[0][place[1]] = int(stamps[i]), private
        for gfn in gfns[action.done :]:
            if (slot := self.slot_at(gfn)) is not None:
                slot.touched.add(gfn)  # a batch may fault in pages behind the one that exits
        if not write and action.seen is not None:
            self._same(action.seen, [(gfn, self.expected(gfn, private)) for gfn in gfns[: action.done]])

    def _left(self, leave: ExitReason | None, gfns: list[int], n: int, private: bool, write: bool) -> None:
        """KVM_RUN came back: was it for what the model says?"""
        if n == len(gfns):
            assert leave is None, leave
            return
        trouble = self.trouble(gfns[n], private, write)
        assert trouble is not None
        how, error = trouble
        if how == "mmio":
            assert leave == Mmio(gfns[n] * PAGE_BYTES, write), leave
        else:
            flags = 8 if private and self.caps.private_by_attribute else 0
            assert leave == MemoryFault(gfns[n] * PAGE_BYTES, flags, errno=error), leave

    def _same(self, seen: Any, expected: list[tuple[int, int | None]]) -> None:
        """What was read is what the model says."""
        for (page, want), got in zip(expected, seen.tolist(), strict=False):
            if want is not None and got != want:
                raise InvariantViolation(
                    "a page reads wrong", number=18 if want == 0 else BLAME.get(self.last, 0), gfn=page,
                    states={"reads": _say(got), "was": _say(want)}, events=self.host.last_events(),
                )

    def _accept(self, gfns: list[int], vcpu: int, level: int = 1) -> bool:
        """The guest accepts pages that can be accepted. Returns whether it did."""
        heads = gfns if level == 1 else gfns[::512]
        action = Accept(_sel(heads, 512 if level == PG_LEVEL_2M else 1), level=level)
        with self.call("accept") as step:
            step.result = self.vcpus[vcpu].run(action)
        if step.error is not None:
            return False
        self.ran = True
        left: set[int] = set()
        if step.result is not None:
            assert self.injector.fired in FATAL, step.result
            size = 512 if level == PG_LEVEL_2M else 1
            left = {gfn + i for gfn in array_of(action.gfns).tolist() for i in range(size)}
        for gfn in gfns:
            slot = self.slot_at(gfn)
            assert slot is not None and slot.file is not None
            if gfn not in left:
                index = gfn - slot.base + slot.pgoff
                slot.file.accepted.add(index)
                slot.file.content[index] = (0 if self.caps.fresh_is_zero else None), True
        return step.result is None

    @precondition(lambda self: self.caps.needs_accept)
    @rule(block=st.integers(0, END // 512 - 1), vcpu=st.integers(0, 1))
    def accept_block(self, block: int, vcpu: int) -> None:
        """The guest accepts 2 MiB at once, if all of it can be accepted."""
        gfns = list(range(block * 512, block * 512 + 512))
        if all(self.trouble(gfn, True, True) is None and not self.accepted(gfn) for gfn in gfns):
            self._accept(gfns, vcpu, PG_LEVEL_2M)

    @precondition(lambda self: self.caps.needs_accept and not self.caps.unaccepted_is_fatal)
    @rule(gfn=st.integers(0, END - 1))
    def touch_unaccepted(self, gfn: int) -> None:
        """The guest touches a page before it accepts it, and gets an exception."""
        if self.trouble(gfn, True, True) is None and not self.accepted(gfn):
            with self.call("read", gfns=_sel([gfn]), private=True) as step:
                step.result = self.vcpus[0].run(Touch(_sel([gfn])))
            if step.error is None and self.injector.fired not in FATAL:
                assert isinstance(step.result, GuestException), step.result

    @precondition(lambda self: self.two_kinds)
    @rule(gfns=pages, vcpu=st.integers(0, 1), private=st.booleans())
    def convert(self, gfns: list[int], vcpu: int, private: bool) -> None:
        """The guest converts pages to the other kind, and the VMM does what it asks."""
        if self.vm.dead:
            return
        self.aim("")
        gfns = [g for g in gfns if self.kind_of(g) != private and self.trouble(g, not private, False) is None]
        gfns = [g for g in gfns if (slot := self.slot_at(g)) is not None and (self.in_place or slot.file is not None)]
        if self.caps.needs_accept and not private:
            gfns = [gfn for gfn in gfns if self.accepted(gfn)]
        if not gfns:
            return
        action = Convert(_sel(gfns), private=private)
        with self.call("convert") as step:
            while isinstance(leave := self.vcpus[vcpu].run(action), MapGpaRange):
                if self.caps.private_by_attribute:
                    for low, high in _stretches(array_of(leave.gfns).tolist()):
                        value = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
                        self.fd.set_memory_attributes(low * PAGE_BYTES, (high - low) * PAGE_BYTES, value)
            step.result = leave
        assert step.result is None, step.result
        self.ran = True
        if self.in_place:
            for gfn in gfns:
                self.guest_shared.discard(gfn) if private else self.guest_shared.add(gfn)
                place = self.place(gfn, private)
                assert place is not None
                store, key = place
                if key in store:
                    store[key] = (store[key][0] if self.caps.conversion_keeps_content else None), private
                elif not self.caps.conversion_keeps_content:
                    store[key] = None, private
            return
        self._attributes_are(gfns, private)
        if self.caps.needs_accept:
            for gfn in gfns:
                slot = self.slot_at(gfn)
                assert slot is not None and slot.file is not None
                index = gfn - slot.base + slot.pgoff
                slot.file.accepted.discard(index)
                if not self.caps.conversion_keeps_content:
                    slot.file.content[index] = None, True

    @rule(run=runs, vcpu=st.integers(0, 1))
    def prefault(self, run: range, vcpu: int) -> None:
        """KVM_PRE_FAULT_MEMORY; a second call finds all of it there."""
        troubles = [self.trouble(gfn, gfn in self.private, False) for gfn in run]
        n = next((i for i, trouble in enumerate(troubles) if trouble), len(run))
        expect = [0]
        if n == 0:
            how, error = troubles[0] or ("", 0)
            expect = [errno.ENOENT if how == "mmio" else error]
        if not (self.caps.prefault and self.vm.pre_fault_allowed):
            expect, n = [errno.EOPNOTSUPP], 0
        if n and self.injector.hook in FATAL:
            expect += [FATAL[self.injector.hook]]
        for _ in range(2):
            gpa, size = run.start * PAGE_BYTES, len(run) * PAGE_BYTES
            with self.call("prefault", *expect, start=run.start, end=run.stop) as step:
                step.result = self.vcpus[vcpu].pre_fault_memory(gpa, size)
            if step.error is not None:
                return
            if self.injector.fired not in FATAL:
                assert step.result == (gpa + n * PAGE_BYTES, size - n * PAGE_BYTES), (step.result, n)
            for gfn in run:
                if (slot := self.slot_at(gfn)) is not None:
                    slot.touched.add(gfn)

    # ---- what must not work, and the end ------------------------------------------------------------------------

    @rule(which=st.integers(0, 11))
    def misuse(self, which: int) -> None:
        """Calls that are wrong in themselves."""
        page = PAGE_BYTES
        fd = next((file.fds[0] for file in self.files if file.fds), -1)
        attributes = self.caps.private_by_attribute
        calls: list[tuple[str, int, Callable[[], object]]] = [
            ("create_vcpu", errno.EEXIST, lambda: self.fd.create_vcpu(0)),
            ("memslot", errno.EINVAL, lambda: self.fd.set_user_memory_region2(32764, 0, 0, page, self.area)),
            ("memslot", errno.EINVAL, lambda: self.fd.set_user_memory_region2(9, 0, 1, page, self.area)),
            ("memslot", errno.EINVAL, lambda: self.fd.set_user_memory_region2(9, 0, 0, 0)),
            ("memslot", errno.EINVAL, lambda: self.fd.set_user_memory_region2(9, 0, 0, page, 1 << 62)),
            ("prefault", errno.EINVAL, lambda: self.vcpus[0].pre_fault_memory(0, 0)),
            (
                "set_memory_attributes", errno.EINVAL if attributes else errno.ENOTTY,
                lambda: self.fd.set_memory_attributes(0, 1, 8),
            ),
            (
                "set_memory_attributes", errno.EINVAL if attributes else errno.ENOTTY,
                lambda: self.fd.set_memory_attributes(0, page, 4),
            ),
            ("create_guest_memfd", errno.EINVAL, lambda: self.fd.create_guest_memfd(0)),
            ("fallocate", errno.EOPNOTSUPP, lambda: self.process.fallocate(fd, 0, 0, page)),
            ("fallocate", errno.EINVAL, lambda: self.process.fallocate(fd, PUNCH, 1, page)),
            ("close", errno.EBADF, lambda: self.process.close(99999)),
        ]  # fmt: skip
        name, error, call = calls[which]
        if name == "fallocate" and fd < 0:
            error = errno.EBADF
        more = {"start": 0, "end": 1, "value": 8} if name in ("set_memory_attributes", "prefault") else {}
        if self.injector.hook != "memslot_prepare":
            with self.call(name, error, **more):
                call()

    @precondition(lambda self: self.steps > 20)
    @rule(sure=seldom)
    def kill(self, sure: bool) -> None:
        """KVM_BUG_ON: from here on every ioctl gives -EIO, and all memory still comes back."""
        if sure:
            with self.call("bug"):
                self.vm.bug("told to")

    def teardown(self) -> None:
        """Everything that the guest wrote is read back; then the process ends and nothing is left."""
        if sys.exc_info()[0] is not None:
            return  # a step failed: what it says is what matters
        self.aim("")
        if not self.vm.dead:
            for private in (False, True):
                known = [
                    gfn for slot in self.slots.values() for gfn in slot.gfns
                    if self.kind_of(gfn) == private and self.trouble(gfn, private, False) is None
                    and (not (private and self.caps.needs_accept) or self.accepted(gfn))
                ]
                if known:
                    self._access(sorted(known), private, False, 0)
        self.process.exit()
        self.checker.check_idle()


DEAD_EIO = frozenset({
    "create_vcpu", "create_guest_memfd", "memslot", "set_memory_attributes", "prefault", "write", "read", "accept",
    "convert", "get_dirty_log", "register_region", "unregister_region",
})  # fmt: skip
"""The calls above that are ioctls of a VM or a vCPU."""


def _sel(gfns: list[int], step: int = 1) -> Sel:
    """Sorted gfns as a selector; heads of large pages as a run with a step, where they are one."""
    if step > 1:
        return slice(gfns[0], gfns[-1] + step, step)
    return as_sel(np.array(gfns, np.int64))


def _stretches(gfns: list[int]) -> Iterator[tuple[int, int]]:
    """Contiguous ranges [low, high) of sorted gfns."""
    low = gfns[0]
    for at, following in zip(gfns, [*gfns[1:], -1], strict=True):
        if following != at + 1:
            yield low, at + 1
            low = following


def _say(stamp: int) -> str:
    return "noise" if stamp == SCRAMBLED else f"{stamp:#x}"


def uapi_machine(
    backend: str | Backend, *, backing: str = "4k", kernel: str = "6.18", options: dict[str, str] | None = None
) -> type[UapiMachine]:
    """The state machine for a backend, by name or as it is. backing, kernel, options: as for `Host`.

    Run it with `hypothesis.stateful.run_state_machine_as_test`, or as its `TestCase`.
    """
    chosen = load_backend(backend) if isinstance(backend, str) else backend
    members = {
        "backend": chosen,
        "host_options": {"backing": backing, "kernel": kernel, "options": options},
        "__doc__": f"The UAPI of {chosen.name} ({backing}, {kernel}).",
    }
    return type(f"UapiMachine_{chosen.name.replace('-', '_')}_{backing}", (UapiMachine,), members)


def run_machine(
    backend: str | Backend, *, backing: str = "4k", options: dict[str, str] | None = None, examples: int = 12,
    steps: int = 25, script: list[str] | None = None, shrink: bool = True,
) -> None:  # fmt: skip
    """Run the machine for so many examples of so many steps. What fails is shrunk (if wanted), and raised; script: then
    holds the calls that lead there, as lines for `cvm uapi` (`cvmcore.uapiscript`)."""
    made = uapi_machine(backend, backing=backing, options=options)
    chosen = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck), print_blob=False,
        phases=[phase for phase in Phase if shrink or phase not in (Phase.shrink, Phase.explain)],
    )  # fmt: skip
    try:
        run_state_machine_as_test(made, settings=chosen)
    except Exception:
        if script is not None:
            script += made.last_script
        raise


__all__ = ["UapiMachine", "run_machine", "uapi_machine"]
