"""`cvm calibrate`: prices from this machine's kernel.

Each measurement (`cvmcore.live.measure`) has a counterpart on the model, whose counts say which price items it is made
of. Measurements are taken in order; each gives one item, what it has of items known by then taken off.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from statistics import median

import attrs

from cvmcore.backend import Backend
from cvmcore.host import Host
from cvmcore.live.front import Server
from cvmcore.runner import load_profile_for
from cvmcore.types import PAGE_BYTES
from cvmcore.uapi import Process, Touch

PAGES = 512
LEAST_NS = 1.0
"""Of a price that the measurement leaves nothing for."""


@attrs.frozen
class Price:
    """One item of the profile."""

    item: str
    ns: float
    source: str
    confidence: str


class _Model:
    """A VM with one guest_memfd slot, and what each measurement counts on it, per unit."""

    def __init__(self, backend: Backend) -> None:
        self.host = Host(backend, load_profile_for(backend, None), nr_frames=1 << 14)
        self.process = Process(self.host)
        self.vm = self.process.create_vm()
        self.fd = self.vm.create_guest_memfd(PAGES * PAGE_BYTES, 3)
        self.vm.set_user_memory_region2(0, 4, 0, PAGES * PAGE_BYTES, 0, self.fd)
        self.vcpu = self.vm.create_vcpu()
        self.hva = self.process.mmap_gmem(self.fd, 0, PAGES * PAGE_BYTES)

    def counts(self, work: Callable[[], object], units: int) -> dict[str, float]:
        """Price items of one unit of the work."""
        before = dict(self.host.meter.counts)
        work()
        after = self.host.meter.counts
        return {item: (n - before.get(item, 0)) / units for item, n in after.items() if n > before.get(item, 0)}

    def fallocate(self, mode: int, pages: int = PAGES, at: int = 0) -> None:
        self.process.fallocate(self.fd, mode, at * PAGE_BYTES, pages * PAGE_BYTES)

    def touch(self, gfn: int, pages: int) -> None:
        self.vcpu.run(Touch(slice(gfn, gfn + pages, 1), write=False, private=False))

    def slots(self) -> None:
        self.vm.set_user_memory_region2(1, 0, 1 << 30, PAGES * PAGE_BYTES, self.hva)
        self.vm.set_user_memory_region2(1, 0, 1 << 30, 0, 0)

    def all_counts(self) -> dict[str, dict[str, float]]:
        """By measurement."""
        found = {"memslot": self.counts(self.slots, 2)}
        found["allocate"] = self.counts(lambda: self.fallocate(1), PAGES)
        found["host_touch"] = self.counts(lambda: self.process.read(self.hva, PAGES), PAGES)
        self.process.madvise_dontneed(self.hva, PAGES * PAGE_BYTES)
        found["host_refault"] = self.counts(lambda: self.process.read(self.hva, PAGES), PAGES)
        found["guest_touch"] = self.counts(lambda: self.touch(0, PAGES), PAGES)
        found["round_trip"] = self.counts(lambda: self.touch(1 << 19, 1), 1)
        self.vm.set_user_memory_region2(0, 0, 0, 0)
        found["punch_page"] = self.counts(lambda: self.fallocate(3, 1), 1)
        self.fallocate(1)
        found["punch_block"] = self.counts(lambda: self.fallocate(3), 1)
        return found


ITEMS: tuple[tuple[str, str, str], ...] = (
    ("gmem_alloc_4k", "allocate", "fallocate of 32 MiB in one call, per 4K page"),
    ("gup_4k", "host_refault", "the host's touch of a guest_memfd page that is there but unmapped"),
    ("page_clear_4k", "host_touch", "the host's first touch of an allocated guest_memfd page"),
    ("punch_hole_4k", "punch_block", "punch of 2 MiB that nobody maps, per 4K page"),
    ("punch_hole_call", "punch_page", "punch of one 4K page that nobody maps"),
    ("memslot_call", "memslot", "a memslot of 2 MiB made and deleted, half of both"),
    ("user_exit", "round_trip", "KVM_RUN to an MMIO exit and back"),
    ("fault_fixed", "guest_touch", "a ring-3 guest's first touch of a page that is allocated and cleared"),
)
"""(price item, the measurement that gives it, in words), in the order in which they are solved."""


def calibrated(server: Server, backend: Backend, times: int = 7) -> list[Price]:
    """Measure, and solve for the prices. LiveError where the kernel cannot be driven."""
    samples = server.measure(times)
    counts = _Model(backend).all_counts()
    prices = load_profile_for(backend, None).ns_by_item()
    return solved(samples, counts, dict(prices), f"Linux {platform.release()}")


def solved(
    samples: Mapping[str, list[float]], counts: Mapping[str, Mapping[str, float]], prices: dict[str, float], where: str
) -> list[Price]:
    """Prices, one after the other: what a measurement has of other items, at what they cost by then, is taken off.

    confidence: fitted where an item that is not measured here was taken off; else by how far the median lies from the
    fastest sample.
    """
    found = []
    fixed = {item for item, _, _ in ITEMS}
    for item, name, words in ITEMS:
        others = {other: n for other, n in counts[name].items() if other != item}
        times = samples[name]
        ns = (times[0] - sum(prices[other] * n for other, n in others.items())) / counts[name][item]
        less = ", ".join(f"{n:g} {other}" for other, n in sorted(others.items()))
        foreign = [other for other in others if other not in fixed]
        source = f"own measurement by cvm calibrate on {where}: {words}, fastest of {len(times)} {times[0]:.0f} ns "
        source += f"(median {median(times):.0f})" + (f", less {less}" if less else "")
        if ns < LEAST_NS:
            source += "; the others leave nothing for it"
        prices[item] = max(LEAST_NS, ns)
        spread = median(times) / max(times[0], LEAST_NS)
        confidence = "high" if spread < 1.25 else "medium" if spread < 2 else "low"
        if foreign or ns < LEAST_NS:
            confidence = "fitted"
        found.append(Price(item, round(prices[item], 1), source, confidence))
    return found


def profile_text(prices: list[Price], extends: str) -> str:
    """The profile's TOML."""
    lines = ["schema = 1", 'unit = "ns"', f'extends = "{extends}"', "", "[prices]"]
    for price in prices:
        source = price.source.replace("\\", "\\\\").replace('"', '\\"')
        lines.append(f'{price.item} = {{ ns = {price.ns:g}, source = "{source}", confidence = "{price.confidence}" }}')
    return "\n".join(lines) + "\n"
