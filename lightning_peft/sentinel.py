"""Start-up and run-time checks: nothing is lost in silence."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_peft import preflight, watch
from lightning_peft.attach import adapters
from lightning_peft.inject import find_record
from lightning_peft.method import Method
from lightning_peft.watch import Seen


class PEFTWarning(UserWarning):
    """Something about adapters that may not be what was meant."""


class Sentinel:
    """Watches one fit. ``PEFT`` calls its methods; each check names what is wrong and what would work.

    Args:
        methods: that are injected.
        steps: optimizer steps to watch adapters for; 0 switches the run-time checks off.
        merge_at_end: the fit is to end with a merge.
    """

    def __init__(self, methods: list[Method], steps: int, merge_at_end: bool = False) -> None:
        self.methods, self.steps, self.merge_at_end = methods, steps, merge_at_end
        self._open, self._done, self._started = False, 0, False
        self._seen: dict[nn.Parameter, Seen] = {}

    def check_trainer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before injection: clashes with strategies, plugins and callbacks."""
        for text in preflight.check_trainer(trainer, pl_module, self.methods, self.merge_at_end):
            warn(text)

    def check_model(self, trainer: Trainer, pl_module: LightningModule, model: nn.Module) -> None:
        """At the start of a fit, optimizers built: coverage, frozen heads, gradient checkpointing."""
        for text in preflight.check_model(trainer, pl_module, model, self.methods):
            warn(text)
        self._open, self._done, self._started, self._seen = self.steps > 0, 0, False, {}

    def after_backward(self, trainer: Trainer, model: nn.Module) -> None:
        """Before an optimizer step in the first steps: gradients reach the adapters."""
        if not self._open:
            return
        trained = _trained(model)
        if not self._seen:
            _check_agreement(trainer, trained, "before the first optimizer step")
        rates = {p: g.get("lr") for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
        for p, name in trained.items():
            if p not in self._seen:
                self._seen[p] = Seen(name, p.shape, watch.digest(p))
            rate = rates.get(p)
            self._seen[p].note(p.grad, 1.0 if rate is None else float(rate))  # None: the optimizer finds its own
        if not self._started:
            self._started = any(p.grad is not None for p in rates)  # else training_step skipped this batch
            if self._started and len(trainer.optimizers) == 1:
                self._check_first(trained, model)

    def after_step(self, trainer: Trainer, model: nn.Module) -> None:
        """After an optimizer step in the first steps: adapters move, and agree between ranks."""
        if not self._open:
            return
        self._done += 1
        if self._done == self.steps:
            self._judge(trainer, model)

    def at_end(self, trainer: Trainer, model: nn.Module) -> None:
        """At the end of training: judge what was seen where the fit was shorter than the watch."""
        if self._open and self._done:
            self._judge(trainer, model)

    def _check_first(self, trained: dict[nn.Parameter, str], model: nn.Module) -> None:
        held = find_record(model)
        own = {p: n for p, n in trained.items() if held is None or n not in held[1].train}
        if own and all(p.grad is None for p in own):
            raise ValueError(
                f"none of the {len(own)} tensors of {[m.name for m in self.methods]}, first "
                f"{next(iter(own.values()))!r}, got a gradient in the first step, though other parameters did. Likely "
                "causes: the adapted layers run under torch.no_grad() or their output is detached; gradient "
                "checkpointing with use_reentrant=True (pass False, or call enable_input_require_grads()); the model "
                "reads the layers' weights without calling the layers"
            )

    def _judge(self, trainer: Trainer, model: nn.Module) -> None:
        trained = _trained(model)
        _check_agreement(trainer, trained, f"after {self._done} optimizer steps")
        seen = {p: self._seen[p] for p in trained if p in self._seen}
        self._open, self._seen = False, {}
        if not seen:
            return
        rows = watch.flags(trainer, seen)
        reached = {s.name: row[0] for s, row in zip(seen.values(), rows, strict=True)}
        nonzero = {s.name: row[1] for s, row in zip(seen.values(), rows, strict=True) if row[0]}
        units = _units(model)
        self._check_reached(reached, units, strict=len(trainer.optimizers) == 1)
        self._check_nonzero(nonzero, units)
        self._check_moved([s for s, row in zip(seen.values(), rows, strict=True) if row[1] and not row[2]])

    def _check_reached(self, reached: dict[str, bool], units: dict[str, str], strict: bool) -> None:
        """Adapters without any gradient are an error where half of all, or a kind of layer in most blocks, is cut off.

        A layer that stands alone (a pooler the loss does not use) or an unused branch is worth a warning. Several
        optimizers may take turns, so there nothing is sure yet (not ``strict``).
        """
        kin: dict[str, list[bool]] = {}
        for name, r in reached.items():
            kin.setdefault(_kin(name), []).append(r)
        missing = [n for n, r in reached.items() if not r]
        lost = [n for n in missing if n in units]
        half = 2 * len(lost) >= sum(n in units for n in reached)
        cut = [n for n in lost if 2 * sum(k := kin[_kin(n)]) < len(k) and (half or len(k) > 1)]
        if cut and strict:
            raise ValueError(
                f"no gradient reached {_some(cut)} in {self._done} optimizer steps: the layer is bypassed or detached, "
                "or its output does not enter the loss. Leave it out of the method's targets (exclude=...), or pass "
                "PEFT(..., watch_steps=0) if it trains later"
            )
        if missing:
            warn(
                f"no gradient reached {_some(missing)} in {self._done} optimizer steps: right for a branch that was "
                "not used so far, else it will not train and can be left out"
            )

    def _check_nonzero(self, nonzero: dict[str, bool], units: dict[str, str]) -> None:
        alive = {units.get(n, n) for n, z in nonzero.items() if z}
        dead = list(dict.fromkeys(u for n in nonzero if (u := units.get(n, n)) not in alive))
        if dead:
            warn(
                f"the gradient of {_some(dead)} was exactly zero in {self._done} optimizer steps: the loss does not "
                "depend on it (a gate at zero, dead units, two factors that both start at zero)"
            )

    def _check_moved(self, still: list[Seen]) -> None:
        if idle := [s.name for s in still if s.rate == 0]:
            warn(
                f"{_some(idle)} did not move in {self._done} optimizer steps: the learning rate was 0 in all of them. "
                "Is a warm-up counted in epochs instead of steps?"
            )
        if stuck := [s.name for s in still if s.rate != 0]:
            warn(
                f"{_some(stuck)} did not move in {self._done} optimizer steps though gradients came: the learning rate "
                "is too small for the dtype, the loss scaler skipped every step, or something puts old values back"
            )


def warn(text: str) -> None:
    rank_zero_warn(text, category=PEFTWarning)


def _trained(model: nn.Module) -> dict[nn.Parameter, str]:
    return {p: n for n, p in model.named_parameters() if p.requires_grad}


def _units(model: nn.Module) -> dict[str, str]:
    """Name of each tensor of an adapter -> name of the adapter."""
    names = {p: n for n, p in model.named_parameters()}
    held = [names[p] for _, _, adapter in adapters(model) for p in adapter.parameters()]
    return {n: n.rpartition(".")[0] for n in held}


def _check_agreement(trainer: Trainer, trained: dict[nn.Parameter, str], when: str) -> None:
    if names := watch.differing(trainer, trained):
        raise ValueError(
            f"{_some(names)} differ between ranks {when}: something changes them by numbers that are not the same on "
            "every rank, such as random ones in after_step or a hook; draw them from a generator seeded alike, or "
            "broadcast them from rank 0"
        )


def _kin(name: str) -> str:
    """The name without the last of its numbers: modules that stand side by side have the same."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join("*" if i == last else part for i, part in enumerate(parts))


def _some(names: Sequence[str]) -> str:
    return ", ".join(repr(n) for n in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
