"""huggingface/peft's adapter folder, both ways, without peft: adapter_config.json and adapter_model.safetensors.

Which fields and tensors a method has there, it says itself (``Method.to_hf``, ``Method.from_hf``, ``Traits.hf``); here
are the files, the modules trained in full beside it (modules_to_save), and the kind of task.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft import registry, surgery
from lightning_peft.arch import parents
from lightning_peft.attach import modules
from lightning_peft.config import record_of
from lightning_peft.find import exact, nearest
from lightning_peft.hf_heads import modules_to_save, task_type
from lightning_peft.hf_names import (
    check_fields,
    check_start,
    lookup,
    patterns,
    read_ranks,
    target_modules,
    targeted,
    targets,
    write_ranks,
)
from lightning_peft.inject import Record, inject, remove
from lightning_peft.method import Method

# What the plugins' to_hf and from_hf use comes from hf_names.
__all__ = ["PREFIX", "check_fields", "check_start", "load", "lookup", "patterns", "read_ranks", "save",
           "target_modules", "targets", "write_ranks"]  # fmt: skip

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def save(model: nn.Module, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write what is injected into ``model`` so that ``peft.PeftModel.from_pretrained(base, folder)`` computes the same.

    Args:
        model: that ``inject`` was called on, with one method that peft knows.
        folder: made if missing; other files in it stay.
        overwrite: replace an adapter that the folder holds.

    Raises:
        ValueError: a method or an adapter that peft does not have, weights trained in full that its modules_to_save
            cannot express, a model with parts cut out, or a folder that holds an adapter.
    """
    folder = Path(folder)
    record, method = _exported(model)
    fields, views = method.to_hf(model)
    hosts = [name for name in _by_module(model, views) if name]  # also of a method without adapters
    saved = modules_to_save(model, record.train, hosts, views)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in views.items()}
    for name in saved:
        state = model.get_submodule(name).state_dict()
        tensors |= {f"{PREFIX}{name}.{k}": v.detach().cpu().contiguous().clone() for k, v in state.items()}
    config = fields | {
        "peft_type": method.traits.hf.split(":")[0],
        "task_type": task_type(model, saved),
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
    }
    _write(folder, config | ({"modules_to_save": saved} if saved else {}), tensors, overwrite)
    return folder


def _exported(model: nn.Module) -> tuple[Record, Method]:
    """The record, and the one method that has something to export; losses and optimizer wrappers leave no trace."""
    record = record_of(model)
    if surgery.record(model):
        raise ValueError("heads or channels were cut out of this model, so peft cannot build it from the base")
    methods = [m for m in record.methods if m.traits.hf or any(m.adapters(model))]
    if unknown := [m.name for m in methods if not m.traits.hf]:
        raise ValueError(f"huggingface/peft has no counterpart of {unknown}; lightning_peft.save keeps them")
    if len(methods) != 1:
        have = [m.name for m in methods] or "none that peft knows"
        raise ValueError(f"a peft folder holds one method, this model {have}; merge the others, or save it with "
                         "lightning_peft.save")  # fmt: skip
    return record, methods[0]


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], overwrite: bool) -> None:
    if not overwrite and any((folder / name).exists() for name in (CONFIG, TENSORS)):
        raise ValueError(f"{folder} holds an adapter: choose another folder, or pass overwrite=True")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)  # so that an old config never stands beside new tensors
    parts = {name: folder / f".{name}.{os.getpid()}.part" for name in (TENSORS, CONFIG)}
    save_file(tensors, parts[TENSORS], metadata={"format": "pt"})
    parts[CONFIG].write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name, part in parts.items():
        os.replace(part, folder / name)


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Inject what a huggingface/peft folder describes and load its tensors; ``lightning_peft.save`` works from there.

    Args:
        model: the untouched base, the module that peft would wrap.
        folder: local, as written by peft's ``save_pretrained`` or by ``save``.

    Raises:
        ValueError: missing or damaged files, pickled weights, a type or an option that no installed method has, another
            base, tensors that nothing here takes; the model is left as it was.
    """
    source = str(folder)
    config, tensors = _read(Path(folder))
    cls = _plugin(config)
    base, tensors = _split(model, config, _once(tensors), source)
    below = _by_module(model, tensors)
    method = cls.from_hf(config, below, model)
    inject(model, method, train=[exact(n) for n, _ in model.named_parameters() if n in base])
    try:
        with torch.no_grad():
            _fill(method.to_hf(model)[1], tensors, source)
    except Exception:
        remove(model)
        raise
    model.load_state_dict(base, strict=False)
    _warn_of_gaps(model, config, [name for name in below if name], source)
    return model


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no folder of huggingface/peft: it has no {CONFIG}")
    if not (folder / TENSORS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise ValueError(f"{folder} holds adapter_model.bin, a pickle, which can run code as it is read; if you "
                             f"trust it, load it in peft and save_pretrained it again for {TENSORS}")  # fmt: skip
        raise ValueError(f"{folder} has no {TENSORS}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except (json.JSONDecodeError, SafetensorError) as cause:
        raise ValueError(f"{folder} is damaged or truncated: {cause}") from cause
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ValueError(f"{folder / CONFIG} names no peft_type")
    return config, {k.replace("_orig_mod.", ""): v for k, v in tensors.items()}  # a compiled model's names


def _plugin(config: dict[str, Any]) -> type[Method]:
    """The installed method that reads this type; one that asks for a field which is set goes before one that does not.

    Raises:
        ValueError: there is none, or several.
    """
    kinds = {name: str(registry.describe(name).traits.get("hf", "")) for name in registry.names()}
    split = {name: kind.partition(":") for name, kind in kinds.items() if kind and not kind.endswith(":")}
    fits = [n for n, (kind, _, field) in split.items() if kind == config["peft_type"] and config.get(field, not field)]
    fits = [n for n in fits if split[n][2]] or fits
    if len(fits) > 1:
        raise ValueError(f"the methods {fits} all read a peft_type {config['peft_type']!r} like this one")
    if not fits:
        have = ", ".join(f"{name!r} reads {kinds[name]}" for name in split)
        raise ValueError(f"no installed method reads peft_type {config['peft_type']!r}; nearest plugin: "
                         f"{nearest(config['peft_type'].lower(), registry.names(), 1)}; {have}")  # fmt: skip
    return registry.load(fits[0])


def _once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the copies that peft writes under every layer of a tensor of the whole model that they share."""
    whole = {k.removeprefix("base_model."): t for k, t in tensors.items() if not k.startswith(PREFIX)}
    above = {k: whole.get(k.rpartition(".")[2]) for k in tensors if k.startswith(PREFIX)}
    return {k: t for k, t in tensors.items() if (same := above.get(k)) is None or not torch.equal(same, t)}


def _split(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], source: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(state of the modules trained in full, by key of ``model``; the adapters' tensors, by key of the file)."""
    state, saved = model.state_dict(keep_vars=True), tuple(config.get("modules_to_save") or ())
    whole = [key for key in state if any(module.endswith(saved) for module in parents(key))]
    base: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        key = full.removeprefix(PREFIX).replace(".base_layer.", ".")
        if key not in state:  # peft leaves the prefix short around a model with a soft prompt
            key = key.removeprefix(f"{PREFIX.partition('.')[0]}.")
        if key not in state:
            rest[full] = tensor
        elif tensor.shape != state[key].shape:
            raise ValueError(f"{source}: {key!r} has shape {tuple(tensor.shape)}, but {tuple(state[key].shape)} here")
        elif key in whole:
            base[key] = tensor
        elif not torch.equal(tensor.to(state[key]), state[key]):
            # peft adds embeddings that are adapted or were resized; a load of ours writes no frozen weight
            raise ValueError(f"{source} brings other values of the frozen {key!r}: put them into the base first")
    if lacking := [key for key in whole if key not in base]:
        raise ValueError(f"{source} lacks {lacking[0]!r}, although its modules_to_save are {list(saved)}")
    for key in base:
        for twin in (k for k, v in state.items() if v is state[key] and k != key):
            if twin not in base or not torch.equal(base[twin], base[key]):
                raise ValueError(
                    f"{source} trains {key!r} apart from {twin!r}, which is tied to it here: untie the base"
                )
    return base, rest


def _by_module(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors under the innermost module of ``model`` that their key begins with, by the rest of the key."""
    names = {name for name, _ in modules(model)}
    below: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        key = full.removeprefix(PREFIX)
        module = next((p for p in parents(key) if p in names), "") if full.startswith(PREFIX) else ""
        below.setdefault(module, {})[key.removeprefix(f"{module}.")] = tensor
    return below


def _fill(views: dict[str, Tensor], tensors: dict[str, Tensor], source: str) -> None:
    """Copy the file's values into the adapters; every tensor must have its place."""
    if extra := sorted(tensors.keys() - views.keys()):
        raise ValueError(f"{source} holds {len(extra)} adapter tensors (of {len(tensors)}) that nothing here takes, "
                         f"first {extra[0]!r}; nearest {nearest(extra[0], views, 1)}. Is it another base?")  # fmt: skip
    if missing := sorted(views.keys() - tensors.keys()):
        raise ValueError(f"{source} lacks {len(missing)} of {len(views)} adapter tensors, first {missing[0]!r}")
    for key, view in views.items():
        if view.shape != tensors[key].shape:
            raise ValueError(f"{source}: {key!r} has shape {tuple(tensors[key].shape)}, but {tuple(view.shape)} here")
    for key, view in views.items():
        view.copy_(tensors[key])


def _warn_of_gaps(model: nn.Module, config: dict[str, Any], hosts: list[str], source: str) -> None:
    if config.get("target_modules") in (None, "all-linear"):
        return
    meant = {name for name, _ in modules(model) if name and targeted(config, name)}
    if gaps := sorted(meant.symmetric_difference(hosts)):
        warnings.warn(f"{source}: config and tensors disagree on {len(gaps)} modules of this model, first {gaps[0]!r}; "
                      "the tensors were followed. Is it the base that was trained on?", stacklevel=3)  # fmt: skip
