"""Freeze a model, let methods inject into it, and take everything off again."""

import contextlib
import hashlib
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import quant, reads, surgery
from lightning_peft.attach import detach_all, modules
from lightning_peft.find import matches, nearest
from lightning_peft.method import Method

RECORD = "lightning_peft_record"
SAMPLES = 64


@dataclass(frozen=True)
class Record:
    """What ``inject`` did to a model; kept on the model, so that saving needs nothing else.

    Args:
        methods: in order of injection.
        train: names of base parameters that train along.
        base: fingerprint of the frozen base, see ``fingerprint``.
        trainable_before: names of parameters that required gradients before, for ``remove``.
    """

    methods: tuple[Method, ...]
    train: tuple[str, ...] = ()
    base: dict[str, str | None] = field(default_factory=dict)
    trainable_before: tuple[str, ...] = ()


def inject(
    model: nn.Module,
    methods: Method | Sequence[Method],
    *,
    train: Sequence[str] = (),
    stats: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Record:
    """Freeze ``model`` and inject ``methods`` in order; adapters land on the device of their host.

    Args:
        model: any module. Its weights are not written.
        methods: one method or several with different names.
        train: patterns of parameters or modules that train in full beside the adapters, such as a new head.
        stats: what each method's ``calibrate`` returned, by method name.
        dtype: of the adapters' floating tensors.

    Returns:
        the record that is kept on the model.

    Raises:
        ValueError: a name twice, a pattern that matches nothing, a method that changed nothing, adapters already
            there, or methods that do not go together.
    """
    methods = [methods] if isinstance(methods, Method) else list(methods)
    _check(model, methods)
    before = tuple(n for n, p in model.named_parameters() if p.requires_grad)
    model.requires_grad_(False)
    try:
        trained = _train(model, train)
        with _default_dtype(torch.float32):  # Trainer(precision="bf16-true") changes it while a model is being built
            for method in methods:
                _inject_one(model, method, (stats or {}).get(method.name), dtype)
        for method in methods:
            method.beside(model, [m for m in methods if m is not method])
        reads.expose(model)
    except Exception:
        _undo(model, before)
        raise
    for module in model.modules():
        if quant.kind(module):
            quant.keep_layout(module)  # bitsandbytes repacks weights on some CPUs, and then passes no gradient back
    record = Record(tuple(methods), trained, fingerprint(model), before)
    setattr(model, RECORD, record)
    return record


def _check(model: nn.Module, methods: list[Method]) -> None:
    names = [m.name for m in methods]
    if not methods:
        raise ValueError("inject needs at least one method, got none")
    for name in names:
        if not name.isidentifier():
            raise ValueError(f"a method's name becomes part of state-dict keys, so it must be a word; got {name!r}")
        if names.count(name) > 1:
            raise ValueError(f"two methods are named {name!r}: give one another, e.g. {name}_2 by its field 'name'")
    if held := find_record(model):
        have = [m.name for m in held[1].methods]
        raise ValueError(f"the model already holds adapters of {have}; lightning_peft.remove(model) takes them off")


def _inject_one(model: nn.Module, method: Method, stats: Any, dtype: torch.dtype) -> None:
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if method.traits.needs_weights and any(p.is_meta for p in model.parameters()):
        raise ValueError(f"{method.name} starts from the base's values: load the weights before injecting it")
    method.inject(model, stats)
    attached = list(method.adapters(model))
    if dtype != torch.float32:
        for _, _, adapter in attached:
            adapter.cast(dtype, None)
    on_gradients = type(method).after_backward is not Method.after_backward  # of what others let train
    if not attached and not on_gradients and {id(p) for p in model.parameters() if p.requires_grad} == trained:
        raise ValueError(f"method {method.name!r} had no effect: no adapter attached, no parameter set to train")


def _train(model: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    names = dict(model.named_parameters())
    trained: dict[str, None] = {}
    for pattern in patterns:
        hits = [n for n in names if pattern_selects(pattern, n)]
        if not hits:
            raise ValueError(f"train={pattern!r} matches no parameter; nearest: {nearest(pattern, names)}")
        trained |= dict.fromkeys(hits)
    for name in trained:
        if not names[name].is_floating_point():
            raise ValueError(f"train matches {name!r}, which is stored quantised ({names[name].dtype})")
        names[name].requires_grad_(True)
    return tuple(trained)


def unfreeze(model: nn.Module, names: Collection[str], by: str) -> None:
    """Let base parameters train: what ``inject`` of a method that adds no tensors ends with.

    Args:
        model: whose parameters arrived frozen.
        names: dotted names of parameters; of tied ones any.
        by: name of the method, for messages.

    Raises:
        ValueError: a parameter that is stored quantised.
    """
    chosen = {n: model.get_parameter(n) for n in names}
    for name, p in chosen.items():
        if not p.is_floating_point():
            raise ValueError(f"{by} would train {name!r}, which is stored quantised ({p.dtype}): leave it out")
        p.requires_grad_(True)
    shared = {id(p): n for n, p in chosen.items()}
    tied = {n: shared[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if id(p) in shared}
    if other := next((n for n in tied if n not in chosen), None):
        warnings.warn(f"{by} trains {tied[other]!r}, and with it {other!r}: they are tied", stacklevel=3)
    if half := next((n for n, p in chosen.items() if p.dtype in (torch.float16, torch.bfloat16)), None):
        warnings.warn(
            f"{by} trains weights of the model as they are, such as {half!r} in {chosen[half].dtype}: small steps "
            "round to nothing there (bfloat16 has nothing between 1 and 1.0078); prefer a float32 model and bf16-mixed",
            stacklevel=3,
        )


def pattern_selects(pattern: str, parameter: str) -> bool:
    """True where ``pattern`` matches the parameter's dotted name or that of a module it lies in."""
    parts = parameter.split(".")
    return any(matches(".".join(parts[:i]), pattern) for i in range(len(parts), 0, -1))


def remove(model: nn.Module) -> None:
    """Take every adapter off and let the parameters that trained before train again; weights are not written.

    Heads and channels that a method cut out are not put back, which is said in a warning: load the base anew.

    Raises:
        ValueError: nothing was injected.
    """
    held = find_record(model)
    if held is None:
        raise ValueError("nothing to remove: no method was injected into this model")
    owner = model.get_submodule(held[0])
    _undo(owner, held[1].trainable_before)
    delattr(owner, RECORD)
    if surgery.record(owner):
        warnings.warn("heads or channels were cut out of this model and stay away: load the base anew", stacklevel=2)


def _undo(model: nn.Module, trainable: Sequence[str]) -> None:
    detach_all(model)
    for name, p in model.named_parameters():
        if p.is_floating_point():
            p.requires_grad_(name in trainable)


def find_record(model: nn.Module) -> tuple[str, Record] | None:
    """(name of the submodule that holds it, record), "" for the model itself; None where nothing was injected."""
    for name, module in model.named_modules():
        if isinstance(held := vars(module).get(RECORD), Record):
            return name, held
    return None


def penalty(model: nn.Module) -> Tensor | None:
    """Sum of the loss terms of the methods injected into ``model``; None where no method has one.

    The callback adds it under automatic optimization. Under manual optimization call it yourself in ``training_step``:
    ``loss = loss + lightning_peft.penalty(self)``.
    """
    held = find_record(model)
    if held is None:
        raise ValueError("penalty: no method was injected into this model")
    owner = model.get_submodule(held[0])
    terms = [t for m in held[1].methods if (t := m.penalty(owner)) is not None]
    return sum(terms[1:], terms[0]) if terms else None


@torch.no_grad()
def fingerprint(model: nn.Module) -> dict[str, str | None]:
    """A digest of every frozen base parameter, to know the base again; cheap for any size.

    Of each tensor the name, shape and up to 64 evenly spaced values enter, rounded to bfloat16 so that the same
    checkpoint in another precision has the same print. Quantised and meta tensors give None: not compared.
    """
    prints: dict[str, str | None] = {}
    for module_name, module in modules(model):
        for name, p in module.named_parameters(recurse=False):
            if not p.requires_grad:
                key = f"{module_name}.{name}" if module_name else name
                opaque = quant.kind(module) is not None or p.is_meta or not p.is_floating_point()
                prints[key] = None if opaque else _digest(p)
    return prints


def _digest(p: Tensor) -> str:
    index = torch.linspace(0, p.numel() - 1, min(SAMPLES, p.numel()), dtype=torch.float64).long()
    values = p.detach().flatten()[index.to(p.device)].to("cpu", torch.bfloat16).view(torch.int16)
    return hashlib.sha256(repr((tuple(p.shape), values.tolist())).encode()).hexdigest()[:12]


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
