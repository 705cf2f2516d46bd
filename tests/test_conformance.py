"""Every row of the zoo against every check of the conformance suite, and nothing of a method left out of the house."""

import tomllib
from pathlib import Path

import pytest

from lightning_peft import registry
from lightning_peft.method import Method
from lightning_peft.testing import parametrize_with_checks
from tests.zoo import ROWS

ROOT = Path(__file__).parent.parent
GROUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][registry.GROUP]
FILES = sorted(p for p in (ROOT / "plugins").rglob("*.py") if p.name != "__init__.py")


@parametrize_with_checks(ROWS, processes=True)
def test_conformance(check) -> None:
    check()
