"""Rows of the additive methods."""

from lightning_peft_plugins.additive.ia3 import IA3

from lightning_peft.testing import Row
from tests.zoo.bases import bert, cnn, gpt2, images, llama, nf4_llama, sentences, small_images, t5, text, vit

ROWS = [
    Row("ia3", lambda: IA3(), llama, text),
    Row("ia3-nf4", lambda: IA3(), nf4_llama, text),
    Row("ia3-bert-head", lambda: IA3(), bert, sentences, train=("classifier",)),
    Row("ia3-gpt2-fused", lambda: IA3(), gpt2, text),
    Row("ia3-t5", lambda: IA3(places=("value", "mlp")), t5, text),
    Row("ia3-vit", lambda: IA3(layers="1:"), vit, images),
    Row("ia3-conv", lambda: IA3(target_output=("0", "3"), target_input=("5", "7")), cnn, small_images),
]
