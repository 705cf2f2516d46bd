"""Prefix tuning: trained keys and values before every layer's own. Li and Liang 2021, arXiv:2101.00190.

Without its network, and with a head that trains, it is P-tuning v2, Liu et al. 2021, arXiv:2110.07602.
"""

from dataclasses import dataclass
from typing import Any

import torch
from lightning_peft_plugins.additive import prefix_layers, soft, soft_network
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Base, Method, Traits, attach, hf
from lightning_peft.attach import accepts

INITS = ("normal", "zero")
HF_FIELDS = (*soft.HF_FIELDS, "prefix_projection", "encoder_hidden_size", "init_weights")
Shapes = dict[int, tuple[tuple[int, int], tuple[int, int]]]  # layer -> (heads, width of one) of its keys, of its values


class Prefix(soft.SoftPrompt):
    """Queries see the keys and values of ``num_tokens`` more positions, which lie in the cache before the text's.

    The trained matrix has a row for each of them: keys of layer 0, values of layer 0, keys of layer 1, and so on.
    """

    axes = {"prefix": ("length", "states")}

    def __init__(
        self, host: Any, num_tokens: int, shapes: Shapes, init: str, dropout: float, layers: tuple[int, ...] = ()
    ) -> None:
        super().__init__(host, num_tokens)
        self.every, self.init, self.dropout = shapes, init, dropout
        self.shapes = {i: of for i, of in shapes.items() if i in layers} if layers else shapes
        shapes = self.shapes
        self.sizes = [heads * each for layer in shapes.values() for heads, each in layer]
        self.both_ways = not any(getattr(m, "is_causal", False) for m in host.modules())
        self.prefix = nn.Parameter(torch.empty(num_tokens, sum(self.sizes)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init == "zero":
            nn.init.zeros_(self.prefix)
        else:
            nn.init.normal_(self.prefix)

    def vectors(self) -> Tensor:
        return self.prefix

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        call, host = self.arguments(args, kwargs), base.host
        if host.training and torch.is_grad_enabled() and getattr(host, "gradient_checkpointing", False):
            raise ValueError(
                "prefix_tuning puts its keys and values in the cache, which transformers leaves out under gradient "
                "checkpointing: switch that off, or use prompt_tuning"
            )
        cache, new = call.get(self.cache_name), soft.text_length(call)
        made = cache is None
        if made:
            cache = call[self.cache_name] = soft.new_cache(host, call.get("encoder_hidden_states") is not None)
        own = getattr(cache, "self_attention_cache", cache)
        seen = own.get_seq_length()
        self.make_room(call, new, seen, inserted=False)
        if self.both_ways and call.get("attention_mask") is not None:
            call["attention_mask"] = soft.added_to_scores(call["attention_mask"], host)
        if not seen:
            x = call.get("inputs_embeds")
            self.fill(own, len(call["input_ids"] if x is None else x), host)
        config = getattr(host.config, "use_cache", False)
        asked = config if call.get("use_cache") is None else call["use_cache"]
        return soft.run(base, call, lambda out: self.without(out) if made and not asked else out)

    def without(self, out: Any) -> Any:
        """The host's output (a mapping) without the cache that was ours."""
        return type(out)(**{k: v for k, v in out.items() if k != self.cache_name})

    def fill(self, cache: Any, batch: int, host: Any) -> None:
        n, dtype = self.num_tokens, host.get_input_embeddings().weight.dtype
        parts = iter(self.vectors().to(dtype).split(self.sizes, 1))
        for layer, of in self.every.items():
            if layer not in self.shapes:  # as long as the others, and hidden
                k, v = (self.prefix.new_zeros((batch, h, n, d), dtype=dtype) for h, d in of)
                cache.update(k, v, layer)
                continue
            # (tokens, heads * width) -> (batch, heads, tokens, width)
            k, v = (next(parts).view(n, h, d).transpose(0, 1).expand(batch, h, n, d) for h, d in of)
            cache.update(self.dropped(k), self.dropped(v), layer)

    def dropped(self, states: Tensor) -> Tensor:
        return F.dropout(states, self.dropout, self.training) if self.dropout else states


class NetworkPrefix(Prefix):
    """While it trains the rows are ``W2 tanh(W1 e + b1) + b2``; at the end only they are kept."""

    axes = Prefix.axes | {"e": ("length", "hidden"), "W1": ("mid", "hidden"), "b1": ("mid",),
                          "W2": ("states", "mid"), "b2": ("states",)}  # fmt: skip

    def __init__(self, mid: int, host: Any, num_tokens: int, *options: Any) -> None:
        super().__init__(host, num_tokens, *options)
        width, states = soft.width(host), self.prefix.shape[1]
        self.prefix.requires_grad_(False)  # until the end
        self.e = nn.Parameter(torch.empty(num_tokens, width))
        self.W1, self.b1 = nn.Parameter(torch.empty(mid, width)), nn.Parameter(torch.empty(mid))
        self.W2, self.b2 = nn.Parameter(torch.empty(states, mid)), nn.Parameter(torch.empty(states))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if not hasattr(self, "b2"):  # called by the parent's __init__
            return
        if len(self.e):
            nn.init.zeros_(self.prefix)
        nn.init.normal_(self.e)
        soft_network.reset_linear(self.W1, self.b1)
        soft_network.reset_linear(self.W2, self.b2)
        if self.init == "zero":
            nn.init.zeros_(self.W2)
            nn.init.zeros_(self.b2)

    def check_state(self, state: dict[str, Tensor]) -> None:
        soft_network.read_form(self, "prefix", state)

    def vectors(self) -> Tensor:
        if not len(self.e):
            return self.prefix
        return F.linear(F.linear(self.e, self.W1, self.b1).tanh(), self.W2, self.b2)


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """``num_tokens`` trained keys and values in every self-attention, which all positions may look at.

    Queries, and so outputs, are the text's alone; its positions begin at ``num_tokens``. Of an encoder-decoder model
    the decoder gets them. They lie in the cache, so the model must take one, and layers with a sliding window forget
    them. A padded batch of a model with absolute positions needs ``position_ids`` where it is padded on the left, as
    without adapters; ``generate`` gives them. With ``reparam=False`` and a trained head this is P-tuning v2. The
    papers' learning rates are 5e-5 with the network and about 5e-3 without.

    Args:
        num_tokens: how many keys and values. The longest text gets shorter by as many.
        reparam: compute them by a small network, which trains more steadily and is dropped at the end.
        reparam_dim: inner width of that network.
        init: "normal" draws them (or starts the network as torch does); "zero" starts keys and values at zero, which
            is not the base's output: a key of zero takes its share of the attention.
        init_ids: token ids of a text whose keys and values to start from, cut or repeated to ``num_tokens``; a decoder
            then starts as if it had read that text. Needs ``reparam=False``.
        dropout: probability on the keys and values.
        layers: blocks whose attention gets them, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="additive",
        paper="Li and Liang 2021, arXiv:2101.00190",
        parameters="num_tokens * 2 * layers * kv_heads * head_dim, and while training the network's",
        hosts=("model",),
        identity_start=False,
        hf="PREFIX_TUNING",
    )
    name: str = "prefix_tuning"
    num_tokens: int = 30
    reparam: bool = True
    reparam_dim: int = 512
    init: str = "normal"
    init_ids: tuple[int, ...] = ()
    dropout: float = 0.0
    layers: str = ""

    def __post_init__(self) -> None:
        soft.check(self.num_tokens, self.init_ids, self.name)
        if self.init not in INITS:
            raise ValueError(f"{self.name}: init is one of {INITS}, got {self.init!r}")
        if self.reparam_dim < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"{self.name}: reparam_dim is at least 1 and dropout in [0, 1), got {self.reparam_dim} "
                             f"and {self.dropout}")  # fmt: skip
        if self.init_ids and (self.reparam or self.init != "normal"):
            raise ValueError(f"{self.name}: init_ids give the keys and values, which needs reparam=False and no init")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        encoder, host = soft.stacks(model, self.name)
        if not {"cache", "past_key_values"} & set(accepts(host)):
            raise ValueError(
                f"{self.name}: {type(host).__name__} takes no cache of keys and values, so none can be put before its "
                "own; prompt_tuning works on it"
            )
        soft.check_ids(self.init_ids, host, self.name)
        if self.init_ids and any(p.is_meta for p in host.parameters()):
            raise ValueError(
                f"{self.name}: init_ids start from the base's values: load the weights before injecting it"
            )
        ids = soft.cycled(self.init_ids, self.num_tokens) if self.init_ids else [0]
        states = soft.states_of(host, ids, encoder is not host, self.name)
        shapes: Any = {i: tuple((t.shape[1], t.shape[3]) for t in kv) for i, kv in states.items()}
        chosen = prefix_layers.attentions(host, self.name, self.layers) if self.layers else {}
        options = (host, self.num_tokens, shapes, self.init, self.dropout, tuple(chosen))
        prefix = NetworkPrefix(self.reparam_dim, *options) if self.reparam else Prefix(*options)
        if self.init_ids:
            rows = [
                t[0].transpose(0, 1).flatten(1) for i in prefix.shapes for t in states[i]
            ]  # (tokens, heads * width)
            with torch.no_grad():
                prefix.prefix.copy_(torch.cat(rows, 1))
        attach(host, self.name, prefix)
        for layer, module in prefix_layers.attentions(host, self.name).items() if chosen else ():
            if layer not in chosen:
                attach(module, self.name, prefix_layers.Hidden(module, self.num_tokens))

    def finish(self, model: nn.Module) -> None:
        for _, _, adapter in self.adapters(model):
            if isinstance(adapter, NetworkPrefix):
                soft_network.settle(adapter, "prefix")

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fields = soft.to_hf(model, self.name)
        prefix: Any = next(a for _, _, a in self.adapters(model))
        shapes = {s for kv in prefix.shapes.values() for s in kv}
        if soft.task_type(model, []) != "CAUSAL_LM":
            raise ValueError(f"{self.name}: of an encoder-decoder model huggingface/peft gives a layer other rows than "
                             "its own; lightning_peft.save keeps it")  # fmt: skip
        if self.layers or len(shapes) > 1 or list(prefix.shapes) != list(range(len(prefix.shapes))):
            raise ValueError(f"{self.name}: keys and values of several sizes ({sorted(shapes)}), or layers without, "
                             "are not in huggingface/peft's format; lightning_peft.save keeps them")  # fmt: skip
        heads, each = shapes.pop()
        fields |= {"num_virtual_tokens": prefix.num_tokens, "num_attention_heads": heads, "token_dim": heads * each,
                   "num_layers": len(prefix.shapes), "prefix_projection": False}  # fmt: skip
        return fields, {"prompt_embeddings": prefix.vectors()}

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "PrefixTuning":
        hf.check_fields(config, HF_FIELDS, "prefix_tuning")
        rows = soft.from_hf(config, tensors, "prefix_tuning")
        if config["task_type"] != "CAUSAL_LM":
            raise ValueError("prefix_tuning: in an encoder-decoder model huggingface/peft gives layer l the rows of "
                             "layer 2 l, modulo their number, and layers of ours have their own")  # fmt: skip
        return cls(num_tokens=len(rows), reparam=False)
