"""What KVM makes of each refusal of the TDX module (tdx.md 2.3, 2.4, 5.2, 5.7, 5.8)."""

from __future__ import annotations

import errno
from collections.abc import Mapping

import pytest

from cvmcore.testing.conformance import Setting
from cvmcore.testing.refusals import DEAD, DEAD_LEAKS, GOES_ON, LEAKS, Outcome, Refusal, refuse
from cvmcore_tdx.errors import Operand, Status
from cvmcore_tdx.hw import Result
from cvmcore_tdx.ops import TDX

LARGE = Setting("2m", (("page_aug", "2m"),))
BUSY_TREE = Status.TDX_OPERAND_BUSY | Operand.SEPT_TREE
BUSY = int(Status.TDX_OPERAND_BUSY)
WRONG = Status.TDX_EPT_ENTRY_STATE_INCORRECT | Operand.RCX
META = Status.TDX_PAGE_METADATA_INCORRECT | Operand.RCX


def batch(
    leaf: str, status: int, makes: Mapping[str, Outcome], elements: tuple[int, ...] = (), times: int = 1
) -> Refusal:
    """A leaf on guest memory, which answers with a `Result`."""
    operation = leaf.lower().replace(".", "_")
    says = Status(status & ~0xFFFF_FFFF).name
    return Refusal(leaf, says, operation, lambda done: Result(done, status), makes, elements, times, setting=LARGE)


def one(leaf: str, status: int, makes: Mapping[str, Outcome], times: int = 1) -> Refusal:
    """A leaf on a TD or a vCPU, which answers with a status."""
    operation = leaf.lower().replace(".", "_")
    says = Status(status & ~0xFFFF_FFFF).name
    return Refusal(leaf, says, operation, lambda done: status, makes, (), times, setting=LARGE)


EBUSY, EAGAIN, EIO = Outcome(errno.EBUSY), Outcome(errno.EAGAIN), Outcome(errno.EIO)
STUCK = Outcome(errno.EIO, stuck=True)
LOST = {"run": DEAD_LEAKS, "destroy": DEAD_LEAKS}
"""KVM_BUG_ON, and the page is leaked. A page that could not be split stays as it was."""

TABLE = [
    # ---- growing: BUSY is retried in KVM while the TD runs, and an errno of the launch; the rest is KVM_BUG_ON
    batch("TDH.MEM.SEPT.ADD", BUSY_TREE, {"launch": EBUSY, "run": GOES_ON}, (2, 3)),
    batch("TDH.MEM.SEPT.ADD", WRONG, {"launch": DEAD, "run": DEAD}, (2, 3)),
    batch("TDH.MEM.PAGE.ADD", BUSY_TREE, {"launch": EBUSY}, (1, 2, 3)),
    batch("TDH.MEM.PAGE.ADD", META, {"launch": DEAD}, (1, 2, 3)),
    batch("TDH.MEM.PAGE.AUG", BUSY_TREE, {"run": GOES_ON}, (2, 3)),
    batch("TDH.MEM.PAGE.AUG", BUSY_TREE, {"run": GOES_ON}, (2, 3), 2),
    batch("TDH.MEM.PAGE.AUG", META, {"run": DEAD}, (2, 3)),
    batch("TDH.MEM.PAGE.AUG", WRONG, {"run": DEAD}, (2, 3)),
    # ---- shrinking must succeed: vCPUs are kicked out and it is tried once more; then the page is leaked
    batch("TDH.MEM.RANGE.BLOCK", BUSY_TREE, {"run": GOES_ON, "destroy": GOES_ON}, (2,)),
    batch("TDH.MEM.RANGE.BLOCK", BUSY_TREE, LOST | {"split_private_spt": DEAD}, (2,), 2),
    batch("TDH.MEM.RANGE.BLOCK", WRONG, LOST | {"split_private_spt": DEAD}, (2,)),
    batch("TDH.MEM.TRACK", BUSY, {"run": GOES_ON, "destroy": GOES_ON}),
    batch("TDH.MEM.TRACK", Status.TDX_PREVIOUS_TLB_EPOCH_BUSY, LOST),
    batch("TDH.MEM.PAGE.REMOVE", BUSY_TREE, {"run": GOES_ON, "destroy": GOES_ON}, (2,)),
    batch("TDH.MEM.PAGE.REMOVE", BUSY_TREE, LOST, (2,), 2),
    batch("TDH.MEM.PAGE.REMOVE", Status.TDX_TLB_TRACKING_NOT_DONE | Operand.RCX,
          LOST, (2,)),
    batch("TDH.MEM.PAGE.DEMOTE", BUSY_TREE, {"run": GOES_ON}, (2,)),
    batch("TDH.MEM.PAGE.DEMOTE", WRONG, {"run": DEAD_LEAKS}, (2,)),  # it stays blocked, and a second BLOCK fails
    batch("TDH.PHYMEM.PAGE.WBINVD", META, LOST, (0,)),
    # ---- teardown: what the module keeps is leaked
    batch("TDH.PHYMEM.PAGE.RECLAIM", BUSY, {"destroy": LEAKS}, (0,)),
    batch("TDH.PHYMEM.PAGE.RECLAIM", META, {"destroy": LEAKS}, (0,)),
    one("TDH.VP.FLUSH", BUSY, {"destroy": DEAD_LEAKS}),
    one("TDH.MNG.VPFLUSHDONE", Status.TDX_FLUSHVP_NOT_DONE, {"destroy": DEAD_LEAKS}),
    one("TDH.PHYMEM.CACHE.WB", Status.TDX_INTERRUPTED_RESUMABLE, {"destroy": GOES_ON}, 3),
    one("TDH.MNG.KEY.FREEID", Status.TDX_WBCACHE_NOT_COMPLETE, {"destroy": DEAD_LEAKS}),
    # ---- the TD and its vCPUs
    one("TDH.MNG.CREATE", Status.TDX_HKID_NOT_FREE, {"launch": EIO}),
    one("TDH.MNG.KEY.CONFIG", BUSY, {"launch": EIO}),
    one("TDH.MNG.ADDCX", META, {"launch": EIO}),
    one("TDH.MNG.INIT", Status.TDX_OPERAND_INVALID | Operand.RCX, {"launch": Outcome(errno.EINVAL)}),
    one("TDH.MNG.INIT", Status.TDX_RND_NO_ENTROPY, {"launch": EAGAIN}),
    one("TDH.MNG.INIT", BUSY, {"launch": EIO}),
    one("TDH.VP.CREATE", META, {"launch": EIO}),
    one("TDH.VP.ADDCX", META, {"launch": Outcome(errno.EIO, leaks=True)}),
    one("TDH.VP.INIT", BUSY, {"launch": Outcome(errno.EIO, leaks=True)}),
    batch("TDH.MR.EXTEND", BUSY, {"launch": Outcome(errno.EBUSY, stuck=True)}),
    batch("TDH.MR.EXTEND", Status.TDX_EPT_ENTRY_NOT_PRESENT | Operand.RCX, {"launch": STUCK}),
    one("TDH.MR.FINALIZE", BUSY, {"launch": EBUSY}),
    one("TDH.MR.FINALIZE", Status.TDX_NO_VCPUS, {"launch": EIO}),
    one("TDH.VP.ENTER", BUSY, {"run": GOES_ON}),
    one("TDH.VP.ENTER", Status.TDX_TD_FATAL, {"run": DEAD}),
]


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_a_refusal_makes_what_the_table_says(row: Refusal) -> None:
    assert refuse(TDX, row) > 0
