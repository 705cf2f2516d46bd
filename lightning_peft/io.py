"""The adapter folder: methods as config, trained tensors as safetensors, the base's fingerprint. Nothing is pickled.

A folder holds ``adapter.safetensors`` and ``adapter.json``. A Lightning checkpoint holds the same config under the
key ``lightning_peft`` and the same tensors in its state dict.
"""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft import __version__, hosts, registry, surgery
from lightning_peft.attach import Adapters, adapters, attached, detach
from lightning_peft.find import nearest
from lightning_peft.inject import Record, find_record, inject, remove
from lightning_peft.method import Method

TENSORS, CONFIG, FORMAT, KEY = "adapter.safetensors", "adapter.json", 1, "lightning_peft"


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
    record = _record(model)
    placed = {m.name: [n for n, _, _ in m.adapters(model)] for m in record.methods}
    return {
        "format": FORMAT,
        "methods": [config_of(m) for m in record.methods],
        "train": list(record.train),
        "base": record.base,
        "hosts": placed,
        "cut": surgery.record(model),
        "run": run,
        "versions": {"lightning-peft": __version__, "torch": str(torch.__version__)},
    }


def _record(model: nn.Module) -> Record:
    held = find_record(model)
    if held is None or held[0]:
        where = f"its submodule {held[0]!r} does: pass that" if held else "call lightning_peft.inject first"
        raise ValueError(f"this {type(model).__name__} holds no injected methods; {where}")
    return held[1]


def save(model: nn.Module, folder: str | Path, *, overwrite: bool = False, run: str = "") -> Path:
    """Write the adapter folder, whole or not at all.

    Args:
        model: that ``inject`` was called on.
        folder: made if missing; replaced as a whole when ``overwrite`` or when it holds the same run.
        overwrite: replace what another run wrote.
        run: identity of the run, so that its later saves may replace its earlier ones.

    Raises:
        ValueError: the folder holds another run's adapter, or something else.
    """
    folder = Path(folder)
    config = describe(model, run)
    check_folder(folder, run, overwrite)
    keep = trained_names(model)
    tensors, shared = _unshared({k: v for k, v in model.state_dict().items() if k in keep})
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(tensors, part / TENSORS, metadata={"format": "pt"})
    config |= {"shared": shared, "sha256": hashlib.sha256((part / TENSORS).read_bytes()).hexdigest()}
    (part / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    replace_folder(part, folder)
    return folder


def save_merged(model: nn.Module, folder: Path, proof: dict[str, Any]) -> dict[str, Path]:
    """Write a merged model whole: transformers' own format where it has one, else its state dict; and the proof."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    inner: Any = next((m for m in model.modules() if hasattr(m, "save_pretrained")), None)
    if inner is not None:
        inner.save_pretrained(part)
    else:
        tensors, _ = _unshared(model.state_dict())
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    (part / "merge_proof.json").write_text(json.dumps(proof, indent=1) + "\n")
    replace_folder(part, folder)
    return {"merged": folder, "proof": folder / "merge_proof.json"}


def check_folder(folder: Path, run: str, overwrite: bool = False) -> None:
    """Refuse a folder that holds results of another run, and one that cannot be written, before any work is done."""
    if not overwrite and folder.exists() and any(folder.iterdir()):
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{folder} is not empty and holds no adapter: choose another folder")
        held = json.loads((folder / CONFIG).read_text()).get("run", "")
        if not run or held != run:
            raise ValueError(f"{folder} holds another run's adapter: choose another folder, or pass overwrite=True")
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write the folder {folder}: {parent} is not a writable directory")


def replace_folder(new: Path, folder: Path) -> None:
    """Put ``new`` in the place of ``folder`` by renames; at no moment does a half-written folder bear the name."""
    for file in new.rglob("*"):
        if file.is_file():
            with file.open("rb") as f:
                os.fsync(f.fileno())
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def _unshared(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors without repeats (safetensors refuses shared memory), and which name repeats which."""
    first: dict[tuple[Any, ...], str] = {}
    shared = {}
    for name, t in tensors.items():
        same = first.setdefault((t.data_ptr(), t.shape, t.stride()) if t.numel() else (name,), name)
        if same != name:
            shared[name] = same
    return {k: v.detach().contiguous().cpu() for k, v in tensors.items() if k not in shared}, shared


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of an adapter folder, checked for wholeness.

    Raises:
        ValueError: not an adapter folder, truncated, or of a newer format.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / TENSORS).is_file():
        raise ValueError(f"{folder} is no adapter folder: it needs {CONFIG} and {TENSORS}")
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / TENSORS)
    except (json.JSONDecodeError, SafetensorError) as cause:
        raise ValueError(f"{folder} is damaged or truncated: {cause}") from cause
    if config.get("format") != FORMAT:
        raise ValueError(f"{folder} has format {config.get('format')!r}; this version reads {FORMAT}")
    if hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest() != config["sha256"]:
        raise ValueError(f"{folder / TENSORS} is not the file that {CONFIG} was written for: damaged or mixed up")
    return config, tensors | {name: tensors[same] for name, same in config["shared"].items()}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Lightning checkpoint file as a dictionary, without running code from it.

    Raises:
        ValueError: missing, truncated, or not written with lightning-peft.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint file at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as cause:
        raise incomplete(path, cause) from cause
    if not isinstance(checkpoint, dict) or KEY not in checkpoint:
        raise ValueError(f"{path} was not written with lightning-peft: it has no {KEY!r} entry")
    return checkpoint


def incomplete(path: Any, cause: Exception) -> ValueError:
    """What to raise for a checkpoint that cannot be read to its end."""
    said = next(iter(str(cause).splitlines()), type(cause).__name__)
    return ValueError(f"{path} is not a complete checkpoint: {said}")


def load(
    model: nn.Module, folder: str | Path, *, methods: Sequence[Method] | None = None, check_base: bool = True
) -> nn.Module:
    """Inject what an adapter folder describes and load its tensors.

    Args:
        model: the untouched base.
        folder: as written by ``save`` or by a fit.
        methods: in place of those the folder names, for a method without an entry point.
        check_base: refuse a base whose frozen weights are not those trained on.

    Raises:
        ValueError: wrong base, unknown method, missing or extra keys, damaged files; the model is left as it was.
    """
    config, tensors = read_folder(folder)
    return _build(model, config, tensors, str(folder), methods, check_base)


def restore(
    module: nn.Module, ckpt: str | Path, *, methods: Sequence[Method] | None = None, check_base: bool = True
) -> nn.Module:
    """Inject and load a training checkpoint into a LightningModule, without a Trainer.

    Args:
        module: as it was before the fit: the base, untouched. What lies outside the injected part is loaded as well.
        ckpt: a ``.ckpt`` that the PEFT callback took part in.
        methods, check_base, errors: as for ``load``.
    """
    checkpoint = read_checkpoint(ckpt)
    config, scope = checkpoint[KEY], checkpoint[KEY].get("scope", "")
    prefix = f"{scope}." if scope else ""
    tensors = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    target = module.get_submodule(scope)
    outside = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith(prefix)}
    _build(target, config, tensors, str(ckpt), methods, check_base)
    module.load_state_dict(outside, strict=False)
    return module


def _build(
    model: nn.Module,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    source: str,
    methods: Sequence[Method] | None,
    check_base: bool,
) -> nn.Module:
    chosen = [method_from(c) for c in config["methods"]] if methods is None else list(methods)
    inject(model, chosen, train=config["train"])
    try:
        if check_base:
            check_fingerprint(_record(model).base, config["base"], source)
        fit_structure(model, config, source)
        check_keys(model, tensors, source)
        check_shapes(model, tensors, source)
        model.load_state_dict(tensors, strict=False)
    except Exception:
        remove(model)
        raise
    return model


def check_methods(methods: Sequence[Method], config: dict[str, Any], source: str) -> None:
    """Refuse a checkpoint of other methods or other hyper-parameters, naming each difference.

    Raises:
        ValueError: with the name of the option, its value in the file and its value now.
    """
    ours, theirs = [config_of(m) for m in methods], config["methods"]
    if [c["class"] for c in ours] != [c["class"] for c in theirs]:
        have, want = ([c["method"] or c["class"] for c in cs] for cs in (theirs, ours))
        raise ValueError(f"{source} holds adapters of {have}, but this run's methods are {want}")
    for mine, other in zip(ours, theirs, strict=True):
        keys = sorted(mine["args"].keys() | other["args"].keys())
        changed = [k for k in keys if mine["args"].get(k) != other["args"].get(k)]
        if changed:
            what = ", ".join(f"{k}={other['args'].get(k)!r} there, {mine['args'].get(k)!r} now" for k in changed)
            raise ValueError(
                f"{source} was trained with other hyper-parameters of {mine['args']['name']!r}: {what}; resume with "
                "the same, or start a fresh fit from lightning_peft.load"
            )


def check_fingerprint(mine: dict[str, str | None], other: dict[str, str | None], source: str) -> None:
    """Refuse a base other than the one trained on, naming the first tensors that differ."""
    if unknown := sorted(other.keys() - mine.keys()):
        raise ValueError(f"{source} was trained on another base: it had {unknown[0]!r} ({len(unknown)} such), not here")
    differ = [k for k, v in mine.items() if v and other.get(k) and v != other[k]]
    if differ:
        raise ValueError(
            f"{source} was trained on another base: {len(differ)} of {len(mine)} frozen tensors differ in shape or "
            f"values, first {differ[0]!r}; load the base it was trained on, or pass check_base=False"
        )


def fit_structure(model: nn.Module, config: dict[str, Any], source: str) -> None:
    """Give ``model`` the structure a file was written with: cut heads and channels, adapters that were removed."""
    if config["cut"]:
        surgery.apply(model, config["cut"])
    for name, kept in config["hosts"].items():
        have = {fqn: host for fqn, host, _ in adapters(model, name)}
        if missing := sorted(set(kept) - have.keys()):
            raise ValueError(f"{source} has {name!r} on {missing[0]!r} ({len(missing)} such), where none can be here")
        for fqn in have.keys() - set(kept):
            detach(have[fqn], name)


def check_keys(model: nn.Module, keys: Any, source: str) -> None:
    """Strict on what was trained: every trained tensor must be there, and no adapter tensor may be left over."""
    want = trained_names(model)
    have = set(keys)
    if missing := sorted(want - have):
        raise ValueError(f"{source} lacks {len(missing)} of {len(want)} trained tensors, first {missing[0]!r}")
    if extra := sorted(k for k in have - set(model.state_dict()) if ".adapters." in f".{k}"):
        raise ValueError(f"{source} holds {len(extra)} adapter tensors that nothing here takes, first {extra[0]!r}")


def check_shapes(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Axes named "in" and "out" in a file must fit their host; ranks may differ."""
    for fqn, host, adapter in adapters(model):
        if hosts.kind(host) is None:
            continue
        sides: dict[str, int] = dict(zip(("out", "in"), hosts.shape(host), strict=True))
        tag = next(t for t, a in attached(host).items() if a is adapter)
        for name, axes in adapter.axes.items():
            key = f"{fqn}.adapters.{tag}.{name}" if fqn else f"adapters.{tag}.{name}"
            for axis, size in zip(axes, tensors[key].shape if key in tensors else (), strict=False):
                if sides.get(axis, size) != size:
                    raise ValueError(f"{source}: {fqn!r} has {axis}={sides[axis]}, but its adapter's {name} {size}")
