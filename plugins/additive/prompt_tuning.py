"""Prompt tuning: trained vectors in front of the token embeddings. Lester et al. 2021, arXiv:2104.08691."""

from dataclasses import dataclass
from typing import Any

import torch
from lightning_peft_plugins.additive import soft
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Adapter, Base, Method, Traits, attach, hf
from lightning_peft.attach import accepts, by_name

INITS = ("vocab", "uniform", "normal")
HF_FIELDS = (*soft.HF_FIELDS, "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
             "tokenizer_kwargs")  # fmt: skip


class Prompt(soft.SoftPrompt):
    """``base(cat(prompt, embed(ids)))``; what the caller sees has the text's positions alone."""

    axes = {"prompt": ("length", "hidden")}

    def __init__(self, host: Any, num_tokens: int, init: str = "normal") -> None:
        super().__init__(host, num_tokens)
        self.init = init
        self.kept = False  # in the host's output, where a decoder is to read it
        self.prompt = nn.Parameter(torch.empty(num_tokens, soft.width(host)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init == "uniform":
            nn.init.uniform_(self.prompt, -0.5, 0.5)
        else:
            nn.init.normal_(self.prompt)

    def vectors(self) -> Tensor:
        """What stands in front of the text (tokens, hidden)."""
        return self.prompt

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        cache, new = call.get(self.cache_name), soft.text_length(call)
        seen = cache.get_seq_length() if cache is not None else 0
        self.make_room(call, new, seen, inserted=not seen)
        if seen:  # decoding: the prompt is in the cache
            return base(**call)
        ids, x = call.pop("input_ids", None), call.get("inputs_embeds")
        x = base.host.get_input_embeddings()(ids) if x is None else x  # (batch, text, hidden)
        call["inputs_embeds"] = torch.cat([self.vectors().to(x.dtype).expand(len(x), -1, -1), x], 1)
        if call.get("token_type_ids") is not None:
            call["token_type_ids"] = F.pad(call["token_type_ids"], (self.num_tokens, 0))
        return base(**call) if self.kept else soft.run(base, call, lambda out: self.without(out, base.host))

    def without(self, out: Any, host: Any) -> Any:
        """The host's output (a mapping) at the text's positions; a pooler, which may read the first, reads that."""
        n = self.num_tokens
        for key in ("hidden_states", "attentions", "cross_attentions"):
            if out.get(key) is not None:
                out[key] = tuple(t if t is None else t[..., n:, :] for t in out[key])  # of attentions the queries
        out["last_hidden_state"] = out["last_hidden_state"][:, n:]
        if out.get("pooler_output") is not None:
            out["pooler_output"] = host.pooler(out["last_hidden_state"])
        return out


class ReadsPrompt(Adapter):
    """On a decoder whose encoder has a prompt: the mask over the encoder's output gets ones for it."""

    def __init__(self, host: Any, num_tokens: int) -> None:
        super().__init__()
        self.names, self.num_tokens = accepts(host), num_tokens

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        call = by_name(self.names, args, kwargs)
        mask, states = call.get("encoder_attention_mask"), call.get("encoder_hidden_states")
        if mask is not None and states is not None and states.shape[1] == mask.shape[-1] + self.num_tokens:
            call["encoder_attention_mask"] = F.pad(mask, (self.num_tokens, 0), value=1)
        return base(**call)


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """``num_tokens`` trained vectors in front of the embedded text, in every example the same.

    The sequence is longer by them inside the model; logits, loss, hidden states and the pooled first position are
    those of the text. Of an encoder-decoder model they stand before the encoder's text. A padded batch of a model with
    absolute positions needs ``position_ids`` where it is padded on the left, as without adapters; ``generate`` gives
    them. The paper trained with Adafactor at a learning rate of 0.3.

    Args:
        num_tokens: how many vectors. The longest text gets shorter by as many.
        init: "vocab" starts them as embeddings of tokens drawn from the vocabulary, "uniform" in (-0.5, 0.5),
            "normal" with standard deviation 1.
        init_ids: token ids of a text or of labels to start from, cut or repeated to ``num_tokens``; instead of
            ``init``.
    """

    traits = Traits(
        family="additive",
        paper="Lester et al. 2021, arXiv:2104.08691",
        parameters="num_tokens * hidden",
        hosts=("model",),
        identity_start=False,
        needs_weights=True,
        hf="PROMPT_TUNING",
    )
    name: str = "prompt_tuning"
    num_tokens: int = 20
    init: str = "vocab"
    init_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        soft.check(self.num_tokens, self.init_ids, self.name)
        if self.init not in INITS:
            raise ValueError(f"{self.name}: init is one of {INITS}, got {self.init!r}")
        if self.init_ids and self.init != "vocab":
            raise ValueError(f"{self.name}: init_ids say what to start from, so init={self.init!r} has no effect")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        encoder, decoder = soft.stacks(model, self.name)
        soft.check_ids(self.init_ids, encoder, self.name)
        prompt = Prompt(encoder, self.num_tokens, self.init)
        if self.init == "vocab":
            embed = encoder.get_input_embeddings()
            drawn = torch.randint(embed.weight.shape[0], (self.num_tokens,))
            ids = torch.tensor(soft.cycled(self.init_ids, self.num_tokens)) if self.init_ids else drawn
            with torch.no_grad():
                prompt.prompt.copy_(embed(ids.to(embed.weight.device)))  # its call, as some scale what they store
        attach_prompt(prompt, encoder, decoder, self.name)

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return export(self, model, {"prompt_tuning_init": "RANDOM"})

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "PromptTuning":
        hf.check_fields(config, HF_FIELDS, "prompt_tuning")
        return cls(num_tokens=len(read(config, tensors, "prompt_tuning")))


def attach_prompt(prompt: Prompt, encoder: Any, decoder: Any, name: str) -> None:
    """On what reads the text, and where that is an encoder, a mask for it on the decoder."""
    prompt.kept = encoder is not decoder
    attach(encoder, name, prompt)
    if prompt.kept:
        attach(decoder, name, ReadsPrompt(decoder, prompt.num_tokens))


def export(method: Method, model: Any, fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """peft's fields and its one tensor, the vectors that stand in front of the text."""
    prompt: Any = next(a for _, _, a in method.adapters(model) if isinstance(a, Prompt))
    fields = soft.to_hf(model, method.name) | {"num_virtual_tokens": prompt.num_tokens} | fields
    return fields | {"token_dim": prompt.vectors().shape[1]}, {"prompt_embeddings": prompt.vectors()}


def read(config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], by: str) -> Tensor:
    """The rows of a peft folder that are used: of an encoder-decoder model the first half."""
    rows = soft.from_hf(config, tensors, by)
    rows.data = rows[: config["num_virtual_tokens"]]  # in place, as the caller fills these in
    return rows
