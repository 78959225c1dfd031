"""`trace`: replay the memory trace of a real program or VM; its pages become gfns densely, in order of first touch.

A chunk of the trace (up to CHUNK_ROWS records) is one batch for each vCPU: each page that it writes is written once,
each page that it reads is read once. Where a trace tells who made an access (`Chunk.vcpus`), the guest's vCPUs stand
for those of the recording, going round if there are fewer; else chunks go round.

What the host took away is told by host virtual address, and only `hva_base` can say which pages these were. Then the
host moves them elsewhere, content and all, as reclaim and compaction do, and KVM hears of it from the notifiers. What
is pinned or comes from a guest_memfd stays where it is; its mappings are zapped where KVM does not tell private from
shared ones. What was one range in the recording may lie scattered here, and is then several calls.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cvmcore.backend import Option
from cvmcore.errors import InputError
from cvmcore.pages import count, sort_unique
from cvmcore.traces import Chunk, DenseGfns, open_trace
from cvmcore.types import PAGE_BYTES, PAGE_SHIFT, PAGES_2M
from cvmcore.workloads import GIB, Context, Workload

SAMPLE = Path(__file__).with_name("sample-python.jsonl.gz")
"""The recording that ships with cvmcore."""
UNKNOWN_MEM = 16 * GIB
"""Guest memory where nothing says how many pages a trace touches: an untouched page costs nothing."""

_NUMBER = r"0[xX][0-9a-fA-F]{1,16}|\d{1,19}"
_BASE = re.compile(rf"({_NUMBER})(?::({_NUMBER}))?")


class HvaBases(Option):
    """Where the recorded guest's memory was in its host's address space."""

    def parse(self, text: str | int) -> str:
        """The text, if it can be read. Raises InputError."""
        parse_bases(str(text))
        return str(text)


def parse_bases(text: str) -> list[tuple[int, int]]:
    """(hva, gpa) where each part of guest memory begins, sorted, from `HVA`, or `HVA:GPA,HVA:GPA,...`."""
    bases = []
    for part in text.split(",") if text else []:
        match = _BASE.fullmatch(part)
        if match is None:
            raise InputError(f"option hva_base: '{part}' is neither an address HVA, in hex with 0x, nor HVA:GPA")
        bases.append((int(match[1], 0), int(match[2] or "0", 0)))
    return sorted(bases)


def mem_bytes(file: str | None) -> int:
    """Memory for the pages that the header of the trace announces, in whole 2M pages."""
    if file == "-":
        return UNKNOWN_MEM
    with open_trace(file or SAMPLE) as reader:
        pages = reader.header.get("pages")
    if not isinstance(pages, int) or pages < 1:
        return UNKNOWN_MEM
    return -(-pages // PAGES_2M) * PAGES_2M * PAGE_BYTES


def run(context: Context) -> None:
    """Read, map, touch, chunk by chunk."""
    guest, dense = context.guest, DenseGfns()
    unmaps = Unmaps(context, dense)
    nr_vcpus = 0

    def on_progress(done: int, total: int | None) -> None:
        context.progress(done, total, "replay")

    with open_trace(context.file or SAMPLE, on_progress, keep_unmaps=bool(unmaps.bases)) as reader:
        context.machine.launch()
        for chunk in reader:
            gfns = dense.map(chunk.pages)
            if dense.nr_gfns > context.end_gfn:
                raise InputError(
                    f"{reader.name}: the trace touches more than the {context.end_gfn} pages that the guest has; "
                    "give it more with --mem"
                )
            for vcpu, mine in _by_vcpu(context, chunk):
                written, read = sort_unique(gfns[mine & chunk.is_write]), sort_unique(gfns[mine & ~chunk.is_write])
                if count(written):
                    guest.write(written, vcpu)
                if count(read):
                    guest.read(read, vcpu)
            if chunk.vcpus is not None:
                nr_vcpus = max(nr_vcpus, int(chunk.vcpus.max(initial=-1)) + 1)
            if chunk.unmap is not None:
                unmaps.replay(*chunk.unmap)
    if program := reader.header.get("program"):
        context.note(f"the trace is of {str(program)[:200]}")
    for note in reader.notes:
        context.note(note)
    if nr_vcpus > len(context.machine.vcpus):
        context.note(f"the recording has {nr_vcpus} vCPUs and the guest fewer: --vcpus {nr_vcpus} gives each its own")
    figures = reader.figures
    unmaps.report(figures.pop("unmapped ranges", 0))
    context.figures |= {"accesses": reader.accesses, "distinct pages": dense.nr_gfns} | figures


def _by_vcpu(context: Context, chunk: Chunk) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
    """The vCPUs that touch, and which rows are theirs."""
    nr_vcpus = len(context.machine.vcpus)
    if chunk.vcpus is None or nr_vcpus == 1:
        yield context.vcpu(), np.ones(len(chunk), bool)
    else:
        vcpus = chunk.vcpus % nr_vcpus
        for vcpu in np.unique(vcpus).tolist():
            yield vcpu, vcpus == vcpu


class Unmaps:
    """The host takes away again what it took away in the recording."""

    def __init__(self, context: Context, dense: DenseGfns) -> None:
        self.bases = parse_bases(context.options["hva_base"])
        self._context, self._dense = context, dense
        self._replayed = self._moved = 0

    def replay(self, start: int, end: int) -> None:
        """Hva [start, end) goes away: the pages there, as far as they were touched, move elsewhere."""
        machine = self._context.machine
        hva = machine.regions[0].hva
        inside = False
        ends = [base for base, _ in self.bases[1:]] + [1 << 64]
        for (base, gpa), base_end in zip(self.bases, ends, strict=True):
            low, high = max(start, base) - base + gpa, min(end, base_end) - base + gpa
            if low >= high:
                continue
            inside = True
            for gfns in self._dense.known(low >> PAGE_SHIFT, -(-high >> PAGE_SHIFT)):
                for first, n in _runs(gfns):
                    self._moved += machine.process.migrate_pages(hva + (first << PAGE_SHIFT), n << PAGE_SHIFT)
        self._replayed += inside

    def report(self, nr_ranges: int) -> None:
        """Say what became of so many unmapped ranges in all."""
        if nr_ranges == 0:
            return
        figures = self._context.figures
        if self.bases:
            figures["unmapped ranges replayed"] = self._replayed
            figures["pages moved by them"] = self._moved
        else:
            self._context.note("unmapped ranges can be replayed with -w hva_base=, where the guest's memory was")
        figures["unmapped ranges not replayed"] = nr_ranges - self._replayed


def _runs(gfns: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Sorted gfns as (first, how many) of each run without a gap."""
    cuts = np.flatnonzero(np.diff(gfns, prepend=-2, append=1 << 62) != 1)
    yield from zip(gfns[cuts[:-1]].tolist(), np.diff(cuts).tolist(), strict=True)


TRACE = Workload(
    name="trace",
    summary="replay a memory trace: kernel ftrace text, valgrind's lackey or cvmcore's own; also .gz, .zst, - (stdin)",
    run=run,
    options=(
        HvaBases("hva_base", "", "ftrace: host address of guest memory, HVA or HVA:GPA,... (replays unmapped ranges)"),
    ),
    default_mem=mem_bytes,
    reads_file=True,
)
