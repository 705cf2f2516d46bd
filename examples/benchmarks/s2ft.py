"""S2FT, LoRA and full fine-tuning in one run: bytes kept for backward, and step times taken in turn.

    python examples/benchmarks/s2ft.py [--rounds 15] [--device cpu]

On a small Llama with grouped queries, drawn at random, and on MiniLM with its dropout and without. LoRA is on its
default targets and, a second time, on the layers that S2FT trains alone, at the rank at which it trains about as many
parameters. Bytes are those of storages that one forward keeps, each counted once, weights left out. Times are ratios to
LoRA's step in the same round, with the middle half of them, so that a noisy machine slows all alike.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from lightning.pytorch import seed_everything
from measure import kept_for_backward
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import Method, arch, hosts, inject, registry
from lightning_peft.attach import adapters
from lightning_peft.find import exact
from lightning_peft.models import TextClassifier
from lightning_peft.models.source import MINILM

Batch = dict[str, Tensor]


def llama() -> tuple[nn.Module, Batch]:
    """8 blocks of width 384, 12 heads on 4 key-values; logits take 3 % of what is kept, about as in LLaMA-2-7B."""
    config = LlamaConfig(vocab_size=1024, hidden_size=384, num_hidden_layers=8, num_attention_heads=12,
                         num_key_value_heads=4, intermediate_size=1024, use_cache=False)  # fmt: skip
    ids = torch.randint(0, 1024, (4, 128))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def minilm() -> tuple[nn.Module, Batch]:
    module = TextClassifier(MINILM, num_labels=2)
    module.configure_model()
    ids = torch.randint(1000, 20000, (16, 64))
    return module.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def minilm_without_dropout() -> tuple[nn.Module, Batch]:
    model, batch = minilm()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, batch


class Stepper:
    """One model, ready to take training steps on one batch; ``method`` None is full fine-tuning."""

    def __init__(self, base: nn.Module, batch: Batch, method: Method | None, device: str) -> None:
        self.model: Any = copy.deepcopy(base).to(device).train()
        self.batch, self.device = {k: v.to(device) for k, v in batch.items()}, device
        if method is not None:
            inject(self.model, method)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained, self.optimizer = sum(p.numel() for p in trained), torch.optim.AdamW(trained, 1e-4)
        self.seconds: list[float] = []

    def step(self) -> None:
        began = time.perf_counter()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device != "cpu":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - began)


def methods(base: nn.Module, d_ratio: float, o_ratio: float) -> dict[str, Method | None]:
    """S2FT, and LoRA of the rank at which it trains as many parameters."""
    s2ft = registry.load("s2ft")(d_ratio=d_ratio, o_ratio=o_ratio)
    model = copy.deepcopy(base)
    inject(model, s2ft)
    held = {name: host for name, host, _ in adapters(model)}
    trained = sum(p.numel() for _, _, a in adapters(model) for p in a.parameters())

    def lora(targets: Iterable[str]) -> Method:
        width = sum(sum(hosts.shape(base.get_submodule(n))) for n in targets)
        return registry.load("lora")(r=max(1, round(trained / width)), targets=[exact(n) for n in targets])

    everywhere, there = lora(arch.role(base, "all-linear")), lora(held)
    return {"S2FT": s2ft, "LoRA": everywhere, "LoRA on the same layers": there, "full": None}


def compare(title: str, base: nn.Module, batch: Batch, options: argparse.Namespace) -> Table:
    chosen = methods(base, options.d_ratio, options.o_ratio)
    steppers = {name: Stepper(base, batch, method, options.device) for name, method in chosen.items()}
    kept = {name: kept_for_backward(s.model, s.batch) for name, s in steppers.items()}
    for _ in range(options.rounds + 2):  # the first two warm up
        for stepper in steppers.values():
            stepper.step()
    table = Table(title=title)
    for heading in ("", "trained", "kept for backward", "of full", "optimizer state", "step / LoRA's", "middle half"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, stepper in steppers.items():
        ratios = [a / b for a, b in zip(stepper.seconds[2:], steppers["LoRA"].seconds[2:], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        table.add_row(
            f"{name}, r={rank}" if (rank := getattr(chosen[name], "r", 0)) else name,
            f"{stepper.trained:,}",
            f"{kept[name] / 1e6:.1f} MB",
            f"{kept[name] / kept['full']:.2f}",
            f"{8 * stepper.trained / 1e6:.1f} MB",
            f"{middle:.2f}",
            f"{low:.2f} to {high:.2f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--d-ratio", type=float, default=0.02)
    parser.add_argument("--o-ratio", type=float, default=0.052)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    seed_everything(0, verbose=False)
    cases = {
        "Llama, 8 blocks, grouped queries, batch 4 x 128": llama,
        "MiniLM, batch 16 x 64": minilm,
        "the same without dropout": minilm_without_dropout,
    }
    for title, make in cases.items():
        base, batch = make()
        Console().print(compare(title, base, batch, options))


if __name__ == "__main__":
    main()
