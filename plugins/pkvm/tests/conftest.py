"""What the tests of this plugin share: a machine with a hypervisor alone, and a small stand-in for the core."""

from __future__ import annotations

import errno
from collections.abc import Generator
from typing import Any

import attrs
import numpy as np
import pytest

from cvmcore.effects import drain
from cvmcore.errors import UapiError
from cvmcore.memory import Memory
from cvmcore.pages import Sel, array_of, run
from cvmcore.types import Batch, HostMode
from cvmcore_pkvm import hw
from cvmcore_pkvm.cost import CHARGES
from cvmcore_pkvm.hw import Hyp, HypVm
from cvmcore_pkvm.ops import PKVM

NR_FRAMES = 4096


class Rig:
    """A machine of 4096 frames and the host that talks to its hypervisor.

    Pages of the tests' guests come from the bottom; what the host gives to EL2 comes from the top.
    """

    def __init__(self, **options: Any) -> None:
        self.memory = Memory(NR_FRAMES)
        self.hyp = Hyp(self.memory, **options)
        self.top = NR_FRAMES
        self.vms: dict[int, list[list[int]]] = {}
        """By handle: the host's memcache of each vCPU."""

    def frames(self, n: int) -> slice:
        self.top -= n
        return run(self.top, n)

    def make_vm(self, *, protected: bool, nr_vcpus: int = 1, spare: int = 64) -> int:
        """A VM whose vCPU i is loaded on CPU 16 * (number of the VM) + i; returns its handle."""
        hyp = self.hyp
        handle = hyp.reserve_vm().answer
        kvm = self.frames(1)
        assert hyp.host_share_hyp(kvm).ok
        memory, pgd = self.frames(hw.vm_pages(nr_vcpus)), self.frames(hw.PGD_PAGES)
        assert hyp.init_vm(handle, protected, nr_vcpus, kvm, memory, pgd).ok
        self.vms[handle] = []
        for index in range(nr_vcpus):
            vcpu, memory = self.frames(1), self.frames(hw.VCPU_PAGES)
            assert hyp.host_share_hyp(vcpu).ok
            memcache = list(range(*self.frames(spare).indices(NR_FRAMES)))
            assert hyp.init_vcpu(handle, index, vcpu, memory, memcache).ok
            self.vms[handle].append(memcache)
            assert hyp.vcpu_load(self.cpu(handle, index), handle, index).ok
        return handle

    @staticmethod
    def cpu(handle: int, index: int = 0) -> int:
        return 16 * (handle - hw.HANDLE_OFFSET) + index

    def vm(self, handle: int) -> HypVm:
        vm = self.hyp.vm_of(handle)
        assert vm is not None
        return vm

    def kill(self, handle: int) -> None:
        """Put the vCPUs of a VM and begin its teardown."""
        for index in range(len(self.vms[handle])):
            self.hyp.vcpu_put(self.cpu(handle, index))
        assert self.hyp.start_teardown_vm(handle).ok

    def snapshot(self) -> dict[str, Any]:
        """Everything that EL2 and the host's memory hold, comparable."""
        hyp = self.hyp
        found: dict[str, Any] = {
            name: getattr(hyp, name).tobytes()
            for name in ("frame", "refcount", "share_count", "owner", "owner_gfn", "host_table")
        }
        found |= {"stamp": self.memory.stamp.tobytes(), "counts": dict(hyp.counts)}
        for vm in hyp.vm_table:
            if isinstance(vm, HypVm):
                stage2 = vm.stage2
                arrays = (stage2.pages, stage2.blocks, *stage2.used)
                found[f"vm {vm.handle:#x}"] = (
                    *(np.trim_zeros(array, "b").tobytes() for array in arrays),
                    stage2.nr_blocks, vm.is_dying, list(vm.tables), list(vm.pool),
                    *((list(v.memcache), list(v.host_memcache), v.cpu) for v in vm.vcpus if v),
                )  # fmt: skip
        return found


@pytest.fixture
def make_rig() -> type[Rig]:
    return Rig


@pytest.fixture
def rig() -> Rig:
    return Rig()


# ---- a stand-in for the core --------------------------------------------------------------------------------------


class FakeMeter:
    """Counts charges; an item that the plugin does not declare is an error."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.ops: dict[str, int] = {}

    def charge(self, item: str, n: int = 1) -> None:
        assert item in CHARGES, item
        if n:
            self.counts[item] = self.counts.get(item, 0) + n

    def op(self, name: str, item: str, n: int = 1) -> None:
        if n:
            self.ops[name] = self.ops.get(name, 0) + n
            self.charge(item, n)


class FakeFrames:
    """Guest memory from the bottom, what EL2 is given from the top; `limit` frames may be given in all."""

    def __init__(self, nr_frames: int, limit: int) -> None:
        self.top, self.left = nr_frames, limit
        self.given: set[int] = set()
        self.pins = np.zeros(nr_frames, np.int64)
        self.leaks: list[int] = []

    def alloc(self, n: int, use: int, align_order: int = 0) -> Sel:
        if n > self.left:
            raise UapiError(errno.ENOMEM, "alloc_pages", "no frames")
        self.left -= n
        self.top -= n
        self.given |= set(range(self.top, self.top + n))
        return run(self.top, n)

    def free(self, pfns: Sel) -> None:
        gone = set(array_of(pfns).tolist())
        assert gone <= self.given
        self.given -= gone
        self.left += len(gone)

    def leak(self, pfns: Sel, why: str) -> None:
        self.leaks += array_of(pfns).tolist()

    def pin(self, pfns: Sel) -> None:
        self.pins[pfns] += 1

    def unpin(self, pfns: Sel) -> None:
        assert (self.pins[pfns] > 0).all()
        self.pins[pfns] -= 1


class FakeHost:
    def __init__(self, options: dict[str, Any], limit: int) -> None:
        self.nr_frames, self.nr_cpus = NR_FRAMES, 4
        self.options = options
        self.memory = Memory(NR_FRAMES)
        self.meter = FakeMeter()
        self.frames = FakeFrames(NR_FRAMES, limit)
        self.hw: Any = None


@attrs.define(eq=False)
class FakeSlot:
    flags: int = 0
    id: int = 0
    base_gfn: int = 0
    npages: int = NR_FRAMES
    hva: int = 0
    arch: Any = None
    has_gmem: bool = False


class FakeVm:
    def __init__(self, host: FakeHost, vm_id: int, memlock_pages: int) -> None:
        self.host, self.id, self.options = host, vm_id, host.options
        self.arch: Any = None
        self.vcpus: list[FakeVcpu] = []
        self.memlock_left = memlock_pages
        self.bugs: list[str] = []

    @property
    def dead(self) -> bool:
        return bool(self.bugs)

    def bug(self, why: str) -> None:
        self.bugs.append(why)

    def charge_memlock(self, nr_pages: int, call: str) -> None:
        if nr_pages > self.memlock_left:
            raise UapiError(errno.ENOMEM, call, "RLIMIT_MEMLOCK")
        self.memlock_left -= nr_pages


@attrs.define(eq=False)
class FakeVcpu:
    vm: FakeVm
    id: int
    arch: Any = None


class Core:
    """The core's order of hook calls, for one VM: what the tests of ops drive."""

    def __init__(self, *, limit: int = 2000, memlock_pages: int = 4096, nr_vcpus: int = 1, **options: Any) -> None:
        declared = {option.name: option.parse(options.get(option.name, option.default)) for option in PKVM.options}
        self.ops: Any = PKVM.make()
        self.host = FakeHost(declared, limit)
        self.ops.host_init(self.host)
        self.slot = FakeSlot()
        self.vm = self.make_vm(memlock_pages, nr_vcpus)
        self.vcpu = self.vm.vcpus[0]

    @property
    def hyp(self) -> Hyp:
        hyp: Hyp = self.host.hw
        return hyp

    def do(self, result: Any) -> Any:
        return drain(result) if isinstance(result, Generator) else result

    def make_vm(self, memlock_pages: int = 4096, nr_vcpus: int = 1, vm_id: int = 0) -> FakeVm:
        vm = FakeVm(self.host, vm_id, memlock_pages)
        self.do(self.ops.vm_init(vm))
        for i in range(nr_vcpus):
            vcpu = FakeVcpu(vm, i)
            self.do(self.ops.vcpu_create(vcpu))
            vm.vcpus.append(vcpu)
        return vm

    def batch(self, gfns: Sel, pfns: Sel, level: int = 1) -> Batch:
        return Batch(self.slot, level, gfns, pfns)

    def fault(self, gfns: Sel, pfns: Sel, level: int = 1, vcpu: FakeVcpu | None = None) -> tuple[int, Any]:
        """Pages mapped, and why it stopped there (None: it did not)."""
        vcpu = vcpu or self.vcpu
        self.do(self.ops.vcpu_enter(vcpu))
        stopped = self.do(self.ops.topup(vcpu.vm, vcpu))
        if stopped is not None:
            return 0, stopped.reason
        batch = self.batch(gfns, pfns, level)
        reason = None
        if self.ops.capabilities(self.vm.options).needs_pin:
            stopped = self.do(self.ops.pin_pfn(vcpu.vm, vcpu, batch))
            if stopped is not None:
                batch, reason = batch.part(0, stopped.done), stopped.reason
        done = len(batch)
        stopped = self.do(self.ops.set_private_spte(vcpu.vm, vcpu, batch)) if done else None
        if stopped is not None:
            done, reason = stopped.done, stopped.reason
        if done < len(batch):
            self.ops.unpin_pfn(vcpu.vm, batch.part(done, len(batch)))
        return done, reason

    def access(self, gfns: Sel, write: bool = True) -> Any:
        return self.ops.guest_access(self.vm, self.vcpu, gfns, write)

    def convert(self, gfns: Sel, private: bool, begun: int = 0, faults: int = 0) -> Any:
        return self.do(self.ops.guest_convert(self.vm, self.vcpu, gfns, private, begun, faults))

    def host_access(self, pfns: Sel, mode: HostMode) -> Any:
        return self.do(self.ops.host_access(self.host, pfns, mode))

    def destroy(self, mapped: list[Batch], vm: FakeVm | None = None) -> None:
        vm = vm or self.vm
        self.do(self.ops.vm_pre_destroy(vm))
        for vcpu in vm.vcpus:
            self.ops.vcpu_free(vcpu)
        for batch in mapped:
            self.do(self.ops.remove_private_spte(vm, batch))
        self.do(self.ops.vm_destroy(vm))


@pytest.fixture
def make_core() -> type[Core]:
    return Core
