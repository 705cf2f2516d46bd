"""Every row of the zoo against every check of the conformance suite, and nothing of a method left out of the house."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_peft import registry
from lightning_peft.method import Method
from lightning_peft.testing import parametrize_with_checks
from lightning_peft.testing.declarations import nested
from tests.test_house import LONGEST_FILE
from tests.zoo import ROWS

ROOT = Path(__file__).parent.parent
PACKAGE = "lightning_peft_plugins"  # what pyproject.toml calls the folder plugins/
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
METHODS: dict[str, str] = PROJECT["entry-points"][registry.GROUP]
SOURCES = {p.relative_to(ROOT / "plugins"): p.read_text() for p in sorted((ROOT / "plugins").rglob("*.py"))}
FILES = [p for p, text in SOURCES.items() if re.search(r"^    traits = ", text, re.M)]  # the files that define a method
SHARED = [p for p in SOURCES if p not in FILES and p.name != "__init__.py"]


@parametrize_with_checks(ROWS, processes=True)
def test_conformance(check: Callable[[], None]) -> None:
    check()


# ---- a method is its file, an entry point, a zoo row, a config and a line in the changelog -------------------------


def module_of(file: Path) -> str:
    return ".".join([PACKAGE, *file.with_suffix("").parts])


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_plugin_file_has_an_entry_point(file: Path) -> None:
    known = {target.partition(":")[0] for target in METHODS.values()}
    assert module_of(file) in known, f"pyproject.toml names no {module_of(file)}:CLASS"


@pytest.mark.parametrize("file", SHARED, ids=str)
def test_a_plugin_file_without_a_method_serves_several_that_have_one(file: Path) -> None:
    """Or one that would be too long with it."""
    package, _, name = module_of(file).rpartition(".")
    line = rf"^from ({re.escape(package)} import .*\b{name}\b|{re.escape(module_of(file))} import )"
    users = [str(p) for p in FILES if re.search(line, SOURCES[p], re.M)]
    together = sum(SOURCES[Path(p)].count("\n") for p in (str(file), *users))
    assert len(users) > 1 or (users and together > LONGEST_FILE), (
        f"{file} defines no method (no `traits = `), and only {users} import from it"
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_named_in_snake_case_and_comes_from_a_file_here(name: str) -> None:
    module = METHODS[name].partition(":")[0]
    assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
    assert Path(*module.removeprefix(f"{PACKAGE}.").split(".")).with_suffix(".py") in FILES


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_row_in_the_zoo(name: str) -> None:
    made = [row.method() for row in ROWS]
    methods = [m for one in made for m in nested([one] if isinstance(one, Method) else list(one))]
    assert METHODS[name] in {f"{type(m).__module__}:{type(m).__qualname__}" for m in methods}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_config_that_names_it(name: str) -> None:
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    words = (name, METHODS[name].rpartition(":")[2])
    assert any(re.search(rf"\b{w}\b", line) for w in words for line in text.splitlines() if not line.startswith("#"))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_line_in_the_changelog(name: str) -> None:
    lines = [x for x in (ROOT / "CHANGELOG.md").read_text().splitlines() if x.startswith("- ")]
    assert any(f"`{name}`" in x for x in lines), f"CHANGELOG.md needs a line such as: - `{name}`: what it is."
