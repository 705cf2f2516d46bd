"""What must hold before tensors from a file are taken: same methods, same base, same structure, every key."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_peft import hosts, surgery
from lightning_peft.attach import adapters, attached, detach
from lightning_peft.config import config_of, trained_names
from lightning_peft.method import Method


def check_methods(methods: Sequence[Method], config: dict[str, Any], source: str) -> None:
    """Refuse a checkpoint of other methods or other hyper-parameters, naming each difference.

    Raises:
        ValueError: with the name of the option, its value in the file and its value now.
    """
    ours, theirs = [config_of(m) for m in methods], config["methods"]
    if [c["class"] for c in ours] != [c["class"] for c in theirs]:
        have, want = ([c["method"] or c["class"] for c in cs] for cs in (theirs, ours))
        raise ValueError(f"{source} holds adapters of {have}, but this run's methods are {want}")
    for mine, other in zip(ours, theirs, strict=True):
        keys = sorted(mine["args"].keys() | other["args"].keys())
        changed = [k for k in keys if mine["args"].get(k) != other["args"].get(k)]
        if changed:
            what = ", ".join(f"{k}={other['args'].get(k)!r} there, {mine['args'].get(k)!r} now" for k in changed)
            raise ValueError(
                f"{source} was trained with other hyper-parameters of {mine['args']['name']!r}: {what}; resume with "
                "the same, or start a fresh fit from lightning_peft.load"
            )


def check_fingerprint(mine: dict[str, str | None], other: dict[str, str | None], source: str) -> None:
    """Refuse a base other than the one trained on, naming the first tensors that differ."""
    if unknown := sorted(other.keys() - mine.keys()):
        raise ValueError(f"{source} was trained on another base: it had {unknown[0]!r} ({len(unknown)} such), not here")
    differ = [k for k, v in mine.items() if v and other.get(k) and v != other[k]]
    if differ:
        raise ValueError(
            f"{source} was trained on another base: {len(differ)} of {len(mine)} frozen tensors differ in shape or "
            f"values, first {differ[0]!r}; load the base it was trained on, or pass check_base=False"
        )


def fit_structure(model: nn.Module, config: dict[str, Any], source: str) -> None:
    """Give ``model`` the structure a file was written with: cut heads and channels, adapters that were removed."""
    if config["cut"]:
        surgery.apply(model, config["cut"])
    elif surgery.record(model):
        raise ValueError(f"{source} is of the uncut model, and heads or channels of this one are gone: make it anew")
    for name, kept in config["hosts"].items():
        have = {fqn: host for fqn, host, _ in adapters(model, name)}
        if missing := sorted(set(kept) - have.keys()):
            raise ValueError(f"{source} has {name!r} on {missing[0]!r} ({len(missing)} such), where none can be here")
        for fqn in have.keys() - set(kept):
            detach(have[fqn], name)


def check_keys(model: nn.Module, keys: Collection[str], source: str) -> None:
    """Strict on what was trained: every trained tensor must be there, and no adapter tensor may be left over."""
    want = trained_names(model)
    have = set(keys)
    if missing := sorted(want - have):
        raise ValueError(f"{source} lacks {len(missing)} of {len(want)} trained tensors, first {missing[0]!r}")
    if extra := sorted(k for k in have - set(model.state_dict()) if ".adapters." in f".{k}"):
        raise ValueError(f"{source} holds {len(extra)} adapter tensors that nothing here takes, first {extra[0]!r}")


def check_shapes(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Axes named "in" and "out" in a file must fit their host; ranks may differ."""
    for fqn, host, adapter in adapters(model):
        if hosts.kind(host) is None:
            continue
        sides: dict[str, int] = dict(zip(("out", "in"), hosts.shape(host), strict=True))
        tag = next(t for t, a in attached(host).items() if a is adapter)
        for name, axes in adapter.axes.items():
            key = f"{fqn}.adapters.{tag}.{name}" if fqn else f"adapters.{tag}.{name}"
            for axis, size in zip(axes, tensors[key].shape if key in tensors else (), strict=False):
                if sides.get(axis, size) != size:
                    raise ValueError(f"{source}: {fqn!r} has {axis}={sides[axis]}, but its adapter's {name} {size}")
