"""Runs the kit against wrong backends: bug, caught by, seconds. `make mutants`, or `tests/mutants/run.py WORD...`.

Each bug runs in a process of its own, in which the module is loaded with one place changed, and stops at the first
check that fails: the one that caught it before (caught.json, written with --record) first, then quick checks in all
settings, then those that fail on purpose, then random calls. Cells of the vendors' tables (states, checks, transitions)
are changed mechanically besides; a cell that the kit cannot reach through KVM is the business of the vendor's own tests
of its hardware, which are run then.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import attrs

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from bugs import BUGS, Bug  # noqa: E402
from cells import Cell, apply, load  # noqa: E402

import cvmcore.testing.machine  # noqa: E402, F401 - loaded once, before the fork
from cvmcore.testing.conformance import cases, run_check  # noqa: E402

TENTHS = 10
PATIENCE = 60
"""Seconds after which a check counts as hanging, and the bug as caught."""
QUIET = ("-x", "-q", "-p", "no:cacheprovider", "--no-header", "-W", "ignore::pytest.PytestAssertRewriteWarning")
"""pytest within a process that has loaded the kit already."""
RECORD = Path(__file__).parent / "caught.json"
"""What caught each bug and cell when the table was last recorded: the first to be tried, and nothing else."""
VENDOR = "vendor: "
"""Before the test that caught it: only the vendor's own tests of its hardware notice; the kit is not tried again."""
LATE = ("races", "failure.", "machine", "life.again", "life.many", "hooks.batch")
"""Checks that take longer: after all others, in this order of groups."""


@attrs.frozen
class Caught:
    """What came of one: by which check (empty: by none), why, in how many seconds."""

    name: str
    by: str
    why: str
    seconds: float


def mutated(module: str, old: str, new: str) -> None:
    """Load a module with one place of its source changed. Raises ValueError where the place is not there."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    if source.count(old) != 1:
        raise ValueError(f"{module}: {source.count(old)} places of {old[:60]!r}")
    made = importlib.util.module_from_spec(spec)
    sys.modules[module] = made
    exec(compile(source.replace(old, new), spec.origin, "exec"), made.__dict__)
    parent, _, child = module.rpartition(".")
    setattr(importlib.import_module(parent), child, made)


def order(backend: Any, likely: str) -> list[Any]:
    """All cases, the likely catcher and quick ones in all settings first."""

    def late(case: Any) -> int:
        check, setting = case
        if f"{check.name} [{setting}]" == likely:
            return -1
        return next((i + 1 for i, prefix in enumerate(LATE[::-1]) if check.name.startswith(prefix)), 0)

    return sorted(cases(backend), key=late)


def kit(name: str, likely: str = "", *, effort: int = 1) -> tuple[str, str]:
    """The first check that fails on a backend, with the reason; ("", "") where none does."""
    from cvmcore.plugins import load_backend

    try:
        backend = load_backend(name)
    except Exception as error:
        return "import", str(error)
    signal.signal(signal.SIGALRM, _hangs)
    for check, setting in order(backend, likely):
        signal.alarm(PATIENCE)
        outcome = run_check(check, backend, setting, effort=effort, shrink=False)
        signal.alarm(0)
        if outcome.status == "failed":
            return f"{check.name} [{setting}]", outcome.why
    return "", ""


def _hangs(number: int, frame: Any) -> None:
    raise TimeoutError("it hangs")


def try_bug(bug: Bug) -> Caught:
    """One wrong backend, in this process: it is of no more use afterwards."""
    start = time.perf_counter()
    mutated(bug.module, bug.old, bug.new)
    by, why = kit(bug.backend, recorded().get(bug.name, ""))
    return Caught(bug.name, by, why, time.perf_counter() - start)


def try_cell(cell: Cell) -> Caught:
    """One table cell changed, in this process."""
    start = time.perf_counter()
    apply(cell)
    likely = recorded().get(cell.name, "")
    by = why = ""
    if not cell.below_kvm and not likely.startswith(VENDOR):
        # In a process of its own: pytest does not start where hypothesis has run.
        by, why = _in_a_child(lambda: kit(cell.backend, likely))
    if not by:
        by, why = vendors_tests(cell.tests, likely)
    return Caught(cell.name, by, why, time.perf_counter() - start)


def recorded() -> dict[str, str]:
    """What `RECORD` says: the check by the bug's name."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}  # type: ignore[no-any-return]


def record(caught: dict[str, str]) -> None:
    """Write down what was caught now, beside what stands there of the others that exist."""
    known = {bug.name for bug in BUGS} | {cell.name for cell in _in_a_child(load)}
    kept = {name: by for name, by in (recorded() | caught).items() if name in known}
    RECORD.write_text(json.dumps(kept, indent=0, sort_keys=True) + "\n", encoding="utf-8")


def vendors_tests(files: tuple[str, ...], likely: str = "") -> tuple[str, str]:
    """The first of the vendor's own tests that fails, the likely one before the others. RuntimeError where they do not
    run."""
    if likely.startswith(VENDOR):
        with contextlib.suppress(RuntimeError):  # it may have another name by now
            by, why = _in_a_child(lambda: vendors_tests((likely.removeprefix(VENDOR),)))
            if by:
                return by, why
    import pytest

    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
        code = pytest.main([*QUIET, *(str(ROOT / f) for f in files)])
    failed = [line for line in said.getvalue().splitlines() if line.startswith(("FAILED", "ERROR"))]
    if code and not failed:
        raise RuntimeError(f"pytest ends with {code}: {said.getvalue()[-200:]}")
    return (VENDOR + failed[0].partition(" ")[2].partition(" - ")[0], failed[0]) if failed else ("", "")


def shown(by: str) -> str:
    """The check, or the vendor's test without its file."""
    return VENDOR + by.rpartition("::")[2][:40] if by.startswith(VENDOR) else by


def _alone(what: Bug | Cell) -> Caught:
    return try_bug(what) if isinstance(what, Bug) else try_cell(what)


def chosen(words: list[str], tenth: int | None, cells: bool) -> list[Bug | Cell]:
    """Bugs and cells that contain a word (all without), or every tenth of them."""
    found: list[Bug | Cell] = [*BUGS, *(_in_a_child(load) if cells else ())]
    if words:
        found = [one for one in found if any(word in one.name for word in words)]
    return found if tenth is None else found[tenth % TENTHS :: TENTHS]


def results(found: list[Bug | Cell], jobs: int) -> Iterator[Caught]:
    """Each in a process of its own, some at a time."""
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=None) as pool:
        futures = {pool.submit(_forked, one): one for one in found}
        for future in as_completed(futures):
            yield future.result()


def _forked(one: Bug | Cell) -> Caught:
    try:
        caught: Caught = _in_a_child(lambda: _alone(one))
    except RuntimeError as error:
        return Caught(one.name, "", str(error), 0)
    return caught


def _in_a_child(call: Callable[[], Any]) -> Any:
    """What a call returns that is made in a fresh process: what it loads there is wrong for good. RuntimeError for what
    it raises."""
    receive, send = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        try:
            send.send((call(), ""))
        except BaseException as error:
            send.send((None, f"{type(error).__name__}: {error}"))
        finally:
            os._exit(0)
    send.close()
    try:
        result, failed = receive.recv()
    except EOFError:
        result, failed = None, "the process died"
    os.waitpid(pid, 0)
    if failed:
        raise RuntimeError(failed)
    return result


def main() -> int:
    """Print the table. 1 where a bug or a cell is not caught."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only bugs whose name contains one of these")
    parser.add_argument("--tenth", type=int, help="only every tenth, beginning with this one; -1: today's")
    parser.add_argument("--no-cells", action="store_true", help="no table cells")
    parser.add_argument("--record", action="store_true", help="write down what caught each: tried first next time")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    tenth = time.localtime().tm_yday if asked.tenth == -1 else asked.tenth
    found = chosen(asked.words, tenth, not asked.no_cells)
    start = time.perf_counter()
    missed = []
    by: dict[str, str] = {}
    print(f"{'bug':<52} {'caught by':<48} seconds", flush=True)  # noqa: T201
    for caught in results(found, asked.jobs):
        said = shown(caught.by) or f"NOTHING {caught.why[:60]}"
        print(f"{caught.name[:51]:<52} {said:<48} {caught.seconds:7.1f}", flush=True)  # noqa: T201
        if not caught.by:
            missed.append(caught.name)
        else:
            by[caught.name] = caught.by
    took = time.perf_counter() - start
    print(f"{len(found) - len(missed)} of {len(found)} wrong backends caught in {took:.0f} s")  # noqa: T201
    if asked.record:
        record(by)
    for name in missed:
        print(f"NOT CAUGHT: {name}")  # noqa: T201
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
