"""GaLore: full weights trained with moments of a projected gradient. Zhao et al. 2024, arXiv:2403.03507."""

from dataclasses import dataclass

from lightning_peft_plugins.lifecycle import projected, projectors
from torch import nn
from torch.optim import Optimizer

from lightning_peft import Method, Step, Traits


@dataclass(frozen=True, kw_only=True)
class GaLore(Method):
    """W moves by scale * P N Q, with N the user's optimizer's step on R = P^T G Q^T and G the gradient of the weight.

    Any optimizer of torch that needs gradients alone serves; its moments have the shape of R. Weight decay of AdamW and
    the like shrinks the whole weight by lr * weight_decay, unscaled; that of Adam or SGD joins G before the projection.
    ``gradient_clip_val`` clips the norm over the projected gradients (and whatever else trains), which is at most that
    of the full ones. Gradients of an accumulation window are projected once, summed. Needs whole gradients: one device
    or DDP.

    Args:
        r: rank of the projection, at most the weight's smaller side.
        update_proj_gap: optimizer steps after which the projectors are taken anew from the gradient.
        scale: the projected step is multiplied by it, a factor on the learning rate. The authors: 0.25 to pre-train, 4
            on GLUE.
        proj_type: "std" projects the smaller side, "reverse_std" the larger, "left" the outputs, "right" the inputs,
            "full" both.
        svd: "full", or "randomized": subspace iteration on r + 8 random vectors, for large weights.
        on_refresh: moments with a new projector: "keep" as they are (the authors), "reset" to zero, or "rotate" the
            first ones into the new basis.
        targets: names, patterns or roles of the layers whose weights train so.
        exclude: patterns of layers to leave out.
        layers: blocks to train in, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
        rest: patterns of further parameters that train, by the optimizer as it is: "*" for everything else.
    """

    traits = Traits(
        family="lifecycle",
        paper="Zhao et al. 2024, arXiv:2403.03507",
        parameters="the targets' own; moments of r * max(out, in) and a projector of r * min(out, in) a weight",
        hosts=("linear", "conv1d"),
        merge=True,  # the trained weights are the model's own
        quantized=False,
    )
    name: str = "galore"
    r: int = 8
    update_proj_gap: int = 200
    scale: float = 0.25
    proj_type: str = "std"
    svd: str = "full"
    on_refresh: str = "keep"
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""
    rest: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        projectors.check(self)

    def inject(self, model: nn.Module, stats: None = None) -> None:
        projected.train(self, model)

    def wrap_optimizer(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        return projected.claim(self, optimizer, model)

    def before_step(self, model: nn.Module, step: Step) -> None:
        projected.enter(self, step, lambda G, state: projectors.refreshed(self, step.index, G, state))

    def report(self, model: nn.Module) -> dict[str, dict[str, float]]:
        return projected.told(self, model, kept_gradient="kept")
