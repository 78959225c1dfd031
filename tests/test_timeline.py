"""The timeline, read back by the format's own library."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributions
import pytest
from timelines import Drawn, Read, read

from cvmcore import cli, timeline
from cvmcore.effects import Steps
from cvmcore.errors import CvmError, InputError, UapiError
from cvmcore.guest import Guest, Machine
from cvmcore.host import Host
from cvmcore.observers import FaultInjector
from cvmcore.plugins import load_backend
from cvmcore.runner import Report, Setup, load_profile_for, load_workload, run
from cvmcore.sched import LockStats, Timed
from cvmcore.timeline import Timeline
from cvmcore.types import PAGE_BYTES, Fatal, Stopped

MIB = 1 << 20
FORMATS = [".pftrace", ".json"]
BACKENDS = ["default", "swprot", "sev", "sev-es", "snp", "tdx", "pkvm"]


@pytest.fixture(autouse=True)
def _formats(request: pytest.FixtureRequest) -> None:
    if ".json" not in request.node.name:
        pytest.importorskip("perfetto")


def needs(*backends: str) -> None:
    for name in backends:
        if name not in ("default", "swprot"):
            pytest.importorskip(f"cvmcore_{'sev' if name in ('snp', 'sev-es') else name}")


def drawn(
    path: Path,
    workload: str,
    backend: str,
    mem_mib: float,
    most: int = timeline.MAX_SLICES,
    profile: Path | None = None,
    **options: str,
) -> tuple[Read, Report]:
    """The timeline of a run, read back, and its report."""
    needs(backend)
    setup = Setup(int(mem_mib * MIB), profile=profile)
    with Timeline(path, {"workload": workload}, most=most) as observer:
        report = run(
            load_workload(workload), load_backend(backend), setup, workload_options=options, observers=[observer]
        )
    return read(path), report


# ---- what is drawn --------------------------------------------------------------------------------------------------

Row = tuple[int, str, int, int]

TOUCH_4_PAGES: dict[str, list[Row]] = {
    "swprot": [
        (0, "KVM_RUN: write private", 20, 4),
        (1, "resolve", 12, 4),
        (2, "gmem_alloc_4k", 4, 4),
        (2, "page_clear_4k", 4, 4),
        (2, "fault_fixed", 4, 4),
        (1, "vm_exit", 4, 4),
        (1, "guest_write_4k", 4, 4),
        (0, "KVM_RUN: read private", 4, 4),
        (1, "guest_read_4k", 4, 4),
    ],
    "tdx": [
        (0, "KVM_RUN: accept", 38, 4),
        (1, "vcpu_enter", 0, 1),
        (1, "guest_accept", 0, 4),
        (1, "vcpu_exit", 0, 1),
        (1, "resolve", 30, 4),
        (2, "gmem_alloc_4k", 4, 4),
        (2, "page_clear_4k", 4, 4),
        (2, "link_private_spt", 1, 1),
        (3, "TDH.MEM.SEPT.ADD", 1, 1),
        (2, "external_update", 1, 1),
        (2, "link_private_spt", 1, 1),
        (3, "TDH.MEM.SEPT.ADD", 1, 1),
        (2, "external_update", 1, 1),
        (2, "link_private_spt", 1, 1),
        (3, "TDH.MEM.SEPT.ADD", 1, 1),
        (2, "external_update", 1, 1),
        (2, "set_private_spte", 8, 4),
        (3, "TDH.MEM.PAGE.AUG", 4, 4),
        (3, "clflush_4k", 4, 4),
        (2, "external_update", 4, 4),
        (2, "fault_fixed", 4, 4),
        (1, "vm_exit", 4, 4),
        (1, "vcpu_enter", 0, 1),
        (1, "guest_accept", 4, 4),
        (2, "TDG.MEM.PAGE.ACCEPT", 4, 4),
        (1, "vcpu_exit", 0, 1),
        (0, "KVM_RUN: write private", 4, 4),
        (1, "vcpu_enter", 0, 1),
        (1, "guest_access", 0, 4),
        (1, "guest_write_4k", 4, 4),
        (1, "vcpu_exit", 0, 1),
        (0, "KVM_RUN: read private", 4, 4),
        (1, "vcpu_enter", 0, 1),
        (1, "guest_access", 0, 4),
        (1, "guest_read_4k", 4, 4),
        (1, "vcpu_exit", 0, 1),
    ],
}
"""What the vCPU does when the guest writes 4 pages, and when they are read back at the end: depth, name, modelled time,
pages (or how often). Every price is 1000 ns."""


def row(one: Drawn) -> Row:
    return one.depth, one.name, one.ns, one.args.get("n_pages", one.args.get("n", 0))


def flat_prices(folder: Path, backend: str) -> Path:
    """A profile in which everything costs 1000 ns."""
    items = load_profile_for(load_backend(backend), None).prices
    lines = [f'{item} = {{ ns = 1000, source = "a test", confidence = "low" }}' for item in items]
    path = folder / "flat.toml"
    path.write_text('schema = 1\nunit = "ns"\n[prices]\n' + "\n".join(lines))
    return path


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("backend", TOUCH_4_PAGES)
def test_a_tiny_run(tmp_path: Path, backend: str, ending: str) -> None:
    """Calls, hooks and vendor operations as slices that nest, a batch as one slice, with what it cost."""
    found, _ = drawn(
        tmp_path / f"out{ending}", "touch", backend, 4 * PAGE_BYTES / MIB, profile=flat_prices(tmp_path, backend)
    )

    rows = [row(one) for one in found.slices(f"{backend}/vcpu0")]
    assert rows == [(depth, name, 1000 * us, n) for depth, name, us, n in TOUCH_4_PAGES[backend]]
    hook = next((one for one in found.slices(f"{backend}/vcpu0") if one.name == "set_private_spte"), None)
    assert hook is None or hook.args == {
        "vm": 0, "n_pages": 4, "level": 1, "gfns": "0x0 to 0x3", "pfns": "0x1 to 0x4", "ns": 8000,
    }  # fmt: skip


def test_both_formats_say_the_same(tmp_path: Path) -> None:
    one, _ = drawn(tmp_path / "out.pftrace", "convert", "snp", 2, pages="8", rounds="1")
    other, _ = drawn(tmp_path / "out.json", "convert", "snp", 2, pages="8", rounds="1")

    def plain(found: Read) -> dict[str, Any]:
        # The JSON form has processes and threads, and no groups within a process.
        return {
            path.rpartition("/")[2]: [(*row(one), one.start_ns) for one in found.slices(path)] for path in found.tracks
        }

    assert plain(one) == plain(other)
    assert {path.rpartition("/")[2]: values for path, values in one.counters.items()} == {
        path.rpartition("/")[2]: values for path, values in other.counters.items()
    }
    assert one.about == other.about


@pytest.mark.parametrize("workload", ["touch", "convert", "balloon", "dirty-log", "teardown", "boot"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_nest_and_add_up(tmp_path: Path, backend: str, workload: str) -> None:
    """`read` checks that what begins ends, and that nothing crosses. The innermost slices are the report's times."""
    options = {"firmware": "1", "kernel": "1", "swiotlb": "1"} if workload == "boot" else {}
    found, report = drawn(tmp_path / "out.pftrace", workload, backend, 8, **options)
    if report.skipped:
        return
    phases = {one.name: one for one in found.slices(f"{backend}/phases")}

    assert list(phases) == ["setup", "workload", "check", "teardown"]
    for name, phase in report.phases.items():
        assert phases[name].ns == pytest.approx(phase.elapsed_ns, abs=2)
        inside = sum(
            one.args["ns"]
            for _, slices in found.actors(backend)
            for one in slices
            if one.category in timeline.WORK and phases[name].start_ns <= one.start_ns < max(phases[name].end_ns, 1)
        )
        assert inside == pytest.approx(phase.elapsed_ns)
    assert found.about[backend]["folded slices"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_work_is_that_of_the_report(tmp_path: Path, backend: str) -> None:
    """Operations by the vendor's name and priced work by item: as counted, where nothing is checked at the end."""
    found, report = drawn(tmp_path / "out.pftrace", "teardown", backend, 2)
    check = next(one for one in found.slices(f"{backend}/phases") if one.name == "check")
    counts: dict[str, int] = {}
    by_item: dict[str, float] = {}
    for _, slices in found.actors(backend):
        for one in slices:
            # Reading everything back at the end is drawn, and in no count of the report.
            if one.category in timeline.WORK and not check.start_ns <= one.start_ns < check.end_ns:
                counts[one.name] = counts.get(one.name, 0) + one.args["n"]
                item = one.args["price item"]
                by_item[item] = by_item.get(item, 0) + one.args["ns"]
    other_cpus = found.counters[f"{backend}/memory/work of other CPUs, ns"][-1][1]

    assert {name: counts.get(name) for name in report.operations} == report.operations
    assert sum(by_item.values()) + other_cpus == pytest.approx(report.cpu_ns)
    alone = {item: ns for item, ns in report.parts_ns.items() if ns and not other_cpus}
    assert {item: by_item[item] for item in alone} == pytest.approx(alone)


def test_counters_follow_memory(tmp_path: Path) -> None:
    """Where the workload ends they are what the report says; after teardown nothing is left."""
    found, report = drawn(tmp_path / "out.pftrace", "touch", "pkvm", 4)
    end = next(one.end_ns for one in found.slices("pkvm/phases") if one.name == "workload")

    def at_end(name: str) -> float:
        return [value for t, value in found.counters[f"pkvm/memory/{name}"] if t <= end][-1]

    assert at_end("mapped pages") == report.mapped_pages == 1024
    assert at_end("pinned pages") == report.pinned_pages == 1024
    assert at_end("page-table pages") == report.page_table_bytes // PAGE_BYTES
    assert at_end("host memory in use") >= report.mapped_pages * PAGE_BYTES
    assert {values[-1][1] for path, values in found.counters.items() if "CPUs" not in path} <= {0, 7 * PAGE_BYTES}


def test_what_stops_and_what_fails_is_said(tmp_path: Path) -> None:
    """An error ends the slices that it goes through; the run goes on."""
    needs("tdx")
    refuse = FaultInjector("set_private_spte", 1, Stopped(0, Fatal(5, "because")))
    backend = load_backend("tdx")
    with Timeline(tmp_path / "out.pftrace", {}) as observer:
        host = Host(backend, load_profile_for(backend, None), observers=[observer, refuse])
        machine = Machine(host, 1 << 20)
        machine.launch()
        with pytest.raises(CvmError, match="EIO"):
            machine.guest.write(slice(0, 8, 1))
        with pytest.raises(UapiError):
            machine.vm.register_region(0, 4096)
        machine.destroy()
    found = read(tmp_path / "out.pftrace")

    hook = next(one for one in found.slices("tdx/vcpu0") if one.name == "set_private_spte")
    assert (hook.args["n_pages"], "because" in hook.args["injected"]) == (1, True)
    leave = next(one for one in found.slices("tdx/vcpu0") if one.name == "KVM_RUN: accept")
    assert leave.args["result"] == "Shutdown"
    refused = next(one for one in found.slices("tdx/VMM") if one.name == "KVM_MEMORY_ENCRYPT_REG_REGION")
    assert "ENOTTY" in refused.args["error"]


# ---- locks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_locks_are_held_within_calls(tmp_path: Path, backend: str) -> None:
    """One thing after the other: a hold lasts from when it is taken until it is dropped, and is part of the totals."""
    found, _ = drawn(tmp_path / "out.pftrace", "touch", backend, 1)
    totals = found.about[backend]["locks"]

    assert {path.rpartition("/")[2] for path in found.tracks if "/locks/" in path} == set(totals)
    for name, total in totals.items():
        holds = found.slices(f"{backend}/locks/{name}")
        assert (len(holds), sum(one.ns for one in holds)) == (total["taken"], pytest.approx(total["hold ns"], abs=2))
        assert {one.category for one in holds} == {"lock"}
    mmu = [one for one in found.slices(f"{backend}/locks/vm0.mmu_lock") if one.name == "vcpu0"]
    assert len(mmu) == 1 and mmu[0].args["for"] in ("read", "write")


def writers(guest: Guest, number: int, pages: int) -> Steps[None]:
    for page in range(pages):
        gfn = number * pages + page
        yield from guest.write.steps(slice(gfn, gfn + 1, 1), number)
        yield from guest.machine.punch.steps(slice(gfn, gfn + 1, 1))


@pytest.mark.parametrize("name", ["swprot", "tdx"])
def test_actors_that_wait_for_each_other(tmp_path: Path, name: str) -> None:
    """The timed driver: who holds a lock, who waits for it and for whom; sums are the lock's statistics."""
    needs(name)
    backend = load_backend(name)
    with Timeline(tmp_path / "out.pftrace", {}) as observer:
        host = Host(backend, load_profile_for(backend, None), observers=[observer])
        machine = Machine(host, 1 << 20, vcpus=3)
        machine.launch()
        timed = Timed(host)
        timed.run([(f"vcpu{i}", writers(machine.guest, i, 4)) for i in range(3)])
    found = read(tmp_path / "out.pftrace")
    stats: dict[str, LockStats] = {}
    for lock, state in timed._locks.states.items():
        # Locks of entries share a name.
        one = stats.setdefault(lock.name, LockStats())
        one.contended += state.stats.contended
        one.wait_ns += state.stats.wait_ns
        one.hold_ns += state.stats.hold_ns
    group = f"{name}/locks"

    contended = {name for name, stat in stats.items() if stat.contended}
    assert contended & {"vm0.mmu_lock", "vm0.slots_lock", "invalidate_lock"}
    for lock_name in contended:
        waits = found.slices(f"{group}/{lock_name} waits")
        assert len(waits) == stats[lock_name].contended
        assert sum(wait.ns for wait in waits) == pytest.approx(stats[lock_name].wait_ns, abs=len(waits))
        for wait in waits:
            holders = {
                hold.name
                for hold in found.slices(f"{group}/{lock_name}")
                if hold.start_ns <= wait.start_ns <= hold.end_ns
            }
            assert set(wait.args["held by"].split(", ")) <= holders and wait.name not in wait.args["held by"]
        own = [w for i in range(3) for w in found.slices(f"{name}/vcpu{i}") if w.name == f"wait for {lock_name}"]
        assert sorted(wait.ns for wait in own) == sorted(wait.ns for wait in waits)
    for lock_name, stat in stats.items():
        # What the VMM held before was not in the timed part.
        holds = [hold for hold in found.slices(f"{group}/{lock_name}") if hold.name != "VMM"]
        written = sum(hold.ns for hold in holds if hold.args["for"] == "write")
        assert written == pytest.approx(stat.hold_ns, abs=len(holds) + 1)
    # Each vCPU on a clock of its own: they overlap.
    ends = [max(one.end_ns for one in found.slices(f"{name}/vcpu{i}")) for i in range(3)]
    starts = [min(one.start_ns for one in found.slices(f"{name}/vcpu{i}")) for i in range(3)]
    assert max(starts) < min(ends)


def test_locks_are_not_watched_for_nothing() -> None:
    backend = load_backend("swprot")

    assert "drain" not in vars(Host(backend, load_profile_for(backend, None)).ops)
    assert not Host(backend, load_profile_for(backend, None)).ops.watches_locks


def test_no_observer_no_cost() -> None:
    """Nobody listens: no tap is set, and calls run as they are."""
    backend = load_backend("swprot")
    host = Host(backend, load_profile_for(backend, None))
    machine = Machine(host, 1 << 20)

    assert host.meter.watch is None and host.frames.watch is None and host.memory.watch is None
    assert not host.ops.detailed
    steps = machine.vm.launch_finish.steps()
    assert steps.__name__ == "launch_finish"  # the call itself, not a wrapper around it
    steps.close()


# ---- bounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 60, 300])
def test_a_large_run_is_folded(tmp_path: Path, most: int) -> None:
    """At most so many slices, and a few that stand for others; sums are kept, and the trace says what it did."""
    whole, _ = drawn(tmp_path / "whole.pftrace", "convert", "tdx", 2, pages="4", rounds="10")
    part, _ = drawn(tmp_path / "part.pftrace", "convert", "tdx", 2, most=most, pages="4", rounds="10")
    about = part.about["tdx"]
    slices = sum(len(track) for tracks in part.tracks.values() for track in tracks)

    assert whole.about["tdx"]["folded slices"] == 0
    assert about["folded slices"] > 0
    assert slices == about["slices"] <= 2 * most + 20
    assert part.work("tdx") == pytest.approx(whole.work("tdx"))
    assert part.about["bound"] == most
    assert about["locks"] == whole.about["tdx"]["locks"]
    for path, values in part.counters.items():
        assert values[-1][1] == whole.counters[path][-1][1]
        assert {value for _, value in values} <= {value for _, value in whole.counters[path]}


def test_long_calls_are_always_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "LONG", 0.05)
    part, _ = drawn(tmp_path / "part.pftrace", "convert", "tdx", 2, most=3000, pages="4", rounds="30")

    assert "exit" in [one.name for one in part.slices("tdx/VMM") if one.depth == 0]


def test_within_a_call_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = drawn(tmp_path / "whole.pftrace", "touch", "tdx", 4)
    monkeypatch.setattr(timeline, "MAX_CHILDREN", 2)
    part, _ = drawn(tmp_path / "part.pftrace", "touch", "tdx", 4)
    monkeypatch.setattr(timeline, "MAX_CHILDREN", 256)
    monkeypatch.setattr(timeline, "MAX_TREE", 3)
    small, _ = drawn(tmp_path / "small.pftrace", "touch", "tdx", 4)

    folded = [one for one in part.slices("tdx/vcpu0") if one.category == "folded"]
    assert folded and all(one.args["slices"] > 0 and one.name.endswith(" folded") for one in folded)
    assert part.work("tdx") == pytest.approx(whole.work("tdx"))
    assert small.work("tdx") == pytest.approx(whole.work("tdx"))
    assert part.about["tdx"]["slices"] < whole.about["tdx"]["slices"]


def test_many_locks_share_a_track(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MAX_LOCKS", 2)
    found, _ = drawn(tmp_path / "out.pftrace", "touch", "tdx", 1)

    assert len([path for path in found.tracks if "/locks/" in path]) > 2
    assert any(path.endswith("[...]") for path in found.tracks)


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def cvm(capfd: pytest.CaptureFixture[str]) -> Iterator[Any]:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.mark.parametrize("ending", FORMATS)
def test_backends_side_by_side(cvm: Any, tmp_path: Path, ending: str) -> None:
    """One file, a group of tracks for each backend, all from time 0."""
    path = tmp_path / f"out{ending}"

    code, out, err = cvm("compare", "touch", "--mem", "1M", "--backends", "swprot,default", "--trace", str(path))
    found = read(path)

    assert code == 0 and not err and "timeline" not in out
    assert {track.partition("/")[0] for track in found.tracks} == {"swprot", "default"}
    assert found.slices("default/phases")[0].start_ns == found.slices("swprot/phases")[0].start_ns == 0
    assert found.about["workload"] == "touch" and found.about["backends"] == ["swprot", "default"]
    assert os.listdir(tmp_path) == [path.name]


def test_a_bounded_timeline_says_so(cvm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline.Timeline.__init__, "__kwdefaults__", {"most": 50})

    code, out, _ = cvm("run", "convert", "--mem", "4M", "--trace", str(tmp_path / "out.pftrace"))

    assert code == 0
    said = " ".join(out.split())
    assert "swprot: the timeline draws " in said and " more folded into sums of what they stand for" in said


@pytest.mark.parametrize("ending", FORMATS)
def test_a_failing_run_leaves_nothing(cvm: Any, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"out{ending}"
    path.write_text("old")

    assert cvm("run", "boot", "--mem", "1M", "--trace", str(path))[0] == 2
    assert os.listdir(tmp_path) == [path.name] and path.read_text() == "old"


def test_one_backend_that_fails_does_not_take_the_others_along(
    cvm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.pftrace"
    plugins = tmp_path / "site"
    plugins.mkdir()
    monkeypatch.syspath_prepend(plugins)

    distributions.workload(
        plugins, "wilful", "context.machine.launch()\ncontext.machine.vm.set_memory_attributes(0, 4096, 0)"
    )

    code, _, err = cvm("compare", "wilful", "--backends", "default,swprot", "--trace", str(path))
    found = read(path)

    assert code == 2 and "default could not finish" in err
    assert [one.args["error"].partition(":")[0] for one in found.slices("default/VMM") if "error" in one.args] == [
        "KVM_SET_MEMORY_ATTRIBUTES"
    ]
    assert found.slices("swprot/phases")


def test_without_the_package(cvm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence before anything runs; the older form needs nothing."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "perfetto"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "perfetto", None)

    code, out, err = cvm("run", "touch", "--mem", "1M", "--trace", str(tmp_path / "out.pftrace"))

    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "pip install 'cvmcore[timeline]'" in err and ".json" in err
    assert not os.listdir(tmp_path)
    assert cvm("run", "touch", "--mem", "1M", "--trace", str(tmp_path / "out.json"))[0] == 0


@pytest.mark.parametrize("ending", FORMATS)
def test_a_place_that_cannot_be_written(cvm: Any, tmp_path: Path, ending: str) -> None:
    code, out, err = cvm("run", "touch", "--mem", "1M", "--trace", str(tmp_path / "no" / f"out{ending}"))

    assert (code, out) == (2, "") and "cannot be written: No such file or directory" in err


@pytest.mark.parametrize("ending", FORMATS)
def test_a_full_device(tmp_path: Path, ending: str) -> None:
    observer = Timeline(tmp_path / f"out{ending}", {})
    observer._out._file.close()
    observer._out._file = open("/dev/full", "wb" if ending == ".pftrace" else "w")  # noqa: SIM115

    with pytest.raises(InputError, match="No space left"), observer:
        run(load_workload("touch"), load_backend("swprot"), Setup(1 << 20), observers=[observer])

    assert not os.listdir(tmp_path)


def test_another_ending(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.pftrace or \.json"):
        Timeline(tmp_path / "out.txt", {})


def test_help_does_not_load_it() -> None:
    code = "import sys\nfrom cvmcore import cli\ncli.main(['run', '--help'])\nprint('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.partition("LOADED")[2].split()

    assert not {"perfetto", "matplotlib", "numpy", "cvmcore.timeline"} & set(loaded)
