"""The TDX module alone, as `cvm hw tdx SCRIPT.jsonl` drives it: a fresh module and its leaves, by their names.

Pages are numbers of 4K frames (tdr, tdvpr, pfn, source) and of 4K guest pages (gfn, the first one of a larger page);
levels are the ABI's, 0 for 4K. `nr` asks for so many calls, for pages one behind the other. Every answer has the status
of the last call made, with its number and operand, how many calls were `done`, what the leaf returns in RCX and RDX,
and the state of the pages that were named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from cvmcore import hwscript
from cvmcore.hwscript import op
from cvmcore.memory import Memory
from cvmcore.pages import Sel, array_of, count, run
from cvmcore.types import Walk
from cvmcore_tdx.errors import LEVEL_STATUSES, Operand, code, describe, operand
from cvmcore_tdx.hw import Accept, Result, SeptState, TdxModule

Answer: TypeAlias = dict[str, Any]

NR_FRAMES = 1 << 15
HKIDS = range(64, 72)
SHOWN = 8
"""States of at most so many pages are in an answer."""


def machine() -> Mapping[str, Callable[..., Mapping[str, Any]]]:
    """A module on 32768 frames with the HKIDs 64 (its own) to 71, and its leaves."""
    return Console().operations()


def _pages(start: int, nr: int, level: int = 0) -> slice:
    if start < 0 or start >= 1 << 52 or not 0 < nr <= NR_FRAMES or not 0 <= level <= 4:
        raise ValueError(f"{nr} pages from {start} at level {level}: 1 to {NR_FRAMES} pages, levels 0 to 4")
    return run(start, nr, 1 << 9 * level)


def _frames(start: int, nr: int, level: int = 0) -> slice:
    return _pages(start, nr, level)


class Console(hwscript.Console):
    """The module, and how what it says is told."""

    def __init__(self) -> None:
        self.memory = Memory(NR_FRAMES)
        self.module = TdxModule(self.memory, NR_FRAMES, hkids=HKIDS)

    # ---- what is told -----------------------------------------------------------------------------------------

    def _status(self, status: int, **more: Any) -> Answer:
        told: Answer = {"status": describe(status).partition("|")[0], "code": f"{code(status):#018x}"}
        low = operand(status)
        if code(status) in LEVEL_STATUSES:
            told["level"] = low
        elif low:
            told["operand"] = Operand(low).name if low in Operand._value2member_map_ else low
        return told | more

    def _entries(self, tdr: int, level: int, gfns: Sel) -> list[Answer]:
        """Entries of the Secure EPT as they stand."""
        told: list[Answer] = []
        if tdr not in self.module._td_of or not self.module.td(tdr).sept:
            return told
        for gfn in array_of(gfns)[:SHOWN].tolist():
            word = int(self.module.sept_words(tdr, level, run(gfn, 1))[0])
            state = SeptState(word & 31)
            entry: Answer = {"gfn": gfn, "level": level, "state": state.name}
            if state not in (SeptState.FREE, SeptState.REMOVED):
                entry["pfn"] = word >> 5
            told.append(entry)
        return told

    def _pamt(self, pfns: Sel) -> list[Answer]:
        told: list[Answer] = []
        for pfn in array_of(pfns)[:SHOWN].tolist():
            if not 0 <= pfn < NR_FRAMES:
                told.append({"pfn": pfn, "type": "no memory"})
                continue
            kind, owner, level = self.module.page_type(pfn)
            told.append({"pfn": pfn, "type": kind.name} | ({"owner": owner, "level": level} if owner else {}))
        return told

    def _told(self, result: Result, tdr: int, level: int, gfns: Sel) -> Answer:
        more: Answer = {"done": result.done}
        if count(result.pfns):
            more["rcx"] = array_of(result.pfns)[:SHOWN].tolist()
        if result.words is not None and result.words.size:
            word = int(result.words[-1])
            more["rcx"] = word >> 5
            more["rdx"] = {"level": level, "state": SeptState(word & 31).public}
        if result.found is not None:
            more["rcx"] = result.found.pfn
            more["rdx"] = {"level": result.found.level, "state": result.found.state.public}
        return self._status(result.status, **more, state=self._entries(tdr, level, gfns))

    def _object(self, status: int, *pfns: int) -> Answer:
        """Of a leaf on one object, with what the PAMT says of the pages named."""
        state = [page for pfn in pfns for page in self._pamt(run(pfn, 1))]
        return self._status(status, done=int(not status), state=state)

    def _each(self, leaf: Callable[[int], int], pfn: int, nr: int) -> Answer:
        """A leaf on one page, for several pages."""
        pages = _pages(pfn, nr)
        status = done = 0
        for page in range(pages.start, pages.stop):
            status = leaf(page)
            if status:
                break
            done += 1
        return self._status(status, done=done, state=self._pamt(pages))

    # ---- TDs and vCPUs ----------------------------------------------------------------------------------------

    @op
    def tdh_mng_create(self, tdr: int, hkid: int) -> Answer:
        """A frame becomes a TDR, with an HKID."""
        return self._object(self.module.tdh_mng_create(_pages(tdr, 1).start, hkid), tdr)

    @op
    def tdh_mng_key_config(self, tdr: int) -> Answer:
        """Configures the TD's key on the package."""
        return self._object(self.module.tdh_mng_key_config(tdr), tdr)

    @op
    def tdh_mng_addcx(self, tdr: int, pfn: int, nr: int = 1) -> Answer:
        """Adds control pages (TDCX)."""
        return self._each(lambda page: self.module.tdh_mng_addcx(tdr, page), pfn, nr)

    @op
    def tdh_mng_init(self, tdr: int, gpaw: int = 48) -> Answer:
        """Initialises the TD: an empty Secure EPT, an open measurement."""
        return self._object(self.module.tdh_mng_init(tdr, gpaw), tdr)

    @op
    def tdh_vp_create(self, tdr: int, tdvpr: int) -> Answer:
        """A frame becomes a vCPU's root page."""
        return self._object(self.module.tdh_vp_create(tdr, _pages(tdvpr, 1).start), tdvpr)

    @op
    def tdh_vp_addcx(self, tdvpr: int, pfn: int, nr: int = 1) -> Answer:
        """Adds further pages to a vCPU."""
        return self._each(lambda page: self.module.tdh_vp_addcx(tdvpr, page), pfn, nr)

    @op
    def tdh_vp_init(self, tdvpr: int) -> Answer:
        """Initialises a vCPU."""
        return self._object(self.module.tdh_vp_init(tdvpr), tdvpr)

    @op
    def tdh_vp_enter(self, tdvpr: int) -> Answer:
        """The vCPU enters the TD, and stays inside until td_exit."""
        return self._object(self.module.tdh_vp_enter(tdvpr), tdvpr)

    @op
    def td_exit(self, tdvpr: int) -> Answer:
        """The vCPU is out of the TD."""
        self.module.td_exit(tdvpr)
        return self._object(0, tdvpr)

    @op
    def tdh_vp_flush(self, tdvpr: int) -> Answer:
        """The vCPU's state leaves the processor that it ran on."""
        return self._object(self.module.tdh_vp_flush(tdvpr), tdvpr)

    @op
    def tdh_mng_vpflushdone(self, tdr: int) -> Answer:
        """All vCPUs are flushed: the TD is blocked."""
        return self._object(self.module.tdh_mng_vpflushdone(tdr), tdr)

    @op
    def tdh_mng_key_freeid(self, tdr: int) -> Answer:
        """Gives the HKID back: the TD is in teardown."""
        return self._object(self.module.tdh_mng_key_freeid(tdr), tdr)

    @op
    def tdh_phymem_cache_wb(self) -> Answer:
        """Writes back the package's caches."""
        return self._object(self.module.tdh_phymem_cache_wb())

    # ---- guest memory -----------------------------------------------------------------------------------------

    @op
    def tdh_mem_sept_add(self, tdr: int, level: int, gfn: int, pfn: int, nr: int = 1) -> Answer:
        """FREE entries become tables."""
        gfns = _pages(gfn, nr, level)
        return self._told(self.module.tdh_mem_sept_add(tdr, level, gfns, _frames(pfn, nr)), tdr, level, gfns)

    @op
    def tdh_mem_page_add(self, tdr: int, gfn: int, pfn: int, source: int, nr: int = 1) -> Answer:
        """FREE 4K entries become MAPPED, with the content of the source pages; measured."""
        gfns = _pages(gfn, nr)
        result = self.module.tdh_mem_page_add(tdr, gfns, _frames(pfn, nr), _frames(source, nr))
        return self._told(result, tdr, 0, gfns)

    @op
    def tdh_mem_page_aug(self, tdr: int, level: int, gfn: int, pfn: int, nr: int = 1) -> Answer:
        """FREE entries become PENDING."""
        gfns = _pages(gfn, nr, level)
        return self._told(self.module.tdh_mem_page_aug(tdr, level, gfns, _frames(pfn, nr, level)), tdr, level, gfns)

    @op
    def tdh_mem_range_block(self, tdr: int, level: int, gfn: int, nr: int = 1) -> Answer:
        """Entries are blocked: no new translation is made."""
        gfns = _pages(gfn, nr, level)
        return self._told(self.module.tdh_mem_range_block(tdr, level, gfns), tdr, level, gfns)

    @op
    def tdh_mem_range_unblock(self, tdr: int, level: int, gfn: int, nr: int = 1) -> Answer:
        """Blocked entries, once tracked, are what they were."""
        gfns = _pages(gfn, nr, level)
        return self._told(self.module.tdh_mem_range_unblock(tdr, level, gfns), tdr, level, gfns)

    @op
    def tdh_mem_track(self, tdr: int, nr: int = 1) -> Answer:
        """A new TLB epoch."""
        result = self.module.tdh_mem_track(tdr, _pages(0, nr).stop)
        epoch = self.module.td(tdr).epoch if tdr in self.module._td_of else 0
        return self._status(result.status, done=result.done, epoch=epoch)

    @op
    def tdh_mem_page_remove(self, tdr: int, level: int, gfn: int, nr: int = 1) -> Answer:
        """Pages leave the TD; RCX has their frames."""
        gfns = _pages(gfn, nr, level)
        return self._told(self.module.tdh_mem_page_remove(tdr, level, gfns), tdr, level, gfns)

    @op
    def tdh_mem_page_relocate(self, tdr: int, gfn: int, pfn: int, nr: int = 1) -> Answer:
        """Pages move to other frames, with their content."""
        gfns = _pages(gfn, nr)
        return self._told(self.module.tdh_mem_page_relocate(tdr, gfns, _frames(pfn, nr)), tdr, 0, gfns)

    @op
    def tdh_mem_page_demote(self, tdr: int, level: int, gfn: int, pfn: int) -> Answer:
        """A large page becomes 512 smaller ones; pfn is for the table."""
        gfns = _pages(gfn, 1, level)
        return self._told(self.module.tdh_mem_page_demote(tdr, level, gfns, _frames(pfn, 1)), tdr, level, gfns)

    @op
    def tdh_mem_page_promote(self, tdr: int, level: int, gfn: int) -> Answer:
        """A full table becomes one large page; RCX has the table's frame."""
        gfns = _pages(gfn, 1, level)
        return self._told(self.module.tdh_mem_page_promote(tdr, level, gfns), tdr, level, gfns)

    @op
    def tdh_mem_sept_remove(self, tdr: int, level: int, gfn: int, nr: int = 1) -> Answer:
        """Empty tables go; RCX has their frames."""
        gfns = _pages(gfn, nr, level)
        return self._told(self.module.tdh_mem_sept_remove(tdr, level, gfns), tdr, level, gfns)

    @op
    def tdh_mem_sept_rd(self, tdr: int, level: int, gfn: int) -> Answer:
        """Reads an entry."""
        gfns = _pages(gfn, 1, level)
        return self._told(self.module.tdh_mem_sept_rd(tdr, level, gfns), tdr, level, gfns)

    @op
    def tdh_mr_extend(self, tdr: int, gpa: int, nr: int = 1) -> Answer:
        """Measures chunks of 256 bytes from a gpa on."""
        if not 0 < nr <= 16 * NR_FRAMES or not 0 <= gpa < 1 << 52:
            raise ValueError(f"{nr} chunks from {gpa:#x}")
        return self._told(self.module.tdh_mr_extend(tdr, gpa, nr), tdr, 0, run(gpa >> 12, 1))

    @op
    def tdh_mr_finalize(self, tdr: int) -> Answer:
        """Closes the measurement; the TD can run."""
        status = self.module.tdh_mr_finalize(tdr)
        return self._object(status, tdr) | ({} if status else {"mrtd": self.module.td(tdr).mrtd.hex()})

    # ---- memory goes back -------------------------------------------------------------------------------------

    @op
    def tdh_phymem_page_reclaim(self, pfn: int, nr: int = 1) -> Answer:
        """Pages of a TD in teardown become the host's."""
        pfns = _pages(pfn, nr)
        result = self.module.tdh_phymem_page_reclaim(pfns)
        return self._status(result.status, done=result.done, state=self._pamt(pfns))

    @op
    def tdh_phymem_page_wbinvd(self, pfn: int, hkid: int, nr: int = 1) -> Answer:
        """Writes back the lines of pages under an HKID."""
        pfns = _pages(pfn, nr)
        result = self.module.tdh_phymem_page_wbinvd(pfns, hkid)
        return self._status(result.status, done=result.done, state=self._pamt(pfns))

    # ---- guest and host ---------------------------------------------------------------------------------------

    @op
    def tdg_mem_page_accept(self, tdr: int, level: int, gfn: int) -> Answer:
        """The guest accepts a page; with an outcome EPT_VIOLATION the call ends in a TD exit: an extended qualification
        (level asked for, level, state and kind of the entry found), no status."""
        gfns = _pages(gfn, 1, level)
        accepted = self.module.tdg_mem_page_accept(tdr, level, gfns)
        outcome = Accept(accepted.outcome if isinstance(accepted.outcome, int) else int(accepted.outcome[0]))
        status = accepted.status()
        violation = accepted.violation()
        told = self._status(status) if status is not None else {"status": "TD_EXIT", "code": None}
        if violation is not None:
            told["qualification"] = f"{violation:#x}"
        return told | {"outcome": outcome.name, "state": self._entries(tdr, level, gfns)}

    @op
    def guest_write(self, tdr: int, gfn: int, text: str) -> Answer:
        """The guest writes a text to the beginning of a private page, where it can."""
        return self._guest(tdr, gfn, text)

    @op
    def guest_read(self, tdr: int, gfn: int) -> Answer:
        """The guest reads a private page."""
        return self._guest(tdr, gfn, None)

    def _guest(self, tdr: int, gfn: int, text: str | None) -> Answer:
        access = self.module.guest_access(tdr, _pages(gfn, 1), text is not None)
        walk = Walk(access.status if isinstance(access.status, int) else int(access.status[0]))
        told: Answer = {"status": walk.name, "code": int(walk)}
        if walk is Walk.OK:
            key = self.module.td(tdr).hkid
            if text is not None:
                self.memory.write(access.pfns, self.memory.intern(text.encode()[:4096]), key)
            told["text"] = self._text(int(self.memory.read(access.pfns, key)[0]))
        return told

    def _text(self, stamp: int) -> str:
        return self.memory.bytes_of(stamp).rstrip(b"\0").decode(errors="replace")

    @op
    def host_write(self, pfn: int, text: str) -> Answer:
        """The host writes a text to the beginning of a frame; in a TD's page that poisons it."""
        pfns = self._memory(pfn)
        verdict = self.module.host_access(pfns, True)
        if verdict.name == "OK":
            self.memory.write(pfns, self.memory.intern(text.encode()[:4096]), 0)
        return {"status": verdict.name, "code": int(verdict), "state": self._pamt(pfns)}

    @op
    def host_read(self, pfn: int) -> Answer:
        """The host reads a frame."""
        pfns = self._memory(pfn)
        verdict = self.module.host_access(pfns, False)
        text = self._text(int(self.memory.read(pfns, 0)[0])) if verdict.name == "OK" else ""
        return {"status": verdict.name, "code": int(verdict), "text": text, "state": self._pamt(pfns)}

    def _memory(self, pfn: int) -> slice:
        if not 0 <= pfn < NR_FRAMES:
            raise ValueError(f"there is no frame {pfn}")
        return run(pfn, 1)

    @op
    def interrupt(self) -> Answer:
        """A host interrupt waits: the next leaf that can be interrupted is."""
        self.module.interrupt_pending = True
        return {"status": "TDX_SUCCESS", "code": f"{0:#018x}"}

    @op
    def pamt(self, pfn: int, nr: int = 1) -> Answer:
        """What the PAMT says of frames."""
        return self._status(0, state=self._pamt(_pages(pfn, nr)))
