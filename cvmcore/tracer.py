"""The tracer: an observer that writes every event of a run as one JSON line.

The first line is a header, `{"cvmcore_events": 1, ...}`. Pages are written as runs, `[first, n]` or, for pages larger
than 4K, `[first, n, step]`; a scattered batch shows its first runs, and in `more` how many pages they leave out.
The file is there whole or not at all.
"""

from __future__ import annotations

import enum
import os
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import attrs
import numpy as np
from structlog.processors import JSONRenderer

from cvmcore.errors import InputError
from cvmcore.events import Event
from cvmcore.observers import observes
from cvmcore.pages import Sel, count

MAX_RUNS = 16
MAX_DEPTH = 4
MAX_TEXT = 400


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


class Tracer:
    """Writes events to `path`. A context manager: on success the file takes its name, else nothing is left.

    header: fields of the first line. `backend` stands in every line; set it before each run. Raises InputError where
    the file cannot be written.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.backend = ""
        self.events = 0
        self._render = JSONRenderer()
        self._target = Path(os.path.realpath(path))  # a link stays a link
        self._partial = self._target.with_name(f".{self._target.name}.{os.getpid()}.partial")
        if self._target.exists() and not self._target.is_file():
            raise InputError(f"{path}: cannot be written: it is no regular file")
        try:
            self._file: TextIO = open(self._partial, "w", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        except OSError as error:
            raise self._cannot(error) from None
        self._write({"cvmcore_events": 1, **header})

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._file.close()
            if kind is None:
                os.replace(self._partial, self._target)
        except OSError as failed:
            raise self._cannot(failed) from None
        finally:
            self._partial.unlink(missing_ok=True)

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

    def _write(self, line: dict[str, Any]) -> None:
        text = self._render(None, "", line)
        try:
            self._file.write(f"{text if isinstance(text, str) else text.decode()}\n")
        except OSError as error:
            raise self._cannot(error) from None

    def _cannot(self, error: OSError) -> InputError:
        return InputError(f"{self.path}: cannot be written: {error.strerror or error}")
