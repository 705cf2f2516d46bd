"""Rows of the selective methods."""

from lightning_peft_plugins.selective.bitfit import BitFit
from lightning_peft_plugins.selective.norm_tuning import NormTuning
from lightning_peft_plugins.selective.partial_tuning import PartialTuning

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
]
