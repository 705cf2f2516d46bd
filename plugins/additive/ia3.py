"""(IA)^3: learned vectors rescale keys, values and the MLP's inner activations. Liu et al. 2022, arXiv:2205.05638."""

import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, Method, Traits, WeightAdapter, arch, attach, find, hf, hosts, parts
from lightning_peft.find import exact

PLACES = ("key", "value", "mlp")
HF_FIELDS = ("feedforward_modules", "fan_in_fan_out", "init_ia3_weights")


class IA3Output(WeightAdapter):
    """``y = l * base(x)``, one factor an output, the bias's included."""

    axes = {"l": ("out",)}

    def __init__(self, host: Any, around: tuple[int, int]) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.empty(hosts.shape(host)[0] - sum(around)))
        self.around = around  # numbers of outputs before and after those that are scaled
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.l)  # so training starts from the base model

    def scale(self) -> Tensor:
        return F.pad(self.l, self.around, value=1.0) if any(self.around) else self.l  # (out,)

    def weight(self, W: Tensor) -> Tensor:
        return self.scale()[:, None] * W

    def bias(self, b: Tensor) -> Tensor:
        return self.scale() * b

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y = base(x)
        return (y * _per_channel(self.scale(), base.host)).to(y.dtype)  # multiplied in float32, as l is


class IA3Fused(IA3Output):
    """The same for some of the outputs: the keys' and values' of a fused projection, whose queries stay as they are."""

    axes = {"l": ("rows",)}


class IA3Input(WeightAdapter):
    """``y = base(l * x)``, one factor an input."""

    axes = {"l": ("in",)}

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.empty(getattr(host, "in_channels", hosts.shape(host)[1])))
        self.groups = getattr(host, "groups", 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.l)

    def weight(self, W: Tensor) -> Tensor:
        blocks = W.view(self.groups, len(W) // self.groups, len(self.l) // self.groups, -1)  # (g, out/g, in/g, kernel)
        return (blocks * self.l.view(self.groups, 1, -1, 1)).view(W.shape)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return base((x * _per_channel(self.l, base.host)).to(x.dtype))


class IA3ConvInput(IA3Input):
    """The same on a convolution, whose matrix has as many columns a channel as its kernel has places."""

    axes = {"l": ("channels",)}


def _per_channel(scale: Tensor, host: Any) -> Tensor:
    """(channels,) shaped for what the host takes or returns: (..., channels), or (batch, channels, *space)."""
    return scale.view(-1, *[1] * len(getattr(host, "kernel_size", ())))


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """l * (W x + b) on key and value projections, W (l * x) + b on the last layer of each MLP; l starts at one.

    Weight decay would pull l to zero, which silences a layer, so these vectors have none.

    Args:
        places: which of "key", "value" and "mlp", found by structure; in encoder and decoder, cross-attention included.
            Of a projection that is queries, keys and values in one (GPT-2) the outputs of the chosen places alone.
        target_output: names, patterns or roles of layers whose outputs to scale, all of them, in place of ``places``.
        target_input: the same for layers whose inputs to scale.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="additive",
        paper="Liu et al. 2022, arXiv:2205.05638",
        parameters="out a layer whose output is scaled, in a layer whose input is",
        hosts=("linear", "conv1d", "conv"),
        merge=True,
        hf="IA3",
    )
    name: str = "ia3"
    places: tuple[str, ...] = PLACES
    target_output: tuple[str, ...] = ()
    target_input: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: str = ""

    def __post_init__(self) -> None:
        if not self.places or (unknown := [p for p in self.places if p not in PLACES]):
            raise ValueError(f"places are some of {PLACES}, got {unknown if self.places else self.places}")
        if (self.target_output or self.target_input) and self.places != PLACES:
            raise ValueError("target_output and target_input say where, so places has no effect: give one or the other")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        around: dict[str, tuple[int, int]] = {}
        outputs, inputs = list(self.target_output), list(self.target_input)
        if not outputs + inputs:
            around, inputs = self._by_structure(model)
            outputs = [exact(n) for n in around]
        at = [{n for n, _ in find(model, t, self.traits.hosts)} if t else set() for t in (outputs, inputs)]
        if both := sorted(at[0] & at[1]):
            raise ValueError(f"{self.name}: {both[0]!r} is a target for its output and for its input; give it once")
        found = dict(find(model, outputs + inputs, self.traits.hosts, exclude=self.exclude, layers=self.layers))
        for name, host in found.items():
            attach(host, self.name, _output(host, around.get(name, (0, 0))) if name in at[0] else _input(host))
        for a in parts.attentions(model):
            norms = [n for n, _ in model.get_submodule(a.name).named_children() if n[0] == "k" and "norm" in n]
            if norms and a.k in found:
                warnings.warn(f"{a.name}.{norms[0]} normalises each head's keys, which undoes what l on {a.k!r} has in "
                              "common over a head (likewise in other blocks)", stacklevel=2)  # fmt: skip
                break

    def _by_structure(self, model: nn.Module) -> tuple[dict[str, tuple[int, int]], list[str]]:
        """Layers -> numbers of outputs before and after those to scale; patterns of layers whose inputs to scale."""
        attentions, mlps = parts.attentions(model), parts.mlps(model)
        for place, (role, known) in zip(PLACES, [("attention", attentions)] * 2 + [("mlp", mlps)], strict=True):
            if place in self.places and not known:
                raise ValueError(f"{self.name}: this {type(model).__name__} has no layer for {place!r} that its "
                                 "structure tells; name layers by target_output and target_input, such as "
                                 f"{arch.role(model, role)[:4]}, or leave it out of places={self.places}")  # fmt: skip
        around: dict[str, tuple[int, int]] = {}
        for a, part in [(a, p[0]) for a in attentions for p in PLACES[:2] if p in self.places]:
            layer, rows = getattr(a, part), a.outputs(part)
            out = hosts.shape(model.get_submodule(layer))[0]
            before, after = around.get(layer, (out, out))
            around[layer] = min(before, rows.start), min(after, out - rows.stop)
        return around, [exact(m.down) for m in mlps if "mlp" in self.places]

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        return [{"params": [p for _, _, a in self.adapters(model) for p in a.parameters()], "weight_decay": 0.0}]

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """peft's vectors; for a fused projection with fixed queries a copy, with ones for these."""
        held: dict[str, tuple[Any, Any]] = {name: (host, a) for name, host, a in self.adapters(model)}
        if flat := next((n for n, (host, _) in held.items() if isinstance(host, nn.Conv1d)), None):
            raise ValueError(f"{flat}: huggingface/peft's IA3 has no Conv1d")
        fields = {
            "target_modules": hf.target_modules(model, held),
            "feedforward_modules": "|".join(re.escape(n) for n, (_, a) in held.items() if isinstance(a, IA3Input)),
            "fan_in_fan_out": any(hosts.is_conv1d(host) for host, _ in held.values()),
            "init_ia3_weights": True,
        }
        return fields, {f"{hf.PREFIX}{n}.ia3_l": _as_in_peft(host, a) for n, (host, a) in held.items()}

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "IA3":
        hf.check_fields(config, HF_FIELDS, "ia3")
        names = [name for name, held in tensors.items() if "ia3_l" in held]
        if not names:
            raise ValueError(f"no vector of the file belongs to a module of this {type(model).__name__}: other base?")
        rule = config.get("feedforward_modules") or ()  # a regex for the whole name, or ends of names, dot or not
        inputs = [n for n in names if (re.fullmatch(rule, n) if isinstance(rule, str) else n.endswith(tuple(rule)))]
        outputs = [n for n in names if n not in inputs]
        return cls(target_output=hf.targets(model, outputs), target_input=hf.targets(model, inputs))


def _output(host: Any, around: tuple[int, int]) -> IA3Output:
    return IA3Fused(host, around) if any(around) else IA3Output(host, around)


def _input(host: Any) -> IA3Input:
    return IA3ConvInput(host) if hosts.kind(host) == "conv" else IA3Input(host)


def _as_in_peft(host: Any, adapter: Any) -> Tensor:
    if hosts.kind(host) == "conv":
        return adapter.l.view(1, -1, *[1] * len(host.kernel_size))
    return adapter.l.view(1, -1) if isinstance(adapter, IA3Input) else adapter.scale().view(-1, 1)
