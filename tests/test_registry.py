"""Plugins by entry point: found, told apart from broken ones, and listed without importing anything slow."""

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lightning_peft_plugins.reparameterized.lora import LoRA

from lightning_peft import registry

Install = Callable[..., None]

METHOD = '''"""Nudge: adds a number. Somebody 2031, arXiv:3100.00001."""
from dataclasses import dataclass
from lightning_peft import Method, Traits

@dataclass(frozen=True, kw_only=True)
class Nudge(Method):
    """Adds r.

    Args:
        r: the number.
    """
    traits = Traits(family="additive", merge=True, hosts=("linear", "conv"), hf="")
    name: str = "nudge"
    r: int = 3
    scale: float
    def inject(self, model, stats=None): ...
'''


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a distribution on the path, as an installation would: install("pkg", "name = mod:Class", {"mod": TEXT})."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def make(package: str, entry_points: str, files: dict[str, str] | None = None) -> None:
        info = tmp_path / f"{package.replace('-', '_')}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{entry_points}\n")
        for name, text in (files or {}).items():
            file = tmp_path / f"{name}.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(textwrap.dedent(text))
        registry._all.cache_clear()

    yield make
    registry._all.cache_clear()
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_method_is_found_by_name_and_its_class_knows_its_name() -> None:
    assert registry.load("lora") is LoRA
    assert registry.name_of(LoRA) == "lora"
    assert registry.name_of(dict) is None


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no method 'lorra' is installed; nearest: .*'lora'"):
        registry.load("lorra")
    with pytest.raises(ValueError, match="no method 'qqqqqq' is installed; nearest: see `lightning-peft methods`"):
        registry.describe("qqqqqq")


def test_a_third_party_is_found_beside_ours(install: Install) -> None:
    install("nudge-peft", "nudge = nudge_mod:Nudge", {"nudge_mod": METHOD})
    assert {"lora", "nudge"} <= set(registry.names())
    cls = registry.load("nudge")
    assert cls(scale=1.0).r == 3 and registry.name_of(cls) == "nudge"


def test_what_is_told_of_a_plugin_is_read_from_its_text(install: Install) -> None:
    install("nudge-peft", "nudge = nudge_mod:Nudge", {"nudge_mod": METHOD})
    info = registry.describe("nudge")
    assert "nudge_mod" not in sys.modules
    assert info.package == "nudge-peft 1.5" and info.target == "nudge_mod:Nudge" and info.problem == ""
    assert info.summary == "Nudge: adds a number. Somebody 2031, arXiv:3100.00001."
    assert info.doc.startswith("Adds r.") and "r: the number." in info.doc
    assert info.traits == {"family": "additive", "merge": True, "hosts": ("linear", "conv"), "hf": ""}
    fields = {"name": ("str", "'nudge'"), "r": ("int", "3"), "scale": ("float", "required")}
    assert info.fields == fields


@pytest.mark.parametrize("line", ["from nudge_pkg.inner import Nudge", "from .inner import Nudge"])
def test_a_class_that_a_package_passes_on_is_read_loaded_and_known(install: Install, line: str) -> None:
    install("nudge-peft", "nudge = nudge_pkg:Nudge", {"nudge_pkg/__init__": line, "nudge_pkg/inner": METHOD})
    info = registry.describe("nudge")
    assert info.problem == "" and info.traits["family"] == "additive"
    cls = registry.load("nudge")
    assert cls.__module__ == "nudge_pkg.inner" and registry.name_of(cls) == "nudge"


def test_imports_that_lead_in_a_circle_are_told_not_followed_for_ever(install: Install) -> None:
    loop = {"one": "from two import Nudge", "two": "from one import Nudge"}
    install("loop-peft", "loop = one:Nudge", loop)
    assert "defines no class 'Nudge'" in registry.describe("loop").problem


BROKEN = {
    "fails to import": ("bad = bad_mod:Bad", {"bad_mod": "import torch\n1 / 0"}, "ZeroDivisionError: division by zero"),
    "needs what is not there": (
        "bad = bad_mod:Bad",
        {"bad_mod": "import not_there_9"},
        "No module named 'not_there_9'",
    ),
    "a module that is missing": ("bad = absent_mod:Bad", {}, "No module named 'absent_mod'"),
    "a module of a package that is missing": ("bad = bad_pkg.x:Bad", {"bad_pkg/__init__": ""}, "'bad_pkg.x'"),
    "a class that is missing": ("bad = bad_mod:Bad", {"bad_mod": ""}, "'bad_mod' has no attribute 'Bad'"),
    "no class": ("bad = bad_mod:Bad", {"bad_mod": "Bad = 3"}, "is 3, but a plugin must be a subclass of"),
    "a module in place of a class": ("bad = bad_mod", {"bad_mod": ""}, "but a plugin must be a subclass of"),
    "another class": (
        "bad = bad_mod:Bad",
        {"bad_mod": "class Bad: ..."},
        "must be a subclass of lightning_peft.Method",
    ),
    "no verbs": (
        "bad = bad_mod:Bad",
        {"bad_mod": "from lightning_peft import Method\nclass Bad(Method): ..."},
        "inject",
    ),
    "no traits": (
        "bad = bad_mod:Bad",
        {"bad_mod": "from lightning_peft import Method\nclass Bad(Method):\n    def inject(self, model, stats): ..."},
        "needs `traits = Traits",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_plugin_is_named_with_its_package_and_the_cause_and_spoils_nothing(
    install: Install, what: str
) -> None:
    entry_points, files, cause = BROKEN[what]
    install("bad-peft", entry_points, files)
    install("nudge-peft", "nudge = nudge_mod:Nudge", {"nudge_mod": METHOD})
    with pytest.raises(ValueError) as found:
        registry.load("bad")
    message = str(found.value)
    assert message.startswith("plugin 'bad' of bad-peft 1.5 (") and cause in message
    infos = {name: registry.describe(name) for name in registry.names()}
    assert not infos["nudge"].problem and not infos["lora"].problem
    assert registry.load("nudge").__name__ == "Nudge" and registry.load("lora") is LoRA


UNREADABLE = {
    "a module that is missing": ("bad = absent_mod:Bad", {}, "no module named 'absent_mod'"),
    "a module below a module": ("bad = bad_mod.deep:Bad", {"bad_mod": ""}, "no module named 'bad_mod.deep'"),
    "a syntax error": ("bad = bad_mod:Bad", {"bad_mod": "class Bad(:"}, "SyntaxError"),
    "no such class": ("bad = bad_mod:Bad", {"bad_mod": "class Good: ..."}, "bad_mod defines no class 'Bad'"),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_the_listing_says_why_a_plugin_cannot_be_read(install: Install, what: str) -> None:
    entry_points, files, problem = UNREADABLE[what]
    install("bad-peft", entry_points, files)
    info = registry.describe("bad")
    assert problem in info.problem and info.package == "bad-peft 1.5"


def test_a_name_that_two_packages_claim_is_refused_with_both_and_spoils_nothing(install: Install) -> None:
    install("nudge-peft", "nudge = nudge_mod:Nudge", {"nudge_mod": METHOD})
    install("other-peft", "nudge = other_mod:Nudge", {"other_mod": METHOD})
    both = r"'nudge' is claimed by nudge-peft 1.5 \(nudge_mod:Nudge\) and other-peft 1.5 \(other_mod:Nudge\)"
    with pytest.raises(ValueError, match=both):
        registry.load("nudge")
    assert "claimed by" in registry.describe("nudge").problem
    assert registry.load("lora") is LoRA and not registry.describe("lora").problem


def test_a_name_of_ours_cannot_be_taken_over_in_silence(install: Install) -> None:
    install("nudge-peft", "lora = nudge_mod:Nudge", {"nudge_mod": METHOD})
    with pytest.raises(ValueError, match="'lora' is claimed by lightning-peft .* and nudge-peft 1.5"):
        registry.load("lora")


def test_one_package_seen_twice_on_the_path_is_no_clash(install: Install) -> None:
    install("nudge-peft", "nudge = nudge_mod:Nudge", {"nudge_mod": METHOD})
    install("nudge-peft-again", "nudge = nudge_mod:Nudge")
    assert registry.load("nudge").__name__ == "Nudge"


def test_listing_all_methods_imports_no_torch_and_takes_a_moment() -> None:
    """User time of the process, so that a busy machine does not decide; start of Python and all methods together."""
    program = """
        import resource, sys
        from lightning_peft import registry
        infos = [registry.describe(n) for n in registry.names()]
        lora = next(i for i in infos if i.name == "lora")
        assert lora.traits["family"] == "reparameterized" and lora.traits["merge"] is True, lora.traits
        assert lora.fields["r"] == ("int", "8") and "rank of the update" in lora.doc and not lora.problem
        heavy = {"torch", "lightning", "numpy", "transformers", "lightning_peft_plugins"} & sys.modules.keys()
        print(sorted(heavy), resource.getrusage(resource.RUSAGE_SELF).ru_utime)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    heavy, seconds = run.stdout.rsplit(" ", 1)
    assert heavy == "[]"
    assert float(seconds) < 0.5
