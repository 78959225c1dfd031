"""Section 4.3 and 5.8: the life of a TD and of its key, and how its pages come back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cvmcore.memory import Memory
from cvmcore.pages import run
from cvmcore_tdx.errors import describe
from cvmcore_tdx.hw import NR_TDCX, LifeCycle, PageType, SeptState, TdxModule


def names(*statuses: int) -> list[str]:
    return [describe(status) for status in statuses]


def test_keys(new_world: Any) -> None:
    """An HKID is private, held by one TD, and programmed once per package."""
    world = new_world(hkids=range(32, 36), nr_packages=2)
    m = world.module
    create, config = m.tdh_mng_create, m.tdh_mng_key_config

    assert names(create(500, 31), create(500, 32), create(500, 36)) == ["TDX_OPERAND_INVALID|RDX"] * 3
    assert names(create(500, 33), create(501, 33), create(500, 34)) == [
        "TDX_SUCCESS", "TDX_HKID_NOT_FREE", "TDX_PAGE_METADATA_INCORRECT|RCX",
    ]  # fmt: skip
    assert names(m.tdh_mng_addcx(500, 502)) == ["TDX_TD_KEYS_NOT_CONFIGURED"]
    assert names(config(500, 0), config(500, 0), config(500, 1), config(500, 0)) == [
        "TDX_SUCCESS", "TDX_KEY_CONFIGURED", "TDX_SUCCESS", "TDX_LIFECYCLE_STATE_INCORRECT",
    ]  # fmt: skip
    assert world.module.td(500).life_cycle is LifeCycle.TD_KEYS_CONFIGURED


def test_control_pages(world: Any) -> None:
    """A TDCS has six pages, then the TD can be initialised; vCPUs likewise."""
    world.create()
    m, tdr = world.module, world.tdr

    assert names(m.tdh_mng_addcx(tdr, world.control())) == ["TDX_TDCX_NUM_INCORRECT"]
    assert names(m.tdh_mng_addcx(world.control(), 77)) == ["TDX_PAGE_METADATA_INCORRECT|RDX"]
    assert names(m.tdh_vp_create(tdr, 77)) == ["TDX_OP_STATE_INCORRECT"]
    assert names(m.tdh_mng_init(tdr, gpaw=50), m.tdh_mng_init(tdr), m.tdh_mng_init(tdr)) == [
        "TDX_OPERAND_INVALID|RDX", "TDX_SUCCESS", "TDX_OP_STATE_INCORRECT",
    ]  # fmt: skip
    assert names(m.tdh_mng_addcx(tdr, 77), m.tdh_mr_finalize(tdr)) == ["TDX_OP_STATE_INCORRECT", "TDX_NO_VCPUS"]
    assert names(m.tdh_vp_create(tdr, tdr), m.tdh_vp_create(tdr, 77)) == [
        "TDX_PAGE_METADATA_INCORRECT|RCX", "TDX_SUCCESS",
    ]  # fmt: skip
    assert names(m.tdh_vp_init(77), m.tdh_vp_enter(77), m.tdh_vp_addcx(78, 79)) == [
        "TDX_TDCX_NUM_INCORRECT", "TDX_OP_STATE_INCORRECT", "TDX_PAGE_METADATA_INCORRECT|RDX",
    ]  # fmt: skip
    for _ in range(5):
        world.ok(m.tdh_vp_addcx(77, world.control()))
    assert names(m.tdh_vp_addcx(77, 90), m.tdh_vp_init(77), m.tdh_vp_init(77)) == [
        "TDX_TDCX_NUM_INCORRECT", "TDX_SUCCESS", "TDX_VCPU_STATE_INCORRECT",
    ]  # fmt: skip
    assert names(m.tdh_mr_finalize(tdr), m.tdh_mr_finalize(tdr)) == ["TDX_SUCCESS", "TDX_OP_STATE_INCORRECT"]
    world.check()


def test_early_tdcs(world: Any) -> None:
    """Before the TDCS is complete no other leaf works on the TD."""
    m = world.module
    world.ok(m.tdh_mng_create(500, 65))
    world.ok(m.tdh_mng_key_config(500))
    for i in range(NR_TDCX - 1):
        world.ok(m.tdh_mng_addcx(500, 501 + i))

    assert names(m.tdh_mng_init(500)) == ["TDX_TDCS_NOT_ALLOCATED"]


def test_teardown(new_world: Any) -> None:
    """Flush the vCPUs, block the TD, write back every package, free the key, reclaim pages, the TDR last."""
    world = new_world(nr_packages=2).run(nr_vcpus=2)
    m, tdr = world.module, world.tdr
    world.map(run(0, 3), run(60, 3))
    first, second = world.tdvprs
    world.ok(m.tdh_vp_enter(first))
    m.td_exit(first)

    assert names(m.tdh_mng_vpflushdone(tdr), m.tdh_vp_flush(first), m.tdh_mng_vpflushdone(tdr)) == [
        "TDX_FLUSHVP_NOT_DONE", "TDX_SUCCESS", "TDX_FLUSHVP_NOT_DONE",
    ]  # fmt: skip
    assert names(m.tdh_vp_flush(first), m.tdh_vp_flush(second)) == ["TDX_VCPU_NOT_ASSOCIATED", "TDX_SUCCESS"]
    assert names(m.tdh_mng_key_freeid(tdr), m.tdh_mng_vpflushdone(tdr)) == [
        "TDX_LIFECYCLE_STATE_INCORRECT", "TDX_SUCCESS",
    ]  # fmt: skip
    assert names(
        m.tdh_mem_page_remove(tdr, 0, run(0, 1)).status, m.tdh_vp_enter(first), m.tdh_vp_flush(first)
    ) == ["TDX_TD_KEYS_NOT_CONFIGURED"] * 3
    assert names(m.tdh_mng_key_freeid(tdr), m.tdh_phymem_page_reclaim(run(60, 1)).status) == [
        "TDX_WBCACHE_NOT_COMPLETE", "TDX_LIFECYCLE_STATE_INCORRECT",
    ]  # fmt: skip
    m.interrupt_pending = True
    assert names(m.tdh_phymem_cache_wb(0), m.tdh_phymem_cache_wb(0), m.tdh_phymem_cache_wb(0)) == [
        "TDX_INTERRUPTED_RESUMABLE", "TDX_SUCCESS", "TDX_NO_HKID_READY_TO_WBCACHE",
    ]  # fmt: skip
    assert names(m.tdh_mng_key_freeid(tdr), m.tdh_phymem_cache_wb(1), m.tdh_mng_key_freeid(tdr)) == [
        "TDX_WBCACHE_NOT_COMPLETE", "TDX_SUCCESS", "TDX_SUCCESS",
    ]  # fmt: skip

    assert names(m.tdh_phymem_page_reclaim(run(tdr, 1)).status) == ["TDX_TD_ASSOCIATED_PAGES_EXIST"]
    owned = [pfn for pfn in range(1, 1 << 15) if m.page_type(pfn)[0] is not PageType.PT_NDA and pfn != tdr]
    result = m.tdh_phymem_page_reclaim(np.array([*owned, tdr]))
    assert (result.done, describe(result.status)) == (len(owned) + 1, "TDX_SUCCESS")
    assert not np.count_nonzero(m.pamt[0])
    assert not m.tds
    assert names(m.tdh_vp_enter(first), m.tdh_mr_finalize(tdr)) == [
        "TDX_PAGE_METADATA_INCORRECT|RCX", "TDX_PAGE_METADATA_INCORRECT|RCX",
    ]  # fmt: skip
    new_tdr = world.tdr = world.control()
    world.ok(m.tdh_mng_create(new_tdr, 65))  # number and HKID are free again


def test_reclaim_refuses(world: Any) -> None:
    """Free and reserved frames, unaligned large pages, frames that are not there; it stops at the first."""
    world.run()
    world.tables(1024, 2)
    world.map(run(1024, 1), run(1024, 1), level=1)
    world.map(run(0, 2), run(60, 2))
    world.end()
    reclaim = world.module.tdh_phymem_page_reclaim

    assert names(reclaim(run(90, 1)).status) == ["TDX_PAGE_METADATA_INCORRECT|RCX"]
    assert names(reclaim(run(1025, 1)).status) == ["TDX_OPERAND_INVALID|RCX"]
    assert names(reclaim(run(1 << 30, 1)).status) == ["TDX_OPERAND_ADDR_RANGE_ERROR|RCX"]
    result = reclaim(np.array([60, 1024, 61, 60, 62]))
    assert (result.done, describe(result.status)) == (3, "TDX_PAGE_METADATA_INCORRECT|RCX")
    assert world.module.nr_large == [0, 0, 0]


def test_two_tds(new_world: Any) -> None:
    """A physical page is in one TD at one GPA only."""
    world = new_world().run()
    other = new_world()
    other.memory, other.module, other.next_control = world.memory, world.module, 1 << 13
    other.create(66)
    other.ok(other.module.tdh_mng_init(other.tdr))
    other.vcpu()
    other.tables(0)
    other.ok(other.module.tdh_mr_finalize(other.tdr))
    world.map(run(0, 4), run(60, 4))

    stolen = other.module.tdh_mem_page_aug(other.tdr, 0, run(0, 4), run(58, 4))
    again = world.module.tdh_mem_page_aug(world.tdr, 0, run(8, 1), run(60, 1))

    assert (stolen.done, describe(stolen.status)) == (2, "TDX_PAGE_METADATA_INCORRECT|R8")
    assert describe(again.status) == "TDX_PAGE_METADATA_INCORRECT|R8"
    assert world.module.page_type(60) == (PageType.PT_REG, 1, 0)
    assert world.module.page_type(58) == (PageType.PT_REG, 2, 0)
    world.check()


@pytest.mark.parametrize(("nr_frames", "hkids"), [(0, range(2)), (1 << 28, range(2)), (8, range(1))])
def test_impossible_modules(nr_frames: int, hkids: range) -> None:
    """More frames than an entry can name, or no key for a TD: ValueError."""
    with pytest.raises(ValueError):
        TdxModule(Memory(8), nr_frames, hkids=hkids)


def test_state_counts(world: Any) -> None:
    """How many entries are in which state, for people."""
    world.run()
    world.map(run(0, 3), run(60, 3))
    world.aug(run(5, 2), run(70, 2))
    world.block(run(1, 1))

    assert world.td.state_counts(0) == {SeptState.BLOCKED: 1, SeptState.PENDING: 2, SeptState.MAPPED: 2}
    assert world.td.state_counts(1) == {SeptState.NL_MAPPED: 1}
