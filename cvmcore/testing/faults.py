"""Failures on purpose: the n-th call of a hook, allocation of a frame, or try-lock fails.

Each kind is a `Failing`: put on a host, it counts the places where it could strike, and strikes at one of them (`nth`,
1: the first) or at each with a probability. `at_every_place` runs a story once without a failure, to count the places,
and then once for each.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from cvmcore.effects import Steps
from cvmcore.errors import UapiError
from cvmcore.host import Host
from cvmcore.observers import observes
from cvmcore.sched import Lockdep
from cvmcore.types import Fatal, Retry, Stopped

ANSWERS: dict[str, Callable[[], Any]] = {
    "vm_init": lambda: UapiError(errno.ENOMEM, "vm_init", "told to"),
    "vcpu_create": lambda: UapiError(errno.ENOMEM, "vcpu_create", "told to"),
    "vcpu_enter": lambda: UapiError(errno.EINTR, "vcpu_enter", "told to"),
    "launch_finish": lambda: UapiError(errno.EBUSY, "launch_finish", "told to"),
    "launch_update": lambda: Stopped(0, Retry()),
    "memslot_prepare": lambda: UapiError(errno.ENOMEM, "memslot_prepare", "told to"),
    "topup": lambda: Stopped(0, Fatal(errno.ENOMEM)),
    "gmem_prepare": lambda: Stopped(0, Fatal(errno.EIO)),
    "pin_pfn": lambda: Stopped(0, Retry()),
    "link_private_spt": lambda: Stopped(0, Retry()),
    "set_private_spte": lambda: Stopped(0, Retry()),
    "relax_private_spte": lambda: Stopped(0, Retry()),
    "split_private_spt": lambda: Stopped(0, Retry()),
    "promote_private_spt": lambda: Stopped(0, Retry()),
}
"""How each hook that may fail is made to fail, before it did anything, for a reason that passes."""


class Failing(Protocol):
    """A kind of failure: `seen` places so far; strikes at the `nth`, or with probability `chance` at each."""

    nth: int
    seen: int

    def install(self, host: Host) -> None:
        """Watch this host from now on."""


class _Counted:
    def __init__(self, nth: int = 0, *, chance: float = 0, seed: int = 0) -> None:
        self.nth = nth
        self.seen = 0
        self._chance, self._random = chance, random.Random(seed)

    def strikes(self) -> bool:
        self.seen += 1
        return self.seen == self.nth or (self._chance > 0 and self._random.random() < self._chance)


class FailingHook(_Counted):
    """The n-th call of a hook fails as `ANSWERS` says, or with another answer."""

    def __init__(self, hook: str, nth: int = 0, *, answer: Any = None, chance: float = 0, seed: int = 0) -> None:
        super().__init__(nth, chance=chance, seed=seed)
        self.hook = hook
        self.answer = answer

    def install(self, host: Host) -> None:
        host.ops.observe(self)

    @observes
    def intercept(self, hook: str, arguments: dict[str, Any]) -> Any:
        if hook != self.hook or not self.strikes():
            return None
        return self.answer if self.answer is not None else ANSWERS[hook]()


class FailingMemory(_Counted):
    """The host has no frame for the n-th allocation."""

    def install(self, host: Host) -> None:
        alloc = host.frames.alloc

        def failing(n: int, use: int, align_order: int = 0) -> Any:
            if n and self.strikes():
                raise UapiError(errno.ENOMEM, "alloc_pages", "told to")
            return alloc(n, use, align_order)

        setattr(host.frames, "alloc", failing)  # noqa: B010


class BusyLock(_Counted):
    """The n-th lock that is only tried is held by somebody else."""

    def install(self, host: Host) -> None:
        host.drive = _BusyDrive(self)


class _BusyDrive(Lockdep):
    """`Lockdep` in which try-locks may be busy."""

    def __init__(self, busy: BusyLock) -> None:
        super().__init__()
        self.busy = busy

    def is_busy(self) -> bool:
        return self.busy.strikes()


class FailingCall(_Counted):
    """The n-th call of an operation of the trusted hardware is refused, and does nothing.

    holder: finds the object on the host that has the operation (`lambda host: host.hw`). answer: made from the call's
    arguments, what the hardware says.
    """

    def __init__(
        self, operation: str, answer: Callable[..., Any], nth: int = 0, *,
        holder: Callable[[Host], Any] = lambda host: host.hw, chance: float = 0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(nth, chance=chance, seed=seed)
        self.operation, self.answer, self.holder = operation, answer, holder

    def install(self, host: Host) -> None:
        owner = self.holder(host)
        real = getattr(owner, self.operation)
        strikes, answer = self.strikes, self.answer

        class Refusing:
            """The operation, and its `steps`."""

            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return answer(*args, **kwargs) if strikes() else real(*args, **kwargs)

            def steps(self, *args: Any, **kwargs: Any) -> Steps[Any]:
                if strikes():
                    return answer(*args, **kwargs)
                return (yield from real.steps(*args, **kwargs))

        setattr(owner, self.operation, Refusing())


def at_every_place(
    make: Callable[[int], Failing], story: Callable[[Failing], None], *, most: int = 10_000, places: int | None = None
) -> Iterator[tuple[int, Exception | None]]:
    """Tell the story once for each place where it may fail, in turn; yields (place, what was raised or None).

    make: the failure for a place, 0 for none. most: where there are more places, so many of them, evenly spread.
    places: how many there are, where they were counted before.
    """
    if places is None:
        counting = make(0)
        story(counting)
        places = counting.seen
    step = max(1, -(-places // most))
    for nth in range(1, places + 1, step):
        try:
            story(make(nth))
        except Exception as error:
            yield nth, error
        else:
            yield nth, None
