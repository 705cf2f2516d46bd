"""Small methods, one a verb of the contract, for tests of the host that runs them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import Adapter, Method, Step, Traits, WeightAdapter, attach, find, hosts, resize

TRAITS = Traits(family="reparameterized", merge=True, identity_start=False)
EVENTS: list[Any] = []  # what Recorder and the modules of the tests note down, in order


class Product(WeightAdapter):
    """W + B A with both factors drawn, so that every test moves away from zero at once."""

    axes = {"A": ("rank", "in"), "B": ("out", "rank")}

    def __init__(self, host: nn.Module, r: int) -> None:
        super().__init__()
        out, fan_in = hosts.shape(host)
        self.A = nn.Parameter(torch.empty(r, fan_in))
        self.B = nn.Parameter(torch.empty(out, r))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.A, std=0.3)
        nn.init.normal_(self.B, std=0.3)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.B @ self.A


class Lie(Product):
    """Its forward and its weight disagree."""

    def weight(self, W: Tensor) -> Tensor:
        return W + 2 * self.B @ self.A

    def forward(self, base: Any, x: Tensor) -> Tensor:
        return base(x) + x @ self.A.T @ self.B.T


def products(method: Method, model: nn.Module, r: int, kind: type[Product] = Product) -> None:
    for _, host in find(model, ("all-linear",)):
        attach(host, method.name, kind(host, r))


def squares(method: Method, model: nn.Module, weight: float) -> Tensor:
    return weight * sum(
        (p.square().sum() for _, _, a in method.adapters(model) for p in a.parameters()), torch.zeros(())
    )


@dataclass(frozen=True, kw_only=True)
class Plain(Method):
    traits = TRAITS
    name: str = "product"
    r: int = 2

    def inject(self, model: nn.Module, stats: Any = None) -> None:
        products(self, model, self.r)


@dataclass(frozen=True, kw_only=True)
class Lying(Method):
    traits = TRAITS
    name: str = "product"

    def inject(self, model: nn.Module, stats: Any = None) -> None:
        products(self, model, 2, Lie)


@dataclass(frozen=True, kw_only=True)
class Penalised(Method):
    traits = TRAITS
    name: str = "product"
    weight: float = 0.05

    def inject(self, model: nn.Module, stats: Any = None) -> None:
        products(self, model, 2)

    def penalty(self, model: nn.Module) -> Tensor | None:
        return squares(self, model, self.weight) if self.weight else None


@dataclass(frozen=True, kw_only=True)
class Recorder(Method):
    """Notes every call of a verb, with the optimizer step and the first gradient or weight it saw."""

    traits = TRAITS
    name: str = "product"

    def inject(self, model: nn.Module, stats: Any = None) -> None:
        EVENTS.append(f"inject {stats}")
        products(self, model, 2)

    def beside(self, model: nn.Module, others: Sequence[Method]) -> None:
        EVENTS.append(f"beside {len(others)}")

    def calibrate(self, model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> Any:
        EVENTS.append("calibrate")
        return len(list(batches))

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        EVENTS.append("param_groups")

    def wrap_optimizer(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        EVENTS.append("wrap_optimizer")
        return optimizer

    def before_window(self, model: nn.Module, step: Step) -> None:
        EVENTS.append(f"before_window {step.index}/{step.total}")

    def penalty(self, model: nn.Module) -> Tensor | None:
        EVENTS.append("penalty")

    def before_step(self, model: nn.Module, step: Step) -> None:
        EVENTS.append(f"before_step {step.index}/{step.total}")

    def after_step(self, model: nn.Module, step: Step) -> None:
        EVENTS.append(f"after_step {step.index}/{step.total}")

    def finish(self, model: nn.Module) -> None:
        EVENTS.append("finish")


@dataclass(frozen=True, kw_only=True)
class Watcher(Method):
    """Notes gradients before and weights after each step."""

    traits = TRAITS
    name: str = "product"

    def inject(self, model: nn.Module, stats: Any = None) -> None:
        products(self, model, 2)

    def before_step(self, model: nn.Module, step: Step) -> None:
        EVENTS.append([p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None])

    def after_step(self, model: nn.Module, step: Step) -> None:
        EVENTS.append([p.detach().clone() for p in model.parameters() if p.requires_grad])


@dataclass(frozen=True, kw_only=True)
class Halving(Method):
    """Halves every gradient before the step: what clipping and the optimizer see must be halved."""

    traits = TRAITS
    name: str = "product"

    def inject(self, model: nn.Module, stats: Any = None) -> None:
        products(self, model, 2)

    def before_step(self, model: nn.Module, step: Step) -> None:
        for _, _, adapter in self.adapters(model):
            for p in adapter.parameters():
                assert p.grad is not None
                p.grad.mul_(0.5)


@dataclass(frozen=True, kw_only=True)
class Calibrated(Method):
    """Scales its first factor by the gradient that data gives the host's weight."""

    traits = TRAITS
    name: str = "product"

    def calibrate(self, model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> Any:
        targets = find(model, ("all-linear",))
        total = dict.fromkeys((n for n, _ in targets), 0.0)
        for _, host in targets:
            host.weight.requires_grad_(True)
        for batch in batches:
            EVENTS.append(batch)
            model.zero_grad()
            loss(batch).backward()
            for name, host in targets:
                total[name] += float(host.weight.grad.norm())
        return {n: torch.tensor(v) for n, v in total.items()}

    def inject(self, model: nn.Module, stats: Any = None) -> None:
        products(self, model, 2)
        for name, _, adapter in self.adapters(model):
            assert isinstance(adapter, Product)
            with torch.no_grad():
                adapter.A.mul_(stats[name] if stats else 0.0)


@dataclass(frozen=True, kw_only=True)
class Grouped(Method):
    """Options of its own for the second factors."""

    traits = TRAITS
    name: str = "product"
    options: tuple[tuple[str, float], ...] = (("lr_scale", 4.0), ("weight_decay", 0.0))

    def inject(self, model: nn.Module, stats: Any = None) -> None:
        products(self, model, 2)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        return [{"params": [a.B for _, _, a in self.adapters(model)]} | dict(self.options)]


class Averaging(Optimizer):
    """Around another optimizer: moves to the mean of the last two iterates. Shares groups and state with it."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups, self.state = inner.param_groups, inner.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        before = {p: p.clone() for g in self.param_groups for p in g["params"] if p.requires_grad}
        loss = self.inner.step(closure)
        for p, old in before.items():
            last = self.state[p].setdefault("last", old.clone())
            p.copy_((p + last) / 2)
            self.state[p]["last"] = p.clone()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state


@dataclass(frozen=True, kw_only=True)
class Wrapped(Method):
    traits = TRAITS
    name: str = "product"

    def inject(self, model: nn.Module, stats: Any = None) -> None:
        products(self, model, 2)

    def wrap_optimizer(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        return Averaging(optimizer)


def move_rank(adapter: Adapter, index: list[int], optimizers: Iterable[Optimizer]) -> None:
    """Keep the slots ``index``; what is -1 there starts from a new draw."""
    assert isinstance(adapter, Product)
    resize(adapter, "rank", torch.tensor(index, dtype=torch.long), optimizers)
    new = [i for i, old in enumerate(index) if old < 0]
    with torch.no_grad():
        adapter.A[new] = 0.3 * torch.randn(len(new), adapter.A.shape[1])


@dataclass(frozen=True, kw_only=True)
class Resizing(Method):
    """Changes the rank of every adapter at given optimizer steps: ``plan[step]`` is the index for ``resize``."""

    traits = TRAITS
    name: str = "product"
    r: int = 3
    plan: tuple[tuple[int, tuple[int, ...]], ...] = ((3, (2, 0)), (6, (0, -1, 1, -1)))

    def inject(self, model: nn.Module, stats: Any = None) -> None:
        products(self, model, self.r)

    def after_step(self, model: nn.Module, step: Step) -> None:
        for when, index in self.plan:
            if when == step.index:
                for _, _, adapter in self.adapters(model):
                    move_rank(adapter, list(index), step.optimizers)

    def report(self, model: nn.Module) -> dict[str, dict[str, float]]:
        held: dict[str, Any] = {name: a for name, _, a in self.adapters(model)}
        return {
            "rank": {name: len(a.A) for name, a in held.items()},
            "size": {name: float(a.A.abs().mean()) for name, a in held.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Handover(Method):
    """Trains the biases, one layer's until ``step`` and another's after it: as many values, other parameters."""

    traits = Traits(family="selective")
    name: str = "handover"
    layers: tuple[str, str] = ("net.0", "net.3")
    step: int = 2

    def inject(self, model: nn.Module, stats: Any = None) -> None:
        model.get_submodule(self.layers[0]).bias.requires_grad_(True)

    def after_step(self, model: nn.Module, step: Step) -> None:
        for layer, on in zip(self.layers, (step.index < self.step, step.index >= self.step), strict=True):
            model.get_submodule(layer).bias.requires_grad_(on)


@dataclass(frozen=True, kw_only=True)
class Rounding(Method):
    """Rounds its tensors to a coarse grid at the end of the fit."""

    traits = TRAITS
    name: str = "product"

    def inject(self, model: nn.Module, stats: Any = None) -> None:
        products(self, model, 2)

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        for _, _, adapter in self.adapters(model):
            for p in adapter.parameters():
                p.copy_((p * 8).round() / 8)
