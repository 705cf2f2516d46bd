"""What the tests of methods that train the base's own weights share, and parity with huggingface/peft."""

import copy
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from lightning_peft import Method, hf, inject
from lightning_peft.testing.compare import base_tensors, differing, snapshot


def trainable(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def count(model: nn.Module, method: Method) -> int:
    inject(model, method)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def moved_by_training(model: nn.Module, batch: dict[str, Tensor], steps: int = 20) -> list[str]:
    """Base parameters and buffers of which a bit differs after AdamW steps that were given every parameter."""
    before = snapshot(base_tensors(model))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return differing(before, base_tensors(model))


def randomize(model: nn.Module) -> None:
    torch.manual_seed(11)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, 1.0, 0.3)


def short(name: str) -> str:
    """The name of a tensor of ours or peft's without what either adds."""
    for part in (
        "base_model.model.",
        "adapters.ia3.",
        "adapters.sparse_mask.",
        ".default",
        "ln_tuning_layers.",
        "ia3_",
    ):
        name = name.replace(part, "")
    return name.replace("shira_weight", "v")


def results(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """(logits, gradients of the loss by short name)."""
    model.eval().zero_grad()
    output = model(**batch)
    output.logits.square().mean().backward()
    grads = {short(n): p.grad.flatten() for n, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), grads


def assert_same(ours: Any, theirs: Any, batch: dict[str, Tensor]) -> None:
    (y, grads), (want, wanted) = results(ours, batch), results(theirs, batch)
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
    assert grads.keys() == wanted.keys()
    for name, g in grads.items():
        torch.testing.assert_close(g, wanted[name], atol=1e-5, rtol=1e-5, msg=name)


def assert_folders_agree(base: Any, config: Any, batch: dict[str, Tensor], folder: Path) -> nn.Module:
    """peft's folder read by us and ours read by peft compute the same; returns our model."""
    start = results(base, batch)[0]
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    randomize(theirs)
    theirs.save_pretrained(str(folder / "theirs"))
    ours = hf.load(copy.deepcopy(base), folder / "theirs")
    assert (results(ours, batch)[0] - start).abs().max() > 1e-2
    assert_same(ours, theirs, batch)
    randomize(ours)
    hf.save(ours, folder / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder / "ours"), is_trainable=True)
    assert_same(ours, back, batch)
    return ours
