"""Sections 6 and 7.3: MRTD by the module, by the verifier, and by hand; firmware images."""

from __future__ import annotations

import hashlib
import struct
import uuid
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvmcore.effects import drain
from cvmcore.errors import InputError
from cvmcore.measured import Load
from cvmcore.pages import run
from cvmcore_tdx.errors import describe
from cvmcore_tdx.launch import SectionType, mrtd, parse_firmware
from cvmcore_tdx.launcher import launch_steps, pages

EMPTY = "38b060a751ac96384cd9327eb1b1e36a21fdb71114be07434c0cc7bf63f6e1da274edebfe76f65fbd51ad2f14898b95b"
ADDED = "8f3e9a8aca6784eab874f7aa4dda5d49104a88047f1f86695ef2a88f5691a90e34aac48ce45ffa1f5a23c7d62980d570"
ZEROS = "236f0efa607ff8843f1855d7ef80dc3dda8fb455787a186b8787212951eab0096e3193bb26f817c2b63c21f5e10f9938"
COUNTED = "15a8464628b6214951c4a1b57775507dd950263654e8790e257995b45013c84aba1d87a3bcbc1929b5f7db6d3e92cad6"
COUNTING = bytes(i & 0xFF for i in range(4096))

CASES = [
    ([], EMPTY),
    ([Load("unmeasured", 0, 4096)], ADDED),
    ([Load("normal", 0, 4096)], ZEROS),
    ([Load("normal", 0x1000, 4096, COUNTING)], COUNTED),
]


def load(world: Any, steps: list[Load]) -> bytes:
    """Put the steps into a TD of the module, and finalise it."""
    m, tdr = world.module, world.tdr
    source, pfn = 500, 600
    for gpa, page, measured in pages(steps):
        gfn = gpa >> 12
        world.tables(gfn)
        m.memory.write(run(source, 1), m.memory.intern(page), 0)
        world.done(m.tdh_mem_page_add(tdr, run(gfn, 1), run(pfn, 1), run(source, 1)), 1)
        if measured:
            world.done(m.tdh_mr_extend(tdr, gpa, 16), 16)
        pfn += 1
    world.ok(m.tdh_mr_finalize(tdr))
    digest: bytes = world.td.mrtd
    return digest


@pytest.mark.parametrize(("steps", "expected"), CASES)
def test_self_check_values(world: Any, steps: list[Load], expected: str) -> None:
    """The reference's values, by the verifier and by the module."""
    world.init()
    world.vcpu()

    assert mrtd(pages(steps)).hex() == expected
    assert load(world, steps).hex() == expected


def test_bytes_of_a_page() -> None:
    """A fully measured page is 6272 bytes of stream."""
    stream = b""
    for kind, gpa, content in [(b"MEM.PAGE.ADD", 0x7000, b"")] + [
        (b"MR.EXTEND", 0x7000 + i * 256, COUNTING[i * 256 : (i + 1) * 256]) for i in range(16)
    ]:
        stream += kind.ljust(16, b"\0") + struct.pack("<Q", gpa) + bytes(104) + content

    assert len(stream) == 6272
    assert mrtd(pages([Load("normal", 0x7000, 4096, COUNTING)])) == hashlib.sha384(stream).digest()


IMAGES = st.lists(
    st.tuples(st.integers(0, 30), st.binary(max_size=40), st.booleans()), max_size=6, unique_by=lambda page: page[0]
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(image=IMAGES)
def test_module_and_verifier_agree(new_world: Any, image: list[tuple[int, bytes, bool]]) -> None:
    """Any image, in any order, measured or not."""
    world = new_world().init()
    world.vcpu()
    steps = [Load("normal" if measured else "unmeasured", gfn << 12, 4096, data) for gfn, data, measured in image]

    assert load(world, steps) == mrtd(pages(steps))


def test_order_counts(new_world: Any) -> None:
    """Two pages in the other order are another image."""
    steps = [Load("unmeasured", 0, 4096), Load("unmeasured", 0x1000, 4096)]

    assert mrtd(pages(steps)) != mrtd(pages(steps[::-1]))


def test_failed_calls_and_tables_are_not_measured(world: Any) -> None:
    """Only what succeeded, and only ADD and EXTEND."""
    world.build()
    m, tdr = world.module, world.tdr
    world.done(m.tdh_mem_page_add(tdr, run(0, 1), run(60, 1), run(61, 1)), 1)
    assert m.tdh_mem_page_add(tdr, run(0, 1), run(62, 1), run(61, 1)).done == 0
    assert describe(m.tdh_mr_extend(tdr, 0x5000).status) == "TDX_EPT_ENTRY_NOT_PRESENT|RCX"
    assert describe(m.tdh_mr_extend(tdr, 0x80).status) == "TDX_OPERAND_INVALID|RCX"
    assert describe(m.tdh_mr_extend(61, 0x80).status) == "TDX_PAGE_METADATA_INCORRECT|RDX"
    world.aug(run(1, 1), run(63, 1))
    world.done(m.tdh_mem_page_remove(tdr, 0, run(0, 1)), 1)
    world.ok(m.tdh_mr_finalize(tdr))

    assert world.td.mrtd.hex() == ADDED
    assert describe(m.tdh_mr_extend(tdr, 0).status) == "TDX_OP_STATE_INCORRECT"


def test_extend_counts_chunks(world: Any) -> None:
    """`done` is in chunks, also where a page in the middle is missing."""
    world.build()
    m, tdr = world.module, world.tdr
    for gfn in (0, 1, 3):
        world.done(m.tdh_mem_page_add(tdr, run(gfn, 1), run(60 + gfn, 1), run(70, 1)), 1)

    result = m.tdh_mr_extend(tdr, 0x800, 40)

    assert (result.done, describe(result.status)) == (24, "TDX_EPT_ENTRY_NOT_PRESENT|RCX")


def test_a_batch_of_adds_is_measured_in_order(new_world: Any) -> None:
    """Unmeasured pages of one batch are records one behind the other."""
    world = new_world().build()
    world.done(world.module.tdh_mem_page_add(world.tdr, run(3, 20), run(60, 20), run(100, 20)), 20)
    world.ok(world.module.tdh_mr_finalize(world.tdr))

    assert world.td.mrtd == mrtd(pages([Load("unmeasured", 3 << 12, 20 * 4096)]))


def test_through_kvm(new_vm: Any) -> None:
    """An image loaded through the hooks has the digest that the verifier expects."""
    steps = [
        Load("normal", 0x10000, 3 * 4096, b"firmware" * 1000),
        Load("unmeasured", 0x4000, 2 * 4096),
    ]
    vm = new_vm(launched=False)
    pfn = 1
    for step in steps:
        contents = [page for _, page, _ in pages([step])]
        batch = vm.batch(run(step.gpa >> 12, len(contents)), run(pfn, len(contents)))
        assert drain(vm.hooks.launch_update(vm, batch, contents, step.kind)) is None
        pfn += len(contents)
    drain(vm.hooks.launch_finish(vm))

    assert vm.arch.launch_digest == mrtd(pages(steps))


# ---- firmware images ------------------------------------------------------------------------------------------


def guid(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


Row = tuple[int, int, int, int, int, int]
SECTIONS: list[Row] = [
    (0x1000, 0x2000, 0xFFC84000, 0x2000, SectionType.BFV, 1),
    (0, 0x800, 0xFFC00000, 0x1000, SectionType.CFV, 0),
    (0, 0, 0x810000, 0x2000, SectionType.TEMP_MEM, 0),
    (0, 0, 0x809000, 0x2000, SectionType.TD_HOB, 0),
]


def image(
    sections: list[Row] = SECTIONS,
    *,
    size: int = 0x4000,
    table: bool = True,
    signature: bytes = b"TDVF",
    version: int = 1,
    length: int | None = None,
    offset: int | None = None,
    entry_size: int = 22,
    table_length: int | None = None,
) -> bytes:
    """A TDVF image: random data, descriptor at 0x3000, the GUIDed table (or td-shim's offset) at its end."""
    data = bytearray(bytes(i * 7 & 0xFF for i in range(size)))
    rows = b"".join(struct.pack("<IIQQII", *row) for row in sections)
    head = struct.pack("<4sIII", signature, 16 + len(rows) if length is None else length, version, len(sections))
    descriptor = guid("e9eaf9f3-168e-44d5-a8eb-7f4d8738f6ae") + head + rows
    data[0x3000 - 16 : 0x3000 - 16 + len(descriptor)] = descriptor
    end = size - 0x20
    if table:
        distance = size - 0x3000 if offset is None else offset
        entry = struct.pack("<IH", distance, entry_size) + guid("e47a6535-984a-4798-865e-4685a7bf8ec2")
        other = b"\1\2\3\4" + struct.pack("<H", 22) + guid("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
        total = len(entry) + len(other) + 18 if table_length is None else table_length
        footer = struct.pack("<H", total) + guid("96b582de-1fb2-45f7-baea-a366c55a082d")
        whole = entry + other + footer
        data[end - len(whole) : end] = whole
    else:
        data[end : end + 4] = struct.pack("<I", 0x3000 if offset is None else offset)
    return bytes(data)


@pytest.mark.parametrize("table", [True, False])
def test_firmware(table: bool) -> None:
    """Sections in table order become the steps of a launch; the hand-off block is the VMM's."""
    firmware = parse_firmware(image(table=table))
    steps = launch_steps(firmware, b"HOB")

    assert [(step.kind, step.gpa, step.size_bytes) for step in steps] == [
        ("normal", 0xFFC84000, 0x2000),
        ("unmeasured", 0xFFC00000, 0x1000),
        ("unmeasured", 0x810000, 0x2000),
        ("unmeasured", 0x809000, 0x2000),
    ]
    assert steps[0].contents == firmware.image[0x1000:0x3000]
    assert [page for _, page, _ in pages(steps[1:2])] == [firmware.image[:0x800].ljust(4096, b"\0")]
    assert steps[3].contents == b"HOB"
    assert mrtd(pages(steps)) == mrtd(pages(launch_steps(firmware)))


def test_a_section_that_is_augmented_later() -> None:
    """It is no step of the launch."""
    rows = [*SECTIONS[:2], (0, 0, 0x100000, 0x100000, SectionType.TEMP_MEM, 2)]

    assert len(launch_steps(parse_firmware(image(rows)))) == 2


def changed(i: int, **fields: int) -> list[Row]:
    names = ("offset", "data_size", "gpa", "size", "type", "attributes")
    rows = list(SECTIONS)
    row = dict(zip(names, rows[i], strict=True)) | fields
    rows[i] = tuple(row[name] for name in names)  # type: ignore[assignment]
    return rows


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (b"x" * 20, "no room"),
        (bytes(0x4000), "no TDVF descriptor"),
        (image(signature=b"TDVX"), "signature b'TDVX'"),
        (image(version=2), "version 2"),
        (image(length=100), "100 bytes for 4 sections"),
        (image(SECTIONS[:1]), "for 1 sections"),
        (image(offset=8), "no TDVF descriptor"),
        (image(offset=0x9000), "no TDVF descriptor"),
        (image(table=False, offset=0x3001), "no TDVF descriptor"),
        (image(entry_size=24), "record of the firmware.s table has 24 bytes"),
        (image(entry_size=20), "20 bytes, not 22"),
        (image(entry_size=3), "record of the firmware's table has 3 bytes"),
        (image(table_length=5), "says that it has 5 bytes"),
        (image(table_length=0x5000), "says that it has 20480 bytes"),
        (image(table_length=22 + 18), "no TDX metadata record"),
        (image(table_length=22 + 18 + 10), "ends within a record"),
        (image(changed(0, gpa=0xFFC84100)), "not whole pages"),
        (image(changed(2, size=0x800)), "not whole pages"),
        (image(changed(0, data_size=0x2001)), "for 8192 bytes of memory"),
        (image(changed(0, data_size=0)), "BFV with 0 bytes"),
        (image(changed(3, data_size=16)), "TD_HOB with 16 bytes"),
        (image(changed(2, type=5)), "type 5"),
        (image(changed(0, offset=0x3000)), "beyond the end"),
    ],
)
def test_broken_firmware(broken: bytes, why: str) -> None:
    """One sentence says what is wrong."""
    with pytest.raises(InputError, match=why):
        parse_firmware(broken)


def test_a_hand_off_block_that_is_too_large() -> None:
    """It must fit into its section."""
    with pytest.raises(InputError, match="does not fit"):
        launch_steps(parse_firmware(image()), bytes(0x2001))
