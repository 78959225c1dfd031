"""guest_memfd: the inode's memory, and the file's bindings (kvm-core.md sections 1, 2 and 8)."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from fakes import M2, MIRROR, PAGE, PROFILE, PUNCH, Box, sel
from hypothesis import given, settings
from hypothesis import strategies as st

from cvmcore.backends.default import DEFAULT
from cvmcore.backends.swprot import SWPROT
from cvmcore.effects import drain
from cvmcore.errors import UapiError
from cvmcore.host import Host
from cvmcore.mem.gmem import HUGE, POISON, UPTODATE, GmemInode
from cvmcore.pages import array_of, sort_unique
from cvmcore.types import PG_LEVEL_2M, PG_LEVEL_4K, Use

NR = 1200


@pytest.fixture
def host() -> Host:
    host = Host(SWPROT, PROFILE, nr_frames=4096)
    host.memory.write(slice(0, 4096, 1), 0xBAD, 0)
    return host


def inode_of(host: Host, npages: int = NR, level: int = PG_LEVEL_4K) -> GmemInode:
    return GmemInode(host, npages, 0, level)


def frames(inode: GmemInode) -> list[int]:
    return [int(word) for word in inode.words >> 5]


# ---- allocation and content -----------------------------------------------------------------------------------------


def test_a_page_is_allocated_and_zeroed_when_it_is_looked_up(host: Host) -> None:
    inode = inode_of(host)

    pfns = array_of(inode.populate(sel(3, 9, 700))).tolist()

    assert pfns == [1, 2, 3]
    assert host.memory.stamp[pfns].tolist() == [0, 0, 0]
    assert (inode.allocated, host.frames.outstanding()) == (3, {Use.GMEM: 3})
    assert host.meter.counts == {"gmem_alloc_4k": 3, "page_clear_4k": 3}


def test_allocation_alone_does_not_define_content(host: Host) -> None:
    """Up-to-date is a flag of its own: zeroed at the first lookup, and only then."""
    inode = inode_of(host)
    inode.allocate(slice(0, 4, 1))
    assert (inode.words[:4] & UPTODATE).tolist() == [0] * 4
    assert host.memory.stamp[1] == 0xBAD

    inode.populate(slice(1, 3, 1))
    host.memory.write(slice(2, 4, 1), 7, 0)
    inode.populate(slice(0, 4, 1))

    assert (inode.words[:4] & UPTODATE).tolist() == [UPTODATE] * 4
    assert host.memory.stamp[1:5].tolist() == [0, 7, 7, 0]
    assert host.meter.counts["page_clear_4k"] == 4


@pytest.mark.parametrize("free", [0, 1, 5])
def test_allocation_goes_as_far_as_the_host(host: Host, free: int) -> None:
    """ENOMEM; what is allocated stays, the lowest pages first."""
    inode = inode_of(host)
    host.frames.alloc(host.frames.available - free, Use.META)

    with pytest.raises(UapiError) as caught:
        inode.allocate(sel(2, 3, 4, 50, 51, 99))

    assert caught.value.errno == errno.ENOMEM
    assert np.flatnonzero(inode.words).tolist() == [2, 3, 4, 50, 51, 99][:free]
    assert inode.allocated == free


def test_a_poisoned_page_is_not_looked_up(host: Host) -> None:
    """-EHWPOISON; the folio is kept."""
    inode = inode_of(host)
    inode.populate(slice(0, 4, 1))
    inode.poison(2)

    with pytest.raises(UapiError) as caught:
        inode.populate(slice(0, 4, 1))

    assert caught.value.errno == 133
    assert (int(inode.words[2]) & POISON, inode.allocated) == (POISON, 4)
    assert array_of(inode.populate(sel(0, 1, 3))).tolist() == [1, 2, 4]


# ---- large folios ---------------------------------------------------------------------------------------------------


def test_a_large_folio_comes_as_a_whole(host: Host) -> None:
    inode = inode_of(host, level=PG_LEVEL_2M)

    pfns = array_of(inode.populate(sel(5, 600, 1100))).tolist()

    assert pfns == [512 + 5, 1024 + 600 - 512, 1]
    assert inode.allocated == 1025
    assert (host.memory.stamp[512:1536] == 0).all()
    assert np.flatnonzero(inode.words & HUGE).tolist() == list(range(1024))
    assert host.meter.counts == {"gmem_alloc_4k": 3, "page_clear_2m": 2, "page_clear_4k": 1}


def test_large_folios_are_looked_up_by_their_heads(host: Host) -> None:
    inode = inode_of(host, level=PG_LEVEL_2M)

    assert array_of(inode.populate_large(sel(0, 512))).tolist() == [512, 1024]
    assert (inode.words[:1024] & UPTODATE == UPTODATE).all()


def test_large_folios_as_far_as_the_host_has_them(host: Host) -> None:
    """Only of the first of them; nothing else is allocated."""
    inode = inode_of(host, 5 * 512, level=PG_LEVEL_2M)
    host.frames.alloc(host.frames.available - 1024, Use.META)

    pfns = array_of(inode.populate_large(slice(0, 5 * 512, 512))).tolist()

    assert (len(pfns), inode.allocated) == (len(pfns), len(pfns) * 512)
    assert 0 < len(pfns) <= 2


def test_which_pages_are_or_will_be_large(host: Host) -> None:
    inode = inode_of(host, 2100, PG_LEVEL_2M)
    inode.populate(sel(5, 600))
    drain(inode.truncate(600, 1))

    large = inode.huge_blocks(sel(0, 511, 512, 600, 1024, 2047, 2048))

    assert np.asarray(large).tolist() == [True, True, False, False, True, True, False]


def test_a_large_folio_that_is_cut(host: Host) -> None:
    """The other pages stay, and are small from then on."""
    inode = inode_of(host, level=PG_LEVEL_2M)
    inode.populate(sel(5, 600))
    before = frames(inode)

    assert drain(inode.truncate(500, 20)) == 20

    assert frames(inode)[:500] == before[:500]
    assert frames(inode)[520:1024] == before[520:1024]
    assert not (inode.words & HUGE).any()
    assert inode.allocated == 1004


# ---- truncation -----------------------------------------------------------------------------------------------------


def test_truncation_returns_frames(host: Host) -> None:
    inode = inode_of(host)
    inode.populate(sel(1, 5, 9, 700))

    assert drain(inode.truncate(4, 10)) == 2

    assert np.flatnonzero(inode.words).tolist() == [1, 700]
    assert host.frames.outstanding() == {Use.GMEM: 2}
    assert host.meter.counts["punch_hole_4k"] == 2


def test_truncation_beyond_the_file(host: Host) -> None:
    inode = inode_of(host, 16)
    inode.populate(slice(0, 16, 1))

    assert drain(inode.truncate(10, 1 << 40)) == 6
    assert inode.allocated == 10


def test_the_backend_is_told_of_frames_and_of_nothing_else() -> None:
    """gmem_invalidate: no kvm, no slot, no gfn; each folio once (row 17)."""
    box = Box(MIRROR, 16)
    box.touch(slice(2, 8, 1))
    frames_of = [box.pfn(gfn) for gfn in range(2, 8)]
    box.hw.trace.clear()

    box.punch(0, 5)
    box.fd.close()
    box.process.close(box.gmem)

    told = [call for call in box.hw.trace if call[0] == "gmem_invalidate"]
    assert told == [("gmem_invalidate", frames_of[0], 3), ("gmem_invalidate", frames_of[3], 3)]
    assert box.hw.trace[-1][0] != "vm_pre_destroy"


def test_frames_that_the_backend_keeps_are_not_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vendor leaks pages it cannot take back."""
    box = Box(MIRROR, 16)
    box.touch(slice(2, 5, 1))
    pfn = box.pfn(3)

    def keep(host: Host, pfns: slice) -> object:
        host.frames.leak(sel(pfn), "kept")
        return sel(*[page for page in array_of(pfns).tolist() if page != pfn])

    monkeypatch.setattr(box.host.ops.hooks["gmem_invalidate"], "fn", keep)
    box.punch(0, 16)

    assert (box.inode.allocated, box.host.frames.leaked()) == (0, 1)
    assert box.host.frames.use[pfn] == Use.LEAKED
    box.destroy()


STORY = st.lists(
    st.tuples(
        st.sampled_from(["allocate", "populate", "truncate", "write"]),
        st.integers(0, NR - 1),
        st.integers(1, 60) | st.just(512),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(STORY, st.sampled_from([PG_LEVEL_4K, PG_LEVEL_2M]))
def test_an_inode_is_a_sparse_file(story: list[tuple[str, int, int]], level: int) -> None:
    """Content by index: zero unless written since the last hole; frames are distinct; allocated <= size (row 27)."""
    host = Host(SWPROT, PROFILE, nr_frames=4096)
    inode = inode_of(host, level=level)
    model: dict[int, int] = {}

    for version, (kind, start, n) in enumerate(story, 1):
        index = slice(start, min(start + n, NR), 1)
        pages = list(range(index.start, index.stop))
        match kind:
            case "allocate":
                inode.allocate(index)
            case "populate":
                inode.populate(index)
            case "write":
                host.memory.write(inode.populate(index), version, 0)
                model.update(dict.fromkeys(pages, version))
            case "truncate":
                drain(inode.truncate(index.start, len(pages)))
                assert not inode.words[index].any()
                for page in pages:
                    model.pop(page, None)
        held = inode.words[inode.words != 0] >> 5
        assert len(set(held.tolist())) == len(held) == inode.allocated <= NR
        assert (host.frames.use[held] == Use.GMEM).all()
        assert host.frames.in_use == inode.allocated

    seen = host.memory.read(inode.populate(slice(0, NR, 1)), 0).tolist()
    assert seen == [model.get(page, 0) for page in range(NR)]


# ---- files ----------------------------------------------------------------------------------------------------------


def test_pages_that_nobody_bound_can_be_allocated() -> None:
    box = Box(SWPROT, 8)
    fd = box.fd.create_guest_memfd(2 * M2)

    box.process.fallocate(fd, 1, M2, M2)

    assert np.flatnonzero(box.process.files[fd].inode.words).tolist() == list(range(512, 1024))


@pytest.mark.assumes(needs_accept=False)
def test_allocate_is_idempotent() -> None:
    box = Box(SWPROT, 8)
    box.touch(3)
    pfn = box.pfn(3)

    box.process.fallocate(box.gmem, 1, 0, 8 * PAGE)

    assert (box.pfn(3), box.inode.allocated, box.mapped()) == (pfn, 8, [3])
    assert box.read(3) == [1003]


@pytest.mark.assumes(confidential=False)
def test_content_before_the_guest_runs() -> None:
    """Populated pages are up-to-date with their content; others read zero (row 18)."""
    box = Box(SWPROT, 8)
    box.fd.launch_update(2 * PAGE, [b"kernel", b"initrd"])

    stamps = box.read(slice(1, 5, 1))

    assert [box.host.memory.bytes_of(stamp)[:6] for stamp in stamps] == [bytes(6), b"kernel", b"initrd", bytes(6)]


@pytest.mark.assumes(gmem_backed=True)
def test_the_vmm_and_the_guest_share_a_mapped_guest_memfd() -> None:
    """INIT_SHARED: one memory, seen through the mapping and through the slot; a hole is a hole for both."""
    box = Box(DEFAULT, 8)
    fd = box.fd.create_guest_memfd(8 * PAGE, 3)
    hva = box.process.mmap_gmem(fd, 0, 8 * PAGE)
    box.fd.set_user_memory_region2(1, 4, 1 << 30, 8 * PAGE, hva, fd, 0)
    gfn = 1 << 18

    box.touch(gfn, stamps=5)
    box.process.write(hva + PAGE, 6, 1)
    assert box.process.read(hva, 2)[1].tolist() == box.read(slice(gfn, gfn + 2, 1)) == [5, 6]
    box.process.fallocate(fd, PUNCH, 0, PAGE)

    assert box.process.read(hva, 2)[1].tolist() == box.read(slice(gfn, gfn + 2, 1)) == [0, 6]


@pytest.mark.assumes(needs_accept=False)
def test_memory_goes_back_to_a_host_that_uses_it_elsewhere() -> None:
    """Row 16: no page is freed while a leaf or a TLB reaches it; whoever gets it next is alone with it."""
    box = Box(SWPROT, 16)
    box.touch(slice(0, 16, 1))
    freed = {box.pfn(gfn) for gfn in range(4, 8)}

    box.punch(4, 4)
    other = box.process.mmap(4 * PAGE)
    box.process.write(other, 0xC0FFEE, 4)

    assert set(array_of(box.process.mm.gup(slice(other >> 12, (other >> 12) + 4, 1))).tolist()) == freed
    assert box.read(slice(0, 16, 1)) == [*range(1000, 1004), 0, 0, 0, 0, *range(1008, 1016)]
    assert box.process.read(other, 4)[1].tolist() == [0xC0FFEE] * 4


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 30)), max_size=6))
def test_holes_and_writes(holes: list[tuple[int, int]]) -> None:
    """Row 19, at random: after punch the guest reads zero on the range, other indexes keep content."""
    box = Box(MIRROR, 100)
    want = [1000 + gfn for gfn in range(100)]
    box.touch(slice(0, 100, 1))

    for start, n in holes:
        box.punch(start, n)
        want[start : start + n] = [0] * len(want[start : start + n])

    gfns = sort_unique(np.arange(100))
    assert box.read(gfns) == want
    box.check_mirror()
