"""How huggingface/peft names what it adapts: target_modules, rank_pattern and the like, modules_to_save.

Its rules, as of 0.21: a list of targets holds whole dotted names or ends of them from a dot on, a string is a
regular expression for the whole name; a pattern's key is a regular expression for such an end; an entry of
modules_to_save is any end of a name, dot or not.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from lightning_peft import hosts
from lightning_peft.arch import ROLES
from lightning_peft.attach import modules
from lightning_peft.find import exact, find

V = TypeVar("V", int, float)

# Fields of every type's config that say nothing about the adapter, and those that say where it is.
COMMON = ("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
          "inference_mode", "runtime_config", "megatron_core", "qalora_group_size", "modules_to_save")  # fmt: skip
PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def check_fields(config: Mapping[str, Any], known: Collection[str], method: str) -> None:
    """Refuse a peft config that sets an option this method does not have.

    Args:
        config: of adapter_config.json.
        known: fields that the method reads, or that change nothing for it; COMMON and PLACES are known anyway.
        method: its name, for the message.

    Raises:
        ValueError: with the field, its value, and the plugin to look for.
    """
    off = (None, False, "", "none", [], {})
    for field in sorted(config.keys() - {*known, *COMMON, *PLACES}):
        if config[field] not in off:
            plugin = field.removeprefix("use_").removesuffix("_config")
            raise ValueError(
                f"adapter_config.json sets {field}={config[field]!r}, which method {method!r} does not have; it needs "
                f"a plugin such as {plugin!r} with Traits(hf='{config.get('peft_type')}:{field}'), none is installed"
            )


def check_start(config: Mapping[str, Any]) -> bool:
    """Whether init_lora_weights says that A was drawn from a Gaussian.

    Raises:
        ValueError: a start that rewrites the base's weights (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) or freezes a factor.
    """
    init = config.get("init_lora_weights", True)
    if init not in (True, False, "gaussian", "eva", "orthogonal"):
        raise ValueError(
            f"adapter_config.json has init_lora_weights={init!r}: that start rewrites weights of the base (or freezes "
            "a factor), and the file does not hold them. In peft, save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...) turns such an adapter into a plain LoRA"
        )
    return init == "gaussian"


def _ends(name: str) -> list[str]:
    """Ends of a dotted name, shortest first."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def shortest(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """name -> its shortest end that is no end of ``others``; "" where the whole name is one ("fc" and "block.fc")."""
    taken = {end for other in others for end in _ends(other)}
    return {name: next((end for end in _ends(name) if end not in taken), "") for name in names}


def _others(model: nn.Module, names: Collection[str]) -> list[str]:
    return [name for name, _ in modules(model) if name and name not in names]


def target_modules(model: nn.Module, names: Collection[str]) -> list[str] | str:
    """peft's ``target_modules`` that match these modules of ``model`` and no other: a list if one can, else a regex."""
    ends = shortest(names, _others(model, names))
    return sorted(set(ends.values())) if all(ends.values()) else "|".join(re.escape(n) for n in names)


def targets(model: nn.Module, names: Collection[str]) -> tuple[str, ...]:
    """``targets`` of a method of ours that match these modules of ``model`` and no other."""
    ends = shortest(names, [*_others(model, names), *ROLES])
    return tuple(dict.fromkeys(end or exact(name) for name, end in ends.items()))


def patterns(values: Mapping[str, V], default: V, *, ours: bool = False, also: Collection[str] = ()) -> dict[str, V]:
    """Patterns for the modules whose value is not the default, as in peft's rank_pattern.

    Args:
        values: module name -> value, of all the modules that are adapted.
        default: what a module without a pattern gets.
        ours: write patterns as our methods read them, not regular expressions.
        also: modules to write a pattern for although theirs is the default.
    """
    out: dict[str, V] = {}
    for value in dict.fromkeys(values.values()):
        names = [n for n, v in values.items() if v == value and (v != default or n in also)]
        for name, end in shortest(names, [n for n, v in values.items() if v != value]).items():
            out[(end or exact(name)) if ours else (re.escape(end) if end else f"^{re.escape(name)}")] = value
    return out


def lookup(patterns: Mapping[str, V] | None, name: str, default: V) -> V:
    """The value that peft takes for a module: that of the first pattern which is a regex for an end of its name."""
    return next((v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", name)), default)


def write_ranks(model: nn.Module, held: Mapping[str, tuple[int, float]], r: int, alpha: float) -> dict[str, Any]:
    """peft's fields for what is adapted, at which rank, and scaled by which alpha.

    Args:
        model: that holds the adapters.
        held: module name -> (rank, alpha).
        r, alpha: the method's own, written as the defaults.
    """
    return {
        "r": r,
        "lora_alpha": _number(alpha),
        "target_modules": target_modules(model, held),
        "rank_pattern": patterns({name: rank for name, (rank, _) in held.items()}, r),
        "alpha_pattern": patterns({name: _number(a) for name, (_, a) in held.items()}, _number(alpha)),
    }


def read_ranks(model: nn.Module, config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The way back: ``r``, ``alpha``, ``targets``, ``rank_pattern`` and ``alpha_pattern`` of a method of ours.

    Args:
        model: the base.
        config: peft's.
        ranks: module name -> rank of its tensors in the file.

    Raises:
        ValueError: the config gives a module another rank than its tensors have, so its scale is not known; a module
            without a weight of ours.
    """
    if not ranks:
        raise ValueError(
            f"no tensor of the file belongs to a module of this {type(model).__name__}: is it another base?"
        )
    r, alpha = config.get("r", 8), float(config.get("lora_alpha", 8))
    for name, rank in ranks.items():
        if (said := lookup(config.get("rank_pattern"), name, r)) != rank:
            raise ValueError(f"adapter_config.json gives {name!r} the rank {said}, its tensors have {rank}")
    find(model, [exact(name) for name in ranks], ("linear", "conv1d", "embedding", "conv"))
    wide = {name for name in ranks if r > min(hosts.shape(model.get_submodule(name)))}  # ours would clamp it
    alphas = {name: float(lookup(config.get("alpha_pattern"), name, alpha)) for name in ranks}
    return {
        "r": r,
        "alpha": alpha,
        "targets": targets(model, ranks),
        "rank_pattern": patterns(ranks, r, ours=True, also=wide),
        "alpha_pattern": patterns(alphas, alpha, ours=True),
    }


def _number(x: float) -> int | float:
    """Rounded where a product undid a quotient, and an int where it is whole, as peft types its alpha."""
    x = round(float(x), 9)
    return int(x) if x.is_integer() else x


def targeted(config: Mapping[str, Any], name: str) -> bool:
    """Whether the config's ``PLACES`` name this module; "all-linear" and None, which ask the model, name none."""
    target, exclude = config.get("target_modules"), config.get("exclude_modules") or []
    if _names(exclude, name) or saved_below(name, config.get("modules_to_save") or []):
        return False
    if target is None or not _names(target, name):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(target, str) or name in target or layers is None or layers == []:  # a whole name goes before layers
        return True
    stacks = config.get("layers_pattern")
    stacks = [stacks] if isinstance(stacks, str) else stacks
    before = [rf"(?:^|.*?\.){s}" for s in stacks] if stacks else [r".*?\.[^.]*"]
    block = next((m for b in before if (m := re.match(rf"{b}\.(\d+)\.", name))), None)
    return block is not None and int(block[1]) in ([layers] if isinstance(layers, int) else layers)


def _names(target: str | Sequence[str], name: str) -> bool:
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    return any(name == t or name.endswith("." + t) for t in target)


def saved_below(name: str, modules_to_save: Iterable[str]) -> bool:
    """Whether peft leaves this module unadapted, as one that modules_to_save trains in full or a part of one."""
    return any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in modules_to_save)
