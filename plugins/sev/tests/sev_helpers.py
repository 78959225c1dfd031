"""RMP entries in every state, made by the operations that make them; shared by the tests."""

from __future__ import annotations

import numpy as np

from cvmcore.memory import Memory
from cvmcore.pages import Sel, run
from cvmcore.types import PG_LEVEL_2M, PG_LEVEL_4K
from cvmcore_sev.errors import PageState
from cvmcore_sev.hw import Rmp, SevHardware

NR_FRAMES = 8 * 512 + 100
"""The last region is covered in part only."""


def hardware(**firmware: object) -> SevHardware:
    return SevHardware(Memory(NR_FRAMES), **firmware)


def make(hw: SevHardware, state: PageState, pfn: int, *, gfn: int = 0, asid: int = 1, level: int = PG_LEVEL_4K) -> None:
    """Bring one page of `level` into a state, from Hypervisor."""
    rmp, psp, page = hw.rmp, hw.psp, run(pfn, 1)

    def update(assigned: bool = True, asid: int = 0, immutable: bool = False, gfn: int = 0) -> None:
        done = rmp.rmpupdate(page, gfn, assigned=assigned, asid=asid, level=level, immutable=immutable)
        assert done.done == 1, done

    if state == PageState.HV_FIXED:
        assert psp.snp_page_set_state(page).done == 1
    elif state in (PageState.FIRMWARE, PageState.CONTEXT, PageState.RECLAIM, PageState.METADATA):
        update(immutable=True)
        if state == PageState.CONTEXT:
            assert psp.snp_gctx_create(pfn) == 0
        elif state == PageState.RECLAIM:
            assert psp.snp_page_reclaim(page, level).done == 1
        elif state == PageState.METADATA:
            rmp.gfn[pfn] = gfn or 0x77  # MD_INIT is not modelled: the firmware writes the owner's address
    elif state == PageState.PRE_GUEST:
        update(asid=asid, immutable=True, gfn=gfn)
    elif state in (PageState.GUEST_INVALID, PageState.GUEST_VALID, PageState.PRE_SWAP):
        update(asid=asid, gfn=gfn)
        if state != PageState.GUEST_INVALID:
            gfns = run(gfn, 1, 512 if level == PG_LEVEL_2M else 1)
            answer = rmp.pvalidate(page, gfns, asid=asid, validate=True, level=level)
            assert not np.count_nonzero(answer)
        if state == PageState.PRE_SWAP:
            update(asid=asid, gfn=gfn, immutable=True)
    assert int(rmp.state(page)[0]) == state


def snapshot(rmp: Rmp) -> dict[str, object]:
    """All that can be seen of an RMP."""
    everything: Sel = run(0, rmp.covered)
    entries = rmp.rmpread(everything)
    perms = rmp._perms_of(np.arange(rmp.covered))
    return {
        "word": rmp.word[: rmp.covered].tolist(),
        "gfn": entries.gfn.tolist(),
        "perms": perms.tolist(),
        "asid_pages": rmp.asid_pages.tolist(),
        "nr_assigned": rmp.nr_assigned,
    }
