"""Reports for people (one table, backends side by side) and for programs (JSON)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence

import attrs
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cvmcore import __version__
from cvmcore.hookspecs import HOOKS
from cvmcore.runner import Phase, Report

SCHEMA = 1
NONE = "-"
SKIPPED = "skipped"
WORTH_A_ROW = 0.005
"""What is less than this part of a sum, or happened once, goes with the others."""
NOT_KERNEL = frozenset(name for name, hook in HOOKS.items() if "in the guest" in hook.locks) | {"host_access"}
"""Hooks that stand for what guest and hardware do themselves; KVM calls none of them."""

Cells = list[str]
Row = tuple[str, Cells]
Names = Callable[[Report], Mapping[str, float]]


# ---- for programs ---------------------------------------------------------------------------------------------


def to_json(reports: Sequence[Report]) -> str:
    """The reports as JSON (docs/json.md names the keys)."""
    rows = [attrs.asdict(report) | {"ok": report.ok} for report in reports]
    return json.dumps({"schema": SCHEMA, "cvmcore": __version__, "reports": rows}, indent=2, default=str)


# ---- for people -----------------------------------------------------------------------------------------------


def shown(reports: Sequence[Report], *, top: int = 5) -> RenderableType:
    """What was run, the table, and below it whatever has to be said in sentences.

    top: how many of the hooks, vendor operations and parts of the time each backend may bring in; the others are
    summed. 0: all of them.
    """
    some = [] if all(report.skipped for report in reports) else [table(reports, top=top)]
    return Group(Text(_title(reports), style="bold"), *some, *_remarks(reports))


def table(reports: Sequence[Report], *, top: int = 5) -> Table:
    """One column for each report, one row for each figure."""
    sections = [list(section) for section in _sections(reports, top)]
    rows = [row for section in sections for row in section]
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    made.add_column("", min_width=max(len(label) for label, _ in rows))
    for number, report in enumerate(reports):
        made.add_column(report.backend, justify="right", min_width=max(len(cells[number]) for _, cells in rows))
    for section in sections:
        for label, cells in section:
            made.add_row(Text(label, style="" if label.startswith(" ") else "bold"), *map(_cell, cells))
        made.add_section()
    return made


def _cell(text: str) -> Text:
    return Text(text, style="bold red" if text.isupper() else "dim" if text in (NONE, SKIPPED) else "")


def _sections(reports: Sequence[Report], top: int) -> Iterable[list[Row]]:
    def row(label: str, cell: Callable[[Report], str]) -> Row:
        return label, ["" if report.skipped else cell(report) for report in reports]

    def number(label: str, value: Callable[[Report], float]) -> Row:
        return row(label, lambda report: _number(value(report)))

    yield [
        ("guest content", [SKIPPED if report.skipped else _content(report) for report in reports]),
        row("private memory", _privacy),
        row("after teardown", _leftovers),
    ]
    names = list(dict.fromkeys(name for report in reports for name in report.figures))
    if names:
        yield [number(name, _figure(name)) for name in names]
    yield [
        number("stage-2 faults", lambda r: r.faults),
        number("VM exits", lambda r: r.exits.get("vm", 0)),
        number("  to user space", lambda r: r.exits.get("user", 0)),
        number("    conversion hypercall", lambda r: r.exits.get("hypercall", 0)),
        number("    memory fault", lambda r: r.exits.get("memory_fault", 0)),
    ]
    yield _counted("hook calls", reports, _hook_calls, top, list(HOOKS))
    yield _counted("vendor operations", reports, lambda r: r.operations, top)
    yield [
        number("pins taken", lambda r: r.pins_taken),
        number("  4K pages they cover", lambda r: r.pinned_pages),
        row("large-page coverage", _coverage),
        row("page tables of KVM", lambda r: _bytes(r.page_table_bytes)),
        row("  of the trusted party", lambda r: _bytes(r.external_table_bytes)),
    ]
    unit, ns = _unit(max((report.cpu_ns for report in reports), default=0))

    def time(label: str, value: Callable[[Report], float]) -> Row:
        return row(label, lambda report: _decimal(value(report) / ns))

    yield [
        time(f"modelled cpu time, {unit}", lambda r: r.cpu_ns),
        *[time(f"  {name}", _phase_ns(name)) for name in ("setup", "workload", "teardown")],
        time(f"modelled elapsed time, {unit}", lambda r: r.elapsed_ns),
    ]
    parts = _counted(f"largest parts of cpu time, {unit}", reports, lambda r: r.parts_ns, top, scale=ns)
    yield [(parts[0][0], ["" for _ in reports]), *parts[1:]]
    yield [row("prices", lambda r: r.profile), row("real seconds", lambda r: f"{r.wall_s:.2f}")]


def _figure(name: str) -> Callable[[Report], float]:
    return lambda report: report.figures.get(name, 0)


def _phase_ns(name: str) -> Callable[[Report], float]:
    return lambda report: report.phases.get(name, Phase()).cpu_ns


def _content(report: Report) -> str:
    if report.wrong:
        return "WRONG"
    return "intact" if report.content_checked else "not checked"


def _privacy(report: Report) -> str:
    if report.readable:
        return "READABLE"
    return "unreadable" if report.protects else "unprotected"


def _leftovers(report: Report) -> str:
    if report.left:
        return "LOST"
    return f"{report.leaked_frames:,} leaked" if report.leaked_frames else "all returned"


def _coverage(report: Report) -> str:
    return f"{100 * report.large_pages / report.mapped_pages:.1f} %" if report.mapped_pages else NONE


def _hook_calls(report: Report) -> dict[str, float]:
    return {name: counts["calls"] for name, counts in report.hooks.items() if name not in NOT_KERNEL}


def _counted(
    label: str,
    reports: Sequence[Report],
    of: Names,
    top: int,
    order: Sequence[str] = (),
    scale: float = 0,
) -> list[Row]:
    """A sum over names, the names that are large in any report, and the others in one row.

    order: in which names come; without it the largest first. scale: what a number is divided by; 0: a count.
    """
    values = [of(report) for report in reports]
    chosen: set[str] = set()
    for counts in values:
        names = sorted((name for name in counts if counts[name]), key=lambda name: -counts[name])
        if top and names:
            least = max(counts[names[min(top, len(names)) - 1]], WORTH_A_ROW * sum(counts.values()), 2)
            names = [name for name in names if counts[name] >= least]
        chosen.update(names)
    total = {name: sum(counts.get(name, 0) for counts in values) for name in chosen}
    ranked = sorted(chosen, key=lambda name: (order.index(name) if name in order else 0, -total[name], name))

    def cells(sums: Iterable[float]) -> Cells:
        return [
            "" if report.skipped else _decimal(value / scale) if scale else _number(value)
            for report, value in zip(reports, sums, strict=True)
        ]

    rows = [(label, cells(sum(counts.values()) for counts in values))]
    rows += [(f"  {name}", cells(counts.get(name, 0) for counts in values)) for name in ranked]
    others = cells(sum(n for name, n in counts.items() if name not in chosen) for counts in values)
    return [*rows, ("  others", others)] if any(cell not in (NONE, "") for cell in others) else rows


def _title(reports: Sequence[Report]) -> str:
    if not reports:
        return "nothing was run"
    first = reports[0]
    what = first.workload + (f" {first.file}" if first.file else "")
    what += "".join(f" {name}={value}" for name, value in first.workload_options.items() if value != "")
    vcpus = f"{first.vcpus} vCPU" + ("s" if first.vcpus > 1 else "")
    return (
        f"{what}\n{_bytes(first.mem_bytes)}, {vcpus}, backing {first.backing}, kernel {first.kernel}, seed {first.seed}"
    )


def _remarks(reports: Sequence[Report]) -> Iterable[Text]:
    notes: dict[str, list[str]] = {}
    for report in reports:
        for note in [*([f"skipped, {report.skipped}"] if report.skipped else []), *report.notes]:
            notes.setdefault(note, []).append(report.backend)
    for note, names in notes.items():
        yield Text(f"{', '.join(names)}: {note}")
    for report in reports:
        for sentence in [*report.wrong, *report.readable, *report.left]:
            yield Text(f"{report.backend}: {sentence}", style="red")
    yield Text(
        "Counts are what the kernel would do. Times follow from the prices: for comparing designs, not cycle accurate.",
        style="dim",
    )


# ---- numbers --------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    if not value:
        return NONE
    return f"{value:,}" if isinstance(value, int) else _decimal(value)


def _decimal(value: float) -> str:
    if not value:
        return NONE
    return f"{value:,.2f}" if value >= 0.005 else "<0.01"


def _bytes(value: int) -> str:
    if not value:
        return NONE
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= size:
            return f"{value / size:,.4g} {unit}"
    return f"{value} B"


def _unit(ns: float) -> tuple[str, float]:
    """The unit in which the largest time reads well, and its ns."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if ns >= 10 * size:
            return unit, size
    return "us", 1e3
