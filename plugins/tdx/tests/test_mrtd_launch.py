"""`cvm launch --backend tdx`: the calls of a VMM, the MRTD that comes of them, and steps."""

from __future__ import annotations

import hashlib
import json
import struct
import uuid
from pathlib import Path
from typing import Any

import pytest

from cvmcore.cli import main
from cvmcore.errors import InputError, UapiError
from cvmcore.guest import Machine
from cvmcore.host import Host
from cvmcore.measured import launch
from cvmcore.runner import load_profile_for
from cvmcore_tdx.launch import mrtd, parse_firmware
from cvmcore_tdx.launcher import TDX as LAUNCHER
from cvmcore_tdx.launcher import launch_steps, pages
from cvmcore_tdx.ops import TDX

OVMF = Path("/usr/share/ovmf/OVMF.fd")
SECTIONS = (
    # data offset, data size, gpa, size, type, attributes
    (0x1000, 0x2000, 0xFFFF_D000, 0x2000, 0, 1),  # BFV, measured
    (0x0000, 0x1000, 0xFFFF_C000, 0x1000, 1, 0),  # CFV
    (0, 0, 0x80_0000, 0x2000, 3, 0),  # temporary memory
    (0, 0, 0x80_9000, 0x1000, 2, 0),  # hand-off block
    (0, 0, 0x90_0000, 0x1000, 3, 2),  # augmented later
)


def small() -> bytes:
    """An image of four pages: content, and the metadata in the last one."""
    data = bytearray(i * 31 + i // 256 & 0xFF for i in range(0x4000))
    rows = b"".join(struct.pack("<IIQQII", *section) for section in SECTIONS)
    head = struct.pack("<4sIII", b"TDVF", 16 + len(rows), 1, len(SECTIONS))
    descriptor = uuid.UUID("e9eaf9f3-168e-44d5-a8eb-7f4d8738f6ae").bytes_le + head + rows
    data[0x3000 - 16 : 0x3000 - 16 + len(descriptor)] = descriptor
    entry = struct.pack("<IH", 0x1000, 22) + uuid.UUID("e47a6535-984a-4798-865e-4685a7bf8ec2").bytes_le
    footer = struct.pack("<H", len(entry) + 18) + uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
    data[0x4000 - 0x20 - len(entry) - 18 : 0x4000 - 0x20] = entry + footer
    return bytes(data)


def expected(image: bytes) -> str:
    """By the verifier's arithmetic."""
    return mrtd(pages(launch_steps(parse_firmware(image)))).hex()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "small.fd"
    path.write_bytes(small())
    return path


def added(gpa: int) -> bytes:
    return b"MEM.PAGE.ADD".ljust(16, b"\0") + struct.pack("<Q", gpa) + bytes(104)


def extended(gpa: int, content: bytes) -> bytes:
    return b"".join(
        b"MR.EXTEND".ljust(16, b"\0") + struct.pack("<Q", gpa + at) + bytes(104) + content[at : at + 256]
        for at in range(0, len(content), 256)
    )


REST = b"".join(added(gpa) for gpa in (0xFFFF_C000, 0x80_0000, 0x80_1000, 0x80_9000))


def test_per_page(image: Path) -> None:
    """Each page of the measured section: ADD, then its 16 EXTENDs. By hand, and by the verifier's arithmetic."""
    done = launch("tdx", image, {})

    pages = small()[0x1000:0x3000]
    first, second = pages[:4096], pages[4096:]
    stream = added(0xFFFF_D000) + extended(0xFFFF_D000, first) + added(0xFFFF_E000) + extended(0xFFFF_E000, second)
    assert done.digest == hashlib.sha384(stream + REST).hexdigest()
    assert done.digest == expected(small())
    assert done.counts() == {"MEM.PAGE.ADD": 6, "MR.EXTEND": 32}
    assert [(s.type, s.gpa) for s in done.steps[:2]] == [("MEM.PAGE.ADD", 0xFFFF_D000), ("MR.EXTEND", 0xFFFF_D000)]
    assert done.steps[0].digest == hashlib.sha384(added(0xFFFF_D000)).hexdigest()


def test_two_pass(image: Path) -> None:
    """All ADDs of the section, then all its EXTENDs: another MRTD."""
    done = launch("tdx", image, {"order": "two-pass", "vcpus": "3"})

    pages = small()[0x1000:0x3000]
    stream = added(0xFFFF_D000) + added(0xFFFF_E000) + extended(0xFFFF_D000, pages)
    assert done.digest == hashlib.sha384(stream + REST).hexdigest()
    assert done.digest != launch("tdx", image, {}).digest
    assert launch("tdx", image, {"vcpus": "7"}).digest == launch("tdx", image, {}).digest


def test_debians_ovmf() -> None:
    if not OVMF.exists():
        pytest.skip("the package ovmf is not installed")
    try:
        digest = expected(OVMF.read_bytes())
    except InputError as error:
        pytest.skip(f"the ovmf of this machine has no TDX metadata: {error}")

    assert launch("tdx", OVMF, {}).digest == digest


def test_command(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = tmp_path / "steps.jsonl"
    assert main(["launch", str(image), "--backend", "tdx", "--steps", str(steps), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["digest"] == expected(small())
    assert len(steps.read_text().splitlines()) == 38

    assert main(["launch", str(image), "--backend", "tdx", "--order", "two-pass", "--against", str(steps)]) == 1
    assert "step 2 differs: MEM.PAGE.ADD at 0xffffe000" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "why"), [
    (["--kernel", "x"], "the launch of tdx has no option 'kernel'"),
    (["--vcpus", "0"], "0 vCPUs: it must be 1 to 4096"),
    (["--order", "backwards"], "'backwards' is none of per-page, two-pass"),
])  # fmt: skip
def test_bad_options(image: Path, given: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", str(image), "--backend", "tdx", *given]) == 2
    assert why in capsys.readouterr().err


def test_bad_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none.fd"
    path.write_bytes(bytes(0x4000))
    assert main(["launch", str(path), "--backend", "tdx"]) == 2
    assert "no TDVF descriptor" in capsys.readouterr().err
    assert {option.name for option in LAUNCHER.options} == {"vcpus", "order"}


@pytest.mark.parametrize("arguments", [
    {"gpa": 5, "nr_pages": 1}, {"gpa": 0, "nr_pages": 0}, {"gpa": 0, "nr_pages": 1, "flags": 1},
    {"gpa": 0x5000, "nr_pages": 1},
])  # fmt: skip
def test_extend_memory_refuses(arguments: dict[str, Any]) -> None:
    """EINVAL for what is none; EIO where the page was not added."""
    machine = Machine(Host(TDX, load_profile_for(TDX, None), nr_frames=1 << 12), 1 << 20)
    with pytest.raises(UapiError) as caught:
        machine.vm.memory_encrypt_op("KVM_TDX_EXTEND_MEMORY", arguments)
    assert caught.value.errno == (5 if arguments["gpa"] == 0x5000 else 22)
