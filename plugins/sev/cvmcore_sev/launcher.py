"""`cvm launch` for SEV, SEV-ES and SEV-SNP: the calls that a VMM makes to launch a firmware image."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from cvmcore.backend import Option
from cvmcore.errors import InputError
from cvmcore.measured import AddVcpu, Call, Command, Hva, Launcher, Load, Write, cover
from cvmcore.types import PAGE_BYTES
from cvmcore_sev.commands import ES_POLICY, SNP_POLICY, watch_launch
from cvmcore_sev.launch import (
    CPUID,
    CPUS,
    KERNEL_HASHES,
    SECRETS,
    SECTIONS,
    VMSA_GPA,
    Firmware,
    hash_table,
    parse_firmware,
    vmsa_pages,
)

_SNP_ACTIVE: Final = 1
MAX_VCPUS: Final = 4096


# ---- what is loaded, in the order it is measured ----------------------------------------------------------------


def snp_steps(firmware: Firmware, vmsas: Sequence[bytes], *, vmm: str = "qemu", hashes: bytes = b"") -> list[Load]:
    """The steps of an SNP launch: image, metadata sections, save areas. hashes: `hash_table` of a direct boot."""
    image = Load("normal", firmware.gpa, len(firmware.image), firmware.image)
    return [image, *_section_steps(firmware, vmm, hashes), *_vmsa_steps(vmsas)]


def svsm_steps(firmware: Firmware, svsm: Firmware, vmsas: Sequence[bytes]) -> list[Load]:
    """The steps with an SVSM below the firmware: image, SVSM, the SVSM's sections, save areas."""
    images = [Load("normal", each.gpa, len(each.image), each.image) for each in (firmware, svsm)]
    return [*images, *_section_steps(svsm, "qemu", b""), *_vmsa_steps(vmsas)]


def sev_steps(firmware: Firmware, hashes: bytes = b"") -> list[tuple[int, bytes]]:
    """What an SEV or SEV-ES launch measures before the save areas, gpa and bytes: the image, the kernel hashes."""
    if hashes and not firmware.hashes_gpa:
        raise InputError("a kernel is given, but the firmware has no place for its hashes")
    return [(firmware.gpa, firmware.image), *([(firmware.hashes_gpa, hashes)] if hashes else [])]


def _section_steps(firmware: Firmware, vmm: str, hashes: bytes) -> list[Load]:
    if hashes and not any(section.type == KERNEL_HASHES for section in firmware.sections):
        raise InputError("a kernel is given, but the firmware's metadata has no section for its hashes")
    steps: list[Load] = []
    last: list[Load] = []
    for section in firmware.sections:
        kinds = SECTIONS[section.type]
        if vmm not in kinds:
            raise InputError(f"VMM '{vmm}' is none of {', '.join(kinds)}")
        if section.type == KERNEL_HASHES and hashes:
            page = (bytes(firmware.hashes_gpa & (PAGE_BYTES - 1)) + hashes).ljust(PAGE_BYTES, b"\0")
            steps.append(Load("normal", section.gpa, PAGE_BYTES, page))
        elif section.type in (SECRETS, CPUID):
            step = Load(kinds[vmm], section.gpa, PAGE_BYTES)
            (last if section.type == CPUID and vmm == "ec2" else steps).append(step)
        else:
            steps.append(Load(kinds[vmm], section.gpa, section.size_bytes))
    return steps + last


def _vmsa_steps(vmsas: Sequence[bytes]) -> list[Load]:
    return [Load("vmsa", VMSA_GPA, PAGE_BYTES, page) for page in vmsas]


# ---- options and plans -------------------------------------------------------------------------------------------

_COMMON: Final = (
    Option("vcpus", 1, "how many vCPUs"),
    Option("vcpu-type", "EPYC-Milan", f"{', '.join(CPUS)}, with or without -v1 and so on, or a CPUID signature 0x..."),
    Option("vmm-type", "qemu", "whose save areas and sections", tuple(next(iter(SECTIONS.values())))),
    Option("kernel", "", "kernel that is booted directly: its hash is measured"),
    Option("initrd", "", "its initial RAM disk"),
    Option("append", "", "its command line"),
)


def _signature(text: str) -> int:
    """The CPUID signature of a CPU type. Raises InputError."""
    name = re.sub(r"-(v\d+|IBPB)$", "", text)
    if name in CPUS:
        return CPUS[name]
    if re.fullmatch(r"0[xX][0-9a-fA-F]{1,8}", text):
        return int(text, 16)
    raise InputError(f"vCPU type '{text}' is none of {', '.join(CPUS)}, nor a CPUID signature as 0xa00f11")


def _hashes(options: Mapping[str, Any]) -> bytes:
    """The table of kernel hashes; empty where no kernel is given. Raises InputError."""
    if options["kernel"]:
        return hash_table(options["kernel"], options["initrd"], options["append"])
    for name in ("initrd", "append"):
        if options[name]:
            raise InputError(f"--{name} goes with --kernel, and there is none")
    return b""


def _vmsas(firmware: Firmware, options: Mapping[str, Any], features: int) -> list[bytes]:
    return vmsa_pages(
        options["vcpus"], firmware.reset_eip, signature=_signature(options["vcpu-type"]), features=features,
        vmm=options["vmm-type"],
    )  # fmt: skip


def _checked(options: Mapping[str, Any], policy_bits: int) -> None:
    if not 0 < options["vcpus"] <= MAX_VCPUS:
        raise InputError(f"{options['vcpus']} vCPUs: it must be 1 to {MAX_VCPUS}")
    if not 0 <= options["policy"] < 1 << policy_bits:
        raise InputError(f"policy {options['policy']:#x} is no number of {policy_bits} bits")


def _snp(image: bytes, options: Mapping[str, Any]) -> Sequence[Call]:
    """KVM_SEV_INIT2, memory and vCPUs, SNP_LAUNCH_START, the pages; save areas are measured by SNP_LAUNCH_FINISH."""
    _checked(options, 64)
    features = options["guest-features"]
    if not features & _SNP_ACTIVE:
        raise InputError(f"guest features {features:#x}: an SNP guest has bit 0")
    firmware = parse_firmware(image)
    vmsas = _vmsas(firmware, options, features)
    steps = snp_steps(firmware, [], vmm=options["vmm-type"], hashes=_hashes(options))
    steps = [step for step in steps if step.size_bytes]
    return [
        Command("KVM_SEV_INIT2", {"vmsa_features": features & ~_SNP_ACTIVE}),
        *cover((step.gpa, step.size_bytes) for step in steps),
        *(AddVcpu(vmsa) for vmsa in vmsas),
        Command("KVM_SEV_SNP_LAUNCH_START", {"policy": options["policy"]}),
        *steps,
        Command("KVM_SEV_SNP_LAUNCH_FINISH"),
    ]


def _legacy(es: bool) -> Callable[[bytes, Mapping[str, Any]], Sequence[Call]]:
    def plan(image: bytes, options: Mapping[str, Any]) -> Sequence[Call]:
        """KVM_SEV_INIT2, memory and vCPUs, LAUNCH_START, LAUNCH_UPDATE_DATA of each page, save areas, MEASURE."""
        _checked(options, 32)
        firmware = parse_firmware(image)
        features = options.get("guest-features", 0)
        states = _vmsas(firmware, options, features) if es else [b""] * options["vcpus"]
        steps = sev_steps(firmware, _hashes(options))
        calls: list[Call] = [
            Command("KVM_SEV_INIT2", {"vmsa_features": features}),
            *cover(_pages_of(gpa, len(data)) for gpa, data in steps),
            *(AddVcpu(state) for state in states),
            Command("KVM_SEV_LAUNCH_START", {"policy": options["policy"]}),
        ]
        for start, data in steps:
            calls.append(Write(start & -PAGE_BYTES, bytes(start % PAGE_BYTES) + data))
            for gpa in range(start, start + len(data), PAGE_BYTES):
                length = min(PAGE_BYTES, start + len(data) - gpa)
                calls.append(Command("KVM_SEV_LAUNCH_UPDATE_DATA", {"uaddr": Hva(gpa), "len": length}, gpa))
        calls += [Command("KVM_SEV_LAUNCH_UPDATE_VMSA")] if es else []
        return [*calls, Command("KVM_SEV_LAUNCH_MEASURE", {"len": 48}), Command("KVM_SEV_LAUNCH_FINISH")]

    return plan


def _pages_of(gpa: int, size_bytes: int) -> tuple[int, int]:
    """The whole pages that a range touches."""
    start = gpa & -PAGE_BYTES
    return start, -(-(gpa + size_bytes - start) // PAGE_BYTES) * PAGE_BYTES


SNP = Launcher(
    (
        *_COMMON,
        Option("policy", SNP_POLICY, "guest policy"),
        Option("guest-features", _SNP_ACTIVE, "SEV_FEATURES of the save areas"),
    ),
    _snp,
    watch_launch,
)
SEV_ES = Launcher(
    (
        *_COMMON,
        Option("policy", ES_POLICY, "guest policy"),
        Option("guest-features", 0, "SEV_FEATURES of the save areas"),
    ),
    _legacy(True),
    watch_launch,
)
SEV = Launcher((*_COMMON, Option("policy", 0, "guest policy")), _legacy(False), watch_launch)
"""Plain SEV measures no vCPU: their type and the VMM make no difference."""
