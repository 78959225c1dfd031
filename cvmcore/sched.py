"""Drivers: who runs next. `Timed` puts actors on a virtual clock with queueing locks; `explore` tries every order.

(The third driver, `drain`, is in `cvmcore.effects`: one operation after the other, nothing contends.)

All of them run the same operations: generators that yield `Effect`s. `Lockdep` is `drain` with the lock order checked.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import attrs

from cvmcore.effects import BUSY, Effect, Lock, Steps
from cvmcore.errors import InvariantViolation, UapiError
from cvmcore.host import Host

R = TypeVar("R")

ENDLESS = 300_000
"""Steps after which an operation that nobody contends with is not going to end."""


class Held:
    """The locks that one actor holds, in the order it took them; taking one out of order is an error."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.locks: list[tuple[Lock, bool]] = []

    def take(self, lock: Lock, write: bool) -> None:
        """A lock is taken; its rank must not be lower than that of any that is held."""
        for held, _ in self.locks:
            if held is lock:
                raise InvariantViolation(f"{self.owner} takes {lock.name} twice", number=31)
            if held.rank > lock.rank:
                raise InvariantViolation(
                    f"{self.owner} takes {lock.name} (rank {lock.rank}) under {held.name} (rank {held.rank})", number=31
                )
        self.locks.append((lock, write))

    def drop(self, lock: Lock) -> None:
        """A lock is released; it must be held."""
        for i in range(len(self.locks) - 1, -1, -1):
            if self.locks[i][0] is lock:
                del self.locks[i]
                return
        raise InvariantViolation(f"{self.owner} drops {lock.name}, which it does not hold", number=31)

    def holds(self, name: str, write: bool | None = None) -> bool:
        """Whether a lock of this (unqualified) name, or a shard of it, is held, in this mode where one is given."""
        return any(
            lock.name.rpartition(".")[2].partition("[")[0] == name and (write is None or mode == write)
            for lock, mode in self.locks
        )


class Lockdep:
    """`drain` that checks the lock order, that no operation returns with a lock, and that it returns (kernel: lockdep).

    Use it as `Host(drive=Lockdep())`; `held` is what the running operation holds, for checks inside observers.
    """

    def __init__(self) -> None:
        self.held = Held("main")

    def __call__(self, steps: Steps[R]) -> R:
        outer, answer = len(self.held.locks), None
        left, last = ENDLESS, ""
        try:
            while True:
                effect = steps.send(answer)
                answer = None
                left -= 1
                if left < 8:
                    last += f"{effect.name}; "
                    if left == 0:
                        raise InvariantViolation(f"an operation did not end in {ENDLESS} steps, the last: {last[:-2]}")
                if effect.lock is None:
                    continue
                if effect.takes is None:
                    self.held.drop(effect.lock)
                elif effect.tries and self.is_busy():
                    answer = BUSY
                else:
                    self.held.take(effect.lock, effect.takes)
        except StopIteration as stop:
            if len(self.held.locks) != outer:
                kept = self.held.locks[-1][0].name
                raise InvariantViolation(f"an operation returned with {kept} held", number=31) from None
            result: R = stop.value
            return result
        except Exception as error:
            still = ", ".join(lock.name for lock, _ in self.held.locks[outer:])
            del self.held.locks[outer:]
            if still and isinstance(error, UapiError):
                raise InvariantViolation(f"an operation failed with {still} held: {error}", number=31) from error
            raise

    def is_busy(self) -> bool:
        """Whether the lock that is tried now is somebody else's. Nobody else is there."""
        return False


# ---- locks that are really taken ------------------------------------------------------------------------------


@attrs.define(eq=False)
class LockStats:
    """What a lock cost in a timed run."""

    taken: int = 0
    contended: int = 0
    wait_ns: float = 0
    hold_ns: float = 0

    def add(self, other: LockStats) -> None:
        """Count another lock's cost with this one's."""
        self.taken += other.taken
        self.contended += other.contended
        self.wait_ns += other.wait_ns
        self.hold_ns += other.hold_ns


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
        self.advanced = 0
        """How often it went on."""
        self.held = Held(name)
        self.answer: object = None
        self.pending: Effect | None = None
        self.done = False
        self.result: Any = None
        self.error: Exception | None = None


class _Locks:
    """The lock table and effect rules that both concurrent drivers share."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.states: dict[Lock, _LockState] = {}

    def state(self, lock: Lock) -> _LockState:
        state = self.states.get(lock)
        if state is None:
            state = self.states[lock] = _LockState()
        return state

    def advance(self, actor: Actor) -> None:
        """Run an actor up to its next effect, in its own time."""
        meter, ops = self.host.meter, self.host.ops
        meter.now_ns = actor.time_ns
        ops.actor = actor.name
        actor.advanced += 1
        try:
            actor.pending = actor.steps.send(actor.answer)
        except StopIteration as stop:
            actor.done, actor.result, actor.pending = True, stop.value, None
        except InvariantViolation:
            raise
        except Exception as error:
            actor.done, actor.error, actor.pending = True, error, None
        actor.answer = None
        actor.time_ns = meter.now_ns

    def blocked(self, actor: Actor) -> bool:
        """Whether the actor's next effect is a lock that it cannot have now."""
        effect = actor.pending
        if effect is None or effect.takes is None or effect.tries:
            return False
        assert effect.lock is not None
        return not self.state(effect.lock).free_for(effect.takes)

    def apply(self, actor: Actor) -> Sequence[Actor]:
        """Apply an actor's pending effect, which is not blocked. Returns the actors that a release lets go on."""
        effect = actor.pending
        actor.pending = None
        if effect is None or effect.lock is None:
            return ()
        lock, write = effect.lock, effect.takes
        if write is None:
            actor.held.drop(lock)
            return self._release(actor, lock)
        state = self.state(lock)
        if effect.tries and not state.free_for(write):
            actor.answer = BUSY
            return ()
        actor.held.take(lock, write)
        state.grant(actor, write)
        if self.host.ops.watches_locks:
            self.host.ops.locked("take", lock, write, actor.name, actor.time_ns)
        return ()

    def wait(self, actor: Actor) -> None:
        """Queue an actor for the lock that it is blocked on."""
        assert actor.pending is not None and actor.pending.lock is not None
        lock, write = actor.pending.lock, actor.pending.kind == "write"
        state = self.state(lock)
        state.stats.contended += 1
        state.queue.append((actor, write))
        if self.host.ops.watches_locks:
            holders = [holder.name for holder in (state.writer, *state.readers) if holder is not None]
            self.host.ops.locked("wait", lock, write, actor.name, actor.time_ns, tuple(holders))

    def _release(self, actor: Actor, lock: Lock) -> list[Actor]:
        state = self.state(lock)
        if self.host.ops.watches_locks:
            self.host.ops.locked("drop", lock, state.writer is actor, actor.name, actor.time_ns)
        state.drop(actor)
        woken: list[Actor] = []
        if not state.queue:
            return woken
        for waiter, write in state.next_in_line():
            state.stats.wait_ns += max(0.0, actor.time_ns - waiter.time_ns)
            waiter.time_ns = max(waiter.time_ns, actor.time_ns)
            waiter.held.take(lock, write)
            state.grant(waiter, write)
            if self.host.ops.watches_locks:
                self.host.ops.locked("take", lock, write, waiter.name, waiter.time_ns)
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
        """What each lock cost, by name; locks that share one are one row."""
        found: dict[str, LockStats] = {}
        for lock, state in self._locks.states.items():
            found.setdefault(lock.name, LockStats()).add(state.stats)
        return found

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
                effect = actor.pending
                if effect is not None and effect.lock is not None:
                    if locks.blocked(actor):
                        locks.wait(actor)
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


@attrs.frozen
class Standing:
    """Where a case stands, in fingerprints. state: of all that actors can see of each other, locks apart; where: of
    each actor with what is its alone.

    tied: actors that hold on to something of `state` that came there since the case was made: `where` they stand must
    be taken again when it changes. apart: whether an actor's next step depends on nothing but the state, where that
    actor stands, and who has locks; not so where two actors hold on to one thing that is not of the state.
    """

    state: object
    where: tuple[object, ...]
    tied: frozenset[int] = attrs.field(default=frozenset(), eq=False)
    apart: bool = attrs.field(default=True, eq=False)


@attrs.define(eq=False)
class Case:
    """A small situation to explore: a host, the actors on it, and what must hold.

    check: called when all actors have ended, with their results (an error is an actor's result, too). step: called
    after steps, while others may be half way. state: where it stands, given the actors; with it, no situation is
    explored twice. again: puts it back to its start and gives the actors anew, where that is less work than to make
    another case.
    """

    host: Host
    actors: list[tuple[str, Steps[Any]]]
    check: Callable[[list[Any]], None] = lambda results: None
    step: Callable[[], None] = lambda: None
    state: Callable[[Sequence[Actor]], Standing] | None = None
    again: Callable[[], list[tuple[str, Steps[Any]]]] | None = None


@attrs.frozen
class Explored:
    """How much was explored: schedules that came to their end, those given up as known already; steps that were run,
    those of schedules that begin alike counted each time, and steps of which it was known where they lead; how often
    the case was begun; situations (the state and where each actor stands) and ends that differ, where the case can
    tell."""

    schedules: int
    steps: int
    pruned: int = 0
    situations: int = 0
    ends: int = 0
    known: int = 0
    runs: int = 0


MAX_STEPS = 10_000
"""Steps of one schedule after which it counts as a livelock."""

Locks: TypeAlias = frozenset[tuple[str, bool]]
"""Locks by (name, write)."""


@attrs.frozen
class _Step:
    """One step: the locks it took, tried or dropped, those that it tried, and whether its actor retries now."""

    locks: Locks
    tried: Locks
    retries: bool


class _Run:
    """A case under way: its actors, what they did so far, and who can go on."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.actors = [Actor(name, steps) for name, steps in case.actors]
        self.locks = _Locks(case.host)
        self.trail: list[tuple[int, str]] = []
        """Who went at each step, and up to which effect."""

    def start(self) -> None:
        """What an actor does before its first effect is its own business."""
        for actor in self.actors:
            self.locks.advance(actor)

    def able(self) -> list[int]:
        """Who can go on; nobody, when all have ended. InvariantViolation for a deadlock."""
        able = [i for i, actor in enumerate(self.actors) if not actor.done and not self.locks.blocked(actor)]
        if not able and (waiting := [actor for actor in self.actors if not actor.done]):
            raise InvariantViolation(
                "deadlock: " + ", ".join(f"{actor.name} wants {actor.pending}" for actor in waiting), number=31
            )
        return able

    def busy(self) -> frozenset[int]:
        """Whose next step tries a lock that is not free."""
        found = []
        for i, actor in enumerate(self.actors):
            effect = actor.pending
            if effect is not None and effect.tries:
                assert effect.lock is not None and effect.takes is not None
                if not self.locks.state(effect.lock).free_for(effect.takes):
                    found.append(i)
        return frozenset(found)

    def holders(self) -> frozenset[tuple[str, str]]:
        """Locks that are held, with who holds them, by their names."""
        return frozenset((lock.name, actor.name) for actor in self.actors for lock, _ in actor.held.locks)

    def step(self, taken: int) -> _Step:
        """One step of an actor: up to its next effect that is not a release."""
        if len(self.trail) == MAX_STEPS:
            raise InvariantViolation(f"no end after {MAX_STEPS} steps: a livelock")
        actor = self.actors[taken]
        self.trail.append((taken, "fails"))
        touched: set[tuple[str, bool]] = set()
        tried: set[tuple[str, bool]] = set()
        self._apply(actor, touched, tried)
        self.locks.advance(actor)
        while actor.pending is not None and actor.pending.kind == "release":
            self._apply(actor, touched, tried)
            self.locks.advance(actor)
        if actor.done:
            touched |= {(lock.name, write) for lock, write in actor.held.locks}
            self.locks.drop_all(actor)
        self.trail[-1] = taken, str(actor.pending) if actor.pending else "end"
        retries = actor.pending is not None and actor.pending.name == "fault.retry"
        return _Step(frozenset(touched), frozenset(tried), retries)

    def _apply(self, actor: Actor, touched: set[tuple[str, bool]], tried: set[tuple[str, bool]]) -> None:
        effect = actor.pending
        if effect is not None and effect.lock is not None:
            write = effect.takes
            if write is None:
                write = next((w for lock, w in actor.held.locks if lock is effect.lock), True)
            touched.add((effect.lock.name, write))
            if effect.tries:
                tried.add((effect.lock.name, write))
        self.locks.apply(actor)

    def results(self) -> list[Any]:
        """What the actors returned, or raised."""
        return [actor.error if actor.error is not None else actor.result for actor in self.actors]

    def close(self) -> None:
        for actor in self.actors:
            actor.steps.close()


@attrs.frozen
class _Footprint:
    """What one step did to what other actors can see: whether it changed the state, and its locks."""

    wrote: bool
    locks: Locks

    def commutes(self, other: _Footprint) -> bool:
        """Whether the two steps, of different actors and from one situation, may change places."""
        if self.wrote or other.wrote:
            return False
        return not any(
            name == other_name and (write or other_write)
            for name, write in self.locks
            for other_name, other_write in other.locks
        )


@attrs.frozen(eq=False)
class _Place:
    """A situation, and who can do what there. stands: None where the case does not tell."""

    stands: Standing | None
    able: list[int]
    busy: frozenset[int]
    holders: frozenset[tuple[str, str]]

    @property
    def state(self) -> object:
        return self if self.stands is None else self.stands.state

    def from_here(self, actor: int) -> object:
        """All that decides what an actor's next step does; None where that cannot be told."""
        if self.stands is None or not self.stands.apart:
            return None
        return actor, self.stands.state, self.stands.where[actor], actor in self.busy


@attrs.frozen
class _Led:
    """Where a step led: the state after it, where its actor stands, and whether that is tied to the state."""

    state: object
    where: object
    tied: bool
    step: _Step


@attrs.frozen
class _Found:
    """What made an actor retry: the state, and the holders of the locks (by name) that it tried."""

    state: object
    tried: frozenset[str]
    holders: frozenset[tuple[str, str]]

    @staticmethod
    def at(place: _Place, tried: frozenset[str]) -> _Found:
        return _Found(place.state, tried, frozenset(one for one in place.holders if one[0] in tried))


@attrs.define(eq=False)
class _Choice:
    """One place in a schedule: who could go, who goes, who went in earlier schedules and what that did.

    able: whom to try; asleep: actors whose next step was explored before, in an order that is the same but for steps
    that commute. awake: who can go on and would not only find again what made it retry. resting: actors that retry,
    with what they found and would find again: the state, and who had the locks they tried. tries: the locks that each
    actor tried since it began.
    """

    place: _Place
    able: list[int]
    asleep: dict[int, _Footprint]
    resting: dict[int, _Found]
    running: int | None
    """Who could simply go on; everybody else would interrupt it."""
    interruptions: int
    awake: list[int]
    tries: tuple[Locks, ...]
    taken: int = 0
    tried: dict[int, _Footprint] = attrs.field(factory=dict)
    then: _Choice | None = None
    """The place that the step taken leads to, where that was known before it was run."""

    def sleepers(self) -> dict[int, _Footprint]:
        """Who sleeps after the step that is taken here: everybody explored before whose step commutes with it."""
        step = self.tried[self.taken]
        before = {**self.asleep, **self.tried}
        return {i: other for i, other in before.items() if i != self.taken and step.commutes(other)}

    def next_untried(self) -> int | None:
        return next((i for i in self.able if i not in self.tried and i not in self.asleep), None)

    def after(self, step: _Step, place: _Place, most: int | None) -> _Choice:
        """The place that the step taken has led to: whoever went last first, so that interruptions come later."""
        tries, resting, locks = list(self.tries), dict(self.resting), step.locks
        tries[self.taken] |= step.tried
        if step.retries:
            # Whether it will rest depends on every lock that it tried since it began.
            locks |= tries[self.taken]
            resting[self.taken] = _Found.at(place, frozenset(name for name, _ in tries[self.taken]))
            tries[self.taken] = frozenset()
        self.tried[self.taken] = _Footprint(self.place.state != place.state, locks)
        resting = {i: was for i, was in resting.items() if was == _Found.at(place, was.tried)}
        everybody = awake = [i for i in place.able if i not in resting] or place.able
        interrupted = self.interruptions + (self.running not in (None, self.taken))
        running = self.taken if self.taken in awake else None
        if running is not None:
            awake = [running, *(i for i in awake if i != running)]
            if interrupted == most:
                awake = [running]
        # With a bound, an order that is the same but for commuting steps may be out of bounds: nobody sleeps.
        asleep = self.sleepers() if most is None else {}
        return _Choice(place, awake, asleep, resting, running, interrupted, everybody, tuple(tries))


def explore(make: Callable[[], Case], *, limit: int | None = None, interruptions: int | None = None) -> Explored:
    """Run the case under every order of its actors' steps, each time from the start.

    Actors may be interrupted before they take a lock and at every named point. Before dropping a lock they are not:
    a release can always be moved ahead of what others do meanwhile, so it makes no order of its own.
    An actor that yields the point `fault.retry` waits until another one has moved. Where the case tells its `state`, it
    waits until another one has changed something; a situation that was met before is not gone on with, nor looked at
    again; of orders that differ only in steps which commute one is run (sleep sets with states kept, Godefroid 1996);
    and a step that was run before, from the same state by an actor that stood where it stands now, is not run to see
    where it leads.
    Raises whatever a check raises, with the schedule that led there in a note; InvariantViolation for a deadlock, and
    where actors go round in a circle that nobody can leave.
    limit: stop after so many schedules. interruptions: only orders in which no more actors than that are interrupted
    when they could go on; for cases with too many steps to try all orders.
    """
    return _Search(make, interruptions, limit).run()


def seek(make: Callable[[], Case]) -> Explored:
    """`explore`, with the orders first that interrupt no actor, one, and two: a race that is there shows in the one
    that is easiest to read, and soon (iterative context bounding, Musuvathi and Qadeer 2007)."""
    for interruptions in range(3):
        explore(make, interruptions=interruptions)
    return explore(make)


class _Search:
    """A depth-first search: the path of choices that is tried, and what is known from the paths before it."""

    def __init__(self, make: Callable[[], Case], interruptions: int | None, limit: int | None) -> None:
        self.make = make
        self.most = interruptions
        self.limit = limit
        self.case: Case | None = None
        self.path: list[_Choice] = []
        self.met: dict[object, frozenset[int]] = {}
        """Situations that were met, and who was asleep whenever one was."""
        self.places: dict[object, _Place] = {}
        self.led: dict[object, _Led] = {}
        """Where steps led, by all that decides it."""
        self.looked_at: set[object] = set()
        self.ends: set[object] = set()
        self.schedules = self.pruned = self.steps = self.known = self.runs = 0

    def run(self) -> Explored:
        path = self.path
        while True:
            self._run_once()
            # The last choice that has an alternative left; everything after it starts over.
            while path and not self._pick(path[-1]):
                path.pop()
            if not path:
                return Explored(
                    self.schedules, self.steps, self.pruned, len(self.met), len(self.ends), self.known, self.runs
                )

    def _run_once(self) -> None:
        """One schedule: the choices of the path, then always the first; what is chosen is appended. It ends with its
        actors, or where all that could go on is known."""
        path = self.path
        self.case = case = _anew(self.case, self.make)
        self.runs += 1
        run = _Run(case)
        try:
            run.start()
            for choice in path[:-1]:
                self._step(run, choice)
            step = self._step(run, path[-1]) if path else None
            while (choice := self._arrive(run, step)) is not None:  # type: ignore[assignment]
                path.append(choice)
                if not self._pick(choice):
                    return
                step = self._step(run, choice)
        except Exception as error:
            names = [actor.name for actor in run.actors]
            error.add_note("schedule:\n  " + "\n  ".join(f"{names[i]}: {what}" for i, what in run.trail))
            error.schedule = [taken for taken, _ in run.trail]  # type: ignore[attr-defined]
            raise
        finally:
            run.close()

    def _step(self, run: _Run, choice: _Choice) -> _Step:
        if choice.taken not in run.able():
            raise InvariantViolation("a case must do the same each time that it is made")
        self.steps += 1
        return run.step(choice.taken)

    def _arrive(self, run: _Run, step: _Step | None) -> _Choice | None:
        """The choice where the run stands, after the last step of the path; None where there is no need to go on."""
        case = run.case
        if step is None:
            place = self._place(run, None if case.state is None else case.state(run.actors))
            choice = _Choice(place, place.able, {}, {}, None, 0, place.able, tuple(frozenset() for _ in run.actors))
        else:
            last = self.path[-1]
            if last.then is not None:
                return last.then
            place = self._place(run, self._stands(run, last, step))
            if case.state is None or place.state not in self.looked_at:
                case.step()
                self.looked_at.add(place.state)
            choice = last.after(step, place, self.most)
        if not place.able:
            if place.stands is None or place.stands not in self.ends:
                case.check(run.results())
                self.ends.add(place.stands)
            self.schedules += 1
            return None
        if self._circle(choice):
            raise InvariantViolation("a livelock: after some steps everything is as it was before")
        if self._news(choice):
            return choice
        self.pruned += 1
        return None

    def _stands(self, run: _Run, last: _Choice, step: _Step) -> Standing | None:
        """Where the run stands after a step: looked up, or looked at and noted."""
        if run.case.state is None:
            return None
        before, i = last.place.from_here(last.taken), last.taken
        stands = self._known(last, i)
        if stands is None:
            stands = run.case.state(run.actors)
            if before is not None and stands.apart:
                self.led[before] = _Led(stands.state, stands.where[i], i in stands.tied, step)
        return stands

    def _known(self, choice: _Choice, actor: int) -> Standing | None:
        """Where an actor's next step leads, where that is known."""
        place = choice.place
        led = self.led.get(place.from_here(actor))
        if led is None:
            return None
        assert place.stands is not None
        if led.state != place.state and place.stands.tied - {actor}:
            return None
        where = (*place.stands.where[:actor], led.where, *place.stands.where[actor + 1 :])
        tied = place.stands.tied - {actor}
        return Standing(led.state, where, tied | {actor} if led.tied else tied)

    def _place(self, run: _Run, stands: Standing | None) -> _Place:
        if stands is None:
            return _Place(None, run.able(), run.busy(), run.holders())
        place = self.places.get(stands)
        if place is None:
            place = self.places[stands] = _Place(stands, run.able(), run.busy(), run.holders())
        return place

    def _pick(self, choice: _Choice) -> bool:
        """Choose who goes next, at the end of the path: the first whose step leads to what is not known, or of which
        that is not known without running it. False where nobody is left."""
        choice.then = None
        while self.limit is None or self.schedules < self.limit:
            i = choice.next_untried()
            if i is None:
                return False
            choice.taken = i
            stands = self._known(choice, i)
            place = None if stands is None else self.places.get(stands)
            if place is None or (not place.able and stands not in self.ends):
                return True
            then = choice.after(self.led[choice.place.from_here(i)].step, place, self.most)
            if place.able and self._circle(then):
                return True
            self.known += 1
            if not place.able:
                self.schedules += 1
            elif self._news(then):
                choice.then = then
                return True
            else:
                self.pruned += 1
        return False

    def _news(self, choice: _Choice) -> bool:
        """Whether there is anybody to try: not where the situation was met and all is known."""
        if choice.place.stands is None:
            return True
        key = (choice.place.stands, frozenset(choice.resting))
        if self.most is not None:
            key = (*key, choice.running, choice.interruptions)  # type: ignore[assignment]
        asleep = frozenset(choice.asleep)
        before = self.met.get(key)
        if before is not None:
            # Whoever was awake then was tried then; those that slept then, and do not now, have their turn.
            choice.able = [i for i in choice.able if i in before]
            asleep &= before
        self.met[key] = asleep
        return choice.next_untried() is not None

    def _circle(self, choice: _Choice) -> bool:
        """Whether the path came back to a situation, and everybody who could have led out of it has gone along."""
        if choice.place.stands is None:
            return False
        for at, earlier in enumerate(self.path):
            if earlier.place.stands == choice.place.stands:
                circle = self.path[at:]
                return {i for one in circle for i in one.awake} == {one.taken for one in circle}
        return False


@attrs.frozen
class Played:
    """One schedule that was run: who went at each step (the actor's number), and up to which effect."""

    names: list[str]
    steps: list[tuple[int, str]]
    error: Exception | None = None

    @property
    def schedule(self) -> list[int]:
        """Whose turn it was, step by step."""
        return [actor for actor, _ in self.steps]


def play(case: Case, choose: Callable[[int, list[int]], int]) -> Played:
    """Run one schedule: `choose(step, able)` says which of the actors that can go on goes on. What a check raises is
    kept in the result."""
    run = _Run(case)
    error: Exception | None = None
    resting: set[int] = set()
    try:
        run.start()
        while able := run.able():
            taken = choose(len(run.trail), [i for i in able if i not in resting] or able)
            if taken not in able:
                name = run.actors[taken].name
                raise InvariantViolation(f"step {len(run.trail)}: {name} cannot go on there")
            resting = resting | {taken} if run.step(taken).retries else set()
            case.step()
        case.check(run.results())
    except Exception as caught:
        error = caught
    finally:
        run.close()
    return Played([actor.name for actor in run.actors], run.trail, error)


def replay(case: Case, schedule: Sequence[int]) -> Played:
    """Run a schedule again; behind its end whoever can go on goes on, the first of them first."""
    return play(case, lambda step, able: schedule[step] if step < len(schedule) else able[0])


def at_random(make: Callable[[], Case], n: int, seed: int = 0) -> Played | None:
    """n schedules at random: the first that goes wrong, or None."""
    chance = random.Random(seed)
    case: Case | None = None
    for _ in range(n):
        case = _anew(case, make)
        played = play(case, lambda step, able: chance.choice(able))
        if played.error is not None:
            return played
    return None


def _anew(case: Case | None, make: Callable[[], Case]) -> Case:
    """The case from its start; another one, where it cannot be put back."""
    if case is None or case.again is None:
        return make()
    case.actors = case.again()
    return case
