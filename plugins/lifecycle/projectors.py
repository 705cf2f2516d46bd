"""Low-rank projections of a gradient, from its singular vectors; kept in an optimizer's state as plain tensors."""

from typing import Any

import torch
from torch import Tensor

OURS = "galore_"  # beginning of the names of what the optimizer is not shown of its state
SIDES = ("std", "reverse_std", "left", "right", "full")
REFRESHES = ("keep", "reset", "rotate")
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")  # linear in the gradients, so they can be turned into another basis
State = dict[str, Any]


def check(method: Any) -> None:
    """Refuse options out of range that the methods share."""
    for key, known in {"proj_type": SIDES, "svd": ("full", "randomized"), "on_refresh": REFRESHES}.items():
        if (given := getattr(method, key)) not in known:
            raise ValueError(f"{key} must be one of {', '.join(known)}, got {given!r}")
    if method.r < 1 or method.update_proj_gap < 1 or method.scale <= 0:
        raise ValueError(
            f"{method.name}: r and update_proj_gap are at least 1 and scale is positive, got {method.r}, "
            f"{method.update_proj_gap} and {method.scale}"
        )


def wide(t: Tensor) -> Tensor:
    """In float32, or better where it is."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def project(G: Tensor, state: State) -> Tensor:
    """R = P^T G Q^T of an (out, in) matrix, with those of P (out, r) and Q (r, in) that the state holds."""
    P, Q = state.get(f"{OURS}P"), state.get(f"{OURS}Q")
    G = G if P is None else P.T @ G
    return G if Q is None else G @ Q.T


def back(R: Tensor, state: State) -> Tensor:
    """P R Q, (out, in)."""
    P, Q = state.get(f"{OURS}P"), state.get(f"{OURS}Q")
    R = R if P is None else P @ R
    return R if Q is None else R @ Q


def refreshed(method: Any, index: int, G: Tensor, state: State) -> bool:
    """Set a new projector from the (out, in) gradient where it is time; True where one took another's place."""
    old = {k: state[k] for k in (f"{OURS}P", f"{OURS}Q") if k in state}
    if old and index % method.update_proj_gap:
        return False
    tall = len(G) >= G.shape[1]
    std = {"std": "right" if tall else "left", "reverse_std": "left" if tall else "right"}
    side = std.get(method.proj_type, method.proj_type)
    r = min(method.r, *G.shape)
    U, Vh = _singular(G, r, None if method.svd == "full" else index)
    if side in ("left", "full"):
        state[f"{OURS}P"] = U
    if side in ("right", "full"):
        state[f"{OURS}Q"] = Vh
    R = project(G, state)
    state[f"{OURS}kept"] = torch.linalg.vector_norm(R) / torch.linalg.vector_norm(G).clamp(min=1e-30)
    if old and method.on_refresh != "keep":
        _turn(state, old, R.shape, rotate=method.on_refresh == "rotate")
    return bool(old)


def _singular(G: Tensor, r: int, seed: int | None) -> tuple[Tensor, Tensor]:
    """The first r singular vectors, (out, r) and (r, in); with a seed by subspace iteration on r + 8 random vectors."""
    if seed is None:
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        return U[:, :r].contiguous(), Vh[:r].contiguous()
    drawn = torch.randn(G.shape[1], min(r + 8, *G.shape), generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(G @ drawn.to(G)).Q
    for _ in range(2):
        basis = torch.linalg.qr(G @ torch.linalg.qr(G.T @ basis).Q).Q
    U, _, Vh = torch.linalg.svd(basis.T @ G, full_matrices=False)
    return basis @ U[:, :r], Vh[:r].contiguous()


def _turn(state: State, old: State, shape: torch.Size, rotate: bool) -> None:
    """Moments in the new basis: first ones turned, or zero like all others."""
    for key, moment in state.items():
        if isinstance(moment, Tensor) and not key.startswith(OURS) and moment.shape == shape:
            turned = rotate and key in FIRST_MOMENTS
            state[key] = project(back(moment, old), state) if turned else torch.zeros_like(moment)
