"""Adapters whose change is a product of two thin factors, turned into plain LoRA where nothing else can read them."""

from typing import Any

import torch
from lightning_peft_plugins.reparameterized.lora import LoRA, LoRALinear
from torch import Tensor, nn

from lightning_peft import Method, hf, hosts, inject, remove
from lightning_peft.inject import find_record


def convert(method: Method, model: nn.Module) -> LoRA:
    """Put LoRA with the same weight in the place of ``method``, whose adapters have ``factors``: A (r, in), B (out, r).

    What trained in full stays as it is; ``lightning_peft.save`` and ``hf.save`` then write a LoRA. It has no dropout.
    Ranks whose row of A is zero are left out, and so are layers without any other.

    Args:
        method: that was injected, alone.
        model: that was injected into, or one that holds it.

    Raises:
        ValueError: other methods beside it, or none at all; nothing but zeros.
    """
    held = find_record(model)
    if held is None or list(held[1].methods) != [method]:
        names = [m.name for m in held[1].methods] if held else "none"
        raise ValueError(f"{method.name} becomes a plain LoRA where it is alone; the methods of this model: {names}")
    owner = model.get_submodule(held[0])
    factors = {name: _factors(a) for name, _, a in method.adapters(owner)}
    factors = {name: (A, B) for name, (A, B) in factors.items() if len(A)}
    ranks = {name: len(A) for name, (A, _) in factors.items()}
    if not ranks:
        raise ValueError(f"{method.name} changes nothing yet, so there is no LoRA to make of it: train it first")
    r = max(ranks.values())
    wide = [n for n in ranks if r > min(hosts.shape(owner.get_submodule(n)))]  # LoRA would clamp it
    lora = LoRA(
        r=r,
        alpha=float(r),
        targets=hf.targets(owner, ranks),
        rank_pattern=hf.patterns(ranks, r, ours=True, also=wide),
        alpha_pattern=hf.patterns({n: float(rank) for n, rank in ranks.items()}, float(r), ours=True),
    )
    remove(owner)
    inject(owner, lora, train=held[1].train)
    with torch.no_grad():
        for name, _, adapter in lora.adapters(owner):
            for key, factor in zip("AB", factors[name], strict=True):
                adapter.get_parameter(key).copy_(factor)
    return lora


def _factors(adapter: Any) -> tuple[Tensor, Tensor]:
    A, B = (f.detach() for f in adapter.factors())
    kept = A.any(dim=1)
    scale = adapter.scale if isinstance(adapter, LoRALinear) else 1.0  # which keeps it apart from its factors
    return scale * A[kept], B[:, kept]
