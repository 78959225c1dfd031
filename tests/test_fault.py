"""The fault path, step by step as kvm-core.md section 4 numbers them."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from fakes import M2, MEDIATED, MIRROR, PAGE, PINNING, Box, backend_of, mirror, sel

from cvmcore.backend import Backend
from cvmcore.backends.default import DEFAULT
from cvmcore.backends.swprot import SWPROT, SwProt
from cvmcore.effects import FAULT_PFN, FAULT_SNAPSHOT, Effect, drain
from cvmcore.errors import InvariantViolation, UapiError
from cvmcore.hookspecs import hookimpl
from cvmcore.mem.fault import Fault, resolve
from cvmcore.mem.tdp import FROZEN
from cvmcore.observers import FaultInjector
from cvmcore.pages import EMPTY, Sel, first
from cvmcore.types import (
    Fatal,
    GuestException,
    MapGpaRange,
    MemoryFault,
    Mmio,
    RetPf,
    Retry,
    Shutdown,
    Stopped,
    Use,
    Walk,
)
from cvmcore.vcpu import IN_VAIN, STUCK, Accept, Convert

READONLY, GUEST_MEMFD = 2, 4
BACKENDS = {"default": DEFAULT, "swprot": SWPROT, "mirror": MIRROR, "mediated": MEDIATED}
PRIVATE_BY_ATTRIBUTE = {"swprot": SWPROT, "mirror": MIRROR}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """default, swprot, and the two fakes whose entries go through hooks."""
    return BACKENDS[request.param]


@pytest.fixture(params=PRIVATE_BY_ATTRIBUTE)
def private(request: pytest.FixtureRequest) -> Backend:
    """VM types with private memory by attribute."""
    return PRIVATE_BY_ATTRIBUTE[request.param]


def fault(box: Box, gfns: Sel | int, *, write: bool = True, private: bool | None = None, **how: Any) -> Fault:
    """Resolve faults of vCPU 0, as the fault path does after an exit."""
    pages = slice(gfns, gfns + 1, 1) if isinstance(gfns, int) else gfns
    kind = box.private if private is None else private
    return drain(resolve(box.vm, box.vm.vcpus[0], pages, write, kind, **how))


def at_point(box: Box, where: Effect, event: Any, gfn: int = 3) -> Fault:
    """Resolve a fault on one page; `event` happens when the fault path comes to a point."""
    steps = resolve(box.vm, box.vm.vcpus[0], slice(gfn, gfn + 1, 1), True, box.private)
    try:
        while True:
            if next(steps) is where:
                event()
    except StopIteration as stop:
        result: Fault = stop.value
        return result


# ---- the plain case -------------------------------------------------------------------------------------------------


@pytest.mark.assumes(fresh_is_zero=True)
def test_first_touch_maps_the_page_and_reads_zero(backend: Backend) -> None:
    box = Box(backend, 8)

    assert box.read(3) == [0]
    assert box.mapped() == [3]
    assert box.touch(3) is None
    assert box.read(3) == [1003]


@pytest.mark.assumes(confidential=False)
def test_a_fault_is_fixed_and_a_repeated_one_is_spurious(backend: Backend) -> None:
    """Row 24: a repeated fault gives SPURIOUS and calls no set hook."""
    box = Box(backend, 8)

    assert fault(box, slice(2, 5, 1)).ret is RetPf.FIXED
    before = box.host.hw.calls.get("set_private_spte", 0) if box.host.hw else 0
    again = fault(box, slice(2, 5, 1))

    assert (again.done, again.ret) == (3, RetPf.SPURIOUS)
    if box.host.hw:
        assert box.host.hw.calls["set_private_spte"] == before


@pytest.mark.assumes(mediated_root=False)
def test_a_fault_on_old_and_new_pages_is_fixed(backend: Backend) -> None:
    box = Box(backend, 8)
    fault(box, 2)

    both = fault(box, slice(2, 4, 1))

    assert (both.done, both.ret) == (2, RetPf.FIXED)
    assert box.mapped() == [2, 3]


def test_two_vcpus_map_one_page() -> None:
    """The loser of the race finds the page mapped to the same frame: SPURIOUS."""
    box = Box(SWPROT, 8, vcpus=2)

    late = at_point(box, FAULT_PFN, lambda: drain(resolve(box.vm, box.vm.vcpus[1], sel(3), True, True)))

    assert late.ret is RetPf.SPURIOUS
    assert box.mapped() == [3]


# ---- step 1: the access kind ----------------------------------------------------------------------------------------


def test_private_and_shared_accesses_use_their_own_root() -> None:
    """Step 2: mirror root if the address is private, else direct root."""
    box = Box(MIRROR, 8)
    box.set_private(5, private=False)

    box.touch(2, private=True)
    box.touch(5, private=False)

    assert (box.mapped(private=True), box.mapped(private=False)) == ([2], [5])


@pytest.mark.assumes(has_mirror=False)
def test_without_a_mirror_both_kinds_use_the_direct_root() -> None:
    box = Box(SWPROT, 8)
    box.set_private(5, private=False)

    box.touch(2, private=True)
    box.touch(5, private=False)

    assert box.vm.tdp.mirror is None
    assert box.mapped() == [2, 5]


# ---- step 4: caches -------------------------------------------------------------------------------------------------


def test_no_memory_for_tables_ends_the_fault() -> None:
    """-ENOMEM to user space; nothing is mapped, nothing stays behind."""
    box = Box(MIRROR, 8)
    frames = box.host.frames
    frames.alloc(frames.available - 2, Use.META)

    leave = box.touch(3)

    assert isinstance(leave, Shutdown)
    assert leave.errno == errno.ENOMEM
    assert (box.mapped(), frames.available) == ([], 2)


@pytest.mark.parametrize(("reason", "error"), [(Fatal(errno.EIO), errno.EIO), (Retry(), errno.ENOMEM)])
def test_a_topup_that_fails_ends_the_fault(reason: Any, error: int) -> None:
    """The errno of Fatal, ENOMEM for Retry."""
    box = Box(PINNING, 8, observers=[FaultInjector("topup", 1, Stopped(0, reason))])

    leave = box.touch(3)

    assert isinstance(leave, Shutdown)
    assert leave.errno == error
    assert box.mapped() == []


def test_pages_below_a_failed_topup_are_mapped() -> None:
    box = Box(PINNING, 8)
    box.hw.refuse("topup", 1, 2, Retry())

    assert isinstance(box.touch(slice(1, 6, 1)), Shutdown)
    assert box.mapped() == [1, 2]


# ---- step 5: the snapshot -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [FAULT_SNAPSHOT, FAULT_PFN], ids=["snapshot", "pfn"])
def test_a_conversion_meanwhile_is_caught(where: Effect) -> None:
    """Rows of section 9: attribute read after the snapshot; a stale result fails the test of seq, or mismatches."""
    box = Box(SWPROT, 8)

    result = at_point(box, where, lambda: box.set_private(3, private=False))

    if where is FAULT_PFN:
        assert (result.done, result.ret) == (0, RetPf.RETRY)
    else:
        assert result.exit == MemoryFault(3 * PAGE, flags=8)
    assert box.mapped() == []


def test_a_hole_punched_meanwhile_is_caught() -> None:
    """seq makes the old pfn unusable, even for a page that was never mapped."""
    box = Box(SWPROT, 8)

    result = at_point(box, FAULT_PFN, lambda: box.punch(3))

    assert (result.done, result.ret) == (0, RetPf.RETRY)
    assert box.mapped() == []
    assert box.inode.allocated == 0


@pytest.mark.assumes(dirty_logging=True)
def test_a_frame_that_came_and_went_is_caught_before_the_page_is_looked_up() -> None:
    """The check without a lock (9) looks at the count, too: nothing is allocated, and nothing emulated."""
    box = Box(DEFAULT, 8)
    box.fd.set_user_memory_region2(1, READONLY, 1 << 30, 4 * PAGE, box.process.mmap(4 * PAGE))

    def elsewhere() -> None:
        box.vm.frame.add(100, 101)
        box.vm.frame.drop()

    for gfn in (3, 1 << 18):
        assert at_point(box, FAULT_SNAPSHOT, elsewhere, gfn).ret is RetPf.RETRY

    assert box.process.mm.mappings[0].words[3] == 0


def test_the_vcpu_refaults_after_a_retry() -> None:
    box = Box(SWPROT, 8)

    class Once:
        done = False

        def __call__(self, steps: Any) -> Any:
            try:
                while True:
                    if next(steps) is FAULT_PFN and not self.done:
                        self.done = True
                        box.vm.frame.seq += 1
            except StopIteration as stop:
                return stop.value

    box.host.drive = Once()

    assert box.touch(3) is None
    assert (box.mapped(), box.vm.vcpus[0].retries) == ([3], 1)


def test_a_stale_root_is_not_used() -> None:
    """Step 12: root obsolete. A fast zap meanwhile: the fault must not install into the invalid root."""
    box = Box(DEFAULT, 8)
    box.fd.set_user_memory_region2(1, 0, 1 << 30, 4 * PAGE, box.process.mmap(4 * PAGE))

    result = at_point(box, FAULT_PFN, lambda: box.fd.set_user_memory_region2(1, 0, 1 << 30, 0))

    assert result.ret is RetPf.RETRY
    assert box.mapped() == []


def test_pages_in_a_range_under_invalidation_retry() -> None:
    """Steps 9 and 12: in_progress and the range; gfns outside of it go on."""
    box = Box(SWPROT, 64)
    box.vm.frame.add(8, 16)

    assert fault(box, 7).ret is RetPf.FIXED
    assert fault(box, 16).ret is RetPf.FIXED
    for gfns in (sel(8), sel(15), slice(0, 20, 1), sel(3, 9, 30)):
        stopped = fault(box, gfns)
        assert (stopped.done, stopped.ret) == (0, RetPf.RETRY)
    assert box.mapped() == [7, 16]


# ---- step 6: mismatch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("access", [True, False], ids=["private access", "shared access"])
def test_mismatch(private: Backend, access: bool) -> None:
    """EFAULT with the exit record: gpa page aligned, size 4096, PRIVATE flag as the access was (row 26)."""
    box = Box(private, 8)
    box.set_private(3, private=not access)

    leave = box.touch(3, private=access)

    assert leave == MemoryFault(gpa=3 * PAGE, flags=8 if access else 0, size_bytes=4096, errno=errno.EFAULT)
    assert box.mapped(private=access) == []


def test_mismatch_is_looked_for_before_the_slot(private: Backend) -> None:
    """Attributes exist without memslots: a shared access to a private gfn is no MMIO (row 25)."""
    box = Box(private, 8)
    box.set_private(1 << 20)

    assert box.touch(1 << 20, private=False) == MemoryFault(1 << 32, flags=0)


def test_no_attributes_no_mismatch() -> None:
    """A VM type without attributes has no mismatch: whatever is accessed is served."""
    box = Box(DEFAULT, 8)

    assert box.touch(3, private=False) is None


@pytest.mark.assumes(needs_accept=False)
def test_pages_below_a_mismatch_are_complete(private: Backend) -> None:
    box = Box(private, 16)
    box.set_private(6, 2, private=False)
    action = box.action(slice(4, 9, 1))

    leave = box.vcpus[0].run(action)

    assert leave == MemoryFault(6 * PAGE, flags=8)
    assert (action.done, box.mapped(private=True), box.read(slice(4, 6, 1))) == (2, [4, 5], [1004, 1005])


@pytest.mark.assumes(needs_accept=False)
def test_the_guest_goes_on_after_the_conversion(private: Backend) -> None:
    """The VMM converts and enters again: the same action is completed."""
    box = Box(private, 16)
    box.set_private(6, 1, private=False)
    action = box.action(slice(4, 9, 1))
    box.vcpus[0].run(action)

    box.set_private(6)

    assert box.vcpus[0].run(action) is None
    assert box.read(slice(4, 9, 1)) == [1004, 1005, 1006, 1007, 1008]


# ---- step 7: no slot ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("gfns", [1 << 20, slice(1 << 20, (1 << 20) + 3, 1), sel(1 << 20, (1 << 20) + 9)], ids=str)
def test_shared_access_without_slot_is_mmio(backend: Backend, gfns: Any, write: bool) -> None:
    """EMULATE: the exit tells the address and the direction."""
    assert Box(backend, 8).touch(gfns, write=write, private=False) == Mmio(1 << 32, write)


def test_an_encrypted_access_without_slot_is_mmio() -> None:
    """Without the attribute KVM cannot tell private accesses apart (fault->is_private)."""
    assert Box(DEFAULT, 8).touch(1 << 20, private=True) == Mmio(1 << 32, write=True)


def test_private_access_without_slot(private: Backend) -> None:
    """Memory-fault exit, never MMIO (row 25)."""
    box = Box(private, 8)
    box.set_private(1 << 20, 4)

    for gfns in (1 << 20, slice((1 << 20), (1 << 20) + 3, 1), sel(1 << 20, (1 << 20) + 2)):
        assert box.touch(gfns) == MemoryFault(1 << 32, flags=8)


@pytest.mark.assumes(needs_accept=False)
def test_pages_below_the_end_of_memory_are_complete(backend: Backend) -> None:
    box = Box(backend, 8)
    action = box.action(slice(6, 11, 1))

    leave = box.vcpus[0].run(action)

    if box.private:
        assert leave == MemoryFault(8 * PAGE, flags=8)
    else:
        assert leave == Mmio(8 * PAGE, write=True)
    assert (action.done, box.mapped()) == (2, [6, 7])


@pytest.mark.assumes(needs_accept=False)
def test_pages_above_the_end_of_memory_scattered(backend: Backend) -> None:
    box = Box(backend, 8)
    action = box.action(sel(1, 6, 20, 700), write=False)

    assert box.vcpus[0].run(action) is not None
    assert (action.done, box.mapped()) == (2, [1, 6])


# ---- step 8: INVALID slot -------------------------------------------------------------------------------------------


def test_invalid_slot_retries(backend: Backend) -> None:
    """RETRY for the guest, -EAGAIN for a prefetch; nothing is mapped, no MMIO is cached."""
    box = Box(backend, 8)
    box.vm.slots.by_id[0].invalid = True

    assert fault(box, 3).ret is RetPf.RETRY
    assert fault(box, 3, prefetch=True).errno == errno.EAGAIN
    assert box.mapped() == []


def test_a_fault_that_never_gets_on_is_a_bug_of_the_model() -> None:
    box = Box(SWPROT, 8)
    box.vm.slots.by_id[0].invalid = True

    with pytest.raises(InvariantViolation, match=f"retried {STUCK} times"):
        box.touch(3)


@pytest.mark.assumes(has_mirror=False)  # the CPU walks the root itself
def test_a_page_that_is_mapped_in_vain_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault says that the page is mapped, and the walk misses it again and again."""
    box = Box(SWPROT, 8)
    root = box.vm.tdp.root_for(True)
    looked_up = type(root).lookup
    misses = iter([True] * (IN_VAIN + 1))
    monkeypatch.setattr(
        type(root), "lookup",
        lambda self, gfns, write: (int(Walk.MISS), EMPTY, 0) if next(misses, False) else looked_up(self, gfns, write),
    )  # fmt: skip

    with pytest.raises(InvariantViolation, match=f"mapped {IN_VAIN} times") as caught:
        box.touch(3)

    assert (caught.value.gfn, caught.value.pfn) == (3, box.pfn(3))
    assert caught.value.states == {"private": True, "mapped at level": 1}


# ---- step 10: the frame ---------------------------------------------------------------------------------------------


@pytest.mark.assumes(encrypts=False)
def test_private_memory_comes_from_gmem_and_shared_from_the_hva(private: Backend) -> None:
    """Row 20: private writes and shared writes do not touch each other's backing."""
    box = Box(private, 8)
    box.touch(3)
    box.set_private(3, private=False)
    box.touch(3, private=False, stamps=77)

    assert box.process.read(box.hva + 3 * PAGE, 1)[1].tolist() == [77]
    assert box.pfn(3, private=False) not in (box.inode.words >> 5)
    assert box.host.memory.stamp[int(box.inode.words[3]) >> 5] == 1003


def test_private_access_to_a_slot_without_gmem(private: Backend) -> None:
    box = Box(private, 8)
    box.fd.set_user_memory_region2(1, 0, 1 << 30, 4 * PAGE, box.process.mmap(4 * PAGE))
    box.set_private(1 << 18, 4)

    assert box.touch(1 << 18) == MemoryFault(1 << 30, flags=8, errno=errno.EFAULT)


def test_file_closed(private: Backend) -> None:
    """-EFAULT with the exit record."""
    box = Box(private, 8)
    box.touch(3)
    box.process.close(box.gmem)

    assert box.touch(3) == MemoryFault(3 * PAGE, flags=8, errno=errno.EFAULT)


def test_poison(private: Backend) -> None:
    """-EHWPOISON with the exit record, each time; the neighbours go on."""
    box = Box(private, 8)
    box.touch(slice(2, 5, 1))
    box.process.memory_failure(box.gmem, 3 * PAGE)

    for _ in range(2):
        assert box.touch(3) == MemoryFault(3 * PAGE, flags=8, errno=133)
    assert box.mapped() == [2, 4]


def test_no_memory_for_the_page(private: Backend) -> None:
    """-ENOMEM with the exit record for guest_memfd."""
    box = Box(private, 8)
    box.touch(1)
    box.host.frames.alloc(box.host.frames.available, Use.META)

    assert box.touch(3) == MemoryFault(3 * PAGE, flags=8, errno=errno.ENOMEM)


def test_no_memory_for_a_page_of_the_vmm() -> None:
    """-ENOMEM, no exit record."""
    box = Box(DEFAULT, 8)
    box.touch(0)  # what a first run needs is there
    box.host.frames.alloc(box.host.frames.available, Use.META)

    leave = box.touch(3)

    assert isinstance(leave, Shutdown)
    assert leave.errno == errno.ENOMEM


@pytest.mark.assumes(fresh_is_zero=True, zap_destroys_content=False)
def test_memory_is_zeroed_once() -> None:
    """Zero if not up-to-date: allocated by fallocate only, then touched; a second fault keeps the content."""
    box = Box(SWPROT, 8)
    box.host.memory.write(slice(0, box.host.nr_frames, 1), 0xBAD, 0)
    box.process.fallocate(box.gmem, 1, 0, 8 * PAGE)

    assert box.read(3) == [0]
    box.touch(3)
    box.set_private(3, private=False)
    box.set_private(3)

    assert box.read(3) == [1003]


@pytest.mark.parametrize(("reason", "error"), [(Fatal(errno.EPERM), errno.EPERM), (Retry(), errno.EAGAIN)])
def test_prepare_that_fails(reason: Any, error: int) -> None:
    """Exit record and that errno (EAGAIN for a reason without one); pages before it are mapped."""
    box = Box(PINNING, 8)
    box.hw.refuse("gmem_prepare", 1, 2, reason)

    assert box.touch(slice(1, 6, 1)) == MemoryFault(3 * PAGE, flags=8, errno=error)
    assert box.mapped() == [1, 2]


def test_prepare_is_called_on_every_lookup() -> None:
    """Every gmem lookup of a private access, with the frames that are then mapped."""
    box = Box(PINNING, 8)

    box.touch(sel(1, 5))
    box.vm.tdp.direct.entries[1][5] = 0  # as if the entry had been lost: the page is looked up again
    box.vm.arch.entries.pop((1, 5))
    box.vm.vcpus[0].tlb.entries.clear()
    box.touch(5)

    assert [call for call in box.hw.trace if call[0] == "prepare"] == [("prepare", 1, 2, 0), ("prepare", 5, 1, 0)]


def test_shared_pages_are_not_prepared() -> None:
    box = Box(PINNING, 8)
    box.set_private(3, private=False)

    box.touch(3, private=False)

    assert "gmem_prepare" not in box.hw.calls


@pytest.mark.parametrize(("reason", "mapped"), [(Retry(), [1, 2, 3, 4, 5]), (Fatal(errno.ENOMEM), [1, 2])])
def test_pin_that_fails(reason: Any, mapped: list[int]) -> None:
    """Release the pfn, RETRY; the errno of Fatal ends KVM_RUN without an exit record."""
    box = Box(PINNING, 8)
    box.hw.refuse("pin_pfn", 1, 2, reason)

    leave = box.touch(slice(1, 6, 1))

    assert box.mapped() == mapped
    assert int(np.count_nonzero(box.host.frames.pins)) == len(mapped)
    if isinstance(reason, Fatal):
        assert isinstance(leave, Shutdown)
    else:
        assert leave is None


def test_pages_that_were_pinned_and_not_mapped_are_unpinned() -> None:
    box = Box(PINNING, 8)
    box.hw.refuse("set_private_spte", 1, 2, Retry())

    box.touch(slice(1, 6, 1))

    assert ("unpin", 3, 3) in box.hw.trace
    assert box.host.frames.pins_held == 5


def test_bad_hva(backend: Backend) -> None:
    """EFAULT, no exit record; pages before the hole are complete."""
    box = Box(backend, 8)
    hva = box.process.mmap(2 * PAGE)
    box.fd.set_user_memory_region2(1, 0, 1 << 30, 4 * PAGE, hva)
    action = box.action(slice(1 << 18, (1 << 18) + 4, 1), private=False)

    leave = box.vcpus[0].run(action)

    assert isinstance(leave, Shutdown)
    assert (leave.errno, action.done) == (errno.EFAULT, 2)


@pytest.mark.assumes(max_shared_level=3)
def test_bad_hva_behind_large_pages() -> None:
    box = Box(DEFAULT, 8, backing="2m")
    hva = box.process.mmap(M2 + 7 * PAGE)
    box.fd.set_user_memory_region2(1, 0, 1 << 30, 2 * M2, hva)
    action = box.action(slice(1 << 18, (1 << 18) + 1024, 1))

    leave = box.vcpus[0].run(action)

    assert isinstance(leave, Shutdown)
    assert (leave.errno, action.done) == (errno.EFAULT, 512 + 7)
    assert box.level(1 << 18) == 2


@pytest.mark.assumes(honours_notifiers=True)
def test_a_slot_over_two_mappings() -> None:
    box = Box(DEFAULT, 8)
    low = box.process.mmap(1 << 30)
    high = box.process.mmap(PAGE)
    assert high == low + (2 << 30)
    box.fd.set_user_memory_region2(1, 0, 1 << 31, (2 << 30) + PAGE, low)

    first, last = 1 << 19, (1 << 19) + (2 << 18)

    assert box.touch(sel(first, last)) is None
    assert box.process.read(high, 1)[1].tolist() == [1000 + last]


@pytest.mark.assumes(dirty_logging=True)
def test_write_to_a_read_only_slot() -> None:
    """EMULATE; reads are mapped without write access."""
    box = Box(DEFAULT, 8)
    hva = box.process.mmap(4 * PAGE)
    box.process.write(hva, 5, 4)
    box.fd.set_user_memory_region2(1, READONLY, 1 << 30, 4 * PAGE, hva)
    gfn = 1 << 18

    assert box.touch(gfn) == Mmio(1 << 30, write=True)
    assert box.read(slice(gfn, gfn + 4, 1)) == [5] * 4
    assert not box.writable(gfn)
    assert box.touch(gfn + 1) == Mmio((1 << 30) + PAGE, write=True)


def test_write_fault_of_a_prefetch_never_emulates() -> None:
    box = Box(DEFAULT, 8)

    assert fault(box, 1 << 20, prefetch=True).errno == errno.ENOENT


# ---- gmem-only slots ------------------------------------------------------------------------------------------------


@pytest.mark.assumes(gmem_backed=True)
def test_gmem_only_slot_serves_shared_accesses_from_gmem() -> None:
    """A slot whose file allows mmap: shared and private faults both use gmem."""
    box = Box(DEFAULT, 8)
    fd = box.fd.create_guest_memfd(4 * PAGE, 3)
    box.fd.set_user_memory_region2(1, GUEST_MEMFD, 1 << 30, 4 * PAGE, 0, fd, 0)
    hva = box.process.mmap_gmem(fd, 0, 4 * PAGE)

    box.touch(1 << 18, stamps=5)
    box.process.write(hva + PAGE, 6, 1)

    assert box.process.read(hva, 2)[1].tolist() == [5, 6]
    assert box.read((1 << 18) + 1) == [6]
    assert box.pfn(1 << 18) == int(box.process.files[fd].inode.words[0]) >> 5


@pytest.mark.assumes(gmem_backed=True)
def test_without_the_flag_a_shared_access_uses_the_hva() -> None:
    """A guest_memfd that cannot be mapped serves private accesses only."""
    box = Box(DEFAULT, 8)
    fd = box.fd.create_guest_memfd(4 * PAGE)
    box.fd.set_user_memory_region2(1, GUEST_MEMFD, 1 << 30, 4 * PAGE, box.process.mmap(4 * PAGE), fd, 0)

    assert box.touch(1 << 18) is None
    assert box.process.files[fd].inode.allocated == 0


# ---- step 13: the level ---------------------------------------------------------------------------------------------


@pytest.mark.assumes(needs_accept=False, max_shared_level=3)
@pytest.mark.parametrize("backing", ["4k", "2m"])
def test_backing_limits_the_level(backing: str) -> None:
    for backend in (DEFAULT, SWPROT, MIRROR):
        box = Box(backend, 1024, backing=backing)
        box.touch(700)
        assert box.level(700) == (2 if backing == "2m" else 1)
        assert box.pfn(700) % 512 == 700 % 512 or backing == "4k"


def test_capability_limits_the_level() -> None:
    box = Box(mirror(max_private_level=1), 1024, backing="2m")
    box.set_private(512, 512, private=False)

    box.touch(5)
    box.touch(600, private=False)

    assert (box.level(5, private=True), box.level(600, private=False)) == (1, 2)


@pytest.mark.assumes(needs_accept=False)
def test_a_large_page_brings_in_its_neighbours() -> None:
    """One fault maps 512 pages; all of them read zero."""
    box = Box(SWPROT, 1024, backing="2m")

    box.touch(700)

    assert box.mapped() == list(range(512, 1024))
    assert box.read(slice(698, 702, 1)) == [0, 0, 1700, 0]
    assert box.vm.vcpus[0].faults == 1


@pytest.mark.assumes(needs_accept=False)
def test_the_last_block_is_not_whole() -> None:
    """Alignment: first and last block are not large where base or end is unaligned."""
    box = Box(SWPROT, 1000, backing="2m")

    box.touch(sel(3, 700))

    assert (box.level(3), box.level(700)) == (2, 1)


@pytest.mark.assumes(needs_accept=False)
def test_mixed_block_is_mapped_small(private: Backend) -> None:
    box = Box(private, 1536, backing="2m")
    box.set_private(513, private=False)

    box.touch(sel(5, 600, 1100))

    assert [box.level(gfn) for gfn in (5, 600, 1100)] == [2, 1, 2]


@pytest.mark.assumes(needs_accept=False)
def test_mixed_block_is_large_again_when_uniform() -> None:
    """The mixed bit clears when the attributes of the block are uniform again."""
    box = Box(SWPROT, 1024, backing="2m")
    box.set_private(513, private=False)
    box.set_private(513)

    box.touch(600)

    assert box.level(600) == 2


@pytest.mark.assumes(dirty_logging=True)
def test_dirty_logging_forces_4k() -> None:
    box = Box(DEFAULT, 1024, backing="2m")
    box.fd.set_user_memory_region2(0, 1, 0, 1024 * PAGE, box.hva)

    box.touch(5)

    assert box.level(5) == 1


@pytest.mark.assumes(max_shared_level=3)
@pytest.mark.parametrize("off", [PAGE, 5 * PAGE])
def test_hva_and_gfn_that_differ_modulo_the_level(off: int) -> None:
    """All blocks of such a slot are small."""
    box = Box(DEFAULT, 8, backing="2m")
    hva = box.process.mmap(4 * M2)
    box.fd.set_user_memory_region2(1, 0, 1 << 30, 2 * M2, hva + off)
    box.fd.set_user_memory_region2(2, 0, 1 << 31, 2 * M2, hva)

    box.touch(sel((1 << 18) + 600, (1 << 19) + 600))

    assert (box.level((1 << 18) + 600), box.level((1 << 19) + 600)) == (1, 2)


@pytest.mark.assumes(needs_accept=False)
@pytest.mark.parametrize(("offset", "level"), [(0, 2), (PAGE, 1), (M2, 2)])
def test_gmem_offset_and_gfn_that_differ_modulo_the_level(offset: int, level: int) -> None:
    box = Box(SWPROT, 8, backing="2m")
    fd = box.fd.create_guest_memfd(4 * M2)
    box.fd.set_user_memory_region2(1, GUEST_MEMFD, 1 << 30, 2 * M2, box.process.mmap(2 * M2), fd, offset)
    box.set_private(1 << 18, 1024)

    box.touch((1 << 18) + 600)

    assert box.level((1 << 18) + 600) == level


def test_a_block_that_the_host_cannot_back_with_a_large_page() -> None:
    """The page that was touched is backed by a small one, and only that page."""
    box = Box(SWPROT, 1024, backing="2m", nr_frames=1024)
    box.host.frames.alloc(100, Use.META)  # the host's only free block is not whole any more

    box.touch(700)
    box.touch(600)

    assert (box.mapped(), box.inode.allocated) == ([600, 700], 2)


@pytest.mark.assumes(needs_accept=False)
def test_a_block_with_a_hole_is_mapped_small() -> None:
    """After a punch the block has no large folio any more: a refault must not map frames that were given back."""
    box = Box(SWPROT, 1024, backing="2m")
    box.touch(slice(0, 512, 1))
    box.punch(5)
    taken = box.host.frames.alloc(1, Use.ANON)

    assert box.read(sel(4, 5, 6)) == [1004, 0, 1006]
    assert box.level(5) == 1
    assert box.pfn(5) != taken.start  # type: ignore[union-attr]
    assert all(box.host.frames.use[box.pfn(gfn)] == Use.GMEM for gfn in (4, 5, 6))


@pytest.mark.assumes(needs_accept=False)
def test_a_hole_at_the_head_of_a_block() -> None:
    box = Box(SWPROT, 1024, backing="2m")
    box.touch(slice(0, 512, 1))
    box.punch(0)

    assert box.read(slice(0, 3, 1)) == [0, 1001, 1002]
    assert box.level(0) == 1


@pytest.mark.assumes(honours_notifiers=True)
def test_pages_that_the_vmm_gave_back_are_mapped_small() -> None:
    """The same for memory of the VMM (madvise)."""
    box = Box(DEFAULT, 1024, backing="2m")
    box.touch(slice(0, 512, 1))
    box.process.madvise_dontneed(box.hva + 5 * PAGE, PAGE)
    box.host.frames.alloc(1, Use.META)

    assert box.read(sel(4, 5, 6)) == [1004, 0, 1006]
    assert (box.level(4), box.level(5)) == (1, 1)
    assert all(box.host.frames.use[box.pfn(gfn)] == Use.ANON for gfn in (4, 5, 6))


@pytest.mark.assumes(needs_accept=False)
def test_a_block_is_large_again_when_it_was_wholly_empty() -> None:
    box = Box(SWPROT, 1024, backing="2m")
    box.touch(slice(0, 512, 1))
    box.punch(5)
    box.touch(5)
    box.punch(0, 512)

    box.touch(9)

    assert box.level(9) == 2


@pytest.mark.assumes(needs_accept=False)
def test_a_poisoned_page_of_a_large_folio() -> None:
    """Its neighbours are mapped small, and it is refused."""
    box = Box(SWPROT, 1024, backing="2m")
    box.touch(slice(0, 512, 1))
    box.process.memory_failure(box.gmem, 5 * PAGE)

    assert box.touch(4) is None
    assert box.level(4) == 1
    assert box.touch(5) == MemoryFault(5 * PAGE, flags=8, errno=133)


def test_a_mirror_descends_where_a_smaller_mapping_exists() -> None:
    """Step 15: replacing a table by a leaf would lose the guest's data."""
    box = Box(MIRROR, 1024, backing="2m")
    box.set_private(600, private=False)
    box.touch(sel(512, 700), private=True)
    box.set_private(600)

    box.touch(sel(5, 800), private=True)

    assert [box.level(gfn) for gfn in (5, 512, 700, 800)] == [2, 1, 1, 1]
    assert box.read(sel(512, 700, 800)) == [1512, 1700, 1800]
    box.check_mirror()


@pytest.mark.assumes(needs_accept=False)
def test_a_direct_root_replaces_its_table() -> None:
    """A table where a large leaf is wanted: the subtree goes, and everybody is flushed."""
    box = Box(SWPROT, 1024, backing="2m")
    box.set_private(600, private=False)
    box.touch(sel(512, 700))
    box.set_private(600)

    box.touch(800)

    assert [box.level(gfn) for gfn in (512, 700, 800)] == [2, 2, 2]
    assert box.read(sel(512, 700, 800)) == [1512, 1700, 1800]
    assert (512, True) not in box.vm.vcpus[0].tlb.entries or box.pfn(512) == box.vm.vcpus[0].tlb.entries[512, True][0]
    assert box.root().leaves[1:3] == [0, 1]


def test_max_mapping_level_is_a_limit() -> None:
    """The vendor's answer: min() is taken, 0 is no limit; each page has its own, also in a batch."""

    class Limited(SwProt):
        @hookimpl
        def max_mapping_level(self, gfns: Sel) -> int:
            return 1 if first(gfns) < 512 else 0

    box = Box(backend_of("limited", Limited), 1536, backing="2m")

    box.touch(sel(5, 600, 1100))

    assert [box.level(gfn) for gfn in (5, 600, 1100)] == [1, 2, 2]
    assert box.mapped() == [5, *range(512, 1536)]


# ---- steps 14 and 15: walk and install ------------------------------------------------------------------------------


def test_a_frozen_entry_is_left_alone(backend: Backend) -> None:
    """RETRY at that page; pages before it are mapped."""
    box = Box(backend, 8)
    box.touch(0)
    box.root().entries[1][3] = FROZEN

    stopped = fault(box, slice(1, 6, 1))

    assert (stopped.done, stopped.ret) == (2, RetPf.RETRY)
    assert box.mapped() == [0, 1, 2]
    assert box.root().entries[1][3] == FROZEN


def test_a_frozen_table_is_left_alone() -> None:
    box = Box(SWPROT, 2048)
    box.touch(0)
    box.root().entries[2][2] = FROZEN

    stopped = fault(box, sel(5, 600, 1024, 1600))

    assert (stopped.done, stopped.ret) == (2, RetPf.RETRY)
    assert box.mapped() == [0, 5, 600]


def test_parents_are_linked_before_children() -> None:
    """Row 12, as the vendor sees it; tables are linked once."""
    box = Box(MIRROR, 1024)

    box.touch(sel(3, 600))
    box.touch(4)

    assert [call for call in box.hw.trace if call[0] in ("link", "set")] == [
        ("link", 0, 1, 4),
        ("link", 0, 1, 3),
        ("link", 0, 2, 2),
        ("set", 3, 2, 1),
        ("set", 4, 1, 1),
    ]


@pytest.mark.parametrize("k", [0, 1, 4])
def test_a_set_hook_that_stops(k: int) -> None:
    """Old value restored from k on, below k committed, RETRY; then the rest is mapped."""
    box = Box(MIRROR, 8)
    box.hw.refuse("set_private_spte", 1, k, Retry())

    stopped = fault(box, slice(0, 5, 1))

    assert (stopped.done, stopped.ret, stopped.errno) == (k, RetPf.RETRY, 0)
    assert box.mapped() == list(range(k))
    assert (box.root().entries[1] & FROZEN).max() == 0
    box.check_mirror()
    assert box.touch(slice(0, 5, 1)) is None
    assert box.mapped() == [0, 1, 2, 3, 4]
    box.check_mirror()


@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_link_hook_that_stops(k: int) -> None:
    """The unused table is freed, the fault RETRY; freshly linked empty tables may stay (row 23)."""
    box = Box(MIRROR, 2048)
    gfns = sel(5, 600, 1100, 1700)
    box.touch(2000)  # the upper tables stand
    box.hw.refuse_at("link_private_spt", k * 512, Retry())

    stopped = fault(box, gfns)
    box.check_mirror()

    assert (stopped.done, stopped.ret) == (k, RetPf.RETRY)
    in_use = box.host.frames.outstanding()[Use.TABLE]
    assert in_use == sum(box.root().tables)
    assert box.touch(gfns) is None
    box.check_mirror()
    box.destroy()


def test_a_fatal_set_kills_the_vm() -> None:
    """The vendor has bugged the VM: -EIO, and for good (row 29)."""
    box = Box(MIRROR, 8)
    box.hw.refuse("set_private_spte", 1, 2, Fatal(errno.EIO, "the module is gone"))
    action = box.action(slice(0, 5, 1))

    leave = box.vcpus[0].run(action)

    assert isinstance(leave, Shutdown)
    assert (leave.errno, leave.why) == (errno.EIO, "the module is gone")
    assert (box.mapped(), action.done, box.vm.dead) == ([0, 1], 2, True)
    with pytest.raises(UapiError):
        box.touch(0)
    box.check_mirror()


@pytest.mark.assumes(needs_accept=False)
def test_a_huge_leaf_in_the_way_is_split() -> None:
    """Lazily under a fault that needs a lower level, on a direct root; both views translate alike, no flush."""
    box = Box(SWPROT, 1024, backing="2m")
    box.touch(slice(512, 515, 1))
    pfn = box.pfn(512)
    box.events.clear()

    again = fault(box, 700, max_level=1)

    assert again.ret is RetPf.SPURIOUS
    assert (box.level(513), box.pfn(513), box.level(1000)) == (1, pfn + 1, 1)
    assert box.events.said("zap") == ["zap:split"]
    assert box.read(slice(512, 515, 1)) == [1512, 1513, 1514]


def test_a_huge_leaf_in_the_way_of_a_mirror() -> None:
    """Another vCPU mapped it since this one missed, or somebody merged small pages: it serves the fault, and nothing is
    lost. (A bug of the VM in [B], where no leaf of a mirror is huge.)"""
    box = Box(MIRROR, 1024, backing="2m")
    box.touch(700)

    again = fault(box, slice(510, 514, 1), max_level=1)

    assert (again.done, again.ret) == (4, RetPf.FIXED)
    assert fault(box, 600, max_level=1).ret is RetPf.SPURIOUS
    assert (box.level(510), box.level(512), box.read(700)) == (1, 2, [1700])
    box.check_mirror()


@pytest.mark.assumes(dirty_logging=True)
def test_a_write_protected_page_becomes_writable() -> None:
    """The fast path: same frame, write access restored."""
    box = Box(DEFAULT, 8)
    box.touch(slice(0, 4, 1))
    box.fd.set_user_memory_region2(0, 1, 0, 8 * PAGE, box.hva)
    assert [box.writable(gfn) for gfn in range(4)] == [False] * 4
    pfn = box.pfn(2)

    box.touch(2)

    assert [box.writable(gfn) for gfn in range(4)] == [False, False, True, False]
    assert box.pfn(2) == pfn
    assert box.fd.get_dirty_log(0).tolist() == [0, 0, 1, 0, 0, 0, 0, 0]


def test_a_page_that_changed_its_frame_is_a_bug() -> None:
    """Row 13: no present -> present with a new pfn; the notifier zaps before the frame changes."""
    box = Box(SWPROT, 8)
    box.touch(3)
    box.inode.words[3] += 1 << 5

    with pytest.raises(InvariantViolation) as caught:
        fault(box, 3)
    assert caught.value.number == 13


# ---- step 16: what is left ------------------------------------------------------------------------------------------


def test_gmem_pages_are_not_pinned_by_a_mapping(private: Backend) -> None:
    box = Box(private, 8)

    box.touch(3)

    assert box.host.frames.pins_held == 0
    box.punch(3)
    assert box.inode.allocated == 0


def test_retries_and_errors_leak_nothing(private: Backend) -> None:
    """Row 23: no leaf changed, no reference, table or pin leaked."""
    box = Box(private, 8)
    box.set_private(3, private=False)
    before = box.host.frames.outstanding()

    box.touch(3)
    box.touch(1 << 20, private=False)

    assert (box.mapped(), box.host.frames.outstanding()) == ([], before)


def test_every_exit_is_counted() -> None:
    """One exit of the guest for each fault, one return of KVM_RUN for each exit to user space."""
    box = Box(SWPROT, 8)
    box.host.meter.counts.clear()

    box.touch(slice(0, 4, 1))
    box.touch(4, private=False)

    vcpu = box.vm.vcpus[0]
    assert (vcpu.faults, vcpu.exits) == (4, 1)
    assert box.host.meter.counts["vm_exit"] == 5
    assert box.host.meter.counts["fault_fixed"] == 4
    assert box.host.meter.counts["user_exit"] == 1


# ---- accepting and converting ---------------------------------------------------------------------------------------

GUARDED = mirror(needs_accept=True, zap_destroys_content=True)
GUARDED_FATAL = mirror(needs_accept=True, zap_destroys_content=True, unaccepted_is_fatal=True)


def test_a_page_is_accepted_before_it_is_used() -> None:
    box = Box(GUARDED, 8)

    assert box.touch(3) == GuestException(3, "UNACCEPTED")
    assert box.accept(slice(2, 5, 1)) is None
    assert box.touch(3) is None
    assert box.read(slice(2, 5, 1)) == [0, 1003, 0]


def test_touching_an_unaccepted_page_may_kill_the_vm() -> None:
    box = Box(GUARDED_FATAL, 8)

    assert isinstance(box.touch(3), Shutdown)
    assert box.vm.dead


def test_accepting_a_shared_page_is_a_mismatch() -> None:
    """The pages before it are accepted, the VMM converts, the rest follows."""
    box = Box(GUARDED, 8)
    box.set_private(3, private=False)
    action = Accept(slice(1, 6, 1))
    assert box.vcpus[0].run(action) == MemoryFault(3 * PAGE, flags=8)
    box.set_private(3)
    assert box.vcpus[0].run(action) is None

    assert box.vm.arch.accepted == {1, 2, 3, 4, 5}


def test_accepting_a_large_page() -> None:
    box = Box(GUARDED, 1024, backing="2m")

    assert box.accept(slice(0, 1024, 512), level=2) is None
    assert box.vm.arch.accepted == set(range(1024))
    assert box.level(5) == 2


def test_accepting_small_pages_of_a_large_mapping_splits_it() -> None:
    """The host splits under mmu_lock, and the instruction is replayed."""
    box = Box(GUARDED, 1024, backing="2m")
    box.vcpus[0].pre_fault_memory(0, PAGE)
    assert box.level(0) == 2

    assert box.accept(slice(3, 6, 1)) is None
    assert (box.level(0), box.vm.arch.accepted) == (1, {3, 4, 5})
    box.check_mirror()


def test_accepting_a_large_page_that_is_mapped_small() -> None:
    """The guest falls back to small pages; an exit on the way does not lose its place."""
    box = Box(GUARDED, 1024, backing="2m")
    box.set_private(5, private=False)
    action = Accept(slice(0, 1024, 512), level=2)
    assert box.vcpus[0].run(action) == MemoryFault(5 * PAGE, flags=8)
    box.set_private(5)
    assert box.vcpus[0].run(action) is None

    assert box.vm.arch.accepted == set(range(1024))
    assert (box.level(5), box.level(600)) == (1, 2)


@pytest.mark.parametrize("backing", ["4k", "2m"])
def test_large_pages_accepted_in_one_go_end_as_one_by_one(backing: str) -> None:
    """Where a block that falls back to 4K stops half way, those behind it were neither faulted in nor tried."""
    ends = []
    for calls in ([slice(0, 2048, 512)], [slice(gfn, gfn + 1, 512) for gfn in range(0, 2048, 512)]):
        box = Box(GUARDED, 2048, backing=backing)
        box.set_private(512 + 5, private=False)
        leaves = (box.vcpus[0].run(Accept(gfns, level=2)) for gfns in calls)
        assert next(leave for leave in leaves if leave is not None) == MemoryFault((512 + 5) * PAGE, flags=8)
        assert box.vm.arch.accepted == set(range(512 + 5))
        ends.append((dict(box.host.meter.counts), box.vcpus[0].vcpu.faults, box.level(1024)))

    assert ends[0] == ends[1]
    assert ends[0][2] == 0


@pytest.mark.assumes(needs_accept=False)
def test_a_conversion_exits_to_user_space() -> None:
    """Without an implementation of the hook: KVM_EXIT_HYPERCALL, one exit for each range within a 2M block."""
    box = Box(SWPROT, 2048)

    leave = box.vcpus[0].run(Convert(sel(3, 4, 5, 9, 511, 512, 513), private=False))

    assert isinstance(leave, MapGpaRange)
    assert (leave.private, leave.exits) == (False, 4)
    assert box.vcpus[0].vcpu.exits == 4
