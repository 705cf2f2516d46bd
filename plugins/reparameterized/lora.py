"""LoRA: a trained low-rank update beside each frozen weight. Hu et al. 2021, arXiv:2106.09685.

With rsLoRA's scale (Kalajdzievski 2023, arXiv:2312.03732) and LoRA+'s learning rates (Hayou et al. 2024,
arXiv:2402.12354).
"""

import abc
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_peft_plugins.reparameterized import ranks
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Adapter, Base, Method, Traits, WeightAdapter, attach, hosts


class LowRank(Adapter, abc.ABC):
    """Factors of an update ``scale * B A``, and what it gives for an input; a subclass says where that is added."""

    axes = {"A": ("rank", "in"), "B": ("out", "rank")}

    def __init__(self, host: Any, r: int, scale: float, dropout: float, init: str) -> None:
        super().__init__()
        out, fan_in = hosts.shape(host)
        self.A = nn.Parameter(torch.empty(r, fan_in))
        self.B = nn.Parameter(torch.empty(out, r))
        self.scale, self.dropout, self.init = scale, dropout, init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.B)  # so training starts from the base model
        if self.init == "gaussian":
            nn.init.normal_(self.A, std=1 / len(self.A))
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # U(-1/sqrt(in), 1/sqrt(in))

    def dropped(self, x: Tensor) -> Tensor:
        """What the update sees of the input; the base path sees all of it."""
        return F.dropout(x, self.dropout, self.training)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of the update."""
        return self.A, self.B

    def update(self, host: Any, x: Tensor) -> Tensor:
        """What scale * B A gives for the host's input ``x``."""
        A, B = self.factors()
        h = F.linear(x, A.to(x.dtype))  # (..., r)
        return F.linear(h * self.scale, B.to(x.dtype))


class LoRALinear(LowRank, WeightAdapter):
    """``y = base(x) + scale * x A^T B^T``, on Linear and transformers' Conv1D."""

    def weight(self, W: Tensor) -> Tensor:
        return W + self.scale * self.B @ self.A

    def forward(self, base: Base, x: Tensor) -> Tensor:  # the same map, never forming the (out, in) product
        y = base(x)
        return y + self.update(base.host, self.dropped(x)).to(y.dtype)

    def to_hf(self, name: str, host: Any) -> dict[str, Tensor]:
        """The factors under peft's names and in its shapes, as views; ``name`` of the host is for the message."""
        A, B = self.factors()
        return {"lora_A.weight": A, "lora_B.weight": B}


class LoRAEmbedding(LoRALinear):
    """``y = E[x] + scale * A^T[x] B^T``; here A starts at zero and B is drawn. No dropout on token ids."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.A)
        nn.init.normal_(self.B)

    def dropped(self, x: Tensor) -> Tensor:
        return x

    def update(self, host: Any, x: Tensor) -> Tensor:
        rows = self.A.T  # (V, r); no sparse gradient, whatever the host has
        h = F.embedding(x, rows, host.padding_idx, scale_grad_by_freq=host.scale_grad_by_freq)
        return F.linear(h * self.scale, self.B) * hosts.output_scale(host)

    def to_hf(self, name: str, host: Any) -> dict[str, Tensor]:
        return {"lora_embedding_A": self.A, "lora_embedding_B": self.B}


class LoRAConv(LoRALinear):
    """A is a convolution like the host's into r channels, B a 1x1 convolution out of them."""

    def update(self, host: Any, x: Tensor) -> Tensor:
        A, B = (f.to(x.dtype) for f in self.factors())
        kernel = A.view(-1, *host.weight.shape[1:])  # (r, in / groups, *kernel)
        h = host._conv_forward(x, kernel, None)  # honours padding_mode
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(host.kernel_size) - 1]
        point = B.view(*B.shape, *[1] * len(host.kernel_size))  # (out, r / groups, 1, ...)
        return conv(h * self.scale, point, groups=host.groups)

    def to_hf(self, name: str, host: Any) -> dict[str, Tensor]:
        if host.groups > 1 or host.padding_mode != "zeros" or set(host.dilation) != {1}:
            raise ValueError(
                f"{name}: huggingface/peft computes something else for a convolution with groups, dilation or a "
                "padding mode: its A is dense, undilated and padded with zeros (its issue 3697)"
            )
        kernel = self.A.view(-1, *host.weight.shape[1:])
        return {"lora_A.weight": kernel, "lora_B.weight": self.B.view(*self.B.shape, *[1] * len(host.kernel_size))}


class LoRAGroupedConv(LoRAConv):
    """Each of the g groups has its own r / g ranks: A (r, in / g * kernel), B (out, r / g)."""

    axes = {"A": ("group_rank", "in"), "B": ("out", "rank_of_group")}

    def __init__(self, host: Any, r: int, scale: float, dropout: float, init: str) -> None:
        super().__init__(host, r, scale, dropout, init)
        self.groups = host.groups
        self.B = nn.Parameter(torch.zeros(len(self.B), r // host.groups))

    def weight(self, W: Tensor) -> Tensor:
        A = self.A.view(self.groups, -1, self.A.shape[1])  # (g, r / g, in / g * kernel)
        B = self.B.view(self.groups, -1, self.B.shape[1])  # (g, out / g, r / g)
        return W + self.scale * (B @ A).reshape(W.shape)


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """W + scale * B A on every target, with A (r, in), B (out, r).

    Args:
        r: rank of the update.
        alpha: the update is scaled by alpha / r.
        rslora: scale by alpha / sqrt(r) instead, which keeps its size as r grows.
        dropout: probability on the adapter's input; the base path never sees it.
        init: of A: "default" (Kaiming uniform) or "gaussian" (standard deviation 1 / r). B starts at zero.
        targets: names, patterns or roles of the layers to adapt; embeddings and convolutions by name.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
        rank_pattern: pattern -> r for the layers it names, taken as it is; elsewhere r is clamped to the smaller side.
        alpha_pattern: pattern -> alpha for the layers it names.
        lora_plus_ratio: learning rate of B over that of A (LoRA+; its paper advises 16); 1 leaves the optimizer alone.
        lora_plus_embedding_lr: learning rate of both factors on embeddings under LoRA+.
    """

    traits = Traits(
        family="reparameterized",
        paper="Hu et al. 2021, arXiv:2106.09685",
        parameters="r * (in + out) a linear layer or embedding; r * in / groups * kernel + out * r / groups a conv",
        hosts=("linear", "conv1d", "embedding", "conv"),
        merge=True,
        quantized=True,
        hf="LORA",
    )
    name: str = "lora"
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
    lora_plus_ratio: float = 1.0
    lora_plus_embedding_lr: float = 1e-6

    def __post_init__(self) -> None:
        ranks.check(self)
        ranks.check_draw(self)
        if self.lora_plus_ratio <= 0:
            raise ValueError(f"lora_plus_ratio must be positive, got {self.lora_plus_ratio}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        for name, host, r, alpha in ranks.places(self, model):
            attach(host, self.name, self._adapter(name, host, r, alpha))

    def _adapter(self, name: str, host: Any, r: int, alpha: float) -> LoRALinear:
        groups = getattr(host, "groups", 1)
        if r % groups:
            raise ValueError(f"{name}: r={r} must be a multiple of its {groups} groups; set rank_pattern or exclude it")
        kinds = {"embedding": LoRAEmbedding, "conv": LoRAConv if groups == 1 else LoRAGroupedConv}
        cls = kinds.get(hosts.kind(host) or "", LoRALinear)
        return cls(host, r, alpha / ranks.norm(r, self.rslora), self.dropout, self.init)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        if self.lora_plus_ratio == 1.0:
            return None
        held = [a for _, _, a in self.adapters(model)]
        embeddings = [p for a in held if isinstance(a, LoRAEmbedding) for p in a.parameters()]
        factors = [a.B for a in held if isinstance(a, LowRank) and not isinstance(a, LoRAEmbedding)]
        groups = [{"params": factors, "lr_scale": self.lora_plus_ratio}] if factors else []
        return groups + ([{"params": embeddings, "lr": self.lora_plus_embedding_lr}] if embeddings else [])

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return ranks.to_lora(self, model, self.r, self.alpha, rslora=self.rslora, dropout=self.dropout, init=self.init)

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "LoRA":
        return cls(**ranks.from_lora(config, tensors, model, "lora"))
