"""The Lightning checkpoint: what goes in beside what Lightning puts there, and what must hold before it is used."""

import types
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_peft import checks, resume
from lightning_peft.config import KEY, describe, trained_names
from lightning_peft.inject import Record, find_record
from lightning_peft.resume import Tape


def on_save_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
    """The LightningModule's hook, for as long as methods are injected: ``trainer.save_checkpoint`` after a fit too."""
    type(self).on_save_checkpoint(self, checkpoint)
    if held := find_record(self):
        fit = next((c for c in self.trainer.callbacks if hasattr(c, "tape")), None)  # type: ignore[attr-defined]
        fill(checkpoint, self.trainer, self, held[0], getattr(fit, "run", ""), getattr(fit, "tape", None))


def hook(pl_module: LightningModule) -> None:
    """Let every checkpoint of the module pass through ``on_save_checkpoint`` above; as a method, so copies keep it."""
    pl_module.on_save_checkpoint = types.MethodType(on_save_checkpoint, pl_module)


def fill(
    checkpoint: dict[str, Any], trainer: Trainer, pl_module: LightningModule, scope: str, run: str, tape: Tape | None
) -> None:
    """Drop the frozen base from the state dict and add config, random states and the place in the data.

    Args:
        checkpoint: changed in place; a full one holds optimizer states, a weights-only one does not.
        trainer: whose fit it is.
        pl_module: whose checkpoint it is.
        scope: name of the submodule where methods were injected, "" for the module itself.
        run: identity of the run.
        tape: of the training loaders, None outside a fit.
    """
    kept = keeps(pl_module, scope)
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if kept(k)}
    checkpoint[KEY] = describe(pl_module.get_submodule(scope), run) | {"scope": scope}
    if tape and ("optimizer_states" in checkpoint or not trainer.strategy.lightning_restore_optimizer):
        open_window = trainer.fit_loop.epoch_loop._should_accumulate()  # private: no public way to ask
        grads = resume.open_gradients(pl_module) if open_window else {}  # not yet summed over ranks
        checkpoint[KEY] |= {"state": of_all_ranks(tape.state() | {"gradients": grads})}


def keeps(pl_module: LightningModule, scope: str) -> Callable[[str], bool]:
    """Whether a checkpoint keeps a key of the module's state dict: all but the frozen base below ``scope``."""
    model, prefix = pl_module.get_submodule(scope), f"{scope}." if scope else ""
    keep = trained_names(model) | {n for n, _ in model.named_buffers()}
    return lambda k: not k.startswith(prefix) or k.removeprefix(prefix) in keep or k.endswith("_extra_state")


def of_all_ranks(state: Any) -> list[Any]:
    """What every process has of it, by rank; called on all of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [state]
    states = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def check(checkpoint: dict[str, Any], model: nn.Module, record: Record, scope: str) -> dict[str, Any]:
    """Refuse a checkpoint of other methods, hyper-parameters or another base; give ``model`` its structure.

    Returns:
        the config it was written with.

    Raises:
        ValueError: naming what differs; before anything was loaded.
    """
    if KEY not in checkpoint:
        raise ValueError(
            "the checkpoint was written without lightning-peft: it holds no adapters. To start from its weights, load "
            "them into the module before the fit (load_state_dict) and pass no ckpt_path"
        )
    config = checkpoint[KEY]
    source = "the checkpoint"
    if config["scope"] != scope:
        raise ValueError(f"{source} was written with PEFT(model={config['scope']!r}), not model={scope!r}")
    checks.check_methods(record.methods, config, source)
    checks.check_fingerprint(record.base, config["base"], source)
    checks.fit_structure(model, config, source)
    prefix = f"{scope}." if scope else ""
    tensors = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    if tensors:  # a sharded strategy has loaded them already and hands over none
        checks.check_keys(model, tensors, source)
        checks.check_shapes(model, tensors, source)
    return config
