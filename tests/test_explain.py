"""The life of a page: what happened to it, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvmcore import cli, explain
from cvmcore.events import Event
from cvmcore.explain import Explain, Step, page_at, place, read_log, runs_to_pages, table_of
from cvmcore.guest import Machine
from cvmcore.host import Host
from cvmcore.plugins import load_backend
from cvmcore.runner import load_profile_for
from cvmcore.tracer import Tracer

ROOT = Path(__file__).parents[1]
PACKAGES = {"sev": "cvmcore_sev", "snp": "cvmcore_sev", "tdx": "cvmcore_tdx", "pkvm": "cvmcore_pkvm"}


def machine_on(backend: str, observers: list[object], *, backing: str = "4k", pages: int = 64) -> Machine:
    """A machine that is launched, with observers."""
    if backend in PACKAGES:
        pytest.importorskip(PACKAGES[backend])
    chosen = load_backend(backend)
    host = Host(chosen, load_profile_for(chosen, None), observers=observers, backing=backing)
    machine = Machine(host, pages * 4096)
    machine.launch()
    return machine


def said(steps: list[Step], *kinds: str) -> list[str]:
    """The steps in words, further in what is within; of these kinds only, where some are given. No prices."""
    return [
        "  " * (0 if kinds else depth) + str(step) + (f", {step.was} -> {step.now}" if step.now else "")
        for outer in steps
        for depth, step in outer.flat()
        if (step.kind in kinds if kinds else step.kind != "charge")
    ]


def live(machine: Machine) -> None:
    """Touch, convert there and back, punch, touch again."""
    pages = slice(0, 8, 1)
    machine.guest.write(pages)
    machine.guest.convert(pages, False)
    machine.guest.convert(pages, True)
    machine.punch(pages)
    machine.guest.write(pages)


# ---- lives ----------------------------------------------------------------------------------------------------------

LIVES = {
    "swprot": [
        "KVM_RUN: write private",
        "  fault, write, private",
        "    frame allocated, pfn 0x4, FREE -> GMEM",
        "    content written, pfn 0x4, key 0, zeros",
        "    512G entry above it, absent -> table",
        "    1G entry above it, absent -> table",
        "    2M entry above it, absent -> table",
        "    4K entry, pfn 0x4, absent -> present|writable|dirty",
        "  content written, pfn 0x4, key 0",
        "KVM_RUN: convert to shared",
        "  exit to user space: MapGpaRange",
        "KVM_SET_MEMORY_ATTRIBUTES: shared",
        "  4K entry, pfn 0x4, present|writable|dirty -> absent",
        "  flush_tlbs",
        "  invalidation, PRIVATE mappings",
        "  attribute, private -> shared",
        "KVM_RUN: convert to private",
        "  exit to user space: MapGpaRange",
        "KVM_SET_MEMORY_ATTRIBUTES: private",
        "  invalidation, SHARED mappings",
        "  attribute, shared -> private",
        "fallocate: punch hole",
        "  invalidation, PRIVATE mappings",
        "  frame freed, pfn 0x4, GMEM -> FREE",
        "KVM_RUN: write private",
        "  fault, write, private",
        "    frame allocated, pfn 0x4, FREE -> GMEM",
        "    content written, pfn 0x4, key 0, zeros",
        "    4K entry, pfn 0x4, absent -> present|writable|dirty",
        "  content written, pfn 0x4, key 0",
    ],
    "snp": [
        "KVM_RUN: accept",
        "  fault, write, private",
        "    frame allocated, pfn 0x4, FREE -> GMEM",
        "    content written, pfn 0x4, key 0, zeros",
        "    hook gmem_prepare",
        "      vendor: RMPUPDATE",
        "    512G entry above it, absent -> table",
        "    1G entry above it, absent -> table",
        "    2M entry above it, absent -> table",
        "    4K entry, pfn 0x4, absent -> present|writable|dirty",
        "  hook guest_accept",
        "    vendor: PVALIDATE",
        "KVM_RUN: write private",
        "  hook guest_access",
        "  content written, pfn 0x4, key 1",
        "KVM_RUN: convert to shared",
        "  hook guest_convert",
        "    vendor: PVALIDATE",
        "    vendor: SNP_PSC",
        "  exit to user space: MapGpaRange",
        "KVM_SET_MEMORY_ATTRIBUTES: shared",
        "  4K entry, pfn 0x4, present|writable|dirty -> absent",
        "  flush_tlbs",
        "  invalidation, PRIVATE mappings",
        "  attribute, private -> shared",
        "KVM_RUN: convert to private",
        "  hook guest_convert",
        "    vendor: SNP_PSC",
        "  exit to user space: MapGpaRange",
        "KVM_SET_MEMORY_ATTRIBUTES: private",
        "  invalidation, SHARED mappings",
        "  attribute, shared -> private",
        "fallocate: punch hole",
        "  invalidation, PRIVATE mappings",
        "  hook gmem_invalidate",
        "    vendor: RMPUPDATE",
        "  frame freed, pfn 0x4, GMEM -> FREE",
        "KVM_RUN: accept",
        "  fault, write, private",
        "    frame allocated, pfn 0x4, FREE -> GMEM",
        "    content written, pfn 0x4, key 0, zeros",
        "    hook gmem_prepare",
        "      vendor: RMPUPDATE",
        "    4K entry, pfn 0x4, absent -> present|writable|dirty",
        "  hook guest_accept",
        "    vendor: PVALIDATE",
        "KVM_RUN: write private",
        "  hook guest_access",
        "  content written, pfn 0x4, key 1",
    ],
    "tdx": [
        "KVM_RUN: accept",
        "  hook guest_accept",
        "  fault, write, private",
        "    frame allocated, pfn 0x4, FREE -> GMEM",
        "    content written, pfn 0x4, key 0, zeros",
        "    hook link_private_spt",
        "      vendor: TDH.MEM.SEPT.ADD",
        "    512G entry above it, absent -> table",
        "    hook link_private_spt",
        "      vendor: TDH.MEM.SEPT.ADD",
        "    1G entry above it, absent -> table",
        "    hook link_private_spt",
        "      vendor: TDH.MEM.SEPT.ADD",
        "    2M entry above it, absent -> table",
        "    hook set_private_spte",
        "      vendor: TDH.MEM.PAGE.AUG",
        "    4K entry, pfn 0x4, absent -> present|writable|dirty",
        "  hook guest_accept",
        "    content written, pfn 0x4, key 65, zeros",
        "    vendor: TDG.MEM.PAGE.ACCEPT",
        "KVM_RUN: write private",
        "  hook guest_access",
        "  content written, pfn 0x4, key 65",
        "KVM_RUN: convert to shared",
        "  hook guest_convert",
        "  exit to user space: MapGpaRange",
        "KVM_SET_MEMORY_ATTRIBUTES: shared",
        "  4K entry, pfn 0x4, present|writable|dirty -> absent",
        "  hook remove_private_spte",
        "    vendor: TDH.MEM.RANGE.BLOCK",
        "    vendor: TDH.MEM.TRACK",
        "    vendor: TDH.MEM.PAGE.REMOVE",
        "    content written, pfn 0x4, key 0, zeros",
        "    vendor: TDH.PHYMEM.PAGE.WBINVD",
        "  flush_tlbs",
        "  invalidation, PRIVATE mappings",
        "  attribute, private -> shared",
        "KVM_RUN: convert to private",
        "  hook guest_convert",
        "  exit to user space: MapGpaRange",
        "KVM_SET_MEMORY_ATTRIBUTES: private",
        "  invalidation, SHARED mappings",
        "  attribute, shared -> private",
        "fallocate: punch hole",
        "  invalidation, PRIVATE mappings",
        "  frame freed, pfn 0x4, GMEM -> FREE",
        "KVM_RUN: accept",
        "  hook guest_accept",
        "  fault, write, private",
        "    frame allocated, pfn 0x4, FREE -> GMEM",
        "    content written, pfn 0x4, key 0, zeros",
        "    hook set_private_spte",
        "      vendor: TDH.MEM.PAGE.AUG",
        "    4K entry, pfn 0x4, absent -> present|writable|dirty",
        "  hook guest_accept",
        "    content written, pfn 0x4, key 65, zeros",
        "    vendor: TDG.MEM.PAGE.ACCEPT",
        "KVM_RUN: write private",
        "  hook guest_access",
        "  content written, pfn 0x4, key 65",
    ],
    "pkvm": [
        "KVM_RUN: write private",
        "  vendor: __pkvm_init_vm",
        "  vendor: __pkvm_init_vcpu",
        "  vendor: __pkvm_vcpu_load",
        "  hook guest_access",
        "  fault, write, private",
        "    frame allocated, pfn 0x4, FREE -> ANON",
        "    content written, pfn 0x4, key 0, zeros",
        "    hook pin_pfn",
        "      frame pinned, pfn 0x4, pins 0 -> pins 1",
        "    hook set_private_spte",
        "      vendor: __pkvm_host_donate_guest",
        "    4K entry, pfn 0x4, absent -> present|writable|dirty",
        "  hook guest_access",
        "  content written, pfn 0x4, key 0",
        "KVM_RUN: convert to shared",
        "  hook guest_convert",
        "    vendor: MEM_SHARE",
        "KVM_RUN: convert to private",
        "  hook guest_convert",
        "    vendor: MEM_UNSHARE",
        "KVM_RUN: write private",
        "  hook guest_access",
        "  content written, pfn 0x4, key 0",
    ],
}
"""What happens to gfn 3 in `live`, from the launch on. pKVM's guest gives nothing back: its memory has no holes."""


@pytest.mark.parametrize("backend", LIVES)
def test_a_life(backend: str) -> None:
    life = Explain(gfn=3)
    machine = machine_on(backend, [life])
    before = len(life.steps)

    live(machine)

    assert said(life.steps[before:]) == LIVES[backend]
    assert life.backend == backend and not life.remarks()


@pytest.mark.parametrize("backend", LIVES)
def test_a_log_tells_the_same(backend: str, tmp_path: Path) -> None:
    """Live, and from the lines that the tracer wrote: the same steps, states, costs."""
    life = Explain(gfn=3)
    with Tracer(tmp_path / "log.jsonl", {}) as tracer:
        live(machine_on(backend, [life, tracer]))

    (other,) = read_log(tmp_path / "log.jsonl", lambda: Explain(gfn=3), lambda done, total, text: None)

    assert table_of(other) == table_of(life)
    assert explain.to_json([other], "x", "") == explain.to_json([life], "x", "")


@pytest.mark.parametrize("backend", ["swprot", "snp", "tdx", "pkvm", "sev"])
def test_costs_are_shares_of_what_the_clock_says(backend: str) -> None:
    """All pages of the batch cost together what passed; a step costs what is charged in it, and within."""
    life = Explain(gfn=3)
    machine = machine_on(backend, [life])
    meter = machine.host.meter
    before, start = len(life.steps), meter.now_ns

    machine.guest.write(slice(0, 8, 1))

    steps = life.steps[before:]
    assert sum(step.cost_ns or 0 for step in steps) * 8 == pytest.approx(meter.now_ns - start)

    def total(step: Step) -> float:
        return sum(
            (inner.cost_ns or 0) * inner.pages if inner.kind in ("op", "charge") else total(inner)
            for inner in step.within
        )

    for step in steps:
        assert total(step) == pytest.approx((step.cost_ns or 0) * step.pages)


def test_a_frame() -> None:
    """The other way round: who used the frame."""
    life = Explain(pfn=4)
    machine = machine_on("swprot", [life])

    live(machine)

    assert said(life.steps, "frames") == [
        "frame allocated, pfn 0x4, FREE -> GMEM", "frame freed, pfn 0x4, GMEM -> FREE",
        "frame allocated, pfn 0x4, FREE -> GMEM",
    ]  # fmt: skip
    assert said(life.steps, "entry")[:2] == [
        "4K entry, pfn 0x4, absent -> present|writable|dirty", "4K entry, pfn 0x4, present|writable|dirty -> absent",
    ]  # fmt: skip
    assert {step.details["gfn"] for outer in life.steps for _, step in outer.flat() if step.kind == "entry"} == {3}
    assert "KVM_RUN: write private" in said(life.steps, "call")


def test_levels_change() -> None:
    """Mapped large, split for dirty logging, written small, large again."""
    from cvmcore.types import KVM_MEM_LOG_DIRTY_PAGES

    life = Explain(gfn=0x205)
    machine = machine_on("sev", [life], backing="2m", pages=1024)
    region = machine.regions[0]

    def set_flags(flags: int) -> None:
        machine.vm.set_user_memory_region2(0, flags, 0, 1024 * 4096, region.hva)

    machine.guest.write(slice(0, 1024, 1))
    set_flags(KVM_MEM_LOG_DIRTY_PAGES)
    machine.guest.write(slice(0x205, 0x206, 1))
    set_flags(0)
    machine.guest.read(slice(0, 1024, 1))

    assert [line for line in said(life.steps, "entry") if "above" not in line] == [
        "2M entry, pfn 0x405, absent -> present|writable|dirty",
        "2M entry, present|writable|dirty -> table",
        "4K entry, pfn 0x405, absent -> present|writable|dirty",
        "4K entry, pfn 0x405, present|writable|dirty -> present",
        "4K entry, pfn 0x405, present -> present|writable|dirty",
        "4K entry, pfn 0x405, present|writable|dirty -> absent",
        "2M entry, table -> present|writable",
    ]
    assert said(life.steps, "frames")[1:] == [
        "frame pinned, pfn 0x405, pins 0 -> pins 1", "frame pinned, pfn 0x405, pins 1 -> pins 2",
    ]  # fmt: skip


def test_what_the_vmm_does_to_shared_memory() -> None:
    """The page's other frame is found when the VMM touches it first, and followed until it is freed."""
    life = Explain(gfn=3)
    machine = machine_on("swprot", [life])
    machine.guest.convert(slice(0, 8, 1), False)
    before = len(life.steps)

    machine.process.write(machine.regions[0].hva, 7, 8)
    machine.guest.read(slice(0, 8, 1), private=False)
    machine.discard_shared(slice(0, 8, 1))

    assert said(life.steps[before:]) == [
        "VMM write",
        "  frame allocated, pfn 0x4, FREE -> ANON",
        "  content written, pfn 0x4, key 0, zeros",
        "  its frame, pfn 0x4",
        "  content written, pfn 0x4, key 0",
        "KVM_RUN: read shared",
        "  fault, read, shared",
        "    512G entry above it, absent -> table",
        "    1G entry above it, absent -> table",
        "    2M entry above it, absent -> table",
        "    4K entry, pfn 0x4, absent -> present|writable",
        "  content read, pfn 0x4, key 0",
        "madvise",
        "  4K entry, pfn 0x4, present|writable -> absent",
        "  flush_tlbs",
        "  invalidation, SHARED mappings",
        "  frame freed, pfn 0x4, ANON -> FREE",
    ]


def test_errors_are_told() -> None:
    from cvmcore.errors import UapiError

    life = Explain(gfn=3)
    machine = machine_on("default", [life])
    with pytest.raises(UapiError):
        machine.vm.set_memory_attributes(0, 8 * 4096, 0)

    assert "ENOTTY" in life.steps[-1].details["error"]


def test_a_neighbour_is_not_in_it() -> None:
    """Nothing that happened to other pages only; the tables above are those of both."""
    life = Explain(gfn=9)
    machine = machine_on("tdx", [life])
    before = len(life.steps)

    live(machine)

    assert said(life.steps[before:]) == [
        "KVM_RUN: accept",
        "  fault, write, private",
        "    hook link_private_spt",
        "      vendor: TDH.MEM.SEPT.ADD",
        "    512G entry above it, absent -> table",
        "    hook link_private_spt",
        "      vendor: TDH.MEM.SEPT.ADD",
        "    1G entry above it, absent -> table",
        "    hook link_private_spt",
        "      vendor: TDH.MEM.SEPT.ADD",
        "    2M entry above it, absent -> table",
    ]


def test_a_long_life_keeps_its_beginning_and_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "KEEP", 5)
    life = Explain(gfn=3)
    machine = machine_on("swprot", [life])
    for _ in range(20):
        machine.guest.read(slice(3, 4, 1))

    assert len(life.steps) == 10
    assert life.left_out == 20 + 2 - 10  # the memslot, the attribute
    assert life.remarks() == ["12 steps between the first 5 and the last 5 are left out"]
    assert life.steps[-1].t_ns > life.steps[4].t_ns


# ---- page numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pages", "page", "level", "at"),
    [
        (slice(5, 9, 1), 7, 0, (2, 0)),
        (slice(5, 9, 1), 9, 0, None),
        (slice(0, 2048, 512), 1029, 0, (2, 5)),
        (slice(0, 512, 512), 700, 2, None),
        (slice(512, 513, 1), 700, 2, (0, 188)),
        (np.array([1, 5, 9]), 5, 1, (1, 0)),
        (np.array([0, 1024]), 1030, 2, (1, 6)),
        (np.array([9, 5, 1]), 1, 0, (2, 0)),
        (runs_to_pages([[1, 2], [10, 3], [512, 2, 512]]), 11, 0, (3, 0)),
        (runs_to_pages([[1, 2], [10, 3], [512, 2, 512]]), 1027, 0, (6, 3)),
        (runs_to_pages([[1, 2]]), 3, 0, None),
        (slice(0, 1 << 27, 1 << 27), 12345, 4, (0, 12345)),
    ],
)
def test_where_a_page_stands(pages: Any, page: int, level: int, at: tuple[int, int] | None) -> None:
    assert place(pages, page, level) == at
    if at is not None:
        assert page_at(pages, *at) == page
    assert page_at(pages, 99, 0) is None


# ---- the command line -----------------------------------------------------------------------------------------------

Cvm = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cvm(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cvm:
    monkeypatch.setenv("COLUMNS", "140")

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        out, err = capfd.readouterr()
        return code, out, err

    return call


TOUCH = ("explain", "touch", "--mem", "1M")


def test_explain(cvm: Cvm) -> None:
    code, out, err = cvm(*TOUCH, "--gfn", "0x10")

    assert code == 0 and not err
    assert "gfn 0x10 in touch on swprot" in out
    for line in (
        r"^workload:", r"vcpu0 +KVM_RUN: write private +256 +2,950", r"4K entry, pfn 0x11 +absent -> present\|writable",
        r"^ +gmem_alloc_4k 330, page_clear_4k 299, *$", r"VMM +frame freed, pfn 0x11 +GMEM -> FREE",
    ):  # fmt: skip
        assert re.search(line, out, re.MULTILINE), line


def test_the_readme_shows_what_is_printed(cvm: Cvm) -> None:
    pytest.importorskip("cvmcore_tdx")
    block = (ROOT / "README.md").read_text(encoding="utf-8").partition("$ cvm explain ")[2].partition("```")[0]
    command, _, shown = block.partition("\n")

    printed = [line.rstrip() for line in cvm("explain", *command.split())[1].splitlines()]

    for part in shown.strip().split("\n...\n"):
        lines = part.removesuffix("\n...").splitlines()
        start = printed.index(lines[0])
        assert printed[start : start + len(lines)] == lines


@pytest.mark.parametrize(("one", "other"), [("16", "0x10"), ("0X1f", "31"), ("010", "10")])
def test_numbers_are_decimal_or_hexadecimal(cvm: Cvm, one: str, other: str) -> None:
    assert cvm(*TOUCH, "--gfn", one) == cvm(*TOUCH, "--gfn", other)


def test_a_page_that_is_never_touched(cvm: Cvm) -> None:
    """One sentence, and no error; of a page that the guest does not have, another one."""
    out = cvm(*TOUCH, "-w", "share=10", "--gfn", "200")[1]
    assert out == "gfn 0xc8 in touch on swprot: nothing ever touches it\n"
    beyond = "cvm: --gfn 5000 is beyond the guest's memory, which ends at gfn 0x100\n"
    assert cvm(*TOUCH, "--gfn", "5000") == (2, "", beyond)
    assert cvm(*TOUCH, "--pfn", "0x4000000") == (0, "pfn 0x4000000 in touch on swprot: nothing ever touches it\n", "")


def test_a_workload_that_cannot_run(cvm: Cvm) -> None:
    code, out, _ = cvm("explain", "convert", "--backend", "default", "--gfn", "3")

    assert code == 0 and "gfn 0x3 in convert on default: skipped, it has no private memory" in out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("touch",), "give either --gfn or --pfn"),
        (("touch", "--gfn", "1", "--pfn", "1"), "give either --gfn or --pfn"),
        (("--gfn", "1"), "a workload to run, or a log"),
        (("touch", "--gfn", "1", "--from", "x.jsonl"), "a workload to run, or a log"),
        (("touch", "--gfn", "ten"), "'ten' is no page number"),
        (("touch", "--gfn", "-1"), "'-1' is no page number"),
        (("touch", "--gfn", "1.5"), "'1.5' is no page number"),
        (("touch", "--gfn", ""), "'' is no page number"),
        (("touch", "--gfn", "0x"), "'0x' is no page number"),
        (("touch", "--gfn", str(1 << 52)), "below 2**52"),
        (("touch", "--gfn", "9" * 5000), "below 2**52"),
        (("touch", "--pfn", "\u0663"), "is no page number"),
        (("nothing", "--gfn", "1"), "nothing"),
        (("touch", "--gfn", "1", "--backend", "nothing"), "nothing"),
        (("--from", "/nowhere.jsonl", "--gfn", "1"), "cannot be read: No such file or directory"),
        (("--from", "/", "--gfn", "1"), "cannot be read: Is a directory"),
    ],
)
def test_bad_input(cvm: Cvm, arguments: tuple[str, ...], why: str) -> None:
    code, out, err = cvm("explain", *arguments)

    assert (code, out) == (2, "")
    assert err.startswith("cvm: ") and err.count("\n") == 1 and why in err


EVENT = (
    '{"backend": "x", "t_ns": 0, "actor": "a", "kind": "memslot", "name": "n", "phase": "at", "vm": 0, "n": 1, '
    '"gfns": [[1, 1]]}'
)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], None),
        (['{"cvmcore_events": 1}'], None),
        (["no json"], ":1: this is no JSON object"),
        (["[]"], ":1: this is no JSON object"),
        (['{"t_ns": 1}'], "is no event log of cvmcore"),
        (['{"cvmcore_events": 1}', "{}"], ":2: this is no event"),
        (['{"cvmcore_events": 1}', '{"backend": "x", "t_ns": 0, "kind": "call",'], ":2: this is no JSON object"),
        (['{"cvmcore_events": 1}', EVENT, EVENT.replace("[1, 1]", "[1]")], ":3: this is no event"),
        (['{"cvmcore_events": 1}', EVENT, EVENT.replace('"vm": 0, ', "")], ":3: this is no event"),
    ],
)
def test_a_log_that_is_none(cvm: Cvm, tmp_path: Path, lines: list[str], why: str | None) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))

    code, out, err = cvm("explain", "--from", str(path), "--gfn", "1")

    assert (code, out) == (2, "") and err.count("\n") == 1
    assert (why or "has no run in it") in err


def test_a_log_of_several_backends(cvm: Cvm, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert cvm("compare", "touch", "--mem", "1M", "--backends", "swprot,default", "--trace", str(path))[0] == 0

    code, out, _ = cvm("explain", "--from", str(path), "--gfn", "3")
    said_ = " ".join(out.split())
    assert code == 0 and f"gfn 0x3 in {path} on swprot" in said_ and f"gfn 0x3 in {path} on default" in said_
    code, out, _ = cvm("explain", "--from", str(path), "--gfn", "3", "--backend", "default")
    assert code == 0 and "swprot" not in out
    code, _, err = cvm("explain", "--from", str(path), "--gfn", "3", "--backend", "other")
    assert code == 2 and "has no run on other" in err


def test_a_log_that_does_not_show_all(cvm: Cvm, tmp_path: Path) -> None:
    """Scattered batches leave pages out: that is said."""
    path = tmp_path / "log.jsonl"
    assert cvm("run", "touch", "--mem", "4M", "-w", "order=random", "--trace", str(path))[0] == 0

    code, out, _ = cvm("explain", "--from", str(path), "--gfn", "3")

    assert code == 0 and "events of the log do not show all of their pages" in " ".join(out.split())


def test_json_has_the_documented_keys(cvm: Cvm) -> None:
    """docs/output.md names every key, and none that is not there."""
    code, out, _ = cvm(*TOUCH, "--gfn", "3", "--json")
    value = json.loads(out)
    section = (ROOT / "docs" / "output.md").read_text().partition("## Lives")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))
    rows = {key for row in re.findall(r"^\|(.*?)\|", section, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)}
    (life,) = value["lives"]

    assert code == 0 and documented
    assert rows == set(value) | set(life) | set(life["steps"][0])
    assert (value["schema"], life["backend"], life["gfn"], life["pfn"]) == (1, "swprot", 3, None)
    assert all(step["depth"] >= 0 and isinstance(step["text"], str) for step in life["steps"])
    assert not json.loads(cvm(*TOUCH, "-w", "share=10", "--gfn", "200", "--json")[1])["lives"][0]["touched"]


def test_a_life_of_a_run_that_goes_wrong(cvm: Cvm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import distributions

    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    distributions.workload(folder, "faulty", "context.machine.launch()\ncontext.fail('the moon is not a cheese')")

    code, _, err = cvm("explain", "faulty", "--gfn", "3")

    assert (code, err) == (1, "cvm: swprot: the moon is not a cheese\n")


def test_events_of_another_vm_are_not_ours() -> None:
    """Nor is what they cost."""
    life = Explain(gfn=3, vm=1)
    pages = slice(0, 8, 1)
    life.on_event(Event(0, "main", "memslot", "create", vm=0, gfns=pages))
    life.on_event(Event(0, "main", "memslot", "create", vm=1, gfns=pages))
    life.on_detail(Event(0, "main", "call", "ours", "begin", vm=1, gfns=pages, n=8))
    for vm in (0, 1):
        life.on_event(Event(0, "main", "hook", "hook", "begin", vm=vm, gfns=pages, n=8))
        life.on_detail(Event(80, "main", "op", "op", n=8, info={"ns": 80, "item": "x"}))
        life.on_event(Event(80, "main", "hook", "hook", "end", vm=vm, info={"ns": 80}))
    life.on_detail(Event(160, "main", "call", "ours", "end", vm=1, info={"ns": 160}))
    life.on_event(Event(0, "main", "hook", "never begun", "end", vm=1, info={"ns": 80}))

    assert said(life.steps) == ["memslot create", "ours", "  hook hook", "    vendor: op"]
    assert [step.cost_ns for step in life.steps] == [None, 20]


def test_memory_that_is_allocated_before_it_is_touched() -> None:
    """fallocate: the frame is known from then on."""
    life = Explain(gfn=3)
    machine = machine_on("swprot", [life])
    before = len(life.steps)

    machine.process.fallocate(machine.regions[0].gmem_fd, 1, 0, 64 * 4096)
    machine.guest.write(slice(0, 8, 1))

    assert [line for line in said(life.steps[before:]) if "above" not in line] == [
        "fallocate: allocate",
        "  frame allocated, pfn 0x4, FREE -> GMEM",
        "  its frame, pfn 0x4",
        "KVM_RUN: write private",
        "  fault, write, private",
        "    content written, pfn 0x4, key 0, zeros",
        "    4K entry, pfn 0x4, absent -> present|writable|dirty",
        "  content written, pfn 0x4, key 0",
    ]
