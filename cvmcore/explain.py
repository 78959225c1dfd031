"""The life of one page in a run: who did what, when, at what cost, from which state to which.

`Explain` is an observer that keeps what is about one gfn (or one frame) while the run goes on, and nothing else. What a
page costs is its share of the batch that it was part of. It takes the lines of an event log as well (`read_log`).
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from itertools import groupby
from pathlib import Path
from textwrap import wrap
from typing import Any, TypeAlias

import attrs
import numpy as np

from cvmcore.errors import InputError
from cvmcore.events import Event
from cvmcore.observers import observes
from cvmcore.ops import NOBODY
from cvmcore.types import PAGE_SHIFT, PG_LEVEL_4K, order_of

SCHEMA = 1
KEEP = 500
"""Steps that are kept from the beginning of a life, and as many from its end; a step may have others within."""
MAX_GFN = 1 << 52
FRAMES = {
    "found": "its frame", "alloc": "frame allocated", "free": "frame freed", "orphan": "frame left to its pins",
    "leak": "frame leaked", "pin": "frame pinned", "unpin": "frame unpinned",
}  # fmt: skip
SIZES = {1: "4K", 2: "2M", 3: "1G", 4: "512G"}

Pages: TypeAlias = "slice | Sequence[slice] | np.ndarray[Any, np.dtype[np.int64]]"
"""Page numbers: of a selector, or of the runs that a log shows."""


@attrs.define(eq=False)
class Step:
    """One thing that happened to the page. `within`: what happened during it.

    kind, name: as of the event ("call", "hook", "op", "charge", "entry", "attribute", "frames", "content", "exit",
    "invalidate", "memslot"). pages: the size of the batch. cost_ns: the page's share; None for what takes no time of
    its own. was, now: the states. details: what else is known (level, pfn, key, ...).
    """

    t_ns: float
    actor: str
    kind: str
    name: str
    phase: str = ""
    pages: int = 0
    cost_ns: float | None = None
    was: str = ""
    now: str = ""
    details: dict[str, Any] = attrs.field(factory=dict)
    within: list[Step] = attrs.field(factory=list)

    def __str__(self) -> str:
        """The step in a few words, without its states."""
        details = self.details
        match self.kind, self.name:
            case "call", "resolve":
                way = "write" if details.get("write") else "read"
                return f"fault, {way}, {'private' if details.get('private') else 'shared'}"
            case "call", name:
                return f"{name}: {details['action']}" if "action" in details else name
            case "hook", name:
                return f"hook {name}"
            case "op", name:
                return f"vendor: {name}"
            case "entry", _ if "table" in (self.was, self.now) and "absent" in (self.was, self.now):
                return f"{SIZES[details['level']]} entry above it"
            case "entry", _:
                return f"{SIZES[details['level']]} entry" + self._frame()
            case "attribute", _:
                return "attribute"
            case "frames", name:
                return f"{FRAMES.get(name, name)}{self._frame()}"
            case "content", name:
                what = ", zeros" if details.get("stamp") == 0 else ""
                return f"content {'written' if name == 'write' else 'read'}{self._frame()}, key {details['key']}{what}"
            case "invalidate", name:
                return f"invalidation, {name} mappings"
            case "exit", name:
                return f"exit to user space: {name}"
            case kind, name:
                return f"{kind} {name}"

    def _frame(self) -> str:
        return f", pfn {self.details['pfn']:#x}" if "pfn" in self.details else ""

    def flat(self, depth: int = 0) -> Iterator[tuple[int, Step]]:
        """(depth, step), outer steps first."""
        yield depth, self
        for step in self.within:
            yield from step.flat(depth + 1)


@attrs.define
class _Work:
    """What was charged under one name, since when."""

    t_ns: float
    n: int = 0
    ns: float = 0


@attrs.define(eq=False)
class _Open:
    """A call or a hook that has begun. ours: whether it is about the page; None: it names no pages.

    maybe: what happened to frames of which one may turn out to be the page's.
    """

    step: Step
    pages: Pages | None
    level: int
    ours: bool | None
    work: dict[tuple[str, str], _Work] = attrs.field(factory=dict)
    """By "op" or "charge", and name."""
    maybe: list[tuple[int, Event, Pages]] = attrs.field(factory=list)


@attrs.define
class _Frame:
    """What is known of a frame of the page."""

    use: str = "in use"
    pins: int = 0


class Explain:
    """Observes a run. Give it either a gfn or a pfn; `steps` is the life of that page, `left_out` how many steps of its
    middle are not kept."""

    def __init__(self, gfn: int | None = None, pfn: int | None = None, vm: int = 0) -> None:
        assert (gfn is None) != (pfn is None)
        self.gfn, self.pfn, self.vm = gfn, pfn, vm
        self.backend = ""
        self.left_out = 0
        self.blurred = 0
        """Batches of a log that do not show all of their pages."""
        self._gfns: set[int] = set() if gfn is None else {gfn}
        self._pfns: set[int] = set() if pfn is None else {pfn}
        self._attribute = "shared"
        self._frames: dict[int, _Frame] = {}
        self._phase = ""
        self._first: list[Step] = []
        self._last: deque[Step] = deque(maxlen=KEEP)
        self._open: dict[str, list[_Open]] = {}

    @property
    def steps(self) -> list[Step]:
        """The outermost steps, in order."""
        return [*self._first, *self._last]

    @property
    def touched(self) -> bool:
        """Whether the page was ever used: not only its memslot, attribute or the tables above it."""
        return any(_is_use(step) for outer in self.steps for _, step in outer.flat())

    @property
    def page(self) -> str:
        """The page in words."""
        return f"pfn {self.pfn:#x}" if self.gfn is None else f"gfn {self.gfn:#x}"

    def remarks(self) -> list[str]:
        """What a reader of the life should know."""
        said = []
        if self.left_out:
            said.append(f"{self.left_out:,} steps between the first {KEEP} and the last {KEEP} are left out")
        if self.blurred:
            said.append(f"{self.blurred:,} events of the log do not show all of their pages: some steps may be missing")
        return said

    # ---- being told -------------------------------------------------------------------------------------------

    @observes
    def on_host(self, host: Any) -> None:
        self.backend = host.backend.name

    @observes
    def on_event(self, event: Event) -> None:
        self.note(event, event.gfns, event.pfns)

    @observes
    def on_detail(self, event: Event) -> None:
        self.note(event, event.gfns, event.pfns)

    def note(self, event: Event, gfns: Pages | None, pfns: Pages | None) -> None:
        """An event, with its pages."""
        other = event.vm not in (-1, self.vm)
        match event.kind, event.phase:
            case ("call" | "hook"), "begin":
                self._begin(event, gfns, pfns, other)
            case ("call" | "hook"), "end":
                self._end(event)
            case _ if other:
                pass
            case ("op" | "charge"), _:
                self._work(event)
            case "host", _:
                self._phase = str(event.info.get("phase", ""))
            case "exit", _:
                if any(_exit_is_about(event.info.get("exit"), gfn) for gfn in self._gfns):
                    self._put(event.actor, self._step(event))
            case ("entry" | "attribute" | "frames" | "content" | "invalidate" | "memslot"), _:
                self._at(event, gfns, pfns)

    # ---- pages ------------------------------------------------------------------------------------------------

    def _is_ours(self, gfns: Pages | None, pfns: Pages | None, level: int) -> bool:
        if gfns is not None and any(place(gfns, gfn, level) is not None for gfn in self._gfns):
            return True
        return pfns is not None and any(place(pfns, pfn, level) is not None for pfn in self._pfns)

    def _learn(self, actor: str, gfns: Pages | None, pfns: Pages | None, level: int) -> None:
        """Where gfns and frames of a batch are told, the page's other name is known from now on."""
        if gfns is None or pfns is None:
            return
        for mine, here, others, there in (
            (self._gfns, gfns, self._pfns, pfns), (self._pfns, pfns, self._gfns, gfns)
        ):  # fmt: skip
            if (mine is self._gfns) != (self.gfn is not None):
                continue
            for page in mine:
                at = place(here, page, level)
                other = None if at is None else page_at(there, *at)
                if other is not None and other not in others:
                    others.add(other)
                    self._reveal(actor)

    def _reveal(self, actor: str) -> None:
        """Another name of the page is known: look once more at what is open."""
        for one in self._open.get(actor, []):
            if one.ours is False and self._is_ours(one.pages, None, one.level):
                one.ours = True
            found = [some for some in one.maybe if self._is_ours(None, some[2], PG_LEVEL_4K)]
            one.maybe = [some for some in one.maybe if some not in found]
            steps = [(at, self._changed(event, None, pfns)) for at, event, pfns in found]
            for at, step in reversed(steps):
                one.step.within.insert(at, step)

    # ---- calls and hooks --------------------------------------------------------------------------------------

    def _step(self, event: Event, **fields: Any) -> Step:
        return Step(event.t_ns, event.actor, event.kind, event.name, self._phase, event.n, **fields)

    def _begin(self, event: Event, gfns: Pages | None, pfns: Pages | None, other: bool) -> None:
        """other: it is about another VM, and so is what it costs."""
        level = event.level
        ours = None if gfns is None and pfns is None and not other else not other and self._is_ours(gfns, pfns, level)
        if ours:
            self._learn(event.actor, gfns, pfns, level)
        step = self._step(event, details=_details(event))
        self._open.setdefault(event.actor, []).append(_Open(step, None if other else gfns, level, ours))

    def _end(self, event: Event) -> None:
        stack = self._open.get(event.actor, [])
        while any(one.step.name == event.name for one in stack):
            one = stack.pop()
            same = one.step.name == event.name
            self._close(event, one, float(event.info.get("ns", 0)) if same else 0)
            if same:
                return

    def _close(self, event: Event, one: _Open, ns: float) -> None:
        step = one.step
        stack = self._open[event.actor]
        if one.ours:
            share = max(1, step.pages)
            step.cost_ns = ns / share
            step.details |= _outcome(event.info)
            for (kind, name), work in one.work.items():
                part = Step(work.t_ns, step.actor, kind, name, step.phase, step.pages, work.ns / share)
                part.details["times"] = work.n / share
                step.within.append(part)
            step.within.sort(key=lambda within: (within.kind == "charge", within.t_ns))
        elif one.ours is None and stack:
            # It names no pages: what it cost is a cost of what it is part of.
            for key, work in one.work.items():
                _sum(stack[-1].work, key, work.t_ns, work.n, work.ns)
        if one.ours or step.within:
            self._put(event.actor, step)

    def _work(self, event: Event) -> None:
        stack = self._open.get(event.actor)
        if stack:
            _sum(stack[-1].work, (event.kind, event.name), event.t_ns, event.n, float(event.info["ns"]))

    # ---- what takes no time -----------------------------------------------------------------------------------

    def _at(self, event: Event, gfns: Pages | None, pfns: Pages | None) -> None:
        if not self._is_ours(gfns, pfns, event.level):
            self._keep_for_later(event, gfns, pfns)
            return
        self._learn(event.actor, gfns, pfns, event.level)
        self._put(event.actor, self._changed(event, gfns, pfns))
        if event.kind == "frames" and event.name == "free":
            self._forget(pfns)

    def _keep_for_later(self, event: Event, gfns: Pages | None, pfns: Pages | None) -> None:
        """Frames are allocated and cleared before it is told whose they are."""
        stack = self._open.get(event.actor)
        if gfns is None and pfns is not None and stack and stack[-1].ours and self.gfn is not None:
            one = stack[-1]
            one.maybe.append((len(one.step.within), event, pfns))

    def _changed(self, event: Event, gfns: Pages | None, pfns: Pages | None) -> Step:
        """The step that an event about the page is, with the states that it leads from and to."""
        step = self._step(event, details=_details(event))
        for name, mine, here in (("pfn", self._pfns, pfns), ("gfn", self._gfns, gfns)):
            found = [] if here is None else [page for page in mine if place(here, page, event.level) is not None]
            if found:
                step.details[name] = found[0]
        frame = self._frames.setdefault(step.details.get("pfn", 0), _Frame())
        match event.kind, event.name:
            case "entry", _:
                step.was, step.now = str(event.info.get("from", "")), str(event.info.get("to", ""))
            case "attribute", now:
                step.was, step.now, self._attribute = self._attribute, now, now
            case "frames", ("pin" | "unpin") as name:
                was = frame.pins
                frame.pins += 1 if name == "pin" else -1
                step.was, step.now = f"pins {was}", f"pins {frame.pins}"
            case "frames", name if "use" in event.info:
                was_use, frame.use = "FREE" if name == "alloc" else frame.use, _word(event.info["use"])
                step.was, step.now = was_use, frame.use
            case _:
                pass
        return step

    def _forget(self, pfns: Pages | None) -> None:
        """Frames went back to the host: whoever gets them next is somebody else."""
        assert pfns is not None
        gone = {pfn for pfn in self._pfns if place(pfns, pfn, PG_LEVEL_4K) is not None}
        if self.gfn is not None:
            self._pfns -= gone
        elif gone:
            self._gfns.clear()

    def _put(self, actor: str, step: Step) -> None:
        stack = self._open.get(actor)
        if stack:
            stack[-1].step.within.append(step)
        elif len(self._first) < KEEP:
            self._first.append(step)
        else:
            self.left_out += len(self._last) == KEEP
            self._last.append(step)


def _is_use(step: Step) -> bool:
    match step.kind:
        case "entry":
            return "table" not in (step.was, step.now)
        case "call":
            return step.name in ("KVM_RUN", "resolve", "VMM write", "VMM read") and step.cost_ns is not None
        case kind:
            return kind in ("content", "frames")


def _word(value: Any) -> str:
    return value.name if isinstance(value, Enum) else str(value)


def _sum(into: dict[tuple[str, str], _Work], key: tuple[str, str], t_ns: float, n: int, ns: float) -> None:
    work = into.setdefault(key, _Work(t_ns))
    work.n += n
    work.ns += ns


def _details(event: Event) -> dict[str, Any]:
    """What a person might want to know of an event, as plain values."""
    found: dict[str, Any] = {"level": event.level} if event.level else {}
    if event.n:
        found["n"] = event.n
    for name, value in event.info.items():
        if isinstance(value, Enum | bool | int | str) and name not in ("ns", "from", "to", "use"):
            found[name] = value.name if isinstance(value, Enum) else value
    return found


def _outcome(info: dict[str, Any]) -> dict[str, Any]:
    return {name: info[name] for name in ("error", "injected") if name in info}


def _exit_is_about(exit_: Any, gfn: int) -> bool:
    """Whether an exit to user space names the gfn (live, or as a log shows it)."""

    def field(name: str) -> Any:
        return exit_.get(name) if isinstance(exit_, dict) else getattr(exit_, name, None)

    if field("gpa") is not None:
        return bool(field("gpa") >> PAGE_SHIFT == gfn)
    gfns = field("gfns")
    return gfns is not None and place(runs_to_pages(gfns) if isinstance(gfns, list) else gfns, gfn, 0) is not None


# ---- for people and programs ------------------------------------------------------------------------------------

TITLES = ("at, ns", "who", "what", "pages", "ns each", "from -> to")


def table_of(life: Explain) -> list[tuple[str, ...]]:
    """Rows under TITLES, one for each step, what happened within it further in; prices of a step stand in one row."""
    rows: list[tuple[str, ...]] = []
    phase = ""
    flat = [(depth, step) for outer in life.steps for depth, step in outer.flat()]
    for (depth, is_charge, _), some in groupby(flat, lambda at: (at[0], at[1].kind == "charge", _alone(at[1]))):
        steps = [step for _, step in some]
        first = steps[0]
        if first.phase != phase:
            phase = first.phase
            rows.append((f"{phase}:", "", "", "", "", ""))
        if is_charge:
            charges = ", ".join(f"{step.name} {_ns(step.cost_ns)}" for step in steps)
            indent = "  " * depth
            for line in wrap(charges, 48, break_on_hyphens=False):
                rows.append(("", "", indent + line, "", "", ""))
            continue
        pages = f"{first.pages:,}" if first.kind in ("call", "hook") and first.cost_ns is not None else ""
        states = f"{first.was} -> {first.now}" if first.now else ""
        who = "VMM" if first.actor == NOBODY else first.actor
        rows.append((f"{first.t_ns:,.0f}", who, "  " * depth + str(first), pages, _ns(first.cost_ns), states))
    return rows


def _alone(step: Step) -> int:
    return 0 if step.kind == "charge" else id(step)


def _ns(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 10 or value == round(value) else f"{value:.2f}"


def to_json(lives: Sequence[Explain], source: str, skipped: str) -> dict[str, Any]:
    """The lives as plain values (docs/output.md names the keys)."""
    return {
        "schema": SCHEMA,
        "source": source,
        "lives": [
            {
                "backend": life.backend,
                "gfn": life.gfn,
                "pfn": life.pfn,
                "skipped": skipped,
                "touched": life.touched,
                "left_out": life.left_out,
                "blurred": life.blurred,
                "steps": [_plain(depth, step) for outer in life.steps for depth, step in outer.flat()],
            }
            for life in lives
        ],
    }


def _plain(depth: int, step: Step) -> dict[str, Any]:
    return {
        "t_ns": step.t_ns, "actor": step.actor, "phase": step.phase, "depth": depth, "kind": step.kind,
        "name": step.name, "text": str(step), "pages": step.pages, "cost_ns": step.cost_ns, "from": step.was,
        "to": step.now, "details": step.details,
    }  # fmt: skip


# ---- page numbers -----------------------------------------------------------------------------------------------


def place(pages: Pages, page: int, level: int) -> tuple[int, int] | None:
    """Where a page stands: the position of its number, and how far behind that number it lies; None: it is not there.

    The numbers may be those of large pages: first pages of `level`, or of the size of the step of a run.
    """
    if isinstance(pages, slice):
        step = pages.step or 1
        inside = page - page % step if step >= 512 else page
        for number in (page, inside, page >> order_of(level) << order_of(level) if level > PG_LEVEL_4K else page):
            if pages.start <= number < pages.stop and (number - pages.start) % step == 0:
                return (number - pages.start) // step, page - number
        return None
    if isinstance(pages, np.ndarray):
        for number in (page, page >> order_of(level) << order_of(level)) if level > PG_LEVEL_4K else (page,):
            found = np.flatnonzero(pages == number)
            if len(found):
                return int(found[0]), page - number
        return None
    before = 0
    for part in pages:
        at = place(part, page, level)
        if at is not None:
            return before + at[0], at[1]
        before += len(range(part.start, part.stop, part.step or 1))
    return None


def page_at(pages: Pages, position: int, inside: int) -> int | None:
    """The page at a position of `place`; None where it is not shown."""
    if isinstance(pages, slice):
        numbers = range(pages.start, pages.stop, pages.step or 1)
        return numbers[position] + inside if position < len(numbers) else None
    if isinstance(pages, np.ndarray):
        return int(pages[position]) + inside if position < len(pages) else None
    for part in pages:
        n = len(range(part.start, part.stop, part.step or 1))
        if position < n:
            return page_at(part, position, inside)
        position -= n
    return None


def runs_to_pages(runs: list[list[int]]) -> list[slice]:
    """The runs of an event log, `[first, n]` or `[first, n, step]`."""
    made = []
    for run in runs:
        start, n, *rest = run
        step = rest[0] if rest else 1
        made.append(slice(start, start + n * step, step))
    return made


# ---- from a log -------------------------------------------------------------------------------------------------


def read_log(
    path: Path, make: Callable[[], Explain], progress: Callable[[int, int | None, str], None]
) -> list[Explain]:
    """The life of the page in each run of an event log, in the order in which they stand there.

    Raises InputError where the file cannot be read, or is no event log.
    """
    found: dict[str, Explain] = {}
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            for number, line in enumerate(file, 1):
                values = _parse(path, number, line)
                if number == 1:
                    if values.get("cvmcore_events") != 1:
                        raise InputError(f"{path}: is no event log of cvmcore: the first line does not say so")
                    continue
                _feed(found, make, values, f"{path}:{number}")
                if number % 10_000 == 0:
                    progress(file.tell(), size, "read")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    return list(found.values())


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{path}:{number}: this is no JSON object")
    return values


def _feed(found: dict[str, Explain], make: Callable[[], Explain], values: dict[str, Any], where: str) -> None:
    try:
        backend = str(values["backend"])
        event = Event(
            values["t_ns"], values["actor"], values["kind"], values["name"], values["phase"], values["vm"], None, None,
            values.get("level", 0), values["n"], values.get("info", {}),
        )  # fmt: skip
        pages: list[Iterable[slice] | None] = [
            runs_to_pages(values[name]) if name in values else None for name in ("gfns", "pfns")
        ]
        if backend not in found:
            found[backend] = make()
            found[backend].backend = backend
        found[backend].blurred += "gfns_more" in values
        found[backend].note(event, *pages)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{where}: this is no event") from None
