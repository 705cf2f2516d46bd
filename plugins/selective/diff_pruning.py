"""Diff pruning: a difference for every weight, made sparse as it is trained. Guo, Rush, Kim 2020, arXiv:2012.07463."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning_peft_plugins.selective import sparse
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import Base, Method, Step, Traits, WeightAdapter, attach, find, hosts, resize

LOW, HIGH = -1.5, 1.5  # ends that the gates' distribution is stretched to before it is cut to [0, 1]


class Difference(WeightAdapter):
    """``W + z * w`` with a gate z in [0, 1] at every entry; after ``keep`` w is left at k entries, without gates.

    While it searches w and alpha are (out * in,), group is (1,) or (0,), index (2, 0); then w is (k,), alpha and group
    are (0,), index (2, k).
    """

    axes = {"w": ("entry",), "alpha": ("gate",), "group": ("group",), "index": ("coordinate", "kept")}
    index: Tensor

    def __init__(self, host: Any, method: "DiffPruning") -> None:
        super().__init__()
        self.shape, self.alpha_init = hosts.shape(host), method.alpha_init
        self.w = nn.Parameter(torch.empty(math.prod(self.shape)))
        self.alpha = nn.Parameter(torch.empty(math.prod(self.shape)))
        self.group = nn.Parameter(torch.empty(int(method.grouped)))
        self.register_buffer("index", torch.empty(2, 0, dtype=torch.int32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.w)  # so training starts from the base model
        nn.init.constant_(self.alpha, self.alpha_init)
        nn.init.constant_(self.group, self.alpha_init)

    @property
    def searching(self) -> bool:
        return len(self.alpha) > 0

    def gate(self, alpha: Tensor) -> Tensor:
        """Hard concrete: drawn where gradients are taken in training, else its value without noise."""
        if self.training and torch.is_grad_enabled():  # a merge reads the weight without gradients
            u = torch.rand_like(alpha) * 0.9998 + 1e-4
            alpha = alpha + u.log() - (1 - u).log()
        return (alpha.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)

    def change(self) -> Tensor:
        """z * w, (out, in), while it searches."""
        z = self.gate(self.alpha) * self.gate(self.group).prod()  # of none it is 1
        return (z * self.w).view(self.shape)

    def left(self) -> Tensor:
        """w (k,), after that. The empty tensors take part: DDP waits for a gradient of every parameter."""
        return self.w + self.alpha.sum() + self.group.sum()

    def weight(self, W: Tensor) -> Tensor:
        return W + (self.change() if self.searching else sparse.spread(self.index, self.left(), self.shape))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if self.searching or not sparse.linear(base):
            return super().forward(base, x)
        return sparse.run(base, x, self.index, self.left())

    def open(self) -> Tensor:
        """Expected number of gates that are not zero; both of an entry's must be open."""
        shift = math.log(-LOW / HIGH)
        return (self.alpha - shift).sigmoid().sum() * (self.group - shift).sigmoid().prod()

    def keep(self, flat: Tensor, optimizers: Iterable[Optimizer]) -> None:
        """Train on at these entries alone, from z * w; the moments of w follow."""
        self.w.data, optimizers = self.change().flatten(), list(optimizers)
        self.index = sparse.pairs(flat, self.shape[1])
        resize(self, "entry", flat, optimizers)
        for axis in ("gate", "group"):
            resize(self, axis, flat[:0], optimizers)


@dataclass(frozen=True, kw_only=True)
class DiffPruning(Method):
    """W + z * w: gates z that an L0 penalty closes, then a fixed share of the entries; W stays as it is.

    For the first part of the fit (``search``) a gate is drawn for every entry at every step. Then the entries with the
    largest z * w are kept, and those alone train on. Until then an adapted weight takes two tensors of its size.

    Args:
        density: share of the targets' weights that differ in the end.
        scope: the density is shared out over all layers, "global", or holds in each "layer".
        search: share of the fit's steps before entries are chosen.
        l0_weight: penalty for each gate that is expected to be open.
        grouped: a second gate for each weight as a whole, multiplied with the entry's ("structured" in the paper).
        alpha_init: start of alpha; at 5 a gate is open with probability 0.993.
        alpha_lr: initial learning rate of the gates, 1e4 times the authors' for w; the schedule acts on it as well.
        targets: names, patterns or roles of the layers to adapt; embeddings and convolutions by name.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="selective",
        paper="Guo, Rush, Kim 2020, arXiv:2012.07463",
        parameters="2 * in * out a layer while it searches, then density * in * out",
        hosts=("linear", "conv1d", "embedding", "conv"),
        merge=True,
    )
    name: str = "diff_pruning"
    density: float = 0.005
    scope: str = "global"
    search: float = 0.5
    l0_weight: float = 1.25e-7
    grouped: bool = True
    alpha_init: float = 5.0
    alpha_lr: float = 0.1
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""

    def __post_init__(self) -> None:
        sparse.check(self)
        if self.density == 1 or not 0 < self.search < 1:
            raise ValueError(f"{self.name}: density and search lie in (0, 1), got {self.density} and {self.search}")
        if self.l0_weight < 0 or self.alpha_lr <= 0:
            given = f"l0_weight={self.l0_weight} and alpha_lr={self.alpha_lr}"
            raise ValueError(f"{self.name}: the penalty is no less than 0, the rate positive; got {given}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        for _, host in find(model, self.targets, self.traits.hosts, exclude=self.exclude, layers=self.layers):
            attach(host, self.name, Difference(host, self))

    def _held(self, model: nn.Module) -> dict[str, tuple[Any, Any]]:
        return {name: (host, a) for name, host, a in self.adapters(model)}

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        gates = [p for _, a in self._held(model).values() for p in (a.alpha, a.group)]
        return [{"params": gates, "lr": self.alpha_lr, "weight_decay": 0.0}]

    def penalty(self, model: nn.Module) -> Tensor | None:
        terms = [a.open() for _, a in self._held(model).values() if a.searching]
        return self.l0_weight * torch.stack(terms).sum() if terms else None

    def after_step(self, model: nn.Module, step: Step) -> None:
        if step.index >= max(1, round(self.search * step.total)):
            self._prune(model, step.optimizers)

    def finish(self, model: nn.Module) -> None:
        if self._prune(model):
            warnings.warn(f"{self.name}: the fit ended before its share {self.search} for the search, so entries were "
                          "chosen at the end and did not train on by themselves", stacklevel=2)  # fmt: skip

    @torch.no_grad()
    def _prune(self, model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> bool:
        """Keep the entries with the largest change; False where that was done before."""
        held = {n: (host, a) for n, (host, a) in self._held(model).items() if a.searching}
        scores = {n: sparse.without_padding(host, a.change().abs()) for n, (host, a) in held.items()}
        for name, flat in (sparse.choose(self, scores) if scores else {}).items():
            held[name][1].keep(flat, optimizers)
        return bool(held)

    @torch.no_grad()
    def report(self, model: nn.Module) -> dict[str, dict[str, float]]:
        shares = {n: float(a.open() if a.searching else len(a.w)) for n, (_, a) in self._held(model).items()}
        return {"density": {n: share / math.prod(hosts.shape(model.get_submodule(n))) for n, share in shares.items()}}
