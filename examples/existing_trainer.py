"""LoRA in a Trainer you already have: the LightningModule knows nothing of it, one callback is added."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import PEFT
from lightning_peft.methods import LoRA


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 2)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.head(self.backbone(x)), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


if __name__ == "__main__":
    L.seed_everything(0)
    x = torch.randn(512, 16)
    data = DataLoader(TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long()), batch_size=32, shuffle=True)
    peft = PEFT(LoRA(r=8, targets=("all-linear",)), model="backbone")  # the head is ours to train as before
    trainer = L.Trainer(max_epochs=20, callbacks=[peft], accelerator="cpu")
    trainer.fit(Classifier(), data)
    print("written:", peft.written["adapter"])
