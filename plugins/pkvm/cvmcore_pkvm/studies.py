"""Study `convert` (mail 003): is a buffer cheaper to convert in place twice, or to copy through a bounce buffer twice?

A guest gets data in a buffer that it shares with the host, works on it in private, and hands it back. In place: each
page is taken back (shared to private) and shared again. Bounce: the data is copied to private memory and back.

How it is answered. The model converts real buffers, alone: that gives a *tape* of each conversion, the locks that it
takes and the priced work between them. Tapes of two vCPUs and two VMs tell which locks are whose. Then as many vCPUs
as a setting has play their tapes against each other on the timed driver, with the prices of the moment. Nothing of the
answer is a price: a conversion is the sum of its traps, entries, invalidations and refills, and of waiting.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import attrs
import numpy as np

from cvmcore.backend import Option
from cvmcore.effects import Lock, Steps
from cvmcore.errors import CvmError
from cvmcore.guest import Machine
from cvmcore.host import Host
from cvmcore.pages import run
from cvmcore.plugins import load_backend
from cvmcore.sched import Timed
from cvmcore.study import Column, Findings, Study, StudyContext
from cvmcore_pkvm.ops import PKVM

KIB = 1 << 10
SIZES: tuple[int, ...] = tuple(4 * KIB << 2 * i for i in range(8))
"""4 KiB to 64 MiB."""
SIZE_NAMES = ("4K", "16K", "64K", "256K", "1M", "4M", "16M", "64M")
VCPUS = (1, 4, 16, 64)
VMS = (1, 8)
BATCHES = (1, 64, 512)
HYP_LOCKS = ("global", "per-vm", "per-range")
MMU_LOCKS = ("rw", "sharded")
OTHERS = ("snp", "tdx")
"""Backends beside which the exchange is put, where they are installed."""

BACKENDS = (PKVM.name, *OTHERS)
LOCKS = HYP_LOCKS + MMU_LOCKS

BLOCK = 512
CHUNKS = (1, 4, 16, 64, 256, 512)
"""Pages of one conversion that tapes are made of: one call of the guest never covers more than 2 MiB."""
GIB_PAGES = 1 << 18
MIN_CPUS = 8
MEASURED_CPUS = 16
"""How many CPUs the machine is taken to have had on which a broadcast invalidation took `tlbi_page`."""
SAMPLE = 256
"""Conversions that all vCPUs of a setting play in each direction, about; never fewer than two each."""

NAME = "convert"
NOWHERE, LOST = "nowhere", "data is lost"
EXPECTATION = (
    "expected (mail 003, Q. Perret, Apr 2022): the TLBI of a shared->private conversion costs significantly less than "
    "copying the buffer twice in the guest"
)
REPORT = (
    "reported (P3, M. Saleh, netdev, Jun 2026): in-place sharing by hypercall is much slower than a bounce copy, even "
    "for very large pages"
)


# ---- tapes ----------------------------------------------------------------------------------------------------

Event: TypeAlias = "tuple[str, Lock] | tuple[str, dict[str, int]]"


def record(host: Host, steps: Steps[Any]) -> list[Event]:
    """Run an operation alone: its locks, as (kind, lock), and what it charges between them, as ("work", counts)."""
    counts, tape = host.meter.counts, list[Event]()
    before = dict(counts)

    def work() -> None:
        nonlocal before
        done = {item: n - before.get(item, 0) for item, n in counts.items() if n != before.get(item, 0)}
        if done:
            tape.append(("work", done))
            before = dict(counts)

    for effect in steps:
        if effect.lock is not None:
            work()
            tape.append(("release" if effect.kind == "release" else effect.kind.removeprefix("try_"), effect.lock))
    work()
    return tape


@attrs.frozen
class Step:
    """One step of a tape. kind: "work" (with what it costs), or what is done to lock number `lock`, whose `scope` is
    the machine (0), the VM (1) or the vCPU (2)."""

    kind: str
    counts: dict[str, int] = attrs.field(factory=dict)
    lock: int = 0
    scope: int = 0


Tape: TypeAlias = "tuple[Step, ...]"


def tape_of(mine: list[Event], neighbour: list[Event], stranger: list[Event]) -> Tape:
    """One tape of three: of a vCPU, of another in the same VM, and of one in another VM. Raises ValueError where they
    are not alike."""
    numbers: dict[Lock, int] = {}
    steps = []
    for (kind, what), (other, nearby), (third, far) in zip(mine, neighbour, stranger, strict=True):
        if not kind == other == third:
            raise ValueError(f"one vCPU goes on with {kind}, others with {other} and {third}")
        if isinstance(what, dict):
            steps.append(Step(kind, what))
        else:
            scope = 2 if what is not nearby else 1 if what is not far else 0
            steps.append(Step(kind, lock=numbers.setdefault(what, len(numbers)), scope=scope))
    return tuple(steps)


@attrs.frozen
class Way:
    """One way to convert: a backend with a lock design, for VMs of so many vCPUs. tapes: by pages of one conversion, to
    private and to shared again. keeps: whether the data of the host was there for the guest to work on."""

    backend: str
    lock: str
    vcpus: int
    tapes: dict[int, tuple[Tape, Tape]]
    keeps: bool


def _buffer(vcpu: int, pages: int = BLOCK) -> slice:
    """Where a vCPU has its buffer: in a GiB of its own, and in a range of 2 MiB that no lock shares with another's."""
    return run(vcpu * (GIB_PAGES + BLOCK), pages)


def _to_private(machine: Machine, gfns: slice, vcpu: int) -> Steps[None]:
    """The guest takes pages back, and can use them."""
    yield from machine.guest.convert.steps(gfns, True, vcpu)
    if not machine.vm.vm.caps.conversion_keeps_content:
        yield from machine.guest.read.steps(gfns, vcpu)  # faulted in and accepted again


def _to_shared(machine: Machine, gfns: slice, vcpu: int) -> Steps[None]:
    """The guest hands pages back, and both sides can use them."""
    yield from machine.guest.convert.steps(gfns, False, vcpu)
    if not machine.vm.vm.caps.conversion_keeps_content:
        yield from machine.guest.read.steps(gfns, vcpu, private=False)


def _keeps(machine: Machine, gfns: slice) -> bool:
    """Whether what the host writes to a shared buffer is what the guest reads when it has taken it back."""
    n = gfns.stop - gfns.start
    sent = np.arange(1, n + 1, dtype=np.uint32)
    region = machine.regions[0]
    machine.process.write(region.hva + (gfns.start - region.base_gfn << 12), sent, n)
    host = machine.host
    host.drive(_to_private(machine, gfns, 0))
    try:
        got = machine.guest.read(gfns, 0)
    except CvmError:
        return False
    return np.array_equal(got, sent)


def measure_way(context: StudyContext, backend: str, lock: str, vcpus: int) -> Way:
    """Convert buffers of two VMs on one host and keep the tapes."""
    pkvm = backend == PKVM.name
    host = Host(
        PKVM if pkvm else load_backend(backend),
        context.profile(backend),
        options={"hyp_lock": lock, "batch": str(BLOCK)} if pkvm else None,
        policies=None if pkvm else {"mmu_lock": lock},
    )
    actors = ((0, 0), (0, min(1, vcpus - 1)), (1, 0))
    machines = []
    for _ in range(2):
        machine = Machine(host, 2 * GIB_PAGES << 12, vcpus=vcpus)
        machine.launch()
        for vcpu in range(vcpus):
            machine.guest.write(run(4 * BLOCK + vcpu, 1), vcpu)  # each one has run
        machines.append(machine)
    keeps = True
    for vm, vcpu in dict.fromkeys(actors):
        machine, buffer = machines[vm], _buffer(vcpu)
        machine.guest.write(buffer, vcpu)
        host.drive(_to_shared(machine, buffer, vcpu))
        if vcpu == 0:
            keeps = _keeps(machine, buffer)
        else:
            host.drive(_to_private(machine, buffer, vcpu))
        host.drive(_to_shared(machine, buffer, vcpu))  # tables stand, and caches are full
    tapes = {}
    for chunk in CHUNKS:
        found = [
            [record(host, move(machines[vm], _buffer(vcpu, chunk), vcpu)) for move in (_to_private, _to_shared)]
            for vm, vcpu in actors
        ]
        tapes[chunk] = tape_of(*(f[0] for f in found)), tape_of(*(f[1] for f in found))
    return Way(backend, lock, vcpus, tapes, keeps)


@attrs.frozen
class Measured:
    """What ran: tapes, by backend, lock design and vCPUs; and which backends are not here, with the reason."""

    ways: dict[tuple[str, str, int], Way]
    missing: dict[str, str]


def measure(context: StudyContext) -> Measured:
    """Run the model: every lock design, for every number of vCPUs, on pKVM and what else is installed."""
    missing = {}
    for name in OTHERS:
        try:
            load_backend(name)
        except CvmError as error:
            missing[name] = str(error)
    wanted = [(PKVM.name, lock) for lock in HYP_LOCKS]
    wanted += [(name, lock) for name in OTHERS if name not in missing for lock in MMU_LOCKS]
    cases = [(backend, lock, vcpus) for backend, lock in wanted for vcpus in VCPUS]
    ways = {}
    for done, case in enumerate(cases):
        context.progress(done, len(cases), "convert buffers")
        ways[case] = measure_way(context, *case)
    context.progress(len(cases), len(cases), "convert buffers")
    return Measured(ways, missing)


# ---- time -----------------------------------------------------------------------------------------------------

WORK_ITEMS = frozenset({"guest_read_4k", "guest_write_4k"})
"""Charged while tapes are made, for reading pages so that they are mapped again: that is the guest's own work, which
is the same either way."""


def cpus_of(vcpus: int, vms: int) -> int:
    """CPUs of the machine: nothing is overcommitted, and none is smaller than a phone."""
    return max(MIN_CPUS, vcpus * vms)


def prices_for(context: StudyContext, backend: str, cpus: int) -> dict[str, float]:
    """The backend's prices, on a machine of so many CPUs: an invalidation is broadcast to all of them."""
    prices: dict[str, float] = dict(context.profile(backend).ns_by_item())
    if context.options["tlbi"] == "scaled" and "tlbi_local" in prices:
        remote = max(0.0, prices["tlbi_page"] - prices["tlbi_local"])
        prices["tlbi_page"] = prices["tlbi_local"] + remote * cpus / MEASURED_CPUS
    return prices


def _ns(step: Step, prices: dict[str, float]) -> float:
    return sum(prices[item] * n for item, n in step.counts.items() if item not in WORK_ITEMS)


def elapsed_ns(
    host: Host, tapes: Sequence[Tape], times: int, prices: dict[str, float], vcpus: int, vms: int, work_ns: float
) -> float:
    """Until the last of vms x vcpus has played the tapes, each `times` in a row, with `work_ns` of its own between."""
    priced = [[(step, _ns(step, prices)) for step in tape] for tape in tapes]
    alone = times * sum(ns for tape in priced for _, ns in tape) + work_ns
    shared = {0: vcpus * vms > 1, 1: vcpus > 1, 2: False}
    scopes = {step.scope for tape in tapes for step in tape if step.kind != "work"}
    if not any(shared[scope] for scope in scopes):
        return alone  # nobody waits for anybody
    if 0 not in scopes:
        vms = 1  # VMs do not meet
    locks: dict[tuple[int, ...], Lock] = {}

    def actor(vm: int, vcpu: int) -> Steps[None]:
        mine = []
        for number, tape in enumerate(priced):
            for step, ns in tape:
                owner = (vm, vcpu)[: step.scope]
                key = (step.lock, step.scope, *owner) if step.kind != "work" else ()
                lock = locks.setdefault(key, Lock("lock", 0)) if key else None
                mine.append((number, ns, None if lock is None else getattr(lock, step.kind)))
        for number in range(len(priced)):
            part = [(ns, effect) for n, ns, effect in mine if n == number]
            for _ in range(times):
                for ns, effect in part:
                    if effect is None:
                        host.meter.now_ns += ns
                    else:
                        yield effect
            if number == 0:
                host.meter.now_ns += work_ns

    timed = Timed(host)
    timed.run((f"{vm}.{vcpu}", actor(vm, vcpu)) for vm in range(vms) for vcpu in range(vcpus))
    return timed.elapsed_ns


@attrs.define
class Player:
    """Plays exchanges for one way and number of VMs; what it has played once it remembers."""

    host: Host
    way: Way
    vms: int
    prices: dict[str, float]
    work_4k: float
    _played: dict[tuple[int, int], float] = attrs.field(factory=dict)

    def in_place_ns(self, batch: int, pages: int) -> float:
        """One exchange of a buffer by every vCPU at once. A bounded number of conversions is played, and multiplied."""
        chunk = min(batch, pages)
        calls = pages // chunk
        played = min(calls, max(2, min(16, SAMPLE // (self.way.vcpus * self.vms))))
        if (chunk, played) not in self._played:
            self._played[chunk, played] = elapsed_ns(
                self.host, self.way.tapes[chunk], played, self.prices, self.way.vcpus, self.vms,
                self.work_4k * chunk * played,
            )
        return self._played[chunk, played] * calls / played


def copy_ns(prices: dict[str, float], nbytes: int, cached: bool) -> float:
    """One memcpy in the guest: from memory, or (up to 256 KiB) within the caches."""
    kib = nbytes / KIB
    if cached and kib <= 256:
        return prices["memcpy_cached_kib"] * kib
    return prices["memcpy_fixed"] + prices["memcpy_cold_kib"] * min(kib, 4) + prices["memcpy_stream_kib"] * max(
        0, kib - 4
    )


# ---- what it says ---------------------------------------------------------------------------------------------


def where_cheaper(ratios: Sequence[float]) -> str:
    """On which sizes of the grid converting in place is cheaper: the crossover, in words."""
    wins = [ratio < 1 for ratio in ratios]
    if all(wins):
        return "every size"
    if not any(wins):
        return NOWHERE
    runs = []
    for won, group in itertools.groupby(range(len(wins)), key=wins.__getitem__):
        if won:
            sizes = list(group)
            low, high = SIZE_NAMES[sizes[0]], SIZE_NAMES[sizes[-1]]
            runs.append(f"from {low}" if sizes[-1] == len(wins) - 1 else low if low == high else f"{low} to {high}")
    return ", ".join(runs)


def settings(measured: Measured) -> Iterator[tuple[Way, int, tuple[int, ...]]]:
    """Every way to convert with the VMs, and the batches."""
    for way in measured.ways.values():
        for vms in VMS:
            yield way, vms, BATCHES if way.backend == PKVM.name else (BLOCK,)


def evaluate(measured: Measured, context: StudyContext) -> Findings:
    """Price every cell of the grid."""
    host = Host(PKVM, context.profile(PKVM.name))
    copies: dict[str, float] = dict(context.profile(PKVM.name).ns_by_item())
    rows: list[dict[str, Any]] = []
    for way, vms, batches in settings(measured):
        prices = prices_for(context, way.backend, cpus_of(way.vcpus, vms))
        player = Player(host, way, vms, prices, context.options["work"])
        rows += [_row(player, batch, copies) for batch in batches]
    rows.sort(key=lambda row: (BACKENDS.index(row["backend"]), LOCKS.index(row["lock"]), row["batch"]))
    return Findings(
        rows=rows,
        calibrated=[],
        predicted=["every cell: no price was fitted to a conversion, and no published figure of one was found"],
        notes=_notes(measured, context),
        conclusion=_conclusion(rows),
        verdict="; ".join(f"{title}: {_who(_row_of(rows, setting))}" for title, setting in HEADLINES),
        flips_in="crossover",
    )


def _row(player: Player, batch: int, copies: dict[str, float]) -> dict[str, Any]:
    """All sizes of one setting."""
    way = player.way
    work = [player.work_4k * nbytes / 4096 for nbytes in SIZES]
    in_place = [player.in_place_ns(batch, nbytes >> 12) for nbytes in SIZES]
    cold, warm = (
        [2 * copy_ns(copies, nbytes, cached) + own for nbytes, own in zip(SIZES, work, strict=True)]
        for cached in (False, True)
    )
    ratios = [a / b for a, b in zip(in_place, cold, strict=True)]
    lost = "" if way.keeps else LOST
    return {
        "backend": way.backend, "lock": way.lock, "batch": batch, "vcpus": way.vcpus, "vms": player.vms,
        **{f"x{name}": ratio for name, ratio in zip(SIZE_NAMES, ratios, strict=True)},
        "crossover": lost or where_cheaper(ratios),
        "cached": lost or where_cheaper([a / b for a, b in zip(in_place, warm, strict=True)]),
        "in_place_ns": [round(ns) for ns in in_place], "bounce_ns": [round(ns) for ns in cold],
    }  # fmt: skip


HEADLINES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("upstream, one vCPU", {"lock": "global", "batch": 1, "vcpus": 1, "vms": 1}),
    ("upstream, 16 vCPUs", {"lock": "global", "batch": 1, "vcpus": 16, "vms": 1}),
    ("512 pages a call, one vCPU", {"lock": "global", "batch": 512, "vcpus": 1, "vms": 1}),
    ("512 pages a call, 16 vCPUs", {"lock": "global", "batch": 512, "vcpus": 16, "vms": 1}),
    ("512 pages a call, locks per range, 16 vCPUs", {"lock": "per-range", "batch": 512, "vcpus": 16, "vms": 1}),
)
"""The settings that the conclusion names; the verdict is who wins each."""


def _headlines(rows: list[dict[str, Any]]) -> list[str]:
    """What the named settings come to."""
    found = [(title, _row_of(rows, setting)["crossover"]) for title, setting in HEADLINES]
    return [f"{title}: " + ("copy" if where == NOWHERE else f"in place, {where}") for title, where in found]


def _who(row: dict[str, Any]) -> str:
    """Who wins a setting, whatever the sizes where that changes."""
    wins = sum(row[f"x{name}"] < 1 for name in SIZE_NAMES)
    return "copy" if wins == 0 else "in place" if wins == len(SIZE_NAMES) else "depends on the size"


def _row_of(rows: list[dict[str, Any]], setting: dict[str, Any]) -> dict[str, Any]:
    return next(r for r in rows if r["backend"] == PKVM.name and all(r[key] == v for key, v in setting.items()))


def _conclusion(rows: list[dict[str, Any]]) -> str:
    mine = [row for row in rows if row["backend"] == PKVM.name]
    wins = [row for row in mine if row["crossover"] != NOWHERE]
    warm = sum(row["cached"] != NOWHERE for row in mine)
    today = _row_of(rows, HEADLINES[0][1])
    side = "the report (P3)" if today["crossover"] == NOWHERE else "the mail"
    return (
        f"Against copies from memory, converting in place is cheaper at some size in {len(wins)} of {len(mine)} "
        f"settings; against copies within the caches in {warm}. {'; '.join(_headlines(rows))}. "
        f"As upstream does it today, one page a call, the result is on the side of {side}."
    )


def _notes(measured: Measured, context: StudyContext) -> list[str]:
    scaled = context.options["tlbi"] == "scaled"
    tlbi = (
        f"a broadcast invalidation costs tlbi_local and, for each CPU of the machine, 1/{MEASURED_CPUS} of what "
        f"tlbi_page is more (P6 does not say how many CPUs it was measured on)" if scaled
        else "a broadcast invalidation costs tlbi_page on any machine"
    )  # fmt: skip
    notes = [
        EXPECTATION,
        REPORT,
        f"grid: buffers of {', '.join(SIZE_NAMES)}; vCPUs {_list(VCPUS)}; VMs {_list(VMS)}; pages a call "
        f"{_list(BATCHES)}; EL2 locks {_list(HYP_LOCKS)}; machines of max({MIN_CPUS}, VMs x vCPUs) CPUs",
        "figures under a size: time of an exchange in place over that of two copies from memory; below 1, converting "
        "is cheaper. The last columns say where: against copies from memory, and (up to 256 KiB) within the caches",
        tlbi,
        f"large cells are scaled: each vCPU plays 2 to 16 conversions in each direction (about {SAMPLE} in all), and "
        "the time is multiplied by how many the buffer takes; a call covers at most 2 MiB",
        "all vCPUs exchange at once and without pause: locks are as contended as they can be; "
        f"{context.options['work']} ns of work on each 4K in between",
        "the conversion is charged the host's refill of what was invalidated; a copy is not charged the cache it "
        "fills, nor is its second buffer; memory bandwidth and the interconnect are shared by nobody",
        "a guest's MEM_SHARE and MEM_UNSHARE take no lock of the host's KVM: mmu_lock=rw|sharded changes nothing for "
        "pKVM; it is tried on the others",
    ]
    for name in OTHERS:
        if name in measured.missing:
            notes.append(f"{name} is left out: {measured.missing[name]}")
    if len(measured.missing) < len(OTHERS):
        notes.append(
            "x86 rows: exit, attributes, zap, accept and faults as the model runs them, recorded for one vCPU and "
            "played under the locks of all, so that retries under contention are left out; they convert and lose the "
            "data, so in place is no way to do the work there: the figures say only what two conversions cost. "
            "KVM_SET_MEMORY_ATTRIBUTES holds slots_lock, so shards of mmu_lock do not make them parallel"
        )
    return notes


def _list(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _short(ratio: float) -> str:
    return f"{ratio / 1000:.0f}k" if ratio >= 9500 else f"{ratio:.0f}" if ratio >= 9.5 else f"{ratio:.2g}"


def draw(findings: Findings, figure: Any) -> None:
    """A heat map for each lock design and batch: buffer size against vCPUs and VMs; blue: converting is cheaper."""
    rows = [row for row in findings.rows if row["backend"] == PKVM.name]
    figure.set_size_inches(13, 9)
    axes = figure.subplots(len(HYP_LOCKS), len(BATCHES), squeeze=False)
    image = None
    for i, lock in enumerate(HYP_LOCKS):
        for j, batch in enumerate(BATCHES):
            some = sorted(
                (r for r in rows if r["lock"] == lock and r["batch"] == batch), key=lambda r: (r["vms"], r["vcpus"])
            )
            cells = np.array([[np.log2(row[f"x{name}"]) for name in SIZE_NAMES] for row in some])
            axis = axes[i][j]
            image = axis.imshow(cells, cmap="RdBu_r", vmin=-4, vmax=4, aspect="auto")
            axis.set_title(f"locks {lock}, {batch} page{'s' if batch > 1 else ''} a call", fontsize=9)
            axis.set_xticks(range(len(SIZE_NAMES)), SIZE_NAMES, fontsize=7)
            axis.set_yticks(range(len(some)), [f"{r['vms']} VM x {r['vcpus']} vCPU" for r in some], fontsize=7)
            for y, x in itertools.product(range(cells.shape[0]), range(cells.shape[1])):
                colour = "white" if abs(cells[y, x]) > 2.5 else "black"
                axis.text(x, y, _short(2 ** cells[y, x]), ha="center", va="center", fontsize=6, color=colour)
    figure.suptitle("time in place / time of two copies from memory: below 1 (blue) converting is cheaper")
    if image is not None:
        figure.colorbar(image, ax=axes.ravel().tolist(), label="log2 of the ratio", shrink=0.8)


CONVERT = Study(
    name=NAME,
    question="convert a shared buffer in place twice, or copy it through a bounce buffer twice?",
    source="mail 003 (sources/003), Q. Perret and S. Christopherson, April 2022",
    columns=(
        Column("backend", "backend", "", 0),
        Column("lock", "lock", "", 0),
        Column("batch", "batch", "", 0),
        Column("vcpus", "vCPUs", "", 0),
        Column("vms", "VMs", "", 0),
        *(Column(f"x{name}", name, "", 2) for name in SIZE_NAMES),
        Column("crossover", "in place wins", "", 0),
        Column("cached", "if copies are cached", "", 0),
    ),
    measure=measure,
    evaluate=evaluate,
    draw=draw,
    options=(
        Option("tlbi", "scaled", "invalidations cost more on larger machines, or the same on all", ("scaled", "flat")),
        Option("work", 0, "ns that the guest works on each 4K page between the conversions, or copies"),
    ),
)
"""The study, as its entry point names it."""
