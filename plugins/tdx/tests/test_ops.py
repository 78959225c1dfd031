"""KVM's side: which SEAMCALLs each hook makes, in which numbers, and what it does when the module refuses."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest

from cvmcore.effects import drain
from cvmcore.errors import InputError, UapiError
from cvmcore.pages import contiguous, run
from cvmcore.types import Exit, Fatal, HostVerdict, Retry, Stopped, Walk
from cvmcore_tdx.errors import Status
from cvmcore_tdx.hw import LEAF, LifeCycle, OpState, PageType, SeptState
from cvmcore_tdx.ops import SHARED_GFN_BIT, TD_ATTR_SEPT_VE_DISABLE, seamcall

S = SeptState


def td_of(vm: Any) -> Any:
    return vm.host.hw.td(vm.arch.tdr)


def state_of(vm: Any, gfn: int, level: int = 0) -> tuple[SeptState, int]:
    word = int(vm.host.hw.sept_words(vm.arch.tdr, level, run(gfn, 1))[0])
    return S(word & 31), word >> 5


def call(steps: Any) -> int:
    """The errno that a hook fails with, 0 where it does not."""
    try:
        drain(steps)
    except UapiError as error:
        return error.errno
    return 0


# ---- what a TD can do -----------------------------------------------------------------------------------------


def test_capabilities(new_vm: Any) -> None:
    """As KVM and the module have it; large private pages only where the option says so."""
    small, large = new_vm().caps, new_vm(page_aug="2m").caps

    assert small.has_mirror
    assert small.private_by_attribute
    assert small.needs_accept
    assert small.zap_destroys_content
    assert not small.dirty_logging
    assert not small.read_only_slots
    assert small.shared_gfn_bit == SHARED_GFN_BIT == 1 << (47 - 12)
    assert (small.max_private_level, large.max_private_level) == (1, 2)
    assert (small.promotes, large.promotes) == (False, True)


def test_a_machine_that_is_too_large(new_vm: Any) -> None:
    """One clear sentence."""
    with pytest.raises(InputError, match="frames"):
        new_vm(nr_frames=(1 << 27) + 1)


# ---- TDs ------------------------------------------------------------------------------------------------------


def test_hkids(new_vm: Any) -> None:
    """Each TD holds one; ENOSPC when there is none, and nothing is left of the attempt; it comes back at the end."""
    vm = new_vm(hkids=2)
    host, hooks = vm.host, vm.hooks
    second = type(vm)(host, hooks, 1)
    drain(hooks.vm_init(second))
    third = type(vm)(host, hooks, 2)
    used = len(host.frames.used)

    assert (vm.key, second.key) == (65, 66)
    assert call(hooks.vm_init(third)) == errno.ENOSPC
    assert len(host.frames.used) == used
    vm.destroy()
    assert call(hooks.vm_init(third)) == 0
    assert third.key == 65


def test_no_memory_for_a_td(new_vm: Any) -> None:
    """ENOMEM, and the HKID is still free."""
    vm = new_vm(hkids=2)
    other = type(vm)(vm.host, vm.hooks, 1)
    vm.host.frames.limit = len(vm.host.frames.used) + 3
    assert call(vm.hooks.vm_init(other)) == errno.ENOMEM

    vm.host.frames.limit = None
    assert call(vm.hooks.vm_init(other)) == 0


def test_a_td_whose_control_pages_are_refused(new_vm: Any) -> None:
    """EIO, and all that was taken goes back, through the key's whole life."""
    vm = new_vm()
    other = type(vm)(vm.host, vm.hooks, 1)
    used = len(vm.host.frames.used)
    taken = vm.host.frames.high - 2  # the fifth TDCX page: it belongs to the first TD
    vm.host.hw.pamt[0][taken] = 1 << 4 | PageType.PT_EPT

    assert call(vm.hooks.vm_init(other)) == errno.EIO
    assert len(vm.host.frames.used) == used
    assert vm.host.hw.tds.keys() == {1}
    assert call(vm.hooks.vm_init(type(vm)(vm.host, vm.hooks, 1))) == 0


def test_teardown(new_vm: Any) -> None:
    """Everything comes back, in the kernel's order of calls."""
    vm = new_vm(vcpus=2)
    host = vm.host
    vm.fault(run(0, 600), run(1, 600))
    vm.accept(run(0, 600))
    vm.enter()
    host.meter.ops.clear()

    vm.destroy()

    assert host.meter.ops == {
        "TDH.MEM.RANGE.BLOCK": 600,
        "TDH.MEM.TRACK": 600,
        "TDH.MEM.PAGE.REMOVE": 600,
        "TDH.PHYMEM.PAGE.WBINVD": 600 + 1,
        "TDH.VP.FLUSH": 2,
        "TDH.MNG.VPFLUSHDONE": 1,
        "TDH.PHYMEM.CACHE.WB": 1,
        "TDH.MNG.KEY.FREEID": 1,
        "TDH.PHYMEM.PAGE.RECLAIM": 2 * 6 + 4 + 6 + 1,
    }
    assert not vm.dead
    assert not host.frames.used
    assert not host.frames.leaks
    assert not host.hw.tds
    assert not np.count_nonzero(host.memory.key)


def test_an_interrupted_write_back_is_resumed(new_vm: Any) -> None:
    """PHYMEM.CACHE.WB is called until it is through."""
    vm = new_vm()
    vm.host.hw.interrupt_pending = True
    vm.destroy()

    assert vm.host.meter.ops["TDH.PHYMEM.CACHE.WB"] == 2
    assert not vm.host.frames.used


def test_a_key_that_cannot_be_released(new_vm: Any) -> None:
    """The VM is bugged, and all that the TD holds is leaked, nothing freed."""
    vm = new_vm()
    vm.fault(run(0, 4), run(1, 4))
    vm.enter()  # a vCPU that nobody can get out: it cannot be flushed
    vm.vcpus[0].in_guest = False
    host = vm.host
    held = set(host.frames.used)
    drain(vm.hooks.vm_pre_destroy(vm))
    drain(vm.hooks.vcpu_free(vm.vcpus[0]))
    tables = contiguous(np.array(sorted(vm.tables.values())))
    host.frames.free(drain(vm.hooks.free_private_spt(vm, tables)))
    drain(vm.hooks.vm_destroy(vm))

    assert vm.dead
    assert {pfn for _, pfns in host.frames.leaks for pfn in pfns} == held
    assert td_of(vm).life_cycle is LifeCycle.TD_KEYS_CONFIGURED


def test_a_table_is_not_freed_while_the_key_is_held(new_vm: Any) -> None:
    """That would be a bug of KVM: the table is leaked."""
    vm = new_vm()
    vm.link(run(0, 1), 1)
    table = run(vm.tables[2, 0], 1)

    assert drain(vm.hooks.free_private_spt(vm, table)) == slice(0, 0, 1)
    assert vm.dead
    assert vm.host.frames.leaks[0][1] == [table.start]


# ---- vCPUs ----------------------------------------------------------------------------------------------------


def test_vcpus(new_vm: Any) -> None:
    """Made before the TD is finalised, entered after."""
    vm = new_vm(vcpus=1, launched=False)

    assert call(vm.hooks.vcpu_enter(vm.vcpus[0])) == errno.EINVAL
    drain(vm.hooks.launch_finish(vm))
    vm.enter()
    assert sum(td_of(vm).refcount) == 1
    with pytest.raises(UapiError, match=r"VP\.INIT"):
        vm.add_vcpu()


def test_entering_waits_for_the_epoch(new_vm: Any, busy: Any) -> None:
    """VP.ENTER that is busy is simply made again."""
    vm = new_vm()

    busy(vm.hooks.vcpu_enter(vm.vcpus[0]), td_of(vm).epoch_lock.try_read, times=3)

    assert sum(td_of(vm).refcount) == 1


def test_a_dead_td_is_not_entered(new_vm: Any) -> None:
    """EIO, and the VM is bugged."""
    vm = new_vm()
    td_of(vm).fatal = True

    assert call(vm.hooks.vcpu_enter(vm.vcpus[0])) == errno.EIO
    assert vm.dead


# ---- growing --------------------------------------------------------------------------------------------------


def test_a_fault(new_vm: Any) -> None:
    """Tables parents first, AUG, then the guest accepts; the second page needs no tables."""
    vm = new_vm()
    vm.fault(run(0, 1), run(1, 1))
    assert vm.accept(run(0, 1)) == Walk.OK
    vm.fault(run(1, 1), run(2, 1))

    assert vm.host.meter.ops == {"TDH.MEM.SEPT.ADD": 3, "TDH.MEM.PAGE.AUG": 2, "TDG.MEM.PAGE.ACCEPT": 1}
    assert (state_of(vm, 0), state_of(vm, 1)) == ((S.MAPPED, 1), (S.PENDING, 2))


@pytest.mark.parametrize("hook", ["set", "link"])
def test_busy_is_retried_by_the_guest(new_vm: Any, busy: Any, hook: str) -> None:
    """The fault is retried; nothing is charged to the VM's health."""
    vm = new_vm()
    vm.link(run(0, 1), 1)
    if hook == "set":
        steps = vm.hooks.set_private_spte(vm, vm.batch(run(0, 2), run(1, 2)))
    else:
        steps = vm.hooks.link_private_spt(vm, run(512, 1), 2, run(900, 1))

    stopped = busy(steps, td_of(vm).tree.try_read)

    assert stopped == Stopped(0, Retry())
    assert not vm.dead


def test_what_else_fails_is_a_bug(new_vm: Any) -> None:
    """AUG of a frame that is in use: pages below stand, the VM is dead."""
    vm = new_vm()
    vm.fault(run(0, 1), run(7, 1))

    stopped = drain(vm.hooks.set_private_spte(vm, vm.batch(run(1, 4), run(5, 4))))

    assert (stopped.done, type(stopped.reason), stopped.reason.errno) == (2, Fatal, errno.EIO)
    assert "TDX_PAGE_METADATA_INCORRECT|R8" in vm.why[0]
    assert vm.host.meter.ops["TDH.MEM.PAGE.AUG"] == 1 + 3
    drain(vm.hooks.link_private_spt(vm, run(0, 1), 2, run(900, 1)))
    assert "TDX_EPT_ENTRY_STATE_INCORRECT|RCX" in vm.why[1]


def test_mapping_before_the_launch_is_complete(new_vm: Any) -> None:
    """Only the launch maps then."""
    vm = new_vm(launched=False)
    vm.link(run(0, 1), 1)

    stopped = drain(vm.hooks.set_private_spte(vm, vm.batch(run(0, 1), run(1, 1))))

    assert stopped.reason.errno == errno.EIO
    assert vm.dead


# ---- shrinking ------------------------------------------------------------------------------------------------


def test_removal_of_a_page(new_vm: Any) -> None:
    """BLOCK, TRACK, kick, REMOVE, WBINVD, clear; the frame is the host's again, empty."""
    vm = new_vm(vcpus=4)
    vm.fault(run(3, 1), run(5, 1))
    vm.accept(run(3, 1))
    vm.host.memory.write(run(5, 1), 77, vm.key)
    vm.enter(2)
    vm.host.meter.ops.clear()
    vm.host.meter.counts.clear()

    vm.zap(run(3, 1))

    assert vm.host.meter.ops == dict.fromkeys(
        ("TDH.MEM.RANGE.BLOCK", "TDH.MEM.TRACK", "TDH.MEM.PAGE.REMOVE", "TDH.PHYMEM.PAGE.WBINVD"), 1
    )
    assert vm.host.meter.counts["kick_base"] == 1
    assert vm.host.meter.counts["kick_per_vcpu"] == 4
    assert vm.host.meter.counts["movdir64b_clear_4k"] == 1
    assert not vm.vcpus[2].in_guest
    assert (vm.host.memory.stamp[5], vm.host.memory.key[5]) == (0, 0)
    assert state_of(vm, 3)[0] is S.FREE
    assert not vm.dead


def test_removal_of_a_large_page(new_vm: Any) -> None:
    """One BLOCK, TRACK, REMOVE; caches and clearing go by 4K pages."""
    vm = new_vm(page_aug="2m")
    vm.fault(run(512, 2, 512), run(1024, 2, 512), level=2)
    vm.accept(run(512, 2, 512), level=2)
    vm.host.meter.ops.clear()

    vm.zap(run(512, 2, 512), level=2)

    assert vm.host.meter.ops["TDH.MEM.PAGE.REMOVE"] == 2
    assert vm.host.meter.ops["TDH.PHYMEM.PAGE.WBINVD"] == 1024
    assert vm.host.meter.counts["movdir64b_clear_4k"] == 1024
    assert not vm.dead


def test_removal_before_the_td_runs(new_vm: Any) -> None:
    """Nobody can be inside: no TRACK and no kick."""
    vm = new_vm(launched=False)
    drain(vm.hooks.launch_update(vm, vm.batch(run(0, 2), run(1, 2)), [b"a", b"b"], "normal"))

    vm.zap(run(0, 2))

    assert "TDH.MEM.TRACK" not in vm.host.meter.ops
    assert vm.host.meter.ops["TDH.MEM.PAGE.REMOVE"] == 2


@pytest.mark.parametrize("n", [1, 2, 5, 700])
@pytest.mark.parametrize("inside", [False, True])
def test_a_removal_is_its_pages_one_by_one(new_vm: Any, n: int, inside: bool) -> None:
    """Same end state of the module, epoch included, same counts, same clock."""
    together, single = new_vm(vcpus=2), new_vm(vcpus=2)
    for vm in (together, single):
        vm.fault(run(0, n), run(1, n))
        vm.accept(run(0, n))
        if inside:
            vm.enter()

    together.zap(run(0, n))
    for gfn in range(n):
        single.zap(run(gfn, 1))

    assert together.host.meter.ops == single.host.meter.ops
    assert together.host.meter.counts == single.host.meter.counts
    one, other = td_of(together), td_of(single)
    assert (one.epoch, one.refcount, one.nr_children) == (other.epoch, other.refcount, other.nr_children)
    assert one.epoch == 1 + n
    np.testing.assert_array_equal(together.host.hw.pamt[0], single.host.hw.pamt[0])


@pytest.mark.parametrize("effect", ["tree.try_write", "tree.try_read"])
def test_a_busy_removal_kicks_everybody_and_tries_once_more(new_vm: Any, busy: Any, effect: str) -> None:
    """Busy once: it works the second time, at the price of a kick."""
    vm = new_vm(vcpus=2)
    vm.fault(run(0, 3), run(1, 3))
    vm.host.meter.ops.clear()
    lock, side = effect.split(".")
    batch = vm.batch(run(0, 3), run(1, 3))

    busy(vm.hooks.remove_private_spte(vm, batch), getattr(getattr(td_of(vm), lock), side))

    name = "TDH.MEM.RANGE.BLOCK" if side == "try_write" else "TDH.MEM.PAGE.REMOVE"
    assert vm.host.meter.ops[name] == 3 + 1
    assert vm.host.meter.counts["kick_base"] == 3 + 1
    assert not vm.dead
    assert td_of(vm).state_counts(0) == {}


def test_a_removal_that_stays_busy_is_a_bug(new_vm: Any, busy: Any) -> None:
    """Busy with everybody out: the page is leaked, the VM dead; the other pages go on."""
    vm = new_vm()
    vm.fault(run(0, 3), run(1, 3))

    busy(vm.hooks.remove_private_spte(vm, vm.batch(run(0, 3), run(1, 3))), td_of(vm).tree.try_write, times=2)

    assert vm.dead
    assert [pfns for _, pfns in vm.host.frames.leaks] == [[1]]
    assert state_of(vm, 0) == (S.PENDING, 1)
    assert state_of(vm, 1)[0] is state_of(vm, 2)[0] is S.FREE


def test_a_removal_that_is_refused(new_vm: Any) -> None:
    """A page that is not there: bug, leak, and the rest goes on."""
    vm = new_vm()
    vm.fault(run(0, 5), run(1, 5))
    drain(vm.host.hw.tdh_mem_range_block.steps(vm.arch.tdr, 0, run(1, 1)))

    vm.zap(run(0, 5))

    assert "TDX_GPA_RANGE_ALREADY_BLOCKED" in vm.why[0]
    assert [pfns for _, pfns in vm.host.frames.leaks] == [[2]]
    assert td_of(vm).state_counts(0) == {S.PENDING_BLOCKED: 1}
    assert vm.host.meter.ops["TDH.MEM.PAGE.REMOVE"] == 4


def test_track_that_is_busy_is_made_again(new_vm: Any, busy: Any) -> None:
    """The epoch's lock is held for a moment: nobody may enter, all are kicked, and it is tried again (tdx_track)."""
    vm = new_vm()
    vm.fault(run(0, 2), run(1, 2))

    busy(vm.hooks.remove_private_spte(vm, vm.batch(run(0, 2), run(1, 2))), td_of(vm).epoch_lock.try_write)

    assert not vm.dead
    assert td_of(vm).state_counts(0) == {}
    assert td_of(vm).epoch == 3
    assert (vm.host.meter.ops["TDH.MEM.TRACK"], vm.host.meter.counts["kick_base"]) == (3, 3)


def test_early_key_release(new_vm: Any) -> None:
    """KVM_TDX_TERMINATE_VM: afterwards pages are reclaimed, without block, track or kick."""
    vm = new_vm(terminate_vm="on", page_aug="2m")
    vm.fault(run(0, 9), run(1, 9))
    vm.fault(run(512, 1), run(1024, 1), level=2)
    vm.accept(run(0, 9))
    drain(vm.hooks.memory_encrypt_op(vm, "KVM_TDX_TERMINATE_VM", {}))
    vm.host.meter.ops.clear()

    vm.zap(run(0, 9))
    vm.zap(run(512, 1), level=2)

    assert vm.dead
    assert vm.host.meter.ops == {"TDH.PHYMEM.PAGE.RECLAIM": 10, "TDH.PHYMEM.PAGE.WBINVD": 9 + 512}
    vm.destroy()
    assert not vm.host.frames.used
    assert not vm.host.frames.leaks


# ---- splitting and merging ------------------------------------------------------------------------------------


def large_vm(new_vm: Any) -> Any:
    vm = new_vm(page_aug="2m", vcpus=2)
    vm.fault(run(512, 1), run(1024, 1), level=2)
    vm.accept(run(512, 1), level=2)
    vm.host.memory.write(run(1024, 512), np.arange(512, dtype=np.uint32) + 1, vm.key)
    vm.host.meter.ops.clear()
    return vm


def content(vm: Any) -> list[int]:
    access = vm.hooks.guest_access(vm, run(512, 512), slice(0, 0, 1), True, True)
    assert access.status == Walk.OK
    stamps: list[int] = vm.host.memory.read(access.pfns, vm.key).tolist()
    return stamps


def test_split_and_promote(new_vm: Any) -> None:
    """Content stays; the table page that a promote gives back is flushed and empty."""
    vm = large_vm(new_vm)
    table = vm.host.frames.alloc(1, 3).start

    assert drain(vm.hooks.split_private_spt(vm, 512, 2, table)) is None
    assert vm.host.meter.ops == {"TDH.MEM.RANGE.BLOCK": 1, "TDH.MEM.TRACK": 1, "TDH.MEM.PAGE.DEMOTE": 1}
    assert state_of(vm, 512, 1) == (S.NL_MAPPED, table)
    assert content(vm) == list(range(1, 513))
    vm.host.meter.ops.clear()
    assert drain(vm.hooks.promote_private_spt(vm, 512, 2, table, False)) is None
    assert vm.host.meter.ops == {
        "TDH.MEM.RANGE.BLOCK": 1, "TDH.MEM.TRACK": 1, "TDH.MEM.PAGE.PROMOTE": 1, "TDH.PHYMEM.PAGE.WBINVD": 1,
    }  # fmt: skip
    assert state_of(vm, 512, 1) == (S.MAPPED, 1024)
    assert content(vm) == list(range(1, 513))
    assert vm.host.memory.key[table] == 0
    assert not vm.dead


def test_a_promote_that_is_refused(new_vm: Any) -> None:
    """Pages of both kinds: unblocked again, nothing changed, small pages go on."""
    vm = new_vm(page_aug="2m")
    vm.fault(run(512, 512), run(1024, 512))
    vm.accept(run(512, 511))
    table = vm.tables[2, 1]

    assert drain(vm.hooks.promote_private_spt(vm, 512, 2, table, False)) == Stopped(0, Retry())
    assert vm.host.meter.ops["TDH.MEM.RANGE.UNBLOCK"] == 1
    assert state_of(vm, 512, 1) == (S.NL_MAPPED, table)
    assert vm.hooks.guest_access(vm, run(512, 511), slice(0, 0, 1), True, True).status == Walk.OK
    assert not vm.dead


def test_an_interrupted_promote_is_made_again(new_vm: Any) -> None:
    """TDX_INTERRUPTED_RESTARTABLE changes nothing; each call counts."""
    vm = large_vm(new_vm)
    table = vm.host.frames.alloc(1, 3).start
    drain(vm.hooks.split_private_spt(vm, 512, 2, table))
    vm.host.hw.interrupt_pending = True

    assert drain(vm.hooks.promote_private_spt(vm, 512, 2, table, False)) is None
    assert vm.host.meter.ops["TDH.MEM.PAGE.PROMOTE"] == 2


def test_a_split_that_fails(new_vm: Any) -> None:
    """A table page that is in use: the large page stays."""
    vm = large_vm(new_vm)

    stopped = drain(vm.hooks.split_private_spt(vm, 512, 2, vm.arch.tdr))

    assert (stopped.done, stopped.reason.errno) == (0, errno.EIO)
    assert vm.dead


# ---- the guest ------------------------------------------------------------------------------------------------


def test_accept_sizes_do_not_match(new_vm: Any) -> None:
    """Smaller than asked for: the guest falls back. Larger: the host has to split."""
    vm = new_vm(page_aug="2m")
    vm.fault(run(0, 1), run(1, 1))
    vm.fault(run(512, 1), run(1024, 1), level=2)

    assert vm.accept(run(0, 1), level=2) == Walk.SMALLER
    assert vm.accept(run(515, 1)) == Walk.LARGER
    assert vm.accept(run(512, 1), level=2) == Walk.OK
    assert vm.accept(run(515, 1)) == Walk.OK
    assert vm.host.meter.counts["accept_2m"] == 1
    assert vm.host.meter.counts["tdcall"] == 2
    assert vm.host.meter.counts["accept_4k"] == 0


def test_accept_of_a_mixed_batch(new_vm: Any) -> None:
    """Only those that are accepted are counted: the others make the call again."""
    vm = new_vm()
    vm.fault(run(0, 4), run(1, 4))

    status = vm.accept(np.array([1, 3, 5, 700]))

    assert status.tolist() == [Walk.OK, Walk.OK, Walk.MISS, Walk.MISS]
    assert vm.host.meter.ops["TDG.MEM.PAGE.ACCEPT"] == 2


@pytest.mark.parametrize("gfns", [run(0, 1), run(0, 4)])
def test_a_busy_accept_is_made_again(new_vm: Any, busy: Any, gfns: Any) -> None:
    """Somebody holds the tree exclusively: the guest tries again, and that takes time."""
    vm = new_vm()
    vm.fault(run(0, 4), run(1, 4))

    access = busy(vm.hooks.guest_accept(vm, gfns, 1), td_of(vm).tree.try_read, times=3)

    assert access.status == Walk.OK
    assert vm.host.meter.counts["tdcall"] == 3


def test_a_page_within_a_batch_is_busy(new_vm: Any) -> None:
    """Another vCPU accepts one of the pages: the guest makes that call again, and no call on the pages before it."""
    vm = new_vm()
    vm.fault(run(0, 6), run(1, 6))
    td = td_of(vm)
    td.held[(0, 3)] = td.lock
    steps = vm.hooks.guest_accept(vm, run(0, 7), 1)
    while next(steps).name != "fault.retry":
        pass
    accepted = vm.host.meter.counts["accept_4k"]
    td.held.clear()
    try:
        while True:
            next(steps)
    except StopIteration as end:
        access = end.value

    assert accepted == 3
    assert access.status.tolist() == [Walk.OK] * 6 + [Walk.MISS]
    assert (vm.host.meter.counts["accept_4k"], vm.host.meter.counts["tdcall"]) == (6, 1)


def test_access(new_vm: Any) -> None:
    """Private accesses are walked by the module's tables, shared ones are none of its business."""
    vm = new_vm()
    vm.fault(run(0, 3), run(1, 3))
    vm.accept(run(0, 2))
    empty = slice(0, 0, 1)

    assert vm.hooks.guest_access(vm, run(0, 4), empty, True, True).status.tolist() == [0, 0, 2, 1]
    shared = vm.hooks.guest_access(vm, run(0, 4), run(50, 4), True, False)
    assert (shared.status, shared.pfns) == (Walk.OK, run(50, 4))
    leave = vm.hooks.guest_convert(run(0, 4))
    assert isinstance(leave, Exit)
    assert leave.n == 4


def test_the_host_writes_to_the_td(new_vm: Any) -> None:
    """The TD reads it: machine check, the VM is dead."""
    vm = new_vm()
    vm.fault(run(0, 3), run(1, 3))
    vm.accept(run(0, 3))

    assert vm.hooks.host_access(vm.host, run(1, 1), False) is HostVerdict.ZEROS
    assert vm.hooks.host_access(vm.host, run(9, 1), True) is HostVerdict.OK
    assert vm.hooks.host_access(vm.host, run(2, 1), True) is HostVerdict.POISONED
    assert not vm.dead
    access = vm.hooks.guest_access(vm, run(0, 3), slice(0, 0, 1), False, True)
    assert access.status.tolist() == [Walk.OK, Walk.DENIED, Walk.OK]
    assert vm.dead


def test_what_the_tables_really_hold(new_vm: Any) -> None:
    """read_private_spte says absent, leaf or table, with frames, at any level."""
    vm = new_vm(page_aug="2m")
    vm.fault(run(0, 2), run(1, 2))
    vm.fault(run(512, 1), run(1024, 1), level=2)

    def read(gfns: Any, level: int) -> list[tuple[int, int]]:
        kinds, frames = vm.hooks.read_private_spte(vm, gfns, level)
        return list(zip(kinds.tolist(), frames.tolist(), strict=True))

    assert read(np.array([0, 1, 2, 512]), 1) == [(1, 1), (1, 2), (0, 0), (0, 0)]
    assert read(run(0, 3, 512), 2) == [(2, vm.tables[2, 0]), (1, 1024), (0, 0)]
    assert read(run(0, 1), 4) == [(2, vm.tables[4, 0])]
    assert read(run(0, 1), 5) == [(0, 0)]


# ---- launch ---------------------------------------------------------------------------------------------------


def test_launch_refuses(new_vm: Any) -> None:
    """Kinds that a TD does not have, an image after the end, no memory for the source; the host keeps nothing."""
    vm = new_vm(launched=False)
    batch = vm.batch(run(0, 1), run(1, 1))
    used = len(vm.host.frames.used)

    def update(kind: str) -> int:
        stopped = drain(vm.hooks.launch_update(vm, batch, [b"a"], kind))
        return stopped.reason.errno if stopped else 0

    assert [update(kind) for kind in ("vmsa", "secrets", "cpuid")] == [errno.EINVAL] * 3
    vm.host.frames.limit = used
    assert update("normal") == errno.ENOMEM
    vm.host.frames.limit = None
    drain(vm.hooks.launch_finish(vm))
    assert update("normal") == errno.EINVAL
    assert len(vm.host.frames.used) == used


@pytest.mark.parametrize("kind", ["normal", "unmeasured"])
def test_a_page_that_is_there_already(new_vm: Any, kind: str) -> None:
    """Pages below it stay loaded; its own error ends the call."""
    vm = new_vm(launched=False)
    drain(vm.hooks.launch_update(vm, vm.batch(run(2, 1), run(9, 1)), [b"x"], kind))

    stopped = drain(vm.hooks.launch_update(vm, vm.batch(run(0, 4), run(1, 4)), [b"a", b"b", b"c", b"d"], kind))

    assert (stopped.done, stopped.reason.errno) == (2, errno.EIO)
    assert [state_of(vm, gfn) for gfn in range(4)] == [
        (S.MAPPED, 1), (S.MAPPED, 2), (S.MAPPED, 9), (S.FREE, 0),
    ]  # fmt: skip


def test_content_of_the_image(new_vm: Any) -> None:
    """The guest finds what was loaded, without accepting it; the source pages are free and empty again."""
    vm = new_vm(launched=False)
    contents = [bytes([i]) * 4096 for i in range(1, 4)]
    before = set(vm.host.frames.used)
    assert drain(vm.hooks.launch_update(vm, vm.batch(run(0, 3), run(1, 3)), contents, "normal")) is None
    drain(vm.hooks.launch_finish(vm))

    access = vm.hooks.guest_access(vm, run(0, 3), slice(0, 0, 1), False, True)

    assert access.status == Walk.OK
    memory = vm.host.memory
    assert [memory.bytes_of(stamp) for stamp in memory.read(access.pfns, vm.key).tolist()] == contents
    assert vm.host.frames.used - set(vm.tables.values()) == before
    assert vm.host.meter.ops["TDH.MEM.PAGE.ADD"] == 3
    assert vm.host.meter.ops["TDH.MR.EXTEND"] == 48


def test_finish(new_vm: Any, busy: Any) -> None:
    """No vCPU: EIO; busy: EBUSY; then it works, once."""
    empty = new_vm(vcpus=0, launched=False)
    assert call(empty.hooks.launch_finish(empty)) == errno.EIO
    vm = new_vm(launched=False)
    assert not vm.pre_fault_allowed
    with pytest.raises(UapiError) as caught:
        busy(vm.hooks.launch_finish(vm), td_of(vm).lock.try_write)
    assert caught.value.errno == errno.EBUSY

    assert call(vm.hooks.launch_finish(vm)) == 0
    assert vm.pre_fault_allowed
    assert td_of(vm).op_state is OpState.RUNNABLE
    assert vm.arch.launch_digest == td_of(vm).mrtd
    assert call(vm.hooks.launch_finish(vm)) == errno.EINVAL


# ---- vendor calls ---------------------------------------------------------------------------------------------

VE = TD_ATTR_SEPT_VE_DISABLE


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        ("KVM_TDX_NO_SUCH", {}, errno.EINVAL),
        ("KVM_TDX_TERMINATE_VM", {}, errno.EINVAL),  # not offered
        ("KVM_TDX_CAPABILITIES", {"hw_error": 1}, errno.EINVAL),
        ("KVM_TDX_CAPABILITIES", {"flags": 1}, errno.EINVAL),
        ("KVM_TDX_CAPABILITIES", {"cpuid": 0}, errno.EFAULT),
        ("KVM_TDX_CAPABILITIES", {}, 0),
        ("KVM_TDX_INIT_VM", {"attributes": b"\0"}, errno.EFAULT),
        ("KVM_TDX_INIT_VM", {"attributes": -1}, errno.EFAULT),
        ("KVM_TDX_INIT_VM", {"gpaw": 1 << 64}, errno.EFAULT),
        ("KVM_TDX_INIT_VM", {"flags": 1}, errno.EINVAL),
        ("KVM_TDX_INIT_VM", {"reserved": 1}, errno.EINVAL),
        ("KVM_TDX_INIT_VM", {"attributes": VE | 1}, errno.EINVAL),
        ("KVM_TDX_INIT_VM", {"attributes": 0}, errno.EINVAL),
        ("KVM_TDX_INIT_VM", {"attributes": VE, "gpaw": 52}, errno.EINVAL),
        ("KVM_TDX_INIT_VM", {"attributes": VE, "gpaw": 48}, 0),
        ("KVM_TDX_INIT_VCPU", {"vcpu": 0}, errno.EINVAL),
        ("KVM_TDX_FINALIZE_VM", {}, errno.EINVAL),  # not initialised
    ],
)
def test_vendor_calls_on_a_new_vm(new_vm: Any, command: str, arguments: dict[str, Any], expected: int) -> None:
    """errno of the KVM_TDX_* commands before anything else was called."""
    vm = new_vm(vcpus=0, launched=False)

    assert call(vm.hooks.memory_encrypt_op(vm, command, arguments)) == expected


def test_vendor_calls_in_order(new_vm: Any) -> None:
    """INIT_VM, vCPUs, INIT_VCPU, FINALIZE_VM, each once."""
    vm = new_vm(vcpus=0, launched=False)

    def op(command: str, **arguments: int) -> int:
        return call(vm.hooks.memory_encrypt_op(vm, command, arguments))

    assert [op("KVM_TDX_INIT_VM"), op("KVM_TDX_INIT_VM")] == [0, errno.EINVAL]
    vm.add_vcpu()
    assert [op("KVM_TDX_INIT_VCPU", vcpu=0), op("KVM_TDX_INIT_VCPU", vcpu=0)] == [0, errno.EINVAL]
    assert [op("KVM_TDX_FINALIZE_VM"), op("KVM_TDX_FINALIZE_VM")] == [0, errno.EINVAL]
    late = new_vm(vcpus=1, launched=False)
    assert call(late.hooks.memory_encrypt_op(late, "KVM_TDX_INIT_VM", {})) == errno.EBUSY


# ---- charging -------------------------------------------------------------------------------------------------


def test_a_leaf_is_charged_while_it_holds_its_locks(new_vm: Any) -> None:
    """The price falls due between the locks, so that on a clock others find them taken that long."""
    vm = new_vm()
    vm.fault(run(0, 1), run(1, 1))
    meter = vm.host.meter
    td = td_of(vm)
    steps = seamcall(meter, "X", "range_block", vm.host.hw.tdh_mem_range_block.steps(vm.arch.tdr, 0, run(0, 1)))
    seen = []
    before = meter.ns
    for effect in steps:
        seen.append((effect, meter.ns - before))

    names = [effect.name for effect, _ in seen]
    assert names.index(td.tree.try_write.name) < names.index(LEAF.name) < names.index(td.tree.release.name)
    assert [paid for effect, paid in seen if effect is td.tree.try_write] == [0]
    assert [paid for effect, paid in seen if effect is td.tree.release] == [meter.prices["range_block"]]


def test_a_refused_leaf_is_charged_all_the_same(new_vm: Any, busy: Any) -> None:
    """The call was made."""
    vm = new_vm()
    vm.link(run(0, 1), 1)
    vm.host.meter.ops.clear()
    steps = vm.hooks.set_private_spte(vm, vm.batch(run(0, 5), run(1, 5)))

    busy(steps, td_of(vm).lock.try_read)

    assert vm.host.meter.ops["TDH.MEM.PAGE.AUG"] == 1


def test_statuses_have_names(new_vm: Any) -> None:
    """What bugs a VM says which leaf refused, and with which status."""
    vm = new_vm()
    drain(vm.hooks.set_private_spte(vm, vm.batch(run(0, 1), run(1, 1))))

    assert vm.why == ["TDH.MEM.PAGE.AUG: TDX_EPT_WALK_FAILED|RCX"]
    assert Status.TDX_EPT_WALK_FAILED >> 63
