"""The tracer: an observer that writes every event of a run as one JSON line.

The first line is a header, `{"cvmcore_events": 1, ...}`. Pages are written as runs, `[first, n]` or, for pages larger
than 4K, `[first, n, step]`; a scattered batch shows its first runs, and in `more` how many pages they leave out.
The file is there whole or not at all.
"""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from structlog.processors import JSONRenderer

from cvmcore.events import Event
from cvmcore.observers import observes
from cvmcore.outfile import OutFile
from cvmcore.pages import Sel, count

MAX_RUNS = 16
MAX_DEPTH = 4
MAX_TEXT = 400
_AS_IT_IS = {int, float, bool, type(None)}


def runs_of(sel: Sel) -> tuple[list[list[int]], int]:
    """A selector as at most MAX_RUNS runs, and how many pages they leave out."""
    if isinstance(sel, slice):
        n, step = count(sel), sel.step or 1
        return ([[sel.start, n] if step == 1 else [sel.start, n, step]] if n else []), 0
    starts = np.flatnonzero(np.diff(sel, prepend=sel[:1] - 2) != 1)[: MAX_RUNS + 1]
    stops = np.append(starts, len(sel))[1:]
    lengths = (stops - starts)[:MAX_RUNS]
    runs = [[first, n] for first, n in zip(sel[starts[:MAX_RUNS]].tolist(), lengths.tolist(), strict=True)]
    return runs, len(sel) - int(lengths.sum())


def plain(value: Any, depth: int = 0) -> Any:
    """Any value of an event as JSON: bounded, and never a failure."""
    if type(value) in _AS_IT_IS:
        return value
    match value:
        case enum.Enum():
            return value.name
        case None | bool() | int() | float():
            return value
        case str():
            return value[:MAX_TEXT]
        case np.generic():
            return value.item()
        case slice():
            return runs_of(value)[0]
        case np.ndarray() if value.dtype == np.int64 and value.ndim == 1:
            runs, more = runs_of(value)
            return {"runs": runs, "more": more} if more else runs
        case np.ndarray():
            values, counts = np.unique(value, return_counts=True)
            shown = zip(values[:MAX_RUNS].tolist(), counts[:MAX_RUNS].tolist(), strict=True)
            return {"n": int(value.size), "counts": {str(v): n for v, n in shown}}
    if depth < MAX_DEPTH:
        if isinstance(value, dict):
            return {str(k): plain(v, depth + 1) for k, v in list(value.items())[:MAX_RUNS]}
        if isinstance(value, list | tuple):
            return [plain(v, depth + 1) for v in value[:MAX_RUNS]]
        if attrs.has(type(value)):
            fields = {f.name: plain(getattr(value, f.name, None), depth + 1) for f in attrs.fields(type(value))}
            return {"type": type(value).__name__, **fields}
    return f"<{type(value).__name__}>"


class Tracer(OutFile):
    """Writes events to `path`. A context manager: on success the file takes its name, else nothing is left.

    header: fields of the first line. `backend` stands in every line: that of the Host which is watched last. Raises
    InputError where the file cannot be written.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        super().__init__(path)
        self.backend = ""
        self.events = 0
        encode = json.JSONEncoder().encode  # made once: `json.dumps` would make one for each line
        self._render = JSONRenderer(serializer=lambda values, **_: encode(values))
        self._write({"cvmcore_events": 1, **header})

    def __enter__(self) -> Tracer:
        return self

    @observes
    def on_host(self, host: Any) -> None:
        self.backend = host.backend.name

    @observes
    def on_event(self, event: Event) -> None:
        self.events += 1
        line: dict[str, Any] = {
            "t_ns": round(event.t_ns),
            "backend": self.backend,
            "actor": event.actor,
            "kind": event.kind,
            "name": event.name,
            "phase": event.phase,
            "vm": event.vm,
            "n": event.n,
        }
        if event.level:
            line["level"] = event.level
        for name, sel in (("gfns", event.gfns), ("pfns", event.pfns)):
            if sel is not None:
                line[name], more = runs_of(sel)
                if more:
                    line[f"{name}_more"] = more
        if event.info:
            line["info"] = plain(event.info)
        self._write(line)

    @observes
    def on_detail(self, event: Event) -> None:
        self.on_event(event)

    def remarks(self) -> list[str]:
        """What a reader of a report should know of the trace: nothing, all of it is written."""
        return []

    def _write(self, line: dict[str, Any]) -> None:
        text = self._render(None, "", line)
        self.put(f"{text if isinstance(text, str) else text.decode()}\n")
