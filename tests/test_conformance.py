"""The shipped backends conform, and the suite says what it skips and what fails."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import attrs
import pytest

from cvmcore import plugins
from cvmcore.backend import Backend
from cvmcore.backends.swprot import SWPROT, SwProt
from cvmcore.cli import main
from cvmcore.errors import UapiError
from cvmcore.hookspecs import HOOKS, hookimpl
from cvmcore.pages import each
from cvmcore.testing.conformance import CHECKS, Bench, Setting, conformance, run_check, settings_of
from cvmcore.testing.machine import run_machine, uapi_machine
from cvmcore.testing.recorder import Recorder, recording
from cvmcore.types import Capabilities, Fatal, InstallResult, Stopped

test_default = conformance("default")
test_swprot = conformance("swprot")


class ForgetsPages(SwProt):
    """Says that its private pages survive whatever becomes of them, and refuses every tenth."""

    @hookimpl
    def gmem_prepare(self, gfns: Any) -> InstallResult:
        return Stopped(0, Fatal(5)) if 9 in range(*gfns.indices(99)) else None


def broken() -> Backend:
    return attrs.evolve(SWPROT, name="broken", vendor="broken", make=ForgetsPages)


class ClaimsPins(SwProt):
    """Says that it pins pages, and has no hook that does."""

    @hookimpl
    def capabilities(self, vm_type: str, options: Any) -> Capabilities:
        return attrs.evolve(super().capabilities(vm_type, options), needs_pin=True)


def install(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command line find a backend, beside those that are installed, for the time of a test."""

    class Entry:
        def load(self) -> Backend:
            return backend

    found = plugins.Found(backend.name, "test", "0", "", Entry())  # type: ignore[arg-type]
    real = plugins.installed
    monkeypatch.setattr(
        plugins, "installed", lambda group: real(group) | ({backend.name: found} if group == plugins.GROUP else {})
    )


def test_a_broken_backend_fails() -> None:
    """What it does wrong is told in a line."""
    check = next(c for c in CHECKS if c.name == "content.touch")

    outcome = run_check(check, broken(), Setting())

    assert outcome.status == "failed"
    assert "fails for ever" in outcome.why
    assert "\n" not in outcome.why


def test_capabilities_are_the_only_reason_to_skip() -> None:
    """Every check that is skipped names the capability that is missing."""
    for check in CHECKS:
        if not check.needs(Capabilities()):
            outcome = run_check(check, attrs.evolve(SWPROT, make=Bare), Setting())
            assert (outcome.status, outcome.why) == ("skipped", f"needs {check.needs.name}")


def test_a_check_of_a_hook_that_is_left_out_is_listed() -> None:
    """Not told as passed: what no capability tells of is skipped by the hook's name."""
    about = {check.name: check for check in CHECKS if check.hook}
    assert about.keys() == {"hooks.regions", "hooks.prepare_again"}

    for check in about.values():
        assert check.hook in HOOKS
        outcome = run_check(check, SWPROT, Setting())
        assert (outcome.status, outcome.why) == ("skipped", f"needs the hook {check.hook}")


class Bare:
    """A backend with no capability at all."""

    @hookimpl
    def capabilities(self) -> Capabilities:
        return Capabilities()


def test_every_check_says_what_it_asks() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert all(check.text.endswith((".", "?")) for check in CHECKS)


def test_settings_cover_every_choice_of_every_option() -> None:
    assert settings_of(SWPROT) == [Setting("4k"), Setting("2m")]


def test_a_failing_run_of_the_machine_can_be_played_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The calls that lead to a failure are a script that `cvm uapi` understands, and that ends in the same call."""
    script: list[str] = []

    with pytest.raises(Exception):  # noqa: B017
        run_machine(broken(), examples=60, steps=20, script=script, shrink=False)

    assert script[0].startswith("# cvm uapi")
    path = tmp_path / "failed.jsonl"
    path.write_text("\n".join(script), encoding="utf-8")
    assert main(["uapi", str(path), "--backend", "swprot", "--check"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == sum(not line.startswith("#") for line in script)


def test_a_check_that_fails_can_be_played_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the random calls alone: `--script` has those of any check, up to the one that failed."""
    install(broken(), monkeypatch)
    path = tmp_path / "failed.jsonl"

    assert main(["check", "broken", "-k", "content.touch", "-x", "--script", str(path)]) == 1

    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# cvm uapi THIS --backend broken --backing 4k --check"
    capsys.readouterr()
    assert main(["uapi", str(path), "--backend", "swprot", "--check"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == len(lines) - 1
    assert all(answer["status"] == "OK" for answer in answers)
    assert answers[-1]["op"] == "guest_read"


@pytest.mark.parametrize("name", ["life.nothing", "life.two", "content.memslot_order", "hooks.batch"])
def test_calls_of_several_processes_and_machines_can_be_played_again(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Addresses and descriptors are named as they were in the process at hand, though others had the same ones."""
    recorder, one = Recorder("swprot", "4k", {}), next(check for check in CHECKS if check.name == name)

    with recording(recorder):
        one.run(Bench(SWPROT, Setting("4k")))

    path = tmp_path / "calls.jsonl"
    path.write_text("\n".join(recorder.lines), encoding="utf-8")
    assert main(["uapi", str(path), "--backend", "swprot", "--check"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == sum(not line.startswith("#") for line in recorder.lines)


def test_a_check_without_calls_writes_no_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(attrs.evolve(broken(), make=ClaimsPins), monkeypatch)
    path = tmp_path / "failed.jsonl"

    assert main(["check", "broken", "-k", "declared", "--script", str(path)]) == 1

    assert "failed.jsonl is not written: no check that failed does so by UAPI calls alone" in capsys.readouterr().err
    assert not path.exists()


class LosesKeys(SwProt):
    """A key is freed with the VM, unless pages of the VM are still there: then nobody thinks of it again."""

    def __init__(self) -> None:
        self.keys = set(range(1, 100))
        self.of_frame: dict[int, int] = {}

    @hookimpl
    def vm_init(self, vm: Any) -> None:
        if not self.keys:
            raise UapiError(errno.ENOSPC, "KVM_CREATE_VM", "no key is left")
        vm.arch = self.keys.pop()

    @hookimpl
    def gmem_prepare(self, vm: Any, pfns: Any) -> None:
        self.of_frame.update(dict.fromkeys(each(pfns), vm.arch))

    @hookimpl
    def gmem_invalidate(self, pfns: Any) -> Any:
        for pfn in each(pfns):
            self.of_frame.pop(pfn, None)
        return pfns

    @hookimpl
    def vm_destroy(self, vm: Any) -> None:
        if vm.arch not in self.of_frame.values():
            self.keys.add(vm.arch)


def test_a_key_that_is_lost_where_the_vm_goes_before_its_pages() -> None:
    """VMs that come and go for ever have used memory: files outlive the VM."""
    check = next(c for c in CHECKS if c.name == "life.again")

    outcome = run_check(check, attrs.evolve(SWPROT, name="keys", vendor="keys", make=LosesKeys), Setting())

    assert (outcome.status, outcome.why) == ("failed", "UapiError: KVM_CREATE_VM: -ENOSPC: no key is left")


def test_hooks_that_the_machine_lets_fail_are_lines_of_its_script() -> None:
    """Armed, taken back where it did not strike, and not taken back twice."""
    machine = uapi_machine(SWPROT)()
    told = len(machine.recorder.lines)
    for hook in ("memslot_prepare", "", "", "pin_pfn"):
        machine.aim(hook)

    assert [json.loads(line) for line in machine.recorder.lines[told:]] == [
        {"op": "fail_next", "hook": "memslot_prepare", "error": "ENOMEM"},
        {"op": "fail_next", "hook": ""},
        {"op": "fail_next", "hook": "pin_pfn"},
    ]


def test_check_command(capsys: pytest.CaptureFixture[str]) -> None:
    """`cvm check` prints a line for each check, what was skipped and why; --json has every outcome."""
    assert main(["check", "default", "-k", "declared", "-k", "content.punch"]) == 0
    out = capsys.readouterr().out
    assert "skipped content.punch: needs private_by_attribute, gmem_backed" in out
    assert "1 passed, 0 failed" in out

    assert main(["check", "swprot", "-k", "content.touch", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == 0
    assert [row["setting"] for row in found["checks"]] == ["4k", "2m"]

    assert main(["check", "swprot", "-k", "nonsense"]) == 2
