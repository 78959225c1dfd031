"""A small machine with a TDX module, and a TD brought up to any point of its life."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cvmcore.backend import parse_options
from cvmcore.cost import COMMON, load_profile
from cvmcore.effects import BUSY, Effect, drain
from cvmcore.errors import UapiError
from cvmcore.memory import Memory
from cvmcore.pages import Sel, array_of, contiguous, count, run
from cvmcore.types import Batch, Use
from cvmcore_tdx.errors import describe
from cvmcore_tdx.hw import NR_TDCX, NR_TDVPX, OpState, PageType, SeptState, Td, TdxModule
from cvmcore_tdx.ops import TDX

NR_FRAMES = 1 << 15
HKID = 65
NEAR = 1 << 13
"""Tests look at this many entries of each level, unless they say otherwise."""


class World:
    """A module and one TD. Control pages and tables come from the upper half of the frames, guest pages from below."""

    def __init__(self, nr_frames: int = NR_FRAMES, **options: Any) -> None:
        self.memory = Memory(nr_frames)
        self.module = TdxModule(self.memory, nr_frames, **options)
        self.next_control = nr_frames // 2
        self.near = NEAR
        self.tdr = -1
        self.tdvprs: list[int] = []

    def control(self, n: int = 1) -> int:
        self.next_control += n
        return self.next_control - n

    @property
    def td(self) -> Td:
        return self.module.td(self.tdr)

    def create(self, hkid: int = HKID) -> World:
        """MNG.CREATE, KEY.CONFIG, ADDCX."""
        m = self.module
        self.tdr = self.control()
        self.ok(m.tdh_mng_create(self.tdr, hkid))
        for package in m.packages:
            self.ok(m.tdh_mng_key_config(self.tdr, package))
        for _ in range(NR_TDCX):
            self.ok(m.tdh_mng_addcx(self.tdr, self.control()))
        return self

    def init(self, hkid: int = HKID, **params: int) -> World:
        """... and MNG.INIT."""
        self.create(hkid)
        self.ok(self.module.tdh_mng_init(self.tdr, **params))
        return self

    def vcpu(self) -> int:
        tdvpr = self.control()
        self.ok(self.module.tdh_vp_create(self.tdr, tdvpr))
        for _ in range(NR_TDVPX - 1):
            self.ok(self.module.tdh_vp_addcx(tdvpr, self.control()))
        self.ok(self.module.tdh_vp_init(tdvpr))
        self.tdvprs.append(tdvpr)
        return tdvpr

    def tables(self, gfn: int, down_to: int = 1) -> None:
        """Tables above `gfn`, so that entries at level down_to - 1 can be reached."""
        td = self.td
        for level in range(td.root_level, down_to - 1, -1):
            head = gfn >> 9 * level << 9 * level
            if self.entry(level, head)[0] is SeptState.FREE:
                self.done(self.module.tdh_mem_sept_add(self.tdr, level, run(head, 1), run(self.control(), 1)), 1)

    def build(self, gfn: int = 0, nr_vcpus: int = 1) -> World:
        """A TD in build: one vCPU, tables down to the 4K entries of the block of gfn."""
        self.init()
        for _ in range(nr_vcpus):
            self.vcpu()
        self.tables(gfn)
        return self

    def run(self, gfn: int = 0, nr_vcpus: int = 1) -> World:
        """A TD that can run."""
        self.build(gfn, nr_vcpus)
        self.ok(self.module.tdh_mr_finalize(self.tdr))
        return self

    def aug(self, gfns: Sel, pfns: Sel, level: int = 0) -> None:
        self.done(self.module.tdh_mem_page_aug(self.tdr, level, gfns, pfns), count(gfns))

    def accept(self, gfns: Sel, level: int = 0) -> None:
        assert self.module.tdg_mem_page_accept(self.tdr, level, gfns).outcome == 0

    def map(self, gfns: Sel, pfns: Sel, level: int = 0) -> None:
        """AUG and ACCEPT."""
        self.aug(gfns, pfns, level)
        self.accept(gfns, level)

    def block(self, gfns: Sel, level: int = 0) -> None:
        self.done(self.module.tdh_mem_range_block(self.tdr, level, gfns), count(gfns))

    def track(self) -> None:
        self.done(self.module.tdh_mem_track(self.tdr), 1)

    def end(self) -> World:
        """Release the key: the TD is in teardown."""
        m = self.module
        for tdvpr in self.tdvprs:
            self.ok(m.tdh_vp_flush(tdvpr))
        self.ok(m.tdh_mng_vpflushdone(self.tdr))
        for package in m.packages:
            self.ok(m.tdh_phymem_cache_wb(package))
        self.ok(m.tdh_mng_key_freeid(self.tdr))
        return self

    def plant(self, level: int, gfn: int, state: SeptState, pfn: int) -> None:
        """Put an entry into a state behind the module's back, with the PAMT as it would be."""
        td, m = self.td, self.module
        table = td.table(level, gfn >> 9 * level)
        index = gfn >> 9 * level
        table[index] = 0 if state in (SeptState.FREE,) else pfn << 5 | state
        if state is SeptState.REMOVED:
            table[index] = state
        if state in (SeptState.FREE, SeptState.REMOVED):
            return
        is_table = state >= 24
        unit = 0 if is_table else level
        m.pamt[unit][pfn >> 9 * unit] = td.number << 4 | (PageType.PT_EPT if is_table else PageType.PT_REG)
        td.nr_children += 1 << 9 * unit
        if unit:
            m.nr_large[unit] += 1
        if level >= 2 and state is SeptState.NL_BLOCKED:
            td.blocked_tables += 1

    def snapshot(self) -> tuple[object, ...]:
        """All state that a leaf could change, to be compared."""
        m = self.module
        tds = []
        for number, td in sorted(m.tds.items()):
            sept = tuple(words[: self.near].tobytes().rstrip(b"\0") for words in td.sept)
            vps = tuple((v.tdvpr, v.nr_pages, v.initialized, v.associated, v.inside, v.epoch) for v in td.vps)
            digest = td.hash.hexdigest() if td.hash is not None else ""
            tds.append((
                number, td.life_cycle, td.op_state, td.fatal, td.nr_children, td.nr_tdcx, td.blocked_tables,
                td.epoch, tuple(td.refcount), td.mrtd, digest, sept, vps,
            ))  # fmt: skip
        pamt = tuple(entries.tobytes() for entries in m.pamt)
        return (
            tuple(tds), pamt, tuple(m.nr_large), tuple(sorted(m.kot)), self.memory.stamp.tobytes(),
            self.memory.key.tobytes(),
        )  # fmt: skip

    # ---- looking at it ----

    @staticmethod
    def ok(status: int) -> None:
        assert status == 0, describe(status)

    @staticmethod
    def done(result: Any, n: int) -> None:
        assert (result.done, describe(result.status)) == (n, "TDX_SUCCESS")

    def entry(self, level: int, gfn: int) -> tuple[SeptState, int]:
        """State and frame of an entry, read behind the module's back."""
        words = self.td.sept[level]
        index = gfn >> 9 * level
        word = int(words[index]) if index < len(words) else 0
        return SeptState(word & 31), word >> 5

    def check(self) -> None:
        """What holds after any leaf: the tree is a tree, and Secure EPT, PAMT and counters say the same."""
        m = self.module
        owned = [np.zeros(len(entries), np.uint16) for entries in m.pamt]
        for td in m.tds.values():
            children = 0
            for level, table in enumerate(td.sept):
                words = table[: self.near]
                index = np.flatnonzero(words)
                states = words[index] & 31
                pfns = (words[index] >> 5).astype(np.int64)
                tables = states >= 24
                leaves = ~tables & (states != SeptState.REMOVED)
                assert level or not tables.any(), "a table at the 4K level"
                if level < td.root_level:
                    above = td.sept[level + 1][index >> 9]
                    assert ((above & 31) >= 24).all(), "an entry below what is no table"
                assert (pfns[leaves] & ((1 << 9 * level) - 1) == 0).all(), "a large page on an unaligned frame"
                for unit, chosen, kind in ((0, tables, PageType.PT_EPT), (level, leaves, PageType.PT_REG)):
                    units = pfns[chosen] >> 9 * unit
                    assert len(np.unique(units)) == len(units), "a frame in two entries"
                    if len(units):
                        assert (owned[unit][units] == 0).all(), "a frame in two entries"
                        owned[unit][units] = td.number << 4 | kind
                    children += len(units) << 9 * unit
            blocked = sum(int((w & 31 == SeptState.NL_BLOCKED).sum()) for w in (t[: self.near] for t in td.sept[2:]))
            assert td.blocked_tables == blocked
            assert sum(td.refcount) == sum(vp.inside for vp in td.vps)
            own = (m.pamt[0] >> 4 == td.number) & np.isin(m.pamt[0] & 15, (PageType.PT_TDCX, PageType.PT_TDVPR))
            assert td.nr_children == children + int(own.sum())
            if td.op_state is not OpState.UNINITIALIZED:
                assert td.nr_tdcx == NR_TDCX
        for level, expected in enumerate(owned):
            kinds = m.pamt[level] & 15
            memory = np.where(np.isin(kinds, (PageType.PT_REG, PageType.PT_EPT)), m.pamt[level], 0)
            alive = np.isin(m.pamt[level] >> 4, list(m.tds))
            np.testing.assert_array_equal(np.where(alive, memory, 0), expected)
            if level:
                assert m.nr_large[level] == np.count_nonzero(m.pamt[level])


@pytest.fixture
def world() -> World:
    """A module, and no TD yet."""
    return World()


@pytest.fixture
def new_world() -> type[World]:
    """To make a world of one's own: other options, or several."""
    return World


# ---- the core, as small as the hooks need it -------------------------------------------------------------------


class FakeMeter:
    def __init__(self, prices: dict[str, float]) -> None:
        self.prices = prices
        self.counts: Counter[str] = Counter()
        self.ops: Counter[str] = Counter()
        self.ns = 0.0

    def charge(self, item: str, n: int = 1) -> None:
        self.counts[item] += n
        self.ns += self.prices[item] * n

    def op(self, name: str, item: str, n: int = 1) -> None:
        self.ops[name] += n
        self.charge(item, n)

    charge_elsewhere = charge


class FakeFrames:
    """Frames from the top for structures and tables, from the middle for the rest; tests pick theirs from below."""

    def __init__(self, nr_frames: int) -> None:
        self.low, self.high = nr_frames // 2, nr_frames
        self.used: set[int] = set()
        self.leaks: list[tuple[str, list[int]]] = []
        self.limit: int | None = None

    def alloc(self, n: int, use: int, align_order: int = 0) -> Sel:
        if self.limit is not None and len(self.used) + n > self.limit:
            raise UapiError(errno.ENOMEM, "alloc_pages", "no memory")
        if use in (Use.META, Use.TABLE):
            self.high -= n
            start = self.high
        else:
            start = -(-self.low // (1 << align_order)) << align_order
            self.low = start + n
        self.used |= set(range(start, start + n))
        return run(start, n)

    def free(self, pfns: Sel) -> None:
        pages = set(array_of(pfns).tolist())
        assert pages <= self.used, "a frame is freed twice"
        self.used -= pages

    def leak(self, pfns: Sel, why: str) -> None:
        self.leaks.append((why, array_of(pfns).tolist()))
        self.used -= set(array_of(pfns).tolist())


class FakeHost:
    def __init__(self, prices: dict[str, float], nr_frames: int, options: dict[str, Any]) -> None:
        self.nr_frames, self.nr_cpus, self.options = nr_frames, 4, options
        self.memory = Memory(nr_frames)
        self.frames = FakeFrames(nr_frames)
        self.meter = FakeMeter(prices)
        self.hw: Any = None


class FakeVcpu:
    def __init__(self, vm: FakeVm, number: int) -> None:
        self.vm, self.id, self.arch = vm, number, None
        self.in_guest = False


class FakeVm:
    """A VM that maps what it is told to; `hooks` is the backend's object."""

    def __init__(self, host: FakeHost, hooks: Any, number: int = 0) -> None:
        self.host, self.hooks, self.id, self.vm_type, self.options = host, hooks, number, "tdx", host.options
        self.caps = hooks.capabilities(host.options)
        self.arch: Any = None
        self.key = 0
        self.pre_fault_allowed = True
        self.vcpus: list[FakeVcpu] = []
        self.slots: Any = None
        self.dead = False
        self.why: list[str] = []
        self.kicks = 0
        self.tables: dict[tuple[int, int], int] = {}
        self.leaves: dict[tuple[int, int], int] = {}

    def bug(self, why: str) -> None:
        self.dead = True
        self.why.append(why)
        self.kick_all_vcpus()

    def kick_all_vcpus(self) -> None:
        self.kicks += 1
        for vcpu in self.vcpus:
            if vcpu.in_guest:
                vcpu.in_guest = False
                self.hooks.vcpu_exit(vcpu)

    # what the core does, for tests

    def add_vcpu(self) -> FakeVcpu:
        vcpu = FakeVcpu(self, len(self.vcpus))
        drain(self.hooks.vcpu_create(vcpu))
        self.vcpus.append(vcpu)
        return vcpu

    def enter(self, i: int = 0) -> None:
        drain(self.hooks.vcpu_enter(self.vcpus[i]))
        self.vcpus[i].in_guest = True

    def link(self, gfns: Sel, level: int) -> None:
        """Tables above pages of a level."""
        for above in range(4, level, -1):
            order = 9 * (above - 1)
            for block in np.unique(array_of(gfns) >> order).tolist():
                if (above, block) not in self.tables:
                    table = self.host.frames.alloc(1, Use.TABLE)
                    stopped = drain(self.hooks.link_private_spt(self, run(block << order, 1), above, table))
                    assert stopped is None
                    self.tables[above, block] = table.start

    def batch(self, gfns: Sel, pfns: Sel, level: int = 1) -> Batch:
        return Batch(None, level, gfns, pfns)  # type: ignore[arg-type]

    def map_private(self, batch: Batch) -> Any:
        self.link(batch.gfns, batch.level)
        stopped = yield from self.hooks.set_private_spte(self, batch)
        if stopped is not None:
            raise UapiError(errno.EIO, "kvm_tdp_mmu_map_private_pfn", "could not be mapped")
        self._note(batch)

    def fault(self, gfns: Sel, pfns: Sel, level: int = 1) -> None:
        """Map pages on demand."""
        batch = self.batch(gfns, pfns, level)
        self.link(gfns, level)
        assert drain(self.hooks.set_private_spte(self, batch)) is None
        self._note(batch)

    def _note(self, batch: Batch) -> None:
        for gfn, pfn in zip(array_of(batch.gfns).tolist(), array_of(batch.pfns).tolist(), strict=True):
            self.leaves[batch.level, gfn] = pfn

    def accept(self, gfns: Sel, level: int = 1) -> Any:
        return drain(self.hooks.guest_accept(self, gfns, level)).status

    def zap(self, gfns: Sel, level: int = 1) -> None:
        found = [self.leaves.pop((level, gfn)) for gfn in array_of(gfns).tolist()]
        pfns = contiguous(np.array(found), 512 ** (level - 1))
        drain(self.hooks.remove_private_spte(self, self.batch(gfns, pfns, level)))

    def destroy(self) -> None:
        """In the core's order: leaves, key, vCPUs, tables bottom-up, the rest."""
        for level in (1, 2):
            gfns = sorted(gfn for at, gfn in self.leaves if at == level)
            if gfns:
                self.zap(contiguous(np.array(gfns), 512 ** (level - 1)), level)
        drain(self.hooks.vm_pre_destroy(self))
        for vcpu in self.vcpus:
            drain(self.hooks.vcpu_free(vcpu))
        for level in (2, 3, 4):
            tables = sorted(pfn for (at, _), pfn in self.tables.items() if at == level)
            if tables:
                self.host.frames.free(drain(self.hooks.free_private_spt(self, contiguous(np.array(tables)))))
        drain(self.hooks.vm_destroy(self))


def drive_busy(steps: Any, *effects: Effect, times: int = 1) -> Any:
    """Run an operation; each of the effects finds its lock taken, so many times."""
    left = dict.fromkeys(map(id, effects), times)
    answer = None
    try:
        while True:
            effect = steps.send(answer)
            busy = left.get(id(effect), 0)
            left[id(effect)] = busy - 1
            answer = BUSY if busy > 0 else None
    except StopIteration as stop:
        return stop.value


@pytest.fixture
def new_vm() -> Callable[..., FakeVm]:
    """A VM of a host of its own, with vCPUs, launched unless told otherwise."""

    def make(vcpus: int = 1, launched: bool = True, nr_frames: int = NR_FRAMES, **options: Any) -> FakeVm:
        profile = load_profile(TDX.profile, required=COMMON | TDX.charges, resolve=lambda name: TDX.profile)
        parsed = parse_options(TDX.options, {name: str(value) for name, value in options.items()}, "backend tdx")
        host = FakeHost(profile.ns_by_item(), nr_frames, parsed)
        hooks = TDX.make()
        hooks.host_init(host)  # type: ignore[attr-defined]
        vm = FakeVm(host, hooks)
        drain(vm.hooks.vm_init(vm))
        for _ in range(vcpus):
            vm.add_vcpu()
        if launched:
            drain(vm.hooks.launch_finish(vm))
        host.meter.ops.clear()
        host.meter.counts.clear()
        host.meter.ns = 0
        return vm

    return make


@pytest.fixture
def busy() -> Callable[..., Any]:
    """Runs an operation while somebody else holds locks."""
    return drive_busy
