"""Small fits through Lightning and the PEFT callback: in this process, resumed, and in two processes side by side."""

import functools
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from datetime import timedelta
from io import BytesIO, StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment, find_free_network_port
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map  # private: flattens what models take
from torch.utils.data import DataLoader

from lightning_peft.callback import PEFT
from lightning_peft.find import exact
from lightning_peft.testing.case import Case
from lightning_peft.testing.compare import trained_tensors

PATIENCE = timedelta(seconds=90)  # for the other process, which may have died


def examples(batch: Any) -> int:
    """Size of dimension 0 of the first tensor in the batch."""
    return next(len(t) for t in tree_leaves(batch) if isinstance(t, Tensor))


def part(batch: Any, index: slice) -> Any:
    """The batch with some of its examples, contiguous as a collated batch is."""
    n = examples(batch)
    return tree_map(lambda t: t[index].contiguous() if isinstance(t, Tensor) and t.dim() and len(t) == n else t, batch)


class Fit(LightningModule):
    """The base of a case as a LightningModule that knows nothing of methods."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.model = case, case.base().train()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.case.loss(self.model, batch)

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)


class SplitFit(Fit):
    """Each process takes its share of the one batch. No dropout and no Adam, which would blow rounding up."""

    start: dict[str, Tensor] | None = None

    def on_train_start(self) -> None:
        self.start = trained_tensors(self.model)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.model.eval()
        if self.start is not None:  # calibration, before that, sees the whole batch in every process
            batch = part(batch, slice(self.global_rank, None, self.trainer.world_size))
        return self.case.loss(self.model, batch)

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1, momentum=0.9)


def _as_it_is(batch: Any) -> Any:
    return batch


def _trainer(case: Case, folder: Path, steps: int, *callbacks: Any, **options: Any) -> Trainer:
    train = [exact(f"model.{n}") for n in case.train]
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": bool(callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    peft = PEFT(case.methods(), model="model", train=train, folder=None)
    return Trainer(default_root_dir=folder, max_steps=steps, callbacks=[peft, *callbacks], **defaults | options)


def fit(case: Case, folder: Path, steps: int, seed: int, ckpt: Path | None = None) -> tuple[Fit, Trainer]:
    """Fit with one example a step, shuffled; a checkpoint every half of the steps lies at ``folder/step=N.ckpt``."""
    seed_everything(seed, verbose=False)
    module = Fit(case)
    singles = [part(case.batch, slice(i, i + 1)) for i in range(examples(case.batch))]
    loader = DataLoader(singles, batch_size=None, shuffle=True, collate_fn=_as_it_is)  # type: ignore[arg-type]
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=steps // 2, save_top_k=-1)
    trainer = _trainer(case, folder, steps, keep)
    with redirect_stdout(StringIO()):  # tables of what was injected
        trainer.fit(module, loader, ckpt_path=ckpt)
    return module, trainer


def optimizer_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Moments and counters of the optimizers, by position."""
    leaves = tree_leaves([o.state_dict() for o in trainer.optimizers])
    return {str(i): torch.as_tensor(x) for i, x in enumerate(leaves) if isinstance(x, Tensor | int | float)}


def fit_whole(case: Case, steps: int, seed: int = 0, **options: Any) -> SplitFit:
    """Fit on the one batch in this process, or on this process's share of it."""
    with TemporaryDirectory() as folder:
        seed_everything(seed, verbose=False)
        module = SplitFit(case)
        loader = DataLoader([case.batch] * steps, batch_size=None, collate_fn=_as_it_is)  # type: ignore[arg-type]
        with redirect_stdout(StringIO()):
            _trainer(case, Path(folder), steps, **options).fit(module, loader)
    return module


def fit_in_two(case: Case, steps: int) -> list[dict[str, Tensor]]:
    """The same in two processes under DDP with half of the examples each; the trained tensors of both.

    The processes stay for the next case. They import this module anew, so a script that calls it needs the usual
    ``if __name__ == "__main__":``.
    """
    port, payload = _workers()[1], pickle.dumps((case, steps))  # by value: a queue would share the tensors' memory
    try:
        futures = [w.submit(_rank, rank, port, payload) for rank, w in enumerate(_workers()[0])]
        return [torch.load(BytesIO(f.result()), weights_only=True) for f in futures]
    except BaseException:
        for worker in _workers()[0]:
            worker.shutdown(wait=False, cancel_futures=True)
        _workers.cache_clear()
        raise


@functools.cache
def _workers() -> tuple[list[ProcessPoolExecutor], int]:
    spawn = multiprocessing.get_context("spawn")
    return [ProcessPoolExecutor(1, mp_context=spawn) for _ in range(2)], find_free_network_port()


def _rank(rank: int, port: int, payload: bytes) -> bytes:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    case, steps = pickle.loads(payload)
    ddp = DDPStrategy(process_group_backend="gloo", timeout=PATIENCE)
    options = {"strategy": ddp, "devices": 2, "plugins": [LightningEnvironment()]}
    module = fit_whole(case, steps, seed=rank, **options)  # other seeds: what differs at start must be broadcast
    buffer = BytesIO()
    torch.save(trained_tensors(module.model), buffer)
    return buffer.getvalue()
