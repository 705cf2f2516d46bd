"""What layers see of the data: the main directions of their inputs by incremental PCA, padding left out."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from lightning_peft_plugins.reparameterized.pissa import principal
from torch import Tensor, nn

from lightning_peft.attach import evaluating
from lightning_peft.padding import Padding, reading

SEEN = 1e-5  # of the largest singular value: directions below it are rounding


class Directions(NamedTuple):
    """Of n rows: their mean (in,) in float64, and S (k,), V (k, in) of the rest, k at most r."""

    r: int
    n: int
    mean: Tensor
    S: Tensor
    V: Tensor


def join(old: Directions | None, n: int, mean: Tensor, rows: Tensor, r: int, niter: int) -> Directions:
    """``old`` and n more rows, of which the mean (in,) and the centred rows (or S * V in their place) are given.

    The summary of all, up to what was cut off at r: the step of incremental PCA, and that which joins two processes.
    """
    if old is not None:
        between = (old.n * n / (old.n + n)) ** 0.5 * (old.mean - mean)
        rows = torch.cat([old.S[:, None] * old.V, rows, between.float()[None]])
        n, mean = old.n + n, (old.n * old.mean + n * mean) / (old.n + n)
    k = min(r, *rows.shape)
    triplets = principal(rows, k, niter) if niter else torch.linalg.svd(rows.double(), full_matrices=False)
    S, V = (t[:k].to(rows) for t in triplets[1:])
    sign = V.gather(1, V.abs().argmax(1, keepdim=True)).sign()  # the largest entry of a direction becomes positive
    return Directions(r, n, mean, S, V * sign)


class Watch:
    """Summaries of what layers see while ``on``, in memory that does not grow with the data.

    Layers in a row that see one tensor and keep as many directions, such as q, k and v, share the work.

    Args:
        ranks: name of a layer -> directions to keep of its inputs.
        niter: subspace iterations of the randomised SVD of each step; 0 is exact.
        rows: tokens of a batch that a layer looks at, at most; drawn by ``seed`` where there are more.
    """

    def __init__(self, ranks: dict[str, int], niter: int, rows: int, seed: int) -> None:
        self.ranks, self.niter, self.rows = ranks, niter, rows
        self.held: dict[str, Directions | None] = dict.fromkeys(ranks)
        self.padding = Padding()
        self.generator = torch.Generator().manual_seed(seed)
        self.last: tuple[Any, ...] = (None, None, 0, None)

    @contextlib.contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """In evaluation mode, as the untouched base sees its inputs."""
        with evaluating(model), reading(model) as self.padding:
            layers = [(m, self._sees(n)) for n, m in model.named_modules() if n in self.ranks]
            handles = [layer.register_forward_pre_hook(see) for layer, see in layers]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _sees(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            x, old, r = args[0], self.held[name], self.ranks[name]
            if not (self.last[0] is x and self.last[1] is old and self.last[2] == r):
                with torch.autocast(x.device.type, enabled=False):
                    self.last = (x, old, r, self._with(old, x, r))
            self.held[name] = self.last[3]

        return see

    def _with(self, old: Directions | None, x: Tensor, r: int) -> Directions | None:
        mask = self.padding.of(x)
        rows = (x if mask is None else x[mask.bool()]).reshape(-1, x.shape[-1])
        if len(rows) > self.rows:
            rows = rows[torch.randperm(len(rows), generator=self.generator)[: self.rows].to(x.device)]
        if not len(rows):
            return old
        rows = rows.detach().float()
        mean = rows.mean(0, dtype=torch.float64)
        return join(old, len(rows), mean, rows - mean.float(), r, self.niter)


def projector(summary: Directions | None, r: int, fan_in: int, seed: int) -> tuple[Tensor, int]:
    """P (r, in) with orthonormal rows, and how many of them the data gave; random ones fill it up."""
    V = torch.zeros(0, fan_in) if summary is None else summary.V[summary.S > SEEN * summary.S[0]][:r]
    if len(V) < r:
        drawn = torch.randn(fan_in, r - len(V), generator=torch.Generator().manual_seed(seed)).to(V.device)
        for _ in range(2):  # twice, or what rounding left of V would stay
            drawn = torch.linalg.qr(drawn - V.mT @ (V @ drawn))[0]
        return torch.cat([V, drawn.mT]), len(V)
    return V.clone(), r
