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
from cvmcore.mem.slots import Memslot
from cvmcore.mem.tdp import DIRTY, FRAME_SHIFT, FROZEN, PRESENT, TABLE, WRITABLE, Root, Stop
from cvmcore.pages import Sel, array_of, blocks, contiguous, count, first, heads, last, part, shift, take, where
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


MAPPED = frozenset({RetPf.FIXED, RetPf.SPURIOUS})
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


def memory_fault(gfn: int, private: bool, error: int = errno.EFAULT) -> MemoryFault:
    """kvm_mmu_prepare_memory_fault_exit."""
    return MemoryFault(gfn << PAGE_SHIFT, KVM_MEMORY_EXIT_FLAG_PRIVATE if private else 0, errno=error)


def resolve(
    vm: Vm, vcpu: Vcpu, gfns: Sel, write: bool, private: bool, *, prefetch: bool = False, max_level: int = PG_LEVEL_1G
) -> Steps[Fault]:
    """Resolve faults on sorted unique 4K gfns, all of one access kind. Never raises for what a guest can cause."""
    done = faults = 0
    ret = RetPf.SPURIOUS
    yield vm.srcu.read
    for start, stop, slot in list(vm.slots.split(gfns)):
        while start < stop and ret in MAPPED:
            part_of = part(gfns, start, stop)
            result = yield from _resolve_in_slot(vm, vcpu, slot, part_of, write, private, prefetch, max_level)
            start += result.done
            done += result.done
            faults += result.faults
            if result.ret is not RetPf.SPURIOUS:
                ret = result.ret
    vm.free_spare_tables()
    yield vm.srcu.release
    return Fault(done, ret, faults=faults) if ret in MAPPED else attrs.evolve(result, done=done, faults=faults)


def _resolve_in_slot(
    vm: Vm, vcpu: Vcpu, slot: Memslot | None, gfns: Sel, write: bool, private: bool, prefetch: bool, max_level: int
) -> Steps[Fault]:
    """One stretch of gfns within one slot; may stop early with FIXED where the mapping level changes."""
    n = asked_for = count(gfns)
    root = vm.tdp.root_for(private)
    limit: Fault | None = None
    """How the first page behind the batch ends."""
    try:
        if root.mirror and slot is not None:
            vm.topup_tables(root, gfns)
    except UapiError as error:
        if asked_for > 1:
            return (yield from _resolve_half(vm, vcpu, slot, gfns, write, private, prefetch, max_level))
        return Fault(0, RetPf.INVALID, error.errno)
    stopped = yield from vm.host.ops.call("topup", n, vm=vm, vcpu=vcpu, nr_pages=n)
    if stopped is not None:
        limit = Fault(0, RetPf.INVALID, stopped.reason.errno if isinstance(stopped.reason, Fatal) else errno.ENOMEM)
        if stopped.done == 0:
            return limit
        gfns, n = part(gfns, 0, stopped.done), stopped.done
    seq = vm.invalidate_seq
    yield FAULT_SNAPSHOT

    if vm.caps.private_by_attribute:
        matches = _matching(vm, gfns, private)
        if matches < n:
            gfn = first(part(gfns, matches, matches + 1))
            limit = Fault(0, RetPf.INVALID, errno.EFAULT, memory_fault(gfn, private))
            if matches == 0:
                return limit
            gfns, n = part(gfns, 0, matches), matches
    if slot is None:
        gfn = first(gfns)
        if private:
            return Fault(0, RetPf.INVALID, errno.EFAULT, memory_fault(gfn, True))
        if prefetch:
            return Fault(0, RetPf.INVALID, errno.ENOENT)
        return Fault(0, RetPf.EMULATE, exit=Mmio(gfn << PAGE_SHIFT, write))
    if slot.invalid:
        return Fault(0, RetPf.INVALID, errno.EAGAIN) if prefetch else Fault(0, RetPf.RETRY)
    if write and slot.read_only:
        return Fault(0, RetPf.EMULATE, exit=Mmio(first(gfns) << PAGE_SHIFT, True))
    if vm.blocked(gfns):
        return Fault(0, RetPf.RETRY)

    # The level that the core and the backing allow; pages of one level at a time, in gfn order.
    level, of_level = _allowed_level(vm, slot, root, gfns, private, max_level)
    if of_level < n:
        gfns, n, limit = part(gfns, 0, of_level), of_level, None
    order = order_of(level)
    leaf_gfns = heads(blocks(gfns, order), order) if order else gfns

    uses_gmem = vm.uses_gmem(slot, private)
    try:
        pfns = _get_pfns(vm, slot, leaf_gfns, private, level)
    except UapiError as error:
        if asked_for > 1:
            return (yield from _resolve_half(vm, vcpu, slot, gfns, write, private, prefetch, max_level))
        if not uses_gmem:
            vm.host.meter.charge("gup_4k")
        exit_ = memory_fault(first(gfns), private, error.errno) if uses_gmem else None
        return Fault(0, RetPf.INVALID, error.errno, exit_)
    looked_up = count(pfns)
    if looked_up < count(leaf_gfns):
        # The host had no large page any more: what it had is mapped large, the next block small.
        n = _below(gfns, last(part(leaf_gfns, 0, max(looked_up, 1))) + pages_per_level(level))
        gfns, leaf_gfns = part(gfns, 0, n), part(leaf_gfns, 0, looked_up)
        limit = None
        if looked_up == 0:
            vm.free_spare_tables()
            return (yield from _resolve_in_slot(vm, vcpu, slot, gfns, write, private, prefetch, PG_LEVEL_4K))
    if uses_gmem and private and vm.host.ops.has("gmem_prepare"):
        stopped = yield from vm.host.ops.call(
            "gmem_prepare", count(leaf_gfns), vm=vm, slot=slot, gfns=leaf_gfns, pfns=pfns, max_order=order
        )
        if stopped is not None:
            gfn = first(part(leaf_gfns, stopped.done, stopped.done + 1))
            error_nr = stopped.reason.errno if isinstance(stopped.reason, Fatal) else errno.EAGAIN
            limit = Fault(0, RetPf.INVALID, error_nr, memory_fault(gfn, private, error_nr))
            if stopped.done == 0:
                return limit
            leaf_gfns, pfns = part(leaf_gfns, 0, stopped.done), part(pfns, 0, stopped.done)
    yield FAULT_PFN

    if vm.host.ops.has("max_mapping_level") and uses_gmem and level > PG_LEVEL_4K:
        asked = yield from vm.host.ops.call(
            "max_mapping_level", count(leaf_gfns), vm=vm, gfns=leaf_gfns, pfns=pfns, private=private
        )
        if asked and asked < level:
            if count(leaf_gfns) > 1:
                return (yield from _resolve_half(vm, vcpu, slot, gfns, write, private, prefetch, max_level))
            return (yield from _resolve_in_slot(vm, vcpu, slot, gfns, write, private, prefetch, asked))
    batch = Batch(slot, level, leaf_gfns, pfns)
    if vm.caps.needs_pin and vm.host.ops.has("pin_pfn"):
        stopped = yield from vm.host.ops.call("pin_pfn", len(batch), vm=vm, batch=batch, write=write)
        if stopped is not None:
            if isinstance(stopped.reason, Fatal):
                limit = Fault(0, RetPf.INVALID, stopped.reason.errno)
            else:
                limit = Fault(0, RetPf.RETRY)
            batch = batch.part(0, stopped.done)

    result = _Mapped(0)
    if len(batch):
        yield vm.mmu_lock.read
        result = yield from _map(vm, root, slot, batch, seq, write)
        yield vm.mmu_lock.release
    mapped = result.done
    if not uses_gmem:
        # Pages behind the first that was not mapped will be looked up when their turn comes.
        vm.host.meter.charge("gup_4k", min(mapped + 1, looked_up))
    if mapped < len(batch) and vm.host.ops.has("unpin_pfn"):
        yield from vm.host.ops.call("unpin_pfn", vm=vm, batch=batch.part(mapped, len(batch)))
    vm.host.meter.charge("fault_fixed", mapped)
    if mapped and vm.host.ops.observed:
        vm.host.ops.emit(
            "fault", "fault", vm=vm.id, gfns=batch.part(0, mapped).all_gfns, level=level, n=mapped,
            info={"private": private, "write": write},
        )
    # Pages of the batch that the mapped leaves cover.
    done = mapped
    if level > PG_LEVEL_4K and mapped:
        done = _below(gfns, last(part(batch.gfns, 0, mapped)) + pages_per_level(level))
    if result.ret in MAPPED and limit is not None:
        return attrs.evolve(limit, done=done, faults=mapped)
    fatal = result.fatal or Fatal(0)
    return Fault(done, result.ret, fatal.errno, faults=mapped, level=level, why=fatal.why)


def _resolve_half(
    vm: Vm, vcpu: Vcpu, slot: Memslot | None, gfns: Sel, write: bool, private: bool, prefetch: bool, max_level: int
) -> Steps[Fault]:
    """Some page of the batch needs something else than the others: halve it until that page stands alone, as it would
    one by one. What was taken for the pages behind goes back."""
    vm.free_spare_tables()
    half = part(gfns, 0, max(1, count(gfns) // 2))
    return (yield from _resolve_in_slot(vm, vcpu, slot, half, write, private, prefetch, max_level))


def _matching(vm: Vm, gfns: Sel, private: bool) -> int:
    """How many leading gfns have the attribute that the access needs."""
    words = vm.attributes.of(gfns)
    is_private = words & np.uint8(PRIVATE)
    n = int(np.count_nonzero(is_private))
    if n == (len(words) if private else 0):
        return len(words)
    wrong = is_private == 0 if private else is_private != 0
    return int(np.argmax(wrong))


def _allowed_level(vm: Vm, slot: Memslot, root: Root, gfns: Sel, private: bool, ceiling: int) -> tuple[int, int]:
    """The mapping level of the leading gfns, and for how many it holds (kvm_mmu_hugepage_adjust without the pfn)."""
    caps = vm.caps
    n = count(gfns)
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
    if root.external:
        # A mirror descends where a smaller mapping exists: replacing its table would lose the guest's data.
        allowed &= ~root.has_table(PG_LEVEL_2M, index)
    run = int(np.argmin(allowed)) if allowed[0] else int(np.argmax(allowed))
    if run == 0:
        run = n
    return (PG_LEVEL_2M if allowed[0] else PG_LEVEL_4K), run


def _get_pfns(vm: Vm, slot: Memslot, gfns: Sel, private: bool, level: int) -> Sel:
    """First frames behind pages of `level`, allocated and zeroed (kvm_mmu_faultin_pfn); of large pages only as many as
    the host has. UapiError as the kernel's errno."""
    if not vm.uses_gmem(slot, private):
        pages = shift(gfns, slot.hva_page - slot.base_gfn)
        return vm.mm.fault_in(pages) if level == PG_LEVEL_4K else vm.mm.fault_in_large(pages)
    if slot.gmem is None:
        raise UapiError(errno.EFAULT, "kvm_gmem_get_pfn", "the slot has no guest_memfd, or its file is closed")
    index = shift(gfns, slot.to_index(gfns))
    return slot.gmem.inode.populate(index) if level == PG_LEVEL_4K else slot.gmem.inode.populate_large(index)


def _below(gfns: Sel, end: int) -> int:
    """How many of the 4K gfns lie below `end`."""
    if isinstance(gfns, slice):
        return min(count(gfns), end - int(gfns.start))
    return int(np.searchsorted(gfns, end))


@attrs.frozen
class _Mapped:
    done: int
    ret: RetPf = RetPf.FIXED
    fatal: Fatal | None = None


def _map(vm: Vm, root: Root, slot: Memslot, batch: Batch, seq: int, write: bool) -> Steps[_Mapped]:
    """Under mmu_lock: the stale check, the walk, the leaves (steps 12 to 15)."""
    n = len(batch)
    if vm.invalidate_seq != seq or root not in vm.tdp.roots() or vm.blocked(batch.all_gfns):
        return _Mapped(0, RetPf.RETRY)
    linked, why = yield from vm.tdp.link_tables(root, batch.level, batch.gfns)
    if linked < n:
        batch = batch.part(0, linked)
    ret = RetPf.FIXED if why is None else RetPf.INVALID if isinstance(why, Fatal) else RetPf.RETRY
    if not len(batch):
        return _Mapped(0, ret, why if isinstance(why, Fatal) else None)

    words = take(root.entries[batch.level], batch.blocks)
    bits = 0 if slot.read_only else WRITABLE | (DIRTY if write else 0)
    if np.count_nonzero(words) == 0:
        stop = yield from vm.tdp.map_leaves(root, batch, bits)
        mapped = len(batch) if stop is None else stop.done
    else:
        stop, mapped, ret = yield from _map_mixed(vm, root, batch, words.copy(), bits, write, ret)
    if slot.dirty is not None and not slot.read_only and mapped:
        slot.dirty[shift(part(batch.gfns, 0, mapped), -slot.base_gfn)] = 1
    if stop is not None:
        why = stop.reason
        ret = RetPf.INVALID if isinstance(why, Fatal) else RetPf.RETRY
    return _Mapped(mapped, ret, why if isinstance(why, Fatal) else None)


def _map_mixed(
    vm: Vm, root: Root, batch: Batch, words: npt.NDArray[np.uint32], bits: int, write: bool, ret: RetPf
) -> Steps[tuple[Stop | None, int, RetPf]]:
    """Some entries are not absent: frozen (retry there), spurious, write-protected, or a table where a leaf is due."""
    n = len(batch)
    frozen = words == FROZEN
    if np.count_nonzero(frozen):
        n = int(np.argmax(frozen))
        if n == 0:
            return None, 0, RetPf.RETRY
        batch, words, ret = batch.part(0, n), words[:n], RetPf.RETRY
    tables = (words & np.uint32(TABLE)) != 0
    if np.count_nonzero(tables):
        # A direct root: the subtree goes, the large leaf takes its place, and everybody is flushed.
        for i in np.flatnonzero(tables).tolist():
            gfn = first(part(batch.gfns, i, i + 1))
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
                vm.tdp.make_writable(root, batch.level, where(batch.blocks, protected))
                present &= ~protected
        if ret is RetPf.FIXED and np.count_nonzero(present) == n:
            ret = RetPf.SPURIOUS
    absent = words == 0
    missing = int(np.count_nonzero(absent))
    if missing:
        positions = np.flatnonzero(absent)
        sub = Batch(batch.slot, batch.level, where(batch.gfns, absent), contiguous(
            array_of(batch.pfns)[positions], pages_per_level(batch.level)))
        stop = yield from vm.tdp.map_leaves(root, sub, bits)
        if stop is not None:
            return stop, int(positions[stop.done]), RetPf.RETRY
    return None, n, ret
