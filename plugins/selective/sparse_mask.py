"""SHiRA: train a few scattered entries of each weight, a change of high rank. Bhardwaj et al. 2024, arXiv:2406.13175.

With the smallest weights it is PaFi (Liao et al. 2023, arXiv:2305.16742). Choices that take data are in ``fish_mask``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from lightning_peft_plugins.selective import sparse
from torch import Tensor, nn

from lightning_peft import Method, Traits, attach, find, hf, hosts

RULES = ("random", "magnitude", "small_magnitude")
HF_FIELDS = ("r", "mask_type", "random_seed", "fan_in_fan_out", "init_weights")


@dataclass(frozen=True, kw_only=True)
class SparseMask(Method):
    """W + S, with S trained at chosen entries and zero elsewhere. The entries are saved with their values.

    Weight decay pulls a trained entry towards the base's value; it does nothing to all others.

    Args:
        density: share of the entries that train.
        r: train r * (in + out) entries a layer, as many as LoRA of that rank has; 0 leaves it to ``density``.
        rule: which entries: "random"; "magnitude", the largest, or "small_magnitude", the smallest weights.
        scope: the density holds in each "layer", or is shared out over all of them, "global".
        seed: of the random rule.
        targets: names, patterns or roles of the layers to adapt; embeddings and convolutions by name.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="selective",
        paper="Bhardwaj et al. 2024, arXiv:2406.13175",
        parameters="density * in * out a layer, or r * (in + out)",
        hosts=("linear", "conv1d", "embedding", "conv"),
        merge=True,
        needs_weights=True,
        hf="SHIRA",
    )
    name: str = "sparse_mask"
    density: float = 0.01
    r: int = 0
    rule: str = "random"
    scope: str = "layer"
    seed: int = 0
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""

    def __post_init__(self) -> None:
        sparse.check(self)
        if self.rule not in RULES:
            raise ValueError(f"{self.name}: rule is one of {RULES}, got {self.rule!r}; fish_mask chooses by gradients")
        if self.r < 0:
            raise ValueError(f"{self.name}: r is at least 1 (0: not used), got {self.r}")
        if self.r and (self.scope, self.density) != ("layer", 0.01):
            raise ValueError(f"{self.name}: r says how many entries a layer has, so density and scope have no effect")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        targets = find(model, self.targets, self.traits.hosts, exclude=self.exclude, layers=self.layers)
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        chosen: dict[str, Tensor] = {}
        for group in [targets] if self.scope == "global" else [[t] for t in targets]:
            scores = {name: self._score(host, generator) for name, host in group}
            chosen |= self._first(*group[0], scores) if self.r else sparse.choose(self, scores)
        for name, host in targets:
            if len(chosen[name]):  # with a density over all layers some may have no entry
                attach(host, self.name, sparse.Sparse(host, chosen[name]))

    def _score(self, host: Any, generator: torch.Generator) -> Tensor:
        W = hosts.read(host).detach().float()
        if self.rule == "random":
            score = torch.rand(W.shape, generator=generator, device="cpu").to(W.device)  # every machine draws the same
        else:
            score = W.abs() if self.rule == "magnitude" else -W.abs()
        return sparse.without_padding(host, score)

    def _first(self, name: str, host: Any, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        k, total = self.r * sum(hosts.shape(host)), int((scores[name] > -torch.inf).sum())
        if k > total:
            raise ValueError(f"{self.name}: r={self.r} gives {name!r} {k} entries, but it has {total} weights")
        return {name: sparse.highest([scores[name]], k)[0]}

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        held: dict[str, tuple[Any, Any]] = {name: (host, a) for name, host, a in self.adapters(model)}
        if other := next((n for n, (host, _) in held.items() if not isinstance(host, nn.Linear)), None):
            raise ValueError(f"{other}: huggingface/peft's SHiRA has linear layers alone")
        if not self.r:
            raise ValueError("huggingface/peft's SHiRA has r * (in + out) entries a layer, so only sparse_mask(r=...) "
                             "goes into its format; lightning_peft.save keeps any density")  # fmt: skip
        tensors = {}
        for name, (_, a) in held.items():
            tensors |= {f"{hf.PREFIX}{name}.shira_weight": a.v, f"{hf.PREFIX}{name}.shira_indices": a.index}
        return {"r": self.r, "mask_type": "random", "target_modules": hf.target_modules(model, held)}, tensors

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "SparseMask":
        hf.check_fields(config, HF_FIELDS, "sparse_mask")
        names = [name for name, held in tensors.items() if "shira_weight" in held]
        if not names:
            raise ValueError(f"no entry of the file belongs to a module of this {type(model).__name__}: other base?")
        return cls(r=config["r"], targets=hf.targets(model, names))
