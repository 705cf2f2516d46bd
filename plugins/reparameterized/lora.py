"""LoRA: a trained low-rank update beside each frozen weight. Hu et al. 2021, arXiv:2106.09685.

With rsLoRA's scale (Kalajdzievski 2023, arXiv:2312.03732) and LoRA+'s learning rates (Hayou et al. 2024,
arXiv:2402.12354).
"""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, Method, Traits, WeightAdapter, attach, find, hf, hosts, matches

HF_FIELDS = ("r", "lora_alpha", "use_rslora", "lora_dropout", "rank_pattern", "alpha_pattern", "init_lora_weights",
             "fan_in_fan_out", "eva_config")  # fmt: skip


class LoRALinear(WeightAdapter):
    """``y = base(x) + scale * x A^T B^T``, on Linear and transformers' Conv1D."""

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

    def weight(self, W: Tensor) -> Tensor:
        return W + self.scale * self.B @ self.A

    def forward(self, base: Base, x: Tensor) -> Tensor:  # the same map, never forming the (out, in) product
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        h = F.linear(F.dropout(x, self.dropout, self.training), A)  # (..., r)
        return base(x) + F.linear(h * self.scale, B)

    def to_hf(self, name: str, host: Any) -> dict[str, Tensor]:
        """The factors under peft's names and in its shapes, as views; ``name`` of the host is for the message."""
        return {"lora_A.weight": self.A, "lora_B.weight": self.B}


class LoRAEmbedding(LoRALinear):
    """``y = E[x] + scale * A^T[x] B^T``; here A starts at zero and B is drawn. No dropout on token ids."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.A)
        nn.init.normal_(self.B)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        e, y = base.host, base(x)
        h = F.embedding(x, self.A.T, e.padding_idx, scale_grad_by_freq=e.scale_grad_by_freq)  # A has no sparse gradient
        return y + (F.linear(h * self.scale, self.B) * hosts.output_scale(e)).to(y.dtype)

    def to_hf(self, name: str, host: Any) -> dict[str, Tensor]:
        return {"lora_embedding_A": self.A, "lora_embedding_B": self.B}


class LoRAConv(LoRALinear):
    """A is a convolution like the host's into r channels, B a 1x1 convolution out of them."""

    def forward(self, base: Base, x: Tensor) -> Tensor:
        host = base.host
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        kernel = A.view(-1, *host.weight.shape[1:])  # (r, in / groups, *kernel)
        h = host._conv_forward(F.dropout(x, self.dropout, self.training), kernel, None)  # honours padding_mode
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(host.kernel_size) - 1]
        point = B.view(*B.shape, *[1] * len(host.kernel_size))  # (out, r / groups, 1, ...)
        return base(x) + conv(h * self.scale, point, groups=host.groups)

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
        for where, r in {"r": self.r, **self.rank_pattern}.items():
            if r < 1:
                raise ValueError(f"LoRA needs a rank of at least 1, got {where}={r}")
        for where, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if alpha <= 0:
                raise ValueError(f"LoRA's alpha must be positive, got {where}={alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA's dropout must lie in [0, 1), got {self.dropout}")
        if self.init not in ("default", "gaussian"):
            raise ValueError(f"LoRA's init must be 'default' or 'gaussian', got {self.init!r}")
        if self.lora_plus_ratio <= 0:
            raise ValueError(f"lora_plus_ratio must be positive, got {self.lora_plus_ratio}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        targets = find(model, self.targets, self.traits.hosts, exclude=self.exclude, layers=self.layers)
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            if not any(matches(name, pattern) for name, _ in targets):
                raise ValueError(f"rank or alpha pattern {pattern!r} matches none of the {len(targets)} target layers")
        for name, host in targets:
            attach(host, self.name, self._adapter(name, host))

    def _adapter(self, name: str, host: Any) -> LoRALinear:
        given = next((v for p, v in self.rank_pattern.items() if matches(name, p)), None)
        r = given or self.r
        alpha = next((v for p, v in self.alpha_pattern.items() if matches(name, p)), self.alpha)
        if not given and r > min(hosts.shape(host)) and hosts.kind(host) != "conv":
            warnings.warn(f"{name}: r={r} clamped to its smaller side {min(hosts.shape(host))}", stacklevel=2)
            r = min(hosts.shape(host))
        if hosts.kind(host) == "embedding" and host.max_norm is not None:
            raise ValueError(f"{name}: an embedding with max_norm rescales its rows on look-up; LoRA cannot adapt it")
        groups = getattr(host, "groups", 1)
        if r % groups:
            raise ValueError(f"{name}: r={r} must be a multiple of its {groups} groups; set rank_pattern or exclude it")
        kinds = {"embedding": LoRAEmbedding, "conv": LoRAConv if groups == 1 else LoRAGroupedConv}
        return kinds.get(hosts.kind(host) or "", LoRALinear)(host, r, alpha / self._norm(r), self.dropout, self.init)

    def _norm(self, r: int) -> float:
        return math.sqrt(r) if self.rslora else r

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        if self.lora_plus_ratio == 1.0:
            return None
        held = [a for _, _, a in self.adapters(model)]
        embeddings = [p for a in held if isinstance(a, LoRAEmbedding) for p in a.parameters()]
        factors = [a.B for a in held if isinstance(a, LoRALinear) and not isinstance(a, LoRAEmbedding)]
        groups = [{"params": factors, "lr_scale": self.lora_plus_ratio}] if factors else []
        return groups + ([{"params": embeddings, "lr": self.lora_plus_embedding_lr}] if embeddings else [])

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        held = {name: (host, a) for name, host, a in self.adapters(model) if isinstance(a, LoRALinear)}
        ranks = {name: (len(a.A), a.scale * self._norm(len(a.A))) for name, (_, a) in held.items()}
        fields = hf.write_ranks(model, ranks, self.r, self.alpha) | {
            "use_rslora": self.rslora,
            "lora_dropout": self.dropout,
            "init_lora_weights": True if self.init == "default" else self.init,
            "fan_in_fan_out": any(hosts.is_conv1d(host) for host, _ in held.values()),
            "bias": "none",
        }
        return fields, {f"{hf.PREFIX}{n}.{k}": t for n, (host, a) in held.items() for k, t in a.to_hf(n, host).items()}

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "LoRA":
        hf.check_fields(config, HF_FIELDS, "lora")
        first = {name: t.get("lora_A.weight", t.get("lora_embedding_A")) for name, t in tensors.items()}
        return cls(
            init="gaussian" if hf.check_start(config) else "default",
            rslora=config.get("use_rslora", False),
            dropout=config.get("lora_dropout", 0.0),
            **hf.read_ranks(model, config, {name: len(A) for name, A in first.items() if A is not None}),
        )
