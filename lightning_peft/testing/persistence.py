"""Properties of what is kept and restored: files, resumed fits, removal, the meta device, several processes."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_peft import hf, io, quant, registry, surgery
from lightning_peft.attach import adapters
from lightning_peft.config import describe, trained_names
from lightning_peft.find import exact
from lightning_peft.inject import find_record, inject, remove
from lightning_peft.testing import fits
from lightning_peft.testing.case import Case
from lightning_peft.testing.compare import (
    Failed,
    Skipped,
    adapter_tensors,
    base_tensors,
    require,
    require_close,
    require_finite,
    require_same,
    trained_tensors,
    unless,
)

START = 1e-6  # rounding of adding an exact zero in another order
STEPS = 6
PARITY = 1e-4  # of the largest movement of any tensor: sums over examples in another order


def check_save_load(case: Case) -> None:
    """A saved adapter loads into a fresh base bitwise, trained base parameters included."""
    model = case.trained(train=case.some_parameter())
    with tempfile.TemporaryDirectory() as folder:
        io.save(model, f"{folder}/adapter")
        torch.manual_seed(99)  # what a load draws at random must not matter
        other = io.load(case.base(), f"{folder}/adapter", methods=case.load_methods())
    require_same("trained tensors after loading", trained_tensors(model), trained_tensors(other))
    require_same("base tensors after loading", base_tensors(model), base_tensors(other))
    require_same("outputs after loading", case.outputs(model), case.outputs(other))


def _not_in_peft(case: Case) -> str:
    method, *others = case.methods()
    if others or registry.name_of(type(method)) is None:
        return "not one registered method"
    return "" if method.traits.hf else "by traits.hf peft has no counterpart"


@unless(_not_in_peft)
def check_hf(case: Case) -> None:
    """What huggingface/peft knows gives the same outputs after a way out to its format and back, or is refused."""
    model = case.trained()
    with tempfile.TemporaryDirectory() as folder:
        try:
            hf.save(model, folder)
        except ValueError as error:  # an adapter or trained weights for which peft has no field
            left = [str(p) for p in Path(folder).iterdir()]
            require(bool(str(error)) and not left, "a refused export", left, "a message, and nothing written")
            return
        other = hf.load(case.base(), folder)
    require_close("outputs after loading peft's folder", case.outputs(model), case.outputs(other), case.tolerance)


def check_wrong_base(case: Case) -> None:
    """A base with other weights is refused and left as it was."""
    model = case.trained()
    known = [n for n, digest in describe(model)["base"].items() if digest is not None]
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
    raise Failed(f"loading into a base with another {known[0]!r}: measured success, allowed a ValueError")


def check_resume(case: Case) -> None:
    """A fit that is resumed from a checkpoint ends bitwise as one that ran through, optimizer state included."""
    with tempfile.TemporaryDirectory() as folder:
        whole, trainer = fits.fit(case, Path(folder), STEPS, seed=0)
        ckpt = Path(folder, f"step={STEPS // 2}.ckpt")
        resumed, other = fits.fit(case, Path(folder), STEPS, seed=1, ckpt=ckpt)
    require(other.global_step == STEPS, "steps of the resumed fit", other.global_step, STEPS)
    require_same("tensors after resuming", trained_tensors(whole.model), trained_tensors(resumed.model))
    require_same("optimizer state after resuming", *map(fits.optimizer_tensors, (trainer, other)))
    require_same("outputs after resuming", case.outputs(whole.model), case.outputs(resumed.model))


def check_remove(case: Case) -> None:
    """Removing a trained method restores the model: values bitwise, keys, classes, attributes, what trains, output."""
    base = case.base()
    next(p for p in base.parameters() if p.is_floating_point()).requires_grad_(False)  # it must not train afterwards
    model = Case(case.methods(), base, case.batch, case.train).trained()
    if surgery.record(model):
        raise Skipped("it cut the base, which is not undone")
    trained = trained_names(model) & base_tensors(base).keys()
    remove(model)
    with torch.no_grad():
        for name in trained:  # what remove does not write: base parameters that trained, buffers of their modules
            base_tensors(model)[name].copy_(base_tensors(base)[name])
    keys = [n for n in model.state_dict() if n not in base.state_dict()]
    require(list(model.state_dict()) == list(base.state_dict()), "state-dict keys after remove", keys, "the base's")
    require_same("base tensors after remove", base_tensors(base), base_tensors(model))
    theirs, ours = _anatomy(base.train()), _anatomy(model.train())
    changed = {n: ours.get(n) for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)}
    first = next(iter(changed), "")
    require(not changed, f"parts after remove, first {first!r}", changed.get(first), theirs.get(first))
    require_same("outputs after remove", case.outputs(base), case.outputs(model))


def _anatomy(model: nn.Module) -> dict[str, Any]:
    """Classes, attributes, number of hooks and requires_grad."""
    parts: dict[str, Any] = {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)}
    for name, module in model.named_modules():
        hooks = sum(len(v) for k, v in vars(module).items() if k.endswith("_hooks"))
        parts[f"module {name}"] = (type(module), sorted(vars(module)), hooks)
    return parts


def _quantised(case: Case) -> str:
    held = any(quant.kind(m) for m in case.base().modules())
    return "a quantised base cannot be moved to the meta device" if held else ""


@unless(_quantised)
def check_meta(case: Case) -> None:
    """On the meta device the method injects, and reset_parameters gives all values later; or it says that it cannot."""
    model = case.base().to("meta")
    methods = case.methods()
    if needy := [m.name for m in methods if m.traits.needs_weights]:
        try:
            inject(model, methods, train=[exact(n) for n in case.train])
        except ValueError as error:
            require(needy[0] in str(error), "the refusal on the meta device", str(error), f"one that names {needy[0]}")
            return
        raise Failed("injecting on the meta device a method that needs weights: measured success, allowed a ValueError")
    inject(model, methods, train=[exact(n) for n in case.train])
    there = [n for n, t in adapter_tensors(model).items() if not t.is_meta]
    require(not there, "adapter tensors that are not on the meta device", there[:1], "none")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, t in base_tensors(case.base()).items():
            base_tensors(model)[name].copy_(t)
        for t in adapter_tensors(model).values():
            t.fill_(float("nan") if t.is_floating_point() else 0)
    for _, _, adapter in adapters(model):
        adapter.reset_parameters()
    require_finite("adapter tensors after to_empty and reset_parameters", adapter_tensors(model))
    if case.can("identity_start"):
        before, after = case.outputs(case.base()), case.outputs(model)
        require_close("the output after to_empty and reset_parameters", before, after, START)


def _odd(case: Case) -> str:
    odd = fits.examples(case.batch) % 2
    return "the batch has an odd number of examples, which two processes cannot share" if odd else ""


@unless(_odd)
def check_two_processes(case: Case) -> None:
    """Two processes with half of the examples each train to what one process with all of them does, and agree."""
    one = fits.fit_whole(case, steps=3)
    assert one.start is not None
    here, (first, second) = trained_tensors(one.model), fits.fit_in_two(case, steps=3)
    require_same("tensors of the two processes", first, second)
    shapes = [{n: tuple(t.shape) for n, t in side.items()} for side in (here, first)]
    require(shapes[0] == shapes[1], "shapes of trained tensors", shapes[1], shapes[0])
    floats = {n: t for n, t in here.items() if t.is_floating_point() and t.numel()}  # of another shape: from zero
    starts = {n: one.start[n] if one.start[n].shape == t.shape else torch.zeros_like(t) for n, t in floats.items()}
    moved = max(_farthest(t, starts[n]) for n, t in floats.items())
    apart = max(_farthest(here[n], first[n]) for n in here)
    require(moved > 0, "movement in 3 steps of SGD", moved, "more")
    require(apart <= PARITY * moved, "two processes against one", f"{apart:.3g}", f"{PARITY * moved:.3g}")


def _farthest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
