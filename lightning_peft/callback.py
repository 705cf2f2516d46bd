"""PEFT, the callback: maps Lightning's hooks to the contract's verbs. The one file that knows both sides."""

import functools
import logging
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_peft import ckpt, io, loss, optim, passes, report, resume, sharded, strategies
from lightning_peft.attach import modules
from lightning_peft.history import History
from lightning_peft.inject import find_record
from lightning_peft.merge import Merged, merge
from lightning_peft.method import Method, Step
from lightning_peft.patch import Patches
from lightning_peft.phases import Phases
from lightning_peft.placement import Placement
from lightning_peft.proof import Call, captured, prove
from lightning_peft.sentinel import Sentinel

log = logging.getLogger("lightning_peft")


class PEFT(Callback):
    """Make a LightningModule parameter-efficient: ``Trainer(callbacks=[PEFT(LoRA(r=8))])``.

    Args:
        methods: one method or several.
        model: dotted name of the submodule to freeze and inject into; the whole LightningModule when empty.
        train: patterns of base parameters that train along, named as in the LightningModule ("*.classifier.*").
        merge_at_end: fold the adapters into the base after the fit, proven on a held batch.
        folder: where the adapter is written at the end of a fit, below the run's log folder unless absolute; None for
            nowhere. The merged model goes beside it.
        overwrite: let the folder replace another run's results.
        dtype: "float32", "bfloat16" or "float16", of adapter tensors.
        calibration_batches: training batches that a method with ``calibrate`` may look at.
        total_steps: optimizer steps of the fit, where the Trainer cannot know them.
        own_penalty: the module adds ``lightning_peft.penalty(self)`` to its loss itself (manual optimization).
        watch_steps: optimizer steps for which adapters are watched (gradients, movement, agreement of ranks).
        merge_tolerance: allowed difference of the merged outputs, relative to the largest; by precision when None.
    """

    def __init__(
        self,
        methods: Method | list[Method],
        model: str = "",
        train: Sequence[str] = (),
        merge_at_end: bool = False,
        folder: str | None = "adapter",
        overwrite: bool = False,
        dtype: str = "float32",
        calibration_batches: int = 64,
        total_steps: int | None = None,
        own_penalty: bool = False,
        watch_steps: int = 10,
        merge_tolerance: float | None = None,
    ) -> None:
        self.methods = [methods] if isinstance(methods, Method) else list(methods)
        self.placement = Placement(self.methods, model, train, getattr(torch, dtype))
        self.folder, self.overwrite, self.merge_at_end = folder, overwrite, merge_at_end
        self.calibration_batches, self.merge_tolerance = calibration_batches, merge_tolerance
        self.total_steps, self.own_penalty = total_steps, own_penalty
        self.run = uuid.uuid4().hex
        self.sentinel = Sentinel(self.methods, watch_steps, merge_at_end)
        self.written: dict[str, Path] = {}
        self._merged: Merged | None = None
        self._patches = Patches()
        self._calls: list[Call] = []

    # ---- injection -------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if sum(isinstance(c, PEFT) for c in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError("two PEFT callbacks in one Trainer: give one of them all methods, PEFT([A(), B()])")
        self._patches.claim(pl_module)
        self.run = trainer.strategy.broadcast(self.run)
        self.sentinel.check_trainer(trainer, pl_module)
        sharded.check(trainer, pl_module, self.methods)
        self.tape, self._resumed = resume.Tape(trainer), {}
        self._remerge = self._merged is not None and stage != "fit"
        if self._merged is not None:
            self._merged.undo()  # the adapters go on from where they were
            self._merged = None
        self.history = History(self.methods)
        self.phases = Phases(trainer, self.methods, lambda: self.target(pl_module), self.total_steps)
        strategies.use_atomic_files(trainer)
        ckpt.hook(pl_module)
        self.placement.start()
        self.placement.inject(pl_module, final=False)
        put, after, before = self._patches.put, self._patches.after, self._patches.before
        put(pl_module, "_strict_loading", lambda old: False)  # private: the property behind it cannot be taken back
        after(pl_module, "configure_model", lambda: self.placement.inject(pl_module, final=True))
        after(pl_module, "on_load_checkpoint", lambda c: self._load(trainer, pl_module, c))
        sharded.patch(trainer, pl_module, self._patches)
        put(trainer.strategy, "process_dataloader", lambda old: lambda loader: self.tape.wrap(old(loader)))
        if stage == "fit":
            self.phases.watch(pl_module, self._patches)
            self._add_penalties(pl_module)
            if any(m.calibrates for m in self.methods):
                look = (trainer, pl_module, self.tape, self.calibration_batches)
                before(trainer.strategy, "setup", lambda _: self.placement.calibrate(*look))

    def target(self, pl_module: LightningModule) -> nn.Module:
        """The module that was injected into."""
        return self.placement.target(pl_module)

    # ---- the fit ---------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        target = self.target(pl_module)
        optim.take_over(trainer, pl_module, target, self.methods)
        self.sentinel.check_model(trainer, pl_module, target)
        sharded.check_covered(trainer, pl_module)
        for method in self._overriding("after_backward"):  # one at most: see preflight
            own = functools.partial(lambda m, given: m.after_backward(target, self._step(trainer), given), method)
            passes.Rerun(trainer, pl_module, own).patch(self._patches)
        self._folder = self._output_folder(trainer)
        if trainer.is_global_zero:
            report.show(target)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)  # Lightning leaves that out when it resumes inside an epoch
        if self._folder is not None and trainer.is_global_zero:  # only now a sharded fit knows which run goes on
            io.check_folder(self._folder, self.run, self.overwrite)
        if self.tape.pending:
            resume.set_gradients(pl_module, self.tape.pending["gradients"])
        self.history.start(trainer, self.target(pl_module))
        self._planned = optim.planned_steps(trainer) if self.total_steps is None else self.total_steps
        self._stepped = trainer.global_step
        self._opened = self._before = trainer.global_step - 1

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for _, module in modules(self.target(pl_module)):
            frozen = not any(p.requires_grad for p in module.parameters(recurse=False))
            if frozen and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # a frozen norm keeps its statistics: they are part of the base

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._capture = ExitStack()
        if self.merge_at_end and not self._calls:
            self._calls = self._capture.enter_context(captured(self.target(pl_module)))
        if trainer.global_step != self._opened:
            self._opened = trainer.global_step
            for method in self._overriding("before_window"):
                method.before_window(self.target(pl_module), self._step(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rng = resume.rng_state()  # a resumed fit may skip a validation, so it must not shift random numbers

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        resume.set_rng_state(self._rng)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if trainer.global_step == self._before:
            return  # a second optimizer of the same step
        self._before = trainer.global_step
        target = self.target(pl_module)
        self.sentinel.after_backward(trainer, target)
        for method in self._overriding("before_step"):
            method.before_step(target, self._step(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._capture.close()
        if trainer.global_step == self._stepped:
            return  # accumulating
        self._stepped = trainer.global_step
        target = self.target(pl_module)
        self.sentinel.after_step(trainer, target)
        changing = self._overriding("after_step")
        before = strategies.layout(target) if changing else []
        for method in changing:
            method.after_step(target, self._step(trainer))
        if self.phases.due(trainer.global_step):
            self.phases.restart(pl_module)
        after = strategies.layout(target) if changing else []
        self.history.after_step(trainer, pl_module, target, changed=after != before)
        if after != before:
            rank_zero_info(f"step {trainer.global_step}: {strategies.difference(before, after)}")
            strategies.rewrap(trainer, pl_module)

    def _step(self, trainer: Trainer) -> Step:
        return Step(index=trainer.global_step, optimizers=list(trainer.optimizers), planned=self._planned)

    def _overriding(self, verb: str) -> list[Method]:
        return [m for m in self.methods if getattr(type(m), verb) is not getattr(Method, verb)]

    def _add_penalties(self, pl_module: LightningModule) -> None:
        if (adding := self._overriding("penalty")) and not self.own_penalty:
            add = functools.partial(loss.with_penalties, pl_module, adding, lambda: self.target(pl_module))
            self._patches.put(pl_module, "training_step", add)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def _load(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        target = self.target(pl_module)
        held = find_record(target)
        assert held is not None
        self._resumed = ckpt.check(checkpoint, target, held[1], self.placement.scope)
        self.run, self.phases.at = self._resumed["run"], checkpoint.get("global_step", 0)
        states = self._resumed.get("state", ()) if trainer.state.fn == "fit" else ()
        if len(states) == trainer.world_size:
            self.tape.pending = states[trainer.global_rank]
        elif states:
            rank_zero_warn(
                f"the checkpoint is of {len(states)} processes and this fit has {trainer.world_size}: its random "
                "states, place in the data and open accumulation window do not fit, so other batches follow"
            )

    @property
    def state_key(self) -> str:
        return f"PEFT{[m.name for m in self.methods]}"

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.values} if self.history.values else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history.values = state_dict["history"]

    # ---- the end ---------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sentinel.at_end(trainer, self.target(pl_module))
        for method in self.methods:
            method.finish(self.target(pl_module))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        target = self.target(pl_module)
        tensors = sharded.gather(target) if self._folder is not None else {}
        if self._folder is not None and trainer.is_global_zero:
            whole = {"overwrite": self.overwrite, "run": self.run, "tensors": tensors}
            self.written["adapter"] = io.save(target, self._folder, **whole)
        self.written |= self.history.end(trainer, target, self._folder and self._folder.parent)
        if self.merge_at_end:
            self._merged, proof = prove(target, self._calls, self.merge_tolerance)
            rank_zero_info(f"merged {proof.hosts} layers; outputs differ by at most {proof.largest:.3g}")
            if self._folder is not None and trainer.is_global_zero:
                self.written |= io.save_merged(target, self._folder.with_name("merged"), asdict(proof))
        log.info("\n".join(f"{what}: {path}" for what, path in self.written.items()))

    def _output_folder(self, trainer: Trainer) -> Path | None:
        root = trainer.log_dir or trainer.default_root_dir  # asked on every rank: it is broadcast
        trial = trainer.fast_dev_run  # pyright: ignore[reportAttributeAccessIssue]
        return None if self.folder is None or trial else Path(root) / self.folder

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._patches.undo()
        if self._remerge:
            self._merged = merge(self.target(pl_module))
