"""DEFT: a loss on the density of MLP activations, beside any method. Runwal et al. 2024, arXiv:2402.01911."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning_peft_plugins.lifecycle import activations
from lightning_peft_plugins.lifecycle.activations import Place, Watch, WatchInput
from lightning_peft_plugins.lifecycle.density import QUANTITIES, Watcher
from torch import Tensor, nn

from lightning_peft import Method, Step, Traits, attach
from lightning_peft.padding import Padding


@dataclass(frozen=True, kw_only=True)
class DEFT(Method):
    """weight * mean over examples and layers of a^2 / (a^2 + eps), a soft share of the MLPs' activations that fire.

    In a list with the method that trains, ``[LoRA(), DEFT()]``; it trains nothing itself and changes no output. In an
    encoder-decoder model encoder and decoder have a mean each. ``report`` tells by layer, while training and
    (``eval_``) in evaluation since the last step, three densities in [0, 1]: soft, hard (not exactly zero; GELU is
    that only where it saturates, which depends on dtype and kernel) and above (larger than ``threshold``).

    Args:
        weight: of the loss term; 0 only measures.
        eps: an entry of size sqrt(eps) counts half; only entries near that size are pushed down.
        warmup: share of the fit's optimizer steps over which the weight rises from 0.
        observe: "activation" is what the activation function returns (in a gated MLP before the product), "product"
            what enters the MLP's last layer, "auto" the product in MLPs gated by SiLU (Llama), else the activation.
            Where the function is no module of the MLP's own, "auto" too watches what enters the last layer, which
            in training may lie behind a dropout.
        threshold: see above.
        count_padding: let padded positions count, as the authors do; else they are left out by the attention_mask.
        targets: modules to watch in place of the MLPs: of a linear layer the input, of others the output.
        layers: blocks to watch, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="lifecycle",
        paper="Runwal et al. 2024, arXiv:2402.01911",
        parameters="0",
        hosts=("module",),
        merge=True,
    )
    name: str = "deft"
    weight: float = 1.0
    eps: float = 1e-7
    warmup: float = 0.0
    observe: str = "auto"
    threshold: float = 1e-3
    count_padding: bool = True
    targets: tuple[str, ...] = ()
    layers: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"{self.name}: weight is a number of at least 0, got {self.weight}")
        if not (math.isfinite(self.eps) and self.eps >= 1e-30):  # smaller ones and their squares vanish in float32
            raise ValueError(f"{self.name}: eps is above 0 (1e-30 at least), got {self.eps}")
        if not 0 <= self.warmup <= 1 or self.threshold < 0:
            raise ValueError(f"{self.name}: warmup lies in [0, 1] and threshold is at least 0, got {self.warmup} and "
                             f"{self.threshold}")  # fmt: skip
        if self.warmup and not self.weight:
            raise ValueError(f"{self.name}: warmup has no effect with weight=0")
        if self.observe not in activations.PLACES:
            raise ValueError(f"{self.name}: observe is one of {activations.PLACES}, got {self.observe!r}")
        if self.targets and self.observe != "auto":
            raise ValueError(f"{self.name}: targets say where, so observe has no effect: give one or the other")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        found = activations.places(model, self.observe, self.targets, self.layers, self.name)
        padding = None if self.count_padding else activations.padding(model, self.name)
        for place in found:
            self.put(model, place, padding)
        device = next(model.parameters()).device  # an activation function has none
        for watcher in activations.watchers(model, self.name).values():
            watcher.to(device)

    def put(self, model: nn.Module, place: Place, padding: Padding | None) -> None:
        attach(place.host, self.name, (WatchInput if place.at_input else Watch)(*self.options(padding)))

    def options(self, padding: Padding | None) -> tuple[Any, ...]:
        return self.eps, self.threshold, self.weight > 0, padding, 0.0 if self.warmup else 1.0

    def penalty(self, model: nn.Module) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        watched = activations.watchers(model, self.name)
        seen = {name: watcher.take() for name, watcher in watched.items()}
        if not self.weight:
            return None
        terms = {n: self.weighted(watched[n], term) for n, (term, _) in seen.items() if term is not None}
        self._check(terms, [name for name, (_, blind) in seen.items() if blind])
        sides: dict[str, list[Tensor]] = {}
        for name, term in terms.items():
            sides.setdefault(activations.side(name), []).append(term)
        value = torch.stack([torch.stack(of_one).mean() for of_one in sides.values()]).sum()
        return self.weight * next(iter(watched.values())).factor * value

    def weighted(self, watcher: Watcher, term: Tensor) -> Tensor:
        """A layer's term as it enters the mean."""
        return term

    def _check(self, terms: dict[str, Tensor], blind: list[str]) -> None:
        if blind:
            raise ValueError(
                f"{self.name}: {blind[0]!r} and others ({len(blind)}) ran without gradients in training, so the loss "
                "would not reach them: gradient checkpointing of the reentrant kind does that; take "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if not terms:
            raise ValueError(f"{self.name}: no activation was seen since the last step; is the model that runs the one "
                             "that was injected into?")  # fmt: skip
        if not any(term.requires_grad for term in terms.values()):
            raise ValueError(f"{self.name}: nothing that trains comes before a watched activation, so that its loss is "
                             "a constant: put it beside a method, such as PEFT([LoRA(), DEFT()])")  # fmt: skip

    def after_step(self, model: nn.Module, step: Step) -> None:
        if self.warmup:
            value = min(1.0, step.index / (self.warmup * step.total))
            for watcher in activations.watchers(model, self.name).values():
                watcher.factor.fill_(value)

    def report(self, model: nn.Module) -> dict[str, dict[str, float]]:
        out: dict[str, dict[str, float]] = {}
        for name, watcher in activations.watchers(model, self.name).items():
            for prefix, measured in zip(("", "eval_"), watcher.measured(), strict=True):
                for quantity, value in zip(QUANTITIES, measured, strict=False):
                    out.setdefault(prefix + quantity, {})[name] = value
        return out

    def forget(self, model: nn.Module) -> None:
        """Start measuring anew; else evaluations count together until the next training step."""
        for watcher in activations.watchers(model, self.name).values():
            watcher.forget()
