"""The UAPI: what a VMM calls, with KVM's checks in KVM's order and KVM's errno (virt/kvm/kvm_main.c, guest_memfd.c).

A `Process` is the VMM: an address space and a table of descriptors. Every call either does all of it or raises
`UapiError` and leaves no trace, unless KVM's own call would. Where kernel versions differ, `Host(kernel=...)` says
which errno.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from cvmcore.effects import POPULATE_HOOK, Steps, drain, holding, operation
from cvmcore.errors import UapiError
from cvmcore.host import Host
from cvmcore.mem import invalidate
from cvmcore.mem.fault import resolve
from cvmcore.mem.gmem import GmemFile, GmemInode
from cvmcore.mem.mm import TASK_SIZE, Mm
from cvmcore.mem.slots import Memslot
from cvmcore.ops import NOBODY
from cvmcore.pages import Sel, Words, array_of, count, first, part, shift
from cvmcore.types import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    PAGE_BYTES,
    PG_LEVEL_4K,
    Batch,
    Change,
    ExitReason,
    Fatal,
    HostMode,
    HostVerdict,
    RetPf,
    Stopped,
)
from cvmcore.vcpu import Accept, Action, Convert, Touch, Tries, Vcpu
from cvmcore.vm import Vm

NR_MEMSLOTS = 32764
MAX_NR_PAGES = (1 << 31) - 1
MAX_VCPU_IDS = 4096
MAX_GFN = 1 << 36
"""First gfn that no memslot may reach (guest physical addresses of 48 bits)."""
USER_PTR_MAX = TASK_SIZE - PAGE_BYTES
"""Where what a user may name ends: the last page below TASK_SIZE is a guard (x86: TASK_SIZE_MAX)."""
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
VFS_FALLOCATE_MODES = (0, 1, 3, 8, 0x10, 0x11, 0x20, 0x40, 0x41, 0x80)
"""What vfs_fallocate lets through to the file, if the range is one that a file can have."""
KVM_CAP_NR_MEMSLOTS, KVM_CAP_READONLY_MEM, KVM_CAP_USER_MEMORY2, KVM_CAP_MEMORY_FAULT_INFO = 10, 81, 231, 232
KVM_CAP_MEMORY_ATTRIBUTES, KVM_CAP_GUEST_MEMFD, KVM_CAP_PRE_FAULT_MEMORY, KVM_CAP_GUEST_MEMFD_FLAGS = 233, 234, 236, 244
PAGE_MASK = PAGE_BYTES - 1
PIECE = 1 << 20
U32, U64 = 1 << 32, 1 << 64
"""Fields of KVM's structures have no sign: what a VMM writes there is taken modulo these."""

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Steps[Any]])


def _call(name: str) -> Callable[[F], F]:
    """Decorator below `operation`: observers of details are told when the call begins and ends, and what about."""

    def decorate(fn: F) -> F:
        names = tuple(signature(fn).parameters)[1:]

        @wraps(fn)
        def steps(caller: Any, *args: Any, **kwargs: Any) -> Steps[Any]:
            running = fn(caller, *args, **kwargs)
            if not caller.host.ops.detailed:
                return running
            return _told(name, running, caller, {**dict(zip(names, args, strict=False)), **kwargs})

        return cast(F, steps)

    return decorate


def _told(name: str, running: Steps[R], caller: Process | VmFd | VcpuFd, arguments: dict[str, Any]) -> Steps[R]:
    """The call, told. Where one thing happens after the other, what a vCPU's descriptor is asked the vCPU does."""
    ops = caller.host.ops
    info = {key: value for key, value in arguments.items() if isinstance(value, int | str)}
    match arguments.get("action"):
        case Touch(write=write, private=private):
            info["action"] = f"{'write' if write else 'read'} {'private' if private else 'shared'}"
        case Accept(level=level):
            info |= {"action": "accept", "level": level}
        case Convert(private=private):
            info["action"] = f"convert to {'private' if private else 'shared'}"
    if "mode" in arguments:
        info["action"] = "punch hole" if arguments["mode"] & FALLOC_FL_PUNCH_HOLE else "allocate"
    if "attributes" in arguments:
        info["action"] = "private" if arguments["attributes"] & KVM_MEMORY_ATTRIBUTE_PRIVATE else "shared"
    process, vm = _whose(caller)
    gfns = _gfns_of(process, arguments)
    fields: dict[str, Any] = {} if gfns is None else {"gfns": gfns, "n": count(gfns)}
    actor = ops.actor
    if isinstance(caller, VcpuFd) and actor == NOBODY:
        ops.actor = f"vcpu{caller.vcpu.id}" if vm == 0 else f"vm{vm}.vcpu{caller.vcpu.id}"
    try:
        return (yield from ops.told(name, running, vm=vm, info=info, **fields))
    finally:
        if actor == NOBODY:
            ops.actor = NOBODY


def _whose(caller: Process | VmFd | VcpuFd) -> tuple[Process, int]:
    """The process that makes a call, and the id of the VM it is made on (-1: none)."""
    match caller:
        case VcpuFd():
            return caller.vm.process, caller.vm.vm.id
        case VmFd():
            return caller.process, caller.vm.id
        case _:
            return caller, -1


def _gfns_of(process: Process, arguments: dict[str, Any]) -> Sel | None:
    """The gfns that the arguments of a call name, or the span of them; None where they name none."""
    match arguments:
        case {"action": Action() as action}:
            return part(action.gfns, action.done, count(action.gfns))
        case {"gpa": int(gpa), "size_bytes": int(size_bytes)}:
            return slice(gpa >> 12, gpa + size_bytes >> 12, 1)
        case {"gpa": int(gpa), "contents": list(contents)}:
            return slice(gpa >> 12, (gpa >> 12) + len(contents), 1)
        case {"hva": int(hva), "size_bytes": int(size_bytes)}:
            ranges = [r for vm in process.vms for r in vm.vm.slots.in_hva_range(hva >> 12, size_bytes >> 12)]
        case {"fd": int(fd), "offset": int(offset)} if fd in process.files:
            n = arguments.get("size_bytes", PAGE_BYTES) >> 12
            ranges = invalidate.bound_ranges(process.files[fd], offset >> 12, n)
        case _:
            return None
    return slice(min(r[1] for r in ranges), max(r[2] for r in ranges), 1) if ranges else None


class Process:
    """A VMM process on a host: its memory, its descriptors, its system calls."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.mm = Mm(host)
        self.files: dict[int, GmemFile] = {}
        self.vms: list[VmFd] = []
        self.other_fds: set[int] = set()
        """Descriptors that are open, but no guest_memfd's (`new_fd`)."""
        self._next_fd = 3

    @property
    def drive(self) -> Any:
        """The host's driver, which runs its operations."""
        return self.host.drive

    # ---- memory of the VMM ------------------------------------------------------------------------------------

    def mmap(self, size_bytes: int) -> int:
        """Anonymous memory, backed as the host backs (4K or 2M pages). Returns the hva."""
        self._length(size_bytes)
        return self.mm.map(-(-size_bytes // PAGE_BYTES), self.host.backing_level)

    @staticmethod
    def _length(size_bytes: int) -> None:
        if size_bytes == 0:
            raise UapiError(errno.EINVAL, "mmap", "the length is 0")
        if not 0 < size_bytes <= TASK_SIZE:
            raise UapiError(errno.ENOMEM, "mmap", f"no room for {size_bytes:#x} bytes")

    def mmap_gmem(self, fd: int, offset: int, size_bytes: int, shared: bool = True) -> int:
        """Map a guest_memfd. ENODEV without FLAG_MMAP, EINVAL unless MAP_SHARED or where misaligned."""
        if offset & PAGE_MASK:
            raise UapiError(errno.EINVAL, "mmap", "the offset must be a whole page")
        file = self._file(fd, "mmap")
        self._length(size_bytes)
        if offset % (1 << 64) >= (1 << 63) - size_bytes:
            raise UapiError(errno.EOVERFLOW, "mmap", "beyond what a file can have")
        if not file.inode.flags & GUEST_MEMFD_FLAG_MMAP:
            raise UapiError(errno.ENODEV, "mmap", "the guest_memfd was made without GUEST_MEMFD_FLAG_MMAP")
        if not shared:
            raise UapiError(errno.EINVAL, "mmap", "guest_memfd is mapped MAP_SHARED")
        file.refs += 1
        return self.mm.map(-(-size_bytes // PAGE_BYTES), PG_LEVEL_4K, file, offset // PAGE_BYTES)

    @operation
    @_call("munmap")
    def munmap(self, hva: int, size_bytes: int) -> Steps[None]:
        """munmap(2): what is mapped in the range goes."""
        yield from self.mm.unmap(hva, size_bytes)

    @operation
    @_call("madvise")
    def madvise_dontneed(self, hva: int, size_bytes: int) -> Steps[None]:
        """madvise(MADV_DONTNEED): notifiers, then the pages are freed; the next touch finds zeros."""
        yield from self.mm.take_away(hva, size_bytes)

    def mlock(self, hva: int, size_bytes: int) -> None:
        """mlock(2) by a process without a limit: the pages are faulted in, and madvise_dontneed refuses them."""
        self.mm.lock(hva, size_bytes)

    def touchable(self, hva: int, n: int) -> Iterator[tuple[int, int]]:
        """(hva, pages) of the parts of an access of n pages, each in one mapping, up to the first page that would end
        in SIGSEGV or SIGBUS."""
        for low, stop in self.mm.touchable(hva >> 12, n):
            yield low << 12, stop - low

    @operation
    @_call("migrate_pages")
    def migrate_pages(self, hva: int, size_bytes: int) -> Steps[int]:
        """The kernel moves pages to other frames (compaction, NUMA balancing). Returns how many could be moved."""
        return (yield from self.mm.migrate(hva, size_bytes))

    def write(self, hva: int, stamps: Words | int, n: int, mode: HostMode = HostMode.USER) -> HostVerdict:
        """The VMM writes n whole pages of its memory. EFAULT where nothing is mapped."""
        return self._telling("VMM write", hva, n, lambda: self._write(hva, stamps, n, mode))

    def _write(self, hva: int, stamps: Words | int, n: int, mode: HostMode) -> HostVerdict:
        pfns = self._touch(hva, n, "write")
        verdict = self.host.host_access(pfns, True, mode)
        if verdict in (HostVerdict.OK, HostVerdict.RECLAIMED, HostVerdict.POISONED):
            self.host.memory.write(pfns, stamps, 0)
        return verdict

    def read(self, hva: int, n: int, mode: HostMode = HostMode.USER) -> tuple[HostVerdict, Words]:
        """The VMM reads n whole pages: the verdict, and the stamps it sees."""
        return self._telling("VMM read", hva, n, lambda: self.host.host_read(self._touch(hva, n, "read"), mode))

    def _telling(self, name: str, hva: int, n: int, access: Callable[[], R]) -> R:
        """The access, told where somebody listens to details."""
        ops = self.host.ops
        if not ops.detailed:
            return access()

        def steps() -> Steps[R]:
            return access()
            yield

        gfns = _gfns_of(self, {"hva": hva, "size_bytes": n * PAGE_BYTES})
        return drain(ops.told(name, steps(), gfns=gfns, n=n))

    def _touch(self, hva: int, n: int, call: str) -> Sel:
        pfns = self.mm.gup(slice(hva >> 12, (hva >> 12) + n, 1), call)
        if self.host.ops.detailed:
            self._found({"hva": hva, "size_bytes": n * PAGE_BYTES}, pfns)
        return pfns

    def _found(self, where: dict[str, Any], pfns: Sel) -> None:
        """Tell whoever listens to details which frames stand behind the gfns of a range, where it is wholly mapped."""
        gfns = _gfns_of(self, where)
        if gfns is not None and count(gfns) == count(pfns):
            self.host.ops.detail("frames", "found", gfns=gfns, pfns=pfns, n=count(pfns))

    # ---- VMs and files ----------------------------------------------------------------------------------------

    def create_vm(self, vm_type: str | None = None) -> VmFd:
        """KVM_CREATE_VM with one of the vendor's VM types; the host's own where none is named."""
        vm = VmFd(self, self.host.make_vm(self.mm, vm_type))
        self.vms.append(vm)
        return vm

    def install(self, file: GmemFile) -> int:
        """A new descriptor for an open file."""
        fd, self._next_fd = self._next_fd, self._next_fd + 1
        self.files[fd] = file
        return fd

    def new_fd(self) -> int:
        """A new descriptor for something that is no guest_memfd, where a front gives numbers to VMs and vCPUs."""
        fd, self._next_fd = self._next_fd, self._next_fd + 1
        self.other_fds.add(fd)
        return fd

    def dup(self, fd: int) -> int:
        """dup(2)."""
        file = self._file(fd, "dup")
        file.refs += 1
        return self.install(file)

    @operation
    @_call("close")
    def close(self, fd: int) -> Steps[None]:
        """close(2); the last reference releases the guest_memfd."""
        file = self._file(fd, "close")
        del self.files[fd]
        yield from file.put()

    def _file(self, fd: int, call: str) -> GmemFile:
        if fd not in self.files:
            raise UapiError(errno.EBADF, call, f"descriptor {fd} is not open")
        return self.files[fd]

    @operation
    @_call("fallocate")
    def fallocate(self, fd: int, mode: int, offset: int, size_bytes: int) -> Steps[None]:
        """fallocate(2) on a guest_memfd (kvm_gmem_fallocate): allocate, or punch a hole."""
        inode = self._file(fd, "fallocate").inode
        if offset < 0 or size_bytes <= 0:
            raise UapiError(errno.EINVAL, "fallocate", "offset and length must be positive")
        if offset + size_bytes >= 1 << 63 and mode in VFS_FALLOCATE_MODES:
            raise UapiError(errno.EFBIG, "fallocate", "beyond what a file can have")
        if not mode & FALLOC_FL_KEEP_SIZE or mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE):
            raise UapiError(errno.EOPNOTSUPP, "fallocate", "only KEEP_SIZE, with or without PUNCH_HOLE")
        if offset & PAGE_MASK or size_bytes & PAGE_MASK:
            raise UapiError(errno.EINVAL, "fallocate", "offset and length must be whole pages")
        start, n = offset // PAGE_BYTES, size_bytes // PAGE_BYTES
        if mode & FALLOC_FL_PUNCH_HOLE:
            self.host.meter.charge("punch_hole_call")
            if start < inode.npages:
                yield from invalidate.punch_hole(inode, start, min(n, inode.npages - start))
        else:
            if start + n > inode.npages:
                raise UapiError(errno.EINVAL, "fallocate", "beyond the size of the guest_memfd")
            yield from holding(inode.invalidate_lock, self._allocate(fd, inode, start, n), read=True)
        for file in inode.files:
            self.host.ops.quiet(file.vm)

    def _allocate(self, fd: int, inode: GmemInode, start: int, n: int) -> Steps[None]:
        for low in range(start, start + n, 1 << 17):
            index = slice(low, min(low + (1 << 17), start + n), 1)
            words = inode.allocate(index)
            if self.host.ops.detailed:
                self._found({"fd": fd, "offset": low << 12, "size_bytes": count(index) << 12}, words >> 5)
        yield from ()

    @operation
    @_call("memory_failure")
    def memory_failure(self, fd: int, offset: int) -> Steps[None]:
        """The hardware reports a broken page of a guest_memfd (memory_failure, kvm_gmem_error_folio)."""
        yield from invalidate.memory_failure(self._file(fd, "memory_failure").inode, offset // PAGE_BYTES)

    @operation
    @_call("exit")
    def exit(self) -> Steps[None]:
        """The process ends: its memory, then its descriptors; VMs that nobody holds any more are destroyed."""
        yield from self.mm.teardown()
        for vm in self.vms:
            yield from vm.close.steps()
        for fd in list(self.files):
            yield from self.close.steps(fd)


class VmFd:
    """A VM's descriptor."""

    def __init__(self, process: Process, vm: Vm) -> None:
        self.process = process
        self.vm = vm
        self.closed = False

    @property
    def host(self) -> Host:
        return self.vm.host

    @property
    def drive(self) -> Any:
        """The host's driver, which runs its operations."""
        return self.vm.host.drive

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION; 0 for what is not among `extensions`."""
        self._alive("KVM_CHECK_EXTENSION")
        return self.extensions().get(cap, 0)

    def extensions(self) -> dict[int, int]:
        """What KVM_CHECK_EXTENSION says of the capabilities that are about memory, by number."""
        caps = self.vm.caps
        return {
            KVM_CAP_NR_MEMSLOTS: NR_MEMSLOTS,
            KVM_CAP_READONLY_MEM: int(caps.read_only_slots),
            KVM_CAP_USER_MEMORY2: 1,
            KVM_CAP_MEMORY_FAULT_INFO: 1,
            KVM_CAP_MEMORY_ATTRIBUTES: KVM_MEMORY_ATTRIBUTE_PRIVATE if caps.private_by_attribute else 0,
            KVM_CAP_GUEST_MEMFD: int(caps.gmem_backed),
            KVM_CAP_PRE_FAULT_MEMORY: int(caps.prefault),
            KVM_CAP_GUEST_MEMFD_FLAGS: self._gmem_flags(),
        }

    def _gmem_flags(self) -> int:
        if not self.vm.caps.gmem_backed:
            return 0
        return GUEST_MEMFD_FLAG_MMAP | (GUEST_MEMFD_FLAG_INIT_SHARED if self.vm.caps.gmem_init_shared else 0)

    def _alive(self, call: str) -> None:
        if self.vm.dead:
            raise UapiError(errno.EIO, call, f"the VM is dead: {self.vm.dead_because}")

    @contextmanager
    def _quiet_after(self) -> Iterator[None]:
        yield
        self.vm.host.ops.quiet(self.vm)

    # ---- vCPUs ------------------------------------------------------------------------------------------------

    @operation
    @_call("KVM_CREATE_VCPU")
    def create_vcpu(self, vcpu_id: int | None = None, state: bytes = b"") -> Steps[VcpuFd]:
        """KVM_CREATE_VCPU. EEXIST for an id in use, EINVAL for one above what the host can have.

        state: what KVM_SET_SREGS, KVM_SET_REGS and their like set, in the vendor's layout; empty: as at reset.
        """
        self._alive("KVM_CREATE_VCPU")
        vm = self.vm
        number = len(vm.vcpus) if vcpu_id is None else vcpu_id
        if not 0 <= number < MAX_VCPU_IDS:
            raise UapiError(errno.EINVAL, "KVM_CREATE_VCPU", f"a vCPU's id is below {MAX_VCPU_IDS}")
        vcpu = yield from holding(vm.lock, self._create_vcpu(number, state))
        return VcpuFd(self, vcpu)

    def _create_vcpu(self, number: int, state: bytes) -> Steps[Vcpu]:
        vm = self.vm
        if any(v.id == number for v in vm.vcpus):
            raise UapiError(errno.EEXIST, "KVM_CREATE_VCPU", f"vCPU {number} exists")
        vcpu = Vcpu(vm, number, state)
        yield from vm.host.ops.call("vcpu_create", vcpu=vcpu)
        vm.vcpus.append(vcpu)
        return vcpu

    # ---- guest_memfd and memslots -----------------------------------------------------------------------------

    def create_guest_memfd(self, size_bytes: int, flags: int = 0) -> int:
        """KVM_CREATE_GUEST_MEMFD. Returns a descriptor."""
        call = "KVM_CREATE_GUEST_MEMFD"
        self._alive(call)
        if not self.vm.caps.gmem_backed:
            raise UapiError(errno.EINVAL, call, "this VM type has no guest_memfd")
        if flags & ~self._gmem_flags():
            raise UapiError(errno.EINVAL, call, f"flags {flags:#x} are not supported by this VM type")
        if size_bytes <= 0 or size_bytes >= 1 << 63 or size_bytes & PAGE_MASK:
            raise UapiError(errno.EINVAL, call, "the size must be whole pages, more than none")
        vm = self.vm
        level = min(vm.host.backing_level, vm.caps.max_gmem_level)
        try:
            inode = GmemInode(vm.host, size_bytes // PAGE_BYTES, flags, level)
        except MemoryError:
            raise UapiError(errno.ENOMEM, call, "no memory for the file's index") from None
        file = GmemFile(inode, vm)
        inode.files.append(file)
        vm.gmem_files.append(file)
        vm.users += 1
        return self.process.install(file)

    def set_user_memory_region(self, slot: int, flags: int, gpa: int, size_bytes: int, hva: int) -> None:
        """KVM_SET_USER_MEMORY_REGION (v1)."""
        self._alive("KVM_SET_USER_MEMORY_REGION")
        if flags % U32 & ~(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY):
            raise UapiError(errno.EINVAL, "KVM_SET_USER_MEMORY_REGION", f"flags {flags:#x}")
        self.set_user_memory_region2(slot, flags, gpa, size_bytes, hva)

    @operation
    @_call("KVM_SET_USER_MEMORY_REGION2")
    def set_user_memory_region2(
        self, slot: int, flags: int, gpa: int, size_bytes: int, hva: int = 0, gmem_fd: int = -1, gmem_offset: int = 0
    ) -> Steps[None]:
        """KVM_SET_USER_MEMORY_REGION2: create, delete (size 0), move a memslot or change its flags."""
        change = self._set_region(slot, flags, gpa, size_bytes, hva, gmem_fd, gmem_offset)
        yield from holding(self.vm.slots_lock, change)
        self.vm.host.ops.quiet(self.vm)

    def _set_region(
        self, slot: int, flags: int, gpa: int, size_bytes: int, hva: int, gmem_fd: int, gmem_offset: int
    ) -> Steps[None]:
        call = "KVM_SET_USER_MEMORY_REGION2"
        vm, caps = self.vm, self.vm.caps
        self._alive(call)
        slot, flags = slot % U32, flags % U32
        gpa, size_bytes, hva, gmem_offset = gpa % U64, size_bytes % U64, hva % U64, gmem_offset % U64

        def bad(why: str, error: int = errno.EINVAL) -> UapiError:
            return UapiError(error, call, why)

        as_id, slot_id = slot >> 16, slot & 0xFFFF
        if slot_id >= NR_MEMSLOTS:
            raise bad(f"slot id {slot_id}")
        known = KVM_MEM_LOG_DIRTY_PAGES | (KVM_MEM_READONLY if caps.read_only_slots else 0)
        known |= KVM_MEM_GUEST_MEMFD if caps.gmem_backed else 0
        if flags & ~known:
            raise bad(f"flags {flags:#x}")
        if flags & KVM_MEM_GUEST_MEMFD and flags & (KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY):
            raise bad("guest_memfd slots cannot be logged or read only")
        if (size_bytes | gpa | hva) & PAGE_MASK or hva > USER_PTR_MAX - size_bytes:
            raise bad("size, gpa and hva must be whole pages, hva a user address")
        if flags & KVM_MEM_GUEST_MEMFD and (gmem_offset & PAGE_MASK or gmem_offset + size_bytes >= U64):
            raise bad("the guest_memfd offset must be a whole page, and offset + size must not wrap")
        if as_id > 0 or gpa + size_bytes >= U64:
            raise bad("no such address space, or gpa + size wraps")
        npages = size_bytes // PAGE_BYTES
        if npages > MAX_NR_PAGES:
            raise bad(f"{npages} pages are too many")
        base = gpa >> 12
        old = vm.slots.by_id.get(slot)
        if size_bytes == 0:
            if old is None:
                raise bad(f"there is no slot {slot} to delete")
            self._may_change(old, call)
            yield from vm.set_memslot(old, None, Change.DELETE)
            return
        if old is not None:
            if flags & KVM_MEM_GUEST_MEMFD or old.has_gmem:
                raise bad("a guest_memfd slot is only created or deleted")
            if old.hva != hva or old.npages != npages or (old.flags ^ flags) & KVM_MEM_READONLY:
                raise bad("hva, size and READONLY of a slot never change")
            if old.base_gfn == base and old.flags == flags:
                return
            change = Change.MOVE if old.base_gfn != base else Change.FLAGS_ONLY
        else:
            change = Change.CREATE
        clash = [s for s in vm.slots.overlapping(base, base + npages, as_id) if s is not old]
        if change is not Change.FLAGS_ONLY and clash:
            raise bad(f"slot {clash[0].id} is already at gfn {clash[0].base_gfn:#x}", errno.EEXIST)
        new = Memslot(slot, base, npages, hva, flags)
        if flags & KVM_MEM_GUEST_MEMFD:
            yield from self._bind(new, gmem_fd, gmem_offset, call)
        try:
            if base + npages > (caps.shared_gfn_bit or MAX_GFN):
                raise bad("above the highest gfn, or a gfn with the alias bit")
            if old is not None:
                self._may_change(old, call) if change is Change.MOVE else None
                new.arch, new.lpage, new.dirty = old.arch, old.lpage, old.dirty
            yield from vm.set_memslot(old, new, change)
        except UapiError:
            if new.gmem is not None:
                yield new.gmem.inode.invalidate_lock.write
                new.gmem.unbind(new)
                yield new.gmem.inode.invalidate_lock.release
            raise

    def _may_change(self, slot: Memslot, call: str) -> None:
        if self.vm.caps.memslots_fixed_after_run and self.vm.has_run:
            raise UapiError(errno.EPERM, call, "this VM type fixes its memslots once a vCPU has run")

    def _bind(self, new: Memslot, fd: int, offset: int, call: str) -> Steps[None]:
        """kvm_gmem_bind: a hole that is being punched sees the binding from its begin to its end, or not at all."""
        file = self.process.files.get(fd)
        if fd in self.process.other_fds:
            raise UapiError(errno.EINVAL, call, f"descriptor {fd} is not a guest_memfd's")
        if file is None:
            raise UapiError(errno.EBADF, call, f"descriptor {fd} is not open")
        if file.vm is not self.vm:
            raise UapiError(errno.EINVAL, call, "the guest_memfd belongs to another VM")
        start = offset // PAGE_BYTES
        if start + new.npages > file.inode.npages:
            raise UapiError(errno.EINVAL, call, "the range is not within the guest_memfd")
        yield file.inode.invalidate_lock.write
        if file.bound(start, new.npages):
            yield file.inode.invalidate_lock.release
            error = errno.EINVAL if self.vm.host.kernel == "6.18" else errno.EEXIST
            raise UapiError(error, call, "the guest_memfd range is already bound")
        new.gmem, new.gmem_pgoff = file, start
        new.gmem_only = bool(file.inode.flags & GUEST_MEMFD_FLAG_MMAP)
        file.bind(new)
        yield file.inode.invalidate_lock.release

    @operation
    @_call("KVM_GET_DIRTY_LOG")
    def get_dirty_log(self, slot: int) -> Steps[npt.NDArray[np.uint8]]:
        """KVM_GET_DIRTY_LOG: one byte per page of the slot, 1 where it was written since the last call.

        ENOENT where the slot does not exist or is not logged; EINVAL for a bad id.
        """
        self._alive("KVM_GET_DIRTY_LOG")
        slot %= U32
        if slot & 0xFFFF >= NR_MEMSLOTS or slot >> 16:
            raise UapiError(errno.EINVAL, "KVM_GET_DIRTY_LOG", f"slot id {slot}")
        return (yield from holding(self.vm.slots_lock, self._get_dirty_log(slot)))

    def _get_dirty_log(self, slot: int) -> Steps[npt.NDArray[np.uint8]]:
        found = self.vm.slots.by_id.get(slot)
        if found is None or found.dirty is None:
            raise UapiError(errno.ENOENT, "KVM_GET_DIRTY_LOG", f"slot {slot} is not logged")
        return (yield from self.vm.get_dirty_log(found))

    # ---- attributes -------------------------------------------------------------------------------------------

    @operation
    @_call("KVM_SET_MEMORY_ATTRIBUTES")
    def set_memory_attributes(self, gpa: int, size_bytes: int, attributes: int, flags: int = 0) -> Steps[None]:
        """KVM_SET_MEMORY_ATTRIBUTES: all or nothing; no memslot in the range is fine."""
        call = "KVM_SET_MEMORY_ATTRIBUTES"
        self._alive(call)
        vm = self.vm
        if not vm.caps.private_by_attribute:
            raise UapiError(errno.ENOTTY, call, "this VM type has no memory attributes")
        gpa, size_bytes = gpa % U64, size_bytes % U64
        if flags:
            raise UapiError(errno.EINVAL, call, f"flags {flags:#x}")
        if attributes & ~KVM_MEMORY_ATTRIBUTE_PRIVATE:
            raise UapiError(errno.EINVAL, call, f"attributes {attributes:#x}")
        if size_bytes == 0 or gpa + size_bytes >= U64:
            raise UapiError(errno.EINVAL, call, "the size is 0 or wraps")
        if (gpa | size_bytes) & PAGE_MASK:
            raise UapiError(errno.EINVAL, call, "gpa and size must be whole pages")
        start, end = gpa >> 12, gpa + size_bytes >> 12
        if end > MAX_GFN:
            raise UapiError(errno.ENOMEM, call, "no memory for attributes so far up")
        vm.host.meter.charge("attributes_call")
        change = invalidate.set_attributes(vm, start, end, attributes, KVM_MEMORY_ATTRIBUTE_PRIVATE)
        yield from holding(vm.slots_lock, change)
        vm.host.ops.quiet(vm)

    # ---- vendor calls -----------------------------------------------------------------------------------------

    @operation
    @_call("KVM_MEMORY_ENCRYPT_OP")
    def memory_encrypt_op(self, command: str, arguments: dict[str, Any] | None = None) -> Steps[dict[str, Any]]:
        """KVM_MEMORY_ENCRYPT_OP: a vendor command under its own name. ENOTTY where the vendor has none."""
        result: dict[str, Any] = yield from self._vendor(
            "KVM_MEMORY_ENCRYPT_OP", "memory_encrypt_op", command=command, arguments=arguments or {}
        )
        return result

    @operation
    @_call("KVM_MEMORY_ENCRYPT_REG_REGION")
    def register_region(self, hva: int, size_bytes: int) -> Steps[None]:
        """KVM_MEMORY_ENCRYPT_REG_REGION."""
        yield from self._vendor("KVM_MEMORY_ENCRYPT_REG_REGION", "register_region", hva=hva, size_bytes=size_bytes)

    @operation
    @_call("KVM_MEMORY_ENCRYPT_UNREG_REGION")
    def unregister_region(self, hva: int, size_bytes: int) -> Steps[None]:
        """KVM_MEMORY_ENCRYPT_UNREG_REGION."""
        yield from self._vendor("KVM_MEMORY_ENCRYPT_UNREG_REGION", "unregister_region", hva=hva, size_bytes=size_bytes)

    @operation
    @_call("KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM")
    def move_enc_context_from(self, source: VmFd) -> Steps[None]:
        """KVM_ENABLE_CAP(KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM): this VM takes over the source's context, key, pins and
        accounting (intra-host migration). EINVAL where the VM type has none to move."""
        yield from self._context_from(source, "KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM", "vm_move")

    @operation
    @_call("KVM_CAP_VM_COPY_ENC_CONTEXT_FROM")
    def copy_enc_context_from(self, source: VmFd) -> Steps[None]:
        """KVM_ENABLE_CAP(KVM_CAP_VM_COPY_ENC_CONTEXT_FROM): this VM becomes a mirror of the source, which stays for as
        long as this one does. EINVAL where the VM type has nothing to share."""
        yield from self._context_from(source, "KVM_CAP_VM_COPY_ENC_CONTEXT_FROM", "vm_copy")
        source.vm.users += 1
        self.vm.mirrored = source.vm

    def _context_from(self, source: VmFd, call: str, hook: str) -> Steps[None]:
        self._alive(call)
        if not self.vm.host.ops.has(hook):
            raise UapiError(errno.EINVAL, call, "this VM type has no context of its own")
        steps = self.vm.host.ops.call(hook, source=source.vm, target=self.vm)
        if source.vm is not self.vm:
            steps = holding(source.vm.lock, steps)
        yield from holding(self.vm.lock, steps)
        self.vm.host.ops.quiet(self.vm)

    def _vendor(self, call: str, hook: str, **arguments: Any) -> Steps[Any]:
        self._alive(call)
        vm = self.vm
        if not vm.host.ops.has(hook):
            raise UapiError(errno.ENOTTY, call, "this VM type has no such call")
        result = yield from holding(vm.lock, vm.host.ops.call(hook, vm=vm, **arguments))
        vm.host.ops.quiet(vm)
        return result

    # ---- launch -----------------------------------------------------------------------------------------------

    @operation
    @_call("launch_update")
    def launch_update(self, gpa: int, contents: list[bytes], kind: str = "normal") -> Steps[int]:
        """Load image pages through the vendor (kvm_gmem_populate, or the hva of a legacy VM). Returns pages loaded.

        EINVAL where gpa is no page's, or a page is not private, has no memslot or no guest_memfd. A failing page ends
        the call: fewer pages are returned, or its error where it is the first.
        """
        call = "launch_update"
        self._alive(call)
        if gpa % PAGE_BYTES:
            raise UapiError(errno.EINVAL, call, f"gpa {gpa:#x} is not that of a page")
        done = yield from holding(self.vm.slots_lock, self._launch_update(gpa >> 12, contents, kind))
        self.vm.host.ops.quiet(self.vm)
        return done

    def _launch_update(self, gfn: int, contents: list[bytes], kind: str) -> Steps[int]:
        call, vm, gfns = "launch_update", self.vm, slice(gfn, gfn + len(contents), 1)
        slot = vm.slots.find(gfn)
        if slot is None or gfns.stop > slot.end_gfn or not contents:
            raise UapiError(errno.EINVAL, call, f"gpa {gfn << 12:#x} is not in one memslot")
        if not vm.caps.private_by_attribute:
            pfns = vm.mm.gup(shift(gfns, slot.hva_page - slot.base_gfn), call)
            return (yield from self._load(slot, gfns, pfns, contents, kind))
        if slot.gmem is None:
            raise UapiError(errno.EINVAL, call, "the memslot has no guest_memfd")
        if not vm.attributes.uniform(gfns.start, gfns.stop, KVM_MEMORY_ATTRIBUTE_PRIVATE):
            raise UapiError(errno.EINVAL, call, "a page of the image is not private")
        inode = slot.gmem.inode
        return (yield from holding(inode.invalidate_lock, self._populate(slot, inode, gfns, contents, kind)))

    def _populate(self, slot: Memslot, inode: GmemInode, gfns: slice, contents: list[bytes], kind: str) -> Steps[int]:
        """kvm_gmem_populate: the folios, and what the vendor does with them."""
        index = shift(gfns, slot.to_index(gfns))
        try:
            pfns = inode.populate(index)
        except UapiError:
            # Page by page the kernel would have come as far as this.
            if not (n := inode.usable(index)):
                raise
            pfns = inode.populate(part(index, 0, n))
            gfns, contents = slice(gfns.start, gfns.start + n), contents[:n]
        yield POPULATE_HOOK
        return (yield from self._load(slot, gfns, pfns, contents, kind))

    def _load(self, slot: Memslot, gfns: slice, pfns: Sel, contents: list[bytes], kind: str) -> Steps[int]:
        vm = self.vm
        if not vm.host.ops.has("launch_update"):
            for i, content in enumerate(contents):
                vm.host.memory.write(part(pfns, i, i + 1), vm.host.memory.intern(content), vm.key)
            return len(contents)
        batch = Batch(slot, PG_LEVEL_4K, gfns, pfns)
        stopped: Stopped | None = yield from vm.host.ops.call(
            "launch_update", len(contents), vm=vm, batch=batch, contents=contents, kind=kind
        )
        if stopped is None:
            return len(contents)
        if stopped.done == 0:
            error = stopped.reason.errno if isinstance(stopped.reason, Fatal) else errno.EBUSY
            raise UapiError(error, "launch_update", f"the vendor refused the page at {gfns.start << 12:#x}")
        return stopped.done

    @operation
    @_call("launch_finish")
    def launch_finish(self) -> Steps[None]:
        """The image is complete; the VM may run."""
        self._alive("launch_finish")
        yield from holding(self.vm.lock, self.vm.host.ops.call("launch_finish", vm=self.vm))
        self.vm.host.ops.quiet(self.vm)

    @operation
    @_call("close")
    def close(self) -> Steps[None]:
        """The VM's descriptor is closed; the VM dies with its last guest_memfd."""
        if not self.closed:
            self.closed = True
            yield from self.vm.put()


class VcpuFd:
    """A vCPU's descriptor."""

    def __init__(self, vm: VmFd, vcpu: Vcpu) -> None:
        self.vm = vm
        self.vcpu = vcpu

    @property
    def host(self) -> Host:
        return self.vcpu.vm.host

    @property
    def drive(self) -> Any:
        """The host's driver, which runs its operations."""
        return self.vcpu.vm.host.drive

    @operation
    @_call("KVM_RUN")
    def run(self, action: Action) -> Steps[ExitReason | None]:
        """KVM_RUN while the guest performs `action`; None when it is complete, else the exit."""
        return (yield from self.vcpu.run.steps(action))

    @operation
    @_call("KVM_PRE_FAULT_MEMORY")
    def pre_fault_memory(self, gpa: int, size_bytes: int, flags: int = 0) -> Steps[tuple[int, int]]:
        """KVM_PRE_FAULT_MEMORY: read faults. Returns (gpa, size) of what is left, (end, 0) when all is done.

        An error after at least one page is not reported: what is left says so.
        """
        call = "KVM_PRE_FAULT_MEMORY"
        vm = self.vcpu.vm
        self.vm._alive(call)
        gpa, size_bytes = gpa % U64, size_bytes % U64
        if flags or (gpa | size_bytes) & PAGE_MASK or size_bytes == 0 or gpa + size_bytes >= U64:
            raise UapiError(errno.EINVAL, call, "flags, no whole pages, none, or a range that wraps")
        if not (vm.caps.prefault and vm.pre_fault_allowed):
            raise UapiError(errno.EOPNOTSUPP, call, "this VM cannot pre-fault (yet)")
        if vm.caps.shared_gfn_bit and gpa >> 12 & vm.caps.shared_gfn_bit:
            raise UapiError(errno.EINVAL, call, "the gpa has the alias bit")
        gfns: Sel = slice(gpa >> 12, gpa + size_bytes >> 12, 1)
        done = 0
        tries = Tries(vm)
        while done < count(gfns):
            rest = part(gfns, done, min(done + PIECE, count(gfns)))  # of a range that may be all there is
            private = False
            if vm.caps.private_by_attribute:
                attributes = vm.attributes
                gfn = rest.start if isinstance(rest, slice) else int(array_of(rest)[0])
                private = gfn < len(attributes.words) and bool(attributes.words[gfn])
                same = np.flatnonzero((attributes.words[gfn : gfn + count(rest)] != 0) != private)
                if len(same):
                    rest = part(rest, 0, int(same[0]))
            fault = yield from resolve(vm, self.vcpu, rest, False, private, prefetch=True)
            done += fault.done
            if fault.ret in (RetPf.FIXED, RetPf.SPURIOUS):
                continue
            if fault.ret is RetPf.RETRY and not vm.dead:
                tries.again(first(rest), private)
                continue
            if done == 0:
                error = errno.EIO if vm.dead else fault.errno
                raise UapiError(error, call, f"the page at {gpa:#x} cannot be faulted in")
            break
        vm.host.ops.quiet(vm)
        return gpa + done * PAGE_BYTES, size_bytes - done * PAGE_BYTES


__all__ = ["Accept", "Convert", "Process", "Touch", "VcpuFd", "VmFd"]
