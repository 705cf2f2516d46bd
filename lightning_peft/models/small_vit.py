"""SmallViT: a vision transformer small enough to try methods for images on a CPU, without a download."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from lightning_peft.models.optimization import adamw


class SmallViT(LightningModule):
    """transformers' ViT with random weights; `model` is the network. Logs train_loss, val_loss and val_accuracy.

    Args:
        image_size: pixels a side.
        patch_size: pixels a side of a patch.
        channels: 1 for grey images.
        hidden_size: width of a token; a multiple of 4, the number of heads.
        layers: number of blocks.
        num_labels: number of classes.
        learning_rate: AdamW's, at its highest.

    Batches hold pixel_values (batch, channels, height, width) and labels (batch,).
    """

    def __init__(
        self,
        image_size: int = 16,
        patch_size: int = 4,
        channels: int = 1,
        hidden_size: int = 32,
        layers: int = 2,
        num_labels: int = 4,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if hidden_size % 4 or image_size % patch_size:
            raise ValueError(f"hidden_size is a multiple of 4 and image_size of patch_size, got {hidden_size} and "
                             f"{image_size}, {patch_size}")  # fmt: skip
        self.learning_rate = learning_rate
        sizes: dict[str, Any] = {
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": layers,
            "num_labels": num_labels,
        }
        image: dict[str, Any] = {"image_size": image_size, "patch_size": patch_size, "num_channels": channels}
        self.config = ViTConfig(**sizes, **image, num_attention_heads=4)

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.model = ViTForImageClassification(self.config).train()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        out, n = self.model(**batch), len(batch["labels"])
        right = (out.logits.argmax(-1) == batch["labels"]).to(torch.float32).mean()
        self.log_dict({"val_loss": out.loss, "val_accuracy": right}, prog_bar=True, batch_size=n, sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        return adamw(self, self.learning_rate, 0.01, 0.06, "linear")
