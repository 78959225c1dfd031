"""`trace`: replay the memory trace of a real program; its pages become gfns densely, in order of first touch.

A chunk of the trace (up to `traces.CHUNK_ROWS` records) is one batch: each page that it writes is written once, each
page that it reads is read once.
"""

from __future__ import annotations

from pathlib import Path

from cvmcore.errors import InputError
from cvmcore.pages import count, sort_unique
from cvmcore.traces import DenseGfns, open_trace
from cvmcore.types import PAGE_BYTES, PAGES_2M
from cvmcore.workloads import GIB, Context, Workload

SAMPLE = Path(__file__).with_name("sample-python.jsonl.gz")
"""The recording that ships with cvmcore."""
UNKNOWN_MEM = 16 * GIB
"""Guest memory where nothing says how many pages a trace touches: an untouched page costs nothing."""


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

    def on_progress(done: int, total: int | None) -> None:
        context.progress(done, total, "replay")

    with open_trace(context.file or SAMPLE, on_progress) as reader:
        context.machine.launch()
        for chunk in reader:
            gfns = dense.map(chunk.pages)
            if dense.nr_gfns > context.end_gfn:
                raise InputError(
                    f"{reader.name}: the trace touches more than the {context.end_gfn} pages that the guest has; "
                    "give it more with --mem"
                )
            vcpu = context.vcpu()
            written, read = sort_unique(gfns[chunk.is_write]), sort_unique(gfns[~chunk.is_write])
            if count(written):
                guest.write(written, vcpu)
            if count(read):
                guest.read(read, vcpu)
    if program := reader.header.get("program"):
        context.note(f"the trace is of {str(program)[:200]}")
    context.figures["accesses"] = reader.accesses
    context.figures["distinct pages"] = dense.nr_gfns


TRACE = Workload(
    name="trace",
    summary="replay a memory trace: valgrind's lackey or cvmcore's own, plain or .gz, - for standard input",
    run=run,
    default_mem=mem_bytes,
    reads_file=True,
)
