"""What ModelParallelStrategy (FSDP2) needs: adapters sharded with their layers, files that hold only what was trained.

Each process holds a part of every tensor. Injection therefore comes before ``configure_model`` shards the network, and
whatever leaves the process is gathered first.
"""

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_peft import checks, ckpt, io
from lightning_peft.config import KEY, placed, trained_names
from lightning_peft.inject import find_record
from lightning_peft.method import Method
from lightning_peft.patch import Patches

METADATA = "meta.pt"  # Lightning's name for what is no tensor in the folder of a distributed checkpoint
HOW = "for layer in self.net.layers: fully_shard(layer, mesh=self.device_mesh['data_parallel'])"


def check(trainer: Trainer, pl_module: LightningModule, methods: Sequence[Method]) -> None:
    """Before injection: what this strategy needs, and what adapters cannot do under it.

    Raises:
        ValueError: naming what is missing.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if not is_overridden("configure_model", pl_module):  # asked here, for our patch would hide it from the strategy
        raise ValueError(
            f"ModelParallelStrategy shards nothing by itself: make the network in {type(pl_module).__name__}.__init__ "
            f"and shard it in configure_model, with {HOW}"
        )
    if (size := strategy.device_mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"tensor_parallel_size={size} splits the matrices of layers, and adapters do not follow that: use "
            "ModelParallelStrategy(data_parallel_size=<devices>, tensor_parallel_size=1)"
        )
    looking = [m.name for m in methods if m.calibrates]
    if looking and trainer.state.fn == "fit":
        raise ValueError(
            f"{looking} calibrate on whole weights, and ModelParallelStrategy shards them before data can be read: use "
            "one device or strategy='ddp'"
        )


def check_whole(model: nn.Module) -> None:
    """Adapters on layers that are sharded already would stay whole: their gradients would not be averaged."""
    if name := next((n for n, p in model.named_parameters() if isinstance(p, DTensor)), None):
        raise ValueError(
            f"{name!r} was sharded before methods could be injected: make the network in the LightningModule's "
            f"__init__, and only shard it in configure_model, with {HOW}"
        )


def check_covered(trainer: Trainer, pl_module: LightningModule) -> None:
    """At the start of a fit: everything that trains must be sharded, or its gradients would not be averaged."""
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return
    whole = [n for n, p in pl_module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if whole:
        raise ValueError(
            f"{len(whole)} trainable tensors, first {whole[0]!r}, lie outside of what configure_model shards, so that "
            "each process would train its own: call fully_shard on a module that holds them too"
        )


def gather(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors of ``model``, each whole; to be called on every rank."""
    keep = trained_names(model)
    return {k: _whole(v) for k, v in model.state_dict().items() if k in keep}


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def penalty(method: Method, model: nn.Module) -> Tensor | None:
    """The method's loss term as a plain tensor; its gradient lands on every rank's part of the parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # some layers are gathered after a forward, and a sum over both kinds would fail
    term = method.penalty(model)
    return term if term is None else _whole(term)


def patch(trainer: Trainer, pl_module: LightningModule, patches: Patches) -> None:
    """Let the strategy's checkpoints hold only what was trained, be checked before they are loaded, and be whole."""
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return

    def state_dict(old: Callable[..., Any]) -> Callable[..., Any]:
        def trained_state_dict() -> dict[str, Any]:
            with _only_trained(pl_module):
                return old()

        return trained_state_dict

    def load(old: Callable[..., Any]) -> Callable[..., Any]:
        def load_trained(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
            path = Path(strategy.broadcast(checkpoint_path))
            _check_file(path, trainer, pl_module, weights_only)
            with _only_trained(pl_module), _optimizers_of_a_fit(trainer):
                return old(path, weights_only) | {"state_dict": {}}  # the values are in the model by now

        return load_trained

    patches.put(strategy, "lightning_module_state_dict", state_dict)
    patches.put(strategy, "load_checkpoint", load)
    patches.put(strategy, "save_checkpoint", functools.partial(_renamed_when_whole, trainer, strategy))


def _renamed_when_whole(trainer: Trainer, strategy: ModelParallelStrategy, old: Callable[..., Any]) -> Any:
    """Distributed checkpoints are folders, written beside their name and renamed."""

    def save(checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if not strategy._save_distributed_checkpoint:  # private: nothing else says so
            return old(checkpoint, filepath, storage_options)
        path = Path(strategy.broadcast(filepath))
        part = path.with_name(f".{path.name}.part")
        if trainer.is_global_zero:
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        strategy.barrier()
        old(checkpoint, part, storage_options)
        strategy.barrier()
        if trainer.is_global_zero:
            io.replace_folder(part, path)
        strategy.barrier()

    return save


@contextlib.contextmanager
def _only_trained(pl_module: LightningModule) -> Iterator[None]:
    """The module's state dict without the frozen base: so torch neither gathers nor asks a file for it."""
    held = find_record(pl_module)
    keeps = ckpt.keeps(pl_module, held[0]) if held else lambda key: True

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for key in [k for k in state if not keeps(k)]:
            del state[key]

    handle = pl_module.register_state_dict_post_hook(drop)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _optimizers_of_a_fit(trainer: Trainer) -> Iterator[None]:
    """Without those of an earlier fit when testing: a file may hold no state for them."""
    held = trainer.strategy.optimizers
    if trainer.state.fn != "fit":
        trainer.strategy.optimizers = []
    try:
        yield
    finally:
        trainer.strategy.optimizers = held


def _check_file(path: Path, trainer: Trainer, pl_module: LightningModule, weights_only: bool | None) -> None:
    """All that ``ckpt.check`` asks for, and that shapes are those here, since sharded tensors cannot change theirs."""
    checkpoint = _read(path, weights_only)
    held = find_record(pl_module)
    assert held is not None
    scope, record = held
    model, source = pl_module.get_submodule(scope), str(path)
    if trainer.state.fn == "fit":
        _check_optimizers(path, checkpoint)
    if config := checkpoint.get(KEY):
        checks.check_methods(record.methods, config, source)
        if config["cut"] or config["hosts"] != placed(model):
            raise ValueError(
                f"{source} is of a model whose layers or adapters were removed in its fit, which a sharded model "
                "cannot follow: use one device or strategy='ddp'"
            )
    ckpt.check(checkpoint, model, record, scope)
    mine = {k: v.shape for k, v in pl_module.state_dict().items()}
    for key, value in checkpoint["state_dict"].items():
        if key in mine and value.shape != mine[key]:
            raise ValueError(
                f"{source} has {key!r} of shape {tuple(value.shape)}, here it is {tuple(mine[key])}: shapes changed in "
                "its fit, which a sharded model cannot follow: use one device or strategy='ddp'"
            )


def _check_optimizers(path: Path, checkpoint: dict[str, Any]) -> None:
    if "lr_schedulers" not in checkpoint:
        raise ValueError(f"{path} holds weights only, so no fit can be resumed from it; validate and test can use it")
    none, first = any(not s["state"] for s in checkpoint["optimizer_states"]), checkpoint["global_step"] == 0
    if none and (first or path.is_file()):  # both end in an error deep inside of torch
        raise ValueError(
            f"{path} holds no state of its optimizer, which "
            + ("had not stepped yet: start afresh" if first else "keeps none: use save_distributed_checkpoint=True")
        )


def _read(path: Path, weights_only: bool | None) -> dict[str, Any]:
    """A checkpoint; of a distributed one only the shapes, on the meta device, and the keys of optimizer states.

    Raises:
        ValueError: no checkpoint, or not a complete one.
    """
    if not path.exists():
        raise ValueError(f"no checkpoint at {path}")
    folder = path.is_dir()
    with io.complete(path):
        checkpoint = torch.load(path / METADATA if folder else path, "cpu", weights_only=weights_only, mmap=not folder)
        if folder:
            metadata = FileSystemReader(path).read_metadata().state_dict_metadata
            tensors = {k: m.size for k, m in metadata.items() if isinstance(m, TensorStorageMetadata)}
            at = "state_dict."
            shapes = {k.removeprefix(at): torch.empty(s, device="meta") for k, s in tensors.items() if k.startswith(at)}
            states = [k for k in metadata if k.startswith("optimizer_") and ".state." in k]
            checkpoint |= {"state_dict": shapes, "optimizer_states": [{"state": states}]}
    return checkpoint
