"""Operations as generators of effects, and the driver that runs one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cvmcore.effects import BUSY, Effect, Lock, Steps, drain, operation, point

HERE = point("here")


class Counter:
    """Something with a lock and operations."""

    def __init__(self) -> None:
        self.lock = Lock("counter", 10)
        self.value = 0

    @operation
    def add(self, n: int, twice: bool = False) -> Steps[int]:
        """Add n."""
        yield self.lock.write
        self.value += n
        yield HERE
        if twice:
            yield from self.add.steps(n)
        yield self.lock.release
        return self.value

    @operation
    def look(self) -> Steps[int]:
        return self.value
        yield HERE


class Driven(Counter):
    """An object that says who runs its operations."""

    def __init__(self, drive: Callable[[Steps[Any]], Any]) -> None:
        super().__init__()
        self.drive = drive


def test_drain_returns_what_the_operation_returns() -> None:
    counter = Counter()

    assert drain(counter.add.steps(3)) == 3
    assert counter.value == 3


def test_an_operation_is_called_like_a_method() -> None:
    counter = Counter()

    assert counter.add(2) == 2
    assert counter.add(n=3, twice=True) == 8
    assert counter.look() == 8


def test_nothing_happens_before_the_first_step() -> None:
    counter = Counter()

    steps = counter.add.steps(1)

    assert counter.value == 0
    assert list(steps) == [counter.lock.write, HERE, counter.lock.release]
    assert counter.value == 1


def test_steps_compose() -> None:
    counter = Counter()
    lock = counter.lock

    assert list(counter.add.steps(1, twice=True)) == [lock.write, HERE, lock.write, HERE, lock.release, lock.release]


def test_the_object_says_who_drives() -> None:
    seen: list[Effect] = []

    def drive(steps: Steps[Any]) -> Any:
        try:
            while True:
                seen.append(next(steps))
        except StopIteration as stop:
            return stop.value

    counter = Driven(drive)

    assert counter.add(1) == 1
    assert seen == [counter.lock.write, HERE, counter.lock.release]


def test_an_error_goes_through() -> None:
    def broken() -> Steps[None]:
        yield HERE
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        drain(broken())


def test_a_driver_answers_a_try_lock() -> None:
    """None where it was free, BUSY where not: drain has every lock free."""

    def attempt(lock: Lock) -> Steps[bool]:
        busy = yield lock.try_write
        return busy is not BUSY

    steps = attempt(Lock("entry", 5))
    next(steps)
    with pytest.raises(StopIteration) as stop:
        steps.send(BUSY)

    assert stop.value.value is False
    assert drain(attempt(Lock("entry", 5))) is True


def test_effects_are_made_once() -> None:
    """Yielding allocates nothing; a lock's effects know the lock."""
    lock = Lock("mmu_lock", 60)

    for effect in (lock.read, lock.write, lock.try_read, lock.try_write, lock.release):
        assert effect.lock is lock
    assert [e.kind for e in (lock.read, lock.write, lock.try_read, lock.try_write, lock.release)] == [
        "read",
        "write",
        "try_read",
        "try_write",
        "release",
    ]
    assert (HERE.kind, HERE.name, HERE.lock) == ("point", "here", None)
    assert lock.read is lock.read


def test_an_operation_keeps_its_documentation() -> None:
    assert Counter.add.__doc__ == "Add n."
    assert Counter.add.__name__ == "add"
