"""The hook reference, docs/hooks.md, made from the contract itself: `python -m cvmcore.hookdocs > docs/hooks.md`.

Everything in it is read from where it is true: kinds, locks, signatures and docstrings from `cvmcore.hookspecs`, who
calls a hook from the core's source, who implements it from the installed backends, observers from their own spec.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import attrs

import cvmcore
from cvmcore import explain, hookspecs, observers, timeline, tracer
from cvmcore.backend import GROUP
from cvmcore.errors import PluginError
from cvmcore.hookspecs import API_VERSION, HOOKS, HookInfo
from cvmcore.host import Host
from cvmcore.ops import implementations
from cvmcore.plugins import installed, load_all_backends
from cvmcore.runner import load_profile_for
from cvmcore.types import Capabilities

KINDS = {
    "install": "may stop: `None` says that all of the batch is done, `Stopped(done, reason)` how far it came and why",
    "total": "cannot fail: the backend leaks what it cannot free, or declares the VM dead (`vm.bug`), and returns",
    "query": "answers, and changes nothing that anybody could see",
    "call": "carries a call of user space, the guest or the host: refuses with `UapiError`, or in its result",
}
"""What each kind of hook promises."""

_NO_ERRORS = {
    "total": "cannot fail; an exception is a bug, and nothing catches it",
    "query": "cannot fail; an exception is a bug, and nothing catches it",
}

ARGUMENTS = {
    "begun": "for how many leading pages of gfns the guest has done its own half already, where its call is replayed",
    "faults": "for how many pages behind the one that it answered Refault with the call that is replayed faulted, too",
    "reads": "how many reads of an entry to count",
    "blocked": "whether block_private_spt was called for the table",
    "arguments": "by name: what the hook is called with, or the fields of the vendor's structure",
    "batch": "pages of one memslot at one level, in gfn order, with their frames",
    "change": "what happens to the memslot",
    "command": "the vendor command's own name",
    "contents": "one for each page of the batch",
    "end": "first gfn behind the range",
    "event": "what happened",
    "gfn": "first 4K gfn of the page",
    "gfns": "4K guest frames, sorted and unique; of large pages the first 4K gfn each",
    "hook": "name of the hook that is about to run",
    "host": "the machine",
    "hva": "address in the VMM, in bytes",
    "kind": "what the page of the image is to be measured as",
    "level": "PG_LEVEL_*: 1 is 4K, 2 is 2M, 3 is 1G",
    "map_level": "level at which the pages are mapped now",
    "max_order": "log2 of the 4K pages in the folio behind each page",
    "mode": "how the host touches the memory: user space, with a fixup, plainly",
    "new": "the memslot as it will be",
    "nr_pages": "how many 4K pages",
    "old": "the memslot as it is",
    "options": "the VM type's options, parsed",
    "pfn": "first 4K frame of the page",
    "pfns": "4K frames in the order of the gfns; of large pages the first frame each",
    "private": "whether the access, or the side converted to, is private",
    "size_bytes": "in bytes",
    "slot": "the memslot",
    "source": "the VM that gives its context away",
    "start": "first gfn of the range",
    "table": "frame of the table page",
    "tables": "frames of the table pages, one for each entry",
    "target": "the VM that takes it over",
    "vcpu": "the vCPU",
    "vm": "the VM",
    "vm_type": "name of the VM type",
    "write": "whether the access writes",
}
"""What an argument of this name means, in every hook that has one."""

RESULTS = {
    "tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]] | Stopped | None": (
        "(state, frame), one each; `None` where only counted; or `Stopped(0, Retry())`"
    ),
    "Access": "`Access`: one `Walk` for all pages or one each, and the frames behind them",
    "Any": "anything but None answers in the backend's place",
    "Capabilities": "`Capabilities`",
    "ConvertResult": "`Done(n)`, `Exit(n)`, `Refault(gfn, n, pages, begun)` or `Mismatch(gfn, begun)`",
    "HostVerdict": "`HostVerdict`",
    "InstallResult": "`None`, or `Stopped(done, reason)`; reasons: `Retry`, `Fatal(errno)`",
    "None": "nothing",
    "Sel": "4K frames, a selector",
    "bool": "a bool",
    "dict[str, Any]": "fields by name",
    "int": "a number",
    "tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]": "two arrays, uint8 and int64, one element for each page",
}
"""What a hook that is annotated so returns."""

ON_ERROR = "On error: "
"""How the paragraph of a docstring begins that says what the core does when the hook refuses."""

_BANNER = re.compile(r"# ---- (.+?) -+$|^def (\w+)\(", re.MULTILINE)


@attrs.frozen
class HookDoc:
    """A hook with all that is known of it, each part as text."""

    info: HookInfo
    section: str
    signature: str
    arguments: tuple[tuple[str, str], ...]
    """(name, annotation)."""
    result: str
    summary: str
    """When it is called, and what it shall do: the docstring's first paragraph."""
    details: tuple[str, ...]
    on_error: str
    """Empty where the docstring does not say; install and call hooks must."""
    callers: tuple[str, ...]
    implemented_by: tuple[str, ...]


# ---- reading ----------------------------------------------------------------------------------------------------


def _sections() -> dict[str, str]:
    """The banner that each hook stands under in hookspecs.py."""
    found: dict[str, str] = {}
    section = ""
    for match in _BANNER.finditer(inspect.getsource(hookspecs)):
        section = match[1] or section
        if match[2] in HOOKS:
            found[match[2]] = section
    return found


def _paragraphs(fn: Callable[..., Any]) -> list[str]:
    return [" ".join(text.split()) for text in (inspect.getdoc(fn) or "").split("\n\n")]


def _signature(fn: Callable[..., Any]) -> str:
    """The signature as it is written, one argument a line where it is long."""
    parameters = [str(p) for p in inspect.signature(fn).parameters.values() if p.name != "self"]
    head = f"def {fn.__name__}("
    tail = f") -> {inspect.signature(fn).return_annotation}"
    line = head + ", ".join(parameters) + tail
    return (line if len(line) <= 100 else f"{head}\n    " + ",\n    ".join(parameters) + f",\n{tail}").replace("'", "")


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Functions and methods with their qualified names; what a function defines inside belongs to it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield f"{prefix}{node.name}", node


def _names_passed(function: ast.AST) -> Iterator[str]:
    """String constants that a function passes in calls; to ask whether there is a hook, or was a call, is no call."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Attribute) and node.func.attr in _ASKS):
            for argument in node.args:
                choices = [argument.body, argument.orelse] if isinstance(argument, ast.IfExp) else [argument]
                for value in choices:
                    if isinstance(value, ast.Constant) and isinstance(value.value, str):
                        yield value.value


_ASKS = frozenset({"has", "hooks"})
"""Methods that ask: of the host's hooks, and of what a step called (`Step.hooks`)."""


def callers() -> dict[str, list[str]]:
    """Which functions of the core call each hook, as `module:qualname`. Only the machine itself has hooks to call."""
    found: dict[str, list[str]] = {name: [] for name in HOOKS}
    root = Path(cvmcore.__file__).parent
    machine = [root / f"{name}.py" for name in ("host", "vm", "vcpu", "uapi")]
    checks = [root / "testing" / f"{name}.py" for name in ("invariants", "state")]  # they peek at the trusted party
    for path in sorted([*machine, *(root / "mem").rglob("*.py"), *checks]):
        module = ".".join(["cvmcore", *path.relative_to(root).with_suffix("").parts])
        for qualname, function in _functions(ast.parse(path.read_text(encoding="utf-8"))):
            for name in set(_names_passed(function)) & found.keys():
                found[name].append(f"{module}:{qualname}")
    return found


def implementers() -> tuple[dict[str, list[str]], dict[str, str]]:
    """Installed backends by hook, the core's own first; and those that cannot be used, with the reason."""
    backends, bad = load_all_backends()
    entries = installed(GROUP)
    found: dict[str, list[str]] = {name: [] for name in HOOKS}
    for name in sorted(backends, key=lambda name: (entries[name].distribution != "cvmcore", name)):
        try:
            for hook, _, _ in implementations(backends[name].make(), name):
                found[hook].append(name)
        except PluginError as error:
            bad[name] = str(error)
    return found, bad


def hooks() -> list[HookDoc]:
    """Every hook of the contract, in life-cycle order."""
    sections, called, implemented = _sections(), callers(), implementers()[0]
    found = []
    for name, info in HOOKS.items():
        fn = getattr(hookspecs, name)
        summary, *rest = _paragraphs(fn)
        signature = inspect.signature(fn)
        refusals = [text.removeprefix(ON_ERROR) for text in rest if text.startswith(ON_ERROR)]
        found.append(
            HookDoc(
                info=info,
                section=sections[name],
                signature=_signature(fn),
                arguments=tuple((p.name, str(p.annotation)) for p in signature.parameters.values()),
                result=str(signature.return_annotation),
                summary=summary,
                details=tuple(text for text in rest if not text.startswith(ON_ERROR)),
                on_error=" ".join(refusals) or _NO_ERRORS.get(info.kind, ""),
                callers=tuple(called[name]),
                implemented_by=tuple(implemented[name]),
            )
        )
    return found


def observer_hooks() -> list[tuple[str, Callable[..., Any], list[str]]]:
    """The observers' hooks: name, spec, and the observers of the core that implement it."""
    names = [name for name, fn in vars(observers.ObserverSpec).items() if inspect.isfunction(fn)]
    mark = f"{observers.PROJECT}_impl"
    shipped = {
        name: cls
        for module in (observers, tracer, timeline, explain)
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and cls.__module__ == module.__name__
    }
    return [
        (
            name,
            getattr(observers.ObserverSpec, name),
            [owner for owner, cls in shipped.items() if hasattr(getattr(cls, name, None), mark)],
        )
        for name in names
    ]


# ---- writing ----------------------------------------------------------------------------------------------------


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _codes(names: tuple[str, ...] | list[str], none: str) -> str:
    return ", ".join(f"`{name}`" for name in names) or none


def _meaning(name: str, annotation: str) -> str:
    return f"`{name}` (`{annotation}`): {ARGUMENTS[name]}"


def _hook_text(hook: HookDoc) -> Iterator[str]:
    info = hook.info
    yield from (f"### `{info.name}`", "", hook.summary, "", "```python", hook.signature, "```", "")
    for text in hook.details:
        yield from (text, "")
    yield from ("| | |", "|---|---|")
    yield _row("kind", info.kind)
    yield _row("called from", _codes(hook.callers, "nowhere in the core"))
    yield _row("locks held", "none" if info.locks == "-" else info.locks.removeprefix("- "))
    yield _row("arguments", "; ".join(_meaning(name, annotation) for name, annotation in hook.arguments))
    yield _row("result", RESULTS[hook.result])
    yield _row("on error", hook.on_error)
    yield _row("upstream", info.upstream)
    yield _row("implemented by", _codes(hook.implemented_by, "none of the installed backends"))
    yield ""


def _observers_text() -> Iterator[str]:
    yield from ("## Observers", "")
    yield (inspect.getdoc(observers) or "").partition("\n")[0]
    yield ""
    yield (
        "Any number of them watch one Host, each with the hooks it wants. Only `intercept` may change what happens; "
        "none of them takes locks or has a price."
    )
    yield ""
    for name, fn, owners in observer_hooks():
        summary, *rest = _paragraphs(fn)
        signature = inspect.signature(fn)
        arguments = [(p.name, str(p.annotation)) for p in signature.parameters.values() if p.name != "self"]
        yield from (f"### `{name}`", "", summary, "", "```python", _signature(fn), "```", "")
        for text in rest:
            yield from (text, "")
        yield from ("| | |", "|---|---|")
        yield _row("arguments", "; ".join(_meaning(*argument) for argument in arguments))
        yield _row("result", RESULTS[str(signature.return_annotation)])
        yield _row("implemented by", _codes(owners, "no observer of the core"))
        yield ""


def capability_rows() -> list[tuple[str, str, str, list[str]]]:
    """(name, default, meaning, backends with another value) of each capability."""
    tree = ast.parse(inspect.getsource(Capabilities))
    body = cast(ast.ClassDef, tree.body[0]).body
    said = {}
    for this, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(this, ast.AnnAssign) and isinstance(this.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            said[this.target.id] = " ".join(str(text).split())
    plain = attrs.asdict(Capabilities())
    declared = {}
    for name, backend in load_all_backends()[0].items():
        host = Host(backend, load_profile_for(backend, None), nr_frames=1 << 12)
        declared[name] = attrs.asdict(host.capabilities(backend.vm_type, host.options))
    return [
        (name, str(value), said[name], [backend for backend, caps in declared.items() if caps[name] != value])
        for name, value in plain.items()
    ]


def _capabilities_text() -> Iterator[str]:
    yield from ("## Capabilities", "")
    yield (
        "What the hook `capabilities` answers (`cvmcore.types.Capabilities`). The core decides by these, the "
        "invariants are switched on by them, and the conformance checks skip by nothing else. Levels: 1 is 4K, 2 is "
        "2M, 3 is 1G."
    )
    yield ""
    yield from ("| capability | default | meaning | otherwise with |", "|---|---|---|---|")
    for name, value, meaning, backends in capability_rows():
        yield _row(f"`{name}`", value, meaning, ", ".join(backends) or "-")
    yield ""


def _lines() -> Iterator[str]:
    documented, bad = hooks(), implementers()[1]
    yield "# Hooks"
    yield ""
    yield "<!-- Made by `python -m cvmcore.hookdocs`. Change the docstrings in cvmcore/hookspecs.py, not this file. -->"
    yield ""
    yield (
        f"What a backend may implement: version {API_VERSION} of the contract, in life-cycle order. A backend that was "
        "written for another version is refused. One backend implements, the core calls; a hook that it leaves out "
        "costs nothing."
    )
    yield ""
    yield from ("| kind | |", "|---|---|")
    for kind, promise in KINDS.items():
        yield _row(kind, promise)
    yield ""
    yield (
        "An implementation is a plain function, or a generator function that yields effects (locks of its own). It "
        "names only the arguments that it wants. A batch means the same as its pages one by one in gfn order: same end "
        "state, same counts, same first failure. Of a batch that stops at `done`, the pages below are committed, the "
        "page at `done` is restored, and those above are at most allocated, prepared or pinned, as the kernel would "
        "have left them."
    )
    yield ""
    yield (
        "Locks are written outer to inner: those that are held at every call; `mmu_lock:r` is the read side of a "
        "lock, `:w` the write side. `-`: none on which a backend could rely. Of the locks of a VM that is being "
        "destroyed only mmu_lock is taken: it is nobody else's any more. Upstream: the "
        "kernel function or operation that the hook stands for; `RFC` and a year: a series as it was posted, `[N]`: in "
        "development, in no release when this was written."
    )
    yield ""
    for name, reason in sorted(bad.items()):
        yield from (f"Backend `{name}` could not be looked at: {reason}", "")
    yield from ("| hook | kind | locks held | implemented by |", "|---|---|---|---|")
    for hook in documented:
        link = f"[`{hook.info.name}`](#{hook.info.name})"
        yield _row(link, hook.info.kind, hook.info.locks, ", ".join(hook.implemented_by) or "-")
    yield ""
    section = ""
    for hook in documented:
        if hook.section != section:
            section = hook.section
            yield from (f"## {section[0].upper()}{section[1:]}", "")
        yield from _hook_text(hook)
    yield from _capabilities_text()
    yield from _observers_text()


def render() -> str:
    """The whole reference as Markdown. Backends that are not installed are not in it."""
    return "\n".join(_lines())


if __name__ == "__main__":
    sys.stdout.write(render())
