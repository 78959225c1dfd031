"""What KVM makes of each refusal of EL2 (pkvm.md 3, 4 and 8)."""

from __future__ import annotations

import errno
from collections.abc import Mapping

import pytest

from cvmcore.testing.conformance import Setting
from cvmcore.testing.refusals import DEAD, DEAD_LEAKS, LARGE_PAGES, LEAKS, Outcome, Refusal, refuse
from cvmcore_pkvm.errors import Errno
from cvmcore_pkvm.hw import Result
from cvmcore_pkvm.ops import PKVM

SHARED = Setting("2m", (("protected", "no"),))
"""Non-protected VMs: pages and blocks are shared with the guest, and unshared."""


def hcall(
    name: str, status: Errno, makes: Mapping[str, Outcome], elements: tuple[int, ...] = (),
    setting: Setting = LARGE_PAGES,
) -> Refusal:  # fmt: skip
    """A hypercall of the host, by its kernel name."""
    operation = NAMES.get(name, name.removeprefix("__pkvm_").removesuffix("_guest_"))
    return Refusal(
        name, status.name, operation, lambda done: Result(status, done), makes, elements, setting=setting
    )


NAMES = {
    "__pkvm_reclaim_dying_guest_page": "host_reclaim_guest", "__pkvm_host_relax_perms_guest": "relax_perms",
}  # fmt: skip


def says(number: int) -> Outcome:
    """KVM_RUN, or the call, ends with an errno; a second try works."""
    return Outcome(number)


DYING = Outcome(0, dead=True, leaks=True)

TABLE = [
    # ---- the VM: made at the first run, whose errno it is
    hcall("__pkvm_reserve_vm", Errno.ENOMEM, {"launch": says(errno.ENOMEM)}),
    hcall("__pkvm_host_share_hyp", Errno.EPERM, {"launch": says(errno.EPERM)}),
    hcall("__pkvm_init_vm", Errno.ENOMEM, {"run": says(errno.ENOMEM)}),
    hcall("__pkvm_init_vcpu", Errno.ENOMEM, {"run": says(errno.ENOMEM)}),
    hcall("__pkvm_init_vcpu", Errno.EBUSY, {"run": says(errno.EBUSY)}),
    hcall("__pkvm_vcpu_load", Errno.EINVAL, {"run": DEAD}),
    # ---- faults: unpinned and uncharged, and KVM_RUN says why
    hcall("__pkvm_host_donate_guest", Errno.EPERM, {"run": says(errno.EPERM)}, (1, 2)),
    hcall("__pkvm_host_donate_guest", Errno.ENOMEM, {"run": says(errno.ENOMEM)}, (1, 2)),
    hcall("__pkvm_host_share_guest", Errno.EPERM, {"run": says(errno.EPERM)}, (1, 2), SHARED),
    hcall("__pkvm_host_share_guest", Errno.EBUSY, {"run": says(errno.EBUSY)}, (1, 2), SHARED),
    hcall("__pkvm_host_unshare_guest", Errno.EPERM, {"run": DEAD_LEAKS, "destroy": DYING}, (1,), SHARED),
    # ---- teardown: what EL2 keeps is leaked
    hcall("__pkvm_start_teardown_vm", Errno.EINVAL, {"destroy": DYING}),
    hcall("__pkvm_reclaim_dying_guest_page", Errno.EPERM, {"destroy": LEAKS}, (1,)),
    hcall("__pkvm_finalize_teardown_vm", Errno.EINVAL, {"destroy": LEAKS}),
    hcall("__pkvm_host_unshare_hyp", Errno.EBUSY, {"destroy": LEAKS}),
]


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_a_refusal_makes_what_the_table_says(row: Refusal) -> None:
    assert refuse(PKVM, row) > 0
