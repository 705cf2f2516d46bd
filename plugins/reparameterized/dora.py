"""DoRA: a trained norm for every output, and LoRA for the direction. Liu et al. 2024, arXiv:2402.09353."""

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_peft_plugins.reparameterized import ranks
from lightning_peft_plugins.reparameterized.lora import LoRAConv, LoRAEmbedding, LoRALinear
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, Method, Traits, attach, hosts
from lightning_peft.attach import attached


class DoRALinear(LoRALinear):
    """``y = m / n * (W + scale * B A) x + bias`` with n (out,) the row norms of that matrix, on Linear and Conv1D."""

    axes = LoRALinear.axes | {"m": ("out",)}

    def __init__(self, base: Base, r: int, scale: float, dropout: float, init: str) -> None:
        super().__init__(base.host, r, scale, dropout, init)
        self.m = nn.Parameter(self.norms(base.weight))  # one factor is zero, so m / n starts at exactly 1

    def weight(self, W: Tensor) -> Tensor:
        V = super().weight(W)
        n = torch.linalg.vector_norm(V.detach(), dim=1)  # a constant for autograd (section 4.3)
        return (self.m / _positive(n))[:, None] * V

    @torch.no_grad()
    def norms(self, W: Tensor) -> Tensor:
        """The same n by its parts, without the (out, in) sum. That of W is not kept: surgery and merging change it."""
        A, B = self.factors()
        own = torch.linalg.vector_norm(W, dim=1, dtype=torch.promote_types(W.dtype, B.dtype)).square()
        cross = (F.linear(W, A.to(W.dtype)).to(B.dtype) * B).sum(1)  # <W A^T, B> by rows
        added = (B @ (A @ A.T) * B).sum(1)
        return _positive(own + 2 * self.scale * cross + self.scale**2 * added).sqrt()

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y, bias, W, dropped = base(x), base.bias, base.weight, self.dropped(x)
        one_input = not (self.training and self.dropout) and base.maps_weight
        plain = y if one_input else hosts.run(base.host, W, dropped, bias)
        if bias is not None:
            plain = plain - self.along(bias, base.host).to(y.dtype)  # m does not scale it
        ratio = self.along(self.m / self.norms(W), base.host)
        update = self.update(base.host, dropped).to(y.dtype)
        return y + (ratio - 1).to(y.dtype) * plain + ratio.to(y.dtype) * update  # ratio - 1 rounds late: it is small

    def along(self, t: Tensor, host: Any) -> Tensor:
        """(out,) in a shape that multiplies the host's output."""
        return t

    def to_hf(self, name: str, host: Any) -> dict[str, Tensor]:
        return super().to_hf(name, host) | {"lora_magnitude_vector": self.m}


def _positive(n: Tensor) -> Tensor:
    """A row of zeros has m = 0 and stays at 0, not at 0 / 0."""
    return n.clamp(min=torch.finfo(n.dtype).tiny)


class DoRAEmbedding(DoRALinear, LoRAEmbedding):
    """One norm for each embedding dimension, over the vocabulary. A starts at zero, B is drawn; no dropout."""


class DoRAConv(DoRALinear, LoRAConv):
    """One norm for each output channel."""

    def along(self, t: Tensor, host: Any) -> Tensor:
        return t.view(-1, *[1] * len(host.kernel_size))

    def to_hf(self, name: str, host: Any) -> dict[str, Tensor]:
        return super().to_hf(name, host) | {"lora_magnitude_vector": self.along(self.m, host)[None]}


@dataclass(frozen=True, kw_only=True)
class DoRA(Method):
    """m / n * (W + scale * B A) on every target, m the trained and n the present norm of every output's weights.

    The authors advise half of LoRA's rank and a slightly lower learning rate.

    Args:
        r: rank of the update.
        alpha: the update is scaled by alpha / r.
        rslora: scale by alpha / sqrt(r) instead.
        dropout: probability on the input of all that the adapter adds, at the price of a second product with W.
        init: of A: "default" (Kaiming uniform) or "gaussian" (standard deviation 1 / r). B starts at zero.
        targets: names, patterns or roles of the layers to adapt; embeddings and convolutions by name.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
        rank_pattern: pattern -> r for the layers it names, taken as it is; elsewhere r is clamped to the smaller side.
        alpha_pattern: pattern -> alpha for the layers it names.
    """

    traits = Traits(
        family="reparameterized",
        paper="Liu et al. 2024, arXiv:2402.09353",
        parameters="r * (in + out) + out a linear layer or embedding; r * in * kernel + out * r + out a conv",
        hosts=("linear", "conv1d", "embedding", "conv"),
        merge=True,
        quantized=True,
        needs_weights=True,
        hf="LORA:use_dora",
    )
    name: str = "dora"
    r: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dropout: float = 0.0
    init: str = "default"
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks.check(self)
        ranks.check_draw(self)

    def inject(self, model: nn.Module, stats: None = None) -> None:
        kinds = {"embedding": DoRAEmbedding, "conv": DoRAConv}
        for name, host, r, alpha in ranks.places(self, model):
            if getattr(host, "groups", 1) > 1:
                raise ValueError(f"{name}: DoRA adapts convolutions of one group, this has {host.groups}; exclude it")
            base = Base(host)
            for below in attached(host).values():
                base = Base(host, base, below)
            cls = kinds.get(hosts.kind(host) or "", DoRALinear)
            attach(host, self.name, cls(base, r, alpha / ranks.norm(r, self.rslora), self.dropout, self.init))

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fields, tensors = ranks.to_lora(
            self, model, self.r, self.alpha, rslora=self.rslora, dropout=self.dropout, init=self.init
        )
        return fields | {"use_dora": True}, tensors

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "DoRA":
        return cls(**ranks.from_lora(config, tensors, model, "dora", "use_dora"))
