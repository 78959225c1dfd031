"""Bad input: one clear sentence naming what and where, exit code 2, nothing half-written."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
from pathlib import Path

import distributions
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvmcore import cli
from cvmcore.cli.arguments import parse_size
from cvmcore.errors import InputError

PROFILE = 'schema = 1\nunit = "ns"\nextends = "common"\n[prices]\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a file of each bad kind in it."""
    monkeypatch.chdir(tmp_path)
    good = '{"cvmcore_trace": 1, "records": 2}\n{"page":1,"op":"r","n":1}\n{"page":2,"op":"w","n":1}\n'
    files: dict[str, bytes] = {
        "empty": b"",
        "foreign.txt": b"root:x:0:0\n",
        "cut.jsonl": good[: good.rindex("{")].encode(),
        "cut.jsonl.gz": gzip.compress(good.encode() * 50)[:-12],
        "cut.lackey": b" S 1000,8\n L 2000,",
        "odd.jsonl": b'{"cvmcore_trace": 1}\n{"page":1,"op":"q","n":1}\n',
        "next.jsonl": b'{"cvmcore_trace": 2}\n',
        "negative.toml": f'{PROFILE}vm_exit = {{ ns = -1, source = "x", confidence = "low" }}\n'.encode(),
        "unknown.toml": f'{PROFILE}coffee = {{ ns = 1, source = "x", confidence = "low" }}\n'.encode(),
        "missing.toml": b'schema = 1\nunit = "ns"\n[prices]\nvm_exit = { ns = 1, source = "x", confidence = "low" }\n',
        "stranger.toml": b'schema = 1\nunit = "ns"\nextends = "nobody"\n[prices]\n',
        "no.toml": b"this is no toml",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "directory").mkdir()
    return tmp_path


def listing(folder: Path) -> dict[str, tuple[int, float]]:
    return {entry.name: (entry.stat().st_size, entry.stat().st_mtime) for entry in os.scandir(folder)}


CASES = {
    # traces
    "trace that is not there": ("run trace nothing.jsonl", r"nothing\.jsonl: cannot be read: No such file"),
    "trace that is a directory": ("run trace directory", r"directory: cannot be read: Is a directory"),
    "empty trace": ("run trace empty", r"empty: the file is empty"),
    "foreign trace": ("run trace foreign.txt", r"foreign\.txt: neither output of valgrind.*'root:x:0:0'"),
    "truncated trace": ("run trace cut.jsonl", r"cut\.jsonl: the header announces 2 records and 1 are there"),
    "truncated gzip": ("run trace cut.jsonl.gz", r"cut\.jsonl\.gz: the gzip data ends too early"),
    "truncated lackey output": ("run trace cut.lackey", r"cut\.lackey:2: this line has no end"),
    "record that is none": ("run trace odd.jsonl", r"odd\.jsonl:2: this line has none of r, w and x in 'op'"),
    "trace of another version": ("run trace next.jsonl", r"next\.jsonl: a cvmcore trace of version 2"),
    "trace larger than the guest": ("run trace --mem 1M", r"touches more than the 256 pages.*--mem"),
    "trace for a workload that reads none": ("run touch empty", r"workload touch reads no file, and 'empty' was given"),
    "standard input for several": ("compare trace - --backends default,swprot", r"standard input can be read once"),
    # names
    "unknown backend": ("run touch --backend vax", r"there is no backend 'vax' here; installed: .*swprot"),
    "unknown backend among others": ("compare touch --backends swprot,vax", r"there is no backend 'vax'"),
    "no backend at all": ("compare touch --backends ,", r"--backends ',' names no backend"),
    "unknown backend of hooks": ("hooks vax", r"there is no backend 'vax'"),
    "unknown workload": ("run dance", r"there is no workload 'dance' here; installed: .*touch"),
    "unknown workload to show": ("workloads dance", r"there is no workload 'dance'"),
    "unknown command": ("dance", r"No such command 'dance'"),
    "unknown flag": ("run touch --dance", r"No such option: --dance"),
    "no workload": ("run", r"Missing argument 'WORKLOAD'"),
    # options
    "backend option that is none": ("run touch -o dance=1", r"backend swprot has no option 'dance'; it has none"),
    "backend option that nobody has": (
        "compare touch --backends default,swprot -o dance=1", r"none of default, swprot has an option 'dance'",
    ),
    "backend option without value": ("run touch -o dance", r"-o 'dance' is not name=value"),
    "workload option that is none": ("run touch -w dance=1", r"workload touch has no option 'dance'; it has order"),
    "workload option of another choice": ("run touch -w order=up", r"option order: 'up' is none of sequential, random"),
    "workload option that is no number": ("run touch -w passes=many", r"option passes: 'many' is not a whole number"),
    "workload option out of range": ("run touch -w share=101", r"option share: 101 is not from 1 to 100"),
    "unknown unit": ("run touch --mem 64Q", r"--mem '64Q' is no size"),
    "negative memory": ("run touch --mem=-1G", r"--mem '-1G' is no size"),
    "no memory": ("run touch --mem 0", r"--mem: 0 bytes are not whole 4K pages, one at least"),
    "half a page": ("run touch --mem 6K", r"--mem: 6144 bytes are not whole 4K pages"),
    "too much memory": ("run touch --mem 1T", r"--mem: \d+ bytes are not whole 4K pages, one at least, up to 256G"),
    "too little memory": ("run boot --mem 16M", r"this boot takes \d+ MiB of guest memory, and --mem gives 16 MiB"),
    "too little memory for buffers": (
        "run convert --mem 1M -w pages=65", r"convert with 4 buffers of 65 pages takes 2 MiB.*--mem gives 1 MiB",
    ),
    "no vCPU": ("run touch --vcpus 0", r"--vcpus '0' is no whole number from 1 on"),
    "vCPUs that are no number": ("run touch --vcpus two", r"--vcpus 'two' is no whole number from 1 on"),
    "too many vCPUs": ("run touch --vcpus 4097", r"--vcpus: 4097 is not from 1 to 4096"),
    "no samples": ("calibrate --live -o x --times 1001", r"--times '1001' is no whole number from 1 to 1000"),
    "page beyond memory": (
        "explain touch --mem 2M --gfn 0x200", r"--gfn 0x200 is beyond the guest's memory, which ends at gfn 0x200",
    ),
    "unknown backing": ("run touch --backing 1g", r"backing '1g' is none of 4k, 2m"),
    "unknown kernel": ("run touch --kernel 2.4", r"kernel '2\.4' is none of 6\.18, 7\.x"),
    "negative seed": ("run touch --seed=-1", r"--seed '-1' is no whole number from 0 on"),
    # profiles
    "profile that is not there": ("run touch --profile no-such.toml", r"no-such\.toml: cannot be read: No such file"),
    "profile that is a directory": ("run touch --profile directory", r"directory: cannot be read: Is a directory"),
    "profile that is no TOML": ("run touch --profile no.toml", r"no\.toml: is not TOML"),
    "negative price": ("run touch --profile negative.toml", r"negative\.toml: .*vm_exit.*-1"),
    "unknown price": ("run touch --profile unknown.toml", r"unknown\.toml: price of 'coffee', which nothing charges"),
    "missing price": ("run touch --profile missing.toml", r"missing\.toml: no price of '\w+' and of \d+ others"),
    "profile of a stranger": ("run touch --profile stranger.toml", r"stranger\.toml: extends 'nobody'"),
    # output
    "trace into no folder": ("run touch --mem 1M --trace no/such.jsonl", r"no/such\.jsonl: cannot be written: No such"),
    "trace into a directory": ("run touch --mem 1M --trace directory", r"directory: cannot be written"),
    "record into no folder": ("bench one_us --quick --record no/such.json", r"no/such\.json: cannot be written"),
    "full device": ("run touch --mem 1M --trace /dev/full", r"/dev/full: cannot be written: it is no regular file"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_one_sentence(case: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, expected = CASES[case]
    before = listing(folder)

    code = cli.main(arguments.split())
    out, err = capfd.readouterr()

    assert (code, out) == (2, "")
    assert re.fullmatch(r"cvm: [^\n]+\n", err)
    assert re.search(expected, err)
    assert listing(folder) == before


def test_a_bad_run_writes_no_trace(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The events of a run that failed half-way are not kept."""
    before = listing(folder)

    assert cli.main(["run", "trace", "odd.jsonl", "--trace", "events.jsonl"]) == 2
    assert listing(folder) == before


def test_a_hook_with_a_wrong_argument(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    distributions.backend(folder / "site", "wrongly", arguments="vm_type, options, tide")
    monkeypatch.syspath_prepend(folder / "site")

    assert cli.main(["run", "touch", "--backend", "wrongly"]) == 2
    assert re.fullmatch(r"cvm: backend wrongly: .*capabilities.*tide.*\n", capfd.readouterr().err)


def test_an_entry_point_that_names_something_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    entries = {"cvmcore.backends:other": "ONE", "cvmcore.workloads:other": "ONE"}
    distributions.distribution(folder / "site", "something_else", entries, "ONE = 1")
    monkeypatch.syspath_prepend(folder / "site")

    assert cli.main(["run", "touch", "--backend", "other"]) == 2
    assert capfd.readouterr().err == "cvm: backend other: its entry point names a int, not a Backend\n"
    assert cli.main(["run", "other"]) == 2
    assert capfd.readouterr().err == "cvm: workload other: its entry point names a int, not a Workload\n"


# ---- anything at all ------------------------------------------------------------------------------------------------

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ODD = st.text("0169.,:=-+ \n\t\x1b'\"\\KMGTkxe_az\xe9\u2028", max_size=8)
FLAGS = ["-w", "-o", "--mem", "--vcpus", "--seed", "--backing", "--kernel", "--profile", "--backend"]


@quick
@given(ODD)
def test_any_size(text: str) -> None:
    """It is a size, or an InputError."""
    with contextlib.suppress(InputError):
        assert parse_size(text, "--mem") >= 0


@quick
@given(flag=st.sampled_from(FLAGS), value=ODD)
def test_any_value(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever stands behind a flag is one sentence; nothing runs, as the memory is too small in any case."""
    code = cli.main(["run", "boot", "-w", "image=65536", flag, value, "--mem=1M"])
    err = capsys.readouterr().err

    assert code == 2
    assert err.startswith("cvm: ") and err.count("\n") == 1
