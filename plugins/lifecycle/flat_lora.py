"""Flat-LoRA: LoRA under fresh noise on the frozen weight, for flat minima. Li et al. 2024, arXiv:2409.14396.

The authors' code adds the noise to the weight and takes it off again, which in bfloat16 leaves a random walk behind
(1.3 % of the weight after 1000 steps). Here the weight is only read: the noise is drawn again in backward.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_peft_plugins.reparameterized import ranks
from lightning_peft_plugins.reparameterized.lora import LoRALinear
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, Method, Step, Traits, attach, hosts
from lightning_peft.attach import attached

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine_up": lambda done: (1 - math.cos(math.pi * done)) / 2,
    "linear_up": lambda done: done,
    "constant": lambda done: 1.0,
}


class NoisyProduct(torch.autograd.Function):
    """``x (W + noise)^T`` that keeps no (out, in) matrix for backward; W of the host, or zero where that is None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, std: Tensor, seed: int, host: Any) -> Tensor:
        ctx.save_for_backward(std)
        ctx.seed, ctx.host, ctx.like = seed, host, (x.shape[-1], x.dtype)
        return F.linear(x, with_noise(std, x.shape[-1], seed, host).to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        (std,), (fan_in, dtype) = ctx.saved_tensors, ctx.like
        matrix = with_noise(std, fan_in, ctx.seed, ctx.host)
        return (g @ matrix.to(g.dtype)).to(dtype), None, None, None


def with_noise(std: Tensor, fan_in: int, seed: int, host: Any) -> Tensor:
    """Noise (out, in) with a deviation for each row, on the host's weight; the global random state is left alone."""
    generator = torch.Generator(std.device).manual_seed(seed)
    noise = torch.randn(len(std), fan_in, generator=generator, dtype=std.dtype, device=std.device).mul_(std[:, None])
    return noise if host is None else noise.add_(hosts.read(host))


class FlatLinear(LoRALinear):
    """``y = base(x) + noise x + scale * x A^T B^T`` in training; ``weight`` is LoRA's, without noise.

    What a window's noise depends on is set by ``open`` and follows from the step, so no file needs to hold it.
    """

    deviation, seed, noisy, fresh = 0.0, 0, False, False
    std: Tensor | None = None  # (out,) of the last noise

    def open(self, deviation: float, seed: int) -> None:
        """From now on the noise has this deviation, relative to the norm of each row, and is drawn from this seed."""
        self.deviation, self.seed, self.noisy, self.fresh = deviation, seed, deviation > 0, False

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if not (self.training and self.noisy):
            return super().forward(base, x)
        y: Tensor = self.perturbed(base, x)  # type: ignore[call-arg]
        return y + self.update(base.host, self.dropped(x)).to(y.dtype)

    @torch.compiler.disable  # its seed changes at every step: compiled, it would be compiled anew each time
    def perturbed(self, base: Base, x: Tensor) -> Tensor:
        """What the layer below gives with noise on its weight."""
        if self.std is None or not self.fresh:
            self.std, self.fresh = self.deviations(base.weight), True
        plain = next(iter(attached(base.host).values())) is self and not hosts.stored(base.host).requires_grad
        if not plain:  # something below trains: the noise goes beside it, for the price of a second product
            return base(x) + NoisyProduct.apply(x, self.std, self.seed, None)
        y, bias = NoisyProduct.apply(x, self.std, self.seed, base.host), base.bias
        return y if bias is None else y + bias.to(y.dtype)

    @torch.no_grad()
    def deviations(self, W: Tensor) -> Tensor:
        """(out,) ``deviation / sqrt(in)`` times the row norms of ``W + scale * B A``, without forming that."""
        A, B = self.factors()
        dtype = torch.promote_types(W.dtype, torch.float32)
        with torch.autocast(W.device.type, enabled=False):
            own = torch.linalg.vector_norm(W, dim=1, dtype=dtype).square()
            cross = (F.linear(W, A.to(W.dtype)).to(dtype) * B).sum(1)  # <W A^T, B> by rows
            added = (B @ (A @ A.T) * B).sum(1)
        squares = own + 2 * self.scale * cross + self.scale**2 * added
        return (self.deviation / math.sqrt(W.shape[1])) * squares.clamp(min=0).sqrt().to(dtype)


@dataclass(frozen=True, kw_only=True)
class FlatLoRA(Method):
    """LoRA that minimises the loss under noise on the frozen weight, so that it stays low around the merged weight.

    In training, each optimizer step draws ``noise[o, i] ~ N(0, (f * rho)^2 * |W'[o]|^2 / in)`` anew for every layer,
    W' = W + scale * B A, the same for all batches of its accumulation window; f rises over the fit. Neither evaluation
    nor the merged weight nor files have noise, and a resumed fit draws what it would have drawn. Where adapters lie
    below on the same layer, or its weight trains, the noise goes on top of them. An optimizer step of several passes
    (SAM, BSAM), which seeks the same at a higher price, is refused beside it.

    Args:
        rho: length of a row's noise, relative to that of the row; 0 is plain LoRA.
        schedule: of f over the steps of the fit: "cosine_up" or "linear_up" from 0 to 1, or "constant" at 1.
        period: noise in one optimizer step of so many.
        seed: of the noise, with the step, the layer's name and the process.
        rank_seeds: "per_rank", each process of a fit draws its own noise, or "shared".
        r: rank of the update.
        alpha: the update is scaled by alpha / r.
        rslora: scale by alpha / sqrt(r) instead, which keeps its size as r grows.
        dropout: probability on the adapter's input; the base path never sees it.
        init: of A: "default" (Kaiming uniform) or "gaussian" (standard deviation 1 / r). B starts at zero.
        targets: names, patterns or roles of the layers to adapt.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
        rank_pattern: pattern -> r for the layers it names, taken as it is; elsewhere r is clamped to the smaller side.
        alpha_pattern: pattern -> alpha for the layers it names.
        lora_plus_ratio: learning rate of B over that of A (LoRA+); 1 leaves the optimizer alone.
    """

    traits = Traits(
        family="lifecycle",
        paper="Li et al. 2024, arXiv:2409.14396",
        parameters="r * (in + out) a layer",
        hosts=("linear", "conv1d"),
        merge=True,
        quantized=True,
        hf="LORA:",
    )
    name: str = "flat_lora"
    rho: float = 0.05
    schedule: str = "cosine_up"
    period: int = 1
    seed: int = 0
    rank_seeds: str = "per_rank"
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

    def __post_init__(self) -> None:
        ranks.check(self)
        ranks.check_draw(self)
        if not 0 <= self.rho < 1:
            raise ValueError(f"FlatLoRA's rho must lie in [0, 1), got {self.rho}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"FlatLoRA's schedule must be one of {list(SCHEDULES)}, got {self.schedule!r}")
        if self.period < 1:
            raise ValueError(f"FlatLoRA's period must be at least 1 optimizer step, got {self.period}")
        if self.rank_seeds not in ("per_rank", "shared"):
            raise ValueError(f"FlatLoRA's rank_seeds must be 'per_rank' or 'shared', got {self.rank_seeds!r}")
        if self.lora_plus_ratio <= 0:
            raise ValueError(f"FlatLoRA's lora_plus_ratio must be positive, got {self.lora_plus_ratio}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        for name, host, r, alpha in ranks.places(self, model):
            if beside := [tag for tag, a in attached(host).items() if isinstance(a, FlatLinear)]:
                raise ValueError(f"{name}: {beside[0]!r} and {self.name!r} would both put noise on it, so exclude it "
                                 "from one of them")  # fmt: skip
            scale = alpha / ranks.norm(r, self.rslora)
            attach(host, self.name, FlatLinear(host, r, scale, self.dropout, self.init))

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        if self.lora_plus_ratio == 1.0:
            return None
        return [{"params": [a.B for _, a in self._held(model)], "lr_scale": self.lora_plus_ratio}]

    def beside(self, model: nn.Module, others: Sequence[Method]) -> None:
        for other in others:
            if type(other).after_backward is not Method.after_backward:
                raise ValueError(f"{self.name} and {other.name} both seek flat minima, one by noise and one by several "
                                 f"passes a batch: leave {self.name} out, or {other.name}")  # fmt: skip

    def before_window(self, model: nn.Module, step: Step) -> None:
        done = 1.0 if self.schedule == "constant" else step.index / step.total
        deviation = self.rho * SCHEDULES[self.schedule](min(done, 1.0)) if step.index % self.period == 0 else 0.0
        for name, adapter in self._held(model):
            adapter.open(deviation, self._seed(step.index, name))

    def _held(self, model: nn.Module) -> list[tuple[str, FlatLinear]]:
        return [(name, a) for name, _, a in self.adapters(model) if isinstance(a, FlatLinear)]

    def _seed(self, window: int, layer: str) -> int:
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if together and self.rank_seeds == "per_rank" else 0
        text = f"{self.seed}/{window}/{rank}/{layer}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")

    def before_step(self, model: nn.Module, step: Step) -> None:
        without = {n: a for n, a in self._held(model) if a.noisy and a.std is None and a.A.grad is not None}
        if bypassed := [name for name, a in without.items() if a.training]:
            raise ValueError(
                f"{bypassed[0]} trains without the noise of {self.name}: its weight is read without a call of the "
                f"layer, by the model (exclude it) or by an adapter attached after it (list {self.name} last)"
            )
        if without:
            warnings.warn(
                f"{len(without)} layers, first {next(iter(without))!r}, train without the noise of {self.name}: they "
                "are in evaluation mode, so call .train() on the model before the fit",
                stacklevel=2,
            )

    def finish(self, model: nn.Module) -> None:
        for _, adapter in self._held(model):
            adapter.open(0.0, 0)

    def report(self, model: nn.Module) -> dict[str, dict[str, float]]:
        held = self._held(model)
        return {"noise": {name: 0.0 if a.std is None else float(a.std.mean()) for name, a in held}}

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return ranks.to_lora(self, model, self.r, self.alpha, rslora=self.rslora, dropout=self.dropout, init=self.init)
