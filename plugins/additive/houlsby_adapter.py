"""Houlsby adapters: a bottleneck behind attention and MLP of every block. Houlsby et al. 2019, arXiv:1902.00751."""

from dataclasses import dataclass
from typing import Any

from lightning_peft_plugins.additive import bottleneck_places
from lightning_peft_plugins.additive.sublayers import sublayers
from lightning_peft_plugins.selective.norm_tuning import NormTuning
from torch import nn

from lightning_peft import Method, Traits


@dataclass(frozen=True, kw_only=True)
class HoulsbyAdapter(Method):
    """h + scale * (f(h D^T + b_D) U^T + b_U), h being what a sub-layer returns, before the residual is added.

    The block's own dropout comes before it where that is a module of its own or in the sub-layer (BERT, GPT-2, T5).
    U starts at zero, so training starts from the base model.

    Args:
        bottleneck: size in the middle; by default the width over ``reduction_factor``.
        reduction_factor: see ``bottleneck``.
        nonlinearity: f, "relu", "gelu", "silu" (swish) or "tanh".
        scale: a factor, or "learned" (one) or "channel" (one a channel, as in AdapterPlus), which start at 1.
        dropout: probability behind f.
        init_std: draw D and U from a normal distribution of this standard deviation instead, cut off at two of it; the
            authors' code has 0.001, which starts near the base.
        train_norms: also train the model's normalisation layers (those of ``layers``), as the paper does.
        places: of "attention", "cross_attention" and "mlp", found by structure, in encoder and decoder.
        targets: names, patterns or roles of modules to put one behind, in place of ``places``.
        exclude: patterns of modules to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="additive",
        paper="Houlsby et al. 2019, arXiv:1902.00751",
        parameters="2 * hidden * bottleneck + bottleneck + hidden a place, and the norms",
        hosts=("module",),
    )
    name: str = "houlsby_adapter"
    bottleneck: int | None = None
    reduction_factor: int = 16
    nonlinearity: str = "gelu"
    scale: float | str = 1.0
    dropout: float = 0.0
    init_std: float = 0.0
    train_norms: bool = True
    places: tuple[str, ...] = ("attention", "mlp")
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: str = ""

    def __post_init__(self) -> None:
        bottleneck_places.check(self)
        bottleneck_places.check_places(self)

    def inject(self, model: nn.Module, stats: None = None) -> None:
        make = bottleneck_places.maker(self)
        if self.targets:
            found = bottleneck_places.targeted(model, self.targets, self.exclude, self.layers)
        else:
            parts = sublayers(model, self.places, self.name, exclude=self.exclude, layers=self.layers)
            found = [(part.ends, part.width) for part in parts]
        for name, width in found:
            bottleneck_places.put_behind(model, self.name, make, name, width)
        if self.train_norms:
            self._norms().inject(model)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        return self._norms().param_groups(model) if self.train_norms else None

    def _norms(self) -> NormTuning:
        return NormTuning(name=self.name, layers=self.layers)
