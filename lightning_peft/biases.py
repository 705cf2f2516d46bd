"""Biases that a merge gave to layers without one, on disk: the model's class builds no place for them by itself."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft.find import nearest

FILE = "model.safetensors"


def save(model: Any, folder: Path, names: list[str]) -> None:
    """Write a transformers model whose layers ``names`` have biases that its config does not tell of.

    In transformers' own format where switches of the config, such as Llama's ``attention_bias``, build them; what they
    build beside is zeros. Else the state dict alone, without a config: ``from_pretrained`` would drop the biases.
    """
    config = copy.deepcopy(model.config)
    switches = [k for k, v in vars(config).items() if "bias" in k and v is False]
    for switch in switches:
        setattr(config, switch, True)
    with torch.device("meta"):
        whole: Any = type(model)(config).to(model.dtype)
    held, places = model.state_dict(), whole.state_dict()
    extra = places.keys() - held.keys()
    if held.keys() <= places.keys() and all(k.endswith(".bias") for k in extra):
        zeros = {k: torch.zeros(places[k].shape, dtype=model.dtype) for k in extra}
        whole.generation_config = getattr(model, "generation_config", None)
        whole.save_pretrained(folder, state_dict=held | zeros)
        warnings.warn(f"{len(names)} layers, first {names[0]!r}, had no bias and now have one: the merged model's "
                      f"config sets {', '.join(switches)}", stacklevel=3)  # fmt: skip
        return
    tensors = {k: t.contiguous().clone() for k, t in held.items()}
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    warnings.warn(f"{len(names)} layers, first {names[0]!r}, had no bias and now have one, which no config of "
                  f"{type(model).__name__} can say: the merged folder holds the state dict alone; read it with "
                  "lightning_peft.biases.load(base, folder)", stacklevel=3)  # fmt: skip


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Load a merged model's state dict into its untouched base, which gets the biases that the file has beyond it.

    Raises:
        ValueError: tensors of the file that have no place in the model, or places that it does not fill.
    """
    tensors = load_file(Path(folder) / FILE)
    have = model.state_dict()
    for key, t in tensors.items():
        name, _, last = key.rpartition(".")
        if key not in have and last == "bias" and f"{name}.weight" in have:
            host: Any = model.get_submodule(name)
            host.bias = nn.Parameter(_like(t, host.weight), requires_grad=host.weight.requires_grad)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    shared = {t.data_ptr() for k, t in model.state_dict().items() if k in tensors}
    missing = [k for k in missing if model.state_dict()[k].data_ptr() not in shared]  # tied: loaded by another name
    if missing or unexpected:
        what = (
            f"lacks {missing[0]!r}" if missing else f"has {unexpected[0]!r}, nearest {nearest(unexpected[0], have, 1)}"
        )
        raise ValueError(f"{folder} {what}: is it another base?")
    return model


def _like(t: Tensor, weight: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=weight.dtype, device=weight.device)
