"""The table of methods under test: one row a method, or a variant of one. test_conformance.py runs every check on it.

A row names a method with small hyper-parameters, a tiny random base and a batch of four examples.
"""

from typing import Any

import torch
from lightning_peft_plugins.additive.ia3 import IA3
from lightning_peft_plugins.reparameterized.dora import DoRA
from lightning_peft_plugins.reparameterized.lora import LoRA
from lightning_peft_plugins.reparameterized.pissa import PiSSA
from lightning_peft_plugins.selective.bitfit import BitFit
from lightning_peft_plugins.selective.norm_tuning import NormTuning
from lightning_peft_plugins.selective.partial_tuning import PartialTuning
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_peft import quantize
from lightning_peft.testing import Row
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
    return GPT2LMHeadModel(config).eval()


def t5() -> nn.Module:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2}
    more: dict[str, Any] = {"decoder_start_token_id": 0, "use_cache": False, "tie_word_embeddings": False}
    config = T5Config(vocab_size=V, num_decoder_layers=2, **sizes, **more)
    return T5ForConditionalGeneration(config).eval()


def vit() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3}
    config = ViTConfig(image_size=16, patch_size=8, num_channels=1, intermediate_size=48, **sizes)
    return ViTForImageClassification(config).eval()


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


ROWS = [
    Row("lora", lambda: LoRA(r=2), llama, text),
    Row("lora-nf4", lambda: LoRA(r=2), nf4_llama, text),
    Row("lora-bert-head", lambda: LoRA(r=2), bert, sentences, train=("classifier",)),
    Row("lora-rslora-dropout", lambda: LoRA(r=4, rslora=True, dropout=0.1, targets=("attention",)), bert, sentences),
    Row("lora-plus-gpt2", lambda: LoRA(r=2, init="gaussian", lora_plus_ratio=16.0), gpt2, text),
    Row("lora-embedding", lambda: LoRA(r=2, targets=("embed_tokens", "q_proj")), llama, text),
    Row("lora-t5", lambda: LoRA(r=2, targets=("q", "v"), alpha_pattern={"*.v": 4.0}), t5, text),
    Row("lora-vit", lambda: LoRA(r=2, layers="1:"), vit, images),
    Row("lora-conv", lambda: LoRA(r=2, targets=("0", "3", "5", "7")), cnn, small_images),
    Row("bitfit-bert-head", lambda: BitFit(), bert, sentences, train=("classifier",)),
    Row("bitfit-gpt2-subset", lambda: BitFit(targets=("intermediate",)), gpt2, text),
    Row("bitfit-vit", lambda: BitFit(layers="1:"), vit, images),
    Row("norm-tuning", lambda: NormTuning(), llama, text),
    Row("norm-tuning-nf4", lambda: NormTuning(), nf4_llama, text),
    Row("norm-tuning-bert-head", lambda: NormTuning(), bert, sentences, train=("classifier",)),
    Row("norm-tuning-gpt2", lambda: NormTuning(layers="-1:"), gpt2, text),
    Row("norm-tuning-t5", lambda: NormTuning(targets=("layer_norm",)), t5, text),
    Row("norm-tuning-batch-norm", lambda: NormTuning(), cnn, small_images),
    Row("partial-tuning", lambda: PartialTuning(last=1), llama, text),
    Row("partial-tuning-bert", lambda: PartialTuning(targets=("attention", "classifier")), bert, sentences),
    Row("partial-tuning-t5", lambda: PartialTuning(targets=("mlp",), layers="0"), t5, text),
    Row("ia3", lambda: IA3(), llama, text),
    Row("ia3-nf4", lambda: IA3(), nf4_llama, text),
    Row("ia3-bert-head", lambda: IA3(), bert, sentences, train=("classifier",)),
    Row("ia3-gpt2-fused", lambda: IA3(), gpt2, text),
    Row("ia3-t5", lambda: IA3(places=("value", "mlp")), t5, text),
    Row("ia3-vit", lambda: IA3(layers="1:"), vit, images),
    Row("ia3-conv", lambda: IA3(target_output=("0", "3"), target_input=("5", "7")), cnn, small_images),
    Row("dora", lambda: DoRA(r=2), llama, text),
    Row("dora-bert-head", lambda: DoRA(r=2, dropout=0.1), bert, sentences, train=("classifier",)),
    Row("dora-gpt2", lambda: DoRA(r=2, rslora=True, init="gaussian"), gpt2, text),
    Row("dora-embedding", lambda: DoRA(r=2, targets=("embed_tokens", "q_proj")), llama, text),
    Row("dora-conv", lambda: DoRA(r=2, targets=("0", "5", "7")), cnn, small_images),
    Row("dora-nf4", lambda: DoRA(r=2), nf4_llama, text),
    Row("pissa", lambda: PiSSA(r=2), llama, text),
    Row("pissa-bert-head", lambda: PiSSA(r=2, alpha=4.0), bert, sentences, train=("classifier",)),
    Row("pissa-gpt2-niter", lambda: PiSSA(r=2, niter=8), gpt2, text),
    Row("pissa-nf4", lambda: PiSSA(r=2, targets=("attention",)), nf4_llama, text),
]
