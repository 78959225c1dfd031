"""Prices of pKVM: where they are, which its hooks charge, and of which parts each piece of EL2's work is priced."""

from __future__ import annotations

from pathlib import Path

PROFILE = Path(__file__).with_name("pkvm.toml")

TRAP: tuple[str, ...] = ("hvc", "el2_dispatch")
"""A call into EL2 and back, by host or guest, before it does anything."""

PARTS: dict[str, tuple[str, ...]] = {
    "pte": ("el2_pte_update",),
    "tlbi_host": ("tlbi_page",),
    "tlbi_guest": ("tlbi_page",),
    "tlbi_range": ("tlbi_page",),
    "tlbi_vmid": ("tlbi_page",),
    "tlbi_hyp": ("el2_fixmap_4k",),
    "tlbi_local": ("tlbi_local",),
    "host_fault": TRAP,
    "clear": ("el2_fixmap_4k", "page_clear_4k", "cmo_4k"),
    "guest_cmo": ("donate_guest_extra",),
    "unmap_cmo": ("el2_fixmap_4k", "cmo_4k"),
    "block_cmo": ("cmo_2m",),
    # Counted beside the entries and invalidations that they consist of.
    "host_split": (),
    "admit": (),
    "table": (),
    "untable": (),
}
"""The prices of one unit of each kind of EL2's work (the keys of hw.Work), while its locks are held."""

AFTERWARDS: dict[str, tuple[str, ...]] = {
    "tlbi_host": ("host_refill_4k",),
}
"""What the same work costs when the locks are dropped: the host walks its stage 2 again for what was broken."""

COPIES: tuple[str, ...] = ("memcpy_fixed", "memcpy_cold_kib", "memcpy_stream_kib", "memcpy_cached_kib")
"""A copy within the guest: what the study `convert` sets beside two conversions."""

CHARGES: frozenset[str] = frozenset(
    item for table in (PARTS, AFTERWARDS) for items in table.values() for item in items
) | {
    *TRAP,
    "gup_pin_4k",
    "gup_unpin_4k",
    *COPIES,
}
"""Price items that the hooks charge, those among them that the core's profile prices included, and the study's."""
