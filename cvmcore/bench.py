"""Benchmarks: what the model costs here, each figure beside the least that such work costs with numpy on this machine.

A row of the table is one thing that must stay cheap, with its bound (`ROWS`). Its *floor* is a small program of the
same kind, run in the same minutes and in turn with the model, so that a busy or slow machine hits both; the ratio of
the two is the figure to compare. Floors by kind:

random      drop the duplicates of a batch of gfns (sort, compare), read and write an 8-byte entry a page
sequential  write an 8-byte entry a page, values computed batch by batch
one         `random` for a batch of one
memory      the same process before, or what `sequential` or `random` touches of their one array

The floors' arrays are touched before the clock starts. Observers are off; checks of the hardware and content are on.
"""

from __future__ import annotations

import gc
import json
import mmap
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
from cvmcore.pages import live_mappings, sort_unique, zeros
from cvmcore.plugins import load_backend
from cvmcore.runner import load_profile_for
from cvmcore.sched import Timed

BACKENDS = ("swprot", "sev", "snp", "tdx", "pkvm")
ALL = "all"
"""In place of a backend: the row is about none."""
BATCH = 1 << 17
NR_VCPUS = 16
SPARSE_PAGES = 1000
SMALL_BYTES = 64 << 20
WORSE = 1.3
"""A ratio that grew by more than this factor fails `check`."""
TRIES = 4
"""How often `check` measures before it says that something got slower; the best counts."""

_GIB_PAGES = 1 << 18
_MIB = 1 << 20
_CHUNK = 2 << 20

P = ParamSpec("P")
Entries: TypeAlias = npt.NDArray[np.uint64]
Figures: TypeAlias = dict[str, tuple[float, float]]
"""What a measurement found, by row: (value, floor), in the row's unit."""
Progress: TypeAlias = Callable[[int, int | None, str], None]


@attrs.frozen
class Size:
    """How large a run is. random: GiB and batches. order: GiB and rounds; its quarter is what `linear` compares with.
    memory: GiB of the guest whose memory is looked at. The others: repetitions."""

    random_gib: float
    random_batches: int
    order_gib: float
    order_rounds: int
    memory_gib: float
    ones: int
    timed: int
    made: int
    helps: int


FULL = Size(64, 24, 192, 3, 192, 2000, 16000, 200, 15)
QUICK = Size(64, 6, 16, 1, 16, 400, 1600, 60, 5)


@attrs.frozen
class Row:
    """One line of the table. bound: on the `value`, or on the `ratio` to the floor; None: reported only. steady:
    whether the ratio hardly depends on the machine, so that `check` may compare it with a recorded one."""

    name: str
    title: str
    unit: str
    of: Literal["value", "ratio"] = "ratio"
    bound: float | None = None
    steady: bool = True
    per_backend: bool = True


ROWS = {
    row.name: row
    for row in (
        Row("random", "random first touch", "ns/fault", "ratio", 6),
        Row("order", "populate in order, arrays backed and zero", "ns/page", "ratio", 8),
        Row("order-fresh", "populate in order, fresh arrays", "ns/page", steady=False),
        Row("order-recycled", "populate in order, arrays zeroed again on the clock", "ns/page", steady=False),
        Row("linear", "four times the memory", "x time", "value", 4.4),
        Row("peak", "populated: peak memory", "MiB", "value", 1.6 * 1024),
        Row("idle", "idle: memory", "MiB", "value", 60),
        Row("sparse", "1,000 random pages: memory added", "MiB", "value", 40),
        Row("one", "batch of one", "us", "value", 100),
        Row("timed", "timed driver, 16 vCPUs: one-page operation", "us", "value", 200),
        Row("make", "make and destroy Host and small VM", "ms", "value", 1),
        Row("help", "cvm --help, over importing typer", "ms", "ratio", 1.5, per_backend=False),
    )
}


@attrs.frozen
class Result:
    """One row on one backend (ALL where it is about none)."""

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
        return self.row.bound is None or (self.value if self.row.of == "value" else self.ratio) <= self.row.bound


# ---- floors ---------------------------------------------------------------------------------------------------


def random_floor(entries: Entries, gfns: npt.NDArray[np.int64]) -> None:
    """The least for scattered pages: drop duplicates, read an entry each, write those that are zero."""
    gfns = np.sort(gfns)
    keep = np.empty(len(gfns), bool)
    keep[0] = True
    np.not_equal(gfns[1:], gfns[:-1], out=keep[1:])
    gfns = gfns[keep]
    missing = gfns[entries[gfns] == 0]
    entries[missing] = missing.view(np.uint64) << np.uint64(12) | np.uint64(7)


def sequential_floor(entries: Entries, start: int, stop: int) -> None:
    """The least for a run: write an entry each."""
    entries[start:stop] = np.arange(start, stop, dtype=np.uint64) << np.uint64(12) | np.uint64(7)


def _entries(pages: int) -> Entries:
    entries: Entries = zeros(pages, np.uint64)
    entries.fill(0)  # touch it: the floor is not the page faults of this process
    return entries


# ---- machines and their memory --------------------------------------------------------------------------------


def machine(backend: str, gib: float, vcpus: int = 1) -> Machine:
    """A launched machine of a backend with its own prices and options."""
    made = Machine(_host(backend), int(gib * _GIB_PAGES) << 12, vcpus=vcpus)
    made.launch()
    return made


def _host(backend: str) -> Host:
    found = load_backend(backend)
    return Host(found, load_profile_for(found, None))


def back(mappings: Iterable[mmap.mmap]) -> None:
    """Have the operating system back every page of the mappings, which changes nothing in them.

    With all `live_mappings()` after a machine was made and before it ran, that is the state 'backed and zero': every
    large array of host, VM, guest and trusted hardware comes from `pages.zeros`, whatever the backend.
    """
    for mapping in mappings:
        np.frombuffer(mapping, np.uint8)[:: mmap.PAGESIZE] |= 0


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


def _memory_mib(key: Literal["VmRSS", "VmHWM"]) -> float:
    """Memory of this process in MiB: resident now, or at its peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        raise InputError("the memory rows need /proc/self/status, which only Linux has") from None
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


# ---- measurements ---------------------------------------------------------------------------------------------


class _Clock:
    """Adds up what is measured in turn: nanoseconds of each lap."""

    def __init__(self) -> None:
        self.laps: list[float] = []

    def lap(self, work: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        start = time.perf_counter_ns()
        work(*args, **kwargs)
        self.laps.append(time.perf_counter_ns() - start)

    @property
    def median(self) -> float:
        return statistics.median(self.laps)


def _random(backend: str, size: Size) -> Figures:
    """Batches of random gfns, their first touch being a write: sort, fault in, accept where needed, write content."""
    pages = int(size.random_gib * _GIB_PAGES)
    entries = _entries(pages)
    guest = machine(backend, size.random_gib).guest
    back(live_mappings())
    rng = np.random.default_rng(0)
    floor, model, values = _Clock(), _Clock(), []
    vcpu = guest.machine.vcpus[0].vcpu
    for _ in range(size.random_batches):
        gfns = rng.integers(0, pages, min(BATCH, pages))
        before = vcpu.faults
        floor.lap(random_floor, entries, gfns)
        model.lap(_touch, guest, gfns)
        values.append(model.laps[-1] / (vcpu.faults - before))
    return {"random": (statistics.median(values), floor.median / min(BATCH, pages))}


def _touch(guest: Guest, gfns: npt.NDArray[np.int64]) -> None:
    guest.write(sort_unique(gfns))


def _batches(pages: int) -> Iterator[slice]:
    for low in range(0, pages, BATCH):
        yield slice(low, min(low + BATCH, pages), 1)


def _populate(made: Machine, entries: Entries, floor: _Clock, model: _Clock) -> None:
    """Write all memory in order, in turn with the floor."""
    for gfns in _batches(made.end_gfn):
        floor.lap(sequential_floor, entries, gfns.start, gfns.stop)
        model.lap(made.guest.write, gfns)


def _order(backend: str, size: Size) -> Figures:
    """Populating in order, in three states of memory.

    Recycled arrays stand for a pool of them: what an earlier run left behind is zeroed on the clock.
    """
    pages = int(size.order_gib * _GIB_PAGES)
    entries = _entries(pages)
    others = len(live_mappings())
    per_page: dict[str, list[float]] = {"order-fresh": [], "order-recycled": [], "order": []}
    floors: list[float] = []
    dirty: list[list[slice]] = []
    for _ in range(size.order_rounds):
        for row, values in per_page.items():
            made = machine(backend, size.order_gib)
            mappings = live_mappings()[others:]
            floor, model, zeroing = _Clock(), _Clock(), _Clock()
            if row != "order-fresh":
                back(mappings)
            if row == "order-recycled":
                zeroing.lap(_zero, mappings, dirty)
            _populate(made, entries, floor, model)
            if row == "order-fresh":
                dirty = _dirty(mappings)
            batch = min(BATCH, pages)
            values.append(model.median / batch + sum(zeroing.laps) / pages)
            floors.append(floor.median / batch)
            del made, mappings
            gc.collect()
    return {row: (statistics.median(values), statistics.median(floors)) for row, values in per_page.items()}


def _linear(backend: str, size: Size) -> Figures:
    """Two guests side by side, one of four times the memory: for each batch of the small one, four of the large."""
    pages = int(size.order_gib * _GIB_PAGES)
    ratios: list[tuple[float, float]] = []
    for _ in range(size.order_rounds):
        large, small = machine(backend, size.order_gib), machine(backend, size.order_gib / 4)
        entries = _entries(pages)
        back(live_mappings())
        clocks = {what: _Clock() for what in ("large", "small", "floor large", "floor small")}
        for i, gfns in enumerate(_batches(pages)):
            clocks["floor large"].lap(sequential_floor, entries, gfns.start, gfns.stop)
            clocks["large"].lap(large.guest.write, gfns)
            if i % 4 == 0:
                quarter = slice(i // 4 * BATCH, min((i // 4 + 1) * BATCH, pages // 4), 1)
                clocks["floor small"].lap(sequential_floor, entries, quarter.start, quarter.stop)
                clocks["small"].lap(small.guest.write, quarter)
        total = {what: sum(clock.laps) for what, clock in clocks.items()}
        ratios.append((total["large"] / total["small"], total["floor large"] / total["floor small"]))
        del large, small
        gc.collect()
    values, floors = zip(*ratios, strict=True)
    return {"linear": (statistics.median(values), statistics.median(floors))}


def _sparse(backend: str, size: Size) -> Figures:
    """Idle, then a few random pages: whole process, and what is added. Wants a process of its own."""
    pages = int(size.memory_gib * _GIB_PAGES)
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
    floor = _memory_mib("VmRSS") - touched
    return {"idle": (idle, empty), "sparse": (touched - idle, max(floor, 4096 * SPARSE_PAGES / _MIB / 8))}


def _peak(backend: str, size: Size) -> Figures:
    """Populate in order; the floor writes one entry a page. Wants a process of its own: a peak does not go down."""
    pages = int(size.memory_gib * _GIB_PAGES)
    empty = _memory_mib("VmRSS")
    entries: Entries = zeros(pages, np.uint64)
    for gfns in _batches(pages):
        sequential_floor(entries, gfns.start, gfns.stop)
    floor = _memory_mib("VmRSS")
    del entries
    made = machine(backend, size.memory_gib)
    for gfns in _batches(pages):
        made.guest.write(gfns)
    value = _memory_mib("VmHWM")
    return {"peak": (value, max(floor, empty))}


def _one(backend: str, size: Size) -> Figures:
    """First touches of one page each, at random places."""
    guest = machine(backend, 1).guest
    entries = _entries(_GIB_PAGES)
    floor, model = _Clock(), _Clock()
    for gfn in np.random.default_rng(0).permutation(_GIB_PAGES)[: size.ones].tolist():
        gfns = np.array([gfn])
        floor.lap(random_floor, entries, gfns)
        model.lap(guest.write, slice(gfn, gfn + 1, 1))
    return {"one": (model.median / 1e3, floor.median / 1e3)}


def _timed(backend: str, size: Size) -> Figures:
    """Each vCPU touches pages of its own, one by one, on the virtual clock; the floor runs in between."""
    made = machine(backend, 1, NR_VCPUS)
    entries = _entries(_GIB_PAGES)
    each = size.timed // NR_VCPUS // 8

    def touch(vcpu: int, low: int) -> Steps[None]:
        for gfn in range(low, low + each):
            yield from made.guest.write.steps(slice(gfn, gfn + 1, 1), vcpu)

    floor, model = _Clock(), _Clock()
    for turn in range(8):
        lows = [(turn * NR_VCPUS + vcpu) * 1024 for vcpu in range(NR_VCPUS)]
        for gfn in range(each * NR_VCPUS):
            floor.lap(random_floor, entries, np.array([gfn]))
        actors = [(f"vcpu{vcpu}", touch(vcpu, low)) for vcpu, low in enumerate(lows)]
        model.lap(Timed(made.host).run, actors)
    return {"timed": (model.median / (each * NR_VCPUS) / 1e3, floor.median / 1e3)}


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
    return {"make": (model.median / 1e6, floor.median / 1e6)}


def _make_and_destroy(backend: Backend, profile: Profile) -> None:
    Machine(Host(backend, profile), SMALL_BYTES).destroy()


def _help(backend: str, size: Size) -> Figures:
    def python(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)

    floor, model = _Clock(), _Clock()
    for _ in range(size.helps):
        floor.lap(python, "import typer")
        model.lap(python, "from cvmcore.cli import main; main(['--help'])")
    return {"help": (model.median / 1e6, floor.median / 1e6)}


@attrs.frozen
class _Measurement:
    """One measuring function and the rows that it fills. alone: it runs in a process of its own."""

    rows: tuple[str, ...]
    measure: Callable[[str, Size], Figures]
    alone: bool = False


MEASUREMENTS = (
    _Measurement(("random",), _random),
    _Measurement(("order", "order-fresh", "order-recycled"), _order),
    _Measurement(("linear",), _linear),
    _Measurement(("peak",), _peak, alone=True),
    _Measurement(("idle", "sparse"), _sparse, alone=True),
    _Measurement(("one",), _one),
    _Measurement(("timed",), _timed),
    _Measurement(("make",), _make),
    _Measurement(("help",), _help),
)


def _run(measurement: _Measurement, backend: str, size: Size) -> Figures:
    if not measurement.alone:
        gc.collect()
        try:
            return measurement.measure(backend, size)
        finally:
            gc.collect()
    arguments = json.dumps([MEASUREMENTS.index(measurement), backend, attrs.astuple(size)])
    done = subprocess.run([sys.executable, "-m", __name__, arguments], capture_output=True, text=True)
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
        for backend in (backends if ROWS[measurement.rows[0]].per_backend else (ALL,))
    ]
    results = []
    for number, (measurement, backend) in enumerate(todo):
        if progress is not None:
            progress(number, len(todo), f"{measurement.rows[0]}, {backend}")
        figures = _run(measurement, backend, size)
        results += [Result(ROWS[row], backend, *figures[row]) for row in measurement.rows if row in rows]
    return results


# ---- against what was recorded --------------------------------------------------------------------------------


def record(path: Path, results: Iterable[Result]) -> None:
    """Write the steady ratios of a quick run to a file, for `check`."""
    ratios: dict[str, dict[str, float]] = {}
    for result in results:
        if result.row.steady:
            ratios.setdefault(result.row.name, {})[result.backend] = round(result.ratio, 2)
    path.write_text(json.dumps({"schema": 1, "ratios": ratios}, indent=2) + "\n")


def recorded(path: Path) -> dict[tuple[str, str], float]:
    """Ratios by (row, backend) as `record` wrote them. InputError where the file is none of its."""
    try:
        ratios = json.loads(path.read_text())["ratios"]
        return {(row, name): float(ratio) for row, by_name in ratios.items() for name, ratio in by_name.items()}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} holds no recorded ratios") from None


def check(
    results: Sequence[Result], ratios: Mapping[tuple[str, str], float], again: Callable[[str, str], Result]
) -> list[str]:
    """What got slower than recorded by more than WORSE, in sentences; `again` measures a suspect once more."""
    slower = []
    for result in results:
        old = ratios.get((result.row.name, result.backend))
        best = result.ratio
        for _ in range(TRIES - 1):
            if old is None or best <= WORSE * old:
                break
            best = min(best, again(result.row.name, result.backend).ratio)
        if old is not None and best > WORSE * old:
            slower.append(
                f"{result.row.name} on {result.backend}: {best:.2f} times its floor, and {old:.2f} times is recorded"
            )
    return slower


def to_json(results: Sequence[Result], size: Size) -> dict[str, Any]:
    """The results for programs (docs/output.md names the keys)."""
    return {
        "schema": 1,
        "quick": size == QUICK,
        "rows": [
            {
                "row": result.row.name, "backend": result.backend, "unit": result.row.unit, "value": result.value,
                "floor": result.floor, "ratio": result.ratio, "bound": result.row.bound, "bound_on": result.row.of,
                "met": result.met,
            }
            for result in results
        ],
    }  # fmt: skip


def _child(text: str) -> None:
    number, backend, size = json.loads(text)
    json.dump(MEASUREMENTS[number].measure(backend, Size(*size)), sys.stdout)


if __name__ == "__main__":
    _child(sys.argv[1])
