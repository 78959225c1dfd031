"""The common fault path (kernel: mmu.c:kvm_mmu_page_fault, kvm_tdp_mmu_page_fault; tdp_mmu.c:kvm_tdp_mmu_map).

`resolve` takes a batch of missing gfns through the steps of the path in the kernel's order and returns how far it
came: pages below `done` are mapped, the page at `done` ended as `ret` says. The caller goes on from there.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.effects import FAULT_PFN, FAULT_SNAPSHOT, Steps
from cvmcore.errors import InvariantViolation, UapiError
from cvmcore.mem.attributes import PRIVATE
from cvmcore.mem.merge import absent_in
from cvmcore.mem.mmulock import Seen
from cvmcore.mem.slots import Memslot
from cvmcore.mem.tdp import DIRTY, FRAME_SHIFT, FROZEN, PRESENT, TABLE, WRITABLE, Mapped, Root, Stop
from cvmcore.pages import (
    Sel,
    all_zero,
    array_of,
    below,
    blocks,
    contiguous,
    count,
    first,
    heads,
    last,
    part,
    shift,
    take,
    where,
)
from cvmcore.types import (
    KVM_MEMORY_EXIT_FLAG_PRIVATE,
    PAGE_SHIFT,
    PG_LEVEL_1G,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    Batch,
    ExitReason,
    Fatal,
    MemoryFault,
    Mmio,
    RetPf,
    order_of,
    pages_per_level,
)

if TYPE_CHECKING:
    from cvmcore.vcpu import Vcpu
    from cvmcore.vm import Vm


MAPPED = RetPf.FIXED, RetPf.SPURIOUS
"""The page is mapped now, or was already."""


@attrs.frozen(eq=False)
class Fault:
    """How a batch of faults ended: `done` pages are mapped, then `ret`, an exit, or a positive errno."""

    done: int
    ret: RetPf
    errno: int = 0
    exit: ExitReason | None = None
    level: int = PG_LEVEL_4K
    faults: int = 0
    """Faults that the guest took for the `done` pages: the first page of a large one brings in its neighbours."""
    why: str = ""
    neighbours: bool = False
    """More than the `done` pages may be mapped now: the others have to be walked again before they fault."""


_NOTHING = Fault(0, RetPf.SPURIOUS)


def memory_fault(gfn: int, private: bool, error: int = errno.EFAULT) -> MemoryFault:
    """kvm_mmu_prepare_memory_fault_exit."""
    return MemoryFault(gfn << PAGE_SHIFT, KVM_MEMORY_EXIT_FLAG_PRIVATE if private else 0, errno=error)


def resolve(
    vm: Vm, vcpu: Vcpu, gfns: Sel, write: bool, private: bool, *, prefetch: bool = False, max_level: int = PG_LEVEL_1G
) -> Steps[Fault]:
    """Resolve faults on sorted unique 4K gfns, all of one access kind. Never raises for what a guest can cause."""
    steps = _resolve(vm, vcpu, gfns, write, private, prefetch, max_level)
    ops = vm.host.ops
    if not ops.detailed:
        return steps
    info = {"write": write, "private": private}
    return ops.told("resolve", steps, vm=vm.id, gfns=gfns, n=count(gfns), info=info)


def _resolve(
    vm: Vm, vcpu: Vcpu, gfns: Sel, write: bool, private: bool, prefetch: bool, max_level: int
) -> Steps[Fault]:
    access = Access(vm, vcpu, write, private, prefetch)
    done = faults = 0
    ret = RetPf.SPURIOUS
    result = _NOTHING
    yield vm.srcu.read
    for start, stop, slot in vm.slots.split(gfns):
        while start < stop and ret in MAPPED:
            result = yield from _Stretch(access, slot, part(gfns, start, stop), max_level).resolve()
            start += result.done
            done += result.done
            faults += result.faults
            if result.ret is not RetPf.SPURIOUS:
                ret = result.ret
            if result.neighbours:
                break
        else:
            continue
        break
    vcpu.tables.give_back()
    yield vm.srcu.release
    return result if result.done == done else attrs.evolve(result, done=done, ret=ret, faults=faults)


def fill(access: Access, slot: Memslot, gfn: int) -> Steps[None]:
    """The fault on gfn could have been served by a large page, or has filled the table: map what the table lacks, then
    merge it (series of 2023: tdp_mmu_merge_private_spt). Where something cannot be mapped, or the merge is refused, the
    pages stay small."""
    vm = access.vm
    root = vm.tdp.root_for(access.private)
    while count(missing := absent_in(root, gfn)):
        more = yield from _Stretch(access, slot, missing, PG_LEVEL_4K, counted=False).resolve()
        if more.ret not in MAPPED:
            return
    yield from vm.merge.locked_merge(root, slot, PG_LEVEL_2M, gfn >> order_of(PG_LEVEL_2M))


@attrs.frozen(eq=False)
class Access:
    """What faulted (kernel: the constant half of struct kvm_page_fault)."""

    vm: Vm
    vcpu: Vcpu
    write: bool
    private: bool
    prefetch: bool


class _Stretch:
    """Faulting gfns within one slot on their way through the steps of the path, in the kernel's order.

    A step may end the fault at once (it returns a Fault), or cut the stretch short behind the pages that may go on;
    `behind` then says how the first page that was cut off ends. Pages are mapped at one level: what needs another is
    cut off, too, and comes next.
    """

    def __init__(
        self, access: Access, slot: Memslot | None, gfns: Sel, max_level: int, *, counted: bool = True
    ) -> None:
        self.access = access
        self.counted = counted
        """Whether the guest faulted on the pages; else they come along with another fault."""
        self.vm = access.vm
        self.slot = slot
        self.gfns = gfns
        self.n = self.asked_for = count(gfns)
        self.uses_gmem = slot is not None and access.vm.uses_gmem(slot, access.private)
        self.is_private = access.private and access.vm.caps.private_by_attribute
        """What KVM calls a private fault: without the attribute it cannot tell one from the others."""
        self.max_level = max_level
        self.root = access.vm.tdp.root_for(access.private)
        self.behind: Fault | None = None
        self.seq = 0
        self.level = PG_LEVEL_4K
        self.heads: Sel = gfns
        """First gfn of each page of `level` that the gfns lie in."""
        self.pfns: Sel = gfns
        self.looked_up = 0
        self.mm_seq = 0
        self.topped_up = 0
        """Pages that `topup` was counted for."""
        self.given_up = False
        """Whether other stretches have taken the place of this one."""
        self.neighbours = False
        self.fills = False
        """The page is to become part of a large one, with the table that is there."""

    def resolve(self) -> Steps[Fault]:
        """All steps, up to the one that ends the fault. May stop early with pages mapped and more to do (`Fault.ret` in
        MAPPED)."""
        if self.root.blocked:
            yield from self._open_blocked()
        fault = (
            (yield from self._topup())
            or self._admit()
            or (yield from self._get_pfns())
            or (yield from self._prepare())
            or (yield from self._limit_level())
            or (yield from self._pin())
            or (yield from self._map())
        )
        self._recount(fault)
        if self.fills and fault.ret in MAPPED:
            assert self.slot is not None
            yield from fill(self.access, self.slot, first(self.gfns))
        return attrs.evolve(fault, neighbours=True) if self.neighbours else fault

    def _open_blocked(self) -> Steps[None]:
        """The first page lies below a blocked table: merge that, or unblock it. This one fault does so for all pages
        below, so that the others are walked again."""
        found = self.root.first_blocked(self.gfns)
        if found is None:
            return
        position, level, at = found
        if position or self.slot is None:
            self._cut(max(position, 1), None)
            return
        yield from self.vm.merge.locked_merge(self.root, self.slot, level, at)
        self._cut(1, None)
        self.neighbours = True

    def _cut(self, n: int, behind: Fault | None) -> None:
        self.gfns, self.n, self.behind = part(self.gfns, 0, n), n, behind

    def _cut_heads(self, n: int, behind: Fault | None) -> None:
        self.heads, self.pfns, self.behind = part(self.heads, 0, n), part(self.pfns, 0, n), behind

    def _again(self, gfns: Sel, max_level: int) -> Steps[Fault]:
        """Start over with other pages or another ceiling; what was topped up goes back."""
        self.access.vcpu.tables.give_back()
        self.fills = False
        self.given_up = True
        return (yield from _Stretch(self.access, self.slot, gfns, max_level, counted=self.counted).resolve())

    def _half(self) -> Steps[Fault]:
        """Some page needs something else than the others: halve the stretch until that page stands alone, as it would
        one by one."""
        return (yield from self._again(part(self.gfns, 0, max(1, self.n // 2)), self.max_level))

    # ---- the steps (kvm-core numbering of the path in docs/design.md) -------------------------------------------

    def _topup(self) -> Steps[Fault | None]:
        """Fill the caches that are used under mmu_lock (step 4), then note the sequence (5)."""
        vm, n = self.vm, self.n
        try:
            if self.root.mirror and self.slot is not None:
                self.access.vcpu.tables.topup_walk(self.root, self.gfns)
        except UapiError as error:
            return (yield from self._half()) if self.asked_for > 1 else Fault(0, RetPf.INVALID, error.errno)
        stopped = yield from vm.host.ops.call("topup", n, vm=vm, vcpu=self.access.vcpu, nr_pages=n)
        self.topped_up = n if stopped is None else stopped.done + 1
        if stopped is not None:
            fatal = stopped.reason.errno if isinstance(stopped.reason, Fatal) else errno.ENOMEM
            ended = Fault(0, RetPf.INVALID, fatal)
            if stopped.done == 0:
                return ended
            self._cut(stopped.done, ended)
        self.seen = vm.frame.snapshot(self.gfns)
        yield FAULT_SNAPSHOT
        return None

    def _recount(self, fault: Fault) -> None:
        """The kernel tops up once a fault, and only now is known how many faults it takes: one for each large page."""
        hook = self.vm.host.ops.hooks.get("topup")
        if hook is not None and self.topped_up:
            hook.pages -= self.topped_up
            if not self.given_up:
                hook.pages += fault.faults + (fault.ret not in MAPPED)

    def _admit(self) -> Fault | None:
        """Access kind against attribute (6), no slot (7), INVALID slot (8), the unlocked check (9)."""
        vm, access, slot = self.vm, self.access, self.slot
        if vm.caps.private_by_attribute:
            matches = _matching(vm, self.gfns, access.private)
            if matches < self.n:
                gfn = first(part(self.gfns, matches, matches + 1))
                ended = Fault(0, RetPf.INVALID, errno.EFAULT, memory_fault(gfn, access.private))
                if matches == 0:
                    return ended
                self._cut(matches, ended)
        gfn = first(self.gfns)
        if slot is None:
            if self.is_private:
                return Fault(0, RetPf.INVALID, errno.EFAULT, memory_fault(gfn, True))
            if access.prefetch:
                return Fault(0, RetPf.INVALID, errno.ENOENT)
            return Fault(0, RetPf.EMULATE, exit=Mmio(gfn << PAGE_SHIFT, access.write))
        if slot.invalid:
            return Fault(0, RetPf.INVALID, errno.EAGAIN) if access.prefetch else Fault(0, RetPf.RETRY)
        if vm.frame.moved(self.seen, self.gfns) or vm.frame.blocks(self.gfns):
            return Fault(0, RetPf.RETRY)
        if access.write and slot.read_only:
            return Fault(0, RetPf.EMULATE, exit=Mmio(gfn << PAGE_SHIFT, True))
        return None

    def _get_pfns(self) -> Steps[Fault | None]:
        """The level that the core and the backing allow, and the frames (10: kvm_mmu_faultin_pfn)."""
        vm, slot = self.vm, self.slot
        assert slot is not None
        self.level, n = _allowed_level(vm, slot, self.root, self.gfns, self.n, self.access.private, self.max_level)
        if n < 0:
            n, self.fills, self.neighbours = 1, True, True
        elif vm.merge.in_faults and self.root.mirror and self.level == PG_LEVEL_4K:
            n = self._until_full(n)
        if n < self.n:
            self._cut(n, None)
        self.mm_seq = vm.mm.seq
        order = order_of(self.level)
        self.heads = heads(blocks(self.gfns, order), order)
        try:
            self.pfns = _frames(vm, slot, self.heads, self.access.private, self.level)
        except UapiError as error:
            if self.asked_for > 1:
                return (yield from self._half())
            if not self.uses_gmem:
                vm.host.meter.charge("gup_4k")
                return Fault(0, RetPf.INVALID, error.errno)
            exit_ = memory_fault(first(self.gfns), self.is_private, error.errno)
            return Fault(0, RetPf.INVALID, error.errno, exit_)
        self.looked_up = count(self.pfns)
        if self.looked_up < count(self.heads):
            # The host had no large page any more: what it had is mapped large, the next block small.
            n = below(self.gfns, last(part(self.heads, 0, max(self.looked_up, 1))) + pages_per_level(self.level))
            self._cut(n, None)
            if self.looked_up == 0:
                return (yield from self._again(self.gfns, PG_LEVEL_4K))
            self.heads = part(self.heads, 0, self.looked_up)
        return None

    def _until_full(self, n: int) -> int:
        """How many of n small pages to map before a table is full, all in one block; the page that fills it comes
        alone, when the guest has used those before it, and is followed by a merge."""
        n = min(n, below(self.gfns, (first(self.gfns) | pages_per_level(PG_LEVEL_2M) - 1) + 1))
        absent, mine = absent_in(self.root, first(self.gfns)), array_of(part(self.gfns, 0, n))
        if not self.counted or not 0 < count(absent) <= n or not np.isin(array_of(absent), mine).all():
            return n
        before = int(np.searchsorted(mine, last(absent)))
        self.neighbours = True
        self.fills = before == 0
        return max(1, before)

    def _prepare(self) -> Steps[Fault | None]:
        """Every guest_memfd lookup for a private access prepares the frames (kvm_gmem_prepare_folio)."""
        vm, slot = self.vm, self.slot
        if self.access.private and self.uses_gmem and vm.host.ops.has("gmem_prepare"):
            assert slot is not None and slot.gmem is not None
            order, n = slot.gmem.inode.folio_order(shift(self.heads, slot.to_index(self.heads)))
            if n < count(self.heads):
                self._cut(n, None)
                self._cut_heads(n, None)
            stopped = yield from vm.host.ops.call(
                "gmem_prepare", n, vm=vm, slot=slot, gfns=self.heads, pfns=self.pfns, max_order=order
            )
            if stopped is not None:
                gfn = first(part(self.heads, stopped.done, stopped.done + 1))
                number = stopped.reason.errno if isinstance(stopped.reason, Fatal) else errno.EAGAIN
                ended = Fault(0, RetPf.INVALID, number, memory_fault(gfn, self.is_private, number))
                if stopped.done == 0:
                    return ended
                self._cut_heads(stopped.done, ended)
        yield FAULT_PFN
        return None

    def _limit_level(self) -> Steps[Fault | None]:
        """The frames may be stale by now (11); the vendor may want smaller pages (gmem_max_mapping_level)."""
        vm = self.vm
        if vm.frame.moved(self.seen, self.gfns) or vm.frame.blocks(self.gfns) or not self._still_there():
            if not self.uses_gmem:
                vm.host.meter.charge("gup_4k")
            return Fault(0, RetPf.RETRY)
        if self.level > PG_LEVEL_4K and self.uses_gmem and vm.host.ops.has("max_mapping_level"):
            asked = yield from vm.host.ops.call(
                "max_mapping_level", count(self.heads), vm=vm, gfns=self.heads, pfns=self.pfns,
                private=self.access.private,
            )
            if asked and asked < self.level:
                if count(self.heads) > 1:
                    return (yield from self._half())
                return (yield from self._again(self.gfns, asked))
        return None

    def _still_there(self) -> bool:
        """Whether the VMM's memory still stands behind the pages: what the reference that GUP takes makes sure of,
        where no notifier would tell."""
        vm, slot = self.vm, self.slot
        if vm.caps.honours_notifiers or self.uses_gmem:
            return True
        assert slot is not None
        return vm.mm.seq == self.mm_seq or vm.mm.holds(shift(self.heads, slot.hva_page - slot.base_gfn), self.pfns)

    def _pin(self) -> Steps[Fault | None]:
        """Pins come before mmu_lock and the stale check, so they are a superset of the mappings."""
        vm = self.vm
        if vm.caps.needs_pin and vm.host.ops.has("pin_pfn"):
            stopped = yield from vm.host.ops.call(
                "pin_pfn", count(self.heads), vm=vm, batch=self._batch(), write=self.access.write, vcpu=self.access.vcpu
            )
            if stopped is not None:
                fatal = isinstance(stopped.reason, Fatal)
                ended = Fault(0, RetPf.INVALID, stopped.reason.errno) if fatal else Fault(0, RetPf.RETRY)
                self._cut_heads(stopped.done, ended)
        return None

    def _batch(self) -> Batch:
        assert self.slot is not None
        return Batch(self.slot, self.level, self.heads, self.pfns)

    def _map(self) -> Steps[Fault]:
        """Under mmu_lock: the stale check, the walk, the leaves (12 to 15); then what the fault cost (16)."""
        vm, batch = self.vm, self._batch()
        assert self.slot is not None
        n, mapped, ret, fatal = len(batch), 0, RetPf.FIXED, None
        if n:
            locks = vm.mmu_lock.covering(self.gfns)
            for lock in locks:
                # A mediated root is a record that only one may write to at a time.
                yield lock.write if self.root.flat else lock.read
            mapped, ret, fatal = yield from _map(self.access, self.root, self.slot, batch, self.seen)
            for lock in reversed(locks):
                yield lock.release
        if not self.uses_gmem:
            # Pages behind the first that was not mapped will be looked up when their turn comes.
            vm.host.meter.charge("gup_4k", min(mapped + 1, self.looked_up))
        if mapped < n and vm.host.ops.has("unpin_pfn"):
            yield from vm.host.ops.call("unpin_pfn", vm=vm, batch=batch.part(mapped, n))
        if self.counted:
            vm.host.meter.charge("fault_fixed", mapped)
        if mapped and vm.host.ops.observed:
            vm.host.ops.emit(
                "fault", "fault", vm=vm.id, gfns=batch.part(0, mapped).all_gfns, level=self.level, n=mapped,
                info={"private": self.access.private, "write": self.access.write},
            )
        done = mapped
        if self.level > PG_LEVEL_4K and mapped:
            done = below(self.gfns, last(part(batch.gfns, 0, mapped)) + pages_per_level(self.level))
        if ret in MAPPED and self.behind is not None:
            return attrs.evolve(self.behind, done=done, faults=mapped)
        if fatal is None:
            return Fault(done, ret, faults=mapped, level=self.level)
        return Fault(done, ret, fatal.errno, faults=mapped, level=self.level, why=fatal.why)


def _matching(vm: Vm, gfns: Sel, private: bool) -> int:
    """How many leading gfns have the attribute that the access needs."""
    words = vm.attributes.of(gfns)
    is_private = words & np.uint8(PRIVATE)
    n = int(np.count_nonzero(is_private))
    if n == (len(words) if private else 0):
        return len(words)
    wrong = is_private == 0 if private else is_private != 0
    return int(np.argmax(wrong))


def _allowed_level(
    vm: Vm, slot: Memslot, root: Root, gfns: Sel, n: int, private: bool, ceiling: int
) -> tuple[int, int]:
    """The mapping level of the leading gfns of n, and for how many it holds (kvm_mmu_hugepage_adjust without the pfn);
    -1 for one that could be large but for a table that the policy `merge` would have merged now."""
    caps = vm.caps
    ceiling = min(ceiling, caps.max_private_level if private else caps.max_shared_level)
    if ceiling < PG_LEVEL_2M or slot.logs_dirty:
        return PG_LEVEL_4K, n
    if vm.uses_gmem(slot, private):
        if slot.gmem is None:
            return PG_LEVEL_4K, n
        huge = slot.gmem.inode.huge_blocks(shift(gfns, slot.to_index(gfns)))
    else:
        huge = vm.mm.huge_blocks(shift(gfns, slot.hva_page - slot.base_gfn))
    if huge is False:
        return PG_LEVEL_4K, n
    # Backing gives at most 2M here: 1G mappings come from promotion only.
    index = array_of(gfns) >> 9
    allowed = slot.lpage[PG_LEVEL_2M].take(index - (slot.base_gfn >> 9)) == 0
    allowed &= huge
    if root.mirror:
        # A mirror descends where a smaller mapping exists: replacing its table would lose the guest's data.
        tables = root.has_table(PG_LEVEL_2M, index)
        if vm.merge.in_faults and np.count_nonzero(fills := allowed & tables):
            if fills[0]:
                return PG_LEVEL_4K, -1
            allowed, tables = allowed[: int(np.argmax(fills))], tables[: int(np.argmax(fills))]
            n = len(allowed)
        allowed &= ~tables
    run = int(np.argmin(allowed)) if allowed[0] else int(np.argmax(allowed))
    if run == 0:
        run = n
    return (PG_LEVEL_2M if allowed[0] else PG_LEVEL_4K), run


def _frames(vm: Vm, slot: Memslot, gfns: Sel, private: bool, level: int) -> Sel:
    """First frames behind pages of `level`, allocated and zeroed (kvm_mmu_faultin_pfn); of large pages only as many as
    the host has. UapiError as the kernel's errno."""
    if not vm.uses_gmem(slot, private):
        pages = shift(gfns, slot.hva_page - slot.base_gfn)
        return vm.mm.fault_in(pages) if level == PG_LEVEL_4K else vm.mm.fault_in_large(pages)
    if slot.gmem is None:
        raise UapiError(errno.EFAULT, "kvm_gmem_get_pfn", "the slot has no guest_memfd, or its file is closed")
    index = shift(gfns, slot.to_index(gfns))
    return slot.gmem.inode.populate(index) if level == PG_LEVEL_4K else slot.gmem.inode.populate_large(index)


def _map(
    access: Access, root: Root, slot: Memslot, batch: Batch, seen: Seen
) -> Steps[tuple[int, RetPf, Fatal | None]]:
    """Under mmu_lock: the stale check, the walk, the leaves (steps 12 to 15). Returns how many are mapped, how the next
    one ends, and why where that is for good."""
    vm, write, n = access.vm, access.write, len(batch)
    asked = n
    stale = vm.frame.moved(seen, batch.gfns) or root is not vm.tdp.root_for(access.private)
    stale = stale or bool(root.blocked and root.first_blocked(batch.gfns))
    if stale or (vm.frame.in_progress and vm.frame.blocks(batch.all_gfns)):
        return 0, RetPf.RETRY, None
    linked, why = yield from vm.tdp.link_tables(root, batch.level, batch.gfns, access.vcpu.tables, reads=True)
    if linked < n:
        batch, n = batch.part(0, linked), linked
    if isinstance(why, Mapped):
        if n == 0:
            return 1, RetPf.SPURIOUS, None
        why = None
    ret = RetPf.FIXED if why is None else RetPf.INVALID if isinstance(why, Fatal) else RetPf.RETRY
    if n == 0:
        return 0, ret, why if isinstance(why, Fatal) else None

    found = yield from vm.tdp.read(root, batch.level, batch.blocks, asked)
    if found is None:
        return 0, RetPf.RETRY, None
    words = found
    bits = 0 if slot.read_only else WRITABLE | (DIRTY if write else 0)
    if all_zero(words):
        stop = yield from vm.tdp.map_leaves(root, batch, bits, access.vcpu)
        mapped = n if stop is None else stop.done
    else:
        stop, mapped, ret = yield from _map_mixed(access, root, slot, batch, words.copy(), bits, ret)
    if asked > 1:
        yield from vm.tdp.walked(root, batch.level, min(mapped + 1, n))
    if slot.dirty is not None and not slot.read_only and mapped:
        # A read finds a protected page as it is: protected.
        now = batch.part(0, mapped)
        writable = (take(root.entries[batch.level], now.blocks) & np.uint32(WRITABLE)) != 0
        slot.dirty[where(now.indexes, writable)] = 1
    if stop is not None:
        why = stop.reason
        ret = RetPf.INVALID if isinstance(why, Fatal) else RetPf.RETRY
    return mapped, ret, why if isinstance(why, Fatal) else None


def _map_mixed(
    access: Access, root: Root, slot: Memslot, batch: Batch, words: npt.NDArray[np.uint32], bits: int, ret: RetPf
) -> Steps[tuple[Stop | None, int, RetPf]]:
    """Some entries are not absent: frozen (retry there), spurious, write-protected, or a table where a leaf is due."""
    vm, write, n = access.vm, access.write, len(batch)
    refused: Stop | None = None
    frozen = words == FROZEN
    if np.count_nonzero(frozen):
        n = int(np.argmax(frozen))
        if n == 0:
            return None, 0, RetPf.RETRY
        batch, words, ret = batch.part(0, n), words[:n], RetPf.RETRY
    tables = (words & np.uint32(TABLE)) != 0
    if np.count_nonzero(tables):
        if root.mirror:
            # Another vCPU has linked it since the level was chosen. The next fault goes on to smaller pages.
            n = int(np.argmax(tables))
            if n == 0:
                return None, 0, RetPf.RETRY
            batch, words, tables, ret = batch.part(0, n), words[:n], tables[:n], RetPf.RETRY
        # A direct root: the subtree goes, the large leaf takes its place, and everybody is flushed. A mediated one:
        # what is mapped there is taken back first.
        for i in np.flatnonzero(tables).tolist():
            gfn = first(part(batch.gfns, i, i + 1))
            if root.flat:
                yield from vm.tdp.make_room(root, slot, gfn, batch.level)
                words[i] = 0
                continue
            yield from vm.tdp.collapse(root, gfn, batch.level, first(part(batch.pfns, i, i + 1)), bits)
            yield from vm.flush_tlbs(gfn, gfn + pages_per_level(batch.level))
    present = (words & np.uint32(PRESENT | TABLE)) == PRESENT
    if np.count_nonzero(present):
        pfns = array_of(batch.pfns)
        moved = present & ((words >> np.uint32(FRAME_SHIFT)) != pfns.astype(np.uint32))
        if np.count_nonzero(moved):
            i = int(np.argmax(moved))
            raise InvariantViolation(
                "a present leaf would change its frame", number=13, gfn=first(part(batch.gfns, i, i + 1)),
                pfn=int(pfns[i]), states={"entry": hex(int(words[i]))}, events=vm.host.last_events(),
            )
        if write:
            protected = present & ((words & np.uint32(WRITABLE)) == 0)
            if bits & WRITABLE and np.count_nonzero(protected):
                index = where(batch.blocks, protected)
                refused = yield from vm.tdp.make_writable(root, slot, batch.level, index, access.vcpu)
                present &= ~protected
                if refused is not None:
                    n = int(np.flatnonzero(protected)[refused.done])
                    batch, words, present, ret = batch.part(0, n), words[:n], present[:n], RetPf.RETRY
        if ret is RetPf.FIXED and np.count_nonzero(present) == n:
            ret = RetPf.SPURIOUS
    absent = words == 0
    missing = int(np.count_nonzero(absent))
    if missing:
        positions = np.flatnonzero(absent)
        sub = Batch(batch.slot, batch.level, where(batch.gfns, absent), contiguous(
            array_of(batch.pfns)[positions], pages_per_level(batch.level)))
        stop = yield from vm.tdp.map_leaves(root, sub, bits, access.vcpu)
        if stop is not None:
            return stop, int(positions[stop.done]), RetPf.RETRY
    return refused, n, ret
