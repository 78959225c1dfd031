"""A guest and its VMM that know what must stand in every page, and do again whatever failed.

`Player` drives one VM through the UAPI, with all invariants looked at after every call. What it writes it remembers,
one page at a time in plain dicts; where a capability says that content is lost, it forgets. A call that fails for a
reason that passes (no memory, busy, an injected failure) is made again: so a story told by a player must end the same,
whatever fails on the way.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import attrs
import numpy as np

from cvmcore.errors import InvariantViolation, UapiError
from cvmcore.host import Host
from cvmcore.pages import array_of, as_sel
from cvmcore.testing.recorder import process_of
from cvmcore.types import (
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    PAGE_BYTES,
    PG_LEVEL_2M,
    ExitReason,
    GuestException,
    HostVerdict,
    MapGpaRange,
    MemoryFault,
    Shutdown,
)
from cvmcore.uapi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, Process, VcpuFd, VmFd
from cvmcore.vcpu import Accept, Action, Convert, Touch

T = TypeVar("T")

TRIES = 8
"""How often a call is made that fails for a reason that passes."""
PASSING = frozenset({errno.ENOMEM, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO})
"""Errnos of failures after which a call is made again."""


class Died(Exception):
    """The VM is dead: nothing more can be asked of it than that all of its memory comes back."""


@attrs.define
class Failed:
    """How often calls had to be made again, by errno."""

    by_errno: dict[int, int] = attrs.field(factory=dict)

    def note(self, error: int) -> None:
        self.by_errno[error] = self.by_errno.get(error, 0) + 1


class Player:
    """One VM with memory at gfn 0 upwards, two vCPUs, and what its pages must hold.

    passing: errnos of failures after which a call is made again.
    private, shared: stamps by gfn of either view (one and the same where conversion is in place); a gfn that is in
    neither was never written, one with None holds what nobody can say.
    """

    passing = PASSING

    def __init__(
        self, host: Host, npages: int = 24, *, vcpus: int = 2, process: Process | None = None, launch: bool = True,
        image: list[bytes] | None = None, vm_type: str | None = None, failed: Failed | None = None,
    ) -> None:  # fmt: skip
        self.host = host
        self.npages = npages
        self.failed = failed if failed is not None else Failed()
        self.process = process or process_of(host)
        self.vm: VmFd = self.until_it_works(lambda: self.process.create_vm(vm_type))
        self.caps = self.vm.vm.caps
        self.two_kinds = self.caps.private_by_attribute or self.caps.confidential
        self.in_place = self.caps.converts_in_place or not self.two_kinds
        self.private: dict[int, int | None] = {}
        self.shared: dict[int, int | None] = self.private if self.in_place else {}
        self.as_shared: set[int] = set()
        """gfns that the guest uses as shared."""
        self.accepted: set[int] = set()
        self.stamp = 0
        self.fd = -1
        self.launched = False
        self.hva = self.process.mmap(npages * PAGE_BYTES)
        self.add_slot()
        if host.ops.has("register_region"):
            self.register()
        if self.caps.private_by_attribute:
            self.set_attributes(range(npages), True)
        self.vcpus: list[VcpuFd] = [self.until_it_works(self.vm.create_vcpu) for _ in range(vcpus)]
        if image:
            self.load(0, image)
        if launch:
            self.finish_launch()

    # ---- calling ----------------------------------------------------------------------------------------------

    def until_it_works(self, call: Callable[[], T]) -> T:
        """What a call gives in the end; it is made again where it fails for a reason that passes."""
        for i in range(TRIES):
            try:
                return call()
            except UapiError as error:
                if hasattr(self, "vm") and self.vm.vm.dead:
                    raise Died(self.vm.vm.dead_because) from None
                if error.errno not in self.passing:
                    raise
                self.failed.note(error.errno)
                if i == TRIES - 1 and not getattr(self, "launched", False):
                    raise  # a launch that failed half way cannot always go on
        raise AssertionError(f"a call fails for ever, though what made it fail went by: {self.failed.by_errno}")

    def run(self, action: Action, vcpu: int = 0) -> None:
        """KVM_RUN until the action is complete; conversions that the guest asks for are granted."""
        tries, left = 0, action.left
        while True:
            if action.left < left:  # what fails once in a while must not fail an action of many pages
                tries, left = 0, action.left
            leave: ExitReason | None = None
            try:
                leave = self.vcpus[vcpu].run(action)
            except UapiError as error:
                if self.vm.vm.dead:
                    raise Died(self.vm.vm.dead_because) from None
                if error.errno not in self.passing:
                    raise
                self.failed.note(error.errno)
                tries += 1
                said: object = error
            else:
                if leave is None:
                    return
                if isinstance(leave, MapGpaRange):
                    if self.caps.private_by_attribute:
                        for low, high in stretches(array_of(leave.gfns).tolist()):
                            self.set_attributes(range(low, high), leave.private)
                    continue
                if self.vm.vm.dead:
                    raise Died(self.vm.vm.dead_because)
                if isinstance(leave, GuestException):
                    self.excepted(leave)
                    tries += 1
                    assert tries < TRIES, f"{type(action).__name__} fails for ever in the guest"
                    continue
                passing = isinstance(leave, MemoryFault | Shutdown) and leave.errno in self.passing
                assert passing, f"{type(action).__name__} of {len(array_of(action.gfns))} pages ends in {leave}"
                assert isinstance(leave, MemoryFault | Shutdown)
                self.failed.note(leave.errno)
                tries += 1
                said = leave
            assert tries < TRIES, f"{type(action).__name__} fails for ever, though what made it fail went by: {said}"

    def excepted(self, exception: GuestException) -> None:
        """The guest hears of something that it cannot mend: here nothing may come to that."""
        raise AssertionError(f"the guest ends in {exception}")

    # ---- what a VMM does --------------------------------------------------------------------------------------

    def add_slot(self) -> None:
        """The memslot, with a new guest_memfd where the VM type has private memory there."""
        size, flags = self.npages * PAGE_BYTES, 0
        if self.caps.private_by_attribute and self.fd < 0:
            self.fd = self.until_it_works(lambda: self.vm.create_guest_memfd(size))
        if self.fd >= 0:
            flags = KVM_MEM_GUEST_MEMFD
        self.until_it_works(lambda: self.vm.set_user_memory_region2(0, flags, 0, size, self.hva, self.fd, 0))

    def delete_slot(self) -> None:
        """The memslot goes; attributes and memory stay."""
        self.until_it_works(lambda: self.vm.set_user_memory_region2(0, 0, 0, 0))
        if self.caps.zap_destroys_content:
            self._forget(gfn for gfn in range(self.npages) if gfn not in self.as_shared)

    def register(self) -> None:
        """All of the VMM's memory is named as encrypted."""
        self.until_it_works(lambda: self.vm.register_region(self.hva, self.npages * PAGE_BYTES))

    def unregister(self) -> None:
        """It is not any more."""
        self.until_it_works(lambda: self.vm.unregister_region(self.hva, self.npages * PAGE_BYTES))

    def mirror(self) -> None:
        """Another VM shares the VM's context for a while, or may not."""
        other = self.until_it_works(self.process.create_vm)
        try:
            self.until_it_works(lambda: other.copy_enc_context_from(self.vm))
        except UapiError as error:
            assert error.errno == errno.EINVAL, error
        other.close()

    def move(self) -> None:
        """Another VM takes the VM's context over, and goes on in its place; or it may not."""
        other = self.until_it_works(self.process.create_vm)
        size = self.npages * PAGE_BYTES
        self.until_it_works(lambda: other.set_user_memory_region2(0, 0, 0, size, self.hva))
        vcpus = [self.until_it_works(other.create_vcpu) for _ in self.vcpus]
        try:
            self.until_it_works(lambda: other.move_enc_context_from(self.vm))
        except UapiError as error:
            assert error.errno == errno.EINVAL, error
            other.close()
            return
        self.vm.close()
        self.vm, self.vcpus = other, vcpus

    def set_attributes(self, gfns: range, private: bool) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES."""
        value = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        start, size = gfns.start * PAGE_BYTES, len(gfns) * PAGE_BYTES
        self.until_it_works(lambda: self.vm.set_memory_attributes(start, size, value))

    def load(self, gfn: int, image: list[bytes], kind: str = "normal") -> None:
        """Image pages; the guest finds them accepted."""
        loaded = 0
        while loaded < len(image):
            at, rest = (gfn + loaded) * PAGE_BYTES, image[loaded:]
            loaded += self.until_it_works(lambda at=at, rest=rest: self.vm.launch_update(at, rest, kind))  # type: ignore[misc]
        for i, content in enumerate(image):
            self.private[gfn + i] = self.host.memory.intern(content)
            self.accepted.add(gfn + i)

    def finish_launch(self) -> None:
        """The image is complete: the guest can run."""
        self.until_it_works(self.vm.launch_finish)
        self.launched = True

    def punch(self, gfns: range) -> None:
        """Holes in the guest_memfd: what was private there is gone."""
        mode, start, size = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, gfns.start * PAGE_BYTES, len(gfns) * PAGE_BYTES
        self.until_it_works(lambda: self.process.fallocate(self.fd, mode, start, size))
        for gfn in gfns:
            self.private.pop(gfn, None)
            self.accepted.discard(gfn)

    def discard(self, gfns: range) -> None:
        """The VMM gives its own memory back (madvise)."""
        hva = self.hva + gfns.start * PAGE_BYTES
        self.until_it_works(lambda: self.process.madvise_dontneed(hva, len(gfns) * PAGE_BYTES))
        if not self.caps.honours_notifiers:
            return
        for gfn in gfns:
            self.shared.pop(gfn, None)

    def log_dirty(self, on: bool) -> None:
        """KVM_MEM_LOG_DIRTY_PAGES of the memslot, which has no guest_memfd."""
        flags, size = KVM_MEM_LOG_DIRTY_PAGES if on else 0, self.npages * PAGE_BYTES
        self.until_it_works(lambda: self.vm.set_user_memory_region2(0, flags, 0, size, self.hva, -1, 0))

    def recover(self) -> None:
        """A pass of the recovery thread that the policy `merge` may have."""
        self.until_it_works(self.vm.vm.recover_huge_pages)

    def host_write(self, gfns: range) -> HostVerdict:
        """The VMM writes to pages that the guest shares."""
        self.stamp += 1
        verdict = self.process.write(self.hva + gfns.start * PAGE_BYTES, self.stamp, len(gfns))
        if verdict is HostVerdict.OK:
            self.shared.update(dict.fromkeys(gfns, self.stamp))
        return verdict

    def host_read(self, gfns: range) -> tuple[HostVerdict, list[int]]:
        """What the VMM sees in its own memory."""
        verdict, seen = self.process.read(self.hva + gfns.start * PAGE_BYTES, len(gfns))
        return verdict, seen.tolist()

    def exit(self) -> None:
        """The process ends."""
        self.process.exit()

    # ---- what a guest does ------------------------------------------------------------------------------------

    def is_private(self, gfn: int) -> bool:
        """Whether the guest uses a gfn as private."""
        return self.two_kinds and gfn not in self.as_shared

    def accept(self, gfns: Iterable[int], vcpu: int = 0) -> None:
        """Accept what is not accepted yet; whole 2M blocks at once where the host backs with such."""
        new = sorted(set(gfns) - self.accepted)
        if not new or not self.caps.needs_accept:
            return
        if self.host.backing_level >= PG_LEVEL_2M and self.caps.max_private_level >= PG_LEVEL_2M:
            whole = [b for b in {g >> 9 for g in new} if all(b * 512 + i in set(new) for i in range(512))]
            for block in sorted(whole):
                self.run(Accept(slice(block * 512, block * 512 + 512, 512), level=PG_LEVEL_2M), vcpu)
            new = [gfn for gfn in new if gfn >> 9 not in whole]
            self.accepted.update(b * 512 + i for b in whole for i in range(512))
        if new:
            self.run(Accept(sel(new)), vcpu)
        self.accepted.update(new)

    def write(self, gfns: Iterable[int], vcpu: int = 0) -> None:
        """Write pages through the view that the guest uses, each with a stamp of its own."""
        for private in (True, False):
            some = [gfn for gfn in gfns if self.is_private(gfn) == private]
            if not some:
                continue
            if private:
                self.accept(some, vcpu)
            stamps = np.arange(self.stamp + 1, self.stamp + 1 + len(some), dtype=np.uint32)
            self.stamp += len(some)
            self.run(Touch(sel(some), write=True, private=private, stamps=stamps), vcpu)
            (self.private if private else self.shared).update(zip(some, stamps.tolist(), strict=True))

    def read(self, gfns: Iterable[int], vcpu: int = 0) -> None:
        """Read pages through the view that the guest uses, and compare with what must stand there."""
        for private in (True, False):
            some = [gfn for gfn in gfns if self.is_private(gfn) == private]
            if not some:
                continue
            if private:
                self.accept(some, vcpu)
            action = Touch(sel(some), private=private)
            self.run(action, vcpu)
            assert action.seen is not None
            store = self.private if private else self.shared
            fresh = None if private and not self.caps.fresh_is_zero else 0
            for gfn, seen in zip(some, action.seen.tolist(), strict=True):
                want = store.get(gfn, fresh)
                if want is not None and seen != want:
                    raise InvariantViolation(
                        "a page reads wrong", number=18 if want == 0 else 20, gfn=gfn,
                        states={"reads": seen, "was": want, "private": private}, events=self.host.last_events(),
                    )

    def check(self) -> None:
        """Read back every page that was ever written."""
        self.read(sorted(set(self.private) | set(self.shared)))

    def convert(self, gfns: Iterable[int], private: bool, vcpu: int = 0) -> None:
        """The guest converts pages that it has."""
        some = [gfn for gfn in gfns if self.is_private(gfn) != private]
        if not some or not self.two_kinds:
            return
        if not private:
            self.accept(some, vcpu)
        self.run(Convert(sel(some), private=private), vcpu)
        (self.as_shared.difference_update if private else self.as_shared.update)(some)
        self.accepted.difference_update(some)
        if self.caps.conversion_keeps_content:
            return
        if self.in_place:
            self._forget(some)
        else:
            # The private view is lost or not, as the vendor will have it; the shared one is the VMM's and stays.
            self.private.update(dict.fromkeys(some))

    def _forget(self, gfns: Iterable[int]) -> None:
        for gfn in gfns:
            self.private[gfn] = None
            self.accepted.discard(gfn)

    # ---- from outside -----------------------------------------------------------------------------------------

    def frames(self, gfns: Iterable[int]) -> dict[int, int]:
        """Frame behind each gfn that has one, as the owner of the memory knows it."""
        mapping = self.process.mm.find(self.hva >> 12)
        assert mapping is not None
        found: dict[int, int] = {}
        for gfn in gfns:
            words: Any = mapping.words
            if self.fd >= 0 and self.is_private(gfn):
                words = self.process.files[self.fd].inode.words
            if words[gfn]:
                found[gfn] = int(words[gfn]) >> 5
        return found


def sel(gfns: list[int]) -> Any:
    """Sorted gfns as a selector."""
    return as_sel(np.array(sorted(gfns), np.int64))


def stretches(gfns: list[int]) -> Iterator[tuple[int, int]]:
    """Contiguous ranges [low, high) of sorted gfns."""
    low = gfns[0]
    for at, following in zip(gfns, [*gfns[1:], -1], strict=True):
        if following != at + 1:
            yield low, at + 1
            low = following
