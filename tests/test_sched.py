"""The drivers: `Timed` to the nanosecond, deadlocks and lock order, what happens to locks when an operation fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fakes import MIRROR, PROFILE

from cvmcore.backend import Backend
from cvmcore.backends.swprot import SWPROT
from cvmcore.effects import BUSY, Lock, Steps, drain, holding, point
from cvmcore.errors import InvariantViolation, UapiError
from cvmcore.guest import Machine
from cvmcore.host import Host
from cvmcore.pages import run
from cvmcore.sched import Case, Lockdep, Timed, explore, replay
from cvmcore.types import PAGE_BYTES

ITEM = "vm_exit"
NS = PROFILE.ns_by_item()[ITEM]
"""What one unit of work takes in these tests."""


@pytest.fixture
def host() -> Host:
    return Host(SWPROT, PROFILE, nr_frames=1 << 12)


def work(host: Host, n: int) -> None:
    host.meter.charge(ITEM, n)


def hold(host: Host, lock: Lock, n: int, *, write: bool = True, before: int = 0, after: int = 0) -> Steps[float]:
    """Work, take the lock, work n units under it, drop it, work. Returns when it had the lock."""
    work(host, before)
    yield lock.write if write else lock.read
    start = host.meter.now_ns
    work(host, n)
    yield lock.release
    work(host, after)
    return start


# ---- locks in virtual time ----------------------------------------------------------------------------------------


def test_readers_are_parallel(host: Host) -> None:
    lock, timed = Lock("l", 1), Timed(host)

    starts = timed.run((f"r{i}", hold(host, lock, 10, write=False)) for i in range(8))

    assert starts == [0] * 8
    assert timed.elapsed_ns == 10 * NS
    assert (timed.lock_stats["l"].taken, timed.lock_stats["l"].contended) == (8, 0)


def test_writers_are_exclusive(host: Host) -> None:
    """Eight at once: each waits for all before it, to the nanosecond."""
    lock, timed = Lock("l", 1), Timed(host)

    starts = timed.run((f"w{i}", hold(host, lock, 10)) for i in range(8))

    assert starts == [i * 10 * NS for i in range(8)]
    assert timed.elapsed_ns == 80 * NS
    stats = timed.lock_stats["l"]
    assert (stats.taken, stats.contended) == (8, 7)
    assert stats.wait_ns == sum(i * 10 * NS for i in range(8))
    assert stats.hold_ns == 80 * NS


def test_who_comes_first_is_first(host: Host) -> None:
    """Arrival, not the order of the list, decides."""
    lock = Lock("l", 1)

    starts = Timed(host).run([("late", hold(host, lock, 10, before=5)), ("early", hold(host, lock, 10, before=2))])

    assert starts == [12 * NS, 2 * NS]


def test_queue_is_fair(host: Host) -> None:
    """A reader that comes after a waiting writer does not overtake it, though other readers hold the lock."""
    lock = Lock("l", 1)

    starts = Timed(host).run([
        ("r0", hold(host, lock, 10, write=False)),
        ("w", hold(host, lock, 10, before=1)),
        ("r1", hold(host, lock, 10, write=False, before=2)),
        ("r2", hold(host, lock, 10, write=False, before=3)),
    ])

    assert starts == [0, 10 * NS, 20 * NS, 20 * NS]


def test_readers_behind_a_writer_go_together(host: Host) -> None:
    lock = Lock("l", 1)

    starts = Timed(host).run([
        ("w0", hold(host, lock, 10)),
        ("r1", hold(host, lock, 10, write=False, before=1)),
        ("r2", hold(host, lock, 10, write=False, before=2)),
        ("w3", hold(host, lock, 10, before=3)),
    ])

    assert starts == [0, 10 * NS, 10 * NS, 20 * NS]


def test_locks_that_share_a_name_are_one_row(host: Host) -> None:
    timed = Timed(host)

    timed.run((f"w{i}", hold(host, Lock("entry", 1), 10)) for i in range(4))

    assert {name: (row.taken, row.hold_ns) for name, row in timed.lock_stats.items()} == {"entry": (4, 40 * NS)}


def test_locks_do_not_disturb_each_other(host: Host) -> None:
    timed = Timed(host)

    timed.run((f"w{i}", hold(host, Lock(f"l{i}", 1), 10)) for i in range(4))

    assert timed.elapsed_ns == 10 * NS


def test_runs_begin_where_the_clock_stands(host: Host) -> None:
    """elapsed_ns counts from the start of the run, and the clock goes on from its end."""
    work(host, 7)
    timed = Timed(host)
    timed.run([("a", hold(host, Lock("l", 1), 10, after=3))])

    assert timed.elapsed_ns == 13 * NS
    assert host.meter.now_ns == 20 * NS


def test_try_lock_is_busy(host: Host) -> None:
    """A try-lock that is not free answers BUSY at once, in both modes, and takes no time."""
    lock = Lock("l", 1)

    def attempt(how: str) -> Steps[tuple[bool, float]]:
        work(host, 1)
        answer = yield getattr(lock, how)
        at = host.meter.now_ns
        if answer is not BUSY:
            yield lock.release
        return answer is BUSY, at

    writer = Timed(host).run([("w", hold(host, lock, 10)), ("a", attempt("try_read")), ("b", attempt("try_write"))])
    assert writer[1:] == [(True, NS), (True, NS)]

    host.meter.now_ns = 0
    reader = Timed(host).run([
        ("r", hold(host, lock, 10, write=False)), ("a", attempt("try_read")), ("b", attempt("try_write")),
    ])
    assert reader[1:] == [(False, NS), (True, NS)]


# ---- the kernel's operations, contended ---------------------------------------------------------------------------


def machine(host: Host, vcpus: int) -> Machine:
    made = Machine(host, 1024 * PAGE_BYTES, vcpus=vcpus)
    made.launch()
    return made


def elapsed(actors: Callable[[Machine], list[tuple[str, Steps[Any]]]], backend: Backend = SWPROT) -> Timed:
    host = Host(backend, PROFILE, nr_frames=1 << 12)
    timed = Timed(host)
    timed.run(actors(machine(host, 4)))
    return timed


def touches(m: Machine, n: int) -> list[tuple[str, Steps[Any]]]:
    """n vCPUs, each faulting one page of its own."""
    return [(f"vcpu{i}", m.guest.write.steps(run(i * 16, 1), i)) for i in range(n)]


def test_faults_of_vcpus_are_parallel() -> None:
    """Faults take mmu_lock for read: four at once take as long as one."""
    one, four = elapsed(lambda m: touches(m, 1)), elapsed(lambda m: touches(m, 4))

    assert four.elapsed_ns == one.elapsed_ns
    assert four.lock_stats["vm0.mmu_lock"].taken == 4
    assert four.lock_stats["vm0.mmu_lock"].contended == 0


def conversions(m: Machine, n: int) -> list[tuple[str, Steps[Any]]]:
    """n threads of the VMM, each converting 16 pages of its own."""
    return [
        (f"vmm{i}", m.vm.set_memory_attributes.steps(i * 64 * PAGE_BYTES, 16 * PAGE_BYTES, 0)) for i in range(n)
    ]


def test_conversions_wait_for_each_other() -> None:
    """KVM_SET_MEMORY_ATTRIBUTES works under slots_lock: what is paid before it overlaps, the rest goes in turn."""
    before = PROFILE.ns_by_item()["attributes_call"]
    one = elapsed(lambda m: conversions(m, 1)).elapsed_ns
    under_lock = one - before
    assert under_lock > 0

    for n in (2, 3, 4):
        timed = elapsed(lambda m, n=n: conversions(m, n))  # type: ignore[misc]
        assert timed.elapsed_ns == before + n * under_lock
        assert timed.lock_stats["vm0.slots_lock"].wait_ns == sum(i * under_lock for i in range(n))


def test_contended_fault_is_slower_by_what_the_writer_holds() -> None:
    """A fault that comes while a conversion holds mmu_lock for write waits until it lets go, and no longer."""

    def both(m: Machine) -> list[tuple[str, Steps[Any]]]:
        lock = m.vm.vm.mmu_lock.all[0]
        return [("writer", hold(m.host, lock, 1000)), *touches(m, 1)]

    alone, contended = elapsed(lambda m: touches(m, 1)), elapsed(both)
    waited = contended.lock_stats["vm0.mmu_lock"].wait_ns

    assert contended.lock_stats["vm0.mmu_lock"].contended == 1
    assert 0 < waited < 1000 * NS
    assert contended.elapsed_ns == alone.elapsed_ns + waited
    # What the fault does before it asks for the lock is the part of the writer's time that it does not wait for.
    assert contended.elapsed_ns == 1000 * NS + (alone.elapsed_ns - (1000 * NS - waited))


def test_timed_content_is_intact() -> None:
    """Four vCPUs over the same pages, each fault an operation of its own: nothing is lost, whoever was last."""
    host = Host(MIRROR, PROFILE, nr_frames=1 << 12)
    m = machine(host, 4)

    def vcpu(i: int) -> Steps[None]:
        for gfn in range(24):
            yield from m.guest.write.steps(run(gfn, 1), i)

    timed = Timed(host)
    timed.run((f"vcpu{i}", vcpu(i)) for i in range(4))

    assert m.guest.check() == []
    assert timed.lock_stats["vm0.mmu_lock"].taken >= 24


# ---- deadlock, order, errors --------------------------------------------------------------------------------------


def crossing(host: Host, one: Lock, other: Lock) -> Steps[None]:
    yield one.write
    work(host, 10)
    yield other.write
    yield other.release
    yield one.release


def test_deadlock_is_found(host: Host) -> None:
    """Two locks of one rank, taken crosswise: `timed` says who waits for ever, `explore` in which order."""
    a, b = Lock("a", 5), Lock("b", 5)

    with pytest.raises(InvariantViolation, match=r"deadlock: x, y wait for ever") as timed:
        Timed(host).run([("x", crossing(host, a, b)), ("y", crossing(host, b, a))])
    with pytest.raises(InvariantViolation, match="deadlock") as explored:
        explore(lambda: Case(host, [("x", crossing(host, a, b)), ("y", crossing(host, b, a))]))

    assert timed.value.number == explored.value.number == 31
    assert "schedule:" in explored.value.__notes__[0]


def test_lock_order_violation_is_found(host: Host) -> None:
    """31: an inner lock is held, and an outer one is taken. No need for an unlucky moment."""
    outer, inner = Lock("outer", 1), Lock("inner", 2)

    drain(crossing(host, outer, inner))
    Lockdep()(crossing(host, outer, inner))
    for driver in (Lockdep(), lambda steps: Timed(host).run([("x", steps)])):
        with pytest.raises(InvariantViolation, match=r"takes outer \(rank 1\) under inner \(rank 2\)") as caught:
            driver(crossing(host, inner, outer))
        assert caught.value.number == 31


def test_lock_is_not_taken_twice(host: Host) -> None:
    lock = Lock("l", 1)

    with pytest.raises(InvariantViolation, match="takes l twice"):
        Lockdep()(crossing(host, lock, lock))
    with pytest.raises(InvariantViolation, match="deadlock: x"):
        Timed(host).run([("x", crossing(host, lock, lock))])


def test_operation_must_not_return_with_a_lock(host: Host) -> None:
    lock = Lock("l", 1)

    def keeps() -> Steps[None]:
        yield lock.write

    def drops() -> Steps[None]:
        yield lock.release

    for driver in (Lockdep(), lambda steps: Timed(host).run([("x", steps)])):
        with pytest.raises(InvariantViolation, match="with l held"):
            driver(keeps())
    with pytest.raises(InvariantViolation, match="does not hold"):
        Lockdep()(drops())


def failing(host: Host, lock: Lock, take: bool = True) -> Steps[None]:
    if take:
        yield lock.write
    work(host, 10)
    yield point("half way")
    raise UapiError(22, "call", "told to")


def test_lockdep_ends_what_does_not_end() -> None:
    lock = Lock("mine", 1)

    def loops() -> Steps[None]:
        while True:
            yield lock.write
            yield lock.release

    with pytest.raises(InvariantViolation, match="did not end in"):
        Lockdep()(loops())


def test_error_drops_locks(host: Host) -> None:
    """An operation that fails holds nothing any more; the others go on, and the error is raised when all have ended."""
    lock = Lock("l", 1)
    ended = []

    def after() -> Steps[None]:
        yield from hold(host, lock, 5)
        ended.append(host.meter.now_ns)

    with pytest.raises(UapiError, match="told to"):
        Timed(host).run([("fails", failing(host, lock)), ("waits", after())])
    assert ended == [15 * NS]


def test_lockdep_says_what_a_failed_operation_holds(host: Host) -> None:
    """As the kernel's does on the way back to user space. `holding` drops its lock first."""
    lock, lockdep = Lock("l", 1), Lockdep()

    with pytest.raises(InvariantViolation, match=r"an operation failed with l held: .*told to") as caught:
        lockdep(failing(host, lock))
    assert caught.value.number == 31 and lockdep.held.locks == []
    with pytest.raises(UapiError, match="told to"):
        lockdep(holding(lock, failing(host, Lock("none of these", 2), take=False)))
    for read in (False, True):
        assert lockdep(holding(lock, answers(lockdep), read)) is (not read)
    assert lockdep.held.locks == []


def answers(lockdep: Lockdep) -> Steps[bool]:
    """Whether the lock is held for write."""
    yield point("inside")
    return lockdep.held.holds("l", True)


def test_lockdep_keeps_outer_locks_of_a_failing_inner_operation(host: Host) -> None:
    """What an operation that caught the error still holds is still held."""
    outer, inner, lockdep = Lock("outer", 1), Lock("inner", 2), Lockdep()

    def catches() -> Steps[bool]:
        yield outer.write
        with pytest.raises(UapiError):
            lockdep(holding(inner, failing(host, inner, take=False)))
        held = lockdep.held.holds("outer", True)
        yield outer.release
        return held and not lockdep.held.holds("inner")

    assert lockdep(catches())


def test_results_come_in_order(host: Host) -> None:
    def one(i: int) -> Steps[int]:
        work(host, 10 - i)
        yield point("p")
        return i

    assert Timed(host).run((f"a{i}", one(i)) for i in range(5)) == list(range(5))


# ---- explore itself -----------------------------------------------------------------------------------------------


def test_explore_tries_every_order(host: Host) -> None:
    """Two actors of two steps each: six orders, each tried once."""
    orders: list[str] = []

    def make() -> Case:
        trail: list[str] = []

        def actor(name: str) -> Steps[None]:
            for _ in range(2):
                yield point(name)
                trail.append(name)

        return Case(host, [("a", actor("a")), ("b", actor("b"))], check=lambda results: orders.append("".join(trail)))

    found = explore(make)

    assert sorted(orders) == ["aabb", "abab", "abba", "baab", "baba", "bbaa"]
    assert found.schedules == 6


def test_explore_passes_over_orders_that_locks_forbid(host: Host) -> None:
    """Under one lock, only who is first can differ."""
    def make() -> Case:
        lock = Lock("l", 1)
        return Case(host, [(f"a{i}", hold(host, lock, 1)) for i in range(3)])

    assert explore(make).schedules == 6


def test_explore_hands_over_results_and_errors(host: Host) -> None:
    seen: list[list[Any]] = []

    def make() -> Case:
        lock = Lock("l", 1)
        return Case(host, [("fails", failing(host, lock)), ("holds", hold(host, lock, 1))], check=seen.append)

    explore(make)

    assert len(seen) >= 2
    assert all(isinstance(fails, UapiError) and not isinstance(holds, Exception) for fails, holds in seen)


def test_a_schedule_has_the_step_that_fails(host: Host) -> None:
    """So that it leads there again, whoever else could go on."""
    def make() -> Case:
        seen: list[str] = []

        def actor(name: str) -> Steps[None]:
            yield point("p")
            seen.append(name)
            if seen == ["b"]:
                raise InvariantViolation("b was first")
            yield point("q")

        return Case(host, [("a", actor("a")), ("b", actor("b"))])

    with pytest.raises(InvariantViolation) as caught:
        explore(make)
    schedule: list[int] = caught.value.schedule  # type: ignore[attr-defined]

    assert schedule == [1]
    assert str(replay(make(), schedule).error) == "b was first"
    assert "b: fails" in caught.value.__notes__[0]


def test_explore_stops_at_its_limit(host: Host) -> None:
    def actor() -> Steps[None]:
        for _ in range(5):
            yield point("p")

    assert explore(lambda: Case(host, [("a", actor()), ("b", actor())]), limit=7).schedules == 7


def test_explore_finds_livelock(host: Host) -> None:
    def restless() -> Steps[None]:
        while True:
            yield point("p")

    with pytest.raises(InvariantViolation, match="livelock"):
        explore(lambda: Case(host, [("a", restless())]))
