"""Study `pinning` (mail 000): pin the memory of an SEV guest up front, or on demand as the guest's pages are mapped?

How it is answered. The workload `boot` runs at the sizes of the mail under both designs, with 2M pages behind the
guest: the model gives counts of faults, cleared, pinned and written pages. Two numbers are calibrated on two cells of
the mail's table (baseline, 4 and 192 GB): what every boot takes, and what a 4K page costs that is cleared, pinned and
accounted up front. All other cells, the whole demand column among them, are predictions from counts and prices.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any, Final

import attrs
import numpy as np

from cvmcore.backend import Option, parse_options
from cvmcore.guest import Machine
from cvmcore.host import Host
from cvmcore.pages import where
from cvmcore.plugins import load_backend
from cvmcore.study import Column, Findings, Study, StudyContext
from cvmcore.types import PAGE_BYTES
from cvmcore.workloads import GIB, Context
from cvmcore.workloads.boot import BOOT

PUBLISHED: Final[Mapping[int, tuple[float, float]]] = {
    4: (6.16, 5.71),
    16: (7.38, 5.91),
    64: (12.17, 6.16),
    128: (18.20, 6.50),
    192: (24.56, 6.80),
}
"""Guest memory in GB -> boot time in s: baseline (pinned up front), demand pinning. N. A. Dadhania, March 2022."""
CALIBRATED_ON: Final = (4, 192)
SIZES: Final = tuple(PUBLISHED)
TOLERANCE_PERCENT: Final = 5.0
UPFRONT_ITEMS: Final = frozenset({"page_clear_4k", "page_clear_2m", "gup_pin_4k", "gup_pin_2m", "cacheline_flush_4k"})
"""What registering a region charges for each page: together the calibrated price of the baseline."""
UPFRONT, DEMAND = "upfront", "demand"
MAIL, SMALL, VALIDATION, SMALL_VALIDATION = "sev, 2M pages", "sev, 4K pages", "snp, 2M pages", "snp, 4K pages"
CASES: Final[Mapping[str, tuple[str, str]]] = {
    MAIL: ("sev", "2m"),
    SMALL: ("sev", "4k"),
    VALIDATION: ("snp", "2m"),
    SMALL_VALIDATION: ("snp", "4k"),
}
"""Setting -> backend, backing. The first is the mail's."""
LAZY_AND_EAGER: Final = (128, 22.0, 227.0)
"""An SNP guest of 128 GB, lazy and eager acceptance in s (A. Kalra, Feb 2025)."""


@attrs.frozen
class Cell:
    """What one boot did: priced work by item, and 4K pages that the host cannot use or move at its end."""

    counts: dict[str, int]
    taken_pages: int
    pinned_pages: int


def boot(context: StudyContext, case: str, gigabytes: int, design: str) -> Cell:
    """Boot a guest. SNP has nothing to pin: `upfront` is a guest that validates all of its memory at boot."""
    name, backing = CASES[case]
    snp = name == "snp"
    host = Host(
        load_backend(name), context.profile(name), backing=backing, options=None if snp else {"pinning": design}
    )
    machine = Machine(host, gigabytes * GIB)
    options = parse_options(BOOT.options, {}, "boot")
    workload = Context(machine, options, np.random.default_rng(context.seed))
    BOOT.run(workload)
    if snp and design == UPFRONT:
        guest = machine.guest
        for gfns in workload.in_order(0, machine.end_gfn, "validate"):
            mine = guest.shared[gfns] == 0
            guest.accept_new(gfns if mine.all() else where(gfns, mine))
    frames = host.frames
    return Cell(dict(host.meter.counts), frames.nr_frames - frames.available, frames.pins_held)


def measure(context: StudyContext) -> dict[tuple[str, int, str], Cell]:
    """Boot at every size, in every setting, under both designs."""
    cases = [(case, size, design) for case in CASES for size in SIZES for design in (UPFRONT, DEMAND)]
    cells = {}
    for done, cell in enumerate(cases):
        context.progress(done, len(cases), f"{cell[0]}, {cell[1]} GB, {cell[2]}")
        cells[cell] = boot(context, *cell)
        gc.collect()  # a host is full of cycles, and the next one is as large
    context.progress(len(cases), len(cases), "boot")
    return cells


def nr_pages(gigabytes: int) -> int:
    """4K pages of the guest. The mail's GB are taken for GiB."""
    return gigabytes * GIB // PAGE_BYTES


def work_s(cell: Cell, prices: Mapping[str, float], without: frozenset[str] = frozenset()) -> float:
    """Modelled work, one thing after the other, in s."""
    return sum(n * prices[item] for item, n in cell.counts.items() if item not in without) / 1e9


def calibrate(rest: Mapping[int, float]) -> tuple[float, float]:
    """(fixed s, s of each 4K page that is pinned up front) from the two calibrating cells; rest: all else, by size."""
    low, high = CALIBRATED_ON
    left = {size: PUBLISHED[size][0] - rest[size] for size in CALIBRATED_ON}
    each = (left[high] - left[low]) / (nr_pages(high) - nr_pages(low))
    return left[low] - each * nr_pages(low), each


def evaluate(measured: Mapping[tuple[str, int, str], Cell], context: StudyContext) -> Findings:
    """Price every cell."""
    guest_s = context.options["guest_init"] / 1e9
    prices: dict[str, Mapping[str, float]] = {name: context.profile(name).ns_by_item() for name, _ in CASES.values()}
    sev = prices["sev"]
    rest = {
        size: work_s(measured[MAIL, size, UPFRONT], sev, UPFRONT_ITEMS) + nr_pages(size) * guest_s for size in SIZES
    }
    fixed, each = calibrate(rest)
    rows = []
    for case, (name, _) in CASES.items():
        for size in SIZES:
            upfront, demand = measured[case, size, UPFRONT], measured[case, size, DEMAND]
            always = fixed + nr_pages(size) * guest_s
            times = [always + work_s(cell, prices[name]) for cell in (upfront, demand)]
            if case == MAIL:
                times[0] = fixed + rest[size] + nr_pages(size) * each
            rows.append(_row(case, size, times, upfront, demand))
    errors = [
        abs(row[f"{design}_error"]) for row in rows for design in (UPFRONT, DEMAND)
        if row["case"] == MAIL and not (design == UPFRONT and row["gb"] in CALIBRATED_ON)
    ]  # fmt: skip
    worst = max(errors)
    return Findings(
        rows, *_said(fixed, each, sev, context.options["guest_init"]), _notes(rows), *_concluded(rows, worst)
    )


def _row(case: str, size: int, times: list[float], upfront: Cell, demand: Cell) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case, "gb": size}
    for at, (design, cell) in enumerate(((UPFRONT, upfront), (DEMAND, demand))):
        row[design] = times[at]
        row[f"{design}_taken_gib"] = cell.taken_pages * PAGE_BYTES / GIB
        row[f"{design}_pinned_gib"] = cell.pinned_pages * PAGE_BYTES / GIB
        if case == MAIL:
            published = PUBLISHED[size][at]
            row[f"{design}_published"] = published
            row[f"{design}_error"] = 100 * (times[at] / published - 1)
    row["ratio"] = times[0] / times[1]
    return row


def _said(fixed: float, each: float, sev: Mapping[str, float], guest_init: int) -> tuple[list[str], list[str]]:
    independent = (sev["page_clear_2m"] + sev["gup_pin_2m"]) / 512
    low, high = CALIBRATED_ON
    return (
        [
            f"two numbers, on two cells (upfront, {low} and {high} GB): every boot takes {fixed:.2f} s, and a 4K page "
            f"that is cleared and pinned up front {each * 1e9:.0f} ns",
            f"{guest_init} ns of the guest for each of its 4K pages (-s guest_init) is a constant that was fitted to "
            "the same table before",
        ],
        [
            "the other three cells of upfront, and all five of demand: from the model's counts and the prices of the "
            "profile, no other number of the table used",
            f"beside the calibrated {each * 1e9:.0f} ns: clearing and pinning 2M pages at the profile's prices would "
            f"be {independent:.0f} ns per 4K, 4K pages {sev['page_clear_4k'] + sev['gup_pin_4k']:.0f} ns",
            f"all rows but those of '{MAIL}': they share only what every boot takes",
        ],
    )


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    size, lazy, eager = LAZY_AND_EAGER
    row = next(row for row in rows if (row["case"], row["gb"]) == (SMALL_VALIDATION, size))
    return [
        "GB are taken for GiB; the mail says neither host, nor page size, nor guest kernel. A guest clears bounce "
        "buffers of 6 % of memory, 64 MiB to 1 GiB, twice, and writes a struct page for each page",
        "2M pages behind the guest, in both columns: with 4K pages under one and 2M under the other nothing could be "
        "compared",
        "snp pins nothing, for guest_memfd cannot be moved; its columns are a guest that validates all memory at boot "
        "(upfront) and one that validates what it touches (demand)",
        f"published for SNP at {size} GB: {eager:g} s and {lazy:g} s (A. Kalra, Feb 2025); modelled with 4K pages "
        f"{row[UPFRONT]:.0f} s and {row[DEMAND]:.1f} s. The difference is no prediction: the prices of RMPUPDATE, "
        "PVALIDATE and the fault were chosen to close it",
        "GiB taken: what the host cannot give to others once the guest has booted, page tables and hardware structures "
        "included",
    ]


def _concluded(rows: list[dict[str, Any]], worst: float) -> tuple[str, tuple[str, ...]]:
    mail = [row for row in rows if row["case"] == MAIL]
    faster = [row["gb"] for row in mail if row[DEMAND] < row[UPFRONT]]
    last = mail[-1]
    where_faster = "at every size" if len(faster) == len(mail) else f"at {', '.join(map(str, faster)) or 'no size'} GB"
    within = worst <= TOLERANCE_PERCENT
    text = (
        f"Pinning on demand boots faster {where_faster}: {last['ratio']:.1f} times at {last['gb']} GB (published "
        f"{last['upfront_published'] / last['demand_published']:.1f}), and leaves "
        f"{last['upfront_taken_gib'] - last['demand_taken_gib']:.0f} GiB to the host. The worst predicted cell is "
        f"off by {worst:.1f} %{'' if within else f', more than {TOLERANCE_PERCENT:g} %'}."
    )
    return text, (f"demand is faster {where_faster}", f"predictions within {TOLERANCE_PERCENT:g} %: {within}")


def draw(findings: Findings, figure: Any) -> None:
    """Boot time over guest memory: published points, modelled lines."""
    axes = figure.subplots(1, 2)
    for axis, cases in zip(axes, ((MAIL, SMALL), (VALIDATION, SMALL_VALIDATION)), strict=True):
        for case, dashes in zip(cases, ("-", "--"), strict=True):
            rows = [row for row in findings.rows if row["case"] == case]
            for design, colour in ((UPFRONT, "#c44e52"), (DEMAND, "#4c72b0")):
                name = design if case in (MAIL, SMALL) else {UPFRONT: "eager", DEMAND: "lazy"}[design]
                axis.plot(
                    [row["gb"] for row in rows], [row[design] for row in rows], dashes, color=colour,
                    label=f"{case}: {name}",
                )  # fmt: skip
                if case == MAIL:
                    points = [row[f"{design}_published"] for row in rows]
                    axis.plot([row["gb"] for row in rows], points, "o", color=colour, label=f"published: {name}")
        axis.set_xlabel("guest memory, GiB")
        axis.set_ylabel("boot time, s (modelled)")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize="small")
        axis.spines[["top", "right"]].set_visible(False)


PINNING = Study(
    name="pinning",
    question="pin the memory of an SEV guest up front, or on demand?",
    source="mail 000, N. A. Dadhania, March 2022",
    columns=(
        Column("case", "setting"),
        Column("gb", "memory", "GB"),
        Column("upfront_published", "upfront: published", "s", 2),
        Column("upfront", "modelled", "s", 2),
        Column("upfront_error", "error", "%", 1),
        Column("demand_published", "demand: published", "s", 2),
        Column("demand", "modelled", "s", 2),
        Column("demand_error", "error", "%", 1),
        Column("ratio", "ratio", "", 2),
        Column("upfront_taken_gib", "taken: upfront", "GiB", 1),
        Column("demand_taken_gib", "demand", "GiB", 1),
    ),
    measure=measure,
    evaluate=evaluate,
    draw=draw,
    options=(Option("guest_init", 8, "ns of the guest's own for each of its 4K pages"),),
)
"""The study, as its entry point names it."""
