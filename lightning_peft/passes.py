"""Several passes over one micro-batch under Lightning, for a method that makes its gradient of them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric

from lightning_peft import resume
from lightning_peft.method import Passes
from lightning_peft.patch import Patches

_NOT_STATES = ("_update_count", "_forward_cache", "_computed")  # of a metric, which change with its states


class Rerun:
    """Stands between Lightning's closure and the module's backward, in every micro-batch of a fit.

    An optimizer's ``step`` would come too late: Lightning hands it the closure of an accumulation window's last
    micro-batch alone.

    Under DDP every pass keeps its gradients to itself. Where DDP would have joined them, once a window, the sum is
    averaged over processes here; communication hooks of DDP are passed by.

    Args:
        trainer: of the fit.
        pl_module: whose ``training_step`` and ``backward`` are run.
        own: the method's ``after_backward``, called once a micro-batch.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, own: Callable[[Passes], None]) -> None:
        self.trainer, self.module, self.own = trainer, pl_module, own
        self.args: tuple[Any, ...] = ()
        self.rng: resume.State = {}
        self._old_step: Callable[..., Any] = trainer.strategy.training_step
        self.versions: list[tuple[nn.Module, str, Tensor, int]] = []

    def patch(self, patches: Patches) -> None:
        """Take over until ``patches`` are undone."""
        patches.put(self.trainer.strategy, "training_step", self._training_step)
        patches.put(self.module, "backward", self._backward)

    def _training_step(self, old: Callable[..., Any]) -> Callable[..., Any]:
        def training_step(*args: Any) -> Any:
            self._join_buffers()
            self.args, self.rng = args, resume.rng_state()
            self.versions = [(m, n, b, b._version) for m in self.module.modules() for n, b in _buffers(m)]
            return self._forward()

        self._old_step = old
        return training_step

    def _forward(self) -> Any:
        ddp = self._ddp()
        with contextlib.nullcontext() if ddp is None else ddp.no_sync():
            return self._old_step(*self.args)

    def _backward(self, old: Callable[..., Any]) -> Callable[..., Any]:
        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            trained = [p for p in self.module.parameters() if p.requires_grad]
            window = [p.grad for p in trained]
            _clear(trained)
            old(loss, *args, **kwargs)
            whole = loss.detach() * self.trainer.accumulate_grad_batches

            def again(replay: bool = False) -> Tensor:
                _clear(trained)
                with torch.enable_grad(), self._unseen():
                    if replay:
                        resume.set_rng_state(self.rng)
                    output = self._forward()
                    value = output["loss"] if isinstance(output, Mapping) else output
                    if value is None:
                        raise ValueError("training_step returned a loss, and None when run again on the same batch")
                    old(value / self.trainer.accumulate_grad_batches, *args, **kwargs)
                return value.detach()

            self.own(Passes(loss=whole, again=again, average=lambda: self._average(trained)))
            for p, g in zip(trained, window, strict=True):
                if g is not None:
                    p.grad = g if p.grad is None else g.add_(p.grad)
            if self._joins():
                self._average(trained)
            self.args, self.rng, self.versions = (), {}, []

        return backward

    # ---- processes -------------------------------------------------------------------------------------------------

    def _ddp(self) -> DistributedDataParallel | None:
        model = self.trainer.strategy.model
        return model if isinstance(model, DistributedDataParallel) else None

    def _joins(self) -> bool:
        """True in the last micro-batch of a window: Lightning switches DDP's own averaging off in the others."""
        ddp = self._ddp()
        return ddp is not None and ddp.require_backward_grad_sync

    def _join_buffers(self) -> None:
        """What DDP does before a forward that it will average, and leaves out under no_sync."""
        ddp = self._ddp()
        if ddp is not None and self._joins() and ddp.broadcast_buffers and ddp.modules_buffers:
            ddp._sync_buffers()

    @torch.no_grad()
    def _average(self, trained: list[nn.Parameter]) -> None:
        if self._ddp() is None:
            return
        for kind in dict.fromkeys((p.dtype, p.device) for p in trained):
            alike = [p for p in trained if (p.dtype, p.device) == kind]
            has = torch.tensor([p.grad is not None for p in alike], dtype=kind[0], device=kind[1])
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in alike]
            flat = torch.cat([has, *(g.flatten() for g in grads)])
            dist.all_reduce(flat)
            used, *means = (flat / dist.get_world_size()).split([len(alike), *(g.numel() for g in grads)])
            for p, mean, reached in zip(alike, means, used.tolist(), strict=True):
                p.grad = mean.view_as(p) if reached else None  # no process used it: its moments stay as they are

    # ---- what a further pass must not leave ------------------------------------------------------------------------

    @contextlib.contextmanager
    def _unseen(self) -> Iterator[None]:
        """Drop what is logged; put back metrics, and buffers that the first pass changed, as running statistics."""
        moved = [
            (m, n)
            for m, n, b, version in self.versions
            if m._buffers[n] is not b or b._version != version or (m.training and isinstance(m, _NormBase))
        ]  # torch writes running statistics without counting it
        kept = [(m, n, b, b.clone()) for m, n in moved if (b := m._buffers[n]) is not None]
        metrics = [(m, _states(m)) for m in self.module.modules() if isinstance(m, Metric)]
        patches = Patches()
        patches.put(self.module, "log", lambda old: lambda *args, **kwargs: None)
        try:
            yield
        finally:
            patches.undo()
            with torch.no_grad():
                for module, name, buffer, value in kept:
                    module._buffers[name] = buffer.copy_(value)
            for metric, states in metrics:
                for name, value in states.items():
                    setattr(metric, name, value)


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(n, b) for n, b in module._buffers.items() if b is not None]


def _states(metric: Metric) -> dict[str, Any]:
    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value

    return {n: copied(getattr(metric, n)) for n in metric._defaults} | {n: getattr(metric, n) for n in _NOT_STATES}


def _clear(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = None
