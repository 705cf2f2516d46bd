"""LoKr: a Kronecker product of a small and a low-rank matrix. Yeh et al. 2023 (LyCORIS), arXiv:2309.14859."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_peft_plugins.reparameterized import dense, lycoris, ranks
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, Method, Traits, WeightAdapter, attach, hf, hosts

TENSORS = ("w1", "w1_a", "w1_b", "w2", "w2_a", "t2", "w2_b")


def split(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is ``size``: ``factor`` first if it divides, else the greatest first part within it.

    The first part is never the greater one, but for a given factor that divides.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    top = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    first = next(d for d in range(top, 0, -1) if size % d == 0)
    return first, size // first


class LoKrLinear(WeightAdapter):
    """``y = base(x) + scale * kron(w1, w2) x`` with w1 (l, m), w2 (k, n), on Linear and transformers' Conv1D.

    No ``axes``: out = l k and in = m n are split by position, so channels cannot be cut out of the layer.
    """

    w1: nn.Parameter | None
    w2: nn.Parameter | None

    def __init__(self, host: Any, r: int, scale: float, method: "LoKr") -> None:
        super().__init__()
        out, fan_in = hosts.shape(host)
        places = lycoris.kernel(host)
        self.l, self.k = split(out, method.decompose_factor)
        self.m, self.n = split(fan_in // places, method.decompose_factor)
        self.r, self.scale, self.zero = r, scale, method.zero
        shapes: dict[str, tuple[int, ...]] = {"w1": (self.l, self.m), "w2": (self.k, self.n * places)}
        if method.decompose_both and r < max(self.l, self.m) / 2:
            shapes |= {"w1_a": (self.l, r), "w1_b": (r, self.m)}
            del shapes["w1"]
        if r < max(self.k, self.n) / 2:
            shapes |= {"w2_a": (self.k, r), "w2_b": (r, self.n * places)}
            if method.core and places > 1:
                shapes |= {"t2": (r, r, places), "w2_b": (r, self.n)}
            del shapes["w2"]
        for name in TENSORS:
            self.register_parameter(name, nn.Parameter(torch.empty(shapes[name])) if name in shapes else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for p in self.parameters():
            nn.init.kaiming_uniform_(p, a=math.sqrt(5))  # U(-1/sqrt(columns), 1/sqrt(columns))
        whole, factor = {"w1": (self.w1, "w1_a"), "w2": (self.w2, "w2_b")}[self.zero]
        nn.init.zeros_(self.get_parameter(factor) if whole is None else whole)  # so training starts from the base model

    def left(self) -> Tensor:
        """w1 (l, m), which is small."""
        return self.get_parameter("w1_a") @ self.get_parameter("w1_b") if self.w1 is None else self.w1

    def right(self) -> tuple[Tensor, Tensor]:
        """w2 as a product of (k, r) and (r, n * kernel), where it is one."""
        core, last = self._parameters["t2"], self.get_parameter("w2_b")
        return self.get_parameter("w2_a"), last if core is None else lycoris.through_core(core, last)

    def change(self) -> Tensor:
        w2 = torch.matmul(*self.right()) if self.w2 is None else self.w2
        return torch.kron(self.left() * self.scale, w2)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.change()

    def forward(self, base: Base, x: Tensor) -> Tensor:  # the same map, never forming the (out, in) product
        y = base(x)
        return y + self.update(base.host, x).to(y.dtype)

    def update(self, host: Any, x: Tensor) -> Tensor:
        """What the Kronecker product gives for ``x``, whose (in,) is a matrix (m, n) to it: w1 x w2^T."""
        h, w1 = x.unflatten(-1, (self.m, self.n)), (self.left() * self.scale).to(x.dtype)
        if self.w2 is None:
            a, b = (t.to(x.dtype) for t in self.right())
            h = F.linear(w1 @ F.linear(h, b), a)  # (..., m, r), (..., l, r), (..., l, k)
        elif self.m * self.k * (self.n + self.l) <= self.l * self.n * (self.m + self.k):
            h = w1 @ F.linear(h, self.w2.to(x.dtype))
        else:
            h = F.linear(w1 @ h, self.w2.to(x.dtype))
        return h.flatten(-2)

    def to_hf(self, name: str, host: Any) -> dict[str, Tensor]:
        """The factors under peft's names and in its shapes, as views."""
        return {f"lokr_{n}": p for n, p in self.named_parameters()}


class LoKrConv(LoKrLinear):
    """On a convolution w1 maps blocks of channels, and w2 (k, n * kernel) channels in a block."""

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if base.host.groups > 1:  # their channels and the blocks of w1 overlap
            return dense.forward(base, self.change, x)
        return super().forward(base, x)

    def update(self, host: Any, x: Tensor) -> Tensor:
        channel = -1 - len(host.kernel_size)
        h, w1 = x.unflatten(channel, (self.m, self.n)), (self.left() * self.scale).to(x.dtype)
        a, b = self.right() if self.w2 is None else (None, self.w2)
        lead, kernel = h.shape[:channel], b.view(-1, self.n, *host.kernel_size).to(x.dtype)
        h = host._conv_forward(h.reshape(-1, *h.shape[channel:]), kernel, None)  # private; (batch * m, r or k, *space)
        space = h.shape[2:]
        h = (w1 @ h.view(*lead, -1)).unflatten(-1, (len(b), -1))  # (..., l, r or k, places)
        if a is not None:
            h = a.to(x.dtype) @ h
        return h.flatten(-3, -2).unflatten(-1, space)

    def to_hf(self, name: str, host: Any) -> dict[str, Tensor]:
        tensors = super().to_hf(name, host)
        if self.w2 is not None and isinstance(host, nn.Conv1d):
            raise ValueError(
                f"{name}: huggingface/peft builds another matrix from a whole w2 on a Conv1d, its places taken for "
                f"channels; with a rank below {max(self.k, self.n) / 2:g} w2 has two factors, which it reads right"
            )
        if self.w2 is not None:
            tensors["lokr_w2"] = self.w2.view(self.k, self.n, *host.kernel_size)
        if "lokr_t2" in tensors:
            tensors |= {"lokr_w2_a": tensors["lokr_w2_a"].T, "lokr_t2": lycoris.core_to_hf(tensors["lokr_t2"], host)}
        return tensors


@dataclass(frozen=True, kw_only=True)
class LoKr(Method):
    """W + scale * kron(w1, w2), w1 (l, m) and w2 (k, n) with out = l k and in = m n, w2 a low-rank product.

    Where r is at least half of w2's longer side, w2 is one matrix.

    Args:
        r: rank of w2.
        alpha: the update is scaled by alpha / r.
        decompose_both: make w1 a product of rank r, too, where r is less than half of its longer side.
        decompose_factor: size of the first parts l and m, or the greatest that they may have where it does not divide;
            -1 for parts nearest to the square root.
        core: on convolutions with a kernel beyond 1x1, factors over channels with a core tensor for the kernel's places
            (peft's use_effective_conv2d), not over channels times places.
        zero: which of "w1" and "w2" starts at zero; "w2" as in LyCORIS.
        targets: names, patterns or roles of the layers to adapt; convolutions by name.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
        rank_pattern: pattern -> r for the layers it names.
        alpha_pattern: pattern -> alpha for the layers it names.
    """

    traits = Traits(
        family="reparameterized",
        paper="Yeh et al. 2023, arXiv:2309.14859",
        parameters="l * m + r * (k + n) a layer, out = l * k and in = m * n, n times the kernel for a conv",
        hosts=("linear", "conv1d", "conv"),
        merge=True,
        quantized=True,
        hf="LOKR",
    )
    name: str = "lokr"
    r: int = 8
    alpha: float = 8.0
    decompose_both: bool = False
    decompose_factor: int = -1
    core: bool = False
    zero: str = "w1"
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks.check(self)
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            raise ValueError(f"LoKr's decompose_factor must be at least 1, or -1, got {self.decompose_factor}")
        if self.zero not in ("w1", "w2"):
            raise ValueError(f"LoKr's zero must be 'w1' or 'w2', got {self.zero!r}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        held: set[str] = set()
        for _, host, r, alpha in ranks.places(self, model, clamp=False):
            adapter = (LoKrConv if hosts.kind(host) == "conv" else LoKrLinear)(host, r, alpha / r, self)
            attach(host, self.name, adapter)
            held |= {name for name, _ in adapter.named_parameters()}
        long = f"longer than 2 r = {2 * self.r}"
        if self.core and "t2" not in held:
            raise ValueError(f"LoKr's core=True has no effect: no convolution beyond 1x1 has a side of w2 {long}")
        if self.decompose_both and "w1_a" not in held:
            raise ValueError(f"LoKr's decompose_both=True has no effect: no side of a w1 is {long}")

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fields, tensors = lycoris.to_hf(self, model)
        more = {"decompose_both": self.decompose_both, "decompose_factor": self.decompose_factor}
        return fields | more | {"init_weights": True if self.zero == "w1" else "lycoris"}, tensors

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "LoKr":
        hf.check_fields(config, (*lycoris.HF_FIELDS, "decompose_both", "decompose_factor"), "lokr")
        keys = {name: {key for key in t if key.startswith("lokr_")} for name, t in tensors.items()}
        r, patterns = config.get("r", 8), config.get("rank_pattern")  # that of a whole w2 is in no tensor
        return cls(
            decompose_both=any("lokr_w1_a" in k for k in keys.values()),
            decompose_factor=config.get("decompose_factor", -1),
            core=any("lokr_t2" in k for k in keys.values()),
            zero="w2" if config.get("init_weights") == "lycoris" else "w1",
            **lycoris.from_hf(config, model, {name: hf.lookup(patterns, name, r) for name, k in keys.items() if k}),
        )
