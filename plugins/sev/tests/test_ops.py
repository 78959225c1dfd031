"""KVM's side, on stand-ins for the core: pinning, launch, private memory, conversions, errnos."""

from __future__ import annotations

import errno
import hashlib

import numpy as np
import pytest
from sev_helpers import snp_digest

from cvmcore.errors import InvariantViolation, UapiError
from cvmcore.measured import Load
from cvmcore.memory import SCRAMBLED
from cvmcore.pages import array_of, count, run
from cvmcore.types import (
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    Change,
    Exit,
    Fatal,
    HostMode,
    HostVerdict,
    Mismatch,
    Refault,
    Walk,
)
from cvmcore_sev import launch
from cvmcore_sev.errors import PageState, RmpStatus, SevStatus
from cvmcore_sev.host import SevVm, rmp_make_shared
from cvmcore_sev.hw import VMSA_GFN
from cvmcore_sev.ops import SEV, SEV_ES, SNP

K, M = PG_LEVEL_4K, PG_LEVEL_2M
S = PageState


def fails(number, call, *arguments, **keywords):
    with pytest.raises(UapiError) as error:
        call(*arguments, **keywords)
    assert error.value.errno == number, error.value


# ---- what is declared --------------------------------------------------------------------------------------------


def test_backends_share_a_vendor():
    assert {b.vendor for b in (SEV, SEV_ES, SNP)} == {"amd-sev"}
    assert [b.name for b in (SEV, SEV_ES, SNP)] == ["sev", "sev-es", "snp"]
    assert [option.name for option in SEV.options] == ["pinning", "max_asid", "min_sev_asid"]


@pytest.mark.parametrize(
    ("vm_type", "options", "capability", "value"),
    [
        ("sev", {}, "needs_pin", True),
        ("sev", {"pinning": "upfront"}, "needs_pin", False),
        ("sev-es", {}, "converts_in_place", True),
        ("sev", {}, "gmem_backed", False),
        ("sev", {}, "private_by_attribute", False),
        ("snp", {}, "private_by_attribute", True),
        ("snp", {}, "needs_accept", True),
        ("snp", {}, "zap_destroys_content", False),
        ("snp", {}, "needs_pin", False),
        ("snp", {}, "max_private_level", M),
        ("snp", {}, "fresh_is_zero", False),
        ("snp", {}, "encrypts", True),
    ],
)
def test_capabilities(rig, vm_type, options, capability, value):
    assert getattr(rig.call("capabilities", vm_type=vm_type, options=options), capability) == value


# ---- ASIDs -------------------------------------------------------------------------------------------------------


def test_asid_ranges(rig):
    assert [rig.vm(t).key for t in ("sev", "sev-es", "snp", "sev", "snp")] == [100, 1, 2, 101, 3]


@pytest.mark.parametrize(
    ("options", "vm_type", "number"),
    [
        ({}, "tdx", errno.EINVAL),
        ({"min_sev_asid": 1}, "snp", errno.ENOTTY),
        ({"min_sev_asid": 1}, "sev-es", errno.ENOTTY),
        ({"max_asid": 10, "min_sev_asid": 11}, "sev", errno.ENOTTY),
    ],
)
def test_a_vm_that_cannot_be_made(make_rig, options, vm_type, number):
    fails(number, make_rig(options=options).vm, vm_type)


def test_asids_used_up_and_reused_after_wbinvd_and_df_flush(make_rig):
    rig = make_rig(options={"max_asid": 11, "min_sev_asid": 10})
    first, second = rig.vm("sev"), rig.vm("sev")
    fails(errno.EBUSY, rig.vm, "sev")
    rig.call("launch_finish", vm=first)
    rig.end(first)
    assert rig.ops["DF_FLUSH"] == 0
    again = rig.vm("sev")
    assert (again.key, rig.ops["DF_FLUSH"]) == (first.key, 1)
    rig.call("launch_finish", vm=again)
    fails(errno.EBUSY, rig.vm, "sev")
    assert second.key == 11


def test_a_page_that_a_dead_guest_keeps_makes_its_asid_unusable(make_rig):
    rig = make_rig(options={"max_asid": 9, "min_sev_asid": 2})
    vm = rig.vm("snp")
    rig.call("launch_finish", vm=vm)
    rig.private(vm, run(0, 4), run(100, 4))
    rig.hw.rmp.lock(run(101, 1))  # gmem_invalidate will find it in use
    left = rig.call("gmem_invalidate", host=rig.host, pfns=run(100, 4))
    assert array_of(left).tolist() == [100, 102, 103]
    assert rig.host.frames.leaks[-1][1] == [101]
    rig.end(vm)
    again = rig.vm("snp")
    fails(errno.EIO, rig.call, "launch_finish", vm=again)
    assert again.arch.gctx_pfn == 0 and rig.hw.rmp.asid_pages[0] == 0


# ---- demand pinning ------------------------------------------------------------------------------------------------


def pin(rig, vm, slot, gfns, level=K):
    return rig.call("pin_pfn", vm=vm, batch=rig.batch(slot, gfns, level), write=True)


@pytest.mark.parametrize("gfns", [run(3, 9), np.array([1, 5, 6, 40])], ids=["run", "scattered"])
def test_pin_pfn_is_idempotent(rig, gfns):
    vm = rig.vm("sev")
    slot = rig.slot(vm)
    for _ in range(2):
        assert pin(rig, vm, slot, gfns) is None
        assert rig.host.frames.pins.sum() == count(gfns)
    assert (rig.host.frames.pins[array_of(slot.pfns)[array_of(gfns)]] == 1).all()
    assert rig.items["gup_pin_4k"] == count(gfns)


def test_pin_pfn_of_a_batch_equals_its_pages(make_rig):
    gfns = np.array([2, 3, 9, 30, 31])
    pins = []
    for pieces in ([gfns], [gfns[i : i + 1] for i in range(5)]):
        rig = make_rig()
        vm = rig.vm("sev")
        slot = rig.slot(vm)
        pin(rig, vm, slot, run(2, 2))
        slot.pfns = run(200, 64)
        for piece in pieces:
            pin(rig, vm, slot, piece)
        pins.append((rig.host.frames.pins.tolist(), slot.arch.pins.tolist(), dict(rig.items)))
    assert pins[0] == pins[1]


def test_a_2m_mapping_is_one_pin_at_its_head(rig):
    vm = rig.vm("sev")
    slot = rig.slot(vm, 2048, 512, run(1024, 2048))
    pin(rig, vm, slot, run(512, 2, 512), M)
    assert np.flatnonzero(rig.host.frames.pins).tolist() == list(range(1024, 2048))  # a pin holds the whole page
    assert np.flatnonzero(slot.arch.pins).tolist() == [0, 512]
    assert rig.items["cacheline_flush_4k"] == 1024
    pin(rig, vm, slot, run(513, 1))  # a 4K refault at another index adds its own
    assert np.flatnonzero(slot.arch.pins).tolist() == [0, 1, 512]


def test_a_split_mapping_whose_head_is_replaced_keeps_its_other_pages_pinned(rig):
    """The RFC would leave pages 3 to 511 mapped without a pin: the one pin was the head's."""
    vm = rig.vm("sev")
    slot = rig.slot(vm, 1024, 512, run(1024, 1024))
    pin(rig, vm, slot, run(512, 1, 512), M)
    slot.pfns = np.concatenate([np.arange(100, 103), np.arange(1027, 2048)])
    pin(rig, vm, slot, run(512, 3))
    assert rig.host.frames.pins[1024:1536].tolist() == [0] * 3 + [1] * 509
    assert rig.host.frames.pins[[100, 101, 102]].tolist() == [1, 1, 1]


def test_a_small_pin_under_a_large_mapping_gives_way(rig):
    """A head that was pinned as 4K is mapped as 2M: the pin has to hold all of it."""
    vm = rig.vm("sev")
    slot = rig.slot(vm, 1024, 512, run(1024, 1024))
    pin(rig, vm, slot, run(512, 1))
    pin(rig, vm, slot, run(512, 1, 512), M)
    assert rig.host.frames.pins[1024:1536].tolist() == [1] * 512
    assert rig.items["gup_unpin_4k"] == 1


def test_a_replaced_frame_is_flushed_and_unpinned_first(rig):
    vm = rig.vm("sev")
    slot = rig.slot(vm)
    pin(rig, vm, slot, run(0, 4))
    old = array_of(slot.pfns)[:4]
    slot.pfns = np.concatenate([old[:2], np.arange(500, 562)])
    pin(rig, vm, slot, run(0, 4))
    assert rig.host.frames.pins[old].tolist() == [1, 1, 0, 0]
    assert rig.host.frames.pins[[500, 501]].tolist() == [1, 1]
    assert rig.items["gup_unpin_4k"] == 2


def test_pin_pfn_without_metadata_bugs_the_vm(rig):
    vm = rig.vm("sev")
    slot = rig.slot(vm)
    slot.arch = None
    stopped = pin(rig, vm, slot, run(0, 1))
    assert (stopped.done, vm.dead) == (0, True) and isinstance(stopped.reason, Fatal)


def test_pins_end_with_the_slot_after_one_wbinvd(rig):
    vm = rig.vm("sev")
    slot = rig.slot(vm)
    pin(rig, vm, slot, run(0, 40))
    rig.call("memslot_free", vm=vm, slot=slot)
    assert not rig.host.frames.pins.any()
    assert (rig.ops["WBINVD"], rig.host.meter.elsewhere["wbinvd"]) == (1, 3)
    rig.call("memslot_free", vm=vm, slot=slot)
    assert rig.ops["WBINVD"] == 1


@pytest.mark.parametrize("change", [Change.MOVE, Change.FLAGS_ONLY])
def test_pins_move_with_the_slot(rig, change):
    vm = rig.vm("sev")
    slot, new = rig.slot(vm), rig.slot(rig.vm("sev"))
    pins = slot.arch
    rig.call("memslot_prepare", vm=vm, old=slot, new=new, change=change)
    assert new.arch is pins


def test_no_metadata_without_demand_pinning(rig):
    assert rig.slot(rig.vm("sev", pinning="upfront")).arch is None
    assert rig.slot(rig.vm("snp")).arch is None


# ---- pinning up front, and its account -----------------------------------------------------------------------------


@pytest.mark.parametrize("pinning", ["upfront", "demand"])
@pytest.mark.parametrize(
    ("name", "hva", "size", "number"),
    [
        ("size 0", 0x7F0000000000, 0, errno.EINVAL),
        ("negative size", 0x7F0000000000, -4096, errno.EINVAL),
        ("wraps", (1 << 64) - 4096, 8192, errno.EINVAL),
        ("> ULONG_MAX", 1 << 64, 4096, errno.EINVAL),
        ("limit", 0x7F0000000000, 101 << 12, errno.ENOMEM),
        ("limit before INT_MAX", 0, 1 << 43, errno.ENOMEM),
        ("npages > INT_MAX", 0, 1 << 43, errno.EINVAL),
    ],
)
def test_register_region_refuses(rig, pinning, name, hva, size, number):
    vm = rig.vm("sev", pinning=pinning)
    rig.slot(vm, 200)
    vm.memlock_limit = 1 << 50 if name == "npages > INT_MAX" else 100
    fails(number, rig.call, "register_region", vm=vm, hva=hva, size_bytes=size)
    assert vm.memlock == 0 and not rig.host.frames.pins.any()


def test_register_region_pins_up_front(rig):
    vm = rig.vm("sev", pinning="upfront")
    slot = rig.slot(vm)
    for _ in range(2):  # duplicates are accepted, counted and pinned twice
        rig.call("register_region", vm=vm, hva=slot.hva + 4095, size_bytes=2)
    assert vm.memlock == 4
    assert rig.host.frames.pins[array_of(slot.pfns)[:3]].tolist() == [2, 2, 0]
    assert (rig.items["gup_pin_4k"], rig.items["cacheline_flush_4k"]) == (4, 4)
    fails(errno.EINVAL, rig.call, "unregister_region", vm=vm, hva=slot.hva, size_bytes=2)
    rig.call("unregister_region", vm=vm, hva=slot.hva + 4095, size_bytes=2)
    assert (vm.memlock, rig.host.frames.pins.sum(), rig.ops["WBINVD"]) == (2, 2, 1)
    rig.end(vm)
    assert vm.memlock == 0 and not rig.host.frames.pins.any()


def test_a_short_pin_is_undone(rig):
    vm = rig.vm("sev", pinning="upfront")
    slot = rig.slot(vm)
    fails(errno.ENOMEM, rig.call, "register_region", vm=vm, hva=slot.hva, size_bytes=65 << 12)
    assert vm.memlock == 0 and not rig.host.frames.pins.any()


def test_pins_of_2m_pages_are_priced_as_such(make_rig):
    rig = make_rig(backing_level=M)
    vm = rig.vm("sev", pinning="upfront")
    slot = rig.slot(vm, 1100, pfns=run(500, 1100))
    rig.call("register_region", vm=vm, hva=slot.hva, size_bytes=1100 << 12)
    assert (rig.items["gup_pin_2m"], rig.items["gup_pin_4k"]) == (2, 1100 - 1024)
    assert rig.host.frames.pins.sum() == 1100


def test_on_demand_a_region_is_only_accounted(rig):
    vm = rig.vm("sev")
    slot = rig.slot(vm)
    rig.call("register_region", vm=vm, hva=slot.hva, size_bytes=64 << 12)
    assert vm.memlock == 64 and not rig.host.frames.pins.any()
    rig.call("unregister_region", vm=vm, hva=slot.hva + 8192, size_bytes=10 << 12)  # no matching
    assert vm.memlock == 54 and rig.ops["WBINVD"] == 0
    for hva, size in ((slot.hva, 0), (slot.hva, -4096), (-4096, 4096), ((1 << 64) - 4096, 8192)):
        fails(errno.EINVAL, rig.call, "unregister_region", vm=vm, hva=hva, size_bytes=size)
    assert vm.memlock == 54


@pytest.mark.parametrize(("vm_type", "flushes"), [("sev", 1), ("sev-es", 1), ("snp", 0)])
def test_memory_reclaimed_flushes_unless_memory_is_in_guest_memfd(rig, vm_type, flushes):
    rig.call("memory_reclaimed", vm=rig.vm(vm_type), nr_pages=3)
    assert rig.ops["WBINVD"] == flushes


# ---- intra-host migration ------------------------------------------------------------------------------------------


def test_vm_move_takes_context_pins_and_account(rig):
    source, target = rig.vm("sev", pinning="upfront"), rig.vm("sev", pinning="upfront")
    slot = rig.slot(source)
    rig.call("register_region", vm=source, hva=slot.hva, size_bytes=4096)
    rig.call("launch_finish", vm=source)
    asid = source.key
    rig.call("vm_move", source=source, target=target)
    assert (target.key, target.memlock, source.key, source.memlock) == (asid, 1, 0, 0)
    rig.end(source)
    assert rig.host.frames.pins.sum() == 1
    rig.end(target)
    assert rig.host.frames.pins.sum() == 0


@pytest.mark.parametrize(
    ("name", "types", "started", "vcpus"),
    [
        ("other type", ("sev", "sev-es"), True, (0, 0)),
        ("SNP", ("snp", "snp"), True, (0, 0)),
        ("nothing to give", ("sev", "sev"), False, (0, 0)),
        ("ES with another number of vCPUs", ("sev-es", "sev-es"), True, (1, 2)),
    ],
)
def test_vm_move_refuses(rig, name, types, started, vcpus):
    source, target = (rig.vm(t, n) for t, n in zip(types, vcpus, strict=True))
    if started:
        rig.call("launch_finish", vm=source)
    fails(errno.EINVAL, rig.call, "vm_move", source=source, target=target)
    fails(errno.EINVAL, rig.call, "vm_move", source=source, target=source)


# ---- SEV and SEV-ES launch -----------------------------------------------------------------------------------------


def update(rig, vm, slot, gfns, contents, kind="normal"):
    return rig.call("launch_update", vm=vm, batch=rig.batch(slot, gfns), contents=contents, kind=kind)


PAGES = [bytes([i]) * 4096 for i in range(1, 5)]


@pytest.mark.parametrize("pinning", ["upfront", "demand"])
@pytest.mark.parametrize("vcpus", [0, 1])
def test_sev_launch(rig, pinning, vcpus):
    vm = rig.vm("sev", vcpus, pinning=pinning)
    slot = rig.slot(vm, pfns=np.r_[200:202, 300:362])
    assert update(rig, vm, slot, run(0, 4), PAGES) is None
    assert rig.ops["LAUNCH_UPDATE_DATA"] == 2  # physically contiguous stretches
    assert rig.items["launch_update_4k"] == 4
    rig.call("launch_finish", vm=vm)
    assert vm.arch.launch_digest == hashlib.sha256(b"".join(PAGES)).digest()
    assert (rig.host.memory.read(np.array([200, 300]), vm.key) != SCRAMBLED).all()
    held = pinning == "demand"
    assert rig.host.frames.pins.sum() == (4 if held else 0)
    assert (len(vm.table) == 4) == (held and bool(vcpus))
    rig.end(vm)
    assert not rig.host.frames.pins.any()


def test_a_failed_update_leaves_no_pins(rig):
    vm = rig.vm("sev")
    slot = rig.slot(vm)
    rig.call("launch_finish", vm=vm)
    stopped = update(rig, vm, slot, run(0, 4), PAGES)
    assert (stopped.done, stopped.reason.errno) == (0, errno.EIO)
    assert not rig.host.frames.pins.any()


@pytest.mark.parametrize(
    ("vm_type", "kind"), [("sev", "zero"), ("sev", "vmsa"), ("sev-es", "secrets"), ("snp", "vmsa"), ("snp", "hashes")]
)
def test_kinds_that_a_vm_type_does_not_load(rig, vm_type, kind):
    vm = rig.vm(vm_type)
    stopped = update(rig, vm, rig.slot(vm), run(0, 1), PAGES[:1], kind)
    assert (stopped.done, stopped.reason.errno) == (0, errno.EINVAL)


def test_sev_es_measures_the_save_areas_in_vcpu_order(rig):
    vm = rig.vm("sev-es", 0)
    vm.arch.ap_eip = 0x80B004
    for i in range(2):
        vm.vcpus.append(type("V", (), {"vm": vm, "id": i, "arch": None, "state": b""})())
        rig.call("vcpu_create", vcpu=vm.vcpus[-1])
    rig.call("launch_finish", vm=vm)
    expected = launch.vmsa_pages(2, 0x80B004, signature=launch.CPUS["EPYC-Milan"], features=0)
    assert vm.arch.launch_digest == hashlib.sha256(b"".join(expected)).digest()
    fails(errno.EIO, rig.call, "launch_finish", vm=vm)


# ---- SNP launch ----------------------------------------------------------------------------------------------------


def test_snp_launch(rig):
    vm = rig.vm("snp", 2)
    slot = rig.slot(vm, base_gfn=16)
    assert not vm.pre_fault_allowed
    image = ((16, "normal", PAGES), (20, "zero", [b""] * 2), (22, "secrets", [b""]), (23, "cpuid", [b""]))
    for gfn, kind, pages in image:
        assert update(rig, vm, slot, run(gfn, len(pages)), pages, kind) is None
    rig.call("launch_finish", vm=vm)
    vmsa = [vcpu.arch.vmsa for vcpu in vm.vcpus]
    steps = [
        Load("normal", 16 << 12, 4 << 12, b"".join(PAGES)),
        Load("zero", 20 << 12, 2 << 12),
        Load("secrets", 22 << 12, 4096),
        Load("cpuid", 23 << 12, 4096),
        *(Load("vmsa", launch.VMSA_GPA, 4096, page) for page in vmsa),
    ]
    assert vm.arch.launch_digest == snp_digest(steps)
    assert vm.pre_fault_allowed and rig.hw.rmp.violations() == []
    frames = array_of(slot.pfns)[:8]
    assert (rig.hw.rmp.state(frames) == S.GUEST_VALID).all() and (rig.host.memory.key[frames] == vm.key).all()
    for vcpu in vm.vcpus:
        assert vcpu.arch.vmsa_pfn % 512 and rig.hw.rmp.vmrun(vcpu.arch.vmsa_pfn, VMSA_GFN, vm.key) == RmpStatus.OK
        rig.hw.rmp.vmexit(vcpu.arch.vmsa_pfn)
    assert (rig.ops["RMPUPDATE"], rig.ops["SNP_LAUNCH_UPDATE"]) == (1 + 8 + 2, 8 + 2)
    fails(errno.EIO, rig.call, "launch_finish", vm=vm)


@pytest.mark.parametrize("at", [0, 2])
def test_a_page_that_is_assigned_already_ends_the_update(rig, at):
    vm = rig.vm("snp")
    slot = rig.slot(vm)
    op(rig, vm, "KVM_SEV_SNP_LAUNCH_START", policy=3 << 16)
    rig.private(vm, run(at, 1), array_of(slot.pfns)[at : at + 1])
    rig.ops.clear()
    stopped = update(rig, vm, slot, run(0, 4), PAGES)
    assert (stopped.done, stopped.reason.errno) == (at, errno.EIO)
    assert rig.ops["SNP_LAUNCH_UPDATE"] == at


def test_a_refused_cpuid_page_goes_back_to_the_host(rig):
    vm = rig.vm("snp")
    slot = rig.slot(vm)
    bad = (65).to_bytes(4, "little").ljust(4096, b"\0")
    stopped = update(rig, vm, slot, run(0, 3), [bytes(4096), bad, bytes(4096)], "cpuid")
    assert (stopped.done, stopped.reason.errno) == (1, errno.EIO)
    states = rig.hw.rmp.state(array_of(slot.pfns)[:3]).tolist()
    assert states == [S.GUEST_VALID, S.HYPERVISOR, S.HYPERVISOR]
    assert (rig.ops["SNP_LAUNCH_UPDATE"], rig.ops["SNP_PAGE_RECLAIM"]) == (2, 1)
    assert rig.ops["RMPUPDATE"] == 1 + 2 + 1  # context, pages, back to shared


def test_a_failing_update_counts_as_its_pages_one_by_one(make_rig):
    counts = []
    for pieces in ([run(0, 3)], [run(0, 1), run(1, 1)]):
        rig = make_rig()
        vm = rig.vm("snp")
        slot = rig.slot(vm)
        rig.hw.rmp.lock(array_of(slot.pfns)[1:2])
        for gfns in pieces:
            update(rig, vm, slot, gfns, PAGES[gfns.start : gfns.stop])
        counts.append((dict(rig.ops), dict(rig.items), rig.host.memory.stamp[:200].tolist()))
    assert counts[0] == counts[1]


def test_a_context_that_cannot_be_made(rig, monkeypatch):
    vm = rig.vm("snp")
    monkeypatch.setattr(type(rig.hw.psp), "_is_context", lambda self, pfn: False)
    fails(errno.EIO, rig.call, "launch_finish", vm=vm)
    assert "SNP_LAUNCH_START" in rig.ops


# ---- SNP: frames become the guest's, and go back -------------------------------------------------------------------


def prepare(rig, vm, gfns, pfns, order=0):
    return rig.call("gmem_prepare", vm=vm, slot=None, gfns=gfns, pfns=pfns, max_order=order)


def test_gmem_prepare_is_idempotent(rig):
    vm = rig.vm("snp")
    for _ in range(2):
        assert prepare(rig, vm, run(7, 9), run(100, 9)) is None
    assert prepare(rig, vm, run(3, 20), run(96, 20)) is None
    assert rig.ops["RMPUPDATE"] == 20
    assert rig.hw.rmp.rmpread(run(96, 20)).gfn.tolist() == list(range(3, 23))


@pytest.mark.parametrize(
    ("name", "before", "gfns", "pfns", "order", "updates"),
    [
        ("4K folios", None, run(1024, 512), run(512, 512), 0, [512, 0]),
        ("a whole free block", None, run(1024, 1, 512), run(512, 1, 512), 9, [0, 1]),
        ("by any page of it", None, run(1030, 1), run(518, 1), 9, [0, 1]),
        ("by several", None, run(1030, 5), run(518, 5), 9, [0, 1]),
        ("two blocks", None, run(1024, 2, 512), run(512, 2, 512), 9, [0, 2]),
        ("gfn and pfn not congruent", None, run(1025, 2), run(512, 2), 9, [2, 0]),
        ("a page of the block is assigned", (5, 900), run(1030, 5), run(518, 5), 9, [5, 0]),
        ("that page itself", (5, 519), run(1030, 5), run(518, 5), 9, [4, 0]),
        ("block cut off by the end of memory", None, run(0, 3), run(8192 - 512 - 1, 3), 9, [3, 0]),
        ("one block free, one not", (5, 1100), run(1024, 1024), run(512, 1024), 9, [511, 1]),
    ],
)
def test_gmem_prepare_2m(rig, name, before, gfns, pfns, order, updates):
    vm = rig.vm("snp")
    if before:
        rig.hw.rmp.rmpupdate(run(before[1], 1), before[0], assigned=True, asid=vm.key)
    assert prepare(rig, vm, gfns, pfns, order) is None
    assert [rig.items["rmpupdate_4k"], rig.items["rmpupdate_2m"]] == updates
    assert rig.hw.rmp.assigned(pfns) is True and rig.hw.rmp.violations() == []


def test_gmem_prepare_stops_where_rmpupdate_does(rig):
    vm = rig.vm("snp")
    rig.hw.psp.snp_page_set_state(run(105, 1))
    stopped = prepare(rig, vm, run(0, 10), run(100, 10))
    assert (stopped.done, stopped.reason.errno) == (5, errno.EINVAL)
    stopped = prepare(rig, vm, run(0, 10), run(100, 10))  # the first five are skipped now
    assert stopped.done == 5


def test_gmem_prepare_is_for_snp_only(rig):
    assert prepare(rig, rig.vm("sev"), run(0, 1), run(100, 1)) is None
    assert rig.hw.rmp.nr_assigned == 0


@pytest.mark.parametrize(
    ("name", "order", "pfns", "private", "level"),
    [
        ("shared", 9, run(512, 4), False, 0),
        ("2M", 9, run(512, 512), True, M),
        ("4K", 0, run(512, 512), True, K),
        ("unassigned", None, run(512, 4), True, K),
        ("the least of a batch", 9, run(510, 4), True, K),
        ("the least, 2M first", 9, run(1022, 4), True, K),
    ],
)
def test_max_mapping_level(rig, name, order, pfns, private, level):
    vm = rig.vm("snp")
    if order is not None:
        prepare(rig, vm, run(0, 512), run(512, 512), order)
    assert rig.call("max_mapping_level", vm=vm, gfns=pfns, pfns=pfns, private=private) == level
    assert rig.call("max_mapping_level", vm=rig.vm("sev"), gfns=pfns, pfns=pfns, private=True) == 0


@pytest.mark.parametrize(
    ("name", "order", "pfns", "counts"),
    [
        ("nothing assigned", None, run(512, 8), [0, 0, 0]),
        ("4K pages", 0, run(512, 512), [512, 0, 0]),
        ("a whole 2M page", 9, run(512, 512), [0, 1, 0]),
        ("part of a 2M page", 9, run(600, 100), [100, 0, 1]),
        ("2M page and free pages", 9, run(400, 700), [0, 1, 0]),
        ("scattered pages of a 2M page", 9, np.array([515, 600, 1000]), [3, 0, 1]),
    ],
)
def test_gmem_invalidate(rig, name, order, pfns, counts):
    vm = rig.vm("snp")
    if order is not None:
        prepare(rig, vm, run(0, 512), run(512, 512), order)
    rig.items.clear()
    left = rig.call("gmem_invalidate", host=rig.host, pfns=pfns)
    assert array_of(left).tolist() == array_of(pfns).tolist()
    assert [rig.items[item] for item in ("rmpupdate_4k", "rmpupdate_2m", "psmash")] == counts
    assert rig.hw.rmp.assigned(pfns) is False and rig.hw.rmp.violations() == []
    assert not rig.host.frames.leaks


def test_gmem_invalidate_leaks_what_the_hardware_keeps(rig):
    vm = rig.vm("snp")
    prepare(rig, vm, run(0, 1024), run(512, 1024), 9)
    rig.hw.rmp.rmpupdate(run(512, 1), 0, assigned=True, asid=vm.key, level=M, immutable=True)
    left = rig.call("gmem_invalidate", host=rig.host, pfns=run(512, 1024))
    assert array_of(left).tolist() == list(range(1024, 1536))
    assert rig.host.frames.leaks[0][1] == list(range(512, 1024))


@pytest.mark.parametrize(
    ("name", "order", "zap", "smashed"),
    [("RMP 2M", 9, True, 1), ("RMP 4K: spurious", 0, False, 0), ("unassigned", None, False, 0)],
)
def test_after_fault(rig, name, order, zap, smashed):
    vm = rig.vm("snp")
    if order is not None:
        prepare(rig, vm, run(0, 512), run(512, 512), order)
    assert rig.call("after_fault", vm=vm, vcpu=None, gfns=run(3, 2), pfns=run(515, 2), level=K) == zap
    assert rig.ops["PSMASH"] == smashed
    assert rig.hw.rmp.levels(run(512, 512)) == K


def test_psmash_of_an_entry_that_stays_in_use_is_reported(rig):
    vm = rig.vm("snp")
    prepare(rig, vm, run(0, 512), run(512, 512), 9)
    rig.hw.rmp.lock(run(512, 1))
    with pytest.raises(InvariantViolation, match="in use for ever"):
        rig.call("after_fault", vm=vm, vcpu=None, gfns=run(3, 1), pfns=run(515, 1), level=K)


def test_fail_overlap_is_reported_where_the_kernel_would_spin(rig):
    vm = rig.vm("snp")
    prepare(rig, vm, run(0, 512), run(512, 512), 9)
    with pytest.raises(InvariantViolation, match="spins for ever"):
        rmp_make_shared(rig.host, run(520, 1))


# ---- what guests do ------------------------------------------------------------------------------------------------


def test_guest_accept_ends_at_the_page_that_was_validated_already(rig):
    vm = rig.vm("snp")
    prepare(rig, vm, run(0, 4), run(100, 4))
    rig.hw.rmp.pvalidate(run(102, 1), run(2, 1), asid=vm.key, validate=True)
    access = rig.call("guest_accept", vm=vm, vcpu=None, gfns=run(0, 5), pfns=run(100, 5), level=K, map_level=K)
    assert access.status.tolist() == [Walk.OK, Walk.OK, Walk.DENIED, Walk.DENIED, Walk.DENIED]
    assert rig.ops["PVALIDATE"] == 3
    assert rig.hw.rmp.state(run(100, 5)).tolist() == [S.GUEST_VALID] * 3 + [S.GUEST_INVALID, S.HYPERVISOR]


def test_guest_accept_of_a_page_that_faults(rig):
    vm = rig.vm("snp")
    prepare(rig, vm, run(0, 4), run(100, 4))
    rig.hw.rmp.rmpupdate(run(101, 1), assigned=False)
    access = rig.call("guest_accept", vm=vm, vcpu=None, gfns=run(0, 4), pfns=run(100, 4), level=K, map_level=K)
    assert access.status.tolist() == [Walk.OK, Walk.MISMATCH, Walk.OK, Walk.OK]
    assert rig.ops["PVALIDATE"] == 3  # the faulting one comes again


@pytest.mark.parametrize(
    ("rmp_order", "level", "status"),
    [(0, K, Walk.OK), (9, M, Walk.OK), (9, K, Walk.MISMATCH), (0, M, Walk.SMALLER)],
)
def test_guest_accept_by_size(rig, rmp_order, level, status):
    vm = rig.vm("snp")
    prepare(rig, vm, run(0, 512), run(512, 512), rmp_order)
    gfns, pfns = (run(0, 1, 512), run(512, 1, 512)) if level == M else (run(0, 4), run(512, 4))
    access = rig.call("guest_accept", vm=vm, vcpu=None, gfns=gfns, pfns=pfns, level=level, map_level=level)
    assert (np.broadcast_to(access.status, count(gfns)) == status).all()


def touch(rig, vm, write, private):
    gfns, pfns = run(0, 4), run(100, 4)
    return rig.call("guest_access", vm=vm, vcpu=None, gfns=gfns, pfns=pfns, level=K, write=write, private=private)


@pytest.mark.parametrize(
    ("name", "vm_type", "private", "write", "accept", "status"),
    [
        ("SNP private, validated", "snp", True, True, K, Walk.OK),
        ("SNP private, not validated", "snp", True, False, 0, Walk.UNACCEPTED),
        ("SNP shared write to its private page", "snp", False, True, K, Walk.MISMATCH),
        ("SNP shared read of its private page", "snp", False, False, K, Walk.OK),
        ("SEV guest writes a page of an SNP guest", "sev", True, True, K, Walk.MISMATCH),
        ("SEV guest reads it", "sev", True, False, K, Walk.OK),
    ],
)
def test_guest_access(rig, name, vm_type, private, write, accept, status):
    owner = rig.vm("snp")
    rig.private(owner, run(0, 4), run(100, 4), accept=accept)
    vm = owner if vm_type == "snp" else rig.vm(vm_type)
    access = touch(rig, vm, write, private)
    assert (np.broadcast_to(access.status, 4) == status).all()
    assert access.pfns == run(100, 4)


def test_guest_access_of_another_guests_page_is_a_mismatch(rig):
    rig.private(rig.vm("snp"), run(0, 4), run(100, 4), accept=K)
    access = touch(rig, rig.vm("snp"), False, True)
    assert (access.status == Walk.MISMATCH).all()


@pytest.mark.parametrize("private", [True, False])
def test_a_legacy_guest_only_tells_of_a_conversion(rig, private):
    result = rig.call("guest_convert", vm=rig.vm("sev"), vcpu=None, gfns=run(0, 9), private=private, begun=0)
    assert isinstance(result, Exit) and result.n == 9 and not rig.ops


def convert(rig, vm, gfns, private, begun=0):
    return rig.call("guest_convert", vm=vm, vcpu=None, gfns=gfns, private=private, begun=begun)


def test_to_private_the_guest_asks_first_and_validates_later(rig):
    vm = rig.vm("snp")
    asked = convert(rig, vm, run(0, 300), True)
    assert (asked.n, asked.exits) == (300, 2)
    assert (rig.ops["SNP_PSC"], rig.items["psc_entry"], rig.ops["PVALIDATE"]) == (2, 300, 0)


def test_by_the_msr_each_page_is_asked_for_by_itself(make_rig):
    rig = make_rig(options={"psc": "msr"})
    asked = convert(rig, rig.vm("snp"), run(0, 300), True)
    assert (asked.n, asked.exits) == (300, 300)
    assert (rig.ops["SNP_PSC"], rig.ops["SNP_PSC_MSR"], rig.items["psc_call"]) == (0, 300, 300)


@pytest.mark.parametrize(
    ("name", "order", "gfns", "pvalidates", "entries"),
    [
        ("4K pages", 0, run(3, 300), 300, 300),
        ("scattered", 0, np.array([3, 9, 100]), 3, 3),
        ("a 2M page", 9, run(0, 512), 1, 1),
        ("2M asked, RMP 4K", 0, run(0, 512), 1 + 512, 1),
        ("around a block, RMP 4K", 0, run(500, 524), 12 + 1 + 512, 12 + 1),
    ],
)
def test_to_shared_the_guest_rescinds_first(rig, name, order, gfns, pvalidates, entries):
    vm = rig.vm("snp")
    level = M if order else K
    rig.private(vm, run(0, 1024), run(512, 1024), order=order, map_level=level, accept=level)
    rig.ops.clear()
    result = convert(rig, vm, gfns, False)
    assert isinstance(result, Exit) and result.n == count(gfns)
    assert (rig.ops["PVALIDATE"], rig.items["psc_entry"]) == (pvalidates, entries)
    states = rig.hw.rmp.state(run(512, 1024))
    assert (states[array_of(gfns)] == S.GUEST_INVALID).all()
    assert (states == S.GUEST_VALID).sum() == 1024 - count(gfns)


@pytest.mark.parametrize(
    ("gfns", "at", "begun"), [(run(10, 20), 10, 0), (run(0, 600), 512, 512), (np.array([3, 9]), 3, 0)]
)
def test_part_of_a_2m_page_faults_in_the_rmp(rig, gfns, at, begun):
    """PVALIDATE in 4K of a 2M page is a fault (SIZEM), which is KVM's to mend; what comes before is done."""
    vm = rig.vm("snp")
    rig.private(vm, run(0, 1024), run(512, 1024), order=9, map_level=M, accept=M)
    assert convert(rig, vm, gfns, False) == Mismatch(at, begun)
    assert rig.ops["PSMASH"] == 0 and not rig.items["psc_entry"]
    assert (rig.hw.rmp.state(run(512, 1024)) == S.GUEST_INVALID).sum() == begun


def test_pages_that_are_not_mapped_are_faulted_in_first_and_the_call_goes_on_there(rig):
    vm = rig.vm("snp")
    rig.private(vm, run(0, 4), run(100, 4), accept=K)
    rig.private(vm, run(7, 1), run(107, 1), accept=K)
    rig.ops.clear()
    assert convert(rig, vm, run(0, 8), False) == Refault(4, 0, pages=3, begun=4)
    rig.private(vm, run(4, 3), run(104, 3))  # never validated: nothing to rescind
    result = convert(rig, vm, run(0, 8), False, begun=4)
    assert isinstance(result, Exit) and result.n == 8
    assert rig.ops["PVALIDATE"] == 8 and (rig.hw.rmp.state(run(100, 8)) == S.GUEST_INVALID).all()


def access(rig, pfns, write):
    return rig.call("host_access", host=rig.host, pfns=pfns, write=write, mode=HostMode.USER)


def test_host_access(rig):
    vm = rig.vm("snp")
    rig.private(vm, run(0, 4), run(100, 4), accept=K)
    assert access(rig, run(99, 4), True) == HostVerdict.OWNER_FAULT
    assert access(rig, run(90, 4), True) == HostVerdict.OK
    assert access(rig, run(99, 4), False) == HostVerdict.OK
    rig.host.memory.write(run(101, 1), 7, vm.key)
    assert access(rig, run(99, 4), False) == HostVerdict.CIPHERTEXT
    rig.host.memory.write(run(500, 1), 7, 200)
    assert access(rig, run(500, 1), True) == HostVerdict.OK  # SEV: the host may destroy it
    assert access(rig, run(500, 1), False) == HostVerdict.CIPHERTEXT


# ---- the end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vm_type", ["sev", "sev-es", "snp"])
def test_nothing_is_left_of_a_vm(rig, vm_type):
    used = rig.host.frames.used.copy()
    vm = rig.vm(vm_type, 2)
    rig.call("launch_finish", vm=vm)
    rig.end(vm)
    assert (rig.host.frames.used == used).all() and not rig.host.frames.leaks
    assert rig.hw.rmp.nr_assigned == 0 and not rig.hw.psp.guests and not rig.hw.psp.contexts
    assert rig.vendor.asids.reclaim == {vm.key}


def test_a_save_area_that_does_not_come_back_is_leaked(rig):
    vm = rig.vm("snp", 1)
    rig.call("launch_finish", vm=vm)
    pfn = vm.vcpus[0].arch.vmsa_pfn
    rig.hw.rmp.vmrun(pfn, VMSA_GFN, vm.key)
    rig.call("vcpu_free", vcpu=vm.vcpus[0])
    assert rig.host.frames.leaks[0][1] == [pfn] and vm.dead


def test_a_context_that_cannot_be_decommissioned_leaks_its_asid(rig):
    vm = rig.vm("snp")
    rig.call("launch_finish", vm=vm)
    gctx = vm.arch.gctx_pfn
    rig.hw.rmp.firmware_write(run(gctx, 1), clear_bits=1 << 14)  # somebody changed the context page
    rig.call("vm_destroy", vm=vm)
    assert rig.host.frames.leaks[0][1] == [gctx]
    assert vm.key in rig.vendor.asids.used and not rig.vendor.asids.reclaim


# ---- KVM_MEMORY_ENCRYPT_OP -----------------------------------------------------------------------------------------


def op(rig, vm, command, **arguments):
    return rig.call("memory_encrypt_op", vm=vm, command=command, arguments=arguments)


START = {"policy": 3 << 16}


@pytest.mark.parametrize(
    ("name", "vm_type", "vcpus", "before", "command", "arguments", "number"),
    [
        ("unknown id", "sev", 0, [], "KVM_SEV_DANCE", {}, errno.EINVAL),
        ("legacy command on SNP", "snp", 0, [], "KVM_SEV_LAUNCH_MEASURE", {"len": 48}, errno.EPERM),
        ("unreadable struct", "sev", 0, [], "KVM_SEV_LAUNCH_START", {}, errno.EFAULT),
        ("a field that its struct has not", "sev", 0, [], "KVM_SEV_LAUNCH_START", {"policy": 0, "polity": 0},
         errno.EFAULT),
        ("a number that is none", "sev", 0, [], "KVM_SEV_LAUNCH_START", {"policy": "0"}, errno.EFAULT),
        ("a number below 0", "sev", 0, [], "KVM_SEV_LAUNCH_UPDATE_DATA", {"uaddr": 0, "len": -1}, errno.EFAULT),
        ("a policy of 33 bits", "sev", 0, [], "KVM_SEV_LAUNCH_START", {"policy": 1 << 32}, errno.EFAULT),
        ("a received policy of 33 bits", "sev", 0, [], "KVM_SEV_RECEIVE_START", {"policy": 1 << 32, "session": b""},
         errno.EFAULT),
        ("bytes that are none", "sev", 0, [], "KVM_SEV_LAUNCH_SECRET", {"guest_uaddr": 0, "secret": 5}, errno.EFAULT),
        ("INIT of another type", "sev-es", 0, [], "KVM_SEV_INIT", {}, errno.EINVAL),
        ("INIT2 with vCPUs", "sev", 1, [], "KVM_SEV_INIT2", {}, errno.EINVAL),
        ("INIT2 twice", "sev", 0, [("KVM_SEV_INIT2", {})], "KVM_SEV_INIT2", {}, errno.EINVAL),
        ("INIT2 twice, SNP", "snp", 0, [("KVM_SEV_INIT2", {})], "KVM_SEV_INIT2", {}, errno.EPERM),
        ("INIT2 flags", "sev", 0, [], "KVM_SEV_INIT2", {"flags": 1}, errno.EINVAL),
        ("INIT2 features", "snp", 0, [], "KVM_SEV_INIT2", {"vmsa_features": 2}, errno.EINVAL),
        ("INIT2 features of plain SEV", "sev", 0, [], "KVM_SEV_INIT2", {"vmsa_features": 1}, errno.EINVAL),
        ("INIT2 ghcb_version", "snp", 0, [], "KVM_SEV_INIT2", {"ghcb_version": 3}, errno.EINVAL),
        ("INIT2 ghcb_version of plain SEV", "sev", 0, [], "KVM_SEV_INIT2", {"ghcb_version": 1}, errno.EINVAL),
        ("second start", "sev", 0, [("KVM_SEV_LAUNCH_START", {"policy": 0})], "KVM_SEV_LAUNCH_START", {"policy": 0},
         errno.EINVAL),
        ("UPDATE_DATA of no memslot", "sev", 0, [("KVM_SEV_LAUNCH_START", {"policy": 0})], "KVM_SEV_LAUNCH_UPDATE_DATA",
         {"uaddr": 0x1000, "len": 4096}, errno.EINVAL),
        ("UPDATE_VMSA without ES", "sev", 0, [], "KVM_SEV_LAUNCH_UPDATE_VMSA", {}, errno.ENOTTY),
        ("MEASURE of more than 16 KiB", "sev", 0, [], "KVM_SEV_LAUNCH_MEASURE", {"len": (16 << 10) + 1}, errno.EINVAL),
        ("MEASURE before start", "sev", 0, [], "KVM_SEV_LAUNCH_MEASURE", {"len": 48}, errno.EIO),
        ("FINISH before measure", "sev", 0, [("KVM_SEV_LAUNCH_START", {"policy": 0})], "KVM_SEV_LAUNCH_FINISH", {},
         errno.EIO),
        ("SNP start, not SNP", "sev", 0, [], "KVM_SEV_SNP_LAUNCH_START", START, errno.ENOTTY),
        ("SNP second start", "snp", 0, [("KVM_SEV_SNP_LAUNCH_START", START)], "KVM_SEV_SNP_LAUNCH_START", START,
         errno.EINVAL),
        ("SNP start flags", "snp", 0, [], "KVM_SEV_SNP_LAUNCH_START", START | {"flags": 1}, errno.EINVAL),
        ("SNP unknown policy bit", "snp", 0, [], "KVM_SEV_SNP_LAUNCH_START", {"policy": 35 << 16}, errno.EINVAL),
        ("SNP migration agent", "snp", 0, [], "KVM_SEV_SNP_LAUNCH_START", {"policy": 7 << 16}, errno.EINVAL),
        ("SNP bit 17 clear", "snp", 0, [], "KVM_SEV_SNP_LAUNCH_START", {"policy": 1 << 16}, errno.EINVAL),
        ("SNP firmware refuses", "snp", 0, [], "KVM_SEV_SNP_LAUNCH_START", {"policy": 1 << 17}, errno.EIO),
        ("SNP finish, not SNP", "sev", 0, [], "KVM_SEV_SNP_LAUNCH_FINISH", {}, errno.ENOTTY),
        ("SNP finish without context", "snp", 0, [], "KVM_SEV_SNP_LAUNCH_FINISH", {}, errno.EINVAL),
        ("SNP finish, ID block of 95 bytes", "snp", 0, [("KVM_SEV_SNP_LAUNCH_START", START)],
         "KVM_SEV_SNP_LAUNCH_FINISH", {"id_block": bytes(95), "id_auth": bytes(4096)}, errno.EFAULT),
        ("SNP finish, ID block alone", "snp", 0, [("KVM_SEV_SNP_LAUNCH_START", START)], "KVM_SEV_SNP_LAUNCH_FINISH",
         {"id_block": bytes(96)}, errno.EFAULT),
        ("SNP finish flags", "snp", 0, [("KVM_SEV_SNP_LAUNCH_START", START)], "KVM_SEV_SNP_LAUNCH_FINISH", {"flags": 1},
         errno.EINVAL),
    ],
)
def test_memory_encrypt_op_errors(rig, name, vm_type, vcpus, before, command, arguments, number):
    vm = rig.vm(vm_type, vcpus)
    for earlier, given in before:
        op(rig, vm, earlier, **given)
    fails(number, op, rig, vm, command, **arguments)


def test_memory_encrypt_op_of_a_vm_without_context(rig):
    vm = rig.vm("sev")
    vm.arch = SevVm("sev", 0, False)
    fails(errno.ENOTTY, op, rig, vm, "KVM_SEV_GUEST_STATUS")
    assert op(rig, vm, "") == {}  # a NULL argument is a probe


def test_a_sev_launch_by_ioctls(rig):
    vm = rig.vm("sev")
    slot = rig.slot(vm)
    frames = array_of(slot.pfns)
    for i, page in enumerate(PAGES):
        rig.host.memory.write(run(int(frames[i]), 1), rig.host.memory.intern(page), 0)
    op(rig, vm, "KVM_SEV_INIT2")
    assert op(rig, vm, "KVM_SEV_LAUNCH_START", policy=0) == {"handle": vm.arch.handle}
    op(rig, vm, "KVM_SEV_LAUNCH_UPDATE_DATA", uaddr=slot.hva, len=4 << 12)
    assert op(rig, vm, "KVM_SEV_LAUNCH_MEASURE", len=0) == {"len": 48, "blob": b""}
    answer = op(rig, vm, "KVM_SEV_LAUNCH_MEASURE", len=48, nonce=bytes(16))
    assert answer["len"] == 48 and answer["blob"][32:] == bytes(16)
    op(rig, vm, "KVM_SEV_LAUNCH_SECRET", guest_uaddr=slot.hva + (8 << 12), secret=b"s" * 16)
    op(rig, vm, "KVM_SEV_LAUNCH_FINISH")
    assert op(rig, vm, "KVM_SEV_GUEST_STATUS") == {"handle": vm.arch.handle, "policy": 0, "state": 3}
    assert vm.arch.launch_digest == hashlib.sha256(b"".join(PAGES)).digest()
    secret = rig.host.memory.read(frames[8:9], vm.key)
    assert rig.host.memory.bytes_of(int(secret[0]))[:16] == b"s" * 16


def test_a_secret_needs_contiguous_pages(rig):
    vm = rig.vm("sev")
    slot = rig.slot(vm, pfns=np.arange(200, 328, 2))
    fails(errno.EINVAL, op, rig, vm, "KVM_SEV_LAUNCH_SECRET", guest_uaddr=slot.hva + 4088, secret=bytes(16))


def test_update_data_with_vcpus_pins_through_the_mmu(rig):
    vm = rig.vm("sev", 1)
    slot = rig.slot(vm)
    op(rig, vm, "KVM_SEV_LAUNCH_START", policy=0)
    op(rig, vm, "KVM_SEV_LAUNCH_UPDATE_DATA", uaddr=slot.hva, len=2 << 12)
    assert sorted(vm.table) == [0, 1] and not vm.arch.early_pins
    assert np.flatnonzero(slot.arch.pins).tolist() == [0, 1]


def test_an_snp_launch_by_ioctls(rig):
    vm = rig.vm("snp", 1)
    op(rig, vm, "KVM_SEV_SNP_LAUNCH_START", **START)
    op(rig, vm, "KVM_SEV_SNP_LAUNCH_FINISH")
    assert vm.arch.finished and rig.hw.psp.asids[vm.key] == 2


def test_a_wrong_id_block_is_refused_by_the_firmware(rig):
    vm = rig.vm("snp")
    op(rig, vm, "KVM_SEV_SNP_LAUNCH_START", **START)
    block = launch.id_block(b"x" * 48, 3 << 16)
    with pytest.raises(UapiError, match=SevStatus.BAD_MEASUREMENT.name):
        op(rig, vm, "KVM_SEV_SNP_LAUNCH_FINISH", id_block=block, id_auth=bytes(4096))
