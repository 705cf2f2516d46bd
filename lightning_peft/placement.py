"""When and where a callback injects: a LightningModule's model may be made in three places."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_peft import calibration, resume, sharded
from lightning_peft.attach import adapters, modules
from lightning_peft.find import nearest
from lightning_peft.inject import Record, find_record, inject, pattern_selects, remove
from lightning_peft.method import Method


class Placement:
    """Puts ``methods`` into the model of one LightningModule after another.

    Args:
        methods: to inject.
        scope: dotted name of the submodule to freeze and inject into; the whole LightningModule when empty.
        train: patterns of base parameters that train along, named as in the LightningModule.
        dtype: of adapter tensors.
    """

    def __init__(self, methods: list[Method], scope: str, train: Sequence[str], dtype: torch.dtype) -> None:
        self.methods, self.scope, self.train, self.dtype = methods, scope, tuple(train), dtype
        self._seen: set[int] = set()
        self._on_meta: list[Any] = []
        self._rng: dict[str, Any] | None = None

    def start(self) -> None:
        """A new fit, which may find the adapters in place already."""
        self._rng = None

    def target(self, pl_module: LightningModule) -> nn.Module:
        """The module to inject into.

        Raises:
            ValueError: there is none of that name (yet).
        """
        try:
            return pl_module.get_submodule(self.scope)
        except AttributeError:
            near = nearest(self.scope, [n for n, _ in pl_module.named_modules() if n])
            raise ValueError(f"PEFT(model={self.scope!r}): no such module; nearest: {near}") from None

    def inject(self, pl_module: LightningModule, final: bool) -> None:
        """Inject if the model exists; anew if more of it has appeared since, undone and redone exactly.

        Args:
            pl_module: that holds the model, or will.
            final: nothing more will be made: what is missing now is an error.
        """
        try:
            self._inject(pl_module)
        except ValueError:
            if final:
                raise  # else it may be made in setup() or in configure_model(), which is the last chance

    def _inject(self, pl_module: LightningModule) -> None:
        target = self.target(pl_module)
        now = {id(m) for _, m in modules(target) if any(True for _ in m.parameters(recurse=False))}
        held = find_record(target)
        if held and (not self._seen or now <= self._seen):
            self._same_methods(held[1])
            self._seen = now
            self._reset_materialised()
            return
        sharded.check_whole(target)
        if held:
            remove(target)
        self._rng = resume.rng_state()
        inject(target, self.methods, train=self.train_names(pl_module), dtype=self.dtype)
        self._seen = now
        self._on_meta = [a for _, _, a in adapters(target) if any(t.is_meta for t in a.parameters())]

    def _same_methods(self, record: Record) -> None:
        if list(record.methods) != self.methods:
            have = [m.name for m in record.methods]
            raise ValueError(f"the model already holds other adapters ({have}); lightning_peft.remove() takes them off")

    def _reset_materialised(self) -> None:
        for adapter in self._on_meta:  # configure_model gave them memory, but to_empty gives no values
            if not any(t.is_meta for t in adapter.parameters()):
                adapter.reset_parameters()
        self._on_meta = [a for a in self._on_meta if any(t.is_meta for t in a.parameters())]

    def train_names(self, pl_module: LightningModule) -> list[str]:
        """``train`` resolved to names below the target; what lies outside it trains anyway.

        Raises:
            ValueError: a pattern matches nothing.
        """
        names = [n for n, _ in pl_module.named_parameters()]
        prefix = f"{self.scope}." if self.scope else ""
        chosen: dict[str, None] = {}
        for pattern in self.train:
            hits = [n for n in names if pattern_selects(pattern, n)]
            if not hits:
                raise ValueError(f"PEFT(train={pattern!r}) matches no parameter; nearest: {nearest(pattern, names)}")
            chosen |= {n.removeprefix(prefix): None for n in hits if n.startswith(prefix)}
        return list(chosen)

    def calibrate(self, trainer: Trainer, pl_module: LightningModule, tape: resume.Tape, batches: int) -> None:
        """Fresh fits only: take the adapters off, let methods look at data, inject again with what they found."""
        if trainer.ckpt_path is not None or self._rng is None or trainer.limit_train_batches == 0:
            return  # what was trained before, in a file or in the model, goes on
        trainer.fit_loop.setup_data()
        target, train, starts = self.target(pl_module), self.train_names(pl_module), dict(tape.starts)
        remove(target)
        stats = calibration.run(trainer, pl_module, target, self.methods, train, batches)
        tape.starts = starts  # what was read ahead was not trained on
        with isolate_rng():  # draw what the first injection drew, so that no random number of the fit moves
            resume.set_rng_state(self._rng)
            inject(target, self.methods, train=train, stats=stats, dtype=self.dtype)
