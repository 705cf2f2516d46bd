"""Fit the user's optimizers to what was injected: missing parameters, groups of their own, wrapping."""

import copy
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.optim import Optimizer

from lightning_peft.method import Method

log = logging.getLogger("lightning_peft")
LEARNING_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
RATES_PER_GROUP = ("base_lrs", "_last_lr", "min_lrs", "max_lrs")
PER_GROUP = (*RATES_PER_GROUP, "lr_lambdas", "base_momentums", "max_momentums")


def adopt(optimizers: Sequence[Optimizer], model: nn.Module, names: dict[nn.Parameter, str]) -> int:
    """Put trainable parameters that no optimizer holds into the first group of the only optimizer.

    Args:
        optimizers: as the user's ``configure_optimizers`` made them.
        model: where methods were injected.
        names: parameter -> name, for the message.

    Returns:
        number of tensors added.

    Raises:
        ValueError: parameters are missing and there is not exactly one optimizer.
    """
    held = {p for o in optimizers for g in o.param_groups for p in g["params"]}
    missing = [p for p in model.parameters() if p.requires_grad and p not in held]
    if not missing:
        return 0
    first = f"{len(missing)} trainable tensors, first {names[missing[0]]!r}"
    if len(optimizers) != 1:
        raise ValueError(
            f"{first}, are in none of the {len(optimizers)} optimizers, and which one should train them is not clear: "
            "give them to one in configure_optimizers"
        )
    optimizers[0].param_groups[0]["params"].extend(missing)
    log.info(f"added {first}, to the first group of {type(optimizers[0]).__name__}: configure_optimizers left them out")
    return len(missing)


def take_over(trainer: Trainer, pl_module: nn.Module, model: nn.Module, methods: Sequence[Method]) -> None:
    """Fit optimizers as the user made them to ``methods``, injected into ``model`` below ``pl_module``."""
    adopt(trainer.optimizers, model, {p: n for n, p in pl_module.named_parameters()})
    schedulers = [c.scheduler for c in trainer.lr_scheduler_configs]
    for method in methods:
        regroup(trainer.optimizers, schedulers, method, model)
    if wrapping := [m for m in methods if type(m).wrap_optimizer is not Method.wrap_optimizer]:
        wrapped = trainer.optimizers
        for method in wrapping:
            wrapped = [method.wrap_optimizer(o, model) for o in wrapped]
        trainer.strategy.optimizers = wrapped


def regroup(optimizers: Iterable[Optimizer], schedulers: Iterable[Any], method: Method, model: nn.Module) -> None:
    """Move parameters that a method wants handled apart into groups of their own, learning-rate schedules included.

    Raises:
        ValueError: a parameter that no optimizer holds, or an option the optimizer does not know.
    """
    schedulers = list(schedulers)
    for wish in method.param_groups(model) or []:
        wanted, found = {id(p) for p in wish["params"]}, 0
        options = {k: v for k, v in wish.items() if k != "params"}
        for optimizer in optimizers:
            for index, group in enumerate(list(optimizer.param_groups)):
                moved = [p for p in group["params"] if id(p) in wanted]
                if moved:
                    _split(optimizer, index, moved, options, schedulers)
                    found += len(moved)
        if found != len(wanted):
            raise ValueError(f"{method.name}: {len(wanted) - found} tensors of its parameter group are in no optimizer")


def _split(optimizer: Optimizer, index: int, moved: list[Any], options: dict[str, Any], schedulers: list[Any]) -> None:
    old = optimizer.param_groups[index]
    if unknown := [k for k in options if k not in old and k not in ("lr_scale", "constant_lr")]:
        raise ValueError(f"{type(optimizer).__name__} has no option {unknown[0]!r} for a parameter group")
    if len(rates := {k: options[k] for k in ("lr", "lr_scale", "constant_lr") if k in options}) > 1:
        raise ValueError(f"a group takes one of 'lr', 'lr_scale' and 'constant_lr', got {rates}")
    base = old.get("max_lr", old.get("initial_lr", old["lr"]))  # a warm-up may have made the present one small, or zero
    scale = options.get("lr_scale", options["lr"] / base if "lr" in options and base else 1.0)
    rest = [p for p in old["params"] if all(p is not m for m in moved)]
    new = {k: copy.copy(v) for k, v in old.items() if k != "params"} | {"params": moved}
    new |= {k: new[k] * scale for k in LEARNING_RATES if k in new}
    new |= {k: v for k, v in options.items() if k != "lr_scale" and (k != "lr" or not base)}
    old["params"] = rest
    if "constant_lr" in options:
        optimizer.register_step_pre_hook(_hold_constant)  # a scheduler sets rates of all groups between steps
    count = len(optimizer.param_groups)
    optimizer.param_groups.append(new)
    for scheduler in _all(schedulers):
        if scheduler.optimizer is not optimizer:
            continue
        for name in PER_GROUP:  # a scheduler keeps one entry a group, made before this group existed
            values = getattr(scheduler, name, None)
            if isinstance(values, list) and len(values) == count:
                values.append(values[index] * scale if name in RATES_PER_GROUP else values[index])


def _hold_constant(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if "constant_lr" in group:  # an option that is part of the optimizer's state, so a resumed one has it as well
            group["lr"] = group["constant_lr"]


def _all(schedulers: Iterable[Any]) -> list[Any]:
    """Schedulers and those inside them (SequentialLR, ChainedScheduler keep a private list)."""
    out = []
    for s in schedulers:
        out += [s, *_all(getattr(s, "_schedulers", []))]
    return out


def planned_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole fit, also where accumulation changes by epoch; None where nothing bounds them."""
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps) or steps < 0:
        return None
    changing = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    if not changing or math.isinf(trainer.num_training_batches) or not trainer.max_epochs or trainer.max_epochs < 0:
        return int(steps)  # Lightning takes the first epoch's accumulation for all of them
    windows = [changing[0].get_accumulate_grad_batches(epoch) for epoch in range(trainer.max_epochs)]
    total = sum(math.ceil(trainer.num_training_batches / w) for w in windows)
    return total if trainer.max_steps < 0 else min(total, trainer.max_steps)
