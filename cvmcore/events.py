"""Events: what happened, as values. Whoever wants to know registers an observer (`cvmcore.observers`)."""

from __future__ import annotations

from typing import Any

import attrs

from cvmcore.pages import Sel


@attrs.frozen
class Event:
    """One thing that happened to a batch.

    t_ns: the actor's virtual time. kind: "hook", "fault", "zap", "exit", "invalidate", "memslot", "gmem", "vm",
    "guest", "lock" or "host". phase: "begin" or "end" for what takes time, else "at". gfns and pfns are selectors of
    4K frame numbers where the event is about pages; n counts them. vm is the VM's id, -1 for the host.
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
