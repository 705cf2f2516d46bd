"""Rows of the hybrid methods."""

from typing import Any

from lightning_peft_plugins.additive.parallel_adapter import ParallelAdapter
from lightning_peft_plugins.additive.pfeiffer_adapter import PfeifferAdapter
from lightning_peft_plugins.additive.prefix_tuning import PrefixTuning
from lightning_peft_plugins.hybrid.mam_adapter import MAMAdapter
from lightning_peft_plugins.hybrid.s4 import S4
from lightning_peft_plugins.hybrid.unipelt import UniPELT
from lightning_peft_plugins.reparameterized.lora import LoRA
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lightning_peft.testing import Row
from tests import nets
from tests.zoo.bases import V, bart, bert, gpt2, images, llama, nf4_llama, sentences, t5, text, vit

START = {"start": "without a prefix it starts from the base's output, which its traits do not promise"}
PREFIX, PLAIN = PrefixTuning(num_tokens=3, reparam_dim=8), PrefixTuning(num_tokens=3, reparam=False)
PARALLEL = ParallelAdapter(bottleneck=4, scale=2.0)
ADAPTER = PfeifferAdapter(bottleneck=3)
DEEP: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}


def deep_bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(vocab_size=V, num_labels=nets.CLASSES, **DEEP)).eval()


def deep_llama() -> nn.Module:
    return nets.llama(num_hidden_layers=4, use_cache=False).eval()


def deep_gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=V, n_positions=32, n_embd=32, n_layer=4, n_head=4, tie_word_embeddings=False)
    config.use_cache = False
    model = GPT2LMHeadModel(config).eval()
    model.loss_type = "ForCausalLM"
    return model


ROWS = [
    Row("mam-bert-head", lambda: MAMAdapter(prefix=PREFIX, parallel=PARALLEL), bert, sentences, train=("classifier",)),
    Row("mam-llama", lambda: MAMAdapter(prefix=PLAIN, parallel=PARALLEL), llama, text),
    Row("mam-nf4", lambda: MAMAdapter(prefix=PREFIX, parallel=PARALLEL), nf4_llama, text),
    Row("mam-gpt2", lambda: MAMAdapter(prefix=PREFIX), gpt2, text),
    Row("mam-t5", lambda: MAMAdapter(prefix=PREFIX, parallel=PARALLEL), t5, text),
    Row("mam-bart", lambda: MAMAdapter(prefix=PREFIX, parallel=PARALLEL), bart, text),
    Row("unipelt-bert-head", lambda: UniPELT(prefix=PREFIX), bert, sentences, train=("classifier",)),
    Row("unipelt-bert-all", lambda: UniPELT(prefix=PLAIN, adapter=ADAPTER, gate_mean="all"), bert, sentences),
    Row("unipelt-bert-token", lambda: UniPELT(prefix=PLAIN, adapter=ADAPTER, gate_mean="token"), bert, sentences),
    Row("unipelt-llama", lambda: UniPELT(prefix=PREFIX, adapter=ADAPTER), llama, text),
    Row("unipelt-nf4", lambda: UniPELT(prefix=PREFIX, lora=LoRA(r=2, alpha=3.0)), nf4_llama, text),
    Row("unipelt-gpt2", lambda: UniPELT(prefix=PLAIN, gated=("prefix", "adapter")), gpt2, text),
    Row("unipelt-t5", lambda: UniPELT(prefix=PREFIX, adapter=ADAPTER, gated=("lora", "prefix")), t5, text),
    Row("unipelt-bart", lambda: UniPELT(prefix=PREFIX, adapter=None), bart, text),
    Row("unipelt-vit", lambda: UniPELT(prefix=None, adapter=ADAPTER), vit, images, known=START),
    Row("s4-bert-head", lambda: S4(prefix=PREFIX), deep_bert, sentences, train=("classifier",)),
    Row("s4-gpt2", lambda: S4(prefix=PLAIN, groups=(1, 1, 1, 1)), deep_gpt2, text),
    Row("s4-llama", lambda: S4(prefix=PREFIX, bitfit=None), deep_llama, text),
]
