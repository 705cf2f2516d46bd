"""Pfeiffer adapters: one bottleneck a block, behind the MLP's residual sum. Pfeiffer et al. 2020, arXiv:2005.00247."""

from dataclasses import dataclass

from lightning_peft_plugins.additive import bottleneck_places, sublayers
from lightning_peft_plugins.additive.bottleneck import Behind, BehindNorm, Bottleneck
from torch import nn

from lightning_peft import Method, Traits, attach


@dataclass(frozen=True, kw_only=True)
class PfeifferAdapter(Method):
    """norm(z + delta(norm(z))) where a norm closes the block (post-LN, BERT), z + delta(z) where none does.

    z is the MLP's output with its residual; delta(x) = scale * (f(x D^T + b_D) U^T + b_U). The block's norm is used
    twice, but the stream itself passes it once. U starts at zero, so training starts from the base model.

    Args:
        bottleneck: size in the middle; by default the width over ``reduction_factor``.
        reduction_factor: see ``bottleneck``.
        nonlinearity: f, "relu", "gelu", "silu" (swish) or "tanh".
        scale: a factor, or "learned" (one) or "channel" (one a channel, as in AdapterPlus), which start at 1.
        dropout: probability behind f.
        init_std: draw D and U from a normal distribution of this standard deviation instead, cut off at two of it.
        targets: names or patterns of modules instead of the blocks found by structure: of norms that close a post-LN
            block, or of modules whose output is z, such as whole pre-LN blocks.
        exclude: patterns of modules to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="additive",
        paper="Pfeiffer et al. 2020, arXiv:2005.00247",
        parameters="2 * hidden * bottleneck + bottleneck + hidden a block",
        hosts=("module",),
    )
    name: str = "pfeiffer_adapter"
    bottleneck: int | None = None
    reduction_factor: int = 16
    nonlinearity: str = "relu"
    scale: float | str = 1.0
    dropout: float = 0.0
    init_std: float = 0.0
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: str = ""

    def __post_init__(self) -> None:
        bottleneck_places.check(self)

    def inject(self, model: nn.Module, stats: None = None) -> None:
        make = bottleneck_places.maker(self)
        for name, width, behind in self.places(model):
            attach(model.get_submodule(name), self.name, make(behind, width))

    def places(self, model: nn.Module) -> list[tuple[str, int, type[Bottleneck]]]:
        """(module, width of the stream, class of the adapter that fits the module)."""
        if self.targets:
            found = bottleneck_places.targeted(model, self.targets, self.exclude, self.layers)
        else:
            parts = sublayers.sublayers(model, ("mlp",), self.name, exclude=self.exclude, layers=self.layers)
            what = "the norms that close its blocks, or the modules that return the sum,"
            told = [bottleneck_places.told(part, part.final, self.name, what) for part in parts]
            found = [(part.after or part.adds, part.width) for part in told]
        norms = {name for name, _ in found if sublayers.is_norm(model.get_submodule(name))}
        return [(n, width, BehindNorm if n in norms else Behind) for n, width in found]
