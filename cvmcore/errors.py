"""What can go wrong, as types.

A `CvmError` is expected: a front end prints its one sentence and exits with 2.
An `InvariantViolation` is not: it is a bug in the model or in a backend, and nothing catches it.
"""

from __future__ import annotations

import errno as _errno


def errno_name(error: int) -> str:
    """The kernel's name of an errno; its number where it has none."""
    return {_errno.EOPNOTSUPP: "EOPNOTSUPP", 133: "EHWPOISON"}.get(error) or _errno.errorcode.get(error, str(error))


class CvmError(Exception):
    """Base of everything that is expected in normal operation."""


class InputError(CvmError):
    """A file, an option or a script is not what it must be; the message names what and where."""


class PluginError(CvmError):
    """A plugin cannot be used: it fails to import, breaks the contract, or was written for another version of it."""


class ProfileError(InputError):
    """A price profile has a missing, unknown or impossible price."""


class UapiError(CvmError):
    """A call of the KVM UAPI failed, as the kernel would have failed it.

    `errno` is the positive errno number; `call` the ioctl or system call; `why` the condition that was not met.
    """

    def __init__(self, errno: int, call: str, why: str) -> None:
        super().__init__(f"{call}: -{errno_name(errno)}: {why}")
        self.errno = errno
        self.call = call
        self.why = why


class HardwareError(CvmError):
    """The trusted party refused; `status` is its own status, under its spec's name."""

    def __init__(self, operation: str, status: object, detail: str = "") -> None:
        super().__init__(f"{operation}: {status}" + (f": {detail}" if detail else ""))
        self.operation = operation
        self.status = status


class InvariantViolation(Exception):
    """Something that must always hold does not. Carries what a person needs to find out why.

    `number` is that of `cvmcore.testing.invariants` (0 where a plain assertion of the model failed).
    """

    def __init__(
        self,
        what: str,
        *,
        number: int = 0,
        gfn: int | None = None,
        pfn: int | None = None,
        states: dict[str, object] | None = None,
        events: tuple[object, ...] = (),
    ) -> None:
        where = [f"gfn {gfn:#x}"] if gfn is not None else []
        where += [f"pfn {pfn:#x}"] if pfn is not None else []
        where += [f"{name}={value}" for name, value in (states or {}).items()]
        lines = [(f"invariant {number}: " if number else "") + what + (f" ({', '.join(where)})" if where else "")]
        lines += [f"  before: {event}" for event in events]
        super().__init__("\n".join(lines))
        self.number, self.gfn, self.pfn = number, gfn, pfn
        self.states, self.events = states or {}, events
