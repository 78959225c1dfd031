"""The front of a UAPI script (`cvmcore.uapiscript`) that is the model: one process on one host."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from cvmcore.errors import InputError, UapiError, errno_name
from cvmcore.hookspecs import HOOKS
from cvmcore.host import Host
from cvmcore.mem.gmem import UPTODATE, GmemFile
from cvmcore.memory import ZERO
from cvmcore.observers import FaultInjector
from cvmcore.pages import array_of, as_sel
from cvmcore.plugins import load_backend
from cvmcore.runner import load_profile_for
from cvmcore.types import (
    GUEST_MEMFD_FLAG_MMAP,
    PAGE_BYTES,
    ExitReason,
    Fatal,
    GuestException,
    HostVerdict,
    MapGpaRange,
    MemoryFault,
    Mmio,
    Retry,
    Shutdown,
    Stopped,
)
from cvmcore.uapi import Accept, Convert, Process, Touch, VcpuFd, VmFd
from cvmcore.uapiscript import Answer, runs_of
from cvmcore.vcpu import Action

FEW_PAGES = 4096
"""So many allocated pages of a file are compared one by one; of more only their number."""


def model_fronts(
    backend: str, *, kernel: str = "6.18", backing: str = "4k", options: dict[str, str] | None = None,
    policies: dict[str, str] | None = None, observers: Iterable[object] = (),
) -> Callable[[], ModelFront]:  # fmt: skip
    """What makes fronts, each on a fresh host, by the backend's name. Raises InputError, PluginError."""
    chosen = load_backend(backend)
    profile = load_profile_for(chosen, None)

    def make() -> ModelFront:
        return ModelFront(
            Host(
                chosen, profile, kernel=kernel, backing=backing, options=options, policies=policies,
                observers=observers,
            )
        )  # fmt: skip

    return make


def model_front(backend: str, **how: Any) -> ModelFront:
    """One front on a fresh host; as `model_fronts`."""
    return model_fronts(backend, **how)()


class ModelFront:
    """A VMM's process on a modelled host. VMs live until the last descriptor of them and of their vCPUs is closed."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.process = Process(host)
        self.open: dict[int, VmFd | VcpuFd | GmemFile] = {}
        """What is behind each descriptor."""
        self.holders: Counter[VmFd] = Counter()
        """Descriptors of each VM and of its vCPUs."""
        self._failing: FaultInjector | None = None

    def call(self, op: str, arguments: dict[str, Any]) -> Answer:
        """Do one call on the model (`cvmcore.uapiscript.Front`)."""
        do: Callable[..., Answer | None] = getattr(self, "_" + op)
        try:
            return {"status": "OK", **(do(**arguments) or {})}
        except UapiError as error:
            return {"status": errno_name(error.errno), "why": error.why}

    def state(self, fd: int) -> dict[str, Any] | None:
        """What stands in the guest_memfd behind a descriptor."""
        file = self.open.get(fd)
        if not isinstance(file, GmemFile):
            return None
        inode = file.inode
        found: dict[str, Any] = {"allocated": inode.allocated}
        if inode.allocated <= FEW_PAGES:
            pages = np.flatnonzero(inode.words) if inode.allocated else np.zeros(0, np.int64)
            first = np.flatnonzero(np.diff(pages, prepend=-2) != 1)
            lengths = np.diff(first, append=len(pages))
            found["pages"] = [[int(pages[at]), int(n)] for at, n in zip(first, lengths, strict=True)]
            if inode.flags & GUEST_MEMFD_FLAG_MMAP and inode.init_shared:
                words = inode.words[pages]
                stamps = np.where(words & UPTODATE, self.host.memory.stamp[words >> 5], ZERO)
                found["content"] = contents_of(pages.tolist(), stamps.tolist())
        return found

    def close(self) -> None:
        """The process ends; another may begin on the same host."""
        self.process.exit()
        self.process = Process(self.host)
        self.open.clear()
        self.holders.clear()

    def behind(self, vcpu: int) -> dict[int, int]:
        """By gfn, the stamps of memory that stands behind the hva of a guest_memfd slot without being its file, where
        the host maps it: what the vCPU's guest has no business to see."""
        what = self.open.get(vcpu)
        found: dict[int, int] = {}
        for slot in what.vcpu.vm.slots if isinstance(what, VcpuFd) else ():
            if not slot.gmem_only or slot.gmem is None:
                continue
            for mapping, pages in self.process.mm.ranges(slot.hva_page, slot.npages):
                index = array_of(pages) - mapping.start
                words = mapping.words
                if mapping.gmem is not None:
                    if mapping.gmem.inode is slot.gmem.inode and (
                        mapping.pgoff - mapping.start == slot.gmem_pgoff - slot.hva_page
                    ):
                        continue
                    index = index + mapping.pgoff
                    words = mapping.gmem.inode.words
                index = index[index < len(words)]
                held = index[words[index] != 0]
                gfns = held - index[0] + array_of(pages)[0] - slot.hva_page + slot.base_gfn if len(index) else held
                found |= zip(gfns.tolist(), self.host.memory.stamp[words[held] >> 5].tolist(), strict=True)
        return found

    def unwritten(self, vm: int, slot: int) -> set[int]:
        """Pages of a VM's memslot that stand in anonymous memory and hold zeros."""
        what = self.open.get(vm)
        found = what.vm.slots.by_id.get(slot) if isinstance(what, VmFd) else None
        pages: set[int] = set()
        for mapping, hva_pages in self.process.mm.ranges(found.hva_page, found.npages) if found is not None else ():
            if mapping.gmem is None:
                at = array_of(hva_pages)
                stamps = self.host.memory.stamp[mapping.words[at - mapping.start] >> 5]
                pages |= set((at[stamps == ZERO] - found.hva_page).tolist()) if found is not None else set()
        return pages

    # ---- descriptors ------------------------------------------------------------------------------------------

    def _install(self, what: VmFd | VcpuFd) -> Answer:
        fd = self.process.new_fd()
        self.open[fd] = what
        self.holders[what if isinstance(what, VmFd) else what.vm] += 1
        return {"fd": fd}

    def _vm_at(self, fd: int, call: str) -> VmFd:
        what = self._at(fd, call)
        if not isinstance(what, VmFd):
            # kvm_arch_vcpu_ioctl has another word for what it does not know than all else has.
            error = errno.EINVAL if isinstance(what, VcpuFd) else errno.ENOTTY
            raise UapiError(error, call, f"descriptor {fd} is not a VM's")
        return what

    def _vcpu_at(self, fd: int, call: str) -> VcpuFd:
        what = self._at(fd, call)
        if not isinstance(what, VcpuFd):
            raise UapiError(errno.ENOTTY, call, f"descriptor {fd} is not a vCPU's")
        return what

    def _at(self, fd: int, call: str) -> VmFd | VcpuFd | GmemFile:
        if fd not in self.open:
            raise UapiError(errno.EBADF, call, f"descriptor {fd} is not open")
        return self.open[fd]

    def _dup(self, fd: int) -> Answer:
        what = self._at(fd, "dup")
        if not isinstance(what, GmemFile):
            return self._install(what)
        new = self.process.dup(fd)
        self.open[new] = what
        return {"fd": new}

    def _close(self, fd: int) -> None:
        what = self._at(fd, "close")
        del self.open[fd]
        if isinstance(what, GmemFile):
            self.process.close(fd)
            return
        self.process.other_fds.discard(fd)
        vm = what if isinstance(what, VmFd) else what.vm
        self.holders[vm] -= 1
        if self.holders[vm] == 0:
            vm.close()

    # ---- VMs --------------------------------------------------------------------------------------------------

    def _create_vm(self, type: int | None) -> Answer:
        if type is not None and type != self.host.backend.kvm_type:
            raise UapiError(errno.EINVAL, "KVM_CREATE_VM", f"backend {self.host.backend.name} has no VM type {type}")
        return self._install(self.process.create_vm())

    def _check_extension(self, vm: int, cap: int) -> Answer:
        target = self._vm_at(vm, "KVM_CHECK_EXTENSION")
        if cap not in (known := target.extensions()):
            raise InputError(f"the model knows nothing of capability {cap}, but of {', '.join(map(str, known))}")
        return {"value": target.check_extension(cap)}

    def _create_vcpu(self, vm: int, id: int) -> Answer:
        return self._install(self._vm_at(vm, "KVM_CREATE_VCPU").create_vcpu(id))

    def _create_guest_memfd(self, vm: int, size: int, flags: int) -> Answer:
        fd = self._vm_at(vm, "KVM_CREATE_GUEST_MEMFD").create_guest_memfd(size, flags)
        self.open[fd] = self.process.files[fd]
        return {"fd": fd}

    def _set_user_memory_region(self, vm: int, slot: int, flags: int, gpa: int, size: int, hva: int) -> None:
        self._vm_at(vm, "KVM_SET_USER_MEMORY_REGION").set_user_memory_region(slot, flags, gpa, size, hva)

    def _set_user_memory_region2(
        self, vm: int, slot: int, flags: int, gpa: int, size: int, hva: int, fd: int, offset: int
    ) -> None:
        target = self._vm_at(vm, "KVM_SET_USER_MEMORY_REGION2")
        target.set_user_memory_region2(slot, flags, gpa, size, hva, fd, offset)

    def _get_dirty_log(self, vm: int, slot: int) -> Answer:
        log = self._vm_at(vm, "KVM_GET_DIRTY_LOG").get_dirty_log(slot)
        return {"dirty": np.flatnonzero(log).tolist()}

    def _set_memory_attributes(self, vm: int, gpa: int, size: int, attributes: int, flags: int) -> None:
        self._vm_at(vm, "KVM_SET_MEMORY_ATTRIBUTES").set_memory_attributes(gpa, size, attributes, flags)

    def _memory_encrypt_op(self, vm: int, command: str, arguments: dict[str, Any]) -> Answer:
        told = self._vm_at(vm, "KVM_MEMORY_ENCRYPT_OP").memory_encrypt_op(command, arguments) or {}
        fields = {name: f"hex:{value.hex()}" if isinstance(value, bytes) else value for name, value in told.items()}
        return {"fields": fields} if fields else {}

    def _register_region(self, vm: int, hva: int, size: int) -> None:
        self._vm_at(vm, "KVM_MEMORY_ENCRYPT_REG_REGION").register_region(hva, size)

    def _unregister_region(self, vm: int, hva: int, size: int) -> None:
        self._vm_at(vm, "KVM_MEMORY_ENCRYPT_UNREG_REGION").unregister_region(hva, size)

    def _launch_update(self, vm: int, gpa: int, contents: list[bytes], kind: str) -> Answer:
        return {"done": self._vm_at(vm, "launch_update").launch_update(gpa, contents, kind)}

    def _launch_finish(self, vm: int) -> None:
        self._vm_at(vm, "launch_finish").launch_finish()

    # ---- vCPUs and the guest ----------------------------------------------------------------------------------

    def _pre_fault_memory(self, vcpu: int, gpa: int, size: int, flags: int) -> Answer:
        left = self._vcpu_at(vcpu, "KVM_PRE_FAULT_MEMORY").pre_fault_memory(gpa, size, flags)
        return {"gpa": left[0], "size": left[1]}

    def _guest_write(self, vcpu: int, stamp: int, gfns: range | list[int], private: bool | None) -> Answer:
        return self._touch(vcpu, gfns, private, stamp)

    def _guest_read(self, vcpu: int, gfns: range | list[int], private: bool | None) -> Answer:
        return self._touch(vcpu, gfns, private, None)

    def _touch(self, vcpu: int, gfns: range | list[int], private: bool | None, stamp: int | None) -> Answer:
        at = self._vcpu_at(vcpu, "KVM_RUN")
        caps = at.vcpu.vm.caps
        if private is None:
            private = caps.confidential
            if caps.private_by_attribute:
                words = at.vcpu.vm.attributes.words
                private = gfns[0] < len(words) and bool(words[gfns[0]])
        action = Touch(_sel(gfns), write=stamp is not None, private=private, stamps=stamp or 0)
        answer = self._run(at, action)
        if stamp is None:
            seen = [] if action.seen is None else action.seen[: action.done].tolist()
            answer["seen"] = runs_of(seen)
        return answer

    def _guest_accept(self, vcpu: int, gfns: range | list[int], level: int) -> Answer:
        step = 512 ** (level - 1)
        if any(gfn % step for gfn in gfns):
            raise InputError(f"guest_accept: a page of level {level} begins at a multiple of {step} gfns")
        return self._run(self._vcpu_at(vcpu, "KVM_RUN"), Accept(_sel(gfns, step), level=level))

    def _guest_convert(self, vcpu: int, gfns: range | list[int], private: bool) -> Answer:
        return self._run(self._vcpu_at(vcpu, "KVM_RUN"), Convert(_sel(gfns), private=private))

    def _run(self, vcpu: VcpuFd, action: Action) -> Answer:
        """KVM_RUN. A memory fault and what ends a vCPU for good come with an errno."""
        leave = vcpu.run(action)
        answer: Answer = {"done": action.done}
        if isinstance(leave, MemoryFault | Shutdown):
            answer["status"] = errno_name(leave.errno)
        if isinstance(leave, Shutdown):
            answer["why"] = leave.why
        elif leave is not None:
            answer["exit"] = exit_record(leave)
        return answer

    def _stats(self, fd: int) -> Answer:
        what = self._at(fd, "KVM_GET_STATS_FD")
        if isinstance(what, VcpuFd):
            vcpu = what.vcpu
            return {"stats": {"pf_fixed": vcpu.faults, "exits": vcpu.exits, "retries": vcpu.retries}}
        if isinstance(what, VmFd):
            return {"stats": {"pages": sum(f.inode.allocated for f in what.vm.gmem_files)}}
        raise UapiError(errno.ENOTTY, "KVM_GET_STATS_FD", f"descriptor {fd} is a file's")

    def _fail_next(self, hook: str, error: int) -> None:
        answer: object = UapiError(error, hook, "told to") if error else None
        if hook and HOOKS[hook].kind == "install":
            answer = Stopped(0, Fatal(error) if error else Retry())
        if self._failing is None:
            self._failing = FaultInjector("", 1, None)
            self.host.ops.observe(self._failing)
        self._failing.hook, self._failing.seen, self._failing.answer = hook, 0, answer

    # ---- files ------------------------------------------------------------------------------------------------

    def _file_at(self, fd: int, call: str) -> GmemFile:
        what = self._at(fd, call)
        if not isinstance(what, GmemFile):
            raise InputError(f"{call}: the model knows this call for a guest_memfd only")
        return what

    def _fallocate(self, fd: int, mode: int, offset: int, size: int) -> None:
        self._file_at(fd, "fallocate")
        self.process.fallocate(fd, mode, offset, size)

    def _fstat(self, fd: int) -> Answer:
        return {"size": self._file_at(fd, "fstat").inode.npages * PAGE_BYTES, "blocks": 0}

    def _read(self, fd: int, size: int) -> None:
        self._refuse(fd, "read", errno.EINVAL)

    def _write(self, fd: int, size: int) -> None:
        self._refuse(fd, "write", errno.EINVAL)

    def _lseek(self, fd: int, offset: int, whence: int) -> None:
        self._refuse(fd, "lseek", errno.ESPIPE if 0 <= whence <= 4 else errno.EINVAL)

    def _ftruncate(self, fd: int, size: int) -> None:
        if size < 0:
            raise UapiError(errno.EINVAL, "ftruncate", "the size is negative")
        self._refuse(fd, "ftruncate", errno.EINVAL)

    def _refuse(self, fd: int, call: str, error: int) -> None:
        """A guest_memfd has no such file operation (virt/kvm/guest_memfd.c: kvm_gmem_fops, kvm_gmem_setattr)."""
        self._file_at(fd, call)
        raise UapiError(error, call, "a guest_memfd has no such operation")

    def _cachestat(self, fd: int) -> Answer:
        return {"allocated": self._file_at(fd, "cachestat").inode.allocated}

    def _memory_failure(self, fd: int, offset: int) -> None:
        self.process.memory_failure(fd, offset)

    # ---- memory of the VMM ------------------------------------------------------------------------------------

    def _mmap(self, fd: int | None, offset: int, size: int, shared: bool) -> Answer:
        if fd is None:
            return {"addr": self.process.mmap(size)}
        if fd in self.open:
            self._file_at(fd, "mmap")
        return {"addr": self.process.mmap_gmem(fd, offset, size, shared)}

    def _munmap(self, addr: int, size: int) -> None:
        self.process.munmap(addr, size)

    def _madvise(self, addr: int, size: int) -> None:
        self.process.madvise_dontneed(addr, size)

    def _mlock(self, addr: int, size: int) -> None:
        self.process.mlock(addr, size)

    def _migrate_pages(self, addr: int, size: int) -> Answer:
        return {"moved": self.process.migrate_pages(addr, size)}

    def _host_write(self, addr: int, stamp: int, pages: int) -> Answer:
        return self._access(addr, pages, lambda at, n: (self.process.write(at, stamp, n), []))[0]

    def _host_read(self, addr: int, pages: int) -> Answer:
        def read(at: int, n: int) -> tuple[HostVerdict, list[int]]:
            verdict, stamps = self.process.read(at, n)
            return verdict, stamps.tolist()

        answer, seen = self._access(addr, pages, read)
        return answer | {"seen": runs_of(seen)}

    def _access(
        self, addr: int, pages: int, access: Callable[[int, int], tuple[HostVerdict, list[int]]]
    ) -> tuple[Answer, list[int]]:
        """An access, in order, up to the first page that cannot be touched."""
        seen: list[int] = []
        done = 0
        for at, n in self.process.touchable(addr, pages):
            verdict, stamps = access(at, n)
            if verdict is not HostVerdict.OK:
                return {"done": done, "verdict": verdict.name}, seen + stamps
            seen += stamps
            done += n
        answer: Answer = {"done": done}
        if done < pages:
            answer |= {"status": "EFAULT", "why": "nothing is mapped, or the file ends, or its memory is not shared"}
        return answer, seen


def contents_of(pages: list[int], stamps: list[int]) -> list[list[int]]:
    """[first, count, stamp] of each run of pages that hold the same stamp, zeros left out."""
    runs: list[list[int]] = []
    for page, stamp in zip(pages, stamps, strict=True):
        if runs and runs[-1][2] == stamp and runs[-1][0] + runs[-1][1] == page:
            runs[-1][1] += 1
        elif stamp:
            runs.append([page, 1, stamp])
    return runs


def exit_record(leave: ExitReason) -> dict[str, Any]:
    """An exit as a script's answer has it."""
    match leave:
        case MemoryFault(gpa, flags, size_bytes, _):
            return {"reason": "MEMORY_FAULT", "gpa": gpa, "size": size_bytes, "flags": flags}
        case Mmio(gpa, write):
            return {"reason": "MMIO", "gpa": gpa, "write": write}
        case MapGpaRange(gfns, private, _):
            at = array_of(gfns)
            whole = len(at) == at[-1] - at[0] + 1
            where = {"gpa": int(at[0]) << 12, "pages": len(at)} if whole else {"gfns": at.tolist()}
            return {"reason": "MAP_GPA_RANGE", **where, "private": private}
        case GuestException(gfn, why):
            return {"reason": "EXCEPTION", "gpa": gfn << 12, "why": why}
        case Shutdown(_, why):
            return {"reason": "SHUTDOWN", "why": why}


def _sel(gfns: range | list[int], step: int = 1) -> Any:
    if isinstance(gfns, range):
        return slice(gfns.start, gfns.stop, 1)
    if step > 1 and len(gfns) == 1:
        return slice(gfns[0], gfns[0] + step, step)
    return as_sel(np.array(gfns, np.int64))
