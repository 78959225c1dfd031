"""`cvm run`, `cvm compare`: a workload on one backend, or on several side by side."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cvmcore import __version__
from cvmcore.cli.arguments import (
    AsJson,
    BackendOptions,
    Backing,
    File,
    Kernel,
    Mem,
    Name,
    Policies,
    Profiles,
    Seed,
    TraceFile,
    Vcpus,
    WorkloadOptions,
    parse_backends,
    parse_pairs,
    parse_profiles,
    parse_size,
)
from cvmcore.cli.output import BAD_INPUT, WRONG, complain, say, say_json
from cvmcore.errors import CvmError, InputError, PluginError

if TYPE_CHECKING:
    from cvmcore.backend import Backend
    from cvmcore.explain import Explain
    from cvmcore.plot import Plot
    from cvmcore.runner import Report, Setup
    from cvmcore.timeline import Timeline
    from cvmcore.tracer import Tracer
    from cvmcore.workloads import Workload


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
    setup = setup_of(mem, vcpus, backing, kernel, profiles.get(backend), seed, parse_pairs(policy, "-p"))
    options, work = parse_pairs(option, "-o"), parse_pairs(workload_option, "-w")
    chosen = load_workload(workload)
    with tracing(trace, workload, [backend]) as tracer:
        report = run_one(chosen, load_backend(backend), setup, options, work, file, tracer)
    return finish([report], as_json, top=0)


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
    """Run a workload on several backends, side by side."""
    import gc

    import attrs

    from cvmcore.backend import GROUP
    from cvmcore.plugins import installed, load_backend
    from cvmcore.progress import Bar
    from cvmcore.runner import load_workload

    setup = setup_of(mem, vcpus, backing, kernel, None, seed, parse_pairs(policy, "-p"))
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
    with plotting(plot) as picture, tracing(trace, workload, [one.name for one in found]) as tracer:
        for one in found:
            own = {name: value for name, value in options.items() if name in {o.name for o in one.options}}
            try:
                reports.append(
                    run_one(chosen, one, attrs.evolve(setup, profile=profiles.get(one.name)), own, work, file, tracer)
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
    code = finish(reports, as_json, top=5) if reports else 0
    for failure in failures:
        complain(failure)
    return BAD_INPUT if failures else code


def setup_of(
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


def run_one(
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


def tracing(path: Path | None, workload: str, names: list[str]) -> AbstractContextManager[Tracer | Timeline | None]:
    if path is None:
        return nullcontext()
    header = {"cvmcore": __version__, "workload": workload, "backends": names}
    if path.suffix.lower() in (".pftrace", ".json"):
        from cvmcore.timeline import Timeline

        return Timeline(path, header)
    from cvmcore.tracer import Tracer

    return Tracer(path, header)


def plotting(path: Path | None) -> AbstractContextManager[Plot | None]:
    if path is None:
        return nullcontext()
    from cvmcore.plot import Plot
    from cvmcore.progress import Bar

    with Bar("plot"):  # the first time, matplotlib looks for fonts
        return Plot(path)


def finish(reports: list[Report], as_json: bool, top: int) -> int:
    from cvmcore.report import shown, to_json

    if as_json:
        say_json(to_json(reports))
    else:
        say(shown(reports, top=top))
    return 0 if all(report.ok for report in reports) else WRONG
