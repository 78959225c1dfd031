"""Drivers: who runs next. `Timed` puts actors on a virtual clock with queueing locks; `explore` tries every order.

(The third driver, `drain`, is in `cvmcore.effects`: one operation after the other, nothing contends.)

All of them run the same operations: generators that yield `Effect`s. `Lockdep` is `drain` with the lock order checked.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

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


@attrs.define(eq=False)
class Case:
    """A small situation to explore: a host, the actors on it, and what must hold.

    check: called when all actors have ended, with their results (an error is an actor's result, too). step: called
    after steps, while others may be half way. state: two fingerprints, of all that actors can see of each other, locks
    apart, and of that and of the objects that it is given, the actors, too; with it, no situation is explored twice.
    again: puts it back to its start and gives the actors anew, where that is less work than to make another case.
    """

    host: Host
    actors: list[tuple[str, Steps[Any]]]
    check: Callable[[list[Any]], None] = lambda results: None
    step: Callable[[], None] = lambda: None
    state: Callable[[Sequence[object]], tuple[object, object]] | None = None
    again: Callable[[], list[tuple[str, Steps[Any]]]] | None = None


@attrs.frozen
class Explored:
    """How much was explored: schedules that came to their end, those given up as known already, steps of all;
    situations (the state and where each actor stands) and ends that differ, where the case can tell."""

    schedules: int
    steps: int
    pruned: int = 0
    situations: int = 0
    ends: int = 0


MAX_STEPS = 10_000
"""Steps of one schedule after which it counts as a livelock."""


@attrs.frozen
class _Footprint:
    """What one step did to what other actors can see: whether it changed the state, and its locks by (name, write)."""

    wrote: bool
    locks: frozenset[tuple[str, bool]]

    def commutes(self, other: _Footprint) -> bool:
        """Whether the two steps, of different actors and from one situation, may change places."""
        if self.wrote or other.wrote:
            return False
        return not any(
            name == other_name and (write or other_write)
            for name, write in self.locks
            for other_name, other_write in other.locks
        )


@attrs.frozen
class _Found:
    """What made an actor retry: the state, and the holders of the locks (by name) that it tried."""

    state: object
    tried: frozenset[str]
    holders: frozenset[tuple[str, str]]

    @staticmethod
    def now(state: object, tried: frozenset[str], actors: list[Actor]) -> _Found:
        held = {(lock.name, a.name) for a in actors for lock, _ in a.held.locks if lock.name in tried}
        return _Found(state, tried, frozenset(held))


@attrs.define(eq=False)
class _Choice:
    """One place in a schedule: who could go, who goes, who went in earlier schedules and what that did.

    able: whom to try; asleep: actors whose next step was explored before, in an order that is the same but for steps
    that commute. awake: who can go on and would not only find again what made it retry. resting: actors that retry,
    with what they found and would find again: the state, and who had the locks they tried.
    """

    able: list[int]
    asleep: dict[int, _Footprint]
    resting: dict[int, _Found]
    running: int | None
    """Who could simply go on; everybody else would interrupt it."""
    interruptions: int
    awake: list[int]
    state: object = None
    situation: object = None
    taken: int = 0
    tried: dict[int, _Footprint] = attrs.field(factory=dict)

    def sleepers(self) -> dict[int, _Footprint]:
        """Who sleeps after the step that is taken here: everybody explored before whose step commutes with it."""
        step = self.tried[self.taken]
        before = {**self.asleep, **self.tried}
        return {i: other for i, other in before.items() if i != self.taken and step.commutes(other)}

    def next_untried(self) -> int | None:
        return next((i for i in self.able if i not in self.tried and i not in self.asleep), None)


def explore(make: Callable[[], Case], *, limit: int | None = None, interruptions: int | None = None) -> Explored:
    """Run the case under every order of its actors' steps, each time from the start.

    Actors may be interrupted before they take a lock and at every named point. Before dropping a lock they are not:
    a release can always be moved ahead of what others do meanwhile, so it makes no order of its own.
    An actor that yields the point `fault.retry` waits until another one has moved. Where the case tells its `state`, it
    waits until another one has changed something; a situation that was met before is not gone on with, nor looked at
    again; and of orders that differ only in steps which commute one is run (sleep sets with states kept, Godefroid
    1996).
    Raises whatever a check raises, with the schedule that led there in a note; InvariantViolation for a deadlock, and
    where actors go round in a circle that nobody can leave.
    limit: stop after so many schedules. interruptions: only orders in which no more actors than that are interrupted
    when they could go on; for cases with too many steps to try all orders.
    """
    return _Search(make, interruptions).run(limit)


def seek(make: Callable[[], Case]) -> Explored:
    """`explore`, with the orders first that interrupt no actor, one, and two: a race that is there shows in the one
    that is easiest to read, and soon (iterative context bounding, Musuvathi and Qadeer 2007)."""
    for interruptions in range(3):
        explore(make, interruptions=interruptions)
    return explore(make)


class _Search:
    """A depth-first search: the path of choices that is tried, and what is known from the paths before it."""

    def __init__(self, make: Callable[[], Case], interruptions: int | None) -> None:
        self.make = make
        self.most = interruptions
        self.case: Case | None = None
        self.path: list[_Choice] = []
        self.met: dict[object, frozenset[int]] = {}
        """Situations that were met, and who was asleep whenever one was."""
        self.looked_at: set[object] = set()
        self.ends: set[object] = set()

    def run(self, limit: int | None) -> Explored:
        path = self.path
        schedules = steps = pruned = 0
        while True:
            ended, n = self._run_once()
            schedules += ended
            pruned += not ended
            steps += n
            # The last choice that has an alternative left; everything after it starts over.
            while path and path[-1].next_untried() is None:
                path.pop()
            if not path or (limit is not None and schedules >= limit):
                return Explored(schedules, steps, pruned, len(self.met), len(self.ends))
            path[-1].taken = path[-1].next_untried() or 0

    def _start(self) -> Case:
        """The case from its start."""
        self.case = _anew(self.case, self.make)
        return self.case

    def _run_once(self) -> tuple[bool, int]:
        """One schedule: the choices of the path, then always the first, with at most so many interruptions; what is
        chosen is appended. Returns whether it came to its end (else all that could go on was known), and the steps."""
        case, path = self._start(), self.path
        actors = [Actor(name, steps) for name, steps in case.actors]
        locks = _Locks(case.host)
        known = len(path) - 1
        trail: list[str] = []
        n = 0
        try:
            for actor in actors:
                # What an actor does before its first effect is its own business.
                locks.advance(actor)
            resting: dict[int, _Found] = path[-1].resting if path else {}
            tries: list[set[tuple[str, bool]]] = [set() for _ in actors]
            state, situation = (None, None) if path else _state(case, actors)
            while any(not actor.done for actor in actors):
                able = [i for i, a in enumerate(actors) if not a.done and not locks.blocked(a)]
                if not able:
                    raise InvariantViolation(
                        "deadlock: " + ", ".join(f"{a.name} wants {a.pending}" for a in actors if not a.done),
                        number=31,
                    )
                if n == len(path):
                    resting = {i: was for i, was in resting.items() if was == _Found.now(state, was.tried, actors)}
                    awake = [i for i in able if i not in resting] or able
                    choice = _next_choice(path, awake, resting, self.most)
                    choice.state, choice.situation = state, situation
                    first = self._news(choice)
                    if first is None:
                        return False, n
                    choice.taken = first
                    path.append(choice)
                choice = path[n]
                if choice.taken not in able:
                    raise InvariantViolation("a case must do the same each time that it is made")
                actor = actors[choice.taken]
                touched = _step(locks, actor, tries[choice.taken])
                n += 1
                if n > MAX_STEPS:
                    raise InvariantViolation(f"no end after {MAX_STEPS} steps: a livelock")
                trail.append(f"{actor.name}: {actor.pending if actor.pending else 'end'}")
                retries = actor.pending is not None and actor.pending.name == "fault.retry"
                if n > known:
                    state, situation = _state(case, actors)
                    if case.state is None or state not in self.looked_at:
                        case.step()
                        self.looked_at.add(state)
                    if retries:
                        # Whether it will rest depends on every lock that it tried since it began.
                        touched |= tries[choice.taken]
                        tried = frozenset(name for name, _ in tries[choice.taken])
                        resting = {**resting, choice.taken: _Found.now(state, tried, actors)}
                    choice.tried[choice.taken] = _Footprint(choice.state != state, touched)
                if retries:
                    tries[choice.taken].clear()
            if case.state is None or situation not in self.ends:
                case.check([a.error if a.error is not None else a.result for a in actors])
                self.ends.add(situation)
        except Exception as error:
            error.add_note("schedule:\n  " + "\n  ".join(trail))
            error.schedule = [choice.taken for choice in path[:n]]  # type: ignore[attr-defined]
            raise
        finally:
            for actor in actors:
                actor.steps.close()
        return True, n

    def _news(self, choice: _Choice) -> int | None:
        """Who goes first in a situation, and whom there is no need to try; None where it was met and all is known."""
        if choice.situation is None:
            return choice.next_untried()
        key = (choice.situation, frozenset(choice.resting))
        if self.most is not None:
            key = (*key, choice.running, choice.interruptions)  # type: ignore[assignment]
        self._go_round(choice)
        asleep = frozenset(choice.asleep)
        before = self.met.get(key)
        if before is not None:
            # Whoever was awake then was tried then; those that slept then, and do not now, have their turn.
            choice.able = [i for i in choice.able if i in before]
            asleep &= before
        self.met[key] = asleep
        return choice.next_untried()

    def _go_round(self, choice: _Choice) -> None:
        """InvariantViolation where the path came back to a situation, and everybody who could have led out of it has
        gone along."""
        for at, earlier in enumerate(self.path):
            if earlier.situation == choice.situation:
                circle = self.path[at:]
                if {i for one in circle for i in one.awake} == {one.taken for one in circle}:
                    raise InvariantViolation("a livelock: after some steps everything is as it was before")
                return


@attrs.frozen
class Played:
    """One schedule that was run: who went at each step (the actor's number), and up to which effect."""

    names: list[str]
    steps: list[tuple[int, str]]
    error: Exception | None = None

    @property
    def schedule(self) -> list[int]:
        return [actor for actor, _ in self.steps]


def play(case: Case, choose: Callable[[int, list[int]], int]) -> Played:
    """Run one schedule: `choose(step, able)` says which of the actors that can go on goes on. What a check raises is
    kept in the result."""
    actors = [Actor(name, steps) for name, steps in case.actors]
    locks = _Locks(case.host)
    steps: list[tuple[int, str]] = []
    error: Exception | None = None
    resting: set[int] = set()
    try:
        for actor in actors:
            locks.advance(actor)
        while any(not actor.done for actor in actors):
            able = [i for i, a in enumerate(actors) if not a.done and not locks.blocked(a)]
            if not able:
                waiting = ", ".join(f"{a.name} wants {a.pending}" for a in actors if not a.done)
                raise InvariantViolation(f"deadlock: {waiting}", number=31)
            taken = choose(len(steps), [i for i in able if i not in resting] or able)
            if taken not in able:
                raise InvariantViolation(f"step {len(steps)}: {actors[taken].name} cannot go on there")
            resting.discard(taken)
            _step(locks, actor := actors[taken], set())
            steps.append((taken, str(actor.pending) if actor.pending else "end"))
            if actor.pending is not None and actor.pending.name == "fault.retry":
                resting.add(taken)
            else:
                resting.clear()
            if len(steps) > MAX_STEPS:
                raise InvariantViolation(f"no end after {MAX_STEPS} steps: a livelock")
            case.step()
        case.check([a.error if a.error is not None else a.result for a in actors])
    except Exception as caught:
        error = caught
    finally:
        for actor in actors:
            actor.steps.close()
    return Played([actor.name for actor in actors], steps, error)


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


def _next_choice(path: list[_Choice], awake: list[int], resting: dict[int, _Found], most: int | None) -> _Choice:
    """Who may go after the choices of `path`: whoever went last first, so that interruptions come later."""
    if not path:
        return _Choice(awake, {}, resting, None, 0, awake)
    last = path[-1]
    everybody = awake
    interrupted = last.interruptions + (last.running not in (None, last.taken))
    running = last.taken if last.taken in awake else None
    if running is not None:
        awake = [running, *(i for i in awake if i != running)]
        if interrupted == most:
            awake = [running]
    # With a bound, an order that is the same but for commuting steps may be out of bounds: nobody sleeps.
    asleep = last.sleepers() if most is None else {}
    return _Choice(awake, asleep, resting, running, interrupted, everybody)


def _anew(case: Case | None, make: Callable[[], Case]) -> Case:
    """The case from its start; another one, where it cannot be put back."""
    if case is None or case.again is None:
        return make()
    case.actors = case.again()
    return case


def _state(case: Case, actors: list[Actor]) -> tuple[object, object]:
    """What others can see of the actors' work, and that with the actors themselves; without a way to tell, no two
    states are alike, and the situation is None."""
    return (object(), None) if case.state is None else case.state(actors)


def _step(locks: _Locks, actor: Actor, tried: set[tuple[str, bool]]) -> frozenset[tuple[str, bool]]:
    """One step: up to the next effect that is not a release. Returns the locks it took, tried or dropped, and adds
    those that it tried to `tried`."""
    touched: set[tuple[str, bool]] = set()

    def apply() -> None:
        effect = actor.pending
        if effect is not None and effect.lock is not None:
            write = effect.takes
            if write is None:
                write = next((w for lock, w in actor.held.locks if lock is effect.lock), True)
            touched.add((effect.lock.name, write))
            if effect.tries:
                tried.add((effect.lock.name, write))
        locks.apply(actor)

    apply()
    locks.advance(actor)
    while actor.pending is not None and actor.pending.kind == "release":
        apply()
        locks.advance(actor)
    if actor.done:
        touched |= {(lock.name, write) for lock, write in actor.held.locks}
        locks.drop_all(actor)
    return frozenset(touched)
