"""Resume bit for bit: random states, the place in the data, and gradients of an open accumulation window.

Lightning restores weights, optimizers and loop counters, but neither random generators nor the position of a plain
DataLoader in a half-read epoch. Both are kept in the checkpoint here, and the loader is replayed to where it was.
"""

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

State = dict[str, Any]


def rng_state() -> State:
    """States of Python's, NumPy's and torch's generators as plain data and tensors, loadable without pickle."""
    kind, keys, pos, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), pos, has_gauss, cached),  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: State) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


class Tape:
    """Records where each training loader started and how far it was read; replays that after a resume.

    Loaders start when their first batch is asked for, not when ``iter`` is called on them: Lightning calls it at
    different moments in a fresh and in a resumed fit, and each start draws from the random generators.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.starts: dict[int, State] = {}
        self.pending: State | None = None

    def wrap(self, loader: Any) -> Any:
        """Make a DataLoader replayable in place; one that keeps its own state is left to Lightning."""
        if isinstance(loader, DataLoader) and (hasattr(loader, "tape") or not hasattr(loader, "load_state_dict")):
            if not hasattr(loader, "tape"):
                loader.__class__ = _replayable(type(loader))
            loader.tape = self  # type: ignore[attr-defined]
        return loader

    def iterate(self, loader: Any, start: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """The loader's batches, those of a half-read epoch left out after a resume."""
        index = self._index(loader)
        if index is None:
            yield from start()
            return
        replay = self._replay(index, loader)
        here = self.starts[index] = {"at_start": _state(loader), "read": 0, "ahead": _looks_ahead(loader)}
        batches = start()
        while True:
            if replay and here["read"] == replay["read"] - replay["ahead"]:
                _set(loader, replay["before_last"] if replay["ahead"] else replay["now"])
            if here["ahead"]:
                here["before_last"] = _state(loader)
            batch = next(batches, _END)
            if batch is _END:
                return
            here["read"] += 1
            if replay and replay["ahead"] and here["read"] == replay["read"]:
                _set(loader, replay["now"])
            if not replay or here["read"] > replay["read"] - replay["ahead"]:
                yield batch

    def _index(self, loader: Any) -> int | None:
        """Position among the training loaders, None for a loader of another stage."""
        return next((i for i, dl in enumerate(self._training()) if dl is loader), None)

    def _training(self) -> list[Any]:
        held = self.trainer.train_dataloader
        return [] if held is None else CombinedLoader(held).flattened

    def _replay(self, index: int, loader: Any) -> State | None:
        """What to replay of this loader, None for an epoch from its start; sets the random states to begin with."""
        saved = self.pending and self.pending["loaders"].pop(index, None)
        if not saved:
            return None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        if progress.current.ready == 0 or progress.is_last_batch:  # saved at an epoch's end
            _set(loader, saved["now"])
            return None
        _set(loader, saved["at_start"])
        return saved

    def state(self) -> State:
        """What to put in the checkpoint, of this process."""
        training = self._training()
        return {"loaders": {i: held | {"now": _state(training[i])} for i, held in self.starts.items()}}


_END = object()


def _looks_ahead(loader: Any) -> int:
    """Lightning fetches one batch ahead of training where a loader has no length."""
    return 0 if hasattr(loader.dataset, "__len__") else 1


def _state(loader: Any) -> State:
    return {"rng": rng_state(), "generators": [g.get_state() for g in generators(loader)]}


def generators(loader: Any) -> list[torch.Generator]:
    """Generators of their own that a loader and its samplers draw from."""
    sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    found = [getattr(h, "generator", None) for h in (loader, sampler, batches, getattr(batches, "sampler", None))]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _set(loader: Any, state: State) -> None:
    set_rng_state(state["rng"])
    for generator, held in zip(generators(loader), state["generators"], strict=False):
        generator.set_state(held)


@functools.cache
def _replayable(cls: type[DataLoader]) -> type[DataLoader]:
    class Replayable(cls):
        def __iter__(self: Any) -> Any:
            return self.tape.iterate(self, super().__iter__)  # pyright: ignore[reportAttributeAccessIssue]

        # Lightning asks for these two to believe that a loader can resume; the tape does the work, at a safer moment
        def state_dict(self) -> State:
            return {}

        def load_state_dict(self, state: State) -> None: ...

    Replayable.__name__ = cls.__name__
    Replayable.__qualname__ = cls.__qualname__
    return Replayable


def open_gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients summed so far in an accumulation window that has not stepped yet, by parameter name."""
    trained = [(n, p.grad) for n, p in module.named_parameters() if p.requires_grad and p.grad is not None]
    return {n: (g.to_local() if isinstance(g, DTensor) else g).detach().clone() for n, g in trained}


def set_gradients(module: nn.Module, grads: dict[str, torch.Tensor]) -> None:
    for name, p in module.named_parameters():
        if name in grads:
            g = grads[name].to(p.device, p.dtype)
            whole = {"shape": p.shape, "stride": p.stride()}  # a process keeps its part of a sharded one
            p.grad = DTensor.from_local(g, p.device_mesh, p.placements, **whole) if isinstance(p, DTensor) else g
