"""(IA)^3: learned vectors rescale keys, values and the MLP's inner activations. Liu et al. 2022, arXiv:2205.05638."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, Method, Traits, WeightAdapter, arch, attach, find, hf, hosts, parts
from lightning_peft.find import exact

PLACES = ("key", "value", "mlp")
HF_FIELDS = ("feedforward_modules", "fan_in_fan_out", "init_ia3_weights")


def _per_channel(scale: Tensor, host: Any) -> Tensor:
    """(channels,) shaped for what the host takes or returns: (..., channels), or (batch, channels, *space)."""
    return scale.view(-1, *[1] * len(getattr(host, "kernel_size", ())))


class IA3Output(WeightAdapter):
    """``y = l * base(x)``, one factor an output, the bias's included."""

    axes = {"l": ("out",)}

    def __init__(self, length: int, around: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.empty(length))
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

    def __init__(self, length: int, groups: int = 1) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.empty(length))
        self.groups = groups
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


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """l * (W x + b) on key and value projections, W (l * x) + b on the last layer of each MLP; l starts at one.

    Weight decay would pull l to zero, which silences a layer, so these vectors have none.

    Args:
        places: which of "key", "value" and "mlp", found by structure; in encoder and decoder, cross-attention included.
        target_output: names, patterns or roles of layers whose outputs to scale, in place of ``places``.
        target_input: the same for layers whose inputs to scale.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
        whole_fused: of a projection that is queries, keys and values in one (GPT-2) scale the queries too, as
            huggingface/peft does; its folders are read so.
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
    whole_fused: bool = False

    def __post_init__(self) -> None:
        if not self.places or (unknown := [p for p in self.places if p not in PLACES]):
            raise ValueError(f"places are some of {PLACES}, got {unknown if self.places else self.places}")
        if (self.target_output or self.target_input) and self.places != PLACES:
            raise ValueError("target_output and target_input say where, so places has no effect: give one or the other")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        given = self.target_output or self.target_input
        outputs, inputs = (self.target_output, self.target_input) if given else self._by_structure(model)
        scaled = [{n for n, _ in find(model, t, self.traits.hosts)} if t else set() for t in (outputs, inputs)]
        if both := sorted(set.intersection(*scaled)):
            raise ValueError(f"{self.name}: {both[0]!r} is a target for its output and for its input; give it once")
        fused = self._fused(model)
        found = find(model, [*outputs, *inputs], self.traits.hosts, exclude=self.exclude, layers=self.layers)
        if self.whole_fused and not any(n in fused for n, _ in found):
            raise ValueError(f"{self.name}: whole_fused has no effect, no target is a fused projection")
        for name, host in found:
            around = (0, 0) if self.whole_fused else fused.get(name, (0, 0))
            attach(host, self.name, _input(host) if name in scaled[1] else _output(host, around))
        for a in parts.attentions(model):
            norms = [n for n, _ in model.get_submodule(a.name).named_children() if n[0] == "k" and "norm" in n]
            if norms and any(n == a.k for n, _ in found):
                warnings.warn(f"{a.name}.{norms[0]} normalises each head's keys, which undoes what l on {a.k!r} has in "
                              "common over a head (likewise in other blocks)", stacklevel=2)  # fmt: skip
                break

    def _by_structure(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """Patterns of the layers whose outputs, and of those whose inputs are scaled."""
        attentions, mlps = parts.attentions(model), parts.mlps(model)
        for place, (role, known) in zip(PLACES, [("attention", attentions)] * 2 + [("mlp", mlps)], strict=True):
            if place in self.places and not known:
                raise ValueError(
                    f"{self.name}: this {type(model).__name__} has no layer for {place!r} that its structure tells; "
                    f"name layers by target_output and target_input, such as {arch.role(model, role)[:4]}, or leave "
                    f"{place!r} out of places={self.places}"
                )
        layers = [getattr(a, p[0]) for p in PLACES[:2] if p in self.places for a in attentions]
        downs = [m.down for m in mlps if "mlp" in self.places]
        return [exact(n) for n in dict.fromkeys(layers)], [exact(n) for n in downs]

    def _fused(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """Fused projections -> how many of their outputs lie before and after those of the wanted places."""
        around = {}
        for a in parts.attentions(model):
            for layer in {a.k, a.v}:
                wanted = [a.outputs(p[0]) for p in PLACES[:2] if p in self.places and getattr(a, p[0]) == layer]
                out = hosts.shape(model.get_submodule(layer))[0]
                if wanted and (wanted[0].start, wanted[-1].stop) != (0, out):
                    around[layer] = wanted[0].start, out - wanted[-1].stop
        return around

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        return [{"params": [p for _, _, a in self.adapters(model) for p in a.parameters()], "weight_decay": 0.0}]

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """peft's vectors; for a fused projection with fixed queries a copy, with ones for these."""
        held = {name: (host, a) for name, host, a in self.adapters(model)}
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
        inputs = [n for n in names if _is_feedforward(config.get("feedforward_modules") or (), n)]
        outputs = [n for n in names if n not in inputs]
        fused = bool(cls()._fused(model).keys() & set(outputs))
        return cls(target_output=hf.targets(model, outputs), target_input=hf.targets(model, inputs), whole_fused=fused)


def _output(host: Any, around: tuple[int, int]) -> IA3Output:
    length = hosts.shape(host)[0] - sum(around)
    return IA3Fused(length, around) if any(around) else IA3Output(length)


def _input(host: Any) -> IA3Input:
    if hosts.kind(host) == "conv":
        return IA3ConvInput(host.in_channels, host.groups)
    return IA3Input(hosts.shape(host)[1])


def _as_in_peft(host: Any, adapter: Any) -> Tensor:
    if hosts.kind(host) == "conv":
        return adapter.l.view(1, -1, *[1] * len(host.kernel_size))
    return adapter.l.view(1, -1) if isinstance(adapter, IA3Input) else adapter.scale().view(-1, 1)


def _is_feedforward(names: str | Sequence[str], name: str) -> bool:
    """peft's rule: a regular expression for the whole name, or ends of names, with a dot before them or not."""
    return bool(re.fullmatch(names, name)) if isinstance(names, str) else name.endswith(tuple(names))
