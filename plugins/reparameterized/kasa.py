"""KaSA: LoRA with trained singular values, on a weight without its least ones. Wang et al. 2024, arXiv:2412.06071."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_peft_plugins.reparameterized import plain_lora, ranks
from lightning_peft_plugins.reparameterized.lora import LoRA
from lightning_peft_plugins.reparameterized.pissa import principal, signed, to_compute
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, Method, Traits, WeightAdapter, attach, hf, hosts, quant

OVERSAMPLING = 16  # directions beyond 2 r that inverse iterations look at
EPS = 1e-12  # below the root of a norm, whose gradient at an exactly orthonormal factor would be NaN


class KaSALinear(WeightAdapter):
    """``W - P Q + scale * (B * s) A``; P Q is what the paper takes out of W, kept here as two frozen factors."""

    axes = {"A": ("rank", "in"), "B": ("out", "rank"), "s": ("rank",), "P": ("out", "dropped"), "Q": ("dropped", "in")}
    P: Tensor
    Q: Tensor

    def __init__(self, P: Tensor, Q: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        (out, r), fan_in = P.shape, Q.shape[1]
        self.register_buffer("P", P)
        self.register_buffer("Q", Q)
        self.A, self.B = nn.Parameter(torch.empty(r, fan_in)), nn.Parameter(torch.empty(out, r))
        self.s = nn.Parameter(torch.empty(r))
        self.scale, self.dropout = scale, dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # U(-1/sqrt(in), 1/sqrt(in))
        nn.init.zeros_(self.B)
        nn.init.normal_(self.s)

    def weight(self, W: Tensor) -> Tensor:
        return W - self.P @ self.Q + self.scale * (self.B * self.s) @ self.A

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y = base(x)
        if self.dropout and self.training:  # which the dropped part, as one of W's own, does not see
            return y + (self._update(F.dropout(x, self.dropout)) - self._low_rank(x, self.Q, self.P)).to(y.dtype)
        return y + self._low_rank(x, *self.factors()).to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The whole change as plain LoRA of scale 1: A (2 r, in), B (out, 2 r)."""
        return torch.cat([self.A, self.Q]), torch.cat([self.scale * self.B * self.s, -self.P], dim=1)

    def _update(self, x: Tensor) -> Tensor:
        return self._low_rank(x, self.A, self.scale * self.B * self.s)

    @staticmethod
    def _low_rank(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))

    def penalties(self, large: bool) -> tuple[Tensor, Tensor]:
        """Sum of squares of s; how far A and B are from orthonormal, by r x r or, ``large``, by the other products."""
        s, rows = self.s.float(), (self.A.float(), self.B.float().T)
        return s.square().sum(), sum((_skew(M, large) for M in rows), s.new_zeros(()))


def _skew(M: Tensor, large: bool) -> Tensor:
    """``|M M^T - 1|`` in Frobenius's norm for M (r, n); ``large``: ``|M^T M - 1|``, whose square is n - r more."""
    below, diagonal = (M @ M.T).tril(-1), M.square().sum(1)  # no identity matrix, which FSDP's tensors do not mix with
    square = 2 * below.square().sum() + (diagonal - 1).square().sum()
    return (square + (M.shape[1] - len(M) if large else 0) + EPS).sqrt()


def least(W: Tensor, r: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``r`` smallest singular triplets in float32, as in ``principal``; of niter > 0 by inverse iterations.

    These find what is near the smallest where many are almost as small. All of r must be below the smaller side.
    """
    if not niter:
        U, S, Vh = principal(W, min(W.shape))
        return U[:, -r:], S[-r:], Vh[-r:].clone()  # no view, which would keep all of Vh
    W = to_compute(W)
    tall = W if W.shape[0] >= W.shape[1] else W.mT
    R = torch.linalg.qr(tall, mode="r")[1].double()  # R^T R = tall^T tall; solving doubles the digits it takes
    diagonal = R.diagonal()
    floor = torch.finfo(W.dtype).eps * diagonal.abs().max()
    diagonal.copy_(torch.where(diagonal.abs() < floor, floor, diagonal))
    X = torch.randn(len(R), min(2 * r + OVERSAMPLING, len(R)), generator=torch.Generator().manual_seed(0)).to(R)
    for _ in range(niter):
        Y = torch.linalg.qr(torch.linalg.solve_triangular(R.mT, X, upper=False))[0]
        X = torch.linalg.qr(torch.linalg.solve_triangular(R, Y, upper=True))[0]
    X = X.to(W)
    U, S, Vh = torch.linalg.svd(tall @ X, full_matrices=False)
    U, S, Vh = U[:, -r:], S[-r:], (Vh @ X.mT)[-r:]
    return signed(U, S, Vh) if tall is W else signed(Vh.mT, S, U.mT)


@dataclass(frozen=True, kw_only=True)
class KaSA(Method):
    """W - P Q + scale * (B * s) A: P Q are the r smallest singular parts of W, s (r,) trained like singular values.

    The model starts as the truncated one, not as the base. W itself stays as it is, and P, Q are kept in the file. Two
    loss terms, beta * L2 + gamma * L3, keep s small and A, B nearly orthonormal. ``hf.save`` writes peft's KaSA, which
    truncates the base anew; ``KaSA.to_lora`` gives a plain LoRA of rank 2 r that fits the base.

    Args:
        r: rank of the update, and singular parts taken out; below the layer's smaller side.
        alpha: the update is scaled by alpha / r.
        dropout: probability on the update's input; the truncated base never sees it.
        beta: weight of L2, the sum of squares of s.
        gamma: weight of L3, the norms of A A^T - 1 and B^T B - 1. The authors' code takes A^T A - 1 and B B^T - 1 in
            place of the paper's; its published gammas belong to gram "large".
        gram: "small", the (r, r) products; "large", those of the authors' code, by a closed form.
        reduction: of both over the layers: "mean", as in the authors' code, or "sum", as in peft.
        niter: inverse iterations in place of the whole SVD, many times faster on large layers (16 is ample); what is
            taken out is then near the smallest. 0 is exact.
        targets: names, patterns or roles of the layers to adapt.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
        rank_pattern: pattern -> r for the layers it names.
        alpha_pattern: pattern -> alpha for the layers it names.
    """

    traits = Traits(
        family="reparameterized",
        paper="Wang, Jiang, Park, Kim, Tang 2024, arXiv:2412.06071",
        parameters="r * (in + out) + r a layer",
        hosts=("linear", "conv1d"),
        merge=True,
        quantized=True,
        identity_start=False,
        needs_weights=True,
        hf="LORA:kasa_config",
    )
    name: str = "kasa"
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    beta: float = 1e-4
    gamma: float = 1e-3
    gram: str = "small"
    reduction: str = "mean"
    niter: int = 0
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks.check(self)
        ranks.check_dropout(self)
        for option, known in (("gram", ("small", "large")), ("reduction", ("mean", "sum"))):
            if getattr(self, option) not in known:
                raise ValueError(f"KaSA's {option} must be one of {known}, got {getattr(self, option)!r}")
        if self.niter < 0:
            raise ValueError(f"KaSA's niter must be 0 (exact SVD) or more, got {self.niter}")
        if self.beta < 0 or self.gamma < 0:
            raise ValueError(f"KaSA's beta and gamma must not be negative, got {self.beta} and {self.gamma}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        places = list(ranks.places(self, model, clamp=False))
        for name, host, r, _ in places:
            if r >= min(hosts.shape(host)):
                raise ValueError(
                    f"{name}: r={r} leaves nothing of its {hosts.shape(host)} weight; set rank_pattern or exclude it"
                )
        for _, host, r, alpha in ranks.bar(places, "KaSA: singular vectors", [hosts.shape(p[1]) for p in places]):
            U, S, Vh = least(hosts.read(host), r, self.niter)
            attach(host, self.name, KaSALinear(U * S, Vh, alpha / r, self.dropout))

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        return [{"params": [a.get_parameter("s") for _, _, a in self.adapters(model)], "weight_decay": 0.0}]

    def penalty(self, model: nn.Module) -> Tensor | None:
        held: list[Any] = [a for _, _, a in self.adapters(model)]
        if not self.beta and not self.gamma:
            return None
        with torch.autocast(held[0].s.device.type, enabled=False):  # a step under bf16-mixed calls it there
            terms = [a.penalties(self.gram == "large") for a in held]
            total = torch.stack([self.beta * small + self.gamma * skew for small, skew in terms]).sum()
            return total / len(held) if self.reduction == "mean" else total

    def to_lora(self, model: nn.Module) -> LoRA:
        """Put a plain LoRA of the same weight and rank 2 r in its place; see ``plain_lora.convert``."""
        return plain_lora.convert(self, model)

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.niter:
            raise ValueError(
                f"huggingface/peft truncates the base by an exact SVD, this one by niter={self.niter} iterations: "
                "to_lora makes a LoRA of it, which peft reads"
            )
        held: dict[str, tuple[Any, Any]] = {name: (host, a) for name, host, a in self.adapters(model)}
        for name, (host, _) in held.items():
            if hosts.is_conv1d(host) or quant.kind(host):
                what = "transformers' Conv1D" if hosts.is_conv1d(host) else "quantised layers"
                raise ValueError(
                    f"{name}: huggingface/peft's KaSA has no {what}; to_lora makes a LoRA, which peft reads"
                )
        fields = hf.write_ranks(
            model, {n: (len(a.s), a.scale * len(a.s)) for n, (_, a) in held.items()}, self.r, self.alpha
        )
        fields |= {"lora_dropout": self.dropout, "init_lora_weights": True, "bias": "none"}
        fields |= {"kasa_config": {"beta": self.beta, "gamma": self.gamma}}
        tensors = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_diag": "s"}
        return fields, {f"{hf.PREFIX}{n}.{k}": getattr(a, t) for n, (_, a) in held.items() for k, t in tensors.items()}

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "KaSA":
        options = ranks.from_lora(config, tensors, model, "kasa", "kasa_config")
        if options.pop("rslora") or options.pop("init") != "default":
            raise ValueError(
                "adapter_config.json sets use_rslora or init_lora_weights, which method 'kasa' does not have"
            )
        return cls(reduction="sum", **options, **config["kasa_config"])
