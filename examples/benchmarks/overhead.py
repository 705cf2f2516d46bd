"""What the callback costs: the same LoRA by PEFT and written by hand in the LightningModule, in one run.

Both fits train the same network on the same batches, in turn, many short fits each; the ratio is the median of paired
ratios, so that a noisy machine slows both. Also: the time to inject LoRA into a 7B-shaped Llama on the meta device.

    python examples/benchmarks/overhead.py
"""

import argparse
import logging
import math
import statistics
import tempfile
import time
import warnings
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, LlamaConfig

import lightning_peft
from lightning_peft.methods import LoRA

R, ALPHA = 8, 16.0


class HandLoRA(nn.Module):
    """What a Lightning user writes today."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.A = nn.Parameter(torch.empty(R, layer.in_features))
        self.B = nn.Parameter(torch.zeros(layer.out_features, R))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + (x @ self.A.T @ self.B.T) * (ALPHA / R)


class Module(L.LightningModule):
    def __init__(self, by_hand: bool, config: BertConfig) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = BertForSequenceClassification(config)
        self.seconds: list[float] = []
        if by_hand:
            self.model.requires_grad_(False)
            for name, layer in list(self.model.bert.named_modules()):
                if isinstance(layer, nn.Linear):
                    parent, _, child = name.rpartition(".")
                    setattr(self.model.bert.get_submodule(parent), child, HandLoRA(layer))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds.append(time.perf_counter() - self.started)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]).logits, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-3)


def fit(by_hand: bool, config: BertConfig, steps: int, root: str) -> float:
    """Median seconds of a whole training step, callback hooks included."""
    module = Module(by_hand, config)
    method = LoRA(r=R, alpha=ALPHA, targets=("all-linear",))
    callbacks: list[L.Callback] = [] if by_hand else [lightning_peft.PEFT(method, folder=None)]
    g = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randint(0, 1000, (steps * 8, 64), generator=g), torch.randint(0, 2, (steps * 8,)))
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        default_root_dir=root,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    start = time.perf_counter()
    trainer.fit(module, DataLoader(data, 8))
    module.seconds.append((time.perf_counter() - start) / steps)
    return statistics.median(module.seconds[len(module.seconds) // 3 : -1])


def inject_7b() -> tuple[float, int, int]:
    """Seconds to inject LoRA into a Llama-7B on the meta device, layers adapted, parameters trained."""
    config = LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    start = time.perf_counter()
    lightning_peft.inject(model, LoRA(r=16))
    seconds = time.perf_counter() - start
    hosts = sum(1 for _ in lightning_peft.adapters(model))
    return seconds, hosts, sum(p.numel() for p in model.parameters() if p.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    times: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as root:
        for i in range(options.pairs):
            order = (True, False) if i % 2 else (False, True)
            pair = {by_hand: fit(by_hand, config, options.steps, root) for by_hand in order}
            times.append((pair[False], pair[True]))
    ratios = sorted(a / b for a, b in times)
    seconds, hosts, trained = inject_7b()
    table = Table(title="MiniLM-sized BERT, batch 8 x 64 tokens, LoRA r=8 on all linear layers")
    for column in ("", "value"):
        table.add_column(column)
    table.add_row("step with PEFT(LoRA), median", f"{statistics.median(a for a, _ in times) * 1e3:.1f} ms")
    table.add_row("step with LoRA by hand, median", f"{statistics.median(b for _, b in times) * 1e3:.1f} ms")
    table.add_row("ratio, median of pairs", f"{statistics.median(ratios):.3f}")
    table.add_row("ratio, all pairs", " ".join(f"{r:.3f}" for r in ratios))
    table.add_row("Llama-7B on meta: inject r=16", f"{seconds:.2f} s, {hosts} layers, {trained:,} parameters")
    Console().print(table)


if __name__ == "__main__":
    main()
