"""Put bottlenecks behind, beside and around the parts of a model; hyper-parameters that several methods have."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from lightning_peft_plugins.additive.bottleneck import (
    NONLINEARITIES,
    SCALES,
    Behind,
    Beside,
    Bottleneck,
    FromTap,
    OnResidual,
    Slot,
    Tap,
)
from lightning_peft_plugins.additive.sublayers import KINDS, Sublayer, stream_width
from torch import nn

from lightning_peft import arch, attach, find, hosts
from lightning_peft.attach import modules
from lightning_peft.find import nearest

Make = Callable[..., Bottleneck]  # (class, width of the stream, and before it what only that class takes)


def put_behind(model: nn.Module, tag: str, make: Make, name: str, hidden: int) -> None:
    """On what the module returns."""
    _attach(model, name, tag, make(Behind, hidden))


def put_beside(model: nn.Module, tag: str, make: Make, name: str, hidden: int) -> None:
    """From the module's input to its output."""
    host = model.get_submodule(name)
    attach(host, tag, make(Beside, hidden, _argument(host)))


def put_parallel(model: nn.Module, tag: str, make: Make, part: Sublayer) -> None:
    """From what the sub-layer reads to what it returns."""
    if part.whole:
        put_beside(model, tag, make, part.whole, part.width)
    elif part.closes and part.after:  # post-LN: the residual is what the sub-layer read
        attach(model.get_submodule(part.adds), tag, make(OnResidual, part.width))
    else:
        put_from(model, tag, make, part.width, part.reads, part.ends)


def put_from(model: nn.Module, tag: str, make: Make, hidden: int, reads: str, writes: str) -> None:
    """From one module's input to the output of another that ends after it."""
    slot, reader = Slot(), model.get_submodule(reads)
    attach(reader, tag, Tap(_argument(reader), slot))
    _attach(model, writes, tag, make(FromTap, hidden, slot))


def _attach(model: nn.Module, name: str, tag: str, adapter: Bottleneck) -> None:
    weights = (p for n in (name, *arch.parents(name), "") for p in model.get_submodule(n).parameters())
    adapter.to(next(weights).device)  # attach goes by the host's own weights, which a dropout has none of
    attach(model.get_submodule(name), tag, adapter)


def _argument(host: Any) -> str:
    """Name of the first argument of the host's own forward."""
    return next(iter(inspect.signature(getattr(host, "unadapted", host.forward)).parameters))


def maker(method: Any) -> Make:
    """``make`` by the hyper-parameters that ``check`` knows."""

    def make(cls: Any, hidden: int, *first: Any) -> Bottleneck:
        size = method.bottleneck or max(1, hidden // method.reduction_factor)
        return cls(*first, hidden, size, method.nonlinearity, method.scale, method.dropout, method.init_std)

    return make


def check(method: Any) -> None:
    """The hyper-parameters of sequential and parallel adapters.

    Raises:
        ValueError: naming the method, the option, what was given and what would do.
    """
    m, by, default = method, method.name, type(method)
    if m.nonlinearity not in NONLINEARITIES:
        near = nearest(m.nonlinearity, NONLINEARITIES)
        raise ValueError(f"{by}: nonlinearity {m.nonlinearity!r} is none of {list(NONLINEARITIES)}; nearest: {near}")
    check_branch(by, m.scale, m.dropout)
    if m.init_std < 0:
        raise ValueError(f"{by}: init_std is a standard deviation, or 0 for a start at the base, got {m.init_std}")
    sizes = {"reduction_factor": m.reduction_factor, "bottleneck": 1 if m.bottleneck is None else m.bottleneck}
    if low := [n for n, v in sizes.items() if v < 1]:
        raise ValueError(f"{by}: {low[0]} is at least 1, got {sizes[low[0]]}")
    if m.bottleneck is not None and m.reduction_factor != default.reduction_factor:
        raise ValueError(f"{by}: bottleneck={m.bottleneck} says the size, so reduction_factor has no effect")


def check_branch(by: str, scale: float | str, dropout: float) -> None:
    """Scale and dropout."""
    if isinstance(scale, str) and scale not in SCALES:
        near = nearest(scale, SCALES)
        raise ValueError(f"{by}: scale is a number or one of {SCALES}, got {scale!r}; nearest: {near}")
    if not isinstance(scale, str) and not scale > 0:
        raise ValueError(f"{by}: scale must be positive (at 0 nothing would train), got {scale}")
    if not 0 <= dropout < 1:
        raise ValueError(f"{by}: dropout is a probability below 1, got {dropout}")


def check_places(method: Any) -> None:
    """``places`` and ``targets``, of which only one can say where."""
    by, places = method.name, tuple(method.places)
    if not places or (unknown := [p for p in places if p not in KINDS]):
        near = f"; nearest: {nearest(unknown[0], KINDS)}" if places else ""
        raise ValueError(f"{by}: places are some of {KINDS}, got {places}{near}")
    if method.targets and places != type(method).places:
        raise ValueError(f"{by}: targets say where, so places has no effect: give one or the other")


def told(part: Sublayer, needed: bool, by: str, what: str) -> Sublayer:
    """``part``, where its block's code tells what the method needs to know.

    Raises:
        ValueError: naming the block, and what to name by targets instead.
    """
    if not needed:
        raise ValueError(
            f"{by}: the code of {part.block!r} does not tell where what {part.last!r} returns is added to the stream, "
            f"or goes on after that: name {what} by targets"
        )
    return part


def targeted(model: nn.Module, targets: Sequence[str], exclude: Sequence[str], layers: str) -> list[tuple[str, int]]:
    """(name, width of what it returns) of the modules that are named."""
    return [(n, width_of(model, n)) for n, _ in find(model, targets, nn.Module, exclude=exclude, layers=layers)]


def width_of(model: nn.Module, name: str) -> int:
    """As a linear layer, a norm, the block around it, or else its last linear layer says.

    Raises:
        ValueError: none of these.
    """
    named, inside = dict(modules(model)), arch.blocks(model)
    if arch.is_linear(named[name]):
        return hosts.shape(named[name])[0]
    around = [named[p] for p in (name, *arch.parents(name)) if p in inside][:1]
    widths = [w for m in (named[name], *around) if (w := stream_width(m))]
    layers = [hosts.shape(m)[0] for _, m in modules(named[name]) if arch.is_linear(m)]
    if not widths and not layers:
        raise ValueError(
            f"{name!r}, a {type(named[name]).__name__}, holds no linear layer or norm to tell its width by"
        )
    return [*widths, *layers[::-1]][0]
