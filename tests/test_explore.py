"""Races under every interleaving: at the points of the fault and invalidation paths, and at every lock.

Two vCPUs that fault one gfn, and a fault against a punch of its page. At each step whatever may never be broken is
looked at, at the end of each schedule everything: all invariants, content, and that the guest can go on. That the
explorer can find something is shown on protocols that are broken on purpose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from errno import EEXIST
from typing import Any

import pytest
from fakes import MIRROR, PUNCH, mirror

from cvmcore.backend import Backend
from cvmcore.backends.default import DEFAULT
from cvmcore.backends.swprot import SWPROT
from cvmcore.effects import Effect, Steps, drain
from cvmcore.errors import CvmError, InvariantViolation
from cvmcore.guest import Machine
from cvmcore.host import Host
from cvmcore.mem import fault as fault_path
from cvmcore.mem import tdp
from cvmcore.mem.fault import resolve
from cvmcore.mem.gmem import GmemInode
from cvmcore.mem.mmulock import Frame
from cvmcore.pages import run
from cvmcore.plugins import load_backend
from cvmcore.runner import load_profile_for
from cvmcore.sched import Case, explore
from cvmcore.testing.invariants import Checker
from cvmcore.testing.state import fingerprint
from cvmcore.types import (
    KVM_MEM_GUEST_MEMFD,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    PAGE_BYTES,
    PG_LEVEL_1G,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    RetPf,
    Shutdown,
)
from cvmcore.vcpu import RETRY, Accept, Touch
from cvmcore.vm import Vm

GFN = 5
PAGE = run(GFN, 1)
PAGES = 16
STAMP = 0x5EED
FAULT_POINTS = {"fault.snapshot", "fault.pfn"}
EXTERNAL_POINTS = {"fault.freeze", "fault.hook", "fault.commit"}
INVALIDATE_POINTS = {"invalidate.start", "invalidate.zap", "invalidate.store", "invalidate.end"}


def backend_named(name: str) -> Backend:
    """A backend, or the test is skipped with the reason why it cannot be had."""
    shipped = {"swprot": SWPROT, "mirror": MIRROR}
    if name in shipped:
        return shipped[name]
    try:
        return load_backend(name)
    except CvmError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["swprot", "mirror", "tdx"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return backend_named(request.param)


class World:
    """A host with one small VM and a checker on it; tables stand around GFN, which itself is not mapped.

    seen: names of the effects that its actors come by.
    """

    def __init__(self, backend: Backend, seen: Counter[str], pages: int = PAGES, **host: Any) -> None:
        self.host = Host(backend, load_profile_for(backend, None), **{"nr_frames": 1 << 10, **host})
        self.checker = Checker.on(self.host, concurrent=True)
        self.machine = Machine(self.host, pages * PAGE_BYTES, vcpus=2)
        self.machine.launch()
        self.vm: Vm = self.machine.vm.vm
        self.seen = seen
        for vcpu in range(2) if pages == PAGES else ():
            self.machine.guest.write(run(GFN + 1 + vcpu, 1), vcpu=vcpu)

    @property
    def inode(self) -> GmemInode:
        return self.machine.process.files[self.machine.regions[0].gmem_fd].inode

    def used_before(self) -> World:
        """The page has memory and content, and was converted there and back, so that it is not mapped any more."""
        self.machine.guest.write(PAGE)
        for private in (False, True):
            self.machine.set_private(PAGE, private)
        assert self.inode.words[GFN] and not self.mapped
        return self

    @property
    def mapped(self) -> bool:
        return self.vm.tdp.root_for(True).level_at(GFN) > 0

    # ---- actors ----

    def fault(self, vcpu: int, page: slice = PAGE, max_level: int = PG_LEVEL_1G) -> Steps[RetPf]:
        """The fault path alone, for a write to GFN, until it need not be tried again."""
        while True:
            found = yield from resolve(
                self.vm, self.machine.vcpus[vcpu].vcpu, page, True, True, max_level=max_level
            )
            if found.ret is not RetPf.RETRY:
                return found.ret
            yield RETRY

    def use(self, vcpu: int, stamp: int) -> Steps[Any]:
        """A guest accepts the page, where it must, and writes it; returns the exit that stopped it."""
        if self.vm.caps.needs_accept:
            leave = yield from self.machine.vcpus[vcpu].run.steps(Accept(PAGE))
            if leave is not None:
                return leave
        return (yield from self.machine.vcpus[vcpu].run.steps(Touch(PAGE, write=True, stamps=stamp)))

    def punch(self) -> Steps[None]:
        return self.machine.punch.steps(PAGE)

    # ---- what comes out ----

    def read(self) -> int:
        """What the guest reads at GFN now, faulting it in again and accepting it where it must."""
        if self.vm.caps.needs_accept:
            assert self.machine.vcpus[0].run(Accept(PAGE)) is None
        action = Touch(PAGE)
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

        def step() -> None:
            self.checker.check(self.vm, quiet=False)

        noted = [(name, self.noted(steps)) for name, steps in actors.items()]
        return Case(self.host, noted, at_end, step, self.state)

    def state(self) -> int:
        return fingerprint(self.host, elements=1 << 10)

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


# ---- the fault path, every order ----------------------------------------------------------------------------------


def two_faults(backend: Backend, seen: Counter[str], check: Callable[[World, list[Any]], None]) -> Case:
    world = World(backend, seen)
    return world.case({"vcpu0": world.fault(0), "vcpu1": world.fault(1)}, lambda results: check(world, results))


def fault_and_punch(backend: Backend, seen: Counter[str], check: Callable[[World, list[Any]], None]) -> Case:
    world = World(backend, seen).used_before()
    return world.case({"vcpu0": world.fault(0), "vmm": world.punch()}, lambda results: check(world, results))


def test_two_vcpus_fault_one_gfn(backend: Backend) -> None:
    """One leaf, whoever was first: the other finds it there. The page reads zeros, and can be used."""
    outcomes: Counter[Any] = Counter()
    seen: Counter[str] = Counter()

    def check(world: World, results: list[Any]) -> None:
        outcomes[tuple(results)] += 1
        assert world.mapped
        assert world.read() == 0
        assert world.machine.vcpus[1].run(Touch(PAGE, write=True, stamps=STAMP)) is None
        assert world.read() == STAMP

    found = explore(lambda: two_faults(backend, seen, check))

    assert sum(outcomes.values()) == found.schedules
    assert set(outcomes) == {(RetPf.FIXED, RetPf.SPURIOUS), (RetPf.SPURIOUS, RetPf.FIXED)}
    assert FAULT_POINTS | (set() if backend is SWPROT else EXTERNAL_POINTS) <= seen.keys()
    assert found.schedules > 20


def test_fault_against_punch(backend: Backend) -> None:
    """Either the fault maps new memory behind the hole, or what it mapped is gone: zeros, whichever was first."""
    outcomes: Counter[Any] = Counter()
    seen: Counter[str] = Counter()

    def check(world: World, results: list[Any]) -> None:
        assert results == [RetPf.FIXED, None]
        outcomes[world.mapped] += 1
        assert bool(world.inode.words[GFN]) == world.mapped
        assert world.read() == 0

    found = explore(lambda: fault_and_punch(backend, seen, check))

    assert sum(outcomes.values()) == found.schedules
    assert outcomes[True] and outcomes[False]
    wanted = FAULT_POINTS | INVALIDATE_POINTS | (set() if backend is SWPROT else EXTERNAL_POINTS) | {"fault.retry"}
    assert wanted <= seen.keys()


# ---- whole vCPUs --------------------------------------------------------------------------------------------------


def two_writers(backend: Backend, check: Callable[[World, list[Any]], None]) -> Case:
    world = World(backend, Counter())
    actors = {"vcpu0": world.use(0, STAMP), "vcpu1": world.use(1, STAMP + 1)}
    return world.case(actors, lambda results: check(world, results))


def writer_and_punch(backend: Backend, check: Callable[[World, list[Any]], None]) -> Case:
    world = World(backend, Counter()).used_before()
    return world.case(
        {"vcpu0": world.use(0, STAMP), "vmm": world.punch()}, lambda results: check(world, results)
    )


def bound_for(backend: Backend) -> int | None:
    """With accepting, epochs and the module's own locks a vCPU makes too many steps to try all orders."""
    return 1 if backend.name not in ("swprot", "mirror") else None


@pytest.mark.parametrize("name", ["swprot", "tdx"])
def test_two_vcpus_write_one_gfn(name: str) -> None:
    """Both enter the guest, fault, (accept,) write: the page holds what was written last."""
    backend = backend_named(name)
    outcomes: Counter[Any] = Counter()

    def check(world: World, results: list[Any]) -> None:
        assert results == [None, None]
        stamp = world.read()
        # Accepting a page a second time keeps its content.
        assert stamp in (STAMP, STAMP + 1)
        outcomes[stamp] += 1

    explore(lambda: two_writers(backend, check), interruptions=bound_for(backend))

    assert set(outcomes) == {STAMP, STAMP + 1}


@pytest.mark.parametrize("name", ["swprot", "mirror", "tdx"])
def test_writer_against_punch(name: str) -> None:
    """The write is in the new page, or gone with the old one; a guest that had accepted the old one may die of it."""
    backend = backend_named(name)
    outcomes: Counter[Any] = Counter()

    def check(world: World, results: list[Any]) -> None:
        left, punched = results
        assert punched is None
        if isinstance(left, Shutdown):
            # The page went between accept and write: the guest touched what it had not accepted.
            assert world.vm.dead and world.vm.caps.unaccepted_is_fatal
            outcomes["dead"] += 1
            return
        assert left is None
        kept = world.mapped
        assert world.read() == (STAMP if kept else 0)
        outcomes["kept" if kept else "lost"] += 1

    explore(lambda: writer_and_punch(backend, check), interruptions=bound_for(backend))

    assert outcomes["kept"] and outcomes["lost"]
    if backend.name == "tdx":
        assert outcomes["dead"]


# ---- large and small pages of one block ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [SWPROT, MIRROR], ids=lambda backend: backend.name)
def test_a_large_and_a_small_fault_in_one_block(backend: Backend) -> None:
    """Whoever is second finds what the first has mapped. A mirror keeps it: its guest's pages are not lost."""
    levels: set[int] = set()

    def make() -> Case:
        world = World(backend, Counter(), 1024, nr_frames=1 << 12, backing="2m")

        def check(results: list[Any]) -> None:
            assert set(results) <= {RetPf.FIXED, RetPf.SPURIOUS, RetPf.RETRY}
            levels.add(world.vm.tdp.root_for(True).level_at(1))

        small = resolve(world.vm, world.machine.vcpus[1].vcpu, run(1, 1), True, True, max_level=PG_LEVEL_4K)
        return world.case({"large": world.fault(0, run(0, 1)), "small": ret_of(small)}, check)

    explore(make, interruptions=1)

    # A direct root has the size that came last: a split, or the large leaf in the table's place.
    assert levels == {PG_LEVEL_4K, PG_LEVEL_2M}


def ret_of(steps: Steps[Any]) -> Steps[RetPf]:
    """How a fault ended that is not tried again."""
    return (yield from steps).ret


def test_conversion_against_an_accept_that_splits() -> None:
    """Both split a page of the mirror; each has brought its own table page."""
    backend = mirror(zap_destroys_content=True, needs_accept=True, fault_tells_accept_level=True)

    def make() -> Case:
        world = World(backend, Counter(), 1024, nr_frames=1 << 12, backing="2m")
        world.machine.guest.accept(run(512, 1, 512), level=PG_LEVEL_2M)
        drain(world.fault(0, run(0, 1)))
        actors = {
            "vmm": world.machine.set_private.steps(run(600, 1), False),
            "vcpu1": world.machine.vcpus[1].run.steps(Accept(PAGE)),
        }
        return world.case(actors, lambda results: None)

    explore(make, interruptions=1)


# ---- memslots come and go -----------------------------------------------------------------------------------------


HIGH = run(1 << 18, PAGES)
"""Where another slot is made meanwhile."""


def new_slot_and_use(world: World, flags: int, hva: int, fd: int, private: bool) -> Steps[Any]:
    """The VMM makes a slot at HIGH, and a vCPU writes its page GFN."""
    gpa, size = HIGH.start * PAGE_BYTES, PAGES * PAGE_BYTES
    yield from world.machine.vm.set_user_memory_region2.steps(2, flags, gpa, size, hva, fd, 0)
    page = run(HIGH.start + GFN, 1)
    return (yield from world.machine.vcpus[0].run.steps(Touch(page, write=True, private=private, stamps=STAMP)))


def test_punch_against_bind() -> None:
    """The hole keeps the bindings as they are until it is through; who is bound later maps new memory."""

    def make() -> Case:
        world = World(SWPROT, Counter())
        machine, size = world.machine, PAGES * PAGE_BYTES
        machine.guest.write(PAGE)
        fd = machine.regions[0].gmem_fd
        machine.vm.set_user_memory_region2(0, 0, 0, 0)
        machine.vm.set_memory_attributes(HIGH.start * PAGE_BYTES, size, KVM_MEMORY_ATTRIBUTE_PRIVATE)
        hole = machine.process.fallocate.steps(fd, PUNCH, GFN * PAGE_BYTES, PAGE_BYTES)
        use = new_slot_and_use(world, KVM_MEM_GUEST_MEMFD, 0, fd, True)
        return world.case({"vmm": hole, "vcpu0": use}, nothing_left)

    explore(make, interruptions=1)


def test_notifier_against_a_new_slot() -> None:
    """Slots are the same from an invalidation's begin to its end: a new one waits, and maps what is there then."""

    def make() -> Case:
        world = World(DEFAULT, Counter())
        hva = world.machine.regions[0].hva
        gone = world.machine.process.madvise_dontneed.steps(hva, PAGES * PAGE_BYTES)
        return world.case({"host": gone, "vcpu0": new_slot_and_use(world, 0, hva, -1, False)}, nothing_left)

    explore(make, interruptions=1)


def test_two_vcpus_of_one_id() -> None:
    """One is made; the other one's call finds its id in use."""

    def make() -> Case:
        world = World(SWPROT, Counter())
        actors = {name: world.machine.vm.create_vcpu.steps(5) for name in ("a", "b")}

        def check(results: list[Any]) -> None:
            assert [getattr(result, "errno", 0) for result in results] in ([0, EEXIST], [EEXIST, 0])

        return world.case(actors, check)

    explore(make)


def nothing_left(results: list[Any]) -> None:
    """Both came to their end without an exit or an error."""
    assert results == [None, None]


# ---- the explorer finds what is broken ------------------------------------------------------------------------------


def no_stale_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault does not notice that an invalidation came and went since it looked its page up."""
    map_leaf = fault_path._map

    def stale(access: Any, root: Any, slot: Any, batch: Any, seq: int) -> Any:
        return map_leaf(access, root, slot, batch, access.vm.frame.seq)

    monkeypatch.setattr(fault_path, "_map", stale)


def no_range_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault does not notice that an invalidation of its gfn is under way."""
    monkeypatch.setattr(Frame, "blocks", lambda self, gfns: False)


def no_freeze(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry looks absent while the vendor sets it."""
    set_entry = tdp.Tdp.set_entry

    def thawed(self: Any, root: Any, level: int, index: Any, *rest: Any) -> Steps[Any]:
        steps = set_entry(self, root, level, index, *rest)
        answer: object = None
        try:
            while True:
                effect = steps.send(answer)
                if effect is tdp.FAULT_FREEZE:
                    root.entries[level][index] = 0
                answer = yield effect
        except StopIteration as stop:
            return stop.value

    monkeypatch.setattr(tdp.Tdp, "set_entry", thawed)


def nothing(world: World, results: list[Any]) -> None:
    """Whatever the end is: the invariants are looked at in any case."""


@pytest.mark.parametrize(
    ("broken", "make", "backend", "numbers"),
    [
        (no_stale_check, fault_and_punch, SWPROT, {5, 16, 23}),
        (no_stale_check, fault_and_punch, MIRROR, {16, 23}),
        (no_range_check, fault_and_punch, SWPROT, {5, 16, 23}),
        (no_freeze, two_faults, MIRROR, {13}),
    ],
    ids=lambda value: getattr(value, "__name__", getattr(value, "name", "")),
)
def test_broken_protocol_is_found(
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[[pytest.MonkeyPatch], None],
    make: Callable[..., Case],
    backend: Backend,
    numbers: set[int],
) -> None:
    """Some order breaks an invariant, and the schedule that leads there is told. One after the other all is well."""
    broken(monkeypatch)

    with pytest.raises(InvariantViolation) as caught:
        explore(lambda: make(backend, Counter(), nothing))

    assert caught.value.number in numbers, caught.value
    assert any(note.startswith("schedule:") for note in caught.value.__notes__)
    assert explore(lambda: make(backend, Counter(), nothing), interruptions=0).schedules == 2


# ---- orders that are left out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [two_faults, fault_and_punch])
def test_leaving_out_orders_misses_no_end(make: Callable[..., Case]) -> None:
    """With a fingerprint of the state fewer orders are run, and they end in the same states as all orders do."""
    ends: dict[bool, set[Any]] = {}
    schedules = {}
    for reduced in (True, False):
        found = ends[reduced] = set()

        def case(reduced: bool = reduced, found: set[int] = found) -> Case:
            made = make(SWPROT, Counter(), lambda world, results: found.add((world.state(), tuple(results))))
            made.step = lambda: None
            if not reduced:
                made.state = None
            return made

        schedules[reduced] = explore(case).schedules

    assert ends[True] == ends[False]
    assert len(ends[True]) > 1
    assert schedules[True] < schedules[False]
