"""Weights that train in full through an optimizer that sees a low-rank projection of their gradients alone.

From ``enter``, before clipping, to the end of the optimizer's step a small float32 proxy with the gradient
R = P^T G Q^T stands in the user's optimizer for each weight, which has no gradient then and is passed over. Whatever
the optimizer does with the proxy is projected back and added to the weight. Moments are R's; they stay in the
optimizer's state under the weight, the projector beside them as plain tensors, so its own state dict holds everything.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning_peft_plugins.lifecycle.projectors import OURS, State, back, project, wide
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import ASGD, LBFGS, SGD, Adadelta, Adagrad, Adam, Adamax, NAdam, Optimizer, RAdam, RMSprop, SparseAdam

from lightning_peft import Method, Step, find, hosts, unfreeze
from lightning_peft.inject import find_record

# Their weight_decay joins the gradient unless a group says otherwise (AdamW); they look at nothing else of a weight.
BY_GRADIENT = (SGD, Adam, NAdam, RAdam, Adamax, Adagrad, Adadelta, RMSprop)
Refresh = Callable[[Tensor, State], object]
Transform = Callable[[Tensor, State], Tensor]


class Weight:
    """One weight that is projected, seen as an (out, in) matrix."""

    def __init__(self, name: str, host: Any) -> None:
        self.name, self.host, self.parameter = name, host, hosts.stored(host)
        self.ours: State = {}  # what the optimizer is not shown, while it steps
        self.proxy: nn.Parameter | None = None
        self.start: Tensor | None = None  # the proxy's value before the step; None for zero

    def matrix(self, t: Tensor) -> Tensor:
        return hosts.as_matrix(self.host, t)


class Projected:
    """The weights of one method in one optimizer: ``optimizer.projected[name]``."""

    def __init__(self, weights: list[Weight], scale: float) -> None:
        self.weights, self.scale = weights, scale
        self.groups: list[tuple[dict[str, Any], float]] = []  # (a group of proxies, its weights' weight_decay)

    def swap_in(self, optimizer: Optimizer) -> None:
        """Add groups of proxies without weight decay, and give these the state of their weights."""
        proxies = {w.parameter: w.proxy for w in self.weights if w.proxy is not None}
        for group in list(optimizer.param_groups):
            if mine := [proxies[p] for p in group["params"] if p in proxies]:
                self.groups.append(({**group, "params": mine, "weight_decay": 0.0}, group.get("weight_decay", 0.0)))
                optimizer.param_groups.append(self.groups[-1][0])
        for weight in self.weights:
            if weight.proxy is not None:
                state = optimizer.state.pop(weight.parameter, {})
                weight.ours = {k: state.pop(k) for k in _ours(state)}
                if state:  # an empty one is what optimizers know a fresh parameter by
                    optimizer.state[weight.proxy] = state

    def swap_out(self, optimizer: Optimizer) -> None:
        """Take the proxies out, and give their state back to the weights."""
        own = [id(g) for g, _ in self.groups]
        optimizer.param_groups[:] = [g for g in optimizer.param_groups if id(g) not in own]
        self.groups = []
        for weight in self.weights:
            if weight.proxy is not None:
                state = optimizer.state.pop(weight.proxy, {}) | weight.ours
                if state:
                    optimizer.state[weight.parameter] = state
                weight.proxy, weight.start, weight.ours = None, None, {}


def targets(method: Any, model: nn.Module) -> list[tuple[str, Any]]:
    """(name, layer) of every weight that the method projects; of tied ones the first.

    A role leaves out what trains in full, but what trains because of the method itself is to be found again.
    """
    held = find_record(model)
    others = set(held[1].train) if held else set()
    own = [p for n, p in model.named_parameters() if held and p.requires_grad and n not in others]
    for p in own:
        p.requires_grad_(False)
    try:
        found = find(model, method.targets, method.traits.hosts, exclude=method.exclude, layers=method.layers)
    finally:
        for p in own:
            p.requires_grad_(True)
    first = {id(hosts.stored(host)): (name, host) for name, host in reversed(found)}
    return [first[i] for i in dict.fromkeys(id(hosts.stored(host)) for _, host in found)]


def train(method: Any, model: nn.Module) -> list[tuple[str, Any]]:
    """Let the targets' weights train, and what ``rest`` names; returns the targets."""
    found = targets(method, model)
    if wide := [n for n, host in found if min(hosts.shape(host)) <= method.r]:
        warnings.warn(f"{method.name}: r={method.r} saves nothing on {wide[0]!r} ({len(wide)} such)", stacklevel=3)
    rest = [n for n, _ in find(model, method.rest, nn.Parameter)] if method.rest else []
    unfreeze(model, list(dict.fromkeys([*(f"{n}.weight" for n, _ in found), *rest])), method.name)
    return found


def claim(method: Any, optimizer: Optimizer, model: nn.Module) -> Optimizer:
    """Let ``optimizer`` step those of the method's weights that it holds by proxy.

    Raises:
        ValueError: an optimizer or a strategy that cannot.
    """
    held = {p for g in optimizer.param_groups for p in g["params"]}
    weights = [w for w in (Weight(n, host) for n, host in targets(method, model)) if w.parameter in held]
    if isinstance(optimizer, LBFGS | SparseAdam | ASGD):
        raise ValueError(
            f"{method.name} steps a projection of each weight, and {type(optimizer).__name__} needs the weight itself: "
            "use another optimizer, such as torch.optim.AdamW or SGD"
        )
    if sharded := next((w.name for w in weights if isinstance(w.parameter, DTensor)), None):
        raise ValueError(
            f"{method.name} projects whole gradients, and ModelParallelStrategy shards that of {sharded!r}: use one "
            "device or strategy='ddp'"
        )
    projected = vars(optimizer).setdefault("projected", {})[method.name] = Projected(weights, method.scale)
    optimizer.register_step_post_hook(functools.partial(_after_step, projected))
    optimizer.register_load_state_dict_pre_hook(functools.partial(_before_load, projected))
    optimizer.register_load_state_dict_post_hook(functools.partial(_after_load, projected))
    return optimizer


@torch.no_grad()
def enter(method: Method, step: Step, refresh: Refresh, transform: Transform = lambda R, state: R) -> None:
    """Put proxies with the projected gradients in the optimizers, until these have stepped.

    Args:
        method: whose weights.
        step: where the fit stands.
        refresh: gets a weight's (out, in) gradient and its state, to set a new projector there where it is time.
        transform: of the projected gradient, given the state.
    """
    for optimizer in step.optimizers:
        projected: Projected | None = getattr(optimizer, "projected", {}).get(method.name)
        if projected is None:
            continue
        projected.swap_out(optimizer)  # where a loss scaler skipped the step before
        group_of = {p: g for g in optimizer.param_groups for p in g["params"]}
        for weight in projected.weights:
            if weight.parameter.grad is not None:
                _stand_in(weight, optimizer, group_of[weight.parameter], refresh, transform)
        projected.swap_in(optimizer)


def _stand_in(
    weight: Weight, optimizer: Optimizer, group: dict[str, Any], refresh: Refresh, transform: Transform
) -> None:
    p, state = weight.parameter, optimizer.state[weight.parameter]
    grad, W = wide(weight.matrix(p.grad)), wide(weight.matrix(p))
    if decay := group.get("weight_decay", 0.0) * _decays_by_gradient(optimizer, group):
        grad = grad.add(W, alpha=-decay if group.get("maximize") else decay)
    early = [k for k, v in state.items() if isinstance(v, Tensor) and v.shape == p.shape] if not _ours(state) else []
    refresh(grad, state)
    R = project(grad, state)
    state.update({k: R.new_full(R.shape, state[k].flatten()[0].item()) for k in early})  # Adagrad fills its at once
    if not isinstance(optimizer, BY_GRADIENT):  # Adafactor, for one, steps by the weight's size
        weight.start = project(W, state)
    weight.proxy = nn.Parameter(torch.zeros_like(R) if weight.start is None else weight.start.clone())
    weight.proxy.grad = transform(R, state)
    p.grad = None


@torch.no_grad()
def _after_step(projected: Projected, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    factor = {
        p: 1 - group["lr"] * decay
        for group, decay in projected.groups
        for p in group["params"]
        if not _decays_by_gradient(optimizer, group)
    }
    for weight in projected.weights:
        if weight.proxy is not None:
            change = weight.proxy if weight.start is None else weight.proxy - weight.start
            W = weight.matrix(weight.parameter)
            decayed = wide(W) * factor.get(weight.proxy, 1.0)  # by lr * weight_decay, whatever the scale
            W.copy_(decayed + projected.scale * back(change, weight.ours))
            told = {k.removeprefix(OURS): v for k, v in weight.ours.items() if v.dim() == 0}
            weight.parameter.galore = told  # type: ignore[attr-defined]  # for report, which sees no optimizer
    projected.swap_out(optimizer)


def _before_load(projected: Projected, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """torch restores moments in the dtype of the parameter they belong to: that of a proxy, not of the weight."""
    projected.swap_out(optimizer)
    for weight in projected.weights:
        optimizer.state.pop(weight.parameter, None)
        weight.proxy = nn.Parameter(wide(weight.parameter.detach().flatten()[:0]))
    _rename(optimizer, {w.parameter: w.proxy for w in projected.weights})


def _after_load(projected: Projected, optimizer: Optimizer) -> None:
    _rename(optimizer, {w.proxy: w.parameter for w in projected.weights})
    projected.swap_out(optimizer)


def _rename(optimizer: Optimizer, new: dict[Any, Any]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new.get(p, p) for p in group["params"]]


def _ours(state: State) -> list[str]:
    return [k for k in state if k.startswith(OURS)]


def _decays_by_gradient(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    return isinstance(optimizer, BY_GRADIENT) and not group.get("decoupled_weight_decay", False)


def told(method: Any, model: nn.Module, **quantities: str) -> dict[str, dict[str, float]]:
    """Quantity -> layer -> what its state holds under a name, for a report; nothing before the first step."""
    seen = {n: getattr(hosts.stored(host), "galore", {}) for n, host in targets(method, model)}
    found = {q: {n: float(values[key]) for n, values in seen.items() if key in values} for q, key in quantities.items()}
    return {q: values for q, values in found.items() if values}
