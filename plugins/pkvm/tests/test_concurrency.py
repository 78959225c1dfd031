"""EL2's locks in virtual time: what is held over an invalidation, and what finer locks buy, several VMs at once."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from cvmcore.effects import Steps
from cvmcore.guest import Machine
from cvmcore.host import Host
from cvmcore.pages import run
from cvmcore.runner import load_profile_for
from cvmcore.sched import Case, Timed, explore
from cvmcore.testing.invariants import Checker
from cvmcore.types import HostMode, HostVerdict
from cvmcore.vcpu import Touch
from cvmcore_pkvm.ops import PKVM

PAGES = 8
GAP = 512  # the buffers of two vCPUs lie in ranges of their own
PROFILE = load_profile_for(PKVM, None)
NS = PROFILE.ns_by_item()
HELD = 2 * NS["el2_pte_update"] + NS["tlbi_page"]
"""How long an unshare holds its locks: two entries, and the invalidation with its barriers."""
FREE = NS["hvc"] + NS["el2_dispatch"] + NS["host_refill_4k"]


def world(design: str, vms: int, vcpus: int) -> tuple[Host, list[Machine]]:
    """VMs whose vCPUs each have a buffer that is shared with the host."""
    host = Host(PKVM, PROFILE, nr_frames=1 << 14, options={"hyp_lock": design})
    machines = [Machine(host, (vcpus + 1) * GAP << 12, vcpus=vcpus) for _ in range(vms)]
    for machine in machines:
        machine.launch()
        for vcpu in range(vcpus):
            machine.guest.write(run(vcpu * GAP, GAP), vcpu)  # so that the frames lie in ranges of their own, too
            machine.guest.convert(run(vcpu * GAP, PAGES), False, vcpu)
    return host, machines


def timed(host: Host, machines: list[Machine], vcpus: int, private: bool = True) -> Timed:
    """Every vCPU converts its buffer, one page a call."""

    def actor(machine: Machine, vcpu: int) -> Steps[None]:
        for page in range(PAGES):
            yield from machine.guest.convert.steps(run(vcpu * GAP + page, 1), private, vcpu)

    driver = Timed(host)
    driver.run(
        (f"{number}.{vcpu}", actor(machine, vcpu)) for number, machine in enumerate(machines) for vcpu in range(vcpus)
    )
    return driver


def test_invalidations_are_made_under_the_lock() -> None:
    """An unshare holds both locks while it invalidates; the trap and the host's refill are outside."""
    driver = timed(*world("global", 1, 1), vcpus=1)

    assert driver.elapsed_ns == PAGES * (HELD + FREE)
    for name in ("host_mmu.lock", "vm[0x1000].lock"):
        stats = driver.lock_stats[name]
        assert (stats.taken, stats.contended, stats.hold_ns) == (PAGES, 0, PAGES * HELD)


@pytest.mark.parametrize(("design", "vms", "vcpus", "queue"), [
    ("global", 1, 4, 4), ("global", 4, 1, 4), ("global", 2, 2, 4),
    ("per-vm", 1, 4, 4), ("per-vm", 4, 1, 1), ("per-vm", 2, 2, 2),
    ("per-range", 1, 4, 1), ("per-range", 4, 1, 1), ("per-range", 2, 2, 1),
])  # fmt: skip
def test_what_finer_locks_buy(design: str, vms: int, vcpus: int, queue: int) -> None:
    """`queue` vCPUs wait for each other: all of the machine, those of a VM, or none. Locks per VM help only across
    VMs."""
    host, machines = world(design, vms, vcpus)

    driver = timed(host, machines, vcpus)

    alone = PAGES * (HELD + FREE)
    if queue == 1:
        assert driver.elapsed_ns == alone
        assert not any(stats.contended for stats in driver.lock_stats.values())
    else:
        assert driver.elapsed_ns >= max(alone + (queue - 1) * HELD, queue * PAGES * HELD)
        assert driver.elapsed_ns <= queue * PAGES * HELD + 2 * FREE
    host.hw.check_legal()


def test_shares_hold_the_lock_for_less() -> None:
    """To share invalidates nothing, so even the global lock is free most of the time."""
    host, machines = world("global", 1, 4)
    timed(host, machines, 4)

    driver = timed(host, machines, 4, private=False)

    assert driver.lock_stats["host_mmu.lock"].hold_ns == 4 * PAGES * 2 * NS["el2_pte_update"]


@pytest.mark.parametrize("design", ["global", "per-vm", "per-range"])
def test_vms_at_once_keep_their_content(design: str) -> None:
    """Faults, conversions and the host's own accesses of three VMs, interleaved: every state legal after each step,
    nobody loses a page, and all comes back."""
    host = Host(PKVM, PROFILE, nr_frames=1 << 12, options={"hyp_lock": design})
    host.hw.checked = True
    checker = Checker.on(host, concurrent=True)
    machines = [Machine(host, 64 << 12, vcpus=2) for _ in range(3)]
    for machine in machines:
        machine.launch()

    def vcpu(machine: Machine, index: int) -> Steps[None]:
        for gfn in range(32 * index, 32 * index + 6):
            page = run(gfn, 1)
            yield from machine.guest.write.steps(page, index)
            yield from machine.guest.convert.steps(page, False, index)
            yield from machine.guest.write.steps(page, index, private=False)
            if gfn % 2:
                yield from machine.guest.convert.steps(page, True, index)

    def vmm(machine: Machine) -> Steps[None]:
        yield from ()
        for gfn in range(6):
            verdict = machine.process.read(machine.regions[0].hva + (gfn << 12), 1)[0]
            assert verdict in (HostVerdict.OK, HostVerdict.SIGSEGV)

    Timed(host).run([
        *((f"{n}.{i}", vcpu(machine, i)) for n, machine in enumerate(machines) for i in range(2)),
        ("vmm", vmm(machines[0])),
    ])

    for machine in machines:
        assert machine.guest.check() == []
        checker.check(machine.vm.vm)
        machine.destroy()
    assert machines[0].leftovers() == []
    assert not (host.hw.frame & 0x33).any()


def test_range_locks_follow_the_batch(make_rig: Any) -> None:
    """A conversion across ranges takes the lock of each."""
    rig = make_rig(hyp_lock="per-range")
    cpu = rig.cpu(rig.make_vm(protected=True))
    assert rig.hyp.host_donate_guest(cpu, run(512, 1024), run(256, 1024)).ok

    names = [effect.name for effect in rig.hyp.guest_share_host.steps(cpu, run(256, 1024)) if effect.kind == "write"]

    assert names == [f"write host_mmu.lock[{i}]" for i in (1, 2)] + [f"write vm[0x1000].lock[{i}]" for i in (0, 1, 2)]


# ---- races that somebody loses ------------------------------------------------------------------------------------


class Race:
    """Two operations of EL2 on a VM with one private page, in every order of their locks."""

    def __init__(self, design: str) -> None:
        self.host = Host(PKVM, PROFILE, nr_frames=1 << 10, options={"hyp_lock": design})
        self.hyp = self.host.hw
        self.hyp.checked = True
        self.machine = Machine(self.host, 16 << 12)
        self.machine.launch()
        self.machine.guest.write(run(3, 1))
        self.kvm = self.machine.vm.vm.arch
        self.cpu = self.kvm.vcpus[0].cpu
        self.pfn = int(self.machine.frames_of(run(3, 1))[0])


def outcomes(design: str, one: Any, other: Any) -> set[tuple[str, str]]:
    """What the two answer, over all orders."""
    found = set()

    def make() -> Case:
        race = Race(design)

        def check(results: list[Any]) -> None:
            found.add((results[0].status.name, results[1].status.name))
            race.hyp.check_legal()

        return Case(race.host, [("one", one(race)), ("other", other(race))], check)

    assert explore(make).schedules >= 2
    return found


@pytest.mark.parametrize("design", ["global", "per-vm", "per-range"])
def test_force_reclaim_against_share(design: str) -> None:
    """Whoever is first wins: the host finds the page shared by then, or the guest finds poison."""
    found = outcomes(
        design,
        lambda race: race.hyp.host_force_reclaim.steps(run(race.pfn, 1)),
        lambda race: race.hyp.guest_share_host.steps(race.cpu, run(3, 1)),
    )

    assert found == {("OK", "EHWPOISON"), ("EAGAIN", "OK")}


@pytest.mark.parametrize("design", ["global", "per-vm", "per-range"])
def test_two_vcpus_share_one_page(design: str) -> None:
    share = lambda race: race.hyp.guest_share_host.steps(race.cpu, run(3, 1))  # noqa: E731

    assert outcomes(design, share, share) == {("OK", "EPERM"), ("EPERM", "OK")}


def test_load_against_teardown() -> None:
    """A vCPU loads before the VM is dying, which then has to wait, or not at all."""

    def load(race: Race) -> Any:
        race.hyp.vcpu_put(race.cpu)
        return race.hyp.vcpu_load.steps(race.cpu, race.kvm.handle, 0)

    found = outcomes("global", load, lambda race: race.hyp.start_teardown_vm.steps(race.kvm.handle))

    assert found == {("OK", "EINVAL"), ("EINVAL", "OK")}


def test_two_vcpus_fault_one_page() -> None:
    """One donates, the other finds the record and goes back into the guest: one pin, one donation."""

    def make() -> Case:
        host = Host(PKVM, PROFILE, nr_frames=1 << 10)
        machine = Machine(host, 16 << 12, vcpus=2)
        machine.launch()
        for vcpu in range(2):
            machine.guest.write(run(8 + vcpu, 1), vcpu)

        def check(results: list[Any]) -> None:
            assert results == [None, None]
            assert host.meter.ops["__pkvm_host_donate_guest"] == 3
            assert host.frames.pins_held == 3
            host.hw.check_legal()

        return Case(host, [(f"vcpu{i}", machine.guest.write.steps(run(3, 1), i)) for i in range(2)], check)

    assert explore(make, interruptions=2).schedules > 10


def test_a_poison_fault_beside_another_fault() -> None:
    """EL2 is asked about the vCPU that came out, once, and each vCPU's pages come from its own list, whatever another
    vCPU of the VM does meanwhile."""

    def make() -> Case:
        host = Host(PKVM, PROFILE, nr_frames=1 << 10)
        machine = Machine(host, 16 << 12, vcpus=2)
        machine.launch()
        for vcpu in range(2):
            machine.guest.write(run(8 + vcpu, 1), vcpu)
        assert machine.process.read(machine.regions[0].hva + (8 << 12), 1, HostMode.KERNEL)[0] is HostVerdict.RECLAIMED
        before = host.meter.ops.get("__pkvm_vcpu_in_poison_fault", 0)

        def check(results: list[Any]) -> None:
            assert (type(results[0]).__name__, results[0].errno) == ("Shutdown", errno.EFAULT)
            assert host.meter.ops["__pkvm_vcpu_in_poison_fault"] - before == 1
            host.hw.check_legal()

        steps = machine.vcpus[0].run.steps(Touch(run(8, 1)))
        return Case(host, [("poisoned", steps), ("other", machine.guest.write.steps(run(3, 1), 1))], check)

    assert explore(make, interruptions=2).schedules > 10
