"""What the methods with a rank share: the checks of their options, and which of them holds on which layer."""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from rich.progress import track
from torch import Tensor, nn

from lightning_peft import find, hf, hosts, matches

T = TypeVar("T")
MANY, LONG = 20, 1 << 23  # layers, or weights whose decomposition takes a second or so on a laptop


def check(method: Any) -> None:
    """Refuse ranks and alphas out of range; ``method`` has r, alpha (None: the rank) and their patterns."""
    name = type(method).__name__
    for where, r in {"r": method.r, **method.rank_pattern}.items():
        if r < 1:
            raise ValueError(f"{name} needs a rank of at least 1, got {where}={r}")
    for where, alpha in {"alpha": method.alpha, **method.alpha_pattern}.items():
        if alpha is not None and alpha <= 0:
            raise ValueError(f"{name}'s alpha must be positive, got {where}={alpha}")


def check_dropout(method: Any) -> None:
    """Refuse a dropout out of range."""
    if not 0 <= method.dropout < 1:
        raise ValueError(f"{type(method).__name__}'s dropout must lie in [0, 1), got {method.dropout}")


def check_draw(method: Any) -> None:
    """Refuse a dropout out of range, and a distribution of A that is not known."""
    check_dropout(method)
    if method.init not in ("default", "gaussian"):
        raise ValueError(f"{type(method).__name__}'s init must be 'default' or 'gaussian', got {method.init!r}")


def norm(r: int, rslora: bool) -> float:
    """What alpha is divided by at rank ``r``."""
    return math.sqrt(r) if rslora else r


def places(method: Any, model: nn.Module, *, clamp: bool = True) -> Iterator[tuple[str, Any, int, float]]:
    """(name, host, rank, alpha) of every layer that ``method`` targets.

    A rank from the pattern is taken as it is; the general one is clamped to the layer's smaller side, aloud, unless
    ``clamp`` says that this side bounds no rank of the method.

    Raises:
        ValueError: a pattern that no target matches, or a layer that no low-rank update fits.
    """
    targets = find(model, method.targets, method.traits.hosts, exclude=method.exclude, layers=method.layers)
    for pattern in (*method.rank_pattern, *method.alpha_pattern):
        if not any(matches(name, pattern) for name, _ in targets):
            raise ValueError(f"rank or alpha pattern {pattern!r} matches none of the {len(targets)} target layers")
    for name, host in targets:
        given = _first(method.rank_pattern, name)
        r = given or method.r
        if clamp and not given and r > min(hosts.shape(host)) and hosts.kind(host) != "conv":
            warnings.warn(f"{name}: r={r} clamped to its smaller side {min(hosts.shape(host))}", stacklevel=2)
            r = min(hosts.shape(host))
        if hosts.kind(host) == "embedding" and host.max_norm is not None:
            raise ValueError(
                f"{name}: an embedding with max_norm rescales its rows on look-up; {type(method).__name__} cannot "
                "adapt it"
            )
        yield name, host, r, _first(method.alpha_pattern, name) or method.alpha or r


def bar(places: Sequence[T], what: str, sizes: Iterable[tuple[int, int]]) -> Iterable[T]:
    """``places`` under a progress bar, where the work on them takes long, and in one of several processes."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = not (torch.distributed.get_rank() if together else int(os.environ.get("LOCAL_RANK", 0)))
    long = len(places) >= MANY or sum(out * fan_in for out, fan_in in sizes) >= LONG
    return track(places, what, disable=not (long and first))


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _first(patterns: Mapping[str, Any], name: str) -> Any:
    return next((v for p, v in patterns.items() if matches(name, p)), None)


def to_lora(
    method: Any,
    model: nn.Module,
    r: int,
    alpha: float,
    *,
    rslora: bool = False,
    dropout: float = 0.0,
    init: str = "default",
    plain: Callable[[Any, Any], Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(fields, tensors) of peft's LoRA for adapters that have ``factors``, ``scale`` and ``to_hf``.

    Args:
        method: whose adapters they are.
        model: that holds them.
        r, alpha: what peft takes where an adapter has no other.
        rslora, dropout: peft's use_rslora and lora_dropout.
        init: of A, "default" or "gaussian".
        plain: of (host, adapter), what has these three, where the adapter alone does not.
    """
    held: dict[str, tuple[Any, Any]] = {
        name: (host, plain(host, a) if plain else a) for name, host, a in method.adapters(model)
    }
    for name in held:
        if name.rpartition(".")[2] in ("out_proj", "conv1d") and hasattr(_parent(model, name), "A_log"):
            raise ValueError(
                f"{name}: huggingface/peft refuses LoRA there, since fused kernels would bypass its layers; merge "
                "instead, or exclude it"
            )
    rank = {name: len(a.factors()[0]) for name, (_, a) in held.items()}
    alphas = {name: (rank[name], a.scale * norm(rank[name], rslora)) for name, (_, a) in held.items()}
    fields = hf.write_ranks(model, alphas, r, alpha) | {
        "use_rslora": rslora,
        "lora_dropout": dropout,
        "init_lora_weights": True if init == "default" else init,
        "fan_in_fan_out": any(hosts.is_conv1d(host) for host, _ in held.values()),
        "bias": "none",
    }
    return fields, {f"{hf.PREFIX}{n}.{k}": t for n, (host, a) in held.items() for k, t in a.to_hf(n, host).items()}


HF_FIELDS = ("r", "lora_alpha", "use_rslora", "lora_dropout", "rank_pattern", "alpha_pattern", "init_lora_weights",
             "fan_in_fan_out", "eva_config")  # fmt: skip


def from_lora(
    config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module, name: str, *also: str
) -> dict[str, Any]:
    """Options of a method of ours for one of peft's LoRA type; ``also`` are fields that the method has beyond LoRA's.

    Raises:
        ValueError: an option that method ``name`` does not have, or a start that rewrites the base.
    """
    hf.check_fields(config, (*HF_FIELDS, *also), name)
    first = {module: t.get("lora_A.weight", t.get("lora_embedding_A")) for module, t in tensors.items()}
    return {
        "init": "gaussian" if hf.check_start(config) else "default",
        "rslora": config.get("use_rslora", False),
        "dropout": config.get("lora_dropout", 0.0),
        **hf.read_ranks(model, config, {module: len(A) for module, A in first.items() if A is not None}),
    }
