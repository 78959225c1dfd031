"""Failures on purpose: a call of a hook, an allocation of a frame, a try-lock (`Failures`), or a call of the trusted
hardware (`FailingCall`) fails, the n-th or each at random. `cvmcore.testing.story` has every place fail in turn."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from typing import Any

from cvmcore.effects import Steps
from cvmcore.errors import UapiError
from cvmcore.host import Host
from cvmcore.observers import observes
from cvmcore.pages import count, part, run
from cvmcore.sched import Lockdep
from cvmcore.types import Fatal, Retry, Stopped

ANSWERS: dict[str, Callable[[], Any]] = {
    "vm_init": lambda: UapiError(errno.ENOMEM, "vm_init", "told to"),
    "vm_move": lambda: UapiError(errno.ENOMEM, "vm_move", "told to"),
    "vm_copy": lambda: UapiError(errno.ENOMEM, "vm_copy", "told to"),
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
    "walk_private_spte": lambda: Stopped(0, Retry()),
    "relax_private_spte": lambda: Stopped(0, Retry()),
    "split_private_spt": lambda: Stopped(0, Retry()),
    "promote_private_spt": lambda: Stopped(0, Retry()),
    "block_private_spt": lambda: Stopped(0, Retry()),
    "register_region": lambda: UapiError(errno.ENOMEM, "register_region", "told to"),
    "unregister_region": lambda: UapiError(errno.EBUSY, "unregister_region", "told to"),
}
"""How each hook that may fail is made to fail, before it did anything, for a reason that passes."""
MEMORY, TRY_LOCK = "an allocation", "a try-lock"


class Failures:
    """What fails on one host: calls of the hooks in `ANSWERS`, allocations of a frame, and locks that are only tried.

    Each is a place, counted by what it is (`seen`): the hook's name, `MEMORY` or `TRY_LOCK`. The place `at` fails (what
    it is, and its number from 1); so does each place with the probability `chance`, from a seed.

    Install it as `host = Host(drive=failures.drive, ...); failures.install(host)`.
    """

    def __init__(self, at: tuple[str, int] | None = None, *, chance: float = 0, seed: int = 0) -> None:
        self.at = at
        self.chance = chance
        self.seen: dict[str, int] = {}
        self.struck = 0
        self._random = random.Random(seed)
        self.drive = _BusyDrive(self)

    def strikes(self, what: str) -> bool:
        """Whether this place fails."""
        nth = self.seen[what] = self.seen.get(what, 0) + 1
        if self.at != (what, nth) and not (self.chance and self._random.random() < self.chance):
            return False
        self.struck += 1
        return True

    def install(self, host: Host) -> None:
        """Watch the hooks and the allocator of a host."""
        self._host = host
        host.ops.observe(self)
        alloc = host.frames.alloc

        def failing(n: int, use: int, align_order: int = 0) -> Any:
            if n and self.strikes(MEMORY):
                raise UapiError(errno.ENOMEM, "alloc_pages", "told to")
            return alloc(n, use, align_order)

        setattr(host.frames, "alloc", failing)  # noqa: B010

    @observes
    def intercept(self, hook: str, arguments: dict[str, Any]) -> Any:
        """The answer of a hook that fails."""
        if hook not in ANSWERS or not self.strikes(hook):
            return None
        if arguments.get("blocked"):
            # A promotion that fails has unblocked its table.
            gfns = run(arguments["gfn"], 1)
            self._host.ops.call_now("unblock_private_spt", vm=arguments["vm"], gfns=gfns, level=arguments["level"])
        return ANSWERS[hook]()


class _BusyDrive(Lockdep):
    """`Lockdep` in which try-locks may be busy."""

    def __init__(self, failures: Failures) -> None:
        super().__init__()
        self.failures = failures

    def is_busy(self) -> bool:
        return self.failures.strikes(TRY_LOCK)


def _done(result: Any) -> int:
    """How many elements of its batch a call did."""
    return int(result[0] if isinstance(result, tuple) else result.done)


class FailingCall:
    """The n-th call of an operation of the trusted hardware is refused, and does nothing.

    A batch is as many calls as it has elements: those before the n-th are done, the batch ends there with the refusal.

    operation: its name on the host's hardware (`"tdh_mem_page_aug"`, `"psp.df_flush"`). answer: what the hardware says
    to a call that it refuses, made from how many elements of its batch were done before, and the call's arguments.
    elements: which arguments are selectors of the batch's elements (none: every call is one); such a call answers with
    something that has `done`, or with a tuple that begins with how many were done. times: so many calls in a
    row are refused.
    """

    def __init__(
        self, operation: str, answer: Callable[[int, tuple[Any, ...]], Any], nth: int = 0, *,
        elements: tuple[int, ...] = (), times: int = 1, chance: float = 0, seed: int = 0,
    ) -> None:  # fmt: skip
        self.nth = nth
        self.seen = 0
        self._chance, self._random = chance, random.Random(seed)
        self.operation, self.answer, self.elements, self.times = operation, answer, elements, times
        self.on_strike: Callable[[], None] = lambda: None
        """Called at each refusal, before the caller hears of it."""
        self.resting = False
        """Nothing is refused by chance meanwhile."""

    def strikes(self) -> bool:
        """Count a call: whether it is refused."""
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
            self.seen -= count(args[self.elements[0]]) - _done(result)
        return result

    def _before(self, args: tuple[Any, ...], at: int) -> tuple[Any, ...]:
        """The arguments of the elements before one."""
        batch = {i for i in self.elements if i < len(args) and not isinstance(args[i], int)}
        return tuple(part(one, 0, at) if i in batch else one for i, one in enumerate(args))

    def install(self, host: Host) -> None:
        """Take the place of the operation on the hardware of a host."""
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
                    if (n := _done(done)) < at:
                        failing.seen -= at + 1 - n
                        return done
                failing.on_strike()
                return failing.answer(at, args)

            def steps(self, *args: Any, **kwargs: Any) -> Steps[Any]:
                at = failing._refused_at(args)
                if at is None:
                    return failing._made(args, (yield from real.steps(*args, **kwargs)))
                if at:
                    done = yield from real.steps(*failing._before(args, at), **kwargs)
                    if (n := _done(done)) < at:
                        failing.seen -= at + 1 - n
                        return done
                failing.on_strike()
                return failing.answer(at, args)

        setattr(owner, name, Refusing())
