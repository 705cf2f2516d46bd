"""Let methods look at training batches before they are injected."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from rich.progress import track
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_peft import ckpt, resume
from lightning_peft.method import Method
from lightning_peft.patch import Patches


def run(
    trainer: Trainer,
    pl_module: LightningModule,
    model: nn.Module,
    methods: Sequence[Method],
    train: Sequence[str],
    batches: int,
) -> dict[str, Any]:
    """What each method's ``calibrate`` found, by method name; ``combine`` makes one of what the ranks found.

    Batches come from the fit's own training loader; random states, the training loop, buffers, metrics and what the
    module logs are untouched by it.

    Args:
        trainer: before its strategy is set up, its training loaders made.
        pl_module: whose training step gives the loss.
        model: to calibrate on, without adapters; methods get it frozen, as in ``inject``.
        methods: those that do not calibrate are passed over.
        train: names of the base parameters that train along.
        batches: largest number of training batches to look at.

    Raises:
        ValueError: the training step steps optimizers itself, or gives no loss.
    """
    chosen = [m for m in methods if m.calibrates]
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"{[m.name for m in chosen]} look at data before the fit by running training_step, which under manual "
            "optimization would already train: use automatic optimization, or a method without calibrate"
        )
    trainer.precision_plugin.convert_module(pl_module)
    pl_module.to(trainer.strategy.root_device)
    stats: dict[str, Any] = {}
    for method in chosen:
        with frozen(model, train), _untouched(trainer, pl_module), torch.enable_grad():
            found = method.calibrate(model, _batches(trainer, method, batches), lambda b: _loss(trainer, pl_module, b))
        found = _on_every_rank(trainer, method, found)
        stats[method.name] = move_data_to_device(found, trainer.strategy.root_device)
    return stats


def _on_every_rank(trainer: Trainer, method: Method, found: Any) -> Any:
    if trainer.world_size > 1 and type(method).combine is not Method.combine:
        found = method.combine(ckpt.of_all_ranks(move_data_to_device(found, "cpu")))
    return trainer.strategy.broadcast(found)  # also what was combined: devices may round unlike each other


@contextlib.contextmanager
def frozen(model: nn.Module, train: Sequence[str]) -> Iterator[None]:
    """What trains is what will train beside the method, so that it finds the targets that ``inject`` will find."""
    before = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    for name in train:
        model.get_parameter(name).requires_grad_(True)
    try:
        yield
    finally:
        model.requires_grad_(False)
        for p in before:
            p.requires_grad_(True)


@contextlib.contextmanager
def _untouched(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Put back what running the training step and reading the loaders changes beside parameters."""
    quiet = Patches()
    for name in ("log", "log_dict"):
        quiet.put(pl_module, name, lambda old: lambda *args, **kwargs: None)
    buffers = [(b, b.clone()) for b in pl_module.buffers()]  # a batch norm's statistics belong to the base
    generators = [(g, g.get_state()) for dl in _loaders(trainer).flattened for g in resume.generators(dl)]
    try:
        with isolate_rng():
            yield
    finally:
        quiet.undo()
        pl_module.zero_grad()
        for generator, state in generators:
            generator.set_state(state)
        for buffer, before in buffers:
            buffer.copy_(before)
        for metric in pl_module.modules():
            if isinstance(metric, Metric):
                metric.reset()


def _loaders(trainer: Trainer) -> CombinedLoader:
    """The training loaders, combined as the fit combines them, with an iterator of their own."""
    fits = trainer.fit_loop._combined_loader  # private: the property beside it gives the loaders, not how to combine
    assert fits is not None
    mode: Any = fits._mode
    return CombinedLoader(fits.iterables, mode)


def _batches(trainer: Trainer, method: Method, count: int) -> Iterator[Any]:
    """At most ``count`` batches, on the device and through the module's transfer hooks as in the fit."""
    count = int(min(count, trainer.num_training_batches))
    hidden = trainer.progress_bar_callback is None or not trainer.is_global_zero
    read, title = itertools.islice(_loaders(trainer), count), f"calibrating {method.name}"
    for batch, _, _ in track(read, title, total=count, transient=True, disable=hidden):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)  # private: the loop's own
        yield trainer.strategy.batch_to_device(batch)


def _loss(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Tensor:
    step: Any = pl_module.training_step
    numbered = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    with trainer.precision_plugin.train_step_context():
        output = step(batch, 0) if numbered else step(batch)
    loss = output["loss"] if isinstance(output, dict) else output
    if loss is None:
        raise ValueError("training_step returned None for a batch that a method calibrates on, which needs its loss")
    return loss
