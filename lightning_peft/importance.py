"""How much adapters and their ranks matter, and which units stay when the least important go."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_peft.adapter import Adapter

Key = TypeVar("Key")


@torch.no_grad()
def change(y: Any, plain: Any, mask: Tensor | None = None) -> Tensor:
    """(sum over tokens of |y - plain| / |plain|, number of tokens), (2,), for y, plain (..., hidden).

    Of outputs that are tuples the first element counts, as where attention returns its map too.
    ``mask`` (batch, time), 0 at padding, leaves tokens out where y has as many: also flattened, as OPT's MLP sees them,
    but not a pooler's (batch, hidden).
    """
    y, plain = (t[0].float() if isinstance(t, tuple) else t.float() for t in (y, plain))
    ratio = (y - plain).norm(dim=-1) / plain.norm(dim=-1)  # (...)
    real = torch.ones_like(ratio, dtype=torch.bool)
    if mask is not None and mask.numel() == ratio.numel():
        real = mask.reshape(ratio.shape) != 0
    return torch.stack([ratio.where(real, 0).sum(), real.sum().to(ratio)])


def ranks(adapter: Adapter) -> int:
    """Size of the axis "rank" of the adapter's trained matrices; 0 where none has it."""
    return next((t.shape[dim] for t, dim in _ranked(adapter)), 0)


@torch.no_grad()
def first_order(adapter: Adapter) -> Tensor:
    """|mean of t * dL/dt| over each rank's part, (r,), summed over the adapter's trained matrices t with that axis.

    What the loss changes by, to first order, when a rank is left out; a group's saliency, so that the absolute value is
    taken of the mean. Ranks for which it is no number, as where a scaled loss overflowed, get 0.
    """
    terms = []
    for t, dim in _ranked(adapter):
        grad = torch.zeros_like(t) if t.grad is None else t.grad
        terms.append((t * grad).movedim(dim, 0).flatten(1).mean(1).abs())
    return torch.stack(terms).sum(0).nan_to_num(0.0, 0.0, 0.0)


def _ranked(adapter: Adapter) -> list[tuple[nn.Parameter, int]]:
    held = [(getattr(adapter, n), axes.index("rank")) for n, axes in adapter.axes.items() if "rank" in axes]
    return [(t, dim) for t, dim in held if isinstance(t, nn.Parameter) and t.dim() > 1]


def above(
    scores: Mapping[Key, Tensor], ratio: float, *, alone: bool = False, least: int = 1, multiple: int = 1
) -> dict[Key, Tensor]:
    """Positions in each of ``scores`` (n,) that lie strictly above the quantile ``ratio`` of all of them, sorted.

    Args:
        scores: of the units that compete, a tensor for each layer.
        ratio: share to leave out, the quantile taken by linear interpolation in float64; at 0 all stay.
        alone: each layer has a quantile of its own.
        least: how many stay in each layer whatever they score; the best of all stays anyway. Ties go to the first.
        multiple: that the number in a layer is rounded up to, as far as there are units.
    """
    if alone or not scores:
        return {k: above({k: s}, ratio, least=least, multiple=multiple)[k] for k, s in scores.items()}
    limit = torch.cat(list(scores.values())).double().quantile(ratio) if ratio else -math.inf
    best = max(scores, key=lambda k: float(scores[k].max()))
    kept = {}
    for key, s in scores.items():
        count = max(int((s.double() > limit).sum()), least, int(key == best))
        count = min(len(s), math.ceil(count / multiple) * multiple)
        kept[key] = s.argsort(descending=True, stable=True)[:count].sort().values
    return kept
