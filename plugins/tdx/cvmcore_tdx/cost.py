"""Prices of the backend, and which price items its hooks charge."""

from __future__ import annotations

from pathlib import Path
from typing import Final

PROFILE: Final = Path(__file__).with_name("tdx.toml")

CHARGES: Final = frozenset(
    {
        "accept_2m",
        "accept_4k",
        "clflush_4k",  # the host's lines of a page are flushed before it becomes the TD's
        "cache_wb",  # PHYMEM.CACHE.WB on one package
        "external_update",
        "fault_fixed",
        "key_config",  # MNG.KEY.CONFIG on one package
        "kick_base",  # getting every vCPU out of the guest: per kick,
        "kick_per_vcpu",  # and per vCPU
        "mem_track",
        "mirror_read",  # a walk of the mirror, for walkers that are compared with `sept_rd`
        "movdir64b_clear_4k",  # the host rewrites a page that comes back
        "mr_extend_256b",
        "page_add",
        "page_aug_2m",
        "page_aug_4k",
        "page_demote",
        "page_promote",
        "page_reclaim",
        "page_remove",
        "page_wbinvd",
        "range_block",
        "range_unblock",
        "seamcall",  # any other leaf of the host
        "sept_add",
        "sept_rd",
        "tdcall",  # an ACCEPT that finds nothing to zero
        "vm_exit",
    }
)
