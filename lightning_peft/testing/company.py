"""Properties of a method in company: a second method on the same layers, torch.compile, copies of the model."""

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import hosts
from lightning_peft.adapter import Adapter, Base, WeightAdapter
from lightning_peft.attach import adapters, attach
from lightning_peft.checks import fit_structure
from lightning_peft.config import describe
from lightning_peft.merge import merge
from lightning_peft.method import Method, Traits
from lightning_peft.testing.case import Case
from lightning_peft.testing.compare import (
    Failed,
    Skipped,
    differing,
    floats,
    gradients,
    require,
    require_close,
    require_same,
    snapshot,
    trained_tensors,
)


def check_deepcopy(case: Case) -> None:
    """A deep copy gives the same output, shares no memory with the original, and keeps what adapters share."""
    model = case.trained()
    other = copy.deepcopy(model)
    before = case.outputs(model)
    require_same("outputs of the copy", before, case.outputs(other))
    ours, theirs = _tensors(model), _tensors(other)
    memory = {t.data_ptr() for t in ours.values() if t.numel()}
    shared = [n for n, t in theirs.items() if t.numel() and t.data_ptr() in memory]
    require(not shared, "tensors that share memory with the copy's", f"{len(shared)}, first {shared[:1]}", "none")
    counts = [len({id(t) for t in ts.values()}) for ts in (ours, theirs)]
    require(counts[0] == counts[1], "distinct tensors of the copy", counts[1], counts[0])
    with torch.no_grad():
        for t in ours.values():
            if t.is_floating_point():
                t.add_(1.0)
    require_same("outputs of the copy after the original was changed", before, case.outputs(other))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    return dict(itertools.chain(*named))


def check_compile(case: Case) -> None:
    """Under torch.compile(fullgraph=True) outputs and gradients are the same. Traced and differentiated, not lowered.

    A base that does not compile alone is no fault of the method: skipped, with the reason.
    """
    model = case.trained().eval()
    expected = _through(case, model, model)
    try:
        got = _through(case, model, _compiled(model))
    except Exception as error:  # a graph break has no error class of its own
        _base_compiles(case)
        raise Failed(
            f"compiling: measured {type(error).__name__}: {str(error).splitlines()[0]}, allowed none"
        ) from error
    require_close("compiled against eager outputs and gradients", expected, got, 10 * case.tolerance)


def _compiled(model: nn.Module) -> Any:
    torch.compiler.reset()  # every case starts without the graphs of the ones before
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def _through(case: Case, model: nn.Module, runs: Any) -> dict[str, Tensor]:
    """Outputs and gradients of one call."""
    model.zero_grad()
    output = case.call(runs)
    case.loss_of(output).backward()
    return snapshot({str(i): t for i, t in enumerate(floats(output))} | gradients(model))


def _base_compiles(case: Case) -> None:
    try:
        case.call(_compiled(case.base().eval()))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise Skipped(f"the base alone does not compile as one graph: {type(error).__name__}: {reason}") from error


class _Gain(WeightAdapter):
    """W * (1 + g) with one number g."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.full((1,), gain))

    def weight(self, W: Tensor) -> Tensor:
        return W * (1 + self.g)


class _Shift(Adapter):
    """Adds one number to what the layer returns; no map on its weight."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.full((1,), shift))

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        y = base(*args, **kwargs)
        return y + self.s.to(y.dtype)


class _Through(Adapter):
    """Passes on what a layer returns, whatever it is."""

    watches = True

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class _Second(Method):
    """What stands next to the tested method on the same layers: on weights a gain, or a shift of the output."""

    traits = Traits(family="reparameterized", merge=True, hosts=("module",))
    name: str = "second_of_the_conformance_suite"
    on: tuple[str, ...]
    amount: float = 0.0
    maps: bool = True

    def inject(self, model: nn.Module, stats: Any = None) -> None:
        for name in self.on:
            host = model.get_submodule(name)
            beside = _Gain(self.amount) if self.maps else _Shift(self.amount)
            attach(host, self.name, beside if hosts.kind(host) else _Through())


def check_stacking(case: Case) -> None:
    """The method works with another one below or above it on the same layers: both are heard, trained and merged."""
    alone = case.trained()
    on = tuple(dict.fromkeys(n for n, _, _ in adapters(alone))) or _first_weight(alone)
    weighed = any(hosts.kind(alone.get_submodule(n)) for n in on)
    state, expected = trained_tensors(alone), case.outputs(alone)
    for below, maps in itertools.product((True, False), (True, False) if weighed else (True,)):
        where = f"a method {'below' if below else 'above'} it that {'scales the weight' if maps else 'shifts outputs'}"
        idle, model = (case.injected(_Second(on=on, amount=x, maps=maps), first=below) for x in (0.0, 0.5))
        for m in (idle, model):
            fit_structure(m, describe(alone), "the trained model")
            m.eval().load_state_dict(state, strict=False)
        require_close(f"outputs with {where} by nothing", expected, case.outputs(idle), case.tolerance)
        before = case.outputs(model)
        require(not weighed or bool(differing(expected, before)), f"outputs with {where}", "as without it", "others")
        case.objective(model).backward()
        lost = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        require(not lost, f"trainable tensors without a gradient, {where}", f"{len(lost)}, first {lost[:1]}", "none")
        if case.can("merge") and maps:
            merge(model)
            require_close(f"merged against unmerged, {where}", before, case.outputs(model), case.tolerance)


def _first_weight(model: nn.Module) -> tuple[str, ...]:
    weights = (n for n, m in model.named_modules() if hosts.kind(m) not in (None, "embedding"))  # T5's may be unused
    return tuple(weights)[:1]
