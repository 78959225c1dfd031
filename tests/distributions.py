"""Distributions for a test: a folder on sys.path that pip might have filled."""

from __future__ import annotations

from pathlib import Path

BACKEND = """
from pathlib import Path
import cvmcore.backends
from cvmcore.backend import Backend, Option
from cvmcore.hookspecs import API_VERSION, hookimpl
from cvmcore.types import Capabilities

class Vendor:
    @hookimpl
    def capabilities(self, {arguments}):
        return Capabilities()

ONE = Backend(
    name="{name}", vendor="{name}", vm_type="{name}", summary="made by a test", api_version={version}, make=Vendor,
    profile=Path(cvmcore.backends.__file__).with_name("default.toml"),
    options=(Option("colour", "red", "of the test", ("red", "green")),),
)
"""


def distribution(folder: Path, name: str, entry_points: dict[str, str], source: str) -> None:
    """Put a distribution into a folder: module `name` with this source, and entry points {"group:name": object}."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nSummary: made by a test\n")
    lines = []
    for key, target in entry_points.items():
        group, _, entry = key.partition(":")
        lines.append(f"[{group}]\n{entry} = {name}:{target}\n")
    (info / "entry_points.txt").write_text("".join(lines))
    (folder / f"{name}.py").write_text(source)


def backend(folder: Path, name: str, *, arguments: str = "vm_type, options", version: str = "API_VERSION") -> None:
    """A backend named as its distribution, whose one hook names these arguments."""
    source = BACKEND.format(name=name, arguments=arguments, version=version)
    distribution(folder, name, {f"cvmcore.backends:{name}": "ONE"}, source)


def workload(folder: Path, name: str, body: str) -> None:
    """A workload named as its distribution, whose run is these lines."""
    source = (
        "from cvmcore.workloads import Workload\n\ndef run(context):\n"
        + "".join(f"    {line}\n" for line in body.splitlines())
        + f"\nONE = Workload({name!r}, 'made by a test', run, default_mem=1 << 20)\n"
    )
    distribution(folder, name, {f"cvmcore.workloads:{name}": "ONE"}, source)
