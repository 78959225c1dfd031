"""Races of TDX's own, for `cvm explore`: a large page is split while another vCPU accepts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cvmcore.backend import Backend
from cvmcore.effects import Steps, drain
from cvmcore.pages import run
from cvmcore.sched import Case
from cvmcore.testing.scenarios import Scenario, patched, touch_and_convert
from cvmcore.testing.world import STAMP, World
from cvmcore.types import PG_LEVEL_2M, Shutdown
from cvmcore.vcpu import Accept, Touch
from cvmcore_tdx.ops import Tdx


def split_and_accept(backend: Backend) -> Case:
    """One vCPU accepts a page in 4K that the Secure EPT has in 2M, pending; another accepts the whole block."""
    world = World(backend, backing="2m", pages=1024, options={"page_aug": "2m"}, warm=False)
    whole = slice(512, 1024, 512)
    small = run(600, 1)

    def accept_small() -> Steps[Any]:
        return world.machine.vcpus[0].run.steps(Accept(small))

    def accept_large() -> Steps[Any]:
        return world.machine.vcpus[1].run.steps(Accept(whole, level=PG_LEVEL_2M))

    def check(results: list[Any]) -> None:
        assert not any(isinstance(result, Shutdown) for result in results), results
        assert not world.vm.dead, world.vm.dead_because
        assert world.machine.vcpus[0].run(Touch(small, write=True, stamps=7)) is None
        action = Touch(small)
        assert world.machine.vcpus[1].run(action) is None
        assert action.seen is not None and int(action.seen[0]) == 7

    drain(world.fault(0, run(512, 1)))
    assert world.vm.tdp.root_for(True).level_at(600) == PG_LEVEL_2M
    return world.case({"vcpu0": accept_small, "vcpu1": accept_large}, check)


def touch_below_blocked(backend: Backend) -> Case:
    """The recovery thread of merge=block has blocked a full table: one vCPU writes below it, another one reads."""
    world = World(
        backend, backing="2m", pages=1024, options={"page_aug": "2m"}, warm=False, policies={"merge": "block"}
    )
    small, mine, others = run(512, 512), run(600, 1), run(700, 1)
    world.machine.vcpus[0].run(Accept(small))
    world.machine.vcpus[0].run(Touch(small, write=True, stamps=9))
    assert world.vm.recover_huge_pages(1) == 1

    def check(results: list[Any]) -> None:
        assert results == [None, None], results
        assert world.vm.tdp.root_for(True).level_at(600) == PG_LEVEL_2M
        for page, stamp in ((mine, STAMP), (others, 9)):
            action = Touch(page)
            assert world.machine.vcpus[1].run(action) is None
            assert action.seen is not None and int(action.seen[0]) == stamp

    return world.case(
        {"vcpu0": lambda: world.touch(0, mine, write=True), "vcpu1": lambda: world.touch(1, others)}, check
    )


@contextmanager
def no_tracking() -> Iterator[None]:
    """BLOCK, and REMOVE, DEMOTE or PROMOTE: no TRACK, nobody is kicked."""

    def nothing(self: Any, vm: Any, n: int) -> Steps[None]:
        yield from ()

    with patched(Tdx, "_track", nothing):
        yield


SCENARIOS = (
    Scenario(
        "tdx-split-accept", "a page is accepted in 4K while another vCPU accepts its 2M block",
        "BLOCK, TRACK, kick, DEMOTE; SIZE_MISMATCH sends the guest back to 4K", split_and_accept,
        no_tracking, alone=("tdx",),
    ),
    Scenario(
        "tdx-touch-remove", "a vCPU is inside while a page is removed", "BLOCK, TRACK, kick, then REMOVE",
        touch_and_convert, no_tracking, alone=("tdx",),
    ),
    Scenario(
        "tdx-touch-blocked", "two vCPUs use pages below a table that is blocked to be merged",
        "BLOCK, TRACK, kick, then PROMOTE; the second fault finds the large page", touch_below_blocked,
        no_tracking, alone=("tdx",),
    ),
)  # fmt: skip
