"""A change of whole columns or rows of weights: the adapter, and several such changes taken out and added up.

Backward keeps of the activations what the change alone needs: a frozen layer by itself keeps none of its input. In the
maps below ``index`` (c,) says which columns or rows; W (out, in) and b (out,) may be None: then only what the change
adds is computed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import hosts, parts, quant
from lightning_peft.adapter import Base, WeightAdapter
from lightning_peft.attach import adapters

Shape = tuple[int, int]


def columns(x: Tensor, W: Tensor | None, b: Tensor | None, index: Tensor, delta: Tensor, shape: Shape) -> Tensor:
    """``x W^T + b + x[..., index] delta^T`` for delta (out, c), of W frozen; of x the part at index is kept."""
    return _Columns.apply(x, W, b, index, delta, shape)  # pyright: ignore[reportReturnType]


def rows(x: Tensor, W: Tensor | None, b: Tensor | None, index: Tensor, delta: Tensor, shape: Shape) -> Tensor:
    """``x W^T + b`` and ``x delta^T`` added at outputs ``index`` for delta (c, in), of W frozen; all of x is kept."""
    return _Rows.apply(x, W, b, index, delta, shape)  # pyright: ignore[reportReturnType]


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Any, b: Any, index: Tensor, delta: Tensor, shape: Shape) -> Tensor:
        part = x.index_select(-1, index)  # a copy: a view would keep all of x
        ctx.save_for_backward(W, index, delta, part if ctx.needs_input_grad[4] else None)
        ctx.width, ctx.dtype = shape[1], x.dtype
        if W is None:
            return F.linear(part, delta.to(x.dtype))
        y = F.linear(x, W, b)  # in autocast's precision
        y.view(-1, shape[0]).addmm_(part.reshape(-1, len(index)).to(y.dtype), delta.to(y.dtype).mT)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        W, index, delta, part = ctx.saved_tensors
        tokens, dx, d = g.reshape(-1, g.shape[-1]), None, None
        if ctx.needs_input_grad[0]:
            dx = g.new_zeros(*g.shape[:-1], ctx.width) if W is None else g @ W.to(g.dtype)
            dx = dx.index_add_(-1, index, g @ delta.to(g.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[4]:
            d = (tokens.mT @ part.reshape(-1, len(index)).to(g.dtype)).to(delta.dtype)
        return dx, None, tokens.sum(0) if ctx.needs_input_grad[2] else None, None, d, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Any, b: Any, index: Tensor, delta: Tensor, shape: Shape) -> Tensor:
        ctx.save_for_backward(W, index, delta, x if ctx.needs_input_grad[4] else None)
        ctx.dtype = x.dtype
        change = F.linear(x, delta.to(x.dtype))
        y = change.new_zeros(*x.shape[:-1], shape[0]) if W is None else F.linear(x, W, b)
        return y.index_add_(-1, index, change.to(y.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        W, index, delta, x = ctx.saved_tensors
        part, dx, d = g.index_select(-1, index), None, None
        if ctx.needs_input_grad[0]:
            dx = part @ delta.to(g.dtype)
            dx = (dx if W is None else dx.add_(g @ W.to(g.dtype))).to(ctx.dtype)
        if ctx.needs_input_grad[4]:
            d = (part.reshape(-1, len(index)).mT @ x.reshape(-1, x.shape[-1]).to(g.dtype)).to(delta.dtype)
        db = g.reshape(-1, g.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, db, None, d, None


class Slice(WeightAdapter):
    """The change of whole rows (axis 0, delta (c, in)) or columns (axis 1, delta (out, c)) of a weight."""

    axes = {"index": ("channel",), "delta": ("delta_0", "delta_1")}  # no "in", "out": a cut would have to move index
    index: Tensor

    def __init__(self, host: Any, axis: int, index: Tensor) -> None:
        super().__init__()
        self.axis, self.shape = axis, hosts.shape(host)
        self.register_buffer("index", index)
        self.delta = nn.Parameter(torch.empty(self._sizes(len(index))))
        self.reset_parameters()

    def _sizes(self, c: int) -> list[int]:
        return [c, self.shape[1]] if self.axis == 0 else [self.shape[0], c]

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.delta)  # so training starts from the base model

    def check_state(self, state: dict[str, Tensor]) -> None:
        if "delta" in state and "index" in state:
            want, given = self._sizes(len(state["index"])), [*state["delta"].shape]
            if want != given:
                raise ValueError(f"a slice of {len(state['index'])} along axis {self.axis} of this {self.shape} weight "
                                 f"is {want}, but the file has {given}")  # fmt: skip

    def weight(self, W: Tensor) -> Tensor:
        return W.index_add(self.axis, self.index, self.delta.to(W.dtype))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if self.training and not len(self.index):
            raise ValueError(
                "no rows or columns to train were chosen: that takes data, which PEFT shows a method as the fit "
                "starts; without a Trainer: inject(..., stats={name: method.calibrate(...)})"
            )
        run = (rows, columns)[self.axis]
        lowest = next(iter(base.host.adapters.values())) is self
        if lowest and not quant.kind(base.host) and not base.weight.requires_grad:
            return run(x, base.weight, base.bias, self.index, self.delta, self.shape)
        y = base(x)
        return y + run(x, None, None, self.index, self.delta, self.shape).to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (c, in) and B (out, c) of the change as a product; one of them selects."""
        one = F.one_hot(self.index, self.shape[self.axis]).to(self.delta)  # (c, in) or (c, out)
        return (one, self.delta) if self.axis == 1 else (self.delta, one.mT)


class Change(NamedTuple):
    """What is added to one weight: delta (c, in) at rows ``index`` (axis 0), or (out, c) at columns (axis 1)."""

    axis: int
    index: Tensor
    delta: Tensor


Changes = dict[str, Change]  # layer -> what is added to its weight


def extract(model: nn.Module, name: str) -> Changes:
    """Copies, on the CPU, of the slices attached under ``name``.

    Raises:
        ValueError: none is, or another kind of adapter.
    """
    held = {layer: a for layer, _, a in adapters(model, name)}
    if other := next((n for n, a in held.items() if not isinstance(a, Slice)), None):
        raise ValueError(f"{name!r} on {other!r} is a {type(held[other]).__name__}, which is no change of whole slices")
    if not held:
        raise ValueError(f"no adapter is attached under {name!r}; here: {sorted(_tags(model))}")
    return {n: Change(a.axis, _copy(a.index), _copy(a.delta)) for n, a in held.items() if isinstance(a, Slice)}


def _tags(model: nn.Module) -> set[str]:
    return {tag for _, host, _ in adapters(model) for tag in host.adapters}


def _copy(t: Tensor) -> Tensor:
    return t.detach().to("cpu", copy=True)


@torch.no_grad()
def difference(base: nn.Module, trained: nn.Module) -> Changes:
    """What training in place changed: the rows and columns of attentions and MLPs in which two models differ.

    Args:
        base, trained: without adapters; the same model before and after.

    Raises:
        ValueError: they differ elsewhere, or not at all.
    """
    found: Changes = {}
    for s in parts.sides(base):
        D = hosts.read(trained.get_submodule(s.layer)) - hosts.read(base.get_submodule(s.layer))
        index = D.abs().amax(1 - s.axis).nonzero()[:, 0]
        if len(index):
            found[s.layer] = Change(s.axis, _copy(index), _copy(D.index_select(s.axis, index)))
    new = dict(trained.named_parameters())
    differ = [n for n, p in base.named_parameters() if not torch.equal(p, new[n])]
    if left := [n for n in differ if n.removesuffix(".weight") not in found]:
        raise ValueError(
            f"{left[0]!r} ({len(left)} such) differs too, and is neither columns nor rows of v, o, up, down"
        )
    if not found:
        raise ValueError("the two models are the same, so there is no difference to extract")
    return found


def fuse(several: Sequence[Mapping[str, Change]], weights: Sequence[float] = (), overlap: str = "sum") -> Changes:
    """One set of changes that holds all rows and columns of several.

    Args:
        several: such as ``extract`` gives; of the same base.
        weights: factor of each, 1 when empty.
        overlap: where several change the same row or column: their "sum", or the "mean" of those that do.

    Raises:
        ValueError: not as many weights, an unknown overlap, or rows in one where another has columns.
    """
    weights = list(weights) or [1.0] * len(several)
    if not several or len(weights) != len(several) or overlap not in ("sum", "mean"):
        raise ValueError(f"fuse takes changes, a weight for each and overlap 'sum' or 'mean'; got {len(several)}, "
                         f"weights {weights} and {overlap!r}")  # fmt: skip
    fused: Changes = {}
    for layer in dict.fromkeys(n for one in several for n in one):
        mine = [(one[layer], w) for one, w in zip(several, weights, strict=True) if layer in one]
        axis = mine[0][0].axis
        if any(c.axis != axis for c, _ in mine):
            raise ValueError(f"{layer}: one adapter changes rows, another columns; these cannot be fused")
        index = torch.cat([c.index for c, _ in mine]).unique()  # sorted
        size = [*mine[0][0].delta.shape]
        size[axis] = len(index)
        delta, count = mine[0][0].delta.new_zeros(size), torch.zeros(len(index))
        for c, w in mine:
            at = torch.searchsorted(index, c.index)
            delta.index_add_(axis, at, w * c.delta)
            count[at] += 1
        if overlap == "mean":
            delta /= count.to(delta.dtype).view(-1, 1) if axis == 0 else count.to(delta.dtype)
        fused[layer] = Change(axis, index, delta)
    return fused
