"""Prices of the three backends, and which price items their hooks charge."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_HERE = Path(__file__).parent

PROFILES: Final = {name: _HERE / f"{name}.toml" for name in ("sev", "sev-es", "snp")}

CHARGES: Final = frozenset(
    {
        "cacheline_flush_4k",  # flushing a page by line before its key changes, or when it goes back to the host
        "gup_pin_2m",
        "gup_pin_4k",
        "gup_unpin_4k",
        "host_copy_4k",
        "launch_update_4k",  # measure and encrypt a page
        "psc_call",  # page state change call of the guest, beyond the exit that the core charges
        "psc_entry",
        "psmash",
        "psp_command",  # any other firmware command
        "pvalidate_2m",
        "pvalidate_4k",
        "rmpupdate_2m",
        "rmpupdate_4k",
        "vm_exit",
        "wbinvd",  # on one CPU
    }
)
"""All of them, for each backend: the three VM types share a host, and so a profile."""
