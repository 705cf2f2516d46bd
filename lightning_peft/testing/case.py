"""What a conformance check works on: the untouched base, and injected or trained copies of it."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import AdamW, Optimizer
from torch.utils._pytree import tree_map  # private: flattens what models take and return

from lightning_peft import calibration, optim, registry
from lightning_peft.attach import evaluating, modules
from lightning_peft.find import exact, nearest
from lightning_peft.inject import find_record, inject, pattern_selects, penalty
from lightning_peft.method import Method, Passes, Step
from lightning_peft.testing.compare import base_parameters, floats

Batch = dict[str, Any] | tuple[Any, ...]
Build = Callable[[], nn.Module]


def again(method: Method) -> Method:
    """The method built anew from its hyper-parameters, so that state hidden on the object is not carried over."""
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    return type(method)(**tree_map(lambda v: again(v) if isinstance(v, Method) else v, fields))


class Case:
    """One method (or several, used together) on one base with one batch.

    Args:
        method: what is tested. Every run gets it built anew from its hyper-parameters.
        model: the base, or a function that makes it; every run gets a copy of the same one.
        batch: keyword arguments (dict) or arguments (tuple) of the base. Tensors have the examples along dimension 0.
        train: patterns of base parameters that train along.
        tolerance: largest difference of outputs that should be equal up to rounding, relative to the larger of 1 and
            the largest output.
    """

    def __init__(
        self,
        method: Method | Sequence[Method],
        model: nn.Module | Build,
        batch: Batch,
        train: Sequence[str] = (),
        tolerance: float = 1e-5,
    ) -> None:
        methods = [method] if isinstance(method, Method) else list(method)
        self._methods = [again(m) for m in methods]
        self._base = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
        if find_record(self._base):
            raise ValueError("the model of a conformance check is the untouched base, but this one holds adapters")
        self.batch, self.tolerance = batch, tolerance
        names = [n for n, _ in self._base.named_parameters()]
        self.train = [n for n in names if any(pattern_selects(p, n) for p in train)]
        if idle := [p for p in train if not any(pattern_selects(p, n) for n in names)]:
            raise ValueError(f"train={idle[0]!r} matches no parameter; nearest: {nearest(idle[0], names)}")

    # ---- models ----------------------------------------------------------------------------------------------------

    def methods(self) -> list[Method]:
        return [again(m) for m in self._methods]

    @property
    def names(self) -> str:
        return " + ".join(repr(m) for m in self._methods)

    def can(self, trait: str) -> bool:
        """True where every method has the trait."""
        return all(getattr(m.traits, trait) for m in self._methods)

    def base(self) -> Any:
        return copy.deepcopy(self._base)

    def cast(self, dtype: torch.dtype) -> "Case":
        """The same case with base and batch in another precision."""

        def one(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        return Case(self._methods, self.base().to(dtype), tree_map(one, self.batch), self.train, self.tolerance)

    def injected(self, *others: Method, first: bool = False, train: Sequence[str] | None = None) -> Any:
        """A copy of the base with the methods; ``others`` injected after them, or before with ``first``."""
        model, mine = self.base(), self.methods()
        torch.manual_seed(0)
        looking = [m for m in mine if m.calibrates]
        names = self.train if train is None else list(train)
        with calibration.frozen(model, names):
            stats = {m.name: m.calibrate(model, [self.batch] * 2, lambda b: self.loss(model, b)) for m in looking}
        model.zero_grad()
        methods = [*others, *mine] if first else [*mine, *others]
        inject(model, methods, train=[exact(n) for n in names], stats=stats)
        return model

    def trained(self, steps: int = 3, train: Sequence[str] | None = None) -> Any:
        model = self.injected(train=train)
        self.fit(model, steps)
        return model

    def some_parameter(self) -> list[str]:
        """``train``, or else the name of a small parameter of the base to train along."""
        small = [n for n, p in self._base.named_parameters() if p.dim() == 1 and p.is_floating_point()]
        return self.train or small[-1:]

    # ---- runs ------------------------------------------------------------------------------------------------------

    def call(self, model: Any, batch: Batch | None = None) -> Any:
        batch = self.batch if batch is None else batch
        return model(**batch) if isinstance(batch, dict) else model(*batch)

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> dict[str, Tensor]:
        """Floating tensors that the model returns in evaluation mode, by position, caches left out."""
        with evaluating(model):
            seen = floats(self.call(model))
        return {f"output {i}": t.clone() for i, t in enumerate(seen)}

    def loss(self, model: nn.Module, batch: Batch | None = None) -> Tensor:
        return self.loss_of(self.call(model, batch))

    def loss_of(self, output: Any) -> Tensor:
        """``output.loss``, or the mean squared distance of the first floating output from a fixed pattern.

        From a pattern, since the plain mean of squares behind a last LayerNorm has no gradient.
        """
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is not None:
            return loss
        y = floats(output)[0]
        one = torch.arange(y[0].numel(), dtype=torch.float32, device=y.device).cos().view(y.shape[1:])
        return (y.float() - one).square().mean()

    def objective(self, model: nn.Module) -> Tensor:
        """The loss with the penalties of the injected methods."""
        loss, term = self.loss(model), penalty(model)
        return loss if term is None else loss + term

    def fit(self, model: nn.Module, steps: int) -> dict[str, Tensor]:
        """The loop of method.py in plain torch: AdamW with weight decay 0.1, the one batch.

        Returns:
            trained base parameter -> mask of the entries whose gradient the methods set to zero at every step.
        """
        torch.manual_seed(1)
        train_mode(model)
        held = find_record(model)
        assert held is not None
        methods, masked = held[1].methods, {}
        anew = {end for m in methods for end in m.restarts(model, Step(index=0, planned=steps))}
        optimizers = self._optimizers(model, methods)
        for index in range(steps):
            for method in methods:
                method.before_window(model, Step(index=index, optimizers=optimizers, planned=steps))
            (loss := self.objective(model)).backward()
            for method in methods:
                passes = Passes(loss=loss.detach(), again=lambda replay=False: self._again(model), average=lambda: None)
                method.after_backward(model, Step(index=index, optimizers=optimizers, planned=steps), passes)
            raw = {n: p.grad.clone() for n, p in base_parameters(model) if p.grad is not None}
            for method in methods:
                method.before_step(model, Step(index=index, optimizers=optimizers, planned=steps))
            for name, p in base_parameters(model):
                if name in raw and p.grad is not None and p.grad.shape == raw[name].shape:
                    zeroed = (p.grad == 0) & (raw[name] != 0)
                    masked[name] = zeroed & masked.get(name, torch.ones_like(zeroed))
            for o in optimizers:
                o.step()
                o.zero_grad()
            for method in methods:
                method.after_step(model, Step(index=index + 1, optimizers=optimizers, planned=steps))
            if index + 1 in anew:
                optimizers = self._optimizers(model, methods)
        for method in methods:
            method.finish(model)
        return masked

    def _again(self, model: nn.Module) -> Tensor:
        model.zero_grad()
        with torch.enable_grad():
            (loss := self.objective(model)).backward()
        return loss.detach()

    def _optimizers(self, model: nn.Module, methods: Sequence[Method]) -> list[Optimizer]:
        trained = [p for p in model.parameters() if p.requires_grad]
        made: list[Optimizer] = [AdamW(trained, 1e-2, weight_decay=0.1)]
        for method in methods:
            optim.regroup(made, [], method, model)
        for method in methods:
            made = [method.wrap_optimizer(o, model) for o in made]
        return made

    def load_methods(self) -> list[Method] | None:
        """What ``lightning_peft.load`` must be given: nothing where the folder's entry points tell."""
        registered = all(registry.name_of(type(m)) for m in self._methods)
        return None if registered else self.methods()


def train_mode(model: nn.Module) -> None:
    """Training mode, but for frozen batch norms: their statistics are part of the base, as under the callback."""
    model.train()
    for _, module in modules(model):
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters(recurse=False)):
            module.eval()
