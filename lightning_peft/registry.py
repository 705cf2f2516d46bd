"""Methods by entry point, listed without importing them (and without importing torch)."""

import ast
import contextlib
import difflib
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GROUP = "lightning_peft.methods"


@dataclass(frozen=True)
class Info:
    """What is known of a plugin from its metadata and source text alone.

    Args:
        name: entry-point name.
        package: distribution that brings it, with its version.
        target: "module:Class".
        summary: first sentence of the module's docstring.
        doc: docstring of the class.
        traits: the literals of its ``Traits(...)``.
        fields: hyper-parameter -> (type, default) as source text.
        problem: why it cannot be read, "" if it can.
    """

    name: str
    package: str
    target: str
    summary: str = ""
    doc: str = ""
    traits: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, tuple[str, str]] = field(default_factory=dict)
    problem: str = ""


@functools.cache
def _all() -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: (e.name, e.value)))


def entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    """Entry points of the group by name; two packages with one name are an error when the name is asked for."""
    return {ep.name: ep for ep in _all()}


def _package(ep: importlib.metadata.EntryPoint) -> str:
    return f"{ep.dist.name} {ep.dist.version}" if ep.dist else "an unknown package"


def names() -> list[str]:
    return sorted(entry_points())


def nearest_class(name: str) -> str:
    """Class names of installed methods like ``name``, as text for a message."""
    near = difflib.get_close_matches(name, [ep.attr for ep in _all() if ep.attr], 3, cutoff=0.4)
    return ", ".join(map(repr, near)) if near else "see `lightning-peft methods`"


def _entry_point(name: str) -> importlib.metadata.EntryPoint:
    found = [ep for ep in _all() if ep.name == name]
    if len({ep.value for ep in found}) > 1:
        who = " and ".join(sorted(f"{_package(ep)} ({ep.value})" for ep in found))
        raise ValueError(f"the method name {name!r} is claimed by {who}: uninstall one, or rename its entry point")
    if not found:
        near = difflib.get_close_matches(name, names(), 3, cutoff=0.4)
        hint = ", ".join(map(repr, near)) if near else "see `lightning-peft methods`"
        raise ValueError(f"no method {name!r} is installed; nearest: {hint}")
    return found[0]


def load(name: str) -> type[Any]:
    """The Method class behind an entry-point name.

    Raises:
        ValueError: unknown name (nearest named), two packages claim it, it does not import, or it is no whole Method.
    """
    ep = _entry_point(name)
    where = f"plugin {name!r} of {_package(ep)} ({ep.value})"
    try:
        cls = ep.load()
    except Exception as cause:  # whatever a third party's import raises must not hide which plugin it was
        raise ValueError(f"{where} cannot be imported: {type(cause).__name__}: {cause}") from cause
    if not (inspect.isclass(cls) and any(c.__module__ == "lightning_peft.method" for c in cls.__mro__)):
        raise ValueError(f"{where} is {cls!r}, but a plugin must be a subclass of lightning_peft.Method")
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise ValueError(f"{where} is abstract: it has to write {', '.join(missing)}")
    if not hasattr(cls, "traits"):
        raise ValueError(f"{where} says nothing of itself: it needs `traits = Traits(family=..., ...)`")
    return cls


def name_of(cls: type) -> str | None:
    """The entry-point name of a Method class, None for one that is not registered."""
    exact = [ep.name for ep in _all() if ep.value == f"{cls.__module__}:{cls.__qualname__}"]
    passed_on = [
        ep.name  # a package that imports the class from the file that defines it, and names itself as its home
        for ep in _all()
        if ep.attr == cls.__qualname__ and getattr(sys.modules.get(ep.module), ep.attr, None) is cls
    ]
    return next(iter(exact + passed_on), None)


def describe(name: str) -> Info:
    """Read a plugin's source for its summary, traits and options. A plugin that cannot be read says why."""
    try:
        ep = _entry_point(name)
    except ValueError as clash:
        if name not in entry_points():
            raise
        return Info(name, "", entry_points()[name].value, problem=str(clash))
    info: dict[str, Any] = {"name": name, "package": _package(ep), "target": ep.value}
    try:
        home, module, cls = _find_class(ep.module, ep.attr)
    except (OSError, SyntaxError, ImportError, ValueError) as cause:  # ValueError: no text in UTF-8
        return Info(**info, problem=f"{type(cause).__name__}: {cause}")
    summary = (ast.get_docstring(module) or ast.get_docstring(cls) or "").strip().split("\n")[0]
    traits, fields = _with_bases(home, cls)
    return Info(**info, summary=summary, doc=ast.get_docstring(cls) or "", traits=traits, fields=fields)


def _find_class(module: str, name: str, hops: int = 4) -> tuple[str, ast.Module, ast.ClassDef]:
    """Module, its syntax and the class's, through `from x import name` in the modules between."""
    spec = _spec(module)
    tree = ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, tree, node
        if isinstance(node, ast.ImportFrom) and hops:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    package = module if spec.submodule_search_locations is not None else module.rpartition(".")[0]
                    home = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                    return _find_class(home, alias.name, hops - 1)
    raise ImportError(f"{module} defines no class {name!r} at its top level")


def _spec(module: str) -> importlib.machinery.ModuleSpec:
    """Where a module's source is, found without running the packages above it."""
    top, *rest = module.split(".")
    spec, path = importlib.util.find_spec(top), top
    for part in rest:
        path += f".{part}"
        if spec is None or spec.submodule_search_locations is None:
            break
        spec = importlib.machinery.PathFinder.find_spec(path, list(spec.submodule_search_locations))
    if spec is None or spec.name != module or spec.origin is None:
        raise ImportError(f"no module named {module!r}")
    return spec


def _with_bases(home: str, cls: ast.ClassDef) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
    """Traits and fields of a class, what it inherits included, as far as its bases are named by plain imports."""
    traits: dict[str, Any] = {}
    fields: dict[str, tuple[str, str]] = {}
    for base in cls.bases:
        if isinstance(base, ast.Name) and base.id != "Method":
            with contextlib.suppress(ImportError, OSError):  # typing.Generic and the like
                where, _, inherited = _find_class(home, base.id)
                more = _with_bases(where, inherited)
                traits, fields = more[0] | traits, more[1] | fields
    own = _read(cls)
    return own[0] or traits, fields | own[1]


def _read(cls: ast.ClassDef) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
    traits: dict[str, Any] = {}
    fields: dict[str, tuple[str, str]] = {}
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name, value = node.target.id, node.value
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
        else:
            continue
        if name == "traits" and isinstance(value, ast.Call):
            traits = {k.arg: _literal(k.value) for k in value.keywords if k.arg}
        elif isinstance(node, ast.AnnAssign):
            fields[name] = (ast.unparse(node.annotation), ast.unparse(value) if value else "required")
    return traits, fields


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
