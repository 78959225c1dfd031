"""Pictures of reports: where the time goes, one bar for each backend. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cvmcore.errors import InputError
from cvmcore.outfile import OutFile
from cvmcore.runner import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png", ".pdf")
COLOURS = (
    "#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499",
)  # fmt: skip
"""Told apart with every kind of colour vision: the scheme 'muted' of Paul Tol (SRON/EPS/TN/09-002, 2021)."""
OTHER = "#DDDDDD"
"""The same scheme's colour for what has none of its own."""
UNITS = (("s", 1e9), ("ms", 1e6), ("us", 1e3))


class Plot:
    """A picture at `path`, in the format of its ending (FORMATS). A context manager: made by `draw`, there when it is
    left without an error. Raises InputError for another ending, a file that cannot be written, or no matplotlib.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix.lower() not in FORMATS:
            raise InputError(f"--plot {path}: the name must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
        try:
            import matplotlib.figure  # noqa: F401 - whether it is there, before anything runs
        except ImportError:
            raise InputError("--plot needs matplotlib, which is not installed: pip install 'cvmcore[plot]'") from None
        self._format = path.suffix.lower()[1:]
        self._out = OutFile(path, binary=True)
        self._drawn = False

    def __enter__(self) -> Plot:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._drawn:
            self._out.__exit__(kind, error, at)
        else:
            self._out.give_up()

    def draw(self, reports: Sequence[Report]) -> None:
        """Stacked bars of `Report.parts_ns`, in the order of the reports. The same reports give the same bytes (png
        and pdf: with the same matplotlib)."""
        import matplotlib as mpl
        from matplotlib.figure import Figure

        parts = chosen(reports)
        unit, ns = _unit(max((report.cpu_ns for report in reports), default=0))
        rows = range(len(reports))
        with mpl.rc_context(_STYLE):
            figure = Figure(figsize=(9, 1.6 + max(2.2, 0.5 * len(reports))), layout="constrained")
            axes = figure.add_subplot()
            left = [0.0 for _ in reports]
            for number, name in enumerate([*parts, ""]):
                values = [_part(report, name, parts) / ns for report in reports]
                if not any(values):
                    continue
                colour = COLOURS[number] if name else OTHER
                axes.barh(
                    rows, values, left=left, color=colour, edgecolor="white", linewidth=0.6, label=name or "others"
                )
                left = [start + value for start, value in zip(left, values, strict=True)]
            for row, report in enumerate(reports):
                text = "skipped" if report.skipped else f"{report.cpu_ns / ns:,.2f}"
                axes.text(left[row], row, f" {text}", va="center")
            axes.set_yticks(rows, [report.backend for report in reports])
            axes.invert_yaxis()
            axes.margins(x=0.1)
            axes.set_xlabel(f"modelled cpu time, {unit} (for comparing designs, not cycle accurate)")
            axes.set_title(_title(reports), loc="left", fontsize="medium")
            axes.spines[["top", "right"]].set_visible(False)
            if any(left):
                figure.legend(loc="outside right upper", frameon=False, fontsize="small")
            self._save(figure)

    def paint(self, draw: Callable[[Figure], None]) -> None:
        """What somebody else draws on a figure."""
        import matplotlib as mpl
        from matplotlib.figure import Figure

        with mpl.rc_context(_STYLE):
            figure = Figure(figsize=(9, 6), layout="constrained")
            draw(figure)
            self._save(figure)

    def _save(self, figure: Figure) -> None:
        drawn = io.BytesIO()
        figure.savefig(drawn, format=self._format, metadata=_METADATA[self._format], dpi=150)
        self._out.put(drawn.getvalue())
        self._drawn = True


_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "cvmcore", "font.family": "sans-serif"}
"""Text stays text, and no number of an element depends on chance."""
_METADATA: dict[str, dict[str, None]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}


def chosen(reports: Sequence[Report]) -> list[str]:
    """The price items that get a colour: those with the longest piece of any bar, longest first."""
    longest: dict[str, float] = {}
    for report in reports:
        for name, ns in report.parts_ns.items():
            longest[name] = max(longest.get(name, 0), ns)
    ranked = sorted(longest, key=lambda name: (-longest[name], name))
    return [name for name in ranked[: len(COLOURS)] if longest[name]]


def _part(report: Report, name: str, parts: list[str]) -> float:
    """ns of a part; "": of all that have no colour."""
    if name:
        return report.parts_ns.get(name, 0)
    return sum(ns for other, ns in report.parts_ns.items() if other not in parts)


def _unit(ns: float) -> tuple[str, float]:
    return next(((unit, size) for unit, size in UNITS if ns >= 10 * size), UNITS[-1])


def _title(reports: Sequence[Report]) -> str:
    if not reports:
        return ""
    first = reports[0]
    what = " ".join([first.workload, *(f"{name}={value}" for name, value in first.workload_options.items())])
    vcpus = f"{first.vcpus} vCPU" + ("s" if first.vcpus > 1 else "")
    return f"{what}: {first.mem_bytes / (1 << 20):,.4g} MiB, {vcpus}, backing {first.backing}"
