"""Bone (now MiSS): one matrix, started at zero, shared by all shards of a weight. Kang, Yin 2024, arXiv:2409.15371.

The paper's first version called "Bone" what is ``bat`` here, its later ones ``shard``; results differ by that name.
Refusals of sizes that do not divide are our choice.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_peft_plugins.reparameterized import dense, plain_lora, ranks
from lightning_peft_plugins.reparameterized.lora import LoRA
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, Method, Traits, WeightAdapter, attach, hf, hosts

VARIANTS = ("shard", "mini", "bat", "bat_row")
MINI_R = 64  # the authors' scripts; peft's default is 1
HF_FIELDS = ("r", "mini_r", "miss_dropout", "init_weights")
_STARTS = {"shard": True, "mini": "mini", "bat": "bat"}  # peft's init_weights


class BoneShard(WeightAdapter):
    """``dW[o, i] = D[i mod r, o mod columns]`` with D (r, columns): all ``out`` columns, or fewer (mini).

    No ``axes`` for the channels: what a shard is follows positions, so none can be cut out of the layer.
    """

    def __init__(self, host: Any, r: int, columns: int, dropout: float) -> None:
        super().__init__()
        self.size, self.dropout = hosts.shape(host), dropout
        self.D = nn.Parameter(torch.empty(r, columns))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.D)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The same change as plain LoRA of scale 1: A (r, in), identities side by side, and B (out, r)."""
        r, columns = self.D.shape
        out, fan_in = self.size
        eye = torch.eye(r, dtype=self.D.dtype, device=self.D.device)
        return eye.repeat(1, -(-fan_in // r))[:, :fan_in], self.D.T.repeat(out // columns, 1)

    def weight(self, W: Tensor) -> Tensor:
        r, columns = self.D.shape
        out, fan_in = self.size
        return W + self.D.T.repeat(out // columns, -(-fan_in // r))[:, :fan_in]  # the last shard may be narrow

    def forward(self, base: Base, x: Tensor) -> Tensor:  # sums of the input by shards, which are all D has to see
        y = base(x)
        r, columns = self.D.shape
        h = F.dropout(x, self.dropout, self.training)
        h = F.pad(h, (0, -x.shape[-1] % r)).unflatten(-1, (-1, r)).sum(-2)  # (..., r)
        change = F.linear(h, self.D.T.to(h.dtype))  # (..., columns)
        if columns < self.size[0]:
            change = change.repeat(*[1] * (change.dim() - 1), self.size[0] // columns)
        return y + change.to(y.dtype)


class BoneBat(WeightAdapter):
    """``dW[p, q] = (W[p, q] + 1) D[p]`` on r x r blocks of W, p over outputs and q over inputs, D (out / r, r, r)."""

    def __init__(self, host: Any, r: int) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.empty(self.blocks(*hosts.shape(host), r), r, r))
        self.reset_parameters()

    @staticmethod
    def blocks(out: int, fan_in: int, r: int) -> int:
        return out // r

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.D)

    def change(self, W: Tensor) -> Tensor:
        """(out, in), differentiable in W too, for below may lie another adapter that trains."""
        D = self.D  # (p, r, r)
        rows = W.to(torch.promote_types(W.dtype, D.dtype)).reshape(len(D), -1, D.shape[-1])  # (p, r * q, r)
        product = (rows @ D).unflatten(1, (D.shape[-1], -1))  # (p, r, q, r)
        return (product + D[:, :, None]).view(W.shape)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.change(W)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return dense.forward(base, lambda: self.change(base.weight), x)


class BoneBatRow(BoneBat):
    """``dW[p, q] = (W[p, q] + 1) D[q]``, D (in / r, r, r), as in RWKV-PEFT."""

    @staticmethod
    def blocks(out: int, fan_in: int, r: int) -> int:
        return fan_in // r

    def change(self, W: Tensor) -> Tensor:
        r = self.D.shape[-1]
        columns = W.to(torch.promote_types(W.dtype, self.D.dtype)).unflatten(1, (-1, r)).transpose(0, 1)  # (q, out, r)
        product = columns @ self.D + self.D.repeat(1, len(W) // r, 1)
        return product.transpose(0, 1).reshape(W.shape)


@dataclass(frozen=True, kw_only=True)
class Bone(Method):
    """W + [D^T, D^T, ...]: the same trained block on every r inputs; or a block that W itself multiplies (bat).

    There is no scale. The authors train with learning rates of 2e-5 to 2e-4.

    Args:
        r: inputs of a shard; side of the blocks for bat, where it divides both sides of the weight.
        variant: "shard" (also named MiSS), exactly a LoRA with a fixed A; "mini", whose D repeats along the outputs;
            "bat", where each block of W is multiplied by the D of its outputs, at the price of building the weight in
            every forward; "bat_row", by the D of its inputs.
        mini_r: outputs after which D repeats, for mini alone; divides them. None is 64.
        dropout: probability on the adapter's input; not for bat, which has none.
        targets: names, patterns or roles of the layers to adapt.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
        rank_pattern: pattern -> r for the layers it names.
    """

    traits = Traits(
        family="reparameterized",
        paper="Kang, Yin 2024, arXiv:2409.15371",
        parameters="r * out a layer (shard, bat), r * in (bat_row), r * mini_r (mini)",
        hosts=("linear", "conv1d"),
        merge=True,
        quantized=True,
        hf="MISS",
    )
    alpha, alpha_pattern = None, {}  # no annotation, so no options: what ranks.py asks of a method without a scale
    name: str = "bone"
    r: int = 64
    variant: str = "shard"
    mini_r: int | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""
    rank_pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks.check(self)
        ranks.check_dropout(self)
        if self.variant not in VARIANTS:
            raise ValueError(f"Bone's variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        if self.dropout and self.variant.startswith("bat"):
            raise ValueError(f"Bone's {self.variant} multiplies the weight, not the input: dropout has no place in it")
        if self.mini_r is not None and (self.variant != "mini" or self.mini_r < 1):
            raise ValueError(
                f"Bone's mini_r is a positive number for variant='mini', got {self.mini_r} for {self.variant!r}"
            )

    def inject(self, model: nn.Module, stats: None = None) -> None:
        for name, host, r, _ in ranks.places(self, model, clamp=False):
            attach(host, self.name, self._adapter(name, host, r))

    def _adapter(self, name: str, host: Any, r: int) -> WeightAdapter:
        out, fan_in = hosts.shape(host)
        if self.variant.startswith("bat"):
            if out % r or fan_in % r:
                raise ValueError(f"{name}: {self.variant}'s r={r} must divide both sides of its {out} x {fan_in} "
                                 "weight; set rank_pattern or exclude it")  # fmt: skip
            return BoneBat(host, r) if self.variant == "bat" else BoneBatRow(host, r)
        if r > fan_in:
            raise ValueError(f"{name}: r={r}, but it has {fan_in} inputs; set rank_pattern or exclude it")
        columns = out if self.variant == "shard" else self.mini_r or MINI_R
        if out % columns:
            raise ValueError(f"{name}: mini_r={columns} must divide its {out} outputs; exclude it")
        return BoneShard(host, r, columns, self.dropout)

    def to_lora(self, model: nn.Module) -> LoRA:
        """Put a plain LoRA of the same weight in the place of shard or mini; see ``plain_lora.convert``."""
        if self.variant.startswith("bat"):
            raise ValueError(f"Bone's {self.variant} changes the weight in full rank, which no LoRA can")
        return plain_lora.convert(self, model)

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        held: dict[str, tuple[Any, Any]] = {name: (host, a) for name, host, a in self.adapters(model)}
        if self.variant not in _STARTS:
            raise ValueError(f"huggingface/peft has no {self.variant}; its bat multiplies by the D of the outputs")
        for name, (host, a) in held.items():
            if hosts.is_conv1d(host):
                raise ValueError(f"{name}: huggingface/peft's MiSS has no transformers' Conv1D")
            if (r := a.D.shape[-1 if self.variant == "bat" else 0]) != self.r:
                raise ValueError(f"{name}: huggingface/peft's MiSS has one r, here {self.r} and {r}")
        fields = {
            "r": self.r,
            "mini_r": self.mini_r or (MINI_R if self.variant == "mini" else 1),
            "miss_dropout": self.dropout,
            "init_weights": _STARTS[self.variant],
            "target_modules": hf.target_modules(model, held),
            "bias": "none",
        }
        return fields, {f"{hf.PREFIX}{name}.miss_block": a.D for name, (_, a) in held.items()}

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "Bone":
        hf.check_fields(config, HF_FIELDS, "bone")
        names = [name for name, t in tensors.items() if "miss_block" in t]
        if not names:
            raise ValueError(f"no tensor of the file belongs to a module of this {type(model).__name__}: another base?")
        start = config.get("init_weights", True)
        variant = start if start in ("bat", "mini") else "shard"  # False is a random start of the same
        return cls(
            r=config.get("r", 64),
            variant=variant,
            mini_r=config.get("mini_r", 1) if variant == "mini" else None,
            dropout=config.get("miss_dropout", 0.0) if variant != "bat" else 0.0,
            targets=hf.targets(model, names),
        )
