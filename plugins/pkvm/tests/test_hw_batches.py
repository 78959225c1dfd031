"""A batch means the same as its pages one by one, and nothing the host or the guests do leads to an illegal state."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvmcore.errors import InvariantViolation
from cvmcore.pages import array_of, as_sel, part, run, sort_unique
from cvmcore_pkvm.errors import Errno
from cvmcore_pkvm.hw import Prot, Result

NR = 1536  # frames and gfns that the tests play with: three tables' worth
SETTINGS = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Few enough pages that operations meet, around the edges of three tables.
pages = st.one_of(st.integers(0, 20), st.integers(500, 524), st.integers(1020, 1028))
runs = st.builds(run, pages, st.one_of(st.integers(1, 24), st.integers(500, 508)))
scattered = st.lists(pages, min_size=1, max_size=24).map(sort_unique)
sels = st.one_of(runs, scattered)


def frames_for(n: int, start: int, order: str) -> Any:
    """n distinct frames below NR: ascending from a start, or the same in another order."""
    frames = (np.arange(n) + start) % NR
    if order == "down":
        frames = frames[::-1].copy()
    if order == "mixed":
        frames = np.roll(frames, n // 2)
    return as_sel(frames) if order == "up" and start + n <= NR else frames.astype(np.int64)


class World:
    """A rig with two protected VMs and one np VM, and calls on it by name."""

    def __init__(self, make_rig: Any, spare: int = 24) -> None:
        self.rig = make_rig()
        self.pvms = [self.rig.make_vm(protected=True, spare=spare) for _ in range(2)]
        self.np = self.rig.make_vm(protected=False, spare=spare)
        self.dying = False

    def call(self, op: str, *args: Any) -> Result:
        result: Result = getattr(self, op)(*args)
        return result

    def donate(self, which: int, gfns: Any, pfns: Any, touched: bool) -> Result:
        return self.rig.hyp.host_donate_guest(self.rig.cpu(self.pvms[which]), pfns, gfns, touched)

    def share(self, which: int, gfns: Any) -> Result:
        return self.rig.hyp.guest_share_host(self.rig.cpu(self.pvms[which]), gfns)

    def unshare(self, which: int, gfns: Any) -> Result:
        return self.rig.hyp.guest_unshare_host(self.rig.cpu(self.pvms[which]), gfns)

    def force(self, which: int, pfns: Any) -> Result:
        return self.rig.hyp.host_force_reclaim(pfns)

    def touch(self, which: int, pfns: Any) -> Result:
        return self.rig.hyp.handle_host_mem_abort(pfns)

    def share_hyp(self, which: int, pfns: Any) -> Result:
        return self.rig.hyp.host_share_hyp(pfns)

    def unshare_hyp(self, which: int, pfns: Any) -> Result:
        return self.rig.hyp.host_unshare_hyp(pfns)

    def reclaim(self, which: int, gfns: Any) -> Result:
        if not self.dying:
            self.rig.kill(self.pvms[0])
            self.dying = True
        return self.rig.hyp.host_reclaim_guest(self.pvms[0], gfns)

    def np_share(self, which: int, gfns: Any, pfns: Any, touched: bool) -> Result:
        return self.rig.hyp.host_share_guest(self.rig.cpu(self.np), pfns, gfns, 1, Prot.RWX)

    def np_unshare(self, which: int, gfns: Any) -> Result:
        return self.rig.hyp.host_unshare_guest(self.np, gfns, 1)

    def relax(self, which: int, gfns: Any) -> Result:
        return self.rig.hyp.relax_perms(self.rig.cpu(self.np), gfns, Prot.W)

    def wrprotect(self, which: int, gfns: Any) -> Result:
        return self.rig.hyp.wrprotect(self.np, gfns, 1)

    def old(self, which: int, gfns: Any) -> Result:
        return self.rig.hyp.test_clear_young(self.np, gfns, 1, True)

    def young(self, which: int, gfns: Any) -> Result:
        return self.rig.hyp.mkyoung(self.rig.cpu(self.np), gfns)


MAPPING = ("donate", "np_share")
OTHERS = ("share", "unshare", "force", "touch", "share_hyp", "unshare_hyp", "np_unshare", "relax", "wrprotect", "old",
          "young", "reclaim")  # fmt: skip
calls = st.one_of(
    st.tuples(
        st.sampled_from(MAPPING),
        st.integers(0, 1),
        sels,
        pages,
        st.sampled_from(["up", "down", "mixed"]),
        st.booleans(),
    ),
    st.tuples(st.sampled_from(OTHERS), st.integers(0, 1), sels),
)
histories = st.lists(calls, min_size=1, max_size=12)


def arguments(call: Any) -> tuple[Any, ...]:
    op, which, sel, *rest = call
    if not rest:
        return op, which, sel
    start, order, touched = rest
    return op, which, sel, frames_for(len(array_of(sel)), start, order), touched


def one_by_one(world: World, op: str, which: int, sel: Any, pfns: Any = None, *rest: Any) -> Result:
    """The same pages, each in a call of its own, up to the first failure."""
    for i in range(len(array_of(sel))):
        more = () if pfns is None else (part(pfns, i, i + 1), *rest)
        result = world.call(op, which, part(sel, i, i + 1), *more)
        if not result.ok:
            return Result(result.status, i)
    return Result(Errno.OK, len(array_of(sel)))


@SETTINGS
@given(history=histories, spare=st.sampled_from([0, 1, 2, 3, 4, 24]))
def test_batch_equals_one_by_one(make_rig: Any, history: list[Any], spare: int) -> None:
    """States, counts, content, memcaches, and the first failure: all the same, also when table pages run out."""
    batched, single = World(make_rig, spare), World(make_rig, spare)
    for call in history:
        op, which, *rest = arguments(call)
        if op == "reclaim" and not single.dying:
            single.rig.kill(single.pvms[0])
            single.dying = True
        in_batch = batched.call(op, which, *rest)
        alone = one_by_one(single, op, which, *rest)
        assert (in_batch.status, in_batch.done) == (alone.status, alone.done)
        assert batched.rig.snapshot() == single.rig.snapshot()
    batched.rig.hyp.check_legal()


@SETTINGS
@given(history=histories, start=pages, gfns=runs)
def test_random_histories_stay_legal(make_rig: Any, history: list[Any], start: int, gfns: Any) -> None:
    """After every step all states go together, and content is where it was unless a page was destroyed or cleared."""
    world = World(make_rig)
    hyp, memory = world.rig.hyp, world.rig.memory
    memory.stamp[:NR] = np.arange(1, NR + 1)
    n = len(array_of(gfns))
    frames = frames_for(n, start, "up")
    always: list[Any] = [  # chance alone rarely comes to these one after the other
        ("donate", 0, gfns, frames, True), ("share", 0, gfns), ("unshare", 0, part(gfns, 0, n // 2 + 1)),
        ("force", 0, part(frames, 0, 1)),
    ]  # fmt: skip
    for op, which, *rest in itertools.chain(always, map(arguments, history)):
        before = memory.stamp.copy()
        private = hyp.frame[:NR] & 0x33 == 0x03
        world.call(op, which, *rest)
        hyp.check_legal()
        now_private = hyp.frame[:NR] & 0x33 == 0x03
        released = np.flatnonzero(private & ~now_private & (hyp.frame[:NR] & 0x33 == 0))
        expected = before[:NR].copy()
        expected[released] = 0
        assert memory.stamp[:NR].tolist() == expected.tolist()


@SETTINGS
@given(history=st.lists(st.tuples(st.sampled_from(["share", "unshare", "pin", "unpin", "donate", "return", "ffa"]),
                                  st.integers(0, 60), st.integers(1, 12)), max_size=30))  # fmt: skip
def test_hyp_and_ffa_stay_legal(make_rig: Any, history: list[tuple[str, int, int]]) -> None:
    """Host, hyp and the FF-A proxy (which keeps its contract) at random."""
    rig = make_rig()
    hyp, lent, pinned = rig.hyp, [], []
    for op, pfn, nr in history:
        if op == "share":
            hyp.host_share_hyp(run(pfn, nr))
        elif op == "unshare":
            hyp.host_unshare_hyp(run(pfn, nr))
        elif op == "pin" and hyp.hyp_pin(pfn, nr).ok:
            pinned.append((pfn, nr))
        elif op == "unpin" and pinned:
            hyp.hyp_unpin(*pinned.pop())
        elif op == "donate":
            hyp.host_donate_hyp(pfn, nr)
        elif op == "return":
            hyp.hyp_donate_host(pfn, nr)
        elif op == "ffa":
            if lent and pfn % 2:
                hyp.ffa_mem_reclaim(lent.pop())
            elif hyp.ffa_mem_share([(pfn, nr), (pfn + 20, nr)]).name == "SUCCESS":
                lent.append([(pfn, nr), (pfn + 20, nr)])
        hyp.check_legal()
    for ranges in lent:
        assert hyp.ffa_mem_reclaim(ranges).name == "SUCCESS"
    hyp.check_legal()


@SETTINGS
@given(gfns=sels, probe=sels)
def test_walk_tells_the_truth(make_rig: Any, gfns: Any, probe: Any) -> None:
    """guest_access gives the frame that was donated, page by page, and MISS elsewhere."""
    rig = make_rig()
    pvm = rig.make_vm(protected=True)
    n = len(array_of(gfns))
    pfns = frames_for(n, 3, "up")
    assert rig.hyp.host_donate_guest(rig.cpu(pvm), pfns, gfns).ok
    truth = dict(zip(array_of(gfns).tolist(), array_of(pfns).tolist(), strict=True))

    access = rig.hyp.guest_access(rig.cpu(pvm), probe, write=True)

    asked = array_of(probe).tolist()
    status = np.broadcast_to(access.status, len(asked))
    assert [bool(s == 0) for s in status] == [gfn in truth for gfn in asked]
    if (status == 0).any():
        found = array_of(access.pfns)
        assert [int(p) for p, s in zip(found, status, strict=True) if s == 0] == [truth[g] for g in asked if g in truth]


def test_empty_batches(make_rig: Any) -> None:
    """A batch of nothing does nothing and succeeds."""
    for design in ("global", "per-vm", "per-range"):
        rig = make_rig(hyp_lock=design)
        hyp, pvm, np_vm = rig.hyp, rig.make_vm(protected=True), rig.make_vm(protected=False)
        cpu, np_cpu, none = rig.cpu(pvm), rig.cpu(np_vm), run(0, 0)
        results = [
            hyp.host_share_hyp(none), hyp.host_unshare_hyp(none), hyp.host_donate_guest(cpu, none, none),
            hyp.guest_share_host(cpu, none), hyp.guest_unshare_host(cpu, none), hyp.host_force_reclaim(none),
            hyp.host_share_guest(np_cpu, none, none, 1, 7), hyp.host_unshare_guest(np_vm, none, 1),
            hyp.relax_perms(np_cpu, none, 2), hyp.mkyoung(np_cpu, none), hyp.wrprotect(np_vm, none, 512),
            hyp.test_clear_young(np_vm, none, 1, True), hyp.handle_host_mem_abort(none),
        ]  # fmt: skip
        rig.kill(pvm)
        results.append(hyp.host_reclaim_guest(pvm, none))

        assert [(result.status, result.done) for result in results] == [(Errno.OK, 0)] * len(results)
        hyp.check_legal()


def test_same_frame_twice(make_rig: Any) -> None:
    """The second donation of one frame within a batch fails as it would alone."""
    rig = make_rig()
    cpu = rig.cpu(rig.make_vm(protected=True))

    result = rig.hyp.host_donate_guest(cpu, np.array([5, 6, 5, 7]), run(0, 4))

    assert (result.status, result.done) == (Errno.EPERM, 2)
    rig.hyp.check_legal()


@pytest.mark.parametrize(
    "break_it",
    [
        lambda rig, vm: rig.hyp.frame.__setitem__(100, 0x00),
        lambda rig, vm: rig.hyp.frame.__setitem__(100, 0x02),
        lambda rig, vm: rig.hyp.owner_gfn.__setitem__(100, 8),
        lambda rig, vm: rig.hyp.owner.__setitem__(100, 1),
        lambda rig, vm: vm.stage2.pages.__setitem__(8, 100 << 5 | 2),
        lambda rig, vm: vm.stage2.pages.__setitem__(7, 0),
        lambda rig, vm: vm.stage2.pages.__setitem__(7, 100 << 5 | 3),
        lambda rig, vm: rig.hyp.share_count.__setitem__(50, 1),
        lambda rig, vm: rig.hyp.refcount.__setitem__(50, 1),
        lambda rig, vm: rig.hyp.frame.__setitem__(vm.tables[0], 0),
        lambda rig, vm: rig.hyp.frame.__setitem__(50, 0x31),
    ],
)
def test_the_check_sees_what_is_wrong(make_rig: Any, break_it: Any) -> None:
    """check_legal is not blind: each single corruption of a legal machine is found."""
    rig = make_rig()
    pvm = rig.make_vm(protected=True)
    assert rig.hyp.host_donate_guest(rig.cpu(pvm), run(100, 1), run(7, 1)).ok
    rig.hyp.check_legal()

    break_it(rig, rig.vm(pvm))

    with pytest.raises(InvariantViolation):
        rig.hyp.check_legal()


def calls_of_a_guest(rig: Any, cpu: int, gfns: list[int], batch: int) -> tuple[int, int, int]:
    """Pages shared, calls made, and the page that ends it (or 0), for a guest that asks for `batch` pages each time."""
    words = rig.hyp.loaded[cpu].vm.stage2.pages
    done, calls = 0, 0
    while done < len(gfns):
        calls += 1
        size = 0
        for i, gfn in enumerate(gfns[done : done + batch]):
            if i and (gfn != gfns[done + i - 1] + 1 or gfn % 512 == 0):
                break
            if gfn >= len(words) or words[gfn] & 31 != 2:  # not this guest's alone
                return done, calls, done + i
            if i and words[gfn] >> 5 != (words[gfn - 1] >> 5) + 1:
                break
            size += 1
        done += size
    return done, calls, 0


@SETTINGS
@given(mapped=st.lists(st.tuples(runs, pages), min_size=1, max_size=4), shared=scattered, gfns=sels,
       batch=st.sampled_from([1, 2, 3, 7, 16, 512]))  # fmt: skip
def test_range_calls_equal_a_guests_loop(
    make_rig: Any, mapped: list[Any], shared: Any, gfns: Any, batch: int
) -> None:
    """MEM_SHARE of whatever is there: as many pages and calls as one call after the other, and the same page fails."""
    rig = make_rig()
    cpu = rig.cpu(rig.make_vm(protected=True))
    for named, start in mapped:
        rig.hyp.host_donate_guest(cpu, frames_for(len(array_of(named)), start, "up"), named)
    rig.hyp.guest_share_host(cpu, shared)
    expected = calls_of_a_guest(rig, cpu, array_of(gfns).tolist(), batch)
    before = rig.hyp.loaded[cpu].vm.stage2.pages.copy()

    result = rig.hyp.mem_share(cpu, gfns, batch)

    assert (result.done, result.calls, result.at) == expected
    now = rig.hyp.loaded[cpu].vm.stage2.pages[: len(before)]
    assert np.flatnonzero(now != before).tolist() == array_of(gfns)[: result.done].tolist()
    rig.hyp.check_legal()
