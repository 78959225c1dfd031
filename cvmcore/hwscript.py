"""Trusted hardware by itself: a script of operations (`cvmcore.script`), and what each answers.

An entry point of the group `cvmcore.hw` names a factory that makes fresh hardware and returns its operations by name:

    {"op": "host_share_hyp", "pfn": 100, "nr": 4}
"""

from __future__ import annotations

from collections.abc import Mapping

from cvmcore.errors import PluginError
from cvmcore.plugins import load
from cvmcore.script import Operation

GROUP = "cvmcore.hw"


def load_hardware(name: str) -> Mapping[str, Operation]:
    """Fresh hardware, by its name. InputError where there is none, PluginError where it cannot be used."""
    factory = load(GROUP, name, "hardware")
    operations = factory() if callable(factory) else None
    if not isinstance(operations, Mapping):
        raise PluginError(f"hardware {name}: its entry point does not make a mapping of operations")
    return operations
