"""The VMM's address space: mappings, GUP, and what the host does to pages behind KVM's back."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from fakes import M2, PAGE, PROFILE, Box, sel

from cvmcore.backends.default import DEFAULT
from cvmcore.effects import Steps, drain
from cvmcore.errors import UapiError
from cvmcore.host import Host
from cvmcore.mem.mm import HUGE, Mm
from cvmcore.pages import Sel, array_of, shift
from cvmcore.types import PG_LEVEL_2M, PG_LEVEL_4K, Use
from cvmcore.uapi import Process


@pytest.fixture
def host() -> Host:
    return Host(DEFAULT, PROFILE, nr_frames=4096)


@pytest.fixture
def mm(host: Host) -> Mm:
    return Mm(host)


def pages(found: Sel) -> list[int]:
    return [int(page) for page in array_of(found)]


def gup(mm: Mm, hva: int, index: Sel) -> list[int]:
    """Frames behind pages of a mapping that starts at hva."""
    return pages(mm.gup(shift(index, hva >> 12)))


def fails(call: Any) -> int:
    with pytest.raises(UapiError) as caught:
        drain(call()) if callable(call) else drain(call)
    return caught.value.errno


# ---- mappings -------------------------------------------------------------------------------------------------------


def test_mappings_are_apart_and_aligned(mm: Mm) -> None:
    """1 GiB apart at least, so that large pages fit."""
    one, two, three = mm.map(1), mm.map((1 << 18) + 1), mm.map(8)

    assert one % (1 << 30) == two % (1 << 30) == three % (1 << 30) == 0
    assert mm.find(one >> 12) is mm.mappings[0]
    assert mm.find((one >> 12) + 1) is None
    assert mm.find((two >> 12) + (1 << 18)) is mm.mappings[1]
    assert mm.find((one >> 12) - 1) is None
    assert mm.find((three >> 12) + 7) is mm.mappings[2]


# ---- GUP ------------------------------------------------------------------------------------------------------------


def test_gup_faults_in_zeroed_frames(host: Host, mm: Mm) -> None:
    host.memory.write(slice(0, 4096, 1), 0xBAD, 0)
    hva = mm.map(16)

    frames = gup(mm, hva, sel(3, 4, 9))

    assert frames == [1, 2, 3]
    assert host.memory.read(slice(1, 4, 1), 0).tolist() == [0, 0, 0]
    assert host.frames.outstanding() == {Use.ANON: 3}
    assert host.meter.counts == {"gup_4k": 3, "page_clear_4k": 3}


def test_gup_of_present_pages_changes_nothing(host: Host, mm: Mm) -> None:
    hva = mm.map(16)
    frames = gup(mm, hva, slice(2, 6, 1))
    host.memory.write(slice(1, 5, 1), 7, 0)

    assert gup(mm, hva, slice(2, 6, 1)) == frames
    assert host.memory.read(slice(1, 5, 1), 0).tolist() == [7] * 4
    assert host.meter.counts["page_clear_4k"] == 4


@pytest.mark.parametrize("index", [slice(16, 17, 1), slice(14, 18, 1), sel(3, 20)])
def test_gup_of_what_is_not_mapped(host: Host, mm: Mm, index: Sel) -> None:
    """EFAULT; nothing is faulted in."""
    hva = mm.map(16)

    with pytest.raises(UapiError) as caught:
        gup(mm, hva, index)

    assert caught.value.errno == errno.EFAULT
    assert host.frames.in_use == 0


def test_gup_on_a_full_host(host: Host, mm: Mm) -> None:
    hva = mm.map(16)
    host.frames.alloc(host.frames.available - 2, Use.META)

    with pytest.raises(UapiError) as caught:
        gup(mm, hva, slice(0, 3, 1))

    assert caught.value.errno == errno.ENOMEM
    assert host.frames.available == 2


# ---- large pages ----------------------------------------------------------------------------------------------------


def test_a_large_page_comes_as_a_whole(host: Host, mm: Mm) -> None:
    hva = mm.map(1200, PG_LEVEL_2M)

    frames = gup(mm, hva, sel(5, 6, 600, 1100))

    assert frames == [512 + 5, 512 + 6, 1024 + 600 - 512, 1]
    assert host.frames.outstanding() == {Use.ANON: 1025}
    assert host.meter.counts == {"gup_4k": 4, "page_clear_2m": 2, "page_clear_4k": 1}


def test_which_pages_are_or_will_be_large(mm: Mm) -> None:
    """Present large pages, and blocks of which nothing was touched yet; the last block is not whole."""
    hva = mm.map(2100, PG_LEVEL_2M)
    gup(mm, hva, sel(5, 600))
    drain(mm.take_away(hva + 600 * PAGE, PAGE))

    large = mm.huge_blocks(shift(sel(0, 511, 512, 600, 1024, 1535, 2047, 2048, 2099), hva >> 12))

    assert np.asarray(large).tolist() == [True, True, False, False, True, True, True, False, False]


def test_pages_of_small_mappings_are_small(mm: Mm) -> None:
    assert mm.huge_blocks(slice(mm.map(1024) >> 12, (mm.map(1024) >> 12) + 4, 1)) is False
    assert mm.huge_blocks(slice(1, 2, 1)) is False


def test_pages_beyond_the_mapping_are_small(mm: Mm) -> None:
    hva = mm.map(512, PG_LEVEL_2M)

    assert np.asarray(mm.huge_blocks(shift(slice(510, 514, 1), hva >> 12))).tolist() == [True, True, False, False]


def test_a_host_without_large_pages_gives_small_ones(host: Host, mm: Mm) -> None:
    host.frames.alloc(host.frames.available - 400, Use.ANON)
    hva = mm.map(1024, PG_LEVEL_2M)

    assert len(gup(mm, hva, slice(0, 300, 1))) == 300
    assert not (mm.mappings[0].words & HUGE).any()


def test_level_at_which_the_host_maps(mm: Mm) -> None:
    hva = mm.map(1024, PG_LEVEL_2M)
    gup(mm, hva, sel(5, 600))
    drain(mm.take_away(hva + 600 * PAGE, PAGE))
    level = [mm.resident_level((hva >> 12) + page) for page in (5, 511, 512, 600)]

    assert level == [PG_LEVEL_2M, PG_LEVEL_2M, PG_LEVEL_4K, PG_LEVEL_4K]
    assert mm.resident_level(1) == PG_LEVEL_4K


# ---- the host takes pages away --------------------------------------------------------------------------------------


class Listener:
    """A notifier that writes down what it hears."""

    def __init__(self, mm: Mm) -> None:
        self.heard: list[tuple[int, int]] = []
        mm.notifiers.append(self)

    def unmap_hva_range(self, hva_page: int, n: int, take_away: Steps[None]) -> Steps[None]:
        self.heard.append((hva_page, n))
        yield from take_away

    def release(self) -> Steps[None]:
        self.heard.append((0, 0))
        return
        yield


def test_dontneed_frees_and_tells(host: Host, mm: Mm) -> None:
    hva = mm.map(16)
    gup(mm, hva, slice(2, 8, 1))
    listeners = Listener(mm), Listener(mm)

    drain(mm.take_away(hva + 3 * PAGE, 2 * PAGE))

    assert [listener.heard for listener in listeners] == [[((hva >> 12) + 3, 2)]] * 2
    assert host.frames.in_use == 4
    assert np.flatnonzero(mm.mappings[0].words).tolist() == [2, 5, 6, 7]


def test_the_end_of_the_address_space_is_told_first(host: Host, mm: Mm) -> None:
    """Release, then all memory goes back."""
    gup(mm, mm.map(16), slice(2, 8, 1))
    listener = Listener(mm)

    drain(mm.teardown())

    assert listener.heard[0] == (0, 0)
    assert (mm.mappings, host.frames.in_use) == ([], 0)


def test_dontneed_of_a_pinned_page(host: Host, mm: Mm) -> None:
    """The frame lives on without an owner; the next touch gets another one."""
    hva = mm.map(16)
    (pfn,) = gup(mm, hva, slice(2, 3, 1))
    host.frames.pin(sel(pfn))

    drain(mm.take_away(hva, 16 * PAGE))

    assert host.frames.use[pfn] == Use.ORPHAN
    assert gup(mm, hva, slice(2, 3, 1)) != [pfn]


@pytest.mark.parametrize(
    ("offset", "size", "error"),
    [
        (1, PAGE, errno.EINVAL),
        (0, -1, errno.EINVAL),
        (16 * PAGE, PAGE, errno.ENOMEM),
        (15 * PAGE, 2 * PAGE, errno.ENOMEM),
    ],
)
def test_dontneed_of_a_bad_range(mm: Mm, offset: int, size: int, error: int) -> None:
    hva = mm.map(16)

    assert fails(mm.take_away(hva + offset, size)) == error


def test_part_of_a_large_page_taken_away(host: Host, mm: Mm) -> None:
    """The other pages stay, and are small from then on."""
    hva = mm.map(1024, PG_LEVEL_2M)
    frames = gup(mm, hva, slice(0, 1024, 1))

    drain(mm.take_away(hva + 500 * PAGE, 3 * PAGE))

    words = mm.mappings[0].words
    assert (words >> 5).tolist() == [*frames[:500], 0, 0, 0, *frames[503:]]
    assert np.flatnonzero(words & HUGE).tolist() == list(range(512, 1024))
    assert host.frames.in_use == 1021


def test_migration_moves_plain_content(host: Host, mm: Mm) -> None:
    """As the host sees it: an encrypted page arrives as noise; pinned pages stay."""
    hva = mm.map(16)
    old = gup(mm, hva, slice(0, 4, 1))
    host.memory.write(sel(old[0], old[1]), np.array([5, 6], np.uint32), 0)
    host.memory.write(sel(old[2]), 7, 9)
    host.frames.pin(sel(old[3]))

    moved = drain(mm.migrate(hva, 16 * PAGE))

    new = gup(mm, hva, slice(0, 4, 1))
    assert moved == 3
    assert (set(new[:3]) & set(old), new[3]) == (set(), old[3])
    assert host.memory.read(sel(*new[:3]), 0).tolist() == [5, 6, 0xFFFF_FFFF]
    assert host.frames.in_use == 4
    assert host.meter.counts["host_copy_4k"] == 3


def test_unmap_cuts_mappings(host: Host, mm: Mm) -> None:
    """What is mapped in the range goes, holes are fine, the rest keeps its pages."""
    hva = mm.map(16)
    frames = gup(mm, hva, slice(0, 16, 1))

    drain(mm.unmap(hva + 4 * PAGE, 8 * PAGE))
    drain(mm.unmap(hva + 3 * PAGE, 2 * PAGE))

    assert [(m.start - (hva >> 12), m.npages) for m in mm.mappings] == [(0, 3), (12, 4)]
    assert (gup(mm, hva, slice(0, 3, 1)), gup(mm, hva, slice(12, 16, 1))) == (frames[:3], frames[12:])
    assert (host.frames.in_use, fails(mm.unmap(hva + 1, PAGE)), fails(mm.unmap(hva, 0))) == (7, 22, 22)
    drain(mm.unmap(hva, 16 * PAGE))
    assert (mm.mappings, host.frames.in_use) == ([], 0)
    drain(mm.unmap(hva, 16 * PAGE))


def test_unmap_within_a_large_page() -> None:
    """The cut page becomes small, its neighbours stay large."""
    host = Host(DEFAULT, PROFILE, nr_frames=4096, backing="2m")
    mm = Mm(host)
    hva = mm.map(3 * 512, PG_LEVEL_2M)
    gup(mm, hva, slice(0, 3 * 512, 1))

    drain(mm.unmap(hva + 600 * PAGE, 10 * PAGE))

    found = [(m.start - (hva >> 12), m.npages, m.backing_level) for m in mm.mappings]
    assert found == [(0, 600, PG_LEVEL_2M), (610, 414, PG_LEVEL_4K), (1024, 512, PG_LEVEL_2M)]
    levels = [mm.resident_level((hva >> 12) + page) for page in (511, 512, 599, 610, 1023, 1024)]
    assert levels == [PG_LEVEL_2M, *[PG_LEVEL_4K] * 4, PG_LEVEL_2M]
    assert host.frames.in_use == 3 * 512 - 10


def test_advice_over_holes_is_taken_where_there_is_memory(host: Host, mm: Mm) -> None:
    """madvise goes on behind a hole and says ENOMEM; it stops at what is locked."""
    hva = mm.map(8)
    gup(mm, hva, slice(0, 8, 1))
    drain(mm.unmap(hva + 2 * PAGE, 2 * PAGE))

    assert fails(mm.take_away(hva + PAGE, 4 * PAGE)) == errno.ENOMEM
    assert host.frames.in_use == 4
    mm.lock(hva + 6 * PAGE, PAGE)
    assert fails(mm.take_away(hva + 4 * PAGE, 4 * PAGE)) == errno.EINVAL
    assert host.frames.in_use == 3
    with pytest.raises(UapiError, match="ENOMEM"):
        mm.lock(hva, 8 * PAGE)


# ---- through the process --------------------------------------------------------------------------------------------


def test_the_process_reads_what_it_wrote(host: Host) -> None:
    process = Process(host)
    hva = process.mmap(5 * PAGE - 1)

    process.write(hva + PAGE, np.array([4, 5], np.uint32), 2)

    assert process.read(hva, 5)[1].tolist() == [0, 4, 5, 0, 0]
    with pytest.raises(UapiError) as caught:
        process.read(hva + 4 * PAGE, 2)
    assert caught.value.errno == errno.EFAULT
    with pytest.raises(UapiError):
        process.mmap(0)


def test_backing_of_the_host_is_backing_of_the_process() -> None:
    process = Process(Host(DEFAULT, PROFILE, nr_frames=4096, backing="2m"))

    process.write(process.mmap(2 * M2), 3, 1)

    assert process.host.frames.in_use == 512


@pytest.mark.assumes(honours_notifiers=True, confidential=False)
def test_two_vms_share_an_address_space() -> None:
    """Each is told of what happens to it, one inside the other; both refault."""
    box = Box(DEFAULT, 16)
    other = box.process.create_vm()
    other.set_user_memory_region2(0, 0, 0, 16 * PAGE, box.hva)
    vcpu = other.create_vcpu()
    box.touch(3)
    vcpu.run(box.action(3, write=False))

    box.process.madvise_dontneed(box.hva, 16 * PAGE)

    assert (box.mapped(), other.vm.tdp.direct.level_at(3)) == ([], 0)
    assert (box.idle, other.vm.frame.in_progress) == (True, 0)
    assert box.read(3) == [0]


@pytest.mark.assumes(gmem_backed=True)
def test_mapping_of_a_guest_memfd_holds_the_file() -> None:
    """Its frames are the inode's; closing the descriptor does not release it."""
    box = Box(DEFAULT, 8)
    fd = box.fd.create_guest_memfd(4 * PAGE, 3)
    inode = box.process.files[fd].inode
    hva = box.process.mmap_gmem(fd, PAGE, 3 * PAGE)
    box.process.write(hva, 9, 1)

    box.process.close(fd)
    assert (inode.allocated, box.process.read(hva, 1)[1].tolist()) == (1, [9])
    box.process.munmap(hva, 3 * PAGE)

    assert inode.allocated == 0
    assert box.host.frames.in_use == 0
