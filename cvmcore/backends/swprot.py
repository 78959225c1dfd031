"""`swprot`: KVM_X86_SW_PROTECTED_VM. Private by attribute, backed by guest_memfd, and no hardware that protects it.

The loopback backend: it proves the common paths alone, and is what every other private VM type is compared with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cvmcore.backend import Backend
from cvmcore.hookspecs import API_VERSION, hookimpl
from cvmcore.types import Capabilities


class SwProt:
    """No vendor hook but the capabilities: conversions exit to user space, zaps keep the guest_memfd page."""

    @hookimpl
    def capabilities(self, vm_type: str, options: dict[str, Any]) -> Capabilities:
        return Capabilities(private_by_attribute=True)


SWPROT = Backend(
    name="swprot",
    vendor="kvm-software",
    vm_type="swprot",
    summary="software-protected VM: private by attribute, no hardware",
    api_version=API_VERSION,
    make=SwProt,
    profile=Path(__file__).with_name("swprot.toml"),
    kvm_type=1,
)
