"""Effects: what an operation yields, so that a driver can decide what happens next.

An operation is a generator. It yields when it takes or drops a lock and at the named points of the fault and
invalidation paths; its return value is the generator's. Three drivers run operations: `drain` here (one after the
other, nothing ever contends), `timed` and `explore` in `cvmcore.sched`.

Convention: a driver answers a yield with None, and with `BUSY` where a try-lock was not free. An operation that
raises drops the locks that it holds: the driver does it, so no operation needs a `finally`.

Trusted hardware (`hw` of each plugin) uses this module as well: its own locks are part of what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")

Steps = Generator["Effect", object, R]
"""A running operation that will return an R."""

BUSY = object()
"""What a driver sends into an operation whose try-lock was not free."""


class Effect:
    """One thing an operation asks of its driver. Instances are made once and reused: yielding allocates nothing."""

    __slots__ = ("kind", "lock", "name")

    def __init__(self, kind: str, lock: Lock | None = None, name: str = "") -> None:
        self.kind = kind
        self.lock = lock
        self.name = name or f"{kind} {lock.name if lock else ''}".strip()

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Lock:
    """A lock with its place in the lock order, and the effects that act on it.

    `rank` orders locks outer to inner: a lock is only taken while all held locks have a rank that is not higher.
    The lock itself knows nothing of owners; the driver that runs the operation does.
    """

    __slots__ = ("name", "rank", "read", "release", "try_read", "try_write", "write")

    def __init__(self, name: str, rank: int) -> None:
        self.name = name
        self.rank = rank
        self.read = Effect("read", self)
        self.write = Effect("write", self)
        self.try_read = Effect("try_read", self)
        self.try_write = Effect("try_write", self)
        self.release = Effect("release", self)

    def __repr__(self) -> str:
        return f"<Lock {self.name}>"


def point(name: str) -> Effect:
    """A named point where another actor may run: `fault.snapshot`, `invalidate.zap`, ..."""
    return Effect("point", None, name)


# The points of design decision 6.
FAULT_SNAPSHOT = point("fault.snapshot")
FAULT_PFN = point("fault.pfn")
FAULT_FREEZE = point("fault.freeze")
FAULT_HOOK = point("fault.hook")
FAULT_COMMIT = point("fault.commit")
INVALIDATE_START = point("invalidate.start")
INVALIDATE_ZAP = point("invalidate.zap")
INVALIDATE_STORE = point("invalidate.store")
INVALIDATE_END = point("invalidate.end")


def drain(steps: Steps[R]) -> R:
    """Run an operation to its end; every lock is free. The sequential driver."""
    try:
        while True:
            next(steps)
    except StopIteration as stop:
        result: R = stop.value
        return result


class BoundOperation(Generic[P, R]):
    """An operation of one object: call it to run it, or take its `steps` to compose or schedule it."""

    __slots__ = ("_fn", "_owner")

    def __init__(self, fn: Callable[..., Steps[R]], owner: object) -> None:
        self._fn = fn
        self._owner = owner

    def steps(self, *args: P.args, **kwargs: P.kwargs) -> Steps[R]:
        """The operation as a generator of effects, for `yield from` or a scheduler."""
        return self._fn(self._owner, *args, **kwargs)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        drive: Callable[[Steps[R]], R] = getattr(self._owner, "drive", drain)
        return drive(self._fn(self._owner, *args, **kwargs))


class operation(Generic[S, P, R]):
    """Decorator: a generator method becomes an operation.

    `obj.method(...)` runs it to its end (through `obj.drive` where the object has one, else `drain`);
    `obj.method.steps(...)` gives the generator.
    """

    def __init__(self, fn: Callable[Concatenate[S, P], Steps[R]]) -> None:
        self.fn = fn
        self.__doc__ = fn.__doc__
        self.__name__ = fn.__name__
        self.__wrapped__ = fn

    @overload
    def __get__(self, obj: None, cls: Any = None) -> operation[S, P, R]: ...
    @overload
    def __get__(self, obj: S, cls: Any = None) -> BoundOperation[P, R]: ...
    def __get__(self, obj: S | None, cls: Any = None) -> operation[S, P, R] | BoundOperation[P, R]:
        return self if obj is None else BoundOperation(self.fn, obj)
