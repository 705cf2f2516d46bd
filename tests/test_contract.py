"""Every verb of the contract as the callback runs it, by small methods and against hand-written loops."""

import functools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset
from torchmetrics import SumMetric

import lightning_peft as lp
from lightning_peft import PEFT, Method, callback
from tests import methods
from tests.launch import launch
from tests.methods import EVENTS
from tests.nets import Net, cnn, trainer, vectors


def smooth() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))


def sgd(net: Net) -> Any:
    return torch.optim.SGD(net.parameters(), 0.1)


def trained(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters() if p.requires_grad]


def run(root: Any, net: Net, method: Method | list[Method], *more: L.Callback, **options: Any) -> L.Trainer:
    """A fit of five steps from a fixed seed, without an adapter folder."""
    L.seed_everything(5, verbose=False)
    peft = PEFT(method, folder=None, **options.pop("peft", {}))
    data, ckpt = options.pop("data", None), options.pop("ckpt_path", None)
    fit = trainer(root, peft, *more, **{"max_steps": 5, "max_epochs": -1} | options)
    fit.fit(net, vectors(shuffle=False) if data is None else data, ckpt_path=ckpt)
    return fit


# ---- order ----------------------------------------------------------------------------------------------------------


class Noting(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        EVENTS.append("step")
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        EVENTS.append("moments")
        super().load_state_dict(state_dict)


class Verbose(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        EVENTS.append("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        EVENTS.append("validation_step")

    def configure_optimizers(self) -> Any:
        EVENTS.append("configure_optimizers")
        return Noting(self.parameters(), 1e-2)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        EVENTS.append("clip")
        super().configure_gradient_clipping(optimizer, *args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        EVENTS.append("weights")
        return super().load_state_dict(*args, **kwargs)


def noting(name: str, old: Any) -> Any:
    def noted(*args: Any, **kwargs: Any) -> Any:
        EVENTS.append(name)
        return old(*args, **kwargs)

    return noted


def window(index: int, total: int) -> list[str]:
    forward = ["training_step", "penalty"] * 2
    return [*forward, f"before_step {index}/{total}", "clip", "step", f"after_step {index + 1}/{total}"]


def test_verbs_run_in_the_order_of_the_loop_in_method_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EVENTS.clear()
    monkeypatch.setattr(callback, "prove", noting("merge", callback.prove))
    monkeypatch.setattr(callback.io, "save", noting("save", callback.io.save))
    ckpt = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    options: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    peft = PEFT(methods.Recorder(), merge_at_end=True, calibration_batches=3)
    trainer(tmp_path, peft, ckpt, **options).fit(Verbose(), vectors(32), vectors(8))
    built = ["configure_optimizers", "param_groups", "wrap_optimizer"]
    epoch = [[*window(0, 4), *window(1, 4), "validation_step"], [*window(2, 4), *window(3, 4), "validation_step"]]
    end = ["finish", "save", "merge"]
    assert EVENTS == ["inject None", "calibrate", "inject 3", *built, *epoch[0], *epoch[1], *end]
    EVENTS.clear()
    peft = PEFT(methods.Recorder(), merge_at_end=True, folder="resumed")
    trainer(tmp_path, peft, **options).fit(Verbose(), vectors(32), vectors(8), ckpt_path=tmp_path / "step=2.ckpt")
    assert [e for e in EVENTS if e != "validation_step"] == [
        *("inject None", "weights", *built, "moments"),
        *(e for e in epoch[1] if e != "validation_step"),
        *end,
    ]


def test_before_step_sees_the_summed_unclipped_gradient_and_after_step_the_new_weights(tmp_path: Path) -> None:
    EVENTS.clear()
    net = Net(smooth, optimizer=sgd)
    run(tmp_path, net, methods.Watcher(), accumulate_grad_batches=2, gradient_clip_val=0.01, max_steps=1)
    mine = Net(smooth)
    L.seed_everything(5, verbose=False)
    lp.inject(mine, methods.Plain())
    start, batches = trained(mine), list(vectors(shuffle=False))[:2]
    torch.stack([mine.loss(b) for b in batches]).mean().backward()
    grads = [p.grad for p in mine.parameters() if p.requires_grad and p.grad is not None]
    norm = torch.stack([g.norm() for g in grads]).norm()
    assert norm > 0.1 and len(EVENTS) == 2
    torch.testing.assert_close(EVENTS[0], grads)
    wanted = [w - 0.1 * g * 0.01 / (norm + 1e-6) for w, g in zip(start, grads, strict=True)]
    torch.testing.assert_close(EVENTS[1], wanted, rtol=0, atol=1e-7)


def test_what_before_step_writes_is_what_the_optimizer_uses(tmp_path: Path) -> None:
    moved = []
    for method in (methods.Plain(), methods.Halving()):
        net = Net(smooth, optimizer=sgd)
        L.seed_everything(5, verbose=False)
        lp.inject(net, method)
        start = trained(net)
        run(tmp_path, net, method, max_steps=1)
        moved.append([b - a for a, b in zip(start, trained(net), strict=True)])
    torch.testing.assert_close([m / 2 for m in moved[0]], moved[1], rtol=1e-4, atol=1e-7)


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        while True:
            yield from vectors().dataset


def test_the_total_of_steps_is_demanded_where_nothing_bounds_them(tmp_path: Path) -> None:
    bounded: dict[str, Any] = {"data": vectors(32)}
    for options, peft, last in [
        ({"max_epochs": 2, "max_steps": -1} | bounded, {}, "after_step 8/8"),
        ({"max_epochs": 2, "max_steps": -1, "accumulate_grad_batches": 3} | bounded, {}, "after_step 4/4"),
        ({"max_epochs": 2, "max_steps": 5} | bounded, {}, "after_step 5/5"),
        ({"max_steps": 3, "data": DataLoader(Endless(), 8)}, {}, "after_step 3/3"),
        ({"max_epochs": 2, "max_steps": -1} | bounded, {"total_steps": 100}, "after_step 8/100"),
    ]:
        EVENTS.clear()
        run(tmp_path, Net(), methods.Recorder(), **options, peft=peft)
        assert [e for e in EVENTS if e.startswith("after_step")][-1] == last
    infinite = DataLoader(Endless(), 8)
    for options in (
        {"max_time": {"seconds": 5}, "max_steps": -1, "max_epochs": None},
        {"max_steps": -1, "max_epochs": 1, "data": infinite},
    ):
        with pytest.raises(ValueError, match=r"number of optimizer steps.*PEFT\(..., total_steps=N\)"):
            run(tmp_path, Net(), methods.Recorder(), **options)
        run(tmp_path, Net(), methods.Plain(), **options | {"limit_train_batches": 2, "max_epochs": 1})  # needs no total


def test_the_total_counts_accumulation_that_changes_by_epoch(tmp_path: Path) -> None:
    for epochs, total in ((2, 9), (4, 13)):  # 6 batches: 6 steps, 3, then 2 an epoch
        EVENTS.clear()
        growing = GradientAccumulationScheduler({1: 2, 2: 4})
        run(tmp_path, Net(), methods.Recorder(), growing, max_epochs=epochs, max_steps=-1)
        assert [e for e in EVENTS if e.startswith("after_step")][-1] == f"after_step {total}/{total}"


# ---- penalty --------------------------------------------------------------------------------------------------------


class Handwritten(Net):
    """The penalty of methods.Penalised(), written by a user into the loss."""

    weight = 0.05
    shape = "tensor"

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.shape == "none" and batch_idx == 1:
            return None
        if self.weight:
            loss = loss + self.weight * torch.stack([p.square().sum() for p in self.parameters() if p.requires_grad]).sum()
        return {"loss": loss, "more": 1} if self.shape == "dict" else loss


class Unpenalised(Handwritten):
    weight = 0.0


PENALTY = [
    {"accumulate_grad_batches": 4},
    {"gradient_clip_val": 0.1},
    {"precision": "bf16-mixed", "accumulate_grad_batches": 2},
    {"shape": "dict"},
    {"shape": "none", "accumulate_grad_batches": 2},
]


@pytest.mark.parametrize("options", PENALTY, ids=lambda o: "-".join(o))
def test_the_penalty_equals_the_loss_a_user_would_write(options: dict[str, Any], tmp_path: Path) -> None:
    options = dict(options)
    shape, ends = options.pop("shape", "tensor"), []
    for cls, method in ((Handwritten, methods.Plain()), (Unpenalised, methods.Penalised()), (Unpenalised, methods.Plain())):
        net = cls()
        net.shape = shape
        run(tmp_path, net, method, **options)
        ends.append(trained(net))
    for hand, ours, without in zip(*ends, strict=True):
        assert torch.equal(hand, ours)
        assert not torch.allclose(hand, without, atol=1e-4)


def test_the_penalty_is_logged_by_the_name_of_its_method(tmp_path: Path) -> None:
    net = Net(smooth, lr=0.0)
    fit = run(tmp_path, net, methods.Penalised(name="shrink", weight=0.3))
    wanted = 0.3 * sum(float(p.square().sum()) for p in trained(net))
    assert float(fit.callback_metrics["shrink/penalty"]) == pytest.approx(wanted, rel=1e-5)


def test_penalties_of_several_methods_are_summed_and_may_be_absent(tmp_path: Path) -> None:
    two: list[Method] = [
        methods.Penalised(name="a", weight=0.02),
        methods.Penalised(name="b", weight=0.03),
        methods.Penalised(name="c", weight=0.0),
    ]
    net, hand = Net(smooth), Net(smooth)
    fit = run(tmp_path, net, two)
    assert list(net.net[0].adapters) == ["a", "b", "c"]
    assert {k for k in fit.callback_metrics if "penalty" in k} == {"a/penalty", "b/penalty"}

    def loss(batch: Any, old: Any = hand.loss) -> Tensor:
        a, b = (methods.squares(methods.Plain(name=n), hand, w) for n, w in (("a", 0.02), ("b", 0.03)))
        return old(batch) + a + b

    hand.loss = loss
    run(tmp_path, hand, [methods.Plain(name=n) for n in "abc"])
    torch.testing.assert_close(trained(net), trained(hand), rtol=0, atol=1e-7)


class Manual(Net):
    def __init__(self, own: bool) -> None:
        super().__init__(smooth)
        self.automatic_optimization, self.own = False, own

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        loss = self.loss(batch)
        if self.own:
            term = lp.penalty(self)
            assert term is not None
            loss = loss + term
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def test_manual_optimization_is_refused_with_what_to_call_and_that_call_works(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loss \+ lightning_peft.penalty\(self\).*own_penalty=True"):
        run(tmp_path, Manual(own=False), methods.Penalised())
    hand, ours = Handwritten(smooth), Manual(own=True)
    run(tmp_path, hand, methods.Plain())
    run(tmp_path, ours, methods.Penalised(), peft={"own_penalty": True})
    assert all(torch.equal(a, b) for a, b in zip(trained(hand), trained(ours), strict=True))
    automatic = Net(smooth)  # one that adds it itself under automatic optimization must not get it twice
    automatic.loss = lambda batch, old=automatic.loss: old(batch) + lp.penalty(automatic)
    run(tmp_path, automatic, methods.Penalised(), peft={"own_penalty": True})
    assert all(torch.equal(a, b) for a, b in zip(trained(hand), trained(automatic), strict=True))


class Interrupted(Net):
    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.global_step == 2 and not self.again:
            raise RuntimeError("stop here")

    again = False


def test_a_fit_after_a_broken_one_adds_the_penalty_once(tmp_path: Path) -> None:
    ends = []
    for broken in (True, False):
        net = Interrupted(smooth)
        L.seed_everything(5, verbose=False)
        lp.inject(net, methods.Penalised())
        start = {k: v.clone() for k, v in net.state_dict().items()}
        if broken:
            with pytest.raises(RuntimeError, match="stop here"):
                run(tmp_path, net, methods.Penalised())
            net.load_state_dict(start)
        net.again = True
        run(tmp_path, net, methods.Penalised())
        ends.append(trained(net))
        assert net.strict_loading and not {"training_step", "configure_model", "on_load_checkpoint"} & vars(net).keys()
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
