"""The backend's hooks, bound once per Host as the kernel binds its static calls, and the one helper that calls them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from typing import Any

import pluggy

from cvmcore import hookspecs
from cvmcore.effects import Steps
from cvmcore.errors import PluginError, UapiError
from cvmcore.events import Event
from cvmcore.observers import PROJECT as OBSERVERS
from cvmcore.observers import ObserverSpec
from cvmcore.pages import count
from cvmcore.types import Stopped


class Hook:
    """One implemented hook: the bound function, which arguments it names, and how often it was called."""

    __slots__ = ("arguments", "calls", "fn", "name", "pages")

    def __init__(self, name: str, fn: Callable[..., Any], arguments: tuple[str, ...]) -> None:
        self.name = name
        self.fn = fn
        self.arguments = arguments
        self.calls = 0
        self.pages = 0


_validated: dict[type, list[tuple[str, str, tuple[str, ...]]]] = {}


def implementations(vendor: object, owner: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """(hook, attribute, arguments) of every hook that a vendor object implements, in life-cycle order.

    pluggy registers and validates: a hook with a wrong name or argument is a PluginError here, in a sentence. Done
    once per class, since it costs more than making a small VM.
    """
    if type(vendor) not in _validated:
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        try:
            manager.register(vendor, owner)
            manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(f"backend {owner}: {' '.join(str(error).split())}") from None
        found = {}
        for caller in manager.get_hookcallers(vendor) or []:
            fn = caller.get_hookimpls()[0].function
            found[caller.name] = (caller.name, fn.__name__, tuple(inspect.signature(fn).parameters))
        _validated[type(vendor)] = [found[name] for name in hookspecs.HOOKS if name in found]
    return _validated[type(vendor)]


class Ops:
    """A backend's hooks: `ops.has(name)`, and `yield from ops.call(name, ...)`."""

    def __init__(self, vendor: object, owner: str, meter: Any) -> None:
        self.hooks = {
            name: Hook(name, getattr(vendor, attribute), arguments)
            for name, attribute, arguments in implementations(vendor, owner)
        }
        self.meter = meter
        self.owner = owner
        self.actor = "main"
        self._observers: pluggy.PluginManager | None = None
        self._on_event: list[Callable[..., None]] = []
        self._intercept: list[Callable[..., Any]] = []
        self._on_quiet: list[Callable[..., None]] = []

    # ---- observers --------------------------------------------------------------------------------------------

    def observe(self, observer: object) -> None:
        """Register an observer. Raises PluginError where one of its hooks does not fit."""
        if self._observers is None:
            self._observers = pluggy.PluginManager(OBSERVERS)
            self._observers.add_hookspecs(ObserverSpec)
        try:
            self._observers.register(observer)
            self._observers.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(f"observer {type(observer).__name__}: {' '.join(str(error).split())}") from None
        for name, found in (("on_event", self._on_event), ("intercept", self._intercept), ("on_quiet", self._on_quiet)):
            caller = getattr(self._observers.hook, name)
            found[:] = [impl.function for impl in caller.get_hookimpls()]

    @property
    def observed(self) -> bool:
        """Whether anybody listens to events: build one only then."""
        return bool(self._on_event)

    def emit(self, kind: str, name: str, **fields: Any) -> None:
        """Tell the observers, where there are any."""
        if self._on_event:
            event = Event(self.meter.now_ns, self.actor, kind, name, **fields)
            for listener in self._on_event:
                listener(event=event)

    def quiet(self, vm: object) -> None:
        """A UAPI call of this VM is complete."""
        for listener in self._on_quiet:
            listener(vm=vm)

    # ---- calls ------------------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether the backend implements the hook."""
        return name in self.hooks

    def call(self, name: str, /, pages: int = 1, **arguments: Any) -> Steps[Any]:
        """Call a hook: plain or generator, observed or not. None where the backend does not implement it.

        pages: how many pages the call is about, for the counts; where it stops, those up to the one that stopped it.
        """
        hook = self.hooks.get(name)
        if hook is None:
            return None
        hook.calls += 1
        hook.pages += pages
        if self._on_event or self._intercept:
            result = yield from self._observed(hook, pages, arguments)
        else:
            result = hook.fn(*[arguments[a] for a in hook.arguments])
            if isinstance(result, Generator):
                result = yield from result
        if isinstance(result, Stopped):
            hook.pages += _reached(result, pages) - pages
        return result

    def call_now(self, name: str, /, pages: int = 1, **arguments: Any) -> Any:
        """`call` for hooks outside any operation (host_init, capabilities): run to the end at once."""
        from cvmcore.effects import drain

        return drain(self.call(name, pages, **arguments))

    def _observed(self, hook: Hook, pages: int, arguments: dict[str, Any]) -> Steps[Any]:
        fields = _pages_of(arguments)
        start = self.meter.now_ns
        self.emit("hook", hook.name, phase="begin", n=pages, **fields)
        for listener in self._intercept:
            answer = listener(hook=hook.name, arguments=arguments)
            if answer is not None:
                info: dict[str, Any] = {"ns": 0, "injected": str(answer)}
                self.emit("hook", hook.name, phase="end", n=_reached(answer, pages), info=info, **fields)
                if isinstance(answer, UapiError):
                    raise answer
                return answer
        result = hook.fn(*[arguments[a] for a in hook.arguments])
        if isinstance(result, Generator):
            result = yield from result
        info = {"ns": self.meter.now_ns - start}
        if result is not None:
            info["result"] = result
        self.emit("hook", hook.name, phase="end", n=_reached(result, pages), info=info, **fields)
        return result


def _reached(result: object, pages: int) -> int:
    """Pages of a hook call that the kernel would have come to: all, or up to the one that stopped it."""
    return result.done + 1 if isinstance(result, Stopped) else pages


def _pages_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """The gfns, pfns, level and VM that a hook call is about, for its event."""
    fields: dict[str, Any] = {}
    batch = arguments.get("batch")
    if batch is not None:
        fields = {"gfns": batch.all_gfns, "pfns": batch.all_pfns, "level": batch.level}
    else:
        for name in ("gfns", "pfns"):
            if name in arguments and count(arguments[name]):
                fields[name] = arguments[name]
        if isinstance(arguments.get("level"), int):
            fields["level"] = arguments["level"]
        if "gfn" in arguments:
            fields["gfns"] = slice(arguments["gfn"], arguments["gfn"] + 1, 1)
    vm = arguments.get("vm")
    if vm is None and (vcpu := arguments.get("vcpu")) is not None:
        vm = vcpu.vm
    if vm is not None:
        fields["vm"] = vm.id
    return fields
