"""What lifecycle methods are for, measured against the same training without them, on sentences of yours.

    python examples/benchmarks/lifecycle.py --train sst2/train.tsv --val sst2/dev.tsv [--runs lora deft] [--seeds 3]
        [--epochs 1] [--limit 1.0] [--precision 32-true] [--out TABLE.md] [--rates '{"full": 2e-4}']

Each run fine-tunes MiniLM on labelled sentences (tsv without a header: sentence, label). Columns: accuracy on --val;
parameters that train at the end, without the head; of the base's parameters, what is left; a training step and an
evaluation step at the end, as ratios to those of a fresh LoRA in turn with it, so that a noisy machine slows both
alike; densities of MLP activations in evaluation (soft with eps 1e-7, not 0, and larger than 1e-3); sharpness, the rise
of the loss on --val's first rows when what trains is moved at random by 20 % of its length, and when it is moved along
the gradient by 1 % of it; bytes of the optimizer's state.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from measure import QUIET, WATCH, show, silence
from torch import Tensor, nn

from lightning_peft import PEFT, Method, registry
from lightning_peft.attach import detach_all
from lightning_peft.data import TextClassificationData
from lightning_peft.inject import inject, pattern_selects
from lightning_peft.models import TextClassifier
from lightning_peft.models.source import MINILM

HEAD = ("*classifier*",)


def methods(name: str, steps: int = 100, given: dict[str, dict[str, Any]] | None = None) -> list[Method]:
    """The methods of a run of so many steps by name; "full" trains the layers that GaLore does."""

    def make(method: str, **options: Any) -> Method:
        return registry.load(method)(**options | (given or {}).get(method, {}))

    runs: dict[str, Callable[[], list[Method]]] = {
        "full": lambda: [make("partial_tuning", targets=("all-linear",))],
        "lora": lambda: [make("lora", r=8)],
        "lora_bitfit": lambda: [make("lora", r=8), make("bitfit")],  # biases can move activations towards zero
        "deft": lambda: [make("lora", r=8), make("bitfit"), make("deft", weight=1.0, eps=1e-3, warmup=0.2)],
        "ada_deft": lambda: [make("lora", r=8), make("bitfit"), make("ada_deft", weight=1.0, eps=1e-3, warmup=0.2)],
        "light_peft": lambda: [make("lora", r=8), make("light_peft", estimation_steps=min(200, steps // 5),
                                                       head_ratio=0.4, ffn_ratio=0.42, module_ratio=0.3)],
        "adalora": lambda: [make("adalora", init_r=12, target_r=8)],
        "l1ra": lambda: [make("l1ra", r=8, l1=0.5)],
        "flat_lora": lambda: [make("flat_lora", r=8)],
        "sam": lambda: [make("lora", r=8), make("sam")],
        "bsam": lambda: [make("lora", r=8), make("bsam")],
        "galore": lambda: [make("galore", r=8, scale=4.0)],
        "natural_galore": lambda: [make("natural_galore", r=8, scale=4.0)],
    }  # fmt: skip
    return runs[name]()


RUNS = ("full", "lora", "lora_bitfit", "deft", "ada_deft", "light_peft", "adalora", "l1ra", "flat_lora", "sam", "bsam",
        "galore", "natural_galore")  # fmt: skip
RATES = {"full": 2e-4, "galore": 3e-4, "natural_galore": 3e-4, "adalora": 1e-2}
RATE = 1e-3  # of the others
DENSITIES = ("eval_soft", "eval_hard", "eval_above")
COLUMNS = ("run", "accuracy", "trained", "base's blocks", "step / LoRA's", "eval / LoRA's", "soft", "not 0", "> 1e-3",
           "at random", "uphill", "fit", "optimizer")  # fmt: skip


class Run:
    """One fit, and what is left of it."""

    def __init__(self, name: str, options: argparse.Namespace, seed: int) -> None:
        seed_everything(seed, verbose=False)
        self.data = TextClassificationData(MINILM, train=options.train, val=options.val, columns=["text", "label"],
                                           max_length=64, batch_size=options.batch)  # fmt: skip
        self.module = TextClassifier(MINILM, learning_rate=options.rates.get(name, RATES.get(name, RATE)))
        rows = Path(options.train).read_text(encoding="utf-8").count("\n")
        held = methods(name, int(rows // options.batch * options.limit) * options.epochs,
                       options.kwargs)  # fmt: skip
        callbacks: list[Any] = [PEFT([*held, WATCH], model="model", train=HEAD, folder=None)] if held else []
        trainer = Trainer(max_epochs=options.epochs, limit_train_batches=options.limit, precision=options.precision,
                          accelerator="cpu", enable_checkpointing=False, limit_val_batches=0, callbacks=callbacks,
                          **QUIET)  # fmt: skip
        began = time.perf_counter()
        trainer.fit(self.module, self.data)
        self.seconds = time.perf_counter() - began
        self.optimizer = sum(t.numel() * t.element_size() for o in trainer.optimizers for s in o.state.values()
                             for t in s.values() if isinstance(t, Tensor))  # fmt: skip
        checker = Trainer(accelerator="cpu", enable_checkpointing=False, precision=options.precision, **QUIET)
        if held:
            WATCH.forget(self.module.model)
        self.accuracy = float(checker.validate(self.module, self.data, verbose=False)[0]["val_accuracy"])
        told = WATCH.report(self.module.model) if held else {}
        self.density = {q: statistics.mean(told[q].values()) for q in DENSITIES if q in told}
        detach_all(self.module.model, WATCH.name)  # its cost is not the run's
        self.batches = [b for _, b in zip(range(8), self.data.val_dataloader(), strict=False)]

    @property
    def model(self) -> Any:
        return self.module.model

    def trained(self) -> int:
        names = self.model.named_parameters()
        return sum(p.numel() for n, p in names if p.requires_grad and not any(pattern_selects(h, n) for h in HEAD))

    def sharpness(self, draws: int = 6) -> tuple[float, float]:
        """Rise of the loss by steps of 20 % of the length of what trains at random, the mean, and of 1 % uphill."""
        self.model.eval()
        moved = [p for n, p in self.model.named_parameters() if p.requires_grad]
        self.model.zero_grad()
        for b in self.batches:
            self.model(**b).loss.backward()
        uphill = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in moved]
        generator = torch.Generator().manual_seed(0)
        at_random = [[torch.randn(p.shape, generator=generator) for p in moved] for _ in range(draws)]
        with torch.no_grad():
            before, start = self._loss(), [p.clone() for p in moved]
            length = _length(start)
            rises = []
            for size, step in [(0.01, uphill), *((0.2, step) for step in at_random)]:
                for p, s, d in zip(moved, start, step, strict=True):
                    p.copy_(s + d * (size * length / _length(step)))
                rises.append(self._loss() - before)
            for p, s in zip(moved, start, strict=True):
                p.copy_(s)
        return statistics.mean(rises[1:]), rises[0]

    def _loss(self) -> float:
        return statistics.mean(float(self.model(**b).loss) for b in self.batches)


def _length(tensors: list[Tensor]) -> float:
    return sum(float(t.square().sum()) for t in tensors) ** 0.5


def ratios(model: Any, batch: dict[str, Tensor], rounds: int) -> tuple[float, float]:
    """(training step, evaluation step) over those of a fresh LoRA r=8 on the same base, medians of pairs."""
    plain = TextClassifier(MINILM, num_labels=2)
    plain.configure_model()
    head = [n for n, _ in plain.model.named_parameters() if any(pattern_selects(h, n) for h in HEAD)]
    inject(plain.model, methods("lora")[0], train=head)
    return tuple(
        statistics.median(a / b for a, b in ((_time(model, batch, train), _time(plain.model, batch, train))
                                             for _ in range(rounds)))
        for train in (True, False)
    )  # type: ignore[return-value]  # fmt: skip


def _time(model: nn.Module, batch: dict[str, Tensor], train: bool) -> float:
    model.train(train)
    began = time.perf_counter()
    with nullcontext() if train else torch.no_grad():
        loss = model(**batch).loss
    if train:
        loss.backward()
        model.zero_grad()
    return time.perf_counter() - began


def lines(options: argparse.Namespace) -> Iterator[str]:
    ids = torch.randint(1000, 20000, (16, 32), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "| " + " | ".join("---" for _ in COLUMNS) + " |"
    for name in options.runs:
        runs = [Run(name, options, seed) for seed in range(1, 1 + options.seeds)]
        last, scores = runs[-1], [r.accuracy for r in runs]
        spread = f" +- {statistics.stdev(scores):.2%}" if len(scores) > 1 else ""
        base = sum(p.numel() for n, p in last.model.named_parameters() if ".adapters." not in n and "encoder" in n)
        train, evaluate = ratios(last.model, batch, options.rounds)
        density = " | ".join(
            f"{statistics.mean(r.density[q] for r in runs):.3f}" if last.density else "-" for q in DENSITIES
        )
        sharp = " | ".join(f"{statistics.mean(of):.4f}" for of in zip(*(r.sharpness() for r in runs), strict=True))
        yield (
            f"| {name} | {statistics.mean(scores):.2%}{spread} | {last.trained():,} | {base:,} | {train:.2f} | "
            f"{evaluate:.2f} | {density} | {sharp} | {last.seconds:.0f} s | {last.optimizer / 1e6:.1f} MB |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--runs", nargs="+", default=RUNS, choices=RUNS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--limit", type=float, default=1.0, help="share of the training rows")
    parser.add_argument("--precision", default="32-true", help="of the fits")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of steps for the ratios")
    parser.add_argument("--rates", type=json.loads, default={}, help="learning rates of runs by name, as JSON")
    parser.add_argument("--kwargs", type=json.loads, default={}, help="options of methods by name, as JSON")
    parser.add_argument("--out", type=Path, help="write the table here")
    options = parser.parse_args()
    silence()
    show(lines(options), options.out)


if __name__ == "__main__":
    main()
