"""`cvm launch` for TDX: the calls that a VMM makes to build a TD from a firmware image (QEMU's order)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cvmcore.backend import Option
from cvmcore.errors import InputError
from cvmcore.measured import AddVcpu, Call, Command, Launcher, Load, cover
from cvmcore.types import PAGE_BYTES
from cvmcore_tdx.launch import MEASURED, UNMEASURED, launch_steps, parse_firmware
from cvmcore_tdx.ops import watch_launch

MAX_VCPUS = 4096
PER_PAGE, TWO_PASS = "per-page", "two-pass"


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
            calls.append(Load(UNMEASURED, step.gpa, step.size_bytes, step.data))
            region = {"gpa": step.gpa, "nr_pages": step.size_bytes // PAGE_BYTES}
            calls.append(Command("KVM_TDX_EXTEND_MEMORY", region, step.gpa))
        else:
            calls.append(Load(step.kind, step.gpa, step.size_bytes, step.data))
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
