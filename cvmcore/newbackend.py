"""`cvm new-backend`: a plugin to start from. Its files are templates in `scaffold/`; docs/tutorial.md goes on there.

A template's name says where its file goes; `$name` and the like are filled in (`string.Template`).
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from string import Template

from cvmcore.backend import GROUP
from cvmcore.errors import InputError
from cvmcore.plugins import installed

TEMPLATES = Path(__file__).with_name("scaffold")
PROJECT_FILES = frozenset({"pyproject.toml", "README.md"})
"""Those that lie beside the package, as the folder `tests` does."""


def names(name: str) -> dict[str, str]:
    """What is filled in. Raises InputError for a name that no package could have, or that is taken."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > 40:
        raise InputError(f"'{name}' cannot name a backend: lower-case letters, digits and '-' between them")
    taken = installed(GROUP).get(name)
    if taken is not None:
        raise InputError(f"there is a backend '{name}' already, of {taken.distribution}")
    title = "".join(part.capitalize() for part in name.split("-"))
    return {
        "name": name,
        "distribution": f"cvmcore-{name}",
        "package": f"cvmcore_{name.replace('-', '_')}",
        "Class": f"{title}Hw",
        "Vendor": title,
        "CONSTANT": name.replace("-", "_").upper(),
    }


def files(name: str) -> dict[Path, str]:
    """Every file of the plugin, by its path in the project's folder. InputError as for `names`."""
    filled = names(name)
    made = {}
    for template in sorted(TEMPLATES.rglob("*.tmpl")):
        path = template.relative_to(TEMPLATES).with_suffix("")
        if path.name == "name.toml":
            path = path.with_name(f"{name}.toml")
        if path.parent == Path() and path.name not in PROJECT_FILES:
            path = Path(filled["package"]) / path
        made[path] = Template(template.read_text(encoding="utf-8")).substitute(filled)
    return made


def write(name: str, folder: Path) -> Path:
    """Write the plugin into a new folder, `cvmcore-NAME` in `folder`; all of it or nothing. Returns it.

    Raises InputError for a name that cannot be, a folder that is there already, or one that cannot be written.
    """
    made = files(name)
    target = folder / f"cvmcore-{name}"
    if target.exists():
        raise InputError(f"{target}: is there already")
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{target.name}-") as scratch:
            for path, text in made.items():
                place = Path(scratch) / target.name / path
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(text, encoding="utf-8")
            shutil.move(Path(scratch) / target.name, target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror or error}") from None
    return target
