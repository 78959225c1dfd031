"""What the documents say is run; the API's pages are built."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from cvmcore.hookdocs import capability_rows
from cvmcore.types import Capabilities

ROOT = Path(__file__).parents[1]


def test_examples_of_extending() -> None:
    failed, tried = doctest.testfile(str(ROOT / "docs" / "extending.md"), module_relative=False)

    assert tried > 20
    assert not failed


@pytest.mark.parametrize("document", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)

    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_every_capability_is_explained() -> None:
    rows = {name: meaning for name, _, meaning, _ in capability_rows()}

    assert set(rows) == {field.name for field in attrs.fields(Capabilities)}
    assert [name for name, meaning in rows.items() if not meaning] == []


def test_pages_of_the_api(tmp_path: Path) -> None:
    """`make docs`, for the modules of the contract that are read most."""
    pytest.importorskip("pdoc", reason="the extra dev has it")
    modules = ["cvmcore.hookspecs", "cvmcore.backend", "cvmcore.study"]
    subprocess.run([sys.executable, "-m", "pdoc", "-o", str(tmp_path), *modules], check=True, capture_output=True)

    assert "gmem_prepare" in (tmp_path / "cvmcore" / "hookspecs.html").read_text(encoding="utf-8")
    assert (tmp_path / "cvmcore" / "study.html").exists()
