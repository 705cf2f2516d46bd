"""PiSSA: LoRA that starts from the weight's top singular triplets. Meng, Wang, Zhang 2024, arXiv:2404.02948."""

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_peft_plugins.reparameterized import ranks
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, Method, Traits, WeightAdapter, attach, hosts

OVERSAMPLING = 8  # directions beyond r that the randomised SVD looks at, for the last of the r to be right
LARGE, THIN = 1024, 8  # above this side, a randomised SVD serves for up to an eighth of the triplets
ITERATIONS = {64: 16, 1 << 30: 4}  # of it, for up to so many triplets; 16 as in the authors' code


class PiSSALinear(WeightAdapter):
    """``W + scale * (B A - B0 A0)`` with A, B trained from A0, B0; where the paper takes B0 A0 out of W, we keep it."""

    axes = {"A": ("rank", "in"), "B": ("out", "rank"), "A0": ("rank", "in"), "B0": ("out", "rank")}
    A0: Tensor
    B0: Tensor

    def __init__(self, A: Tensor, B: Tensor, scale: float) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)  # (r, in), (out, r)
        self.register_buffer("A0", A.clone())
        self.register_buffer("B0", B.clone())
        self.scale = scale

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.A.copy_(self.A0)
        self.B.copy_(self.B0)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.scale * (self.B @ self.A - self.B0 @ self.A0)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y = base(x)
        A, B = (t.to(x.dtype) for t in self.factors())
        return y + F.linear(F.linear(x, A) * self.scale, B).to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The same change as plain LoRA: A (2 r, in), B (out, 2 r).

        B A - B0 A0 = (B - B0) A + B0 (A - A0), whose differences are exactly 0 at the start and small afterwards, so
        that half precision does not swallow them.
        """
        return torch.cat([self.A, self.A - self.A0]), torch.cat([self.B - self.B0, self.B0], dim=1)

    def to_hf(self, name: str, host: Any) -> dict[str, Tensor]:
        return dict(zip(("lora_A.weight", "lora_B.weight"), self.factors(), strict=True))


def principal(W: Tensor, r: int, niter: int | None = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The top ``r`` singular triplets in float32: U (out, r), S (r,), Vh (r, in), the same on every machine.

    Args:
        W: (out, in).
        r: at most the smaller side.
        niter: subspace iterations of a randomised SVD; 0 is the exact one; None chooses by the size.
    """
    W = to_compute(W)
    if niter is None:
        several = next(n for most, n in ITERATIONS.items() if r <= most)
        niter = several if min(W.shape) > LARGE and r * THIN <= min(W.shape) else 0
    if niter:
        with torch.random.fork_rng(devices=[W.device] if W.is_cuda else []):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(W, min(r + OVERSAMPLING, *W.shape), niter)
            Vh = V.mT
    else:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return signed(U[:, :r], S[:r], Vh[:r])


def to_compute(W: Tensor) -> Tensor:
    """In float32, on the GPU if there is one."""
    device = "cuda" if W.device.type == "cpu" and torch.cuda.is_available() else W.device
    return W.detach().to(device, torch.float32)


def signed(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The triplets with the sign that they have on every machine."""
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()  # (1, r): the largest entry becomes positive
    return U * sign, S, Vh * sign.mT


@dataclass(frozen=True, kw_only=True)
class PiSSA(Method):
    """W + scale * (B A - B0 A0), where scale * B0 A0 is the best approximation of W of rank r.

    The paper puts W - scale * B0 A0 in the place of W; here W stays, and the start A0, B0 is kept beside the adapter
    and in its file, so that it fits the unmodified base. ``hf.save`` and ``lightning-peft export --format hf`` write a
    plain LoRA of rank 2 r, equal to it. There is no dropout: it would drop a part of W itself.

    Args:
        r: rank of the part of W that trains.
        alpha: the products are scaled by alpha / r; the layer's rank when None, which is a scale of 1 as in the paper.
        niter: subspace iterations of a randomised SVD, many times faster on large layers; 0 is exact. None: 16 (above
            r=64 4) where the smaller side is above 1024 and r at most an eighth of it, else exact.
        targets: names, patterns or roles of the layers to adapt.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
        rank_pattern: pattern -> r for the layers it names; elsewhere r is clamped to the layer's smaller side.
        alpha_pattern: pattern -> alpha for the layers it names.
    """

    traits = Traits(
        family="reparameterized",
        paper="Meng, Wang, Zhang 2024, arXiv:2404.02948",
        parameters="r * (in + out) a layer",
        hosts=("linear", "conv1d"),
        merge=True,
        quantized=True,
        needs_weights=True,
        hf="LORA:",
    )
    name: str = "pissa"
    r: int = 8
    alpha: float | None = None
    niter: int | None = None
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks.check(self)
        if (self.niter or 0) < 0:
            raise ValueError(f"PiSSA's niter must be 0 (exact SVD) or more, got {self.niter}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        places = list(ranks.places(self, model))
        for name, host, r, alpha in ranks.bar(places, "PiSSA: singular vectors", [hosts.shape(p[1]) for p in places]):
            if r > min(hosts.shape(host)):
                raise ValueError(f"{name}: r={r}, but its {hosts.shape(host)} weight has fewer singular vectors")
            U, S, Vh = principal(hosts.read(host), r, self.niter)
            if not S[0]:
                raise ValueError(f"{name}: its weight is all zeros, so nothing of it could train; exclude it")
            root = (S * r / alpha).sqrt()
            attach(host, self.name, PiSSALinear(root[:, None] * Vh, U * root, alpha / r))

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return ranks.to_lora(self, model, 2 * self.r, 2 * (self.alpha or self.r))
