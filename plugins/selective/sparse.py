"""What the methods that train scattered entries of weights share: the sparse difference, and how entries are chosen."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, WeightAdapter, hosts
from lightning_peft.attach import evaluating
from lightning_peft.quant import kind

HALF = 1 << 16


class Sparse(WeightAdapter):
    """``W + S``, where S holds v (k,) at the rows index[0] and columns index[1] of the (out, in) matrix, else zero."""

    axes = {"index": ("coordinate", "entry"), "v": ("entry",)}
    index: Tensor

    def __init__(self, host: Any, flat: Tensor) -> None:
        super().__init__()
        self.shape = hosts.shape(host)
        self.register_buffer("index", pairs(flat, self.shape[1]))
        self.v = nn.Parameter(torch.empty(len(flat)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.v)  # so training starts from the base model

    def weight(self, W: Tensor) -> Tensor:
        return W + spread(self.index, self.v, self.shape)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if self.training and not len(self.v):
            raise ValueError("no entries to train were chosen: that takes data, which PEFT shows a method as the fit "
                             "starts; without a Trainer: inject(..., stats={name: method.calibrate(...)})")  # fmt: skip
        return run(base, x, self.index, self.v) if linear(base) else super().forward(base, x)


def linear(base: Base) -> bool:
    """True where ``run`` serves in place of the definition."""
    return hosts.kind(base.host) in ("linear", "conv1d")


def run(base: Base, x: Tensor, index: Tensor, v: Tensor) -> Tensor:
    """What a linear layer gives with v (k,) added to its weight at index (2, k)."""
    if base.maps_weight and not kind(base.host):
        return SparseLinear.apply(x, base.weight, base.bias, index, v)  # pyright: ignore[reportReturnType]
    y, change = base(x), SparseLinear.apply(x, None, None, index, v, hosts.shape(base.host))
    return y + change.to(y.dtype)  # pyright: ignore[reportOptionalMemberAccess]


def spread(index: Tensor, v: Tensor, shape: tuple[int, int]) -> Tensor:
    """(out, in) zeros but for v (k,) at index (2, k)."""
    return v.new_zeros(shape).index_put(tuple(index), v)


class SparseLinear(torch.autograd.Function):
    """``x (W + S)^T + b``, the sum formed anew in backward: no second weight is kept from forward to backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor | None, b: Tensor | None, index: Tensor, v: Tensor, shape: Any = None
    ) -> Tensor:
        ctx.save_for_backward(x, W, b, index, v)
        ctx.shape = shape
        return F.linear(x, _sum(W, index, v, x.dtype, shape), b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W, b, index, v = ctx.saved_tensors
        rows = g.reshape(-1, g.shape[-1])  # (tokens, out)
        dense = rows.T @ x.reshape(-1, x.shape[-1]).to(g.dtype)  # (out, in)
        return (
            (g @ _sum(W, index, v, g.dtype, ctx.shape)).to(x.dtype) if ctx.needs_input_grad[0] else None,
            dense.to(W.dtype) if ctx.needs_input_grad[1] else None,
            rows.sum(0).to(b.dtype) if ctx.needs_input_grad[2] else None,
            None,
            dense[tuple(index)].to(v.dtype),
            None,
        )


def _sum(W: Tensor | None, index: Tensor, v: Tensor, dtype: torch.dtype, shape: Any) -> Tensor:
    """W + S, or S alone, with one rounding to ``dtype``."""
    if W is None:
        return spread(index, v.to(dtype), shape)
    out = W.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return out.index_put_(tuple(index), (out[tuple(index)] + v).to(dtype))


def pairs(flat: Tensor, width: int) -> Tensor:
    """(2, k) rows and columns of flat positions in a matrix."""
    return torch.stack([flat // width, flat % width]).to(torch.int32)


def highest(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Flat positions, in order, of the k highest of all scores: one tensor for each. Exactly k; of equals the first.

    Exact and the same on every device, without sorting the scores or joining them.

    Raises:
        ValueError: a score that is not a number, or infinite.
    """
    if not all(bool((s < torch.inf).all()) for s in scores):
        raise ValueError("scores that choose entries must be finite: some weight, loss or gradient is not")
    bits = [s.detach().float().flatten().view(torch.int32) for s in scores]
    keys = [b ^ ((b >> 31) & 0x7FFFFFFF) for b in bits]  # integers in the order of the floats
    least = _threshold(keys, k)
    room, chosen = k - sum(int((key > least).sum()) for key in keys), []
    for key in keys:
        equal = (key == least).nonzero()[:room, 0]
        room -= len(equal)
        chosen.append(torch.cat([(key > least).nonzero()[:, 0], equal]).sort().values)
    return chosen


def _threshold(keys: Sequence[Tensor], k: int) -> int:
    """The k-th highest key, by counting upper halves, then the lower halves below the one that it has."""
    upper, above = _bucket([(key >> 16) + HALF // 2 for key in keys], k)
    lower, _ = _bucket([key[(key >> 16) == upper - HALF // 2] & (HALF - 1) for key in keys], k - above)
    return ((upper - HALF // 2) << 16) + lower


def _bucket(values: Sequence[Tensor], k: int) -> tuple[int, int]:
    """The k-th highest of values in 0..65535, and how many are above it."""
    counts = sum((torch.bincount(v, minlength=HALF).cpu() for v in values), torch.zeros(HALF, dtype=torch.long))
    from_top = counts.flip(0).cumsum(0)
    value = HALF - 1 - int((from_top < k).sum())
    return value, int(from_top[HALF - 1 - value] - counts[value])


def choose(by: Any, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer -> flat positions of the entries that score highest: the share ``by.density`` of all, or of each layer.

    Raises:
        ValueError: less than one entry.
    """
    chosen: dict[str, Tensor] = {}
    for group in [list(scores)] if by.scope == "global" else [[name] for name in scores]:
        total = sum(int((scores[n] != -torch.inf).sum()) for n in group)
        k = int(by.density * total)
        if not k:
            where = repr(group[0]) if len(group) == 1 else f"{len(group)} layers"
            raise ValueError(f"{by.name}: density {by.density} of {total} weights of {where} is less than one entry")
        chosen |= zip(group, highest([scores[n] for n in group], k), strict=True)
    return chosen


def without_padding(host: Any, score: Tensor) -> Tensor:
    """The score with the padding row of an embedding, which never trains, below all others."""
    if getattr(host, "padding_idx", None) is None:
        return score
    return score.index_fill(1, torch.tensor([host.padding_idx], device=score.device), -torch.inf)


def check(method: Any) -> None:
    """Refuse a density or scope that is none; ``method`` has both."""
    if not 0 < method.density <= 1:
        raise ValueError(f"{method.name}: density is a share of the weights in (0, 1], got {method.density}")
    if method.scope not in ("layer", "global"):
        raise ValueError(f"{method.name}: scope is 'layer' or 'global', got {method.scope!r}")


@contextlib.contextmanager
def looking(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """In evaluation mode, with gradients for these weights."""
    before = [w.requires_grad for w in weights]
    for w in weights:
        w.requires_grad_(True)
    try:
        with evaluating(model):
            yield
    finally:
        for w, trains in zip(weights, before, strict=True):
            w.requires_grad_(trains)
