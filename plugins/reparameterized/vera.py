"""VeRA: random matrices that all layers share, two trained vectors a layer. Kopiczko et al. 2023, arXiv:2310.11454."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning_peft_plugins.reparameterized import projections, ranks
from lightning_peft_plugins.reparameterized.projections import Projections
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, Method, Traits, WeightAdapter, attach, find, hf, hosts

HF_FIELDS = {"r": "r", "d_init": "d_initial", "seed": "projection_prng_key", "dropout": "vera_dropout"}
HF_TENSORS = {"d": "vera_lambda_d", "b": "vera_lambda_b"}


class VeRALinear(WeightAdapter):
    """``y = base(x) + b * (B (d * (A x)))`` with trained d (r,), b (out,) and the leading parts of the shared A, B.

    No ``axes``: what lies in A and B follows positions, so channels cannot be cut out of the layer.
    """

    checksum: Tensor

    def __init__(self, host: Any, shared: Projections, d_init: float, dropout: float) -> None:
        super().__init__()
        out, self.fan_in = hosts.shape(host)
        self.d = nn.Parameter(torch.empty(len(shared.drawn["A"])))
        self.b = nn.Parameter(torch.empty(out))
        self.register_buffer("checksum", torch.empty((), dtype=torch.long))
        self.shared, self.d_init, self.dropout = shared, d_init, dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.d, self.d_init)
        nn.init.zeros_(self.b)  # so training starts from the base model
        self.checksum.fill_(self.shared.checksum)

    def projections(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of this layer, as views, on the device and in the precision of ``like``."""
        return self.shared.on("A", like)[:, : self.fan_in], self.shared.on("B", like)[: len(self.b)]

    def weight(self, W: Tensor) -> Tensor:
        A, B = self.projections(self.d)
        return W + (self.b[:, None] * B) @ (self.d[:, None] * A)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y = base(x)
        A, B = self.projections(x)
        h = F.linear(F.dropout(x, self.dropout, self.training), A) * self.d.to(x.dtype)  # (..., r)
        return y + (F.linear(h, B) * self.b.to(x.dtype)).to(y.dtype)

    def check_state(self, state: dict[str, Tensor]) -> None:
        self.shared.check_state(state, "VeRA")


@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """W + diag(b) B diag(d) A on every target; A and B are random, frozen, and the same for all layers.

    They are drawn from the seed again when a file is loaded, and a checksum in it says whether they are the same. The
    paper's learning rates are about ten times LoRA's.

    Args:
        r: rank; a large one costs time, but few parameters.
        d_init: start of d. b starts at zero.
        seed: of A and B, which also depend on the largest sizes among the targets.
        dropout: probability on the adapter's input; the base path never sees it.
        targets: names, patterns or roles of the layers to adapt.
        save_projection: write A and B into a huggingface/peft folder; those of lightning-peft never hold them.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="reparameterized",
        paper="Kopiczko, Blankevoort, Asano 2023, arXiv:2310.11454",
        parameters="r + out a layer",
        hosts=("linear", "conv1d"),
        merge=True,
        quantized=True,
        hf="VERA",
    )
    name: str = "vera"
    r: int = 256
    d_init: float = 0.1
    seed: int = 0
    dropout: float = 0.0
    save_projection: bool = True
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"VeRA needs a rank of at least 1, got r={self.r}")
        if self.d_init <= 0:
            raise ValueError(f"VeRA's d_init must be positive, got {self.d_init}: from d = b = 0 nothing would train")
        ranks.check_dropout(self)

    def inject(self, model: nn.Module, stats: None = None) -> None:
        targets = find(model, self.targets, self.traits.hosts, exclude=self.exclude, layers=self.layers)
        shared = self.draw([host for _, host in targets])
        for _, host in targets:
            attach(host, self.name, VeRALinear(host, shared, self.d_init, self.dropout))

    def draw(self, targets: Iterable[Any]) -> Projections:
        """A and B for these layers."""
        out, fan_in = map(max, zip(*map(hosts.shape, targets), strict=True))
        source = projections.generator(self.seed)
        A = projections.uniform((self.r, fan_in), math.sqrt(6 / fan_in), source)
        return Projections(A=A, B=projections.uniform((out, self.r), math.sqrt(6 / self.r), source))

    @staticmethod
    def in_hf(shared: Projections) -> dict[str, Tensor]:
        """Copies, for what is loaded must be what a seed gives again."""
        return {f"base_model.vera_{name}": t.clone() for name, t in shared.drawn.items()}

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return projections.to_hf(self, model, HF_FIELDS, HF_TENSORS)

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "VeRA":
        hf.check_fields(config, (*HF_FIELDS.values(), "save_projection", "fan_in_fan_out", "init_weights"), "vera")
        method = cls(**{ours: config[theirs] for ours, theirs in HF_FIELDS.items() if theirs in config})
        return dataclasses.replace(method, **projections.from_hf(method, tensors, model, HF_TENSORS))
