"""The RMP and the secure processor alone, as `cvm hw snp SCRIPT.jsonl` drives them: instructions and commands by name.

Addresses are page numbers (pfn, gfn). `nr` pages are so many instructions, one behind the other: what the host and the
firmware do ends at the first that is refused (`done` says how many took effect), a guest's instruction is told for
each page (`answers`). Every answer has a status, its code, and the RMP entries of what was named; a nested page fault
also `exitinfo1`, as the hypervisor sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import numpy as np

from cvmcore import hwscript
from cvmcore.hwscript import op
from cvmcore.memory import SCRAMBLED, Memory
from cvmcore.pages import array_of, count, run
from cvmcore.types import PG_LEVEL_2M, PG_LEVEL_4K
from cvmcore_sev.errors import PageState, PageType, RmpStatus, SevStatus, exit_info_1
from cvmcore_sev.hw import Answer, Command, Progress, SevHardware

Told: TypeAlias = dict[str, Any]

NR_FRAMES: Final = 1 << 13
SHOWN: Final = 8
"""Entries of at most so many pages are in an answer."""
SIZES: Final = {"4k": PG_LEVEL_4K, "2m": PG_LEVEL_2M}
_PSMASH_NAMES: Final = {RmpStatus.FAIL_BADADDR: "FAIL_BADADDR"}
"""One number has another name for PSMASH."""


def machine() -> Mapping[str, Callable[..., Mapping[str, Any]]]:
    """A machine of 8192 frames, all of them the hypervisor's, and what can be done there."""
    return Console().operations()


def _run(start: int, nr: int, level: int = PG_LEVEL_4K) -> slice:
    if not 0 <= start < 1 << 40 or not 0 < nr <= NR_FRAMES:
        raise ValueError(f"{nr} pages from {start}: give a page number, and 1 to {NR_FRAMES} pages")
    return run(start, nr, 512 if level == PG_LEVEL_2M else 1)


def _level(size: str) -> int:
    if size not in SIZES:
        raise ValueError(f"size '{size}' is neither 4k nor 2m")
    return SIZES[size]


def _bytes(hex: str) -> bytes:
    try:
        return bytes.fromhex(hex)
    except ValueError:
        raise ValueError(f"'{hex[:20]}' is not hexadecimal") from None


def _frame(pfn: int) -> slice:
    if not 0 <= pfn < NR_FRAMES:
        raise ValueError(f"there is no frame {pfn}; the machine has {NR_FRAMES}")
    return run(pfn, 1)


class Console(hwscript.Console):
    """The hardware, and how what it says is told."""

    def __init__(self) -> None:
        self.memory = Memory(NR_FRAMES)
        self.hw = SevHardware(self.memory)
        self.rmp, self.psp = self.hw.rmp, self.hw.psp

    # ---- what is told -----------------------------------------------------------------------------------------

    def _entries(self, pfns: slice) -> list[Told]:
        some = np.arange(pfns.start, pfns.stop, pfns.step or 1)[:SHOWN]
        read, states = self.rmp.rmpread(some), self.rmp.state(some)
        validated, vmsa, perms = self.rmp.hidden(some)
        return [
            {
                "pfn": int(pfn),
                "state": PageState(int(states[i])).name,
                "assigned": bool(read.assigned[i]),
                "gfn": int(read.gfn[i]),
                "size": "2m" if read.level[i] == PG_LEVEL_2M else "4k",
                "immutable": bool(read.immutable[i]),
                "asid": int(read.asid[i]),
                "validated": bool(validated[i]),
                "vmsa": bool(vmsa[i]),
                "perms": perms[i].tolist(),
            }
            for i, pfn in enumerate(some)
        ]

    def _progress(self, result: Progress | Command, pfns: slice, **more: Any) -> Told:
        told = {"status": result.status.name, "code": int(result.status), "done": result.done}
        return told | more | {"entries": self._entries(pfns)}

    def _answers(self, answer: Answer, pfns: slice, encrypted: bool = False, **more: Any) -> Told:
        codes = np.broadcast_to(np.asarray(answer, np.uint8), count(pfns))
        refused = codes[codes != 0]
        first = RmpStatus(int(refused[0])) if len(refused) else RmpStatus.OK
        names = [RmpStatus(int(code)).name for code in codes[:SHOWN]]
        bits = exit_info_1(first, encrypted)
        fault = {"exitinfo1": hex(bits)} if bits else {}
        told = {"status": first.name, "code": int(first), "answers": names}
        return told | fault | more | {"entries": self._entries(pfns)}

    def _status(self, status: SevStatus, pfn: int | None = None, **more: Any) -> Told:
        told: Told = {"status": status.name, "code": int(status)} | more
        return told if pfn is None else told | {"entries": self._entries(_run(pfn, 1))}

    # ---- instructions of the host -------------------------------------------------------------------------------

    @op
    def rmpupdate(
        self, pfn: int, gfn: int = 0, assigned: bool = True, size: str = "4k", immutable: bool = False, asid: int = 0,
        nr: int = 1,
    ) -> Told:  # fmt: skip
        """RMPUPDATE: the hypervisor gives a page, takes it back, or freezes it."""
        level = _level(size)
        pfns = _run(pfn, nr, level)
        result = self.rmp.rmpupdate(
            pfns, _run(gfn, nr, level), assigned=assigned, asid=asid, level=level, immutable=immutable
        )
        return self._progress(result, pfns)

    @op
    def psmash(self, pfn: int, nr: int = 1) -> Told:
        """PSMASH: a 2M page of the RMP becomes 512 4K pages."""
        result = self.rmp.psmash(_run(pfn, nr, PG_LEVEL_2M))
        told = self._progress(result, _run(pfn, 1))
        return told | {"status": _PSMASH_NAMES.get(result.status, result.status.name)}

    @op
    def rmpread(self, pfn: int, nr: int = 1) -> Told:
        """RMPREAD: what the host may know of an entry."""
        pfns = _run(pfn, nr)
        beyond = array_of(pfns) >= self.rmp.covered
        status = np.where(beyond, RmpStatus.FAIL_INPUT, RmpStatus.OK).astype(np.uint8)
        used = [bool(used) for used in self.rmp.hpage_region_status(pfns)[:SHOWN]]
        return self._answers(status, pfns, hpage_region_status=used)

    # ---- instructions of a guest ----------------------------------------------------------------------------------

    @op
    def pvalidate(
        self, pfn: int, gfn: int, asid: int, validate: bool = True, size: str = "4k", vmpl: int = 0, nr: int = 1
    ) -> Told:
        """PVALIDATE by a guest: it accepts or rescinds a page. NO_CHANGE: the carry flag."""
        level = _level(size)
        pfns = _run(pfn, nr, level)
        answer = self.rmp.pvalidate(
            pfns, _run(gfn, nr, level), asid=asid, validate=validate, level=level, vmpl=vmpl
        )
        return self._answers(answer, pfns)

    @op
    def rmpadjust(
        self, pfn: int, gfn: int, asid: int, target_vmpl: int, perms: int, vmsa: bool = False, size: str = "4k",
        vmpl: int = 0, nr: int = 1,
    ) -> Told:  # fmt: skip
        """RMPADJUST by a guest: what a lower VMPL may do with a page (1 read, 2 write, 4 and 8 execute), and VMSAs."""
        level = _level(size)
        pfns = _run(pfn, nr, level)
        answer = self.rmp.rmpadjust(
            pfns, _run(gfn, nr, level), asid=asid, target_vmpl=target_vmpl, perms=perms, vmsa=vmsa, level=level,
            vmpl=vmpl,
        )  # fmt: skip
        return self._answers(answer, pfns)

    @op
    def rmpquery(self, pfn: int, gfn: int, asid: int, target_vmpl: int, nr: int = 1) -> Told:
        """RMPQUERY by a guest: permissions and size of a page."""
        pfns = _run(pfn, nr)
        codes, perms, levels = self.rmp.rmpquery(pfns, _run(gfn, nr), asid=asid, target_vmpl=target_vmpl)
        sizes = [{0: "", **{v: k for k, v in SIZES.items()}}[int(level)] for level in levels[:SHOWN]]
        return self._answers(codes, pfns, perms=perms[:SHOWN].tolist(), sizes=sizes)

    # ---- accesses -------------------------------------------------------------------------------------------------

    @op
    def host_access(self, pfn: int, write: bool = False, size: str = "4k", nr: int = 1) -> Told:
        """The host reads or writes frames, through mappings of a size."""
        pfns = _run(pfn, nr)
        return self._answers(self.rmp.check_host(pfns, write, _level(size)), pfns)

    @op
    def shared_access(self, pfn: int, write: bool = False, size: str = "4k", nr: int = 1) -> Told:
        """A guest without SNP, or an SNP guest with C=0, accesses frames."""
        pfns = _run(pfn, nr)
        return self._answers(self.rmp.check_shared(pfns, write, _level(size)), pfns)

    @op
    def private_access(
        self, pfn: int, gfn: int, asid: int, access: str = "read", size: str = "4k", vmpl: int = 0, nr: int = 1
    ) -> Told:
        """An SNP guest accesses pages with C=1: read, write, user_exec or supervisor_exec."""
        if access not in ("read", "write", "user_exec", "supervisor_exec"):
            raise ValueError(f"access '{access}' is none of read, write, user_exec, supervisor_exec")
        pfns = _run(pfn, nr)
        answer = self.rmp.check_private(
            pfns, _run(gfn, nr), asid=asid, level=_level(size), vmpl=vmpl, access=access
        )
        return self._answers(answer, pfns, encrypted=True)

    @op
    def vmrun(self, pfn: int, gfn: int, asid: int) -> Told:
        """VMRUN with a save area: in use until vmexit."""
        _frame(pfn)
        return self._answers(self.rmp.vmrun(pfn, gfn, asid), _run(pfn, 1))

    @op
    def vmexit(self, pfn: int) -> Told:
        """The vCPU of this save area leaves the guest."""
        self.rmp.vmexit(array_of(_frame(pfn))[0])
        return self._answers(0, _run(pfn, 1))

    @op
    def lock(self, pfn: int) -> Told:
        """Another CPU, or the firmware, holds the entry."""
        self.rmp.lock(_frame(pfn))
        return self._answers(0, _run(pfn, 1))

    @op
    def unlock(self, pfn: int) -> Told:
        """It lets go."""
        self.rmp.unlock(_frame(pfn))
        return self._answers(0, _run(pfn, 1))

    # ---- content --------------------------------------------------------------------------------------------------

    @op
    def write(self, pfn: int, hex: str = "", asid: int = 0) -> Told:
        """Bytes into a frame, zeros behind them, through an ASID's key (0: plain). No check: see the accesses."""
        content = _bytes(hex)
        self.memory.write(_frame(pfn), self.memory.intern(content), asid)
        return {"status": "OK", "code": 0}

    @op
    def read(self, pfn: int, asid: int = 0, size: int = 16) -> Told:
        """The first bytes of a frame, through an ASID's key; noise through a wrong one. No check."""
        if not 0 < size <= 4096:
            raise ValueError("size: 1 to 4096 bytes")
        stamp = int(self.memory.read(_frame(pfn), asid)[0])
        if stamp == SCRAMBLED:
            return {"status": "OK", "code": 0, "noise": True, "hex": ""}
        return {"status": "OK", "code": 0, "noise": False, "hex": self.memory.bytes_of(stamp)[:size].hex()}

    # ---- firmware: SNP --------------------------------------------------------------------------------------------

    @op
    def snp_gctx_create(self, gctx: int) -> Told:
        """SNP_GCTX_CREATE: a Firmware page becomes a guest context."""
        return self._status(self.psp.snp_gctx_create(gctx), gctx)

    @op
    def snp_launch_start(self, gctx: int, policy: int = 3 << 16) -> Told:
        """SNP_LAUNCH_START."""
        return self._status(self.psp.snp_launch_start(gctx, policy), gctx)

    @op
    def snp_activate(self, gctx: int, asid: int) -> Told:
        """SNP_ACTIVATE: bind the guest to an ASID, which must own no pages."""
        pages = int(self.rmp.asid_pages[asid]) if 0 <= asid < len(self.rmp.asid_pages) else 0
        return self._status(self.psp.snp_activate(gctx, asid), gctx, asid_pages=pages)

    @op
    def snp_launch_update(self, gctx: int, pfn: int, type: str = "normal", size: str = "4k", nr: int = 1) -> Told:
        """SNP_LAUNCH_UPDATE of Pre-Guest pages: normal, vmsa, zero, unmeasured, secrets or cpuid."""
        if type.upper() not in PageType.__members__:
            raise ValueError(f"type '{type}' is none of {', '.join(PageType.__members__).lower()}")
        level = _level(size)
        pfns = _run(pfn, nr, level)
        self._inside(pfns, level)
        result = self.psp.snp_launch_update(gctx, pfns, PageType[type.upper()], level)
        return self._progress(result, pfns, digest=self.psp.snp_launch_digest(gctx).hex())

    @op
    def snp_launch_finish(self, gctx: int) -> Told:
        """SNP_LAUNCH_FINISH: the guest may run."""
        return self._status(self.psp.snp_launch_finish(gctx), gctx, digest=self.psp.snp_launch_digest(gctx).hex())

    @op
    def snp_decommission(self, gctx: int) -> Told:
        """SNP_DECOMMISSION: the guest is no more; its pages stay as they are."""
        return self._status(self.psp.snp_decommission(gctx), gctx)

    @op
    def snp_page_reclaim(self, pfn: int, size: str = "4k", nr: int = 1) -> Told:
        """SNP_PAGE_RECLAIM: the firmware lets go of immutable pages."""
        level = _level(size)
        pfns = _run(pfn, nr, level)
        return self._progress(self.psp.snp_page_reclaim(pfns, level), pfns)

    @op
    def snp_page_unsmash(self, pfn: int, nr: int = 1) -> Told:
        """SNP_PAGE_UNSMASH: 512 immutable 4K pages become one of 2M."""
        pfns = _run(pfn, nr, PG_LEVEL_2M)
        return self._progress(self.psp.snp_page_unsmash(pfns), pfns)

    @op
    def snp_page_set_state(self, pfn: int, nr: int = 1) -> Told:
        """SNP_PAGE_SET_STATE: hypervisor pages become HV-Fixed."""
        pfns = _run(pfn, nr)
        return self._progress(self.psp.snp_page_set_state(pfns), pfns)

    @op
    def df_flush(self) -> Told:
        """DF_FLUSH: ASIDs that guests have left can be used again, after wbinvd on all CPUs."""
        return self._status(self.psp.df_flush())

    @op
    def wbinvd(self) -> Told:
        """WBINVD on all CPUs."""
        self.psp.wbinvd()
        return self._status(SevStatus.SUCCESS)

    # ---- firmware: SEV and SEV-ES -----------------------------------------------------------------------------------

    @op
    def launch_start(self, policy: int = 0) -> Told:
        """LAUNCH_START: a new guest, and its handle. Policy bit 2: SEV-ES."""
        status, handle = self.psp.launch_start(policy)
        return self._status(status, handle=handle)

    @op
    def activate(self, handle: int, asid: int) -> Told:
        """ACTIVATE: bind the guest to an ASID."""
        return self._status(self.psp.activate(handle, asid))

    @op
    def launch_update_data(self, handle: int, paddr: int, length: int) -> Told:
        """LAUNCH_UPDATE_DATA: measure and encrypt memory in place; paddr and length in bytes."""
        status = self.psp.launch_update_data(handle, paddr, length)
        return self._status(status, digest=self.psp.launch_digest(handle).hex())

    @op
    def launch_update_vmsa(self, handle: int, paddr: int) -> Told:
        """LAUNCH_UPDATE_VMSA: measure and encrypt a save area."""
        status = self.psp.launch_update_vmsa(handle, paddr, 4096)
        return self._status(status, digest=self.psp.launch_digest(handle).hex())

    @op
    def launch_measure(self, handle: int, length: int = 48) -> Told:
        """LAUNCH_MEASURE: MAC and nonce, or the length that they need."""
        status, blob = self.psp.launch_measure(handle, length)
        return self._status(status, **({"length": blob} if isinstance(blob, int) else {"hex": blob.hex()}))

    @op
    def launch_secret(self, handle: int, paddr: int, hex: str) -> Told:
        """LAUNCH_SECRET: bytes from the guest's owner."""
        return self._status(self.psp.launch_secret(handle, paddr, _bytes(hex)))

    @op
    def launch_finish(self, handle: int) -> Told:
        """LAUNCH_FINISH: the guest may run."""
        return self._status(self.psp.launch_finish(handle))

    @op
    def send_start(self, handle: int) -> Told:
        """SEND_START: the session that a receiver needs."""
        status, session = self.psp.send_start(handle)
        return self._status(status, session=session.hex())

    @op
    def send_update_data(self, handle: int, paddr: int, length: int) -> Told:
        """SEND_UPDATE_DATA: guest memory, encrypted for transport."""
        status, header, data = self.psp.send_update_data(handle, paddr, length)
        return self._status(status, header=header.hex(), data=data.hex())

    @op
    def send_finish(self, handle: int) -> Told:
        """SEND_FINISH: the guest has left."""
        return self._status(self.psp.send_finish(handle))

    @op
    def send_cancel(self, handle: int) -> Told:
        """SEND_CANCEL: the guest stays."""
        return self._status(self.psp.send_cancel(handle))

    @op
    def receive_start(self, session: str, policy: int = 0) -> Told:
        """RECEIVE_START: a guest that comes from elsewhere, and its handle."""
        status, handle = self.psp.receive_start(policy, _bytes(session))
        return self._status(status, handle=handle)

    @op
    def receive_update_data(self, handle: int, paddr: int, header: str, data: str) -> Told:
        """RECEIVE_UPDATE_DATA: what was sent, into guest memory."""
        return self._status(self.psp.receive_update_data(handle, paddr, _bytes(header), _bytes(data)))

    @op
    def receive_finish(self, handle: int) -> Told:
        """RECEIVE_FINISH: the guest may run here."""
        return self._status(self.psp.receive_finish(handle))

    @op
    def guest_status(self, handle: int) -> Told:
        """GUEST_STATUS."""
        status, state, asid, policy = self.psp.guest_status(handle)
        return self._status(status, state=state.name, asid=asid, policy=policy)

    @op
    def deactivate(self, handle: int) -> Told:
        """DEACTIVATE: unbind the ASID."""
        return self._status(self.psp.deactivate(handle))

    @op
    def decommission(self, handle: int) -> Told:
        """DECOMMISSION: the guest is no more."""
        return self._status(self.psp.decommission(handle))

    @staticmethod
    def _inside(pfns: slice, level: int) -> None:
        last = pfns.start + (count(pfns) - 1) * (pfns.step or 1) + (512 if level == PG_LEVEL_2M else 1)
        if last > NR_FRAMES:
            raise ValueError(f"there is no frame {last - 1}; the machine has {NR_FRAMES}")
