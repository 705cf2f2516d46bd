"""RandLoRA: a full-rank sum of frozen random products, trained by diagonals. Albert et al. 2025, arXiv:2502.00987."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning_peft_plugins.reparameterized import projections, ranks
from lightning_peft_plugins.reparameterized.projections import Projections
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, Method, Traits, WeightAdapter, attach, find, hf, hosts

HF_FIELDS = {"r": "r", "alpha": "randlora_alpha", "seed": "projection_prng_key", "dropout": "randlora_dropout"}
HF_TENSORS = {"lam": "randlora_lambda", "gamma": "randlora_gamma"}
BASES = ("uniform", "sparse", "very_sparse")


class Scaled(torch.autograd.Function):
    """diag(lam_j) A diag(gamma_j) for all j, (r, n, min); nothing of this size, the weight's, is kept for backward."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(A, lam, gamma)
        return lam[:, :, None] * A[:, None] * gamma

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        A, lam, gamma = ctx.saved_tensors
        grad = grad * A[:, None]
        return None, torch.einsum("rni,ni->rn", grad, gamma), torch.einsum("rni,rn->ni", grad, lam)


class RandLoRALinear(WeightAdapter):
    """``y = base(x) + scale * S x``, S or its transpose (max, min) = sum over j < n of B_j diag(lam_j) A diag(gamma_j).

    max and min are the layer's sides, n = ceil(min / r); lam (r, n) and gamma (n, min) train. A (r, min) is the leading
    part of the shared one, B_j (max, r) takes every n-th of the leading n r columns of the shared B from the j-th on,
    as in huggingface/peft. No ``axes``: A and B go by position, so channels cannot be cut out of the layer.
    """

    checksum: Tensor

    def __init__(self, host: Any, shared: Projections, scale: float, dropout: float) -> None:
        super().__init__()
        out, fan_in = hosts.shape(host)
        r, small = len(shared.drawn["A"]), min(out, fan_in)
        n = math.ceil(small / r)
        self.lam, self.gamma = nn.Parameter(torch.empty(r, n)), nn.Parameter(torch.empty(n, small))
        self.register_buffer("checksum", torch.empty((), dtype=torch.long))
        self.large, self.wide = max(out, fan_in), fan_in > out
        self.shared, self.scale, self.dropout = shared, scale, dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.lam)  # so training starts from the base model
        nn.init.constant_(self.gamma, 1 / max(self.gamma.shape))
        self.checksum.fill_(self.shared.checksum)

    def factors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(n r, in) and (out, n r), whose product is S, in the precision of ``like``."""
        A = self.shared.on("A", self.lam)[:, : self.gamma.shape[1]]
        scaled = Scaled.apply(A, self.lam, self.gamma).flatten(0, 1).to(like)  # (r n, min)
        columns = self.shared.on("B", like)[: len(scaled), : self.large]  # (n r, max)
        return (columns, scaled.T) if self.wide else (scaled, columns.T)

    def weight(self, W: Tensor) -> Tensor:
        first, second = self.factors(self.lam)
        return W + self.scale * second @ first

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y = base(x)
        first, second = self.factors(x)
        h = F.linear(F.dropout(x, self.dropout, self.training), first)  # (..., n r)
        return y + F.linear(h * self.scale, second).to(y.dtype)

    def check_state(self, state: dict[str, Tensor]) -> None:
        self.shared.check_state(state, "RandLoRA")


@dataclass(frozen=True, kw_only=True)
class RandLoRA(Method):
    """W + (alpha / r) * sum_j B_j diag(lam_j) A diag(gamma_j) on every target; A and B are random, frozen and shared.

    The products reach every rank, with as few parameters as a LoRA of low rank, at the price of factors of the weight's
    size. A and B are drawn from the seed again for a file, in which a checksum says whether they are the same.

    Args:
        r: rank of each product; a larger one means fewer parameters.
        alpha: the sum is scaled by alpha / r.
        basis: "uniform"; "sparse" or "very_sparse" matrices hold plus or minus one in a third of the places, or in one
            of sqrt(m), m the smaller of the largest in and out, and zeros. All are brought to deviation one.
        seed: of A and B, which also depend on the largest sizes among the targets.
        dropout: probability on the adapter's input; the base path never sees it.
        save_projection: write A and B into a huggingface/peft folder; those of lightning-peft never hold them.
        targets: names, patterns or roles of the layers to adapt.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="reparameterized",
        paper="Albert et al. 2025, arXiv:2502.00987",
        parameters="n * (r + min(in, out)) a layer, n = ceil(min(in, out) / r)",
        hosts=("linear", "conv1d"),
        merge=True,
        quantized=True,
        hf="RANDLORA",
    )
    name: str = "rand_lora"
    r: int = 32
    alpha: float = 640.0
    basis: str = "uniform"
    seed: int = 0
    dropout: float = 0.0
    save_projection: bool = True
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"RandLoRA needs a rank of at least 1, got r={self.r}")
        if self.alpha <= 0:
            raise ValueError(f"RandLoRA's alpha must be positive, got {self.alpha}")
        if self.basis not in BASES:
            raise ValueError(f"RandLoRA's basis must be one of {BASES}, got {self.basis!r}")
        ranks.check_dropout(self)

    def inject(self, model: nn.Module, stats: None = None) -> None:
        targets = find(model, self.targets, self.traits.hosts, exclude=self.exclude, layers=self.layers)
        shared = self.draw([host for _, host in targets])
        for _, host in targets:
            attach(host, self.name, RandLoRALinear(host, shared, self.alpha / self.r, self.dropout))

    def draw(self, targets: Iterable[Any]) -> Projections:
        """A (r, min) and B (n r, max) for these layers, as if the largest in and the largest out were one layer's."""
        small, large = sorted(map(max, zip(*map(hosts.shape, targets), strict=True)))
        r, n, source = self.r, math.ceil(small / self.r), projections.generator(self.seed)
        if self.basis == "uniform":  # in bfloat16, as in peft
            A = projections.uniform((r, small), small**-0.5, source, torch.bfloat16)
            B = torch.cat([projections.uniform((large, r), r**-0.5, source, torch.bfloat16) for _ in range(n)], 1)
        else:
            one_in = 3.0 if self.basis == "sparse" else math.sqrt(small)
            A, B = (projections.sparse(shape, one_in, source) for shape in ((r, small), (large, n * r)))
        return Projections(A=projections.normed(A), B=projections.normed(B).T.contiguous())

    @staticmethod
    def in_hf(shared: Projections) -> dict[str, Tensor]:
        """Copies, for what is loaded must be what a seed gives again; A (r, 1, min) and B (max, n, r) there."""
        A, B = shared.drawn["A"], shared.drawn["B"]
        B = B.T.unflatten(1, (-1, len(A)))
        return {"base_model.randlora_A": A[:, None].clone(), "base_model.randlora_B": B.clone()}

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fields, tensors = projections.to_hf(self, model, HF_FIELDS, HF_TENSORS)
        return fields | {b: self.basis == b for b in BASES[1:]}, tensors

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "RandLoRA":
        more = ("save_projection", "fan_in_fan_out", "init_weights")
        hf.check_fields(config, (*HF_FIELDS.values(), *BASES, *more), "rand_lora")
        basis = next((b for b in reversed(BASES) if config.get(b)), BASES[0])
        method = cls(basis=basis, **{ours: config[theirs] for ours, theirs in HF_FIELDS.items() if theirs in config})
        return dataclasses.replace(method, **projections.from_hf(method, tensors, model, HF_TENSORS))
