"""Structure-learnable adapters: bottlenecks whose places gates choose. Gong et al. 2025, arXiv:2509.03057.

The paper gives the gate and that a penalty drives it; the penalty's form, the phases and the selection are inferred.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning_peft_plugins.additive import bottleneck, bottleneck_places
from lightning_peft_plugins.additive.sublayers import KINDS, sublayers
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import Method, Step, Traits, arch, detach, resize
from lightning_peft.find import exact, nearest

BLOCK = "block"


class Gated(bottleneck.Behind):
    """``h + sigmoid(gate) * delta(h)`` while places are searched, ``h + opening * delta(h)`` once they are chosen.

    gate is (1,), then (0,). As long as ``live`` is 0 the gate is held: it counts as a half, its gradient is zero.
    """

    axes = bottleneck.Behind.axes | {"gate": ("gate",)}
    live: Tensor
    opening: Tensor

    def __init__(self, *args: Any, held: bool) -> None:
        super().__init__(*args)
        self.held = held
        self.gate = nn.Parameter(torch.empty(1))
        self.register_buffer("live", torch.empty(()))
        self.register_buffer("opening", torch.empty(()))
        self._start()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "gate" in self._parameters:  # the bottleneck's own constructor comes here before there is one
            self._start()

    def _start(self) -> None:
        nn.init.zeros_(self.gate)
        nn.init.constant_(self.live, float(not self.held))
        nn.init.ones_(self.opening)

    @property
    def searching(self) -> bool:
        return len(self.gate) > 0

    def open(self) -> Tensor:
        """How far the adapter is heard, in (0, 1). The empty gate takes part: DDP waits for every gradient."""
        return self.opening * (self.gate * self.live).sigmoid().prod()

    def delta(self, z: Tensor) -> Tensor:
        return self.open().to(z.dtype) * super().delta(z)

    def settle(self, hard: bool, optimizers: Iterable[Optimizer]) -> None:
        """Hold the opening where it is, or at 1."""
        self.opening.copy_(torch.ones_like(self.opening) if hard else self.open())
        resize(self, "gate", torch.empty(0, dtype=torch.long), optimizers)


@dataclass(frozen=True, kw_only=True)
class StructureLearnableAdapter(Method):
    """h + sigmoid(a) * (U f(D h + b_D) + b_U) behind every block, with a trained gate a; closed ones are removed.

    Gates are held at a half for ``warmup`` of the fit. Then they train along, under a penalty of ``lambda_struct``
    times the mean of sigmoid(a). For the last part, ``finetune`` of the fit, adapters with a sigmoid(a) below
    ``threshold`` are taken off, the other gates stay where they are, and those adapters alone train on. U starts at
    zero, so training starts from the base model whatever the gates are.

    Args:
        bottleneck: size in the middle; by default the width over ``reduction_factor``.
        reduction_factor: see ``bottleneck``.
        nonlinearity: f, "relu", "gelu", "silu" (swish) or "tanh".
        dropout: probability behind f.
        lambda_struct: weight of the penalty; the paper found 1 best, and harm above 2.
        reduction: "mean" over places, or "sum", by which the weight grows with the depth.
        gate_lr_scale: learning rate of the gates over that of the adapters; they have no weight decay.
        warmup: share of the fit's steps in which gates are held.
        finetune: share of the fit's steps after the selection.
        threshold: what sigmoid(a) must reach for the adapter to stay; the most open one stays in any case.
        hard: the gates of those that stay become 1.
        places: "block", or some of "attention", "cross_attention" and "mlp", found by structure.
        targets: names, patterns or roles of modules to put one behind, in place of ``places``.
        exclude: patterns of modules to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="lifecycle",
        paper="Gong et al. 2025, arXiv:2509.03057",
        parameters="2 * hidden * bottleneck + bottleneck + hidden + 1 a place, less what is removed",
        hosts=("module",),
    )
    scale, init_std = 1.0, 0.0  # no options: the gate is the scale, and the start the base model
    name: str = "structure_learnable_adapter"
    bottleneck: int | None = None
    reduction_factor: int = 16
    nonlinearity: str = "relu"
    dropout: float = 0.0
    lambda_struct: float = 1.0
    reduction: str = "mean"
    gate_lr_scale: float = 10.0
    warmup: float = 0.1
    finetune: float = 0.1
    threshold: float = 0.05
    hard: bool = False
    places: tuple[str, ...] = (BLOCK,)
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: str = ""

    def __post_init__(self) -> None:
        bottleneck_places.check(self)
        by, places = self.name, tuple(self.places)
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"{by}: reduction is 'mean' or 'sum', got {self.reduction!r}")
        if self.lambda_struct < 0 or self.gate_lr_scale <= 0 or not 0 <= self.threshold < 1:
            given = f"{self.lambda_struct}, {self.gate_lr_scale} and {self.threshold}"
            raise ValueError(f"{by}: lambda_struct is no less than 0, gate_lr_scale positive, threshold in [0, 1); "
                             f"got {given}")  # fmt: skip
        if not (0 <= self.warmup < 1 and 0 <= self.finetune < 1 and self.warmup + self.finetune < 1):
            given = f"{self.warmup} and {self.finetune}"
            raise ValueError(f"{by}: warmup and finetune are shares of the fit, together below 1, got {given}")
        if places != (BLOCK,) and (not places or (unknown := [p for p in places if p not in KINDS])):
            near = f"; nearest: {nearest(unknown[0], KINDS)}" if places else ""
            raise ValueError(f"{by}: places are ('block',), or some of {KINDS}, got {places}{near}")
        if self.targets and places != (BLOCK,):
            raise ValueError(f"{by}: targets say where, so places has no effect: give one or the other")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        make = bottleneck_places.maker(self)
        for name, width in self._found(model):
            bottleneck_places.put_behind(model, self.name, lambda _, hidden: make(self._gated, hidden), name, width)

    def _gated(self, *args: Any) -> Gated:
        return Gated(*args, held=self.warmup > 0)

    def _found(self, model: nn.Module) -> list[tuple[str, int]]:
        """(name, width of what it returns) of every place."""
        if not self.targets and self.places != (BLOCK,):
            parts = sublayers(model, self.places, self.name, exclude=self.exclude, layers=self.layers)
            return [(part.ends, part.width) for part in parts]
        targets = self.targets or tuple(map(exact, arch.blocks(model)))
        if not targets:
            raise ValueError(
                f"{self.name}: this {type(model).__name__} has no stack of blocks; name modules by targets"
            )
        return bottleneck_places.targeted(model, targets, self.exclude, self.layers)

    def _held(self, model: nn.Module) -> dict[str, tuple[Any, Any]]:
        return {name: (host, adapter) for name, host, adapter in self.adapters(model)}

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        gates = [a.gate for _, a in self._held(model).values()]
        return [{"params": gates, "lr_scale": self.gate_lr_scale, "weight_decay": 0.0}]

    def penalty(self, model: nn.Module) -> Tensor | None:
        gates = [a.open() * a.live for _, a in self._held(model).values() if a.searching]
        if not gates or not self.lambda_struct:
            return None
        total = torch.stack(gates).sum()
        return self.lambda_struct * (total / len(gates) if self.reduction == "mean" else total)

    def after_step(self, model: nn.Module, step: Step) -> None:
        held = self._held(model)
        if step.index >= round(self.warmup * step.total):
            for _, adapter in held.values():
                adapter.live.fill_(1.0)
        if step.index >= max(1, round((1 - self.finetune) * step.total)):
            self._select(held, step.optimizers)

    def finish(self, model: nn.Module) -> None:
        if self._select(self._held(model)):
            warnings.warn(f"{self.name}: the fit ended before its last share {self.finetune}, so places were chosen at "
                          "the end and their adapters did not train on by themselves", stacklevel=2)  # fmt: skip

    @torch.no_grad()
    def _select(self, held: dict[str, tuple[Any, Any]], optimizers: Iterable[Optimizer] = ()) -> bool:
        """Take closed adapters off and settle the others; False where that was done before."""
        open_, optimizers = {n: float(a.open()) for n, (_, a) in held.items() if a.searching}, list(optimizers)
        for name, value in open_.items():
            host, adapter = held[name]
            if value < self.threshold and name != max(open_, key=lambda n: open_[n]):
                detach(host, self.name)
                _forget(adapter, optimizers)
            else:
                adapter.settle(self.hard, optimizers)
        return bool(open_)

    @torch.no_grad()
    def report(self, model: nn.Module) -> dict[str, dict[str, float]]:
        held = self._held(model)
        return {"gate": {n: float(a.open()) for n, (_, a) in held.items()}, "adapters": dict.fromkeys(held, 1)}


def _forget(adapter: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Take an adapter's tensors out of the optimizers, as if they had never been in."""
    gone = set(adapter.parameters())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p not in gone]
        for p in gone & optimizer.state.keys():
            del optimizer.state[p]
