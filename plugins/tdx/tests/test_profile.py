"""The prices: complete, and the published chains of the cost sheet close with them."""

from __future__ import annotations

from typing import Any

import pytest

from cvmcore.cost import COMMON, Profile, load_profile
from cvmcore.pages import run
from cvmcore_tdx.cost import CHARGES
from cvmcore_tdx.ops import TDX

FREE = 400
"""What the host does to free a page after all that, ns (cost sheet, X9)."""


@pytest.fixture
def profile() -> Profile:
    return load_profile(TDX.profile, required=COMMON | CHARGES, resolve=lambda name: TDX.profile)


def test_demand_chain(profile: Profile) -> None:
    """Check 1: a 4K fault with its accept takes 7.9 us; measured in early boot: 8 us (T6)."""
    chain = ("vm_exit", "fault_fixed", "page_aug_4k", "gmem_alloc_4k", "page_clear_4k", "external_update", "accept_4k")
    ns = sum(profile.prices[item].ns for item in chain)

    assert ns == pytest.approx(7_900, rel=0.01)
    assert ns == pytest.approx(8_000, rel=0.05)


def removal_ns(profile: Profile, vcpus: int) -> float:
    """From a running TD."""
    chain = ("range_block", "mem_track", "kick_base", "page_remove", "page_wbinvd", "movdir64b_clear_4k")
    return sum(profile.prices[item].ns for item in chain) + vcpus * profile.prices["kick_per_vcpu"].ns + FREE


def test_removal_chain(profile: Profile) -> None:
    """Check 2: about 15 us with 4 vCPUs (T13: 15.3), 18 with 32 (18.4); 4.7 us after teardown (T14: 4.45 to 5.09)."""
    chain = ("page_reclaim", "page_wbinvd", "movdir64b_clear_4k")
    after_teardown = sum(profile.prices[item].ns for item in chain) + FREE

    assert removal_ns(profile, 4) == pytest.approx(15_300, rel=0.05)
    assert removal_ns(profile, 32) == pytest.approx(18_400, rel=0.05)
    assert after_teardown == pytest.approx(4_700, rel=0.01)


def test_large_accept(profile: Profile) -> None:
    """Check 5: one 2M page, faulted, cleared and accepted, beats 512 of 4K by more than ten times."""
    large = ("vm_exit", "fault_fixed", "page_aug_2m", "page_clear_2m", "external_update", "accept_2m")
    small = ("vm_exit", "fault_fixed", "page_aug_4k", "gmem_alloc_4k", "page_clear_4k", "external_update", "accept_4k")

    assert 512 * sum(profile.prices[i].ns for i in small) > 10 * sum(profile.prices[i].ns for i in large)
    assert sum(profile.prices[i].ns for i in large) == pytest.approx(350_000, rel=0.05)


def test_the_hooks_charge_these_chains(new_vm: Any, profile: Profile) -> None:
    """What the backend charges for a fault, an accept and a removal is its part of the chains."""
    vm = new_vm(vcpus=4)
    vm.link(run(0, 1), 1)
    vm.host.meter.ns = 0
    vm.fault(run(0, 1), run(1, 1))
    vm.accept(run(0, 1))
    assert vm.host.meter.ns == profile.prices["page_aug_4k"].ns + profile.prices["accept_4k"].ns

    vm.host.meter.ns = 0
    vm.zap(run(0, 1))
    assert vm.host.meter.ns == removal_ns(profile, 4) - FREE


def test_every_price_says_where_it_is_from(profile: Profile) -> None:
    """And nothing is priced here that nobody charges."""
    own = load_profile(TDX.profile, required=COMMON | CHARGES, resolve=lambda name: TDX.profile).prices

    assert all(len(own[item].source) > 15 for item in CHARGES)
    assert own["page_demote"].confidence == "high"
    assert set(own) == COMMON | CHARGES
