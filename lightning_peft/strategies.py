"""What differs between Lightning's strategies: re-wrapping after a shape change, adapter-only state, atomic files."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from lightning_peft import io


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a file under its own name is always whole.

    Lightning's default goes through the system's temporary folder, which on another disk ends in a plain copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path) or storage_options is not None:
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        with part.open("wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        where: Callable[..., Any] = map_location or (lambda storage, loc: storage)
        with io.complete(path):
            return super().load_checkpoint(path, where, weights_only)


def use_atomic_files(trainer: Trainer) -> None:
    """Replace Lightning's own default checkpoint writer; a writer that the user chose stays."""
    strategy = trainer.strategy
    if hasattr(strategy, "checkpoint_io") and type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()


def can_change_shapes(trainer: Trainer) -> bool:
    """True for strategies that ``rewrap`` serves."""
    return isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy)


def layout(model: nn.Module) -> list[tuple[int, int]]:
    """(identity, size) of what trains: DDP must be wrapped anew also where others train, of the same sizes."""
    return [(id(p), p.numel()) for p in model.parameters() if p.requires_grad]


def difference(before: list[tuple[int, int]], after: list[tuple[int, int]]) -> str:
    """What changed between two layouts, in words: "144 -> 96 trainable parameters, 33 % fewer"."""
    old, new = (sum(n for _, n in shapes) for shapes in (before, after))
    share = f", {abs(new - old) / old:.0%} {'fewer' if new < old else 'more'}".replace("%", " %") if old != new else ""
    return f"{old:,} -> {new:,} trainable parameters{share}"


def rewrap(trainer: Trainer, pl_module: LightningModule) -> None:
    """Wrap the module anew after parameters changed shape: DDP's buckets were laid out for the old ones."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy.model = pl_module
        strategy.configure_ddp()


def shards(trainer: Trainer) -> bool:
    """True where a process does not hold whole parameters, so that merging and saving must gather them first."""
    return not can_change_shapes(trainer)
