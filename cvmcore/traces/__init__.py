"""Memory traces of real programs and VMs, read as a stream: who touched which page, in order.

Three formats are read, told apart by how they begin: what valgrind's lackey writes (`lackey`), kernel ftrace text with
the faults of a VM (`ftrace`), and cvmcore's own JSONL (`jsonl`). Each may be compressed with gzip or zstd, and `-` is
standard input. Memory in use does not grow with the file: a block of text and a chunk of rows are there at a time.
"""

from __future__ import annotations

from cvmcore.traces.chunks import PAGE_BYTES, PAGE_SHIFT, Chunk
from cvmcore.traces.gfns import DenseGfns
from cvmcore.traces.reader import Progress, TraceReader, open_trace
from cvmcore.traces.reduce import Reduction, reduce_trace

__all__ = [
    "PAGE_BYTES",
    "PAGE_SHIFT",
    "Chunk",
    "DenseGfns",
    "Progress",
    "Reduction",
    "TraceReader",
    "open_trace",
    "reduce_trace",
]
