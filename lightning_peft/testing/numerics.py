"""Properties of what a method computes: its start, gradients, effect, merge and precision."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import hosts, surgery
from lightning_peft.adapter import Base, WeightAdapter
from lightning_peft.attach import adapters, attached
from lightning_peft.config import trained_names
from lightning_peft.merge import merge
from lightning_peft.testing.case import Case, train_mode
from lightning_peft.testing.compare import (
    Failed,
    adapter_tensors,
    base_parameters,
    base_tensors,
    differing,
    gradients,
    require,
    require_close,
    require_finite,
    require_same,
    snapshot,
    trained_tensors,
    unless,
)

START = 1e-6  # rounding of adding an exact zero in another order
CHOOSING = ("selective", "hybrid", "lifecycle")  # the families whose methods may train base parameters of their choice


def check_start(case: Case) -> None:
    """The output before the first step is the base's where traits say identity_start; elsewhere finite and another."""
    before, after = case.outputs(case.base()), case.outputs(case.injected())
    require_finite("outputs at start", after)
    if case.can("identity_start"):
        require_close("the output at start against the base's", before, after, START)
    else:
        require(bool(differing(before, after)), "the output at start", "the base's own", "another: no identity_start")


def check_gradients(case: Case) -> None:
    """Gradients arrive only where declared: at every tensor that trains, and at no base parameter that is frozen.

    Declared are adapters' parameters, ``train``, and what a selective, hybrid or lifecycle method chose.
    """
    model = case.injected()
    train_mode(model)
    choosing = any(m.traits.family in CHOOSING for m in case.methods())
    declared = {n for n, p in base_parameters(model) if p.requires_grad and choosing} | set(case.train)
    case.objective(model).backward()
    frozen = {n: p for n, p in base_parameters(model) if n not in declared}
    leaks = [n for n, p in frozen.items() if p.requires_grad or p.grad is not None]
    require(not leaks, "base parameters with a gradient", f"{len(leaks)}, first {leaks[:1]}", "none")
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    lost = [n for n, p in trainable.items() if p.grad is None]
    require(not lost, "trainable tensors without a gradient", f"{len(lost)}, first {lost[:1]}", "none")
    require_finite("gradients", gradients(model))


def check_base_unchanged(case: Case) -> None:
    """Base weights are bitwise unchanged after 20 AdamW steps with weight decay 0.1.

    That is every frozen tensor, buffers included; of a trained one the entries whose gradient the method zeroes. A
    method that cuts heads or channels may change the shape of what it cuts.
    """
    before = snapshot(base_tensors(case.base()))
    model = case.injected()
    require_same("base tensors after injection", before, base_tensors(model))
    trained = trained_names(model)  # a norm that trains counts its statistics too
    masked = case.fit(model, 20)
    after = base_tensors(model)
    cut = {n for n in before if after[n].shape != before[n].shape} if surgery.record(model) else set()
    frozen = before.keys() - trained - cut
    require_same("frozen base tensors after 20 steps", {n: before[n] for n in frozen}, {n: after[n] for n in frozen})
    for name in masked.keys() - cut:
        moved = int((masked[name] & (after[name] != before[name])).sum())
        require(moved == 0, f"entries of {name!r} whose gradient is masked but that moved", moved, 0)


def check_training_has_effect(case: Case) -> None:
    """Training changes the output, and leaves it and every trained tensor finite."""
    start, model = case.outputs(case.injected()), case.trained(20)
    require_finite("trained tensors", trained_tensors(model))
    after = case.outputs(model)
    require_finite("outputs after training", after)
    require(bool(differing(start, after)), "outputs after 20 steps", "those before them", "others")


def check_merge(case: Case) -> None:
    """The merged model equals the unmerged one and undo restores it bitwise; what cannot merge is refused by name."""
    model = case.trained(20)
    if not case.can("merge"):
        _merge_refused(model, case)
        return
    before, base, state = case.outputs(model), snapshot(base_tensors(model)), snapshot(adapter_tensors(model))
    merged = merge(model)
    left = len(adapter_tensors(model))
    require(left == 0, "adapter tensors after merging", left, 0)
    require_close("merged against unmerged outputs", before, case.outputs(model), case.tolerance)
    merged.undo()
    require_same("base tensors after undoing the merge", base, base_tensors(model))
    require_same("adapter tensors after undoing the merge", state, adapter_tensors(model))
    require_same("outputs after undoing the merge", before, case.outputs(model))


def _merge_refused(model: nn.Module, case: Case) -> None:
    stuck = [m.name for m in case.methods() if not m.traits.merge and any(m.adapters(model))]
    try:
        merge(model)
    except ValueError as error:
        require(all(n in str(error) for n in stuck), "merge's refusal", repr(str(error)), f"one that names {stuck}")
        return
    raise Failed("merging what traits say cannot merge: measured success, allowed a ValueError")


def _weight_hosts(model: nn.Module) -> dict[str, nn.Module]:
    held = {name: host for name, host, _ in adapters(model)}
    return {n: h for n, h in held.items() if all(isinstance(a, WeightAdapter) for a in attached(h).values())}


def _no_weight_adapter(case: Case) -> str:
    return "" if _weight_hosts(case.injected()) else "its adapters are no maps on a weight"


@unless(_no_weight_adapter)
def check_weight_is_forward(case: Case) -> None:
    """``weight`` and ``forward`` of a weight adapter are the same map, gradients included."""
    model = case.trained(20).eval()
    found = _weight_hosts(model)
    inputs: dict[str, Tensor] = {}
    for name, host in found.items():

        def keep(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
            inputs.setdefault(name, [*args, *kwargs.values()][0].detach())

        host.register_forward_pre_hook(keep, with_kwargs=True)
    case.outputs(model)
    require(bool(inputs), "adapted layers that the batch reaches", 0, "at least 1")
    for name, x in dict(inputs).items():
        _compare_maps(name, found[name], x, case.tolerance)


def _compare_maps(name: str, host: Any, x: Tensor, tolerance: float) -> None:
    base = Base(host)
    for adapter in attached(host).values():
        base = Base(host, base, adapter)
    parameters = {n: p for a in attached(host).values() for n, p in a.named_parameters() if p.requires_grad}
    ys = {"forward": host(x), "weight": hosts.run(host, base.weight, x, base.bias)}
    require_close(f"forward against weight on {name!r}", {"y": ys["weight"]}, {"y": ys["forward"]}, tolerance)
    grads = {}
    for which, y in ys.items():
        pattern = torch.arange(y.numel(), dtype=y.dtype, device=y.device).cos().view_as(y)
        got = torch.autograd.grad((y * pattern).sum(), list(parameters.values()), allow_unused=True)
        grads[which] = {n: p * 0 if g is None else g for (n, p), g in zip(parameters.items(), got, strict=True)}
    scale = max((float(g.abs().max()) for g in grads["weight"].values() if g.numel()), default=0.0) or 1.0
    scaled = [{n: g / scale for n, g in grads[which].items()} for which in ("weight", "forward")]
    require_close(f"gradients of forward against those of weight on {name!r}", *scaled, tolerance=10 * tolerance)


def check_bf16(case: Case) -> None:
    """A bfloat16 model, cast before or after injection, runs forward and backward; adapters stay float32."""
    half = case.cast(torch.bfloat16)
    expected = [t.dtype for t in half.outputs(half.base()).values()]
    for order, model in {"after": case.injected().to(torch.bfloat16), "before": half.injected()}.items():
        where = f"of a model cast to bfloat16 {order} injection"
        held = {t.dtype for t in adapter_tensors(model).values() if t.is_floating_point()}
        require(held <= {torch.float32}, f"dtypes of adapter tensors {where}", held, torch.float32)
        outputs = half.outputs(model)
        given = [t.dtype for t in outputs.values()]
        require(given == expected, f"dtypes of outputs {where}", given, expected)
        half.objective(model).backward()
        require_finite(f"outputs and gradients {where}", outputs | gradients(model))
