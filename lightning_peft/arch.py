"""Facts of a model, read from its structure: its stacks of blocks, the roles of its linear layers, its task heads."""

import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from lightning_peft import hosts
from lightning_peft.attach import is_adapted, modules

# "mixer": projections of a state-space or gated linear recurrence (Mamba, gated delta nets), which is no attention.
ROLES: tuple[str, ...] = ("all-linear", "attention", "mlp", "mixer")

# How attention modules name their (query, key, value) projections; a name used twice is a fused projection.
QKV: tuple[tuple[str, str, str], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("to_q", "to_k", "to_v"),
    ("q_attn", "c_attn", "c_attn"),
    ("c_attn", "c_attn", "c_attn"),
)

_ATTENTION = re.compile("attn|attention", re.IGNORECASE)
_HEAD = re.compile(r"(.*_)?(heads?|classifier|fc_out|fc|scores?|logits|outputs?|out|regressor|predictor)")
_PRETRAINED_HEAD = re.compile(r"qa_outputs|score|classifier|.*classification_head")


def role(model: nn.Module, name: str) -> list[str]:
    """Dotted names of the linear layers (``nn.Linear``, transformers' Conv1D) in one of ``ROLES``, in model order.

    "all-linear" is every linear layer; of a transformers model only those of its base model, without output
    embeddings and task heads. The other roles divide those that lie in ``blocks``: "attention" and "mixer" go by the
    modules around the layer, "mlp" is the rest.

    Raises:
        ValueError: an unknown role. A role that names nothing here gives an empty list.
    """
    if name not in ROLES:
        raise ValueError(f"unknown role {name!r}; known: {', '.join(ROLES)}")
    named = dict(modules(model))
    left_out = _outside_base_models(model)
    linear = [n for n in _linear(named) if id(named[n]) not in left_out]
    if name == "all-linear":
        return linear
    inside = blocks(model)
    return [n for n in linear if any(p in inside and _kind(named, p, n) == name for p in parents(n))]


def present_roles(model: nn.Module) -> list[str]:
    """The roles that would name at least one layer of this model."""
    return [name for name in ROLES if role(model, name)]


def blocks(model: nn.Module) -> dict[str, int]:
    """Names of the repeated blocks -> index in their stack, which is their parent module.

    A stack is an outermost nn.ModuleList or nn.Sequential whose children all hold linear layers; encoder and decoder
    both count from 0. In a stack of stages that hold stacks of whole blocks (Swin) each stage counts its own.
    """
    named = dict(modules(model))
    holders = {p for n in _linear(named) for p in parents(n)}
    lists = [n for n in named if _is_stack(named, n, holders)]
    stacks: list[str] = []
    for outer in _outermost(lists):
        full = [s for s in lists if _below(s, outer) and all(_is_full(named, c) for c in _children(named, s))]
        stacks += _outermost(full) or [outer]
    return {child: i for stack in stacks for i, child in enumerate(_children(named, stack))}


def select_layers(model: nn.Module, names: Iterable[str], spec: str) -> list[str]:
    """Those of ``names`` (modules or parameters) that lie in the blocks that ``spec`` chooses in each stack.

    Args:
        model: whose ``blocks`` count.
        names: dotted names; those outside every block are left out.
        spec: numbers and Python slices joined by commas: "0:6", "-4:", "0,2,11", "::2".

    Raises:
        ValueError: a malformed spec, a part of it that chooses no block of any stack, or a model without blocks.
    """
    stacks: dict[str, list[str]] = {}
    for block in blocks(model):
        stacks.setdefault(block.rpartition(".")[0], []).append(block)
    if not stacks:
        raise ValueError(f"layers {spec!r} were asked for, but this {type(model).__name__} has no stack of blocks")
    chosen: set[str] = set()
    for part in spec.split(","):
        index = _index(part, spec)
        found = {block for stack in stacks.values() for block in stack[index]}
        if not found:
            sizes = ", ".join(f"{len(stack)} in {name!r}" for name, stack in stacks.items())
            raise ValueError(f"layers {part.strip()!r} choose no block; blocks count from 0, there are {sizes}")
        chosen |= found
    return [n for n in names if n in chosen or not chosen.isdisjoint(parents(n))]


def heads(model: nn.Module) -> list[str]:
    """Names of the modules that a fine-tune initialises anew and that must therefore train.

    Of a transformers model: its direct children outside the base model, but for the pretrained output embeddings.
    Elsewhere, outside blocks: outermost modules with parameters whose name says so (head, classifier, fc_out, score).
    """
    named = dict(modules(model))
    pretrained = _pretrained(model)
    found = {n for name, module in pretrained.items() for n in _pretrained_heads(name, module)}
    body = [*pretrained, *blocks(model)]
    plain = [
        n
        for n, m in named.items()
        if _HEAD.fullmatch(n.rpartition(".")[2])
        and not any(n == b or _below(n, b) or _below(b, n) for b in body)
        and any(True for _ in m.parameters())
    ]
    found |= set(_outermost(plain))
    return [n for n in named if n in found]


def parents(name: str) -> list[str]:
    """Dotted names of the modules around ``name``, innermost first, the root ("") left out."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]


def is_linear(module: nn.Module) -> bool:
    """A layer with a weight matrix that maps the last dimension of its input."""
    return hosts.kind(module) in ("linear", "conv1d")


def _linear(named: dict[str, nn.Module]) -> list[str]:
    return [n for n, m in named.items() if n and is_linear(m)]


def _children(named: dict[str, nn.Module], name: str) -> list[str]:
    """Names of the direct children, without the adapters."""
    children = (f"{name}.{c}" if name else c for c, _ in named[name].named_children())
    return [c for c in children if c in named]


def _own_type(module: nn.Module) -> type[nn.Module]:
    return type(module).__mro__[1] if is_adapted(module) else type(module)


def _below(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(outer + "."))


def _outermost(names: Iterable[str]) -> list[str]:
    out: list[str] = []  # parents come before their children in named_modules
    for name in names:
        if not any(_below(name, o) for o in out):
            out.append(name)
    return out


def _is_stack(named: dict[str, nn.Module], name: str, holders: set[str]) -> bool:
    module, children = named[name], _children(named, name)
    if not isinstance(module, nn.ModuleList | nn.Sequential) or not children or not holders.issuperset(children):
        return False
    if any(_HEAD.fullmatch(part) for part in name.split(".")):  # of a task head, or of a whole model named like one
        return all(_is_full(named, c) for c in children)
    # A Sequential may also be a pipeline of unlike parts (encoder, pooling, head).
    return isinstance(module, nn.ModuleList) or len({_own_type(named[c]) for c in children}) == 1


def _is_full(named: dict[str, nn.Module], block: str) -> bool:
    """Holds a mixer, or attention and an MLP: a whole block, neither a sub-layer of one nor an expert."""
    kinds = {_kind(named, block, n) for n in _linear(named) if _below(n, block)}
    return "mixer" in kinds or kinds == {"attention", "mlp"}


def _kind(named: dict[str, nn.Module], block: str, layer: str) -> str:
    """The role of a linear layer in its block: "attention", "mlp" or "mixer"."""
    inside = [p for p in parents(layer) if _below(p, block)]
    around = inside or [block]  # a block that holds the layer itself, as where attention and MLP have separate lists
    if any(_is_mixer(named[p]) for p in around):
        return "mixer"
    if any(_ATTENTION.search(p.rpartition(".")[2]) for p in (layer, *inside)):
        return "attention"
    return "attention" if any(_is_attention(named[p]) for p in around) else "mlp"


def _is_mixer(module: nn.Module) -> bool:
    depthwise = any(isinstance(c, nn.Conv1d) and c.groups > 1 for c in module.children())
    return depthwise or hasattr(module, "A_log")


def _is_attention(module: nn.Module) -> bool:
    by_class = _ATTENTION.search(_own_type(module).__name__) is not None
    return by_class or any(all(hasattr(module, part) for part in names) for names in QKV)


def _index(part: str, spec: str) -> slice:
    """A slice that also stands for one number: it chooses nothing where the number is out of range."""
    if not re.fullmatch(r"\s*(-?\d+|(-?\d+)?:(-?\d+)?(:(-?[1-9]\d*)?)?)\s*", part):
        raise ValueError(f"cannot read layers {spec!r}; write slices and numbers: '0:6', '-4:', '0,2,11', '::2'")
    if ":" not in part:
        number = int(part)
        return slice(number, number + 1 or None)
    return slice(*(int(p) if p.strip() else None for p in part.split(":")))


def _pretrained(model: nn.Module) -> dict[str, Any]:
    """The transformers models at or below ``model``; none where transformers was never imported."""
    library = sys.modules.get("transformers.modeling_utils")
    return {} if library is None else {n: m for n, m in modules(model) if isinstance(m, library.PreTrainedModel)}


def _outside_base_models(model: nn.Module) -> set[int]:
    """Ids of the modules that "all-linear" leaves out; of a network without a transformers model none."""
    left_out: set[int] = set()
    pretrained = _pretrained(model)
    for module in pretrained.values():
        left_out.add(id(module.get_output_embeddings()))
        if module.base_model is not module:
            left_out |= {id(m) for m in module.modules()} - {id(m) for m in module.base_model.modules()}
    if pretrained:
        left_out |= {id(m) for name in heads(model) for m in model.get_submodule(name).modules()}
    return left_out


def _pretrained_heads(name: str, module: Any) -> Iterator[str]:
    base, output = module.base_model, module.get_output_embeddings()
    for child, part in module.named_children():
        inside = set(part.modules())
        whole = base is not module or _PRETRAINED_HEAD.fullmatch(child)  # a model that is its own base: by name
        if whole and base not in inside and output not in inside and any(True for _ in part.parameters()):
            yield f"{name}.{child}" if name else child
