"""Races of pKVM's own, for `cvm explore`: a guest shares a page, or takes it back, while the host takes it by force."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cvmcore.backend import Backend
from cvmcore.effects import Steps, point
from cvmcore.hookspecs import hookimpl
from cvmcore.sched import Case
from cvmcore.testing.scenarios import Scenario, patched
from cvmcore.testing.world import GFN, PAGE, World
from cvmcore.types import HostMode, HostVerdict
from cvmcore.vcpu import Convert
from cvmcore_pkvm.ops import Pkvm

SECRET = 0xBEEF
HOST_READS = point("host.reads")
BORROWED = 2
"""PKVM_PAGE_SHARED_BORROWED: what EL2 says of the host and a frame that a guest shares with it."""


def _world(backend: Backend) -> tuple[World, slice]:
    world = World(backend)
    world.machine.vcpus[0].run(_write())
    word = int(world.machine.frames_of(PAGE)[0])
    return world, slice(word, word + 1, 1)


def _write() -> Any:
    from cvmcore.vcpu import Touch

    return Touch(PAGE, write=True, stamps=SECRET)


def _host_reads(world: World, frame: slice, seen: list[Any]) -> Steps[Any]:
    """The bare kernel reads the page: EL2 lets it, or takes the page from the guest for it, cleared."""
    verdict = yield from world.host.ops.call(
        "host_access", host=world.host, pfns=frame, write=False, mode=HostMode.KERNEL
    )
    state = int(world.host.hw.frame[frame][0]) & 3
    seen.append((verdict, int(world.host.memory.read(frame, 0)[0]), state))
    return verdict


def share_and_reclaim(backend: Backend) -> Case:
    """The guest shares a page while the host takes it by force: shared first, or destroyed first."""
    world, frame = _world(backend)
    seen: list[Any] = []

    def check(results: list[Any]) -> None:
        verdict, stamp, state = seen[0]
        assert verdict in (HostVerdict.OK, HostVerdict.RECLAIMED), verdict
        assert stamp != SECRET or state == BORROWED, "the host has a private page with its content"

    def convert() -> Steps[Any]:
        return world.machine.vcpus[0].run.steps(Convert(PAGE, private=False))

    return world.case({"vcpu0": convert, "host": lambda: _host_reads(world, frame, seen)}, check)


def unshare_and_reclaim(backend: Backend) -> Case:
    """The guest takes a shared page back and writes a secret, while the host reads it."""
    world, frame = _world(backend)
    world.machine.vcpus[0].run(Convert(PAGE, private=False))
    world.host.memory.write(frame, 1, 0)
    seen: list[Any] = []

    def take_back() -> Steps[Any]:
        leave = yield from world.machine.vcpus[0].run.steps(Convert(PAGE, private=True))
        if leave is None:
            leave = yield from world.machine.vcpus[0].run.steps(_write())
        return leave

    def check(results: list[Any]) -> None:
        assert seen and seen[0][1] != SECRET, f"the host reads what the guest wrote in private at gfn {GFN}"

    return world.case({"vcpu0": take_back, "host": lambda: _host_reads(world, frame, seen)}, check)


@contextmanager
def host_believes_itself() -> Iterator[None]:
    """The host maps whatever it thinks is its own, and does not ask EL2."""

    @hookimpl
    def host_access(self: Any, host: Any, pfns: Any, mode: Any) -> Steps[HostVerdict]:
        yield HOST_READS
        return HostVerdict.OK

    with patched(Pkvm, "host_access", host_access):
        yield


SCENARIOS = (
    Scenario(
        "pkvm-share-reclaim", "MEM_SHARE against a reclaim by force", "EL2's locks over host and guest state",
        share_and_reclaim, host_believes_itself, alone=("pkvm",),
    ),
    Scenario(
        "pkvm-unshare-reclaim", "MEM_UNSHARE and a secret against the host's read",
        "EL2 decides by its own state; the host treats its answer as authoritative", unshare_and_reclaim,
        host_believes_itself, alone=("pkvm",),
    ),
)  # fmt: skip
