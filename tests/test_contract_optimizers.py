"""param_groups and wrap_optimizer: inside the user's optimizers and schedules, against loops by hand."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_peft import Method
from tests import methods
from tests.fits import factors, hand_loop, injected, run, same, sgd, smooth, trained
from tests.nets import Net, vectors


def test_param_groups_train_with_options_of_their_own(tmp_path: Path) -> None:
    net = Net(smooth, optimizer=lambda n: torch.optim.AdamW(n.parameters(), 1e-2, weight_decay=0.5))
    fit = run(tmp_path, net, methods.Grouped())
    hand = injected()
    groups = [{"params": factors(hand, "A")}, {"params": factors(hand, "B"), "lr": 4e-2, "weight_decay": 0.0}]
    hand_loop(hand, torch.optim.AdamW(groups, 1e-2, weight_decay=0.5), 5)
    assert [g["weight_decay"] for g in fit.optimizers[0].param_groups] == [0.5, 0.0]
    assert same(trained(net), trained(hand))


def test_a_group_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    for options, message in [
        ((("momentun", 0.5),), "AdamW has no option 'momentun'"),
        ((("lr", 0.1), ("lr_scale", 2.0)), "takes one of 'lr', 'lr_scale' and 'constant_lr', got {'lr': 0.1"),
        ((("lr", 0.1), ("constant_lr", 2.0)), "takes one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(tmp_path, Net(smooth), methods.Grouped(options=options))


SCHED = torch.optim.lr_scheduler
SCHEDULES: dict[str, Any] = {
    "onecycle": lambda o: SCHED.OneCycleLR(o, 1e-2, total_steps=6),
    "warmup": lambda o: SCHED.LambdaLR(o, lambda step: min(step / 3, 1.0)),
    "linear": lambda o: SCHED.LinearLR(o, 0.1, total_iters=3),
    "cosine": lambda o: SCHED.CosineAnnealingLR(o, 6),
    "restarts": lambda o: SCHED.CosineAnnealingWarmRestarts(o, 3),
    "exponential": lambda o: SCHED.ExponentialLR(o, 0.7),
    "cyclic": lambda o: SCHED.CyclicLR(o, 1e-3, 1e-2, 2, 2),
    "sequential": lambda o: SCHED.SequentialLR(o, [SCHED.LinearLR(o, 0.1, total_iters=2), SCHED.StepLR(o, 1)], [2]),
    "chained": lambda o: SCHED.ChainedScheduler([SCHED.LinearLR(o, 0.1, total_iters=2), SCHED.ExponentialLR(o, 0.7)]),
    "plateau": lambda o: SCHED.ReduceLROnPlateau(o, factor=0.5, patience=0, min_lr=1e-3),
}


class Rates(L.Callback):
    """Learning rates of every group at each step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        self.seen.append([float(g["lr"]) for g in optimizer.param_groups])


def scheduled(kind: str, groups: Any, lr: float = 1e-2) -> Any:
    optimizer = torch.optim.SGD(groups, lr, momentum=0.9)
    scheduler = SCHEDULES[kind](optimizer)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "monitor": "one"}}


class Monitored(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("one", 1.0)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_move_a_group_as_they_move_the_one_it_came_from(kind: str, tmp_path: Path) -> None:
    def rates(method: Method, lr: float = 1e-2, ckpt: Path | None = None) -> list[list[float]]:
        seen = Rates()
        every = ModelCheckpoint(tmp_path / method.name, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        net = Monitored(smooth, optimizer=lambda n: scheduled(kind, n.parameters(), lr))
        run(tmp_path, net, method, seen, every, max_steps=6, ckpt_path=ckpt)
        return seen.seen

    plain = rates(methods.Plain(name="plain"))
    scaled = rates(methods.Grouped(name="scaled", options=(("lr_scale", 4.0),)))
    fixed = rates(methods.Grouped(name="fixed", options=(("lr", 4e-2),)))
    assert len({rate for (rate,) in plain}) > 2
    for (alone,), (old, new), also in zip(plain, scaled, fixed, strict=True):
        assert old == pytest.approx(alone) and new == pytest.approx(4 * alone)
        assert also == pytest.approx([old, new]) or kind == "cyclic"  # there a group starts from the schedule's lowest
    if kind == "plateau":
        return  # Lightning saves before it steps this one, so its own resume misses a step
    ckpt = tmp_path / "scaled" / "step=2.ckpt"
    assert rates(methods.Grouped(name="scaled", options=(("lr_scale", 4.0),)), ckpt=ckpt) == scaled[2:]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_constant_lr_holds_under_every_schedule_and_after_a_resume(kind: str, tmp_path: Path) -> None:
    def rates(ckpt: Path | None = None) -> list[list[float]]:
        seen: list[list[float]] = []

        def make(net: Net) -> Any:
            made = scheduled(kind, net.parameters())
            step = made["optimizer"].register_step_post_hook
            step(lambda o, *_: seen.append([float(g["lr"]) for g in o.param_groups]))
            return made

        every = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=2, save_top_k=-1)
        method = methods.Grouped(options=(("constant_lr", 0.3),))
        run(tmp_path, Monitored(smooth, optimizer=make), method, every, max_steps=6, ckpt_path=ckpt)
        return seen

    whole = rates()
    assert [new for _, new in whole] == [0.3] * 6 and len({old for old, _ in whole}) > 2
    assert [new for _, new in rates(tmp_path / "ckpt" / "step=2.ckpt")] == [0.3] * 4


GROUPING = {"groups": methods.Grouped, "wrapped": methods.Wrapped}


@pytest.mark.parametrize("kind", GROUPING)
def test_groups_and_wrapped_optimizers_resume_bitwise(kind: str, tmp_path: Path) -> None:
    def fit(root: Path, ckpt: Path | None = None) -> tuple[Net, L.Trainer]:
        every = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        net = Net(optimizer=lambda n: scheduled("onecycle", n.parameters()))
        return net, run(root, net, GROUPING[kind](), every, max_steps=6, data=vectors(), ckpt_path=ckpt)

    whole, last = fit(tmp_path / "whole")
    for step in (1, 4):
        resumed, again = fit(tmp_path / f"resumed{step}", tmp_path / "whole" / f"step={step}.ckpt")
        assert same(trained(whole), trained(resumed))
        states = zip(last.optimizers[0].state.values(), again.optimizers[0].state.values(), strict=True)
        for mine, other in states:
            assert mine.keys() == other.keys() and len(mine) >= 1
            assert all(torch.equal(mine[k], other[k]) for k in mine)


def test_a_wrapped_optimizer_is_the_one_that_steps(tmp_path: Path) -> None:
    net = Net(smooth, optimizer=sgd)
    fit = run(tmp_path, net, methods.Wrapped())
    assert isinstance(fit.optimizers[0], methods.Averaging)
    hand, last = injected(), {}
    optimizer = torch.optim.SGD(hand.parameters(), 0.1)
    before = dict(enumerate(trained(hand)))

    @torch.no_grad()
    def average(step: int) -> None:
        for i, p in enumerate(p for p in hand.parameters() if p.requires_grad):
            p.copy_((p + last.get(i, before[i])) / 2)
            last[i] = p.clone()

    hand_loop(hand, optimizer, 5, average)
    torch.testing.assert_close(trained(net), trained(hand), rtol=0, atol=1e-7)
