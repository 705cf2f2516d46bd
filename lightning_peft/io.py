"""The adapter folder: methods as config, trained tensors as safetensors, the base's fingerprint. Nothing is pickled.

A folder holds ``adapter.safetensors`` and ``adapter.json``. A Lightning checkpoint holds the same config under the
key ``lightning_peft`` and the same tensors in its state dict.
"""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft import biases, plain, surgery
from lightning_peft.checks import check_fingerprint, check_keys, check_shapes, fit_structure
from lightning_peft.config import FORMAT, KEY, describe, method_from, record_of, trained_names
from lightning_peft.find import exact
from lightning_peft.inject import inject, remove
from lightning_peft.method import Method

TENSORS, CONFIG = "adapter.safetensors", "adapter.json"


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    overwrite: bool = False,
    run: str = "",
    tensors: dict[str, Tensor] | None = None,
) -> Path:
    """Write the adapter folder, whole or not at all.

    Args:
        model: that ``inject`` was called on.
        folder: made if missing; replaced as a whole when ``overwrite`` or when it holds the same run.
        overwrite: replace what another run wrote.
        run: identity of the run, so that its later saves may replace its earlier ones.
        tensors: the trained tensors by state-dict key, where the model's own are only parts of them.

    Raises:
        ValueError: the folder holds another run's adapter, or something else.
    """
    folder = Path(folder)
    config = describe(model, run)
    check_folder(folder, run, overwrite)
    keep = trained_names(model)
    held, shared = _unshared({k: v for k, v in (tensors or model.state_dict()).items() if k in keep})
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(held, part / TENSORS, metadata={"format": "pt"})
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
    if inner is not None and set(inner.parameters()) == set(model.parameters()):  # else a head beside it would be lost
        if surgery.record(inner):
            plain.save(inner, part)
        elif proof.get("biases"):
            biases.save(inner, part, list(proof["biases"]))
        else:
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
    if path.is_dir():
        command = f"python -m lightning.fabric.utilities.consolidate_checkpoint {path}"
        raise ValueError(f"{path} is a folder, as of a sharded fit: make one file of it with `{command}`")
    if not path.is_file():
        raise ValueError(f"no checkpoint file at {path}")
    with complete(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict) or KEY not in checkpoint:
        raise ValueError(f"{path} was not written with lightning-peft: it has no {KEY!r} entry")
    return checkpoint


@contextlib.contextmanager
def complete(path: Any) -> Iterator[None]:
    """Say clearly that a checkpoint cannot be read to its end, in place of the many ways in which torch does."""
    try:
        yield
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as cause:
        if isinstance(cause, FileNotFoundError | PermissionError) or "GLOBAL" in str(cause):
            raise  # the last: whole, but of a class that torch must first be allowed to load
        said = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise ValueError(f"{path} is not a complete checkpoint: {said}") from cause


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
    inject(model, chosen, train=[exact(name) for name in config["train"]])
    try:
        if check_base:
            check_fingerprint(record_of(model).base, config["base"], source)
        fit_structure(model, config, source)
        check_keys(model, tensors, source)
        check_shapes(model, tensors, source)
        model.load_state_dict(tensors, strict=False)
    except Exception:
        remove(model)
        raise
    return model
