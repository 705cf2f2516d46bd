"""Tiny random bases and batches of four examples, for the rows of the zoo."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_peft import quantize
from tests import nets

B, T, V = 4, 8, 64  # examples, tokens, vocabulary


def bert() -> nn.Module:
    return nets.bert().eval()


def llama() -> nn.Module:
    return nets.llama(use_cache=False).eval()


def nf4_llama() -> nn.Module:
    model = nets.llama(use_cache=False, intermediate_size=64).eval()
    quantize(model, "nf4", blocksize=32, compute_dtype=torch.float32)
    return model


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=V, n_positions=32, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False)
    config.use_cache = False
    model = GPT2LMHeadModel(config).eval()
    model.loss_type = "ForCausalLM"  # its class's name does not tell, and guessing warns, which a compiled graph cannot
    return model


SSM: dict[str, Any] = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "use_cache": False}


def mamba() -> nn.Module:
    config = MambaConfig(**SSM, time_step_rank=3, tie_word_embeddings=False)
    return MambaForCausalLM(config).eval()


def mamba2() -> nn.Module:
    config = Mamba2Config(**SSM, num_heads=8, head_dim=8, n_groups=2, chunk_size=4, tie_word_embeddings=False)
    return Mamba2ForCausalLM(config).eval()


def t5() -> nn.Module:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2}
    more: dict[str, Any] = {"decoder_start_token_id": 0, "use_cache": False, "tie_word_embeddings": False}
    config = T5Config(vocab_size=V, num_decoder_layers=2, **sizes, **more)
    return T5ForConditionalGeneration(config).eval()


def t5_untied() -> Any:
    """With tables of their own for encoder and decoder: transformers ties them whatever the config says."""
    model: Any = t5()
    for stack in (model.encoder, model.decoder):
        stack.embed_tokens.weight = nn.Parameter(stack.embed_tokens.weight.detach().clone())
    return model


def bart() -> nn.Module:
    sizes: dict[str, Any] = {"d_model": 32, "vocab_size": V, "max_position_embeddings": 32, "use_cache": False}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
    return BartForConditionalGeneration(BartConfig(**sizes, decoder_start_token_id=2, forced_eos_token_id=None)).eval()


def vit() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3}
    config = ViTConfig(image_size=16, patch_size=8, num_channels=1, intermediate_size=48, **sizes)
    return ViTForImageClassification(config).eval()


def nf4_vit() -> nn.Module:
    model = vit()
    quantize(model, "nf4", blocksize=32, compute_dtype=torch.float32, exclude=("fc2",))  # 48 wide
    return model


def cnn() -> nn.Module:
    """Convolutions of every kind that an adapter may sit on: plain, grouped with stride, padded by reflection."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, groups=2, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"),
        nn.Flatten(),
        nn.Linear(4 * 16, 3),
    )


def _ids() -> Tensor:
    return torch.randint(3, V, (B, T), generator=torch.Generator().manual_seed(5))


def sentences() -> dict[str, Tensor]:
    """Of unlike lengths, with a class each."""
    mask = (torch.arange(T) < torch.tensor([T, T - 1, T - 3, T])[:, None]).long()
    return {"input_ids": _ids(), "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 1])}


def text() -> dict[str, Tensor]:
    """Full sequences, so that every example weighs the same in the loss."""
    ids = _ids()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def images() -> dict[str, Tensor]:
    return {"pixel_values": _pixels(16), "labels": torch.tensor([0, 1, 2, 1])}


def small_images() -> tuple[Tensor]:
    return (_pixels(8),)


def _pixels(side: int) -> Tensor:
    return torch.randn(B, 1, side, side, generator=torch.Generator().manual_seed(6))
