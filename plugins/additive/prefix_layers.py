"""A prefix layer by layer: the self-attention modules that read it, how to hide it from one, which are causal."""

import abc
from typing import Any

import torch
from lightning_peft_plugins.additive import soft
from lightning_peft_plugins.additive.sublayers import sublayers
from torch import Tensor, nn

from lightning_peft import Adapter, Base
from lightning_peft.attach import accepts, by_name, modules

MASKS = ("attention_mask", "mask")


def attentions(host: nn.Module, by: str, layers: str = "") -> dict[int, Any]:
    """Layer of the cache -> self-attention module, in the blocks that are chosen.

    Raises:
        ValueError: a block whose attention is not recognised, or one that does not say which layer it is.
    """
    parts = sublayers(host, ("attention",), by, layers=layers)
    found: dict[str, Any] = {part.reads: host.get_submodule(part.reads) for part in parts}
    if unsaid := [n for n, m in found.items() if not isinstance(getattr(m, "layer_idx", None), int)]:
        raise ValueError(
            f"{by}: {unsaid[0]!r} has no layer_idx, by which its keys and values would be known in the cache, so its "
            "layer cannot be told from the others"
        )
    return {m.layer_idx: m for m in found.values()}


class InLayer(Adapter, abc.ABC):
    """On one self-attention module; ``num_tokens`` keys and values of a prefix lie first in its layer of the cache."""

    def __init__(self, host: Any, num_tokens: int) -> None:
        super().__init__()
        self.names, self.layer, self.num_tokens = accepts(host), host.layer_idx, num_tokens

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name."""
        return by_name(self.names, args, kwargs)

    def kept(self, call: dict[str, Any]) -> Any:
        """The layer of the cache that the call brings; its keys and values are (batch, heads, seen, width)."""
        cache: Any = call.get("cache", call.get("past_key_values"))
        return getattr(cache, "self_attention_cache", cache).layers[self.layer]


class Hidden(InLayer):
    """Keeps its attention from looking at the prefix, whose place in the cache every layer has to fill."""

    def __init__(self, host: Any, num_tokens: int) -> None:
        super().__init__(host, num_tokens)
        if "position_bias" in self.names:
            raise ValueError(
                f"a {type(host).__name__} takes its mask from the layer before, so a prefix cannot be left out of "
                "single layers of it: leave layers empty"
            )

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        call = self.call(args, kwargs)
        name = next(n for n in MASKS if n in self.names)
        kind = getattr(getattr(base.host, "config", None), "_attn_implementation", "eager")
        if kind not in ("eager", "sdpa"):
            raise ValueError(f"a prefix in some layers alone takes attention 'eager' or 'sdpa', this is {kind!r}")
        mask, x = call.get(name), call["hidden_states"]
        if mask is None:  # where every key may be looked at: of an encoder, or by the one new token
            mask = x.new_zeros(1, 1, x.shape[1], self.kept(call).get_seq_length() + x.shape[1])
        return base(**call | {name: self.hiding(mask)})

    def hiding(self, mask: Tensor) -> Tensor:
        """The mask (batch, 1, queries, keys), added to scores or True where a key is seen, without the first keys."""
        first = torch.arange(mask.shape[-1], device=mask.device) < self.num_tokens
        return mask & ~first if mask.dtype == torch.bool else mask.masked_fill(first, torch.finfo(mask.dtype).min)


def both_ways(model: nn.Module, by: str) -> tuple[list[Any], set[nn.Module]]:
    """The transformers of text that are known to look at later positions too, and all modules in such ones.

    What does not say whether it is causal is not among them.
    """
    if not any({"inputs_embeds", "attention_mask"} <= set(accepts(m)) for _, m in modules(model)):
        return [], set() if causal(model) else set(model.modules())  # images have no mask
    encoder, decoder = soft.stacks(model, by)
    if encoder is not decoder:
        return [encoder], set(encoder.modules())
    return ([], set()) if causal(encoder) else ([encoder], set(model.modules()))


def causal(model: nn.Module) -> bool:
    """Some attention says that it is, or none says anything."""
    said = [m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return not said or any(said)
