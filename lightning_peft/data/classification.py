"""TextClassificationData: labelled texts from csv, tsv, json, jsonl or parquet files, or a named data set."""

from functools import cached_property
from typing import Any

from datasets import ClassLabel, Dataset

from lightning_peft.data.base import SPLITS, LabelledTexts
from lightning_peft.data.files import Files, Table
from lightning_peft.models.source import nearest


class TextClassificationData(LabelledTexts):
    """Texts, or pairs of texts, and their labels.

    Args:
        tokenizer: a local folder, a hub name or package:NAME, as for the model.
        train: files of training rows, one or several: .csv, .tsv, .json, .jsonl or .parquet.
        val: files of validation rows.
        test: files of test rows.
        predict: files of rows to predict; they need no labels.
        dataset: a name on the hub, or a folder of files, for the splits without files.
        dataset_config: the variant of `dataset`.
        train_split: what the training split is called in `dataset`; null leaves it out.
        val_split: the same for validation.
        test_split: the same for testing.
        predict_split: the same for prediction.
        columns: the column names of csv and tsv files without a header row, for example [text, label].
        text_column: where the texts stand.
        text_pair_column: where second texts stand, if any.
        label_column: where the labels stand.
        label_names: the labels in the order of their numbers; else those of the training rows, sorted.
        max_length: tokens of the longest example, longer ones are cut.
        batch_size: examples a batch.
        num_workers: processes that build batches.
        val_fraction: the share of training rows that validate if there are no validation rows; 0 for none.
        seed: draws these rows.

    Labels may be strings or whole numbers; `label_names` holds them as strings. A label outside `label_names` raises.
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
        columns: list[str] | None = None,
        text_column: str = "text",
        text_pair_column: str | None = None,
        label_column: str = "label",
        label_names: list[str] | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, max_length, batch_size, num_workers)
        self.text_column, self.text_pair_column, self.label_column = text_column, text_pair_column, label_column
        self._label_names = label_names
        self._table = Table(
            files={"train": train, "val": val, "test": test, "predict": predict},
            dataset=dataset,
            dataset_config=dataset_config,
            dataset_splits={"train": train_split, "val": val_split, "test": test_split, "predict": predict_split},
            inputs=[text_column] if text_pair_column is None else [text_column, text_pair_column],
            targets=[label_column],
            columns=columns,
            val_fraction=val_fraction,
            seed=seed,
        )

    @cached_property
    def label_names(self) -> list[str]:
        if self._label_names is not None:
            return self._label_names
        train = self._table.given("train")  # with the rows held out for validation: a rare label may stand only there
        if train is None:
            raise ValueError("the labels are not known without training rows: give train=..., or label_names=[...]")
        feature = train.features[self.label_column]
        if isinstance(feature, ClassLabel):
            return list(feature.names)
        names = {str(label) for label in train[self.label_column]}
        if "" in names:
            raise ValueError(f"{self._table.where('train')}: a row has nothing in column {self.label_column!r}")
        whole = all(name.removeprefix("-").isdigit() for name in names)
        return sorted(names, key=int) if whole else sorted(names)

    def label_numbers(self, labels: list[Any]) -> list[int]:
        place = {name: number for number, name in enumerate(self.label_names)}
        return [place[self._name(label)] for label in labels]

    def prepare_data(self) -> None:
        self._table.fetch()

    def rows(self, split: str) -> Dataset | None:
        origin = self._table.origin(split)
        given = self._table.given(origin)
        if given is not None and split != "predict":
            self._check_labels(given, origin)
        return self._table.rows(split)

    def _check_labels(self, rows: Dataset, split: str) -> None:
        known = set(self.label_names)
        for place, name in enumerate(map(self._name, rows[self.label_column]), start=1):
            if name not in known:
                raise ValueError(
                    f"{self._table.where(split)}: row {place} has the label {name!r}, which is not among the training "
                    f"labels {self.label_names}{nearest(name, self.label_names)}"
                )

    @cached_property
    def _class_label(self) -> ClassLabel | None:
        """How a named data set spells its numbered labels."""
        given = (self._table.given(split) for split in SPLITS)
        features = (rows.features.get(self.label_column) for rows in given if rows is not None)
        return next((feature for feature in features if isinstance(feature, ClassLabel)), None)

    def _name(self, label: Any) -> str:
        if self._class_label is None or label < 0:  # -1: unlabelled
            return str(label)
        return self._class_label.names[label]
