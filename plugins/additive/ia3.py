"""(IA)^3: learned vectors rescale keys, values and the MLP's inner activations. Liu et al. 2022, arXiv:2205.05638."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, Method, Traits, WeightAdapter, attach, find, hf, hosts, parts
from lightning_peft.arch import select_layers
from lightning_peft.find import exact

PLACES = ("key", "value", "mlp")
HF_FIELDS = ("feedforward_modules", "fan_in_fan_out", "init_ia3_weights")


class IA3Output(WeightAdapter):
    """``y = l * base(x)``, one factor an output, the bias's included."""

    axes = {"l": ("out",)}

    def __init__(self, host: Any, length: int, around: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.empty(length))
        self.around = around  # outputs before and after those that are scaled
        self.spatial = len(host.kernel_size) if hosts.kind(host) == "conv" else 0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.l)  # so training starts from the base model

    def scale(self) -> Tensor:
        return F.pad(self.l, self.around, value=1.0) if any(self.around) else self.l  # (out,)

    def weight(self, W: Tensor) -> Tensor:
        return self.scale()[:, None] * W

    def bias(self, b: Tensor) -> Tensor:
        return self.scale() * b

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y = base(x)
        return (y * self.scale().view(-1, *[1] * self.spatial)).to(y.dtype)  # l and the product are in float32


class IA3Fused(IA3Output):
    """The same for some of the outputs: the keys' and values' of a fused projection, whose queries stay as they are."""

    axes = {"l": ("rows",)}


class IA3Input(WeightAdapter):
    """``y = base(l * x)``, one factor an input."""

    axes = {"l": ("in",)}

    def __init__(self, host: Any, length: int) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.empty(length))
        self.groups = getattr(host, "groups", 1)
        self.spatial = len(host.kernel_size) if hosts.kind(host) == "conv" else 0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.l)

    def weight(self, W: Tensor) -> Tensor:
        blocks = W.view(self.groups, len(W) // self.groups, len(self.l) // self.groups, -1)  # (g, out/g, in/g, kernel)
        return (blocks * self.l.view(self.groups, 1, -1, 1)).view(W.shape)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return base((x * self.l.view(-1, *[1] * self.spatial)).to(x.dtype))


class IA3ConvInput(IA3Input):
    """The same on a convolution, whose matrix has kernel-many columns a channel."""

    axes = {"l": ("channels",)}


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """l * (W x + b) on key and value projections, W (l * x) + b on the last layer of each MLP; l starts at one.

    Weight decay would pull l to zero, which silences a layer, so it is off for these vectors.

    Args:
        places: which of "key", "value" and "mlp", found by structure; of encoder and decoder, cross-attention too.
        target_output: names, patterns or roles of layers whose outputs to scale, in place of ``places``.
        target_input: the same for layers whose inputs to scale.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
        whole_fused: of a projection that is queries, keys and values in one (GPT-2) scale the queries too, as
            huggingface/peft does; its folders are read so.
    """

    traits = Traits(
        family="additive",
        paper="Liu et al. 2022, arXiv:2205.05638",
        parameters="out a layer whose output is scaled, in a layer whose input is",
        hosts=("linear", "conv1d", "conv"),
        merge=True,
        hf="IA3",
    )
    name: str = "ia3"
    places: tuple[str, ...] = PLACES
    target_output: tuple[str, ...] = ()
    target_input: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: str = ""
    whole_fused: bool = False

    def __post_init__(self) -> None:
        if unknown := [p for p in self.places if p not in PLACES]:
            raise ValueError(f"unknown place {unknown[0]!r}; there are {PLACES}")
        if (self.target_output or self.target_input) and self.places != PLACES:
            raise ValueError("target_output and target_input say where, so places has no effect: give one or the other")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        if self.target_output or self.target_input:
            outputs, inputs = list(self.target_output), list(self.target_input)
        else:
            outputs, inputs = self._by_structure(model)
        rows = {} if self.whole_fused else self._fused_rows(model)
        both = {*outputs} & {*inputs}
