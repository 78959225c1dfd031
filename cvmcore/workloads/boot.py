"""`boot`: launch an image, then do to memory what firmware and a Linux kernel do before user space starts.

What a kernel touches early: its own image and data, one struct page of 64 bytes for each page of memory (Documentation:
mm/memory-model), and in a confidential VM the bounce buffers of SWIOTLB, 6 % of memory but 64 MiB to 1 GiB
(arch/x86/mm/mem_encrypt.c: mem_encrypt_setup_arch), which are allocated, converted to shared and cleared again.
"""

from __future__ import annotations

import attrs
import numpy as np

from cvmcore.types import PAGE_BYTES
from cvmcore.workloads import GIB, PAGES_PER_MIB, Context, Whole, Workload

STRUCT_PAGE_BYTES = 64
SWIOTLB_PERCENT, SWIOTLB_MIN_MIB, SWIOTLB_MAX_MIB = 6, 64, 1024


@attrs.frozen
class Layout:
    """Where everything is, as gfns [start, end), one behind another from gfn 0."""

    image: range
    firmware: range
    kernel: range
    swiotlb: range
    struct_pages: range


def layout(context: Context) -> Layout:
    """The layout for the machine and the options. InputError where memory is too small for it."""
    options = context.options
    swiotlb_mib = options["swiotlb"]
    if swiotlb_mib == 0:
        mem_mib = context.end_gfn // PAGES_PER_MIB
        swiotlb_mib = min(max(mem_mib * SWIOTLB_PERCENT // 100, SWIOTLB_MIN_MIB), SWIOTLB_MAX_MIB)
    sizes = [
        options["image"],
        options["firmware"] * PAGES_PER_MIB,
        options["kernel"] * PAGES_PER_MIB,
        swiotlb_mib * PAGES_PER_MIB,
        -(-context.end_gfn * STRUCT_PAGE_BYTES // PAGE_BYTES),
    ]
    context.need_pages(sum(sizes), "this boot")
    ends = np.cumsum(sizes).tolist()
    return Layout(*(range(end - size, end) for size, end in zip(sizes, ends, strict=True)))


def run(context: Context) -> None:
    """Launch, firmware, kernel; the image must read back as it was loaded."""
    guest, machine = context.guest, context.machine
    where = layout(context)
    context.progress(0, None, "launch")
    contents = [context.rng.bytes(PAGE_BYTES) for _ in where.image]
    machine.launch(contents)

    # The image is part of the launch: the guest finds it accepted.
    image = slice(where.image.start, where.image.stop, 1)
    guest.accepted[image] = 1
    loaded = [machine.host.memory.intern(content) for content in contents]
    if guest.read(image, context.vcpu()).tolist() != loaded:
        context.fail("the image does not read back as it was loaded")

    for gfns in context.in_order(where.firmware.start, where.firmware.stop, "firmware"):
        guest.write(gfns, context.vcpu())
    for gfns in context.in_order(where.struct_pages.start, where.struct_pages.stop, "struct pages"):
        guest.write(gfns, context.vcpu())
    for gfns in context.in_order(where.swiotlb.start, where.swiotlb.stop, "bounce buffers"):
        guest.write(gfns, context.vcpu())  # cleared by the allocator
        if context.is_confidential:
            guest.convert(gfns, False, context.vcpu())
            guest.write(gfns, context.vcpu(), private=False)
    for gfns in context.in_order(where.kernel.start, where.kernel.stop, "kernel"):
        guest.write(gfns, context.vcpu())
    context.figures["launched pages"] = len(where.image)
    context.figures["bounce buffer pages"] = len(where.swiotlb)


BOOT = Workload(
    name="boot",
    summary="launch an image, then firmware and kernel: struct pages, bounce buffers, working set",
    run=run,
    options=(
        Whole("image", 16, "4K pages of the launched image", low=1, high=1 << 16),
        Whole("firmware", 16, "MiB that the firmware writes"),
        Whole("kernel", 128, "MiB that the kernel writes besides"),
        Whole("swiotlb", 0, "MiB of bounce buffers; 0: 6 % of memory, 64 MiB to 1 GiB"),
    ),
    default_mem=2 * GIB,
)
