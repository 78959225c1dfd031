"""KVM's side: the hooks in the core's order, against the real hypervisor and a small stand-in for the core."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvmcore.backend import parse_options
from cvmcore.cost import COMMON, COMMON_PROFILE, load_profile
from cvmcore.errors import HardwareError, InputError, UapiError
from cvmcore.hookspecs import HOOKS
from cvmcore.pages import array_of, count, part, run, sort_unique
from cvmcore.types import Change, Done, Exit, Fatal, HostMode, HostVerdict, Refault, Retry
from cvmcore_pkvm.cost import CHARGES, PARTS, PROFILE
from cvmcore_pkvm.ops import PKVM

ENOMEM, EFAULT = Fatal(errno.ENOMEM, "no page for EL2's tables"), errno.EFAULT


def counts(core: Any) -> dict[str, Any]:
    return {"ops": dict(core.host.meter.ops), "parts": dict(core.host.meter.counts)}


# ---- the backend --------------------------------------------------------------------------------------------------


def test_profile_prices_what_is_charged() -> None:
    profile = load_profile(PROFILE, required=COMMON | PKVM.charges, resolve=lambda name: COMMON_PROFILE)

    assert PKVM.charges == CHARGES
    assert profile.ns_by_item()["hvc"] == 306


def test_hooks_exist() -> None:
    """Every hook implementation has the name of a hook."""
    implemented = {name for name in dir(PKVM.make()) if hasattr(getattr(PKVM.make(), name), "cvmcore_impl")}

    assert {"set_private_spte", "guest_convert", "host_access"} <= implemented <= set(HOOKS)


def test_every_kind_of_work_has_parts() -> None:
    from cvmcore_pkvm import hw

    kinds = {
        value for name, value in vars(hw).items() if name.isupper() and isinstance(value, str) and name.lower() == value
    }
    assert kinds == set(PARTS)


def test_capabilities(make_core: Any) -> None:
    protected = make_core().ops.capabilities({"protected": "yes"})
    plain = make_core().ops.capabilities({"protected": "no"})

    assert protected.mediated_root and protected.needs_pin and protected.conversion_keeps_content
    assert not (protected.honours_notifiers or protected.dirty_logging or protected.prefault or protected.gmem_backed)
    assert (protected.max_private_level, plain.max_shared_level) == (1, 2)
    assert plain.honours_notifiers and not plain.needs_pin


@pytest.mark.parametrize("pages", ["0", "513", "-1"])
def test_a_call_covers_at_most_a_table(pages: str) -> None:
    with pytest.raises(InputError, match=f"batch: a call covers 1 to 512 pages, not {pages}"):
        parse_options(PKVM.options, {"batch": pages}, "backend pkvm")


# ---- first touch --------------------------------------------------------------------------------------------------


def test_first_touch_costs_the_sum_of_its_parts(make_core: Any) -> None:
    """One donation: a trap, two entries, one broken host entry, cache work; the page is pinned and charged."""
    core = make_core()
    assert core.fault(run(0, 2), run(100, 2)) == (2, None)  # tables, memcache
    core.host.meter.counts.clear()
    core.host.meter.ops.clear()

    assert core.fault(run(5, 1), run(105, 1)) == (1, None)

    assert core.host.meter.ops == {"__pkvm_host_donate_guest": 1}
    assert core.host.meter.counts == {
        "hvc": 1 + 1, "el2_dispatch": 1 + 1,  # the call; the host's fault on the page that it has cleared
        "el2_pte_update": 2, "tlbi_page": 1, "host_refill_4k": 1, "donate_guest_extra": 1, "gup_pin_4k": 1,
    }  # fmt: skip
    assert (core.host.frames.pins[105], core.vm.memlock_left) == (1, 4096 - 3)
    access = core.access(np.array([0, 5, 6]))
    assert access.status.tolist() == [0, 0, 1]
    assert access.pfns[:2].tolist() == [100, 105]


def test_conversion_cost(make_core: Any) -> None:
    """A share is a trap and two entries; an unshare adds the invalidation and the host's refill."""
    core = make_core()
    core.fault(run(0, 64), run(100, 64))
    for private, extra in ((False, {}), (True, {"tlbi_page": 64, "host_refill_4k": 64})):
        core.host.meter.counts.clear()

        assert core.convert(run(0, 64), private) == Done(64)

        assert core.host.meter.counts == {"hvc": 64, "el2_dispatch": 64, "el2_pte_update": 128} | extra


def test_conversion_batches(make_core: Any) -> None:
    """`batch` saves traps, not invalidations; `conversion=exit` tells user space."""
    core = make_core(batch=512, conversion="exit")
    core.fault(run(0, 64), run(100, 64))
    core.host.meter.counts.clear()

    result = core.convert(run(0, 64), False)
    assert isinstance(result, Exit) and result.n == 64
    assert core.host.meter.counts == {"hvc": 1, "el2_dispatch": 1, "el2_pte_update": 128}


def test_share_of_an_absent_page_is_replayed(make_core: Any) -> None:
    core = make_core()
    core.fault(run(0, 4), run(100, 4))
    core.host.meter.ops.clear()

    assert core.convert(run(0, 8), False) == Refault(4, 4, pages=4)
    assert core.host.meter.ops == {"MEM_SHARE": 5}
    assert core.fault(run(4, 1), run(104, 1)) == (1, None)
    assert core.convert(run(4, 1), False) == Done(1)
    # Taking back a page that was never there is refused, and so is sharing twice.
    assert core.convert(run(5, 1), True) == Done(0)
    assert core.convert(run(0, 1), False) == Done(0)


def test_share_of_a_range_with_an_absent_page(make_core: Any) -> None:
    """The fault is where the page is absent; the whole call is made again."""
    core = make_core(batch=16)
    core.fault(run(0, 4), run(100, 4))

    assert core.convert(run(0, 5), False) == Refault(4, 0)
    assert core.fault(run(4, 1), run(104, 1)) == (1, None)
    assert core.convert(run(0, 5), False) == Done(5)
    assert core.host.meter.ops["MEM_SHARE"] == 2


def test_share_of_absent_pages_is_told_when_all_are_shared(make_core: Any) -> None:
    """With `conversion=exit`, what was shared before a fault is told with what is behind it; each fault is a call."""
    core = make_core(conversion="exit")
    core.fault(run(0, 2), run(100, 2))
    core.host.meter.ops.clear()

    assert core.convert(run(0, 5), False) == Refault(2, pages=3, begun=2)
    assert core.fault(run(2, 3), run(102, 3)) == (3, None)
    told = core.convert(run(0, 5), False, begun=2, faults=2)
    assert isinstance(told, Exit) and told.n == 5
    assert core.host.meter.ops["MEM_SHARE"] == 3 + 2 + 3


def test_refused_call_in_a_batch_counts_once(make_core: Any) -> None:
    """The core asks again for what is left of a batch: the call that fails is counted then."""
    core = make_core()
    core.fault(run(0, 4), run(100, 4))
    core.host.meter.ops.clear()

    assert core.convert(run(0, 8), True) == Done(0)
    assert core.convert(run(1, 3), False) == Done(3)
    assert core.convert(run(1, 4), True) == Done(3)
    assert core.convert(run(4, 1), True) == Done(0)

    assert core.host.meter.ops == {"MEM_SHARE": 3, "MEM_UNSHARE": 1 + 3 + 1}


# ---- limits -------------------------------------------------------------------------------------------------------


def test_memlock_limit(make_core: Any) -> None:
    """Pages below the limit are mapped; the one beyond it ends with ENOMEM, unpinned."""
    core = make_core(memlock_pages=5)

    assert core.fault(run(0, 8), run(100, 8)) == (5, Fatal(errno.ENOMEM, "RLIMIT_MEMLOCK"))
    assert core.host.frames.pins[100:108].tolist() == [1] * 5 + [0] * 3
    assert core.vm.memlock_left == 0


def test_no_frames_for_tables(make_core: Any) -> None:
    """Where the host has no page left for EL2's tables, faults end with ENOMEM and nothing stays pinned beyond."""
    core = make_core()
    assert core.fault(run(0, 1), run(100, 1)) == (1, None)
    core.host.frames.left = 3

    done, reason = core.fault(run(1, 3000), run(101, 3000))

    assert (done, reason) == (1024, Retry())  # gfns 512 and 1024 took a table each; two must be in hand
    assert core.host.frames.pins[100:].nonzero()[0].tolist() == list(range(done + 1))
    assert core.vm.memlock_left == 4096 - 1 - done
    assert core.fault(run(done + 1, 1), run(101 + done, 1)) == (0, ENOMEM)
    core.hyp.check_legal()


def test_el2_vm_cannot_be_made(make_core: Any) -> None:
    core = make_core()
    core.host.frames.left = 1

    with pytest.raises(UapiError) as refused:
        core.fault(run(0, 1), run(100, 1))
    assert refused.value.errno == errno.ENOMEM and not core.vm.bugs


def test_frame_that_is_not_the_hosts(make_core: Any) -> None:
    """Two VMs on one frame: EL2 refuses the second, and KVM_RUN says so; the first is untouched."""
    core = make_core()
    other = core.make_vm(vm_id=1)
    assert core.fault(run(0, 4), run(100, 4)) == (4, None)

    done, reason = core.fault(run(0, 4), run(98, 4), vcpu=other.vcpus[0])

    assert (done, reason) == (2, Fatal(errno.EPERM, "EL2 does not map gfn 0x2: EPERM"))
    assert not other.bugs and not core.vm.bugs
    assert core.host.frames.pins[98:104].tolist() == [1, 1, 1, 1, 1, 1]
    core.hyp.check_legal()


def test_vcpus_after_the_vm_has_run(make_core: Any) -> None:
    core = make_core(nr_vcpus=2)
    core.fault(run(0, 1), run(100, 1))

    with pytest.raises(UapiError) as refused:
        core.do(core.ops.vcpu_create(type(core.vcpu)(core.vm, 2)))
    assert refused.value.errno == errno.EBUSY
    assert core.fault(run(1, 1), run(101, 1), vcpu=core.vm.vcpus[1]) == (1, None)


def test_too_many_vms(make_core: Any) -> None:
    core = make_core()
    for vm_id in range(1, 255):
        core.make_vm(vm_id=vm_id, nr_vcpus=0)

    with pytest.raises(UapiError) as refused:
        core.make_vm(vm_id=255)
    assert refused.value.errno == errno.ENOMEM


def test_memslots(make_core: Any) -> None:
    core = make_core()

    def prepare(new: Any, change: Change) -> int:
        try:
            core.ops.memslot_prepare(core.vm, new, change)
        except UapiError as error:
            return error.errno
        return 0

    slot = type(core.slot)
    assert prepare(None, Change.DELETE) == 0
    assert prepare(slot(2), Change.CREATE) == errno.EPERM
    assert prepare(slot(1), Change.FLAGS_ONLY) == errno.EPERM
    core.fault(run(0, 1), run(100, 1))
    assert prepare(None, Change.DELETE) == errno.EPERM
    assert prepare(slot(), Change.MOVE) == errno.EPERM
    assert prepare(slot(), Change.CREATE) == 0


def test_launch(make_core: Any) -> None:
    """The image is plain writes, and the guest finds it after donation."""
    core = make_core()
    batch = core.batch(run(0, 2), run(100, 2))

    assert core.ops.launch_update(core.vm, batch, [b"firmware", b""], "normal") is None
    assert core.ops.launch_update(core.vm, batch, [b""] * 2, "secrets").reason.errno == errno.EINVAL
    assert core.fault(run(0, 2), run(100, 2)) == (2, None)
    stamp = int(core.host.memory.stamp[100])
    assert core.host.memory.bytes_of(stamp).rstrip(b"\0") == b"firmware"
    assert core.ops.launch_update(core.vm, batch, [b""] * 2, "normal").reason.errno == errno.EBUSY


# ---- races and pins -----------------------------------------------------------------------------------------------


def test_pins_of_faults_under_way(make_core: Any) -> None:
    """Two faults on one gfn hold one pin; it goes with the last of them unless one has mapped the page."""
    core = make_core()
    core.do(core.ops.vcpu_enter(core.vcpu))
    core.ops.topup(core.vm, core.vcpu)
    batch = core.batch(run(0, 2), run(100, 2))
    pin = lambda: core.do(core.ops.pin_pfn(core.vm, core.vcpu, batch))  # noqa: E731
    unpin = lambda: core.ops.unpin_pfn(core.vm, batch)  # noqa: E731

    assert pin() is None and pin() is None
    assert (core.host.frames.pins[100:102].tolist(), core.vm.memlock_left) == ([1, 1], 4094)
    unpin()
    assert core.host.frames.pins[100:102].tolist() == [1, 1]
    unpin()
    assert (core.host.frames.pins[100:102].tolist(), core.vm.memlock_left) == ([0, 0], 4096)

    pin()
    pin()
    assert core.do(core.ops.set_private_spte(core.vm, core.vcpu, batch)) is None
    unpin()
    assert core.host.frames.pins[100:102].tolist() == [1, 1]
    assert pin() is None  # a fault that another vCPU has resolved


def test_a_page_that_is_pinned_while_el2_is_asked_is_pinned_once(make_core: Any) -> None:
    """Of a batch one page is mapped, so that EL2 is asked for poison; another vCPU maps the other page meanwhile."""
    core = make_core()
    gfns, pfns = np.array([0, 2]), np.array([100, 102])
    assert core.fault(run(0, 1), run(100, 1)) == (1, None)
    steps = core.ops.pin_pfn(core.vm, core.vcpu, core.batch(gfns, pfns))
    next(steps)

    assert core.fault(run(2, 1), run(102, 1)) == (1, None)
    assert core.do(steps) is None

    assert core.host.frames.pins[pfns].tolist() == [1, 1]
    assert core.vm.memlock_left == 4096 - 2


# ---- what the host does -------------------------------------------------------------------------------------------


def test_host_access(make_core: Any) -> None:
    """User space dies, a fixup gets -EFAULT, the bare kernel destroys the page; shared pages are the host's to use."""
    core = make_core()
    core.fault(run(0, 4), run(100, 4))
    core.convert(run(3, 1), False)
    core.host.memory.write(run(100, 4), 9, 0)

    assert core.host_access(run(103, 10), HostMode.USER) is HostVerdict.OK
    assert core.host_access(run(102, 2), HostMode.USER) is HostVerdict.SIGSEGV
    assert core.host_access(run(98, 4), HostMode.FIXUP) is HostVerdict.EFAULT
    assert core.host.memory.stamp[100:104].tolist() == [9, 9, 9, 9]
    assert core.host_access(run(101, 4), HostMode.KERNEL) is HostVerdict.RECLAIMED
    assert core.host.memory.stamp[100:104].tolist() == [9, 0, 0, 9]
    assert core.host.meter.ops["__pkvm_force_reclaim_guest_page"] == 2
    core.hyp.check_legal()
    with pytest.raises(HardwareError, match="EPERM"):
        core.host_access(core.hyp.vm_of(0x1000).pgd, HostMode.KERNEL)


def test_host_access_to_a_leaked_page(make_core: Any) -> None:
    """A page whose VM was finalised around it stays out of reach: the kernel that touches it never gets on."""
    core = make_core()
    core.fault(run(0, 4), run(100, 4))

    core.destroy([core.batch(run(0, 3), run(100, 3))])

    assert core.host_access(run(100, 3), HostMode.KERNEL) is HostVerdict.OK
    with pytest.raises(HardwareError, match="EAGAIN"):
        core.host_access(run(100, 4), HostMode.KERNEL)
    core.hyp.check_legal()


def test_poisoned_page_ends_kvm_run(make_core: Any) -> None:
    """The guest's touch of a page that the host destroyed comes back as -EFAULT; pin and charge stay till teardown."""
    core = make_core()
    core.fault(run(0, 4), run(100, 4))
    core.host_access(run(102, 1), HostMode.KERNEL)

    assert core.access(run(0, 4)).status.tolist() == [0, 0, 1, 0]
    assert core.fault(run(2, 1), run(102, 1)) == (0, Fatal(EFAULT, "the page was destroyed"))
    assert core.host.meter.ops["__pkvm_vcpu_in_poison_fault"] == 1
    assert core.host.frames.pins[102] == 1
    assert core.convert(run(2, 1), False) == Done(0)

    core.destroy([core.batch(run(0, 4), run(100, 4))])
    assert not core.host.frames.pins.any() and not core.host.frames.leaks


# ---- the end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ran", [False, True])
def test_everything_comes_back(make_core: Any, ran: bool) -> None:
    """After the VM's end the host has all frames, no pins, no charge; private pages are cleared, shared ones kept."""
    core = make_core(nr_vcpus=2)
    mapped = []
    if ran:
        core.fault(run(0, 700), run(100, 700))
        core.fault(run(5000, 1), run(900, 1), vcpu=core.vm.vcpus[1])
        core.host.memory.write(run(100, 700), 9, 0)
        core.convert(run(10, 2), False)
        mapped = [core.batch(run(0, 700), run(100, 700)), core.batch(run(5000, 1), run(900, 1))]

    core.destroy(mapped)

    assert core.host.frames.given == set()
    assert not core.host.frames.pins.any()
    assert (core.vm.memlock_left, core.vm.bugs) == (4096, [])
    assert np.flatnonzero(core.host.memory.stamp).tolist() == ([110, 111] if ran else [])
    assert not (core.hyp.frame & 0x33).any()
    core.hyp.check_legal()


def test_page_that_el2_keeps_is_leaked(make_core: Any) -> None:
    """A leaf that KVM records and EL2 does not know: the frame is leaked, and KVM only warns."""
    core = make_core()
    core.fault(run(0, 4), run(100, 4))
    core.fault(run(6, 1), run(106, 1))

    core.destroy([core.batch(run(0, 7), run(100, 7))])

    assert core.host.frames.leaks == [104, 105]
    assert not core.vm.bugs
    assert not core.host.frames.pins.any()


# ---- non-protected VMs --------------------------------------------------------------------------------------------


def test_np(make_core: Any) -> None:
    """np VMs share pages and blocks with the host, unpinned, and give them back at once."""
    core = make_core(protected="no")

    assert core.fault(run(512, 2, 512), run(512, 2, 512), 2) == (2, None)
    assert core.fault(run(1600, 8), run(1600, 8)) == (8, None)
    access = core.access(run(600, 8))
    assert (access.status, access.pfns) == (0, run(600, 8))
    assert core.host_access(run(512, 1100), HostMode.USER) is HostVerdict.OK
    assert core.convert(run(600, 8), False) == Done(8)
    assert not core.host.frames.pins.any()
    core.hyp.check_legal()

    core.do(core.ops.remove_private_spte(core.vm, core.batch(run(1600, 4), run(1600, 4))))
    assert core.access(run(1600, 8)).status.tolist() == [1] * 4 + [0] * 4
    assert core.host.meter.ops["__pkvm_host_unshare_guest"] == 4
    state, frames = core.ops.read_private_spte(core.vm, np.array([0, 512, 1024, 1536]), 2)
    assert (state.tolist(), frames.tolist()) == ([0, 1, 1, 2], [0, 512, 1024, 0])
    state, frames = core.ops.read_private_spte(core.vm, run(1602, 4), 1)
    assert (state.tolist(), frames.tolist()) == ([0, 0, 1, 1], [0, 0, 1604, 1605])

    core.destroy([core.batch(run(512, 2, 512), run(512, 2, 512), 2), core.batch(run(1604, 4), run(1604, 4))])
    assert core.host.frames.given == set() and not core.vm.bugs
    assert not (core.hyp.frame & 0x33).any()


def test_np_read_only_slot(make_core: Any) -> None:
    core = make_core(protected="no")
    core.slot.flags = 2

    core.fault(run(0, 1), run(100, 1))

    assert (core.access(run(0, 1), write=False).status, core.access(run(0, 1)).status) == (0, 1)


# ---- batches ------------------------------------------------------------------------------------------------------

pages = st.one_of(st.integers(0, 20), st.integers(500, 524), st.integers(1020, 1028), st.just(2200))
gfns = st.lists(pages, min_size=1, max_size=24).map(sort_unique)
runs = st.builds(run, pages, st.integers(1, 30))
steps = st.tuples(st.sampled_from(["fault", "share", "unshare", "touch"]), st.one_of(gfns, runs))


def step(core: Any, op: str, sel: Any) -> None:
    """One step with a selector; a guest goes on behind a page whose conversion is refused."""
    if op == "fault":
        assert core.fault(sel, sort_unique(array_of(sel) + 1))[1] is None
    elif op == "touch":
        core.host_access(sel, HostMode.KERNEL)
    else:
        while count(sel):
            done = core.convert(sel, op == "unshare").n
            sel = part(sel, max(done, 1), count(sel))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=st.lists(steps, max_size=6))
def test_hooks_do_not_depend_on_the_batch(make_core: Any, history: list[Any]) -> None:
    """Faults, conversions and host accesses in whole batches, and page by page: the same states, counts, charges."""
    batched, single = make_core(), make_core()
    mapped: set[int] = set()
    for op, sel in history:
        wanted = set(array_of(sel).tolist())
        wanted = wanted - mapped if op == "fault" else wanted & mapped if op != "touch" else wanted
        mapped |= wanted if op == "fault" else set()
        if wanted:
            step(batched, op, sort_unique(list(wanted)))
        for page in sorted(wanted):
            step(single, op, run(page, 1))
    batched.hyp.check_legal()

    for name in ("frame", "refcount", "owner", "owner_gfn", "host_table"):
        assert getattr(batched.hyp, name).tolist() == getattr(single.hyp, name).tolist(), name
    assert batched.hyp.counts == single.hyp.counts
    assert counts(batched) == counts(single)
    assert batched.host.memory.stamp.tolist() == single.host.memory.stamp.tolist()
    assert batched.host.frames.given == single.host.frames.given
    assert batched.host.frames.pins.tolist() == single.host.frames.pins.tolist()
    assert batched.vm.arch.vcpus[0].memcache == single.vm.arch.vcpus[0].memcache
    assert batched.vm.memlock_left == single.vm.memlock_left
