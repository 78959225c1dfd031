"""Does the calls of a UAPI script on /dev/kvm, in a process of its own (`cvmcore.live.server`).

Descriptors and addresses are the process's own. Whatever the kernel refuses comes back as the errno's name; whatever
this driver refuses to try on a real machine raises `Refused`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from typing import Any

from cvmcore.errors import errno_name
from cvmcore.live import guest, layouts

PAGE = 4096
MOST_BYTES = 1 << 30
"""Of a memslot, and of what one call may allocate: KVM allocates per page of a slot, whatever is touched."""
ABSURD_BYTES = 1 << 43
"""From here on the kernel refuses a memslot itself (2**31 pages), so that it may be asked."""
ARENA, ARENA_END, GIB = 0x1000_0000_0000, 0x2000_0000_0000, 1 << 30
"""Where mappings of a script lie, far from the driver's own memory, each at a multiple of 1 GiB with a hole behind."""
FEW_PAGES = 4096
IOVECS = 1024
PROT_READ_WRITE, MAP_SHARED, MAP_PRIVATE = 3, 1, 2
MAP_ANONYMOUS, MAP_NORESERVE, MAP_FIXED_NOREPLACE = 0x20, 0x4000, 0x100000
MADV_DONTNEED = 4
TASK_SIZE = 1 << 47
MASK = (1 << 64) - 1

Answer = dict[str, Any]


class Refused(Exception):
    """Not tried on a real machine; the sentence says why."""


def _function(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    function.restype, function.argtypes = result, arguments
    return function


_WORD = ctypes.c_uint64
_mmap = _function("mmap", _WORD, _WORD, _WORD, ctypes.c_int, ctypes.c_int, ctypes.c_int, _WORD)
_munmap = _function("munmap", ctypes.c_int, _WORD, _WORD)
_madvise = _function("madvise", ctypes.c_int, _WORD, _WORD, ctypes.c_int)
_mlock = _function("mlock", ctypes.c_int, _WORD, _WORD)
_fallocate = _function("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_ftruncate = _function("ftruncate", ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_lseek = _function("lseek", ctypes.c_int64, ctypes.c_int, ctypes.c_int64, ctypes.c_int)
_readv = _function("readv", ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_writev = _function("writev", ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_syscall = _function("syscall", ctypes.c_long, ctypes.c_long, *[_WORD] * 4)


def _checked(result: int) -> int:
    if result in (-1, MASK):
        raise OSError(ctypes.get_errno(), "")
    return result


def _as_int(value: int) -> int:
    """A number of 32 bits as fcntl.ioctl takes it: with a sign."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def cachestat(fd: int, offset: int, size: int) -> int:
    """Pages of the page cache in a range of a file; size 0: to its end."""
    wanted = (ctypes.c_uint64 * 2)(offset, size)
    found = (ctypes.c_uint64 * 5)()
    _checked(_syscall(layouts.SYS_CACHESTAT, fd & 0xFFFFFFFF, ctypes.addressof(wanted), ctypes.addressof(found), 0))
    return int(found[0])


def mapped(size: int, fd: int = -1, offset: int = 0, flags: int = MAP_SHARED, at: int = 0) -> int:
    """mmap, readable and writable. Raises OSError."""
    return _checked(_mmap(at, size & MASK, PROT_READ_WRITE, flags, fd, offset & MASK))


class Vm:
    """A VM and the memslot of its guest. kind: its type; from ENCRYPTED on nobody sets its registers from outside."""

    ENCRYPTED = 2

    def __init__(self, kind: int) -> None:
        self.kind = kind
        self.harness = 0


class Vcpu:
    """A vCPU: its kvm_run, and the VM that it is of. Descriptors of it may come and go."""

    def __init__(self, run: int, vm: Vm) -> None:
        self.run, self.vm = run, vm

    def word(self, offset: int) -> int:
        return ctypes.c_uint32.from_address(self.run + offset).value

    def union(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, ctypes.string_at(self.run + layouts.RUN_UNION, struct.calcsize(layout)))

    def finish(self, fd: int) -> None:
        """Let KVM complete the instruction that left the guest."""
        byte = ctypes.c_uint8.from_address(self.run + layouts.RUN_IMMEDIATE_EXIT)
        byte.value = 1
        try:
            fcntl.ioctl(fd, layouts.KVM_RUN, 0)
        except OSError as error:
            if error.errno != errno.EINTR:
                raise
        finally:
            byte.value = 0


class Driver:
    """One VMM: its descriptors, its mappings. Methods are the calls of a script by name."""

    def __init__(self) -> None:
        self.kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.run_bytes = fcntl.ioctl(self.kvm, layouts.KVM_GET_VCPU_MMAP_SIZE, 0)
        self.cpuid = bytearray(struct.pack(layouts.CPUID_HEADER, layouts.CPUID_ENTRIES, 0))
        self.cpuid += bytes(layouts.CPUID_ENTRIES * layouts.CPUID_ENTRY_BYTES)
        fcntl.ioctl(self.kvm, layouts.KVM_GET_SUPPORTED_CPUID, self.cpuid)
        self.open: dict[int, Vm | Vcpu | int] = {}
        """Descriptors that the script opened: VMs, vCPUs, and the flags of guest_memfds."""
        self.next = ARENA
        self.pipe = os.pipe()

    def call(self, op: str, arguments: dict[str, Any]) -> Answer:
        """Do one call. Raises Refused."""
        do: Callable[..., Answer | None] | None = getattr(self, "do_" + op, None)
        if do is None:
            raise Refused(f"{op} is not tried on a real machine")
        try:
            return {"status": "OK", **(do(**arguments) or {})}
        except OSError as error:
            return {"status": errno_name(error.errno or 0)}

    def _fd(self, fd: int) -> int:
        """Only what the script opened: the driver's own descriptors are none of its business."""
        return fd if fd in self.open else -1

    def _opened(self, fd: int, what: Vm | Vcpu | int) -> Answer:
        self.open[fd] = what
        return {"fd": fd}

    def _ioctl(self, fd: int, request: int, argument: Any = 0) -> int:
        fd = self._fd(fd)
        if fd < 0:
            raise OSError(errno.EBADF, "")
        result = fcntl.ioctl(fd, request, _as_int(argument) if isinstance(argument, int) else argument)
        return result if isinstance(result, int) else 0

    # ---- VMs --------------------------------------------------------------------------------------------------

    def do_create_vm(self, type: int) -> Answer:
        return self._opened(fcntl.ioctl(self.kvm, layouts.KVM_CREATE_VM, _as_int(type)), Vm(type))

    def do_check_extension(self, vm: int, cap: int) -> Answer:
        return {"value": self._ioctl(vm, layouts.KVM_CHECK_EXTENSION, cap)}

    def do_create_vcpu(self, vm: int, id: int) -> Answer:
        fd = self._ioctl(vm, layouts.KVM_CREATE_VCPU, id)
        owner = self.open[vm]
        assert isinstance(owner, Vm)
        run = mapped(self.run_bytes, fd)
        if owner.kind >= Vm.ENCRYPTED:
            return self._opened(fd, Vcpu(run, owner))
        fcntl.ioctl(fd, layouts.KVM_SET_CPUID2, self.cpuid)
        sregs = bytearray(layouts.SREGS_BYTES)
        fcntl.ioctl(fd, layouts.KVM_GET_SREGS, sregs)
        guest.special_registers(sregs)
        fcntl.ioctl(fd, layouts.KVM_SET_SREGS, sregs)
        if not owner.harness:
            size = guest.PAGES * PAGE
            owner.harness = mapped(size, flags=MAP_PRIVATE | MAP_ANONYMOUS)
            image = guest.image()
            ctypes.memmove(owner.harness, image, len(image))
            region = struct.pack(layouts.REGION2, guest.SLOT, 0, guest.BASE, size, owner.harness, 0, 0, *[0] * 15)
            fcntl.ioctl(vm, layouts.KVM_SET_USER_MEMORY_REGION, region[: layouts.REGION_BYTES])
        return self._opened(fd, Vcpu(run, owner))

    def do_create_guest_memfd(self, vm: int, size: int, flags: int) -> Answer:
        wanted = bytearray(struct.pack(layouts.GUEST_MEMFD, size & MASK, flags & MASK, *[0] * 6))
        return self._opened(self._ioctl(vm, layouts.KVM_CREATE_GUEST_MEMFD, wanted), flags)

    def _region(self, slot: int, flags: int, gpa: int, size: int, hva: int, fd: int, offset: int) -> bytes:
        if MOST_BYTES < size < ABSURD_BYTES:
            raise Refused("memslots of more than 1 GiB cost a real kernel memory, whatever is touched")
        meets = gpa < guest.BASE + guest.PAGES * PAGE and gpa + size > guest.BASE
        if slot == guest.SLOT or (0 < size <= MOST_BYTES and meets):
            raise Refused(f"memslot {guest.SLOT} and the memory at {guest.BASE:#x} are the guest's own")
        if flags & 4 and offset & MASK > 1 << 62:
            raise Refused("offsets near 2**63 bind what they must not on 6.18")
        values = (slot & 0xFFFFFFFF, flags & 0xFFFFFFFF, gpa & MASK, size & MASK, hva & MASK, offset & MASK)
        return struct.pack(layouts.REGION2, *values, self._fd(fd) & 0xFFFFFFFF, *[0] * 15)

    def do_set_user_memory_region(self, vm: int, slot: int, flags: int, gpa: int, size: int, hva: int) -> None:
        region = self._region(slot, flags & ~4, gpa, size, hva, -1, 0)
        region = region[:4] + struct.pack("<I", flags & 0xFFFFFFFF) + region[8:]
        self._ioctl(vm, layouts.KVM_SET_USER_MEMORY_REGION, region[: layouts.REGION_BYTES])

    def do_set_user_memory_region2(
        self, vm: int, slot: int, flags: int, gpa: int, size: int, hva: int, fd: int, offset: int
    ) -> None:
        region = self._region(slot, flags, gpa, size, hva, fd, offset)
        self._ioctl(vm, layouts.KVM_SET_USER_MEMORY_REGION2, region)

    def do_get_dirty_log(self, vm: int, slot: int) -> Answer:
        bitmap = (ctypes.c_uint8 * (MOST_BYTES // PAGE // 8 + 8))()
        log = struct.pack(layouts.DIRTY_LOG, slot & 0xFFFFFFFF, 0, ctypes.addressof(bitmap))
        self._ioctl(vm, layouts.KVM_GET_DIRTY_LOG, log)
        found = bytes(bitmap)
        words = (i for i, byte in enumerate(found) if byte)
        return {"dirty": [i * 8 + bit for i in words for bit in range(8) if found[i] >> bit & 1]}

    def do_set_memory_attributes(self, vm: int, gpa: int, size: int, attributes: int, flags: int) -> None:
        wanted = struct.pack(layouts.ATTRIBUTES, gpa & MASK, size & MASK, attributes & MASK, flags & MASK)
        self._ioctl(vm, layouts.KVM_SET_MEMORY_ATTRIBUTES, wanted)

    def do_register_region(self, vm: int, hva: int, size: int) -> None:
        region = struct.pack(layouts.ENC_REGION, hva & MASK, size & MASK)
        self._ioctl(vm, layouts.KVM_MEMORY_ENCRYPT_REG_REGION, region)

    def do_unregister_region(self, vm: int, hva: int, size: int) -> None:
        region = struct.pack(layouts.ENC_REGION, hva & MASK, size & MASK)
        self._ioctl(vm, layouts.KVM_MEMORY_ENCRYPT_UNREG_REGION, region)

    # ---- vCPUs and the guest ----------------------------------------------------------------------------------

    def do_pre_fault_memory(self, vcpu: int, gpa: int, size: int, flags: int) -> Answer:
        wanted = bytearray(struct.pack(layouts.PRE_FAULT, gpa & MASK, size & MASK, flags & MASK, *[0] * 5))
        self._ioctl(vcpu, layouts.KVM_PRE_FAULT_MEMORY, wanted)
        left = struct.unpack_from("<QQ", wanted)
        return {"gpa": left[0], "size": left[1]}

    def do_guest_write(self, vcpu: int, stamp: int, gfns: list[int], private: bool | None) -> Answer:
        return self._run(vcpu, gfns, stamp)[0]

    def do_guest_read(self, vcpu: int, gfns: list[int], private: bool | None) -> Answer:
        answer, seen = self._run(vcpu, gfns, None)
        return answer | {"seen": seen}

    def _run(self, fd: int, gfns: list[int], stamp: int | None) -> tuple[Answer, list[int]]:
        """The guest goes through the pages, as many as fit its list at a time."""
        if gfns[-1] >= guest.REACH >> 12:
            raise Refused("the guest reaches the first 4 GiB only")
        done = 0
        seen: list[int] = []
        while done < len(gfns):
            some = gfns[done : done + guest.LIST_WORDS]
            answer, found = self._enter(fd, some, stamp)
            seen += found
            done += answer["done"]
            if len(answer) > 1 or answer["done"] < len(some):
                return answer | {"done": done}, seen
        return {"done": done}, seen

    def _enter(self, fd: int, gfns: list[int], stamp: int | None) -> tuple[Answer, list[int]]:
        vcpu = self.open.get(fd)
        if not isinstance(vcpu, Vcpu):
            self._ioctl(fd, layouts.KVM_RUN)
            raise OSError(errno.ENOTTY, "")
        if vcpu.vm.kind >= Vm.ENCRYPTED:
            raise Refused(f"the guest of a VM of type {vcpu.vm.kind} would have to be launched first")
        at = vcpu.vm.harness + guest.LIST_PAGE * PAGE
        words = struct.pack(f"<{len(gfns)}I", *gfns)
        ctypes.memmove(at, words, len(words))
        fcntl.ioctl(fd, layouts.KVM_SET_REGS, guest.registers(len(gfns), stamp))
        answer: Answer = {}
        try:
            fcntl.ioctl(fd, layouts.KVM_RUN, 0)
        except OSError as error:
            answer["status"] = errno_name(error.errno or 0)
        regs = bytearray(struct.calcsize(layouts.REGS))
        fcntl.ioctl(fd, layouts.KVM_GET_REGS, regs)
        done = (struct.unpack(layouts.REGS, regs)[layouts.RSI] - guest.LIST) // 4
        reason = layouts.EXITS.get(vcpu.word(layouts.RUN_EXIT_REASON), str(vcpu.word(layouts.RUN_EXIT_REASON)))
        leave = self._exit(vcpu, reason, "status" in answer)
        if leave is not None:
            answer["exit"] = leave
        if reason in ("IO", "MMIO") and "status" not in answer:
            vcpu.finish(fd)
        seen = list(struct.unpack(f"<{done}I", ctypes.string_at(at, done * 4))) if stamp is None else []
        return {"done": done, **answer}, seen

    def _exit(self, vcpu: Vcpu, reason: str, failed: bool) -> Answer | None:
        """The exit as a script's answer has it; None where the guest went through its list."""
        if reason == "MEMORY_FAULT":
            flags, gpa, size = vcpu.union(layouts.MEMORY_FAULT)
            return {"reason": reason, "gpa": gpa, "size": size, "flags": flags}
        if failed:
            return None  # KVM_RUN fills in no other reason beside an errno: what stands there is stale
        if reason == "IO":
            return None
        if reason == "MMIO":
            gpa, _, _, write = vcpu.union(layouts.MMIO)
            return {"reason": reason, "gpa": gpa, "write": bool(write)}
        if reason == "INTERNAL_ERROR":
            return {"reason": reason, "suberror": vcpu.union(layouts.INTERNAL)[0]}
        return {"reason": reason}

    def do_stats(self, fd: int) -> Answer:
        stats = self._ioctl(fd, layouts.KVM_GET_STATS_FD)
        try:
            data = os.pread(stats, 1 << 16, 0)
        finally:
            os.close(stats)
        _, name_size, number, _, descriptors, values = struct.unpack_from(layouts.STATS_HEADER, data)
        found = {}
        step = struct.calcsize(layouts.STATS_DESC) + name_size
        for at in range(descriptors, descriptors + number * step, step):
            _, _, size, offset, _ = struct.unpack_from(layouts.STATS_DESC, data, at)
            name = data[at + struct.calcsize(layouts.STATS_DESC) : at + step].split(b"\0")[0].decode()
            if size == 1:
                found[name] = struct.unpack_from("<Q", data, values + offset)[0]
        return {"stats": found}

    # ---- files ------------------------------------------------------------------------------------------------

    def do_fallocate(self, fd: int, mode: int, offset: int, size: int) -> None:
        if mode == 1 and size > MOST_BYTES and fd in self.open and offset + size <= os.fstat(fd).st_size:
            raise Refused("more than 1 GiB is not allocated at once")
        _checked(_fallocate(self._fd(fd), mode, offset, size))

    def do_fstat(self, fd: int) -> Answer:
        found = os.fstat(self._fd(fd))
        return {"size": found.st_size, "blocks": found.st_blocks}

    def do_read(self, fd: int, size: int) -> Answer:
        return {"bytes": len(os.read(self._fd(fd), min(size, PAGE)))}  # where there is nothing to read, less will do

    def do_write(self, fd: int, size: int) -> Answer:
        return {"bytes": os.write(self._fd(fd), bytes(min(max(size, 0), PAGE)))}

    def do_lseek(self, fd: int, offset: int, whence: int) -> Answer:
        return {"offset": _checked(_lseek(self._fd(fd), offset, whence))}

    def do_ftruncate(self, fd: int, size: int) -> None:
        _checked(_ftruncate(self._fd(fd), size))

    def do_cachestat(self, fd: int) -> Answer:
        return {"allocated": cachestat(self._fd(fd), 0, 0)}

    def do_dup(self, fd: int) -> Answer:
        return self._opened(os.dup(self._fd(fd)), self.open[fd])

    def do_close(self, fd: int) -> None:
        os.close(self._fd(fd))
        what = self.open.pop(fd)
        if isinstance(what, Vcpu) and what not in self.open.values():
            _munmap(what.run, self.run_bytes)

    # ---- memory of the VMM ------------------------------------------------------------------------------------

    def do_mmap(self, fd: int | None, offset: int, size: int, shared: bool) -> Answer:
        flags = (MAP_SHARED if shared and fd is not None else MAP_PRIVATE) | MAP_NORESERVE | MAP_FIXED_NOREPLACE
        if fd is None:
            flags |= MAP_ANONYMOUS
        if MOST_BYTES < size <= TASK_SIZE:
            raise Refused("mappings of more than 1 GiB are not tried")
        at = mapped(size, -1 if fd is None else self._fd(fd), offset, flags, self.next)
        self.next += 2 * GIB
        return {"addr": at}

    def _range(self, addr: int, size: int) -> tuple[int, int]:
        """A range that is the script's, or wraps: anything else could be the driver's own memory."""
        end = addr + max(size, 0) & MASK
        if not ARENA <= addr <= end <= ARENA_END:
            raise Refused(f"{size:#x} bytes at {addr:#x} are not the script's own memory")
        return addr, size & MASK

    def do_munmap(self, addr: int, size: int) -> None:
        _checked(_munmap(*self._range(addr, size)))

    def do_madvise(self, addr: int, size: int) -> None:
        _checked(_madvise(*self._range(addr, size), MADV_DONTNEED))

    def do_mlock(self, addr: int, size: int) -> None:
        _checked(_mlock(*self._range(addr, size)))

    def do_host_write(self, addr: int, stamp: int, pages: int) -> Answer:
        return self._access(addr, pages, stamp)[0]

    def do_host_read(self, addr: int, pages: int) -> Answer:
        answer, seen = self._access(addr, pages, None)
        return answer | {"seen": seen}

    def _access(self, addr: int, pages: int, stamp: int | None) -> tuple[Answer, list[int]]:
        self._range(addr, pages * PAGE)
        done = 0
        seen: list[int] = []
        while done < pages:
            n = min(IOVECS, pages - done)
            if (found := self._transfer(addr + done * PAGE, n, stamp)) is None:
                # The kernel does not say where it stopped: one by one, then.
                n = 1
                if (found := self._transfer(addr + done * PAGE, 1, stamp)) is None:
                    return {"done": done, "status": "EFAULT"}, seen
            seen += found
            done += n
        return {"done": done}, seen

    def _transfer(self, addr: int, n: int, stamp: int | None) -> list[int] | None:
        """The first word of n pages read, or written; by the kernel, which says EFAULT where this process would die."""
        iovecs = (ctypes.c_uint64 * (2 * n))()
        for i in range(n):
            iovecs[2 * i], iovecs[2 * i + 1] = addr + i * PAGE, 4
        where = ctypes.addressof(iovecs)
        reader, writer = self.pipe
        if stamp is not None:
            os.write(writer, struct.pack("<I", stamp) * n)
        moved = _writev(writer, where, n) if stamp is None else _readv(reader, where, n)
        if moved != 4 * n:
            for fd in self.pipe:
                os.close(fd)
            self.pipe = os.pipe()
            return None
        return list(struct.unpack(f"<{n}I", os.read(reader, 4 * n))) if stamp is None else []

    # ---- looking ----------------------------------------------------------------------------------------------

    def state(self, fd: int) -> Answer | None:
        """What stands in the guest_memfd behind a descriptor (`cvmcore.uapiscript.Front`)."""
        flags = self.open.get(fd)
        if not isinstance(flags, int):
            return None
        allocated = cachestat(fd, 0, 0)
        found: Answer = {"allocated": allocated}
        if allocated <= FEW_PAGES:
            runs = self._pages(fd, 0, os.fstat(fd).st_size // PAGE, allocated)
            found["pages"] = runs
            if flags & 3 == 3:
                found["content"] = self._content(fd, runs)
        return found

    def _pages(self, fd: int, start: int, n: int, held: int) -> list[list[int]]:
        """[first, count] of each run of allocated pages, of which there are `held`."""
        if held in (0, n):
            return [[start, n]] if held else []
        half = n // 2
        first = cachestat(fd, start * PAGE, half * PAGE)
        left = self._pages(fd, start, half, first)
        right = self._pages(fd, start + half, n - half, held - first)
        if left and right and sum(left[-1]) == right[0][0]:
            right[0] = [left[-1][0], left.pop()[1] + right[0][1]]
        return left + right

    def _content(self, fd: int, runs: list[list[int]]) -> list[list[int]]:
        """[first, count, stamp] of runs of equal pages; mapped for a moment, so that nothing stays."""
        found: list[list[int]] = []
        for start, n in runs:
            at = mapped(n * PAGE, fd, start * PAGE)
            try:
                for i in range(n):
                    stamp = ctypes.c_uint32.from_address(at + i * PAGE).value
                    if found and found[-1][2] == stamp and found[-1][0] + found[-1][1] == start + i:
                        found[-1][1] += 1
                    elif stamp:
                        found.append([start + i, 1, stamp])
            finally:
                _munmap(at, n * PAGE)
        return found
