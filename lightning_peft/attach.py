"""Attach adapters to modules and take them off again, find targets, list what is attached."""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import hosts
from lightning_peft.adapter import Adapter, Base, WeightAdapter


def _no_effect(module: nn.Module, args: Any) -> None:
    """A hook that does nothing. Its presence alone turns off torch's fused TransformerEncoderLayer path."""


class Adapters(nn.ModuleDict):
    """The adapters of one host, in the order of attachment, under ``host.adapters``.

    It carries a forward pre-hook although it is never called: nn.TransformerEncoderLayer reads its layers' weights
    directly in evaluation unless a module below it has a hook, and would then skip the adapters.
    """

    active: bool = True

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(_no_effect)


def _rebuild(cls: type[nn.Module], shown: bool = False) -> nn.Module:
    adapted = _adapted(cls, shown)
    return adapted.__new__(adapted)


def _chain(host: Any) -> Base:
    """The host with all of its adapters, or with none while they are inactive."""
    base = Base(host)
    for adapter in host.adapters.values() if host.adapters.active else ():
        base = Base(host, base, adapter)
    return base


@functools.cache
def _adapted(cls: type[nn.Module], shown: bool = False) -> type[nn.Module]:
    """The subclass of ``cls`` whose forward goes through ``self.adapters``; one for each host class.

    With ``shown`` its ``weight`` and ``bias`` are the adapted ones for whoever reads them.
    """

    class Adapted(cls):
        unadapted = cls.forward

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _chain(self)(*args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:  # a class made at run time cannot be pickled by its name
            return _rebuild, (cls, shown), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

    Adapted.__name__ = f"Adapted{cls.__name__}"
    Adapted.__qualname__ = cls.__qualname__  # transformers looks up what a model can record by str(type(model))
    Adapted.__module__ = cls.__module__
    if shown:
        Adapted.weight = property(_shown_weight)  # type: ignore[assignment]
        Adapted.bias = property(_shown_bias)  # type: ignore[assignment]
        Adapted.unadapted = _unadapted  # the class's own forward would read the adapted weight
    return Adapted


def _shown_weight(host: Any) -> Tensor:
    stored = hosts.stored(host)
    return hosts.to_stored(host, _chain(host).weight).to(stored.dtype) if host.adapters.active else stored


def _shown_bias(host: Any) -> Tensor | None:
    stored, adapted = hosts.stored(host, "bias"), _chain(host).bias
    return adapted if stored is None or adapted is None else adapted.to(stored.dtype)


def _unadapted(host: Any, x: Tensor) -> Tensor:
    return hosts.run(host, hosts.read(host), x)


def accepts(module: Any) -> tuple[str, ...]:
    """Names of the arguments of the module's own forward, in order."""
    return tuple(inspect.signature(getattr(module, "unadapted", module.forward)).parameters)


def by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, where ``names`` are those its callee ``accepts``."""
    return dict(zip(names, args, strict=False)) | kwargs


def is_adapted(module: nn.Module) -> bool:
    return isinstance(getattr(module, "adapters", None), Adapters)


def attached(host: Any) -> dict[str, Adapter]:
    """The adapters on one host by name, in the order of attachment; empty where there is none."""
    return dict(host.adapters.items()) if is_adapted(host) else {}


def attach(host: Any, name: str, adapter: Adapter, dtype: torch.dtype = torch.float32) -> None:
    """Put ``adapter`` on ``host`` under ``host.adapters[name]``, on the host's device.

    The host keeps its state-dict keys and its type (the class becomes a subclass of it), several adapters stack in
    order, and ``detach`` restores it exactly.

    Args:
        host: any module whose forward is really called.
        name: the tag, one of each per host.
        adapter: what wraps the call.
        dtype: of the adapter's floating tensors.

    Raises:
        ValueError: the name is taken, or the host cannot carry adapters.
    """
    if isinstance(adapter, WeightAdapter) and hosts.kind(host) is None:
        raise ValueError(
            f"a {type(adapter).__name__} changes a weight matrix, which {type(host).__name__} has none of; "
            "it fits linear layers, embeddings and convolutions"
        )
    if isinstance(adapter, WeightAdapter) and adapter.adds_bias and hosts.kind(host) == "embedding":
        raise ValueError(f"a {type(adapter).__name__} adds a bias, which an embedding cannot have")
    if not is_adapted(host):
        if hasattr(host, "adapters"):
            raise ValueError(f"{type(host).__name__} already has an attribute 'adapters', so none can be attached")
        host.adapters = Adapters()
        host.__class__ = _adapted(type(host))
    if name in host.adapters:
        raise ValueError(f"an adapter {name!r} is already attached here; give one method another name")
    device = next((t.device for t in (*host.parameters(recurse=False), *host.parameters())), None)
    adapter.cast(dtype, device)
    adapter.train(host.training)
    host.adapters[name] = adapter


def show(host: Any) -> bool:
    """Let ``host.weight`` and ``host.bias`` be the adapted ones, for code that reads them without calling the host.

    What the host stores is ``hosts.stored(host)`` then; state-dict keys, parameters and ``detach`` are as before.

    Returns:
        False, and nothing is changed, where the host's class has a forward of its own, beside torch's.
    """
    cls = type(host).__mro__[1]
    if not hosts.runs_plainly(cls):
        return False
    host.__class__ = _adapted(cls, True)
    return True


def detach(host: Any, name: str) -> Adapter:
    """Take an adapter off; with the last one the host is what it was before, class included."""
    if not is_adapted(host) or name not in host.adapters:
        raise ValueError(f"no adapter {name!r} is attached to this {type(host).__name__}")
    adapter = host.adapters[name]
    del host.adapters[name]
    if not host.adapters:
        del host.adapters
        host.__class__ = type(host).__mro__[1]
    return adapter


def modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The model's own modules with their names: adapters and what they hold are left out."""
    inside = {id(m) for container in model.modules() if isinstance(container, Adapters) for m in container.modules()}
    return ((name, m) for name, m in model.named_modules() if id(m) not in inside)


def adapters(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, Any, Adapter]]:
    """(module name, host, adapter) of every adapter, or of those attached under ``name``, in the model's order."""
    for fqn, host in list(model.named_modules()):
        for tag, adapter in attached(host).items():
            if name is None or tag == name:
                yield fqn, host, adapter


def detach_all(model: nn.Module, name: str | None = None) -> None:
    """``detach`` every adapter, or those attached under ``name``."""
    for _, host in list(model.named_modules()):
        for tag in attached(host):
            if name is None or tag == name:
                detach(host, tag)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Run the model without its adapters, as a teacher or reference; trained base parameters stay as they are."""
    containers = [m for m in model.modules() if isinstance(m, Adapters)]
    before = [c.active for c in containers]
    try:
        for c in containers:
            c.active = False
        yield
    finally:
        for c, active in zip(containers, before, strict=True):
            c.active = active


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode; after it each module is back in its own."""
    before = [(m, m.training) for m in model.modules()]
    try:
        for m, _ in before:
            m.training = False  # without train(), which a module may override to do more
        yield
    finally:
        for m, training in before:
            m.training = training
