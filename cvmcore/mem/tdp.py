"""The TDP MMU (kernel: mmu/tdp_mmu.c): page-table roots, and the only code that writes their entries.

A root is a radix tree kept as one flat array per level: element `gfn >> 9 * (level - 1)` is that gfn's entry. An
entry is a uint32 word: frame << 5 | state. 0 is absent, so an untouched root costs nothing.

Three kinds of root. *Direct*: the CPU walks it. *Mirror*: a copy of a table that only the trusted party can write
(`external`); every change of an entry freezes it, calls the hook, then commits or restores. A table of a mirror may be
*blocked*: it keeps its place and what stands below it, but walks end there. *Mediated*: the only root of a VM whose
stage 2 belongs to a hypervisor below; a record of what hooks installed (`external`, `flat`: KVM has no table pages
there).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.effects import FAULT_COMMIT, FAULT_FREEZE, FAULT_HOOK, Steps
from cvmcore.errors import InvariantViolation
from cvmcore.pages import (
    EMPTY,
    PIECE_RUN,
    Sel,
    Words,
    all_zero,
    array_of,
    blocks,
    contiguous,
    count,
    first,
    frames_of,
    grown,
    heads,
    last,
    part,
    run_of,
    take,
    where,
    words_of,
    zeros,
)
from cvmcore.types import (
    PG_LEVEL_1G,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    PG_LEVEL_512G,
    Batch,
    Fatal,
    Filter,
    FramesView,
    Retry,
    Stopped,
    Use,
    Walk,
    order_of,
    pages_per_level,
)

if TYPE_CHECKING:
    from cvmcore.mem.slots import Memslot
    from cvmcore.vcpu import Vcpu
    from cvmcore.vm import Vm

PRESENT, TABLE, WRITABLE, DIRTY, FROZEN = 1, 2, 4, 8, 16
"""State bits of an entry. FROZEN alone (not present): owned by another walker, hands off (FROZEN_SPTE). TABLE without
PRESENT: a blocked table."""
FRAME_SHIFT = 5

_FRAME = np.uint32(FRAME_SHIFT)
_TABLE = np.uint32(TABLE)
_LEAF = np.uint32(PRESENT | TABLE)
TOP = PG_LEVEL_512G
_WORD_OF = np.array([0, PRESENT | WRITABLE, PRESENT | TABLE, 0, TABLE], np.uint32)
"""State bits by what `read_private_spte` calls an entry."""

_STATES = ((PRESENT, "present"), (TABLE, "table"), (WRITABLE, "writable"), (DIRTY, "dirty"), (FROZEN, "frozen"))


def state_of(word: int) -> str:
    """An entry's state in words: "absent", "table", "present|writable", ..."""
    if word & TABLE:
        return "table" if word & PRESENT else "blocked table"
    return "|".join(name for bit, name in _STATES if word & bit) or "absent"


Arguments: TypeAlias = dict[str, object]
"""What a hook is called with, by name."""


class Root:
    """One page-table root."""

    def __init__(self, kind: Filter, *, external: bool = False, flat: bool = False, end_gfn: int = 0) -> None:
        self.kind = kind
        """Which accesses it serves: SHARED or PRIVATE with a mirror, BOTH without."""
        self.external = external
        self.flat = flat
        self.entries: list[Words] = [zeros(0, np.uint32) for _ in range(TOP + 1)]
        self.leaves = [0] * (TOP + 1)
        """Present leaves by level."""
        self.tables = [0] * (TOP + 1)
        """Tables by the level of the entry that points to them, blocked ones included."""
        self.blocked = 0
        """Tables that are blocked."""
        self.cover(end_gfn)

    @property
    def mirror(self) -> bool:
        return self.external and not self.flat

    def cover(self, end_gfn: int) -> None:
        """Make room for gfns below end_gfn."""
        end_gfn = -(-end_gfn // 512) * 512
        for level in range(PG_LEVEL_4K, TOP + 1):
            self.entries[level] = grown(self.entries[level], -(-end_gfn // pages_per_level(level)))

    @property
    def pages_mapped(self) -> int:
        """4K pages that leaves cover."""
        return sum(n << order_of(level) for level, n in enumerate(self.leaves) if level)

    @property
    def table_bytes(self) -> int:
        """Memory of KVM's own table pages, the root included; a mirror's external tables are counted apart."""
        return 0 if self.flat else 4096 * (1 + sum(self.tables))

    # ---- what the CPU does ------------------------------------------------------------------------------------

    def lookup(self, gfns: Sel, write: bool) -> tuple[int | npt.NDArray[np.uint8], Sel, int | npt.NDArray[np.uint8]]:
        """Walk for 4K gfns: status (Walk.OK or MISS, one for all or one each), frames where OK, levels of leaves."""
        need = PRESENT | WRITABLE if write else PRESENT
        words = take(self.entries[PG_LEVEL_4K], gfns)
        if not self.leaves[PG_LEVEL_2M] and not self.leaves[PG_LEVEL_1G]:
            return (*_status(words, need), PG_LEVEL_4K)
        pages = array_of(gfns)
        level = np.full(len(pages), PG_LEVEL_4K, np.uint8)
        words = words.copy()
        for large in (PG_LEVEL_2M, PG_LEVEL_1G):
            if self.leaves[large]:
                order = order_of(large)
                above = self.entries[large].take(pages >> order)
                leaf = (above & _LEAF) == PRESENT
                inside = (pages & ((1 << order) - 1)).astype(np.uint32) << _FRAME
                words = np.where(leaf, above + inside, words)
                level[leaf] = large
        status, pfns = _status(words, need)
        uniform = int(level[0])
        return status, pfns, uniform if not np.count_nonzero(level != uniform) else level

    # ---- walking ----------------------------------------------------------------------------------------------

    def under_tables(self, level: int, start: int, end: int) -> Iterator[slice]:
        """Runs of entry indexes at `level` that touch gfns [start, end) and whose table exists."""
        if start >= end:
            return
        runs = [(start >> order_of(TOP), (end - 1 >> order_of(TOP)) + 1)]
        for above in range(TOP, level, -1):
            found: list[tuple[int, int]] = []
            for low, high in runs:
                is_table = self.entries[above][low:high] & np.uint32(TABLE)
                if not np.count_nonzero(is_table):
                    continue
                if np.count_nonzero(is_table) == len(is_table):
                    found.append((low << 9, high << 9))
                    continue
                at = np.flatnonzero(is_table)
                for chunk in np.split(at, np.flatnonzero(at[1:] - at[:-1] != 1) + 1):
                    found.append(((low + int(chunk[0])) << 9, (low + int(chunk[-1]) + 1) << 9))
            order = order_of(above - 1)
            runs = [(max(low, start >> order), min(high, (end - 1 >> order) + 1)) for low, high in found]
        for low, high in runs:
            for piece in range(low, high, PIECE_RUN):
                yield slice(piece, min(piece + PIECE_RUN, high), 1)

    def leaves_in(self, start: int, end: int) -> Iterator[tuple[int, Sel]]:
        """(level, entry indexes) of all present leaves that overlap gfns [start, end), the largest level first."""
        for level in (PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K):
            if not self.leaves[level]:
                continue
            for run in self.under_tables(level, start, end):
                present = (self.entries[level][run] & _LEAF) == PRESENT
                n = int(np.count_nonzero(present))
                if n:
                    yield level, run if n == len(present) else where(run, present)

    def level_at(self, gfn: int) -> int:
        """Level of the leaf that maps gfn, 0 where none does."""
        for level in (PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K):
            entries, at = self.entries[level], gfn >> order_of(level)
            if self.leaves[level] and at < len(entries) and int(entries[at]) & (PRESENT | TABLE) == PRESENT:
                return level
        return 0

    def widened(self, start: int, end: int) -> tuple[int, int]:
        """[start, end) with all of the leaves that overlap it."""
        for gfn in (start, end - 1):
            if level := self.level_at(gfn):
                head = gfn & -pages_per_level(level)
                start, end = min(start, head), max(end, head + pages_per_level(level))
        return start, end

    def tabled(self, level: int, gfns: Sel) -> bool:
        """Whether there is a table right above `level` for each 4K gfn. Tables hang below tables, so that nothing is
        missing further up either."""
        order, table = order_of(level + 1), self.entries[level + 1]
        low, high = first(gfns) >> order, (last(gfns) >> order) + 1
        if high - low <= count(gfns):
            # Look at everything in between as well: that is faster, and as a rule there are tables everywhere.
            words = table[low:high] & _TABLE
            if np.count_nonzero(words) == high - low:
                return True
        words = take(table, blocks(gfns, order) if isinstance(gfns, slice) else gfns >> order) & _TABLE
        return int(np.count_nonzero(words)) == len(words)

    def first_blocked(self, gfns: Sel) -> tuple[int, int, int] | None:
        """The first of these gfns that a blocked table covers: (position, level, entry index), the highest such table.
        Ask `blocked` first."""
        found: tuple[int, int, int] | None = None
        pages = array_of(gfns)
        for level in range(TOP, PG_LEVEL_4K, -1):
            index = pages >> order_of(level)
            hit = (self.entries[level].take(index) & _LEAF) == _TABLE
            if np.count_nonzero(hit) and (found is None or int(np.argmax(hit)) < found[0]):
                at = int(np.argmax(hit))
                found = at, level, int(index[at])
        return found

    def blocked_in(self, start: int, end: int) -> list[tuple[int, Sel]]:
        """(level, entry indexes) of the blocked tables that overlap gfns [start, end), the highest first. Ask `blocked`
        first."""
        found: list[tuple[int, Sel]] = []
        for level in range(TOP, PG_LEVEL_4K, -1):
            for run in self.under_tables(level, start, end):
                hit = (self.entries[level][run] & _LEAF) == _TABLE
                if np.count_nonzero(hit):
                    found.append((level, where(run, hit)))
        return found

    def has_table(self, level: int, index: Sel) -> npt.NDArray[np.bool_]:
        """Whether entries at `level` point to tables: smaller mappings may exist below."""
        found: npt.NDArray[np.bool_] = (take(self.entries[level], index) & np.uint32(TABLE)) != 0
        return found


def _status(words: Words, need: int) -> tuple[int | npt.NDArray[np.uint8], Sel]:
    """Status of entries that are looked at for an access, and frames; most batches are alike: absent, or one run."""
    if not len(words):
        return Walk.OK, EMPTY
    head = int(words[0])
    if head == 0 and all_zero(words):
        return Walk.MISS, EMPTY
    if head & need == need and (run := run_of(words)) is not None:
        return Walk.OK, run
    ok = words & np.uint32(need) == need
    n = int(np.count_nonzero(ok))
    if n == len(ok):
        return Walk.OK, frames_of(words)
    if n == 0:
        return Walk.MISS, EMPTY
    return np.where(ok, np.uint8(Walk.OK), np.uint8(Walk.MISS)), (words >> _FRAME).astype(np.int64)


@attrs.frozen
class Stop:
    """set_entry got to `done` elements of its batch. reason: None means somebody else was faster."""

    done: int
    reason: Retry | Fatal


@attrs.frozen
class Mapped:
    """Why a page was not mapped: it is, as part of a larger leaf."""


class TableCache:
    """Pages for external tables, taken before mmu_lock because nothing is allocated under it (kernel:
    mmu_external_spt_cache of a vCPU; RFC: mmu_private_sp_cache).

    The kernel tops up to a fixed depth; here exactly what the walk will link is taken, and what it did not link goes
    back, so that a batch and its pages one by one leave the same behind.
    """

    def __init__(self, frames: FramesView) -> None:
        self.frames = frames
        self.spare: Sel = EMPTY

    def topup(self, n: int) -> None:
        """Have n pages. UapiError(ENOMEM): nothing was taken."""
        if (need := n - count(self.spare)) > 0:
            more = self.frames.alloc(need, Use.TABLE)
            self.spare = contiguous(np.concatenate([array_of(self.spare), array_of(more)]))

    def topup_walk(self, root: Root, gfns: Sel) -> None:
        """Have what a walk of the root down to 4K would link (mmu_topup_memory_caches)."""
        need = 0
        if not root.tabled(PG_LEVEL_4K, gfns):
            for level in range(TOP, PG_LEVEL_4K, -1):
                words = take(root.entries[level], blocks(gfns, order_of(level)))
                need += len(words) - int(np.count_nonzero(words))
        self.topup(need)

    def take(self, n: int) -> Sel:
        """n of the pages; they must be there."""
        taken, self.spare = part(self.spare, 0, n), part(self.spare, n, count(self.spare))
        if count(taken) < n:
            raise InvariantViolation("the cache of table pages was not topped up", number=31)
        return taken

    def give_back(self) -> None:
        """What was not used goes back to the host."""
        self.frames.free(self.spare)
        self.spare = EMPTY


class Tdp:
    """The page tables of one VM. `set_entry` and what is built on it are the only writers of entries, and the only
    callers of entry hooks."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        caps = vm.caps
        self.reads_external = vm.host.policies["walker"] == "external" and vm.host.ops.has("walk_private_spte")
        """Faults walk the trusted table, not the mirror, which goes on as a record, and for its frozen entries."""
        self.mirror: Root | None = Root(Filter.PRIVATE, external=True) if caps.has_mirror else None
        self.direct = self._new_direct()
        self.invalid: list[Root] = []
        """Direct roots on their way out after a fast zap; still zapped by every invalidation."""
        self.end_gfn = 0

    def _new_direct(self) -> Root:
        caps = self.vm.caps
        kind = Filter.SHARED if caps.has_mirror else Filter.BOTH
        return Root(kind, external=caps.mediated_root, flat=caps.mediated_root)

    def cover(self, end_gfn: int) -> None:
        self.end_gfn = max(self.end_gfn, end_gfn)
        for root in self.roots():
            root.cover(self.end_gfn)

    def root_for(self, private: bool) -> Root:
        """The root that serves an access (tdp_mmu_get_root_for_fault)."""
        return self.mirror if private and self.mirror is not None else self.direct

    def roots(self, kinds: Filter = Filter.BOTH, *, invalid: bool = False) -> list[Root]:
        """Roots that an invalidation of these kinds is about (kvm_gfn_range_filter_to_root_types): without a mirror
        always the direct root; with one, PRIVATE means the mirror and SHARED the direct root."""
        if self.mirror is None:
            found = [self.direct]
        else:
            found = [self.mirror] if Filter.PRIVATE in kinds else []
            found += [self.direct] if Filter.SHARED in kinds else []
        return found + (self.invalid if invalid and self.direct in found else [])

    # ---- set_entry --------------------------------------------------------------------------------------------

    def set_entry(
        self,
        root: Root,
        level: int,
        index: Sel,
        new: npt.ArrayLike,
        hook: str = "",
        arguments: Arguments | None = None,
        old: npt.ArrayLike = 0,
    ) -> Steps[Stop | None]:
        """Entries at `index`, which are `old` (absent, unless the caller found something else), become `new`.

        Direct root: a compare-exchange. External root: freeze, hook, then commit, or restore from where the hook
        stopped. Kernel: tdp_mmu_set_spte_atomic, set_external_spte_present.
        """
        table = root.entries[level]
        detailed = self.vm.host.ops.detailed
        if not (root.external and hook):
            if detailed:
                self._tell(root, level, index, new)
            table[index] = new
            return None
        table[index] = FROZEN
        yield FAULT_FREEZE
        yield FAULT_HOOK
        n = count(index)
        stopped = yield from self.vm.host.ops.call(hook, n, vm=self.vm, **(arguments or {}))
        self.vm.host.meter.charge("external_update", n if stopped is None else stopped.done)
        if stopped is None:
            table[index] = new
            if detailed:
                self._tell(root, level, index, new, old)
            yield FAULT_COMMIT
            return None
        done = stopped.done
        table[part(index, done, n)] = np.asarray(old)[done:] if np.ndim(old) else old
        if done:
            table[part(index, 0, done)] = some = np.asarray(new)[:done] if np.ndim(new) else new
            if detailed:
                self._tell(root, level, part(index, 0, done), some, np.asarray(old)[:done] if np.ndim(old) else old)
        yield FAULT_COMMIT
        return Stop(done, stopped.reason)

    def _tell(self, root: Root, level: int, index: Sel, new: npt.ArrayLike, old: npt.ArrayLike | None = None) -> None:
        """Tell observers that entries, `old` or as they stand, become `new`: one event for each pair of states."""
        n = count(index)
        before = np.broadcast_to(np.asarray(take(root.entries[level], index) if old is None else old, np.uint32), n)
        after = np.broadcast_to(np.asarray(new, np.uint32), n)
        bits = (1 << FRAME_SHIFT) - 1
        pairs = (before & bits) << FRAME_SHIFT | after & bits
        for pair in np.unique(pairs).tolist():
            same = pairs == pair
            words = (after if pair & PRESENT else before)[same]
            info = {"root": root.kind, "from": state_of(pair >> FRAME_SHIFT), "to": state_of(pair & bits)}
            is_table = TABLE & (pair | pair >> FRAME_SHIFT)
            if root.flat and is_table:
                continue  # KVM has no table pages there
            pfns = EMPTY if is_table else contiguous(words >> _FRAME, pages_per_level(level))
            self.vm.host.ops.detail(
                "entry", "set", vm=self.vm.id, level=level, n=len(words), info=info,
                gfns=heads(where(index, same), order_of(level)), pfns=pfns,
            )

    # ---- reading ----------------------------------------------------------------------------------------------

    def read(self, root: Root, level: int, index: Sel, n: int) -> Steps[Words | None]:
        """The entries at `index` as a fault of n pages finds them: from the root's own words, or, by policy, from the
        trusted table. None where that is busy. Reads of more than one page are counted by `walked`."""
        words = take(root.entries[level], index)
        if not self.reads_external or not root.mirror:
            return words
        gfns = heads(index, order_of(level))
        found = yield from self.vm.host.ops.call(
            "walk_private_spte", int(n == 1), vm=self.vm, gfns=gfns, level=level, reads=int(n == 1)
        )
        if isinstance(found, Stopped):
            return None
        kinds, frames = found
        read: Words = (frames << FRAME_SHIFT).astype(np.uint32) | _WORD_OF.take(kinds)
        read[words == FROZEN] = FROZEN
        return read

    def walked(self, root: Root, level: int, n: int) -> Steps[None]:
        """n pages of a batch were walked from the top down to `level`."""
        if self.reads_external and root.mirror:
            for above in range(TOP, level - 1, -1):
                yield from self.vm.host.ops.call(
                    "walk_private_spte", n, vm=self.vm, gfns=EMPTY, level=above, reads=n
                )

    # ---- installing -------------------------------------------------------------------------------------------

    def link_tables(
        self, root: Root, level: int, gfns: Sel, cache: TableCache, *, reads: bool = False
    ) -> Steps[tuple[int, Retry | Fatal | Mapped | None]]:
        """Make sure that tables stand above `level` for all gfns, parents first; a direct huge leaf in the way is
        split, one of a mediated root zapped: its small pages fault in again; one of a mirror root serves them as it is.
        Returns how many leading gfns may go on, and why not more (Retry: frozen, or the hook was busy; Mapped: a larger
        leaf has the next one already). reads: the walk is a fault's, which may be one of the trusted table (`read`)."""
        n = asked = count(gfns)
        reason: Retry | Fatal | Mapped | None = None
        external = reads and self.reads_external and root.mirror
        stopped_at = TOP
        if not external and root.tabled(level, gfns):
            return n, None
        for above in range(TOP, level, -1):
            if n == 0:
                break
            before = n
            index = blocks(part(gfns, 0, n), order_of(above))
            words = take(root.entries[above], index)
            if external:
                found = yield from self.read(root, above, index, asked)
                if found is None:
                    return 0, Retry()
                words = found
            tables = int(np.count_nonzero(words & np.uint32(TABLE)))
            if tables == len(words):
                continue
            if np.count_nonzero((words & _LEAF) == PRESENT):
                huge = where(index, (words & _LEAF) == PRESENT)
                if root.mirror:
                    n, reason = _before(gfns, first(huge), order_of(above), n), Mapped()
                    index = blocks(part(gfns, 0, n), order_of(above))
                else:
                    for at in array_of(huge).tolist():
                        if root.flat:
                            slot = self._slot_at(at << order_of(above))
                            yield from self._zap(root, slot, above, slice(at, at + 1, 1))
                            self._invalidated(at << order_of(above), above)
                        else:
                            yield from self.split(root, at << order_of(above), above)
                words = take(root.entries[above], index)
            if np.count_nonzero(words == FROZEN):
                bad = first(where(index, words == FROZEN))
                n, reason = _before(gfns, bad, order_of(above), n), Retry()
                index = blocks(part(gfns, 0, n), order_of(above))
                words = take(root.entries[above], index)
            absent = index if not np.count_nonzero(words) else where(index, words == 0)
            if count(absent):
                stop = yield from self._link(root, above, absent, cache)
                if stop is not None:
                    bad = first(part(absent, stop.done, stop.done + 1))
                    n, reason = _before(gfns, bad, order_of(above), n), stop.reason
            if n < before:
                stopped_at = above
        if external and n < asked > 1:
            yield from self.walked(root, stopped_at, 1)
        return n, reason

    def _slot_at(self, gfn: int) -> Memslot:
        slot = self.vm.slots.find(gfn)
        assert slot is not None
        return slot

    def _link(self, root: Root, level: int, index: Sel, cache: TableCache) -> Steps[Stop | None]:
        n = count(index)
        if not root.mirror:
            yield from self.set_entry(root, level, index, PRESENT | TABLE)
            root.tables[level] += n
            return None
        frames = self.vm.host.frames
        tables = cache.take(n)
        stop: Stop | None = yield from self.set_entry(
            root,
            level,
            index,
            words_of(tables, PRESENT | TABLE),
            "link_private_spt",
            {"gfns": heads(index, order_of(level)), "level": level, "tables": tables},
        )
        done = n if stop is None else stop.done
        root.tables[level] += done
        if done < n:
            frames.free(part(tables, done, n))
        return stop

    def map_leaves(self, root: Root, batch: Batch, bits: int, vcpu: Vcpu | None = None) -> Steps[Stop | None]:
        """Absent entries become leaves, for a fault of `vcpu` if there is one. The caller has linked the tables and
        looked at the entries under mmu_lock."""
        new = words_of(batch.pfns, bits | PRESENT)
        arguments: Arguments = {"batch": batch, "vcpu": vcpu}
        stop = yield from self.set_entry(root, batch.level, batch.blocks, new, "set_private_spte", arguments)
        root.leaves[batch.level] += len(batch) if stop is None else stop.done
        return stop

    # ---- zapping ----------------------------------------------------------------------------------------------

    def zap_leaves(self, root: Root, slot: Memslot, start: int, end: int) -> Steps[int]:
        """Zap every leaf that overlaps gfns [start, end), whole, at its own level (mmu_lock held for write).

        Returns the number of 4K pages that were mapped. Tables stay (tdp_mmu_zap_leafs), blocked ones are unblocked
        first. The caller flushes.
        """
        if root.blocked:
            yield from self.unblock_range(root, start, end)
        zapped = 0
        for level, index in root.leaves_in(start, end):
            zapped += yield from self._zap(root, slot, level, index)
        return zapped

    def _zap(self, root: Root, slot: Memslot, level: int, index: Sel) -> Steps[int]:
        n = count(index)
        words = take(root.entries[level], index)
        if self.vm.host.ops.observed or root.external:
            pfns = contiguous(words >> _FRAME, pages_per_level(level))
            batch = Batch(slot, level, heads(index, order_of(level)), pfns)
            self.vm.host.ops.emit(
                "zap", "zap_leaf", vm=self.vm.id, gfns=batch.all_gfns, pfns=batch.all_pfns, level=level, n=n
            )
        if self.vm.host.ops.detailed:
            self._tell(root, level, index, 0)
        root.entries[level][index] = 0
        root.leaves[level] -= n
        self.vm.host.meter.charge("spte_write", n)
        if root.external:
            yield from self.vm.host.ops.call("remove_private_spte", n, vm=self.vm, batch=batch)
        return n << order_of(level)

    # ---- changing size ----------------------------------------------------------------------------------------

    def split(self, root: Root, gfn: int, level: int, cache: TableCache | None = None) -> Steps[Stop | None]:
        """A huge leaf becomes a table of 512 leaves of the same frames (tdp_mmu_split_huge_page).

        Direct root: both views translate alike, so nothing is flushed. Mirror: the hook demotes with a table page from
        the cache; on failure the huge leaf stays and the reason is returned (mmu_lock held for write).
        """
        order, at = order_of(level), gfn >> order_of(level)
        if root.blocked:
            yield from self.unblock_range(root, gfn, gfn + 1)
        word = int(root.entries[level][at])
        head = at << order
        pfn = word >> FRAME_SHIFT
        size = pages_per_level(level - 1)
        children = slice(at << 9, (at + 1) << 9, 1)
        small = words_of(slice(pfn, pfn + 512 * size, size), word & (PRESENT | WRITABLE | DIRTY))
        tables: Sel = EMPTY
        if root.mirror:
            assert cache is not None
            tables = cache.take(1)
        stop: Stop | None = yield from self.set_entry(
            root,
            level,
            slice(at, at + 1, 1),
            words_of(tables, PRESENT | TABLE) if root.mirror else PRESENT | TABLE,
            "split_private_spt" if root.mirror else "",
            {"gfn": head, "level": level, "table": first(tables) if root.mirror else 0},
            word,
        )
        if stop is not None:
            self.vm.host.frames.free(tables)
            return stop
        if self.vm.host.ops.detailed:
            self._tell(root, level - 1, children, small)
        root.entries[level - 1][children] = small
        root.leaves[level] -= 1
        root.leaves[level - 1] += 512
        root.tables[level] += 1
        if not root.mirror:
            self.vm.host.meter.charge("hugepage_split")
        self.vm.host.ops.emit(
            "zap", "split", vm=self.vm.id, gfns=slice(head, head + (1 << order), 1), level=level, n=1
        )
        return None

    def can_be_huge(self, root: Root, gfn: int, level: int) -> int | None:
        """The first frame, where 512 present leaves of equal rights stand on contiguous, aligned frames; else None."""
        at = gfn >> order_of(level)
        if not int(root.entries[level][at]) & TABLE:
            return None
        words = root.entries[level - 1][at << 9 : (at + 1) << 9]
        low = int(words[0])
        pfn = low >> FRAME_SHIFT
        if not low & PRESENT or low & TABLE or pfn & (pages_per_level(level) - 1):
            return None
        frames = slice(pfn, pfn + pages_per_level(level), pages_per_level(level - 1))
        want = words_of(frames, low & WRITABLE | PRESENT)
        return None if np.count_nonzero((words & ~np.uint32(DIRTY)) != want) else pfn

    def promote(self, root: Root, gfn: int, level: int) -> Steps[Stop | None]:
        """A full table of a mirror root, blocked or not, becomes one huge leaf through the hook; content is kept. On
        failure the pages stay small, and the table is not blocked any more. The caller has checked `can_be_huge`."""
        order, at = order_of(level), gfn >> order_of(level)
        pfn = self.can_be_huge(root, gfn, level)
        assert pfn is not None
        word = int(root.entries[level][at])
        blocked = not word & PRESENT
        children = slice(at << 9, (at + 1) << 9, 1)
        small = root.entries[level - 1][children].copy()
        bits = int(small[0]) & (PRESENT | WRITABLE)
        table = word >> FRAME_SHIFT
        # Nobody gets to them while their table is frozen; a page must not be seen mapped twice when it no longer is.
        root.entries[level - 1][children] = 0
        stop = yield from self.set_entry(
            root,
            level,
            slice(at, at + 1, 1),
            pfn << FRAME_SHIFT | bits,
            "promote_private_spt",
            {"gfn": at << order, "level": level, "pfn": pfn, "table": table, "blocked": blocked},
            word | PRESENT,
        )
        root.blocked -= blocked
        if stop is not None:
            root.entries[level - 1][children] = small
            return stop
        if self.vm.host.ops.detailed:
            self._tell(root, level - 1, children, 0, small)
        root.leaves[level] += 1
        root.leaves[level - 1] -= 512
        root.tables[level] -= 1
        self.vm.host.frames.free(slice(table, table + 1, 1))
        self.vm.host.ops.emit(
            "zap", "promote", vm=self.vm.id, gfns=slice(at << order, (at + 1) << order, 1), level=level, n=1
        )
        return None

    def block(self, root: Root, level: int, index: Sel) -> Steps[Stop | None]:
        """Tables of a mirror root, none of them blocked, are: the next access of the guest below them faults, and
        nothing is lost (mmu_lock held for write)."""
        order, words = order_of(level), take(root.entries[level], index).copy()
        gfns = heads(index, order)
        stop = yield from self.set_entry(
            root, level, index, words & np.uint32(0xFFFF_FFFF ^ PRESENT), "block_private_spt",
            {"gfns": gfns, "level": level}, words,
        )
        done = count(index) if stop is None else stop.done
        root.blocked += done
        if done:
            for vcpu in self.vm.vcpus:
                vcpu.tlb.flush(first(gfns), last(part(gfns, 0, done)) + (1 << order))
        return stop

    def unblock(self, root: Root, level: int, index: Sel) -> Steps[None]:
        """Blocked tables of a mirror root serve again (mmu_lock held for write)."""
        words = take(root.entries[level], index) | np.uint32(PRESENT)
        if self.vm.host.ops.detailed:
            self._tell(root, level, index, words)
        root.entries[level][index] = words
        root.blocked -= count(index)
        self.vm.host.meter.charge("external_update", count(index))
        gfns = heads(index, order_of(level))
        yield from self.vm.host.ops.call("unblock_private_spt", count(index), vm=self.vm, gfns=gfns, level=level)

    def unblock_range(self, root: Root, start: int, end: int) -> Steps[None]:
        """Whatever is blocked above gfns [start, end) is opened, so that their entries can be changed."""
        for level, index in root.blocked_in(start, end):
            yield from self.unblock(root, level, index)

    def collapse(self, root: Root, gfn: int, level: int, pfn: int, bits: int) -> Steps[None]:
        """A direct table is replaced by a huge leaf with these rights on its aligned frames
        (kvm_tdp_mmu_recover_huge_pages), in one go; the caller flushes."""
        order, at = order_of(level), gfn >> order_of(level)
        small = root.entries[level - 1][at << 9 : (at + 1) << 9]
        present = int(np.count_nonzero(small & np.uint32(PRESENT)))
        root.leaves[level - 1] -= present
        root.tables[level] -= 1
        if self.vm.host.ops.detailed:
            self._tell(root, level - 1, where(slice(at << 9, (at + 1) << 9, 1), small != 0), 0)
        small[:] = 0
        yield from self.set_entry(root, level, slice(at, at + 1, 1), pfn << FRAME_SHIFT | PRESENT | bits)
        root.leaves[level] += 1
        self.vm.host.meter.charge("hugepage_merge")
        self.vm.host.ops.emit("zap", "collapse", vm=self.vm.id, gfns=slice(at << order, (at + 1) << order, 1), n=1)

    def make_room(self, root: Root, slot: Memslot, gfn: int, level: int) -> Steps[None]:
        """What a mediated root has of small pages where a huge leaf is due is zapped; content stays where it is."""
        yield from self.zap_leaves(root, slot, gfn, gfn + pages_per_level(level))
        self._invalidated(gfn, level)
        root.entries[level][gfn >> order_of(level)] = 0
        root.tables[level] -= 1

    def _invalidated(self, gfn: int, level: int) -> None:
        """Within a fault nobody flushes what a mediated root loses: the trusted party has, before it took it back."""
        for vcpu in self.vm.vcpus:
            vcpu.tlb.flush(gfn, gfn + pages_per_level(level))

    # ---- rights -----------------------------------------------------------------------------------------------

    def protect(self, root: Root, slot: Memslot, gfns: slice) -> Steps[int]:
        """Dirty logging takes write access from the leaves among gfns, huge ones of a mediated root included. Returns
        how many had it; the caller flushes."""
        if not root.external:
            return self.write_protect(root, gfns)
        protected = 0
        for level, index in list(root.leaves_in(gfns.start, gfns.stop)):
            words = take(root.entries[level], index)
            had = (words & np.uint32(WRITABLE)) != 0
            n = int(np.count_nonzero(had))
            if n == 0:
                continue
            some, kept = where(index, had), words[had] & np.uint32(0xFFFF_FFFF ^ (WRITABLE | DIRTY))
            batch = Batch(slot, level, heads(some, order_of(level)), contiguous(kept >> _FRAME, pages_per_level(level)))
            yield from self.vm.host.ops.call("wrprotect_private_spte", n, vm=self.vm, batch=batch)
            if self.vm.host.ops.detailed:
                self._tell(root, level, some, kept)
            root.entries[level][some] = kept
            self.vm.host.meter.charge("spte_wrprot", n)
            protected += n
        return protected

    def write_protect(self, root: Root, gfns: slice) -> int:
        """Take write access from the 4K leaves among gfns. Returns how many had it."""
        protected = 0
        for run in root.under_tables(PG_LEVEL_4K, gfns.start, gfns.stop):
            words = root.entries[PG_LEVEL_4K][run]
            mask = (words & np.uint32(PRESENT | WRITABLE)) == PRESENT | WRITABLE
            protected += int(np.count_nonzero(mask))
            kept = words[mask] & np.uint32(0xFFFF_FFFF ^ (WRITABLE | DIRTY))
            if self.vm.host.ops.detailed:
                self._tell(root, PG_LEVEL_4K, where(run, mask), kept)
            words[mask] = kept
        self.vm.host.meter.charge("spte_wrprot", protected)
        return protected

    def make_writable(self, root: Root, slot: Memslot, level: int, index: Sel, vcpu: Vcpu) -> Steps[Stop | None]:
        """Give present leaves write access (the fast page fault); those of an external root through the hook."""
        words = take(root.entries[level], index) | np.uint32(WRITABLE | DIRTY)
        stop: Stop | None = None
        if root.external:
            pfns = contiguous(words >> _FRAME, pages_per_level(level))
            batch = Batch(slot, level, heads(index, order_of(level)), pfns)
            stopped = yield from self.vm.host.ops.call(
                "relax_private_spte", len(batch), vm=self.vm, batch=batch, vcpu=vcpu
            )
            if stopped is not None:
                stop = Stop(stopped.done, stopped.reason)
                index, words = part(index, 0, stop.done), words[: stop.done]
        if self.vm.host.ops.detailed:
            self._tell(root, level, index, words)
        root.entries[level][index] = words
        return stop

    # ---- whole roots ------------------------------------------------------------------------------------------

    def fast_zap(self) -> Root:
        """The direct root becomes invalid and vCPUs get a new one (kvm_tdp_mmu_invalidate_roots, mmu_lock:w)."""
        old = self.direct
        self.invalid.append(old)
        self.direct = self._new_direct()
        self.direct.cover(self.end_gfn)
        return old

    def drop_root(self, root: Root) -> None:
        """An invalid direct root is zapped and freed."""
        pages = root.pages_mapped
        self.vm.host.meter.charge("spte_write", sum(root.leaves))
        self.vm.host.ops.emit("zap", "zap_root", vm=self.vm.id, n=pages)
        if self.vm.host.ops.detailed:
            for level, index in root.leaves_in(0, self.end_gfn):
                self._tell(root, level, index, 0)
        self.invalid.remove(root)

    def free_mirror(self) -> Steps[None]:
        """Free the mirror's tables bottom-up through the hook (handle_removed_pt). Leaves are gone already."""
        root = self.mirror
        if root is None:
            return
        for level in range(PG_LEVEL_2M, TOP + 1):
            for run in list(root.under_tables(level, 0, self.end_gfn)):
                tables = root.has_table(level, run)
                if not np.count_nonzero(tables):
                    continue
                index = where(run, tables)
                pfns = contiguous(take(root.entries[level], index) >> _FRAME)
                gfns = heads(index, order_of(level))
                back = yield from self.vm.host.ops.call(
                    "free_private_spt", count(index), vm=self.vm, gfns=gfns, level=level, tables=pfns
                )
                self.vm.host.frames.free(pfns if back is None else back)
                if self.vm.host.ops.detailed:
                    self._tell(root, level, index, 0)
                root.entries[level][index] = 0
                root.tables[level] -= count(index)


def _before(gfns: Sel, bad_block: int, order: int, n: int) -> int:
    """How many of the first n gfns lie below a block."""
    if isinstance(gfns, slice):
        return max(0, min(n, -(-((bad_block << order) - int(gfns.start)) // int(gfns.step or 1))))
    return int(np.searchsorted(gfns[:n], bad_block << order))

