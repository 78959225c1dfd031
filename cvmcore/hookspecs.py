"""The hook contract: what a backend may implement, in life-cycle order. One backend implements, the core calls.

Kinds of hooks:
  install   may stop: returns None (all done) or `Stopped(done, reason)`; before a VM exists it raises `UapiError`
  total     cannot fail: the vendor leaks, or bugs the VM (`vm.bug`), but returns
  query     answers, and changes nothing that anybody could see
  call      carries a UAPI call: raises `UapiError` with KVM's errno

An implementation is a plain function, or a generator function that yields effects (locks of its own). It names only
the arguments that it wants. `Sel` arguments are int64 selectors of 4K frame numbers (`cvmcore.pages`), sorted and
unique for gfns; a `Batch` (`cvmcore.types`) holds pages of one memslot at one level. A batch means the same as its
pages one by one in gfn order.

Locks are written outer to inner: those that are held at every call; `mmu_lock:r` is the read side. `-`: none on which
a backend could rely. Of the locks of a VM that is being destroyed only mmu_lock is taken: it is nobody else's any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import attrs
import numpy as np
import numpy.typing as npt
import pluggy

from cvmcore.pages import Sel
from cvmcore.types import (
    Access,
    Batch,
    Capabilities,
    Change,
    ConvertResult,
    HostMode,
    HostVerdict,
    HostView,
    InstallResult,
    SlotView,
    Stopped,
    VcpuView,
    VmView,
)

API_VERSION = 1
"""Version of this contract. A backend declares the one it was written for; another one is refused."""

PROJECT = "cvmcore"
hookimpl = pluggy.HookimplMarker(PROJECT)
_hookspec = pluggy.HookspecMarker(PROJECT)

F = TypeVar("F", bound=Callable[..., Any])


@attrs.frozen
class HookInfo:
    """What the documentation of a hook says in columns: shown by `cvm hooks`, checked against the code by a test."""

    name: str
    kind: str
    locks: str
    upstream: str


HOOKS: dict[str, HookInfo] = {}
"""Every hook, in life-cycle order."""


def _hook(kind: str, locks: str, upstream: str) -> Callable[[F], F]:
    def mark(fn: F) -> F:
        HOOKS[fn.__name__] = HookInfo(fn.__name__, kind, locks, upstream)
        return _hookspec(firstresult=True)(fn)

    return mark


# ---- the machine ----------------------------------------------------------------------------------------------


@_hook("total", "-", "hardware_setup, tdx_init_module, sev_hardware_setup")
def host_init(host: HostView) -> None:
    """Once, when the backend is bound to a Host: build the trusted hardware and put it at `host.hw`.

    Not called again for further VMs. The hardware outlives every VM of the Host.
    """


@_hook("query", "-", "kvm_is_vm_type_supported, KVM_CHECK_EXTENSION")
def capabilities(vm_type: str, options: dict[str, Any]) -> Capabilities:
    """What a VM of this type can and must do, given its options. Asked once per VM, before vm_init.

    The core decides by these, never by a vendor's name.
    """


# ---- VMs ------------------------------------------------------------------------------------------------------


@_hook("call", "-", "kvm_x86_ops.vm_init")
def vm_init(vm: VmView) -> None:
    """A VM is made: take an ASID or HKID, create its trusted object, set `vm.key` and `vm.arch`.

    `vm.key` tells whose content a frame holds: 0, or a number that no other VM has meanwhile. Two VMs fit at a time.

    On error: UapiError, where the machine has no room for another EBUSY, ENOSPC, ENOMEM or EIO; the VM is not made,
    and the hook has left nothing behind.
    """


@_hook("call", "kvm->lock", "kvm_x86_ops.vm_move_enc_context_from")
def vm_move(source: VmView, target: VmView) -> None:
    """Intra-host migration: the target takes over the source's context, key, pins and accounting.

    On error: UapiError; nothing has moved.
    """


@_hook("call", "kvm->lock", "kvm_x86_ops.vm_copy_enc_context_from")
def vm_copy(source: VmView, target: VmView) -> None:
    """The target becomes a mirror of the source: it shares its key, and the core keeps the source for as long.

    On error: UapiError; nothing is shared.
    """


@_hook("total", "-", "kvm_x86_ops.vm_pre_destroy")
def vm_pre_destroy(vm: VmView) -> None:
    """The last reference is gone, page tables still stand: release keys, begin the teardown.

    All guest_memfd files are already released (they hold the VM), so their private leaves are gone.
    """


@_hook("total", "-", "kvm_x86_ops.vm_destroy")
def vm_destroy(vm: VmView) -> None:
    """Tables are freed: free what is left of the VM in the trusted hardware, its key and number, too.

    What cannot be freed is leaked.
    """


# ---- vCPUs ----------------------------------------------------------------------------------------------------


@_hook("call", "kvm->lock", "kvm_x86_ops.vcpu_create")
def vcpu_create(vcpu: VcpuView) -> None:
    """A vCPU is made; its own data goes to `vcpu.arch`.

    On error: UapiError; KVM_CREATE_VCPU fails with its errno, there is no such vCPU.
    """


@_hook("call", "-", "kvm_x86_ops.vcpu_run (entry), tdx_vcpu_run")
def vcpu_enter(vcpu: VcpuView) -> None:
    """The vCPU enters the guest: note TD epochs, load VMs at EL2. Only called where a backend implements it.

    On error: UapiError is what KVM_RUN returns; the vCPU has not entered.
    """


@_hook("total", "-", "kvm_x86_ops.handle_exit")
def vcpu_exit(vcpu: VcpuView) -> None:
    """The vCPU left the guest (an exit, or a kick)."""


@_hook("total", "-", "kvm_x86_ops.vcpu_free")
def vcpu_free(vcpu: VcpuView) -> None:
    """The vCPU is destroyed."""


# ---- memslots -------------------------------------------------------------------------------------------------


@_hook("call", "slots_lock", "kvm_arch_prepare_memory_region; RFC: alloc_memslot_metadata")
def memslot_prepare(vm: VmView, old: SlotView | None, new: SlotView | None, change: Change) -> None:
    """Before a memslot is created (old None), deleted (new None), moved, or gets other flags.

    May attach its own data to `new.arch` (on MOVE and FLAGS_ONLY it takes over old.arch).

    On error: UapiError; the slots stay as they are. On DELETE and MOVE the old slot's leaves are zapped by then, and
    fault in again.
    """


@_hook("total", "slots_lock", "kvm_arch_free_memslot; RFC: free_memslot")
def memslot_free(vm: VmView, slot: SlotView) -> None:
    """A slot is gone for good (deleted, or its VM destroyed); its leaves are zapped. Drop pins kept in slot.arch."""


# ---- vendor calls of user space -------------------------------------------------------------------------------


@_hook("call", "kvm->lock", "KVM_MEMORY_ENCRYPT_OP: sev_mem_enc_ioctl, tdx_vm_ioctl")
def memory_encrypt_op(vm: VmView, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A vendor command under its own name (KVM_SEV_*, KVM_TDX_*). Returns what the kernel writes back.

    Without an implementation the core answers -ENOTTY. Commands that the backend does not know are refused.

    On error: UapiError; its errno is the ioctl's, and nothing has changed unless the vendor's ioctl changes it.
    """


@_hook("call", "kvm->lock", "kvm_x86_ops.mem_enc_register_region")
def register_region(vm: VmView, hva: int, size_bytes: int) -> None:
    """KVM_MEMORY_ENCRYPT_REG_REGION: user space names encrypted memory.

    Without an implementation the core answers -ENOTTY. Each page counts against RLIMIT_MEMLOCK (`vm.charge_memlock`),
    again where regions overlap: they may, and are taken back one by one.

    On error: UapiError, also for a size of 0 or more than may be locked; nothing is registered, pinned or accounted.
    """


@_hook("call", "kvm->lock", "kvm_x86_ops.mem_enc_unregister_region")
def unregister_region(vm: VmView, hva: int, size_bytes: int) -> None:
    """KVM_MEMORY_ENCRYPT_UNREG_REGION: user space takes a region back.

    Without an implementation the core answers -ENOTTY.

    On error: UapiError; the region stays registered.
    """


# ---- launch ---------------------------------------------------------------------------------------------------


@_hook("install", "slots_lock, invalidate_lock:w", "kvm_gmem_populate callback, sev_launch_update_data")
def launch_update(vm: VmView, batch: Batch, contents: list[bytes], kind: str) -> InstallResult:
    """Load pages of the initial image: `contents[i]` (at most 4096 bytes) becomes page i of the batch (level 4K).

    `kind` is "normal", "zero", "unmeasured", "secrets", "cpuid" or "vmsa"; a backend refuses kinds it has no notion
    of. Order counts: digests are order dependent. Frames are allocated (gmem or hva), attributes are private where
    the VM type has them; nothing is mapped yet (`vm.map_private` maps). A page that is loaded again is refused, or
    holds what came last. A backend with `launch_finish` refuses all that comes after it.

    On error: Stopped; pages below `done` stay loaded and the call returns their number. Where `done` is 0 the call
    fails with the errno of Fatal, EBUSY for Retry.
    """


@_hook("call", "kvm->lock", "SEV LAUNCH_FINISH, KVM_TDX_FINALIZE_VM")
def launch_finish(vm: VmView) -> None:
    """The image is complete: measure, seal, let the VM run.

    On error: UapiError with the errno of the vendor's ioctl (a second time, too early); the launch is not finished.
    """


# ---- resolving a fault ----------------------------------------------------------------------------------------


@_hook("install", "-", "mmu_topup_memory_caches; pkvm: topup_hyp_memcache")
def topup(vm: VmView, vcpu: VcpuView, nr_pages: int) -> InstallResult:
    """Before a fault takes locks: fill the backend's private caches for mapping nr_pages pages.

    On error: Stopped; pages below `done` go on and are mapped. The page at `done` ends with the errno of Fatal,
    ENOMEM for Retry. What the hook took stays in its caches.
    """


@_hook("install", "SRCU, folio lock", "kvm_arch_gmem_prepare")
def gmem_prepare(vm: VmView, slot: SlotView, gfns: Sel, pfns: Sel, max_order: int) -> InstallResult:
    """On **every** guest_memfd lookup for a private access, zeroed pages behind it: make the frames the guest's.

    Must be idempotent. `max_order` is the order of the folios behind the pages: gfns and pfns are single 4K pages;
    where it is 9, the hook may act on the whole aligned 2M block around them.

    On error: Stopped; pages below `done` go on and are mapped. The page at `done` ends KVM_RUN with a memory-fault
    exit and the errno of Fatal, EAGAIN for Retry.
    """


@_hook("install", "-", "RFC 2022: kvm_x86_ops.pin_pfn")
def pin_pfn(vm: VmView, vcpu: VcpuView, batch: Batch, write: bool) -> InstallResult:
    """After the level is chosen, before mmu_lock and the stale check: hold the frames for as long as the guest does.

    `vcpu` has faulted. Idempotent. A frame that replaces another at a gfn: flush and unpin the old one first. Because a
    stale fault pins too, pins are a superset of mappings. Only called where `needs_pin`, not for reserved or error
    frames.

    On error: Stopped; pages below `done` go on and are mapped. The page at `done` ends with the errno of Fatal; for
    Retry the vCPU enters the guest and faults again.
    """


@_hook("total", "-", "pkvm_mem_abort error path: unpin_user_pages")
def unpin_pfn(vm: VmView, batch: Batch) -> None:
    """The pages were pinned by pin_pfn in this fault, and then were not mapped: undo the pins that no mapping needs.

    A backend whose pins live in the memslot (SEV) does not implement this.
    """


@_hook("query", "SRCU", "kvm_x86_ops.gmem_max_mapping_level")
def max_mapping_level(vm: VmView, gfns: Sel, pfns: Sel, private: bool) -> int:
    """Upper limit of the mapping level for these pages: PG_LEVEL_*, 0 for no limit. min() is taken.

    Pages of one batch share the answer: a backend returns the least.
    """


@_hook("install", "mmu_lock:r, entry frozen", "kvm_x86_ops.link_external_spt")
def link_private_spt(vm: VmView, gfns: Sel, level: int, tables: Sel) -> InstallResult:
    """Non-present entries at `level` (2M and up) of an external root become tables.

    gfns: first 4K gfn of each entry. tables: the frames donated as table pages. Called parent before child.

    On error: Stopped; the core restores the entries from `done` on, frees those tables, and the fault is retried.
    Fatal: the vendor has bugged the VM, else it would be retried for ever.
    """


@_hook("install", "mmu_lock:r, entry frozen", "kvm_x86_ops.set_external_spte; RFC: set_private_spte")
def set_private_spte(vm: VmView, vcpu: VcpuView | None, batch: Batch) -> InstallResult:
    """Non-present entries of an external root (mirror or mediated) become leaves. Never called on a present entry.

    `vcpu` has faulted; None while the image is built.
    For a mediated root mmu_lock is held for write: its record has no entries that could be frozen by themselves.

    On error: Stopped; leaves below `done` stand, the core restores the entries from `done` on, and the fault is
    retried. Fatal: the vendor has bugged the VM, else it would be retried for ever.
    """


@_hook("total", "-", "sev_handle_rmp_fault")
def after_fault(vm: VmView, vcpu: VcpuView, gfns: Sel, pfns: Sel, level: int) -> bool:
    """The common fault path succeeded, but the hardware had reported `Walk.MISMATCH` for this page.

    Mend the trusted table (PSMASH, say). pfns: the frame that the page is mapped to, at `level`. Returns True where the
    core must zap [gfn, gfn + 512), within an invalidation frame of its own, so that the next fault maps 4K pages.
    """


# ---- changing mappings ----------------------------------------------------------------------------------------


@_hook("install", "mmu_lock:w", "[N] split before conversion; RFC 2023: split_private_spt")
def split_private_spt(vm: VmView, gfn: int, level: int, table: int) -> InstallResult:
    """A present huge leaf of an external root becomes a table of 512 leaves of the same content.

    gfn: first gfn of the leaf; level: its level; table: the frame donated for the table.

    On error: Stopped; the huge leaf stays, the table frame is freed, and whoever wanted the split fails: the ioctl or
    fallocate with the errno of Fatal, EAGAIN for Retry.
    """


@_hook("install", "mmu_lock:w, entry frozen", "RFC 2023: merge_private_spt")
def promote_private_spt(vm: VmView, gfn: int, level: int, pfn: int, table: int, blocked: bool) -> InstallResult:
    """A full table of an external root becomes one leaf at `level`; content is kept.

    table: the frame of the unlinked table page, given back to the core on success. blocked: block_private_spt was
    called for the table.

    On error: Stopped; the hook has unblocked the table, it stays with its small pages. Nothing else changes.
    """


@_hook("install", "mmu_lock:w, entry frozen", "RFC 2023: zap_private_spte")
def block_private_spt(vm: VmView, gfns: Sel, level: int) -> InstallResult:
    """Tables at `level` of an external root are blocked: walks end there, what stands below is kept.

    gfns: first 4K gfn of each. When the hook returns no vCPU uses an old translation any more, so that the tables may
    be merged or unblocked at once. Called where `promotes`, with the policy merge=block.

    On error: Stopped; tables from `done` on are as they were, and the recovery pass ends. Fatal: the VM is bugged.
    """


@_hook("total", "mmu_lock:w", "RFC 2023: unzap_private_spte")
def unblock_private_spt(vm: VmView, gfns: Sel, level: int) -> None:
    """Blocked tables of an external root serve again, with all that stands below.

    Before their entries change, and where the guest came by and they cannot be merged. Must succeed: on failure bug
    the VM. After vm_pre_destroy there may be nothing left to do.
    """


@_hook("total", "mmu_lock:w", "kvm_x86_ops.remove_external_spte; RFC: zap_private_spte + drop")
def remove_private_spte(vm: VmView, batch: Batch) -> None:
    """Leaves of an external root are zapped. Must succeed: on failure bug the VM and leak the frames.

    The entries are gone from the core's root when the hook returns. gmem still owns the frames; the host may write to
    them (`host_access`), as nothing of the guest's is left in caches or in what tags memory.
    """


@_hook("total", "mmu_lock:w", "arm64: pkvm_pgtable_stage2_wrprotect")
def wrprotect_private_spte(vm: VmView, batch: Batch) -> None:
    """Leaves of a mediated root lose write access, because dirty logging wants to see the next write.

    Leaves of any size: a huge one is not split, the write to it faults. The core flushes TLBs afterwards. Only called
    where `dirty_logging` goes with `mediated_root`.
    """


@_hook("install", "mmu_lock:w", "arm64: pkvm_pgtable_stage2_relax_perms")
def relax_private_spte(vm: VmView, vcpu: VcpuView, batch: Batch) -> InstallResult:
    """Leaves of a mediated root get write access back: the write of `vcpu` has faulted, and is logged.

    On error: Stopped; leaves from `done` on stay read-only. Retry: the fault is retried; Fatal: KVM_RUN ends with it.
    """


@_hook("total", "mmu_lock:w", "kvm_x86_ops.free_external_spt")
def free_private_spt(vm: VmView, gfns: Sel, level: int, tables: Sel) -> Sel:
    """Tables of an external root are unlinked, children before parents. Returns the frames the host has back.

    Frames that stay with the trusted party are leaked by the backend (`host.frames.leak`) and left out.
    """


@_hook("total", "mmu_lock", "kvm_x86_ops.flush_remote_tlbs_range")
def flush_remote_tlbs(vm: VmView, start: int, end: int) -> bool:
    """Flush gfns [start, end) on all CPUs. False: not done, the core kicks all vCPUs.

    True: no CPU uses a translation that was taken away, or write-protected, before.
    """


# ---- memory goes back to the host -----------------------------------------------------------------------------


@_hook("total", "-", "kvm_arch_gmem_invalidate")
def gmem_invalidate(host: HostView, pfns: Sel) -> Sel:
    """Frames leave a guest_memfd inode (punch hole, last reference). No VM, slot or gfn: there may be none any more.

    Take them back from the trusted hardware, leak what does not come. Returns the frames that may be freed. A hole is
    punched under the inode's invalidate lock; an inode dies without it. Under another policy of `invalidation` than
    `decoupled` the hook is called in the callback by gfn, under mmu_lock:w, and what it returns is freed later.
    """


@_hook("total", "-", "kvm_arch_guest_memory_reclaimed")
def memory_reclaimed(vm: VmView, nr_pages: int) -> None:
    """After an hva invalidation that hit a slot, a slot's deletion or move (under slots_lock then), or the end of the
    VMM's address space: flush caches before the host reuses pages."""


# ---- what guest and host do to memory themselves --------------------------------------------------------------


@_hook("call", "- (in the guest)", "guest: PVALIDATE + PSC, MapGPA, MEM_SHARE / MEM_UNSHARE")
def guest_convert(
    vm: VmView, vcpu: VcpuView, gfns: Sel, private: bool, begun: int, faults: int
) -> ConvertResult:
    """The guest converts pages. Done(n): finished below KVM. Exit(n): user space must act. Refault(gfn): map, replay.
    Mismatch(gfn): mend by after_fault, replay. begun and faults: what the call that is replayed had come to.

    Without an implementation the core exits to user space for all pages at once.

    On error: Done(0), a refusal; the guest takes an exception at the first page. Never UapiError.
    """


@_hook("call", "- (in the guest)", "guest: PVALIDATE, TDG.MEM.PAGE.ACCEPT")
def guest_accept(vm: VmView, vcpu: VcpuView, gfns: Sel, pfns: Sel, level: int, map_level: int) -> Access:
    """The guest accepts (validates) private pages of `level` (gfns: first 4K gfn of each).

    pfns: 4K frames that the root the CPU walks has for them (empty for an external root, whose truth the backend
    has); they are mapped at map_level. OK: accepted. MISS: fault it in, replay. LARGER: the host must split, replay.
    SMALLER: the guest falls back to 4K. Only called where `needs_accept`.

    On error: MISMATCH goes to after_fault and is replayed; any other status is the guest's exception at that page.
    Never UapiError.
    """


@_hook("query", "- (in the guest)", "hardware: RMP check, Secure-EPT walk, EL2 stage 2")
def guest_access(vm: VmView, vcpu: VcpuView, gfns: Sel, pfns: Sel, level: int, write: bool, private: bool) -> Access:
    """What the hardware says to a guest access, page by page (4K gfns, sorted).

    Direct root: pfns are what the CPU found by walking it, mapped at `level`, and the backend adds its own check
    (RMP). Private access with a mirror, or a mediated root: pfns is empty and the backend walks the true table.
    """


@_hook("query", "- (debugging)", "TDH.MEM.SEPT.RD; pkvm: stage-2 walk at EL2")
def read_private_spte(vm: VmView, gfns: Sel, level: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """What the trusted table of an external root really holds at `level` for these heads (gfns: 4K numbers, any count).

    Returns (state, frame), one each: state 0 absent, 1 leaf, 2 table, 3 a leaf that the host has destroyed by force
    (the core's record of it stays), 4 a table that is blocked (what is below is told as it stands); frame of the leaf,
    or of the table page where the core donated it (else 0). Used to compare the core's root with the truth.
    """


@_hook("query", "mmu_lock:r", "- (mail 001: what the mirror spares)")
def walk_private_spte(
    vm: VmView, gfns: Sel, level: int, reads: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]] | Stopped | None:
    """The core reads entries of the trusted table at `level` (gfns: 4K heads) on its way through a fault, with the
    policy walker=external; kinds and frames as read_private_spte has them.

    reads: how many to count and charge: one for each faulting page. It is 0 where the core does not know yet how
    many of a batch will come so far; then it calls again at the end, without gfns, and the answer is None.

    On error: Stopped where the table is busy, or a parent is blocked; the fault is retried.
    """


@_hook("call", "-", "host #PF: RMP check, TD memory, EL2 host stage 2")
def host_access(host: HostView, pfns: Sel, write: bool, mode: HostMode) -> HostVerdict:
    """The host reads or writes whole frames. Pages of one call share the verdict: the worst.

    Effects on content (a poisoned line, a page taken by force) are the hook's doing. Without an implementation the
    core answers by key: plain frames OK, foreign ones CIPHERTEXT.

    On error: the verdict says what becomes of whoever touched the page (a signal, -EFAULT, ...); HardwareError where
    it is the end of the host's kernel. Never UapiError.
    """
