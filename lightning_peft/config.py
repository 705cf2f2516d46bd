"""What was injected into a model as plain data: in the adapter folder, in checkpoints, and back to methods."""

import dataclasses
import sys
from typing import Any

import torch
from torch import nn

from lightning_peft import __version__, registry, surgery
from lightning_peft.attach import Adapters, attached
from lightning_peft.find import nearest
from lightning_peft.inject import Record, find_record
from lightning_peft.method import Method

FORMAT, KEY = 1, "lightning_peft"  # KEY: where a Lightning checkpoint holds what ``describe`` returns


def trained_names(model: nn.Module) -> set[str]:
    """State-dict keys of what was trained: adapter tensors, trained base parameters and their modules' buffers."""
    names: set[str] = set()
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, Adapters):
            names |= {prefix + k for k in module.state_dict(keep_vars=True)}
        if any(p.requires_grad for p in own.values()):
            persistent = module.state_dict(keep_vars=True)
            buffers = [b for b, _ in module.named_buffers(recurse=False) if b in persistent]
            names |= {prefix + n for n, p in own.items() if p.requires_grad} | {prefix + b for b in buffers}
    return names


def config_of(method: Method) -> dict[str, Any]:
    """A method as plain data: its entry-point name and its fields, methods in fields included."""
    args = {f.name: _plain(getattr(method, f.name)) for f in dataclasses.fields(method)}
    name = registry.name_of(type(method))
    return {"method": name, "class": f"{type(method).__module__}:{type(method).__qualname__}", "args": args}


def _plain(value: Any) -> Any:
    if isinstance(value, Method):
        return config_of(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def method_from(config: dict[str, Any]) -> Method:
    """The method a config describes, looked up by entry point; nothing is imported by path from a file.

    Raises:
        ValueError: the method is not installed, was never registered, or does not know an option.
    """
    if config["method"] is None:
        raise ValueError(f"{config['class']} is not registered as an entry point, so pass it: load(..., methods=[...])")
    cls = registry.load(config["method"])
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := set(config["args"]) - known:
        hints = ", ".join(f"{u!r} (nearest: {nearest(u, known)})" for u in sorted(unknown))
        raise ValueError(f"method {config['method']!r} as installed has no option {hints}; was it another version?")
    return cls(**{k: _value(v) for k, v in config["args"].items()})


def _value(v: Any) -> Any:
    if isinstance(v, dict):
        return method_from(v) if {"method", "args"} <= v.keys() else {k: _value(x) for k, x in v.items()}
    return tuple(_value(x) for x in v) if isinstance(v, list) else v


def describe(model: nn.Module, run: str = "") -> dict[str, Any]:
    """The config of what is injected into ``model``, as plain data; the same in a folder and in a checkpoint."""
    record = record_of(model)
    return {
        "format": FORMAT,
        "methods": [config_of(m) for m in record.methods],
        "train": list(record.train),
        "base": record.base,
        "hosts": placed(model),
        "cut": surgery.record(model),
        "pretrained": _pretrained(model),
        "run": run,
        "versions": {"lightning-peft": __version__, "torch": str(torch.__version__)},
    }


def placed(model: nn.Module) -> dict[str, list[str]]:
    """Tag -> modules that carry an adapter under it; a method made of others has several tags."""
    found: dict[str, list[str]] = {m.name: [] for m in record_of(model).methods}
    for name, module in model.named_modules():
        for tag in attached(module):
            found.setdefault(tag, []).append(name)
    return found


def _pretrained(model: nn.Module) -> dict[str, Any] | None:
    """Where a transformers model lies in ``model``, its class, source and labels: what making the base again takes."""
    for at, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        if hasattr(module, "save_pretrained") and hasattr(config, "name_or_path"):
            cls = next(c for c in type(module).__mro__ if hasattr(c, "save_pretrained") and _can_be_named(c))
            labels = [name for _, name in sorted((getattr(config, "id2label", None) or {}).items())]
            return {"at": at, "class": cls.__name__, "source": config.name_or_path, "labels": labels}
    return None


def _can_be_named(cls: type) -> bool:
    """False for the classes that adapting and sharding make at run time and put in front of the model's own."""
    return getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls


def record_of(model: nn.Module) -> Record:
    """The record kept on ``model`` itself.

    Raises:
        ValueError: nothing was injected into it, or into a submodule instead.
    """
    held = find_record(model)
    if held is None or held[0]:
        where = f"its submodule {held[0]!r} does: pass that" if held else "call lightning_peft.inject first"
        raise ValueError(f"this {type(model).__name__} holds no injected methods; {where}")
    return held[1]
