"""The trusted party: the pKVM hypervisor at EL2 (arch/arm64/kvm/hyp/nvhe: mem_protect.c, pkvm.c, mm.c, ffa.c).

`Hyp` owns every page table that matters: the host's stage 2, its own stage 1, and one stage 2 per VM. The host is its
untrusted client: each method named as in the kernel (`host_donate_guest`, ...) is one hypercall, a guest's HVC, or
something EL2 does itself, and checks everything before it changes anything.

Where a method takes a selector (`Sel`), it stands for one call per page (or per block of `nr` pages) in order: on a
failure at element k the result says `done = k`, the calls below k have taken effect, k and those above have not.
Where it takes `pfn, nr`, the real operation is one call over a range: all of it or nothing.

What is kept where: host and hyp state in one byte per frame (`Hyp.frame`, as in struct hyp_page), the annotation of
the host's stage 2 in `Hyp.owner` and `Hyp.owner_gfn`, a guest's stage 2 in `Stage2` as flat arrays of 32-bit words,
frame << 5 | leaf. Zero everywhere is the state at boot: the host owns all frames and no guest maps anything.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import cached_property
from typing import Any, Concatenate, Literal, ParamSpec, TypeAlias, TypeVar

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.effects import Effect, Lock, Steps, operation
from cvmcore.errors import InvariantViolation
from cvmcore.memory import Memory
from cvmcore.pages import (
    EMPTY,
    PIECE_RUN,
    IntArray,
    Sel,
    Words,
    all_zero,
    array_of,
    as_sel,
    blocks,
    contiguous,
    count,
    expand,
    first,
    grown,
    last,
    leading,
    part,
    pieces,
    run,
    take,
    where,
    zeros,
)
from cvmcore.types import PAGE_BYTES, Access, Walk
from cvmcore_pkvm.errors import Errno, Ffa, Hvc, Smccc

P = ParamSpec("P")
R = TypeVar("R")
Mask: TypeAlias = npt.NDArray[np.bool_]
Bytes: TypeAlias = npt.NDArray[np.uint8]

BLOCK_ORDER = 9
PAGES_BLOCK = 1 << BLOCK_ORDER
FRAME_SHIFT = 5
MAX_FRAMES = 1 << (32 - FRAME_SHIFT)
HANDLE_OFFSET = 0x1000
MAX_VMS = 255
MEMCACHE_MIN_PAGES = 2
"""kvm_mmu_cache_min_pages for a stage 2 of three levels: what one mapping can need below the PGD."""
U32_MAX = 0xFFFF_FFFF
U16_MAX = 0xFFFF

# Sizes that EL2 and the host agree on through the generated hyp_constants.h; the order of magnitude of an arm64 build.
VCPU_PAGES = 3
PGD_PAGES = 2


def vm_pages(nr_vcpus: int) -> int:
    """Pages of struct pkvm_hyp_vm with room for nr_vcpus pointers."""
    return -(-(6144 + 8 * nr_vcpus) // 4096)


# ---- states ---------------------------------------------------------------------------------------------------


class PageState(enum.IntEnum):
    """What a page is to one component (enum pkvm_page_state). POISON is a guest's only, and never stored as a state."""

    OWNED = 0
    SHARED_OWNED = 1
    SHARED_BORROWED = 2
    NOPAGE = 3
    POISON = 4


OWNED, SHARED_OWNED, BORROWED, NOPAGE, POISON = PageState

# A frame's byte: host state in bits 1:0, hyp state in bits 5:4, complemented so that zero means NOPAGE.
HOST_BITS, HYP_BITS, STATE_BITS = 0x03, 0x30, 0x33
LEAKED = 0x40
"""Frame bit: its VM was finalised while it was still in use; nobody can take it back."""
VALID = 0x80
"""Frame bit: the host's stage 2 has a page-level entry for it. Without: see `Hyp.host_table`."""


def frame_byte(host: PageState, hyp: PageState) -> int:
    """The frame byte of a pair of states (struct hyp_page: __host_state, __hyp_state_comp)."""
    return host | (hyp ^ NOPAGE) << 4


class Prot(enum.IntFlag):
    """Rights of a stage-2 mapping (enum kvm_pgtable_prot)."""

    R = 1
    W = 2
    X = 4
    RWX = 7


RWX = int(Prot.RWX)

# A guest leaf, the low five bits of an entry. Borrowed leaves carry their rights and the access flag.
ABSENT, LEAF_POISON, LEAF_OWNED, LEAF_SHARED_OWNED = 0, 1, 2, 3
LEAF_BORROWED, LEAF_YOUNG = 16, 8
LEAF_BITS = 31

LEAF_OF: dict[PageState, int] = {
    NOPAGE: ABSENT,
    POISON: LEAF_POISON,
    OWNED: LEAF_OWNED,
    SHARED_OWNED: LEAF_SHARED_OWNED,
    BORROWED: LEAF_BORROWED,
}


def _walks(write: bool) -> Bytes:
    """What the MMU says to an access, by leaf. A leaf without the access flag faults as an absent one does."""
    answer = np.full(LEAF_BITS + 1, Walk.MISS, np.uint8)
    answer[[LEAF_OWNED, LEAF_SHARED_OWNED]] = Walk.OK
    need = Prot.R | Prot.W if write else Prot.R
    for prot in range(Prot.RWX + 1):
        if prot & need == need:
            answer[LEAF_BORROWED | LEAF_YOUNG | prot] = Walk.OK
    return answer


WALK_READ, WALK_WRITE = _walks(False), _walks(True)


@attrs.frozen(slots=False)
class Transition:
    """States of host, hyp and guest before and after an operation; None: neither looked at nor changed."""

    before: tuple[PageState, PageState | None, PageState | None]
    after: tuple[PageState, PageState | None, PageState | None]

    @cached_property
    def mask(self) -> int:
        """The bits of a frame byte that are checked."""
        return HOST_BITS if self.before[1] is None else STATE_BITS

    @cached_property
    def want(self) -> int:
        """What must stand there."""
        return frame_byte(self.before[0], NOPAGE if self.before[1] is None else self.before[1])

    @cached_property
    def result(self) -> int:
        """What stands there afterwards."""
        return frame_byte(self.after[0], NOPAGE if self.after[1] is None else self.after[1])

    @cached_property
    def leaf(self) -> int:
        """The guest leaf that must stand there."""
        return ABSENT if self.before[2] is None else LEAF_OF[self.before[2]]

    @cached_property
    def new_leaf(self) -> int:
        """The guest leaf afterwards."""
        return ABSENT if self.after[2] is None else LEAF_OF[self.after[2]]


ANY: None = None
TRANSITIONS: dict[str, Transition] = {
    #                             before: host   hyp       guest          after: host    hyp       guest
    "host_share_hyp":     Transition((OWNED,        NOPAGE,   ANY),          (SHARED_OWNED, BORROWED, ANY)),
    "host_unshare_hyp":   Transition((SHARED_OWNED, BORROWED, ANY),          (OWNED,        NOPAGE,   ANY)),
    "hyp_pin":            Transition((SHARED_OWNED, BORROWED, ANY),          (SHARED_OWNED, BORROWED, ANY)),
    "host_donate_hyp":    Transition((OWNED,        NOPAGE,   ANY),          (NOPAGE,       OWNED,    ANY)),
    "hyp_donate_host":    Transition((NOPAGE,       OWNED,    ANY),          (OWNED,        NOPAGE,   ANY)),
    "host_share_ffa":     Transition((OWNED,        ANY,      ANY),          (SHARED_OWNED, ANY,      ANY)),
    "host_unshare_ffa":   Transition((SHARED_OWNED, ANY,      ANY),          (OWNED,        ANY,      ANY)),
    "host_share_guest":   Transition((OWNED,        ANY,      NOPAGE),       (SHARED_OWNED, ANY,      BORROWED)),
    "share_guest, again": Transition((SHARED_OWNED, ANY,      NOPAGE),       (SHARED_OWNED, ANY,      BORROWED)),
    "host_unshare_guest": Transition((SHARED_OWNED, ANY,      BORROWED),     (OWNED,        ANY,      NOPAGE)),
    "host_donate_guest":  Transition((OWNED,        ANY,      NOPAGE),       (NOPAGE,       ANY,      OWNED)),
    "guest_share_host":   Transition((NOPAGE,       ANY,      OWNED),        (BORROWED,     ANY,      SHARED_OWNED)),
    "guest_unshare_host": Transition((BORROWED,     ANY,      SHARED_OWNED), (NOPAGE,       ANY,      OWNED)),
    "host_reclaim_guest": Transition((NOPAGE,       ANY,      OWNED),        (OWNED,        ANY,      NOPAGE)),
    "reclaim, if shared": Transition((BORROWED,     ANY,      SHARED_OWNED), (OWNED,        ANY,      NOPAGE)),
    "host_force_reclaim": Transition((NOPAGE,       ANY,      OWNED),        (OWNED,        ANY,      POISON)),
}  # fmt: skip
"""Who may do what to a page. Counts are checked beside it: host_unshare_hyp and hyp_donate_host want no reference,
"again" wants a share count above 0, host_unshare_guest leaves SHARED_OWNED while the count stays above 0."""


class Owner(enum.IntEnum):
    """Who owns a frame that the host has lost, as the annotation says (enum pkvm_component_id, lock order)."""

    HOST = 0
    HYP = 1
    GUEST = 2


@attrs.frozen
class Legal:
    """A legal combination for one frame. Counts are of guest leaves by state; None: any number, but `borrowed` always
    equals the frame's share count. `pins`: whether EL2 may hold references."""

    meaning: str
    host: PageState
    hyp: PageState
    owner: Owner
    owned: int = 0
    shared_owned: int = 0
    borrowed: int | None = 0
    pins: bool = False


LEGAL: tuple[Legal, ...] = (
    Legal("plain host page",        OWNED,        NOPAGE,   Owner.HOST),
    Legal("shared with hyp",        SHARED_OWNED, BORROWED, Owner.HOST,  pins=True),
    Legal("lent to FF-A",           SHARED_OWNED, NOPAGE,   Owner.HOST),
    Legal("np guest memory",        SHARED_OWNED, NOPAGE,   Owner.HOST,  borrowed=None),
    Legal("hyp memory",             NOPAGE,       OWNED,    Owner.HYP,   pins=True),
    Legal("private pVM page",       NOPAGE,       NOPAGE,   Owner.GUEST, owned=1),
    Legal("pVM page shared back",   BORROWED,     NOPAGE,   Owner.HOST,  shared_owned=1),
)  # fmt: skip
"""Everything else is a bug, but for frames that a finalised VM leaked. A poisoned leaf belongs to no frame."""


# ---- work -----------------------------------------------------------------------------------------------------

Work: TypeAlias = dict[str, int]
"""What an operation did, by the keys below; keys that count 0 are left out."""

PTE = "pte"  # entries written in any table: host or guest stage 2, EL2 stage 1
TLBI_HOST = "tlbi_host"  # broadcast invalidations by IPA for VMID 0: a host entry was broken
TLBI_GUEST = "tlbi_guest"  # the same for a guest's VMID
TLBI_RANGE = "tlbi_range"  # range invalidations for a guest's VMID (FEAT_TLBIRANGE with FWB), one per call
TLBI_HYP = "tlbi_hyp"  # invalidations by VA at EL2
TLBI_VMID = "tlbi_vmid"  # whole-VMID invalidations
TLBI_LOCAL = "tlbi_local"  # invalidations on this CPU only
HOST_FAULT = "host_fault"  # stage-2 faults that the host took to get an entry back
HOST_SPLIT = "host_split"  # 2 MiB blocks of the host's stage 2 that were broken
CLEAR = "clear"  # pages that EL2 filled with zeros, through its fixmap, and cleaned to PoC
GUEST_CMO = "guest_cmo"  # pages whose caches EL2 maintained before a guest sees them (no FWB, or no DIC)
UNMAP_CMO = "unmap_cmo"  # pages that EL2 cleaned when a guest lost them (no FWB)
BLOCK_CMO = "block_cmo"  # blocks of 2 MiB, either way
ADMIT = "admit"  # pages taken from the host's memcache: one host_donate_hyp each
TABLE = "table"  # guest table pages linked
UNTABLE = "untable"  # guest table pages that emptied


def _add(work: Work, key: str, n: int) -> None:
    if n:
        work[key] = work.get(key, 0) + n


class Worked(Effect):
    """Yielded while the operation's locks are still held: the time of this work passes under them."""

    __slots__ = ("work",)

    def __init__(self, work: Work) -> None:
        super().__init__("point", None, "el2.worked")
        self.work = work


@attrs.frozen(eq=False)
class Result:
    """How a batch of calls ended.

    status: OK, or why the call at `done` failed. done: calls that took effect. need: with ENOMEM, table pages that the
    host must add to its memcache so that the rest can run. answer: what the call returns besides.
    """

    status: Errno = Errno.OK
    done: int = 0
    need: int = 0
    work: Work = attrs.field(factory=dict)
    answer: Any = None

    @property
    def ok(self) -> bool:
        return self.status == Errno.OK


@attrs.frozen(eq=False)
class HvcResult:
    """How a guest's loop of MEM_SHARE or MEM_UNSHARE calls ended.

    status: SUCCESS, or what the call that begins at page `done` returned. calls: HVCs made, that one included. at: the
    page of that call which is why. absent: with those behind it so many pages are; the call became a stage-2 fault to
    the host there, the guest will make it again, and fault on each of them.
    """

    status: Smccc
    done: int
    calls: int
    at: int = 0
    absent: int = 0

    @property
    def abort(self) -> bool:
        return self.absent > 0


class _Checks:
    """Narrows a batch to the elements that pass, check after check: the first to fail decides the status."""

    def __init__(self, n: int, other: int | None = None) -> None:
        if other is not None and n != other:
            raise ValueError(f"{n} gfns do not go with {other} pfns")
        self.total = n
        self.n = n
        self.status = Errno.OK
        self.need = 0
        self.answer: Any = None

    def look_at(self, n: int) -> None:
        """Only the first n elements matter: one of them will fail, or they are all."""
        self.n = min(self.n, n)

    def stop(self, at: int, status: Errno) -> None:
        """The call at `at` fails."""
        if at < self.n:
            self.n, self.status = at, status

    def fail(self, wrong: Mask, status: Errno) -> None:
        """Calls whose element is True fail."""
        if np.count_nonzero(wrong):
            self.stop(int(np.argmax(wrong)), status)

    def cut(self, sel: Sel) -> Sel:
        """The elements that still pass."""
        return sel if self.n == self.total else part(sel, 0, self.n)

    def result(self, work: Work) -> Result:
        return Result(self.status, self.n, self.need, work, self.answer)


# ---- a guest's stage 2 ----------------------------------------------------------------------------------------


_RAMP = np.arange(PIECE_RUN, dtype=np.uint32)
_RAMP_ENTRIES = _RAMP << FRAME_SHIFT


def _leaves(words: Words) -> tuple[int | Words, Sel]:
    """Leaf bits (one for all, or one each) and frames of entries. A run of frames with one leaf is found in a pass."""
    n, low, step = len(words), int(words[0]), 1 << FRAME_SHIFT
    if n == 1 or (int(words[-1]) - low == (n - 1) * step and not np.count_nonzero(words[1:] - words[:-1] != step)):
        return low & LEAF_BITS, slice(low >> FRAME_SHIFT, (low >> FRAME_SHIFT) + n, 1)
    leaves = words & np.uint32(LEAF_BITS)
    uniform = low & LEAF_BITS
    return leaves if np.count_nonzero(leaves != uniform) else uniform, (words >> FRAME_SHIFT).astype(np.int64)


def _map(table: Words, index: Sel, pfns: Sel, leaf: int) -> None:
    """Write the entries that map frames with a leaf."""
    n = count(pfns)
    if not isinstance(pfns, slice):
        entries = pfns.astype(np.uint32)
        entries <<= FRAME_SHIFT
        entries |= leaf
        table[index] = entries
    elif isinstance(index, slice) and pfns.step in (1, None) and n <= len(_RAMP):
        np.add(_RAMP_ENTRIES[:n], pfns.start << FRAME_SHIFT | leaf, out=table[index])
    else:
        step = (pfns.step or 1) << FRAME_SHIFT
        start = pfns.start << FRAME_SHIFT | leaf
        table[index] = np.arange(start, start + n * step, step, dtype=np.uint32)


def _tables_of(entries: Sel) -> tuple[Sel, IntArray]:
    """The tables of 512 that hold sorted entries: their numbers, and where in the batch each begins; then its end."""
    n = count(entries)
    low, high = first(entries) >> 9, last(entries) >> 9
    if low == high:
        return slice(low, low + 1, 1), np.array((0, n))
    if isinstance(entries, slice):
        bounds = np.arange(low << 9, (high + 2) << 9, 512) - entries.start
        bounds[0], bounds[-1] = 0, n
        return slice(low, high + 1, 1), bounds
    numbers = entries >> 9
    edges = np.flatnonzero(numbers[1:] != numbers[:-1])
    bounds = np.empty(len(edges) + 2, np.int64)
    bounds[0], bounds[-1] = 0, n
    np.add(edges, 1, out=bounds[1:-1])
    return as_sel(numbers.take(bounds[:-1])), bounds


Changes: TypeAlias = list[tuple[int, Sel, npt.NDArray[np.uint16]]]
"""(level of `Stage2.used`, tables, how many entries each has then)"""


def _call_starts(pages: IntArray, words: Words) -> IntArray:
    """Where a call for a range of pages has to begin, however many it may cover: a gap, another table, other frames."""
    together = (pages[1:] == pages[:-1] + 1) & (words[1:] == words[:-1] + np.uint32(1 << FRAME_SHIFT))
    together &= (pages[1:] & (PAGES_BLOCK - 1)) != 0
    starts: IntArray = np.concatenate([[0], np.flatnonzero(~together) + 1])
    return starts


def _call_of(pages: IntArray, words: Words, batch: int) -> int:
    """Where the call begins that comes to the last of these pages; those before it have the entries `words`. The state
    of a page is looked at before its frame."""
    n = len(pages) - 1
    if n == 0 or pages[n] != pages[n - 1] + 1 or not pages[n] & (PAGES_BLOCK - 1):
        return n
    start = int(_call_starts(pages[:n], words[:n])[-1])
    return n - (n - start) % batch


def _tables_whole(gfns: Sel) -> Iterable[tuple[int, int]]:
    """`pieces` that part no table of 512 pages."""
    start, n = 0, count(gfns)
    for _low, stop in pieces(gfns):
        if stop > start:
            end = (last(part(gfns, 0, stop)) | (PAGES_BLOCK - 1)) + 1
            stop += int(np.count_nonzero(array_of(part(gfns, stop, min(n, stop + PAGES_BLOCK))) < end))
            yield start, stop
            start = stop


class Stage2:
    """A guest's stage 2: page and block entries (uint32, frame << 5 | leaf), and how full each table is.

    pages[gfn], blocks[gfn >> 9]; used[0][gfn >> 9] and used[1][gfn >> 18] count the entries of the tables below the
    PGD: a table exists while it has any. All grow to the highest gfn ever named.
    """

    def __init__(self, end_gfn: int) -> None:
        self.end_gfn = end_gfn
        self.pages: Words = zeros(0, np.uint32)
        self.blocks: Words = zeros(0, np.uint32)
        self.used: list[npt.NDArray[np.uint16]] = [zeros(0, np.uint16), zeros(0, np.uint16)]
        self.nr_blocks = 0
        self.covered = 0
        """Gfns below this one have room."""
        self.stale: list[Sel] = []
        """Pages that lost write access, and that TLBs may still let be written: nothing was invalidated since."""

    def cover(self, gfns: Sel, checks: _Checks, nr: int = 1) -> Sel:
        """Make room for the gfns; those beyond the IPA size fail with -ERANGE. Returns the gfns that still pass."""
        if isinstance(gfns, slice) and gfns.step == 1 and gfns.start >= 0 and gfns.stop <= self.covered:
            return checks.cut(gfns)
        gfns = checks.cut(gfns)
        if not count(gfns):
            return gfns
        if first(gfns) < 0:
            raise ValueError("gfns are not negative")
        if last(gfns) + nr > self.end_gfn:
            checks.stop(int(np.count_nonzero(array_of(gfns) + nr <= self.end_gfn)), Errno.ERANGE)
            gfns = checks.cut(gfns)
            if not count(gfns):
                return gfns
        end = last(gfns) + nr
        if end > self.covered:
            self.pages = grown(self.pages, -(-end // 512) * 512)
            nr_tables = len(self.pages) >> 9
            self.blocks = grown(self.blocks, nr_tables)
            self.used = [grown(self.used[0], nr_tables), grown(self.used[1], -(-nr_tables // 512))]
            self.covered = min(len(self.pages), self.end_gfn)
        return gfns

    def invalidated(self, pages: Sel) -> None:
        """No TLB has a translation of these 4K pages any more."""
        if self.stale:
            left = np.setdiff1d(np.concatenate([array_of(some) for some in self.stale]), array_of(pages))
            self.stale = [left] if len(left) else []

    def leaves(self, gfns: Sel) -> Words:
        """The entry that translates each 4K gfn, a block's as if it were of pages. Needs `cover`; may be a view."""
        words = take(self.pages, gfns)
        if not self.nr_blocks:
            return words
        pages = array_of(gfns)
        above = self.blocks.take(pages >> BLOCK_ORDER)
        inside = (pages & (PAGES_BLOCK - 1)).astype(np.uint32) << FRAME_SHIFT
        return np.where(above != 0, above + inside, words)

    def in_block(self, gfns: Sel) -> Mask:
        """Which gfns a block translates."""
        inside: Mask = self.blocks.take(array_of(gfns) >> BLOCK_ORDER) != 0
        return inside

    def adding(self, gfns: Sel, nr: int) -> tuple[Changes, IntArray]:
        """What entries of nr pages at the gfns would change, and the position in the batch of each table page that has
        to be linked for it, sorted."""
        changes: Changes = []
        linked: list[IntArray] = []
        entries = gfns if nr == 1 else blocks(gfns, BLOCK_ORDER)
        positions: IntArray | None = None
        for level in range(0 if nr == 1 else 1, len(self.used)):
            tables, bounds = _tables_of(entries)
            old = take(self.used[level], tables)
            changes.append((level, tables, old + (bounds[1:] - bounds[:-1]).astype(np.uint16)))
            full = int(np.count_nonzero(old))
            if full == len(old):
                break
            positions = bounds[:-1] if positions is None else positions.take(bounds[:-1])
            entries = tables
            if full:
                entries, positions = where(tables, old == 0), positions[old == 0]
            linked.append(positions)
        if len(linked) > 1:
            return changes, np.sort(np.concatenate(linked))
        return changes, linked[0] if linked else np.zeros(0, np.int64)

    def drop(self, gfns: Sel, nr: int) -> int:
        """Entries of nr pages at the gfns are gone: returns how many table pages emptied."""
        emptied = 0
        entries = gfns if nr == 1 else blocks(gfns, BLOCK_ORDER)
        for level in range(0 if nr == 1 else 1, len(self.used)):
            tables, bounds = _tables_of(entries)
            left = take(self.used[level], tables) - (bounds[1:] - bounds[:-1]).astype(np.uint16)
            self.used[level][tables] = left
            used = int(np.count_nonzero(left))
            if used == len(left):
                break
            emptied += len(left) - used
            entries = where(tables, left == 0) if used else tables
        return emptied


# ---- VMs ------------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class HypVcpu:
    """EL2's side of a vCPU (struct pkvm_hyp_vcpu). `host_memcache` lies in the host's struct kvm_vcpu: the host
    pushes table pages there, EL2 takes them from its head."""

    vm: HypVm
    index: int
    pages: Sel
    host_pages: Sel
    host_memcache: list[int]
    memcache: list[int] = attrs.field(factory=list)
    cpu: int | None = None
    faults: tuple[Sel, int | Bytes] = (EMPTY, 0)
    """The last access that the MMU walked for, and what it said: where EL2 reads fault addresses from."""


class HypVm:
    """EL2's side of a VM (struct pkvm_hyp_vm)."""

    def __init__(
        self, handle: int, protected: bool, nr_vcpus: int, end_gfn: int, pages: Sel, pgd: Sel, host_pages: Sel
    ) -> None:
        self.handle = handle
        self.protected = protected
        self.vcpus: list[HypVcpu | None] = [None] * nr_vcpus
        self.stage2 = Stage2(end_gfn)
        self.is_dying = False
        self.pages, self.pgd, self.host_pages = pages, pgd, host_pages
        self.tables: list[int] = []
        """Frames linked as table pages; which is which does not matter to anybody."""
        self.pool: list[int] = []
        """Frames of emptied tables: taken before the memcache."""
        self.lock = SpinLock(f"vm[{handle:#x}].lock", RANK_COMPONENT, handle * NR_RANGES)
        self.pool_lock = SpinLock(f"vm[{handle:#x}].pool.lock", RANK_POOL)
        self.host_lock = SpinLock(f"host_mmu.lock[{handle:#x}]", RANK_HOST, handle)
        """What a VM's conversions take where locks are per VM."""
        self._range_locks: dict[int, SpinLock] = {}

    def range_locks(self, ranges: Sequence[int]) -> tuple[SpinLock, ...]:
        """What stands for `lock` where locks are per range: one for each 2 MiB of gfns, hashed; ascending."""
        for i in ranges:
            if i not in self._range_locks:
                name = f"vm[{self.handle:#x}].lock[{i}]"
                self._range_locks[i] = SpinLock(name, RANK_COMPONENT, self.handle * NR_RANGES + i)
        return tuple(self._range_locks[i] for i in ranges)


@attrs.define(eq=False)
class _Plan:
    """The table pages of a batch of mappings: what changes, and at which calls a page is linked."""

    changes: Changes
    at: IntArray
    inside: int = 0
    """How many leading gfns lie below the IPA size."""

    def first_dry(self, vcpu: HypVcpu, given: int, total: int) -> int:
        """The first call that finds fewer than MEMCACHE_MIN_PAGES, if the host gives so many; `total` if none does."""
        spare = len(vcpu.memcache) + given - MEMCACHE_MIN_PAGES
        if spare < 0:
            return 0
        spare += len(vcpu.vm.pool)
        return int(self.at[spare]) + 1 if len(self.at) > spare else total


RANK_FFA, RANK_VM_TABLE, RANK_HOST, RANK_COMPONENT, RANK_POOL = 900, 910, 920, 930, 940
NR_RANGES = 64
"""Locks that ranges of 2 MiB are hashed to, where locks are per range."""
_RESERVED = object()


class SpinLock(Lock):
    """A lock at EL2. `number` orders locks of one rank: several are taken in ascending order."""

    __slots__ = ("number",)

    def __init__(self, name: str, rank: int, number: int = 0) -> None:
        super().__init__(name, rank)
        self.number = number


def in_order(steps: Steps[R]) -> Steps[R]:
    """The steps of an operation, with the order of its locks checked as it takes them (the kernel checks nothing).

    InvariantViolation: a lock that belongs outside of one that is held, or one that is still held at the end.
    """
    held: list[SpinLock] = []
    answer: object = None
    while True:
        try:
            effect = steps.send(answer)
        except StopIteration as stop:
            if held:
                raise InvariantViolation(f"an operation of EL2 returned with {held[-1].name} held") from None
            result: R = stop.value
            return result
        lock = effect.lock
        if isinstance(lock, SpinLock):
            if effect.kind == "release":
                held.remove(lock)
            elif held and (held[-1].rank, held[-1].number) >= (lock.rank, lock.number):
                raise InvariantViolation(f"EL2 takes {lock.name} under {held[-1].name}: their order is the other way")
            else:
                held.append(lock)
        answer = yield effect


def _strictly_rising(pfns: Sel) -> bool:
    return isinstance(pfns, slice) or not np.count_nonzero(pfns[1:] <= pfns[:-1])


def _distinct(values: IntArray) -> IntArray:
    """The values, sorted, each once."""
    values = np.sort(values)
    keep = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=keep[1:])
    return values[keep]


def _seen_before(pfns: Sel) -> Mask | None:
    """Which elements repeat an earlier one; None: none does."""
    if _strictly_rising(pfns):
        return None
    pages = array_of(pfns)
    order = np.argsort(pages, kind="stable")
    again = np.zeros(len(pages), bool)
    again[order[1:]] = pages[order[1:]] == pages[order[:-1]]
    return again if np.count_nonzero(again) else None


def _refuse(status: Errno) -> Steps[Result]:
    yield from ()
    return Result(status)


def el2(fn: Callable[Concatenate[Hyp, P], Steps[R]]) -> operation[Hyp, P, R]:
    """An operation of EL2: its locks are taken in order."""

    @functools.wraps(fn)
    def ordered(self: Hyp, /, *args: P.args, **kwargs: P.kwargs) -> Steps[R]:
        return in_order(fn(self, *args, **kwargs))

    return operation(ordered)


def hypercall(fn: Callable[Concatenate[Hyp, P], Steps[Result]]) -> operation[Hyp, P, Result]:
    """A call that EL2 serves only once pKVM is finalised; before, SMCCC NOT_SUPPORTED, which reaches the host as
    -EOPNOTSUPP."""

    @functools.wraps(fn)
    def served(self: Hyp, /, *args: P.args, **kwargs: P.kwargs) -> Steps[Result]:
        return in_order(fn(self, *args, **kwargs)) if self.finalised else _refuse(Errno.EOPNOTSUPP)

    return operation(served)


Locks: TypeAlias = "Sequence[SpinLock] | Callable[[], tuple[SpinLock, ...]]"
LockDesign = Literal["global", "per-vm", "per-range"]
LOCK_DESIGNS: tuple[LockDesign, ...] = ("global", "per-vm", "per-range")


class Hyp:
    """The hypervisor of one machine.

    memory: the frames' content. regions: (start, end, nomap) pfns that memblock knows as memory, one region of all
    frames by default; other pfns below the PA size are MMIO. carveout: frames that EL2 kept for itself at boot, `text`
    those of its code. fwb, dic, tlbi_range: CPU features that spare cache maintenance and invalidations. checked: look
    after each operation whether all states are legal together (`check_legal`); slow, for small machines.

    Locks, outer to inner: vm_table_lock, host_mmu.lock, a vm->lock or pkvm_pgd_lock, page pools; `in_order` checks it.
    Table pages that a mapping needs are taken from the host within the mapping's own hold of host_mmu.lock.

    hyp_lock: "global" is upstream. The others are designs that nobody has built, to see what they would be worth.
    "per-vm": what a protected guest converts stays its own, so it takes a lock of that VM in place of host_mmu.lock;
    what moves frames between the host and somebody takes both. "per-range": host_mmu.lock and each vm->lock are one
    lock for every 2 MiB of frames, or gfns, hashed to NR_RANGES. In both, an entry of the host's stage 2 is broken
    under a locked annotation, which a host fault waits for.
    """

    def __init__(
        self,
        memory: Memory,
        nr_frames: int | None = None,
        *,
        regions: Sequence[tuple[int, int, bool]] | None = None,
        carveout: Sel = EMPTY,
        text: Sel = EMPTY,
        pa_bits: int = 48,
        ipa_bits: int = 40,
        fwb: bool = False,
        dic: bool = False,
        tlbi_range: bool = False,
        hyp_lock: LockDesign = "global",
        checked: bool = False,
        finalised: bool = True,
    ) -> None:
        self.memory = memory
        self.nr_frames = nr_frames = memory.nr_frames if nr_frames is None else nr_frames
        if nr_frames > MAX_FRAMES:
            raise ValueError(f"an entry holds frames below {MAX_FRAMES:#x}, not {nr_frames:#x}")
        self.regions = sorted(regions or [(0, nr_frames, False)])
        self.pa_frames = 1 << (pa_bits - 12)
        self.end_gfn = 1 << (ipa_bits - 12)
        self.fwb, self.dic, self.tlbi_range = fwb, dic, tlbi_range
        self.hyp_lock = hyp_lock
        self.checked = checked
        self.finalised = finalised

        self.frame: Bytes = zeros(nr_frames, np.uint8)
        self.refcount: npt.NDArray[np.uint16] = zeros(nr_frames, np.uint16)
        """EL2's references: pins of shared pages, and on the first page of a VM's object one per loaded vCPU."""
        self.share_count: Words = zeros(nr_frames, np.uint32)
        """host_share_guest_count: mappings of the frame by np guests."""
        self.owner: npt.NDArray[np.uint16] = zeros(nr_frames, np.uint16)
        """The annotation of the host's entry: Owner.HYP, or a guest's handle. Holds while the host state is NOPAGE."""
        self.owner_gfn: Words = zeros(nr_frames, np.uint32)
        self.host_table: Bytes = zeros(-(-nr_frames >> BLOCK_ORDER) or 1, np.uint8)
        """By 2 MiB of frames, 1 where the host's stage 2 has a table. 0: a block maps it all; the host is taken to
        have touched its memory while it booted. A broken block never comes back."""
        self._holes: Bytes | None = None
        self._mark_holes()

        self.vm_table: list[Any] = [None] * MAX_VMS
        self.loaded: dict[int, HypVcpu] = {}
        self.counts: Work = {}
        """All work so far."""
        self.ffa_lock = SpinLock("host_buffers.lock", RANK_FFA)
        self.vm_table_lock = SpinLock("vm_table_lock", RANK_VM_TABLE)
        self.host_lock = SpinLock("host_mmu.lock", RANK_HOST)
        # The refill of a memcache takes it last, within the mapping that needs the pages.
        self.pgd_lock = SpinLock("pkvm_pgd_lock", RANK_COMPONENT, 1 << 30)
        self._range_locks: dict[int, SpinLock] = {}

        if count(carveout):
            self.frame[carveout] = frame_byte(NOPAGE, OWNED)
            self.owner[carveout] = Owner.HYP
            self.host_table[blocks(carveout, BLOCK_ORDER)] = 1
        if count(text):
            self.frame[text] |= VALID

    # ---- checks on frames -------------------------------------------------------------------------------------

    def _mark_holes(self) -> None:
        end = 0
        for start, stop, nomap in [*self.regions, (self.nr_frames, self.nr_frames, False)]:
            if not end <= start <= stop <= self.nr_frames:
                raise ValueError("regions overlap or lie beyond the frames")
            if start > end or nomap:
                if self._holes is None:
                    self._holes = zeros(self.nr_frames, np.uint8)
                self._holes[end:start] = 1
                if nomap:
                    self._holes[start:stop] = 2
            end = stop

    def _kinds(self, pfns: IntArray) -> Bytes:
        """0: memory, 1: none, 2: no-map memory."""
        inside = (pfns >= 0) & (pfns < self.nr_frames)
        kinds = np.ones(len(pfns), np.uint8)
        kinds[inside] = 0 if self._holes is None else self._holes[pfns[inside]]
        return kinds

    def _need_memory(self, pfns: Sel, checks: _Checks, status: Errno = Errno.EPERM, nomap: bool = False) -> Sel:
        """Frames that are not memory fail, and no-map ones unless they are allowed. Returns the frames that pass."""
        pfns = checks.cut(pfns)
        if not count(pfns):
            return pfns
        low, high = (first(pfns), last(pfns)) if isinstance(pfns, slice) else (0, int(pfns.view(np.uint64).max()))
        if low < 0 or high >= self.nr_frames or (self._holes is not None and np.count_nonzero(take(self._holes, pfns))):
            kinds = self._kinds(array_of(pfns))
            checks.fail(kinds == 1 if nomap else kinds != 0, status)
            pfns = checks.cut(pfns)
        return pfns

    def _check_pa(self, pfn: int, nr: int) -> Errno:
        """pfn_range_is_valid."""
        if nr <= 0:
            raise ValueError("a range has at least one page")
        return Errno.EINVAL if pfn < 0 or pfn + nr > self.pa_frames else Errno.OK

    def _check_range(self, pfn: int, nr: int) -> Errno:
        """pfn_range_is_valid, then check_range_allowed_memory."""
        return self._check_pa(pfn, nr) or self._check_memory(pfn, nr)

    def _check_memory(self, pfn: int, nr: int) -> Errno:
        """check_range_allowed_memory: within one region (a hole counts as one), which is memory and not no-map."""
        for start, stop, nomap in self.regions:
            if pfn < start:
                return Errno.EPERM if pfn + nr <= start else Errno.EINVAL
            if pfn < stop:
                if pfn + nr > stop:
                    return Errno.EINVAL
                return Errno.EPERM if nomap else Errno.OK
        return Errno.EPERM

    def _check_state(self, frames: slice, move: Transition) -> Errno:
        """All frames of a range are in the state that a transition starts from."""
        state = self.frame[frames] & move.mask
        return Errno.EPERM if np.count_nonzero(state != move.want) else Errno.OK

    # ---- the host's stage 2 -----------------------------------------------------------------------------------

    def _break_host_entries(self, pfns: Sel, mapped: int, touched: bool, work: Work) -> None:
        """Frames that the host can reach leave its stage 2: a page entry, or the block around it, is broken once.

        mapped: how many have a page entry (`VALID`). touched: the host wrote each page right before its call, so that
        each had an entry, if need be through a stage-2 fault that brought back what an earlier break of its block
        took away.
        """
        n, split = count(pfns), 0
        if mapped < n:
            tables = blocks(pfns, BLOCK_ORDER) if isinstance(pfns, slice) else pfns >> BLOCK_ORDER
            broken_before = take(self.host_table, tables)
            if np.count_nonzero(broken_before) < len(broken_before):
                whole = _distinct(array_of(tables)[broken_before == 0])
                split = len(whole)
                self.host_table[whole] = 1
        broken = n if touched else mapped + split
        _add(work, HOST_FAULT, broken - mapped - split)
        _add(work, HOST_SPLIT, split)
        _add(work, TLBI_HOST, broken)
        _add(work, PTE, n + split)

    def _mapped(self, pfns: Sel) -> int:
        """How many of the frames have a page entry in the host's stage 2."""
        return int(np.count_nonzero(take(self.frame, pfns) & VALID))

    @el2
    def handle_host_mem_abort(self, pfns: Sel) -> Steps[Result]:
        """The host touches frames, one by one (host_stage2_idmap): what it has lost fails with -EPERM (EL2 injects an
        abort, S1PTW set), an entry that a broken block took away comes back. Counted in `work`: the faults. MMIO is the
        host's, and its entries are taken to stand since boot."""
        return (yield from self._locked(self._hosts(pfns), lambda: self._host_fault(pfns)))

    def _memory_of(self, pfns: Sel, checks: _Checks) -> tuple[Sel, IntArray | None]:
        """The frames among pfns that are memory, and where in the batch they are (None: all of it). No address at all:
        -EPERM."""
        is_run = isinstance(pfns, slice) and self._holes is None
        if not count(pfns) or (is_run and first(pfns) >= 0 and last(pfns) < self.nr_frames):
            return pfns, None
        pages = array_of(pfns)
        checks.fail((pages < 0) | (pages >= self.pa_frames), Errno.EPERM)
        at: IntArray = np.flatnonzero(self._kinds(pages[: checks.n]) != 1)
        return pages[at], at

    def _host_fault(self, pfns: Sel) -> Result:
        checks, work = _Checks(count(pfns)), Work()
        pfns, at = self._memory_of(pfns, checks)
        state = take(self.frame, pfns)
        gone = ((state & HOST_BITS) == NOPAGE) & ((state & VALID) == 0)
        if np.count_nonzero(gone):
            n = int(np.argmax(gone))
            checks.stop(n if at is None else int(at[n]), Errno.EPERM)
            pfns, state = part(pfns, 0, n), state[:n]
        table = self.host_table.take(array_of(pfns) >> BLOCK_ORDER)
        lost = (table != 0) & ((state & VALID) == 0)
        if n := int(np.count_nonzero(lost)):
            self.frame[where(pfns, lost)] |= VALID
            _add(work, HOST_FAULT, n)
            _add(work, PTE, n)
        return checks.result(work)

    # ---- locks ------------------------------------------------------------------------------------------------

    def _ranges(self, frames: Sel) -> list[int]:
        """The ranges that frames or gfns lie in, as their locks are numbered, ascending."""
        numbers = blocks(frames, BLOCK_ORDER) if _strictly_rising(frames) else array_of(frames) >> BLOCK_ORDER
        ranges: list[int] = _distinct(array_of(numbers) % NR_RANGES).tolist()
        return ranges

    def _hosts(self, pfns: Sel, vm: HypVm | None = None) -> tuple[SpinLock, ...]:
        """host_mmu.lock for operations that move frames between the host and somebody, a VM perhaps."""
        if self.hyp_lock == "global":
            return (self.host_lock,)
        if self.hyp_lock == "per-vm":
            return (self.host_lock,) if vm is None else (self.host_lock, vm.host_lock)
        ranges = self._ranges(pfns)
        for i in ranges:
            if i not in self._range_locks:
                self._range_locks[i] = SpinLock(f"host_mmu.lock[{i}]", RANK_HOST, i)
        return tuple(self._range_locks[i] for i in ranges)

    def _of_vm(self, vm: HypVm, gfns: Sel) -> tuple[SpinLock, ...]:
        """vm->lock for operations on these gfns."""
        return vm.range_locks(self._ranges(gfns)) if self.hyp_lock == "per-range" else (vm.lock,)

    def _of_guest(self, vm: HypVm, gfns: Sel, converts: bool = False) -> Locks:
        """The locks of an operation that names guest pages: host side, then the VM's. Where they depend on the frames,
        which may change until they are held, a function that says which they are now."""
        if self.hyp_lock != "per-range":
            hosts = (vm.host_lock,) if converts and self.hyp_lock == "per-vm" else self._hosts(EMPTY, vm)
            return (*hosts, vm.lock)

        def now() -> tuple[SpinLock, ...]:
            known = where(gfns, array_of(gfns) < len(vm.stage2.pages))
            words = vm.stage2.leaves(known)
            pfns = (words[(words & LEAF_BITS) > LEAF_POISON] >> FRAME_SHIFT).astype(np.int64)
            return (*self._hosts(pfns), *self._of_vm(vm, gfns))

        return now

    def _locked(
        self, locks: Locks, act: Callable[[], Result], pool: SpinLock | None = None
    ) -> Generator[Effect, object, Result]:
        """Run `act` under locks, taken in order; the time of its work passes before they are dropped."""
        held = locks() if callable(locks) else locks
        for lock in held:
            yield lock.write
        while callable(locks) and (wanted := locks()) != held:
            for lock in reversed(held):
                yield lock.release
            held = wanted
            for lock in held:
                yield lock.write
        result = act()
        if self.checked:
            self.check_legal()
        if result.work:
            if ADMIT in result.work and self.pgd_lock not in held:
                yield self.pgd_lock.write
                yield self.pgd_lock.release
            if pool is not None and (TABLE in result.work or UNTABLE in result.work):
                yield pool.write
                yield pool.release
            for key, n in result.work.items():
                self.counts[key] = self.counts.get(key, 0) + n
            yield Worked(result.work)
        for lock in reversed(held):
            yield lock.release
        return result

    # ---- host and hyp -----------------------------------------------------------------------------------------

    @hypercall
    def host_share_hyp(self, pfns: Sel) -> Steps[Result]:
        """__pkvm_host_share_hyp, one call a page: EL2 may pin them from now on. No table is touched."""
        locks = (*self._hosts(pfns), self.pgd_lock)
        return (yield from self._locked(locks, lambda: self._frame_only("host_share_hyp", pfns)))

    @hypercall
    def host_unshare_hyp(self, pfns: Sel) -> Steps[Result]:
        """__pkvm_host_unshare_hyp, one call a page. A page that EL2 has pinned: -EBUSY."""
        locks = (*self._hosts(pfns), self.pgd_lock)
        return (yield from self._locked(locks, lambda: self._frame_only("host_unshare_hyp", pfns)))

    def _frame_only(self, name: str, pfns: Sel) -> Result:
        move, checks = TRANSITIONS[name], _Checks(count(pfns))
        pfns = self._need_memory(pfns, checks)
        if not checks.n:
            return checks.result({})
        state = take(self.frame, pfns)
        checks.fail((state & move.mask) != move.want, Errno.EPERM)
        if (again := _seen_before(checks.cut(pfns))) is not None:
            checks.fail(again, Errno.EPERM)
        checks.fail(take(self.refcount, checks.cut(pfns)) != 0, Errno.EBUSY)
        pfns = checks.cut(pfns)
        self.frame[pfns] = state[: checks.n] ^ (move.want ^ move.result)
        return checks.result({})

    @hypercall
    def hyp_pin(self, pfn: int, nr: int) -> Steps[Result]:
        """hyp_pin_shared_mem, EL2 itself: map shared pages at EL2 and keep them shared. All of the range or nothing."""
        self._check_pa(pfn, nr)

        def act() -> Result:
            status = self._check_memory(pfn, nr) or self._cannot_pin(run(pfn, nr))
            return Result(status) if status else Result(done=nr, work=self._pin(run(pfn, nr)))

        return (yield from self._locked((*self._hosts(run(pfn, nr)), self.pgd_lock), act))

    def _cannot_pin(self, frames: Sel) -> Errno:
        checks, move = _Checks(count(frames)), TRANSITIONS["hyp_pin"]
        frames = self._need_memory(frames, checks)
        checks.fail((take(self.frame, frames) & move.mask) != move.want, Errno.EPERM)
        return checks.status

    def _pin(self, frames: Sel) -> Work:
        refs, work = take(self.refcount, frames), Work()
        if np.count_nonzero(refs == U16_MAX):
            raise InvariantViolation("a page of EL2 has 65535 references", pfn=first(frames))
        _add(work, PTE, len(refs) - int(np.count_nonzero(refs)))
        self.refcount[frames] = refs + np.uint16(1)
        return work

    @hypercall
    def hyp_unpin(self, pfn: int, nr: int) -> Steps[Result]:
        """hyp_unpin_shared_mem: checks nothing; a page that was not pinned is a bug of EL2 (InvariantViolation)."""
        self._check_pa(pfn, nr)
        frames = run(pfn, nr)
        return (yield from self._locked((*self._hosts(frames), self.pgd_lock), lambda: self._unpin(frames)))

    def _unpin(self, frames: Sel) -> Result:
        refs = take(self.refcount, frames)
        if np.count_nonzero(refs) < len(refs):
            raise InvariantViolation("EL2 unpins a page that it has not pinned", pfn=first(where(frames, refs == 0)))
        left, work = refs - np.uint16(1), Work()
        self.refcount[frames] = left
        gone = len(left) - int(np.count_nonzero(left))
        _add(work, PTE, gone)
        _add(work, TLBI_HYP, gone)
        return Result(done=len(left), work=work)

    @hypercall
    def host_donate_hyp(self, pfn: int, nr: int) -> Steps[Result]:
        """__pkvm_host_donate_hyp, EL2 itself: the host loses a range of pages to EL2. All of it or nothing."""
        locks = (*self._hosts(run(pfn, nr)), self.pgd_lock)
        return (yield from self._locked(locks, lambda: self._donate_hyp(pfn, nr)))

    def _donate_hyp(self, pfn: int, nr: int, touched: bool = False) -> Result:
        move, frames = TRANSITIONS["host_donate_hyp"], run(pfn, nr)
        status = self._check_range(pfn, nr) or self._check_state(frames, move)
        if status:
            return Result(status)
        work = Work()
        self._take_for_hyp(frames, touched, work)
        return Result(done=nr, work=work)

    def _take_for_hyp(self, frames: Sel, touched: bool, work: Work) -> None:
        """Frames that may be donated become EL2's, mapped there."""
        self._break_host_entries(frames, self._mapped(frames), touched, work)
        self.frame[frames] = TRANSITIONS["host_donate_hyp"].result
        self.owner[frames] = Owner.HYP
        _add(work, PTE, count(frames))

    @hypercall
    def hyp_donate_host(self, pfn: int, nr: int) -> Steps[Result]:
        """__pkvm_hyp_donate_host, EL2 itself: pages go back to the host as they are; whoever calls has cleared them.

        All of the range or nothing; a page with references: -EBUSY.
        """
        locks = (*self._hosts(run(pfn, nr)), self.pgd_lock)
        return (yield from self._locked(locks, lambda: self._donate_host(pfn, nr)))

    def _donate_host(self, pfn: int, nr: int) -> Result:
        frames, move = run(pfn, nr), TRANSITIONS["hyp_donate_host"]
        status = self._check_pa(pfn, nr)
        if not status and pfn + nr > self.nr_frames:
            status = Errno.EPERM
        if not status and np.count_nonzero((self.frame[frames] ^ move.want) & HYP_BITS):
            status = Errno.EPERM
        status = status or self._check_memory(pfn, nr) or self._check_state(frames, move)
        if not status and np.count_nonzero(self.refcount[frames]):
            status = Errno.EBUSY
        if status:
            return Result(status)
        work = Work()
        self._give_to_host(frames, work)
        return Result(done=nr, work=work)

    def _give_to_host(self, frames: Sel, work: Work) -> None:
        n = count(frames)
        self.frame[frames] = TRANSITIONS["hyp_donate_host"].result | VALID
        _add(work, TLBI_HYP, n)
        _add(work, PTE, 2 * n)

    # ---- FF-A -------------------------------------------------------------------------------------------------

    @hypercall
    def host_share_ffa(self, pfn: int, nr: int) -> Steps[Result]:
        """__pkvm_host_share_ffa: the host lends a range to TrustZone. All of it or nothing; no table is touched."""
        locks = self._hosts(run(pfn, nr))
        return (yield from self._locked(locks, lambda: self._ffa("host_share_ffa", pfn, nr)))

    @hypercall
    def host_unshare_ffa(self, pfn: int, nr: int) -> Steps[Result]:
        """__pkvm_host_unshare_ffa. That TrustZone was who borrowed the pages is the proxy's business, not checked."""
        locks = self._hosts(run(pfn, nr))
        return (yield from self._locked(locks, lambda: self._ffa("host_unshare_ffa", pfn, nr)))

    def _ffa(self, name: str, pfn: int, nr: int) -> Result:
        move, frames = TRANSITIONS[name], run(pfn, nr)
        status = self._check_range(pfn, nr) or self._check_state(frames, move)
        if status:
            return Result(status)
        self.frame[frames] ^= move.want ^ move.result
        return Result(done=nr)

    @el2
    def ffa_mem_share(self, ranges: Sequence[tuple[int, int]]) -> Steps[Ffa]:
        """The FF-A proxy (ffa_host_share_ranges): share (pfn, nr) ranges in turn; if one fails, take back those before
        it and answer DENIED. Lending is the same to EL2."""
        yield self.ffa_lock.write
        for i, (pfn, nr) in enumerate(ranges):
            result = yield from self.host_share_ffa.steps(pfn, nr)
            if not result.ok:
                for back in ranges[:i]:
                    yield from self.host_unshare_ffa.steps(*back)
                break
        else:
            i = len(ranges)
        yield self.ffa_lock.release
        return Ffa.SUCCESS if i == len(ranges) else Ffa.DENIED

    @el2
    def ffa_mem_reclaim(self, ranges: Sequence[tuple[int, int]]) -> Steps[Ffa]:
        """The proxy takes back ranges that the firmware has released, as its descriptor names them."""
        yield self.ffa_lock.write
        for pfn, nr in ranges:
            result = yield from self.host_unshare_ffa.steps(pfn, nr)
            if not result.ok:
                raise InvariantViolation("FF-A gives back a page that the host has not shared", pfn=pfn)
        yield self.ffa_lock.release
        return Ffa.SUCCESS

    # ---- VMs and vCPUs ----------------------------------------------------------------------------------------

    def vm_of(self, handle: int) -> HypVm | None:
        """get_vm_by_handle: None for what is out of range, free, or only reserved."""
        index = handle - HANDLE_OFFSET
        entry = self.vm_table[index] if 0 <= index < MAX_VMS else None
        return entry if isinstance(entry, HypVm) else None

    def _np_vm(self, handle: int) -> HypVm | None:
        """get_np_pkvm_hyp_vm: protected VMs are hidden from calls that name them."""
        vm = self.vm_of(handle)
        return None if vm is None or vm.protected else vm

    def _vcpu_on(self, cpu: int, protected: bool) -> HypVcpu | None:
        """The vCPU loaded on a CPU, where it is of the wanted kind."""
        vcpu = self.loaded.get(cpu)
        return vcpu if vcpu is not None and vcpu.vm.protected == protected else None

    @hypercall
    def reserve_vm(self) -> Steps[Result]:
        """__pkvm_reserve_vm: the answer is the handle. A full table: -ENOMEM."""
        return (yield from self._locked((self.vm_table_lock,), self._reserve))

    def _reserve(self) -> Result:
        for index, entry in enumerate(self.vm_table):
            if entry is None:
                self.vm_table[index] = _RESERVED
                return Result(done=1, answer=HANDLE_OFFSET + index)
        return Result(Errno.ENOMEM)

    @hypercall
    def unreserve_vm(self, handle: int) -> Steps[Result]:
        """__pkvm_unreserve_vm: gives up a handle whose VM was never made. Any other: -EINVAL."""
        return (yield from self._locked((self.vm_table_lock,), lambda: self._unreserve(handle)))

    def _is_reserved(self, handle: int) -> bool:
        return 0 <= handle - HANDLE_OFFSET < MAX_VMS and self.vm_table[handle - HANDLE_OFFSET] is _RESERVED

    def _unreserve(self, handle: int) -> Result:
        if not self._is_reserved(handle):
            return Result(Errno.EINVAL)
        self.vm_table[handle - HANDLE_OFFSET] = None
        return Result(done=1)

    @hypercall
    def init_vm(
        self, handle: int, protected: bool, nr_vcpus: int, host_kvm: Sel, memory: Sel, pgd: Sel
    ) -> Steps[Result]:
        """__pkvm_init_vm: pin the host's struct kvm (shared before) and take `vm_pages(nr_vcpus)` frames for EL2's own
        and PGD_PAGES for the root table. A frame that cannot be taken: -ENOMEM; other misuse: -EINVAL.
        """

        def act() -> Result:
            if count(memory) != vm_pages(nr_vcpus) or count(pgd) != PGD_PAGES:
                raise ValueError(f"a VM takes {vm_pages(nr_vcpus)} pages and {PGD_PAGES} for its root table")
            status = self._cannot_pin(host_kvm)
            if not status and (nr_vcpus < 1 or handle < HANDLE_OFFSET):
                status = Errno.EINVAL
            if not status and not self._can_take(memory, pgd):
                status = Errno.ENOMEM
            if not status and not self._is_reserved(handle):
                status = Errno.EINVAL
            if status:
                return Result(status)
            work = self._pin(host_kvm)
            for taken in (memory, pgd):
                self._take_for_hyp(taken, True, work)
            self.memory.clear(memory)
            vm = HypVm(handle, protected, nr_vcpus, self.end_gfn, memory, pgd, host_kvm)
            self.vm_table[handle - HANDLE_OFFSET] = vm
            return Result(done=1, work=work)

        return (yield from self._locked((self.vm_table_lock, *self._hosts(memory), self.pgd_lock), act))

    def _can_take(self, *parts: Sel) -> bool:
        """Whether EL2 can take all of these frames from the host."""
        frames = np.concatenate([array_of(p) for p in parts])
        return self._donable(frames) == len(frames)

    @hypercall
    def init_vcpu(
        self, handle: int, index: int, host_vcpu: Sel, memory: Sel, host_memcache: list[int] | None = None
    ) -> Steps[Result]:
        """__pkvm_init_vcpu: pin the host's struct kvm_vcpu (else -EBUSY), take VCPU_PAGES frames (-ENOMEM). Unknown VM:
        -ENOENT; an index that is taken or beyond the VM's vCPUs: -EINVAL.

        host_memcache is the list in the host's vCPU from which EL2 will take table pages.
        """

        def act() -> Result:
            if count(memory) != VCPU_PAGES:
                raise ValueError(f"a vCPU takes {VCPU_PAGES} pages")
            vm = self.vm_of(handle)
            if not self._can_take(memory):
                return Result(Errno.ENOMEM)
            if vm is None:
                return Result(Errno.ENOENT)
            if self._cannot_pin(host_vcpu):
                return Result(Errno.EBUSY)
            if not 0 <= index < len(vm.vcpus) or vm.vcpus[index] is not None:
                return Result(Errno.EINVAL)
            work = self._pin(host_vcpu)
            self._take_for_hyp(memory, True, work)
            self.memory.clear(memory)
            memcache = [] if host_memcache is None else host_memcache
            vm.vcpus[index] = HypVcpu(vm, index, memory, host_vcpu, memcache)
            return Result(done=1, work=work)

        return (yield from self._locked((self.vm_table_lock, *self._hosts(memory), self.pgd_lock), act))

    @hypercall
    def vcpu_load(self, cpu: int, handle: int, index: int) -> Steps[Result]:
        """__pkvm_vcpu_load on a CPU: it may now run, and calls for its VM may be made there. -EINVAL where refused:
        the CPU or the vCPU is busy, there is none, or its VM is dying (the real call refuses without a word)."""
        return (yield from self._locked((self.vm_table_lock,), lambda: self._load(cpu, handle, index)))

    def _load(self, cpu: int, handle: int, index: int) -> Result:
        vm = self.vm_of(handle)
        if cpu in self.loaded or vm is None or vm.is_dying or not 0 <= index < len(vm.vcpus):
            return Result(Errno.EINVAL)
        vcpu = vm.vcpus[index]
        if vcpu is None or vcpu.cpu is not None:
            return Result(Errno.EINVAL)
        vcpu.cpu = cpu
        self.refcount[first(vm.pages)] += 1
        self.loaded[cpu] = vcpu
        return Result(done=1)

    @hypercall
    def vcpu_put(self, cpu: int) -> Steps[Result]:
        """__pkvm_vcpu_put; without a loaded vCPU nothing happens."""
        return (yield from self._locked((self.vm_table_lock,), lambda: self._put(cpu)))

    def _put(self, cpu: int) -> Result:
        vcpu = self.loaded.pop(cpu, None)
        if vcpu is not None:
            vcpu.cpu = None
            self.refcount[first(vcpu.vm.pages)] -= 1
        return Result(done=1)

    @hypercall
    def start_teardown_vm(self, handle: int) -> Steps[Result]:
        """__pkvm_start_teardown_vm: from now on no vCPU loads, and pages can be reclaimed. -EINVAL for an unknown VM,
        a loaded vCPU, or twice."""
        return (yield from self._locked((self.vm_table_lock,), lambda: self._start_teardown(handle)))

    def _start_teardown(self, handle: int) -> Result:
        vm = self.vm_of(handle)
        if vm is None or self.refcount[first(vm.pages)] or vm.is_dying:
            return Result(Errno.EINVAL)
        vm.is_dying = True
        return Result(done=1)

    @hypercall
    def finalize_teardown_vm(self, handle: int) -> Steps[Result]:
        """__pkvm_finalize_teardown_vm: the VM is gone; the answer is (hyp, stage2): the frames of its own structures
        and of its tables and memcaches, the host's again. -EINVAL unless dying.

        Nobody looks for pages that were not reclaimed: they stay out of the host's reach for ever (`LEAKED`).
        """
        dropped = yield from self._locked((self.vm_table_lock,), lambda: self._drop_vm(handle))
        if not dropped.ok:
            return dropped
        vm: HypVm = dropped.answer
        locks = (*self._hosts(vm.pages), self.pgd_lock)
        return (yield from self._locked(locks, lambda: self._finalize(vm)))

    def _drop_vm(self, handle: int) -> Result:
        vm = self.vm_of(handle)
        if vm is None or self.refcount[first(vm.pages)] or not vm.is_dying:
            return Result(Errno.EINVAL)
        self.vm_table[handle - HANDLE_OFFSET] = None
        return Result(done=1, answer=vm)

    def _finalize(self, vm: HypVm) -> Result:
        work = Work({TLBI_VMID: 1})
        self._leak_rest(vm)
        vcpus = [vcpu for vcpu in vm.vcpus if vcpu is not None]
        tables = [*vm.tables, *vm.pool]
        spare = [pfn for vcpu in vcpus for pfn in vcpu.memcache]
        stage2 = contiguous(np.concatenate([array_of(vm.pgd), np.array(tables + spare, np.int64)]))
        hyp = contiguous(np.concatenate([array_of(vm.pages), *(array_of(vcpu.pages) for vcpu in vcpus)]))
        # EL2 zeroes what it wrote into; of spare pages only the list's links are its own.
        for cleared in (hyp, vm.pgd, contiguous(np.array(tables, np.int64))):
            if count(cleared):
                self.memory.clear(cleared)
        _add(work, CLEAR, count(hyp))
        for frames in (hyp, stage2):
            self._give_to_host(frames, work)
        for pinned in (vm.host_pages, *(vcpu.host_pages for vcpu in vcpus)):
            for key, n in self._unpin(pinned).work.items():
                _add(work, key, n)
        return Result(done=1, work=work, answer=(hyp, stage2))

    def _leak_rest(self, vm: HypVm) -> None:
        """Frames that a finalised VM still had: marked, and their annotation names nobody any more."""
        stage2 = vm.stage2
        for table, size in ((stage2.pages, 1), (stage2.blocks, PAGES_BLOCK)):
            words = table[np.flatnonzero(table)]
            words = words[(words & LEAF_BITS) > LEAF_POISON]
            for offset in range(size) if len(words) else ():
                frames = (words >> FRAME_SHIFT).astype(np.int64) + offset
                self.frame[frames] |= LEAKED
                self.owner[frames] = _GONE

    # ---- a mapping's table pages ------------------------------------------------------------------------------
    #
    # Before each call that maps, EL2 fills its memcache up to MEMCACHE_MIN_PAGES from the host's list; a call that
    # finds fewer fails with -ENOMEM, after its ownership checks. A listed page that the host cannot give (not its own,
    # or twice in the list) ends the refill: -ENOMEM as well, and before anything else of that call is checked.

    def _plan_tables(self, vcpu: HypVcpu, gfns: Sel, nr: int, checks: _Checks) -> _Plan:
        """What the batch needs. Calls behind the first that is sure to fail, for want of tables or beyond the IPA size,
        are not looked at; that one still has its other checks before it."""
        inside = _Checks(checks.total)
        gfns = vcpu.vm.stage2.cover(gfns, inside, nr)
        plan = _Plan(*vcpu.vm.stage2.adding(gfns, nr)) if inside.n else _Plan([], np.zeros(0, np.int64))
        plan.inside = inside.n
        checks.look_at(min(plan.first_dry(vcpu, len(vcpu.host_memcache), checks.total), inside.n) + 1)
        return plan

    def _link_tables(self, vcpu: HypVcpu, gfns: Sel, nr: int, plan: _Plan, checks: _Checks, work: Work) -> None:
        """Refill for every call up to the one that fails, and link what those that pass need."""
        vm, total = vcpu.vm, checks.total
        held, pool = len(vcpu.memcache), len(vm.pool)
        checks.answer = 0
        if len(plan.at) or held < MEMCACHE_MIN_PAGES:

            def refilled(call: int) -> int:
                """Pages taken from the host when this call begins, if there are enough."""
                used = max(0, int(np.searchsorted(plan.at, call)) - pool)
                return max(0, MEMCACHE_MIN_PAGES - held + used) if call >= 0 else 0

            wanted = refilled(total - 1)
            listed = contiguous(np.array(vcpu.host_memcache[:wanted], np.int64))
            given = self._donable(listed)
            refused = given < min(wanted, len(vcpu.host_memcache))
            dry = plan.first_dry(vcpu, given, total)
            if dry < total and (checks.status == Errno.OK or dry < checks.n or (refused and dry == checks.n)):
                checks.n, checks.status = dry, Errno.ENOMEM
                checks.need = 0 if refused else wanted - given
            attempted = min(checks.n, total - 1)
            admitted = min(given, refilled(attempted))
            checks.answer = admitted - min(given, refilled(attempted - 1))
            if admitted:
                self._take_for_hyp(part(listed, 0, admitted), True, work)
                vcpu.memcache += vcpu.host_memcache[:admitted]
                del vcpu.host_memcache[:admitted]
                _add(work, ADMIT, admitted)
        if not checks.n:
            return
        if checks.n < total:
            plan = _Plan(*vm.stage2.adding(checks.cut(gfns), nr))
        for level, tables, counts in plan.changes:
            vm.stage2.used[level][tables] = counts
        if n := len(plan.at):
            popped = max(0, n - pool)
            vm.tables += vm.pool[:n] + vcpu.memcache[:popped]
            del vm.pool[:n], vcpu.memcache[:popped]
            _add(work, TABLE, n)
            _add(work, PTE, n)

    def _donable(self, pfns: Sel) -> int:
        """How many leading frames EL2 can take from the host, one after the other."""
        checks, move = _Checks(count(pfns)), TRANSITIONS["host_donate_hyp"]
        pfns = self._need_memory(pfns, checks)
        checks.fail((take(self.frame, pfns) & move.mask) != move.want, Errno.EPERM)
        if (again := _seen_before(checks.cut(pfns))) is not None:
            checks.fail(again, Errno.EPERM)
        return checks.n

    def _unlink_tables(self, vm: HypVm, gfns: Sel, nr: int, work: Work) -> None:
        """Entries went: tables that emptied go to the VM's pool, each with an invalidation of its own."""
        if n := vm.stage2.drop(gfns, nr):
            vm.pool += vm.tables[:n]
            del vm.tables[:n]
            _add(work, UNTABLE, n)
            _add(work, TLBI_GUEST, n)
            _add(work, PTE, n)

    # ---- protected guests -------------------------------------------------------------------------------------

    @hypercall
    def host_donate_guest(self, cpu: int, pfns: Sel, gfns: Sel, touched: bool = False) -> Steps[Result]:
        """__pkvm_host_donate_guest, one call a page: the pVM loaded on `cpu` owns the frame at the gfn, content and
        all, and the host has lost it. No such vCPU: -EINVAL; see TRANSITIONS; too few table pages: -ENOMEM.
        The answer is how many table pages the last call took from the host's memcache.

        touched: the host wrote each page right before its call (it had just allocated it).
        """
        vcpu = self._vcpu_on(cpu, protected=True)
        if vcpu is None:
            return Result(Errno.EINVAL)
        locks = (*self._hosts(pfns, vcpu.vm), *self._of_vm(vcpu.vm, gfns))
        act = functools.partial(self._donate_guest, vcpu, pfns, gfns, touched)
        return (yield from self._locked(locks, act, vcpu.vm.pool_lock))

    def _donate_guest(self, vcpu: HypVcpu, pfns: Sel, gfns: Sel, touched: bool) -> Result:
        vm, move = vcpu.vm, TRANSITIONS["host_donate_guest"]
        checks, work = _Checks(count(gfns), count(pfns)), Work()
        plan = self._plan_tables(vcpu, gfns, 1, checks)
        pfns = self._need_memory(pfns, checks)
        state = take(self.frame, pfns)
        mapped = int(np.count_nonzero(state))  # the byte of a plain host page is zero
        if mapped:
            checks.fail((state & move.mask) != move.want, Errno.EPERM)
        if (again := _seen_before(checks.cut(pfns))) is not None:
            checks.fail(again, Errno.EPERM)
        checks.stop(plan.inside, Errno.ERANGE)
        if checks.n:
            words = vm.stage2.leaves(checks.cut(gfns))
            if not all_zero(words):
                checks.fail(words != ABSENT, Errno.EPERM)
        self._link_tables(vcpu, gfns, 1, plan, checks, work)
        n = checks.n
        if n == 0:
            return checks.result(work)
        pfns, gfns = checks.cut(pfns), checks.cut(gfns)
        self._break_host_entries(pfns, int(np.count_nonzero(state[:n] & VALID)) if mapped else 0, touched, work)
        self.frame[pfns] = move.result
        self.owner[pfns] = vm.handle
        if isinstance(gfns, slice) and isinstance(pfns, slice) and n <= len(_RAMP):
            np.add(_RAMP[:n], gfns.start, out=self.owner_gfn[pfns])
        else:
            self.owner_gfn[pfns] = array_of(gfns).astype(np.uint32)
        _map(vm.stage2.pages, gfns, pfns, move.new_leaf)
        _add(work, PTE, n)
        _add(work, GUEST_CMO, 0 if self.fwb and self.dic else n)
        return checks.result(work)

    @hypercall
    def guest_share_host(self, cpu: int, gfns: Sel) -> Steps[Result]:
        """__pkvm_guest_share_host, one call a page, by the pVM loaded on `cpu`: the host may use the page as well.

        Nothing is invalidated: an absent host entry becomes valid, the guest's changes a software bit.
        """
        return (yield from self._converted("guest_share_host", cpu, gfns))

    @hypercall
    def guest_unshare_host(self, cpu: int, gfns: Sel) -> Steps[Result]:
        """__pkvm_guest_unshare_host, one call a page: the host loses the page again, one invalidation each; content
        stays as it is."""
        return (yield from self._converted("guest_unshare_host", cpu, gfns))

    def _converted(self, name: str, cpu: int, gfns: Sel, batch: int = 1) -> Steps[Result]:
        vcpu = self._vcpu_on(cpu, protected=True)
        if vcpu is None:
            return Result(Errno.EINVAL)
        vm = vcpu.vm
        locks = self._of_guest(vm, gfns, converts=True)
        return (yield from self._locked(locks, lambda: self._convert(TRANSITIONS[name], vm, gfns, batch)))

    def _owned_leaves(
        self, vm: HypVm, gfns: Sel, wanted: tuple[int, ...], checks: _Checks
    ) -> tuple[Words, int | Words, Sel]:
        """get_valid_guest_pte for each gfn, then its state: entries, leaf bits and frames of those that pass."""
        gfns = vm.stage2.cover(gfns, checks)
        words = take(vm.stage2.pages, gfns)
        if not checks.n:
            return words, ABSENT, EMPTY
        leaves, pfns = _leaves(words)
        if isinstance(leaves, int) and leaves in wanted:
            return words, leaves, pfns
        each = words & LEAF_BITS
        if LEAF_POISON not in wanted:
            checks.fail(each == LEAF_POISON, Errno.EHWPOISON)
        checks.fail(each == ABSENT, Errno.ENOENT)
        checks.fail(np.isin(each, wanted, invert=True), Errno.EPERM)
        words = words[: checks.n]
        return (words, *(_leaves(words) if checks.n else (ABSENT, EMPTY)))

    def _convert(self, move: Transition, vm: HypVm, gfns: Sel, batch: int) -> Result:
        """The answer is the page that fails; of its call, which covers `batch` pages, those before it stay as they are.
        """
        checks, work = _Checks(count(gfns)), Work()
        checks.answer = 0
        words, _leaf, pfns = self._owned_leaves(vm, gfns, (move.leaf,), checks)
        if not checks.n:
            return checks.result(work)
        state = take(self.frame, pfns)
        # Uniform as a rule: private pages have no host entry, shared ones a page entry each.
        usual = move.want if move.after[0] != NOPAGE else move.want | VALID
        uniform = not np.count_nonzero(state != usual)
        if not uniform:
            checks.fail((state & move.mask) != move.want, Errno.EPERM)
            if not checks.n:
                return checks.result(work)
        checks.answer = checks.n
        if batch > 1 and checks.n < checks.total:
            checks.look_at(_call_of(array_of(part(gfns, 0, checks.n + 1)), words, batch))
        n = checks.n
        if n == 0:
            return checks.result(work)
        if n < checks.total:
            gfns, pfns, words = checks.cut(gfns), part(pfns, 0, n), words[:n]
        if move.after[0] == NOPAGE:
            # The annotation still stands in owner and owner_gfn: a shared page stays its guest's.
            self._break_host_entries(pfns, n if uniform else self._mapped(pfns), False, work)
            self.frame[pfns] = move.result
        else:
            self.frame[pfns] = move.result | VALID
            _add(work, PTE, n)
        flip = move.leaf ^ move.new_leaf
        if isinstance(gfns, slice):
            np.bitwise_xor(words, flip, out=words)  # a view of the table
        else:
            vm.stage2.pages[gfns] = words ^ flip
        _add(work, PTE, n)
        return checks.result(work)

    @hypercall
    def host_reclaim_guest(self, handle: int, gfns: Sel) -> Steps[Result]:
        """__pkvm_reclaim_dying_guest_page, one call a page: a page of a dying VM is the host's again, zeroed if it was
        private, as it is if the guest had shared it. Unknown or not dying: -EINVAL; poisoned: done, nothing to do."""
        vm = self.vm_of(handle)
        if vm is None or not vm.is_dying:
            return Result(Errno.EINVAL)
        return (yield from self._locked(self._of_guest(vm, gfns), lambda: self._reclaim(vm, gfns), vm.pool_lock))

    def _reclaim(self, vm: HypVm, gfns: Sel) -> Result:
        checks, work = _Checks(count(gfns)), Work()
        _words, leaves, pfns = self._owned_leaves(vm, gfns, (LEAF_OWNED, LEAF_SHARED_OWNED, LEAF_POISON), checks)
        if not checks.n:
            return checks.result(work)
        gfns = checks.cut(gfns)
        for name in ("host_reclaim_guest", "reclaim, if shared"):
            move = TRANSITIONS[name]
            if isinstance(leaves, int):
                if leaves != move.leaf:
                    continue
                named, frames = gfns, pfns
            else:
                chosen = leaves == move.leaf
                if not np.count_nonzero(chosen):
                    continue
                named, frames = where(gfns, chosen), array_of(pfns)[chosen]
            state = take(self.frame, frames)
            wrong = (state & move.mask) != move.want
            if np.count_nonzero(wrong):
                bad = first(where(frames, wrong))
                raise InvariantViolation("a guest's page is not what its host side says", pfn=bad)
            n = count(frames)
            if move.before[0] == NOPAGE:
                self.memory.clear(frames)
                _add(work, CLEAR, n)
            else:
                _add(work, UNMAP_CMO, 0 if self.fwb else n)
            self.frame[frames] = move.result | VALID
            vm.stage2.pages[named] = 0
            _add(work, PTE, 2 * n)
            _add(work, TLBI_RANGE if self.fwb and self.tlbi_range else TLBI_GUEST, n)
        gone = gfns
        if not isinstance(leaves, int):
            gone = where(gfns, leaves != LEAF_POISON)
        elif leaves == LEAF_POISON:
            gone = EMPTY
        if count(gone):
            self._unlink_tables(vm, gone, 1, work)
        return checks.result(work)

    @hypercall
    def host_force_reclaim(self, pfns: Sel) -> Steps[Result]:
        """__pkvm_host_force_reclaim_page_guest, one call a frame, after the host's kernel has touched it illegally:
        the page is zeroed and the host's, its guest finds poison.

        Not memory: -EFAULT. Accessible to the host, or its VM is gone: -EAGAIN. EL2's, or not a private page: -EPERM.
        """

        def now() -> tuple[SpinLock, ...]:
            checks, vms = self._forcible(pfns)
            frames = array_of(checks.cut(pfns))
            owners: list[HypVm | None] = [*vms] or [None]
            hosts = dict.fromkeys(lock for vm in owners for lock in self._hosts(pfns, vm))
            guests = [lock for vm in vms for lock in self._of_vm(vm, self._gfns_in(vm, frames))]
            return (self.vm_table_lock, *hosts, *guests)

        return (yield from self._locked(now, lambda: self._force_reclaim(pfns)))

    def _gfns_in(self, vm: HypVm, frames: IntArray) -> IntArray:
        """Where the frames are that a VM owns, as their annotations say."""
        gfns: IntArray = self.owner_gfn[frames[self.owner[frames] == vm.handle]].astype(np.int64)
        return gfns

    def _forcible(self, pfns: Sel) -> tuple[_Checks, list[HypVm]]:
        """Which leading frames can be reclaimed by force, and the VMs that own them, by handle."""
        checks = _Checks(count(pfns))
        pages = array_of(self._need_memory(pfns, checks, Errno.EFAULT, nomap=True))
        state = self.frame[pages]
        checks.fail((state & HOST_BITS) != NOPAGE, Errno.EAGAIN)
        owner = self.owner[pages]
        checks.fail(owner == Owner.HYP, Errno.EPERM)
        found = [(handle, self.vm_of(handle)) for handle in _distinct(owner[: checks.n].astype(np.int64)).tolist()]
        gone = [handle for handle, vm in found if vm is None]
        if gone:
            checks.fail(np.isin(owner, gone), Errno.EAGAIN)
        vms = [vm for _handle, vm in found if vm is not None]
        for vm in vms:
            mine = np.flatnonzero(owner[: checks.n] == vm.handle)
            words = vm.stage2.pages[self.owner_gfn[pages[mine]]]
            wrong = words != (pages[mine] << FRAME_SHIFT | LEAF_OWNED)
            if np.count_nonzero(wrong):
                checks.stop(int(mine[np.argmax(wrong)]), Errno.EPERM)
        if (again := _seen_before(checks.cut(pfns))) is not None:
            checks.fail(again, Errno.EAGAIN)
        return checks, vms

    def _force_reclaim(self, pfns: Sel) -> Result:
        checks, vms = self._forcible(pfns)
        work = Work()
        pages = array_of(checks.cut(pfns))
        move = TRANSITIONS["host_force_reclaim"]
        for vm in vms:
            mine = pages[self.owner[pages] == vm.handle]
            if not len(mine):
                continue
            vm.stage2.pages[self.owner_gfn[mine]] = move.new_leaf
            self.memory.clear(mine)
            self.frame[mine] = move.result | VALID
            _add(work, CLEAR, len(mine))
            _add(work, TLBI_GUEST, len(mine))
            _add(work, PTE, 2 * len(mine))
        return checks.result(work)

    @hypercall
    def vcpu_in_poison_fault(self, cpu: int, gfns: Sel) -> Steps[Result]:
        """__pkvm_vcpu_in_poison_fault, one call for each fault the vCPU on `cpu` came out with: the answer is a mask.

        EL2 reads the addresses from its own record of the last walk, so the host cannot probe: a gfn that the vCPU has
        not just faulted on is no poison fault. No pVM loaded there: -EINVAL.
        """
        vcpu = self._vcpu_on(cpu, protected=True)
        if vcpu is None:
            return Result(Errno.EINVAL)
        return (yield from self._locked(self._of_vm(vcpu.vm, gfns), lambda: self._poison_faults(vcpu, gfns)))

    def _poison_faults(self, vcpu: HypVcpu, gfns: Sel) -> Result:
        walked, status = vcpu.faults
        faulted = array_of(walked)[np.broadcast_to(np.asarray(status), count(walked)) != Walk.OK]
        asked = np.isin(array_of(gfns), faulted)
        pages = array_of(gfns)[asked]
        asked[asked] = vcpu.vm.stage2.pages[pages] == LEAF_POISON
        return Result(done=count(gfns), answer=asked)

    # ---- non-protected guests ---------------------------------------------------------------------------------

    @staticmethod
    def _check_size(gfns: Sel, nr: int, checks: _Checks, pfns: Sel = EMPTY) -> int:
        """__guest_check_transition_size: 1 page, or 512 with both sides aligned. Returns the order."""
        if nr not in (1, PAGES_BLOCK):
            checks.stop(0, Errno.EINVAL)
        elif nr > 1:
            for heads in (gfns, pfns):
                if count(heads):
                    checks.fail((array_of(checks.cut(heads)) & (nr - 1)) != 0, Errno.EINVAL)
        return BLOCK_ORDER if nr > 1 else 0

    @hypercall
    def host_share_guest(self, cpu: int, pfns: Sel, gfns: Sel, nr: int, prot: int) -> Steps[Result]:
        """__pkvm_host_share_guest, one call for each gfn: map `nr` pages (1, or an aligned block of 512) into the np VM
        loaded on `cpu` with rights `prot`; the host keeps them. See TRANSITIONS; a full share count: -EBUSY. The answer
        is as for host_donate_guest."""
        vcpu = self._vcpu_on(cpu, protected=False)
        if vcpu is None:
            return Result(Errno.EINVAL)
        locks = (*self._hosts(pfns, vcpu.vm), *self._of_vm(vcpu.vm, gfns))
        act = functools.partial(self._share_guest, vcpu, pfns, gfns, nr, prot)
        return (yield from self._locked(locks, act, vcpu.vm.pool_lock))

    def _share_guest(self, vcpu: HypVcpu, pfns: Sel, gfns: Sel, nr: int, prot: int) -> Result:
        stage2, checks, work = vcpu.vm.stage2, _Checks(count(gfns), count(pfns)), Work()
        if prot & ~RWX or nr not in (1, PAGES_BLOCK):
            checks.stop(0, Errno.EINVAL)
            nr = 1  # the refill, which comes before any check, is the same
        plan = self._plan_tables(vcpu, gfns, nr, checks)
        self._need_pa(pfns, nr, checks)
        order = self._check_size(gfns, nr, checks, pfns)
        self._need_blocks(pfns, nr, checks)
        checks.stop(plan.inside, Errno.ERANGE)
        if checks.n:
            named = checks.cut(gfns)
            taken = stage2.blocks.take(array_of(named) >> BLOCK_ORDER) != 0
            taken |= (take(stage2.used[0], blocks(named, order)) if order else take(stage2.pages, named)) != 0
            checks.fail(taken, Errno.EPERM)
        frames = expand(checks.cut(pfns), order)
        if checks.n:
            state = take(self.frame, frames) & HOST_BITS
            shares = take(self.share_count, frames)
            full = (state == SHARED_OWNED) & (shares == U32_MAX)
            bad = full | ~((state == OWNED) | ((state == SHARED_OWNED) & (shares != 0)))
            if np.count_nonzero(bad):
                at = int(np.argmax(bad))
                checks.stop(at >> order, Errno.EBUSY if full[at] else Errno.EPERM)
        self._link_tables(vcpu, gfns, nr, plan, checks, work)
        n = checks.n
        if n == 0:
            return checks.result(work)
        gfns, pfns = checks.cut(gfns), checks.cut(pfns)
        frames = expand(pfns, order)
        move = TRANSITIONS["host_share_guest"]
        self.frame[frames] = take(self.frame, frames) & np.uint8(~HOST_BITS & 0xFF) | move.result
        if _strictly_rising(frames):
            self.share_count[frames] += np.uint32(1)
        else:
            np.add.at(self.share_count, array_of(frames), np.uint32(1))
        table, index = (stage2.blocks, blocks(gfns, order)) if order else (stage2.pages, gfns)
        _map(table, index, pfns, move.new_leaf | LEAF_YOUNG | int(prot))
        stage2.nr_blocks += n if order else 0
        _add(work, PTE, n)
        _add(work, BLOCK_CMO if order else GUEST_CMO, 0 if self.fwb and self.dic else n)
        return checks.result(work)

    def _need_pa(self, pfns: Sel, nr: int, checks: _Checks) -> None:
        pages = array_of(checks.cut(pfns))
        checks.fail((pages < 0) | (pages + nr > self.pa_frames), Errno.EINVAL)

    def _need_blocks(self, pfns: Sel, nr: int, checks: _Checks) -> None:
        """check_range_allowed_memory for each block of nr frames."""
        if nr == 1:
            self._need_memory(pfns, checks)
            return
        for i, pfn in enumerate(array_of(checks.cut(pfns)).tolist()):
            if status := self._check_memory(pfn, nr):
                checks.stop(i, status)
                return

    @hypercall
    def host_unshare_guest(self, handle: int, gfns: Sel, nr: int) -> Steps[Result]:
        """__pkvm_host_unshare_guest, one call for each gfn: the np VM loses a leaf of `nr` pages. Absent or poisoned:
        -ENOENT; a leaf of another size: -E2BIG. The last unshare makes the frame the host's own again."""
        vm = self._np_vm(handle)
        if vm is None:
            return Result(Errno.EINVAL)
        act = functools.partial(self._unshare_guest, vm, gfns, nr)
        return (yield from self._locked(self._of_guest(vm, gfns), act, vm.pool_lock))

    def _unshare_guest(self, vm: HypVm, gfns: Sel, nr: int) -> Result:
        stage2, checks, work = vm.stage2, _Checks(count(gfns)), Work()
        order = self._check_size(gfns, nr, checks)
        gfns = stage2.cover(gfns, checks, nr)
        if not checks.n:
            return checks.result(work)
        words = self._np_words(stage2, gfns, order)
        absent = (words & LEAF_BITS) <= LEAF_POISON
        if np.count_nonzero(absent):
            at = int(np.argmax(absent))
            checks.stop(at, Errno.ENOENT if not self._maps(stage2, first(part(gfns, at, at + 1))) else Errno.E2BIG)
        checks.fail((words & LEAF_BORROWED) == 0, Errno.EPERM)
        move = TRANSITIONS["host_unshare_guest"]
        pfns = contiguous(words[: checks.n] >> FRAME_SHIFT, nr)
        frames = expand(pfns, order)
        if checks.n:
            state = take(self.frame, frames) & move.mask
            bad = (state != move.want) | (take(self.share_count, frames) == 0)
            if np.count_nonzero(bad):
                checks.stop(int(np.argmax(bad)) >> order, Errno.EPERM)
        n = checks.n
        if n == 0:
            return checks.result(work)
        gfns, frames = checks.cut(gfns), expand(checks.cut(pfns), order)
        if _strictly_rising(frames):
            self.share_count[frames] -= np.uint32(1)
        else:
            np.subtract.at(self.share_count, array_of(frames), np.uint32(1))
        alone = take(self.share_count, frames) == 0
        self.frame[where(frames, alone)] ^= move.want ^ move.result
        stage2.invalidated(expand(gfns, order))
        if order:
            stage2.blocks[blocks(gfns, order)] = 0
            stage2.nr_blocks -= n
        else:
            stage2.pages[gfns] = 0
        _add(work, PTE, n)
        _add(work, TLBI_RANGE if self.fwb and self.tlbi_range else TLBI_GUEST, n)
        _add(work, BLOCK_CMO if order else UNMAP_CMO, 0 if self.fwb else n)
        self._unlink_tables(vm, gfns, nr, work)
        return checks.result(work)

    @staticmethod
    def _np_words(stage2: Stage2, gfns: Sel, order: int) -> Words:
        return take(stage2.blocks, blocks(gfns, order)) if order else take(stage2.pages, gfns)

    @staticmethod
    def _maps(stage2: Stage2, gfn: int) -> bool:
        return bool(stage2.pages[gfn] > LEAF_POISON or stage2.blocks[gfn >> BLOCK_ORDER])

    @hypercall
    def relax_perms(self, cpu: int, gfns: Sel, prot: int) -> Steps[Result]:
        """__pkvm_host_relax_perms_guest, one call for each leaf that a gfn lies in: add rights, never take any. Absent:
        -EAGAIN. Each call invalidates on this CPU, the failing one too."""
        vcpu = self._vcpu_on(cpu, protected=False)
        if vcpu is None:
            return Result(Errno.EINVAL)
        vm = vcpu.vm
        return (yield from self._locked(self._of_vm(vm, gfns), lambda: self._relax(vm.stage2, gfns, prot)))

    def _relax(self, stage2: Stage2, gfns: Sel, prot: int) -> Result:
        checks, work = _Checks(count(gfns)), Work()
        if prot & ~RWX:
            checks.stop(0, Errno.EINVAL)
        gfns = stage2.cover(gfns, checks)
        if checks.n:
            checks.fail((stage2.leaves(gfns) & LEAF_BORROWED) == 0, Errno.EAGAIN)
        gfns, n = checks.cut(gfns), checks.n
        if n:
            self._set_bits(stage2, gfns, int(prot))
            _add(work, PTE, n)
        _add(work, TLBI_LOCAL, n + (checks.status == Errno.EAGAIN))
        return checks.result(work)

    @hypercall
    def mkyoung(self, cpu: int, gfns: Sel) -> Steps[Result]:
        """__pkvm_host_mkyoung_guest, one call a leaf that a gfn lies in: set its access flag. Absent ones are passed
        over."""
        vcpu = self._vcpu_on(cpu, protected=False)
        if vcpu is None:
            return Result(Errno.EINVAL)
        vm = vcpu.vm

        def act() -> Result:
            checks, work = _Checks(count(gfns)), Work()
            named = vm.stage2.cover(gfns, checks)
            if checks.n:
                named = where(named, (vm.stage2.leaves(named) & LEAF_BORROWED) != 0)
                self._set_bits(vm.stage2, named, LEAF_YOUNG)
                _add(work, PTE, count(named))
            return checks.result(work)

        return (yield from self._locked(self._of_vm(vm, gfns), act))

    @staticmethod
    def _set_bits(stage2: Stage2, gfns: Sel, bits: int) -> None:
        """Set bits in the leaves of either size that the gfns lie in."""
        if stage2.nr_blocks:
            inside = stage2.in_block(gfns)
            stage2.blocks[array_of(where(gfns, inside)) >> BLOCK_ORDER] |= bits
            gfns = where(gfns, ~inside)
        stage2.pages[gfns] |= bits

    @hypercall
    def wrprotect(self, handle: int, gfns: Sel, nr: int) -> Steps[Result]:
        """__pkvm_host_wrprotect_guest, one call for each gfn: leaves among its `nr` pages lose write access, absent
        ones are passed over. Invalidates nothing: the host follows with tlb_flush_vmid."""
        vm = self._np_vm(handle)
        if vm is None:
            return Result(Errno.EINVAL)
        stage2 = vm.stage2

        def act() -> Result:
            checks, work = _Checks(count(gfns)), Work()
            order = self._check_size(gfns, nr, checks)
            named = stage2.cover(gfns, checks, nr)
            if checks.n:
                pages = expand(named, order)
                writable = stage2.leaves(pages) & (LEAF_BORROWED | int(Prot.W)) > LEAF_BORROWED
                if np.count_nonzero(writable):
                    stage2.stale.append(where(pages, writable))
                _add(work, PTE, self._take_bits(stage2, pages, int(Prot.W)))
            return checks.result(work)

        return (yield from self._locked(self._of_vm(vm, gfns), act))

    @staticmethod
    def _take_bits(stage2: Stage2, pages: Sel, bits: int) -> int:
        """Clear bits in the leaves of either size that cover the pages. Returns how many entries changed."""
        changed = 0
        for table, index in ((stage2.pages, pages), (stage2.blocks, blocks(pages, BLOCK_ORDER))):
            words = take(table, index)
            has = (words & LEAF_BORROWED) != 0
            has &= (words & bits) != 0
            if n := int(np.count_nonzero(has)):
                table[where(index, has)] &= ~bits & U32_MAX
                changed += n
        return changed

    @hypercall
    def test_clear_young(self, handle: int, gfns: Sel, nr: int, mkold: bool) -> Steps[Result]:
        """__pkvm_host_test_clear_young_guest, one call for each gfn: the answer is a mask, whether any leaf among its
        `nr` pages has the access flag; `mkold` clears it. Invalidates nothing."""
        vm = self._np_vm(handle)
        if vm is None:
            return Result(Errno.EINVAL)
        stage2 = vm.stage2

        def act() -> Result:
            checks, work = _Checks(count(gfns)), Work()
            order = self._check_size(gfns, nr, checks)
            pages = expand(stage2.cover(gfns, checks, nr), order)
            young = np.zeros(0, bool)
            if checks.n:
                words = stage2.leaves(pages) & (LEAF_BORROWED | LEAF_YOUNG)
                young = (words == LEAF_BORROWED | LEAF_YOUNG).reshape(checks.n, -1).any(axis=1)
                if mkold:
                    _add(work, PTE, self._take_bits(stage2, pages, LEAF_YOUNG))
            checks.answer = young
            return checks.result(work)

        return (yield from self._locked(self._of_vm(vm, gfns), act))

    @hypercall
    def tlb_flush_vmid(self, handle: int) -> Steps[Result]:
        """__pkvm_tlb_flush_vmid: drop all translations of an np VM. A protected one is hidden: nothing (-EINVAL)."""
        vm = self._np_vm(handle)
        if vm is None:
            return Result(Errno.EINVAL)

        def act() -> Result:
            vm.stage2.stale.clear()
            return Result(done=1, work=Work({TLBI_VMID: 1}))

        return (yield from self._locked((), act))

    def read_stage2(self, handle: int, gfns: Sel, level: int) -> tuple[Bytes, IntArray]:
        """What a VM's stage 2 holds at a level (1: pages, 2: blocks of 2 MiB, ...) for these gfns, for a debugger.

        State (0 absent, 1 a leaf, 2 a table, 3 poison) and the leaf's frame, one for each. ValueError: no such VM.
        """
        vm = self.vm_of(handle)
        if vm is None:
            raise ValueError(f"there is no VM {handle:#x}")
        stage2, pages = vm.stage2, array_of(gfns)
        state, frames = np.zeros(len(pages), np.uint8), np.zeros(len(pages), np.int64)
        known = np.flatnonzero(pages < len(stage2.pages))
        index = pages[known] >> BLOCK_ORDER * (level - 1)
        if level in (1, 2):
            words = (stage2.pages if level == 1 else stage2.blocks)[index]
            leaf = (words & LEAF_BITS) > LEAF_POISON
            state[known[leaf]] = 1
            state[known[(words & LEAF_BITS) == LEAF_POISON]] = 3
            frames[known[leaf]] = words[leaf] >> FRAME_SHIFT
        if level in (2, 3):
            state[known[stage2.used[level - 2][index] != 0]] = 2
        elif level > 3:
            state[known] = 2 if stage2.used[1].any() else 0
        return state, frames

    # ---- what a guest does ------------------------------------------------------------------------------------

    def guest_access(self, cpu: int, gfns: Sel, write: bool = False) -> Access:
        """The MMU's walk for the vCPU loaded on `cpu`, page by page. MISS: a stage-2 fault, poison among them. Where
        write access was taken and nothing invalidated since, a TLB lets the write pass.

        ValueError where no vCPU is loaded: nobody runs there.
        """
        vcpu = self.loaded.get(cpu)
        if vcpu is None:
            raise ValueError(f"no vCPU is loaded on CPU {cpu}")
        stage2 = vcpu.vm.stage2
        if not count(gfns) or last(gfns) >= len(stage2.pages):
            checks = _Checks(count(gfns))
            if count(stage2.cover(gfns, checks)) < count(gfns):
                raise ValueError("a guest cannot name a gfn beyond its IPA size")
            if not count(gfns):
                return Access(Walk.OK, EMPTY)
        words = stage2.leaves(gfns)
        if not words[0] and all_zero(words):
            vcpu.faults = (gfns, int(Walk.MISS))
            return Access(Walk.MISS, EMPTY)
        leaves, pfns = _leaves(words)
        walks = WALK_WRITE if write else WALK_READ
        status: int | Bytes = int(walks[leaves]) if isinstance(leaves, int) else walks.take(leaves)
        if write and stage2.stale:
            # The worst that a TLB can do: it has all that it could have.
            cached = np.isin(array_of(gfns), np.concatenate([array_of(some) for some in stage2.stale]))
            cached &= (words & LEAF_BORROWED) != 0
            status = np.where(cached, np.uint8(Walk.OK), np.asarray(status, np.uint8))
        if not isinstance(status, int) and not np.count_nonzero(status != status[0]):
            status = int(status[0])
        vcpu.faults = (gfns, status)
        return Access(status, pfns)

    @el2
    def guest_hvc(self, cpu: int, function: int, r1: int = 0, r2: int = 0, r3: int = 0) -> Steps[HvcResult]:
        """An HVC as its registers say (kvm_handle_pvm_hvc64), for one page: r1 is its address, r2 and r3 are reserved.

        HYP_MEMINFO, MEM_SHARE and MEM_UNSHARE are served here (`Hvc`); another goes on to the host: NOT_SUPPORTED.
        """
        if function == Hvc.HYP_MEMINFO:
            return (yield from self.hyp_meminfo.steps(cpu, (r1, r2, r3)))
        names: dict[int, str] = {Hvc.MEM_SHARE: "guest_share_host", Hvc.MEM_UNSHARE: "guest_unshare_host"}
        name = names.get(function)
        if name is None or self._vcpu_on(cpu, protected=True) is None:
            return HvcResult(Smccc.NOT_SUPPORTED, 0, 1)
        if r2 or r3 or r1 & (PAGE_BYTES - 1) or r1 < 0:
            return HvcResult(Smccc.INVALID_PARAMETER, 0, 1)
        return (yield from self._hvc(name, cpu, run(r1 // PAGE_BYTES, 1), 1))

    @el2
    def hyp_meminfo(self, cpu: int, args: tuple[int, int, int] = (0, 0, 0)) -> Steps[HvcResult]:
        """HYP_MEMINFO: a protected guest learns the granule (4096 in `done`). Arguments must be zero."""
        if self._vcpu_on(cpu, protected=True) is None:
            return HvcResult(Smccc.NOT_SUPPORTED, 0, 1)
        yield from ()
        return HvcResult(Smccc.INVALID_PARAMETER, 0, 1) if any(args) else HvcResult(Smccc.SUCCESS, 4096, 1)

    @el2
    def mem_share(self, cpu: int, gfns: Sel, batch: int = 1) -> Steps[HvcResult]:
        """The loop of a guest that shares pages with MEM_SHARE, `batch` pages a call (1: upstream; up to 512: Android).

        A call covers consecutive gfns of one table on consecutive frames; a short count is success, and the guest calls
        again. All of its pages must be in the state that the call wants, or none is converted. Every error is
        INVALID_PARAMETER, but for an absent page: the call becomes a stage-2 fault there (`abort`).
        """
        return (yield from self._hvc("guest_share_host", cpu, gfns, batch))

    @el2
    def mem_unshare(self, cpu: int, gfns: Sel, batch: int = 1) -> Steps[HvcResult]:
        """The loop of a guest that takes pages back with MEM_UNSHARE; see mem_share. An absent page is an error."""
        return (yield from self._hvc("guest_unshare_host", cpu, gfns, batch))

    def _hvc(self, name: str, cpu: int, gfns: Sel, batch: int) -> Steps[HvcResult]:
        if not 1 <= batch <= PAGES_BLOCK:
            raise ValueError(f"a call covers 1 to {PAGES_BLOCK} pages, not {batch}")
        vcpu = self._vcpu_on(cpu, protected=True)
        if vcpu is None:
            return HvcResult(Smccc.NOT_SUPPORTED, 0, 1)
        done, status = 0, Errno.OK
        at = 0
        for start, stop in _tables_whole(gfns):
            result = yield from self._converted(name, cpu, part(gfns, start, stop), batch)
            done, status, at = start + result.done, result.status, start + (result.answer or 0)
            if status:
                break
        calls = self._calls(vcpu.vm.stage2, part(gfns, 0, done), batch)
        if not status:
            return HvcResult(Smccc.SUCCESS, done, calls)
        if status == Errno.ENOENT and name == "guest_share_host":
            # Of the page itself the walk has told, whoever may have mapped it since the locks were dropped.
            ahead = part(gfns, at + 1, count(gfns))
            ahead = vcpu.vm.stage2.cover(ahead, _Checks(count(ahead)))
            absent = 1 + leading(take(vcpu.vm.stage2.pages, ahead) & LEAF_BITS == ABSENT)
            vcpu.faults = (part(gfns, at, at + absent), int(Walk.MISS))
            return HvcResult(Smccc.SUCCESS, done, calls + 1, at, absent)
        return HvcResult(Smccc.INVALID_PARAMETER, done, calls + 1, at)

    @staticmethod
    def _calls(stage2: Stage2, gfns: Sel, batch: int) -> int:
        """HVCs that a guest's loop makes for pages that all succeed."""
        n = count(gfns)
        if batch == 1 or n <= 1:
            return n
        starts = _call_starts(array_of(gfns), take(stage2.pages, gfns))
        return int((-(-np.diff(starts, append=n) // batch)).sum())

    # ---- invariants -------------------------------------------------------------------------------------------

    def check_legal(self) -> None:
        """Every frame is in one of the combinations of LEGAL, as many guests map it as its share count says, and table
        counts are what the tables hold. Looks at every frame. InvariantViolation with the first frame that is not."""
        nr = self.nr_frames
        mappings = {state: np.zeros(nr, np.int64) for state in (OWNED, SHARED_OWNED, BORROWED)}
        place = np.zeros(nr, np.int64)
        for vm in self.vm_table:
            if isinstance(vm, HypVm):
                self._check_tables(vm)
                for leaves, pfns, gfns in _all_leaves(vm.stage2):
                    for kind, found in mappings.items():
                        has = (leaves & LEAF_BORROWED) != 0 if kind == BORROWED else leaves == LEAF_OF[kind]
                        found += np.bincount(pfns[has], minlength=nr)
                    own = leaves == LEAF_OWNED
                    place[pfns[own]] = vm.handle << 32 | gfns[own]
        state = self.frame & STATE_BITS
        lost = (state & HOST_BITS) == NOPAGE
        owner = np.where(lost, np.minimum(self.owner, Owner.GUEST), 0)
        legal = (self.frame & LEAKED) != 0
        for row in LEGAL:
            fits = (state == frame_byte(row.host, row.hyp)) & (owner == row.owner)
            fits &= (mappings[OWNED] == row.owned) & (mappings[SHARED_OWNED] == row.shared_owned)
            fits &= mappings[BORROWED] == self.share_count
            if row.borrowed is not None:
                fits &= self.share_count == row.borrowed
            if not row.pins:
                fits &= self.refcount == 0
            if row.owner == Owner.GUEST:
                fits &= place == (self.owner.astype(np.int64) << 32 | self.owner_gfn)
            legal |= fits
        if np.count_nonzero(legal) < nr:
            pfn = int(np.argmin(legal))
            raise InvariantViolation(
                "a frame's states do not go together",
                pfn=pfn,
                states={
                    "host": PageState(int(self.frame[pfn]) & HOST_BITS).name,
                    "hyp": PageState((int(self.frame[pfn]) >> 4 & 3) ^ NOPAGE).name,
                    "owner": hex(int(self.owner[pfn])),
                    "share_count": int(self.share_count[pfn]),
                    "refcount": int(self.refcount[pfn]),
                    **{f"guest {kind.name}": int(found[pfn]) for kind, found in mappings.items()},
                },
            )

    def _check_tables(self, vm: HypVm) -> None:
        stage2 = vm.stage2
        per_table = np.count_nonzero(stage2.pages.reshape(-1, 512), axis=1)
        entries = (per_table != 0).astype(np.int64) + (stage2.blocks != 0)
        tops = np.add.reduceat(entries, np.arange(0, len(entries), 512)) if len(entries) else entries
        nr_tables = int(np.count_nonzero(per_table)) + int(np.count_nonzero(tops))
        if (
            np.count_nonzero(per_table != stage2.used[0][: len(per_table)])
            or np.count_nonzero(tops != stage2.used[1][: len(tops)])
            or np.count_nonzero(stage2.blocks) != stage2.nr_blocks
            or nr_tables != len(vm.tables)
        ):
            raise InvariantViolation(f"VM {vm.handle:#x}: its tables do not hold what was counted")
        held = np.array([*vm.tables, *vm.pool, *(pfn for vcpu in vm.vcpus if vcpu for pfn in vcpu.memcache)], np.int64)
        hyp_owned = frame_byte(NOPAGE, OWNED)
        if np.count_nonzero((self.frame[held] & STATE_BITS) != hyp_owned):
            raise InvariantViolation(f"VM {vm.handle:#x}: a table page is not EL2's")


_GONE = 0xFFFF
"""Annotation of a leaked frame: a handle that no VM will ever have."""


def _all_leaves(stage2: Stage2) -> list[tuple[IntArray, IntArray, IntArray]]:
    """Leaf bits, frames and gfns of everything a guest maps, as 4K pages."""
    found = []
    for table, order in ((stage2.pages, 0), (stage2.blocks, BLOCK_ORDER)):
        index = np.flatnonzero(table)
        words = table[index].astype(np.int64)
        size = 1 << order
        inside = np.tile(np.arange(size), len(index))
        leaves = np.repeat(words & LEAF_BITS, size)
        pfns = np.repeat(words >> FRAME_SHIFT, size) + inside
        gfns = np.repeat(index << order, size) + inside
        there = leaves > LEAF_POISON
        found.append((leaves[there], pfns[there], gfns[there]))
    return found
