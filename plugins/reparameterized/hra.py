"""HRA: a chain of Householder reflections on each layer's input. Yuan, Liu, Xu 2024, arXiv:2405.17484."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning_peft_plugins.reparameterized import orthogonal
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, Method, Traits, WeightAdapter, attach, find, hf, hosts


class HRALinear(WeightAdapter):
    """``y = base(H x)``, H = H_1 ... H_r and H_i = I - 2 u_i u_i^T / |u_i|^2 for the columns u_i of U (in, r).

    No ``axes``: H mixes all inputs, so channels cannot be cut out of the layer.
    """

    def __init__(self, fan_in: int, r: int) -> None:
        super().__init__()
        self.U = nn.Parameter(torch.empty(fan_in, r))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.U[:, ::2], a=math.sqrt(5))
        self.U[:, 1::2] = self.U[:, ::2]  # each reflection twice is none, so training starts from the base model

    def factor(self) -> Tensor:
        """M (in, r) with H = I - M U^T: the whole chain by one triangular solve (compact WY form)."""
        with torch.autocast(self.U.device.type, enabled=False):  # a rounded U^T U would make H no longer orthogonal
            U = orthogonal.widen(self.U, self.U)
            S = U.T @ U
            return torch.linalg.solve_triangular(S.triu(1) + S.diagonal().diag() / 2, U, upper=True, left=False)

    def overlap(self) -> Tensor:
        """|U^T U - I|^2 for unit columns: 0 where the reflections are orthogonal to one another."""
        U = F.normalize(self.U, dim=0)
        return (U.T @ U - torch.eye(U.shape[1], device=U.device)).square().sum()

    def weight(self, W: Tensor) -> Tensor:
        W = orthogonal.widen(W, self.U)
        return W - (W @ self.factor().to(W.dtype)) @ self.U.T.to(W.dtype)

    def forward(self, base: Base, x: Tensor) -> Tensor:  # the same map, reflecting the input instead of the weight
        h = F.linear(x, self.U.T.to(x.dtype))  # (..., r)
        return base(x - F.linear(h, self.factor().to(x.dtype)).to(x.dtype))


class HRAConv(HRALinear):
    """H acts on patches (in / groups * kernel), so the change is a convolution into r channels and a 1x1 one after."""

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y, host, sides = base(x), base.host, [1] * len(base.host.kernel_size)
        W = orthogonal.widen(base.weight, self.U)
        point = (W @ self.factor().to(W.dtype)).to(x.dtype)  # (out, r)
        kernel = self.U.T.to(x.dtype).view(-1, *host.weight.shape[1:]).repeat(host.groups, 1, *sides)
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(sides) - 1]
        h = host._conv_forward(x, kernel, None)  # private, but it honours padding_mode; (batch, groups * r, *space)
        return y - conv(h, point.view(*point.shape, *sides), groups=host.groups).to(y.dtype)


@dataclass(frozen=True, kw_only=True)
class HRA(Method):
    """W H on every target, H an orthogonal matrix that is the product of r reflections.

    The variant with orthonormal columns (peft's apply_GS) is left out: its H is never the identity, so it cannot start
    from the base model. A high ``orthogonality`` comes near it.

    Args:
        r: number of reflections, even, for they start in pairs that cancel.
        orthogonality: weight of the penalty |U^T U - I|^2 on unit columns, summed over the layers (paper's lambda).
        targets: names, patterns or roles of the layers to adapt; convolutions by name.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="reparameterized",
        paper="Yuan, Liu, Xu 2024, arXiv:2405.17484",
        parameters="r * in a layer, in = channels / groups * kernel for a conv",
        hosts=("linear", "conv1d", "conv"),
        merge=True,
        quantized=True,
        hf="HRA",
    )
    name: str = "hra"
    r: int = 8
    orthogonality: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""

    def __post_init__(self) -> None:
        if self.r < 2 or self.r % 2:
            raise ValueError(f"HRA needs an even number of reflections, for they start in pairs; got r={self.r}")
        if self.orthogonality < 0:
            raise ValueError(f"HRA's orthogonality must not be negative, got {self.orthogonality}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        for _, host in find(model, self.targets, self.traits.hosts, exclude=self.exclude, layers=self.layers):
            cls = HRAConv if hosts.kind(host) == "conv" else HRALinear
            attach(host, self.name, cls(hosts.shape(host)[1], self.r))

    def penalty(self, model: nn.Module) -> Tensor | None:
        if not self.orthogonality:
            return None
        held: list[Any] = [a for _, _, a in self.adapters(model)]
        return self.orthogonality * torch.stack([a.overlap() for a in held]).sum()

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        held = orthogonal.in_peft(self, model)
        for name, (host, _) in held.items():
            orthogonal.check_conv_in_peft(name, host)
        fields = {"r": self.r, "apply_GS": False, "init_weights": True, "bias": "none"}
        fields |= {"target_modules": hf.target_modules(model, held)}
        return fields, {f"{hf.PREFIX}{name}.hra_u": a.U for name, (_, a) in held.items()}

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "HRA":
        if config.get("apply_GS"):
            raise ValueError(
                "adapter_config.json sets apply_GS=True, another map of the same tensors: orthonormal columns, never "
                "the identity. 'hra' does not have it; merge such an adapter in peft"
            )
        hf.check_fields(config, ("r", "init_weights"), "hra")
        return cls(r=config.get("r", 8), targets=hf.targets(model, orthogonal.from_peft(tensors, model, "hra_u")))
