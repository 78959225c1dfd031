"""The RMP against the reference's tables: every row a named case, its expectation written out."""

from __future__ import annotations

import numpy as np
import pytest
from sev_helpers import NR_FRAMES, hardware, make, snapshot

from cvmcore.pages import run
from cvmcore.types import PG_LEVEL_2M, PG_LEVEL_4K
from cvmcore_sev.errors import PageState, RmpStatus
from cvmcore_sev.hw import IMMUTABLE, PERM_ALL, PERM_READ, PERM_WRITE, VMSA_GFN, Rmp

S = PageState
R = RmpStatus
K, M = PG_LEVEL_4K, PG_LEVEL_2M


# ---- page states (firmware ABI): what RMPREAD shows of each ------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "assigned", "immutable", "asid", "gfn"),
    [
        (S.HYPERVISOR, False, False, 0, 0),
        (S.HV_FIXED, False, True, 0, 0),
        (S.FIRMWARE, True, True, 0, 0),
        (S.CONTEXT, True, True, 0, 0),
        (S.METADATA, True, True, 0, 0x77),
        (S.RECLAIM, True, False, 0, 0),
        (S.PRE_GUEST, True, True, 3, 0x55),
        (S.GUEST_INVALID, True, False, 3, 0x55),
        (S.GUEST_VALID, True, False, 3, 0x55),
        (S.PRE_SWAP, True, True, 3, 0x55),
    ],
)
def test_page_states(state, assigned, immutable, asid, gfn):
    hw = hardware()
    make(hw, state, 9, gfn=0x55 if asid else 0, asid=3)
    seen = hw.rmp.rmpread(run(9, 1))
    assert (seen.assigned[0], seen.immutable[0], seen.asid[0], seen.gfn[0]) == (assigned, immutable, asid, gfn)
    assert hw.rmp.violations() == []


def test_pages_past_the_table_are_default():
    assert hardware().rmp.state(run(NR_FRAMES, 1))[0] == S.DEFAULT
    assert Rmp(2048, covered_frames=1024).state(run(1024, 1))[0] == S.DEFAULT


# ---- 3.1 RMPUPDATE: checks in order ------------------------------------------------------------------------------

PRIVATE = {"assigned": True, "asid": 1}
SHARED = {"assigned": False}


def lock(hw, pfn):
    hw.rmp.lock(run(pfn, 1))


def held(state, pfn, level=K, gfn=0x600):
    return lambda hw: make(hw, state, pfn, gfn=gfn, level=level)


@pytest.mark.parametrize(
    ("name", "before", "pfn", "fields", "code"),
    [
        ("1 2M and unaligned", None, 513, PRIVATE | {"level": M}, R.FAIL_INPUT),
        ("2 assigned=0 with immutable=1", None, 513, SHARED | {"immutable": True}, R.FAIL_INPUT),
        ("2 assigned=0 with an asid", None, 513, SHARED | {"asid": 1}, R.FAIL_INPUT),
        ("3 not covered", None, NR_FRAMES, PRIVATE, R.FAIL_INPUT),
        ("3 not covered, far past the table", None, 1 << 40, PRIVATE, R.FAIL_INPUT),
        ("3 2M page that is covered in part", None, 8 * 512, PRIVATE | {"level": M}, R.FAIL_INPUT),
        ("4 locked", lambda hw: lock(hw, 513), 513, PRIVATE, R.FAIL_INUSE),
        ("4 locked before 5", lambda hw: (make(hw, S.FIRMWARE, 513), lock(hw, 513)), 513, PRIVATE, R.FAIL_INUSE),
        ("5 HV-Fixed", held(S.HV_FIXED, 513), 513, PRIVATE, R.FAIL_PERMISSION),
        ("5 Firmware", held(S.FIRMWARE, 513), 513, SHARED, R.FAIL_PERMISSION),
        ("5 Context", held(S.CONTEXT, 513), 513, SHARED, R.FAIL_PERMISSION),
        ("5 Metadata", held(S.METADATA, 513), 513, SHARED, R.FAIL_PERMISSION),
        ("5 Pre-Guest", held(S.PRE_GUEST, 513), 513, SHARED, R.FAIL_PERMISSION),
        ("5 Pre-Swap", held(S.PRE_SWAP, 513), 513, SHARED, R.FAIL_PERMISSION),
        ("5 immutable 2M page", held(S.PRE_GUEST, 512, M), 512, SHARED | {"level": M}, R.FAIL_PERMISSION),
        ("6 4K at the base of a 2M page", held(S.GUEST_INVALID, 512, M), 512, SHARED, R.FAIL_OVERLAP),
        ("6 4K inside a 2M page", held(S.GUEST_INVALID, 512, M), 700, SHARED, R.FAIL_OVERLAP),
        ("6 4K private inside a 2M page", held(S.GUEST_INVALID, 512, M), 700, PRIVATE, R.FAIL_OVERLAP),
        ("7 region base locked", lambda hw: lock(hw, 512), 513, PRIVATE, R.FAIL_PERMISSION),
        ("7 region base HV-Fixed", held(S.HV_FIXED, 512), 513, PRIVATE, R.FAIL_PERMISSION),
        ("7 after an unlock of what was not locked", lambda hw: (hw.rmp.unlock(run(512, 1)), make(hw, S.HV_FIXED, 512)),
         513, PRIVATE, R.FAIL_PERMISSION),
        ("7 not once the base is unlocked", lambda hw: (lock(hw, 512), lock(hw, 512), hw.rmp.unlock(run(512, 1))),
         513, PRIVATE, R.OK),
        ("7 not for an assigned page", lambda hw: (make(hw, S.GUEST_VALID, 513, gfn=5), make(hw, S.HV_FIXED, 512)),
         513, SHARED, R.OK),
        ("7 not for a base that the host made Pre-Guest", held(S.PRE_GUEST, 512), 513, PRIVATE, R.OK),
        ("8 2M over one 4K page", held(S.GUEST_INVALID, 700), 512, PRIVATE | {"level": M}, R.FAIL_OVERLAP),
        ("8 2M shared over one 4K page", held(S.GUEST_INVALID, 700), 512, SHARED | {"level": M}, R.FAIL_OVERLAP),
        ("ok 4K private", None, 513, PRIVATE, R.OK),
        ("ok 2M private", None, 512, PRIVATE | {"level": M}, R.OK),
        ("ok shared of a shared page", None, 513, SHARED, R.OK),
        ("ok Firmware page", None, 513, {"assigned": True, "immutable": True}, R.OK),
        ("ok steal a mutable guest page", held(S.GUEST_VALID, 513), 513, {"assigned": True, "asid": 2}, R.OK),
        ("ok shared of a Reclaim page", held(S.RECLAIM, 513), 513, SHARED, R.OK),
        ("ok 2M shared of a 2M page", held(S.GUEST_VALID, 512, M), 512, SHARED | {"level": M}, R.OK),
    ],
)
def test_rmpupdate(name, before, pfn, fields, code):
    hw = hardware()
    if before:
        before(hw)
    old = snapshot(hw.rmp)
    answer = hw.rmp.rmpupdate(run(pfn, 1), 0x400, **fields)
    assert answer.status == code
    assert answer.done == (code == R.OK)
    assert (snapshot(hw.rmp) == old) == (code != R.OK or name == "ok shared of a shared page")
    assert hw.rmp.violations() == []


def test_rmpupdate_refuses_2m_where_all_512_pages_are_assigned_as_4k():
    hw = hardware()
    hw.rmp.rmpupdate(run(512, 512), run(0, 512), **PRIVATE)
    assert hw.rmp.rmpupdate(run(512, 1), 0, **PRIVATE, level=M).status == R.FAIL_OVERLAP


def test_rmpupdate_of_2m_mirrors_assigned_and_counts_512_pages():
    hw = hardware()
    hw.rmp.rmpupdate(run(512, 1), 0x400, **PRIVATE, level=M)
    seen = hw.rmp.rmpread(run(512, 512))
    assert seen.assigned.all() and (seen.level == M).all() and (seen.asid == 1).all()
    assert seen.gfn.tolist() == list(range(0x400, 0x600))
    assert hw.rmp.asid_pages[1] == 512
    hw.rmp.rmpupdate(run(512, 1), **SHARED, level=M)
    assert not hw.rmp.word[512:1024].any() and hw.rmp.asid_pages[1] == 0


@pytest.mark.parametrize("level", [K, M])
@pytest.mark.parametrize(
    ("name", "fields", "gfn", "validated"),
    [
        ("nothing changed", PRIVATE, 0x400, True),
        ("only immutable changed", PRIVATE | {"immutable": True}, 0x400, True),
        ("asid changed", {"assigned": True, "asid": 2}, 0x400, False),
        ("gpa changed", PRIVATE, 0x600, False),
        ("asid 0", {"assigned": True, "asid": 0}, 0x400, False),
    ],
)
def test_rmpupdate_keeps_validated_only_where_nothing_but_immutable_changes(name, fields, gfn, validated, level):
    hw = hardware()
    make(hw, S.GUEST_VALID, 512, gfn=0x400, level=level)
    page = run(512, 1)
    gfns = run(0x400, 1, 512 if level == M else 1)
    hw.rmp.rmpadjust(page, gfns, asid=1, target_vmpl=1, perms=PERM_READ, vmsa=True, level=level)
    assert hw.rmp.rmpupdate(page, gfn, **fields, level=level).status == R.OK
    assert bool(hw.rmp.word[512] & 1 << 11) == validated
    assert bool(hw.rmp.word[512] & 1 << 14) == validated  # vmsa
    assert hw.rmp._perms_of(np.array([512]))[0].tolist() == [PERM_ALL, PERM_READ if validated else 0, 0, 0]


def test_rmpupdate_of_another_size_clears_validated():
    hw = hardware()
    make(hw, S.GUEST_VALID, 512, gfn=0x400, level=M)
    hw.rmp.psmash(run(512, 1))
    hw.rmp.rmpupdate(run(513, 511), **SHARED)
    assert hw.rmp.rmpupdate(run(512, 1), 0x400, **PRIVATE).status == R.OK
    assert hw.rmp.state(run(512, 1))[0] == S.GUEST_VALID
    hw.rmp.rmpupdate(run(512, 1), **SHARED)
    hw.rmp.rmpupdate(run(512, 1), 0x400, **PRIVATE, level=M)
    assert hw.rmp.state(run(512, 1))[0] == S.GUEST_INVALID


def test_a_gpa_above_32_bits_of_gfn_is_kept():
    hw = hardware()
    hw.rmp.rmpupdate(run(7, 2), VMSA_GFN, **PRIVATE)
    assert hw.rmp.rmpread(run(7, 2)).gfn.tolist() == [VMSA_GFN, VMSA_GFN]
    assert hw.rmp.pvalidate(run(7, 1), run(VMSA_GFN, 1), asid=1, validate=True)[0] == R.OK
    assert hw.rmp.pvalidate(run(8, 1), run(VMSA_GFN & 0xFFFFFFFF, 1), asid=1, validate=True)[0] == R.NPF_RMP
    assert hw.rmp.rmpupdate(run(7, 1), VMSA_GFN, **PRIVATE).status == R.OK
    assert hw.rmp.state(run(7, 1))[0] == S.GUEST_VALID


def test_rmpupdate_stops_at_the_first_refused_page():
    hw = hardware()
    make(hw, S.FIRMWARE, 105)
    answer = hw.rmp.rmpupdate(run(100, 10), run(0, 10), **PRIVATE)
    assert (answer.done, answer.status) == (5, R.FAIL_PERMISSION)
    assert hw.rmp.rmpread(run(100, 10)).assigned.tolist() == [True] * 6 + [False] * 4


@pytest.mark.parametrize("fields", [{"asid": 1024}, {"asid": -1}, {"level": 3}])
def test_rmpupdate_has_no_such_operand(fields):
    with pytest.raises(ValueError, match="RMPUPDATE has no"):
        hardware().rmp.rmpupdate(run(1, 1), assigned=True, **fields)


# ---- 3.2 PSMASH ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "before", "pfn", "code"),
    [
        ("uncovered", None, 8 * 512, R.FAIL_INPUT),
        ("locked", lambda hw: (make(hw, S.GUEST_VALID, 512, level=M), lock(hw, 512)), 512, R.FAIL_INUSE),
        ("unassigned", None, 512, R.FAIL_BADADDR),
        ("4K page", held(S.GUEST_VALID, 512), 512, R.FAIL_BADADDR),
        ("immutable", held(S.PRE_GUEST, 512, M), 512, R.FAIL_PERMISSION),
        ("ok", held(S.GUEST_VALID, 512, M), 512, R.OK),
        ("ok, by any page of the region", held(S.GUEST_VALID, 512, M), 700, R.OK),
    ],
)
def test_psmash(name, before, pfn, code):
    hw = hardware()
    if before:
        before(hw)
    old = snapshot(hw.rmp)
    assert hw.rmp.psmash(run(pfn, 1)).status == code
    assert (snapshot(hw.rmp) == old) == (code != R.OK)


def test_psmash_is_not_noticed_by_the_guest():
    hw = hardware()
    make(hw, S.GUEST_VALID, 512, gfn=0x400, level=M)
    hw.rmp.rmpadjust(run(512, 1), run(0x400, 1, 512), asid=1, target_vmpl=1, perms=PERM_READ, level=M)
    hw.rmp.psmash(run(512, 1))
    seen = hw.rmp.rmpread(run(512, 512))
    assert seen.gfn.tolist() == list(range(0x400, 0x600)) and (seen.level == K).all() and (seen.asid == 1).all()
    assert (hw.rmp.state(run(512, 512)) == S.GUEST_VALID).all()
    assert (hw.rmp._perms_of(np.arange(512, 1024))[:, 1] == PERM_READ).all()
    assert hw.rmp.asid_pages[1] == 512 and hw.rmp.violations() == []


# ---- 3.3 PVALIDATE -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "state", "rmp_level", "ask", "code"),
    [
        ("2M, GVA not aligned", S.GUEST_INVALID, M, {"gfn": 0x401, "level": M}, R.FAIL_INPUT),
        ("VMPL is not 0", S.GUEST_INVALID, K, {"vmpl": 1}, R.FAIL_PERMISSION),
        ("uncovered", S.GUEST_INVALID, K, {"pfn": NR_FRAMES}, R.NPF_RMP),
        ("unassigned", S.HYPERVISOR, K, {}, R.NPF_RMP),
        ("asid differs", S.GUEST_INVALID, K, {"asid": 2}, R.NPF_RMP),
        ("gpa differs", S.GUEST_INVALID, K, {"gfn": 0x402}, R.NPF_RMP),
        ("immutable", S.PRE_GUEST, K, {}, R.NPF_RMP),
        ("asks 4K, RMP page 2M", S.GUEST_INVALID, M, {}, R.NPF_SIZEM),
        ("asks 4K inside the RMP's 2M page", S.GUEST_INVALID, M, {"pfn": 520, "gfn": 0x408}, R.NPF_SIZEM),
        ("asks 2M, RMP page 4K", S.GUEST_INVALID, K, {"level": M}, R.FAIL_SIZEMISMATCH),
        ("already validated", S.GUEST_VALID, K, {}, R.NO_CHANGE),
        ("already rescinded", S.GUEST_INVALID, K, {"validate": False}, R.NO_CHANGE),
        ("validate", S.GUEST_INVALID, K, {}, R.OK),
        ("validate 2M", S.GUEST_INVALID, M, {"level": M}, R.OK),
        ("rescind", S.GUEST_VALID, K, {"validate": False}, R.OK),
        ("rescind 2M", S.GUEST_VALID, M, {"level": M, "validate": False}, R.OK),
    ],
)
def test_pvalidate(name, state, rmp_level, ask, code):
    hw = hardware()
    make(hw, state, 512, gfn=0x400, level=rmp_level)
    old = snapshot(hw.rmp)
    ask = {"pfn": 512, "gfn": 0x400, "asid": 1, "validate": True, "level": K} | ask
    step = 512 if ask["level"] == M else 1
    page, gfns = run(ask.pop("pfn"), 1, step), run(ask.pop("gfn"), 1, step)
    answer = hw.rmp.pvalidate(page, gfns, **ask)
    assert int(answer if isinstance(answer, int) else answer[0]) == code
    if code == R.OK:
        assert hw.rmp.state(run(512, 1))[0] == (S.GUEST_VALID if ask["validate"] else S.GUEST_INVALID)
    else:
        assert snapshot(hw.rmp) == old


def test_pvalidate_answers_page_by_page():
    hw = hardware()
    hw.rmp.rmpupdate(run(100, 4), run(0, 4), **PRIVATE)
    hw.rmp.pvalidate(run(101, 1), run(1, 1), asid=1, validate=True)
    answer = hw.rmp.pvalidate(run(100, 5), run(0, 5), asid=1, validate=True)
    assert answer.tolist() == [R.OK, R.NO_CHANGE, R.OK, R.OK, R.NPF_RMP]


@pytest.mark.parametrize("asid", [0, -1, 1024, 1 << 20])
def test_no_guest_has_an_asid_that_an_entry_cannot_hold(asid):
    hw = hardware()
    make(hw, S.GUEST_INVALID, 512, gfn=0x400, level=M)
    make(hw, S.RECLAIM, 9)
    old = snapshot(hw.rmp)
    for pfn, gfn in ((513, 0), (513, 0x401), (9, 0)):  # a sub-entry is `assigned` and nothing else, as Reclaim is
        page, gfns = run(pfn, 1), run(gfn, 1)
        for instruction, operands in (
            (hw.rmp.pvalidate, {"validate": True}),
            (hw.rmp.rmpadjust, {"target_vmpl": 1, "perms": PERM_READ}),
            (hw.rmp.rmpquery, {"target_vmpl": 1}),
            (hw.rmp.check_private, {}),
        ):
            with pytest.raises(ValueError, match="no guest has ASID"):
                instruction(page, gfns, asid=asid, **operands)
        with pytest.raises(ValueError, match="no guest has ASID"):
            hw.rmp.vmrun(pfn, gfn, asid)
    assert snapshot(hw.rmp) == old


# ---- 3.4 RMPADJUST, RMPQUERY ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "state", "rmp_level", "ask", "code"),
    [
        ("2M unaligned", S.GUEST_VALID, M, {"gfn": 0x401, "level": M}, R.FAIL_INPUT),
        ("no such VMPL", S.GUEST_VALID, K, {"target_vmpl": 4}, R.FAIL_INPUT),
        ("target is the caller's VMPL", S.GUEST_VALID, K, {"target_vmpl": 0}, R.FAIL_PERMISSION),
        ("target above the caller's", S.GUEST_VALID, K, {"vmpl": 2, "target_vmpl": 1}, R.FAIL_PERMISSION),
        ("VMPL0 probe at VMPL1", S.GUEST_VALID, K, {"vmpl": 1, "target_vmpl": 1}, R.FAIL_PERMISSION),
        ("unassigned", S.HYPERVISOR, K, {}, R.NPF_RMP),
        ("asid differs", S.GUEST_VALID, K, {"asid": 2}, R.NPF_RMP),
        ("gpa differs", S.GUEST_VALID, K, {"gfn": 0x402}, R.NPF_RMP),
        ("immutable", S.PRE_SWAP, K, {}, R.NPF_RMP),
        ("4K on 2M", S.GUEST_VALID, M, {}, R.NPF_SIZEM),
        ("2M on 4K", S.GUEST_VALID, K, {"level": M}, R.FAIL_SIZEMISMATCH),
        ("not validated", S.GUEST_INVALID, K, {}, R.VC),
        ("more than the caller has", S.GUEST_VALID, K, {"vmpl": 1, "target_vmpl": 2}, R.FAIL_PERMISSION),
        ("ok", S.GUEST_VALID, K, {}, R.OK),
        ("ok, W without R", S.GUEST_VALID, K, {"perms": PERM_WRITE}, R.OK),
    ],
)
def test_rmpadjust(name, state, rmp_level, ask, code):
    hw = hardware()
    make(hw, state, 512, gfn=0x400, level=rmp_level)
    ask = {"gfn": 0x400, "asid": 1, "target_vmpl": 1, "perms": PERM_READ, "level": K} | ask
    step = 512 if ask["level"] == M else 1
    answer = hw.rmp.rmpadjust(run(512, 1, step), run(ask.pop("gfn"), 1, step), **ask)
    assert answer.tolist() == [code]
    if code == R.OK:
        status, perms, level = hw.rmp.rmpquery(run(512, 1), run(0x400, 1), asid=1, target_vmpl=1)
        assert (status[0], perms[0], level[0]) == (R.OK, ask["perms"], rmp_level)


def test_only_vmpl0_makes_a_vmsa():
    hw = hardware()
    make(hw, S.GUEST_VALID, 9, gfn=5)
    page, gfns = run(9, 1), run(5, 1)
    hw.rmp.rmpadjust(page, gfns, asid=1, target_vmpl=1, perms=PERM_ALL)
    hw.rmp.rmpadjust(page, gfns, asid=1, vmpl=1, target_vmpl=2, perms=PERM_READ, vmsa=True)
    assert hw.rmp.vmrun(9, 5, 1) == R.VMEXIT_INVALID
    hw.rmp.rmpadjust(page, gfns, asid=1, target_vmpl=1, perms=0, vmsa=True)
    assert hw.rmp.vmrun(9, 5, 1) == R.OK


@pytest.mark.parametrize(
    ("state", "asid", "code"),
    [(S.GUEST_VALID, 1, R.OK), (S.GUEST_INVALID, 1, R.VC), (S.GUEST_VALID, 2, R.NPF_RMP), (S.HYPERVISOR, 1, R.NPF_RMP)],
)
def test_rmpquery(state, asid, code):
    hw = hardware()
    make(hw, state, 9, gfn=5)
    status, perms, level = hw.rmp.rmpquery(run(9, 1), run(5, 1), asid=asid, target_vmpl=0)
    assert (status[0], perms[0], level[0]) == (code, PERM_ALL if code == R.OK else 0, K if code == R.OK else 0)


def test_rmpread_shows_whether_the_2m_region_is_used():
    hw = hardware()
    make(hw, S.GUEST_VALID, 600, gfn=5)
    assert hw.rmp.rmpread(run(511, 3)).hpage_region_status.tolist() == [False, True, True]


@pytest.mark.parametrize("stopped_by", ["an entry in use", "a frame that is not covered"])
def test_a_guest_is_stopped_at(stopped_by):
    """Whatever it does to the page: PVALIDATE, RMPADJUST, RMPQUERY, an access."""
    hw = hardware()
    make(hw, S.GUEST_VALID, 9, gfn=5)
    page, gfns = run(9, 1), run(5, 1)
    if stopped_by == "an entry in use":
        lock(hw, 9)
    else:
        page = run(NR_FRAMES, 1)
        assert hw.rmp.vmrun(NR_FRAMES, 5, 1) == R.VMEXIT_INVALID
    assert int(np.max(hw.rmp.pvalidate(page, gfns, asid=1, validate=False))) == R.NPF_RMP
    assert int(np.max(hw.rmp.rmpadjust(page, gfns, asid=1, target_vmpl=1, perms=PERM_READ))) == R.NPF_RMP
    assert int(hw.rmp.rmpquery(page, gfns, asid=1, target_vmpl=1)[0][0]) == R.NPF_RMP
    assert int(np.max(hw.rmp.check_private(page, gfns, asid=1))) == R.NPF_RMP


# ---- 4 access checks -----------------------------------------------------------------------------------------------

ALL_STATES = [s for s in S if s != S.DEFAULT]
HOST_OWNED = (S.HYPERVISOR, S.HV_FIXED)


@pytest.mark.parametrize("state", ALL_STATES)
def test_host_writes_need_a_hypervisor_page_and_reads_are_not_checked(state):
    hw = hardware()
    make(hw, state, 513, gfn=0x401)
    assert int(np.max(hw.rmp.check_host(run(513, 1), True))) == (R.OK if state in HOST_OWNED else R.HOST_PF)
    assert int(np.max(hw.rmp.check_host(run(513, 1), False))) == R.OK


@pytest.mark.parametrize("state", ALL_STATES)
def test_shared_guest_writes_need_a_hypervisor_page_and_reads_are_not_checked(state):
    hw = hardware()
    make(hw, state, 513, gfn=0x401)
    assert int(np.max(hw.rmp.check_shared(run(513, 1), True))) == (R.OK if state in HOST_OWNED else R.NPF_RMP)
    assert int(np.max(hw.rmp.check_shared(run(513, 1), False))) == R.OK


def test_a_2m_write_needs_all_512_entries_unassigned():
    hw = hardware()
    make(hw, S.GUEST_INVALID, 700)
    assert hw.rmp.check_host(run(512, 3), True, M).tolist() == [R.HOST_PF] * 3
    assert hw.rmp.check_host(run(512, 3), True, K) == R.OK
    assert hw.rmp.check_shared(run(510, 4), True, M).tolist() == [R.OK, R.OK, R.NPF_RMP, R.NPF_RMP]
    assert hw.rmp.check_host(run(NR_FRAMES, 2), True) == R.OK


@pytest.mark.parametrize(
    ("name", "state", "rmp_level", "ask", "code"),
    [
        ("not covered", S.GUEST_VALID, K, {"pfn": NR_FRAMES}, R.NPF_RMP),
        ("unassigned", S.HYPERVISOR, K, {}, R.NPF_RMP),
        ("foreign asid", S.GUEST_VALID, K, {"asid": 2}, R.NPF_RMP),
        ("other gpa", S.GUEST_VALID, K, {"gfn": 0x402}, R.NPF_RMP),
        ("immutable", S.PRE_SWAP, K, {}, R.NPF_RMP),
        ("Firmware page", S.FIRMWARE, K, {}, R.NPF_RMP),
        ("NPT 4K, RMP 2M", S.GUEST_VALID, M, {}, R.NPF_SIZEM),
        ("NPT 4K, inside RMP 2M", S.GUEST_VALID, M, {"pfn": 600, "gfn": 0x458}, R.NPF_SIZEM),
        ("NPT 2M, RMP 4K", S.GUEST_VALID, K, {"level": M}, R.NPF_SIZEM),
        ("size before validated", S.GUEST_INVALID, M, {}, R.NPF_SIZEM),
        ("not validated", S.GUEST_INVALID, K, {}, R.VC),
        ("VMPL without permission", S.GUEST_VALID, K, {"vmpl": 1}, R.NPF_VMPL),
        ("not validated before VMPL", S.GUEST_INVALID, K, {"vmpl": 1}, R.VC),
        ("ok 4K", S.GUEST_VALID, K, {}, R.OK),
        ("ok 2M", S.GUEST_VALID, M, {"level": M, "pfn": 600, "gfn": 0x458}, R.OK),
        ("ok NPT 1G", S.GUEST_VALID, M, {"level": 3}, R.OK),
    ],
)
def test_private_access(name, state, rmp_level, ask, code):
    hw = hardware()
    make(hw, state, 512, gfn=0x400, level=rmp_level)
    ask = {"pfn": 512, "gfn": 0x400, "asid": 1} | ask
    answer = hw.rmp.check_private(run(ask.pop("pfn"), 1), run(ask.pop("gfn"), 1), **ask)
    assert int(answer if isinstance(answer, int) else answer[0]) == code


@pytest.mark.parametrize("kind", ["run", "array"])
@pytest.mark.parametrize("level", [K, M])
def test_private_access_of_many_pages(kind, level):
    hw = hardware()
    hw.rmp.rmpupdate(run(512, 2, 512), run(0x400, 2, 512), **PRIVATE, level=M)
    hw.rmp.pvalidate(run(512, 2, 512), run(0x400, 2, 512), asid=1, validate=True, level=M)
    if level == K:
        hw.rmp.psmash(run(512, 2, 512))
    pfns, gfns = run(600, 700), run(0x458, 700)
    if kind == "array":
        pfns, gfns = np.arange(600, 1300, 7), np.arange(0x458, 0x458 + 700, 7)
    assert hw.rmp.check_private(pfns, gfns, asid=1, level=level) == R.OK
    assert (hw.rmp.check_private(pfns, gfns, asid=1, level=M + K - level) == R.NPF_SIZEM).all()


@pytest.mark.parametrize(
    ("perms", "allowed"),
    [
        (0b0001, {"read"}),
        (0b0010, set()),  # W without R is unusable
        (0b0011, {"read", "write"}),
        (0b0101, {"read", "user_exec"}),
        (0b1001, {"read", "supervisor_exec"}),
    ],
)
def test_vmpl_permissions(perms, allowed):
    hw = hardware()
    make(hw, S.GUEST_VALID, 9, gfn=5)
    hw.rmp.rmpadjust(run(9, 1), run(5, 1), asid=1, target_vmpl=1, perms=perms)
    for access in ("read", "write", "user_exec", "supervisor_exec"):
        answer = hw.rmp.check_private(run(9, 1), run(5, 1), asid=1, vmpl=1, access=access)
        assert int(np.max(answer)) == (R.OK if access in allowed else R.NPF_VMPL)


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("ok", lambda hw: None, R.OK),
        ("foreign asid", lambda hw: hw.rmp.rmpupdate(run(9, 1), 5, assigned=True, asid=2), R.VMEXIT_INVALID),
        ("other gpa", lambda hw: hw.rmp.rmpupdate(run(9, 1), 6, assigned=True, asid=1), R.VMEXIT_INVALID),
        ("immutable", lambda hw: hw.rmp.firmware_write(run(9, 1), set_bits=IMMUTABLE), R.VMEXIT_INVALID),
        ("not assigned", lambda hw: hw.rmp.rmpupdate(run(9, 1), assigned=False), R.VMEXIT_INVALID),
        ("in use", lambda hw: hw.rmp.vmrun(9, 5, 1), R.VMEXIT_INVALID),
    ],
)
def test_vmrun(name, change, code):
    hw = hardware()
    make(hw, S.GUEST_VALID, 9, gfn=5)
    hw.rmp.rmpadjust(run(9, 1), run(5, 1), asid=1, target_vmpl=1, perms=0, vmsa=True)
    change(hw)
    assert hw.rmp.vmrun(9, 5, 1) == code
    if code == R.OK:
        assert hw.rmp.rmpupdate(run(9, 1), assigned=False).status == R.FAIL_INUSE
        hw.rmp.vmexit(9)
        assert hw.rmp.rmpupdate(run(9, 1), assigned=False).status == R.OK


def test_a_save_area_inside_a_2m_page_holds_the_entry_that_rules_over_it():
    hw = hardware()
    make(hw, S.GUEST_VALID, 512, gfn=0x400, level=M)
    page, gfns = run(512, 1), run(0x400, 1, 512)
    hw.rmp.rmpadjust(page, gfns, asid=1, target_vmpl=1, perms=0, vmsa=True, level=M)
    assert hw.rmp.vmrun(515, 0x403, 1) == R.OK
    assert hw.rmp.rmpupdate(page, assigned=False, level=M).status == R.FAIL_INUSE
    assert hw.rmp.psmash(page).status == R.FAIL_INUSE
    assert hw.rmp.violations() == []
    hw.rmp.vmexit(515)
    assert hw.rmp.psmash(page).status == R.OK
