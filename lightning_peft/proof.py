"""Prove on a held batch that a merge changes nothing: what the model returns before and after it."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map  # private: flattens what models take and return

from lightning_peft import hosts
from lightning_peft.attach import adapters, evaluating, is_adapted
from lightning_peft.merge import Merged, merge


@dataclass(frozen=True)
class Call:
    """One call of a module with a held batch: what ``prove`` repeats."""

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextlib.contextmanager
def captured(model: nn.Module) -> Iterator[list[Call]]:
    """Collect the calls of the outermost modules on the way to an adapter, inputs detached and on the CPU.

    Where there is no adapter at all: on the way to a base parameter that trains. A LightningModule itself is left out:
    strategies call it with a batch in place of its forward's arguments.
    """
    calls: list[Call] = []
    depth = 0

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal depth
        depth += 1
        if depth == 1:
            held_args, held_kwargs = tree_map(_held, (args, kwargs))
            calls.append(Call(name, held_args, held_kwargs))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1

    handles = []
    adapted = any(is_adapted(m) for m in model.modules())
    for name, module in model.named_modules():
        inside = (is_adapted(m) if adapted else _trains(m) for m in module.modules())
        if any(inside) and not hasattr(module, "training_step"):
            pre = functools.partial(before, name)
            handles.append(module.register_forward_pre_hook(pre, with_kwargs=True))
            handles.append(module.register_forward_hook(after, always_call=True))
    try:
        yield calls
    finally:
        for h in handles:
            h.remove()


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


def _held(x: Any) -> Any:
    return x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else x


@torch.no_grad()
def _outputs(model: nn.Module, calls: list[Call]) -> list[Tensor]:
    """Floating tensors, in float32 on the CPU, that the calls return in evaluation mode."""
    device, seen = next(model.parameters()).device, []
    with evaluating(model):
        for c in calls:
            args, kwargs = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, (c.args, c.kwargs))
            output = model.get_submodule(c.module)(*args, **kwargs)
            seen += [t for t in tree_leaves(_plain(output)) if isinstance(t, Tensor) and t.is_floating_point()]
    return [t.to("cpu", torch.float32, copy=True) for t in seen]


def _plain(output: Any) -> Any:
    """transformers' ModelOutput is a dict; caches in it hold no result of their own."""
    return {k: v for k, v in output.items() if k != "past_key_values"} if hasattr(output, "items") else output


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Proof:
    """How far the merged model's outputs lie from the unmerged one's on a held batch.

    Args:
        largest: largest absolute difference of any output element.
        relative: the same, divided by the largest absolute output.
        outputs: number of output tensors compared.
        hosts: number of layers merged.
        biases: names of the layers that had no bias and now have one.
    """

    largest: float
    relative: float
    outputs: int
    hosts: int
    biases: tuple[str, ...] = ()


def prove(
    model: nn.Module, calls: list[Call], tolerance: float | None = None, *, keep: bool = True
) -> tuple[Merged, Proof]:
    """Merge, compare what the calls return before and after, and undo the merge past the tolerance.

    Args:
        model: with adapters attached.
        calls: of a held batch, from ``captured``.
        tolerance: allowed largest difference relative to the largest output; by the weights' precision when None.
        keep: as for ``merge``.

    Raises:
        ValueError: the outputs differ by more than the tolerance (the model is left unmerged), or there is no call.
    """
    if not calls:
        raise ValueError("the held batch called no module that holds what was trained, so the merge cannot be proven")
    if tolerance is None:
        dtypes = (hosts.stored(host).dtype for _, host, a in adapters(model) if not a.watches)
        floats = [d for d in dtypes if d.is_floating_point]
        tolerance = max((TOLERANCE[d] for d in floats), default=TOLERANCE[torch.bfloat16])
    before = _outputs(model, calls)
    merged = merge(model)
    after = _outputs(model, calls)
    largest = max((float((a - b).abs().max()) for a, b in zip(before, after, strict=True) if a.numel()), default=0.0)
    scale = max((float(a.abs().max()) for a in before if a.numel()), default=0.0)
    proof = Proof(largest, largest / max(scale, 1e-12), len(before), len(merged.folded), tuple(merged.biases))
    if not proof.relative <= tolerance:  # also when it is NaN
        merged.undo()
        raise ValueError(
            f"merging changes the outputs by {proof.largest:.3g} ({proof.relative:.3g} of the largest output), past "
            f"the tolerance of {tolerance:.3g}; the model was left unmerged"
        )
    if not keep:
        merged.folded.clear()
    return merged, proof
