"""What soft prompts share that a small network computes while they train, and of which the result is kept."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def settle(adapter: Any, plain: str) -> None:
    """End of training: keep what a network computes as the tensor ``plain``, and empty the network's own.

    Its input is ``adapter.e``, its output ``adapter.vectors()``. Tensors that a strategy has sharded stay as they are.
    """
    if not len(adapter.e) or any(hasattr(p, "full_tensor") for p in adapter.parameters()):
        return
    with torch.no_grad():
        getattr(adapter, plain).copy_(adapter.vectors())
    for name, p in adapter.named_parameters():
        p.grad = None
        if name != plain:
            p.data = p.data.new_empty([0] * p.dim())
    read_form(adapter, plain, {"e": adapter.e})


def read_form(adapter: Any, plain: str, state: Mapping[str, Tensor]) -> None:
    """What trains, as a file's shapes tell it: the network, or after ``settle`` the plain tensor."""
    settled = not len(state.get("e", adapter.e))
    for name, p in adapter.named_parameters():
        p.requires_grad_((name == plain) == settled)


def reset_linear(weight: Tensor, bias: Tensor) -> None:
    """As nn.Linear starts."""
    bound = max(weight.shape[1], 1) ** -0.5
    nn.init.uniform_(weight, -bound, bound)
    nn.init.uniform_(bias, -bound, bound)
