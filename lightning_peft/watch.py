"""What is measured of trainable tensors in the first steps: gradients, movement, agreement of the ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an element
CHUNK = 1 << 20
GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed integer: spreads positions over all 64 bits


@dataclass
class Seen:
    """What was seen of one tensor. Nothing here waits for the device before ``flags``.

    Args:
        name: below the model that was injected into.
        shape: before the first step.
        start: digest of the value before the first step.
        gradients: steps with a gradient.
        largest: largest absolute element of any gradient, () on the tensor's device.
        rate: largest learning rate.
    """

    name: str
    shape: torch.Size
    start: Tensor
    gradients: int = 0
    largest: Tensor | None = None
    rate: float = 0.0

    def note(self, grad: Tensor | None, rate: float) -> None:
        """Take in one step, between backward and the optimizer."""
        self.rate = max(self.rate, rate)
        if grad is not None:
            self.gradients += 1
            size = _largest(grad)
            self.largest = size if self.largest is None else torch.maximum(self.largest, size)


def digest(t: Tensor) -> Tensor:
    """A sum over the elements' bits of this process's part of ``t``, weighted by position; () int64, no device sync.

    Integers wrap around, so the order of summation does not matter: equal values have equal digests on every rank.
    """
    bits = _local(t.detach()).flatten()
    bits = bits.view(BITS[bits.element_size()])
    weight = torch.arange(1, min(CHUNK, len(bits)) + 1, device=bits.device) * GOLDEN
    weight ^= weight >> 32  # not linear in the position, so that changes at several positions do not cancel
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for part in bits.split(CHUNK):
        total = total * 31 + (part * weight[: len(part)]).sum()
    return total


def flags(trainer: Trainer, seen: Mapping[nn.Parameter, Seen]) -> list[list[bool]]:
    """[a gradient came, one was not zero, the value moved] of each tensor, on any rank: a shard alone says little."""
    device = trainer.strategy.root_device
    rows = [torch.stack([t.to(device) != 0 for t in _marks(p, s)]) for p, s in seen.items()]
    mine = torch.stack(rows).int()  # (tensors, 3)
    return _of_all_ranks(trainer, mine).amax(0).bool().tolist()


def differing(trainer: Trainer, tensors: Mapping[nn.Parameter, str]) -> Sequence[str]:
    """Names of tensors that are not bitwise the same on all ranks; sharded ones are left out."""
    whole = {n: p for p, n in tensors.items() if not isinstance(p, DTensor)}
    if trainer.world_size == 1 or not whole:
        return []
    mine = torch.stack([digest(p).to(trainer.strategy.root_device) for p in whole.values()])
    every = _of_all_ranks(trainer, mine)  # (ranks, tensors)
    differ = (every != every[0]).any(0).tolist()
    return [n for n, d in zip(whole, differ, strict=True) if d]


def _of_all_ranks(trainer: Trainer, mine: Tensor) -> Tensor:
    """(ranks, *shape). Lightning's all_gather would do, were it not for a deprecation warning from torch."""
    if trainer.world_size == 1:
        return mine[None]
    every = [torch.empty_like(mine) for _ in range(trainer.world_size)]
    torch.distributed.all_gather(every, mine)
    return torch.stack(every)


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def _largest(grad: Tensor) -> Tensor:
    grad = _local(grad.detach())
    grad = grad._values() if grad.is_sparse else grad
    return grad.abs().max() if grad.numel() else grad.new_zeros(())


def _marks(p: nn.Parameter, seen: Seen) -> list[Tensor]:
    """Numbers, not zero where the flag holds."""
    largest = torch.tensor(0) if seen.largest is None else seen.largest
    moved = torch.tensor(1) if p.shape != seen.shape else digest(p) - seen.start
    return [torch.tensor(seen.gradients), largest, moved]
