"""What soft prompts share: the transformer they act on, and its call with more positions in front of the text."""

import abc
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Adapter, Base
from lightning_peft.attach import accepts, attached, by_name, evaluating, modules
from lightning_peft.config import record_of
from lightning_peft.hf_heads import task_type

LM_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
HF_FIELDS = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")


class SoftPrompt(Adapter, abc.ABC):
    """On a transformer whose forward takes token ids or embeddings: ``num_tokens`` positions in front of the text.

    It changes the arguments of the call, by name, and so works on the module below the heads: loss, logits and
    ``generate`` around it stay the host's own.
    """

    def __init__(self, host: Any, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.names = accepts(host)
        self.cache_name = "cache" if "cache" in self.names else "past_key_values"  # transformers before 5.24
        self.rotary = any("Rotary" in type(m).__name__ for m in host.modules())

    @abc.abstractmethod
    def vectors(self) -> Tensor:
        """What is trained, as one matrix (tokens, width)."""

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name."""
        call = by_name(self.names, args, kwargs)
        if self.cache_name == "cache" and "past_key_values" in call:
            call["cache"] = call.pop("past_key_values")
        return call

    def make_room(self, call: dict[str, Any], new: int, seen: int, inserted: bool) -> None:
        """Lengthen mask and positions of a call by ours.

        Args:
            call: arguments by name, changed in place.
            new: positions of text that the call brings.
            seen: positions that its cache holds, ours included; 0 where it holds none.
            inserted: the call also brings ours, before the text.

        Raises:
            ValueError: a mask that is not (batch, positions of the text so far).
        """
        call.pop("cache_position", None)  # counts the text alone; the host's default goes by the cache
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        if mask is not None:
            self._check_mask(mask, max(seen - self.num_tokens, 0) + new)
            if positions is None and self.rotary:
                # Rotary models need no positions for a batch padded on the left, as only distances count there; but
                # with ours in front the distance from them to the text would be longer for the shorter texts.
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
            call["attention_mask"] = F.pad(mask, (self.num_tokens, 0), value=1)
        if positions is not None:
            call["position_ids"] = self._positions(positions, mask, new) if inserted else positions + self.num_tokens

    def _check_mask(self, mask: Any, length: int) -> None:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise ValueError(
                f"{type(self).__name__} needs an attention_mask of (batch, positions) or none, got {shape}; masks of "
                "four dimensions also come from generate with a cache of fixed size: leave cache_implementation out"
            )
        if mask.shape[1] != length:
            raise ValueError(
                f"attention_mask is {shape}, but the text has {length} positions so far; it does not count the "
                f"{self.num_tokens} of {type(self).__name__}, and its cache must come from calls with the adapter"
            )

    def _positions(self, positions: Tensor, mask: Tensor | None, new: int) -> Tensor:
        """Ours begin where the text's began (at 2 in RoBERTa), the text's follow."""
        real = positions if mask is None else torch.where(mask[:, -new:] == 0, positions.amax(), positions)
        ours = real.amin(-1, keepdim=True) + torch.arange(self.num_tokens, device=positions.device)
        return torch.cat([ours, positions.expand_as(real) + self.num_tokens], -1)


def text_length(call: Mapping[str, Any]) -> int:
    """Positions of text in the call."""
    x = call.get("inputs_embeds")
    return (call["input_ids"] if x is None else x).shape[1]


def run(base: Base, call: dict[str, Any], change: Any) -> Any:
    """``change`` of what the host returns, a mapping, given back as a tuple where the caller or the config asks so."""
    as_tuple = call.get("return_dict", getattr(base.host.config, "return_dict", True)) is False
    out = change(base(**call | ({"return_dict": True} if as_tuple else {})))
    return out.to_tuple() if as_tuple else out


def stacks(model: nn.Module, by: str) -> tuple[Any, Any]:
    """The modules that read text and that write it: encoder and decoder, elsewhere twice the one transformer.

    They are the innermost ones whose forward takes ``inputs_embeds`` and an ``attention_mask``, below every head.

    Raises:
        ValueError: there is none, there are several, or a soft prompt stands there already.
    """
    named = {n: m for n, m in modules(model) if hasattr(m, "get_input_embeddings") and _takes_embeddings(m)}
    inner = [n for n in named if not any(o != n and (not n or o.startswith(f"{n}.")) for o in named)]
    pair = next((_pair(m) for n, m in reversed(named.items()) if n not in inner and _pair(m)), None)
    if not inner:
        raise ValueError(
            f"{by}: nothing in this {type(model).__name__} takes token embeddings (a forward with inputs_embeds and "
            "attention_mask, and get_input_embeddings), as transformers' text models do"
        )
    if len(inner) > 1 and (pair is None or {id(named[n]) for n in inner} != {id(m) for m in pair}):
        raise ValueError(f"{by}: {inner} could each take a soft prompt; inject into one: PEFT(..., model={inner[0]!r})")
    found = pair or (named[inner[0]], named[inner[0]])
    if taken := [t for m in found for t, a in attached(m).items() if isinstance(a, SoftPrompt)]:
        raise ValueError(f"{by}: {taken[0]!r} is a soft prompt on this model already, and one is all it can have")
    return found


def _takes_embeddings(module: Any) -> bool:
    return {"inputs_embeds", "attention_mask"} <= set(accepts(module))


def _pair(module: Any) -> tuple[Any, Any] | None:
    config = getattr(module, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return None
    encoder, decoder = module.get_encoder(), module.get_decoder()
    return (encoder, decoder) if encoder is not decoder else None


def width(host: Any) -> int:
    """Of a token's embedding."""
    return host.get_input_embeddings().weight.shape[1]


def cycled(ids: tuple[int, ...], length: int) -> list[int]:
    """Token ids, cut or repeated to ``length``."""
    return [ids[i % len(ids)] for i in range(length)]


def check(num_tokens: int, ids: tuple[int, ...], by: str) -> None:
    if num_tokens < 1:
        raise ValueError(f"{by}: num_tokens is at least 1, got {num_tokens}")
    if any(i < 0 for i in ids):
        raise ValueError(f"{by}: init_ids are ids of tokens, got {min(ids)}")


def check_ids(ids: tuple[int, ...], host: Any, by: str) -> None:
    vocabulary = host.get_input_embeddings().weight.shape[0]
    if ids and max(ids) >= vocabulary:
        raise ValueError(f"{by}: init_ids hold {max(ids)}, but the vocabulary has {vocabulary} tokens")


def new_cache(host: Any, cross: bool) -> Any:
    """An empty cache as the host makes it; ``cross``: with one for its attention to an encoder's output."""
    from transformers import DynamicCache, EncoderDecoderCache  # an optional package, which the host comes from

    own = DynamicCache(config=host.config)
    return EncoderDecoderCache(own, DynamicCache(config=host.config)) if cross else own


@torch.no_grad()
def states_of(host: Any, ids: list[int], cross: bool, by: str) -> dict[int, tuple[Tensor, Tensor]]:
    """Layer -> keys and values (1, heads, tokens, width) that the host keeps of these tokens, found by running it.

    Layers that keep none (recurrent ones, and those that share another's) are left out.
    """
    names, table = accepts(host), host.get_input_embeddings().weight
    cache = new_cache(host, cross)
    call = {"cache" if "cache" in names else "past_key_values": cache}
    if cross:
        call["encoder_hidden_states"] = table.new_zeros(1, 1, table.shape[1])
    kind = host.config._attn_implementation
    if table.is_meta:  # the other kinds ask a mask for its values
        host.config._attn_implementation = "eager"
    with evaluating(host):
        host(input_ids=torch.tensor([ids], device=table.device), **call)
    host.config._attn_implementation = kind
    layers = getattr(cache, "self_attention_cache", cache).layers
    found = {i: (x.keys, x.values) for i, x in enumerate(layers) if getattr(x, "keys", None) is not None}
    if not found:
        raise ValueError(f"{by}: {type(host).__name__} keeps no keys and values of its attention; try prompt_tuning")
    if sliding := [i for i in found if getattr(layers[i], "is_sliding", False)]:
        warnings.warn(f"{by}: layers {sliding} attend within a sliding window, so later positions of a long text do "
                      "not see the prefix there", stacklevel=4)  # fmt: skip
    return found


def added_to_scores(mask: Tensor, host: Any) -> Tensor:
    """A mask (batch, keys) in the form that encoders pass on as it is; their own would count the text alone."""
    kind = getattr(host.config, "_attn_implementation", "eager")
    if kind not in ("eager", "sdpa"):
        raise ValueError(f"a prefix on an encoder takes a mask with attention 'eager' or 'sdpa', this is {kind!r}")
    dtype = host.get_input_embeddings().weight.dtype
    return (mask[:, None, None] == 0).to(dtype) * torch.finfo(dtype).min


def to_hf(model: Any, by: str) -> dict[str, Any]:
    """Fields that all of peft's soft prompts have.

    Raises:
        ValueError: a model for which peft computes something else, as where a head reads the first or last position;
            modules trained in full.
    """
    if trained := record_of(model).train:
        raise ValueError(f"{by}: peft does not read back what is trained beside a soft prompt, here {trained[0]!r}; "
                         "lightning_peft.save keeps it")  # fmt: skip
    task = task_type(model, [])
    if task not in LM_TASKS:
        raise ValueError(
            f"{by}: of a {type(model).__name__} huggingface/peft reads other positions than ours (its class from the "
            f"first virtual token), so only {LM_TASKS} models go into its format; lightning_peft.save keeps it"
        )
    config = model.config.get_text_config()
    return {
        "num_transformer_submodules": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
    }


def from_hf(config: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], by: str) -> Tensor:
    """The trained rows of a peft folder (tokens, width).

    Raises:
        ValueError: a task for which peft computes something else, or no rows.
    """
    if config.get("task_type") not in LM_TASKS:
        raise ValueError(
            f"{by}: the folder's task_type is {config.get('task_type')!r}, for which huggingface/peft reads other "
            f"positions than ours; only {LM_TASKS} folders can be read"
        )
    rows = tensors.get("", {}).get("prompt_embeddings")
    if rows is None:
        raise ValueError(f"{by}: the folder holds no 'prompt_embeddings', but {sorted(tensors)}")
    return rows
