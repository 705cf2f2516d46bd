"""A folder to use the command line in: a tiny pretrained model, texts that a word decides, a config."""

import csv
import os
import sys
from pathlib import Path

import torch
import yaml
from transformers import BertConfig, BertModel

from lightning_peft.__main__ import main
from tests.texts import tiny_bert

COMMAND = [sys.executable, "-m", "lightning_peft"]


def make(place: Path) -> Path:
    """The folder without any run: tiny/, train.csv, val.csv, tiny.yaml."""
    tiny_bert(place / "tiny", positions=32)
    torch.manual_seed(0)
    BertModel(BertConfig.from_pretrained(place / "tiny")).save_pretrained(place / "tiny")
    rows = [("the film is good", "yes"), ("it was dull", "no"), ("a great plot", "yes"), ("she is bad", "no")] * 8
    for split in ("train", "val"):
        with (place / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    config = {
        "model": {"class_path": "TextClassifier", "init_args": {"model": "tiny", "learning_rate": 0.02}},
        "data": {
            "class_path": "TextClassificationData",
            "init_args": {"tokenizer": "tiny", "max_length": 12, "train": "train.csv", "val": "val.csv"}
            | {"test": "val.csv", "predict": "val.csv", "batch_size": 8},
        },
        "peft": {"methods": "lora", "model": "model", "train": ["classifier"]},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    }
    (place / "tiny.yaml").write_text(yaml.safe_dump(config))
    return place


def make_run(place: Path) -> Path:
    """The same with a finished run of one epoch in runs/tiny, merged at its end."""
    make(place)
    before = Path.cwd()
    os.chdir(place)
    try:
        assert main(["fit", "--config", "tiny.yaml", "--peft.merge_at_end", "true"]) == 0
    finally:
        os.chdir(before)
    return place


def checkpoint(name: str = "tiny") -> str:
    """The one checkpoint of a run below the working directory."""
    return str(next(Path("runs", name, "checkpoints").glob("*.ckpt")))
