"""What operations cost in table entries, invalidations and cache work (pkvm facts, sections 3 and 7)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cvmcore.pages
from cvmcore.effects import Steps, drain
from cvmcore.errors import InvariantViolation
from cvmcore.pages import run
from cvmcore_pkvm.errors import Errno, Smccc
from cvmcore_pkvm.hw import Prot, SpinLock, Worked, in_order


@pytest.fixture
def pvm(rig: Any) -> int:
    handle: int = rig.make_vm(protected=True)
    cpu = rig.cpu(handle)
    # Link the tables of gfns 0 to 1023 and leave the memcache full: what follows counts only the pages themselves.
    for gfn in (1023, 511, 1022):
        assert rig.hyp.host_donate_guest(cpu, run(2000 + gfn, 1), run(gfn, 1)).ok
    rig.hyp.counts.clear()
    return handle


def test_share_invalidates_nothing_and_unshare_once_a_page(rig: Any, pvm: int) -> None:
    hyp, cpu = rig.hyp, rig.cpu(pvm)
    assert hyp.host_donate_guest(cpu, run(512, 100), run(0, 100)).ok

    assert hyp.guest_share_host(cpu, run(0, 100)).work == {"pte": 200}
    assert hyp.guest_unshare_host(cpu, run(0, 100)).work == {"pte": 200, "tlbi_host": 100}


def test_donating_breaks_a_block_once(rig: Any, pvm: int) -> None:
    """The first page of a 2 MiB block takes the whole block out of the host's stage 2; the others are not there any
    more, unless the host has touched them meanwhile."""
    hyp, cpu = rig.hyp, rig.cpu(pvm)

    work = hyp.host_donate_guest(cpu, run(520, 10), run(0, 10)).work
    assert work == {"pte": 10 + 1 + 10, "tlbi_host": 1, "host_split": 1, "guest_cmo": 10}

    assert hyp.handle_host_mem_abort(run(530, 4)).work == {"host_fault": 4, "pte": 4}
    assert hyp.handle_host_mem_abort(run(530, 4)).work == {}
    work = hyp.host_donate_guest(cpu, run(530, 8), run(10, 8)).work
    assert work == {"pte": 16, "tlbi_host": 4, "guest_cmo": 8}


def test_a_host_that_clears_pages_first_pays_one_invalidation_each(rig: Any, pvm: int) -> None:
    """touched: before each call the host wrote the page, so its entry was there, and broken, each time."""
    hyp, cpu = rig.hyp, rig.cpu(pvm)

    work = hyp.host_donate_guest(cpu, run(520, 10), run(0, 10), True).work

    assert work == {"pte": 21, "tlbi_host": 10, "host_split": 1, "host_fault": 9, "guest_cmo": 10}


@pytest.mark.parametrize("touched", [False, True])
def test_donation_counts_do_not_depend_on_the_batch(make_rig: Any, touched: bool) -> None:
    """The same pages, over two blocks and in one or many calls, count the same."""
    pages = [np.array([3, 4, 600, 601, 700]), np.array([5, 602, 1100])]
    counts = []
    for one_by_one in (False, True):
        rig = make_rig()
        cpu = rig.cpu(rig.make_vm(protected=True))
        for gfn, pfns in enumerate(pages):
            gfns = np.arange(len(pfns)) + 10 * gfn
            for i in range(len(pfns)) if one_by_one else ():
                assert rig.hyp.host_donate_guest(cpu, run(int(pfns[i]), 1), run(int(gfns[i]), 1), touched).ok
            if not one_by_one:
                assert rig.hyp.host_donate_guest(cpu, pfns, gfns, touched).ok
        counts.append(rig.snapshot())

    assert counts[0] == counts[1]


def test_reclaim(rig: Any, pvm: int) -> None:
    """One invalidation for each page and each table that empties; private pages are cleared."""
    hyp, cpu = rig.hyp, rig.cpu(pvm)
    assert hyp.host_donate_guest(cpu, run(512, 4), run(0, 4)).ok
    assert hyp.guest_share_host(cpu, run(0, 1)).ok
    rig.kill(pvm)

    work = hyp.host_reclaim_guest(pvm, run(0, 4)).work
    assert work == {"pte": 8, "tlbi_guest": 4, "clear": 3, "unmap_cmo": 1}
    work = hyp.host_reclaim_guest(pvm, np.array([511, 1022, 1023])).work
    # gfn 511 was alone in its table; the second table and the one above it empty with 1023
    assert work == {"pte": 6 + 3, "tlbi_guest": 3 + 3, "clear": 3, "untable": 3}


def test_range_invalidation(make_rig: Any) -> None:
    """With FEAT_TLBIRANGE and FWB an unmap ends in one range invalidation a call, and caches need no care."""
    rig = make_rig(fwb=True, dic=True, tlbi_range=True)
    np_vm = rig.make_vm(protected=False)
    hyp, cpu = rig.hyp, rig.cpu(np_vm)
    for gfn in (0, 1):  # tables and memcache
        assert hyp.host_share_guest(cpu, run(10 + gfn, 1), run(gfn, 1), 1, Prot.RWX).ok

    assert hyp.host_share_guest(cpu, run(512, 1), run(512, 1), 512, Prot.RWX).work == {"pte": 1}
    assert hyp.host_unshare_guest(np_vm, run(512, 1), 512).work == {"pte": 1, "tlbi_range": 1}
    assert hyp.host_unshare_guest(np_vm, run(0, 1), 1).work == {"pte": 1, "tlbi_range": 1}


def test_hyp_sharing_touches_no_table(rig: Any) -> None:
    assert rig.hyp.host_share_hyp(run(5, 10)).work == {}
    assert rig.hyp.host_unshare_hyp(run(5, 10)).work == {}
    assert rig.hyp.host_donate_hyp(5, 10).work == {"pte": 10 + 1 + 10, "tlbi_host": 1, "host_split": 1}
    assert rig.hyp.hyp_donate_host(5, 10).work == {"pte": 20, "tlbi_hyp": 10}
    # The host has page entries now.
    assert rig.hyp.host_donate_hyp(5, 10).work == {"pte": 20, "tlbi_host": 10}


def test_force_reclaim(rig: Any, pvm: int) -> None:
    hyp, cpu = rig.hyp, rig.cpu(pvm)
    assert hyp.host_donate_guest(cpu, run(512, 4), run(0, 4)).ok

    assert hyp.host_force_reclaim(run(512, 2)).work == {"pte": 4, "tlbi_guest": 2, "clear": 2}


def test_force_reclaim_across_vms(rig: Any, pvm: int) -> None:
    """A batch may name frames of several VMs; the first that cannot be reclaimed ends it."""
    other = rig.make_vm(protected=True)
    hyp = rig.hyp
    assert hyp.host_donate_guest(rig.cpu(pvm), np.array([100, 102]), run(0, 2)).ok
    assert hyp.host_donate_guest(rig.cpu(other), np.array([101, 103]), run(0, 2)).ok
    assert hyp.guest_share_host(rig.cpu(other), run(1, 1)).ok

    result = hyp.host_force_reclaim(run(100, 5))

    assert (result.status, result.done) == (Errno.EAGAIN, 3)
    assert rig.vm(pvm).stage2.pages[:2].tolist() == [1, 1]
    assert rig.vm(other).stage2.pages[0] == 1
    hyp.check_legal()


# ---- guest hypercalls ---------------------------------------------------------------------------------------------


def test_guest_hvc_errors(rig: Any, pvm: int) -> None:
    """Every error reaches the guest as INVALID_PARAMETER, but a share of an absent page becomes a fault."""
    hyp, cpu = rig.hyp, rig.cpu(pvm)
    assert hyp.host_donate_guest(cpu, run(512, 4), run(0, 4)).ok

    result = hyp.mem_share(cpu, run(0, 6))
    assert (result.status, result.done, result.calls, result.abort) == (Smccc.SUCCESS, 4, 5, True)
    assert hyp.vcpu_in_poison_fault(cpu, run(4, 1)).answer.tolist() == [False]
    result = hyp.mem_share(cpu, run(3, 1))
    assert (result.status, result.done, result.calls, result.abort) == (Smccc.INVALID_PARAMETER, 0, 1, False)
    result = hyp.mem_unshare(cpu, run(2, 4))
    assert (result.status, result.done, result.calls, result.abort) == (Smccc.INVALID_PARAMETER, 2, 3, False)
    assert hyp.mem_share(cpu, run(1 << 28, 1)).status == Smccc.INVALID_PARAMETER
    assert hyp.mem_share(999, run(0, 1)).status == Smccc.NOT_SUPPORTED
    assert hyp.hyp_meminfo(cpu).done == 4096
    assert hyp.hyp_meminfo(cpu, (1, 0, 0)).status == Smccc.INVALID_PARAMETER


def test_guest_hvc_batches(rig: Any, pvm: int) -> None:
    """A call stops at its size, at the end of a table, and where gfns or frames are not consecutive."""
    hyp, cpu = rig.hyp, rig.cpu(pvm)
    assert hyp.host_donate_guest(cpu, run(1100, 11), run(500, 11)).status == Errno.OK
    assert hyp.host_donate_guest(cpu, run(1200, 89), run(512, 89)).ok

    assert hyp.mem_share(cpu, run(500, 11), 512).calls == 1
    assert hyp.mem_share(cpu, run(512, 89), 16).calls == 6
    assert hyp.mem_unshare(cpu, run(500, 11), 4).calls == 3
    assert hyp.mem_unshare(cpu, run(512, 89), 512).calls == 1
    assert hyp.host_donate_guest(cpu, run(1111, 1), run(610, 1)).ok
    assert hyp.mem_share(cpu, np.r_[508:511, 512:516, 518:520, 610], 512).calls == 4
    with pytest.raises(ValueError, match="1 to 512"):
        hyp.mem_share(cpu, run(0, 1), 513)


@pytest.mark.parametrize(
    ("function", "r1", "r2", "r3", "status"),
    [
        (0xC6000002, 0, 0, 0, Smccc.SUCCESS),  # HYP_MEMINFO
        (0xC6000002, 0, 0, 1, Smccc.INVALID_PARAMETER),
        (0xC6000003, 0x3000, 0, 0, Smccc.SUCCESS),  # MEM_SHARE
        (0xC6000003, 0x3008, 0, 0, Smccc.INVALID_PARAMETER),  # unaligned
        (0xC6000003, 0x3000, 1, 0, Smccc.INVALID_PARAMETER),  # reserved registers
        (0xC6000003, 0x3000, 0, 1, Smccc.INVALID_PARAMETER),
        (0xC6000003, 1 << 40, 0, 0, Smccc.INVALID_PARAMETER),  # beyond the IPA size
        (0xC6000003, 0x2000, 0, 0, Smccc.INVALID_PARAMETER),  # shared already
        (0xC6000004, 0x2000, 0, 0, Smccc.SUCCESS),  # MEM_UNSHARE
        (0xC6000004, 0x2001, 0, 0, Smccc.INVALID_PARAMETER),
        (0xC6000004, 0x3000, 0, 0, Smccc.INVALID_PARAMETER),  # not shared
        (0xC6000004, 0x9000, 0, 0, Smccc.INVALID_PARAMETER),  # absent
        (0xC6000007, 0x3000, 0, 0, Smccc.NOT_SUPPORTED),  # MMIO_GUARD
    ],
)
def test_guest_hvc_registers(rig: Any, pvm: int, function: int, r1: int, r2: int, r3: int, status: Smccc) -> None:
    """Numbers and registers as a guest passes them; a refusal changes nothing."""
    hyp, cpu = rig.hyp, rig.cpu(pvm)
    assert hyp.host_donate_guest(cpu, run(512, 4), run(0, 4)).ok
    assert hyp.guest_share_host(cpu, run(2, 1)).ok
    before = rig.snapshot()

    result = hyp.guest_hvc(cpu, function, r1, r2, r3)

    assert (result.status, result.abort) == (status, False)
    assert (rig.snapshot() == before) == (status != Smccc.SUCCESS or function == 0xC6000002)


def test_only_mem_share_is_replayed(rig: Any, pvm: int) -> None:
    """MEM_SHARE of an absent page is a fault; of a poisoned one, or for an np guest, it is not."""
    hyp, cpu, share = rig.hyp, rig.cpu(pvm), 0xC6000003
    assert hyp.host_donate_guest(cpu, run(512, 1), run(0, 1)).ok
    assert hyp.host_force_reclaim(run(512, 1)).ok

    assert hyp.guest_hvc(cpu, share, 0x9000).abort
    result = hyp.guest_hvc(cpu, share, 0)
    assert (result.status, result.abort) == (Smccc.INVALID_PARAMETER, False)
    np_cpu = rig.cpu(rig.make_vm(protected=False))
    assert hyp.guest_hvc(np_cpu, share, 0).status == Smccc.NOT_SUPPORTED


def test_pages_of_one_call_are_in_one_state(rig: Any, pvm: int) -> None:
    """A call for a range that comes to a page in another state converts nothing; calls before it stand."""
    hyp, cpu = rig.hyp, rig.cpu(pvm)
    assert hyp.host_donate_guest(cpu, run(512, 20), run(0, 20)).ok
    assert hyp.guest_share_host(cpu, run(10, 1)).ok

    for batch, done, calls in ((16, 0, 1), (4, 8, 3), (5, 10, 3), (1, 10, 11)):
        result = hyp.mem_share(cpu, run(0, 20), batch)
        assert (result.status, result.done, result.calls, result.at) == (Smccc.INVALID_PARAMETER, done, calls, 10)
        if done:
            assert hyp.guest_unshare_host(cpu, run(0, done)).ok
    assert hyp.host_donate_guest(cpu, run(600, 4), run(20, 4)).ok  # other frames: a call of their own
    result = hyp.mem_share(cpu, run(11, 20), 16)
    assert (result.status, result.done, result.at, result.abort) == (Smccc.SUCCESS, 9, 13, True)
    assert hyp.vcpu_in_poison_fault(cpu, run(24, 1)).answer.tolist() == [False]
    assert hyp.mem_share(cpu, run(508, 8), 512).done == 0  # 512 begins a call, absent as it is
    hyp.check_legal()


def test_calls_do_not_depend_on_pieces(make_rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a guest's loop is, each call is whole."""
    found = []
    for size in (1 << 17, 7):
        monkeypatch.setattr(cvmcore.pages, "PIECE_RUN", size)
        monkeypatch.setattr(cvmcore.pages, "PIECE_SCATTERED", size)
        rig = make_rig()
        hyp = rig.hyp
        cpu = rig.cpu(rig.make_vm(protected=True))
        assert hyp.host_donate_guest(cpu, run(100, 1100), run(0, 1100)).ok
        assert hyp.guest_share_host(cpu, np.array([600])).ok
        for gfns in (run(3, 1000), np.r_[3:300, 301:900]):
            result = hyp.mem_share(cpu, gfns, 200)
            found.append((result.status, result.done, result.at, result.calls))
            assert hyp.guest_unshare_host(cpu, gfns[: result.done] if isinstance(gfns, np.ndarray)
                                          else run(3, result.done)).ok  # fmt: skip
    assert found[:2] == found[2:]
    assert found[0] == (Smccc.INVALID_PARAMETER, 509, 597, 4)


# ---- locks --------------------------------------------------------------------------------------------------------


def effects(steps: Steps[Any]) -> list[str]:
    return [repr(effect).strip("<>") for effect in steps]


def test_lock_order(rig: Any, pvm: int) -> None:
    """Locks are taken outer to inner and dropped the other way round; work is done while they are held."""
    hyp, cpu = rig.hyp, rig.cpu(pvm)
    vm_lock = rig.vm(pvm).lock.name

    assert effects(hyp.host_donate_guest.steps(cpu, run(512, 1), run(0, 1))) == [
        "write host_mmu.lock", f"write {vm_lock}", "el2.worked", f"release {vm_lock}", "release host_mmu.lock",
    ]  # fmt: skip
    assert effects(hyp.host_share_hyp.steps(run(5, 1))) == [
        "write host_mmu.lock", "write pkvm_pgd_lock", "release pkvm_pgd_lock", "release host_mmu.lock",
    ]  # fmt: skip
    assert effects(hyp.host_force_reclaim.steps(run(512, 1))) == [
        "write vm_table_lock", "write host_mmu.lock", f"write {vm_lock}", "el2.worked",
        f"release {vm_lock}", "release host_mmu.lock", "release vm_table_lock",
    ]  # fmt: skip


def test_ranks_never_fall(rig: Any, pvm: int) -> None:
    """No operation takes a lock of a lower rank than one it holds."""
    hyp, cpu = rig.hyp, rig.cpu(pvm)
    np_vm = rig.make_vm(protected=False)
    hyp.host_share_hyp(run(30, 1))
    operations = [
        hyp.host_donate_guest.steps(cpu, run(512, 600), run(2048, 600)),
        hyp.guest_share_host.steps(cpu, run(2048, 600)),
        hyp.host_share_guest.steps(rig.cpu(np_vm), run(40, 3), run(0, 3), 1, Prot.RWX),
        hyp.host_unshare_guest.steps(np_vm, run(0, 3), 1),
        hyp.ffa_mem_share.steps([(50, 2), (60, 2)]),
        hyp.hyp_pin.steps(30, 1),
        hyp.reserve_vm.steps(),
        hyp.init_vm.steps(0x1002, True, 1, run(30, 1), run(70, 2), run(80, 2)),
        hyp.init_vcpu.steps(0x1002, 0, run(30, 1), run(90, 3)),
        hyp.vcpu_load.steps(5, 0x1002, 0),
        hyp.vcpu_put.steps(5),
        hyp.start_teardown_vm.steps(0x1002),
        hyp.finalize_teardown_vm.steps(0x1002),
    ]
    for steps in operations:
        held: list[Any] = []
        for effect in steps:
            if effect.kind == "write":
                assert all(lock.rank <= effect.lock.rank for lock in held)
                held.append(effect.lock)
            elif effect.kind == "release":
                held.remove(effect.lock)
            else:
                assert isinstance(effect, Worked) and held
        assert not held


@pytest.mark.parametrize(("design", "moves", "converts"), [
    ("global", ["host_mmu.lock", "vm[0x1000].lock"], ["host_mmu.lock", "vm[0x1000].lock"]),
    ("per-vm", ["host_mmu.lock", "host_mmu.lock[0x1000]", "vm[0x1000].lock"],
               ["host_mmu.lock[0x1000]", "vm[0x1000].lock"]),
    ("per-range", ["host_mmu.lock[1]", "host_mmu.lock[2]", "vm[0x1000].lock[0]", "vm[0x1000].lock[1]"],
                  ["host_mmu.lock[1]", "host_mmu.lock[2]", "vm[0x1000].lock[0]", "vm[0x1000].lock[1]"]),
])  # fmt: skip
def test_lock_designs(make_rig: Any, design: str, moves: list[str], converts: list[str]) -> None:
    """What moves frames between host and guest takes the host's locks; what converts a VM's own, less where it may."""
    rig = make_rig(hyp_lock=design)
    pvm = rig.make_vm(protected=True)
    hyp, cpu = rig.hyp, rig.cpu(pvm)

    def taken(steps: Steps[Any]) -> list[str]:
        return [e.lock.name for e in steps if e.kind == "write" and e.lock.name not in ("pkvm_pgd_lock",)]

    pfns, gfns = run(1020, 8), run(508, 8)
    assert [name for name in taken(hyp.host_donate_guest.steps(cpu, pfns, gfns)) if "pool" not in name] == moves
    assert taken(hyp.guest_share_host.steps(cpu, gfns)) == converts
    assert taken(hyp.guest_unshare_host.steps(cpu, gfns)) == converts
    assert taken(hyp.host_force_reclaim.steps(run(1023, 2))) == ["vm_table_lock", *moves]
    rig.kill(pvm)
    assert [name for name in taken(hyp.host_reclaim_guest.steps(pvm, run(508, 8))) if "pool" not in name] == moves
    hyp.check_legal()


@pytest.mark.parametrize("design", ["global", "per-vm", "per-range"])
def test_two_vms_force_reclaimed_at_once(make_rig: Any, design: str) -> None:
    """Locks of several VMs are taken by handle, whatever the order of the frames."""
    rig = make_rig(hyp_lock=design)
    vms = [rig.make_vm(protected=True) for _ in range(2)]
    for pfn, vm in ((101, vms[0]), (100, vms[1])):
        assert rig.hyp.host_donate_guest(rig.cpu(vm), run(pfn, 1), run(0, 1)).ok

    names = [e.lock.name for e in rig.hyp.host_force_reclaim.steps(run(100, 2)) if e.kind == "write"]

    suffix = "[0]" if design == "per-range" else ""
    assert names[-2:] == [f"vm[0x1000].lock{suffix}", f"vm[0x1001].lock{suffix}"]


def test_locks_out_of_order_are_found() -> None:
    """The order is checked while operations run, also where EL2 is used alone."""
    outer, inner, other = (SpinLock(name, rank) for name, rank in (("outer", 1), ("inner", 2), ("other", 2)))

    def take(*locks: SpinLock, keep: bool = False) -> Steps[None]:
        for lock in locks:
            yield lock.write
        for lock in () if keep else locks:
            yield lock.release

    drain(in_order(take(outer, inner)))
    with pytest.raises(InvariantViolation, match="takes outer under inner"):
        drain(in_order(take(inner, outer)))
    with pytest.raises(InvariantViolation, match="takes other under inner"):
        drain(in_order(take(inner, other)))
    with pytest.raises(InvariantViolation, match="returned with outer held"):
        drain(in_order(take(outer, keep=True)))


def test_frames_may_move_until_the_locks_are_held(make_rig: Any) -> None:
    """Per range, a guest's page names its frame's lock: if the frame goes while it waits, it takes the right ones."""
    rig = make_rig(hyp_lock="per-range")
    pvm = rig.make_vm(protected=True)
    hyp, cpu = rig.hyp, rig.cpu(pvm)
    assert hyp.host_donate_guest(cpu, run(512, 1), run(0, 1)).ok
    steps = hyp.guest_share_host.steps(cpu, run(0, 1))

    names = [next(steps).name]
    assert hyp.host_force_reclaim(run(512, 1)).ok
    assert hyp.host_reclaim_guest(pvm, run(0, 1)).status == Errno.EINVAL
    names += [effect.name for effect in steps]

    assert names == [
        "write host_mmu.lock[1]", "write vm[0x1000].lock[0]", "release vm[0x1000].lock[0]", "release host_mmu.lock[1]",
        "write vm[0x1000].lock[0]", "release vm[0x1000].lock[0]",
    ]  # fmt: skip
    hyp.check_legal()
