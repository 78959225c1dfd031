"""The policy `walker`: faults that read the Secure EPT do the same as those that read the mirror."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cvmcore.errors import InputError
from cvmcore.guest import Machine
from cvmcore.host import Host
from cvmcore.observers import observes
from cvmcore.pages import run
from cvmcore.runner import load_profile_for
from cvmcore.sched import Lockdep
from cvmcore.testing.invariants import Checker
from cvmcore.types import Retry, Stopped
from cvmcore_tdx.ops import TDX


def td(walker: str, vcpus: int = 1, checked: bool = True, **more: Any) -> Machine:
    host = Host(TDX, load_profile_for(TDX, None), nr_frames=1 << 14, policies={"walker": walker}, **more)
    if checked:
        Checker.on(host)
    machine = Machine(host, 16 << 20, vcpus=vcpus)
    machine.launch()
    return machine


def exercise(machine: Machine, single: bool) -> None:
    gfns = np.array([*range(5, 30), 700, 900, *range(1024, 1060)])
    for some in gfns.reshape(-1, 1) if single else [gfns]:
        machine.guest.write(some)
    machine.guest.convert(run(10, 10), False)
    machine.guest.convert(run(10, 10), True)
    for some in gfns.reshape(-1, 1) if single else [gfns]:
        machine.guest.write(some)


def test_same_tables_either_way() -> None:
    """Only the reads are more: four for each fault of a 4K page."""
    mirror, truth = td("mirror", drive=Lockdep()), td("seamcall", drive=Lockdep())
    for machine in (mirror, truth):
        exercise(machine, False)

    for level in range(1, 5):
        a, b = (m.vm.vm.tdp.root_for(True).entries[level] for m in (mirror, truth))
        assert np.array_equal(a, b)
    reads = truth.host.meter.ops.pop("TDH.MEM.SEPT.RD")
    assert reads == 4 * truth.vcpus[0].vcpu.faults
    assert truth.host.meter.ops == mirror.host.meter.ops
    assert truth.guest.check() == []


def test_batches_mean_pages() -> None:
    whole, single = td("seamcall"), td("seamcall")
    exercise(whole, False)
    exercise(single, True)

    assert whole.host.meter.counts == single.host.meter.counts
    assert whole.host.meter.ops == single.host.meter.ops


class BusyOnce:
    """The first read finds the Secure EPT busy."""

    def __init__(self) -> None:
        self.left = 1

    @observes
    def intercept(self, hook: str, arguments: dict[str, Any]) -> Any:
        if hook == "walk_private_spte" and self.left:
            self.left -= 1
            return Stopped(0, Retry())
        return None


def test_a_busy_read_is_made_again() -> None:
    machine = td("seamcall", checked=False, observers=[BusyOnce()])

    machine.guest.write(run(5, 1))

    assert machine.vcpus[0].vcpu.retries == 1
    assert machine.guest.check() == []


def test_it_is_the_secure_ept_that_decides() -> None:
    """An entry that the record has lost is found all the same."""
    machine = td("seamcall", checked=False)
    machine.guest.write(run(5, 2))
    root, found = machine.vm.vm.tdp.root_for(True), []

    def look() -> Any:
        words = yield from machine.vm.vm.tdp.read(root, 1, run(4, 4), 1)
        found.extend((words & 7).tolist())

    kept, root.entries[1][6] = int(root.entries[1][6]), 0
    machine.host.drive(look())
    root.entries[1][6] = kept

    assert found == [0, 5, 5, 0]


def test_names_of_the_policy() -> None:
    assert td("external").vm.vm.tdp.reads_external
    assert td("seamcall").host.policies["walker"] == "external"
    with pytest.raises(InputError, match="walker: 'vmcall' is none of mirror, external"):
        td("vmcall")
