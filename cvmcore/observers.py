"""Observers: plugins that watch a Host, with hooks of their own. No observer, no cost.

A tracer, a cost meter, an invariant checker and a fault injector ship with cvmcore; third parties register theirs
with `Host(observers=[...])`. An observer implements any of the hooks below, marked with `observes`.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import pluggy

from cvmcore.events import Event, LockEvent

PROJECT = "cvmcore.observers"
observes = pluggy.HookimplMarker(PROJECT)
_spec = pluggy.HookspecMarker(PROJECT)


class ObserverSpec:
    """The hooks of an observer."""

    @_spec
    def on_event(self, event: Event) -> None:
        """Something happened. Must not change anything."""

    @_spec
    def on_host(self, host: Any) -> None:
        """The observer watches this Host from now on: it may look at it whenever it is told something."""

    @_spec
    def on_detail(self, event: Event) -> None:
        """What happened within what `on_event` tells: calls, prices, vendor operations, entries, frames, content.

        Many more than those of `on_event`. Must not change anything.
        """

    @_spec
    def on_lock(self, event: LockEvent) -> None:
        """A lock was waited for, taken or dropped.

        Told by the timed driver, and by a Host that is made with the observer and without a driver of its own. Must
        not change anything.
        """

    @_spec(firstresult=True)
    def intercept(self, hook: str, arguments: dict[str, Any]) -> Any:
        """Before a backend's hook runs: return anything but None to answer in its place (fault injection).

        The value must be one that the hook could return; a `UapiError` instance is raised.
        """

    @_spec
    def on_quiet(self, vm: Any) -> None:
        """A UAPI call of this VM is complete and nothing else is under way: the time to check invariants."""


class Log:
    """Keeps the last events, for the message of a broken invariant."""

    def __init__(self, keep: int = 12) -> None:
        self.events: deque[Event] = deque(maxlen=keep)

    @observes
    def on_event(self, event: Event) -> None:
        """Write the event down."""
        self.events.append(event)


class HookCosts:
    """Cost meter: calls, pages and virtual nanoseconds by hook."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.pages: dict[str, int] = {}
        self.ns: dict[str, float] = {}

    @observes
    def on_event(self, event: Event) -> None:
        """Count the call."""
        if event.kind == "hook" and event.phase == "end":
            self.calls[event.name] = self.calls.get(event.name, 0) + 1
            self.pages[event.name] = self.pages.get(event.name, 0) + event.n
            self.ns[event.name] = self.ns.get(event.name, 0) + event.info["ns"]


class FaultInjector:
    """Answers the n-th call of a hook in the backend's place: `FaultInjector("set_private_spte", 3, Stopped(...))`."""

    def __init__(self, hook: str, nth: int, answer: Any) -> None:
        self.hook, self.nth, self.answer = hook, nth, answer
        self.seen = 0

    @observes
    def intercept(self, hook: str, arguments: dict[str, Any]) -> Any:
        """Answer in the place of the call that is to fail."""
        if hook != self.hook:
            return None
        self.seen += 1
        return self.answer if self.seen == self.nth else None
