"""Tiny networks, data and LightningModules that the tests share."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

CLASSES = 3


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def cnn() -> nn.Sequential:
    conv = nn.Conv2d(1, 8, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, CLASSES))


def bert(**changes: Any) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        num_labels=CLASSES,
        **changes,
    )
    return BertForSequenceClassification(config)


def llama(**changes: Any) -> LlamaForCausalLM:
    options: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
    }
    return LlamaForCausalLM(LlamaConfig(**options | changes))


class Net(L.LightningModule):
    """A LightningModule that knows nothing of us: its network made in ``where``."""

    def __init__(
        self,
        make: Callable[[], nn.Module] = mlp,
        where: str = "init",
        optimizer: Callable[["Net"], Any] | None = None,
        lr: float = 1e-2,
    ) -> None:
        super().__init__()
        self.make, self.where, self.optimizer, self.lr = make, where, optimizer, lr
        self.net: Any = None
        self.losses: list[float] = []
        if where == "init":
            self.build()

    def build(self) -> None:
        if self.net is None:
            torch.manual_seed(7)
            self.net = self.make()

    def setup(self, stage: str) -> None:
        if self.where == "setup":
            self.build()

    def configure_model(self) -> None:
        if self.where == "configure_model":
            self.build()

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        if self.optimizer is not None:
            return self.optimizer(self)
        return torch.optim.AdamW(self.parameters(), self.lr)


class HFNet(Net):
    """The same around a transformers model; batches are dictionaries of its forward's arguments."""

    def loss(self, batch: Any) -> Tensor:
        return self.net(**batch).loss

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(**batch).logits


def vectors(n: int = 48, batch_size: int = 8, shuffle: bool = True, images: bool = False) -> DataLoader:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(n, 1, 4, 4, generator=g) if images else torch.randn(n, 8, generator=g)
    y = (x.flatten(1)[:, 0] > 0).long() + (x.flatten(1)[:, 1] > 0).long()
    return DataLoader(TensorDataset(x, y), batch_size, shuffle=shuffle)


class Tokens(torch.utils.data.Dataset):
    """Random token sequences; the class is whether token 1 or 2 leads."""

    def __init__(self, n: int, lm: bool) -> None:
        g = torch.Generator().manual_seed(4)
        self.ids, self.lm = torch.randint(3, 64, (n, 10), generator=g), lm
        self.ids[:, 0] = torch.arange(n) % 2 + 1

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        labels = self.ids[i] if self.lm else self.ids[i, 0] - 1
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(10, dtype=torch.long), "labels": labels}


def tokens(n: int = 16, batch_size: int = 4, lm: bool = False, shuffle: bool = True) -> DataLoader:
    return DataLoader(Tokens(n, lm), batch_size, shuffle=shuffle)


def trainer(root: Any, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """A quiet CPU Trainer below ``root``."""
    defaults = {
        "default_root_dir": root,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "max_epochs": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": any(isinstance(c, L.pytorch.callbacks.ModelCheckpoint) for c in callbacks),
    }
    return L.Trainer(callbacks=list(callbacks), **defaults | options)
