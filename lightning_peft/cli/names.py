"""Methods by short name on the command line and in YAML: `LoRA` or `lora` for the full path of the class."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from lightning_peft import registry

MODE = "lightning_peft_yaml"  # parser mode: YAML in which methods go by short names
_FILES = ("--config", "-c")
_FLAG = re.compile(r"--peft\.methods(\+|\.help)?(=.*)?")


def short_names() -> tuple[dict[str, str], list[str]]:
    """(entry-point and class name -> full path of the class, problems of plugins that do not import).

    Importing every plugin makes its class known to jsonargparse; a broken one must not spoil the rest.
    """
    paths, problems = {}, []
    for name in registry.names():
        try:
            cls = registry.load(name)
        except ValueError as problem:
            problems.append(str(problem))
            continue
        paths[name] = path = f"{cls.__module__}.{cls.__qualname__}"
        paths.setdefault(cls.__name__, path)
    return paths, problems


def accept(paths: dict[str, str]) -> None:
    """Register the parser mode ``MODE``, which knows the names in ``paths``."""
    load = get_loader("yaml")

    def loader(text: str, path: str = "") -> Any:
        try:
            return in_config(load(text), paths)
        except yaml.MarkedYAMLError as cause:
            if not path:
                raise
            mark, what = cause.context_mark or cause.problem_mark, [x for x in (cause.context, cause.problem) if x]
            line = f", line {mark.line + 1}" if mark else ""
            raise ValueError(f"{path}{line}: not YAML: {', '.join(what)}") from cause

    set_loader(MODE, loader, (yaml.YAMLError,))


def in_config(tree: Any, paths: dict[str, str]) -> Any:
    """A loaded config with the short names below ``peft: methods:`` spelled out; by subcommand or not.

    Raises:
        ValueError: no method of that name is installed; the nearest is named.
    """
    if not isinstance(tree, dict):
        return tree
    peft = tree.get("peft")
    if isinstance(peft, dict) and "methods" in peft:
        return tree | {"peft": peft | {"methods": _spelled(peft["methods"], paths)}}
    return {k: in_config(v, paths) if k in ("fit", "validate", "test", "predict") else v for k, v in tree.items()}


def in_arguments(args: Sequence[str], paths: dict[str, str]) -> list[str]:
    """Command-line arguments with the values of `--peft.methods`, `--peft.methods+` and `.help` spelled out.

    Config files come first, so that options on the command line win over them wherever they stand.
    """
    files: list[str] = []
    out: list[str] = []
    before = ""
    for arg in args[1:]:
        flag = _FLAG.fullmatch(arg)
        if before in _FILES or arg in _FILES or arg.startswith("--config="):
            files.append(arg)
        elif flag and flag[2]:
            name, _, value = arg.partition("=")
            out.append(f"{name}={_value(value, paths)}")
        elif (flag := _FLAG.fullmatch(before)) and not flag[2]:
            out.append(_value(arg, paths))
        else:
            out.append(arg)
        before = arg
    return [*args[:1], *files, *out]


def _value(text: str, paths: dict[str, str]) -> str:
    """One name, or a YAML list or mapping of them."""
    tree = yaml.safe_load(text)
    if isinstance(tree, str):
        return _spelled(tree, paths)
    return yaml.safe_dump(_spelled(tree, paths), default_flow_style=True, sort_keys=False, width=10**6).strip()


def _spelled(value: Any, paths: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_spelled(v, paths) for v in value]
    if isinstance(value, dict):
        return {k: _spelled(v, paths) if k == "class_path" else _nested(v, paths) for k, v in value.items()}
    if not isinstance(value, str) or "." in value:
        return value
    if value not in paths:
        near = difflib.get_close_matches(value, paths, 2, cutoff=0.4)
        hint = f"nearest: {', '.join(map(repr, near))}" if near else "see `lightning-peft methods`"
        raise ValueError(f"peft.methods: no method {value!r} is installed; {hint}")
    return paths[value]


def _nested(value: Any, paths: dict[str, str]) -> Any:
    """Options of a method may be methods themselves, but then as mappings; plain strings are left alone."""
    if isinstance(value, dict):
        return _spelled(value, paths)
    return [_nested(v, paths) for v in value] if isinstance(value, list) else value
