"""VMs (kernel: struct kvm): what a VM owns, how its memslots and files change, how it is made and destroyed.

Everything here is below the UAPI: arguments are checked in `cvmcore.uapi`.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cvmcore.effects import Lock, Steps, holding, operation
from cvmcore.errors import UapiError
from cvmcore.mem import invalidate
from cvmcore.mem.attributes import Attributes
from cvmcore.mem.contract import Cause
from cvmcore.mem.gmem import GmemFile
from cvmcore.mem.merge import MERGES
from cvmcore.mem.mm import Mm
from cvmcore.mem.mmulock import MMU_LOCKS, drop, read, write
from cvmcore.mem.slots import Memslot, Memslots
from cvmcore.mem.tdp import FRAME_SHIFT, PRESENT, TABLE, WRITABLE, Root, TableCache, Tdp
from cvmcore.pages import (
    EMPTY,
    Sel,
    array_of,
    below,
    contiguous,
    count,
    first,
    part,
    pieces,
    take,
    zeros,
)
from cvmcore.types import (
    PAGE_BYTES,
    PG_LEVEL_1G,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    Batch,
    Capabilities,
    Change,
    Filter,
    Retry,
    Walk,
    order_of,
)

if TYPE_CHECKING:
    from cvmcore.host import Host
    from cvmcore.vcpu import Vcpu

class Vm:
    """One VM and all that is per VM: memslots, attributes, page tables, the invalidation frame, vCPUs."""

    def __init__(self, host: Host, vm_id: int, vm_type: str, caps: Capabilities, options: dict[str, Any], mm: Mm):
        self.host = host
        self.id = vm_id
        self.vm_type = vm_type
        self.caps = caps
        self.options = options
        self.mm = mm
        self.arch: Any = None
        self.key = 0
        self.slots = Memslots()
        self.attributes = Attributes()
        self.mmu_lock = MMU_LOCKS[host.policies["mmu_lock"]](vm_id)
        self.frame = self.mmu_lock.frame
        self.tdp = Tdp(self)
        self.merge = MERGES[host.policies["merge"]](self)
        self.vcpus: list[Vcpu] = []
        self.mirrored: Vm | None = None
        """The VM whose context this one shares; it stays for as long."""
        self.gmem_files: list[GmemFile] = []
        self.dead = False
        self.dead_because = ""
        self.has_run = False
        self.destroyed = False
        self.users = 1
        """References: the VM's descriptor, and every open guest_memfd."""
        self.memlock_pages = 0
        self.pre_fault_allowed = True
        """Whether KVM_PRE_FAULT_MEMORY works yet; a vendor that seals an image first sets it at launch_finish."""
        self.fast_zap = not (caps.private_by_attribute or caps.mediated_root)
        """Memslot deletion zaps all direct roots (KVM_X86_QUIRK_SLOT_ZAP_ALL, default VM types)."""
        self.kicks = 0

        self.lock = Lock(f"vm{vm_id}.kvm_lock", 10)
        self.slots_lock = Lock(f"vm{vm_id}.slots_lock", 20)
        self.srcu = Lock(f"vm{vm_id}.srcu", 35)
        self.notifier_count = Lock(f"vm{vm_id}.mn_active", 25)
        self.active_count = 0
        """Invalidations by hva that have begun and not ended (mn_active_invalidate_count): who holds the lock for read.
        Memslots change while there is none."""
        mm.notifiers.append(self)

    @property
    def drive(self) -> Any:
        return self.host.drive

    def uses_gmem(self, slot: Memslot, private: bool) -> bool:
        """Whether a fault of this kind is served from the slot's guest_memfd."""
        return slot.gmem_only or (private and self.caps.private_by_attribute)

    # ---- life and death ---------------------------------------------------------------------------------------

    def bug(self, why: str) -> None:
        """KVM_BUG_ON: the VM is dead; nobody enters the guest again."""
        if not self.dead:
            self.dead, self.dead_because = True, why
            self.host.ops.emit("vm", "bug", vm=self.id, info={"why": why})
            self.kick_all_vcpus()

    def kick_all_vcpus(self) -> None:
        """kvm_make_all_cpus_request: every vCPU leaves the guest."""
        self.kicks += 1
        for vcpu in self.vcpus:
            if vcpu.in_guest:
                vcpu.leave()

    def charge_memlock(self, nr_pages: int, call: str) -> None:
        """Account locked pages against RLIMIT_MEMLOCK. UapiError(ENOMEM) beyond it, nothing is accounted then."""
        limit = self.host.memlock_limit_bytes
        if nr_pages > 0 and limit is not None and (self.memlock_pages + nr_pages) * PAGE_BYTES > limit:
            raise UapiError(errno.ENOMEM, call, f"RLIMIT_MEMLOCK of {limit} bytes would be exceeded")
        self.memlock_pages += nr_pages

    def walk(self, gfns: Sel, private: bool) -> tuple[int | npt.NDArray[np.uint8], Sel, int | npt.NDArray[np.uint8]]:
        """The CPU's walk of the root for this access: status (Walk), frames where OK, levels. Above every memslot there
        is nothing to walk."""
        lookup, n = self.tdp.root_for(private).lookup, below(gfns, self.tdp.end_gfn)
        if n == count(gfns):
            return lookup(gfns, False)
        status, pfns, level = lookup(part(gfns, 0, n), False) if n else (int(Walk.MISS), EMPTY, PG_LEVEL_4K)
        if isinstance(status, int) and status == Walk.MISS:
            return status, pfns, level

        def padded(values: Any, rest: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
            found = np.full(count(gfns), rest, dtype)
            found[:n] = values
            return found

        return (
            padded(status, Walk.MISS, np.uint8), contiguous(padded(array_of(pfns), 0, np.int64)),
            level if isinstance(level, int) else padded(level, PG_LEVEL_4K, np.uint8),
        )  # fmt: skip

    def gup_range(self, hva: int, size_bytes: int) -> list[Sel]:
        """The frames behind an hva range, faulted in, in pieces. UapiError(EFAULT) for a hole.

        The walk is not charged: the price of the pins that a vendor takes has it in it.
        """
        start, n = hva >> 12, -(-(hva + size_bytes) // PAGE_BYTES) - (hva >> 12)
        found = [
            self.mm.fault_in(part(pages, low, high))
            for _, pages in self.mm.ranges(start, n)
            for low, high in pieces(pages)
        ]
        if sum(count(pfns) for pfns in found) != n:
            raise UapiError(errno.EFAULT, "pin_user_pages", f"hva {hva:#x} is not wholly mapped")
        return found

    # ---- TLBs -------------------------------------------------------------------------------------------------

    def flush_tlbs(self, start: int, end: int) -> Steps[None]:
        """Flush gfns [start, end) from every vCPU's TLB (kvm_flush_remote_tlbs_range)."""
        steps, ops = self._flush_tlbs(start, end), self.host.ops
        if not ops.detailed:
            return steps
        return ops.told("flush_tlbs", steps, vm=self.id, gfns=slice(start, end, 1), n=end - start)

    def _flush_tlbs(self, start: int, end: int) -> Steps[None]:
        done = yield from self.host.ops.call("flush_remote_tlbs", vm=self, start=start, end=end)
        if not done:
            running = sum(vcpu.ran for vcpu in self.vcpus)
            self.host.meter.charge("tlb_flush_base")
            self.host.meter.charge("tlb_flush_per_cpu", running)
        for vcpu in self.vcpus:
            vcpu.tlb.flush(start, end)

    # ---- memslots ---------------------------------------------------------------------------------------------

    def set_memslot(self, old: Memslot | None, new: Memslot | None, change: Change) -> Steps[None]:
        """kvm_set_memslot, slots_lock held: install, delete, move, or change flags."""
        if change in (Change.DELETE, Change.MOVE):
            assert old is not None
            yield from self._invalidate_slot(old)
        try:
            if new is not None:
                self._prepare_slot(new, change)
            # The vendor comes last: what it allocates has nothing behind it that could still fail.
            yield from self.host.ops.call("memslot_prepare", vm=self, old=old, new=new, change=change)
        except UapiError:
            if old is not None:
                old.invalid = False
            raise
        # No invalidation by hva may see one set of slots where it begins and another where it ends.
        yield self.notifier_count.write
        self.slots.replace(old, new)
        yield self.notifier_count.release
        yield self.srcu.write
        yield self.srcu.release
        if change is Change.FLAGS_ONLY:
            assert old is not None and new is not None
            yield from self._apply_flags(old, new)
        if change is Change.DELETE:
            assert old is not None
            if old.gmem is not None:
                yield old.gmem.inode.invalidate_lock.write
                old.gmem.unbind(old)
                yield old.gmem.inode.invalidate_lock.release
            yield from self.host.ops.call("memslot_free", vm=self, slot=old)
        self.host.meter.charge("memslot_call")
        self.host.ops.emit(
            "memslot", change.value, vm=self.id,
            gfns=slice((new or old).base_gfn, (new or old).end_gfn, 1),  # type: ignore[union-attr]
        )

    def _prepare_slot(self, slot: Memslot, change: Change) -> None:
        """The core's own part of kvm_prepare_memory_region: tables, lpage_info, dirty bitmap."""
        try:
            self.tdp.cover(slot.end_gfn)
            if self.caps.private_by_attribute:
                self.attributes.cover(slot.end_gfn)
            if change in (Change.CREATE, Change.MOVE):
                slot.lpage = {}
                slot.alloc_lpage_info()
                self.attributes.init_slot(slot)
            if not slot.logs_dirty:
                slot.dirty = None
            elif slot.dirty is None:
                slot.dirty = zeros(slot.npages, np.uint8)
        except MemoryError:
            raise UapiError(errno.ENOMEM, "KVM_SET_USER_MEMORY_REGION2", "no memory for the slot's tables") from None

    def _invalidate_slot(self, slot: Memslot) -> Steps[None]:
        """Install the INVALID copy, wait for notifiers and readers, zap (kvm_invalidate_memslot)."""
        yield self.notifier_count.write
        slot.invalid = True
        yield self.notifier_count.release
        yield self.srcu.write
        yield self.srcu.release
        zapped = yield from invalidate.flush_slot(self, slot)
        yield from self.host.ops.call("memory_reclaimed", vm=self, nr_pages=zapped)

    def _apply_flags(self, old: Memslot, new: Memslot) -> Steps[None]:
        """Dirty logging goes on (split, write-protect) or off (huge pages come back)
        (kvm_mmu_slot_apply_flags, kvm_mmu_recover_huge_pages)."""
        root = self.tdp.direct
        locks = self.mmu_lock.covering(slice(new.base_gfn, new.end_gfn, 1))
        if new.logs_dirty and not old.logs_dirty:
            # Faults on the slot map small pages by now, so that all is small after one walk.
            yield from read(locks)
            if not root.flat:
                yield from self.split_huge_pages(root, new)
            yield from drop(locks)
            yield from write(locks)
            if (yield from self.tdp.protect(root, new, slice(new.base_gfn, new.end_gfn, 1))):
                yield from self.flush_tlbs(new.base_gfn, new.end_gfn)
            yield from drop(locks)
        elif old.logs_dirty and not new.logs_dirty:
            yield from read(locks)
            yield from self._recover(root, new)
            yield from drop(locks)

    def _recover(self, root: Root, slot: Memslot) -> Steps[None]:
        """Tables of a direct root that may be large again are replaced by huge leaves, then one flush."""
        if root.external or self.caps.max_shared_level < PG_LEVEL_2M:
            return
        recovered = False
        low, high = -(-slot.base_gfn // 512), slot.end_gfn >> 9
        for block in range(low, high):
            words = root.entries[PG_LEVEL_4K][block << 9 : (block + 1) << 9]
            present = np.flatnonzero(words & np.uint32(PRESENT))
            if not int(root.entries[PG_LEVEL_2M][block]) & TABLE or not len(present):
                continue
            if slot.lpage[PG_LEVEL_2M][block - (slot.base_gfn >> 9)]:
                continue
            gfn = (block << 9) + int(present[0])
            if slot.gmem_only or self.mm.resident_level(slot.hva_page + gfn - slot.base_gfn) < PG_LEVEL_2M:
                continue
            word = int(words[present[0]])
            pfn = word >> FRAME_SHIFT & ~511
            if self.caps.needs_pin:
                # A huge leaf would map pages that nobody pinned. The next fault pins, and maps them large
                # (in-place recovery came with v6.13; zapping is what the kernel did before).
                yield from self.tdp.zap_leaves(root, slot, block << 9, (block + 1) << 9)
            else:
                yield from self.tdp.collapse(root, block << 9, PG_LEVEL_2M, pfn, word & WRITABLE)
            recovered = True
        if recovered:
            yield from self.flush_tlbs(slot.base_gfn, slot.end_gfn)

    @operation
    def recover_huge_pages(self, nr_tables: int = 1 << 30) -> Steps[int]:
        """One pass of the recovery thread of the policy `merge`, over at most so many tables. Returns with how many it
        did something; 0 where the policy has no thread."""
        if self.dead or self.destroyed:
            return 0
        yield self.srcu.read
        done = yield from self.merge.recover(nr_tables)
        yield self.srcu.release
        self.host.ops.quiet(self)
        return done

    def split_huge_pages(self, root: Root, slot: Memslot, tables: TableCache | None = None) -> Steps[None]:
        """Split every large leaf of a slot, the largest first, before its pages are logged one by one (mmu_lock held,
        for write where the root is a mirror; kvm_mmu_slot_try_split_huge_pages). Leaves of a mirror keep their content,
        and take tables.
        """
        for level in (PG_LEVEL_1G, PG_LEVEL_2M):
            for found, index in list(root.leaves_in(slot.base_gfn, slot.end_gfn)):
                if found == level:
                    for at in array_of(index).tolist():
                        yield from self.tdp.split(root, at << order_of(level), level, tables)

    @operation
    def split_private_pages(self, slot: Memslot) -> Steps[None]:
        """`split_huge_pages` for the private pages of a slot: what the start of dirty logging will do to them once they
        can be logged. KVM refuses to log a slot with guest_memfd today, so no call of user space leads here."""
        root, locks = self.tdp.root_for(True), self.mmu_lock.covering(slice(slot.base_gfn, slot.end_gfn, 1))
        tables = TableCache(self.host.frames)
        while True:
            tables.topup(_tables_to_split(root, slot))
            yield from write(locks)
            if _tables_to_split(root, slot) <= count(tables.spare):
                break
            yield from drop(locks)
        yield from self.split_huge_pages(root, slot, tables)
        yield from drop(locks)
        tables.give_back()

    def get_dirty_log(self, slot: Memslot) -> Steps[npt.NDArray[np.uint8]]:
        """The slot's dirty bytes, cleared and write-protected again (kvm_vm_ioctl_get_dirty_log)."""
        assert slot.dirty is not None
        locks = self.mmu_lock.covering(slice(slot.base_gfn, slot.end_gfn, 1))
        yield from write(locks)
        log = slot.dirty.copy()
        slot.dirty[:] = 0
        dirty = np.flatnonzero(log)
        if len(dirty):
            span = slice(slot.base_gfn + int(dirty[0]), slot.base_gfn + int(dirty[-1]) + 1, 1)
            if (yield from self.tdp.protect(self.tdp.direct, slot, span)):
                yield from self.flush_tlbs(span.start, span.stop)
        yield from drop(locks)
        return log

    # ---- notifiers and files ----------------------------------------------------------------------------------

    def unmap_hva_range(self, hva_page: int, n: int, take_away: Steps[None]) -> Steps[None]:
        """The mmu notifier: the host takes pages of the VMM away; shared mappings go, guest_memfd has no hva. Without a
        mirror private mappings of these gfns go too, and fault in again."""
        if not self.caps.honours_notifiers or self.destroyed:
            yield from take_away
            return
        yield from holding(self.notifier_count, self._without_hva_range(hva_page, n, take_away), read=True)

    def _without_hva_range(self, hva_page: int, n: int, take_away: Steps[None]) -> Steps[None]:
        self.active_count += 1
        ranges = self.slots.in_hva_range(hva_page, n)
        opened, failed = False, None
        try:
            if ranges:
                kinds = self.host.contract.kinds(Cause.NOTIFIER, Filter.SHARED)
                callback = invalidate.callback_of(self, ranges, Cause.NOTIFIER)
                zapped = yield from invalidate.begin(self, ranges, kinds, callback=callback)
                opened = True
                yield from self.host.ops.call("memory_reclaimed", vm=self, nr_pages=zapped)
            yield from take_away
        except UapiError as error:
            failed = error
        if opened:
            yield from invalidate.end(self, ranges)
        self.active_count -= 1
        if failed is not None:
            raise failed

    def release(self) -> Steps[None]:
        """The VMM's address space goes away (kvm_flush_shadow_all): all direct roots are zapped, invalid ones included,
        without a flush, since no vCPU can run any more. A mirror stays: its pages are not the VMM's; a mediated root
        stays where its pages are pinned, and goes leaf by leaf where notifiers are honoured."""
        for vcpu in self.vcpus:
            vcpu.leave()
            vcpu.tlb.flush(0, 1 << 52)
        pages = 0
        if not self.tdp.direct.external:
            yield from write(self.mmu_lock.all)
            self.tdp.fast_zap()
            yield from drop(self.mmu_lock.all)
            yield from read(self.mmu_lock.all)
            for root in list(self.tdp.invalid):
                pages += root.pages_mapped
                self.tdp.drop_root(root)
            yield from drop(self.mmu_lock.all)
        elif self.caps.honours_notifiers:
            yield from write(self.mmu_lock.all)
            for slot in self.slots:
                pages += yield from self.tdp.zap_leaves(self.tdp.direct, slot, slot.base_gfn, slot.end_gfn)
            yield from drop(self.mmu_lock.all)
        yield from self.host.ops.call("memory_reclaimed", vm=self, nr_pages=pages)

    def gmem_release(self, file: GmemFile) -> Steps[None]:
        """The last reference to a guest_memfd file is gone. The memory goes with the inode's last file, after the VM's
        reference: by then there may be no VM any more (__fput: kvm_gmem_release, then evict)."""
        yield self.slots_lock.write
        yield from invalidate.release(file)
        yield self.slots_lock.release
        self.gmem_files.remove(file)
        yield from self.put()
        if not file.inode.files:
            yield from file.inode.truncate(0, file.inode.npages)

    def put(self) -> Steps[None]:
        """Drop a reference to the VM; the last one destroys it."""
        self.users -= 1
        if self.users == 0:
            yield from self._destroy()

    def _destroy(self) -> Steps[None]:
        """kvm_destroy_vm: keys out, notifier off, vCPUs, roots, external tables, vendor, slots."""
        ops = self.host.ops
        self.destroyed = True
        for vcpu in self.vcpus:
            vcpu.leave()
        yield from ops.call("vm_pre_destroy", vm=self)
        if self in self.mm.notifiers:
            self.mm.notifiers.remove(self)
        for vcpu in self.vcpus:
            yield from ops.call("vcpu_free", vcpu=vcpu)
        yield from write(self.mmu_lock.all)
        for root in [*self.tdp.roots(), *self.tdp.invalid]:
            for slot in self.slots:
                yield from self.tdp.zap_leaves(root, slot, slot.base_gfn, slot.end_gfn)
        yield from self.tdp.free_mirror()
        yield from drop(self.mmu_lock.all)
        yield from ops.call("vm_destroy", vm=self)
        for slot in list(self.slots):
            yield from ops.call("memslot_free", vm=self, slot=slot)
            self.slots.replace(slot, None)
        self.host.vms.remove(self)
        ops.emit("vm", "destroy", vm=self.id)
        if self.mirrored is not None:
            yield from self.mirrored.put()

    # ---- before the VM runs -----------------------------------------------------------------------------------

    def map_private(self, batch: Batch) -> Steps[None]:
        """kvm_tdp_mmu_map_private_pfn: map image pages, level 4K, before the VM runs. Anything but success is
        UapiError: EBUSY where the vendor asks for another try, else EIO."""
        root = self.tdp.root_for(True)
        tables = TableCache(self.host.frames)
        if root.mirror:
            tables.topup_walk(root, batch.gfns)
        locks = self.mmu_lock.covering(batch.gfns)
        yield from read(locks)
        linked, reason = yield from self.tdp.link_tables(root, PG_LEVEL_4K, batch.gfns, tables)
        free = linked == len(batch) and not np.count_nonzero(take(root.entries[PG_LEVEL_4K], batch.blocks))
        stop = None
        if free:
            stop = yield from self.tdp.map_leaves(root, batch, WRITABLE)
            reason = stop.reason if stop is not None else None
        yield from drop(locks)
        tables.give_back()
        mapped = 0 if not free else len(batch) if stop is None else stop.done
        if mapped and self.host.ops.observed:
            self.host.ops.emit("populate", "populate", vm=self.id, gfns=batch.part(0, mapped).all_gfns, n=mapped)
        if not free or stop is not None:
            error = errno.EBUSY if isinstance(reason, Retry) else errno.EIO
            raise UapiError(error, "kvm_tdp_mmu_map_private_pfn", f"gfn {first(batch.gfns):#x} could not be mapped")


def _tables_to_split(root: Root, slot: Memslot) -> int:
    """How many table pages it takes to split every large leaf of a slot of a mirror root; 0 for other roots."""
    if not root.mirror:
        return 0
    large = [(level, count(index)) for level, index in root.leaves_in(slot.base_gfn, slot.end_gfn)]
    return sum(n * (513 if level == PG_LEVEL_1G else 1) for level, n in large if level > PG_LEVEL_4K)
