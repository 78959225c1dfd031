"""The vendor under the core: batches of guest actions, and what becomes of pages that nobody pins."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from cvmcore.errors import InvariantViolation, UapiError
from cvmcore.guest import Machine
from cvmcore.host import Host
from cvmcore.pages import array_of, run
from cvmcore.plugins import load_backend
from cvmcore.runner import load_profile_for
from cvmcore.testing.invariants import check
from cvmcore.testing.machine import run_machine, uapi_machine
from cvmcore.types import GuestException, MapGpaRange, MemoryFault, Mmio, Refault
from cvmcore.uapi import Process
from cvmcore.vcpu import Accept, Convert, Touch
from cvmcore_sev import ops

MIB = 1 << 20


def machine(name, *, backing="4k", mem=8 * MIB, options=None, **host):
    backend = load_backend(name)
    made = Machine(
        Host(backend, load_profile_for(backend, None), nr_frames=1 << 14, backing=backing, options=options, **host), mem
    )
    made.launch()
    return made


# ---- a guest that validates what is validated ----------------------------------------------------------------------


def accept(m, gfns, level=1):
    return m.vcpus[0].run(Accept(gfns, level=level))


@pytest.mark.parametrize("one_by_one", [False, True], ids=["batch", "one by one"])
def test_a_guest_stops_at_the_first_page_that_is_validated_already(one_by_one):
    m = machine("snp")
    assert accept(m, run(5, 1)) is None
    calls = [run(gfn, 1) for gfn in range(9)] if one_by_one else [run(0, 9)]
    for gfns in calls:
        leave = accept(m, gfns)
        if leave is not None:
            break
    assert isinstance(leave, GuestException) and leave.gfn == 5
    rmp, pfns = m.host.hw.rmp, m.frames_of(run(0, 9))
    assert rmp.asid_pages[m.vm.vm.key] >= 6
    for gfn in range(9):
        entry = int(rmp.word[pfns[gfn]]) if pfns[gfn] else 0
        assert bool(entry & 1 << 11) == (gfn < 6), gfn  # validated below and at it, nothing above
    assert m.host.meter.ops["PVALIDATE"] == 7


def test_a_guest_that_falls_back_to_4k_stops_there_and_touches_no_later_block():
    """2M pages that lie on 4K entries, the second with a page that is validated already; the third is a 2M entry."""
    m = machine("snp", backing="2m")
    for gfn in (0, 512 + 7):
        assert accept(m, run(gfn, 1)) is None  # a 4K PVALIDATE smashes the block
    m2 = Accept(run(0, 3, 512), level=2)
    leave = m.vcpus[0].run(m2)
    assert isinstance(leave, GuestException) and leave.gfn == 0
    rmp = m.host.hw.rmp
    pfns = m.frames_of(run(0, 1536))
    validated = [bool(int(rmp.word[pfn]) & 1 << 11) if pfn else False for pfn in pfns.tolist()]
    assert [i for i, v in enumerate(validated) if v] == [0, 519]


@pytest.mark.parametrize("one_by_one", [False, True], ids=["batch", "one by one"])
def test_a_2m_accept_on_4k_entries_falls_back_and_stops_at_the_shared_page(one_by_one):
    """SIZEMISMATCH (code 6) of the block, then 4K by 4K; no block behind the shared page is tried."""
    m = machine("snp", backing="4k")
    m.vm.set_memory_attributes(5 << 12, 1 << 12, 0)
    for gfns in [run(0, 1, 512), run(512, 1, 512)] if one_by_one else [run(0, 2, 512)]:
        leave = accept(m, gfns, level=2)
        if leave is not None:
            break
    assert isinstance(leave, MemoryFault) and (leave.gfn, leave.private) == (5, True)
    assert m.host.meter.ops["PVALIDATE"] == 1 + 5
    assert m.frames_of(run(512, 1)).tolist() == [0]


def test_a_2m_accept_of_a_2m_entry_is_one_pvalidate_whatever_the_attributes_say():
    """The RMP is what is: prepared as 2M while unassigned, the block is validated at once, with the page in it that the
    VMM has as shared and the nested table therefore maps small. An access then faults (SIZEM) and smashes it."""
    m = machine("snp", backing="2m")
    m.vm.set_memory_attributes(5 << 12, 1 << 12, 0)
    assert accept(m, run(0, 1, 512), level=2) is None
    ops = m.host.meter.ops
    assert (ops["PVALIDATE"], ops.get("PSMASH")) == (1, None)
    assert m.vcpus[0].run(Touch(run(6, 1), write=True, stamps=7)) is None
    assert (ops["PVALIDATE"], ops.get("PSMASH")) == (1, 1)
    leave = m.vcpus[0].run(Touch(run(5, 1), write=True, stamps=8))
    assert isinstance(leave, MemoryFault) and leave.gfn == 5


def spent(m, action):
    """What one KVM_RUN of the action costs: vendor operations and charges."""
    meter = m.host.meter
    ops, counts = meter.ops.copy(), meter.counts.copy()
    leave = m.vcpus[0].run(action)
    return leave, {
        name: n - old.get(name, 0) for now, old in ((meter.ops, ops), (meter.counts, counts)) for name, n in now.items()
    }


def test_part_of_a_2m_page_is_shared_by_way_of_kvms_fault_handler():
    """The first PVALIDATE faults: KVM finds the page mapped, breaks the RMP entry, zaps 2M from the page on in a frame
    of its own, and the guest faults in page by page what it shares."""
    m = machine("snp", backing="2m")
    m.guest.write(run(0, 2048))
    vm = m.vm.vm
    seq = vm.frame.seq
    leave, cost = spent(m, Convert(run(100, 20), private=False))
    assert isinstance(leave, MapGpaRange) and (leave.gfns, leave.exits) == (run(100, 20), 1)
    wanted = {"PSMASH": 1, "PVALIDATE": 20, "SNP_PSC": 1, "fault_fixed": 1 + 20, "vm_exit": 1 + 20 + 1}
    assert {name: cost[name] for name in wanted} == wanted
    assert cost["tlb_flush_base"] == 1 and vm.frame.seq == seq + 1 and not vm.frame.in_progress
    levels = [vm.tdp.direct.level_at(gfn) for gfn in (99, 100, 119, 120, 512, 611, 1023, 1024)]
    assert levels == [0, 1, 1, 0, 0, 0, 0, 2]  # [100, 612) touches the block behind
    m.handle(leave, m.vcpus[0])
    m.guest.shared[100:120] = 1
    assert m.guest.check() == []


@pytest.mark.parametrize(
    ("shared", "mapped", "gfns", "backing"),
    [
        ([311, 900], [], run(0, 300), "2m"),
        ([700], [], run(300, 400), "2m"),
        ([], [], run(451, 700), "2m"),
        ([], [20, 21, 40], run(10, 40), "4k"),
        ([], [20, 600], run(0, 1000), "2m"),
    ],
    ids=["mixed block", "from the middle", "into the next block", "some are mapped", "some blocks are mapped"],
)
def test_a_batch_that_is_accepted_costs_what_its_pages_do_one_by_one(shared, mapped, gfns, backing):
    """A mismatch ends in a zap of 2M from the page on: nothing behind it was faulted in before. What user space has
    faulted in (KVM_PRE_FAULT_MEMORY) is not faulted again."""
    costs = []
    for calls in ([gfns], [run(gfn, 1) for gfn in range(gfns.start, gfns.stop)]):
        m = machine("snp", backing=backing)
        for gfn in shared:
            m.set_private(run(gfn, 1), False)
        for gfn in mapped:
            m.vcpus[0].pre_fault_memory(gfn << 12, 1 << 12)
        total = {}
        for call in calls:
            leave, cost = spent(m, Accept(call))
            assert leave is None
            total = {name: total.get(name, 0) + cost.get(name, 0) for name in total | cost}
        costs.append({name: n for name, n in total.items() if n})
    assert costs[0] == costs[1]


def test_a_2m_mapping_of_a_broken_entry_is_split_by_the_common_fault():
    """Somebody has broken the entry, and the mapping is still large, which row 8 of the invariants sees: the handler
    finds 4K and takes it for spurious."""
    m = machine("snp", backing="2m")
    m.guest.write(run(0, 512))
    vm = m.vm.vm
    m.host.hw.rmp.psmash(run(vm.walk(run(0, 1), True)[1].start, 1))
    with pytest.raises(InvariantViolation, match="larger than max_mapping_level"):
        check(vm)
    _, cost = spent(m, Touch(run(7, 1), write=False))
    assert not cost.get("PSMASH") and cost["vm_exit"] == 1 and cost["hugepage_split"] == 1
    assert vm.tdp.direct.level_at(7) == vm.tdp.direct.level_at(500) == 1


@pytest.mark.parametrize("backing", ["4k", "2m"])
def test_a_write_of_a_private_page_through_the_shared_alias_asks_user_space_to_convert(backing):
    """C=0 needs a page of the hypervisor, else #NPF(RMP), whose error code has no ENC bit: a shared access to what the
    attribute says is private, so a memory-fault exit, and nothing for sev_handle_rmp_fault to break."""
    m = machine("snp", backing=backing)
    m.guest.write(run(0, 512))

    leave = m.vcpus[0].run(Touch(run(3, 4), write=True, private=False, stamps=9))

    assert isinstance(leave, MemoryFault) and (leave.gfn, leave.private) == (3, False)
    assert not m.host.meter.ops.get("PSMASH")
    assert m.guest.check() == []


@pytest.mark.parametrize("touched", [16, 4], ids=["mapped", "absent"])
def test_a_conversion_that_user_space_interrupts_goes_on_where_it_was(touched):
    """Pages that the attribute says are shared cannot be mapped to be rescinded: user space is asked, once each, when
    those before them are rescinded."""
    m = machine("snp")
    m.guest.write(run(0, touched))
    m.set_private(run(6, 2), False)
    action = Convert(run(4, 6), private=False)
    before = m.host.meter.ops["PVALIDATE"]
    leaves, rescinded = [], []
    while (leave := m.vcpus[0].run(action)) is not None:
        leaves.append(leave)
        rescinded.append(m.host.meter.ops["PVALIDATE"] - before)
        if isinstance(leave, MemoryFault):
            m.set_private(slice(leave.gfn, leave.gfn + 1, 1), True)
    assert [type(leave) for leave in leaves] == [MemoryFault, MemoryFault, MapGpaRange]
    assert rescinded == [2, 3, 6] and action.begun == 0



@pytest.mark.parametrize("gfns", [run(100, 200), run(100, 700), run(0, 1024), np.arange(90, 1000, 3)], ids=str)
@pytest.mark.parametrize("back", [False, True])
def test_absent_pages_of_blocks_are_rescinded_as_one_by_one(monkeypatch, gfns, back):
    """The RMP holds 2M entries, and the first small page of each takes its block down: nothing behind it is mapped."""

    def counts(alone):
        if alone:
            monkeypatch.setattr(ops, "Refault", lambda gfn, pages, begun: Refault(gfn, pages=1, begun=begun))
        m = machine("snp", backing="2m")
        assert accept(m, run(0, 2, 512), level=2) is None
        for gfn in (5, 600):
            m.set_private(run(gfn, 1), False)  # takes the block's leaf away
            if back:
                m.set_private(run(gfn, 1), True)
        vcpu = m.vcpus[0]
        leave = vcpu.run(Convert(gfns, private=False))
        return str(leave), vcpu.vcpu.faults, vcpu.vcpu.exits, dict(m.host.meter.counts), dict(m.host.meter.ops)

    together, one_by_one = counts(False), counts(True)
    for world in (together, one_by_one):
        # Whole blocks are tried at 2M only where all of their pages are mapped.
        world[3].pop("pvalidate_2m"), world[4].pop("PVALIDATE")
    assert together == one_by_one


@pytest.mark.parametrize("backing", ["4k", "2m"])
@pytest.mark.parametrize("gfns", [run(2040, 16), np.array([2040, 2045, 2047, 2050]), run(2048, 4)], ids=str)
def test_a_conversion_beyond_the_memslots_asks_user_space(backing, gfns):
    m = machine("snp", backing=backing)
    m.guest.write(run(2040, 4))
    for action in (Convert(gfns, private=False), Convert(run(3000, 2), private=False)):
        above = array_of(action.gfns)
        beyond = int(above[above >= 2048][0])
        assert m.vcpus[0].run(action) == MemoryFault(beyond << 12, 8, errno=errno.EFAULT)


def test_a_guest_of_the_state_machine_asks_for_no_page_back_that_it_has():
    """The VMM alone made some of its pages shared: PVALIDATE would find them valid, and the guest end."""
    guest = uapi_machine("snp")()
    guest.write(gfns=np.arange(512, 560), vcpu=0, private=True)
    guest.set_attributes(run=range(505, 575), private=False)
    guest.convert(gfns=np.arange(505, 570), vcpu=0, private=True)
    assert guest.private[505:570].tolist() == [True] * 7 + [False] * 58
    guest.touch(gfns=np.arange(505, 570), write=True, wrong=False, vcpu=0)
    guest.content_is_intact()
    guest.teardown()


# ---- unpinned encrypted pages ----------------------------------------------------------------------------------------


def move(m):
    """The host compacts all of the guest's memory."""
    region = m.regions[0]
    return m.process.migrate_pages(region.hva, region.npages * 4096)


@pytest.mark.parametrize("name", ["sev", "sev-es"])
@pytest.mark.parametrize("pinning", ["demand", "upfront"])
def test_a_pinned_guest_survives_compaction(name, pinning):
    m = machine(name, options={"pinning": pinning})
    m.guest.write(run(0, 300))
    untouched = 0 if pinning == "upfront" else 2048 - 300
    assert move(m) <= untouched
    assert m.guest.check() == []


@pytest.mark.parametrize("name", ["sev", "sev-es"])
def test_a_page_that_nobody_pins_is_noise_once_the_host_has_moved_it(name):
    """Upfront pinning, and a VMM that forgets to register a part: the host may move it, and the guest reads noise."""
    m = machine(name, options={"pinning": "upfront"})
    region = m.regions[0]
    m.guest.write(run(0, 16))
    m.vm.unregister_region(region.hva, region.npages * 4096)
    m.vm.register_region(region.hva, 8 * 4096)
    assert move(m) == 2048 - 8
    wrong = m.guest.check()
    assert wrong and all("noise" in sentence for sentence in wrong) and "gfn 0x8 " in wrong[0]


def test_a_shared_page_may_be_moved_without_harm():
    m = machine("sev", options={"pinning": "upfront"})
    region = m.regions[0]
    m.vm.unregister_region(region.hva, region.npages * 4096)
    m.guest.convert(run(0, 16), False)
    m.guest.write(run(0, 16), private=False)
    assert move(m) == 2048 and m.guest.check() == []


def test_a_pin_outlives_the_mapping_and_ends_with_the_slot():
    m = machine("sev")
    region = m.regions[0]
    m.guest.write(run(0, 16))
    held = m.host.frames.pins_held
    m.vm.set_user_memory_region2(0, 1, 0, region.npages * 4096, region.hva)  # dirty logging on: mappings change
    assert m.host.frames.pins_held == held and move(m) == 0 and m.guest.check() == []
    m.vm.set_user_memory_region2(0, 0, 0, 0, 0)
    assert m.host.frames.pins_held == 0 and m.host.meter.counts["wbinvd"] >= 1


def test_beyond_rlimit_memlock_a_region_is_refused():
    with pytest.raises(UapiError, match="ENOMEM"):
        machine("sev", options={"pinning": "upfront"}, memlock_limit_bytes=4 * MIB)
    with pytest.raises(UapiError, match="ENOMEM"):
        machine("sev", memlock_limit_bytes=4 * MIB)


# ---- memory that the firmware pins ----------------------------------------------------------------------------------


def page(m, gfn):
    return m.regions[0].hva + gfn * 4096


def sent(m, gfns):
    """The guest's pages as packets, and the session."""
    session = m.vm.memory_encrypt_op("KVM_SEV_SEND_START")["session"]
    ask = [{"guest_uaddr": page(m, gfn), "guest_len": 4096} for gfn in gfns]
    return session, [m.vm.memory_encrypt_op("KVM_SEV_SEND_UPDATE_DATA", one) for one in ask]


@pytest.mark.parametrize("pinning", ["demand", "upfront"])
def test_a_guest_arrives_intact_and_what_was_received_stays_pinned_on_demand_pinning(pinning):
    m = machine("sev", options={"pinning": pinning})
    m.guest.write(run(0, 4))
    session, packets = sent(m, range(4))
    m.vm.memory_encrypt_op("KVM_SEV_SEND_FINISH")

    there = Machine(m.host, 8 * MIB, vcpus=0)
    there.vm.memory_encrypt_op("KVM_SEV_RECEIVE_START", {"policy": 0, "session": session})
    before = m.host.frames.pins_held
    for gfn, packet in enumerate(packets):
        there.vm.memory_encrypt_op("KVM_SEV_RECEIVE_UPDATE_DATA", {"guest_uaddr": page(there, gfn), **packet})
    there.vm.memory_encrypt_op("KVM_SEV_RECEIVE_FINISH")
    assert m.host.frames.pins_held - before == (4 if pinning == "demand" else 0)
    assert move(there) == 0
    memory = m.host.memory
    old, new = (machine_.frames_of(run(0, 4)) for machine_ in (m, there))
    assert memory.read(new, there.vm.vm.key).tolist() == memory.read(old, m.vm.vm.key).tolist()
    there.vm.close()
    m.process.exit()
    assert m.host.frames.pins_held >= 0


def test_a_send_or_receive_that_crosses_a_page_is_refused():
    m = machine("sev")
    m.guest.write(run(0, 2))
    m.vm.memory_encrypt_op("KVM_SEV_SEND_START")
    with pytest.raises(UapiError, match=r"EINVAL.*crosses a page"):
        m.vm.memory_encrypt_op("KVM_SEV_SEND_UPDATE_DATA", {"guest_uaddr": page(m, 0) + 16, "guest_len": 4096})
    with pytest.raises(UapiError, match=r"EINVAL.*crosses a page"):
        m.vm.memory_encrypt_op(
            "KVM_SEV_RECEIVE_UPDATE_DATA", {"guest_uaddr": page(m, 0) + 16, "hdr": b"", "trans": bytes(4096)}
        )


def test_a_secret_stays_pinned_on_demand_pinning_until_the_guest_is_gone():
    backend = load_backend("sev")
    m = Machine(Host(backend, load_profile_for(backend, None), nr_frames=1 << 14), MIB, vcpus=0)
    m.vm.memory_encrypt_op("KVM_SEV_LAUNCH_START", {"policy": 0})
    m.vm.memory_encrypt_op("KVM_SEV_LAUNCH_MEASURE", {"len": 48})
    with pytest.raises(UapiError, match="EIO"):
        m.vm.memory_encrypt_op("KVM_SEV_LAUNCH_SECRET", {"guest_uaddr": page(m, 3) + 4, "secret": bytes(16)})
    assert m.host.frames.pins_held == 0  # a command that failed pins nothing
    m.vm.memory_encrypt_op("KVM_SEV_LAUNCH_SECRET", {"guest_uaddr": page(m, 3), "secret": b"s" * 16})
    assert m.host.frames.pins_held == 1 and move(m) == 0
    m.destroy()
    assert m.host.frames.pins_held == 0


# ---- random calls, with memory pinned by its region ------------------------------------------------------------------


@pytest.mark.parametrize("backing", ["4k", "2m"])
@pytest.mark.parametrize("name", ["sev", "sev-es"])
def test_the_state_machine_with_upfront_pinning(name, backing):
    """Regions come and go under a guest that runs: what is not pinned is noise once it was moved, the rest intact."""
    run_machine(name, backing=backing, options={"pinning": "upfront"}, examples=6, shrink=False)


@pytest.mark.parametrize("name", ["sev-es", "snp"])
def test_a_vcpu_runs_only_from_a_save_area_that_the_launch_took_in(name):
    backend = load_backend(name)
    process = Process(Host(backend, load_profile_for(backend, None)))
    vm = process.create_vm()
    early = vm.create_vcpu()
    with pytest.raises(UapiError, match="save area") as caught:
        early.run(Touch(run(1, 1), write=True))
    assert caught.value.errno == errno.EINVAL
    vm.launch_finish()
    late = vm.create_vcpu()
    assert isinstance(early.run(Touch(run(1, 1), write=True)), Mmio | MemoryFault)  # there is no memory, but it ran
    with pytest.raises(UapiError, match="save area"):
        late.run(Touch(run(1, 1), write=True))
