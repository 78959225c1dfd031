"""Races, as small cases for every interleaving (`cvmcore.sched.explore`, `cvm explore`): one scenario for each row of
KVM's races and how they are closed, and for each a twin in which what closes it is switched off.

A vendor's own scenarios come by entry point, group `cvmcore.scenarios`: a name, and a tuple of `Scenario`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import attrs
import numpy as np

from cvmcore.backend import Backend
from cvmcore.effects import FAULT_FREEZE, Steps, point
from cvmcore.errors import InputError, PluginError
from cvmcore.mem import fault as fault_path
from cvmcore.mem import invalidate as invalidation
from cvmcore.mem import tdp
from cvmcore.mem.attributes import Attributes
from cvmcore.mem.mmulock import Frame
from cvmcore.pages import run
from cvmcore.plugins import installed, load
from cvmcore.sched import Case
from cvmcore.testing.invariants import ALWAYS, Needs
from cvmcore.testing.world import GFN, PAGE, STAMP, World
from cvmcore.types import Capabilities, GuestException, RetPf, Shutdown
from cvmcore.vcpu import Touch
from cvmcore.vm import Vm

GROUP = "cvmcore.scenarios"
ENTRY_READ = point("entry.read")

Make: TypeAlias = Callable[[Backend], Case]


@attrs.frozen
class Scenario:
    """A race: who races, what must come out, and what closes it.

    make: a fresh case. off: makes a context in which what closes the race is switched off: the twin, in which the race
    must be found. needs: the capability without which there is no such race. alone: backends (by name) that it is for;
    all without.
    """

    name: str
    text: str
    closed_by: str
    make: Make
    off: Callable[[], Any]
    needs: Needs = ALWAYS
    alone: tuple[str, ...] = ()

    @property
    def whose(self) -> str:
        """What a backend must have, or which backends it is for."""
        return f"backend {', '.join(self.alone)}" if self.alone else self.needs.name

    def fits(self, backend: Backend, caps: Capabilities) -> bool:
        """Whether a backend can have this race."""
        return self.needs(caps) and (not self.alone or backend.name in self.alone)


# ---- switching protocols off ------------------------------------------------------------------------------------


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute is another one for a while."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


def no_lock(*names: str) -> Callable[[], Any]:
    """A context in which these locks of a world (`World.without`) lock nobody out."""
    return lambda: patched(World, "without", names)


@contextmanager
def no_stale_check() -> Iterator[None]:
    """A fault does not notice that an invalidation came and went since it looked its page up."""
    with patched(Frame, "moved", lambda self, seen, gfns: False):
        yield


@contextmanager
def no_range_check() -> Iterator[None]:
    """A fault does not notice that an invalidation of its gfn is under way."""
    with patched(Frame, "blocks", lambda self, gfns: False):
        yield


@contextmanager
def no_edges() -> Iterator[None]:
    """A conversion invalidates its own pages only, not the large blocks that it makes mixed; a fault looks at its own
    page only."""
    blocks = Frame.blocks
    edges = patched(Attributes, "with_edges", lambda self, slot, start, end: (start, end))
    with edges, patched(Frame, "blocks", lambda self, gfns: blocks(self, np.array([600]))):
        yield


@contextmanager
def no_freeze() -> Iterator[None]:
    """An entry looks absent while the vendor sets it."""
    set_entry = tdp.Tdp.set_entry

    def thawed(self: Any, root: Any, level: int, index: Any, *rest: Any) -> Steps[Any]:
        steps = set_entry(self, root, level, index, *rest)
        answer: object = None
        try:
            while True:
                effect = steps.send(answer)
                if effect is FAULT_FREEZE:
                    root.entries[level][index] = 0
                answer = yield effect
        except StopIteration as stop:
            return stop.value

    with patched(tdp.Tdp, "set_entry", thawed):
        yield


@contextmanager
def no_second_look() -> Iterator[None]:
    """A fault writes an entry that it has read, and does not compare whether it is still the same."""
    read = tdp.Tdp.read

    def stale(self: Any, *rest: Any) -> Steps[Any]:
        words = yield from read(self, *rest)
        words = words if words is None else words.copy()
        yield ENTRY_READ
        return words

    with patched(tdp.Tdp, "read", stale):
        yield


@contextmanager
def no_flush() -> Iterator[None]:
    """Nobody's TLB is flushed."""

    def nothing(self: Any, start: int, end: int) -> Steps[None]:
        yield from ()

    with patched(Vm, "flush_tlbs", nothing):
        yield


@contextmanager
def no_stale_root() -> Iterator[None]:
    """A fault does not notice that its root was replaced."""
    map_leaf = fault_path._map

    def stale(access: Any, root: Any, *rest: Any) -> Steps[Any]:
        tables = access.vm.tdp
        steps = map_leaf(access, root, *rest)
        tables.root_for = lambda private: root
        try:
            effect = next(steps)
        except StopIteration as stop:
            return stop.value
        finally:
            del tables.root_for
        answer = yield effect
        try:
            while True:
                answer = yield steps.send(answer)
        except StopIteration as stop:
            return stop.value

    with patched(fault_path, "_map", stale):
        yield


@contextmanager
def no_invalid_slot() -> Iterator[None]:
    """A memslot that goes is zapped as it stands, with no INVALID copy, no waiting, and no second look."""
    def zap(self: Any, slot: Any) -> Steps[None]:
        yield from invalidation.flush_slot(self, slot)

    with patched(Vm, "_invalidate_slot", zap):
        yield


@contextmanager
def no_wait_for_notifiers() -> Iterator[None]:
    """A notifier that ends looks for memslots again, as KVM's does, and no swap waited for it."""
    end = invalidation.end

    def looks_again(vm: Vm, ranges: list[Any]) -> Steps[None]:
        if left := [one for one in ranges if any(slot is one[0] for slot in vm.slots)]:
            yield from end(vm, left)

    with no_lock("notifier_count")(), patched(invalidation, "end", looks_again):
        yield


@contextmanager
def no_stable_bindings() -> Iterator[None]:
    """A punch that ends looks for bindings again, as KVM's does, and nothing kept them as they were."""
    end = invalidation.end

    def looks_again(vm: Vm, ranges: list[Any]) -> Steps[None]:
        if left := [one for one in ranges if one[0].gmem and any(bound[2] is one[0] for bound in one[0].gmem.bindings)]:
            yield from end(vm, left)

    with no_lock("invalidate_lock")(), patched(invalidation, "end", looks_again):
        yield


# ---- the scenarios ----------------------------------------------------------------------------------------------


def two_faults(backend: Backend) -> Case:
    world = World(backend)

    def check(results: list[Any]) -> None:
        assert world.mapped
        assert sorted(r.name for r in results) == ["FIXED", "SPURIOUS"], results

    return world.case({"vcpu0": lambda: world.fault(0), "vcpu1": lambda: world.fault(1)}, check)


def two_faults_new_table(backend: Backend) -> Case:
    world = World(backend, pages=1024)
    one, two = run(600, 1), run(601, 1)

    def check(results: list[Any]) -> None:
        assert results == [RetPf.FIXED, RetPf.FIXED], results

    return world.case({"vcpu0": lambda: world.fault(0, one), "vcpu1": lambda: world.fault(1, two)}, check)


def fault_and_punch(backend: Backend) -> Case:
    world = World(backend).used_before()

    def check(results: list[Any]) -> None:
        assert bool(world.inode.words[GFN]) == world.mapped
        if world.vm.caps.fresh_is_zero:
            assert world.read() == 0

    return world.case({"vcpu0": lambda: world.fault(0), "vmm": world.punch}, check)


def fault_and_convert(backend: Backend) -> Case:
    world = World(backend).used_before()

    def check(results: list[Any]) -> None:
        assert not world.mapped or not world.vm.caps.has_mirror, "a shared gfn is mapped private"

    return world.case({"vcpu0": lambda: world.fault(0), "vmm": lambda: world.attributes(False)}, check)


def huge_fault_and_convert(backend: Backend) -> Case:
    world = World(backend, backing="2m", pages=1024, warm=False)
    neighbour = run(700, 1)
    return world.case({"vcpu0": lambda: world.fault(0, run(600, 1)), "vmm": lambda: world.attributes(False, neighbour)})


def two_conversions(backend: Backend) -> Case:
    """Where they overlap, one of the two is the last, for all pages: those in the middle of either are stored apart."""
    world = World(backend, backing="2m", pages=1024, warm=False)
    wide, narrow = run(500, 120), run(540, 60)

    def check(results: list[Any]) -> None:
        words = world.vm.attributes.words
        assert not np.count_nonzero(words[500:540]) and not np.count_nonzero(words[600:620]), "attributes are torn"
        assert np.count_nonzero(words[540:600]) in (0, 60), "attributes are torn"

    return world.case(
        {"vmm0": lambda: world.attributes(False, wide), "vmm1": lambda: world.attributes(True, narrow)}, check
    )


def populate_and_convert(backend: Backend) -> Case:
    """An image page is loaded while it is converted to shared: it is private when the vendor takes it, or not taken."""
    world = World(backend, warm=False, launch=False)
    return world.case({"vmm0": world.populate, "vmm1": lambda: world.attributes(False)})


def populate_and_punch(backend: Backend) -> Case:
    """An image page is loaded while a hole is punched there."""
    world = World(backend, warm=False, launch=False)
    return world.case({"vmm0": world.populate, "vmm1": world.punch})


def convert_and_create(backend: Backend) -> Case:
    """A memslot comes while its pages are converted: which blocks are mixed, it takes from the attributes."""
    world = World(backend, pages=1024, warm=False)
    machine, region = world.machine, world.machine.regions[0]
    machine.vm.set_user_memory_region2(0, 0, 0, 0)
    machine.vm.set_user_memory_region2(1, 0, 1024 << 12, 1 << 12, region.hva)

    def convert() -> Steps[Any]:
        return machine.vm.set_memory_attributes.steps(700 << 12, 325 << 12, 0)

    def create() -> Steps[Any]:
        return machine.vm.set_user_memory_region2.steps(0, 4, 0, region.npages << 12, region.hva, region.gmem_fd, 0)

    return world.case({"vmm0": convert, "vmm1": create})


def fault_and_discard(backend: Backend) -> Case:
    world = World(backend)
    private = not world.vm.caps.private_by_attribute and world.vm.caps.confidential
    if world.vm.caps.private_by_attribute:
        world.machine.set_private(PAGE, False)
    world.machine.process.write(world.machine.regions[0].hva + GFN * 4096, STAMP, 1)
    return world.case({"vcpu0": lambda: world.fault(0, PAGE, private), "host": world.discard})


def fault_and_delete(backend: Backend) -> Case:
    world = World(backend)
    return world.case({"vcpu0": lambda: _faults_once(world), "vmm": world.delete_slot})


def _faults_once(world: World) -> Steps[Any]:
    """A fault that may end in an exit: the slot may be gone."""
    private = world.vm.caps.private_by_attribute or world.vm.caps.confidential
    return world.fault(0, PAGE, private)


def prefault_and_delete(backend: Backend) -> Case:
    world = World(backend)

    def check(results: list[Any]) -> None:
        assert results[0] in ("EAGAIN", "ENOENT", "EFAULT") or isinstance(results[0], tuple), results

    return world.case({"vcpu0": world.prefault, "vmm": world.delete_slot}, check)


def fault_and_close(backend: Backend) -> Case:
    world = World(backend)
    return world.case({"vcpu0": lambda: _faults_once(world), "vmm": world.close_file})


def close_and_delete(backend: Backend) -> Case:
    world = World(backend)
    world.machine.guest.write(PAGE)
    return world.case({"vmm0": world.close_file, "vmm1": world.delete_slot})


def discard_and_delete(backend: Backend) -> Case:
    world = World(backend)
    if world.vm.caps.private_by_attribute:
        world.machine.set_private(PAGE, False)
    return world.case({"host": world.discard, "vmm": world.delete_slot})


def punch_and_delete(backend: Backend) -> Case:
    world = World(backend)
    world.machine.guest.write(PAGE)
    return world.case({"vmm0": world.punch, "vmm1": world.delete_slot})


def touch_and_convert(backend: Backend) -> Case:
    world = World(backend)
    world.machine.guest.write(PAGE)

    def check(results: list[Any]) -> None:
        # A guest may die of what it has not accepted since, and of nothing else.
        assert not isinstance(results[0], Shutdown) or world.vm.dead, results
        assert not world.vm.dead or "not accepted" in world.vm.dead_because, world.vm.dead_because

    return world.case({"vcpu0": lambda: world.touch(0), "vmm": lambda: world.attributes(False)}, check)


def touch_and_discard(backend: Backend) -> Case:
    world = World(backend)
    shared = world.vm.caps.private_by_attribute
    if shared:
        world.machine.set_private(PAGE, False)
    private = not shared and world.vm.caps.confidential
    world.machine.vcpus[0].run(fault_touch(private))
    return world.case({"vcpu0": lambda: world.touch(0, PAGE, private), "host": world.discard})


def fault_touch(private: bool) -> Any:
    """A write of GFN by the guest."""
    return Touch(PAGE, write=True, private=private, stamps=STAMP)


def two_writers(backend: Backend) -> Case:
    world = World(backend)

    def check(results: list[Any]) -> None:
        assert results == [None, None], results
        assert world.read() in (STAMP, STAMP + 1)

    return world.case({"vcpu0": lambda: world.use(0, STAMP), "vcpu1": lambda: world.use(1, STAMP + 1)}, check)


def writer_and_punch(backend: Backend) -> Case:
    world = World(backend).used_before()

    def check(results: list[Any]) -> None:
        left, punched = results
        assert punched is None
        if isinstance(left, Shutdown):
            assert world.vm.dead and world.vm.caps.unaccepted_is_fatal, left
            return
        if isinstance(left, GuestException):
            assert world.vm.caps.needs_accept, left  # what came back has to be accepted again
            return
        kept = world.mapped
        if world.vm.caps.fresh_is_zero or kept:
            assert world.read() == (STAMP if kept else 0)

    return world.case({"vcpu0": lambda: world.use(0), "vmm": world.punch}, check)


def three(backend: Backend) -> Case:
    world = World(backend).used_before()
    return world.case({"vcpu0": lambda: world.fault(0), "vcpu1": lambda: world.fault(1), "vmm": world.punch})


PRIVATE = Needs("private_by_attribute", lambda caps: caps.private_by_attribute)
LARGE_PRIVATE = Needs(
    "private_by_attribute, large private pages", lambda caps: caps.private_by_attribute and caps.max_private_level > 1
)
CONFIDENTIAL = Needs(
    "private_by_attribute, confidential", lambda caps: caps.private_by_attribute and caps.confidential
)
SHARED_ZAPS = Needs("honours_notifiers", lambda caps: caps.honours_notifiers)
FAST_ZAP = Needs(
    "no private_by_attribute, no mediated_root", lambda caps: not caps.private_by_attribute and not caps.mediated_root
)
SLOTS = Needs("no memslots_fixed_after_run", lambda caps: not caps.memslots_fixed_after_run)
PREFAULTS = Needs(
    "prefault, no memslots_fixed_after_run", lambda caps: caps.prefault and not caps.memslots_fixed_after_run
)
MIRROR = Needs("has_mirror", lambda caps: caps.has_mirror)
CONFIDENTIAL_MIRROR = Needs("has_mirror, confidential", lambda caps: caps.has_mirror and caps.confidential)

SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        "fault-punch", "a page is looked up and punched before it is mapped", "seq, tested again under mmu_lock",
        fault_and_punch, no_stale_check, needs=PRIVATE,
    ),
    Scenario(
        "fault-punch-range", "a page is looked up while it is being punched", "the range of the open frame",
        fault_and_punch, no_range_check, needs=PRIVATE,
    ),
    Scenario(
        "fault-convert", "a private fault against a conversion to shared", "the attribute is read after the snapshot",
        fault_and_convert, no_stale_check, needs=PRIVATE,
    ),
    Scenario(
        "fault-convert-huge", "a page is converted while its neighbour is mapped large",
        "head and tail blocks are in the invalidated range", huge_fault_and_convert, no_edges, needs=LARGE_PRIVATE,
    ),
    Scenario(
        "convert-convert", "two conversions that overlap", "slots_lock", two_conversions, no_lock("slots_lock"),
        needs=PRIVATE,
    ),
    Scenario(
        "populate-convert", "an image page is loaded while it is converted", "slots_lock", populate_and_convert,
        no_lock("slots_lock"), needs=CONFIDENTIAL_MIRROR,
    ),
    Scenario(
        "populate-punch", "an image page is loaded while it is punched", "the invalidate lock", populate_and_punch,
        no_lock("invalidate_lock"), needs=CONFIDENTIAL,
    ),
    Scenario(
        "convert-create", "a memslot comes while its pages are converted", "slots_lock", convert_and_create,
        no_lock("slots_lock"), needs=PRIVATE,
    ),
    Scenario(
        "fault-fault", "two vCPUs map one gfn", "the entry is frozen while the vendor sets it", two_faults, no_freeze,
        needs=MIRROR,
    ),
    Scenario(
        "fault-fault-table", "two vCPUs want the same new table", "the parent is frozen until the hook returns",
        two_faults_new_table, no_freeze, needs=MIRROR,
    ),
    Scenario(
        "fault-zap", "an entry is zapped while the vendor sets it", "remove holds mmu_lock to write, install to read",
        fault_and_convert, no_lock("mmu_lock"), needs=MIRROR,
    ),
    Scenario(
        "fault-discard", "the host takes a shared page away while it is being mapped",
        "seq, tested again under mmu_lock", fault_and_discard, no_stale_check, needs=SHARED_ZAPS,
    ),
    Scenario(
        "touch-discard", "a guest uses a translation that is being zapped", "TLBs flushed before mmu_lock is dropped",
        touch_and_discard, no_flush, needs=SHARED_ZAPS,
    ),
    Scenario(
        "touch-convert", "a guest uses a private page that is being converted",
        "TLBs flushed before mmu_lock is dropped", touch_and_convert, no_flush, needs=PRIVATE,
    ),
    Scenario(
        "fault-delete", "a memslot goes under a fault", "INVALID copy, SRCU, and a fresh root", fault_and_delete,
        no_invalid_slot, needs=SLOTS,
    ),
    Scenario(
        "fault-delete-root", "a root is dropped during a fault", "the root is compared under mmu_lock",
        fault_and_delete, no_stale_root, needs=FAST_ZAP,
    ),
    Scenario(
        "prefault-delete", "KVM_PRE_FAULT_MEMORY against a memslot's end", "INVALID copy, SRCU: -EAGAIN",
        prefault_and_delete, no_invalid_slot, needs=PREFAULTS,
    ),
    Scenario(
        "fault-close", "the last descriptor is closed under a fault", "the slot's file is cleared in the frame",
        fault_and_close, no_stale_check, needs=PRIVATE,
    ),
    Scenario(
        "close-delete", "release against unbind", "slots_lock and the invalidate lock", close_and_delete,
        no_lock("slots_lock", "invalidate_lock"), needs=PRIVATE,
    ),
    Scenario(
        "discard-delete", "an hva invalidation straddles a memslot's end", "the swap waits for the notifier",
        discard_and_delete, no_wait_for_notifiers, needs=SLOTS,
    ),
    Scenario(
        "punch-delete", "punch against unbind", "the invalidate lock", punch_and_delete, no_stable_bindings,
        needs=PRIVATE,
    ),
    Scenario(
        "write-write", "two vCPUs enter, fault, accept and write one page", "all of the above",
        two_writers, no_second_look,
    ),
    Scenario(
        "write-punch", "a guest writes a page that is being punched", "all of the above", writer_and_punch,
        no_stale_check,
        needs=PRIVATE,
    ),
    Scenario(
        "fault-fault-punch", "two faults and a punch", "all of the above", three, no_stale_check, needs=PRIVATE,
    ),
)  # fmt: skip

NOT_MODELLED = {
    "seq bumped before in_progress drops": "the model's counters change in one step: there are no memory barriers",
    "subtree freed while others walk": "tables are arrays that nobody frees under a walker: RCU is not modelled",
    "punch against bind": "a punch of a file that nobody is bound to opens no frame; punch-delete has the lock's race",
    "firmware contention": "in fault-fault, where a trusted party may answer busy, and in scenarios of vendors",
    "host GUP pin against in-place conversion to private": "conversion of guest_memfd in place is not modelled",
}
"""Rows of KVM's table of races that have no scenario of their own, and why."""


def scenarios() -> dict[str, Scenario]:
    """All by name: the core's, and those of installed plugins. Raises PluginError."""
    found = {one.name: one for one in SCENARIOS}
    for name in installed(GROUP):
        more = load(GROUP, name, "scenarios")
        if not isinstance(more, tuple) or not all(isinstance(one, Scenario) for one in more):
            raise PluginError(f"scenarios {name}: its entry point names no tuple of Scenario")
        for one in more:
            if one.name in found:
                raise PluginError(f"scenarios {name}: there is a scenario '{one.name}' already")
            found[one.name] = one
    return found


def scenario(name: str) -> Scenario:
    """One by name. InputError where there is none."""
    found = scenarios()
    if name not in found:
        raise InputError(f"there is no scenario '{name}'; there are {', '.join(found)}")
    return found[name]


