"""`cvm uapi`, `diff-fuzz`, `calibrate`, `record`, `from-strace`: the calls of a VMM and its guest on the model, on this
machine's kernel, or on both; what they cost there, and what real ones did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cvmcore.cli.arguments import AsJson, BackendOptions, Backing, Kernel, Policies, Seed, parse_pairs, whole
from cvmcore.cli.output import WRONG, complain, dump, say, say_json, table
from cvmcore.cli.scripts import Listing, reading, show_operations
from cvmcore.errors import InputError, InvariantViolation

if TYPE_CHECKING:
    from cvmcore.difference import Step
    from cvmcore.uapiscript import Script


def uapi(
    script: Annotated[
        str | None, typer.Argument(metavar="[SCRIPT]", help="JSON lines; - is standard input; without: what there is.")
    ] = None,
    backend: Annotated[str, typer.Option("--backend", metavar="NAME", help="See `cvm backends`.")] = "default",
    live: Annotated[bool, typer.Option("--live", help="On this machine's /dev/kvm in place of the model.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="On both, compared step by step.")] = False,
    recorded: Annotated[
        bool, typer.Option("--recorded", help="On the model, compared with the answers that the script's lines have.")
    ] = False,
    record: Annotated[
        Path | None, typer.Option("--record", metavar="OUT", help="With --live or --diff: the script with its answers.")
    ] = None,
    option: BackendOptions = [],  # noqa: B006
    policy: Policies = [],  # noqa: B006
    backing: Backing = "4k",
    kernel: Kernel = "6.18",
    state: Annotated[
        bool, typer.Option("--state", help="Behind each call, what stands in the guest_memfd files.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="On the model: look at all invariants after each call.")
    ] = False,
    as_json: Listing = False,
) -> int:
    """Do what a VMM and its guest do, line by line.

    One call a line, one answer a line, on the model, on this machine's kernel, or on both (docs/live.md). Without a
    script: the calls; with --live and none: what this machine's KVM has.
    """
    import json

    from cvmcore.difference import against, beside
    from cvmcore.modelfront import model_front
    from cvmcore.uapiscript import Script

    if live + diff + recorded > 1:
        raise InputError("--live, --diff and --recorded exclude each other")
    if record is not None and not (live or diff):
        raise InputError("--record writes what a kernel answered: it needs --live or --diff")
    options, policies = parse_pairs(option, "-o"), parse_pairs(policy, "-p")
    name = "standard input" if script in (None, "-") else str(script)

    def model() -> Script:
        chosen = {**_kernel_options(backend), **options} if diff else options
        front = model_front(backend, kernel=kernel, backing=backing, options=chosen, policies=policies)
        if check:
            from cvmcore.testing.invariants import Checker

            Checker.on(front.host)
        return Script(front)

    if script is None:
        if live or diff or recorded:
            _show_kernel(as_json)
        else:
            show_operations(model().operations, as_json)
        return 0
    with reading(script) as lines, _live_script(backend if live or diff else None) as real, _writing(record) as out:
        if not (live or diff or recorded):
            real = model()
        if diff or recorded:
            steps = beside(model(), real, lines, name) if real else against(model(), lines, name)
            return _compare(steps, out)
        assert real is not None
        try:
            for answer, line in real.play_recording(lines, name, states=state or out is not None):
                if out is not None:
                    out(line)
                if not state:
                    answer.pop("state", None)
                say_json(json.dumps(answer))
            real.front.close()
        except InvariantViolation as error:
            complain(str(error).partition("\n")[0])
            return WRONG
    return 0


def diff_fuzz(
    steps: Annotated[
        int, typer.Option("--steps", metavar="N", help="Calls to compare.", parser=whole("--steps", 1))
    ] = 5000,
    seed: Seed = 1,
    backend: Annotated[str, typer.Option("--backend", metavar="NAME", help="See `cvm backends`.")] = "default",
    record: Annotated[
        Path | None, typer.Option("--record", metavar="OUT", help="All calls with the kernel's answers.")
    ] = None,
    kernel: Kernel = "6.18",
    as_json: AsJson = False,
) -> int:
    """Compare the model and /dev/kvm by made-up calls.

    Right ones and wrong ones; what differs is made short.
    """
    import json

    try:
        from cvmcore.testing.fuzz import diff_fuzz
    except ImportError as error:
        raise InputError(f"diff-fuzz needs {error.name or 'hypothesis'}: pip install 'cvmcore[test]'") from None
    from cvmcore.progress import Bar

    options = _kernel_options(backend)
    with _live_script(backend) as real, _writing(record) as out, Bar("comparing") as bar:
        assert real is not None
        outcome = diff_fuzz(
            real.front, steps, seed, backend=backend, options=options, version=kernel,
            told=lambda outcome: bar(min(outcome.steps, steps), steps, f"{outcome.cases} cases"),
            record=out or (lambda line: None),
        )  # fmt: skip
    if as_json:
        say_json(json.dumps({
            "steps": outcome.steps, "cases": outcome.cases, "quirks": dict(outcome.quirks),
            "statuses": dict(sorted(outcome.statuses.items())), "script": outcome.script, "why": outcome.why,
        }, indent=1))  # fmt: skip
    elif outcome.script:
        for line in outcome.script:
            say_json(json.dumps(line))
        say_json(outcome.why)
    else:
        known = sum(outcome.quirks.values())
        say_json(f"{outcome.steps} calls in {outcome.cases} cases, {known} known quirks, no other difference")
    return WRONG if outcome.script else 0


def calibrate(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="The profile to write.")],
    live: Annotated[bool, typer.Option("--live", help="Measure this machine's /dev/kvm.")] = False,
    backend: Annotated[
        str, typer.Option("--backend", metavar="NAME", help="Whose prices it extends; see `cvm backends`.")
    ] = "default",
    times: Annotated[
        int, typer.Option("--times", metavar="N", help="Samples of each.", parser=whole("--times", 1, 1000))
    ] = 9,
) -> None:
    """Write a profile with this machine's own prices.

    Fault-in, punch, memslots and the guest's first touch are measured on /dev/kvm; all else is the backend's own.
    """
    from cvmcore.calibrate import calibrated, profile_text
    from cvmcore.live.front import Server
    from cvmcore.outfile import OutFile
    from cvmcore.plugins import load_backend

    if not live:
        raise InputError("calibrate measures a real kernel: say --live")
    chosen = load_backend(backend)
    if chosen.kvm_type != 0:
        raise InputError(f"calibrate measures VM type 0, which backend {backend} is not: take default")
    with Server() as server, OutFile(output) as out:
        prices = calibrated(server, chosen, times)
        out.put(profile_text(prices, backend))
    rows = [(price.item, f"{price.ns:,.0f}", price.confidence) for price in prices]
    say(table(("price", "ns", "confidence"), rows))


def record(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND", help="What to run, behind --.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="The trace to write.")],
    lackey: Annotated[
        bool, typer.Option("--lackey", help="Each access of the program, by valgrind, in place of a VM's faults.")
    ] = False,
) -> int:
    """Record a real VM, or a program, for `cvm run trace`.

    A VM's faults, exits and backing pages by KVM's tracepoints (as root), while the command runs and of it alone.
    """
    from cvmcore.record import record_program, record_vm

    done = record_program(command, output) if lackey else record_vm(command, output)
    if done.missing:
        complain(f"this kernel has no {', '.join(done.missing)}")
    if done.lost:
        complain(f"{done.lost} events were lost: the buffer was full")
    if done.status:
        complain(f"the command ended with {done.status}")
    say_json(f"{done.events} events in {output}; replay: cvm run trace {output}")
    return 0 if done.events else WRONG


def from_strace(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Output of strace; - is standard input.")],
) -> None:
    """Turn a VMM's calls, recorded by strace, into a script.

    For `cvm uapi SCRIPT --recorded`: what the kernel answered stands in each line. How to call strace: docs/live.md.
    """
    from cvmcore.strace import Importer

    found = Importer()
    with reading(file) as lines:
        for line in found.lines(lines, "standard input" if file == "-" else file):
            say_json(line)
    for request, n in found.skipped.items():
        complain(f"{n} calls of {request} were left out: this strace did not decode them (a newer one does)")
    if not found.calls:
        raise InputError(f"{file}: no call of KVM in it")


def _kernel_options(backend: str) -> dict[str, str]:
    """Options of the backend `default` that make it what this machine's kernel is."""
    from cvmcore.live.probe import probe

    return {"prefault": "no"} if backend == "default" and "PRE_FAULT_MEMORY" in probe().missing else {}


@contextmanager
def _live_script(backend: str | None) -> Iterator[Script | None]:
    """A script's front on this machine's kernel, with VMs of the backend's type; None where none is named."""
    if backend is None:
        yield None
        return
    from cvmcore.live.front import LiveFront, Server
    from cvmcore.plugins import load_backend
    from cvmcore.uapiscript import Script

    kvm_type = load_backend(backend).kvm_type
    if kvm_type is None:
        raise InputError(f"backend {backend} says no number for KVM_CREATE_VM (`kvm_type`): no VM of it on a kernel")
    with Server() as server:
        if kvm_type not in server.probe.vm_types:
            have = ", ".join(map(str, server.probe.vm_types))
            raise InputError(f"this machine's KVM has no VM type {kvm_type}, which {backend} is; it has {have}")
        yield Script(LiveFront(server, kvm_type))


def _show_kernel(as_json: bool) -> None:
    """What this machine's KVM has, and what is missing."""
    from cvmcore.live.probe import probe

    found = probe()
    if found.why:
        raise InputError(f"no live run: {found.why}")
    if as_json:
        dump({"capabilities": found.values, "missing": found.missing, "vm_types": found.vm_types})
        return
    rows = [(f"KVM_CAP_{name}", str(value), found.missing.get(name, "")) for name, value in found.values.items()]
    say(table(("capability", "value", "missing"), rows))


def _compare(steps: Iterable[Step], out: Callable[[str], None] | None) -> int:
    """Go through the steps up to the first difference that nothing explains."""
    from cvmcore.difference import explained
    from cvmcore.uapiscript import recorded

    calls, quirks = 0, 0
    for step in steps:
        calls += 1
        if out is not None:
            out(recorded(step.op, step.arguments, step.kernel))
        if step.differs and step.quirk is None:
            say_json(explained(step))
            return WRONG
        if step.quirk is not None:
            quirks += 1
            say_json(f"line {step.line}: known quirk {step.quirk.name}: {step.quirk.reason}")
            if step.quirk.ends:
                say_json("what follows cannot be compared: the two are in different states")
                break
    say_json(f"{calls} calls, {quirks} known quirks, no other difference")
    return 0


@contextmanager
def _writing(path: Path | None) -> Iterator[Callable[[str], None] | None]:
    """What takes the lines of a recording, or none. What was recorded stays, however the run ends."""
    if path is None:
        yield None
        return
    import platform

    @contextmanager
    def written() -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None

    def put(line: str) -> None:
        with written():
            out.write(line + "\n")

    with written():
        out = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed below, where what is wrong can be said
    try:
        put(f"# Recorded by `cvm uapi` on Linux {platform.release()}, {platform.machine()}.")
        yield put
    finally:
        with written():
            out.close()
