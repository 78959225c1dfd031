"""Measured launch: what a verifier expects a TD's MRTD to be, and what a firmware image asks for.

`mrtd` is the verifier's arithmetic, written apart from the module's in `hw` (neither may import the other); a test
holds the two against each other. Sources: TDX module ABI (TDH.MEM.PAGE.ADD, TDH.MR.EXTEND), the TDVF design guide,
edk2 OvmfPkg, QEMU's TDVF loader. All integers little endian.
"""

from __future__ import annotations

import enum
import hashlib
import struct
import uuid
from collections.abc import Iterable, Sequence
from typing import Final

import attrs

from cvmcore.errors import InputError
from cvmcore.types import PAGE_BYTES

CHUNK_BYTES: Final = 256
"""What one MR.EXTEND measures."""


def mrtd(pages: Iterable[tuple[int, bytes, bool]]) -> bytes:
    """The MRTD of an image: SHA-384 over a record per page added, and a record and 256 bytes per chunk extended.

    pages: gpa, content (4096 bytes) and whether it is measured, in the order they are added.
    """
    digest = hashlib.sha384()
    for gpa, page, measured in pages:
        digest.update(struct.pack("<16sQ104x", b"MEM.PAGE.ADD", gpa))
        for at in range(0, PAGE_BYTES if measured else 0, CHUNK_BYTES):
            digest.update(struct.pack("<16sQ104x", b"MR.EXTEND", gpa + at))
            digest.update(page[at : at + CHUNK_BYTES])
    return digest.digest()


# ---- firmware images ------------------------------------------------------------------------------------------

_FOOTER: Final = uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
_OFFSET_ENTRY: Final = uuid.UUID("e47a6535-984a-4798-865e-4685a7bf8ec2").bytes_le
_DESCRIPTOR: Final = uuid.UUID("e9eaf9f3-168e-44d5-a8eb-7f4d8738f6ae").bytes_le
_TAIL: Final = 0x20
"""The GUIDed table ends this far before the end of the image (the reset vector follows it)."""


class SectionType(enum.IntEnum):
    """What a section of the metadata is for; the types that QEMU loads."""

    BFV = 0
    CFV = 1
    TD_HOB = 2
    TEMP_MEM = 3


MR_EXTEND, PAGE_AUG = 1, 2
"""Attributes of a section: its content is measured; its pages are not added but augmented later."""
_WITH_DATA: Final = (SectionType.BFV, SectionType.CFV)


@attrs.frozen
class Section:
    """A section of the TDVF metadata: `data_size` bytes from `data_offset` of the image go to gpa, zeros behind."""

    data_offset: int
    data_size: int
    gpa: int
    size_bytes: int
    type: SectionType
    attributes: int


@attrs.frozen
class Firmware:
    """A TDVF image with its sections, in table order."""

    image: bytes
    sections: Sequence[Section]


def parse_firmware(image: bytes) -> Firmware:
    """Read the TDX metadata of a firmware image. InputError where there is none, or QEMU would refuse it."""
    if len(image) < _TAIL + 18:
        raise InputError(f"a firmware image of {len(image)} bytes has no room for TDX metadata")
    return Firmware(image, _sections(image, _descriptor(image)))


def _descriptor(image: bytes) -> int:
    """Where the TDVF descriptor stands: by the GUIDed table, or as older td-shim images say it."""
    end = len(image) - _TAIL
    if image[end - 16 : end] != _FOOTER:
        return int.from_bytes(image[end : end + 4], "little")
    (length,) = struct.unpack_from("<H", image, end - 18)
    bottom = end - length
    if length < 18 or bottom < 0:
        raise InputError(f"the firmware's table says that it has {length} bytes")
    at = end - 18
    while at > bottom:
        if at - 18 < bottom:
            raise InputError("the firmware's table ends within a record")
        size, name = struct.unpack_from("<H16s", image, at - 18)
        if size < 18 or at - size < bottom:
            raise InputError(f"a record of the firmware's table has {size} bytes")
        if name == _OFFSET_ENTRY:
            if size != 22:
                raise InputError(f"the TDX metadata record has {size} bytes, not 22")
            return len(image) - int(struct.unpack_from("<I", image, at - size)[0])
        at -= size
    raise InputError("the firmware's table has no TDX metadata record: this is no TDVF image")


def _sections(image: bytes, at: int) -> list[Section]:
    if not 16 <= at <= len(image) - 16 or image[at - 16 : at] != _DESCRIPTOR:
        raise InputError("there is no TDVF descriptor where the firmware says")
    signature, length, version, n = struct.unpack_from("<4sIII", image, at)
    if signature != b"TDVF" or version != 1:
        raise InputError(f"the TDVF descriptor has signature {signature!r} and version {version}, not b'TDVF' and 1")
    if n < 2 or length != 16 + 32 * n or at + length > len(image):
        raise InputError(f"the TDVF descriptor has {length} bytes for {n} sections")
    return [_section(image, *struct.unpack_from("<IIQQII", image, at + 16 + 32 * i)) for i in range(n)]


def _section(image: bytes, offset: int, data_size: int, gpa: int, size: int, kind: int, attributes: int) -> Section:
    def bad(why: str) -> InputError:
        return InputError(f"the TDVF section at {gpa:#x} {why}")

    if kind not in SectionType.__members__.values():
        raise bad(f"has type {kind}; a VMM like QEMU loads types 0 to 3")
    if gpa % PAGE_BYTES or size % PAGE_BYTES:
        raise bad("is not whole pages")
    if size < data_size:
        raise bad(f"has {data_size} bytes of data for {size} bytes of memory")
    if (data_size > 0) != (kind in _WITH_DATA):
        raise bad(f"is a {SectionType(kind).name} with {data_size} bytes of data")
    if offset + data_size > len(image):
        raise bad("has data beyond the end of the image")
    return Section(offset, data_size, gpa, size, SectionType(kind), attributes)
