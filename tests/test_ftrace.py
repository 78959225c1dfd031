"""Kernel ftrace text: every event as every tool prints it, what counts as a touch, and what malformed lines do."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvmcore import cli, traces
from cvmcore.errors import InputError
from cvmcore.traces import Chunk, TraceReader, open_trace
from cvmcore.traces.ftrace import BAD_IN_A_ROW, FORMATS

fuzz = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

Row = tuple[int, bool, int]
Write = Callable[[str | bytes], Path]


def trace_cmd(event: str, comm: str = "CPU 3/KVM", tid: int = 4145, cpu: int = 2, time: str = "86.581928") -> str:
    name, _, body = event.partition(" ")
    return f"{comm:>16}-{tid:<5} [{cpu:03}] {time}: {name:21} {body}"


def trace_cmd_flags(event: str, comm: str = "CPU 3/KVM", tid: int = 4145, cpu: int = 2, time: str = "86.581928") -> str:
    name, _, body = event.partition(" ")
    return f"{comm:>16}-{tid:<5} [{cpu:03}] d..2.  {time}: {name:21} {body}"


def perf(event: str, comm: str = "CPU 3/KVM", tid: int = 4145, cpu: int = 2, time: str = "86.581928") -> str:
    name, _, body = event.partition(" ")
    full = ("kvmmmu:" if "_mmu_" in name else "kvm:") + name.rstrip(":")
    return f"{comm:>16} {tid:7} [{cpu:03}] {time:>12}: {full:>29}: {body}"


def perf_pid(event: str, comm: str = "CPU 3/KVM", tid: int = 4145, cpu: int = 2, time: str = "86.581928") -> str:
    return perf(event, comm, tid, cpu, time).replace(f"{tid:7} ", f"   4140/{tid:<7} ")


def tracefs(event: str, comm: str = "CPU 3/KVM", tid: int = 4145, cpu: int = 2, time: str = "86.581928") -> str:
    return f"{comm:>16}-{tid:<7} [{cpu:03}] .....  {time:>12}: {event}"


def tracefs_tgid(event: str, comm: str = "CPU 3/KVM", tid: int = 4145, cpu: int = 2, time: str = "86.581928") -> str:
    return f"{comm:>16}-{tid:<7} (   4140) [{cpu:03}] d..1.  {time:>12}: {event}"


def tracefs_old(event: str, comm: str = "CPU 3/KVM", tid: int = 4145, cpu: int = 2, time: str = "86.581928") -> str:
    return f"{comm:>16}-{tid:<5} (-----) [{cpu:03}] d..1  {time:>12}: {event}"


TOOLS = {
    "trace-cmd": trace_cmd, "trace-cmd with flags": trace_cmd_flags, "perf script": perf, "perf script +pid": perf_pid,
    "tracefs": tracefs, "tracefs with tgid": tracefs_tgid, "older tracefs": tracefs_old,
}  # fmt: skip
BANNERS = {
    "trace-cmd": "CPU 0 is empty\ncpus=8\n",
    "trace-cmd with flags": "version = 7\ncpus=8\n",
    "tracefs": (
        "# tracer: nop\n#\n# entries-in-buffer/entries-written: 7/7   #P:8\n#\n"
        "#                                _-----=> irqs-off/BH-disabled\n"
        "#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION\n"
        "#              | |         |   |||||     |         |\n"
    ),
    "perf script +pid": "# ========\n# captured on    : Thu Jan  1 00:00:00 1970\n# ========\n#\n",
}

FAULT = "kvm_page_fault: vcpu 3 rip 0x7f08a4602116 address 0x0000000113600002 error_code 0x182"
OTHER = "kvm_entry: vcpu 0, rip 0xffffffff81511f37"
EVENTS: list[tuple[str, Row]] = [
    (FAULT, (0x113600, True, 3)),
    ("kvm_page_fault: vcpu 0 rip 0x0 address 0x0000000000000000 error_code 0x10", (0, False, 0)),
    ("kvm_page_fault: vcpu 219 rip 0x0 address 0x00000018cbdff000 error_code 0x500000006", (0x18CBDFF, True, 219)),
    ("kvm_page_fault: vcpu 1 rip 0xfffff802057fee67 address 0x0000000054200f80 error_code 0x681", (0x54200, False, 1)),
    # without the padding and 0x of newer kernels
    ("kvm_page_fault: address fc000 error_code 14", (0xFC, False, 0)),
    ("kvm_page_fault: address 8000002000000 error_code 182", (0x2000, True, 0)),
    ("kvm_page_fault: address 7fffffffffff error_code 0", (0x7FFFFFFFF, False, 0)),
    ("kvm_page_fault: address 66 error_code 100000007", (0, True, 0)),
    # the bit that marks a shared page is no part of the page number
    ("kvm_page_fault: vcpu 1 rip 0x0 address 0x00080000fe001000 error_code 0x182", (0xFE001, True, 1)),
    ("kvm_page_fault: vcpu 1 rip 0x0 address 0x00008000fe001000 error_code 0x181", (0xFE001, False, 1)),
    # arm64: data abort for a read, for a write; instruction abort
    ("kvm_guest_fault: ipa 0x1c010000, hsr 0x93800006, hxfar 0xf80100a8, pc 0x802c21c8", (0x1C010, False, 0)),
    ("kvm_guest_fault: ipa 0x48000000, hsr 0x92000046, hxfar 0xffff800080010000, pc 0xffff8000", (0x48000, True, 0)),
    ("kvm_guest_fault: ipa 0, hsr 0x82000046, hxfar 000000, pc 00000000000000", (0, False, 0)),
    # mappings, where they are all there is
    ("kvm_mmu_set_spte: gfn 1151b spte 86000080a5669b37 (rwxu) level 1 at 80b34fc8d8", (0x1151B, True, 0)),
    ("kvm_mmu_set_spte: gfn fffff spte 8be2171025 (r-xu) level 1 at 8a53b01ff8", (0xFFFFF, False, 0)),
    ("kvm_mmu_set_spte: gfn 0 spte 1 (rwx) level 3 at 0", (0, True, 0)),
    ("kvm_mmu_spte_requested: gfn fffff pfn 8be2171 level 1", (0xFFFFF, False, 0)),
]


@pytest.fixture
def trace(tmp_path: Path) -> Write:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "a.trace"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def rows_of(chunk: Chunk) -> list[tuple[int, bool, int, int]]:
    assert chunk.vcpus is not None
    columns = (chunk.pages, chunk.is_write, chunk.vcpus, chunk.counts)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def read(path: str | Path) -> tuple[list[tuple[int, bool, int, int]], TraceReader]:
    """(page, is_write, vcpu, count) of each row."""
    with open_trace(path) as reader:
        return [row for chunk in reader for row in rows_of(chunk)], reader


# ---- records


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(("event", "row"), EVENTS, ids=map(str, itertools.count()))
def test_record(trace: Write, tool: str, event: str, row: Row) -> None:
    line = TOOLS[tool]
    text = f"{BANNERS.get(tool, '')}{line(OTHER)}\n{line(event)}\n\n"

    rows, reader = read(trace(text))

    assert rows == [(*row, 1)]
    assert reader.format == "ftrace"
    assert (reader.figures["other events"], reader.figures["malformed lines"]) == (1, 0)
    assert reader.lines == text.count("\n")


@pytest.mark.parametrize("comm", ["a", "<...>", "qemu-system-x86", "a-1 [001] 1.5", "[kworker]", "vcpu: 1", "(x)", "ü"])
@pytest.mark.parametrize("tool", TOOLS)
def test_any_name_of_a_thread(trace: Write, tool: str, comm: str) -> None:
    rows, reader = read(trace(TOOLS[tool]("kvm_page_fault: address fc000 error_code 2", comm) + "\n"))

    assert rows == [(0xFC, True, 0, 1)]
    assert reader.figures["malformed lines"] == 0


@pytest.mark.parametrize(
    ("tid", "cpu", "time"), [(1, 0, "0.000001"), (4194304, 1023, "246654.769260123"), (77777, 64, "99")]
)
@pytest.mark.parametrize("tool", TOOLS)
def test_any_width(trace: Write, tool: str, tid: int, cpu: int, time: str) -> None:
    line = TOOLS[tool]
    event = "kvm_page_fault: address {:x} error_code 2"
    text = f"{line(event.format(0x1000), tid=1234567)}\r\n{line(event.format(0x2000), tid=tid, cpu=cpu, time=time)}\r\n"

    rows, _ = read(trace(text))

    assert rows == [(1, True, 0, 1), (2, True, 1, 1)]


@pytest.mark.parametrize(
    "event",
    [
        "kvm_page_fault:", "kvm_page_fault: ", "kvm_page_fault: address", "kvm_page_fault: address 1000",
        "kvm_page_fault: address 1000 error_code", "kvm_page_fault: address 1000 error_code g",
        "kvm_page_fault: address 1000 error_code 2g", "kvm_page_fault: address 0x error_code 2",
        "kvm_page_fault: address -1 error_code 2", "kvm_page_fault: address 0x0x1 error_code 2",
        "kvm_page_fault: address 11112222333344445 error_code 2", "kvm_page_fault: address 1000  error_code 2",
        "kvm_page_fault: address 1000 error_code=2", "kvm_page_fault: gpa 1000 error_code 2",
        "kvm_page_fault: vcpu 3 rip 0x7 address 0x1 error_code", "kvm_page_fault: vcpu a rip 7 address 1 error_code 1",
        "kvm_page_fault: vcpu 1 address 1 error_code 1", "kvm_page_fault: vcpu 123456789 rip 0 address 1 error_code 1",
        "kvm_guest_fault: ipa 0x1c010000 hsr 0x93800006 hxfar 0xf80100a8 pc 0x802c21c8", "kvm_guest_fault: ipa 0x1c0, ",
        "kvm_mmu_set_spte: gfn 0 spte 1 rwx level 3 at 0", "kvm_mmu_set_spte: gfn 0 spte 1 (rwx) level 0 at 0",
        "kvm_mmu_set_spte: gfn 0 spte 1 (rwx) level 6 at 0", "kvm_mmu_set_spte: gfn 0 spte 1 (r) level 1 at 0",
        "kvm_mmu_set_spte: gfn 0 spte 1 (", "kvm_mmu_spte_requested: gfn fffff pfn 8be2171 level",
        "kvm_mmu_spte_requested: gfn  pfn 8be2171 level 1", "kvm_unmap_hva_range: 0x7f0000000000 -- 0x7f0000001000",
        "kvm_unmap_hva_range: mmu notifier unmap range: 0x7f0000000000 - 0x7f0000001000",
    ],
)  # fmt: skip
@pytest.mark.parametrize("tool", ["trace-cmd", "perf script", "tracefs"])
def test_malformed_event_is_counted(trace: Write, tool: str, event: str) -> None:
    line = TOOLS[tool]

    rows, reader = read(trace(f"{line(FAULT)}\n{line(event)}\n{line(FAULT)}\n"))

    assert rows == [(0x113600, True, 3, 2)]
    assert reader.figures["malformed lines"] == 1
    assert "1 lines of the trace are malformed and left out" in reader.notes


@pytest.mark.parametrize(
    "line",
    [
        "hello", "x" * 5000, " " * 999 + "x", "-", "[001]", "] : :", "a-1 [001] 5.6:", "\0\0\0",
        "1 [001] x: kvm_page_fault: address 1", "[1] 1: 1: 1", "a-1 001] 5.6: kvm_page_fault: address 10 error_code 1",
        "a-1 001 5.6: kvm_page_fault: address 1000 error_code 2", '{"page": 1, "op": "r"}', " L 1000,8",
        "a-b [001] 5.6: kvm_page_fault: address 1000 error_code 2",
    ],
)  # fmt: skip
def test_line_that_is_no_record_is_counted(trace: Write, line: str) -> None:
    old = "kvm_page_fault: address 113600002 error_code 2"
    rows, reader = read(trace(f"{tracefs(old)}\n{line}\n{tracefs(old)}\n"))

    assert rows == [(0x113600, True, 0, 2)]
    assert reader.figures == {"other events": 0, "malformed lines": 1}


@pytest.mark.parametrize(
    "line",
    [
        "", "   ", "# a comment", "##### CPU 2 buffer started ####", "CPU 7 is empty", "cpus=8", "version = 6",
        " => kvm_mmu_page_fault", "=> kvm_mmu_page_fault (ffffffffc0a1b2c3)",
        "\tffffffffc0a1b2c3 kvm_mmu_page_fault+0x1f ([kernel.kallsyms])", "\t  7f99e213d582 [unknown] (/usr/bin/qemu)",
    ],
)  # fmt: skip
def test_what_tools_write_beside_events_is_not_counted(trace: Write, line: str) -> None:
    _, reader = read(trace(f"{tracefs(FAULT)}\n" + f"{line}\n" * 20 + f"{tracefs(FAULT)}\n"))

    assert reader.figures == {"other events": 0, "malformed lines": 0}


@pytest.mark.parametrize(
    "line",
    [
        tracefs("<stack trace>"), tracefs("kvm_vcpu_run <-kvm_vcpu_ioctl"), tracefs(OTHER), perf("kvm_fpu: unload"),
        perf("kvm_exit: reason EPT_VIOLATION rip 0x0 info 683 800000d1"), tracefs("kvm_emulate_insn: 0:fd1: (prot32)"),
        tracefs("my_kvm_page_fault: 7"), tracefs("kvm_page_fault_end: address 1000 error_code 2"),
    ],
)  # fmt: skip
def test_other_events_are_counted_apart(trace: Write, line: str) -> None:
    _, reader = read(trace(f"{tracefs(FAULT)}\n" + f"{line}\n" * 20 + f"{tracefs(FAULT)}\n"))

    assert reader.figures == {"other events": 20, "malformed lines": 0}


def test_lost_events_are_told(trace: Write) -> None:
    lost = "CPU:2 [LOST 100 EVENTS]\nCPU:3 [20 EVENTS DROPPED]\n# entries-in-buffer/entries-written: 205/208   #P:8\n"

    _, reader = read(trace(f"{lost}{tracefs(FAULT)}\n"))

    assert reader.figures["events lost in recording"] == 123
    assert reader.figures["malformed lines"] == 0
    assert reader.notes == ["the recording lost 123 events: pages may be missing"]


# ---- touches


SET = "kvm_mmu_set_spte: gfn {:x} spte 6000001c6e00b77 ({}) level {} at 8a53b01ff8"
REQUESTED = "kvm_mmu_spte_requested: gfn {:x} pfn 1c6e00 level {}"
FAULT_AT = "kvm_page_fault: vcpu {} rip 0x0 address 0x{:016x} error_code 0x{:x}"
UNMAP = "kvm_unmap_hva_range: mmu notifier unmap range: 0x{:016x} -- 0x{:016x}"


def lines(*events: str, tids: tuple[int, ...] = (7,)) -> str:
    return "".join(f"{tracefs(event, tid=tid)}\n" for event, tid in zip(events, itertools.cycle(tids), strict=False))


def test_what_follows_a_fault_is_no_second_touch(trace: Write) -> None:
    text = lines(
        FAULT_AT.format(0, 0x5000, 1), FAULT_AT.format(1, 0x7000, 2), REQUESTED.format(5, 1), REQUESTED.format(7, 2),
        SET.format(0, "rwxu", 2), SET.format(5, "rwxu", 1), FAULT_AT.format(1, 0x5000, 2), tids=(7, 8),
    )  # fmt: skip

    rows, reader = read(trace(text))

    assert rows == [(5, False, 0, 1), (7, True, 1, 1), (5, True, 1, 1)]
    assert reader.figures == {
        "other events": 0, "malformed lines": 0, "recorded 4K mappings": 1, "recorded 2M mappings": 1
    }  # fmt: skip
    assert reader.notes == ["large pages were mapped in the recording: of each, only the first page touched is known"]


def test_mappings_are_the_touches_where_no_fault_is_in_the_trace(trace: Write) -> None:
    both = lines(
        REQUESTED.format(0x205, 2), SET.format(0x200, "rwxu", 2), REQUESTED.format(9, 1), SET.format(9, "r-xu", 1)
    )

    rows, reader = read(trace(both))

    assert rows == [(0x200, True, 0, 1), (9, False, 0, 1)]
    assert reader.notes[0] == "no fault is in the trace: entries that KVM set stand for touches"
    assert reader.figures["recorded 2M mappings"] == 1

    rows, reader = read(trace(lines(REQUESTED.format(0x205, 2), REQUESTED.format(9, 1), tids=(3, 5))))

    assert rows == [(0x205, False, 0, 1), (9, False, 1, 1)]
    assert reader.notes[0] == "no fault is in the trace: entries that KVM asked for, taken for reads stand for touches"
    assert reader.figures["recorded 2M mappings"] == 1


def test_a_recording_that_begins_behind_a_fault(trace: Write) -> None:
    rows, _ = read(trace(lines(SET.format(1, "rwxu", 1), FAULT_AT.format(0, 0x2000, 2), SET.format(2, "rwxu", 1))))

    assert rows == [(2, True, 0, 1)]


def test_neighbours_are_one_row_for_one_vcpu_only(trace: Write) -> None:
    touches = [(0, 1, 0), (0, 1, 2), (1, 1, 0), (1, 2, 0)]
    faults = [FAULT_AT.format(vcpu, page << 12, error) for vcpu, page, error in touches]

    assert read(trace(lines(*faults)))[0] == [(1, True, 0, 2), (1, False, 1, 1), (2, False, 1, 1)]


def test_threads_are_numbered_in_order_of_appearance(trace: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    text = lines(*[f"kvm_page_fault: address {page:x}000 error_code 2" for page in range(9)], tids=(90, 4, 17))
    expected = [(page, True, page % 3, 1) for page in range(9)]

    assert read(trace(text))[0] == expected
    monkeypatch.setattr(traces.stream, "BLOCK_BYTES", 150)
    assert read(trace(text))[0] == expected


def test_unmaps_are_counted_or_kept_in_order(trace: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trace(lines(
        UNMAP.format(0, 0x1000), *[FAULT_AT.format(0, page << 12, 2) for page in range(5)],
        UNMAP.format(0x7F00 << 32, 1 << 63), UNMAP.format(1, 2), FAULT_AT.format(0, 0x1000, 2), UNMAP.format(3, 4),
    ))  # fmt: skip
    monkeypatch.setattr(traces.chunks, "CHUNK_ROWS", 3)

    rows, reader = read(path)
    assert [row[0] for row in rows] == [0, 1, 2, 3, 4, 1]
    assert reader.figures["unmapped ranges"] == 4

    with open_trace(path, keep_unmaps=True) as reader:
        found = [(chunk.pages.tolist(), chunk.unmap) for chunk in reader]
    assert found == [
        ([], (0, 0x1000)), ([0, 1, 2], None), ([3, 4], (0x7F00 << 32, 1 << 63)), ([], (1, 2)), ([1], (3, 4)),
    ]  # fmt: skip
    assert reader.rows == 6


# ---- malformed lines


def test_a_few_malformed_lines_in_a_row_are_counted(trace: Write) -> None:
    few = "junk\n" * BAD_IN_A_ROW
    _, reader = read(trace(f"{few}{lines(FAULT)}{few}{lines(OTHER)}{few}{lines(FAULT)}{few}"))

    assert reader.figures == {"other events": 1, "malformed lines": 4 * BAD_IN_A_ROW}


@pytest.mark.parametrize("block", [1 << 19, 200, 1000])
@pytest.mark.parametrize("between", ["", "\n# comment\n", " => kvm_mmu_page_fault\n" * 30])
def test_more_than_a_few_are_an_error(trace: Write, monkeypatch: pytest.MonkeyPatch, block: int, between: str) -> None:
    """Wherever the text is cut into blocks, and whatever stands between that is no event."""
    monkeypatch.setattr(traces.stream, "BLOCK_BYTES", block)
    junk = lines("kvm_page_fault: address 1 error_code x") + between
    text = lines(FAULT, OTHER, FAULT) + junk * (BAD_IN_A_ROW + 1) + lines(FAULT)
    number = text[: text.rindex("error_code x")].count("\n") + 1

    path = trace(text)
    with pytest.raises(InputError) as caught:
        read(path)

    expected = rf"{path}:{number}: this line is the 6th in a row that is no event as ftrace prints it: ' +CPU 3/KVM-7 "
    assert re.match(expected, str(caught.value))


def test_a_cut_last_line_is_malformed(trace: Write) -> None:
    whole = lines(FAULT, FAULT_AT.format(0, 0x5000, 2))

    rows, reader = read(trace(whole[:-1]))

    assert rows == [(0x113600, True, 3, 1)]
    assert reader.figures["malformed lines"] == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("# tracer: nop\n#\n", ": there is no memory access in it (was kvm:kvm_page_fault recorded?)"),
        ("cpus=4\n", ": there is no memory access in it (was kvm:kvm_page_fault recorded?)"),
        (lines(OTHER), ": there is no memory access in it (was kvm:kvm_page_fault recorded?)"),
        (lines(UNMAP.format(1, 2)), ": there is no memory access in it (was kvm:kvm_page_fault recorded?)"),
        ("#!/bin/sh\necho hello\n", ": neither output of valgrind's lackey nor kernel ftrace text nor a cvmcore trace"),
        ("# a comment\n", ": neither output of valgrind's lackey nor kernel ftrace text nor a cvmcore trace"),
        ("cpus=4\n" + "x\n" * 99, ":7: this line is the 6th in a row that is no event as ftrace prints it: 'x'"),
    ],
    ids=map(str, itertools.count()),
)
def test_trace_without_a_touch(trace: Write, content: str, says: str) -> None:
    path = trace(content)

    with pytest.raises(InputError) as caught:
        read(path)

    assert str(caught.value).startswith(f"{path}{says}")


# ---- against the plainest reading

PLAIN = re.compile(
    r" *(?P<comm>.+?)[- ](?P<tid>\d+) +\[\d{3,4}\] (?:[.\w]+ )? *\d+\.\d+: +(?:\w+:)?kvm_page_fault: +"
    r"(?:vcpu (?P<vcpu>\d+) rip 0x[0-9a-f]+ )?address (?:0x)?(?P<gpa>[0-9a-f]+) error_code (?:0x)?(?P<error>[0-9a-f]+)"
)
FAULTS = st.lists(
    st.tuples(
        st.sampled_from([trace_cmd, perf, tracefs]), st.integers(0, 300), st.integers(0, (1 << 47) - 1),
        st.integers(0, (1 << 36) - 1), st.integers(1, 1 << 22), st.integers(0, 1100),
        st.sampled_from(["a", "CPU 1/KVM", "<...>"]),
    ),
    min_size=1, max_size=40,
)  # fmt: skip


@fuzz
@given(faults=FAULTS, old=st.booleans(), block=st.integers(400, 900), chunk_rows=st.integers(1, 9))
def test_reads_as_line_by_line(
    trace: Write, monkeypatch: pytest.MonkeyPatch, faults: list[tuple], old: bool, block: int, chunk_rows: int
) -> None:  # fmt: skip
    text, expected = [], []
    threads: dict[str, int] = {}
    for tool, vcpu, gpa, error, tid, cpu, comm in faults:
        event = f"kvm_page_fault: address {gpa:x} error_code {error:x}" if old else FAULT_AT.format(vcpu, gpa, error)
        text.append(tool(event, comm, tid, cpu))
        match = PLAIN.fullmatch(text[-1])
        assert match is not None
        number = threads.setdefault(match["tid"], len(threads)) if old else int(match["vcpu"])
        expected.append((int(match["gpa"], 16) >> 12, int(match["error"], 16) & 2 != 0, number))
    path = trace("\n".join(text) + "\n")
    monkeypatch.setattr(traces.stream, "BLOCK_BYTES", block)
    monkeypatch.setattr(traces.chunks, "CHUNK_ROWS", chunk_rows)

    rows, reader = read(path)

    merged = [row[:3] for row in rows for _ in range(row[3])]
    assert [(page, vcpu) for page, _, vcpu in merged] == [(page, vcpu) for page, _, vcpu in expected]
    assert {row[0] for row in rows if row[1]} == {page for page, write, _ in expected if write}
    assert reader.accesses == len(expected)


WORDS = sorted({word for _, text in FORMATS for word in re.sub("<.*?>", " ", text).split()})
PIECES = st.one_of(
    st.sampled_from([*WORDS, "0x", "0", "ffffffffffffffff", "12345678901234567", "(rwxu)", "(", ")", "[001]", "1.5:"]),
    st.sampled_from([*[tracefs(event) for event, _ in EVENTS], perf(FAULT), perf(UNMAP.format(5, 9)), perf(OTHER)]),
    st.text(" :-[]().#=>0123456789abcdefx\t\r", max_size=12),
    st.binary(max_size=6).map(lambda data: data.decode("latin1")),
)  # fmt: skip


@fuzz
@given(text=st.lists(st.lists(PIECES, max_size=4).map(" ".join), max_size=12).map("\n".join), block=st.integers(8, 700))
def test_any_text_is_a_trace_or_a_sentence(
    trace: Write, monkeypatch: pytest.MonkeyPatch, text: str, block: int
) -> None:  # fmt: skip
    path = trace(f"{tracefs(FAULT)}\n{text}".encode("latin1"))
    monkeypatch.setattr(traces.stream, "BLOCK_BYTES", block)

    try:
        rows, reader = read(path)
    except InputError as error:
        assert str(error).startswith(f"{path}:")
        assert "\n" not in str(error)
    else:
        assert rows[0][0] == 0x113600
        assert reader.lines >= reader.figures["malformed lines"] + reader.figures["other events"] + 1


@pytest.mark.parametrize("unit", ["1", "1 ", "a-1 ", "[001] ", "1: ", "(", "(1) ", "a-1 [001] ", "\t", ": : : ", "0x"])
def test_long_lines_of_anything_take_no_time(trace: Write, unit: str) -> None:
    line = unit * (200_000 // len(unit))
    begin = time.perf_counter()

    read(trace(f"{tracefs(FAULT)}\n" + f"{line}\n{tracefs(FAULT)}\n{tracefs(FAULT)}{line}\n" * 10))

    assert time.perf_counter() - begin < 5


@fuzz
@given(data=st.data())
def test_a_cut_or_changed_line_is_never_another_trace(trace: Write, data: st.DataObject) -> None:
    """One byte changed: the line reads as something, or is counted; the others read as before."""
    tool = data.draw(st.sampled_from(list(TOOLS.values())))
    event, _ = data.draw(st.sampled_from(EVENTS))
    line = bytearray(tool(event).encode())
    place = data.draw(st.integers(0, len(line) - 1))
    line[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != 10))
    before, after = lines(FAULT_AT.format(1, 0xA1000, 2)).encode(), lines(FAULT_AT.format(1, 0xA2000, 0)).encode()

    rows, reader = read(trace(before + bytes(line) + b"\n" + after))

    assert rows[0][:3] == (0xA1, True, 1) and rows[-1][:3] == (0xA2, False, 1)
    assert len(rows) <= 3 and reader.lines == 3


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Text and zstd: what is held at a time is some blocks of text, and a chunk of rows."""
    events = [FAULT_AT.format(n % 4, n * 7 % 90_000 << 12, n & 2) for n in range(20_000)]
    block = lines(*events).encode()
    paths = tmp_path / "big", tmp_path / "big.zst"
    paths[0].write_bytes(block * 10)
    paths[1].write_bytes(zstd(block) * 20)
    for path, times in zip(paths, (10, 20), strict=True):
        tracemalloc.start()
        try:
            with open_trace(path) as reader:
                for _ in reader:
                    pass
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert reader.accesses == 20_000 * times
        assert peak < 16 << 20


# ---- zstd


@pytest.fixture(scope="module")
def text() -> bytes:
    return lines(*[FAULT_AT.format(n % 4, n * 7 % 900 << 12, n & 2) for n in range(3000)]).encode()


def zstd(data: bytes, level: int = 3) -> bytes:
    return zstandard.ZstdCompressor(level, write_checksum=True).compress(data)


SKIPPABLE = b"\x5a\x2a\x4d\x18\x04\x00\x00\x00abcd"


@pytest.mark.parametrize("kind", ["one frame", "frames", "parallel", "without size"])
def test_zstd_reads_as_plain_text(
    trace: Write, tmp_path: Path, text: bytes, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    expected = read(trace(text))[0]
    streamed = zstandard.ZstdCompressor().compressobj()
    content = {
        "one frame": zstd(text),
        "frames": zstd(text[:100]) + zstd(b"") + zstd(text[100:90_000], 19) + SKIPPABLE + zstd(text[90_000:]),
        "parallel": SKIPPABLE + zstd(text),
        "without size": streamed.compress(text) + streamed.flush(),
    }[kind]
    path = tmp_path / "a.zst"
    path.write_bytes(content)

    assert read(path)[0] == expected
    for wrapped in (content, gzip.compress(text), text):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(wrapped)))
        assert read("-")[0] == expected


def test_zstd_holds_every_format(trace: Write) -> None:
    formats = {"lackey": b" S 1000,8\n", "cvmcore": b'{"cvmcore_trace": 1}\n{"page":1,"op":"w"}'}
    for name, content in formats.items():
        with open_trace(trace(zstd(content))) as reader:
            assert reader.format == name
            assert [(chunk.pages.tolist(), chunk.is_write.tolist()) for chunk in reader] == [([1], [True])]


@fuzz
@given(data=st.data())
def test_cut_or_flipped_zstd_is_a_sentence(trace: Write, text: bytes, data: st.DataObject) -> None:
    whole = zstd(text[:20_000]) + zstd(text[20_000:40_000])
    cut = data.draw(st.integers(4, len(whole) - 1).filter(lambda n: n != len(zstd(text[:20_000]))))
    path = trace(whole[:cut])
    with pytest.raises(InputError, match="the zstd data ends too early: the file is truncated"):
        read(path)

    broken = bytearray(whole)
    broken[cut] ^= data.draw(st.integers(1, 255))
    path = trace(bytes(broken))
    try:
        rows = read(path)[0]
    except InputError as error:
        assert str(error).startswith(f"{path}: ")
    else:
        assert rows == read(trace(text[:40_000]))[0]  # a bit of the header that means nothing


def test_junk_behind_a_frame(trace: Write, text: bytes) -> None:
    with pytest.raises(InputError, match=r"the zstd data is damaged \(.+\)$"):
        read(trace(zstd(text) + b"junk"))


# ---- as a command


@pytest.fixture
def recording(tmp_path: Path) -> Callable[[str], Path]:
    """300 pages, each written once and read once by 4 vCPUs, with the mappings and an unmap, as a tool prints it."""

    def make(tool: str, suffix: str = "") -> Path:
        line = TOOLS[tool]
        body = []
        for n in range(600):
            page = n * 7 % 300
            body += [
                line(FAULT_AT.format(n % 4, page << 12, 2 if n < 300 else 1), tid=50 + n % 4, cpu=n % 4),
                line(OTHER, tid=50 + n % 4),
                line(REQUESTED.format(page, 1), tid=50 + n % 4),
                line(SET.format(page, "rwxu", 1), tid=50 + n % 4),
            ]
        body.insert(1200, line(UNMAP.format(0x7F00_0000_0000, 0x7F00_0000_0000 + 200 * 4096)))
        body.insert(7, "junk")
        data = (BANNERS.get(tool, "") + "\n".join(body) + "\n").encode()
        path = tmp_path / f"recording{suffix}"
        path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstd}[suffix](data))
        return path

    return make


@pytest.mark.parametrize("backend", ["swprot", "tdx"])
@pytest.mark.parametrize(
    ("tool", "suffix"), [("trace-cmd", ""), ("perf script", ".gz"), ("tracefs", ".zst"), ("perf script +pid", "")]
)
def test_run(
    recording: Callable[..., Path], tool: str, suffix: str, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if backend == "tdx":
        pytest.importorskip("cvmcore_tdx")
    path = recording(tool, suffix)

    assert cli.main(["run", "trace", str(path), "--backend", backend, "--vcpus", "4", "--json"]) == 0

    report = json.loads(capsys.readouterr().out)["reports"][0]
    assert report["figures"] == {
        "accesses": 600, "distinct pages": 300, "other events": 600, "malformed lines": 1, "recorded 4K mappings": 600,
        "unmapped ranges not replayed": 1,
    }  # fmt: skip
    assert report["faults"] == report["mapped_pages"] == 300
    assert report["ok"] and report["content_checked"]
    assert sorted(report["notes"]) == [
        "1 lines of the trace are malformed and left out",
        "unmapped ranges can be replayed with -w hva_base=, where the guest's memory was",
    ]


def test_compare_and_fewer_vcpus(
    recording: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    path = recording("perf script", ".zst")

    assert cli.main(["compare", "trace", str(path), "--backends", "default,swprot", "--vcpus", "3"]) == 0

    out = capsys.readouterr().out
    assert re.search(r"^malformed lines +1 +1$", out, re.MULTILINE)
    assert "the recording has 4 vCPUs and the guest fewer: --vcpus 4 gives each its own" in out
    assert out.startswith(f"trace {path}\n")


@pytest.mark.parametrize(
    ("base", "moved"),
    [
        ("0x7f0000000000", 200),
        ("0x7efffff6a000", 150),
        ("139637976727552", 200),
        ("0x7f0000000000:0x64000", 200),
        ("0x7f0000000000:0x0,0x7f0000064000:0x12b000", 101),
        ("0x7f0000064000:0x12b000,0x7e0000000000", 1),
        ("0x7f0000064000:0x12c000", 0),
        ("0x7f1000000000", None),
    ],
)
def test_unmaps_are_replayed_where_memory_is_known(
    recording: Callable[..., Path], base: str, moved: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the host unmapped moves, content intact, and is faulted in again when the guest reads it."""
    path = recording("trace-cmd")

    assert cli.main(["run", "trace", str(path), "--backend", "default", "-w", f"hva_base={base}", "--json"]) == 0

    report = json.loads(capsys.readouterr().out)["reports"][0]
    figures = report["figures"]
    assert figures["unmapped ranges replayed"] == (moved is not None)
    assert figures["unmapped ranges not replayed"] == (moved is None)
    assert figures["pages moved by them"] == (moved or 0)
    assert report["faults"] == 300 + (moved or 0)
    assert report["ok"]


@pytest.mark.parametrize(("backend", "faults"), [("swprot", 500), ("tdx", 300)])
def test_unmaps_do_not_move_private_memory(
    recording: Callable[..., Path], backend: str, faults: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where one table maps private and shared memory, its mappings are zapped nevertheless."""
    if backend == "tdx":
        pytest.importorskip("cvmcore_tdx")
    path = recording("trace-cmd")

    assert cli.main(["run", "trace", str(path), "--backend", backend, "-w", "hva_base=0x7f0000000000", "--json"]) == 0

    report = json.loads(capsys.readouterr().out)["reports"][0]
    assert report["figures"]["pages moved by them"] == 0
    assert report["faults"] == faults


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("junk", [], r"junk:7: this line is the 6th in a row that is no event as ftrace prints it: 'junk'"),
        ("cut.zst", [], r"cut\.zst: the zstd data ends too early: the file is truncated"),
        ("cut.gz", [], r"cut\.gz: the gzip data ends too early: the file is truncated"),
        ("other", [], r"other: there is no memory access in it \(was kvm:kvm_page_fault recorded\?\)"),
        ("good", ["-w", "hva_base=7f00"], r"option hva_base: '7f00' is neither an address HVA.*nor HVA:GPA"),
        ("good", ["-w", "hva_base=0x7f00:"], r"option hva_base: '0x7f00:' is neither"),
        ("good", ["--mem", "4K"], r"good: the trace touches more than the 1 pages that the guest has"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, text: bytes, name: str, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "junk": lines(FAULT).encode() + b"junk\n" * 20, "cut.zst": zstd(text)[:-9], "cut.gz": gzip.compress(text)[:-9],
        "other": lines(OTHER).encode(), "good": text,
    }  # fmt: skip
    path = tmp_path / name
    path.write_bytes(files[name])

    assert cli.main(["run", "trace", str(path), *arguments]) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"cvm: (?:{re.escape(str(tmp_path))}/)?{says}[^\n]*\n", err)
