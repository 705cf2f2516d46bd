"""Rows of the additive methods."""

from lightning_peft_plugins.additive.adalink import AdaLink
from lightning_peft_plugins.additive.adaptformer import AdaptFormer
from lightning_peft_plugins.additive.houlsby_adapter import HoulsbyAdapter
from lightning_peft_plugins.additive.ia3 import IA3
from lightning_peft_plugins.additive.p_tuning import PTuning
from lightning_peft_plugins.additive.parallel_adapter import ParallelAdapter
from lightning_peft_plugins.additive.pfeiffer_adapter import PfeifferAdapter
from lightning_peft_plugins.additive.prefix_tuning import PrefixTuning
from lightning_peft_plugins.additive.prompt_tuning import PromptTuning
from lightning_peft_plugins.additive.sublayers import KINDS
from lightning_peft_plugins.additive.vpt import VPT

from lightning_peft.testing import Row
from tests.zoo.bases import (
    bart,
    bert,
    cnn,
    gpt2,
    images,
    llama,
    nf4_llama,
    nf4_vit,
    sentences,
    small_images,
    t5,
    t5_untied,
    text,
    vit,
)

TWO_TABLES = {"text": "wte", "place": "wpe"}
GIVEN = dict.fromkeys(("merge", "stacking"), "what acts on inputs_embeds is on no weight: merge refuses, by name")

ROWS = [
    Row("ia3", lambda: IA3(), llama, text),
    Row("ia3-nf4", lambda: IA3(), nf4_llama, text),
    Row("ia3-bert-head", lambda: IA3(), bert, sentences, train=("classifier",)),
    Row("ia3-gpt2-fused", lambda: IA3(), gpt2, text),
    Row("ia3-t5", lambda: IA3(places=("value", "mlp")), t5, text),
    Row("ia3-vit", lambda: IA3(layers="1:"), vit, images),
    Row("ia3-conv", lambda: IA3(target_output=("0", "3"), target_input=("5", "7")), cnn, small_images),
    Row("p-tuning", lambda: PTuning(num_tokens=4), llama, text),
    Row("p-tuning-nf4", lambda: PTuning(num_tokens=4), nf4_llama, text),
    Row("p-tuning-mlp-bert-head", lambda: PTuning(num_tokens=3, encoder="mlp"), bert, sentences, train=("classifier",)),
    Row("p-tuning-none-gpt2", lambda: PTuning(num_tokens=4, encoder="none"), gpt2, text),
    Row("p-tuning-hidden-t5", lambda: PTuning(num_tokens=4, hidden=6), t5, text),
    Row("prefix-tuning", lambda: PrefixTuning(num_tokens=4, reparam_dim=8), llama, text),
    Row("prefix-tuning-plain", lambda: PrefixTuning(num_tokens=4, reparam=False, init="zero"), llama, text),
    Row("prefix-tuning-nf4", lambda: PrefixTuning(num_tokens=4, reparam_dim=8), nf4_llama, text),
    Row(
        "prefix-tuning-v2-bert-head",
        lambda: PrefixTuning(num_tokens=3, reparam=False, dropout=0.1),
        bert,
        sentences,
        train=("classifier",),
    ),
    Row("prefix-tuning-gpt2", lambda: PrefixTuning(num_tokens=4, reparam_dim=8, init="zero"), gpt2, text),
    Row("prefix-tuning-t5", lambda: PrefixTuning(num_tokens=4, reparam_dim=8), t5, text),
    Row("prompt-tuning", lambda: PromptTuning(num_tokens=4), llama, text),
    Row("prompt-tuning-nf4", lambda: PromptTuning(num_tokens=4, init="uniform"), nf4_llama, text),
    Row("prompt-tuning-bert-head", lambda: PromptTuning(num_tokens=3), bert, sentences, train=("classifier",)),
    Row("prompt-tuning-gpt2", lambda: PromptTuning(num_tokens=4, init="normal"), gpt2, text),
    Row("prompt-tuning-t5-ids", lambda: PromptTuning(num_tokens=4, init_ids=(5, 9, 7)), t5, text),
    Row("houlsby-bert", lambda: HoulsbyAdapter(bottleneck=4), bert, sentences, train=("LayerNorm", "classifier")),
    Row("houlsby-llama", lambda: HoulsbyAdapter(train_norms=False, scale="channel"), llama, text),
    Row("houlsby-nf4", lambda: HoulsbyAdapter(train_norms=False, nonlinearity="silu"), nf4_llama, text),
    Row("houlsby-gpt2", lambda: HoulsbyAdapter(train_norms=False, scale=0.5, layers="1:"), gpt2, text),
    Row("houlsby-t5-cross", lambda: HoulsbyAdapter(places=KINDS, train_norms=False), t5, text),
    Row("houlsby-vit-names", lambda: HoulsbyAdapter(targets=("*.mlp",), train_norms=False), vit, images),
    Row("pfeiffer-bert", lambda: PfeifferAdapter(bottleneck=4), bert, sentences, train=("classifier",)),
    Row("pfeiffer-llama", lambda: PfeifferAdapter(scale="learned"), llama, text),
    Row("pfeiffer-nf4", lambda: PfeifferAdapter(nonlinearity="tanh"), nf4_llama, text),
    Row("pfeiffer-gpt2", lambda: PfeifferAdapter(reduction_factor=4), gpt2, text),
    Row("pfeiffer-t5", lambda: PfeifferAdapter(exclude=("encoder",)), t5, text),
    Row("pfeiffer-vit-names", lambda: PfeifferAdapter(targets=("vit.layers.1",)), vit, images),
    Row("parallel-llama", lambda: ParallelAdapter(), llama, text),
    Row("parallel-nf4", lambda: ParallelAdapter(scale="learned"), nf4_llama, text),
    Row("parallel-bert-attention", lambda: ParallelAdapter(places=("attention", "mlp")), bert, sentences),
    Row("parallel-gpt2", lambda: ParallelAdapter(bottleneck=3, nonlinearity="gelu"), gpt2, text),
    Row("parallel-t5-cross", lambda: ParallelAdapter(places=KINDS), t5, text),
    Row("parallel-bart", lambda: ParallelAdapter(), bart, text),
    Row("parallel-vit-names", lambda: ParallelAdapter(targets=("*.attention", "*.mlp")), vit, images),
    Row("adaptformer-vit", lambda: AdaptFormer(r=4, dropout=0.0), vit, images, train=("classifier",)),
    Row("adaptformer-vit-names", lambda: AdaptFormer(r=4, dropout=0.0, targets=("layernorm_after",)), vit, images),
    Row("adaptformer-llama", lambda: AdaptFormer(r=4, dropout=0.0, scale="learned"), llama, text),
    Row("adaptformer-nf4", lambda: AdaptFormer(r=4, dropout=0.0, layer_norm="in"), nf4_llama, text),
    Row("adaptformer-gpt2", lambda: AdaptFormer(r=4, dropout=0.0, option="sequential"), gpt2, text),
    Row("adaptformer-t5", lambda: AdaptFormer(r=4, dropout=0.0), t5, text),
    Row("adaptformer-bert", lambda: AdaptFormer(r=4, dropout=0.0, layer_norm="out"), bert, sentences),
    Row("adalink-llama", lambda: AdaLink(r=4, scale=0.5), llama, text),
    Row("adalink-nf4-gelu", lambda: AdaLink(r=4, activation="gelu"), nf4_llama, text),
    Row("adalink-bert", lambda: AdaLink(r=4, activation="relu"), bert, sentences, train=("classifier",)),
    Row("adalink-gpt2-shared", lambda: AdaLink(r=4, modalities=TWO_TABLES, shared=True), gpt2, text),
    Row("adalink-t5", lambda: AdaLink(r=4, decoder_input=True), t5_untied, text),
    Row("adalink-vit-linear", lambda: AdaLink(r=4, modalities={"image": "vit.layers.0.mlp.fc2"}), vit, images),
    Row("adalink-given", lambda: AdaLink(r=4, inputs_embeds=True), llama, text, known=GIVEN),
    Row("vpt", lambda: VPT(num_tokens=3), vit, images),
    Row("vpt-shallow-head", lambda: VPT(num_tokens=3, deep=False, dropout=0.1), vit, images, train=("classifier",)),
    Row("vpt-nf4", lambda: VPT(num_tokens=3), nf4_vit, images),
]
