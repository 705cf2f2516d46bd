"""Fold adapters into the base weights, undo it from a kept copy, and prove on a held batch that nothing changed."""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map  # private: flattens what models take and return

from lightning_peft import hosts, quant
from lightning_peft.adapter import Adapter, WeightAdapter
from lightning_peft.attach import adapters, attach, attached, detach, is_adapted
from lightning_peft.inject import RECORD, Record, find_record


@dataclass
class Merged:
    """What a merge changed: enough to undo it bit for bit.

    ``record`` is (where, what ``inject`` did);
    ``folded`` lists (host name, host, its adapters by tag, copies on the CPU of its parameters that were written; the
    copies are None for a quantised host, which was replaced by a plain layer as a whole).
    """

    model: nn.Module
    record: tuple[str, Record] | None = None
    folded: list[tuple[str, Any, dict[str, Adapter], dict[str, Tensor] | None]] = field(default_factory=list)

    def undo(self) -> None:
        """Put the weights and the adapters back as they were before the merge."""
        for name, host, held, copies in self.folded:
            if copies is None:
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, host)
            else:
                with torch.no_grad():
                    for key, copy in copies.items():
                        getattr(host, key).copy_(copy)
            for tag, adapter in held.items():
                attach(host, tag, adapter, next((p.dtype for p in adapter.parameters()), torch.float32))
        self.folded.clear()
        if self.record is not None:
            setattr(self.model.get_submodule(self.record[0]), RECORD, self.record[1])


@torch.no_grad()
def merge(model: nn.Module, *, keep: bool = True) -> Merged:
    """Fold every adapter into its host's weight, in float32 with one cast at the end, and detach it.

    A quantised host becomes a plain linear layer that holds the dequantised, merged weight. Of methods that train base
    parameters there is nothing to fold: these hold what was learned, and the model is a plain one afterwards.

    Args:
        model: with adapters attached.
        keep: keep a copy of the weights on the CPU, so that ``.undo()`` works; without it memory is saved.

    Raises:
        ValueError: nothing injected, a method that cannot merge, or a weight that another module shares.
    """
    targets: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if is_adapted(m)]
    if not targets and find_record(model) is None:
        raise ValueError("nothing to merge: no adapter is attached to this model, and no method trains its weights")
    _refuse(model, targets)
    done = Merged(model, find_record(model))
    if done.record is not None:
        delattr(model.get_submodule(done.record[0]), RECORD)  # what is merged is a plain model again
    for name, host in targets:
        held = attached(host)
        matrix, bias = _folded(host, held)
        for tag in held:
            detach(host, tag)
        if quant.kind(host):
            plain = quant.replace_dequantized(model, name, matrix)
            if bias is not None:  # a parameter of its own: the quantised layer keeps the old one for undo
                plain.bias = nn.Parameter(bias.to(plain.weight), host.bias.requires_grad)
            done.folded.append((name, host, held, None))
        else:
            keys = ("weight",) if bias is None else ("weight", "bias")
            copies = {k: getattr(host, k).detach().to("cpu", copy=True) for k in keys} if keep else None
            hosts.write(host, matrix)
            if bias is not None:
                host.bias.copy_(bias)
            if copies is not None:
                done.folded.append((name, host, held, copies))
    return done


def _folded(host: Any, held: dict[str, Adapter]) -> tuple[Tensor, Tensor | None]:
    """The merged (out, in) matrix, and the merged bias where an adapter changes it, in float32 or better."""
    matrix, bias = hosts.read(host), host.bias if _changes_bias(host) else None
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))  # a float64 base keeps its precision
    bias = bias if bias is None else bias.to(torch.promote_types(bias.dtype, torch.float32))
    for adapter in held.values():
        assert isinstance(adapter, WeightAdapter)  # _refuse saw to it
        matrix, bias = adapter.weight(matrix), bias if bias is None else adapter.bias(bias)
    return matrix, bias


def _changes_bias(host: Any) -> bool:
    weighing = [a for a in attached(host).values() if isinstance(a, WeightAdapter)]
    changing = any(type(a).bias is not WeightAdapter.bias for a in weighing)
    return changing and getattr(host, "bias", None) is not None


def _refuse(model: nn.Module, targets: list[tuple[str, Any]]) -> None:
    record = find_record(model)
    if record and (stuck := [m.name for m in record[1].methods if not m.traits.merge and any(m.adapters(model))]):
        raise ValueError(f"{', '.join(stuck)} cannot be merged: what it adds is no change of a weight")
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, host in targets:
        for tag, adapter in attached(host).items():
            if not isinstance(adapter, WeightAdapter):
                raise ValueError(f"adapter {tag!r} on {name!r} is a {type(adapter).__name__}, which cannot be merged")
        written = {"weight": host.weight} | ({"bias": host.bias} if _changes_bias(host) else {})
        for key, parameter in written.items():
            if owners[id(parameter)] > 1:
                raise ValueError(
                    f"the {key} of {name!r} is tied to another module's, so merging would change both: "
                    f"untie them first, or exclude {name!r} from the targets"
                )


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
    modes = {m: m.training for m in model.modules()}
    device = next(model.parameters()).device
    model.eval()
    try:
        seen = []
        for c in calls:
            args, kwargs = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, (c.args, c.kwargs))
            output = model.get_submodule(c.module)(*args, **kwargs)
            seen += [t for t in tree_leaves(_plain(output)) if isinstance(t, Tensor) and t.is_floating_point()]
        return [t.to("cpu", torch.float32, copy=True) for t in seen]
    finally:
        for m, mode in modes.items():
            m.training = mode


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
    """

    largest: float
    relative: float
    outputs: int
    hosts: int


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
        floats = [host.weight.dtype for _, host, _ in adapters(model) if host.weight.is_floating_point()]
        tolerance = max((TOLERANCE[d] for d in floats), default=TOLERANCE[torch.bfloat16])
    before = _outputs(model, calls)
    merged = merge(model)
    after = _outputs(model, calls)
    largest = max((float((a - b).abs().max()) for a, b in zip(before, after, strict=True) if a.numel()), default=0.0)
    scale = max((float(a.abs().max()) for a in before if a.numel()), default=0.0)
    proof = Proof(largest, largest / max(scale, 1e-12), len(before), len(merged.folded))
    if not proof.relative <= tolerance:  # also when it is NaN
        merged.undo()
        raise ValueError(
            f"merging changes the outputs by {proof.largest:.3g} ({proof.relative:.3g} of the largest output), past "
            f"the tolerance of {tolerance:.3g}; the model was left unmerged"
        )
    if not keep:
        merged.folded.clear()
    return merged, proof
