"""Runs one workload on one backend and says what happened: the `Report` behind `cvm run` and `cvm compare`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from cvmcore.backend import Backend, parse_options
from cvmcore.clock import Meter
from cvmcore.cost import COMMON, Profile, load_profile
from cvmcore.errors import InputError, PluginError
from cvmcore.guest import Machine, Progress, silent
from cvmcore.host import FRAMES_256_GIB, Host
from cvmcore.plugins import load, load_backend
from cvmcore.types import PAGE_BYTES, Use
from cvmcore.workloads import GROUP, Context, Skip, Workload, mapped_pages

MAX_MEM_BYTES = 256 << 30
"""A frame number has 27 bits: 512 GiB of host memory, which a guest may use twice over (private and shared)."""
MAX_VCPUS = 4096

Tally = Counter[tuple[str, str]]
"""Everything that is counted, by (kind, name); differences of two tallies are what happened between."""


@attrs.frozen
class Setup:
    """How the machine is made. mem_bytes None: as the workload says. profile None: the backend's own. policies: of the
    core (`cvmcore.policies`)."""

    mem_bytes: int | None = None
    vcpus: int = 1
    backing: str = "4k"
    kernel: str = "6.18"
    profile: Path | None = None
    seed: int = 0
    policies: dict[str, str] = attrs.field(factory=dict)


@attrs.frozen
class Phase:
    """Modelled time of one part of a run."""

    cpu_ns: float = 0
    elapsed_ns: float = 0


@attrs.define
class Report:
    """What one workload did on one backend. Counts are what the kernel would count, not calls of Python.

    exits: "vm" (all exits), of which "user" returned to user space, of which "hypercall" and "memory_fault". hooks:
    calls and Python batches by hook. operations: of the vendor, by their spec's name. pins_taken pins cover
    pinned_pages 4K pages. mapped_pages, large_pages, page_table_bytes and external_table_bytes are sampled when the
    workload is done. phases: "setup", "workload", "teardown"; parts_ns: cpu time by price item, largest first. wrong
    (content), readable (private memory) and left (after teardown): sentences, empty where all is well. protects:
    whether anything keeps the host from reading private memory, so that `readable` means something.
    """

    backend: str
    workload: str
    profile: str
    kernel: str
    backing: str
    mem_bytes: int
    vcpus: int
    seed: int
    file: str | None = None
    backend_options: dict[str, Any] = attrs.field(factory=dict)
    workload_options: dict[str, Any] = attrs.field(factory=dict)
    skipped: str = ""
    notes: list[str] = attrs.field(factory=list)
    figures: dict[str, int | float] = attrs.field(factory=dict)
    faults: int = 0
    exits: dict[str, int] = attrs.field(factory=dict)
    hooks: dict[str, dict[str, int]] = attrs.field(factory=dict)
    operations: dict[str, int] = attrs.field(factory=dict)
    pins_taken: int = 0
    pinned_pages: int = 0
    mapped_pages: int = 0
    large_pages: int = 0
    page_table_bytes: int = 0
    external_table_bytes: int = 0
    cpu_ns: float = 0
    elapsed_ns: float = 0
    phases: dict[str, Phase] = attrs.field(factory=dict)
    parts_ns: dict[str, float] = attrs.field(factory=dict)
    content_checked: bool = False
    protects: bool = False
    wrong: list[str] = attrs.field(factory=list)
    readable: list[str] = attrs.field(factory=list)
    left: list[str] = attrs.field(factory=list)
    leaked_frames: int = 0
    wall_s: float = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with content, privacy or teardown."""
        return not (self.wrong or self.readable or self.left)


def load_workload(name: str) -> Workload:
    """A workload by name. InputError where there is none, PluginError where it cannot be used."""
    workload = load(GROUP, name, "workload")
    if not isinstance(workload, Workload):
        raise PluginError(f"workload {name}: its entry point names a {type(workload).__name__}, not a Workload")
    return workload


def load_profile_for(backend: Backend, path: Path | None) -> Profile:
    """A backend's own prices, or those of a file. ProfileError where they do not fit."""
    return load_profile(
        path or backend.profile, required=COMMON | backend.charges, resolve=lambda name: load_backend(name).profile
    )


def run(
    workload: Workload,
    backend: Backend,
    setup: Setup,
    *,
    backend_options: dict[str, str] | None = None,
    workload_options: dict[str, str] | None = None,
    file: str | None = None,
    observers: Iterable[object] = (),
    progress: Progress = silent,
) -> Report:
    """Make a Host and a Machine, run the workload, check content, tear down.

    Raises InputError for what does not fit, before anything runs where that can be known, and whatever CvmError the
    workload met.
    """
    options = parse_options(workload.options, workload_options or {}, f"workload {workload.name}")
    if file is not None and not workload.reads_file:
        raise InputError(f"workload {workload.name} reads no file, and '{file}' was given")
    mem_bytes = workload.mem_bytes(file) if setup.mem_bytes is None else setup.mem_bytes
    if mem_bytes % PAGE_BYTES or not 0 < mem_bytes <= MAX_MEM_BYTES:
        raise InputError(f"--mem: {mem_bytes} bytes are not whole 4K pages, one at least, up to {MAX_MEM_BYTES >> 30}G")
    if not 0 < setup.vcpus <= MAX_VCPUS:
        raise InputError(f"--vcpus: {setup.vcpus} is not from 1 to {MAX_VCPUS}")
    host = Host(
        backend,
        load_profile_for(backend, setup.profile),
        nr_frames=max(FRAMES_256_GIB, 2 * mem_bytes // PAGE_BYTES),
        options=backend_options,
        policies=setup.policies,
        kernel=setup.kernel,
        backing=setup.backing,
        observers=observers,
    )
    report = Report(
        backend.name, workload.name, host.profile.name, setup.kernel, setup.backing, mem_bytes, setup.vcpus, setup.seed,
        file, host.options, options,
    )
    _run(workload, host, report, progress)
    return report


def _run(workload: Workload, host: Host, report: Report, progress: Progress) -> None:
    marks = [Tally()]
    _phase(host, "setup")
    progress(0, None, "set up")
    machine = Machine(host, report.mem_bytes, vcpus=report.vcpus)
    rng = np.random.default_rng(report.seed)
    context = Context(
        machine, report.workload_options, rng, report.file, progress, report.notes, report.figures, report.wrong
    )
    marks.append(_tally(host, machine))

    _phase(host, "workload")
    begin = time.perf_counter()
    try:
        _need_capabilities(workload, context)
        workload.run(context)
    except Skip as skip:
        report.skipped = str(skip)
        return
    report.wall_s = time.perf_counter() - begin
    marks.append(_tally(host, machine))
    _sample(report, machine)

    # Looking whether all is well is not part of the workload: it stays off the clock and out of the counts.
    _phase(host, "check")
    if not machine.vm.vm.destroyed:
        report.wrong += machine.guest.check(progress)
        report.readable += machine.private_leaks(progress)
        report.content_checked = True
    checked = _tally(host, machine)

    _phase(host, "teardown")
    progress(0, None, "tear down")
    machine.destroy()
    marks.append(marks[-1] + (_tally(host, machine) - checked))
    report.left += machine.leftovers()
    report.leaked_frames = host.frames.leaked()

    _count(report, host, marks)


def _phase(host: Host, name: str) -> None:
    """Tell observers which part of the run begins."""
    host.ops.emit("host", "phase", info={"phase": name})


def _need_capabilities(workload: Workload, context: Context) -> None:
    missing = [name for name in workload.needs if not getattr(context.caps, name)]
    if missing:
        context.skip(f"it lacks what {workload.name} needs: {', '.join(missing)}")


def _tally(host: Host, machine: Machine) -> Tally:
    """All counts as they stand."""
    tally = Tally()
    vcpus = [vcpu.vcpu for vcpu in machine.vcpus]
    tally["guest", "faults"] = sum(vcpu.faults for vcpu in vcpus)
    tally["guest", "hypercall"] = machine.hypercalls
    tally["guest", "memory_fault"] = machine.memory_faults
    tally["guest", "pinned"] = host.frames.pinned_pages
    for kind, counts in (("item", host.meter.counts), ("elsewhere", host.meter.elsewhere), ("op", host.meter.ops)):
        for name, n in counts.items():
            tally[kind, name] = n
    for name, hook in host.ops.hooks.items():
        tally["calls", name], tally["batches", name] = hook.pages, hook.calls
    return tally


def _of(tally: Tally, kind: str) -> dict[str, int]:
    return {name: n for (k, name), n in tally.items() if k == kind and n}


def _meter(host: Host, tally: Tally) -> Meter:
    """A meter that has counted just this."""
    meter = Meter(host.meter.prices)
    meter.counts, meter.elsewhere = _of(tally, "item"), _of(tally, "elsewhere")
    return meter


def _sample(report: Report, machine: Machine) -> None:
    """What the page tables look like now."""
    report.mapped_pages, report.large_pages = mapped_pages(machine)
    report.page_table_bytes = sum(root.table_bytes for root in machine.vm.vm.tdp.roots())
    report.protects = machine.vm.vm.caps.confidential
    report.external_table_bytes = PAGE_BYTES * machine.host.frames.outstanding().get(Use.TABLE, 0)


def _count(report: Report, host: Host, marks: list[Tally]) -> None:
    """Fill in the figures from the tallies at the ends of the phases."""
    total = marks[-1]
    report.faults = total["guest", "faults"]
    report.exits = {
        "vm": total["item", "vm_exit"],
        "user": total["item", "user_exit"],
        "hypercall": total["guest", "hypercall"],
        "memory_fault": total["guest", "memory_fault"],
    }
    batches = _of(total, "batches")
    calls = _of(total, "calls")
    report.hooks = {name: {"calls": calls.get(name, 0), "batches": n} for name, n in batches.items()}
    report.operations = dict(sorted(_of(total, "op").items(), key=lambda op: -op[1]))
    report.pins_taken = total["item", "gup_pin_4k"] + total["item", "gup_pin_2m"]
    report.pinned_pages = total["guest", "pinned"]
    meter = _meter(host, total)
    report.cpu_ns, report.elapsed_ns = meter.cpu_ns, meter.serial_ns
    report.parts_ns = meter.parts_ns()
    for name, before, after in zip(("setup", "workload", "teardown"), marks, marks[1:], strict=False):
        part = _meter(host, after - before)
        report.phases[name] = Phase(part.cpu_ns, part.serial_ns)
