"""`convert`: buffers are shared with the host, filled by it, read by the guest, and taken back."""

from __future__ import annotations

import numpy as np

from cvmcore.guest import stamps_for
from cvmcore.types import PAGE_SHIFT, HostVerdict
from cvmcore.workloads import MIB, Context, Whole, Workload


def run(context: Context) -> None:
    """Each round shares every buffer once and converts it back."""
    nr_buffers, nr_pages = context.options["buffers"], context.options["pages"]
    if not context.is_confidential:
        context.skip("it has no private memory, so there is nothing to convert")
    context.need_pages(nr_buffers * nr_pages, f"convert with {nr_buffers} buffers of {nr_pages} pages")
    context.machine.launch()
    turns = context.options["rounds"] * nr_buffers
    for turn in range(turns):
        start = turn % nr_buffers * nr_pages
        _share_and_take_back(context, slice(start, start + nr_pages, 1))
        context.recover()
        context.progress(turn + 1, turns, "convert buffers")
    if context.machine.host.policies["merge"] != "none":
        context.figures["large pages after, %"] = context.large_percent()


def _share_and_take_back(context: Context, gfns: slice) -> None:
    machine, guest = context.machine, context.guest
    n, vcpu = gfns.stop - gfns.start, context.vcpu()
    guest.write(gfns, vcpu)
    guest.convert(gfns, False, vcpu)
    if context.caps.conversion_keeps_content:
        kept = guest.read(gfns, vcpu, private=False)
        if np.count_nonzero(kept != stamps_for(gfns, guest.version)):
            context.fail(f"the buffer at gfn {gfns.start:#x} lost its content when it was shared")

    from_host = context.rng.integers(1, 1 << 30, n).astype(np.uint32)
    region = machine.regions[0]
    hva = region.hva + (gfns.start - region.base_gfn << PAGE_SHIFT)
    verdict = machine.process.write(hva, from_host, n)
    if verdict is not HostVerdict.OK:
        context.fail(f"the host cannot write the shared buffer at gfn {gfns.start:#x}: {verdict.name}")
    elif np.count_nonzero(guest.read(gfns, vcpu, private=False) != from_host):
        context.fail(f"the guest does not read in the buffer at gfn {gfns.start:#x} what the host wrote there")

    guest.convert(gfns, True, vcpu)
    guest.write(gfns, vcpu)


CONVERT = Workload(
    name="convert",
    summary="share buffers with the host and take them back",
    run=run,
    options=(
        Whole("buffers", 4, "how many buffers, one behind another", low=1),
        Whole("pages", 64, "4K pages of a buffer", low=1),
        Whole("rounds", 4, "how often each buffer is shared", low=1, high=10**6),
    ),
    default_mem=64 * MIB,
)
