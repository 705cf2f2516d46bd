"""What sharpness-aware methods share: steps away from the weights and back, and what they measured."""

import contextlib
import math
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import Step

EPS = 1e-12
Direction = list[Tensor]


_told: "weakref.WeakKeyDictionary[nn.Module, dict[str, dict[str, Tensor]]]" = weakref.WeakKeyDictionary()


def tell(method: Any, model: nn.Module, **rises: Tensor) -> None:
    """Keep, for ``report``, by how much the loss moved in the last micro-batch."""
    _told.setdefault(model, {})[method.name] = rises


def told(method: Any, model: nn.Module) -> dict[str, dict[str, float]]:
    """For a report; nothing before the first step."""
    return {q: {"loss": float(value)} for q, value in _told.get(model, {}).get(method.name, {}).items()}


def moved(step: Step) -> list[nn.Parameter]:
    """Every parameter of the optimizers that got a gradient, heads that train along included."""
    held = [p for o in step.optimizers for g in o.param_groups for p in g["params"]]
    return [p for p in held if p.requires_grad and p.grad is not None]


def gradients(parameters: list[nn.Parameter]) -> Direction:
    """Their gradients; zeros where a pass reached one no more."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def norm(tensors: Direction) -> Tensor:
    """The 2-norm of all of them as one vector, a scalar."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors]))


@contextlib.contextmanager
def returning(parameters: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Weights to move, given as copies; bit for bit the old ones afterwards, also where a pass failed."""
    start = [p.detach().clone() for p in parameters]
    try:
        yield start
    finally:
        with torch.no_grad():
            for p, w in zip(parameters, start, strict=True):
                p.copy_(w)


@torch.no_grad()
def move(parameters: list[nn.Parameter], start: list[Tensor], direction: Direction, by: Tensor) -> None:
    """Set the parameters to start + by * direction."""
    for p, w, d in zip(parameters, start, direction, strict=True):
        p.copy_(w.addcmul(d, by))


def check_radius(name: str, **radii: float) -> None:
    """Raises ValueError where one is negative or not finite."""
    for field, value in radii.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: {field} is a distance of at least 0, such as 0.05, got {value}")


def check(name: str, optimizer: Optimizer) -> Optimizer:
    """The optimizer, if this can work with it.

    Raises:
        ValueError: nothing trains, or in a precision in which a weight cannot hold so small a move.
    """
    held = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    if not held:
        raise ValueError(f"{name} trains nothing by itself: list it beside a method, as in PEFT([LoRA(r=8), {name}])")
    half = next((p for p in held if p.dtype in (torch.float16, torch.bfloat16)), None)
    if half is not None:
        raise ValueError(
            f"{name} moves each weight by far less than {half.dtype} can hold next to it, and a tensor of "
            f"{tuple(half.shape)} trains in {half.dtype}: let float32 tensors train (PEFT's default dtype; for heads a "
            "float32 model) and use precision='bf16-mixed'"
        )
    return optimizer
