"""Races of SNP's own, for `cvm explore`: a large RMP entry is broken while part of its page is punched out, or while a
fault has found it large."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cvmcore.backend import Backend
from cvmcore.effects import Steps, drain
from cvmcore.pages import EMPTY, run
from cvmcore.sched import Case
from cvmcore.testing.scenarios import Scenario, no_stale_check, patched
from cvmcore.testing.world import World
from cvmcore.types import PG_LEVEL_2M
from cvmcore.vcpu import Accept, Convert, Touch
from cvmcore_sev.ops import AmdSev


def _block(backend: Backend) -> World:
    """A 2M block of the guest that is assigned and mapped in one piece, and not validated."""
    world = World(backend, backing="2m", pages=1024, warm=False)
    world.machine.vcpus[0].run(Accept(slice(0, 512, 512), level=PG_LEVEL_2M))
    world.machine.vcpus[0].run(Touch(run(512, 1), write=False))
    return world


def psmash_and_punch(backend: Backend) -> Case:
    """The guest validates one page of a 2M entry (PSMASH); the VMM punches a hole beside it."""
    world = _block(backend)

    def accept() -> Steps[Any]:
        return world.machine.vcpus[0].run.steps(Accept(run(600, 1)))

    def check(results: list[Any]) -> None:
        assert results[0] is None, results
        action = Touch(run(600, 1), write=True, stamps=9)
        assert world.machine.vcpus[1].run(action) is None

    return world.case({"vcpu0": accept, "vmm": lambda: world.punch(run(700, 40))}, check)


def fault_and_punch_large(backend: Backend) -> Case:
    """A fault that maps a block large against a hole in it."""
    world = World(backend, backing="2m", pages=1024, warm=False)
    return world.case({"vcpu0": lambda: world.fault(0, run(600, 1)), "vmm": lambda: world.punch(run(700, 40))})


def share_and_fault_large(backend: Backend) -> Case:
    """The guest shares a page of a block that is validated large (PSMASH, then a zap) and not mapped; a fault beside it
    may have found the RMP's 2M page before."""
    world = _block(backend)
    world.machine.vcpus[0].run(Accept(slice(512, 1024, 512), level=PG_LEVEL_2M))
    root = world.vm.tdp.direct
    for slot in world.vm.slots:
        drain(world.vm.tdp.zap_leaves(root, slot, 512, 1024))
    drain(world.vm.flush_tlbs(512, 1024))

    def share() -> Steps[Any]:
        return world.machine.vcpus[0].run.steps(Convert(run(600, 1), private=False))

    return world.case({"vcpu0": share, "vcpu1": lambda: world.fault(1, run(700, 1))})


@contextmanager
def no_psmash() -> Iterator[None]:
    """A hole in a large page is given back in 4K, its RMP entry as it is."""

    def nothing(self: Any, host: Any, pfns: Any) -> Steps[Any]:
        yield from ()
        return pfns, EMPTY

    with patched(AmdSev, "_invalidate_2m", nothing):
        yield


SCENARIOS = (
    Scenario(
        "snp-psmash-punch", "a large RMP entry is broken while part of its page is punched out",
        "PSMASH before RMPUPDATE; FAIL_INUSE is spun on", psmash_and_punch, no_psmash, alone=("snp",),
    ),
    Scenario(
        "snp-share-fault-large", "a page of a block is shared while a fault beside it maps the block large",
        "the zap of a broken entry is a frame, and seq is tested again under mmu_lock", share_and_fault_large,
        no_stale_check, alone=("snp",),
    ),
    Scenario(
        "snp-fault-punch-large", "a block is mapped large while part of it is punched out",
        "seq, tested again under mmu_lock", fault_and_punch_large, no_stale_check, alone=("snp",),
    ),
)  # fmt: skip
