"""pKVM under the real core: what its VMs do, seen from the UAPI, with EL2's states checked after every operation."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cvmcore.effects import drain
from cvmcore.errors import HardwareError, UapiError
from cvmcore.guest import GuestError, Machine, stamps_for
from cvmcore.host import Host
from cvmcore.pages import part, run
from cvmcore.runner import load_profile_for
from cvmcore.sched import Lockdep, Timed
from cvmcore.testing.conformance import Bench, Setting
from cvmcore.testing.invariants import Checker
from cvmcore.testing.player import Player
from cvmcore.types import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, PAGE_BYTES, GuestException, HostMode, HostVerdict
from cvmcore.vcpu import Convert, Shutdown, Touch
from cvmcore_pkvm import hw
from cvmcore_pkvm.ops import PKVM

BLOCK = 512


class World:
    """A host with one VM, launched; EL2 and the core check themselves."""

    def __init__(
        self, pages: int = 4 * BLOCK, *, vcpus: int = 1, backing: str = "4k", concurrent: bool = False, **options: str
    ) -> None:
        more: dict[str, Any] = {"memlock_limit_bytes": None}
        if "memlock" in options:
            more["memlock_limit_bytes"] = int(options.pop("memlock")) * PAGE_BYTES
        self.host = Host(
            PKVM, load_profile_for(PKVM, None), nr_frames=1 << 14, options=options, backing=backing,
            drive=drain if concurrent else Lockdep(), **more,
        )  # fmt: skip
        self.host.hw.checked = True
        self.checker = Checker.on(self.host, concurrent=concurrent)
        self.machine = Machine(self.host, pages * PAGE_BYTES, vcpus=vcpus)
        self.machine.launch()
        self.guest, self.vm = self.machine.guest, self.machine.vm.vm

    @property
    def ops(self) -> dict[str, int]:
        return dict(self.host.meter.ops)

    @property
    def leaves(self) -> dict[int, int]:
        """Leaves by level, as KVM records them."""
        return {level: n for level, n in enumerate(self.vm.tdp.direct.leaves) if n}

    def flags(self, value: int) -> None:
        region = self.machine.regions[0]
        self.machine.vm.set_user_memory_region2(0, value, 0, region.npages * PAGE_BYTES, region.hva)

    def hva(self, gfn: int) -> int:
        return self.machine.regions[0].hva + gfn * PAGE_BYTES

    def check(self) -> None:
        assert self.guest.check() == []
        self.checker.check(self.vm)

    def end(self) -> None:
        self.machine.destroy()
        assert self.machine.leftovers() == []
        assert self.host.frames.leaked() == 0
        assert not (self.host.hw.frame & 0x33).any()


# ---- np VMs: blocks -----------------------------------------------------------------------------------------------


def test_blocks_are_shared_as_blocks() -> None:
    w = World(backing="2m", protected="no")
    w.guest.write(run(0, 2 * BLOCK))

    assert w.leaves == {2: 2}
    assert w.ops["__pkvm_host_share_guest"] == 2
    w.check()
    w.end()


def test_caches_are_topped_up_once_a_fault() -> None:
    """One fault, and one filling of the caches, for each block; one for each page where only pages can be mapped."""
    for backing, faults in (("2m", 2), ("4k", 2 * BLOCK)):
        w = World(backing=backing, protected="no")
        before = w.machine.vcpus[0].vcpu.faults
        w.guest.write(run(0, 2 * BLOCK))

        assert w.machine.vcpus[0].vcpu.faults - before == faults
        assert w.host.ops.hooks["topup"].pages == w.machine.vcpus[0].vcpu.faults


@pytest.mark.parametrize("n", [1, 100, BLOCK])
def test_partial_unmap_takes_the_block_back(n: int) -> None:
    """A notifier for part of a block unshares the whole record; the pages that are left fault in again, small where
    the host has no large page any more, and nothing is lost."""
    w = World(backing="2m", protected="no")
    w.guest.write(run(0, 2 * BLOCK))

    w.machine.discard_shared(run(BLOCK + 7, n))
    w.guest.written[BLOCK + 7 : BLOCK + 7 + n] = 0

    assert w.leaves == {2: 1}
    assert w.ops["__pkvm_host_unshare_guest"] == 1
    w.check()
    seen = w.guest.read(run(BLOCK + 7, 1))
    assert seen[0] == 0
    w.end()


def test_dirty_logging() -> None:
    """Logging write-protects blocks as they are; a write takes its block back and maps the page small; what was written
    is in the log; when logging stops, blocks come back."""
    w = World(backing="2m", protected="no")
    w.guest.write(run(0, 2 * BLOCK))

    w.flags(KVM_MEM_LOG_DIRTY_PAGES)
    assert w.leaves == {2: 2}
    assert (w.ops["__pkvm_host_wrprotect_guest"], w.ops["__pkvm_tlb_flush_vmid"]) == (2, 1)

    w.guest.read(run(BLOCK, BLOCK))  # reads do not fault: the block stays
    assert w.leaves == {2: 2}
    w.guest.write(np.array([3, 9]))
    assert w.leaves == {1: 2, 2: 1}
    assert (w.ops["__pkvm_host_unshare_guest"], w.ops["__pkvm_host_share_guest"]) == (1, 2 + 2)

    assert np.flatnonzero(w.machine.vm.get_dirty_log(0)).tolist() == [3, 9]
    w.guest.write(run(9, 1))
    assert w.ops["__pkvm_host_relax_perms_guest"] == 1
    assert np.flatnonzero(w.machine.vm.get_dirty_log(0)).tolist() == [9]
    assert w.machine.vm.get_dirty_log(0).sum() == 0
    w.check()

    w.flags(0)
    w.guest.write(run(0, 2 * BLOCK))
    assert w.leaves == {2: 2}
    w.check()
    w.end()


def test_dirty_logging_of_small_pages() -> None:
    w = World(protected="no")
    w.guest.write(run(0, 600))
    w.flags(KVM_MEM_LOG_DIRTY_PAGES)
    for written in (run(5, 20), np.array([1, 511, 512, 599]), run(600, 40)):
        w.guest.write(written)
        log = np.flatnonzero(w.machine.vm.get_dirty_log(0))
        assert log.tolist() == list(range(*written.indices(1 << 20)) if isinstance(written, slice) else written)
    w.check()
    w.end()


def test_writers_race_with_the_log() -> None:
    """Four vCPUs write under logging while the log is read: every write is in one of the logs, nothing is lost."""
    w = World(vcpus=4, backing="2m", concurrent=True, protected="no")
    w.guest.write(run(0, 2 * BLOCK))
    w.flags(KVM_MEM_LOG_DIRTY_PAGES)
    logs: list[Any] = []

    def vcpu(i: int) -> Any:
        for page in range(12):
            yield from w.guest.write.steps(run(i * 256 + 5 * page, 1), i)

    def vmm() -> Any:
        for _ in range(6):
            log = yield from w.machine.vm.get_dirty_log.steps(0)
            logs.append(log)

    timed = Timed(w.host)
    timed.run([*((f"vcpu{i}", vcpu(i)) for i in range(4)), ("vmm", vmm())])

    logs.append(w.machine.vm.get_dirty_log(0))
    written = {i * 256 + 5 * page for i in range(4) for page in range(12)}
    assert set(np.flatnonzero(np.bitwise_or.reduce(logs)).tolist()) == written
    assert timed.lock_stats["vm0.mmu_lock"].taken > 48
    w.check()
    w.end()


# ---- protected VMs ------------------------------------------------------------------------------------------------


def test_notifiers_are_ignored() -> None:
    """The host takes pages of the VMM away: a protected guest keeps what is pinned for it."""
    w = World()
    w.guest.write(run(0, 8))
    before = w.host.hw.frame.copy()

    w.machine.discard_shared(run(0, 4))

    assert (w.host.hw.frame == before).all()
    assert (w.guest.read(run(0, 8)) == stamps_for(run(0, 8), w.guest.version)).all()
    assert w.leaves == {1: 8}


def test_memlock_is_charged_page_by_page() -> None:
    w = World(memlock="16")

    with pytest.raises(GuestError, match="ENOMEM"):
        w.guest.write(run(0, 32))

    assert (w.vm.memlock_pages, w.host.frames.pins_held) == (16, 16)
    assert w.host.ops.hooks["topup"].pages == 17  # the fault that failed had its caches filled, too
    w.end()
    assert w.vm.memlock_pages == 0


def test_what_a_protected_vm_refuses() -> None:
    w = World()
    for flags in (KVM_MEM_READONLY, KVM_MEM_LOG_DIRTY_PAGES):
        with pytest.raises(UapiError) as refused:
            w.flags(flags)
        assert refused.value.errno in (errno.EPERM, errno.EINVAL)
    w.guest.write(run(0, 1))
    with pytest.raises(UapiError) as refused:
        w.machine.vm.set_user_memory_region2(0, 0, 0, 0)
    assert refused.value.errno == errno.EPERM


VERDICTS = {
    HostMode.USER: HostVerdict.SIGSEGV,
    HostMode.FIXUP: HostVerdict.EFAULT,
    HostMode.KERNEL: HostVerdict.RECLAIMED,
}


@pytest.mark.parametrize(("mode", "verdict"), VERDICTS.items())
def test_host_touches_a_private_page(mode: HostMode, verdict: HostVerdict) -> None:
    """User space dies, a fixup runs, the bare kernel destroys the page; the guest then finds poison, and KVM_RUN ends
    with -EFAULT and no memory-fault exit."""
    w = World()
    w.guest.write(run(0, 4))

    assert w.machine.process.read(w.hva(2), 1, mode)[0] is verdict

    if mode is HostMode.KERNEL:
        leave = w.machine.vcpus[0].run(Touch(run(2, 1)))
        assert (type(leave).__name__, leave.errno) == ("Shutdown", errno.EFAULT)  # type: ignore[union-attr]
        assert w.host.frames.pins_held == 4
        w.machine.destroy()
        assert w.machine.leftovers() == []
    else:
        w.check()
        w.end()


def test_shared_pages_are_the_hosts_to_use() -> None:
    w = World()
    w.guest.write(run(0, 4))
    w.guest.convert(run(1, 2), False)

    assert w.machine.process.write(w.hva(1), 77, 2) is HostVerdict.OK
    w.guest.convert(run(1, 2), True)

    assert w.guest.read(run(1, 2)).tolist() == [77, 77]
    assert w.machine.process.read(w.hva(1), 1)[0] is HostVerdict.SIGSEGV


def test_conversions_leave_nothing_to_the_host() -> None:
    """No exit, no call of user space, and no lock of KVM's, unless `conversion=exit`."""
    for conversion, exits in (("el2", 0), ("exit", 2)):
        w = World(conversion=conversion)
        w.guest.write(run(0, 16))
        before, locks = w.machine.vcpus[0].vcpu.exits, set[str]()
        for private in (False, True):
            steps = w.machine.vcpus[0].run.steps(Convert(run(0, 16), private=private))
            locks |= {effect.lock.name for effect in steps if effect.lock is not None}
        assert w.machine.vcpus[0].vcpu.exits - before == exits
        assert locks == {"host_mmu.lock", "vm[0x1000].lock"}
        w.check()
        w.end()


def test_share_of_an_absent_page_faults_it_in() -> None:
    w = World()
    w.guest.write(run(0, 2))
    faults = w.machine.vcpus[0].vcpu.faults

    w.guest.convert(run(0, 6), False)

    assert w.machine.vcpus[0].vcpu.faults - faults == 4
    assert w.machine.process.read(w.hva(5), 1)[0] is HostVerdict.OK
    with pytest.raises(GuestError, match="conversion refused"):
        w.guest.convert(run(10, 1), True)


def shared_by(
    there: set[int], before: set[int], conversion: str, batch: str, memlock: int, alone: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Any, ...]:  # fmt: skip
    """All that a guest's loop of MEM_SHARE over 24 gfns, of a slot of 20, comes to."""
    with monkeypatch.context() as patch:
        if alone:
            told = hw.HvcResult
            patch.setattr(hw, "HvcResult", lambda *args: told(*args[:4], *map(bool, args[4:])))
        w = World(20, conversion=conversion, batch=batch, memlock=str(memlock))
        for gfn in sorted(there):
            w.guest.write(run(gfn, 1))
            if gfn in before:
                w.guest.convert(run(gfn, 1), False)
        action, leaves = Convert(run(0, 24), private=False), []
        while len(leaves) < 4 and (leave := w.machine.vcpus[0].run(action)) is not None:
            leaves.append(leave)
            w.checker.check(w.vm)
        vcpu, meter = w.machine.vcpus[0].vcpu, w.host.meter
        words = w.host.hw.vm_of(0x1000).stage2.pages[:20].tolist()
        counts = dict(meter.counts)
        if Shutdown(errno.ENOMEM, "the fault could not be resolved") in leaves:
            counts.pop("page_clear_4k")  # the VMM's memory of pages behind the one that cannot be pinned is there, too
        return str(leaves), action.done, action.begun, words, vcpu.faults, vcpu.exits, meter.ops, counts


@pytest.mark.parametrize("conversion", ["el2", "exit"])
@given(
    there=st.sets(st.integers(0, 19), max_size=19), before=st.sets(st.integers(0, 19), max_size=3),
    batch=st.sampled_from(["1", "4", "64"]), room=st.integers(0, 24),
)  # fmt: skip
@example(there={2}, before={2}, batch="1", room=24)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_absent_pages_are_shared_as_one_by_one(
    monkeypatch: pytest.MonkeyPatch, conversion: str, there: set[int], before: set[int], batch: str, room: int
) -> None:
    """Faulted in together, also where one of them cannot be: the slot ends, or RLIMIT_MEMLOCK does; or where a page
    behind them is refused, as it was shared before."""
    memlock = len(there) + room
    one_by_one = shared_by(there, before, conversion, batch, memlock, True, monkeypatch)
    assert shared_by(there, before, conversion, batch, memlock, False, monkeypatch) == one_by_one


@pytest.mark.parametrize("alone", [True, False])
def test_a_share_beyond_the_ipa_size_is_refused(monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    """Behind absent pages, too: those are shared, and KVM hears of no fault on a page that EL2 refuses."""
    w = World(8)
    vcpu = w.machine.vcpus[0]
    action = Convert(np.array([3, 5, w.host.hw.end_gfn + 5]), private=False)
    leave = vcpu.run(Convert(part(action.gfns, 0, 2), private=False)) if alone else None
    assert leave is None
    action.done = 2 * alone
    leave = vcpu.run(action)

    assert isinstance(leave, GuestException) and leave.gfn == w.host.hw.end_gfn + 5
    assert action.done == vcpu.vcpu.faults == w.host.meter.counts["vm_exit"] == 2


def test_a_page_that_another_vcpu_maps_meanwhile_is_faulted_in() -> None:
    """The call has found the page absent; who maps it when the locks are dropped does not turn that into a refusal."""
    w = World(8)
    w.guest.write(run(0, 1))
    vm = w.host.hw.vm_of(0x1000)
    steps = w.host.hw.mem_share.steps(w.machine.vcpus[0].vcpu.arch.cpu, run(2, 2))
    answer = None
    while True:
        try:
            effect = steps.send(answer)
        except StopIteration as stop:
            result = stop.value
            break
        if effect.kind == "release":
            vm.stage2.pages[2] = vm.stage2.pages[0]
    vm.stage2.pages[2] = 0
    assert (result.abort, result.at, result.absent) == (True, 0, 2)


def test_a_kernel_that_insists_dies() -> None:
    w = World()
    w.guest.write(run(0, 1))
    table = w.host.hw.vm_of(0x1000).pgd

    with pytest.raises(HardwareError, match="EPERM"):
        w.host.host_access(table, True, HostMode.KERNEL)


def test_teardown_clears_what_was_private() -> None:
    w = World()
    w.guest.write(run(0, 8))
    w.guest.convert(run(6, 2), False)
    private, shared = w.machine.frames_of(run(0, 6)), w.machine.frames_of(run(6, 2))
    kept = w.host.memory.read(shared, 0).tolist()

    w.end()

    assert not w.host.memory.read(private, 0).any()
    assert w.host.memory.read(shared, 0).tolist() == kept


@pytest.mark.parametrize("protected", ["yes", "no"])
def test_no_frame_is_free_that_stage_2_still_maps_when_the_vmm_exits(protected):
    """The address space goes before the VM does: what is not pinned is unshared first (kvm_arch_flush_shadow_all)."""
    world = World(protected=protected)
    world.guest.write(run(0, 20))
    unmapped = []
    world.host.frames.watch = lambda what, pfns, use: unmapped.append((what, world.leaves.get(1, 0)))
    world.machine.destroy()
    freed = [leaves for what, leaves in unmapped if what in ("free", "orphan")]
    assert freed[0] == (20 if protected == "yes" else 0)  # pinned: it lives on until EL2 has given it back
    world.checker.check_idle()


def test_no_vcpu_keeps_a_translation_of_a_block_that_gives_way_to_pages() -> None:
    """Dirty logging maps small pages where a block of the record is in the way: EL2 takes it back, and invalidates."""
    bench = Bench(PKVM, Setting("2m", (("protected", "no"),)))
    player = Player(bench.host(), 520)
    player.write(range(520))
    player.log_dirty(True)

    player.read(range(100, 103), vcpu=0)
    player.write(range(210, 211), vcpu=1)

    player.check()
    player.exit()
    bench.done(player.host)
