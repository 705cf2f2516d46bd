"""S2FT: train whole attention heads and MLP channels, each a dense slice. Yang et al. 2024, arXiv:2412.06289.

The paper permutes weights so that what trains lies side by side. Here the base is not written: the slice's change is a
tensor of its own beside it and an index says where it belongs, which computes the same.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_peft_plugins.reparameterized import plain_lora
from lightning_peft_plugins.reparameterized.lora import LoRA
from lightning_peft_plugins.selective import sparse
from torch import Tensor, nn

from lightning_peft import Method, Traits, attach, find, hosts, inject, load, parts, quant, remove
from lightning_peft.attach import evaluating
from lightning_peft.find import exact, nearest
from lightning_peft.inject import find_record
from lightning_peft.padding import Padding, reading
from lightning_peft.slices import Change, Changes, Slice, extract

BY_DATA = ("activation", "product", "gradient")
SELECTIONS = ("random", "weight", *BY_DATA, "given")


@dataclass(frozen=True, kw_only=True)
class S2FT(Method):
    """W + delta at the columns or rows of a few heads and channels; layers without a chosen one keep nothing.

    Heads are taken with their key-value head: under grouped queries with all query heads that it serves. At random,
    both sides of an MLP or attention take the same units first. Weight decay pulls a slice towards the base's values.

    Args:
        d_ratio: share of the MLP channels whose columns of the last layer (down) train.
        o_ratio: share of the heads whose columns of the attention's output projection train.
        u_ratio: share of the MLP channels whose rows of the first layer (up, never the gate) train.
        v_ratio: share of the heads whose rows of the value projection train.
        selection: "random"; by the norm of a unit's "weight"; by data: of its "activation", the "product" of both, or
            its "gradient"; "given": by ``inject(..., stats={name: {layer: channels}})``, as ``put`` does.
        prefer: "smallest" or "largest" of these; the paper found the smallest activations best.
        scope: a share is taken of all layers together, "global", or in each "layer", there of at least one unit.
        seed: of the random selection.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="selective",
        paper="Yang et al. 2024, arXiv:2412.06289",
        parameters="ratio * in * out summed over the layers",
        hosts=("linear", "conv1d"),
        merge=True,
        needs_weights=True,
    )
    name: str = "s2ft"
    d_ratio: float = 0.02
    o_ratio: float = 0.052
    u_ratio: float = 0.0
    v_ratio: float = 0.0
    selection: str = "random"
    prefer: str = "smallest"
    scope: str = "global"
    seed: int = 0
    exclude: tuple[str, ...] = ()
    layers: str = ""

    def __post_init__(self) -> None:
        given = {k: getattr(self, k) for k in ("d_ratio", "o_ratio", "u_ratio", "v_ratio")}
        if not all(0 <= r <= 1 for r in given.values()) or not any(given.values()):
            raise ValueError(f"{self.name}: ratios are shares in [0, 1], at least one above 0; got {given}")
        known = {"selection": SELECTIONS, "prefer": ("smallest", "largest"), "scope": ("global", "layer")}
        for option, values in known.items():
            if getattr(self, option) not in values:
                raise ValueError(f"{self.name}: {option} is one of {values}, got {getattr(self, option)!r}")
        if self.selection in ("random", "given") and self.prefer != "smallest":
            raise ValueError(f"{self.name}: prefer={self.prefer!r} has no effect on selection={self.selection!r}")

    @property
    def calibrates(self) -> bool:
        return self.selection in BY_DATA

    def inject(self, model: nn.Module, stats: Mapping[str, Any] | None = None) -> None:
        sides = self._sides(model)
        if self.selection in ("random", "weight"):
            stats = self._choose(sides, self._scores(model, sides))
        if unknown := next((n for n in stats or {} if n not in {s.layer for s in sides}), None):
            raise ValueError(f"{self.name}: {unknown!r} is no layer it trains; nearest: "
                             f"{nearest(unknown, [s.layer for s in sides])}")  # fmt: skip
        for s in sides:  # where no data was seen every side is made ready for what a file holds
            index = torch.as_tensor((stats or {}).get(s.layer, ()), dtype=torch.long).cpu()
            if len(index) or stats is None:
                attach(model.get_submodule(s.layer), self.name, Slice(model.get_submodule(s.layer), s.axis, index))

    def _sides(self, model: nn.Module) -> list[parts.Side]:
        share = self._shares()
        sides = [s for s in parts.sides(model) if share[s.kind]]
        if lacking := [k for k in share if share[k] and k not in {s.kind for s in sides}]:
            raise ValueError(f"{self.name}: found no layer of kind {lacking} in this {type(model).__name__} (see "
                             "lightning_peft.parts): set its ratio to 0, or take sparse_mask")  # fmt: skip
        names = [exact(s.layer) for s in sides]
        kept = {n for n, _ in find(model, names, self.traits.hosts, exclude=self.exclude, layers=self.layers)}
        return [s for s in sides if s.layer in kept]

    def _shares(self) -> dict[str, float]:
        return {"v": self.v_ratio, "o": self.o_ratio, "up": self.u_ratio, "down": self.d_ratio}

    def _scores(self, model: nn.Module, sides: Sequence[parts.Side]) -> dict[str, Tensor]:
        """Layer -> (units,) scores without data."""
        if self.selection == "weight":
            return {s.layer: s.norms(hosts.read(model.get_submodule(s.layer)).detach().float()) for s in sides}
        generator = torch.Generator(device="cpu").manual_seed(self.seed)  # every machine draws the same
        drawn = {s.last: torch.rand(s.units, generator=generator, device="cpu") for s in parts.sides(model)}
        return {s.layer: drawn[s.last] for s in sides}

    def _choose(self, sides: Sequence[parts.Side], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Layer -> rows or columns of its best units; layers that have none are left out."""
        sign = 1.0 if self.prefer == "largest" else -1.0
        chosen: dict[str, Tensor] = {}
        for kind, share in self._shares().items():
            mine = [s for s in sides if s.kind == kind]
            for group in [mine] if self.scope == "global" else [[s] for s in mine]:
                k = max(1, int(share * sum(s.units for s in group)))
                found = sparse.highest([sign * scores[s.layer] for s in group], k) if group else []
                chosen |= {s.layer: s.index(units) for s, units in zip(group, found, strict=True) if len(units)}
        return chosen

    def calibrate(self, model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """Layer -> rows or columns of the units chosen by data."""
        sides = self._sides(model)
        return self._choose(sides, self.scores(model, sides, batches, loss))

    def scores(
        self, model: nn.Module, sides: Sequence[parts.Side], batches: Iterable[Any], loss: Callable[[Any], Tensor]
    ) -> dict[str, Tensor]:
        """Layer -> (units,) scores by data; the model is in evaluation mode meanwhile."""
        layers: dict[str, Any] = {s.layer: model.get_submodule(s.layer) for s in sides}
        if self.selection == "gradient":
            means = _gradients(layers, model, batches, loss)
            return {s.layer: s.norms(means[s.layer]) for s in sides}
        sums = _squares({s.last: model.get_submodule(s.last) for s in sides}, model, batches, loss)
        found = {s.layer: sums[s.last].view(s.units, -1).sum(1).sqrt() for s in sides}
        if self.selection == "product":
            found = {s.layer: found[s.layer] * s.norms(hosts.read(layers[s.layer]).detach().float()) for s in sides}
        return found

    def to_lora(self, model: nn.Module) -> LoRA:
        """Put a plain LoRA of the same weight in its place, of rank c on a layer; see ``plain_lora.convert``."""
        return plain_lora.convert(self, model)


def _squares(
    layers: dict[str, nn.Module], model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]
) -> dict[str, Tensor]:
    """Layer -> (in,) sums over tokens, padding left out, of its squared inputs."""
    sums: dict[str, Any] = dict.fromkeys(layers, 0)

    def summing(name: str, padding: Padding) -> Callable[..., None]:
        def add(module: nn.Module, args: Any) -> None:
            x, mask = args[0].detach().float(), padding.of(args[0])
            x = x.flatten(0, -2) if mask is None else x[mask.bool()]
            sums[name] = sums[name] + x.square().sum(0)

        return add

    with reading(model) as padding, evaluating(model), torch.no_grad():
        handles = [layer.register_forward_pre_hook(summing(name, padding)) for name, layer in layers.items()]
        try:
            for batch in batches:
                loss(batch)
        finally:
            for handle in handles:
                handle.remove()
    if unseen := next((n for n, s in sums.items() if not isinstance(s, Tensor)), None):
        raise ValueError(f"over the batches to calibrate on {unseen!r} was never called: leave it out (exclude)")
    return sums


def _gradients(
    layers: dict[str, Any], model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]
) -> dict[str, Tensor]:
    """Layer -> (out, in) mean over batches of its weight's gradient."""
    if other := next((n for n, layer in layers.items() if quant.kind(layer)), None):
        raise ValueError(f"selection by gradient: {other!r}, stored quantised, has none; take another, or exclude it")
    weights, count = [layer.weight for layer in layers.values()], 0
    sums = {n: torch.zeros(hosts.shape(layer), device=layer.weight.device) for n, layer in layers.items()}
    with sparse.looking(model, weights):
        for batch in batches:
            grads, count = torch.autograd.grad(loss(batch), weights, allow_unused=True), count + 1
            for (name, layer), g in zip(layers.items(), grads, strict=True):
                sums[name] += 0 if g is None else hosts.as_matrix(layer, g).float()
    if not any(bool(s.any()) for s in sums.values()):
        raise ValueError(f"over {count} batches the loss has no gradient at any of the layers to choose from")
    return {n: s / count for n, s in sums.items()}


def read(model: nn.Module, folder: str | Path) -> Changes:
    """What a folder saved of one S2FT holds, checked against this base; the model is left as it was.

    Raises:
        ValueError: as ``lightning_peft.load``; the model holds adapters, or the folder other methods.
    """
    load(model, folder)
    try:
        held = find_record(model)
        names = [m.name for m in held[1].methods] if held else []
        if len(names) != 1:
            raise ValueError(f"{folder} holds {names}; one S2FT alone can be read")
        return extract(model, names[0])
    finally:
        remove(model)


def put(model: nn.Module, changes: Mapping[str, Change], name: str = "s2ft") -> S2FT:
    """Make these slices the model's only adapter, in place of S2FT that it holds: how adapters are switched.

    No base weight is written, so going back is exact. Base parameters that trained along stay as they are.

    Returns:
        the method that now holds them; it saves, merges and trains on as others do.

    Raises:
        ValueError: the model holds another method, or a layer that no slice is for.
    """
    held = find_record(model)
    if other := [m.name for m in held[1].methods if not isinstance(m, S2FT)] if held else []:
        raise ValueError(f"put would take off {other} as well: lightning_peft.remove(model) first, if that is meant")
    owner = model.get_submodule(held[0]) if held else model
    if held:
        remove(owner)
    share = {"v_ratio": "v", "o_ratio": "o", "u_ratio": "up", "d_ratio": "down"}
    kinds = {s.kind for s in parts.sides(owner) if s.layer in changes}
    ratios: Any = {ratio: float(kind in kinds) for ratio, kind in share.items()}
    method = S2FT(name=name, selection="given", **ratios)
    inject(owner, method, stats={name: {layer: c.index for layer, c in changes.items()}})
    with torch.no_grad():
        for layer, _, adapter in method.adapters(owner):
            adapter.get_parameter("delta").copy_(changes[layer].delta)
    return method
