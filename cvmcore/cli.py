"""The command `cvm`. Everything heavy is imported inside the commands, so that `cvm --help` answers at once.

A `CvmError` becomes one sentence on standard error and exit code 2; 1 says that a run found something wrong.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cvmcore import __version__
from cvmcore.errors import CvmError, InputError, PluginError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from cvmcore.backend import Backend
    from cvmcore.explain import Explain
    from cvmcore.plot import Plot
    from cvmcore.runner import Report, Setup
    from cvmcore.study import Outcome, Study
    from cvmcore.timeline import Timeline
    from cvmcore.tracer import Tracer
    from cvmcore.workloads import Workload

WRONG, BAD_INPUT, INTERRUPTED = 1, 2, 130
PIPED_WIDTH = 140
_CLICK_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
"""Base of all that the command line parser complains about (click's, or typer's own copy of it)."""
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}

app = typer.Typer(
    name="cvm",
    help="cvmcore: how KVM manages the memory of confidential VMs, run as a model on every backend side by side.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="cvm", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except CvmError as error:
        complain(error)
        return BAD_INPUT
    except _CLICK_ERROR as error:
        message = error.format_message()  # type: ignore[attr-defined]
        complain(message.rstrip("."))
        return BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read has gone; whatever is still buffered must not raise once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return WRONG


def complain(what: object) -> None:
    """One sentence on standard error."""
    typer.echo(f"cvm: {' '.join(str(what).split())}", err=True)


def say(what: RenderableType) -> None:
    """Print to standard output. No figure is ever cut: a line may rather be longer than the terminal is wide."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_WIDTH
    least = Measurement.get(console, console.options.update(max_width=10_000), what).minimum
    console.width = max(console.width, least + 1)  # rich counts a table without edges one too short
    console.print(what)


def say_json(text: str) -> None:
    """Print JSON to standard output."""
    typer.echo(text)


# ---- arguments ------------------------------------------------------------------------------------------------


def parse_size(text: str, what: str) -> int:
    """Bytes of a size such as 64G (units K, M, G, T: powers of 1024). Raises InputError."""
    match = re.fullmatch(r"(\d{1,15})([KMGT]?)", text)
    if match is None:
        raise InputError(f"{what} '{text}' is no size: give a whole number and K, M, G or T, as in 64G")
    return int(match[1]) << _UNITS[match[2]]


def parse_page(text: str, what: str) -> int:
    """The number of a page, decimal or with 0x. Raises InputError."""
    from cvmcore.explain import MAX_GFN

    match = re.fullmatch(r"(\d{1,20})|0[xX]([0-9a-fA-F]{1,16})", text, re.ASCII)
    page = MAX_GFN if match is None else int(match[1] or match[2], 10 if match[1] else 16)
    if page >= MAX_GFN:
        raise InputError(f"{what} '{text}' is no page number: give 4096 or 0x1000, below 2**52")
    return page


def parse_pairs(texts: list[str], flag: str) -> dict[str, str]:
    """`name=value` options as a dict. Raises InputError."""
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"{flag} '{text}' is not name=value")
        pairs[name] = value
    return pairs


def parse_backends(text: str) -> list[str]:
    """The names of `--backends a,b,c`, each once. Raises InputError where there is none."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise InputError(f"--backends '{text}' names no backend")
    return names


def parse_profiles(texts: list[str], backends: Sequence[str]) -> dict[str, Path]:
    """The profile file of each backend, from `FILE` (for all of them) and `BACKEND=FILE`."""
    files: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if equals and name in backends:
            files[name] = Path(path)
        else:
            files |= {backend: Path(text) for backend in backends if backend not in files}
    return files


Name = Annotated[str, typer.Argument(metavar="WORKLOAD", help="boot, touch, convert, ...: see `cvm workloads`.")]
File = Annotated[str | None, typer.Argument(metavar="[FILE]", help="What the workload reads; - is standard input.")]
BackendOptions = Annotated[
    list[str], typer.Option("-o", "--option", metavar="NAME=VALUE", help="A backend's option; may be repeated.")
]
WorkloadOptions = Annotated[
    list[str],
    typer.Option("-w", "--workload-option", metavar="NAME=VALUE", help="A workload's option; may be repeated."),
]
Policies = Annotated[
    list[str],
    typer.Option("-p", "--policy", metavar="NAME=VALUE", help="A choice of the core itself; see docs/design.md."),
]
Mem = Annotated[str | None, typer.Option("--mem", metavar="SIZE", help="Guest memory, as 64G (K, M, G, T).")]
Vcpus = Annotated[int, typer.Option("--vcpus", metavar="N", help="How many vCPUs.")]
Backing = Annotated[str, typer.Option("--backing", metavar="4k|2m", help="Largest pages that back memory.")]
Kernel = Annotated[str, typer.Option("--kernel", metavar="6.18|7.x", help="Whose errno, where kernels differ.")]
Profiles = Annotated[
    list[str],
    typer.Option("--profile", metavar="[BACKEND=]FILE", help="Prices in place of a backend's own; may be repeated."),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Of everything that happens by chance.", min=0)]
AsJson = Annotated[bool, typer.Option("--json", help="JSON in place of a table.")]
TraceFile = Annotated[
    Path | None,
    typer.Option("--trace", metavar="OUT", help="Write what happened: .pftrace or .json a timeline, else all events."),
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"cvm {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """cvmcore: how KVM manages the memory of confidential VMs, run as a model on every backend side by side."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


# ---- what is installed ----------------------------------------------------------------------------------------


@app.command()
def backends(as_json: AsJson = False) -> None:
    """List the installed backends; imports none of them."""
    from cvmcore.backend import GROUP
    from cvmcore.plugins import installed

    found = installed(GROUP).values()
    if as_json:
        keys = ("name", "distribution", "version", "summary")
        _dump({"backends": [{key: getattr(one, key) for key in keys} for one in found]})
    else:
        rows = [(one.name, one.distribution, one.version, one.summary) for one in found]
        say(_table(("backend", "distribution", "version", "what the distribution brings"), rows))


@app.command()
def workloads(
    name: Annotated[str | None, typer.Argument(metavar="[WORKLOAD]", help="Show one, with its options.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the installed workloads, or show one with its options."""
    from cvmcore.plugins import installed
    from cvmcore.runner import load_workload
    from cvmcore.workloads import GROUP

    found: list[Workload] = []
    bad: list[PluginError] = []
    for one in installed(GROUP) if name is None else [name]:
        try:
            found.append(load_workload(one))
        except PluginError as error:
            if name is not None:
                raise
            bad.append(error)
    if as_json:
        _dump({"workloads": [{"name": w.name, "summary": w.summary, "options": _option_rows(w)} for w in found]})
    elif name is None:
        say(_table(("workload", "what it does", "options"), [
            (w.name, w.summary, ", ".join(option.name for option in w.options)) for w in found
        ]))
    else:
        say(_described(found[0].name, found[0].summary, found[0]))
    for reason in bad:
        complain(reason)


@app.command()
def hooks(
    backend: Annotated[str | None, typer.Argument(metavar="[BACKEND]", help="Show one backend.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the hooks of the contract, and which backend implements which."""
    from cvmcore.ops import implementations
    from cvmcore.plugins import load_all_backends, load_backend

    if backend is not None:
        found, bad = {backend: load_backend(backend)}, dict[str, str]()
    else:
        found, bad = load_all_backends()
    implemented: dict[str, set[str]] = {}
    for name, one in found.items():
        try:
            implemented[name] = {hook for hook, _, _ in implementations(one.make(), name)}
        except PluginError as error:
            if backend is not None:
                raise
            bad[name] = str(error)
    _show_hooks(implemented, found[backend] if backend is not None else None, as_json)
    for reason in bad.values():
        complain(reason)


def _show_hooks(implemented: dict[str, set[str]], one: Backend | None, as_json: bool) -> None:
    from cvmcore.hookspecs import API_VERSION, HOOKS

    if as_json:
        rows = [
            {
                "name": hook.name, "kind": hook.kind, "locks": hook.locks, "upstream": hook.upstream,
                "implemented_by": [name for name, has in implemented.items() if hook.name in has],
            }
            for hook in HOOKS.values()
        ]  # fmt: skip
        _dump({"api_version": API_VERSION, "backends": list(implemented), "hooks": rows})
        return
    from rich.console import Group

    titles = ("hook", *(implemented if one is None else ()), "kind", "locks held", "upstream")
    marks = {hook: ["x" if hook in has else "" for has in implemented.values()] for hook in HOOKS}
    made = _table(titles, [
        (h.name, *(marks[h.name] if one is None else ()), h.kind, h.locks, h.upstream)
        for h in HOOKS.values() if one is None or h.name in implemented[one.name]
    ])  # fmt: skip
    if one is None:
        say(made)
    else:
        has = f"{len(implemented[one.name])} of {len(HOOKS)} hooks, version {one.api_version} of the contract"
        say(Group(_described(one.name, f"{one.summary} ({has})", one), "", made))


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, fold: bool = True) -> Table:
    """Plain columns with titles; all but the first are folded where the terminal is narrow, or none."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    rows = list(rows)
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for number, title in enumerate(titles):
        width = max((len(row[number]) for row in rows), default=0)
        made.add_column(title, min_width=width if number == 0 or not fold else None, overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def _option_rows(owner: Backend | Workload | Study) -> list[dict[str, Any]]:
    return [
        {"name": o.name, "default": o.default, "choices": list(o.choices), "help": o.help} for o in owner.options
    ]


def _described(name: str, summary: str, owner: Backend | Workload) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("option", "default", "values", "meaning"):
        made.add_column(title)
    for option in owner.options:
        values = " | ".join(option.choices) or ("text" if isinstance(option.default, str) else "number")
        made.add_row(option.name, str(option.default), values, option.help)
    return Group(Text(f"{name}: {summary}", style="bold"), made if owner.options else Text("It has no options."))


def _dump(value: object) -> None:
    import json

    say_json(json.dumps(value, indent=2))


# ---- running --------------------------------------------------------------------------------------------------


@app.command()
def run(
    workload: Name,
    file: File = None,
    backend: Annotated[str, typer.Option("--backend", metavar="NAME", help="See `cvm backends`.")] = "swprot",
    option: BackendOptions = [],  # noqa: B006 - typer reads it, nobody writes it
    workload_option: WorkloadOptions = [],  # noqa: B006
    policy: Policies = [],  # noqa: B006
    mem: Mem = None,
    vcpus: Vcpus = 1,
    backing: Backing = "4k",
    kernel: Kernel = "6.18",
    profile: Profiles = [],  # noqa: B006
    seed: Seed = 0,
    as_json: AsJson = False,
    trace: TraceFile = None,
) -> int:
    """Run a workload on one backend."""
    from cvmcore.plugins import load_backend
    from cvmcore.runner import load_workload

    profiles = parse_profiles(profile, [backend])
    setup = _setup(mem, vcpus, backing, kernel, profiles.get(backend), seed, parse_pairs(policy, "-p"))
    options, work = parse_pairs(option, "-o"), parse_pairs(workload_option, "-w")
    chosen = load_workload(workload)
    with _tracing(trace, workload, [backend]) as tracer:
        report = _run_one(chosen, load_backend(backend), setup, options, work, file, tracer)
    return _finish([report], as_json, top=0)


@app.command()
def compare(
    workload: Name,
    file: File = None,
    backends: Annotated[
        str | None, typer.Option("--backends", metavar="A,B,C", help="Which, in this order; else all installed ones.")
    ] = None,
    option: BackendOptions = [],  # noqa: B006
    workload_option: WorkloadOptions = [],  # noqa: B006
    policy: Policies = [],  # noqa: B006
    mem: Mem = None,
    vcpus: Vcpus = 1,
    backing: Backing = "4k",
    kernel: Kernel = "6.18",
    profile: Profiles = [],  # noqa: B006
    seed: Seed = 0,
    as_json: AsJson = False,
    trace: TraceFile = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="OUT", help="Draw where the time goes: .svg, .png or .pdf.")
    ] = None,
) -> int:
    """Run a workload on several backends and show them side by side."""
    import gc

    import attrs

    from cvmcore.backend import GROUP
    from cvmcore.plugins import installed, load_backend
    from cvmcore.progress import Bar
    from cvmcore.runner import load_workload

    setup = _setup(mem, vcpus, backing, kernel, None, seed, parse_pairs(policy, "-p"))
    options, work = parse_pairs(option, "-o"), parse_pairs(workload_option, "-w")
    chosen = load_workload(workload)
    names = list(installed(GROUP)) if backends is None else parse_backends(backends)
    if file == "-" and len(names) > 1:
        raise InputError("standard input can be read once, so it cannot be compared on several backends: give a file")

    profiles = parse_profiles(profile, names)

    # What a backend cannot do is its own affair, what the user asked for wrongly ends all of it before anything runs.
    found: list[Backend] = []
    failures: list[CvmError] = []
    for name in names:
        try:
            found.append(load_backend(name))
        except PluginError as error:
            failures.append(error)
    declared = {o.name for one in found for o in one.options}
    for name in options:
        if found and name not in declared:
            raise InputError(f"none of {', '.join(b.name for b in found)} has an option '{name}'")

    reports: list[Report] = []
    with _plotting(plot) as picture, _tracing(trace, workload, [one.name for one in found]) as tracer:
        for one in found:
            own = {name: value for name, value in options.items() if name in {o.name for o in one.options}}
            try:
                reports.append(
                    _run_one(chosen, one, attrs.evolve(setup, profile=profiles.get(one.name)), own, work, file, tracer)
                )
            except InputError:
                raise
            except PluginError as error:
                failures.append(error)
            except CvmError as error:
                failures.append(CvmError(f"{one.name} could not finish: {error}"))
            # A host and its VMs know each other: their arrays would stay until Python happens to look for cycles.
            gc.collect()
        if picture is not None and reports:
            with Bar("plot"):
                picture.draw(reports)
    code = _finish(reports, as_json, top=5) if reports else 0
    for failure in failures:
        complain(failure)
    return BAD_INPUT if failures else code


@app.command()
def study(
    name: Annotated[str | None, typer.Argument(metavar="[STUDY]", help="Which; without it, all are listed.")] = None,
    option: Annotated[
        list[str], typer.Option("-s", "--study-option", metavar="NAME=VALUE", help="A study's option; may be repeated.")
    ] = [],  # noqa: B006
    uncertainty: Annotated[
        int, typer.Option("--uncertainty", metavar="N", help="Also at N draws of prices, as sure as they are.", min=0)
    ] = 0,
    seed: Seed = 0,
    as_json: AsJson = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="OUT", help="Draw the findings: .svg, .png or .pdf.")
    ] = None,
) -> None:
    """Answer a question about a design with numbers, or list the studies."""
    from cvmcore.progress import Bar
    from cvmcore.study import load_study
    from cvmcore.study import run as run_study

    if name is None:
        _list_studies(as_json)
        return
    chosen = load_study(name)
    if plot is not None and chosen.draw is None:
        raise InputError(f"study {name} draws nothing")
    with _plotting(plot) as picture:
        with Bar(name) as bar:
            outcome = run_study(chosen, parse_pairs(option, "-s"), draws=uncertainty, seed=seed, progress=bar)
        if picture is not None and chosen.draw is not None:
            draw = chosen.draw
            picture.paint(lambda figure: draw(outcome.findings, figure))
    _show_study(chosen, outcome, as_json)


def _list_studies(as_json: bool) -> None:
    from cvmcore.plugins import installed
    from cvmcore.study import GROUP, load_study

    found: list[Study] = []
    bad: list[PluginError] = []
    for one in installed(GROUP):
        try:
            found.append(load_study(one))
        except PluginError as error:
            bad.append(error)
    if as_json:
        _dump({"studies": [{"name": s.name, "question": s.question, "source": s.source, "options": _option_rows(s)}
                           for s in found]})  # fmt: skip
    else:
        say(_table(("study", "question", "options"), [
            (s.name, s.question, ", ".join(option.name for option in s.options)) for s in found
        ]))
    for reason in bad:
        complain(reason)


def _show_study(chosen: Study, outcome: Outcome, as_json: bool) -> None:
    findings = outcome.findings
    if as_json:
        _dump({
            "study": chosen.name, "question": chosen.question, "source": chosen.source,
            "rows": [row | ({"flips": outcome.row_flips[i]} if outcome.row_flips else {})
                     for i, row in enumerate(findings.rows)],
            "calibrated": findings.calibrated, "predicted": findings.predicted, "notes": findings.notes,
            "conclusion": findings.conclusion, "verdict": str(findings.verdict), "draws": outcome.draws,
            "flips": outcome.flips, "other_verdicts": {str(v): n for v, n in outcome.others.items()},
        })
        return
    from rich.console import Group
    from rich.text import Text

    columns = chosen.columns
    titles = [f"{c.title}, {c.unit}" if c.unit else c.title for c in columns]
    rows = [[_figure(row.get(c.name), c.digits) for c in columns] for row in findings.rows]
    if outcome.row_flips:
        titles.append(f"flips of {outcome.draws}")
        rows = [[*row, str(n)] for row, n in zip(rows, outcome.row_flips, strict=True)]
    told = [f"calibrated: {text}" for text in findings.calibrated]
    told += [f"predicted: {text}" for text in findings.predicted]
    told += [*findings.notes, "", findings.conclusion]
    if outcome.draws:
        told.append(f"prices drawn within their confidence {outcome.draws} times: other verdicts in {outcome.flips}")
        told += [f"  {n} x {verdict}" for verdict, n in outcome.others.items()]
    heading = Text(f"{chosen.name}: {chosen.question}", style="bold")
    made = _table(titles, rows)
    for number, column in enumerate(made.columns):
        column.min_width = max(len(titles[number]), *(len(row[number]) for row in rows))
    say(Group(heading, Text(f"source: {chosen.source}"), "", made, "", *map(Text, told)))


def _figure(value: Any, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:,.{digits}f}" if isinstance(value, float) else str(value)


@app.command()
def hw(
    name: Annotated[str, typer.Argument(metavar="BACKEND", help="Whose hardware.")],
    script: Annotated[
        str | None, typer.Argument(metavar="[SCRIPT]", help="JSON lines; - is standard input; without: what there is.")
    ] = None,
) -> None:
    """Drive trusted hardware by itself: one operation a line, one answer a line."""
    import json

    from cvmcore.hwscript import load_hardware
    from cvmcore.script import described, play

    operations = load_hardware(name)
    if script is None:
        say(_table(("operation", "arguments", "what it does"), described(operations)))
        return
    with _reading(script) as lines:
        for answer in play(operations, lines, "standard input" if script == "-" else script):
            typer.echo(json.dumps(answer))


@app.command()
def uapi(
    script: Annotated[
        str | None, typer.Argument(metavar="[SCRIPT]", help="JSON lines; - is standard input; without: what there is.")
    ] = None,
    backend: Annotated[str, typer.Option("--backend", metavar="NAME", help="See `cvm backends`.")] = "default",
    option: BackendOptions = [],  # noqa: B006
    policy: Policies = [],  # noqa: B006
    backing: Backing = "4k",
    kernel: Kernel = "6.18",
    state: Annotated[
        bool, typer.Option("--state", help="Behind each call, what stands in the guest_memfd files.")
    ] = False,
) -> None:
    """Do what a VMM and its guest do, one call a line, one answer a line (docs/live.md)."""
    import json

    from cvmcore.modelfront import model_front
    from cvmcore.script import described
    from cvmcore.uapiscript import Script

    options, policies = parse_pairs(option, "-o"), parse_pairs(policy, "-p")
    front = model_front(backend, kernel=kernel, backing=backing, options=options, policies=policies)
    play = Script(front)
    if script is None:
        say(_table(("operation", "arguments", "what it does"), described(play.operations)))
        return
    with _reading(script) as lines:
        for answer in play.play(lines, "standard input" if script == "-" else script):
            typer.echo(json.dumps(answer | {"state": play.state()} if state else answer))
    front.close()


def _reading(path: str) -> AbstractContextManager[Iterable[str]]:
    """A text file, or standard input."""
    if path == "-":
        return nullcontext(sys.stdin)
    try:
        return open(path, encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


@app.command()
def explain(
    workload: Annotated[str | None, typer.Argument(metavar="[WORKLOAD]", help="As for `cvm run`.")] = None,
    file: File = None,
    gfn: Annotated[
        str | None, typer.Option("--gfn", metavar="N", help="Which page of the guest: 4096 or 0x1000.")
    ] = None,
    pfn: Annotated[str | None, typer.Option("--pfn", metavar="N", help="Or which frame of the host.")] = None,
    log: Annotated[
        Path | None, typer.Option("--from", metavar="LOG.jsonl", help="Of a run that --trace wrote down.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option("--backend", metavar="NAME", help="See `cvm backends`; swprot, or those of the log.")
    ] = None,
    option: BackendOptions = [],  # noqa: B006
    workload_option: WorkloadOptions = [],  # noqa: B006
    policy: Policies = [],  # noqa: B006
    mem: Mem = None,
    vcpus: Vcpus = 1,
    backing: Backing = "4k",
    kernel: Kernel = "6.18",
    profile: Profiles = [],  # noqa: B006
    seed: Seed = 0,
    as_json: AsJson = False,
) -> int:
    """Show the life of one page in a run: who did what, when, at what cost, from which state to which."""
    from cvmcore.explain import Explain, read_log

    if (gfn is None) == (pfn is None):
        raise InputError("give either --gfn or --pfn")
    if (workload is None) == (log is None):
        raise InputError("give either a workload to run, or a log to read with --from")
    page = {"gfn": parse_page(gfn, "--gfn")} if gfn is not None else {"pfn": parse_page(pfn or "", "--pfn")}
    report = None
    if workload is not None:
        from cvmcore.plugins import load_backend
        from cvmcore.runner import load_workload

        name = backend or "swprot"
        prices = parse_profiles(profile, [name]).get(name)
        setup = _setup(mem, vcpus, backing, kernel, prices, seed, parse_pairs(policy, "-p"))
        options, work = parse_pairs(option, "-o"), parse_pairs(workload_option, "-w")
        lives = [Explain(**page)]
        report = _run_one(load_workload(workload), load_backend(name), setup, options, work, file, lives[0])
        source = workload
    else:
        from cvmcore.progress import Bar

        assert log is not None
        with Bar(log.name) as bar:
            lives = read_log(log, lambda: Explain(**page), bar)
        if not lives:
            raise InputError(f"{log}: has no run in it")
        if backend is not None and not (lives := [life for life in lives if life.backend == backend]):
            raise InputError(f"{log}: has no run on {backend}")
        source = str(log)
    _show_lives(lives, source, report, as_json)
    if report is None or report.ok:
        return 0
    for sentence in [*report.wrong, *report.readable, *report.left]:
        complain(f"{report.backend}: {sentence}")
    return WRONG


def _show_lives(lives: Sequence[Explain], source: str, report: Report | None, as_json: bool) -> None:
    from cvmcore.explain import TITLES, table_of, to_json

    skipped = report.skipped if report is not None else ""
    if as_json:
        _dump(to_json(lives, source, skipped))
        return
    from rich.console import Group
    from rich.text import Text

    for life in lives:
        title = f"{life.page} in {source} on {life.backend}"
        if skipped:
            say(Text(f"{title}: skipped, {skipped}"))
        elif not life.touched:
            say(Text(f"{title}: nothing ever touches it"))
        else:
            steps = _table(TITLES, table_of(life), fold=False)
            say(Group(Text(title, style="bold"), steps, *map(Text, life.remarks())))


def _setup(
    mem: str | None,
    vcpus: int,
    backing: str,
    kernel: str,
    profile: Path | None,
    seed: int,
    policies: dict[str, str] | None = None,
) -> Setup:
    from cvmcore.runner import Setup

    mem_bytes = None if mem is None else parse_size(mem, "--mem")
    return Setup(mem_bytes, vcpus, backing, kernel, profile, seed, policies or {})


def _run_one(
    workload: Workload,
    backend: Backend,
    setup: Setup,
    options: dict[str, str],
    work: dict[str, str],
    file: str | None,
    tracer: Tracer | Timeline | Explain | None,
) -> Report:
    from cvmcore.progress import Bar
    from cvmcore.runner import run as run_workload

    with Bar(backend.name) as bar:
        report = run_workload(
            workload, backend, setup, backend_options=options, workload_options=work, file=file,
            observers=[] if tracer is None else [tracer], progress=bar,
        )  # fmt: skip
    report.notes += [] if tracer is None else tracer.remarks()
    return report


def _tracing(path: Path | None, workload: str, names: list[str]) -> AbstractContextManager[Tracer | Timeline | None]:
    if path is None:
        return nullcontext()
    header = {"cvmcore": __version__, "workload": workload, "backends": names}
    if path.suffix.lower() in (".pftrace", ".json"):
        from cvmcore.timeline import Timeline

        return Timeline(path, header)
    from cvmcore.tracer import Tracer

    return Tracer(path, header)


def _plotting(path: Path | None) -> AbstractContextManager[Plot | None]:
    if path is None:
        return nullcontext()
    from cvmcore.plot import Plot
    from cvmcore.progress import Bar

    with Bar("plot"):  # the first time, matplotlib looks for fonts
        return Plot(path)


def _finish(reports: list[Report], as_json: bool, top: int) -> int:
    from cvmcore.report import shown, to_json

    if as_json:
        say_json(to_json(reports))
    else:
        say(shown(reports, top=top))
    return 0 if all(report.ok for report in reports) else WRONG


# ---- measuring the model itself -------------------------------------------------------------------------------


@app.command()
def bench(
    rows: Annotated[list[str] | None, typer.Argument(metavar="[ROW...]", help="Some rows only, as random_ns.")] = None,
    backends: Annotated[
        str | None, typer.Option("--backends", metavar="A,B,C", help="Which, in this order; else all installed ones.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller guests, fewer rounds.")] = False,
    check: Annotated[
        Path | None, typer.Option("--check", metavar="FILE", help="Compare with recorded ratios; 1: got slower.")
    ] = None,
    record: Annotated[Path | None, typer.Option("--record", metavar="FILE", help="Record the ratios there.")] = None,
    as_json: AsJson = False,
) -> int:
    """Measure the model: what a fault, a page and a guest cost here, beside the least that numpy could pay."""
    from cvmcore import bench as bench_
    from cvmcore.backend import GROUP
    from cvmcore.plugins import installed
    from cvmcore.progress import Bar

    size = bench_.QUICK if quick else bench_.FULL
    old = bench_.recorded(check, size) if check is not None else {}
    names = list(installed(GROUP)) if backends is None else parse_backends(backends)
    with Bar("bench") as bar:
        results = bench_.measure(rows or list(bench_.ROWS), names, size, bar)
        slower = bench_.check(results, old, lambda row, name: bench_.measure([row], [name], size, bar)[0])
    if record is not None:
        bench_.record(record, results, size)
    if as_json:
        _dump(bench_.to_json(results, size))
    else:
        titles, cells = bench_.table(results)
        say(_table(titles, cells))
    for sentence in slower:
        complain(sentence)
    return WRONG if slower else 0


if __name__ == "__main__":
    sys.exit(main())
