"""Benchmarks: what the model costs here, each figure beside the least that such work costs with numpy on this machine.

A row of the table is one thing that must stay cheap, with its bound (`ROWS`). Its *floor* is a small program of the
same kind, run in turn with the model so that a busy or slow machine hits both alike; the ratio of the two is the figure
to compare. Floors by kind:

random      drop the duplicates of a batch of gfns (sort, compare), read and write an 8-byte entry a page
sequential  write an 8-byte entry a page, values computed batch by batch
one         `random` for a batch of one
memory      one array of 8-byte entries, written where the model's guest writes; for an idle guest, this process

The arrays of the floors are touched before the clock starts. Observers are off; checks of the hardware and content are
on.
"""

from __future__ import annotations

import gc
import json
import mmap
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.backend import Backend
from cvmcore.cost import Profile
from cvmcore.effects import Steps
from cvmcore.errors import CvmError, InputError
from cvmcore.guest import Guest, Machine
from cvmcore.host import Host
from cvmcore.outfile import OutFile
from cvmcore.pages import IntArray, mappings_made, sort_unique, zeros
from cvmcore.plugins import load_backend
from cvmcore.runner import load_profile_for
from cvmcore.sched import Timed

SCHEMA = 1
NO_BACKEND = "-"
"""In place of a backend: the row is about none."""
BATCH = 1 << 17
NR_VCPUS = 16
SPARSE_PAGES = 1000
SMALL_BYTES = 64 << 20
LEAST_MIB = 1.0
"""Less memory than this is not told apart from none."""
WORSE = 1.3
"""A ratio that grew by more than this factor fails `check`."""
TRIES = 4
"""How often `check` measures before it says that something got slower; the best counts."""

_GIB_PAGES = 1 << 18
_MIB = 1 << 20
_CHUNK = 2 << 20
_TURN = 50
_SPARE_PAGES = 1 << 14
"""For page tables and structures of the trusted party, where a guest is small."""
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE (Linux 5.14), which Python does not name."""

P = ParamSpec("P")
Entries: TypeAlias = npt.NDArray[np.uint64]
Figures: TypeAlias = dict[str, tuple[float, float]]
"""What a measurement found, by row: (value, floor), in the row's unit."""
Progress: TypeAlias = Callable[[int, int | None, str], None]


@attrs.frozen
class Size:
    """How large a run is. random: GiB and batches. sequential: GiB, and rounds for it and for `linear_x`, which
    compares it with its quarter. memory: GiB of the guest whose memory is looked at. The others: repetitions."""

    random_gib: float
    random_batches: int
    sequential_gib: float
    sequential_rounds: int
    memory_gib: float
    ones: int
    timed_ops: int
    made: int
    helps: int


FULL = Size(64, 24, 192, 3, 192, 2000, 16000, 200, 15)
QUICK = Size(64, 6, 16, 1, 24, 2000, 1600, 60, 5)


@attrs.frozen
class Row:
    """One line of the table, its unit in its name. bound: on the `value`, or on the `ratio` to the floor; None:
    reported only. steady: the ratio depends little on machine and moment, so that `check` may compare it."""

    name: str
    bound: float | None = None
    bound_on: Literal["value", "ratio"] = "ratio"
    steady: bool = True
    per_backend: bool = True


ROWS = {
    row.name: row
    for row in (
        Row("random_ns", 6),
        Row("sequential_ns", 8),
        Row("sequential_fresh_ns", steady=False),
        Row("sequential_recycled_ns", steady=False),
        Row("linear_x", 4.4, "value"),
        Row("peak_mib", 1.6 * 1024, "value"),
        Row("idle_mib", 60, "value"),
        Row("sparse_mib", 40, "value"),
        Row("one_us", 100, "value"),
        Row("timed_us", 200, "value"),
        Row("make_ms", 1, "value"),
        Row("help_ms", 1.5, per_backend=False),
    )
}
"""What each row measures, and on which floor, is in docs/bench.md and in the function that measures it."""


@attrs.frozen
class Result:
    """One row on one backend (NO_BACKEND where it is about none)."""

    row: Row
    backend: str
    value: float
    floor: float

    @property
    def ratio(self) -> float:
        return self.value / self.floor

    @property
    def met(self) -> bool:
        """Whether the bound is kept; True where there is none."""
        return self.row.bound is None or (self.value if self.row.bound_on == "value" else self.ratio) <= self.row.bound


# ---- floors ---------------------------------------------------------------------------------------------------


def random_floor(entries: Entries, gfns: IntArray) -> None:
    """The least for scattered pages: drop duplicates, read an entry each, write those that are zero."""
    gfns = np.sort(gfns)
    keep = np.empty(len(gfns), bool)
    keep[0] = True
    np.not_equal(gfns[1:], gfns[:-1], out=keep[1:])
    gfns = gfns[keep]
    missing = gfns[entries[gfns] == 0]
    entries[missing] = missing.view(np.uint64) << np.uint64(12) | np.uint64(7)


def sequential_floor(entries: Entries, gfns: slice) -> None:
    """The least for a run: write an entry each."""
    entries[gfns] = np.arange(gfns.start, gfns.stop, dtype=np.uint64) << np.uint64(12) | np.uint64(7)


def _entries(pages: int) -> Entries:
    entries = np.zeros(pages, np.uint64)
    entries.fill(0)  # touch it: the floor is not the page faults of this process
    return entries


# ---- machines and their memory --------------------------------------------------------------------------------


def machine(backend: str, gib: float, vcpus: int = 1) -> Machine:
    """A launched machine of a backend with its own prices and options, on a host with a third more memory."""
    found = load_backend(backend)
    pages = _pages(gib)
    host = Host(found, load_profile_for(found, None), nr_frames=pages * 4 // 3 + _SPARE_PAGES)
    made = Machine(host, pages << 12, vcpus=vcpus)
    made.launch()
    return made


def backed_machine(backend: str, gib: float) -> tuple[Machine, list[mmap.mmap]]:
    """A machine with its arrays backed and zero: the operating system has given every page of them, which changes
    nothing in them. The guest has touched its last page, so that arrays which grow with the highest one have grown.
    Also returns the mappings behind the arrays."""
    with mappings_made() as mappings:
        made = machine(backend, gib)
        made.guest.write(slice(made.end_gfn - 1, made.end_gfn, 1))
    for mapping in mappings:
        try:
            mapping.madvise(_POPULATE_WRITE)
        except OSError:
            np.frombuffer(mapping, np.uint8)[:: mmap.PAGESIZE] |= 0
    return made, mappings


def _pages(gib: float) -> int:
    return int(gib * _GIB_PAGES)


def _batches(pages: int) -> Iterator[slice]:
    for low in range(0, pages, BATCH):
        yield slice(low, min(low + BATCH, pages), 1)


def _memory_mib(key: Literal["VmRSS", "VmHWM"]) -> float:
    """Memory of this process in MiB: resident now, or at its peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        raise InputError("the memory rows need /proc/self/status, which only Linux has") from None
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


# ---- measurements ---------------------------------------------------------------------------------------------


class _Clock:
    """Nanoseconds of what is measured in turn with something else, lap by lap. CPU time: what others do on the machine
    meanwhile is not in it."""

    def __init__(self, now_ns: Callable[[], int] = time.thread_time_ns) -> None:
        self.now_ns = now_ns
        self.laps_ns: list[float] = []

    def lap(self, work: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> float:
        start = self.now_ns()
        work(*args, **kwargs)
        self.laps_ns.append(self.now_ns() - start)
        return self.laps_ns[-1]

    @property
    def median_ns(self) -> float:
        return statistics.median(self.laps_ns)

    @property
    def sum_ns(self) -> float:
        return sum(self.laps_ns)


def _random(backend: str, size: Size) -> Figures:
    """Batches of random gfns, their first touch being a write: sort, fault in, accept where needed, write content."""
    pages = _pages(size.random_gib)
    batch = min(BATCH, pages)
    entries = _entries(pages)
    made, _ = backed_machine(backend, size.random_gib)
    vcpu = made.vcpus[0].vcpu
    rng = np.random.default_rng(0)
    floor, model, per_fault_ns = _Clock(), _Clock(), []
    for _ in range(size.random_batches):
        gfns = rng.integers(0, pages, batch)
        before = vcpu.faults
        floor.lap(random_floor, entries, gfns)
        model_ns = model.lap(_touch, made.guest, gfns)
        per_fault_ns.append(model_ns / (vcpu.faults - before))
    return {"random_ns": (statistics.median(per_fault_ns), floor.median_ns / batch)}


def _touch(guest: Guest, gfns: IntArray) -> None:
    guest.write(sort_unique(gfns))


def _sequential(backend: str, size: Size) -> Figures:
    """Populating in order, in three states of memory.

    Recycled arrays: those that a guest has filled are zeroed on the clock and filled again, so what comes on top of the
    backed ones is the zeroing.
    """
    pages = _pages(size.sequential_gib)
    entries = _entries(pages)
    rows = ("sequential_ns", "sequential_fresh_ns", "sequential_recycled_ns")
    found: dict[str, list[tuple[float, float]]] = {row: [] for row in rows}
    for _ in range(size.sequential_rounds):
        made = machine(backend, size.sequential_gib)
        fresh = _populate(made, entries)
        del made
        gc.collect()
        made, mappings = backed_machine(backend, size.sequential_gib)
        model_ns, floor_ns = _populate(made, entries)
        zeroing = _Clock()
        zeroing.lap(_zero, mappings, _dirty(mappings))
        del made, mappings
        gc.collect()
        recycled = model_ns + zeroing.sum_ns / pages, floor_ns
        for row, figures in zip(rows, ((model_ns, floor_ns), fresh, recycled), strict=True):
            found[row].append(figures)
    return {row: (_median(figures, 0), _median(figures, 1)) for row, figures in found.items()}


def _median(figures: Sequence[tuple[float, float]], which: int) -> float:
    return statistics.median(pair[which] for pair in figures)


def _populate(made: Machine, entries: Entries) -> tuple[float, float]:
    """Write all memory in order, in turn with the floor; ns per page of both, medians of the batches."""
    floor, model = _Clock(), _Clock()
    for gfns in _batches(made.end_gfn):
        floor.lap(sequential_floor, entries, gfns)
        model.lap(made.guest.write, gfns)
    batch = min(BATCH, made.end_gfn)
    return model.median_ns / batch, floor.median_ns / batch


def _dirty(mappings: Sequence[mmap.mmap]) -> list[list[slice]]:
    """Which bytes of each mapping are not zero any more, in chunks."""
    found = []
    for mapping in mappings:
        content = np.frombuffer(mapping, np.uint8)
        chunks = [slice(at, at + _CHUNK) for at in range(0, len(content), _CHUNK)]
        found.append([chunk for chunk in chunks if content[chunk].any()])
    return found


def _zero(mappings: Sequence[mmap.mmap], dirty: Sequence[Sequence[slice]]) -> None:
    for mapping, chunks in zip(mappings, dirty, strict=True):
        content = np.frombuffer(mapping, np.uint8)
        for chunk in chunks:
            content[chunk] = 0


def _linear(backend: str, size: Size) -> Figures:
    """Two guests side by side, one of four times the memory: for each batch of the small one, four of the large."""
    pages = _pages(size.sequential_gib)
    entries = _entries(pages)
    found: list[tuple[float, float]] = []
    for _ in range(size.sequential_rounds):
        large, _ = backed_machine(backend, size.sequential_gib)
        small, _ = backed_machine(backend, size.sequential_gib / 4)
        model, model_small, floor, floor_small = _Clock(), _Clock(), _Clock(), _Clock()
        quarter = _batches(pages // 4)
        for i, gfns in enumerate(_batches(pages)):
            floor.lap(sequential_floor, entries, gfns)
            model.lap(large.guest.write, gfns)
            if i % 4 == 0 and (less := next(quarter, None)):
                floor_small.lap(sequential_floor, entries, less)
                model_small.lap(small.guest.write, less)
        found.append((model.sum_ns / model_small.sum_ns, floor.sum_ns / floor_small.sum_ns))
        del large, small
        gc.collect()
    return {"linear_x": (_median(found, 0), _median(found, 1))}


def _sparse(backend: str, size: Size) -> Figures:
    """An idle guest, then a few random pages of it: what each adds to this process, which must be a new one."""
    pages = _pages(size.memory_gib)
    machine(backend, 1 / 64)  # so that code and its constants are there
    gc.collect()
    empty = _memory_mib("VmRSS")
    made = machine(backend, size.memory_gib)
    gc.collect()
    idle = _memory_mib("VmRSS")
    gfns = sort_unique(np.random.default_rng(0).choice(pages, min(SPARSE_PAGES, pages), replace=False))
    made.guest.write(gfns)
    gc.collect()
    touched = _memory_mib("VmRSS")
    entries: Entries = zeros(pages, np.uint64)
    entries[gfns] = 1
    floor = max(_memory_mib("VmRSS") - touched, SPARSE_PAGES * 8 / _MIB)
    return {"idle_mib": (max(idle - empty, LEAST_MIB), empty), "sparse_mib": (max(touched - idle, LEAST_MIB), floor)}


def _peak(backend: str, size: Size) -> Figures:
    """Populate in order; the floor writes one entry a page. A peak does not go down: this process must be a new one."""
    pages = _pages(size.memory_gib)
    made = machine(backend, size.memory_gib)
    for gfns in _batches(pages):
        made.guest.write(gfns)
    value = _memory_mib("VmHWM")
    before = _memory_mib("VmRSS")
    entries: Entries = zeros(pages, np.uint64)
    for gfns in _batches(pages):
        sequential_floor(entries, gfns)
    return {"peak_mib": (value, max(_memory_mib("VmRSS") - before, LEAST_MIB))}


def _one(backend: str, size: Size) -> Figures:
    """First touches of one page each, at random places; model and floor take turns every so many pages."""
    guest = machine(backend, 1).guest
    entries = _entries(_GIB_PAGES)
    floor, model = _Clock(), _Clock()
    gfns = np.random.default_rng(0).permutation(_GIB_PAGES)[: size.ones].tolist()
    for turn in range(0, size.ones, _TURN):
        for gfn in gfns[turn : turn + _TURN]:
            floor.lap(random_floor, entries, np.array([gfn]))
        for gfn in gfns[turn : turn + _TURN]:
            model.lap(guest.write, slice(gfn, gfn + 1, 1))
    return {"one_us": (model.median_ns / 1e3, floor.median_ns / 1e3)}


def _timed(backend: str, size: Size) -> Figures:
    """Each vCPU touches pages of its own, one by one, on the virtual clock; the floor runs in between."""
    turns = 8
    made = machine(backend, 1, NR_VCPUS)
    entries = _entries(_GIB_PAGES)
    each = max(1, size.timed_ops // NR_VCPUS // turns)

    def touch(vcpu: int, low: int) -> Steps[None]:
        for gfn in range(low, low + each):
            yield from made.guest.write.steps(slice(gfn, gfn + 1, 1), vcpu)

    floor, model = _Clock(), _Clock()
    for turn in range(turns):
        for gfn in range(each * NR_VCPUS):
            floor.lap(random_floor, entries, np.array([gfn]))
        lows = [(turn * NR_VCPUS + vcpu) * 1024 for vcpu in range(NR_VCPUS)]
        actors = [(f"vcpu{vcpu}", touch(vcpu, low)) for vcpu, low in enumerate(lows)]
        model.lap(Timed(made.host).run, actors)
    return {"timed_us": (model.median_ns / (each * NR_VCPUS) / 1e3, floor.median_ns / 1e3)}


def _make(backend: str, size: Size) -> Figures:
    """A Host with 256 GiB of frames and a VM of 64 MiB, made and destroyed; files are read before."""
    found = load_backend(backend)
    profile = load_profile_for(found, None)
    entries = _entries(1 << 10)
    one = np.array([7])
    floor, model = _Clock(), _Clock()
    for _ in range(size.made):
        floor.lap(random_floor, entries, one)
        model.lap(_make_and_destroy, found, profile)
    return {"make_ms": (model.median_ns / 1e6, floor.median_ns / 1e6)}


def _make_and_destroy(backend: Backend, profile: Profile) -> None:
    Machine(Host(backend, profile), SMALL_BYTES).destroy()


def _help(backend: str, size: Size) -> Figures:
    floor, model = _Clock(_children_ns), _Clock(_children_ns)
    for _ in range(size.helps):
        floor.lap(_python, "import typer")
        model.lap(_python, "from cvmcore.cli import main; main(['--help'])")
    return {"help_ms": (model.median_ns / 1e6, floor.median_ns / 1e6)}


def _children_ns() -> int:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return int((used.ru_utime + used.ru_stime) * 1e9)


def _python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@attrs.frozen
class _Measurement:
    """One measuring function and the rows that it fills. alone: it needs a process of its own."""

    rows: tuple[str, ...]
    measure: Callable[[str, Size], Figures]
    alone: bool = False


MEASUREMENTS = (
    _Measurement(("random_ns",), _random),
    _Measurement(("sequential_ns", "sequential_fresh_ns", "sequential_recycled_ns"), _sequential),
    _Measurement(("linear_x",), _linear),
    _Measurement(("peak_mib",), _peak, alone=True),
    _Measurement(("idle_mib", "sparse_mib"), _sparse, alone=True),
    _Measurement(("one_us",), _one),
    _Measurement(("timed_us",), _timed),
    _Measurement(("make_ms",), _make),
    _Measurement(("help_ms",), _help),
)


def _run(measurement: _Measurement, backend: str, size: Size) -> Figures:
    if not measurement.alone:
        gc.collect()
        return measurement.measure(backend, size)
    arguments = json.dumps([MEASUREMENTS.index(measurement), backend, attrs.astuple(size)])
    done = subprocess.run([sys.executable, "-m", "cvmcore.bench", arguments], capture_output=True, text=True)
    if done.returncode:
        raise CvmError(f"{', '.join(measurement.rows)} on {backend}: {done.stderr.strip().splitlines()[-1]}")
    return {row: (value, floor) for row, (value, floor) in json.loads(done.stdout).items()}


def measure(rows: Sequence[str], backends: Sequence[str], size: Size, progress: Progress | None = None) -> list[Result]:
    """The rows on the backends, in the table's order. InputError for a row that does not exist."""
    unknown = [row for row in rows if row not in ROWS]
    if unknown:
        raise InputError(f"row '{unknown[0]}' is none of {', '.join(ROWS)}")
    todo = [
        (measurement, backend)
        for measurement in MEASUREMENTS
        if set(rows) & set(measurement.rows)
        for backend in (backends if ROWS[measurement.rows[0]].per_backend else (NO_BACKEND,))
    ]
    results = []
    for number, (measurement, backend) in enumerate(todo):
        if progress is not None:
            progress(number, len(todo), f"{measurement.rows[0]} {backend}")
        figures = _run(measurement, backend, size)
        results += [Result(ROWS[row], backend, *figures[row]) for row in measurement.rows if row in rows]
    return results


# ---- against what was recorded --------------------------------------------------------------------------------


def record(out: OutFile, results: Iterable[Result], size: Size) -> None:
    """Write the steady ratios of a run to a file, for `check` of runs of the same size."""
    ratios: dict[str, dict[str, float]] = {}
    for result in results:
        if result.row.steady:
            ratios.setdefault(result.row.name, {})[result.backend] = round(result.ratio, 3)
    out.put(json.dumps({"schema": SCHEMA, "size": attrs.asdict(size), "ratios": ratios}, indent=2) + "\n")


def recorded(path: Path, size: Size) -> dict[tuple[str, str], float]:
    """Ratios by (row, backend) as `record` wrote them. InputError where the file is none of its, or of another size."""
    try:
        content = json.loads(path.read_text())
        ratios = content["ratios"].items()
        if content["size"] != attrs.asdict(size):
            raise InputError(f"{path} was recorded with other sizes, so its ratios cannot be compared with this run's")
        return {(row, name): float(ratio) for row, by_name in ratios for name, ratio in by_name.items()}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} holds no recorded ratios") from None


def check(
    results: Sequence[Result], ratios: Mapping[tuple[str, str], float], again: Callable[[str, str], Result]
) -> list[str]:
    """What got slower than recorded by more than WORSE, in sentences; `again` measures a suspect once more. Rows that
    were not recorded are not compared."""
    slower = []
    for result in results:
        old = ratios.get((result.row.name, result.backend))
        if old is None:
            continue
        best = result.ratio
        for _ in range(TRIES - 1):
            if best <= WORSE * old:
                break
            best = min(best, again(result.row.name, result.backend).ratio)
        if best > WORSE * old:
            where = "" if result.backend == NO_BACKEND else f" on {result.backend}"
            slower.append(f"{result.row.name}{where} is {best:.2f} times its floor, where {old:.2f} times is recorded")
    return slower


def to_json(results: Sequence[Result], size: Size) -> dict[str, Any]:
    """The results for programs (docs/bench.md names the keys)."""
    return {
        "schema": SCHEMA,
        "size": attrs.asdict(size),
        "rows": [
            {
                "row": result.row.name, "backend": result.backend, "value": result.value, "floor": result.floor,
                "ratio": result.ratio, "bound": result.row.bound, "bound_on": result.row.bound_on, "met": result.met,
            }
            for result in results
        ],
    }  # fmt: skip


def table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """The results for people: titles, and one line a row. A cell is the value and the ratio to its floor; an
    exclamation mark says that the bound is not kept."""
    backends = list(dict.fromkeys(result.backend for result in results))
    lines = []
    for row in dict.fromkeys(result.row for result in results):
        found = {result.backend: result for result in results if result.row is row}
        sign = "x" if row.bound_on == "ratio" else ""
        floor = statistics.median(result.floor for result in found.values())
        bound = "" if row.bound is None else f"{row.bound:,.4g}{sign}"
        lines.append([row.name, f"{floor:,.2f}", bound, *(_cell(found.get(name)) for name in backends)])
    return ["row", "floor", "bound", *backends], lines


def _cell(result: Result | None) -> str:
    if result is None:
        return ""
    return f"{result.value:,.{1 if result.value >= 10 else 2}f} {result.ratio:.1f}x{'' if result.met else '!'}"


def _child(text: str) -> None:
    number, backend, size = json.loads(text)
    json.dump(MEASUREMENTS[number].measure(backend, Size(*size)), sys.stdout)


if __name__ == "__main__":
    _child(sys.argv[1])
