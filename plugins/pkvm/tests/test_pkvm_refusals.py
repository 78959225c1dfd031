"""What KVM makes of each refusal of EL2 (pkvm.md 3, 4 and 8)."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest

from cvmcore.errors import HardwareError
from cvmcore.testing.conformance import Setting
from cvmcore.testing.player import Player
from cvmcore.testing.refusals import (
    DEAD,
    DEAD_LEAKS,
    GOES_ON,
    GUEST,
    LEAKS,
    Call,
    Outcome,
    Refusal,
    Table,
    as_tests,
    row,
)
from cvmcore.types import HostMode, HostVerdict, Shutdown
from cvmcore.vcpu import Touch
from cvmcore_pkvm.errors import Errno, Smccc
from cvmcore_pkvm.hw import HvcResult, Result
from cvmcore_pkvm.ops import PKVM

SHARED = Setting("2m", (("protected", "no"),))
"""Non-protected VMs: pages and blocks are shared with the guest, and unshared."""


def _result(done: int, status: Any, args: tuple[Any, ...]) -> Any:
    return Result(status, done)


def _hvc(done: int, status: Any, args: tuple[Any, ...]) -> Any:
    return HvcResult(status, 0, 1)


def hcall(operation: str, name: str = "", elements: tuple[int, ...] = ()) -> Call:
    """A hypercall of the host."""
    return Call(name or f"__pkvm_{operation}", operation, Errno, _result, elements)


RESERVE_VM, UNRESERVE_VM = hcall("reserve_vm"), hcall("unreserve_vm")
SHARE_HYP, UNSHARE_HYP = hcall("host_share_hyp"), hcall("host_unshare_hyp")
INIT_VM, INIT_VCPU = hcall("init_vm"), hcall("init_vcpu")
LOAD = hcall("vcpu_load")
DONATE = hcall("host_donate_guest", elements=(1, 2))
SHARE, UNSHARE = hcall("host_share_guest", elements=(1, 2)), hcall("host_unshare_guest", elements=(1,))
RELAX = hcall("relax_perms", "__pkvm_host_relax_perms_guest", (1,))
WRPROTECT = hcall("wrprotect", "__pkvm_host_wrprotect_guest", (1,))
POISON = hcall("vcpu_in_poison_fault")
START, FINALIZE = hcall("start_teardown_vm"), hcall("finalize_teardown_vm")
RECLAIM = hcall("host_reclaim_guest", "__pkvm_reclaim_dying_guest_page", (1,))
FORCE = hcall("host_force_reclaim", "__pkvm_force_reclaim_guest_page", (0,))
MEM_SHARE = Call("MEM_SHARE", "mem_share", Smccc, _hvc)
MEM_UNSHARE = Call("MEM_UNSHARE", "mem_unshare", Smccc, _hvc)

QUESTIONS = {
    "guest_access": "the processor's walk of the guest's stage 2, an access and no call",
    "handle_host_mem_abort": "the host's access, which EL2 serves or answers with an abort; no call",
    "tlb_flush_vmid": "it gives no answer: EL2 passes by handles that it does not know, and it knows that of a VM",
    "vcpu_put": "without a loaded vCPU nothing happens",
    "read_stage2": "what the model's checks look at; KVM has no such call",
}
NEVER = {
    ("*", "EOPNOTSUPP"): "pKVM is finalised before the first VM",
    ("*", "ERANGE"): "memslots lie below the IPA size (KVM_SET_USER_MEMORY_REGION refuses others)",
}


# ---- stories ----------------------------------------------------------------------------------------------------


def logged(player: Player) -> None:
    """Blocks and pages are shared, write-protected, relaxed, unshared one by one and shared as a block again."""
    n = player.npages
    player.write(range(n))
    player.log_dirty(True)
    player.write(range(8))
    player.write(range(3, n - 3, 3), vcpu=1)
    player.log_dirty(False)
    player.write(range(n))
    player.check()


def never_run(player: Player) -> None:
    """The VM goes before it ran."""


def taken(player: Player) -> None:
    """The host's kernel writes to a page of the guest, which finds it destroyed."""
    player.write(range(8))
    try:
        verdict = player.process.write(player.hva, 1, 1, HostMode.KERNEL)
    except HardwareError:
        pass  # the kernel died of it, which is no VM's concern
    else:
        assert verdict is HostVerdict.RECLAIMED
        player.private.pop(0)
        exit = player.vcpus[0].run(Touch(slice(0, 1, 1), write=True, stamps=np.uint32([7])))
        assert isinstance(exit, Shutdown) and exit.errno == errno.EFAULT
    player.check()


# ---- the table --------------------------------------------------------------------------------------------------


def says(number: int) -> Outcome:
    """KVM_RUN, or the call, ends with an errno; a second try works."""
    return Outcome(number)


def each(call: Call, phase: str, kernel: str, *statuses: Errno, **more: Any) -> list[Refusal]:
    """Rows for statuses that KVM passes on as they are."""
    return [row(call, status, {phase: says(-status)}, kernel, **more) for status in statuses]


DYING = Outcome(0, dead=True, leaks=True)
NP = {"setting": SHARED, "story": logged}

ROWS = [
    # ---- the VM: made at the first run, whose errno it is
    *each(RESERVE_VM, "launch", "pkvm_init_host_vm: KVM_CREATE_VM fails", Errno.ENOMEM),
    *each(SHARE_HYP, "launch", "kvm_share_hyp: KVM_CREATE_VM or _VCPU fails", Errno.EPERM, Errno.EBUSY),
    *each(INIT_VM, "run", "__pkvm_create_hyp_vm: frees what it had donated", Errno.ENOMEM, Errno.EPERM, Errno.EINVAL),
    *each(INIT_VCPU, "run", "__pkvm_create_hyp_vcpu: frees what it had donated",
          Errno.ENOMEM, Errno.EBUSY, Errno.ENOENT, Errno.EPERM, Errno.EINVAL),
    row(LOAD, None, {"run": DEAD}, "kvm_arch_vcpu_load: no answer comes back; entering the guest would fail for ever"),
    row(UNRESERVE_VM, None, {"destroy": GOES_ON}, "pkvm_destroy_hyp_vm: no answer comes back; the handle stays taken",
        story=never_run),
    # ---- faults: unpinned and uncharged, and KVM_RUN says why
    *each(DONATE, "run", "pkvm_pgtable_stage2_map, pkvm_mem_abort: unpins", Errno.EPERM, Errno.ENOMEM, Errno.EINVAL),
    *each(SHARE, "run", "pkvm_pgtable_stage2_map: no mapping is recorded",
          Errno.EPERM, Errno.EBUSY, Errno.ENOMEM, Errno.EINVAL, **NP),
    row(RELAX, Errno.EAGAIN, {"run": GOES_ON}, "user_mem_abort: swallowed, the guest faults again", **NP),
    *each(RELAX, "run", "user_mem_abort: passed on", Errno.EINVAL, **NP),
    row(POISON, None, {"run": GOES_ON}, "pkvm_mem_abort: no poison, so another vCPU's race, and retried", story=taken),
    # ---- what must succeed
    row(UNSHARE, None, {"run": DEAD_LEAKS, "destroy": DYING},
        "__pkvm_pgtable_stage2_unshare: WARN_ON and no more, though the guest keeps the page; here the VM stops", **NP),
    row(WRPROTECT, None, {"run": DEAD},
        "pkvm_pgtable_stage2_wrprotect: WARN_ON and no more, and writes are not logged; here the VM stops", **NP),
    row(FORCE, Errno.EAGAIN, {"run": GOES_ON}, "__do_kernel_fault: handled, the access is made again", story=taken),
    row(FORCE, None, {"run": GOES_ON}, "__do_kernel_fault: the host's kernel dies, the page stays", story=taken),
    # ---- teardown: what EL2 keeps is leaked
    row(START, None, {"destroy": DYING}, "pkvm_destroy_hyp_vm: WARN_ON"),
    row(RECLAIM, None, {"destroy": LEAKS}, "__pkvm_pgtable_stage2_reclaim: WARN_ON; record, pin and charge are leaked"),
    row(FINALIZE, None, {"destroy": LEAKS}, "__pkvm_destroy_hyp_vm: WARN_ON"),
    row(UNSHARE_HYP, None, {"destroy": LEAKS}, "kvm_unshare_hyp: WARN_ON"),
    # ---- the guest's own: KVM hears of none
    row(MEM_SHARE, None, {"run": GUEST}, "the guest's set_memory_decrypted fails, and its caller does without"),
    row(MEM_UNSHARE, None, {"run": GUEST}, "the guest's set_memory_encrypted fails, and its caller leaks the page"),
]  # fmt: skip

TABLE = Table(
    ("cvmcore_pkvm.ops", "cvmcore_pkvm.launch"),
    tuple(value for value in globals().values() if isinstance(value, Call)),
    QUESTIONS, NEVER, tuple((PKVM, row) for row in ROWS),
)  # fmt: skip

(
    test_every_call_and_every_status_has_a_row,
    test_a_refusal_makes_what_the_table_says,
    test_a_refusal_makes_it_at_every_place,
) = as_tests(TABLE)

STORMS = [Setting("4k"), Setting("2m"), SHARED]


@pytest.mark.parametrize("setting", STORMS, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_lost_in_storms(setting: Setting, seed: int) -> None:
    TABLE.storm(PKVM, seed, setting=setting)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [Setting("4k"), SHARED], ids=str)  # a block is 512 hypercalls of the guest
def test_nothing_is_lost_in_many_storms(setting: Setting) -> None:
    assert sum(TABLE.storm(PKVM, seed, setting=setting, chance=0.1) for seed in range(10, 12)) > 0
