"""Slice or grow a named axis of an adapter, the optimizer's moments included."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.adapter import Adapter


def take(t: Tensor, dim: int, index: Tensor) -> Tensor:
    """``t`` at ``index`` along ``dim``; -1 gives a new slot of zeros."""
    if t.shape[dim] == 0:
        return t.new_zeros(*t.shape[:dim], len(index), *t.shape[dim + 1 :])
    out = t.index_select(dim, index.clamp(min=0))
    new = (index < 0).view(-1, *[1] * (t.dim() - dim - 1))  # a mask, since positions cannot be told on meta tensors
    return out.masked_fill_(new, 0)


@torch.no_grad()
def take_parameter(p: Tensor, dim: int, index: Tensor, optimizers: Iterable[Optimizer] = ()) -> None:
    """Change ``p`` in place along ``dim``: the object stays, so parameter groups hold, and its moments follow.

    A state tensor follows when it has the parameter's shape, which is what torch.optim's optimizers keep.
    """
    index, shape = index.to(p.device), p.shape
    for optimizer in optimizers:
        state = optimizer.state.get(p, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == shape:
                state[key] = take(value, dim, index)
    grad = p.grad
    p.grad = None  # a gradient of the old shape cannot stay while the data changes
    new = take(p.data, dim, index)
    if new.shape != p.shape:  # another dtype makes autograd forget the old shape, which it would go on to expect
        other = torch.float64 if p.dtype == torch.float32 else torch.float32  # while a graph is alive, such as that
        p.data = new.new_empty(0, dtype=other)  # of a model output in a reference cycle
    p.data = new
    if grad is not None:
        p.grad = take(grad, dim, index)


def resize(adapter: Adapter, axis: str, index: Tensor, optimizers: Iterable[Optimizer] = ()) -> None:
    """Keep the slots ``index`` of a named axis in every tensor that has it; -1 is a new slot of zeros.

    Args:
        adapter: whose ``axes`` name the axis.
        axis: such as "rank", "in" or "out".
        index: (new size,) integers into the present axis, or -1; may repeat nothing else.
        optimizers: whose moments follow.

    Raises:
        ValueError: no tensor has the axis, or an index is out of range.
    """
    held = [(name, dim) for name, axes in adapter.axes.items() for dim, a in enumerate(axes) if a == axis]
    if not held:
        known = sorted({a for axes in adapter.axes.values() for a in axes})
        raise ValueError(
            f"{type(adapter).__name__} has no axis {axis!r} to resize; its axes: {', '.join(known) or '-'}"
        )
    size = getattr(adapter, held[0][0]).shape[held[0][1]]
    if len(index) and (int(index.max()) >= size or int(index.min()) < -1):
        raise ValueError(f"index for axis {axis!r} must lie in -1..{size - 1}, got {index.tolist()}")
    optimizers = list(optimizers)
    for name, dim in held:
        tensor = getattr(adapter, name)
        if isinstance(tensor, nn.Parameter):
            take_parameter(tensor, dim, index, optimizers)
        else:
            setattr(adapter, name, take(tensor, dim, index.to(tensor.device)))
