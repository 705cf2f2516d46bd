"""What the tests of soft prompts share: tiny models by name, texts of unlike lengths, greedy search by hand."""

import copy
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, RobertaConfig, RobertaModel

import lightning_peft as lp
from tests import nets
from tests.zoo import bases as zoo

P = 4  # virtual tokens
CAUSAL = {"llama": lambda: nets.llama().eval(), "gpt2": zoo.gpt2}


def bart() -> Any:
    """Scales its embeddings by the root of their size."""
    sizes: dict[str, Any] = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40}
    heads: dict[str, Any] = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "scale_embedding": True}
    more: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    layers: dict[str, Any] = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 32, "vocab_size": zoo.V}
    return BartForConditionalGeneration(BartConfig(**sizes, **heads, **more, **layers, forced_eos_token_id=None)).eval()


def roberta() -> Any:
    """Its positions begin at 2."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more: dict[str, Any] = {"intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 1}
    return RobertaModel(RobertaConfig(vocab_size=zoo.V, **sizes, **more)).eval()


def ids(n: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(3, zoo.V, (n, length), generator=torch.Generator().manual_seed(seed))


def padded(left: bool, pads: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """(token ids, mask, the first row without its pads); the second row is full."""
    tokens, mask = ids(), torch.ones(2, 7, dtype=torch.long)
    side = slice(None, pads) if left else slice(-pads, None)
    tokens[0, side], mask[0, side] = 0, 0
    return tokens, mask, tokens[:1, pads:] if left else tokens[:1, :-pads]


def positions_of(mask: Tensor) -> Tensor:
    """As generate counts them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def adapter(model: Any) -> Any:
    return next(a for _, _, a in lp.adapters(model))


def lively(make: Any) -> Any:
    """The model with weights that make attention matter; as transformers draws them all outputs are nearly alike."""
    torch.manual_seed(3)
    model = make().eval()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.25)
    return model


def injected(make: Any, method: lp.Method, **options: Any) -> Any:
    model = lively(make)
    lp.inject(model, method, **options)
    return model.eval()


@torch.no_grad()
def greedy(model: Any, tokens: Tensor, steps: int, **first: Any) -> Tensor:
    """The tokens that step-by-step argmax adds to one text without pads, each step from scratch, nothing cached."""
    start = tokens.shape[1]
    for _ in range(steps):
        best = model(input_ids=tokens, use_cache=False, **first).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], 1)
    return tokens[:, start:]


@torch.no_grad()
def beams(model: Any, tokens: Tensor, steps: int, width: int) -> Tensor:
    """The most likely continuation that a beam search of this width finds; tokens that end a text are not expected."""
    found = [(0.0, tokens)]
    for _ in range(steps):
        longer = []
        for score, text in found:
            log = model(input_ids=text, use_cache=False).logits[0, -1].log_softmax(-1)
            top = log.topk(width)
            longer += [(score + float(s), torch.cat([text, i.view(1, 1)], 1)) for s, i in zip(*top, strict=True)]
        found = sorted(longer, key=lambda x: -x[0])[:width]
    return found[0][1][:, tokens.shape[1] :]


def generated(model: Any, tokens: Tensor, steps: int = 5, **options: Any) -> Tensor:
    options = {"do_sample": False, "max_new_tokens": steps, "min_new_tokens": steps, "pad_token_id": 0} | options
    return model.generate(input_ids=tokens, **options)[:, -steps:]


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


def in_peft(base: Any, config: Any) -> Any:
    return peft.get_peft_model(copy.deepcopy(base), config)


def rows_of(theirs: Any) -> Tensor:
    """What peft saves."""
    return theirs.get_prompt_embedding_to_save("default")


def both_ways(base: Any, theirs: Any, batch: dict[str, Any], cut: int, folder: Path) -> None:
    """peft's folder in ours, and ours in peft, compute the same logits as the first; peft's are cut by ``cut``."""
    theirs.save_pretrained(str(folder / "theirs"))
    ours = lp.hf.load(copy.deepcopy(base), folder / "theirs").eval()
    with torch.no_grad():
        want = theirs.eval()(**batch).logits[:, cut:]
        close(ours(**batch).logits, want)
        lp.hf.save(ours, folder / "ours")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder / "ours")).eval()
        close(again(**batch).logits[:, cut:], want)
