"""Rows of the selective methods."""

from lightning_peft_plugins.selective.bitfit import BitFit
from lightning_peft_plugins.selective.diff_pruning import DiffPruning
from lightning_peft_plugins.selective.fish_mask import FishMask
from lightning_peft_plugins.selective.norm_tuning import NormTuning
from lightning_peft_plugins.selective.partial_tuning import PartialTuning
from lightning_peft_plugins.selective.s2ft import S2FT
from lightning_peft_plugins.selective.sparse_mask import SparseMask

from lightning_peft.testing import Row
from tests.zoo.bases import bert, cnn, gpt2, images, llama, nf4_llama, sentences, small_images, t5, text, vit

ROWS = [
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
    Row("sparse-mask", lambda: SparseMask(density=0.05), llama, text),
    Row("sparse-mask-nf4", lambda: SparseMask(density=0.05), nf4_llama, text),
    Row("sparse-mask-bert-head", lambda: SparseMask(rule="magnitude"), bert, sentences, train=("classifier",)),
    Row("sparse-mask-r-t5", lambda: SparseMask(r=2, seed=3, targets=("q", "v")), t5, text),
    Row("sparse-mask-gpt2", lambda: SparseMask(rule="small_magnitude", scope="global"), gpt2, text),
    Row("sparse-mask-embedding", lambda: SparseMask(r=2, targets=("embed_tokens", "q_proj")), llama, text),
    Row("sparse-mask-conv", lambda: SparseMask(density=0.3, targets=("0", "3", "5", "7")), cnn, small_images),
    Row("fish-mask", lambda: FishMask(density=0.02), llama, text),
    Row("fish-mask-bert-head", lambda: FishMask(samples=3, scope="layer"), bert, sentences, train=("classifier",)),
    Row("fish-mask-gpt2", lambda: FishMask(rule="gradient", density=0.02), gpt2, text),
    Row("fish-mask-vit", lambda: FishMask(rule="snip", layers="1:", density=0.02), vit, images),
    Row("fish-mask-conv", lambda: FishMask(density=0.2, targets=("0", "3", "5", "7")), cnn, small_images),
    Row("diff-pruning", lambda: DiffPruning(density=0.05), llama, text),
    Row("diff-pruning-nf4", lambda: DiffPruning(density=0.05, targets=("attention",)), nf4_llama, text),
    Row("diff-pruning-bert-head", lambda: DiffPruning(grouped=False), bert, sentences, train=("classifier",)),
    Row("diff-pruning-gpt2", lambda: DiffPruning(scope="layer", l0_weight=1e-3, alpha_init=0.0), gpt2, text),
    Row("diff-pruning-conv", lambda: DiffPruning(search=0.2, density=0.3, targets=("0", "3")), cnn, small_images),
    Row("s2ft", lambda: S2FT(d_ratio=0.1, o_ratio=0.25), llama, text),
    Row("s2ft-nf4", lambda: S2FT(d_ratio=0.1, u_ratio=0.1, v_ratio=0.3, seed=2), nf4_llama, text),
    Row("s2ft-bert-head", lambda: S2FT(selection="weight", d_ratio=0.1), bert, sentences, train=("classifier",)),
    Row("s2ft-gpt2-v", lambda: S2FT(v_ratio=0.3, u_ratio=0.05, scope="layer"), gpt2, text),
    Row("s2ft-vit", lambda: S2FT(selection="activation", d_ratio=0.1, layers="1:"), vit, images),
    Row("s2ft-t5", lambda: S2FT(selection="product", prefer="largest", d_ratio=0.1, u_ratio=0.1), t5, text),
    Row("s2ft-gradient", lambda: S2FT(selection="gradient", d_ratio=0.1, v_ratio=0.3, o_ratio=0.0), llama, text),
]
