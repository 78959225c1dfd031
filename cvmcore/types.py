"""The vocabulary that the core, the hooks and the backends share: names of the field, values, no logic.

gfn: guest frame number, pfn: host frame number, hva: address in the VMM; all of 4 KiB pages. Levels are KVM's
PG_LEVEL_*: 1 = 4K, 2 = 2M, 3 = 1G.
"""

from __future__ import annotations

import enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.pages import Sel, blocks, count, expand, part, shift

if TYPE_CHECKING:
    from cvmcore.effects import Steps
    from cvmcore.memory import Memory

PAGE_BYTES = 4096
PAGE_SHIFT = 12
PG_LEVEL_4K, PG_LEVEL_2M, PG_LEVEL_1G, PG_LEVEL_512G = 1, 2, 3, 4
PAGES_2M = 512

KVM_MEMORY_ATTRIBUTE_PRIVATE = 8
KVM_MEMORY_EXIT_FLAG_PRIVATE = 8
KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_MEM_GUEST_MEMFD = 1, 2, 4
GUEST_MEMFD_FLAG_MMAP, GUEST_MEMFD_FLAG_INIT_SHARED = 1, 2


def order_of(level: int) -> int:
    """log2 of the 4K pages in a page of the level."""
    return 9 * (level - 1)


def pages_per_level(level: int) -> int:
    """4K pages in a page of the level (KVM_PAGES_PER_HPAGE)."""
    return 1 << (9 * (level - 1))


class Filter(enum.Flag):
    """Which kind of mappings an invalidation is about (KVM_FILTER_SHARED / KVM_FILTER_PRIVATE)."""

    SHARED = 1
    PRIVATE = 2
    BOTH = 3


class RetPf(enum.Enum):
    """How a fault ended, where it did not end in an errno (kernel: RET_PF_*)."""

    CONTINUE = 0
    RETRY = 1
    EMULATE = 2
    WRITE_PROTECTED = 3
    INVALID = 4
    FIXED = 5
    SPURIOUS = 6


class Use(enum.IntEnum):
    """What a frame is used for."""

    FREE = 0
    GMEM = 1  # a folio of a guest_memfd inode
    ANON = 2  # the VMM's own memory
    TABLE = 3  # a page of an external page table
    META = 4  # the trusted party's structures (TDR, VMSA, EL2 VM object, ...)
    ORPHAN = 5  # given up by its owner, alive through pins only
    LEAKED = 6  # never used again


# ---- batches --------------------------------------------------------------------------------------------------


@attrs.frozen(slots=False, eq=False)
class Batch:
    """Pages of one memslot at one level, in gfn order, with the frames behind them.

    gfns: first 4K gfn of each page (int64 selector, sorted, unique, aligned to the level).
    pfns: first 4K frame of each page, in the same order (a selector; frames need not be sorted).
    A run of 2M pages is a slice with step 512.
    """

    slot: SlotView
    level: int
    gfns: Sel
    pfns: Sel

    def __len__(self) -> int:
        return count(self.gfns)

    @property
    def nr_pages(self) -> int:
        """4K pages covered."""
        return count(self.gfns) << order_of(self.level)

    @property
    def blocks(self) -> Sel:
        """Block numbers (gfn >> order): indexes into an array that has one element per page of this level."""
        return blocks(self.gfns, order_of(self.level))

    @cached_property
    def all_gfns(self) -> Sel:
        """Every 4K gfn covered."""
        return expand(self.gfns, order_of(self.level))

    @cached_property
    def all_pfns(self) -> Sel:
        """Every 4K frame covered, in the order of all_gfns."""
        return expand(self.pfns, order_of(self.level))

    @property
    def indexes(self) -> Sel:
        """Offsets of the pages in the slot, in 4K pages."""
        return shift(self.gfns, -self.slot.base_gfn)

    def part(self, start: int, stop: int) -> Batch:
        """Pages [start, stop) of the batch."""
        return Batch(self.slot, self.level, part(self.gfns, start, stop), part(self.pfns, start, stop))


# ---- results of hooks -----------------------------------------------------------------------------------------


@attrs.frozen
class Retry:
    """Somebody else was in the way; the vCPU enters the guest and faults again."""


@attrs.frozen
class Fatal:
    """The vendor gave up; it has already bugged the VM. `errno` goes to user space."""

    errno: int
    why: str = ""


Reason: TypeAlias = Retry | Fatal


@attrs.frozen
class Stopped:
    """An install hook did the first `done` pages of its batch and then stopped, for a reason."""

    done: int
    reason: Reason


InstallResult: TypeAlias = Stopped | None
"""None: all of the batch is done."""


@attrs.frozen
class Done:
    """A guest conversion of the first n pages was finished below the host; KVM hears nothing of it."""

    n: int


@attrs.frozen(eq=False)
class Exit:
    """A guest conversion needs user space: the first n pages leave KVM_RUN as KVM_EXIT_HYPERCALL (MAP_GPA_RANGE).

    exits: how many exits that takes; 0: one per contiguous range within a 2 MiB block.
    """

    n: int
    exits: int = 0


@attrs.frozen
class Refault:
    """The page at this gfn, with those behind it `pages` in all, have to be mapped first; then the guest's call is
    replayed. n pages before it are done.

    begun: for so many pages behind those the guest has done its own half of the conversion, and not told the host yet.
    The replay, which is told so, begins behind them.
    """

    gfn: int
    n: int = 0
    pages: int = 1
    begun: int = 0


@attrs.frozen
class Mismatch:
    """The page at this gfn is mapped, but the trusted table disagrees, as with `Walk.MISMATCH`: after_fault decides,
    then the guest's call is replayed. begun: as with Refault."""

    gfn: int
    begun: int = 0


ConvertResult: TypeAlias = Done | Exit | Refault | Mismatch


class Walk(enum.IntEnum):
    """What the hardware says to a guest access of one page."""

    OK = 0
    MISS = 1  # no translation, or not for this kind of access: a stage-2 fault
    UNACCEPTED = 2  # mapped, but the guest has not accepted or validated it
    MISMATCH = 3  # the trusted table disagrees (SNP: assigned to another gpa, size): after_fault decides
    LARGER = 4  # a larger page than asked for is in the way (accept, validate)
    SMALLER = 5  # a smaller page than asked for is in the way: the guest falls back
    DENIED = 6  # access that no fault can mend: the guest gets an exception


WALK_OK = int(Walk.OK)


@attrs.frozen(eq=False)
class Access:
    """The hardware's answer to a guest access: `status` is one Walk for all pages or a uint8 array, one each.

    `pfns` are the frames behind the pages, 4K frames in batch order; only those whose status is OK count.
    """

    status: int | npt.NDArray[np.uint8]
    pfns: Sel


class HostMode(enum.Enum):
    """How the host touches memory: from user space, from the kernel with a fixup (copy_from_user), or plainly."""

    USER = "user"
    FIXUP = "fixup"
    KERNEL = "kernel"


class HostVerdict(enum.IntEnum):
    """What a host access of one frame leads to."""

    OK = 0
    CIPHERTEXT = 1  # the read succeeds and returns nothing of use
    ZEROS = 2  # the read succeeds and returns a fixed pattern
    SIGSEGV = 3
    EFAULT = 4
    OWNER_FAULT = 5  # host #PF: the ownership table says the frame is not the host's; SIGBUS for user space
    POISONED = 6  # done, and whoever reads it next finds a machine check, or a poisoned entry
    RECLAIMED = 7  # done after the owner lost the page


# ---- exits ----------------------------------------------------------------------------------------------------


@attrs.frozen
class MemoryFault:
    """KVM_EXIT_MEMORY_FAULT (39): gpa page aligned, size 4096, flags PRIVATE = 8 as the access was."""

    gpa: int
    flags: int
    size_bytes: int = PAGE_BYTES
    errno: int = 14

    @property
    def gfn(self) -> int:
        """Page of the access."""
        return self.gpa >> PAGE_SHIFT

    @property
    def private(self) -> bool:
        """Whether the access was private."""
        return bool(self.flags & KVM_MEMORY_EXIT_FLAG_PRIVATE)


@attrs.frozen(eq=False)
class MapGpaRange:
    """KVM_EXIT_HYPERCALL, KVM_HC_MAP_GPA_RANGE: the guest asks user space to convert pages. Counts as `exits` exits."""

    gfns: Sel
    private: bool
    exits: int = 1


@attrs.frozen
class Mmio:
    """KVM_EXIT_MMIO: no memslot at the address, or a write to a read-only one."""

    gpa: int
    write: bool


@attrs.frozen
class GuestException:
    """Not an exit: the guest itself gets an exception (#VC, #VE, external abort) for this page."""

    gfn: int
    why: str


@attrs.frozen
class Shutdown:
    """KVM_RUN returns -errno for good: the VM is dead or the vCPU cannot go on."""

    errno: int
    why: str


ExitReason: TypeAlias = MemoryFault | MapGpaRange | Mmio | GuestException | Shutdown


# ---- what a backend declares ----------------------------------------------------------------------------------


@attrs.frozen
class Capabilities:
    """What a VM type can and must do. The core asks these, never a vendor's name; each invariant names the one
    that switches it on."""

    private_by_attribute: bool = False
    """KVM_MEMORY_ATTRIBUTE_PRIVATE decides which accesses are private (kvm_arch_has_private_mem)."""
    has_mirror: bool = False
    """Private pages live in a mirror root, kept in step with an external table by hooks."""
    mediated_root: bool = False
    """The direct root is a record of what hooks installed elsewhere: stage 2 belongs to the trusted party."""
    converts_in_place: bool = False
    """The guest's shared and private view of a gfn are the same frame."""
    conversion_keeps_content: bool = False
    """A page converted there and back still holds what the guest wrote."""
    zap_destroys_content: bool = False
    """Removing a private leaf loses its page, so a partial zap splits first and nothing is zapped to be refaulted."""
    needs_pin: bool = False
    """Frames behind guest pages are pinned for the long term by the backend's pin_pfn."""
    needs_accept: bool = False
    """The guest must accept (validate) a private page before it can use it: first, after a hole, and after a conversion
    there and back of which the backend hears (`has_mirror`, or the hook guest_convert)."""
    accepts_eagerly: bool = False
    """Guests accept all of their memory when they start, not each page before they first use it."""
    fault_tells_accept_level: bool = False
    """A fault raised by an accept tells the host the size that the guest accepts; it maps no larger then."""
    retries_in_kvm: bool = False
    """A private fault that was overtaken is made again inside KVM: the vCPU does not enter for it in between."""
    unaccepted_is_fatal: bool = False
    """Touching a private page before accepting it kills the VM (else the guest gets an exception)."""
    honours_notifiers: bool = True
    """hva notifiers zap; False where the host cannot take a guest's page back."""
    dirty_logging: bool = True
    """A memslot may have KVM_MEM_LOG_DIRTY_PAGES."""
    memslots_fixed_after_run: bool = False
    """No delete or move of a memslot once a vCPU has run."""
    read_only_slots: bool = True
    """A memslot may have KVM_MEM_READONLY."""
    gmem_init_shared: bool = False
    """guest_memfd may be created with INIT_SHARED (only VM types without private memory)."""
    gmem_backed: bool = True
    """guest_memfd slots are supported at all."""
    prefault: bool = True
    """KVM_PRE_FAULT_MEMORY is supported."""
    max_private_level: int = PG_LEVEL_1G
    """Largest private mapping."""
    max_shared_level: int = PG_LEVEL_1G
    """Largest shared mapping."""
    max_gmem_level: int = PG_LEVEL_2M
    """Largest folio of a guest_memfd where the host backs with large pages."""
    fresh_is_zero: bool = True
    """A private page that the guest never wrote reads as zeros (else as noise)."""
    confidential: bool = False
    """Neither the host nor another VM can read private content, nor what is left of it in a frame that was given back.
    A write by the host is refused or ends the guest's use of the page; where it `encrypts` and `converts_in_place`, the
    guest may find noise instead."""
    encrypts: bool = False
    """Private content is encrypted with the VM's key: a foreign read sees noise rather than content."""
    promotes: bool = False
    """promote_private_spt, block_private_spt and unblock_private_spt are implemented: small private mappings can be
    merged."""
    max_promoted_level: int = PG_LEVEL_2M
    """The largest leaf that small private mappings are merged into, where they are."""
    shared_gfn_bit: int = 0
    """gfn bit that selects the shared alias (kvm_gfn_direct_bits); 0 where there is none."""


class Change(enum.Enum):
    """What happens to a memslot (KVM_MR_*)."""

    CREATE = "create"
    DELETE = "delete"
    MOVE = "move"
    FLAGS_ONLY = "flags_only"


# ---- what a backend sees of the core --------------------------------------------------------------------------


class MeterView(Protocol):
    """Where hooks charge what they did."""

    def charge(self, item: str, n: int = 1) -> None:
        """Charge n times the profile's price `item` to whoever is running."""

    def op(self, name: str, item: str, n: int = 1) -> None:
        """Count n vendor operations (one SEAMCALL, one RMPUPDATE, one hypercall each) and charge them."""

    def charge_elsewhere(self, item: str, n: int = 1) -> None:
        """Charge work that other CPUs do meanwhile: cpu time, but nobody's waiting time."""


class FramesView(Protocol):
    """The host's page allocator and its pins, as hooks may use them."""

    def alloc(self, n: int, use: int, align_order: int = 0) -> Sel:
        """n frames as a selector in ascending runs. Raises UapiError(ENOMEM) where there are not so many."""

    def free(self, pfns: Sel) -> None:
        """Give frames back. Leaked frames stay so; free ones are refused: InvariantViolation."""

    def leak(self, pfns: Sel, why: str) -> None:
        """Take frames out of circulation for good and list them."""

    def pin(self, pfns: Sel, order: int = 0) -> None:
        """One long-term pin (FOLL_LONGTERM) on each page of 2**order frames; pfns are their first frames."""

    def unpin(self, pfns: Sel, order: int = 0) -> None:
        """Drop one pin of each page."""


class HostView(Protocol):
    """The machine, as a backend sees it."""

    memory: Memory
    hw: Any
    """The backend's trusted hardware, put there by its host_init."""

    @property
    def nr_frames(self) -> int:
        """Frames of the machine; pfns are below it."""

    @property
    def frames(self) -> FramesView:
        """What each frame is used for, and its pins."""

    @property
    def meter(self) -> MeterView:
        """Where what is done is counted and charged."""

    @property
    def options(self) -> dict[str, Any]:
        """The backend's options with their values."""

    @property
    def nr_cpus(self) -> int:
        """CPUs of the machine."""

    @property
    def backing_level(self) -> int:
        """The largest pages that the host backs memory with (PG_LEVEL_*)."""


class SlotView(Protocol):
    """A memslot (kernel: struct kvm_memory_slot)."""

    arch: Any
    """The backend's own data about the slot (arch memslot metadata)."""

    @property
    def id(self) -> int:
        """Slot number."""

    @property
    def base_gfn(self) -> int:
        """Its first gfn."""

    @property
    def npages(self) -> int:
        """4K pages."""

    @property
    def hva(self) -> int:
        """Where it is in the VMM's memory."""

    @property
    def flags(self) -> int:
        """KVM_MEM_*."""

    @property
    def has_gmem(self) -> bool:
        """Whether a guest_memfd stands behind its private pages."""


class VcpuView(Protocol):
    """A vCPU (kernel: struct kvm_vcpu)."""

    arch: Any
    """The backend's own data about the vCPU (VMSA, TDVPS, ...)."""

    @property
    def id(self) -> int:
        """vCPU id."""

    @property
    def vm(self) -> VmView:
        """Its VM."""

    @property
    def state(self) -> bytes:
        """Registers that user space gives the vCPU before it first runs, in the vendor's layout; empty: as at reset."""


class VmView(Protocol):
    """A VM (kernel: struct kvm), as a backend sees it."""

    arch: Any
    """The backend's own data about the VM (struct kvm_arch, kvm_tdx, ...)."""
    pre_fault_allowed: bool
    """Whether KVM_PRE_FAULT_MEMORY works; a vendor that seals an image clears it in vm_init, sets it when sealed."""
    key: int
    """Encryption key of private accesses (ASID, HKID); 0: none. Set by the backend's vm_init."""

    @property
    def id(self) -> int:
        """Number of the VM on its host, from 0."""

    @property
    def vm_type(self) -> str:
        """Name of the VM type."""

    @property
    def host(self) -> HostView:
        """The machine."""

    @property
    def caps(self) -> Capabilities:
        """What `capabilities` said of it."""

    @property
    def options(self) -> dict[str, Any]:
        """The backend's options with their values."""

    @property
    def vcpus(self) -> list[Any]:
        """Its vCPUs (VcpuView) in the order in which they were made."""

    @property
    def slots(self) -> Any:
        """Its memslots."""

    @property
    def dead(self) -> bool:
        """Whether it was declared dead (KVM_BUG_ON, kvm->vm_bugged)."""

    def bug(self, why: str) -> None:
        """KVM_BUG_ON: the VM is dead, all vCPUs are kicked, every later ioctl gives -EIO."""

    def kick_all_vcpus(self) -> None:
        """Make every vCPU leave the guest (kvm_make_all_cpus_request), without charging for it."""

    def map_private(self, batch: Batch) -> Steps[None]:
        """Map private pages before the VM runs (kvm_tdp_mmu_map_private_pfn): through the set hook, level 4K."""

    def walk(self, gfns: Sel, private: bool) -> tuple[int | npt.NDArray[np.uint8], Sel, int | npt.NDArray[np.uint8]]:
        """The CPU's walk of the core's root for this access: status (Walk), frames where OK, levels."""

    def gup_range(self, hva: int, size_bytes: int) -> list[Sel]:
        """The frames behind an hva range of the VMM, faulted in: one selector per mapping. UapiError(EFAULT)."""

    def charge_memlock(self, nr_pages: int, call: str) -> None:
        """Account pages against RLIMIT_MEMLOCK; UapiError(ENOMEM) beyond it. Negative gives back."""

