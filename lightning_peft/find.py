"""Find the modules or parameters that a method targets, by name pattern or by role, and say so where none is."""

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn

from lightning_peft import arch, hosts
from lightning_peft.attach import modules

Types = type | tuple[type, ...] | tuple[str, ...]


def matches(name: str, pattern: str) -> bool:
    """A glob on the whole dotted name; without a wildcard also a suffix of it: "q_proj", "self_attn.q_proj"."""
    return fnmatch.fnmatchcase(name, pattern) or ("*" not in pattern and name.endswith("." + pattern))


def exact(name: str) -> str:
    """The pattern for this dotted name alone: as a plain pattern, "fc" also means "block.fc"."""
    return f"[{name[0]}]{name[1:]}"


def nearest(word: str, known: Collection[str], n: int = 3) -> str:
    """The known names most like ``word``, whole or in their last parts, as text for a message; "-" where none is."""
    tails = {k.rsplit(".", 1)[-1] for k in known} | set(known)
    near = difflib.get_close_matches(word.lstrip("*."), sorted(tails), n, cutoff=0.4)
    return ", ".join(repr(w) for w in near or sorted(tails)[:n]) or "-"


def find(
    model: nn.Module,
    targets: Sequence[str],
    types: Types = nn.Linear,
    *,
    exclude: Sequence[str] = (),
    layers: str = "",
) -> list[tuple[str, Any]]:
    """Modules (or, with ``types=nn.Parameter``, parameters) that any target names, in the model's order.

    Args:
        model: where to look; adapters already attached are not looked into.
        targets: globs on dotted names ("*.q_proj"), name suffixes ("q_proj"), or roles of modules: "all-linear",
            "attention", "mlp" (see ``arch.role``). A role leaves out modules whose weight is being trained in full.
            Where parameters are looked for, a name or role of a module means those in it.
        types: class, or tuple of classes, that a match must have; or kinds of host, as in ``Traits.hosts``:
            "linear", "conv1d", "embedding", "conv".
        exclude: patterns of names to leave out.
        layers: blocks of the model's stacks to keep, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.

    Raises:
        ValueError: a target or an exclusion that names nothing, an unknown block, or a match that cannot be adapted.
    """
    named = _named(model, types)
    hits: dict[str, Any] = {}
    for target in targets:
        found = _match(model, target, named, types)
        hits |= {name: named[name] for name in found}
    dropped = {n for pattern in exclude for n in _excluded(pattern, hits)}
    kept = {n for n in hits if n not in dropped}
    if layers:
        kept &= set(arch.select_layers(model, kept, layers))
    if not kept:
        raise ValueError(
            f"targets {list(targets)} leave nothing: {len(hits)} matched, {len(dropped)} excluded by {list(exclude)}"
            + (f", the rest outside layers {layers!r}" if layers else "")
        )
    if types is not nn.Parameter:  # parameters are read there like anywhere
        _refuse_bypassed(model, kept)
    return [(n, x) for n, x in named.items() if n in kept]


def _named(model: nn.Module, types: Types) -> dict[str, Any]:
    if types is nn.Parameter:
        return {(f"{n}.{p}" if n else p): x for n, m in modules(model) for p, x in m.named_parameters(recurse=False)}
    return {name: m for name, m in modules(model) if name and _is(m, types)}


def _is(module: nn.Module, types: Types) -> bool:
    several = types if isinstance(types, tuple) else (types,)
    return any(isinstance(module, t) if isinstance(t, type) else hosts.kind(module) == t for t in several)


def _match(model: nn.Module, target: str, named: dict[str, Any], types: Types) -> list[str]:
    if types is nn.Parameter:
        found = _parameters(model, target, named)
    elif target in arch.ROLES:
        in_role = [n for n in arch.role(model, target) if n in named]
        found = [n for n in in_role if not _trained_in_full(named[n])]
        if in_role and not found:
            raise ValueError(f"all {len(in_role)} modules of role {target!r} are trained in full, by a method before "
                             "this one in the list or by train=, so nothing is left to adapt")  # fmt: skip
    else:
        found = [n for n in named if matches(n, target)]
    if found:
        return found
    several = types if isinstance(types, tuple) else (types,)
    what = " or ".join(t if isinstance(t, str) else t.__name__ for t in several)
    present = arch.present_roles(model)
    around = {p for n in named for p in _parents(n)} if types is nn.Parameter else set()
    raise ValueError(
        f"no {what} matches {target!r}; nearest: {nearest(target, named.keys() | around)}"
        + (f"; roles here: {', '.join(present)}" if present else "")
    )


def _parameters(model: nn.Module, target: str, named: dict[str, Any]) -> list[str]:
    if target in arch.ROLES:
        layers = set(arch.role(model, target))
        return [n for n in named if n.rpartition(".")[0] in layers]
    return [n for n in named if any(matches(name, target) for name in (n, *_parents(n)))]


def _trained_in_full(module: object) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.requires_grad


def _excluded(pattern: str, hits: Iterable[str]) -> list[str]:
    out = [n for n in hits if matches(n, pattern) or any(matches(p, pattern) for p in _parents(n))]
    if not out:
        raise ValueError(f"exclude {pattern!r} leaves out nothing; nearest target: {nearest(pattern, list(hits))}")
    return out


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _refuse_bypassed(model: nn.Module, names: Iterable[str]) -> None:
    """nn.MultiheadAttention reads its projections' weights without calling them: an adapter there would do nothing."""
    for name in names:
        parent = name.rpartition(".")[0]
        if parent and isinstance(model.get_submodule(parent), nn.MultiheadAttention):
            raise ValueError(
                f"{name!r} lies inside an nn.MultiheadAttention, which never calls its projections, so an adapter "
                f"there would have no effect: exclude it (exclude=({parent!r},)) and target other layers"
            )
