"""IPA: LoRA down-projected onto the main directions of the layer's own inputs, found before the fit.

Yin, Venkataramanan, Vu, Bursuc, Cord 2025, arXiv:2509.04398. The mode "pre_ipca" of the authors' code and its variant
that trains on from there; padding is left out, which their code counts.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from lightning_peft_plugins.reparameterized import ranks
from lightning_peft_plugins.reparameterized.pissa import principal
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, Method, Traits, WeightAdapter, attach, hosts
from lightning_peft.attach import evaluating
from lightning_peft.padding import Padding, reading

SEEN = 1e-5  # of the largest singular value: directions below it are rounding


class Directions(NamedTuple):
    """Of n rows: their mean (in,) in float64, and S (k,), V (k, in) of the rest, k at most r."""

    r: int
    n: int
    mean: Tensor
    S: Tensor
    V: Tensor


def join(old: Directions | None, n: int, mean: Tensor, rows: Tensor, r: int, niter: int) -> Directions:
    """``old`` and n more rows, of which the mean (in,) and the centred rows (or S * V in their place) are given.

    The summary of all, up to what was cut off at r: the step of incremental PCA, and that which joins two processes.
    """
    if old is not None:
        between = (old.n * n / (old.n + n)) ** 0.5 * (old.mean - mean)
        rows = torch.cat([old.S[:, None] * old.V, rows, between.float()[None]])
        n, mean = old.n + n, (old.n * old.mean + n * mean) / (old.n + n)
    k = min(r, *rows.shape)
    triplets = principal(rows, k, niter) if niter else torch.linalg.svd(rows.double(), full_matrices=False)
    S, V = (t[:k].to(rows) for t in triplets[1:])
    sign = V.gather(1, V.abs().argmax(1, keepdim=True)).sign()  # the largest entry of a direction becomes positive
    return Directions(r, n, mean, S, V * sign)


class Watch:
    """Summaries of what layers see while ``on``, in memory that does not grow with the data.

    Layers in a row that see one tensor and keep as many directions, such as q, k and v, share the work.

    Args:
        ranks: name of a layer -> directions to keep of its inputs.
        niter: subspace iterations of the randomised SVD of each step; 0 is exact.
        rows: tokens of a batch that a layer looks at, at most; drawn by ``seed`` where there are more.
    """

    def __init__(self, ranks: dict[str, int], niter: int, rows: int, seed: int) -> None:
        self.ranks, self.niter, self.rows = ranks, niter, rows
        self.held: dict[str, Directions | None] = dict.fromkeys(ranks)
        self.padding = Padding()
        self.generator = torch.Generator().manual_seed(seed)
        self.last: tuple[Any, ...] = (None, None, 0, None)

    @contextlib.contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """In evaluation mode, as the untouched base sees its inputs."""
        with evaluating(model), reading(model) as self.padding:
            layers = [(m, self._sees(n)) for n, m in model.named_modules() if n in self.ranks]
            handles = [layer.register_forward_pre_hook(see) for layer, see in layers]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _sees(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            x, old, r = args[0], self.held[name], self.ranks[name]
            if not (self.last[0] is x and self.last[1] is old and self.last[2] == r):
                with torch.autocast(x.device.type, enabled=False):
                    self.last = (x, old, r, self._with(old, x, r))
            self.held[name] = self.last[3]

        return see

    def _with(self, old: Directions | None, x: Tensor, r: int) -> Directions | None:
        mask = self.padding.of(x)
        rows = (x if mask is None else x[mask.bool()]).reshape(-1, x.shape[-1])
        if len(rows) > self.rows:
            rows = rows[torch.randperm(len(rows), generator=self.generator)[: self.rows].to(x.device)]
        if not len(rows):
            return old
        rows = rows.detach().float()
        mean = rows.mean(0, dtype=torch.float64)
        return join(old, len(rows), mean, rows - mean.float(), r, self.niter)


def projector(summary: Directions | None, r: int, fan_in: int, seed: int) -> tuple[Tensor, int]:
    """P (r, in) with orthonormal rows, and how many of them the data gave; random ones fill it up."""
    V = torch.zeros(0, fan_in) if summary is None else summary.V[summary.S > SEEN * summary.S[0]][:r]
    if len(V) < r:
        drawn = torch.randn(fan_in, r - len(V), generator=torch.Generator().manual_seed(seed)).to(V.device)
        for _ in range(2):  # twice, or what rounding left of V would stay
            drawn = torch.linalg.qr(drawn - V.mT @ (V @ drawn))[0]
        return torch.cat([V, drawn.mT]), len(V)
    return V.clone(), r


class IPALinear(WeightAdapter):
    """``W + scale * B P`` with B (out, r) from zero and P (r, in) of orthonormal rows; the input is not centred."""

    axes = {"P": ("rank", "in"), "B": ("out", "rank")}
    P: Tensor

    def __init__(self, host: Any, r: int, P: Tensor | None, method: "IPA") -> None:
        super().__init__()
        out, fan_in = hosts.shape(host)
        self.calibrated = P is not None
        P = torch.zeros(r, fan_in) if P is None else P
        if method.train_projector:
            self.P = nn.Parameter(P)
        else:
            self.register_buffer("P", P)
        self.B = nn.Parameter(torch.empty(out, r))
        self.scale, self.dropout = method.scale, method.dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.B)  # so training starts from the base model
        if not self.calibrated:
            nn.init.zeros_(self.P)

    def check_state(self, state: dict[str, Tensor]) -> None:
        self.calibrated |= "P" in state

    def weight(self, W: Tensor) -> Tensor:
        return W + self.scale * self.B @ self.P

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if self.training and not self.calibrated:
            raise ValueError("IPA's projector was not learned: that takes data, which PEFT shows a method as the fit "
                             "starts; without a Trainer: inject(..., stats={name: method.calibrate(...)})")  # fmt: skip
        y = base(x)
        h = F.linear(F.dropout(x, self.dropout, self.training), self.P.to(x.dtype))  # (..., r)
        return y + F.linear(h * self.scale, self.B.to(x.dtype)).to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """P (r, in) and B (out, r)."""
        return self.P, self.B

    def to_hf(self, name: str, host: Any) -> dict[str, Tensor]:
        return {"lora_A.weight": self.P, "lora_B.weight": self.B}


@dataclass(frozen=True, kw_only=True)
class IPA(Method):
    """W + scale * B P: P the r main directions of the layer's inputs on the untouched base, B (out, r) trained.

    The directions are learned by forward passes over PEFT(calibration_batches=...) batches, one incremental PCA a
    layer, in memory that does not grow with them; several processes join theirs. Rows that the attention mask leaves
    out do not count. The file holds P, so a resumed fit learns nothing anew.

    Args:
        r: rank of the update.
        scale: of the update, whatever r is (the authors take 0.25 for language, 0.05 for vision).
        dropout: probability on the update's input.
        train_projector: train P too, from there.
        niter: subspace iterations of the randomised SVD of each step; 0 is exact.
        rows: tokens of a batch that a layer looks at, at most; drawn where there are more.
        seed: of that draw.
        targets: names, patterns or roles of the layers to adapt.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
        rank_pattern: pattern -> r for the layers it names; elsewhere r is clamped to the layer's smaller side.
    """

    traits = Traits(
        family="reparameterized",
        paper="Yin, Venkataramanan, Vu, Bursuc, Cord 2025, arXiv:2509.04398",
        parameters="r * out a layer; r * (in + out) with train_projector",
        hosts=("linear", "conv1d"),
        merge=True,
        quantized=True,
        hf="LORA:",
    )
    alpha, alpha_pattern = None, {}  # no annotation, so no options: what ranks.py asks of a method without them
    name: str = "ipa"
    r: int = 8
    scale: float = 0.25
    dropout: float = 0.0
    train_projector: bool = False
    niter: int = 3
    rows: int = 8192
    seed: int = 0
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""
    rank_pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks.check(self)
        ranks.check_dropout(self)
        if self.niter < 0 or self.rows < 1 or self.scale <= 0:
            given = f"niter={self.niter}, rows={self.rows}, scale={self.scale}"
            raise ValueError(f"IPA needs a niter of 0 or more, rows of 1 or more and a positive scale, got {given}")

    def calibrate(self, model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> dict[str, Any]:
        """Layer -> summary of its inputs, None for a layer that saw none."""
        watch = Watch({name: r for name, _, r in self._places(model)}, self.niter, self.rows, self.seed)
        with watch.on(model), torch.no_grad():
            for batch in batches:
                loss(batch)
        return watch.held

    def combine(self, stats: list[dict[str, Any]]) -> dict[str, Any]:
        total = dict(stats[0])
        for name, s in ((name, s) for other in stats[1:] for name, s in other.items() if s is not None):
            old = total[name]
            total[name] = s if old is None else join(old, s.n, s.mean, s.S[:, None] * s.V, s.r, niter=0)
        return total

    def inject(self, model: nn.Module, stats: dict[str, Any] | None = None) -> None:
        short = []
        for name, host, r in self._places(model):
            P = None
            if stats is not None:
                P, known = projector(stats[name], r, hosts.shape(host)[1], self.seed)
                short += [name] if known < r else []
            attach(host, self.name, IPALinear(host, r, P, self))
        if short:
            warnings.warn(f"{len(short)} layers, first {short[0]!r}, saw inputs in fewer than r directions: the rest "
                          "of P is random; give more calibration_batches, or a smaller r", stacklevel=2)  # fmt: skip

    def _places(self, model: nn.Module) -> Iterator[tuple[str, Any, int]]:
        for name, host, r, _ in ranks.places(self, model):
            if r > hosts.shape(host)[1]:
                raise ValueError(f"{name}: r={r}, but its inputs have {hosts.shape(host)[1]} directions")
            yield name, host, r

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return ranks.to_lora(self, model, self.r, self.scale * self.r, dropout=self.dropout)
