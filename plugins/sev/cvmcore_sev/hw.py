"""The trusted hardware of AMD SEV: the reverse map table (RMP) and the secure processor (PSP).

Both are usable alone, under their specs' names, and know nothing of KVM. Sources: APM vol. 2 15.36 and vol. 3 (RMP
instructions, access checks), the SEV API and the SEV-SNP firmware ABI with AMD's published firmware (commands).

Host instructions (RMPUPDATE, PSMASH) and firmware commands take pages in order and stop at the first that fails.
Guest instructions (PVALIDATE, RMPADJUST, RMPQUERY) and access checks answer page by page: pages do not touch each
other there, so each stands for itself. `pfns` of one call are distinct frames; `Sel` and its rules: `cvmcore.pages`.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, Final, ParamSpec, TypeAlias, TypeVar

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.effects import Lock, Steps, operation
from cvmcore.memory import Memory
from cvmcore.pages import Sel, array_of, blocks, contiguous, count, expand, heads, part, run, take, zeros
from cvmcore.types import PAGE_BYTES, PAGES_2M, PG_LEVEL_2M, PG_LEVEL_4K
from cvmcore_sev.errors import AsidState, PageState, PageType, RmpStatus, SevGuestState, SevStatus, SnpGuestState

P = ParamSpec("P")
R = TypeVar("R")

Word: TypeAlias = npt.NDArray[np.uint16]
Mask: TypeAlias = npt.NDArray[np.bool_]
Codes: TypeAlias = npt.NDArray[np.uint8]
Facts: TypeAlias = Mapping[str, "Mask | bool"]
Answer: TypeAlias = int | Codes
"""One status for all pages, or a uint8 array with one for each."""

# ---- the RMP entry --------------------------------------------------------------------------------------------

ASID: Final = 0x03FF
ASSIGNED, VALIDATED, IMMUTABLE, SIZE_2M, VMSA, LOCKED = (1 << bit for bit in range(10, 16))
"""An entry without its gpa and permissions, as one 16-bit word: ASID in bits 9:0, then the state bits."""
NR_ASIDS: Final = 1024
_IDENTITY: Final = np.uint16(0xFFFF & ~(VALIDATED | VMSA))
_UNCOVERED: Final = IMMUTABLE | LOCKED
_FAR: Final = 0xFFFF_FFFF
"""gfns from here on (a VMSA's gpa is 0xFFFFFFFFF000) are kept in a dict beside the 32-bit array."""
VMSA_GFN: Final = 0xF_FFFF_FFFF

PERM_READ, PERM_WRITE, PERM_USER_EXEC, PERM_SUPERVISOR_EXEC, PERM_SHADOW_STACK = (1 << bit for bit in range(5))
PERM_ALL: Final = 0x1F
NR_VMPLS: Final = 4
_NEEDED_PERMS: Final = {
    "read": PERM_READ,
    "write": PERM_READ | PERM_WRITE,
    "user_exec": PERM_READ | PERM_USER_EXEC,
    "supervisor_exec": PERM_READ | PERM_SUPERVISOR_EXEC,
}

_ANY = None
PAGE_STATES: Final[Sequence[tuple[PageState, int, int, int, int, int | None, int | None]]] = (
    # state                  assigned validated asid>0 immutable gpa>0 vmsa
    (PageState.HYPERVISOR, 0, 0, 0, 0, _ANY, _ANY),
    (PageState.HV_FIXED, 0, 0, 0, 1, _ANY, _ANY),
    (PageState.FIRMWARE, 1, 0, 0, 1, 0, 0),
    (PageState.CONTEXT, 1, 0, 0, 1, 0, 1),
    (PageState.METADATA, 1, 0, 0, 1, 1, _ANY),
    (PageState.RECLAIM, 1, 0, 0, 0, _ANY, _ANY),
    (PageState.PRE_GUEST, 1, 0, 1, 1, _ANY, _ANY),
    (PageState.GUEST_INVALID, 1, 0, 1, 0, _ANY, _ANY),
    (PageState.GUEST_VALID, 1, 1, 1, 0, _ANY, _ANY),
    (PageState.PRE_SWAP, 1, 1, 1, 1, _ANY, _ANY),
)


def _state_lookup() -> Codes:
    """PAGE_STATES by the six columns as bits of an index."""
    lookup = np.full(64, PageState.DEFAULT, np.uint8)
    for state, *columns in PAGE_STATES:
        for index in range(64):
            if all(want is None or want == (index >> bit) & 1 for bit, want in enumerate(columns)):
                lookup[index] = state
    return lookup


_STATE_OF: Final = _state_lookup()

# ---- the checks, in order -------------------------------------------------------------------------------------
# Each row: a fact that is known of every page of a batch, and the answer if it holds. The first row that holds wins.

Checks: TypeAlias = Sequence[tuple[str, int]]

RMPUPDATE_CHECKS: Final[Checks] = (
    ("2M and sPA not 2M aligned", RmpStatus.FAIL_INPUT),
    ("assigned=0 with immutable=1 or asid!=0", RmpStatus.FAIL_INPUT),
    ("not covered", RmpStatus.FAIL_INPUT),
    ("locked, or in use by a running vCPU", RmpStatus.FAIL_INUSE),
    ("old immutable", RmpStatus.FAIL_PERMISSION),
    ("4K inside an assigned 2M page", RmpStatus.FAIL_OVERLAP),
    ("4K unassigned, region base held by firmware", RmpStatus.FAIL_PERMISSION),
    ("2M over pages that are not free", RmpStatus.FAIL_OVERLAP),
)
PSMASH_CHECKS: Final[Checks] = (
    ("not covered", RmpStatus.FAIL_INPUT),
    ("locked, or in use by a running vCPU", RmpStatus.FAIL_INUSE),
    ("base is not an assigned 2M page", RmpStatus.FAIL_BADADDR),
    ("immutable", RmpStatus.FAIL_PERMISSION),
)
_OWNERSHIP: Final[Checks] = (
    ("not covered", RmpStatus.NPF_RMP),
    ("entry in use", RmpStatus.NPF_RMP),
    ("unassigned", RmpStatus.NPF_RMP),
    ("foreign asid", RmpStatus.NPF_RMP),
    ("other gpa", RmpStatus.NPF_RMP),
    ("immutable", RmpStatus.NPF_RMP),
)
PVALIDATE_CHECKS: Final[Checks] = (
    ("2M and GVA not 2M aligned", RmpStatus.FAIL_INPUT),
    ("VMPL is not 0", RmpStatus.FAIL_PERMISSION),
    *_OWNERSHIP,
    ("asks 4K, RMP page 2M", RmpStatus.NPF_SIZEM),
    ("asks 2M, RMP page 4K", RmpStatus.FAIL_SIZEMISMATCH),
    ("already in the requested state", RmpStatus.NO_CHANGE),
)
RMPADJUST_CHECKS: Final[Checks] = (
    ("2M and GVA not 2M aligned", RmpStatus.FAIL_INPUT),
    ("no such VMPL", RmpStatus.FAIL_INPUT),
    ("target VMPL not below the caller's", RmpStatus.FAIL_PERMISSION),
    *_OWNERSHIP,
    ("asks 4K, RMP page 2M", RmpStatus.NPF_SIZEM),
    ("asks 2M, RMP page 4K", RmpStatus.FAIL_SIZEMISMATCH),
    ("not validated", RmpStatus.VC),
    ("more than the caller's own permissions", RmpStatus.FAIL_PERMISSION),
)
RMPQUERY_CHECKS: Final[Checks] = (*_OWNERSHIP, ("not validated", RmpStatus.VC))
ACCESS_CHECKS: Final[Checks] = (
    *_OWNERSHIP,
    ("sizes of NPT and RMP differ", RmpStatus.NPF_SIZEM),
    ("not validated", RmpStatus.VC),
    ("not permitted at this VMPL", RmpStatus.NPF_VMPL),
)
VMRUN_CHECKS: Final[Checks] = (
    ("not covered", RmpStatus.VMEXIT_INVALID),
    ("entry in use", RmpStatus.VMEXIT_INVALID),
    ("unassigned", RmpStatus.VMEXIT_INVALID),
    ("foreign asid", RmpStatus.VMEXIT_INVALID),
    ("other gpa", RmpStatus.VMEXIT_INVALID),
    ("immutable", RmpStatus.VMEXIT_INVALID),
    ("vmsa is 0", RmpStatus.VMEXIT_INVALID),
)


def first_code(checks: Checks, facts: Facts, n: int) -> Codes:
    """For each of n pages the answer of the first check whose fact holds, 0 where none does (uint8)."""
    codes = np.zeros(n, np.uint8)
    for name, code in reversed(checks):
        fact = facts.get(name, False)
        if fact is not False:
            codes[fact] = code
    return codes


def _stop(codes: Codes, stop_at: Sequence[int]) -> None:
    """Make NOT_REACHED what a guest that stops at some codes never comes to."""
    stops = np.isin(codes, stop_at) if stop_at else np.zeros(1, bool)
    if np.count_nonzero(stops):
        end = int(np.argmax(stops)) + 1
        if codes[end - 1] == RmpStatus.FAIL_SIZEMISMATCH:
            others = codes[end:] != RmpStatus.FAIL_SIZEMISMATCH
            end = end + int(np.argmax(others)) if np.count_nonzero(others) else len(codes)
        codes[end:] = RmpStatus.NOT_REACHED


@attrs.frozen
class Progress:
    """The first `done` pages are done; the page after them, if there is one, was refused with `status`."""

    done: int
    status: RmpStatus


@attrs.frozen
class Command:
    """The first `done` pages of a firmware command are done; then it ended with `status`."""

    done: int
    status: SevStatus


@attrs.frozen(eq=False)
class RmpEntries:
    """What RMPREAD shows of pages: arrays with one element for each.

    gfn: int64; assigned, immutable, hpage_region_status (something in the 2M region is assigned): bool; level: uint8;
    asid: uint16. A page of a 2M page is shown as part of it.
    """

    gfn: npt.NDArray[np.int64]
    assigned: Mask
    level: Codes
    immutable: Mask
    asid: Word
    hpage_region_status: Mask


@attrs.frozen(eq=False)
class _Entries:
    """The entries that rule over some pages: the page's own, or that of the 2M page it is part of."""

    pages: npt.NDArray[np.int64]
    index: npt.NDArray[np.int64]
    word: Word
    large: Mask
    covered: Mask

    def has(self, bits: int) -> Mask:
        found: Mask = (self.word & np.uint16(bits)) != 0
        return found


def _levels(entries: _Entries) -> Codes:
    levels: Codes = np.where(entries.large, PG_LEVEL_2M, PG_LEVEL_4K).astype(np.uint8)
    return levels


def _held(words: Word) -> Mask:
    """Entries that are locked or HV-Fixed: as a region's base they forbid 4K RMPUPDATEs of its other pages."""
    held: Mask = (words & np.uint16(LOCKED)) != 0
    held |= (words & np.uint16(IMMUTABLE | ASSIGNED)) == IMMUTABLE
    return held


def _u32(gfns: Sel | int) -> npt.NDArray[np.uint32] | np.uint32 | None:
    """gfns as the RMP stores them; None where one is too large for 32 bits."""
    if isinstance(gfns, int):
        return np.uint32(gfns) if gfns < _FAR else None
    if isinstance(gfns, slice):
        if gfns.stop > _FAR:
            return None
        return np.arange(gfns.start, gfns.stop, gfns.step or 1, dtype=np.uint32)
    return gfns.astype(np.uint32) if int(gfns.max(initial=0)) < _FAR else None


def _pages(gfns: Sel | int, n: int) -> npt.NDArray[np.int64]:
    return np.full(n, gfns, np.int64) if isinstance(gfns, int) else array_of(gfns)


def _part(gfns: Sel | int, start: int, stop: int) -> Sel | int:
    return gfns if isinstance(gfns, int) else part(gfns, start, stop)


def _guest(asid: int, vmpl: int = 0) -> None:
    """A guest has an ASID above 0 and runs at a VMPL: anything else would name another field of an entry."""
    if not 0 < asid < NR_ASIDS or not 0 <= vmpl < NR_VMPLS:
        raise ValueError(f"no guest has ASID {asid} and runs at VMPL {vmpl}")


class Rmp:
    """The reverse map table: one entry for each 4K frame of the machine, zero (hypervisor) at first.

    word: uint16 by pfn (ASID and state bits), gfn: uint32 by pfn, without meaning where the page is unassigned. A 2M
    page is the entry at its aligned base; the other 511 only mirror `assigned`. asid_pages: assigned 4K pages by ASID
    (the counters at the table's start).
    """

    def __init__(self, nr_frames: int, *, covered_frames: int | None = None) -> None:
        """A table for nr_frames frames, or only the first covered_frames of them."""
        self.covered = nr_frames if covered_frames is None else covered_frames
        size = (-(-self.covered // PAGES_2M) + 1) * PAGES_2M
        self.word: Word = zeros(size, np.uint16)
        self.gfn: npt.NDArray[np.uint32] = zeros(size, np.uint32)
        self.word[self.covered :] = _UNCOVERED
        self._regions = self.word.reshape(-1, PAGES_2M)
        self._far: dict[int, int] = {}
        self._perms: Codes | None = None
        """Permission bytes by pfn and VMPL, XOR the default of VMPL0 all, others none; made by the first RMPADJUST."""
        self.asid_pages: npt.NDArray[np.int64] = np.zeros(NR_ASIDS, np.int64)
        self._held_bases = 0
        """2M-aligned entries that are locked or HV-Fixed."""
        self.nr_assigned = 0
        """Assigned 4K pages of all owners."""

    # ---- looking at entries -----------------------------------------------------------------------------------

    def _words(self, pfns: Sel) -> Word:
        """Words of the pages' own entries; beyond the table they read as uncovered. A view for a run."""
        if isinstance(pfns, slice):
            if pfns.stop <= len(self.word):
                return self.word[pfns]
            pfns = array_of(pfns)
        words: Word = self.word.take(pfns, mode="clip")
        return words

    def _entries(self, pfns: Sel) -> _Entries:
        pages = array_of(pfns)
        own = np.minimum(pages, len(self.word) - 1)
        base = own & ~(PAGES_2M - 1)
        large = (self.word.take(base) & np.uint16(SIZE_2M)) != 0
        index = np.where(large, base, own)
        return _Entries(pages, index, self.word.take(index), large, pages < self.covered)

    def _gfn_at(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The gfns that entries hold."""
        gfns = self.gfn.take(index).astype(np.int64)
        for i in np.flatnonzero(gfns == _FAR).tolist():
            gfns[i] = self._far[int(index[i])]
        return gfns

    def _gfns(self, entries: _Entries) -> npt.NDArray[np.int64]:
        """The gfn that each page stands for."""
        return self._gfn_at(entries.index) + np.where(entries.covered, entries.pages - entries.index, 0)

    def _perms_of(self, index: npt.NDArray[np.int64]) -> Codes:
        """Permission bytes (n x 4) of entries."""
        perms = np.zeros((len(index), NR_VMPLS), np.uint8) if self._perms is None else self._perms[index]
        perms[:, 0] ^= PERM_ALL
        return perms

    def rmpread(self, pfns: Sel) -> RmpEntries:
        """RMPREAD: the stable view of entries, for the host."""
        entries = self._entries(pfns)
        assigned = entries.has(ASSIGNED)
        return RmpEntries(
            gfn=np.where(assigned, self._gfns(entries), 0),
            assigned=assigned,
            level=_levels(entries),
            immutable=entries.has(IMMUTABLE) & entries.covered,
            asid=np.where(entries.covered, entries.word & np.uint16(ASID), 0).astype(np.uint16),
            hpage_region_status=self.hpage_region_status(pfns),
        )

    def hidden(self, pfns: Sel) -> tuple[Mask, Mask, Codes]:
        """What RMPREAD keeps from the host: validated, vmsa, and the permissions of the four VMPLs, of each page."""
        entries = self._entries(pfns)
        validated, vmsa = (entries.has(bit) & entries.covered for bit in (VALIDATED, VMSA))
        return validated, vmsa, self._perms_of(entries.index)

    def hpage_region_status(self, pfns: Sel) -> Mask:
        """RMPREAD's field of that name: whether something in the 2M region of each page is assigned."""
        region, back = np.unique(np.minimum(array_of(pfns), len(self.word) - 1) >> 9, return_inverse=True)
        used: Mask = np.count_nonzero(self._regions[contiguous(region)] & np.uint16(ASSIGNED), axis=1) != 0
        return used[back]

    def assigned(self, pfns: Sel) -> bool | Mask:
        """RMPREAD's `assigned`: one bool where all pages agree, else one for each."""
        words = self._words(pfns)
        if not np.count_nonzero(words):
            return False
        found = (words & np.uint16(ASSIGNED)) != 0
        n = np.count_nonzero(found)
        return bool(n) if n in (0, len(found)) else found

    def levels(self, pfns: Sel) -> int | Codes:
        """RMPREAD's page size as PG_LEVEL_4K or 2M: one where all pages agree, else one for each."""
        if isinstance(pfns, slice) and (pfns.step or 1) <= PAGES_2M:
            bases = self._words(heads(blocks(pfns, 9), 9))
        else:
            bases = self._words(array_of(pfns) & ~(PAGES_2M - 1))
        large = int(np.count_nonzero(bases & np.uint16(SIZE_2M)))
        if large in (0, len(bases)):
            return PG_LEVEL_2M if large else PG_LEVEL_4K
        return _levels(self._entries(pfns))

    def state(self, pfns: Sel) -> Codes:
        """PageState of each page (firmware ABI), derived from the entries' bits."""
        entries = self._entries(pfns)
        index = np.zeros(len(entries.pages), np.uint8)
        columns = (
            entries.has(ASSIGNED),
            entries.has(VALIDATED),
            entries.has(ASID),
            entries.has(IMMUTABLE),
            self.gfn.take(entries.index) != 0,
            entries.has(VMSA),
        )
        for bit, column in enumerate(columns):
            index |= column.astype(np.uint8) << np.uint8(bit)
        return np.where(entries.covered, _STATE_OF[index], np.uint8(PageState.DEFAULT))

    # ---- RMPUPDATE --------------------------------------------------------------------------------------------

    def rmpupdate(
        self,
        pfns: Sel,
        gfns: Sel | int = 0,
        *,
        assigned: bool,
        asid: int = 0,
        level: int = PG_LEVEL_4K,
        immutable: bool = False,
    ) -> Progress:
        """RMPUPDATE of pages of `level` in order, up to the first refused (APM vol. 3; checks: RMPUPDATE_CHECKS).

        pfns: first 4K frame of each page. gfns: the page's gpa >> 12, one for all (int) or one each.
        """
        n = count(pfns)
        if not 0 <= asid <= ASID or level not in (PG_LEVEL_4K, PG_LEVEL_2M):
            raise ValueError(f"RMPUPDATE has no asid {asid} or page size {level}")
        if n == 0:
            return Progress(0, RmpStatus.OK)
        word = 0
        if assigned:
            word = ASSIGNED | asid | (IMMUTABLE if immutable else 0) | (SIZE_2M if level == PG_LEVEL_2M else 0)
        if level == PG_LEVEL_4K and self._update_uniform(pfns, gfns, word, n, immutable or asid != 0):
            return Progress(n, RmpStatus.OK)
        codes = self._rmpupdate_codes(pfns, assigned, level, not assigned and (immutable or asid != 0))
        done = int(np.argmax(codes != 0)) if np.count_nonzero(codes) else n
        if done:
            update = self._update_2m if level == PG_LEVEL_2M else self._update_4k
            update(array_of(part(pfns, 0, done)), _pages(_part(gfns, 0, done), done), word)
        return Progress(done, RmpStatus(int(codes[done])) if done < n else RmpStatus.OK)

    def _update_uniform(self, pfns: Sel, gfns: Sel | int, word: int, n: int, owned: bool) -> bool:
        """The two common cases, 4K pages that are all free, or all one guest's: False where they are not that."""
        old = self._words(pfns)
        if word:
            if self._held_bases or np.count_nonzero(old):
                return False
            stored = _u32(gfns)
            if stored is None:
                return False
            self.word[pfns] = word
            self.gfn[pfns] = stored
            self._count(word, n)
            return True
        was = int(old[0]) & int(_IDENTITY)
        if owned or was & ~ASID != ASSIGNED or was == ASSIGNED:
            return False
        if np.count_nonzero(old != old[0]) and np.count_nonzero(old & _IDENTITY != was):
            return False
        self.word[pfns] = 0
        if self._perms is not None:
            self._perms[pfns] = 0
        self._count(was, -n)
        return True

    def _rmpupdate_codes(self, pfns: Sel, assigned: bool, level: int, contradiction: bool) -> Codes:
        pages = array_of(pfns)
        own = self._words(pfns)
        base = self._words(pages & ~(PAGES_2M - 1))
        inside = (base & np.uint16(SIZE_2M)) != 0
        free = (own & np.uint16(ASSIGNED)) == 0
        facts: dict[str, Mask | bool] = {
            "assigned=0 with immutable=1 or asid!=0": contradiction,
            "locked, or in use by a running vCPU": (own & np.uint16(LOCKED)) != 0,
            "old immutable": (own & np.uint16(IMMUTABLE)) != 0,
        }
        if level == PG_LEVEL_2M:
            whole = (pages | (PAGES_2M - 1)) < self.covered
            regions = self._regions[np.where(whole, pages >> 9, len(self._regions) - 1)]
            facts["2M and sPA not 2M aligned"] = (pages & (PAGES_2M - 1)) != 0
            facts["not covered"] = ~whole
            facts["2M over pages that are not free"] = ~inside & (np.count_nonzero(regions, axis=1) != 0)
        else:
            facts["not covered"] = pages >= self.covered
            facts["4K inside an assigned 2M page"] = inside
            facts["4K unassigned, region base held by firmware"] = free & _held(base)
        return first_code(RMPUPDATE_CHECKS, facts, len(pages))

    def _kept(self, old: Word, pages: npt.NDArray[np.int64], gfns: npt.NDArray[np.int64], word: int) -> Mask:
        """Where an assignment changes nothing but `immutable`, so that validated, vmsa and permissions stay."""
        same: Mask = (old & np.uint16(0xFFFF & ~(VALIDATED | VMSA | IMMUTABLE))) == (word & ~IMMUTABLE)
        same &= (self._gfn_at(pages) == gfns) & (word & ASID != 0)
        return same

    def _count(self, word: int, n: int) -> None:
        if word & ASSIGNED:
            self.asid_pages[word & ASID] += n
            self.nr_assigned += n

    def _uncount(self, words: Word, pages_each: int) -> None:
        words = words[(words & np.uint16(ASSIGNED)) != 0]
        if len(words):
            self.asid_pages -= np.bincount(words & np.uint16(ASID), minlength=NR_ASIDS) * pages_each
            self.nr_assigned -= len(words) * pages_each

    def _store_gfns(self, pages: npt.NDArray[np.int64], gfns: npt.NDArray[np.int64]) -> None:
        self.gfn[pages] = np.minimum(gfns, _FAR).astype(np.uint32)
        for i in np.flatnonzero(gfns >= _FAR).tolist():
            self._far[int(pages[i])] = int(gfns[i])

    def _update_4k(self, pages: npt.NDArray[np.int64], gfns: npt.NDArray[np.int64], word: int) -> None:
        old = self.word.take(pages)
        kept = self._kept(old, pages, gfns, word)
        self._uncount(old, 1)
        self._count(word, len(pages))
        self.word[pages] = np.where(kept, old & np.uint16(VALIDATED | VMSA), 0) | np.uint16(word)
        if self._perms is not None:
            self._perms[pages[~kept]] = 0
        if word:
            self._store_gfns(pages, gfns)

    def _update_2m(self, pages: npt.NDArray[np.int64], gfns: npt.NDArray[np.int64], word: int) -> None:
        old = self.word.take(pages)
        kept = self._kept(old, pages, gfns, word)
        perms = self._perms_of(pages)
        self._uncount(old, PAGES_2M)
        self._count(word, len(pages) * PAGES_2M)
        everything = expand(pages, 9)
        self._regions[pages >> 9] = word & ASSIGNED
        self.word[pages] = np.where(kept, old & np.uint16(VALIDATED | VMSA), 0) | np.uint16(word)
        if self._perms is not None:
            self._perms[everything] = 0
            perms[:, 0] ^= PERM_ALL
            self._perms[pages[kept]] = perms[kept]
        if word:
            self._store_gfns(pages, gfns)

    # ---- PSMASH -----------------------------------------------------------------------------------------------

    def psmash(self, pfns: Sel) -> Progress:
        """PSMASH: 2M entries become 512 4K entries of the same state, in order, up to the first refused.

        pfns: any 4K frame of each 2M region, one for each.
        """
        pages = array_of(pfns) & ~(PAGES_2M - 1)
        words = self._words(pages)
        facts: Facts = {
            "not covered": (pages | (PAGES_2M - 1)) >= self.covered,
            "locked, or in use by a running vCPU": (words & np.uint16(LOCKED)) != 0,
            "base is not an assigned 2M page": (words & np.uint16(SIZE_2M)) == 0,
            "immutable": (words & np.uint16(IMMUTABLE)) != 0,
        }
        codes = first_code(PSMASH_CHECKS, facts, len(pages))
        done = int(np.argmax(codes != 0)) if np.count_nonzero(codes) else len(pages)
        pages, words = pages[:done], words[:done]
        self._regions[pages >> 9] = (words & np.uint16(0xFFFF & ~SIZE_2M))[:, None]
        self._store_gfns(array_of(expand(pages, 9)), array_of(expand(self._gfn_at(pages), 9)))
        if self._perms is not None:
            self._perms[expand(pages, 9)] = np.repeat(self._perms[pages], PAGES_2M, axis=0)
        return Progress(done, RmpStatus(int(codes[done])) if done < len(codes) else RmpStatus.OK)

    # ---- PVALIDATE, RMPADJUST, RMPQUERY -------------------------------------------------------------------------

    def _all_are(self, pfns: Sel, gfns: Sel, word: int) -> bool:
        """Whether the pages' own entries all have this word and stand for these gfns."""
        words = self._words(pfns)
        if np.count_nonzero(words != np.uint16(word)):
            return False
        stored = _u32(gfns)
        return stored is not None and not np.count_nonzero(take(self.gfn, pfns) != stored)

    def _all_within(self, pfns: Sel, gfns: Sel, word: int) -> bool:
        """The same of 4K pages of 2M pages: their regions' bases have this word and stand for the gfns' blocks."""
        if isinstance(pfns, slice) and isinstance(gfns, slice):
            if (pfns.start - gfns.start) % PAGES_2M or (pfns.step or 1) != 1 or (gfns.step or 1) != 1:
                return False
            return self._all_are(heads(blocks(pfns, 9), 9), heads(blocks(gfns, 9), 9), word)
        inside = array_of(pfns) & (PAGES_2M - 1)
        return self._all_are(array_of(pfns) - inside, array_of(gfns) - inside, word)

    def _ownership(self, entries: _Entries, gfns: Sel, asid: int) -> dict[str, Mask | bool]:
        return {
            "not covered": ~entries.covered,
            "entry in use": entries.has(LOCKED),
            "unassigned": ~entries.has(ASSIGNED),
            "foreign asid": (entries.word & np.uint16(ASID)) != asid,
            "other gpa": self._gfns(entries) != array_of(gfns),
            "immutable": entries.has(IMMUTABLE),
        }

    def _operand(self, entries: _Entries, gfns: Sel, asid: int, level: int) -> dict[str, Mask | bool]:
        """Facts of a guest instruction's page operand."""
        facts = self._ownership(entries, gfns, asid)
        if level == PG_LEVEL_2M:
            facts["2M and GVA not 2M aligned"] = (array_of(gfns) & (PAGES_2M - 1)) != 0
            facts["asks 2M, RMP page 4K"] = ~entries.large
        else:
            facts["asks 4K, RMP page 2M"] = entries.large
        return facts

    def pvalidate(
        self,
        pfns: Sel,
        gfns: Sel,
        *,
        asid: int,
        validate: bool,
        level: int = PG_LEVEL_4K,
        vmpl: int = 0,
        stop_at: Sequence[int] = (),
    ) -> Answer:
        """PVALIDATE by a guest, page by page (checks: PVALIDATE_CHECKS). Returns RmpStatus; NO_CHANGE is carry set.

        gfns: first 4K gfn of each page; the GVA's alignment is taken from it. pfns: the frames that the nested page
        table gives for them. stop_at: the guest goes on behind no page with such a status; later ones are NOT_REACHED.
        Several 2M pages in a row that are 4K pages in the RMP are still answered, for the guest to go on in 4K.
        """
        _guest(asid, vmpl)
        size = SIZE_2M if level == PG_LEVEL_2M else 0
        was = ASSIGNED | asid | size | (0 if validate else VALIDATED)
        aligned = not size or (isinstance(gfns, slice) and not gfns.start % PAGES_2M and gfns.step == PAGES_2M)
        if vmpl == 0 and aligned and self._all_are(pfns, gfns, was):
            self.word[pfns] = was ^ VALIDATED
            return RmpStatus.OK
        entries = self._entries(pfns)
        facts = self._operand(entries, gfns, asid, level)
        facts["VMPL is not 0"] = vmpl != 0
        facts["already in the requested state"] = entries.has(VALIDATED) == validate
        codes = first_code(PVALIDATE_CHECKS, facts, len(entries.pages))
        _stop(codes, stop_at)
        self.word[entries.index[codes == 0]] ^= np.uint16(VALIDATED)
        return codes

    def rmpadjust(
        self,
        pfns: Sel,
        gfns: Sel,
        *,
        asid: int,
        target_vmpl: int,
        perms: int,
        vmsa: bool = False,
        level: int = PG_LEVEL_4K,
        vmpl: int = 0,
    ) -> Answer:
        """RMPADJUST by a guest at `vmpl`, page by page: permissions of a lower VMPL, and from VMPL0 the vmsa bit."""
        _guest(asid, vmpl)
        if not 0 <= perms <= PERM_ALL or target_vmpl < 0:
            raise ValueError(f"permissions have 5 bits and a VMPL is a number: {perms}, {target_vmpl}")
        entries = self._entries(pfns)
        own = self._perms_of(entries.index)[:, vmpl]
        facts = self._operand(entries, gfns, asid, level)
        facts["no such VMPL"] = target_vmpl >= NR_VMPLS
        facts["target VMPL not below the caller's"] = target_vmpl <= vmpl
        facts["not validated"] = ~entries.has(VALIDATED)
        facts["more than the caller's own permissions"] = (perms & ~own) != 0
        codes = first_code(RMPADJUST_CHECKS, facts, len(entries.pages))
        done = entries.index[codes == 0]
        if len(done):
            if self._perms is None:
                self._perms = zeros(len(self.word) * NR_VMPLS, np.uint8).reshape(-1, NR_VMPLS)
            self._perms[done, target_vmpl] = perms
            if vmpl == 0:
                self.word[done] = (self.word[done] & np.uint16(0xFFFF & ~VMSA)) | np.uint16(VMSA if vmsa else 0)
        return codes

    def rmpquery(self, pfns: Sel, gfns: Sel, *, asid: int, target_vmpl: int) -> tuple[Codes, Codes, Codes]:
        """RMPQUERY by a guest: status, permissions of `target_vmpl` and level of each page (0 where refused)."""
        _guest(asid, target_vmpl)
        entries = self._entries(pfns)
        facts = self._ownership(entries, gfns, asid)
        facts["not validated"] = ~entries.has(VALIDATED)
        codes = first_code(RMPQUERY_CHECKS, facts, len(entries.pages))
        perms = self._perms_of(entries.index)[:, target_vmpl]
        level = _levels(entries)
        perms[codes != 0] = 0
        level[codes != 0] = 0
        return codes, perms, level

    # ---- access checks (APM vol. 2 15.36.10) --------------------------------------------------------------------

    def check_host(self, pfns: Sel, write: bool, level: int = PG_LEVEL_4K) -> Answer:
        """The host's access to 4K frames through mappings of `level`: writes need hypervisor-owned pages."""
        return self._hypervisor_owned(pfns, level, RmpStatus.HOST_PF) if write else RmpStatus.OK

    def check_shared(self, pfns: Sel, write: bool, level: int = PG_LEVEL_4K) -> Answer:
        """The access of a guest without SNP, or of an SNP guest with C=0; `level` of the nested mapping."""
        return self._hypervisor_owned(pfns, level, RmpStatus.NPF_RMP) if write else RmpStatus.OK

    def _hypervisor_owned(self, pfns: Sel, level: int, otherwise: RmpStatus) -> Answer:
        if not self.nr_assigned:
            return RmpStatus.OK
        if level >= PG_LEVEL_2M:
            busy = self.hpage_region_status(pfns)
        else:
            words = self._words(pfns)
            if not np.count_nonzero(words):
                return RmpStatus.OK
            busy = (words & np.uint16(ASSIGNED)) != 0
        if not np.count_nonzero(busy):
            return RmpStatus.OK
        return np.where(busy, np.uint8(otherwise), np.uint8(RmpStatus.OK))

    def check_private(
        self, pfns: Sel, gfns: Sel, *, asid: int, level: int = PG_LEVEL_4K, vmpl: int = 0, access: str = "read"
    ) -> Answer:
        """An SNP guest's access with C=1 to 4K gfns, mapped at `level` to pfns (checks: ACCESS_CHECKS).

        access: "read", "write", "user_exec" or "supervisor_exec".
        """
        _guest(asid, vmpl)
        good = ASSIGNED | VALIDATED | asid
        if vmpl == 0:
            if level == PG_LEVEL_4K:
                if self._all_are(pfns, gfns, good):
                    return RmpStatus.OK
            elif self._all_within(pfns, gfns, good | SIZE_2M):
                return RmpStatus.OK
        entries = self._entries(pfns)
        facts = self._ownership(entries, gfns, asid)
        facts["sizes of NPT and RMP differ"] = entries.large != (level >= PG_LEVEL_2M)
        facts["not validated"] = ~entries.has(VALIDATED)
        needed = _NEEDED_PERMS[access]
        facts["not permitted at this VMPL"] = (self._perms_of(entries.index)[:, vmpl] & needed) != needed
        codes = first_code(ACCESS_CHECKS, facts, len(entries.pages))
        return codes if np.count_nonzero(codes) else RmpStatus.OK

    # ---- a running vCPU, and the firmware -----------------------------------------------------------------------

    def vmrun(self, pfn: int, gfn: int, asid: int) -> RmpStatus:
        """VMRUN's check of a VMSA page; on OK the page is in use until `vmexit`."""
        _guest(asid)
        entries = self._entries(run(pfn, 1))
        facts = self._ownership(entries, run(gfn, 1), asid)
        facts["vmsa is 0"] = ~entries.has(VMSA)
        code = int(first_code(VMRUN_CHECKS, facts, 1)[0])
        if not code:
            self.lock(run(pfn, 1))
        return RmpStatus(code)

    def vmexit(self, pfn: int) -> None:
        """The vCPU of this VMSA left the guest."""
        self.unlock(run(pfn, 1))

    def lock(self, pfns: Sel) -> None:
        """A CPU or the firmware holds the entries that rule over these pages."""
        index = self._entries(pfns).index
        self._hold(index, self.word.take(index) | np.uint16(LOCKED))

    def unlock(self, pfns: Sel) -> None:
        """The entries are free again."""
        index = self._entries(pfns).index
        self._hold(index, self.word.take(index) & np.uint16(0xFFFF & ~LOCKED))

    def _hold(self, index: npt.NDArray[np.int64], words: Word) -> None:
        """Store words of entries inside the table, and keep count of the bases that are held."""
        covered = index < self.covered
        index, words = index[covered], words[covered]
        at_base = index & (PAGES_2M - 1) == 0
        for some, sign in ((self.word.take(index), -1), (words, 1)):
            self._held_bases += sign * int(np.count_nonzero(at_base & _held(some)))
        self.word[index] = words

    def firmware_write(self, pfns: Sel, *, set_bits: int = 0, clear_bits: int = 0) -> None:
        """The firmware rewrites its bits of 4K or 2M entries (pfns: their first frames); nobody else can."""
        pages = array_of(pfns)
        self._hold(pages, (self.word.take(pages) & np.uint16(0xFFFF & ~clear_bits)) | np.uint16(set_bits))

    def unsmash(self, pages: npt.NDArray[np.int64]) -> None:
        """The firmware folds 512 4K entries into the 2M entry at each base (PAGE_UNSMASH checked them)."""
        words = self.word.take(pages)
        self._regions[pages >> 9] = ASSIGNED
        self.word[pages] = words | np.uint16(SIZE_2M)
        if self._perms is not None:
            perms = self._perms[pages].copy()
            self._perms[expand(pages, 9)] = 0
            self._perms[pages] = perms

    def foldable(self, pages: npt.NDArray[np.int64]) -> Mask:
        """Whether each 2M region is 512 immutable 4K entries of one state, consecutive gpas, vmsa clear."""
        words = self._regions[pages >> 9]
        gfns = self.gfn.reshape(-1, PAGES_2M)[pages >> 9].astype(np.int64)
        good: Mask = (words[:, :1] == words).all(axis=1) & ((words[:, 0] & np.uint16(VMSA | SIZE_2M | LOCKED)) == 0)
        good &= (words[:, 0] & np.uint16(IMMUTABLE | ASSIGNED)) == IMMUTABLE | ASSIGNED
        good &= (gfns == gfns[:, :1] + np.arange(PAGES_2M)).all(axis=1) & (gfns[:, 0] % PAGES_2M == 0)
        if self._perms is not None:
            perms = self._perms.reshape(-1, PAGES_2M, NR_VMPLS)[pages >> 9]
            good &= (perms == perms[:, :1]).all(axis=(1, 2))
        return good

    def violations(self) -> list[str]:
        """What must hold of the table and does not: counters, mirrored bits, fields of unassigned entries."""
        found = []
        words = self._regions[: -(-self.covered // PAGES_2M)]
        words = words[words.any(axis=1)]
        large = (words[:, 0] & np.uint16(SIZE_2M)) != 0
        if np.count_nonzero(words[:, 1:] & np.uint16(SIZE_2M)):
            found.append("a 2M entry at an unaligned frame")
        if np.count_nonzero(words[large][:, 1:] != ASSIGNED):
            found.append("a sub-entry of a 2M page does not mirror `assigned`, or more than that")
        assigned = (words & np.uint16(ASSIGNED)) != 0
        if np.count_nonzero(~assigned & ((words & np.uint16(ASID | VALIDATED | VMSA | SIZE_2M)) != 0)):
            found.append("an unassigned entry with an owner or a state")
        if np.count_nonzero(((words & np.uint16(VALIDATED)) != 0) & ((words & np.uint16(ASID)) == 0)):
            found.append("a validated page without a guest")
        pages = np.bincount((words[~large] & np.uint16(ASID))[assigned[~large]], minlength=NR_ASIDS)
        pages += np.bincount(words[large][:, 0] & np.uint16(ASID), minlength=NR_ASIDS) * PAGES_2M
        if np.count_nonzero(pages != self.asid_pages):
            found.append("a per-ASID counter is not the number of assigned 4K pages")
        if int(pages.sum()) != self.nr_assigned:
            found.append("the number of assigned pages is wrong")
        return found


# ---- launch measurement ---------------------------------------------------------------------------------------

LD_BYTES: Final = 48
_PAGE_INFO: Final = struct.Struct("<48s48sHBBBBBBQ")
_MEASURED: Final = (PageType.NORMAL, PageType.VMSA)
_ZERO_PAGE: Final = bytes(PAGE_BYTES)


def extend_launch_digest(ld: bytes, contents: bytes, page_type: int, gpa: int) -> bytes:
    """The SNP launch digest after one more 4K page: SHA-384 of PAGE_INFO (firmware ABI, SNP_LAUNCH_UPDATE).

    ld, contents: 48 bytes each; contents is the page's SHA-384 for NORMAL and VMSA, zeros for all other types.
    """
    return hashlib.sha384(_PAGE_INFO.pack(ld, contents, _PAGE_INFO.size, page_type, 0, 0, 0, 0, 0, gpa)).digest()


def page_contents(page: bytes, page_type: int) -> bytes:
    """PAGE_INFO.CONTENTS of a page; a VMSA is hashed as if its TSC scale and offset were zero."""
    if page_type == PageType.VMSA:
        page = page[:0x2F0] + bytes(16) + page[0x300:]
    return hashlib.sha384(page).digest() if page_type in _MEASURED else bytes(LD_BYTES)


def measurement(tik: bytes, api: tuple[int, int], build: int, policy: int, digest: bytes, nonce: bytes) -> bytes:
    """LAUNCH_MEASURE's 48 bytes: HMAC-SHA256 over the launch digest with the transport key, and the nonce."""
    message = struct.pack("<BBBBI", 4, *api, build, policy) + digest + nonce
    return hmac.new(tik, message, hashlib.sha256).digest() + nonce


def transport(session: bytes, nonce: bytes, plain: bytes) -> tuple[bytes, bytes]:
    """(header, data) of a transport packet: nonce and MAC; the bytes under the transport key. A stand-in for AES-CTR:
    what matters is that nobody without the session reads or changes it unseen."""
    stream = hashlib.shake_256(session[:16] + nonce).digest(len(plain))
    data = bytes(a ^ b for a, b in zip(plain, stream, strict=True))
    return nonce + hmac.new(session[16:], nonce + data, hashlib.sha256).digest(), data


def received(session: bytes, header: bytes, data: bytes) -> bytes | None:
    """The bytes of a transport packet; None where header, data and session do not belong together."""
    nonce = header[:16]
    mac = hmac.new(session[16:], nonce + data, hashlib.sha256).digest()
    return transport(session, nonce, data)[1] if header[16:] == mac else None


# ---- guests ---------------------------------------------------------------------------------------------------

SEV_TRANSITIONS: Final[Mapping[tuple[str, SevGuestState], SevGuestState]] = {
    ("LAUNCH_START", SevGuestState.INVALID): SevGuestState.LUPDATE,
    ("LAUNCH_UPDATE_DATA", SevGuestState.LUPDATE): SevGuestState.LUPDATE,
    ("LAUNCH_UPDATE_VMSA", SevGuestState.LUPDATE): SevGuestState.LUPDATE,
    ("LAUNCH_MEASURE", SevGuestState.LUPDATE): SevGuestState.LSECRET,
    ("LAUNCH_SECRET", SevGuestState.LSECRET): SevGuestState.LSECRET,
    ("LAUNCH_FINISH", SevGuestState.LSECRET): SevGuestState.RUNNING,
    ("SEND_START", SevGuestState.RUNNING): SevGuestState.SUPDATE,
    ("SEND_UPDATE_DATA", SevGuestState.SUPDATE): SevGuestState.SUPDATE,
    ("SEND_FINISH", SevGuestState.SUPDATE): SevGuestState.SENT,
    ("SEND_CANCEL", SevGuestState.SUPDATE): SevGuestState.RUNNING,
    ("RECEIVE_START", SevGuestState.INVALID): SevGuestState.RUPDATE,
    ("RECEIVE_UPDATE_DATA", SevGuestState.RUPDATE): SevGuestState.RUPDATE,
    ("RECEIVE_FINISH", SevGuestState.RUPDATE): SevGuestState.RUNNING,
}
"""(command, state before) -> state after; what is not here is INVALID_GUEST_STATE. DECOMMISSION ends any state."""

SNP_TRANSITIONS: Final[Mapping[tuple[str, SnpGuestState], SnpGuestState]] = {
    ("SNP_LAUNCH_START", SnpGuestState.INIT): SnpGuestState.LAUNCH,
    ("SNP_LAUNCH_UPDATE", SnpGuestState.LAUNCH): SnpGuestState.LAUNCH,
    ("SNP_LAUNCH_FINISH", SnpGuestState.LAUNCH): SnpGuestState.RUNNING,
    ("SNP_ACTIVATE", SnpGuestState.LAUNCH): SnpGuestState.LAUNCH,
    ("SNP_ACTIVATE", SnpGuestState.RUNNING): SnpGuestState.RUNNING,
}

SNP_LAUNCH_UPDATE_CHECKS: Final[Checks] = (
    ("gctx not Context", SevStatus.INVALID_GUEST),
    ("page not Pre-Guest", SevStatus.INVALID_PAGE_STATE),
    ("RMP size is not the argument", SevStatus.INVALID_PAGE_SIZE),
    ("2M unaligned", SevStatus.INVALID_ADDRESS),
    ("VMSA, SECRETS or CPUID as 2M", SevStatus.INVALID_PAGE_SIZE),
    ("no such type", SevStatus.INVALID_PARAM),
    ("not in LAUNCH", SevStatus.INVALID_GUEST_STATE),
    ("no ASID", SevStatus.INACTIVE),
    ("foreign ASID", SevStatus.INVALID_PAGE_OWNER),
    ("CPUID table refused", SevStatus.INVALID_PARAM),
)
SNP_PAGE_RECLAIM_CHECKS: Final[Checks] = (
    ("RMP size is not the argument", SevStatus.INVALID_PAGE_SIZE),
    ("2M unaligned", SevStatus.INVALID_ADDRESS),
    ("not reclaimable", SevStatus.INVALID_PAGE_STATE),
)
RECLAIMED: Final[Mapping[PageState, PageState]] = {
    PageState.FIRMWARE: PageState.RECLAIM,
    PageState.METADATA: PageState.RECLAIM,
    PageState.PRE_GUEST: PageState.GUEST_INVALID,
    PageState.PRE_SWAP: PageState.GUEST_VALID,
    **{s: s for s in (PageState.HYPERVISOR, PageState.RECLAIM, PageState.GUEST_INVALID, PageState.GUEST_VALID)},
}
"""SNP_PAGE_RECLAIM: state before -> after. Mutable pages stay as they are; what is not here is INVALID_PAGE_STATE."""

POLICY_ES: Final = 1 << 2
POLICY_NOSEND: Final = 1 << 3
SNP_POLICY_SMT, SNP_POLICY_MUST_BE_ONE, SNP_POLICY_MIGRATE_MA, SNP_POLICY_DEBUG, SNP_POLICY_SINGLE_SOCKET = (
    1 << bit for bit in range(16, 21)
)
_SNP_POLICY_RESERVED: Final = ~((1 << 21) - 1)
CPUID_COUNT_MAX: Final = 64
_CPUID_ENTRY: Final = struct.Struct("<IIQQIIIIQ")
CpuidLimits: TypeAlias = Mapping[tuple[int, int], tuple[int, int, int, int]]
"""(leaf, subleaf) -> bits that the hardware allows in eax, ebx, ecx, edx."""


@attrs.define(eq=False)
class SevGuest:
    """What the firmware keeps of an SEV or SEV-ES guest."""

    policy: int
    tik: bytes
    asid: int = 0
    state: SevGuestState = SevGuestState.LUPDATE
    digest: Any = attrs.field(factory=hashlib.sha256)
    session: bytes = b""
    """Transport keys of a migration: 16 bytes each for encryption and integrity."""

    @property
    def es(self) -> bool:
        return bool(self.policy & POLICY_ES)


@attrs.define(eq=False)
class SnpGuest:
    """A guest context (GCTX)."""

    secret: bytes
    state: SnpGuestState = SnpGuestState.INIT
    asid: int = 0
    policy: int = 0
    ld: bytes = bytes(LD_BYTES)
    id_block: bytes = b""


def command(fn: Callable[Concatenate[Psp, P], R]) -> operation[Psp, P, R]:
    """A firmware command: the secure processor takes one at a time."""

    def steps(self: Psp, /, *args: P.args, **kwargs: P.kwargs) -> Steps[R]:
        yield self.mailbox.write
        result = fn(self, *args, **kwargs)
        yield self.mailbox.release
        return result

    steps.__doc__ = fn.__doc__
    steps.__name__ = fn.__name__
    return operation(steps)


class Psp:
    """The secure processor and its SEV firmware. Commands return statuses; only misuse of Python raises ValueError."""

    def __init__(
        self,
        rmp: Rmp,
        memory: Memory,
        *,
        max_asid: int = 509,
        min_sev_asid: int = 100,
        sockets: int = 1,
        smt: bool = True,
        api: tuple[int, int] = (1, 55),
        build: int = 21,
        cpuid_limits: CpuidLimits | None = None,
    ) -> None:
        """ASIDs below min_sev_asid are for SEV-ES and SNP guests, from there to max_asid for SEV."""
        if not 0 < min_sev_asid <= max_asid + 1 <= NR_ASIDS:
            raise ValueError(f"ASIDs 1..{max_asid} with SEV from {min_sev_asid}: not a range of at most {NR_ASIDS - 1}")
        self.rmp = rmp
        self.memory = memory
        self.max_asid, self.min_sev_asid = max_asid, min_sev_asid
        self.sockets, self.smt = sockets, smt
        self.api, self.build = api, build
        self.cpuid_limits: CpuidLimits = cpuid_limits or {}
        self.guests: dict[int, SevGuest] = {}
        """SEV guests by handle."""
        self.contexts: dict[int, SnpGuest] = {}
        """SNP guests by the frame of their context page."""
        self.asids: Codes = np.full(NR_ASIDS, AsidState.CLEAN, np.uint8)
        self.wbinvd_done = True
        self.mailbox = Lock("psp", 900)
        self.watch: Callable[[str, int | None, bytes], None] | None = None
        """Told (page type, gpa or None, launch digest with it) of all that is measured, where somebody watches."""
        self._entropy = 0
        self._hashes: dict[int, bytes] = {}

    def _random(self, n: int) -> bytes:
        """n bytes from a generator that starts the same in every run."""
        self._entropy += 1
        return hashlib.shake_256(self._entropy.to_bytes(8, "little")).digest(n)

    # ---- ASIDs ------------------------------------------------------------------------------------------------

    def wbinvd(self) -> None:
        """WBINVD ran on every core (not a command: the cores tell the firmware)."""
        self.wbinvd_done = True

    @command
    def df_flush(self) -> SevStatus:
        """DF_FLUSH, SNP_DF_FLUSH: dirty ASIDs become clean. WBINVD_REQUIRED until all cores have run WBINVD."""
        if not self.wbinvd_done:
            return SevStatus.WBINVD_REQUIRED
        self.asids[self.asids == AsidState.DIRTY] = AsidState.CLEAN
        return SevStatus.SUCCESS

    def _activate(self, guest: SevGuest | SnpGuest, asid: int, es: bool) -> SevStatus:
        if not 0 < asid <= self.max_asid:
            return SevStatus.INVALID_ASID
        if self.asids[asid] in (AsidState.ALLOCATED, AsidState.IN_USE):
            return SevStatus.ASID_OWNED
        if guest.asid:
            return SevStatus.ACTIVE
        if isinstance(guest, SevGuest) and guest.state == SevGuestState.SENT:
            return SevStatus.INVALID_GUEST_STATE
        if self.asids[asid] == AsidState.DIRTY:
            return SevStatus.DFFLUSH_REQUIRED
        if es != (asid < self.min_sev_asid):
            return SevStatus.INVALID_ASID
        guest.asid = asid
        self.asids[asid] = AsidState.IN_USE if guest.state.name == "RUNNING" else AsidState.ALLOCATED
        return SevStatus.SUCCESS

    def _deactivate(self, guest: SevGuest | SnpGuest) -> None:
        if self.asids[guest.asid] == AsidState.IN_USE:
            self.asids[guest.asid] = AsidState.DIRTY
            self.wbinvd_done = False
        else:
            self.asids[guest.asid] = AsidState.CLEAN
        guest.asid = 0

    # ---- SEV and SEV-ES -----------------------------------------------------------------------------------------

    def _sev(self, handle: int, name: str) -> SevGuest | SevStatus:
        guest = self.guests.get(handle)
        if guest is None:
            return SevStatus.INVALID_GUEST
        if (name, guest.state) not in SEV_TRANSITIONS:
            return SevStatus.INVALID_GUEST_STATE
        return guest

    @command
    def launch_start(self, policy: int, tik: bytes = bytes(16)) -> tuple[SevStatus, int]:
        """LAUNCH_START: a new guest; returns (status, handle). tik: the session's transport integrity key."""
        handle = self._new_handle(policy)
        if not handle:
            return SevStatus.RESOURCE_LIMIT, 0
        self.guests[handle] = SevGuest(policy, tik)
        return SevStatus.SUCCESS, handle

    def _new_handle(self, policy: int) -> int:
        """The handle that the next guest gets, 0 where there is none."""
        if not 0 <= policy < 1 << 32:
            raise ValueError(f"the policy of an SEV guest has 32 bits, not {policy:#x}")
        return next((h for h in range(1, NR_ASIDS) if h not in self.guests), 0)

    @command
    def activate(self, handle: int, asid: int) -> SevStatus:
        """ACTIVATE: bind a guest to an ASID and load its key."""
        guest = self.guests.get(handle)
        return SevStatus.INVALID_GUEST if guest is None else self._activate(guest, asid, guest.es)

    @command
    def deactivate(self, handle: int) -> SevStatus:
        """DEACTIVATE: unbind the ASID; it is dirty if the guest has run."""
        guest = self.guests.get(handle)
        if guest is None:
            return SevStatus.INVALID_GUEST
        if not guest.asid:
            return SevStatus.INACTIVE
        self._deactivate(guest)
        return SevStatus.SUCCESS

    @command
    def decommission(self, handle: int) -> SevStatus:
        """DECOMMISSION: delete a guest that is not active."""
        guest = self.guests.get(handle)
        if guest is None:
            return SevStatus.INVALID_GUEST
        if guest.asid:
            return SevStatus.ACTIVE
        del self.guests[handle]
        return SevStatus.SUCCESS

    @command
    def guest_status(self, handle: int) -> tuple[SevStatus, SevGuestState, int, int]:
        """GUEST_STATUS: (status, state, ASID, policy); an unknown handle is a guest in state INVALID."""
        guest = self.guests.get(handle)
        if guest is None:
            return SevStatus.SUCCESS, SevGuestState.INVALID, 0, 0
        return SevStatus.SUCCESS, guest.state, guest.asid, guest.policy

    def _bytes(self, pfns: Sel, key: int = 0) -> bytes:
        """Bytes of frames, seen through a key (0: as the host sees them)."""
        return b"".join(self.memory.bytes_of(stamp) for stamp in self.memory.read(pfns, key).tolist())

    def _update(self, name: str, handle: int, paddr: int, length: int) -> SevStatus:
        guest = self._sev(handle, name)
        if isinstance(guest, SevStatus):
            return guest
        if name == "LAUNCH_UPDATE_VMSA" and not guest.es:
            return SevStatus.UNSUPPORTED
        status = self._reach(guest, paddr, length)
        if status:
            return status
        pfns = _touched(paddr, length)
        guest.digest.update(self._bytes(pfns)[paddr % PAGE_BYTES :][:length])
        if self.watch:
            self.watch("vmsa" if name == "LAUNCH_UPDATE_VMSA" else "data", None, guest.digest.digest())
        self.memory.write(pfns, self.memory.read(pfns, 0), guest.asid)
        return SevStatus.SUCCESS

    def _guest_owned(self, pfns: Sel) -> bool:
        allowed = (PageState.HYPERVISOR, PageState.FIRMWARE, PageState.DEFAULT)
        return not bool(np.isin(self.rmp.state(pfns), allowed).all())

    @command
    def launch_update_data(self, handle: int, paddr: int, length: int) -> SevStatus:
        """LAUNCH_UPDATE_DATA: measure and encrypt memory in place. Pages that are touched are encrypted whole."""
        return self._update("LAUNCH_UPDATE_DATA", handle, paddr, length)

    @command
    def launch_update_vmsa(self, handle: int, paddr: int, length: int) -> SevStatus:
        """LAUNCH_UPDATE_VMSA: measure and encrypt a vCPU's save area of 4096 bytes."""
        if length != PAGE_BYTES:
            return SevStatus.INVALID_LENGTH
        return self._update("LAUNCH_UPDATE_VMSA", handle, paddr, length)

    @command
    def launch_measure(self, handle: int, length: int, nonce: bytes | None = None) -> tuple[SevStatus, bytes | int]:
        """LAUNCH_MEASURE: (SUCCESS, 48 bytes), or (INVALID_LENGTH, needed length) for a shorter buffer."""
        guest = self._sev(handle, "LAUNCH_MEASURE")
        if isinstance(guest, SevStatus):
            return guest, 0
        if length < 48:
            return SevStatus.INVALID_LENGTH, 48
        guest.state = SEV_TRANSITIONS["LAUNCH_MEASURE", guest.state]
        nonce = self._random(16) if nonce is None else nonce
        return SevStatus.SUCCESS, measurement(
            guest.tik, self.api, self.build, guest.policy, guest.digest.digest(), nonce
        )

    @command
    def launch_secret(self, handle: int, paddr: int, secret: bytes) -> SevStatus:
        """LAUNCH_SECRET: write what came through the trusted channel, encrypted."""
        known = self.guests.get(handle)
        if known is None:
            return SevStatus.INVALID_GUEST
        status = self._span(paddr, len(secret))
        if status:
            return status
        guest = self._sev(handle, "LAUNCH_SECRET")
        if isinstance(guest, SevStatus):
            return guest
        status = self._reach(guest, paddr, len(secret))
        if status:
            return status
        self._put(guest, paddr, secret)
        return SevStatus.SUCCESS

    def _put(self, guest: SevGuest, paddr: int, data: bytes) -> None:
        """Write bytes through the guest's key; the rest of the pages stays."""
        pfns, offset = _touched(paddr, len(data)), paddr % PAGE_BYTES
        old = self._bytes(pfns, guest.asid)
        new = old[:offset] + data + old[offset + len(data) :]
        stamps = [self.memory.intern(new[at : at + PAGE_BYTES]) for at in range(0, len(new), PAGE_BYTES)]
        self.memory.write(pfns, np.array(stamps, np.uint32), guest.asid)

    @command
    def launch_finish(self, handle: int) -> SevStatus:
        """LAUNCH_FINISH: the guest may run."""
        guest = self._sev(handle, "LAUNCH_FINISH")
        if isinstance(guest, SevStatus):
            return guest
        guest.state = SEV_TRANSITIONS["LAUNCH_FINISH", guest.state]
        if guest.asid:
            self.asids[guest.asid] = AsidState.IN_USE
        return SevStatus.SUCCESS

    # ---- SEV: migration to another machine ------------------------------------------------------------------------

    @command
    def send_start(self, handle: int) -> tuple[SevStatus, bytes]:
        """SEND_START: (status, session); the session stands for transport keys wrapped for the receiver's PDH."""
        guest = self._sev(handle, "SEND_START")
        if isinstance(guest, SevStatus):
            return guest, b""
        if guest.policy & POLICY_NOSEND:
            return SevStatus.POLICY_FAILURE, b""
        guest.state = SEV_TRANSITIONS["SEND_START", guest.state]
        guest.session = self._random(32)
        return SevStatus.SUCCESS, guest.session

    @command
    def send_update_data(self, handle: int, paddr: int, length: int) -> tuple[SevStatus, bytes, bytes]:
        """SEND_UPDATE_DATA: (status, header, data) of guest memory, encrypted for transport."""
        guest = self._sev(handle, "SEND_UPDATE_DATA")
        status = guest if isinstance(guest, SevStatus) else self._reach(guest, paddr, length)
        if isinstance(guest, SevStatus) or status:
            return status, b"", b""
        plain = self._bytes(_touched(paddr, length), guest.asid)[paddr % PAGE_BYTES :][:length]
        header, data = transport(guest.session, self._random(16), plain)
        return SevStatus.SUCCESS, header, data

    @command
    def send_finish(self, handle: int) -> SevStatus:
        """SEND_FINISH: all is sent; the guest does not run here any more."""
        return self._goes(handle, "SEND_FINISH")

    @command
    def send_cancel(self, handle: int) -> SevStatus:
        """SEND_CANCEL: the guest goes on here."""
        return self._goes(handle, "SEND_CANCEL")

    @command
    def receive_start(self, policy: int, session: bytes) -> tuple[SevStatus, int]:
        """RECEIVE_START: a guest that comes from elsewhere; returns (status, handle)."""
        handle = self._new_handle(policy)
        if not handle:
            return SevStatus.RESOURCE_LIMIT, 0
        if len(session) != 32:
            return SevStatus.BAD_MEASUREMENT, 0
        state = SEV_TRANSITIONS["RECEIVE_START", SevGuestState.INVALID]
        self.guests[handle] = SevGuest(policy, session[16:], state=state, session=session)
        return SevStatus.SUCCESS, handle

    @command
    def receive_update_data(self, handle: int, paddr: int, header: bytes, data: bytes) -> SevStatus:
        """RECEIVE_UPDATE_DATA: data into guest memory. BAD_MEASUREMENT where it is not as it was sent."""
        guest = self._sev(handle, "RECEIVE_UPDATE_DATA")
        status = guest if isinstance(guest, SevStatus) else self._reach(guest, paddr, len(data))
        if isinstance(guest, SevStatus) or status:
            return status
        plain = received(guest.session, header, data)
        if plain is None:
            return SevStatus.BAD_MEASUREMENT
        self._put(guest, paddr, plain)
        return SevStatus.SUCCESS

    @command
    def receive_finish(self, handle: int) -> SevStatus:
        """RECEIVE_FINISH: the guest may run."""
        status = self._goes(handle, "RECEIVE_FINISH")
        if not status and self.guests[handle].asid:
            self.asids[self.guests[handle].asid] = AsidState.IN_USE
        return status

    def _span(self, paddr: int, length: int) -> SevStatus:
        """Whether an operand [paddr, paddr + length) is well formed."""
        if paddr % 16 or not 0 <= paddr < self.memory.nr_frames * PAGE_BYTES - max(length - 1, 0):
            return SevStatus.INVALID_ADDRESS
        return SevStatus.INVALID_LENGTH if length <= 0 or length % 16 else SevStatus.SUCCESS

    def _reach(self, guest: SevGuest, paddr: int, length: int) -> SevStatus:
        """Whether the guest's key may be used on an operand: no page of an SNP guest, or of the firmware's own."""
        status = SevStatus.INACTIVE if not guest.asid else self._span(paddr, length)
        if not status and self.rmp.nr_assigned and self._guest_owned(_touched(paddr, length)):
            return SevStatus.INVALID_PAGE_STATE
        return status

    def _goes(self, handle: int, name: str) -> SevStatus:
        guest = self._sev(handle, name)
        if isinstance(guest, SevStatus):
            return guest
        guest.state = SEV_TRANSITIONS[name, guest.state]
        return SevStatus.SUCCESS

    def launch_digest(self, handle: int) -> bytes:
        """SHA-256 of what a guest's launch measured so far (no command: an owner learns it from the measurement)."""
        guest = self.guests.get(handle)
        return b"" if guest is None else bytes(guest.digest.digest())

    # ---- SNP: contexts ------------------------------------------------------------------------------------------

    def _context(self, gctx_pfn: int, name: str) -> SnpGuest | SevStatus:
        """The guest of a context page, if the command may be given in its state."""
        if not self._is_context(gctx_pfn):
            return SevStatus.INVALID_GUEST
        guest = self.contexts[gctx_pfn]
        return guest if (name, guest.state) in SNP_TRANSITIONS else SevStatus.INVALID_GUEST_STATE

    def _is_context(self, gctx_pfn: int) -> bool:
        return int(self.rmp.state(run(gctx_pfn, 1))[0]) == PageState.CONTEXT

    @command
    def snp_gctx_create(self, gctx_pfn: int) -> SevStatus:
        """SNP_GCTX_CREATE: a 4K Firmware page becomes a guest context."""
        if int(self.rmp.state(run(gctx_pfn, 1))[0]) != PageState.FIRMWARE:
            return SevStatus.INVALID_PAGE_STATE
        if self.rmp.levels(run(gctx_pfn, 1)) != PG_LEVEL_4K:
            return SevStatus.INVALID_PAGE_SIZE
        self.rmp.firmware_write(run(gctx_pfn, 1), set_bits=VMSA)
        self.contexts[gctx_pfn] = SnpGuest(self._random(32))
        return SevStatus.SUCCESS

    @command
    def snp_launch_start(self, gctx_pfn: int, policy: int) -> SevStatus:
        """SNP_LAUNCH_START: the guest's policy is set, its launch begins."""
        if not 0 <= policy < 1 << 64:
            raise ValueError(f"the policy of an SNP guest has 64 bits, not {policy:#x}")
        guest = self._context(gctx_pfn, "SNP_LAUNCH_START")
        if isinstance(guest, SevStatus):
            return guest
        major, minor = (policy >> 8) & 0xFF, policy & 0xFF
        if (
            not policy & SNP_POLICY_MUST_BE_ONE
            or (self.smt and not policy & SNP_POLICY_SMT)
            or (major, minor) > self.api
            or policy & _SNP_POLICY_RESERVED
        ):
            return SevStatus.POLICY_FAILURE
        guest.policy = policy
        guest.state = SNP_TRANSITIONS["SNP_LAUNCH_START", guest.state]
        return SevStatus.SUCCESS

    @command
    def snp_activate(self, gctx_pfn: int, asid: int) -> SevStatus:
        """SNP_ACTIVATE: bind a guest to an ASID that owns no pages."""
        guest = self._context(gctx_pfn, "SNP_ACTIVATE")
        if isinstance(guest, SevStatus):
            return guest
        if 0 < asid < NR_ASIDS and self.rmp.asid_pages[asid]:
            return SevStatus.INVALID_CONFIG
        if guest.policy & SNP_POLICY_SINGLE_SOCKET and self.sockets > 1:
            return SevStatus.POLICY_FAILURE
        return self._activate(guest, asid, True)

    @command
    def snp_decommission(self, gctx_pfn: int) -> SevStatus:
        """SNP_DECOMMISSION: unbind the ASID, delete the guest; its context page becomes a Firmware page."""
        if not self._is_context(gctx_pfn):
            return SevStatus.INVALID_GUEST
        guest = self.contexts.pop(gctx_pfn)
        if guest.asid:
            self._deactivate(guest)
        self.rmp.firmware_write(run(gctx_pfn, 1), clear_bits=VMSA)
        return SevStatus.SUCCESS

    def snp_launch_digest(self, gctx_pfn: int) -> bytes:
        """LD of a guest's launch so far (no command: an owner learns it from the attestation report)."""
        guest = self.contexts.get(gctx_pfn)
        return b"" if guest is None else guest.ld

    # ---- SNP: pages ---------------------------------------------------------------------------------------------

    @command
    def snp_launch_update(self, gctx_pfn: int, pfns: Sel, page_type: int, level: int = PG_LEVEL_4K) -> Command:
        """SNP_LAUNCH_UPDATE of Pre-Guest pages of `level` in order, one command each, up to the first that fails.

        Each extends the launch digest (a 2M page as 512 4K pages), is encrypted with the guest's key and becomes
        Guest-Valid. A CPUID page that is refused is written back corrected, in clear, and stays Pre-Guest.
        """
        pages = array_of(pfns)
        guest = self.contexts.get(gctx_pfn) if self._is_context(gctx_pfn) else None
        entries = self.rmp.rmpread(pfns)
        large = level == PG_LEVEL_2M
        facts: dict[str, Mask | bool] = {
            "gctx not Context": guest is None,
            "page not Pre-Guest": self.rmp.state(pfns) != PageState.PRE_GUEST,
            "RMP size is not the argument": entries.level != level,
            "2M unaligned": large & (pages % PAGES_2M != 0),
            "VMSA, SECRETS or CPUID as 2M": large and page_type in (PageType.VMSA, PageType.SECRETS, PageType.CPUID),
            "no such type": page_type not in PageType.__members__.values(),
        }
        if guest is not None:
            facts["not in LAUNCH"] = ("SNP_LAUNCH_UPDATE", guest.state) not in SNP_TRANSITIONS
            facts["no ASID"] = not guest.asid
            facts["foreign ASID"] = entries.asid != guest.asid
            if page_type == PageType.CPUID:
                facts["CPUID table refused"] = self._cpuid_refused(pages)
        codes = first_code(SNP_LAUNCH_UPDATE_CHECKS, facts, len(pages))
        done = int(np.argmax(codes != 0)) if np.count_nonzero(codes) else len(pages)
        status = SevStatus(int(codes[done])) if done < len(pages) else SevStatus.SUCCESS
        if done and guest is not None:
            order = 9 if large else 0
            frames = expand(part(pfns, 0, done), order)
            self._launch(guest, frames, array_of(expand(entries.gfn[:done], order)), page_type)
            self.rmp.firmware_write(
                part(pfns, 0, done),
                set_bits=VALIDATED | (VMSA if page_type == PageType.VMSA else 0),
                clear_bits=IMMUTABLE,
            )
        if done < len(pages) and status == SevStatus.INVALID_PARAM and page_type == PageType.CPUID:
            failed = run(int(pages[done]), 1)
            self.memory.write(failed, self.memory.intern(self._cpuid_corrected(self._bytes(failed))), 0)
        return Command(done, status)

    def _launch(self, guest: SnpGuest, frames: Sel, gfns: npt.NDArray[np.int64], page_type: int) -> None:
        """Measure frames in order, then encrypt what the page type leaves in them."""
        stamps = self.memory.read(frames, 0)
        if page_type in _MEASURED:
            contents = [self._contents(stamp, page_type) for stamp in stamps.tolist()]
        else:
            contents = [bytes(LD_BYTES)] * len(gfns)
        ld = guest.ld
        for gfn, content in zip(gfns.tolist(), contents, strict=True):
            ld = extend_launch_digest(ld, content, page_type, gfn * PAGE_BYTES)
            if self.watch:
                self.watch(PageType(page_type).name.lower(), gfn * PAGE_BYTES, ld)
        guest.ld = ld
        if page_type == PageType.ZERO:
            self.memory.clear(frames, guest.asid)
        elif page_type == PageType.SECRETS:
            self.memory.write(frames, self.memory.intern(secrets_page(guest.secret)), guest.asid)
        else:
            self.memory.write(frames, stamps.copy(), guest.asid)

    def _contents(self, stamp: int, page_type: int) -> bytes:
        """SHA-384 of a page by its content stamp; images repeat pages, so hashes are kept."""
        if page_type == PageType.VMSA:
            return page_contents(self.memory.bytes_of(stamp), page_type)
        if stamp not in self._hashes:
            self._hashes[stamp] = page_contents(self.memory.bytes_of(stamp), page_type)
        return self._hashes[stamp]

    def _cpuid_refused(self, pages: npt.NDArray[np.int64]) -> Mask:
        tables = [self._bytes(run(pfn, 1)) for pfn in pages.tolist()]
        return np.array([self._cpuid_corrected(table) != table or _cpuid_malformed(table) for table in tables], bool)

    def _cpuid_corrected(self, page: bytes) -> bytes:
        """The CPUID page with every value cut down to what the hardware allows."""
        if _cpuid_malformed(page):
            return page
        corrected = bytearray(page)
        for i in range(int.from_bytes(page[:4], "little")):
            at = 16 + i * _CPUID_ENTRY.size
            leaf, sub, xcr0, xss, *values, reserved = _CPUID_ENTRY.unpack_from(page, at)
            limits = self.cpuid_limits.get((leaf, sub))
            if limits is not None:
                values = [value & limit for value, limit in zip(values, limits, strict=True)]
            _CPUID_ENTRY.pack_into(corrected, at, leaf, sub, xcr0, xss, *values, reserved)
        return bytes(corrected)

    @command
    def snp_page_reclaim(self, pfns: Sel, level: int = PG_LEVEL_4K) -> Command:
        """SNP_PAGE_RECLAIM of pages of `level` in order: the firmware lets go of immutable pages (see RECLAIMED)."""
        pages = array_of(pfns)
        state = self.rmp.state(pfns)
        facts: Facts = {
            "RMP size is not the argument": self.rmp.rmpread(pfns).level != level,
            "2M unaligned": (level == PG_LEVEL_2M) & (pages % PAGES_2M != 0),
            "not reclaimable": ~np.isin(state, list(RECLAIMED)),
        }
        codes = first_code(SNP_PAGE_RECLAIM_CHECKS, facts, len(pages))
        done = int(np.argmax(codes != 0)) if np.count_nonzero(codes) else len(pages)
        held = pages[:done][np.isin(state[:done], [s for s, after in RECLAIMED.items() if s != after])]
        self.rmp.firmware_write(held, clear_bits=IMMUTABLE)
        return Command(done, SevStatus(int(codes[done])) if done < len(pages) else SevStatus.SUCCESS)

    @command
    def snp_page_unsmash(self, pfns: Sel) -> Command:
        """SNP_PAGE_UNSMASH: 512 immutable 4K entries become one 2M entry, for each base in pfns in order."""
        pages = array_of(pfns)
        inside = (pages | (PAGES_2M - 1)) < self.rmp.covered
        codes = np.zeros(len(pages), np.uint8)
        aligned = (pages % PAGES_2M == 0) & inside
        codes[aligned] = np.where(self.rmp.foldable(pages[aligned]), 0, SevStatus.INVALID_PAGE_STATE)
        codes[~aligned] = SevStatus.INVALID_ADDRESS
        done = int(np.argmax(codes != 0)) if np.count_nonzero(codes) else len(pages)
        self.rmp.unsmash(pages[:done])
        return Command(done, SevStatus(int(codes[done])) if done < len(pages) else SevStatus.SUCCESS)

    @command
    def snp_page_set_state(self, pfns: Sel) -> Command:
        """SNP_PAGE_SET_STATE: hypervisor pages become HV-Fixed, in order."""
        state = self.rmp.state(pfns)
        good = (state == PageState.HYPERVISOR) | (state == PageState.HV_FIXED)
        done = len(good) if np.count_nonzero(good) == len(good) else int(np.argmin(good))
        if done:
            self.rmp.firmware_write(part(pfns, 0, done), set_bits=IMMUTABLE)
        return Command(done, SevStatus.SUCCESS if done == len(good) else SevStatus.INVALID_PAGE_STATE)

    @command
    def snp_launch_finish(self, gctx_pfn: int, id_block: bytes = b"", id_auth: bytes = b"") -> SevStatus:
        """SNP_LAUNCH_FINISH: the guest may run. An ID block (96 bytes) fixes digest and policy, and must be signed."""
        guest = self._context(gctx_pfn, "SNP_LAUNCH_FINISH")
        if isinstance(guest, SevStatus):
            return guest
        if not guest.asid:
            return SevStatus.INACTIVE
        if id_block:
            status = self._check_id_block(guest, id_block, id_auth)
            if status:
                return status
            guest.id_block = id_block
        guest.state = SNP_TRANSITIONS["SNP_LAUNCH_FINISH", guest.state]
        self.asids[guest.asid] = AsidState.IN_USE
        return SevStatus.SUCCESS

    def _check_id_block(self, guest: SnpGuest, id_block: bytes, id_auth: bytes) -> SevStatus:
        if len(id_block) != 96 or len(id_auth) != PAGE_BYTES:
            raise ValueError("an ID block has 96 bytes, its authentication page 4096")
        if id_block[:LD_BYTES] != guest.ld:
            return SevStatus.BAD_MEASUREMENT
        if int.from_bytes(id_block[88:96], "little") != guest.policy:
            return SevStatus.POLICY_FAILURE
        if int.from_bytes(id_auth[:4], "little") != ECDSA_P384_SHA384:
            return SevStatus.INVALID_PARAM
        if not verify_p384(id_auth[0x240:0x644], id_auth[0x40:0x240], id_block):
            return SevStatus.BAD_SIGNATURE
        return SevStatus.SUCCESS


def _touched(paddr: int, length: int) -> slice:
    """Frames that [paddr, paddr + length) lies in."""
    return run(paddr // PAGE_BYTES, (paddr + length - 1) // PAGE_BYTES - paddr // PAGE_BYTES + 1)


def secrets_page(secret: bytes) -> bytes:
    """The page that the firmware puts at a SECRETS page: version 3 and four VMPCKs made from the guest's secret."""
    keys = b"".join(hashlib.sha256(bytes([vmpl]) + secret).digest() for vmpl in range(NR_VMPLS))
    return (struct.pack("<I28x", 3) + keys).ljust(PAGE_BYTES, b"\0")


def _cpuid_malformed(page: bytes) -> bool:
    """More than 64 entries, or something in the header's reserved fields."""
    entries, reserved, reserved2 = struct.unpack_from("<IIQ", page)
    return bool(entries > CPUID_COUNT_MAX or reserved or reserved2)


# ---- signatures (FIPS 186-4: ECDSA, P-384) --------------------------------------------------------------------

ECDSA_P384_SHA384: Final = 1
_CURVE_P384: Final = 2
_P = 2**384 - 2**128 - 2**96 + 2**32 - 1
_N = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
_B = 0xB3312FA7E23EE7E4988E056BE3F82D19181D9C6EFE8141120314088F5013875AC656398D8A2ED19D2A85C8EDD3EC2AEF
Point: TypeAlias = tuple[int, int] | None
P384_BASE: Final[Point] = (
    0xAA87CA22BE8B05378EB1C71EF320AD746E1D3B628BA79B9859F741E082542A385502F25DBF55296C3A545E3872760AB7,
    0x3617DE4A96262C6F5D9E98BF9292DC29F8F41DBD289A147CE9DA3113B5F0B8C00A60B1CE1D7E819D7A431D7C90EA0E5F,
)


def _add(a: Point, b: Point) -> Point:
    if a is None or b is None:
        return a or b
    if a[0] == b[0]:
        if (a[1] + b[1]) % _P == 0:
            return None
        slope = (3 * a[0] * a[0] - 3) * pow(2 * a[1], -1, _P)
    else:
        slope = (b[1] - a[1]) * pow(b[0] - a[0], -1, _P)
    x = (slope * slope - a[0] - b[0]) % _P
    return x, (slope * (a[0] - x) - a[1]) % _P


def multiply_p384(scalar: int, point: Point) -> Point:
    """scalar times a point of the curve; None is the point at infinity."""
    total: Point = None
    while scalar:
        if scalar & 1:
            total = _add(total, point)
        point = _add(point, point)
        scalar >>= 1
    return total


def verify_p384(key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether a signature in the firmware ABI's form (little endian, 72 bytes a number) is the key's over a message.

    key: curve (u32), x, y. signature: r, s.
    """
    x, y, r, s = (
        int.from_bytes(field[at : at + 72], "little")
        for field, at in ((key, 4), (key, 76), (signature, 0), (signature, 72))
    )
    on_curve = x < _P and y < _P and (y * y - x * x * x + 3 * x - _B) % _P == 0
    if int.from_bytes(key[:4], "little") != _CURVE_P384 or not on_curve or not (0 < r < _N and 0 < s < _N):
        return False
    digest = int.from_bytes(hashlib.sha384(message).digest(), "big")
    inverse = pow(s, -1, _N)
    point = _add(multiply_p384(digest * inverse % _N, P384_BASE), multiply_p384(r * inverse % _N, (x, y)))
    return point is not None and point[0] % _N == r


# ---- both ------------------------------------------------------------------------------------------------------


class SevHardware:
    """The trusted hardware of one machine."""

    def __init__(self, memory: Memory, **firmware: Any) -> None:
        """RMP and secure processor on a machine's memory; keywords as of Psp."""
        self.memory = memory
        self.rmp = Rmp(memory.nr_frames)
        self.psp = Psp(self.rmp, memory, **firmware)
