"""The tracer: any value of an event becomes bounded JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from cvmcore.errors import InputError
from cvmcore.events import Event
from cvmcore.pages import sort_unique
from cvmcore.tracer import MAX_RUNS, Tracer, plain, runs_of
from cvmcore.types import Access, Change, MemoryFault, Stopped, Walk


@pytest.mark.parametrize(
    ("pages", "runs", "left_out"),
    [
        (slice(0, 0, 1), [], 0),
        (slice(5, 9, 1), [[5, 4]], 0),
        (slice(512, 2048, 512), [[512, 3, 512]], 0),
        (np.array([], np.int64), [], 0),
        (np.array([7]), [[7, 1]], 0),
        (np.array([1, 2, 3, 9, 11, 12]), [[1, 3], [9, 1], [11, 2]], 0),
        (np.array([9, 3, 4]), [[9, 1], [3, 2]], 0),
        (np.arange(0, 100, 2), [[i, 1] for i in range(0, 2 * MAX_RUNS, 2)], 50 - MAX_RUNS),
    ],
)
def test_runs(pages: Any, runs: list[list[int]], left_out: int) -> None:
    assert runs_of(pages) == (runs, left_out)


def test_runs_name_the_pages_they_stand_for() -> None:
    pages = sort_unique(np.random.default_rng(1).integers(0, 40, 25))

    runs, left_out = runs_of(pages)

    shown = [page for first, n in runs for page in range(first, first + n)]
    assert shown == pages[: len(shown)].tolist() and left_out == len(pages) - len(shown)


@attrs.define
class Deep:
    inner: Any = None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (np.uint32(7), 7),
        (Change.MOVE, "MOVE"),
        (Walk.MISS, "MISS"),
        (slice(3, 5, 1), [[3, 2]]),
        (np.arange(0, 40, 2), {"runs": [[i, 1] for i in range(0, 32, 2)], "more": 4}),
        (np.array([0, 1, 1], np.uint8), {"n": 3, "counts": {"0": 1, "1": 2}}),
        ((1, "a" * 1000), [1, "a" * 400]),
        ({1: object()}, {"1": "<object>"}),
        (MemoryFault(4096, 8), {"type": "MemoryFault", "gpa": 4096, "flags": 8, "size_bytes": 4096, "errno": 14}),
        (Deep(Deep(Deep(Deep(Deep())))), None),
    ],
)
def test_any_value_becomes_json(value: Any, expected: Any) -> None:
    found = plain(value)

    json.dumps(found)
    if expected is None and value is not None:
        assert found["inner"]["inner"]["inner"]["inner"] == "<Deep>"
    else:
        assert found == expected


def test_results_of_hooks() -> None:
    assert plain(Access(np.zeros(2, np.uint8), slice(8, 10, 1)))["pfns"] == [[8, 2]]
    assert plain(Stopped(3, "why")) == {"type": "Stopped", "done": 3, "reason": "why"}


def test_an_event_is_a_line(tmp_path: Path) -> None:
    scattered = np.arange(0, 40, 2)
    with Tracer(tmp_path / "out.jsonl", {"workload": "x"}) as tracer:
        tracer.backend = "swprot"
        pfns = slice(1, 21, 1)
        tracer.on_event(Event(1.6, "vcpu0", "fault", "fault", vm=0, gfns=scattered, pfns=pfns, level=1, n=20))
    header, event = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    assert header == {"cvmcore_events": 1, "workload": "x"}
    assert event == {
        "t_ns": 2, "backend": "swprot", "actor": "vcpu0", "kind": "fault", "name": "fault", "phase": "at", "vm": 0,
        "n": 20, "level": 1, "gfns": [[i, 1] for i in range(0, 32, 2)], "gfns_more": 4, "pfns": [[1, 20]],
    }  # fmt: skip


def test_a_device_without_room(tmp_path: Path) -> None:
    """An error of the file system is one sentence, and the half of a file does not stay."""
    tracer = Tracer(tmp_path / "out.jsonl", {})
    tracer._file.close()
    tracer._file = open("/dev/full", "w")  # noqa: SIM115 - closed by the tracer

    with pytest.raises(InputError, match=r"out\.jsonl: cannot be written: No space left"), tracer:
        tracer.on_event(Event(0, "main", "vm", "create"))

    assert not list(tmp_path.iterdir())
