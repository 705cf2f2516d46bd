"""ADA-DEFT: DEFT with a learned weight on each MLP, by which some are skipped. Runwal et al. 2024, arXiv:2402.01911."""

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_peft_plugins.lifecycle.activations import Place, Watch
from lightning_peft_plugins.lifecycle.deft import DEFT
from lightning_peft_plugins.lifecycle.density import Watcher
from lightning_peft_plugins.lifecycle.light_peft import LightPEFT
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_peft import Base, Method, Traits, WeightAdapter, attach, parts, surgery
from lightning_peft.attach import adapters
from lightning_peft.padding import Padding

_NORM_BEHIND = re.compile(r"post_(feedforward|mlp|ffn)_?(layer)?norm")


class Gate(WeightAdapter):
    """``w`` times what the MLP returns, on its last layer."""

    axes = {"w": ("gate",)}

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))  # FSDP takes no scalars

    def reset_parameters(self) -> None:
        nn.init.ones_(self.w)  # so training starts from the base model

    def weight(self, W: Tensor) -> Tensor:
        return self.w * W

    def bias(self, b: Tensor) -> Tensor:
        return self.w * b

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y = base(x)
        return (self.w * y).to(y.dtype)


class WatchingGate(Watcher, Gate):
    """The same, which sees what enters the layer."""

    def reset_parameters(self) -> None:
        Watcher.reset_parameters(self)
        Gate.reset_parameters(self)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        self.see(x, x)
        return super().forward(base, x)


class WatchBeside(Watch):
    """On an activation function, for a gate on another module."""

    def __init__(self, gate: Gate, *options: Any) -> None:
        super().__init__(*options)
        self.gate = (gate,)  # in a tuple, so that it is no child of this one


@dataclass(frozen=True, kw_only=True)
class AdaDEFT(DEFT):
    """x + w MLP(x) with a trained w for every MLP, and weight * mean over layers of |w| * (soft density of the layer).

    The term draws w to 0 fastest where a layer is dense, the task holds it where it matters. At the end of the fit MLPs
    with |w| < tau are skipped: w becomes 0, which is exact from there on, and their channels are cut out of the model
    but for one. Checkpoints of the fit itself still have all. The definition is inferred: the paper's abstract tells
    of layer weights and skipping, and no code of it was published.

    Args:
        weight: of the loss term; 0 only measures.
        eps, warmup, observe, threshold, count_padding, layers: as in ``deft``.
        tau: see above.
        drop: skip so many MLPs, those with the smallest |w|, in place of ``tau``.
        cut: really remove the channels of skipped MLPs, which cannot be undone; else they are computed for nothing. A
            quantised MLP stays whole.
        targets: not used here; MLPs are found by structure.
    """

    traits = Traits(
        family="lifecycle",
        paper="Runwal et al. 2024, arXiv:2402.01911",
        parameters="1 an MLP",
        hosts=("module",),
        merge=True,
    )
    name: str = "ada_deft"
    tau: float = 0.1
    drop: int = 0
    cut: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets:
            raise ValueError(f"{self.name}: its weights belong to MLPs, so targets have no effect; choose by layers")
        if not (math.isfinite(self.tau) and self.tau >= 0) or self.drop < 0:
            raise ValueError(f"{self.name}: tau and drop are at least 0, got {self.tau} and {self.drop}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        behind = next((n for n, _ in model.named_modules() if _NORM_BEHIND.fullmatch(n.rpartition(".")[2])), None)
        if behind:
            raise ValueError(f"{self.name}: {behind!r} normalises what the MLP returns, so that a factor on it has no "
                             "effect; use deft")  # fmt: skip
        super().inject(model)

    def beside(self, model: nn.Module, others: Sequence[Method]) -> None:
        for other in others:
            if isinstance(other, LightPEFT):
                raise ValueError(f"{self.name} finds by its weights which MLPs stay, and {other.name} would thin out "
                                 f"those weights like any adapter: leave {other.name} out, or take deft")  # fmt: skip

    def put(self, model: nn.Module, place: Place, padding: Padding | None) -> None:
        gate = WatchingGate(*self.options(padding)) if place.at_input else Gate()
        attach(model.get_submodule(place.down), self.name, gate)
        if not place.at_input:
            attach(place.host, self.name, WatchBeside(gate, *self.options(padding)))

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        return [{"params": [g.w for g in gates(model, self.name).values()], "weight_decay": 0.0}]

    def weighted(self, watcher: Watcher, term: Tensor) -> Tensor:
        gate: Any = watcher.gate[0] if isinstance(watcher, WatchBeside) else watcher
        if isinstance(gate.w, DTensor):
            raise ValueError(f"{self.name}: its weights cannot be sharded; use one device or strategy='ddp'")
        return term * gate.w.abs().sum()

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        held = gates(model, self.name)
        size = {name: float(gate.w.abs()) for name, gate in held.items()}
        by_size = sorted(size, key=lambda name: size[name])
        skipped = by_size[: self.drop] if self.drop else [n for n in by_size if size[n] < self.tau]
        channels = {}
        for mlp in parts.mlps(model):
            if mlp.down in skipped:
                held[mlp.down].w.zero_()
                if self.cut and (reason := surgery.obstacle(model, mlp)):
                    warnings.warn(f"{self.name}: {mlp.name!r} is skipped but not cut: {reason}", stacklevel=2)
                elif self.cut and mlp.channels > 1:
                    channels[mlp.name] = [0]
        if channels:
            surgery.cut(model, channels=channels)

    def report(self, model: nn.Module) -> dict[str, dict[str, float]]:
        size = {name: float(gate.w.abs()) for name, gate in gates(model, self.name).items()}
        return super().report(model) | {"gate": size}


def gates(model: nn.Module, name: str) -> dict[str, Gate]:
    return {n: a for n, _, a in adapters(model, name) if isinstance(a, Gate)}
