"""KVM's vendor code for SEV, SEV-ES and SEV-SNP (kernel: arch/x86/kvm/svm/sev.c; demand pinning: RFC v1, Mar 2022).

The hooks. Untrusted, as are the modules below it: `commands` (launch, KVM_SEV_*), `pins` (demand pinning) and `host`
(what KVM keeps, and its calls of RMP and firmware). One object serves all three VM types of a Host; it keeps which
ASIDs of the machine are used, and each VM's context is a `SevVm`, at `vm.arch`.
"""

from __future__ import annotations

import errno
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cvmcore.backend import Backend, Option
from cvmcore.effects import Steps
from cvmcore.errors import UapiError
from cvmcore.hookspecs import API_VERSION, hookimpl
from cvmcore.pages import (
    EMPTY,
    Sel,
    array_of,
    contiguous,
    count,
    expand,
    first,
    last,
    leading,
    part,
    run,
    take,
    where,
)
from cvmcore.types import (
    PAGE_BYTES,
    PAGE_SHIFT,
    PAGES_2M,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    Access,
    Batch,
    Capabilities,
    Change,
    ConvertResult,
    Done,
    Exit,
    Fatal,
    HostMode,
    HostVerdict,
    HostView,
    InstallResult,
    Mismatch,
    Refault,
    SlotView,
    Stopped,
    VcpuView,
    VmView,
    Walk,
)
from cvmcore_sev.commands import launch_finish, launch_update, sev_mem_enc_ioctl
from cvmcore_sev.cost import CHARGES, PROFILES
from cvmcore_sev.errors import RmpStatus
from cvmcore_sev.ghcb import MAX_ENTRIES, fill, split_2m
from cvmcore_sev.host import (
    SEV_ES_TYPE,
    SEV_TYPE,
    SNP_TYPE,
    AsidPool,
    Region,
    SevVm,
    VcpuState,
    not_a_mirror,
    rmp_make_shared,
    rmpupdate,
    sev_issue_cmd,
    snp_page_reclaim,
    snp_rmptable_psmash,
    snp_safe_alloc_page,
    wbinvd_on_all_cpus,
)
from cvmcore_sev.hw import Answer, SevHardware
from cvmcore_sev.launch import BSP_EIP, vmsa_page, with_features
from cvmcore_sev.pins import PinMetadata, sev_pin_memory, sev_pin_pfn, sev_unpin_memory

MAX_ASID: Final = 509
MIN_SEV_ASID: Final = 100
_INT_MAX: Final = 2**31 - 1


# ---- answers of the hardware, as the core wants them ------------------------------------------------------------

_ACCESS: Final[dict[RmpStatus, Walk]] = {
    RmpStatus.OK: Walk.OK,
    RmpStatus.NPF_RMP: Walk.MISMATCH,
    RmpStatus.NPF_SIZEM: Walk.MISMATCH,
    RmpStatus.VC: Walk.UNACCEPTED,
    RmpStatus.NPF_VMPL: Walk.DENIED,
}
_PVALIDATE: Final[dict[RmpStatus, Walk]] = {
    RmpStatus.OK: Walk.OK,
    RmpStatus.NPF_RMP: Walk.MISMATCH,
    RmpStatus.NPF_SIZEM: Walk.MISMATCH,  # PSMASH mends it, in after_fault
    RmpStatus.FAIL_SIZEMISMATCH: Walk.SMALLER,
    RmpStatus.NO_CHANGE: Walk.DENIED,  # the guest takes it for an attack
    RmpStatus.FAIL_INPUT: Walk.DENIED,
    RmpStatus.FAIL_PERMISSION: Walk.DENIED,
}
_GUEST_STOPS: Final = (
    RmpStatus.FAIL_INPUT, RmpStatus.FAIL_PERMISSION, RmpStatus.NO_CHANGE, RmpStatus.FAIL_SIZEMISMATCH,
)  # fmt: skip
"""Where a guest that validates pages in order does something else first: it panics, or it goes on in 4K."""
_PVALIDATE_FAULTS: Final = (RmpStatus.NPF_RMP, RmpStatus.NPF_SIZEM)
"""Where PVALIDATE does not end: KVM hears of it, and the guest tries again."""
_PVALIDATE_GOES_ON: Final = (RmpStatus.OK, *_PVALIDATE_FAULTS)
_RESCIND_STOPS: Final = (*_PVALIDATE_FAULTS, RmpStatus.FAIL_INPUT, RmpStatus.FAIL_PERMISSION)
"""Where a guest that rescinds pages in order does not go on; in 4K a wrong size is another."""


def _lookup(table: dict[RmpStatus, Walk]) -> npt.NDArray[np.uint8]:
    lookup = np.full(256, Walk.DENIED, np.uint8)
    for status, walk in table.items():
        lookup[status] = walk
    return lookup


_ACCESS_LOOKUP: Final = _lookup(_ACCESS)
_PVALIDATE_LOOKUP: Final = _lookup(_PVALIDATE)


def _access(answer: Answer, lookup: npt.NDArray[np.uint8], pfns: Sel) -> Access:
    if isinstance(answer, int):
        return Access(int(lookup[answer]), pfns)
    return Access(lookup.take(answer), pfns)


def _before_stop(answer: Answer, n: int, small: bool = False) -> tuple[int, int]:
    """How many of n pages were rescinded before one that stops the guest, and the status that does (OK: none)."""
    codes = np.full(n, answer, np.uint8) if isinstance(answer, int) else answer
    if not np.count_nonzero(codes):
        return n, RmpStatus.OK
    stops = np.isin(codes, _RESCIND_STOPS) | (small & (codes == RmpStatus.FAIL_SIZEMISMATCH))
    done = leading(~stops)
    return done, int(codes[done]) if done < n else RmpStatus.OK


def _all(levels: int | npt.NDArray[np.uint8], level: int) -> bool:
    return isinstance(levels, int) and levels == level


class AmdSev:
    """The hooks of all three VM types."""

    def __init__(self) -> None:
        self.asids = AsidPool(MAX_ASID, MIN_SEV_ASID)

    # ---- the machine and its hardware -----------------------------------------------------------------------

    @hookimpl
    def host_init(self, host: HostView) -> None:
        """sev_hardware_setup, with SNP and all of its firmware initialized."""
        max_asid = int(host.options.get("max_asid", MAX_ASID))
        min_sev_asid = int(host.options.get("min_sev_asid", MIN_SEV_ASID))
        self.asids = AsidPool(max_asid, min_sev_asid)
        host.hw = SevHardware(host.memory, max_asid=max_asid, min_sev_asid=min_sev_asid)

    @hookimpl
    def capabilities(self, vm_type: str, options: dict[str, Any]) -> Capabilities:
        """SNP: private memory by attribute in guest_memfd. SEV, SEV-ES: ordinary memory, encrypted where it lies."""
        if vm_type == SNP_TYPE:
            return Capabilities(
                private_by_attribute=True,
                needs_accept=True,
                confidential=True,
                encrypts=True,
                fresh_is_zero=False,
                max_private_level=PG_LEVEL_2M,
            )
        return Capabilities(
            converts_in_place=True,
            needs_pin=options.get("pinning", "demand") == "demand",
            confidential=True,
            encrypts=True,
            fresh_is_zero=False,
            gmem_backed=False,
        )

    # ---- VMs --------------------------------------------------------------------------------------------------

    @hookimpl
    def vm_init(self, vm: VmView) -> Steps[None]:
        """Take an ASID (KVM does it at KVM_SEV_INIT2, which here only checks and records)."""
        if vm.vm_type not in PROFILES:
            raise UapiError(errno.EINVAL, "KVM_CREATE_VM", f"there is no VM type '{vm.vm_type}' here")
        asids = self.asids.range_of(vm.vm_type)
        call = "KVM_SEV_INIT2"
        if not asids:
            raise UapiError(errno.ENOTTY, call, f"the host has no ASIDs for {vm.vm_type} guests")
        asid = self.asids.take(asids)
        if not asid and not self.asids.reclaim.isdisjoint(asids):
            wbinvd_on_all_cpus(vm.host)
            if not (yield from sev_issue_cmd(vm.host, "DF_FLUSH", vm.host.hw.psp.df_flush.steps())):
                self.asids.recycle()
                asid = self.asids.take(asids)
        if not asid:
            raise UapiError(errno.EBUSY, call, f"all ASIDs for {vm.vm_type} guests are used")
        vm.arch = SevVm(vm.vm_type, asid, demand=vm.caps.needs_pin, vmsa_features=1 if vm.vm_type == SNP_TYPE else 0)
        vm.key = asid
        if vm.vm_type == SNP_TYPE:
            vm.pre_fault_allowed = False

    @hookimpl
    def vm_move(self, source: VmView, target: VmView) -> None:
        """KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM: the target gives its own ASID back and takes over the source's context."""
        call = "KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM"
        old: SevVm = target.arch
        moved: SevVm = source.arch
        if source is target or source.vm_type != target.vm_type or moved is None or old is None:
            raise UapiError(errno.EINVAL, call, "the VMs are the same, or of different types")
        if moved.mirrors is not None or moved.nr_mirrors:
            raise UapiError(errno.EINVAL, call, "moving mirrors, and what they mirror, is not modelled")
        if moved.snp or old.started or not moved.started:
            raise UapiError(errno.EINVAL, call, "the source has no context to give, or the target has one already")
        if moved.es and len(source.vcpus) != len(target.vcpus):
            raise UapiError(errno.EINVAL, call, "the VMs differ in their number of vCPUs")
        if moved.es and not all(vcpu.arch.protected for vcpu in source.vcpus):
            raise UapiError(errno.EINVAL, call, "a save area of the source is not the guest's yet")
        target.charge_memlock(moved.nr_registered, call)
        source.charge_memlock(-moved.nr_registered, call)
        target.arch, target.key = moved, moved.asid
        source.arch, source.key = SevVm(source.vm_type, 0, old.demand), 0
        if moved.es:
            for here, there in zip(source.vcpus, target.vcpus, strict=True):
                target.host.frames.free(run(there.arch.vmsa_pfn, 1))
                here.arch, there.arch = None, here.arch
        self.asids.used.discard(old.asid)

    @hookimpl
    def vm_copy(self, source: VmView, target: VmView) -> None:
        """sev_vm_copy_enc_context_from: the target shares ASID and key. No mirrors of mirrors, no vCPUs in the target,
        and no context that it has begun itself. SNP is refused: its guest context page names one VM."""
        call = "KVM_CAP_VM_COPY_ENC_CONTEXT_FROM"
        old: SevVm = target.arch
        owner: SevVm = source.arch
        if source is target or source.vm_type != target.vm_type or owner.snp or owner.mirrors is not None:
            raise UapiError(errno.EINVAL, call, "the source is the VM itself, of another type, SNP, or a mirror")
        if old.started or old.initialized or old.mirrors is not None or target.vcpus:
            raise UapiError(errno.EINVAL, call, "the VM has vCPUs, or a context of its own")
        self.asids.used.discard(old.asid)
        target.arch = SevVm(
            target.vm_type, owner.asid, old.demand, initialized=True, handle=owner.handle, policy=owner.policy,
            vmsa_features=owner.vmsa_features, finished=owner.finished, mirrors=owner,
        )  # fmt: skip
        target.key = source.key
        owner.nr_mirrors += 1

    @hookimpl
    def vm_destroy(self, vm: VmView) -> Steps[None]:
        """sev_vm_destroy: pins, then the guest's context, then the ASID; what the firmware keeps is leaked."""
        arch: SevVm | None = vm.arch
        if arch is None or not arch.asid:
            return
        if arch.mirrors is not None:
            # Nothing of the context is the mirror's own.
            arch.mirrors.nr_mirrors -= 1
            return
        host = vm.host
        wbinvd_on_all_cpus(host)
        for region in arch.regions:
            sev_unpin_memory(host, region.pfns)
        vm.charge_memlock(-arch.nr_registered, "vm_destroy")
        arch.nr_registered = 0
        sev_unpin_memory(host, arch.early_pins)
        arch.regions, arch.early_pins = [], []
        if arch.gctx_pfn:
            steps = host.hw.psp.snp_decommission.steps(arch.gctx_pfn)
            status = yield from sev_issue_cmd(host, "SNP_DECOMMISSION", steps)
            if status:
                host.frames.leak(run(arch.gctx_pfn, 1), f"SNP_DECOMMISSION: {status.name}; its ASID {arch.asid} too")
                return
            if (yield from snp_page_reclaim(host, run(arch.gctx_pfn, 1))):
                host.frames.free(run(arch.gctx_pfn, 1))
        elif arch.handle:
            yield from sev_issue_cmd(host, "DEACTIVATE", host.hw.psp.deactivate.steps(arch.handle))
            yield from sev_issue_cmd(host, "DECOMMISSION", host.hw.psp.decommission.steps(arch.handle))
        self.asids.reclaim.add(arch.asid)
        arch.asid = 0

    # ---- vCPUs ------------------------------------------------------------------------------------------------

    @hookimpl
    def vcpu_create(self, vcpu: VcpuView) -> None:
        """SEV-ES, SNP: a page for the save area, with the state that user space is taken to have set."""
        arch: SevVm = vcpu.vm.arch
        if arch.vm_type == SEV_TYPE:
            return
        eip = BSP_EIP if vcpu.id == 0 else arch.ap_eip
        vmsa = vcpu.state or vmsa_page(eip=eip, signature=arch.signature)
        if len(vmsa) != PAGE_BYTES:
            raise UapiError(errno.EINVAL, "KVM_CREATE_VCPU", f"a save area has {PAGE_BYTES} bytes, not {len(vmsa)}")
        vmsa = with_features(vmsa, arch.vmsa_features)
        vcpu.arch = VcpuState(snp_safe_alloc_page(vcpu.vm.host), vmsa)

    @hookimpl
    def vcpu_enter(self, vcpu: VcpuView) -> None:
        """pre_sev_run: a vCPU with encrypted registers runs from a save area that the firmware has taken in."""
        state: VcpuState | None = vcpu.arch
        if vcpu.vm.arch.vm_type != SEV_TYPE and (state is None or not state.protected):
            raise UapiError(errno.EINVAL, "KVM_RUN", "the vCPU's save area is none of the guest's: launch it first")

    @hookimpl
    def vcpu_free(self, vcpu: VcpuView) -> None:
        """sev_free_vcpu: the save area goes back; one that the hardware keeps is leaked."""
        state: VcpuState | None = vcpu.arch
        if state is None:
            return
        host, page = vcpu.vm.host, run(state.vmsa_pfn, 1)
        vcpu.arch = None
        if host.hw.rmp.assigned(page) and count(rmp_make_shared(host, page)):
            host.frames.leak(page, "a vCPU's save area stays with the guest")
            vcpu.vm.bug("RMPUPDATE refuses to make a save area shared")
            return
        host.meter.charge("cacheline_flush_4k", int(state.protected))
        host.frames.free(page)

    # ---- memslots: demand pinning -------------------------------------------------------------------------------

    @hookimpl
    def memslot_prepare(self, vm: VmView, old: SlotView | None, new: SlotView | None, change: Change) -> None:
        """alloc_memslot_metadata: the pins of a new slot; a moved or changed one takes over the old."""
        if new is None or not vm.arch.demand:
            return
        if change is not Change.CREATE and old is not None:
            new.arch = old.arch
            return
        try:
            new.arch = PinMetadata(new.npages)
        except MemoryError:
            raise UapiError(errno.ENOMEM, "KVM_SET_USER_MEMORY_REGION", "no memory for the slot's pins") from None

    @hookimpl
    def memslot_free(self, vm: VmView, slot: SlotView) -> None:
        """free_memslot: the only place where demand pins end. Caches first, once."""
        metadata: PinMetadata | None = slot.arch
        if metadata is None:
            return
        slot.arch = None
        flushed = False
        for pfns, level in metadata.held():
            if not flushed:
                wbinvd_on_all_cpus(vm.host)
                flushed = True
            sev_unpin_memory(vm.host, [pfns], level)

    @hookimpl
    def pin_pfn(self, vm: VmView, batch: Batch, write: bool) -> InstallResult:
        """Pin one page, the head, of every mapping; a frame that another replaces is flushed and unpinned first."""
        return sev_pin_pfn(vm, batch)

    # ---- encrypted regions: pinning up front --------------------------------------------------------------------

    @hookimpl
    def register_region(self, vm: VmView, hva: int, size_bytes: int) -> None:
        """sev_mem_enc_register_region: account, and unless pages are pinned on demand, pin them all now."""
        call = "KVM_MEMORY_ENCRYPT_REG_REGION"
        arch: SevVm = vm.arch
        not_a_mirror(arch, call)
        if size_bytes <= 0 or hva < 0 or hva + size_bytes >= 1 << 64:
            raise UapiError(errno.EINVAL, call, "the size is 0, or the range wraps")
        nr_pages = ((hva + size_bytes - 1) >> PAGE_SHIFT) - (hva >> PAGE_SHIFT) + 1
        vm.charge_memlock(nr_pages, call)
        try:
            if nr_pages > _INT_MAX:
                raise UapiError(errno.EINVAL, call, "more pages than one call can pin")
            pfns: tuple[Sel, ...] = () if arch.demand else sev_pin_memory(vm, hva, size_bytes, call)
        except UapiError:
            vm.charge_memlock(-nr_pages, call)
            raise
        arch.nr_registered += nr_pages
        if not arch.demand:
            arch.regions.append(Region(hva, size_bytes, nr_pages, pfns))

    @hookimpl
    def unregister_region(self, vm: VmView, hva: int, size_bytes: int) -> None:
        """sev_mem_enc_unregister_region: exactly a registered region; on demand pinning only the account shrinks."""
        call = "KVM_MEMORY_ENCRYPT_UNREG_REGION"
        arch: SevVm = vm.arch
        not_a_mirror(arch, call)
        if arch.demand:
            if size_bytes <= 0 or hva < 0 or hva + size_bytes >= 1 << 64:
                raise UapiError(errno.EINVAL, call, "the size is 0, or the range wraps")
            nr_pages = ((hva + size_bytes - 1) >> PAGE_SHIFT) - (hva >> PAGE_SHIFT) + 1
            nr_pages = min(nr_pages, arch.nr_registered)
        else:
            region = next((r for r in arch.regions if (r.hva, r.size_bytes) == (hva, size_bytes)), None)
            if region is None:
                raise UapiError(errno.EINVAL, call, "there is no region of this address and size")
            wbinvd_on_all_cpus(vm.host)
            sev_unpin_memory(vm.host, region.pfns)
            arch.regions.remove(region)
            nr_pages = region.nr_pages
        arch.nr_registered -= nr_pages
        vm.charge_memlock(-nr_pages, call)

    @hookimpl
    def memory_reclaimed(self, vm: VmView) -> None:
        """sev_guest_memory_reclaimed: the host cannot flush the guest's cache lines by address. SNP: not by hva."""
        if not vm.arch.snp:
            wbinvd_on_all_cpus(vm.host)

    # ---- launch and commands: in `commands` ---------------------------------------------------------------------

    @hookimpl
    def launch_update(self, vm: VmView, batch: Batch, contents: list[bytes], kind: str) -> Steps[InstallResult]:
        """SNP: sev_gmem_post_populate of each page. SEV, SEV-ES: sev_launch_update_data of the VMM's memory."""
        return (yield from launch_update(vm, batch, contents, kind))

    @hookimpl
    def launch_finish(self, vm: VmView) -> Steps[None]:
        """All that is left of a launch: start, save areas, measurement, finish."""
        yield from launch_finish(vm)

    @hookimpl
    def memory_encrypt_op(self, vm: VmView, command: str, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        """sev_mem_enc_ioctl: one KVM_SEV_* command."""
        return (yield from sev_mem_enc_ioctl(vm, command, arguments))

    # ---- SNP: private memory ------------------------------------------------------------------------------------

    @hookimpl
    def gmem_prepare(self, vm: VmView, gfns: Sel, pfns: Sel, max_order: int) -> InstallResult:
        """sev_gmem_prepare: unassigned frames become the guest's, 2M at once where folio and RMP allow it."""
        arch: SevVm = vm.arch
        if not arch.snp:
            return None
        rmp = vm.host.hw.rmp
        assigned = rmp.assigned(pfns)
        if assigned is True:
            return None
        positions = None
        if assigned is not False:
            positions = np.flatnonzero(~assigned)
            gfns, pfns = where(gfns, ~assigned), contiguous(array_of(pfns)[positions])
        if max_order >= 9:
            return self._prepare_2m(vm, gfns, pfns, positions)
        done = rmpupdate(vm.host, pfns, gfns, assigned=True, asid=arch.asid)
        return self._prepared(done, count(pfns), positions)

    def _prepared(self, done: int, n: int, positions: npt.NDArray[np.int64] | None) -> InstallResult:
        if done == n:
            return None
        done = done if positions is None else int(positions[done])
        return Stopped(done, Fatal(errno.EINVAL, "RMPUPDATE refuses the page"))

    def _prepare_2m(
        self, vm: VmView, gfns: Sel, pfns: Sel, positions: npt.NDArray[np.int64] | None
    ) -> InstallResult:
        """The first page of a block that may be large takes the whole block; pages of other blocks go one by one."""
        arch: SevVm = vm.arch
        rmp = vm.host.hw.rmp
        p, g = array_of(pfns), array_of(gfns)
        block, at, inverse = np.unique(p >> 9, return_index=True, return_inverse=True)
        whole = ~rmp.hpage_region_status(block << 9) & ((block + 1) << 9 <= vm.host.nr_frames)
        whole &= (p[at] & 511) == (g[at] & 511)
        leads = np.zeros(len(p), bool)
        leads[at[whole]] = True
        small = ~whole[inverse]
        if not np.count_nonzero(small):
            order = np.flatnonzero(leads)
            done = rmpupdate(
                vm.host, contiguous(p[order] & ~511, PAGES_2M), contiguous(g[order] & ~511, PAGES_2M),
                level=PG_LEVEL_2M, assigned=True, asid=arch.asid,
            )
            return self._prepared(int(order[done]) if done < len(order) else len(p), len(p), positions)
        start = 0
        todo = leads | small
        for i in np.flatnonzero(np.diff(small.astype(np.int8), append=2)).tolist():
            chosen = np.arange(start, i + 1)[todo[start : i + 1]]
            if len(chosen):
                large = bool(leads[chosen[0]])
                mask = ~511 if large else ~0
                step = PAGES_2M if large else 1
                done = rmpupdate(
                    vm.host, contiguous(p[chosen] & mask, step), contiguous(g[chosen] & mask, step),
                    level=PG_LEVEL_2M if large else PG_LEVEL_4K, assigned=True, asid=arch.asid,
                )
                if done < len(chosen):
                    return self._prepared(int(chosen[done]), len(p), positions)
            start = i + 1
        return None

    @hookimpl
    def max_mapping_level(self, vm: VmView, pfns: Sel, private: bool) -> int:
        """sev_gmem_max_mapping_level: an NPT mapping is never larger than the RMP's page."""
        if not vm.arch.snp or not private or not count(pfns):
            return 0
        rmp = vm.host.hw.rmp
        if rmp.levels(run(first(pfns), 1)) == PG_LEVEL_4K:
            return PG_LEVEL_4K
        return PG_LEVEL_2M if _all(rmp.levels(pfns), PG_LEVEL_2M) else PG_LEVEL_4K

    @hookimpl
    def after_fault(self, vm: VmView, pfns: Sel) -> Steps[bool]:
        """sev_handle_rmp_fault: break the RMP's 2M page that the guest uses in 4K; spurious where it is 4K already, or
        not assigned. A mapping that is larger than its entry is the common fault path's, which has split it by now."""
        rmp = vm.host.hw.rmp
        if not vm.arch.snp or not count(pfns):
            return False
        levels = rmp.levels(pfns)
        if _all(levels, PG_LEVEL_4K):
            return False
        pages = array_of(pfns) if isinstance(levels, int) else array_of(pfns)[levels == PG_LEVEL_2M]
        yield from snp_rmptable_psmash(vm.host, contiguous(np.unique(pages & ~(PAGES_2M - 1)), PAGES_2M))
        return True

    @hookimpl
    def gmem_invalidate(self, host: HostView, pfns: Sel) -> Steps[Sel]:
        """sev_gmem_invalidate: frames leave a guest_memfd and go back to the hypervisor, or are leaked."""
        rmp = host.hw.rmp
        assigned = rmp.assigned(pfns)
        if assigned is False:
            return pfns
        owned = pfns if assigned is True else where(pfns, assigned)
        host.meter.charge("cacheline_flush_4k", count(owned))
        lost: Sel = EMPTY
        if not _all(rmp.levels(owned), PG_LEVEL_4K):
            owned, lost = yield from self._invalidate_2m(host, owned)
        refused = np.union1d(array_of(rmp_make_shared(host, owned)), array_of(lost))
        if not len(refused):
            return pfns
        host.frames.leak(contiguous(refused), "RMPUPDATE refuses to make a guest_memfd page shared")
        return where(pfns, ~np.isin(array_of(pfns), refused))

    def _invalidate_2m(self, host: HostView, pfns: Sel) -> Steps[tuple[Sel, Sel]]:
        """2M entries wholly in the range go at once, others are smashed. Returns 4K pages left, and refused ones."""
        levels = host.hw.rmp.levels(pfns)
        pages = array_of(pfns)
        large = pages if isinstance(levels, int) else pages[levels == PG_LEVEL_2M]
        region, size = np.unique(large >> 9, return_counts=True)
        whole = region[size == PAGES_2M]
        refused = rmp_make_shared(host, contiguous(whole << 9, PAGES_2M), PG_LEVEL_2M)
        parts = region[size != PAGES_2M]
        yield from snp_rmptable_psmash(host, contiguous(parts << 9, PAGES_2M))
        lost = array_of(expand(refused, 9))
        if not _all(levels := host.hw.rmp.levels(contiguous(parts << 9)), PG_LEVEL_4K):
            # What is still part of a 2M page cannot be taken back alone: RMPUPDATE would overlap for ever.
            large = parts if isinstance(levels, int) else parts[levels == PG_LEVEL_2M]
            whole, lost = np.concatenate([whole, large]), np.union1d(lost, pages[np.isin(pages >> 9, large)])
        return contiguous(pages[~np.isin(pages >> 9, whole)]), contiguous(lost)

    # ---- what guests do -----------------------------------------------------------------------------------------

    @hookimpl
    def guest_accept(self, vm: VmView, gfns: Sel, pfns: Sel, level: int) -> Access:
        """PVALIDATE of each page, by the guest."""
        answer = vm.host.hw.rmp.pvalidate(pfns, gfns, asid=vm.key, validate=True, level=level, stop_at=_GUEST_STOPS)
        n = count(gfns)
        if not isinstance(answer, int):
            n -= int(np.count_nonzero((answer >= RmpStatus.NPF_RMP) & (answer != RmpStatus.NO_CHANGE)))
        vm.host.meter.op("PVALIDATE", "pvalidate_2m" if level == PG_LEVEL_2M else "pvalidate_4k", n)
        return _access(answer, _PVALIDATE_LOOKUP, pfns)

    @hookimpl
    def guest_access(
        self, vm: VmView, gfns: Sel, pfns: Sel, level: int, write: bool, private: bool
    ) -> Access:
        """The RMP's check of an access that the nested page table allows."""
        rmp = vm.host.hw.rmp
        if private and vm.arch.snp:
            access = "write" if write else "read"
            answer = rmp.check_private(pfns, gfns, asid=vm.key, level=level, access=access)
        else:
            answer = rmp.check_shared(pfns, write, level)
        return _access(answer, _ACCESS_LOOKUP, pfns)

    @hookimpl
    def guest_convert(self, vm: VmView, gfns: Sel, private: bool, begun: int) -> ConvertResult:
        """SNP, to shared: the guest rescinds its pages, then asks; to private it asks, and validates them later.

        SEV, SEV-ES: the guest has changed its page table's C-bit, and only tells (KVM_HC_MAP_GPA_RANGE).
        """
        if not vm.arch.snp:
            return Exit(count(gfns))
        if not private and (faulted := self._rescind(vm, gfns, begun)):
            return faulted
        if vm.host.options.get("psc") == "msr":
            vm.host.meter.op("SNP_PSC_MSR", "psc_call", count(gfns))
            vm.host.meter.charge("psc_entry", count(gfns))
            return Exit(count(gfns), count(gfns))
        entries, exits = fill(gfns)
        vm.host.meter.op("SNP_PSC", "psc_call", -(-entries // MAX_ENTRIES))
        vm.host.meter.charge("psc_entry", entries)
        return Exit(count(gfns), exits)

    def _rescind(self, vm: VmView, gfns: Sel, begun: int) -> Refault | Mismatch | Done | None:
        """PVALIDATE(0) of all but the `begun` first pages, in order. Where one is not mapped, or faults in the RMP, the
        guest goes on from there once that is mended; where the instruction fails it ends (sev_es_terminate)."""
        rest = part(gfns, begun, count(gfns))
        n = count(rest)
        status, pfns, _ = vm.walk(rest, True)
        if isinstance(status, int):
            mapped, missing = (n, 0) if status == Walk.OK else (0, n)
        else:
            mapped = leading(status == Walk.OK)
            missing = leading(status[mapped:] != Walk.OK)
        done, stops = self._rescind_mapped(vm, part(rest, 0, mapped), part(pfns, 0, mapped))
        begun += done
        if stops:
            return Mismatch(first(part(rest, done, n)), begun) if stops in _PVALIDATE_FAULTS else Done(0)
        if missing:
            return Refault(first(part(rest, mapped, n)), pages=missing, begun=begun)
        return None

    def _rescind_mapped(self, vm: VmView, gfns: Sel, pfns: Sel) -> tuple[int, int]:
        """4K pages before whole 2M blocks, the blocks, 4K pages behind. Returns how many before one that stops the
        guest, and the status that does; OK where none does."""
        n = count(gfns)
        large, _ = split_2m(gfns)
        if not count(large):
            return self._rescind_4k(vm, gfns, pfns)
        low, high = first(large) - first(gfns), last(large) + PAGES_2M - first(gfns)
        done, stops = self._rescind_4k(vm, part(gfns, 0, low), part(pfns, 0, low))
        if not stops:
            more, stops = self._rescind_2m(vm, large, part(gfns, low, high), part(pfns, low, high))
            done += more
        if not stops:
            more, stops = self._rescind_4k(vm, part(gfns, high, n), part(pfns, high, n))
            done += more
        return done, stops

    def _rescind_2m(self, vm: VmView, large: Sel, gfns: Sel, pfns: Sel) -> tuple[int, int]:
        """PVALIDATE(0) of blocks, and in 4K of those that the RMP has as small pages. Returns as `_rescind_mapped`."""
        frames = contiguous(array_of(pfns)[::PAGES_2M], PAGES_2M)
        answer = vm.host.hw.rmp.pvalidate(
            frames, large, asid=vm.key, validate=False, level=PG_LEVEL_2M, stop_at=_RESCIND_STOPS
        )
        done, stops = _before_stop(answer, count(large))
        vm.host.meter.op("PVALIDATE", "pvalidate_2m", done + (stops not in _PVALIDATE_GOES_ON))
        if not isinstance(answer, int):
            fallen = np.flatnonzero(answer[:done] == RmpStatus.FAIL_SIZEMISMATCH)
            small = array_of(expand(contiguous(fallen << 9, PAGES_2M), 9))
            if len(small):
                some = contiguous(array_of(gfns)[small]), contiguous(array_of(pfns)[small])
                fine, stops_in_4k = self._rescind_4k(vm, *some)
                if stops_in_4k:
                    return int(small[fine]), stops_in_4k
        return done << 9, stops

    def _rescind_4k(self, vm: VmView, gfns: Sel, pfns: Sel) -> tuple[int, int]:
        """PVALIDATE(0) in 4K. Returns as `_rescind_mapped`.

        NO_CHANGE is fine here: a page that was not validated is as shared as it can be.
        """
        n = count(gfns)
        if not n:
            return 0, RmpStatus.OK
        stop_at = (*_RESCIND_STOPS, RmpStatus.FAIL_SIZEMISMATCH)
        answer = vm.host.hw.rmp.pvalidate(pfns, gfns, asid=vm.key, validate=False, stop_at=stop_at)
        done, stops = _before_stop(answer, n, small=True)
        vm.host.meter.op("PVALIDATE", "pvalidate_4k", done + (stops not in _PVALIDATE_GOES_ON))
        return done, stops

    @hookimpl
    def host_access(self, host: HostView, pfns: Sel, write: bool, mode: HostMode) -> HostVerdict:
        """The host's own accesses: writes to a guest's page fault, reads of one return ciphertext."""
        answer = host.hw.rmp.check_host(pfns, write)
        if not isinstance(answer, int) or answer:
            return HostVerdict.OWNER_FAULT
        if not write and np.count_nonzero(take(host.memory.key, pfns)):
            return HostVerdict.CIPHERTEXT
        return HostVerdict.OK


_ASIDS: Final = (
    Option("max_asid", MAX_ASID, "highest ASID of the machine"),
    Option("min_sev_asid", MIN_SEV_ASID, "lowest ASID for SEV guests; those below are for SEV-ES and SNP"),
)
_PINNING: Final = Option(
    "pinning", "demand", "pin memory when its region is registered, or when the guest's pages are mapped",
    ("upfront", "demand"),
)

_PSC: Final = Option(
    "psc", "buffer", "how the guest asks for page state changes: up to 253 entries in a buffer, or page by page",
    ("buffer", "msr"),
)


def _backend(name: str, summary: str, options: tuple[Option, ...]) -> Backend:
    profile, kvm_type = PROFILES[name], KVM_TYPES[name]
    return Backend(name, "amd-sev", name, summary, API_VERSION, AmdSev, profile, CHARGES, options, kvm_type)


KVM_TYPES = {SEV_TYPE: 2, SEV_ES_TYPE: 3, SNP_TYPE: 4}
"""KVM_X86_SEV_VM, KVM_X86_SEV_ES_VM, KVM_X86_SNP_VM."""

SEV = _backend(SEV_TYPE, "AMD SEV: memory encrypted where it lies, every guest page pinned", (_PINNING, *_ASIDS))
SEV_ES = _backend(SEV_ES_TYPE, "AMD SEV-ES: SEV with encrypted registers", (_PINNING, *_ASIDS))
SNP = _backend(SNP_TYPE, "AMD SEV-SNP: private memory in guest_memfd, owned through the RMP", (_PSC, *_ASIDS))
