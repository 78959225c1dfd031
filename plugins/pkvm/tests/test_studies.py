"""The study `convert`: that tapes played against each other take as long as the model does, and what it says."""

from __future__ import annotations

import itertools
from typing import Any

import attrs
import numpy as np
import pytest

from cvmcore.backend import parse_options
from cvmcore.cost import Profile
from cvmcore.effects import Steps
from cvmcore.errors import CvmError
from cvmcore.guest import Machine
from cvmcore.host import Host
from cvmcore.pages import run
from cvmcore.plugins import load_backend
from cvmcore.runner import load_profile_for
from cvmcore.sched import Timed
from cvmcore_pkvm import studies
from cvmcore_pkvm.ops import PKVM
from cvmcore_pkvm.studies import CONVERT, SIZE_NAMES, Way, elapsed_ns, measure_way, where_cheaper


@attrs.define
class Context:
    """What the framework gives to a study, with prices that a test may change."""

    options: dict[str, Any] = attrs.field(factory=lambda: parse_options(CONVERT.options, {}, "study convert"))
    changed: dict[str, float] = attrs.field(factory=dict)
    seed: int = 0

    def profile(self, name: str) -> Profile:
        profile = load_profile_for(load_backend(name), None)
        prices = dict(profile.prices)
        for item, ns in self.changed.items():
            if item in prices:
                prices[item] = attrs.evolve(prices[item], ns=ns)
        return Profile(profile.name, prices)

    def progress(self, done: int, total: int | None, text: str) -> None:
        assert 0 <= done <= (total or 0)


@pytest.fixture(scope="module")
def small() -> studies.Measured:
    """pKVM alone, up to four vCPUs."""
    keep = studies.VCPUS, studies.OTHERS
    studies.VCPUS, studies.OTHERS = (1, 4), ()  # type: ignore[assignment]
    try:
        return studies.measure(Context())  # type: ignore[arg-type]
    finally:
        studies.VCPUS, studies.OTHERS = keep


@pytest.fixture(autouse=True)
def small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [h for h in studies.HEADLINES if h[1]["vcpus"] == 1]
    monkeypatch.setattr(studies, "HEADLINES", tuple(some))


def evaluate(measured: studies.Measured, context: Context | None = None) -> Any:
    return studies.evaluate(measured, context or Context())  # type: ignore[arg-type]


# ---- tapes --------------------------------------------------------------------------------------------------------


def in_the_model(design: str, vms: int, vcpus: int, chunk: int, times: int) -> float:
    """The same exchanges, made by the real hypervisor on the timed driver."""
    host = Host(PKVM, Context().profile("pkvm"), options={"hyp_lock": design, "batch": "512"})
    machines = [Machine(host, (vcpus + 1) * 1024 << 12, vcpus=vcpus) for _ in range(vms)]
    for machine in machines:
        machine.launch()
        for vcpu in range(vcpus):
            machine.guest.write(run(vcpu * 1024, 512), vcpu)
            machine.guest.convert(run(vcpu * 1024, 512), False, vcpu)

    def actor(machine: Machine, vcpu: int) -> Steps[None]:
        for private, call in itertools.product((True, False), range(times)):
            yield from machine.guest.convert.steps(run(vcpu * 1024 + call * chunk, chunk), private, vcpu)

    timed = Timed(host)
    timed.run((f"{n}.{vcpu}", actor(m, vcpu)) for n, m in enumerate(machines) for vcpu in range(vcpus))
    return timed.elapsed_ns


@pytest.mark.parametrize("design", studies.HYP_LOCKS)
@pytest.mark.parametrize(("vms", "vcpus", "chunk", "times"), [(1, 1, 1, 4), (1, 4, 1, 4), (2, 4, 16, 3), (2, 1, 64, 2)])
def test_tapes_take_as_long_as_the_model(
    small: studies.Measured, design: str, vms: int, vcpus: int, chunk: int, times: int
) -> None:
    """To the nanosecond, for every lock design, one or several VMs and vCPUs."""
    way = small.ways["pkvm", design, vcpus]
    context = Context()
    host, prices = Host(PKVM, context.profile("pkvm")), context.profile("pkvm").ns_by_item()

    played = elapsed_ns(host, way.tapes[chunk], times, dict(prices), vcpus, vms, 0)

    assert played == pytest.approx(in_the_model(design, vms, vcpus, chunk, times), abs=1e-6)


def test_scopes(small: studies.Measured) -> None:
    """Whose lock is whose is found by comparing tapes: the machine's, a VM's, a vCPU's range."""
    found = {
        design: [step.scope for step in small.ways["pkvm", design, 4].tapes[1][0] if step.kind == "write"]
        for design in studies.HYP_LOCKS
    }
    assert found == {"global": [0, 1], "per-vm": [1, 1], "per-range": [2, 2]}


def test_parts_of_a_conversion(small: studies.Measured) -> None:
    """A tape of 64 pages: one trap, and entries, invalidations and refills for each."""
    to_private, to_shared = small.ways["pkvm", "global", 1].tapes[64]
    count = lambda tape: {i: n for step in tape for i, n in step.counts.items()}  # noqa: E731

    trap = {"hvc": 1, "el2_dispatch": 1, "el2_pte_update": 128}
    assert count(to_private) == trap | {"tlbi_page": 64, "host_refill_4k": 64}
    assert count(to_shared) == trap


# ---- findings -----------------------------------------------------------------------------------------------------


def test_where_cheaper() -> None:
    assert where_cheaper([0.5] * 8) == "every size"
    assert where_cheaper([1] * 8) == "nowhere"
    assert where_cheaper([2, 2, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]) == "from 64K"
    assert where_cheaper([2, 0.9, 2, 2, 0.9, 0.9, 2, 2]) == "16K, 1M to 4M"


def test_the_answer_is_not_in_the_prices(small: studies.Measured) -> None:
    """Free invalidations make converting win, dear ones make copying win, at the prices of all else."""
    cheap = evaluate(small, Context(changed={"tlbi_page": 0, "tlbi_local": 0, "host_refill_4k": 0}))
    dear = evaluate(small, Context(changed={"tlbi_page": 50_000}))

    def setting(findings: Any, **wanted: Any) -> Any:
        return next(r for r in findings.rows if all(r[key] == value for key, value in wanted.items()))

    one = {"lock": "global", "batch": 512, "vcpus": 1, "vms": 1}
    assert setting(cheap, **one)["crossover"] == "every size"
    assert all(row["crossover"] == "nowhere" for row in dear.rows)
    assert cheap.verdict != dear.verdict
    assert cheap.conclusion != dear.conclusion


def test_findings(small: studies.Measured) -> None:
    """Every cell of the grid is there; batches save traps, finer locks save waiting, more CPUs cost invalidations."""
    findings = evaluate(small)
    rows = {(r["lock"], r["batch"], r["vcpus"], r["vms"]): r for r in findings.rows}
    assert len(rows) == len(findings.rows) == 3 * 3 * 2 * 2
    for row in findings.rows:
        assert {column.name for column in CONVERT.columns} <= set(row)
        assert all(row[f"x{name}"] > 0 for name in SIZE_NAMES)

    for name in SIZE_NAMES[1:]:
        assert rows["global", 512, 1, 1][f"x{name}"] < rows["global", 1, 1, 1][f"x{name}"]
        assert rows["per-range", 1, 4, 1][f"x{name}"] < rows["global", 1, 4, 1][f"x{name}"]
        assert rows["per-vm", 1, 4, 1][f"x{name}"] == rows["global", 1, 4, 1][f"x{name}"]
        assert rows["per-vm", 1, 1, 8][f"x{name}"] < rows["global", 1, 1, 8][f"x{name}"]
    flat = evaluate(small, Context(options={"tlbi": "flat", "work": 0}))
    few = next(r for r in flat.rows if (r["lock"], r["batch"], r["vcpus"], r["vms"]) == ("per-range", 1, 1, 1))
    assert few["x64M"] > rows["per-range", 1, 1, 1]["x64M"]
    text = " ".join(findings.notes)
    assert "mail 003" in text and "P3" in text and "scaled" in text
    assert any(side in findings.conclusion for side in ("side of the mail", "side of the report"))


def test_work_makes_both_sides_alike(small: studies.Measured) -> None:
    """The more the guest has to do between, the less it matters how the buffer got there."""
    busy = evaluate(small, Context(options={"tlbi": "scaled", "work": 1_000_000}))

    assert all(row["x64K"] == pytest.approx(1, abs=0.1) for row in busy.rows if row["vms"] == 1)


def test_one_exchange_is_the_formula_of_the_sheet(small: studies.Measured) -> None:
    """Alone: 2 N/b traps, 4 N entries, N invalidations, N refills (pkvm facts, section 7)."""
    context = Context(options={"tlbi": "flat", "work": 0})
    ns = context.profile("pkvm").ns_by_item()
    findings = evaluate(small, context)
    for row in findings.rows:
        if (row["vcpus"], row["vms"]) != (1, 1):
            continue
        for got, nbytes in zip(row["in_place_ns"], studies.SIZES, strict=True):
            pages = nbytes >> 12
            calls = -(-pages // row["batch"])
            traps = 2 * calls * (ns["hvc"] + ns["el2_dispatch"])
            each = 4 * ns["el2_pte_update"] + ns["tlbi_page"] + ns["host_refill_4k"]
            assert got == pytest.approx(traps + pages * each, rel=1e-9)


# ---- the others ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", studies.OTHERS)
def test_others_lose_the_data(backend: str) -> None:
    """Their conversions run through exit, attributes, zap and accept, and do not keep what the host wrote."""
    try:
        load_backend(backend)
    except CvmError as error:
        pytest.skip(str(error))

    way: Way = measure_way(Context(), backend, "rw", 1)  # type: ignore[arg-type]

    assert not way.keeps
    charged = {item for tape in way.tapes[16] for step in tape for item in step.counts}
    assert {"user_exit", "attributes_call", "fault_fixed"} <= charged


def test_missing_backends_are_named(monkeypatch: pytest.MonkeyPatch, small: studies.Measured) -> None:
    measured = studies.Measured(small.ways, {"snp": "there is no backend 'snp' here", "tdx": "nor this"})

    notes = evaluate(measured).notes

    assert "snp is left out: there is no backend 'snp' here" in notes
    assert not any("x86 rows" in note for note in notes)


def test_heat_map(small: studies.Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib.figure")
    figure = matplotlib.Figure()

    studies.draw(evaluate(small), figure)

    images = [image for axis in figure.axes for image in axis.get_images()]
    assert len(images) == 9
    assert all(np.shape(image.get_array()) == (4, 8) for image in images)
