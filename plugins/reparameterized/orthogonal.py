"""What HRA, OFT and BOFT share: blocks of rotations by Cayley's map, and what huggingface/peft can express of each."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import hosts


def cayley(Q: Tensor) -> Tensor:
    """R - I for R = (I - Q)(I + Q)^-1, a rotation for every skew-symmetric block of Q (..., b, b).

    R = 2 (I + Q)^-1 - I, one inverse in place of a product. I + Q is never singular: Q's eigenvalues are imaginary.
    """
    Q = widen(Q, Q)
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    with torch.autocast(Q.device.type, enabled=False):
        return 2 * (torch.linalg.inv_ex(eye + Q).inverse - eye)  # _ex does not wait for the device to report


def series(Q: Tensor, terms: int) -> Tensor:
    """R - I for (I + Q)(I + Q + ... + Q^(terms - 2)), which nears (I + Q)(I - Q)^-1, the one of -Q."""
    with torch.autocast(Q.device.type, enabled=False):
        powers = Q
        for _ in range(terms - 3):
            powers = Q + Q @ powers
        return powers + Q + Q @ powers


def blockwise(x: Tensor, M: Tensor) -> Tensor:
    """x (..., blocks * b), each block times its own of M (blocks, b, b), or all times the same one of M (1, b, b)."""
    h, M = x.unflatten(-1, (-1, M.shape[-1])), M.to(x.dtype)
    return (h @ M[0] if len(M) == 1 else torch.einsum("...nb,nbc->...nc", h, M)).flatten(-2)


def with_identity(S: Tensor) -> Tensor:
    """R for S = R - I. An input takes R, which is one product; a weight W + W S, which bfloat16 does not round away."""
    return S + torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)


def widen(t: Tensor, like: Tensor) -> Tensor:
    """``t`` in a dtype that holds both, float32 or better: no inverse is taken, and no weight changed, in bfloat16."""
    return t.to(torch.promote_types(torch.promote_types(t.dtype, like.dtype), torch.float32))


def check_blocks(method: Any) -> None:
    """Refuse sizes and numbers of blocks out of range; exactly one of the two is given, the other 0."""
    name, given = type(method).__name__, f"got block_size={method.block_size}, blocks={method.blocks}"
    if min(method.block_size, method.blocks) < 0 or (method.block_size > 0) == (method.blocks > 0):
        raise ValueError(f"{name} needs block_size or blocks, one of them at least 1 and the other 0; {given}")


def nearest_divisor(name: str, width: int, wanted: int) -> int:
    """The divisor of ``width`` that lies nearest to ``wanted``, the smaller of two; aloud where it is another."""
    best = min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: (abs(d - wanted), d))
    if best != wanted:
        warnings.warn(f"{name}: {wanted} does not divide its {width} inputs, taking {best}", stacklevel=2)
    return best


def in_peft(method: Any, model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Module name -> (host, adapter) of a method's adapters, all of a kind that peft's namesake has.

    Raises:
        ValueError: a kind of layer that it has not.
    """
    held: dict[str, tuple[Any, Any]] = {name: (host, a) for name, host, a in method.adapters(model)}
    for name, (host, _) in held.items():
        if hosts.is_conv1d(host) or isinstance(host, nn.Conv1d | nn.Conv3d):
            what = "Conv1D of transformers" if hosts.is_conv1d(host) else type(host).__mro__[1].__name__
            raise ValueError(f"{name}: huggingface/peft's {type(method).__name__} has no {what}")
    return held


def check_conv_in_peft(name: str, host: Any) -> None:
    """Refuse a convolution for which peft's methods that build a whole kernel compute something else, or fail."""
    if hosts.kind(host) != "conv":
        return
    sides = [host.kernel_size, host.stride, host.padding]
    if host.groups > 1 or {*host.dilation} != {1} or host.padding_mode != "zeros" or any(len({*s}) > 1 for s in sides):
        raise ValueError(
            f"{name}: huggingface/peft fails or computes something else for a convolution with groups, dilation, a "
            "padding mode or a kernel, stride or padding that is not the same on both sides"
        )


def from_peft(tensors: dict[str, dict[str, Tensor]], model: nn.Module, *keys: str) -> list[str]:
    """Names of the modules that have a tensor under one of these keys in peft's file.

    Raises:
        ValueError: there is none.
    """
    names = [name for name, held in tensors.items() if name and not held.keys().isdisjoint(keys)]
    if not names:
        raise ValueError(f"no tensor of the file belongs to a module of this {type(model).__name__}: other base?")
    return names
