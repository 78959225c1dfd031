"""Invalidation (kernel: mmu_invalidate_begin/end, kvm_vm_set_mem_attributes, kvm_gmem_punch_hole, the hva notifier).

Every trigger is the same frame: under mmu_lock for write, raise in_progress and note the range, zap, flush; then do
the work that made it necessary; then, under mmu_lock again, bump seq and lower in_progress. A fault that looked up its
page before or meanwhile sees one or the other and retries.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, TypeAlias

from cvmcore.effects import (
    INVALIDATE_END,
    INVALIDATE_START,
    INVALIDATE_STORE,
    INVALIDATE_STORING,
    INVALIDATE_ZAP,
    Steps,
    holding,
)
from cvmcore.errors import UapiError
from cvmcore.mem.contract import Cause
from cvmcore.mem.mmulock import drop, read, write
from cvmcore.mem.tdp import Root, Stop, TableCache
from cvmcore.pages import count
from cvmcore.types import PG_LEVEL_1G, PG_LEVEL_2M, Fatal, Filter, order_of, pages_per_level

if TYPE_CHECKING:
    from cvmcore.mem.gmem import GmemFile, GmemInode
    from cvmcore.mem.slots import Memslot
    from cvmcore.vm import Vm

Range: TypeAlias = "tuple[Memslot, int, int]"
"""A memslot with the gfns [start, end) of it that are meant."""


def begin(
    vm: Vm,
    ranges: list[Range],
    kinds: Filter,
    *,
    blocks: tuple[int, int] | None = None,
    callback: Steps[None] | None = None,
) -> Steps[int]:
    """Open a frame: zap the leaves of these kinds that overlap the ranges, flush. Returns 4K pages zapped.

    blocks: the gfns [start, end) that the frame keeps from being mapped, where they are more than the ranges.
    Where zapping would destroy the content of neighbours (`zap_destroys_content`, external roots), huge leaves that
    cross an edge of a range are split first; where that fails, the frame is closed again and UapiError raised, nothing
    zapped. callback: what the vendor does once all is flushed, mmu_lock still held (`mem.contract`).
    """
    low, high = min(r[1] for r in ranges), max(r[2] for r in ranges)
    span = blocks or (low, high)
    locks = vm.mmu_lock.covering(slice(*span, 1))
    roots = vm.tdp.roots(kinds, invalid=True)
    tables = TableCache(vm.host.frames)
    while True:
        # Tables for the splits are taken before the lock; what must be split may change until it is held.
        mirrors = [root for root in roots if root.mirror and vm.caps.zap_destroys_content]
        try:
            tables.topup(sum(splits(root, r[1], r[2]) for root in mirrors for r in ranges))
        except UapiError:
            tables.give_back()  # what an earlier round took
            raise
        yield from write(locks)
        if sum(splits(root, r[1], r[2]) for root in mirrors for r in ranges) <= count(tables.spare):
            break
        yield from drop(locks)
    vm.frame.add(*span)
    yield INVALIDATE_START
    roots = vm.tdp.roots(kinds, invalid=True)
    for root in roots:
        if vm.caps.zap_destroys_content and root.external:
            for _, start, end in ranges:
                stop = yield from split_edges(vm, root, start, end, tables)
                if stop is not None:
                    vm.frame.drop(*span)
                    yield from drop(locks)
                    tables.give_back()
                    error = stop.reason.errno if isinstance(stop.reason, Fatal) else errno.EAGAIN
                    raise UapiError(error, "split", "a huge page at the edge of the range could not be split")
    zapped = 0
    flush = low, high
    for root in roots:
        flush = root.widened(*flush)
        for slot, start, end in ranges:
            zapped += yield from vm.tdp.zap_leaves(root, slot, start, end)
    yield INVALIDATE_ZAP
    if zapped:
        yield from vm.flush_tlbs(*flush)
    if vm.host.ops.observed:
        vm.host.ops.emit("invalidate", kinds.name or "BOTH", vm=vm.id, n=zapped, gfns=slice(low, high, 1))
    if callback is not None:
        yield from callback
    yield from drop(locks)
    tables.give_back()
    return zapped


def end(vm: Vm, ranges: list[Range]) -> Steps[None]:
    """Close the frame that `begin` opened for these ranges."""
    span = min(r[1] for r in ranges), max(r[2] for r in ranges)
    locks = vm.mmu_lock.covering(slice(*span, 1))
    yield from write(locks)
    yield INVALIDATE_END
    vm.frame.drop(*span)
    yield from drop(locks)


def invalidate(
    vm: Vm, ranges: list[Range], kinds: Filter, work: Steps[None] | None = None, callback: Steps[None] | None = None
) -> Steps[int]:
    """A whole frame around `work`. Without a range no frame is opened, seq does not move, and `work` runs all the
    same. Returns 4K pages zapped."""
    zapped = 0
    if ranges:
        zapped = yield from begin(vm, ranges, kinds, callback=callback)
    if work is not None:
        yield from work
    if ranges:
        yield from end(vm, ranges)
    return zapped


def zap_gfn_range(vm: Vm, start: int, end_gfn: int) -> Steps[int]:
    """kvm_zap_gfn_range for private pages: a frame that opens and closes under one hold of mmu_lock. What a fault has
    looked up before is stale afterwards. Returns 4K pages zapped."""
    locks = vm.mmu_lock.covering(slice(start, end_gfn, 1))
    yield from write(locks)
    vm.frame.add(start, end_gfn)
    yield INVALIDATE_START
    zapped = 0
    for root in vm.tdp.roots(Filter.PRIVATE):
        for slot in vm.slots.overlapping(start, end_gfn):
            low, high = max(start, slot.base_gfn), min(end_gfn, slot.end_gfn)
            flush = root.widened(low, high)
            if n := (yield from vm.tdp.zap_leaves(root, slot, low, high)):
                yield from vm.flush_tlbs(*flush)
            zapped += n
    yield INVALIDATE_ZAP
    yield INVALIDATE_END
    vm.frame.drop(start, end_gfn)
    yield from drop(locks)
    return zapped


def splits(root: Root, start: int, end_gfn: int) -> int:
    """How many splits `split_edges` would make as things stand: so many table pages it will need."""
    return len({
        (level, edge >> order_of(level))
        for edge in (start, end_gfn)
        for level in range(PG_LEVEL_2M, root.level_at(edge) + 1)
        if edge & (pages_per_level(level) - 1)
    })


def split_edges(vm: Vm, root: Root, start: int, end_gfn: int, tables: TableCache) -> Steps[Stop | None]:
    """Split the huge leaves that straddle the edges of [start, end): at most two blocks per level, larger first."""
    for level in (PG_LEVEL_1G, PG_LEVEL_2M):
        size = pages_per_level(level)
        for edge in (start, end_gfn):
            if edge & (size - 1) and root.level_at(edge) == level:
                stop: Stop | None = yield from vm.tdp.split(root, edge & ~(size - 1), level, tables)
                if stop is not None:
                    return stop
    return None


# ---- attributes -----------------------------------------------------------------------------------------------


def set_attributes(vm: Vm, start: int, end_gfn: int, value: int, private_bit: int) -> Steps[int]:
    """kvm_vm_set_mem_attributes, slots_lock held: all or nothing, and nothing at all where nothing changes.

    To private zaps what may no longer be used shared; to shared zaps private mappings. Returns 4K pages zapped.
    Raises UapiError(ENOMEM) where the array cannot grow, or the error of a failed split; nothing is changed then.
    """
    attributes = vm.attributes
    if attributes.uniform(start, end_gfn, value):
        return 0
    try:
        attributes.cover(end_gfn)
    except MemoryError:
        raise UapiError(errno.ENOMEM, "KVM_SET_MEMORY_ATTRIBUTES", "no memory for the attributes") from None
    cause = Cause.TO_PRIVATE if value & private_bit else Cause.TO_SHARED
    kinds = vm.host.contract.kinds(cause, Filter.SHARED if value & private_bit else Filter.PRIVATE)
    slots = vm.slots.overlapping(start, end_gfn)
    ranges: list[Range] = [(slot, max(start, slot.base_gfn), min(end_gfn, slot.end_gfn)) for slot in slots]
    zapped = 0
    if ranges:
        # Head and tail blocks are about to become mixed: nobody may map them large meanwhile.
        edges = [attributes.with_edges(*part) for part in ranges]
        span = min(e[0] for e in edges), max(e[1] for e in edges)
        zapped = yield from begin(vm, ranges, kinds, blocks=span, callback=callback_of(vm, ranges, cause))
    # The kernel stores entry by entry and may be preempted between any two; one such place stands for all.
    middle = start + (end_gfn - start) // 2
    if middle > start:
        attributes.store(start, middle, value)
        yield INVALIDATE_STORING
    attributes.store(middle, end_gfn, value)
    if vm.host.ops.detailed:
        name = "private" if value & private_bit else "shared"
        vm.host.ops.detail("attribute", name, vm=vm.id, gfns=slice(start, end_gfn, 1), n=end_gfn - start)
    vm.host.meter.charge("attributes_4k", end_gfn - start)
    yield INVALIDATE_STORE
    if ranges:
        locks = vm.mmu_lock.covering(slice(*span, 1))
        yield from write(locks)
        yield INVALIDATE_END
        vm.frame.drop(*span)
        for slot in slots:
            attributes.track_mixed(slot, start, end_gfn)
        yield from drop(locks)
    return zapped


# ---- guest_memfd ----------------------------------------------------------------------------------------------


def gmem_kinds(inode: GmemInode, cause: Cause = Cause.PUNCH_HOLE) -> Filter:
    """What a truncation of the inode invalidates (kvm_gmem_invalidate_begin)."""
    return inode.host.contract.kinds(cause, Filter.SHARED if inode.init_shared else Filter.PRIVATE)


def callback_of(vm: Vm, ranges: list[Range], cause: Cause, inode: GmemInode | None = None) -> Steps[None] | None:
    """What the vendor does in the callback for these ranges, whose pages are in `inode` or in their slots' files."""
    parts = []
    for slot, start, end in ranges:
        behind = inode or (slot.gmem.inode if slot.gmem is not None else None)
        if behind is not None:
            offset = slot.gmem_pgoff - slot.base_gfn
            parts.append((behind, start + offset, end + offset))
    return vm.host.contract.callback(vm, cause, parts)


def bound_ranges(file: GmemFile, start: int, n: int) -> list[Range]:
    """The gfns through which a file's bindings show indexes [start, start + n)."""
    ranges: list[Range] = []
    for index, npages, slot in file.bound(start, n):
        low, high = max(start, index), min(start + n, index + npages)
        ranges.append((slot, slot.base_gfn + low - slot.gmem_pgoff, slot.base_gfn + high - slot.gmem_pgoff))
    return ranges


def punch_hole(inode: GmemInode, start: int, n: int) -> Steps[int]:
    """kvm_gmem_punch_hole: zap every binding, give the folios back by pfn, close the frames. Returns pages freed."""

    def punch() -> Steps[int]:
        opened = yield from _begin_all(inode, start, n, Cause.PUNCH_HOLE)
        freed = yield from inode.truncate(start, n)
        yield INVALIDATE_STORE
        for vm, ranges in opened:
            yield from end(vm, ranges)
        return freed

    return (yield from holding(inode.invalidate_lock, punch()))


def _begin_all(inode: GmemInode, start: int, n: int, cause: Cause | None) -> Steps[list[tuple[Vm, list[Range]]]]:
    """`begin` for every binding of [start, start + n); where one fails, those before it are closed again.

    cause: whose callback the vendor gets; none without.
    """
    opened: list[tuple[Vm, list[Range]]] = []
    try:
        for file in inode.files:
            ranges = bound_ranges(file, start, n)
            if ranges:
                callback = callback_of(file.vm, ranges, cause, inode) if cause else None
                yield from begin(file.vm, ranges, gmem_kinds(inode), callback=callback)
                opened.append((file.vm, ranges))
    except UapiError:
        for vm, ranges in opened:
            yield from end(vm, ranges)
        raise
    return opened


def release(file: GmemFile) -> Steps[None]:
    """kvm_gmem_release, slots_lock held: every bound slot loses its file, all bindings are zapped, the file goes."""
    inode = file.inode
    yield inode.invalidate_lock.write
    for _, _, slot in file.bindings:
        slot.gmem = None
    ranges = bound_ranges(file, 0, inode.npages)
    callback = callback_of(file.vm, ranges, Cause.RELEASE, inode)
    yield from invalidate(file.vm, ranges, gmem_kinds(inode, Cause.RELEASE), callback=callback)
    file.bindings = []
    inode.files.remove(file)
    yield inode.invalidate_lock.release


def memory_failure(inode: GmemInode, index: int) -> Steps[None]:
    """kvm_gmem_error_folio: zap the page, keep the folio, poisoned; the next lookup answers -EHWPOISON."""

    def fail() -> Steps[None]:
        opened = yield from _begin_all(inode, index, 1, None)
        inode.poison(index)
        for vm, ranges in opened:
            yield from end(vm, ranges)

    yield from holding(inode.invalidate_lock, fail(), read=True)


# ---- memslots -------------------------------------------------------------------------------------------------


def flush_slot(vm: Vm, slot: Memslot) -> Steps[int]:
    """Zap what a slot maps, both kinds, while its INVALID copy stands (kvm_arch_flush_shadow_memslot).

    The default VM type zaps all direct roots at once, by replacing them (kvm_mmu_zap_all_fast).
    """
    if vm.fast_zap:
        yield from write(vm.mmu_lock.all)
        old = vm.tdp.fast_zap()
        yield from vm.flush_tlbs(0, 1 << 52)
        yield from drop(vm.mmu_lock.all)
        yield from read(vm.mmu_lock.all)
        pages = old.pages_mapped
        vm.tdp.drop_root(old)
        yield from drop(vm.mmu_lock.all)
        return pages
    locks = vm.mmu_lock.covering(slice(slot.base_gfn, slot.end_gfn, 1))
    yield from write(locks)
    zapped = 0
    for root in vm.tdp.roots(invalid=True):
        zapped += yield from vm.tdp.zap_leaves(root, slot, slot.base_gfn, slot.end_gfn)
    if zapped:
        yield from vm.flush_tlbs(slot.base_gfn, slot.end_gfn)
    yield from drop(locks)
    return zapped
