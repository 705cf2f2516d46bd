"""Rows of the reparameterized methods."""

from lightning_peft_plugins.reparameterized.dora import DoRA
from lightning_peft_plugins.reparameterized.lora import LoRA
from lightning_peft_plugins.reparameterized.pissa import PiSSA

from lightning_peft.testing import Row
from tests.zoo.bases import bert, cnn, gpt2, images, llama, nf4_llama, sentences, small_images, t5, text, vit

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
