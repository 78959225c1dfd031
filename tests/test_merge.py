"""The policy `merge`: which small pages become large again, when, and that nothing is lost on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import MIRROR, PAGE, PROFILE, Box, mirror
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cvmcore.effects import Steps, drain
from cvmcore.errors import InputError
from cvmcore.guest import Machine
from cvmcore.host import Host
from cvmcore.mem.fault import resolve
from cvmcore.mem.tdp import state_of
from cvmcore.pages import run
from cvmcore.sched import Case, Lockdep, explore
from cvmcore.testing.invariants import Checker
from cvmcore.types import KVM_MEM_LOG_DIRTY_PAGES, PG_LEVEL_1G, PG_LEVEL_2M, RetPf, Retry, Use
from cvmcore.vm import Vm

BLOCKS = 4
POLICIES = ("none", "scan", "fault", "block")


def split_all(vm: Vm) -> None:
    """What the start of dirty logging would do to private pages."""
    slot = vm.slots.find(0)
    assert slot is not None
    vm.split_private_pages(slot)


def small(policy: str, backend: Any = MIRROR, **more: Any) -> Box:
    """Four blocks of 2M, all written, then split."""
    box = Box(backend, BLOCKS * 512, backing="2m", policies={"merge": policy}, **more)
    box.touch(run(0, BLOCKS * 512))
    split_all(box.vm)
    assert box.root().leaves[1:3] == [BLOCKS * 512, 0]
    return box


def levels(box: Box) -> list[int]:
    """Of each block."""
    return [box.level(block << 9) for block in range(BLOCKS)]


def intact(box: Box) -> None:
    """Every page holds what was written, the trusted table is what the core thinks, and all is given back."""
    assert box.read(run(0, BLOCKS * 512)) == list(range(1000, 1000 + BLOCKS * 512))
    box.check_mirror()
    box.destroy()


# ---- none and scan ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["none", "fault"])
def test_without_a_thread_nothing_happens_by_itself(policy: str) -> None:
    box = small(policy)

    assert (box.vm.recover_huge_pages(), levels(box)) == (0, [1] * BLOCKS)
    intact(box)
    assert not Box(MIRROR, policies={"merge": policy}).vm.merge.has_thread


def test_scan_merges_what_is_full() -> None:
    """All of it, used or not; not a block with a hole, of two attributes, or on a folio that is no large one."""
    box = small("scan")
    box.punch(5)
    box.set_private(512 + 7, private=False)
    charged = box.host.meter.counts.get("table_scan", 0)

    assert box.vm.recover_huge_pages() == 2

    assert levels(box) == [1, 1, 2, 2]
    assert box.host.meter.counts["table_scan"] == charged + 2  # a mixed block, and one on small folios, are not read
    assert box.vm.merge.merged == 2
    assert box.vm.recover_huge_pages() == 0
    box.check_mirror()


def test_a_pass_goes_on_where_the_last_one_stopped() -> None:
    box = small("scan")

    assert [box.vm.recover_huge_pages(nr) for nr in (1, 2, 9, 9)] == [1, 2, 1, 0]
    assert levels(box) == [2] * BLOCKS
    intact(box)


def test_logged_pages_stay_small() -> None:
    box = small("scan")
    slot = box.vm.slots.find(0)
    slot.flags |= KVM_MEM_LOG_DIRTY_PAGES

    assert (box.vm.recover_huge_pages(), levels(box)) == (0, [1] * BLOCKS)


def test_a_refused_merge_changes_nothing() -> None:
    box = small("scan")
    box.hw.refuse("promote_private_spt", 1, 0, Retry())

    assert box.vm.recover_huge_pages() == BLOCKS - 1
    assert (box.vm.merge.refused, sorted(levels(box))) == (1, [1, 2, 2, 2])
    intact(box)


def test_1g_by_promotion() -> None:
    """With a backend that can, full tables of 2M pages on aligned frames are merged as well, and split again."""
    giant = mirror(zap_destroys_content=True, max_promoted_level=PG_LEVEL_1G)
    box = Box(giant, 1 << 18, backing="2m", nr_frames=(2 << 18) + 1024, policies={"merge": "scan"})
    box.host.frames.alloc((1 << 18) - 1, Use.ANON)
    box.vcpus[0].pre_fault_memory(0, PAGE << 18)
    box.touch(77)

    assert box.vm.recover_huge_pages() == 1

    assert (box.root().leaves[1:4], box.level(77)) == ([0, 0, 1], PG_LEVEL_1G)
    box.set_private(700, private=False)
    assert (box.root().leaves[1:4], box.read(77)) == ([511, 511, 0], [1077])
    box.check_mirror()


# ---- fault --------------------------------------------------------------------------------------------------------


def test_a_fault_that_could_be_large_fills_the_table_and_merges() -> None:
    """A block that was shared as a whole keeps its table; one fault maps all of it, and makes one leaf of it."""
    box = small("fault")
    box.set_private(512, 512, private=False)
    box.set_private(512, 512)
    faults = box.vm.vcpus[0].faults

    box.touch(600)

    assert (levels(box), box.vm.merge.merged) == ([1, 2, 1, 1], 1)
    assert box.vm.vcpus[0].faults == faults + 1
    box.touch(run(512, 512))
    intact(box)


def test_a_fault_that_is_refused_the_merge_is_resolved_all_the_same() -> None:
    box = small("fault")
    box.set_private(512, 512, private=False)
    box.set_private(512, 512)
    box.hw.refuse("promote_private_spt", 1, 0, Retry())

    box.touch(600)

    assert (levels(box), box.vm.merge.refused, box.root().leaves[1]) == ([1, 1, 1, 1], 1, BLOCKS * 512)
    box.touch(run(512, 512))
    intact(box)


ACCEPTING = mirror(zap_destroys_content=True, needs_accept=True, fault_tells_accept_level=True)


def test_a_small_page_that_fills_the_table_is_followed_by_a_merge() -> None:
    """Pages before it are mapped and accepted first; the merge is tried behind the last one. Where the trusted party
    lets it pass, the guest still accepts a small page, and the large one is split again."""
    box = Box(ACCEPTING, 512, backing="2m", policies={"merge": "fault"})
    guest = box.machine.guest
    guest.accept(run(0, 500))
    assert (box.level(0), box.vm.merge.merged) == (1, 0)

    guest.accept(run(500, 12))

    assert (box.level(0), box.vm.merge.merged) == (1, 1)
    assert "split" in [entry[0] for entry in box.hw.trace]


def test_a_block_that_the_slot_does_not_cover_is_never_filled() -> None:
    """One page is missing for good: it is behind the slot."""
    box = Box(ACCEPTING, 512 + 511, backing="2m", policies={"merge": "fault"})

    box.machine.guest.accept(run(512, 511))
    box.vcpus[0].pre_fault_memory(PAGE * 512, PAGE * 511)

    assert (box.root().leaves[1:3], box.vm.merge.merged, box.vm.merge.refused) == ([511, 0], 0, 0)


# ---- block --------------------------------------------------------------------------------------------------------


def test_block_merges_what_is_used() -> None:
    """The thread blocks all full tables with one flush; each is merged by the next access, or not at all."""
    box = small("block")
    box.hw.trace.clear()

    assert box.vm.recover_huge_pages() == BLOCKS

    assert [entry[0] for entry in box.hw.trace] == ["block"]
    assert (levels(box), box.root().blocked, box.root().tables[2]) == ([1] * BLOCKS, BLOCKS, BLOCKS)
    assert state_of(int(box.root().entries[2][0])) == "blocked table"
    box.check_mirror()
    faults = box.vm.vcpus[0].faults
    assert box.read(run(700, 100)) == list(range(1700, 1800))
    assert (levels(box), box.root().blocked, box.vm.vcpus[0].faults - faults) == ([1, 2, 1, 1], BLOCKS - 1, 1)
    assert box.vm.recover_huge_pages() == 0
    intact(box)


def test_what_cannot_be_merged_any_more_is_unblocked() -> None:
    """The trusted party refuses, or there is a hole by now: the access goes on, small."""
    box = small("block")
    box.vm.recover_huge_pages()
    box.hw.refuse("promote_private_spt", 1, 0, Retry())

    assert box.read(5) == [1005]
    assert (levels(box), box.root().blocked, box.vm.merge.refused) == ([1] * BLOCKS, BLOCKS - 1, 1)
    box.punch(512 + 9)
    assert box.root().blocked == BLOCKS - 2
    assert box.read(512) == [1512]
    assert levels(box) == [1] * BLOCKS
    box.touch(512 + 9)
    intact(box)


@pytest.mark.parametrize("change", ["convert", "punch", "delete", "prefault", "nothing"])
def test_what_is_blocked_can_be_changed(change: str) -> None:
    """Whatever takes pages away below a blocked table opens it first."""
    box = small("block")
    box.vm.recover_huge_pages()

    match change:
        case "convert":
            box.set_private(512 - 3, 6, private=False)
            assert box.root().blocked == BLOCKS - 2
        case "punch":
            box.punch(3, 1)
            assert box.root().blocked == BLOCKS - 1
        case "delete":
            box.fd.set_user_memory_region2(0, 4, 0, 0, box.hva, box.gmem, 0)
            assert (box.root().blocked, box.root().leaves[1]) == (0, 0)
        case "prefault":
            box.vcpus[0].pre_fault_memory(PAGE * 512, PAGE * 512)
            assert levels(box) == [1, 2, 1, 1]
    box.check_mirror()
    box.destroy()


def test_a_translation_does_not_outlive_the_block() -> None:
    """What a vCPU had in its TLB is gone: its next access faults, and merges."""
    box = small("block")
    box.read(5)

    box.vm.recover_huge_pages()
    box.read(5)

    assert box.level(5) == PG_LEVEL_2M


def test_a_pass_that_is_stopped() -> None:
    """A table that cannot be blocked ends the pass; those before it are blocked."""
    box = small("block")
    box.hw.refuse("block_private_spt", 1, 2, Retry())

    assert box.vm.recover_huge_pages() == 2
    assert box.root().blocked == 2
    intact(box)


def test_pages_come_back_by_batches_and_one_by_one() -> None:
    """One fault opens a block for all of its pages, however many are asked for at once."""
    whole, single = small("block"), small("block")
    for box in (whole, single):
        box.vm.recover_huge_pages(3)
        box.set_private(600, private=False)
        box.host.meter.counts.clear()
    gfns = [*range(5, 40), *range(512, 600), *range(601, 700), 1030, 1031, 2000]

    whole.touch(np.array(gfns))
    for gfn in gfns:
        single.touch(gfn)

    assert whole.host.meter.counts == single.host.meter.counts
    for level in range(1, 5):
        assert np.array_equal(whole.root().entries[level], single.root().entries[level])
    assert (levels(whole), whole.root().blocked) == ([2, 1, 2, 1], 0)


# ---- all of them --------------------------------------------------------------------------------------------------


steps = st.lists(
    st.one_of(
        st.tuples(st.just("touch"), st.integers(0, 1023), st.integers(1, 20)),
        st.tuples(st.just("share"), st.integers(0, 1023), st.integers(1, 20)),
        st.tuples(st.just("punch"), st.integers(0, 1023), st.integers(1, 20)),
        st.tuples(st.just("recover"), st.integers(1, 3), st.just(0)),
        st.tuples(st.just("split"), st.just(0), st.just(0)),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=15, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(policy=st.sampled_from(POLICIES), accepts=st.booleans(), todo=steps)
def test_batches_mean_pages_and_nothing_is_lost(policy: str, accepts: bool, todo: list[tuple[str, int, int]]) -> None:
    """Two machines, one touched in batches and one page by page, stay alike; every invariant holds all the way."""
    backend = ACCEPTING if accepts else MIRROR
    machines = []
    for _ in range(2):
        host = Host(backend, PROFILE, nr_frames=1 << 12, backing="2m", policies={"merge": policy},
                    drive=Lockdep())  # fmt: skip
        Checker.on(host)
        machines.append(Machine(host, 1024 * PAGE))
        machines[-1].launch()
        machines[-1].guest.write(run(0, 1024))
    for what, a, n in todo:
        gfns = run(a, min(n, 1024 - a)) if what != "recover" else run(0, 1)
        for i, made in enumerate(machines):
            vm, guest = made.vm.vm, made.guest
            match what:
                case "touch":
                    shared = guest.shared[gfns] != 0
                    for private in (True, False):
                        some = np.arange(gfns.start, gfns.stop)[shared != private]
                        for one in [some] if i == 0 else some.reshape(-1, 1):
                            if len(one):
                                guest.write(one, private=private)
                case "share":
                    guest.convert(gfns, bool(a & 1))
                case "punch":
                    made.punch(gfns)
                    guest.accepted[gfns] = guest.written[gfns] = 0
                case "recover":
                    vm.recover_huge_pages(a)
                case "split":
                    split_all(vm)
    whole, single = machines
    assert whole.guest.check() == single.guest.check() == []
    for level in range(1, 5):
        a_words, b_words = (m.vm.vm.tdp.mirror.entries[level] for m in machines)
        assert np.array_equal(a_words, b_words)
    for made in machines:
        made.destroy()
        assert made.leftovers() == []


@pytest.mark.parametrize("policy", ["scan", "block"])
@pytest.mark.parametrize("other", ["touch", "convert", "fault"])
def test_every_order_of_recovery_and_others(policy: str, other: str) -> None:
    """The thread's pass against a vCPU's access, a conversion, and a fault that started before the merge."""

    def setup() -> Case:
        host = Host(MIRROR, PROFILE, nr_frames=1 << 11, backing="2m", policies={"merge": policy})
        checker = Checker.on(host, concurrent=True)
        made = Machine(host, 512 * PAGE, vcpus=2)
        made.launch()
        made.guest.write(run(0, 512))
        split_all(made.vm.vm)
        vm = made.vm.vm
        if other == "fault":
            made.punch(run(9, 1))
            made.guest.written[9] = 0

        def against() -> Steps[None]:
            if other == "touch":
                assert (yield from made.guest.read.steps(run(5, 2), 1))[0]
            elif other == "convert":
                yield from made.guest.convert.steps(run(5, 1), False, 1)
            else:
                fault = yield from resolve(vm, vm.vcpus[1], run(7, 1), True, True, max_level=1)
                assert fault.ret in (RetPf.SPURIOUS, RetPf.RETRY)

        def check(results: list[Any]) -> None:
            assert not [r for r in results if isinstance(r, Exception)]
            checker.check(vm)
            assert made.guest.check() == []

        return Case(host, [("thread", vm.recover_huge_pages.steps()), ("vcpu1", against())], check)

    assert explore(setup, interruptions=2, limit=200).schedules > 3


def test_a_dead_vm_is_left_alone() -> None:
    box = small("scan")
    box.vm.bug("for this test")
    box.hw.trace.clear()

    assert box.vm.recover_huge_pages() == 0
    assert box.hw.trace == []


def test_state_is_said() -> None:
    assert (state_of(2), state_of(3)) == ("blocked table", "table")
    with pytest.raises(InputError, match="'sometimes' is none of none, scan, fault, block"):
        Host(MIRROR, PROFILE, policies={"merge": "sometimes"})
    assert drain(Box(MIRROR).vm.merge.recover(5)) == 0
