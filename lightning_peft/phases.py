"""Several fits in a row inside one: optimizers and schedules begin anew where a method's ``restarts`` says so."""

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_peft import optim
from lightning_peft.method import Method, Step
from lightning_peft.patch import Patches


class Phases:
    """The parts of one fit; a single one, of which nothing is to be done, where no method overrides ``restarts``.

    Args:
        trainer: of the fit.
        methods: that are injected.
        target: gives the module that holds their adapters.
        total_steps: optimizer steps of the fit, where the Trainer cannot know them.
    """

    def __init__(
        self, trainer: Trainer, methods: Sequence[Method], target: Callable[[], nn.Module], total_steps: int | None
    ) -> None:
        self.trainer, self.target, self.total = trainer, target, total_steps
        self.methods, self.asked = list(methods), [m for m in methods if type(m).restarts is not Method.restarts]
        self.at, self._ends = trainer.global_step, None

    def watch(self, pl_module: LightningModule, patches: Patches) -> None:
        """From now on ``configure_optimizers`` sees the length of the part that it is asked for."""
        if self.asked:
            patches.put(pl_module, "configure_optimizers", lambda old: lambda: self._configure(old))

    def due(self, step: int) -> bool:
        """True where a part ends with this optimizer step."""
        return step in (self._ends or ())

    def restart(self, pl_module: LightningModule) -> None:
        """New optimizers and schedules for what trains now."""
        self.at = self.trainer.global_step
        self.trainer.strategy.setup_optimizers(self.trainer)
        optim.take_over(self.trainer, pl_module, self.target(), self.methods)

    def _configure(self, configure_optimizers: Callable[[], Any]) -> Any:
        if self._ends is None:  # asked only now, since restored weights may have told how far the methods are
            self.total = optim.planned_steps(self.trainer) if self.total is None else self.total
            step, model = Step(index=self.at, planned=self.total), self.target()
            self._ends = sorted({end for m in self.asked for end in m.restarts(model, step)})
        start = max((end for end in self._ends if end <= self.at), default=0)
        end = min((end for end in self._ends if end > self.at), default=self.total)
        if end is None:
            return configure_optimizers()
        loop = self.trainer.fit_loop.epoch_loop
        before, loop.max_steps = loop.max_steps, end - start
        try:
            return configure_optimizers()
        finally:
            loop.max_steps = before
