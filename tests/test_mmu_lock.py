"""The policy `mmu_lock`: what a lock for each GiB covers, that faults heed invalidations under it, and what it buys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import MIRROR, PROFILE
from hypothesis import given, settings
from hypothesis import strategies as st

from cvmcore.backend import Backend
from cvmcore.backends.swprot import SWPROT
from cvmcore.effects import Steps
from cvmcore.errors import InputError
from cvmcore.guest import Machine
from cvmcore.host import Host
from cvmcore.mem.mmulock import NR_SHARDS, Frame, MmuLock, ShardedFrame, ShardedMmuLock, shards_of
from cvmcore.pages import as_sel, run
from cvmcore.sched import Case, Lockdep, Timed, explore
from cvmcore.testing.invariants import Checker
from cvmcore.types import PAGE_BYTES, PG_LEVEL_4K

GIB = 1 << 18
MEM = 4 * GIB * PAGE_BYTES


# ---- which locks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gfns", "shards"), [
    (run(0, 0), []),
    (run(5, 1), [0]),
    (run(GIB - 1, 2), [0, 1]),
    (run(63 * GIB, 2 * GIB), [0, 63]),
    (run(64 * GIB, 1), [0]),
    (run(0, 65 * GIB), list(range(NR_SHARDS))),
    (np.array([3, 7, 2 * GIB, 66 * GIB]), [0, 2]),
])  # fmt: skip
def test_shards(gfns: Any, shards: list[int]) -> None:
    """Ascending, so that nobody waits in a circle."""
    assert list(shards_of(gfns)) == shards
    assert [lock.name for lock in ShardedMmuLock(0).covering(gfns)] == [f"vm0.mmu_lock[{i}]" for i in shards]
    assert len(MmuLock(0).covering(gfns)) == 1


ranges = st.tuples(st.integers(0, 5 * GIB), st.integers(1, GIB)).map(lambda r: (r[0], r[0] + r[1]))


@settings(max_examples=60, deadline=None)
@given(before=st.lists(ranges, max_size=3), after=st.lists(ranges, max_size=3),
       gfns=st.lists(st.integers(0, 6 * GIB), min_size=1, max_size=4, unique=True).map(sorted))  # fmt: skip
def test_a_fault_heeds_what_touches_it(
    before: list[tuple[int, int]], after: list[tuple[int, int]], gfns: list[int]
) -> None:
    """Whatever a shard's frame lets pass, no open range holds; whatever it stops, the frame of one lock stops, too."""
    whole, sharded, sel = Frame(), ShardedFrame(), as_sel(np.array(gfns))
    for span in before:
        whole.add(*span)
        sharded.add(*span)
    assert sharded.blocks(sel) >= any(low <= gfn < high for low, high in before for gfn in gfns)
    assert sharded.blocks(sel) <= whole.blocks(sel)
    seen, seen_whole = sharded.snapshot(sel), whole.snapshot(sel)
    for span in after:
        for frame in (whole, sharded):
            frame.add(*span)
            frame.drop(*span)
    assert sharded.moved(seen, sel) >= any(low <= gfn < high for low, high in after for gfn in gfns)
    assert sharded.moved(seen, sel) <= whole.moved(seen_whole, sel)
    for name in ("seq", "in_progress", "opened"):
        assert getattr(sharded, name) == getattr(whole, name)
    for span in before:
        sharded.drop(*span)
    assert not sharded.blocks(sel)


# ---- what it buys -------------------------------------------------------------------------------------------------


def machine(policy: str, backend: Backend = SWPROT, **more: Any) -> Machine:
    made = Machine(Host(backend, PROFILE, policies={"mmu_lock": policy}, **more), MEM, vcpus=4)
    made.launch()
    return made


def faults_beside_a_hole(policy: str, same_gib: bool) -> tuple[Timed, Machine]:
    """A hole of 512 mapped pages is punched while three vCPUs fault, each at 16 pages one after the other."""
    m = machine(policy)
    m.guest.write(run(0, 512))
    for vcpu in range(1, 4):
        m.guest.write(run((0 if same_gib else vcpu) * GIB + 1024 * vcpu, 1), vcpu)  # tables stand

    def vcpu(i: int) -> Steps[None]:
        for page in range(1, 17):
            yield from m.guest.write.steps(run((0 if same_gib else i) * GIB + 1024 * i + page, 1), i)

    timed = Timed(m.host)
    timed.run([("vmm", m.punch.steps(run(0, 512))), *((f"vcpu{i}", vcpu(i)) for i in range(1, 4))])
    return timed, m


def test_faults_elsewhere_do_not_wait_for_an_invalidation() -> None:
    """In other GiBs a fault neither waits for the lock nor starts again; in the same one it does as before."""
    (whole, a), (sharded, b) = faults_beside_a_hole("rw", False), faults_beside_a_hole("sharded", False)

    waits = {name: stats.wait_ns for name, stats in whole.lock_stats.items() if "mmu_lock" in name}
    assert waits["vm0.mmu_lock"] > 0
    assert all(stats.wait_ns == 0 for name, stats in sharded.lock_stats.items() if "mmu_lock" in name)
    assert sum(vcpu.vcpu.retries for vcpu in a.vcpus) >= sum(vcpu.vcpu.retries for vcpu in b.vcpus) == 0
    done = {t: max(actor.time_ns for actor in t.actors[1:]) for t in (whole, sharded)}
    assert done[sharded] < done[whole]

    near_whole, near_sharded = faults_beside_a_hole("rw", True)[0], faults_beside_a_hole("sharded", True)[0]
    assert near_sharded.elapsed_ns == near_whole.elapsed_ns


def test_conversions_still_wait_for_slots_lock() -> None:
    """KVM_SET_MEMORY_ATTRIBUTES holds slots_lock around all of it: shards do not make conversions parallel."""

    def elapsed(policy: str) -> float:
        m = machine(policy)
        for i in range(4):
            m.guest.write(run(i * GIB, 16), i)
        timed = Timed(m.host)
        timed.run((f"vmm{i}", m.vm.set_memory_attributes.steps(i * GIB * PAGE_BYTES, 16 * PAGE_BYTES, 0))
                  for i in range(4))  # fmt: skip
        assert timed.lock_stats["vm0.slots_lock"].contended == 3
        return timed.elapsed_ns

    assert elapsed("sharded") == elapsed("rw")


# ---- right as before ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [SWPROT, MIRROR], ids=["swprot", "mirror"])
def test_same_result_with_either(backend: Backend) -> None:
    """A day in the life of a VM: the same content, counts and time, with the lock order checked."""
    told = []
    for policy in ("rw", "sharded"):
        m = machine(policy, backend, drive=Lockdep())
        checker = Checker.on(m.host)
        m.guest.write(run(GIB - 300, 600))
        m.guest.convert(run(GIB - 100, 200), False)
        m.guest.write(run(GIB - 50, 100), private=False)
        m.guest.convert(run(GIB - 100, 200), True)
        m.punch(run(GIB - 10, 20))
        checker.check(m.vm.vm)
        m.destroy()
        told.append((dict(m.host.meter.counts), m.host.meter.cpu_ns, m.leftovers()))
    assert told[0] == told[1]


@pytest.mark.slow
@pytest.mark.parametrize("backend", [SWPROT, MIRROR], ids=["swprot", "mirror"])
@pytest.mark.parametrize("hole", [run(GIB, 1), run(GIB - 1, 1)], ids=["same shard", "other shard"])
def test_every_order_of_a_fault_and_a_hole(backend: Backend, hole: Any) -> None:
    """A page is never mapped once its memory is gone, in any order."""

    def make() -> Case:
        host = Host(backend, PROFILE, nr_frames=1 << 10, policies={"mmu_lock": "sharded"})
        checker = Checker.on(host, concurrent=True)
        m = Machine(host, (GIB + 512) * PAGE_BYTES)
        m.launch()
        for gfn in (GIB - 1, GIB, GIB + 1):
            m.guest.write(run(gfn, 1))
        m.set_private(run(GIB, 1), False)
        m.set_private(run(GIB, 1), True)

        def check(results: list[Any]) -> None:
            assert not [r for r in results if isinstance(r, Exception)]
            checker.check(m.vm.vm)
            root = m.vm.vm.tdp.root_for(True)
            inode = m.process.files[m.regions[0].gmem_fd].inode
            assert (root.level_at(GIB) == PG_LEVEL_4K) <= bool(inode.words[GIB])

        return Case(host, [("vcpu", m.guest.read.steps(run(GIB, 1))), ("vmm", m.punch.steps(hole))], check)

    assert explore(make, interruptions=2).schedules > 10


def test_unknown_policy() -> None:
    with pytest.raises(InputError, match="mmu_lock: 'one' is none of rw, sharded"):
        machine("one")
    with pytest.raises(InputError, match="the core has no option 'lock'"):
        Host(SWPROT, PROFILE, policies={"lock": "rw"})
