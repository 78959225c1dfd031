"""The hook contract and its reference: complete, true to the code, and without a vendor's name in the core."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cvmcore
from cvmcore import hookdocs
from cvmcore.backend import GROUP
from cvmcore.hookspecs import HOOKS
from cvmcore.plugins import installed, load_all_backends

REFERENCE = Path(__file__).parents[1] / "docs" / "hooks.md"
CORE = Path(cvmcore.__file__).parent
SHIPPED = {"default", "swprot", "sev", "sev-es", "snp", "tdx", "pkvm"}
DOCUMENTED = hookdocs.hooks()
VENDOR_WORDS = {
    "amd", "arm", "asid", "cca", "epyc", "ghcb", "hkid", "intel", "pamt", "pkvm", "psmash", "pvalidate", "rmm",
    "rmpupdate", "seamcall", "sept", "sev", "snp", "tdx", "vmsa", "xeon",
}  # fmt: skip
"""Words that must not decide anything in the core, nor be said by it. Kernel functions may be cited in docstrings,
comments, and the `upstream` column of hookspecs."""


@pytest.fixture(scope="module")
def all_shipped() -> None:
    """Skips unless every backend of this tree is installed and loads, with the reasons of those that do not."""
    good, bad = load_all_backends()
    missing = [f"{name}: {bad.get(name, 'is not installed')}" for name in sorted(SHIPPED - good.keys())]
    if missing:
        pytest.skip("needs every shipped backend; " + "; ".join(missing))


@pytest.mark.usefixtures("all_shipped")
def test_reference_is_what_the_code_says() -> None:
    """docs/hooks.md is made by `python -m cvmcore.hookdocs > docs/hooks.md`, and not behind the code."""
    if others := installed(GROUP).keys() - SHIPPED:
        pytest.skip(f"other backends are installed, and would be in it: {', '.join(sorted(others))}")

    assert REFERENCE.read_text(encoding="utf-8") == hookdocs.render()


def test_module_prints_the_reference() -> None:
    """`python -m cvmcore.hookdocs` writes what `render` returns, and nothing else."""
    printed = subprocess.run([sys.executable, "-m", "cvmcore.hookdocs"], capture_output=True, text=True, check=True)

    assert printed.stdout == hookdocs.render()
    assert not printed.stderr


@pytest.mark.parametrize("hook", DOCUMENTED, ids=list(HOOKS))
def test_hook_is_documented(hook: hookdocs.HookDoc) -> None:
    """Kind, locks, arguments, result, upstream; when it is called; what the core does where the hook refuses."""
    assert hook.info.kind in hookdocs.KINDS
    assert hook.info.locks.strip()
    assert hook.info.upstream.strip()
    assert hook.section
    assert hook.summary.endswith((".", "?"))
    assert hook.on_error, f"no paragraph of its docstring begins with '{hookdocs.ON_ERROR}'"
    assert [name for name, _ in hook.arguments if name not in hookdocs.ARGUMENTS] == []
    assert hook.result in hookdocs.RESULTS


@pytest.mark.parametrize("hook", DOCUMENTED, ids=list(HOOKS))
def test_hook_is_called(hook: hookdocs.HookDoc) -> None:
    """No hook that the core never calls. Invariants ask the trusted party; what they ask a trace is no call."""
    assert hook.callers
    if hook.info.name not in ("read_private_spte", "host_access", "max_mapping_level"):
        assert not [caller for caller in hook.callers if caller.startswith("cvmcore.testing")]


@pytest.mark.usefixtures("all_shipped")
@pytest.mark.parametrize("hook", DOCUMENTED, ids=list(HOOKS))
def test_hook_is_needed(hook: hookdocs.HookDoc) -> None:
    """No hook without a shipped backend that needs it."""
    assert SHIPPED & set(hook.implemented_by)


def test_observer_hooks_are_documented() -> None:
    """Each says what it is for; arguments and results are explained."""
    hooks = hookdocs.observer_hooks()

    assert [name for name, _, _ in hooks] == ["on_event", "on_host", "on_detail", "on_lock", "intercept", "on_quiet"]
    assert all(fn.__doc__ for _, fn, _ in hooks)


# ---- no vendor in the core --------------------------------------------------------------------------------------


def words_of(text: str) -> set[str]:
    """The words of an identifier or a text, lower case: `SevVm`, `sev_vm` and "SEV VM" all have `sev`."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)}


def said_by(tree: ast.Module, *, upstream_of: str = "") -> Iterator[tuple[int, str]]:
    """Identifiers and strings of a module with their lines; docstrings left out, and the third argument of
    decorators called `upstream_of`."""
    silent: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            silent.add(node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == upstream_of:
            silent.add(node.args[2])
    line = 0
    for node in ast.walk(tree):
        line = getattr(node, "lineno", line)
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and node not in silent:
                yield line, node.value
            continue
        for _, value in ast.iter_fields(node):
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, str):
                    yield line, item


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=lambda path: str(path.relative_to(CORE)))
def test_core_names_no_vendor(path: Path) -> None:
    """Capabilities decide in the core, never a vendor's name: none is in an identifier or a string."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    upstream_of = "_hook" if path == CORE / "hookspecs.py" else ""
    found = [
        f"{path.relative_to(CORE.parent)}:{line}: {said!r}"
        for line, said in said_by(tree, upstream_of=upstream_of)
        if words_of(said) & VENDOR_WORDS
    ]

    assert found == []


def test_vendor_words_are_found() -> None:
    """The search itself: identifiers in any style, strings and parts of f-strings; docstrings do not count."""
    code = '''"""About SEV."""
class SevVm: """SNP."""
def f(snp_mode): return f"on TDX {snp_mode}"
import cvmcore_sev
'''

    found = {line for line, said in said_by(ast.parse(code)) if words_of(said) & VENDOR_WORDS}

    assert found == {2, 3, 4}
    assert not words_of("several, seven, charm, snapshot") & VENDOR_WORDS
