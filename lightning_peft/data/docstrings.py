"""DocstringTopics: sentences of the standard library's own docstrings, to be sorted by topic; no file, no download."""

from functools import cached_property

from datasets import Dataset

from lightning_peft.data.base import LabelledTexts
from lightning_peft.data.corpus import corpus


class DocstringTopics(LabelledTexts):
    """Which part of Python's library does a sentence describe? Thousands of sentences, split so that no module stands
    in two splits; a model has to know the topic's words rather than one module's habits.

    Args:
        tokenizer: a local folder, a hub name or package:NAME, as for the model.
        max_length: tokens of the longest example, longer ones are cut.
        batch_size: examples a batch.
        num_workers: processes that build batches.

    The splits are train, val and test; predict gives the test sentences without their labels.
    """

    text_column = "text"
    text_pair_column = None
    label_column = "label"

    def __init__(self, tokenizer: str, max_length: int = 64, batch_size: int = 32, num_workers: int = 0) -> None:
        super().__init__(tokenizer, max_length, batch_size, num_workers)

    @cached_property
    def label_names(self) -> list[str]:
        return sorted({sentence.topic for sentence in corpus()["train"]})

    def label_numbers(self, labels: list[str]) -> list[int]:
        return [self.label_names.index(label) for label in labels]

    def rows(self, split: str) -> Dataset:
        sentences = corpus()["test" if split == "predict" else split]
        return Dataset.from_dict({"text": [s.text for s in sentences], "label": [s.topic for s in sentences]})
