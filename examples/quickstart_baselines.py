"""The quickstart's data and model trained three ways: the head alone, LoRA, and every weight. One small table.

    python examples/quickstart_baselines.py [--epochs 3] [--seed 42] [--out FOLDER]

Each way uses the learning rate that did best on the validation split (of a few tried); accuracy and F1 (macro) are
those on the test split, after the last epoch.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.table import Table

from lightning_peft import PEFT
from lightning_peft.cli.runs import size
from lightning_peft.data import DocstringTopics
from lightning_peft.methods import LoRA
from lightning_peft.models import TextClassifier
from lightning_peft.models.source import MINILM


class HeadOnly(TextClassifier):
    """The same classifier with everything but its new head frozen."""

    def configure_model(self) -> None:
        super().configure_model()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self.new_parameters)


@dataclass(frozen=True)
class Way:
    """One way to train.

    Args:
        name: for the table.
        module: class of the model.
        learning_rate: AdamW's, at its peak.
        lora: the adapters, if any.
    """

    name: str
    module: type[TextClassifier]
    learning_rate: float
    lora: LoRA | None = None


WAYS = (
    Way("head only", HeadOnly, 3e-2),
    Way("LoRA, r = 8", TextClassifier, 2e-3, LoRA(r=8, alpha=16)),
    Way("every weight", TextClassifier, 1e-4),
)


@dataclass(frozen=True)
class Result:
    """What one way came to; sizes in text, seconds of the fit with its validations."""

    accuracy: float
    f1: float
    seconds: float
    trained: int
    adapter: str
    checkpoint: str


def train(way: Way, epochs: int, seed: int, folder: Path) -> Result:
    """Fit and test one way; what it writes goes to ``folder``."""
    seed_everything(seed, verbose=False)
    data = DocstringTopics(MINILM, max_length=32)
    model = way.module(MINILM, learning_rate=way.learning_rate)
    saver = ModelCheckpoint(dirpath=folder, filename="last")
    adapters = (
        [PEFT(way.lora, model="model", train=("classifier",), folder=str(folder / "adapter"))] if way.lora else []
    )
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*adapters, saver],
        default_root_dir=folder,
        logger=False,
        enable_model_summary=False,
    )
    began = time.monotonic()
    trainer.fit(model, data)
    seconds = time.monotonic() - began
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = trainer.test(model, data, verbose=False)[0]
    adapter = size(folder / "adapter") if way.lora else "-"
    checkpoint = size(folder / "last.ckpt")
    return Result(found["test_accuracy"], found["test_f1"], seconds, trained, adapter, checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, help="keep checkpoints and adapter here; by default they are thrown away")
    options = parser.parse_args()
    table = Table(title=f"DocstringTopics on MiniLM, {options.epochs} epochs, seed {options.seed}")
    for column in ("", "accuracy", "F1", "seconds", "trained", "adapter", "checkpoint"):
        table.add_column(column, justify="right" if column else "left")
    with tempfile.TemporaryDirectory() as scratch:
        for way in WAYS:
            folder = (options.out or Path(scratch)) / way.name.split(",")[0].replace(" ", "_")
            r = train(way, options.epochs, options.seed, folder)
            numbers = (f"{r.accuracy:.1%}", f"{r.f1:.3f}", f"{r.seconds:.0f}", f"{r.trained:,}")
            table.add_row(way.name, *numbers, r.adapter, r.checkpoint)
    Console().print(table)


if __name__ == "__main__":
    main()
