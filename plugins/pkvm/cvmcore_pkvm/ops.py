"""KVM's side of pKVM, untrusted (arch/arm64/kvm: pkvm.c, mmu.c): it asks EL2 for everything and survives every refusal.

Two kinds of VM. Protected (`protected=yes`): each page is pinned for good and donated to the guest, one hypercall a
page; the guest itself shares pages back and takes them again, and only teardown returns them. Non-protected: ordinary
faults that end in share_guest, with 4K pages or 2M blocks, and notifiers that unshare.

The core's direct root is KVM's record of what EL2 maps (struct pkvm_mapping), not a table that anybody walks.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.backend import Backend, Option
from cvmcore.effects import Lock, Steps, holding
from cvmcore.errors import HardwareError, InputError, UapiError
from cvmcore.hookspecs import API_VERSION, hookimpl
from cvmcore.pages import EMPTY, Sel, array_of, contiguous, count, first, grown, last, part, take, where, zeros
from cvmcore.types import (
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
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
    Refault,
    Retry,
    SlotView,
    Stopped,
    VcpuView,
    VmView,
    Walk,
    pages_per_level,
)
from cvmcore_pkvm import hw, launch
from cvmcore_pkvm.cost import AFTERWARDS, CHARGES, PARTS, PROFILE, TRAP
from cvmcore_pkvm.errors import Errno, Smccc
from cvmcore_pkvm.hw import Hyp, Prot, Result

USE_TABLE, USE_META = 3, 4
"""What the host's allocator calls page-table pages and structures of the trusted party."""

RANK_CONFIG = 40
"""config_lock lies inside slots_lock and outside mmu_lock."""

RETRIES = 100
"""Accesses of one page by the host's kernel that EL2 answers with -EAGAIN: after so many it will do so for ever."""

MAPPED = 255
"""Record of a gfn: pinned and mapped for good. Less: so many faults that are under way hold its pin; 0: none."""


@attrs.define(eq=False)
class PkvmVcpu:
    """struct kvm_vcpu_arch: the page that holds it (shared with EL2), its CPU, and its list of table pages for EL2."""

    index: int
    cpu: int
    page: Sel
    memcache: list[int] = attrs.field(factory=list)
    created: bool = False


@attrs.define(eq=False)
class PkvmVm:
    """struct kvm_protected_vm: EL2's handle, the page with struct kvm, and per gfn what is known of its pin."""

    handle: int
    protected: bool
    page: Sel
    config_lock: Lock
    """Whoever runs first makes the VM (kvm->arch.config_lock)."""
    vcpus: list[PkvmVcpu] = attrs.field(factory=list)
    created: bool = False
    pins: npt.NDArray[np.uint8] = attrs.field(factory=lambda: zeros(0, np.uint8))
    given: set[int] = attrs.field(factory=set)
    """Frames that EL2 has, or may have taken, for its structures and tables."""
    stale_tlbs: bool = False
    """Whether leaves were write-protected and no flush came after that."""


def _granted(wanted: int, grant: Callable[[int], object]) -> int:
    """How much of `wanted` is granted in the end, where a grant is for all that it asks or UapiError(ENOMEM)."""
    got, step = 0, wanted
    while step:
        try:
            grant(step)
            got += step
            step = min(step, wanted - got)
        except UapiError:
            step //= 2
    return got


class Pkvm:
    """The hooks of one Host."""

    # ---- calls into EL2 ---------------------------------------------------------------------------------------

    @staticmethod
    def _trap(host: HostView, name: str, n: int = 1) -> None:
        """n calls into EL2, by the host or a guest, under their own name."""
        host.meter.op(name, TRAP[0], n)
        for item in TRAP[1:]:
            host.meter.charge(item, n)

    @staticmethod
    def _el2(host: HostView, steps: Steps[Any]) -> Steps[Any]:
        """Run an operation of the hypervisor; what it does is charged while it holds its locks."""
        answer: object = None
        later: list[tuple[str, int]] = []
        while True:
            try:
                effect = steps.send(answer)
            except StopIteration as stop:
                for item, n in later:
                    host.meter.charge(item, n)
                return stop.value
            if isinstance(effect, hw.Worked):
                answer = None
                for kind, n in effect.work.items():
                    for item in PARTS[kind]:
                        host.meter.charge(item, n)
                    later += ((item, n) for item in AFTERWARDS.get(kind, ()))
            else:
                answer = yield effect

    def _hcall(self, host: HostView, name: str, steps: Steps[Result], n: int = 1) -> Steps[Result]:
        """A host hypercall for each of n elements, up to the first that fails.

        A call that only failed for want of table pages is not counted: the host would have brought them before.
        """
        if n == 1:
            self._trap(host, name)
        result: Result = yield from self._el2(host, steps)
        if n > 1:
            self._trap(host, name, result.done + (not result.ok and not result.need))
        return result

    # ---- the machine ------------------------------------------------------------------------------------------

    @hookimpl
    def host_init(self, host: HostView) -> None:
        host.hw = Hyp(host.memory, host.nr_frames, hyp_lock=host.options["hyp_lock"])

    @hookimpl
    def capabilities(self, options: dict[str, Any]) -> Capabilities:
        if options["protected"] == "yes":
            return Capabilities(
                mediated_root=True,
                converts_in_place=True,
                conversion_keeps_content=True,
                zap_destroys_content=True,
                confidential=True,
                needs_pin=True,
                honours_notifiers=False,
                dirty_logging=False,
                memslots_fixed_after_run=True,
                gmem_backed=False,
                prefault=False,
                max_private_level=PG_LEVEL_4K,
                max_shared_level=PG_LEVEL_4K,
            )
        return Capabilities(
            mediated_root=True,
            converts_in_place=True,
            conversion_keeps_content=True,
            gmem_backed=False,
            prefault=False,
            max_private_level=PG_LEVEL_2M,
            max_shared_level=PG_LEVEL_2M,
        )

    # ---- VMs and vCPUs ----------------------------------------------------------------------------------------

    def _shared_page(self, host: HostView) -> Steps[Sel]:
        """A page of the host's kernel that EL2 may pin (kvm_share_hyp)."""
        page = host.frames.alloc(1, USE_META)
        result = yield from self._hcall(host, "__pkvm_host_share_hyp", host.hw.host_share_hyp.steps(page))
        if not result.ok:
            host.frames.free(page)
            raise UapiError(-result.status, "kvm_share_hyp", f"EL2 answers {result.status.name}")
        return page

    @hookimpl
    def vm_init(self, vm: VmView) -> Steps[None]:
        host, hyp = vm.host, vm.host.hw
        reserved = yield from self._hcall(host, "__pkvm_reserve_vm", hyp.reserve_vm.steps())
        if not reserved.ok:
            raise UapiError(-reserved.status, "KVM_CREATE_VM", f"EL2 has no room for more than {hw.MAX_VMS} VMs")
        try:
            page = yield from self._shared_page(host)
        except UapiError:
            yield from self._hcall(host, "__pkvm_unreserve_vm", hyp.unreserve_vm.steps(reserved.answer))
            raise
        lock = Lock(f"vm{vm.id}.config_lock", RANK_CONFIG)
        vm.arch = PkvmVm(reserved.answer, vm.options["protected"] == "yes", page, lock)

    @hookimpl
    def vcpu_create(self, vcpu: VcpuView) -> Steps[None]:
        vm = vcpu.vm
        if vm.arch.created:
            raise UapiError(errno.EBUSY, "KVM_CREATE_VCPU", "EL2 has made the VM with the vCPUs that it had")
        page = yield from self._shared_page(vm.host)
        index = len(vm.arch.vcpus)
        # One CPU for each vCPU of the machine: nothing here is overcommitted.
        vcpu.arch = PkvmVcpu(index, vm.id << 16 | index, page)
        vm.arch.vcpus.append(vcpu.arch)

    @hookimpl
    def vcpu_enter(self, vcpu: VcpuView) -> Steps[None]:
        """The first run makes EL2's VM and vCPU (pkvm_create_hyp_vm, pkvm_create_hyp_vcpu) and loads the vCPU; it
        stays loaded on its CPU until the VM goes."""
        if not vcpu.arch.created:
            yield from holding(vcpu.vm.arch.config_lock, self._create(vcpu))

    def _create(self, vcpu: VcpuView) -> Steps[None]:
        arch: PkvmVcpu = vcpu.arch
        vm, host, hyp = vcpu.vm, vcpu.vm.host, vcpu.vm.host.hw
        kvm: PkvmVm = vm.arch
        if not kvm.created:
            memory = host.frames.alloc(hw.vm_pages(len(kvm.vcpus)), USE_META)
            try:
                pgd = host.frames.alloc(hw.PGD_PAGES, USE_TABLE)
            except UapiError:
                host.frames.free(memory)
                raise
            steps = hyp.init_vm.steps(kvm.handle, kvm.protected, len(kvm.vcpus), kvm.page, memory, pgd)
            yield from self._give(vm, "__pkvm_init_vm", steps, memory, pgd)
            kvm.created = True
        memory = host.frames.alloc(hw.VCPU_PAGES, USE_META)
        steps = hyp.init_vcpu.steps(kvm.handle, arch.index, arch.page, memory, arch.memcache)
        yield from self._give(vm, "__pkvm_init_vcpu", steps, memory)
        yield from self._must(vm, "__pkvm_vcpu_load", hyp.vcpu_load.steps(arch.cpu, kvm.handle, arch.index))
        if vm.dead:
            raise UapiError(errno.EIO, "KVM_RUN", "EL2 does not load the vCPU")
        arch.created = True

    def _give(self, vm: VmView, name: str, steps: Steps[Result], *frames: Sel) -> Steps[None]:
        """A hypercall that takes frames for good. They are the host's again where EL2 refuses, and KVM_RUN says why."""
        result = yield from self._hcall(vm.host, name, steps)
        for some in frames:
            if result.ok:
                vm.arch.given.update(array_of(some).tolist())
            else:
                vm.host.frames.free(some)
        if not result.ok:
            raise UapiError(-result.status, "KVM_RUN", f"{name} answers {result.status.name}")

    def _must(self, vm: VmView, name: str, steps: Steps[Result]) -> Steps[None]:
        """A hypercall that EL2 has no reason to refuse; if it does, the VM is dead."""
        result = yield from self._hcall(vm.host, name, steps)
        if not result.ok:
            vm.bug(f"{name} answers {result.status.name}")

    @hookimpl
    def vm_pre_destroy(self, vm: VmView) -> Steps[None]:
        host, kvm = vm.host, vm.arch
        if not kvm.created:
            return
        for vcpu in kvm.vcpus:
            if vcpu.created:
                yield from self._hcall(host, "__pkvm_vcpu_put", host.hw.vcpu_put.steps(vcpu.cpu))
        yield from self._must(vm, "__pkvm_start_teardown_vm", host.hw.start_teardown_vm.steps(kvm.handle))

    @hookimpl
    def vcpu_free(self, vcpu: VcpuView) -> None:
        memcache = vcpu.arch.memcache
        vcpu.vm.host.frames.free(contiguous(np.sort(np.array(memcache, np.int64))))
        vcpu.vm.arch.given.difference_update(memcache)
        memcache.clear()

    @hookimpl
    def vm_destroy(self, vm: VmView) -> Steps[None]:
        host, hyp, kvm = vm.host, vm.host.hw, vm.arch
        pages = [kvm.page, *(vcpu.page for vcpu in kvm.vcpus)]
        if kvm.created:
            steps = hyp.finalize_teardown_vm.steps(kvm.handle)
            result = yield from self._hcall(host, "__pkvm_finalize_teardown_vm", steps)
            if not result.ok:
                for page in (*pages, contiguous(np.array(sorted(kvm.given), np.int64))):
                    host.frames.leak(page, f"EL2 still has VM {kvm.handle:#x}")
                return
            for frames in result.answer:
                host.frames.free(frames)
        else:
            yield from self._hcall(host, "__pkvm_unreserve_vm", hyp.unreserve_vm.steps(kvm.handle))
        for page in pages:
            result = yield from self._hcall(host, "__pkvm_host_unshare_hyp", hyp.host_unshare_hyp.steps(page))
            if result.ok:
                host.frames.free(page)
            else:
                host.frames.leak(page, f"EL2 does not unshare it: {result.status.name}")

    # ---- memslots, launch -------------------------------------------------------------------------------------

    @hookimpl
    def memslot_prepare(self, vm: VmView, new: SlotView | None, change: Change) -> None:
        """kvm_arch_prepare_memory_region: what a protected VM cannot have."""
        if not vm.arch.protected:
            return
        call = "KVM_SET_USER_MEMORY_REGION"
        if change in (Change.DELETE, Change.MOVE) and vm.arch.created:
            raise UapiError(errno.EPERM, call, "a protected VM keeps its memslots once it has run")
        if new is not None and new.flags & (KVM_MEM_READONLY | KVM_MEM_LOG_DIRTY_PAGES):
            raise UapiError(errno.EPERM, call, "a protected VM has no read-only memory and logs no dirty pages")

    @hookimpl
    def launch_update(self, vm: VmView, batch: Batch, contents: list[bytes], kind: str) -> InstallResult:
        if kind not in launch.KINDS:
            return Stopped(0, Fatal(errno.EINVAL, f"pKVM has no launch pages of kind {kind}"))
        if vm.arch.created:
            return Stopped(0, Fatal(errno.EBUSY, "the guest runs already"))
        launch.load(vm.host.memory, batch.pfns, contents)
        return None

    # ---- faults -----------------------------------------------------------------------------------------------

    def _fill(self, vm: VmView, vcpu: PkvmVcpu, n: int) -> bool:
        """Put n more pages on a vCPU's list for EL2, or as many as there are; whether it were all."""

        def grant(wanted: int) -> None:
            pages = array_of(vm.host.frames.alloc(wanted, USE_TABLE))[::-1].tolist()
            vcpu.memcache.extend(pages)
            vm.arch.given.update(pages)

        return _granted(n, grant) == n

    @hookimpl
    def topup(self, vm: VmView, vcpu: VcpuView) -> InstallResult:
        """topup_hyp_memcache: what one mapping can need; for a batch, mapping brings the rest."""
        if self._fill(vm, vcpu.arch, max(0, hw.MEMCACHE_MIN_PAGES - len(vcpu.arch.memcache))):
            return None
        return Stopped(0, Fatal(errno.ENOMEM, "no page for EL2's tables"))

    def _record(self, vm: VmView, gfns: Sel) -> npt.NDArray[np.uint8]:
        """The record, with room for the gfns."""
        kvm: PkvmVm = vm.arch
        if last(gfns) >= len(kvm.pins):
            kvm.pins = grown(kvm.pins, last(gfns) + 1)
        return kvm.pins

    @hookimpl
    def pin_pfn(self, vm: VmView, vcpu: VcpuView, batch: Batch) -> Steps[InstallResult]:
        """pkvm_mem_abort: charge a page to RLIMIT_MEMLOCK, pin it for the long term.

        A fault on a gfn that is mapped already is a race with another vCPU, unless EL2 says that it is poison: then
        KVM_RUN ends with -EFAULT.
        """
        pins = self._record(vm, batch.gfns)
        held = take(pins, batch.gfns)
        stopped: InstallResult = None
        if np.count_nonzero(held):
            stopped = yield from self._ask_for_poison(vm, vcpu.arch, batch, held)
            if stopped is not None:
                if not stopped.done:
                    return stopped
                batch = batch.part(0, stopped.done)
            # Others may have pinned, mapped or lost pages of the batch while EL2 was asked.
            pins = self._record(vm, batch.gfns)
            held = take(pins, batch.gfns)
            under_way = (held != 0) & (held != MAPPED)
            pins[where(batch.gfns, under_way)] += np.uint8(1)
            new = np.flatnonzero(held == 0)
            gfns, pfns = where(batch.gfns, held == 0), contiguous(array_of(batch.pfns)[new])
        else:
            new, gfns, pfns = None, batch.gfns, batch.pfns
        n = count(gfns)
        if not n:
            return stopped
        charged = _granted(n, lambda wanted: vm.charge_memlock(wanted, "KVM_RUN"))
        if charged < n:
            stopped = Stopped(charged if new is None else int(new[charged]), Fatal(errno.ENOMEM, "RLIMIT_MEMLOCK"))
            gfns, pfns = part(gfns, 0, charged), part(pfns, 0, charged)
        vm.host.frames.pin(pfns)
        vm.host.meter.charge("gup_pin_4k", charged)
        pins[gfns] = 1
        return stopped

    def _ask_for_poison(
        self, vm: VmView, vcpu: PkvmVcpu, batch: Batch, held: npt.NDArray[np.uint8]
    ) -> Steps[InstallResult]:
        """Ask EL2 of each mapped page whether the vCPU came out with a poison fault there."""
        at = np.flatnonzero(held == MAPPED)
        if not len(at):
            return None
        asked = vm.host.hw.vcpu_in_poison_fault.steps(vcpu.cpu, where(batch.gfns, held == MAPPED))
        result = yield from self._el2(vm.host, asked)
        poisoned = np.flatnonzero(result.answer)
        self._trap(vm.host, "__pkvm_vcpu_in_poison_fault", int(poisoned[0]) + 1 if len(poisoned) else len(at))
        return Stopped(int(at[poisoned[0]]), Fatal(errno.EFAULT, "the page was destroyed")) if len(poisoned) else None

    @hookimpl
    def unpin_pfn(self, vm: VmView, batch: Batch) -> None:
        pins = self._record(vm, batch.gfns)
        held = take(pins, batch.gfns)
        under_way, alone = (held != 0) & (held != MAPPED), held == 1
        pins[where(batch.gfns, under_way)] -= np.uint8(1)
        self._unpin(vm, contiguous(array_of(batch.pfns)[alone]))

    def _unpin(self, vm: VmView, pfns: Sel) -> None:
        n = count(pfns)
        vm.host.frames.unpin(pfns)
        vm.host.meter.charge("gup_unpin_4k", n)
        vm.charge_memlock(-n, "unpin_user_pages")

    @hookimpl
    def set_private_spte(self, vm: VmView, vcpu: VcpuView | None, batch: Batch) -> Steps[InstallResult]:
        """pkvm_pgtable_stage2_map: one hypercall a page, or a block, on the vCPU that faulted."""
        kvm: PkvmVm = vm.arch
        if vcpu is None or not vcpu.arch.created:
            return Stopped(0, Retry())
        loaded: PkvmVcpu = vcpu.arch
        done, n = 0, len(batch)
        while True:
            rest = batch.part(done, n) if done else batch
            result = yield from self._map(vm, loaded, rest)
            done += result.done
            if kvm.protected and result.done:
                kvm.pins[part(rest.gfns, 0, result.done)] = MAPPED
            if result.ok:
                # As after one fault after the other, each with a full list before it.
                self._fill(vm, loaded, max(0, hw.MEMCACHE_MIN_PAGES - result.answer - len(loaded.memcache)))
                return None
            if not result.need:
                at = first(rest.part(result.done, len(rest)).gfns)
                return Stopped(done, Fatal(-result.status, f"EL2 does not map gfn {at:#x}: {result.status.name}"))
            before = len(loaded.memcache)
            if not self._fill(vm, loaded, result.need) and len(loaded.memcache) == before:
                return Stopped(done, Retry())  # the next fault will not get its pages either, and ends with ENOMEM

    def _map(self, vm: VmView, vcpu: PkvmVcpu, batch: Batch) -> Steps[Result]:
        hyp, n = vm.host.hw, len(batch)
        if vm.arch.protected:
            # The host has just cleared the page, or the VMM written it.
            steps = hyp.host_donate_guest.steps(vcpu.cpu, batch.pfns, batch.gfns, touched=True)
            return (yield from self._hcall(vm.host, "__pkvm_host_donate_guest", steps, n))
        prot = Prot.R | Prot.X if batch.slot.flags & KVM_MEM_READONLY else Prot.RWX
        nr = pages_per_level(batch.level)
        steps = hyp.host_share_guest.steps(vcpu.cpu, batch.pfns, batch.gfns, nr, prot)
        return (yield from self._hcall(vm.host, "__pkvm_host_share_guest", steps, n))

    @hookimpl
    def remove_private_spte(self, vm: VmView, batch: Batch) -> Steps[None]:
        """Protected: reclaim the pages of a dying VM; one that EL2 does not give back keeps its pin and is leaked.
        Non-protected: unshare."""
        host, hyp, kvm = vm.host, vm.host.hw, vm.arch
        while len(batch):
            n = len(batch)
            if kvm.protected:
                steps = hyp.host_reclaim_guest.steps(kvm.handle, batch.gfns)
                result = yield from self._hcall(host, "__pkvm_reclaim_dying_guest_page", steps, n)
                if result.done:
                    back = batch.part(0, result.done)
                    kvm.pins[back.gfns] = 0
                    self._unpin(vm, back.pfns)
            else:
                steps = hyp.host_unshare_guest.steps(kvm.handle, batch.gfns, pages_per_level(batch.level))
                result = yield from self._hcall(host, "__pkvm_host_unshare_guest", steps, n)
            if result.ok:
                return
            lost = batch.part(result.done, result.done + 1)
            if not kvm.protected:  # there the VM goes anyway, and KVM only warns
                vm.bug(f"EL2 keeps gfn {first(lost.gfns):#x}: {result.status.name}")
            host.frames.leak(lost.all_pfns, "EL2 does not give the page back")
            batch = batch.part(result.done + 1, n)

    @hookimpl
    def wrprotect_private_spte(self, vm: VmView, batch: Batch) -> Steps[None]:
        """pkvm_pgtable_stage2_wrprotect: EL2 takes write access and leaves the TLBs to the flush that follows."""
        steps = vm.host.hw.wrprotect.steps(vm.arch.handle, batch.gfns, pages_per_level(batch.level))
        result = yield from self._hcall(vm.host, "__pkvm_host_wrprotect_guest", steps, len(batch))
        if not result.ok:
            vm.bug(f"__pkvm_host_wrprotect_guest answers {result.status.name}")
        vm.arch.stale_tlbs = True

    @hookimpl
    def relax_private_spte(self, vm: VmView, vcpu: VcpuView, batch: Batch) -> Steps[InstallResult]:
        """pkvm_pgtable_stage2_relax_perms, on the vCPU that faulted."""
        steps = vm.host.hw.relax_perms.steps(vcpu.arch.cpu, batch.gfns, Prot.RWX)
        result = yield from self._hcall(vm.host, "__pkvm_host_relax_perms_guest", steps, len(batch))
        if result.ok:
            return None
        again = result.status == Errno.EAGAIN  # the only errno that user_mem_abort swallows
        why = f"EL2 does not relax a leaf: {result.status.name}"
        return Stopped(result.done, Retry() if again else Fatal(-result.status, why))

    @hookimpl
    def flush_remote_tlbs(self, vm: VmView) -> Steps[bool]:
        """What EL2 unmapped it has invalidated before its hypercall returned; only what it write-protected is left, and
        goes with the whole VMID."""
        if vm.arch.stale_tlbs:
            vm.arch.stale_tlbs = False
            steps = vm.host.hw.tlb_flush_vmid.steps(vm.arch.handle)
            yield from self._hcall(vm.host, "__pkvm_tlb_flush_vmid", steps)
        return True

    # ---- what guest and host do -------------------------------------------------------------------------------

    @hookimpl
    def guest_access(self, vm: VmView, vcpu: VcpuView, gfns: Sel, write: bool) -> Access:
        if not vcpu.arch.created:
            return Access(Walk.MISS, EMPTY)
        access: Access = vm.host.hw.guest_access(vcpu.arch.cpu, gfns, write)
        return access

    @hookimpl
    def guest_convert(
        self, vm: VmView, vcpu: VcpuView, gfns: Sel, private: bool, begun: int, faults: int
    ) -> Steps[ConvertResult]:
        """The guest's loop of MEM_SHARE or MEM_UNSHARE hypercalls, served at EL2; KVM hears of none, unless
        `conversion=exit`, where each pass ends in user space as well."""
        host = vm.host
        if not vm.arch.protected or not vcpu.arch.created:
            return Done(count(gfns))  # there is nothing to convert: the host sees all of the guest's memory
        call = host.hw.mem_unshare if private else host.hw.mem_share
        name = "MEM_UNSHARE" if private else "MEM_SHARE"
        if faults:
            self._trap(host, name, faults)
        rest = part(gfns, begun, count(gfns))
        alone = count(rest) == 1 and not begun
        if alone:
            self._trap(host, name)
        result = yield from self._el2(host, call.steps(vcpu.arch.cpu, rest, vm.options["batch"]))
        done = begun + result.done
        if not alone:
            # A call that fails after others have succeeded is made again, and counted then.
            refused = result.status != Smccc.SUCCESS
            self._trap(host, name, result.calls - (refused and done > 0))
        told = vm.options["conversion"] == "exit"
        if result.absent:
            gfn = first(part(rest, result.at, count(rest)))
            return Refault(gfn, pages=result.absent, begun=done) if told else Refault(gfn, done, result.absent)
        return Exit(done) if told and done else Done(done)

    @hookimpl
    def read_private_spte(
        self, vm: VmView, gfns: Sel, level: int
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        if not vm.arch.created:
            return np.zeros(count(gfns), np.uint8), np.zeros(count(gfns), np.int64)
        found: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]
        found = vm.host.hw.read_stage2(vm.arch.handle, gfns, level)
        return found

    @hookimpl
    def host_access(self, host: HostView, pfns: Sel, mode: HostMode) -> Steps[HostVerdict]:
        """EL2 injects an abort into the host for what it has lost: SIGSEGV, or -EFAULT where a fixup stands by; the
        bare kernel takes the page by force, or finds it shared meanwhile and tries again. HardwareError where EL2 never
        lets go of it: the kernel dies, or retries for ever."""
        reclaimed, retries = False, 0
        while True:
            result = yield from self._el2(host, host.hw.handle_host_mem_abort.steps(pfns))
            if result.ok:
                return HostVerdict.RECLAIMED if reclaimed else HostVerdict.OK
            pfns = part(pfns, result.done, count(pfns))
            if mode is not HostMode.KERNEL:
                self._trap(host, "host stage-2 abort")
                return HostVerdict.SIGSEGV if mode is HostMode.USER else HostVerdict.EFAULT
            forced = yield from self._el2(host, host.hw.host_force_reclaim.steps(pfns))
            for name in ("host stage-2 abort", "__pkvm_force_reclaim_guest_page"):
                self._trap(host, name, max(1, forced.done))
            reclaimed |= forced.done > 0
            retries = 0 if forced.done else retries + 1
            if not forced.done and (forced.status != Errno.EAGAIN or retries == RETRIES):
                raise HardwareError("host access", forced.status.name, "EL2 does not let the host kernel go on")


class Pages(Option):
    """An option that is a number of pages which one call can cover."""

    def parse(self, text: str | int) -> int:
        """The number. Raises InputError where no call covers so many."""
        value = int(super().parse(text))
        if not 1 <= value <= hw.PAGES_BLOCK:
            raise InputError(f"option {self.name}: a call covers 1 to {hw.PAGES_BLOCK} pages, not {value}")
        return value


PKVM = Backend(
    name="pkvm",
    vendor="arm-pkvm",
    vm_type="pkvm",
    summary="arm64 pKVM: protected and non-protected VMs under a hypervisor at EL2",
    api_version=API_VERSION,
    make=Pkvm,
    profile=PROFILE,
    charges=CHARGES,
    options=(
        Option("protected", "yes", "protected VMs, or (no) VMs whose memory the host can see", ("yes", "no")),
        Pages("batch", 1, "pages that one MEM_SHARE or MEM_UNSHARE covers: 1 upstream, up to 512 on Android"),
        Option("conversion", "el2", "who hears of a conversion: nobody above EL2, or user space too", ("el2", "exit")),
        Option("hyp_lock", "global", "the locks of EL2: as upstream, per VM, or per 2 MiB", hw.LOCK_DESIGNS),
    ),
)
"""The one backend of the vendor."""
