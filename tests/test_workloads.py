"""Every workload on every installed backend: content intact, nothing readable, nothing left behind."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path

import attrs
import pytest

from cvmcore.errors import InputError
from cvmcore.plugins import installed, load_backend
from cvmcore.runner import Report, Setup, load_workload, run
from cvmcore.types import Capabilities
from cvmcore.workloads import GROUP as WORKLOADS
from cvmcore.workloads import Context, Workload

MIB = 1 << 20
SMALL: dict[str, tuple[int, dict[str, str]]] = {
    "boot": (64, {"image": "4", "firmware": "4", "kernel": "8", "swiotlb": "8"}),
    "touch": (8, {"order": "random", "passes": "2"}),
    "convert": (4, {"rounds": "2"}),
    "balloon": (8, {"rounds": "2"}),
    "dirty-log": (8, {}),
    "teardown": (8, {}),
    "trace": (20, {}),
}
"""MiB of guest memory, and options, that make each workload small."""


def small(
    name: str, backend: str = "swprot", *, backing: str = "4k", seed: int = 0, file: str | None = None, **options: str
) -> Report:
    """Run a workload on a small machine."""
    mem, preset = SMALL[name]
    setup = Setup(mem * MIB, vcpus=2, backing=backing, seed=seed)
    return run(load_workload(name), load_backend(backend), setup, workload_options=preset | options, file=file)


def capabilities(backend: str) -> Capabilities:
    seen: list[Capabilities] = []
    run(Workload("look", "", lambda context: seen.append(context.caps)), load_backend(backend), Setup(MIB))
    return seen[0]


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    """A trace of 700 pages: 1000 writes in jumps, then reads of pages seen and not seen before."""
    pages = [(i * 7919) % 650 for i in range(1000)]
    records = [{"page": page, "op": "w"} for page in pages] + [{"page": page, "op": "r"} for page in range(0, 700, 2)]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in [{"cvmcore_trace": 1, "pages": 675}, *records]))
    return path


# ---- all of them, everywhere ----------------------------------------------------------------------------------------


def test_the_workloads_of_the_design_are_installed() -> None:
    assert SMALL.keys() <= installed(WORKLOADS).keys()


@pytest.mark.parametrize("backing", ["4k", "2m"])
@pytest.mark.parametrize("name", SMALL)
def test_it_ends_well(name: str, cvm_backend_name: str, backing: str, trace_file: Path) -> None:
    """Everything reads back, no private page is readable where the VM type protects, nothing stays behind."""
    report = small(name, cvm_backend_name, backing=backing, file=str(trace_file) if name == "trace" else None)

    assert not [*report.wrong, *report.readable, *report.left]
    if not report.skipped:
        assert report.content_checked
        assert report.faults and report.mapped_pages
        assert report.cpu_ns == pytest.approx(sum(phase.cpu_ns for phase in report.phases.values()))
        assert report.cpu_ns == pytest.approx(sum(report.parts_ns.values()))
        assert 0 < report.elapsed_ns <= report.cpu_ns


def test_only_a_missing_capability_skips(cvm_backend_name: str) -> None:
    caps = capabilities(cvm_backend_name)
    confidential = caps.private_by_attribute or caps.encrypts or caps.mediated_root

    skipped = {name for name in SMALL if small(name, cvm_backend_name).skipped}

    assert skipped == {
        *(["convert"] if not confidential else []),
        *(["balloon"] if not (caps.private_by_attribute or caps.honours_notifiers) else []),
        *(["dirty-log"] if not caps.dirty_logging else []),
    }


@pytest.mark.parametrize("name", ["touch", "balloon"])
def test_a_seed_decides_everything(name: str) -> None:
    """The same seed gives the same report, but for the time it took here; another one another report."""
    one, same, other = (attrs.asdict(small(name, seed=seed)) | {"wall_s": 0} for seed in (1, 1, 2))

    assert one == same
    assert one | {"seed": 2} != other


def test_large_backing_gives_large_pages(cvm_backend_name: str) -> None:
    """Sequential memory on 2M backing is mapped by large pages wherever the VM type has any."""
    caps = capabilities(cvm_backend_name)
    level = min(caps.max_private_level, caps.max_gmem_level) if caps.private_by_attribute else caps.max_private_level

    report = small("touch", cvm_backend_name, backing="2m", order="sequential", passes="1")

    if level > 1 and not caps.needs_accept:
        assert report.large_pages == report.mapped_pages == 8 * 256
        assert report.faults == 4
    if level == 1:
        assert report.large_pages == 0


# ---- one by one -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "pages"), [("sequential", 2048), ("random", 1295), ("zipf", 600)])
def test_touch_orders(order: str, pages: int) -> None:
    """In order: each page once. At random with repetition: 1 - 1/e of the pages. Zipf: far fewer."""
    report = small("touch", order=order, passes="1")

    assert report.mapped_pages == pytest.approx(pages, rel=0.15)
    assert report.faults == report.mapped_pages


def test_touch_reads_only_a_part() -> None:
    report = small("touch", order="sequential", share="25", access="read", passes="3")

    assert report.mapped_pages == report.faults == 512
    assert report.parts_ns["guest_read_4k"] > 0 and "guest_write_4k" not in report.parts_ns


def test_convert_goes_there_and_back() -> None:
    """4 buffers of 64 pages, twice: each way is one hypercall, as each buffer lies within 2 MiB."""
    report = small("convert")

    assert report.exits["hypercall"] == report.exits["user"] == 2 * 2 * 4
    assert report.exits["memory_fault"] == 0


@pytest.mark.parametrize("chunk", ["4k", "2m"])
@pytest.mark.parametrize("convert", ["no", "yes"])
def test_balloon_gives_memory_back(cvm_backend_name: str, chunk: str, convert: str) -> None:
    """A quarter of 8 MiB, twice; pinned frames live on, all others are free meanwhile."""
    report = small("balloon", cvm_backend_name, backing="2m", chunk=chunk, convert=convert)

    if report.skipped:
        return
    assert report.ok
    assert report.figures["pages given back"] == 2 * 512
    if not report.pins_taken:
        assert report.figures["frames freed"] >= 2 * 512


def test_dirty_log_brings_large_pages_back() -> None:
    report = small("dirty-log", "default", backing="2m")

    assert report.figures == {
        "large pages before, %": 100.0,
        "pages logged": 3 * 204,
        "large pages while logging, %": 0.0,
        "large pages after, %": 100.0,
    }


def test_dirty_log_says_what_it_logs() -> None:
    assert any("guest_memfd slots cannot be logged" in note for note in small("dirty-log", "swprot").notes)
    assert not small("dirty-log", "default").notes


def test_dirty_log_notices_a_log_that_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    from cvmcore.uapi import VmFd

    honest = VmFd.get_dirty_log
    monkeypatch.setattr(VmFd, "get_dirty_log", lambda self, slot: honest.__get__(self)(slot) * 0)

    report = small("dirty-log", "default")

    assert len(report.wrong) == 3 and "lacks 204 of 204" in report.wrong[0]
    assert not report.ok


def test_boot_shares_its_bounce_buffers() -> None:
    report = small("boot")

    assert report.figures == {"launched pages": 4, "bounce buffer pages": 8 * 256}
    assert report.exits["hypercall"] == 5  # 8 MiB that do not begin at a multiple of 2 MiB
    assert report.faults >= (4 + 8 + 2 * 8) * 256


# ---- trace ----------------------------------------------------------------------------------------------------------


def test_trace_maps_each_page_once(trace_file: Path) -> None:
    report = small("trace", file=str(trace_file))

    assert report.figures == {"accesses": 1350, "distinct pages": 675}
    assert report.faults == report.mapped_pages == 675


def test_trace_sizes_the_guest_by_the_header(trace_file: Path) -> None:
    """675 pages are announced: two blocks of 2 MiB."""
    report = run(load_workload("trace"), load_backend("swprot"), Setup(), file=str(trace_file))

    assert report.mem_bytes == 4 * MIB


def test_trace_without_a_header_gets_a_generous_guest(tmp_path: Path) -> None:
    path = tmp_path / "lackey.txt"
    path.write_text(" S 1000,8\n L 1008,8\nI  400000,4\n")

    report = run(load_workload("trace"), load_backend("default"), Setup(), file=str(path))

    assert report.mem_bytes == 16 << 30
    assert report.figures == {"accesses": 3, "distinct pages": 2}


def test_trace_replays_the_shipped_sample() -> None:
    report = run(load_workload("trace"), load_backend("swprot"), Setup())

    assert report.ok and report.faults == report.figures["distinct pages"] == 4331
    assert report.wall_s < 3


def test_trace_reads_gzip_and_standard_input(trace_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same trace in another wrapping gives the same figures."""
    zipped = trace_file.with_suffix(".jsonl.gz")
    zipped.write_bytes(gzip.compress(trace_file.read_bytes()))
    expected = small("trace", file=str(trace_file)).figures

    from_gzip = small("trace", file=str(zipped)).figures
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(zipped.read_bytes())))
    from_stdin = small("trace", file="-").figures

    assert from_gzip == from_stdin == expected


def test_trace_larger_than_the_guest(trace_file: Path) -> None:
    with pytest.raises(InputError, match="touches more than the 512 pages"):
        run(load_workload("trace"), load_backend("swprot"), Setup(2 * MIB), file=str(trace_file))


# ---- the context ----------------------------------------------------------------------------------------------------


def test_lost_content_is_found() -> None:
    """A page that changes behind the guest's back makes the report wrong."""

    def lose(context: Context) -> None:
        context.machine.launch()
        context.populate(0, 16)
        frames = context.machine.frames_of(slice(3, 4, 1))
        context.machine.host.memory.write(frames, 42, 0)

    report = run(Workload("lose", "", lose), load_backend("swprot"), Setup(MIB))

    assert not report.ok
    assert len(report.wrong) == 1 and "gfn 0x3 (private) reads 0x2a" in report.wrong[0]


def test_a_lost_pin_is_found() -> None:
    """What is still pinned after teardown is left behind."""

    def pin(context: Context) -> None:
        context.machine.launch()
        context.populate(0, 16)
        context.machine.host.frames.pin(context.machine.frames_of(slice(3, 4, 1)))

    report = run(Workload("pin", "", pin), load_backend("swprot"), Setup(MIB))

    assert not report.ok
    assert any("1 pins are still held" in sentence for sentence in report.left)


def test_a_workload_that_destroys_the_vm_itself() -> None:
    def destroy(context: Context) -> None:
        context.machine.launch()
        context.populate(0, 16)
        context.machine.destroy()

    report = run(Workload("destroy", "", destroy), load_backend("swprot"), Setup(MIB))

    assert report.ok and not report.content_checked


def test_the_check_is_off_the_clock() -> None:
    """Only what the workload itself reads is charged, though the check reads all of it."""
    report = small("teardown")

    assert "guest_read_4k" not in report.parts_ns
    assert report.phases["teardown"].cpu_ns > 0
