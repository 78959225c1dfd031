"""`cvm explain`: the life of one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cvmcore.cli.arguments import (
    AsJson,
    BackendOptions,
    Backing,
    File,
    Kernel,
    Mem,
    Policies,
    Profiles,
    Seed,
    Vcpus,
    WorkloadOptions,
    parse_page,
    parse_pairs,
    parse_profiles,
)
from cvmcore.cli.output import WRONG, complain, dump, say, table
from cvmcore.cli.running import run_one, setup_of
from cvmcore.errors import InputError

if TYPE_CHECKING:
    from cvmcore.explain import Explain
    from cvmcore.runner import Report


def explain(
    workload: Annotated[str | None, typer.Argument(metavar="WORKLOAD", help="As for `cvm run`.")] = None,
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
    """Show the life of one page in a run.

    Who did what to it, when, at what cost, from which state to which.
    """
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
        from cvmcore.types import PAGE_BYTES

        name = backend or "swprot"
        prices = parse_profiles(profile, [name]).get(name)
        setup = setup_of(mem, vcpus, backing, kernel, prices, seed, parse_pairs(policy, "-p"))
        options, work = parse_pairs(option, "-o"), parse_pairs(workload_option, "-w")
        chosen = load_workload(workload)
        end = (chosen.mem_bytes(file) if setup.mem_bytes is None else setup.mem_bytes) // PAGE_BYTES
        if page.get("gfn", 0) >= end > 0:
            raise InputError(f"--gfn {gfn} is beyond the guest's memory, which ends at gfn {end:#x}")
        lives = [Explain(**page)]
        report = run_one(chosen, load_backend(name), setup, options, work, file, lives[0])
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
        dump(to_json(lives, source, skipped))
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
            steps = table(TITLES, table_of(life), fold=False)
            say(Group(Text(title, style="bold"), steps, *map(Text, life.remarks())))
