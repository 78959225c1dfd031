"""KVM's vendor code for TDX (kernel: arch/x86/kvm/vmx/tdx.c; large pages: series of 2023 and RFC v5 of Jan 2026).

Untrusted, and the only caller of `hw`. What it keeps is what the kernel keeps: which HKIDs are used, and `KvmTdx` and
`VcpuTdx` at `vm.arch` and `vcpu.arch`. Batches go to the module as batches; they are counted, charged and recovered
as the kernel would make the calls, page by page.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Final, TypeVar

import attrs
import numpy as np

from cvmcore.backend import Backend, Option
from cvmcore.effects import Lock, Steps, point
from cvmcore.errors import InputError, UapiError
from cvmcore.hookspecs import API_VERSION, hookimpl
from cvmcore.pages import EMPTY, IntArray, Sel, array_of, contiguous, count, part, run
from cvmcore.types import (
    PAGE_BYTES,
    PG_LEVEL_1G,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    WALK_OK,
    Access,
    Batch,
    Capabilities,
    ConvertResult,
    Exit,
    Fatal,
    HostVerdict,
    HostView,
    InstallResult,
    MeterView,
    Retry,
    Stopped,
    Use,
    VcpuView,
    VmView,
    Walk,
)
from cvmcore_tdx.cost import CHARGES, PROFILE
from cvmcore_tdx.errors import Status, code, describe, is_busy
from cvmcore_tdx.hw import (
    CHUNK_BYTES,
    LEAF,
    MAX_FRAMES,
    NR_TDCX,
    NR_TDVPX,
    Accept,
    Accepted,
    Result,
    SeptState,
    TdxModule,
)

R = TypeVar("R")

FIRST_HKID: Final = 64
"""The module's own; those of TDs follow."""
SHARED_GFN_BIT: Final = 1 << 35
"""GPA bit 47: with a GPA width of 48, the alias bit (TDX_SHARED_BIT_PWL_4)."""
TD_ATTR_SEPT_VE_DISABLE: Final = 1 << 28
CHUNKS_PER_PAGE: Final = 4096 // CHUNK_BYTES
_INSIDE_RANK: Final = 500
_INIT_ERRORS: Final[dict[int, int]] = {
    Status.TDX_OPERAND_INVALID: errno.EINVAL, Status.TDX_RND_NO_ENTROPY: errno.EAGAIN,
}  # fmt: skip
"""What KVM_TDX_INIT_VM makes of a refusal of MNG.INIT; of any other EIO."""
RETRY: Final = point("fault.retry")
"""Somebody else has a lock that is only tried: it is their turn."""

_ACCEPT_WALK = np.zeros(len(Accept), np.uint8)
for _outcome, _walk in {
    Accept.ACCEPTED: Walk.OK,
    Accept.ALREADY_ACCEPTED: Walk.OK,
    Accept.SIZE_MISMATCH: Walk.SMALLER,
    Accept.EPT_VIOLATION: Walk.MISS,
    Accept.EPT_VIOLATION_LARGER: Walk.LARGER,
    Accept.NOT_REACHED: Walk.UNACCEPTED,
}.items():
    _ACCEPT_WALK[_outcome] = _walk
"""What an ACCEPT leads to; where it found a lock taken there is nothing to tell yet."""


# ---- what KVM keeps -------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class KvmTdx:
    """struct kvm_tdx."""

    hkid: int
    tdr: int
    tdcx: Sel
    inside: Lock
    """Read while a vCPU is in a call of the module's guest side; taken for write by who must have all vCPUs out."""
    nr_tdcx_added: int = 0
    init_called: bool = False
    initialized: bool = False
    finalized: bool = False
    key_released: bool = False
    source: Sel = EMPTY
    """Host pages that the next PAGE.ADDs copy from (page_add_src)."""
    added: int = 0
    """Pages added so far."""
    launch_digest: bytes = b""
    """MRTD, once the image is complete."""


@attrs.define(eq=False)
class VcpuTdx:
    """struct vcpu_tdx."""

    tdvpr: int
    pages: Sel
    init_called: bool = False


def seamcall(
    meter: MeterView, name: str, item: str, steps: Steps[R], n: int = 1, made: Callable[[R], int] | None = None
) -> Steps[R]:
    """Run a leaf as n calls: counted, and charged where it does its work, while it holds its locks.

    A batch that stops early was fewer calls: those that were done, and the one that was refused. made: says how many
    calls it was where that is not so; then a batch is charged at its end.
    """
    at_leaf = n if made is None or n == 1 else 0
    charged = 0
    try:
        effect = next(steps)
        while True:
            if effect is LEAF:
                charged = at_leaf
                meter.op(name, item, charged)
            effect = steps.send((yield effect))
    except StopIteration as stop:
        result: R = stop.value
    if made is not None:
        n = made(result)
    elif isinstance(result, Result) and result.status:
        n = result.done + 1
    meter.op(name, item, n - charged)
    return result


class Tdx:
    """The hooks of the vendor "intel-tdx"."""

    def __init__(self) -> None:
        self._hkids: set[int] = set()

    # ---- the machine ------------------------------------------------------------------------------------------

    @hookimpl
    def host_init(self, host: HostView) -> None:
        """Bring up the module: its PAMT covers all memory. KVM wants one whose DEMOTE does not stop for interrupts."""
        if host.nr_frames > MAX_FRAMES:
            raise InputError(f"the TDX model has machines of up to {MAX_FRAMES} frames, not {host.nr_frames}")
        hkids = range(FIRST_HKID, FIRST_HKID + 1 + int(host.options["hkids"]))
        host.hw = TdxModule(host.memory, host.nr_frames, hkids=hkids, enhanced_demote=True)
        self._hkids = set(host.hw.td_hkids)

    @hookimpl
    def capabilities(self, options: dict[str, Any]) -> Capabilities:
        large = options["page_aug"] == "2m"
        return Capabilities(
            private_by_attribute=True,
            has_mirror=True,
            zap_destroys_content=True,
            needs_accept=True,
            accepts_eagerly=options["accept"] == "eager",
            fault_tells_accept_level=True,
            retries_in_kvm=True,
            unaccepted_is_fatal=True,
            dirty_logging=False,
            read_only_slots=False,
            max_private_level=PG_LEVEL_2M if large else PG_LEVEL_4K,
            fresh_is_zero=True,
            confidential=True,
            encrypts=True,
            promotes=large,
            max_promoted_level=PG_LEVEL_1G if options["promote"] == "1g" else PG_LEVEL_2M,
            shared_gfn_bit=SHARED_GFN_BIT,
        )

    # ---- VMs --------------------------------------------------------------------------------------------------

    @hookimpl
    def vm_init(self, vm: VmView) -> Steps[None]:
        """Take an HKID, make the TD, configure its key, add the TDCS. MNG.INIT waits for KVM_TDX_INIT_VM, or for the
        first call that needs it. (kernel: __tdx_td_init, which KVM_TDX_INIT_VM calls.)"""
        if not self._hkids:
            raise UapiError(errno.ENOSPC, "KVM_TDX_INIT_VM", "no HKID is free")
        host, module = vm.host, vm.host.hw
        pages = array_of(host.frames.alloc(1 + NR_TDCX, Use.META))
        hkid = min(self._hkids)
        self._hkids.remove(hkid)
        state = KvmTdx(hkid, int(pages[0]), contiguous(pages[1:]), Lock(f"vm{vm.id}.tdx_inside", _INSIDE_RANK))
        status = yield from seamcall(
            host.meter, "TDH.MNG.CREATE", "seamcall", module.tdh_mng_create.steps(state.tdr, hkid)
        )
        if status:
            self._hkids.add(hkid)
            host.frames.free(contiguous(pages))
            raise UapiError(errno.EIO, "KVM_TDX_INIT_VM", f"TDH.MNG.CREATE: {describe(status)}")
        vm.arch, vm.key, vm.pre_fault_allowed = state, hkid, False
        for package in sorted(module.packages):
            steps = module.tdh_mng_key_config.steps(state.tdr, package)
            status = status or (yield from seamcall(host.meter, "TDH.MNG.KEY.CONFIG", "key_config", steps))
        for pfn in pages[1:].tolist():
            steps = module.tdh_mng_addcx.steps(state.tdr, pfn)
            status = status or (yield from seamcall(host.meter, "TDH.MNG.ADDCX", "seamcall", steps))
            state.nr_tdcx_added += not status
        if status:
            yield from self._release_key(vm)
            yield from self._reclaim_td(vm)
            raise UapiError(errno.EIO, "KVM_TDX_INIT_VM", describe(status))

    def _init(self, vm: VmView) -> Steps[None]:
        """MNG.INIT, once. Raises UapiError: EINVAL for what the module refuses, EAGAIN for want of entropy, or EIO."""
        state: KvmTdx = vm.arch
        if state.initialized:
            return
        steps = vm.host.hw.tdh_mng_init.steps(state.tdr)
        status = yield from seamcall(vm.host.meter, "TDH.MNG.INIT", "seamcall", steps)
        if status:
            error = _INIT_ERRORS.get(code(status), errno.EIO)
            raise UapiError(error, "KVM_TDX_INIT_VM", f"TDH.MNG.INIT: {describe(status)}")
        state.initialized = True

    @hookimpl
    def vm_pre_destroy(self, vm: VmView) -> Steps[None]:
        """tdx_mmu_release_hkid."""
        yield from self._release_key(vm)

    @hookimpl
    def vm_destroy(self, vm: VmView) -> Steps[None]:
        """tdx_vm_destroy: tables and vCPUs are gone, now the TDCS, and the TDR last."""
        yield from self._reclaim_td(vm)

    def _release_key(self, vm: VmView) -> Steps[None]:
        """Flush the vCPUs, block the TD, write back every package, free the HKID. Where that fails it is leaked."""
        state: KvmTdx = vm.arch
        if state.key_released:
            return
        module, meter = vm.host.hw, vm.host.meter
        for vcpu in vm.vcpus:
            if vcpu.arch is not None:
                steps = module.tdh_vp_flush.steps(vcpu.arch.tdvpr)
                status = yield from seamcall(meter, "TDH.VP.FLUSH", "seamcall", steps)
                if status and status != Status.TDX_VCPU_NOT_ASSOCIATED:
                    vm.bug(f"TDH.VP.FLUSH: {describe(status)}")
        status = yield from seamcall(
            meter, "TDH.MNG.VPFLUSHDONE", "seamcall", module.tdh_mng_vpflushdone.steps(state.tdr)
        )
        if not status:
            for package in sorted(module.packages):
                status = int(Status.TDX_INTERRUPTED_RESUMABLE)
                while status == Status.TDX_INTERRUPTED_RESUMABLE:
                    steps = module.tdh_phymem_cache_wb.steps(package)
                    status = yield from seamcall(meter, "TDH.PHYMEM.CACHE.WB", "cache_wb", steps)
            status = yield from seamcall(
                meter, "TDH.MNG.KEY.FREEID", "seamcall", module.tdh_mng_key_freeid.steps(state.tdr)
            )
        if status:
            vm.bug(f"the key of the TD could not be released, HKID {state.hkid} is leaked: {describe(status)}")
            return
        state.key_released = True
        self._hkids.add(state.hkid)

    def _reclaim_td(self, vm: VmView) -> Steps[None]:
        """Reclaim TDCS pages and the TDR. They are leaked while the key is held."""
        state: KvmTdx = vm.arch
        host = vm.host
        tdr = run(state.tdr, 1)
        if not state.key_released:
            host.frames.leak(tdr, "TDX: the key is still held")
            host.frames.leak(state.tdcx, "TDX: the key is still held")
            return
        added, rest = part(state.tdcx, 0, state.nr_tdcx_added), part(state.tdcx, state.nr_tdcx_added, NR_TDCX)
        host.frames.free(rest)
        back = yield from self._reclaim(host, added)
        self._clear(host, back)
        host.frames.free(back)
        back = yield from self._reclaim(host, tdr)
        if count(back):
            # The module wrote to the TDR under its own HKID.
            back = yield from self._write_back(vm, back, host.hw.global_hkid)
            self._clear(host, back)
            host.frames.free(back)

    def _reclaim(self, host: HostView, pfns: Sel) -> Steps[Sel]:
        """PHYMEM.PAGE.RECLAIM of each page; returns those that came back, the others are leaked."""
        back: list[IntArray] = []
        start, n = 0, count(pfns)
        while start < n:
            steps = host.hw.tdh_phymem_page_reclaim.steps(part(pfns, start, n))
            result = yield from seamcall(host.meter, "TDH.PHYMEM.PAGE.RECLAIM", "page_reclaim", steps, n - start)
            if not start and result.done == n:
                return pfns
            back.append(array_of(part(pfns, start, start + result.done)))
            start += result.done
            if start < n:
                host.frames.leak(part(pfns, start, start + 1), f"TDH.PHYMEM.PAGE.RECLAIM: {describe(result.status)}")
                start += 1
        return contiguous(np.concatenate(back)) if back else EMPTY

    def _write_back(self, vm: VmView, pfns: Sel, hkid: int) -> Steps[Sel]:
        """PHYMEM.PAGE.WBINVD of 4K pages; returns those for which it worked, the others are leaked."""
        host = vm.host
        good: list[IntArray] = []
        start, n = 0, count(pfns)
        while start < n:
            steps = host.hw.tdh_phymem_page_wbinvd.steps(part(pfns, start, n), hkid)
            result = yield from seamcall(host.meter, "TDH.PHYMEM.PAGE.WBINVD", "page_wbinvd", steps, n - start)
            if not start and result.done == n:
                return pfns
            good.append(array_of(part(pfns, start, start + result.done)))
            start += result.done
            if start < n:
                vm.bug(f"TDH.PHYMEM.PAGE.WBINVD: {describe(result.status)}")
                host.frames.leak(part(pfns, start, start + 1), "TDX: its caches were not written back")
                start += 1
        return contiguous(np.concatenate(good)) if good else EMPTY

    def _clear(self, host: HostView, pfns: Sel) -> None:
        """Rewrite pages with direct stores, so that no line of theirs is the TD's any more (tdx_clear_page)."""
        if count(pfns):
            host.memory.clear(pfns)
            host.meter.charge("movdir64b_clear_4k", count(pfns))

    # ---- vCPUs ------------------------------------------------------------------------------------------------

    @hookimpl
    def vcpu_create(self, vcpu: VcpuView) -> Steps[None]:
        """Make and initialise the vCPU (kernel: tdx_vcpu_create, and KVM_TDX_INIT_VCPU)."""
        vm, host = vcpu.vm, vcpu.vm.host
        module, meter, state = host.hw, host.meter, vcpu.vm.arch
        yield from self._init(vm)
        if state.finalized:
            raise UapiError(errno.EIO, "KVM_TDX_INIT_VCPU", "TDH.VP.INIT: TDX_OP_STATE_INCORRECT")
        pages = array_of(host.frames.alloc(NR_TDVPX, Use.META))
        tdvpr = int(pages[0])
        steps = module.tdh_vp_create.steps(state.tdr, tdvpr)
        status = yield from seamcall(meter, "TDH.VP.CREATE", "seamcall", steps)
        if status:
            host.frames.free(contiguous(pages))
            raise UapiError(errno.EIO, "KVM_TDX_INIT_VCPU", f"TDH.VP.CREATE: {describe(status)}")
        for pfn in pages[1:].tolist():
            steps = module.tdh_vp_addcx.steps(tdvpr, pfn)
            status = status or (yield from seamcall(meter, "TDH.VP.ADDCX", "seamcall", steps))
        if not status:
            status = yield from seamcall(meter, "TDH.VP.INIT", "seamcall", module.tdh_vp_init.steps(tdvpr))
        if status:
            # The key is held, so that nothing can be reclaimed: the kernel leaks the pages as well.
            host.frames.leak(contiguous(pages), "TDX: pages of a vCPU that was not made")
            raise UapiError(errno.EIO, "KVM_TDX_INIT_VCPU", describe(status))
        vcpu.arch = VcpuTdx(tdvpr, contiguous(pages))

    @hookimpl
    def vcpu_enter(self, vcpu: VcpuView) -> Steps[None]:
        """VP.ENTER; its price is part of vm_exit. UapiError(EINVAL) before the TD is finalised."""
        state: KvmTdx = vcpu.vm.arch
        if vcpu.arch is None or not state.finalized:
            raise UapiError(errno.EINVAL, "KVM_RUN", "the TD is not finalised")
        while True:
            yield state.inside.read
            status = yield from vcpu.vm.host.hw.tdh_vp_enter.steps(vcpu.arch.tdvpr)
            yield state.inside.release
            if not is_busy(status):
                break
            vcpu.vm.host.meter.charge("seamcall")
            yield RETRY
        if status:
            vcpu.vm.bug(f"TDH.VP.ENTER: {describe(status)}")
            raise UapiError(errno.EIO, "KVM_RUN", f"TDH.VP.ENTER: {describe(status)}")

    @hookimpl
    def vcpu_exit(self, vcpu: VcpuView) -> None:
        """The vCPU is out of the TD."""
        vcpu.vm.host.hw.td_exit(vcpu.arch.tdvpr)

    @hookimpl
    def vcpu_free(self, vcpu: VcpuView) -> Steps[None]:
        """tdx_vcpu_free: its pages come back once the key is released; before, they are leaked."""
        host, arch = vcpu.vm.host, vcpu.arch
        if arch is None:
            return
        vcpu.arch = None
        if not vcpu.vm.arch.key_released:
            host.frames.leak(arch.pages, "TDX: the key is still held")
            return
        back = yield from self._reclaim(host, arch.pages)
        self._clear(host, back)
        host.frames.free(back)

    # ---- vendor calls of user space ---------------------------------------------------------------------------

    @hookimpl
    def memory_encrypt_op(self, vm: VmView, command: str, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        """KVM_TDX_* (kernel: tdx_vm_ioctl, tdx_vcpu_ioctl); INIT_MEM_REGION is the core's `launch_update`."""
        commands: dict[str, tuple[tuple[str, ...], Callable[[VmView, dict[str, Any]], Steps[dict[str, Any]]]]] = {
            "KVM_TDX_CAPABILITIES": ((), self._capabilities),
            "KVM_TDX_INIT_VM": (("attributes", "gpaw", "reserved"), self._init_vm),
            "KVM_TDX_INIT_VCPU": (("vcpu",), self._init_vcpu),
            "KVM_TDX_EXTEND_MEMORY": (("gpa", "nr_pages"), self._extend_memory),
            "KVM_TDX_FINALIZE_VM": ((), self._finalize_vm),
        }
        if vm.options["terminate_vm"] == "on":
            commands["KVM_TDX_TERMINATE_VM"] = ((), self._terminate_vm)
        if arguments.get("hw_error", 0):
            raise UapiError(errno.EINVAL, command, "hw_error is an output")
        if command not in commands:
            raise UapiError(errno.EINVAL, command, "KVM has no such command for a TD")
        fields, implementation = commands[command]
        for name, value in arguments.items():
            if name not in (*fields, "flags", "hw_error"):
                raise UapiError(errno.EFAULT, command, f"its structure has {name}, which is no field of it")
            if not isinstance(value, int) or not 0 <= value < 1 << 64:
                raise UapiError(errno.EFAULT, command, f"its {name} cannot be {str(value)[:40]}")
        if arguments.get("flags", 0):
            raise UapiError(errno.EINVAL, command, f"flags {arguments['flags']:#x}")
        return (yield from implementation(vm, arguments))

    def _capabilities(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        """What TDs can be given."""
        yield from ()
        return {"supported_attrs": TD_ATTR_SEPT_VE_DISABLE}

    def _init_vm(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        """KVM_TDX_INIT_VM: attributes, gpaw (guest physical address bits), reserved."""
        state: KvmTdx = vm.arch
        attributes = arguments.get("attributes", TD_ATTR_SEPT_VE_DISABLE)
        checks = (
            (state.init_called, errno.EINVAL, "the TD is initialised already"),
            (arguments.get("reserved", 0), errno.EINVAL, "reserved fields must be 0"),
            (vm.vcpus, errno.EBUSY, "there are vCPUs already"),
            (attributes & ~TD_ATTR_SEPT_VE_DISABLE, errno.EINVAL, f"attributes {attributes:#x} are not supported"),
            (not attributes, errno.EINVAL, "a TD must be made with SEPT_VE_DISABLE"),
            (arguments.get("gpaw", 48) != 48, errno.EINVAL, "the width of guest addresses is 48 on this machine"),
        )
        for wrong, error, why in checks:
            if wrong:
                raise UapiError(error, "KVM_TDX_INIT_VM", why)
        yield from self._init(vm)
        state.init_called = True
        return {}

    def _init_vcpu(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        """KVM_TDX_INIT_VCPU: the vCPU was initialised when it was made; a second call is refused all the same."""
        yield from ()
        vcpu = next((v for v in vm.vcpus if v.id == arguments.get("vcpu", 0)), None)
        if vcpu is None or vcpu.arch.init_called:
            raise UapiError(errno.EINVAL, "KVM_TDX_INIT_VCPU", "no such vCPU, or it is initialised already")
        vcpu.arch.init_called = True
        return {}

    def _extend_memory(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        """KVM_TDX_EXTEND_MEMORY (posted in 2024, not in tree): MR.EXTEND of nr_pages, from gpa on, added before."""
        state: KvmTdx = vm.arch
        gpa, nr_pages = arguments.get("gpa", 0), arguments.get("nr_pages", 0)
        if gpa % PAGE_BYTES or nr_pages <= 0 or state.finalized or not state.initialized:
            raise UapiError(errno.EINVAL, "KVM_TDX_EXTEND_MEMORY", "the pages are none, or the TD is not being built")
        n = nr_pages * CHUNKS_PER_PAGE
        steps = vm.host.hw.tdh_mr_extend.steps(state.tdr, gpa, n)
        result = yield from seamcall(vm.host.meter, "TDH.MR.EXTEND", "mr_extend_256b", steps, n)
        if result.status:
            error = errno.EBUSY if is_busy(result.status) else errno.EIO
            raise UapiError(error, "KVM_TDX_EXTEND_MEMORY", f"TDH.MR.EXTEND: {describe(result.status)}")
        return {}

    def _finalize_vm(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        """KVM_TDX_FINALIZE_VM: MR.FINALIZE; the TD can run, and pages can be mapped on demand."""
        state: KvmTdx = vm.arch
        if state.finalized or not state.initialized:
            raise UapiError(errno.EINVAL, "KVM_TDX_FINALIZE_VM", "the TD is not initialised, or finalised already")
        steps = vm.host.hw.tdh_mr_finalize.steps(state.tdr)
        status = yield from seamcall(vm.host.meter, "TDH.MR.FINALIZE", "seamcall", steps)
        if status:
            error = errno.EBUSY if is_busy(status) else errno.EIO
            raise UapiError(error, "KVM_TDX_FINALIZE_VM", f"TDH.MR.FINALIZE: {describe(status)}")
        state.finalized = vm.pre_fault_allowed = True
        state.launch_digest = vm.host.hw.td(state.tdr).mrtd
        return {"mrtd": state.launch_digest}

    def _terminate_vm(self, vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
        """KVM_TDX_TERMINATE_VM (posted 2025): the TD dies now, its key goes while its memory is still mapped, and
        pages are reclaimed rather than removed one by one."""
        vm.bug("terminated by KVM_TDX_TERMINATE_VM")
        yield from self._release_key(vm)
        return {}

    # ---- launch -----------------------------------------------------------------------------------------------

    @hookimpl
    def launch_update(self, vm: VmView, batch: Batch, contents: list[bytes], kind: str) -> Steps[InstallResult]:
        """KVM_TDX_INIT_MEM_REGION: page by page PAGE.ADD, and for kind "normal" MR.EXTEND of its 16 chunks.

        "unmeasured" and "zero" pages are added only, as sections of a firmware image without MR.EXTEND are.
        """
        state: KvmTdx = vm.arch
        if kind not in ("normal", "unmeasured", "zero") or state.finalized:
            return Stopped(0, Fatal(errno.EINVAL, f"a TD has no '{kind}' pages, or is finalised"))
        host, n = vm.host, len(batch)
        yield from self._init(vm)
        try:
            sources = host.frames.alloc(n, Use.ANON)
        except UapiError as error:
            return Stopped(0, Fatal(error.errno, error.why))
        stamps = [host.memory.intern(b"" if kind == "zero" else content) for content in contents]
        host.memory.write(sources, stamps, 0)
        together = 1 if kind == "normal" else n
        before = state.added
        stopped: InstallResult = None
        for start in range(0, n, together):
            some = batch.part(start, start + together)
            state.source = part(sources, start, start + together)
            try:
                yield from vm.map_private(some)
                if kind == "normal":
                    yield from self._measure(vm, some)
            except UapiError as error:
                done = start if kind == "normal" else state.added - before
                stopped = Stopped(done, Fatal(error.errno, error.why))
                break
        state.source = EMPTY
        host.memory.clear(sources)
        host.frames.free(sources)
        return stopped

    def _measure(self, vm: VmView, batch: Batch) -> Steps[None]:
        """MR.EXTEND of every chunk of one page. Raises UapiError: EBUSY, or EIO."""
        gpa = int(array_of(batch.gfns)[0]) << 12
        steps = vm.host.hw.tdh_mr_extend.steps(vm.arch.tdr, gpa, CHUNKS_PER_PAGE)
        result = yield from seamcall(vm.host.meter, "TDH.MR.EXTEND", "mr_extend_256b", steps, CHUNKS_PER_PAGE)
        if result.status:
            error = errno.EBUSY if is_busy(result.status) else errno.EIO
            raise UapiError(error, "KVM_TDX_INIT_MEM_REGION", f"TDH.MR.EXTEND: {describe(result.status)}")

    @hookimpl
    def launch_finish(self, vm: VmView) -> Steps[None]:
        """KVM_TDX_FINALIZE_VM."""
        if not vm.arch.finalized:
            yield from self._init(vm)
        yield from self._finalize_vm(vm, {})

    # ---- growing the Secure EPT -------------------------------------------------------------------------------

    @hookimpl
    def link_private_spt(self, vm: VmView, gfns: Sel, level: int, tables: Sel) -> Steps[InstallResult]:
        """SEPT.ADD."""
        steps = vm.host.hw.tdh_mem_sept_add.steps(vm.arch.tdr, level - 1, gfns, tables)
        result = yield from seamcall(vm.host.meter, "TDH.MEM.SEPT.ADD", "sept_add", steps, count(gfns))
        return self._installed(vm, "TDH.MEM.SEPT.ADD", result)

    @hookimpl
    def set_private_spte(self, vm: VmView, batch: Batch) -> Steps[InstallResult]:
        """PAGE.AUG; before the TD is finalised PAGE.ADD, from the page that is being loaded."""
        state: KvmTdx = vm.arch
        module, meter, n = vm.host.hw, vm.host.meter, len(batch)
        if state.finalized:
            name, item = "TDH.MEM.PAGE.AUG", "page_aug_4k" if batch.level == PG_LEVEL_4K else "page_aug_2m"
            steps = module.tdh_mem_page_aug.steps(state.tdr, batch.level - 1, batch.gfns, batch.pfns)
            result = yield from seamcall(meter, name, item, steps, n)
        elif count(state.source) == n:
            name = "TDH.MEM.PAGE.ADD"
            steps = module.tdh_mem_page_add.steps(state.tdr, batch.gfns, batch.pfns, state.source)
            result = yield from seamcall(meter, name, "page_add", steps, n)
            state.added += result.done
        else:
            vm.bug("a private page is mapped before the TD is finalised, and not by its launch")
            return Stopped(0, Fatal(errno.EIO, "no page to add"))
        # tdx_clflush_page: each 4K of a page, whatever its size, before the module gets it.
        flushed = result.done + bool(result.status)
        meter.charge("clflush_4k", flushed << 9 * (batch.level - 1))
        return self._installed(vm, name, result)

    def _installed(self, vm: VmView, name: str, result: Result) -> InstallResult:
        """BUSY is retried by the guest's next fault, anything else is a bug of KVM."""
        if not result.status:
            return None
        if is_busy(result.status):
            return Stopped(result.done, Retry())
        why = f"{name}: {describe(result.status)}"
        vm.bug(why)
        return Stopped(result.done, Fatal(errno.EIO, why))

    # ---- kicking ----------------------------------------------------------------------------------------------

    def _charge_kicks(self, vm: VmView, n: int) -> None:
        vm.host.meter.charge("kick_base", n)
        vm.host.meter.charge("kick_per_vcpu", n * len(vm.vcpus))

    def _must(
        self, vm: VmView, name: str, item: str, leaf: Callable[[Sel], Steps[Result]], gfns: Sel
    ) -> Steps[list[int]]:
        """A leaf that has to succeed on every page: where it is busy, all vCPUs are kept out and it is tried once
        more (kernel: tdh_do_no_vcpus). Whatever fails then is a bug; returns the positions where it did."""
        meter, state = vm.host.meter, vm.arch
        failed: list[int] = []
        start, n = 0, count(gfns)
        while start < n:
            result = yield from seamcall(meter, name, item, leaf(part(gfns, start, n)), n - start)
            start += result.done
            if is_busy(result.status):
                yield state.inside.write
                vm.kick_all_vcpus()
                self._charge_kicks(vm, 1)
                result = yield from seamcall(meter, name, item, leaf(part(gfns, start, start + 1)))
                yield state.inside.release
                start += result.done
            if result.status:
                vm.bug(f"{name}: {describe(result.status)}")
                failed.append(start)
                start += 1
        return failed

    def _track(self, vm: VmView, n: int) -> Steps[list[int]]:
        """n times TRACK, and each time kick all vCPUs (tdx_track). Not before the TD can run. Where it is busy, it is
        tried once more with all vCPUs kept out. Returns the positions where it failed, which is a bug.

        After the first kick nobody is inside, and the others can be made in one go.
        """
        state: KvmTdx = vm.arch
        meter, steps = vm.host.meter, vm.host.hw.tdh_mem_track.steps
        failed: list[int] = []
        at = 0 if state.finalized else n
        while at < n:
            asked = n - at if at else 1
            result = yield from seamcall(meter, "TDH.MEM.TRACK", "mem_track", steps(state.tdr, asked), asked)
            done, status = result.done, result.status
            if is_busy(status):
                yield state.inside.write
                vm.kick_all_vcpus()
                self._charge_kicks(vm, 1)
                result = yield from seamcall(meter, "TDH.MEM.TRACK", "mem_track", steps(state.tdr))
                yield state.inside.release
                done, status = done + result.done, result.status
            at += done
            yield state.inside.write
            vm.kick_all_vcpus()
            yield state.inside.release
            self._charge_kicks(vm, max(1, done))
            if status and not done:
                vm.bug(f"TDH.MEM.TRACK: {describe(status)}")
                failed.append(at)
                at += 1
        return failed

    # ---- shrinking, splitting, merging ------------------------------------------------------------------------

    @hookimpl
    def remove_private_spte(self, vm: VmView, batch: Batch) -> Steps[None]:
        """For each page BLOCK, TRACK, kick, REMOVE, WBINVD, clear (tdx_sept_remove_private_spte). With the key gone
        RECLAIM, WBINVD, clear. Pages that fail are leaked."""
        state: KvmTdx = vm.arch
        host = vm.host
        if state.key_released:
            back = yield from self._reclaim(host, batch.pfns)
            pages = Batch(batch.slot, batch.level, EMPTY, back).all_pfns
        else:
            batch = yield from self._block_and_track(vm, batch)
            failed = yield from self._must(
                vm, "TDH.MEM.PAGE.REMOVE", "page_remove",
                lambda gfns: host.hw.tdh_mem_page_remove.steps(state.tdr, batch.level - 1, gfns), batch.gfns,
            )  # fmt: skip
            pages = self._without(vm, batch, failed, "TDX: it could not be removed").all_pfns
        pages = yield from self._write_back(vm, pages, state.hkid)
        self._clear(host, pages)

    def _block_and_track(self, vm: VmView, batch: Batch) -> Steps[Batch]:
        """BLOCK each page, TRACK and kick. Returns what could be blocked; the rest is leaked."""
        state: KvmTdx = vm.arch
        failed = yield from self._must(
            vm, "TDH.MEM.RANGE.BLOCK", "range_block",
            lambda gfns: vm.host.hw.tdh_mem_range_block.steps(state.tdr, batch.level - 1, gfns), batch.gfns,
        )  # fmt: skip
        blocked = self._without(vm, batch, failed, "TDX: it could not be blocked")
        failed = yield from self._track(vm, len(blocked))
        return self._without(vm, blocked, failed, "TDX: its translations could not be tracked")

    def _without(self, vm: VmView, batch: Batch, failed: list[int], why: str) -> Batch:
        """The batch without the pages at some positions, which are leaked."""
        if not failed:
            return batch
        size = 1 << 9 * (batch.level - 1)
        gfns, pfns = array_of(batch.gfns), array_of(batch.pfns)
        lost = Batch(batch.slot, batch.level, EMPTY, contiguous(pfns[failed], size))
        vm.host.frames.leak(lost.all_pfns, why)
        kept = contiguous(np.delete(gfns, failed), size), contiguous(np.delete(pfns, failed), size)
        return Batch(batch.slot, batch.level, *kept)

    @hookimpl
    def free_private_spt(self, vm: VmView, tables: Sel) -> Steps[Sel]:
        """RECLAIM of tables (tdx_sept_free_private_spt): only after the key is released; else KVM has a bug."""
        if not vm.arch.key_released:
            vm.bug("a Secure-EPT page is freed while the TD's key is held")
            vm.host.frames.leak(tables, "TDX: the key is still held")
            return EMPTY
        back = yield from self._reclaim(vm.host, tables)
        self._clear(vm.host, back)
        return back

    @hookimpl
    def split_private_spt(self, vm: VmView, gfn: int, level: int, table: int) -> Steps[InstallResult]:
        """BLOCK, TRACK, kick, DEMOTE: what comes out is not blocked."""
        page, tdr, module = run(gfn, 1), vm.arch.tdr, vm.host.hw
        failed = yield from self._must(
            vm, "TDH.MEM.RANGE.BLOCK", "range_block",
            lambda gfns: module.tdh_mem_range_block.steps(tdr, level - 1, gfns), page,
        )  # fmt: skip
        if not failed:
            yield from self._track(vm, 1)
            failed = yield from self._must(
                vm, "TDH.MEM.PAGE.DEMOTE", "page_demote",
                lambda gfns: module.tdh_mem_page_demote.steps(tdr, level - 1, gfns, run(table, 1)), page,
            )  # fmt: skip
        return Stopped(0, Fatal(errno.EIO, "a large page could not be split")) if failed else None

    @hookimpl
    def promote_private_spt(self, vm: VmView, gfn: int, level: int, table: int, blocked: bool) -> Steps[InstallResult]:
        """BLOCK the table, TRACK, kick (unless that was done before), PROMOTE; WBINVD of the table page. Where the
        module refuses, UNBLOCK."""
        page, tdr, module, meter = run(gfn, 1), vm.arch.tdr, vm.host.hw, vm.host.meter
        if not blocked:
            stopped = yield from self._block_tables(vm, page, level)
            if stopped is not None:
                return stopped
        status = int(Status.TDX_INTERRUPTED_RESTARTABLE)
        while status == Status.TDX_INTERRUPTED_RESTARTABLE:
            steps = module.tdh_mem_page_promote.steps(tdr, level - 1, page)
            result = yield from seamcall(meter, "TDH.MEM.PAGE.PROMOTE", "page_promote", steps)
            status = result.status
        if status:
            if not is_busy(status) and code(status) != Status.TDX_EPT_INVALID_PROMOTE_CONDITIONS:
                vm.bug(f"TDH.MEM.PAGE.PROMOTE: {describe(status)}")
            yield from self.unblock_private_spt(vm, page, level)
            return Stopped(0, Retry())
        back = yield from self._write_back(vm, run(table, 1), vm.arch.hkid)
        self._clear(vm.host, back)
        return None

    @hookimpl
    def block_private_spt(self, vm: VmView, gfns: Sel, level: int) -> Steps[InstallResult]:
        """BLOCK each table; one TRACK and kick serves all of them."""
        return (yield from self._block_tables(vm, gfns, level))

    def _block_tables(self, vm: VmView, gfns: Sel, level: int) -> Steps[InstallResult]:
        steps = vm.host.hw.tdh_mem_range_block.steps
        failed = yield from self._must(
            vm, "TDH.MEM.RANGE.BLOCK", "range_block", lambda some: steps(vm.arch.tdr, level - 1, some), gfns
        )
        if failed:
            return Stopped(failed[0], Fatal(errno.EIO, "a table could not be blocked"))
        yield from self._track(vm, 1)
        return None

    @hookimpl
    def unblock_private_spt(self, vm: VmView, gfns: Sel, level: int) -> Steps[None]:
        """UNBLOCK each table; with the key gone nobody walks them any more."""
        if vm.arch.key_released:
            return
        steps = vm.host.hw.tdh_mem_range_unblock.steps
        yield from self._must(
            vm, "TDH.MEM.RANGE.UNBLOCK", "range_unblock", lambda some: steps(vm.arch.tdr, level - 1, some), gfns
        )

    # ---- what guest and host do to memory themselves ----------------------------------------------------------

    @hookimpl
    def guest_accept(self, vm: VmView, gfns: Sel, level: int) -> Steps[Access]:
        """TDG.MEM.PAGE.ACCEPT. A call that ends in a TD exit is counted when the guest makes it again; one that finds
        a lock taken it makes again at once."""
        state: KvmTdx = vm.arch
        meter, done = vm.host.meter, 0
        name, item = "TDG.MEM.PAGE.ACCEPT", "accept_4k" if level == PG_LEVEL_4K else "accept_2m"
        while True:
            left = part(gfns, done, count(gfns))
            yield state.inside.read
            steps = vm.host.hw.tdg_mem_page_accept.steps(state.tdr, level - 1, left)
            accepted: Accepted = yield from seamcall(
                meter, name, item, steps, count(left), made=lambda accepted: accepted.count(Accept.ACCEPTED)
            )
            yield state.inside.release
            refused = accepted.count(Accept.ALREADY_ACCEPTED) + accepted.count(Accept.SIZE_MISMATCH)
            meter.op(name, "tdcall", refused)
            if not accepted.count(Accept.BUSY):
                break
            done += accepted.count(Accept.ACCEPTED) + accepted.count(Accept.ALREADY_ACCEPTED)
            meter.op(name, "tdcall")
            yield RETRY
        status: Any = _ACCEPT_WALK[accepted.outcome]
        if done and np.count_nonzero(status):
            status = np.concatenate((np.zeros(done, np.uint8), np.broadcast_to(status, count(left))))
        return Access(status if np.ndim(status) else int(status), EMPTY if done else accepted.pfns)

    @hookimpl
    def guest_access(self, vm: VmView, gfns: Sel, pfns: Sel, write: bool, private: bool) -> Access:
        """The processor's walk of the Secure EPT for private accesses; shared ones go through KVM's own tables."""
        if not private:
            return Access(WALK_OK, pfns)
        access: Access = vm.host.hw.guest_access(vm.arch.tdr, gfns, write)
        if not vm.dead and vm.host.hw.td(vm.arch.tdr).fatal:
            vm.bug("machine check: the TD read memory that the host had written")
        return access

    @hookimpl
    def guest_convert(self, gfns: Sel) -> ConvertResult:
        """MapGPA: a TDVMCALL that the module passes on. Nothing changes until the host removes or augments pages."""
        return Exit(count(gfns))

    @hookimpl
    def read_private_spte(self, vm: VmView, gfns: Sel, level: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """What the Secure EPT holds."""
        return _kinds(vm.host.hw.sept_words(vm.arch.tdr, level - 1, gfns))

    @hookimpl
    def walk_private_spte(
        self, vm: VmView, gfns: Sel, level: int, reads: int
    ) -> Steps[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | Stopped | None]:
        """MEM.SEPT.RD of each entry: the walk that the mirror spares."""
        meter = vm.host.meter
        if not count(gfns):
            meter.op("TDH.MEM.SEPT.RD", "sept_rd", reads)
            return None
        steps = vm.host.hw.tdh_mem_sept_rd.steps(vm.arch.tdr, level - 1, gfns)
        n = count(gfns) if reads == 0 else reads
        result = yield from seamcall(meter, "TDH.MEM.SEPT.RD", "sept_rd", steps, n, made=lambda _: reads)
        return Stopped(result.done, Retry()) if result.status else _kinds(result.words)

    @hookimpl
    def host_access(self, host: HostView, pfns: Sel, write: bool) -> HostVerdict:
        """TD memory reads as zeros; a write goes through, and the TD finds a machine check."""
        verdict: HostVerdict = host.hw.host_access(pfns, write)
        return verdict


def watch_launch(vm: VmView, tell: Callable[[str, int | None, bytes], None]) -> None:
    """Have the module tell (type, gpa, digest so far) of all that it measures into the TD."""
    vm.host.hw.td(vm.arch.tdr).watch = tell


_KIND_OF = np.array(
    [0 if state in (SeptState.FREE, SeptState.REMOVED) else 4 if state == SeptState.NL_BLOCKED
     else 2 if state > SeptState.NL_BLOCKED else 1 for state in range(32)], np.uint8,
)  # fmt: skip
"""Kind of an entry, as the contract has it, by its state."""


def _kinds(words: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Kinds and frames of Secure-EPT entries, as the contract has them."""
    kinds = _KIND_OF[words & np.uint32(31)]
    return kinds, (words >> np.uint32(5)).astype(np.int64)


TDX = Backend(
    name="tdx",
    vendor="intel-tdx",
    vm_type="tdx",
    summary="Intel TDX: a mirror of the Secure EPT, pages accepted by the guest, private memory by attribute",
    api_version=API_VERSION,
    make=Tdx,
    profile=PROFILE,
    charges=CHARGES,
    kvm_type=5,
    policy_words=(("walker", "seamcall", "external"),),
    options=(
        Option("page_aug", "4k", "largest private page that is mapped", ("4k", "2m")),
        Option("promote", "2m", "largest page that small ones are merged into, with page_aug=2m", ("2m", "1g")),
        Option("accept", "lazy", "guests accept memory when they first use it, or all at once", ("lazy", "eager")),
        Option("hkids", 63, "key ids for TDs, so TDs that can live at a time"),
        Option("terminate_vm", "off", "offer KVM_TDX_TERMINATE_VM: key released before memory is freed", ("off", "on")),
    ),
)
