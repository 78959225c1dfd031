"""Prices from measurements: what each is made of, and a profile that can be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from cvmcore.backends.default import DEFAULT
from cvmcore.calibrate import ITEMS, _Model, profile_text, solved
from cvmcore.cli import main
from cvmcore.live.measure import MEASUREMENTS
from cvmcore.live.probe import probe
from cvmcore.runner import load_profile_for

NO_KVM = probe().why
SAMPLES = {
    "allocate": [300.0] * 3, "host_refault": [200.0] * 3, "host_touch": [600.0, 800.0, 900.0],
    "punch_page": [800.0, 1800.0, 9000.0], "punch_block": [102400.0 + 500] * 3, "memslot": [6000.0] * 3,
    "round_trip": [9000.0] * 3, "guest_touch": [100.0] * 3,
}  # fmt: skip


def test_each_measurement_counts_what_it_is_made_of() -> None:
    counts = _Model(DEFAULT).all_counts()

    assert set(counts) == set(MEASUREMENTS) == {name for _, name, _ in ITEMS}
    assert all(counts[name][item] > 0 for item, name, _ in ITEMS)
    assert counts["host_touch"] == {"gup_4k": 1, "page_clear_4k": 1}
    assert counts["punch_block"] == {"punch_hole_call": 1, "punch_hole_4k": 512}
    assert counts["round_trip"] == {"vm_exit": 1, "user_exit": 1}


def test_prices_are_solved_in_order(tmp_path: Path) -> None:
    """What is known by then is taken off; the source says so, and the profile can be loaded."""
    counts = _Model(DEFAULT).all_counts()
    prices = dict(load_profile_for(DEFAULT, None).ns_by_item())

    found = {price.item: price for price in solved(SAMPLES, counts, dict(prices), "a test")}

    assert (found["gup_4k"].ns, found["page_clear_4k"].ns, found["punch_hole_4k"].ns) == (200, 400, 200)
    assert (found["punch_hole_call"].ns, found["user_exit"].ns) == (600, 9000 - prices["vm_exit"])
    confidences = [found[item].confidence for item in ("gup_4k", "page_clear_4k", "punch_hole_call", "user_exit")]
    assert confidences == ["high", "medium", "low", "fitted"]
    assert found["fault_fixed"].ns == 1
    assert "leave nothing for it" in found["fault_fixed"].source
    path = tmp_path / "my.toml"
    path.write_text(profile_text(list(found.values()), "default"))
    assert load_profile_for(DEFAULT, path).ns_by_item()["page_clear_4k"] == 400


def test_what_cannot_be_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["calibrate", "-o", str(tmp_path / "x")]) == 2
    assert "say --live" in capsys.readouterr().err
    assert main(["calibrate", "--live", "--backend", "swprot", "-o", str(tmp_path / "x")]) == 2
    assert "VM type 0, which backend swprot is not" in capsys.readouterr().err


@pytest.mark.skipif(bool(NO_KVM), reason=NO_KVM or "-")
def test_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my.toml"

    assert main(["calibrate", "--live", "-o", str(tmp_path / "no" / "my.toml")]) == 2  # before anything is measured
    assert "my.toml: cannot be written: No such file" in capsys.readouterr().err
    assert main(["calibrate", "--live", "-o", str(path), "--times", "2"]) == 0
    assert "gmem_alloc_4k" in capsys.readouterr().out
    arguments = ["run", "touch", "--backend", "default", "--mem", "16M", "--profile", str(path)]
    assert main(arguments) == 0
