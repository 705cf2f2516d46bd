"""How huggingface/peft names what it adapts: target_modules, rank_pattern and the like, modules_to_save.

Its rules, as of 0.18 to 0.21: a list of targets holds whole dotted names or ends of them from a dot on, a string is a
regular expression for the whole name; a pattern's key is a regular expression for such an end; an entry of
modules_to_save is any end of a name, dot or not.
"""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_peft.arch import ROLES
from lightning_peft.attach import adapters, modules
from lightning_peft.find import exact

V = TypeVar("V", int, float)

# Fields of every type's config that say nothing about the adapter, and those that say where it is.
COMMON = ("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
          "inference_mode", "runtime_config", "megatron_core", "qalora_group_size", "modules_to_save")  # fmt: skip
PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


UNCALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # peft cannot wrap these

# Part of a transformers model's class name -> (peft's task type, ends of names that it then trains in full).
TASKS = {
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", ()),
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
}


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
                f"adapter_config.json sets {field}={config[field]!r}, which method {method!r} does not have; what would "
                f"read it is a plugin {plugin!r} with Traits(hf='{config.get('peft_type')}:{field}'), not installed here"
            )


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


def number(x: float) -> int | float:
    """Rounded where a product undid a quotient, and an int where it is whole, as peft types its alpha."""
    x = round(float(x), 9)
    return int(x) if x.is_integer() else x


def targeted(config: Mapping[str, Any], name: str) -> bool:
    """Whether the config's ``PLACES`` name this module; never so for "all-linear" and None, which depend on the model."""
    target, exclude = config.get("target_modules"), config.get("exclude_modules") or []
    if _names(exclude, name) or _excluded(name, config.get("modules_to_save") or []):
        return False
    if target is None or not _names(target, name):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(target, str) or layers is None or layers == []:
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


def _excluded(name: str, modules_to_save: Iterable[str]) -> bool:
    """Whether peft leaves this module unadapted, as one that modules_to_save trains in full or a part of one."""
    return any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in modules_to_save)


def modules_to_save(
    model: nn.Module, train: Collection[str], hosts: list[str], views: Mapping[str, Tensor]
) -> list[str]:
    """Names of the outermost modules that are trained as a whole, and of those that peft takes along by their name.

    Raises:
        ValueError: something else is trained, or one of them holds a host of an adapter.
    """
    known = {id(p) for n, p in model.named_parameters() if n in train}
    whole: list[str] = []
    for name, module in modules(model):  # parents come first
        if name and not isinstance(module, UNCALLED) and not any(name.startswith(f"{w}.") for w in whole):
            params = [id(p) for p in module.parameters()]
            whole += [name] if params and known.issuperset(params) else []
    held = known & {id(p) for name in whole for p in model.get_submodule(name).parameters()}
    held |= {id(v if v._base is None else v._base) for v in views.values()}
    held |= {id(p) for _, _, adapter in adapters(model) for p in adapter.parameters()}
    if left := [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]:
        raise ValueError(
            f"{len(left)} trained parameters cannot be expressed in a peft folder, first {left[0]!r}: its "
            "modules_to_save holds modules that are trained as a whole; lightning_peft.save keeps them"
        )
    names = [n for n, _ in modules(model) if n and not any(n.startswith(f"{w}.") for w in whole)]
    taken = [n for n in names if n not in whole and n.endswith(tuple(whole))] if whole else []
    if both := [h for h in hosts if _excluded(h, [*whole, *taken]) or h in taken]:
        raise ValueError(f"peft cannot both adapt {both[0]!r} and train it, or what its name ends in, in full")
    if taken:
        warnings.warn(f"peft matches modules_to_save {whole} by the ends of names, so {taken} are saved too and would "
                      "train if the fit went on there", stacklevel=3)  # fmt: skip
    return whole + taken


def task_type(model: nn.Module, saved: list[str]) -> str | None:
    """peft's task type of a transformers model; None for others, and where it would train a head that is frozen here."""
    name = next((c.__name__ for c in type(model).__mro__ if c.__module__.startswith("transformers.")), "")
    task, heads = next((v for end, v in TASKS.items() if end in name), (None, ()))
    if task == "SEQ_2_SEQ_LM" and not getattr(model.config, "is_encoder_decoder", False):
        return None  # image-to-text and the like
    forced = [n for n, _ in modules(model) if heads and n.endswith(heads)]
    inside = [f for f in forced if any(f == s or f.startswith(f"{s}.") for s in saved)]
    return task if len(inside) == len(forced) else None
