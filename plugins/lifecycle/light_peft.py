"""Light-PEFT: early in the fit cut heads, MLP channels, adapters and ranks. Gu et al. 2024, arXiv:2406.03792.

It stands in a list after the methods whose adapters it thins out, ``PEFT([LoRA(r=8), LightPEFT()])``, and leaves none
of its own behind: the record of what was cut goes with checkpoints and adapter folders as for any surgery.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import Adapter, Base, Method, Step, Traits, arch, attach, detach, parts, resize, surgery
from lightning_peft.attach import adapters, attached, detach_all
from lightning_peft.find import nearest
from lightning_peft.importance import above, change, first_order, ranks
from lightning_peft.inject import pattern_selects
from lightning_peft.padding import Padding, watch

Part = tuple[str, Any, str]  # "heads" or "channels", what parts.py says of it, the layer whose input is masked
FEWEST, MOST = 200, 800  # steps of an estimation whose length is a share of the fit
SCOPES = ("layer", "global")


class Estimate(Adapter):
    """Around a layer: a mask on its input, a factor for each head or channel, and how much its adapters matter.

    Buffers hold sums over the second half of the estimation: importance () of all adapters on the layer, and
    rank_<name> (r,) for each adapter with ranks.
    """

    mask: nn.Parameter | None
    importance: Tensor

    def __init__(self, units: int, width: int, adapters: dict[str, Adapter], padding: Padding) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.empty(units)) if units else None
        self.register_buffer("importance", torch.empty(()))
        self.ranked = {tag: size for tag, a in adapters.items() if (size := ranks(a))}
        for tag, size in self.ranked.items():
            self.register_buffer(f"rank_{tag}", torch.empty(size))
        self.width, self.tags, self.padding = width, tuple(adapters), padding
        self.seen: Tensor | None = None  # of the last batch: (sum over tokens, number of tokens)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for p in self.parameters():
            nn.init.ones_(p)
        for b in self.buffers():
            nn.init.zeros_(b)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        if self.mask is not None:  # on the attention map before its product with V, or on act(x W1): here they are one
            args = (args[0] * self.mask.repeat_interleave(self.width).to(args[0].dtype), *args[1:])
        if not (self.tags and self.training and torch.is_grad_enabled()):
            return base(*args, **kwargs)
        y, plain = base.with_plain(*args, **kwargs)
        self.seen = change(y, plain, self.padding.mask)
        return y

    def add(self, seen: Tensor, adapters: dict[str, Adapter]) -> None:
        """One step's scores, from ``seen`` (2,) of all ranks and the gradients; what is no number counts as none."""
        self.importance += (seen[0] / seen[1]).nan_to_num(0.0, 0.0, 0.0)
        for tag in self.ranked:
            self.scores(tag).add_(first_order(adapters[tag]))

    def scores(self, tag: str) -> Tensor:
        return self.get_buffer(f"rank_{tag}")


@dataclass(frozen=True, kw_only=True)
class LightPEFT(Method):
    """Estimate for the first steps what matters, cut the rest of base and adapters, and go on with the small model.

    While it estimates, heads and MLP channels have trained factors under an L1 term, whose order decides; an adapter
    counts by |change| / |output| of its layer, a rank by the first-order effect of leaving it out. Then optimizers and
    schedules begin anew. Of grouped queries whole groups go, of gated MLPs both rows of a channel.

    Args:
        estimation_steps: optimizer steps, from 1 on; below 1 a share of the fit's, but 200 to 800 of them.
        l1_coef: factor of the L1 term.
        attn_mask_lr_mult, ffn_mask_lr_mult: learning rate of the factors over that of the rest.
        head_ratio, ffn_ratio: share of heads (groups) and channels to cut; 0 leaves them alone. As for the other
            ratios, what lies strictly above this quantile of the scores stays.
        head_scope, ffn_scope, rank_scope: "layer" or "global", what competes. In each layer at least one unit stays.
        ffn_multiple: round the channels that stay in a layer up to a multiple of this, for the hardware's sake.
        module_ratio: share of adapted layers that lose their adapters.
        rank_ratio: share of ranks to cut from the adapters that stay; their scale keeps the rank they started with.
        exclude: patterns of attention modules, MLPs or blocks to leave whole.
    """

    traits = Traits(
        family="lifecycle",
        paper="Gu, Fu, Liu, Shen, Lin, Wang 2024, arXiv:2406.03792",
        parameters="a head and an MLP channel each one while it estimates, then none",
        hosts=("linear", "conv1d", "module"),
        merge=True,
        quantized=False,
    )
    name: str = "light_peft"
    estimation_steps: float = 0.05
    l1_coef: float = 1e-4
    attn_mask_lr_mult: float = 1.0
    ffn_mask_lr_mult: float = 1.0
    head_ratio: float = 0.333333333
    head_scope: str = "layer"
    ffn_ratio: float = 0.333333333
    ffn_scope: str = "global"
    ffn_multiple: int = 1
    module_ratio: float = 0.75
    rank_ratio: float = 0.5
    rank_scope: str = "global"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.estimation_steps <= 0 or (self.estimation_steps >= 1 and self.estimation_steps % 1):
            raise ValueError(f"{self.name}: estimation_steps is a number of steps, or a share of them below 1; "
                             f"got {self.estimation_steps}")  # fmt: skip
        ratios = {n: getattr(self, n) for n in ("head_ratio", "ffn_ratio", "module_ratio", "rank_ratio")}
        if not all(0 <= r < 1 for r in ratios.values()) or not any(ratios.values()):
            raise ValueError(f"{self.name}: ratios lie in [0, 1) and one at least is above 0, got {ratios}")
        for name in ("head_scope", "ffn_scope", "rank_scope"):
            if (scope := getattr(self, name)) not in SCOPES:
                raise ValueError(f"{self.name}: {name} is one of {SCOPES}, got {scope!r}")
        if self.l1_coef < 0 or self.ffn_multiple < 1 or min(self.attn_mask_lr_mult, self.ffn_mask_lr_mult) <= 0:
            raise ValueError(f"{self.name}: l1_coef is 0 or more, ffn_multiple 1 or more, learning rates above 0; got "
                             f"{self.l1_coef}, {self.ffn_multiple}, {self.attn_mask_lr_mult} and "
                             f"{self.ffn_mask_lr_mult}")  # fmt: skip

    def inject(self, model: nn.Module, stats: None = None) -> None:
        masked = {layer: (part.units, part.width) for _, part, layer in self._checked(model)}
        inside = arch.blocks(model)
        tuned: dict[str, dict[str, Adapter]] = {}  # adapters elsewhere, as on embeddings and prompts, are left alone
        for name, host, _ in adapters(model):
            if not inside or not inside.keys().isdisjoint([name, *arch.parents(name)]):
                tuned[name] = {t: a for t, a in attached(host).items() if any(True for _ in a.parameters())}
        self._check_tuned(tuned := {name: held for name, held in tuned.items() if held})
        padding = watch(model, self.name) if tuned else Padding()
        for name in dict.fromkeys([*masked, *tuned]):
            estimate = Estimate(*masked.get(name, (0, 0)), tuned.get(name, {}), padding)
            attach(model.get_submodule(name), self.name, estimate)

    def _parts(self, model: nn.Module) -> list[Part]:
        """What may be cut: attention modules and MLPs, those left out by ``exclude`` aside."""
        found: list[Part] = [("heads", a, a.o) for a in parts.attentions(model) if self.head_ratio]
        found += [("channels", m, m.down) for m in parts.mlps(model) if self.ffn_ratio]
        for pattern in self.exclude:
            if not any(pattern_selects(pattern, part.name) for _, part, _ in found):
                raise ValueError(f"{self.name}: exclude {pattern!r} leaves nothing out; nearest: "
                                 f"{nearest(pattern, [part.name for _, part, _ in found])}")  # fmt: skip
        return [x for x in found if not any(pattern_selects(pattern, x[1].name) for pattern in self.exclude)]

    def _checked(self, model: nn.Module) -> list[Part]:
        found = self._parts(model)
        for kind, ratio in (("heads", "head_ratio"), ("channels", "ffn_ratio")):
            if getattr(self, ratio) and not any(k == kind for k, _, _ in found):
                raise ValueError(f"{self.name}: no {kind} that can be cut are found in this {type(model).__name__}; "
                                 f"set {ratio}=0 to leave them alone")  # fmt: skip
            for part in (p for k, p, _ in found if k == kind):
                if reason := surgery.obstacle(model, part):
                    raise ValueError(f"{self.name} cannot cut {kind} of {part.name!r}: {reason}; set {ratio}=0, or "
                                     f"exclude=({part.name!r},)")  # fmt: skip
        return found

    def _check_tuned(self, tuned: dict[str, dict[str, Adapter]]) -> None:
        ranked = any(ranks(a) for held in tuned.values() for a in held.values())
        for ratio, there in (("module_ratio", bool(tuned)), ("rank_ratio", ranked)):
            if getattr(self, ratio) and not there:
                what = "with an axis 'rank' is" if tuned else "is"
                raise ValueError(f"{self.name}: no adapter {what} there for {ratio}={getattr(self, ratio)} to prune; "
                                 "list it after others, PEFT([LoRA(), LightPEFT()]), or set this to 0")  # fmt: skip

    def _estimates(self, model: nn.Module) -> dict[str, tuple[Any, Estimate]]:
        """By layer: the layer and its estimate; none once it has pruned."""
        return {n: (host, a) for n, host, a in self.adapters(model) if isinstance(a, Estimate)}

    def _length(self, step: Step) -> int:
        length = int(self.estimation_steps)
        if self.estimation_steps < 1:
            length = min(max(round(self.estimation_steps * step.total), FEWEST), MOST)
        if step.planned is not None and length >= step.planned:
            raise ValueError(f"{self.name} would estimate for {length} steps, and the whole fit has {step.planned}: "
                             "train longer, or set estimation_steps to a number below that")  # fmt: skip
        return length

    def restarts(self, model: nn.Module, step: Step) -> Sequence[int]:
        if not self._estimates(model) and not step.index:
            return ()  # pruned by an earlier fit
        return (self._length(step),)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        held = self._estimates(model)
        if below := [n for n, (host, _) in held.items() if list(attached(host))[-1] != self.name]:
            raise ValueError(f"{self.name} must see what all other adapters on {below[0]!r} do: list it last")
        found = [(k, held[layer][1].mask) for k, _, layer in self._parts(model) if layer in held]
        scales = {"heads": self.attn_mask_lr_mult, "channels": self.ffn_mask_lr_mult}
        groups = {kind: [mask for k, mask in found if k == kind] for kind in scales}
        return [{"params": groups[k], "lr_scale": scales[k], "weight_decay": 0.0} for k in scales if groups[k]]

    def penalty(self, model: nn.Module) -> Tensor | None:
        masks: list[Tensor] = [a.mask for _, a in self._estimates(model).values() if a.mask is not None]
        return self.l1_coef * torch.cat(masks).abs().sum() if masks else None

    def before_step(self, model: nn.Module, step: Step) -> None:
        held = {n: (host, a) for n, (host, a) in self._estimates(model).items() if a.tags}
        if not held or step.index < self._length(step) // 2:  # LoRA's B starts at zero: the first steps say little
            return
        seen = torch.stack([a.importance.new_zeros(2) if a.seen is None else a.seen for _, a in held.values()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen)  # so that all ranks prune alike
        for (host, a), one in zip(held.values(), seen, strict=True):
            a.add(one, attached(host))

    def after_step(self, model: nn.Module, step: Step) -> None:
        if (held := self._estimates(model)) and step.index >= self._length(step):
            self._prune(model, held, step.optimizers)

    def finish(self, model: nn.Module) -> None:
        if self._estimates(model):
            warnings.warn(f"{self.name}: the fit ended within its estimation, so nothing was pruned", stacklevel=2)

    @torch.no_grad()
    def _prune(self, model: nn.Module, held: dict[str, tuple[Any, Estimate]], optimizers: Iterable[Optimizer]) -> None:
        found = [(k, part.name, held[layer][1].mask) for k, part, layer in self._parts(model) if layer in held]
        heads, channels = ({n: m for k, n, m in found if k == kind and m is not None} for kind in ("heads", "channels"))
        heads = above(heads, self.head_ratio, alone=self.head_scope == "layer")
        channels = above(channels, self.ffn_ratio, alone=self.ffn_scope == "layer", multiple=self.ffn_multiple)
        detach_all(model, self.name)
        if heads or channels:
            surgery.cut(model, heads, channels, optimizers)
        self._thin_out({n: x for n, x in held.items() if x[1].tags}, list(optimizers))

    def _thin_out(self, held: dict[str, tuple[Any, Estimate]], optimizers: list[Optimizer]) -> None:
        """Modules first, then the ranks of those that stay; the learned masks are not folded into anything."""
        importance = {n: a.importance[None] for n, (_, a) in held.items()}
        stay = {n for n, kept in above(importance, self.module_ratio, least=0).items() if len(kept)}
        scores = {(n, t): a.scores(t) for n, (_, a) in held.items() if n in stay for t in a.ranked}
        keep = above(scores, self.rank_ratio, alone=self.rank_scope == "layer", least=0)
        gone = [(n, t) for n, (_, a) in held.items() if n not in stay for t in a.tags]
        for name, tag in [*gone, *(place for place, kept in keep.items() if not len(kept))]:
            detach(held[name][0], tag)
        for (name, tag), kept in keep.items():
            if len(kept):
                resize(attached(held[name][0])[tag], "rank", kept, optimizers)

    @torch.no_grad()
    def report(self, model: nn.Module) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {"heads": {}, "channels": {}}
        for kind, part, _ in self._parts(model):
            found[kind][part.name] = part.units
        others = ((n, a) for n, _, a in adapters(model) if not isinstance(a, Estimate))
        found["rank"] = {n: r for n, a in others if (r := ranks(a))}
        held = {n: a for n, (_, a) in self._estimates(model).items() if a.tags}
        found["importance"] = {n: float(a.importance) for n, a in held.items()}
        return {k: v for k, v in found.items() if v}
