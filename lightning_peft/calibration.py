"""Let methods look at training batches before they are injected."""

import itertools
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import track
from torch import Tensor, nn

from lightning_peft.method import Method
from lightning_peft.patch import Patches


def run(
    trainer: Trainer, pl_module: LightningModule, model: nn.Module, methods: list[Method], batches: int
) -> dict[str, Any]:
    """What each method's ``calibrate`` returns, by method name.

    Batches come from the fit's own training loader; the random state, the training loop and what the module logs are
    untouched by it.

    Args:
        trainer: before its strategy is set up.
        pl_module: whose training step gives the loss.
        model: to calibrate on, without adapters, its parameters as the user left them.
        methods: those that do not override ``calibrate`` are passed over.
        batches: largest number of training batches to look at.
    """
    chosen = [m for m in methods if type(m).calibrate is not Method.calibrate]
    quiet = Patches()
    quiet.put(pl_module, "log", lambda old: lambda *args, **kwargs: None)
    quiet.put(pl_module, "log_dict", lambda old: lambda *args, **kwargs: None)
    pl_module.to(trainer.strategy.root_device)
    stats: dict[str, Any] = {}
    try:
        for method in chosen:
            with isolate_rng(), torch.enable_grad():
                trainer.fit_loop.setup_data()
                loader: Any = trainer.train_dataloader
                shown = track(
                    itertools.islice(loader, batches), f"calibrating {method.name}", total=batches, transient=True
                )
                on_device = (trainer.strategy.batch_to_device(b) for b in shown)
                stats[method.name] = method.calibrate(model, on_device, lambda batch: _loss(pl_module, batch))
            pl_module.zero_grad()
    finally:
        quiet.undo()
    return stats


def _loss(pl_module: LightningModule, batch: Any) -> Tensor:
    output: Any = pl_module.training_step(batch, 0)
    return output["loss"] if isinstance(output, dict) else output
