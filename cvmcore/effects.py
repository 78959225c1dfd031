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
from types import MethodType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, overload

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")

BUSY = object()
"""What a driver sends into an operation whose try-lock was not free."""


_TAKES = {"read": False, "write": True, "try_read": False, "try_write": True}
_TRIES = frozenset({"try_read", "try_write"})


class Effect:
    """One thing an operation asks of its driver. Instances are made once and reused: yielding allocates nothing."""

    __slots__ = ("_name", "kind", "lock", "takes", "tries")

    def __init__(self, kind: str, lock: Lock | None = None, name: str = "") -> None:
        self.kind = kind
        self.lock = lock
        self._name = name
        self.takes = _TAKES.get(kind)
        """Whether a lock is taken to write (True) or to read (False); None where none is taken."""
        self.tries = kind in _TRIES
        """A lock that is not free is not waited for: `BUSY` is the answer."""

    @property
    def name(self) -> str:
        """Of the point; or what is done to which lock."""
        return self._name or f"{self.kind} {self.lock.name if self.lock else ''}".strip()

    def __repr__(self) -> str:
        return f"<{self.name}>"


Steps = Generator[Effect, object, R]
"""A running operation that will return an R."""


class Lock:
    """A lock with its place in the lock order, and the effects that act on it.

    `rank` orders locks outer to inner: a lock is only taken while all held locks have a rank that is not higher.
    The lock itself knows nothing of owners; the driver that runs the operation does.
    """

    __slots__ = ("name", "rank", "read", "release", "try_read", "try_write", "write")

    read: Effect
    write: Effect
    try_read: Effect
    try_write: Effect
    release: Effect

    def __init__(self, name: str, rank: int) -> None:
        self.name = name
        self.rank = rank

    if not TYPE_CHECKING:

        def __getattr__(self, kind: str) -> Effect:
            """An effect is made when it is first asked for: few locks are taken in every way."""
            if kind != "release" and kind not in _TAKES:
                raise AttributeError(f"a lock has no {kind}")
            effect = Effect(kind, self)
            setattr(self, kind, effect)
            return effect

    def __repr__(self) -> str:
        return f"<Lock {self.name}>"


def point(name: str) -> Effect:
    """A named point where another actor may run: `fault.snapshot`, `invalidate.zap`, ..."""
    return Effect("point", None, name)


# The points of design decision 6; two were added: half of the attributes is stored, an image page is looked up.
FAULT_SNAPSHOT = point("fault.snapshot")
FAULT_PFN = point("fault.pfn")
FAULT_FREEZE = point("fault.freeze")
FAULT_HOOK = point("fault.hook")
FAULT_COMMIT = point("fault.commit")
INVALIDATE_START = point("invalidate.start")
INVALIDATE_ZAP = point("invalidate.zap")
INVALIDATE_STORING = point("invalidate.storing")
INVALIDATE_STORE = point("invalidate.store")
INVALIDATE_END = point("invalidate.end")
POPULATE_HOOK = point("populate.hook")


def drain(steps: Steps[R]) -> R:
    """Run an operation to its end; every lock is free. The sequential driver."""
    try:
        while True:
            next(steps)
    except StopIteration as stop:
        result: R = stop.value
        return result


def holding(lock: Lock, steps: Steps[R], read: bool = False) -> Steps[R]:
    """Run steps with a lock held, for write if not for read, which is dropped however they end."""
    yield lock.read if read else lock.write
    try:
        result = yield from steps
    except Exception:
        yield lock.release
        raise
    yield lock.release
    return result


class BoundOperation(Generic[P, R]):
    """An operation of one object: call it to run it, or take its `steps` to compose or schedule it."""

    __slots__ = ("_owner", "steps")

    def __init__(self, fn: Callable[..., Steps[R]], owner: object) -> None:
        self._owner = owner
        self.steps: Callable[P, Steps[R]] = MethodType(fn, owner)
        """The operation as a generator of effects, for `yield from` or a scheduler."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        drive: Callable[[Steps[R]], R] = getattr(self._owner, "drive", drain)
        return drive(self.steps(*args, **kwargs))


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
