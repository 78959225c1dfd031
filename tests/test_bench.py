"""The benchmarks themselves: every row can be measured on every backend, and the check tells slower from fair."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest

from cvmcore import bench, cli
from cvmcore.bench import ROWS, Result, Row, Size
from cvmcore.errors import InputError
from cvmcore.outfile import OutFile

ROOT = Path(__file__).parents[1]
BACKENDS = ("swprot", "sev", "snp", "tdx", "pkvm")
TINY = Size(1 / 64, 2, 1 / 16, 1, 1 / 16, 3, 256, 2, 1)


def results(*ratios: float, row: str = "random_ns") -> list[Result]:
    return [Result(ROWS[row], name, ratio * 50, 50) for name, ratio in zip(BACKENDS, ratios, strict=False)]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command measures next to nothing."""
    monkeypatch.setattr(bench, "QUICK", TINY)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_row_of_a_backend_is_measured(backend: str) -> None:
    rows = [row.name for row in ROWS.values() if row.per_backend]

    found = bench.measure(rows, [backend], TINY)

    assert [result.row.name for result in found] == rows
    assert all(result.value > 0 and result.floor > 0 and result.backend == backend for result in found)


def test_a_row_about_no_backend_is_measured_once() -> None:
    found = bench.measure(["help_ms"], ["swprot", "tdx"], TINY)

    assert [(result.row.name, result.backend) for result in found] == [("help_ms", bench.NO_BACKEND)]


def test_every_bound_of_the_table_is_on_a_row_with_its_unit_in_the_name() -> None:
    units = {"ns", "us", "ms", "mib", "x"}

    assert {name.rpartition("_")[2] for name in ROWS} == units
    assert {row for measurement in bench.MEASUREMENTS for row in measurement.rows} == set(ROWS)
    assert all(row.name in (ROOT / "docs" / "bench.md").read_text() for row in ROWS.values())


def test_progress_is_told_of_every_measurement() -> None:
    told: list[tuple[int, int | None, str]] = []

    bench.measure(["one_us", "make_ms"], ["swprot", "default"], TINY, lambda *what: told.append(what))

    assert [text for _, _, text in told] == ["one_us swprot", "one_us default", "make_ms swprot", "make_ms default"]
    assert [(done, total) for done, total, _ in told] == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_a_row_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match="row 'speed' is none of random_ns, "):
        bench.measure(["speed"], ["swprot"], TINY)


# ---- bounds and records ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "value", "met"),
    [
        (Row("r_ns", 6), 300, True),  # of the ratio
        (Row("r_ns", 6), 301, False),
        (Row("r_ns", 100, "value"), 100, True),
        (Row("r_ns", 100, "value"), 101, False),
        (Row("r_ns"), 10_000, True),  # no bound
    ],
)
def test_a_bound_is_on_the_value_or_on_the_ratio(row: Row, value: float, met: bool) -> None:
    assert Result(row, "swprot", value, 50).met is met


def test_what_is_recorded_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"

    with OutFile(path) as out:
        bench.record(out, [*results(4, 5.1234), *results(7, row="sequential_fresh_ns")], TINY)

    # What depends on the moment (fresh memory) is not recorded.
    assert bench.recorded(path, TINY) == {("random_ns", "swprot"): 4, ("random_ns", "sev"): 5.123}


def test_ratios_of_another_size_are_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    with OutFile(path) as out:
        bench.record(out, results(4), TINY)

    with pytest.raises(InputError, match="recorded with other sizes"):
        bench.recorded(path, attrs.evolve(TINY, ones=4))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"ratios": 1, "size": {}}', '{"ratios": {"random_ns": 1}}'])
def test_a_file_without_ratios_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(text)

    with pytest.raises(InputError, match=r"bench\.json holds no recorded ratios"):
        bench.recorded(path, TINY)


def test_a_fair_ratio_passes_and_is_measured_once() -> None:
    def again(row: str, backend: str) -> Result:
        raise AssertionError

    recorded = {("random_ns", "swprot"): 4.0, ("random_ns", "sev"): 4.0}

    assert bench.check(results(5.2, 3, 99), recorded, again) == []  # snp was not recorded


def test_a_ratio_that_was_too_good_fails_after_three_more_tries() -> None:
    tries = []

    def again(row: str, backend: str) -> Result:
        tries.append((row, backend))
        return results(5.5)[0]

    slower = bench.check(results(5.3), {("random_ns", "swprot"): 4.0}, again)

    assert slower == ["random_ns on swprot is 5.30 times its floor, where 4.00 times is recorded"]
    assert tries == [("random_ns", "swprot")] * 3


def test_a_noisy_row_passes_when_it_is_measured_again() -> None:
    assert bench.check(results(9), {("random_ns", "swprot"): 4.0}, lambda row, backend: results(4.5)[0]) == []


def test_the_recorded_ratios_of_the_tree_cover_every_steady_row() -> None:
    ratios = json.loads((ROOT / "tests" / "bench.json").read_text())["ratios"]

    want = {row.name: set(BACKENDS if row.per_backend else [bench.NO_BACKEND]) for row in ROWS.values()}
    assert {row: set(names) for row, names in ratios.items()} == {n: w for n, w in want.items() if ROWS[n].steady}


# ---- the command ----------------------------------------------------------------------------------------------------


def test_json_has_the_documented_keys(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--quick", "--json", "--backends", "tdx", "one_us"]) == 0

    report = json.loads(capfd.readouterr().out)
    assert list(report) == ["schema", "size", "rows"]
    assert list(report["rows"][0]) == ["row", "backend", "value", "floor", "ratio", "bound", "bound_on", "met"]
    documented = (ROOT / "docs" / "bench.md").read_text()
    assert all(f"`{key}`" in documented for key in [*report, *report["rows"][0], *report["size"]])


def test_the_table_has_a_line_a_row_and_a_column_a_backend(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--quick", "--backends", "swprot,pkvm", "one_us", "make_ms"]) == 0

    head, _, *lines = capfd.readouterr().out.splitlines()
    assert head.split() == ["row", "floor", "bound", "swprot", "pkvm"]
    assert [line.split()[0] for line in lines] == ["one_us", "make_ms"]
    assert all(line.count("x") >= 2 for line in lines)


def test_what_is_not_within_its_bound_is_marked() -> None:
    _, (line,) = bench.table(results(5.9, 6.1))

    assert line[-3:] == ["6x", "295.0 5.9x", "305.0 6.1x!"]


def test_the_command_checks_against_a_record(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    command = ["bench", "--quick", "--backends", "swprot", "one_us"]
    assert cli.main([*command, "--record", str(path)]) == 0
    fair = json.loads(path.read_text())
    fair["ratios"]["one_us"]["swprot"] *= 50
    path.write_text(json.dumps(fair))
    assert cli.main([*command, "--check", str(path)]) == 0

    fair["ratios"]["one_us"]["swprot"] = 0.001
    path.write_text(json.dumps(fair))
    capfd.readouterr()
    assert cli.main([*command, "--check", str(path)]) == cli.WRONG

    assert "one_us on swprot is" in capfd.readouterr().err


def test_a_record_that_is_not_there_is_a_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--quick", "--check", str(tmp_path / "no.json"), "one_us"]) == cli.BAD_INPUT

    assert "no.json: cannot be read: No such file" in capfd.readouterr().err
