"""LightningModules by task, on pretrained transformers."""

from lightning_peft.models.causal_lm import CausalLM
from lightning_peft.models.small_vit import SmallViT
from lightning_peft.models.text_classification import TextClassifier

__all__ = ["CausalLM", "SmallViT", "TextClassifier"]
