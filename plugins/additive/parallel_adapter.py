"""Parallel adapters: a scaled bottleneck beside the MLP of every block. He et al. 2021, arXiv:2110.04366."""

from dataclasses import dataclass

from lightning_peft_plugins.additive import bottleneck_places
from lightning_peft_plugins.additive.sublayers import sublayers
from torch import nn

from lightning_peft import Method, Traits


@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(Method):
    """f(x) + scale * (relu(x D^T + b_D) U^T + b_U), f a sub-layer and x what it reads (the norm's output, pre-LN).

    U starts at zero, so training starts from the base model.

    Args:
        bottleneck: size in the middle; by default the width over ``reduction_factor``.
        reduction_factor: see ``bottleneck``.
        nonlinearity: "relu", "gelu", "silu" (swish) or "tanh".
        scale: a factor (4 in the paper's summarisation and translation, 2 on GLUE), or "learned" (one) or "channel"
            (one a channel), which start at 1.
        dropout: probability behind the non-linearity.
        init_std: draw D and U from a normal distribution of this standard deviation instead, cut off at two of it.
        places: of "attention", "cross_attention" and "mlp", found by structure, in encoder and decoder.
        targets: names, patterns or roles of modules to put one beside, in place of ``places``.
        exclude: patterns of modules to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="additive",
        paper="He et al. 2021, arXiv:2110.04366",
        parameters="2 * hidden * bottleneck + bottleneck + hidden a place",
        hosts=("module",),
    )
    name: str = "parallel_adapter"
    bottleneck: int | None = None
    reduction_factor: int = 2
    nonlinearity: str = "relu"
    scale: float | str = 4.0
    dropout: float = 0.0
    init_std: float = 0.0
    places: tuple[str, ...] = ("mlp",)
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: str = ""

    def __post_init__(self) -> None:
        bottleneck_places.check(self)
        bottleneck_places.check_places(self)

    def inject(self, model: nn.Module, stats: None = None) -> None:
        make = bottleneck_places.maker(self)
        if self.targets:
            for name, width in bottleneck_places.targeted(model, self.targets, self.exclude, self.layers):
                bottleneck_places.put_beside(model, self.name, make, name, width)
            return
        for part in sublayers(model, self.places, self.name, exclude=self.exclude, layers=self.layers):
            bottleneck_places.put_parallel(model, self.name, make, part)
