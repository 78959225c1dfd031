"""Large pages after a split, with KVM and the module together: the policy `merge` on a TD."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cvmcore.guest import Machine
from cvmcore.host import Host
from cvmcore.pages import run
from cvmcore.runner import load_profile_for
from cvmcore.sched import Lockdep
from cvmcore.testing.invariants import Checker
from cvmcore.types import PAGE_BYTES, Use
from cvmcore_tdx.hw import SeptState
from cvmcore_tdx.ops import TDX

BLOCKS = 4
N = BLOCKS * 512


def td(merge: str, **options: str) -> Machine:
    """A TD with all of its memory written, in pages of 2M."""
    host = Host(
        TDX, load_profile_for(TDX, None), nr_frames=1 << 13, backing="2m",
        options={"page_aug": "2m", **options}, policies={"merge": merge}, drive=Lockdep(),
    )  # fmt: skip
    Checker.on(host)
    machine = Machine(host, N * PAGE_BYTES, vcpus=2)
    machine.launch()
    machine.guest.write(run(0, N))
    return machine


def leaves(machine: Machine) -> list[int]:
    """4K, 2M and 1G leaves."""
    root = machine.vm.vm.tdp.mirror
    assert root is not None
    return root.leaves[1:4]


def ops(machine: Machine) -> dict[str, int]:
    """Leaves of the host called since the last time, without their prefix."""
    counted = {
        name.removeprefix("TDH.").removeprefix("MEM."): n
        for name, n in machine.host.meter.ops.items() if name.startswith("TDH.") and n
    }  # fmt: skip
    machine.host.meter.ops.clear()
    return counted


def split(machine: Machine) -> None:
    slot = machine.vm.vm.slots.find(0)
    assert slot is not None
    machine.vm.vm.split_private_pages(slot)
    assert leaves(machine)[1:] == [0, 0]
    ops(machine)


def end(machine: Machine) -> None:
    """Nothing is lost, and nothing left behind."""
    assert machine.guest.check() == []
    assert not machine.vm.vm.dead
    machine.destroy()
    assert machine.leftovers() == []


def test_scan() -> None:
    """Four calls and a kick for each table, and its page is flushed."""
    machine = td("scan")
    split(machine)

    assert machine.vm.vm.recover_huge_pages() == BLOCKS

    assert leaves(machine) == [0, BLOCKS, 0]
    assert ops(machine) == {
        "RANGE.BLOCK": BLOCKS, "TRACK": BLOCKS, "PAGE.PROMOTE": BLOCKS, "PHYMEM.PAGE.WBINVD": BLOCKS,
    }  # fmt: skip
    end(machine)


def test_block() -> None:
    """One TRACK for all tables; the guest's EPT violation leads to PROMOTE, without another one."""
    machine = td("block")
    split(machine)

    assert machine.vm.vm.recover_huge_pages() == BLOCKS

    assert ops(machine) == {"RANGE.BLOCK": BLOCKS, "TRACK": 1}
    module, tdr = machine.host.hw, machine.vm.vm.arch.tdr
    states = Counter(module.sept_words(tdr, 1, run(0, BLOCKS, 512)) & np.uint32(31))
    assert states == {SeptState.NL_BLOCKED: BLOCKS}
    machine.guest.read(run(600, 30))
    assert (leaves(machine), ops(machine)) == ([N - 512, 1, 0], {"PAGE.PROMOTE": 1, "PHYMEM.PAGE.WBINVD": 1})
    end(machine)


def test_pages_that_are_not_accepted_stop_a_merge() -> None:
    """KVM cannot know it: PROMOTE refuses, the table is unblocked, and the guest goes on."""
    machine = td("block")
    split(machine)
    machine.punch(run(600, 2))
    machine.guest.written[600:602] = machine.guest.accepted[600:602] = 0
    machine.vcpus[0].pre_fault_memory(600 << 12, 2 << 12)
    assert leaves(machine) == [N, 0, 0]
    ops(machine)

    assert machine.vm.vm.recover_huge_pages() == BLOCKS - 1  # the hole was filled with small pages of other frames
    machine.guest.convert(run(5, 1), False)
    machine.guest.convert(run(5, 1), True)
    machine.vcpus[0].pre_fault_memory(5 << 12, 1 << 12)
    ops(machine)
    assert machine.vm.vm.recover_huge_pages() == 1
    machine.guest.read(run(7, 1))

    assert leaves(machine) == [N, 0, 0]
    assert ops(machine) == {"RANGE.BLOCK": 1, "TRACK": 1, "PAGE.PROMOTE": 1, "RANGE.UNBLOCK": 1}
    assert machine.vm.vm.merge.refused == 1
    end(machine)


def test_a_small_accept_that_fills_a_table_is_no_time_to_merge() -> None:
    """Option B: the page that was just mapped is pending, the others are not, so the module always refuses."""
    machine = td("fault")
    machine.guest.convert(run(100, 16), False)
    machine.guest.convert(run(100, 16), True)
    ops(machine)

    machine.guest.write(run(100, 16))

    assert leaves(machine) == [512, BLOCKS - 1, 0]
    assert ops(machine) == {
        "PAGE.AUG": 16, "RANGE.BLOCK": 1, "TRACK": 1, "PAGE.PROMOTE": 1, "RANGE.UNBLOCK": 1,
    }  # fmt: skip
    end(machine)


def test_a_fault_that_could_be_large_fills_and_merges() -> None:
    """Option B where nobody says that the page is to be small: all 512 pending, so PROMOTE succeeds."""
    machine = td("fault")
    split(machine)
    machine.guest.convert(run(512, 512), False)
    machine.guest.convert(run(512, 512), True)
    ops(machine)

    machine.vcpus[0].pre_fault_memory(512 << 12, 1 << 12)

    assert leaves(machine) == [N - 512, 1, 0]
    assert ops(machine) == {"PAGE.AUG": 512, "RANGE.BLOCK": 1, "TRACK": 1, "PAGE.PROMOTE": 1, "PHYMEM.PAGE.WBINVD": 1}
    machine.guest.write(run(512, 512))
    end(machine)


@pytest.mark.parametrize("terminated", ["off", "on"])
def test_a_td_ends_with_blocked_tables(terminated: str) -> None:
    """They are opened before their pages are removed; not when the key is gone, and pages are reclaimed."""
    machine = td("block", terminate_vm=terminated)
    split(machine)
    machine.vm.vm.recover_huge_pages()
    ops(machine)
    if terminated == "on":
        machine.vm.memory_encrypt_op("KVM_TDX_TERMINATE_VM", {})

    machine.destroy()

    assert machine.leftovers() == []
    assert ops(machine).get("RANGE.UNBLOCK", 0) == (BLOCKS if terminated == "off" else 0)


def test_1g_by_promotion() -> None:
    """512 pages of 2M on aligned frames become one of 1G, and a conversion within it splits both levels."""
    host = Host(
        TDX, load_profile_for(TDX, None), nr_frames=(2 << 18) + 4096, backing="2m",
        options={"page_aug": "2m", "promote": "1g"}, policies={"merge": "scan"},
    )  # fmt: skip
    host.frames.alloc((1 << 18) - 1, Use.ANON)  # so that the guest's memory starts on an aligned frame
    machine = Machine(host, PAGE_BYTES << 18)
    machine.launch()
    machine.guest.write(run(0, 1 << 18))
    assert leaves(machine) == [0, 512, 0]

    assert machine.vm.vm.recover_huge_pages() == 1

    assert leaves(machine) == [0, 0, 1]
    assert host.hw.nr_large == [0, 0, 1]
    machine.guest.convert(run(700, 1), False)
    assert leaves(machine) == [511, 511, 0]
    assert machine.guest.check() == []
    assert not machine.vm.vm.dead
