"""What KVM keeps for SEV guests (ASIDs, contexts, save areas), and how it calls the RMP and the firmware.

Below the hooks and the commands. Kernel: arch/x86/kvm/svm/svm.h, helpers of svm/sev.c, arch/x86/virt/svm/sev.c.
"""

from __future__ import annotations

import errno
from typing import Any, Final

import attrs
import numpy as np

from cvmcore.effects import Steps, point
from cvmcore.errors import InvariantViolation, UapiError
from cvmcore.pages import EMPTY, Sel, contiguous, count, first, last, part, run
from cvmcore.types import PAGES_2M, PG_LEVEL_2M, PG_LEVEL_4K, HostView, Use
from cvmcore_sev.errors import RmpStatus
from cvmcore_sev.launch import BSP_EIP, CPUS

SEV_TYPE, SEV_ES_TYPE, SNP_TYPE = "sev", "sev-es", "snp"
RMP_IN_USE: Final = point("rmp.in_use")
"""Another CPU holds an RMP entry: spin."""
_SPINS: Final = 1000


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


def not_a_mirror(arch: SevVm, call: str) -> None:
    """Raises UapiError(EINVAL) for a mirror, whose owner makes such calls."""
    if arch.mirrors is not None:
        raise UapiError(errno.EINVAL, call, "the VM mirrors another, which has the call")


# ---- calls of the firmware and the RMP ------------------------------------------------------------------------


def wbinvd_on_all_cpus(host: HostView) -> None:
    """WBINVD on all CPUs: each stalls for it."""
    host.meter.op("WBINVD", "wbinvd")
    host.meter.charge_elsewhere("wbinvd", host.nr_cpus - 1)
    host.hw.psp.wbinvd()


def sev_issue_cmd(host: HostView, name: str, command: Steps[Any], item: str = "psp_command", n: int = 1) -> Steps[Any]:
    """A firmware command, counted and charged."""
    host.meter.op(name, item, n)
    return (yield from command)


def rmpupdate(
    host: HostView, pfns: Sel, gfns: Sel | int = 0, *, level: int = PG_LEVEL_4K, counted: bool = True, **fields: Any
) -> int:
    """RMPUPDATE: how many pages were updated. On FAIL_OVERLAP, which the firmware's locks may cause, the kernel spins;
    where it would do so for ever that is a bug, and reported. counted: else the caller counts and charges the calls."""
    done, n, spins = 0, count(pfns), 0
    while done < n:
        some = gfns if isinstance(gfns, int) else part(gfns, done, n)
        result = host.hw.rmp.rmpupdate(part(pfns, done, n), some, level=level, **fields)
        tried = min(result.done + 1, n - done)
        if counted:
            host.meter.op("RMPUPDATE", "rmpupdate_2m" if level == PG_LEVEL_2M else "rmpupdate_4k", tried)
        done += result.done
        if result.status != RmpStatus.FAIL_OVERLAP:
            break
        spins = 1 if result.done else spins + 1
        if spins > _SPINS:
            at = first(part(pfns, done, done + 1))
            raise InvariantViolation("RMPUPDATE returns FAIL_OVERLAP, on which the kernel spins for ever", pfn=at)
    return done


def rmp_make_shared(host: HostView, pfns: Sel, level: int = PG_LEVEL_4K) -> Sel:
    """Each page back to the hypervisor; returns those that the hardware refused."""
    refused: list[int] = []
    start, n = 0, count(pfns)
    while start < n:
        start += rmpupdate(host, part(pfns, start, n), assigned=False, level=level)
        if start < n:
            refused.append(first(part(pfns, start, start + 1)))
            start += 1
    return contiguous(np.array(refused, np.int64)) if refused else EMPTY


def snp_rmptable_psmash(host: HostView, regions: Sel) -> Steps[None]:
    """PSMASH of 2M regions (their heads), again while one is in use; other failures are passed by."""
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


def snp_page_reclaim(host: HostView, pfns: Sel) -> Steps[bool]:
    """Firmware pages back to the hypervisor. What does not come is leaked; False then."""
    steps = host.hw.psp.snp_page_reclaim.steps(pfns)
    command = yield from sev_issue_cmd(host, "SNP_PAGE_RECLAIM", steps, n=count(pfns))
    done = rmpupdate(host, part(pfns, 0, command.done), assigned=False)
    if done < count(pfns):
        host.frames.leak(part(pfns, done, count(pfns)), f"SNP_PAGE_RECLAIM: {command.status.name}")
    return bool(done == count(pfns))


def snp_safe_alloc_page(host: HostView) -> int:
    """One frame that is not 2M aligned (an erratum of pages the CPU uses by itself)."""
    pair = host.frames.alloc(2, Use.META)
    low, high = first(pair), last(pair)
    keep, spare = (high, low) if low % PAGES_2M == 0 else (low, high)
    host.frames.free(run(spare, 1))
    host.memory.clear(run(keep, 1))
    return keep
