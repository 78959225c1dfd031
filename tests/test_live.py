"""The model beside a real kernel: this machine's /dev/kvm where it has one, and what one answered before."""

from __future__ import annotations

import gzip
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from cvmcore.backends.default import DEFAULT
from cvmcore.cli import main
from cvmcore.difference import QUIRKS, Step, against, beside, compared, explained
from cvmcore.errors import InputError
from cvmcore.host import Host
from cvmcore.live import guest, layouts
from cvmcore.live import server as served
from cvmcore.live.front import LiveError, LiveFront, Server
from cvmcore.live.probe import Probe, probe
from cvmcore.modelfront import ModelFront, model_front
from cvmcore.plugins import load_backend
from cvmcore.runner import load_profile_for
from cvmcore.testing.fuzz import diff_fuzz
from cvmcore.uapiscript import Script

FOUND = probe()
HERE = Path(__file__).parent
RECORDED = HERE / "live-6.18.jsonl.gz"
OPTIONS = {"prefault": "no"} if "PRE_FAULT_MEMORY" in FOUND.missing else {}

needs_kvm = pytest.mark.skipif(bool(FOUND.why), reason=FOUND.why or "-")

SHARED_SLOT: list[dict[str, Any]] = [
    {"op": "create_vm"},
    {"op": "create_guest_memfd", "size": "64K", "flags": 3, "name": "f"},
    {"op": "mmap", "size": "64K", "fd": "f", "name": "m"},
    {"op": "set_user_memory_region2", "slot": 0, "gpa": 0, "size": "64K", "hva": "m", "flags": 4, "fd": "f"},
    {"op": "create_vcpu"},
]


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as one:
        yield one


def text(lines: list[dict[str, Any]]) -> list[str]:
    return [json.dumps(line) for line in lines]


# ---- a recording: needs no kernel -----------------------------------------------------------------------------------


def test_model_answers_as_the_recorded_kernel() -> None:
    """Thousands of calls, recorded on 6.18: status, results, content, allocated pages and exits of each."""
    quirks, steps = 0, 0
    with gzip.open(RECORDED, "rt", encoding="utf-8") as lines:
        for step in against(Script(model_front("default", options={"prefault": "no"})), lines, RECORDED.name):
            assert not step.differs or step.quirk is not None, explained(step)
            quirks += step.quirk is not None
            steps += 1

    assert steps > 5000
    assert quirks <= steps // 100


def test_recording_covers_what_matters() -> None:
    """All calls that a kernel takes, right and wrong, and the exits."""
    with gzip.open(RECORDED, "rt", encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines if not line.startswith("#")]
    statuses = {(line["op"], line["answer"]["status"]) for line in found}
    exits = {line["answer"]["exit"]["reason"] for line in found if "exit" in line["answer"]}

    assert exits == {"MMIO", "MEMORY_FAULT"}
    assert statuses >= {
        ("guest_write", "OK"), ("guest_write", "EFAULT"), ("guest_read", "OK"), ("guest_read", "EFAULT"),
        ("set_user_memory_region2", "OK"), ("set_user_memory_region2", "EINVAL"),
        ("set_user_memory_region2", "EEXIST"), ("set_user_memory_region2", "EBADF"),
        ("create_guest_memfd", "OK"), ("create_guest_memfd", "EINVAL"), ("fallocate", "OK"), ("fallocate", "EINVAL"),
        ("fallocate", "EOPNOTSUPP"), ("host_write", "EFAULT"), ("mmap", "ENODEV"), ("mmap", "EINVAL"),
        ("munmap", "OK"), ("madvise", "ENOMEM"), ("mlock", "OK"), ("get_dirty_log", "OK"),
        ("get_dirty_log", "ENOENT"), ("create_vcpu", "EEXIST"), ("set_memory_attributes", "ENOTTY"),
        ("pre_fault_memory", "EOPNOTSUPP"), ("close", "EBADF"), ("lseek", "ESPIPE"),
    }  # fmt: skip


def one_step(model: dict[str, Any], kernel: dict[str, Any], op: str = "fallocate") -> Step:
    return Step(7, op, {"fd": "f"}, {"state": {}, **model}, {"state": {}, **kernel})


def test_reasons_and_statistics_are_not_compared() -> None:
    same = one_step({"status": "EINVAL", "why": "it is so"}, {"status": "EINVAL", "stats": {"exits": 3}})

    assert (same.differs, same.quirk) == ([], None)
    assert compared({"exit": {"reason": "SHUTDOWN", "why": "x"}}) == {"exit": {"reason": "SHUTDOWN"}}


def test_the_difference_is_explained() -> None:
    state = {"f": {"allocated": 1, "pages": [[0, 1]]}}
    step = one_step({"status": "EINVAL", "why": "whole pages", "state": state}, {"status": "OK"})

    assert explained(step).splitlines() == [
        'line 7: {"op": "fallocate", "fd": "f"}',
        "  the model and the kernel differ in status, state",
        '  status, model: "EINVAL"',
        '  status, kernel: "OK"',
        "  allocated of f, model: 1",
        "  allocated of f, kernel: null",
        "  pages of f, model: [[0, 1]]",
        "  pages of f, kernel: null",
        "  the model refused because: whole pages",
    ]


def test_recording_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.jsonl"
    script.write_text('{"op": "create_vm", "answer": {"status": "OK", "state": {}}}\n{"op": "create_vcpu"}\n')

    assert main(["uapi", str(script), "--recorded"]) == 2
    assert "script.jsonl:2: a recorded script has an" in capsys.readouterr().err
    assert main(["uapi", str(script), "--record", str(tmp_path / "out")]) == 2
    assert main(["uapi", str(script), "--live", "--diff"]) == 2


def test_differences_end_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.jsonl"
    script.write_text('{"op": "create_vm", "answer": {"status": "EPERM", "state": {}}}\n')

    assert main(["uapi", str(script), "--recorded"]) == 1
    assert 'status, kernel: "EPERM"' in capsys.readouterr().out


# ---- what is missing is said ----------------------------------------------------------------------------------------


def test_probe_says_what_is_missing(tmp_path: Path) -> None:
    assert "it is not there" in probe(str(tmp_path / "kvm")).why
    assert "cannot be used" in probe(os.devnull).why
    found = Probe(values=dict.fromkeys(layouts.CAPABILITIES, 1) | {"VM_TYPES": 0b101011, "PRE_FAULT_MEMORY": 0})
    assert list(found.missing) == ["PRE_FAULT_MEMORY"]
    assert found.vm_types == [0, 1, 3, 5]


def test_without_kvm_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("cvmcore.live.front.probe", lambda: Probe("/dev/kvm cannot be used: it is not there"))
    monkeypatch.setattr("cvmcore.live.probe.probe", lambda: Probe("/dev/kvm cannot be used: it is not there"))
    script = tmp_path / "script.jsonl"
    script.write_text('{"op": "create_vm"}\n')

    for arguments in (["uapi", str(script), "--live"], ["uapi", str(script), "--diff"], ["uapi", "--live"],
                      ["diff-fuzz", "--steps", "1"]):  # fmt: skip
        assert main(arguments) == 2
        assert capsys.readouterr().err == "cvm: no live run: /dev/kvm cannot be used: it is not there\n"


def test_quirks_say_why() -> None:
    assert all(quirk.reason and quirk.fields for quirk in QUIRKS)
    text = (HERE.parent / "docs" / "live.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| (yes|no) \|$", text, re.MULTILINE)
    assert rows == [(quirk.name, "yes" if quirk.ends else "no") for quirk in QUIRKS]


def with_other_memory_behind(seen: list[list[int]], pages: list[list[int]], **more: Any) -> Step:
    """A guest reads a guest_memfd slot behind whose hva stands other memory: what a kernel answered."""
    model = Script(model_front("default"))
    answer = {"status": "OK", "done": 16, "seen": seen}
    state = {"f": {"allocated": sum(n for _, n in pages), "pages": pages, "content": []}}
    lines = [
        *SHARED_SLOT[:2],
        {"op": "mmap", "size": "64K", "name": "a"},
        {"op": "host_write", "addr": "a", "pages": 12, "stamp": 77},
        {**SHARED_SLOT[3], "hva": "a"},
        {"op": "create_vcpu"},
    ]
    for line in lines:
        arguments = {key: value for key, value in line.items() if key != "op"}
        assert model.do(line["op"], arguments)["status"] == "OK"
    line = json.dumps({"op": "guest_read", "pages": 16, "answer": {**answer, "state": state, **more}})
    return next(against(model, [line], "here"))


def test_prefetch_of_other_memory_is_known_and_hides_nothing_else() -> None:
    """Only pages with other memory behind them, only with that memory's stamp, and nothing else in the files."""
    known = with_other_memory_behind([[0, 1], [77, 7], [0, 1], [77, 3], [0, 4]], [[0, 1], [8, 1], [12, 4]])
    assert (known.differs, known.quirk) == (["seen", "state"], QUIRKS[0])

    all_there = [[0, 16]]
    assert with_other_memory_behind([[0, 16]], all_there).differs == []
    assert with_other_memory_behind([[0, 1], [78, 7], [0, 8]], all_there).quirk is None  # no such stamp there
    assert with_other_memory_behind([[0, 12], [77, 1], [0, 3]], all_there).quirk is None  # nothing behind that page
    assert with_other_memory_behind([[0, 16]], [[0, 1]]).quirk is None  # more pages lacking than can be
    assert with_other_memory_behind([[0, 1], [77, 15]], [[0, 1]], status="EFAULT").quirk is None
    assert with_other_memory_behind([[0, 16]], [[0, 17]]).quirk is None  # a page too many


def test_vm_types_that_this_machine_has_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = tmp_path / "script.jsonl"
    script.write_text('{"op": "create_vm"}\n')
    types = {name: load_backend(name).kvm_type for name in ("default", "swprot", "sev", "sev-es", "snp", "tdx", "pkvm")}
    assert list(types.values()) == [0, 1, 2, 3, 4, 5, None]

    assert main(["uapi", str(script), "--live", "--backend", "pkvm"]) == 2
    assert "says no number for KVM_CREATE_VM" in capsys.readouterr().err
    only_0 = Probe(values={"VM_TYPES": 1})
    monkeypatch.setattr("cvmcore.live.front.probe", lambda: only_0)
    assert main(["uapi", str(script), "--live", "--backend", "snp"]) == 2
    assert capsys.readouterr().err == "cvm: this machine's KVM has no VM type 4, which snp is; it has 0\n"


def test_guest_image() -> None:
    """Loops jump to their beginning; the list is mapped behind the code."""
    for code in (guest.READ, guest.WRITE):
        at = code.index(b"\x75")
        assert at + 2 + int.from_bytes(code[at + 1 : at + 2], "little", signed=True) == 0
    assert len(guest.image()) == guest.LIST_PAGE * guest.PAGE
    assert len(guest.registers(3, None)) == 144


# ---- this machine's kernel ------------------------------------------------------------------------------------------


@needs_kvm
def test_model_and_kernel_agree(server: Server) -> None:
    """One script through most calls, by hand."""
    lines = text([
        *SHARED_SLOT,
        {"op": "guest_write", "gpa": "4K", "pages": 2, "stamp": 7},
        {"op": "host_read", "addr": "m", "pages": 4},
        {"op": "guest_write", "gpa": "60K", "pages": 2, "stamp": 3},
        {"op": "fallocate", "fd": "f", "mode": 3, "offset": "4K", "size": "4K"},
        {"op": "guest_read", "gfns": [0, 1, 2, 15]},
        {"op": "mmap", "size": "8K", "fd": "f", "offset": "60K", "name": "past"},
        {"op": "host_write", "addr": "past", "pages": 2, "stamp": 4},
        {"op": "munmap", "addr": "m", "size": "64K"},
        {"op": "munmap", "addr": "past", "size": "8K"},
        {"op": "close", "fd": "f"},
        {"op": "guest_read", "pages": 16},
        {"op": "stats"},
        {"op": "exit"},
        {"op": "create_vm"},
    ])  # fmt: skip
    steps = list(beside(Script(model_front("default", options=OPTIONS)), Script(LiveFront(server)), lines, "here"))

    assert [explained(step) for step in steps if step.differs] == []
    assert steps[9].kernel["seen"] == [[0, 2], [7, 1], [3, 1]]
    assert steps[16].kernel["stats"]["pf_fixed"] > 0


@needs_kvm
@pytest.mark.slow
def test_fuzz_finds_no_difference(server: Server) -> None:
    outcome = diff_fuzz(LiveFront(server), 5000, 1, options=OPTIONS)

    assert outcome.why == ""
    assert outcome.steps >= 5000


class Forgetful(ModelFront):
    """A kernel that forgets to punch."""

    def call(self, op: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"status": "OK"} if op == "fallocate" and arguments["mode"] == 3 else super().call(op, arguments)


def fresh_host(**how: Any) -> Host:
    return Host(DEFAULT, load_profile_for(DEFAULT, None), **how)


def test_fuzz_finds_and_shortens_a_difference() -> None:
    """A few lines say what the other does otherwise; numbers are small."""
    told: list[int] = []
    lines: list[str] = []

    outcome = diff_fuzz(
        Forgetful(fresh_host()), 20_000, 1, told=lambda outcome: told.append(outcome.steps), record=lines.append
    )

    assert outcome.script[-1]["op"] == "fallocate"
    assert len(outcome.script) <= 8
    assert "the model and the kernel differ in" in outcome.why
    assert told == sorted(told) and len(lines) > outcome.cases


def test_fuzz_of_the_model_with_itself() -> None:
    """No difference, on another kernel's errno either; and one errno that two kernels do not share is found."""
    assert diff_fuzz(ModelFront(fresh_host(kernel="7.x")), 300, 3, version="7.x").why == ""

    again = {**SHARED_SLOT[3], "slot": 1, "gpa": "1M"}
    steps = beside(Script(model_front("default")), Script(ModelFront(fresh_host(kernel="7.x"))), text([
        *SHARED_SLOT, again,
    ]), "here")  # fmt: skip
    assert [(step.line, step.model["status"], step.kernel["status"]) for step in steps if step.differs] == [
        (6, "EINVAL", "EEXIST")
    ]


def test_what_the_process_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that drives the kernel, played by another: refusals, failures, a death, an end."""
    played = textwrap.dedent("""
        import json, sys
        answers = iter(json.loads(sys.argv[1]))
        for line in sys.stdin:
            answer = next(answers, None)
            if answer is None:
                break
            print(json.dumps(answer), flush=True)
            if "failed" in answer:
                print(json.dumps({"ended": ""}), flush=True)
    """)
    answers = [
        {"ready": True}, {"answer": {"status": "OK", "fd": 7}}, {"refused": "too large"},
        {"answer": {"status": "OK", "done": 3, "seen": [1, 1, 2]}}, {"answer": None}, {"ended": ""},
        {"ready": True}, {"failed": "KeyError: x"}, {"ready": True}, {"ended": "SIGBUS"},
    ]  # fmt: skip
    monkeypatch.setattr("cvmcore.live.front.probe", lambda: Probe(values={"VM_TYPES": 1}))
    monkeypatch.setattr("cvmcore.live.front.COMMAND", [sys.executable, "-c", played, json.dumps(answers)])

    with Server() as server:
        front = LiveFront(server)
        script = Script(front)
        assert script.do("create_vm", {}) == {"op": "create_vm", "status": "OK"}
        with pytest.raises(InputError, match="live: too large"):
            script.do("close", {"fd": "vm"})
        assert script.do("host_read", {"addr": 0, "pages": 3})["seen"] == [[1, 2], [2, 1]]
        with pytest.raises(InputError, match="launch_update is not tried"):
            script.do("launch_update", {"gpa": 0, "contents": ["00"]})
        assert front.state(7) is None
        front.close()
        front.close()
        with pytest.raises(LiveError, match="failed: KeyError: x"):
            script.do("create_vm", {})
        with pytest.raises(LiveError, match="killed by SIGBUS"):
            script.do("create_vm", {})
        with pytest.raises(LiveError, match="has ended"):
            script.do("create_vm", {})


def test_pages_that_were_only_read_are_a_known_difference() -> None:
    """Only where they hold zeros in anonymous memory, and only where the kernel logs fewer."""

    def log(dirty: list[int]) -> Step:
        model = Script(model_front("default"))
        for line in (
            {"op": "create_vm"}, {"op": "create_vcpu"}, {"op": "mmap", "size": "64K", "name": "a"},
            {"op": "set_user_memory_region2", "slot": 3, "gpa": "64K", "size": "64K", "hva": "a", "flags": 1},
            {"op": "guest_read", "gpa": "64K", "pages": 3}, {"op": "guest_write", "gpa": "72K", "stamp": 5},
        ):  # fmt: skip
            arguments = {key: value for key, value in line.items() if key != "op"}
            assert model.do(str(line["op"]), arguments)["status"] == "OK"
        answer = {"status": "OK", "dirty": dirty, "state": {}}
        return next(against(model, [json.dumps({"op": "get_dirty_log", "slot": 3, "answer": answer})], "here"))

    assert (log([2]).differs, log([2]).quirk) == (["dirty"], QUIRKS[1])
    assert log([1, 2]).quirk is QUIRKS[1]
    assert log([0, 1, 2]).differs == []
    assert log([0, 1]).quirk is None  # a page that was written is not logged
    assert log([2, 9]).quirk is None  # the kernel logs one that nobody touched


def test_wider_guest_physical_addresses_are_a_known_difference() -> None:
    """Memslots between 48 and 52 bits that a kernel makes, and nothing else that it makes."""

    def step(gpa: int, status: str = "OK", **more: Any) -> Step:
        line = {"op": "set_user_memory_region", "slot": 1, "gpa": gpa, "size": "4K", **more}
        lines = [{"op": "create_vm", "answer": {"status": "OK", "state": {}}},
                 line | {"answer": {"status": status, "state": {}}}]  # fmt: skip
        return list(against(Script(model_front("default")), text(lines), "here"))[1]

    assert step((1 << 48) - 4096).differs == []
    assert step(1 << 48).quirk is QUIRKS[2]
    assert step((1 << 52) - 4096).quirk is QUIRKS[2]
    assert step(1 << 52).quirk is None  # no address has as many bits
    assert step(1 << 48, "EEXIST").quirk is None
    assert (step(0, flags=8).differs, step(0, flags=8).quirk) == (["status"], None)


@needs_kvm
def test_descriptors_of_a_vcpu_come_and_go(server: Server) -> None:
    """Its guest goes on by the one that is left, also where the access leaves KVM for user space."""
    lines = text([
        *SHARED_SLOT, {"op": "dup", "fd": "vcpu", "name": "v"}, {"op": "close", "fd": "vcpu"},
        {"op": "guest_read", "pages": 17, "vcpu": "v"}, {"op": "guest_write", "pages": 1, "stamp": 1, "vcpu": "v"},
        {"op": "dup", "fd": "vm", "name": "w"}, {"op": "close", "fd": "vm"},
        {"op": "create_vcpu", "vm": "w", "name": "u", "id": 9}, {"op": "close", "fd": "w"},
        {"op": "guest_read", "pages": 2, "vcpu": "u"},
    ])  # fmt: skip
    steps = list(beside(Script(model_front("default", options=OPTIONS)), Script(LiveFront(server)), lines, "here"))

    assert [explained(step) for step in steps if step.differs] == []
    assert steps[-1].kernel["seen"] == [[1, 1], [0, 1]]


@needs_kvm
def test_quirk_ends_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On kernels that have it; on others there is no difference."""
    script = tmp_path / "script.jsonl"
    lines = [
        *SHARED_SLOT[:2], {"op": "mmap", "size": "64K", "name": "a"},
        {"op": "host_write", "addr": "a", "pages": 16, "stamp": 77}, {**SHARED_SLOT[3], "hva": "a"},
        {"op": "create_vcpu"}, {"op": "guest_read", "pages": 16}, {"op": "guest_read", "pages": 16},
    ]  # fmt: skip
    script.write_text("\n".join(text(lines)))

    assert main(["uapi", str(script), "--diff"]) == 0
    assert "no other difference" in capsys.readouterr().out


@needs_kvm
def test_a_case_that_dies_takes_nobody_with_it(server: Server) -> None:
    front = LiveFront(server)
    with pytest.raises(LiveError, match="failed: TypeError"):
        front.call("fstat", {"what": 1})
    with pytest.raises(InputError, match="not tried on a real machine"):
        front.call("memory_failure", {"fd": 3, "offset": 0})
    assert front.call("create_vm", {"type": None})["status"] == "OK"
    with pytest.raises(InputError, match="not the script's own memory"):
        front.call("munmap", {"addr": 0x7000_0000_0000, "size": 1 << 40})
    with pytest.raises(InputError, match="more than 1 GiB"):
        front.call("set_user_memory_region", {"vm": 3, "slot": 0, "flags": 0, "gpa": 0, "size": 1 << 40, "hva": 0})
    front.close()


def test_a_reader_that_goes_is_no_fault_of_the_recording(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What was recorded by then stays; a disk that is full is said."""
    monkeypatch.setattr("cvmcore.cli.kernels._live_script", lambda backend: nullcontext(Script(model_front("default"))))
    script, out = tmp_path / "script.jsonl", tmp_path / "out.jsonl"
    script.write_text("\n".join(text(SHARED_SLOT)))

    def gone(line: str) -> None:
        raise BrokenPipeError

    assert main(["uapi", str(script), "--live", "--record", "/dev/full"]) == 2
    assert capsys.readouterr().err == "cvm: /dev/full: cannot be written: No space left on device\n"
    monkeypatch.setattr("cvmcore.cli.kernels.say_json", gone)
    monkeypatch.setattr("cvmcore.cli.forget_output", lambda: None)
    assert main(["uapi", str(script), "--live", "--record", str(out)]) == 1
    assert capsys.readouterr().err == ""
    assert json.loads(out.read_text().splitlines()[1])["op"] == "create_vm"


def test_measuring_has_a_minute_for_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    requests, alarms, answers = iter([["measure", 5], ["nonsense"], None]), [], []
    monkeypatch.setattr(served, "receive", lambda: next(requests))
    monkeypatch.setattr(served, "send", answers.append)
    monkeypatch.setattr(served, "Driver", object)
    monkeypatch.setattr(served, "measured", lambda times: {"allocate": [1.0] * times})
    monkeypatch.setattr(served.signal, "alarm", alarms.append)

    served.case()

    assert alarms == [300, 0, 60, 0]
    assert answers[1:] == [{"answer": {"allocate": [1.0] * 5}}, {"refused": "no request: ['nonsense']"}]


@needs_kvm
def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, out = tmp_path / "script.jsonl", tmp_path / "out.jsonl"
    script.write_text("\n".join(text(SHARED_SLOT)))

    assert main(["uapi", str(script), "--diff", "--record", str(out)]) == 0
    assert capsys.readouterr().out == "5 calls, 0 known quirks, no other difference\n"
    assert main(["uapi", str(out), "--recorded"]) == 0
    assert main(["uapi", str(script), "--live", "--record", str(out)]) == 0
    assert main(["uapi", str(out), "--recorded"]) == 0
    assert main(["uapi", "--live"]) == 0
    assert main(["diff-fuzz", "--steps", "50", "--seed", "2"]) == 0
    capsys.readouterr()
    assert main(["diff-fuzz", "--steps", "50", "--seed", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] >= 50

