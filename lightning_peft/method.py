"""The contract between a PEFT method and its host, drawn once as the loop the host runs.

::

    # setup           freeze(model)                        every weight below the target arrives frozen
    #                 stats = method.calibrate(...)         fresh fits only, of a method that calibrates
    #                 method.inject(model, stats)           a calibrating one was injected and taken off once before
    #                 method.beside(model, others)          every method of the list is in place
    #                 load weights of ckpt_path             structure is read from the file's shapes
    #                 optimizers = configure_optimizers()   the user's own
    #                 method.param_groups(model)            regrouped inside those optimizers
    #                 method.wrap_optimizer(optimizer, model)
    #                 load optimizer state of ckpt_path
    for batch in loader:
        if first_of_the_accumulation_window:
            method.before_window(model, step)
        loss = training_step(batch) + method.penalty(model)  # inside autocast and DDP's forward
        (loss / accumulate).backward()
        method.after_backward(model, step, passes)  # may run the batch again, at other weights
        if last_of_the_accumulation_window:
            method.before_step(model, step)  # gradients summed, unscaled, not yet clipped
            clip(); optimizer.step(); optimizer.zero_grad()
            method.after_step(model, step)   # ranks, masks, pruning: parameters may change shape here
            if step in method.restarts(...):  # optimizers = configure_optimizers() and what follows it, anew
    # end             method.finish(model)
    #                 save(model, folder)
    #                 merge(model) if asked, proven on a held batch and written beside it

A method knows PyTorch and this file; it never sees Lightning.
"""

import abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.adapter import Adapter
from lightning_peft.attach import adapters


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where the fit stands.

    Args:
        index: optimizer steps done before this one (``before_window``, ``after_backward``, ``before_step``) or with it
            (``after_step``).
        optimizers: the optimizers in use, for ``resize`` to slice their moments.
        planned: optimizer steps of the whole fit, None when Lightning cannot know it.
    """

    index: int
    optimizers: list[Optimizer] = field(default_factory=list)
    planned: int | None = None

    @property
    def total(self) -> int:
        """Optimizer steps of the whole fit.

        Raises:
            ValueError: the Trainer has no bound on steps; the user must give one.
        """
        if self.planned is None:
            raise ValueError(
                "this method's schedule needs the number of optimizer steps, and the Trainer has no bound on them "
                "(max_time, or a loader without length): pass PEFT(..., total_steps=N) or Trainer(max_steps=N)"
            )
        return self.planned


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Forward and backward of one micro-batch, for ``after_backward``: what the first gave, and how to run it again.

    Args:
        loss: of the first pass, not divided by the length of an accumulation window; detached.
        again: runs both anew at the weights as they are now, leaves the gradient of this pass alone in every ``.grad``
            and returns the loss. ``again(replay=True)`` draws the random numbers of the first pass, as dropout's masks.
        average: makes every ``.grad`` its mean over the processes of the fit; until then each has its own.
    """

    loss: Tensor
    again: Callable[..., Tensor]
    average: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a method is and can do, written with literals only: `lightning-peft methods` reads it without importing.

    Args:
        family: "reparameterized", "additive", "selective", "hybrid" or "lifecycle".
        paper: authors, year and arXiv id.
        parameters: formula of the trainable parameters, for the help text.
        hosts: kinds of layer it can sit on: "linear", "conv1d", "embedding", "conv", "module" (any), "model" (root).
        merge: its adapters fold into the base weight.
        quantized: its adapters run on an NF4, FP4 or int8 base.
        identity_start: the model's output before the first step equals the base's.
        needs_weights: its start depends on the base's values, so it cannot be injected on the meta device.
        encoder_only: cannot serve decoding with a cache.
        hf: huggingface/peft's type for it, "LORA"; where a field of that type's config makes the difference, with the
            field: "LORA:use_dora". "LORA:" is written and never read, by a method that peft knows as another. Empty
            for a method that peft has not; else ``to_hf`` and ``from_hf`` are given.
    """

    family: str
    paper: str = ""
    parameters: str = ""
    hosts: tuple[str, ...] = ("linear",)
    merge: bool = False
    quantized: bool = True
    identity_start: bool = True
    needs_weights: bool = False
    encoder_only: bool = False
    hf: str = ""


@dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """A PEFT method: its hyper-parameters, and what it does at each moment of a fit.

    A subclass is a frozen keyword-only dataclass; its fields are the YAML and the entry in the adapter folder, so they
    are plain data (or methods themselves). Checks of hyper-parameters belong in ``__post_init__``. State lives in
    tensors on adapters, never on the method.
    """

    traits: ClassVar[Traits]
    name: str

    @abc.abstractmethod
    def inject(self, model: nn.Module, stats: Any = None) -> None:
        """Attach adapters, or choose which weights train; all weights arrive frozen.

        ``stats`` is what ``calibrate`` returned; None on a resumed run or a load, when only the structure matters
        because a file fills in the values.
        """

    def calibrate(self, model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> Any:
        """Look at data before injection, on fresh fits only. ``loss(batch)`` runs the user's training step.

        Weights are frozen, as for ``inject``: turn ``requires_grad`` on where gradients are wanted. It is put back, as
        are gradients, buffers, random states and the place in the data. Each of several processes looks at its own
        share of the data: see ``combine``.
        """

    def combine(self, stats: list[Any]) -> Any:
        """One of what ``calibrate`` returned in each of several processes, by rank, on the CPU; rank 0's by default."""
        return stats[0]

    def beside(self, model: nn.Module, others: Sequence["Method"]) -> None:
        """Once every method of the list is injected: refuse by name what this one cannot work with.

        Raises:
            ValueError: one of ``others`` would undo what this one does, or does the same.
        """

    @property
    def calibrates(self) -> bool:
        """True where ``calibrate`` is to be called: where it is given. One that some options need says so here."""
        return type(self).calibrate is not Method.calibrate

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        """Parameters that want their own optimizer options: ``{"params": [...], "lr_scale": 16.0, ...}``.

        ``lr_scale`` multiplies the learning rate of the group the parameters came from, at every moment of a schedule;
        ``lr`` does so by the factor that makes the initial one (of OneCycleLR the highest) what it says. Schedules do
        not act on ``constant_lr``, though monitors of learning rates show theirs. Every other key replaces that group's
        option of the same name.
        """

    def wrap_optimizer(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        """Own part of the optimizer: return it changed, or another one around it. Runs before its state is loaded."""
        return optimizer

    def restarts(self, model: nn.Module, step: Step) -> Sequence[int]:
        """Optimizer steps after which optimizers and schedules begin anew, where a fit is several in a row.

        ``configure_optimizers`` is asked again there. For each part ``trainer.max_steps`` and
        ``trainer.estimated_stepping_batches`` say the part's length while it is asked. ``step.index`` is where the fit
        begins, or goes on: earlier restarts are named all the same.
        """
        return ()

    def before_window(self, model: nn.Module, step: Step) -> None:
        """Before the first forward of an optimizer step; of a fit that resumes inside an accumulation window, again."""

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A loss term, already weighted; the host adds it to the task's loss and logs it."""

    def after_backward(self, model: nn.Module, step: Step, passes: Passes) -> None:
        """Make a micro-batch's gradient in several passes; only one method of a fit may.

        Every ``.grad`` holds that of this micro-batch alone, divided by the length of an accumulation window, and what
        is left there joins the window's sum; put back weights that you moved. Later passes change no buffer and no
        torchmetrics state, and what they log is dropped: that is the first pass's alone. Other methods' penalties are
        part of every pass.
        """

    def before_step(self, model: nn.Module, step: Step) -> None:
        """After backward and before clipping, once an optimizer step; gradients are summed and unscaled."""

    def after_step(self, model: nn.Module, step: Step) -> None:
        """After the optimizer stepped; the one place where parameters may change shape."""

    def finish(self, model: nn.Module) -> None:
        """End of the fit, before the optional merge."""

    def report(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """What is worth seeing over time: quantity -> layer -> value, such as ``{"rank": {"layer.0.query": 8}}``.

        Asked now and then after an optimizer step. The host logs the means, says when whole numbers changed with the
        shapes, and at the end writes every value to a CSV and draws each quantity by layer and step.
        """
        return {}

    def adapters(self, model: nn.Module) -> Iterator[tuple[str, Any, Adapter]]:
        """(module name, host, adapter) of every adapter of this method."""
        return adapters(model, self.name)

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(fields, tensors) of huggingface/peft's adapter_config.json and adapter_model.safetensors.

        The tensors are views of the adapters' own, under peft's keys and in peft's shapes: ``hf.save`` writes them and
        ``hf.load`` fills them, so one mapping serves both ways. ``lightning_peft.hf`` helps with the names; it adds
        the fields that do not depend on the method.

        Raises:
            ValueError: an adapter that peft cannot express, or for which it computes something else.
        """
        raise NotImplementedError(f"{type(self).__name__} has no counterpart in huggingface/peft")

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "Method":
        """The method that a peft folder describes, targets and ranks included; its values are loaded afterwards.

        Args:
            config: peft's adapter_config.json.
            tensors: module name -> peft's name of a tensor below it -> tensor; keys outside modules under "".
            model: the base, without adapters.

        Raises:
            ValueError: an option that this method does not have (see ``hf.check_fields``).
        """
        raise NotImplementedError(f"{cls.__name__} has no counterpart in huggingface/peft")
