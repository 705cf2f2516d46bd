"""Start-up and run-time checks: nothing is lost in silence."""

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_peft.method import Method


class Sentinel:
    """Watches one fit. ``PEFT`` calls its methods; each check names what is wrong and what would work.

    Args:
        methods: that are injected.
        steps: optimizer steps to watch adapters for; 0 switches the run-time checks off.
    """

    def __init__(self, methods: list[Method], steps: int) -> None:
        self.methods, self.steps = methods, steps

    def check_trainer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before injection: clashes with strategies, plugins and callbacks."""

    def check_model(self, trainer: Trainer, pl_module: LightningModule, model: nn.Module) -> None:
        """At the start of a fit, optimizers built: coverage, frozen heads, gradient checkpointing."""

    def after_backward(self, trainer: Trainer, model: nn.Module) -> None:
        """Before an optimizer step in the first steps: gradients reach the adapters."""

    def after_step(self, trainer: Trainer, model: nn.Module) -> None:
        """After an optimizer step in the first steps: adapters move, and agree between ranks."""
