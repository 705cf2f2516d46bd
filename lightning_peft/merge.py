"""Fold adapters into the base weights, and undo it from a kept copy."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import hosts, quant, reads
from lightning_peft.adapter import Adapter, WeightAdapter, maps_of
from lightning_peft.attach import attach, attached, detach, is_adapted
from lightning_peft.inject import RECORD, Record, find_record


@dataclass
class Merged:
    """What a merge changed: enough to undo it bit for bit.

    ``record`` is (where, what ``inject`` did);
    ``folded`` lists (host name, host, its adapters by tag, copies on the CPU of its parameters that were written; the
    copies are None for a quantised host, which was replaced by a plain layer as a whole, and the copy of a bias is None
    where the merge made it); ``biases`` are the names of the hosts that got one.
    """

    model: nn.Module
    record: tuple[str, Record] | None = None
    folded: list[tuple[str, Any, dict[str, Adapter], dict[str, Tensor | None] | None]] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)

    def undo(self) -> None:
        """Put the weights and the adapters back as they were before the merge."""
        for name, host, held, copies in self.folded:
            if copies is None:
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, host)
            else:
                with torch.no_grad():
                    for key, copy in copies.items():
                        setattr(host, key, None) if copy is None else getattr(host, key).copy_(copy)
            for tag, adapter in held.items():
                attach(host, tag, adapter, next((p.dtype for p in adapter.parameters()), torch.float32))
        reads.expose(self.model)
        self.folded.clear()
        self.biases.clear()
        if self.record is not None:
            setattr(self.model.get_submodule(self.record[0]), RECORD, self.record[1])


@torch.no_grad()
def merge(model: nn.Module, *, keep: bool = True) -> Merged:
    """Fold every adapter into its host's weight, in float32 with one cast at the end, and detach it.

    A quantised host becomes a plain linear layer that holds the dequantised, merged weight. Of methods that train base
    parameters there is nothing to fold: these hold what was learned, and the model is a plain one afterwards. A layer
    without a bias gets one where an adapter ``adds_bias``; ``biases`` of what is returned tells which.

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
        matrix, bias = _folded(host, held) if maps_of(held) else (None, None)
        for tag in held:
            detach(host, tag)
        if bias is not None and host.bias is None:
            done.biases.append(name)
        if matrix is None:  # nothing but watchers
            done.folded.append((name, host, held, {}))
        elif quant.kind(host):
            plain = quant.replace_dequantized(model, name, matrix)
            if bias is not None:  # a parameter of its own: the quantised layer keeps the old one for undo
                plain.bias = _parameter(bias, plain.weight, host.bias)
            done.folded.append((name, host, held, None))
        else:
            if keep:
                keys = ("weight",) if bias is None else ("weight", "bias")
                done.folded.append((name, host, held, {k: _copy(getattr(host, k)) for k in keys}))
            hosts.write(host, matrix)
            if bias is not None:
                host.bias = _parameter(bias, host.weight, None) if host.bias is None else host.bias
                host.bias.copy_(bias)
    return done


def _copy(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.detach().to("cpu", copy=True)


def _parameter(bias: Tensor, weight: Tensor, old: Tensor | None) -> nn.Parameter:
    return nn.Parameter(bias.to(weight), requires_grad=old is not None and old.requires_grad)


def _folded(host: Any, held: dict[str, Adapter]) -> tuple[Tensor, Tensor | None]:
    """The merged (out, in) matrix, and the merged bias where an adapter changes it, in float32 or better."""
    matrix, bias = hosts.read(host), hosts.stored(host, "bias") if _changes_bias(host) else None
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))  # a float64 base keeps its precision
    bias = bias if bias is None else bias.to(torch.promote_types(bias.dtype, torch.float32))
    for adapter in maps_of(held):  # others only watch
        matrix, bias = adapter.weight(matrix), adapter.bias_of(host, bias) if _changes_bias(host) else None
    return matrix, bias


def _changes_bias(host: Any) -> bool:
    held = maps_of(attached(host))
    changing = any(type(a).bias is not WeightAdapter.bias for a in held)
    return changing and (hosts.stored(host, "bias") is not None or any(a.adds_bias for a in held))


def _refuse(model: nn.Module, targets: list[tuple[str, Any]]) -> None:
    record = find_record(model)
    if record and (stuck := [m.name for m in record[1].methods if not m.traits.merge and any(m.adapters(model))]):
        raise ValueError(f"{', '.join(stuck)} cannot be merged: what it adds is no change of a weight")
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, host in targets:
        for tag, adapter in attached(host).items():
            if not isinstance(adapter, WeightAdapter) and not adapter.watches:
                raise ValueError(f"adapter {tag!r} on {name!r} is a {type(adapter).__name__}, which cannot be merged")
        keys = (("weight", "bias") if _changes_bias(host) else ("weight",)) if maps_of(attached(host)) else ()
        written = {k: p for k in keys if (p := hosts.stored(host, k)) is not None}
        if len(written) < len(keys) and not hosts.runs_plainly(type(host).__mro__[1]) and not quant.kind(host):
            raise ValueError(
                f"{name!r} has no bias, and a {type(host).__mro__[1].__name__} may not use one: exclude it"
            )
        for key, parameter in written.items():
            if owners[id(parameter)] > 1:
                raise ValueError(
                    f"the {key} of {name!r} is tied to another module's, so merging would change both: "
                    f"untie them first, or exclude {name!r} from the targets"
                )
