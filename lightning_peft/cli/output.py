"""What the commands print: short, without third parties' noise, with the next command at the end."""

import json
import logging
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import rich
import transformers
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from torch import Tensor

from lightning_peft.callback import PEFT
from lightning_peft.cli import runs
from lightning_peft.cli.runs import Run

# Messages of Lightning that tell a user of this command nothing, each by a part of its own.
NOISE = (
    "GPU available",  # the first line of a run says which device it uses
    "TPU available",
    "Tip: For seamless",  # advertises other packages
    "Seed set to",  # stands in config.yaml
    "Restoring states from the checkpoint",  # the line before names the checkpoint
    "Restored all states from the checkpoint",
    "Loaded model weights from the checkpoint",
    "`Trainer.fit` stopped:",  # at the end that was planned; "Finished" follows
    "outputs differ by at most",  # stands in the summary
    "Failed to load JSON from file",  # the error that follows names the line
    "to estimate number of stepping batches",  # a loader is made a moment earlier than it would be
)
LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "datasets.packaged_modules.json.json",
    "transformers.modeling_utils",
    "transformers.utils.loading_report",
)
# Warnings that are no news to a user of this command, each by its beginning.
HARMLESS = (
    r".*does not have many workers",  # loading short texts is not what a step waits for
    r"Experiment logs directory .* exists and is not empty",  # runs.py made sure that it is ours, and keeps old metrics
    r"Checkpoint directory .* exists and is not empty",  # likewise, when a run goes on
    r"The dirpath has changed from .*/(test|validate|predict)(-\d+)?/checkpoints",  # measuring saves no checkpoints
    r"LightningCLI's args parameter",  # we hand on what followed the command
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # between Lightning and torch
    r"The number of training batches \(.*\) is smaller than the logging",  # metrics by epoch are logged anyway
)


def quieten() -> None:
    """Silence the messages above, and bars that are gone before they can be read."""
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    for pattern in HARMLESS:
        warnings.filterwarnings("ignore", pattern)
    warnings.showwarning = _show  # one line each, without the line of source that raised it
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if "LOAD REPORT" in text:  # a new head, which the table of what trains shows; anything else in it is news
        return any(word in text for word in ("UNEXPECTED", "MISMATCH", "CONVERSION"))
    return not any(part in text for part in NOISE)


def note(text: str) -> None:
    rich.get_console().print(text, style="dim", highlight=False, markup=False, soft_wrap=True)


def _show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
    warn(" ".join(str(message).split()))


def warn(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(Text.assemble(("warning: ", "bold yellow"), text))


class Bar(RichProgressBar):
    """Lightning's bar with the training loss alone; what is measured gets lines of its own, see ``MetricLines``."""

    def __init__(self) -> None:
        colours = dict.fromkeys(("progress_bar", "progress_bar_finished", "progress_bar_pulse"), "cyan")
        super().__init__(theme=RichProgressBarTheme(**colours))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        shown = super().get_metrics(trainer, pl_module)
        return {k: v for k, v in shown.items() if k != "v_num" and not k.startswith(("val", "test"))}


class MetricLines(Callback):
    """One line after each validation, above the progress bar, which keeps only the present."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.is_global_zero:
            told = "  ".join(f"{k} {v:.4g}" for k, v in _metrics(trainer).items())
            rich.get_console().print(
                f"epoch {trainer.current_epoch:<3} step {trainer.global_step:<6} {told}",
                highlight=False,
                markup=False,
            )


def _metrics(trainer: Trainer) -> dict[str, float]:
    """What was logged last, by name; of values logged by step and by epoch, under the name that stands for both."""
    return {k: float(v) for k, v in trainer.callback_metrics.items() if not k.endswith(("_step", "_epoch"))}


def before_fit(trainer: Trainer, model: LightningModule, data: LightningDataModule | None, run: Run | None) -> None:
    """What is about to run, on which device, and where to."""
    on = f" on {type(data).__name__}" if data is not None else ""
    device = f"{trainer.num_devices} x {trainer.strategy.root_device.type}"
    where = f", into {runs.short(run.folder)}" if run else ", writing nothing (fast_dev_run)"
    note(f"{type(model).__name__}{on}, {device}, precision {trainer.precision}{where}")


def last_checkpoint(run: Run | None) -> str:
    """For the message after Ctrl-C."""
    found = run.checkpoints() if run else []
    if not found:
        return "no checkpoint had been written yet"
    return (
        f"the last checkpoint is {runs.short(found[-1])}; go on with --ckpt_path {shlex.quote(runs.short(found[-1]))}"
    )


def after_fit(
    trainer: Trainer, data: LightningDataModule | None, callback: PEFT, run: Run | None, seconds: float
) -> None:
    """Print what was written, the metrics and the next commands; write summary.json."""
    if run is None:
        note("fast_dev_run: the fit works; nothing was written")
        return
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    metrics = _metrics(trainer)
    run.end(best, seconds, metrics)
    tokenizer: Any = getattr(data, "tokenizer", None)
    if "merged" in callback.written and hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(callback.written["merged"])  # so that the folder is a model to use as it stands
    console = rich.get_console()
    console.print(f"\n[bold]Finished[/] in {_duration(seconds)}; in {runs.short(run.folder)}:", highlight=False)
    measured = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k.startswith("val"))
    for line in ([f"  measured   {measured}"] if measured else []) + _written(trainer, callback, run, best):
        console.print(f"[cyan]{line[:12]}[/]{escape(line[12:])}", highlight=False, soft_wrap=True)
    console.print("\n[bold]Next[/]")
    for what, command in _next(trainer, callback, run, best).items():
        console.print(f"  [dim]{what}[/]\n  {escape(command)}", highlight=False, soft_wrap=True)


def _written(trainer: Trainer, callback: PEFT, run: Run, best: str) -> list[str]:
    """Lines of name, path within the run's folder, size, and a word about it; no path is ever cut short."""
    about = {"adapter": "as of the last step", "merged": "the base with the adapter folded in"}
    rows = [(what, path, runs.size(path), about.get(what, "")) for what, path in callback.written.items()]
    rows = [(w, p, s, _proof(p) if w == "proof" else a) for w, p, s, a in rows]
    if best:
        score = getattr(trainer.checkpoint_callback, "best_model_score", None)
        monitor = getattr(trainer.checkpoint_callback, "monitor", None)
        told = "the last" if score is None else f"the best, {monitor} {float(score):.4g}"
        rows.append(("checkpoint", Path(best), runs.size(Path(best)), told))
    if (metrics := run.folder / runs.METRICS).is_file():
        rows.append(("metrics", metrics, runs.size(metrics), "by step and epoch"))
    paths = [str(p.relative_to(run.folder)) if p.is_relative_to(run.folder) else runs.short(p) for _, p, _, _ in rows]
    width = max(map(len, paths), default=0)
    name = max([10, *(len(r[0]) for r in rows)])  # what methods report may have longer names
    return [f"  {r[0]:<{name}} {p:<{width}}  {r[2]:>8}  {r[3]}" for r, p in zip(rows, paths, strict=True)]


def _proof(path: Path) -> str:
    proof = json.loads(path.read_text())
    return f"outputs differ by at most {proof['largest']:.2g}"


def _next(trainer: Trainer, callback: PEFT, run: Run, best: str) -> dict[str, str]:
    """What can be done with this run, as commands that work as they stand."""
    folder, todo = shlex.quote(runs.short(run.folder)), {}
    if is_overridden("test_step", trainer.lightning_module):
        todo["measure on the test split"] = f"lightning-peft test --config {folder}/{runs.CONFIG}"
    if "adapter" in callback.written:
        adapter = shlex.quote(runs.short(callback.written["adapter"]))
        if "merged" not in callback.written and all(m.traits.merge for m in callback.methods):
            todo["fold into the base"] = f"lightning-peft merge {adapter} --output {folder}/merged"
        if any(m.traits.hf for m in callback.methods) and any(
            hasattr(m, "save_pretrained") for m in trainer.lightning_module.modules()
        ):
            todo["to huggingface/peft's format"] = f"lightning-peft export {adapter} --format hf --output {folder}/hf"
    saver = trainer.checkpoint_callback
    if best and getattr(saver, "current_score", None) != getattr(saver, "best_model_score", None):
        source = shlex.quote(runs.short(best))
        todo["the best checkpoint's adapter"] = (
            f"lightning-peft export {source} --format lightning-peft --output {folder}/best"
        )
    return todo


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def write_predictions(batches: Sequence[Any], folder: Path, rank: int) -> Path:
    """One JSON object a row, from what ``predict_step`` returned: a dict of columns, a list, or a tensor, by batch."""
    file = folder / ("predictions.jsonl" if rank == 0 else f"predictions-{rank}.jsonl")
    with file.open("w", encoding="utf-8") as out:
        for batch in batches:
            columns = {k: _plain(v) for k, v in (batch if isinstance(batch, dict) else {"prediction": batch}).items()}
            for row in zip(*columns.values(), strict=True):
                out.write(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n")
    note(f"predictions written to {runs.short(file)}")
    return file


def _plain(values: Any) -> list[Any]:
    return values.tolist() if isinstance(values, Tensor) else list(values)
