"""A hypothesis state machine over the whole UAPI of one small VM, and a model beside it.

`uapi_machine(backend)` gives a `RuleBasedStateMachine`: hypothesis makes up sequences of what a VMM, a guest and the
host's memory management may do, in any order. The model knows what stands in every page (arrays, one element per page)
and which errno or exit each call must give; it asks a VM type's capabilities what is lost and when, nothing else.
After every action the content of all pages that the model knows is compared with what stands in memory, and all
invariants are looked at (`cvmcore.testing.invariants`).

What may be done are the methods marked `@action`. Hypothesis is asked for little, since every choice that it draws
costs as much as a call of the model: one number is one action with its arguments, and one rule is `BURST` of them.

Needs hypothesis (`pip install cvmcore[test]`).
"""

from __future__ import annotations

import errno
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, TypeVar

import attrs
import numpy as np
import numpy.typing as npt
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from cvmcore.backend import Backend
from cvmcore.cost import Profile
from cvmcore.errors import InvariantViolation
from cvmcore.host import Host
from cvmcore.mem.gmem import EHWPOISON, GmemInode
from cvmcore.mem.tdp import FRAME_SHIFT, PRESENT, TABLE
from cvmcore.memory import SCRAMBLED
from cvmcore.observers import FaultInjector, Log
from cvmcore.pages import IntArray, array_of, as_sel, leading
from cvmcore.plugins import load_backend
from cvmcore.runner import load_profile_for
from cvmcore.sched import Lockdep
from cvmcore.testing.faults import ANSWERS
from cvmcore.testing.invariants import Checker, Step
from cvmcore.testing.player import stretches
from cvmcore.testing.recorder import Recorder
from cvmcore.testing.state import Bools
from cvmcore.types import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    PAGE_BYTES,
    PG_LEVEL_1G,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    ExitReason,
    GuestException,
    HostVerdict,
    MapGpaRange,
    MemoryFault,
    Mmio,
    Shutdown,
    Stopped,
    order_of,
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

UNKNOWN, ABSENT = -1, -2
"""Instead of a stamp: nobody can say what stands in the page; nobody wrote it yet."""
MMIO = -1
"""Instead of an errno: the access leaves as MMIO."""

PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
BLAME = {"punch": 19, "convert": 20, "set_memory_attributes": 20, "memslot": 22, "close": 28}
"""The invariant that a lost page breaks, by the call that lost it; 18 where a page is read that nobody wrote."""

INJECTED = (
    "gmem_prepare", "link_private_spt", "memslot_prepare", "pin_pfn", "set_private_spte", "split_private_spt", "topup",
)  # fmt: skip
"""Hooks that are made to fail, as `faults.ANSWERS` says."""
FATAL = {"topup": errno.ENOMEM, "gmem_prepare": errno.EIO}
"""The errno that a fault ends with where these hooks fail; after the others it is tried again."""

SPLITS_WHERE_IT_CAN = ("write", "read", "accept", "prefault", "split")
"""Calls that do not fail where a page cannot be split: faults are tried again, and dirty logging leaves it large."""

BURST = 8
"""Actions in one rule, at most."""
PICKS = 1 << 24
"""Numbers that an action is picked with: hypothesis draws all of so many alike."""
SWARMS = 64
"""Choices of actions that an example makes do with; the first quarter has them all."""

EDGES = (0, 1, 100, 255, 256, 500, 511, 512, 513, 700, 1000, 1023, 1024, 1100, 1535, 1536, 2000, 2047)
RUNS = [range(start, min(END, start + n)) for n in (1, 1, 2, 3, 7, 13, 40, 64, 300, 512, 600) for start in EDGES]
_chance = random.Random(1)
SCATTERED = [np.array(sorted(_chance.sample(range(END), 1 + i % 6))) for i in range(len(RUNS))]
PAGES: list[IntArray] = [np.arange(run.start, run.stop) for run in RUNS] + SCATTERED
SMALLER = [pages for i, pages in enumerate(PAGES) if len(pages) < 300 or i % 3 == 0]
"""Fewer large ones: some vendors' guests convert page by page, with a call for each."""
YES_NO = (False, True)
BASES = (0, 256, 512, 700, 1024, 1100, 1536)
SKEWS = (0, 0, 256, 3)
SIZES = (1, 64, 256, 512, 700, 1024)

F = TypeVar("F", bound="Callable[..., None]")


@attrs.frozen(eq=False)
class Action:
    """A method that the machine may call: `when` says whether this VM has it, `choices` the values of each argument,
    simplest first."""

    name: str
    when: Callable[[Any], bool]
    choices: dict[str, Sequence[Any]]
    weight: int = 4
    """How often it comes up, beside others."""

    def arguments(self, number: int) -> dict[str, Any]:
        """The arguments that a number stands for: 0 for the first of each."""
        found = {}
        for name, values in self.choices.items():
            number, at = divmod(number, len(values))
            found[name] = values[at]
        return found


def action(
    when: Callable[[Any], bool] = lambda machine: True, /, weight: int = 4, **choices: Sequence[Any]
) -> Callable[[F], F]:
    """Marks a method of a `UapiMachine` as an `Action`."""

    def mark(method: F) -> F:
        setattr(method, "action", Action(method.__name__, when, choices, weight))  # noqa: B010
        return method

    return mark


@attrs.frozen
class Said:
    """An action with its arguments, as a failure shows it."""

    name: str
    arguments: dict[str, Any]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        values = {k: as_sel(v) if isinstance(v, np.ndarray) else v for k, v in self.arguments.items()}
        printer.text(f"    {self.name}({', '.join(f'{name}={value}' for name, value in values.items())})")


class Content:
    """What stands in pages, one element each: the stamp (int64, or UNKNOWN, or ABSENT) and whether it was written as
    private (bool)."""

    def __init__(self, npages: int) -> None:
        self.stamp = np.full(npages, ABSENT)
        self.private = np.zeros(npages, bool)

    def put(self, pages: Any, stamps: Any, private: Any) -> None:
        """So it was written."""
        self.stamp[pages] = stamps
        self.private[pages] = private

    def drop(self, pages: Any) -> None:
        """It is as if nobody had written it."""
        self.stamp[pages] = ABSENT


@attrs.define(eq=False)
class File:
    """The model of a guest_memfd."""

    inode: GmemInode
    npages: int
    flags: int
    fds: list[int]
    hva: int = 0
    """Where the VMM has mapped it; 0: nowhere."""
    content: Content = attrs.field(init=False)
    accepted: Bools = attrs.field(init=False)
    poisoned: Bools = attrs.field(init=False)
    delta: int | None = None
    """gfn minus index of its first binding: where a page has an owner who knows its gfn, it stays at it."""

    def __attrs_post_init__(self) -> None:
        self.content = Content(self.npages)
        self.accepted, self.poisoned = np.zeros(self.npages, bool), np.zeros(self.npages, bool)

    def lose(self, pages: Any) -> None:
        """Nothing stands in these pages any more."""
        self.content.drop(pages)
        self.accepted[pages] = False

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
    written: Bools = attrs.field(init=False)
    """Its pages that the guest wrote since the dirty log was last read."""
    touched: Bools = attrs.field(init=False)
    """Its pages that anybody faulted in since then."""

    def __attrs_post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The dirty log begins anew."""
        self.written, self.touched = np.zeros(self.npages, bool), np.zeros(self.npages, bool)

    @property
    def gfns(self) -> slice:
        return slice(self.base, self.base + self.npages)


class OneShot(FaultInjector):
    """A fault injector that is armed for the next call of a hook."""

    def __init__(self) -> None:
        super().__init__("", 1, None)

    def aim(self, hook: str) -> None:
        self.hook, self.seen, self.answer = hook, 0, ANSWERS[hook]() if hook else None

    @property
    def fired(self) -> str:
        return self.hook if self.seen else ""


@cache
def _prices(backend: Backend) -> Profile:
    return load_profile_for(backend, None)


@cache
def _actions_of(machine: type) -> list[Action]:
    """The actions of a class, by name."""
    members = [getattr(machine, name) for name in dir(machine)]
    return [member.action for member in members if isinstance(getattr(member, "action", None), Action)]


class UapiMachine(RuleBasedStateMachine):
    """The actions; `uapi_machine` binds them to a backend."""

    backend: ClassVar[Backend]
    host_options: ClassVar[dict[str, Any]]
    last_script: ClassVar[list[str]] = []
    """What the last example did, as lines for `cvm uapi`."""

    def __init__(self) -> None:
        super().__init__()
        self.injector = OneShot()
        self.host = Host(
            self.backend, _prices(self.backend), nr_frames=NR_FRAMES, observers=[Log(8), self.injector],
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
        self.vmm = Content(END)
        """The VMM's memory by page."""
        self.detached = Content(END)
        """By gfn: pages that the guest keeps, though the VMM's memory has another one there by now."""
        self.regions: list[tuple[int, int]] = []
        """(hva, size) that the VMM has registered."""
        self.files: list[File] = []
        self.slots: dict[int, Slot] = {}
        self.owner = np.full(END, -1)
        """Id of the slot at each gfn, -1 where there is none."""
        self.private = np.zeros(END, bool)
        """gfns whose attribute is private."""
        self.guest_shared = np.zeros(END, bool)
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
        mine = [one for one in _actions_of(type(self)) if one.when(self)]
        self.actions = [one for one in mine for _ in range(one.weight)]
        self.swarm = self.actions

    # ---- what hypothesis draws ------------------------------------------------------------------------------------

    @initialize(number=st.integers(0, SWARMS - 1))
    def choose(self, number: int) -> None:
        """Some examples have few kinds of actions, and so more of each: some bugs need that."""
        chance = random.Random(number)
        names = {one.name for one in self.actions if chance.random() < 0.5}
        few = [one for one in self.actions if one.name in names]
        self.swarm = few if few and number >= SWARMS // 4 else self.actions

    @rule(picks=st.tuples(*[st.integers(0, PICKS - 1)] * BURST))
    def burst(self, picks: tuple[int, ...]) -> None:
        """Some actions, one after the other; 0 is to do nothing."""
        for pick in filter(None, picks):
            number, which = divmod(pick - 1, len(self.actions))
            one = self.actions[which]
            if one not in self.swarm:
                one = self.swarm[which % len(self.swarm)]
            arguments = one.arguments(number)
            note(Said(one.name, arguments))
            getattr(self, one.name)(**arguments)
            self.content_is_intact()

    # ---- the model ----------------------------------------------------------------------------------------------

    def from_gmem(self, slot: Slot, private: bool) -> bool:
        return slot.gmem_only or (private and self.caps.private_by_attribute)

    def at_slots(self, gfns: IntArray) -> Iterator[tuple[Slot, IntArray]]:
        """The slots that gfns lie in, each with the positions of those in it; in their order: two may show one page."""
        owner = self.owner[gfns]
        for slot in sorted(self.slots.values(), key=lambda slot: slot.base):
            at = np.flatnonzero(owner == slot.id)
            if len(at):
                yield slot, at

    def places(self, gfns: IntArray, private: bool) -> Iterator[tuple[Content, IntArray, IntArray]]:
        """Where the content of gfns is kept for this kind of access: store, positions of gfns, pages of the store."""
        for slot, at in self.at_slots(gfns):
            pages = gfns[at] - slot.base
            if self.from_gmem(slot, private):
                if slot.file is not None:
                    yield slot.file.content, at, pages + slot.pgoff
                continue
            away = self.detached.stamp[gfns[at]] != ABSENT
            if np.count_nonzero(away):
                yield self.detached, at[away], gfns[at[away]]
                at, pages = at[~away], pages[~away]
            yield self.vmm, at, pages + slot.page

    def kinds_of(self, gfns: IntArray) -> Bools:
        """Whether the guest's own access to each gfn is private."""
        if self.caps.private_by_attribute:
            return self.private[gfns]
        return ~self.guest_shared[gfns] if self.two_kinds else np.zeros(len(gfns), bool)

    def expected(self, gfns: IntArray, private: bool) -> IntArray:
        """What a read of each gfn must find; UNKNOWN where nobody can say."""
        found = np.full(len(gfns), UNKNOWN)
        fresh = 0 if self.caps.fresh_is_zero or not private else UNKNOWN
        for store, at, pages in self.places(gfns, private):
            stamps = store.stamp[pages]
            if self.caps.encrypts:
                stamps[(store.private[pages] != private) & (stamps != ABSENT)] = UNKNOWN
            stamps[stamps == ABSENT] = fresh
            found[at] = stamps
        return found

    def frames_at(self, gfns: IntArray, private: bool) -> IntArray:
        """The frame that a leaf maps each gfn to, 0 where none does."""
        root = self.vm.tdp.root_for(private)
        found = np.zeros(len(gfns), np.int64)
        for level in (PG_LEVEL_4K, PG_LEVEL_2M, PG_LEVEL_1G):
            index = gfns >> order_of(level)
            inside = index < len(root.entries[level])
            words = np.where(inside, root.entries[level][np.where(inside, index, 0)], 0) if inside.any() else inside
            leaf = (words & np.uint32(PRESENT | TABLE)) == PRESENT
            found[leaf] = (words[leaf] >> np.uint32(FRAME_SHIFT)) + (gfns[leaf] & ((1 << order_of(level)) - 1))
        return found

    def trouble(self, gfns: IntArray, private: bool, write: bool) -> IntArray:
        """How a fault on each gfn ends: 0 where it can be resolved, else the errno of a memory fault, or MMIO."""
        by_attribute = self.caps.private_by_attribute
        owner = self.owner[gfns]
        found = np.where(owner < 0, errno.EFAULT if private and by_attribute else MMIO, 0)
        for slot in self.slots.values():
            if write and slot.flags & KVM_MEM_READONLY:
                found[owner == slot.id] = MMIO
            elif self.from_gmem(slot, private):
                mine = np.flatnonzero(owner == slot.id)
                if slot.file is None:
                    found[mine] = errno.EFAULT
                else:
                    found[mine[slot.file.poisoned[gfns[mine] - slot.base + slot.pgoff]]] = EHWPOISON
        if by_attribute:
            found[self.private[gfns] != private] = errno.EFAULT
        return found

    def accepted(self, gfns: IntArray) -> Bools:
        """Whether each gfn's page was accepted."""
        found = np.zeros(len(gfns), bool)
        for slot, at in self.at_slots(gfns):
            if slot.file is not None:
                found[at] = slot.file.accepted[gfns[at] - slot.base + slot.pgoff]
        return found

    def touched(self, gfns: IntArray, *, written: bool = False) -> None:
        """Somebody faulted these gfns in, or wrote them: a dirty log may, or must, have them."""
        for slot, at in self.at_slots(gfns):
            slot.touched[gfns[at] - slot.base] = True
            if written:
                slot.written[gfns[at] - slot.base] = True

    def zap(self, file: File, indexes: Any) -> None:
        """Private pages lose their mappings: where that is all that they are, their content."""
        if self.caps.zap_destroys_content:
            file.lose(indexes)

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

    @action(lambda self: any(map(self.host.ops.has, INJECTED)), pick=range(6))
    def inject(self, pick: int) -> None:
        """The next call of a hook fails."""
        hooks = [hook for hook in INJECTED if self.host.ops.has(hook)]
        self.aim(hooks[pick % len(hooks)])

    def aim(self, hook: str) -> None:
        """The next call of this hook fails; of none where it is empty."""
        if hook or (self.injector.hook and not self.injector.fired):
            answer = ANSWERS[hook]() if hook else None
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
            if np.count_nonzero(self.detached.stamp != ABSENT):
                self._compare(self.detached, self._detached_words())

    def _detached_words(self) -> npt.NDArray[np.uint32]:
        """The words of the frames that the tables have for the gfns that are detached."""
        words = np.zeros(END, np.uint32)
        for private in (False, True):
            gfns = np.flatnonzero((self.detached.stamp != ABSENT) & (self.detached.private == private))
            if len(gfns):
                words[gfns] = self.frames_at(gfns, private) << 5
        return words

    def _compare(self, content: Content, words: npt.NDArray[np.uint32]) -> None:
        for private in (False, True):
            index = np.flatnonzero((content.stamp >= 0) & (content.private == private))
            if not len(index):
                continue
            frames = (words[index] >> np.uint32(FRAME_SHIFT)).astype(np.int64)
            stamps = content.stamp[index]
            # A page of zeros that nobody touched has no frame yet.
            found = self.host.memory.read(frames, self.vm.key if private else 0) * (frames != 0)
            if np.count_nonzero(wrong := found != stamps):
                i = int(np.argmax(wrong))
                raise InvariantViolation(
                    f"a page lost its content in {self.last}", number=BLAME.get(self.last, 0), pfn=int(frames[i]),
                    states={"index": int(index[i]), "holds": _say(int(found[i])), "was": _say(int(stamps[i]))},
                    events=self.host.last_events(),
                )

    # ---- guest_memfd --------------------------------------------------------------------------------------------

    @action(lambda self: self.caps.gmem_backed, weight=2, npages=(256, 512, 700, 1024), flags=(0, 0, 1, 3, 4))
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

    @action(lambda self: self.caps.gmem_backed, weight=2, pick=range(4))
    def dup(self, pick: int) -> None:
        """dup(2): the file lives until its last descriptor is closed."""
        if (file := self._file(pick)) is not None and len(file.fds) < 3:
            with self.call("dup") as step:
                step.result = self.process.dup(file.fds[0])
            file.fds.append(step.result)

    @action(lambda self: self.caps.gmem_backed, weight=1, pick=range(4))
    def close(self, pick: int) -> None:
        """close(2): the last one releases the file, and its memory."""
        if self.steps <= 8 or (file := self._file(pick)) is None:
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

    @action(lambda self: self.caps.gmem_backed, pick=range(4), run=RUNS)
    def punch(self, pick: int, run: range) -> None:
        """fallocate(PUNCH_HOLE)."""
        if (file := self._file(pick)) is None:
            return
        n = max(0, min(len(run), file.npages - run.start))
        with self.call("punch", inode=file.inode, start=run.start, n=n) as step:
            self.process.fallocate(file.fds[0], PUNCH, run.start * PAGE_BYTES, len(run) * PAGE_BYTES)
        if step.error is None:
            file.lose(slice(run.start, run.start + n))
            file.poisoned[run.start : run.start + n] = False

    @action(lambda self: self.caps.gmem_backed, pick=range(4), run=RUNS)
    def allocate(self, pick: int, run: range) -> None:
        """fallocate without PUNCH_HOLE."""
        if (file := self._file(pick)) is not None:
            with self.call("fallocate", 0 if run.stop <= file.npages else errno.EINVAL):
                size = len(run) * PAGE_BYTES
                self.process.fallocate(file.fds[0], FALLOC_FL_KEEP_SIZE, run.start * PAGE_BYTES, size)

    @action(lambda self: self.caps.gmem_backed, weight=1, pick=range(4), index=EDGES)
    def memory_failure(self, pick: int, index: int) -> None:
        """The hardware loses a page of a guest_memfd."""
        if self.steps <= 8 or (file := self._file(pick)) is None or index >= file.npages:
            return
        was_there = bool(file.inode.words[index])
        with self.call("memory_failure") as step:
            self.process.memory_failure(file.fds[0], index * PAGE_BYTES)
        if step.error is None and was_there:
            file.lose(index)
            file.poisoned[index] = True

    @action(lambda self: self.caps.gmem_backed, pick=range(4), run=RUNS, write=YES_NO)
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
        pages = slice(run.start, run.stop)
        broken = np.count_nonzero(file.poisoned[pages])
        with self.call("mapping", 0 if shared and not broken else EHWPOISON if shared else errno.EFAULT) as step:
            if write:
                stamp = self.next_stamp()
                self.process.write(hva, stamp, len(run))
            else:
                step.result = self.process.read(hva, len(run))[1]
        if step.error is None and write:
            file.content.put(pages, stamp, False)
        elif step.error is None:
            self._same(step.result, run, _written(file.content.stamp[pages]))

    # ---- memslots -----------------------------------------------------------------------------------------------

    @action(base=BASES, npages=SIZES, skew=SKEWS, pick=range(4), with_file=YES_NO)
    def fill_gap(self, base: int, npages: int, skew: int, pick: int, with_file: bool) -> None:
        """A new slot where there is none, as a VMM would make it."""
        free = next((i for i in range(SLOTS) if i not in self.slots), None)
        if free is not None and self.owner[base] < 0:
            end = min((slot.base for slot in self.slots.values() if slot.base > base), default=END)
            self.create_slot(free, base, min(npages, end - base), skew, with_file, pick, 0)

    @action(
        slot_id=range(SLOTS), base=BASES, npages=SIZES, skew=SKEWS, with_file=YES_NO, pick=range(4),
        flags=(0, 0, 0, 1, 2, 8),
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
            if not flags & ~old.flags & KVM_MEM_LOG_DIRTY_PAGES:
                new.written, new.touched = old.written, old.touched  # the bitmap moves with the slot
            self.owner[old.gfns] = -1
        if file is not None and (file.delta is None or not file.inode.allocated):
            file.delta = base - pgoff
        self.slots[slot_id] = new
        self.owner[new.gfns] = slot_id

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

    @action(weight=1, slot_id=range(SLOTS))
    def delete_slot(self, slot_id: int) -> None:
        """KVM_SET_USER_MEMORY_REGION2 with size 0."""
        slot = self.slots.get(slot_id)
        if self.steps <= 8:
            return
        fixed = self.caps.memslots_fixed_after_run and self.ran
        with self.call("memslot", errno.EINVAL if slot is None else errno.EPERM if fixed else 0) as step:
            self.fd.set_user_memory_region2(slot_id, 0, 0, 0)
        if slot is not None and not (step.error is not None and step.error.errno in (errno.EPERM, errno.EIO)):
            self._lost_with(slot)
            if step.error is None:
                del self.slots[slot_id]
                self.owner[slot.gfns] = -1

    def _lost_with(self, slot: Slot) -> None:
        if slot.file is not None:
            self.zap(slot.file, np.flatnonzero(self.private[slot.gfns]) + slot.pgoff)

    @action(lambda self: not self.in_place, weight=2, slot_id=range(SLOTS), base=BASES)
    def move_slot(self, slot_id: int, base: int) -> None:
        """The same slot at another gpa."""
        slot = self.slots.get(slot_id) if self.steps > 8 else None
        if slot is not None and base + slot.npages <= END:
            skew = slot.page - base
            self.create_slot(slot_id, base, slot.npages, skew % END, False, 0, slot.flags)

    @action(lambda self: self.caps.dirty_logging, weight=2, slot_id=range(SLOTS))
    def toggle_dirty_log(self, slot_id: int) -> None:
        """KVM_MEM_LOG_DIRTY_PAGES on or off."""
        slot = self.slots.get(slot_id)
        if slot is not None:
            flags = slot.flags ^ KVM_MEM_LOG_DIRTY_PAGES
            self.create_slot(slot_id, slot.base, slot.npages, (slot.page - slot.base) % END, False, 0, flags)

    @action(slot_id=range(SLOTS + 1))
    def get_dirty_log(self, slot_id: int) -> None:
        """KVM_GET_DIRTY_LOG: all that was written is in it, and nothing that nobody faulted in."""
        slot = self.slots.get(slot_id)
        logged = slot is not None and slot.flags & KVM_MEM_LOG_DIRTY_PAGES
        with self.call("get_dirty_log", 0 if logged else errno.ENOENT) as step:
            step.result = self.fd.get_dirty_log(slot_id)
        if step.error is None:
            assert slot is not None
            dirty = step.result != 0
            missed, extra = np.flatnonzero(slot.written & ~dirty), np.flatnonzero(dirty & ~slot.touched)
            assert not len(missed), f"written and not logged: {(missed[:4] + slot.base).tolist()}"
            assert not len(extra), f"logged and not touched: {(extra[:4] + slot.base).tolist()}"
            slot.forget()

    # ---- attributes ---------------------------------------------------------------------------------------------

    @action(lambda self: self.caps.private_by_attribute, run=RUNS, private=YES_NO)
    def set_attributes(self, run: range, private: bool) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES, whatever the guest thinks of it."""
        value = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        expect = 0 if self.caps.private_by_attribute else errno.ENOTTY
        with self.call("set_memory_attributes", expect, start=run.start, end=run.stop, value=value) as step:
            self.fd.set_memory_attributes(run.start * PAGE_BYTES, len(run) * PAGE_BYTES, value)
        if step.error is None:
            self._attributes_are(np.arange(run.start, run.stop), private)

    def _attributes_are(self, gfns: IntArray, private: bool) -> None:
        if not private:
            for slot, at in self.at_slots(was := gfns[self.private[gfns]]):
                if slot.file is not None:
                    self.zap(slot.file, was[at] - slot.base + slot.pgoff)
        self.private[gfns] = private

    # ---- regions that the VMM registers -------------------------------------------------------------------------

    @action(lambda self: self.host.ops.has("register_region"), run=RUNS)
    def register_region(self, run: range) -> None:
        """KVM_MEMORY_ENCRYPT_REG_REGION of a part of the VMM's memory, also of one that is registered already."""
        hva, size = self.area + run.start * PAGE_BYTES, len(run) * PAGE_BYTES
        with self.call("register_region"):
            self.fd.register_region(hva, size)
        if not self.vm.dead:
            self.regions.append((hva, size))

    @action(lambda self: self.host.ops.has("register_region"), pick=range(6))
    def unregister_region(self, pick: int) -> None:
        """KVM_MEMORY_ENCRYPT_UNREG_REGION of exactly what was registered: the host may move it again."""
        if not self.regions:
            return
        hva, size = self.regions[pick % len(self.regions)]
        with self.call("unregister_region"):
            self.fd.unregister_region(hva, size)
        if not self.vm.dead:
            self.regions.remove((hva, size))

    # ---- the host's memory management ---------------------------------------------------------------------------

    @action(run=RUNS)
    def madvise(self, run: range) -> None:
        """The VMM gives pages of its own memory back."""
        with self.call("madvise"):
            self.process.madvise_dontneed(self.area + run.start * PAGE_BYTES, len(run) * PAGE_BYTES)
        if not self.caps.honours_notifiers:
            for slot in self.slots.values():
                pages = np.arange(max(slot.page, run.start), min(slot.page + slot.npages, run.stop))
                gfns = pages - slot.page + slot.base
                kept = (self.detached.stamp[gfns] == ABSENT) & (self.frames_at(gfns, False) != 0)
                gfns, pages = gfns[kept], pages[kept]
                stamps, kinds = self.vmm.stamp[pages], self.vmm.private[pages]
                kinds = np.where(stamps == ABSENT, self.kinds_of(gfns), kinds)
                self.detached.put(gfns, _written(stamps), kinds)
        self.vmm.drop(slice(run.start, run.stop))

    @action(run=RUNS)
    def migrate(self, run: range) -> None:
        """The host moves pages to other frames: what is pinned stays, what is plain arrives."""
        words = self.mapping.words[run.start : run.stop]
        frames = (words >> np.uint32(FRAME_SHIFT)).astype(np.int64)
        pins = self.host.frames.pins
        # A pin on any page of a large one holds all of it.
        block = np.any(pins[: len(pins) & -512].reshape(-1, 512), axis=1)
        held = (pins[frames] != 0) | ((words & np.uint32(1) != 0) & block[frames >> 9])
        with self.call("migrate"):
            self.process.migrate_pages(self.area + run.start * PAGE_BYTES, len(run) * PAGE_BYTES)
        if self.caps.encrypts:
            stamps = self.vmm.stamp[run.start : run.stop]
            stamps[(stamps != ABSENT) & self.vmm.private[run.start : run.stop] & ~held] = UNKNOWN

    @action(run=RUNS, write=YES_NO)
    def touch_memory(self, run: range, write: bool) -> None:
        """The VMM reads or writes its own memory: what is private there it must not see."""
        hva = self.area + run.start * PAGE_BYTES
        pages = slice(run.start, run.stop)
        if self.in_place:
            protected = (self.vmm.stamp[pages] != ABSENT) & self.vmm.private[pages]
            for at in np.flatnonzero(protected)[:8].tolist():
                self._must_not_see(run.start + at)
            return
        with self.call("mapping") as step:
            if write:
                stamp = self.next_stamp()
                step.result = self.process.write(hva, stamp, len(run))
            else:
                step.result, seen = self.process.read(hva, len(run))
        assert step.result is HostVerdict.OK, step.result
        if write:
            self.vmm.put(pages, stamp, False)
        else:
            self._same(seen, run, _written(self.vmm.stamp[pages]))

    def _must_not_see(self, page: int) -> None:
        stamp = self.vmm.stamp[page]
        with self.call("mapping") as step:
            step.result = self.process.read(self.area + page * PAGE_BYTES, 1)
        verdict, seen = step.result
        assert stamp <= 0 or int(seen[0]) != stamp, f"the host reads private page {page:#x} ({verdict.name})"

    # ---- the guest ----------------------------------------------------------------------------------------------

    @action(gfns=PAGES, vcpu=range(2), private=YES_NO)
    def write(self, gfns: npt.ArrayLike, vcpu: int, private: bool) -> None:
        """The guest writes pages that it has, of one kind."""
        self._use(np.asarray(gfns), vcpu, private, True)

    @action(gfns=PAGES, vcpu=range(2), private=YES_NO)
    def read(self, gfns: npt.ArrayLike, vcpu: int, private: bool) -> None:
        """The guest reads pages that it has, of one kind."""
        self._use(np.asarray(gfns), vcpu, private, False)

    def _use(self, gfns: IntArray, vcpu: int, private: bool, write: bool) -> None:
        for kind in (private, not private):
            fit = gfns[(self.kinds_of(gfns) == kind) & (self.trouble(gfns, kind, write) == 0)]
            if len(fit):
                self.touch(fit, write, False, vcpu)
                return

    @action(gfns=PAGES, write=YES_NO, wrong=(False, False, False, True), vcpu=range(2))
    def touch(self, gfns: IntArray, write: bool, wrong: bool, vcpu: int) -> None:
        """The guest touches pages of one kind, or (wrong) takes them for the other kind, or has no such pages."""
        kinds = self.kinds_of(gfns)
        private = bool(kinds[0])
        if not self.caps.private_by_attribute:
            gfns = gfns[kinds == private]
        elif wrong:
            private = not private
        if self.caps.private_by_attribute and not self.caps.has_mirror:
            # Where one root serves both, nothing tells the kinds apart once a page is mapped.
            gfns = gfns[(self.private[gfns] == private) | (self.frames_at(gfns, private) == 0)]
        if not len(gfns):
            return
        if private and self.caps.needs_accept:
            if write:
                for block in np.unique(gfns // 512).tolist():
                    self.accept_block(block, vcpu)
            new = gfns[(self.trouble(gfns, True, True) == 0) & ~self.accepted(gfns)]
            if len(new) and not self._accept(new, vcpu):
                return
        self._access(gfns, private, write, vcpu)

    def _access(self, gfns: IntArray, private: bool, write: bool, vcpu: int) -> None:
        trouble = self.trouble(gfns, private, write)
        n = leading(trouble == 0)
        stamps = np.arange(self.stamp + 1, self.stamp + 1 + len(gfns), dtype=np.uint32)
        self.stamp += len(gfns)
        action = Touch(as_sel(gfns), write=write, private=private, stamps=stamps)
        with self.call("write" if write else "read", gfns=as_sel(gfns), private=private) as step:
            step.result = self.vcpus[vcpu].run(action)
        if step.error is not None:
            return
        self.ran = True
        leave: ExitReason | None = step.result
        fatal = FATAL.get(self.injector.fired)
        if fatal is not None and isinstance(leave, MemoryFault | Shutdown) and leave.errno == fatal:
            assert action.done <= n
        else:
            gfn, how = (int(gfns[n]), int(trouble[n])) if n < len(gfns) else (0, 0)
            self._left(leave, gfn, how, private, write)
            assert action.done == n, f"{action.done} pages are done of the {n} before the exit"
        done = gfns[: action.done]
        self.touched(gfns)  # a batch may fault in pages behind the one that exits
        if write:
            self.touched(done, written=True)
            for store, at, pages in self.places(done, private):
                store.put(pages, stamps[at], private)
        elif action.seen is not None:
            self._same(action.seen, done, self.expected(done, private))

    def _left(self, leave: ExitReason | None, gfn: int, trouble: int, private: bool, write: bool) -> None:
        """KVM_RUN came back: was it for what the model says?"""
        if not trouble:
            assert leave is None, leave
        elif trouble == MMIO:
            assert leave == Mmio(gfn * PAGE_BYTES, write), leave
        else:
            flags = 8 if private and self.caps.private_by_attribute else 0
            assert leave == MemoryFault(gfn * PAGE_BYTES, flags, errno=trouble), leave

    def _same(self, seen: Any, pages: Sequence[int] | IntArray, expected: IntArray) -> None:
        """What was read is what the model says."""
        wrong = (expected != UNKNOWN) & (seen[: len(expected)] != expected)
        if np.count_nonzero(wrong):
            i = int(np.argmax(wrong))
            want = int(expected[i])
            raise InvariantViolation(
                "a page reads wrong", number=18 if want == 0 else BLAME.get(self.last, 0), gfn=int(pages[i]),
                states={"reads": _say(int(seen[i])), "was": _say(want)}, events=self.host.last_events(),
            )

    def _accept(self, gfns: IntArray, vcpu: int, level: int = PG_LEVEL_4K) -> bool:
        """The guest accepts pages that can be accepted. Returns whether it did."""
        size = 1 << order_of(level)
        action = Accept(as_sel(gfns) if size == 1 else slice(int(gfns[0]), int(gfns[-1]) + 1, size), level=level)
        with self.call("accept") as step:
            step.result = self.vcpus[vcpu].run(action)
        if step.error is not None:
            return False
        self.ran = True
        if step.result is not None:
            assert self.injector.fired in FATAL, step.result
            large = (array_of(action.gfns)[:, None] + np.arange(size)).ravel()
            gfns = np.setdiff1d(gfns, np.concatenate([array_of(action.small), large]))
        for slot, at in self.at_slots(gfns):
            assert slot.file is not None
            index = gfns[at] - slot.base + slot.pgoff
            slot.file.accepted[index] = True
            slot.file.content.put(index, 0 if self.caps.fresh_is_zero else UNKNOWN, True)
        return step.result is None

    @action(lambda self: self.caps.needs_accept, block=range(END // 512), vcpu=range(2))
    def accept_block(self, block: int, vcpu: int) -> None:
        """The guest accepts 2 MiB at once, if all of it can be accepted."""
        gfns = np.arange(block * 512, block * 512 + 512)
        if not np.count_nonzero(self.trouble(gfns, True, True)) and not np.count_nonzero(self.accepted(gfns)):
            self._accept(gfns, vcpu, PG_LEVEL_2M)

    @action(lambda self: self.caps.needs_accept and not self.caps.unaccepted_is_fatal, gfn=range(END))
    def touch_unaccepted(self, gfn: int) -> None:
        """The guest touches a page before it accepts it, and gets an exception."""
        page, sel = np.array([gfn]), slice(gfn, gfn + 1, 1)
        if not self.trouble(page, True, True)[0] and not self.accepted(page)[0]:
            with self.call("read", gfns=sel, private=True) as step:
                step.result = self.vcpus[0].run(Touch(sel))
            if step.error is None and self.injector.fired not in FATAL:
                assert isinstance(step.result, GuestException), step.result

    @action(lambda self: self.two_kinds, gfns=SMALLER, vcpu=range(2), private=YES_NO)
    def convert(self, gfns: IntArray, vcpu: int, private: bool) -> None:
        """The guest converts pages to the other kind, and the VMM does what it asks."""
        if self.vm.dead:
            return
        self.aim("")
        gfns = gfns[(self.kinds_of(gfns) != private) & (self.trouble(gfns, not private, False) == 0)]
        if not self.in_place:
            filed = [slot.id for slot in self.slots.values() if slot.file is not None]
            gfns = gfns[np.isin(self.owner[gfns], filed)]
        if self.caps.needs_accept:
            # A guest gives back what it accepted; what it never gave back, it does not ask for, whatever the VMM says.
            gfns = gfns[self.accepted(gfns) != private]
        if not len(gfns):
            return
        action = Convert(as_sel(gfns), private=private)
        with self.call("convert") as step:
            while isinstance(leave := self.vcpus[vcpu].run(action), MapGpaRange):
                if self.caps.private_by_attribute:
                    for low, high in stretches(array_of(leave.gfns).tolist()):
                        value = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
                        self.fd.set_memory_attributes(low * PAGE_BYTES, (high - low) * PAGE_BYTES, value)
            step.result = leave
        assert step.result is None, step.result
        self.ran = True
        if self.in_place:
            self.guest_shared[gfns] = not private
            for store, _, pages in self.places(gfns, private):
                store.private[pages] = private
                if not self.caps.conversion_keeps_content:
                    store.stamp[pages] = UNKNOWN
            return
        self._attributes_are(gfns, private)
        if self.caps.needs_accept:
            for slot, at in self.at_slots(gfns):
                assert slot.file is not None
                index = gfns[at] - slot.base + slot.pgoff
                slot.file.accepted[index] = False
                if not self.caps.conversion_keeps_content:
                    slot.file.content.put(index, UNKNOWN, True)

    @action(run=RUNS, vcpu=range(2))
    def prefault(self, run: range, vcpu: int) -> None:
        """KVM_PRE_FAULT_MEMORY; a second call finds all of it there."""
        gfns = np.arange(run.start, run.stop)
        troubles = np.where(self.private[gfns], self.trouble(gfns, True, False), self.trouble(gfns, False, False))
        n = leading(troubles == 0)
        expect = [0]
        if n == 0:
            expect = [errno.ENOENT if troubles[0] == MMIO else int(troubles[0])]
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
            self.touched(gfns)

    # ---- what must not work, and the end ------------------------------------------------------------------------

    @action(weight=2, which=range(12))
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

    @action(weight=1)
    def kill(self) -> None:
        """KVM_BUG_ON: from here on every ioctl gives -EIO, and all memory still comes back."""
        if self.steps > 20:
            with self.call("bug"):
                self.vm.bug("told to")

    def teardown(self) -> None:
        """Everything that the guest wrote is read back; then the process ends and nothing is left."""
        if sys.exc_info()[0] is not None:
            return  # a step failed: what it says is what matters
        self.aim("")
        if not self.vm.dead:
            gfns = np.flatnonzero(self.owner >= 0)
            for private in (False, True):
                known = gfns[(self.kinds_of(gfns) == private) & (self.trouble(gfns, private, False) == 0)]
                if private and self.caps.needs_accept:
                    known = known[self.accepted(known)]
                if len(known):
                    self._access(known, private, False, 0)
        self.process.exit()
        self.checker.check_idle()


DEAD_EIO = frozenset({
    "create_vcpu", "create_guest_memfd", "memslot", "set_memory_attributes", "prefault", "write", "read", "accept",
    "convert", "get_dirty_log", "register_region", "unregister_region",
})  # fmt: skip
"""The calls above that are ioctls of a VM or a vCPU."""


def _written(stamps: IntArray) -> IntArray:
    """Stamps as somebody reads them for whom a page that nobody wrote is zero."""
    return np.where(stamps == ABSENT, 0, stamps)


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
    """Run the machine for so many examples of so many actions, or a few more.

    What fails is shrunk (if wanted), and raised; script: then holds the calls that lead there, as lines for `cvm uapi`
    (`cvmcore.uapiscript`).
    """
    made = uapi_machine(backend, backing=backing, options=options)
    chosen = settings(
        max_examples=examples, stateful_step_count=-(-steps // BURST), deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck), print_blob=False,
        phases=[phase for phase in Phase if phase is not Phase.explain and (shrink or phase is not Phase.shrink)],
    )  # fmt: skip
    try:
        run_state_machine_as_test(made, settings=chosen)
    except Exception:
        if script is not None:
            script += made.last_script
        raise


__all__ = ["UapiMachine", "run_machine", "uapi_machine"]
