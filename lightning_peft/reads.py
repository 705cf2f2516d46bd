"""Layers whose weight a model's code reads without calling them, as fused kernels do: there it reads the adapted one.

``MambaMixer.forward`` of transformers hands ``self.x_proj.weight`` to its fused kernel, WavLM's attention its
projections' weights to torch's function. An adapter that only wraps the layer's call would do nothing there.
"""

import ast
import functools
import inspect
import textwrap
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lightning_peft import quant
from lightning_peft.adapter import WeightAdapter
from lightning_peft.attach import attached, is_adapted, modules, show

_SETS_UP = ("__init__", "_init", "init", "reset", "_reset", "tie", "_tie")  # beginnings of functions no forward calls
_FACTS = ("dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad", "is_meta")  # no values


def expose(model: nn.Module) -> None:
    """Let every adapted layer that is read without being called give its adapted weight and bias to who reads them.

    Warns where an adapter, or its dropout, acts on the call alone. Quantised layers are left as they are: code that
    reads their packed weight as a matrix fails without adapters too.
    """
    lost: dict[str, list[str]] = {}
    for owner, module in list(modules(model)):
        for path in read_without_call(_own_class(module)):
            host = _at(module, path)
            if is_adapted(host) and not quant.kind(host):
                name = f"{owner}.{path}" if owner else path
                shown = show(host)
                for tag, adapter in attached(host).items():
                    if reason := _lost(adapter, shown):
                        lost.setdefault(f"{reason} of {tag!r}", []).append(name)
    for what, names in lost.items():
        warnings.warn(
            f"the weight of {names[0]!r} ({len(names)} such) is read without calling the layer, by a fused kernel for "
            f"example; {what} acts only where the layer is called",
            stacklevel=3,
        )


def _lost(adapter: Any, shown: bool) -> str:
    """What of an adapter a reader of the weight does not see."""
    if not shown or not isinstance(adapter, WeightAdapter):
        return "the adapter"
    return "the dropout" if getattr(adapter, "dropout", 0) else ""


def _own_class(module: nn.Module) -> type[nn.Module]:
    return type(module).__mro__[1] if is_adapted(module) else type(module)


def _at(module: Any, path: str) -> Any:
    """The module at a dotted path; None where a model of this configuration has none."""
    for part in path.split("."):
        module = getattr(module, part, None)
    return module if isinstance(module, nn.Module) else None


@functools.cache
def read_without_call(cls: type[nn.Module]) -> tuple[str, ...]:
    """Dotted paths of the children whose ``weight`` or ``bias`` the code of ``cls`` reads, in order of first mention.

    Reading a dtype or shape does not count. Of torch's own modules none: adapters inside nn.MultiheadAttention are
    refused by ``find``, and the fused path of nn.TransformerEncoderLayer is off where there are adapters.
    """
    if cls.__module__.startswith("torch."):
        return ()
    found: dict[str, None] = {}
    for base in cls.__mro__:
        for name, member in vars(base).items():
            if inspect.isfunction(member) and not name.startswith(_SETS_UP):
                found |= dict.fromkeys(_paths(inspect.unwrap(member)))
    return tuple(found)


def _paths(function: Callable[..., Any]) -> Iterator[str]:
    names = getattr(function, "__code__", None)
    if names is None or not {"weight", "bias"} & set(names.co_names):
        return
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # made at run time, or a lambda inside an expression: no source to read
        return
    parent = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("weight", "bias") and isinstance(node.ctx, ast.Load):
            words = ast.unparse(node.value).split(".")
            plain = words[0] == "self" and len(words) > 1 and all(w.isidentifier() for w in words)
            if plain and not _only_a_fact(parent[node]):
                yield ".".join(words[1:])


def _only_a_fact(user: ast.AST) -> bool:
    """True for ``weight.dtype``, ``isinstance(weight, ...)`` and ``weight is None``, which read no values."""
    if isinstance(user, ast.Attribute):
        return user.attr in _FACTS
    if isinstance(user, ast.Call):
        return isinstance(user.func, ast.Name) and user.func.id in ("isinstance", "hasattr", "getattr", "id")
    return isinstance(user, ast.Compare) and isinstance(user.ops[0], ast.Is | ast.IsNot)
