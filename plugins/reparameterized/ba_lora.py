"""BA-LoRA: PiSSA under three losses on outputs against inherited bias. Chang, Chang, Wu 2024, arXiv:2408.04556."""

from dataclasses import dataclass, field

from lightning_peft_plugins.reparameterized.ba_lora_loss import BALoRALoss
from lightning_peft_plugins.reparameterized.pissa import PiSSA
from torch import Tensor, nn

from lightning_peft import Step, Traits


@dataclass(frozen=True, kw_only=True)
class BALoRA(PiSSA):
    """PiSSA's adapters with the terms of ``ba_lora_loss``, whose teacher is the base as it was before the adapters.

    The base keeps its weights, so that switching the adapters off gives the pre-trained model: no second copy of it.

    Args:
        loss: a ``ba_lora_loss`` with its options; for classification ``form: nlu``.
        r: rank of the part of W that trains.
        alpha: the products are scaled by alpha / r; the layer's rank when None, which is a scale of 1 as in the paper.
        niter: subspace iterations of a randomised SVD, as in the authors' script; 0 is exact.
        targets: names, patterns or roles of the layers to adapt.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
        rank_pattern: pattern -> r for the layers it names; elsewhere r is clamped to the layer's smaller side.
        alpha_pattern: pattern -> alpha for the layers it names.
    """

    traits = Traits(
        family="reparameterized",
        paper="Chang, Chang, Wu 2024, arXiv:2408.04556",
        parameters="r * (in + out) a layer",
        hosts=("linear", "conv1d"),
        merge=True,
        quantized=True,
        needs_weights=True,
        hf="LORA:",
    )
    name: str = "ba_lora"
    r: int = 128
    niter: int = 16
    loss: BALoRALoss = field(default_factory=BALoRALoss)

    def inject(self, model: nn.Module, stats: None = None) -> None:
        super().inject(model)
        self.loss.inject(model)

    def penalty(self, model: nn.Module) -> Tensor | None:
        return self.loss.penalty(model)

    def after_step(self, model: nn.Module, step: Step) -> None:
        self.loss.after_step(model, step)

    def finish(self, model: nn.Module) -> None:
        self.loss.finish(model)

    def report(self, model: nn.Module) -> dict[str, dict[str, float]]:
        return self.loss.report(model)
