"""Fits in which optimizers and schedules begin anew, against what each part must have been told."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_peft import Step
from tests import methods
from tests.fits import SaveAt, run, same, trained
from tests.nets import Net, vectors


@dataclass(frozen=True, kw_only=True)
class InParts(methods.Grouped):
    ends: tuple[int, ...] = (2, 5)

    def restarts(self, model: nn.Module, step: Step) -> Sequence[int]:
        assert step.total == 9
        return self.ends


class Asking(Net):
    """SGD with momentum under a schedule over what the Trainer says; notes what it is told, and every rate."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []
        self.rates: list[list[float]] = []

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        self.asked.append((steps, self.trainer.max_steps))
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.rates.append([g["lr"] for g in optimizer.param_groups])


def fitted(root: Path, *more: Any, ckpt: Path | None = None, **options: Any) -> Asking:
    net = Asking()
    options = {"max_steps": 9, "accumulate_grad_batches": 2} | options
    run(root, net, InParts(), *more, data=vectors(56), ckpt_path=ckpt, **options)
    return net


def test_each_part_is_told_its_length_and_begins_without_momentum(tmp_path: Path) -> None:
    net = fitted(tmp_path)
    assert net.asked == [(2, 2), (3, 3), (4, 4)]
    falls = [1, 1 / 2, 1, 2 / 3, 1 / 3, 1, 3 / 4, 2 / 4, 1 / 4]
    torch.testing.assert_close(net.rates, [[0.1 * f, 0.4 * f] for f in falls])  # the groups of the method, each time
    assert "configure_optimizers" not in vars(net)


def test_a_part_starts_from_fresh_state(tmp_path: Path) -> None:
    seen: dict[int, int] = {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            seen[trainer.global_step] = len(trainer.optimizers[0].state)

    fitted(tmp_path, Look(), accumulate_grad_batches=1)
    assert [step for step in range(1, 10) if not seen[step]] == [2, 5]


def test_resume_inside_any_part(tmp_path: Path) -> None:
    places = (2, 4, 5, 7, 9, 10, 13)
    whole = fitted(tmp_path, SaveAt(tmp_path, places))
    told = []
    for place in places:
        resumed = fitted(tmp_path, ckpt=tmp_path / f"{place}.ckpt")
        assert resumed.losses == whole.losses[place:] and same(trained(whole), trained(resumed)), place
        assert resumed.rates == whole.rates[len(whole.rates) - len(resumed.rates) :]
        told.append([steps for steps, _ in resumed.asked])
    assert told == [[2, 3, 4], [3, 4], [3, 4], [3, 4], [4], [4], [4]]


def test_bounds_by_epochs_and_by_hand(tmp_path: Path) -> None:
    assert fitted(tmp_path, max_steps=-1, max_epochs=3, accumulate_grad_batches=3).asked[1:] == [(3, 3), (4, 4)]
    net = Net()
    run(tmp_path, net, methods.Plain(), max_steps=2)
    assert "configure_optimizers" not in vars(net)
    with pytest.raises(AssertionError):  # the method asks for a fit of nine steps
        fitted(tmp_path, max_steps=8)
    assert fitted(tmp_path, max_steps=6, peft={"total_steps": 9}).asked == [(2, 2), (3, 3), (4, 4)]
