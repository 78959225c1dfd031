"""The TDX module, the trusted party of TDX: Secure EPT, PAMT, TLB tracking, key life cycle, build-time measurement.

Usable alone, under the names of its ABI: `TdxModule(memory, nr_frames)` and its leaves. TDR, TDVPR and other pages
are frame numbers, guest pages are 4K gfns (first ones, where pages are larger), levels are the ABI's: 0 = 4K, 1 = 2M,
2 = 1G, 3 = 512G.

A leaf on guest memory takes any number of pages of one level. It means the same as the leaf called page by page in
order: it stops at the first page that does not succeed and answers with a `Result(done, status)`; the pages below
`done` are committed, nothing else is touched. Leaves on one object answer with the 64-bit status itself.

Scope: one L1 TD, 4-level and 5-level Secure EPT, TDX module 1.5. The states of export and import are in the tables,
the leaves that lead into them are not.

How the Secure EPT is kept: one flat array of 32-bit words per level, indexed by gfn >> 9 * level. A word is the frame
(27 bits) and the state (5 bits); zero is FREE. Entries below whatever is no table are zero, so that a direct parent
that is a table is enough to know that all ancestors are.

Sources: TDX module 1.5.01 (src/vmm_dispatcher, include/auto_gen/sept_state_lookup.c), TDX module ABI.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.effects import BUSY, Effect, Lock, Steps, operation, point
from cvmcore.memory import SCRAMBLED, Memory
from cvmcore.pages import (
    EMPTY,
    PIECE_RUN,
    Sel,
    Words,
    array_of,
    blocks,
    contiguous,
    count,
    expand,
    first,
    grown,
    heads,
    last,
    part,
    run,
    take,
    where,
    zeros,
)
from cvmcore.types import Access, HostVerdict, Walk
from cvmcore_tdx.errors import Operand, Status

if TYPE_CHECKING:
    from hashlib import _Hash

Bools: TypeAlias = npt.NDArray[np.bool_]
Levels: TypeAlias = "int | npt.NDArray[np.uint8]"

LEAF = point("tdx.leaf")
"""The point at which a leaf does its work: all its locks are taken, nothing is changed yet."""

FIRST_RANK = 1000
"""The module's locks rank behind all of the host's."""

FRAME_BITS, STATE_BITS = 27, 5
MAX_FRAMES = 1 << FRAME_BITS
_SHIFT = np.uint32(STATE_BITS)
_STATE = np.uint32((1 << STATE_BITS) - 1)
_FRAME = np.uint32(0xFFFF_FFFF ^ int(_STATE))

NR_TDCX = 6
"""Pages of a TDCS."""
NR_TDVPX = 6
"""Pages of a TDVPS: the TDVPR and what VP.ADDCX adds to it."""
MAX_TDS = 4095
CHUNK_BYTES = 256
"""What one MR.EXTEND measures."""

_RESERVE = 1 << 24
"""Address space for the 4K entries of a TD at first use (64 GiB of guest); doubled when a gfn lies beyond."""
_CACHED_PIECE = 1 << 20
"""Frames whose lines in caches are looked at together."""


# ---- states ---------------------------------------------------------------------------------------------------


class SeptState(enum.IntEnum):
    """State of a Secure-EPT entry, as kept in the low bits of its word. `public` is the ABI's number."""

    FREE = 0
    BLOCKED = 1
    PENDING = 2
    PENDING_BLOCKED = 3
    MAPPED = 4
    REMOVED = 5
    BLOCKEDW = 8
    EXPORTED_BLOCKEDW = 9
    EXPORTED_DIRTY = 11
    EXPORTED_DIRTY_BLOCKEDW = 12
    PENDING_BLOCKEDW = 16
    PENDING_EXPORTED_BLOCKEDW = 17
    PENDING_EXPORTED_DIRTY = 19
    PENDING_EXPORTED_DIRTY_BLOCKEDW = 20
    NL_BLOCKED = 24 + 1
    NL_MAPPED = 24 + 4

    @property
    def public(self) -> int:
        """The number that SEPT.RD and failed leaves report in RDX[15:8]: 132 and 129 for tables."""
        return 0x80 | (self & 7) if self >= 24 else int(self)


class OpState(enum.IntEnum):
    """Phase of a TD's life, as far as its operation goes (TDCS.OP_STATE). The numbers are the model's own."""

    UNINITIALIZED = 0
    INITIALIZED = 1
    RUNNABLE = 2
    LIVE_EXPORT = 3
    PAUSED_EXPORT = 4
    POST_EXPORT = 5
    LIVE_IMPORT = 6


class LifeCycle(enum.Enum):
    """Phase of a TD's life, as far as its key goes (TDR.LIFECYCLE_STATE)."""

    TD_HKID_ASSIGNED = enum.auto()
    TD_KEYS_CONFIGURED = enum.auto()
    TD_BLOCKED = enum.auto()
    TD_TEARDOWN = enum.auto()


class PageType(enum.IntEnum):
    """What a PAMT entry says of a page."""

    PT_NDA = 0
    PT_RSVD = 1
    PT_REG = 3
    PT_TDR = 4
    PT_TDCX = 5
    PT_TDVPR = 6
    PT_EPT = 8


_S = SeptState
_TABLE = np.uint32(_S.NL_MAPPED)

LEAF_STATES = frozenset(s for s in _S if s not in (_S.FREE, _S.REMOVED, _S.NL_MAPPED, _S.NL_BLOCKED))
ANY_BLOCKED = frozenset({_S.NL_BLOCKED, _S.BLOCKED, _S.PENDING_BLOCKED})
NOT_TRACKED = frozenset({_S.FREE, _S.REMOVED, _S.EXPORTED_BLOCKEDW, _S.PENDING_EXPORTED_BLOCKEDW})
"""States in which no TLB can hold the translation, so that no tracking is asked for."""

_BUILD = frozenset({OpState.INITIALIZED})
_GROW = frozenset({OpState.INITIALIZED, OpState.RUNNABLE, OpState.LIVE_EXPORT})
_MANAGE = _GROW | {OpState.PAUSED_EXPORT, OpState.POST_EXPORT}
_ENTER = frozenset({OpState.RUNNABLE, OpState.LIVE_EXPORT})
_RUNNING = frozenset({OpState.RUNNABLE, OpState.LIVE_EXPORT, OpState.LIVE_IMPORT})
"""A vCPU may be inside: block and track are enforced."""

_INVALID_RCX: int = Status.TDX_OPERAND_INVALID | Operand.RCX
_INVALID_R8: int = Status.TDX_OPERAND_INVALID | Operand.R8
_WALK_FAILED: int = Status.TDX_EPT_WALK_FAILED | Operand.RCX
_METADATA_R8: int = Status.TDX_PAGE_METADATA_INCORRECT | Operand.R8
_BUSY_RCX: int = Status.TDX_OPERAND_BUSY | Operand.RCX

ROOT = -1
"""A leaf's highest level: that of the entries in the root page."""


# ---- the leaves, as a table -----------------------------------------------------------------------------------


class Needs(enum.Enum):
    """What must have happened to an entry before a leaf may touch it while the TD may run."""

    NOTHING = enum.auto()
    TRACKED = enum.auto()
    BLOCKED_AND_TRACKED = enum.auto()


@attrs.frozen(eq=False)
class MemLeaf:
    """One host leaf on guest memory: where it is allowed, and what it makes of an entry."""

    name: str
    levels: tuple[int, int]
    op_states: frozenset[OpState]
    next: dict[SeptState, SeptState]
    """Allowed state -> state afterwards."""
    needs: Needs = Needs.NOTHING
    tree: str = "shared"
    tdr: str = "shared"
    refusals: dict[SeptState, Status] = attrs.field(factory=dict)
    """States with a refusal of their own."""
    refusal: int = Status.TDX_EPT_ENTRY_STATE_INCORRECT | Operand.RCX

    nexts: Words = attrs.field(init=False)
    deltas: Words = attrs.field(init=False)
    """What to add to a word to bring it into its next state."""
    statuses: list[int] = attrs.field(init=False)
    allowed: Bools = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        statuses = [self.refusal] * (1 << STATE_BITS)
        for state, status in self.refusals.items():
            statuses[state] = status
        nexts = np.zeros(1 << STATE_BITS, np.uint32)
        for state, after in self.next.items():
            statuses[state], nexts[state] = Status.TDX_SUCCESS, after
        object.__setattr__(self, "nexts", nexts)
        object.__setattr__(self, "deltas", nexts - np.arange(1 << STATE_BITS, dtype=np.uint32))
        object.__setattr__(self, "statuses", statuses)
        object.__setattr__(self, "allowed", np.array([status == 0 for status in statuses]))


_UNBLOCKED = {
    _S.BLOCKED: _S.MAPPED,
    _S.PENDING_BLOCKED: _S.PENDING,
    _S.BLOCKEDW: _S.MAPPED,
    _S.EXPORTED_BLOCKEDW: _S.EXPORTED_DIRTY,
    _S.EXPORTED_DIRTY_BLOCKEDW: _S.EXPORTED_DIRTY,
    _S.PENDING_BLOCKEDW: _S.PENDING,
    _S.PENDING_EXPORTED_BLOCKEDW: _S.PENDING_EXPORTED_DIRTY,
    _S.PENDING_EXPORTED_DIRTY_BLOCKEDW: _S.PENDING_EXPORTED_DIRTY,
}
_ALREADY = Status.TDX_GPA_RANGE_ALREADY_BLOCKED

PAGE_ADD = MemLeaf("TDH.MEM.PAGE.ADD", (0, 0), _BUILD, {_S.FREE: _S.MAPPED}, tdr="exclusive")
SEPT_ADD = MemLeaf("TDH.MEM.SEPT.ADD", (1, ROOT), _GROW, {_S.FREE: _S.NL_MAPPED})
SEPT_ADD_EXISTING = MemLeaf(
    "TDH.MEM.SEPT.ADD", (1, ROOT), _GROW, {_S.FREE: _S.NL_MAPPED, _S.NL_MAPPED: _S.NL_MAPPED}
)
PAGE_AUG = MemLeaf("TDH.MEM.PAGE.AUG", (0, 1), _GROW, {_S.FREE: _S.PENDING, _S.REMOVED: _S.PENDING})
RANGE_BLOCK = MemLeaf(
    "TDH.MEM.RANGE.BLOCK", (0, ROOT), _MANAGE,
    {
        _S.NL_MAPPED: _S.NL_BLOCKED,
        _S.MAPPED: _S.BLOCKED,
        _S.PENDING: _S.PENDING_BLOCKED,
        _S.BLOCKEDW: _S.BLOCKED,
        _S.PENDING_BLOCKEDW: _S.PENDING_BLOCKED,
    },
    tree="exclusive",
    refusals={_S.NL_BLOCKED: _ALREADY, _S.BLOCKED: _ALREADY, _S.PENDING_BLOCKED: _ALREADY},
)  # fmt: skip
RANGE_UNBLOCK = MemLeaf(
    "TDH.MEM.RANGE.UNBLOCK", (0, ROOT), _MANAGE,
    {_S.NL_BLOCKED: _S.NL_MAPPED, _S.BLOCKED: _S.MAPPED, _S.PENDING_BLOCKED: _S.PENDING},
    Needs.TRACKED, tree="exclusive",
)  # fmt: skip
PAGE_RELOCATE = MemLeaf(
    "TDH.MEM.PAGE.RELOCATE", (0, 0), _MANAGE, {s: _UNBLOCKED.get(s, s) for s in LEAF_STATES}, Needs.BLOCKED_AND_TRACKED
)
PAGE_DEMOTE = MemLeaf(
    "TDH.MEM.PAGE.DEMOTE", (1, 2), _MANAGE,
    dict.fromkeys((_S.MAPPED, _S.BLOCKED, _S.PENDING, _S.PENDING_BLOCKED), _S.NL_MAPPED),
    Needs.BLOCKED_AND_TRACKED,
)  # fmt: skip
PAGE_PROMOTE = MemLeaf(
    "TDH.MEM.PAGE.PROMOTE", (1, 2), _MANAGE, {_S.NL_MAPPED: _S.MAPPED, _S.NL_BLOCKED: _S.MAPPED},
    Needs.BLOCKED_AND_TRACKED,
)  # fmt: skip
PAGE_REMOVE = MemLeaf(
    "TDH.MEM.PAGE.REMOVE", (0, 2), _MANAGE,
    dict.fromkeys((_S.MAPPED, _S.BLOCKED, _S.PENDING, _S.PENDING_BLOCKED, _S.BLOCKEDW, _S.PENDING_BLOCKEDW), _S.FREE),
    Needs.BLOCKED_AND_TRACKED,
)  # fmt: skip
SEPT_REMOVE = MemLeaf(
    "TDH.MEM.SEPT.REMOVE", (1, ROOT), _MANAGE, {_S.NL_MAPPED: _S.FREE, _S.NL_BLOCKED: _S.FREE},
    Needs.BLOCKED_AND_TRACKED, tree="exclusive",
)  # fmt: skip
SEPT_RD = MemLeaf("TDH.MEM.SEPT.RD", (0, ROOT), _MANAGE, {s: s for s in _S})
MR_EXTEND = MemLeaf(
    "TDH.MR.EXTEND", (0, 0), _BUILD, {_S.MAPPED: _S.MAPPED}, tdr="exclusive",
    refusal=Status.TDX_EPT_ENTRY_NOT_PRESENT | Operand.RCX,
)  # fmt: skip

MEM_LEAVES = (
    PAGE_ADD, SEPT_ADD, PAGE_AUG, RANGE_BLOCK, RANGE_UNBLOCK, PAGE_RELOCATE, PAGE_DEMOTE, PAGE_PROMOTE, PAGE_REMOVE,
    SEPT_REMOVE, SEPT_RD, MR_EXTEND,
)  # fmt: skip

_ANY_BLOCKED = np.array([s in ANY_BLOCKED for s in range(1 << STATE_BITS)])
_IS_TRACKED = np.array([s not in NOT_TRACKED for s in range(1 << STATE_BITS)])
_UNBLOCK = np.arange(1 << STATE_BITS, dtype=np.uint32)
for _state, _after in _UNBLOCKED.items():
    _UNBLOCK[_state] = _after


# ---- what the guest meets, as tables --------------------------------------------------------------------------


class Accept(enum.IntEnum):
    """How TDG.MEM.PAGE.ACCEPT ends for one page."""

    ACCEPTED = 0
    ALREADY_ACCEPTED = 1
    SIZE_MISMATCH = 2
    """A table where a large page was to be accepted: the guest falls back to 4K."""
    EPT_VIOLATION = 3
    """TD exit: nothing mapped, or blocked. The guest runs the call again."""
    EPT_VIOLATION_LARGER = 4
    """TD exit: a larger page is there and pending. The host must demote it first."""
    BUSY = 5
    NOT_REACHED = 6
    """No answer: the guest stopped at an earlier page of the batch."""


_READABLE = (_S.MAPPED, _S.BLOCKEDW, _S.EXPORTED_BLOCKEDW, _S.EXPORTED_DIRTY, _S.EXPORTED_DIRTY_BLOCKEDW)
_ACCEPTABLE = {_S.PENDING: _S.MAPPED, _S.PENDING_EXPORTED_DIRTY: _S.EXPORTED_DIRTY}


def _lookup(default: int, *rows: dict[SeptState, int]) -> npt.NDArray[np.uint8]:
    table = np.full(1 << STATE_BITS, default, np.uint8)
    for row in rows:
        for state, value in row.items():
            table[state] = value
    return table


ACCEPT_AT_LEVEL = _lookup(
    Accept.EPT_VIOLATION,
    dict.fromkeys(_ACCEPTABLE, Accept.ACCEPTED),
    dict.fromkeys(_READABLE, Accept.ALREADY_ACCEPTED),
    {_S.NL_MAPPED: Accept.SIZE_MISMATCH},
)
"""By the state of the entry at the level that the guest asked for."""
ACCEPT_ABOVE = _lookup(
    Accept.EPT_VIOLATION,
    dict.fromkeys(_ACCEPTABLE, Accept.EPT_VIOLATION_LARGER),
    dict.fromkeys(_READABLE, Accept.ALREADY_ACCEPTED),
)
"""By the state of the entry where the walk stopped above that level."""
_ACCEPT_DELTAS: Words = np.zeros(1 << STATE_BITS, np.uint32)
for _state, _after in _ACCEPTABLE.items():
    _ACCEPT_DELTAS[_state] = (_after - _state) & 0xFFFF_FFFF

GUEST_WRITE = _lookup(
    Walk.MISS,
    dict.fromkeys((_S.MAPPED, _S.EXPORTED_DIRTY), Walk.OK),
    dict.fromkeys(_ACCEPTABLE, Walk.UNACCEPTED),
)
GUEST_READ = _lookup(Walk.MISS, dict.fromkeys(_READABLE, Walk.OK), dict.fromkeys(_ACCEPTABLE, Walk.UNACCEPTED))
"""What a guest access meets, by the state of the leaf. UNACCEPTED is #VE, or with SEPT_VE_DISABLE a TD exit of the
type PENDING_EPT_VIOLATION."""


# ---- answers --------------------------------------------------------------------------------------------------


@attrs.frozen
class Found:
    """The entry that a failed leaf reports in RCX and RDX: where the walk stopped, in which state, on which frame."""

    level: int
    state: SeptState
    pfn: int


@attrs.frozen(eq=False)
class Result:
    """What a leaf on guest memory answers: the first `done` pages are done, `status` is that of the next (or success).

    pfns: frames that the leaf gives back in RCX (REMOVE, RELOCATE, PROMOTE, SEPT.REMOVE), in batch order.
    words: SEPT.RD only, the entries read. found: the entry that stood in the way, where the status is about one.
    """

    done: int
    status: int
    pfns: Sel = EMPTY
    found: Found | None = None
    words: Words | None = None


@attrs.frozen(eq=False)
class Accepted:
    """How TDG.MEM.PAGE.ACCEPT went, page by page.

    outcome: one `Accept` for all, or a uint8 array. level: the level at which the walk found something. pfns: first
    4K frame of each page, in batch order; only those of accepted pages count (EMPTY where there is none). state: that
    of the entry found, one for all or one each. n: pages of the call, asked: their level.
    """

    outcome: int | npt.NDArray[np.uint8]
    level: Levels
    pfns: Sel
    state: int | Words
    n: int
    asked: int

    def count(self, outcome: Accept) -> int:
        """How many pages ended so."""
        if isinstance(self.outcome, int):
            return self.n if self.outcome == outcome else 0
        return int(np.count_nonzero(self.outcome == outcome))

    def status(self, i: int = 0) -> int | None:
        """RAX of the guest for page i; None where the call ended in a TD exit instead, or was not made."""
        outcome = self.outcome if isinstance(self.outcome, int) else int(self.outcome[i])
        level = self.level if isinstance(self.level, int) else int(self.level[i])
        match Accept(outcome):
            case Accept.ACCEPTED:
                return Status.TDX_SUCCESS
            case Accept.ALREADY_ACCEPTED:
                return Status.TDX_PAGE_ALREADY_ACCEPTED | level
            case Accept.SIZE_MISMATCH:
                return Status.TDX_PAGE_SIZE_MISMATCH | level
            case Accept.BUSY:
                return Status.TDX_OPERAND_BUSY | Operand.RCX
            case _:
                return None

    def violation(self, i: int = 0) -> int | None:
        """Of an EPT violation the extended exit qualification, type ACCEPT, from which the host learns what the guest
        accepts: level asked for [2:0], level found [5:3], state found [13:6], whether that is a leaf [14]."""
        outcome = self.outcome if isinstance(self.outcome, int) else int(self.outcome[i])
        if outcome not in (Accept.EPT_VIOLATION, Accept.EPT_VIOLATION_LARGER):
            return None
        level = self.level if isinstance(self.level, int) else int(self.level[i])
        state = _S(self.state if isinstance(self.state, int) else int(self.state[i]))
        return self.asked | level << 3 | state.public << 6 | (state in LEAF_STATES) << 14


# ---- objects --------------------------------------------------------------------------------------------------


class Vp:
    """A virtual CPU of a TD (TDVPS)."""

    __slots__ = ("associated", "epoch", "initialized", "inside", "nr_pages", "td", "tdvpr")

    def __init__(self, td: Td, tdvpr: int) -> None:
        self.td = td
        self.tdvpr = tdvpr
        self.nr_pages = 1
        self.initialized = False
        self.associated = False
        """Its state may sit in a logical processor; VP.FLUSH ends that."""
        self.inside = False
        self.epoch = 0
        """TD epoch at its last entry."""


class Td:
    """A trust domain: what its TDR and TDCS hold."""

    def __init__(self, number: int, tdr: int, hkid: int) -> None:
        self.number = number
        """Owner field of PAMT entries, 1 to 4095."""
        self.tdr = tdr
        self.hkid = hkid
        self.life_cycle = LifeCycle.TD_HKID_ASSIGNED
        self.op_state = OpState.UNINITIALIZED
        self.fatal = False
        self.packages: set[int] = set()
        """Packages that have the key."""
        self.nr_children = 0
        """Pages that the TD owns, in 4K units, the TDR itself not among them."""
        self.nr_tdcx = 0
        self.vps: list[Vp] = []
        self.gpaw = 48
        self.root_level = 3
        self.sept_ve_disable = True
        self.sept: list[Words] = []
        """Secure-EPT words by level."""
        self.blocked_tables = 0
        """NL_BLOCKED entries at level 2 and above."""
        self.epoch = 1
        self.refcount = [0, 0]
        """vCPUs inside, by the parity of the epoch that they entered in."""
        self.hash: _Hash | None = None
        self.watch: Callable[[str, int, bytes], None] | None = None
        """Told (what was measured, its gpa, the digest with it), where somebody listens."""
        self.mrtd = b""
        name = f"tdx.td{number}"
        self.lock = Lock(f"{name}.tdr", FIRST_RANK)
        self.op_state_lock = Lock(f"{name}.op_state", FIRST_RANK + 1)
        self.tree = Lock(f"{name}.sept_tree", FIRST_RANK + 2)
        self.epoch_lock = Lock(f"{name}.epoch", FIRST_RANK + 2)
        self.held: dict[tuple[int, int], Lock] = {}
        """Entries locked by somebody right now, by level and index."""

    @property
    def private_gfns(self) -> int:
        """gfns from here on are shared or do not exist."""
        return 1 << (self.gpaw - 13)

    def table(self, level: int, last_index: int) -> Words:
        """The entries of a level, reaching to last_index at least."""
        words = self.sept[level]
        if last_index >= len(words):
            words = self.sept[level] = grown(words, max(last_index + 1, _RESERVE >> 9 * level))
        return words

    def reset(self, gpaw: int) -> None:
        """An empty Secure EPT for a GPA width, and an open measurement."""
        self.gpaw = gpaw
        self.root_level = 3 if gpaw == 48 else 4
        self.sept = [np.zeros(0, np.uint32) for _ in range(self.root_level + 1)]
        self.hash = hashlib.sha384()

    def state_counts(self, level: int) -> dict[SeptState, int]:
        """How many entries of a level are in which state, FREE ones left out. For people and tests: reads them all."""
        counts = np.zeros(1 << STATE_BITS, np.int64)
        for start in range(0, len(self.sept[level]), 1 << 20):
            words = self.sept[level][start : start + (1 << 20)]
            if words.any():
                counts += np.bincount(words & _STATE, minlength=1 << STATE_BITS)
        return {state: int(counts[state]) for state in _S if state and counts[state]}


class Key:
    """An HKID in the Key Ownership Table."""

    __slots__ = ("flushed", "to_write_back")

    def __init__(self) -> None:
        self.flushed = False
        self.to_write_back: set[int] = set()
        """Packages whose caches still hold lines under the key."""


@attrs.frozen
class Tdmr:
    """A TD memory region: frames [start, end), both on 1G borders, reserved [low, high) ranges cut out."""

    start: int
    end: int
    reserved: tuple[tuple[int, int], ...] = ()


class _Batch:
    """Pages on their way through the checks of a leaf: the first n have passed so far, `status` stops the next.

    Checks come in the module's order and only ever shorten the batch, so that for the page that stops it the earliest
    failing check decides, as when the pages came one by one.
    """

    __slots__ = (
        "_pfns", "found", "gfns", "index", "last", "leaf", "level", "levels", "n", "run", "state", "status", "td",
        "words",
    )  # fmt: skip

    def __init__(self, leaf: MemLeaf | None, td: Td, level: int, gfns: Sel) -> None:
        self.leaf = leaf
        self.td = td
        self.level = level
        self.gfns = gfns
        self.n = count(gfns)
        self.last = last(gfns)
        self.status = 0
        self.found: Found | None = None
        # What the walk found, see TdxModule._walk and look().
        self.index: Sel = gfns
        self.words = _NO_WORDS
        self.levels: Levels = level
        self.state = -1
        self.run = False
        self._pfns: Sel | None = None

    def cut(self, n: int, status: int) -> None:
        """Page n does not pass."""
        if n < self.n:
            self.n, self.status, self.found = n, status, None
            self.gfns = part(self.gfns, 0, n)
            self.last = last(self.gfns) if n else -1
            if len(self.words):
                if status & 0xFFFF_FFFF == Operand.RCX or status == _ALREADY:
                    self.found = self.entry(n)
                self.index, self.words = part(self.index, 0, n), self.words[:n]
                self._pfns = None if self._pfns is None else part(self._pfns, 0, n)

    def cut_where(self, bad: Bools, status: int) -> None:
        """The first page for which `bad` holds does not pass."""
        if np.count_nonzero(bad):
            self.cut(int(np.argmax(bad)), status)

    def entry(self, i: int) -> Found:
        """The entry found for page i."""
        word = int(self.words[i])
        level = self.levels if isinstance(self.levels, int) else int(self.levels[i])
        return Found(level, _S(word & int(_STATE)), word >> STATE_BITS)

    def look(self) -> None:
        """See what the entries have in common: `state` (-1: mixed), and whether their frames are one ascending run."""
        words, n = self.words, self.n
        head = words.item(0)
        state = head & 31
        self.run = False
        if n == 1:
            self.state, self.run = state, True
        elif head == 0:
            self.state = 0 if _all_are(words, 0) else -1
        elif _is_run(words, n, head, self.level):
            self.state, self.run = state, True
        else:
            self.state = state if _all_are(words & _STATE, state) else -1

    def frames(self) -> Sel:
        """First 4K frame of each page; meaningless for entries that have none."""
        if self._pfns is None:
            if self.run:
                self._pfns = run(self.words.item(0) >> STATE_BITS, self.n, 1 << 9 * self.level)
            else:
                self._pfns = (self.words >> _SHIFT).astype(np.int64)
        return self._pfns

    def states(self) -> Words:
        """State of each entry."""
        return self.words & _STATE


_NO_WORDS: Words = np.zeros(0, np.uint32)
_RAMP: Words = np.arange(PIECE_RUN, dtype=np.uint32) << _SHIFT
_SCRATCH: Words = np.empty(PIECE_RUN, np.uint32)


def _ramp(n: int, step: int) -> Words:
    """Frame bits of n frames, each `step` after the one before, from frame 0."""
    if step == 1 and n <= PIECE_RUN:
        return _RAMP[:n]
    return np.arange(n, dtype=np.uint32) * np.uint32(step << STATE_BITS)


def _all_are(values: npt.NDArray[Any], value: int) -> bool:
    """Whether all elements are one number. Reductions are the fastest way for long arrays, not for short ones."""
    if len(values) < 1024:
        return not np.count_nonzero(values != values.dtype.type(value))
    return bool(values.max() == value and (value == 0 or values.min() == value))


def _is_run(words: Words, n: int, head: int, level: int) -> bool:
    """Whether entries are all in one state, on frames one behind the other."""
    return _all_are(np.subtract(words, _ramp(n, 1 << 9 * level), _SCRATCH[:n] if n <= PIECE_RUN else None), head)


def leaf_words(pfns: Sel, state: int) -> Words:
    """Secure-EPT words for frames in one state."""
    words: Words
    if isinstance(pfns, slice):
        return _ramp(count(pfns), pfns.step or 1) + np.uint32(pfns.start << STATE_BITS | state)
    words = pfns.astype(np.uint32)
    words <<= _SHIFT
    words |= np.uint32(state)
    return words


def _all_tables(words: Words) -> bool:
    """Whether all entries are tables that a walk goes on through."""
    if len(words) == 1:
        return bool(words.item(0) & 31 == _S.NL_MAPPED)
    return not np.count_nonzero((words & _STATE) != _TABLE)


def _upto(pages: Sel, n: int) -> Sel:
    """The first n pages of a selector that has at least as many."""
    if isinstance(pages, slice):
        return slice(pages.start, pages.start + n * (pages.step or 1), pages.step or 1)
    return pages if len(pages) == n else pages[:n]


def _index(gfns: Sel, level: int) -> Sel:
    """Indexes of pages in an array that has one element per page of the level."""
    if level == 0:
        return gfns
    order = 9 * level
    if not isinstance(gfns, slice):
        return gfns >> order
    n = count(gfns)
    step = gfns.step or 1
    if n <= 1 or step & ((1 << order) - 1) == 0:
        return run(gfns.start >> order, n, max(1, step >> order))
    return array_of(gfns) >> order


def _children(index: Sel) -> Sel:
    """Indexes, one level down, of the 512 entries below each entry, in order."""
    return expand(heads(index, 9), 9)


def _smaller(pages: Sel, level: int) -> Sel:
    """First frames of the 512 pages of the level below within each page, in order."""
    return heads(expand(_index(pages, level - 1), 9), 9 * (level - 1))


def add_record(gpas: npt.NDArray[np.uint64]) -> bytes:
    """What PAGE.ADD feeds to the measurement, 128 bytes for each page address in bytes, in order."""
    records = np.zeros((len(gpas), 128), np.uint8)
    records[:, :12] = np.frombuffer(b"MEM.PAGE.ADD", np.uint8)
    records[:, 16:24] = gpas.astype("<u8")[:, None].view(np.uint8)
    return records.tobytes()


def extend_record(gpa: int) -> bytes:
    """What MR.EXTEND feeds to the measurement before the 256 bytes at gpa."""
    return b"MR.EXTEND".ljust(16, b"\0") + gpa.to_bytes(8, "little") + bytes(104)


# ---- the module -----------------------------------------------------------------------------------------------


class TdxModule:
    """The TDX module of a machine with `nr_frames` frames of 4 KiB.

    hkids: its private HKIDs; the first one is the module's own, for TDRs. nr_packages: every key has to be configured
    and its caches written back on each. tdmrs: None for one region that covers everything and is initialised, else
    regions that SYS.TDMR.INIT has yet to make usable. reads_zeros: whether a host read of TD memory returns zeros
    (logical integrity) or ciphertext. enhanced_demote: PAGE.DEMOTE does not stop for host interrupts.

    Raises ValueError for more frames than its entries can name (512 GiB), or fewer than two HKIDs.
    """

    def __init__(
        self,
        memory: Memory,
        nr_frames: int,
        *,
        hkids: range = range(64, 128),
        nr_packages: int = 1,
        tdmrs: Sequence[Tdmr] | None = None,
        reads_zeros: bool = True,
        enhanced_demote: bool = False,
    ) -> None:
        if not 0 < nr_frames <= MAX_FRAMES:
            raise ValueError(f"the module can name {MAX_FRAMES} frames, not {nr_frames}")
        if len(hkids) < 2:
            raise ValueError("the module needs a private HKID for itself and one for a TD")
        self.memory = memory
        self.nr_frames = nr_frames
        self.global_hkid = hkids[0]
        self.td_hkids = hkids[1:]
        self.packages = frozenset(range(nr_packages))
        self.reads_zeros = reads_zeros
        self.enhanced_demote = enhanced_demote
        self.interrupt_pending = False
        """Set by who plays the host: leaves that can be interrupted then are, once."""
        self.pamt: list[npt.NDArray[np.uint16]] = [
            zeros(-(-nr_frames >> 9 * level), np.uint16) for level in range(3)
        ]
        """PAMT entries in units of 4K, 2M and 1G: owner << 4 | type."""
        self.bepoch: list[Words] = [zeros(len(entries), np.uint32) for entries in self.pamt]
        """TD epoch of the last BLOCK of the page; means something only while the page's entry is blocked."""
        self.nr_large = [0, 0, 0]
        """PAMT entries in use at 2M and 1G."""
        self.tds: dict[int, Td] = {}
        """TDs by number."""
        self.kot: dict[int, Key] = {}
        """HKIDs that are not free."""
        self.kot_lock = Lock("tdx.kot", FIRST_RANK + 2)
        self._td_of: dict[int, Td] = {}  # by TDR
        self._vp_of: dict[int, Vp] = {}  # by TDVPR
        self._poisoned: npt.NDArray[np.bool_] | None = None
        self._cached: npt.NDArray[np.uint16] = zeros(nr_frames, np.uint16)
        """HKID under which caches may hold lines of a 4K page that nobody owns any more; 0: none."""
        self._cached_below = 0
        """Above this frame there are none."""
        self._tdmrs: dict[int, Tdmr] = {}
        self._tdmr_next: dict[int, int] = {}
        self._usable: npt.NDArray[np.bool_] | None = None  # by 1G block; None: everything
        if tdmrs is not None:
            self._usable = np.zeros(len(self.pamt[2]), bool)
            for tdmr in tdmrs:
                self._add_tdmr(tdmr)

    def _add_tdmr(self, tdmr: Tdmr) -> None:
        if tdmr.start & 0x3FFFF or tdmr.end & 0x3FFFF or not tdmr.start < tdmr.end:
            raise ValueError("a TDMR begins and ends on a 1G border")
        if len(tdmr.reserved) > 16 or len(self._tdmrs) == 64:
            raise ValueError("there are at most 64 TDMRs with at most 16 reserved areas each")
        self._tdmrs[tdmr.start] = tdmr
        self._tdmr_next[tdmr.start] = tdmr.start
        for low, high in tdmr.reserved:
            self.pamt[0][low : min(high, self.nr_frames)] = PageType.PT_RSVD

    def td(self, tdr: int) -> Td:
        """The TD of a TDR. Raises ValueError where the frame is none."""
        if tdr not in self._td_of:
            raise ValueError(f"frame {tdr:#x} is no TDR")
        return self._td_of[tdr]

    def sept_words(self, tdr: int, level: int, gfns: Sel) -> Words:
        """The entries of a level as they stand, frame << 5 | state, those below a blocked table, too; 0 where there is
        no table.

        For people and checkers: takes no lock, needs no TD that can run. Raises ValueError where there is no TD.
        """
        td = self.td(tdr)
        if not td.sept or not 0 <= level <= td.root_level or not count(gfns):
            return np.zeros(count(gfns), np.uint32)
        return take(td.table(level, last(gfns) >> 9 * level), _index(gfns, level)).copy()

    def page_type(self, pfn: int) -> tuple[PageType, int, int]:
        """Type, owner (TD number) and level of the page that a frame belongs to (TDH.PHYMEM.PAGE.RDMD)."""
        for level in (2, 1, 0):
            word = int(self.pamt[level][pfn >> 9 * level])
            if word or not level:
                return PageType(word & 15), word >> 4, level
        raise AssertionError

    # ---- SYS --------------------------------------------------------------------------------------------------

    def tdh_sys_tdmr_init(self, tdmr_start: int, n: int = 1) -> Result:
        """Initialise the next n times 1024 PAMT entries of a TDMR; a 1G block is usable once all of it is."""
        tdmr = self._tdmrs.get(tdmr_start)
        if tdmr is None or self._usable is None:
            return Result(0, Status.TDX_OPERAND_INVALID | Operand.RCX)
        begin = self._tdmr_next[tdmr_start]
        done = min(n, -(-(tdmr.end - begin) // 1024))
        end = self._tdmr_next[tdmr_start] = begin + done * 1024
        self._usable[begin >> 18 : end >> 18] = True
        return Result(done, Status.TDX_SUCCESS)

    # ---- rows 1 to 3 of the error order -----------------------------------------------------------------------

    def _open(
        self, td: Td | None, operand: Operand, op_states: frozenset[OpState], lock: str = "shared"
    ) -> Steps[tuple[Td | None, int]]:
        """Take the TDR and op-state locks of a TD whose state allows a leaf. (None, status) where it is refused."""
        if td is None:
            return None, Status.TDX_PAGE_METADATA_INCORRECT | operand
        if (yield td.lock.try_write if lock == "exclusive" else td.lock.try_read) is BUSY:
            return None, Status.TDX_OPERAND_BUSY | operand
        status: int = Status.TDX_SUCCESS
        if td.fatal:
            status = Status.TDX_TD_FATAL
        elif td.life_cycle is not LifeCycle.TD_KEYS_CONFIGURED:
            status = Status.TDX_TD_KEYS_NOT_CONFIGURED
        elif td.nr_tdcx < NR_TDCX:
            status = Status.TDX_TDCS_NOT_ALLOCATED
        elif (yield td.op_state_lock.try_read) is BUSY:
            status = Status.TDX_OPERAND_BUSY | Operand.OP_STATE
        if status:
            yield td.lock.release
            return None, status
        if td.op_state not in op_states:
            yield td.op_state_lock.release
            yield td.lock.release
            return None, Status.TDX_OP_STATE_INCORRECT
        return td, Status.TDX_SUCCESS

    def _close(self, td: Td) -> Steps[None]:
        yield td.op_state_lock.release
        yield td.lock.release

    # ---- rows 4 to 9: address, locks, walk, state -------------------------------------------------------------

    def _leaf(
        self, leaf: MemLeaf, tdr: int, level: int, gfns: Sel, commit: Callable[[_Batch], Sel | None]
    ) -> Steps[Result]:
        """A leaf on guest memory: every check that all such leaves share, then `commit` for the rest and the work.

        commit gets a batch that has passed the state gate and is not empty; it may shorten it further, changes what
        is to be changed for what is left of it, and returns the frames that the leaf gives back.
        """
        if count(gfns) == 0:
            return Result(0, 0)
        td, status = yield from self._open(self._td_of.get(tdr), Operand.RDX, leaf.op_states, leaf.tdr)
        if td is None:
            return Result(0, status)
        batch = _Batch(leaf, td, level, gfns)
        self._check_gfns(batch)
        back: Sel | None = None
        words: Words | None = None
        if batch.n:
            if (yield td.tree.try_write if leaf.tree == "exclusive" else td.tree.try_read) is BUSY:
                batch.cut(0, Status.TDX_OPERAND_BUSY | Operand.SEPT_TREE)
            else:
                held = yield from self._lock_entry(batch)
                yield LEAF
                self._walk(batch)
                if isinstance(batch.levels, np.ndarray):
                    batch.cut_where(batch.levels != level, _WALK_FAILED)
                elif batch.levels != level:
                    batch.cut(0, _WALK_FAILED)
                batch.levels = level
                if len(td.held) > (held is not None):
                    for at in self._locked_by_others(batch, held)[:1]:
                        batch.cut(at, _BUSY_RCX)
                if batch.n:
                    batch.look()
                    self._gate(batch)
                if batch.n:
                    back = commit(batch)
                    words = batch.words if leaf is SEPT_RD else None
                if held is not None:
                    yield from self._unlock_entry(batch.td, held)
                yield td.tree.release
        yield td.op_state_lock.release
        yield td.lock.release
        if back is None or batch.n == 0:
            back = EMPTY
        return Result(batch.n, batch.status, back, batch.found, words)

    def _check_gfns(self, batch: _Batch) -> None:
        """Rows 4 and 5: the level is one of the leaf's; pages are aligned to it, private, within the GPA width."""
        leaf, level, gfns = batch.leaf, batch.level, batch.gfns
        if leaf is not None:
            low, high = leaf.levels
            if not low <= level <= (batch.td.root_level if high == ROOT else high):
                batch.cut(0, _INVALID_RCX)
                return
        end, inside = batch.td.private_gfns, (1 << 9 * level) - 1
        if first(gfns) < 0:
            batch.cut(0, _INVALID_RCX)
        elif isinstance(gfns, slice):
            if gfns.start & inside:
                batch.cut(0, _INVALID_RCX)
            elif (gfns.step or 1) & inside:
                batch.cut(1, _INVALID_RCX)
            if batch.last >= end:
                batch.cut(count(slice(gfns.start, end, gfns.step or 1)), _INVALID_RCX)
        else:
            if inside:
                batch.cut_where((gfns & inside) != 0, _INVALID_RCX)
            if batch.last >= end:
                batch.cut(int(np.searchsorted(gfns, end)), _INVALID_RCX)

    def _lock_entry(self, batch: _Batch) -> Steps[tuple[int, int] | None]:
        """Try the lock of a single entry. The entries of larger batches are looked at when the leaf does its work:
        it does so in one go, so nobody can meet them locked. Returns the key of the entry if it is locked now."""
        if batch.n != 1 or batch.status:
            return None
        key = (batch.level, batch.last >> 9 * batch.level)
        if key in batch.td.held:
            return None
        lock = batch.td.held[key] = _entry_lock()
        yield lock.write  # free: whoever has an entry locked is in `held`
        return key

    def _unlock_entry(self, td: Td, key: tuple[int, int]) -> Steps[None]:
        lock = td.held.pop(key)
        yield lock.release
        _ENTRY_LOCKS.append(lock)

    def _locked_by_others(self, batch: _Batch, own: tuple[int, int] | None) -> list[int]:
        """Positions of pages whose entry somebody else has locked, ascending."""
        keys = (key for key in batch.td.held if key != own and key[0] == batch.level)
        return sorted(at for _, index in keys if (at := _position(batch.index, index)) >= 0)

    def _walk(self, batch: _Batch) -> None:
        """Row 7: find the entries at the batch's level, or for each page the one that the walk stopped at."""
        batch.index = _index(batch.gfns, batch.level)
        batch.words, batch.levels = self._entries(batch.td, batch.gfns, batch.index, batch.last, batch.level)

    def _entries(self, td: Td, gfns: Sel, index: Sel, last_gfn: int, level: int) -> tuple[Words, Levels]:
        """For each page the entry that a walk towards `level` ends at, and the level of that entry.

        index: those of the gfns at the level. The words are a view where all pages are reached and are a run.
        """
        reach = last_gfn >> 9 * level
        if level == td.root_level:
            return take(td.table(level, reach), index), level
        order = 9 * (level + 1)
        if not td.blocked_tables:
            # A parent that is a table has only tables above it, none of them blocked: no need to look further up.
            parents = td.table(level + 1, reach >> 9)
            around = parents[first(gfns) >> order : (reach >> 9) + 1]
            if isinstance(gfns, slice):
                reached_all = _all_tables(around)
            else:
                reached_all = len(around) <= 4 * len(gfns) and _all_tables(around)
                reached_all = reached_all or _all_tables(parents.take(gfns >> order))
            if reached_all:
                return take(td.table(level, reach), index), level
        unique = blocks(gfns, order)
        words, levels = self._entries(td, heads(unique, order), unique, last_gfn, level + 1)
        reached = ((words & _STATE) == _TABLE) & (np.asarray(levels) == level + 1)
        if np.count_nonzero(reached) == len(reached):
            return take(td.table(level, reach), index), level
        nowhere = not np.count_nonzero(reached)
        if nowhere and isinstance(levels, int) and not np.count_nonzero(words != words[0]):
            return np.broadcast_to(words[:1], count(gfns)), levels
        member = array_of(gfns) >> order
        if isinstance(unique, slice):
            member = member - unique.start
        else:
            member = np.searchsorted(unique, member)
        words, each = words.take(member), reached.take(member)
        found = levels if isinstance(levels, int) else levels.take(member)
        if not nowhere:
            at = array_of(index)[each]
            words[each] = td.table(level, int(at[-1])).take(at)
            found = np.where(each, np.uint8(level), np.asarray(found, np.uint8))
        return words, found

    def _gate(self, batch: _Batch) -> None:
        """Row 9: the state of the entry allows the leaf."""
        leaf = batch.leaf
        assert leaf is not None
        if batch.state >= 0:
            if leaf.statuses[batch.state]:
                batch.cut(0, leaf.statuses[batch.state])
            return
        states = batch.states()
        bad = ~leaf.allowed.take(states)
        if np.count_nonzero(bad):
            k = int(np.argmax(bad))
            batch.cut(k, leaf.statuses[int(states[k])])

    # ---- rows 10 and 11: block and track ----------------------------------------------------------------------

    def _check_tracked(self, batch: _Batch) -> None:
        """While the TD may run, the entry is blocked, and no TLB can hold it any more."""
        leaf, td = batch.leaf, batch.td
        assert leaf is not None
        if td.op_state not in _RUNNING or not batch.n:
            return
        uniform = batch.state >= 0
        states: Any = batch.state if uniform else batch.states()
        needed = _IS_TRACKED[states]
        if leaf.needs is Needs.BLOCKED_AND_TRACKED:
            not_blocked = needed & ~_ANY_BLOCKED[states]
            self._cut(batch, not_blocked, Status.TDX_GPA_RANGE_NOT_BLOCKED | Operand.RCX)
        if not batch.n or (uniform and not needed):
            return
        # Tracked: blocked before the previous epoch, or in it with nobody inside any more who entered in it.
        previous_done = td.refcount[(td.epoch - 1) & 1] == 0
        bound = td.epoch if previous_done else td.epoch - 1
        epochs = self._bepochs(batch)
        if epochs.max() >= bound:
            late = epochs >= np.uint32(bound)
            operand = Operand.SEPT_TREE if leaf is RANGE_UNBLOCK else Operand.RCX
            if not uniform:
                late &= needed[: batch.n]
            batch.cut_where(late, Status.TDX_TLB_TRACKING_NOT_DONE | operand)

    def _cut(self, batch: _Batch, bad: Any, status: int) -> None:
        if np.ndim(bad):
            batch.cut_where(bad, status)
        elif bad:
            batch.cut(0, status)

    def _epoch_cells(self, batch: _Batch) -> list[tuple[Words, Any, Any]]:
        """Where the BEPOCHs of the batch's entries stand: (array, index, positions in the batch).

        A page's is in the PAMT entry of its own size, a table's in that of the table page.
        """
        if batch.level == 0:
            return [(self.bepoch[0], batch.frames(), slice(None))]
        pfns = (batch.words >> _SHIFT).astype(np.int64)
        tables = batch.states() >= _S.NL_BLOCKED
        cells: list[tuple[Words, Any, Any]] = []
        if np.count_nonzero(tables):
            cells.append((self.bepoch[0], pfns[tables], tables))
        if np.count_nonzero(tables) < len(tables):
            cells.append((self.bepoch[batch.level], pfns[~tables] >> 9 * batch.level, ~tables))
        return cells

    def _bepochs(self, batch: _Batch) -> Words:
        cells = self._epoch_cells(batch)
        if len(cells) == 1:
            return take(cells[0][0], cells[0][1])
        epochs = np.empty(batch.n, np.uint32)
        for array, index, positions in cells:
            epochs[positions] = array[index]
        return epochs

    def _set_bepochs(self, batch: _Batch, epoch: int) -> None:
        for array, index, _ in self._epoch_cells(batch):
            array[index] = epoch

    # ---- row 12: operand pages, and the PAMT ------------------------------------------------------------------

    def _free_pages(self, pfns: Sel, level: int, operand: Operand) -> tuple[int, int]:
        """How many leading pages of a level are aligned, in a TDMR, and PT_NDA; and the status of the next."""
        n, status = count(pfns), 0
        if (
            level == 0
            and isinstance(pfns, slice)
            and pfns.step == 1
            and 0 <= pfns.start < pfns.stop <= self.nr_frames
            and self._usable is None
            and self.nr_large == [0, 0, 0]
            and _all_are(self.pamt[0][pfns], 0)
        ):
            return n, 0
        for check, refusal in (
            (self._misaligned, Status.TDX_OPERAND_INVALID),
            (self._outside, Status.TDX_OPERAND_ADDR_RANGE_ERROR),
            (self._taken, Status.TDX_PAGE_METADATA_INCORRECT),
        ):
            if n:
                pfns, n, status = self._cut_pfns(pfns, n, status, check(pfns, level), refusal)
        return n, status | operand if status else status

    @staticmethod
    def _cut_pfns(pfns: Sel, n: int, status: int, bad: Bools | None, refusal: int) -> tuple[Sel, int, int]:
        if n == 0 or bad is None or not np.count_nonzero(bad):
            return pfns, n, status
        k = int(np.argmax(bad))
        return part(pfns, 0, k), k, refusal

    @staticmethod
    def _misaligned(pfns: Sel, level: int) -> Bools | None:
        size = 1 << 9 * level
        if size == 1 or (isinstance(pfns, slice) and (pfns.start | (pfns.step or 1)) & (size - 1) == 0):
            return None
        wrong: Bools = (array_of(pfns) & (size - 1)) != 0
        return wrong

    def _outside(self, pfns: Sel, level: int) -> Bools | None:
        size = 1 << 9 * level
        low, high = (first(pfns), last(pfns)) if isinstance(pfns, slice) else (int(pfns.min()), int(pfns.max()))
        inside = low >= 0 and high + size <= self.nr_frames
        if inside and self._usable is None:
            return None
        pages = array_of(pfns)
        outside = (pages < 0) | (pages + size > self.nr_frames)
        if self._usable is not None:
            outside |= ~self._usable.take(pages >> 18, mode="clip")
        return outside

    def _taken(self, pfns: Sel, level: int) -> Bools | None:
        """Which pages are not PT_NDA: they, the larger page that holds them, or one within, or an earlier one of the
        batch."""
        bad: Bools | None = None
        for other in range(3):
            if other and not self.nr_large[other]:
                continue
            used = self._within(pfns, level, other) if other < level else self._around(pfns, other)
            if used is not None:
                bad = used if bad is None else bad | used
        if not isinstance(pfns, slice) and np.count_nonzero(pfns[1:] <= pfns[:-1]):
            order = np.argsort(pfns, kind="stable")
            again = order[1:][pfns[order[1:]] == pfns[order[:-1]]]
            if len(again):
                bad = np.zeros(len(pfns), bool) if bad is None else bad
                bad[again] = True
        return bad

    def _around(self, pfns: Sel, level: int) -> Bools | None:
        """Whether the PAMT entry at a level that holds each page is in use; None: none is."""
        if isinstance(pfns, slice) and np.count_nonzero(self.pamt[level][blocks(pfns, 9 * level)]) == 0:
            return None
        entries = self.pamt[level].take(array_of(pfns) >> 9 * level)
        return entries != 0 if np.count_nonzero(entries) else None

    def _within(self, pfns: Sel, level: int, other: int) -> Bools | None:
        """Whether a PAMT entry of a smaller size within each large page is in use; None: none is."""
        inner = 1 << 9 * (level - other)
        rows = self.pamt[other][: len(self.pamt[other]) // inner * inner].reshape(-1, inner)[_index(pfns, level)]
        return np.count_nonzero(rows, axis=1) != 0 if np.count_nonzero(rows) else None

    def _mark(self, level: int, pfns: Sel, entry: int) -> None:
        """Write the PAMT entries of pages that are all in use, or all free, and now become the opposite."""
        self.pamt[level][_index(pfns, level)] = entry
        if level:
            self.nr_large[level] += count(pfns) if entry else -count(pfns)

    def _own(self, td: Td, level: int, pfns: Sel, kind: PageType) -> None:
        """The pages become the TD's."""
        self._mark(level, pfns, td.number << 4 | kind)
        td.nr_children += count(pfns) << 9 * level

    def _disown(self, td: Td, level: int, pfns: Sel) -> None:
        """The pages go back to PT_NDA."""
        self._mark(level, pfns, PageType.PT_NDA)
        td.nr_children -= count(pfns) << 9 * level
        if self._poisoned is not None:
            self._poisoned[expand(pfns, 9 * level)] = False

    def _check_readable(self, batch: _Batch, reads: Bools) -> None:
        """The module reads the pages itself: one that the host has written to is a machine check, the TD is fatal."""
        if self._poisoned is None:
            return
        hit = take(self._poisoned, batch.frames()) & reads
        if np.count_nonzero(hit):
            batch.td.fatal = True
            batch.cut_where(hit, Status.TDX_TD_FATAL)

    # ---- writing entries --------------------------------------------------------------------------------------

    def _put(self, batch: _Batch, words: npt.ArrayLike) -> None:
        """Write the batch's entries."""
        self._write(batch.td, batch.level, batch.index, words)

    def _put_frames(self, batch: _Batch, pfns: Sel, state: int) -> None:
        """Write the batch's entries: one state, these frames."""
        if batch.level < 2 and isinstance(pfns, slice) and isinstance(batch.index, slice):
            ramp = _ramp(batch.n, pfns.step or 1)
            np.add(ramp, np.uint32(pfns.start << STATE_BITS | state), batch.td.sept[batch.level][batch.index])
        else:
            self._put(batch, leaf_words(pfns, state))

    def _advance(self, batch: _Batch, deltas: Words) -> None:
        """Bring the batch's entries into their next states, frames kept."""
        delta = deltas[batch.state] if batch.state >= 0 else deltas.take(batch.states())
        if batch.level < 2 and isinstance(batch.index, slice):
            batch.words += delta  # a view of the table
        else:
            self._put(batch, batch.words + delta)

    def _write(self, td: Td, level: int, index: Sel, words: npt.ArrayLike) -> None:
        """Write entries; from 1G up count the blocked tables as well."""
        if level < 2:
            td.sept[level][index] = words
            return
        table = td.sept[level]
        td.blocked_tables -= int(np.count_nonzero((take(table, index) & _STATE) == _S.NL_BLOCKED))
        table[index] = words
        td.blocked_tables += int(np.count_nonzero((take(table, index) & _STATE) == _S.NL_BLOCKED))

    # ---- TDH.MEM: building and growing ------------------------------------------------------------------------

    @operation
    def tdh_mem_sept_add(
        self, tdr: int, level: int, gfns: Sel, pfns: Sel, allow_existing: bool = False
    ) -> Steps[Result]:
        """FREE entries at `level` (1 and up) become tables; pfns are the pages for them.

        With allow_existing an entry that is a table already is left alone, its page unused.
        """

        def commit(batch: _Batch) -> None:
            td = batch.td
            new = batch.states() == _S.FREE if batch.state < 0 else None
            if batch.state == _S.NL_MAPPED:
                return
            pages = _upto(pfns, batch.n)
            if new is None:
                good, status = self._free_pages(pages, 0, Operand.R8)
                batch.cut(good, status)
                pages, index = part(pages, 0, good), batch.index
            else:
                positions = np.flatnonzero(new)
                good, status = self._free_pages(contiguous(array_of(pages)[positions]), 0, Operand.R8)
                if good < len(positions):
                    batch.cut(int(positions[good]), status)
                pages, index = contiguous(array_of(pages)[positions[:good]]), where(batch.index, new[: batch.n])
            if good:
                self._write(td, level, index, leaf_words(pages, _S.NL_MAPPED))
                self._own(td, 0, pages, PageType.PT_EPT)
                self.memory.clear(pages, td.hkid)

        _same_length(gfns, pfns)
        leaf = SEPT_ADD_EXISTING if allow_existing else SEPT_ADD
        return (yield from self._leaf(leaf, tdr, level, gfns, commit))

    @operation
    def tdh_mem_page_add(self, tdr: int, gfns: Sel, pfns: Sel, sources: Sel) -> Steps[Result]:
        """FREE 4K entries become MAPPED on pfns, with the content of the host's pages `sources`; measured as pages."""

        def commit(batch: _Batch) -> None:
            td = batch.td
            copied = _upto(sources, batch.n)
            outside = self._outside(copied, 0)
            if outside is not None:
                batch.cut_where(outside, Status.TDX_OPERAND_INVALID | Operand.R9)
            good, status = self._free_pages(_upto(pfns, batch.n), 0, Operand.R8)
            batch.cut(good, status)
            if not batch.n:
                return
            pages = _upto(pfns, batch.n)
            self._put_frames(batch, pages, _S.MAPPED)
            self._own(td, 0, pages, PageType.PT_REG)
            self.memory.write(pages, self.memory.read(_upto(sources, batch.n), 0).copy(), td.hkid)
            assert td.hash is not None
            gpas = array_of(batch.gfns).astype(np.uint64) << np.uint64(12)
            if td.watch is None:
                td.hash.update(add_record(gpas))
                return
            for i, gpa in enumerate(gpas.tolist()):
                td.hash.update(add_record(gpas[i : i + 1]))
                td.watch("MEM.PAGE.ADD", gpa, td.hash.copy().digest())

        _same_length(gfns, pfns)
        _same_length(gfns, sources)
        if np.intersect1d(array_of(pfns), array_of(sources)).size:
            raise ValueError("a page cannot be source and target of the same PAGE.ADD")
        return (yield from self._leaf(PAGE_ADD, tdr, 0, gfns, commit))

    @operation
    def tdh_mem_page_aug(self, tdr: int, level: int, gfns: Sel, pfns: Sel) -> Steps[Result]:
        """FREE entries at level 0 or 1 become PENDING on pfns. Content stays as it is, out of the guest's reach."""

        def commit(batch: _Batch) -> None:
            good, status = self._free_pages(_upto(pfns, batch.n), level, Operand.R8)
            batch.cut(good, status)
            if good:
                pages = _upto(pfns, good)
                self._put_frames(batch, pages, _S.PENDING)
                self._own(batch.td, level, pages, PageType.PT_REG)

        _same_length(gfns, pfns)
        return (yield from self._leaf(PAGE_AUG, tdr, level, gfns, commit))

    # ---- TDH.MEM: blocking and tracking -----------------------------------------------------------------------

    @operation
    def tdh_mem_range_block(self, tdr: int, level: int, gfns: Sel) -> Steps[Result]:
        """Entries become blocked: no new translation of them. Content stays."""

        def commit(batch: _Batch) -> None:
            self._set_bepochs(batch, batch.td.epoch)
            self._advance(batch, RANGE_BLOCK.deltas)

        return (yield from self._leaf(RANGE_BLOCK, tdr, level, gfns, commit))

    @operation
    def tdh_mem_range_unblock(self, tdr: int, level: int, gfns: Sel) -> Steps[Result]:
        """Blocked and tracked entries become what they were."""

        def commit(batch: _Batch) -> None:
            self._check_tracked(batch)
            if batch.n:
                self._advance(batch, RANGE_UNBLOCK.deltas)

        return (yield from self._leaf(RANGE_UNBLOCK, tdr, level, gfns, commit))

    @operation
    def tdh_mem_track(self, tdr: int, n: int = 1) -> Steps[Result]:
        """n times in a row: a new TLB epoch begins, unless a vCPU of the previous one is still inside."""
        td, status = yield from self._open(self._td_of.get(tdr), Operand.RCX, _MANAGE)
        if td is None:
            return Result(0, status)
        done = 0
        if (yield td.epoch_lock.try_write) is BUSY:
            status = Status.TDX_OPERAND_BUSY | Operand.TD_EPOCH
        else:
            yield LEAF
            if td.refcount[1 - (td.epoch & 1)]:
                done = 0
            elif td.refcount[td.epoch & 1]:
                done = min(n, 1)
            else:
                done = n
            td.epoch += done
            if done < n:
                status = Status.TDX_PREVIOUS_TLB_EPOCH_BUSY
            yield td.epoch_lock.release
        yield from self._close(td)
        return Result(done, status)

    # ---- TDH.MEM: taking away, moving, splitting, merging -----------------------------------------------------

    @operation
    def tdh_mem_page_remove(self, tdr: int, level: int, gfns: Sel) -> Steps[Result]:
        """Pages leave the TD; their content is lost to it. Gives back their frames, as they are, to be flushed."""

        def commit(batch: _Batch) -> Sel:
            self._check_tracked(batch)
            if not batch.n:
                return EMPTY
            td, pfns = batch.td, batch.frames()
            self._put(batch, int(_S.REMOVED if td.op_state == OpState.LIVE_IMPORT else _S.FREE))
            self._disown(td, level, pfns)
            self._leave_in_caches(expand(pfns, 9 * level), td.hkid)
            return pfns

        return (yield from self._leaf(PAGE_REMOVE, tdr, level, gfns, commit))

    @operation
    def tdh_mem_page_relocate(self, tdr: int, gfns: Sel, pfns: Sel) -> Steps[Result]:
        """4K pages move to pfns with their content, and are unblocked. Gives back the old frames."""

        def commit_from(start: int) -> Callable[[_Batch], Sel]:
            def commit(batch: _Batch) -> Sel:
                td = batch.td
                targets = part(pfns, start, start + batch.n)
                same = array_of(targets) == array_of(batch.frames())
                batch.cut_where(same, Status.TDX_OPERAND_INVALID | Operand.R8)
                self._check_tracked(batch)
                good, status = self._free_pages(_upto(targets, batch.n), 0, Operand.R8)
                batch.cut(good, status)
                if not batch.n:
                    return EMPTY
                content = ~_IS_PENDING.take(batch.states())
                self._check_readable(batch, content)
                if not batch.n:
                    return EMPTY
                old, new, words = batch.frames(), _upto(targets, batch.n), batch.words.copy()
                nexts, content = PAGE_RELOCATE.nexts.take(words & _STATE), content[: batch.n]
                if np.count_nonzero(content):
                    stamps = self.memory.read(where(old, content), td.hkid).copy()
                    self.memory.write(where(new, content), stamps, td.hkid)
                self._put(batch, leaf_words(new, 0) | nexts)
                self._disown(td, 0, old)
                self._leave_in_caches(old, td.hkid)
                self._own(td, 0, new, PageType.PT_REG)
                return old

            return commit

        _same_length(gfns, pfns)
        done, back = 0, np.zeros(0, np.int64)
        while True:
            # A frame that an earlier page of the batch has left is free for a later one: go on from where it stopped.
            result = yield from self._leaf(PAGE_RELOCATE, tdr, 0, part(gfns, done, count(gfns)), commit_from(done))
            back = np.concatenate((back, array_of(result.pfns)))
            done += result.done
            if result.status != Status.TDX_PAGE_METADATA_INCORRECT | Operand.R8 or not result.done:
                return attrs.evolve(result, done=done, pfns=contiguous(back))

    @operation
    def tdh_mem_page_demote(self, tdr: int, level: int, gfns: Sel, pfns: Sel) -> Steps[Result]:
        """Large pages become tables (on pfns) of 512 smaller ones, unblocked; content stays."""

        def commit(batch: _Batch) -> None:
            td = batch.td
            self._check_tracked(batch)
            good, status = self._free_pages(_upto(pfns, batch.n), 0, Operand.R8)
            batch.cut(good, status)
            if batch.n and self._interrupted(not self.enhanced_demote):
                batch.cut(0, Status.TDX_INTERRUPTED_RESTARTABLE)
            if not batch.n:
                return
            pages, tables = batch.frames(), _upto(pfns, batch.n)
            small = _ramp(512, 1 << 9 * (level - 1))
            children = (_UNBLOCK.take(batch.states()) | (batch.words & _FRAME))[:, None] + small
            self._put_frames(batch, tables, _S.NL_MAPPED)
            below = _children(batch.index)
            td.table(level - 1, last(below))
            self._write(td, level - 1, below, children.ravel())
            self._mark(level, pages, PageType.PT_NDA)
            self._mark(level - 1, _smaller(pages, level), td.number << 4 | PageType.PT_REG)
            self._own(td, 0, tables, PageType.PT_EPT)
            self.memory.clear(tables, td.hkid)

        _same_length(gfns, pfns)
        return (yield from self._leaf(PAGE_DEMOTE, tdr, level, gfns, commit))

    @operation
    def tdh_mem_page_promote(self, tdr: int, level: int, gfns: Sel) -> Steps[Result]:
        """Tables of 512 alike and contiguous pages become large pages, unblocked; gives back the table pages."""

        def commit(batch: _Batch) -> Sel:
            td = batch.td
            self._check_tracked(batch)
            if not batch.n:
                return EMPTY
            below = _children(batch.index)
            children = take(td.table(level - 1, last(below)), below).reshape(-1, 512)
            heads_ = children[:, 0]
            states = heads_ & _STATE
            bad = (states != _S.MAPPED) & (states != _S.PENDING)
            bad |= ((heads_ >> _SHIFT) & np.uint32((1 << 9 * level) - 1)) != 0
            bad |= np.count_nonzero(children != heads_[:, None] + _ramp(512, 1 << 9 * (level - 1)), axis=1) != 0
            batch.cut_where(bad, Status.TDX_EPT_INVALID_PROMOTE_CONDITIONS | Operand.RCX)
            if batch.n and self._interrupted(True):
                batch.cut(0, Status.TDX_INTERRUPTED_RESTARTABLE)
            if not batch.n:
                return EMPTY
            tables, words = contiguous(batch.words >> _SHIFT), heads_[: batch.n].copy()
            below = _children(batch.index)
            self._put(batch, words)
            self._write(td, level - 1, below, 0)
            pages = contiguous(words >> _SHIFT, 1 << 9 * level)
            self._mark(level - 1, _smaller(pages, level), PageType.PT_NDA)
            self._mark(level, pages, td.number << 4 | PageType.PT_REG)
            self._disown(td, 0, tables)
            self._leave_in_caches(tables, td.hkid)
            return tables

        return (yield from self._leaf(PAGE_PROMOTE, tdr, level, gfns, commit))

    @operation
    def tdh_mem_sept_remove(self, tdr: int, level: int, gfns: Sel) -> Steps[Result]:
        """Empty tables leave the tree; gives back their pages."""

        def commit(batch: _Batch) -> Sel:
            td = batch.td
            self._check_tracked(batch)
            if not batch.n:
                return EMPTY
            below = _children(batch.index)
            children = take(td.table(level - 1, last(below)), below).reshape(-1, 512)
            batch.cut_where(
                np.count_nonzero(children, axis=1) != 0, Status.TDX_EPT_PAGE_NOT_FREE | Operand.RCX
            )
            if not batch.n:
                return EMPTY
            tables = contiguous(batch.words >> _SHIFT)
            self._put(batch, 0)
            self._disown(td, 0, tables)
            return tables

        return (yield from self._leaf(SEPT_REMOVE, tdr, level, gfns, commit))

    @operation
    def tdh_mem_sept_rd(self, tdr: int, level: int, gfns: Sel) -> Steps[Result]:
        """Read entries: `words` of the result, frame << 5 | state."""

        def commit(batch: _Batch) -> None:
            batch.words = batch.words.copy()

        return (yield from self._leaf(SEPT_RD, tdr, level, gfns, commit))

    def _interrupted(self, stops: bool) -> bool:
        """Whether a host interrupt stops the leaf here; the host takes it when the leaf returns."""
        pending = self.interrupt_pending and stops
        if pending:
            self.interrupt_pending = False
        return pending

    # ---- TDH.MR: measurement ----------------------------------------------------------------------------------

    @operation
    def tdh_mr_extend(self, tdr: int, gpa: int, n: int = 1) -> Steps[Result]:
        """Measure n chunks of 256 bytes from gpa on. `done` counts chunks."""
        end = gpa + n * CHUNK_BYTES

        def commit(batch: _Batch) -> None:
            td = batch.td
            assert td.hash is not None
            self._check_readable(batch, np.ones(batch.n, bool))
            if not batch.n:
                return
            stamps = self.memory.read(batch.frames(), td.hkid).tolist()
            for gfn, stamp in zip(array_of(batch.gfns).tolist(), stamps, strict=True):
                content = self.memory.bytes_of(stamp)
                for chunk in range(max(gpa, gfn << 12), min(end, gfn + 1 << 12), CHUNK_BYTES):
                    td.hash.update(extend_record(chunk) + content[chunk & 0xFFF : (chunk & 0xFFF) + CHUNK_BYTES])
                    if td.watch is not None:
                        td.watch("MR.EXTEND", chunk, td.hash.copy().digest())

        pages = slice(gpa >> 12, max(gpa >> 12, end - 1 >> 12) + 1, 1)
        if gpa % CHUNK_BYTES:
            td, status = yield from self._open(self._td_of.get(tdr), Operand.RDX, MR_EXTEND.op_states, MR_EXTEND.tdr)
            if td is not None:
                status = Status.TDX_OPERAND_INVALID | Operand.RCX
                yield from self._close(td)
            return Result(0, status)
        result = yield from self._leaf(MR_EXTEND, tdr, 0, pages, commit)
        reached = min(end, pages.start + result.done << 12)
        return attrs.evolve(result, done=max(0, reached - gpa) // CHUNK_BYTES)

    @operation
    def tdh_mr_finalize(self, tdr: int) -> Steps[int]:
        """Close the measurement; from now on the TD can run, and no page can be added any more."""
        td, status = yield from self._open(self._td_of.get(tdr), Operand.RCX, _BUILD, "exclusive")
        if td is None:
            return status
        yield LEAF
        if not any(vp.initialized for vp in td.vps):
            status = Status.TDX_NO_VCPUS
        else:
            assert td.hash is not None
            td.mrtd = td.hash.digest()
            td.op_state = OpState.RUNNABLE
        yield from self._close(td)
        return status

    # ---- TDH.MNG: making and ending a TD ----------------------------------------------------------------------

    @operation
    def tdh_mng_create(self, tdr: int, hkid: int) -> Steps[int]:
        """A free page becomes the TDR of a new TD that holds a free private HKID."""
        if hkid not in self.td_hkids:
            return Status.TDX_OPERAND_INVALID | Operand.RDX
        good, status = self._free_pages(run(tdr, 1), 0, Operand.RCX)
        if not good:
            return status
        if (yield self.kot_lock.try_write) is BUSY:
            return Status.TDX_OPERAND_BUSY | Operand.KOT
        yield LEAF
        number = next((i for i in range(1, MAX_TDS + 1) if i not in self.tds), 0)
        if hkid in self.kot or not number:
            status = Status.TDX_HKID_NOT_FREE
        else:
            self.kot[hkid] = Key()
            td = Td(number, tdr, hkid)
            self.tds[number] = self._td_of[tdr] = td
            self.pamt[0][tdr] = number << 4 | PageType.PT_TDR
            self.memory.clear(run(tdr, 1), self.global_hkid)
        yield self.kot_lock.release
        return status

    def _manage(self, tdr: int, states: tuple[LifeCycle, ...]) -> Steps[tuple[Td | None, int]]:
        """Take the TDR lock for a leaf on the TD's key. (None, status) where the TD is in another phase of life."""
        td = self._td_of.get(tdr)
        if td is None:
            return None, Status.TDX_PAGE_METADATA_INCORRECT | Operand.RCX
        if (yield td.lock.try_write) is BUSY:
            return None, Status.TDX_OPERAND_BUSY | Operand.RCX
        if td.life_cycle not in states:
            yield td.lock.release
            return None, Status.TDX_LIFECYCLE_STATE_INCORRECT
        return td, Status.TDX_SUCCESS

    @operation
    def tdh_mng_key_config(self, tdr: int, package: int = 0) -> Steps[int]:
        """Program the TD's key in one package; when all have it, the TD's memory can be used."""
        td, status = yield from self._manage(tdr, (LifeCycle.TD_HKID_ASSIGNED,))
        if td is None:
            return status
        yield LEAF
        if package in td.packages:
            status = Status.TDX_KEY_CONFIGURED
        else:
            td.packages.add(package)
            if td.packages >= self.packages:
                td.life_cycle = LifeCycle.TD_KEYS_CONFIGURED
        yield td.lock.release
        return status

    @operation
    def tdh_mng_addcx(self, tdr: int, pfn: int) -> Steps[int]:
        """A free page becomes part of the TDCS."""
        td, status = yield from self._manage(tdr, (LifeCycle.TD_KEYS_CONFIGURED,))
        if td is None:
            keys = Status.TDX_TD_KEYS_NOT_CONFIGURED
            return keys if status == Status.TDX_LIFECYCLE_STATE_INCORRECT else _with_rdx(status)
        good, status = self._free_pages(run(pfn, 1), 0, Operand.RCX)
        if td.op_state != OpState.UNINITIALIZED:
            status = Status.TDX_OP_STATE_INCORRECT
        elif td.nr_tdcx == NR_TDCX:
            status = Status.TDX_TDCX_NUM_INCORRECT
        elif good:
            yield LEAF
            self._own(td, 0, run(pfn, 1), PageType.PT_TDCX)
            self.memory.clear(run(pfn, 1), td.hkid)
            td.nr_tdcx += 1
        yield td.lock.release
        return status

    @operation
    def tdh_mng_init(self, tdr: int, gpaw: int = 48, sept_ve_disable: bool = True) -> Steps[int]:
        """Initialise the TD from (what is modelled of) TD_PARAMS, and open its measurement.

        gpaw: 48 for a 4-level Secure EPT, 52 for one of 5 levels.
        """
        td, status = yield from self._open(
            self._td_of.get(tdr), Operand.RCX, frozenset({OpState.UNINITIALIZED}), "exclusive"
        )
        if td is None:
            return status
        yield LEAF
        if gpaw not in (48, 52):
            status = Status.TDX_OPERAND_INVALID | Operand.RDX
        else:
            td.reset(gpaw)
            td.sept_ve_disable = sept_ve_disable
            td.op_state = OpState.INITIALIZED
        yield from self._close(td)
        return status

    @operation
    def tdh_mng_vpflushdone(self, tdr: int) -> Steps[int]:
        """No vCPU is associated with a processor any more: the TD is blocked, its caches can be written back."""
        td, status = yield from self._manage(tdr, (LifeCycle.TD_HKID_ASSIGNED, LifeCycle.TD_KEYS_CONFIGURED))
        if td is None:
            return status
        if (yield self.kot_lock.try_write) is BUSY:
            status = Status.TDX_OPERAND_BUSY | Operand.KOT
        else:
            yield LEAF
            if any(vp.associated for vp in td.vps):
                status = Status.TDX_FLUSHVP_NOT_DONE
            else:
                key = self.kot[td.hkid]
                key.flushed, key.to_write_back = True, set(self.packages)
                td.life_cycle = LifeCycle.TD_BLOCKED
            yield self.kot_lock.release
        yield td.lock.release
        return status

    @operation
    def tdh_mng_key_freeid(self, tdr: int) -> Steps[int]:
        """The key is gone, the HKID free; the TD's pages can be reclaimed."""
        td, status = yield from self._manage(tdr, (LifeCycle.TD_BLOCKED,))
        if td is None:
            return status
        if (yield self.kot_lock.try_write) is BUSY:
            status = Status.TDX_OPERAND_BUSY | Operand.KOT
        else:
            yield LEAF
            if self.kot[td.hkid].to_write_back:
                status = Status.TDX_WBCACHE_NOT_COMPLETE
            else:
                del self.kot[td.hkid]
                td.life_cycle = LifeCycle.TD_TEARDOWN
            yield self.kot_lock.release
        yield td.lock.release
        return status

    # ---- TDH.VP: vCPUs ----------------------------------------------------------------------------------------

    @operation
    def tdh_vp_create(self, tdr: int, tdvpr: int) -> Steps[int]:
        """A free page becomes the TDVPR of a new vCPU."""
        td, status = yield from self._open(self._td_of.get(tdr), Operand.RDX, _GROW)
        if td is None:
            return status
        good, status = self._free_pages(run(tdvpr, 1), 0, Operand.RCX)
        if good:
            yield LEAF
            self._own(td, 0, run(tdvpr, 1), PageType.PT_TDVPR)
            self.memory.clear(run(tdvpr, 1), td.hkid)
            vp = self._vp_of[tdvpr] = Vp(td, tdvpr)
            td.vps.append(vp)
        yield from self._close(td)
        return status

    def _open_vp(self, tdvpr: int, op_states: frozenset[OpState]) -> Steps[tuple[Vp | None, int]]:
        """Take the locks for a leaf on a vCPU. A vCPU that is inside holds its own TDVPR."""
        vp = self._vp_of.get(tdvpr)
        if vp is None:
            return None, Status.TDX_PAGE_METADATA_INCORRECT | Operand.RCX
        if vp.inside:
            return None, Status.TDX_OPERAND_BUSY | Operand.RCX
        td, status = yield from self._open(vp.td, Operand.TDR, op_states)
        return (vp, status) if td is not None else (None, status)

    @operation
    def tdh_vp_addcx(self, tdvpr: int, pfn: int) -> Steps[int]:
        """A free page becomes part of a vCPU's TDVPS. Its PAMT type is PT_TDVPR, as that of the first."""
        vp, status = yield from self._open_vp(tdvpr, _GROW)
        if vp is None:
            return _with_rdx(status)
        good, status = self._free_pages(run(pfn, 1), 0, Operand.RCX)
        if good and (vp.initialized or vp.nr_pages == NR_TDVPX):
            status = Status.TDX_TDCX_NUM_INCORRECT
        elif good:
            yield LEAF
            self._own(vp.td, 0, run(pfn, 1), PageType.PT_TDVPR)
            self.memory.clear(run(pfn, 1), vp.td.hkid)
            vp.nr_pages += 1
        yield from self._close(vp.td)
        return status

    @operation
    def tdh_vp_init(self, tdvpr: int) -> Steps[int]:
        """Initialise a vCPU, before the TD is finalised."""
        vp, status = yield from self._open_vp(tdvpr, _BUILD)
        if vp is None:
            return status
        yield LEAF
        if vp.nr_pages < NR_TDVPX:
            status = Status.TDX_TDCX_NUM_INCORRECT
        elif vp.initialized:
            status = Status.TDX_VCPU_STATE_INCORRECT
        else:
            vp.initialized = vp.associated = True
        yield from self._close(vp.td)
        return status

    @operation
    def tdh_vp_enter(self, tdvpr: int) -> Steps[int]:
        """The vCPU goes inside: it counts for the present epoch until `td_exit`."""
        vp, status = yield from self._open_vp(tdvpr, _ENTER)
        if vp is None:
            return status
        td = vp.td
        if not vp.initialized:
            status = Status.TDX_VCPU_STATE_INCORRECT
        elif (yield td.epoch_lock.try_read) is BUSY:
            status = Status.TDX_OPERAND_BUSY | Operand.TD_EPOCH
        else:
            yield LEAF
            td.refcount[td.epoch & 1] += 1
            vp.epoch = td.epoch  # an older epoch of its own means that its TLB is flushed here
            vp.inside = vp.associated = True
            yield td.epoch_lock.release
        yield from self._close(td)
        return status

    def td_exit(self, tdvpr: int) -> None:
        """The vCPU leaves the TD. Raises ValueError where it is not inside."""
        vp = self._vp_of.get(tdvpr)
        if vp is None or not vp.inside:
            raise ValueError(f"no vCPU of TDVPR {tdvpr:#x} is inside its TD")
        vp.inside = False
        vp.td.refcount[vp.epoch & 1] -= 1

    @operation
    def tdh_vp_flush(self, tdvpr: int) -> Steps[int]:
        """The vCPU's state leaves the processor that it ran on."""
        vp = self._vp_of.get(tdvpr)
        if vp is None:
            return Status.TDX_PAGE_METADATA_INCORRECT | Operand.RCX
        if vp.inside:
            return Status.TDX_OPERAND_BUSY | Operand.RCX
        if (yield vp.td.lock.try_read) is BUSY:
            return Status.TDX_OPERAND_BUSY | Operand.TDR
        yield LEAF
        status: int = Status.TDX_SUCCESS
        if vp.td.life_cycle is not LifeCycle.TD_KEYS_CONFIGURED:
            status = Status.TDX_TD_KEYS_NOT_CONFIGURED
        elif vp.nr_pages < NR_TDVPX:
            status = Status.TDX_TDCX_NUM_INCORRECT
        elif not vp.associated:
            status = Status.TDX_VCPU_NOT_ASSOCIATED
        vp.associated = vp.associated and bool(status)
        yield vp.td.lock.release
        return status

    # ---- TDH.PHYMEM: giving memory back -----------------------------------------------------------------------

    @operation
    def tdh_phymem_cache_wb(self, package: int = 0) -> Steps[int]:
        """Write back one package's caches for every HKID that waits for it; once more after an interruption."""
        if (yield self.kot_lock.try_write) is BUSY:
            return Status.TDX_OPERAND_BUSY | Operand.KOT
        yield LEAF
        waiting = [key for key in self.kot.values() if package in key.to_write_back]
        status: int = Status.TDX_SUCCESS
        if not waiting:
            status = Status.TDX_NO_HKID_READY_TO_WBCACHE
        elif self._interrupted(True):
            status = Status.TDX_INTERRUPTED_RESUMABLE
        else:
            for key in waiting:
                key.to_write_back.discard(package)
            self._forget_lines([hkid for hkid, key in self.kot.items() if key in waiting and not key.to_write_back])
        yield self.kot_lock.release
        return status

    @operation
    def tdh_phymem_page_reclaim(self, pfns: Sel) -> Steps[Result]:
        """Pages of TDs in teardown go back to PT_NDA, each as large as the PAMT has it; a TDR goes last."""
        done, n = 0, count(pfns)
        yield LEAF
        while done < n:
            good, status = self._reclaim(part(pfns, done, n))
            done += good
            if status and not good:
                return Result(done, status)
        return Result(done, Status.TDX_SUCCESS)

    def _reclaim(self, pfns: Sel) -> tuple[int, int]:
        """Reclaim leading pages that are alike; (0, status) where the first one is refused."""
        head = first(pfns)
        if not 0 <= head < self.nr_frames:
            return 0, Status.TDX_OPERAND_ADDR_RANGE_ERROR | Operand.RCX
        kind, owner, level = self.page_type(head)
        if kind in (PageType.PT_NDA, PageType.PT_RSVD):
            return 0, Status.TDX_PAGE_METADATA_INCORRECT | Operand.RCX
        if head & ((1 << 9 * level) - 1):
            return 0, Status.TDX_OPERAND_INVALID | Operand.RCX
        td = self.tds[owner]
        if td.life_cycle is not LifeCycle.TD_TEARDOWN:
            return 0, Status.TDX_LIFECYCLE_STATE_INCORRECT
        if kind is PageType.PT_TDR:
            if td.nr_children:
                return 0, Status.TDX_TD_ASSOCIATED_PAGES_EXIST
            self.pamt[0][head] = PageType.PT_NDA
            self._leave_in_caches(part(pfns, 0, 1), self.global_hkid)
            del self.tds[owner], self._td_of[head]
            return 1, Status.TDX_SUCCESS
        alike = self._alike(pfns, level, owner)
        pages = part(pfns, 0, alike)
        self._disown(td, level, pages)
        for vp in td.vps:
            if self.pamt[0][vp.tdvpr] == PageType.PT_NDA:
                self._vp_of.pop(vp.tdvpr, None)
        return alike, Status.TDX_SUCCESS

    def _alike(self, pfns: Sel, level: int, owner: int) -> int:
        """How many leading pages are of the level and of the owner, and none a TDR or named twice."""
        if count(pfns) == 1:
            return 1
        pages = array_of(pfns)
        inside = (pages >= 0) & (pages < self.nr_frames) & (pages & ((1 << 9 * level) - 1) == 0)
        entries = self.pamt[level].take(pages >> 9 * level, mode="clip")
        other = ~inside | (entries >> 4 != owner) | (entries & 15 == PageType.PT_TDR)
        for above in range(level + 1, 3):
            if self.nr_large[above]:
                other |= self.pamt[above].take(pages >> 9 * above, mode="clip") != 0
        if not isinstance(pfns, slice) and np.count_nonzero(pages[1:] <= pages[:-1]):
            order = np.argsort(pages, kind="stable")
            other[order[1:][pages[order[1:]] == pages[order[:-1]]]] = True
        return int(np.argmax(other)) if np.count_nonzero(other) else len(pages)

    @operation
    def tdh_phymem_page_wbinvd(self, pfns: Sel, hkid: int) -> Steps[Result]:
        """Write back and invalidate the caches of 4K pages that belong to nobody any more, under a private HKID."""
        yield LEAF
        if hkid != self.global_hkid and hkid not in self.td_hkids:
            return Result(0, Status.TDX_OPERAND_INVALID | Operand.RCX)
        n = count(pfns)
        outside = self._outside(pfns, 0) if n else None
        pfns, good, status = self._cut_pfns(pfns, n, 0, outside, Status.TDX_OPERAND_ADDR_RANGE_ERROR)
        bad: Bools | None = None
        for level in range(3):
            if good and (level == 0 or self.nr_large[level]):
                entries = take(self.pamt[level], _index(pfns, level))
                if np.count_nonzero(entries):
                    bad = entries != 0 if bad is None else bad | (entries != 0)
        pfns, good, status = self._cut_pfns(pfns, good, status, bad, Status.TDX_PAGE_METADATA_INCORRECT)
        if good:
            flushed = take(self._cached, pfns) == hkid
            self._cached[pfns if np.count_nonzero(flushed) == good else where(pfns, flushed)] = 0
        return Result(good, status | Operand.RCX if status else status)

    def _leave_in_caches(self, pages: Sel, hkid: int) -> None:
        """4K pages belong to nobody now; lines of theirs may be in caches still, under the key of whoever had them."""
        if count(pages):
            self._cached[pages] = hkid
            highest = last(pages) if isinstance(pages, slice) else int(pages.max())
            self._cached_below = max(self._cached_below, highest + 1)

    def _forget_lines(self, hkids: list[int]) -> None:
        """No cache has lines under these keys any more."""
        for low in range(0, self._cached_below if hkids else 0, _CACHED_PIECE):
            cached = self._cached[low : min(low + _CACHED_PIECE, self._cached_below)]
            if np.count_nonzero(cached):
                for hkid in hkids:
                    cached[cached == hkid] = 0

    # ---- the guest's side -------------------------------------------------------------------------------------

    @operation
    def tdg_mem_page_accept(self, tdr: int, level: int, gfns: Sel) -> Steps[Accepted]:
        """A vCPU of the TD accepts pages of level 0 or 1 in order: pending pages become zero and usable.

        It stops at the first page that is not accepted afterwards. Those right behind it that would end in the same
        way are told so; all others are NOT_REACHED. A single page that is not pending does not come to LEAF.

        Raises ValueError for pages that cannot be private, and for a TD that cannot run.
        """
        td = self._running(tdr)
        batch = _Batch(None, td, level, gfns)
        if batch.n == 0:
            return Accepted(int(Accept.ACCEPTED), level, EMPTY, 0, 0, level)
        self._check_gfns(batch)
        if batch.status or level not in (0, 1):
            raise ValueError("TDG.MEM.PAGE.ACCEPT takes private pages, aligned to a level of 0 or 1")
        if (yield td.tree.try_read) is BUSY:
            return Accepted(int(Accept.BUSY), level, EMPTY, 0, batch.n, level)
        held = yield from self._lock_entry(batch)
        if held is None:
            yield LEAF
            self._walk(batch)
        else:
            # The entry cannot change any more, so that it is known by now whether there is work to do.
            self._walk(batch)
            if batch.levels == level and batch.words.item(0) & 31 in _ACCEPTABLE:
                yield LEAF
        accepted = self._accept(batch, self._locked_by_others(batch, held) if len(td.held) > (held is not None) else [])
        if held is not None:
            yield from self._unlock_entry(td, held)
        yield td.tree.release
        return accepted

    def _accept(self, batch: _Batch, busy: list[int]) -> Accepted:
        td, level = batch.td, batch.level
        batch.look()
        if batch.state in _ACCEPTABLE and isinstance(batch.levels, int) and batch.levels == level and not busy:
            pfns = batch.frames()
            self._advance(batch, _ACCEPT_DELTAS)
            self._zero(td, level, pfns)
            return Accepted(int(Accept.ACCEPTED), level, pfns, batch.state, batch.n, level)
        if batch.state >= 0 and isinstance(batch.levels, int) and not busy:
            table = ACCEPT_AT_LEVEL if batch.levels == level else ACCEPT_ABOVE
            return Accepted(table.item(batch.state), batch.levels, EMPTY, batch.state, batch.n, level)
        states = batch.states()
        at_level = np.asarray(batch.levels) == level
        outcome = np.where(at_level, ACCEPT_AT_LEVEL.take(states), ACCEPT_ABOVE.take(states))
        outcome[busy] = Accept.BUSY
        _stop(outcome)
        good = outcome == Accept.ACCEPTED
        pfns = _frames_below(batch.words, batch.levels, batch.gfns)
        if np.count_nonzero(good):
            words = batch.words[good]
            self._write(td, level, where(batch.index, good), words + _ACCEPT_DELTAS.take(words & _STATE))
            self._zero(td, level, contiguous(pfns[good], 1 << 9 * level))
        return Accepted(_common(outcome), batch.levels, contiguous(pfns, 1 << 9 * level), states, batch.n, level)

    def _zero(self, td: Td, level: int, pfns: Sel) -> None:
        """Write zeros through the TD's key."""
        pages = expand(pfns, 9 * level)
        self.memory.clear(pages, td.hkid)
        if self._poisoned is not None:
            self._poisoned[pages] = False

    def guest_access(self, tdr: int, gfns: Sel, write: bool) -> Access:
        """What the processor's walk of the Secure EPT says to private accesses of 4K pages, page by page.

        Reading a page that the host has written to is a machine check: DENIED, and the TD is fatal from then on.
        Raises ValueError for a TD that cannot run, or pages that are not private.
        """
        td = self._running(tdr)
        n = count(gfns)
        if n == 0:
            return Access(int(Walk.OK), EMPTY)
        if first(gfns) < 0 or last(gfns) >= td.private_gfns:
            raise ValueError("guest_access takes private gfns")
        if td.fatal:
            return Access(int(Walk.DENIED), EMPTY)
        batch = _Batch(None, td, 0, gfns)
        self._walk(batch)
        words, levels = batch.words, batch.levels
        batch.look()
        answers = GUEST_WRITE if write else GUEST_READ
        status: int | npt.NDArray[np.uint8]
        pfns: Sel
        if batch.state >= 0 and isinstance(levels, int) and (levels == 0 or answers[batch.state] != Walk.OK):
            status = answers.item(batch.state)
            pfns = batch.frames() if status == Walk.OK else EMPTY
        else:
            status = _common(answers.take(batch.states()))
            pfns = contiguous(_frames_below(words, levels, gfns))
        if self._poisoned is not None:
            status = self._machine_check(td, status, pfns, n)
        return Access(status, pfns)

    def _machine_check(
        self, td: Td, status: int | npt.NDArray[np.uint8], pfns: Sel, n: int
    ) -> int | npt.NDArray[np.uint8]:
        """Of pages that could be accessed, those that the host has written to deny it, and end the TD."""
        assert self._poisoned is not None
        if count(pfns) == 0:
            return status
        hit = take(self._poisoned, pfns) & (np.asarray(status) == Walk.OK)
        if not np.count_nonzero(hit):
            return status
        td.fatal = True
        statuses = np.full(n, status, np.uint8) if isinstance(status, int) else status
        return np.where(hit, np.uint8(Walk.DENIED), statuses)

    def _running(self, tdr: int) -> Td:
        td = self.td(tdr)
        if td.op_state not in _RUNNING or td.life_cycle is not LifeCycle.TD_KEYS_CONFIGURED:
            raise ValueError("no vCPU of this TD can run")
        return td

    # ---- the host's side --------------------------------------------------------------------------------------

    def host_access(self, pfns: Sel, write: bool) -> HostVerdict:
        """The host reads or writes whole frames; a page of a TD does not stop it.

        A read returns zeros or ciphertext. A write takes the lines from the TD: the page's content is gone, and who
        reads it next in the TD, or in the module, gets a machine check. So it is with pages that are no TD's any more,
        for the host itself: while caches hold lines of the TD, which may be written back over what the host writes
        (TDH.PHYMEM.PAGE.WBINVD was missed), and while memory still has the TD's key (no direct stores over all of it:
        a write of a part of a line is a machine check for who reads it, X86_BUG_TDX_PW_MCE).
        """
        owned = np.zeros(count(pfns), bool)
        for level in range(3):
            if level == 0 or self.nr_large[level]:
                owned |= (take(self.pamt[level], _index_any(pfns, level)) & 15) > PageType.PT_RSVD
        if not np.count_nonzero(owned):
            left = any(np.count_nonzero(take(what, pfns)) for what in (self.memory.key, self._cached))
            return HostVerdict.POISONED if write and left else HostVerdict.OK
        if not write:
            return HostVerdict.ZEROS if self.reads_zeros else HostVerdict.CIPHERTEXT
        theirs = where(pfns, owned)
        if self._poisoned is None:
            self._poisoned = zeros(self.nr_frames, np.bool_)
        self._poisoned[theirs] = True
        self.memory.write(theirs, SCRAMBLED, 0)
        control = (take(self.pamt[0], theirs) & 15) > PageType.PT_REG
        if np.count_nonzero(control):
            for number in np.unique(take(self.pamt[0], theirs)[control] >> 4).tolist():
                self.tds[number].fatal = True
        return HostVerdict.POISONED


_IS_PENDING = np.zeros(1 << STATE_BITS, bool)
_IS_PENDING[[s for s in _S if s.name.startswith("PENDING")]] = True

_ENTRY_LOCKS: list[Lock] = []


def _entry_lock() -> Lock:
    """A lock for an entry, used again and again: at any time only the few that are held exist."""
    return _ENTRY_LOCKS.pop() if _ENTRY_LOCKS else Lock("tdx.sept_entry", FIRST_RANK + 3)


def _position(index: Sel, at: int) -> int:
    """Where an index stands in a batch, -1 if it does not."""
    if isinstance(index, slice):
        found = range(index.start, index.stop, index.step or 1)
        return found.index(at) if at in found else -1
    k = int(np.searchsorted(index, at))
    return k if k < len(index) and int(index[k]) == at else -1


def _index_any(pfns: Sel, level: int) -> Sel:
    """`_index` for frames that need not begin a page of the level."""
    return pfns if level == 0 else array_of(pfns) >> 9 * level


def _frames_below(words: Words, levels: Levels, gfns: Sel) -> npt.NDArray[np.int64]:
    """The frame behind each page, where the entry found may be one of a larger page."""
    pfns = (words >> _SHIFT).astype(np.int64)
    if isinstance(levels, int):
        return pfns + (array_of(gfns) & ((1 << 9 * levels) - 1)) if levels else pfns
    inside = (np.int64(1) << (9 * levels.astype(np.int64))) - 1
    return pfns + (array_of(gfns) & inside)


def _stop(outcome: npt.NDArray[np.uint8]) -> None:
    """Make NOT_REACHED what lies behind the first pages that are not accepted, all for the same reason."""
    refused = outcome > Accept.ALREADY_ACCEPTED
    if np.count_nonzero(refused):
        k = int(np.argmax(refused))
        others = outcome[k:] != outcome[k]
        if np.count_nonzero(others):
            outcome[k + int(np.argmax(others)) :] = Accept.NOT_REACHED


def _common(values: npt.NDArray[np.uint8]) -> int | npt.NDArray[np.uint8]:
    """One number where all are the same."""
    head = int(values[0])
    return values if np.count_nonzero(values != head) else head


def _same_length(gfns: Sel, pfns: Sel) -> None:
    if count(gfns) != count(pfns):
        raise ValueError(f"{count(gfns)} guest pages and {count(pfns)} frames")


def _with_rdx(status: int) -> int:
    """The status of a leaf that names the object, not the page, in RDX."""
    return status - Operand.RCX + Operand.RDX if status & 0xFFFF_FFFF == Operand.RCX else status


__all__ = [
    "ACCEPT_ABOVE", "ACCEPT_AT_LEVEL", "GUEST_READ", "GUEST_WRITE", "LEAF", "MEM_LEAVES", "NR_TDCX", "NR_TDVPX",
    "Accept", "Accepted", "Effect", "Found", "LifeCycle", "MemLeaf", "Needs", "OpState", "PageType", "Result",
    "SeptState", "Td", "Tdmr", "TdxModule", "Vp",
]  # fmt: skip
