"""The command `cvm`, end to end."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import distributions
import pytest

from cvmcore import __version__, cli
from cvmcore.backend import GROUP
from cvmcore.cli import COMMANDS
from cvmcore.cli.arguments import parse_size
from cvmcore.cli.output import say
from cvmcore.hookspecs import HOOKS
from cvmcore.plugins import installed, load_backend
from cvmcore.progress import Bar
from cvmcore.report import shown
from cvmcore.runner import Setup, load_workload, run

ROOT = Path(__file__).parents[1]
Cvm = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cvm(capfd: pytest.CaptureFixture[str]) -> Cvm:
    """Runs the command line: exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for distributions that count as installed. Their modules are forgotten after the test."""
    before = set(sys.modules)
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in set(sys.modules) - before:
        if not name.startswith("cvmcore"):
            del sys.modules[name]


def python(code: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout


# ---- imports --------------------------------------------------------------------------------------------------------


def test_help_imports_neither_numpy_nor_a_plugin() -> None:
    loaded = python(
        "import sys\nfrom cvmcore import cli\ncli.main(['--help'])\ncli.main(['run', '--help'])\n"
        "print('LOADED', *sys.modules)"
    ).partition("LOADED")[2]

    assert "typer" in loaded
    assert not re.search(r"\b(numpy|cvmcore_\w+|cvmcore\.backends\.\w+)\b", loaded)


def test_backends_imports_no_plugin() -> None:
    loaded = python("import sys\nfrom cvmcore import cli\ncli.main(['backends'])\nprint('LOADED', *sys.modules)")

    assert "swprot" in loaded
    assert not re.search(r"\b(cvmcore_\w+|cvmcore\.backends\.\w+)\b", loaded.partition("LOADED")[2])


# ---- listing --------------------------------------------------------------------------------------------------------


def test_version(cvm: Cvm) -> None:
    assert cvm("--version") == (0, f"cvm {__version__}\n", "")


def test_no_command_shows_the_help(cvm: Cvm) -> None:
    code, out, err = cvm()

    assert code == 0 and not err
    for command in ("backends", "workloads", "hooks", "run", "compare"):
        assert f"  {command} " in out


def test_backends(cvm: Cvm, plugins: Path) -> None:
    """Also a plugin that cannot be imported is listed: nobody tries."""
    distributions.distribution(plugins, "broken", {"cvmcore.backends:broken": "ONE"}, "import nothing_of_that_name")

    code, out, err = cvm("backends")
    rows = json.loads(cvm("backends", "--json")[1])["backends"]

    assert code == 0 and not err
    assert re.search(r"^broken +broken +1\.0 +made by a test", out, re.MULTILINE)
    assert [row["name"] for row in rows] == list(installed(GROUP))


def test_workloads(cvm: Cvm) -> None:
    code, out, err = cvm("workloads")

    assert code == 0 and not err
    names = set(re.findall(r"^\S+", out, re.MULTILINE))
    assert names >= {"boot", "touch", "convert", "balloon", "dirty-log", "teardown", "trace"}


def test_one_workload_shows_its_options(cvm: Cvm) -> None:
    code, out, _ = cvm("workloads", "touch")

    assert code == 0
    assert "sequential | random | zipf" in out


def test_hooks_by_backend(cvm: Cvm) -> None:
    """Every hook, with a mark for each backend that implements it."""
    code, out, err = cvm("hooks")
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}

    assert code == 0 and not err
    assert list(HOOKS) == [name for name in rows if name in HOOKS]
    assert rows["capabilities"].count(" x ") == len(installed(GROUP))
    assert HOOKS["gmem_prepare"].upstream in rows["gmem_prepare"]


def test_hooks_of_one_backend(cvm: Cvm) -> None:
    code, out, _ = cvm("hooks", "swprot")

    assert code == 0
    assert f"1 of {len(HOOKS)} hooks" in out and "capabilities" in out and "pin_pfn" not in out


def test_hooks_as_json(cvm: Cvm) -> None:
    hooks = json.loads(cvm("hooks", "--json")[1])

    assert [hook["name"] for hook in hooks["hooks"]] == list(HOOKS)
    assert set(hooks["hooks"][list(HOOKS).index("capabilities")]["implemented_by"]) == set(installed(GROUP))


# ---- plugins that cannot be used ------------------------------------------------------------------------------------


@pytest.fixture
def broken(plugins: Path) -> Path:
    """Three plugins that cannot be used, each in its own way, and one that can."""
    distributions.distribution(plugins, "absent", {"cvmcore.backends:absent": "ONE"}, "import nothing_of_that_name")
    distributions.backend(plugins, "ancient", version="0")
    distributions.backend(plugins, "odd", arguments="vm_type, options, colour")
    distributions.backend(plugins, "fine")
    return plugins


REASONS = {
    "absent": "cannot be imported: ModuleNotFoundError: No module named 'nothing_of_that_name'",
    "ancient": "was written for version 0 of the hook contract",
    "odd": "colour",
}


def test_broken_plugins_are_named_and_the_others_work(cvm: Cvm, broken: Path) -> None:
    code, out, err = cvm("compare", "touch", "--mem", "2M", "--backends", "absent,swprot,ancient,odd,fine")

    assert code == 2
    assert re.search(r"^ +swprot +fine$", out, re.MULTILINE) and "intact" in out
    lines = err.splitlines()
    assert len(lines) == len(REASONS)
    for name, reason in REASONS.items():
        assert any(line.startswith("cvm: ") and name in line and reason in line for line in lines)


def test_hooks_names_broken_plugins(cvm: Cvm, broken: Path) -> None:
    code, out, err = cvm("hooks")

    assert code == 0
    assert " fine " in out and " absent " not in out
    assert all(reason in err for reason in REASONS.values())


@pytest.mark.parametrize("name", REASONS)
def test_a_broken_plugin_alone(cvm: Cvm, broken: Path, name: str) -> None:
    for command in (("hooks", name), ("run", "touch", "--backend", name)):
        code, out, err = cvm(*command)

        assert (code, out) == (2, "")
        assert err.startswith("cvm: ") and err.count("\n") == 1 and REASONS[name] in err


def test_third_party_workload(cvm: Cvm, plugins: Path) -> None:
    distributions.workload(plugins, "hello", "context.machine.launch()\ncontext.populate(0, 100)\ncontext.note('hi')")

    code, out, _ = cvm("run", "hello")

    assert code == 0
    assert re.search(r"stage-2 faults +100$", out, re.MULTILINE) and "swprot: hi" in out


# ---- run and compare ------------------------------------------------------------------------------------------------


def test_run(cvm: Cvm) -> None:
    code, out, err = cvm("run", "touch", "--mem", "4M", "--vcpus", "2", "--backing", "2m", "--kernel", "7.x")

    assert code == 0 and not err
    assert "4 MiB, 2 vCPUs, backing 2m, kernel 7.x, seed 0" in out
    assert re.search(r"^guest content +intact$", out, re.MULTILINE)
    assert re.search(r"^large-page coverage +100.0 %$", out, re.MULTILINE)


def test_compare_puts_backends_side_by_side(cvm: Cvm) -> None:
    """In the order asked for, every row as wide as the table, no column cut."""
    code, out, _ = cvm("compare", "touch", "--mem", "4M", "--backends", "swprot,default")

    assert code == 0
    assert re.search(r"^ +swprot +default$", out, re.MULTILINE)
    assert re.search(r"^stage-2 faults +1,024 +1,024$", out, re.MULTILINE)
    assert re.search(r"^  gmem_alloc_4k +337\.92 +-$", out, re.MULTILINE)
    assert "…" not in out


def test_compare_takes_all_backends_by_default(cvm: Cvm) -> None:
    reports = json.loads(cvm("compare", "touch", "--mem", "2M", "--json")[1])["reports"]

    assert [report["backend"] for report in reports] == list(installed(GROUP))
    assert all(report["ok"] for report in reports)


@pytest.mark.parametrize("columns", [60, 110, 140])
def test_no_figure_is_cut(cvm: Cvm, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Large numbers in five columns take less than 110; a narrower terminal gets whole lines all the same."""
    monkeypatch.setenv("COLUMNS", str(columns))
    setup = Setup(1 << 30)
    reports = [run(load_workload("touch"), load_backend("swprot"), setup)] * 5

    say(shown(reports))
    out = cvm("backends")[1]

    assert "…" not in out
    assert re.search(r"^stage-2 faults( +262,144){5}$", out, re.MULTILINE)
    assert max(len(line) for line in out.partition("prices")[0].splitlines()) <= 110


def test_skipped_is_said(cvm: Cvm) -> None:
    code, out, _ = cvm("compare", "convert", "--mem", "4M", "--backends", "default,swprot")

    assert code == 0
    assert re.search(r"^guest content +skipped +intact$", out, re.MULTILINE)
    assert "default: skipped, it has no private memory" in out


def test_all_skipped_needs_no_table(cvm: Cvm) -> None:
    code, out, _ = cvm("run", "convert", "--backend", "default")

    assert code == 0
    assert "skipped" in out and "stage-2 faults" not in out


def test_json_has_the_documented_keys(cvm: Cvm) -> None:
    """docs/output.md names every key of a report, and none that is not there."""
    code, out, _ = cvm("run", "convert", "--mem", "4M", "--json")
    value = json.loads(out)
    section = (ROOT / "docs" / "output.md").read_text().partition("## Events")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    documented = {key for row in rows for key in re.findall(r"`(\w+)`", row)}

    assert code == 0
    assert (value["schema"], value["cvmcore"]) == (1, __version__)
    assert set(value["reports"][0]) == documented
    assert set(value["reports"][0]["exits"]) == {"vm", "user", "hypercall", "memory_fault"}
    assert set(value["reports"][0]["phases"]) == {"setup", "workload", "teardown"}


def test_a_wrong_result_is_exit_code_1(cvm: Cvm, plugins: Path) -> None:
    distributions.workload(plugins, "lying", "context.machine.launch()\ncontext.fail('the moon is not a cheese')")

    code, out, _ = cvm("run", "lying")

    assert code == 1
    assert re.search(r"^guest content +WRONG$", out, re.MULTILINE)
    assert "swprot: the moon is not a cheese" in out


def test_a_run_that_cannot_finish(cvm: Cvm, plugins: Path) -> None:
    """An error of the UAPI ends one backend, not the comparison."""
    distributions.workload(
        plugins, "picky", "context.machine.launch()\ncontext.machine.vm.set_memory_attributes(0, 4096, 0)"
    )

    code, out, err = cvm("compare", "picky", "--backends", "default,swprot")

    assert code == 2
    assert "swprot" in out and "default" not in out
    assert err == (
        "cvm: default could not finish: KVM_SET_MEMORY_ATTRIBUTES: -ENOTTY: this VM type has no memory attributes\n"
    )


def test_options_go_to_the_backends_that_have_them(cvm: Cvm, plugins: Path) -> None:
    distributions.backend(plugins, "fine")

    code, out, _ = cvm("compare", "touch", "--mem", "2M", "--backends", "swprot,fine", "-o", "colour=green", "--json")

    assert code == 0
    assert [report["backend_options"] for report in json.loads(out)["reports"]] == [{}, {"colour": "green"}]


def test_workload_options(cvm: Cvm) -> None:
    out = cvm("run", "touch", "--mem", "4M", "-w", "order=random", "-w", "passes=2", "--json")[1]

    assert json.loads(out)["reports"][0]["workload_options"] == {
        "order": "random", "access": "write", "passes": 2, "share": 100,
    }  # fmt: skip


def test_a_profile_changes_what_it_costs(cvm: Cvm, tmp_path: Path) -> None:
    """For one backend, or for the one that is named in front of it."""
    path = tmp_path / "mine.toml"
    path.write_text(
        'schema = 1\nunit = "ns"\nextends = "common"\n'
        '[prices]\nvm_exit = { ns = 1, source = "me", confidence = "low" }\n'
    )
    compare = ("compare", "touch", "--mem", "2M", "--backends", "default,swprot", "--json")

    def exits(*arguments: str) -> list[tuple[str, float]]:
        reports = json.loads(cvm(*compare, *arguments)[1])["reports"]
        return [(report["profile"], report["parts_ns"]["vm_exit"] / report["exits"]["vm"]) for report in reports]

    assert exits("--profile", str(path)) == [("mine", 1), ("mine", 1)]
    assert exits("--profile", f"swprot={path}") == [("default", 1250), ("mine", 1)]


def test_a_seed_decides(cvm: Cvm) -> None:
    def faults(seed: str) -> int:
        out = cvm("run", "touch", "--mem", "8M", "-w", "order=random", "--seed", seed, "--json")[1]
        return int(json.loads(out)["reports"][0]["faults"])

    assert faults("1") == faults("1") != faults("2")


# ---- files and pipes ------------------------------------------------------------------------------------------------


def test_trace_of_events(cvm: Cvm, tmp_path: Path) -> None:
    """A header, then every event of every backend, as JSON lines; nothing else in the folder."""
    path = tmp_path / "out" / "events.jsonl"
    path.parent.mkdir()

    code, _, _ = cvm("compare", "convert", "--mem", "2M", "--backends", "swprot,default", "--trace", str(path))
    header, *events = [json.loads(line) for line in path.read_text().splitlines()]

    assert code == 0
    assert header == {
        "cvmcore_events": 1, "cvmcore": __version__, "workload": "convert", "backends": ["swprot", "default"],
    }  # fmt: skip
    assert {event["backend"] for event in events} == {"swprot", "default"}
    assert [e["info"]["phase"] for e in events if e["name"] == "phase" and e["backend"] == "swprot"] == [
        "setup", "workload", "check", "teardown",
    ]  # fmt: skip
    first = next(event for event in events if event["kind"] == "fault")
    assert (first["gfns"], first["n"], first["level"]) == ([[0, 64]], 64, 1)
    assert {event["kind"] for event in events} >= {"hook", "fault", "zap", "exit", "invalidate", "memslot", "vm"}
    assert os.listdir(path.parent) == ["events.jsonl"]


def test_trace_follows_a_link(cvm: Cvm, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "events.jsonl")

    assert cvm("run", "touch", "--mem", "1M", "--trace", str(tmp_path / "link"))[0] == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "events.jsonl").stat().st_size


def test_a_failing_run_leaves_no_trace(cvm: Cvm, tmp_path: Path) -> None:
    """The file that was there stays as it was."""
    path = tmp_path / "events.jsonl"
    path.write_text("old\n")

    code, _, _ = cvm("run", "boot", "--mem", "1M", "--trace", str(path))

    assert code == 2
    assert os.listdir(tmp_path) == ["events.jsonl"] and path.read_text() == "old\n"


def test_interrupted(cvm: Cvm, plugins: Path, tmp_path: Path) -> None:
    distributions.workload(plugins, "slow", "context.machine.launch()\nraise KeyboardInterrupt")

    code, out, err = cvm("run", "slow", "--trace", str(tmp_path / "events.jsonl"))

    assert (code, out, err) == (130, "", "")
    assert os.listdir(tmp_path) == ["site"]


def test_broken_pipe_is_silent() -> None:
    """Whoever reads the output may stop."""
    for arguments in (["hooks"], ["run", "touch", "--mem", "1M", "--json"]):
        with subprocess.Popen(
            [sys.executable, "-m", "cvmcore.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
        ) as child:
            assert child.stdout is not None and child.stderr is not None
            child.stdout.close()
            said = child.stderr.read().decode()
            child.wait()
        assert not said and child.returncode in (0, 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", ["backends", "run touch --mem 1M --json", "hw pkvm --json"])
def test_output_that_cannot_be_written_is_one_sentence(arguments: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cvmcore.cli", *arguments.split()], stdout=full, stderr=subprocess.PIPE, text=True,
            cwd=ROOT,
        )  # fmt: skip

    assert done.returncode == 2
    assert re.fullmatch(r"cvm: standard output: cannot be written: [^\n]+\n", done.stderr)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_what_the_command_says(name: str, cvm: Cvm) -> None:
    code, out, _ = cvm(name, "--help")

    assert code == 0 and COMMANDS[name][1] in " ".join(out.split())


def test_the_list_of_commands_cuts_no_sentence(cvm: Cvm) -> None:
    code, out, _ = cvm("--help")

    assert code == 0 and not re.search(r"\.\.\.$", out.partition("Commands:")[2], re.MULTILINE)


@pytest.mark.parametrize("arguments", ["hw pkvm", "uapi"])
def test_operations_as_json(arguments: str, cvm: Cvm) -> None:
    code, out, _ = cvm(*arguments.split(), "--json")

    assert code == 0
    assert all(set(one) == {"name", "arguments", "help"} for one in json.loads(out)["operations"])


def test_a_price_of_nothing_has_no_row(cvm: Cvm) -> None:
    code, out, _ = cvm("run", "convert", "--mem", "64M", "--backend", "pkvm")

    parts = out.partition("parts of cpu time")[2]
    assert code == 0 and parts and not re.search(r"^  \w+ +- *$", parts, re.MULTILINE)


def test_a_pipe_gets_no_progress() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cvmcore.cli", "run", "touch", "--mem", "64M"], capture_output=True, text=True, cwd=ROOT,
        check=True,
    )  # fmt: skip

    assert not done.stderr and "\x1b" not in done.stdout


def test_standard_input(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cvmcore.cli", "run", "trace", "-", "--json"], capture_output=True, text=True, cwd=ROOT,
        input=" S 1000,8\n L 5000,4\n", check=True,
    )  # fmt: skip

    assert json.loads(done.stdout)["reports"][0]["figures"] == {"accesses": 2, "distinct pages": 2}


class Terminal(io.StringIO):
    """Text that somebody looks at."""

    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done is shown while it is done, and gone when it is over."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")

    with Bar("swprot") as bar:
        bar(512, 1024, "populate")
        bar(1024, None, "replay")

    assert "swprot: replay" in screen.getvalue()


# ---- small parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("64K", 1 << 16), ("3M", 3 << 20), ("192G", 192 << 30), ("1T", 1 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--mem") == size
