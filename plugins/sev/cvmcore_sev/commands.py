"""KVM_MEMORY_ENCRYPT_OP: the launch, and the KVM_SEV_* commands (kernel: arch/x86/kvm/svm/sev.c).

`_COMMANDS` says which function a command is; it has the kernel's name, and takes the VM and the fields of the command's
structure by name.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from cvmcore.effects import Steps
from cvmcore.errors import UapiError
from cvmcore.pages import Sel, array_of, contiguous, count, first, part, run, take, where
from cvmcore.types import (
    PAGE_BYTES,
    PAGE_SHIFT,
    PG_LEVEL_4K,
    Batch,
    Fatal,
    HostView,
    InstallResult,
    Stopped,
    VmView,
    Walk,
)
from cvmcore_sev.errors import SevStatus
from cvmcore_sev.host import (
    SEV_ES_TYPE,
    SEV_TYPE,
    SNP_TYPE,
    SevVm,
    VcpuState,
    not_a_mirror,
    rmpupdate,
    sev_issue_cmd,
    snp_page_reclaim,
    snp_safe_alloc_page,
)
from cvmcore_sev.hw import POLICY_ES, VMSA_GFN
from cvmcore_sev.launch import PAGE_TYPES
from cvmcore_sev.pins import contig_runs, sev_pin_pfn, sev_unpin_memory

SNP_POLICY: Final = 3 << 16
"""Policy of a guest whose VMM names none: SMT allowed, and the bit that must be one."""
ES_POLICY: Final = POLICY_ES


# ---- launch -----------------------------------------------------------------------------------------------------


def _start(vm: VmView, policy: int | None = None, call: str = "KVM_SEV_LAUNCH_START") -> Steps[None]:
    """Create the guest's context and bind it to the ASID, unless that was done."""
    arch: SevVm = vm.arch
    if arch.started:
        return
    if arch.snp:
        yield from _start_snp(vm, SNP_POLICY if policy is None else policy)
        return
    host, psp = vm.host, vm.host.hw.psp
    arch.policy = (ES_POLICY if arch.es else 0) if policy is None else policy
    status, handle = yield from sev_issue_cmd(host, "LAUNCH_START", psp.launch_start.steps(arch.policy))
    if not status:
        status = yield from sev_issue_cmd(host, "ACTIVATE", psp.activate.steps(handle, arch.asid))
        if status:
            yield from sev_issue_cmd(host, "DECOMMISSION", psp.decommission.steps(handle))
    if status:
        raise UapiError(errno.EIO, call, f"firmware: {status.name}")
    arch.handle = handle


def _start_snp(vm: VmView, policy: int) -> Steps[None]:
    """snp_launch_start: a context page, the launch, the ASID."""
    call = "KVM_SEV_SNP_LAUNCH_START"
    arch: SevVm = vm.arch
    host, psp = vm.host, vm.host.hw.psp
    gctx = snp_safe_alloc_page(host)
    status: SevStatus = SevStatus.INVALID_PAGE_STATE
    if rmpupdate(host, run(gctx, 1), assigned=True, immutable=True):
        status = yield from sev_issue_cmd(host, "SNP_GCTX_CREATE", psp.snp_gctx_create.steps(gctx))
    if status:
        if (yield from snp_page_reclaim(host, run(gctx, 1))):
            host.frames.free(run(gctx, 1))
        raise UapiError(errno.ENOTTY, call, f"no guest context: {status.name}")
    status = yield from sev_issue_cmd(host, "SNP_LAUNCH_START", psp.snp_launch_start.steps(gctx, policy))
    if not status:
        status = yield from sev_issue_cmd(host, "SNP_ACTIVATE", psp.snp_activate.steps(gctx, arch.asid))
    if status:
        yield from sev_issue_cmd(host, "SNP_DECOMMISSION", psp.snp_decommission.steps(gctx))
        if (yield from snp_page_reclaim(host, run(gctx, 1))):
            host.frames.free(run(gctx, 1))
        raise UapiError(errno.EIO, call, f"firmware: {status.name}")
    arch.gctx_pfn, arch.policy = gctx, policy


def launch_update(vm: VmView, batch: Batch, contents: list[bytes], kind: str) -> Steps[InstallResult]:
    """SNP: sev_gmem_post_populate of each page. SEV, SEV-ES: sev_launch_update_data of the VMM's memory."""
    arch: SevVm = vm.arch
    if kind == "vmsa" or kind not in PAGE_TYPES or (not arch.snp and kind != "normal"):
        return Stopped(0, Fatal(errno.EINVAL, f"{arch.vm_type} guests load no '{kind}' pages"))
    if arch.mirrors is not None:
        return Stopped(0, Fatal(errno.EINVAL, "the VM mirrors another, which loads the image"))
    try:
        yield from _start(vm)
    except UapiError as error:
        return Stopped(0, Fatal(error.errno, error.why))
    if arch.snp:
        return (yield from sev_gmem_post_populate(vm, batch, contents, kind))
    _write_contents(vm.host, batch.pfns, contents)
    done, status = yield from _update_data(vm, [batch])
    return Stopped(done, Fatal(errno.EIO, f"LAUNCH_UPDATE_DATA: {status.name}")) if status else None


def _write_contents(host: HostView, pfns: Sel, contents: list[bytes]) -> None:
    host.memory.write(pfns, np.array([host.memory.intern(page) for page in contents], np.uint32), 0)
    host.meter.charge("host_copy_4k", len(contents))


def sev_gmem_post_populate(vm: VmView, batch: Batch, contents: list[bytes], kind: str) -> Steps[InstallResult]:
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
    updated = rmpupdate(host, pfns, gfns, counted=False, assigned=True, asid=arch.asid, immutable=True)
    command = yield from hw.psp.snp_launch_update.steps(arch.gctx_pfn, part(pfns, 0, updated), PAGE_TYPES[kind])
    done = command.done
    host.meter.charge("host_copy_4k", min(done + 1, n) if kind != "zero" else 0)
    host.meter.op("RMPUPDATE", "rmpupdate_4k", min(done + 1, n))
    host.meter.op("SNP_LAUNCH_UPDATE", "launch_update_4k", min(done + 1, updated))
    if done < n:
        yield from _undo_populate(vm, pfns, old, done, updated)
    if done < len(batch):
        why = f"SNP_LAUNCH_UPDATE: {command.status.name}" if done < updated else "RMPUPDATE, or assigned already"
        return Stopped(done, Fatal(errno.EIO, why))
    return None


def _undo_populate(vm: VmView, pfns: Sel, old: tuple[Any, Any], done: int, updated: int) -> Steps[None]:
    """The page at `done` failed: it goes back to the host. Those behind it were never touched, one by one."""
    host, n = vm.host, count(pfns)
    behind = part(pfns, done + 1, n)
    vm.host.hw.psp.snp_page_reclaim(part(pfns, done + 1, updated))
    vm.host.hw.rmp.rmpupdate(part(pfns, done + 1, updated), assigned=False)
    if count(behind):
        host.memory.stamp[behind] = old[0][done + 1 :]
        host.memory.key[behind] = old[1][done + 1 :]
    if done < updated:
        yield from snp_page_reclaim(host, part(pfns, done, done + 1))


def _update_data(
    vm: VmView, batches: list[Batch], offset: int = 0, size_bytes: int | None = None
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
            sev_pin_pfn(vm, batch)
        else:
            host.frames.pin(batch.pfns)
            host.meter.charge("gup_pin_4k", len(batch))
            pinned.append(batch.pfns)
    done, status = 0, SevStatus.SUCCESS
    left = sum(len(batch) for batch in batches) * PAGE_BYTES if size_bytes is None else size_bytes
    for pfns, low, high in [(batch.pfns, *stretch) for batch in batches for stretch in contig_runs(batch.pfns)]:
        host.meter.charge("cacheline_flush_4k", high - low)
        host.meter.charge("launch_update_4k", high - low)
        address = (first(part(pfns, low, high)) << PAGE_SHIFT) + offset
        length = min(((high - low) << PAGE_SHIFT) - offset, left)
        left, offset = left - length, 0
        command = psp.launch_update_data.steps(arch.handle, address, length)
        status = yield from sev_issue_cmd(host, "LAUNCH_UPDATE_DATA", command)
        if status:
            break
        done += high - low
    if arch.demand and not status:
        arch.early_pins += pinned
    else:
        sev_unpin_memory(host, pinned)
    return done, status


def _load_vmsas(vm: VmView) -> Steps[None]:
    """LAUNCH_UPDATE_VMSA (SEV-ES), or the save areas of an SNP guest, in order of vCPU index."""
    arch: SevVm = vm.arch
    host, hw = vm.host, vm.host.hw
    call = "KVM_SEV_SNP_LAUNCH_FINISH" if arch.snp else "KVM_SEV_LAUNCH_UPDATE_VMSA"
    for vcpu in vm.vcpus:
        state: VcpuState = vcpu.arch
        page = run(state.vmsa_pfn, 1)
        _write_contents(host, page, [state.vmsa])
        if arch.snp:
            done = rmpupdate(host, page, VMSA_GFN, assigned=True, asid=arch.asid, immutable=True)
            steps = hw.psp.snp_launch_update.steps(arch.gctx_pfn, page, PAGE_TYPES["vmsa"])
            result = yield from sev_issue_cmd(host, "SNP_LAUNCH_UPDATE", steps, "launch_update_4k")
            if result.status and done:
                yield from snp_page_reclaim(host, page)
            status = result.status
        else:
            steps = hw.psp.launch_update_vmsa.steps(arch.handle, state.vmsa_pfn << PAGE_SHIFT, PAGE_BYTES)
            status = yield from sev_issue_cmd(host, "LAUNCH_UPDATE_VMSA", steps, "launch_update_4k")
        if status:
            raise UapiError(errno.EIO, call, f"firmware refuses the save area of vCPU {vcpu.id}: {status.name}")
        state.protected = True
    arch.vmsas_loaded = True


def launch_finish(vm: VmView) -> Steps[None]:
    """All that is left of a launch: start, save areas, measurement, finish."""
    arch: SevVm = vm.arch
    not_a_mirror(arch, "KVM_SEV_LAUNCH_FINISH")
    yield from _start(vm)
    if arch.snp:
        yield from _finish_snp(vm, b"", b"")
        return
    if arch.es and not arch.vmsas_loaded and not arch.measured:
        yield from _load_vmsas(vm)
    if not arch.measured:
        yield from _measure(vm, 48, None)
    yield from _finish(vm)


def _measure(vm: VmView, length: int, nonce: bytes | None) -> Steps[bytes | int]:
    arch: SevVm = vm.arch
    psp = vm.host.hw.psp
    digest = psp.launch_digest(arch.handle)
    steps = psp.launch_measure.steps(arch.handle, length, nonce)
    status, blob = yield from sev_issue_cmd(vm.host, "LAUNCH_MEASURE", steps)
    if status == SevStatus.INVALID_LENGTH:
        return int(blob)
    if status:
        raise UapiError(errno.EIO, "KVM_SEV_LAUNCH_MEASURE", f"firmware: {status.name}")
    arch.measured, arch.launch_digest = True, digest
    return bytes(blob)


def _finish(vm: VmView) -> Steps[None]:
    arch: SevVm = vm.arch
    status = yield from sev_issue_cmd(vm.host, "LAUNCH_FINISH", vm.host.hw.psp.launch_finish.steps(arch.handle))
    if status:
        raise UapiError(errno.EIO, "KVM_SEV_LAUNCH_FINISH", f"firmware: {status.name}")
    arch.finished = True


def _finish_snp(vm: VmView, id_block: bytes, id_auth: bytes) -> Steps[None]:
    arch: SevVm = vm.arch
    psp = vm.host.hw.psp
    if not arch.vmsas_loaded:
        yield from _load_vmsas(vm)
    digest = psp.snp_launch_digest(arch.gctx_pfn)
    steps = psp.snp_launch_finish.steps(arch.gctx_pfn, id_block, id_auth)
    status = yield from sev_issue_cmd(vm.host, "SNP_LAUNCH_FINISH", steps)
    if status:
        raise UapiError(errno.EIO, "KVM_SEV_SNP_LAUNCH_FINISH", f"firmware: {status.name}")
    arch.finished, arch.launch_digest = True, digest
    vm.pre_fault_allowed = True


def watch_launch(vm: VmView, tell: Callable[[str, int | None, bytes], None]) -> None:
    """Have the secure processor tell (type, gpa or None, digest so far) of all that it measures."""
    vm.host.hw.psp.watch = tell


# ---- the commands -------------------------------------------------------------------------------------------------


def sev_guest_init(vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
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


def sev_launch_start(vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
    call = "KVM_SEV_LAUNCH_START"
    if arguments["policy"] >> 32:
        raise UapiError(errno.EFAULT, call, "its policy has 32 bits")
    if vm.arch.started:
        raise UapiError(errno.EINVAL, call, "the launch has begun already")
    yield from _start(vm, arguments["policy"])
    return {"handle": vm.arch.handle}


def sev_launch_update_data(vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
    call = "KVM_SEV_LAUNCH_UPDATE_DATA"
    hva, size = arguments["uaddr"], arguments["len"]
    if size <= 0:
        raise UapiError(errno.EINVAL, call, "the length is 0")
    offset = hva % PAGE_BYTES
    whole = -(-(offset + size) // PAGE_BYTES) * PAGE_BYTES
    batches = list(_batches(vm, hva - offset, whole, call))
    _, status = yield from _update_data(vm, batches, offset, size)
    if status:
        raise UapiError(errno.EIO, call, f"firmware: {status.name}")
    return {}


def _batches(vm: VmView, hva: int, size_bytes: int, call: str) -> Iterator[Batch]:
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


def sev_launch_update_vmsa(vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
    yield from _load_vmsas(vm)
    return {}


def sev_launch_measure(vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
    length = arguments["len"]
    if length > 16 << 10:
        raise UapiError(errno.EINVAL, "KVM_SEV_LAUNCH_MEASURE", "a blob of more than 16 KiB")
    blob = yield from _measure(vm, length, arguments.get("nonce"))
    return {"len": blob, "blob": b""} if isinstance(blob, int) else {"len": len(blob), "blob": blob}


def sev_launch_secret(vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
    call = "KVM_SEV_LAUNCH_SECRET"
    hva, secret = arguments["guest_uaddr"], arguments["secret"]
    pfns = np.concatenate([array_of(found) for found in vm.gup_range(hva, max(1, len(secret)))])
    if len(list(contig_runs(contiguous(pfns)))) > 1:
        raise UapiError(errno.EINVAL, call, "the pages are not physically contiguous")
    address = (int(pfns[0]) << PAGE_SHIFT) + hva % PAGE_BYTES
    steps = vm.host.hw.psp.launch_secret.steps(vm.arch.handle, address, secret)
    yield from _pinned_command(vm, contiguous(pfns), "LAUNCH_SECRET", steps, call)
    return {}


def _pinned_command(vm: VmView, pfns: Sel, name: str, steps: Steps[SevStatus], call: str) -> Steps[None]:
    """A firmware command that writes guest memory by the frame: pinned meanwhile, on demand pinning also after.

    Raises UapiError(EIO) where the firmware refuses; then nothing stays pinned.
    """
    host, arch = vm.host, vm.arch
    host.frames.pin(pfns)
    host.meter.charge("gup_pin_4k", count(pfns))
    host.meter.charge("cacheline_flush_4k", count(pfns))
    status = yield from sev_issue_cmd(host, name, steps)
    if arch.demand and not status:
        arch.early_pins.append(pfns)
    else:
        sev_unpin_memory(host, [pfns])
    if status:
        raise UapiError(errno.EIO, call, f"firmware: {status.name}")


def _one_page(vm: VmView, hva: int, length: int, call: str) -> tuple[Sel, int]:
    """The frame behind a stretch of guest memory that lies in one page, and its physical address."""
    if length <= 0 or hva % PAGE_BYTES + length > PAGE_BYTES:
        raise UapiError(errno.EINVAL, call, "the length is 0, or crosses a page")
    pfns = vm.gup_range(hva, length)[0]
    return pfns, (first(pfns) << PAGE_SHIFT) + hva % PAGE_BYTES


def sev_send_start(vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
    steps = vm.host.hw.psp.send_start.steps(vm.arch.handle)
    status, session = yield from sev_issue_cmd(vm.host, "SEND_START", steps)
    if status:
        raise UapiError(errno.EIO, "KVM_SEV_SEND_START", f"firmware: {status.name}")
    return {"session": session, "policy": vm.arch.policy}


def sev_send_update_data(vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
    call = "KVM_SEV_SEND_UPDATE_DATA"
    length = arguments["guest_len"]
    pfns, address = _one_page(vm, arguments["guest_uaddr"], length, call)
    vm.host.frames.pin(pfns)
    vm.host.meter.charge("gup_pin_4k")
    vm.host.meter.charge("cacheline_flush_4k")
    steps = vm.host.hw.psp.send_update_data.steps(vm.arch.handle, address, length)
    status, header, data = yield from sev_issue_cmd(vm.host, "SEND_UPDATE_DATA", steps)
    sev_unpin_memory(vm.host, [pfns])
    if status:
        raise UapiError(errno.EIO, call, f"firmware: {status.name}")
    return {"hdr": header, "trans": data}


def sev_receive_start(vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
    call = "KVM_SEV_RECEIVE_START"
    arch, psp = vm.arch, vm.host.hw.psp
    if arguments["policy"] >> 32:
        raise UapiError(errno.EFAULT, call, "its policy has 32 bits")
    if arch.started:
        raise UapiError(errno.EINVAL, call, "the VM has a context already")
    steps = psp.receive_start.steps(arguments["policy"], arguments["session"])
    status, handle = yield from sev_issue_cmd(vm.host, "RECEIVE_START", steps)
    if not status:
        status = yield from sev_issue_cmd(vm.host, "ACTIVATE", psp.activate.steps(handle, arch.asid))
        if status:
            yield from sev_issue_cmd(vm.host, "DECOMMISSION", psp.decommission.steps(handle))
    if status:
        raise UapiError(errno.EIO, call, f"firmware: {status.name}")
    arch.handle, arch.policy = handle, arguments["policy"]
    return {"handle": handle}


def sev_receive_update_data(vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
    call = "KVM_SEV_RECEIVE_UPDATE_DATA"
    header, data = arguments["hdr"], arguments["trans"]
    pfns, address = _one_page(vm, arguments["guest_uaddr"], len(data), call)
    steps = vm.host.hw.psp.receive_update_data.steps(vm.arch.handle, address, header, data)
    yield from _pinned_command(vm, pfns, "RECEIVE_UPDATE_DATA", steps, call)
    return {}


def _goes(vm: VmView, name: str, steps: Steps[SevStatus]) -> Steps[dict[str, Any]]:
    status = yield from sev_issue_cmd(vm.host, name, steps)
    if status:
        raise UapiError(errno.EIO, f"KVM_SEV_{name}", f"firmware: {status.name}")
    vm.arch.finished = vm.arch.finished or name == "RECEIVE_FINISH"
    return {}


def sev_send_finish(vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
    return (yield from _goes(vm, "SEND_FINISH", vm.host.hw.psp.send_finish.steps(vm.arch.handle)))


def sev_send_cancel(vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
    return (yield from _goes(vm, "SEND_CANCEL", vm.host.hw.psp.send_cancel.steps(vm.arch.handle)))


def sev_receive_finish(vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
    return (yield from _goes(vm, "RECEIVE_FINISH", vm.host.hw.psp.receive_finish.steps(vm.arch.handle)))


def sev_launch_finish(vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
    yield from _finish(vm)
    return {}


def sev_guest_status(vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
    steps = vm.host.hw.psp.guest_status.steps(vm.arch.handle)
    _, state, _, policy = yield from sev_issue_cmd(vm.host, "GUEST_STATUS", steps)
    return {"handle": vm.arch.handle, "policy": policy, "state": int(state)}


def snp_launch_start(vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
    call = "KVM_SEV_SNP_LAUNCH_START"
    policy = arguments["policy"]
    if vm.arch.started or arguments.get("flags", 0):
        raise UapiError(errno.EINVAL, call, "a second start, or flags")
    if policy >> 21 or policy >> 18 & 1 or not policy >> 17 & 1:
        raise UapiError(errno.EINVAL, call, f"policy {policy:#x}: bit 17 must be one, bits 18 and above 20 zero")
    yield from _start_snp(vm, policy)
    return {}


def snp_launch_finish(vm: VmView, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
    if not vm.arch.gctx_pfn or arguments.get("flags", 0):
        raise UapiError(errno.EINVAL, "KVM_SEV_SNP_LAUNCH_FINISH", "no launch has begun, or flags")
    if ("id_block" in arguments) != ("id_auth" in arguments):
        raise UapiError(errno.EFAULT, "KVM_SEV_SNP_LAUNCH_FINISH", "an ID block comes with its authentication page")
    yield from _finish_snp(vm, arguments.get("id_block", b""), arguments.get("id_auth", b""))
    return {}


# ---- which command is which ---------------------------------------------------------------------------------------

_DEBUG_SWAP, _SECURE_TSC = 1 << 5, 1 << 9
_VMSA_FEATURES: Final = {SEV_TYPE: 0, SEV_ES_TYPE: _DEBUG_SWAP, SNP_TYPE: _DEBUG_SWAP | _SECURE_TSC}
"""What KVM_SEV_INIT2 takes as vmsa_features; KVM itself adds bit 0, SNP active."""

_BYTES: Final = {
    "secret": None, "session": None, "hdr": None, "trans": None, "nonce": 16, "id_block": 96, "id_auth": PAGE_BYTES,
}  # fmt: skip
"""Fields that are bytes, and how many they are where the ABI says so; all others are unsigned numbers."""

FOR_MIRRORS = frozenset({
    "KVM_SEV_LAUNCH_UPDATE_VMSA", "KVM_SEV_GUEST_STATUS", "KVM_SEV_DBG_DECRYPT", "KVM_SEV_DBG_ENCRYPT",
})  # fmt: skip
"""What a mirror may ask (is_cmd_allowed_from_mirror)."""


def _holds(name: str, value: Any) -> bool:
    """Whether a field of a command's structure can have this value."""
    if name not in _BYTES:
        return isinstance(value, int) and 0 <= value < 1 << 64
    return isinstance(value, bytes) and _BYTES[name] in (None, len(value))


_Operation = Callable[[VmView, dict[str, Any]], Steps[dict[str, Any]]]
_LEGACY: Final = (SEV_TYPE, SEV_ES_TYPE)
_INITS: Final = ("KVM_SEV_INIT", "KVM_SEV_ES_INIT", "KVM_SEV_INIT2")
_INIT_FIELDS: Final = ("flags", "vmsa_features", "ghcb_version")
_COMMANDS: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], _Operation]]] = {
    # command: VM types, fields that its structure must have, fields that are 0 unless given, implementation
    "KVM_SEV_INIT": ((SEV_TYPE,), (), _INIT_FIELDS, sev_guest_init),
    "KVM_SEV_ES_INIT": ((SEV_ES_TYPE,), (), _INIT_FIELDS, sev_guest_init),
    "KVM_SEV_INIT2": ((*_LEGACY, SNP_TYPE), (), _INIT_FIELDS, sev_guest_init),
    "KVM_SEV_LAUNCH_START": (_LEGACY, ("policy",), (), sev_launch_start),
    "KVM_SEV_LAUNCH_UPDATE_DATA": (_LEGACY, ("uaddr", "len"), (), sev_launch_update_data),
    "KVM_SEV_LAUNCH_UPDATE_VMSA": ((SEV_ES_TYPE,), (), (), sev_launch_update_vmsa),
    "KVM_SEV_LAUNCH_MEASURE": (_LEGACY, ("len",), ("nonce",), sev_launch_measure),
    "KVM_SEV_LAUNCH_SECRET": (_LEGACY, ("guest_uaddr", "secret"), (), sev_launch_secret),
    "KVM_SEV_LAUNCH_FINISH": (_LEGACY, (), (), sev_launch_finish),
    "KVM_SEV_SEND_START": (_LEGACY, (), (), sev_send_start),
    "KVM_SEV_SEND_UPDATE_DATA": (_LEGACY, ("guest_uaddr", "guest_len"), (), sev_send_update_data),
    "KVM_SEV_SEND_FINISH": (_LEGACY, (), (), sev_send_finish),
    "KVM_SEV_SEND_CANCEL": (_LEGACY, (), (), sev_send_cancel),
    "KVM_SEV_RECEIVE_START": (_LEGACY, ("policy", "session"), (), sev_receive_start),
    "KVM_SEV_RECEIVE_UPDATE_DATA": (_LEGACY, ("hdr", "guest_uaddr", "trans"), (), sev_receive_update_data),
    "KVM_SEV_RECEIVE_FINISH": (_LEGACY, (), (), sev_receive_finish),
    "KVM_SEV_GUEST_STATUS": (_LEGACY, (), (), sev_guest_status),
    "KVM_SEV_SNP_LAUNCH_START": ((SNP_TYPE,), ("policy",), ("flags",), snp_launch_start),
    "KVM_SEV_SNP_LAUNCH_FINISH": ((SNP_TYPE,), (), ("flags", "id_block", "id_auth"), snp_launch_finish),
}


def sev_mem_enc_ioctl(vm: VmView, command: str, arguments: dict[str, Any]) -> Steps[dict[str, Any]]:
    """One command, its fields checked first. Pages of an SNP image are loaded by the core's launch_update."""
    arch: SevVm | None = vm.arch
    if not command:
        return {}
    if arch is None or not arch.asid:
        raise UapiError(errno.ENOTTY, command, "the VM is no SEV guest")
    if command not in FOR_MIRRORS:
        not_a_mirror(arch, command)
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
    return (yield from implementation(vm, arguments))
