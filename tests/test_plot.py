"""`compare --plot`: where the time goes, drawn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cvmcore import cli
from cvmcore.cli import running
from cvmcore.errors import InputError
from cvmcore.plot import COLOURS, OTHER, Plot, chosen
from cvmcore.plugins import load_backend
from cvmcore.runner import Report, Setup, load_workload, run

Cvm = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[1]
BACKENDS = "swprot,default"


@pytest.fixture
def cvm(capfd: pytest.CaptureFixture[str]) -> Cvm:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        out, err = capfd.readouterr()
        return code, out, err

    return call


def report(backend: str = "swprot") -> Report:
    return run(load_workload("touch"), load_backend(backend), Setup(1 << 20))


def test_what_is_drawn(cvm: Cvm, tmp_path: Path) -> None:
    """A bar for each backend with its total, the largest parts by name, each in a colour of its own, as text."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.svg"

    code, out, err = cvm("compare", "touch", "--mem", "16M", "--backends", BACKENDS, "--plot", str(path))
    texts = [element.text for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]
    fills = set(re.findall(r"fill: (#[0-9a-f]{6})", path.read_text()))
    total = re.search(r"^modelled cpu time, ms +([\d.]+) +([\d.]+)$", out, re.MULTILINE)

    assert code == 0 and not err and total is not None
    assert os.listdir(tmp_path) == ["out.svg"]
    assert {"swprot", "default", "fault_fixed", "vm_exit", "page_clear_4k"} <= set(texts)
    assert {f" {total[1]}", f" {total[2]}"} <= set(texts)
    assert any(text and text.startswith("modelled cpu time, ms") for text in texts)
    assert len(fills & {colour.lower() for colour in COLOURS}) >= 5


def test_the_same_picture_each_time(tmp_path: Path) -> None:
    """Also in another process, where hashes fall otherwise."""
    pytest.importorskip("matplotlib")
    contents = set()
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.svg"
        subprocess.run(
            [sys.executable, "-m", "cvmcore.cli", "compare", "touch", "--mem", "1M", "--backends", BACKENDS,
             "--plot", str(path)],
            check=True, capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        contents.add(path.read_bytes())

    assert len(contents) == 1


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("SVG", b"<?xml")])
def test_formats(cvm: Cvm, tmp_path: Path, ending: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"out.{ending}"

    assert cvm("compare", "touch", "--mem", "1M", "--backends", BACKENDS, "--plot", str(path))[0] == 0
    assert path.read_bytes().startswith(magic)


def test_the_longest_pieces_get_a_colour() -> None:
    """What is long in any bar, longest first; the rest is one piece."""
    one, other = report(), report("default")
    one.parts_ns = {f"item{i:02}": 100.0 + i for i in range(20)}
    other.parts_ns = {"item00": 500.0, "nothing": 0.0}

    assert chosen([one, other]) == ["item00", *(f"item{i:02}" for i in range(19, 11, -1))]
    assert len(chosen([one])) == len(COLOURS) and OTHER not in COLOURS
    assert chosen([]) == []


def test_colours_differ_for_every_eye() -> None:
    """With any kind of colour vision, neighbours in the legend differ in lightness or in what is left of hue."""
    simulations = {
        "protan": ((0.11, 0.89, 0.0), (0.11, 0.89, 0.0), (0.0, 0.0, 1.0)),
        "deutan": ((0.29, 0.71, 0.0), (0.29, 0.71, 0.0), (0.0, 0.0, 1.0)),
        "tritan": ((1.0, 0.15, -0.15), (0.0, 0.87, 0.13), (0.0, 0.87, 0.13)),
    }
    for matrix in simulations.values():
        seen = []
        for colour in (*COLOURS, OTHER):
            rgb = [(int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]
            seen.append([sum(m * c for m, c in zip(row, rgb, strict=True)) for row in matrix])
        for one, two in pairwise(seen):
            distance = sum((max(a, 0) ** 0.45 - max(b, 0) ** 0.45) ** 2 for a, b in zip(one, two, strict=True)) ** 0.5
            assert distance > 0.12


@pytest.mark.parametrize("name", ["out.gif", "out", "svg", "out.svg.gz"])
def test_another_ending(cvm: Cvm, tmp_path: Path, name: str) -> None:
    code, out, err = cvm("compare", "touch", "--plot", str(tmp_path / name))

    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "the name must end in .svg, .png or .pdf" in err


def test_without_matplotlib(cvm: Cvm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, before any run starts, and nothing is left."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(running, "run_one", lambda *_: pytest.fail("it ran"))

    code, out, err = cvm("compare", "touch", "--mem", "1M", "--plot", str(tmp_path / "out.svg"))

    assert (code, out) == (2, "")
    assert err == "cvm: --plot needs matplotlib, which is not installed: pip install 'cvmcore[plot]'\n"
    assert not os.listdir(tmp_path)


def test_a_place_that_cannot_be_written(cvm: Cvm, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    code, _, err = cvm("compare", "touch", "--mem", "1M", "--plot", str(tmp_path / "no" / "out.svg"))

    assert code == 2 and "cannot be written: No such file or directory" in err


def test_a_full_device(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = Plot(tmp_path / "out.svg")
    picture._out._file.close()
    picture._out._file = open("/dev/full", "wb")  # noqa: SIM115 - closed by the picture

    with pytest.raises(InputError, match="No space left"), picture:
        picture.draw([report()] * 30)

    assert not os.listdir(tmp_path)


def test_nothing_to_draw(cvm: Cvm, tmp_path: Path) -> None:
    """A backend that skips the workload has an empty bar; where no backend could run at all there is no picture."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.svg"
    path.write_text("old")

    assert cvm("compare", "touch", "--backends", "nowhere", "--plot", str(path))[0] == 2
    assert os.listdir(tmp_path) == ["out.svg"] and path.read_text() == "old"
    assert cvm("compare", "convert", "--backends", "default", "--plot", str(path))[0] == 0
    assert " skipped" in path.read_text()
