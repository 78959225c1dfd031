"""`cvm new-backend`: a plugin to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def new_backend(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the backend: lower-case, as in my-vendor.")],
    folder: Annotated[Path, typer.Option("--in", metavar="FOLDER", help="Where cvmcore-NAME is made.")] = Path(),
) -> None:
    """Write an installable plugin to start from."""
    from cvmcore.newbackend import write

    made = write(name, folder)
    typer.echo(f"{made}: written; next: pip install -e '{made}[test]', then cvm run touch --backend {name} --mem 64M")
