"""Where the activations of a model's MLPs are, and the adapters that watch them there."""

from dataclasses import dataclass
from typing import Any

from lightning_peft_plugins.lifecycle.density import Watcher
from torch import Tensor, nn

from lightning_peft import Base, arch, find, parts
from lightning_peft.attach import accepts, adapters, modules
from lightning_peft.find import exact
from lightning_peft.padding import Padding, watch

PLACES = ("auto", "activation", "product")
_TORCH = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Sigmoid, nn.Tanh)


class Watch(Watcher):
    """On an activation function: sees what it returns."""

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        a = base(*args, **kwargs)
        # Its input is in memory for its own backward; a ReLU keeps its output, and one that works in place has no more.
        host, alone = base.host, len(args) == 1 and next(iter(base.host.adapters.values())) is self
        again = alone and not isinstance(host, nn.ReLU) and not getattr(host, "inplace", False)
        self.see(a, args[0] if again else a, base if again else None)
        return a


class WatchInput(Watcher):
    """On the last layer of an MLP: sees what enters it."""

    def forward(self, base: Base, x: Tensor) -> Tensor:
        self.see(x, x)
        return base(x)


@dataclass(frozen=True)
class Place:
    """One activation: the module to watch it on, and the last layer of its MLP ("" where it was named instead)."""

    name: str
    host: Any
    down: str = ""

    @property
    def at_input(self) -> bool:
        return arch.is_linear(self.host)


def places(model: nn.Module, where: str, targets: tuple[str, ...], layers: str, by: str) -> list[Place]:
    """The activations to watch, in the model's order.

    Args:
        model: whose MLPs are found by structure.
        where: one of ``PLACES``; "auto" is the product in MLPs gated by SiLU, else the activation function.
        targets: modules to watch instead: of a linear layer the input, of others the output.
        layers: blocks to keep; all when empty.
        by: name of the method, for messages.

    Raises:
        ValueError: no MLP, or no activation function that is a module of one MLP alone where that is asked for.
    """
    if targets:
        return [Place(n, m) for n, m in find(model, targets, nn.Module, layers=layers)]
    found = [_place(model, mlp, where, by) for mlp in parts.mlps(model)]
    if not found:
        raise ValueError(f"{by}: this {type(model).__name__} has no MLP that its structure tells; name modules by "
                         "targets: activation functions, or the last linear layer of each MLP")  # fmt: skip
    kept = {n for n, _ in find(model, [exact(p.down) for p in found], ("linear", "conv1d"), layers=layers)}
    return [p for p in found if p.down in kept]


def _place(model: nn.Module, mlp: parts.MLP, where: str, by: str) -> Place:
    down, gated = model.get_submodule(mlp.down), len(mlp.rows) > 1
    acts = {n: m for n, m in modules(model) if n.startswith(f"{mlp.name}.") and _is_activation(m)}
    act = next(iter(acts.values()), None)
    uses = [n for n, m in model.named_modules(remove_duplicate=False) if m is act]
    clear = len(acts) == 1 and len(uses) == 1
    if where == "activation" and not clear:
        raise ValueError(
            f"{by}: the activation function of {mlp.name!r} is no module of its own (found {sorted(acts)}); take "
            f"observe='auto', which then watches what enters {mlp.down!r}"
        )
    product = where == "product" or (gated and "silu" in type(act).__name__.lower())
    if clear and (where == "activation" or not product):
        return Place(next(iter(acts)), act, mlp.down)
    return Place(mlp.down, down, mlp.down)


def _is_activation(module: nn.Module) -> bool:
    home = any(c.__module__ == "transformers.activations" for c in type(module).__mro__)
    return home or isinstance(module, _TORCH)


def padding(model: nn.Module, name: str) -> Padding:
    """What tells the padding of activations in ``model``, read by adapters of that name."""
    if not any({"inputs_embeds", "attention_mask"} <= set(accepts(m)) for _, m in modules(model)):
        raise ValueError(
            f"{name}: count_padding=False needs a module that takes inputs_embeds and an attention_mask, and this "
            f"{type(model).__name__} has none: without padding leave count_padding=True"
        )
    return watch(model, name)


def watchers(model: nn.Module, name: str) -> dict[str, Watcher]:
    """Module -> watcher, of those that watch."""
    return {n: a for n, _, a in adapters(model, name) if isinstance(a, Watcher)}


def side(name: str) -> str:
    """Which of the two means a module of this name belongs to."""
    return "decoder" if any("decoder" in part for part in name.split(".")) else "encoder"
