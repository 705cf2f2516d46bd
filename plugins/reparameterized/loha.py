"""LoHa: the Hadamard product of two low-rank matrices. Hyeon-Woo et al. 2021 (FedPara), arXiv:2108.06098.

As an adapter: Yeh et al. 2023 (LyCORIS), arXiv:2309.14859.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_peft_plugins.reparameterized import dense, lycoris, ranks
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, Method, Traits, WeightAdapter, attach, hf, hosts


class LoHaLinear(WeightAdapter):
    """``y = base(x) + scale * ((B1 A1) * (B2 A2)) x``, on Linear, transformers' Conv1D and convolutions."""

    axes = {"A1": ("rank", "in"), "B1": ("out", "rank"), "A2": ("rank", "in"), "B2": ("out", "rank")}

    def __init__(self, host: Any, r: int, scale: float) -> None:
        super().__init__()
        out, fan_in = hosts.shape(host)
        self.A1, self.A2 = (nn.Parameter(torch.empty(r, fan_in)) for _ in "12")
        self.B1, self.B2 = (nn.Parameter(torch.empty(out, r)) for _ in "12")
        self.scale = scale
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for p in self.parameters():
            nn.init.kaiming_uniform_(p, a=math.sqrt(5))  # U(-1/sqrt(columns), 1/sqrt(columns))
        nn.init.zeros_(self.A2)  # so training starts from the base model

    @property
    def r(self) -> int:
        return len(self.A1)

    def rows(self) -> tuple[Tensor, Tensor]:
        """A1 and A2, (r, in) each."""
        return self.A1, self.A2

    def change(self) -> Tensor:
        A1, A2 = self.rows()
        return (self.scale * self.B1 @ A1) * (self.B2 @ A2)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.change()

    def forward(self, base: Base, x: Tensor) -> Tensor:
        out, fan_in = hosts.shape(base.host)
        if self.r**2 * (out + fan_in) > out * fan_in or getattr(base.host, "groups", 1) > 1:
            return dense.forward(base, self.change, x)
        y = base(x)
        return y + self.update(base.host, x).to(y.dtype)

    def update(self, host: Any, x: Tensor) -> Tensor:
        """The same by factors of rank r^2, all products of two rows and of two columns: for r small enough cheaper."""
        A1, A2 = self.rows()
        A = (A1[:, None] * A2 * self.scale).flatten(0, 1).to(x.dtype)  # (r^2, in)
        B = (self.B1[:, :, None] * self.B2[:, None]).flatten(1).to(x.dtype)  # (out, r^2)
        if hosts.kind(host) != "conv":
            return F.linear(F.linear(x, A), B)
        sides = [1] * len(host.kernel_size)
        h = host._conv_forward(x, A.view(-1, *host.weight.shape[1:]), None)  # private, but it honours padding_mode
        return (F.conv1d, F.conv2d, F.conv3d)[len(sides) - 1](h, B.view(*B.shape, *sides))

    def to_hf(self, name: str, host: Any) -> dict[str, Tensor]:
        """The factors under peft's names and in its shapes, as views."""
        return {"hada_w1_a": self.B1, "hada_w1_b": self.A1, "hada_w2_a": self.B2, "hada_w2_b": self.A2}


class LoHaCore(LoHaLinear):
    """On a convolution: A1 and A2 are (r, in / groups), each behind a core (r, r, kernel)."""

    axes = LoHaLinear.axes | {
        "A1": ("rank", "channels"),
        "A2": ("rank", "channels"),
        "T1": ("rank", "rank", "kernel"),
        "T2": ("rank", "rank", "kernel"),
    }

    def __init__(self, host: Any, r: int, scale: float) -> None:
        super().__init__(host, r, scale)
        self.A1, self.A2 = (nn.Parameter(torch.empty(r, host.weight.shape[1])) for _ in "12")
        self.T1, self.T2 = (nn.Parameter(torch.empty(r, r, lycoris.kernel(host))) for _ in "12")
        self.reset_parameters()

    def rows(self) -> tuple[Tensor, Tensor]:
        return lycoris.through_core(self.T1, self.A1), lycoris.through_core(self.T2, self.A2)

    def to_hf(self, name: str, host: Any) -> dict[str, Tensor]:
        flat = {k: t.T if k.endswith("a") else t for k, t in super().to_hf(name, host).items()}
        return flat | {f"hada_t{i}": lycoris.core_to_hf(T, host) for i, T in ((1, self.T1), (2, self.T2))}


@dataclass(frozen=True, kw_only=True)
class LoHa(Method):
    """W + scale * (B1 A1) * (B2 A2), the two products multiplied entry by entry: of rank up to r^2.

    Args:
        r: rank of each of the two products.
        alpha: the update is scaled by alpha / r.
        core: on convolutions with a kernel beyond 1x1, factors over channels with a core tensor for the kernel's places
            (FedPara's proposition 3, peft's use_effective_conv2d), not over channels times places.
        targets: names, patterns or roles of the layers to adapt; convolutions by name.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
        rank_pattern: pattern -> r for the layers it names, taken as it is; elsewhere r is clamped to the smaller side.
        alpha_pattern: pattern -> alpha for the layers it names.
    """

    traits = Traits(
        family="reparameterized",
        paper="Hyeon-Woo, Ye-Bin, Oh 2021, arXiv:2108.06098",
        parameters="2 * r * (in + out) a layer, in = channels / groups * kernel for a conv",
        hosts=("linear", "conv1d", "conv"),
        merge=True,
        quantized=True,
        hf="LOHA",
    )
    name: str = "loha"
    r: int = 8
    alpha: float = 8.0
    core: bool = False
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks.check(self)

    def inject(self, model: nn.Module, stats: None = None) -> None:
        cores = 0
        for _, host, r, alpha in ranks.places(self, model):
            cls = LoHaCore if self.core and lycoris.kernel(host) > 1 else LoHaLinear
            attach(host, self.name, cls(host, r, alpha / r))
            cores += cls is LoHaCore
        if self.core and not cores:
            raise ValueError("LoHa's core=True has no effect: no target is a convolution with a kernel beyond 1x1")

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return lycoris.to_hf(self, model)

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "LoHa":
        hf.check_fields(config, lycoris.HF_FIELDS, "loha")
        held = {name: len(t["hada_w1_b"]) for name, t in tensors.items() if "hada_w1_b" in t}
        return cls(core=any("hada_t1" in t for t in tensors.values()), **lycoris.from_hf(config, model, held))
