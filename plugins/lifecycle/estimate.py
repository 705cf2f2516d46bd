"""Light-PEFT's estimation on one layer: a trained mask on its input, and how much its adapters matter."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import Adapter, Base
from lightning_peft.importance import change, first_order, ranks
from lightning_peft.padding import Padding


class Estimate(Adapter):
    """Around a layer: a mask on its input, a factor for each head or channel, and how much its adapters matter.

    Buffers hold sums over the second half of the estimation: importance () of all adapters on the layer, and
    rank_<name> (r,) for each adapter with ranks.
    """

    mask: nn.Parameter | None
    importance: Tensor

    def __init__(self, units: int, width: int, adapters: dict[str, Adapter], padding: Padding) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.empty(units)) if units else None
        self.register_buffer("importance", torch.empty(()))
        self.ranked = {tag: size for tag, a in adapters.items() if (size := ranks(a))}
        for tag, size in self.ranked.items():
            self.register_buffer(f"rank_{tag}", torch.empty(size))
        self.width, self.tags, self.padding = width, tuple(adapters), padding
        self.seen: Tensor | None = None  # of the last batch: (sum over tokens, number of tokens)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for p in self.parameters():
            nn.init.ones_(p)
        for b in self.buffers():
            nn.init.zeros_(b)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        if self.mask is not None:  # on the attention map before its product with V, or on act(x W1): here they are one
            args = (args[0] * self.mask.repeat_interleave(self.width).to(args[0].dtype), *args[1:])
        if not (self.tags and self.training and torch.is_grad_enabled()):
            return base(*args, **kwargs)
        y, plain = base.with_plain(*args, **kwargs)
        self.seen = change(y, plain, self.padding.mask)
        return y

    def add(self, seen: Tensor, adapters: dict[str, Adapter]) -> None:
        """One step's scores, from ``seen`` (2,) of all ranks and the gradients; what is no number counts as none."""
        self.importance += (seen[0] / seen[1]).nan_to_num(0.0, 0.0, 0.0)
        for tag in self.ranked:
            self.scores(tag).add_(first_order(adapters[tag]))

    def scores(self, tag: str) -> Tensor:
        return self.get_buffer(f"rank_{tag}")
