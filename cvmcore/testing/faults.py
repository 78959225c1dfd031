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
from cvmcore.pages import count, part
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

    A batch is as many calls as it has elements: those before the n-th are done, the batch ends there with the refusal.

    operation: its name on the host's hardware (`"tdh_mem_page_aug"`, `"psp.df_flush"`). answer: what the hardware says
    to a call that it refuses, made from how many elements of its batch were done before, and the call's arguments.
    elements: which arguments are selectors of the batch's elements (none: every call is one). times: so many calls in a
    row are refused.
    """

    def __init__(
        self, operation: str, answer: Callable[[int, tuple[Any, ...]], Any], nth: int = 0, *,
        elements: tuple[int, ...] = (), times: int = 1, chance: float = 0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(nth, chance=chance, seed=seed)
        self.operation, self.answer, self.elements, self.times = operation, answer, elements, times
        self.on_strike: Callable[[], None] = lambda: None
        """Called at each refusal, before the caller hears of it."""
        self.resting = False
        """Nothing is refused by chance meanwhile."""

    def strikes(self) -> bool:
        self.seen += 1
        return 0 <= self.seen - self.nth < self.times * (self.nth > 0)

    def _refused_at(self, args: tuple[Any, ...]) -> int | None:
        """The element that is refused; None where all go through. By chance it is one of a batch, whatever its size."""
        n = count(args[self.elements[0]]) if self.elements else 1
        if self._chance:
            self.seen += n
            strikes = n and not self.resting and self._random.random() < self._chance
            return self._random.randrange(n) if strikes else None
        return next((i for i in range(n) if self.strikes()), None)

    def _made(self, args: tuple[Any, ...], result: Any) -> Any:
        """The result of a batch: elements behind one that failed were not called."""
        if self.elements:
            self.seen -= count(args[self.elements[0]]) - result.done
        return result

    def _before(self, args: tuple[Any, ...], at: int) -> tuple[Any, ...]:
        """The arguments of the elements before one."""
        batch = {i for i in self.elements if i < len(args) and not isinstance(args[i], int)}
        return tuple(part(one, 0, at) if i in batch else one for i, one in enumerate(args))

    def install(self, host: Host) -> None:
        *path, name = self.operation.split(".")
        owner = host.hw
        for attribute in path:
            owner = getattr(owner, attribute)
        real, failing = getattr(owner, name), self

        class Refusing:
            """The operation, and its `steps`."""

            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                at = failing._refused_at(args)
                if at is None:
                    return failing._made(args, real(*args, **kwargs))
                if at:
                    done = real(*failing._before(args, at), **kwargs)
                    if done.done < at:
                        failing.seen -= at + 1 - done.done
                        return done
                failing.on_strike()
                return failing.answer(at, args)

            def steps(self, *args: Any, **kwargs: Any) -> Steps[Any]:
                at = failing._refused_at(args)
                if at is None:
                    return failing._made(args, (yield from real.steps(*args, **kwargs)))
                if at:
                    done = yield from real.steps(*failing._before(args, at), **kwargs)
                    if done.done < at:
                        failing.seen -= at + 1 - done.done
                        return done
                failing.on_strike()
                return failing.answer(at, args)

        setattr(owner, name, Refusing())


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
