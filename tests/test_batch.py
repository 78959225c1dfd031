"""A batch means the same as its pages one by one in gfn order.

Two machines are made alike. One does each operation as one batch, the other page by page; afterwards they must be in
the same state: entries, attributes, guest_memfd and VMM memory, frames and content, TLBs, the trusted table, and what
was counted. Where an operation fails at a page, both fail there, with the same exit, and what is below is complete.

Table pages of an external root are all alike: which frame a table stands on is left out of the comparison.
"""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from fakes import MEDIATED, PAGE, PINNING, Box, mirror
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import cvmcore.mem.tdp
import cvmcore.pages
from cvmcore.backend import Backend
from cvmcore.backends.default import DEFAULT
from cvmcore.backends.swprot import SWPROT
from cvmcore.guest import Machine, stamps_for
from cvmcore.host import Host
from cvmcore.mem.tdp import TABLE
from cvmcore.pages import Sel, array_of, part, sort_unique
from cvmcore.runner import load_profile_for
from cvmcore.types import PAGE_BYTES, ExitReason, Fatal, MemoryFault, Retry, Use
from cvmcore.vcpu import Touch, Vcpu

PAGES = 3 * 512 + 100
"""The last block is not whole."""

MIRROR = mirror()
LOSSY = mirror(zap_destroys_content=True)
BACKENDS = {"default": DEFAULT, "swprot": SWPROT, "mirror": MIRROR, "lossy mirror": LOSSY, "mediated": MEDIATED}
QUICK = settings(
    max_examples=12,
    deadline=None,
    phases=tuple(Phase)[:-1],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that a batch of some tens of pages is walked in several."""
    monkeypatch.setattr(cvmcore.pages, "PIECE_SCATTERED", 16)
    monkeypatch.setattr(cvmcore.pages, "PIECE_RUN", 48)
    monkeypatch.setattr(cvmcore.mem.tdp, "PIECE_RUN", 600)


# ---- what a batch may be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_a_slice_may_leave_pages_out(backend: Backend) -> None:
    """Every second page converted there and back, written and punched: nothing happens to those between."""
    host = Host(backend, load_profile_for(backend, None), nr_frames=1 << 12)
    machine = Machine(host, 2 * 512 * PAGE_BYTES)
    machine.launch()
    guest, every, odd = machine.guest, slice(0, 64, 2), np.arange(1, 64, 2)
    guest.write(slice(0, 64, 1))
    before = guest.written[odd].tolist()

    for private in (False, True):
        guest.convert(every, private)
        assert guest.check() == []
    guest.write(every)
    assert guest.read(every).tolist() == stamps_for(np.arange(0, 64, 2), int(guest.written[0])).tolist()
    guest.written[every] = 0
    machine.punch(every)
    assert guest.written[odd].tolist() == before
    assert guest.check() == []


def test_pages_before_one_that_leaves_are_touched_from_within_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(SWPROT, load_profile_for(SWPROT, None), nr_frames=1 << 12)
    machine = Machine(host, 8 * PAGE_BYTES)
    machine.launch()
    vcpu, inside = machine.vcpus[0], []
    real = Vcpu._content
    monkeypatch.setattr(Vcpu, "_content", lambda me, *args: (inside.append(me.in_guest), real(me, *args))[1])

    machine.set_private(slice(5, 6, 1), False)
    assert isinstance(vcpu.run(touch := Touch(slice(0, 8, 1), write=True)), MemoryFault)
    assert touch.done == 5 and inside and all(inside)
    assert not vcpu.vcpu.in_guest


# ---- the state of a machine -----------------------------------------------------------------------------------------


def entries_of(box: Box) -> dict[str, dict[int, int]]:
    """Every entry of every root; of a table only that it is one."""
    found: dict[str, dict[int, int]] = {}
    for name, root in [("direct", box.vm.tdp.direct), ("mirror", box.vm.tdp.mirror)]:
        if root is None:
            continue
        for level in range(1, 5):
            words = root.entries[level]
            index = np.flatnonzero(words)
            values = np.where(words[index] & TABLE, words[index] & 31, words[index])
            found[f"{name} {level}"] = dict(zip(index.tolist(), values.tolist(), strict=True))
        found[f"{name} counts"] = dict(enumerate([*root.leaves, *root.tables]))
    return found


def words_of(words: Any) -> dict[int, int]:
    index = np.flatnonzero(words)
    return dict(zip(index.tolist(), words[index].tolist(), strict=True))


def state_of(box: Box) -> dict[str, Any]:
    """Everything that a batch must leave as its pages one by one leave it."""
    frames, memory = box.host.frames, box.host.memory
    inodes = {id(f.inode): f.inode for f in box.vm.gmem_files}
    tables = np.flatnonzero(frames.use == Use.TABLE)
    return {
        "entries": entries_of(box),
        "attributes": words_of(box.vm.attributes.words),
        "lpage": [[info.tolist() for info in slot.lpage.values()] for slot in box.vm.slots],
        "dirty": [words_of(slot.dirty) if slot.dirty is not None else None for slot in box.vm.slots],
        "gmem": [words_of(inode.words) for inode in inodes.values()],
        "mm": [words_of(mapping.words) for mapping in box.process.mm.mappings],
        "use": words_of(np.where(frames.use == Use.TABLE, 0, frames.use)),
        "tables": len(tables),
        "pins": words_of(frames.pins),
        "in_use": (frames.in_use, frames.leaked()),
        "stamps": words_of(memory.stamp),
        "keys": words_of(memory.key),
        "tlb": [list(vcpu.tlb.entries.items()) for vcpu in box.vm.vcpus],
        "trusted": {key: kind if kind == "table" else (kind, frame) for key, (kind, frame) in table_of(box).items()},
        "vm": (box.vm.dead, box.vm.memlock_pages, box.vm.frame.in_progress),
    }


def table_of(box: Box) -> dict[tuple[int, int], tuple[str, int]]:
    table: dict[tuple[int, int], tuple[str, int]] = getattr(box.vm.arch, "entries", {})
    return table


ENTRIES = ("guest_access", "vcpu_enter")


def counted(box: Box) -> dict[str, Any]:
    """What was counted so far: price items, vendor operations, pages of hooks, faults, exits, retries. Not how often
    the vCPU was entered: pages one by one are a KVM_RUN each."""
    vcpu = box.vm.vcpus[0]
    return {
        "counts": dict(box.host.meter.counts),
        "ops": dict(box.host.meter.ops),
        "hooks": {name: hook.pages for name, hook in box.host.ops.hooks.items() if name not in ENTRIES},
        "vcpu": (vcpu.faults, vcpu.exits, vcpu.retries),
    }


def since(box: Box, before: dict[str, Any]) -> dict[str, Any]:
    """What was counted since."""
    now = counted(box)
    found: dict[str, Any] = {
        kind: {name: n - before[kind].get(name, 0) for name, n in now[kind].items() if n != before[kind].get(name, 0)}
        for kind in ("counts", "ops", "hooks")
    }
    found["vcpu"] = tuple(a - b for a, b in zip(now["vcpu"], before["vcpu"], strict=True))
    return found


# ---- operations, in both forms --------------------------------------------------------------------------------------


Touched = tuple[ExitReason | None, int, list[int]]
"""Exit, pages done, stamps read."""


def touch(box: Box, gfns: Sel, write: bool, private: bool, one_by_one: bool) -> Touched:
    """Touch pages until one leaves."""
    if not one_by_one:
        action = box.action(gfns, write=write, private=private)
        leave = box.vcpus[0].run(action)
        seen = [] if action.seen is None else action.seen[: action.done].tolist()
        return leave, action.done, seen
    found: list[int] = []
    for done, gfn in enumerate(array_of(gfns).tolist()):
        action = box.action(gfn, write=write, private=private)
        leave = box.vcpus[0].run(action)
        if leave is not None:
            return leave, done, found
        found += [] if action.seen is None else action.seen.tolist()
    return None, len(array_of(gfns)), found


def ranges(gfns: Sel, one_by_one: bool) -> list[tuple[int, int]]:
    """(first, n) of the contiguous ranges of the gfns, or of each page."""
    pages = array_of(gfns)
    if one_by_one:
        return [(gfn, 1) for gfn in pages.tolist()]
    cuts = np.flatnonzero(np.diff(pages) != 1) + 1
    return [(int(some[0]), len(some)) for some in np.split(pages, cuts) if len(some)]


def convert(box: Box, gfns: Sel, private: bool, one_by_one: bool) -> None:
    """Pages that have it already are left out: the ioctl would zap those that lie in its range, and not the others."""
    words = box.vm.attributes.of(gfns)
    changed = array_of(gfns)[(words != 0) != private]
    for gfn, n in ranges(sort_unique(changed), one_by_one):
        box.set_private(gfn, n, private)


def punch(box: Box, gfns: Sel, one_by_one: bool) -> None:
    for gfn, n in ranges(gfns, one_by_one):
        box.punch(gfn, n)


def discard(box: Box, gfns: Sel, one_by_one: bool) -> None:
    for gfn, n in ranges(gfns, one_by_one):
        box.process.madvise_dontneed(box.hva + gfn * PAGE, n * PAGE)


def allocate(box: Box, gfns: Sel, one_by_one: bool) -> None:
    for gfn, n in ranges(gfns, one_by_one):
        box.process.fallocate(box.gmem, 1, gfn * PAGE, n * PAGE)


def prefault(box: Box, gfns: Sel, one_by_one: bool) -> None:
    for gfn, n in ranges(gfns, one_by_one):
        assert box.vcpus[0].pre_fault_memory(gfn * PAGE, n * PAGE) == ((gfn + n) * PAGE, 0)


# ---- strategies -----------------------------------------------------------------------------------------------------

GFN = st.integers(0, PAGES - 1)
NEAR_EDGES = st.sampled_from([0, 1, 510, 511, 512, 513, 1023, 1024, 1535, 1536, PAGES - 1])
SCATTERED = st.lists(GFN | NEAR_EDGES, min_size=1, max_size=40)
RUN = st.builds(lambda low, n: list(range(low, min(low + n, PAGES))), GFN | NEAR_EDGES, st.integers(1, 70))
MIX = st.builds(lambda some, run: some + run, SCATTERED, RUN)
BATCH: st.SearchStrategy[Sel] = (SCATTERED | RUN | MIX).map(lambda gfns: sort_unique(np.array(gfns)))

OPERATION = st.tuples(
    st.sampled_from(["write", "write", "read", "share", "unshare", "punch", "discard", "allocate", "prefault"]), BATCH
)
STORY = st.lists(OPERATION, min_size=1, max_size=4)


def pair(backend: Backend, backing: str, **host: Any) -> tuple[Box, Box]:
    """Two machines alike: the first takes batches, the second pages."""
    return Box(backend, PAGES, backing=backing, **host), Box(backend, PAGES, backing=backing, **host)


def view(box: Box, gfns: Sel) -> Sel:
    """Those of the gfns that have the attribute of the first: one access kind."""
    if not box.private:
        return gfns
    words = box.vm.attributes.of(gfns)
    return sort_unique(array_of(gfns)[words == words[0]])


def act(box: Box, kind: str, gfns: Sel, one_by_one: bool) -> object:
    """One operation; touches use the view that the first page's attribute asks for."""
    match kind:
        case "write" | "read":
            some = view(box, gfns)
            private = box.private and bool(box.vm.attributes.of(some)[0])
            return touch(box, some, kind == "write", private, one_by_one)
        case "share" | "unshare" if box.private:
            convert(box, gfns, kind == "unshare", one_by_one)
        case "punch" if box.private:
            punch(box, gfns, one_by_one)
        case "allocate" if box.private:
            allocate(box, gfns, one_by_one)
        case "discard":
            discard(box, gfns, one_by_one)
        case "prefault":
            prefault(box, gfns, one_by_one)
    return None


# ---- the property ---------------------------------------------------------------------------------------------------


@pytest.mark.assumes(needs_accept=False, prefault=True)
@pytest.mark.parametrize("backing", ["4k", "2m"])
@pytest.mark.parametrize("name", BACKENDS)
@QUICK
@given(story=STORY)
def test_a_batch_is_its_pages_one_by_one(name: str, backing: str, story: list[tuple[str, Sel]]) -> None:
    """Whole stories: whatever was done before, in whichever form, the next operation means the same."""
    batch, single = pair(BACKENDS[name], backing)

    for kind, gfns in story:
        before = counted(batch), counted(single)
        assert act(batch, kind, gfns, False) == act(single, kind, gfns, True)
        assert state_of(batch) == state_of(single)
        if kind in ("write", "read"):
            # The others are system calls, one for a range or one for each page.
            assert since(batch, before[0]) == since(single, before[1])


# ---- failures -------------------------------------------------------------------------------------------------------


def alike(batch: Box, single: Box, *, above: int | None = None) -> None:
    """Both in the same state; above a page that failed, memory may be allocated, prepared or pinned already."""
    one, other = state_of(batch), state_of(single)
    if above is not None:
        for state in (one, other):
            for name in ("gmem", "mm", "use", "pins", "in_use", "stamps", "tables"):
                del state[name]
            # Tables that are linked and empty may stay.
            state["entries"] = {name: words for name, words in state["entries"].items() if name.endswith(" 1")}
            state["trusted"] = {key: entry for key, entry in state["trusted"].items() if key[0] == 1}
    assert one == other


HOOKS_THAT_STOP = ["set_private_spte", "link_private_spt", "gmem_prepare", "pin_pfn", "topup"]


def stopping(hook: str) -> Backend:
    return MIRROR if hook == "link_private_spt" else PINNING


@pytest.mark.parametrize("hook", HOOKS_THAT_STOP[:4])
@QUICK
@given(gfns=BATCH, data=st.data())
def test_a_hook_that_asks_for_a_retry(hook: str, gfns: Sel, data: st.DataObject) -> None:
    """Whatever page it stops at, however often: the fault is retried there, and all of it is complete in the end."""
    batch, single = pair(stopping(hook), "4k")
    pages = array_of(gfns)
    if hook == "link_private_spt":
        pages = np.unique(pages >> 9 << 9)
    stops = data.draw(st.lists(st.sampled_from(pages.tolist()), min_size=1, max_size=3))
    before = counted(batch), counted(single)
    for box in (batch, single):
        for gfn in stops:
            box.hw.refuse_at(hook, gfn, Retry())

    want = touch(single, gfns, True, True, True)
    got = touch(batch, gfns, True, True, False)

    if hook == "gmem_prepare":
        # A gmem lookup that fails leaves KVM_RUN with -EAGAIN; the VMM enters again.
        assert got == want
        assert got[0] == MemoryFault(min(stops) * PAGE, flags=8, errno=errno.EAGAIN)
        alike(batch, single, above=min(stops))
        return
    assert got == want == (None, len(array_of(gfns)), [])
    alike(batch, single)
    assert batch.hw.refusals == single.hw.refusals == []
    one, other = since(batch, before[0]), since(single, before[1])
    assert one["counts"] == other["counts"]
    assert one["vcpu"] == other["vcpu"]
    assert one["hooks"].get("set_private_spte") == other["hooks"].get("set_private_spte")
    assert one["hooks"].get("link_private_spt") == other["hooks"].get("link_private_spt")


@pytest.mark.parametrize("hook", HOOKS_THAT_STOP)
@QUICK
@given(gfns=BATCH, data=st.data())
def test_a_hook_that_gives_up(hook: str, gfns: Sel, data: st.DataObject) -> None:
    """The same first failure: pages below are complete, the page itself and those above are not mapped."""
    batch, single = pair(stopping(hook), "4k")
    gfns = part(gfns, 0, 16)  # one piece: topup is not told which pages it is for
    pages = array_of(gfns)
    if hook == "link_private_spt":
        pages = np.unique(pages >> 9 << 9)
    at = data.draw(st.sampled_from(pages.tolist()))
    for box in (batch, single):
        if hook == "topup":
            # It is asked for a number of pages: the page at that position fails.
            position = int(np.searchsorted(pages, at))
            box.hw.refuse(hook, 1 if box is batch else position + 1, position if box is batch else 0, Fatal(errno.EIO))
        else:
            box.hw.refuse_at(hook, at, Fatal(errno.EIO))

    want = touch(single, gfns, True, True, True)
    got = touch(batch, gfns, True, True, False)

    assert want[0] is not None
    assert got == want
    assert got[1] == int(np.searchsorted(array_of(gfns), at))
    alike(batch, single, above=at)
    assert batch.mapped() == single.mapped()
    assert [gfn for gfn in batch.mapped() if gfn >= at] == []


@pytest.mark.assumes(needs_accept=False)
@pytest.mark.parametrize("name", BACKENDS)
@QUICK
@given(gfns=BATCH, shared=BATCH, write=st.booleans())
def test_a_page_of_the_other_kind(name: str, gfns: Sel, shared: Sel, write: bool) -> None:
    """The same memory-fault exit at the first page whose attribute does not match the access."""
    batch, single = pair(BACKENDS[name], "2m")
    if not batch.private:
        return
    convert(batch, shared, False, False)
    convert(single, shared, False, False)
    wrong = np.intersect1d(array_of(gfns), array_of(shared))

    got = touch(batch, gfns, write, True, False)

    assert got == touch(single, gfns, write, True, True)
    if len(wrong):
        assert got[0] == MemoryFault(int(wrong[0]) * PAGE, flags=8)
        assert got[1] == int(np.searchsorted(array_of(gfns), wrong[0]))
    alike(batch, single)


@pytest.mark.assumes(needs_accept=False)
@pytest.mark.parametrize("backend", [SWPROT, MIRROR], ids=["swprot", "mirror"])
@QUICK
@given(gfns=BATCH, data=st.data())
def test_a_poisoned_page(backend: Backend, gfns: Sel, data: st.DataObject) -> None:
    batch, single = pair(backend, "4k")
    at = data.draw(st.sampled_from(array_of(gfns).tolist()))
    for box in (batch, single):
        box.touch(at)
        box.process.memory_failure(box.gmem, at * PAGE)

    got = touch(batch, gfns, True, True, False)

    assert got == touch(single, gfns, True, True, True)
    assert got[0] == MemoryFault(at * PAGE, flags=8, errno=133)
    alike(batch, single, above=at)


@pytest.mark.assumes(mediated_root=False)
@pytest.mark.parametrize("backing", ["4k", "2m"])
@pytest.mark.parametrize("name", BACKENDS)
@QUICK
@given(gfns=BATCH, free=st.integers(0, 700))
def test_a_host_that_runs_full(name: str, backing: str, gfns: Sel, free: int) -> None:
    """The same page is the first for which there is no memory."""
    batch, single = pair(BACKENDS[name], backing)
    for box in (batch, single):
        box.host.frames.alloc(box.host.frames.available - free, Use.META)

    got = touch(batch, gfns, True, batch.private, False)

    assert got == touch(single, gfns, True, single.private, True)
    alike(batch, single)


@pytest.mark.parametrize("backend", [DEFAULT, SWPROT, MIRROR], ids=["default", "swprot", "mirror"])
@QUICK
@given(gfns=BATCH, gap=st.integers(1, 1500))
def test_pages_without_a_slot(backend: Backend, gfns: Sel, gap: int) -> None:
    """Two slots with a gap between them: the first page in the gap ends both in the same way."""
    batch, single = pair(backend, "4k")
    start = 2048
    for box in (batch, single):
        fd = box.fd.create_guest_memfd(PAGES * PAGE) if box.private else -1
        flags = 4 if box.private else 0
        hva = box.process.mmap(PAGES * PAGE)
        box.fd.set_user_memory_region2(1, flags, (start + gap) * PAGE, 512 * PAGE, hva, fd, 0)
        if box.private:
            box.set_private(start, gap + 512)
    everywhere = sort_unique(np.concatenate([array_of(gfns), array_of(gfns) + start]))

    got = touch(batch, everywhere, True, batch.private, False)

    assert got == touch(single, everywhere, True, single.private, True)
    alike(batch, single)


@pytest.mark.assumes(dirty_logging=True)
@pytest.mark.parametrize("backing", ["4k", "2m"])
@QUICK
@given(stories=st.lists(BATCH, min_size=1, max_size=3), reads=BATCH)
def test_dirty_logging(backing: str, stories: list[Sel], reads: Sel) -> None:
    """Pages mapped before, written while logged, read while logged: the same log, the same entries."""
    batch, single = pair(DEFAULT, backing)
    touch(batch, stories[0], True, False, False)
    touch(single, stories[0], True, False, True)
    for box in (batch, single):
        box.fd.set_user_memory_region2(0, 1, 0, PAGES * PAGE, box.hva)

    for gfns in stories:
        before = counted(batch), counted(single)
        assert touch(batch, gfns, True, False, False) == touch(single, gfns, True, False, True)
        assert touch(batch, reads, False, False, False) == touch(single, reads, False, False, True)
        alike(batch, single)
        assert since(batch, before[0]) == since(single, before[1])
        log = batch.fd.get_dirty_log(0)
        assert log.tolist() == single.fd.get_dirty_log(0).tolist()
        assert set(array_of(gfns).tolist()) <= set(np.flatnonzero(log).tolist())
        alike(batch, single)

    for box in (batch, single):
        box.fd.set_user_memory_region2(0, 0, 0, PAGES * PAGE, box.hva)
    alike(batch, single)


GUARDED = mirror(needs_accept=True, zap_destroys_content=True)
GUARDED_STORY = st.lists(st.tuples(st.sampled_from(["write", "share", "unshare"]), BATCH), min_size=1, max_size=4)


@QUICK
@given(story=GUARDED_STORY)
def test_accepting(story: list[tuple[str, Sel]]) -> None:
    """Where pages must be accepted before they are used: accepted together, or each."""
    batch, single = pair(GUARDED, "4k")

    for kind, gfns in story:
        if kind == "write":
            some = view(batch, gfns)
            private = bool(batch.vm.attributes.of(some)[0])
            if private:
                assert batch.accept(some) is None
                for gfn in array_of(some).tolist():
                    assert single.accept(slice(gfn, gfn + 1, 1)) is None
            assert touch(batch, some, True, private, False) == touch(single, some, True, private, True)
        else:
            act(batch, kind, gfns, False)
            act(single, kind, gfns, True)
        alike(batch, single)
        assert batch.vm.arch.accepted == single.vm.arch.accepted


def test_touch_of_pages_that_were_not_accepted() -> None:
    """The guest takes an exception at the first; those above are untouched."""
    batch, single = pair(GUARDED, "4k")

    assert touch(batch, slice(0, 4, 1), True, True, False) == touch(single, slice(0, 4, 1), True, True, True)
    assert batch.mapped() == single.mapped()
