"""What density losses share: adapters that watch the activations of MLPs, and what is summed and counted of them.

A watched activation is reduced to a number per call. The soft density of Runwal, Pedapati and Chen 2024
(arXiv:2402.01911) is the mean of ``v^2 / (v^2 + eps)``, the hard one the share of entries that are not zero.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_peft import Adapter
from lightning_peft.padding import Padding

Act = Callable[[Tensor], Tensor]
QUANTITIES = ("soft", "hard", "above")


def per_example(x: Tensor, weights: Tensor | None) -> Tensor:
    """Means () summed over examples: of x (B, ..., F), where weights (B, T), if any, sum to one in an example."""
    if weights is None:
        return x.float().mean() * len(x)
    return (x.float().mean(-1) * weights).sum()


def wide(a: Tensor) -> Tensor:
    """At least float32: squares of half-precision numbers vanish, and with them a small eps."""
    return a.to(torch.promote_types(a.dtype, torch.float32))


class SoftDensity(torch.autograd.Function):
    """Soft density of ``a = act(x)``, summed over examples, that keeps x and nothing of a's size for backward.

    The activation function keeps its input for itself anyway, so that x costs no memory; a is computed once more. Where
    ``act`` is None x is a.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, act: Act | None, eps: float, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.act, ctx.eps, ctx.weights = act, eps, weights
        squares = wide(a).square()
        return per_example(squares / (squares + eps), weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            source = x.detach().requires_grad_()
            a = source if ctx.act is None else ctx.act(source)
        v = wide(a.detach())
        share = 1 / v[0].numel() if ctx.weights is None else ctx.weights[..., None] / v.shape[-1]
        slope = (2 * ctx.eps * grad * share * v / (v.square() + ctx.eps).square()).to(a.dtype)
        if ctx.act is not None:
            (slope,) = torch.autograd.grad(a, source, slope)
        return slope, None, None, None, None


def soft_density(x: Tensor, a: Tensor, act: Act | None, eps: float, weights: Tensor | None) -> Tensor:
    """() summed over examples; see ``SoftDensity``. A compiler chooses by itself what to keep."""
    if torch.compiler.is_compiling():
        squares = wide(a).square()
        return per_example(squares / (squares + eps), weights)
    return SoftDensity.apply(x, a if act is None else a.detach(), act, eps, weights)


def in_backward() -> bool:
    """True while gradient checkpointing runs a layer again, whose activations were seen before."""
    # Private, as torch.utils.checkpoint has it; nothing public tells.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def real_tokens(mask: Tensor | None, a: Tensor) -> Tensor | None:
    """(B, T), one over the number of real tokens of an example where one is, else 0; None without a mask.

    Positions of a (B, T, F) in front of the text (a soft prompt) are real, those in a cache are not among them.

    Raises:
        ValueError: a mask of another form.
    """
    if mask is None:
        return None
    if mask.dim() != 2 or a.dim() != 3 or len(a) != len(mask):
        raise ValueError(
            f"count_padding=False needs an attention_mask (batch, positions) and activations (batch, positions, "
            f"channels), got {tuple(mask.shape)} and {tuple(a.shape)}"
        )
    real = nn.functional.pad((mask != 0).float(), (max(0, a.shape[1] - mask.shape[1]), 0), value=1.0)
    real = real[:, real.shape[1] - a.shape[1] :]
    return real / real.sum(1, keepdim=True).clamp(min=1)


class Watcher(Adapter):
    """Sees an activation a (B, ..., F) at every call, changes nothing, and keeps sums over examples.

    Args:
        eps: of the soft density.
        threshold: size from which on an entry counts as "above".
        loss: keep the soft density with its gradient until ``take``.
        padding: does not count; with None all positions do.
        warm: factor of the loss at the start, 1 without a warm-up.
    """

    watches = True
    factor: Tensor

    def __init__(self, eps: float, threshold: float, loss: bool, padding: Padding | None, warm: float) -> None:
        super().__init__()
        self.eps, self.threshold, self.loss, self.warm = eps, threshold, loss, warm
        self.padding = padding
        self.register_buffer("factor", torch.tensor(warm), persistent=warm != 1)
        # Examples, and sums of each quantity over them: while training, in evaluation; now, and before ``take``.
        self.now, self.before = (torch.zeros(2, 1 + len(QUANTITIES), device="cpu") for _ in range(2))
        self.terms: list[Tensor] = []
        self.counts: list[int] = []
        self.blind = False

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.factor.fill_(self.warm)

    def train(self, mode: bool = True) -> "Watcher":
        if mode != self.training:
            self.drop()  # of a forward that no loss followed
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:  # a graph cannot be copied
        return self.__dict__ | {"terms": [], "counts": [], "blind": False}

    def drop(self) -> None:
        self.terms, self.counts, self.blind = [], [], False

    def see(self, a: Tensor, x: Tensor, act: Act | None = None) -> None:
        """Take in one call; ``a = act(x)``, or a is x."""
        again = in_backward()
        weights = None if self.padding is None or again else real_tokens(self.padding.mask, a)
        # Also in the second run of a checkpointed layer, which has to save what the first one did.
        term = soft_density(x, a, act, self.eps, weights)
        if again:
            return
        if self.loss and torch.is_grad_enabled():
            self.terms.append(term)
            self.counts.append(len(a))
        self.blind = self.blind or (self.loss and self.training and not torch.is_grad_enabled())
        self._count(a.detach(), weights, term.detach())

    @torch.no_grad()
    def _count(self, a: Tensor, weights: Tensor | None, term: Tensor) -> None:
        above = a.abs() > self.threshold
        sums = [term, *(per_example(share, weights) for share in (a != 0, above))]
        new = torch.stack([torch.full_like(term, len(a)), *sums]).to(torch.float32)
        if self.now.device != new.device:
            self.now, self.before = (t.to(new.device) for t in (self.now, self.before))
        self.now[int(not self.training)] += new

    def take(self) -> tuple[Tensor | None, bool]:
        """(mean soft density over the examples since the last time or None, some were seen only without gradient)."""
        term = sum(self.terms[1:], self.terms[0]) / sum(self.counts) if self.terms else None
        blind = self.blind and term is None
        self.before = torch.where(self.now[:, :1] > 0, self.now, self.before)
        self.now = torch.zeros_like(self.now)
        self.drop()
        return term, blind

    def measured(self) -> list[list[float]]:
        """The mean of each of ``QUANTITIES`` while training, and in evaluation; empty where nothing was seen."""
        rows = torch.where(self.now[:, :1] > 0, self.now, self.before).tolist()
        return [[value / row[0] for value in row[1:]] if row[0] else [] for row in rows]

    def forget(self) -> None:
        self.now, self.before = torch.zeros_like(self.now), torch.zeros_like(self.before)
