"""What LoHa and LoKr share: the core tensor of a convolution, and huggingface/peft's folder."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import hf, hosts

HF_FIELDS = ("r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d", "init_weights")


def kernel(host: Any) -> int:
    """Places in the kernel of a convolution; 1 for any other layer."""
    return math.prod(host.kernel_size) if hosts.kind(host) == "conv" else 1


def through_core(T: Tensor, C: Tensor) -> Tensor:
    """(r, channels * kernel) of the core T (r, r, kernel) and C (r, channels): FedPara's proposition 3."""
    return torch.einsum("ijk,jc->ick", T, C).flatten(1)


def core_to_hf(T: Tensor, host: Any) -> Tensor:
    """The core in peft's shape, which has two sides for a Conv1d, too."""
    sides = tuple(host.kernel_size)
    return T.view(*T.shape[:2], *(sides if len(sides) == 2 else (*sides, 1)))


def to_hf(method: Any, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(fields, tensors) in peft for adapters that have ``r``, ``scale`` and ``to_hf``.

    Raises:
        ValueError: a layer that peft's method cannot adapt, or adapts in another way.
    """
    held: dict[str, tuple[Any, Any]] = {name: (host, a) for name, host, a in method.adapters(model)}
    for name, (host, _) in held.items():
        if hosts.is_conv1d(host) or isinstance(host, nn.Conv3d):
            what = "transformers' Conv1D" if hosts.is_conv1d(host) else "Conv3d"
            raise ValueError(f"{name}: huggingface/peft's {type(method).__name__} has no {what}")
        if getattr(host, "padding_mode", "zeros") != "zeros":
            raise ValueError(
                f"{name}: huggingface/peft computes something else for a convolution with padding_mode="
                f"{host.padding_mode!r}: it pads with zeros what it adds"
            )
    fields = hf.write_ranks(model, {n: (a.r, a.scale * a.r) for n, (_, a) in held.items()}, method.r, method.alpha)
    fields |= {"alpha": fields.pop("lora_alpha"), "use_effective_conv2d": method.core, "init_weights": True}
    return fields, {f"{hf.PREFIX}{n}.{k}": t for n, (host, a) in held.items() for k, t in a.to_hf(n, host).items()}


def from_hf(config: dict[str, Any], model: nn.Module, held: dict[str, int]) -> dict[str, Any]:
    """Options of a method of ours; ``held`` is module name -> rank for all that the file adapts."""
    return hf.read_ranks(model, config | {"lora_alpha": config.get("alpha", 8)}, held)
