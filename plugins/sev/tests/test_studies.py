"""The study `pinning`: that it reproduces the table of mail 000, from what, and what it makes of it."""

from __future__ import annotations

import pytest

from cvmcore.study import StudyContext, load_study
from cvmcore_sev import studies
from cvmcore_sev.studies import CASES, DEMAND, MAIL, PUBLISHED, SIZES, UPFRONT, Cell, boot, evaluate


def context() -> StudyContext:
    return StudyContext({"guest_init": 8})


@pytest.fixture(scope="module")
def measured():
    """The mail's setting at all sizes; the other settings only where they are cheap (4 GB stands for all)."""
    cells = {}
    for case in CASES:
        for size in SIZES:
            for design in (UPFRONT, DEMAND):
                if case == MAIL or size == 4:
                    cells[case, size, design] = boot(context(), case, size, design)
                else:
                    cells[case, size, design] = cells[case, 4, design]
    return cells


def test_the_mails_table():
    assert PUBLISHED == {
        4: (6.16, 5.71), 16: (7.38, 5.91), 64: (12.17, 6.16), 128: (18.20, 6.50), 192: (24.56, 6.80),
    }  # fmt: skip


def test_every_predicted_cell_is_within_two_percent(measured):
    found = evaluate(measured, context())
    rows = [row for row in found.rows if row["case"] == MAIL]
    assert [row["gb"] for row in rows] == [4, 16, 64, 128, 192]
    assert all(abs(row["upfront_error"]) < 2 and abs(row["demand_error"]) < 2 for row in rows)
    assert [abs(row["upfront_error"]) < 1e-9 for row in rows] == [True, False, False, False, True]  # calibrated
    assert "on two cells (upfront, 4 and 192 GB)" in found.calibrated[0] and "all five of demand" in found.predicted[0]
    assert found.verdict == ("demand is faster at every size", "predictions within 5 %: True")


def test_what_is_calibrated_is_near_what_the_profile_says(measured):
    """The decomposition: 352 ns of host work for each 4K page, beside 361 for clearing and pinning 4K pages."""
    prices = context().profile("sev").ns_by_item()
    rest = {
        size: studies.work_s(measured[MAIL, size, UPFRONT], prices, studies.UPFRONT_ITEMS)
        + studies.nr_pages(size) * 8e-9
        for size in SIZES
    }
    fixed, each = studies.calibrate(rest)
    assert 5.6 < fixed < 5.8 and each * 1e9 == pytest.approx(361, rel=0.05)


def test_upfront_takes_and_pins_everything_demand_only_what_is_touched(measured):
    for size in SIZES:
        upfront, demand = measured[MAIL, size, UPFRONT], measured[MAIL, size, DEMAND]
        pages = studies.nr_pages(size)
        assert upfront.pinned_pages == pages and upfront.counts["gup_pin_2m"] == pages // 512
        assert demand.pinned_pages < pages // 4 and demand.taken_pages < pages // 4
        assert upfront.counts["page_clear_2m"] == pages // 512 > demand.counts["page_clear_2m"]


def test_eager_validation_validates_each_page_once(measured):
    eager = measured["snp, 4K pages", 4, UPFRONT]
    assert eager.counts["pvalidate_4k"] >= studies.nr_pages(4)
    assert eager.counts["pvalidate_4k"] > 5 * measured["snp, 4K pages", 4, DEMAND].counts["pvalidate_4k"]


def test_a_model_that_is_off_says_so(measured):
    broken = dict(measured)
    cell = broken[MAIL, 192, DEMAND]
    broken[MAIL, 192, DEMAND] = Cell(cell.counts | {"fault_fixed": 10**9}, cell.taken_pages, cell.pinned_pages)
    found = evaluate(broken, context())
    assert found.verdict == ("demand is faster at 4, 16, 64, 128 GB", "predictions within 5 %: False")
    assert "more than 5 %" in found.conclusion


def test_it_draws(measured):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure()
    studies.draw(evaluate(measured, context()), figure)
    assert len(figure.axes) == 2 and len(figure.axes[0].lines) == 6


def test_it_is_installed():
    assert load_study("pinning") is studies.PINNING
