"""InstructionData: prompts and responses, the loss on the responses only."""

from collections.abc import Callable
from dataclasses import dataclass
from string import Formatter
from typing import Any, cast

import torch
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_peft.data.base import TokenizedData
from lightning_peft.data.files import Files, Table

IGNORED = -100  # the label that torch's cross entropy leaves out
MULTIPLE = 8  # batches are padded to a multiple of it, as tensor cores like their shapes


class InstructionData(TokenizedData):
    """Prompts with the responses to learn; each response ends with the end-of-text token.

    Args:
        tokenizer: a local folder, a hub name or package:NAME, as for the model; it needs an end-of-text token.
        train: files of training rows, one or several: .csv, .tsv, .json, .jsonl or .parquet.
        val: files of validation rows.
        test: files of test rows.
        predict: files of rows to predict; they need no responses.
        dataset: a name on the hub, or a folder of files, for the splits without files.
        dataset_config: the variant of `dataset`.
        train_split: what the training split is called in `dataset`; null leaves it out.
        val_split: the same for validation.
        test_split: the same for testing.
        predict_split: the same for prediction.
        prompt_column: where the prompts stand.
        response_column: where the responses stand.
        template: the prompt written with columns in braces, as in "{instruction}\\n{input}\\n"; prompt_column is then
            not read. Without one, the prompt is the prompt column and a line break.
        max_length: tokens of the longest example, prompt and response together.
        batch_size: examples a batch.
        num_workers: processes that build batches.
        val_fraction: the share of training rows that validate if there are no validation rows; 0 for none.
        seed: draws these rows.

    Truncation: an example longer than max_length loses the beginning of its prompt (a beginning-of-text token stays);
    if the response alone is too long, it also loses the end of the response, and so has no end-of-text token.
    A batch holds input_ids, attention_mask and labels, each (batch, longest), rounded up to a multiple of 8. Labels are
    -100 on prompt and padding. Predict batches hold prompts only, padded on the left; those longer than max_length
    lose their beginning.
    """

    def __init__(
        self,
        tokenizer: str,
        train: Files = None,
        val: Files = None,
        test: Files = None,
        predict: Files = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        train_split: str | None = "train",
        val_split: str | None = "validation",
        test_split: str | None = "test",
        predict_split: str | None = None,
        prompt_column: str = "prompt",
        response_column: str = "response",
        template: str | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, max_length, batch_size, num_workers)
        self.response_column = response_column
        self.template = f"{{{prompt_column}}}\n" if template is None else template
        self._prompt_columns = sorted({name for _, name, _, _ in Formatter().parse(self.template) if name is not None})
        if not self._prompt_columns:
            raise ValueError(f"template {template!r} names no column, as in '{{instruction}}\\n'")
        self._table = Table(
            files={"train": train, "val": val, "test": test, "predict": predict},
            dataset=dataset,
            dataset_config=dataset_config,
            dataset_splits={"train": train_split, "val": val_split, "test": test_split, "predict": predict_split},
            inputs=self._prompt_columns,
            targets=[response_column],
            columns=None,
            val_fraction=val_fraction,
            seed=seed,
        )

    def prepare_data(self) -> None:
        self._table.fetch()

    def rows(self, split: str) -> Dataset | None:
        return self._table.rows(split)

    def encode(self, rows: dict[str, list[Any]], split: str) -> dict[str, list[Any]]:
        prompts = [
            self.template.format(**dict(zip(self._prompt_columns, cells, strict=True)))
            for cells in zip(*(rows[name] for name in self._prompt_columns), strict=True)
        ]
        prompt_ids = self._ids(prompts)
        start = self._start()
        if split == "predict":
            return {"input_ids": [start + _last(ids, self.max_length - len(start)) for ids in prompt_ids]}
        encoded: dict[str, list[Any]] = {"input_ids": [], "labels": []}
        room = self.max_length - len(start)
        responses = [[*ids, self._end()] for ids in self._ids([str(text) for text in rows[self.response_column]])]
        cut = sum(len(response) > room for response in responses)
        if cut:
            rank_zero_warn(
                f"{cut} responses of {split!r} lose their end: they have more than {room} tokens (max_length)"
            )
        for prompt, response in zip(prompt_ids, responses, strict=True):
            response = response[:room]
            prompt = start + _last(prompt, room - len(response))
            encoded["input_ids"].append(prompt + response)
            encoded["labels"].append([IGNORED] * len(prompt) + response)
        return encoded

    def collator(self, split: str) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        return PadTokens(pad_id=cast(int, self.tokenizer.pad_token_id), most=self.max_length, left=split == "predict")

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _start(self) -> list[int]:
        """The beginning-of-text token, if the tokenizer puts it before a text by itself."""
        bos = cast(int | None, self.tokenizer.bos_token_id)
        return [bos] if bos is not None and self.tokenizer("a")["input_ids"][0] == bos else []

    def _end(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"tokenizer {self.tokenizer_source!r} has no end-of-text token, so a model cannot learn where to stop: "
                "set its eos_token"
            )
        return cast(int, self.tokenizer.eos_token_id)


@dataclass(frozen=True)
class PadTokens:
    """Makes a batch of examples of different lengths, padded to a multiple of 8 but not past `most` tokens; `left` pads
    at the beginning, as generation needs it."""

    pad_id: int
    most: int
    left: bool = False

    def __call__(self, examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        width = min(-(-longest // MULTIPLE) * MULTIPLE, self.most)
        lengths = [{"attention_mask": [1] * len(example["input_ids"]), **example} for example in examples]
        fill = {"input_ids": self.pad_id, "attention_mask": 0, "labels": IGNORED}
        return {
            name: torch.tensor([self._padded(example[name], width, fill[name]) for example in lengths])
            for name in lengths[0]
        }

    def _padded(self, values: list[int], width: int, fill: int) -> list[int]:
        filling = [fill] * (width - len(values))
        return filling + values if self.left else values + filling


def _last(ids: list[int], count: int) -> list[int]:
    return ids[max(len(ids) - count, 0) :] if count > 0 else []
