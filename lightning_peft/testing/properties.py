"""The properties that need no Trainer. Each function states its property in its docstring's first sentence."""

import copy
import dataclasses
import inspect
import json
import re
import sys
import tempfile
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map  # private: flattens what models take

from lightning_peft import hosts, io, registry, surgery
from lightning_peft.adapter import Base, WeightAdapter
from lightning_peft.attach import adapters, attached
from lightning_peft.inject import find_record, inject, remove
from lightning_peft.merge import merge
from lightning_peft.method import Method, Traits
from lightning_peft.testing.case import (
    Case,
    Failed,
    Skipped,
    adapter_tensors,
    base_parameters,
    base_tensors,
    differing,
    floats,
    require,
    require_close,
    require_finite,
    require_same,
    snapshot,
    train_mode,
    trained_tensors,
)

START = 1e-6  # rounding of adding an exact zero in another order
FAMILIES = ("reparameterized", "additive", "selective", "hybrid", "lifecycle")
KINDS = ("linear", "conv1d", "embedding", "conv", "module", "model")
TRAINS_BASE = ("selective", "hybrid", "lifecycle")  # the families that may choose base parameters themselves


def check_start(case: Case) -> None:
    """The output before the first step is the base's where traits say identity_start; elsewhere finite and another."""
    before, after = case.outputs(case.base()), case.outputs(case.injected())
    require_finite("outputs at start", {str(i): t for i, t in enumerate(after)})
    if case.can("identity_start"):
        require_close("the output at start against the base's", before, after, START)
    else:
        same = not differing(dict(enumerate_(before)), dict(enumerate_(after)))
        require(not same, "the output at start, without identity_start", "the base's own", "another")


def check_gradients(case: Case) -> None:
    """Gradients arrive only where declared: at every tensor that trains, and at no base parameter that is frozen.

    Declared are adapters' parameters, ``train``, and what a selective, hybrid or lifecycle method chose.
    """
    model = case.injected()
    train_mode(model)
    own = any(m.traits.family in TRAINS_BASE for m in case.methods())
    chosen = {n for n, p in base_parameters(model) if p.requires_grad} if own else set()
    case.loss(model).backward()
    leaks = [n for n, p in base_parameters(model) if n not in chosen | set(case.train) and _trains_or_has_grad(p)]
    require(not leaks, "base parameters with a gradient", f"{len(leaks)}, first {leaks[:1]}", "none")
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    lost = [n for n, p in trainable.items() if p.grad is None]
    require(not lost, "trainable tensors without a gradient", f"{len(lost)}, first {lost[:1]}", "none")
    require_finite("gradients", {n: p.grad for n, p in trainable.items() if p.grad is not None})


def _trains_or_has_grad(p: nn.Parameter) -> bool:
    return p.requires_grad or p.grad is not None


def check_base_unchanged(case: Case) -> None:
    """Base weights are bitwise unchanged after 20 AdamW steps with weight decay 0.1.

    That is every frozen tensor, buffers included; of a trained one the entries whose gradient the method zeroes. A
    method that cuts heads or channels may change the shape of what it cuts.
    """
    before = snapshot(base_tensors(case.base()))
    model = case.injected()
    require_same("base tensors against those before injection", before, base_tensors(model))
    trained = {n for n, p in base_parameters(model) if p.requires_grad}
    masked = case.fit(model, 20)
    after = base_tensors(model)
    cut = {n for n in before if after[n].shape != before[n].shape} if surgery.record(model) else set()
    frozen = before.keys() - trained - cut
    require_same("frozen base tensors after 20 steps", {n: before[n] for n in frozen}, {n: after[n] for n in frozen})
    for name, mask in masked.items():
        if name not in cut:
            moved = int((mask & (after[name] != before[name])).sum())
            require(moved == 0, f"entries of {name!r} that the method masks but that moved", moved, 0)


def check_training_has_effect(case: Case) -> None:
    """Training changes the output, and leaves every trained tensor finite."""
    start, model = case.outputs(case.injected()), case.trained(20)
    require_finite("trained tensors", trained_tensors(model))
    after = case.outputs(model)
    require_finite("outputs after training", dict(enumerate_(after)))
    require(bool(differing(dict(enumerate_(start)), dict(enumerate_(after)))), "outputs after 20 steps", "equal", "not")


def check_merge(case: Case) -> None:
    """The merged model equals the unmerged one and undo restores it bitwise; a method that cannot merge is refused."""
    model = case.trained(20)
    if not case.can("merge"):
        _merge_refused(model, case)
        return
    before, held, state = case.outputs(model), snapshot(base_tensors(model)), snapshot(adapter_tensors(model))
    merged = merge(model)
    left = len(adapter_tensors(model))
    require(left == 0, "adapter tensors after merging", left, 0)
    require_close("merged against unmerged outputs", before, case.outputs(model), case.tolerance)
    merged.undo()
    require_same("base tensors after undoing the merge", held, base_tensors(model))
    require_same("adapter tensors after undoing the merge", state, adapter_tensors(model))
    require_same("outputs after undoing the merge", dict(enumerate_(before)), dict(enumerate_(case.outputs(model))))


def _merge_refused(model: nn.Module, case: Case) -> None:
    stuck = [m.name for m in case.methods() if not m.traits.merge and any(m.adapters(model))]
    try:
        merge(model)
    except ValueError as error:
        require(all(n in str(error) for n in stuck), "merge's refusal", f"{str(error)!r}", f"to name {stuck}")
        return
    raise Failed("merge of a method whose traits say that it cannot: measured a merge, allowed a ValueError")


def check_weight_is_forward(case: Case) -> None:
    """``weight`` and ``forward`` of weight adapters are the same map, gradients included."""
    model = case.trained(20).eval()
    inputs: dict[str, Any] = {}
    for name, host in _weight_hosts(model).items():
        host.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: inputs.setdefault(name, [*args, *kwargs.values()][0]), with_kwargs=True
        )
    if not _weight_hosts(model):
        raise Skipped("its adapters are no maps on a weight")
    with torch.no_grad():
        case.call(model)
    require(bool(inputs), "hosts that the batch reaches", 0, "at least 1")
    for name, host in _weight_hosts(model).items():
        if name in inputs:
            _compare_maps(name, host, inputs[name].detach(), case.tolerance)


def _weight_hosts(model: nn.Module) -> dict[str, Any]:
    found = {name: host for name, host, _ in adapters(model)}
    return {n: h for n, h in found.items() if all(isinstance(a, WeightAdapter) for a in attached(h).values())}


def _compare_maps(name: str, host: Any, x: torch.Tensor, tolerance: float) -> None:
    base = Base(host)
    for adapter in attached(host).values():
        base = Base(host, base, adapter)
    parameters = [p for a in attached(host).values() for p in a.parameters() if p.requires_grad]
    fast, defined = host(x), hosts.run(host, base.weight, x)
    require_close(f"forward against weight on {name!r}", [defined], [fast], tolerance)
    pattern = torch.arange(fast.numel(), dtype=fast.dtype, device=fast.device).cos().view_as(fast)
    grads = []
    for y in (defined, fast):
        got = torch.autograd.grad((y * pattern).sum(), parameters, allow_unused=True) if parameters else ()
        grads.append([torch.zeros_like(p) if g is None else g for g, p in zip(got, parameters, strict=True)])
    scale = max([float(g.abs().max()) for g in grads[0] if g.numel()], default=0.0) or 1.0
    pair = [[g / scale for g in side] for side in grads]
    require_close(f"gradients of forward against those of weight on {name!r}", *pair, tolerance=10 * tolerance)


def check_save_load(case: Case) -> None:
    """A saved adapter loads into a fresh base bitwise, trained base parameters included."""
    model = case.trained(train=case.some_parameter())
    with tempfile.TemporaryDirectory() as folder:
        io.save(model, f"{folder}/adapter")
        torch.manual_seed(99)  # what a load draws at random must not matter
        other = io.load(case.base(), f"{folder}/adapter", methods=case.load_methods())
    require_same("trained tensors after loading", trained_tensors(model), trained_tensors(other))
    require_same("base tensors after loading", base_tensors(model), base_tensors(other))
    outputs = [dict(enumerate_(case.outputs(m))) for m in (model, other)]
    require_same("outputs after loading", *outputs)


def check_wrong_base(case: Case) -> None:
    """A base with other weights is refused and left as it was."""
    model = case.trained()
    held = find_record(model)
    assert held is not None
    known = [n for n, digest in held[1].base.items() if digest is not None]
    if not known:
        raise Skipped("no base parameter is frozen, or all are quantised: there is nothing to know the base by")
    wrong = case.base()
    with torch.no_grad():
        wrong.get_parameter(known[0]).add_(1.0)
    with tempfile.TemporaryDirectory() as folder:
        io.save(model, f"{folder}/adapter")
        try:
            io.load(wrong, f"{folder}/adapter", methods=case.load_methods())
        except ValueError:
            left = len(adapter_tensors(wrong))
            require(left == 0 and find_record(wrong) is None, "adapter tensors left by a refused load", left, 0)
            return
    raise Failed(f"loading into a base whose {known[0]!r} differs: measured success, allowed a ValueError")


def check_remove(case: Case) -> None:
    """Removing a trained method restores the model: values bitwise, keys, classes, attributes, what trains, output."""
    model, base = case.base(), case.base()
    for m in (model, base):
        next(p for p in m.parameters() if p.is_floating_point()).requires_grad_(False)  # one that was frozen before
    inject(model, case.methods(), train=case.train)
    case.fit(model, 3)
    if surgery.record(model):
        raise Skipped("it cut the base, which is not undone")
    trained = [n for n, p in base_parameters(model) if p.requires_grad]
    remove(model)
    with torch.no_grad():
        for name in trained:  # the one thing that remove does not write: base parameters that trained
            model.get_parameter(name).copy_(base.get_parameter(name))
    require(list(model.state_dict()) == list(base.state_dict()), "state-dict keys after remove", "others", "the base's")
    require_same("base tensors after remove", base_tensors(base), base_tensors(model))
    ours, theirs = _anatomy(model.train()), _anatomy(base.train())
    changed = [n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)]
    what = {n: (theirs.get(n), ours.get(n)) for n in changed[:1]}
    require(not changed, "classes, attributes, hooks and requires_grad after remove", what or "equal", "the base's")
    outputs = [dict(enumerate_(case.outputs(m))) for m in (base, model)]
    require_same("outputs after remove", *outputs)


def _anatomy(model: nn.Module) -> dict[str, Any]:
    parts: dict[str, Any] = {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)}
    for name, module in model.named_modules():
        hooks = sum(len(v) for k, v in vars(module).items() if k.endswith("_hooks"))
        parts[f"module {name}"] = (type(module), sorted(vars(module)), hooks, module.training)
    return parts


def check_bf16(case: Case) -> None:
    """A bfloat16 model, cast before or after injection, runs forward and backward; adapters stay float32."""
    batch = _half(case.batch)
    expected = [t.dtype for t in case.outputs(case.base().to(torch.bfloat16), batch)]
    for order in ("after", "before"):
        model = case.injected() if order == "after" else case.base().to(torch.bfloat16)
        if order == "after":
            model.to(torch.bfloat16)
        elif case.can("calibrates"):
            inject(model, case.methods(), train=case.train)
        where = f"of a model cast to bfloat16 {order} injection"
        dtypes = {str(t.dtype) for t in adapter_tensors(model).values() if t.is_floating_point()}
        require(dtypes <= {"torch.float32"}, f"dtypes of adapters {where}", dtypes, "float32")
        outputs = case.outputs(model, batch)
        require([t.dtype for t in outputs] == expected, f"dtypes of outputs {where}", {t.dtype for t in outputs}, expected)
        case.loss(model, batch).backward()
        tensors = {str(i): t for i, t in enumerate(outputs)}
        require_finite(f"outputs and gradients {where}", tensors | _gradients(model))


def _half(batch: Any) -> Any:
    def cast(x: Any) -> Any:
        return x.to(torch.bfloat16) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return tree_map(cast, batch)


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
