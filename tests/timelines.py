"""Reads a timeline back, of either format, and checks that it is well formed while doing so."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs

from cvmcore.timeline import WORK


@attrs.define(eq=False)
class Drawn:
    """A slice as it was read: `depth` slices are around it."""

    depth: int
    name: str
    category: str
    start_ns: int
    end_ns: int
    args: dict[str, Any]

    @property
    def ns(self) -> int:
        return self.end_ns - self.start_ns


@attrs.define
class Read:
    """tracks and counters by path, as "tdx/locks/vm0.mmu_lock"; a path that several tracks share has a list of each."""

    tracks: dict[str, list[list[Drawn]]] = attrs.field(factory=dict)
    counters: dict[str, list[tuple[int, float]]] = attrs.field(factory=dict)
    about: dict[str, Any] = attrs.field(factory=dict)

    def slices(self, path: str) -> list[Drawn]:
        return [drawn for track in self.tracks.get(path, []) for drawn in track]

    def actors(self, backend: str) -> Iterator[tuple[str, list[Drawn]]]:
        """(name, slices) of the VMM and of the vCPUs."""
        for path in self.tracks:
            name = path.removeprefix(f"{backend}/")
            if name != path and "/" not in name and name != "phases":
                yield name, self.slices(path)

    def work(self, backend: str) -> dict[str, float]:
        """ns by name of all priced work, folded or not."""
        sums: dict[str, float] = {}
        for _, slices in self.actors(backend):
            for drawn in slices:
                if drawn.category in WORK:
                    sums[drawn.name] = sums.get(drawn.name, 0) + drawn.args["ns"]
                for name, part in drawn.args.get("work", {}).items():
                    sums[name] = sums.get(name, 0) + part["ns"]
        return sums


def read(path: Path) -> Read:
    """The timeline in a file."""
    found = read_perfetto(path) if path.suffix == ".pftrace" else read_chrome(path)
    for tracks in found.tracks.values():
        for slices in tracks:
            _check_nesting(slices)
    for values in found.counters.values():
        assert [t for t, _ in values] == sorted(t for t, _ in values)
        assert all(value >= 0 for _, value in values)
    return found


def _check_nesting(slices: list[Drawn]) -> None:
    """In the order of their beginning, outer ones first, none crosses another."""
    around: list[Drawn] = []
    for drawn in slices:
        assert drawn.start_ns <= drawn.end_ns
        assert drawn.depth <= len(around)
        del around[drawn.depth :]
        if around:
            assert around[-1].start_ns <= drawn.start_ns and drawn.end_ns <= around[-1].end_ns, (around[-1], drawn)
        around.append(drawn)
    for depth in {drawn.depth for drawn in slices}:
        row = [drawn for drawn in slices if drawn.depth == depth]
        for one, other in pairwise(row):
            assert one.end_ns <= other.start_ns, (one, other)


def read_perfetto(path: Path) -> Read:
    """By the format's own library. As the trace processor does it: sorted by time, stable, one stack for each track."""
    from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as protos

    trace = protos.Trace()
    trace.ParseFromString(path.read_bytes())
    found = Read()
    known: dict[int, Any] = {}
    events = []
    for packet in trace.packet:
        assert packet.trusted_packet_sequence_id
        if packet.HasField("track_descriptor"):
            descriptor = packet.track_descriptor
            assert descriptor.uuid not in known
            assert not descriptor.parent_uuid or descriptor.parent_uuid in known
            known[descriptor.uuid] = descriptor
        elif packet.HasField("track_event"):
            assert packet.track_event.track_uuid in known, "declared before it is used"
            events.append(packet)
    assert trace.packet[0].sequence_flags & trace.packet[0].SEQ_INCREMENTAL_STATE_CLEARED

    def path_of(uuid: int) -> str:
        descriptor = known[uuid]
        above = f"{path_of(descriptor.parent_uuid)}/" if descriptor.parent_uuid else ""
        return above + str(descriptor.name)

    tracks: dict[int, list[Drawn]] = {}
    open_: dict[int, list[Drawn]] = {}
    kinds = protos.TrackEvent
    for packet in sorted(events, key=lambda packet: packet.timestamp):
        event = packet.track_event
        uuid = event.track_uuid
        if event.type == kinds.TYPE_COUNTER:
            assert known[uuid].HasField("counter")
            found.counters.setdefault(path_of(uuid), []).append((packet.timestamp, event.counter_value))
            continue
        stack = open_.setdefault(uuid, [])
        if event.type == kinds.TYPE_SLICE_END:
            stack.pop().end_ns = packet.timestamp
            continue
        args = _plain(event.debug_annotations)
        if event.type == kinds.TYPE_INSTANT and event.name == "about":
            found.about = args
            continue
        category = event.categories[0]
        drawn = Drawn(len(stack), event.name, category, packet.timestamp, packet.timestamp, args)
        tracks.setdefault(uuid, []).append(drawn)
        if event.type == kinds.TYPE_SLICE_BEGIN:
            drawn.end_ns = -1
            stack.append(drawn)
        else:
            assert event.type == kinds.TYPE_INSTANT
    assert not any(open_.values()), "what begins ends"
    for uuid, slices in tracks.items():
        found.tracks.setdefault(path_of(uuid), []).append(slices)
    return found


def _plain(annotations: Any) -> dict[str, Any]:
    found = {}
    for one in annotations:
        kind = one.WhichOneof("value")
        if one.array_values:
            found[one.name] = [value.string_value for value in one.array_values]
        elif kind is None:
            found[one.name] = _plain(one.dict_entries)
        else:
            found[one.name] = getattr(one, kind)
    return found


def read_chrome(path: Path) -> Read:
    """The JSON object form; events of a track stand in the file in the order in which they happen."""
    whole = json.loads(path.read_text())
    found = Read(about=whole["otherData"])
    names: dict[tuple[int, int], str] = {}
    processes: dict[int, str] = {}
    tracks: dict[tuple[int, int], list[Drawn]] = {}
    stacks: dict[tuple[int, int], list[Drawn]] = defaultdict(list)
    for event in whole["traceEvents"]:
        where = event["pid"], event.get("tid", 0)
        ns = round(event.get("ts", 0) * 1000)
        match event["ph"]:
            case "M" if event["name"] == "process_name":
                processes[event["pid"]] = event["args"]["name"]
            case "M" if event["name"] == "thread_name":
                names[where] = event["args"]["name"]
            case "C":
                (value,) = event["args"].values()
                path_ = f"{processes[event['pid']]}/{event['name']}"
                found.counters.setdefault(path_, []).append((ns, value))
            case "B" | "i" as kind:
                assert where in names and event["pid"] in processes, "named before it is used"
                drawn = Drawn(len(stacks[where]), event["name"], event["cat"], ns, ns, event["args"])
                tracks.setdefault(where, []).append(drawn)
                if kind == "B":
                    stacks[where].append(drawn)
            case "E":
                stacks[where].pop().end_ns = ns
            case kind:
                assert kind == "M"
    assert not any(stacks.values()), "what begins ends"
    for (pid, tid), slices in tracks.items():
        found.tracks.setdefault(f"{processes[pid]}/{names[pid, tid]}", []).append(slices)
    return found
