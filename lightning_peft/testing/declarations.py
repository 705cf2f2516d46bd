"""Properties of what a method declares: hyper-parameters, traits, documentation, entry point, its form in YAML."""

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from torch.utils._pytree import tree_leaves, tree_map  # private: walks nested fields

from lightning_peft import registry
from lightning_peft.callback import PEFT
from lightning_peft.config import config_of, method_from
from lightning_peft.method import Method, Traits
from lightning_peft.testing.case import Case
from lightning_peft.testing.compare import Skipped, require

FAMILIES = ("reparameterized", "additive", "selective", "hybrid", "lifecycle")
KINDS = ("linear", "conv1d", "embedding", "conv", "module", "model")


def check_hyperparameters(case: Case) -> None:
    """Hyper-parameters are frozen, keyword-only plain data: repr evaluates back, and JSON gives the method back."""
    for method in case.methods():
        cls = type(method).__name__
        options = vars(type(method)).get("__dataclass_params__")  # its own, not those it inherits from Method
        require(
            bool(options and options.frozen), f"decorator of {cls}", options, "@dataclass(frozen=True, kw_only=True)"
        )
        named = [f.name for f in dataclasses.fields(method) if f.init and not f.kw_only]
        require(not named, f"fields of {cls} that are not keyword-only", named, "none")
        names = {c.__name__: c for m in nested(method) for c in [type(m)]}
        evaluated = eval(repr(method), vars(sys.modules[type(method).__module__]) | names)  # a repr of our own object
        require(evaluated == method, "the method from its repr", evaluated, method)
        config = config_of(method)
        alien = {type(v).__name__ for v in tree_leaves(config) if not isinstance(v, str | int | float | None)}
        require(not alien, f"types in the fields of {cls}", alien, "str, int, float, bool, None, lists, dicts, methods")
        if all(registry.name_of(type(m)) for m in nested(method)):
            back = method_from(json.loads(json.dumps(config)))
            require(back == method, "the method from its config as JSON", back, method)


def nested(value: Any) -> Iterator[Method]:
    """The methods in a value: itself, and those in its fields."""
    if isinstance(value, Method):
        yield value
        value = [getattr(value, f.name) for f in dataclasses.fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for v in value:
            yield from nested(v)


def check_description(case: Case) -> None:
    """Name, traits and docstrings are there, every option documented; a registered entry point gives the class."""
    for method in case.methods():
        cls = type(method)
        traits: Any = getattr(cls, "traits", None)
        require(isinstance(traits, Traits), f"{cls.__name__}.traits", traits, "an instance of Traits")
        require(traits.family in FAMILIES, "traits.family", traits.family, FAMILIES)
        unknown = [k for k in traits.hosts if k not in KINDS]
        require(bool(traits.hosts) and not unknown, "traits.hosts", traits.hosts, KINDS)
        require(method.name.isidentifier(), "its name, part of state-dict keys", method.name, "an identifier")
        doc = vars(cls).get("__doc__") or ""
        own = doc and not doc.startswith(f"{cls.__name__}(")  # dataclass writes a signature where there is no text
        require(bool(own), f"docstring of {cls.__name__}", repr(doc), "what it does, and its options under Args:")
        module = inspect.getmodule(cls)
        require(bool(module and module.__doc__), f"docstring of {cls.__module__}", None, "the method, authors, year")
        fields = [f.name for f in dataclasses.fields(method) if f.name != "name"]
        missing = [f for f in fields if not re.search(rf"\b{f}\b", doc)]
        require(not missing, f"options that the docstring of {cls.__name__} does not tell", missing, "none")
        if (name := registry.name_of(cls)) is not None:
            _check_registered(name, method)


def _check_registered(name: str, method: Method) -> None:
    cls, info = type(method), registry.describe(name)
    require(registry.load(name) is cls, f"the class of entry point {name!r}", registry.load(name), cls)
    require(not info.problem, f"reading {name!r} without importing it", info.problem, "no problem")
    written = Traits(**info.traits)
    require(written == cls.traits, "traits as source text, which must be literals", written, cls.traits)
    fields = sorted(f.name for f in dataclasses.fields(method))
    require(sorted(info.fields) == fields, "options as source text", sorted(info.fields), fields)


def check_cli(case: Case) -> None:
    """Written as YAML for the command line and read back, the methods are the same; and again from what that dumps."""
    if find_spec("jsonargparse") is None or find_spec("yaml") is None:
        raise Skipped("the command line needs jsonargparse and pyyaml: pip install 'lightning-peft[cli]'")
    import jsonargparse  # optional packages
    import yaml

    from lightning_peft.cli import names  # needs them

    methods = case.methods()
    paths = {_name(m): f"{type(m).__module__}.{type(m).__qualname__}" for method in methods for m in nested(method)}
    tree = names.in_config({"peft": {"methods": [_as_yaml(m) for m in methods]}}, paths)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PEFT, "peft")
    text = yaml.safe_dump(tree)
    for source in ("the YAML written for it", "the YAML that the command line dumps"):
        config = parser.parse_string(text)
        read: Any = parser.instantiate_classes(config)
        read = read.peft.methods
        require(read == methods, f"methods from {source}", read, methods)
        text = parser.dump(config, skip_none=False)  # as Lightning saves it: null is not the default


def _name(method: Method) -> str:
    return registry.name_of(type(method)) or type(method).__name__


def _as_yaml(method: Method) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Method):
            return _as_yaml(value)
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value

    args = {f.name: plain(getattr(method, f.name)) for f in dataclasses.fields(method)}
    return {"class_path": _name(method), "init_args": tree_map(plain, args)}
