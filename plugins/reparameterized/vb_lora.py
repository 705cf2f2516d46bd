"""VB-LoRA: factors pieced together from a bank of vectors that all layers share. Li et al. 2024, arXiv:2405.15179."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning_peft_plugins.reparameterized import ranks
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, Method, Traits, WeightAdapter, attach, find, hf, hosts
from lightning_peft.find import exact

HF_FIELDS = {"r": "r", "vectors": "num_vectors", "length": "vector_length", "topk": "topk", "dropout": "vblora_dropout",
             "bank_bound": "init_vector_bank_bound", "logits_std": "init_logits_std"}  # fmt: skip
HF_BANK = "base_model.vblora_vector_bank"


class VBLoRALinear(WeightAdapter):
    """``y = base(x) + B A x``; each piece of A's rows and of B's columns is a mix of the topk vectors with most weight.

    Logits A (r, in / length, vectors) and B (out / length, r, vectors). The first adapter of a model owns the bank
    (vectors, length); the others ask it for the bank, so that there is one wherever the model is moved or copied. No
    ``axes``: vectors span channels, so these cannot be cut out of the layer.
    """

    def __init__(self, host: Any, method: "VBLoRA", owner: "VBLoRALinear | None") -> None:
        super().__init__()
        out, fan_in = hosts.shape(host)
        self.A = nn.Parameter(torch.empty(method.r, fan_in // method.length, method.vectors))
        self.B = nn.Parameter(torch.empty(out // method.length, method.r, method.vectors))
        if owner is None:
            self.bank = nn.Parameter(torch.empty(method.vectors, method.length))
        self.method = method
        self.owner: tuple[Any] = (owner or self,)  # in a tuple, for a module would become a child
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, p in self.named_parameters():  # B A is small at the start, not zero: at zero nothing would train
            if name == "bank":
                nn.init.uniform_(p, -self.method.bank_bound, self.method.bank_bound)
            else:
                nn.init.normal_(p, std=self.method.logits_std)

    def mixed(self, logits: Tensor) -> Tensor:
        """(..., vectors) -> (..., length). By a product with the bank, whose gradient adds up in one order always."""
        top, places = logits.topk(self.method.topk)
        weights = torch.zeros_like(logits).scatter(-1, places, top.softmax(-1))
        return weights @ self.owner[0].bank.to(logits.device)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of the update."""
        return self.mixed(self.A).flatten(1), self.mixed(self.B).transpose(1, 2).flatten(0, 1)

    def weight(self, W: Tensor) -> Tensor:
        A, B = self.factors()
        return W + B @ A

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y = base(x)
        A, B = self.factors()
        h = F.linear(F.dropout(x, self.method.dropout, self.training), A.to(x.dtype))  # (..., r)
        return y + F.linear(h, B.to(x.dtype)).to(y.dtype)


@dataclass(frozen=True, kw_only=True)
class VBLoRA(Method):
    """W + B A on every target, A and B made of vectors from one trained bank, chosen and weighted by trained logits.

    The logits are many while training, but only the topk of each piece matter afterwards. The start differs from the
    base a little.

    Args:
        r: rank of the update.
        vectors: in the bank.
        length: of a vector; it divides both sides of every target.
        topk: vectors that make a piece, weighted by the softmax of their logits.
        logits_lr_ratio: learning rate of the logits over that of the bank, which has the optimizer's; the authors
            advise 0.01 and 0.001 with AdamW.
        bank_bound: the bank starts uniform between minus this and this.
        logits_std: of the logits at the start, around zero.
        dropout: probability on the adapter's input; the base path never sees it.
        targets: names, patterns or roles of the layers to adapt.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="reparameterized",
        paper="Li, Han, Ji 2024, arXiv:2405.15179",
        parameters="vectors * length once; r * vectors * (in + out) / length a layer",
        hosts=("linear", "conv1d"),
        merge=True,
        quantized=True,
        identity_start=False,
        hf="VBLORA",
    )
    name: str = "vb_lora"
    r: int = 4
    vectors: int = 256
    length: int = 256
    topk: int = 2
    logits_lr_ratio: float = 10.0
    bank_bound: float = 0.02
    logits_std: float = 0.1
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""

    def __post_init__(self) -> None:
        for field in ("r", "vectors", "length", "logits_lr_ratio", "bank_bound", "logits_std"):
            if getattr(self, field) <= 0:
                raise ValueError(f"VBLoRA's {field} must be positive, got {getattr(self, field)}")
        if not 2 <= self.topk <= self.vectors:
            raise ValueError(f"VBLoRA's topk must lie between 2 (the weight of one vector alone is 1, whatever its "
                             f"logit) and vectors={self.vectors}, got {self.topk}")  # fmt: skip
        ranks.check_dropout(self)

    def inject(self, model: nn.Module, stats: None = None) -> None:
        targets = find(model, self.targets, self.traits.hosts, exclude=self.exclude, layers=self.layers)
        sides = {side for _, host in targets for side in hosts.shape(host)}
        for name, host in targets:
            if any(side % self.length for side in hosts.shape(host)):
                raise ValueError(f"{name}: length={self.length} does not divide its {hosts.shape(host)} weight; "
                                 f"{math.gcd(*sides)} is the longest that divides all targets")  # fmt: skip
        owner = None
        for _, host in targets:
            adapter = VBLoRALinear(host, self, owner)
            attach(host, self.name, adapter)
            owner = owner or adapter

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        logits = [p for _, _, a in self.adapters(model) for n, p in a.named_parameters() if n != "bank"]
        return [{"params": logits, "lr_scale": self.logits_lr_ratio}]

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        held: dict[str, tuple[Any, Any]] = {name: (host, a) for name, host, a in self.adapters(model)}
        fields = {theirs: getattr(self, ours) for ours, theirs in HF_FIELDS.items()} | {
            "save_only_topk_weights": False,
            "target_modules": hf.target_modules(model, held),
            "fan_in_fan_out": any(hosts.is_conv1d(host) for host, _ in held.values()),
            "bias": "none",
        }
        logits = {f"{hf.PREFIX}{n}.vblora_logits_{t}": getattr(a, t) for n, (_, a) in held.items() for t in "AB"}
        return fields, logits | {HF_BANK: next(a.owner[0].bank for _, a in held.values())}

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "VBLoRA":
        if config.get("save_only_topk_weights"):
            raise ValueError("the folder was written with save_only_topk_weights=True and lacks the other logits, so "
                             "that nothing can train it; write it again without")  # fmt: skip
        hf.check_fields(config, (*HF_FIELDS.values(), "fan_in_fan_out"), "vb_lora")
        names = [name for name, t in tensors.items() if "vblora_logits_A" in t]
        if not names:
            raise ValueError(f"no tensor of the file belongs to a module of this {type(model).__name__}: another base?")
        find(model, [exact(name) for name in names], cls.traits.hosts)  # that they can be adapted
        known = {ours: config[theirs] for ours, theirs in HF_FIELDS.items() if theirs in config}
        return cls(targets=hf.targets(model, names), **known)
