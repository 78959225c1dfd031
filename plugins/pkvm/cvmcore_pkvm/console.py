"""The hypervisor alone, as `cvm hw pkvm SCRIPT.jsonl` drives it: a fresh machine and its operations, by their names.

Where the kernel's call is about one page, `nr` asks for so many calls, one after the other; `done` says how many took
effect. host_share_guest, host_unshare_guest, wrprotect and test_clear_young are one call, about `nr` pages (1 or 512).
Every answer has the status, its code, and the state of what was named; what is legal is checked after each operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from cvmcore import hwscript
from cvmcore.hwscript import op
from cvmcore.memory import Memory
from cvmcore.pages import array_of, count, run
from cvmcore.types import Walk
from cvmcore_pkvm import hw
from cvmcore_pkvm.errors import Ffa, Smccc
from cvmcore_pkvm.hw import Hyp, HypVm, Owner, PageState, Prot, Result

Answer: TypeAlias = dict[str, Any]

NR_FRAMES = 1 << 13
SHOWN = 8
"""States of at most so many pages are in an answer."""
RIGHTS = {"r": Prot.R, "w": Prot.W, "x": Prot.X}


def machine() -> Mapping[str, Callable[..., Mapping[str, Any]]]:
    """A machine of 8192 frames, all of them the host's, and what can be done there."""
    return Console().operations()


def _pages(start: int, nr: int) -> slice:
    if start < 0 or not 0 < nr <= NR_FRAMES:
        raise ValueError(f"{nr} pages from {start}: give a start that is not negative, and 1 to {NR_FRAMES} pages")
    return run(start, nr)


class Console(hwscript.Console):
    """The hypervisor, and how what it says is told."""

    def __init__(self) -> None:
        self.memory = Memory(NR_FRAMES)
        self.hyp = Hyp(self.memory, checked=True)
        self.top = NR_FRAMES
        self.memcaches: dict[tuple[int, int], list[int]] = {}

    # ---- what is told -----------------------------------------------------------------------------------------

    def _frame(self, pfn: int) -> Answer:
        """What the frame table says of a frame, with the annotation where the host has lost it."""
        hyp = self.hyp
        if not 0 <= pfn < NR_FRAMES:
            return {"pfn": pfn, "host": "no memory"}
        byte = int(hyp.frame[pfn])
        host = PageState(byte & hw.HOST_BITS)
        told: Answer = {"pfn": pfn, "host": host.name, "hyp": PageState(byte >> 4 & 3 ^ PageState.NOPAGE).name}
        if host is PageState.NOPAGE:
            owner = int(hyp.owner[pfn])
            told["owner"] = Owner.HYP.name if owner == Owner.HYP else f"GUEST {owner:#x} gfn {int(hyp.owner_gfn[pfn])}"
        for name, array in (("refcount", hyp.refcount), ("share_count", hyp.share_count)):
            if array[pfn]:
                told[name] = int(array[pfn])
        return told

    def _leaf(self, vm: HypVm, gfn: int) -> Answer:
        """What a guest's stage 2 says of a gfn, and the frame behind it."""
        pages = vm.stage2.pages
        word = int(vm.stage2.leaves(run(gfn, 1))[0]) if gfn < len(pages) else 0
        bits, pfn = word & hw.LEAF_BITS, word >> hw.FRAME_SHIFT
        told: Answer = {"gfn": gfn}
        if bits & hw.LEAF_BORROWED:
            told["guest"] = PageState.SHARED_BORROWED.name
            told["prot"] = "".join(name for name, right in RIGHTS.items() if bits & right)
            told["young"] = bool(bits & hw.LEAF_YOUNG)
            told["pages"] = hw.PAGES_BLOCK if int(vm.stage2.blocks[gfn >> hw.BLOCK_ORDER]) else 1
        else:
            told["guest"] = next(state.name for state, leaf in hw.LEAF_OF.items() if leaf == bits)
        if bits > hw.LEAF_POISON:
            told |= self._frame(pfn)
        return told

    def _frames(self, pfns: slice) -> list[Answer]:
        return [self._frame(pfn) for pfn in range(pfns.start, pfns.stop)[:SHOWN]]

    def _leaves(self, vm: HypVm | None, gfns: slice) -> list[Answer]:
        return [] if vm is None else [self._leaf(vm, gfn) for gfn in range(gfns.start, gfns.stop)[:SHOWN]]

    def _told(self, result: Result, state: list[Answer] | None = None, **more: Any) -> Answer:
        told: Answer = {"status": result.status.name, "code": int(result.status), "done": result.done}
        if result.need:
            told["need"] = result.need
        if result.work:
            told["work"] = dict(result.work)
        return told | more | ({} if state is None else {"state": state})

    def _on(self, cpu: int) -> HypVm | None:
        vcpu = self.hyp.loaded.get(cpu)
        return None if vcpu is None else vcpu.vm

    # ---- host, hyp and FF-A -----------------------------------------------------------------------------------

    @op
    def host_share_hyp(self, pfn: int, nr: int = 1) -> Answer:
        """The host shares pages with EL2."""
        pfns = _pages(pfn, nr)
        return self._told(self.hyp.host_share_hyp(pfns), self._frames(pfns))

    @op
    def host_unshare_hyp(self, pfn: int, nr: int = 1) -> Answer:
        """The host takes them back."""
        pfns = _pages(pfn, nr)
        return self._told(self.hyp.host_unshare_hyp(pfns), self._frames(pfns))

    @op
    def hyp_pin(self, pfn: int, nr: int = 1) -> Answer:
        """EL2 pins a shared range."""
        return self._told(self.hyp.hyp_pin(pfn, nr), self._frames(_pages(pfn, nr)))

    @op
    def hyp_unpin(self, pfn: int, nr: int = 1) -> Answer:
        """EL2 unpins it."""
        pfns = _pages(pfn, nr)
        if pfns.stop > NR_FRAMES or not self.hyp.refcount[pfns].all():
            raise ValueError("EL2 unpins only what it has pinned")
        return self._told(self.hyp.hyp_unpin(pfn, nr), self._frames(pfns))

    @op
    def host_donate_hyp(self, pfn: int, nr: int = 1) -> Answer:
        """EL2 takes a range from the host."""
        return self._told(self.hyp.host_donate_hyp(pfn, nr), self._frames(_pages(pfn, nr)))

    @op
    def hyp_donate_host(self, pfn: int, nr: int = 1) -> Answer:
        """EL2 gives a range back."""
        return self._told(self.hyp.hyp_donate_host(pfn, nr), self._frames(_pages(pfn, nr)))

    @op
    def host_share_ffa(self, pfn: int, nr: int = 1) -> Answer:
        """The host lends a range to TrustZone."""
        return self._told(self.hyp.host_share_ffa(pfn, nr), self._frames(_pages(pfn, nr)))

    @op
    def host_unshare_ffa(self, pfn: int, nr: int = 1) -> Answer:
        """The host has it back."""
        return self._told(self.hyp.host_unshare_ffa(pfn, nr), self._frames(_pages(pfn, nr)))

    @op
    def ffa_mem_share(self, ranges: list[list[int]]) -> Answer:
        """The FF-A proxy shares (pfn, nr) ranges, all or none."""
        return self._ffa(self.hyp.ffa_mem_share, ranges)

    @op
    def ffa_mem_reclaim(self, ranges: list[list[int]]) -> Answer:
        """The proxy takes back ranges that TrustZone has given up."""
        for pfn, nr in self._pairs(ranges):
            frames = _pages(pfn, nr)
            if frames.stop > NR_FRAMES or ((self.hyp.frame[frames] & hw.STATE_BITS) != PageState.SHARED_OWNED).any():
                raise ValueError(f"{nr} pages from {pfn} are not lent")
        return self._ffa(self.hyp.ffa_mem_reclaim, ranges)

    @staticmethod
    def _pairs(ranges: list[list[int]]) -> list[tuple[int, int]]:
        pairs = []
        for one in ranges:
            if not isinstance(one, list) or len(one) != 2 or not all(type(value) is int for value in one):
                raise ValueError("ranges are pairs of two whole numbers, [pfn, nr]")
            pairs.append((one[0], one[1]))
        return pairs

    def _ffa(self, call: Callable[[list[tuple[int, int]]], Ffa], ranges: list[list[int]]) -> Answer:
        pairs = self._pairs(ranges)
        for pfn, nr in pairs:
            _pages(pfn, nr)
        status = call(pairs)
        return {
            "status": status.name, "code": int(status), "state": [self._frame(pfn) for pfn, _ in pairs[:SHOWN]],
        }  # fmt: skip

    @op
    def handle_host_mem_abort(self, pfn: int, nr: int = 1) -> Answer:
        """The host touches pages: EPERM where EL2 injects an abort."""
        pfns = _pages(pfn, nr)
        return self._told(self.hyp.handle_host_mem_abort(pfns), self._frames(pfns))

    # ---- VMs and vCPUs ----------------------------------------------------------------------------------------

    @op
    def make_vm(self, protected: bool = True, nr_vcpus: int = 1, spare: int = 16) -> Answer:
        """All that the host does to have a VM with vCPUs, vCPU i loaded on a CPU of its own: reserve_vm, init_vm,
        init_vcpu, vcpu_load. Frames are taken from the top of memory, `spare` of them for each list of table pages."""
        if not 0 < nr_vcpus <= 16 or not 0 <= spare <= 512:
            raise ValueError("a VM has 1 to 16 vCPUs here, and 0 to 512 spare pages for each")
        hyp = self.hyp
        reserved = hyp.reserve_vm()
        if not reserved.ok:
            return self._told(reserved)
        handle: int = reserved.answer
        kvm = self._take(1)
        memory, pgd = self._take(hw.vm_pages(nr_vcpus)), self._take(hw.PGD_PAGES)
        results = [hyp.host_share_hyp(kvm), hyp.init_vm(handle, protected, nr_vcpus, kvm, memory, pgd)]
        cpus = []
        for index in range(nr_vcpus):
            vcpu, own, listed = self._take(1), self._take(hw.VCPU_PAGES), self._take(spare)
            memcache = self.memcaches[handle, index] = array_of(listed).tolist()
            results += [hyp.host_share_hyp(vcpu), hyp.init_vcpu(handle, index, vcpu, own, memcache)]
            cpus.append(16 * (handle - hw.HANDLE_OFFSET) + index)
            results.append(hyp.vcpu_load(cpus[-1], handle, index))
        worst = next((result for result in results if not result.ok), results[-1])
        return self._told(worst, handle=handle, cpus=cpus)

    def _take(self, n: int) -> slice:
        if n > self.top:
            raise ValueError("there is no memory left")
        self.top -= n
        return run(self.top, n)

    @op
    def reserve_vm(self) -> Answer:
        """A handle for a VM."""
        result = self.hyp.reserve_vm()
        return self._told(result, handle=result.answer)

    @op
    def unreserve_vm(self, handle: int) -> Answer:
        """Gives the handle up."""
        return self._told(self.hyp.unreserve_vm(handle))

    @op
    def init_vm(self, handle: int, protected: bool, nr_vcpus: int, host_kvm: int, memory: int, pgd: int) -> Answer:
        """Makes the VM; host_kvm, memory and pgd: first frames of struct kvm (1), of EL2's own, and of the root."""
        pages = hw.vm_pages(max(0, nr_vcpus))
        frames = _pages(host_kvm, 1), _pages(memory, pages), _pages(pgd, hw.PGD_PAGES)
        return self._told(self.hyp.init_vm(handle, protected, nr_vcpus, *frames), self._frames(frames[1]))

    @op
    def init_vcpu(self, handle: int, index: int, host_vcpu: int, memory: int, memcache: list[int]) -> Answer:
        """Makes a vCPU; memcache: frames that the host lists for table pages."""
        if not all(type(pfn) is int for pfn in memcache):
            raise ValueError("memcache is a list of frames")
        listed = list(memcache)
        frames = _pages(host_vcpu, 1), _pages(memory, hw.VCPU_PAGES)
        result = self.hyp.init_vcpu(handle, index, *frames, listed)
        if result.ok:
            self.memcaches[handle, index] = listed
        return self._told(result, self._frames(frames[1]))

    @op
    def topup(self, handle: int, index: int, pfn: int, nr: int = 1) -> Answer:
        """The host puts frames on a vCPU's list of table pages."""
        memcache = self.memcaches.get((handle, index))
        if memcache is None:
            raise ValueError(f"VM {handle:#x} has no vCPU {index}")
        memcache += range(*_pages(pfn, nr).indices(1 << 60))
        return {"status": "OK", "code": 0, "listed": len(memcache)}

    @op
    def vcpu_load(self, cpu: int, handle: int, index: int) -> Answer:
        """Loads a vCPU on a CPU."""
        return self._told(self.hyp.vcpu_load(cpu, handle, index))

    @op
    def vcpu_put(self, cpu: int) -> Answer:
        """Takes it off."""
        return self._told(self.hyp.vcpu_put(cpu))

    @op
    def start_teardown_vm(self, handle: int) -> Answer:
        """The VM is dying."""
        return self._told(self.hyp.start_teardown_vm(handle))

    @op
    def finalize_teardown_vm(self, handle: int) -> Answer:
        """The VM is gone; `back`: how many frames of EL2's own and of its tables the host has back."""
        result = self.hyp.finalize_teardown_vm(handle)
        back = [] if result.answer is None else [count(frames) for frames in result.answer]
        return self._told(result, back=back)

    # ---- protected guests -------------------------------------------------------------------------------------

    @op
    def host_donate_guest(self, cpu: int, pfn: int, gfn: int, nr: int = 1) -> Answer:
        """The host gives pages to the protected guest on a CPU."""
        pfns, gfns = _pages(pfn, nr), _pages(gfn, nr)
        result = self.hyp.host_donate_guest(cpu, pfns, gfns)
        return self._told(result, self._leaves(self._on(cpu), gfns) or self._frames(pfns))

    @op
    def guest_share_host(self, cpu: int, gfn: int, nr: int = 1) -> Answer:
        """The guest lets the host use pages."""
        gfns = _pages(gfn, nr)
        return self._told(self.hyp.guest_share_host(cpu, gfns), self._leaves(self._on(cpu), gfns))

    @op
    def guest_unshare_host(self, cpu: int, gfn: int, nr: int = 1) -> Answer:
        """The guest takes them back."""
        gfns = _pages(gfn, nr)
        return self._told(self.hyp.guest_unshare_host(cpu, gfns), self._leaves(self._on(cpu), gfns))

    @op
    def mem_share(self, cpu: int, gfn: int, nr: int = 1, batch: int = 1) -> Answer:
        """The guest's loop of MEM_SHARE calls, `batch` pages each."""
        return self._hvc(self.hyp.mem_share, cpu, gfn, nr, batch)

    @op
    def mem_unshare(self, cpu: int, gfn: int, nr: int = 1, batch: int = 1) -> Answer:
        """The guest's loop of MEM_UNSHARE calls."""
        return self._hvc(self.hyp.mem_unshare, cpu, gfn, nr, batch)

    def _hvc(self, call: Callable[..., hw.HvcResult], cpu: int, gfn: int, nr: int, batch: int) -> Answer:
        gfns = _pages(gfn, nr)
        result = call(cpu, gfns, batch)
        told = {"status": result.status.name, "code": int(result.status), "done": result.done, "calls": result.calls}
        return told | {"abort": result.abort, "state": self._leaves(self._on(cpu), gfns)}

    @op
    def guest_hvc(self, cpu: int, function: int, r1: int = 0, r2: int = 0, r3: int = 0) -> Answer:
        """A guest's HVC by its number and registers: 0xC6000002 to 4; r1 is an address."""
        result = self.hyp.guest_hvc(cpu, function, r1, r2, r3)
        told: Answer = {"status": result.status.name, "code": int(result.status), "done": result.done}
        return told | {"abort": result.abort}

    @op
    def hyp_meminfo(self, cpu: int, r1: int = 0, r2: int = 0, r3: int = 0) -> Answer:
        """The guest asks for the granule."""
        result = self.hyp.hyp_meminfo(cpu, (r1, r2, r3))
        told: Answer = {"status": result.status.name, "code": int(result.status)}
        return told | ({"granule": result.done} if result.status == Smccc.SUCCESS else {})

    @op
    def guest_access(self, cpu: int, gfn: int, nr: int = 1, write: bool = False) -> Answer:
        """The guest touches pages: what its stage 2 says to each."""
        gfns = _pages(gfn, nr)
        status = np.broadcast_to(np.asarray(self.hyp.guest_access(cpu, gfns, write).status), nr)
        walks = [Walk(int(one)).name for one in status]
        worst = next((walk for walk in walks if walk != Walk.OK.name), Walk.OK.name)
        code = int(Walk[worst])
        return {"status": worst, "code": code, "walks": walks[:SHOWN], "state": self._leaves(self._on(cpu), gfns)}

    @op
    def vcpu_in_poison_fault(self, cpu: int, gfn: int) -> Answer:
        """Whether the vCPU's last fault was on poison."""
        result = self.hyp.vcpu_in_poison_fault(cpu, _pages(gfn, 1))
        return self._told(result, poison=bool(result.ok and result.answer[0]))

    @op
    def host_reclaim_guest(self, handle: int, gfn: int, nr: int = 1) -> Answer:
        """The host takes pages of a dying VM back."""
        gfns = _pages(gfn, nr)
        return self._told(self.hyp.host_reclaim_guest(handle, gfns), self._leaves(self.hyp.vm_of(handle), gfns))

    @op
    def host_force_reclaim(self, pfn: int, nr: int = 1) -> Answer:
        """The host takes pages that it has touched illegally."""
        pfns = _pages(pfn, nr)
        return self._told(self.hyp.host_force_reclaim(pfns), self._frames(pfns))

    # ---- non-protected guests ---------------------------------------------------------------------------------

    @staticmethod
    def _rights(prot: str) -> int:
        if not set(prot) <= set(RIGHTS):
            raise ValueError(f"prot '{prot}' is made of r, w and x")
        return int(sum(RIGHTS[right] for right in set(prot)))

    @op
    def host_share_guest(self, cpu: int, pfn: int, gfn: int, nr: int = 1, prot: str = "rwx") -> Answer:
        """The host maps a page, or a block of 512, into the np guest on a CPU."""
        pfns, gfns = _pages(pfn, 1), _pages(gfn, 1)
        result = self.hyp.host_share_guest(cpu, pfns, gfns, nr, self._rights(prot))
        return self._told(result, self._leaves(self._on(cpu), gfns) or self._frames(pfns))

    @op
    def host_unshare_guest(self, handle: int, gfn: int, nr: int = 1) -> Answer:
        """The host unmaps a leaf of `nr` pages."""
        gfns = _pages(gfn, 1)
        return self._told(self.hyp.host_unshare_guest(handle, gfns, nr), self._leaves(self.hyp.vm_of(handle), gfns))

    @op
    def relax_perms(self, cpu: int, gfn: int, prot: str) -> Answer:
        """Adds rights to the leaf around a gfn."""
        gfns = _pages(gfn, 1)
        return self._told(
            self.hyp.relax_perms(cpu, gfns, self._rights(prot)), self._leaves(self._on(cpu), gfns)
        )

    @op
    def wrprotect(self, handle: int, gfn: int, nr: int = 1) -> Answer:
        """Takes write access."""
        gfns = _pages(gfn, 1)
        return self._told(self.hyp.wrprotect(handle, gfns, nr), self._leaves(self.hyp.vm_of(handle), gfns))

    @op
    def test_clear_young(self, handle: int, gfn: int, nr: int = 1, mkold: bool = False) -> Answer:
        """Whether the guest has used a page."""
        gfns = _pages(gfn, 1)
        result = self.hyp.test_clear_young(handle, gfns, nr, mkold)
        young = bool(result.done and result.answer[0])
        return self._told(result, self._leaves(self.hyp.vm_of(handle), gfns), young=young)

    @op
    def mkyoung(self, cpu: int, gfn: int) -> Answer:
        """Sets the access flag."""
        gfns = _pages(gfn, 1)
        return self._told(self.hyp.mkyoung(cpu, gfns), self._leaves(self._on(cpu), gfns))

    @op
    def tlb_flush_vmid(self, handle: int) -> Answer:
        """Drops all translations of an np VM."""
        return self._told(self.hyp.tlb_flush_vmid(handle))

    # ---- looking ----------------------------------------------------------------------------------------------

    @op
    def state(self, pfn: int, nr: int = 1) -> Answer:
        """What the frame table says."""
        return {"status": "OK", "code": 0, "state": self._frames(_pages(pfn, nr))}

    @op
    def guest_state(self, handle: int, gfn: int, nr: int = 1) -> Answer:
        """What a guest's stage 2 says."""
        vm = self.hyp.vm_of(handle)
        if vm is None:
            raise ValueError(f"there is no VM {handle:#x}")
        return {"status": "OK", "code": 0, "state": self._leaves(vm, _pages(gfn, nr))}

    @op
    def host_write(self, pfn: int, text: str) -> Answer:
        """The host writes a text to the beginning of a page, where it may."""
        pfns = _pages(pfn, 1)
        result = self.hyp.handle_host_mem_abort(pfns)
        if result.ok:
            self.memory.write(pfns, self.memory.intern(text.encode()[:4096]), 0)
        return self._told(result, self._frames(pfns))

    @op
    def content(self, pfn: int) -> Answer:
        """What stands in a page, seen from nowhere: for whoever checks."""
        if pfn >= NR_FRAMES:
            raise ValueError(f"there is no frame {pfn}")
        stamp = int(self.memory.read(_pages(pfn, 1), 0)[0])
        found = self.memory.bytes_of(stamp).rstrip(b"\0")
        return {"status": "OK", "code": 0, "text": found.decode(errors="replace")}
