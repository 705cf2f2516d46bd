"""BOFT: rotations along the layers of a butterfly, and a scale for every output. Liu et al. 2023, arXiv:2311.06243."""

from dataclasses import dataclass
from typing import Any

import torch
from lightning_peft_plugins.reparameterized import dense, orthogonal
from torch import Tensor, nn

from lightning_peft import Base, Method, Traits, WeightAdapter, attach, find, hf, hosts

HF_FIELDS = ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "fan_in_fan_out",
             "init_weights")  # fmt: skip


class BOFTLinear(WeightAdapter):
    """``y = s * base(R^T x)``, the bias not scaled, with s (out,) and R = R_m ... R_1 a product of block rotations.

    R_1 has blocks of b neighbours; those of R_i join two stretches of b / 2 that lie 2^(i - 1) such stretches apart. A
    block is (I - Q)(I + Q)^-1 for the skew-symmetric part Q of its own part of X (m, blocks, b, b).

    No ``axes``: a block mixes its inputs, so channels cannot be cut out of the layer.
    """

    def __init__(self, host: Any, b: int, factors: int, dropout: float) -> None:
        super().__init__()
        out, fan_in = hosts.shape(host)
        self.X = nn.Parameter(torch.empty(factors, fan_in // b, b, b))
        self.s = nn.Parameter(torch.empty(out))
        self.dropout = dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.X)  # so training starts from the base model
        nn.init.ones_(self.s)

    def rotations(self) -> Tensor:
        """R_i - I of every factor, (m, blocks, b, b)."""
        return orthogonal.cayley((self.X - self.X.mT) / 2)

    def drawn(self) -> Tensor:
        """The same, but in training single blocks are the identity, by chance."""
        S = self.rotations()
        if self.training and self.dropout:
            S = S * (torch.rand(S.shape[:2], device=S.device) >= self.dropout)[..., None, None]
        return S

    def weight(self, W: Tensor) -> Tensor:
        return self.turned(W, self.rotations())

    def turned(self, W: Tensor, rotations: Tensor) -> Tensor:
        W = orthogonal.widen(W, self.X)
        for i, S in enumerate(rotations):  # W R^T = W R_1^T ... R_m^T
            W = W + butterfly(W, S.mT, i)
        return self.s[:, None] * W

    def forward(self, base: Base, x: Tensor) -> Tensor:  # the same map, rotating the input instead of the weight
        for i, R in reversed(list(enumerate(orthogonal.with_identity(self.drawn())))):
            x = butterfly(x, R, i).to(x.dtype)
        y, bias = base(x), base.bias
        plain = y if bias is None else y - bias.to(y.dtype)
        return y + ((self.s - 1) * plain).to(y.dtype)


def butterfly(x: Tensor, M: Tensor, i: int) -> Tensor:
    """x (..., in) times M (blocks, b, b), of which a block takes two stretches of b / 2, 2^i such stretches apart."""
    if i == 0:
        return orthogonal.blockwise(x, M)
    half, apart = M.shape[-1] // 2, 2**i
    h = x.unflatten(-1, (-1, 2, apart, half))
    M = M.to(x.dtype).reshape(-1, apart, 2, half, 2, half)
    return torch.einsum("...nipa,npiajb->...njpb", h, M).flatten(-4)


class BOFTConv(BOFTLinear):
    """Rotates patches (in / groups * kernel), which overlap, so the kernel is rotated in their place."""

    def forward(self, base: Base, x: Tensor) -> Tensor:
        rotations = self.drawn()  # once, whereas dense builds the product again for backward
        return dense.forward(base, lambda: self.turned(base.weight, rotations) - base.weight, x)


@dataclass(frozen=True, kw_only=True)
class BOFT(Method):
    """diag(s) W R^T on every target, R a product of rotations that together reach further than their blocks.

    Args:
        block_size: side of a block, which divides the layer's inputs.
        blocks: number of blocks in every layer in place of their size; the other of the two is 0.
        factors: number of rotations, peft's boft_n_butterfly_factor; the inputs must divide by block_size *
            2^(factors - 1). With 1 it is OFT with a scale.
        dropout: probability that a block is the identity in a training step (multiplicative dropout). peft draws one
            factor and in it a fixed number of blocks.
        targets: names, patterns or roles of the layers to adapt; convolutions by name.
        exclude: patterns of layers to leave out.
        layers: blocks of the model to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="reparameterized",
        paper="Liu et al. 2023, arXiv:2311.06243",
        parameters="factors * in * block_size + out a layer, in = channels / groups * kernel for a conv",
        hosts=("linear", "conv1d", "conv"),
        merge=True,
        quantized=True,
        hf="BOFT",
    )
    name: str = "boft"
    block_size: int = 4
    blocks: int = 0
    factors: int = 1
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""

    def __post_init__(self) -> None:
        orthogonal.check_blocks(self)
        if self.factors < 1:
            raise ValueError(f"BOFT needs at least one factor, got factors={self.factors}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"BOFT's dropout must lie in [0, 1), got {self.dropout}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        for name, host in find(model, self.targets, self.traits.hosts, exclude=self.exclude, layers=self.layers):
            cls = BOFTConv if hosts.kind(host) == "conv" else BOFTLinear
            attach(host, self.name, cls(host, self._side(name, hosts.shape(host)[1]), self.factors, self.dropout))

    def _side(self, name: str, fan_in: int) -> int:
        b, left = (self.block_size, fan_in % self.block_size) if self.block_size else divmod(fan_in, self.blocks)
        fits = (
            not left and b > 1 and (self.factors == 1 or (b % 2 == 0 and fan_in % (b * 2 ** (self.factors - 1)) == 0))
        )
        if not fits:
            raise ValueError(
                f"{name}: its {fan_in} inputs do not divide into blocks for block_size={self.block_size}, "
                f"blocks={self.blocks}, factors={self.factors}: blocks of 2 or more, with several factors of an even "
                "side, and their number divisible by 2^(factors - 1); choose others, or exclude it"
            )
        return b

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        held: list[Any] = [a for _, _, a in self.adapters(model)]
        return [{"params": [a.s for a in held], "weight_decay": 0.0}]  # it would silence the layers

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        held = orthogonal.in_peft(self, model)
        tensors = {}
        for name, (host, a) in held.items():
            orthogonal.check_conv_in_peft(name, host)
            s = a.s[None] if hosts.kind(host) == "conv" else a.s[:, None]
            tensors |= {f"{hf.PREFIX}{name}.boft_R": a.X, f"{hf.PREFIX}{name}.boft_s": s}
        fields = {"boft_block_size": self.block_size, "boft_block_num": self.blocks, "boft_dropout": self.dropout,
                  "boft_n_butterfly_factor": self.factors, "target_modules": hf.target_modules(model, held),
                  "init_weights": True, "bias": "none"}  # fmt: skip
        return fields, tensors

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "BOFT":
        hf.check_fields(config, HF_FIELDS, "boft")
        return cls(
            block_size=config.get("boft_block_size", 4),
            blocks=config.get("boft_block_num", 0),
            factors=config.get("boft_n_butterfly_factor", 1),
            dropout=config.get("boft_dropout", 0.0),
            targets=hf.targets(model, orthogonal.from_peft(tensors, model, "boft_R")),
        )
