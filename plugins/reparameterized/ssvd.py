"""SSVD: rotate the leading input-side singular vectors of a weight and shift their singular values.

Wang, Watanabe, Van hamme 2025, arXiv:2509.02830. The gate and the fraction are those of the authors' code in ESPnet.
"""

from dataclasses import dataclass
from typing import Any

import torch
from lightning_peft_plugins.reparameterized import dense, ranks
from lightning_peft_plugins.reparameterized.pissa import principal
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, Method, Traits, WeightAdapter, attach, find, hosts

FRACTION = 0.4  # of the smaller side, where neither option says how many vectors


class SSVDLinear(WeightAdapter):
    """``W + U C Vh`` with ``C = diag(S + sigmoid(g) s) R - diag(S)`` (k, k) and R a rotation made of K.

    U (out, k), S (k,), Vh (k, in) are the leading singular triplets of the weight; s (k,), g (1,) and the upper
    triangle K (k (k - 1) / 2,) of a skew-symmetric matrix train.
    """

    axes = {"U": ("out", "k"), "S": ("k",), "Vh": ("k", "in"), "s": ("k",), "K": ("pair",)}
    U: Tensor
    S: Tensor
    Vh: Tensor
    scale = 1.0  # of the product of ``factors``

    def __init__(self, triplets: tuple[Tensor, Tensor, Tensor], method: "SSVD", mirrored: bool) -> None:
        super().__init__()
        for name, t in zip(("U", "S", "Vh"), triplets, strict=True):
            self.register_buffer(name, t.contiguous())
        k = len(self.S)
        self.s = nn.Parameter(torch.empty(k))
        self.K = nn.Parameter(torch.empty(k * (k - 1) // 2))
        self.g = nn.Parameter(torch.empty(1)) if method.gate else None
        self.rotation, self.init_s, self.mirrored = method.rotation, method.init_s, mirrored
        self.form = method.form
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.K)
        nn.init.zeros_(self.s)
        if self.init_s == "kaiming":
            bound = (6 / len(self.s)) ** 0.5
            nn.init.uniform_(self.s, -bound, bound)
        if self.g is not None:
            nn.init.zeros_(self.g)

    def turn(self) -> Tensor:
        """R - I (k, k), written so that a small rotation is not lost beside the 1 of the identity."""
        k = len(self.S)
        row, column = torch.triu_indices(k, k, 1, device=self.K.device)
        K = self.K.new_zeros(k, k).index_put((row, column), self.K)
        K = K - K.mT
        if self.rotation == "first_order":
            return -2 * K
        eye = torch.eye(k, dtype=K.dtype, device=K.device)
        if self.rotation == "cayley":  # (I + K)^-1 (I - K) - I; I + K is never singular
            return -2 * torch.linalg.solve(eye + K, K)
        return torch.linalg.matrix_exp(-2 * K) - eye

    def shift(self) -> Tensor:
        """What is added to the singular values, (k,)."""
        return self.s if self.g is None else torch.sigmoid(self.g) * self.s

    def core(self) -> Tensor:
        """C (k, k), in the precision of the trained tensors also under autocast."""
        with torch.autocast(self.K.device.type, enabled=False):
            shift = self.shift()
            C = (self.S + shift)[:, None] * self.turn() + torch.diag(shift)
        return C.mT if self.mirrored else C

    def weight(self, W: Tensor) -> Tensor:
        return W + self.change()

    def change(self) -> Tensor:
        """U C Vh (out, in)."""
        return self.U @ (self.core() @ self.Vh)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if self.whole(x):
            return dense.forward(base, self.change, x)
        y = base(x)
        U, C, Vh = (t.to(x.dtype) for t in (self.U, self.core(), self.Vh))
        return y + F.linear(F.linear(F.linear(x, Vh), C), U).to(y.dtype)

    def whole(self, x: Tensor) -> bool:
        """Whether to build U C Vh, once forward and once backward, for an input of as many rows.

        Half precision needs a product of its own for it, as dear as the branch.
        """
        if self.form != "auto":
            return self.form == "weight"
        if x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(x.device.type):
            return False
        (out, k), fan_in = self.U.shape, self.Vh.shape[1]
        return x.numel() // fan_in * (fan_in + out + k) > 2 * fan_in * (k + out)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The same change as plain LoRA: A (k, in), B (out, k)."""
        return self.Vh, self.U @ self.core()

    def to_hf(self, name: str, host: Any) -> dict[str, Tensor]:
        return dict(zip(("lora_A.weight", "lora_B.weight"), self.factors(), strict=True))


@dataclass(frozen=True, kw_only=True)
class SSVD(Method):
    """U diag(S') Vh' in place of W = U diag(S) Vh, the first k rows of Vh rotated, the first k values of S shifted.

    The output-side vectors U stay. W stays too: the change of rank k is added to it, and the k triplets lie in the
    file, for no two machines promise the same ones. Trained with AdamW at 1e-4 and no weight decay in the paper's
    recipe. ``hf.save`` writes a plain LoRA of rank k, equal to it.

    Args:
        rotation_ratio: k as a fraction of a layer's smaller side, rounded down; 0.4 where r is not given either.
        r: k itself, in place of the ratio.
        rotation: "first_order", R = I - 2 K (the published default); "cayley", (I + K)^-1 (I - K), which keeps the
            singular values exactly those of S'; "matrix_exp", exp(-2 K) (ours).
        gate: multiply the shifts of a layer with the sigmoid of one trained number.
        side: "input" always rotates input-side vectors, as the paper says. "reference" rotates output-side ones on
            layers with out < in, as the authors' code did for the published numbers.
        init_s: of the shifts, "zero", or "kaiming" as in older versions of that code, which does not start at the base.
        form: how forward computes: "branch" beside the base, "weight" built whole; "auto" whichever is cheaper.
        niter: subspace iterations of a randomised SVD, faster for a small k; 0 is exact. None: 16 (above k=64 4) where
            the smaller side is above 1024 and k at most an eighth of it, else exact, as at the published fraction.
        targets: names, patterns or roles of the layers to adapt.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="reparameterized",
        paper="Wang, Watanabe, Van hamme 2025, arXiv:2509.02830",
        parameters="k (k + 1) / 2 + 1 a layer",
        hosts=("linear", "conv1d"),
        merge=True,
        quantized=True,
        needs_weights=True,
        hf="LORA:",
    )
    name: str = "ssvd"
    rotation_ratio: float | None = None
    r: int | None = None
    rotation: str = "first_order"
    gate: bool = True
    side: str = "input"
    init_s: str = "zero"
    form: str = "auto"
    niter: int | None = None
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""

    def __post_init__(self) -> None:
        known = {
            "rotation": ("first_order", "cayley", "matrix_exp"),
            "side": ("input", "reference"),
            "init_s": ("zero", "kaiming"),
            "form": ("auto", "branch", "weight"),
        }
        for option, values in known.items():
            if (given := getattr(self, option)) not in values:
                raise ValueError(f"SSVD's {option} must be one of {', '.join(values)}; got {given!r}")
        if self.r is not None and self.rotation_ratio is not None:
            raise ValueError(f"SSVD takes r={self.r} or rotation_ratio={self.rotation_ratio}, not both")
        if self.r is not None and self.r < 1:
            raise ValueError(f"SSVD needs at least 1 vector, got r={self.r}")
        if self.rotation_ratio is not None and not 0 < self.rotation_ratio <= 1:
            raise ValueError(f"SSVD's rotation_ratio must lie in (0, 1], got {self.rotation_ratio}")
        if (self.niter or 0) < 0:
            raise ValueError(f"SSVD's niter must be 0 (exact SVD) or more, got {self.niter}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        places = find(model, self.targets, self.traits.hosts, exclude=self.exclude, layers=self.layers)
        sizes = [self._size(name, host) for name, host in places]  # all of them first: the SVDs take long
        todo = list(zip(places, sizes, strict=True))
        for (name, host), k in ranks.bar(todo, "SSVD: singular vectors", [hosts.shape(host) for _, host in places]):
            triplets = principal(hosts.read(host), k, self.niter)
            if not triplets[1][0]:
                raise ValueError(f"{name}: its weight is all zeros, so no rotation would change it; exclude it")
            out, fan_in = hosts.shape(host)
            attach(host, self.name, SSVDLinear(triplets, self, self.side == "reference" and out < fan_in))

    def _size(self, name: str, host: Any) -> int:
        side = min(hosts.shape(host))
        ratio = FRACTION if self.rotation_ratio is None else self.rotation_ratio
        k = int(side * ratio) if self.r is None else self.r
        if not 1 <= k <= side:
            given = f"rotation_ratio={ratio}" if self.r is None else f"r={self.r}"
            raise ValueError(f"{name}: {given} asks for {k} of its {side} singular vectors; exclude it, or change that")
        return k

    def report(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """How far the first-order rotation is from one, the largest entry of R^T R - I, by layer."""
        if self.rotation != "first_order":
            return {}
        held: list[tuple[str, Any]] = [(name, a) for name, _, a in self.adapters(model)]
        return {"rotation_error": {name: _error(a.turn().detach()) for name, a in held}}

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        held: list[Any] = [a for _, _, a in self.adapters(model)]
        k = max(len(a.S) for a in held)
        return ranks.to_lora(self, model, k, k)


def _error(turn: Tensor) -> float:
    return float((turn.mT @ turn).abs().max()) if len(turn) > 1 else 0.0  # R^T R - I = 4 K^T K
