"""A transformers model that heads or channels were cut out of, as a folder that ``from_pretrained`` loads.

A config says one size for all layers, and the models' code wants some of them to fit together. So the folder holds the
smallest model that its config can express, filled up with zeros, which change nothing:

- channels: as many as the largest layer has left;
- heads: as many as the largest layer has left, or the next number that the config takes (Llama's divides the width),
  where the config has a ``head_dim`` beside it (Llama, Mistral, Qwen and the like); elsewhere (BERT, RoBERTa, OPT,
  GPT-2) all that there were, in their old places.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import surgery
from lightning_peft.parts import MLP, Attention, attentions, mlps

_CHANNELS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim")
Parts = dict[str, Attention | MLP]


def save(model: Any, folder: str | Path) -> dict[str, int]:
    """Write config and weights of a cut transformers model without adapters.

    Args:
        model: of transformers, after ``surgery.cut``; it is not changed.
        folder: to write into.

    Returns:
        the sizes that the config was given, by field.

    Raises:
        ValueError: no config of its class gives a model that the cut one fits into.
    """
    for sizes in _candidates(model):
        config = copy.deepcopy(model.config)
        for name, size in sizes.items():
            setattr(config, name, size)
        whole = _empty(model, config)
        if whole is not None and _fits(model, whole):
            whole.generation_config = getattr(model, "generation_config", None)
            whole.save_pretrained(folder, state_dict=_filled(model, whole))
            return sizes
    raise ValueError(
        f"this {type(model).__name__} was cut to sizes that no config of its class can say, so it cannot be a plain "
        "transformers folder: lightning_peft.save keeps it as an adapter of its base"
    )


def _candidates(model: Any) -> Iterator[dict[str, int]]:
    """Sizes to try in the config, the smallest model first; the last is that of the uncut one."""
    heads, config = attentions(model), model.config
    most = max((m.channels for m in mlps(model)), default=0)
    channels = {name: most for name in _CHANNELS if most and hasattr(config, name)}
    if heads and hasattr(config, "head_dim"):
        largest = max(heads, key=lambda a: a.units)
        each = largest.heads // largest.units
        for units in range(largest.units, config.num_attention_heads // each):
            sizes = {"num_attention_heads": units * each, "num_key_value_heads": units, "head_dim": largest.head_dim}
            yield {k: v for k, v in sizes.items() if hasattr(config, k)} | channels
    yield channels
    yield {}


def _empty(model: Any, config: Any) -> Any:
    """A model of the same class on the meta device; None where its code refuses the sizes."""
    try:
        config.validate()
        with torch.device("meta"):
            return type(model)(config).to(model.dtype)
    except Exception:  # ValueError of the model's code, an error of huggingface_hub's own of the config's: both say no
        return None


def _parts(model: nn.Module) -> Parts:
    return {f"{type(p).__name__} {p.name}": p for p in [*attentions(model), *mlps(model)]}


def _fits(model: nn.Module, whole: nn.Module) -> bool:
    """Every part is in the whole one, no smaller and of the same width; all else has the same shape."""
    mine, theirs = _parts(model), _parts(whole)
    if mine.keys() != theirs.keys():
        return False
    if any(p.units > theirs[k].units or p.width != theirs[k].width for k, p in mine.items()):
        return False
    sliced = {layer for part in mine.values() for layer in surgery.slices(part, torch.arange(part.units))}
    small, large = model.state_dict(), whole.state_dict()
    rest = [k for k in small if k.rpartition(".")[0] not in sliced]
    return small.keys() == large.keys() and all(small[k].shape == large[k].shape for k in rest)


@torch.no_grad()
def _filled(model: nn.Module, whole: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``whole``: tensors of ``model``, those that were cut in the middle of zeros."""
    held, record = model.state_dict(), surgery.record(model)
    shapes = {k: t.shape for k, t in whole.state_dict().items()}
    theirs = _parts(whole)
    for key, part in _parts(model).items():
        kept = record["heads" if isinstance(part, Attention) else "channels"].get(part.name, range(part.units))
        at = kept if max(kept) < theirs[key].units else range(part.units)  # in their old places where these are there
        for layer, (_, index) in surgery.slices(theirs[key], torch.tensor(list(at))).items():
            for name in (f"{layer}.weight", f"{layer}.bias"):
                if name in held and (t := held[name]).shape != (shape := shapes[name]):
                    dim = next(d for d, n in enumerate(shape) if n != t.shape[d])  # a cut goes through one of them
                    held[name] = t.new_zeros(shape).index_copy_(dim, index.to(t.device), t)
    return held
