"""The timeline: an observer that draws a run on the virtual clock, for the Perfetto UI or a Chrome-trace viewer.

One track for each vCPU and for the VMM, one for the phases of the run, one for each lock, and counters. Calls, hooks,
vendor operations and priced work are slices that nest; work at a price is what takes the time, so the innermost slices
of a phase add up to it. A batch is one slice.

What is drawn is bounded. Within a call only the first slices are drawn one by one, the others are folded into one that
counts them; once half of `MAX_SLICES` are drawn, calls that follow are drawn ever more rarely (long ones always) and
folded in between. What was folded keeps its sums, and the trace says how much it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeAlias

import attrs

from cvmcore.effects import Lock
from cvmcore.errors import InputError
from cvmcore.events import Event, LockEvent
from cvmcore.observers import observes
from cvmcore.ops import NOBODY
from cvmcore.outfile import OutFile
from cvmcore.pages import Sel, count, first
from cvmcore.types import PAGE_BYTES, Fatal, Stopped

MAX_SLICES = 200_000
"""Slices that are drawn of a run on one backend."""
MAX_CHILDREN, MAX_TREE = 256, 10_000
"""Slices that are drawn within one call directly, and in all."""
STAGES = 32
"""In so many steps, each drawing half as often, a quarter of the slices is used up; the last is for long calls."""
MAX_LOCKS = 256
"""Lock names with tracks of their own."""
LONG = 0.01
"""A call that takes this part of all time so far is always drawn."""
FORMATS = {".pftrace": "perfetto", ".json": "chrome"}
"""By the ending of the file's name."""

Args = dict[str, Any]


# ---- what is drawn --------------------------------------------------------------------------------------------------


class Slice:
    """Something that took time, with what happened within. An `instant` took none and has nothing within."""

    __slots__ = ("args", "category", "children", "end_ns", "holds", "instant", "name", "size", "start_ns")

    def __init__(self, name: str, category: str, start_ns: float, args: Args, instant: bool = False) -> None:
        self.name = name
        self.category = category
        self.start_ns = self.end_ns = start_ns
        self.args = args
        self.instant = instant
        self.children: list[Slice] = []
        self.holds: list[tuple[Track, Slice]] = []
        """What it held, and waited for: of the outermost slice only."""
        self.size = 1
        """Slices in all."""

    def work(self) -> Iterator[tuple[str, int, float]]:
        """(name, n, ns) of the priced work within."""
        if self.category == FOLDED:
            for name, part in self.args["work"].items():
                yield name, part["n"], part["ns"]
        elif self.category in WORK:
            yield self.name, self.args["n"], self.args["ns"]
        for child in self.children:
            yield from child.work()


WORK = ("charge", "op")
FOLDED = "folded"


def fold(into: Slice | None, one: Slice) -> Slice:
    """A slice that stands for one more slice that is not drawn."""
    if into is None:
        into = Slice("", FOLDED, one.start_ns, {"slices": 0, "ns": 0, "work": {}})
    into.end_ns = one.end_ns
    into.args["slices"] += one.size
    into.args["ns"] += one.end_ns - one.start_ns
    for name, n, ns in one.work():
        part = into.args["work"].setdefault(name, {"n": 0, "ns": 0})
        part["n"] += n
        part["ns"] += ns
    into.name = f"{into.args['slices']:,} folded"
    return into


@attrs.define(eq=False)
class Track:
    """A line of the picture: slices that nest, or the values of a counter (`unit`: "bytes" or "count")."""

    number: int
    name: str
    parent: Track | None
    rank: int = 0
    unit: str = ""
    declared: bool = False
    value: float | None = None


class Sink(Protocol):
    """A file format."""

    def declare(self, track: Track) -> None: ...
    def draw(self, track: Track, one: Slice) -> None: ...
    def count(self, track: Track, t_ns: int, value: float) -> None: ...
    def close(self, about: Args) -> None: ...


class Perfetto:
    """Perfetto's own format (protos/perfetto/trace/track_event), through its package.

    A trace is one message, but messages that stand one behind another are read as one: so it is written in portions.
    """

    SEQUENCE = 1
    CLEARED = 1  # SEQ_INCREMENTAL_STATE_CLEARED
    PORTION = 1000

    def __init__(self, out: OutFile) -> None:
        try:
            from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as protos
        except ImportError:
            raise InputError(
                f"{out.path}: a .pftrace file takes the package perfetto, which is not installed: "
                "pip install 'cvmcore[timeline]', or give a name that ends in .json"
            ) from None
        self._out = out
        self._new = protos.Trace
        self._trace = protos.Trace()
        self._descriptor = protos.TrackDescriptor
        self._units = {
            "bytes": protos.CounterDescriptor.UNIT_SIZE_BYTES,
            "count": protos.CounterDescriptor.UNIT_COUNT,
        }
        kinds = protos.TrackEvent
        self._begin, self._end = kinds.TYPE_SLICE_BEGIN, kinds.TYPE_SLICE_END
        self._instant, self._counter = kinds.TYPE_INSTANT, kinds.TYPE_COUNTER
        self._packet().sequence_flags = self.CLEARED

    def _packet(self) -> Any:
        if len(self._trace.packet) >= self.PORTION:
            self._flush()
        return self._trace.packet.add(trusted_packet_sequence_id=self.SEQUENCE)

    def _flush(self) -> None:
        self._out.put(self._trace.SerializeToString())
        self._trace = self._new()

    def _event(self, track: Track, kind: int, t_ns: int) -> Any:
        packet = self._packet()
        packet.timestamp = t_ns
        event = packet.track_event
        event.type, event.track_uuid = kind, track.number
        return event

    def declare(self, track: Track) -> None:
        made = self._packet().track_descriptor
        made.uuid, made.name, made.sibling_order_rank = track.number, track.name, track.rank
        made.child_ordering = self._descriptor.EXPLICIT
        if track.parent is not None:
            made.parent_uuid = track.parent.number
        if track.unit:
            made.counter.unit = self._units[track.unit]

    def draw(self, track: Track, one: Slice) -> None:
        event = self._event(track, self._instant if one.instant else self._begin, round(one.start_ns))
        event.name = one.name
        event.categories.append(one.category)
        self._annotate(event.debug_annotations, one.args)
        for child in one.children:
            self.draw(track, child)
        if not one.instant:
            self._event(track, self._end, round(one.end_ns))

    def count(self, track: Track, t_ns: int, value: float) -> None:
        self._event(track, self._counter, t_ns).counter_value = round(value)

    def _annotate(self, annotations: Any, args: Args) -> None:
        for name, value in args.items():
            made = annotations.add(name=name)
            match value:
                case str():
                    made.string_value = value
                case bool():
                    made.bool_value = value
                case int():
                    made.int_value = value
                case float():
                    made.double_value = value
                case dict():
                    self._annotate(made.dict_entries, value)
                case list():
                    for one in value:
                        made.array_values.add().string_value = str(one)
                case _:
                    made.string_value = str(value)

    def close(self, about: Args) -> None:
        """What is to be said of the trace stands on a track of its own."""
        track = Track(1, "about this trace", None, -1)
        self.declare(track)
        self.draw(track, Slice("about", "about", 0, about, instant=True))
        self._flush()


class Chrome:
    """The JSON object form of Chrome's trace events: a process for each backend, begin and end, times in us.

    Begin and end (B, E) rather than complete events (X): what takes no time stays within what it happened in.
    """

    def __init__(self, out: OutFile) -> None:
        self._out = out
        self._first = True
        self._encode = json.JSONEncoder().encode
        self._named: set[int] = set()
        out.put('{"displayTimeUnit": "ns", "traceEvents": [\n')

    def _put(self, event: Args) -> None:
        self._out.put(("" if self._first else ",\n") + self._encode(event))
        self._first = False

    @staticmethod
    def _process(track: Track) -> Track:
        while track.parent is not None:
            track = track.parent
        return track

    def declare(self, track: Track) -> None:
        if track.parent is None:
            self._name(track, track, "process_name")

    def _name(self, process: Track, track: Track, what: str) -> None:
        where: Args = {"ph": "M", "pid": process.number, "tid": track.number}
        self._put({**where, "name": what, "args": {"name": track.name}})
        if what == "thread_name":
            self._put({**where, "name": "thread_sort_index", "args": {"sort_index": track.rank}})

    def draw(self, track: Track, one: Slice) -> None:
        process = self._process(track)
        if track.number not in self._named:
            self._named.add(track.number)
            self._name(process, track, "thread_name")
        where: Args = {"pid": process.number, "tid": track.number}
        kind: Args = {"ph": "i", "s": "t"} if one.instant else {"ph": "B"}
        at = round(one.start_ns) / 1000
        self._put({**kind, **where, "ts": at, "name": one.name, "cat": one.category, "args": one.args})
        for child in one.children:
            self.draw(track, child)
        if not one.instant:
            self._put({"ph": "E", **where, "ts": round(one.end_ns) / 1000})

    def count(self, track: Track, t_ns: int, value: float) -> None:
        args = {track.unit: round(value)}
        self._put({"ph": "C", "pid": self._process(track).number, "ts": t_ns / 1000, "name": track.name, "args": args})

    def close(self, about: Args) -> None:
        self._out.put(f'\n], "otherData": {json.dumps(about)}}}\n')


# ---- the observer ---------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Actor:
    """Who acts: a track, and what is open on it."""

    track: Track
    open: list[Slice] = attrs.field(factory=list)
    size: int = 0
    """Slices that are complete within the outermost open one, and not folded."""
    folded: Slice | None = None
    """What was not drawn since the last one that was."""


_Whose: TypeAlias = "tuple[str, Lock]"


@attrs.define(eq=False)
class _Lock:
    """The locks of one name, and their lanes: no two slices overlap on one of them. held, waiting: who has a lock or
    wants it, on which lane, since when."""

    name: str
    rank: int
    lanes: list[Track] = attrs.field(factory=list)
    held: dict[_Whose, tuple[int, Slice]] = attrs.field(factory=dict)
    wait_lanes: list[Track] = attrs.field(factory=list)
    waiting: dict[_Whose, tuple[int, Slice]] = attrs.field(factory=dict)
    taken: int = 0
    hold_ns: float = 0
    waits: int = 0
    wait_ns: float = 0


@attrs.define(eq=False)
class _Picture:
    """What is known of one Host: the run on one backend."""

    host: Any
    group: Track
    phases: Track
    lock_group: Track
    actors: dict[str, _Actor] = attrs.field(factory=dict)
    locks: dict[str, _Lock] = attrs.field(factory=dict)
    counters: list[Track] = attrs.field(factory=list)
    phase: Slice | None = None
    elsewhere_ns: float = 0
    now_ns: float = 0
    """The latest time that was seen."""
    counted_ns: int = 0
    calls: int = 0
    drawn: int = 0
    folded: int = 0
    counts: int = 0
    counted: int = 0


class Timeline:
    """Draws to `path`, in the format of its ending (FORMATS). A context manager: on success the file takes its name,
    else nothing is left.

    header: what the trace says of itself. most: how many slices are drawn for each Host that is watched. Raises
    InputError where the file cannot be written, or the format needs what is not installed.
    """

    def __init__(self, path: Path, header: dict[str, Any], *, most: int = MAX_SLICES) -> None:
        self.most = most
        self._about: Args = {**header, "clock": "virtual, ns", "bound": most}
        if path.suffix.lower() not in FORMATS:
            raise InputError(f"{path}: the name of a timeline ends in {' or '.join(FORMATS)}")
        binary = FORMATS[path.suffix.lower()] == "perfetto"
        self._out = OutFile(path, binary=binary)
        try:
            self._sink: Sink = Perfetto(self._out) if binary else Chrome(self._out)
        except InputError as error:
            self._out.__exit__(type(error), error, None)
            raise
        self._tracks = 1
        self._picture: _Picture | None = None

    def __enter__(self) -> Timeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
                self._sink.close(self._about)
        except BaseException as failed:
            self._out.__exit__(type(failed), failed, None)
            raise
        self._out.__exit__(kind, error, at)

    def remarks(self) -> list[str]:
        """What a reader should know of the picture of the last Host: how much of it is folded."""
        self._finish()
        drawn, folded = self._last
        if not folded:
            return []
        return [f"the timeline draws {drawn:,} slices, and {folded:,} more folded into sums of what they stand for"]

    _last = 0, 0

    # ---- being told -------------------------------------------------------------------------------------------

    @observes
    def on_host(self, host: Any) -> None:
        self._finish()
        group = self._track(host.backend.name, None)
        phases, locks = self._track("phases", group), self._track("locks", group, 1 << 10)
        picture = self._picture = _Picture(host, group, phases, locks)
        memory = self._track("memory", group, 1 << 20)
        for rank, (title, unit) in enumerate(COUNTERS):
            picture.counters.append(self._track(title, memory, rank, unit))

    @observes
    def on_event(self, event: Event) -> None:
        if event.kind == "hook":
            self._begin_or_end(event)
        elif event.kind == "host" and event.name == "phase":
            self._new_phase(event)
        elif event.kind not in ("fault", "gmem"):
            self._leaf(event, Slice(f"{event.kind} {event.name}", event.kind, event.t_ns, _args(event), instant=True))

    @observes
    def on_detail(self, event: Event) -> None:
        if event.kind == "call":
            self._begin_or_end(event)
        elif event.kind in WORK:
            ns = event.info["ns"]
            args = {"n": event.n, "ns": ns, "price item": event.info["item"]}
            work = Slice(event.name, event.kind, event.t_ns - ns, args)
            work.end_ns = event.t_ns
            self._leaf(event, work)
        elif event.kind == "elsewhere" and self._picture is not None:
            self._picture.elsewhere_ns += event.info["ns"]

    @observes
    def on_lock(self, event: LockEvent) -> None:
        picture = self._picture
        if picture is None:
            return
        name = event.lock.name
        if name not in picture.locks and len(picture.locks) >= MAX_LOCKS:
            name = f"{name.partition('[')[0]}[...]"
        lock = picture.locks.get(name)
        if lock is None:
            lock = picture.locks[name] = _Lock(name, len(picture.locks))
        {"wait": self._wait, "take": self._take, "drop": self._drop}[event.phase](picture, lock, event)

    # ---- slices -----------------------------------------------------------------------------------------------

    def _track(self, name: str, parent: Track | None, rank: int = 0, unit: str = "") -> Track:
        self._tracks += 1
        return Track(self._tracks, name, parent, rank, unit)

    def _actor(self, picture: _Picture, name: str) -> _Actor:
        if name not in picture.actors:
            picture.actors[name] = _Actor(self._track(_who(name), picture.group, 1 + len(picture.actors)))
        return picture.actors[name]

    def _begin_or_end(self, event: Event) -> None:
        picture = self._picture
        if picture is None:
            return
        actor = self._actor(picture, event.actor)
        if event.phase == "begin":
            action = event.info.get("action")
            title = f"{event.name}: {action}" if action else event.name
            actor.open.append(Slice(title, event.kind, event.t_ns, _args(event)))
            return
        while any(_is(one, event) for one in actor.open):
            one = actor.open.pop()
            ours = _is(one, event)
            if ours:
                one.args |= {"ns": event.info["ns"], **_outcome(event.info)}
                if event.kind == "hook":
                    one.args["n_pages"] = event.n
            self._ended(picture, actor, one, event.t_ns)
            if ours:
                break
        if event.kind == "call":
            self._count(picture, event.t_ns)

    def _leaf(self, event: Event, one: Slice) -> None:
        picture = self._picture
        if picture is not None:
            self._ended(picture, self._actor(picture, event.actor), one, event.t_ns)

    def _ended(self, picture: _Picture, actor: _Actor, one: Slice, t_ns: float) -> None:
        """A slice is complete: it belongs to the one that is open, or is drawn, or folded."""
        one.end_ns = t_ns
        picture.now_ns = max(picture.now_ns, t_ns)
        if not actor.open:
            actor.size = 0
            self._draw_or_fold(picture, actor, one)
            return
        parent = actor.open[-1]
        if len(parent.children) < MAX_CHILDREN and actor.size < MAX_TREE:
            parent.children.append(one)
            parent.size += one.size
            actor.size += 1
            return
        actor.size -= one.size - 1
        picture.folded += one.size
        before = parent.children[-1] if parent.children and parent.children[-1].category == FOLDED else None
        folded = fold(before, one)
        if before is None:
            parent.children.append(folded)
            parent.size += 1

    def _draw_or_fold(self, picture: _Picture, actor: _Actor, one: Slice) -> None:
        rarely = picture.drawn - self.most // 2
        every = 1 if rarely < 0 else 2 << min(rarely // max(1, self.most // (4 * STAGES)), STAGES)
        picture.calls += 1
        if one.end_ns - one.start_ns > LONG * picture.now_ns > 0:
            room = self.most
        else:
            room = self.most * 3 // 4 if picture.calls % every == 0 else 0
        if picture.drawn + one.size + len(one.holds) <= room:
            self._draw_folded(picture, actor)
            self._draw(actor.track, one)
            picture.drawn += one.size
            for lane, hold in one.holds:
                self._draw(lane, hold)
                picture.drawn += 1
        else:
            picture.folded += one.size + len(one.holds)
            actor.folded = fold(actor.folded, one)

    def _draw_folded(self, picture: _Picture, actor: _Actor) -> None:
        if actor.folded is not None:
            self._draw(actor.track, actor.folded)
            picture.drawn += 1
            actor.folded = None

    def _draw(self, track: Track, one: Slice) -> None:
        self._declare(track)
        self._sink.draw(track, one)

    def _declare(self, track: Track) -> None:
        if not track.declared:
            track.declared = True
            if track.parent is not None:
                self._declare(track.parent)
            self._sink.declare(track)

    # ---- phases and counters ----------------------------------------------------------------------------------

    def _new_phase(self, event: Event) -> None:
        picture = self._picture
        assert picture is not None
        self._end_phase(picture)
        picture.phase = Slice(str(event.info["phase"]), "phase", event.t_ns, {})
        self._count(picture, event.t_ns, always=True)

    def _end_phase(self, picture: _Picture) -> None:
        if picture.phase is not None:
            picture.phase.end_ns = max(picture.now_ns, picture.phase.start_ns)
            self._draw(picture.phases, picture.phase)
            picture.drawn += 1
        picture.phase = None

    def _count(self, picture: _Picture, t_ns: float, always: bool = False) -> None:
        """Sample the counters; the more samples there are, the more rarely."""
        picture.counts += 1
        if not always and picture.counts % (1 << min(picture.counted // max(1, self.most // 16), STAGES)):
            return
        # Actors that run beside each other tell their times out of order.
        picture.counted_ns = max(picture.counted_ns, round(t_ns))
        for track, value in zip(picture.counters, _values(picture), strict=True):
            if value != track.value:
                track.value = value
                self._declare(track)
                self._sink.count(track, picture.counted_ns, value)
                picture.counted += 1

    # ---- locks ------------------------------------------------------------------------------------------------

    def _wait(self, picture: _Picture, lock: _Lock, event: LockEvent) -> None:
        args = {"for": "write" if event.write else "read", "held by": ", ".join(map(_who, event.holders))}
        lock.waiting[event.actor, event.lock] = (
            self._lane(picture, lock.wait_lanes, lock.waiting, f"{lock.name} waits", 2 * lock.rank + 1),
            Slice(_who(event.actor), "wait", event.t_ns, args),
        )

    def _take(self, picture: _Picture, lock: _Lock, event: LockEvent) -> None:
        whose = event.actor, event.lock
        if whose in lock.waiting:
            lane, wait = lock.waiting.pop(whose)
            wait.end_ns = event.t_ns
            lock.waits += 1
            lock.wait_ns += wait.end_ns - wait.start_ns
            self._attach(picture, event.actor, lock.wait_lanes[lane], wait)
            own = Slice(f"wait for {lock.name}", "wait", wait.start_ns, wait.args)
            self._ended(picture, self._actor(picture, event.actor), own, event.t_ns)
        lock.held[event.actor, event.lock] = (
            self._lane(picture, lock.lanes, lock.held, lock.name, 2 * lock.rank),
            Slice(_who(event.actor), "lock", event.t_ns, {"for": "write" if event.write else "read"}),
        )

    def _drop(self, picture: _Picture, lock: _Lock, event: LockEvent) -> None:
        whose = event.actor, event.lock
        if whose not in lock.held:
            return
        lane, hold = lock.held.pop(whose)
        hold.end_ns = event.t_ns
        lock.taken += 1
        lock.hold_ns += hold.end_ns - hold.start_ns
        self._attach(picture, event.actor, lock.lanes[lane], hold)

    def _lane(
        self, picture: _Picture, lanes: list[Track], used: dict[_Whose, tuple[int, Slice]], name: str, rank: int
    ) -> int:
        """The first lane that nobody uses."""
        taken = {lane for lane, _ in used.values()}
        free = next(number for number in range(len(lanes) + 1) if number not in taken)
        if free == len(lanes):
            lanes.append(self._track(name, picture.lock_group, rank))
        return free

    def _attach(self, picture: _Picture, name: str, lane: Track, one: Slice) -> None:
        """A lock's slice is drawn with the call in which it happened, or at once where none is open."""
        actor = self._actor(picture, name)
        if actor.open and len(actor.open[0].holds) < MAX_TREE:
            actor.open[0].holds.append((lane, one))
        elif not actor.open and picture.drawn < self.most:
            self._draw(lane, one)
            picture.drawn += 1
        else:
            picture.folded += 1

    # ---- the end ----------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """The run on a backend is over: draw what is left, and note what was folded."""
        picture, self._picture = self._picture, None
        if picture is None:
            return
        for actor in picture.actors.values():
            while actor.open:
                self._ended(picture, actor, actor.open.pop(), picture.now_ns)
            self._draw_folded(picture, actor)
        self._end_phase(picture)
        self._count(picture, picture.now_ns, always=True)
        self._last = picture.drawn, picture.folded
        self._about[picture.group.name] = {
            "slices": picture.drawn,
            "folded slices": picture.folded,
            "locks": {name: _totals(lock) for name, lock in picture.locks.items()},
        }


# ---- what is said of an event ---------------------------------------------------------------------------------------

COUNTERS = (
    ("mapped pages", "count"),
    ("page-table pages", "count"),
    ("pinned pages", "count"),
    ("host memory in use", "bytes"),
    ("work of other CPUs, ns", "count"),
)


def _values(picture: _Picture) -> Iterable[float]:
    """The counters as they stand."""
    host = picture.host
    roots = [root for vm in host.vms for root in (*vm.tdp.roots(), *vm.tdp.invalid)]
    yield sum(root.pages_mapped for root in roots)
    yield sum(root.table_bytes for root in roots) // PAGE_BYTES
    yield host.frames.pins_held
    yield host.frames.in_use * PAGE_BYTES
    yield picture.elsewhere_ns


def _who(actor: str) -> str:
    return "VMM" if actor == NOBODY else actor


def _totals(lock: _Lock) -> Args:
    waits = {"waits": lock.waits, "wait ns": lock.wait_ns} if lock.waits else {}
    return {"taken": lock.taken, "hold ns": lock.hold_ns, **waits}


def _args(event: Event) -> Args:
    """What a slice says: pages, level, and what else is a plain value."""
    args: Args = {"vm": event.vm} if event.vm >= 0 else {}
    if event.n:
        args["n_pages"] = event.n
    if event.level:
        args["level"] = event.level
    for name, sel in (("gfns", event.gfns), ("pfns", event.pfns)):
        if sel is not None and count(sel):
            args[name] = _range(sel)
    for name, value in event.info.items():
        if isinstance(value, bool | int | float | str):
            args[name] = value
    return args


def _is(one: Slice, event: Event) -> bool:
    """Whether this is the slice that an event ends."""
    return one.category == event.kind and one.name.partition(":")[0] == event.name


def _range(sel: Sel) -> str:
    """Pages in a few characters."""
    n = count(sel)
    if n == 1:
        return f"{first(sel):#x}"
    if isinstance(sel, slice):
        step = f" every {sel.step:#x}" if (sel.step or 1) > 1 else ""
        return f"{sel.start:#x} to {range(sel.start, sel.stop, sel.step or 1)[-1]:#x}{step}"
    return f"{n:,} from {first(sel):#x} on"


def _outcome(info: dict[str, Any]) -> Args:
    """How a call or a hook ended, where that is worth saying."""
    if "error" in info:
        return {"error": info["error"]}
    if "injected" in info:
        return {"injected": info["injected"]}
    match info.get("result"):
        case None:
            return {}
        case Stopped(done=done, reason=reason):
            why = f" ({reason.why})" if isinstance(reason, Fatal) and reason.why else ""
            return {"stopped at": done, "reason": f"{type(reason).__name__}{why}"}
        case Enum() as result:
            return {"result": result.name}
        case bool() | int() | float() | str() as result:
            return {"result": result}
        case result:
            return {"result": type(result).__name__}
