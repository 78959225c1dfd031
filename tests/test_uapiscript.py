"""UAPI scripts: names, numbers, errors with their line, and what the model answers."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from cvmcore.cli import main
from cvmcore.errors import InputError
from cvmcore.modelfront import ModelFront, model_front
from cvmcore.uapiscript import Script, number, runs_of

PRIVATE_SLOT = [
    {"op": "create_vm"},
    {"op": "create_guest_memfd", "size": "64K", "name": "f"},
    {"op": "mmap", "size": "64K", "name": "m"},
    {"op": "set_user_memory_region2", "slot": 0, "gpa": 0, "size": "64K", "hva": "m", "flags": 4, "fd": "f"},
    {"op": "create_vcpu"},
]
SHARED_SLOT = [
    {"op": "create_vm"},
    {"op": "create_guest_memfd", "size": "64K", "flags": 3, "name": "f"},
    {"op": "mmap", "size": "64K", "fd": "f", "name": "m"},
    {"op": "set_user_memory_region2", "slot": 0, "gpa": 0, "size": "64K", "hva": "m", "flags": 4, "fd": "f"},
    {"op": "create_vcpu"},
]


def played(
    lines: list[dict[str, Any]], backend: str = "default", states: bool = False, **how: Any
) -> tuple[list[dict[str, Any]], Script]:
    """Answers without line and op, and the script as it stands."""
    script = Script(model_front(backend, **how))
    found = [answer for answer, _ in script.play_recording(map(json.dumps, lines), "here", states)]
    return [{k: v for k, v in answer.items() if k not in ("line", "op", "why")} for answer in found], script


def only(*lines: dict[str, Any], after: list[dict[str, Any]], **how: Any) -> list[dict[str, Any]]:
    """Answers to the lines behind a beginning that works."""
    found, _ = played([*after, *lines], **how)
    assert all(answer["status"] == "OK" for answer in found[: len(after)]), found
    return found[len(after) :]


def test_guest_and_host_see_one_file() -> None:
    found, script = played([
        *SHARED_SLOT,
        {"op": "guest_write", "gpa": "0x1000", "pages": 2, "stamp": 7},
        {"op": "host_read", "addr": "m", "pages": 4},
        {"op": "guest_read", "gpa": "60K", "pages": 2},
        {"op": "fallocate", "fd": "f", "mode": 3, "offset": "4K", "size": "4K"},
        {"op": "cachestat", "fd": "f"},
    ])  # fmt: skip

    assert found[5:] == [
        {"status": "OK", "done": 2},
        {"status": "OK", "done": 4, "seen": [[0, 1], [7, 2], [0, 1]]},
        {"status": "OK", "done": 1, "seen": [[0, 1]], "exit": {"reason": "MMIO", "gpa": 0x10000, "write": False}},
        {"status": "OK"},
        {"status": "OK", "allocated": 4},
    ]
    assert script.state() == {"f": {"allocated": 4, "pages": [[0, 1], [2, 2], [15, 1]], "content": [[2, 1, 7]]}}


def test_private_by_attribute() -> None:
    """A mismatch cannot come from the guest of such a VM, and an access through an alias can."""
    found = only(
        {"op": "set_memory_attributes", "gpa": 0, "size": "16K", "attributes": 8},
        {"op": "guest_write", "stamp": 5, "pages": 2},
        {"op": "guest_read", "gpa": "8K", "private": False},
        {"op": "pre_fault_memory", "gpa": 0, "size": "8K"},
        {"op": "guest_convert", "private": False, "gpa": 0, "pages": 2},
        {"op": "set_memory_attributes", "gpa": 0, "size": "8K", "attributes": 0},
        {"op": "guest_read", "gfns": [0, 1]},
        after=PRIVATE_SLOT, backend="swprot",
    )  # fmt: skip

    assert found == [
        {"status": "OK"},
        {"status": "OK", "done": 2},
        {"status": "EFAULT", "done": 0, "seen": [],
         "exit": {"reason": "MEMORY_FAULT", "gpa": 0x2000, "size": 4096, "flags": 0}},
        {"status": "OK", "gpa": 0x2000, "size": 0},
        {"status": "OK", "done": 2, "exit": {"reason": "MAP_GPA_RANGE", "gpa": 0, "pages": 2, "private": False}},
        {"status": "OK"},
        {"status": "OK", "done": 2, "seen": [[0, 2]]},
    ]  # fmt: skip


def test_errno_is_the_kernels() -> None:
    found = only(
        {"op": "create_guest_memfd", "size": 5, "name": "g"},
        {"op": "fallocate", "fd": "g", "size": "4K"},
        {"op": "create_vcpu", "name": "other"},
        {"op": "create_vcpu", "id": 4096, "name": "other"},
        {"op": "fallocate", "fd": "f", "offset": "60K", "size": "8K"},
        {"op": "read", "fd": "f"},
        {"op": "lseek", "fd": "f"},
        {"op": "ftruncate", "fd": "f", "size": 0},
        {"op": "mmap", "size": "4K", "fd": "f", "name": "p", "shared": False},
        {"op": "host_read", "addr": "p"},
        {"op": "set_user_memory_region2", "slot": 1, "gpa": "1M", "size": "4K", "flags": 4, "fd": "vm"},
        {"op": "set_user_memory_region2", "slot": 1, "gpa": 0, "size": "4K"},
        {"op": "get_dirty_log", "slot": 7},
        {"op": "set_memory_attributes", "gpa": 0, "size": "4K", "attributes": 8},
        {"op": "check_extension", "vm": "f", "cap": 1},
        after=SHARED_SLOT,
    )  # fmt: skip

    assert [answer["status"] for answer in found] == [
        "EINVAL", "EBADF", "EEXIST", "EINVAL", "EINVAL", "EINVAL", "ESPIPE", "EINVAL", "EINVAL", "EFAULT", "EINVAL",
        "EEXIST", "ENOENT", "ENOTTY", "ENOTTY",
    ]  # fmt: skip


LAST = (1 << 64) - 4096


def test_fields_of_64_bits_have_no_sign() -> None:
    """-4096 is the last page: what ends before it does not wrap. Slot ids have 32 bits; no user has the last page."""
    found = only(
        {"op": "pre_fault_memory", "gpa": 0, "size": -4096},
        {"op": "pre_fault_memory", "gpa": 0, "size": LAST},
        {"op": "pre_fault_memory", "gpa": -8192, "size": 4096},
        {"op": "pre_fault_memory", "gpa": -4096, "size": 4096},
        {"op": "pre_fault_memory", "gpa": 4096, "size": -4096},
        {"op": "set_user_memory_region", "slot": -65536, "gpa": 0, "size": 4096},
        {"op": "set_user_memory_region", "slot": 1, "gpa": -4096, "size": 4096},
        {"op": "set_user_memory_region", "slot": 1, "gpa": "1M", "size": -4096},
        {"op": "set_user_memory_region", "slot": 1, "gpa": "1M", "size": 4096, "hva": (1 << 47) - 4096},
        {"op": "set_user_memory_region", "slot": 1, "gpa": "1M", "size": 4096, "hva": (1 << 47) - 8192},
        {"op": "get_dirty_log", "slot": -65536},
        {"op": "fallocate", "fd": "f", "mode": 3, "offset": (1 << 63) - 4096, "size": 4096},
        {"op": "fallocate", "fd": "f", "mode": 3, "offset": (1 << 63) - 8192, "size": 4096},
        after=SHARED_SLOT, options={"prefault": "no"},
    )  # fmt: skip

    assert [answer["status"] for answer in found] == [
        "EOPNOTSUPP", "EOPNOTSUPP", "EOPNOTSUPP", "EINVAL", "EINVAL", "EINVAL", "EINVAL", "EINVAL", "EINVAL", "OK",
        "EINVAL", "EFBIG", "OK",
    ]  # fmt: skip
    assert [answer["status"] for answer in played(
        [SHARED_SLOT[0], {"op": "set_memory_attributes", "gpa": 0, "size": -4096, "attributes": 8}], backend="swprot"
    )[0]] == ["OK", "ENOMEM"]  # fmt: skip


@pytest.mark.parametrize(("backend", "beyond"), [("default", "ENOENT"), ("swprot", "EFAULT")])
def test_prefault_of_all_there_is(backend: str, beyond: str) -> None:
    """What has a memslot is done, and what is left is said; where the first page has none, it is an error."""
    slot = SHARED_SLOT if backend == "default" else PRIVATE_SLOT
    whole = {"op": "set_memory_attributes", "gpa": 0, "size": "2M", "attributes": 8}
    lines = [{"op": "pre_fault_memory", "gpa": gpa, "size": size} for gpa, size in ((0, -4096), ("1M", 1 << 62))]

    found = played([*slot, *([whole] if backend == "swprot" else []), *lines], backend)[0][-2:]

    assert found == [{"status": "OK", "gpa": 65536, "size": LAST - 65536}, {"status": beyond}]


def test_a_file_may_be_far_larger_than_memory() -> None:
    """Nobody looks through what was never allocated."""
    found = played([
        SHARED_SLOT[0], {"op": "create_guest_memfd", "size": 1 << 50, "flags": 3, "name": "f"},
        {"op": "fstat", "fd": "f"}, {"op": "fallocate", "fd": "f", "mode": 3, "size": 1 << 50},
    ], states=True)[0]  # fmt: skip

    assert found[2]["size"] == 1 << 50
    assert found[3]["state"] == {"f": {"allocated": 0, "pages": [], "content": []}}


def test_capabilities_of_memory() -> None:
    """Of others the model does not say that they are missing."""
    lines = [{"op": "check_extension", "cap": cap} for cap in (10, 81, 231, 232, 233, 234, 244)]

    assert [answer["value"] for answer in played([SHARED_SLOT[0], *lines])[0][1:]] == [32764, 1, 1, 1, 0, 1, 3]
    with pytest.raises(InputError, match="the model knows nothing of capability 1, but of 10, 81"):
        played([SHARED_SLOT[0], {"op": "check_extension", "cap": 1}])


def test_calls_on_another_kind_of_descriptor() -> None:
    """A vCPU's says EINVAL for the VM's calls, the VM's and a file's ENOTTY."""
    found = only(
        {"op": "get_dirty_log", "slot": 0, "vm": "vcpu"},
        {"op": "get_dirty_log", "slot": 0, "vm": "f"},
        {"op": "guest_read", "vcpu": "vm"},
        {"op": "guest_read", "vcpu": "f"},
        after=SHARED_SLOT,
    )

    assert [answer["status"] for answer in found] == ["EINVAL", "ENOTTY", "ENOTTY", "ENOTTY"]


def test_what_the_vfs_says_of_fallocate_first() -> None:
    """A mode that no file has, then the range, then what a guest_memfd has not."""
    far = {"op": "fallocate", "fd": "f", "offset": (1 << 63) - 4096, "size": 4096}
    found = only(*(far | {"mode": mode} for mode in (2, 4, 9, 0, 0x10, 1, 3)), after=SHARED_SLOT)

    assert [answer["status"] for answer in found] == ["EOPNOTSUPP"] * 3 + ["EFBIG"] * 4


@pytest.mark.parametrize(("kernel", "error"), [("6.18", "EINVAL"), ("7.x", "EEXIST")])
def test_kernels_differ(kernel: str, error: str) -> None:
    second = {**SHARED_SLOT[3], "slot": 1, "gpa": "1M"}

    assert played([*SHARED_SLOT, second], kernel=kernel)[0][-1]["status"] == error


def test_vm_lives_as_long_as_anybody_holds_it() -> None:
    """Its vCPUs, its guest_memfd and a mapping of that."""
    found, script = played([
        *SHARED_SLOT,
        {"op": "close", "fd": "vm"},
        {"op": "guest_write", "stamp": 3},
        {"op": "close", "fd": "vcpu"},
        {"op": "close", "fd": "f"},
        {"op": "host_read", "addr": "m"},
        {"op": "munmap", "addr": "m", "size": "64K"},
        {"op": "close", "fd": "vcpu"},
    ])  # fmt: skip

    assert [answer["status"] for answer in found[5:]] == ["OK"] * 6 + ["EBADF"]
    assert found[9]["seen"] == [[3, 1]]
    front = script.front
    assert isinstance(front, ModelFront)
    assert (front.host.frames.in_use, front.host.vms) == (0, [])


def test_slot_outlives_its_file() -> None:
    found = only(
        {"op": "munmap", "addr": "m", "size": "64K"},
        {"op": "close", "fd": "f"},
        {"op": "guest_read", "gpa": "4K"},
        after=SHARED_SLOT,
    )  # fmt: skip

    fault = {"reason": "MEMORY_FAULT", "gpa": 4096, "size": 4096, "flags": 0}
    assert found[2] == {"status": "EFAULT", "done": 0, "seen": [], "exit": fault}


def test_memory_of_the_vmm() -> None:
    found = only(
        {"op": "mmap", "size": "64K", "name": "a"},
        {"op": "host_write", "addr": "a", "pages": 16, "stamp": 9},
        {"op": "munmap", "addr": "a+0x4000", "size": "16K"},
        {"op": "host_read", "addr": "a+8K", "pages": 4},
        {"op": "madvise", "addr": "a", "size": "64K"},
        {"op": "mlock", "addr": "a", "size": "64K"},
        {"op": "mlock", "addr": "a+1", "size": 1},
        {"op": "madvise", "addr": "a", "size": "4K"},
        {"op": "mmap", "size": "8K", "fd": "f", "offset": "60K", "name": "past"},
        {"op": "mlock", "addr": "past", "size": "8K"},
        {"op": "cachestat", "fd": "f"},
        after=SHARED_SLOT,
    )  # fmt: skip

    assert [answer["status"] for answer in found] == [
        "OK", "OK", "OK", "EFAULT", "ENOMEM", "ENOMEM", "OK", "EINVAL", "OK", "ENOMEM", "OK",
    ]  # fmt: skip
    assert (found[3]["seen"], found[-1]["allocated"]) == ([[9, 2]], 1)


@pytest.mark.parametrize(("line", "why"), [
    ({"op": "create_vm", "name": "3"}, "does not begin with a letter"),
    ({"op": "close", "fd": "x"}, "no line before gave a descriptor the name 'x'; there are vm"),
    ({"op": "munmap", "addr": "x", "size": 1}, "no line before gave an address the name 'x'"),
    ({"op": "mmap", "size": "4Q", "name": "m"}, "size: '4Q' is no number"),
    ({"op": "mmap", "size": "4K", "name": "m", "prot": 1}, "mmap has no argument 'prot'; it takes name, size, fd"),
    ({"op": "host_read", "addr": 4097}, "an access begins at a whole page"),
    ({"op": "guest_write", "stamp": -1}, "a stamp has 32 bits"),
    ({"op": "guest_read", "pages": 0, "vcpu": -1}, "pages: 1 to"),
    ({"op": "guest_read", "gfns": [2, 1], "vcpu": -1}, "in ascending order"),
    ({"op": "guest_read", "gfns": [True]}, "'gfns' must be a list, each of it a whole number or null"),
    ({"op": "pre_fault_memory", "gpa": 1 << 64, "size": 1, "vcpu": -1}, "gpa: 18446744073709551616 has more than 64"),
    ({"op": "get_dirty_log", "slot": 1 << 32}, "slot: 4294967296 has more than 32 bits"),
    ({"op": "fallocate", "fd": -1, "size": 1 << 63}, "size: 9223372036854775808 has more than 63 bits"),
    ({"op": "fail_next", "hook": "vm_destroy"}, "'vm_destroy' is no hook that may fail"),
    ({"op": "fail_next", "hook": "vm_init"}, "'' is no errno, as vm_init needs one"),
    ({"op": "fail_next", "hook": "topup", "error": "EWRONG"}, "'EWRONG' is no errno"),
    ({"op": "play"}, "there is no operation 'play' here"),
])  # fmt: skip
def test_bad_lines_are_named(line: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError) as caught:
        played([SHARED_SLOT[0], line])

    assert str(caught.value).startswith("here:2: ")
    assert why in str(caught.value)


def test_the_next_call_of_a_hook_fails() -> None:
    """Once, with an errno or so that it is tried again; and what did not strike yet can be taken back."""
    lines = [
        {"op": "create_vm"},
        {"op": "mmap", "size": "64K", "name": "m"},
        {"op": "create_guest_memfd", "size": "64K", "name": "f"},
        {"op": "set_user_memory_region2", "slot": 0, "flags": 4, "gpa": 0, "size": "64K", "hva": "m", "fd": "f"},
        {"op": "set_memory_attributes", "gpa": 0, "size": "64K", "attributes": 8},
        {"op": "create_vcpu"},
        {"op": "launch_finish"},
        {"op": "fail_next", "hook": "gmem_prepare", "error": "EIO"},
        {"op": "guest_accept", "pages": 4},
        {"op": "guest_accept", "pages": 4},
        {"op": "fail_next", "hook": "gmem_prepare"},
        {"op": "guest_accept", "gpa": "0x8000"},
        {"op": "fail_next", "hook": "memslot_prepare", "error": "ENOMEM"},
        {"op": "fail_next", "hook": ""},
        {"op": "set_user_memory_region2", "slot": 0, "flags": 0, "gpa": 0, "size": 0},
    ]
    found, _ = played(lines, "snp")
    assert [answer["status"] for answer in found[8:]] == ["EIO", "OK", "OK", "EAGAIN", "OK", "OK", "OK"]
    assert (found[8]["exit"]["reason"], found[9]["done"]) == ("MEMORY_FAULT", 4)


def test_fields_of_a_vendors_structure() -> None:
    """Numbers, addresses by name, and bytes as hex:...; bytes come back in the same form."""
    given = {"policy": 0, "uaddr": "m+0x1000", "secret": "hex:00ff"}
    told: list[dict[str, Any]] = []

    class Front:
        def call(self, op: str, arguments: dict[str, Any]) -> dict[str, Any]:
            told.append(arguments)
            return {"status": "OK", "addr": 0x7000} if op == "mmap" else {"status": "OK"}

    script = Script(Front())  # type: ignore[arg-type]
    script.mmap(size="64K", name="m")
    script.memory_encrypt_op("KVM_SEV_ANYTHING", given, vm=3)
    assert told[-1]["arguments"] == {"policy": 0, "uaddr": 0x8000, "secret": b"\x00\xff"}
    for value, why in (("hex:0", "hexadecimal"), ("n", "no line before"), (None, "a field is"), ([1], "a field is")):
        with pytest.raises(InputError, match=why):
            script.memory_encrypt_op("KVM_SEV_ANYTHING", {"x": value}, vm=3)

    lines = [
        {"op": "create_vm"},
        {"op": "mmap", "size": "64K", "name": "m"},
        {"op": "set_user_memory_region", "slot": 0, "gpa": 0, "size": "64K", "hva": "m"},
        {"op": "memory_encrypt_op", "command": "KVM_SEV_LAUNCH_START", "arguments": {"policy": 0}},
        {"op": "memory_encrypt_op", "command": "KVM_SEV_LAUNCH_UPDATE_DATA", "arguments": {"uaddr": "m", "len": "4K"}},
        {"op": "memory_encrypt_op", "command": "KVM_SEV_LAUNCH_MEASURE",
         "arguments": {"len": 48, "nonce": "hex:" + "ab" * 16}},
        {"op": "memory_encrypt_op", "command": "KVM_SEV_LAUNCH_START", "arguments": {"policy": "x+1"}},
    ]  # fmt: skip
    found, _ = played(lines[:-1], "sev")
    assert [answer["status"] for answer in found] == ["OK"] * 6
    blob = found[5]["fields"]["blob"]
    assert found[5]["fields"]["len"] == 48 and blob.startswith("hex:") and blob.endswith("ab" * 16)
    status = {"op": "memory_encrypt_op", "command": "KVM_SEV_GUEST_STATUS"}
    assert played([*lines[:4], status], "sev")[0][4] == {
        "status": "OK", "fields": {"handle": 1, "policy": 0, "state": 1}
    }  # fmt: skip
    with pytest.raises(InputError, match=r"here:7: no line before gave an address the name 'x'"):
        played(lines, "sev")


def test_numbers() -> None:
    assert [number(text, "n") for text in (7, "7", "0x1F", "4K", "2M")] == [7, 7, 31, 4096, 2 << 20]
    assert runs_of([1, 1, 2, 1]) == [[1, 2], [2, 1], [1, 1]]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.jsonl"
    script.write_text("\n".join(map(json.dumps, [*SHARED_SLOT, {"op": "guest_write", "stamp": 1}])))

    assert main(["uapi", str(script), "--state"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {
        "line": 6, "op": "guest_write", "status": "OK", "done": 1,
        "state": {"f": {"allocated": 1, "pages": [[0, 1]], "content": [[0, 1, 1]]}},
    }  # fmt: skip

    assert main(["uapi"]) == 0
    assert "create_guest_memfd" in capsys.readouterr().out
    script.write_text('{"op": "create_vm"}\n{"op": "close"}\n')
    assert main(["uapi", str(script)]) == 2
    assert capsys.readouterr().err == f"cvm: {script}:2: close needs the argument 'fd'\n"


def test_every_line_is_read_when_it_is_wanted() -> None:
    """A script may be endless."""
    def endless() -> Any:
        yield json.dumps({"op": "create_vm"})
        while True:
            yield json.dumps({"op": "close", "fd": -1})

    answers = Script(model_front("default")).play(endless(), "here")

    assert [next(answers)["status"] for _ in range(3)] == ["OK", "EBADF", "EBADF"]
    assert errno.EBADF == 9
