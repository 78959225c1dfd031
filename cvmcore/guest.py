"""The other side of the UAPI: a guest that touches, accepts and converts its memory, and the VMM that runs it.

`Guest` remembers what it last wrote to each page, so that at any time `check` can say whether anything was lost.
`Machine` sets up the whole of it (host, process, VM, memslots, vCPUs) the way a VMM would, by UAPI calls only.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.effects import Steps, operation
from cvmcore.errors import CvmError
from cvmcore.host import Host
from cvmcore.memory import SCRAMBLED, ZERO
from cvmcore.pages import (
    PIECE_RUN,
    Sel,
    Words,
    array_of,
    contiguous,
    count,
    first,
    part,
    pieces,
    shift,
    small_pages,
    take,
    where,
    zeros,
)
from cvmcore.types import (
    KVM_MEM_GUEST_MEMFD,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    PAGE_BYTES,
    PAGE_SHIFT,
    PAGES_2M,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    ExitReason,
    GuestException,
    HostVerdict,
    MapGpaRange,
    MemoryFault,
    Mmio,
    Shutdown,
)
from cvmcore.uapi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, Process, VcpuFd, VmFd
from cvmcore.vcpu import Accept, Action, Convert, Touch

_EAGER = 1 << 15
"""Pages that a guest accepts at once where it accepts eagerly."""
_STEP = 0x1E35_A7BD
_MASK = 0x3FFF_FFFF
_MARK = 0x4000_0000
_RAMP: Words = np.arange(PIECE_RUN, dtype=np.uint32)


Progress: TypeAlias = Callable[[int, int | None, str], None]
"""Told (done, total or None where nobody knows, what is being done)."""


def silent(done: int, total: int | None, text: str) -> None:
    """The `Progress` of those who do not look."""


class GuestError(CvmError):
    """A guest could not go on: the exit that nobody handled, or an exception it took."""


def stamps_for(gfns: Sel, version: int) -> Words:
    """What the guest writes to these gfns in its `version`-th write: differs by gfn and by write, never 0."""
    gfns = small_pages(gfns)
    n = count(gfns)
    if isinstance(gfns, slice) and n <= len(_RAMP):
        low = (gfns.start + version * _STEP) & _MASK
        if low + n <= _MASK:
            return _RAMP[:n] + np.uint32(low | _MARK)
    stamps: Words = array_of(gfns).astype(np.uint32)
    stamps += np.uint32(version * _STEP & 0xFFFF_FFFF)
    stamps &= np.uint32(_MASK)
    stamps |= np.uint32(_MARK)
    return stamps


class Guest:
    """A guest's own view: which pages it holds shared, which it accepted, and what it wrote."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.written: Words = zeros(machine.end_gfn, np.uint32)
        """Version of the guest's last write to each private view of a gfn (0: never)."""
        self.written_shared: Words = zeros(machine.end_gfn, np.uint32)
        self.accepted: npt.NDArray[np.uint8] = zeros(machine.end_gfn, np.uint8)
        self.shared: npt.NDArray[np.uint8] = zeros(machine.end_gfn, np.uint8)
        self.version = 0
        self.caps = machine.vm.vm.caps
        large = machine.host.backing_level >= PG_LEVEL_2M and self.caps.max_private_level >= PG_LEVEL_2M
        self.accept_level = PG_LEVEL_2M if large else PG_LEVEL_4K
        """The size that the guest tries to accept first. A guest cannot know what the host maps, and one that always
        tries 2M pays an exit more per block on a host of small pages; here it follows the host's backing."""

    @property
    def drive(self) -> Any:
        """The host's driver, which runs its operations."""
        return self.machine.host.drive

    def _versions(self, private: bool) -> Words:
        return self.written if private or self.caps.converts_in_place else self.written_shared

    # ---- actions ----------------------------------------------------------------------------------------------

    @operation
    def write(self, gfns: Sel, vcpu: int = 0, private: bool = True) -> Steps[None]:
        """Write whole pages, accepting them first where the VM type asks for it. gfns: sorted, unique."""
        accepts = private and self.caps.needs_accept
        if accepts and self.accept_level > PG_LEVEL_4K:
            yield from self.accept_new.steps(gfns, vcpu)
        self.version += 1
        version = self.version
        versions = self._versions(private)
        for low, high in pieces(gfns):
            some = part(gfns, low, high)
            if accepts:
                yield from self.accept_new.steps(some, vcpu)
            action = Touch(some, write=True, private=private, stamps=stamps_for(some, version))
            yield from self._run(action, vcpu)
            versions[some] = version

    @operation
    def read(self, gfns: Sel, vcpu: int = 0, private: bool = True) -> Steps[Words]:
        """Read whole pages; returns the stamps seen."""
        if private and self.caps.needs_accept:
            yield from self.accept_new.steps(gfns, vcpu)
        action = Touch(gfns, write=False, private=private)
        yield from self._run(action, vcpu)
        return action.seen if action.seen is not None else np.zeros(0, np.uint32)

    @operation
    def accept(self, gfns: Sel, vcpu: int = 0, level: int = PG_LEVEL_4K) -> Steps[None]:
        """Accept (validate) private pages: gfns are the first 4K gfns of pages of `level`."""
        yield from self._run(Accept(gfns, level=level), vcpu)
        if level == PG_LEVEL_4K:
            self.accepted[gfns] = 1
        else:
            for gfn in array_of(gfns).tolist():
                self.accepted[gfn : gfn + (1 << 9 * (level - 1))] = 1

    @operation
    def accept_new(self, gfns: Sel, vcpu: int = 0) -> Steps[None]:
        """Accept those of these private pages that are not accepted yet, in pages as large as the guest tries."""
        accepted = take(self.accepted, gfns)
        n = int(np.count_nonzero(accepted))
        if n == len(accepted):
            return
        new = gfns if n == 0 else where(gfns, accepted == 0)
        if self.accept_level > PG_LEVEL_4K:
            large = self._whole_blocks(new)
            if count(large):
                yield from self.accept.steps(large, vcpu, self.accept_level)
                new = where(new, take(self.accepted, new) == 0)
        yield from self.accept.steps(new, vcpu)

    def _whole_blocks(self, gfns: Sel) -> Sel:
        """The heads of the aligned 2M blocks that the gfns cover wholly."""
        gfns = small_pages(gfns)
        if isinstance(gfns, slice):
            low, high = -(-gfns.start // PAGES_2M), gfns.stop // PAGES_2M
            return slice(low << 9, max(low, high) << 9, PAGES_2M)
        starts, n = np.unique(gfns >> 9, return_counts=True)
        return contiguous(starts[n == PAGES_2M] << 9, PAGES_2M)

    @operation
    def convert(self, gfns: Sel, private: bool, vcpu: int = 0) -> Steps[None]:
        """Convert pages; afterwards the guest uses the other view. Private pages must be accepted again."""
        yield from self._run(Convert(gfns, private=private), vcpu)
        self.shared[gfns] = not private
        if not self.caps.conversion_keeps_content:
            # What was written through the other view is gone, or is not looked at any more.
            self._versions(private)[gfns] = 0
            if self.caps.converts_in_place or not private:
                self.written[gfns] = 0
        if self.caps.needs_accept:
            self.accepted[gfns] = 0

    def _run(self, action: Action, vcpu: int) -> Steps[None]:
        """KVM_RUN until the action is complete, user space handling the exits."""
        vcpu_fd = self.machine.vcpus[vcpu]
        while True:
            leave = yield from vcpu_fd.run.steps(action)
            if leave is None:
                return
            yield from self.machine.handle.steps(leave, vcpu_fd)

    # ---- checking ---------------------------------------------------------------------------------------------

    def check(self, progress: Progress = silent) -> list[str]:
        """Read back every page that the guest wrote, through the view it uses now. Returns what is wrong, in sentences.

        A private page that was never written must read as the VM type says (`fresh_is_zero`); only pages that are
        accepted, or were written, are looked at.
        """
        wrong: list[str] = []
        end = self.machine.end_gfn
        for low in range(0, end, 1 << 15):
            progress(low, end, "check content")
            window = slice(low, min(low + (1 << 15), end), 1)
            for private in (True, False):
                versions = self._versions(private)[window]
                in_view = (self.shared[window] == 0) == private
                looked_at = in_view & (versions != 0)
                n = int(np.count_nonzero(looked_at))
                if n == 0:
                    continue
                gfns: Sel = window if n == len(versions) else where(window, looked_at)
                wrong += self._compare(gfns, take(self._versions(private), gfns), private)
                if len(wrong) > 8:
                    return wrong
        return wrong

    def _compare(self, gfns: Sel, versions: Words, private: bool) -> list[str]:
        try:
            seen = self.read(gfns, private=private)
        except CvmError as error:
            return [f"gfns from {first(gfns):#x} cannot be read back: {error}"]
        version = int(versions[0])
        if not np.count_nonzero(versions != version):
            want = stamps_for(gfns, version)
        else:
            keys = array_of(gfns) + versions.astype(np.int64) * _STEP
            want = ((keys & _MASK) | _MARK).astype(np.uint32)
        bad = np.flatnonzero(seen != want)
        view = "private" if private else "shared"
        pages = array_of(gfns)
        return [
            f"gfn {int(pages[i]):#x} ({view}) reads {_say(int(seen[i]))}, the guest last wrote {int(want[i]):#x}"
            for i in bad[:4].tolist()
        ]


def _say(stamp: int) -> str:
    return {ZERO: "zeros", SCRAMBLED: "noise"}.get(stamp, f"{stamp:#x}")


@attrs.frozen
class Region:
    """One memslot of the machine as it was set up: gfns [base, base + npages)."""

    slot: int
    base_gfn: int
    npages: int
    hva: int
    gmem_fd: int


class Machine:
    """A VMM with one VM: memory at gfn 0 upward, private by guest_memfd where the VM type has it.

    mem_bytes: guest memory. vcpus: how many. vm_type: another VM type of the host's vendor. launched: finish an empty
    launch, so that the VM may run.
    """

    def __init__(
        self, host: Host, mem_bytes: int, *, vcpus: int = 1, vm_type: str | None = None, process: Process | None = None
    ) -> None:
        self.host = host
        self.process = process or Process(host)
        self.vm: VmFd = self.process.create_vm(vm_type)
        self.end_gfn = mem_bytes // PAGE_BYTES
        self.regions: list[Region] = []
        self.hypercalls = 0
        self.memory_faults = 0
        caps = self.vm.vm.caps
        hva = self.process.mmap(mem_bytes)
        if caps.private_by_attribute:
            fd = self.process_gmem(mem_bytes)
            self.vm.set_user_memory_region2(0, KVM_MEM_GUEST_MEMFD, 0, mem_bytes, hva, fd, 0)
            self.vm.set_memory_attributes(0, mem_bytes, KVM_MEMORY_ATTRIBUTE_PRIVATE)
        else:
            fd = -1
            self.vm.set_user_memory_region2(0, 0, 0, mem_bytes, hva)
            if host.ops.has("register_region"):
                self.vm.register_region(hva, mem_bytes)
        self.regions.append(Region(0, 0, self.end_gfn, hva, fd))
        self.vcpus: list[VcpuFd] = [self.vm.create_vcpu() for _ in range(vcpus)]
        self.guest = Guest(self)

    @property
    def drive(self) -> Any:
        """The host's driver, which runs its operations."""
        return self.host.drive

    def process_gmem(self, size_bytes: int) -> int:
        """A guest_memfd of the VM."""
        return self.vm.create_guest_memfd(size_bytes)

    def launch(self, contents: list[bytes] | None = None, gpa: int = 0, kind: str = "normal") -> None:
        """Load an image and finish the launch; a guest that accepts eagerly then takes all of its memory, each slice on
        the next vCPU."""
        if contents:
            self.load(contents, gpa, kind)
        self.vm.launch_finish()
        caps = self.vm.vm.caps
        if caps.needs_accept and caps.accepts_eagerly:
            for turn, low in enumerate(range(0, self.end_gfn, _EAGER)):
                self.guest.accept_new(slice(low, min(low + _EAGER, self.end_gfn), 1), turn % len(self.vcpus))

    def load(self, contents: list[bytes], gpa: int = 0, kind: str = "normal") -> None:
        """Load image pages. The guest finds them accepted; what stands in them is the image's, not the guest's own."""
        done = self.vm.launch_update(gpa, contents, kind)
        if done < len(contents):
            raise GuestError(f"only {done} of {len(contents)} image pages at gpa {gpa:#x} could be loaded")
        self.guest.accepted[gpa >> PAGE_SHIFT : (gpa >> PAGE_SHIFT) + done] = 1

    # ---- exits ------------------------------------------------------------------------------------------------

    @operation
    def handle(self, leave: ExitReason, vcpu: VcpuFd) -> Steps[None]:
        """What a VMM does with an exit: conversions are granted; a memory fault converts to what the access was."""
        match leave:
            case MapGpaRange():
                self.hypercalls += leave.exits
                yield from self.set_private.steps(leave.gfns, leave.private)
            case MemoryFault(errno=errno.EFAULT):
                self.memory_faults += 1
                region = self.region_of(leave.gfn)
                if region is None or (leave.private and region.gmem_fd < 0):
                    raise GuestError(f"memory fault at gpa {leave.gpa:#x}, which no memslot backs")
                yield from self.set_private.steps(slice(leave.gfn, leave.gfn + 1, 1), leave.private)
            case MemoryFault():
                raise GuestError(f"KVM_RUN: -{errno.errorcode.get(leave.errno, leave.errno)} at gpa {leave.gpa:#x}")
            case Mmio():
                raise GuestError(f"MMIO {'write' if leave.write else 'read'} at gpa {leave.gpa:#x}: no memslot there")
            case GuestException():
                raise GuestError(f"the guest took an exception at gfn {leave.gfn:#x}: {leave.why}")
            case Shutdown():
                raise GuestError(f"KVM_RUN: -{errno.errorcode.get(leave.errno, leave.errno)}: {leave.why}")

    def region_of(self, gfn: int) -> Region | None:
        """The region that holds a gfn."""
        return next((r for r in self.regions if r.base_gfn <= gfn < r.base_gfn + r.npages), None)

    @operation
    def set_private(self, gfns: Sel, private: bool) -> Steps[None]:
        """The VMM's answer to a conversion: set the attributes of each contiguous range, at most 2 MiB at a time."""
        if not self.vm.vm.caps.private_by_attribute:
            return
        value = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        for low, high in _ranges(gfns):
            size = high - low << PAGE_SHIFT
            yield from self.vm.set_memory_attributes.steps(low << PAGE_SHIFT, size, value)

    @operation
    def punch(self, gfns: Sel) -> Steps[None]:
        """Give private memory back to the host, one hole per contiguous range."""
        for low, high in _ranges(gfns, 1 << 52):
            region = self.region_of(low)
            if region is not None and region.gmem_fd >= 0:
                yield from self.process.fallocate.steps(
                    region.gmem_fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, low - region.base_gfn << PAGE_SHIFT,
                    high - low << PAGE_SHIFT,
                )

    @operation
    def discard_shared(self, gfns: Sel) -> Steps[None]:
        """Give the VMM's own memory behind these gfns back to the host (madvise)."""
        for low, high in _ranges(gfns, 1 << 52):
            region = self.region_of(low)
            if region is not None:
                hva = region.hva + (low - region.base_gfn << PAGE_SHIFT)
                yield from self.process.madvise_dontneed.steps(hva, high - low << PAGE_SHIFT)

    # ---- the end ----------------------------------------------------------------------------------------------

    def private_leaks(self, progress: Progress = silent) -> list[str]:
        """Private pages that the host, or another VM, could read: must be none where the VM type encrypts or blocks."""
        vm = self.vm.vm
        wrong: list[str] = []
        if not vm.caps.confidential:
            return wrong
        guest = self.guest
        for low in range(0, self.end_gfn, 1 << 15):
            progress(low, self.end_gfn, "look from outside")
            window = slice(low, min(low + (1 << 15), self.end_gfn), 1)
            mine = (guest.shared[window] == 0) & (guest.written[window] != 0)
            if not np.count_nonzero(mine):
                continue
            gfns = where(window, mine)
            pfns = self.frames_of(gfns)
            for some in _nonzero(pfns):
                verdict = self.host.host_access(some, False)
                if verdict is HostVerdict.OK:
                    wrong.append(f"the host can read private frames from pfn {first(some):#x}")
        return wrong

    def frames_of(self, gfns: Sel) -> npt.NDArray[np.int64]:
        """Frames behind private gfns, as the owner of the memory knows them; 0 where there is none."""
        region = self.regions[0]
        if region.gmem_fd >= 0:
            words = take(self.process.files[region.gmem_fd].inode.words, gfns)
        else:
            mapping = self.process.mm.find(region.hva >> PAGE_SHIFT)
            assert mapping is not None
            words = take(mapping.words, shift(gfns, -region.base_gfn))
        frames: npt.NDArray[np.int64] = (words >> np.uint32(5)).astype(np.int64)
        return frames

    @operation
    def destroy(self) -> Steps[None]:
        """Close everything."""
        yield from self.process.exit.steps()

    def leftovers(self) -> list[str]:
        """After `destroy`: frames that are still in use or pinned, and are not listed as leaked."""
        frames = self.host.frames
        wrong = [f"{n} frames are still {use.name}" for use, n in frames.outstanding().items() if use.name != "META"]
        if frames.pins_held:
            wrong.append(f"{frames.pins_held} pins are still held")
        return wrong


def _nonzero(pfns: npt.NDArray[np.int64]) -> list[Sel]:
    """The frames that are there, as one selector (or none)."""
    there = np.sort(pfns[pfns != 0])
    return [contiguous(there)] if len(there) else []


def _ranges(gfns: Sel, chunk: int = 512) -> list[tuple[int, int]]:
    """Contiguous ranges [low, high) of the gfns, none crossing a multiple of `chunk`."""
    gfns = small_pages(gfns)
    if isinstance(gfns, slice):
        whole = [(gfns.start, gfns.stop)] if count(gfns) else []
    else:
        cuts = np.flatnonzero(gfns[1:] != gfns[:-1] + 1) + 1
        lows, highs = gfns[np.r_[0, cuts]], gfns[np.r_[cuts - 1, len(gfns) - 1]] + 1
        whole = list(zip(lows.tolist(), highs.tolist(), strict=True))
    pieces_of: list[tuple[int, int]] = []
    for low, high in whole:
        while low < high:
            stop = min(high, (low // chunk + 1) * chunk)
            pieces_of.append((low, stop))
            low = stop
    return pieces_of


