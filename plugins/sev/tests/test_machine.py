"""The vendor under the core: batches of guest actions, and what becomes of pages that nobody pins."""

from __future__ import annotations

import pytest

from cvmcore.errors import UapiError
from cvmcore.guest import Machine
from cvmcore.host import Host
from cvmcore.pages import run
from cvmcore.plugins import load_backend
from cvmcore.runner import load_profile_for
from cvmcore.types import GuestException
from cvmcore.vcpu import Accept

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
