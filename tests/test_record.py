"""`cvm record`: tracepoints of a real VM, accesses of a real program; and what is missing is said."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from cvmcore.cli import main
from cvmcore.errors import InputError
from cvmcore.live.probe import probe
from cvmcore.record import TRACEFS, record_vm

NO_VM = probe().why or ("" if (TRACEFS / "instances").is_dir() else f"no tracefs at {TRACEFS}, or not root")
NO_VALGRIND = "" if shutil.which("valgrind") else "valgrind is not installed"


@pytest.mark.skipif(bool(NO_VM), reason=NO_VM or "-")
def test_faults_of_a_real_vm_replay(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script, trace = tmp_path / "script.jsonl", tmp_path / "vm.trace"
    lines = [
        {"op": "create_vm"},
        {"op": "create_guest_memfd", "size": "1M", "flags": 3, "name": "f"},
        {"op": "set_user_memory_region2", "slot": 0, "gpa": 0, "size": "1M", "flags": 4, "fd": "f"},
        {"op": "create_vcpu"},
        {"op": "guest_write", "pages": 100, "stamp": 1},
        {"op": "fallocate", "fd": "f", "mode": 3, "size": "40K"},
        {"op": "guest_read", "gpa": "1M"},
    ]
    script.write_text("\n".join(map(json.dumps, lines)))

    command = [sys.executable, "-m", "cvmcore.cli", "uapi", str(script), "--live"]
    assert main(["record", "-o", str(trace), "--", *command]) == 0
    assert "events in" in capfd.readouterr().out
    text = trace.read_text()
    for event in ("kvm_mmu_set_spte", "mm_filemap_add_to_page_cache", "kvm_userspace_exit", "sys_fallocate"):
        assert event in text, event
    assert not list((TRACEFS / "instances").glob(f"cvm-{os.getpid()}"))
    mapped = {int(gfn, 16) for gfn in re.findall(r"kvm_mmu_set_spte: gfn ([0-9a-f]+) ", text)}
    assert mapped >= set(range(100))
    assert main(["run", "trace", str(trace), "--backend", "default"]) == 0


@pytest.mark.skipif(bool(NO_VALGRIND), reason=NO_VALGRIND or "-")
def test_accesses_of_a_program_replay(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "program.trace"

    assert main(["record", "--lackey", "-o", str(trace), "--", "true"]) == 0
    assert "events in" in capfd.readouterr().out
    assert main(["run", "trace", str(trace), "--backend", "default"]) == 0


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no tracefs at"):
        record_vm(["true"], tmp_path / "out", tmp_path)
    (tmp_path / "instances").mkdir()
    with pytest.raises(InputError, match="'no-such-command' is not there"):
        record_vm(["no-such-command"], tmp_path / "out", tmp_path)
    with pytest.raises(InputError, match="this kernel has no tracepoints of KVM"):
        record_vm(["true"], tmp_path / "out", tmp_path)
    assert list((tmp_path / "instances").iterdir()) == []
    monkeypatch.setattr("cvmcore.record.shutil.which", lambda name: None)
    assert main(["record", "--lackey", "-o", str(tmp_path / "out"), "--", "true"]) == 2


def test_a_command_that_cannot_be_recorded_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an event cannot be switched on."""
    (tmp_path / "instances").mkdir()

    def made(instance: Path) -> None:
        os.makedirs(instance / "options")
        os.makedirs(instance / "events/kvm/kvm_page_fault/enable")

    monkeypatch.setattr(Path, "mkdir", made)
    monkeypatch.setattr(Path, "rmdir", shutil.rmtree)

    with pytest.raises(InputError, match=r"kvm_page_fault/enable: Is a directory"):
        record_vm(["touch", str(tmp_path / "ran")], tmp_path / "out", tmp_path)
    assert not (tmp_path / "ran").exists()
    assert list((tmp_path / "instances").iterdir()) == []
