"""PMSS: a small trained core between frozen columns and rows of the weight itself. 2024, arXiv:2409.16722.

The form, what is frozen and the zero start are those of the paper's figure. Inferred, for its method section was not at
hand: how rows and columns are picked, the scale, the default rank and the targets.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from lightning_peft_plugins.reparameterized import ranks
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, Method, Traits, WeightAdapter, attach, hosts

SELECTIONS = ("cpqr", "cpqr_sketch", "norm", "norm_nested", "inverse_norm", "random")


class PMSSLinear(WeightAdapter):
    """``W + scale * C U R`` with ``C = W[:, columns]`` (out, c), ``R = W[rows]`` (r, in) and a trained core U (c, r).

    Columns of C and rows of R are divided by their lengths at the start, if so asked. Places and lengths are buffers
    and lie in the file. No ``axes``: after a cut the places would point to other channels.
    """

    columns: Tensor
    rows: Tensor
    column_norms: Tensor
    row_norms: Tensor

    def __init__(
        self, places: tuple[Tensor, Tensor], norms: tuple[Tensor, Tensor], scale: float, dropout: float
    ) -> None:
        super().__init__()
        for names, tensors in ((("columns", "rows"), places), (("column_norms", "row_norms"), norms)):
            for name, t in zip(names, tensors, strict=True):
                self.register_buffer(name, t)
        self.U = nn.Parameter(torch.zeros(len(places[0]), len(places[1])))
        self.scale, self.dropout = scale, dropout

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.U)

    def core(self) -> Tensor:
        """U (c, r) with the lengths and the scale in it."""
        return self.scale * self.U / (self.column_norms[:, None] * self.row_norms)

    def weight(self, W: Tensor) -> Tensor:
        U = self.core()
        return W + W[:, self.columns].to(U.dtype) @ U @ W[self.rows].to(U.dtype)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y, W = base(x), base.weight
        h = F.dropout(self._inner(base, W, x, y), self.dropout, self.training)  # (..., r)
        U, C = self.core().to(h.dtype), W[:, self.columns].to(h.dtype)
        return y + F.linear(F.linear(h, U), C).to(y.dtype)

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """The same change of W (out, in) as plain LoRA of the smaller of r and c: A (rank, in), B (out, rank)."""
        C, U, R = W[:, self.columns].to(self.U.dtype), self.core(), W[self.rows].to(self.U.dtype)
        return (R, C @ U) if U.shape[1] <= U.shape[0] else (U @ R, C)

    def _inner(self, base: Base, W: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """R x, which the base has computed already: its outputs at the rows, less their bias.

        Computed anew where an adapter that is no map on the weight lies below, and where a bias was added in half
        precision: it may be a hundred times the rest (Qwen's keys), which is then rounded away.
        """
        bias = base.bias
        if base.maps_weight and (bias is None or y.dtype in (torch.float32, torch.float64)):
            inner = y[..., self.rows]
            return inner if bias is None else inner - bias[self.rows].to(y.dtype)
        return F.linear(x, W[self.rows].to(x.dtype))


class Plain(NamedTuple):
    """What is written of an adapter: A (rank, in) and B (out, rank) of a plain LoRA."""

    A: Tensor
    B: Tensor
    scale: float = 1.0

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B

    def to_hf(self, name: str, host: Any) -> dict[str, Tensor]:
        return {"lora_A.weight": self.A, "lora_B.weight": self.B}


def pivots(M: Tensor, count: int) -> Tensor:
    """The first ``count`` columns (count,) that a column-pivoted QR of M picks, in its order; the lowest of equal ones.

    Greedy: the column that is longest, less what the picked ones span. In float64 on the CPU with a second
    orthogonalisation, so that two machines pick alike.

    Raises:
        ValueError: M has not that many independent columns.
    """
    M = M.detach().to("cpu", torch.float64)
    left = M.square().sum(0)  # squared lengths of what is left of each column
    floor = left.max() * 1e-24
    Q, picked = M.new_empty(len(M), count), []
    for k in range(count):
        j = int(left.argmax())
        q = M[:, j].clone()
        for _ in range(2):
            q -= Q[:, :k] @ (Q[:, :k].mT @ q)
        if left[j] <= floor or q.square().sum() <= floor:
            raise ValueError(f"only {k} of its columns or rows are independent")
        Q[:, k] = q / q.norm()
        left = (left - (Q[:, k] @ M).square()).clamp(min=0)
        left[j] = -1
        picked.append(j)
    return torch.tensor(picked)


def select(W: Tensor, c: int, r: int, method: "PMSS") -> tuple[Tensor, Tensor]:
    """Places (c,) and (r,) of the columns and rows of W (out, in) that ``method`` picks."""
    W = W.detach().float()
    generator = torch.Generator().manual_seed(method.seed)
    if method.selection == "cpqr":
        return pivots(W, c), pivots(W.mT, r)
    if method.selection == "cpqr_sketch":
        columns = pivots(_sketch(W, c + method.oversample, generator), c)
        return columns, pivots(_sketch(W.mT, r + method.oversample, generator), r)
    columns, rows = W.norm(dim=0).cpu(), W.norm(dim=1).cpu()
    if method.selection.startswith("norm"):
        longest = _longest(columns, c)
        within = rows if method.selection == "norm" else W[:, longest.to(W.device)].norm(dim=1).cpu()
        return longest, _longest(within, r)
    if method.selection == "random":
        columns, rows = torch.ones_like(columns), torch.ones_like(rows)
    likely = (1 / norms.clamp(min=1e-12) for norms in (columns, rows))
    drawn = [torch.multinomial(w, k, generator=generator) for w, k in zip(likely, (c, r), strict=True)]
    return drawn[0], drawn[1]


def _sketch(M: Tensor, height: int, generator: torch.Generator) -> Tensor:
    """Random mixtures of M's rows: they have its columns' dependences, and are fewer."""
    if height >= len(M):
        return M
    return torch.randn(height, len(M), generator=generator, device="cpu").to(M.device) @ M


def _longest(norms: Tensor, count: int) -> Tensor:
    return norms.argsort(descending=True, stable=True)[:count]


@dataclass(frozen=True, kw_only=True)
class PMSS(Method):
    """W + alpha / r * C U R: columns C and rows R of W frozen, the (c, r) core between them trained from zero.

    The count is c * r whatever the size of the layer, so r is several hundred at the cost of a small LoRA. The places
    lie in the file and are never picked again for it. C and R are read from the weight below at every forward, which
    under another weight method on the same layer is the one that this method makes. ``hf.save`` writes a plain LoRA of
    the same change, whose file holds C and R and so is as large as a LoRA of rank r.

    Args:
        r: rows, and columns if c is not given.
        c: columns.
        alpha: the update is scaled by alpha / r; a scale of 1 when None.
        selection: how rows and columns are picked. "cpqr", by column-pivoted QR (inferred); "cpqr_sketch", the same on
            random mixtures, many times faster; "norm" the longest; "norm_nested" the longest columns, then the rows
            longest within them (tCURLoRA); "inverse_norm" drawn, the short ones likelier (CURLoRA); "random".
        normalize: "unit" divides each column of C and row of R by its length, so that the learning rate depends less on
            the layer and on r (ours); "none" takes them as they are.
        oversample: random mixtures beyond r that the sketch takes.
        seed: of what is drawn.
        dropout: probability on the core's input.
        targets: names, patterns or roles of the layers to adapt.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
        rank_pattern: pattern -> r for the layers it names; elsewhere r is clamped to the layer's smaller side.
        alpha_pattern: pattern -> alpha for the layers it names.
    """

    traits = Traits(
        family="reparameterized",
        paper="PMSS 2024, arXiv:2409.16722",
        parameters="c * r a layer",
        hosts=("linear", "conv1d"),
        merge=True,
        quantized=True,
        needs_weights=True,
        hf="LORA:",
    )
    name: str = "pmss"
    r: int = 256
    c: int | None = None
    alpha: float | None = None
    selection: str = "cpqr_sketch"
    normalize: str = "unit"
    oversample: int = 20
    seed: int = 0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks.check(self)
        ranks.check_dropout(self)
        for option, known in (("selection", SELECTIONS), ("normalize", ("unit", "none"))):
            if (given := getattr(self, option)) not in known:
                raise ValueError(f"PMSS's {option} must be one of {', '.join(known)}; got {given!r}")
        if self.c is not None and self.c < 1:
            raise ValueError(f"PMSS needs at least 1 column, got c={self.c}")
        if self.oversample < 0:
            raise ValueError(f"PMSS's oversample must be 0 or more, got {self.oversample}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        places = list(ranks.places(self, model))
        for name, host, r, alpha in ranks.bar(places, "PMSS: rows and columns", [hosts.shape(p[1]) for p in places]):
            out, fan_in = hosts.shape(host)
            c = self.c or r
            if c > fan_in or r > out:
                raise ValueError(f"{name}: c={c}, r={r}, but its {(out, fan_in)} weight has fewer; exclude it")
            attach(host, self.name, self._adapter(name, hosts.read(host).detach(), c, r, alpha / r))

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        r = min(self.r, self.c or self.r)
        return ranks.to_lora(self, model, r, r, plain=lambda host, a: Plain(*a.factors(hosts.read(host).detach())))

    def _adapter(self, name: str, W: Tensor, c: int, r: int, scale: float) -> PMSSLinear:
        try:
            columns, rows = (t.to(W.device) for t in select(W, c, r, self))
        except ValueError as cause:
            raise ValueError(f"{name}: c={c}, r={r}, but {cause}; lower them or exclude it") from cause
        norms = W[:, columns].float().norm(dim=0), W[rows].float().norm(dim=1)
        if not (norms[0].all() and norms[1].all()):
            raise ValueError(f"{name}: a picked column or row of its weight is all zeros; exclude it")
        if self.normalize == "none":
            norms = torch.ones_like(norms[0]), torch.ones_like(norms[1])
        return PMSSLinear((columns, rows), norms, scale, self.dropout)
