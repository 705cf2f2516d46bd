"""BSAM: flat minima, seen from the worst and the best point nearby. Deng et al. 2024, arXiv:2409.13173."""

from dataclasses import dataclass

import torch
from lightning_peft_plugins.lifecycle import sharpness
from torch import nn
from torch.optim import Optimizer

from lightning_peft import Method, Passes, Step, Traits


@dataclass(frozen=True, kw_only=True)
class BSAM(Method):
    """Beside other methods: their optimizer steps from w with g_max + g_0 - (|g_max| / |g_min|) * g_min.

    g_0 is the gradient at w, of everything that trains as one vector; g_max that at w + rho * g_0 / |g_0|, g_min that
    at w - rho_min * g_0 / |g_0|. Each batch runs forward and backward three times, so a step costs about three; logged
    values, running statistics and metrics of torchmetrics are those of the first pass. In an accumulation window each
    batch moves the weights on its own account, as each process does under DDP unless ``sync_perturbation``. Clipping
    and weight decay act on the final gradient. Loss scaling (16-mixed), manual optimization and ModelParallelStrategy
    are refused. The authors' code goes on from the lowest point instead of w, by an overwritten copy; here w is put
    back.

    Args:
        rho: distance uphill.
        rho_min_max: distance downhill at the highest learning rate of the first parameter group, or without a schedule.
        rho_min_min: distance downhill where the learning rate is ``lr_min``, linear in between.
        lr_min: the learning rate that the schedule ends at.
        ratio_clip: upper bound of |g_max| / |g_min|; None for none.
        replay_rng: draw the same dropout masks in all passes. The authors' code draws new ones.
        sync_perturbation: use the mean gradients of all processes, for three more exchanges of gradients a batch.
    """

    traits = Traits(
        family="lifecycle",
        paper="Deng et al. 2024, arXiv:2409.13173",
        parameters="none of its own",
        hosts=("model",),
        merge=True,
    )
    name: str = "bsam"
    rho: float = 0.05
    rho_min_max: float = 0.05
    rho_min_min: float = 0.0
    lr_min: float = 0.0
    ratio_clip: float | None = None
    replay_rng: bool = False
    sync_perturbation: bool = False

    def __post_init__(self) -> None:
        sharpness.check_radius(
            self.name, rho=self.rho, rho_min_max=self.rho_min_max, rho_min_min=self.rho_min_min, lr_min=self.lr_min
        )
        if self.rho_min_min > self.rho_min_max:
            raise ValueError(
                f"{self.name}: rho_min falls from rho_min_max={self.rho_min_max} to rho_min_min={self.rho_min_min}, "
                "which is larger"
            )
        if self.ratio_clip is not None and not self.ratio_clip > 0:
            raise ValueError(f"{self.name}: ratio_clip is above 0, such as 2.0, or None, got {self.ratio_clip}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        """Nothing: what other methods let train is what moves."""

    def wrap_optimizer(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        return sharpness.check(self.name, optimizer)

    def rho_min(self, step: Step) -> float:
        """The distance downhill at this step's learning rate."""
        group = step.optimizers[0].param_groups[0]
        rate, highest = float(group["lr"]), float(group.get("max_lr", group.get("initial_lr", group["lr"])))
        share = (rate - self.lr_min) / (highest - self.lr_min) if highest > self.lr_min else 1.0
        return self.rho_min_min + (self.rho_min_max - self.rho_min_min) * min(max(share, 0.0), 1.0)

    @torch.no_grad()
    def after_backward(self, model: nn.Module, step: Step, passes: Passes) -> None:
        def gradients() -> sharpness.Direction:
            if self.sync_perturbation:
                passes.average()
            return sharpness.gradients(parameters)

        if self.sync_perturbation:
            passes.average()
        parameters = sharpness.moved(step)
        if not parameters:
            return
        g_0 = sharpness.gradients(parameters)
        length = sharpness.norm(g_0) + sharpness.EPS
        with sharpness.returning(parameters) as w:
            sharpness.move(parameters, w, g_0, self.rho / length)
            highest, g_max = passes.again(replay=self.replay_rng), gradients()
            sharpness.move(parameters, w, g_0, -self.rho_min(step) / length)
            lowest, g_min = passes.again(replay=self.replay_rng), gradients()
        ratio = sharpness.norm(g_max) / (sharpness.norm(g_min) + sharpness.EPS)
        if self.ratio_clip is not None:
            ratio = ratio.clamp(max=self.ratio_clip)
        for p, up, here, down in zip(parameters, g_max, g_0, g_min, strict=True):
            p.grad = up + here - ratio * down
        sharpness.tell(self, model, max_sharpness=highest - passes.loss, min_sharpness=passes.loss - lowest)

    def report(self, model: nn.Module) -> dict[str, dict[str, float]]:
        return sharpness.told(self, model)
