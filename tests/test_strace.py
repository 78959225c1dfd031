"""What strace saw of a VMM, as a UAPI script that the model can be held against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cvmcore.cli import main
from cvmcore.difference import against
from cvmcore.errors import InputError
from cvmcore.modelfront import model_front
from cvmcore.strace import Importer
from cvmcore.uapiscript import Script

DECODED = """\
openat(AT_FDCWD, "/dev/kvm", O_RDWR|O_CLOEXEC) = 3
ioctl(3, KVM_GET_API_VERSION, 0) = 12
ioctl(3, KVM_CREATE_VM, 0)              = 4<anon_inode:kvm-vm>
mmap(NULL, 2097152, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7f0000000000
mmap(NULL, 4096, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7f1000000000
ioctl(4<anon_inode:kvm-vm>, KVM_CREATE_GUEST_MEMFD, {size=1048576, flags=GUEST_MEMFD_FLAG_MMAP|GUEST_MEMFD_FLAG_INIT_SHARED}) = 5<anon_inode:[kvm-gmem]>
ioctl(4, KVM_SET_USER_MEMORY_REGION2, {slot=0, flags=KVM_MEM_GUEST_MEMFD, guest_phys_addr=0, memory_size=1048576, userspace_addr=0x7f0000100000, guest_memfd_offset=0, guest_memfd=5<anon_inode:[kvm-gmem]>}) = 0
[pid   77] ioctl(4, KVM_SET_USER_MEMORY_REGION, {slot=1, flags=KVM_MEM_LOG_DIRTY_PAGES, guest_phys_addr=0x100000, memory_size=4096, userspace_addr=0x7f0000000000} <unfinished ...>
[pid   78] 12:00:01.5 ioctl(4, KVM_CREATE_VCPU, 0) = 6
[pid   77] <... ioctl resumed>) = 0
ioctl(4, KVM_SET_USER_MEMORY_REGION, {slot=2, flags=0, guest_phys_addr=0, memory_size=4096, userspace_addr=0x7f0000000000}) = -1 EEXIST (File exists)
ioctl(6, KVM_RUN, 0) = 0
fallocate(5<anon_inode:[kvm-gmem]>, FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE, 0, 4096) = 0
fallocate(5, FALLOC_FL_KEEP_SIZE, 1048576, 4096) = -1 EINVAL (Invalid argument)
mmap(NULL, 1048576, PROT_READ|PROT_WRITE, MAP_SHARED, 5<anon_inode:[kvm-gmem]>, 0) = 0x7f2000000000
madvise(0x7f0000000000, 2097152, MADV_DONTNEED) = 0
madvise(0x7f0000000000, 2097152, MADV_HUGEPAGE) = 0
ioctl(4, KVM_SET_MEMORY_ATTRIBUTES, {address=0, size=4096, attributes=KVM_MEMORY_ATTRIBUTE_PRIVATE, flags=0}) = -1 ENOTTY (Inappropriate ioctl for device)
munmap(0x7f2000000000, 1048576) = 0
munmap(0x7f1000000000, 4096) = 0
dup(5) = 9
close(5) = 0
close(9) = 0
close(3) = 0
+++ exited with 0 +++
"""  # noqa: E501

OLD = """\
24727 openat(AT_FDCWD, "/dev/kvm", O_RDWR|O_CLOEXEC) = 3
24727 ioctl(3</dev/kvm>, KVM_CREATE_VM, 0) = 6<anon_inode:kvm-vm>
24727 ioctl(6<anon_inode:kvm-vm>, _IOC(_IOC_READ|_IOC_WRITE, 0xae, 0xd4, 0x40), 0x7ffe6f106c90) = 7
24727 mmap(0x100000000000, 65536, PROT_READ|PROT_WRITE, MAP_SHARED|MAP_NORESERVE, 7<anon_inode:[kvm-gmem]>, 0) = 0x100000000000
24727 ioctl(6<anon_inode:kvm-vm>, _IOC(_IOC_WRITE, 0xae, 0x49, 0xa0), 0x7ffe6f106c90) = 0
24727 ioctl(6<anon_inode:kvm-vm>, KVM_CREATE_VCPU, 0) = 8<anon_inode:kvm-vcpu:0>
"""  # noqa: E501


def imported(text: str) -> tuple[list[dict[str, Any]], Importer]:
    found = Importer()
    lines = list(found.lines(text.splitlines(keepends=True), "here"))
    return [json.loads(line) for line in lines if not line.startswith("#")], found


def test_calls_get_names_and_answers() -> None:
    found, _ = imported(DECODED)

    ok = {"answer": {"status": "OK"}}
    assert found[:6] == [
        {"op": "create_vm", "name": "vm1", "type": 0, **ok},
        {"op": "create_guest_memfd", "name": "f1", "size": 1 << 20, "flags": 3, "vm": "vm1", **ok},
        {"op": "mmap", "name": "m1", "size": 2 << 20, **ok},
        {"op": "set_user_memory_region2", "vm": "vm1", "slot": 0, "flags": 4, "gpa": 0, "size": 1 << 20,
         "hva": "m1+0x100000", "offset": 0, "fd": "f1", **ok},
        {"op": "create_vcpu", "name": "vcpu1", "id": 0, "vm": "vm1", **ok},
        {"op": "set_user_memory_region", "vm": "vm1", "slot": 1, "flags": 1, "gpa": 1 << 20, "size": 4096,
         "hva": "m1", **ok},
    ]  # fmt: skip
    assert [(line["op"], line["answer"]["status"]) for line in found[6:]] == [
        ("set_user_memory_region", "EEXIST"), ("fallocate", "OK"), ("fallocate", "EINVAL"), ("mmap", "OK"),
        ("madvise", "OK"), ("set_memory_attributes", "ENOTTY"), ("munmap", "OK"), ("dup", "OK"), ("close", "OK"),
        ("close", "OK"),
    ]  # fmt: skip


def test_the_model_is_held_against_it() -> None:
    """Only what strace saw is compared: the status."""
    lines = list(Importer().lines(DECODED.splitlines(), "here"))

    steps = list(against(Script(model_front("default")), lines, "here"))
    wrong = [line.replace("EEXIST", "EBUSY") for line in lines]
    others = list(against(Script(model_front("default")), wrong, "here"))

    assert [step.differs for step in steps] == [[]] * len(steps)
    assert [step.differs for step in others if step.differs] == [["status"]]


def test_what_an_old_strace_did_not_decode_is_left_out() -> None:
    """And whatever needs it."""
    found, importer = imported(OLD)

    assert [line["op"] for line in found] == ["create_vm", "create_vcpu"]
    assert importer.skipped == {"KVM_CREATE_GUEST_MEMFD": 1, "KVM_SET_USER_MEMORY_REGION2": 1}


def test_copies_of_a_descriptor() -> None:
    """dup, and what libraries use in its place: the file lives until the last one is closed."""
    found, _ = imported(DECODED.replace("dup(5) = 9", "fcntl(5, F_DUPFD_CLOEXEC, 3) = 9\nfcntl(9, F_GETFD) = 1"))

    assert [(line["op"], line["fd"]) for line in found[-3:]] == [("dup", "f1"), ("close", "f1"), ("close", "f2")]
    assert found[-3]["name"] == "f2"


def test_what_strace_cut_short_is_left_out() -> None:
    """A field that is not shown is not 0."""
    short = [
        'openat(AT_FDCWD, "/dev/kvm", O_RDWR) = 3', "ioctl(3, KVM_CREATE_VM, 0) = 4",
        "ioctl(4, KVM_SET_USER_MEMORY_REGION, {slot=1, flags=0, ...}) = 0",
        "ioctl(4, KVM_CREATE_GUEST_MEMFD, {flags=0, ...}) = 5", "ioctl(4, KVM_GET_DIRTY_LOG, {...}) = 0",
    ]  # fmt: skip
    found, importer = imported("\n".join(short))

    assert [line["op"] for line in found] == ["create_vm"]
    assert sum(importer.skipped.values()) == 3


def test_other_programs_and_garbage() -> None:
    assert imported('openat(AT_FDCWD, "/etc/hosts", O_RDONLY) = 3\nclose(3) = 0\nioctl(1, TCGETS, 0x7f) = 0\n')[0] == []
    assert imported("<... ioctl resumed>) = 0\nread(0, \"a,b)\", 4) = 4\nexit_group(0) = ?\n")[0] == []
    with pytest.raises(InputError, match="no line is a system call"):
        imported("some\ntext\n")
    with pytest.raises(InputError, match=r"^\w+:\d+: strace's 'KVM_MEM_WHAT' is no number"):
        imported(DECODED.replace("KVM_MEM_LOG_DIRTY_PAGES", "KVM_MEM_WHAT"))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, script = tmp_path / "strace.txt", tmp_path / "script.jsonl"
    trace.write_text(DECODED)

    assert main(["from-strace", str(trace)]) == 0
    script.write_text(capsys.readouterr().out)
    assert main(["uapi", str(script), "--recorded"]) == 0
    assert capsys.readouterr().out == "16 calls, 0 known quirks, no other difference\n"
    trace.write_text(OLD)
    assert main(["from-strace", str(trace)]) == 0
    assert "1 calls of KVM_CREATE_GUEST_MEMFD were left out" in capsys.readouterr().err
    trace.write_text("close(3) = 0\n")
    assert main(["from-strace", str(trace)]) == 2
    assert "no call of KVM in it" in capsys.readouterr().err
