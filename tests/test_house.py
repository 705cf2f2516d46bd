"""The house rules that a program can check: imports, layers, lengths, characters. Source text is read, not imported."""

import ast
import functools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = sorted((ROOT / "lightning_peft").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))
OURS = [*CORE, *PLUGINS, *sorted((ROOT / "tests").glob("*.py")), *sorted((ROOT / "examples").rglob("*.py"))]

LONGEST_FILE, LONGEST_FUNCTION, WIDEST_LINE = 260, 40, 120
PRAGMA = re.compile(r"\s*# (pyright|type|noqa|fmt)\b.*")  # for tools; ruff does not count it either
LIGHTNING = ("lightning", "pytorch_lightning")
# A lower layer never imports a higher one; modules of one layer may.
LAYERS = [
    ("methods", "patch", "quant", "registry", "resume", "watch"),
    ("hosts",),
    ("adapter",),
    ("attach", "resize"),
    ("arch", "find", "importance", "method", "padding", "parts", "schedule", "slices"),
    ("inject", "merge", "proof", "quantize", "reads", "surgery"),
    ("biases", "checks", "config", "hf", "hf_heads", "hf_names", "io", "plain"),
    ("calibration", "ckpt", "history", "optim", "phases", "preflight", "report", "sentinel", "sharded", "strategies"),
    ("loss", "passes", "placement"),
    ("callback",),
    ("data", "models", "testing"),
    ("cli",),
    ("__main__",),
]
# What may be imported inside a function: packages that are optional, and what needs them.
OPTIONAL = {
    "bitsandbytes", "datasets", "jsonargparse", "matplotlib", "peft", "pytest", "tensorboard", "transformers", "yaml",
    "lightning_peft.cli.names",  # needs jsonargparse
}  # fmt: skip
# Files whose work it is to know a method: huggingface/peft's format has LoRA's names in it.
NAME_METHODS = {"hf.py", "hf_names.py", "hf_heads.py"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(p): p for p in CORE}


def imported(node: ast.AST, path: Path) -> list[str]:
    """Full names that an import statement may mean: the module, and each name in it."""
    if isinstance(node, ast.Import):
        return [a.name for a in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{name_of(path)}:{node.lineno} imports relatively"
        full = [f"{node.module}.{a.name}" for a in node.names]
        return full if set(full) <= MODULES.keys() else [str(node.module), *full]
    return []


def at_import_time(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: not in functions, not under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_import_time(child)


def needs(path: Path) -> set[str]:
    """Modules of the core that importing this one imports; `from package import submodule` means the submodule."""
    own = module_of(path)
    named = {n for node in at_import_time(tree(path)) for n in imported(node, path)}
    return {n for n in named if n in MODULES and n != own and n != "lightning_peft"}


def test_no_import_cycle_in_the_core() -> None:
    graph = {name: needs(path) for name, path in MODULES.items()}
    while ready := [n for n, wants in graph.items() if not wants & graph.keys()]:
        for n in ready:
            del graph[n]
    assert not graph, f"each of these waits for another: { {n: sorted(w & graph.keys()) for n, w in graph.items()} }"


def layer(module: str) -> int:
    top = module.split(".")[1]
    found = [i for i, names in enumerate(LAYERS) if top in names]
    assert found, f"{module} is in no layer of tests/test_house.py: put it where it belongs"
    return found[0]


@pytest.mark.parametrize("module", [m for m in MODULES if m != "lightning_peft"])
def test_dependencies_point_down(module: str) -> None:
    upwards = sorted(n for n in needs(MODULES[module]) if layer(n) > layer(module))
    assert not upwards, f"{module} imports {upwards}, of a higher layer"


def test_what_methods_see_of_the_core_does_not_know_lightning() -> None:
    """A method knows PyTorch and the contract; what it imports, to the last module, never imports Lightning."""
    seen: set[str] = set()
    todo = {n for p in PLUGINS for node in ast.walk(tree(p)) for n in _from_core(node, p)}
    while todo:
        seen |= todo
        todo = {n for m in todo for n in needs(MODULES[m])} - seen
    heavy = [m for m in seen if any(_package(n) in LIGHTNING for n in _all_imports(MODULES[m]))]
    assert "lightning_peft.method" in seen and not heavy
    assert not [name_of(p) for p in PLUGINS if any(_package(n) in LIGHTNING for n in _all_imports(p))]


def _package(name: str) -> str:
    return name.split(".")[0]


def _all_imports(path: Path) -> list[str]:
    return [n for node in ast.walk(tree(path)) for n in imported(node, path)]


def _from_core(node: ast.AST, path: Path) -> set[str]:
    """Modules that a plugin's `from lightning_peft import X` comes from, by the package's lazy table."""
    table = next(n for n in tree(MODULES["lightning_peft"]).body if isinstance(n, ast.Assign) and _is_home(n))
    home = ast.literal_eval(table.value)
    names = [n.removeprefix("lightning_peft.") for n in imported(node, path) if n.startswith("lightning_peft.")]
    return {f"lightning_peft.{home.get(n, n)}" for n in names} & MODULES.keys()


def _is_home(node: ast.Assign) -> bool:
    return isinstance(node.targets[0], ast.Name) and node.targets[0].id == "_HOME"


@pytest.mark.parametrize("path", [*CORE, *PLUGINS], ids=name_of)
def test_imports_stand_at_the_top_but_for_optional_packages(path: Path) -> None:
    functions = [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {n for f in functions for node in ast.walk(f) for n in imported(node, path)[:1]}
    hidden = sorted(n for n in inside if n not in OPTIONAL and _package(n) not in OPTIONAL)
    assert not hidden, f"imported inside a function: {hidden}"


@pytest.mark.parametrize("path", [p for p in CORE if p.name not in NAME_METHODS], ids=name_of)
def test_the_core_names_no_method(path: Path) -> None:
    """No class, file or entry point of plugins/ in code or in strings that are not docstrings."""
    classes = {n.name for p in PLUGINS for n in tree(p).body if isinstance(n, ast.ClassDef)}
    names = classes | {p.stem for p in PLUGINS if "    traits = " in p.read_text()}
    docs = {id(c) for n in ast.walk(tree(path)) for c in _docstring(n)}
    found = set()
    for node in ast.walk(tree(path)):
        words = {
            ast.Name: lambda n: [n.id],
            ast.Attribute: lambda n: [n.attr],
            ast.alias: lambda n: n.name.split("."),
            ast.Constant: lambda n: [n.value] if isinstance(n.value, str) and id(n) not in docs else [],
        }.get(type(node), lambda n: [])(node)
        found |= {f"{getattr(node, 'lineno', '?')}: {w}" for w in words if w in names}
    assert not found


def _docstring(node: ast.AST) -> list[ast.AST]:
    body = getattr(node, "body", None)
    first = body[0] if isinstance(body, list) and body else None
    return [first.value] if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) else []


def test_every_package_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    inits = (module_of(p) for p in [*CORE, *PLUGINS] if p.name == "__init__.py")
    assert sorted(listed) == sorted(f"lightning_peft_{n}" if n.split(".")[0] == "plugins" else n for n in inits)


@pytest.mark.parametrize("path", [*CORE, *PLUGINS], ids=name_of)
def test_files_of_the_package_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines < LONGEST_FILE


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_functions_are_short(path: Path) -> None:
    functions = [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [f"{f.name}: {_length(f)} lines" for f in functions if _length(f) >= LONGEST_FUNCTION]


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of code: without the docstring, with what stands before it."""
    doc = ast.get_docstring(function, clean=False)
    return int(function.end_lineno or 0) - function.lineno + 1 - (len(doc.splitlines()) if doc else 0)


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_files_are_ascii_and_lines_not_too_wide(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert line.isascii(), f"line {number}: {line!r}"
        width = len(PRAGMA.sub("", line))
        assert width <= WIDEST_LINE, f"line {number} has {width} columns"
