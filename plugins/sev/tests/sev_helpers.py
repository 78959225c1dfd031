"""RMP entries in every state, made by the operations that make them, and firmware images; shared by the tests."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Sequence

import numpy as np

from cvmcore.measured import Load
from cvmcore.memory import Memory
from cvmcore.pages import Sel, run
from cvmcore.types import PG_LEVEL_2M, PG_LEVEL_4K
from cvmcore_sev.errors import PageState
from cvmcore_sev.hw import Rmp, SevHardware, extend_launch_digest, page_contents
from cvmcore_sev.launch import PAGE_TYPES

NR_FRAMES = 8 * 512 + 100
"""The last region is covered in part only."""


def hardware(**firmware: object) -> SevHardware:
    return SevHardware(Memory(NR_FRAMES), **firmware)


def make(hw: SevHardware, state: PageState, pfn: int, *, gfn: int = 0, asid: int = 1, level: int = PG_LEVEL_4K) -> None:
    """Bring one page of `level` into a state, from Hypervisor."""
    rmp, psp, page = hw.rmp, hw.psp, run(pfn, 1)

    def update(assigned: bool = True, asid: int = 0, immutable: bool = False, gfn: int = 0) -> None:
        done = rmp.rmpupdate(page, gfn, assigned=assigned, asid=asid, level=level, immutable=immutable)
        assert done.done == 1, done

    if state == PageState.HV_FIXED:
        assert psp.snp_page_set_state(page).done == 1
    elif state in (PageState.FIRMWARE, PageState.CONTEXT, PageState.RECLAIM, PageState.METADATA):
        update(immutable=True)
        if state == PageState.CONTEXT:
            assert psp.snp_gctx_create(pfn) == 0
        elif state == PageState.RECLAIM:
            assert psp.snp_page_reclaim(page, level).done == 1
        elif state == PageState.METADATA:
            rmp.gfn[pfn] = gfn or 0x77  # MD_INIT is not modelled: the firmware writes the owner's address
    elif state == PageState.PRE_GUEST:
        update(asid=asid, immutable=True, gfn=gfn)
    elif state in (PageState.GUEST_INVALID, PageState.GUEST_VALID, PageState.PRE_SWAP):
        update(asid=asid, gfn=gfn)
        if state != PageState.GUEST_INVALID:
            gfns = run(gfn, 1, 512 if level == PG_LEVEL_2M else 1)
            answer = rmp.pvalidate(page, gfns, asid=asid, validate=True, level=level)
            assert not np.count_nonzero(answer)
        if state == PageState.PRE_SWAP:
            update(asid=asid, gfn=gfn, immutable=True)
    assert int(rmp.state(page)[0]) == state


def snapshot(rmp: Rmp) -> dict[str, object]:
    """All that can be seen of an RMP."""
    everything: Sel = run(0, rmp.covered)
    entries = rmp.rmpread(everything)
    perms = rmp._perms_of(np.arange(rmp.covered))
    return {
        "word": rmp.word[: rmp.covered].tolist(),
        "gfn": entries.gfn.tolist(),
        "perms": perms.tolist(),
        "asid_pages": rmp.asid_pages.tolist(),
        "nr_assigned": rmp.nr_assigned,
    }


# ---- firmware images ----------------------------------------------------------------------------------------------

FOOTER = "96b582de-1fb2-45f7-baea-a366c55a082d"
HASHES = "7255371f-3a3b-4b04-927b-1da6efa8d454"
RESET = "00f771de-1a7e-4fcb-890e-68c77e2fb44e"
METADATA = "dc886566-984a-4798-a75e-5585a7bf67cc"
SVSM = "a789a612-0597-4c4b-a49f-cbb1fe9d1ddd"


def record(name: str, data: bytes, length: int | None = None) -> bytes:
    size = len(data) + 18 if length is None else length
    return data + struct.pack("<H", size) + uuid.UUID(name).bytes_le


def firmware(
    sections: Sequence[tuple[int, int, int]] = (),
    *,
    hashes: int = 0x80FC00,
    signature: bytes = b"ASEV",
    version: int = 1,
    npages: int = 4,
    more: bytes = b"",
) -> bytes:
    """An image with a table and SEV metadata, as OVMF lays them out."""
    body = b"".join(struct.pack("<III", *section) for section in sections)
    metadata = struct.pack("<4sIII", signature, 16 + len(body), version, len(sections)) + body
    at = 0x800
    records = more + record(HASHES, struct.pack("<II", hashes, 0x400)) + record(RESET, struct.pack("<I", 0x80B004))
    size = npages * 4096
    records += record(METADATA, struct.pack("<I", size - at)) + record(SVSM, struct.pack("<I", 0x10))
    table = records + record(FOOTER, b"", len(records) + 18)
    image = bytearray(i * 7 & 0xFF for i in range(size))
    image[at : at + len(metadata)] = metadata
    image[size - 32 - len(table) : size - 32] = table
    return bytes(image)


ALL_SECTIONS = [
    (0x800000, 0x2000, 1),
    (0x80D000, 0x1000, 2),
    (0x80E000, 0x1000, 3),
    (0x80F000, 0x1000, 4),
    (0x810000, 0x1000, 0x10),
]


def snp_digest(steps: Sequence[Load]) -> bytes:
    """LD by the firmware's arithmetic."""
    ld = bytes(48)
    for step in steps:
        page_type = PAGE_TYPES[step.kind]
        data = step.contents.ljust(step.size_bytes, b"\0")
        for at in range(0, step.size_bytes, 4096):
            gpa = step.gpa + at
            ld = extend_launch_digest(ld, page_contents(data[at : at + 4096], page_type), page_type, gpa)
    return ld
