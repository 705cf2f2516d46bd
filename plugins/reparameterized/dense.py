"""A change of the weight that has to be built whole, for methods whose change no product of thin factors gives."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_peft import Base, hosts

SMALL = 2**16  # entries of a matrix that is kept for backward, for building it again would take longer than that saves


def forward(base: Base, change: Callable[[], Tensor], x: Tensor) -> Tensor:
    """``base(x)`` with the (out, in) matrix ``change()`` added to the weight.

    In full precision the sum of both is applied, one product instead of two. In less it would round the change away,
    so this has a product of its own. The matrix is as large as the weight, and autograd would keep it from forward to
    backward for every layer: it is built a second time there instead.
    """
    host = base.host
    full = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
    one = full and base.maps_weight and host.weight.dtype == x.dtype

    def mapped(x: Tensor) -> Tensor:
        if one:
            return hosts.run(host, base.weight + change(), x, base.bias)
        return _without_bias(host, change().to(x.dtype), x)

    again = torch.is_grad_enabled() and host.weight.numel() > SMALL
    y = checkpoint(mapped, x, use_reentrant=False, preserve_rng_state=False) if again else mapped(x)
    if one:
        return y
    below = base(x)
    return below + y.to(below.dtype)


def _without_bias(host: Any, matrix: Tensor, x: Tensor) -> Tensor:
    if hosts.kind(host) == "conv":
        return host._conv_forward(x, matrix.view_as(host.weight), None)  # private, but it honours padding_mode
    return F.linear(x, matrix)
