"""The secure processor against the reference's tables: failure order, state machines, ASIDs, page states."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from sev_helpers import NR_FRAMES, hardware, make, snapshot

from cvmcore.memory import SCRAMBLED
from cvmcore.pages import run
from cvmcore.types import PG_LEVEL_2M, PG_LEVEL_4K
from cvmcore_sev.errors import AsidState, PageState, PageType, SevGuestState, SevStatus, SnpGuestState
from cvmcore_sev.hw import P384_BASE, extend_launch_digest, multiply_p384

S, T = PageState, SevStatus
K, M = PG_LEVEL_4K, PG_LEVEL_2M
POLICY = 3 << 16
GCTX = 4000


def snp_guest(hw, asid=1, gctx=GCTX, policy=POLICY, *, state="LAUNCH"):
    """A guest context in a state: CONTEXT (not started), LAUNCH (not activated), ACTIVE or RUNNING."""
    make(hw, S.CONTEXT, gctx)
    if state == "CONTEXT":
        return
    assert hw.psp.snp_launch_start(gctx, policy) == T.SUCCESS
    if state != "LAUNCH":
        assert hw.psp.snp_activate(gctx, asid) == T.SUCCESS
    if state == "RUNNING":
        assert hw.psp.snp_launch_finish(gctx) == T.SUCCESS


def sev_guest(hw, asid=200, policy=0, *, state="LUPDATE"):
    status, handle = hw.psp.launch_start(policy)
    assert status == T.SUCCESS
    if asid:
        assert hw.psp.activate(handle, asid) == T.SUCCESS
    if state in ("LSECRET", "RUNNING"):
        assert hw.psp.launch_measure(handle, 48)[0] == T.SUCCESS
    if state == "RUNNING":
        assert hw.psp.launch_finish(handle) == T.SUCCESS
    return handle


# ---- SEV and SEV-ES --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["LUPDATE", "LSECRET", "RUNNING"])
@pytest.mark.parametrize(
    ("name", "command", "allowed"),
    [
        ("LAUNCH_UPDATE_DATA", lambda psp, h: psp.launch_update_data(h, 0x5000, 4096), "LUPDATE"),
        ("LAUNCH_MEASURE", lambda psp, h: psp.launch_measure(h, 48)[0], "LUPDATE"),
        ("LAUNCH_SECRET", lambda psp, h: psp.launch_secret(h, 0x5000, bytes(16)), "LSECRET"),
        ("LAUNCH_FINISH", lambda psp, h: psp.launch_finish(h), "LSECRET"),
    ],
)
def test_launch_commands_by_state(name, command, allowed, state):
    hw = hardware()
    handle = sev_guest(hw, state=state)
    assert command(hw.psp, handle) == (T.SUCCESS if state == allowed else T.INVALID_GUEST_STATE)
    assert command(hw.psp, handle + 1) == T.INVALID_GUEST


def test_states_of_a_launch():
    hw = hardware()
    seen = []
    handle = sev_guest(hw)
    for step in (lambda: None, lambda: hw.psp.launch_measure(handle, 48), lambda: hw.psp.launch_finish(handle)):
        step()
        seen.append(hw.psp.guest_status(handle)[1])
    assert seen == [SevGuestState.LUPDATE, SevGuestState.LSECRET, SevGuestState.RUNNING]
    assert hw.psp.guest_status(99)[1] == SevGuestState.INVALID


@pytest.mark.parametrize(
    ("name", "paddr", "length", "status"),
    [
        ("paddr not 16 aligned", 0x5008, 16, T.INVALID_ADDRESS),
        ("address before length", 0x5008, 0, T.INVALID_ADDRESS),
        ("past memory", 1 << 40, 16, T.INVALID_ADDRESS),
        ("below memory", -16, 16, T.INVALID_ADDRESS),
        ("length 0", 0x5000, 0, T.INVALID_LENGTH),
        ("length below 0", 0x5000, -16, T.INVALID_LENGTH),
        ("length not a multiple of 16", 0x5000, 17, T.INVALID_LENGTH),
        ("up to the end of memory", NR_FRAMES * 4096 - 32, 32, T.SUCCESS),
        ("past its end", NR_FRAMES * 4096 - 32, 48, T.INVALID_ADDRESS),
        ("ok", 0x5000, 16, T.SUCCESS),
    ],
)
def test_launch_update_data(name, paddr, length, status):
    hw = hardware()
    assert hw.psp.launch_update_data(sev_guest(hw), paddr, length) == status


def test_launch_update_data_of_an_inactive_guest_and_of_a_guests_page():
    hw = hardware()
    assert hw.psp.launch_update_data(sev_guest(hw, asid=0), 0x5008, 16) == T.INACTIVE
    make(hw, S.GUEST_VALID, 5, gfn=1)
    assert hw.psp.launch_update_data(sev_guest(hw), 0x5000, 16) == T.INVALID_PAGE_STATE


def test_launch_update_data_measures_and_encrypts_in_place():
    hw = hardware()
    handle = sev_guest(hw, asid=200)
    pages = [bytes([i]) * 4096 for i in (1, 2, 3)]
    for i, page in enumerate(pages):
        hw.memory.write(run(5 + i, 1), hw.memory.intern(page), 0)
    assert hw.psp.launch_update_data(handle, 0x5000, 2 * 4096) == T.SUCCESS
    assert hw.psp.launch_update_data(handle, 0x7000, 4096) == T.SUCCESS
    assert hw.psp.launch_digest(handle) == hashlib.sha256(b"".join(pages)).digest()
    assert (hw.memory.read(run(5, 3), 0) == SCRAMBLED).all()
    assert hw.memory.bytes_of(int(hw.memory.read(run(6, 1), 200)[0])) == pages[1]


@pytest.mark.parametrize(
    ("name", "policy", "asid", "length", "status"),
    [
        ("length before all", 4, 0, 4095, T.INVALID_LENGTH),
        ("no SEV-ES guest", 0, 200, 4096, T.UNSUPPORTED),
        ("ES before active", 0, 0, 4096, T.UNSUPPORTED),
        ("not active", 4, 0, 4096, T.INACTIVE),
        ("ok", 4, 50, 4096, T.SUCCESS),
    ],
)
def test_launch_update_vmsa(name, policy, asid, length, status):
    hw = hardware()
    assert hw.psp.launch_update_vmsa(sev_guest(hw, asid, policy), 0x5000, length) == status


def test_launch_measure_tells_the_length_that_it_needs():
    hw = hardware()
    handle = sev_guest(hw)
    assert hw.psp.launch_measure(handle, 47) == (T.INVALID_LENGTH, 48)
    status, blob = hw.psp.launch_measure(handle, 48, bytes(16))
    assert status == T.SUCCESS and len(blob) == 48 and blob[32:] == bytes(16)


@pytest.mark.parametrize(
    ("paddr", "secret", "status"),
    [
        (0x5001, bytes(16), T.INVALID_ADDRESS),
        (0x5000, b"", T.INVALID_LENGTH),
        (0x5000, bytes(15), T.INVALID_LENGTH),
        (0x5FF0, b"s" * 32, T.SUCCESS),
    ],
)
def test_launch_secret(paddr, secret, status):
    hw = hardware()
    handle = sev_guest(hw, state="LSECRET")
    hw.memory.write(run(5, 2), hw.memory.intern(b"g" * 4096), 200)
    assert hw.psp.launch_secret(handle, paddr, secret) == status
    if status == T.SUCCESS:
        first, second = (hw.memory.bytes_of(s) for s in hw.memory.read(run(5, 2), 200).tolist())
        assert (first[-17:], second[:17]) == (b"g" + b"s" * 16, b"s" * 16 + b"g")


# ---- ASIDs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asid", "policy", "status"),
    [
        ("0", 0, 0, T.INVALID_ASID),
        ("above the machine's", 510, 0, T.INVALID_ASID),
        ("owned", 201, 0, T.ASID_OWNED),
        ("SEV in the ES range", 99, 0, T.INVALID_ASID),
        ("ES in the SEV range", 100, 4, T.INVALID_ASID),
        ("SEV", 100, 0, T.SUCCESS),
        ("ES", 99, 4, T.SUCCESS),
    ],
)
def test_activate(name, asid, policy, status):
    hw = hardware()
    sev_guest(hw, 201)
    assert hw.psp.activate(sev_guest(hw, 0, policy), asid) == status


def test_an_active_guest_cannot_be_activated_again_or_decommissioned():
    hw = hardware()
    handle = sev_guest(hw, 200)
    assert hw.psp.activate(handle, 201) == T.ACTIVE
    assert hw.psp.decommission(handle) == T.ACTIVE
    assert hw.psp.deactivate(handle) == T.SUCCESS
    assert hw.psp.deactivate(handle) == T.INACTIVE
    assert hw.psp.decommission(handle) == T.SUCCESS
    assert hw.psp.decommission(handle) == hw.psp.deactivate(handle) == hw.psp.activate(handle, 1) == T.INVALID_GUEST


def test_the_asid_of_a_guest_that_ran_is_dirty_until_wbinvd_and_df_flush():
    hw = hardware()
    handle = sev_guest(hw, 200, state="RUNNING")
    hw.psp.deactivate(handle)
    assert hw.psp.asids[200] == AsidState.DIRTY
    other = sev_guest(hw, 0)
    assert hw.psp.activate(other, 200) == T.DFFLUSH_REQUIRED
    assert hw.psp.df_flush() == T.WBINVD_REQUIRED
    hw.psp.wbinvd()
    assert hw.psp.df_flush() == T.SUCCESS
    assert hw.psp.activate(other, 200) == T.SUCCESS


def test_the_asid_of_a_guest_that_never_ran_is_clean():
    hw = hardware()
    hw.psp.deactivate(sev_guest(hw, 200))
    assert hw.psp.activate(sev_guest(hw, 0), 200) == T.SUCCESS


def test_asid_ranges_of_the_machine_are_checked():
    with pytest.raises(ValueError):
        hardware(max_asid=2000)


# ---- SNP: contexts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "level", "status"),
    [(s, K, T.SUCCESS if s == S.FIRMWARE else T.INVALID_PAGE_STATE) for s in S if s != S.DEFAULT]
    + [(S.FIRMWARE, M, T.INVALID_PAGE_SIZE)],
)
def test_gctx_create(state, level, status):
    hw = hardware()
    make(hw, state, 512, gfn=5 if state not in (S.FIRMWARE, S.CONTEXT) else 0, level=level)
    assert hw.psp.snp_gctx_create(512) == status
    if status == T.SUCCESS:
        assert hw.rmp.state(run(512, 1))[0] == S.CONTEXT


@pytest.mark.parametrize("state", ["none", "CONTEXT", "LAUNCH", "ACTIVE", "RUNNING"])
@pytest.mark.parametrize(
    ("command", "allowed"),
    [
        (lambda psp: psp.snp_launch_start(GCTX, POLICY), {"CONTEXT": T.SUCCESS}),
        (lambda psp: psp.snp_activate(GCTX, 1), {"LAUNCH": T.SUCCESS, "ACTIVE": T.ASID_OWNED, "RUNNING": T.ASID_OWNED}),
        (lambda psp: psp.snp_launch_finish(GCTX), {"ACTIVE": T.SUCCESS, "LAUNCH": T.INACTIVE}),
        (lambda psp: psp.snp_decommission(GCTX), dict.fromkeys(("CONTEXT", "LAUNCH", "ACTIVE", "RUNNING"), T.SUCCESS)),
    ],
)
def test_snp_commands_by_state(command, allowed, state):
    hw = hardware()
    if state != "none":
        snp_guest(hw, state=state)
    expected = allowed.get(state, T.INVALID_GUEST if state == "none" else T.INVALID_GUEST_STATE)
    assert command(hw.psp) == expected


@pytest.mark.parametrize(
    ("name", "policy", "machine", "status"),
    [
        ("ok", POLICY, {}, T.SUCCESS),
        ("bit 17 clear", 1 << 16, {}, T.POLICY_FAILURE),
        ("SMT on, not allowed", 1 << 17, {}, T.POLICY_FAILURE),
        ("SMT off", 1 << 17, {"smt": False}, T.SUCCESS),
        ("API newer than the firmware, minor", POLICY | 1 << 8 | 56, {}, T.POLICY_FAILURE),
        ("API newer than the firmware, major", POLICY | 2 << 8, {}, T.POLICY_FAILURE),
        ("API of the firmware", POLICY | 1 << 8 | 55, {}, T.SUCCESS),
        ("older major, newer minor", POLICY | 0 << 8 | 200, {}, T.SUCCESS),
        ("reserved bit", POLICY | 1 << 21, {}, T.POLICY_FAILURE),
        ("migration agent, debug, single socket", POLICY | 7 << 18, {}, T.SUCCESS),
    ],
)
def test_snp_launch_start_policy(name, policy, machine, status):
    hw = hardware(**machine)
    snp_guest(hw, state="CONTEXT")
    assert hw.psp.snp_launch_start(GCTX, policy) == status


@pytest.mark.parametrize(
    ("name", "before", "asid", "policy", "status"),
    [
        ("ASID still owns pages", lambda hw: make(hw, S.GUEST_INVALID, 9, asid=7), 7, POLICY, T.INVALID_CONFIG),
        ("single socket on two", lambda hw: None, 7, POLICY | 1 << 20, T.POLICY_FAILURE),
        ("owned", lambda hw: snp_guest(hw, 7, 999, state="ACTIVE"), 7, POLICY, T.ASID_OWNED),
        ("in the SEV range", lambda hw: None, 100, POLICY, T.INVALID_ASID),
        ("no ASID", lambda hw: None, 0, POLICY, T.INVALID_ASID),
        ("above all", lambda hw: None, 5000, POLICY, T.INVALID_ASID),
        ("ok", lambda hw: None, 7, POLICY, T.SUCCESS),
    ],
)
def test_snp_activate(name, before, asid, policy, status):
    hw = hardware(sockets=2)
    before(hw)
    snp_guest(hw, policy=policy)
    assert hw.psp.snp_activate(GCTX, asid) == status


def test_a_dirty_asid_needs_a_flush():
    hw = hardware()
    snp_guest(hw, 7, 999, state="RUNNING")
    hw.psp.snp_decommission(999)
    snp_guest(hw)
    assert hw.psp.snp_activate(GCTX, 7) == T.DFFLUSH_REQUIRED


def test_decommission_gives_the_context_page_back_as_a_firmware_page():
    hw = hardware()
    snp_guest(hw, state="RUNNING")
    hw.psp.snp_decommission(GCTX)
    assert hw.rmp.state(run(GCTX, 1))[0] == S.FIRMWARE
    assert hw.psp.snp_decommission(GCTX) == T.INVALID_GUEST


# ---- SNP: pages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "guest", "page", "level", "arguments", "status"),
    [
        ("gctx is no Context", None, S.HYPERVISOR, K, {}, T.INVALID_GUEST),
        *((f"page is {s.name}", "ACTIVE", s, K, {}, T.INVALID_PAGE_STATE) for s in S
          if s not in (S.PRE_GUEST, S.DEFAULT)),
        ("state before size", "ACTIVE", S.GUEST_VALID, K, {"level": M}, T.INVALID_PAGE_STATE),
        ("RMP 4K, argument 2M", "ACTIVE", S.PRE_GUEST, K, {"level": M}, T.INVALID_PAGE_SIZE),
        ("RMP 2M, argument 4K", "ACTIVE", S.PRE_GUEST, M, {}, T.INVALID_PAGE_SIZE),
        ("2M unaligned", "ACTIVE", S.PRE_GUEST, M, {"level": M, "pfn": 513}, T.INVALID_ADDRESS),
        ("VMSA as 2M", "ACTIVE", S.PRE_GUEST, M, {"level": M, "page_type": 2}, T.INVALID_PAGE_SIZE),
        ("SECRETS as 2M", "ACTIVE", S.PRE_GUEST, M, {"level": M, "page_type": 5}, T.INVALID_PAGE_SIZE),
        ("CPUID as 2M", "ACTIVE", S.PRE_GUEST, M, {"level": M, "page_type": 6}, T.INVALID_PAGE_SIZE),
        ("type 0", "LAUNCH", S.PRE_GUEST, K, {"page_type": 0}, T.INVALID_PARAM),
        ("type 7", "RUNNING", S.PRE_GUEST, K, {"page_type": 7}, T.INVALID_PARAM),
        ("not started", "CONTEXT", S.PRE_GUEST, K, {}, T.INVALID_GUEST_STATE),
        ("running", "RUNNING", S.PRE_GUEST, K, {}, T.INVALID_GUEST_STATE),
        ("not activated", "LAUNCH", S.PRE_GUEST, K, {}, T.INACTIVE),
        ("page of another guest", "ACTIVE", S.PRE_GUEST, K, {"asid": 2}, T.INVALID_PAGE_OWNER),
        ("ok", "ACTIVE", S.PRE_GUEST, K, {}, T.SUCCESS),
        ("ok 2M", "ACTIVE", S.PRE_GUEST, M, {"level": M}, T.SUCCESS),
    ],
)
def test_snp_launch_update(name, guest, page, level, arguments, status):
    hw = hardware()
    arguments = {"page_type": 1, "pfn": 512, "asid": 1} | arguments
    if guest:
        snp_guest(hw, state=guest, gctx=300)
    make(hw, page, 512, gfn=0x400 if page > S.CONTEXT else 0, asid=arguments.pop("asid"), level=level)
    old = snapshot(hw.rmp)
    answer = hw.psp.snp_launch_update(300, run(arguments.pop("pfn"), 1), **arguments)
    assert answer.status == status
    if status == T.SUCCESS:
        assert hw.rmp.state(run(512, 1))[0] == S.GUEST_VALID and hw.rmp.violations() == []
    else:
        assert snapshot(hw.rmp) == old


@pytest.mark.parametrize(
    ("page_type", "content"),
    [
        (PageType.NORMAL, b"n" * 4096),
        (PageType.UNMEASURED, b"n" * 4096),
        (PageType.ZERO, bytes(4096)),
        (PageType.VMSA, b"n" * 4096),
    ],
)
def test_what_the_page_types_leave_in_memory(page_type, content):
    hw = hardware()
    snp_guest(hw, state="ACTIVE")
    hw.memory.write(run(9, 1), hw.memory.intern(b"n" * 4096), 0)
    make(hw, S.PRE_GUEST, 9, gfn=0x55)
    assert hw.psp.snp_launch_update(GCTX, run(9, 1), page_type).done == 1
    assert hw.memory.bytes_of(int(hw.memory.read(run(9, 1), 1)[0])) == content
    assert hw.memory.read(run(9, 1), 0)[0] == SCRAMBLED
    if page_type == PageType.VMSA:
        assert hw.rmp.vmrun(9, 0x55, 1) == 0


def test_a_secrets_page_differs_from_guest_to_guest():
    hw = hardware()
    seen = []
    for asid, gctx in ((1, 300), (2, 301)):
        snp_guest(hw, asid, gctx, state="ACTIVE")
        make(hw, S.PRE_GUEST, 10 + asid, gfn=0x55, asid=asid)
        hw.psp.snp_launch_update(gctx, run(10 + asid, 1), PageType.SECRETS)
        seen.append(hw.memory.bytes_of(int(hw.memory.read(run(10 + asid, 1), asid)[0])))
    assert seen[0][:4] == (3).to_bytes(4, "little") and seen[0] != seen[1]


def cpuid_page(*entries, count=None):
    page = (len(entries) if count is None else count).to_bytes(16, "little")
    for leaf, sub, eax in entries:
        page += struct.pack("<II16xI20x", leaf, sub, eax)
    return page.ljust(4096, b"\0")


@pytest.mark.parametrize(
    ("name", "page", "status", "left"),
    [
        ("ok", cpuid_page((1, 0, 0x0F)), T.SUCCESS, None),
        ("no limit known", cpuid_page((2, 0, 0xFF)), T.SUCCESS, None),
        ("64 entries", cpuid_page(*[(2, i, 1) for i in range(64)]), T.SUCCESS, None),
        ("65 entries", cpuid_page(*[(2, i, 1) for i in range(65)]), T.INVALID_PARAM, "same"),
        ("value refused", cpuid_page((2, 0, 9), (1, 0, 0xFF)), T.INVALID_PARAM, cpuid_page((2, 0, 9), (1, 0, 0x0F))),
    ],
)
def test_cpuid_page(name, page, status, left):
    hw = hardware(cpuid_limits={(1, 0): (0x0F, 0, 0, 0)})
    snp_guest(hw, state="ACTIVE")
    hw.memory.write(run(9, 1), hw.memory.intern(page), 0)
    make(hw, S.PRE_GUEST, 9, gfn=0x55)
    assert hw.psp.snp_launch_update(GCTX, run(9, 1), PageType.CPUID).status == status
    if status == T.SUCCESS:
        assert hw.memory.bytes_of(int(hw.memory.read(run(9, 1), 1)[0])) == page
    else:
        assert hw.rmp.state(run(9, 1))[0] == S.PRE_GUEST
        assert hw.memory.bytes_of(int(hw.memory.read(run(9, 1), 0)[0])) == (page if left == "same" else left)


def test_a_2m_update_extends_the_digest_as_512_pages():
    hw = hardware()
    snp_guest(hw, state="ACTIVE")
    make(hw, S.PRE_GUEST, 512, gfn=0x400, level=M)
    assert hw.psp.snp_launch_update(GCTX, run(512, 1), PageType.ZERO, M).done == 1
    ld = bytes(48)
    for gfn in range(0x400, 0x600):
        ld = extend_launch_digest(ld, bytes(48), PageType.ZERO, gfn << 12)
    assert hw.psp.snp_launch_digest(GCTX) == ld
    assert (hw.memory.key[512:1024] == 1).all()


def test_launch_update_stops_at_the_first_page_that_fails():
    hw = hardware()
    snp_guest(hw, state="ACTIVE")
    for pfn in (10, 11, 13):
        make(hw, S.PRE_GUEST, pfn, gfn=pfn)
    answer = hw.psp.snp_launch_update(GCTX, run(10, 4), PageType.ZERO)
    assert (answer.done, answer.status) == (2, T.INVALID_PAGE_STATE)
    assert hw.rmp.state(run(10, 4)).tolist() == [S.GUEST_VALID, S.GUEST_VALID, S.HYPERVISOR, S.PRE_GUEST]


RECLAIM = {
    S.HYPERVISOR: (T.SUCCESS, S.HYPERVISOR),
    S.HV_FIXED: (T.INVALID_PAGE_STATE, S.HV_FIXED),
    S.FIRMWARE: (T.SUCCESS, S.RECLAIM),
    S.CONTEXT: (T.INVALID_PAGE_STATE, S.CONTEXT),
    S.METADATA: (T.SUCCESS, S.RECLAIM),
    S.RECLAIM: (T.SUCCESS, S.RECLAIM),
    S.PRE_GUEST: (T.SUCCESS, S.GUEST_INVALID),
    S.GUEST_INVALID: (T.SUCCESS, S.GUEST_INVALID),
    S.GUEST_VALID: (T.SUCCESS, S.GUEST_VALID),
    S.PRE_SWAP: (T.SUCCESS, S.GUEST_VALID),
}


@pytest.mark.parametrize("state", RECLAIM)
def test_page_reclaim(state):
    hw = hardware()
    make(hw, state, 512, gfn=5 if state > S.METADATA else 0)
    status, after = RECLAIM[state]
    assert hw.psp.snp_page_reclaim(run(512, 1)).status == status
    assert hw.rmp.state(run(512, 1))[0] == after


@pytest.mark.parametrize(
    ("name", "rmp_level", "pfn", "level", "status"),
    [
        ("RMP 2M, argument 4K", M, 512, K, T.INVALID_PAGE_SIZE),
        ("RMP 4K, argument 2M", K, 512, M, T.INVALID_PAGE_SIZE),
        ("2M unaligned", M, 513, M, T.INVALID_ADDRESS),
        ("2M", M, 512, M, T.SUCCESS),
    ],
)
def test_page_reclaim_sizes(name, rmp_level, pfn, level, status):
    hw = hardware()
    make(hw, S.FIRMWARE, 512, level=rmp_level)
    assert hw.psp.snp_page_reclaim(run(pfn, 1), level).status == status


def test_page_set_state_makes_hypervisor_pages_hv_fixed():
    hw = hardware()
    make(hw, S.FIRMWARE, 12)
    answer = hw.psp.snp_page_set_state(run(10, 4))
    assert (answer.done, answer.status) == (2, T.INVALID_PAGE_STATE)
    assert hw.rmp.state(run(10, 4)).tolist() == [S.HV_FIXED, S.HV_FIXED, S.FIRMWARE, S.HYPERVISOR]


def test_page_unsmash_is_the_inverse_of_psmash():
    hw = hardware()
    make(hw, S.GUEST_VALID, 512, gfn=0x400, level=M)
    hw.rmp.psmash(run(512, 1))
    assert hw.psp.snp_page_unsmash(run(512, 1)).status == T.INVALID_PAGE_STATE  # not immutable
    assert hw.psp.snp_page_unsmash(run(513, 1)).status == T.INVALID_ADDRESS
    hw.rmp.rmpupdate(run(512, 512), run(0x400, 512), assigned=True, asid=1, immutable=True)
    assert hw.psp.snp_page_unsmash(run(512, 1)).status == T.SUCCESS
    assert hw.rmp.levels(run(512, 512)) == M and hw.rmp.state(run(600, 1))[0] == S.PRE_SWAP
    assert hw.rmp.violations() == []


# ---- SNP_LAUNCH_FINISH: ID block ---------------------------------------------------------------------------------

_N = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973


def id_auth(block, *, secret=12345, algorithm=1, curve=2):
    """An ID authentication page, signed with a small secret key."""
    nonce = 0xC0FFEE
    r = multiply_p384(nonce, P384_BASE)[0] % _N
    digest = int.from_bytes(hashlib.sha384(block).digest(), "big")
    s = pow(nonce, -1, _N) * (digest + r * secret) % _N
    key = multiply_p384(secret, P384_BASE)
    page = bytearray(4096)
    page[0:4] = algorithm.to_bytes(4, "little")
    page[0x40:0x88] = r.to_bytes(72, "little")
    page[0x88:0xD0] = s.to_bytes(72, "little")
    page[0x240:0x244] = curve.to_bytes(4, "little")
    page[0x244:0x28C] = key[0].to_bytes(72, "little")
    page[0x28C:0x2D4] = key[1].to_bytes(72, "little")
    return bytes(page)


def block(ld=bytes(48), policy=POLICY):
    return ld + bytes(32) + (1).to_bytes(4, "little") + bytes(4) + policy.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("name", "id_block", "auth", "status"),
    [
        ("digest", block(ld=b"x" * 48, policy=0), id_auth(b"", algorithm=0), T.BAD_MEASUREMENT),
        ("policy", block(policy=0), id_auth(b"", algorithm=0), T.POLICY_FAILURE),
        ("key algorithm", block(), id_auth(block(), algorithm=2), T.INVALID_PARAM),
        ("signature of another block", block(), id_auth(block(policy=0)), T.BAD_SIGNATURE),
        ("other curve", block(), id_auth(block(), curve=1), T.BAD_SIGNATURE),
        ("no signature", block(), (1).to_bytes(4, "little").ljust(4096, b"\0"), T.BAD_SIGNATURE),
        ("ok", block(), id_auth(block()), T.SUCCESS),
        ("none", b"", b"", T.SUCCESS),
    ],
)
def test_id_block(name, id_block, auth, status):
    hw = hardware()
    snp_guest(hw, state="ACTIVE")
    assert hw.psp.snp_launch_finish(GCTX, id_block, auth) == status
    assert hw.psp.contexts[GCTX].state == (SnpGuestState.RUNNING if status == T.SUCCESS else SnpGuestState.LAUNCH)


def test_an_id_block_has_its_size():
    hw = hardware()
    snp_guest(hw, state="ACTIVE")
    with pytest.raises(ValueError):
        hw.psp.snp_launch_finish(GCTX, bytes(95), bytes(4096))


def test_the_secure_processor_takes_one_command_at_a_time():
    hw = hardware()
    effects = [effect.kind for effect in hw.psp.snp_page_reclaim.steps(np.arange(5, 7))]
    assert effects == ["write", "release"]


# ---- SEV: sending and receiving ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "policy", "state", "status"),
    [
        ("running", 0, "RUNNING", T.SUCCESS),
        ("not launched yet", 0, "LUPDATE", T.INVALID_GUEST_STATE),
        ("policy forbids it", 1 << 3, "RUNNING", T.POLICY_FAILURE),
    ],
)
def test_send_start(name, policy, state, status):
    hw = hardware()
    assert hw.psp.send_start(sev_guest(hw, policy=policy, state=state))[0] == status
    assert hw.psp.send_start(77)[0] == T.INVALID_GUEST


def moving(hw):
    """A guest with a page at frame 5 that is being sent, and the one at frame 9 that receives it."""
    sender = sev_guest(hw, state="RUNNING")
    hw.memory.write(run(5, 1), 0x1234, 200)
    session = hw.psp.send_start(sender)[1]
    status, receiver = hw.psp.receive_start(0, session)
    assert status == T.SUCCESS and hw.psp.activate(receiver, 201) == T.SUCCESS
    return sender, receiver


def test_a_page_arrives_under_the_receivers_key():
    hw = hardware()
    sender, receiver = moving(hw)
    status, header, data = hw.psp.send_update_data(sender, 5 << 12, 4096)
    assert status == T.SUCCESS and b"\x34\x12" * 2 not in data
    assert hw.psp.receive_update_data(receiver, 9 << 12, header, data) == T.SUCCESS
    assert hw.memory.read(run(9, 1), 201).tolist() == [0x1234]
    assert hw.psp.send_finish(sender) == hw.psp.receive_finish(receiver) == T.SUCCESS
    assert hw.psp.guest_status(sender)[1] == SevGuestState.SENT
    assert hw.psp.guest_status(receiver)[1] == SevGuestState.RUNNING
    assert hw.psp.send_update_data(sender, 5 << 12, 4096)[0] == T.INVALID_GUEST_STATE


def test_a_packet_that_was_changed_is_refused():
    hw = hardware()
    sender, receiver = moving(hw)
    _, header, data = hw.psp.send_update_data(sender, 5 << 12, 32)
    for changed in ((header[:-1] + b"?", data), (header, data[:-1] + bytes([data[-1] ^ 1])), (b"", data)):
        assert hw.psp.receive_update_data(receiver, 9 << 12, *changed) == T.BAD_MEASUREMENT
    assert hw.memory.key[9] == 0  # nothing was written


@pytest.mark.parametrize(
    ("name", "paddr", "length", "status"),
    [
        ("unaligned", 5 << 12 | 8, 16, T.INVALID_ADDRESS),
        ("length 0", 5 << 12, 0, T.INVALID_LENGTH),
        ("length not * 16", 5 << 12, 8, T.INVALID_LENGTH),
        ("beyond memory", 1 << 50, 16, T.INVALID_ADDRESS),
    ],
)
def test_send_update_data_operands(name, paddr, length, status):
    hw = hardware()
    sender, _ = moving(hw)
    assert hw.psp.send_update_data(sender, paddr, length) == (status, b"", b"")


@pytest.mark.parametrize("state", [S.PRE_GUEST, S.GUEST_VALID, S.RECLAIM])
def test_no_legacy_guests_key_is_used_on_what_the_rmp_gives_to_others(state):
    hw = hardware()
    sender, receiver = moving(hw)
    packet = hw.psp.send_update_data(sender, 8 << 12, 16)[1:]
    make(hw, state, 9, gfn=5 if state != S.RECLAIM else 0)
    hw.memory.write(run(9, 1), hw.memory.intern(b"mine"), 1)
    assert hw.psp.send_update_data(sender, 9 << 12, 16)[0] == T.INVALID_PAGE_STATE
    assert hw.psp.receive_update_data(receiver, 9 << 12, *packet) == T.INVALID_PAGE_STATE
    assert hw.psp.launch_secret(sev_guest(hw, asid=202, state="LSECRET"), 9 << 12, bytes(16)) == T.INVALID_PAGE_STATE
    assert hw.memory.bytes_of(int(hw.memory.read(run(9, 1), 1)[0]))[:4] == b"mine"


def test_a_cancelled_sender_runs_on():
    hw = hardware()
    sender, _ = moving(hw)
    assert hw.psp.send_cancel(sender) == T.SUCCESS and hw.psp.guest_status(sender)[1] == SevGuestState.RUNNING
    assert hw.psp.receive_start(0, b"short") == (T.BAD_MEASUREMENT, 0)
