"""The optimizer and learning-rate schedule that the models here share."""

import math
from functools import partial
from typing import Any, Literal

from lightning.pytorch import LightningModule
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["linear", "cosine", "constant"]


def adamw(
    module: LightningModule, learning_rate: float, weight_decay: float, warmup_ratio: float, schedule: Schedule
) -> dict[str, Any]:
    """What `configure_optimizers` returns: AdamW over the parameters that require gradients, and a schedule by step.

    The rate rises linearly over the first `warmup_ratio` of the run's optimizer steps, then falls to zero by the end
    along a line or a half cosine, or stays. ValueError if nothing is trained, or the run has no end to plan for.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(f"no parameter of {type(module).__name__} requires gradients, so there is nothing to train")
    optimizer = AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
    total = module.trainer.estimated_stepping_batches
    if math.isinf(total) and (warmup_ratio > 0 or schedule != "constant"):
        raise ValueError(
            f"schedule={schedule!r} with warmup_ratio={warmup_ratio} needs the length of the run: give the Trainer "
            "max_steps or max_epochs, or use schedule='constant' and warmup_ratio=0"
        )
    warmup = 0 if math.isinf(total) else round(warmup_ratio * total)
    rate = LambdaLR(optimizer, partial(factor, warmup=warmup, total=total, schedule=schedule))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


def factor(step: int, warmup: int, total: float, schedule: Schedule) -> float:
    """The share of the full rate at an optimizer step, counted from 0; never 0 before `total`, so no step is idle."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    left = max(total - step, 0) / max(total - warmup, 1)
    return left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
