"""docs/sources.md: nothing of the five mails is lost, and every piece of code that it names exists."""

from __future__ import annotations

import importlib
import inspect
import re
from importlib.util import find_spec
from pathlib import Path

import attrs
import pytest

DOCUMENT = Path(__file__).parents[1] / "docs" / "sources.md"
HEADER = ["what the mail has", "how it is modelled", "code"]
REFERENCE = re.compile(r"`([\w.]+):([\w.]+)`")
EXCUSE = re.compile(r"not (modelled|yet): \S.+")

# ---- what the mails have ----------------------------------------------------------------------------------------
# Titles, numbers and identifiers as the mails write them, by mail. Each must be in the first column of its table.

PINNING = """
KVM: Introduce pinning flag to hva_to_pfn*
KVM: x86/mmu: Move hugepage adjust to direct_page_fault
KVM: x86/mmu: Add hook to pin PFNs on demand in MMU
KVM: SVM: Add pinning metadata in the arch memslot
KVM: SVM: Implement demand page pinning
KVM: SEV: Carve out routine for allocation of pages
KVM: Move kvm_for_each_memslot_in_hva_range() to be used in SVM
KVM: x86/mmu: Introduce kvm_mmu_map_tdp_page() for use by SEV/TDX
KVM: SVM: Pin SEV pages in MMU during sev_launch_update_data()
changelog 1: `FOLL_LONGTERM` [David Hildenbrand]
changelog 2: `kvm_for_each_memslot_in_hva_range` [Maciej S. Szmigiero]
changelog 3: non-MMU pinned memory is kept, and freed on destruction [Peter Gonda]
changelog 4: non-MMU pinned memory moves along on intra host migration [Peter Gonda]
changelog 5: `RLIMIT_MEMLOCK` check [David Hildenbrand]
changelog 6: `pin_user_pages` once more, for long term pinning [David Hildenbrand]
changelog 7: pages are flushed before the host has them back [Mingwei Zhang]
v5.17-rc6
4 GB 6.16 / 5.71
16 GB 7.38 / 5.91
64 GB 12.17 / 6.16
128 GB 18.20 / 6.50
192 GB 24.56 / 6.80
`kvm_x86_ops`
`pin_user_pages`
reference [1]
physical address
long-term pin
arch part of the memslot
first reference
diffstat
`pfncache.c`
"""

MIRROR = """
`mmu_private_sp_cache`
`struct kvm_vcpu_arch`
`kvm_gfn_shared_mask()`
`kvm_mmu_topup_memory_cache()`
`mmu_topup_shadow_page_cache()`
`PT64_ROOT_MAX_LEVEL`
`kvm_mmu_free_memory_cache()`
`mmu_free_memory_caches()`
`kvm_mmu_alloc_page()`
`private_sp`
`struct kvm_mmu_page`
`spt`
`gfns`
`root_count`
`CONFIG_KVM_MMU_PRIVATE`
`KVM_MMU_PRIVATE_SP_ROOT`
`is_private_sp()`
`is_private_sptep()`
`kvm_mmu_private_sp()`
`kvm_mmu_init_private_sp()`
`kvm_mmu_alloc_private_sp()`
`kvm_mmu_free_private_sp()`
`tdp_mmu_free_sp()`
`tdp_mmu_init_sp()`
`role.level`
`mmu_shadow_page_cache`
`mmu_gfn_array_cache`
`mmu_page_header_cache`
`mmu_pte_list_desc_cache`
`shadow_nonpresent_value`
`kvm_zap_obsolete_pages()`
`active_mmu_pages`
`kvm_mmu_page_as_id()`
`kvm_mmu_page_ad_need_write_protect()`
`is_tdp_mmu_enabled()`
`kvm_mmu_uninit_tdp_mmu()`
`trace_kvm_mmu_get_page()`
figure: KVM page fault
figure: CPU/KVM shared PT root
figure: KVM private PT root
figure: CPU private PT root
figure: `mirror`
figure: shared guest page
expensive
a later patch introduces the hooks
shared page table
private page table
diffstat
"""

INVALIDATE = """
`struct kvm_gfn_range`
`kvm_unmap_gfn_range()`
`KVM_GFN_RANGE_FLAGS_SET_MEM_ATTR` BIT(0)
`KVM_GFN_RANGE_FLAGS_GMEM_PUNCH_HOLE` BIT(1)
`KVM_GFN_RANGE_FLAGS_GMEM_RELEASE` BIT(2)
`KVM_GFN_RANGE_FLAGS_GMEM`
`KVM_GFN_RANGE_FLAGS_SET_MEM_ATTR(attr=shared)`
decoupling
trigger: MMU notifier
trigger: the set-memory-attributes ioctl
trigger: the gmem callback
`KVM_SET_MEMORY_ATTRIBUTES`
xarray
RMP
folio
(a)
(b)
`gmem_release()`
`gmem_unbind()`
SNP hypervisor v9 series: the gmem hook
SNP hypervisor v9 series: its SEV-SNP implementation
`handle_removed_pt()`
Secure-EPT
why SET_MEM_ATTR
PUNCH_HOLE and RELEASE
`include/linux/kvm_host.h`
`virt/kvm/guest_mem.c`
`virt/kvm/kvm_main.c`
`CONFIG_KVM_GENERIC_MMU_NOTIFIER`
`kvm_async_pf_wakeup_all()`
"""

CONVERT = """
fd-based approach for supporting KVM guest private memory
shared=>private
memcpy
TLB shootdowns
lock contention and IPIs
arm64
fewer CPUs
measurements
TLBI
VM-Exits
sharding `mmu_lock`
`mmu_lock` for read
the number of exits and the locking
the host's `mmu_lock` is of little use for pKVM
synchronizes by itself
several pages in one request
tricks
fine-grain locking at EL2
"""

HUGEPAGES = """
KVM: Update lpage info when private/shared memory are mixed
KVM: TDP_MMU: Go to next level if smaller private mapping exists
KVM: TDX: Pass page level to cache flush before TDX SEAMCALL
KVM: TDX: Pass KVM page level to tdh_mem_page_add() and tdh_mem_page_aug()
KVM: TDX: Pass size to tdx_measure_page()
KVM: TDX: Pass size to reclaim_page()
KVM: TDX: Update tdx_sept_{set,drop}_private_spte() to support large page
KVM: MMU: Introduce level info in PFERR code
KVM: TDX: Pin pages via get_page() right before ADD/AUG'ed to TDs
KVM: MMU: Pass desired page level in err code for page fault handler
KVM: TDP_MMU: Split the large page when zap leaf
KVM: TDX: Split a large page when 4KB page within it converted to shared
KVM: x86: remove struct kvm_arch.tdp_max_page_level
option A
option B
option C
NX page recovery daemon
`TDH.MEM.RANGE.BLOCK`
`TDH.MEM.RANGE.UNBLOCK`
`TDH.MEM.PAGE.PROMOTE`
lpage_info
live migration
dirty logging
the EPT violation trick
procedure, 1: block
procedure, 2: TLB shoot down
procedure, 3: wait
procedure, 4: unblock
merging, 1: ensure that all sub-pages are mapped
merging, 2: TLB shoot down
merging, 3
merging, 4: flush the cache
now: private or shared is tracked per GFN
now: TDX tells the page level
now: where only some sub-pages are mapped
now: zapping a part of a large page
now: no merging
conventional EPT: THP or NX recovery zaps
conventional EPT: the next EPT violation
reason: cold SPTEs
reason: the fault path is reused
diffstat
"""

MAILS = {"000": PINNING, "001": MIRROR, "002": INVALIDATE, "003": CONVERT, "004": HUGEPAGES}
ITEMS = [(mail, item) for mail, items in MAILS.items() for item in items.strip().splitlines()]


# ---- reading the document ---------------------------------------------------------------------------------------


@attrs.frozen
class Row:
    """A row of a table: the section's number, the line, the three cells."""

    mail: str
    line: int
    what: str
    how: str
    code: str


def rows() -> list[Row]:
    """All rows of the document's tables."""
    found: list[Row] = []
    mail = ""
    for line, text in enumerate(DOCUMENT.read_text(encoding="utf-8").splitlines(), 1):
        if text.startswith("## "):
            mail = text.removeprefix("## ").partition(":")[0]
        elif text.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", text)[1:-1]]
            if cells != HEADER and not set(text) <= set("|-"):
                assert len(cells) == 3, f"sources.md:{line}: {len(cells)} cells"
                found.append(Row(mail, line, *cells))
    return found


ROWS = rows()


def find(module: str, qualname: str) -> None:
    """Import what a reference names. AttributeError or ModuleNotFoundError where there is no such thing.

    A field that exists in objects only is found in its class' annotations.
    """
    thing: object = importlib.import_module(module)
    parts = qualname.split(".")
    for i, name in enumerate(parts):
        if hasattr(thing, name):
            thing = getattr(thing, name)
        elif i == len(parts) - 1 and inspect.isclass(thing) and name in inspect.get_annotations(thing):
            return
        else:
            raise AttributeError(f"{module}:{qualname}: {'.'.join(parts[:i]) or module} has no {name}")


def incomplete(module: str) -> bool:
    """Whether a module belongs to a plugin that is not there, or has no hooks yet."""
    package = module.partition(".")[0]
    if package == "cvmcore":
        return False
    return find_spec(package) is None or (module.endswith(".ops") and find_spec(module) is None)


# ---- tests ------------------------------------------------------------------------------------------------------


def test_there_is_one_table_for_each_mail() -> None:
    assert {row.mail for row in ROWS} == MAILS.keys()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.mail}-line{row.line}")
def test_row_says_where_or_why_not(row: Row) -> None:
    """The last cell is made of references and of reasons, and nothing else; the other two say something."""
    parts = [part.strip() for part in re.split(r"; (?=not )", row.code)]
    references, excuses = [p for p in parts if not EXCUSE.fullmatch(p)], [p for p in parts if EXCUSE.fullmatch(p)]

    assert row.what
    assert row.how
    assert len(references) <= 1
    assert references or excuses
    for reference in references:
        assert all(REFERENCE.fullmatch(name) for name in reference.split(", ")), reference


@pytest.mark.parametrize("module", sorted({module for row in ROWS for module, _ in REFERENCE.findall(row.code)}))
def test_code_exists(module: str) -> None:
    """Everything that the document names in this module is there; what is not, is shown with its line."""
    named = [(row.line, qualname) for row in ROWS for m, qualname in REFERENCE.findall(row.code) if m == module]
    if incomplete(module):
        lines = ", ".join(str(line) for line, _ in named)
        pytest.skip(f"{module} is in a plugin that is not installed; not checked: sources.md lines {lines}")
    missing = []
    for line, qualname in named:
        try:
            find(module, qualname)
        except (AttributeError, ModuleNotFoundError) as error:
            missing.append(f"sources.md:{line}: {error}")

    assert missing == []


@pytest.mark.parametrize(("mail", "item"), ITEMS)
def test_nothing_is_lost(mail: str, item: str) -> None:
    """Every title, changelog item, hook, flag, helper and design statement is in the table of its mail."""
    assert [row.line for row in ROWS if row.mail == mail and item in row.what]
