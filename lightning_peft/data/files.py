"""Rows from csv, tsv, json, jsonl and parquet files or a named data set; errors name the file, and the line."""

import csv
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, DatasetDict, Features, Value, load_dataset
from datasets import config as datasets_config
from huggingface_hub import HfApi

from lightning_peft.models.source import check_hub, nearest

Files = list[str] | str | os.PathLike[str] | None  # for each split; jsonargparse tries them in this order
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

    Args: files, for each split ("train", "val", "test", "predict") its files; dataset, a name on the hub or a folder of
        files, for the splits without files; dataset_config, its variant; dataset_splits, for each split its name there,
        None if it has none; inputs, targets, the columns that must be there and filled, targets not in "predict";
        columns, the column names of csv and tsv files that have no header row; val_fraction, the share of training
        rows, drawn with `seed`, that validate where no validation rows are given, 0 for none.
    Every csv and tsv value is a string; tsv knows no quotes. A file that is missing or empty raises at once, here.
    """

    files: dict[str, Files]
    dataset: str | None
    dataset_config: str | None
    dataset_splits: dict[str, str | None]
    inputs: list[str]
    targets: list[str]
    columns: list[str] | None
    val_fraction: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and below 1, got {self.val_fraction}")
        self._paths = {split: paths(files) for split, files in self.files.items()}
        if not any(self._paths.values()) and self.dataset is None:
            raise ValueError(f"no data: give files for one of {list(self.files)}, or dataset=NAME")
        self._given: dict[str, Dataset | None] = {}

    def where(self, split: str) -> str:
        """The place of a split's own rows, for messages."""
        return (
            " and ".join(map(repr, map(str, self._paths[split]))) or f"{self.dataset!r}, {self.dataset_splits[split]}"
        )

    def fetch(self) -> None:
        """Reads everything once, so that the other processes of this machine find it in the cache."""
        for split in self.files:
            if self._paths[split]:
                self.given(split)
        if self.dataset is not None:
            self._named  # noqa: B018

    def origin(self, split: str) -> str:
        """The split whose rows are used: "train" for "val" if validation rows are drawn from those of training."""
        drawn = split == "val" and self.val_fraction > 0 and self.given("val") is None
        return "train" if drawn else split

    def rows(self, split: str) -> Dataset | None:
        """Those of one split, None if it has none."""
        given = self.given(self.origin(split))
        if given is None or split not in ("train", "val") or self.origin("val") == "val":
            return given
        halves = given.train_test_split(test_size=self.val_fraction, seed=self.seed, load_from_cache_file=False)
        return halves["test" if split == "val" else "train"]

    def given(self, split: str) -> Dataset | None:
        """The rows of the split's own files, or its own part of the data set. ValueError if columns or cells lack."""
        if split not in self._given:
            name = self.dataset_splits[split]
            rows = None
            if self._paths[split]:
                rows = _read(self._paths[split], self.columns)
            elif self.dataset is not None and name is not None:
                if name not in self._named:
                    raise ValueError(
                        f"{self.dataset!r} has {list(self._named)}, no {name!r}: set {split}_split, or null"
                    )
                rows = self._named[name]
            if rows is not None:
                self._check(rows, split)
            self._given[split] = rows
        return self._given[split]

    @cached_property
    def _named(self) -> DatasetDict:
        assert self.dataset is not None
        if not (Path(self.dataset).expanduser().is_dir() or datasets_config.HF_HUB_OFFLINE):
            check_hub(HfApi.dataset_info, self.dataset)
        return cast(DatasetDict, load_dataset(self.dataset, self.dataset_config))

    def _check(self, rows: Dataset, split: str) -> None:
        for name in self.inputs + ([] if split == "predict" else self.targets):
            if name not in rows.column_names:
                hint = "" if self.columns else "; a csv or tsv file without a header row needs columns=[...]"
                near = nearest(name, rows.column_names)
                raise ValueError(f"{self.where(split)} has no column {name!r}, it has {rows.column_names}{near}{hint}")
            for place, value in enumerate(rows[name], start=1):
                if value is None or isinstance(value, dict | list):
                    what = "nothing" if value is None else f"{value!r:.60}, not a text or a number,"
                    raise ValueError(f"{self.where(split)}: row {place} has {what} in column {name!r}")


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
