"""What a conformance check works on: the untouched base, injected and trained copies of it, comparisons with numbers."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import AdamW, Optimizer
from torch.utils._pytree import tree_leaves, tree_map  # private: flattens what models take and return

from lightning_peft import io, optim, registry
from lightning_peft.attach import adapters, modules
from lightning_peft.inject import find_record, inject, pattern_selects, penalty
from lightning_peft.method import Method, Step

Batch = dict[str, Any] | tuple[Any, ...]
Build = Callable[[], nn.Module]
M = TypeVar("M", bound=nn.Module)


class Failed(AssertionError):
    """A property does not hold; says what was measured and what was allowed."""


class Skipped(Exception):  # noqa: N818 - an outcome, not an error
    """A property that does not apply here; says why."""


def require(holds: bool, what: str, measured: object, allowed: object) -> None:
    if not holds:
        raise Failed(f"{what}: measured {measured}, allowed {allowed}")


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

    def injected(self, *others: Method, first: bool = False, train: Sequence[str] | None = None, seed: int = 0) -> Any:
        """A copy of the base with the methods; ``others`` injected after them, or before with ``first``."""
        model, mine = self.base(), self.methods()
        torch.manual_seed(seed)
        stats = {m.name: m.calibrate(model, [self.batch] * 2, lambda b: self.loss(model, b)) for m in calibrating(mine)}
        model.zero_grad()
        methods = [*others, *mine] if first else [*mine, *others]
        inject(model, methods, train=self.train if train is None else train, stats=stats)
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
    def outputs(self, model: M, batch: Batch | None = None) -> list[Tensor]:
        """Floating tensors that the model returns in evaluation mode, caches left out."""
        modes = {m: m.training for m in model.modules()}
        model.eval()
        seen = floats(self.call(model, batch))
        for m, mode in modes.items():
            m.training = mode
        return [t.clone() for t in seen]

    def loss(self, model: nn.Module, batch: Batch | None = None) -> Tensor:
        """``output.loss``, or the mean squared distance of the first floating output from a fixed pattern.

        From a pattern, since the plain mean of squares behind a last LayerNorm has no gradient.
        """
        output = self.call(model, batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is not None:
            return loss
        y = floats(output)[0]
        one = torch.arange(y[0].numel(), dtype=torch.float32, device=y.device).cos().view(y.shape[1:])
        return (y.float() - one).square().mean()

    def fit(self, model: M, steps: int) -> dict[str, Tensor]:
        """The loop of method.py in plain torch: AdamW with weight decay 0.1, the one batch.

        Returns:
            trained base parameter -> mask of the entries whose gradient the methods set to zero at every step.
        """
        torch.manual_seed(1)
        train_mode(model)
        held = find_record(model)
        assert held is not None
        methods, masked = held[1].methods, {}
        optimizers: list[Optimizer] = [AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)]
        for method in methods:
            optim.regroup(optimizers, [], method, model)
        for method in methods:
            optimizers = [method.wrap_optimizer(o, model) for o in optimizers]
        for index in range(steps):
            loss, term = self.loss(model), penalty(model)
            (loss if term is None else loss + term).backward()
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
        for method in methods:
            method.finish(model)
        return masked

    def load_methods(self) -> list[Method] | None:
        """What ``lightning_peft.load`` must be given: nothing where the folder's entry points tell."""
        registered = all(registry.name_of(type(m)) for m in self._methods)
        return None if registered else self.methods()


def calibrating(methods: Iterable[Method]) -> list[Method]:
    return [m for m in methods if type(m).calibrate is not Method.calibrate]


def train_mode(model: nn.Module) -> None:
    """Training mode, but for frozen batch norms: their statistics are part of the base, as under the callback."""
    model.train()
    for _, module in modules(model):
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters(recurse=False)):
            module.eval()


# ---- tensors -------------------------------------------------------------------------------------------------------


def floats(output: Any) -> list[Tensor]:
    """Floating tensors in what a model returned; transformers' caches hold no result of their own."""
    if isinstance(output, Mapping):
        output = {k: v for k, v in output.items() if k != "past_key_values"}
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of the base, adapters left out."""
    return ((f"{m}.{n}" if m else n, p) for m, mod in modules(model) for n, p in mod.named_parameters(recurse=False))


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the base, also those that no state dict holds."""
    buffers = ((f"{m}.{n}" if m else n, b) for m, mod in modules(model) for n, b in mod.named_buffers(recurse=False))
    return {n: t.detach() for n, t in itertools.chain(base_parameters(model), buffers)}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the adapters, by state-dict key."""
    out = {}
    for fqn, host, adapter in adapters(model):
        tag = next(t for t, a in host.adapters.items() if a is adapter)
        prefix = f"{fqn}.adapters.{tag}." if fqn else f"adapters.{tag}."
        out |= {prefix + n: t for n, t in itertools.chain(adapter.named_parameters(), adapter.named_buffers())}
    return out


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in tensors.items()}


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what a file must hold: adapters' state and trained base parameters."""
    keep = io.trained_names(model)
    return snapshot({k: v for k, v in model.state_dict().items() if k in keep})


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, dtype and shape included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*bits)


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that only one side has or whose bits differ."""
    return [n for n in {**a, **b} if n not in a or n not in b or not same(a[n], b[n])]


def require_same(what: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    names = differing(a, b)
    first = f", first {names[0]!r}" if names else ""
    require(not names, what, f"{len(names)} of {len({**a, **b})} tensors that differ{first}", "none")


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest difference, relative to the larger of 1 and the largest value; infinite where shapes differ."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    pairs = [(x.float(), y.float()) for x, y in zip(a, b, strict=True) if x.numel()]
    worst = torch.tensor([0.0, *(float((x - y).abs().max()) for x, y in pairs)]).max()  # unlike Python's, keeps NaN
    return float(worst) / max([1.0, *(float(x.abs().max()) for x, _ in pairs)])


def require_close(what: str, a: Sequence[Tensor], b: Sequence[Tensor], tolerance: float) -> None:
    far = distance(a, b)
    require(far <= tolerance, what, f"a difference of {far:.3g}", f"{tolerance:.3g}")  # also fails for NaN


def require_finite(what: str, tensors: Mapping[str, Tensor]) -> None:
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    require(not bad, what, f"{len(bad)} tensors, first {bad[:1]}", "no inf or NaN")
