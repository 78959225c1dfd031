"""The arguments that commands share, and how their text is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from cvmcore.errors import InputError

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def whole(flag: str, least: int = 0, most: int | None = None) -> Callable[[str | int], int]:
    """What reads the whole number behind an option, and says in this program's words (InputError) what is none."""

    def parse(text: str | int) -> int:
        value = int(text) if re.fullmatch(r"\d{1,18}", str(text), re.ASCII) else -1
        if value < least or (most is not None and value > most):
            limits = f"from {least} on" if most is None else f"from {least} to {most}"
            raise InputError(f"{flag} '{text}' is no whole number {limits}")
        return value

    return parse


Name = Annotated[str, typer.Argument(metavar="WORKLOAD", help="boot, touch, convert, ...: see `cvm workloads`.")]
File = Annotated[str | None, typer.Argument(metavar="FILE", help="What the workload reads; - is standard input.")]
BackendOptions = Annotated[
    list[str], typer.Option("-o", "--option", metavar="NAME=VALUE", help="A backend's option; may be repeated.")
]
WorkloadOptions = Annotated[
    list[str],
    typer.Option("-w", "--workload-option", metavar="NAME=VALUE", help="A workload's option; may be repeated."),
]
Policies = Annotated[
    list[str],
    typer.Option("-p", "--policy", metavar="NAME=VALUE", help="A choice of the core itself; see docs/design.md."),
]
Mem = Annotated[str | None, typer.Option("--mem", metavar="SIZE", help="Guest memory, as 64G (K, M, G, T).")]
Vcpus = Annotated[int, typer.Option("--vcpus", metavar="N", help="How many vCPUs.", parser=whole("--vcpus", 1))]
Backing = Annotated[str, typer.Option("--backing", metavar="4k|2m", help="Largest pages that back memory.")]
Kernel = Annotated[str, typer.Option("--kernel", metavar="6.18|7.x", help="Whose errno, where kernels differ.")]
Profiles = Annotated[
    list[str],
    typer.Option("--profile", metavar="[BACKEND=]FILE", help="Prices in place of a backend's own; may be repeated."),
]
Seed = Annotated[
    int, typer.Option("--seed", metavar="N", help="Of everything that happens by chance.", parser=whole("--seed"))
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON in place of a table.")]
TraceFile = Annotated[
    Path | None,
    typer.Option("--trace", metavar="OUT", help="Write what happened: .pftrace or .json a timeline, else all events."),
]


def parse_size(text: str, what: str) -> int:
    """Bytes of a size such as 64G (units K, M, G, T: powers of 1024). Raises InputError."""
    match = re.fullmatch(r"(\d{1,15})([KMGT]?)", text)
    if match is None:
        raise InputError(f"{what} '{text}' is no size: give a whole number and K, M, G or T, as in 64G")
    return int(match[1]) << _UNITS[match[2]]


def parse_page(text: str, what: str) -> int:
    """The number of a page, decimal or with 0x. Raises InputError."""
    from cvmcore.explain import MAX_GFN

    match = re.fullmatch(r"(\d{1,20})|0[xX]([0-9a-fA-F]{1,16})", text, re.ASCII)
    page = MAX_GFN if match is None else int(match[1] or match[2], 10 if match[1] else 16)
    if page >= MAX_GFN:
        raise InputError(f"{what} '{text}' is no page number: give 4096 or 0x1000, below 2**52")
    return page


def parse_pairs(texts: list[str], flag: str) -> dict[str, str]:
    """`name=value` options as a dict. Raises InputError."""
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"{flag} '{text}' is not name=value")
        pairs[name] = value
    return pairs


def parse_backends(text: str) -> list[str]:
    """The names of `--backends a,b,c`, each once. Raises InputError where there is none."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise InputError(f"--backends '{text}' names no backend")
    return names


def parse_profiles(texts: list[str], backends: Sequence[str]) -> dict[str, Path]:
    """The profile file of each backend, from `FILE` (for all of them) and `BACKEND=FILE`."""
    files: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if equals and name in backends:
            files[name] = Path(path)
        else:
            files |= {backend: Path(text) for backend in backends if backend not in files}
    return files
