"""VeRA: random matrices that all layers share, two trained vectors a layer. Kopiczko et al. 2023, arXiv:2310.11454."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning_peft_plugins.reparameterized import ranks
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, Method, Traits, WeightAdapter, attach, find, hf, hosts

HF_FIELDS = {"r": "r", "d_init": "d_initial", "seed": "projection_prng_key", "dropout": "vera_dropout"}


class Projections:
    """A (r, widest in) and B (tallest out, r) of all layers of one method, in float32.

    Drawn on the CPU, so that every machine draws the same. No parameters, and no buffers either: ``module.to`` would
    give each layer a copy of its own.
    """

    def __init__(self, r: int, fan_in: int, out: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.A, self.B = (
            torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-k, k, generator=generator)
            for shape, k in (((r, fan_in), math.sqrt(6 / fan_in)), ((out, r), math.sqrt(6 / r)))
        )
        bits = torch.cat([self.A.flatten(), self.B.flatten()]).view(torch.int32).long()
        self.checksum = int((bits * torch.arange(1, len(bits) + 1, device="cpu")).sum())  # of values and their places
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {self.A.device: (self.A, self.B)}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The two on this device: one copy for each that an adapted layer lies on."""
        if device not in self._copies:
            self._copies[device] = self.A.to(device), self.B.to(device)
        return self._copies[device]

    def to_hf(self) -> dict[str, Tensor]:
        return {"base_model.vera_A": self.A, "base_model.vera_B": self.B}


class VeRALinear(WeightAdapter):
    """``y = base(x) + b * (B (d * (A x)))`` with trained d (r,), b (out,) and the leading parts of the shared A, B.

    No ``axes``: what lies in A and B follows positions, so channels cannot be cut out of the layer.
    """

    checksum: Tensor

    def __init__(self, host: Any, shared: Projections, d_init: float, dropout: float) -> None:
        super().__init__()
        out, self.fan_in = hosts.shape(host)
        self.d = nn.Parameter(torch.empty(len(shared.A)))
        self.b = nn.Parameter(torch.empty(out))
        self.register_buffer("checksum", torch.empty((), dtype=torch.long))
        self.shared, self.d_init, self.dropout = shared, d_init, dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.d, self.d_init)
        nn.init.zeros_(self.b)  # so training starts from the base model
        self.checksum.fill_(self.shared.checksum)

    def projections(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of this layer, as views."""
        A, B = self.shared.on(self.d.device)
        return A[:, : self.fan_in], B[: len(self.b)]

    def weight(self, W: Tensor) -> Tensor:
        A, B = self.projections()
        return W + (self.b[:, None] * B) @ (self.d[:, None] * A)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y = base(x)
        A, B, d, b = (t.to(x.dtype) for t in (*self.projections(), self.d, self.b))
        h = F.linear(F.dropout(x, self.dropout, self.training), A) * d  # (..., r)
        return y + (F.linear(h, B) * b).to(y.dtype)

    def check_state(self, state: dict[str, Tensor]) -> None:
        if int(state.get("checksum", self.shared.checksum)) != self.shared.checksum:
            raise ValueError(
                "these vectors of VeRA were trained beside other random matrices than are drawn here, with another "
                "seed, rank or set of target layers, or a torch that draws other numbers from a seed"
            )


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
        shared = self._draw([host for _, host in targets])
        for _, host in targets:
            attach(host, self.name, VeRALinear(host, shared, self.d_init, self.dropout))

    def _draw(self, targets: list[Any]) -> Projections:
        out, fan_in = map(max, zip(*map(hosts.shape, targets), strict=True))
        return Projections(self.r, fan_in, out, self.seed)

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        held: dict[str, tuple[Any, Any]] = {name: (host, a) for name, host, a in self.adapters(model)}
        fields = {theirs: getattr(self, ours) for ours, theirs in HF_FIELDS.items()} | {
            "save_projection": True,
            "target_modules": hf.target_modules(model, held),
            "fan_in_fan_out": any(hosts.is_conv1d(host) for host, _ in held.values()),
            "bias": "none",
        }
        vectors = {f"{hf.PREFIX}{n}.vera_lambda_{v}": getattr(a, v) for n, (_, a) in held.items() for v in "db"}
        return fields, vectors | next(a.shared.to_hf() for _, a in held.values())

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "VeRA":
        hf.check_fields(config, (*HF_FIELDS.values(), "save_projection", "fan_in_fan_out", "init_weights"), "vera")
        names = [name for name, t in tensors.items() if "vera_lambda_d" in t]
        if not names:
            raise ValueError(f"no vector of the file belongs to a module of this {type(model).__name__}: another base?")
        known = {ours: config[theirs] for ours, theirs in HF_FIELDS.items() if theirs in config}
        method = cls(targets=hf.targets(model, names), **known)
        for key, mine in method._draw([model.get_submodule(n) for n in names]).to_hf().items():
            saved = tensors.get("", {}).get(key)
            if saved is None or not torch.equal(saved.to(mine), mine):
                found = "missing (save_projection=False)" if saved is None else "another"
                raise ValueError(
                    f"the file's {key} is {found}; it must be {tuple(mine.shape)} as drawn from seed {method.seed}: "
                    "VeRA here draws its matrices again and keeps no others"
                )
        return method
