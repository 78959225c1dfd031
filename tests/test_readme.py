"""The README's examples run, and what it names is there."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_examples() -> None:
    pytest.importorskip("cvmcore_sev")

    failed, tried = doctest.testfile(str(README), module_relative=False)

    assert tried
    assert not failed


def test_the_demo_prints_the_table() -> None:
    """All of it but the seconds that it took here."""
    for plugin in ("cvmcore_sev", "cvmcore_tdx", "cvmcore_pkvm"):
        pytest.importorskip(plugin)
    text = README.read_text(encoding="utf-8")
    shown = text[text.index("```\ntrace\n") + len("```\n") : text.index("```\n\nThe program is")]
    command = [sys.executable, "-m", "cvmcore.cli", "compare", "trace", "--backends", "swprot,sev,snp,tdx,pkvm"]
    done = subprocess.run(command, env=os.environ | {"COLUMNS": "140"}, capture_output=True, text=True, check=True)

    assert _but_seconds(shown) == _but_seconds(done.stdout)


def _but_seconds(table: str) -> list[str]:
    return [line.rstrip() for line in table.splitlines() if not line.startswith("real seconds")]


def test_the_map_names_what_exists() -> None:
    """Each path in the table of the tree, and each link."""
    text = README.read_text(encoding="utf-8")
    tree = text[text.index("## The tree") : text.index("## The trusted hardware alone")]
    missing = []
    for cell in re.findall(r"^\| (`.*?) \|", tree, re.MULTILINE):
        names = re.findall(r"`([^`]+)`", cell)
        folder = names[0] if names[0].endswith("/") else str(Path(names[0]).parent)
        missing += [
            name
            for name in names
            if not any((place / name).exists() for place in (ROOT, ROOT / folder, ROOT / "cvmcore"))
        ]
    missing += [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not (ROOT / link).exists()]

    assert missing == []


def test_the_map_leaves_no_module_out() -> None:
    """Modules and packages of the core; those of `mem` by name."""
    text = README.read_text(encoding="utf-8")
    tree = text[text.index("## The tree") : text.index("## The trusted hardware alone")]
    core = ROOT / "cvmcore"
    wanted = {path.name for path in core.glob("*.py")} - {"__init__.py"}
    wanted |= {f"{path.parent.name}/" for path in core.glob("*/__init__.py")}
    wanted |= {path.stem for path in (core / "mem").glob("*.py")} - {"__init__"}
    named = {name.removeprefix("cvmcore/") for name in re.findall(r"`([^`]+)`", tree)}

    assert wanted - named == set()
