"""Conformance: what every backend must do, whatever it protects and however. `CHECKS` is the table.

A check drives a backend through the UAPI and looks at all invariants after every call; what it asks for beyond that is
in its docstring. It names the capability that it needs, or the hook where no capability tells of it: a backend without
it is not asked. That is the only reason for which a check is left out, and each that is left out is listed.

Run it as

    test_conformance = conformance("name")          in a test file of the backend (needs pytest)
    pytest --cvm-backend name --pyargs cvmcore.testing.suite
    cvm check name

All checks run in each `Setting`: as the backend is by default, on a host that backs memory with 2 MiB pages, and with
each other choice of each of its options.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, TypeAlias

import attrs
import numpy as np

from cvmcore.backend import Backend
from cvmcore.errors import CvmError, InputError, InvariantViolation, UapiError
from cvmcore.events import Event
from cvmcore.hookspecs import API_VERSION, HOOKS
from cvmcore.host import Host
from cvmcore.observers import observes
from cvmcore.runner import load_profile_for
from cvmcore.sched import Lockdep, explore
from cvmcore.testing.faults import ANSWERS, MEMORY, TRY_LOCK, Failures
from cvmcore.testing.invariants import ALWAYS, Needs
from cvmcore.testing.player import Died, Player
from cvmcore.testing.reach import fingerprint
from cvmcore.testing.recorder import Recorder, process_of, recording
from cvmcore.testing.scenarios import scenarios
from cvmcore.testing.state import peek
from cvmcore.testing.story import BLOCK, SMALL, Places, Tale, spread
from cvmcore.testing.workbench import Bench, Setting, frames_are_the_hosts, settings_of
from cvmcore.types import (
    PAGE_BYTES,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    Capabilities,
    HostMode,
    HostVerdict,
    MemoryFault,
    Use,
)
from cvmcore.uapi import FALLOC_FL_KEEP_SIZE
from cvmcore.vcpu import Accept, Convert, Touch

SOME = [1, 2, 3, 4, 7, 9, 10, 11, 17, 20]
"""Pages that are neither a run nor far apart."""


# ---- the table ------------------------------------------------------------------------------------------------

Run: TypeAlias = Callable[[Bench], None]


@attrs.frozen
class Check:
    """One check: its name, what it asks (a sentence), the capability that it needs, and the function."""

    name: str
    text: str
    needs: Needs
    run: Run
    policies: bool = False
    """Looked at under policies of the core, too."""
    once: bool = False
    """Looked at in the default settings only, since options change nothing of it, or since it takes long."""
    hook: str = ""
    """The hook that it is about, where no capability says whether a backend implements it."""


CHECKS: list[Check] = []
"""All checks, in the order in which they run: quick ones first."""


def check(
    name: str, needs: Needs = ALWAYS, *, policies: bool = False, once: bool = False, hook: str = ""
) -> Callable[[Run], Run]:
    """Put a function into the table."""

    def add(run: Run) -> Run:
        text = (run.__doc__ or "").partition("\n")[0]
        CHECKS.append(Check(name, text, needs, run, policies, once, hook))
        return run

    return add


TWO_KINDS = Needs(
    "private_by_attribute or confidential", lambda caps: caps.private_by_attribute or caps.confidential
)
SECRET = Needs("confidential", lambda caps: caps.confidential)
ENCRYPTED = Needs("encrypts", lambda caps: caps.encrypts)
LOGS = Needs(
    "dirty_logging, no private_by_attribute",  # a memslot with a guest_memfd cannot log
    lambda caps: caps.dirty_logging and not caps.private_by_attribute,
)
SLOTS_CHANGE = Needs("no memslots_fixed_after_run", lambda caps: not caps.memslots_fixed_after_run)
PRIVATE_GMEM = Needs("private_by_attribute, gmem_backed", lambda caps: caps.private_by_attribute and caps.gmem_backed)
PREPARES = Needs("private_by_attribute", lambda caps: caps.private_by_attribute)
PINNED = Needs("needs_pin", lambda caps: caps.needs_pin)
ACCEPTS = Needs("needs_accept", lambda caps: caps.needs_accept)
ACCEPTS_BY_ATTRIBUTE = Needs(
    "needs_accept, private_by_attribute", lambda caps: caps.needs_accept and caps.private_by_attribute
)


@lru_cache(maxsize=32)
def _places(backend: Backend, setting: Setting) -> Places:
    """All places at which something may fail in a setting: looked for once, as three checks ask."""
    return Places(Bench(backend, setting))


# ---- what is declared -----------------------------------------------------------------------------------------

_COHERENT: tuple[tuple[str, Callable[[Capabilities], bool], tuple[str, ...]], ...] = (
    ("has_mirror", lambda c: c.has_mirror, (
        "link_private_spt", "set_private_spte", "remove_private_spte", "free_private_spt", "read_private_spte",
        "guest_access",
    )),
    ("mediated_root", lambda c: c.mediated_root, (
        "set_private_spte", "remove_private_spte", "read_private_spte", "guest_access",
    )),
    ("mediated_root, dirty_logging", lambda c: c.mediated_root and c.dirty_logging, (
        "wrprotect_private_spte", "relax_private_spte",
    )),
    ("needs_pin", lambda c: c.needs_pin, ("pin_pfn",)),
    ("needs_accept", lambda c: c.needs_accept, ("guest_accept", "guest_access")),
    ("promotes", lambda c: c.promotes, ("promote_private_spt", "split_private_spt")),
    ("confidential", lambda c: c.confidential, ("host_access",)),
)  # fmt: skip
"""Capability -> hooks without which nobody could use it."""


@check("declared", once=True)
def declared(bench: Bench) -> None:
    """Version of the contract, prices, and for each capability the hooks that it takes."""
    backend = bench.backend
    assert backend.api_version == API_VERSION, f"written for version {backend.api_version} of the hook contract"
    host = bench.host()
    assert isinstance(host.ops.call_now("capabilities", vm_type=backend.vm_type, options=host.options), Capabilities)
    unknown = host.ops.hooks.keys() - HOOKS.keys()
    assert not unknown, f"hooks that are not in the contract: {sorted(unknown)}"
    for name, asks, hooks in _COHERENT:
        missing = [hook for hook in hooks if asks(bench.caps) and not host.ops.has(hook)]
        assert not missing, f"{name} is declared, and these hooks are not implemented: {', '.join(missing)}"
    load_profile_for(backend, None)


# ---- life and death -------------------------------------------------------------------------------------------


@check("life.nothing")
def life_nothing(bench: Bench) -> None:
    """A VM that was only made leaves nothing; nor one with vCPUs, nor one that was launched and never ran."""
    for vcpus, launch in ((0, False), (2, False), (0, True), (2, True)):
        host = bench.host()
        process = process_of(host)
        if vcpus:
            Player(host, vcpus=vcpus, launch=launch, process=process)
        else:
            fd = process.create_vm()
            if launch:
                _may_refuse(fd.launch_finish)  # there may have to be a vCPU
        process.exit()
        bench.done(host)


def _may_refuse(call: Callable[[], object]) -> None:
    try:
        call()
    except UapiError as error:
        assert error.errno in errno.errorcode, error


@check("life.once")
def life_once(bench: Bench) -> None:
    """A VM that ran gives everything back, and leaves its frames to the host."""
    host = bench.host()
    player = Player(host)
    player.write(range(SMALL))
    player.check()
    player.exit()
    bench.done(host)


@check("life.frames_again")
def life_frames_again(bench: Bench) -> None:
    """What a guest gave back serves for anything: the next VM's tables, save areas and control pages, too."""
    host = bench.host()
    player = Player(host, n := 2 * BLOCK)
    player.write(range(n))
    player.convert(SOME, False)
    player.write(SOME)
    player.exit()
    bench.done(host)
    free = int(np.count_nonzero(host.frames.use[1:] == Use.FREE))
    lowest = host.frames.alloc(n, Use.ANON)  # as the guest's were
    others = host.frames.alloc(free - n, Use.ANON)
    host.frames.free(lowest)
    player = Player(host)
    player.write(range(SMALL))
    player.check()
    player.exit()
    host.frames.free(others)
    bench.done(host)


@check("life.order")
def life_order(bench: Bench) -> None:
    """The vendor hears of the end in order: keys out, vCPUs, entries, the VM, memslots; of everything once."""
    heard: list[tuple[str, Any]] = []

    class Listener:
        @observes
        def on_event(self, event: Event) -> None:
            if event.kind == "hook" and event.phase == "begin":
                heard.append((event.name, event.vm))

    host = bench.host(Listener())
    player = Player(host)
    player.write(range(SMALL))
    player.read(range(SMALL), vcpu=1)
    player.exit()
    bench.done(host)
    names = [name for name, _ in heard]
    order = ["host_init", "vm_init", "vcpu_create", "launch_finish", "vm_pre_destroy", "vcpu_free", "vm_destroy"]
    at = [names.index(name) for name in order if name in names]
    assert at == sorted(at), f"hooks came in the order {[names[i] for i in at]}"
    for name, times in (("host_init", 1), ("vm_init", 1), ("vcpu_create", 2), ("vcpu_free", 2), ("vm_destroy", 1)):
        assert names.count(name) in (0, times), f"{name} was called {names.count(name)} times"


@check("life.again", once=True)
def life_again(bench: Bench) -> None:
    """VMs can be made and destroyed for ever: no key, number or frame is used up."""
    host = bench.host(checked=False, drive=Lockdep())
    for turn in range(300):
        process = process_of(host)
        process.create_vm()
        process.exit()
        assert not host.frames.leaked(), f"frames are leaked by VM {turn}"
    for _ in range(420):
        player = Player(host, 1, vcpus=1)
        player.write(range(1))
        player.exit()
    left = {use.name: n for use, n in host.frames.outstanding().items()}
    assert not left and not host.frames.leaked(), f"after 720 VMs are left {left}, {host.frames.leaked()} leaked"


@check("life.many", once=True)
def life_many(bench: Bench) -> None:
    """As many VMs at a time as there can be; the next is refused with an errno, and leaves nothing behind."""
    host = bench.host(checked=False, drive=Lockdep())
    process = process_of(host)
    n = 0
    try:
        for n in range(1200):  # noqa: B007
            process.create_vm()
    except UapiError as error:
        known = (errno.ENOSPC, errno.EBUSY, errno.ENOMEM, errno.EIO)
        assert error.errno in known, f"VM {n} ends with {error}"
        before = host.frames.outstanding()
        for _ in range(3):
            try:
                process.create_vm()
            except UapiError:
                pass
            else:
                raise AssertionError("a VM is refused, and the next one is not") from None
        assert host.frames.outstanding() == before, "a VM that is refused leaves frames behind"
        assert n > 1, f"only {n} VM at a time"
    keys = [vm.key for vm in host.vms if vm.key]
    assert len(keys) == len(set(keys)), "two VMs have one key"
    process.exit()
    assert not host.vms and not host.frames.outstanding()
    process = process_of(host)
    for _ in range(min(n, 3)):
        process.create_vm()
    process.exit()


@check("life.two")
def life_two(bench: Bench) -> None:
    """Two VMs side by side, then one after the other on the same frames: neither sees or disturbs the other."""
    host = bench.host()
    one, two = Player(host, process=(process := process_of(host))), Player(host, process=process)
    for player in (one, two):
        player.write(range(SMALL))
    for player in (one, two):
        player.check()
        player.convert(SOME, False)
        player.write(SOME)
    one.check()
    two.check()
    process.exit()
    bench.done(host)
    before = set(one.private.values()) | set(one.shared.values()) | set(two.private.values())
    three = Player(host)
    three.stamp = 1 << 20
    three.accept(range(SMALL))
    action = Touch(slice(0, SMALL, 1), private=three.two_kinds)
    three.run(action)
    assert action.seen is not None
    seen = set(action.seen.tolist()) & before - {None, 0}
    assert not seen, f"a new VM reads what an old one wrote: {sorted(map(str, seen))[:4]}"
    three.exit()
    bench.done(host)


# ---- content --------------------------------------------------------------------------------------------------


@check("content.touch")
def content_touch(bench: Bench) -> None:
    """What the guest writes it reads, through either vCPU, in runs and scattered, also over several memslots' worth."""
    host = bench.host()
    player = Player(host, 64)
    player.read(range(64))
    player.write(range(8))
    player.write(SOME, vcpu=1)
    player.write(range(30, 64), vcpu=1)
    player.check()
    player.write(range(64))
    player.check()
    player.exit()
    bench.done(host)


@check("content.image")
def content_image(bench: Bench) -> None:
    """The guest finds its image where it was loaded, and can write over it."""
    host = bench.host()
    image = [bytes([i + 1]) * PAGE_BYTES for i in range(6)]
    player = Player(host, image=image)
    player.check()
    player.write(range(3))
    player.check()
    player.exit()
    bench.done(host)


@check("content.image_early")
def content_image_early(bench: Bench) -> None:
    """So does a guest whose image is loaded before it has vCPUs, also when the host has moved pages about since."""
    host = bench.host()
    player = Player(host, vcpus=0, launch=False)
    player.load(0, [bytes([i + 1]) * PAGE_BYTES for i in range(6)])
    player.vcpus = [player.vm.create_vcpu() for _ in range(2)]
    player.vm.launch_finish()
    player.launched = True
    player.process.migrate_pages(player.hva, player.npages * PAGE_BYTES)
    player.check()
    player.write(range(3, SMALL))
    player.check()
    player.exit()
    bench.done(host)


@check("content.image_again")
def content_image_again(bench: Bench) -> None:
    """A page of the image that is loaded again is refused and stays as it was, or holds what came last."""
    host = bench.host()
    player = Player(host, launch=False)
    player.load(0, [bytes([i + 1]) * PAGE_BYTES for i in range(6)])
    player.load(8, [b"eight"])
    for gfn, n in ((2, 2), (6, 5)):
        image = [bytes([gfn + i, 99]) for i in range(n)]
        try:
            loaded = player.vm.launch_update(gfn * PAGE_BYTES, image)
        except UapiError:
            loaded = 0
        for i in range(loaded):
            player.private[gfn + i] = host.memory.intern(image[i])
            player.accepted.add(gfn + i)
    player.vm.launch_finish()
    player.launched = True
    player.check()
    player.write(range(SMALL))
    player.check()
    player.exit()
    bench.done(host)


@check("content.image_after")
def content_image_after(bench: Bench) -> None:
    """A vendor that finishes launches does so once, and loads no page afterwards; none has pages of an unknown kind."""
    host = bench.host()
    player = Player(host, launch=False)
    if host.ops.has("launch_update"):
        _refused(lambda: player.vm.launch_update(0, [b"x"], "no such kind"), "a page of no kind is loaded")
    player.vm.launch_finish()
    if host.ops.has("launch_finish"):
        _refused(player.vm.launch_finish, "a launch is finished twice")
    player.write([0])
    if host.ops.has("launch_update") and host.ops.has("launch_finish"):
        _refused(lambda: player.vm.launch_update(PAGE_BYTES, [b"x"]), "a page is loaded after the launch")
    player.check()
    player.exit()
    bench.done(host)


def _refused(call: Callable[[], object], what: str) -> None:
    try:
        call()
    except UapiError:
        return
    raise AssertionError(what)


@check("content.convert", TWO_KINDS)
def content_convert(bench: Bench) -> None:
    """Pages converted to shared are the VMM's to read and write, and the guest's; and then private again."""
    host = bench.host()
    player = Player(host)
    player.write(range(SMALL))
    for gfns in (SOME, range(12, 20), [0], range(SMALL)):
        player.convert(gfns, False)
        player.write(gfns)
        player.check()
        shared = sorted(player.as_shared)
        for gfn in shared:
            verdict, seen = player.host_read(range(gfn, gfn + 1))
            assert verdict is HostVerdict.OK, f"the VMM cannot read shared gfn {gfn}: {verdict.name}"
            want = player.shared.get(gfn)
            assert want is None or seen == [want], f"the VMM reads {seen} at shared gfn {gfn}, the guest wrote {want}"
        verdict = player.host_write(range(shared[0], shared[0] + 1))
        assert verdict is HostVerdict.OK, f"the VMM cannot write shared gfn {shared[0]}: {verdict.name}"
        player.check()
        player.convert(gfns, True)
        player.write(gfns)
        player.check()
    player.exit()
    bench.done(host)


@check("content.convert_fresh", TWO_KINDS)
def content_convert_fresh(bench: Bench) -> None:
    """Pages that nobody ever touched can be converted, too, to and fro, by either vCPU."""
    host = bench.host()
    player = Player(host)
    player.convert(range(4, 12), False, vcpu=1)
    player.write(range(SMALL))
    player.convert(range(6, 9), True)
    player.write(range(SMALL), vcpu=1)
    player.check()
    player.exit()
    bench.done(host)


@check("content.prefault", Needs("prefault", lambda caps: caps.prefault))
def content_prefault(bench: Bench) -> None:
    """KVM_PRE_FAULT_MEMORY maps memory that the guest then finds; again it does nothing.

    Before the launch ends it may be refused."""
    host = bench.host()
    player = Player(host, launch=False)
    try:
        player.vcpus[0].pre_fault_memory(0, 2 * PAGE_BYTES)
    except UapiError as error:
        assert error.errno == errno.EOPNOTSUPP, f"prefault before the launch ends: {error}"
    player.vm.launch_finish()
    player.launched = True
    for private in (True, False) if player.two_kinds else (True,):
        player.convert(range(4, 12), private)
        for _ in range(2):
            after = player.vcpus[0].pre_fault_memory(2 * PAGE_BYTES, 12 * PAGE_BYTES)
            assert after == (14 * PAGE_BYTES, 0), f"12 pages were to be faulted in, and left is {after}"
            frames = dict(host.frames.outstanding())
        player.write(range(4, 14))
        assert host.frames.outstanding() == frames, "pages that were faulted in before are faulted in again"
        player.write(range(SMALL))
        player.check()
    player.exit()
    bench.done(host)


@check("content.outside", SECRET)
def content_outside(bench: Bench) -> None:
    """The host neither reads nor changes what is private, also after it was shared for a while."""
    host = bench.host()
    player = Player(host)
    player.write(range(SMALL))
    player.convert(SOME, False)
    player.write(SOME)
    player.convert(SOME, True)
    player.write(range(SMALL))
    for gfn, pfn in player.frames(range(SMALL)).items():
        frame = slice(pfn, pfn + 1, 1)
        verdict, seen = host.host_read(frame)
        assert verdict is not HostVerdict.OK, f"the host reads private gfn {gfn}"
        assert int(seen[0]) != player.private[gfn], f"the host reads what stands in private gfn {gfn}"
        if host.memory.key[pfn] == 0:
            fixup = host.host_access(frame, False, HostMode.FIXUP)
            assert fixup is not HostVerdict.OK, f"the host's kernel reads private gfn {gfn}"
    player.check()
    player.exit()
    bench.done(host)


@check("content.written_from_outside", SECRET)
def content_written_from_outside(bench: Bench) -> None:
    """A write by the host to a private page is refused, or the guest finds out; its other pages are as they were."""
    host = bench.host()
    player = Player(host)
    player.write(range(SMALL))
    gfn, pfn = next(iter(player.frames(SOME).items()))
    verdict = host.host_access(slice(pfn, pfn + 1, 1), True, HostMode.USER)
    if verdict in (HostVerdict.OK, HostVerdict.CIPHERTEXT):
        host.memory.write(slice(pfn, pfn + 1, 1), 77, 0)
    refused = verdict in (HostVerdict.SIGSEGV, HostVerdict.OWNER_FAULT, HostVerdict.EFAULT)
    try:
        action = Touch(slice(gfn, gfn + 1, 1))
        leave = player.vcpus[0].run(action)
        if leave is None:
            assert action.seen is not None
            seen = int(action.seen[0])
            # Encryption alone, in place, cannot tell a write by the host from one by the guest: noise is all it can do.
            noise = seen != 77 and bench.caps.encrypts and bench.caps.converts_in_place
            assert seen == player.private[gfn] or (noise and not refused), (
                f"the host's write ({verdict.name}) to a private page is read by the guest as {seen:#x}"
            )
        others = [g for g in range(SMALL) if g != gfn]
        if not player.vm.vm.dead:
            player.read(others)
    except (UapiError, Died):
        assert not refused, "the guest is dead of a write that was refused"
    player.exit()
    bench.done(host, leaks=not refused)


@check("content.left_behind", SECRET)
def content_left_behind(bench: Bench) -> None:
    """Frames that a guest gave back, or left behind, show the host nothing of what stood in them."""
    host = bench.host()
    player = Player(host)
    player.write(range(SMALL))
    frames = player.frames(range(SMALL))
    written = {stamp for stamp in player.private.values() if stamp}
    if bench.caps.private_by_attribute:
        player.punch(range(4, 12))
        _shows_nothing(host, {g: f for g, f in frames.items() if 4 <= g < 12}, written)
    player.exit()
    bench.done(host)
    _shows_nothing(host, frames, written)


def _shows_nothing(host: Host, frames: dict[int, int], written: set[int]) -> None:
    for gfn, pfn in frames.items():
        if host.frames.use[pfn] == Use.FREE:
            seen = int(host.memory.read(slice(pfn, pfn + 1, 1), 0)[0])
            assert seen not in written, f"the host reads in a free frame what private gfn {gfn} held"


@check("content.punch", PRIVATE_GMEM)
def content_punch(bench: Bench) -> None:
    """After a hole the guest finds a new page; the others keep theirs. Also shared meanwhile, and with no memslot."""
    host = bench.host()
    player = Player(host)
    player.write(range(SMALL))
    player.punch(range(3, 9))
    player.check()
    player.write(range(SMALL))
    player.check()
    player.convert(range(5, 15), False)
    player.write(range(5, 15))
    player.punch(range(12))
    player.check()
    player.convert(range(5, 15), True)
    player.write(range(SMALL))
    player.check()
    player.punch(range(SMALL))
    player.punch(range(SMALL))
    player.write(range(SMALL), vcpu=1)
    player.check()
    player.exit()
    bench.done(host)


@check("content.punch_unbound", PRIVATE_GMEM)
def content_punch_unbound(bench: Bench) -> None:
    """Holes and the end of a file give memory back also where no memslot, or no VM, is left."""
    host = bench.host()
    player = Player(host)
    player.write(range(SMALL))
    player.delete_slot()
    player.punch(range(8))
    frames_are_the_hosts(host)
    player.add_slot()
    player.write(range(SMALL))
    player.check()
    player.vm.close()
    player.punch(range(4, 10))
    player.process.close(player.fd)
    player.exit()
    bench.done(host)


@check("content.memslot", SLOTS_CHANGE)
def content_memslot(bench: Bench) -> None:
    """A memslot that is deleted and made again shows the same memory, but for what the VM type says is lost."""
    host = bench.host()
    player = Player(host)
    player.write(range(SMALL))
    for _ in range(3):
        player.delete_slot()
        player.add_slot()
        player.check()
        player.write(range(4, 12))
        player.check()
    player.exit()
    bench.done(host)


@check("content.memslot_order")
def content_memslot_order(bench: Bench) -> None:
    """The VMM's memory goes before the VM, the VM before the files, or the other way round: nothing is left."""
    for order in ("munmap first", "close first"):
        host = bench.host()
        player = Player(host)
        player.write(range(SMALL))
        player.convert(SOME, False)
        player.write(SOME)
        if order == "munmap first":
            player.process.munmap(player.hva, player.npages * PAGE_BYTES)
        else:
            player.vm.close()
        player.exit()
        bench.done(host)


@check("content.migrate")
def content_migrate(bench: Bench) -> None:
    """The host moves its pages about: guest pages that it may not move stay where they are, and all keep content."""
    host = bench.host()
    player = Player(host)
    player.write(range(SMALL))
    player.process.migrate_pages(player.hva, player.npages * PAGE_BYTES)
    player.check()
    player.convert(SOME, False)
    player.write(SOME)
    player.process.migrate_pages(player.hva, player.npages * PAGE_BYTES)
    player.check()
    player.exit()
    bench.done(host)


@check("content.discard")
def content_discard(bench: Bench) -> None:
    """The VMM gives its memory back: shared pages are new then, private ones that are not its own stay."""
    host = bench.host()
    player = Player(host)
    player.write(range(SMALL))
    player.convert(range(6, 18), False)
    player.write(range(6, 18))
    if player.caps.private_by_attribute or not player.two_kinds:
        player.discard(range(8, 14))
        player.check()
        player.write(range(SMALL))
        player.check()
    else:
        before = dict(host.frames.outstanding())
        player.discard(range(8, 14))
        player.write(range(SMALL))
        player.check()
        assert host.frames.outstanding().get(Use.ANON, 0) <= before.get(Use.ANON, 0) + 6
    player.exit()
    bench.done(host)


@check("content.dirty_log", LOGS)
def content_dirty_log(bench: Bench) -> None:
    """The dirty log names every page that was written, each time it is read, and no page that was not."""
    host = bench.host()
    n = 2 * BLOCK if bench.large else SMALL
    player = Player(host, n)
    player.convert(range(n), False)
    player.write(range(n))
    player.log_dirty(True)
    for gfns in (SOME, [0], range(5, 12), []):
        player.write(gfns)
        log = np.flatnonzero(player.vm.get_dirty_log(0)).tolist()
        assert set(gfns) <= set(log), f"written and not logged: {sorted(set(gfns) - set(log))[:4]}"
        assert set(log) <= set(gfns), f"logged and not written: {sorted(set(log) - set(gfns))[:4]}"
    player.log_dirty(False)
    player.write(range(n))
    player.check()
    player.exit()
    bench.done(host)


# ---- large pages ----------------------------------------------------------------------------------------------


@check("large.parts")
def large_parts(bench: Bench) -> None:
    """Whole blocks are used, then parts of them converted, punched and given back: their neighbours lose nothing."""
    n = 3 * BLOCK if bench.large else SMALL
    host = bench.host()
    player = Player(host, n)
    player.write(range(n))
    player.check()
    player.convert(range(5, 9), False)
    player.write(range(5, 9))
    player.check()
    if player.fd >= 0:
        player.punch(range(10, 20))
        player.check()
    player.convert(range(5, 9), True)
    player.write(range(n))
    player.check()
    if bench.large:
        player.convert(range(400, 700), False)
        player.write(range(400, 700))
        player.check()
        player.convert(range(BLOCK, 2 * BLOCK), False)
        player.convert(range(n), True)
        player.write(range(0, n, 7))
        player.check()
        for _ in range(2):
            # Parts beside whole blocks; then blocks that were broken before.
            player.write(range(n))
            player.convert(range(300, n - 100), False)
            player.write(range(300, n - 100))
            player.check()
            player.convert(range(300, n - 100), True)
        player.write(range(n))
        player.check()
        if player.fd >= 0:
            player.punch(range(100, BLOCK + 100))
            player.write(range(n))
            player.check()
    player.exit()
    bench.done(host)


@check("large.punch", PRIVATE_GMEM)
def large_punch(bench: Bench) -> None:
    """Holes take parts of large pages, or whole ones, or pages that were allocated and never used."""
    n = 4 * BLOCK if bench.large else SMALL
    host = bench.host()
    player = Player(host, n)
    player.process.fallocate(player.fd, FALLOC_FL_KEEP_SIZE, 0, n * PAGE_BYTES)
    player.write([1, 3])
    player.punch(range(n))
    for holes in (range(2, 9), range(8, n - 3), range(n // 4, 3 * n // 4), range(n - 1), range(n)):
        player.write(range(n))
        player.punch(holes)
        frames_are_the_hosts(host)
        player.check()
    player.exit()
    bench.done(host)


@check("large.small_first")
def large_small_first(bench: Bench) -> None:
    """Pages of a block that is used one by one first, and then as a whole, keep their content."""
    n = 2 * BLOCK if bench.large else SMALL
    host = bench.host()
    player = Player(host, n)
    for gfn in SOME:
        player.write([gfn])
    player.write(range(20, n))
    player.check()
    player.write(range(n), vcpu=1)
    player.check()
    player.exit()
    bench.done(host)


@check("large.accept", ACCEPTS)
def large_accept(bench: Bench) -> None:
    """Accepting in 2 MiB what is mapped in 4 KiB, and in 4 KiB what could be 2 MiB, ends with all of it accepted."""
    n = 2 * BLOCK
    host = bench.host()
    player = Player(host, n)
    player.run(Accept(slice(3, 4, 1)))
    player.accepted.add(3)
    player.write([3])
    rest = [gfn for gfn in range(BLOCK) if gfn != 3]
    player.run(Accept(np.array(rest, np.int64)))
    player.accepted.update(rest)
    player.run(Accept(slice(BLOCK, n, BLOCK), level=PG_LEVEL_2M))
    player.accepted.update(range(BLOCK, n))
    player.check()
    player.write(range(n))
    player.check()
    player.exit()
    bench.done(host)


@check("large.accept_resumed", ACCEPTS_BY_ATTRIBUTE)
def large_accept_resumed(bench: Bench) -> None:
    """An accept of 2 MiB that fell back to 4 KiB and left half way goes on there: no page is accepted twice."""
    host = bench.host()
    player = Player(host, 3 * BLOCK)
    player.process.fallocate(player.fd, FALLOC_FL_KEEP_SIZE, 0, 3 * BLOCK * PAGE_BYTES)
    for gfn in (BLOCK + 300, BLOCK + 400):
        player.process.memory_failure(player.fd, gfn * PAGE_BYTES)
    accept = Accept(slice(0, 3 * BLOCK, BLOCK), level=PG_LEVEL_2M)
    for gfn in (BLOCK + 300, BLOCK + 400):
        leave = player.vcpus[0].run(accept)
        assert isinstance(leave, MemoryFault) and leave.gfn == gfn, f"accepting a broken page ends with {leave}"
        assert accept.left == 3 * BLOCK - gfn
        player.punch(range(gfn, gfn + 1))
    leave = player.vcpus[0].run(accept)
    assert leave is None and not accept.left, f"accepting the rest ends with {leave}"
    player.accepted.update(range(3 * BLOCK))
    player.write(range(3 * BLOCK))
    player.check()
    player.exit()
    assert host.frames.leaked() == 2, "broken frames are nobody's any more"
    bench.done(host, leaks=True)


@check("accept.first", ACCEPTS)
def accept_first(bench: Bench) -> None:
    """A page that the guest has not accepted it cannot use: it gets an exception, or dies of it.

    So after a hole, or when the page was shared meanwhile, if that is something of which the vendor hears."""
    for since in ("", "punched", "converted"):
        host = bench.host()
        player = Player(host)
        player.write(range(4))
        if since == "punched" and player.fd >= 0:
            player.write([9])
            player.punch(range(9, 10))
        elif since == "converted" and (bench.caps.has_mirror or host.ops.has("guest_convert")):
            player.write([9])
            player.convert([9], False)
            player.write([9])
            player.convert([9], True)
        leave = player.vcpus[0].run(Touch(slice(9, 10, 1), write=True, stamps=5))
        assert leave is not None, f"a page is used though it was not accepted {since and f'since it was {since}'}"
        player.exit()
        bench.done(host)


@check("accept.stops", ACCEPTS_BY_ATTRIBUTE)
def accept_stops(bench: Bench) -> None:
    """Pages accepted in one go end as one by one: all below one that is no private page, and none above it."""
    ends: list[tuple[object, ...]] = []
    for calls in ([slice(0, 10, 1)], [slice(gfn, gfn + 1, 1) for gfn in range(10)]):
        host = bench.host()
        player = Player(host)
        player.set_attributes(range(5, 6), False)
        if bench.caps.prefault:
            player.vcpus[0].pre_fault_memory(7 * PAGE_BYTES, 2 * PAGE_BYTES)
        leaves = (player.vcpus[0].run(Accept(gfns)) for gfns in calls)
        leave = next((leave for leave in leaves if leave is not None), None)
        assert isinstance(leave, MemoryFault), f"accepting a shared page ends with {leave}"
        meter = host.meter
        ends.append((leave, dict(meter.ops), dict(meter.counts), fingerprint(host.hw, host.memory, host.frames.use)))
        player.exit()
        bench.done(host)
    for what, together, single in zip(("exit", "operations", "charges", "state"), *ends, strict=True):
        assert together == single, f"{what}: {together} in one go, {single} one by one"


# ---- hooks ----------------------------------------------------------------------------------------------------


@check("hooks.prepare_again", PREPARES, hook="gmem_prepare")
def hooks_prepare_again(bench: Bench) -> None:
    """gmem_prepare of pages that are the guest's already changes nothing."""
    host = bench.host()
    player = Player(host, 2 * BLOCK if bench.large else SMALL)
    player.write(range(player.npages))
    vm = player.vm.vm
    slot = next(iter(vm.slots))
    words = player.process.files[player.fd].inode.words
    before = fingerprint(host.hw, host.memory)
    gfns = np.arange(SMALL)
    pfns = (words[gfns] >> 5).astype(np.int64)
    stopped = peek(
        host, "gmem_prepare", vm=vm, slot=slot, gfns=gfns, pfns=pfns, max_order=9 if bench.large else 0
    )
    assert stopped is None, f"gmem_prepare of prepared pages answers {stopped}"
    assert fingerprint(host.hw, host.memory) == before, "gmem_prepare of prepared pages changes something"
    player.check()
    player.exit()
    bench.done(host)


@check("hooks.prepare_parts", PREPARES)
def hooks_prepare_parts(bench: Bench) -> None:
    """Pages that come in any order, some of them prepared before, are all prepared."""
    host = bench.host()
    player = Player(host, 40)
    player.write([5, 6, 20, 33])
    player.write([0, 39])
    player.write(range(3, 37))
    player.punch(range(10, 30))
    player.write([12, 28])
    player.write(range(40))
    player.check()
    player.exit()
    bench.done(host)


@check("hooks.pin_again", PINNED)
def hooks_pin_again(bench: Bench) -> None:
    """A page is pinned once however often it is faulted in; another frame in its place gives its pin back."""
    host = bench.host()
    player = Player(host, 2 * BLOCK if bench.large else SMALL)
    player.write(range(player.npages))
    held = host.frames.pins_held
    player.write(range(player.npages), vcpu=1)
    player.check()
    assert host.frames.pins_held == held, f"{held} pages were pinned, {host.frames.pins_held} are, and none is new"
    if player.caps.honours_notifiers:
        player.discard(range(player.npages))
        for gfn in range(player.npages):
            player.private.pop(gfn, None)
        player.write(range(player.npages))
        now = host.frames.pins_held
        assert now <= held, f"{held} pages were pinned; with other frames in their place {now} are"
        orphans = host.frames.outstanding().get(Use.ORPHAN, 0)
        assert not orphans, f"{orphans} frames live on through pins alone, though others are in their place"
    player.exit()
    bench.done(host)


@check("hooks.regions", hook="register_region")
def hooks_regions(bench: Bench) -> None:
    """Regions that are registered and taken back leave no pin and no account; wrong ones are refused."""
    host = bench.host(memlock_limit_bytes=64 * PAGE_BYTES)
    player = Player(host)
    vm, hva = player.vm, player.hva
    pins, locked = host.frames.pins_held, player.vm.vm.memlock_pages
    _refused(lambda: vm.register_region(hva, 0), "a region of no size is registered")
    _refused(lambda: vm.register_region(hva, 1000 * PAGE_BYTES), "more is registered than may be locked")
    assert (host.frames.pins_held, player.vm.vm.memlock_pages) == (pins, locked), "a refused region is held"
    for _ in range(3):
        vm.register_region(hva, 8 * PAGE_BYTES)
        vm.register_region(hva + 8 * PAGE_BYTES, 4 * PAGE_BYTES)
        assert player.vm.vm.memlock_pages == locked + 12
        vm.unregister_region(hva + 8 * PAGE_BYTES, 4 * PAGE_BYTES)
        vm.unregister_region(hva, 8 * PAGE_BYTES)
        assert (host.frames.pins_held, player.vm.vm.memlock_pages) == (pins, locked), "a region is not all given back"
    vm.register_region(hva, 8 * PAGE_BYTES)
    player.write(range(SMALL))
    player.process.migrate_pages(hva, 8 * PAGE_BYTES)
    player.check()
    player.exit()
    bench.done(host)


@check("hooks.queries")
def hooks_queries(bench: Bench) -> None:
    """Questions change nothing: of the trusted table, of an access, of a level, of the host's access."""
    host = bench.host()
    player = Player(host)
    player.write(range(SMALL))
    vm = player.vm.vm
    frames = player.frames(range(SMALL))
    gfns = np.array(sorted(frames), np.int64)
    pfns = np.array([frames[g] for g in sorted(frames)], np.int64)
    asked: dict[str, dict[str, Any]] = {
        "read_private_spte": {"vm": vm, "gfns": gfns, "level": PG_LEVEL_4K},
        "max_mapping_level": {"vm": vm, "gfns": gfns, "pfns": pfns, "private": player.two_kinds},
        "capabilities": {"vm_type": vm.vm_type, "options": host.options},
    }
    root = vm.tdp.root_for(player.two_kinds)
    asked["guest_access"] = {
        "vm": vm, "vcpu": player.vcpus[0].vcpu, "gfns": gfns, "pfns": np.zeros(0, np.int64) if root.external else pfns,
        "level": PG_LEVEL_4K, "write": False, "private": player.two_kinds,
    }  # fmt: skip
    for hook, arguments in asked.items():
        if not host.ops.has(hook) or (hook == "guest_access" and bench.large):
            continue
        before = fingerprint(host.hw, host.memory, host.frames.use, host.frames.pins)
        peek(host, hook, **arguments)
        after = fingerprint(host.hw, host.memory, host.frames.use, host.frames.pins)
        assert before == after, f"{hook} is a question, and changes something"
    player.exit()
    bench.done(host)


@check("hooks.unknown_command")
def hooks_unknown_command(bench: Bench) -> None:
    """A vendor command that does not exist is refused with an errno, and changes nothing."""
    host = bench.host()
    player = Player(host)
    before = fingerprint(host.hw, host.frames.use)
    for command in ("KVM_NO_SUCH_COMMAND", "x"):
        _refused(lambda command=command: player.vm.memory_encrypt_op(command), "an unknown command does something")  # type: ignore[misc]
    assert fingerprint(host.hw, host.frames.use) == before, "a refused command changes something"
    player.write(range(4))
    player.check()
    player.exit()
    bench.done(host)


def _large_gmem(caps: Capabilities) -> bool:
    return caps.gmem_backed and caps.max_private_level > PG_LEVEL_4K


CALLED_WITH: dict[str, Callable[[Capabilities], bool]] = {
    "gmem_prepare": lambda caps: caps.gmem_backed,
    "gmem_invalidate": lambda caps: caps.gmem_backed,
    "max_mapping_level": _large_gmem,
    "pin_pfn": lambda caps: caps.needs_pin,
    "unpin_pfn": lambda caps: caps.needs_pin,
    "guest_accept": lambda caps: caps.needs_accept,
    "after_fault": lambda caps: caps.needs_accept and _large_gmem(caps),
}
"""Hooks that the core calls for VM types with a capability only: one of the same vendor may have them for another."""
KIT_ASKS = frozenset({"read_private_spte"})
"""Hooks that only the kit calls, after every step: their calls are not counted."""


@check("hooks.reached", once=True)
def hooks_reached(bench: Bench) -> None:
    """Every hook that is implemented is called in some setting, but for those that a capability rules out."""
    settings = settings_of(bench.backend)
    caps = [Bench(bench.backend, setting).caps for setting in settings]
    missing = {
        hook for hook in bench.host(checked=False).ops.hooks.keys() - KIT_ASKS
        if hook not in CALLED_WITH or any(map(CALLED_WITH[hook], caps))
    }  # fmt: skip
    for setting in settings:
        missing -= _places(bench.backend, setting).called
    for setting in settings:
        # Some are called only where another one has failed.
        places = _places(bench.backend, setting)
        for what in places.count.keys() & ANSWERS.keys() if missing else ():
            places.fail(what, 1)
        missing -= places.called
    assert not missing, f"implemented, and never called: {', '.join(sorted(missing))}"


@check("hooks.batch")
def hooks_batch(bench: Bench) -> None:
    """A batch means the same as its pages one by one: the same operations, prices, content, trusted table, frames."""
    for plan in (_plan_touch, _plan_convert, _plan_punch):
        worlds = []
        for together in (True, False):
            host = bench.host()
            player = Player(host, 40)
            bench.checker.resting = not together  # what stands at the end is compared
            plan(player, together)
            bench.checker.resting = False
            player.check()
            vm = player.vm.vm
            root = vm.tdp.root_for(player.two_kinds)
            gfns = np.arange(40)
            table: Any = None
            if root.external and host.ops.has("read_private_spte"):
                table = peek(host, "read_private_spte", vm=vm, gfns=gfns, level=PG_LEVEL_4K)[0].tolist()
            worlds.append({
                "operations": {k: n for k, n in host.meter.ops.items() if n},
                "prices": {k: n for k, n in host.meter.counts.items() if n and k not in _BY_CALL},
                "leaves": [root.level_at(gfn) for gfn in range(40)],
                "table": table,
                "frames": {use.name: n for use, n in host.frames.outstanding().items()},
                "pins": host.frames.pins_held,
                "locked": vm.memlock_pages,
                "dead": vm.dead,
            })
            player.exit()
            bench.done(host)
        for what, one in worlds[0].items():
            other = worlds[1][what]
            if plan is _plan_convert and what in ("operations", "prices"):
                # How many calls a conversion takes is the guest's business; pages never cost less by themselves.
                one = {name: n for name, n in one.items() if n > other.get(name, 0)}
                other = dict[str, int]()
            said = f"{plan.__name__[6:]}: {what} of a batch differ from its pages' one by one: {_differ(one, other)}"
            assert one == other, said


_BY_CALL = frozenset({
    "punch_hole_call", "attributes_call", "vm_exit", "user_exit", "tlb_flush_base", "tlb_flush_per_cpu",
})  # fmt: skip
"""Prices of a call, not of a page: how often they are paid depends on how calls are made."""


def _differ(one: Any, other: Any) -> str:
    if isinstance(one, dict):
        return str({k: (one.get(k), other.get(k)) for k in one.keys() | other.keys() if one.get(k) != other.get(k)})
    return f"{one} and {other}"[:200]


def _each(gfns: Iterable[int], together: bool) -> Iterator[list[int]]:
    gfns = list(gfns)
    if together:
        yield gfns
    else:
        yield from ([gfn] for gfn in gfns)


def _plan_touch(player: Player, together: bool) -> None:
    for gfns in ([2, 3, 5, 8, 30], range(4, 20), range(40)):
        # Accepting is a guest's own loop, and is compared through the other plans.
        for some in _each(gfns, together):
            player.write(some)


def _plan_convert(player: Player, together: bool) -> None:
    player.write(range(28))
    player.write([31, 34])
    there_and_not = [25, *range(27, 38)]
    for gfns, private in ((range(4, 20), False), (range(6, 10), True), (there_and_not, False), (range(12, 18), True)):
        if player.two_kinds:
            for some in _each(gfns, together):
                player.run(Convert(np.array(some, np.int64), private=private))
            (player.as_shared.difference_update if private else player.as_shared.update)(gfns)
            player.accepted.difference_update(gfns)
            player._forget(gfns) if player.in_place else player.private.update(dict.fromkeys(gfns))
    player.write(range(40))


def _plan_punch(player: Player, together: bool) -> None:
    player.write(range(40))
    if player.fd >= 0:
        for some in _each(range(10, 20), together):
            player.punch(range(some[0], some[-1] + 1))
    player.write(range(40))


# ---- failures -------------------------------------------------------------------------------------------------

LARGE_MOST, OTHERS_MOST = 8, 2
"""Places at which each thing fails that failed everywhere before: on large pages, and in each other setting."""


def _fails_everywhere(bench: Bench, kinds: Iterable[str], *, dies: bool = False, leaks: bool = False) -> None:
    """Of each kind of place every one fails in turn in the first setting that has it; in the others a few."""
    places = _places(bench.backend, bench.setting)
    known = set[str]()
    for setting in itertools.takewhile(lambda one: one != bench.setting, settings_of(bench.backend)):
        known |= _places(bench.backend, setting).count.keys()
    most = OTHERS_MOST if bench.setting.options or bench.setting.policies else LARGE_MOST
    for what in kinds:
        n = places.count.get(what, 0)
        for nth in spread(n, most * bench.effort if what in known else n):
            try:
                places.fail(what, nth, dies=dies, leaks=leaks)
            except Exception as error:
                error.add_note(f"with {what} failing for the {nth}. time")
                raise


@check("failure.hooks", policies=True)
def failure_hooks(bench: Bench) -> None:
    """Every hook that may fail fails at each of its calls in turn: nothing is lost, leaked or inconsistent."""
    _fails_everywhere(bench, ANSWERS)


@check("failure.memory")
def failure_memory(bench: Bench) -> None:
    """Every allocation of a frame fails in turn."""
    _fails_everywhere(bench, [MEMORY], dies=True)


@check("failure.busy")
def failure_busy(bench: Bench) -> None:
    """Every lock that is only tried is busy in turn: those who cannot wait find a way."""
    _fails_everywhere(bench, [TRY_LOCK], leaks=True)


@check("failure.random")
def failure_random(bench: Bench) -> None:
    """Hooks, allocations and try-locks fail at random, again and again."""
    for seed in range((2 if bench.setting.options else 4) * bench.effort):
        Tale(bench, Failures(chance=0.02 * (1 + seed % 4), seed=seed), dies=True, leaks=True).all(bench)


# ---- two at once, and random calls ------------------------------------------------------------------------------

ORDERS_MOST = 4
"""Orders of each race that are tried: those with the fewest interruptions. `cvm explore` tries all."""


@check("races", once=True)
def races(bench: Bench) -> None:
    """Two who act at the same time, one of them interrupted anywhere: the core's races, and the vendor's own."""
    for race in scenarios().values():
        if not race.fits(bench.backend, bench.caps):
            continue
        try:
            explore(lambda race=race: race.make(bench.backend), interruptions=1, limit=ORDERS_MOST * bench.effort)  # type: ignore[misc]
        except Exception as error:
            error.add_note(f"in the race {race.name}")
            raise


def need_hypothesis() -> None:
    """Raises InputError where hypothesis is not installed."""
    try:
        import hypothesis  # noqa: F401
    except ImportError:
        raise InputError("the conformance suite needs hypothesis: pip install 'cvmcore[test]'") from None


@check("machine")
def machine(bench: Bench) -> None:
    """Random calls of VMM, guest and host, right and wrong, with failures among them: the hypothesis state machine."""
    from cvmcore.testing.machine import run_machine

    quick = bench.setting.options
    examples = (4 if quick else 24) * bench.effort
    run_machine(
        bench.backend, backing=bench.setting.backing, options=dict(bench.setting.options), examples=examples,
        steps=48, script=bench.script, shrink=bench.shrink,
    )  # fmt: skip


# ---- running them ---------------------------------------------------------------------------------------------


@attrs.frozen
class Outcome:
    """How a check ended in a setting: "passed", "failed" (why, and the exception) or "skipped" (needs what).

    seconds: of CPU time. script: UAPI calls that lead to the failure, where the check made them up or was asked for
    them."""

    check: Check
    setting: Setting
    status: str
    why: str = ""
    seconds: float = 0
    error: Exception | None = None
    script: list[str] = attrs.field(factory=list)


def cases(backend: Backend, settings: Iterable[Setting] | None = None) -> Iterator[tuple[Check, Setting]]:
    """Every check in every setting in which it runs."""
    for setting in settings_of(backend) if settings is None else settings:
        for one in CHECKS:
            alone = one.once and (setting.options or setting.backing != "4k")
            if not alone and (one.policies or not setting.policies):
                yield one, setting


def run_check(
    one: Check, backend: Backend, setting: Setting, *, effort: int = 1, shrink: bool = True, script: bool = False
) -> Outcome:
    """Run one check. Raises nothing that the backend is to blame for.

    script: a check that fails is run again, and the calls that it makes are written down.
    """
    bench = Bench(backend, setting, effort=effort, shrink=shrink)
    start = time.process_time()
    try:
        if not one.needs(bench.caps):
            return Outcome(one, setting, "skipped", f"needs {one.needs.name}")
        if one.hook and not bench.host(checked=False).ops.has(one.hook):
            return Outcome(one, setting, "skipped", f"needs the hook {one.hook}")
        one.run(bench)
    except Exception as error:
        seconds = time.process_time() - start
        made = bench.script or (_calls_of(one, bench) if script else [])
        return Outcome(one, setting, "failed", explained(error), seconds, error, made)
    return Outcome(one, setting, "passed", "", time.process_time() - start)


def _calls_of(one: Check, bench: Bench) -> list[str]:
    """The calls of a check that fails up to its failure, as a script; none where it makes none."""
    setting = bench.setting
    recorder = Recorder(bench.backend.name, setting.backing, dict(setting.options), dict(setting.policies))
    with contextlib.suppress(Exception), recording(recorder):
        one.run(bench)
        return []
    return recorder.lines if len(recorder.lines) > 1 else []


MADE_UP = ("Failing test case", "Falsifying example")
"""How hypothesis begins its account of the random calls that failed: a page, for a traceback, not for a line."""


def explained(error: BaseException) -> str:
    """What is wrong, in a line or a few."""
    if isinstance(error, InvariantViolation):
        text = str(error).partition("\n")[0]
    elif isinstance(error, AssertionError):
        text = str(error) or _line_of(error)
    else:
        text = f"{type(error).__name__}: {error}"
        if not isinstance(error, CvmError):  # nobody meant to raise it
            text += f", in {_line_of(error)}"
    said = itertools.takewhile(lambda note: not note.startswith(MADE_UP), getattr(error, "__notes__", []))
    notes = " ".join(note for note in said if len(note) < 200)
    return " ".join(f"{text} {notes}".split())


def _line_of(error: BaseException) -> str:
    """Where an assertion without words stands, or what nobody expected was raised."""
    import traceback

    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename.rpartition('/')[2]}:{frame.lineno}: {frame.line}"


def conformance(
    name: str | Backend, *, settings: Iterable[Setting] | None = None, known_failures: dict[str, str] | None = None
) -> Callable[..., None]:
    """A pytest test that runs every check on a backend, by name or as it is: `test_x = conformance("x")`.

    known_failures: names of checks with the reason why they fail still; one that passes then is an error.
    """
    import pytest

    from cvmcore.plugins import load_backend

    backend = load_backend(name) if isinstance(name, str) else name
    known = known_failures or {}
    failed: list[str] = []
    found = [
        pytest.param(
            one, setting, id=f"{one.name}[{setting}]",
            marks=[pytest.mark.xfail(reason=known[one.name], strict=True)] if one.name in known else [],
        )
        for one, setting in cases(backend, settings)
    ]  # fmt: skip

    @pytest.mark.parametrize(("check", "setting"), found)
    def test_conformance(check: Check, setting: Setting) -> None:
        outcome = run_check(check, backend, setting, shrink=not failed)
        if outcome.status == "skipped":
            pytest.skip(outcome.why)
        if outcome.error is not None:
            if check.name not in known:
                failed.append(check.name)
            raise outcome.error

    return test_conformance


__all__ = [
    "CHECKS", "Bench", "Check", "Outcome", "Setting", "cases", "check", "conformance", "run_check", "settings_of",
]  # fmt: skip

