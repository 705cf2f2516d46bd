"""UniPELT: LoRA, prefixes and adapters, each behind a gate that its input opens. Mao et al. 2021, arXiv:2110.07577."""

import abc
from dataclasses import dataclass
from typing import Any

import torch
from lightning_peft_plugins.additive import bottleneck_places, prefix_layers, soft
from lightning_peft_plugins.additive.bottleneck import Behind, BehindNorm
from lightning_peft_plugins.additive.pfeiffer_adapter import PfeifferAdapter
from lightning_peft_plugins.additive.prefix_tuning import PrefixTuning
from lightning_peft_plugins.hybrid.composite import Composite, check_distinct
from lightning_peft_plugins.reparameterized import ranks
from lightning_peft_plugins.reparameterized.lora import LoRA, LowRank
from torch import Tensor, nn

from lightning_peft import Adapter, Base, Method, Traits, attach, hosts, parts
from lightning_peft.find import exact, nearest
from lightning_peft.padding import Padding, ReadPadding

PARTS = ("lora", "prefix", "adapter")
MEANS = ("auto", "masked", "all", "token")


class Gate(nn.Module):
    """``sigmoid(x . g + c)`` of inputs (batch, positions, width), with its mean over an example's positions.

    Args:
        width: of the inputs; 0: one number that no input moves.
        mean: "masked": over the positions that are no padding; "all": over all; "token": none.
        padding: where a ``Watch`` tells of it.
        std: of g at start, with c = 0; 0: both as nn.Linear starts.
    """

    opening: Tensor

    def __init__(self, width: int, mean: str, padding: Padding, std: float = 0.0) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.empty(width)) if width else None
        self.c = nn.Parameter(torch.empty(1))
        self.register_buffer("opening", torch.empty(1), persistent=False)  # mean in the last batch, for ``report``
        self.mean, self.padding, self.std = mean, padding, std
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.c)
        nn.init.constant_(self.opening, 0.5)
        if self.g is not None and self.std:
            nn.init.normal_(self.g, std=self.std)
        elif self.g is not None:
            bound = len(self.g) ** -0.5
            nn.init.uniform_(self.g, -bound, bound)
            nn.init.uniform_(self.c, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 1); for "token" (batch, positions, 1); without a width (1,)."""
        G = self.c if self.g is None else (x @ self.g.to(x.dtype)[:, None] + self.c.to(x.dtype))
        G = G.to(torch.promote_types(x.dtype, torch.float32)).sigmoid()
        if self.g is not None and self.mean != "token":
            weights = self.weights(x).to(G.dtype)  # (batch, positions)
            G = ((G * weights[..., None]).sum(1) / weights.sum(1)[:, None].clamp(min=1))[:, None]
        if self.training:
            self.opening.copy_(G.detach().mean().view(1))
        return G.to(x.dtype)

    def weights(self, x: Tensor) -> Tensor:
        """1 for the positions that count in an example's mean, else 0."""
        mask = self.padding.mask if self.mean == "masked" else None
        if mask is None:
            return x.new_ones(x.shape[:2])
        if x.dim() != 3 or mask.shape != x.shape[:2]:
            raise ValueError(
                f"unipelt's gates take the mean over the positions of attention_mask {tuple(mask.shape)}, but a layer "
                f"reads {tuple(x.shape)}; gate_mean='token' needs no mask"
            )
        return mask != 0


class Watch(ReadPadding):
    """On a transformer: tells the gates below of the text's padding (batch, positions)."""

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        masked = self.call(args, kwargs).get("attention_mask") is not None
        if masked and torch.is_grad_enabled() and getattr(base.host, "gradient_checkpointing", False):
            raise ValueError("under gradient checkpointing layers run again when the mask is gone, so unipelt's gates "
                             "cannot take a mean without padding: set gate_mean='token' or 'all'")  # fmt: skip
        return super().forward(base, *args, **kwargs)


class Gated(Adapter, abc.ABC):
    """An adapter with a gate."""

    def __init__(self, gate: Gate, *options: Any) -> None:
        super().__init__(*options)
        self.gate = gate

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for gate in self.children():  # none yet when a parent's __init__ calls this
            gate.reset_parameters()  # type: ignore[operator]


class GatedLoRA(Gated, LowRank):
    """``base(x) + G scale * x A^T B^T``: no map on the weight, as G depends on x."""

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y = base(x)
        return y + (self.gate(x) * self.update(base.host, self.dropped(x))).to(y.dtype)


class GatedBehind(Gated, Behind):
    """``h + G delta(h)``."""

    def delta(self, z: Tensor) -> Tensor:
        return self.gate(z) * super().delta(z)


class GatedBehindNorm(Gated, BehindNorm):
    """``norm(z + G delta(norm(z)))``; the gate reads what ``delta`` reads."""

    def delta(self, z: Tensor) -> Tensor:
        return self.gate(z) * super().delta(z)


class PrefixGate(Gated, prefix_layers.InLayer):
    """Keys and values of the prefix times G of what the attention reads, before the first text is added to them."""

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        call = self.call(args, kwargs)
        kept = self.kept(call)
        if kept.get_seq_length() == self.num_tokens:  # later calls with this cache find them gated
            G = self.gate(call["hidden_states"]).unsqueeze(-1)  # (batch, 1, 1, 1)
            kept.keys, kept.values = kept.keys * G, kept.values * G
        return base(**call)


@dataclass(frozen=True, kw_only=True)
class UniPELT(Composite):
    """One model with LoRA on queries and values, prefixes in attention and Pfeiffer adapters, and a gate for each.

    A gate is ``sigmoid(x . g + c)`` of what its part reads, about 0.5 at the start. In encoders it is the mean over
    the example's positions without padding, so one number an example and place. In causal models that mean would tell
    earlier positions of later ones: there LoRA and adapters have a gate for every position, and the prefix of a layer
    has one number, sigmoid(c).

    Args:
        lora: LoRA on linear layers; without targets on the projections of queries and values, found by structure. Its
            alpha / r stays as a factor of the gate, which is 1 as in the paper where alpha equals r.
        prefix: prefix tuning.
        adapter: Pfeiffer adapters. Null leaves any of the three out.
        gated: which of "lora", "prefix" and "adapter" have gates; the others are as they are alone.
        gate_mean: "auto" as above; "masked": over all but padding; "all": over padding too, as in the authors' code;
            "token": none, as in causal models. Means are refused where they would see later positions.
    """

    traits = Traits(
        family="hybrid",
        paper="Mao et al. 2021, arXiv:2110.07577",
        parameters="those of lora, prefix_tuning and pfeiffer_adapter, and width + 1 a gate",
        hosts=("linear", "conv1d", "model", "module"),
        identity_start=False,
    )
    name: str = "unipelt"
    lora: LoRA | None = LoRA(r=8, alpha=8.0, targets=())
    prefix: PrefixTuning | None = PrefixTuning(num_tokens=10, reparam_dim=512)
    adapter: PfeifferAdapter | None = PfeifferAdapter(reduction_factor=16)
    gated: tuple[str, ...] = PARTS
    gate_mean: str = "auto"

    def __post_init__(self) -> None:
        check_distinct(self.name, {part: getattr(self, part) for part in PARTS})
        for word in self.gated:
            if word not in PARTS:
                raise ValueError(
                    f"{self.name}: gated are some of {PARTS}, got {word!r}; nearest: {nearest(word, PARTS)}"
                )
        if self.gate_mean not in MEANS:
            near = nearest(self.gate_mean, MEANS)
            raise ValueError(f"{self.name}: gate_mean is one of {MEANS}, got {self.gate_mean!r}; nearest: {near}")
        if self.gate_mean != "auto" and not any(getattr(self, part) is not None for part in self.gated):
            raise ValueError(f"{self.name}: no part has a gate, so gate_mean={self.gate_mean!r} has no effect")

    def parts(self, model: nn.Module) -> list[Method]:
        return list(self._parts(model).values())

    def _parts(self, model: nn.Module) -> dict[str, Any]:
        held = {part: self.part(getattr(self, part)) for part in PARTS if getattr(self, part) is not None}
        if self.lora is not None and not self.lora.targets:
            found = (layer for a in parts.attentions(model) for layer in (a.q, a.v))
            targets = tuple(exact(n) for n in dict.fromkeys(found))
            if not targets:
                raise ValueError(f"{self.name}: no query and value projections are recognised in this "
                                 f"{type(model).__name__}: name targets of lora")  # fmt: skip
            held["lora"] = self.part(self.lora, targets=targets)
        return held

    def inject(self, model: nn.Module, stats: None = None) -> None:
        padding, (watched, open_to_all) = Padding(), prefix_layers.both_ways(model, self.name)

        def gate(host: Any, width: int, std: float = 0.0) -> Gate:
            mean = "masked" if self.gate_mean == "auto" and host in open_to_all else self.gate_mean
            if mean in ("masked", "all") and host not in open_to_all:
                raise ValueError(
                    f"{self.name}: a {type(host).__name__} of this model may be causal (nothing says is_causal=False), "
                    f"and a mean over positions would tell earlier ones of later ones: gate_mean={mean!r} does not "
                    "fit, 'auto' and 'token' do"
                )
            return Gate(width, "token" if mean == "auto" else mean, padding, std)

        for field, part in self._parts(model).items():
            put = {"lora": put_lora, "prefix": put_prefix, "adapter": put_adapter}[field]
            put(model, part, self.name, gate) if field in self.gated else part.inject(model)
        if any(g.mean == "masked" for g in model.modules() if isinstance(g, Gate)):
            for host in watched:  # last, so that it sees the mask before the prefix lengthens it
                attach(host, self.name, Watch(host, padding))

    def report(self, model: nn.Module) -> dict[str, dict[str, float]]:
        out: dict[str, dict[str, float]] = {}
        for name, _, adapter in self.adapters(model):
            kind = {GatedLoRA: "lora", PrefixGate: "prefix"}.get(type(adapter), "adapter")
            if isinstance(adapter, Gated):
                out.setdefault(f"gate_{kind}", {})[name] = float(adapter.gate.opening)
        return out


def put_lora(model: nn.Module, lora: LoRA, by: str, gate: Any) -> None:
    for name, host, r, alpha in ranks.places(lora, model):
        if hosts.kind(host) not in ("linear", "conv1d"):
            raise ValueError(f"{by}: a gate reads what a linear layer reads, {name!r} is a {type(host).__name__}")
        scale = alpha / ranks.norm(r, lora.rslora)
        gated = GatedLoRA(gate(host, hosts.shape(host)[1]), host, r, scale, lora.dropout, lora.init)
        attach(host, lora.name, gated)


def put_prefix(model: nn.Module, prefix: PrefixTuning, by: str, gate: Any) -> None:
    _, host = soft.stacks(model, by)
    prefix.inject(model)
    for module in prefix_layers.attentions(host, by, prefix.layers).values():
        one = gate(module, soft.width(host))
        if one.mean == "token":  # keys are there for all positions
            one = gate(module, 0)
        attach(module, by, PrefixGate(one, module, prefix.num_tokens))


def put_adapter(model: nn.Module, adapter: PfeifferAdapter, by: str, gate: Any) -> None:
    make = bottleneck_places.maker(adapter)
    for name, width, behind in adapter.places(model):
        host = model.get_submodule(name)
        gated = GatedBehindNorm if behind is BehindNorm else GatedBehind
        attach(host, adapter.name, make(gated, width, gate(host, width, 0.02)))
