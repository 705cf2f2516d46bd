"""HUT: every weight times two trained factors, the output scaled and shifted. Zhang et al. 2024, arXiv:2409.13501.

The paper's text was not to be had: W_new and the output's scale and shift are from summaries of it; how (M x 1)^r grows
to the weight's size, the start at ones, and what trains without decay are inferred.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_peft_plugins.reparameterized import dense, ranks
from torch import Tensor, nn

from lightning_peft import Base, Method, Traits, WeightAdapter, attach, hosts

EXPANSIONS = ("block", "tile", "literal", "power")


class HUTLinear(WeightAdapter):
    """``y = gamma * (x (S_A * W * S_B)^T + bias) + beta``.

    ``S_A[o, i] = A[i, group of o]`` and ``S_B[o, i] = B[group of i, o]`` with A (in, r), B (r, out).
    No ``axes``: groups follow positions, so channels cannot be cut out of the layer.
    """

    def __init__(self, host: Any, r: int, expansion: str, scale: bool, shift: bool) -> None:
        super().__init__()
        out, fan_in = hosts.shape(host)
        columns = 1 if expansion == "power" else r
        self.A, self.B = nn.Parameter(torch.empty(fan_in, columns)), nn.Parameter(torch.empty(columns, out))
        self.gamma = nn.Parameter(torch.empty(out)) if scale else None
        self.beta = nn.Parameter(torch.empty(out)) if shift else None
        self.r, self.expansion, self.adds_bias = r, expansion, shift
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for factor in (self.A, self.B):
            nn.init.constant_(factor, 1 / self.r if self.expansion == "literal" else 1.0)  # the base itself
        if self.gamma is not None:
            nn.init.ones_(self.gamma)
        if self.beta is not None:
            nn.init.zeros_(self.beta)

    def vectors(self) -> tuple[Tensor, Tensor] | None:
        """(in,) and (out,) where S_A and S_B repeat one vector each, else None."""
        if self.expansion == "literal":
            return self.A.sum(1), self.B.sum(0)
        if self.expansion == "power":
            return self.A[:, 0] ** self.r, self.B[0] ** self.r
        return (self.A[:, 0], self.B[0]) if self.r == 1 else None

    def factor(self) -> Tensor:
        """S_A * S_B (out, in)."""
        if (vectors := self.vectors()) is not None:
            return vectors[1][:, None] * vectors[0]
        r, A, B = self.r, self.A.T.contiguous(), self.B.T.contiguous()  # (r, in), (out, r)
        out, fan_in = len(B), A.shape[1]
        if out % r or fan_in % r:
            return A.index_select(0, self._groups(out)) * B.index_select(1, self._groups(fan_in))
        if self.expansion == "tile":  # the same by views, which is faster
            return (A.view(r, -1, r) * B.view(-1, r, 1, r)).view(out, fan_in)
        return (A.view(r, 1, r, -1) * B.view(r, -1, r, 1)).view(out, fan_in)

    def _groups(self, n: int) -> Tensor:
        """(n,) the group of each position: r neighbourhoods, or every r-th."""
        places = torch.arange(n, device=self.A.device)
        return places % self.r if self.expansion == "tile" else places * self.r // n

    def weight(self, W: Tensor) -> Tensor:
        W = self.factor() * W
        return W if self.gamma is None else self.gamma[:, None] * W

    def bias(self, b: Tensor) -> Tensor:
        b = b if self.gamma is None else self.gamma * b
        return b if self.beta is None else b + self.beta

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if not base.maps_weight:  # scale and shift are of the weight's output, not of what else lies below
            return super().forward(base, x)
        if (vectors := self.vectors()) is None:
            y = dense.forward(base, lambda: (self.factor() - 1) * base.weight, x)
            return self._scaled(y, y)
        a, b = vectors  # on the activations: W is not touched, nor dequantised
        y = base((x * a).to(x.dtype))
        bias = base.bias
        return self._scaled(b * y if bias is None else b * y + (1 - b) * bias, y)

    def _scaled(self, y: Tensor, like: Tensor) -> Tensor:
        """In float32, for in less the factors near 1 would round to it."""
        y = y if self.gamma is None else self.gamma * y
        return (y if self.beta is None else y + self.beta).to(like.dtype)


@dataclass(frozen=True, kw_only=True)
class HUT(Method):
    """gamma * (W * S_A * S_B) x + gamma * bias + beta, S_A and S_B grown from A (in, r) and B (r, out).

    Entries of W that are 0 stay 0. For r above 1 the weight is built in every forward.

    Args:
        r: groups of outputs that have multipliers of their own for every input, and of inputs for every output.
        expansion: "block", groups of neighbours; "tile", every r-th; for comparison the printed formula at its word,
            "literal", sums over r, and "power", r-th powers of one column: both can do no more than r = 1.
        scale: train gamma.
        shift: train beta. Merging folds it into the layer's bias, and gives a bias to a layer that has none.
        targets: names, patterns or roles of the layers to adapt.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
        rank_pattern: pattern -> r for the layers it names, taken as it is; elsewhere r is clamped to the smaller side.
    """

    traits = Traits(
        family="reparameterized",
        paper="Zhang, Zhou, Chen 2024, arXiv:2409.13501",
        parameters="r * (in + out) + 2 * out a layer; in + 3 * out for power",
        hosts=("linear", "conv1d"),
        merge=True,
        quantized=True,
    )
    alpha, alpha_pattern = None, {}  # no annotation, so no options: what ranks.py asks of a method without a scale
    name: str = "hut"
    r: int = 8
    expansion: str = "block"
    scale: bool = True
    shift: bool = True
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""
    rank_pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks.check(self)
        if self.expansion not in EXPANSIONS:
            raise ValueError(f"HUT's expansion must be one of {', '.join(EXPANSIONS)}, got {self.expansion!r}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        for name, host, r, _ in ranks.places(self, model):
            if r > min(hosts.shape(host)) and self.expansion in ("block", "tile"):
                raise ValueError(f"{name}: r={r} groups, but its weight is {hosts.shape(host)}")
            attach(host, self.name, HUTLinear(host, r, self.expansion, self.scale, self.shift))

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        return [{"params": [p for _, _, a in self.adapters(model) for p in a.parameters()], "weight_decay": 0.0}]
