"""A small VM for cases in which actors race: made in milliseconds, and put back for each schedule."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

from cvmcore.backend import Backend
from cvmcore.cost import Profile
from cvmcore.effects import Effect, Lock, Steps, point
from cvmcore.errors import UapiError
from cvmcore.guest import Machine
from cvmcore.host import Host
from cvmcore.mem.fault import resolve
from cvmcore.mem.gmem import GmemInode
from cvmcore.pages import Sel, run
from cvmcore.runner import load_profile_for
from cvmcore.sched import Actor, Case, Standing
from cvmcore.testing.invariants import Checker
from cvmcore.testing.reach import Baseline, Kept
from cvmcore.types import PAGE_BYTES, GuestException, RetPf, Walk
from cvmcore.vcpu import RETRY, Accept, Convert, Touch
from cvmcore.vm import Vm

GFN = 5
PAGE = run(GFN, 1)
PAGES = 16
STAMP = 0x5EED


@lru_cache
def _profile(backend: Backend) -> Profile:
    return load_profile_for(backend, None)


class NoLock(Lock):
    """A lock that locks nobody out: taking and dropping it are points at which others may run."""

    def __getattr__(self, kind: str) -> Effect:
        if kind.startswith("__"):
            raise AttributeError(kind)
        effect = point(f"{kind} {self.name} (off)")
        setattr(self, kind, effect)
        return effect


def _accepted_before(leave: Any) -> bool:
    """Whether a guest is told that the page that it accepts was accepted already (PVALIDATE: no change). Guests keep a
    list of what they have accepted; where two of these accept one page, the second takes it as done."""
    return isinstance(leave, GuestException) and leave.why == Walk.DENIED.name


class World:
    """A host with one small VM and a checker on it; tables stand around GFN, which itself is not mapped.

    without: locks that lock nobody out, for twins: of the VM by their names, "mmu_lock", "invalidate_lock".
    """

    without: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, backend: Backend, *, backing: str = "4k", pages: int = PAGES, options: dict[str, str] | None = None,
        warm: bool = True, launch: bool = True, policies: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.host = Host(
            backend, _profile(backend), nr_frames=1 << (10 if backing == "4k" else 12), backing=backing,
            options=options, policies=policies,
        )  # fmt: skip
        self.checker = Checker.on(self.host, concurrent=True)
        self.checker.resting = True
        # Time stands still: it decides nothing, and would make situations differ that are alike.
        self.host.meter.prices = dict.fromkeys(self.host.meter.prices, 0)
        self.machine = Machine(self.host, pages * PAGE_BYTES, vcpus=2)
        self.vm: Vm = self.machine.vm.vm
        if launch:
            self.machine.launch()
        if warm:
            for vcpu in range(2):
                self.machine.guest.write(run(GFN + 1 + vcpu, 1), vcpu=vcpu)

    @property
    def inode(self) -> GmemInode:
        return self.machine.process.files[self.machine.regions[0].gmem_fd].inode

    @property
    def mapped(self) -> bool:
        return self.vm.tdp.root_for(True).level_at(GFN) > 0

    def used_before(self) -> World:
        """The page has memory and content, and was converted there and back, so that it is not mapped any more."""
        self.machine.guest.write(PAGE)
        for private in (False, True):
            self.machine.set_private(PAGE, private)
        return self

    # ---- actors -----------------------------------------------------------------------------------------------

    def fault(self, vcpu: int, gfns: Sel = PAGE, private: bool = True, write: bool = True) -> Steps[RetPf]:
        """The fault path alone, for gfns, until it need not be tried again."""
        while True:
            found = yield from resolve(self.vm, self.machine.vcpus[vcpu].vcpu, gfns, write, private)
            if found.ret is not RetPf.RETRY:
                return found.ret
            yield RETRY

    def use(self, vcpu: int, stamp: int = STAMP, gfns: Sel = PAGE) -> Steps[Any]:
        """A guest accepts the page, where it must, and writes it; returns the exit that stopped it."""
        if self.vm.caps.needs_accept:
            leave = yield from self.machine.vcpus[vcpu].run.steps(Accept(gfns))
            if leave is not None and not _accepted_before(leave):
                return leave
        return (yield from self.machine.vcpus[vcpu].run.steps(Touch(gfns, write=True, stamps=stamp)))

    def touch(self, vcpu: int, gfns: Sel = PAGE, private: bool = True, write: bool = False) -> Steps[Any]:
        """A guest touches pages; returns the exit that stopped it."""
        return self.machine.vcpus[vcpu].run.steps(Touch(gfns, write=write, private=private, stamps=STAMP))

    def guest_convert(self, vcpu: int, private: bool, gfns: Sel = PAGE) -> Steps[Any]:
        """A guest converts pages; its VMM does what it asks."""
        action = Convert(gfns, private=private)
        while (leave := (yield from self.machine.vcpus[vcpu].run.steps(action))) is not None:
            yield from self.machine.handle.steps(leave, self.machine.vcpus[vcpu])

    def attributes(self, private: bool, gfns: Sel = PAGE) -> Steps[None]:
        """The VMM sets the attributes."""
        return self.machine.set_private.steps(gfns, private)

    def punch(self, gfns: Sel = PAGE) -> Steps[None]:
        """The VMM punches a hole."""
        return self.machine.punch.steps(gfns)

    def populate(self) -> Steps[Any]:
        """The VMM loads the page as part of the guest's image."""
        return self._quietly(self.machine.vm.launch_update.steps(GFN * PAGE_BYTES, [b"image"]))

    def discard(self, gfns: Sel = PAGE) -> Steps[None]:
        """The VMM gives its own memory back."""
        return self.machine.discard_shared.steps(gfns)

    def delete_slot(self) -> Steps[None]:
        """The VMM deletes the memslot."""
        return self._quietly(self.machine.vm.set_user_memory_region2.steps(0, 0, 0, 0))

    def close_file(self) -> Steps[None]:
        """The VMM closes the guest_memfd."""
        return self._quietly(self.machine.process.close.steps(self.machine.regions[0].gmem_fd))

    def prefault(self, gfns: Sel = PAGE) -> Steps[Any]:
        """KVM_PRE_FAULT_MEMORY of the first page."""
        gpa = GFN * PAGE_BYTES
        return self._quietly(self.machine.vcpus[0].pre_fault_memory.steps(gpa, PAGE_BYTES))

    @staticmethod
    def _quietly(steps: Steps[Any]) -> Steps[Any]:
        """An ioctl whose errno is its result."""
        try:
            return (yield from steps)
        except UapiError as error:
            return errno.errorcode[error.errno]

    def _unlock(self, name: str) -> None:
        if name == "mmu_lock":
            self.vm.mmu_lock.all = tuple(NoLock(lock.name, lock.rank) for lock in self.vm.mmu_lock.all)
            return
        owner: Any = self.inode if name == "invalidate_lock" else self.vm
        lock = getattr(owner, name)
        setattr(owner, name, NoLock(lock.name, lock.rank))

    # ---- what comes out ---------------------------------------------------------------------------------------

    def read(self) -> int:
        """What the guest reads at GFN now, faulting it in again and accepting it where it must."""
        if self.vm.caps.needs_accept:
            leave = self.machine.vcpus[0].run(Accept(PAGE))
            assert leave is None or _accepted_before(leave)
        action = Touch(PAGE)
        assert self.machine.vcpus[0].run(action) is None
        assert action.seen is not None
        return int(action.seen[0])

    def case(
        self, actors: dict[str, Callable[[], Steps[Any]]], check: Callable[[list[Any]], None] | None = None
    ) -> Case:
        """The case: invariants at each step, all of them and `check` at the end, and that nothing is left.

        actors: what makes each actor's steps. Whatever they and `check` write to besides the world, they must enclose.
        """

        def at_end(results: list[Any]) -> None:
            for result in results:
                if isinstance(result, Exception) and not isinstance(result, UapiError):
                    raise result
            if not self.vm.destroyed:
                self.checker.check(self.vm)
            if check is not None:
                check(results)
                self.checker.check(self.vm)
            self.checker.resting = True
            self.machine.destroy()
            self.checker.check_idle()

        def step() -> None:
            if not self.vm.destroyed:
                self.checker.check(self.vm, quiet=False)

        def state(own: Sequence[Actor]) -> Standing:
            taken, where, tied, apart = baseline.now(*own, moves=[actor.advanced for actor in own])
            return Standing(taken, tuple(where), tied, apart)

        def start() -> list[tuple[str, Steps[Any]]]:
            return [(name, make()) for name, make in actors.items()]

        def again() -> list[tuple[str, Steps[Any]]]:
            kept.restore()
            return start()

        for name in self.without:
            self._unlock(name)
        self.checker.resting = False
        kept = Kept(self, check, *actors.values())
        hooks = [hook.fn for hook in self.host.ops.hooks.values()]
        baseline = Baseline(self, self.checker.trace, check, *actors.values(), *hooks)
        return Case(self.host, start(), at_end, step, state, again)
