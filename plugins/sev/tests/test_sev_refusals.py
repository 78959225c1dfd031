"""What KVM makes of each refusal of the RMP and of the firmware (sev.md 3, 5 and 8)."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest

from cvmcore.backend import Backend
from cvmcore.pages import count
from cvmcore.testing.conformance import BLOCK, Setting
from cvmcore.testing.player import Player
from cvmcore.testing.refusals import (
    DEAD_LEAKS,
    GOES_ON,
    GUEST,
    LARGE_PAGES,
    LEAKS,
    Call,
    Guest,
    Outcome,
    Table,
    as_tests,
    named,
    row,
)
from cvmcore.types import PAGE_BYTES
from cvmcore.uapi import Process
from cvmcore_sev.errors import RmpStatus, SevStatus
from cvmcore_sev.hw import Command, Progress
from cvmcore_sev.ops import SEV, SEV_ES, SNP

EIO, EINVAL, ENOTTY = Outcome(errno.EIO), Outcome(errno.EINVAL), Outcome(errno.ENOTTY)
EBUSY = Outcome(errno.EBUSY)
ONE_ASID = Setting("4k", (("min_sev_asid", "2"),))


def _progress(done: int, status: Any, args: tuple[Any, ...]) -> Any:
    return Progress(done, status)


def _command(done: int, status: Any, args: tuple[Any, ...]) -> Any:
    return Command(done, status)


def _codes(done: int, status: Any, args: tuple[Any, ...]) -> Any:
    """Of the first page; the guest stops there, or has the same answer for all."""
    stops = status not in (RmpStatus.NPF_RMP, RmpStatus.NPF_SIZEM)
    codes = np.full(count(args[0]), RmpStatus.NOT_REACHED if stops else status, np.uint8)
    codes[0] = status
    return codes


def rmp(name: str, *elements: int) -> Call:
    """An instruction of the RMP, on pages."""
    return Call(name, f"rmp.{name.lower()}", RmpStatus, _progress, elements)


def pages(name: str, element: int) -> Call:
    """A firmware command, made for each page."""
    return Call(name, f"psp.{name.lower()}", SevStatus, _command, (element,))


def command(name: str, *more: Any) -> Call:
    """A firmware command for a guest; more: what it answers beside the status."""

    def answer(done: int, status: Any, args: tuple[Any, ...]) -> Any:
        return (status, *more) if more else status

    return Call(name, f"psp.{name.lower()}", SevStatus, answer)


RMPUPDATE, PSMASH = rmp("RMPUPDATE", 0, 1), rmp("PSMASH", 0)
PVALIDATE = Call(
    "PVALIDATE", "rmp.pvalidate", RmpStatus, _codes,
    fine=frozenset({RmpStatus.OK, RmpStatus.NOT_REACHED, RmpStatus.NPF_RMP, RmpStatus.NPF_SIZEM}),
)  # fmt: skip
"""Nested page faults are no refusals: the host mends them, and the guest makes the instruction again."""
SNP_UPDATE, RECLAIM = pages("SNP_LAUNCH_UPDATE", 1), pages("SNP_PAGE_RECLAIM", 0)
GCTX, SNP_START, SNP_ACTIVATE = command("SNP_GCTX_CREATE"), command("SNP_LAUNCH_START"), command("SNP_ACTIVATE")
SNP_FINISH, SNP_DECOMMISSION = command("SNP_LAUNCH_FINISH"), command("SNP_DECOMMISSION")
DF_FLUSH = command("DF_FLUSH")
START, ACTIVATE = command("LAUNCH_START", 0), command("ACTIVATE")
UPDATE, UPDATE_VMSA = command("LAUNCH_UPDATE_DATA"), command("LAUNCH_UPDATE_VMSA")
MEASURE, SECRET, FINISH = command("LAUNCH_MEASURE", 48), command("LAUNCH_SECRET"), command("LAUNCH_FINISH")
DEACTIVATE, DECOMMISSION = command("DEACTIVATE"), command("DECOMMISSION")
SEND_START, SEND_UPDATE = command("SEND_START", b""), command("SEND_UPDATE_DATA", b"", b"")
SEND_FINISH, SEND_CANCEL = command("SEND_FINISH"), command("SEND_CANCEL")
RECEIVE_START, RECEIVE_UPDATE = command("RECEIVE_START", 0), command("RECEIVE_UPDATE_DATA")
RECEIVE_FINISH = command("RECEIVE_FINISH")

QUESTIONS = {
    "psp.guest_status": "it answers for any handle; KVM_SEV_GUEST_STATUS passes it on",
    "psp.launch_digest": "what the model shows of a launch; KVM has no such call",
    "psp.snp_launch_digest": "what the model shows of a launch; KVM has no such call",
    "psp.wbinvd": "an instruction that cannot fail",
    "rmp.assigned": "RMPREAD of a frame that the table covers (snp_lookup_rmpentry)",
    "rmp.hpage_region_status": "RMPREAD",
    "rmp.levels": "RMPREAD",
    "rmp.state": "RMPREAD, for people; the code has the word of save areas",
    "rmp.check_host": "the processor's check of an access, and no call",
    "rmp.check_private": "the processor's check of an access, and no call",
    "rmp.check_shared": "the processor's check of an access, and no call",
}
NEVER = {
    ("PVALIDATE", "NO_CHANGE"): "the carry flag, which says what the RMP holds; what guests make of it is in test_ops",
}


# ---- stories ----------------------------------------------------------------------------------------------------


def hole(player: Player) -> None:
    """A part of a 2M page is punched out."""
    if player.npages < BLOCK:
        return
    player.write(range(BLOCK))
    player.punch(range(10, 20))
    player.write(range(BLOCK))
    player.check()


def again(player: Player, command: str, **arguments: Any) -> dict[str, Any]:
    """A KVM_SEV_* command, made until it works."""
    got: dict[str, Any] = player.until_it_works(lambda: player.vm.memory_encrypt_op(command, arguments))
    return got


def sent(player: Player) -> None:
    """A page goes to another VM of the host, and the VM runs on after it gave that up."""
    player.write(range(4))
    session = again(player, "KVM_SEV_SEND_START")
    packet = again(player, "KVM_SEV_SEND_UPDATE_DATA", guest_uaddr=player.hva, guest_len=PAGE_BYTES)
    target = Player(player.host, 8, process=Process(player.host), launch=False)
    target.passing = Guest.passing
    try:
        again(target, "KVM_SEV_RECEIVE_START", policy=session["policy"], session=session["session"])
        again(target, "KVM_SEV_RECEIVE_UPDATE_DATA", guest_uaddr=target.hva, **packet)
        again(target, "KVM_SEV_RECEIVE_FINISH")
        target.private[0] = player.private[0]
        target.check()
    finally:
        player.failed.by_errno.update(target.failed.by_errno)
        target.exit()
    again(player, "KVM_SEV_SEND_CANCEL")
    player.check()


def sent_away(player: Player) -> None:
    """The same, to the end: nothing is left to run."""
    again(player, "KVM_SEV_SEND_START")
    again(player, "KVM_SEV_SEND_FINISH")


def with_secret(player: Player) -> None:
    """The launch has a secret in it. The VM is one of its own, with its launch in the story."""
    other = Player(player.host, 8, process=Process(player.host), launch=False)
    other.passing = Guest.passing
    try:
        other.load(0, [b"image"])
        again(other, "KVM_SEV_LAUNCH_MEASURE", len=48)
        again(other, "KVM_SEV_LAUNCH_SECRET", guest_uaddr=other.hva + PAGE_BYTES, secret=b"s" * 16)
        again(other, "KVM_SEV_LAUNCH_FINISH")
    finally:
        player.failed.by_errno.update(other.failed.by_errno)
        other.exit()


# ---- the table --------------------------------------------------------------------------------------------------


REFUSED = {"call 1": ENOTTY, "launch": EIO, "gmem_prepare": EINVAL, "gmem_invalidate": LEAKS, "vcpu_free": DEAD_LEAKS,
           "vm_destroy": LEAKS}  # fmt: skip
"""What comes of an RMPUPDATE that fails: of the launch's, of a fault's, of those that take pages back."""
EVERYWHERE = {"launch": GOES_ON, "run": GOES_ON, "destroy": GOES_ON}
HOLE: dict[str, Any] = {"story": hole}
SENT: dict[str, Any] = {"story": sent}

SNP_ROWS = [
    row(RMPUPDATE, RmpStatus.FAIL_OVERLAP, EVERYWHERE, "rmpupdate: the firmware holds a lock, so it spins", times=5),
    row(RMPUPDATE, None, REFUSED,
        "rmpupdate: -EFAULT. snp_context_create -ENOTTY; sev_gmem_prepare -EINVAL; kvm_rmp_make_shared and "
        "sev_gmem_invalidate: the page is leaked"),
    row(PSMASH, RmpStatus.FAIL_INUSE, {"run": GOES_ON, "destroy": GOES_ON},
        "snp_rmptable_psmash: again, while another CPU has it", times=5),
    row(PSMASH, None, {"run": GOES_ON}, "sev_handle_rmp_fault: pr_warn_ratelimited, and the guest faults again"),
    row(PSMASH, RmpStatus.FAIL_PERMISSION, {"gmem_invalidate": LEAKS},
        "sev_gmem_invalidate: pr_warn_ratelimited, the 2M page stays as it is", **HOLE),
    row(GCTX, None, {"launch": ENOTTY}, "snp_context_create: the page is reclaimed, -ENOTTY"),
    row(SNP_START, None, {"launch": EIO}, "snp_launch_start: snp_decommission_context, -EIO"),
    row(SNP_ACTIVATE, None, {"launch": EIO}, "snp_bind_asid: snp_decommission_context, -EIO"),
    row(SNP_UPDATE, None, {"launch": EIO}, "sev_gmem_post_populate: the page is reclaimed, -EIO"),
    row(SNP_FINISH, None, {"launch": EIO}, "snp_launch_finish: -EIO, and it can be asked again"),
    row(SNP_DECOMMISSION, None, {"destroy": LEAKS}, "sev_vm_destroy: WARN_ONCE; context page and ASID are leaked"),
    row(RECLAIM, None, {"destroy": LEAKS}, "snp_page_reclaim: snp_leak_pages"),
    row(DF_FLUSH, None, {"launch": EBUSY}, "sev_flush_asids: the ASIDs stay dirty, -EBUSY", earlier=True,
        setting=ONE_ASID),
    row(PVALIDATE, None, {"run": GUEST}, "the guest's pvalidate_4k_page: sev_es_terminate; KVM hears of the end only"),
]  # fmt: skip
SEV_ROWS = [
    row(START, None, {"launch": EIO}, "sev_launch_start: -EIO"),
    row(ACTIVATE, None, {"launch": EIO}, "sev_bind_asid: DECOMMISSION, -EIO"),
    row(UPDATE, None, {"launch": EIO}, "sev_launch_update_data: unpins, -EIO"),
    row(MEASURE, None, {"launch": EIO}, "sev_launch_measure: -EIO"),
    row(SECRET, None, {"run": EIO}, "sev_launch_secret: unpins, -EIO", story=with_secret),
    row(FINISH, None, {"launch": EIO}, "sev_launch_finish: -EIO"),
    row(DEACTIVATE, None, {"destroy": GOES_ON}, "sev_unbind_asid: nobody looks"),
    row(DECOMMISSION, None, {"destroy": GOES_ON}, "sev_decommission: nobody looks"),
    row(SEND_START, None, {"run": EIO}, "sev_send_start: -EIO", **SENT),
    row(SEND_UPDATE, None, {"run": EIO}, "sev_send_update_data: unpins, -EIO", **SENT),
    row(SEND_CANCEL, None, {"run": EIO}, "sev_send_cancel: -EIO", **SENT),
    row(SEND_FINISH, None, {"run": EIO}, "sev_send_finish: -EIO", story=sent_away),
    row(RECEIVE_START, None, {"run": EIO}, "sev_receive_start: -EIO", **SENT),
    row(RECEIVE_UPDATE, None, {"run": EIO}, "sev_receive_update_data: unpins, -EIO", **SENT),
    row(RECEIVE_FINISH, None, {"run": EIO}, "sev_receive_finish: -EIO", **SENT),
]  # fmt: skip
ES_ROWS = [row(UPDATE_VMSA, None, {"launch": EIO}, "__sev_launch_update_vmsa: -EIO")]

TABLE = Table(
    ("cvmcore_sev.ops", "cvmcore_sev.commands", "cvmcore_sev.host", "cvmcore_sev.pins"),
    tuple(value for value in globals().values() if isinstance(value, Call)), QUESTIONS, NEVER,
    (*((SNP, row) for row in SNP_ROWS), *((SEV, row) for row in SEV_ROWS), *((SEV_ES, row) for row in ES_ROWS)),
)  # fmt: skip

(
    test_every_call_and_every_status_has_a_row,
    test_a_refusal_makes_what_the_table_says,
    test_a_refusal_makes_it_at_every_place,
) = as_tests(TABLE)

UPFRONT = Setting("2m", (("pinning", "upfront"),))
STORMS = [(SNP, Setting("4k")), (SNP, LARGE_PAGES), (SEV, LARGE_PAGES), (SEV, UPFRONT), (SEV_ES, LARGE_PAGES)]


@pytest.mark.parametrize(("backend", "setting"), STORMS, ids=named)
@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_lost_in_storms(backend: Backend, setting: Setting, seed: int) -> None:
    TABLE.storm(backend, seed, setting=setting)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "setting"), STORMS, ids=named)
def test_nothing_is_lost_in_many_storms(backend: Backend, setting: Setting) -> None:
    assert sum(TABLE.storm(backend, seed, setting=setting, chance=0.1) for seed in range(10, 12)) > 0
