"""vCPUs (kernel: struct kvm_vcpu): what guest code does to memory, and how each thing it does gets through.

`Vcpu.run` is KVM_RUN: it performs one guest action until that is complete or user space is needed. An access is
walked (TLB, page tables, trusted hardware), what misses is faulted in, and only then the content moves.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.effects import Steps, operation, point
from cvmcore.errors import InvariantViolation, UapiError
from cvmcore.mem.fault import MAPPED, Fault, resolve
from cvmcore.mem.invalidate import zap_gfn_range
from cvmcore.mem.mmulock import drop
from cvmcore.mem.mmulock import write as lock_write
from cvmcore.mem.tdp import TABLE, TableCache
from cvmcore.pages import (
    EMPTY,
    IntArray,
    Sel,
    Words,
    array_of,
    as_sel,
    below,
    contiguous,
    count,
    expand,
    first,
    last,
    leading,
    part,
    pieces,
    shift,
    small_pages,
    take,
    where,
)
from cvmcore.tlb import Tlb
from cvmcore.types import (
    PG_LEVEL_1G,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    Access,
    Done,
    Exit,
    ExitReason,
    Fatal,
    GuestException,
    MapGpaRange,
    Mismatch,
    Refault,
    RetPf,
    Shutdown,
    Walk,
    order_of,
    pages_per_level,
)

if TYPE_CHECKING:
    from cvmcore.vm import Vm

GUEST = point("guest")
"""The vCPU runs guest code: others may act."""
RETRY = point("fault.retry")

STUCK = 1_000
"""Retries of one fault after which the model itself is at fault."""
IN_VAIN = 50
"""Times that one page is mapped, or mended, and then missed again, after which somebody is at fault."""

_NOT_ASKED = 0xFF
"""Of a page that is mapped, and whose turn to be accepted comes in a later round."""


@attrs.define(eq=False)
class Action:
    """Something that guest code does to pages: sorted unique 4K gfns. `done` pages are complete."""

    gfns: Sel
    done: int = 0

    def __attrs_post_init__(self) -> None:
        self.gfns = small_pages(self.gfns)

    @property
    def left(self) -> int:
        """How many pages are still to do."""
        return count(self.gfns) - self.done


@attrs.define(eq=False)
class Touch(Action):
    """Read or write whole pages through the private or the shared alias.

    stamps: what is written, one number or one for each gfn. seen: what a read found (uint32, one for each gfn).
    """

    write: bool = False
    private: bool = True
    stamps: int | Words = 0
    seen: Words | None = None


@attrs.define(eq=False)
class Accept(Action):
    """Accept (validate) private pages; `level` is the size the guest asks for, gfns the first 4K gfn of each.

    small: what is left, in 4K, of pages that fell back to 4K and stopped half way; it comes first.
    """

    level: int = PG_LEVEL_4K
    small: Sel = EMPTY

    def __attrs_post_init__(self) -> None:
        if self.level == PG_LEVEL_4K:
            self.gfns = small_pages(self.gfns)

    @property
    def left(self) -> int:
        return count(self.small) + (count(self.gfns) - self.done << order_of(self.level))


@attrs.define(eq=False)
class Convert(Action):
    """Convert pages to private or to shared. begun: for so many pages behind `done` the guest has done its own half."""

    private: bool = True
    begun: int = 0


class Tries:
    """How often the page that does not get through was tried: no page of an action is tried for ever."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.gfn = -1
        self.retries = self.mapped = 0
        self.block = -1
        """The last 2M block whose first page was faulted in alone (`Vcpu._before_mismatch`)."""

    def again(self, gfn: int, private: bool, *, mapped: bool = False) -> None:
        """The page is tried once more: the fault was overtaken (RETRY), or has `mapped` or mended it, and the walk will
        say. InvariantViolation: neither goes on for so long where the tables and the trusted party agree."""
        if gfn != self.gfn:
            self.gfn, self.retries, self.mapped = gfn, 0, 0
        self.retries += not mapped
        self.mapped += mapped
        if self.retries <= STUCK and self.mapped <= IN_VAIN:
            return
        what = f"a fault was retried {STUCK} times without progress"
        if mapped:
            what = f"a page was mapped {IN_VAIN} times, and the access does not get through"
        root = self.vm.tdp.root_for(private)
        level = root.level_at(gfn)
        pfn = first(root.lookup(slice(gfn, gfn + 1, 1), False)[1]) if level else None
        states: dict[str, object] = {"private": private, "mapped at level": level}
        raise InvariantViolation(what, gfn=gfn, pfn=pfn, states=states, events=self.vm.host.last_events())


class Vcpu:
    """One vCPU. `run` executes one guest action until it is complete or user space is needed."""

    def __init__(self, vm: Vm, vcpu_id: int, state: bytes = b"") -> None:
        self.vm = vm
        self.id = vcpu_id
        self.state = state
        self.arch: Any = None
        self.tlb = Tlb()
        self.tables = TableCache(vm.host.frames)
        self.in_guest = False
        self.ran = False
        self.exits = 0
        self.faults = 0
        self.retries = 0

    @property
    def drive(self) -> Any:
        return self.vm.host.drive

    def leave(self) -> None:
        """The vCPU leaves the guest (an exit or a kick)."""
        if self.in_guest:
            self.in_guest = False
            if self.vm.host.ops.has("vcpu_exit"):
                self.vm.host.ops.call_now("vcpu_exit", vcpu=self)

    def _enter(self) -> Steps[None]:
        if not self.in_guest:
            if self.vm.host.ops.has("vcpu_enter"):
                yield from self.vm.host.ops.call("vcpu_enter", vcpu=self)
            self.in_guest = True
            self.ran = self.vm.has_run = True

    @operation
    def run(self, action: Action) -> Steps[ExitReason | None]:
        """KVM_RUN while the guest performs `action`. None: it is complete. Else the exit; call again to go on.

        Raises UapiError(EIO) where the VM is dead.
        """
        if self.vm.dead:
            raise UapiError(errno.EIO, "KVM_RUN", f"the VM is dead: {self.vm.dead_because}")
        yield from self._enter()
        yield GUEST
        leave: ExitReason | None = None
        match action:
            case Touch():
                leave = yield from self._touch(action)
            case Accept():
                leave = yield from self._accept(action)
            case Convert():
                leave = yield from self._convert(action)
        self.leave()
        if leave is not None and not isinstance(leave, GuestException):
            n = leave.exits if isinstance(leave, MapGpaRange) else 1
            self.exits += n
            self.vm.host.meter.charge("user_exit", n)
            self.vm.host.ops.emit("exit", type(leave).__name__, vm=self.vm.id, n=n, info={"exit": leave})
        self.vm.host.ops.quiet(self.vm)
        return leave

    # ---- touching ---------------------------------------------------------------------------------------------

    def _touch(self, action: Touch) -> Steps[ExitReason | None]:
        for start, stop in pieces(action.gfns, action.done):
            leave = yield from self._touch_piece(action, start, stop)
            if leave is not None:
                return leave
        return None

    def _touch_piece(self, action: Touch, start: int, stop: int) -> Steps[ExitReason | None]:
        """Positions [start, stop) of the action: walk, fault in what misses, access."""
        tries = Tries(self.vm)
        while start < stop:
            gfns = part(action.gfns, start, stop)
            access, n = yield from self._walk(gfns, action.write, action.private)
            status = access.status
            if isinstance(status, int):
                good, missing, kind = (n if status == Walk.OK else 0), (n if status == Walk.MISS else 0), status
            else:
                good, missing = _leading(status, 0, n, Walk.OK), 0
                kind = int(status[good]) if good < n else int(Walk.OK)
                if kind == Walk.MISS:
                    neither = status > Walk.MISS
                    missing = int(np.argmax(neither)) if np.count_nonzero(neither) else n
            if missing:
                # Fault in all that misses before anything else decides, then walk again.
                lost = part(gfns, 0, missing)
                if not isinstance(status, int):
                    lost = where(lost, status[:missing] == Walk.MISS)
                if action.private and self.vm.caps.needs_accept:
                    lost = part(lost, 0, (yield from self._accepted_before(lost, action.write)))
                lost = self._before_mismatch(lost, tries)
                leave, done = yield from self._fault(lost, action.write, action.private)
                if leave is not None:
                    if done == count(lost):
                        return leave
                    # Pages before the one that leaves are complete, as they would be one by one.
                    before = start + _position(gfns, first(part(lost, done, done + 1)))
                    earlier = yield from self._touch_piece(action, start, before)
                    return earlier or leave
                tries.again(first(lost), action.private, mapped=done > 0)
            elif good:
                gfns, pfns = part(gfns, 0, good), part(access.pfns, 0, good)
                self.tlb.fill(gfns, pfns, action.write, action.private)
                self._content(action, start, gfns, pfns)
                start += good
                action.done = start
            elif kind == Walk.MISMATCH:
                leave, _ = yield from self._fault(part(gfns, 0, 1), action.write, action.private, mismatch=True)
                if leave is not None:
                    return leave
                tries.again(first(gfns), action.private, mapped=True)
            elif kind == Walk.UNACCEPTED and self.vm.caps.unaccepted_is_fatal:
                self.vm.bug(f"the guest touched gfn {first(gfns):#x}, which it has not accepted")
                return Shutdown(errno.EIO, self.vm.dead_because)
            else:
                return GuestException(first(gfns), Walk(kind).name)
        return None

    def _walk(self, gfns: Sel, write: bool, private: bool) -> Steps[tuple[Access, int]]:
        """What TLB, page tables and trusted hardware say; for how many leading gfns (pages of one level at a time)."""
        vm = self.vm
        n = count(gfns)
        root = vm.tdp.root_for(private)
        ops = vm.host.ops
        if last(gfns) >= vm.tdp.end_gfn:
            # Above every memslot there is nothing to walk.
            n = below(gfns, vm.tdp.end_gfn)
            if n == 0:
                return Access(int(Walk.MISS), EMPTY), count(gfns)
            gfns = part(gfns, 0, n)
        if root.external:
            access: Access = yield from ops.call(
                "guest_access", n, vm=vm, vcpu=self, gfns=gfns, pfns=EMPTY, level=PG_LEVEL_4K, write=write,
                private=private,
            )
            return self._through_tlb(gfns, access, write, private), n
        status, pfns, level = root.lookup(gfns, write)
        if ops.has("guest_access") and not vm.caps.has_mirror and (not isinstance(status, int) or status == Walk.OK):
            if not isinstance(level, int):
                n = _leading(level, 0, n, int(level[0]))
                level = int(level[0])
                status = status if isinstance(status, int) else status[:n]
                gfns, pfns = part(gfns, 0, n), part(pfns, 0, n)
            if isinstance(status, int):
                access = yield from ops.call(
                    "guest_access", n, vm=vm, vcpu=self, gfns=gfns, pfns=pfns, level=level, write=write, private=private
                )
            else:
                access = yield from self._check_mapped(gfns, pfns, status, level, write, private)
        else:
            access = Access(status, pfns)
        return self._through_tlb(gfns, access, write, private), n

    def _check_mapped(
        self, gfns: Sel, pfns: Sel, status: npt.NDArray[np.uint8], level: int, write: bool, private: bool
    ) -> Steps[Access]:
        """The hardware's own check for those pages of a mixed batch that the tables map."""
        mapped = status == Walk.OK
        some = where(gfns, mapped)
        at = np.flatnonzero(mapped)
        access = yield from self.vm.host.ops.call(
            "guest_access", len(at), vm=self.vm, vcpu=self, gfns=some, pfns=contiguous(array_of(pfns)[at]), level=level,
            write=write, private=private,
        )
        status = status.copy()
        status[at] = access.status
        return Access(status, pfns)

    def _through_tlb(self, gfns: Sel, access: Access, write: bool, private: bool) -> Access:
        """A translation in the TLB is used as it is, even where the tables say otherwise by now."""
        hits = self.tlb.hits(gfns, write, private)
        if not hits:
            return access
        stale = [
            (at, pfn)
            for at, pfn in hits
            if not isinstance(access.status, int)
            or access.status != Walk.OK
            or first(part(access.pfns, at, at + 1)) != pfn
        ]
        if stale:
            n = count(gfns)
            status = np.full(n, access.status, np.uint8) if isinstance(access.status, int) else access.status.copy()
            pfns = array_of(access.pfns).copy() if count(access.pfns) == n else np.zeros(n, np.int64)
            for at, pfn in stale:
                status[at], pfns[at] = Walk.OK, pfn
            access = Access(status if np.count_nonzero(status != Walk.OK) else int(Walk.OK), contiguous(pfns))
        return access

    def _accepted_before(self, gfns: Sel, write: bool) -> Steps[int]:
        """How many leading pages to fault in at once: those that the guest will find accepted, at least one.

        The page after them ends in an exception, behind which one by one nothing would be faulted in.
        """
        vm = self.vm
        slot = vm.slots.find(first(gfns))
        if vm.tdp.root_for(True).external or slot is None or slot.gmem is None or last(gfns) >= slot.end_gfn:
            return 1
        words = take(slot.gmem.inode.words, shift(gfns, slot.to_index(gfns)))
        n = _leading(words != 0, 0, len(words), True)
        if n == 0:
            return 1
        access: Access = yield from vm.host.ops.call(
            "guest_access", n, vm=vm, vcpu=self, gfns=part(gfns, 0, n), pfns=contiguous(words[:n] >> np.uint32(5)),
            level=PG_LEVEL_4K, write=write, private=True,
        )
        if isinstance(access.status, int):
            return 1 if access.status == Walk.UNACCEPTED else n
        return max(1, _leading(access.status != Walk.UNACCEPTED, 0, n, True))

    def _before_mismatch(self, gfns: Sel, tries: Tries, *, small: bool = False, parts: bool = False) -> Sel:
        """The leading missing pages to fault in at once, where mending a mismatch zaps 2M from the page on.

        The trusted table may disagree about the first page of a block that cannot be mapped as large as the host backs
        it, or that the guest accepts in `small` pages, or gives back in such, as it has `parts` of the block only. One
        by one nothing behind that page would be mapped by then.
        """
        vm = self.vm
        if vm.host.backing_level == PG_LEVEL_4K or not vm.host.ops.has("after_fault"):
            return gfns
        slot = vm.slots.find(first(gfns))
        if slot is None or slot.gmem is None:
            return gfns
        block = array_of(part(gfns, 0, below(gfns, slot.end_gfn))) >> order_of(PG_LEVEL_2M)
        begins = np.flatnonzero(np.diff(block, prepend=-1))
        alone = block[begins] > tries.block
        if not small:
            mixed = slot.lpage[PG_LEVEL_2M][block[begins] - (slot.base_gfn >> order_of(PG_LEVEL_2M))] != 0
            alone &= mixed | parts & (np.diff(begins, append=len(block)) < pages_per_level(PG_LEVEL_2M))
        if not np.count_nonzero(alone):
            return gfns
        at = int(begins[np.argmax(alone)])
        tries.block = int(block[at])
        return part(gfns, 0, at + 1)

    def _content(self, action: Touch, start: int, gfns: Sel, pfns: Sel) -> None:
        """The access itself: content through the VM's key, or plain."""
        host = self.vm.host
        key = self.vm.key if action.private else 0
        n = count(gfns)
        if action.write:
            stamps = action.stamps if isinstance(action.stamps, int) else action.stamps[start : start + n]
            host.memory.write(pfns, stamps, key)
            host.meter.charge("guest_write_4k", n)
        else:
            if action.seen is None:
                action.seen = np.zeros(count(action.gfns), np.uint32)
            action.seen[start : start + n] = host.memory.read(pfns, key)
            host.meter.charge("guest_read_4k", n)

    # ---- faulting ---------------------------------------------------------------------------------------------

    def _fault(
        self, gfns: Sel, write: bool, private: bool, max_level: int = PG_LEVEL_1G, *, mismatch: bool = False
    ) -> Steps[tuple[ExitReason | None, int]]:
        """Stage-2 faults on missing gfns: exit, resolve, re-enter. Returns what leaves KVM_RUN, and how many leading
        gfns are mapped now: the guest goes on with those before one that leaves; all, where it cannot go on.

        mismatch: of one that is mapped, the trusted table disagreed, and the backend mends it.
        """
        vm = self.vm
        self.leave()
        fault: Fault = yield from resolve(vm, self, gfns, write, private, max_level=max_level)
        self.faults += fault.faults
        vm.host.meter.charge("vm_exit", fault.faults + (fault.ret not in MAPPED))
        done, tries = fault.done, Tries(vm)
        while fault.ret is RetPf.RETRY:
            self.retries += 1
            yield RETRY
            page = part(gfns, done, done + 1)
            if not self._stays_in_kvm(first(page), private):
                break
            vm.host.meter.charge("fault_fixed")  # of the try that was overtaken: else no time passes for the other
            tries.again(first(page), private)
            fault = yield from resolve(vm, self, page, write, private, max_level=max_level)
            self.faults += fault.faults
            done += fault.done
        if fault.ret not in MAPPED and fault.ret is not RetPf.RETRY:
            if done and not vm.dead:
                try:
                    yield from self._enter()  # the guest goes on with the pages before
                except UapiError as error:
                    return Shutdown(error.errno, error.why), count(gfns)
            if fault.exit is not None:
                return fault.exit, done
            return Shutdown(fault.errno, fault.why or "the fault could not be resolved"), done
        if mismatch and not vm.dead:
            yield from self._mend(first(gfns))
        if vm.dead:
            return Shutdown(errno.EIO, vm.dead_because), done
        try:
            yield from self._enter()
        except UapiError as error:
            return Shutdown(error.errno, error.why), done  # what the guest has done so far stays done
        yield GUEST
        return None, done

    def _stays_in_kvm(self, gfn: int, private: bool) -> bool:
        """Whether a fault that was overtaken is resolved again at once: not on a memslot that is going away, which
        waits for the vCPU to come out (kernel: tdx_handle_ept_violation)."""
        vm = self.vm
        slot = vm.slots.find(gfn)
        return vm.caps.retries_in_kvm and private and not vm.dead and not (slot is not None and slot.invalid)

    def _mend(self, gfn: int) -> Steps[None]:
        """The fault was dealt with, but the trusted table disagrees about the page: let the backend mend it. What is
        zapped is 2M from the page on, not the block that it lies in (kernel: sev_handle_rmp_fault)."""
        vm, page = self.vm, slice(gfn, gfn + 1, 1)
        root = vm.tdp.root_for(True)
        level = root.level_at(gfn)
        if not level:
            return
        pfns = root.lookup(page, False)[1]
        if (yield from vm.host.ops.call("after_fault", vm=vm, vcpu=self, gfns=page, pfns=pfns, level=level)):
            yield from zap_gfn_range(vm, gfn, gfn + pages_per_level(PG_LEVEL_2M))

    # ---- accepting --------------------------------------------------------------------------------------------

    def _accept(self, action: Accept) -> Steps[ExitReason | None]:
        if count(action.small):
            leave = yield from self._accept_pages(action.small, PG_LEVEL_4K)
            action.small = self._pending
            if leave is not None:
                return leave
        todo = part(action.gfns, action.done, count(action.gfns))
        for low, high in self._accepted_together(todo, action.level):
            self._small = EMPTY
            leave = yield from self._accept_pages(part(todo, low, high), action.level)
            if leave is not None:
                # What was accepted before stays accepted; the caller retries the piece's rest.
                action.gfns = _joined(self._pending, part(todo, high, count(todo)))
                action.small, action.done = self._small, 0
                return leave
            action.done += high - low
        return None

    def _accepted_together(self, gfns: Sel, level: int) -> Iterator[tuple[int, int]]:
        """Positions [low, high) of pages that are accepted in one go. Blocks that will be accepted in 4K go one by one:
        where such a block stops half way, one behind it must not have been faulted in or tried."""
        for low, high in pieces(gfns):
            if level == PG_LEVEL_4K or high - low == 1:
                yield low, high
                continue
            alone = self._falls_back(part(gfns, low, high), level)
            cuts = [0, *(np.flatnonzero(alone[1:] | alone[:-1]) + 1).tolist(), high - low]
            for start, stop in pairwise(cuts):
                yield low + start, low + stop

    def _falls_back(self, gfns: Sel, level: int) -> npt.NDArray[np.bool_]:
        """Which blocks cannot be mapped at `level`, or are mapped small already."""
        vm, order = self.vm, order_of(level)
        n = count(gfns)
        if vm.host.backing_level < level:
            return np.ones(n, bool)
        small = np.zeros(n, bool)
        if vm.caps.private_by_attribute:
            small |= (vm.attributes.of(expand(gfns, order)).reshape(n, -1) == 0).any(axis=1)
        entries = vm.tdp.root_for(True).entries[level]
        block = array_of(gfns) >> order
        inside = block < len(entries)
        small[inside] |= (entries[block[inside]] & np.uint32(TABLE)) != 0
        return small

    def _accept_pages(self, gfns: Sel, level: int) -> Steps[ExitReason | None]:
        """Accept until all pages are; `self._pending` holds what was left where it had to stop, `self._small` what was
        left in 4K of those that fell back."""
        tries = Tries(self.vm)
        self._pending = gfns
        while n := count(gfns):
            access = yield from self._accept_once(gfns, level)
            if isinstance(access.status, int):
                if access.status == Walk.OK:
                    break
                rest, kind, left = gfns, access.status, n
                same = n
            else:
                not_ok = access.status != Walk.OK
                rest = where(gfns, not_ok)
                statuses = access.status[not_ok]
                left = len(statuses)
                if not left:
                    break
                kind = int(statuses[0])
                same = _leading(statuses, 0, left, kind)
            gfns = self._pending = rest
            if kind == _NOT_ASKED:
                continue
            if kind == Walk.MISS:
                ceiling = level if self.vm.caps.fault_tells_accept_level else PG_LEVEL_1G
                lost = part(gfns, 0, same)
                if not isinstance(access.status, int) and same < left:
                    # Pages in between that are mapped wait for their turn.
                    missing = statuses == Walk.MISS
                    upto = _leading(missing | (statuses == _NOT_ASKED), 0, left, True)
                    lost = where(part(gfns, 0, upto), missing[:upto])
                lost = self._before_mismatch(lost, tries, small=level == PG_LEVEL_4K)
                leave, moved = yield from self._fault(lost, True, True, max_level=ceiling)
                if leave is not None:
                    if moved == count(lost):
                        return leave
                    # Pages before the one that leaves are complete, as they would be one by one.
                    before = _position(rest, first(part(lost, moved, moved + 1)))
                    earlier = yield from self._accept_pages(part(rest, 0, before), level)
                    self._pending = _joined(self._pending, part(rest, before, left))
                    return earlier or leave
                tries.again(first(gfns), True, mapped=moved > 0)
            elif kind == Walk.MISMATCH:
                leave, _ = yield from self._fault(part(gfns, 0, 1), True, True, mismatch=True)
                if leave is not None:
                    return leave
                tries.again(first(gfns), True, mapped=True)
            elif kind == Walk.LARGER:
                tries.again(first(gfns), True, mapped=True)
                leave = yield from self._split_for_accept(first(gfns), level)
                if leave is not None:
                    return leave
            elif kind == Walk.SMALLER and level > PG_LEVEL_4K:
                small = expand(part(gfns, 0, same), order_of(level))
                leave = yield from self._accept_pages(small, PG_LEVEL_4K)
                if leave is not None:
                    self._small, self._pending = self._pending, part(rest, same, count(rest))
                    return leave
                gfns = self._pending = part(rest, same, count(rest))
            else:
                return GuestException(first(gfns), Walk(kind).name)
        self._pending = EMPTY
        return None

    _pending: Sel = EMPTY
    _small: Sel = EMPTY

    def _accept_once(self, gfns: Sel, level: int) -> Steps[Access]:
        """One try. Where the CPU walks KVM's own root, unmapped pages miss before the instruction does anything."""
        vm = self.vm
        root = vm.tdp.root_for(True)
        pfns: Sel = EMPTY
        map_level = PG_LEVEL_4K
        if not root.external:
            if last(gfns) >= vm.tdp.end_gfn:
                return Access(int(Walk.MISS), EMPTY)
            status, pfns, levels = root.lookup(gfns, True)
            if not isinstance(status, int):
                # Leading mapped pages first, else what misses.
                if status[0] != Walk.OK:
                    return Access(np.where(status == Walk.OK, np.uint8(_NOT_ASKED), status), EMPTY)
                n = _leading(status, 0, len(status), Walk.OK)
                access = yield from self._accept_once(part(gfns, 0, n), level)
                whole = np.full(count(gfns), _NOT_ASKED, np.uint8)
                whole[:n] = access.status
                return Access(whole, EMPTY)
            if status != Walk.OK:
                return Access(status, EMPTY)
            if not isinstance(levels, int):
                n = _leading(levels, 0, len(levels), int(levels[0]))
                access = yield from self._accept_once(part(gfns, 0, n), level)
                whole = np.full(count(gfns), _NOT_ASKED, np.uint8)
                whole[:n] = access.status
                return Access(whole, EMPTY)
            map_level = levels
        result: Access = yield from vm.host.ops.call(
            "guest_accept", count(gfns), vm=vm, vcpu=self, gfns=gfns, pfns=pfns, level=level, map_level=map_level
        )
        return result

    def _split_for_accept(self, gfn: int, level: int) -> Steps[ExitReason | None]:
        """A larger page than the guest accepts is in the way: split it under mmu_lock (tdx: split on ACCEPT)."""
        vm = self.vm
        root = vm.tdp.root_for(True)
        self.leave()
        vm.host.meter.charge("vm_exit")
        if root.mirror:
            try:
                self.tables.topup(1)
            except UapiError as error:
                return Shutdown(error.errno, error.why)
        locks = vm.mmu_lock.covering(slice(gfn, gfn + 1, 1))
        yield from lock_write(locks)
        found = root.level_at(gfn)
        stop = None
        if found > level:
            stop = yield from vm.tdp.split(root, gfn, found, self.tables)
            if stop is None:
                yield from vm.flush_tlbs(gfn & ~((1 << order_of(found)) - 1), (gfn | ((1 << order_of(found)) - 1)) + 1)
        yield from drop(locks)
        self.tables.give_back()
        if stop is not None and isinstance(stop.reason, Fatal):
            return Shutdown(stop.reason.errno, stop.reason.why)
        yield from self._enter()
        return None

    # ---- converting -------------------------------------------------------------------------------------------

    def _convert(self, action: Convert) -> Steps[ExitReason | None]:
        vm = self.vm
        tries = Tries(vm)
        faults, stop = 0, count(action.gfns)
        leave: ExitReason | None = None
        while action.done < stop:
            gfns = part(action.gfns, action.done, stop)
            result = yield from vm.host.ops.call(
                "guest_convert", count(gfns) - action.begun, vm=vm, vcpu=self, gfns=gfns, private=action.private,
                begun=action.begun, faults=faults,
            )
            faults = 0
            if result is None:
                result = Exit(count(gfns))
            for vcpu in vm.vcpus:
                vcpu.tlb.drop(gfns)
            if isinstance(result, Done):
                action.done += result.n
                if result.n:
                    continue
                return GuestException(first(gfns), "conversion refused")
            if isinstance(result, Refault | Mismatch):
                at, start = _position(gfns, result.gfn), action.done
                mismatch = isinstance(result, Mismatch)
                n, pages = (0, 1) if isinstance(result, Mismatch) else (result.n, result.pages)
                action.done += n
                action.begun = result.begun
                if leave is not None and start + at + 1 == stop:
                    return leave  # for the page that could not be faulted in
                lost = part(gfns, at, at + pages)
                if not mismatch:
                    lost = self._before_mismatch(lost, tries, parts=True)
                left, moved = yield from self._fault(lost, True, not action.private, mismatch=mismatch)
                whole = moved == count(lost)
                if left is not None:
                    if whole or not moved or vm.dead:
                        return left
                    # Pages before the one that leaves are converted, as they would be one by one.
                    leave, stop = left, start + at + moved + 1
                # The first fault was the call that was answered; of a page that leaves, the replay will tell.
                faults = max(0, moved - (left is not None or whole))
                tries.again(result.gfn, not action.private, mapped=moved > 0)
                continue
            action.begun = 0
            asked = part(gfns, 0, result.n)
            action.done += result.n
            chunks = result.exits or _hypercalls(asked)
            vm.host.meter.charge("vm_exit", chunks)
            return MapGpaRange(asked, action.private, chunks)
        return leave


def _hypercalls(gfns: Sel) -> int:
    """Exits that a conversion of these gfns takes: one per contiguous range within a 2 MiB block."""
    if isinstance(gfns, slice):
        return (last(gfns) >> 9) - (gfns.start >> 9) + 1 if count(gfns) else 0
    gaps = (gfns[1:] != gfns[:-1] + 1) | ((gfns[1:] >> 9) != (gfns[:-1] >> 9))
    return int(np.count_nonzero(gaps)) + 1


def _position(gfns: Sel, gfn: int) -> int:
    """Where a gfn of the batch stands in it."""
    return (gfn - gfns.start) // (gfns.step or 1) if isinstance(gfns, slice) else int(np.searchsorted(gfns, gfn))


def _leading(values: int | npt.NDArray[Any], start: int, n: int, wanted: int) -> int:
    """How many values from `start` on equal `wanted`; n where there is one value for all."""
    if isinstance(values, int):
        return n
    return leading(values[start : start + n] == wanted)


def _joined(head: Sel, tail: Sel) -> Sel:
    """Two selectors, the second behind the first."""
    both: IntArray = np.concatenate([array_of(head), array_of(tail)])
    return as_sel(both)
