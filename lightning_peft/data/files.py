"""Rows from csv, tsv, json, jsonl and parquet files or a named data set; errors name the file, and the line."""

import csv
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, load_dataset
from datasets import config as datasets_config
from huggingface_hub import HfApi

from lightning_peft.models.source import check_hub, nearest

Files = str | os.PathLike[str] | list[str] | None  # what the data modules take for each split
_KINDS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def paths(files: Files) -> list[Path]:
    """The given files, each checked: FileNotFoundError if one does not exist, ValueError if it is empty."""
    if files is None:
        return []
    found = [Path(file).expanduser() for file in (files if isinstance(files, list) else [files])]
    for path in found:
        if not path.is_file():
            beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            raise FileNotFoundError(f"no data file {str(path)!r}{nearest(path.name, beside)}")
        if path.stat().st_size == 0:
            raise ValueError(f"data file {str(path)!r} is empty")
    return found


@dataclass(kw_only=True)
class Table:
    """The rows of every split.

    Args: files, for each split ("train", "val", ...) its files; dataset, a name on the hub or a folder of files, read
        where a split has no files; dataset_config, its variant; dataset_splits, for each split its name there, None if
        it has none; columns, the column names of csv and tsv files that have no header row; val_fraction, the share of
        training rows, drawn with `seed`, that validate where no validation rows are given, 0 for none.
    Every csv and tsv value is a string; tsv knows no quotes. Files and splits that are missing raise at once, here.
    """

    files: dict[str, Files]
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_splits: dict[str, str | None] = field(default_factory=dict)
    columns: list[str] | None = None
    val_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and below 1, got {self.val_fraction}")
        self._paths = {split: paths(files) for split, files in self.files.items()}
        if not any(self._paths.values()) and self.dataset is None:
            raise ValueError(f"no data: give files for one of {sorted(self.files)}, or dataset=NAME")
        self._given: dict[str, Dataset | None] = {}

    def where(self, split: str) -> str:
        """The place of a split's rows, for messages."""
        split = "train" if split == "val" and self._halves else split
        return (
            " and ".join(map(repr, map(str, self._paths[split]))) or f"{self.dataset!r}, {self.dataset_splits[split]}"
        )

    def rows(self, split: str, required: list[str]) -> Dataset | None:
        """Those of one split, None if it has none. ValueError if a required column is missing or has empty cells."""
        if split in ("train", "val") and self._halves:
            rows = self._halves[split]
        else:
            rows = self.given(split)
        return rows if rows is None else self._complete(rows, split, required)

    def given(self, split: str) -> Dataset | None:
        """The rows of the split's own files or own split of the data set: for "train", validation rows included."""
        if split not in self._given:
            name = self.dataset_splits.get(split)
            if self._paths[split]:
                self._given[split] = _read(self._paths[split], self.columns)
            elif self.dataset is not None and name is not None:
                self._given[split] = _read_named(self.dataset, self.dataset_config, name)
            else:
                self._given[split] = None
        return self._given[split]

    @cached_property
    def _halves(self) -> dict[str, Dataset]:
        train = self.given("train")
        if self.val_fraction == 0 or train is None or self.given("val") is not None:
            return {}
        halves = train.train_test_split(test_size=self.val_fraction, seed=self.seed, load_from_cache_file=False)
        return {"train": halves["train"], "val": halves["test"]}

    def _complete(self, rows: Dataset, split: str, required: list[str]) -> Dataset:
        for name in required:
            if name not in rows.column_names:
                hint = (
                    "; name the columns of a file without a header row with columns=[...]" if not self.columns else ""
                )
                raise ValueError(
                    f"{self.where(split)} has no column {name!r}, it has {rows.column_names}"
                    f"{nearest(name, rows.column_names)}{hint}"
                )
            for place, value in enumerate(rows[name], start=1):
                if value is None or isinstance(value, dict | list):
                    what = "nothing" if value is None else f"{value!r:.60}, not a text or a number,"
                    raise ValueError(f"{self.where(split)}: row {place} of {split!r} has {what} in column {name!r}")
        return rows


def _read(files: list[Path], columns: list[str] | None) -> Dataset:
    suffixes = {path.suffix.lower() for path in files}
    if len(suffixes) > 1 or not suffixes <= _KINDS.keys():
        raise ValueError(f"{list(map(str, files))}: files of one split are all one of {', '.join(_KINDS)}")
    suffix = suffixes.pop()
    options = _csv_options(files, suffix, columns) if _KINDS[suffix] == "csv" else {}
    try:
        return load_dataset(_KINDS[suffix], data_files=list(map(str, files)), split="train", **options)
    except Exception as error:  # whatever the parser raises; the causes say more than datasets' own message
        for path in files if _KINDS[suffix] == "json" else []:
            _check_json(path)
        cause = error.__cause__ or error
        rows = "no rows" if "corresponds to no data" in str(cause) else " ".join(str(cause).split())
        raise ValueError(f"cannot read {' and '.join(map(repr, map(str, files)))}: {rows}") from error


def _csv_options(files: list[Path], suffix: str, columns: list[str] | None) -> dict[str, Any]:
    """All cells are read as text: by default "NA" and "null" would be missing values, and 007 the number 7."""
    sep, quoting = ("\t", csv.QUOTE_NONE) if suffix == ".tsv" else (",", csv.QUOTE_MINIMAL)
    for path in files:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            first = next(csv.reader(lines, delimiter=sep, quoting=quoting), [])
        if columns is not None and len(first) != len(columns):
            raise ValueError(f"{str(path)!r}: columns={columns}, but line 1 has {len(first)} cells: {first}")
    names = columns or first
    features = Features({name: Value("string") for name in names})
    return {"sep": sep, "quoting": quoting, "column_names": columns, "features": features, "keep_default_na": False}


def _check_json(path: Path) -> None:
    """ValueError with the line of the first thing that is not JSON, or not an object."""
    text = path.read_text(encoding="utf-8")
    one_list = path.suffix.lower() == ".json" and text.lstrip().startswith("[")
    for number, line in enumerate([text] if one_list else text.splitlines(), start=1):
        try:
            value = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            line_number = number + error.lineno - 1
            raise ValueError(
                f"{str(path)!r}, line {line_number}, column {error.colno}: not JSON: {error.msg}"
            ) from None
        if not all(isinstance(row, dict) for row in (value if one_list else [value])):
            raise ValueError(f"{str(path)!r}, line {number}: every row must be an object, {{...}}, got {line[:60]!r}")


def _read_named(name: str, variant: str | None, split: str) -> Dataset:
    if not (Path(name).expanduser().is_dir() or datasets_config.HF_HUB_OFFLINE):
        check_hub(HfApi.dataset_info, name)
    rows = load_dataset(name, variant, split=split)
    assert isinstance(rows, Dataset)  # as a split is named and nothing streams
    return rows
