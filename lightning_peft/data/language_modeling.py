"""TextBlocks: plain-text files as blocks of tokens of one length, for causal language models."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from lightning_peft.data.base import TokenizedData
from lightning_peft.data.files import Files, paths


class TextBlocks(TokenizedData):
    """The files of a split, one after the other, cut into blocks; the tokens after the last whole block are dropped.

    Args:
        tokenizer: a local folder, a hub name or package:NAME, as for the model. Each file ends with its end-of-text
            token, if it has one.
        train: files of training text, one or several, UTF-8.
        val: files of validation text.
        test: files of test text.
        block_size: tokens a block.
        batch_size: blocks a batch.
        num_workers: processes that build batches.
        val_fraction: if there are no files for val, the share of each training file, at its end, that validates; 0 for
            none.

    A batch holds input_ids, attention_mask and labels, each (batch, block_size); the labels are the input_ids, which
    the model itself shifts by one.
    """

    def __init__(
        self,
        tokenizer: str,
        train: Files = None,
        val: Files = None,
        test: Files = None,
        block_size: int = 256,
        batch_size: int = 8,
        num_workers: int = 0,
        val_fraction: float = 0.1,
    ) -> None:
        super().__init__(tokenizer, block_size, batch_size, num_workers)
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and below 1, got {val_fraction}")
        self._paths = {"train": paths(train), "val": paths(val), "test": paths(test), "predict": []}
        if not any(self._paths.values()):
            raise ValueError("no data: give files for train, val or test")
        self.val_fraction = val_fraction

    def rows(self, split: str) -> Dataset | None:
        texts = [path.read_text(encoding="utf-8") for path in self._paths[split]]
        if split in ("train", "val") and self.val_fraction > 0 and not self._paths["val"]:
            whole = [path.read_text(encoding="utf-8") for path in self._paths["train"]]
            cuts = [_line_start(text, round(len(text) * (1 - self.val_fraction))) for text in whole]
            texts = [t[:cut] if split == "train" else t[cut:] for t, cut in zip(whole, cuts, strict=True)]
        return Dataset.from_dict({"documents": [texts]}) if texts else None  # one row: a block may span documents

    def encode(self, rows: dict[str, list[Any]], split: str) -> dict[str, list[Any]]:
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        (documents,) = rows["documents"]
        ids = self.tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = list(chain.from_iterable([*document, *end] for document in ids))
        size = self.max_length
        if len(tokens) < size:
            raise ValueError(
                f"{split!r} has {len(tokens)} tokens, not one block of block_size={size}: lower it, or give more text"
            )
        return {"input_ids": [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]}

    def collator(self, split: str) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        return stack_blocks


def stack_blocks(blocks: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch of blocks of one length."""
    ids = torch.tensor([block["input_ids"] for block in blocks])  # (batch, block_size)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _line_start(text: str, place: int) -> int:
    """The first start of a line at or after `place`; `place` itself if there is none."""
    end = text.find("\n", place)
    return place if end < 0 else end + 1
