"""AdaLoRA: ranks go where they matter, down to a budget. Zhang et al. 2023, arXiv:2303.10512."""

import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_peft_plugins.lifecycle.diagonal import Diagonal
from lightning_peft_plugins.reparameterized import plain_lora, ranks
from lightning_peft_plugins.reparameterized.lora import LoRA
from torch import Tensor, nn

from lightning_peft import Method, Step, Traits, attach, find, hf, hosts, matches, resize
from lightning_peft.schedule import cubic, steps

TRAINED = ("A", "d", "B")
HF = {n: n for n in ("init_r", "target_r", "tinit", "tfinal", "beta1", "beta2", "orth_reg_weight")}
HF |= {"alpha": "lora_alpha", "dropout": "lora_dropout", "delta_t": "deltaT"}


class SVD(Diagonal):
    """The paper's P Lambda Q; averages of its entries' sensitivity: of no rank before the first step and at last."""

    axes = Diagonal.axes | {f"{kind}_{n}": axes for n, axes in Diagonal.axes.items() for kind in ("mean", "spread")}

    def __init__(self, host: Any, r: int, scale: float, dropout: float) -> None:
        super().__init__(host, r, scale, dropout)
        self.forget()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.A, std=0.02)
        nn.init.zeros_(self.d)  # so training starts from the base model
        nn.init.normal_(self.B, std=0.02)

    def cast(self, dtype: torch.dtype, device: torch.device | str | None) -> None:
        super().cast(dtype, device)
        for name in self._buffers:
            setattr(self, name, self.get_buffer(name).float())  # products of averages are small: in full precision

    def forget(self, ranks: int = 0) -> None:
        """Averages of zero, of no rank or, as they begin, of all."""
        for n in TRAINED:
            p = self.get_parameter(n)
            shape = [ranks if axis == "rank" else size for axis, size in zip(self.axes[n], p.shape, strict=True)]
            for kind in ("mean", "spread"):
                self.register_buffer(f"{kind}_{n}", torch.zeros(shape, device=p.device))

    @torch.no_grad()
    def note(self, beta1: float, beta2: float) -> None:
        """Take the present weights and gradients into the averages of sensitivity and of its spread."""
        if not len(self.get_buffer("mean_d")):
            self.forget(len(self.d))
        for n in TRAINED:
            p, mean, spread = self.get_parameter(n), self.get_buffer(f"mean_{n}"), self.get_buffer(f"spread_{n}")
            now = torch.zeros_like(mean) if p.grad is None else (p.float() * p.grad.float()).abs_()
            mean.mul_(beta1).add_(now, alpha=1 - beta1)
            spread.mul_(beta2).add_((now - mean).abs_(), alpha=1 - beta2)

    def scores(self) -> Tensor:
        """(r,): of the singular value, plus the means over both of its vectors."""
        A, d, B = (self.get_buffer(f"mean_{n}") * self.get_buffer(f"spread_{n}") for n in TRAINED)
        return d + A.mean(1) + B.mean(0)

    def skew(self, square: bool) -> Tensor:
        """|A A^T - 1| + |B^T B - 1| in Frobenius's norm, or its square."""
        grams = [M @ M.T for M in (self.A.float(), self.B.float().T)]
        off = torch.stack([G - torch.eye(len(G), device=G.device) for G in grams])
        return off.square().sum() if square else torch.linalg.vector_norm(off, dim=(1, 2)).sum()


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """W + scale * B diag(d) A, with the least important of all layers' ranks pruned during the fit.

    Every rank is scored by products of weights and gradients, smoothed over steps. From ``tinit`` on the entries of d
    outside a budget that falls from init_r to target_r a layer on average are set to zero every ``delta_t`` steps, and
    may grow back in between. Where the last ``tfinal`` steps begin, what is outside is removed: parameters and moments
    shrink, and a layer may be left without a rank. A loss term keeps A and B near orthonormal.

    Args:
        init_r: rank of every layer at the start; the update is scaled by alpha / init_r throughout.
        target_r: average rank in the end.
        alpha: 0 stands for init_r.
        dropout: probability on the adapter's input; the base path never sees it.
        tinit: steps before the first pruning; an int counts them, a float is a share of the fit's.
        tfinal: steps that are trained with the final ranks, likewise; of 0 the last step of the fit prunes and removes.
        delta_t: steps from one pruning to the next. At 1 what is pruned rarely comes back: it is 0 whenever scored.
        beta1: decay of the average of sensitivities.
        beta2: decay of the average of their distance from that.
        score: the weight that a gradient is multiplied with: the one "before" the step, where it was taken, as in the
            paper, or the one "after" it, as in the authors' code and peft, with the gradient as clipped.
        orth_reg_weight: weight of the loss term, 0 for none.
        orth_form: "norm", the mean over all A and B of |M M^T - 1|, as in both codes; "square", the paper's sum.
        targets: names, patterns or roles of the layers to adapt; convolutions by name.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
        rank_pattern: pattern -> rank to start from in place of init_r, such as one left by an earlier fit.
    """

    traits = Traits(
        family="lifecycle",
        paper="Zhang et al. 2023, arXiv:2303.10512",
        parameters="r * (in + out + 1) a layer, r = init_r at first, target_r on average in the end",
        hosts=("linear", "conv1d", "conv"),
        merge=True,
        quantized=True,
        hf="ADALORA",
    )
    name: str = "adalora"
    init_r: int = 12
    target_r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    tinit: int | float = 0.1
    tfinal: int | float = 0.3
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    score: str = "before"
    orth_reg_weight: float = 0.1
    orth_form: str = "norm"
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""
    rank_pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks.check_dropout(self)
        shares = [t for t in (self.tinit, self.tfinal) if isinstance(t, float)]
        rules = {
            "1 <= target_r <= init_r": 1 <= self.target_r <= self.init_r,
            "rank_pattern from 0 to init_r": all(0 <= r <= self.init_r for r in self.rank_pattern.values()),
            "tinit and tfinal as steps, or shares below 1": min(self.tinit, self.tfinal) >= 0 and sum(shares) < 1,
            "delta_t >= 1": self.delta_t >= 1,
            "alpha and orth_reg_weight >= 0": min(self.alpha, self.orth_reg_weight) >= 0,
            "beta1 and beta2 in (0, 1)": 0 < self.beta1 < 1 and 0 < self.beta2 < 1,
            "score 'before' or 'after'": self.score in ("before", "after"),
            "orth_form 'norm' or 'square'": self.orth_form in ("norm", "square"),
        }
        for rule in (r for r, holds in rules.items() if not holds):
            raise ValueError(f"AdaLoRA needs {rule}; got {dict((w, o) for w, o in vars(self).items() if w in rule)}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        found = find(model, self.targets, self.traits.hosts, exclude=self.exclude, layers=self.layers)
        for pattern in self.rank_pattern:
            if not any(matches(name, pattern) for name, _ in found):
                raise ValueError(f"rank pattern {pattern!r} matches none of the {len(found)} target layers")
        scale = (self.alpha or self.init_r) / (self.init_r + 1e-5)
        for name, host in found:
            if getattr(host, "groups", 1) > 1:
                raise ValueError(
                    f"{name}: AdaLoRA adapts convolutions of one group, this has {host.groups}; exclude it"
                )
            r = next((r for pattern, r in self.rank_pattern.items() if matches(name, pattern)), self.init_r)
            attach(host, self.name, SVD(host, r, scale, self.dropout))

    def _held(self, model: nn.Module) -> dict[str, Any]:
        return {name: a for name, _, a in self.adapters(model)}

    def penalty(self, model: nn.Module) -> Tensor | None:
        held = list(self._held(model).values())
        if not self.orth_reg_weight:
            return None
        square = self.orth_form == "square"
        with torch.autocast(held[0].A.device.type, enabled=False):
            total = torch.stack([a.skew(square) for a in held]).sum()
            return self.orth_reg_weight * (total if square else total / (2 * len(held)))

    def budget(self, t: int, total: int, full: int, target: int) -> int:
        """Ranks over all layers after step ``t``, counted from 0, of ``total``: from ``full`` down to ``target``."""
        last = total - steps(self.tfinal, total)
        return int((full - target) * cubic(Step(index=t, planned=total), self.tinit, last) + target)

    def _pruning(self, held: dict[str, Any]) -> tuple[int, int] | None:
        """(ranks at the start, ranks in the end) over all layers; None once the rest is cut, or where nothing is."""
        full, target = sum(a.start for a in held.values()), self.target_r * len(held)
        whole = all(len(a.d) == a.start for a in held.values())
        return (full, target) if whole and target < full else None

    def _note(self, when: str, held: dict[str, Any], t: int, total: int) -> None:
        if when == self.score and t < total - steps(self.tfinal, total):
            for a in held.values():
                a.note(self.beta1, self.beta2)

    def before_step(self, model: nn.Module, step: Step) -> None:
        held = self._held(model)
        if self._pruning(held):
            self._note("before", held, step.index, step.total)

    def after_step(self, model: nn.Module, step: Step) -> None:
        held, t, total = self._held(model), step.index - 1, step.total
        if ends := self._pruning(held):
            self._note("after", held, t, total)
            budget = self.budget(t, total, *ends)  # which also refuses a schedule without room, at the first step
            if t >= min(total - steps(self.tfinal, total), total - 1):
                self._prune(held, ends[1], step)
            elif t > steps(self.tinit, total) and t % self.delta_t == 0:
                self._prune(held, budget)

    @torch.no_grad()
    def _prune(self, held: dict[str, Any], budget: int, cut: Step | None = None) -> None:
        """Set all but the ``budget`` best entries of d to zero, or remove them; of equal ones the first are kept."""
        scores = torch.cat([a.scores() for a in held.values()])
        if not (cut or scores.any()):
            return  # nothing is known yet, and what is pruned now could hardly come back
        keep = torch.zeros_like(scores, dtype=torch.bool)
        keep[scores.sort(descending=True, stable=True).indices[:budget]] = True
        for a, mine in zip(held.values(), keep.split([len(a.d) for a in held.values()]), strict=True):
            if cut is None:
                a.d.masked_fill_(~mine, 0)
            else:
                resize(a, "rank", mine.nonzero().flatten(), cut.optimizers)
                a.forget()

    def finish(self, model: nn.Module) -> None:
        if ends := self._pruning(self._held(model)):
            warnings.warn(f"{self.name}: the fit ended before its budget of {ends[1]} ranks, so all {ends[0]} are "
                          "kept; plan fewer steps, PEFT(..., total_steps=N)", stacklevel=2)  # fmt: skip

    def report(self, model: nn.Module) -> dict[str, dict[str, float]]:
        held = self._held(model)
        rank: dict[str, float] = {name: len(a.d) for name, a in held.items()}
        return {"rank": rank, "alive": {name: float(a.d.count_nonzero()) for name, a in held.items()}}

    def to_lora(self, model: nn.Module) -> LoRA:
        """Put a plain LoRA of the same weight and of the ranks that are left in its place; see ``plain_lora``."""
        return plain_lora.convert(self, model)

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        held: dict[str, tuple[Any, Any]] = {name: (host, a) for name, host, a in self.adapters(model)}
        for name, (host, _) in held.items():
            if hosts.kind(host) == "conv" and (not isinstance(host, nn.Conv2d) or host.padding_mode != "zeros"):
                raise ValueError(f"{name}: huggingface/peft's AdaLoRA has no convolution but Conv2d, padded with "
                                 "zeros; exclude it, or to_lora makes a LoRA")  # fmt: skip
        share, count = (sum(t for t in (self.tinit, self.tfinal) if isinstance(t, kind)) for kind in (float, int))
        total = 1000 + int(count / (1 - share))  # peft wants one that fits the others; how long a fit is no folder says
        left = {f"{n}.lora_E": [i < len(a.d) for i in range(self.init_r)] for n, (_, a) in held.items()}
        fields = {theirs: getattr(self, mine) for mine, theirs in HF.items()} | {
            "tinit": steps(self.tinit, total),
            "tfinal": steps(self.tfinal, total),
            "total_step": total,
            "target_modules": hf.target_modules(model, held),
            "rank_pattern": None if all(map(all, left.values())) else left,  # which ranks they were plays no part
            "fan_in_fan_out": any(hosts.is_conv1d(host) for host, _ in held.values()),
        }
        views = {n: {"lora_A": a.A, "lora_E": a.d.view(-1, 1), "lora_B": a.B} for n, (_, a) in held.items()}
        return fields, {f"{hf.PREFIX}{n}.{k}": t for n, of in views.items() for k, t in of.items()}

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "AdaLoRA":
        also = ("r", "total_step", "rank_pattern", "init_lora_weights", "fan_in_fan_out")
        hf.check_fields(config, (*HF.values(), *also), "adalora")
        left = {module: len(t["lora_E"]) for module, t in tensors.items() if "lora_E" in t}
        said = {f"^{re.escape(k[:-7])}": sum(kept) for k, kept in (config.get("rank_pattern") or {}).items()}  # .lora_E
        found = hf.read_ranks(model, config | {"r": config["init_r"], "rank_pattern": said}, left)
        options: dict[str, Any] = {mine: config[theirs] for mine, theirs in HF.items() if theirs in config}
        options |= {k: found[k] for k in ("targets", "rank_pattern")} | {"alpha": max(found["alpha"], 0.0)}
        return cls(**options, score="after")  # as peft would go on
