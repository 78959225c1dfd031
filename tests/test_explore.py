"""Races under every interleaving: at the points of the fault and invalidation paths, and at every lock.

Two vCPUs that fault one gfn, and a fault against a punch of its page. At each step whatever may never be broken is
looked at, at the end of each schedule everything: all invariants, content, and that the guest can go on. That the
explorer can find something is shown on protocols that are broken on purpose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from cvmcore.backend import Backend
from cvmcore.backends.swprot import SWPROT
from cvmcore.effects import Effect, Steps
from cvmcore.errors import CvmError, InvariantViolation, PluginError
from cvmcore.guest import Machine, stamps_for
from cvmcore.host import Host
from cvmcore.mem import fault as fault_path
from cvmcore.pages import run
from cvmcore.plugins import load_backend
from cvmcore.runner import load_profile_for
from cvmcore.sched import Case, Explored, explore
from cvmcore.testing.invariants import Checker
from cvmcore.types import PAGE_BYTES, Shutdown
from cvmcore.vcpu import Accept, Touch
from cvmcore.vm import Vm
from fakes import MIRROR

GFN = 5
PAGES = 16
STAMP = 0x5EED
FAULT_POINTS = {"fault.snapshot", "fault.pfn"}
EXTERNAL_POINTS = {"fault.freeze", "fault.hook", "fault.commit"}
INVALIDATE_POINTS = {"invalidate.start", "invalidate.zap", "invalidate.store", "invalidate.end"}


def backend_named(name: str) -> Backend:
    """A backend, or the test is skipped with the reason why it cannot be had."""
    if name == "swprot":
        return SWPROT
    if name == "mirror":
        return MIRROR
    try:
        return load_backend(name)
    except (CvmError, PluginError) as error:
        pytest.skip(str(error))


@pytest.fixture(params=["swprot", "mirror", "tdx"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return backend_named(request.param)


class World:
    """A host with one small VM, a checker on it, and the names of the effects that its actors came by."""

    def __init__(self, backend: Backend, seen: Counter[str]) -> None:
        self.host = Host(backend, load_profile_for(backend, None), nr_frames=1 << 10)
        self.checker = Checker.on(self.host, concurrent=True)
        self.machine = Machine(self.host, PAGES * PAGE_BYTES, vcpus=2)
        self.machine.launch()
        self.vm = self.machine.vm.vm
        self.seen = seen

    def noted(self, steps: Steps[Any]) -> Steps[Any]:
        """The operation, with a note of every effect that it yields."""
        answer: object = None
        try:
            while True:
                effect: Effect = steps.send(answer)
                self.seen[effect.name] += 1
                answer = yield effect
        except StopIteration as stop:
            return stop.value

    def use(self, vcpu: int, stamp: int) -> Steps[Any]:
        """A guest accepts its page, where it must, and writes it; returns the exit that stopped it."""
        if self.vm.caps.needs_accept:
            leave = yield from self.machine.vcpus[vcpu].run.steps(Accept(run(GFN, 1)))
            if leave is not None:
                return leave
        return (yield from self.machine.vcpus[vcpu].run.steps(Touch(run(GFN, 1), write=True, stamps=stamp)))

    def read(self) -> int | None:
        """What the guest reads at GFN now, faulting it in again and accepting it where it must; None: it is dead."""
        if self.vm.dead:
            return None
        if self.vm.caps.needs_accept:
            assert self.machine.vcpus[0].run(Accept(run(GFN, 1))) is None
        action = Touch(run(GFN, 1))
        assert self.machine.vcpus[0].run(action) is None
        assert action.seen is not None
        return int(action.seen[0])

    def case(self, actors: dict[str, Steps[Any]], check: Callable[[list[Any]], None]) -> Case:
        def at_end(results: list[Any]) -> None:
            self.checker.check(self.vm)
            check(results)
            self.checker.check(self.vm)
            self.machine.destroy()
            self.checker.check_idle()

        return Case(
            self.host, [(name, self.noted(steps)) for name, steps in actors.items()], at_end,
            lambda: None if self.vm.destroyed else (self.checker.check(self.vm, quiet=False), None)[1],
        )  # fmt: skip


# ---- two vCPUs, one gfn -------------------------------------------------------------------------------------------


def two_faults(backend: Backend, outcomes: Counter[Any], seen: Counter[str]) -> Explored:
    """Both vCPUs come to a page that nobody has touched, and write it."""

    def make() -> Case:
        world = World(backend, seen)

        def check(results: list[Any]) -> None:
            assert results == [None, None]
            assert world.vm.tdp.root_for(True).pages_mapped == 1
            stamp = world.read()
            assert stamp in (STAMP, STAMP + 1)
            outcomes[stamp] += 1

        return world.case({"vcpu0": world.use(0, STAMP), "vcpu1": world.use(1, STAMP + 1)}, check)

    return explore(make)


def test_two_vcpus_fault_one_gfn(backend: Backend) -> None:
    """One leaf, whoever was first; the page holds what was written last."""
    outcomes: Counter[Any] = Counter()
    seen: Counter[str] = Counter()

    found = two_faults(backend, outcomes, seen)

    assert sum(outcomes.values()) == found.schedules
    assert set(outcomes) == {STAMP, STAMP + 1}
    wanted = FAULT_POINTS | (EXTERNAL_POINTS if backend is not SWPROT else set())
    assert wanted <= seen.keys()
    assert found.schedules > 100


# ---- a fault against a punch --------------------------------------------------------------------------------------


def fault_and_punch(backend: Backend, outcomes: Counter[Any], seen: Counter[str]) -> Explored:
    """A vCPU comes to a page whose memory exists and is not mapped; the VMM punches it out of the file."""

    def make() -> Case:
        world = World(backend, seen)
        inode = world.process_inode()
        inode.populate(run(GFN, 1))
        machine = world.machine

        def check(results: list[Any]) -> None:
            left, punched = results
            assert punched is None
            if isinstance(left, Shutdown):
                # The page was taken away between accept and write: the guest touched what it had not accepted.
                assert world.vm.dead and world.vm.caps.unaccepted_is_fatal
                outcomes["dead"] += 1
                return
            assert left is None
            mapped = world.vm.tdp.root_for(True).pages_mapped
            stamp = world.read()
            assert stamp == (STAMP if mapped else 0)
            outcomes["kept" if mapped else "lost"] += 1

        return world.case({"vcpu0": world.use(0, STAMP), "vmm": machine.punch.steps(run(GFN, 1))}, check)

    return explore(make)


def _process_inode(self: World) -> Any:
    return self.machine.process.files[self.machine.regions[0].gmem_fd].inode


World.process_inode = _process_inode  # type: ignore[attr-defined]


def test_fault_against_punch(backend: Backend) -> None:
    """Either the page is mapped anew behind the hole and holds the write, or it is gone; never a leaf on freed memory."""
    outcomes: Counter[Any] = Counter()
    seen: Counter[str] = Counter()

    found = fault_and_punch(backend, outcomes, seen)

    assert sum(outcomes.values()) == found.schedules
    assert {"kept", "lost"} <= outcomes.keys() <= {"kept", "lost", "dead"}
    assert INVALIDATE_POINTS | FAULT_POINTS <= seen.keys()
    assert found.schedules > 100
