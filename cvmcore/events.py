"""Events: what happened, as values. Whoever wants to know registers an observer (`cvmcore.observers`)."""

from __future__ import annotations

from typing import Any

import attrs

from cvmcore.effects import Lock
from cvmcore.pages import Sel


@attrs.frozen
class Event:
    """One thing that happened to a batch.

    t_ns: the actor's virtual time. phase: "begin" or "end" for what takes time, else "at". gfns and pfns are selectors
    of 4K frame numbers where the event is about pages; n counts them. vm is the VM's id, -1 for the host.

    kind, as `on_event` is told: "hook", "fault", "zap", "exit", "invalidate", "memslot", "gmem", "vm" or "host".
    As `on_detail` is told, each within what began before it:
    "call", a call of user space, or one of the core's own long ways (`resolve`, `flush_tlbs`); gfns may be a span.
    "charge", work at a price, by price item; "op", the same, by the vendor's name for it. It ends at t_ns and took
    info["ns"]. "elsewhere": work that other CPUs do meanwhile.
    "entry", page-table entries of `level` go from one state to another (info); gfns are the first ones of each.
    "attribute", pages become "private" or "shared" (name) by attribute.
    "frames", frames are allocated, freed, leaked, pinned or unpinned (name); "content", they are written or read.
    """

    t_ns: float
    actor: str
    kind: str
    name: str
    phase: str = "at"
    vm: int = -1
    gfns: Sel | None = None
    pfns: Sel | None = None
    level: int = 0
    n: int = 0
    info: dict[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class LockEvent:
    """A lock is waited for ("wait"), taken ("take") or dropped ("drop"), by whom and when.

    write: whether for writing. holders: who has it while it is waited for. A wait ends when the same actor takes it.
    """

    t_ns: float
    actor: str
    lock: Lock
    phase: str
    write: bool
    holders: tuple[str, ...] = ()
