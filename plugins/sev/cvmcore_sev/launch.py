"""Measured launch, the VMM's side: what a firmware image asks for, save areas, kernel hashes.

The digest itself is the firmware's (`hw`); tests hold it against sev-snp-measure, which is written apart from both.
Sources: OVMF's reset vector table and SEV metadata, QEMU, sev-snp-measure. All integers little endian.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from collections.abc import Mapping, Sequence
from typing import Final

import attrs

from cvmcore.errors import InputError
from cvmcore.types import PAGE_BYTES

FOUR_GIB: Final = 1 << 32
VMSA_GPA: Final = 0xFFFF_FFFF_F000
BSP_EIP: Final = 0xFFFF_FFF0

PAGE_TYPES: Final[Mapping[str, int]] = {
    "normal": 1,
    "vmsa": 2,
    "zero": 3,
    "unmeasured": 4,
    "secrets": 5,
    "cpuid": 6,
}
"""Kinds of image pages and their PAGE_TYPE in SNP_LAUNCH_UPDATE."""


def id_block(ld: bytes, policy: int, *, family: bytes = bytes(16), image: bytes = bytes(16), svn: int = 0) -> bytes:
    """The ID block of an SNP guest, 96 bytes."""
    return struct.pack("<48s16s16sIIQ", ld, family, image, 1, svn, policy)


# ---- vCPUs ----------------------------------------------------------------------------------------------------


def cpu_signature(family: int, model: int, stepping: int) -> int:
    """CPUID leaf 1 EAX of a CPU."""
    high = family << 8 if family <= 15 else 0xF00 | (family - 15) << 20
    return high | (model >> 4) << 16 | (model & 15) << 4 | stepping


CPUS: Final[Mapping[str, int]] = {
    "EPYC": cpu_signature(23, 1, 2),
    "EPYC-Rome": cpu_signature(23, 49, 0),
    "EPYC-Milan": cpu_signature(25, 1, 1),
    "EPYC-Genoa": cpu_signature(25, 17, 0),
    "EPYC-Turin": cpu_signature(26, 0, 0),
}

_SEGMENT: Final = "HHIQ"
Field = tuple[int, str, tuple[int, ...]]
_VMSA_RESET: Final[Mapping[str, Field]] = {
    # name: offset, format, values (segments: selector, attributes, limit, base)
    "es": (0x00, _SEGMENT, (0, 0x93, 0xFFFF, 0)),
    "cs": (0x10, _SEGMENT, (0xF000, 0x9B, 0xFFFF, 0)),
    "ss": (0x20, _SEGMENT, (0, 0x93, 0xFFFF, 0)),
    "ds": (0x30, _SEGMENT, (0, 0x93, 0xFFFF, 0)),
    "fs": (0x40, _SEGMENT, (0, 0x93, 0xFFFF, 0)),
    "gs": (0x50, _SEGMENT, (0, 0x93, 0xFFFF, 0)),
    "gdtr": (0x60, _SEGMENT, (0, 0, 0xFFFF, 0)),
    "ldtr": (0x70, _SEGMENT, (0, 0x82, 0xFFFF, 0)),
    "idtr": (0x80, _SEGMENT, (0, 0, 0xFFFF, 0)),
    "tr": (0x90, _SEGMENT, (0, 0x8B, 0xFFFF, 0)),
    "efer": (0xD0, "Q", (0x1000,)),
    "cr4": (0x148, "Q", (0x40,)),
    "cr0": (0x158, "Q", (0x10,)),
    "dr7": (0x160, "Q", (0x400,)),
    "dr6": (0x168, "Q", (0xFFFF_0FF0,)),
    "rflags": (0x170, "Q", (2,)),
    "rip": (0x178, "Q", (0,)),
    "g_pat": (0x268, "Q", (0x0007_0406_0007_0406,)),
    "rdx": (0x310, "Q", (0,)),
    "sev_features": (0x3B0, "Q", (0,)),
    "xcr0": (0x3E8, "Q", (1,)),
    "mxcsr": (0x408, "I", (0x1F80,)),
    "fcw": (0x410, "H", (0x37F,)),
}
"""A vCPU's save area at reset, as KVM and QEMU make it; zero elsewhere."""

_SVSM_FLAT: Final = (16, 0xC93, 0xFFFF_FFFF, 0)
VMMS: Final[Mapping[str, Mapping[str, tuple[int, ...]]]] = {
    "qemu": {},
    "ec2": {"ss": (0, 0x92, 0xFFFF, 0), "tr": (0, 0x83, 0xFFFF, 0), "rdx": (0x600,), "mxcsr": (0,), "fcw": (0,)},
    "gce": {"g_pat": (0x0007_0106,), "rdx": (0x600,), "mxcsr": (0,), "fcw": (0,)},
    "svsm": {
        "es": _SVSM_FLAT,
        "cs": (8, 0xC9B, 0xFFFF_FFFF, 0),
        "ss": _SVSM_FLAT,
        "ds": _SVSM_FLAT,
        "fs": _SVSM_FLAT,
        "cr0": (0x11,),
        "fcw": (0,),
    },
    "legacy-es-init": {"mxcsr": (0,), "fcw": (0,)},
}
"""What differs from _VMSA_RESET, by VMM. "legacy-es-init": KVM_SEV_ES_INIT leaves the FPU fields zero."""


def vmsa_page(
    *, eip: int = BSP_EIP, signature: int = 0, features: int = 0, vmm: str = "qemu", changes: Mapping[str, int] = {}
) -> bytes:
    """A vCPU's save area (4096 bytes). eip: BSP_EIP, or the AP reset address of the firmware; features: SNP 1, ES 0.

    changes: single-value fields to set otherwise.
    """
    if vmm not in VMMS:
        raise InputError(f"VMM '{vmm}' is none of {', '.join(VMMS)}")
    values: dict[str, tuple[int, ...]] = {name: field[2] for name, field in _VMSA_RESET.items()}
    values |= {"rdx": (signature,), "sev_features": (features,)} | dict(VMMS[vmm])
    if vmm == "svsm":
        values["rip"] = (eip,)
    else:
        values["cs"] = (0xF000, 0x9A if vmm == "ec2" and eip == BSP_EIP else 0x9B, 0xFFFF, eip & 0xFFFF_0000)
        values["rip"] = (eip & 0xFFFF,)
    values |= {name: (value,) for name, value in changes.items()}
    page = bytearray(PAGE_BYTES)
    for name, (offset, form, _) in _VMSA_RESET.items():
        struct.pack_into("<" + form, page, offset, *values[name])
    return bytes(page)


def with_features(page: bytes, features: int) -> bytes:
    """A save area with other `sev_features`."""
    at = _VMSA_RESET["sev_features"][0]
    return page[:at] + struct.pack("<Q", features) + page[at + 8 :]


def vmsa_pages(vcpus: int, ap_eip: int, *, signature: int, features: int, vmm: str = "qemu") -> list[bytes]:
    """The save areas of all vCPUs, the BSP first."""
    bsp = vmsa_page(signature=signature, features=features, vmm=vmm)
    ap = vmsa_page(eip=ap_eip, signature=signature, features=features, vmm=vmm)
    return [bsp] + [ap] * (vcpus - 1)


# ---- kernel hashes ----------------------------------------------------------------------------------------------


def _guid(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


_HASH_TABLE: Final = _guid("9438d606-4f22-4cc9-b479-a793d411fd21")
_CMDLINE: Final = _guid("97d02dd8-bd20-4c94-aa78-e7714d36ab2a")
_INITRD: Final = _guid("44baf731-3a2f-4bd7-9af1-41e29169781d")
_KERNEL: Final = _guid("4de79437-abd2-427f-b835-d5b172d2045b")


def hash_table(kernel: bytes, initrd: bytes = b"", cmdline: str = "") -> bytes:
    """The table of hashes that a VMM puts beside the firmware for a directly booted kernel (176 bytes)."""
    records = b"".join(
        name + struct.pack("<H", 50) + hashlib.sha256(data).digest()
        for name, data in ((_CMDLINE, cmdline.encode() + b"\0"), (_INITRD, initrd), (_KERNEL, kernel))
    )
    return _HASH_TABLE + struct.pack("<H", 168) + records + bytes(8)


# ---- firmware images ----------------------------------------------------------------------------------------------

_FOOTER: Final = "96b582de-1fb2-45f7-baea-a366c55a082d"
_AREA_HASHES: Final = "7255371f-3a3b-4b04-927b-1da6efa8d454"
_RESET_EIP: Final = "00f771de-1a7e-4fcb-890e-68c77e2fb44e"
_SEV_METADATA: Final = "dc886566-984a-4798-a75e-5585a7bf67cc"
_SVSM_START: Final = "a789a612-0597-4c4b-a49f-cbb1fe9d1ddd"

SEC_MEM, SECRETS, CPUID, SVSM_CAA, KERNEL_HASHES = 1, 2, 3, 4, 0x10
SECTIONS: Final[Mapping[int, Mapping[str, str]]] = {
    # section type: VMM -> page kind
    SEC_MEM: {"qemu": "zero", "gce": "unmeasured", "ec2": "zero"},
    SECRETS: {"qemu": "secrets", "gce": "secrets", "ec2": "secrets"},
    CPUID: {"qemu": "cpuid", "gce": "cpuid", "ec2": "cpuid"},
    SVSM_CAA: {"qemu": "zero", "gce": "zero", "ec2": "zero"},
    KERNEL_HASHES: {"qemu": "zero", "gce": "zero", "ec2": "zero"},
}
"""What a VMM makes of a metadata section; a kernel-hashes section becomes a NORMAL page where a kernel is given."""


@attrs.frozen
class Section:
    """A section of the SEV metadata: guest memory that the firmware wants prepared."""

    gpa: int
    size_bytes: int
    type: int


@attrs.frozen
class Firmware:
    """A firmware image (OVMF, or an SVSM) with what its table says. `end`: the gpa that its last byte precedes."""

    image: bytes
    end: int
    table: Mapping[str, bytes]
    sections: Sequence[Section]

    @property
    def gpa(self) -> int:
        return self.end - len(self.image)

    def u32(self, guid: str, what: str) -> int:
        """The number in a table record. InputError where there is none."""
        data = self.table.get(guid, b"")
        if len(data) < 4:
            raise InputError(f"the firmware's table has no {what}")
        return int.from_bytes(data[:4], "little")

    @property
    def reset_eip(self) -> int:
        """Where APs start (SEV-ES and SNP need it)."""
        return self.u32(_RESET_EIP, "AP reset address")

    @property
    def svsm_start(self) -> int:
        """Where an SVSM starts: gpa of the image plus the table's offset."""
        return self.gpa + self.u32(_SVSM_START, "SVSM start offset")

    @property
    def hashes_gpa(self) -> int:
        """Where the table of kernel hashes goes; 0 where the firmware reads none."""
        return self.u32(_AREA_HASHES, "area for kernel hashes") if _AREA_HASHES in self.table else 0


def parse_firmware(image: bytes, end: int = FOUR_GIB) -> Firmware:
    """Read the table at the end of a firmware image. InputError where the image, its table or metadata is broken."""
    if not image or len(image) % PAGE_BYTES:
        raise InputError(f"a firmware image is whole pages of 4096 bytes, this one has {len(image)} bytes")
    table = _parse_table(image)
    return Firmware(image, end, table, _parse_metadata(image, table))


def _parse_table(image: bytes) -> dict[str, bytes]:
    at = len(image) - 32 - 18
    length, name = _record(image, at)
    if name != _FOOTER:
        return {}
    if not 18 <= length <= at + 18:
        raise InputError(f"the firmware's table says that it has {length} bytes")
    bottom = at + 18 - length
    table: dict[str, bytes] = {}
    while at > bottom:
        if at - 18 < bottom:
            raise InputError("the firmware's table ends within a record")
        size, name = _record(image, at - 18)
        if size < 18 or at - size < bottom:
            raise InputError(f"record {name} of the firmware's table has {size} bytes")
        table[name] = image[at - size : at - 18]
        at -= size
    return table


def _record(image: bytes, at: int) -> tuple[int, str]:
    return int.from_bytes(image[at : at + 2], "little"), str(uuid.UUID(bytes_le=image[at + 2 : at + 18]))


def _parse_metadata(image: bytes, table: Mapping[str, bytes]) -> list[Section]:
    if _SEV_METADATA not in table:
        return []
    at = len(image) - int.from_bytes(table[_SEV_METADATA][:4], "little")
    if at < 0 or at + 16 > len(image):
        raise InputError("the offset of the SEV metadata is outside of the image")
    signature, size, version, n = struct.unpack_from("<4sIII", image, at)
    if signature != b"ASEV" or version != 1:
        raise InputError(f"the SEV metadata has signature {signature!r} and version {version}, not b'ASEV' and 1")
    if at + 16 + 12 * n > len(image) or size < 16 + 12 * n:
        raise InputError(f"the SEV metadata has no room for its {n} sections")
    sections = [Section(*struct.unpack_from("<III", image, at + 16 + 12 * i)) for i in range(n)]
    for section in sections:
        if section.type not in SECTIONS:
            raise InputError(f"SEV metadata section at {section.gpa:#x} has the unknown type {section.type}")
        if section.gpa % PAGE_BYTES or section.size_bytes % PAGE_BYTES:
            raise InputError(f"SEV metadata section at {section.gpa:#x} is not whole pages")
    return sections
