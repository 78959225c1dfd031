"""Drivers: who runs next. `Timed` puts actors on a virtual clock with queueing locks; `explore` tries every order.

(The third driver, `drain`, is in `cvmcore.effects`: one operation after the other, nothing contends.)

All of them run the same operations: generators that yield `Effect`s. `Lockdep` is `drain` with the lock order checked.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import attrs

from cvmcore.effects import BUSY, Effect, Lock, Steps
from cvmcore.errors import InvariantViolation
from cvmcore.host import Host

R = TypeVar("R")

_TAKES = {"read": False, "write": True, "try_read": False, "try_write": True}


class Held:
    """The locks that one actor holds, in the order it took them; taking one out of order is an error."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.locks: list[tuple[Lock, bool]] = []

    def take(self, lock: Lock, write: bool) -> None:
        for held, _ in self.locks:
            if held is lock:
                raise InvariantViolation(f"{self.owner} takes {lock.name} twice", number=31)
            if held.rank > lock.rank:
                raise InvariantViolation(
                    f"{self.owner} takes {lock.name} (rank {lock.rank}) under {held.name} (rank {held.rank})", number=31
                )
        self.locks.append((lock, write))

    def drop(self, lock: Lock) -> None:
        for i in range(len(self.locks) - 1, -1, -1):
            if self.locks[i][0] is lock:
                del self.locks[i]
                return
        raise InvariantViolation(f"{self.owner} drops {lock.name}, which it does not hold", number=31)

    def holds(self, name: str, write: bool | None = None) -> bool:
        """Whether a lock of this (unqualified) name is held, in this mode where one is given."""
        return any(
            lock.name.rpartition(".")[2] == name and (write is None or mode == write) for lock, mode in self.locks
        )


class Lockdep:
    """`drain` that checks the lock order, and that no operation returns with a lock (kernel: lockdep).

    Use it as `Host(drive=Lockdep())`; `held` is what the running operation holds, for checks inside observers.
    """

    def __init__(self) -> None:
        self.held = Held("main")

    def __call__(self, steps: Steps[R]) -> R:
        outer = len(self.held.locks)
        try:
            while True:
                effect = next(steps)
                if effect.lock is None:
                    continue
                if effect.kind == "release":
                    self.held.drop(effect.lock)
                else:
                    self.held.take(effect.lock, _TAKES[effect.kind])
        except StopIteration as stop:
            if len(self.held.locks) != outer:
                kept = self.held.locks[-1][0].name
                raise InvariantViolation(f"an operation returned with {kept} held", number=31) from None
            result: R = stop.value
            return result
        except Exception:
            del self.held.locks[outer:]
            raise


# ---- locks that are really taken ------------------------------------------------------------------------------


@attrs.define(eq=False)
class LockStats:
    """What a lock cost in a timed run."""

    taken: int = 0
    contended: int = 0
    wait_ns: float = 0
    hold_ns: float = 0


class _LockState:
    """Who holds a lock, and who waits for it in order (a fair rwlock: a waiting writer stops later readers)."""

    __slots__ = ("queue", "readers", "since", "stats", "writer")

    def __init__(self) -> None:
        self.writer: Actor | None = None
        self.readers: list[Actor] = []
        self.queue: deque[tuple[Actor, bool]] = deque()
        self.stats = LockStats()
        self.since = 0.0

    def free_for(self, write: bool) -> bool:
        if self.writer is not None or self.queue:
            return False
        return not (write and self.readers)

    def grant(self, actor: Actor, write: bool) -> None:
        self.stats.taken += 1
        if write:
            self.writer = actor
            self.since = actor.time_ns
        else:
            self.readers.append(actor)

    def drop(self, actor: Actor) -> None:
        if self.writer is actor:
            self.writer = None
            self.stats.hold_ns += actor.time_ns - self.since
        else:
            self.readers.remove(actor)

    def next_in_line(self) -> Iterator[tuple[Actor, bool]]:
        """Waiters that may have the lock now: the first writer alone, or all readers up to the next writer."""
        while self.queue:
            actor, write = self.queue[0]
            if self.writer is not None or (write and self.readers):
                return
            self.queue.popleft()
            yield actor, write


class Actor:
    """A running generator with the locks it holds and its virtual time."""

    def __init__(self, name: str, steps: Steps[Any]) -> None:
        self.name = name
        self.steps = steps
        self.time_ns: float = 0
        self.held = Held(name)
        self.answer: object = None
        self.pending: Effect | None = None
        self.done = False
        self.result: Any = None
        self.error: Exception | None = None
        self.stepped = 0


class _Locks:
    """The lock table and effect rules that both concurrent drivers share."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.states: dict[Lock, _LockState] = {}

    def state(self, lock: Lock) -> _LockState:
        if lock not in self.states:
            self.states[lock] = _LockState()
        return self.states[lock]

    def advance(self, actor: Actor) -> None:
        """Run an actor up to its next effect, in its own time."""
        meter, ops = self.host.meter, self.host.ops
        meter.now_ns = actor.time_ns
        ops.actor = actor.name
        try:
            actor.pending = actor.steps.send(actor.answer) if actor.stepped else next(actor.steps)
        except StopIteration as stop:
            actor.done, actor.result, actor.pending = True, stop.value, None
        except InvariantViolation:
            raise
        except Exception as error:
            actor.done, actor.error, actor.pending = True, error, None
        actor.stepped += 1
        actor.answer = None
        actor.time_ns = meter.now_ns

    def blocked(self, actor: Actor) -> bool:
        """Whether the actor's next effect is a lock that it cannot have now."""
        effect = actor.pending
        return (
            effect is not None
            and effect.lock is not None
            and effect.kind in ("read", "write")
            and not self.state(effect.lock).free_for(effect.kind == "write")
        )

    def apply(self, actor: Actor) -> list[Actor]:
        """Apply an actor's pending effect, which is not blocked. Returns the actors that a release lets go on."""
        effect, lock = actor.pending, actor.pending.lock if actor.pending else None
        actor.pending = None
        if effect is None or lock is None:
            return []
        state = self.state(lock)
        if effect.kind == "release":
            actor.held.drop(lock)
            return self._release(actor, lock)
        write = _TAKES[effect.kind]
        if effect.kind.startswith("try") and not state.free_for(write):
            actor.answer = BUSY
            return []
        actor.held.take(lock, write)
        state.grant(actor, write)
        return []

    def _release(self, actor: Actor, lock: Lock) -> list[Actor]:
        state = self.state(lock)
        state.drop(actor)
        woken = []
        for waiter, write in state.next_in_line():
            state.stats.wait_ns += max(0.0, actor.time_ns - waiter.time_ns)
            waiter.time_ns = max(waiter.time_ns, actor.time_ns)
            waiter.held.take(lock, write)
            state.grant(waiter, write)
            waiter.pending = None
            woken.append(waiter)
        return woken

    def drop_all(self, actor: Actor) -> list[Actor]:
        """An actor ended: it drops what it holds. To end with a lock and without an error is a bug."""
        if actor.held.locks and actor.error is None:
            raise InvariantViolation(f"{actor.name} ended with {actor.held.locks[-1][0].name} held", number=31)
        woken = []
        while actor.held.locks:
            lock, _ = actor.held.locks.pop()
            woken += self._release(actor, lock)
        return woken


class Timed:
    """N actors on a virtual clock. Who is earliest runs; locks queue, and waiting takes time.

    Each actor's time moves by what it charges; `elapsed_ns` is when the last one ended. Operations must be what one
    exit does in the kernel (one page, one call), never a batch over which no kernel would hold a lock.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self._locks = _Locks(host)
        self.actors: list[Actor] = []
        self.elapsed_ns: float = 0

    @property
    def lock_stats(self) -> dict[str, LockStats]:
        """What each lock cost, by name."""
        return {lock.name: state.stats for lock, state in self._locks.states.items()}

    def run(self, actors: Iterable[tuple[str, Steps[Any]]]) -> list[Any]:
        """Run all to their end; returns their results in order. The first error of an actor is raised after all ended.

        Raises InvariantViolation for a deadlock.
        """
        self.actors = [Actor(name, steps) for name, steps in actors]
        start = self.host.meter.now_ns
        heap: list[tuple[float, int, Actor]] = []
        for i, actor in enumerate(self.actors):
            actor.time_ns = start
            heap.append((start, i, actor))
        heapq.heapify(heap)
        order = {actor: i for i, actor in enumerate(self.actors)}
        waiting: set[Actor] = set()
        locks = self._locks

        def push(actor: Actor) -> None:
            heapq.heappush(heap, (actor.time_ns, order[actor], actor))

        while heap:
            _, _, actor = heapq.heappop(heap)
            while True:
                # The pending effect happens at the actor's time, so nobody earlier may be left waiting to act.
                if heap and heap[0][0] < actor.time_ns:
                    push(actor)
                    break
                if locks.blocked(actor):
                    effect = actor.pending
                    assert effect is not None and effect.lock is not None
                    state = locks.state(effect.lock)
                    state.stats.contended += 1
                    state.queue.append((actor, effect.kind == "write"))
                    waiting.add(actor)
                    break
                for woken in locks.apply(actor):
                    waiting.discard(woken)
                    push(woken)
                locks.advance(actor)
                if actor.done:
                    for woken in locks.drop_all(actor):
                        waiting.discard(woken)
                        push(woken)
                    break
        if waiting:
            raise InvariantViolation(f"deadlock: {', '.join(sorted(a.name for a in waiting))} wait for ever", number=31)
        end = max((a.time_ns for a in self.actors), default=start)
        self.elapsed_ns = end - start
        self.host.meter.now_ns = end
        self.host.ops.actor = "main"
        for actor in self.actors:
            if actor.error is not None:
                raise actor.error
        return [actor.result for actor in self.actors]


# ---- every order ----------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Case:
    """A small situation to explore: a host, the actors on it, and what must hold.

    check: called when all actors have ended, with their results (an error is an actor's result, too). step: called
    after each step, while others may be half way.
    """

    host: Host
    actors: list[tuple[str, Steps[Any]]]
    check: Callable[[list[Any]], None] = lambda results: None
    step: Callable[[], None] = lambda: None


@attrs.frozen
class Explored:
    """How much was explored."""

    schedules: int
    steps: int


MAX_STEPS = 10_000
"""Steps of one schedule after which it counts as a livelock."""


def explore(make: Callable[[], Case], *, limit: int | None = None) -> Explored:
    """Run the case under every order of its actors' steps, each time from the start.

    Actors may be interrupted before they take a lock and at every named point. Before dropping a lock they are not:
    a release can always be moved ahead of what others do meanwhile, so it makes no order of its own.
    An actor that yields the point `fault.retry` waits until another one has moved. Raises whatever a check raises,
    with the schedule that led there in a note; InvariantViolation for a deadlock. limit: stop after so many schedules.
    """
    prefix: list[int] = []
    schedules = steps = 0
    while True:
        choices, n = _run_once(make(), prefix)
        schedules += 1
        steps += n
        if limit is not None and schedules >= limit:
            return Explored(schedules, steps)
        # The last choice that has an alternative left; everything after it starts over.
        while choices and choices[-1][0] + 1 >= choices[-1][1]:
            choices.pop()
        if not choices:
            return Explored(schedules, steps)
        prefix = [taken for taken, _ in choices]
        prefix[-1] += 1


def _run_once(case: Case, prefix: list[int]) -> tuple[list[tuple[int, int]], int]:
    """One schedule: the choices of `prefix`, then always the first. Returns (taken, of how many) and the steps made."""
    actors = [Actor(name, steps) for name, steps in case.actors]
    locks = _Locks(case.host)
    choices: list[tuple[int, int]] = []
    trail: list[str] = []
    resting: Actor | None = None
    n = 0
    try:
        for actor in actors:
            # What an actor does before its first effect is its own business.
            locks.advance(actor)
        while any(not actor.done for actor in actors):
            able = [a for a in actors if not a.done and not locks.blocked(a)]
            if not able:
                raise InvariantViolation(
                    "deadlock: " + ", ".join(f"{a.name} wants {a.pending}" for a in actors if not a.done), number=31
                )
            awake = [a for a in able if a is not resting] or able
            taken = 0
            if len(awake) > 1:
                taken = prefix[len(choices)] if len(choices) < len(prefix) else 0
                choices.append((taken, len(awake)))
            actor = awake[taken]
            n += 1
            if n > MAX_STEPS:
                raise InvariantViolation(f"no end after {MAX_STEPS} steps: a livelock")
            locks.apply(actor)
            locks.advance(actor)
            while actor.pending is not None and actor.pending.kind == "release":
                locks.apply(actor)
                locks.advance(actor)
            trail.append(f"{actor.name}: {actor.pending if actor.pending else 'end'}")
            if actor.done:
                locks.drop_all(actor)
            retries = actor.pending is not None and actor.pending.name == "fault.retry"
            resting = actor if retries else None
            case.step()
        case.check([a.error if a.error is not None else a.result for a in actors])
    except Exception as error:
        error.add_note("schedule:\n  " + "\n  ".join(trail))
        raise
    return choices, n
