"""What the methods that move ranks share: factors with a trained diagonal between them, which says what to prune."""

from typing import Any

import torch
from lightning_peft_plugins.reparameterized.lora import LoRAConv, LoRALinear
from torch import Tensor, nn

from lightning_peft import WeightAdapter, hosts


class Diagonal(LoRAConv):
    """``W + scale * B diag(d) A``: A (r, in), d (r,), B (out, r); ``scale`` stays when the rank changes.

    On Linear, transformers' Conv1D and convolutions of one group.
    """

    axes = {"A": ("rank", "in"), "d": ("rank",), "B": ("out", "rank")}

    def __init__(self, host: Any, r: int, scale: float, dropout: float) -> None:
        WeightAdapter.__init__(self)  # not LoRA's, which draws before d is there
        out, fan_in = hosts.shape(host)
        self.A = nn.Parameter(torch.empty(r, fan_in))
        self.d = nn.Parameter(torch.empty(r))
        self.B = nn.Parameter(torch.empty(out, r))
        self.start, self.scale, self.dropout = r, scale, dropout
        self.reset_parameters()

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A * self.d[:, None], self.B

    def weight(self, W: Tensor) -> Tensor:
        A, B = self.factors()
        return W + self.scale * B @ A

    def update(self, host: Any, x: Tensor) -> Tensor:
        return super().update(host, x) if hosts.kind(host) == "conv" else LoRALinear.update(self, host, x)
