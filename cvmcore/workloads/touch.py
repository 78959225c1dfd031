"""`touch`: the guest writes or reads its memory, in order, at random, or with a few pages hotter than the rest."""

from __future__ import annotations

import numpy as np

from cvmcore.backend import Option
from cvmcore.pages import IntArray, sort_unique
from cvmcore.workloads import BATCH, Context, Whole, Workload

_SPREAD = 0x9E37_79B1
"""A prime: multiplying by it scatters the hot pages of `zipf` over memory."""


def run(context: Context) -> None:
    """Each pass makes as many touches as the region has pages."""
    options, guest = context.options, context.guest
    act = guest.write if options["access"] == "write" else guest.read
    nr_pages = context.portion(options["share"])
    context.machine.launch()
    for number in range(1, options["passes"] + 1):
        text = f"pass {number}, {options['order']}"
        if options["order"] == "sequential":
            for gfns in context.in_order(0, nr_pages, text):
                act(gfns, context.vcpu())
            continue
        for done in range(0, nr_pages, BATCH):
            n = min(BATCH, nr_pages - done)
            act(sort_unique(_draw(context, nr_pages, n)), context.vcpu())
            context.progress(done + n, nr_pages, text)


def _draw(context: Context, nr_pages: int, n: int) -> IntArray:
    """n gfns below nr_pages, with repetitions."""
    if context.options["order"] == "random":
        return context.rng.integers(0, nr_pages, n)
    # Zipf with exponent 1: rank r is drawn about once for r times that the first one is.
    rank = np.minimum(np.power(float(nr_pages), context.rng.random(n)).astype(np.int64), nr_pages) - 1
    hot: IntArray = rank * _SPREAD % nr_pages
    return hot


TOUCH = Workload(
    name="touch",
    summary="the guest touches its memory: in order, at random, or zipf",
    run=run,
    options=(
        Option("order", "sequential", "in which order", ("sequential", "random", "zipf")),
        Option("access", "write", "what the guest does", ("write", "read")),
        Whole("passes", 1, "how often, each pass with as many touches as pages", low=1, high=10**6),
        Whole("share", 100, "percent of memory that is touched", low=1, high=100),
    ),
)
