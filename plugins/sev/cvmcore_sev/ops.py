"""KVM's vendor code for SEV, SEV-ES and SEV-SNP (kernel: arch/x86/kvm/svm/sev.c; demand pinning: RFC v1, Mar 2022).

Untrusted, and the only caller of `hw`. One object serves all three VM types of a Host; what it keeps is what the
kernel keeps for the machine (which ASIDs are used) and for each VM (`SevVm`, at `vm.arch`).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Final

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.backend import Backend, Option
from cvmcore.effects import Steps, point
from cvmcore.errors import InvariantViolation, UapiError
from cvmcore.hookspecs import API_VERSION, hookimpl
from cvmcore.pages import (
    EMPTY,
    PIECE_RUN,
    Sel,
    Words,
    array_of,
    contiguous,
    count,
    expand,
    first,
    last,
    part,
    run,
    take,
    where,
    zeros,
)
from cvmcore.types import (
    PAGE_BYTES,
    PAGE_SHIFT,
    PAGES_2M,
    PG_LEVEL_1G,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    Access,
    Batch,
    Capabilities,
    Change,
    ConvertResult,
    Exit,
    Fatal,
    HostMode,
    HostVerdict,
    HostView,
    InstallResult,
    Refault,
    SlotView,
    Stopped,
    Use,
    VcpuView,
    VmView,
    Walk,
    order_of,
    pages_per_level,
)
from cvmcore_sev.cost import CHARGES, PROFILES
from cvmcore_sev.errors import RmpStatus, SevStatus
from cvmcore_sev.ghcb import MAX_ENTRIES, fill, split_2m
from cvmcore_sev.hw import POLICY_ES, VMSA_GFN, Answer, SevHardware
from cvmcore_sev.launch import BSP_EIP, CPUS, PAGE_TYPES, vmsa_page, with_features

SEV_TYPE, SEV_ES_TYPE, SNP_TYPE = "sev", "sev-es", "snp"
MAX_ASID: Final = 509
MIN_SEV_ASID: Final = 100
_INT_MAX: Final = 2**31 - 1
RMP_IN_USE: Final = point("rmp.in_use")
"""Another CPU holds an RMP entry: spin."""
_SPINS: Final = 1000
SNP_POLICY: Final = 3 << 16
"""Policy of a guest whose VMM names none: SMT allowed, and the bit that must be one."""
ES_POLICY: Final = POLICY_ES


# ---- what KVM keeps -------------------------------------------------------------------------------------------


@attrs.define
class AsidPool:
    """KVM's ASIDs: SEV guests take min_sev_asid..max_asid, SEV-ES and SNP guests 1..min_sev_asid - 1.

    Freed ASIDs wait in `reclaim` until WBINVD and DF_FLUSH made them usable again (kernel: sev_asid_new).
    """

    max_asid: int
    min_sev_asid: int
    used: set[int] = attrs.field(factory=set)
    reclaim: set[int] = attrs.field(factory=set)

    def range_of(self, vm_type: str) -> range:
        """The ASIDs that a VM type may have."""
        return range(self.min_sev_asid, self.max_asid + 1) if vm_type == SEV_TYPE else range(1, self.min_sev_asid)

    def take(self, asids: range) -> int:
        """The lowest free ASID, 0 where there is none."""
        asid = next((asid for asid in asids if asid not in self.used), 0)
        if asid:
            self.used.add(asid)
        return asid

    def recycle(self) -> None:
        """The caches are flushed: waiting ASIDs are free."""
        self.used -= self.reclaim
        self.reclaim.clear()


@attrs.frozen(eq=False)
class Region:
    """Encrypted memory that user space registered (kernel: struct enc_region); pfns are pinned, one by one."""

    hva: int
    size_bytes: int
    nr_pages: int
    pfns: tuple[Sel, ...] = ()


FOR_MIRRORS = frozenset({
    "KVM_SEV_LAUNCH_UPDATE_VMSA", "KVM_SEV_GUEST_STATUS", "KVM_SEV_DBG_DECRYPT", "KVM_SEV_DBG_ENCRYPT",
})  # fmt: skip
"""What a mirror may ask (is_cmd_allowed_from_mirror)."""


@attrs.define(eq=False)
class SevVm:
    """One VM's encryption context (kernel: struct kvm_sev_info)."""

    vm_type: str
    asid: int
    demand: bool
    """Pages are pinned on demand, in the fault path; else with their region."""
    initialized: bool = False
    """KVM_SEV_INIT2 (or an older form) was called; the ASID is taken when the VM is made in any case."""
    handle: int = 0
    gctx_pfn: int = 0
    policy: int = 0
    vmsa_features: int = 0
    ap_eip: int = BSP_EIP
    signature: int = CPUS["EPYC-Milan"]
    measured: bool = False
    finished: bool = False
    vmsas_loaded: bool = False
    launch_digest: bytes = b""
    """SHA-256 (SEV, SEV-ES) or SHA-384 chain (SNP) of the image, once it is complete."""
    regions: list[Region] = attrs.field(factory=list)
    nr_registered: int = 0
    """Pages accounted against RLIMIT_MEMLOCK."""
    early_pins: list[Sel] = attrs.field(factory=list)
    """Frames that firmware commands pinned before any vCPU existed."""
    mirrors: SevVm | None = None
    """The context that this one shares (enc_context_owner)."""
    nr_mirrors: int = 0

    @property
    def snp(self) -> bool:
        return self.vm_type == SNP_TYPE

    @property
    def es(self) -> bool:
        return self.vm_type == SEV_ES_TYPE

    @property
    def started(self) -> bool:
        return bool(self.handle or self.gctx_pfn)


@attrs.define(eq=False)
class VcpuState:
    """A vCPU's save area: its frame, and the register state that it starts with."""

    vmsa_pfn: int
    vmsa: bytes = b""
    protected: bool = False
    """The firmware has encrypted the save area."""


_LEVEL_SHIFT: Final = np.uint32(28)
_PFN: Final = np.uint32((1 << 28) - 1)


class PinMetadata:
    """Pins of one memslot, at `slot.arch`: level << 28 | pfn of the page that a mapping pinned, by its head's offset.

    One element a mapping, whatever its level; 0: none. (The RFC keeps a bitmap beside the pfns.)
    """

    def __init__(self, npages: int) -> None:
        self.pins: Words = zeros(npages, np.uint32)

    def held(self) -> Iterator[tuple[Sel, int]]:
        """First frames of pinned pages, and the pages' level, by pieces of the slot."""
        for start in range(0, len(self.pins), PIECE_RUN):
            words = self.pins[start : start + PIECE_RUN]
            if np.count_nonzero(words):
                yield from self.pages(words)

    def behind(self, heads: Words, level: int) -> tuple[Words, Words]:
        """Offsets and frames of the other 4K pages of large mappings at these heads, where none has its own pin."""
        inside = np.arange(1, pages_per_level(level), dtype=np.uint32)
        offsets = (heads[:, None] + inside).ravel()
        pfns = ((self.pins[heads] & _PFN)[:, None] + inside).ravel()
        bare = self.pins[offsets] == 0
        return offsets[bare], pfns[bare]

    @staticmethod
    def pages(words: Words) -> Iterator[tuple[Sel, int]]:
        """What elements say: first frames and level, one pair for each level."""
        levels = words >> _LEVEL_SHIFT
        for level in (PG_LEVEL_4K, PG_LEVEL_2M, PG_LEVEL_1G):
            some = levels == level
            if np.count_nonzero(some):
                yield contiguous((words[some] & _PFN).astype(np.int64), pages_per_level(level)), level


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


def _all(levels: int | npt.NDArray[np.uint8], level: int) -> bool:
    return isinstance(levels, int) and levels == level


def _runs(pfns: Sel) -> Iterator[tuple[int, int]]:
    """Positions [start, stop) of physically contiguous stretches."""
    if isinstance(pfns, slice):
        yield 0, count(pfns)
        return
    yield from pairwise([0, *(np.flatnonzero(pfns[1:] != pfns[:-1] + 1) + 1).tolist(), len(pfns)])


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

    def _wbinvd(self, host: HostView) -> None:
        """WBINVD on all CPUs: each stalls for it."""
        host.meter.op("WBINVD", "wbinvd")
        host.meter.charge_elsewhere("wbinvd", host.nr_cpus - 1)
        host.hw.psp.wbinvd()

    def _command(
        self, host: HostView, name: str, command: Steps[Any], item: str = "psp_command", n: int = 1
    ) -> Steps[Any]:
        """A firmware command (sev_issue_cmd), counted and charged."""
        host.meter.op(name, item, n)
        return (yield from command)

    def _rmpupdate(
        self, host: HostView, pfns: Sel, gfns: Sel | int = 0, *, level: int = PG_LEVEL_4K, **fields: Any
    ) -> int:
        """rmpupdate(): how many pages were updated. The kernel spins for ever on FAIL_OVERLAP: a bug, reported."""
        if not count(pfns):
            return 0
        result = host.hw.rmp.rmpupdate(pfns, gfns, level=level, **fields)
        tried = min(result.done + 1, count(pfns))
        host.meter.op("RMPUPDATE", "rmpupdate_2m" if level == PG_LEVEL_2M else "rmpupdate_4k", tried)
        if result.status == RmpStatus.FAIL_OVERLAP:
            at = first(part(pfns, result.done, result.done + 1))
            raise InvariantViolation("RMPUPDATE returns FAIL_OVERLAP, on which the kernel spins for ever", pfn=at)
        return int(result.done)

    def _make_shared(self, host: HostView, pfns: Sel, level: int = PG_LEVEL_4K) -> Sel:
        """rmp_make_shared of each page; returns those that the hardware refused."""
        refused: list[int] = []
        start, n = 0, count(pfns)
        while start < n:
            start += self._rmpupdate(host, part(pfns, start, n), assigned=False, level=level)
            if start < n:
                refused.append(first(part(pfns, start, start + 1)))
                start += 1
        return contiguous(np.array(refused, np.int64)) if refused else EMPTY

    def _psmash(self, host: HostView, regions: Sel) -> Steps[None]:
        """snp_rmptable_psmash of 2M regions (their heads), again while one is in use; other failures are passed by."""
        start, n, tries = 0, count(regions), 0
        while start < n:
            result = host.hw.rmp.psmash(part(regions, start, n))
            host.meter.op("PSMASH", "psmash", min(result.done + 1, n - start))
            start += result.done
            if result.status == RmpStatus.FAIL_INUSE:
                tries += 1
                if tries > _SPINS:
                    at = first(part(regions, start, n))
                    raise InvariantViolation("PSMASH finds an entry in use for ever", pfn=at)
                yield RMP_IN_USE
            else:
                start += 1

    def _reclaim(self, host: HostView, pfns: Sel) -> Steps[bool]:
        """snp_page_reclaim: firmware pages back to the hypervisor. What does not come is leaked; False then."""
        steps = host.hw.psp.snp_page_reclaim.steps(pfns)
        command = yield from self._command(host, "SNP_PAGE_RECLAIM", steps, n=count(pfns))
        done = self._rmpupdate(host, part(pfns, 0, command.done), assigned=False)
        if done < count(pfns):
            host.frames.leak(part(pfns, done, count(pfns)), f"SNP_PAGE_RECLAIM: {command.status.name}")
        return bool(done == count(pfns))

    def _alloc_unaligned(self, host: HostView) -> int:
        """snp_safe_alloc_page: one frame that is not 2M aligned (an erratum of pages the CPU uses by itself)."""
        pair = host.frames.alloc(2, Use.META)
        low, high = first(pair), last(pair)
        keep, spare = (high, low) if low % PAGES_2M == 0 else (low, high)
        host.frames.free(run(spare, 1))
        host.memory.clear(run(keep, 1))
        return keep

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
            self._wbinvd(vm.host)
            yield from self._command(vm.host, "DF_FLUSH", vm.host.hw.psp.df_flush.steps())
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
        self._wbinvd(host)
        for region in arch.regions:
            self._unpin(host, region.pfns)
        vm.charge_memlock(-arch.nr_registered, "vm_destroy")
        arch.nr_registered = 0
        self._unpin(host, arch.early_pins)
        arch.regions, arch.early_pins = [], []
        if arch.gctx_pfn:
            steps = host.hw.psp.snp_decommission.steps(arch.gctx_pfn)
            status = yield from self._command(host, "SNP_DECOMMISSION", steps)
            if status:
                host.frames.leak(run(arch.gctx_pfn, 1), f"SNP_DECOMMISSION: {status.name}; its ASID {arch.asid} too")
                return
            if (yield from self._reclaim(host, run(arch.gctx_pfn, 1))):
                host.frames.free(run(arch.gctx_pfn, 1))
        elif arch.handle:
            yield from self._command(host, "DEACTIVATE", host.hw.psp.deactivate.steps(arch.handle))
            yield from self._command(host, "DECOMMISSION", host.hw.psp.decommission.steps(arch.handle))
        self.asids.reclaim.add(arch.asid)
        arch.asid = 0

    def _unpin(self, host: HostView, pinned: list[Sel] | tuple[Sel, ...], level: int = PG_LEVEL_4K) -> None:
        for pfns in pinned:
            host.frames.unpin(pfns, order_of(level))
            host.meter.charge("gup_unpin_4k", count(pfns))

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
        vcpu.arch = VcpuState(self._alloc_unaligned(vcpu.vm.host), vmsa)

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
        if host.hw.rmp.assigned(page) and count(self._make_shared(host, page)):
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
                self._wbinvd(vm.host)
                flushed = True
            self._unpin(vm.host, [pfns], level)

    @hookimpl
    def pin_pfn(self, vm: VmView, batch: Batch, write: bool) -> InstallResult:
        """Pin one page, the head, of every mapping; a frame that another replaces is flushed and unpinned first."""
        metadata: PinMetadata | None = batch.slot.arch
        if metadata is None or batch.level > PG_LEVEL_1G:
            vm.bug("an encrypted page is mapped that cannot be pinned")
            return Stopped(0, Fatal(errno.EIO, "no pinning metadata, or level above 1G"))
        index, pfns = batch.indexes, batch.pfns
        old = take(metadata.pins, index)
        if np.count_nonzero(old):
            moved = (old & _PFN) != array_of(pfns).astype(np.uint32)
            levels = old >> _LEVEL_SHIFT
            self._repin(vm, metadata, where(index, moved & (levels > batch.level)), batch.level)
            old = take(metadata.pins, index).copy()
            missing = moved | (levels < batch.level)
            if not np.count_nonzero(missing):
                return None
            for gone, level in metadata.pages(old[missing]):
                vm.host.meter.charge("cacheline_flush_4k", count(gone) << order_of(level))
                self._unpin(vm.host, [gone], level)
            index = where(index, missing)
            pfns = contiguous(array_of(pfns)[missing], pages_per_level(batch.level))
        host, order = vm.host, order_of(batch.level)
        host.frames.pin(pfns, order)
        host.meter.charge("gup_pin_4k", count(pfns))
        host.meter.charge("cacheline_flush_4k", count(pfns) << order)
        mark = batch.level << int(_LEVEL_SHIFT)
        if isinstance(pfns, slice):
            low = mark | pfns.start
            metadata.pins[index] = np.arange(low, low + pfns.stop - pfns.start, pfns.step or 1, dtype=np.uint32)
        else:
            metadata.pins[index] = pfns | mark
        return None

    def _repin(self, vm: VmView, metadata: PinMetadata, index: Sel, level: int) -> None:
        """Large mappings that were split lose the pin at their head: their other pages get their own first.

        The RFC does not, and leaves them mapped and unpinned.
        """
        words = take(metadata.pins, index)
        for large in range(level + 1, PG_LEVEL_1G + 1):
            split = words >> _LEVEL_SHIFT == large
            if np.count_nonzero(split):
                offsets, pfns = metadata.behind(array_of(where(index, split)).astype(np.uint32), large)
                vm.host.frames.pin(contiguous(pfns.astype(np.int64)))
                vm.host.meter.charge("gup_pin_4k", len(pfns))
                metadata.pins[offsets] = pfns | (PG_LEVEL_4K << int(_LEVEL_SHIFT))

    # ---- encrypted regions: pinning up front --------------------------------------------------------------------

    def _not_a_mirror(self, arch: SevVm, call: str) -> None:
        if arch.mirrors is not None:
            raise UapiError(errno.EINVAL, call, "the VM mirrors another, which has the call")

    @hookimpl
    def register_region(self, vm: VmView, hva: int, size_bytes: int) -> None:
        """sev_mem_enc_register_region: account, and unless pages are pinned on demand, pin them all now."""
        call = "KVM_MEMORY_ENCRYPT_REG_REGION"
        arch: SevVm = vm.arch
        self._not_a_mirror(arch, call)
        if size_bytes <= 0 or hva < 0 or hva + size_bytes >= 1 << 64:
            raise UapiError(errno.EINVAL, call, "the size is 0, or the range wraps")
        nr_pages = ((hva + size_bytes - 1) >> PAGE_SHIFT) - (hva >> PAGE_SHIFT) + 1
        vm.charge_memlock(nr_pages, call)
        try:
            if nr_pages > _INT_MAX:
                raise UapiError(errno.EINVAL, call, "more pages than one call can pin")
            pfns: tuple[Sel, ...] = () if arch.demand else self._pin_range(vm, hva, size_bytes, call)
        except UapiError:
            vm.charge_memlock(-nr_pages, call)
            raise
        arch.nr_registered += nr_pages
        if not arch.demand:
            arch.regions.append(Region(hva, size_bytes, nr_pages, pfns))

    def _pin_range(self, vm: VmView, hva: int, size_bytes: int, call: str) -> tuple[Sel, ...]:
        """sev_pin_memory and the flush after it. UapiError(ENOMEM) where not all of the range is there."""
        host = vm.host
        try:
            found = vm.gup_range(hva, size_bytes)
        except UapiError as error:
            raise UapiError(errno.ENOMEM, call, f"only a part of the range could be pinned ({error.why})") from None
        for pfns in found:
            n = count(pfns)
            large = 0
            if host.backing_level >= PG_LEVEL_2M:
                stretches = (contiguous(array_of(part(pfns, low, high))) for low, high in _runs(pfns))
                large = sum(count(split_2m(stretch)[0]) for stretch in stretches)
            host.frames.pin(pfns)
            host.meter.charge("gup_pin_2m", large)
            host.meter.charge("gup_pin_4k", n - large * PAGES_2M)
            host.meter.charge("cacheline_flush_4k", n)
        return tuple(found)

    @hookimpl
    def unregister_region(self, vm: VmView, hva: int, size_bytes: int) -> None:
        """sev_mem_enc_unregister_region: exactly a registered region; on demand pinning only the account shrinks."""
        call = "KVM_MEMORY_ENCRYPT_UNREG_REGION"
        arch: SevVm = vm.arch
        self._not_a_mirror(arch, call)
        if arch.demand:
            if size_bytes <= 0 or hva < 0 or hva + size_bytes >= 1 << 64:
                raise UapiError(errno.EINVAL, call, "the size is 0, or the range wraps")
            nr_pages = ((hva + size_bytes - 1) >> PAGE_SHIFT) - (hva >> PAGE_SHIFT) + 1
            nr_pages = min(nr_pages, arch.nr_registered)
        else:
            region = next((r for r in arch.regions if (r.hva, r.size_bytes) == (hva, size_bytes)), None)
            if region is None:
                raise UapiError(errno.EINVAL, call, "there is no region of this address and size")
            self._wbinvd(vm.host)
            self._unpin(vm.host, region.pfns)
            arch.regions.remove(region)
            nr_pages = region.nr_pages
        arch.nr_registered -= nr_pages
        vm.charge_memlock(-nr_pages, call)

    @hookimpl
    def memory_reclaimed(self, vm: VmView) -> None:
        """sev_guest_memory_reclaimed: the host cannot flush the guest's cache lines by address. SNP: not by hva."""
        if not vm.arch.snp:
            self._wbinvd(vm.host)

    # ---- launch -------------------------------------------------------------------------------------------------

    def _start(self, vm: VmView, policy: int | None = None, call: str = "KVM_SEV_LAUNCH_START") -> Steps[None]:
        """Create the guest's context and bind it to the ASID, unless that was done."""
        arch: SevVm = vm.arch
        if arch.started:
            return
        if arch.snp:
            yield from self._start_snp(vm, SNP_POLICY if policy is None else policy)
            return
        host, psp = vm.host, vm.host.hw.psp
        arch.policy = (ES_POLICY if arch.es else 0) if policy is None else policy
        status, handle = yield from self._command(host, "LAUNCH_START", psp.launch_start.steps(arch.policy))
        if not status:
            status = yield from self._command(host, "ACTIVATE", psp.activate.steps(handle, arch.asid))
            if status:
                yield from self._command(host, "DECOMMISSION", psp.decommission.steps(handle))
        if status:
            raise UapiError(errno.EIO, call, f"firmware: {status.name}")
        arch.handle = handle

    def _start_snp(self, vm: VmView, policy: int) -> Steps[None]:
        """snp_launch_start: a context page, the launch, the ASID."""
        call = "KVM_SEV_SNP_LAUNCH_START"
        arch: SevVm = vm.arch
        host, psp = vm.host, vm.host.hw.psp
        gctx = self._alloc_unaligned(host)
        status: SevStatus = SevStatus.INVALID_PAGE_STATE
        if self._rmpupdate(host, run(gctx, 1), assigned=True, immutable=True):
            status = yield from self._command(host, "SNP_GCTX_CREATE", psp.snp_gctx_create.steps(gctx))
        if status:
            if (yield from self._reclaim(host, run(gctx, 1))):
                host.frames.free(run(gctx, 1))
            raise UapiError(errno.ENOTTY, call, f"no guest context: {status.name}")
        status = yield from self._command(host, "SNP_LAUNCH_START", psp.snp_launch_start.steps(gctx, policy))
        if not status:
            status = yield from self._command(host, "SNP_ACTIVATE", psp.snp_activate.steps(gctx, arch.asid))
        if status:
            yield from self._command(host, "SNP_DECOMMISSION", psp.snp_decommission.steps(gctx))
            if (yield from self._reclaim(host, run(gctx, 1))):
                host.frames.free(run(gctx, 1))
            raise UapiError(errno.EIO, call, f"firmware: {status.name}")
        arch.gctx_pfn, arch.policy = gctx, policy

    @hookimpl
    def launch_update(self, vm: VmView, batch: Batch, contents: list[bytes], kind: str) -> Steps[InstallResult]:
        """SNP: sev_gmem_post_populate of each page. SEV, SEV-ES: sev_launch_update_data of the VMM's memory."""
        arch: SevVm = vm.arch
        if kind == "vmsa" or kind not in PAGE_TYPES or (not arch.snp and kind != "normal"):
            return Stopped(0, Fatal(errno.EINVAL, f"{arch.vm_type} guests load no '{kind}' pages"))
        if arch.mirrors is not None:
            return Stopped(0, Fatal(errno.EINVAL, "the VM mirrors another, which loads the image"))
        try:
            yield from self._start(vm)
        except UapiError as error:
            return Stopped(0, Fatal(error.errno, error.why))
        if arch.snp:
            return (yield from self._populate(vm, batch, contents, kind))
        self._write_contents(vm.host, batch.pfns, contents)
        done, status = yield from self._update_data(vm, [batch])
        return Stopped(done, Fatal(errno.EIO, f"LAUNCH_UPDATE_DATA: {status.name}")) if status else None

    def _write_contents(self, host: HostView, pfns: Sel, contents: list[bytes]) -> None:
        host.memory.write(pfns, np.array([host.memory.intern(page) for page in contents], np.uint32), 0)
        host.meter.charge("host_copy_4k", len(contents))

    def _populate(self, vm: VmView, batch: Batch, contents: list[bytes], kind: str) -> Steps[InstallResult]:
        """Pages of the image become the guest's: copy, RMPUPDATE (Pre-Guest), SNP_LAUNCH_UPDATE, page by page."""
        arch: SevVm = vm.arch
        host, hw = vm.host, vm.host.hw
        taken = hw.rmp.assigned(batch.pfns)
        n = len(batch) if taken is False else 0 if taken is True else int(np.argmax(taken))
        if not n:
            return Stopped(0, Fatal(errno.EIO, "the page is assigned already (-EEXIST)"))
        pfns, gfns = part(batch.pfns, 0, n), part(batch.gfns, 0, n)
        old = take(host.memory.stamp, pfns).copy(), take(host.memory.key, pfns).copy()
        host.memory.write(pfns, np.array([host.memory.intern(page) for page in contents[:n]], np.uint32), 0)
        updated = hw.rmp.rmpupdate(pfns, gfns, assigned=True, asid=arch.asid, immutable=True).done
        command = yield from hw.psp.snp_launch_update.steps(arch.gctx_pfn, part(pfns, 0, updated), PAGE_TYPES[kind])
        done = command.done
        host.meter.charge("host_copy_4k", min(done + 1, n) if kind != "zero" else 0)
        host.meter.op("RMPUPDATE", "rmpupdate_4k", min(done + 1, n))
        host.meter.op("SNP_LAUNCH_UPDATE", "launch_update_4k", min(done + 1, updated))
        if done < n:
            yield from self._undo_populate(vm, pfns, old, done, updated)
        if done < len(batch):
            why = f"SNP_LAUNCH_UPDATE: {command.status.name}" if done < updated else "RMPUPDATE, or assigned already"
            return Stopped(done, Fatal(errno.EIO, why))
        return None

    def _undo_populate(self, vm: VmView, pfns: Sel, old: tuple[Any, Any], done: int, updated: int) -> Steps[None]:
        """The page at `done` failed: it goes back to the host. Those behind it were never touched, one by one."""
        host, n = vm.host, count(pfns)
        behind = part(pfns, done + 1, n)
        vm.host.hw.psp.snp_page_reclaim(part(pfns, done + 1, updated))
        vm.host.hw.rmp.rmpupdate(part(pfns, done + 1, updated), assigned=False)
        if count(behind):
            host.memory.stamp[behind] = old[0][done + 1 :]
            host.memory.key[behind] = old[1][done + 1 :]
        if done < updated:
            yield from self._reclaim(host, part(pfns, done, done + 1))

    def _update_data(
        self, vm: VmView, batches: list[Batch], offset: int = 0, size_bytes: int | None = None
    ) -> Steps[tuple[int, SevStatus]]:
        """LAUNCH_UPDATE_DATA of what the VMM has written: pin, flush, encrypt each contiguous stretch in place.

        From `offset` in the first page on, size_bytes, or all that the batches have. Returns how many pages are
        loaded, and the status that ended it.
        """
        arch: SevVm = vm.arch
        host, psp = vm.host, vm.host.hw.psp
        pinned: list[Sel] = []
        for batch in batches:
            if arch.demand and vm.vcpus:
                status, _, _ = vm.walk(batch.gfns, True)
                absent = status != Walk.OK
                if np.count_nonzero(absent):  # a page that was loaded before is mapped: spurious, as any fault there
                    lost = np.broadcast_to(absent, len(batch))
                    pfns = contiguous(array_of(batch.pfns)[lost])
                    yield from vm.map_private(Batch(batch.slot, batch.level, where(batch.gfns, lost), pfns))
                self.pin_pfn(vm, batch, True)
            else:
                host.frames.pin(batch.pfns)
                host.meter.charge("gup_pin_4k", len(batch))
                pinned.append(batch.pfns)
        done, status = 0, SevStatus.SUCCESS
        left = sum(len(batch) for batch in batches) * PAGE_BYTES if size_bytes is None else size_bytes
        for pfns, low, high in [(batch.pfns, *stretch) for batch in batches for stretch in _runs(batch.pfns)]:
            host.meter.charge("cacheline_flush_4k", high - low)
            host.meter.charge("launch_update_4k", high - low)
            address = (first(part(pfns, low, high)) << PAGE_SHIFT) + offset
            length = min(((high - low) << PAGE_SHIFT) - offset, left)
            left, offset = left - length, 0
            command = psp.launch_update_data.steps(arch.handle, address, length)
            status = yield from self._command(host, "LAUNCH_UPDATE_DATA", command)
            if status:
                break
            done += high - low
        if arch.demand and not status:
            arch.early_pins += pinned
        else:
            self._unpin(host, pinned)
        return done, status

    def _load_vmsas(self, vm: VmView) -> Steps[None]:
        """LAUNCH_UPDATE_VMSA (SEV-ES), or the save areas of an SNP guest, in order of vCPU index."""
        arch: SevVm = vm.arch
        host, hw = vm.host, vm.host.hw
        call = "KVM_SEV_SNP_LAUNCH_FINISH" if arch.snp else "KVM_SEV_LAUNCH_UPDATE_VMSA"
        for vcpu in vm.vcpus:
            state: VcpuState = vcpu.arch
            page = run(state.vmsa_pfn, 1)
            self._write_contents(host, page, [state.vmsa])
            if arch.snp:
                done = self._rmpupdate(host, page, VMSA_GFN, assigned=True, asid=arch.asid, immutable=True)
                steps = hw.psp.snp_launch_update.steps(arch.gctx_pfn, page, PAGE_TYPES["vmsa"])
                result = yield from self._command(host, "SNP_LAUNCH_UPDATE", steps, "launch_update_4k")
                if result.status and done:
                    yield from self._reclaim(host, page)
                status = result.status
            else:
                steps = hw.psp.launch_update_vmsa.steps(arch.handle, state.vmsa_pfn << PAGE_SHIFT, PAGE_BYTES)
                status = yield from self._command(host, "LAUNCH_UPDATE_VMSA", steps, "launch_update_4k")
            if status:
                raise UapiError(errno.EIO, call, f"firmware refuses the save area of vCPU {vcpu.id}: {status.name}")
            state.protected = True
        arch.vmsas_loaded = True

    @hookimpl
    def launch_finish(self, vm: VmView) -> Steps[None]:
        """All that is left of a launch: start, save areas, measurement, finish."""
        arch: SevVm = vm.arch
        self._not_a_mirror(arch, "KVM_SEV_LAUNCH_FINISH")
        yield from self._start(vm)
        if arch.snp:
            yield from self._finish_snp(vm, b"", b"")
            return
        if arch.es and not arch.vmsas_loaded and not arch.measured:
            yield from self._load_vmsas(vm)
        if not arch.measured:
            yield from self._measure(vm, 48, None)
        yield from self._finish(vm)

    def _measure(self, vm: VmView, length: int, nonce: bytes | None) -> Steps[bytes | int]:
        arch: SevVm = vm.arch
        psp = vm.host.hw.psp
        digest = psp.launch_digest(arch.handle)
        steps = psp.launch_measure.steps(arch.handle, length, nonce)
        status, blob = yield from self._command(vm.host, "LAUNCH_MEASURE", steps)
        if status == SevStatus.INVALID_LENGTH:
            return int(blob)
        if status:
            raise UapiError(errno.EIO, "KVM_SEV_LAUNCH_MEASURE", f"firmware: {status.name}")
        arch.measured, arch.launch_digest = True, digest
        return bytes(blob)

    def _finish(self, vm: VmView) -> Steps[None]:
        arch: SevVm = vm.arch
        status = yield from self._command(vm.host, "LAUNCH_FINISH", vm.host.hw.psp.launch_finish.steps(arch.handle))
        if status:
            raise UapiError(errno.EIO, "KVM_SEV_LAUNCH_FINISH", f"firmware: {status.name}")
        arch.finished = True

    def _finish_snp(self, vm: VmView, id_block: bytes, id_auth: bytes) -> Steps[None]:
        arch: SevVm = vm.arch
        psp = vm.host.hw.psp
        if not arch.vmsas_loaded:
            yield from self._load_vmsas(vm)
        digest = psp.snp_launch_digest(arch.gctx_pfn)
        steps = psp.snp_launch_finish.steps(arch.gctx_pfn, id_block, id_auth)
        status = yield from self._command(vm.host, "SNP_LAUNCH_FINISH", steps)
        if status:
            raise UapiError(errno.EIO, "KVM_SEV_SNP_LAUNCH_FINISH", f"firmware: {status.name}")
        arch.finished, arch.launch_digest = True, digest
        vm.pre_fault_allowed = True

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
        done = self._rmpupdate(vm.host, pfns, gfns, assigned=True, asid=arch.asid)
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
            done = self._rmpupdate(
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
                done = self._rmpupdate(
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
    def after_fault(self, vm: VmView, pfns: Sel, level: int) -> Steps[bool]:
        """sev_handle_rmp_fault: break the RMP's 2M page that the guest uses in 4K; spurious where it is 4K already.

        There the mapping is zapped only if it is larger than the entry: whoever broke it has not come to that yet.
        """
        rmp = vm.host.hw.rmp
        if not vm.arch.snp or not count(pfns):
            return False
        levels = rmp.levels(pfns)
        if _all(levels, PG_LEVEL_4K):
            return level > PG_LEVEL_4K
        pages = array_of(pfns) if isinstance(levels, int) else array_of(pfns)[levels == PG_LEVEL_2M]
        yield from self._psmash(vm.host, contiguous(np.unique(pages & ~(PAGES_2M - 1)), PAGES_2M))
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
        refused = np.union1d(array_of(self._make_shared(host, owned)), array_of(lost))
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
        refused = self._make_shared(host, contiguous(whole << 9, PAGES_2M), PG_LEVEL_2M)
        yield from self._psmash(host, contiguous(region[size != PAGES_2M] << 9, PAGES_2M))
        return contiguous(pages[~np.isin(pages >> 9, whole)]), expand(refused, 9)

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
    def guest_convert(self, vm: VmView, gfns: Sel, private: bool) -> Steps[ConvertResult]:
        """SNP, to shared: the guest rescinds its pages, then asks; to private it asks, and validates them later.

        SEV, SEV-ES: the guest has changed its page table's C-bit, and only tells (KVM_HC_MAP_GPA_RANGE).
        """
        if not vm.arch.snp:
            return Exit(count(gfns))
        if not private:
            refault = yield from self._rescind(vm, gfns)
            if isinstance(refault, Refault):
                return refault
            gfns = refault
        if vm.host.options.get("psc") == "msr":
            vm.host.meter.op("SNP_PSC_MSR", "psc_call", count(gfns))
            vm.host.meter.charge("psc_entry", count(gfns))
            return Exit(count(gfns), count(gfns))
        entries, exits = fill(gfns)
        vm.host.meter.op("SNP_PSC", "psc_call", -(-entries // MAX_ENTRIES))
        vm.host.meter.charge("psc_entry", entries)
        return Exit(count(gfns), exits)

    def _rescind(self, vm: VmView, gfns: Sel) -> Steps[Sel | Refault]:
        """PVALIDATE(0) of the leading pages that are mapped; returns them, or the first that must be mapped.

        NO_CHANGE is fine here: a page that was not validated is as shared as it can be.
        """
        status, pfns, _ = vm.walk(gfns, True)
        n = count(gfns)
        if not isinstance(status, int):
            mapped = status == Walk.OK
            n = n if np.count_nonzero(mapped) == n else int(np.argmin(mapped))
        elif status != Walk.OK:
            n = 0
        if n == 0:
            return Refault(first(gfns))
        gfns, pfns = part(gfns, 0, n), part(pfns, 0, n)
        large, small = split_2m(gfns)
        if count(large):
            frames = contiguous(array_of(pfns)[array_of(large) - first(gfns)], PAGES_2M)
            answer = vm.host.hw.rmp.pvalidate(frames, large, asid=vm.key, validate=False, level=PG_LEVEL_2M)
            vm.host.meter.op("PVALIDATE", "pvalidate_2m", count(large))
            if not isinstance(answer, int):
                fallen = array_of(large)[answer == RmpStatus.FAIL_SIZEMISMATCH]
                again = array_of(expand(contiguous(fallen, PAGES_2M), 9))
                small = contiguous(np.sort(np.concatenate([array_of(small), again])))
        if count(small):
            frames = pfns if count(small) == n else contiguous(array_of(pfns)[array_of(small) - first(gfns)])
            yield from self._rescind_4k(vm, frames, small)
        return gfns

    def _rescind_4k(self, vm: VmView, pfns: Sel, gfns: Sel) -> Steps[None]:
        """PVALIDATE(0) in 4K. A 2M page of the RMP faults; the host breaks it (the conversion zaps the mapping)."""
        host = vm.host
        answer = host.hw.rmp.pvalidate(pfns, gfns, asid=vm.key, validate=False)
        host.meter.op("PVALIDATE", "pvalidate_4k", count(gfns))
        if isinstance(answer, int) or not np.count_nonzero(answer == RmpStatus.NPF_SIZEM):
            return
        faulted = answer == RmpStatus.NPF_SIZEM
        pages, gfns = array_of(pfns)[faulted], where(gfns, faulted)
        regions = np.unique(pages & ~(PAGES_2M - 1))
        host.meter.charge("vm_exit", len(regions))
        yield from self._psmash(host, contiguous(regions, PAGES_2M))
        host.hw.rmp.pvalidate(contiguous(pages), gfns, asid=vm.key, validate=False)

    @hookimpl
    def host_access(self, host: HostView, pfns: Sel, write: bool, mode: HostMode) -> HostVerdict:
        """The host's own accesses: writes to a guest's page fault, reads of one return ciphertext."""
        answer = host.hw.rmp.check_host(pfns, write)
        if not isinstance(answer, int) or answer:
            return HostVerdict.OWNER_FAULT
        if not write and np.count_nonzero(take(host.memory.key, pfns)):
            return HostVerdict.CIPHERTEXT
        return HostVerdict.OK

    # ---- KVM_MEMORY_ENCRYPT_OP ------------------------------------------------------------------------------------

    @hookimpl
    def memory_encrypt_op(self, vm: VmView, command: str, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        """sev_mem_enc_ioctl. Pages of an SNP image are loaded by the core's launch_update."""
        arch: SevVm | None = vm.arch
        if not command:
            return {}
        if arch is None or not arch.asid:
            raise UapiError(errno.ENOTTY, command, "the VM is no SEV guest")
        if command not in FOR_MIRRORS:
            self._not_a_mirror(arch, command)
        if command not in _COMMANDS:
            raise UapiError(errno.EINVAL, command, "there is no such command")
        types, fields, more, implementation = _COMMANDS[command]
        if arch.snp and (SNP_TYPE not in types or (command == "KVM_SEV_INIT2" and arch.initialized)):
            raise UapiError(errno.EPERM, command, "the command is not for SNP guests")
        if arch.vm_type not in types:
            number = errno.EINVAL if command in _INITS else errno.ENOTTY
            raise UapiError(number, command, f"the command is not for {arch.vm_type} guests")
        for name in fields:
            if name not in arguments:
                raise UapiError(errno.EFAULT, command, f"its structure has no {name}")
        for name, value in arguments.items():
            if name not in (*fields, *more):
                raise UapiError(errno.EFAULT, command, f"its structure has {name}, which is no field of it")
            if not _holds(name, value):
                raise UapiError(errno.EFAULT, command, f"its {name} cannot be {str(value)[:40]}")
        return (yield from implementation(self, vm, arguments))

    def _op_init(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        call = "KVM_SEV_INIT2"
        arch: SevVm = vm.arch
        features, version = arguments.get("vmsa_features", 0), arguments.get("ghcb_version", 0)
        if arch.initialized or arch.started or vm.vcpus:
            raise UapiError(errno.EINVAL, call, "the VM has vCPUs, or is active already")
        if arguments.get("flags", 0) or features & ~_VMSA_FEATURES[arch.vm_type]:
            raise UapiError(errno.EINVAL, call, f"flags {arguments.get('flags', 0):#x} or vmsa_features {features:#x}")
        if version > 2 or (version and arch.vm_type == SEV_TYPE):
            raise UapiError(errno.EINVAL, call, f"ghcb_version {version}")
        arch.initialized = True
        arch.vmsa_features |= features
        yield from ()
        return {}

    def _op_launch_start(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        call = "KVM_SEV_LAUNCH_START"
        if arguments["policy"] >> 32:
            raise UapiError(errno.EFAULT, call, "its policy has 32 bits")
        if vm.arch.started:
            raise UapiError(errno.EINVAL, call, "the launch has begun already")
        yield from self._start(vm, arguments["policy"])
        return {"handle": vm.arch.handle}

    def _op_launch_update_data(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        call = "KVM_SEV_LAUNCH_UPDATE_DATA"
        hva, size = arguments["uaddr"], arguments["len"]
        if size <= 0:
            raise UapiError(errno.EINVAL, call, "the length is 0")
        offset = hva % PAGE_BYTES
        whole = -(-(offset + size) // PAGE_BYTES) * PAGE_BYTES
        batches = list(self._batches(vm, hva - offset, whole, call))
        _, status = yield from self._update_data(vm, batches, offset, size)
        if status:
            raise UapiError(errno.EIO, call, f"firmware: {status.name}")
        return {}

    def _batches(self, vm: VmView, hva: int, size_bytes: int, call: str) -> Iterator[Batch]:
        """The slots' pages behind an hva range (kvm_for_each_memslot_in_hva_range). UapiError(EINVAL) for a gap."""
        missing = size_bytes
        for slot in vm.slots:
            low, high = max(hva, slot.hva), min(hva + size_bytes, slot.hva + slot.npages * PAGE_BYTES)
            if low < high:
                missing -= high - low
                gfns = run(slot.base_gfn + ((low - slot.hva) >> PAGE_SHIFT), (high - low) >> PAGE_SHIFT)
                frames = np.concatenate([array_of(pfns) for pfns in vm.gup_range(low, high - low)])
                yield Batch(slot, PG_LEVEL_4K, gfns, contiguous(frames))
        if missing:
            raise UapiError(errno.EINVAL, call, "a part of the range is in no memslot")

    def _op_update_vmsa(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        yield from self._load_vmsas(vm)
        return {}

    def _op_measure(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        length = arguments["len"]
        if length > 16 << 10:
            raise UapiError(errno.EINVAL, "KVM_SEV_LAUNCH_MEASURE", "a blob of more than 16 KiB")
        blob = yield from self._measure(vm, length, arguments.get("nonce"))
        return {"len": blob, "blob": b""} if isinstance(blob, int) else {"len": len(blob), "blob": blob}

    def _op_secret(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        call = "KVM_SEV_LAUNCH_SECRET"
        hva, secret = arguments["guest_uaddr"], arguments["secret"]
        pfns = np.concatenate([array_of(found) for found in vm.gup_range(hva, max(1, len(secret)))])
        if len(list(_runs(contiguous(pfns)))) > 1:
            raise UapiError(errno.EINVAL, call, "the pages are not physically contiguous")
        address = (int(pfns[0]) << PAGE_SHIFT) + hva % PAGE_BYTES
        steps = vm.host.hw.psp.launch_secret.steps(vm.arch.handle, address, secret)
        yield from self._pinned_command(vm, contiguous(pfns), "LAUNCH_SECRET", steps, call)
        return {}

    def _pinned_command(self, vm: VmView, pfns: Sel, name: str, steps: Steps[SevStatus], call: str) -> Steps[None]:
        """A firmware command that writes guest memory by the frame: pinned meanwhile, on demand pinning also after.

        Raises UapiError(EIO) where the firmware refuses; then nothing stays pinned.
        """
        host, arch = vm.host, vm.arch
        host.frames.pin(pfns)
        host.meter.charge("gup_pin_4k", count(pfns))
        host.meter.charge("cacheline_flush_4k", count(pfns))
        status = yield from self._command(host, name, steps)
        if arch.demand and not status:
            arch.early_pins.append(pfns)
        else:
            self._unpin(host, [pfns])
        if status:
            raise UapiError(errno.EIO, call, f"firmware: {status.name}")

    def _one_page(self, vm: VmView, hva: int, length: int, call: str) -> tuple[Sel, int]:
        """The frame behind a stretch of guest memory that lies in one page, and its physical address."""
        if length <= 0 or hva % PAGE_BYTES + length > PAGE_BYTES:
            raise UapiError(errno.EINVAL, call, "the length is 0, or crosses a page")
        pfns = vm.gup_range(hva, length)[0]
        return pfns, (first(pfns) << PAGE_SHIFT) + hva % PAGE_BYTES

    def _op_send_start(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        steps = vm.host.hw.psp.send_start.steps(vm.arch.handle)
        status, session = yield from self._command(vm.host, "SEND_START", steps)
        if status:
            raise UapiError(errno.EIO, "KVM_SEV_SEND_START", f"firmware: {status.name}")
        return {"session": session, "policy": vm.arch.policy}

    def _op_send_data(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        call = "KVM_SEV_SEND_UPDATE_DATA"
        length = arguments["guest_len"]
        pfns, address = self._one_page(vm, arguments["guest_uaddr"], length, call)
        vm.host.frames.pin(pfns)
        vm.host.meter.charge("gup_pin_4k")
        vm.host.meter.charge("cacheline_flush_4k")
        steps = vm.host.hw.psp.send_update_data.steps(vm.arch.handle, address, length)
        status, header, data = yield from self._command(vm.host, "SEND_UPDATE_DATA", steps)
        self._unpin(vm.host, [pfns])
        if status:
            raise UapiError(errno.EIO, call, f"firmware: {status.name}")
        return {"hdr": header, "trans": data}

    def _op_receive_start(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        call = "KVM_SEV_RECEIVE_START"
        arch, psp = vm.arch, vm.host.hw.psp
        if arguments["policy"] >> 32:
            raise UapiError(errno.EFAULT, call, "its policy has 32 bits")
        if arch.started:
            raise UapiError(errno.EINVAL, call, "the VM has a context already")
        steps = psp.receive_start.steps(arguments["policy"], arguments["session"])
        status, handle = yield from self._command(vm.host, "RECEIVE_START", steps)
        if not status:
            status = yield from self._command(vm.host, "ACTIVATE", psp.activate.steps(handle, arch.asid))
            if status:
                yield from self._command(vm.host, "DECOMMISSION", psp.decommission.steps(handle))
        if status:
            raise UapiError(errno.EIO, call, f"firmware: {status.name}")
        arch.handle, arch.policy = handle, arguments["policy"]
        return {"handle": handle}

    def _op_receive_data(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        call = "KVM_SEV_RECEIVE_UPDATE_DATA"
        header, data = arguments["hdr"], arguments["trans"]
        pfns, address = self._one_page(vm, arguments["guest_uaddr"], len(data), call)
        steps = vm.host.hw.psp.receive_update_data.steps(vm.arch.handle, address, header, data)
        yield from self._pinned_command(vm, pfns, "RECEIVE_UPDATE_DATA", steps, call)
        return {}

    def _op_goes(self, vm: VmView, name: str) -> Steps[dict[str, Any]]:
        steps = getattr(vm.host.hw.psp, name.lower()).steps(vm.arch.handle)
        status = yield from self._command(vm.host, name, steps)
        if status:
            raise UapiError(errno.EIO, f"KVM_SEV_{name}", f"firmware: {status.name}")
        vm.arch.finished = vm.arch.finished or name == "RECEIVE_FINISH"
        return {}

    def _op_send_finish(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        return (yield from self._op_goes(vm, "SEND_FINISH"))

    def _op_send_cancel(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        return (yield from self._op_goes(vm, "SEND_CANCEL"))

    def _op_receive_finish(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        return (yield from self._op_goes(vm, "RECEIVE_FINISH"))

    def _op_finish(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        yield from self._finish(vm)
        return {}

    def _op_status(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        steps = vm.host.hw.psp.guest_status.steps(vm.arch.handle)
        _, state, _, policy = yield from self._command(vm.host, "GUEST_STATUS", steps)
        return {"handle": vm.arch.handle, "policy": policy, "state": int(state)}

    def _op_snp_start(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        call = "KVM_SEV_SNP_LAUNCH_START"
        policy = arguments["policy"]
        if vm.arch.started or arguments.get("flags", 0):
            raise UapiError(errno.EINVAL, call, "a second start, or flags")
        if policy >> 21 or policy >> 18 & 1 or not policy >> 17 & 1:
            raise UapiError(errno.EINVAL, call, f"policy {policy:#x}: bit 17 must be one, bits 18 and above 20 zero")
        yield from self._start_snp(vm, policy)
        return {}

    def _op_snp_finish(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        if not vm.arch.gctx_pfn or arguments.get("flags", 0):
            raise UapiError(errno.EINVAL, "KVM_SEV_SNP_LAUNCH_FINISH", "no launch has begun, or flags")
        if ("id_block" in arguments) != ("id_auth" in arguments):
            raise UapiError(errno.EFAULT, "KVM_SEV_SNP_LAUNCH_FINISH", "an ID block comes with its authentication page")
        yield from self._finish_snp(vm, arguments.get("id_block", b""), arguments.get("id_auth", b""))
        return {}


_DEBUG_SWAP, _SECURE_TSC = 1 << 5, 1 << 9
_VMSA_FEATURES: Final = {SEV_TYPE: 0, SEV_ES_TYPE: _DEBUG_SWAP, SNP_TYPE: _DEBUG_SWAP | _SECURE_TSC}
"""What KVM_SEV_INIT2 takes as vmsa_features; KVM itself adds bit 0, SNP active."""

_BYTES: Final = {
    "secret": None, "session": None, "hdr": None, "trans": None, "nonce": 16, "id_block": 96, "id_auth": PAGE_BYTES,
}  # fmt: skip
"""Fields that are bytes, and how many they are where the ABI says so; all others are unsigned numbers."""


def _holds(name: str, value: Any) -> bool:
    """Whether a field of a command's structure can have this value."""
    if name not in _BYTES:
        return isinstance(value, int) and 0 <= value < 1 << 64
    return isinstance(value, bytes) and _BYTES[name] in (None, len(value))


_Operation = Callable[[AmdSev, VmView, dict[str, Any]], Steps[dict[str, Any]]]
_LEGACY: Final = (SEV_TYPE, SEV_ES_TYPE)
_INITS: Final = ("KVM_SEV_INIT", "KVM_SEV_ES_INIT", "KVM_SEV_INIT2")
_INIT_FIELDS: Final = ("flags", "vmsa_features", "ghcb_version")
_COMMANDS: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], _Operation]]] = {
    # command: VM types, fields that its structure must have, fields that are 0 unless given, implementation
    "KVM_SEV_INIT": ((SEV_TYPE,), (), _INIT_FIELDS, AmdSev._op_init),
    "KVM_SEV_ES_INIT": ((SEV_ES_TYPE,), (), _INIT_FIELDS, AmdSev._op_init),
    "KVM_SEV_INIT2": ((*_LEGACY, SNP_TYPE), (), _INIT_FIELDS, AmdSev._op_init),
    "KVM_SEV_LAUNCH_START": (_LEGACY, ("policy",), (), AmdSev._op_launch_start),
    "KVM_SEV_LAUNCH_UPDATE_DATA": (_LEGACY, ("uaddr", "len"), (), AmdSev._op_launch_update_data),
    "KVM_SEV_LAUNCH_UPDATE_VMSA": ((SEV_ES_TYPE,), (), (), AmdSev._op_update_vmsa),
    "KVM_SEV_LAUNCH_MEASURE": (_LEGACY, ("len",), ("nonce",), AmdSev._op_measure),
    "KVM_SEV_LAUNCH_SECRET": (_LEGACY, ("guest_uaddr", "secret"), (), AmdSev._op_secret),
    "KVM_SEV_LAUNCH_FINISH": (_LEGACY, (), (), AmdSev._op_finish),
    "KVM_SEV_SEND_START": (_LEGACY, (), (), AmdSev._op_send_start),
    "KVM_SEV_SEND_UPDATE_DATA": (_LEGACY, ("guest_uaddr", "guest_len"), (), AmdSev._op_send_data),
    "KVM_SEV_SEND_FINISH": (_LEGACY, (), (), AmdSev._op_send_finish),
    "KVM_SEV_SEND_CANCEL": (_LEGACY, (), (), AmdSev._op_send_cancel),
    "KVM_SEV_RECEIVE_START": (_LEGACY, ("policy", "session"), (), AmdSev._op_receive_start),
    "KVM_SEV_RECEIVE_UPDATE_DATA": (_LEGACY, ("hdr", "guest_uaddr", "trans"), (), AmdSev._op_receive_data),
    "KVM_SEV_RECEIVE_FINISH": (_LEGACY, (), (), AmdSev._op_receive_finish),
    "KVM_SEV_GUEST_STATUS": (_LEGACY, (), (), AmdSev._op_status),
    "KVM_SEV_SNP_LAUNCH_START": ((SNP_TYPE,), ("policy",), ("flags",), AmdSev._op_snp_start),
    "KVM_SEV_SNP_LAUNCH_FINISH": ((SNP_TYPE,), (), ("flags", "id_block", "id_auth"), AmdSev._op_snp_finish),
}

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


def watch_launch(vm: VmView, tell: Callable[[str, int | None, bytes], None]) -> None:
    """Have the secure processor tell (type, gpa or None, digest so far) of all that it measures."""
    vm.host.hw.psp.watch = tell


KVM_TYPES = {SEV_TYPE: 2, SEV_ES_TYPE: 3, SNP_TYPE: 4}
"""KVM_X86_SEV_VM, KVM_X86_SEV_ES_VM, KVM_X86_SNP_VM."""

SEV = _backend(SEV_TYPE, "AMD SEV: memory encrypted where it lies, every guest page pinned", (_PINNING, *_ASIDS))
SEV_ES = _backend(SEV_ES_TYPE, "AMD SEV-ES: SEV with encrypted registers", (_PINNING, *_ASIDS))
SNP = _backend(SNP_TYPE, "AMD SEV-SNP: private memory in guest_memfd, owned through the RMP", (_PSC, *_ASIDS))
