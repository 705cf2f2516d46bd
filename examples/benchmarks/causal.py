"""Methods on a small causal language model: loss on the answers after one pass, trained parameters, seconds a step.

    python examples/pretrain_small_llama.py --out LLAMA --text shakespeare/input.txt commonsense/boolq/train.json
    python examples/benchmarks/causal.py --model LLAMA --train gsm8k/train.jsonl --val gsm8k/dev.jsonl [--seeds 3]
        [--methods lora kasa] [--kwargs '{"kasa": {"r": 7}}'] [--limit 0.3] [--out TABLE.md]

Give ranks with --kwargs so that all train as many parameters. "none" is the base as it is, "full" trains all of it,
"lora+deft" is two methods in one list. The step time is a fit's median, so compare it on a quiet machine only;
methods.py times in turn. Densities are of the MLPs' activations on the validation rows: not zero, and larger than 1e-3.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from measure import QUIET, WATCH, show, silence

from lightning_peft import PEFT, registry
from lightning_peft.data import InstructionData
from lightning_peft.models import CausalLM

RATES = {"full": 1e-3}
RATE = 3e-3  # of all others, unless --rates names them


class Clock(Callback):
    """Seconds of every training step, and what trains."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.trained = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)

    def on_train_batch_start(self, *args: Any) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def fit(name: str, options: argparse.Namespace, seed: int) -> tuple[float, Clock, tuple[float, float]]:
    """(validation loss a token of the answers, its clock, its densities) of one pass over the training rows."""
    seed_everything(seed, verbose=False)
    data = InstructionData(
        options.model, train=options.train, val=options.val, prompt_column=options.prompt,
        response_column=options.response, max_length=256, batch_size=16,
    )  # fmt: skip
    rate = options.rates.get(name, RATES.get(name, RATE))
    model = CausalLM(options.model, learning_rate=rate)
    clock = Clock()
    callbacks: list[Callback] = [clock]
    if name not in ("none", "full"):
        held = [registry.load(n)(**options.kwargs.get(n, {})) for n in name.split("+")]
        callbacks.append(PEFT(held, model="model", folder=None))
    trainer = Trainer(max_epochs=1, limit_train_batches=options.limit, precision=options.precision, accelerator="cpu",
                      enable_checkpointing=False, limit_val_batches=0, callbacks=callbacks, **QUIET)  # fmt: skip
    if name != "none":
        trainer.fit(model, data)
    model.configure_model()
    WATCH.inject(model.model)
    checker = Trainer(accelerator="cpu", enable_checkpointing=False, precision=options.precision, **QUIET)
    with torch.no_grad():
        loss = float(checker.validate(model, data, verbose=False)[0]["val_loss"])
    told = WATCH.report(model.model)
    hard, above = (statistics.mean(told[q].values()) for q in ("eval_hard", "eval_above"))
    return loss, clock, (hard, above)


def lines(options: argparse.Namespace) -> Iterator[str]:
    yield "| method | loss on answers | trained | s / step | not 0 | > 1e-3 |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in options.methods:
        fits = [fit(name, options, seed) for seed in range(1, 1 + options.seeds)]
        losses, clock = [f[0] for f in fits], fits[0][1]
        spread = f" +- {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        step = f"{statistics.median(clock.seconds):.3f}" if clock.seconds else "-"
        hard, above = (statistics.mean(density) for density in zip(*(f[2] for f in fits), strict=True))
        yield (
            f"| {name} | {statistics.mean(losses):.4f}{spread} | {clock.trained:,} | {step} | {hard:.3f} | "
            f"{above:.3f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--prompt", default="question")
    parser.add_argument("--response", default="answer")
    parser.add_argument("--methods", nargs="+", default=["none", "full", "lora", "kasa", "bone", "ssvd", "tera"])
    parser.add_argument("--kwargs", type=json.loads, default={}, help="options of methods by name, as JSON")
    parser.add_argument("--rates", type=json.loads, default={}, help="learning rates by name, as JSON")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1.0, help="share of the training rows")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--out", type=Path, help="write the table here")
    options = parser.parse_args()
    silence()
    show(lines(options), options.out)


if __name__ == "__main__":
    main()
