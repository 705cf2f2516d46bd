"""AdaptFormer: a scaled ReLU bottleneck beside the MLP of every vision block. Chen et al. 2022, arXiv:2205.13535."""

from dataclasses import dataclass
from typing import Any

from lightning_peft_plugins.additive import bottleneck, bottleneck_places, sublayers
from torch import nn

from lightning_peft import Method, Traits
from lightning_peft.find import nearest

OPTIONS = ("parallel", "sequential")


@dataclass(frozen=True, kw_only=True)
class AdaptFormer(Method):
    """x + mlp(norm(x)) + scale * (dropout(relu(x D^T + b_D)) U^T + b_U): it reads the stream x, not the norm's output.

    What it adds passes no dropout or drop path of a pre-LN block. In a post-LN block x is what the MLP reads, and the
    sum goes through the norm. U starts at zero, so training starts from the base model. The paper trains the head
    along (``train``), by SGD without weight decay.

    Args:
        r: size in the middle.
        scale: a factor, or "learned" (one) or "channel" (one a channel), which start at 1.
        dropout: probability behind the ReLU.
        option: "parallel", or "sequential": the bottleneck reads and changes what the MLP returns.
        layer_norm: "none", or a layer norm of its own on what the bottleneck reads ("in") or returns ("out").
        targets: names or patterns of the norms in front of MLPs, each in a module that returns the sum (a pre-LN
            block), instead of those found by structure; with option="sequential" of MLPs.
        exclude: patterns of modules to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="additive",
        paper="Chen et al. 2022, arXiv:2205.13535",
        parameters="2 * hidden * r + r + hidden a block",
        hosts=("module",),
    )
    name: str = "adaptformer"
    r: int = 64
    scale: float | str = 0.1
    dropout: float = 0.1
    option: str = "parallel"
    layer_norm: str = "none"
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: str = ""

    def __post_init__(self) -> None:
        bottleneck_places.check_branch(self.name, self.scale, self.dropout)
        if self.r < 1:
            raise ValueError(f"{self.name}: r is at least 1, got {self.r}")
        for field, known in (("option", OPTIONS), ("layer_norm", bottleneck.NORMS)):
            if (given := getattr(self, field)) not in known:
                raise ValueError(f"{self.name}: {field} {given!r} is none of {known}; nearest: {nearest(given, known)}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        if self.targets:
            for name, width in bottleneck_places.targeted(model, self.targets, self.exclude, self.layers):
                self._on_target(model, name, width)
            return
        what = "the norms in front of MLPs (option='parallel') or the MLPs (option='sequential')"
        for part in sublayers.sublayers(model, ("mlp",), self.name, exclude=self.exclude, layers=self.layers):
            if self.option == "sequential":
                bottleneck_places.put_behind(model, self.name, self._make, part.ends, part.width)
            elif bottleneck_places.told(part, part.final, self.name, what).after:
                bottleneck_places.put_parallel(model, self.name, self._make, part)
            else:
                reads = part.before or part.reads
                bottleneck_places.put_from(model, self.name, self._make, part.width, reads, part.around)

    def _on_target(self, model: nn.Module, name: str, width: int) -> None:
        if self.option == "sequential":
            return bottleneck_places.put_behind(model, self.name, self._make, name, width)
        around = name.rpartition(".")[0]
        if not sublayers.is_norm(model.get_submodule(name)) or not around:
            raise ValueError(f"{self.name}: target {name!r} is no norm inside a block, whose input it is to read")
        bottleneck_places.put_from(model, self.name, self._make, width, name, around)

    def _make(self, cls: Any, hidden: int, *first: Any) -> bottleneck.Bottleneck:
        return cls(*first, hidden, self.r, "relu", self.scale, self.dropout, norm=self.layer_norm)
