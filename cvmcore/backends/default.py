"""`default`: VM type 0, what every kernel has. No private memory; guest_memfd as ordinary, mappable memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cvmcore.backend import Backend, Option
from cvmcore.hookspecs import API_VERSION, hookimpl
from cvmcore.types import PG_LEVEL_1G, Capabilities


class Default:
    """No vendor hook but the capabilities."""

    @hookimpl
    def capabilities(self, vm_type: str, options: dict[str, Any]) -> Capabilities:
        return Capabilities(
            gmem_init_shared=True,
            prefault=options["prefault"] == "yes",
            max_private_level=PG_LEVEL_1G,
            converts_in_place=True,
            conversion_keeps_content=True,
        )


DEFAULT = Backend(
    name="default",
    vendor="none",
    vm_type="default",
    summary="VM type 0: no private memory",
    api_version=API_VERSION,
    make=Default,
    profile=Path(__file__).with_name("default.toml"),
    kvm_type=0,
    options=(
        Option("prefault", "yes", "whether the host has KVM_PRE_FAULT_MEMORY: no with shadow paging", ("yes", "no")),
    ),
)
