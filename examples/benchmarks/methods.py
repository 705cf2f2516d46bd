"""One table over methods: accuracy, trained parameters, step time, memory for backward, bytes of the adapter.

    python examples/benchmarks/methods.py --train sst2/train.tsv --val sst2/dev.tsv [--methods lora dora] [--seeds 3]
        [--peft] [--epochs 2] [--out TABLE.md] [--kwargs '{"lora": {"r": 4}}'] [--rates '{"lora": 5e-4}']

Trains MiniLM with each method on labelled sentences (tsv without a header: sentence, label) and measures on --val. With
--peft also what huggingface/peft makes of the same adapter, read from the folder that `lightning_peft.hf` writes: the
same start, the same options, the same optimizer. Step times are medians of steps taken in turn by all models, as ratios
to LoRA's, so that a noisy machine slows all alike. Every line is written as soon as it is measured.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning_peft_plugins.reparameterized.ba_lora_loss import BALoRALoss
from measure import QUIET, kept_for_backward, show, silence
from rich.console import Console
from torch import Tensor, nn

from lightning_peft import PEFT, Method, hf, registry
from lightning_peft.attach import adapters
from lightning_peft.calibration import frozen
from lightning_peft.data import TextClassificationData
from lightning_peft.inject import inject, pattern_selects
from lightning_peft.models import TextClassifier
from lightning_peft.models.source import MINILM

HEAD = ("*classifier*",)
# What a method needs beside its defaults, and learning rates other than 1e-3: of two to four that were tried on a
# quarter of SST-2, the one that did best.
OPTIONS: dict[str, dict[str, Any]] = {
    "partial_tuning": {"last": 1},
    "vb_lora": {"length": 128},
    "sparse_mask": {"r": 8},
    "pmss": {"r": 64},
    "ba_lora": {"r": 8, "loss": BALoRALoss(form="nlu", k=1)},
    "ssvd": {"r": 64},
}
LEARNING_RATES = {
    "adalink": 1e-2, "adaptformer": 3e-3, "bitfit": 3e-3, "boft": 5e-3, "bone": 2e-4, "diff_pruning": 2e-4,
    "fourier_ft": 5e-2, "houlsby_adapter": 3e-3, "hra": 1e-2, "hut": 3e-3, "ia3": 2e-2, "ipa": 3e-3, "loha": 1e-2,
    "lokr": 1e-2, "mam_adapter": 1e-4, "norm_tuning": 5e-3, "p_tuning": 3e-2, "parallel_adapter": 2e-4,
    "partial_tuning": 5e-4, "pmss": 3e-3, "prompt_tuning": 1e-2, "rand_lora": 5e-4, "s2ft": 3e-3, "sparse_mask": 3e-3,
    "structure_learnable_adapter": 3e-3, "tera": 3e-2, "unipelt": 1e-3, "vb_lora": 1e-2, "vera": 3e-2,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One line of the table: a method, by us or by huggingface/peft."""

    method: Method
    by: str = "ours"

    @property
    def learning_rate(self) -> float:
        return LEARNING_RATES.get(self.method.name, 1e-3)

    def callbacks(self) -> list[Callback]:
        return [PEFT(self.method, model="model", train=HEAD, folder=None)] if self.by == "ours" else []


class Peft(TextClassifier):
    """The classifier with its transformer wrapped by huggingface/peft, from the adapter that our method starts with."""

    method: Method

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            super().configure_model()
            self.model: Any = theirs(self.model, self.method)


def theirs(model: Any, method: Method) -> nn.Module:
    """huggingface/peft's model of the same adapter; the head trains along."""
    with tempfile.TemporaryDirectory() as folder:
        base = {k: v.clone() for k, v in model.state_dict().items()}
        inject(model, method)
        hf.save(model, folder)
        plain = type(model)(model.config)
        plain.load_state_dict(base)
        wrapped = peft.PeftModel.from_pretrained(plain, folder, is_trainable=True)
    for name, parameter in wrapped.named_parameters():
        if any(pattern_selects(p, name) for p in HEAD):
            parameter.requires_grad_(True)
    return wrapped


def accuracy(entry: Entry, options: argparse.Namespace, seed: int) -> float:
    """Of one fit on the validation rows, after the last epoch."""
    seed_everything(seed, verbose=False)
    data = TextClassificationData(
        MINILM, train=options.train, val=options.val, columns=["text", "label"], max_length=64, batch_size=options.batch
    )
    kind = TextClassifier if entry.by == "ours" else type("Peft", (Peft,), {"method": entry.method})
    model = kind(MINILM, learning_rate=entry.learning_rate)
    trainer = Trainer(
        max_epochs=options.epochs,
        limit_train_batches=options.limit,
        precision=options.precision,
        accelerator="cpu",
        enable_checkpointing=False,
        limit_val_batches=0,
        callbacks=entry.callbacks(),
        **QUIET,
    )
    trainer.fit(model, data)
    checker = Trainer(accelerator="cpu", enable_checkpointing=False, precision=options.precision, **QUIET)
    return float(checker.validate(model, data, verbose=False)[0]["val_accuracy"])


class Stepper:
    """One model, ready to take training steps on one batch."""

    def __init__(self, entry: Entry, batch: dict[str, Tensor]) -> None:
        seed_everything(0, verbose=False)
        module = TextClassifier(MINILM, num_labels=2)
        module.configure_model()
        self.entry, self.batch, self.seconds = entry, batch, [0.0]
        if entry.by == "ours":
            head = [n for n, _ in module.model.named_parameters() if any(pattern_selects(p, n) for p in HEAD)]
            self.model: Any = module.model
            stats = {}
            if entry.method.calibrates:
                with frozen(self.model, head):
                    found = entry.method.calibrate(self.model, [batch], lambda b: self.model(**b).loss)
                stats[entry.method.name] = found
            inject(self.model, entry.method, train=head, stats=stats)
            held = {id(p): p for _, _, a in adapters(self.model) for p in a.parameters()}
        else:
            self.model = theirs(module.model, entry.method)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        heads = {id(p) for n, p in self.model.named_parameters() if any(pattern_selects(h, n) for h in HEAD)}
        self.trained = sum(p.numel() for p in trained if id(p) not in heads)
        self.optimizer = torch.optim.AdamW(trained, 1e-4)
        if entry.by == "ours":
            self.bytes = 4 * sum(p.numel() for p in held.values()) or 4 * self.trained
        else:
            self.bytes = 4 * self.trained
        self.model.train()

    def step(self) -> None:
        began = time.perf_counter()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - began)


def stepper(entry: Entry, batch: dict[str, Tensor]) -> Stepper | None:
    """None, and a line that says why, where huggingface/peft computes something else of a classifier."""
    try:
        return Stepper(entry, batch)
    except ValueError as reason:
        if entry.by == "ours":
            raise
        Console(stderr=True).print(f"no line of huggingface/peft: {reason}")
        return None


def step_ratios(steppers: list[Stepper], reference: Stepper, rounds: int) -> list[float]:
    """Median over rounds of each model's step over the reference's in the same round; no number without rounds."""
    if not rounds:
        return [float("nan")] * len(steppers)
    for _ in range(rounds + 1):  # the first warms up
        for each in steppers:
            each.step()
    return [
        statistics.median(a / b for a, b in zip(s.seconds[2:], reference.seconds[2:], strict=True)) for s in steppers
    ]


def entries(names: list[str], with_peft: bool, given: dict[str, dict[str, Any]]) -> list[Entry]:
    found = []
    for name in names:
        method = registry.load(name)(**OPTIONS.get(name, {}) | given.get(name, {}))
        found.append(Entry(method))
        if with_peft and method.traits.hf and not method.traits.hf.endswith(":"):
            found.append(Entry(method, "peft"))
    return found


def lines(options: argparse.Namespace) -> Iterator[str]:
    first = ["lora"] if options.rounds or "lora" in options.methods else []  # the one to compare with
    chosen = entries([*first, *(n for n in options.methods if n != "lora")], options.peft, options.kwargs)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (32, 32), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    steppers = [s for entry in chosen if (s := stepper(entry, batch)) is not None]
    saved = [kept_for_backward(s.model, s.batch) for s in steppers]
    ratios = step_ratios(steppers, steppers[0], options.rounds)
    yield "| method | by | accuracy | trained | step / LoRA's | saved for backward | adapter |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for each, ratio, kept in zip(steppers, ratios, saved, strict=True):
        entry = each.entry
        seeds = range(1, 1 + (options.seeds if entry.by == "ours" else min(options.seeds, options.peft_seeds)))
        scores = [accuracy(entry, options, seed) for seed in seeds]
        mean = f"{statistics.mean(scores):.2%}" if scores else "-"
        spread = f" +- {statistics.stdev(scores):.2%}" if len(scores) > 1 else ""
        yield (
            f"| {entry.method.name} | {entry.by} | {mean}{spread} | {each.trained:,} | "
            f"{ratio:.2f} | {kept / 1e6:.1f} MB | {each.bytes / 1e3:,.0f} kB |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--methods", nargs="+", default=[n for n in registry.names()])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--peft-seeds", type=int, default=3, help="at most so many for huggingface/peft's, or 0")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--limit", type=float, default=1.0, help="share of the training rows")
    parser.add_argument("--precision", default="32-true", help="of the fits; steps are timed in 32 bits")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each model for the times, or 0")
    parser.add_argument("--peft", action="store_true", help="also huggingface/peft's version where it has the method")
    parser.add_argument("--kwargs", type=json.loads, default={}, help="options of methods by name, as JSON")
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--rates", type=json.loads, default={}, help="learning rates of methods by name, as JSON")
    options = parser.parse_args()
    LEARNING_RATES.update(options.rates)
    silence()
    show(lines(options), options.out)


if __name__ == "__main__":
    main()
