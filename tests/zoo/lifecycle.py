"""Rows of the lifecycle methods."""

from typing import Any

from lightning_peft_plugins.additive.houlsby_adapter import HoulsbyAdapter
from lightning_peft_plugins.lifecycle.ada_deft import AdaDEFT
from lightning_peft_plugins.lifecycle.adalora import AdaLoRA
from lightning_peft_plugins.lifecycle.bsam import BSAM
from lightning_peft_plugins.lifecycle.deft import DEFT
from lightning_peft_plugins.lifecycle.flat_lora import FlatLoRA
from lightning_peft_plugins.lifecycle.galore import GaLore
from lightning_peft_plugins.lifecycle.l1ra import L1RA
from lightning_peft_plugins.lifecycle.light_peft import LightPEFT
from lightning_peft_plugins.lifecycle.natural_galore import NaturalGaLore
from lightning_peft_plugins.lifecycle.sam import SAM
from lightning_peft_plugins.lifecycle.structure_learnable_adapter import StructureLearnableAdapter
from lightning_peft_plugins.reparameterized.dora import DoRA
from lightning_peft_plugins.reparameterized.lora import LoRA

from lightning_peft.testing import Row
from tests.zoo.bases import bert, cnn, gpt2, images, llama, nf4_llama, sentences, small_images, t5, text, vit

SHORT: dict[str, Any] = {"estimation_steps": 2}  # of three steps or more
CLOSING: dict[str, Any] = {"threshold": 0.499, "warmup": 0.2, "finetune": 0.5, "lambda_struct": 5.0}
JOINT: dict[str, Any] = {"sync_perturbation": True}  # so that two processes do what one does
ROWS = [
    Row("adalora", lambda: AdaLoRA(init_r=3, target_r=2), llama, text),
    Row("adalora-nf4", lambda: AdaLoRA(init_r=3, target_r=2, dropout=0.1), nf4_llama, text),
    Row("adalora-bert-head", lambda: AdaLoRA(init_r=3, target_r=1, tfinal=0), bert, sentences, train=("classifier",)),
    Row("adalora-gpt2", lambda: AdaLoRA(init_r=3, target_r=1, score="after"), gpt2, text),
    Row("adalora-t5", lambda: AdaLoRA(init_r=3, target_r=1, orth_form="square", targets=("q", "v")), t5, text),
    Row("adalora-vit", lambda: AdaLoRA(init_r=3, target_r=1, tinit=1, delta_t=2, layers="1:"), vit, images),
    Row("adalora-conv", lambda: AdaLoRA(init_r=3, target_r=1, targets=("0", "7")), cnn, small_images),
    Row("deft-lora-bert-head", lambda: [LoRA(r=2), DEFT(eps=1e-2)], bert, sentences, train=("classifier",)),
    Row("deft-dora-llama", lambda: [DEFT(warmup=0.5, eps=1e-2), DoRA(r=2)], llama, text),
    Row("deft-nf4", lambda: [LoRA(r=2), DEFT(eps=1e-2, observe="activation")], nf4_llama, text),
    Row("deft-houlsby-gpt2", lambda: [HoulsbyAdapter(bottleneck=4, train_norms=False), DEFT(eps=1e-2)], gpt2, text),
    Row("deft-t5-masked", lambda: [LoRA(r=2), DEFT(eps=1e-2, count_padding=False, layers="1:")], t5, text),
    Row("deft-vit-names", lambda: [LoRA(r=2), DEFT(eps=1e-2, targets=("fc2",))], vit, images),
    Row("ada-deft-lora-bert", lambda: [LoRA(r=2), AdaDEFT(eps=1e-2, warmup=0.5, drop=1, cut=False)], bert, sentences),
    Row("ada-deft-llama-cut", lambda: [LoRA(r=2), AdaDEFT(eps=1e-2, drop=1)], llama, text),
    Row("ada-deft-nf4", lambda: AdaDEFT(eps=1e-2), nf4_llama, text),
    Row("ada-deft-gpt2", lambda: [AdaDEFT(eps=1e-2, observe="product"), LoRA(r=2)], gpt2, text),
    Row("ada-deft-t5", lambda: AdaDEFT(eps=1e-2, tau=0.5), t5, text),
    Row("ada-deft-vit", lambda: AdaDEFT(eps=1e-2, layers="1:"), vit, images),
    Row("galore", lambda: GaLore(r=4, update_proj_gap=2), llama, text),
    Row(
        "galore-bert-rest",
        lambda: GaLore(r=4, update_proj_gap=2, scale=2.0, rest=("*",), on_refresh="rotate"),
        bert,
        sentences,
    ),
    Row("galore-gpt2-left", lambda: GaLore(r=4, proj_type="left", on_refresh="reset", update_proj_gap=2), gpt2, text),
    Row("galore-t5-randomized", lambda: GaLore(r=4, svd="randomized", targets=("q", "v", "wo")), t5, text),
    Row("galore-vit-full", lambda: GaLore(r=4, proj_type="full", layers="1:"), vit, images),
    Row("natural-galore", lambda: NaturalGaLore(r=4, history=3, update_proj_gap=4, damping=0.1), llama, text),
    Row(
        "natural-galore-bert-head",
        lambda: NaturalGaLore(r=4, history=2, proj_type="full", damping_mode="absolute"),
        bert,
        sentences,
        train=("classifier",),
    ),
    Row("natural-galore-gpt2", lambda: NaturalGaLore(r=4, history=2, proj_type="reverse_std"), gpt2, text),
    Row("light-peft-bert-head", lambda: [LoRA(r=4), LightPEFT(**SHORT)], bert, sentences, train=("classifier",)),
    Row("light-peft-llama", lambda: [LoRA(r=4), LightPEFT(head_ratio=0.5, ffn_multiple=8, **SHORT)], llama, text),
    Row(
        "light-peft-dora-gpt2",
        lambda: [DoRA(r=4), LightPEFT(ffn_scope="layer", rank_scope="layer", ffn_mask_lr_mult=5.0, **SHORT)],
        gpt2,
        text,
    ),
    Row(
        "light-peft-houlsby-bert",
        lambda: [HoulsbyAdapter(bottleneck=4, train_norms=False), LightPEFT(head_scope="global", **SHORT)],
        bert,
        sentences,
    ),
    Row("light-peft-t5-mlps", lambda: [LoRA(r=4), LightPEFT(head_ratio=0, l1_coef=0.01, **SHORT)], t5, text),
    Row("structure-bert", lambda: StructureLearnableAdapter(**CLOSING), bert, sentences, train=("classifier",)),
    Row("structure-llama-soft", lambda: StructureLearnableAdapter(bottleneck=4, threshold=0.0), llama, text),
    Row("structure-nf4", lambda: StructureLearnableAdapter(hard=True, nonlinearity="gelu"), nf4_llama, text),
    Row(
        "structure-gpt2-sublayers",
        lambda: StructureLearnableAdapter(places=("attention", "mlp"), reduction="sum", **CLOSING),
        gpt2,
        text,
    ),
    Row("structure-t5", lambda: StructureLearnableAdapter(warmup=0.0, exclude=("encoder",)), t5, text),
    Row("structure-vit-names", lambda: StructureLearnableAdapter(targets=("*.mlp",), **CLOSING), vit, images),
    Row("structure-lora", lambda: [StructureLearnableAdapter(**CLOSING), LoRA(r=2)], bert, sentences),
    Row("light-peft-vit", lambda: [LoRA(r=4), LightPEFT(module_ratio=0, exclude=("*.0",), **SHORT)], vit, images),
    Row("l1ra", lambda: L1RA(r=2, dropout=0.0, l1=2.0), llama, text),
    Row("l1ra-nf4", lambda: L1RA(r=2, update_ratio=0.3), nf4_llama, text),
    Row("l1ra-bert-head", lambda: L1RA(r=2, l1=2.0, exclude_pruned=False), bert, sentences, train=("classifier",)),
    Row("l1ra-gpt2", lambda: L1RA(r=2, l1=2.0, reassign=False), gpt2, text),
    Row("l1ra-t5", lambda: L1RA(r=2, alpha=2.0, l1=2.0, reset_optimizer=True, targets=("q", "v")), t5, text),
    Row("l1ra-vit", lambda: L1RA(r=2, layers="1:", threshold=0.9, min_rank=2), vit, images),
    Row("sam-lora-bert-head", lambda: [LoRA(r=2), SAM(**JOINT)], bert, sentences, train=("classifier",)),
    Row("sam-adaptive-dora-llama", lambda: [SAM(rho=0.5, adaptive=True, **JOINT), DoRA(r=2)], llama, text),
    Row("sam-nf4", lambda: [LoRA(r=2), SAM(replay_rng=True, **JOINT)], nf4_llama, text),
    Row("sam-galore-vit", lambda: [SAM(**JOINT), GaLore(r=4, update_proj_gap=2)], vit, images),
    Row("sam-deft-t5", lambda: [LoRA(r=2), DEFT(eps=1e-2), SAM(**JOINT)], t5, text),
    Row("bsam-lora-gpt2", lambda: [LoRA(r=2), BSAM(**JOINT)], gpt2, text),
    Row(
        "bsam-houlsby-bert-head",
        lambda: [HoulsbyAdapter(bottleneck=4, train_norms=False), BSAM(ratio_clip=1.01, replay_rng=True, **JOINT)],
        bert,
        sentences,
        train=("classifier",),
    ),
    Row("bsam-nf4", lambda: [BSAM(rho_min_min=0.01, lr_min=1e-4, **JOINT), LoRA(r=2)], nf4_llama, text),
    Row("bsam-conv", lambda: [LoRA(r=2, targets=("0", "7")), BSAM(**JOINT)], cnn, small_images),
    Row("flat-lora", lambda: FlatLoRA(r=2, rho=0.2), llama, text),
    Row("flat-lora-nf4", lambda: FlatLoRA(r=2, rho=0.2, schedule="linear_up", dropout=0.1), nf4_llama, text),
    Row("flat-lora-bert-head", lambda: FlatLoRA(r=2, schedule="constant"), bert, sentences, train=("classifier",)),
    Row("flat-lora-gpt2", lambda: FlatLoRA(r=2, rho=0.2, rank_seeds="shared", lora_plus_ratio=4.0), gpt2, text),
    Row("flat-lora-t5", lambda: [LoRA(r=2), FlatLoRA(r=2, rho=0.2, period=2, targets=("q", "v"))], t5, text),
    Row("flat-lora-vit", lambda: FlatLoRA(r=2, rho=0.2, rslora=True, layers="1:"), vit, images),
]
