"""Random matrices that all layers of a method share: drawn again from a seed instead of saved, and known by a checksum.

They are no parameters, so that nothing decays, averages or counts them, and no buffers: ``module.to`` would give every
layer a copy of its own, a file would repeat them, and DDP would send them around at every step.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import find, hf, hosts
from lightning_peft.find import exact


def generator(seed: int) -> torch.Generator:
    """Of the CPU, so that every machine and every process draws the same."""
    return torch.Generator("cpu").manual_seed(seed)


def uniform(
    shape: tuple[int, ...], bound: float, source: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """U(-bound, bound), the same bits everywhere.

    ``Tensor.uniform_`` takes the same numbers from the generator, but rounds them once or twice as the processor can.
    """
    edge = torch.tensor(bound, dtype=torch.float32, device="cpu")
    drawn = torch.rand(shape, generator=source, dtype=torch.float32, device="cpu").double()
    drawn = drawn.mul_(2 * edge.item()).sub_(edge.item()).float().to(dtype)
    return drawn.where(drawn != edge.to(dtype), -edge.to(dtype))  # what rounds up to the open end, as uniform_ does


def sparse(shape: tuple[int, ...], one_in: float, source: torch.Generator) -> Tensor:
    """Plus or minus one in a share ``1 / one_in`` of the places, else zero."""
    drawn = torch.rand(shape, generator=source, dtype=torch.float32, device="cpu")
    return (drawn > 1 - 0.5 / one_in).float() - (drawn < 0.5 / one_in).float()


def normed(t: Tensor) -> Tensor:
    """Divided by its standard deviation in its own precision; float32."""
    deviation = t.double().std().to(t.dtype)
    if not deviation > 0:  # of one number it is nan
        raise ValueError(f"the {tuple(t.shape)} random matrix has equal entries alone: use another seed or a larger r")
    return (t / deviation).float()


class Projections:
    """Named float32 matrices on the CPU, and one copy for each device and precision that adapted layers have."""

    def __init__(self, **drawn: Tensor) -> None:
        self.drawn = drawn
        bits = torch.cat([t.flatten() for t in drawn.values()]).view(torch.int32).long()
        self.checksum = int((bits * torch.arange(1, len(bits) + 1, device="cpu")).sum())  # of values and their places
        self._copies: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def on(self, name: str, like: Tensor) -> Tensor:
        """A matrix on the device and in the precision of ``like``."""
        key = name, like.device, like.dtype
        if key not in self._copies:
            self._copies[key] = self.drawn[name].to(like)
        return self._copies[key]

    def check_state(self, state: Mapping[str, Tensor], method: str) -> None:
        """Refuse the ``checksum`` of an adapter that was trained beside other matrices."""
        held = state.get("checksum")
        if held is not None and not held.is_meta and int(held) != self.checksum:
            raise ValueError(
                f"these vectors of {method} were trained beside other random matrices than are drawn here: with "
                "another seed, rank or set of target layers, or a torch that draws other numbers from a seed"
            )


# ---- huggingface/peft's folder, of methods with ``draw``, ``in_hf`` and ``save_projection`` -------------------------


def to_hf(
    method: Any, model: nn.Module, fields: Mapping[str, str], names: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(fields, tensors): ``fields`` of the method and ``names`` of an adapter's tensors are ours -> peft's."""
    held: dict[str, tuple[Any, Any]] = {name: (host, a) for name, host, a in method.adapters(model)}
    config = {theirs: getattr(method, ours) for ours, theirs in fields.items()} | {
        "save_projection": method.save_projection,
        "target_modules": hf.target_modules(model, held),
        "fan_in_fan_out": any(hosts.is_conv1d(host) for host, _ in held.values()),
        "init_weights": True,
        "bias": "none",
    }
    own = {f"{hf.PREFIX}{n}.{key}": getattr(a, t) for n, (_, a) in held.items() for t, key in names.items()}
    shared = method.in_hf(next(a.shared for _, a in held.values())) if method.save_projection else {}
    return config, own | shared


def from_hf(
    method: Any, tensors: Mapping[str, Mapping[str, Tensor]], model: nn.Module, names: Mapping[str, str]
) -> dict[str, Any]:
    """``targets`` and ``save_projection`` of a folder; ``method`` has the other options.

    Raises:
        ValueError: another base, or random matrices that are not those drawn here.
    """
    found = [name for name, t in tensors.items() if t.keys() & set(names.values())]
    if not found:
        raise ValueError(f"no tensor of the file belongs to a module of this {type(model).__name__}: another base?")
    layers = [host for _, host in find(model, [exact(name) for name in found], method.traits.hosts)]
    held = tensors.get("", {})
    drawn: dict[str, Tensor] = method.in_hf(method.draw(layers))
    saved = bool(held.keys() & drawn.keys())
    if not saved:
        warnings.warn(
            f"the folder holds no random matrices (save_projection=False): those drawn from its seed {method.seed} are "
            "taken, and nothing proves that it was trained with them",
            stacklevel=4,
        )
    for key, mine in drawn.items() if saved else ():
        theirs = held.get(key)
        if theirs is None or theirs.shape != mine.shape or not torch.allclose(theirs.to(mine), mine, atol=1e-6):
            what = "missing" if theirs is None else f"another one, {tuple(theirs.shape)}"
            raise ValueError(
                f"the folder's {key} is {what}; from its seed {method.seed} follows one of {tuple(mine.shape)}, and "
                "such matrices are drawn here again, no others are kept"
            )
    return {"targets": hf.targets(model, found), "save_projection": saved}
