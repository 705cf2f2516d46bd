"""Tensors of a model by kind, and comparisons that say what was measured and what was allowed."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves  # private: flattens what models return

from lightning_peft.attach import adapters, modules
from lightning_peft.config import trained_names


class Failed(AssertionError):
    """A property does not hold; says what was measured and what was allowed."""


class Skipped(Exception):  # noqa: N818 - an outcome, not an error
    """A property that does not apply here; says why."""


def unless(reason: Callable[[Any], str]) -> Callable[[Any], Any]:
    """Mark a check that does not apply where ``reason`` gives one for a case, which it does without running it."""

    def mark(check: Any) -> Any:
        check.unless = reason
        return check

    return mark


def require(holds: bool, what: str, measured: object, allowed: object) -> None:
    if not holds:
        raise Failed(f"{what}: measured {measured}, allowed {allowed}")


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


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what a file must hold: adapters' state and trained base parameters."""
    keep = trained_names(model)
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


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Largest difference, relative to the larger of 1 and the largest value; infinite where names or shapes differ."""
    if [(n, t.shape) for n, t in a.items()] != [(n, t.shape) for n, t in b.items()]:
        return float("inf")
    pairs = [(x.detach().float(), b[n].detach().float()) for n, x in a.items() if x.numel()]
    worst = torch.tensor([0.0, *(float((x - y).abs().max()) for x, y in pairs)]).max()  # unlike Python's, keeps NaN
    return float(worst) / max([1.0, *(float(x.abs().max()) for x, _ in pairs)])


def require_close(what: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float) -> None:
    far = distance(a, b)
    require(far <= tolerance, what, f"a difference of {far:.3g}", f"{tolerance:.3g}")  # also fails for NaN


def require_finite(what: str, tensors: Mapping[str, Tensor]) -> None:
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    require(not bad, what, f"{len(bad)} tensors, first {bad[:1]}", "no inf or NaN")
