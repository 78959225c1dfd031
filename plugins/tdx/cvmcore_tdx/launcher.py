"""`cvm launch` for TDX: the calls that a VMM makes to build a TD from a firmware image (QEMU's order)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cvmcore.backend import Option
from cvmcore.errors import InputError
from cvmcore.measured import AddVcpu, Call, Command, Launcher, Load, cover
from cvmcore.types import PAGE_BYTES
from cvmcore_tdx.launch import MR_EXTEND, PAGE_AUG, Firmware, SectionType, parse_firmware
from cvmcore_tdx.ops import watch_launch

MAX_VCPUS = 4096
MEASURED, UNMEASURED = "normal", "unmeasured"
PER_PAGE, TWO_PASS = "per-page", "two-pass"


def launch_steps(firmware: Firmware, hob: bytes = b"") -> list[Load]:
    """The steps of a TD launch, in table order. hob: the hand-off block that the VMM makes; it is not measured."""
    steps: list[Load] = []
    for section in firmware.sections:
        if section.attributes & PAGE_AUG:
            continue
        data = firmware.image[section.data_offset : section.data_offset + section.data_size]
        if section.type is SectionType.TD_HOB:
            if len(hob) > section.size_bytes:
                raise InputError(f"a hand-off block of {len(hob)} bytes does not fit into {section.size_bytes}")
            data = hob
        kind = MEASURED if section.attributes & MR_EXTEND else UNMEASURED
        steps.append(Load(kind, section.gpa, section.size_bytes, data))
    return steps


def pages(steps: Iterable[Load]) -> Iterator[tuple[int, bytes, bool]]:
    """The pages of steps, as `launch.mrtd` wants them."""
    for step in steps:
        contents = step.contents.ljust(step.size_bytes, b"\0")
        for at in range(0, step.size_bytes, PAGE_BYTES):
            yield step.gpa + at, contents[at : at + PAGE_BYTES], step.kind == MEASURED


def plan(image: bytes, options: Mapping[str, Any]) -> Sequence[Call]:
    """KVM_TDX_INIT_VM, memory, vCPUs, each section in table order, KVM_TDX_FINALIZE_VM.

    per-page: KVM_TDX_INIT_MEM_REGION with MEASURE, so each page's ADD stands before its EXTENDs. two-pass: all pages of
    a section are added, then KVM_TDX_EXTEND_MEMORY measures them.
    """
    vcpus = options["vcpus"]
    if not 0 < vcpus <= MAX_VCPUS:
        raise InputError(f"{vcpus} vCPUs: it must be 1 to {MAX_VCPUS}")
    steps = [step for step in launch_steps(parse_firmware(image)) if step.size_bytes]
    calls: list[Call] = [
        Command("KVM_TDX_INIT_VM"),
        *cover((step.gpa, step.size_bytes) for step in steps),
        *(AddVcpu() for _ in range(vcpus)),
        *(Command("KVM_TDX_INIT_VCPU", {"vcpu": vcpu}) for vcpu in range(vcpus)),
    ]
    for step in steps:
        if step.kind == MEASURED and options["order"] == TWO_PASS:
            calls.append(Load(UNMEASURED, step.gpa, step.size_bytes, step.contents))
            region = {"gpa": step.gpa, "nr_pages": step.size_bytes // PAGE_BYTES}
            calls.append(Command("KVM_TDX_EXTEND_MEMORY", region, step.gpa))
        else:
            calls.append(step)
    return [*calls, Command("KVM_TDX_FINALIZE_VM")]


TDX = Launcher(
    (
        Option("vcpus", 1, "how many vCPUs; none of them is measured"),
        Option(
            "order", PER_PAGE, "each page's PAGE.ADD then its MR.EXTENDs, or all of a section's, one after the other",
            (PER_PAGE, TWO_PASS),
        ),
    ),
    plan,
    watch_launch,
)  # fmt: skip
"""The launcher, as its entry point names it."""
