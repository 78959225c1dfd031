"""Every transition from every state, with the errno that the hypervisor answers (pkvm facts, section 3).

The expectations are written out here by hand: they are what the table in hw is held against, not made from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cvmcore.errors import InvariantViolation
from cvmcore.pages import run
from cvmcore_pkvm.errors import Errno
from cvmcore_pkvm.hw import LEAF_BORROWED, LEAF_POISON, TRANSITIONS, U32_MAX, Prot, Result

OK, EPERM, ENOENT, E2BIG, EAGAIN = Errno.OK, Errno.EPERM, Errno.ENOENT, Errno.E2BIG, Errno.EAGAIN
EFAULT, EBUSY, EINVAL, ERANGE, EHWPOISON = Errno.EFAULT, Errno.EBUSY, Errno.EINVAL, Errno.ERANGE, Errno.EHWPOISON
ENOMEM = Errno.ENOMEM

PFN, OTHER, GFN, FREE_GFN = 100, 101, 7, 300
MMIO, NOMAP = 900, 910
BEYOND_PA, BEYOND_IPA = 1 << 36, 1 << 28
REGIONS = [(0, 896, False), (904, 920, True), (920, 4096, False)]


class Page:
    """One frame, PFN, brought into a state; in guest states it is at GFN of the protected or the np guest."""

    def __init__(self, rig: Any, state: str) -> None:
        self.rig, self.hyp = rig, rig.hyp
        self.pvm, self.np = rig.make_vm(protected=True), rig.make_vm(protected=False)
        self.cpu, self.np_cpu = rig.cpu(self.pvm), rig.cpu(self.np)
        self.pfn = {"mmio": MMIO, "nomap": NOMAP, "beyond": BEYOND_PA}.get(state, PFN)
        getattr(self, "is_" + state)()
        for cpu in (self.cpu, self.np_cpu):
            # A mapping that is refused still fills EL2's memcache first: have that done.
            assert not self.hyp.host_donate_guest(cpu, run(4095, 1), run(0, 1)).ok
            assert not self.hyp.host_share_guest(cpu, run(4095, 1), run(0, 1), 1, Prot.RWX).ok

    def is_plain(self) -> None: ...

    is_mmio = is_nomap = is_beyond = is_plain

    def is_hyp_shared(self) -> None:
        assert self.hyp.host_share_hyp(run(PFN, 1)).ok

    def is_hyp_pinned(self) -> None:
        self.is_hyp_shared()
        assert self.hyp.hyp_pin(PFN, 1).ok

    def is_ffa(self) -> None:
        assert self.hyp.host_share_ffa(PFN, 1).ok

    def is_np(self) -> None:
        assert self.hyp.host_share_guest(self.np_cpu, run(PFN, 1), run(GFN, 1), 1, Prot.RWX).ok

    def is_np_full(self) -> None:
        self.is_np()
        self.hyp.share_count[PFN] = U32_MAX

    def is_hyp(self) -> None:
        assert self.hyp.host_donate_hyp(PFN, 1).ok

    def is_hyp_referenced(self) -> None:
        self.is_hyp()
        self.hyp.refcount[PFN] = 1

    def is_private(self) -> None:
        assert self.hyp.host_donate_guest(self.cpu, run(PFN, 1), run(GFN, 1)).ok

    def is_shared_back(self) -> None:
        self.is_private()
        assert self.hyp.guest_share_host(self.cpu, run(GFN, 1)).ok

    def is_poisoned(self) -> None:
        self.is_private()
        assert self.hyp.host_force_reclaim(run(PFN, 1)).ok


FRAME_OPS: dict[str, Any] = {
    "host_share_hyp": lambda p: p.hyp.host_share_hyp(run(p.pfn, 1)),
    "host_unshare_hyp": lambda p: p.hyp.host_unshare_hyp(run(p.pfn, 1)),
    "hyp_pin": lambda p: p.hyp.hyp_pin(p.pfn, 1),
    "host_donate_hyp": lambda p: p.hyp.host_donate_hyp(p.pfn, 1),
    "hyp_donate_host": lambda p: p.hyp.hyp_donate_host(p.pfn, 1),
    "host_share_ffa": lambda p: p.hyp.host_share_ffa(p.pfn, 1),
    "host_unshare_ffa": lambda p: p.hyp.host_unshare_ffa(p.pfn, 1),
    "host_donate_guest": lambda p: p.hyp.host_donate_guest(p.cpu, run(p.pfn, 1), run(FREE_GFN, 1)),
    "host_share_guest": lambda p: p.hyp.host_share_guest(p.np_cpu, run(p.pfn, 1), run(FREE_GFN, 1), 1, Prot.RWX),
    "host_force_reclaim": lambda p: p.hyp.host_force_reclaim(run(p.pfn, 1)),
    "handle_host_mem_abort": lambda p: p.hyp.handle_host_mem_abort(run(p.pfn, 1)),
}
STATES = (
    "plain", "hyp_shared", "hyp_pinned", "ffa", "np", "np_full", "hyp", "hyp_referenced", "private", "shared_back",
    "poisoned", "mmio", "nomap", "beyond",
)  # fmt: skip
# A poisoned gfn leaves a frame that is the host's own again.
FRAME_EXPECTED: dict[str, tuple[Errno, ...]] = {
    #                        plain   hypshr  hyppin  ffa     np      npfull  hyp     hypref  private back    poison
    "host_share_hyp":       (OK,     EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  OK,
                             EPERM, EPERM, EPERM),
    "host_unshare_hyp":     (EPERM,  OK,     EBUSY,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,
                             EPERM, EPERM, EPERM),
    "hyp_pin":              (EPERM,  OK,     OK,     EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,
                             EPERM, EPERM, EPERM),
    "host_donate_hyp":      (OK,     EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  OK,
                             EPERM, EPERM, EINVAL),
    "hyp_donate_host":      (EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  OK,     EBUSY,  EPERM,  EPERM,  EPERM,
                             EPERM, EPERM, EINVAL),
    "host_share_ffa":       (OK,     EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  OK,
                             EPERM, EPERM, EINVAL),
    # Does not look who borrowed the page: that is the FF-A proxy's contract.
    "host_unshare_ffa":     (EPERM,  OK,     OK,     OK,     OK,     OK,     EPERM,  EPERM,  EPERM,  EPERM,  EPERM,
                             EPERM, EPERM, EINVAL),
    "host_donate_guest":    (OK,     EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  EPERM,  OK,
                             EPERM, EPERM, EPERM),
    "host_share_guest":     (OK,     EPERM,  EPERM,  EPERM,  OK,     EBUSY,  EPERM,  EPERM,  EPERM,  EPERM,  OK,
                             EPERM, EPERM, EINVAL),
    "host_force_reclaim":   (EAGAIN, EAGAIN, EAGAIN, EAGAIN, EAGAIN, EAGAIN, EPERM,  EPERM,  OK,     EAGAIN, EAGAIN,
                             EFAULT, EAGAIN, EFAULT),
    "handle_host_mem_abort": (OK,    OK,     OK,     OK,     OK,     OK,     EPERM,  EPERM,  EPERM,  OK,     OK,
                             OK, OK, EPERM),
}  # fmt: skip

GUEST_OPS: dict[str, Any] = {
    "host_donate_guest": lambda p, g: p.hyp.host_donate_guest(p.cpu, run(OTHER, 1), run(g, 1)),
    "guest_share_host": lambda p, g: p.hyp.guest_share_host(p.cpu, run(g, 1)),
    "guest_unshare_host": lambda p, g: p.hyp.guest_unshare_host(p.cpu, run(g, 1)),
    "host_reclaim_guest": lambda p, g: (p.rig.kill(p.pvm), p.hyp.host_reclaim_guest(p.pvm, run(g, 1)))[1],
    "host_reclaim_guest, alive": lambda p, g: p.hyp.host_reclaim_guest(p.pvm, run(g, 1)),
    "host_share_guest": lambda p, g: p.hyp.host_share_guest(p.np_cpu, run(OTHER, 1), run(g, 1), 1, Prot.RWX),
    "host_unshare_guest": lambda p, g: p.hyp.host_unshare_guest(p.np, run(g, 1), 1),
    "relax_perms": lambda p, g: p.hyp.relax_perms(p.np_cpu, run(g, 1), Prot.W),
    "mkyoung": lambda p, g: p.hyp.mkyoung(p.np_cpu, run(g, 1)),
    "wrprotect": lambda p, g: p.hyp.wrprotect(p.np, run(g, 1), 1),
    "test_clear_young": lambda p, g: p.hyp.test_clear_young(p.np, run(g, 1), 1, True),
}
GUEST_STATES = ("plain", "private", "shared_back", "poisoned", "np")
GUEST_EXPECTED: dict[str, tuple[Errno, ...]] = {
    #                             absent  private shared_back poisoned   np     beyond the IPA size
    "host_donate_guest":         (OK,     EPERM,  EPERM,      EPERM,     OK,     ERANGE),
    "guest_share_host":          (ENOENT, OK,     EPERM,      EHWPOISON, ENOENT, ERANGE),
    "guest_unshare_host":        (ENOENT, EPERM,  OK,         EHWPOISON, ENOENT, ERANGE),
    "host_reclaim_guest":        (ENOENT, OK,     OK,         OK,        ENOENT, ERANGE),
    "host_reclaim_guest, alive": (EINVAL, EINVAL, EINVAL,     EINVAL,    EINVAL, EINVAL),
    "host_share_guest":          (OK,     OK,     OK,         OK,        EPERM,  ERANGE),
    "host_unshare_guest":        (ENOENT, ENOENT, ENOENT,     ENOENT,    OK,     ERANGE),
    "relax_perms":               (EAGAIN, EAGAIN, EAGAIN,     EAGAIN,    OK,     ERANGE),
    "mkyoung":                   (OK,     OK,     OK,         OK,        OK,     ERANGE),
    "wrprotect":                 (OK,     OK,     OK,         OK,        OK,     ERANGE),
    "test_clear_young":          (OK,     OK,     OK,         OK,        OK,     ERANGE),
}  # fmt: skip


def outcome(page: Page, call: Any) -> Result:
    """Make the call; a refusal must leave no trace."""
    before = page.rig.snapshot()
    result: Result = call()
    if not result.ok:
        after = page.rig.snapshot()
        after["counts"] = before["counts"]
        assert before == after
        assert result.done == 0
    return result


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("op", FRAME_OPS)
def test_frame_states(make_rig: Any, op: str, state: str) -> None:
    """Each operation on a frame in each state answers as the table says, and a refusal changes nothing."""
    page = Page(make_rig(regions=REGIONS), state)

    result = outcome(page, lambda: FRAME_OPS[op](page))

    assert result.status == FRAME_EXPECTED[op][STATES.index(state)]
    if result.ok and op != "host_unshare_ffa" and state not in ("np_full", "hyp_referenced"):
        page.hyp.check_legal()


@pytest.mark.parametrize("state", GUEST_STATES)
@pytest.mark.parametrize("op", GUEST_OPS)
def test_guest_states(make_rig: Any, op: str, state: str) -> None:
    """Each operation on a gfn in each state answers as the table says, and a refusal changes nothing."""
    page = Page(make_rig(), state)
    if op == "host_reclaim_guest":
        page.rig.kill(page.pvm)
        result = outcome(page, lambda: page.hyp.host_reclaim_guest(page.pvm, run(GFN, 1)))
    else:
        result = outcome(page, lambda: GUEST_OPS[op](page, GFN))

    assert result.status == GUEST_EXPECTED[op][GUEST_STATES.index(state)]
    page.hyp.check_legal()


@pytest.mark.parametrize("op", GUEST_OPS)
def test_gfn_beyond_ipa(make_rig: Any, op: str) -> None:
    page = Page(make_rig(), "plain")

    assert GUEST_OPS[op](page, BEYOND_IPA).status == GUEST_EXPECTED[op][-1]


# ---- what a successful transition leaves behind -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "frame"),
    # host state in bits 1:0, hyp state in bits 5:4 (complemented), 0x80: the host has a page-level entry again
    [
        ("plain", 0x00),
        ("hyp_shared", 0x11),
        ("hyp_pinned", 0x11),
        ("ffa", 0x01),
        ("np", 0x01),
        ("hyp", 0x33),
        ("private", 0x03),
        ("shared_back", 0x82),
        ("poisoned", 0x80),
    ],
)
def test_frame_bytes(make_rig: Any, state: str, frame: int) -> None:
    page = Page(make_rig(), state)

    assert page.hyp.frame[PFN] == frame


def test_annotation_names_the_guest(make_rig: Any) -> None:
    """A donated frame's host entry says whose it is and at which gfn."""
    page = Page(make_rig(), "private")

    assert (page.hyp.owner[PFN], page.hyp.owner_gfn[PFN]) == (page.pvm, GFN)


def test_np_counts_mappings(make_rig: Any) -> None:
    """A frame shared with np guests several times is the host's own only after the last unshare."""
    page = Page(make_rig(), "np")
    other = page.rig.make_vm(protected=False)
    hyp = page.hyp
    assert hyp.host_share_guest(page.np_cpu, run(PFN, 1), run(8, 1), 1, Prot.R).ok
    assert hyp.host_share_guest(page.rig.cpu(other), run(PFN, 1), run(9, 1), 1, Prot.RWX).ok
    hyp.check_legal()

    for left, (handle, gfn) in zip((2, 1, 0), ((page.np, GFN), (page.np, 8), (other, 9)), strict=True):
        assert hyp.host_unshare_guest(handle, run(gfn, 1), 1).ok
        assert (hyp.share_count[PFN], hyp.frame[PFN]) == (left, 0x01 if left else 0x00)
        hyp.check_legal()


def test_content(make_rig: Any) -> None:
    """Donation, share and unshare keep content; teardown clears what is private and keeps what is shared."""
    rig = make_rig()
    pvm = rig.make_vm(protected=True)
    hyp, cpu = rig.hyp, rig.cpu(pvm)
    rig.memory.write(run(PFN, 4), [1, 2, 3, 4], 0)

    assert hyp.host_donate_guest(cpu, run(PFN, 4), run(0, 4)).ok
    assert hyp.guest_share_host(cpu, run(0, 3)).ok
    assert hyp.guest_unshare_host(cpu, run(0, 1)).ok
    assert rig.memory.stamp[PFN : PFN + 4].tolist() == [1, 2, 3, 4]
    rig.kill(pvm)
    assert hyp.host_reclaim_guest(pvm, run(0, 4)).ok

    assert rig.memory.stamp[PFN : PFN + 4].tolist() == [0, 2, 3, 0]


def test_force_reclaim_destroys(make_rig: Any) -> None:
    """The host has a zeroed frame, the guest an entry that faults for ever, and only its own vCPU's fault tells."""
    page = Page(make_rig(), "private")
    hyp = page.hyp
    page.rig.memory.write(run(PFN, 1), 77, 0)

    assert hyp.host_force_reclaim(run(PFN, 1)).ok

    assert page.rig.memory.stamp[PFN] == 0
    assert page.rig.vm(page.pvm).stage2.pages[GFN] == LEAF_POISON
    assert hyp.vcpu_in_poison_fault(page.cpu, run(GFN, 2)).answer.tolist() == [False, False]
    assert hyp.guest_access(page.cpu, run(GFN, 2)).status == 1
    assert hyp.vcpu_in_poison_fault(page.cpu, run(GFN, 2)).answer.tolist() == [True, False]
    assert hyp.vcpu_in_poison_fault(page.np_cpu, run(GFN, 1)).status == EINVAL


POISONED: dict[str, tuple[Errno, Any]] = {
    "host_donate_guest": (EPERM, lambda p: p.hyp.host_donate_guest(p.cpu, run(OTHER, 1), run(GFN, 1))),
    "guest_share_host": (EHWPOISON, lambda p: p.hyp.guest_share_host(p.cpu, run(GFN, 1))),
    "guest_unshare_host": (EHWPOISON, lambda p: p.hyp.guest_unshare_host(p.cpu, run(GFN, 1))),
    "host_share_guest": (EPERM, lambda p: p.hyp.host_share_guest(p.np_cpu, run(OTHER, 1), run(GFN, 1), 1, Prot.RWX)),
    "host_unshare_guest": (ENOENT, lambda p: p.hyp.host_unshare_guest(p.np, run(GFN, 1), 1)),
    "relax_perms": (EAGAIN, lambda p: p.hyp.relax_perms(p.np_cpu, run(GFN, 1), Prot.W)),
    "mkyoung": (OK, lambda p: p.hyp.mkyoung(p.np_cpu, run(GFN, 1))),
    "wrprotect": (OK, lambda p: p.hyp.wrprotect(p.np, run(GFN, 1), 1)),
    "test_clear_young": (OK, lambda p: p.hyp.test_clear_young(p.np, run(GFN, 1), 1, True)),
}


@pytest.mark.parametrize("op", POISONED)
def test_anything_on_a_poisoned_gfn(make_rig: Any, op: str) -> None:
    """Of either kind of guest: no host ever poisons an np guest's, so the entry is put there by hand."""
    page = Page(make_rig(), "poisoned")
    stage2 = page.rig.vm(page.np).stage2
    assert page.hyp.host_share_guest(page.np_cpu, run(OTHER, 1), run(GFN + 1, 1), 1, Prot.RWX).ok
    assert page.hyp.host_unshare_guest(page.np, run(GFN + 1, 1), 1).ok
    stage2.pages[GFN] = LEAF_POISON
    status, call = POISONED[op]

    assert call(page).status == status

    for handle in (page.pvm, page.np):
        assert page.rig.vm(handle).stage2.pages[GFN] == LEAF_POISON


def test_force_reclaim_of_a_leaked_page(make_rig: Any) -> None:
    """A page that nobody reclaimed before its VM was finalised is out of reach for good, whoever gets its slot."""
    page = Page(make_rig(), "private")
    page.rig.kill(page.pvm)
    assert page.hyp.finalize_teardown_vm(page.pvm).ok
    page.hyp.check_legal()

    again = page.rig.make_vm(protected=True)

    assert again == page.pvm
    assert page.hyp.host_force_reclaim(run(PFN, 1)).status == EAGAIN
    assert page.hyp.host_share_hyp(run(PFN, 1)).status == EPERM


# ---- ranges: all or nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "undo"),
    [
        ("host_donate_hyp", "hyp_donate_host"),
        ("host_share_ffa", "host_unshare_ffa"),
    ],
)
def test_ranges_are_all_or_nothing(make_rig: Any, op: str, undo: str) -> None:
    rig = make_rig(regions=REGIONS)
    hyp = rig.hyp
    assert hyp.host_share_hyp(run(15, 1)).ok
    before = rig.snapshot()

    assert getattr(hyp, op)(10, 8).status == EPERM
    assert getattr(hyp, op)(890, 8).status == EINVAL  # leaves its region
    assert getattr(hyp, op)(BEYOND_PA - 4, 8).status == EINVAL
    assert rig.snapshot() == before
    for name in (op, undo, "hyp_pin", "hyp_unpin"):
        with pytest.raises(ValueError, match="at least one page"):
            getattr(hyp, name)(10, 0)

    assert getattr(hyp, op)(20, 8).done == 8
    assert getattr(hyp, undo)(19, 4).status == EPERM
    assert getattr(hyp, undo)(20, 8).done == 8


def test_pins(make_rig: Any) -> None:
    """Pins are counted; EL2 maps a page while it has one, and only then."""
    rig = make_rig()
    hyp = rig.hyp
    assert hyp.host_share_hyp(run(10, 4)).ok

    assert hyp.hyp_pin(10, 4).work == {"pte": 4}
    assert hyp.hyp_pin(12, 2).work == {}
    assert hyp.hyp_pin(12, 3).status == EPERM
    assert hyp.host_unshare_hyp(run(10, 1)).status == EBUSY
    assert hyp.hyp_unpin(10, 4).work == {"pte": 2, "tlbi_hyp": 2}
    assert hyp.host_unshare_hyp(run(10, 4)).done == 2
    assert hyp.refcount[10:14].tolist() == [0, 0, 1, 1]


def test_hyp_memory_at_boot(make_rig: Any) -> None:
    """EL2's own memory is out of the host's reach, but for its text, which the host can still read."""
    rig = make_rig(carveout=run(50, 8), text=run(50, 2))
    hyp = rig.hyp
    hyp.check_legal()

    assert hyp.host_share_hyp(run(50, 1)).status == EPERM
    assert hyp.host_force_reclaim(run(57, 1)).status == EPERM
    assert hyp.handle_host_mem_abort(run(50, 8)).done == 2


def test_host_touches_mmio_and_memory(make_rig: Any) -> None:
    """MMIO is mapped for the host and has no state; what the host has lost behind it is still found."""
    rig = make_rig(regions=REGIONS)
    hyp = rig.hyp
    assert hyp.host_donate_hyp(893, 1).ok
    assert hyp.host_donate_hyp(930, 1).ok

    result = hyp.handle_host_mem_abort(run(894, 40))  # memory, MMIO, no-map memory, memory
    assert (result.status, result.done, result.work) == (EPERM, 36, {"host_fault": 28, "pte": 28})
    assert hyp.handle_host_mem_abort(np.array([896, 5000, 893])).done == 2
    assert hyp.handle_host_mem_abort(run(5000, 3)).done == 3
    assert hyp.handle_host_mem_abort(run(BEYOND_PA - 2, 3)).done == 2
    hyp.check_legal()


def test_ffa_proxy_rolls_back(make_rig: Any) -> None:
    """A transfer whose last range is refused leaves nothing lent."""
    rig = make_rig()
    hyp = rig.hyp
    assert hyp.host_donate_hyp(40, 1).ok
    before = rig.snapshot()

    assert hyp.ffa_mem_share([(10, 4), (20, 2), (39, 2)]).name == "DENIED"
    assert rig.snapshot() == before
    assert hyp.ffa_mem_share([(10, 4), (20, 2)]).name == "SUCCESS"
    assert np.flatnonzero(hyp.frame[:39] == 0x01).tolist() == [10, 11, 12, 13, 20, 21]
    assert hyp.ffa_mem_reclaim([(10, 4), (20, 2)]).name == "SUCCESS"
    assert hyp.frame[:39].tolist() == [0] * 39


# ---- handlers, life cycle -----------------------------------------------------------------------------------------


def test_wrong_kind_of_vm(make_rig: Any) -> None:
    """Handlers answer -EINVAL for the wrong kind of VM, an unknown handle, or a CPU without a vCPU."""
    page = Page(make_rig(), "plain")
    hyp, one = page.hyp, run(1, 1)

    assert hyp.host_donate_guest(page.np_cpu, one, one).status == EINVAL
    assert hyp.host_share_guest(page.cpu, one, one, 1, Prot.RWX).status == EINVAL
    assert hyp.host_unshare_guest(page.pvm, one, 1).status == EINVAL
    assert hyp.relax_perms(page.cpu, one, Prot.W).status == EINVAL
    assert hyp.mkyoung(page.cpu, one).status == EINVAL
    assert hyp.wrprotect(page.pvm, one, 1).status == EINVAL
    assert hyp.test_clear_young(page.pvm, one, 1, True).status == EINVAL
    assert hyp.tlb_flush_vmid(page.pvm).status == EINVAL
    assert hyp.tlb_flush_vmid(page.np).work == {"tlbi_vmid": 1}
    assert hyp.host_donate_guest(999, one, one).status == EINVAL
    assert hyp.host_reclaim_guest(0x2000, one).status == EINVAL
    assert hyp.host_unshare_guest(5, one, 1).status == EINVAL


def test_before_finalisation(make_rig: Any) -> None:
    """Protected-mode calls do not exist before pKVM is finalised."""
    hyp = make_rig(finalised=False).hyp

    assert hyp.reserve_vm().status == Errno.EOPNOTSUPP
    assert hyp.host_share_hyp(run(1, 1)).status == Errno.EOPNOTSUPP
    hyp.finalised = True
    assert hyp.reserve_vm().ok


def test_life_cycle(make_rig: Any) -> None:
    """Donate, share, unshare, teardown, reclaim, finalise: states at each step, everything given back at the end."""
    rig = make_rig()
    pvm = rig.make_vm(protected=True, nr_vcpus=2)
    hyp, cpu, gfn = rig.hyp, rig.cpu(pvm), run(GFN, 1)

    assert hyp.host_donate_guest(cpu, run(PFN, 1), gfn).ok
    assert hyp.frame[PFN] == 0x03
    assert hyp.guest_share_host(cpu, gfn).ok
    assert hyp.frame[PFN] & 0x03 == 2
    assert hyp.guest_unshare_host(cpu, gfn).ok
    assert hyp.frame[PFN] == 0x03

    assert hyp.start_teardown_vm(pvm).status == EINVAL  # vCPUs are loaded
    assert hyp.host_reclaim_guest(pvm, gfn).status == EINVAL  # not dying
    assert hyp.finalize_teardown_vm(pvm).status == EINVAL
    assert hyp.vcpu_load(99, pvm, 0).status == EINVAL  # loaded elsewhere
    hyp.vcpu_put(cpu)
    assert hyp.start_teardown_vm(pvm).status == EINVAL  # vCPU 1 still is
    hyp.vcpu_put(rig.cpu(pvm, 1))
    assert hyp.start_teardown_vm(pvm).ok
    assert hyp.start_teardown_vm(pvm).status == EINVAL  # twice
    assert hyp.vcpu_load(cpu, pvm, 0).status == EINVAL  # dying

    assert hyp.host_reclaim_guest(pvm, gfn).ok
    used = [pfn for memcache in rig.vms[pvm] for pfn in memcache]
    hyp_frames, stage2_frames = hyp.finalize_teardown_vm(pvm).answer
    hyp.check_legal()

    # Everything between the two guests' pages and the top is the host's own, or still shared with EL2, unpinned.
    host = hyp.frame & 0x33
    assert set(np.unique(host).tolist()) == {0x00, 0x11}
    assert int(np.count_nonzero(host == 0x11)) == 3  # struct kvm, two struct kvm_vcpu
    assert not hyp.refcount.any()
    assert not hyp.host_unshare_hyp(run(0, 1)).ok
    given = np.r_[np.arange(rig.top, 4096)]
    taken = set(given.tolist()) - set(used) - set(np.flatnonzero(host == 0x11).tolist())
    back = {*np.r_[hyp_frames].tolist(), *np.r_[stage2_frames].tolist()}
    assert back == taken


def test_init_vm_refusals(make_rig: Any) -> None:
    """__pkvm_init_vm checks in the kernel's order and leaves nothing behind when it fails."""
    rig = make_rig()
    hyp, kvm = rig.hyp, run(10, 1)
    handle = hyp.reserve_vm().answer
    before = rig.snapshot()

    assert hyp.init_vm(handle, True, 1, kvm, run(20, 2), run(30, 2)).status == EPERM  # struct kvm is not shared
    assert hyp.host_share_hyp(kvm).ok
    before = rig.snapshot()
    assert hyp.init_vm(handle, True, 0, kvm, run(20, 2), run(30, 2)).status == EINVAL
    assert hyp.init_vm(5, True, 1, kvm, run(20, 2), run(30, 2)).status == EINVAL
    assert hyp.init_vm(handle, True, 1, kvm, run(10, 2), run(30, 2)).status == ENOMEM  # not the host's own
    assert hyp.init_vm(handle, True, 1, kvm, run(20, 2), run(21, 2)).status == ENOMEM  # the same frames twice
    assert hyp.init_vm(handle + 1, True, 1, kvm, run(20, 2), run(30, 2)).status == EINVAL  # not reserved
    assert rig.snapshot() == before
    assert hyp.unreserve_vm(handle).ok
    assert hyp.unreserve_vm(handle).status == EINVAL


def test_init_vcpu_refusals(make_rig: Any) -> None:
    rig = make_rig()
    pvm = rig.make_vm(protected=True)
    hyp = rig.hyp
    assert hyp.host_share_hyp(run(10, 1)).ok
    before = rig.snapshot()

    assert hyp.init_vcpu(0x1050, 0, run(10, 1), run(20, 3)).status == ENOENT
    assert hyp.init_vcpu(pvm, 1, run(10, 1), run(20, 3)).status == EINVAL  # beyond the VM's vCPUs
    assert hyp.init_vcpu(pvm, 0, run(10, 1), run(20, 3)).status == EINVAL  # taken
    assert hyp.init_vcpu(pvm, 0, run(11, 1), run(20, 3)).status == EBUSY  # not shared
    assert hyp.init_vcpu(pvm, 0, run(10, 1), run(10, 3)).status == ENOMEM
    assert rig.snapshot() == before


def test_vm_table_is_finite(make_rig: Any) -> None:
    hyp = make_rig().hyp

    handles = [hyp.reserve_vm().answer for _ in range(255)]

    assert handles == list(range(0x1000, 0x10FF))
    assert hyp.reserve_vm().status == ENOMEM
    assert hyp.unreserve_vm(0x1003).ok
    assert hyp.reserve_vm().answer == 0x1003


# ---- table pages --------------------------------------------------------------------------------------------------


def test_memcache_runs_dry(make_rig: Any) -> None:
    """Without table pages a mapping fails after its ownership checks and before any change; the result says how many
    pages the rest needs, and with those the rest succeeds."""
    rig = make_rig()
    pvm = rig.make_vm(protected=True, spare=2)
    hyp, cpu = rig.hyp, rig.cpu(pvm)

    # Two tables for the first page; then three more of 512 entries each, with two pages kept in hand.
    result = hyp.host_donate_guest(cpu, run(1, 2000), run(0, 2000))
    assert (result.status, result.done, result.need) == (ENOMEM, 1, 5)
    assert result.work["admit"] == 2

    result = hyp.host_donate_guest(cpu, run(2, 1), run(1, 1))
    assert (result.status, result.done, result.need) == (ENOMEM, 0, 2)
    assert hyp.host_donate_guest(cpu, run(1, 1), run(1, 1)).status == EPERM  # ownership comes first

    memcache = rig.vms[pvm][0]
    memcache += range(*rig.frames(4).indices(4096))
    result = hyp.host_donate_guest(cpu, run(2, 1999), run(1, 1999))
    assert (result.status, result.done) == (ENOMEM, 1536)  # gfns 512, 1024 and 1536 took one each
    assert result.need == 1
    memcache += range(*rig.frames(1).indices(4096))
    assert hyp.host_donate_guest(cpu, run(1538, 463), run(1537, 463)).ok
    hyp.check_legal()


def test_memcache_page_that_is_not_the_hosts(make_rig: Any) -> None:
    """A listed page that EL2 cannot take ends the call with -ENOMEM before anything else is looked at."""
    rig = make_rig()
    pvm = rig.make_vm(protected=True, spare=0)
    hyp, cpu = rig.hyp, rig.cpu(pvm)
    assert hyp.host_share_hyp(run(50, 1)).ok

    rig.vms[pvm][0] += [60, 50]
    assert hyp.host_donate_guest(cpu, run(50, 1), run(0, 1)).status == ENOMEM
    assert hyp.frame[60] == 0x33  # the good page before it was taken
    rig.vms[pvm][0][:] = [61]
    assert hyp.host_donate_guest(cpu, run(50, 1), run(0, 1)).status == EPERM
    assert hyp.host_donate_guest(cpu, run(51, 1), run(0, 1)).ok


@pytest.mark.parametrize(("nr", "prot"), [(1, 8), (2, 7)])
def test_refill_comes_before_the_checks(make_rig: Any, nr: int, prot: int) -> None:
    """The handler fills the cache, and fails with -ENOMEM there, before rights and sizes are looked at."""
    rig = make_rig()
    np_vm = rig.make_vm(protected=False, spare=0)
    hyp, cpu, listed = rig.hyp, rig.cpu(np_vm), rig.vms[np_vm][0]
    assert hyp.host_share_hyp(run(50, 1)).ok

    listed += [60, 50]
    assert hyp.host_share_guest(cpu, run(1, 1), run(0, 1), nr, prot).status == ENOMEM
    listed[:] = [61]
    result = hyp.host_share_guest(cpu, run(1, 1), run(0, 1), nr, prot)
    assert (result.status, result.work["admit"], listed) == (EINVAL, 1, [])


def test_emptied_tables_are_used_again(make_rig: Any) -> None:
    """A table page that empties stays with its VM and is linked before the memcache is asked."""
    rig = make_rig()
    np_vm = rig.make_vm(protected=False)
    hyp, vm = rig.hyp, rig.vm(np_vm)
    cpu = rig.cpu(np_vm)

    assert hyp.host_share_guest(cpu, run(1, 2), run(511, 2), 1, Prot.RWX).work["table"] == 3
    work = hyp.host_unshare_guest(np_vm, run(511, 2), 1).work
    assert work == {"pte": 5, "tlbi_guest": 5, "unmap_cmo": 2, "untable": 3}
    assert (len(vm.tables), len(vm.pool)) == (0, 3)
    work = hyp.host_share_guest(cpu, run(1, 1), run(0, 1), 1, Prot.RWX).work
    assert (work["table"], len(vm.pool)) == (2, 1)
    hyp.check_legal()


# ---- non-protected guests -----------------------------------------------------------------------------------------


def test_blocks(make_rig: Any) -> None:
    """np guests map blocks of 2 MiB: sizes, alignment, and a request of the other size."""
    page = Page(make_rig(), "plain")
    hyp, cpu, np_vm = page.hyp, page.np_cpu, page.np

    assert hyp.host_share_guest(cpu, run(512, 1), run(0, 1), 2, Prot.RWX).status == EINVAL
    assert hyp.host_share_guest(cpu, run(513, 1), run(0, 1), 512, Prot.RWX).status == EINVAL
    assert hyp.host_share_guest(cpu, run(512, 1), run(1, 1), 512, Prot.RWX).status == EINVAL
    assert hyp.host_share_guest(cpu, run(512, 1), run(0, 1), 512, 8).status == EINVAL
    assert hyp.host_donate_hyp(1023, 1).ok
    assert hyp.host_share_guest(cpu, run(512, 1), run(0, 1), 512, Prot.RWX).status == EPERM  # one page is EL2's
    assert hyp.hyp_donate_host(1023, 1).ok

    result = hyp.host_share_guest(cpu, run(512, 2, 512), run(512, 2, 512), 512, Prot.RWX)
    assert (result.done, result.work["pte"], result.work["table"]) == (2, 2 + 1 + 2, 1)  # leaves, table, refill
    hyp.check_legal()
    access = hyp.guest_access(cpu, run(1000, 8), write=True)
    assert (access.status, access.pfns) == (0, run(1000, 8))
    assert hyp.host_share_guest(cpu, run(1, 1), run(600, 1), 1, Prot.RWX).status == EPERM
    assert hyp.host_unshare_guest(np_vm, run(512, 1), 1).status == E2BIG
    assert hyp.host_unshare_guest(np_vm, run(513, 1), 512).status == EINVAL
    assert hyp.host_share_guest(cpu, run(1, 1), run(0, 1), 1, Prot.RWX).ok
    assert hyp.host_unshare_guest(np_vm, run(0, 1), 512).status == E2BIG
    assert hyp.host_share_guest(cpu, run(1536, 1), run(0, 1), 512, Prot.RWX).status == EPERM

    result = hyp.host_unshare_guest(np_vm, run(512, 2, 512), 512)
    assert (result.done, result.work["tlbi_guest"]) == (2, 2)
    assert not (hyp.frame[512:1536] & 0x33).any()
    hyp.check_legal()


def test_rights_and_age(make_rig: Any) -> None:
    """Rights are only ever added by relax_perms and W taken by wrprotect; a leaf without access flag faults."""
    page = Page(make_rig(), "plain")
    hyp, cpu, np_vm = page.hyp, page.np_cpu, page.np
    assert hyp.host_share_guest(cpu, run(1, 2), run(0, 2), 1, Prot.R).ok
    assert hyp.host_share_guest(cpu, run(512, 1), run(512, 1), 512, Prot.RWX).ok

    assert hyp.guest_access(cpu, run(0, 2)).status == 0
    assert hyp.guest_access(cpu, run(0, 2), write=True).status == 1
    result = hyp.relax_perms(cpu, np.array([0, 5, 512]), Prot.W)
    assert (result.status, result.done, result.work) == (EAGAIN, 1, {"pte": 1, "tlbi_local": 2})
    assert hyp.guest_access(cpu, run(0, 2), write=True).status.tolist() == [0, 1]

    assert hyp.wrprotect(np_vm, run(0, 2, 512), 512).work == {"pte": 2}
    assert hyp.guest_access(cpu, np.array([0, 1, 700]), write=True).status.tolist() == [0, 1, 0], "by a TLB, if it can"
    assert hyp.tlb_flush_vmid(np_vm).ok
    assert hyp.guest_access(cpu, np.array([0, 1, 700]), write=True).status == 1
    assert hyp.guest_access(cpu, np.array([0, 1, 700])).status == 0
    assert hyp.relax_perms(cpu, np.array([0, 700]), Prot.RWX).ok
    assert hyp.guest_access(cpu, np.array([0, 1, 700]), write=True).status.tolist() == [0, 1, 0]

    assert hyp.test_clear_young(np_vm, run(0, 3), 1, False).answer.tolist() == [True, True, False]
    assert hyp.test_clear_young(np_vm, run(0, 2, 512), 512, True).answer.tolist() == [True, True]
    assert hyp.test_clear_young(np_vm, run(0, 2, 512), 512, True).answer.tolist() == [False, False]
    assert hyp.guest_access(cpu, np.array([0, 700])).status == 1
    assert hyp.mkyoung(cpu, np.array([0, 700])).ok
    assert hyp.guest_access(cpu, np.array([0, 1, 700])).status.tolist() == [0, 1, 0]
    hyp.check_legal()


def test_unshare_invalidates_what_wrprotect_left_in_tlbs(make_rig: Any) -> None:
    """An unmapped page is invalidated before the call returns; what is mapped there next has its own rights."""
    page = Page(make_rig(), "plain")
    hyp, cpu, np_vm = page.hyp, page.np_cpu, page.np
    assert hyp.host_share_guest(cpu, run(1, 3), run(0, 3), 1, Prot.RWX).ok
    assert hyp.host_share_guest(cpu, run(512, 1), run(512, 1), 512, Prot.RWX).ok
    assert hyp.wrprotect(np_vm, run(0, 3), 1).ok and hyp.wrprotect(np_vm, run(512, 1), 512).ok
    assert hyp.guest_access(cpu, np.array([0, 1, 2, 700]), write=True).status == 0, "by a TLB, if it can"

    assert hyp.host_unshare_guest(np_vm, run(1, 1), 1).ok and hyp.host_unshare_guest(np_vm, run(512, 1), 512).ok
    assert hyp.host_share_guest(cpu, run(5, 1), run(1, 1), 1, Prot.R).ok
    assert hyp.host_share_guest(cpu, run(512, 1), run(512, 1), 512, Prot.R).ok

    assert hyp.guest_access(cpu, np.array([0, 1, 2, 700]), write=True).status.tolist() == [0, 1, 0, 1]


def test_same_frame_at_two_gfns(make_rig: Any) -> None:
    """One batch may unshare a frame twice, where an np guest maps it twice, and share one page with hyp but once."""
    rig = make_rig()
    np_vm = rig.make_vm(protected=False)
    hyp, cpu = rig.hyp, rig.cpu(np_vm)

    assert hyp.host_share_guest(cpu, np.array([50, 51, 50]), run(0, 3), 1, Prot.RWX).done == 3
    hyp.check_legal()
    assert hyp.share_count[50:52].tolist() == [2, 1]
    assert hyp.host_unshare_guest(np_vm, run(0, 3), 1).done == 3
    assert (hyp.share_count[50:52].tolist(), hyp.frame[50:52].tolist()) == ([0, 0], [0, 0])

    result = hyp.host_share_hyp(np.array([60, 61, 60]))
    assert (result.status, result.done) == (EPERM, 2)
    hyp.check_legal()


def test_block_at_the_edge_of_memory(make_rig: Any) -> None:
    """A block of frames that leaves its region, or is not memory at all."""
    rig = make_rig(regions=[(0, 1600, False), (1600, 2048, False), (2560, 4096, False)])
    np_vm = rig.make_vm(protected=False)
    hyp, cpu = rig.hyp, rig.cpu(np_vm)

    assert hyp.host_share_guest(cpu, run(1536, 1), run(0, 1), 512, Prot.RWX).status == EINVAL
    assert hyp.host_share_guest(cpu, run(2048, 1), run(0, 1), 512, Prot.RWX).status == EPERM
    assert hyp.host_share_guest(cpu, run(BEYOND_PA, 1), run(0, 1), 512, Prot.RWX).status == EINVAL
    result = hyp.host_share_guest(cpu, run(512, 3, 512), run(0, 3, 512), 512, Prot.RWX)
    assert (result.status, result.done) == (EINVAL, 2)
    assert hyp.relax_perms(cpu, run(0, 1), 8).status == EINVAL
    hyp.check_legal()


@pytest.mark.parametrize(
    "misuse",
    [
        lambda p: p.hyp.host_donate_guest(p.cpu, run(1, 2), run(0, 3)),
        lambda p: p.hyp.host_share_guest(p.np_cpu, run(1, 2), run(0, 3), 1, Prot.RWX),
        lambda p: p.hyp.guest_share_host(p.cpu, np.array([-1])),
        lambda p: p.hyp.guest_access(999, run(0, 1)),
        lambda p: p.hyp.guest_access(p.cpu, run(BEYOND_IPA, 1)),
        lambda p: p.hyp.init_vm(p.pvm, True, 1, run(1, 1), run(2, 1), run(4, 2)),
        lambda p: p.hyp.init_vcpu(p.pvm, 1, run(1, 1), run(2, 1)),
        lambda p: p.hyp.read_stage2(0x2000, run(0, 1), 1),
        lambda p: p.rig.__class__(regions=[(0, 10, False), (5, 20, False)]),
        lambda p: p.hyp.__class__(p.rig.memory, 1 << 28),
    ],
)
def test_misuse_is_a_value_error(make_rig: Any, misuse: Any) -> None:
    """What no host and no guest can ask for is a mistake of the caller's program."""
    page = Page(make_rig(), "private")
    before = page.rig.snapshot()

    with pytest.raises(ValueError):
        misuse(page)
    assert page.rig.snapshot() == before


def test_bugs_of_el2_itself_are_violations(make_rig: Any) -> None:
    page = Page(make_rig(), "hyp_shared")

    with pytest.raises(InvariantViolation, match="has not pinned"):
        page.hyp.hyp_unpin(PFN, 1)
    with pytest.raises(InvariantViolation, match="FF-A"):
        page.hyp.ffa_mem_reclaim([(OTHER, 1)])
    page.hyp.refcount[PFN] = 0xFFFF
    with pytest.raises(InvariantViolation, match="65535"):
        page.hyp.hyp_pin(PFN, 1)


# ---- frame and gfn in every combination ---------------------------------------------------------------------------

GFN_STATES = ("absent", "private", "shared_back", "poisoned", "np", "np_block")
"""What stands at the gfn that a mapping is asked for: of the protected guest, or of the np guest."""
MAP_EXPECTED: dict[str, dict[str, tuple[Errno, ...]]] = {
    # host_donate_guest: memory, then the host's state, then the guest's
    "host_donate_guest": {
        #              plain hypshr hyppin ffa  np  npfull hyp hypref private back poison mmio nomap beyond
        "absent":      (OK,  *[EPERM] * 9,                                         OK, *[EPERM] * 3),
        "private":     (EPERM,) * 14,
        "shared_back": (EPERM,) * 14,
        "poisoned":    (EPERM,) * 14,
    },
    # host_share_guest: the PA size, memory, the guest's state, then the host's
    "host_share_guest": {
        "absent":      (OK, EPERM, EPERM, EPERM, OK, EBUSY, *[EPERM] * 4,          OK, EPERM, EPERM, EINVAL),
        "np":          (EPERM,) * 13 + (EINVAL,),
        "np_block":    (EPERM,) * 13 + (EINVAL,),
    },
}  # fmt: skip
AT = 1024  # the gfn, its state made with frames from 2048 on


def at_gfn(page: Page, state: str) -> None:
    """Bring gfn AT into a state, with another frame than PFN."""
    hyp = page.hyp
    if state == "np":
        assert hyp.host_share_guest(page.np_cpu, run(2048, 1), run(AT, 1), 1, Prot.RWX).ok
    elif state == "np_block":
        assert hyp.host_share_guest(page.np_cpu, run(2048, 1), run(AT, 1), 512, Prot.RWX).ok
    elif state != "absent":
        assert hyp.host_donate_guest(page.cpu, run(2048, 1), run(AT, 1)).ok
        if state == "shared_back":
            assert hyp.guest_share_host(page.cpu, run(AT, 1)).ok
        elif state == "poisoned":
            assert hyp.host_force_reclaim(run(2048, 1)).ok
    for cpu in (page.cpu, page.np_cpu):  # memcaches are full again
        assert not hyp.host_donate_guest(cpu, run(4095, 1), run(0, 1)).ok
        assert not hyp.host_share_guest(cpu, run(4095, 1), run(0, 1), 1, Prot.RWX).ok


@pytest.mark.parametrize(
    ("op", "gfn_state", "state"),
    [(op, gfn, state) for op, rows in MAP_EXPECTED.items() for gfn in rows for state in STATES],
)
def test_mapping_in_every_combination(make_rig: Any, op: str, gfn_state: str, state: str) -> None:
    """A frame in each state into a gfn in each state: the first check that fails decides, and nothing is changed."""
    page = Page(make_rig(regions=REGIONS), state)
    at_gfn(page, gfn_state)

    def call() -> Result:
        pfns, gfns = run(page.pfn, 1), run(AT, 1)
        if op == "host_donate_guest":
            donated: Result = page.hyp.host_donate_guest(page.cpu, pfns, gfns)
            return donated
        shared: Result = page.hyp.host_share_guest(page.np_cpu, pfns, gfns, 1, Prot.RWX)
        return shared

    assert outcome(page, call).status == MAP_EXPECTED[op][gfn_state][STATES.index(state)]


# Operations on an np gfn, by the size asked for and what stands there.
SIZED_OPS: dict[str, Any] = {
    "host_share_guest": lambda p, g, nr: p.hyp.host_share_guest(p.np_cpu, run(1024, 1), run(g, 1), nr, Prot.RWX),
    "host_unshare_guest": lambda p, g, nr: p.hyp.host_unshare_guest(p.np, run(g, 1), nr),
    "wrprotect": lambda p, g, nr: p.hyp.wrprotect(p.np, run(g, 1), nr),
    "test_clear_young": lambda p, g, nr: p.hyp.test_clear_young(p.np, run(g, 1), nr, True),
}
SIZED_EXPECTED: dict[tuple[str, int], tuple[Errno, ...]] = {
    #                            absent  np      np_block   gfn not aligned
    ("host_share_guest", 1):    (OK,     EPERM,  EPERM,     OK),
    ("host_share_guest", 512):  (OK,     EPERM,  EPERM,     EINVAL),
    ("host_share_guest", 2):    (EINVAL, EINVAL, EINVAL,    EINVAL),
    ("host_unshare_guest", 1):  (ENOENT, OK,     E2BIG,     ENOENT),
    ("host_unshare_guest", 512): (ENOENT, E2BIG, OK,        EINVAL),
    ("host_unshare_guest", 2):  (EINVAL, EINVAL, EINVAL,    EINVAL),
    ("wrprotect", 1):           (OK,     OK,     OK,        OK),
    ("wrprotect", 512):         (OK,     OK,     OK,        EINVAL),
    ("wrprotect", 2):           (EINVAL, EINVAL, EINVAL,    EINVAL),
    ("test_clear_young", 1):    (OK,     OK,     OK,        OK),
    ("test_clear_young", 512):  (OK,     OK,     OK,        EINVAL),
    ("test_clear_young", 2):    (EINVAL, EINVAL, EINVAL,    EINVAL),
}  # fmt: skip


@pytest.mark.parametrize("state", ["absent", "np", "np_block", "not aligned"])
@pytest.mark.parametrize(("op", "nr"), SIZED_EXPECTED)
def test_sizes_in_every_combination(make_rig: Any, op: str, nr: int, state: str) -> None:
    page = Page(make_rig(), "plain")
    at_gfn(page, "absent" if state == "not aligned" else state)
    gfn = AT + 1 if state == "not aligned" else AT

    result = outcome(page, lambda: SIZED_OPS[op](page, gfn, nr))

    assert result.status == SIZED_EXPECTED[op, nr][("absent", "np", "np_block", "not aligned").index(state)]
    page.hyp.check_legal()


# ---- what each transition leaves ----------------------------------------------------------------------------------

AFTER: dict[str, tuple[str, int, int]] = {
    # from which state, then the frame's byte (host in bits 1:0, hyp in 5:4), and the guest's leaf
    "host_share_hyp":     ("plain",       0x11, 0),
    "host_unshare_hyp":   ("hyp_shared",  0x00, 0),
    "hyp_pin":            ("hyp_shared",  0x11, 0),
    "host_donate_hyp":    ("plain",       0x33, 0),
    "hyp_donate_host":    ("hyp",         0x00, 0),
    "host_share_ffa":     ("plain",       0x01, 0),
    "host_unshare_ffa":   ("ffa",         0x00, 0),
    "host_donate_guest":  ("plain",       0x03, 2),
    "host_share_guest":   ("plain",       0x01, 16 | 8 | 7),
    "share_guest, again": ("np",          0x01, 16 | 8 | 7),
    "host_unshare_guest": ("np",          0x00, 0),
    "guest_share_host":   ("private",     0x02, 3),
    "guest_unshare_host": ("shared_back", 0x03, 2),
    "host_reclaim_guest": ("private",     0x00, 0),
    "reclaim, if shared": ("shared_back", 0x00, 0),
    "host_force_reclaim": ("private",     0x00, 1),
    "mkyoung":            ("np",          0x01, 16 | 8 | 7),
    "wrprotect":          ("np",          0x01, 16 | 8 | 5),
    "test_clear_young":   ("np",          0x01, 16 | 7),
    "relax_perms":        ("np",          0x01, 16 | 8 | 7),
}  # fmt: skip


@pytest.mark.parametrize("name", AFTER)
def test_what_each_transition_leaves(make_rig: Any, name: str) -> None:
    state, byte, leaf = AFTER[name]
    page = Page(make_rig(), state)
    op, gfn = name, GFN
    if name == "reclaim, if shared":
        op = "host_reclaim_guest"
    elif name == "share_guest, again":
        op = "host_share_guest"

    if op in GUEST_OPS and op not in FRAME_OPS:
        assert GUEST_OPS[op](page, GFN).ok
    else:
        assert FRAME_OPS[op](page).ok
        gfn = FREE_GFN if op in ("host_donate_guest", "host_share_guest") else GFN

    assert page.hyp.frame[PFN] & 0x33 == byte
    vm = page.rig.vm(page.np if state == "np" or op == "host_share_guest" else page.pvm)
    words = vm.stage2.pages
    assert (int(words[gfn]) & 31 if gfn < len(words) else 0) == leaf
    if name in TRANSITIONS:  # as the table has it, also where the code changes nothing, or writes zero
        row = TRANSITIONS[name]
        bits = 0x33 if row.after[1] is not None else 0x03
        assert row.result & bits == byte & bits
        assert row.new_leaf == (leaf & LEAF_BORROWED or leaf)
    page.hyp.check_legal()
