"""The state machine of the UAPI on a TD of large pages, with a recovery thread and splits among its rules."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from cvmcore.testing.machine import BURST, UapiMachine, action
from cvmcore.types import PG_LEVEL_2M, PG_LEVEL_4K
from cvmcore_tdx.ops import TDX


class Merging(UapiMachine):
    """Small pages are split, merged and blocked while everything else happens."""

    backend: ClassVar[Any] = TDX

    @action(nr=range(1, 5))
    def recover(self, nr: int) -> None:
        """A pass of the recovery thread, or none where the policy has none."""
        with self.call("recover"):
            self.vm.recover_huge_pages(nr)

    @action(pick=range(4))
    def split(self, pick: int) -> None:
        """What logging would do to private pages."""
        slots = [slot for slot in self.vm.slots if slot.gmem is not None]
        if slots and not self.vm.dead:
            with self.call("split"):
                self.vm.split_private_pages(slots[pick % len(slots)])


@pytest.mark.parametrize(("merge", "walker"), [("scan", "mirror"), ("fault", "mirror"), ("block", "mirror"),
                                               ("block", "external")])  # fmt: skip
def test_anything_goes(merge: str, walker: str) -> None:
    """Content is kept, and every invariant holds after each call; nothing is left at the end."""

    class Bound(Merging):
        host_options: ClassVar[dict[str, Any]] = {
            "backing": "2m", "options": {"page_aug": "2m"}, "policies": {"merge": merge, "walker": walker},
        }  # fmt: skip

    run_state_machine_as_test(Bound, settings=settings(
        max_examples=6, stateful_step_count=-(-30 // BURST), deadline=None, suppress_health_check=list(HealthCheck),
        derandomize=True, database=None, print_blob=False, phases=(Phase.explicit, Phase.generate),
    ))  # fmt: skip


def test_a_page_that_cannot_be_split_stays_large() -> None:
    """Dirty logging splits what it can (kernel: kvm_mmu_try_split_huge_pages): a failure is no error of the call."""

    class Bound(Merging):
        host_options: ClassVar[dict[str, Any]] = {"backing": "2m", "options": {"page_aug": "2m"}}

    machine = Bound()
    machine.accept_block(block=0, vcpu=0)
    machine.write(gfns=[0], private=True, vcpu=0)
    root = machine.vm.tdp.root_for(True)
    assert root.level_at(0) == PG_LEVEL_2M
    machine.injector.aim("split_private_spt")

    machine.split(pick=0)

    assert machine.injector.fired == "split_private_spt"
    assert root.level_at(0) == PG_LEVEL_2M
    machine.split(pick=0)
    assert root.level_at(0) == PG_LEVEL_4K
    machine.teardown()
