"""PEFT, the callback: maps Lightning's hooks to the contract's verbs. The one file that knows both sides."""

import functools
import logging
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.optim import Optimizer

from lightning_peft import calibration, ckpt, io, optim, report, resume, sharded, strategies
from lightning_peft.attach import adapters, modules
from lightning_peft.find import nearest
from lightning_peft.inject import Record, find_record, inject, pattern_selects, remove
from lightning_peft.merge import Call, Merged, captured, merge, prove
from lightning_peft.method import Method, Step
from lightning_peft.patch import Patches
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
        self.scope, self.train, self.merge_at_end = model, tuple(train), merge_at_end
        self.folder, self.overwrite, self.total_steps = folder, overwrite, total_steps
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
        self.calibration_batches, self.merge_tolerance = calibration_batches, merge_tolerance
        self.own_penalty = own_penalty
        self.run = uuid.uuid4().hex
        self.sentinel = Sentinel(self.methods, watch_steps, merge_at_end)
        self.written: dict[str, Path] = {}
        self._merged: Merged | None = None
        self._patches = Patches()
        self._seen: set[int] = set()
        self._calls: list[Call] = []

    # ---- injection -------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._patches.claim(pl_module)
        self.run = trainer.strategy.broadcast(self.run)
        self.sentinel.check_trainer(trainer, pl_module)
        sharded.check(trainer, pl_module, self.methods)
        self.tape, self._resumed, self._before_injection = resume.Tape(trainer), {}, None
        self._remerge = self._merged is not None and stage != "fit"
        if self._merged is not None:
            self._merged.undo()  # the adapters go on from where they were
            self._merged = None
        strategies.use_atomic_files(trainer)
        ckpt.hook(pl_module)
        self._inject(pl_module, final=False)
        put = self._patches.put
        put(pl_module, "_strict_loading", lambda old: False)  # private: the property behind it cannot be taken back
        put(pl_module, "configure_model", functools.partial(_then, lambda: self._inject(pl_module, final=True)))
        put(pl_module, "on_load_checkpoint", functools.partial(_then, lambda c: self._load(trainer, pl_module, c)))
        sharded.patch(trainer, pl_module, self._patches)
        put(trainer.strategy, "process_dataloader", lambda old: lambda loader: self.tape.wrap(old(loader)))
        if stage == "fit":
            put(pl_module, "training_step", functools.partial(self._with_penalty, pl_module))
            if self._overriding("calibrate"):
                put(trainer.strategy, "setup", functools.partial(_first, lambda t: self._calibrate(t, pl_module)))

    def target(self, pl_module: LightningModule) -> nn.Module:
        """The module that was injected into."""
        return pl_module.get_submodule(self.scope)

    def _inject(self, pl_module: LightningModule, final: bool) -> None:
        """Inject where the model exists; again if more of it has appeared since. Undone and redone exactly."""
        try:
            target = self.target(pl_module)
        except AttributeError:
            if final:
                names = [n for n, _ in pl_module.named_modules() if n]
                near = nearest(self.scope, names)
                raise ValueError(f"PEFT(model={self.scope!r}): no such module; nearest: {near}") from None
            return  # made in setup() or configure_model()
        now = {id(m) for _, m in modules(target) if any(True for _ in m.parameters(recurse=False))}
        held = find_record(target)
        if held and (not self._seen or now <= self._seen):
            self._same_methods(held[1])
            self._seen = now
            self._reset_materialised(target)
            return
        sharded.check_whole(target)
        if held:
            remove(target)
        self._before_injection = resume.rng_state()
        try:
            inject(target, self.methods, train=self._train_names(pl_module), dtype=self.dtype)
        except ValueError:
            if final:
                raise
            return  # what is missing now may be made later; configure_model is the last chance
        self._seen = now
        self._on_meta = [a for _, _, a in adapters(target) if any(t.is_meta for t in a.parameters())]

    def _same_methods(self, record: Record) -> None:
        if list(record.methods) != self.methods:
            have = [m.name for m in record.methods]
            raise ValueError(f"the model already holds other adapters ({have}); lightning_peft.remove() takes them off")

    def _reset_materialised(self, target: nn.Module) -> None:
        for adapter in self._on_meta:  # configure_model gave them memory, but to_empty gives no values
            if not any(t.is_meta for t in adapter.parameters()):
                adapter.reset_parameters()
        self._on_meta = [a for a in self._on_meta if any(t.is_meta for t in a.parameters())]

    _on_meta: list[Any] = []

    def _train_names(self, pl_module: LightningModule) -> list[str]:
        """``train`` resolved to names below the target; what lies outside it trains anyway."""
        names = [n for n, _ in pl_module.named_parameters()]
        prefix = f"{self.scope}." if self.scope else ""
        chosen: dict[str, None] = {}
        for pattern in self.train:
            hits = [n for n in names if pattern_selects(pattern, n)]
            if not hits:
                raise ValueError(f"PEFT(train={pattern!r}) matches no parameter; nearest: {nearest(pattern, names)}")
            chosen |= {n.removeprefix(prefix): None for n in hits if n.startswith(prefix)}
        return list(chosen)

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fresh fits only: take the adapters off, let methods look at data, inject again with what they found."""
        if trainer.ckpt_path is not None or self._before_injection is None:
            return  # what was trained before, in a file or in the model, goes on
        trainer.fit_loop.setup_data()
        target, train, starts = self.target(pl_module), self._train_names(pl_module), dict(self.tape.starts)
        remove(target)
        stats = calibration.run(trainer, pl_module, target, self.methods, train, self.calibration_batches)
        self.tape.starts = starts  # what was read ahead was not trained on
        with isolate_rng():  # draw what the first injection drew, so that no random number of the fit moves
            resume.set_rng_state(self._before_injection)
            inject(target, self.methods, train=train, stats=stats, dtype=self.dtype)

    # ---- the fit ---------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        target, names = self.target(pl_module), {p: n for n, p in pl_module.named_parameters()}
        optim.adopt(trainer.optimizers, target, names)
        schedulers = [c.scheduler for c in trainer.lr_scheduler_configs]
        for method in self.methods:
            optim.regroup(trainer.optimizers, schedulers, method, target)
        if self._overriding("wrap_optimizer"):
            wrapped = trainer.optimizers
            for method in self.methods:
                wrapped = [method.wrap_optimizer(o, target) for o in wrapped]
            trainer.strategy.optimizers = wrapped
        self.sentinel.check_model(trainer, pl_module, target)
        sharded.check_covered(trainer, pl_module)
        self._folder = self._output_folder(trainer)
        if trainer.is_global_zero:
            report.show(target)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)  # Lightning leaves that out when it resumes inside an epoch
        if self._folder is not None and trainer.is_global_zero:  # only now a sharded fit knows which run goes on
            io.check_folder(self._folder, self.run, self.overwrite)
        if self.tape.pending:
            resume.set_gradients(pl_module, self.tape.pending["gradients"])
        self._planned = optim.planned_steps(trainer) if self.total_steps is None else self.total_steps
        self._stepped = self._before = trainer.global_step
        self._before -= 1

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for _, module in modules(self.target(pl_module)):
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not _trains(module):
                module.eval()  # a frozen norm keeps its statistics: they are part of the base

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._capture = ExitStack()
        if self.merge_at_end and not self._calls:
            self._calls = self._capture.enter_context(captured(self.target(pl_module)))

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
        if not changing:
            return
        before = _shapes(target)
        for method in changing:
            method.after_step(target, self._step(trainer))
        if (after := _shapes(target)) != before:
            sizes = (sum(n for _, n in shapes) for shapes in (before, after))
            rank_zero_info("step {}: {} -> {} trainable parameters".format(trainer.global_step, *sizes))
            strategies.rewrap(trainer, pl_module)

    def _step(self, trainer: Trainer) -> Step:
        return Step(index=trainer.global_step, optimizers=list(trainer.optimizers), planned=self._planned)

    def _overriding(self, verb: str) -> list[Method]:
        return [m for m in self.methods if getattr(type(m), verb) is not getattr(Method, verb)]

    def _with_penalty(self, pl_module: LightningModule, old: Callable[..., Any]) -> Callable[..., Any]:
        if self.own_penalty or not self._overriding("penalty"):
            return old
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{[m.name for m in self._overriding('penalty')]} add a loss term, which cannot be added for you under "
                "manual optimization: in training_step do `loss = loss + lightning_peft.penalty(self)` and pass "
                "PEFT(..., own_penalty=True)"
            )

        @functools.wraps(old)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            output = old(*args, **kwargs)
            if output is None:
                return None
            loss = output["loss"] if isinstance(output, dict) else output
            for method in self._overriding("penalty"):
                term = sharded.penalty(method, self.target(pl_module))
                if term is not None:
                    pl_module.log(f"{method.name}/penalty", term.detach())
                    loss = loss + term
            return {**output, "loss": loss} if isinstance(output, dict) else loss

        return training_step

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def _load(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        target = self.target(pl_module)
        held = find_record(target)
        assert held is not None
        self._resumed = ckpt.check(checkpoint, target, held[1], self.scope)
        self.run = self._resumed["run"]
        states = self._resumed.get("state", ()) if trainer.state.fn == "fit" else ()
        if len(states) == trainer.world_size:
            self.tape.pending = states[trainer.global_rank]
        elif states:
            rank_zero_warn(
                f"the checkpoint is of {len(states)} processes and this fit has {trainer.world_size}: its random "
                "states, place in the data and open accumulation window do not fit, so other batches follow"
            )

    # ---- the end ---------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sentinel.at_end(trainer, self.target(pl_module))
        for method in self.methods:
            method.finish(self.target(pl_module))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        target = self.target(pl_module)
        tensors = sharded.gather(target)
        if self._folder is not None and trainer.is_global_zero:
            whole = {"overwrite": self.overwrite, "run": self.run, "tensors": tensors}
            self.written["adapter"] = io.save(target, self._folder, **whole)
        if self.merge_at_end:
            self._merged, proof = prove(target, self._calls, self.merge_tolerance)
            rank_zero_info(f"merged {proof.hosts} layers; outputs differ by at most {proof.largest:.3g}")
            if self._folder is not None and trainer.is_global_zero:
                self.written |= io.save_merged(target, self._folder.with_name("merged"), asdict(proof))
        for what, path in self.written.items():
            log.info(f"{what}: {path}")

    def _output_folder(self, trainer: Trainer) -> Path | None:
        root = trainer.log_dir or trainer.default_root_dir  # asked on every rank: it is broadcast
        trial = trainer.fast_dev_run  # pyright: ignore[reportAttributeAccessIssue]
        return None if self.folder is None or trial else Path(root) / self.folder

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._patches.undo()
        if self._remerge:
            self._merged = merge(self.target(pl_module))


def _then(after: Callable[..., None], old: Callable[..., Any]) -> Callable[..., Any]:
    def patched(*args: Any) -> Any:  # not functools.wraps: Lightning would look through it and skip the hook
        result = old(*args)
        after(*args)
        return result

    return patched


def _first(before: Callable[..., None], old: Callable[..., Any]) -> Callable[..., Any]:
    def patched(*args: Any) -> Any:
        before(*args)
        return old(*args)

    return patched


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


def _shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(identity, size) of what trains: DDP must be wrapped anew also where others train, of the same sizes."""
    return [(id(p), p.numel()) for p in model.parameters() if p.requires_grad]
