"""What methods report by layer while a fit runs: as metrics, and at its end as a CSV and a heat map each."""

import csv
import importlib.util
import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_peft.method import Method

log = logging.getLogger("lightning_peft")
CSV = "history.csv"


class History:
    """Values over one fit: quantity ("adalora/rank") -> optimizer step -> layer -> value.

    Args:
        methods: whose ``report`` is asked, at the steps at which the Trainer logs and where shapes changed.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        self.methods = [m for m in methods if type(m).report is not Method.report]
        self.values: dict[str, dict[int, dict[str, float]]] = {}

    def start(self, trainer: Trainer, model: nn.Module) -> None:
        """Take down what a fit starts with; a resumed one goes on after what it has loaded."""
        if not self.values:
            self._take(trainer.global_step, model)

    def after_step(self, trainer: Trainer, pl_module: LightningModule, model: nn.Module, changed: bool) -> None:
        """Take down and log the values if it is time.

        Args:
            trainer: whose optimizer has stepped.
            pl_module: that logs each quantity's mean over layers, under the quantity's name.
            model: that holds the adapters.
            changed: parameters changed shape in this step, which is said.
        """
        step = trainer.global_step
        every = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if not self.methods or not (changed or step % every == 0):
            return
        before = {q: list(by_step.values())[-1] for q, by_step in self.values.items()}
        for quantity, now in self._take(step, model).items():
            pl_module.log(quantity, sum(now.values()) / max(1, len(now)), batch_size=1)
            counts = [before.get(quantity, {}), now]
            if changed and all(isinstance(v, int) for c in counts for v in c.values()) and counts[0] != counts[1]:
                rank_zero_info(f"step {step}: {quantity} {_difference(*counts)}")

    def _take(self, step: int, model: nn.Module) -> dict[str, dict[str, float]]:
        found = {f"{m.name}/{q}": values for m in self.methods for q, values in m.report(model).items()}
        for quantity, values in found.items():
            self.values.setdefault(quantity, {})[step] = dict(values)
        return found

    def end(self, trainer: Trainer, model: nn.Module, folder: Path | None) -> dict[str, Path]:
        """Take down what a fit ends with, and write it.

        Args:
            trainer: whose TensorBoard, if it has one, shows the pictures.
            model: that holds the adapters.
            folder: to write into, None for nowhere.

        Returns:
            name of each file -> its path.
        """
        if not self.methods or not trainer.is_global_zero:
            return {}
        self._take(trainer.global_step, model)
        if folder is None:
            return {}
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / CSV).open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(("quantity", "step", "layer", "value"))
            for quantity, by_step in self.values.items():
                rows.writerows((quantity, step, *item) for step, now in by_step.items() for item in now.items())
        return {"history": folder / CSV} | self._draw(trainer, folder)

    def _draw(self, trainer: Trainer, folder: Path) -> dict[str, Path]:
        if importlib.util.find_spec("matplotlib") is None:
            log.info("pip install matplotlib, and what methods report is drawn as well")
            return {}
        written = {}
        for quantity, by_step in self.values.items():
            figure = heat_map(quantity, by_step)
            written[quantity] = folder / f"{quantity.replace('/', '_')}.png"
            figure.savefig(written[quantity], dpi=120)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure(quantity, figure, trainer.global_step)
        return written


def _difference(before: dict[str, float], now: dict[str, float]) -> str:
    old, new = sum(before.values()), sum(now.values())
    moved = sum(max(0, value - before.get(layer, 0)) for layer, value in now.items())
    return f"{old} -> {new}" if old != new else f"{new} as before, {moved} of them in other layers"


def heat_map(title: str, by_step: dict[int, dict[str, float]]) -> Any:
    """A matplotlib Figure: layers from top to bottom, optimizer steps to the right, the value as colour.

    Args:
        title: of the picture.
        by_step: step -> layer -> value; a layer that a step lacks stays blank there.
    """
    from matplotlib.figure import Figure  # optional; not pyplot, whose state is global

    layers = list(dict.fromkeys(layer for now in by_step.values() for layer in now))
    steps = sorted(by_step)
    grid = [[by_step[s].get(layer, float("nan")) for s in steps] for layer in layers]
    figure = Figure(figsize=(9, min(2 + 0.16 * len(layers), 40)), layout="constrained")
    axes = figure.subplots()
    edges = [steps[0], *((a + b) / 2 for a, b in pairwise(steps)), max(steps[-1], steps[0] + 1)]
    mesh = axes.pcolormesh(edges, range(len(layers) + 1), grid, cmap="viridis")
    axes.set_yticks([i + 0.5 for i in range(len(layers))], layers, fontsize=6)
    axes.invert_yaxis()
    axes.set(title=title, xlabel="optimizer step")
    figure.colorbar(mesh, ax=axes)
    return figure
