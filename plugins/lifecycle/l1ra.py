"""L1RA: gated ranks that die under an L1 penalty and rise in other layers. Singh et al. 2025, arXiv:2509.04884."""

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_peft_plugins.lifecycle.diagonal import Diagonal
from lightning_peft_plugins.reparameterized import plain_lora, ranks
from lightning_peft_plugins.reparameterized.lora import LoRA, LoRALinear
from torch import Tensor, nn

from lightning_peft import Method, Step, Traits, attach, hosts, resize


class GatedLinear(Diagonal):
    """``W + scale * B diag(d) A`` with gates d in [0, 1]."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.A, std=1 / self.start)
        nn.init.ones_(self.d)
        nn.init.zeros_(self.B)  # so training starts from the base model

    def to_hf(self, name: str, host: Any) -> dict[str, Tensor]:
        return LoRALinear.to_hf(self, name, host)

    @torch.no_grad()
    def renew(self, count: int, generator: torch.Generator) -> None:
        """Start the last ``count`` ranks, whose B is zero, as the first ones were."""
        first = len(self.d) - count
        self.A[first:] = torch.randn(count, self.A.shape[1], generator=generator).to(self.A) / self.start
        self.d[first:] = 1.0


@dataclass(frozen=True, kw_only=True)
class L1RA(Method):
    """W + scale * B diag(d) A with gates d, from 1 down; ranks whose gate is zero move to layers that need them.

    After every optimizer step each gate falls by l1 * gate_lr, not below 0 (a proximal step, whatever the optimizer).
    At every ``update_ratio`` of the fit, ranks with a gate of zero are removed, and as many are given to other layers,
    so that their number stays; what no layer can take waits for the next time. The function does not change by it.

    Args:
        r: rank of every layer at the start; the update is scaled by alpha / r throughout.
        alpha: see r.
        dropout: probability on the adapter's input; the base path never sees it.
        l1: weight of the penalty.
        gate_lr: learning rate of the gates, which schedules leave alone. They have no weight decay.
        update_ratio: share of the fit's steps from one change of ranks to the next.
        threshold: gates below it are removed.
        min_rank: what every layer keeps.
        reassign: give removed ranks to other layers; else they are only removed.
        exclude_pruned: a layer that loses ranks gets none at the same time.
        reset_optimizer: begin the moments of all adapters anew when ranks change, as the authors' code does; else they
            follow, and are zero for new ranks.
        seed: of new rows of A.
        targets: names, patterns or roles of the layers to adapt.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
        rank_pattern: pattern -> r for the layers it names, taken as it is; elsewhere r is clamped to the smaller side,
            above which no layer grows.
        alpha_pattern: pattern -> alpha for the layers it names.
    """

    traits = Traits(
        family="lifecycle",
        paper="Singh, Brunello, Scotti, Carman 2025, arXiv:2509.04884",
        parameters="r * (in + out + 1) a layer; r moves between layers, its sum stays",
        hosts=("linear", "conv1d"),
        merge=True,
        quantized=True,
        hf="LORA:",
    )
    name: str = "l1ra"
    r: int = 16
    alpha: float = 16.0
    dropout: float = 0.1
    l1: float = 1e-3
    gate_lr: float = 2e-2
    update_ratio: float = 0.1
    threshold: float = 1e-10
    min_rank: int = 1
    reassign: bool = True
    exclude_pruned: bool = True
    reset_optimizer: bool = False
    seed: int = 0
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks.check(self)
        ranks.check_dropout(self)
        rules = {
            "l1 >= 0": self.l1 >= 0,
            "gate_lr > 0": self.gate_lr > 0,
            "0 < update_ratio <= 1": 0 < self.update_ratio <= 1,
            "0 <= threshold < 1": 0 <= self.threshold < 1,
            "1 <= min_rank <= r": 1 <= self.min_rank <= self.r,
        }
        for rule in (rule for rule, holds in rules.items() if not holds):
            given = {word: getattr(self, word) for word in rule.split() if hasattr(self, word)}
            raise ValueError(f"L1RA needs {rule}; got {given}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        for _, host, r, alpha in ranks.places(self, model):
            attach(host, self.name, GatedLinear(host, r, alpha / r, self.dropout))

    def _held(self, model: nn.Module) -> dict[str, tuple[Any, Any]]:
        return {name: (host, a) for name, host, a in self.adapters(model)}

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        gates = [a.d for _, a in self._held(model).values()]
        return [{"params": gates, "constant_lr": self.gate_lr, "weight_decay": 0.0}]

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: Step) -> None:
        held = self._held(model)
        for _, a in held.values():
            a.d.sub_(self.gate_lr * self.l1).clamp_(0, 1)
        every = max(1, int(self.update_ratio * step.total))
        if step.index % every == 0 and step.index < step.total:
            self._move(held, step)

    def _move(self, held: dict[str, tuple[Any, Any]], step: Step) -> None:
        kept = {name: self._alive(a.d) for name, (_, a) in held.items()}
        more = self._more(held, kept) if self.reassign else dict.fromkeys(held, 0)
        changed = [n for n, (_, a) in held.items() if more[n] or len(kept[n]) < len(a.d)]
        for place, (name, (_, a)) in enumerate(held.items()):
            if name in changed:
                resize(a, "rank", torch.cat([kept[name], kept[name].new_full((more[name],), -1)]), step.optimizers)
                generator = torch.Generator().manual_seed(self.seed + (step.index << 20) + place)  # alike on every rank
                a.renew(more[name], generator)
        if changed and self.reset_optimizer:
            for state in (o.state for o in step.optimizers):
                for p in (p for _, a in held.values() for p in a.parameters()):
                    state.pop(p, None)

    def _alive(self, gates: Tensor) -> Tensor:
        """Positions to keep: where the gate is not zero, else the last ones, so many that min_rank are left."""
        alive = gates >= self.threshold
        if (lacking := min(self.min_rank, len(gates)) - int(alive.sum())) > 0:
            alive[(~alive).nonzero().flatten()[-lacking:]] = True
        return alive.nonzero().flatten()

    def _more(self, held: dict[str, tuple[Any, Any]], kept: dict[str, Tensor]) -> dict[str, int]:
        """New ranks for each layer, one after the other, those first whose least gate is largest."""
        spare = sum(a.start for _, a in held.values()) - sum(map(len, kept.values()))
        order = sorted(held, key=lambda name: -float(held[name][1].d.min()))
        if self.exclude_pruned:
            order = [name for name in order if len(kept[name]) == len(held[name][1].d)]
        more = dict.fromkeys(held, 0)
        while order := [n for n in order if len(kept[n]) + more[n] < min(hosts.shape(held[n][0]))][:spare]:
            for name in order:
                more[name] += 1
            spare -= len(order)
        return more

    def report(self, model: nn.Module) -> dict[str, dict[str, float]]:
        held = self._held(model)
        rank: dict[str, float] = {name: len(a.d) for name, (_, a) in held.items()}
        return {"rank": rank, "gate": {name: float(a.d.detach().mean()) for name, (_, a) in held.items()}}

    def to_lora(self, model: nn.Module) -> LoRA:
        """Put a plain LoRA of the same weight and ranks in its place; see ``plain_lora``."""
        return plain_lora.convert(self, model)

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return ranks.to_lora(self, model, self.r, self.alpha, dropout=self.dropout)
