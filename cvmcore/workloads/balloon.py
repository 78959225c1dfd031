"""`balloon`: the guest gives scattered pages back to the host, and touches them again later."""

from __future__ import annotations

import numpy as np

from cvmcore.backend import Option
from cvmcore.guest import stamps_for
from cvmcore.pages import Sel, Words, array_of, as_sel, count, expand, heads, part, take
from cvmcore.workloads import BATCH, MIB, Context, Whole, Workload

_ORDERS = {"4k": 0, "2m": 9}


def run(context: Context) -> None:
    """Populate, inflate, deflate: what comes back must be fresh, what stayed must be as it was."""
    caps, machine, options = context.caps, context.machine, context.options
    if not caps.private_by_attribute and not caps.honours_notifiers:
        context.skip("the host cannot take memory back from a running VM of this type (it honours no notifiers)")
    order = _ORDERS[options["chunk"]]
    context.need_pages(1 << order, f"a chunk of {options['chunk']}")
    machine.launch()
    for number in range(1, options["rounds"] + 1):
        context.populate(0, context.end_gfn)
        chunks = context.scattered(context.end_gfn, max(1, context.portion(options["share"]) >> order), order)
        gfns = expand(heads(as_sel(chunks), order), order)
        before, held = machine.host.frames.in_use, take(context.guest.written, gfns).copy()
        for low in range(0, count(gfns), BATCH):
            context.progress(low, count(gfns), f"inflate {number}")
            _give_back(context, part(gfns, low, low + BATCH))
            context.progress(min(low + BATCH, count(gfns)), count(gfns), f"inflate {number}")
        context.figures["pages given back"] = context.figures.get("pages given back", 0) + count(gfns)
        freed = before - machine.host.frames.in_use
        context.figures["frames freed"] = context.figures.get("frames freed", 0) + freed
        for low in range(0, count(gfns), BATCH):
            context.progress(low, count(gfns), f"deflate {number}")
            _take_again(context, part(gfns, low, low + BATCH), held[low : low + BATCH])
            context.progress(min(low + BATCH, count(gfns)), count(gfns), f"deflate {number}")


def _give_back(context: Context, gfns: Sel) -> None:
    """The guest names the pages, the VMM gives their memory back to the host."""
    guest, machine = context.guest, context.machine
    if context.options["convert"] == "yes" and context.is_confidential:
        guest.convert(gfns, False, context.vcpu())
    if context.caps.private_by_attribute:
        machine.punch(gfns)
    else:
        machine.discard_shared(gfns)
    # The guest's driver knows that these pages lost what they held, and their acceptance.
    guest.written[gfns] = 0
    guest.accepted[gfns] = 0


def _take_again(context: Context, gfns: Sel, held: Words) -> None:
    """The guest uses the pages again. held: the version of what it had written to each before."""
    guest, vcpu = context.guest, context.vcpu()
    if context.options["convert"] == "yes" and context.is_confidential:
        guest.convert(gfns, True, vcpu)
    seen = guest.read(gfns, vcpu)
    stale = int(np.count_nonzero(seen)) if context.caps.fresh_is_zero else _unchanged(gfns, seen, held)
    if stale:
        context.fail(f"{stale} of {count(gfns)} pages that the guest got back are not fresh")
    guest.write(gfns, vcpu)


def _unchanged(gfns: Sel, seen: Words, held: Words) -> int:
    """How many pages still show what the guest had written to them."""
    unchanged = 0
    for version in np.unique(held).tolist():
        same = held == version
        unchanged += int(np.count_nonzero(seen[same] == stamps_for(array_of(gfns)[same], version)))
    return unchanged


BALLOON = Workload(
    name="balloon",
    summary="the guest gives pages back to the host and touches them again",
    run=run,
    options=(
        Whole("share", 25, "percent of memory that is given back", low=1, high=100),
        Option("chunk", "4k", "in pieces of this size, scattered", tuple(_ORDERS)),
        Whole("rounds", 1, "how often", low=1, high=10**6),
        Option("convert", "no", "convert pages to shared before they are given back", ("no", "yes")),
    ),
    default_mem=64 * MIB,
)
