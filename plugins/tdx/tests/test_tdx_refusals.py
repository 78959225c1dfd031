"""What KVM makes of each refusal of the TDX module (tdx.md 2.3, 2.4, 5.2, 5.7, 5.8)."""

from __future__ import annotations

import errno
import functools
from typing import Any

import attrs
import pytest

from cvmcore.pages import EMPTY, count
from cvmcore.testing import refusals
from cvmcore.testing.conformance import BLOCK, Setting
from cvmcore.testing.player import Player
from cvmcore.testing.refusals import (
    DEAD,
    DEAD_LEAKS,
    GOES_ON,
    LEAKS,
    Call,
    Outcome,
    Table,
    as_tests,
)
from cvmcore_tdx.errors import Status
from cvmcore_tdx.hw import Accept, Accepted, Result
from cvmcore_tdx.ops import TDX

LARGE = Setting("2m", (("page_aug", "2m"),))


def _result(done: int, status: Any, args: tuple[Any, ...]) -> Any:
    return Result(done, status)


def _status(done: int, status: Any, args: tuple[Any, ...]) -> Any:
    return status


def _accepted(done: int, outcome: Any, args: tuple[Any, ...]) -> Any:
    return Accepted(int(outcome), args[1], EMPTY, 0, count(args[2]), args[1])


def batch(leaf: str, *elements: int) -> Call:
    """A leaf on guest memory, which answers with a `Result`."""
    return Call(leaf, leaf.lower().replace(".", "_"), Status, _result, elements)


def one(leaf: str) -> Call:
    """A leaf on a TD or a vCPU, which answers with a status."""
    return Call(leaf, leaf.lower().replace(".", "_"), Status, _status)


SEPT_ADD, SEPT_RD = batch("TDH.MEM.SEPT.ADD", 2, 3), batch("TDH.MEM.SEPT.RD", 2)
ADD, AUG = batch("TDH.MEM.PAGE.ADD", 1, 2, 3), batch("TDH.MEM.PAGE.AUG", 2, 3)
BLOCKS, UNBLOCKS = batch("TDH.MEM.RANGE.BLOCK", 2), batch("TDH.MEM.RANGE.UNBLOCK", 2)
TRACK = batch("TDH.MEM.TRACK")
REMOVE = batch("TDH.MEM.PAGE.REMOVE", 2)
DEMOTE, PROMOTE = batch("TDH.MEM.PAGE.DEMOTE", 2), batch("TDH.MEM.PAGE.PROMOTE", 2)
WBINVD, RECLAIM = batch("TDH.PHYMEM.PAGE.WBINVD", 0), batch("TDH.PHYMEM.PAGE.RECLAIM", 0)
EXTEND = batch("TDH.MR.EXTEND")
CREATE, KEY_CONFIG, ADDCX = one("TDH.MNG.CREATE"), one("TDH.MNG.KEY.CONFIG"), one("TDH.MNG.ADDCX")
INIT, FINALIZE = one("TDH.MNG.INIT"), one("TDH.MR.FINALIZE")
VP_CREATE, VP_ADDCX, VP_INIT = one("TDH.VP.CREATE"), one("TDH.VP.ADDCX"), one("TDH.VP.INIT")
ENTER, FLUSH = one("TDH.VP.ENTER"), one("TDH.VP.FLUSH")
VPFLUSHDONE, CACHE_WB, FREEID = one("TDH.MNG.VPFLUSHDONE"), one("TDH.PHYMEM.CACHE.WB"), one("TDH.MNG.KEY.FREEID")
ACCEPT_BUSY = Call(
    "TDG.MEM.PAGE.ACCEPT", "tdg_mem_page_accept", Accept, _accepted,
    fine=frozenset(set(Accept) - {Accept.BUSY}),
)  # fmt: skip
"""All else that it answers is what the entry is: the host mends a violation, the guest falls back to smaller pages."""

QUESTIONS = {
    "guest_access": "the processor's walk of the Secure EPT, an access and no call",
    "host_access": "the host's own access to memory, and no call",
    "sept_words": "what the model's checks look at; KVM has no such call",
    "td": "the TD's structures, of which KVM reads the MRTD that is in its report",
    "td_exit": "the end of TDH.VP.ENTER, when the guest comes out",
}
NEVER = {
    ("*", "TDX_GPA_RANGE_ALREADY_BLOCKED"): "not an error; of BLOCK alone, and KVM blocks nothing twice",
}


# ---- stories ----------------------------------------------------------------------------------------------------


def merged(player: Player) -> None:
    """A block that was split is merged again, and split again."""
    for _ in range(2 if player.npages > BLOCK else 0):
        player.write(range(BLOCK))
        player.convert(range(100, 103), False)
        player.write(range(99, 104))
        player.convert(range(100, 103), True)
        player.write(range(BLOCK))
        player.recover()
    player.check()


def unblocked(player: Player) -> None:
    """A table that was blocked is opened again, for a page that leaves it."""
    if player.npages < BLOCK:
        return
    player.write(range(BLOCK))
    player.convert(range(100, 103), False)
    player.convert(range(100, 103), True)
    player.write(range(BLOCK))
    player.recover()
    player.convert(range(7, 9), False)
    player.write(range(BLOCK))
    player.check()


# ---- the table --------------------------------------------------------------------------------------------------

EBUSY, EAGAIN, EIO = Outcome(errno.EBUSY), Outcome(errno.EAGAIN), Outcome(errno.EIO)
EIO_LEAKS = Outcome(errno.EIO, leaks=True)
STUCK = Outcome(errno.EIO, stuck=True)
LOST = {"run": DEAD_LEAKS, "destroy": DEAD_LEAKS}
"""KVM_BUG_ON, and the page is leaked. A page that could not be split stays as it was."""
PASSES = {"run": GOES_ON, "destroy": GOES_ON}
BUSY = Status.TDX_OPERAND_BUSY

row = functools.partial(refusals.row, setting=LARGE)


def under(**policies: str) -> Setting:
    """Large pages, and policies of the core."""
    return attrs.evolve(LARGE, policies=tuple(policies.items()))


SCAN: dict[str, Any] = {"setting": under(merge="scan"), "story": merged}
LOCKED: dict[str, Any] = {"setting": under(merge="block"), "story": unblocked}
WALKER: dict[str, Any] = {"setting": under(walker="external")}

ROWS = [
    # ---- growing: BUSY is retried in KVM while the TD runs, and an errno of the launch; the rest is KVM_BUG_ON
    row(SEPT_ADD, BUSY, {"launch": EBUSY, "run": GOES_ON}, "tdx_sept_link_private_spt: -EBUSY, so RET_PF_RETRY"),
    row(SEPT_ADD, None, {"launch": DEAD, "run": DEAD}, "tdx_sept_link_private_spt: KVM_BUG_ON, -EIO"),
    row(ADD, BUSY, {"launch": EBUSY}, "tdx_gmem_post_populate: -EBUSY, as 6.16 has it"),
    row(ADD, None, {"launch": DEAD}, "tdx_mem_page_add: KVM_BUG_ON, -EIO"),
    row(AUG, BUSY, {"run": GOES_ON}, "tdx_mem_page_aug: -EBUSY, so RET_PF_RETRY; tdx_handle_ept_violation goes on"),
    row(AUG, BUSY, {"run": GOES_ON}, "the same", times=2),
    row(AUG, None, {"run": DEAD}, "tdx_mem_page_aug: KVM_BUG_ON, -EIO"),
    # ---- shrinking must succeed: vCPUs are kicked out and it is tried once more; then the page is leaked
    row(BLOCKS, BUSY, PASSES, "tdx_sept_zap_private_spte: tdx_no_vcpus_enter_start, and once more"),
    row(BLOCKS, BUSY, LOST | {"split_private_spt": DEAD}, "tdx_sept_zap_private_spte: KVM_BUG_ON, -EIO", times=2),
    row(BLOCKS, None, LOST | {"split_private_spt": DEAD}, "tdx_sept_zap_private_spte: KVM_BUG_ON, -EIO"),
    row(TRACK, BUSY, PASSES, "tdx_track: tdx_no_vcpus_enter_start, and once more"),
    row(TRACK, BUSY, LOST, "tdx_track: KVM_BUG_ON", times=2),
    row(TRACK, None, LOST, "tdx_track: KVM_BUG_ON"),
    row(REMOVE, BUSY, PASSES, "tdx_sept_drop_private_spte: tdx_no_vcpus_enter_start, and once more"),
    row(REMOVE, BUSY, LOST, "tdx_sept_drop_private_spte: KVM_BUG_ON, -EIO, the page stays with the TD", times=2),
    row(REMOVE, None, LOST, "tdx_sept_drop_private_spte: KVM_BUG_ON, -EIO, the page stays with the TD"),
    row(DEMOTE, BUSY, {"run": GOES_ON}, "tdx_spte_demote_private_spte (RFC): tdx_no_vcpus_enter_start, and once more"),
    row(DEMOTE, None, {"run": DEAD_LEAKS},  # it stays blocked, and a second BLOCK fails
        "tdx_spte_demote_private_spte (RFC): KVM_BUG_ON, -EIO"),
    row(WBINVD, None, LOST, "tdx_sept_drop_private_spte: KVM_BUG_ON, -EIO, the page is not given back"),
    # ---- merging: it may fail
    row(PROMOTE, BUSY, {"run": GOES_ON}, "tdx_sept_merge_private_spt (2023): UNBLOCK, -EAGAIN", **SCAN),
    row(PROMOTE, Status.TDX_EPT_INVALID_PROMOTE_CONDITIONS, {"run": GOES_ON},
        "tdx_sept_merge_private_spt (2023): some pages are pending; UNBLOCK, -EAGAIN", **SCAN),
    row(PROMOTE, Status.TDX_INTERRUPTED_RESTARTABLE, {"run": GOES_ON},
        "tdx_sept_merge_private_spt (2023): again", times=3, **SCAN),
    row(PROMOTE, None, {"run": DEAD}, "tdx_sept_merge_private_spt (2023): KVM_BUG_ON, -EIO", **SCAN),
    row(UNBLOCKS, BUSY, {"run": GOES_ON}, "tdx_sept_unzap_private_spte (2023): again", **LOCKED),
    row(UNBLOCKS, BUSY, {"run": DEAD_LEAKS}, "tdx_sept_unzap_private_spte (2023): for ever", times=2, **LOCKED),
    row(UNBLOCKS, None, {"run": DEAD_LEAKS}, "tdx_sept_unzap_private_spte (2023): KVM_BUG_ON", **LOCKED),
    row(SEPT_RD, None, {"launch": EBUSY, "run": GOES_ON}, "the walk that mail 001 argues against: again", **WALKER),
    # ---- teardown: what the module keeps is leaked
    row(RECLAIM, BUSY, {"destroy": LEAKS}, "tdx_reclaim_page: pr_tdx_error, the page is leaked"),
    row(RECLAIM, None, {"destroy": LEAKS}, "tdx_reclaim_page: pr_tdx_error, the page is leaked"),
    row(FLUSH, None, {"destroy": DEAD_LEAKS}, "tdx_flush_vp_on_cpu: KVM_BUG_ON; then VPFLUSHDONE fails"),
    row(VPFLUSHDONE, None, {"destroy": DEAD_LEAKS}, "tdx_mmu_release_hkid: KVM_BUG_ON, the HKID is leaked"),
    row(CACHE_WB, Status.TDX_INTERRUPTED_RESUMABLE, {"destroy": GOES_ON}, "smp_func_do_phymem_cache_wb", times=3),
    row(CACHE_WB, None, {"destroy": DEAD_LEAKS}, "smp_func_do_phymem_cache_wb: WARN_ON_ONCE; then KEY.FREEID fails"),
    row(FREEID, None, {"destroy": DEAD_LEAKS}, "tdx_mmu_release_hkid: KVM_BUG_ON, the HKID is leaked"),
    # ---- the TD and its vCPUs
    row(CREATE, None, {"launch": EIO}, "__tdx_td_init: -EIO, all pages back"),
    row(KEY_CONFIG, None, {"launch": EIO}, "__tdx_td_init: KVM_BUG_ON, -EIO, teardown"),
    row(ADDCX, None, {"launch": EIO}, "__tdx_td_init: KVM_BUG_ON, -EIO, teardown"),
    row(INIT, Status.TDX_OPERAND_INVALID, {"launch": Outcome(errno.EINVAL)}, "__tdx_td_init: -EINVAL, user space's"),
    row(INIT, Status.TDX_RND_NO_ENTROPY, {"launch": EAGAIN}, "__tdx_td_init: -EAGAIN, after sc_retry's ten tries"),
    row(INIT, None, {"launch": EIO}, "__tdx_td_init: -EIO"),
    row(VP_CREATE, None, {"launch": EIO}, "tdx_td_vcpu_init: -EIO, all pages back"),
    row(VP_ADDCX, None, {"launch": EIO_LEAKS}, "tdx_td_vcpu_init: KVM_BUG_ON, -EIO; pages that it gave are leaked"),
    row(VP_INIT, None, {"launch": EIO_LEAKS}, "tdx_td_vcpu_init: KVM_BUG_ON, -EIO; pages that it gave are leaked"),
    row(EXTEND, BUSY, {"launch": Outcome(errno.EBUSY, stuck=True)}, "tdx_gmem_post_populate: the page is added"),
    row(EXTEND, None, {"launch": STUCK}, "tdx_gmem_post_populate: -EIO, the page is added and cannot be again"),
    row(FINALIZE, BUSY, {"launch": EBUSY}, "tdx_td_finalize: -EBUSY"),
    row(FINALIZE, None, {"launch": EIO}, "tdx_td_finalize: -EIO"),
    row(ENTER, BUSY, {"run": GOES_ON}, "tdx_exit_handlers_fastpath: enters again"),
    row(ENTER, None, {"run": DEAD}, "tdx_handle_exit: unhandled_exit; here the VM stops"),
    # ---- the guest's own
    row(ACCEPT_BUSY, None, {"run": GOES_ON}, "the guest tries again; KVM does not hear of it"),
]  # fmt: skip

TABLE = Table(
    ("cvmcore_tdx.ops",), tuple(value for value in globals().values() if isinstance(value, Call)), QUESTIONS, NEVER,
    tuple((TDX, row) for row in ROWS),
)  # fmt: skip

(
    test_every_call_and_every_status_has_a_row,
    test_a_refusal_makes_what_the_table_says,
    test_a_refusal_makes_it_at_every_place,
) = as_tests(TABLE)

STORMS = (
    Setting("4k"), under(merge="fault"), under(merge="block", walker="external"),
    under(merge="scan", mmu_lock="sharded", invalidation="flags2"),
)  # fmt: skip


@pytest.mark.parametrize("setting", STORMS, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_lost_in_storms(setting: Setting, seed: int) -> None:
    TABLE.storm(TDX, seed, setting=setting)


@pytest.mark.slow
@pytest.mark.parametrize("setting", STORMS, ids=str)
def test_nothing_is_lost_in_many_storms(setting: Setting) -> None:
    assert sum(TABLE.storm(TDX, seed, setting=setting, chance=0.1) for seed in range(10, 12)) > 0
