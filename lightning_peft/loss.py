"""Loss terms of methods, added to what a LightningModule's training step returns."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lightning_peft import sharded
from lightning_peft.method import Method


def with_penalties(
    pl_module: LightningModule,
    methods: Sequence[Method],
    target: Callable[[], nn.Module],
    training_step: Callable[..., Any],
) -> Callable[..., Any]:
    """The training step with the methods' terms added to its loss and logged, each as ``<name>/penalty``.

    Args:
        pl_module: whose step it is.
        methods: that have a ``penalty``.
        target: gives the module that holds the adapters.
        training_step: as the module has it.

    Raises:
        ValueError: the module takes its optimizer steps itself, so that its loss is used before it is returned.
    """
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"{[m.name for m in methods]} add a loss term, which cannot be added for you under manual optimization: in "
            "training_step do `loss = loss + lightning_peft.penalty(self)` and pass PEFT(..., own_penalty=True)"
        )

    @functools.wraps(training_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        output = training_step(*args, **kwargs)
        if output is None:
            return None
        loss = output["loss"] if isinstance(output, dict) else output
        for method in methods:
            if (term := sharded.penalty(method, target())) is not None:
                pl_module.log(f"{method.name}/penalty", term.detach())
                loss = loss + term
        return {**output, "loss": loss} if isinstance(output, dict) else loss

    return step
