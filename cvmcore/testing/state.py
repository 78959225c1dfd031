"""A VM as arrays: what the invariants look at. Everything is by 4K pages, computed once, with numpy.

A `View` looks at the same VM again and again, and keeps what is made of parts that have not changed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.effects import drain
from cvmcore.events import Event
from cvmcore.mem.gmem import HUGE as HUGE_FOLIO
from cvmcore.mem.gmem import GmemFile, GmemInode
from cvmcore.mem.mm import HUGE as HUGE_PAGE
from cvmcore.mem.mm import Mapping
from cvmcore.mem.tdp import FRAME_SHIFT, PRESENT, TABLE, TOP, WRITABLE, Root
from cvmcore.pages import IntArray, Words, array_of
from cvmcore.types import PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K, Capabilities, Use, order_of, pages_per_level

if TYPE_CHECKING:
    from cvmcore.errors import UapiError
    from cvmcore.host import Host
    from cvmcore.mem.slots import Memslot
    from cvmcore.vm import Vm

Bools: TypeAlias = npt.NDArray[np.bool_]

LEAF = np.uint32(PRESENT | TABLE)
ABSENT, IS_LEAF, IS_TABLE, DESTROYED, IS_BLOCKED = 0, 1, 2, 3, 4
"""What an entry is, as `read_private_spte` says it."""

_NONE: IntArray = np.zeros(0, np.int64)


@attrs.frozen(eq=False)
class Leaves:
    """Present leaves as 4K pages, one element each, by gfn: gfn, pfn (int64), level (uint8), writable, private (bool).

    private: reached by private accesses: in the mirror root, or where the gfn's attribute says so.
    """

    gfn: IntArray
    pfn: IntArray
    level: npt.NDArray[np.uint8]
    writable: Bools
    private: Bools

    def __len__(self) -> int:
        return len(self.gfn)

    def where(self, mask: Bools) -> Leaves:
        """Those at which the mask holds."""
        return Leaves(self.gfn[mask], self.pfn[mask], self.level[mask], self.writable[mask], self.private[mask])


NO_LEAVES = Leaves(_NONE, _NONE, _NONE.astype(np.uint8), _NONE.astype(bool), _NONE.astype(bool))


def leaves_of(root: Root, private: bool = False) -> Leaves:
    """All present leaves of a root, found by looking at every entry (no counter and no table is believed)."""
    columns: list[tuple[npt.NDArray[Any], ...]] = []
    for level in (PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K):
        words = root.entries[level]
        index = np.flatnonzero((words & LEAF) == PRESENT)
        if not len(index):
            continue
        order, words = order_of(level), words[index]
        inside = np.tile(np.arange(1 << order), len(index))
        gfn = np.repeat(index << order, 1 << order) + inside
        pfn = np.repeat((words >> np.uint32(FRAME_SHIFT)).astype(np.int64), 1 << order) + inside
        columns.append((gfn, pfn, np.full(len(gfn), level, np.uint8), np.repeat(words & WRITABLE != 0, 1 << order)))
    if not columns:
        return NO_LEAVES
    gfn, pfn, level_of, writable = (np.concatenate(column) for column in zip(*columns, strict=True))
    at = np.argsort(gfn, kind="stable")
    return Leaves(gfn[at], pfn[at], level_of[at], writable[at], np.full(len(at), private))


def joined(parts: list[Leaves]) -> Leaves:
    """Leaves of several roots, one behind the other."""
    if len(parts) == 1:
        return parts[0]
    return Leaves(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in attrs.fields(Leaves)))


def kinds_of(root: Root, level: int) -> npt.NDArray[np.uint8]:
    """ABSENT, IS_LEAF, IS_TABLE or IS_BLOCKED for every entry of a level; a frozen entry counts as absent."""
    words = root.entries[level]
    kinds = np.zeros(len(words), np.uint8)
    kinds[(words & LEAF) == PRESENT] = IS_LEAF
    kinds[(words & LEAF) == LEAF] = IS_TABLE
    kinds[(words & LEAF) == TABLE] = IS_BLOCKED
    return kinds


def gmem_frames(inode: GmemInode) -> IntArray:
    """Frame behind every index of the inode, 0 where there is none."""
    return (inode.words >> np.uint32(5)).astype(np.int64)


def peek(machine: Host, hook: str, /, **arguments: Any) -> Any:
    """Call a query hook as if nobody had: no event, no count, no charge. None where it is not implemented."""
    found = machine.ops.hooks.get(hook)
    if found is None:
        return None
    meter = machine.meter
    kept = dict(meter.counts), dict(meter.elsewhere), dict(meter.ops), meter.now_ns
    result = found.fn(*[arguments[name] for name in found.arguments])
    if hasattr(result, "send"):
        result = drain(result)
    meter.counts, meter.elsewhere, meter.ops, meter.now_ns = kept
    return result


class State:
    """A VM as it stands now. Nothing is looked at twice: make a new one after each step, or have a `View` make it."""

    def __init__(self, vm: Vm, lost: int = 0) -> None:
        self.vm = vm
        self.lost = lost
        """Pinned pages that were leaked by the vendor, on behalf of this VM."""
        self.host = vm.host
        self.caps: Capabilities = vm.caps
        self.frames = vm.host.frames

    # ---- page tables ------------------------------------------------------------------------------------------

    @cached_property
    def roots(self) -> list[Root]:
        """The roots in use, and those on their way out."""
        tdp = self.vm.tdp
        return [*([tdp.mirror] if tdp.mirror is not None else []), tdp.direct, *tdp.invalid]

    @cached_property
    def mirror(self) -> Leaves:
        """Leaves of the mirror root; none without one."""
        root = self.vm.tdp.mirror
        return leaves_of(root, True) if root is not None else NO_LEAVES

    @cached_property
    def direct(self) -> Leaves:
        """Leaves of the direct root."""
        leaves = leaves_of(self.vm.tdp.direct)
        if self.caps.private_by_attribute and not self.caps.has_mirror:
            leaves = attrs.evolve(leaves, private=self.is_private(leaves.gfn))
        return leaves

    @cached_property
    def mapped(self) -> Leaves:
        """Leaves of the roots in use."""
        return joined([self.mirror, self.direct]) if self.caps.has_mirror else self.direct

    @cached_property
    def reaching(self) -> Leaves:
        """Leaves of all roots, also of those on their way out."""
        return joined([self.mapped, *(leaves_of(root) for root in self.vm.tdp.invalid)])

    @property
    def external(self) -> Root | None:
        """The root that records what hooks installed: the mirror, or the mediated one."""
        return _external(self.vm)

    @cached_property
    def mirror_tables(self) -> IntArray:
        """Frames donated as external table pages: in the mirror, and in the cache for the next faults."""
        root = self.vm.tdp.mirror
        found = [_NONE]
        if root is not None:
            for level in range(PG_LEVEL_2M, TOP + 1):
                words = root.entries[level]
                found.append((words[words & np.uint32(TABLE) != 0] >> np.uint32(FRAME_SHIFT)).astype(np.int64))
        found += [array_of(vcpu.tables.spare) for vcpu in self.vm.vcpus]
        return np.concatenate(found)

    @cached_property
    def kinds(self) -> dict[tuple[Root, int], npt.NDArray[np.uint8]]:
        """What `kinds_of` says, of every root and level."""
        return {(root, level): kinds_of(root, level) for root in self.roots for level in range(PG_LEVEL_4K, TOP + 1)}

    # ---- copies -----------------------------------------------------------------------------------------------

    @cached_property
    def attributes(self) -> npt.NDArray[np.uint8]:
        """The attribute of each gfn."""
        return self.vm.attributes.words.copy()

    @cached_property
    def pins(self) -> npt.NDArray[np.uint16]:
        """Pins of the frames that were ever handed out to guests and processes."""
        return self.frames.pins[: self.frames.top].copy()

    @cached_property
    def outstanding(self) -> dict[Use, int]:
        """Frames in use by what for."""
        return self.frames.outstanding()

    @cached_property
    def words(self) -> list[tuple[GmemInode | Mapping, Words]]:
        """The words of each inode and of each mapping."""
        owners: list[GmemInode | Mapping] = [*self.inodes, *self.mappings]
        return [(owner, owner.words.copy()) for owner in owners]

    # ---- slots and attributes ---------------------------------------------------------------------------------

    @cached_property
    def slots(self) -> list[Memslot]:
        """Memslots of address space 0 by gfn."""
        return [slot for slot in self.vm.slots if slot.as_id == 0]

    @cached_property
    def bounds(self) -> tuple[IntArray, IntArray]:
        """First gfn of each of them, and the first behind it."""
        return np.array([slot.base_gfn for slot in self.slots]), np.array([slot.end_gfn for slot in self.slots])

    @cached_property
    def owners(self) -> IntArray:
        """Position in `slots` of the slot that holds each leaf of `mapped`, -1 where none does."""
        return self.slot_of(self.mapped.gfn)

    def slot_of(self, gfn: IntArray) -> IntArray:
        """Position in `slots` of the slot that holds each gfn, -1 where none does."""
        if not self.slots:
            return np.full(len(gfn), -1)
        bases, ends = self.bounds
        at = np.searchsorted(bases, gfn, "right") - 1
        return np.where((at >= 0) & (gfn < ends[at]), at, -1)

    def is_private(self, gfn: IntArray) -> Bools:
        """Whether the attribute of each gfn says private."""
        words = self.vm.attributes.words
        inside = gfn < len(words)
        found = np.zeros(len(gfn), bool)
        found[inside] = words[gfn[inside]] != 0
        return found

    def backing(self, gfn: IntArray, private: Bools) -> IntArray:
        """The frame that stands behind each gfn for this kind of access now, 0 where nothing does yet."""
        frames = np.zeros(len(gfn), np.int64)
        owner = self.slot_of(gfn)
        for i, slot in enumerate(self.slots):
            mine = owner == i
            if not mine.any():
                continue
            gmem = mine & private if self.caps.private_by_attribute else np.zeros(len(gfn), bool)
            gmem = mine if slot.gmem_only else gmem
            if slot.gmem is not None:
                frames[gmem] = gmem_frames(slot.gmem.inode)[gfn[gmem] - slot.base_gfn + slot.gmem_pgoff]
            rest = mine & ~gmem
            for mapping, pages in self.vm.mm.ranges(slot.hva_page, slot.npages):
                assert isinstance(pages, slice)
                hva = gfn + (slot.hva_page - slot.base_gfn)
                here = rest & (hva >= pages.start) & (hva < pages.stop)
                index = hva[here] - mapping.start
                if mapping.gmem is not None:
                    frames[here] = gmem_frames(mapping.gmem.inode)[index + mapping.pgoff]
                else:
                    frames[here] = mapping.words[index] >> np.uint32(5)
        return frames

    def backed_large(self, gfn: IntArray, private: Bools) -> Bools:
        """Whether the page behind each gfn, for this kind of access, is part of a large page of the host."""
        large = np.zeros(len(gfn), bool)
        owner = self.slot_of(gfn)
        for i, slot in enumerate(self.slots):
            mine = owner == i
            if not mine.any():
                continue
            gmem = mine & (private & self.caps.private_by_attribute | slot.gmem_only)
            if slot.gmem is not None:
                index = gfn[gmem] - slot.base_gfn + slot.gmem_pgoff
                large[gmem] = slot.gmem.inode.words[index] & HUGE_FOLIO != 0
            hva = gfn + (slot.hva_page - slot.base_gfn)
            for mapping in self.mappings:
                here = mine & ~gmem & (hva >= mapping.start) & (hva < mapping.end)
                large[here] = mapping.words[hva[here] - mapping.start] & HUGE_PAGE != 0
        return large

    # ---- files and mappings -----------------------------------------------------------------------------------

    @cached_property
    def inodes(self) -> list[GmemInode]:
        """Inodes of the VM's open guest_memfd files."""
        found: list[GmemInode] = []
        for file in self.vm.gmem_files:
            if not any(inode is file.inode for inode in found):
                found.append(file.inode)
        return found

    @property
    def mappings(self) -> list[Mapping]:
        """Anonymous mappings of the VM's address space."""
        return [mapping for mapping in self.vm.mm.mappings if mapping.gmem is None]


# ---- again and again ------------------------------------------------------------------------------------------


def _tables(vm: Vm) -> tuple[object, ...]:
    tdp = vm.tdp
    roots = [*([tdp.mirror] if tdp.mirror is not None else []), tdp.direct, *tdp.invalid]
    entries = [(root, *root.leaves, *root.tables, *(words.tobytes() for words in root.entries)) for root in roots]
    return tdp.end_gfn, *entries, *(array_of(vcpu.tables.spare).tobytes() for vcpu in vm.vcpus)


def _slots(vm: Vm) -> tuple[object, ...]:
    return tuple(
        (s.id, s.base_gfn, s.npages, s.hva, s.flags, s.gmem, s.gmem_pgoff, s.gmem_only, s.invalid, s.dirty is None,
         *(info.tobytes() for info in s.lpage.values()))
        for s in vm.slots
    )  # fmt: skip


def _backing(vm: Vm) -> tuple[object, ...]:
    inodes = {file.inode: None for file in vm.gmem_files}
    return (
        *((inode, inode.npages, inode.allocated, inode.words.tobytes()) for inode in inodes),
        *((m, m.start, m.npages, m.gmem, m.pgoff, m.words.tobytes()) for m in vm.mm.mappings),
    )


def _handed_out(vm: Vm, column: npt.NDArray[Any]) -> tuple[object, ...]:
    frames = vm.host.frames
    return frames.top, column[: frames.top].tobytes(), column[max(frames.bottom, frames.top) :].tobytes()


def _external(vm: Vm) -> Root | None:
    tdp = vm.tdp
    return tdp.mirror if tdp.mirror is not None else tdp.direct if tdp.direct.external else None


def trusted_entries(vm: Vm, root: Root, level: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """What `read_private_spte` says of every entry of a level: kinds and frames."""
    n = min(len(root.entries[level]), -(-vm.tdp.end_gfn // pages_per_level(level)))
    pages = slice(0, n << order_of(level), pages_per_level(level))
    kinds, frames = peek(vm.host, "read_private_spte", vm=vm, gfns=pages, level=level)
    return kinds, frames


def levels_of(root: Root) -> range:
    """The levels that a root has entries at: one without tables has none above 2M."""
    return range(PG_LEVEL_4K, (PG_LEVEL_2M if root.flat else TOP) + 1)


def _trusted(vm: Vm) -> tuple[object, ...]:
    root = _external(vm)
    if root is None or not vm.host.ops.has("read_private_spte"):
        return ()
    return tuple(column.tobytes() for level in levels_of(root) for column in trusted_entries(vm, root, level))


PARTS: dict[str, Callable[[Vm], tuple[object, ...]]] = {
    "tables": _tables,
    "slots": _slots,
    "attributes": lambda vm: (vm.attributes.words.tobytes(),),
    "backing": _backing,
    "files": lambda vm: (
        vm.users, vm.destroyed, *((file, file.refs, *file.bindings, *file.inode.files) for file in vm.gmem_files),
    ),
    "use": lambda vm: _handed_out(vm, vm.host.frames.use),
    "pins": lambda vm: _handed_out(vm, vm.host.frames.pins),
    "trusted": _trusted,
    "tlbs": lambda vm: tuple((vcpu, *vcpu.tlb.entries.items()) for vcpu in vm.vcpus),
}  # fmt: skip
"""Parts of a VM, and of its host, that are compared as a whole: all that they hold, copied."""

_MADE_OF: dict[tuple[str, ...], tuple[str, ...]] = {
    ("tables",): ("roots", "mirror", "mirror_tables", "kinds"),
    ("tables", "attributes"): ("direct", "mapped", "reaching"),
    ("slots",): ("slots", "bounds"),
    ("tables", "slots"): ("owners",),
    ("attributes",): ("attributes",),
    ("backing",): ("inodes", "words"),
    ("use",): ("outstanding",),
    ("pins",): ("pins",),
}
"""What of a `State` is made of which parts: it is the same as long as they are."""


class View:
    """A VM that is looked at again and again: what is another than it was, by parts.

    Parts are compared with copies of them: no counter and no event is believed. So what was made of parts that are the
    same, or was found in order in them (`holds`), needs no second look. Between `look` and what is asked after it,
    nothing may happen to the VM.
    """

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.looks = 0
        self._parts: dict[str, tuple[object, ...]] = {}
        self._seen: dict[str, int] = {}
        self._changed: dict[str, int] = {}
        self._answers: dict[tuple[str, ...], int] = {}
        self._made: dict[str, Any] = {}
        self._held: dict[object, int] = {}

    def look(self) -> State:
        """The VM as it stands now."""
        self.looks += 1
        self._answers.clear()
        state = State(self.vm)
        for parts, names in _MADE_OF.items():
            if self.changed(parts) < self.looks:
                state.__dict__.update((name, self._made[name]) for name in names if name in self._made)
        self._made = {}
        return state

    def keep(self, state: State) -> None:
        """Keep what was made of the state of the last look, for the next."""
        self._made = dict(state.__dict__)

    def changed(self, parts: tuple[str, ...]) -> int:
        """The last look that found one of the parts changed. All are compared: what changes twice may look the same."""
        if (known := self._answers.get(parts)) is not None:
            return known
        for name in parts:
            if self._seen.get(name) != self.looks:
                self._seen[name] = self.looks
                now = PARTS[name](self.vm)
                if now != self._parts.get(name):
                    self._parts[name], self._changed[name] = now, self.looks
        last = self._answers[parts] = max([self._changed[name] for name in parts])
        return last

    def holds(self, row: object, reads: tuple[str, ...]) -> bool:
        """Whether nothing has changed in these parts since the row was last found to hold."""
        return self.changed(reads) <= self._held.get(row, 0)

    def held(self, row: object) -> None:
        """The row was looked at now, and holds."""
        self._held[row] = self.looks


# ---- before and after -----------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Store:
    """Memory behind guest pages, as it stood: an inode or a mapping with its words, and the content of all frames."""

    owner: GmemInode | Mapping
    words: Words
    stamp: Words
    key: npt.NDArray[np.uint16]

    @property
    def stamps(self) -> Words:
        """What stood in each page."""
        stamps: Words = self.stamp[self.words >> np.uint32(FRAME_SHIFT)]
        return stamps

    @property
    def keys(self) -> npt.NDArray[np.uint16]:
        """The key that each page was written with."""
        keys: npt.NDArray[np.uint16] = self.key[self.words >> np.uint32(FRAME_SHIFT)]
        return keys


@attrs.frozen(eq=False)
class Snapshot:
    """What a VM was like at one time, kept to be compared with what it is like later."""

    seq: int
    dead: bool
    users: int
    slots: dict[int, tuple[int, int, int, int, bool]]
    """By id: base gfn, pages, hva, flags, whether it is backed by guest_memfd."""
    attributes: npt.NDArray[np.uint8]
    leaves: Leaves
    files: dict[GmemFile, int]
    """References by open file."""
    stores: list[Store]
    pins: npt.NDArray[np.uint16]
    """Pins of the frames that were ever handed out to guests and processes."""
    loose_tables: int
    """Table frames that stand in no mirror and in no cache."""
    attribute_calls: int

    @staticmethod
    def of(state: State) -> Snapshot:
        vm, host = state.vm, state.host
        stamp, key = host.memory.stamp[: host.frames.top].copy(), host.memory.key[: host.frames.top].copy()
        return Snapshot(
            seq=vm.frame.seq,
            dead=vm.dead,
            users=vm.users,
            slots={s.id: (s.base_gfn, s.npages, s.hva, s.flags, s.has_gmem) for s in vm.slots},
            attributes=state.attributes,
            leaves=state.mapped,
            files={file: file.refs for file in vm.gmem_files},
            stores=[Store(owner, words, stamp, key) for owner, words in state.words],
            pins=state.pins,
            loose_tables=state.outstanding.get(Use.TABLE, 0) - len(state.mirror_tables),
            attribute_calls=host.meter.counts.get("attributes_call", 0),
        )

    def store(self, owner: object) -> Store | None:
        """What an inode or a mapping was like."""
        return next((store for store in self.stores if store.owner is owner), None)


@attrs.define(eq=False)
class Step:
    """One call of the UAPI, or one guest action, seen from both sides.

    call: what was called ("" where only the events in between are known), arguments: what it was about, by name;
    error: the UapiError that ended it; result: what it returned.
    """

    vm: Vm
    before: Snapshot
    call: str = ""
    arguments: dict[str, Any] = attrs.field(factory=dict)
    events: list[Event] = attrs.field(factory=list)
    after: Snapshot = attrs.field(init=False)
    error: UapiError | None = None
    result: Any = None

    def hooks(self, *names: str) -> list[Event]:
        """The hook calls of this step that began: those of these names, or all."""
        return [
            e for e in self.events
            if e.kind == "hook" and e.phase == "begin" and e.vm == self.vm.id and (not names or e.name in names)
        ]

    def gfns(self, kind: str, *names: str) -> IntArray:
        """All 4K gfns that events of a kind (and these names) were about."""
        found = [
            pages_of(e) for e in self.events
            if e.kind == kind and e.vm == self.vm.id and (not names or e.name in names) and e.phase != "begin"
        ]
        return np.unique(np.concatenate(found)) if found else _NONE


def pages_of(event: Event) -> IntArray:
    """The 4K gfns of an event."""
    return _NONE if event.gfns is None else array_of(event.gfns)
