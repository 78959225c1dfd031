"""`cvm hw`: operations of hardware by name, typed by their signatures; errors name file and line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from cvmcore import plugins
from cvmcore.cli import main
from cvmcore.errors import InputError
from cvmcore.script import play


def machine() -> Mapping[str, Callable[..., Mapping[str, Any]]]:
    kept: list[int] = []

    def add(n: int, times: int = 1, name: str = "", deep: list[list[int]] | None = None) -> dict[str, Any]:
        """Adds."""
        kept.extend([n] * times)
        return {"status": "OK", "code": 0, "sum": sum(kept), "name": name, "deep": deep}

    def fail(really: bool) -> dict[str, Any]:
        """Fails."""
        raise InputError("it cannot be")

    return {"add": add, "fail": fail}


def answers(*lines: str) -> list[dict[str, Any]]:
    return list(play(machine(), lines, "here"))


def test_state_is_kept_between_lines() -> None:
    found = answers('{"op": "add", "n": 2}', "", "# a comment", '{"op": "add", "n": 3, "times": 2, "deep": [[1]]}')

    assert [answer["sum"] for answer in found] == [2, 8]
    assert found[1] == {"op": "add", "status": "OK", "code": 0, "sum": 8, "name": "", "deep": [[1]]}


@pytest.mark.parametrize(("line", "why"), [
    ("nonsense", "this is not JSON"),
    ("[1]", "a line is a JSON object"),
    ('{"n": 1}', "a line is a JSON object"),
    ('{"op": "sub", "n": 1}', "there is no operation 'sub' here; there are add, fail"),
    ('{"op": "add"}', "add needs the argument 'n'"),
    ('{"op": "add", "n": 1, "m": 2}', "add has no argument 'm'; it takes n, times, name, deep"),
    ('{"op": "add", "n": "1"}', "'n' must be a whole number, not \"1\""),
    ('{"op": "add", "n": true}', "'n' must be a whole number, not true"),
    ('{"op": "add", "n": 1.5}', "'n' must be a whole number"),
    ('{"op": "add", "n": 1, "deep": [1]}', "'deep' must be a list, each of it a list"),
    ('{"op": "add", "n": null}', "'n' must be a whole number, not null"),
    ('{"op": "fail", "really": 1}', "'really' must be true or false"),
    ('{"op": "fail", "really": true}', "it cannot be"),
    ("[" * 100_000, "this is not JSON"),
])  # fmt: skip
def test_errors_name_the_line(line: str, why: str) -> None:
    with pytest.raises(InputError) as caught:
        answers('{"op": "add", "n": 2}', "", line)

    assert str(caught.value).startswith("here:3: ")
    assert why in str(caught.value)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def load(self) -> Any:
            return machine

    found = plugins.Found("toy", "test", "0", "", Entry())  # type: ignore[arg-type]
    monkeypatch.setattr(plugins, "installed", lambda group: {"toy": found} if group == "cvmcore.hw" else {})


@pytest.mark.usefixtures("toy")
def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """One answer a line, as they come: those before a bad line have been given."""
    script = tmp_path / "s.jsonl"
    script.write_text('{"op": "add", "n": 2}\n{"op": "add"}\n')

    assert main(["hw", "toy", str(script)]) == 2
    told = capsys.readouterr()
    assert json.loads(told.out)["sum"] == 2
    assert told.err == f"cvm: {script}:2: add needs the argument 'n'\n"

    monkeypatch.setattr("sys.stdin", io.StringIO('{"op": "add", "n": 5}\n'))
    assert main(["hw", "toy", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["sum"] == 5
    assert main(["hw", "toy"]) == 0
    assert "n: int, times: int = 1" in " ".join(capsys.readouterr().out.split())
    for arguments in (["toy", str(tmp_path / "none")], ["other"], ["toy", str(tmp_path)]):
        assert main(["hw", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1
