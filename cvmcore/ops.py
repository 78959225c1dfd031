"""The backend's hooks, bound once per Host as the kernel binds its static calls, and the one helper that calls them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import cache
from operator import itemgetter
from types import GeneratorType
from typing import Any, ClassVar, TypeVar

import pluggy

from cvmcore import hookspecs
from cvmcore.effects import Lock, Steps, drain
from cvmcore.errors import PluginError, UapiError
from cvmcore.events import Event, LockEvent
from cvmcore.observers import PROJECT as OBSERVERS
from cvmcore.observers import ObserverSpec
from cvmcore.pages import Sel, count
from cvmcore.types import Stopped, Use

R = TypeVar("R")

NOBODY = "main"
"""The actor while nobody in particular acts: the VMM, or the host."""


class Hook:
    """One implemented hook: the bound function, which arguments it names, and how often it was called."""

    __slots__ = ("arguments", "calls", "fn", "name", "pages", "pick")

    def __init__(self, name: str, fn: Callable[..., Any], arguments: tuple[str, ...]) -> None:
        self.name = name
        self.fn = fn
        self.arguments = arguments
        self.pick = _picker(arguments)
        self.calls = 0
        self.pages = 0


class _Observers(pluggy.PluginManager):
    """pluggy's manager, which looks through a class only once: many small hosts have the same observers."""

    _marked: ClassVar[dict[tuple[type, str], Any]] = {}

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        if isinstance(plugin, type) or name in getattr(plugin, "__dict__", {}):
            return super().parse_hookimpl_opts(plugin, name)
        key = type(plugin), name
        if key not in self._marked:
            self._marked[key] = super().parse_hookimpl_opts(plugin, name)
        marked = self._marked[key]
        return None if marked is None else dict(marked)


@cache
def _picker(names: tuple[str, ...]) -> Callable[[dict[str, Any]], Iterable[Any]]:
    """What takes the values of these arguments out of all."""
    return itemgetter(*names) if len(names) > 1 else lambda arguments: [arguments[name] for name in names]


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

    def __init__(self, vendor: object, owner: str, meter: Any, host: Any = None) -> None:
        self.hooks = {
            name: Hook(name, getattr(vendor, attribute), arguments)
            for name, attribute, arguments in implementations(vendor, owner)
        }
        self.meter = meter
        self.owner = owner
        self.host = host
        self.actor = NOBODY
        self.detailed = False
        """Whether anybody listens to details."""
        self.watches_locks = False
        self._observers: pluggy.PluginManager | None = None
        self._on_event: list[Callable[..., None]] = []
        self._intercept: list[Callable[..., Any]] = []
        self._on_quiet: list[Callable[..., None]] = []
        self._on_detail: list[Callable[..., None]] = []
        self._on_lock: list[Callable[..., None]] = []

    # ---- observers --------------------------------------------------------------------------------------------

    def observe(self, observer: object) -> None:
        """Register an observer. Raises PluginError where one of its hooks does not fit."""
        if self._observers is None:
            self._observers = _Observers(OBSERVERS)
            self._observers.add_hookspecs(ObserverSpec)
        try:
            self._observers.register(observer)
            self._observers.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(f"observer {type(observer).__name__}: {' '.join(str(error).split())}") from None
        for name, found in (
            ("on_event", self._on_event), ("intercept", self._intercept), ("on_quiet", self._on_quiet),
            ("on_detail", self._on_detail), ("on_lock", self._on_lock),
        ):  # fmt: skip
            caller = getattr(self._observers.hook, name)
            found[:] = [impl.function for impl in caller.get_hookimpls()]
        self.detailed, self.watches_locks = bool(self._on_detail), bool(self._on_lock)
        if self.detailed:
            self._tap()
        if self.host is not None:
            for impl in self._observers.hook.on_host.get_hookimpls():
                if impl.plugin is observer:
                    impl.function(host=self.host)

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

    def detail(self, kind: str, name: str, **fields: Any) -> None:
        """Tell whoever listens to details: ask `detailed` first."""
        event = Event(self.meter.now_ns, self.actor, kind, name, **fields)
        for listener in self._on_detail:
            listener(event=event)

    def told(self, name: str, steps: Steps[R], **fields: Any) -> Steps[R]:
        """The steps of a call, with its begin and its end told: ask `detailed` first."""
        start, info = self.meter.now_ns, fields.pop("info", {})
        self.detail("call", name, phase="begin", info=info, **fields)
        try:
            result = yield from steps
        except Exception as error:
            info = {"ns": self.meter.now_ns - start, "error": str(error)}
            self.detail("call", name, phase="end", info=info, **fields)
            raise
        info = {"ns": self.meter.now_ns - start}
        self.detail("call", name, phase="end", info=info if result is None else {**info, "result": result}, **fields)
        return result

    def _tap(self) -> None:
        """Listen to the clock, the frames and the memory."""
        self.meter.watch = self._worked
        if self.host is not None:
            self.host.frames.watch = self._moved
            self.host.memory.watch = self._accessed

    def _worked(self, kind: str, name: str, item: str, n: int) -> None:
        self.detail(kind, name, n=n, info={"item": item, "ns": self.meter.prices[item] * n})

    def _moved(self, what: str, pfns: Sel, use: Use | None) -> None:
        self.detail("frames", what, pfns=pfns, n=count(pfns), info={} if use is None else {"use": use})

    def _accessed(self, what: str, pfns: Sel, key: int, stamp: int | None) -> None:
        info = {"key": key} if stamp is None else {"key": key, "stamp": stamp}
        self.detail("content", what, pfns=pfns, n=count(pfns), info=info)

    # ---- locks ------------------------------------------------------------------------------------------------

    def locked(
        self, phase: str, lock: Lock, write: bool, actor: str, t_ns: float, holders: tuple[str, ...] = ()
    ) -> None:
        """Tell whoever listens to locks: ask `watches_locks` first."""
        event = LockEvent(t_ns, actor, lock, phase, write, holders)
        for listener in self._on_lock:
            listener(event=event)

    def drain(self, steps: Steps[R]) -> R:
        """`effects.drain` that tells of the locks that are taken and dropped."""
        held: list[tuple[Lock, bool, str]] = []
        try:
            while True:
                effect = next(steps)
                lock = effect.lock
                if lock is None:
                    continue
                if effect.kind == "release":
                    at = next(i for i in reversed(range(len(held))) if held[i][0] is lock)
                    self.locked("drop", *held.pop(at), self.meter.now_ns)
                else:
                    held.append((lock, effect.kind.endswith("write"), self.actor))
                    self.locked("take", *held[-1], self.meter.now_ns)
        except StopIteration as stop:
            result: R = stop.value
            return result
        finally:
            for one in reversed(held):
                self.locked("drop", *one, self.meter.now_ns)

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
            result = hook.fn(*hook.pick(arguments))
            if type(result) is GeneratorType:
                result = yield from result
        if isinstance(result, Stopped):
            hook.pages += _reached(result, pages) - pages
        return result

    def call_now(self, name: str, /, pages: int = 1, **arguments: Any) -> Any:
        """`call` for hooks outside any operation (host_init, capabilities): run to the end at once."""
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
        try:
            result = hook.fn(*hook.pick(arguments))
            if type(result) is GeneratorType:
                result = yield from result
        except Exception as error:
            info = {"ns": self.meter.now_ns - start, "error": str(error)}
            self.emit("hook", hook.name, phase="end", n=pages, info=info, **fields)
            raise
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
