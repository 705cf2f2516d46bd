"""What huggingface/peft trains in full beside an adapter: modules_to_save, and the heads a task type adds to it."""

import warnings
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from lightning_peft.attach import adapters, modules
from lightning_peft.hf_names import saved_below

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


def modules_to_save(
    model: nn.Module, train: Collection[str], hosts: list[str], views: Mapping[str, Tensor]
) -> list[str]:
    """Names of the outermost modules that are trained as a whole, and of those that peft takes along by their name.

    Raises:
        ValueError: something else is trained, or one of them holds a host of an adapter.
    """
    adapted = {id(p) for _, _, adapter in adapters(model) for p in adapter.parameters()}
    known = {id(p) for n, p in model.named_parameters() if n in train}
    whole: list[str] = []
    for name, module in modules(model):  # parents come first
        if name and not isinstance(module, UNCALLED) and not any(name.startswith(f"{w}.") for w in whole):
            params = {id(p) for p in module.parameters()} - adapted
            whole += [name] if params and known.issuperset(params) else []
    held = known & {id(p) for name in whole for p in model.get_submodule(name).parameters()}
    held |= {id(v if v._base is None else v._base) for v in views.values()}
    if left := [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held | adapted]:
        raise ValueError(
            f"{len(left)} trained parameters cannot be expressed in a peft folder, first {left[0]!r}: its "
            "modules_to_save holds modules that are trained as a whole; lightning_peft.save keeps them"
        )
    names = [n for n, _ in modules(model) if n and not any(n.startswith(f"{w}.") for w in whole)]
    taken = [n for n in names if n not in whole and n.endswith(tuple(whole))] if whole else []
    if both := [h for h in hosts if saved_below(h, [*whole, *taken]) or h in taken]:
        raise ValueError(f"peft cannot both adapt {both[0]!r} and train it, or what its name ends in, in full")
    if taken:
        warnings.warn(f"peft matches modules_to_save {whole} by the ends of names, so {taken} are saved too and would "
                      "train if the fit went on there", stacklevel=3)  # fmt: skip
    return whole + taken


def task_type(model: nn.Module, saved: list[str]) -> str | None:
    """peft's task type of a transformers model; None for others, and where peft would train a head that is frozen."""
    name = next((c.__name__ for c in type(model).__mro__ if c.__module__.startswith("transformers.")), "")
    task, heads = next((v for end, v in TASKS.items() if end in name), (None, ()))
    if task == "SEQ_2_SEQ_LM" and not getattr(model.config, "is_encoder_decoder", False):
        return None  # image-to-text and the like
    forced = [n for n, _ in modules(model) if heads and n.endswith(heads)]
    inside = [f for f in forced if any(f == s or f.startswith(f"{s}.") for s in saved)]
    return task if len(inside) == len(forced) else None
