"""Rows of the reparameterized methods."""

from lightning_peft_plugins.reparameterized.ba_lora import BALoRA
from lightning_peft_plugins.reparameterized.ba_lora_loss import BALoRALoss
from lightning_peft_plugins.reparameterized.boft import BOFT
from lightning_peft_plugins.reparameterized.bone import Bone
from lightning_peft_plugins.reparameterized.dora import DoRA
from lightning_peft_plugins.reparameterized.fourier_ft import FourierFT
from lightning_peft_plugins.reparameterized.hra import HRA
from lightning_peft_plugins.reparameterized.hut import HUT
from lightning_peft_plugins.reparameterized.ipa import IPA
from lightning_peft_plugins.reparameterized.kasa import KaSA
from lightning_peft_plugins.reparameterized.loha import LoHa
from lightning_peft_plugins.reparameterized.lokr import LoKr
from lightning_peft_plugins.reparameterized.lora import LoRA
from lightning_peft_plugins.reparameterized.mamba_lora import MambaLoRA
from lightning_peft_plugins.reparameterized.oft import OFT
from lightning_peft_plugins.reparameterized.pissa import PiSSA
from lightning_peft_plugins.reparameterized.pmss import PMSS
from lightning_peft_plugins.reparameterized.rand_lora import RandLoRA
from lightning_peft_plugins.reparameterized.ssvd import SSVD
from lightning_peft_plugins.reparameterized.tera import TeRA
from lightning_peft_plugins.reparameterized.vb_lora import VBLoRA
from lightning_peft_plugins.reparameterized.vera import VeRA

from lightning_peft.testing import Row
from tests.zoo.bases import (
    bert,
    cnn,
    gpt2,
    images,
    llama,
    mamba,
    mamba2,
    nf4_llama,
    sentences,
    small_images,
    t5,
    text,
    vit,
)

SEPARABLE = BALoRALoss(lambda2=0.05, lambda3=0.0)  # means over tokens, the same in parts of a batch
CLASSES = BALoRALoss(form="nlu", k=1)
OF_ITS_BATCH = {"two_processes": "dominance and covariance are those of a process's own batch"}
SINGLES = {"resume": "its batches are of one example, which has no covariance: refused"}

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
    Row("lora-mamba", lambda: LoRA(r=2, targets=("mixer",), exclude=("dt_proj",)), mamba, text),
    Row("mamba-lora", lambda: MambaLoRA(r=2), mamba, text),
    Row("mamba-lora-2-sll", lambda: MambaLoRA(r=2, preset="sll", rslora=True), mamba2, text),
    Row(
        "mamba-lora-2-projectors",
        lambda: MambaLoRA(r=2, preset="projectors", also=("embeddings",), init="gaussian"),
        mamba2,
        text,
    ),
    Row("dora-mamba", lambda: DoRA(r=2, targets=("in_proj", "x_proj", "out_proj")), mamba, text),
    Row("dora", lambda: DoRA(r=2), llama, text),
    Row("dora-bert-head", lambda: DoRA(r=2, dropout=0.1), bert, sentences, train=("classifier",)),
    Row("dora-gpt2", lambda: DoRA(r=2, rslora=True, init="gaussian"), gpt2, text),
    Row("dora-embedding", lambda: DoRA(r=2, targets=("embed_tokens", "q_proj")), llama, text),
    Row("dora-conv", lambda: DoRA(r=2, targets=("0", "5", "7")), cnn, small_images),
    Row("dora-nf4", lambda: DoRA(r=2), nf4_llama, text),
    Row("ba-lora", lambda: BALoRA(r=2, loss=SEPARABLE), llama, text),
    Row("ba-lora-nf4", lambda: BALoRA(r=2, niter=0), nf4_llama, text, known=OF_ITS_BATCH),
    Row(
        "ba-lora-bert-classes",
        lambda: BALoRA(r=2, loss=CLASSES),
        bert,
        sentences,
        train=("classifier",),
        known=OF_ITS_BATCH | SINGLES,
    ),
    Row("ba-lora-loss-dora", lambda: [DoRA(r=2), BALoRALoss(k=2)], gpt2, text, known=OF_ITS_BATCH),
    Row("ba-lora-loss-t5", lambda: [SEPARABLE, LoRA(r=2)], t5, text),
    Row("pissa", lambda: PiSSA(r=2), llama, text),
    Row("pissa-bert-head", lambda: PiSSA(r=2, alpha=4.0), bert, sentences, train=("classifier",)),
    Row("pissa-gpt2-niter", lambda: PiSSA(r=2, niter=8), gpt2, text),
    Row("pissa-nf4", lambda: PiSSA(r=2, targets=("attention",)), nf4_llama, text),
    Row("loha", lambda: LoHa(r=2), llama, text),
    Row("loha-nf4", lambda: LoHa(r=2), nf4_llama, text),
    Row("loha-bert-head", lambda: LoHa(r=6, alpha=3.0), bert, sentences, train=("classifier",)),
    Row("loha-gpt2", lambda: LoHa(r=2, rank_pattern={"c_fc": 8}, alpha_pattern={"c_attn": 2.0}), gpt2, text),
    Row("loha-vit", lambda: LoHa(r=3, layers="1:"), vit, images),
    Row("loha-conv", lambda: LoHa(r=2, targets=("0", "3", "5", "7")), cnn, small_images),
    Row("loha-conv-core", lambda: LoHa(r=2, core=True, targets=("0", "3", "5", "7")), cnn, small_images),
    Row("lokr", lambda: LoKr(r=2), llama, text),
    Row("lokr-nf4", lambda: LoKr(r=2, zero="w2"), nf4_llama, text),
    Row("lokr-bert-head", lambda: LoKr(r=8, alpha=4.0), bert, sentences, train=("classifier",)),
    Row("lokr-gpt2", lambda: LoKr(r=2, decompose_both=True, alpha_pattern={"c_attn": 4.0}), gpt2, text),
    Row("lokr-t5", lambda: LoKr(r=2, decompose_factor=2, rank_pattern={"*.v": 8}), t5, text),
    Row("lokr-conv", lambda: LoKr(r=1, targets=("0", "3", "5", "7")), cnn, small_images),
    Row("lokr-conv-core", lambda: LoKr(r=1, core=True, targets=("0", "3", "5")), cnn, small_images),
    Row("fourier-ft", lambda: FourierFT(n=40), llama, text),
    Row("fourier-ft-nf4", lambda: FourierFT(n=40), nf4_llama, text),
    Row("fourier-ft-bert-head", lambda: FourierFT(n=40, seed=5), bert, sentences, train=("classifier",)),
    Row("fourier-ft-gpt2", lambda: FourierFT(n=40, scale=300.0, n_pattern={"c_fc": 9}), gpt2, text),
    Row("fourier-ft-vit", lambda: FourierFT(n=40, layers="1:"), vit, images),
    Row("hra", lambda: HRA(r=4), llama, text),
    Row("hra-nf4", lambda: HRA(r=4), nf4_llama, text),
    Row("hra-bert-head", lambda: HRA(r=4, orthogonality=0.1), bert, sentences, train=("classifier",)),
    Row("hra-gpt2", lambda: HRA(r=2), gpt2, text),
    Row("hra-t5", lambda: HRA(r=4, targets=("q", "v", "wo")), t5, text),
    Row("hra-vit", lambda: HRA(r=4, layers="1:"), vit, images),
    Row("hra-conv", lambda: HRA(r=4, targets=("0", "3", "5", "7")), cnn, small_images),
    Row("oft", lambda: OFT(block_size=8), llama, text),
    Row("oft-nf4", lambda: OFT(block_size=8), nf4_llama, text),
    Row("oft-bert-head-series", lambda: OFT(block_size=8, neumann=5), bert, sentences, train=("classifier",)),
    Row("oft-gpt2-shared", lambda: OFT(block_size=8, share=True), gpt2, text),
    Row("oft-embedding", lambda: OFT(block_size=8, targets=("embed_tokens", "q_proj")), llama, text),
    Row("oft-t5-bounded", lambda: OFT(block_size=8, eps=0.01, targets=("q", "v", "wo")), t5, text),
    Row("oft-vit-blocks", lambda: OFT(block_size=0, blocks=4, layers="1:"), vit, images),
    Row("oft-conv", lambda: OFT(block_size=3, targets=("0", "3", "5")), cnn, small_images),
    Row("boft", lambda: BOFT(factors=2), llama, text),
    Row("boft-nf4", lambda: BOFT(factors=2), nf4_llama, text),
    Row("boft-bert-head", lambda: BOFT(dropout=0.2), bert, sentences, train=("classifier",)),
    Row("boft-gpt2", lambda: BOFT(block_size=8, factors=3), gpt2, text),
    Row("boft-t5", lambda: BOFT(targets=("q", "v", "wo")), t5, text),
    Row("boft-vit-blocks", lambda: BOFT(block_size=0, blocks=4, layers="1:"), vit, images),
    Row("boft-conv", lambda: BOFT(block_size=3, targets=("0", "3", "5")), cnn, small_images),
    Row("vera", lambda: VeRA(r=8), llama, text),
    Row("vera-nf4", lambda: VeRA(r=8, seed=3), nf4_llama, text),
    Row("vera-bert-head", lambda: VeRA(r=8, dropout=0.1), bert, sentences, train=("classifier",)),
    Row("vera-gpt2-wide", lambda: VeRA(r=64, d_init=0.5, targets=("c_attn", "c_fc")), gpt2, text),
    Row("vera-t5", lambda: VeRA(r=8, targets=("q", "v", "wo")), t5, text),
    Row("vera-vit", lambda: VeRA(r=8, layers="1:"), vit, images),
    Row("ssvd", lambda: SSVD(), llama, text),
    Row("ssvd-nf4", lambda: SSVD(r=4, rotation="cayley", form="branch"), nf4_llama, text),
    Row("ssvd-bert-head", lambda: SSVD(r=3, gate=False, niter=8), bert, sentences, train=("classifier",)),
    Row("ssvd-gpt2", lambda: SSVD(rotation_ratio=0.2, rotation="matrix_exp", form="branch"), gpt2, text),
    Row("ssvd-t5", lambda: SSVD(r=3, side="reference", targets=("q", "wi", "wo")), t5, text),
    Row(
        "ssvd-vit-kaiming",
        lambda: SSVD(r=2, init_s="kaiming", form="weight"),
        vit,
        images,
        known={"start": "the older start, by option, is not the base's"},
    ),
    Row("bone", lambda: Bone(r=5), llama, text),
    Row("bone-nf4", lambda: Bone(r=8), nf4_llama, text),
    Row("bone-bert-head", lambda: Bone(r=4, dropout=0.1), bert, sentences, train=("classifier",)),
    Row("bone-mini-t5", lambda: Bone(variant="mini", r=4, mini_r=8), t5, text),
    Row("bone-bat", lambda: Bone(variant="bat", r=8), llama, text),
    Row("bone-bat-nf4", lambda: Bone(variant="bat", r=8), nf4_llama, text),
    Row("bone-bat-row-gpt2", lambda: Bone(variant="bat_row", r=4, rank_pattern={"c_fc": 8}), gpt2, text),
    Row("pmss", lambda: PMSS(r=6), llama, text),
    Row("pmss-nf4", lambda: PMSS(r=6, normalize="none", alpha=3.0), nf4_llama, text),
    Row("pmss-bert-head", lambda: PMSS(r=4, dropout=0.1), bert, sentences, train=("classifier",)),
    Row("pmss-gpt2", lambda: PMSS(r=4, c=7, selection="cpqr", rank_pattern={"c_fc": 9}), gpt2, text),
    Row("pmss-vit", lambda: PMSS(r=4, selection="random", seed=3, layers="1:"), vit, images),
    Row("ipa", lambda: IPA(r=3), llama, text),
    Row("ipa-nf4", lambda: IPA(r=2, scale=1.0), nf4_llama, text),
    Row("ipa-bert-head-both", lambda: IPA(r=3, train_projector=True), bert, sentences, train=("classifier",)),
    Row("ipa-gpt2", lambda: IPA(r=2, niter=0, dropout=0.1, rank_pattern={"c_fc": 5}), gpt2, text),
    Row("ipa-t5-few", lambda: IPA(r=4, rows=9, seed=3, targets=("q", "v", "wo")), t5, text),
    Row("ipa-vit", lambda: IPA(r=3, layers="1:"), vit, images),
    Row("kasa", lambda: KaSA(r=2), llama, text),
    Row("kasa-nf4", lambda: KaSA(r=2, reduction="sum"), nf4_llama, text),
    Row("kasa-bert-head", lambda: KaSA(r=2, dropout=0.1, gram="large"), bert, sentences, train=("classifier",)),
    Row("kasa-gpt2", lambda: KaSA(r=2, beta=0.1, gamma=0.1, rank_pattern={"c_fc": 4}), gpt2, text),
    Row("tera", lambda: TeRA(mode_size=4), llama, text),
    Row("tera-nf4", lambda: TeRA(whole_side="none", seed=4), nf4_llama, text),
    Row("tera-bert-head", lambda: TeRA(whole_side="out", scale=2.0), bert, sentences, train=("classifier",)),
    Row("tera-gpt2", lambda: TeRA(whole_side="min", max_rank=24, zero_mode=2), gpt2, text),
    Row("tera-t5", lambda: TeRA(factors="identity", tensor_shapes={"*.v": (8, 4, 32)}, targets=("q", "v")), t5, text),
    Row("hut", lambda: HUT(r=3), llama, text),
    Row("hut-nf4", lambda: HUT(r=1), nf4_llama, text),
    Row("hut-bert-head", lambda: HUT(r=4, expansion="tile"), bert, sentences, train=("classifier",)),
    Row("hut-gpt2", lambda: HUT(r=2, rank_pattern={"c_fc": 5}), gpt2, text),
    Row("hut-vit-power", lambda: HUT(r=2, expansion="power", scale=False), vit, images),
    Row("rand-lora", lambda: RandLoRA(r=4, alpha=8.0), llama, text),
    Row("rand-lora-nf4", lambda: RandLoRA(r=8, alpha=16.0, basis="sparse"), nf4_llama, text),
    Row("rand-lora-bert-head", lambda: RandLoRA(r=5, alpha=10.0, dropout=0.1), bert, sentences, train=("classifier",)),
    Row("rand-lora-gpt2", lambda: RandLoRA(r=6, alpha=6.0, basis="very_sparse"), gpt2, text),
    Row("rand-lora-t5-wide", lambda: RandLoRA(r=40, alpha=40.0, targets=("q", "v", "wo")), t5, text),
    Row("rand-lora-vit", lambda: RandLoRA(r=4, alpha=8.0, seed=2, layers="1:"), vit, images),
    Row("vb-lora", lambda: VBLoRA(r=2, vectors=12, length=8), llama, text),
    Row("vb-lora-nf4", lambda: VBLoRA(r=2, vectors=12, length=16), nf4_llama, text),
    Row("vb-lora-bert-head", lambda: VBLoRA(vectors=12, length=16, topk=3), bert, sentences, train=("classifier",)),
    Row("vb-lora-gpt2", lambda: VBLoRA(r=2, vectors=9, length=16, topk=9, logits_lr_ratio=1.0), gpt2, text),
    Row("vb-lora-t5", lambda: VBLoRA(r=4, vectors=12, length=4, targets=("q", "v"), dropout=0.1), t5, text),
    Row("vb-lora-vit", lambda: VBLoRA(r=2, vectors=12, length=16, bank_bound=0.2, layers="1:"), vit, images),
]
