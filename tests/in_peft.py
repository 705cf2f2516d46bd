"""A method beside huggingface/peft's, weights copied by the folder: equal outputs and gradients, both ways."""

import copy
import re
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft import hf
from tests.test_hf import in_peft, randomize, run


def gradients(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss that reaches every output, by peft's names; of ours or peft's model."""
    model.train().zero_grad()
    run(model, x).pow(2).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if isinstance(model, peft.PeftModel):  # it finds the bank of VB-LoRA under the first layer
        names = {n: n.removeprefix("base_model.model.").replace("modules_to_save.default.", "") for n in grads}
        names = {n: re.sub(r"^.*\.(vblora_vector_bank)", r"base_model.\1", short) for n, short in names.items()}
        return {short.removesuffix(".default"): grads[n] for n, short in names.items()}
    shadow: Any = copy.deepcopy(model)
    for mine, its in zip(model.parameters(), shadow.parameters(), strict=True):
        its.data = mine.data if mine.grad is None else mine.grad
    of_adapters = model.lightning_peft_record.methods[0].to_hf(shadow)[1]
    whole = {n: g for n, g in grads.items() if ".adapters." not in n}
    of_adapters = {k: t.detach() for k, t in of_adapters.items() if t.requires_grad}  # no shared random ones
    return whole | {k.removeprefix(hf.PREFIX): t for k, t in of_adapters.items()}


def same_function(ours: nn.Module, theirs: nn.Module, base: nn.Module, x: Tensor, wrong: tuple[str, ...] = ()) -> None:
    """Equal outputs, which are not the base's, and equal gradients of all that trains.

    Args:
        wrong: ends of names of tensors whose gradient peft gets wrong, so that the two must differ.
    """
    with torch.no_grad():
        mine = run(ours.eval(), x)
        assert (mine - run(base.eval(), x)).abs().max() > 1e-2
        torch.testing.assert_close(mine, run(theirs.eval(), x), atol=1e-5, rtol=1e-5)
    got, want = gradients(ours, x), gradients(theirs, x)
    assert got.keys() == want.keys()
    for name, g in got.items():
        assert g.abs().max() > 1e-4, name
        if wrong and name.endswith(wrong):
            assert (g - want[name]).abs().max() > 0.1 * g.abs().max(), name
        else:
            torch.testing.assert_close(g, want[name], atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def ours_to_peft_and_back(base: nn.Module, method: lp.Method, x: Tensor, folder: Path) -> Any:
    """peft's model of what ``method`` wrote."""
    ours = copy.deepcopy(base)
    lp.inject(ours, method)
    randomize(ours)
    hf.save(ours, folder / "ours")
    theirs = in_peft(base, folder / "ours")
    same_function(ours, theirs, base, x)
    theirs.save_pretrained(str(folder / "theirs"))
    back: Any = hf.load(copy.deepcopy(base), folder / "theirs")
    assert type(back.lightning_peft_record.methods[0]) is type(method)
    same_function(back, theirs, base, x)
    return theirs


def peft_to_ours_and_back(
    base: nn.Module, config: Any, x: Tensor, folder: Path, wrong: tuple[str, ...] = ()
) -> lp.Method:
    """The method that was read from what peft wrote."""
    theirs = peft.get_peft_model(copy.deepcopy(base), config)  # type: ignore[arg-type]
    randomize(theirs)
    theirs.save_pretrained(str(folder / "theirs"))
    ours: Any = hf.load(copy.deepcopy(base), folder / "theirs")
    same_function(ours, theirs, base, x, wrong)
    hf.save(ours, folder / "ours")
    same_function(ours, in_peft(base, folder / "ours"), base, x, wrong)
    return ours.lightning_peft_record.methods[0]


class Conv(nn.Module):
    """One convolution and what a loss needs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()
