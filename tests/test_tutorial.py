"""docs/tutorial.md is done step by step, and what `cvm new-backend` writes works."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cvmcore.cli import main
from cvmcore.errors import InputError
from cvmcore.newbackend import files, write

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
AS_FOUND = """
from hypothesis import Phase, settings

settings.register_profile("as-found", phases=[Phase.generate], derandomize=True, database=None)
settings.load_profile("as-found")
"""
"""Failures are shown as they are found: making them small takes minutes."""
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def environment(folder: Path) -> dict[str, str]:
    """A shell where the plugin in `folder` is installed: its metadata by pip, its modules as they stand there."""
    path = [str(folder / "cvmcore-ledger"), str(folder / "site"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "140",
    }


def install(folder: Path) -> None:
    """`pip install` of the plugin without looking for anything elsewhere."""
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation",
         "--disable-pip-version-check", "--target", str(folder / "site"), str(folder / "cvmcore-ledger")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip


def commands(text: str) -> Iterator[tuple[str, str]]:
    """(command, output) of each `$ ...` in a block."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def check(command: str, want: str, folder: Path) -> None:
    if command.startswith("pip install"):
        install(folder)
        return
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment(folder), capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert not want or doctest.OutputChecker().check_output(want, said, FLAGS), f"{command} printed\n{said}"


def examples(text: str, folder: Path) -> None:
    """Run a block of `>>>` with the plugin in the path."""
    (folder / "examples.txt").write_text(text)
    subprocess.run(
        [sys.executable, "-m", "doctest", "examples.txt"], cwd=folder, env=environment(folder), check=True
    )


def test_every_step_does_what_the_tutorial_says(tmp_path: Path) -> None:
    steps = BLOCK.findall(TUTORIAL.read_text(encoding="utf-8"))
    assert len(steps) > 8
    for kind, text in steps:
        if kind == "sh":
            for command, want in commands(text):
                check(command, want, tmp_path)
        elif text.startswith(">>> "):
            examples(text, tmp_path)
        else:
            title, _, body = text.partition("\n")
            path = tmp_path / "cvmcore-ledger" / title.removeprefix("# ")
            assert path.exists() or path.name == "test_refusals.py", f"{path}: `cvm new-backend` did not write it"
            path.write_text(body)


def test_a_broken_backend_is_noticed(tmp_path: Path) -> None:
    """The tutorial's end: without RELEASE, an invariant fails, and the calls that lead there can be made again."""
    write("ledger", tmp_path)
    install(tmp_path)
    for _, text in BLOCK.findall(TUTORIAL.read_text(encoding="utf-8")):
        if text.startswith("# "):
            title, _, body = text.partition("\n")
            body = body.replace("        host.hw.release(owned)\n", "")
            (tmp_path / "cvmcore-ledger" / title.removeprefix("# ")).write_text(body)

    (tmp_path / "cvmcore-ledger" / "conftest.py").write_text(AS_FOUND)

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_conformance.py"],
        cwd=tmp_path / "cvmcore-ledger", env=environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 1
    assert "pfn" in done.stdout

    done = subprocess.run(
        ["bash", "-c", "cvm check ledger -x --script bad.jsonl; cvm uapi bad.jsonl --backend ledger --check"],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "FAILED" in done.stdout
    calls = sum(not line.startswith("#") for line in (tmp_path / "bad.jsonl").read_text().splitlines())
    assert sum(line.startswith('{"line"') for line in done.stdout.splitlines()) == calls, done.stderr


@pytest.mark.parametrize("tool", [["ruff", "check", "--isolated", "--select", "E,F,I,UP,B"], ["mypy", "--strict"]])
def test_what_is_written_is_clean(tmp_path: Path, tool: list[str]) -> None:
    """Lint and types of the templates, for a name with a hyphen."""
    folder = write("my-vendor", tmp_path)
    source = ["cvmcore_my_vendor"] if tool[0] == "mypy" else ["--line-length", "120", "."]
    done = subprocess.run(
        [sys.executable, "-m", *tool, *source], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_same_files_as_the_vendors_have() -> None:
    standard = {"__init__.py", "ops.py", "hw.py", "launch.py", "cost.py", "errors.py", "py.typed"}
    made = {path.name for path in files("ledger") if path.parts[0] == "cvmcore_ledger"}
    assert standard < made
    assert any("FILL IN" in text for text in files("ledger").values())


@pytest.mark.parametrize("name", ["", "Ledger", "9lives", "a_b", "a--b", "x" * 41, "../up", "swprot"])
def test_names_that_cannot_be(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        write(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-backend", "ledger", "--in", str(tmp_path)]) == 0
    assert main(["new-backend", "ledger", "--in", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["new-backend", "other", "--in", str(tmp_path / "nowhere")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cvmcore-ledger"]
