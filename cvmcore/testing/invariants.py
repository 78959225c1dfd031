"""What must always hold, as code: 32 invariants of KVM's memory management, and a `Checker` that watches them.

`INVARIANTS` is the table: each row has its number, what it says, the capability that switches it on, when it is
looked at, and the function that looks. Several rows may share a number, where an invariant has several halves.

  any      a function of a `State`: holds at every step, also while operations are half way
  quiet    a function of a `State`: holds whenever no operation is under way
  gone     a function of a `State`: holds of a VM that was destroyed
  event    a function of a `Trace` and an event: holds at every hook call
  step     a function of a `Step`: holds between before and after of one UAPI call or guest action

A function returns what is `Wrong`, or None. Basis: the life of page-table entries, locks and pages in Linux 6.16 to 7.0
(mmu/tdp_mmu.c, virt/kvm/guest_memfd.c, kvm_main.c); for pins the demand-pinning RFC of 2022.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.errors import InvariantViolation, UapiError
from cvmcore.events import Event
from cvmcore.hookspecs import HOOKS
from cvmcore.host import Host
from cvmcore.mem.gmem import HUGE, UPTODATE, GmemInode
from cvmcore.mem.slots import MIXED
from cvmcore.mem.tdp import FROZEN, TABLE, TOP, Root
from cvmcore.memory import ZERO
from cvmcore.observers import observes
from cvmcore.pages import IntArray, array_of, blocks, contiguous, heads
from cvmcore.sched import Held, Lockdep
from cvmcore.testing.state import (
    ABSENT,
    DESTROYED,
    IS_BLOCKED,
    IS_LEAF,
    IS_TABLE,
    Bools,
    Leaves,
    Snapshot,
    State,
    Step,
    View,
    gmem_frames,
    levels_of,
    pages_of,
    peek,
    trusted_entries,
)
from cvmcore.testing.trace import ENTRY_HOOKS, MUST_BE, Trace, entries_of
from cvmcore.types import (
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    KVM_MEMORY_EXIT_FLAG_PRIVATE,
    PAGE_BYTES,
    PG_LEVEL_1G,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    Capabilities,
    HostMode,
    HostVerdict,
    MemoryFault,
    Mmio,
    Use,
    order_of,
    pages_per_level,
)
from cvmcore.vm import Vm

GUEST_CALLS = frozenset({"write", "read", "accept", "prefault"})
"""Steps that may only fault pages in."""
IOCTLS = frozenset({
    "create_vcpu", "create_guest_memfd", "set_user_memory_region", "set_memory_attributes", "prefault", "write", "read",
    "accept", "convert", "get_dirty_log", "memory_encrypt_op", "register_region", "unregister_region",
})  # fmt: skip
"""Steps that are ioctls of the VM or of a vCPU."""
TEARDOWN = frozenset({
    "vm_pre_destroy", "vm_destroy", "vcpu_exit", "vcpu_free", "memslot_prepare", "memslot_free", "split_private_spt",
    "remove_private_spte", "free_private_spt", "unpin_pfn", "flush_remote_tlbs", "gmem_invalidate", "memory_reclaimed",
    "read_private_spte", "host_access", "unblock_private_spt",
})  # fmt: skip
"""Hooks that take memory away: all that is called for a VM that is dead."""


# ---- the table ------------------------------------------------------------------------------------------------


@attrs.frozen
class Wrong:
    """What does not hold, and where."""

    what: str
    gfn: int | None = None
    pfn: int | None = None
    states: dict[str, object] = attrs.field(factory=dict)


@attrs.frozen
class Needs:
    """The capability that switches an invariant on, by name and as a question."""

    name: str
    of: Callable[[Capabilities], bool]

    def __call__(self, caps: Capabilities) -> bool:
        return self.of(caps)


class When(enum.Enum):
    """When an invariant is looked at; see the module."""

    ANY = "any"
    QUIET = "quiet"
    GONE = "gone"
    EVENT = "event"
    STEP = "step"


Check: TypeAlias = Callable[..., Wrong | None]


@attrs.frozen(eq=False)
class Invariant:
    """One row: `check` takes a State (any, quiet, gone), a Trace and an Event (event), or a Step (step)."""

    number: int
    text: str
    needs: Needs
    when: When
    check: Check
    reads: tuple[str, ...] | None = None
    """The parts of the VM (`state.PARTS`) that it reads, where it reads nothing else: a `View` has it looked at again
    only when one of them has changed. None: each time."""

    @property
    def quiet_only(self) -> bool:
        """Whether it may be broken for a moment while an operation is half way."""
        return self.when is When.QUIET

    def enforce(self, host: Host, *subject: object) -> None:
        """Look, and raise InvariantViolation with this number for what is wrong."""
        if wrong := self.check(*subject):
            raise InvariantViolation(
                f"{wrong.what} ({self.text})", number=self.number, gfn=wrong.gfn, pfn=wrong.pfn, states=wrong.states,
                events=host.last_events(),
            )


ALWAYS = Needs("every VM", lambda caps: True)
GMEM = Needs("gmem_backed", lambda caps: caps.gmem_backed)
PRIVATE = Needs("private_by_attribute", lambda caps: caps.private_by_attribute)
UNMIRRORED = Needs(
    "private_by_attribute, no has_mirror", lambda caps: caps.private_by_attribute and not caps.has_mirror
)
MIRROR = Needs("has_mirror", lambda caps: caps.has_mirror)
EXTERNAL = Needs("has_mirror or mediated_root", lambda caps: caps.has_mirror or caps.mediated_root)
OWNED = Needs(
    "private_by_attribute, or confidential with mediated_root",
    lambda caps: caps.private_by_attribute or (caps.confidential and caps.mediated_root),
)
APART = Needs(
    "private_by_attribute, no converts_in_place", lambda caps: caps.private_by_attribute and not caps.converts_in_place
)
GUESTS = Needs(
    "gmem_backed, has_mirror or mediated_root", lambda caps: caps.gmem_backed or caps.has_mirror or caps.mediated_root
)
PINS = Needs("needs_pin", lambda caps: caps.needs_pin)
NOTIFIED = Needs("honours_notifiers", lambda caps: caps.honours_notifiers)

INVARIANTS: list[Invariant] = []
"""Every row, in the order of the numbers once the module is loaded."""


def _row(number: int, text: str, needs: Needs, when: When, reads: str = "") -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        INVARIANTS.append(Invariant(number, text, needs, when, check, tuple(reads.split()) or None))
        return check

    return add


def _first(
    mask: Bools, what: str, gfn: npt.NDArray[Any] | None = None, pfn: npt.NDArray[Any] | None = None, **columns: Any
) -> Wrong | None:
    """The first element at which the mask holds, as what is wrong."""
    if not np.count_nonzero(mask):
        return None
    i = int(np.argmax(mask))
    return Wrong(
        what, int(gfn[i]) if gfn is not None else None, int(pfn[i]) if pfn is not None else None,
        {name: _plain(column[i]) for name, column in columns.items()},
    )


def _plain(value: Any) -> object:
    return value.item() if isinstance(value, np.generic) else value


# ---- 1 to 3: memslots and bindings ----------------------------------------------------------------------------


@_row(1, "slots of one address space never overlap", ALWAYS, When.ANY, "slots")
def slots_apart(s: State) -> Wrong | None:
    slots = sorted(s.vm.slots, key=lambda slot: (slot.as_id, slot.base_gfn))
    for low, high in pairwise(slots):
        if low.as_id == high.as_id and low.end_gfn > high.base_gfn:
            return Wrong(f"slots {low.id} and {high.id} overlap", gfn=high.base_gfn)
    bad = [slot for slot in slots if slot.has_gmem and slot.flags & (KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY)]
    return Wrong(f"guest_memfd slot {bad[0].id} is logged or read only", gfn=bad[0].base_gfn) if bad else None


@_row(1, "a guest_memfd slot is only created or deleted", GMEM, When.STEP)
def gmem_slots_fixed(step: Step) -> Wrong | None:
    for slot_id, now in step.after.slots.items():
        was = step.before.slots.get(slot_id, now)
        if was != now and (was[4] or now[4]):
            return Wrong(f"slot {slot_id} changed", gfn=now[0], states={"before": was, "after": now})
    return None


@_row(2, "a file's index is bound to at most one slot, and slot and binding name each other", GMEM, When.QUIET)
def bindings_match(s: State) -> Wrong | None:
    slots = list(s.vm.slots)
    for slot in slots:
        if slot.gmem is None:
            continue
        if (slot.gmem_pgoff, slot.npages, slot) not in slot.gmem.bindings:
            return Wrong(f"slot {slot.id} names a file that does not have its binding", gfn=slot.base_gfn)
    for file in s.vm.gmem_files:
        end = 0
        for index, npages, slot in file.bindings:
            if index < end:
                return Wrong(f"index {index:#x} of a file is bound twice", gfn=slot.base_gfn)
            if slot.gmem is not file or (slot.gmem_pgoff, slot.npages) != (index, npages):
                return Wrong(f"a binding names slot {slot.id}, which does not name it", gfn=slot.base_gfn)
            end = index + npages
    return None


@_row(3, "every gfn of a leaf lies in a live slot", ALWAYS, When.ANY, "tables slots")
def leaves_in_slots(s: State) -> Wrong | None:
    leaves = s.mapped
    return _first(s.owners < 0, "a leaf lies in no slot", leaves.gfn, leaves.pfn, level=leaves.level)


@_row(3, "no leaf lies in a slot that is on its way out", ALWAYS, When.QUIET, "tables slots")
def leaves_in_valid_slots(s: State) -> Wrong | None:
    invalid = np.array([slot.invalid for slot in s.slots] + [False])
    leaves = s.mapped
    return _first(invalid[s.owners], "a leaf lies in an INVALID slot", leaves.gfn, leaves.pfn)


# ---- 4 to 8: what leaves map ----------------------------------------------------------------------------------


@_row(
    4, "mirror leaves are private by attribute, direct leaves beside a mirror are shared",
    MIRROR, When.ANY, "tables attributes",
)  # fmt: skip
def roots_follow_attributes(s: State) -> Wrong | None:
    if not s.caps.private_by_attribute:
        return None
    return _first(~s.is_private(s.mirror.gfn), "a shared gfn in the mirror", s.mirror.gfn, s.mirror.pfn) or _first(
        s.is_private(s.direct.gfn), "a private gfn in the direct root", s.direct.gfn, s.direct.pfn
    )


def _of_open_files(s: State) -> Leaves:
    """The leaves, without those of slots whose file is being released: a slot loses its file before its leaves."""
    closed = np.array([slot.has_gmem and slot.gmem is None for slot in s.slots] + [False])
    leaves = s.mapped
    return leaves.where(~closed[s.owners]) if np.count_nonzero(closed) else leaves


@_row(
    5, "a leaf's frame is the file's where private or gmem-only, the VMM's else",
    UNMIRRORED, When.ANY, "tables slots attributes backing use",
)  # fmt: skip
def private_from_gmem(s: State) -> Wrong | None:
    leaves = _of_open_files(s)
    gmem_only = np.array([slot.gmem_only for slot in s.slots] + [False])[s.slot_of(leaves.gfn)]
    from_gmem = s.frames.use[leaves.pfn] == Use.GMEM.value
    wrong = (leaves.private | gmem_only) & ~from_gmem
    theirs = s.backing(leaves.gfn, np.ones(len(leaves), bool)) == leaves.pfn
    wrong |= leaves.private & ~theirs
    wrong |= ~leaves.private & ~gmem_only & theirs
    return _first(
        wrong, "a leaf of the wrong backing", leaves.gfn, leaves.pfn, private=leaves.private, from_gmem=from_gmem
    )


@_row(6, "a gfn is never in both roots", MIRROR, When.ANY, "tables")
def one_root_each(s: State) -> Wrong | None:
    both = np.intersect1d(s.mirror.gfn, s.direct.gfn)
    return Wrong("a gfn is in both roots", gfn=int(both[0])) if len(both) else None


@_row(7, "a private frame is mapped by at most one gfn", OWNED, When.ANY, "tables attributes")
def private_frames_once(s: State) -> Wrong | None:
    leaves = s.mapped.where(s.mapped.private) if s.caps.private_by_attribute else s.mapped
    at = np.argsort(leaves.pfn, kind="stable")
    pfn, gfn = leaves.pfn[at], leaves.gfn[at]
    return _first(pfn[1:] == pfn[:-1], "a private frame is mapped twice", gfn[1:], pfn[1:], other=gfn[:-1])


@_row(
    8, "a huge leaf has an aligned frame, lies in one slot, and is of one attribute",
    ALWAYS, When.ANY, "tables slots attributes",
)  # fmt: skip
def huge_leaves_fit(s: State) -> Wrong | None:
    huge = s.mapped.where(s.mapped.level > PG_LEVEL_4K)
    if not len(huge):
        return None
    head, owner = _heads(huge), s.slot_of(huge.gfn)
    wrong = (huge.gfn ^ huge.pfn) & (_size(huge) - 1) != 0
    wrong |= (owner != s.slot_of(head)) | (s.slot_of(head) < 0)
    if s.caps.private_by_attribute:
        wrong |= s.is_private(huge.gfn) != s.is_private(head)
    return _first(wrong, "a huge leaf does not fit", huge.gfn, huge.pfn, level=huge.level)


@_row(
    8, "no leaf is larger than its slot, its attributes and the VM type allow",
    ALWAYS, When.QUIET, "tables slots attributes",
)  # fmt: skip
def huge_leaves_allowed(s: State) -> Wrong | None:
    huge = s.mapped.where(s.mapped.level > PG_LEVEL_4K)
    if not len(huge):
        return None
    merged = s.caps.max_promoted_level if s.caps.promotes else PG_LEVEL_4K
    limit = np.where(huge.private, max(s.caps.max_private_level, merged), s.caps.max_shared_level)
    if not s.caps.private_by_attribute:
        limit[:] = max(s.caps.max_private_level, s.caps.max_shared_level)
    owner = s.slot_of(huge.gfn)
    for i, slot in enumerate(s.slots):
        for level in (PG_LEVEL_2M, PG_LEVEL_1G):
            mine = (owner == i) & (huge.level == level)
            block = (huge.gfn[mine] >> order_of(level)) - (slot.base_gfn >> order_of(level))
            limit[mine] = np.where(slot.lpage[level][block] != 0, PG_LEVEL_4K, limit[mine])
            if slot.logs_dirty and not s.caps.mediated_root:
                limit[mine] = PG_LEVEL_4K
    return _first(huge.level > limit, "a leaf is too large", huge.gfn, huge.pfn, level=huge.level, limit=limit)


@_row(8, "no leaf is larger than what backs it, and than the vendor says of its frames", ALWAYS, When.QUIET)
def huge_leaves_backed(s: State) -> Wrong | None:
    leaves = _of_open_files(s)
    huge = leaves.where(leaves.level > PG_LEVEL_4K)
    if not len(huge):
        return None
    gmem_only = np.array([slot.gmem_only for slot in s.slots] + [False])[s.slot_of(huge.gfn)]
    uses_gmem = gmem_only | (huge.private & s.caps.private_by_attribute)
    small = ~s.backed_large(huge.gfn, huge.private)
    if not s.caps.honours_notifiers:
        small &= uses_gmem  # what the VMM gives up stays mapped as it was
    if wrong := _first(small, "a huge leaf has small pages behind it", huge.gfn, huge.pfn, level=huge.level):
        return wrong
    if not s.host.ops.has("max_mapping_level"):
        return None
    asked = huge.where(uses_gmem & (huge.gfn == _heads(huge)))
    for gfn, pfn, level, private in zip(asked.gfn, asked.pfn, asked.level, asked.private, strict=True):
        pages = {"gfns": slice(gfn, gfn + 1, 1), "pfns": slice(pfn, pfn + 1, 1)}
        limit = peek(s.host, "max_mapping_level", vm=s.vm, **pages, private=bool(private))
        if limit and limit < level:
            states: dict[str, object] = {"level": int(level), "limit": limit}
            return Wrong("a leaf is larger than max_mapping_level", gfn=int(gfn), pfn=int(pfn), states=states)
    return None


def _size(leaves: Leaves) -> IntArray:
    size: IntArray = np.left_shift(1, 9 * (leaves.level.astype(np.int64) - 1))
    return size


def _heads(leaves: Leaves) -> IntArray:
    head: IntArray = leaves.gfn & -_size(leaves)
    return head


# ---- 9 to 13: large-page info, external tables ----------------------------------------------------------------


@_row(
    9, "MIXED says that a block's attributes differ; the counters beside it are not negative",
    PRIVATE, When.QUIET, "slots attributes",
)  # fmt: skip
def mixed_is_true(s: State) -> Wrong | None:
    for slot in s.slots:
        for level, info in slot.lpage.items():
            order = order_of(level)
            negative = info & np.uint32(1 << 30) != 0
            if np.count_nonzero(negative):
                return Wrong("a counter of lpage_info is negative", gfn=slot.base_gfn, states={"level": level})
            low, high = -(-slot.base_gfn >> order), slot.end_gfn >> order
            if low >= high:
                continue
            rows = s.is_private(np.arange(low << order, high << order)).reshape(-1, 1 << order)
            differ = (rows != rows[:, :1]).any(axis=1)
            mixed = info[low - (slot.base_gfn >> order) :][: high - low] & MIXED != 0
            if wrong := _first(
                differ != mixed, "MIXED is not what the attributes are", np.arange(low, high) << order, mixed=mixed,
                differ=differ, level=np.full(high - low, level),
            ):
                return wrong
    return None


@_row(
    10, "the core's root and the trusted table are alike, entry for entry",
    EXTERNAL, When.QUIET, "tables trusted use",
)  # fmt: skip
def mirror_equals_external(s: State) -> Wrong | None:
    root = s.external
    assert root is not None
    if not s.host.ops.has("read_private_spte"):
        return Wrong("the backend does not implement read_private_spte, so nobody can tell")
    for level in levels_of(root):
        kinds, words = s.kinds[root, level], root.entries[level]
        state, frame = trusted_entries(s.vm, root, level)
        n = len(state)
        gfns = np.arange(n) << order_of(level)
        kinds = np.where(kinds == IS_TABLE, np.uint8(ABSENT), kinds) if root.flat else kinds
        state = np.where(state == IS_TABLE, np.uint8(ABSENT), state) if root.flat else state
        wrong = state != kinds[:n]
        wrong |= (kinds[:n] != ABSENT) & (frame != words[:n] >> np.uint32(5))
        wrong &= (state != DESTROYED) | (kinds[:n] == ABSENT)
        if s.vm.dead:  # of a table that could not be unblocked, perhaps
            wrong &= (state != IS_BLOCKED) | (kinds[:n] != IS_TABLE)
        lost = s.frames.use[frame] == Use.LEAKED.value  # it was not given back, and is listed
        wrong &= (kinds[:n] != ABSENT) | ~lost
        if found := _first(
            wrong, "the trusted table differs from the core's root", gfns, words >> np.uint32(5), kind=kinds,
            external=state, external_frame=frame, level=np.full(n, level),
        ):
            return found
    return None


@_row(11, "no entry is frozen", EXTERNAL, When.QUIET, "tables")
def nothing_frozen(s: State) -> Wrong | None:
    for root in s.roots:
        for level in range(PG_LEVEL_4K, TOP + 1):
            frozen = root.entries[level] == FROZEN
            if np.count_nonzero(frozen):
                at = int(np.argmax(frozen))
                return Wrong("an entry is frozen", gfn=at << order_of(level), states={"level": level})
    return None


@_row(12, "every entry stands in a table, and the counts of leaves and tables are true", ALWAYS, When.QUIET, "tables")
def entries_in_tables(s: State) -> Wrong | None:
    for root in s.roots:
        for level in range(PG_LEVEL_4K, TOP + 1):
            words, kinds = root.entries[level], s.kinds[root, level]
            used = np.flatnonzero(words)
            if level < TOP:
                orphan = (root.entries[level + 1][used >> 9] & np.uint32(TABLE)) == 0
                if wrong := _first(orphan, "an entry stands in no table", used << order_of(level), kind=kinds[used]):
                    return wrong
            for name, kind, counted in (("leaves", IS_LEAF, root.leaves), ("tables", IS_TABLE, root.tables)):
                n = int(np.count_nonzero((kinds == kind) | ((kinds == IS_BLOCKED) & (kind == IS_TABLE))))
                if n != counted[level]:
                    states: dict[str, object] = {"counted": counted[level], "are": n}
                    return Wrong(f"{name} of level {level} are counted wrong", states=states)
    return None


@_row(12, "the vendor sees parents before children, and children gone before their table", EXTERNAL, When.EVENT)
def order_of_tables(trace: Trace, event: Event) -> Wrong | None:
    if event.kind != "hook" or event.phase != "begin" or event.name not in ENTRY_HOOKS:
        return None
    vm, shadow = trace.vm(event), trace.shadow(event)
    level, index = entries_of(event)
    if event.name in ("link_private_spt", "set_private_spte"):
        if level == TOP or vm is None or not vm.tdp.root_for(True).mirror:
            return None
        parents = shadow.level(level + 1, index >> 9)[index >> 9]
        return _first(parents != IS_TABLE, f"{event.name} below no table", index << order_of(level), parent=parents)
    if event.name == "free_private_spt":
        for at in index.tolist():
            if np.count_nonzero(shadow.children(level, at)):
                return Wrong("a table is freed that has entries", gfn=at << order_of(level), states={"level": level})
    return None


@_row(13, "no set on present, no remove on absent", EXTERNAL, When.EVENT)
def entries_change_once(trace: Trace, event: Event) -> Wrong | None:
    if event.kind != "hook" or event.phase != "begin" or event.name not in ENTRY_HOOKS:
        return None
    level, index = entries_of(event)
    kinds = trace.shadow(event).level(level, index)[index]
    wrong = kinds != MUST_BE[event.name]
    if found := _first(wrong, f"{event.name} on an entry of the wrong kind", index << order_of(level), kind=kinds):
        return found
    if event.name == "promote_private_spt":
        below = trace.shadow(event).children(level, int(index[0]))
        return _first(below != IS_LEAF, "a table is merged that is not full", kind=below)
    return None


@_row(13, "a present leaf never changes its frame", ALWAYS, When.STEP)
def frames_stay(step: Step) -> Wrong | None:
    before, after = step.before.leaves, step.after.leaves
    if before is after:
        return None
    keys, i, j = np.intersect1d(_keys(before), _keys(after), assume_unique=True, return_indices=True)
    moved = before.pfn[i] != after.pfn[j]
    if not np.count_nonzero(moved) or _all_zapped(step):
        return None
    moved &= ~np.isin(keys >> 1, step.gfns("zap"))
    return _first(moved, "a leaf changed its frame and was not zapped", keys >> 1, after.pfn[j], was=before.pfn[i])


def _keys(leaves: Leaves) -> IntArray:
    """Leaves as numbers: gfn and kind."""
    keys: IntArray = leaves.gfn * 2 + leaves.private
    return keys


def _all_zapped(step: Step) -> bool:
    return any(e.kind == "zap" and e.name == "zap_root" for e in step.events)


# ---- 14, 15: invalidation and TLBs ----------------------------------------------------------------------------


@_row(14, "no invalidation is in progress, of a shard neither, and none by hva is active", ALWAYS, When.QUIET)
def no_invalidation(s: State) -> Wrong | None:
    in_progress, active = max(frame.in_progress for frame in s.vm.frame.parts), s.vm.active_count
    if not in_progress and not active:
        return None
    return Wrong("an invalidation was not ended", states={"in_progress": in_progress, "active_count": active})


@_row(14, "seq moves once for every invalidation that ended; the range of an open one is set", ALWAYS, When.ANY)
def frame_is_sound(s: State) -> Wrong | None:
    for frame in s.vm.frame.parts:
        if frame.in_progress < 0 or frame.seq != frame.opened - frame.in_progress:
            return Wrong("seq does not count the ends of invalidations", states=vars(frame))
        if frame.in_progress and frame.start >= frame.end:
            return Wrong("an invalidation has no range", states=vars(frame))
    if s.vm.active_count < 0:
        return Wrong("more invalidations by hva ended than began", states={"active_count": s.vm.active_count})
    return None


@_row(15, "TLBs translate as the tables do", ALWAYS, When.QUIET, "tables tlbs")
def tlbs_are_fresh(s: State) -> Wrong | None:
    for vcpu in s.vm.vcpus:
        if not vcpu.tlb.entries:
            continue
        columns = np.array([(gfn, kind, pfn, write) for (gfn, kind), (pfn, write) in vcpu.tlb.entries.items()])
        gfn, pfn = columns[:, 0], columns[:, 2]
        for private in (False, True):
            root = s.mirror if private and s.caps.has_mirror else s.direct
            at = np.minimum(np.searchsorted(root.gfn, gfn), max(0, len(root) - 1))
            found = (root.gfn[at] == gfn) & (root.pfn[at] == pfn) if len(root) else np.zeros(len(gfn), bool)
            found &= (root.writable[at] if len(root) else found) | (columns[:, 3] == 0)
            stale = (columns[:, 1] == private) & ~found
            if wrong := _first(stale, f"vCPU {vcpu.id} still translates what was zapped", gfn, pfn):
                return wrong
    return None


# ---- 16 to 18: frames -----------------------------------------------------------------------------------------


@_row(16, "no frame is free that a leaf reaches", ALWAYS, When.ANY, "tables use pins")
def leaves_reach_memory(s: State) -> Wrong | None:
    leaves = s.reaching
    use = s.frames.use[leaves.pfn]
    alive = (use == Use.GMEM.value) | (use == Use.ANON.value)
    alive |= (use == Use.ORPHAN.value) & (s.frames.pins[leaves.pfn] > 0)
    return _first(~alive, "a leaf reaches a frame that is not a guest's", leaves.gfn, leaves.pfn, use=use)


@_row(16, "what a leaf maps is what stands behind its gfn", NOTIFIED, When.ANY, "tables slots attributes backing")
def leaves_are_current(s: State) -> Wrong | None:
    leaves = _of_open_files(s)
    backing = s.backing(leaves.gfn, leaves.private)
    return _first(backing != leaves.pfn, "a leaf maps an old frame", leaves.gfn, leaves.pfn, backing=backing)


@_row(16, "a TLB reaches no free frame", ALWAYS, When.ANY, "tlbs use")
def tlbs_reach_memory(s: State) -> Wrong | None:
    for vcpu in s.vm.vcpus:
        if vcpu.tlb.entries:
            pfn = np.array([pfn for pfn, _ in vcpu.tlb.entries.values()])
            free = s.frames.use[pfn] == Use.FREE.value
            if wrong := _first(free, f"the TLB of vCPU {vcpu.id} reaches a free frame", pfn=pfn):
                return wrong
    return None


@_row(
    16, "frames of files, mappings and tables are theirs, and nobody else's",
    ALWAYS, When.QUIET, "tables backing use",
)  # fmt: skip
def one_owner_each(s: State) -> Wrong | None:
    frames = [gmem_frames(inode)[inode.words != 0] for inode in s.inodes]
    uses = [np.full(len(some), Use.GMEM, np.uint8) for some in frames]
    for mapping in s.mappings:
        words = mapping.words[mapping.words != 0]
        frames.append((words >> np.uint32(5)).astype(np.int64))
        uses.append(np.full(len(words), Use.ANON, np.uint8))
    frames.append(s.mirror_tables)
    uses.append(np.full(len(s.mirror_tables), Use.TABLE, np.uint8))
    pfn, use = np.concatenate(frames), np.concatenate(uses)
    now = s.frames.use[pfn]
    wrong = _first(
        (now != use) & (now != Use.LEAKED.value), "a frame is not used as its owner has it", pfn=pfn, use=now
    )  # what a vendor leaked stays where it was
    pfn = np.sort(pfn)
    return wrong or _first(pfn[1:] == pfn[:-1], "a frame has two owners", pfn=pfn[1:])


@_row(17, "every frame that is free again can be written by the host", GMEM, When.QUIET)
def free_frames_are_the_hosts(s: State) -> Wrong | None:
    if not s.host.ops.has("host_access"):
        return None
    frames = s.frames
    low, high = np.arange(1, frames.top), np.arange(max(frames.bottom, frames.top), frames.nr_frames)
    used = np.concatenate([low, high])
    free = used[frames.use[used] == Use.FREE.value]
    if not len(free):
        return None
    verdict = peek(s.host, "host_access", host=s.host, pfns=contiguous(free), write=True, mode=HostMode.USER)
    if verdict in (None, HostVerdict.OK):
        return None
    bad = next(
        pfn for pfn in free.tolist()
        if peek(s.host, "host_access", host=s.host, pfns=slice(pfn, pfn + 1, 1), write=True, mode=HostMode.USER)
        != HostVerdict.OK
    )
    return Wrong("a free frame is not the host's", pfn=bad, states={"verdict": verdict.name})


@_row(17, "a frame that was made the guest's is reclaimed before it is free", GUESTS, When.EVENT)
def reclaimed_once(trace: Trace, event: Event) -> Wrong | None:
    if event.kind != "hook" or event.phase != "begin":
        return None
    return _unreclaimed(trace)


def _unreclaimed(trace: Trace) -> Wrong | None:
    use = trace.host.frames.use[: trace.host.frames.top]
    for guests, reused in ((trace.prepared, _NOT_A_FILES), (trace.held_by_tables, _FREE)):
        held = guests[: len(use)]
        if not np.count_nonzero(held):
            continue
        wrong = (held != 0) & reused.take(use)
        if np.count_nonzero(wrong):
            pfn = int(np.argmax(wrong))
            states: dict[str, object] = {"use": Use(int(use[pfn])).name}
            return Wrong("a guest's frame is free, or another's, and was not reclaimed", pfn=pfn, states=states)
    return None


_FREE = np.array([use is Use.FREE for use in Use])
_NOT_A_FILES = np.array([use not in (Use.GMEM, Use.LEAKED) for use in Use])


@_row(17, "a frame is reclaimed once: it is a file's then, or listed as leaked", GMEM, When.EVENT)
def reclaimed_from_a_file(trace: Trace, event: Event) -> Wrong | None:
    if event.kind != "hook" or event.phase != "begin" or event.name != "gmem_invalidate" or event.pfns is None:
        return None
    pfn = np.sort(array_of(event.pfns))
    use = trace.host.frames.use[pfn]
    gone = (use != Use.GMEM) & (use != Use.LEAKED)
    return _first(gone, "a frame is reclaimed that no file has", pfn=pfn, use=use) or _first(
        pfn[1:] == pfn[:-1], "a frame is reclaimed twice", pfn=pfn[1:]
    )


@_row(17, "a frame that an external table maps is taken back once for each leaf", EXTERNAL, When.EVENT)
def taken_back_once(trace: Trace, event: Event) -> Wrong | None:
    if event.kind != "hook" or event.phase != "begin" or event.name != "remove_private_spte":
        return None
    assert event.pfns is not None and event.gfns is not None
    pfn = array_of(event.pfns)
    return _first(trace.held_by_tables[pfn] == 0, "a frame is taken back that no table maps", array_of(event.gfns), pfn)


@_row(
    18, "a page is defined and prepared before it becomes a private leaf",
    GMEM, When.ANY, "tables slots attributes backing",
)  # fmt: skip
def leaves_are_defined(s: State) -> Wrong | None:
    leaves = s.mapped
    owner = s.owners
    for i, slot in enumerate(s.slots):
        if slot.gmem is None:
            continue
        mine = leaves.where((owner == i) & (leaves.private | slot.gmem_only))
        words = slot.gmem.inode.words[mine.gfn - slot.base_gfn + slot.gmem_pgoff]
        if wrong := _first(words & UPTODATE == 0, "a leaf maps a page that is not up to date", mine.gfn, mine.pfn):
            return wrong
    return None


@_row(18, "the vendor prepares a page before it becomes a private leaf", PRIVATE, When.EVENT)
def leaves_are_prepared(trace: Trace, event: Event) -> Wrong | None:
    if event.kind != "fault" or not event.info.get("private") or not trace.host.ops.has("gmem_prepare"):
        return None
    vm = trace.vm(event)
    if vm is None or event.gfns is None:
        return None
    gfn = array_of(heads(blocks(event.gfns, order_of(event.level)), order_of(event.level)))
    pfn = State(vm).backing(gfn, np.ones(len(gfn), bool))  # 0: taken away by now, or its file closed
    return _first((trace.prepared[pfn] == 0) & (pfn != 0), "a private leaf was not prepared", gfn, pfn)


@_row(18, "a page that is new holds nothing where nobody wrote", ALWAYS, When.STEP)
def new_pages_are_clear(step: Step) -> Wrong | None:
    if step.call not in GUEST_CALLS or step.call == "write":
        return None
    for store in step.after.stores:
        before = step.before.store(store.owner)
        if before is None or before.words is store.words:
            continue
        new = (before.words == 0) & (store.words != 0)
        if isinstance(store.owner, GmemInode):
            new &= store.words & UPTODATE != 0
        if np.count_nonzero(new) and (
            wrong := _first(new & (store.stamps != ZERO), "a new page holds something", pfn=store.words >> np.uint32(5))
        ):
            return wrong
    return None


# ---- 19 to 22: what calls change ------------------------------------------------------------------------------


@_row(19, "a punched page is gone, every other one is as it was", GMEM, When.STEP)
def punch_is_exact(step: Step) -> Wrong | None:
    if step.call != "punch":
        return None
    inode, start, n = step.arguments["inode"], step.arguments["start"], step.arguments["n"]
    before = step.before.store(inode)
    if before is None:
        return None
    index = np.arange(len(before.words))
    inside = (index >= start) & (index < start + n) & (step.error is None)
    words = inode.words
    wrong = np.where(inside, words != 0, (words ^ before.words) & ~np.uint32(HUGE) != 0)
    frames = before.words >> np.uint32(5)
    memory = step.vm.host.memory
    same = ~inside & (before.words & UPTODATE != 0) & ~wrong
    wrong |= same & ((memory.stamp[frames] != before.stamps) | (memory.key[frames] != before.keys))
    return _first(wrong, "a punch left or took the wrong page", pfn=frames, index=index, inside=inside)


@_row(20, "a conversion changes the attributes of its range and of nothing else", PRIVATE, When.STEP)
def conversion_is_exact(step: Step) -> Wrong | None:
    if step.call != "set_memory_attributes":
        return None
    changed = _attribute_changes(step)
    wrong = (changed < step.arguments["start"]) | (changed >= step.arguments["end"])
    return _first(wrong, "the attribute of a gfn outside the range changed", changed)


@_row(20, "what one view of a gfn holds is untouched by writes through the other", APART, When.STEP)
def views_are_apart(step: Step) -> Wrong | None:
    if step.call != "write":
        return None
    written, private = step.arguments["gfns"], step.arguments["private"]
    memory = step.vm.host.memory
    for store in step.before.stores:
        frames = store.words >> np.uint32(5)
        changed = (store.words == store.owner.words) & (store.words != 0) & (
            (memory.stamp[frames] != store.stamps) | (memory.key[frames] != store.keys)
        )
        if isinstance(store.owner, GmemInode):
            changed &= store.words & UPTODATE != 0
        changed[_indexes(step.vm, store.owner, array_of(written), private)] = False
        if not np.count_nonzero(changed):
            continue
        # A page that was not mapped may be made anew by mapping it, in the view that is written.
        if isinstance(store.owner, GmemInode) == private:
            changed &= np.isin(frames, step.before.leaves.pfn)
        if wrong := _first(changed, "a page changed that was not written", pfn=frames, index=np.arange(len(frames))):
            return wrong
    return None


def _indexes(vm: Vm, owner: object, gfns: IntArray, private: bool) -> IntArray:
    """Pages of an inode or a mapping that accesses of one kind to these gfns reach."""
    found = [np.zeros(0, np.int64)]
    for slot in vm.slots:
        mine = gfns[(gfns >= slot.base_gfn) & (gfns < slot.end_gfn)]
        if vm.uses_gmem(slot, private):
            if slot.gmem is not None and slot.gmem.inode is owner:
                found.append(mine - slot.base_gfn + slot.gmem_pgoff)
            continue
        hva = mine - slot.base_gfn + slot.hva_page
        for mapping, pages in vm.mm.ranges(slot.hva_page, slot.npages):
            assert isinstance(pages, slice)
            hit = hva[(hva >= pages.start) & (hva < pages.stop)] - mapping.start
            if mapping is owner:
                found.append(hit)
            elif mapping.gmem is not None and mapping.gmem.inode is owner:
                found.append(hit + mapping.pgoff)
    return np.concatenate(found)


def _attribute_changes(step: Step) -> IntArray:
    """The gfns whose attribute is not what it was."""
    before, after = step.before.attributes, step.after.attributes
    if before is after:
        return np.zeros(0, np.int64)
    n = min(len(before), len(after))
    longer = before if len(before) > n else after
    return np.concatenate([np.flatnonzero(before[:n] != after[:n]), np.flatnonzero(longer[n:]) + n])


@_row(21, "setting attributes does all or nothing, and nothing at all where nothing changes", PRIVATE, When.STEP)
def conversion_is_whole(step: Step) -> Wrong | None:
    if step.call != "set_memory_attributes":
        return None
    start, end, value = (step.arguments[name] for name in ("start", "end", "value"))
    changed = _attribute_changes(step)
    if step.error is not None:
        return Wrong("a call that failed changed attributes", gfn=int(changed[0])) if len(changed) else None
    after = np.pad(step.after.attributes, (0, max(0, end - len(step.after.attributes))))[start:end]
    if wrong := _first(after != value, "an attribute was not set", np.arange(start, end)):
        return wrong
    if not len(changed):
        hooks = step.hooks()
        if hooks or step.after.seq != step.before.seq or len(step.gfns("zap")):
            return Wrong(
                "a call that changes no attribute did something", gfn=start,
                states={"hooks": [e.name for e in hooks], "seq": step.after.seq - step.before.seq},
            )
    return None


@_row(22, "attributes change by their own call only", PRIVATE, When.STEP)
def attributes_stay(step: Step) -> Wrong | None:
    changed = _attribute_changes(step)
    if not len(changed) or step.after.attribute_calls > step.before.attribute_calls:
        return None
    return Wrong("an attribute changed without a call", gfn=int(changed[0]), states={"call": step.call})


# ---- 23 to 26: faults and exits -------------------------------------------------------------------------------


@_row(23, "a leaf comes from a fault that succeeded and goes by a zap", ALWAYS, When.STEP)
def leaves_have_causes(step: Step) -> Wrong | None:
    before, after = step.before.leaves, step.after.leaves
    if before is after:
        return None
    new = ~np.isin(_keys(after), _keys(before))
    if np.count_nonzero(new):
        mapped = [pages_of(e) for e in step.events if e.kind == "hook" and e.name == "set_private_spte"]
        causes = np.concatenate([step.gfns("fault"), step.gfns("populate"), step.gfns("zap", "collapse"), *mapped])
        new &= ~np.isin(after.gfn, causes)
        if wrong := _first(new, "a leaf appeared and no fault made it", after.gfn, after.pfn, level=after.level):
            return wrong
    gone = ~np.isin(_keys(before), _keys(after))
    if not np.count_nonzero(gone) or _all_zapped(step):
        return None
    gone &= ~np.isin(before.gfn, step.gfns("zap"))
    return _first(gone, "a leaf vanished and nothing zapped it", before.gfn, before.pfn, level=before.level)


@_row(23, "a fault, also one that fails, leaks no reference, table or pin", ALWAYS, When.STEP)
def faults_leak_nothing(step: Step) -> Wrong | None:
    if step.call not in GUEST_CALLS:
        return None
    before, after, vm = step.before, step.after, step.vm
    if before.files != after.files or before.users != after.users:
        return Wrong("a fault kept a reference", states={"users": after.users - before.users})
    if vm.caps.has_mirror and after.loose_tables != before.loose_tables:
        return Wrong("a fault lost a table page", states={"lost": after.loose_tables - before.loose_tables})
    if before.pins is after.pins:
        return None
    pfn = np.flatnonzero(before.pins != after.pins[: len(before.pins)])
    pfn = np.concatenate([pfn, np.flatnonzero(after.pins[len(before.pins) :]) + len(before.pins)])
    if vm.caps.needs_pin:
        if not vm.host.ops.has("unpin_pfn"):
            return None  # pins are kept by the memslot: a superset of the leaves, since a stale fault pins, too
        pfn = np.setdiff1d(pfn, np.concatenate([before.leaves.pfn, after.leaves.pfn]))
    return Wrong("a fault kept or dropped a pin", pfn=int(pfn[0])) if len(pfn) else None


@_row(24, "a fault on what is mapped already changes nothing and calls no hook that sets", ALWAYS, When.STEP)
def faults_repeat(step: Step) -> Wrong | None:
    if step.call != "prefault" or step.error is not None:
        return None
    start, end = step.arguments["start"], step.arguments["end"]
    before, after = step.before.leaves, step.after.leaves
    ready = before.where((before.gfn >= start) & (before.gfn < end) & before.writable)
    if len(ready) < end - start or step.hooks("vm_destroy"):
        return None
    if hooks := step.hooks("set_private_spte", "link_private_spt"):
        return Wrong(f"a spurious fault called {hooks[0].name}", gfn=start)
    same = len(before) == len(after) and np.array_equal(before.pfn, after.pfn)
    return None if same else Wrong("a spurious fault changed leaves", gfn=start)


def _exits(step: Step) -> list[Any]:
    """What left KVM_RUN in this step."""
    return [e.info["exit"] for e in step.events if e.kind == "exit" and e.vm == step.vm.id]


@_row(25, "a private access never ends as MMIO, and one of the wrong kind ends as a memory fault", PRIVATE, When.STEP)
def mismatch_is_a_memory_fault(step: Step) -> Wrong | None:
    for leave in _exits(step):
        if isinstance(leave, Mmio):
            gfn = leave.gpa // PAGE_BYTES
            if step.arguments.get("private"):
                return Wrong("a private access became MMIO", gfn=gfn)
            if gfn < len(step.before.attributes) and step.before.attributes[gfn] and not len(_attribute_changes(step)):
                return Wrong("a shared access to a private gfn became MMIO", gfn=gfn)
    return None


@_row(25, "no fault is served that is of another kind than the attribute", PRIVATE, When.STEP)
def faults_are_of_their_kind(step: Step) -> Wrong | None:
    if step.before.attribute_calls != step.after.attribute_calls:
        return None  # it may have been what the fault was then
    attributes = step.after.attributes
    for event in step.events:
        if event.kind != "fault" or event.vm != step.vm.id or "private" not in event.info:
            continue
        gfn = pages_of(event)
        now = np.zeros(len(gfn), bool)
        now[gfn < len(attributes)] = attributes[gfn[gfn < len(attributes)]] != 0
        if wrong := _first(now != event.info["private"], "a fault of the wrong kind was served", gfn, private=now):
            return wrong
    return None


@_row(26, "a memory fault names whole pages: aligned, 4096 bytes, and the kind of the access", PRIVATE, When.STEP)
def memory_faults_are_whole(step: Step) -> Wrong | None:
    for leave in _exits(step):
        if isinstance(leave, MemoryFault):
            wrong = leave.gpa % PAGE_BYTES or leave.size_bytes != PAGE_BYTES
            wrong = wrong or leave.flags & ~KVM_MEMORY_EXIT_FLAG_PRIVATE
            kind = True if step.call == "accept" else step.arguments.get("private", leave.private)
            if wrong or leave.private != kind:
                return Wrong("the record of a memory fault is wrong", gfn=leave.gfn, states={"exit": leave})
    return None


# ---- 27 to 30: files and VMs ----------------------------------------------------------------------------------


@_row(27, "a file holds no more than its size, and as much as it says", GMEM, When.ANY, "backing")
def files_hold_their_size(s: State) -> Wrong | None:
    for inode in s.inodes:
        held = int(np.count_nonzero(inode.words))
        if len(inode.words) != inode.npages or held != inode.allocated or held > inode.npages:
            return Wrong(
                "a file holds what it should not",
                states={"pages": inode.npages, "words": len(inode.words), "allocated": inode.allocated, "held": held},
            )
    return None


@_row(27, "the size of a file never changes", GMEM, When.STEP)
def files_keep_their_size(step: Step) -> Wrong | None:
    for store in step.before.stores:
        if isinstance(store.owner, GmemInode) and store.owner.npages != len(store.words):
            return Wrong("a file changed its size", states={"was": len(store.words), "is": store.owner.npages})
    return None


@_row(
    28, "a VM outlives its files, and a released file is reached by no slot and no leaf",
    GMEM, When.QUIET, "tables slots files use",
)  # fmt: skip
def files_hold_the_vm(s: State) -> Wrong | None:
    vm = s.vm
    if vm.gmem_files and (vm.destroyed or vm.users < len(vm.gmem_files)):
        return Wrong("a VM is gone before its files", states={"users": vm.users, "files": len(vm.gmem_files)})
    for file in vm.gmem_files:
        if file.refs <= 0 or file not in file.inode.files:
            return Wrong("a file that was released is still the VM's")
    closed = np.array([slot.has_gmem and slot.gmem is None for slot in s.slots] + [False])
    for slot in vm.slots:
        if slot.gmem is not None and slot.gmem not in vm.gmem_files:
            return Wrong(f"slot {slot.id} names a released file", gfn=slot.base_gfn)
    leaves = s.mapped
    reached = closed[s.owners] & (s.frames.use[leaves.pfn] == Use.GMEM.value)
    return _first(reached, "a leaf reaches a released file", leaves.gfn, leaves.pfn)


@_row(28, "the memory of a file lives as long as its inode, and no longer", GMEM, When.STEP)
def memory_lives_with_the_inode(step: Step) -> Wrong | None:
    for file in step.before.files.keys() - step.after.files.keys():
        store = step.before.store(file.inode)
        if store is None:
            continue
        frames = np.unique(store.words[store.words != 0] >> np.uint32(5))
        if np.count_nonzero(np.isin(step.after.leaves.pfn, frames) & step.after.leaves.private):
            return Wrong("a leaf reaches the memory of a released file")
        held = int(np.count_nonzero(file.inode.words))
        if bool(held) and not file.inode.files:
            return Wrong("the memory of a dead inode was not freed", states={"pages": held})
        if file.inode.files and held != len(frames):
            return Wrong("an inode lost memory though files hold it", states={"pages": held, "were": len(frames)})
    return None


@_row(29, "a dead VM is not entered, and calls no hook but those that take memory away", ALWAYS, When.EVENT)
def dead_vms_rest(trace: Trace, event: Event) -> Wrong | None:
    if event.kind != "hook" or event.phase != "begin":
        return None
    vm = trace.vm(event)
    if vm is None or not vm.dead:
        return None
    if event.name == "vcpu_enter" or (event.vm in trace.buried and event.name not in TEARDOWN):
        return Wrong(f"{event.name} is called for a dead VM", states={"because": vm.dead_because})
    return None


@_row(29, "every ioctl of a dead VM gives -EIO", ALWAYS, When.STEP)
def dead_vms_answer_eio(step: Step) -> Wrong | None:
    if not step.before.dead or step.call not in IOCTLS:
        return None
    if step.error is None or step.error.errno != errno.EIO:
        return Wrong(f"{step.call} of a dead VM does not give -EIO", states={"error": step.error})
    return None


@_row(30, "nothing is left of a VM that was destroyed", ALWAYS, When.GONE)
def nothing_is_left(s: State) -> Wrong | None:
    vm = s.vm
    counts = {
        "leaves": len(s.reaching),
        "tables": len(s.mirror_tables),
        "files": len(vm.gmem_files),
        "slots": len(list(vm.slots)),
        "users": vm.users,
        "locked pages": max(0, vm.memlock_pages - s.lost),  # a page that is leaked keeps its charge
        "vCPUs inside": sum(vcpu.in_guest for vcpu in vm.vcpus),
        "invalidations": vm.frame.in_progress + vm.active_count,
    }
    left: dict[str, object] = {name: n for name, n in counts.items() if n}
    return Wrong("a VM was destroyed and left something", states=left) if left else None


@_row(30, "the vendor was told of every entry's end", EXTERNAL, When.EVENT)
def tables_are_taken_down(trace: Trace, event: Event) -> Wrong | None:
    if event.kind != "vm" or event.name != "destroy":
        return None
    n = trace.shadow(event).left()
    return Wrong("a VM was destroyed with entries in its external table", states={"entries": n}) if n else None


# ---- 31, 32: locks and pins -----------------------------------------------------------------------------------


@_row(31, "a hook is called under the locks that its column names", ALWAYS, When.EVENT)
def locks_are_held(trace: Trace, event: Event) -> Wrong | None:
    held = trace.held
    if held is None or event.kind != "hook" or event.phase != "begin":
        return None
    vm = trace.vm(event)
    column = HOOKS[event.name].locks
    if event.name == "vcpu_exit":
        return None  # a vCPU that is kicked leaves on its own CPU
    if column.startswith("-"):
        if held.holds("mmu_lock"):
            return Wrong(f"{event.name} is called under mmu_lock", states={"held": held.locks})
        return None
    for lock in column.split(", "):
        name, _, mode = lock.partition(":")
        if name == "entry frozen":
            if wrong := _not_frozen(vm, event):
                return wrong
            continue
        if name == "folio lock" or (name == "invalidate_lock" and vm is not None and not vm.caps.private_by_attribute):
            continue  # no lock of the model; a VM without guest_memfd
        if vm is not None and vm.destroyed and name == "slots_lock":
            continue  # nobody else has the VM any more
        name = {"kvm->lock": "kvm_lock", "SRCU": "srcu"}.get(name, name)
        wanted = {"r": False, "w": True, "": None}[mode]
        if mode == "r" and vm is not None and vm.caps.mediated_root:
            wanted = True  # the record of a mediated root is written under the whole lock
        if not held.holds(name, wanted):
            return Wrong(f"{event.name} is called without {lock}", states={"held": held.locks})
    return None


def _not_frozen(vm: Vm | None, event: Event) -> Wrong | None:
    root: Root | None = vm.tdp.root_for(True) if vm is not None else None
    if root is None:
        return None
    level, index = entries_of(event)
    words = root.entries[level][index]
    wrong = words != FROZEN
    return _first(wrong, f"{event.name} on an entry that is not frozen", index << order_of(level), entry=words)


@_row(32, "every leaf is covered by a pin", PINS, When.ANY, "tables pins")
def leaves_are_pinned(s: State) -> Wrong | None:
    leaves, pins = s.mapped, s.frames.pins
    covered = pins[leaves.pfn] != 0
    if s.host.backing_level > PG_LEVEL_4K:
        covered |= pins[leaves.pfn & -pages_per_level(PG_LEVEL_2M)] != 0  # a pin of its head holds a large page
    return _first(~covered, "a leaf has no pin", leaves.gfn, leaves.pfn, level=leaves.level)


@_row(32, "only a fault pins a page, once for each level that it is mapped at", PINS, When.STEP)
def one_pin_each(step: Step) -> Wrong | None:
    before, after = step.before.leaves, step.after.leaves
    if before is after and step.before.pins is step.after.pins:
        return None
    if step.hooks("register_region", "unregister_region", "vm_move", "memory_encrypt_op"):
        return None
    _, i, j = np.intersect1d(_keys(before), _keys(after), assume_unique=True, return_indices=True)
    same = before.pfn[i] == after.pfn[j]
    gfn, pfn = before.gfn[i][same], before.pfn[i][same]
    was, now = step.before.pins[pfn].astype(int), step.after.pins[pfn].astype(int)
    # A page of a large one that was split gets a pin of its own when it is faulted in again, and loses that of the
    # large one when another frame comes in its head's place.
    mapped = np.isin(gfn, np.concatenate([step.gfns("fault"), step.gfns("populate")]))
    most = np.where(mapped, np.minimum(was + 1, PG_LEVEL_1G), was)
    wrong = (now > most) | ((was != 0) & (now == 0))
    return _first(wrong, "a mapped page was pinned again, or unpinned", gfn, pfn, was=was, now=now)


@_row(32, "pins end with their memslot", PINS, When.STEP)
def pins_end_with_their_slot(step: Step) -> Wrong | None:
    gone = [slot for slot_id, slot in step.before.slots.items() if slot_id not in step.after.slots]
    if not gone or step.vm.caps.memslots_fixed_after_run:
        return None  # there pins end with the VM
    leaves = step.before.leaves
    for base_gfn, npages, *_ in gone:
        pfn = leaves.pfn[(leaves.gfn >= base_gfn) & (leaves.gfn < base_gfn + npages)]
        was, now = step.before.pins[pfn], step.after.pins[pfn]
        if wrong := _first((now >= was) & (was != 0), "a pin outlives its slot", pfn=pfn, was=was, now=now):
            return wrong
    return None


@_row(32, "locked memory is counted, and stays within RLIMIT_MEMLOCK", PINS, When.QUIET)
def locked_within_limit(s: State) -> Wrong | None:
    limit, n = s.host.memlock_limit_bytes, s.vm.memlock_pages
    if n < 0 or (limit is not None and n * PAGE_BYTES > limit):
        return Wrong("locked memory is out of bounds", states={"pages": n, "limit": limit})
    return None


INVARIANTS.sort(key=lambda row: row.number)


def switched_on(caps: Capabilities) -> list[Invariant]:
    """The rows that apply to a VM of these capabilities."""
    return [row for row in INVARIANTS if row.needs(caps)]


@cache
def _rows_for(caps: Capabilities) -> dict[When, list[Invariant]]:
    """Those, by when they are looked at."""
    return {when: [row for row in switched_on(caps) if row.when is when] for when in When}


def check(vm: Vm, *, quiet: bool = True, view: View | None = None) -> State:
    """All invariants of a VM as it stands. quiet: no operation is under way. Returns what was looked at.

    view: one of this VM, for whoever looks often; a row that held is looked at again where what it reads has changed.
    Raises InvariantViolation.
    """
    state = State(vm) if view is None else view.look()
    rows = _rows_for(vm.caps)
    for row in [*rows[When.ANY], *rows[When.QUIET]] if quiet else rows[When.ANY]:
        if view is None or row.reads is None or not view.holds(row, row.reads):
            row.enforce(vm.host, state)
            if view is not None:
                view.held(row)
    return state


def check_gone(vm: Vm, lost: int = 0) -> None:
    """All invariants of a VM that was destroyed. lost: pinned pages that its vendor has leaked, which stay charged."""
    state = State(vm, lost)
    for row in INVARIANTS:
        if row.when is When.GONE and row.needs(vm.caps):
            row.enforce(vm.host, state)


# ---- the observer ---------------------------------------------------------------------------------------------


class Checker:
    """Observer that looks at all invariants: of the state after each UAPI call, of hooks and locks at each event.

    Make it with `Checker.on(host)` before the first VM. concurrent: operations overlap (`timed`, `explore`), so a
    call that ends does not mean that nothing is under way: only what holds at any step is looked at then, and whoever
    drives calls `check` at the end. Locks are looked at where the host is driven by `Lockdep`.
    """

    def __init__(self, host: Host, *, concurrent: bool = False) -> None:
        self.host = host
        self.concurrent = concurrent
        self.trace = Trace(host)
        self.resting = False
        """Whether states are not looked at for now: while a case is set up or taken down again."""
        self.checks = 0
        """How often all invariants of a state were looked at."""
        self._steps: dict[Vm, Step] = {}
        self._open: Step | None = None
        self._idle = host.frames.outstanding(), host.frames.pins_held - host.frames.pins_leaked()
        self._vms: dict[int, Vm] = {}
        self._event_rows: dict[int, list[Invariant]] = {}
        self._views: dict[Vm, View] = {}
        if isinstance(host.drive, Lockdep):
            self._watch_allocations(host.drive.held)

    @classmethod
    def on(cls, host: Host, *, concurrent: bool = False) -> Checker:
        """A checker that observes this host."""
        checker = cls(host, concurrent=concurrent)
        host.ops.observe(checker)
        return checker

    # ---- as an observer ---------------------------------------------------------------------------------------

    @observes
    def on_event(self, event: Event) -> None:
        """Look at an event, and keep it for the step that it is part of."""
        if event.kind == "vm" and event.name == "create":
            made = self._vms[event.vm] = next(vm for vm in self.host.vms if vm.id == event.vm)
            self._event_rows[event.vm] = _rows_for(made.caps)[When.EVENT]
        trace, vm = self.trace, self._vms.get(event.vm)
        for row in self._event_rows.get(event.vm, _EVENT_ROWS):
            if row.check(trace, event):
                row.enforce(self.host, trace, event)
        trace.note(event)
        if self._open is not None:
            self._open.events.append(event)
        for step in self._steps.values():
            step.events.append(event)
        if event.kind == "vm" and event.name == "destroy" and vm is not None:
            self._bury(vm)

    @observes
    def on_quiet(self, vm: Any) -> None:
        """A call ended: look at the VM, and at what changed since the call before."""
        if self.resting:
            return
        if self.concurrent:
            self.check(vm, quiet=False)
        elif self._open is None and not vm.destroyed:
            state = self.check(vm)
            step = self._steps.pop(vm, None) or Step(vm, self._snapshot(state))
            self._finish(step, state)
            self._steps[vm] = Step(vm, step.after)

    # ---- as a tool --------------------------------------------------------------------------------------------

    def check(self, vm: Vm, *, quiet: bool = True) -> State:
        """Look at a VM now."""
        self.checks += 1
        state = check(vm, quiet=quiet, view=self._view(vm))
        self._view(vm).keep(state)
        return state

    @contextmanager
    def step(self, vm: Vm, call: str, **arguments: Any) -> Iterator[Step]:
        """Look at a call from both sides: all invariants that compare before with after, and the state after it.

        `call` and `arguments` tell the invariants what the call was about: "write", "read", "accept" (gfns, private),
        "convert", "prefault" (start, end), "set_memory_attributes" (start, end, value), "punch" (inode, start, n); any
        other name is only shown. A UapiError ends the step and is kept in `step.error`.
        """
        assert self._open is None, "steps do not nest"
        self._steps.pop(vm, None)
        step = self._open = Step(vm, self._snapshot(self._view(vm).look()), call, arguments)
        try:
            yield step
        except UapiError as error:
            step.error = error
        finally:
            self._open = None
        if vm.destroyed:
            return
        self._finish(step, self.check(vm))

    def check_idle(self) -> None:
        """All VMs and processes are gone: the host is as it was when this checker was made, but for leaks (30)."""
        self._enforce_idle(self.host.frames.outstanding())

    # ---- inside -----------------------------------------------------------------------------------------------

    def _view(self, vm: Vm) -> View:
        view = self._views.get(vm)
        if view is None:
            view = self._views[vm] = View(vm)
        return view

    def _snapshot(self, state: State) -> Snapshot:
        snapshot = Snapshot.of(state)
        self._view(state.vm).keep(state)
        return snapshot

    def _finish(self, step: Step, state: State) -> None:
        step.after = self._snapshot(state)
        for row in _rows_for(step.vm.caps)[When.STEP]:
            row.enforce(self.host, step)
        self._after_reclaim()
        self.trace.running.clear()
        if step.vm.dead:
            self.trace.buried.add(step.vm.id)

    def _after_reclaim(self) -> None:
        if wrong := _unreclaimed(self.trace):
            raise InvariantViolation(wrong.what, number=17, pfn=wrong.pfn, events=self.host.last_events())

    def _bury(self, vm: Vm) -> None:
        self._steps.pop(vm, None)
        self._views.pop(vm, None)
        check_gone(vm, self.trace.lost.pop(vm.id, 0))
        if not self.host.vms:
            private = (Use.TABLE, Use.META, Use.ORPHAN)  # the memory of an inode may outlive the last VM
            self._enforce_idle({u: n for u, n in self.host.frames.outstanding().items() if u in private})

    def _enforce_idle(self, now: dict[Use, int]) -> None:
        before, pins = self._idle
        left: dict[str, object] = {u.name: n - before.get(u, 0) for u, n in now.items() if n != before.get(u, 0)}
        frames = self.host.frames
        if frames.pins_held - frames.pins_leaked() != pins:  # a page that is leaked keeps its pins
            left["pins"] = frames.pins_held - frames.pins_leaked() - pins
        if left:
            raise InvariantViolation(
                "all VMs are gone and something is left", number=30, states=left, events=self.host.last_events()
            )

    def _watch_allocations(self, held: Held) -> None:
        # In a hook about many pages, what the kernel tops up between two of them is taken under the lock.
        alloc = self.host.frames.alloc

        def watched(n: int, use: int, align_order: int = 0) -> Any:
            if held.holds("mmu_lock") and max(self.trace.running, default=1) <= 1:
                raise InvariantViolation(
                    "memory is allocated under mmu_lock", number=31, states={"use": Use(use).name, "n": n},
                    events=self.host.last_events(),
                )
            return alloc(n, use, align_order)

        setattr(self.host.frames, "alloc", watched)  # noqa: B010


_EVENT_ROWS = [row for row in INVARIANTS if row.when is When.EVENT]

__all__ = [
    "INVARIANTS", "Checker", "Invariant", "Needs", "State", "Step", "Trace", "When", "Wrong", "check", "check_gone",
    "switched_on",
]  # fmt: skip
