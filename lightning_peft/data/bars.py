"""Bars: noisy images of a bright bar, to be sorted by its direction; drawn from a seed, no file, no download."""

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

SIDE, SPLITS = 16, {"train": 512, "val": 128}


class Bars(LightningDataModule):
    """Grey images of 16 pixels a side in four classes: a bar that lies, stands, falls or rises.

    Args:
        batch_size: examples a batch.
    """

    label_names = ["lies", "stands", "falls", "rises"]

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size

    def examples(self, split: str) -> list[dict[str, Tensor]]:
        """pixel_values (1, 16, 16) and labels () of "train" or "val", the same every time."""
        g = torch.Generator().manual_seed(len(split))
        return [_bar(i % 4, g) for i in range(SPLITS[split])]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.examples("train"), self.batch_size, shuffle=True)  # pyright: ignore[reportArgumentType]

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.examples("val"), self.batch_size)  # pyright: ignore[reportArgumentType]


def _bar(label: int, g: torch.Generator) -> dict[str, Tensor]:
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    along = (rows, columns, rows - columns, rows + columns - SIDE + 1)[label]
    low, high = (3, SIDE - 3) if label < 2 else (-6, 7)  # places of a bar that lies well inside
    at = int(torch.randint(low, high, (), generator=g))
    image = ((along - at).abs() <= 1).float() + 0.5 * torch.randn(SIDE, SIDE, generator=g)
    return {"pixel_values": image[None], "labels": torch.tensor(label)}
