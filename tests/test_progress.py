"""Progress on a terminal, nothing on a pipe."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

from cvmcore.plugins import load_backend
from cvmcore.runner import Setup, load_workload, run

ROOT = Path(__file__).parents[1]
WORKLOADS = {
    "touch": "pass 1, sequential", "boot": "kernel", "convert": "convert buffers", "balloon": "deflate 1",
    "dirty-log": "touch again", "teardown": "populate", "trace": "replay",
}  # fmt: skip


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_part_of_a_run_is_told(workload: str) -> None:
    """Setting up, the workload's own steps, the check of the content, taking down."""
    told: list[tuple[int, int | None, str]] = []
    options = {"firmware": "1", "kernel": "1", "swiotlb": "1"} if workload == "boot" else {}
    mem = None if workload == "trace" else 16 << 20
    backend = load_backend("default" if workload == "dirty-log" else "swprot")

    run(
        load_workload(workload), backend, Setup(mem), workload_options=options, progress=lambda *step: told.append(step)
    )

    texts = list(dict.fromkeys(text for _, _, text in told))
    assert texts[0] == "set up" and texts[-2:] == ["check content", "tear down"]
    assert WORKLOADS[workload] in texts
    assert all(total is None or 0 <= done <= total for done, total, _ in told)


def test_what_the_host_sees_is_told() -> None:
    pytest.importorskip("cvmcore_sev")
    told: list[str] = []

    run(load_workload("touch"), load_backend("snp"), Setup(1 << 20), progress=lambda _, __, text: told.append(text))

    assert "look from outside" in told


def on_a_terminal(*arguments: str) -> tuple[str, str]:
    """Standard output (a pipe) and standard error (a terminal) of a command."""
    leader, follower = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "cvmcore.cli", *arguments], stdout=subprocess.PIPE, stderr=follower, cwd=ROOT,
        env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(follower)
    assert child.stdout is not None
    parts = {leader: b"", child.stdout.fileno(): b""}
    open_ = set(parts)
    while open_:
        for fd in select.select(list(open_), [], [], 60)[0]:
            try:
                data = os.read(fd, 1 << 16)
            except OSError:  # a terminal whose other end is closed
                data = b""
            parts[fd] += data
            if not data:
                open_.discard(fd)
    assert child.wait() == 0
    out = parts[child.stdout.fileno()].decode()
    child.stdout.close()
    os.close(leader)
    return out, parts[leader].decode()


LOG = "log.jsonl"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("run", "touch", "--mem", "512M"), "swprot"),
        (("compare", "touch", "--mem", "512M", "--backends", "default"), "default"),
        (("explain", "touch", "--mem", "512M", "--gfn", "3"), "swprot"),
        (("explain", "--from", LOG, "--gfn", "3"), LOG),
    ],
)
def test_a_terminal_sees_it_and_a_pipe_does_not(tmp_path: Path, arguments: tuple[str, ...], shown: str) -> None:
    """A bar on standard error while it lasts, wiped at the end; the figures on standard output stay clean."""
    log = tmp_path / LOG
    if LOG in arguments:
        with log.open("w") as file:
            subprocess.run(
                [sys.executable, "-m", "cvmcore.cli", "run", "touch", "--mem", "1M", "--trace", file.name], check=True,
                capture_output=True, cwd=ROOT,
            )  # fmt: skip
    arguments = tuple(str(log) if argument == LOG else argument for argument in arguments)

    out, err = on_a_terminal(*arguments)

    assert re.search(rf"\x1b.*{re.escape(shown)}", err, re.DOTALL)
    assert out and "\x1b" not in out
    piped = subprocess.run(
        [sys.executable, "-m", "cvmcore.cli", *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not piped.stderr and "\x1b" not in piped.stdout
