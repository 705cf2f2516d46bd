"""SSF: scales and shifts every channel of a frozen layer's output. Lian et al. 2022, arXiv:2210.08823."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import Adapter, Base, Method, Traits, attach, find, hosts


class ScaleShift(Adapter):
    """``y = gamma * base(x) + beta``, one gamma and one beta an output channel."""

    axes = {"gamma": ("out",), "beta": ("out",)}

    def __init__(self, host: nn.Module, std: float) -> None:
        super().__init__()
        out, _ = hosts.shape(host)
        self.gamma, self.beta = nn.Parameter(torch.empty(out)), nn.Parameter(torch.empty(out))
        self.std = std
        self.after = len(host.kernel_size) if isinstance(host, hosts.Conv) else 0  # dimensions behind the channels
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gamma, mean=1.0, std=self.std)
        nn.init.normal_(self.beta, std=self.std)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        y = base(*args, **kwargs)  # (..., out) of a linear layer, (batch, out, *space) of a convolution
        gamma, beta = (t.to(y.dtype).view(-1, *[1] * self.after) for t in (self.gamma, self.beta))
        return y * gamma + beta


@dataclass(frozen=True, kw_only=True)
class SSF(Method):
    """gamma * base(x) + beta on every target, with gamma and beta (out,).

    Args:
        targets: names, patterns or roles of the linear layers and convolutions to adapt.
        std: standard deviation of gamma around 1 and of beta around 0 at the start; the paper's is 0.02.
    """

    # The paper folds gamma into the weight and beta into the bias. Merging here changes weights only, so: merge=False.
    traits = Traits(
        family="additive",
        paper="Lian et al. 2022, arXiv:2210.08823",
        parameters="2 * out a layer",
        hosts=("linear", "conv1d", "conv"),
        merge=False,
        identity_start=False,
    )
    name: str = "ssf"
    targets: tuple[str, ...] = ("all-linear",)
    std: float = 0.02

    def __post_init__(self) -> None:
        if self.std < 0:
            raise ValueError(f"SSF's std must not be negative, got {self.std}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        for _, host in find(model, self.targets, self.traits.hosts):
            attach(host, self.name, ScaleShift(host, self.std))
