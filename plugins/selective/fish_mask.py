"""FISH mask: train the weights with the most Fisher information, found before the fit.

Sung et al. 2021, arXiv:2111.09839. With SHiRA's other choices by data (Bhardwaj et al. 2024, arXiv:2406.13175).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lightning_peft_plugins.selective import sparse
from torch import Tensor, nn

from lightning_peft import Method, Traits, attach, find, hosts

RULES = ("fisher", "gradient", "snip")


@dataclass(frozen=True, kw_only=True)
class FishMask(Method):
    """W + S, with S trained at the entries that matter most to the task and zero elsewhere; these stay for the fit.

    The empirical Fisher information of an entry is the mean over examples of its squared gradient, by the labels that
    they have; squaring the gradient of a whole batch would be something else. Weights of layers alone are chosen from,
    where the paper has biases and norms too; a new head trains by ``train``, not by this.

    Args:
        density: share of the targets' weights that train.
        samples: examples to look at, at most; PEFT(calibration_batches=...) bounds them too.
        rule: score of an entry: "fisher"; SHiRA's "gradient", the mean of its size, or "snip", that times the weight.
        scope: the density is shared out over all layers, "global", or holds in each "layer".
        targets: names, patterns or roles of the layers to adapt; embeddings and convolutions by name.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="selective",
        paper="Sung, Nair, Raffel 2021, arXiv:2111.09839",
        parameters="density * in * out summed over the layers",
        hosts=("linear", "conv1d", "embedding", "conv"),
        merge=True,
        quantized=False,
    )
    name: str = "fish_mask"
    density: float = 0.005
    samples: int = 1024
    rule: str = "fisher"
    scope: str = "global"
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""

    def __post_init__(self) -> None:
        sparse.check(self)
        if self.rule not in RULES:
            raise ValueError(
                f"{self.name}: rule is one of {RULES}, got {self.rule!r}; sparse_mask has those without data"
            )
        if self.samples < 1:
            raise ValueError(f"{self.name}: samples is at least 1, got {self.samples}")

    def calibrate(self, model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """Layer -> flat positions of its entries that train."""
        return sparse.choose(self, self.scores(model, batches, loss))

    def scores(self, model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """Layer -> scores of its (out, in) matrix, in float32; the model is in evaluation mode meanwhile."""
        targets = dict(self._targets(model))
        weights = [host.weight for host in targets.values()]
        sums = {name: torch.zeros(hosts.shape(host), device=host.weight.device) for name, host in targets.items()}
        count = 0
        with sparse.looking(model, weights):
            for example in islice((e for batch in batches for e in examples(batch)), self.samples):
                grads = torch.autograd.grad(loss(example), weights, allow_unused=True)
                count += 1
                for (name, host), g in zip(targets.items(), grads, strict=True):
                    if g is not None:
                        g = hosts.as_matrix(host, g).float()
                        sums[name] += g.square() if self.rule == "fisher" else g.abs()
        if not any(bool(s.any()) for s in sums.values()):
            raise ValueError(f"{self.name}: over {count} examples the loss has no gradient at any of the targets")
        factors = {n: hosts.read(h).detach().float().abs() if self.rule == "snip" else 1 for n, h in targets.items()}
        return {n: sparse.without_padding(h, sums[n] * factors[n] / count) for n, h in targets.items()}

    def inject(self, model: nn.Module, stats: dict[str, Tensor] | None = None) -> None:
        for name, host in self._targets(model):
            flat = torch.empty(0, dtype=torch.long) if stats is None else stats[name]
            if stats is None or len(flat):
                attach(host, self.name, sparse.Sparse(host, flat))

    def _targets(self, model: nn.Module) -> list[tuple[str, Any]]:
        targets = find(model, self.targets, self.traits.hosts, exclude=self.exclude, layers=self.layers)
        if other := next((n for n, host in targets if not host.weight.is_floating_point()), None):
            raise ValueError(f"{self.name} chooses by gradients, which {other!r}, stored quantised, has none of: "
                             "exclude it, or take sparse_mask")  # fmt: skip
        return targets


def examples(batch: Any) -> Iterator[Any]:
    """The batch as batches of one example; what is no tensor with a first dimension goes with each of them.

    Raises:
        ValueError: tensors that are not alike in their first dimension, or none at all.
    """
    sizes = set(_sizes(batch))
    if len(sizes) != 1:
        raise ValueError("a mean over examples needs batches that can be cut into them, but the tensors of this one "
                         f"have {sorted(sizes) or 'no'} entries along their first dimension")  # fmt: skip
    return (_at(batch, slice(i, i + 1)) for i in range(sizes.pop()))


def _sizes(x: Any) -> Iterator[int]:
    if isinstance(x, Tensor):
        yield from x.shape[:1]
    elif isinstance(x, Mapping | list | tuple):
        for part in x.values() if isinstance(x, Mapping) else x:
            yield from _sizes(part)


def _at(x: Any, index: slice) -> Any:
    if isinstance(x, Tensor):
        return x[index] if x.dim() else x
    if isinstance(x, Mapping):  # also transformers' BatchEncoding
        return type(x)({k: _at(v, index) for k, v in x.items()})  # pyright: ignore[reportCallIssue]
    if isinstance(x, list | tuple):
        parts = [_at(v, index) for v in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return x
