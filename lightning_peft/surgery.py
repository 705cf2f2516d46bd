"""Really remove attention heads and MLP channels of the base; adapters and optimizer moments are sliced along.

::

    heads = {a.name: [0, 2] for a in parts.attentions(model)}        # what stays, as positions in the present model
    channels = {m.name: range(0, m.channels, 2) for m in parts.mlps(model)}
    record = surgery.cut(model, heads, channels, optimizers)         # plain data, in positions of the uncut model
    surgery.apply(fresh_model, record)                               # the same cut on an untouched base

A transformers model's ``config`` keeps the sizes of the uncut model: rebuild from it, then apply the record.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import hosts, quant
from lightning_peft.adapter import Adapter, WeightAdapter
from lightning_peft.arch import is_linear
from lightning_peft.attach import is_adapted, modules
from lightning_peft.find import nearest
from lightning_peft.parts import MLP, Attention, attentions, mlps
from lightning_peft.resize import resize, take_parameter

Keep = Tensor | Sequence[int]
Record = dict[str, dict[str, list[int]]]

# Kept positions in the uncut model, on the module that was cut: plain lists, so they survive deepcopy and pickle.
_KEPT = {"heads": "peft_kept_heads", "channels": "peft_kept_channels"}

# Sizes that modules hold beside their layers; one is changed where it has the size that is being cut.
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KV_COUNTS = ("num_key_value_heads", "num_kv_heads")
_WIDTHS = ("all_head_size", "split_size", "inner_dim", "embed_dim")
_CHANNELS = ("intermediate_size", "ffn_dim", "d_ff")


def cut(
    model: nn.Module,
    heads: Mapping[str, Keep] | None = None,
    channels: Mapping[str, Keep] | None = None,
    optimizers: Iterable[Optimizer] = (),
) -> Record:
    """Remove all heads and channels but the given ones, in place; nothing is changed when anything is refused.

    Args:
        model: whose weights are written.
        heads: attention module (see ``parts.attentions``) -> positions to keep among its present key-value heads; the
            query heads that one serves stay or go with it.
        channels: MLP (see ``parts.mlps``) -> positions to keep among its present channels.
        optimizers: whose moments follow.

    Returns:
        ``record(model)``: what is left of the uncut model, after earlier cuts too.

    Raises:
        ValueError: an unknown name, positions that are not sorted, unique, in range and at least one, or a part with
            an ``obstacle``.
    """
    if not heads and not channels:
        raise ValueError("nothing to cut: name attention modules in heads or MLPs in channels")
    jobs = [
        (kind, part, _positions(keep, part))
        for kind, wanted in (("heads", heads or {}), ("channels", channels or {}))
        for part, keep in _named(model, kind, wanted)
    ]
    for _, part, _ in jobs:
        if reason := obstacle(model, part):
            raise ValueError(f"cannot cut {part.name!r}: {reason}")
    optimizers = list(optimizers)
    for kind, part, keep in jobs:
        _cut(model, kind, part, keep, optimizers)
    return record(model)


def record(model: nn.Module) -> Record:
    """Positions that earlier cuts left, counted in the uncut model, as plain data; empty when nothing was cut."""
    out: Record = {
        kind: {n: list(getattr(m, attribute)) for n, m in modules(model) if hasattr(m, attribute)}
        for kind, attribute in _KEPT.items()
    }
    return out if any(out.values()) else {}


def apply(model: nn.Module, record: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
    """Cut ``model`` down to a record; one that was cut before is cut further, or left alone where it agrees.

    Raises:
        ValueError: as ``cut`` does, or the record keeps something that an earlier cut of this model removed.
    """
    left: dict[str, dict[str, list[int]]] = {}
    for kind, wanted in record.items():
        if kind not in _KEPT:
            raise ValueError(f"a record of a cut has {' and '.join(map(repr, _KEPT))}, not {kind!r}")
        parts = dict(_named(model, kind, wanted))
        left[kind] = {part.name: _present(model, kind, part, keep) for part, keep in parts.items()}
    if any(left.values()):
        cut(model, left.get("heads"), left.get("channels"))


def obstacle(model: nn.Module, part: Attention | MLP) -> str:
    """Why this part of ``model`` cannot be cut, or "" if it can; ask before estimating anything for it."""
    module = model.get_submodule(part.name)
    if hasattr(module, "has_relative_attention_bias"):
        return "all blocks of its stack use the position bias of the first one (T5), so heads cannot go one by one"
    owner: dict[int, str] = {}  # id of every parameter that would be sliced -> its layer
    for name, (axis, index) in slices(part, torch.arange(part.units)).items():
        layer: Any = model.get_submodule(name)
        if quant.kind(layer):
            return f"{name!r} is quantised by blocks that do not follow channels; cut first, then quantise"
        for tag, adapter in layer.adapters.items() if is_adapted(layer) else ():
            if reason := _adapter_obstacle(adapter, axis, len(index)):
                return f"adapter {tag!r} on {name!r} {reason}"
        owner |= {id(p): name for p in _sliced(layer, axis)}
    held = Counter(id(p) for m in model.modules() for p in m._parameters.values() if id(p) in owner)
    if shared := [i for i, times in held.items() if times > 1]:
        return f"a parameter on {owner[shared[0]]!r} is shared with another layer, which would be cut as well"
    return _sized_by_units(module, part, {model.get_submodule(name) for name in owner.values()})


def _named(model: nn.Module, kind: str, wanted: Mapping[str, Any]) -> list[tuple[Attention | MLP, Any]]:
    found = attentions(model) if kind == "heads" else mlps(model)
    known: dict[str, Attention | MLP] = {part.name: part for part in found}
    what = "attention module" if kind == "heads" else "MLP"
    for name in wanted:
        if name not in known:
            raise ValueError(f"no {what} that can be cut is named {name!r}; nearest: {nearest(name, known)}")
    return [(known[name], keep) for name, keep in wanted.items()]


def _positions(keep: Keep, part: Attention | MLP) -> list[int]:
    values = keep.tolist() if isinstance(keep, Tensor) else list(keep)
    positions = range(part.units)
    whole = isinstance(values, list) and all(isinstance(i, Integral) and not isinstance(i, bool) for i in values)
    if not whole or not values or values != sorted(set(values)) or not {values[0], values[-1]} <= {*positions}:
        shown = f"{values[:8]}..." if isinstance(values, list) and len(values) > 8 else values
        raise ValueError(
            f"keep for {part.name!r} must be sorted and unique positions in 0..{part.units - 1}, at least one; "
            f"got {shown}"
        )
    return [int(i) for i in values]


def _present(model: nn.Module, kind: str, part: Attention | MLP, keep: Sequence[int]) -> list[int]:
    """Positions of the uncut model as positions of the present one."""
    kept = getattr(model.get_submodule(part.name), _KEPT[kind], None)
    if kept is None:
        return list(keep)
    if gone := sorted(set(keep) - set(kept)):
        raise ValueError(f"{part.name!r} was cut before and lacks {gone[:8]} of the {kind} to keep")
    return [kept.index(i) for i in keep]


def slices(part: Attention | MLP, keep: Tensor) -> dict[str, tuple[str, Tensor]]:
    """Layer -> ("out" or "in", rows or columns) of everything that the units ``keep`` (n,) of a part need."""
    if isinstance(part, MLP):
        return {row: ("out", keep) for row in part.rows} | {part.down: ("in", keep)}
    rows: dict[str, list[Tensor]] = {}
    for layer, width in ((part.q, part.width), (part.k, part.head_dim), (part.v, part.head_dim)):
        stacked = rows.setdefault(layer, [])  # of a fused layer, one after the other
        stacked.append(_spread(keep, width) + len(stacked) * part.units * width)
    return {layer: ("out", torch.cat(index)) for layer, index in rows.items()} | {
        part.o: ("in", _spread(keep, part.width))
    }


def _spread(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width)).flatten()


def _cut(model: nn.Module, kind: str, part: Attention | MLP, keep: list[int], optimizers: list[Optimizer]) -> None:
    module = model.get_submodule(part.name)
    kept = getattr(module, _KEPT[kind], None) or range(part.units)
    setattr(module, _KEPT[kind], [kept[i] for i in keep])
    for layer, (axis, index) in slices(part, torch.tensor(keep)).items():
        _take(model.get_submodule(layer), axis, index, optimizers)
    _count(module, part, len(keep))


def _sliced(layer: Any, axis: str) -> list[nn.Parameter]:
    """The parameters that a cut of one side of a layer slices, its adapters' included."""
    weight, bias = hosts.stored(layer), hosts.stored(layer, "bias")
    own = [weight] if axis == "in" or bias is None else [weight, bias]
    for adapter in layer.adapters.values() if is_adapted(layer) else ():
        own += [
            t for n, axes in adapter.axes.items() if axis in axes and isinstance(t := getattr(adapter, n), nn.Parameter)
        ]
    return own


def _take(layer: Any, axis: str, index: Tensor, optimizers: list[Optimizer]) -> None:
    transposed = hosts.is_conv1d(layer)  # stores (in, out)
    take_parameter(hosts.stored(layer), int((axis == "in") != transposed), index, optimizers)
    if axis == "out" and (bias := hosts.stored(layer, "bias")) is not None:
        take_parameter(bias, 0, index, optimizers)
    linear, conv1d = {"out": ("out_features", "nf"), "in": ("in_features", "nx")}[axis]
    setattr(layer, conv1d if transposed else linear, len(index))
    for adapter in layer.adapters.values() if is_adapted(layer) else ():
        if any(axis in axes for axes in adapter.axes.values()):
            resize(adapter, axis, index, optimizers)


def _count(module: nn.Module, part: Attention | MLP, units: int) -> None:
    """Bring the module's own numbers in line with its layers."""
    if isinstance(part, MLP):
        changes = {name: (part.channels, units) for name in _CHANNELS}
    else:
        per_unit = part.heads // part.kv_heads
        changes = {name: (part.heads, units * per_unit) for name in _HEAD_COUNTS}
        changes |= {name: (part.kv_heads, units) for name in _KV_COUNTS}
        changes |= {name: (part.heads * part.head_dim, units * part.width) for name in _WIDTHS}
    for name, (old, new) in changes.items():
        if getattr(module, name, None) == old:
            setattr(module, name, new)


def _adapter_obstacle(adapter: Adapter, axis: str, size: int) -> str:
    tensors = dict(adapter.named_parameters()) | dict(adapter.named_buffers())
    for name, axes in adapter.axes.items():
        for a, length in zip(axes, tensors[name].shape, strict=True):
            if a == axis and length != size:
                return f"has {name!r} of {length} along {axis!r}, where the layer has {size}"
    sides = {a for axes in adapter.axes.values() for a in axes} & {"in", "out"}
    if isinstance(adapter, WeightAdapter) and not sides and any(t.numel() > 1 for t in tensors.values()):
        return f"changes the weight but declares no axis 'in' or 'out', so it cannot be cut ({type(adapter).__name__})"
    return ""


def _sized_by_units(module: nn.Module, part: Attention | MLP, layers: set[nn.Module]) -> str:
    """Find what has a size of its own for each unit: attention sinks, norms over all heads, convolved channels."""
    if isinstance(part, MLP):
        hidden = hosts.shape(module.get_submodule(part.down.removeprefix(part.name + ".")))[0]
        sizes = {part.channels} - {hidden}  # where both are equal the shapes do not tell
    else:
        sizes = {part.heads, part.kv_heads, part.heads * part.head_dim, part.kv_heads * part.head_dim}
    for name, m in modules(module):
        if m in layers or (isinstance(part, MLP) and is_linear(m)):
            continue
        for key, p in m.named_parameters(recurse=False):
            one_head = isinstance(part, Attention) and m is not module and p.shape == (part.head_dim,)
            if not sizes.isdisjoint(p.shape) and not one_head:
                where = f"{name}.{key}" if name else key
                return f"its parameter {where!r} {tuple(p.shape)} may belong to single heads or channels"
    return ""
