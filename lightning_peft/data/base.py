"""What the data modules share: rows are read by split, tokenised once, and padded batch by batch."""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

from datasets import Dataset
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from lightning_peft.models.source import load_tokenizer

SPLITS = ("train", "val", "test", "predict")
_NEEDED = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",), None: SPLITS}


class TokenizedData(LightningDataModule, ABC):
    """Base of the data modules here. A subclass says how to read the rows of a split, how to turn rows into token ids,
    and how to collate examples; nothing else differs.

    Args: tokenizer, as in `models.source.resolve`; max_length, tokens of the longest example; batch_size, examples;
        num_workers, processes that build batches.
    Under several processes each tokenises its own copy, in memory, in `setup`; what has to be fetched or parsed before
    is so once a machine, in a subclass's `prepare_data`.
    """

    def __init__(self, tokenizer: str, max_length: int, batch_size: int, num_workers: int) -> None:
        super().__init__()
        for name, value, least in (("max_length", max_length, 2), ("batch_size", batch_size, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.tokenizer_source = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._encoded: dict[str, Dataset] = {}

    @abstractmethod
    def rows(self, split: str) -> Dataset | None:
        """The rows of "train", "val", "test" or "predict" before tokenising; None if there are none."""

    @abstractmethod
    def encode(self, rows: dict[str, list[Any]], split: str) -> dict[str, list[Any]]:
        """A batch of rows, column by column, as token ids."""

    @abstractmethod
    def collator(self, split: str) -> Callable[[list[dict[str, Any]]], Any]:
        """What makes a batch of examples. It travels to the workers, so it holds no more than it needs."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(self.tokenizer_source)
        if self.max_length > tokenizer.model_max_length:
            raise ValueError(
                f"max_length={self.max_length}, but the model of tokenizer {self.tokenizer_source!r} takes at most "
                f"{tokenizer.model_max_length} tokens"
            )
        return tokenizer

    def setup(self, stage: str | None = None) -> None:
        for split in _NEEDED[stage]:
            rows = None if split in self._encoded else self.rows(split)
            if rows is not None:
                self._encoded[split] = self._encode_all(rows, split)

    def _encode_all(self, rows: Dataset, split: str) -> Dataset:
        return rows.map(
            lambda batch: self.encode(batch, split),
            batched=True,
            remove_columns=rows.column_names,
            keep_in_memory=True,
            load_from_cache_file=False,
            new_fingerprint=uuid.uuid4().hex,  # else the whole data module is pickled for a cache that is not used
            desc=f"tokenise {split}",
        )

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader:
        if split not in self._encoded:
            raise ValueError(f"{type(self).__name__} has no rows for {split!r}: give {split}=...")
        return DataLoader(
            self._encoded[split],  # pyright: ignore[reportArgumentType]  # has __len__ and __getitem__
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=self.collator(split),
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        return [] if fitting and "val" not in self._encoded else self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._loader("predict")


class LabelledTexts(TokenizedData):
    """Base of the data modules for classification: texts, or pairs of texts, with one label each."""

    text_column: str
    text_pair_column: str | None
    label_column: str

    @property
    @abstractmethod
    def label_names(self) -> list[str]:
        """The names of the classes, in the order of their numbers. Known before `setup`, for LightningCLI's links."""

    @abstractmethod
    def label_numbers(self, labels: list[Any]) -> list[int]:
        """The place in `label_names` of each value of the label column."""

    @property
    def num_labels(self) -> int:
        return len(self.label_names)

    def encode(self, rows: dict[str, list[Any]], split: str) -> dict[str, list[Any]]:
        pairs = None if self.text_pair_column is None else [str(text) for text in rows[self.text_pair_column]]
        texts = [str(text) for text in rows[self.text_column]]
        encoded = dict(self.tokenizer(texts, pairs, truncation=True, max_length=self.max_length))
        if split != "predict":
            encoded["labels"] = self.label_numbers(rows[self.label_column])
        return encoded

    def collator(self, split: str) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(self.tokenizer)
