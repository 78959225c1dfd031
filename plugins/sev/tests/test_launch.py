"""Launch digests: the reference's self-checks, image parsing, the order of a launch."""

from __future__ import annotations

import hashlib
import struct

import pytest
from sev_helpers import ALL_SECTIONS, RESET, firmware, record, snp_digest

from cvmcore.errors import InputError
from cvmcore.measured import Load
from cvmcore_sev import launch
from cvmcore_sev.hw import measurement, page_contents
from cvmcore_sev.launcher import sev_steps, snp_steps, svsm_steps

# ---- self-checks (reference, section 7.5; cumulative) --------------------------------------------------------------

ROME_VMSA = launch.vmsa_page(signature=0x830F10, features=1)
SELF_CHECK = [
    (
        [Load("normal", 0x1000, 4096, b"\xaa" * 4096)],
        "83f2b12dec4ffc7a903475c06f60c3a229e45e61ad87e4f775f0cc95cea53ade2911f84e1205ddfa14df9bf20bf3f0c3",
    ),
    (
        [Load("zero", 0x2000, 4096), Load("secrets", 0x3000, 4096), Load("cpuid", 0x4000, 4096)],
        "2577db5761b57113e55c4749c1eb761c4ede421a8a7bdd0fad124d033b08f97a6786b601d4c9ea63a1af3e4b52640f17",
    ),
    (
        [Load("vmsa", launch.VMSA_GPA, 4096, ROME_VMSA)],
        "85783c8317a069936df3e9a93494a7b65019d60c6e588f6b4b45ff884a6fd0aff2eeb7f895c681bd04d77425ca3bcecc",
    ),
]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_snp_digest_self_check(rows):
    steps = [step for some, _ in SELF_CHECK[:rows] for step in some]
    assert snp_digest(steps).hex() == SELF_CHECK[rows - 1][1]


def test_vmsa_self_check():
    expected = "718b5a4ceec53b588ac097f562abb9988d3ad36fa149396e2f64af76309016dc"
    assert hashlib.sha256(ROME_VMSA).hexdigest() == expected


def test_hash_table_self_check():
    table = launch.hash_table(b"K", b"", "a")
    assert len(table) == 176
    assert hashlib.sha256(table).hexdigest() == "d7ec8d6103bb550e2e57ec74eeb0ad67aa0e0094162de715da5d7f67257253d9"


def test_measurement_self_check():
    blob = measurement(b"\x11" * 16, (1, 51), 3, 5, bytes(range(32)), bytes(16))
    assert blob[:32].hex() == "25693d01e9221b6be78e78649e5051f02b9a731ed30fb99c638ea083fe5b6d97"
    assert blob[32:] == bytes(16)


def test_a_vmsa_is_measured_without_its_tsc_fields():
    changed = ROME_VMSA[:0x2F0] + b"\xff" * 16 + ROME_VMSA[0x300:]
    assert page_contents(changed, 2) == page_contents(ROME_VMSA, 2)


# ---- vCPUs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpu", "signature"),
    [
        ("EPYC", 0x800F12),
        ("EPYC-Rome", 0x830F10),
        ("EPYC-Milan", 0xA00F11),
        ("EPYC-Genoa", 0xA10F10),
        ("EPYC-Turin", 0xB00F00),
    ],
)
def test_cpu_signatures(cpu, signature):
    assert launch.CPUS[cpu] == signature
    assert launch.cpu_signature(6, 15, 8) == 0x6F8


def field(page, offset, form):
    return struct.unpack_from("<" + form, page, offset)


@pytest.mark.parametrize(
    ("vmm", "eip", "offset", "form", "values"),
    [
        ("qemu", launch.BSP_EIP, 0x10, "HHIQ", (0xF000, 0x9B, 0xFFFF, 0xFFFF0000)),
        ("qemu", 0x80B004, 0x10, "HHIQ", (0xF000, 0x9B, 0xFFFF, 0x800000)),
        ("qemu", 0x80B004, 0x178, "Q", (0xB004,)),
        ("qemu", launch.BSP_EIP, 0x90, "HHIQ", (0, 0x8B, 0xFFFF, 0)),
        ("qemu", launch.BSP_EIP, 0x408, "IIH", (0x1F80, 0, 0x37F)),
        ("ec2", launch.BSP_EIP, 0x10, "HH", (0xF000, 0x9A)),
        ("ec2", 0x80B004, 0x10, "HH", (0xF000, 0x9B)),
        ("ec2", launch.BSP_EIP, 0x20, "HH", (0, 0x92)),
        ("ec2", launch.BSP_EIP, 0x90, "HH", (0, 0x83)),
        ("ec2", launch.BSP_EIP, 0x310, "Q", (0x600,)),
        ("ec2", launch.BSP_EIP, 0x408, "IIH", (0, 0, 0)),
        ("gce", launch.BSP_EIP, 0x268, "Q", (0x00070106,)),
        ("gce", launch.BSP_EIP, 0x310, "Q", (0x600,)),
        ("legacy-es-init", launch.BSP_EIP, 0x408, "IIH", (0, 0, 0)),
        ("svsm", 0x1234567, 0x10, "HHIQ", (8, 0xC9B, 0xFFFFFFFF, 0)),
        ("svsm", 0x1234567, 0x50, "HHIQ", (0, 0x93, 0xFFFF, 0)),
        ("svsm", 0x1234567, 0x178, "Q", (0x1234567,)),
        ("svsm", 0x1234567, 0x158, "Q", (0x11,)),
        ("svsm", 0x1234567, 0x408, "IIH", (0x1F80, 0, 0)),
    ],
)
def test_vmsa_fields(vmm, eip, offset, form, values):
    assert field(launch.vmsa_page(eip=eip, signature=7, vmm=vmm), offset, form) == values


def test_vmsa_refuses_an_unknown_vmm():
    with pytest.raises(InputError, match="VMM 'xen' is none of qemu, ec2"):
        launch.vmsa_page(vmm="xen")


def test_one_vmsa_for_each_vcpu_the_bsp_first():
    bsp, *aps = launch.vmsa_pages(3, 0x80B004, signature=7, features=1)
    assert field(bsp, 0x178, "Q") == (0xFFF0,) and [field(ap, 0x178, "Q") for ap in aps] == [(0xB004,)] * 2


# ---- images ------------------------------------------------------------------------------------------------------

def test_parse_firmware():
    image = launch.parse_firmware(firmware(ALL_SECTIONS))
    assert image.gpa == (1 << 32) - 4 * 4096
    assert (image.reset_eip, image.hashes_gpa, image.svsm_start) == (0x80B004, 0x80FC00, image.gpa + 0x10)
    assert [(s.gpa, s.size_bytes, s.type) for s in image.sections] == ALL_SECTIONS


def test_an_image_without_a_table():
    image = launch.parse_firmware(bytes(4096))
    assert (image.sections, image.table, image.hashes_gpa) == ([], {}, 0)
    with pytest.raises(InputError, match="no AP reset address"):
        _ = image.reset_eip


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "whole pages"),
        (bytes(4095), "whole pages"),
        (firmware([(0x1000, 0x1000, 9)]), "unknown type 9"),
        (firmware([(0x1800, 0x1000, 1)]), "not whole pages"),
        (firmware(signature=b"ASEW"), "signature b'ASEW'"),
        (firmware(version=2), "version 2"),
        (firmware(more=record(RESET, b"", 17)), "has 17 bytes"),
        (firmware(more=record(RESET, b"", 60000)), "has 60000 bytes"),
    ],
)
def test_a_broken_image_is_refused(image, message):
    with pytest.raises(InputError, match=message):
        launch.parse_firmware(image)


@pytest.mark.parametrize(
    ("vmm", "kinds"),
    [
        ("qemu", ["normal", "zero", "secrets", "cpuid", "zero", "zero", "vmsa", "vmsa"]),
        ("gce", ["normal", "unmeasured", "secrets", "cpuid", "zero", "zero", "vmsa", "vmsa"]),
        ("ec2", ["normal", "zero", "secrets", "zero", "zero", "cpuid", "vmsa", "vmsa"]),
    ],
)
def test_steps_of_an_snp_launch(vmm, kinds):
    image = launch.parse_firmware(firmware(ALL_SECTIONS))
    steps = snp_steps(image, [bytes(4096)] * 2, vmm=vmm)
    assert [step.kind for step in steps] == kinds
    assert [step.size_bytes for step in steps if step.gpa == 0x800000] == [0x2000]


def test_kernel_hashes_become_a_measured_page():
    image = launch.parse_firmware(firmware(ALL_SECTIONS))
    table = launch.hash_table(b"kernel")
    page = next(s for s in snp_steps(image, [], hashes=table) if s.gpa == 0x810000)
    assert page.kind == "normal" and page.contents == bytes(0xC00) + table + bytes(4096 - 0xC00 - 176)


def test_kernel_hashes_need_a_place():
    image = launch.parse_firmware(firmware(ALL_SECTIONS[:4], hashes=0))
    with pytest.raises(InputError, match="no section for its hashes"):
        snp_steps(image, [], hashes=b"h")
    with pytest.raises(InputError, match="no place for its hashes"):
        sev_steps(image, b"h")
    with pytest.raises(InputError, match="VMM 'xen'"):
        snp_steps(image, [], vmm="xen")


def test_sev_measures_the_image_and_then_the_hashes_where_the_firmware_reads_them():
    image = launch.parse_firmware(firmware())
    table = launch.hash_table(b"kernel")
    assert sev_steps(image, table) == [
        (image.gpa, image.image),
        (0x80FC00, table),
    ]
    assert sev_steps(image) == sev_steps(image, table)[:1]


def test_steps_with_an_svsm():
    image = launch.parse_firmware(firmware(ALL_SECTIONS))
    svsm = launch.parse_firmware(firmware([(0x1000, 0x1000, 2)], npages=2), end=image.gpa - 0x1000)
    steps = svsm_steps(image, svsm, [bytes(4096)])
    assert [(s.kind, s.gpa) for s in steps] == [
        ("normal", image.gpa),
        ("normal", image.gpa - 0x1000 - 2 * 4096),
        ("secrets", 0x1000),
        ("vmsa", launch.VMSA_GPA),
    ]


def test_id_block():
    block = launch.id_block(b"d" * 48, 0x30000, svn=7)
    assert len(block) == 96 and block[:48] == b"d" * 48
    assert struct.unpack_from("<IIQ", block, 80) == (1, 7, 0x30000)
