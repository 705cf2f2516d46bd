"""SAM: the gradient from the worst point nearby, taken at the weights. Foret et al. 2020, arXiv:2010.01412."""

from dataclasses import dataclass

import torch
from lightning_peft_plugins.lifecycle import sharpness
from torch import nn
from torch.optim import Optimizer

from lightning_peft import Method, Passes, Step, Traits


@dataclass(frozen=True, kw_only=True)
class SAM(Method):
    """Beside other methods: their optimizer steps from w with the gradient at w + rho * g / |g|, g being that at w.

    g is the gradient of everything that trains as one vector. Each batch runs forward and backward twice, so a step
    costs about two; logged values, running statistics and metrics of torchmetrics are those of the first pass. In an
    accumulation window each batch moves the weights on its own account, as each process does under DDP unless
    ``sync_perturbation``. Clipping and weight decay act on the final gradient. Loss scaling (16-mixed), manual
    optimization and ModelParallelStrategy are refused.

    Args:
        rho: distance of the second pass's weights. With ``adaptive`` about ten times as large, 0.5 to 2.
        adaptive: ASAM (Kwon et al. 2021, arXiv:2102.11600), rho * w^2 * g / | |w| * g |, which does not change when
            weights are rescaled. Weights at zero, such as LoRA's B before the first step, do not move.
        replay_rng: draw the same dropout masks in both passes. The reference codes draw new ones.
        sync_perturbation: move along the mean gradient of all processes, for one more exchange of gradients a batch.
    """

    traits = Traits(
        family="lifecycle",
        paper="Foret et al. 2020, arXiv:2010.01412",
        parameters="none of its own",
        hosts=("model",),
        merge=True,
    )
    name: str = "sam"
    rho: float = 0.05
    adaptive: bool = False
    replay_rng: bool = False
    sync_perturbation: bool = False

    def __post_init__(self) -> None:
        sharpness.check_radius(self.name, rho=self.rho)

    def inject(self, model: nn.Module, stats: None = None) -> None:
        """Nothing: what other methods let train is what moves."""

    def wrap_optimizer(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        return sharpness.check(self.name, optimizer)

    @torch.no_grad()
    def after_backward(self, model: nn.Module, step: Step, passes: Passes) -> None:
        if self.sync_perturbation:
            passes.average()
        parameters = sharpness.moved(step)
        if not parameters:
            return
        direction = g = sharpness.gradients(parameters)
        length = sharpness.norm(g)
        if self.adaptive:
            length = sharpness.norm([p.abs() * d for p, d in zip(parameters, g, strict=True)])
            direction = [p.square() * d for p, d in zip(parameters, g, strict=True)]
        with sharpness.returning(parameters) as w:
            sharpness.move(parameters, w, direction, self.rho / (length + sharpness.EPS))
            highest = passes.again(replay=self.replay_rng)
        sharpness.tell(self, model, sharpness=highest - passes.loss)

    def report(self, model: nn.Module) -> dict[str, dict[str, float]]:
        return sharpness.told(self, model)
