"""What KVM makes of each refusal of the RMP and of the firmware (sev.md 3, 5 and 8)."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

import attrs
import pytest

from cvmcore.backend import Backend
from cvmcore.testing.conformance import BLOCK, Setting
from cvmcore.testing.player import Player
from cvmcore.testing.refusals import DEAD_LEAKS, GOES_ON, LEAKS, Outcome, Refusal, refuse
from cvmcore_sev.errors import RmpStatus, SevStatus
from cvmcore_sev.hw import Command, Progress
from cvmcore_sev.ops import SEV, SEV_ES, SNP

EIO, EINVAL, ENOTTY = Outcome(errno.EIO), Outcome(errno.EINVAL), Outcome(errno.ENOTTY)
ONE_ASID = Setting("4k", (("min_sev_asid", "2"),))


def rmp(name: str, status: RmpStatus, makes: Mapping[str, Outcome], times: int = 1) -> Refusal:
    """An instruction of the RMP, on pages."""
    elements = (0,) if name == "PSMASH" else (0, 1)
    operation = f"rmp.{name.lower()}"
    return Refusal(name, status.name, operation, lambda done: Progress(done, status), makes, elements, times)


def pages(name: str, status: SevStatus, makes: Mapping[str, Outcome], element: int) -> Refusal:
    """A firmware command, made for each page."""
    return Refusal(name, status.name, f"psp.{name.lower()}", lambda done: Command(done, status), makes, (element,))


def command(name: str, status: SevStatus, makes: Mapping[str, Outcome], *more: Any, **where: Any) -> Refusal:
    """A firmware command for a guest; more: what it answers beside the status."""
    answer: Any = (status, *more) if more else status
    return Refusal(name, status.name, f"psp.{name.lower()}", lambda done: answer, makes, **where)


def hole(player: Player) -> None:
    """A part of a 2M page is punched out."""
    player.write(range(BLOCK))
    player.punch(range(10, 20))
    player.write(range(BLOCK))
    player.check()


REFUSED = {"call 1": ENOTTY, "launch": EIO, "gmem_prepare": EINVAL, "gmem_invalidate": LEAKS, "vcpu_free": DEAD_LEAKS,
           "vm_destroy": LEAKS}  # fmt: skip
"""What comes of an RMPUPDATE that fails: of the launch's, of a fault's, of those that take pages back."""

SNP_TABLE = [
    rmp("RMPUPDATE", RmpStatus.FAIL_PERMISSION, REFUSED),
    rmp("RMPUPDATE", RmpStatus.FAIL_INUSE, REFUSED),
    rmp("RMPUPDATE", RmpStatus.FAIL_OVERLAP, {"launch": GOES_ON, "run": GOES_ON, "destroy": GOES_ON}, 5),
    rmp("PSMASH", RmpStatus.FAIL_INUSE, {"run": GOES_ON, "destroy": GOES_ON}, 5),
    rmp("PSMASH", RmpStatus.FAIL_PERMISSION, {"run": GOES_ON}),
    attrs.evolve(rmp("PSMASH", RmpStatus.FAIL_PERMISSION, {"gmem_invalidate": LEAKS}), story=hole),
    command("SNP_GCTX_CREATE", SevStatus.INVALID_PAGE_STATE, {"launch": ENOTTY}),
    command("SNP_LAUNCH_START", SevStatus.POLICY_FAILURE, {"launch": EIO}),
    command("SNP_ACTIVATE", SevStatus.INVALID_CONFIG, {"launch": EIO}),
    pages("SNP_LAUNCH_UPDATE", SevStatus.INVALID_PAGE_STATE, {"launch": EIO}, 1),
    pages("SNP_LAUNCH_UPDATE", SevStatus.INVALID_PAGE_OWNER, {"launch": EIO}, 1),
    command("SNP_LAUNCH_FINISH", SevStatus.INVALID_GUEST_STATE, {"launch": EIO}),
    command("SNP_DECOMMISSION", SevStatus.INVALID_GUEST, {"destroy": LEAKS}),
    pages("SNP_PAGE_RECLAIM", SevStatus.INVALID_PAGE_STATE, {"destroy": LEAKS}, 0),
    command("DF_FLUSH", SevStatus.INVALID_PLATFORM_STATE, {"launch": Outcome(errno.EBUSY)}, earlier=True,
            setting=ONE_ASID),
]  # fmt: skip

SEV_TABLE = [
    command("LAUNCH_START", SevStatus.RESOURCE_LIMIT, {"launch": EIO}, 0),
    command("ACTIVATE", SevStatus.ASID_OWNED, {"launch": EIO}),
    command("LAUNCH_UPDATE_DATA", SevStatus.INVALID_GUEST_STATE, {"launch": EIO}),
    command("LAUNCH_MEASURE", SevStatus.INVALID_GUEST_STATE, {"launch": EIO}, 0),
    command("LAUNCH_FINISH", SevStatus.INVALID_GUEST_STATE, {"launch": EIO}),
    command("DEACTIVATE", SevStatus.INVALID_GUEST, {"destroy": GOES_ON}),
    command("DECOMMISSION", SevStatus.INVALID_GUEST, {"destroy": GOES_ON}),
]
ES_TABLE = [command("LAUNCH_UPDATE_VMSA", SevStatus.INVALID_GUEST_STATE, {"launch": EIO})]


@pytest.mark.parametrize(
    ("backend", "row"),
    [(SNP, row) for row in SNP_TABLE] + [(SEV, row) for row in SEV_TABLE] + [(SEV_ES, row) for row in ES_TABLE],
    ids=lambda one: one.name if isinstance(one, Backend) else str(one),
)  # fmt: skip
def test_a_refusal_makes_what_the_table_says(backend: Backend, row: Refusal) -> None:
    assert refuse(backend, row) > 0
