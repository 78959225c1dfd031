"""`dirty-log`: log what a running guest writes, as live migration does, and stop logging again.

The log of each round must name exactly the pages written since the round before. Logging splits large pages, stopping
brings them back; content must not notice.
"""

from __future__ import annotations

import numpy as np

from cvmcore.guest import Region
from cvmcore.pages import as_sel
from cvmcore.types import KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, PAGE_SHIFT
from cvmcore.workloads import Context, Whole, Workload


def run(context: Context) -> None:
    """Populate, log for some rounds, stop, touch again."""
    region = context.machine.regions[0]
    private = True
    if context.caps.private_by_attribute:
        region, private = _shared_slot(context), False
        context.note("guest_memfd slots cannot be logged: a slot of shared memory is")
    guest, vm = context.guest, context.machine.vm
    start, stop = region.base_gfn, region.base_gfn + region.npages
    context.machine.launch()
    context.populate(start, stop, private)
    context.figures["large pages before, %"] = context.large_percent()

    context.progress(0, None, "start logging")
    _set_flags(context, region, KVM_MEM_LOG_DIRTY_PAGES)
    nr_written = max(1, region.npages * context.options["writes"] // 100)
    logged = 0
    for number in range(1, context.options["rounds"] + 1):
        written = start + context.scattered(region.npages, nr_written)
        guest.write(as_sel(written), context.vcpu(), private)
        log = start + np.flatnonzero(vm.get_dirty_log(region.slot))
        logged += len(log)
        missing, more = np.setdiff1d(written, log), np.setdiff1d(log, written)
        if len(missing) or len(more):
            context.fail(
                f"round {number}: the log lacks {len(missing)} of {len(written)} pages that were written, "
                f"and names {len(more)} that were not"
            )
        context.progress(number, context.options["rounds"], "log")
    context.figures["pages logged"] = logged
    context.figures["large pages while logging, %"] = context.large_percent()

    context.progress(0, None, "stop logging")
    _set_flags(context, region, 0)
    for gfns in context.in_order(start, stop, "touch again"):
        guest.read(gfns, context.vcpu(), private)
    context.figures["large pages after, %"] = context.large_percent()


def _shared_slot(context: Context) -> Region:
    """Half of memory moves from the guest_memfd slot to a slot of its own: never private, without guest_memfd."""
    machine = context.machine
    whole = machine.regions[0]
    half = whole.npages // 2
    context.need_pages(2, "dirty-log")
    kept, size = half << PAGE_SHIFT, whole.npages - half << PAGE_SHIFT
    machine.vm.set_user_memory_region2(0, 0, 0, 0)
    machine.vm.set_user_memory_region2(0, KVM_MEM_GUEST_MEMFD, 0, kept, whole.hva, whole.gmem_fd, 0)
    machine.vm.set_user_memory_region2(1, 0, kept, size, whole.hva + kept)
    machine.vm.set_memory_attributes(kept, size, 0)
    machine.guest.shared[half : whole.npages] = 1
    shared = Region(1, half, whole.npages - half, whole.hva + kept, -1)
    machine.regions[:] = [Region(0, 0, half, whole.hva, whole.gmem_fd), shared]
    return shared


def _set_flags(context: Context, region: Region, flags: int) -> None:
    base, size = region.base_gfn << PAGE_SHIFT, region.npages << PAGE_SHIFT
    context.machine.vm.set_user_memory_region2(region.slot, flags, base, size, region.hva)


DIRTY_LOG = Workload(
    name="dirty-log",
    summary="log what the guest writes, as live migration does, then stop logging",
    run=run,
    options=(
        Whole("rounds", 3, "how often the log is fetched", low=1, high=10**6),
        Whole("writes", 10, "percent of the logged memory written in each round", low=1, high=100),
    ),
    needs=("dirty_logging",),
)
