"""Small stand-ins for the core (host, VM, memslot, vCPU), so that `ops` is tested alone.

Also makes `sev_helpers` importable: under pytest's importlib mode the tests' folder is not on the path.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from cvmcore.effects import drain
from cvmcore.errors import UapiError
from cvmcore.memory import Memory
from cvmcore.pages import array_of, contiguous, count, expand, run
from cvmcore.types import PG_LEVEL_4K, Batch, Change, Walk
from cvmcore_sev.ops import AmdSev

sys.path.insert(0, str(Path(__file__).parent))

NR_FRAMES = 16 * 512


class FakeMeter:
    """Counts of operations and of charged items."""

    def __init__(self) -> None:
        self.ops: Counter[str] = Counter()
        self.items: Counter[str] = Counter()
        self.elsewhere: Counter[str] = Counter()

    def charge(self, item: str, n: int = 1) -> None:
        self.items[item] += n

    def op(self, name: str, item: str, n: int = 1) -> None:
        self.ops[name] += n
        self.items[item] += n

    def charge_elsewhere(self, item: str, n: int = 1) -> None:
        self.elsewhere[item] += n


class FakeFrames:
    """The lowest free frames, and pins."""

    def __init__(self) -> None:
        self.used = np.zeros(NR_FRAMES, bool)
        self.used[0] = True
        self.pins = np.zeros(NR_FRAMES, np.int64)
        self.leaks: list[tuple[str, list[int]]] = []

    def alloc(self, n: int, use: int, align_order: int = 0) -> Any:
        free = np.flatnonzero(~self.used)[:n]
        if len(free) < n:
            raise UapiError(12, "alloc_pages", "no memory")
        self.used[free] = True
        return contiguous(free)

    def free(self, pfns: Any) -> None:
        assert self.used[pfns].all() and not self.pins[pfns].any()
        self.used[pfns] = False

    def leak(self, pfns: Any, why: str) -> None:
        self.leaks.append((why, array_of(pfns).tolist()))

    def pin(self, pfns: Any, order: int = 0) -> None:
        self.pins[array_of(expand(pfns, order))] += 1

    def unpin(self, pfns: Any, order: int = 0) -> None:
        pages = array_of(expand(pfns, order))
        assert (self.pins[pages] > 0).all()
        self.pins[pages] -= 1


@attrs.define(eq=False)
class FakeHost:
    options: dict[str, Any] = attrs.field(factory=dict)
    nr_cpus: int = 4
    backing_level: int = PG_LEVEL_4K
    nr_frames: int = NR_FRAMES
    memory: Memory = attrs.field(factory=lambda: Memory(NR_FRAMES))
    frames: FakeFrames = attrs.field(factory=FakeFrames)
    meter: FakeMeter = attrs.field(factory=FakeMeter)
    hw: Any = None


@attrs.define(eq=False)
class FakeSlot:
    """Guest memory at gfn `base_gfn`, at frames that the test chooses (`pfns`, one for each page)."""

    base_gfn: int
    npages: int
    hva: int
    pfns: Any
    arch: Any = None
    id: int = 0
    flags: int = 0
    has_gmem: bool = False


@attrs.define(eq=False)
class FakeVcpu:
    vm: Any
    id: int
    arch: Any = None
    state: bytes = b""


@attrs.define(eq=False)
class FakeVm:
    """A VM whose page table is a dict: gfn -> (pfn, level)."""

    host: FakeHost
    vm_type: str
    caps: Any
    options: dict[str, Any] = attrs.field(factory=dict)
    id: int = 0
    arch: Any = None
    key: int = 0
    pre_fault_allowed: bool = True
    vcpus: list[Any] = attrs.field(factory=list)
    slots: list[FakeSlot] = attrs.field(factory=list)
    table: dict[int, tuple[int, int]] = attrs.field(factory=dict)
    bugs: list[str] = attrs.field(factory=list)
    memlock: int = 0
    memlock_limit: int = 1 << 30

    @property
    def dead(self) -> bool:
        return bool(self.bugs)

    def bug(self, why: str) -> None:
        self.bugs.append(why)

    def charge_memlock(self, nr_pages: int, call: str) -> None:
        if nr_pages > 0 and self.memlock + nr_pages > self.memlock_limit:
            raise UapiError(12, call, "RLIMIT_MEMLOCK")
        self.memlock += nr_pages

    def gup_range(self, hva: int, size_bytes: int) -> list[Any]:
        first, last = hva >> 12, (hva + size_bytes - 1) >> 12
        slot = next((s for s in self.slots if s.hva >> 12 <= first and last < (s.hva >> 12) + s.npages), None)
        if slot is None:
            raise UapiError(14, "pin_user_pages", "not mapped")
        low = first - (slot.hva >> 12)
        return [contiguous(array_of(slot.pfns)[low : low + last - first + 1])]

    def map_private(self, batch: Batch) -> Any:
        self.map(batch.gfns, batch.pfns)
        return
        yield

    def map(self, gfns: Any, pfns: Any, level: int = PG_LEVEL_4K) -> None:
        for gfn, pfn in zip(array_of(gfns).tolist(), array_of(pfns).tolist(), strict=True):
            self.table[gfn] = (pfn, level)

    def walk(self, gfns: Any, private: bool) -> tuple[Any, Any, Any]:
        found = [self.table.get(gfn) for gfn in array_of(gfns).tolist()]
        if all(found):
            return int(Walk.OK), contiguous(np.array([f[0] for f in found if f])), found[0][1] if found[0] else 1
        status = np.array([Walk.OK if f else Walk.MISS for f in found], np.uint8)
        return status, np.array([f[0] if f else 0 for f in found], np.int64), 1


class Rig:
    """A host with the backend bound to it. `call` runs a hook to its end, generator or not."""

    def __init__(self, **host: Any) -> None:
        self.vendor = AmdSev()
        self.host = FakeHost(**host)
        self.call("host_init", host=self.host)
        self.hw = self.host.hw
        self.ops, self.items = self.host.meter.ops, self.host.meter.items

    def call(self, hook: str, **arguments: Any) -> Any:
        fn = getattr(self.vendor, hook)
        result = fn(**{name: value for name, value in arguments.items() if name in inspect.signature(fn).parameters})
        return drain(result) if inspect.isgenerator(result) else result

    def vm(self, vm_type: str, vcpus: int = 0, **options: Any) -> FakeVm:
        caps = self.call("capabilities", vm_type=vm_type, options=options)
        vm = FakeVm(self.host, vm_type, caps, options)
        self.call("vm_init", vm=vm)
        for i in range(vcpus):
            vm.vcpus.append(FakeVcpu(vm, i))
            self.call("vcpu_create", vcpu=vm.vcpus[-1])
        return vm

    def slot(self, vm: FakeVm, npages: int = 64, base_gfn: int = 0, pfns: Any = None) -> FakeSlot:
        frames = self.host.frames.alloc(npages, 2) if pfns is None else pfns
        self.host.frames.used[frames] = True
        slot = FakeSlot(base_gfn, npages, 0x7F00_0000_0000 + base_gfn * 4096, frames)
        self.call("memslot_prepare", vm=vm, old=None, new=slot, change=Change.CREATE)
        vm.slots.append(slot)
        return slot

    def batch(self, slot: FakeSlot, gfns: Any, level: int = PG_LEVEL_4K) -> Batch:
        index = array_of(gfns) - slot.base_gfn
        return Batch(slot, level, gfns, contiguous(array_of(slot.pfns)[index], 512 ** (level - 1)))

    def private(self, vm: FakeVm, gfns: Any, pfns: Any, *, order: int = 0, map_level: int = 1, accept: int = 0) -> None:
        """SNP pages as after a fault: prepared, mapped, and validated in pages of level `accept` (0: not)."""
        assert self.call("gmem_prepare", vm=vm, slot=None, gfns=gfns, pfns=pfns, max_order=order) is None
        vm.map(gfns, pfns, map_level)
        if accept:
            step = 512 ** (accept - 1)
            some = run(gfns.start, count(gfns) // step, step) if isinstance(gfns, slice) else gfns
            at = run(pfns.start, count(pfns) // step, step) if isinstance(pfns, slice) else pfns
            access = self.call(
                "guest_accept", vm=vm, vcpu=None, gfns=some, pfns=at, level=accept, map_level=map_level
            )
            assert not np.count_nonzero(access.status)

    def end(self, vm: FakeVm) -> None:
        """Destroy a VM as the core does: vCPUs, context, slots."""
        for vcpu in vm.vcpus:
            self.call("vcpu_free", vcpu=vcpu)
        self.call("vm_destroy", vm=vm)
        for slot in vm.slots:
            self.call("memslot_free", vm=vm, slot=slot)


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def make_rig() -> type[Rig]:
    return Rig


