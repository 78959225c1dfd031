"""Invalidation: the frame, and every row of the table of kvm-core.md section 5."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
from fakes import M2, MEDIATED, MIRROR, PAGE, Box, mirror, sel

from cvmcore.backend import Backend
from cvmcore.backends.default import DEFAULT
from cvmcore.backends.swprot import SWPROT
from cvmcore.effects import Effect, drain
from cvmcore.errors import UapiError
from cvmcore.mem import invalidate, mmulock
from cvmcore.mem.gmem import GmemFile
from cvmcore.mem.slots import MIXED
from cvmcore.memory import ZERO
from cvmcore.sched import Lockdep
from cvmcore.types import Fatal, Filter, MemoryFault, Retry, Shutdown, Use

GUEST_MEMFD = 4
KEEPS = mirror()
"""A mirror whose zapped pages keep their content in guest_memfd."""
PRIVATE_BY_ATTRIBUTE = {"swprot": SWPROT, "mirror": KEEPS, "lossy mirror": MIRROR}


@pytest.fixture(params=PRIVATE_BY_ATTRIBUTE)
def private(request: pytest.FixtureRequest) -> Backend:
    """VM types with private memory by attribute: no mirror, and mirrors that keep or destroy what they zap."""
    return PRIVATE_BY_ATTRIBUTE[request.param]


class Watch:
    """A driver that writes down what an operation does: lock effects and points, with the frame's state at each."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.lockdep = Lockdep()
        self.steps: list[str] = []
        self.frames: list[tuple[int, int]] = []
        """(in_progress, seq) before each step."""
        self.at: dict[str, Callable[[], Any]] = {}
        """What to do when a step is reached."""
        box.host.drive = self

    def __call__(self, steps: Any) -> Any:
        def watched() -> Any:
            answer = None
            try:
                while True:
                    effect: Effect = steps.send(answer)
                    name = effect.name.replace("vm0.", "")
                    self.steps.append(name)
                    self.frames.append((self.box.vm.frame.in_progress, self.box.vm.frame.seq))
                    if name in self.at:
                        self.at.pop(name)()
                    answer = yield effect
            except StopIteration as stop:
                return stop.value

        return self.lockdep(watched())

    def happened(self, *wanted: str) -> list[str]:
        """Those of the steps, in the order in which they happened."""
        return [step for step in self.steps if step in wanted]


FRAME = (
    *("write mmu_lock", "invalidate.start", "invalidate.zap", "release mmu_lock"),
    *("invalidate.store", "invalidate.end"),
)


def raises(error: int, call: Callable[[], object]) -> None:
    with pytest.raises(UapiError) as caught:
        call()
    assert caught.value.errno == error


# ---- the frame ------------------------------------------------------------------------------------------------------


def test_frame_counts_and_ranges() -> None:
    """in_progress++ (the first resets the range), ranges add up, then seq++ and in_progress--."""
    frame = mmulock.Frame()

    frame.add(8, 16)
    assert (frame.in_progress, frame.start, frame.end, frame.seq) == (1, 8, 16, 0)
    frame.add(32, 40)
    assert (frame.in_progress, frame.start, frame.end, frame.seq) == (2, 8, 40, 0)
    frame.drop()
    assert (frame.in_progress, frame.seq) == (1, 1)
    frame.drop()
    frame.add(100, 101)
    assert (frame.in_progress, frame.start, frame.end, frame.seq) == (1, 100, 101, 2)


def test_zap_and_flush_are_under_the_lock_and_in_the_frame() -> None:
    """Write mmu_lock; in_progress++; zap; flush; unlock ... lock; seq++ then in_progress--; unlock."""
    box = Box(MIRROR, 8)
    box.touch(3)
    seq = box.seq
    watch = Watch(box)
    box.hw.trace.clear()

    box.set_private(3, private=False)

    assert watch.happened(*FRAME) == [
        "write mmu_lock",
        "invalidate.start",
        "invalidate.zap",
        "release mmu_lock",
        "invalidate.store",
        "write mmu_lock",
        "invalidate.end",
        "release mmu_lock",
    ]
    frame = dict(zip(watch.steps, watch.frames, strict=True))
    assert frame["invalidate.start"] == frame["invalidate.zap"] == frame["invalidate.end"] == (1, seq)
    assert (box.vm.frame.in_progress, box.seq) == (0, seq + 1)
    assert box.hw.trace == [("remove", 3, 1, 1), ("flush", 3, 4)]


@pytest.mark.assumes(needs_accept=False)
def test_a_leaf_that_overlaps_goes_whole() -> None:
    """Leaf zap: at its own level; also when the root need not be split first."""
    box = Box(SWPROT, 1536, backing="2m")
    box.touch(sel(5, 600, 1100))

    box.punch(600)

    assert box.mapped() == [*range(512), *range(1024, 1536)]


@pytest.mark.assumes(needs_accept=False)
def test_what_is_flushed_covers_what_was_zapped() -> None:
    """Row 15: no TLB holds a translation that a completed call zapped, also of a huge leaf's other pages."""
    box = Box(SWPROT, 1536, backing="2m")
    box.touch(sel(5, 600, 700, 1100))

    box.punch(600)

    assert {gfn for gfn, _ in box.vm.vcpus[0].tlb.entries} == {5, 1100}


def test_nothing_zapped_nothing_flushed() -> None:
    box = Box(MIRROR, 8)
    box.hw.trace.clear()

    box.punch(3)

    assert [call for call in box.hw.trace if call[0] == "flush"] == []


@pytest.mark.assumes(needs_accept=False)
def test_every_vcpu_is_flushed() -> None:
    box = Box(SWPROT, 8, vcpus=3)
    for vcpu in range(3):
        box.touch(slice(2, 5, 1), vcpu=vcpu)

    box.set_private(3, private=False)

    assert [sorted(gfn for gfn, _ in vcpu.tlb.entries) for vcpu in box.vm.vcpus] == [[2, 4]] * 3


def test_a_flush_hook_that_does_not_flush_is_made_up_for() -> None:
    """0 or error: fall back to kicking all vCPUs; the fake's hook answers False."""
    box = Box(MIRROR, 8)
    box.touch(3)
    before = box.host.meter.counts.get("tlb_flush_base", 0)

    box.set_private(3, private=False)

    assert box.host.meter.counts["tlb_flush_base"] == before + 1
    assert box.vm.vcpus[0].tlb.entries == {}


@pytest.mark.parametrize(
    ("kinds", "roots"),
    [(Filter.SHARED, ["direct"]), (Filter.PRIVATE, ["mirror"]), (Filter.BOTH, ["mirror", "direct"])],
)
def test_root_choice_with_a_mirror(kinds: Filter, roots: list[str]) -> None:
    tdp = Box(MIRROR, 8).vm.tdp

    assert tdp.roots(kinds) == [getattr(tdp, name) for name in roots]


@pytest.mark.assumes(has_mirror=False)
@pytest.mark.parametrize("kinds", [Filter.SHARED, Filter.PRIVATE, Filter.BOTH])
def test_root_choice_without_a_mirror(kinds: Filter) -> None:
    """Always the direct root, whatever the filter; INVALID roots are included for unmap."""
    tdp = Box(SWPROT, 8).vm.tdp
    old = tdp.fast_zap()

    assert tdp.roots(kinds) == [tdp.direct]
    assert tdp.roots(kinds, invalid=True) == [tdp.direct, old]


# ---- hva unmap (mmu notifier) ---------------------------------------------------------------------------------------


@pytest.mark.assumes(honours_notifiers=True)
def test_hva_unmap_zaps_shared_pages() -> None:
    """madvise: shared leaves go, the frames are freed, the next touch finds zeros."""
    box = Box(DEFAULT, 16)
    box.touch(slice(2, 8, 1))
    seq = box.seq

    box.process.madvise_dontneed(box.hva + 3 * PAGE, 2 * PAGE)

    assert box.mapped() == [2, 5, 6, 7]
    assert (box.seq, box.idle) == (seq + 1, True)
    assert box.read(slice(2, 6, 1)) == [1002, 0, 0, 1005]


def test_hva_unmap_leaves_a_mirror_alone() -> None:
    """SHARED: a shared-only event must never touch the mirror, whose pages would be lost."""
    box = Box(MIRROR, 16)
    box.set_private(4, 4, private=False)
    box.touch(slice(2, 4, 1), private=True)
    box.touch(slice(4, 8, 1), private=False)
    box.hw.trace.clear()

    box.process.madvise_dontneed(box.hva, 16 * PAGE)

    assert (box.mapped(private=True), box.mapped(private=False)) == ([2, 3], [])
    assert [call for call in box.hw.trace if call[0] == "remove"] == []
    assert box.read(slice(2, 4, 1)) == [1002, 1003]


@pytest.mark.assumes(has_mirror=False, needs_accept=False)
def test_hva_unmap_without_a_mirror_zaps_private_leaves_too() -> None:
    """They refault, and keep their content: guest_memfd has no hva."""
    box = Box(SWPROT, 16)
    box.touch(slice(2, 8, 1))

    box.process.madvise_dontneed(box.hva + 3 * PAGE, 2 * PAGE)

    assert box.mapped() == [2, 5, 6, 7]
    assert box.read(slice(2, 8, 1)) == [1002, 1003, 1004, 1005, 1006, 1007]


@pytest.mark.assumes(gmem_backed=True)
def test_hva_unmap_visits_every_slot_in_the_range() -> None:
    """Two slots on the same hva, and one whose memory is a mapped guest_memfd."""
    box = Box(DEFAULT, 16)
    box.fd.set_user_memory_region2(1, 0, 1 << 30, 4 * PAGE, box.hva + 2 * PAGE)
    fd = box.fd.create_guest_memfd(4 * PAGE, 3)
    hva = box.process.mmap_gmem(fd, 0, 4 * PAGE)
    box.fd.set_user_memory_region2(2, GUEST_MEMFD, 1 << 31, 4 * PAGE, hva, fd, 0)
    box.touch(slice(0, 8, 1))
    box.touch(slice(1 << 18, (1 << 18) + 4, 1))
    box.touch(slice(1 << 19, (1 << 19) + 4, 1))

    box.process.madvise_dontneed(box.hva + 3 * PAGE, PAGE)
    box.process.madvise_dontneed(hva + PAGE, PAGE)

    assert box.mapped() == [
        *[0, 1, 2, 4, 5, 6, 7],
        *[(1 << 18) + i for i in (0, 2, 3)],
        *[(1 << 19) + i for i in (0, 2, 3)],
    ]
    assert box.read((1 << 19) + 1) == [1000 + (1 << 19) + 1]


@pytest.mark.assumes(honours_notifiers=True)
def test_hva_unmap_of_memory_that_no_slot_shows() -> None:
    """No slot intersects: no frame is opened and seq does not move."""
    box = Box(DEFAULT, 16)
    other = box.process.mmap(PAGE)
    box.process.write(other, 1, 1)
    seq = box.seq
    watch = Watch(box)

    box.process.madvise_dontneed(other, PAGE)

    assert (box.seq, watch.steps) == (seq, ["read mn_active", "release mn_active"])


def test_hva_unmap_steps() -> None:
    """active_count++; frame start, flush; reclaimed hook after unlock; pages go; end: seq++, active_count--."""
    box = Box(MIRROR, 16)
    box.set_private(3, private=False)
    box.touch(3, private=False)
    word = box.process.mm.find(box.hva >> 12)
    assert word is not None
    watch = Watch(box)
    box.hw.trace.clear()
    still_there = []
    watch.at["invalidate.zap"] = lambda: still_there.append(int(word.words[3]) != 0)

    box.process.madvise_dontneed(box.hva + 3 * PAGE, PAGE)

    assert watch.steps == [
        "read mn_active",
        "write mmu_lock",
        "invalidate.start",
        "invalidate.zap",
        "release mmu_lock",
        "write mmu_lock",
        "invalidate.end",
        "release mmu_lock",
        "release mn_active",
    ]
    assert box.hw.trace == [("flush", 3, 4), ("memory_reclaimed", 1)]
    assert still_there == [True]
    assert int(word.words[3]) == 0


def test_a_backend_that_does_not_honour_notifiers() -> None:
    """The host cannot take a guest's page back: nothing is zapped."""
    box = Box(mirror(has_mirror=False, private_by_attribute=False, mediated_root=True, honours_notifiers=False,
                     max_private_level=1, max_shared_level=1), 16)  # fmt: skip
    box.touch(3)

    box.process.madvise_dontneed(box.hva + 3 * PAGE, PAGE)

    assert (box.mapped(), box.seq) == ([3], 0)


@pytest.mark.assumes(needs_pin=False)
def test_migration_moves_content_and_refaults() -> None:
    box = Box(DEFAULT, 16)
    box.touch(slice(2, 6, 1))
    pfn = box.pfn(3)

    assert box.process.migrate_pages(box.hva, 16 * PAGE) == 4
    assert (box.mapped(), box.idle) == ([], True)
    assert box.read(slice(2, 6, 1)) == [1002, 1003, 1004, 1005]
    assert box.pfn(3) != pfn


@pytest.mark.assumes(needs_pin=False)
@pytest.mark.parametrize("pinned", [0, 7])
def test_a_pin_anywhere_in_a_large_page_holds_all_of_it(pinned: int) -> None:
    """A folio with a pin is not migrated, whichever of its pages is asked for; the one beside it is."""
    box = Box(DEFAULT, 1024, backing="2m")
    box.touch(slice(0, 1024, 1))
    pfn = box.pfn(0)
    box.host.frames.pin(slice(pfn + pinned, pfn + pinned + 1, 1))

    assert box.process.migrate_pages(box.hva + 500 * PAGE, 100 * PAGE) == 88
    assert box.read(slice(0, 1024, 1)) == [1000 + i for i in range(1024)]
    box.host.frames.unpin(slice(pfn + pinned, pfn + pinned + 1, 1))


@pytest.mark.assumes(needs_pin=False)
def test_migration_on_a_full_host_closes_its_frame() -> None:
    """As many pages move as there are free frames; the guest goes on."""
    box = Box(DEFAULT, 16)
    box.touch(slice(2, 6, 1))
    box.host.frames.alloc(box.host.frames.available - 1, Use.META)

    assert box.process.migrate_pages(box.hva, 16 * PAGE) == 1
    assert box.idle
    assert box.read(slice(2, 6, 1)) == [1002, 1003, 1004, 1005]


@pytest.mark.assumes(honours_notifiers=True)
def test_munmap_of_the_vmm_memory() -> None:
    box = Box(DEFAULT, 16)
    box.touch(3)

    box.process.munmap(box.hva, 16 * PAGE)

    assert box.mapped() == []
    leave = box.touch(3)
    assert isinstance(leave, Shutdown)
    assert leave.errno == errno.EFAULT


# ---- attributes -> PRIVATE ------------------------------------------------------------------------------------------


def test_to_private_zaps_shared_leaves_only() -> None:
    """SHARED: remove what may no longer be used; existing private data stays."""
    box = Box(MIRROR, 16)
    box.set_private(4, 4, private=False)
    box.touch(slice(0, 4, 1), private=True)
    box.touch(slice(4, 8, 1), private=False)
    box.hw.trace.clear()

    box.set_private(2, 4)

    assert (box.mapped(private=True), box.mapped(private=False)) == ([0, 1, 2, 3], [6, 7])
    assert [call for call in box.hw.trace if call[0] == "remove"] == []
    assert box.read(slice(0, 4, 1)) == [1000, 1001, 1002, 1003]


def test_to_private_and_back_keeps_the_shared_page(private: Backend) -> None:
    """The shared backing is untouched by the conversion (row 20)."""
    box = Box(private, 16)
    box.set_private(4, private=False)
    box.touch(4, private=False)

    box.set_private(4)
    box.set_private(4, private=False)

    assert box.read(4, private=False) == [1004]


# ---- attributes -> shared -------------------------------------------------------------------------------------------


def test_to_shared_zaps_private_leaves(private: Backend) -> None:
    """PRIVATE; gmem pages stay allocated."""
    box = Box(private, 16)
    box.touch(slice(2, 6, 1))

    box.set_private(3, 2, private=False)

    assert box.mapped() == [2, 5]
    assert box.inode.allocated == 4
    assert box.touch(3, private=True) == MemoryFault(3 * PAGE, flags=8)
    assert box.read(slice(3, 5, 1), private=False) == [0, 0]


@pytest.mark.assumes(needs_accept=False)
@pytest.mark.parametrize(("backend", "after"), [(SWPROT, 1003), (KEEPS, 1003), (MIRROR, ZERO)])
def test_content_after_there_and_back(backend: Backend, after: int) -> None:
    """SNP-like: ownership and content unchanged until the folio is freed. TDX-like: content lost."""
    box = Box(backend, 16)
    box.touch(3)

    box.set_private(3, private=False)
    box.set_private(3)

    assert box.read(3) == [after]


def test_conversion_changes_only_gfns_in_range(private: Backend) -> None:
    """Row 20; small leaves of the neighbours in the same large block stay mapped."""
    box = Box(private, 1024)
    box.touch(slice(0, 1024, 1))
    before = box.mapped()

    box.set_private(600, 3, private=False)

    assert box.mapped() == [gfn for gfn in before if gfn not in (600, 601, 602)]
    assert box.vm.attributes.of(slice(598, 605, 1)).tolist() == [8, 8, 0, 0, 0, 8, 8]


def test_repeating_a_conversion_does_nothing(private: Backend) -> None:
    """Row 21: no invalidation, no hooks."""
    box = Box(private, 16)
    box.touch(3)
    seq = box.seq
    watch = Watch(box)

    box.set_private(0, 16)

    assert (box.seq, watch.steps) == (seq, ["write slots_lock", "release slots_lock"])
    assert box.mapped() == [3]


def test_a_conversion_zaps_what_has_the_attribute_already() -> None:
    """kvm_vm_set_mem_attributes looks at the range as a whole: if any of it changes, all of it is zapped."""
    box = Box(SWPROT, 16)
    box.set_private(3, 1, False)
    box.touch(3, private=False)

    box.set_private(3, 2, False)

    assert box.mapped() == []


def test_conversion_without_a_slot_opens_no_frame(private: Backend) -> None:
    """Attributes are stored all the same (row 22: they exist apart from memslots)."""
    box = Box(private, 16)
    seq = box.seq
    watch = Watch(box)

    box.set_private(1 << 20, 8)

    assert (box.seq, watch.happened(*FRAME)) == (seq, ["invalidate.store"])
    assert box.vm.attributes.uniform(1 << 20, (1 << 20) + 8, 8)


def test_conversion_over_several_slots_is_one_frame(private: Backend) -> None:
    """From before the first to after the last slot, with a gap between them: seq moves by one."""
    box = Box(private, 16)
    fd = box.fd.create_guest_memfd(16 * PAGE)
    box.fd.set_user_memory_region2(1, GUEST_MEMFD, 32 * PAGE, 16 * PAGE, box.process.mmap(16 * PAGE), fd, 0)
    box.set_private(16, 48)
    box.touch(sel(3, 15, 32, 47))
    seq = box.seq

    box.set_private(8, 48, private=False)

    assert (box.seq, box.mapped()) == (seq + 1, [3])
    assert box.vm.attributes.uniform(8, 56, 0)


@pytest.mark.assumes(has_mirror=False)
def test_conversion_steps() -> None:
    """slots_lock; frame; store all; end and mixed bits in one write section."""
    box = Box(SWPROT, 1024)
    box.touch(3)
    slot = box.vm.slots.by_id[0]
    watch = Watch(box)
    seen: list[Any] = []
    watch.at["invalidate.zap"] = lambda: seen.append((box.mapped(), int(box.vm.attributes.words[3])))
    watch.at["invalidate.store"] = lambda: seen.append((int(box.vm.attributes.words[3]), int(slot.lpage[2][0])))
    watch.at["invalidate.end"] = lambda: seen.append(int(slot.lpage[2][0]))

    box.set_private(3, private=False)

    assert watch.steps == [
        "write slots_lock",
        "write mmu_lock",
        "invalidate.start",
        "invalidate.zap",
        "release mmu_lock",
        "invalidate.store",
        "write mmu_lock",
        "invalidate.end",
        "release mmu_lock",
        "release slots_lock",
    ]
    assert seen == [([], 8), (0, 0), 0]
    assert slot.lpage[2].tolist() == [int(MIXED), 0]


def test_head_and_tail_blocks_are_in_the_frame() -> None:
    """Large blocks at the edges that are not mixed yet must not be mapped large before their bit is set."""
    box = Box(SWPROT, 4 * 512, backing="2m")
    box.set_private(1030, private=False)
    watch = Watch(box)
    ranges: list[tuple[int, int]] = []

    def note() -> None:
        ranges.append((box.vm.frame.start, box.vm.frame.end))

    for gfn, n in [(600, 1), (600, 300), (1031, 1), (1031, 600)]:
        watch.at["invalidate.start"] = note
        box.set_private(gfn, n, private=False)
        watch.at["invalidate.start"] = lambda: None
        box.set_private(gfn, n)

    assert ranges == [(512, 1024), (512, 1024), (1031, 1032), (1031, 2048)]


def test_no_large_page_is_mapped_while_a_neighbour_is_converted() -> None:
    """Section 9: conversion of a few pages against a huge map of a neighbour."""
    box = Box(SWPROT, 1024, backing="2m")
    watch = Watch(box)
    retried: list[int] = []

    def fault() -> None:
        from cvmcore.mem.fault import resolve

        retried.append(drain(resolve(box.vm, box.vm.vcpus[0], sel(700), True, True)).done)

    watch.at["invalidate.store"] = fault
    box.set_private(600, private=False)

    assert retried == [0]
    assert box.touch(700) is None
    assert box.level(700) == 1


@pytest.mark.assumes(needs_accept=False)
def test_part_of_a_huge_page_on_a_direct_root_is_zapped_whole() -> None:
    """Conversion of part of a huge page: zap the whole leaf, refault small (mixed forbids huge)."""
    box = Box(SWPROT, 1024, backing="2m")
    box.touch(slice(512, 1024, 1))
    box.events.clear()

    box.set_private(600, private=False)

    assert box.mapped() == []
    assert "zap:split" not in box.events.said("zap")
    assert box.read(sel(599, 601)) == [1599, 1601]
    assert box.level(599) == 1


def test_part_of_a_huge_page_of_a_mirror_is_split_first() -> None:
    """Neighbours keep content, where a zap would destroy it: at most the two blocks at the edges."""
    box = Box(MIRROR, 4 * 512, backing="2m")
    box.touch(slice(0, 2048, 1))
    box.hw.trace.clear()

    box.set_private(700, 900, private=False)

    assert [call for call in box.hw.trace if call[0] == "split"] == [("split", 512, 1, 2), ("split", 1536, 1, 2)]
    assert box.mapped() == [*range(700), *range(1600, 2048)]
    assert [box.level(gfn) for gfn in (5, 600, 1700)] == [2, 1, 1]
    assert box.read(sel(5, 512, 699, 1600, 2047)) == [1005, 1512, 1699, 2600, 3047]
    box.check_mirror()


def test_a_range_within_one_huge_page_of_a_mirror() -> None:
    """Both edges in one block: one split."""
    box = Box(MIRROR, 1024, backing="2m")
    box.touch(slice(0, 512, 1))

    box.set_private(100, 50, private=False)

    assert [call[:2] for call in box.hw.trace if call[0] == "split"] == [("split", 0)]
    assert box.mapped() == [*range(100), *range(150, 512)]
    assert box.read(sel(99, 150)) == [1099, 1150]
    box.check_mirror()


def test_a_range_that_ends_with_a_huge_page_is_not_split() -> None:
    box = Box(MIRROR, 2048, backing="2m")
    box.touch(slice(0, 2048, 1))

    box.set_private(512, 1024, private=False)

    assert [call for call in box.hw.trace if call[0] == "split"] == []
    assert box.mapped() == [*range(512), *range(1536, 2048)]


def test_shared_leaves_of_a_mirrored_vm_are_not_split() -> None:
    """Only the mirror loses content; the direct root's leaf is zapped whole, and refaults small."""
    box = Box(MIRROR, 1024, backing="2m")
    box.set_private(512, 512, private=False)
    box.touch(slice(512, 1024, 1), private=False)
    assert box.level(600, private=False) == 2
    box.events.clear()

    box.set_private(600)

    assert box.mapped(private=False) == []
    assert "zap:split" not in box.events.said("zap")
    assert box.read(sel(599, 601), private=False) == [1599, 1601]


@pytest.mark.parametrize(("reason", "error"), [(Retry(), errno.EAGAIN), (Fatal(errno.EIO), errno.EIO)])
@pytest.mark.parametrize("edge", ["head", "tail"])
def test_a_split_that_fails_leaves_everything_unchanged(edge: str, reason: Any, error: int) -> None:
    """[N]: error -> the ioctl fails. Attributes, mixed bits and mappings are as before; the frame is closed."""
    box = Box(MIRROR, 4 * 512, backing="2m")
    box.set_private(1100, private=False)
    box.touch(sel(5, 600, 1200, 1800))
    slot = box.vm.slots.by_id[0]
    before = box.mapped(), slot.lpage[2].tolist(), box.vm.attributes.words.tolist()
    tables = box.host.frames.outstanding()[Use.TABLE]
    box.hw.refuse_at("split_private_spt", 512 if edge == "head" else 1536, reason)

    raises(error, lambda: box.set_private(700, 900, private=False))

    assert (box.mapped(), slot.lpage[2].tolist(), box.vm.attributes.words.tolist()) == before
    assert box.idle
    assert box.level(1800) == 2
    assert box.level(600) == (2 if edge == "head" else 1)
    assert box.host.frames.outstanding()[Use.TABLE] == tables + (edge == "tail")
    box.check_mirror()
    if isinstance(reason, Retry):
        assert box.read(sel(5, 600, 1200, 1800)) == [1005, 1600, 2200, 2800]
        box.set_private(700, 900, private=False)
        box.check_mirror()


def test_no_memory_for_a_split_that_became_due_while_the_lock_was_waited_for() -> None:
    """Tables are taken before mmu_lock: the one that was there for the head goes back where the tail gets none."""
    box = Box(MIRROR, 4 * 512, backing="2m")
    box.touch(600)
    steps = invalidate.begin(box.vm, [(box.vm.slots.by_id[0], 700, 1600)], Filter.PRIVATE)
    assert next(steps) == box.vm.mmu_lock.all[0].write
    box.touch(1800)
    tables = box.host.frames.outstanding()[Use.TABLE] - 1
    left = box.host.frames.alloc(box.host.frames.available, Use.META)

    raises(errno.ENOMEM, lambda: drain(steps))

    assert box.host.frames.outstanding()[Use.TABLE] == tables
    assert box.idle
    box.host.frames.free(left)
    box.check_mirror()


def test_a_callback_that_cannot_split_ends_the_notifier() -> None:
    """The callback that hears nothing zaps private pages as well; where it fails, nothing is left open or counted."""
    box = Box(MIRROR, 1024, backing="2m", policies={"invalidation": "untold"})
    box.touch(sel(5, 600))
    box.hw.refuse_at("split_private_spt", 512, Retry())

    raises(errno.EAGAIN, lambda: box.process.migrate_pages(box.hva, 700 * PAGE))

    assert box.idle
    assert box.vm.active_count == 0
    assert box.read(sel(5, 600)) == [1005, 1600]
    assert box.process.migrate_pages(box.hva, 700 * PAGE) == 0


# ---- guest_memfd: PUNCH_HOLE ----------------------------------------------------------------------------------------


@pytest.mark.assumes(needs_accept=False)
def test_punch_hole_zaps_and_frees(private: Backend) -> None:
    """Row 19: the guest reads zero on the range; other indexes keep content."""
    box = Box(private, 16)
    box.touch(slice(2, 8, 1))
    frames = [box.pfn(gfn) for gfn in (3, 4)]
    seq = box.seq

    box.punch(3, 2)

    assert box.mapped() == [2, 5, 6, 7]
    assert (box.seq, box.idle, box.inode.allocated) == (seq + 1, True, 4)
    assert [int(box.host.frames.use[pfn]) for pfn in frames] == [Use.FREE, Use.FREE]
    assert box.read(slice(2, 8, 1)) == [1002, 0, 0, 1005, 1006, 1007]


def test_punch_hole_steps() -> None:
    """invalidate lock W; frame start (zap, flush); truncate -> gmem_invalidate per folio; end; unlock."""
    box = Box(MIRROR, 16)
    box.touch(slice(2, 8, 1))
    watch = Watch(box)
    box.hw.trace.clear()
    pfn = box.pfn(3)

    box.punch(3, 2)

    assert watch.steps == [
        "write invalidate_lock",
        "write mmu_lock",
        "invalidate.start",
        "invalidate.zap",
        "release mmu_lock",
        "invalidate.store",
        "write mmu_lock",
        "invalidate.end",
        "release mmu_lock",
        "release invalidate_lock",
    ]
    assert box.hw.trace == [("remove", 3, 2, 1), ("flush", 3, 5), ("gmem_invalidate", pfn, 2)]
    assert watch.frames[watch.steps.index("invalidate.store")][0] == 1


def test_punch_hole_of_an_index_that_is_not_bound() -> None:
    """No binding: no frame; the folios go all the same."""
    box = Box(SWPROT, 16)
    fd = box.fd.create_guest_memfd(8 * PAGE)
    box.process.fallocate(fd, 1, 0, 8 * PAGE)
    seq = box.seq

    box.punch(0, 8, fd)

    assert (box.seq, box.process.files[fd].inode.allocated) == (seq, 0)


def test_punch_hole_translates_indexes_to_gfns() -> None:
    """The hole is in the file; what is zapped are the gfns through which slots show it, each with its offset."""
    box = Box(SWPROT, 8)
    fd = box.fd.create_guest_memfd(16 * PAGE)
    hva = box.process.mmap(16 * PAGE)
    box.fd.set_user_memory_region2(1, GUEST_MEMFD, 64 * PAGE, 4 * PAGE, hva, fd, 8 * PAGE)
    box.fd.set_user_memory_region2(2, GUEST_MEMFD, 32 * PAGE, 6 * PAGE, hva, fd, 2 * PAGE)
    box.set_private(32, 40)
    box.touch(slice(32, 38, 1))
    box.touch(slice(64, 68, 1))
    seq = box.seq

    box.punch(6, 4, fd)

    assert (box.mapped(), box.seq) == ([32, 33, 34, 35, 66, 67], seq + 1)


@pytest.mark.assumes(needs_accept=False)
def test_punch_hole_through_two_files_of_an_inode() -> None:
    """By inode: every VM's view of it is zapped."""
    box, other = Box(SWPROT, 16), None
    other = box.process.create_vm()
    file = GmemFile(box.inode, other.vm)
    box.inode.files.append(file)
    other.vm.users += 1
    other.vm.gmem_files.append(file)
    fd = box.process.install(file)
    other.set_user_memory_region2(0, GUEST_MEMFD, 0, 16 * PAGE, box.process.mmap(16 * PAGE), fd, 0)
    other.set_memory_attributes(0, 16 * PAGE, 8)
    vcpu = other.create_vcpu()
    box.touch(3)
    assert vcpu.run(box.action(3)) is None

    box.punch(3)

    assert box.mapped() == []
    assert other.vm.tdp.direct.level_at(3) == 0
    assert (box.idle, other.vm.frame.in_progress) == (True, 0)


@pytest.mark.assumes(gmem_backed=True)
def test_punch_hole_of_shared_memory() -> None:
    """INIT_SHARED -> SHARED: the direct root of a gmem-only slot."""
    box = Box(DEFAULT, 8)
    fd = box.fd.create_guest_memfd(4 * PAGE, 3)
    box.fd.set_user_memory_region2(1, GUEST_MEMFD, 1 << 30, 4 * PAGE, 0, fd, 0)
    box.touch(slice(1 << 18, (1 << 18) + 4, 1))

    box.punch(1, 1, fd)

    assert invalidate.gmem_kinds(box.process.files[fd].inode) == Filter.SHARED
    assert box.mapped() == [(1 << 18), (1 << 18) + 2, (1 << 18) + 3]
    assert box.read((1 << 18) + 1) == [0]


def test_punch_hole_leaves_the_shared_root_of_a_mirrored_vm() -> None:
    """PRIVATE only: the shared view of the same gfn has other memory."""
    box = Box(MIRROR, 16)
    box.touch(3)
    box.set_private(3, private=False)
    box.touch(3, private=False)

    box.punch(3)

    assert box.mapped(private=False) == [3]
    assert box.read(3, private=False) == [1003]


def test_punch_of_part_of_a_huge_page() -> None:
    """[N]: before a punch zap, huge leaves across the edge are split, so that the neighbours keep content."""
    box = Box(MIRROR, 1024, backing="2m")
    box.touch(slice(0, 1024, 1))

    box.punch(500, 100)

    assert box.mapped() == [*range(500), *range(600, 1024)]
    assert box.read(sel(499, 500, 599, 600)) == [1499, 0, 0, 1600]
    box.check_mirror()


def test_punch_whose_split_fails() -> None:
    """The fallocate fails; nothing is freed, every frame is closed."""
    box = Box(MIRROR, 1024, backing="2m")
    box.touch(slice(0, 1024, 1))
    box.hw.refuse_at("split_private_spt", 512, Retry())

    raises(errno.EAGAIN, lambda: box.punch(500, 100))

    assert (box.mapped(), box.inode.allocated, box.idle) == (list(range(1024)), 1024, True)
    assert box.read(sel(499, 500, 599, 600)) == [1499, 1500, 1599, 1600]
    box.check_mirror()


# ---- guest_memfd: release -------------------------------------------------------------------------------------------


def test_file_release_zaps_all_bindings(private: Backend) -> None:
    """Every bound slot's file := NULL; the memory is freed with the inode."""
    box = Box(private, 16)
    box.touch(slice(2, 8, 1))
    inode = box.inode
    seq = box.seq

    box.process.close(box.gmem)

    assert (box.mapped(), box.seq, box.idle) == ([], seq + 1, True)
    assert (box.vm.slots.by_id[0].gmem, inode.files, inode.allocated) == (None, [], 0)
    assert box.touch(3) == MemoryFault(3 * PAGE, flags=8)


def test_file_release_steps() -> None:
    box = Box(MIRROR, 16)
    box.touch(slice(2, 4, 1))
    pfn = box.pfn(2)
    watch = Watch(box)
    box.hw.trace.clear()

    box.process.close(box.gmem)

    assert watch.steps == [
        "write slots_lock",
        "write invalidate_lock",
        "write mmu_lock",
        "invalidate.start",
        "invalidate.zap",
        "release mmu_lock",
        "write mmu_lock",
        "invalidate.end",
        "release mmu_lock",
        "release invalidate_lock",
        "release slots_lock",
    ]
    assert [call[0] for call in box.hw.trace] == ["remove", "flush", "gmem_invalidate"]
    assert box.hw.trace[2] == ("gmem_invalidate", pfn, 2)


def test_memory_persists_until_the_inode_dies() -> None:
    """Row 28: a second file of the inode keeps the memory."""
    box = Box(SWPROT, 16)
    box.touch(3)
    inode = box.inode
    second = GmemFile(inode, box.vm)
    inode.files.append(second)
    box.vm.users += 1
    box.vm.gmem_files.append(second)
    fd = box.process.install(second)

    box.process.close(box.gmem)

    assert (box.mapped(), inode.allocated) == ([], 1)
    box.process.close(fd)
    assert inode.allocated == 0


def test_close_of_one_descriptor_of_two(private: Backend) -> None:
    box = Box(private, 16)
    box.touch(3)
    fd = box.process.dup(box.gmem)
    seq = box.seq

    box.process.close(fd)

    assert (box.mapped(), box.seq) == ([3], seq)


# ---- guest_memfd: memory failure ------------------------------------------------------------------------------------


def test_memory_failure(private: Backend) -> None:
    """invalidate lock shared; start; end; folio kept; next lookup -EHWPOISON."""
    box = Box(private, 16)
    box.touch(slice(2, 8, 1))
    seq = box.seq
    watch = Watch(box)

    box.process.memory_failure(box.gmem, 4 * PAGE)

    assert watch.steps[0] == "read invalidate_lock"
    assert watch.happened("invalidate.start", "invalidate.zap", "invalidate.end") == [
        "invalidate.start",
        "invalidate.zap",
        "invalidate.end",
    ]
    assert (box.mapped(), box.seq, box.inode.allocated) == ([2, 3, 5, 6, 7], seq + 1, 6)
    assert box.touch(4) == MemoryFault(4 * PAGE, flags=8, errno=133)


@pytest.mark.assumes(fresh_is_zero=True)
def test_a_failed_page_does_not_come_back(private: Backend) -> None:
    """The hole frees its folio, and the page can be used again; nobody gets the frame that failed."""
    box = Box(private, 16)
    box.touch(4)
    failed = box.pfn(4)
    box.process.memory_failure(box.gmem, 4 * PAGE)

    box.punch(4)

    assert box.read(4) == [0]
    assert (box.host.frames.use[failed], box.pfn(4) != failed) == (Use.LEAKED, True)
    box.destroy()


@pytest.mark.assumes(fresh_is_zero=True)
def test_memory_failure_where_nothing_is_allocated() -> None:
    """There is no folio that could fail; the page can be used."""
    box = Box(SWPROT, 16)

    box.process.memory_failure(box.gmem, 4 * PAGE)
    box.process.memory_failure(box.gmem, 99 * PAGE)

    assert box.read(4) == [0]


# ---- dirty logging --------------------------------------------------------------------------------------------------


@pytest.mark.assumes(dirty_logging=True)
def test_enabling_the_log_splits_under_read_and_protects_under_write() -> None:
    """Faults elsewhere go on while huge pages are split; a flush before the lock is dropped."""
    box = Box(DEFAULT, 1024, backing="2m")
    box.touch(slice(0, 1024, 1))
    watch = Watch(box)
    size = 1024 * PAGE

    levels: list[int] = []
    watch.at["write mmu_lock"] = lambda: levels.extend(box.vm.tdp.direct.leaves[1:3])
    box.fd.set_user_memory_region2(0, 1, 0, size, box.hva)

    locks = [step for step in watch.steps if step.endswith("mmu_lock")]
    assert locks == ["read mmu_lock", "release mmu_lock", "write mmu_lock", "release mmu_lock"]
    assert levels == [1024, 0]
    assert not box.writable(5)


# ---- memslots -------------------------------------------------------------------------------------------------------


def two_slots(backend: Backend) -> Box:
    """A second slot of 8 pages at gfn 2**18, with pages 0 and 1 of both slots touched."""
    box = Box(backend, 16)
    fd = box.fd.create_guest_memfd(8 * PAGE) if box.private else -1
    flags = GUEST_MEMFD if box.private else 0
    box.fd.set_user_memory_region2(1, flags, 1 << 30, 8 * PAGE, box.process.mmap(8 * PAGE), fd, 0)
    if box.private:
        box.set_private(1 << 18, 8)
    box.touch(sel(0, 1, 1 << 18, (1 << 18) + 1))
    return box


@pytest.mark.assumes(memslots_fixed_after_run=False)
def test_memslot_delete_of_the_default_vm_zaps_everything() -> None:
    """Default VM and quirk: fast-zap all direct roots; what other slots map refaults."""
    box = two_slots(DEFAULT)
    old = box.vm.tdp.direct

    box.fd.set_user_memory_region2(1, 0, 0, 0)

    assert box.mapped() == []
    assert box.vm.tdp.direct is not old
    assert box.vm.tdp.invalid == []
    assert box.read(slice(0, 2, 1)) == [1000, 1001]
    assert box.vm.vcpus[0].tlb.entries.keys() == {(0, False), (1, False)}


@pytest.mark.assumes(has_mirror=False, needs_accept=False)
@pytest.mark.parametrize("backend", [SWPROT, KEEPS, MIRROR, MEDIATED], ids=["swprot", "mirror", "lossy", "mediated"])
def test_memslot_delete_of_others_zaps_this_slot_only(backend: Backend) -> None:
    """Others: leaves of this slot only, both kinds."""
    box = two_slots(backend)
    if backend in (KEEPS, MIRROR):
        box.set_private((1 << 18) + 4, private=False)
        box.touch((1 << 18) + 4, private=False)

    box.fd.set_user_memory_region2(1, 0, 0, 0)

    assert box.mapped() == [0, 1]
    assert box.mapped(private=False) == ([] if box.private and backend is not SWPROT else [0, 1])
    assert box.read(slice(0, 2, 1)) == [1000, 1001]


def test_memslot_delete_steps() -> None:
    """INVALID copy; wait active_count == 0; SRCU sync; flush slot; reclaimed hook; prepare; remove, which waits again;
    sync; unbind."""
    box = two_slots(MIRROR)
    slot = box.vm.slots.by_id[1]
    watch = Watch(box)
    box.hw.trace.clear()
    seen: list[bool] = []
    watch.at["write srcu"] = lambda: seen.append(slot.invalid)

    box.fd.set_user_memory_region2(1, 0, 0, 0)

    assert watch.steps == [
        "write slots_lock",
        "write mn_active",
        "release mn_active",
        "write srcu",
        "release srcu",
        "write mmu_lock",
        "release mmu_lock",
        "write mn_active",
        "release mn_active",
        "write srcu",
        "release srcu",
        "write invalidate_lock",
        "release invalidate_lock",
        "release slots_lock",
    ]
    assert box.hw.trace == [
        ("remove", 1 << 18, 2, 1),
        ("flush", 1 << 18, (1 << 18) + 8),
        ("memory_reclaimed", 2),
        ("memslot_free", 1),
    ]
    assert seen == [True]
    assert 1 not in box.vm.slots.by_id


@pytest.mark.assumes(needs_accept=False)
def test_memslot_delete_keeps_the_memory_of_the_file() -> None:
    """Unbound, not freed: bind it again and find the content (rows 19, 22)."""
    box = two_slots(SWPROT)
    slot = box.vm.slots.by_id[1]
    assert slot.gmem is not None
    fd = next(fd for fd, file in box.process.files.items() if file is slot.gmem)

    box.fd.set_user_memory_region2(1, 0, 0, 0)
    assert slot.gmem.bindings == []
    box.fd.set_user_memory_region2(5, GUEST_MEMFD, 1 << 30, 8 * PAGE, slot.hva, fd, 0)

    assert box.read(slice(1 << 18, (1 << 18) + 3, 1)) == [1000 + (1 << 18), 1001 + (1 << 18), 0]


@pytest.mark.assumes(memslots_fixed_after_run=False, needs_accept=False)
@pytest.mark.parametrize("backend", [DEFAULT, SWPROT, MEDIATED], ids=["default", "swprot", "mediated"])
def test_memslot_move(backend: Backend) -> None:
    """As delete, then re-add elsewhere: the same memory at the new gfns; the old ones are MMIO."""
    box = Box(backend, 16)
    hva = box.process.mmap(4 * PAGE)
    box.fd.set_user_memory_region2(1, 0, 1 << 30, 4 * PAGE, hva)
    box.touch(slice(1 << 18, (1 << 18) + 4, 1), private=False)
    box.touch(3)

    box.fd.set_user_memory_region2(1, 0, 1 << 31, 4 * PAGE, hva)

    assert [gfn for gfn in box.mapped() if gfn >> 18] == []
    assert box.touch(1 << 18, private=False) is not None
    assert box.read(slice(1 << 19, (1 << 19) + 2, 1), private=False) == [1000 + (1 << 18), 1001 + (1 << 18)]
    assert box.read(3) == [1003]


def test_a_refused_delete_leaves_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arch prepare fails: the slots stay as they are; leaves are zapped by then, and fault in again."""
    from fakes import backend_of

    from cvmcore.backends.swprot import SwProt
    from cvmcore.hookspecs import hookimpl
    from cvmcore.types import Change

    class Refuses(SwProt):
        @hookimpl
        def memslot_prepare(self, change: Change) -> None:
            if change is Change.DELETE:
                raise UapiError(errno.EPERM, "memslot", "no")

    box = two_slots(backend_of("refuses", Refuses))

    raises(errno.EPERM, lambda: box.fd.set_user_memory_region2(1, 0, 0, 0))

    assert (box.mapped(), box.vm.slots.by_id[1].invalid) == ([0, 1], False)
    assert box.read(1 << 18) == [1000 + (1 << 18)]


# ---- fast zap -------------------------------------------------------------------------------------------------------


@pytest.mark.assumes(memslots_fixed_after_run=False)
def test_fast_zap_steps() -> None:
    """W: mark direct roots invalid, request reload on all vCPUs; R: zap."""
    box = two_slots(DEFAULT)
    watch = Watch(box)
    seen: list[Any] = []
    watch.at["read mmu_lock"] = lambda: seen.append((len(box.vm.tdp.invalid), box.mapped()))

    box.fd.set_user_memory_region2(1, 0, 0, 0)

    assert watch.happened("write mmu_lock", "read mmu_lock", "release mmu_lock") == [
        "write mmu_lock",
        "release mmu_lock",
        "read mmu_lock",
        "release mmu_lock",
    ]
    assert seen == [(1, [])]
    assert box.host.meter.counts["spte_write"] == 4


@pytest.mark.assumes(mediated_root=False)
def test_fast_zap_is_for_the_default_vm_only() -> None:
    """Mirror roots are excluded; so are VM types whose pages may not all be zapped."""
    have = {backend.name: Box(backend, 8).vm.fast_zap for backend in (DEFAULT, SWPROT, MIRROR, MEDIATED)}

    assert have == {"default": True, "swprot": False, "mirror": False, "mediated": False}


# ---- mm exit --------------------------------------------------------------------------------------------------------


def test_mm_exit_leaves_the_mirror() -> None:
    """Zap direct roots; mirror untouched."""
    box = Box(MIRROR, 16)
    box.set_private(4, 4, private=False)
    box.touch(slice(2, 4, 1), private=True)
    box.touch(slice(4, 8, 1), private=False)

    drain(box.process.mm.teardown())

    assert (box.mapped(private=True), box.mapped(private=False)) == ([2, 3], [])
    box.check_mirror()


@pytest.mark.assumes(gmem_backed=True)
def test_mm_exit_zaps_slots_without_an_hva_too() -> None:
    """All direct roots, including slots whose guest_memfd is not mapped in the VMM."""
    box = Box(DEFAULT, 8)
    fd = box.fd.create_guest_memfd(4 * PAGE, 3)
    box.fd.set_user_memory_region2(1, GUEST_MEMFD, 1 << 30, 4 * PAGE, 0, fd, 0)
    box.touch(sel(3, 1 << 18))

    drain(box.process.mm.teardown())

    assert box.mapped() == []


def test_a_process_loses_its_memory_before_its_descriptors() -> None:
    """mm exit comes before VM destroy."""
    box = Box(MIRROR, 16)
    box.set_private(4, private=False)
    box.touch(4, private=False)
    box.hw.trace.clear()
    box.events.clear()

    box.process.exit()

    order = [event.name for event in box.events.events if event.name in ("zap_root", "vm_pre_destroy")]
    assert order[:2] == ["zap_root", "vm_pre_destroy"]


# ---- VM destroy -----------------------------------------------------------------------------------------------------


def test_vm_destroy_steps() -> None:
    """Private leaves go with the gmem files; keys out; tables bottom-up; vm_destroy; slots. Then the inode's memory:
    the file's reference held the VM, and is dropped before the inode dies."""
    box = Box(MIRROR, 1024)
    box.touch(sel(3, 600))
    box.hw.trace.clear()
    box.events.clear()

    box.machine.destroy()

    names = [call[0] for call in box.hw.trace]
    assert names == [
        *["memory_reclaimed", "remove", "flush", "vm_pre_destroy"],
        *["free", "free", "free", "vm_destroy", "memslot_free", "gmem_invalidate"],
    ]
    assert [call for call in box.hw.trace if call[0] == "free"] == [
        ("free", 0, 2, 2),
        ("free", 0, 1, 3),
        ("free", 0, 1, 4),
    ]
    assert box.machine.leftovers() == []


def test_vm_outlives_its_gmem_files(private: Backend) -> None:
    """Row 28: an open guest_memfd holds the VM; its own descriptor is not the last word."""
    box = Box(private, 16)
    box.touch(3)

    box.fd.close()
    assert not box.vm.destroyed
    box.process.close(box.gmem)

    assert box.vm.destroyed
    assert box.host.vms == []


@pytest.mark.parametrize("backing", ["4k", "2m"])
@pytest.mark.parametrize(
    "backend", [DEFAULT, SWPROT, KEEPS, MIRROR, MEDIATED], ids=["default", "swprot", "mirror", "lossy", "mediated"]
)
def test_nothing_is_left_after_destroy(backend: Backend, backing: str) -> None:
    """Row 30: zero references, pins, tables, owned pages."""
    box = Box(backend, 1600, backing=backing)
    box.touch(slice(3, 1200, 1))
    if box.private:
        box.set_private(600, 100, private=False)
        box.touch(slice(600, 650, 1), private=False)
        box.punch(300, 50)
    box.process.madvise_dontneed(box.hva + 100 * PAGE, M2)

    box.destroy()

    assert (box.host.frames.in_use, box.host.frames.pins_held, box.host.vms) == (0, 0, [])
    assert box.process.mm.notifiers == []
