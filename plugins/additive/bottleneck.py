"""Small down, non-linear, up networks, and the ways to put one behind, beside or around a module.

``delta(z) = scale * (dropout(f(z D^T + b_D)) U^T + b_U)``, D (m, hidden), U (hidden, m). Houlsby et al. 2019,
arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247; He et al. 2021, arXiv:2110.04366.
"""

import abc
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Adapter, Base

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,  # swish
    "tanh": torch.tanh,
}
SCALES = ("learned", "channel")
NORMS = ("none", "in", "out")


class Bottleneck(Adapter, abc.ABC):
    """What all of them hold. ``delta`` is the definition; a subclass says what it reads and where it is added.

    Args:
        hidden: width of what it reads and returns.
        size: m, the width in the middle.
        nonlinearity: one of ``NONLINEARITIES``.
        scale: a factor; or one of ``SCALES``: a trained one, from 1, for all channels or for each.
        dropout: probability in the middle, behind the non-linearity.
        init_std: standard deviation of D and U, drawn from a normal distribution cut off at two of it; 0: U at zero,
            D Kaiming uniform, which starts from the base model.
        norm: one of ``NORMS``: a layer norm of its own on what it reads, or on what it returns.
    """

    axes = {"down": ("rank", "hidden"), "down_bias": ("rank",), "up": ("hidden", "rank"), "up_bias": ("hidden",)}

    def __init__(
        self,
        hidden: int,
        size: int,
        nonlinearity: str = "relu",
        scale: float | str = 1.0,
        dropout: float = 0.0,
        init_std: float = 0.0,
        norm: str = "none",
    ) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(size, hidden))
        self.down_bias = nn.Parameter(torch.empty(size))
        self.up = nn.Parameter(torch.empty(hidden, size))
        self.up_bias = nn.Parameter(torch.empty(hidden))
        trained = nn.Parameter(torch.empty(hidden if scale == "channel" else 1)) if scale in SCALES else None
        self.scale: Any = float(scale) if trained is None else trained
        if norm != "none":
            self.norm_weight = nn.Parameter(torch.empty(hidden))
            self.norm_bias = nn.Parameter(torch.empty(hidden))
        self.nonlinearity, self.dropout, self.init_std, self.norm = nonlinearity, dropout, init_std, norm
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init_std:
            for t in (self.down, self.up):
                nn.init.trunc_normal_(t, std=self.init_std, a=-2 * self.init_std, b=2 * self.init_std)
        else:
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
            nn.init.zeros_(self.up)
        for name, t in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(t)
            elif name in ("scale", "norm_weight"):
                nn.init.ones_(t)

    def delta(self, z: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden), computed in the activations' precision."""
        if self.norm == "in":
            z = self._normalised(z)
        h = F.linear(z, self.down.to(z.dtype), self.down_bias.to(z.dtype))  # (..., size)
        h = F.dropout(NONLINEARITIES[self.nonlinearity](h), self.dropout, self.training)
        up, bias = self.up.to(h.dtype), self.up_bias.to(h.dtype)
        scale = self.scale.to(h.dtype) if isinstance(self.scale, Tensor) else self.scale
        if isinstance(scale, Tensor) and len(scale) > 1:
            y = F.linear(h, up, bias) * scale
        else:
            y = F.linear(h * scale, up, bias * scale)  # the same, on fewer numbers
        return self._normalised(y) if self.norm == "out" else y

    def _normalised(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.norm_weight.to(x.dtype), self.norm_bias.to(x.dtype))


class Behind(Bottleneck):
    """``h + delta(h)`` of what the host returns."""

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return changed(base(*args, **kwargs), lambda h: h + self.delta(h))


class BehindNorm(Bottleneck):
    """``norm(z + delta(norm(z)))`` on the norm that closes a post-LN block: z is the MLP's output and the residual.

    The norm is used twice, and only what the adapter reads passes through it a second time.
    """

    def forward(self, base: Base, z: Tensor) -> Tensor:
        return base(z + self.delta(base(z)))


class Beside(Bottleneck):
    """``host(x) + delta(x)``."""

    def __init__(self, argument: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.argument = argument

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs[self.argument]
        return changed(base(*args, **kwargs), lambda h: h + self.delta(x))


class OnResidual(Bottleneck):
    """``host(h, x + delta(x))`` on a module that ends a sub-layer with ``norm(layer(h) + x)``, x being its input."""

    def forward(self, base: Base, h: Tensor, x: Tensor) -> Tensor:
        return base(h, x + self.delta(x))


class Slot:
    """What a ``Tap`` saw, until a ``FromTap`` has used it."""

    seen: Tensor | None = None


class Tap(Adapter):
    """Puts what its host reads into the slot."""

    def __init__(self, argument: str, slot: Slot) -> None:
        super().__init__()
        self.argument, self.slot = argument, slot

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        self.slot.seen = args[0] if args else kwargs[self.argument]
        return base(*args, **kwargs)


class FromTap(Bottleneck):
    """``y + delta(x)`` of what its host returns, x being what the slot holds by then.

    The slot is emptied whatever happens: checkpointing breaks a recomputation off once it has what it needs, which is
    never before ``delta`` began.
    """

    def __init__(self, slot: Slot, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slot = slot

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        try:
            y = base(*args, **kwargs)
            x = self.slot.seen
            assert x is not None
            return changed(y, lambda h: h + self.delta(x).reshape(h.shape))  # OPT flattens (batch, time) on the way
        finally:
            self.slot.seen = None


def changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``change`` of a tensor, or of the first of several (attention returns its weights too)."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
