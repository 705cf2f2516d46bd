"""Every verb of the contract as the callback runs it, by small methods and against hand-written loops."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from torchmetrics import SumMetric

import lightning_peft as lp
from lightning_peft import PEFT, Method, callback
from tests import methods
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
            squares = [p.square().sum() for p in self.parameters() if p.requires_grad]
            loss = loss + self.weight * torch.stack(squares).sum()
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
    plain, ours = methods.Plain(), methods.Penalised()
    for cls, method in ((Handwritten, plain), (Unpenalised, ours), (Unpenalised, plain)):
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


# ---- calibrate ------------------------------------------------------------------------------------------------------


class Watching(Net):
    """Keeps the batches it trains on and counts examples with a metric and in the log."""

    def __init__(self, *args: Any, data: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen, self.count, self.data, self.moved = [], SumMetric(), data, 0

    def train_dataloader(self) -> Any:
        return self.data()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.moved += 1
        return batch

    def loss(self, batch: Any) -> Tensor:
        self.seen.append(batch)
        return super().loss(batch["a"] if isinstance(batch, dict) else batch)

    def training_step(self, batch: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = self.loss(batch)
        self.log_dict({"examples": self.count(len(loss[None]))}, on_epoch=True, on_step=False, reduce_fx="max")
        return loss


class Split(Watching):
    """Draws a random part of the data in the hook that makes the loader."""

    def train_dataloader(self) -> Any:
        return DataLoader(torch.utils.data.random_split(vectors().dataset, [32, 16])[0], 8, shuffle=True)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        data = vectors().dataset
        return (data[i] for i in torch.randperm(48).tolist())


def own_generator() -> DataLoader:
    return DataLoader(vectors().dataset, 8, shuffle=True, generator=torch.Generator().manual_seed(2))


def own_sampler() -> DataLoader:
    data = vectors().dataset
    return DataLoader(data, 8, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(2)))


LOADERS = {
    "shuffled": vectors,
    "generator": own_generator,
    "sampler": own_sampler,
    "stream": lambda: DataLoader(Stream(), 8),
    "two": lambda: {"a": vectors(), "b": vectors(16, 4)},
}


def fit_with(root: Path, net: Watching, method: Method, *more: L.Callback, ckpt: Path | None = None) -> L.Trainer:
    L.seed_everything(5, verbose=False)
    fit = trainer(root, PEFT(method, folder=None, calibration_batches=3), *more, log_every_n_steps=1)
    fit.fit(net, ckpt_path=ckpt)
    return fit


@pytest.mark.parametrize("kind", [*LOADERS, "split"])
def test_calibrating_changes_nothing_the_fit_would_see(kind: str, tmp_path: Path) -> None:
    EVENTS.clear()
    nets, fits = [], []
    for method in (methods.Plain(), methods.Calibrated()):
        net = Split() if kind == "split" else Watching(data=LOADERS[kind])
        fits.append(fit_with(tmp_path, net, method))
        nets.append(net)
    without, calibrated = nets
    assert len(EVENTS) == 3 and len(calibrated.seen) == len(without.seen) + 3
    for a, b in zip(without.seen, calibrated.seen[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert calibrated.moved == without.moved + 3
    assert fits[1].callback_metrics == fits[0].callback_metrics
    assert not {"log", "log_dict"} & vars(calibrated).keys()
    draws = [torch.equal(x.net[5].adapters["product"].B, without.net[5].adapters["product"].B) for x in nets]
    assert draws == [True, False]


def test_calibrating_leaves_buffers_and_trains_on_from_the_same_draws(tmp_path: Path) -> None:
    net = Watching(cnn, lr=0.0, data=lambda: vectors(images=True))
    before = {k: v.clone() for k, v in net.net.state_dict().items()}
    fit_with(tmp_path, net, methods.Calibrated())
    assert all(torch.equal(v, before[k]) for k, v in net.net.state_dict().items() if k in before)
    bare, plain = Net(cnn), Net(cnn, lr=0.0)
    norms = dict.fromkeys(("0", "4"), 0.0)
    for x, y in net.seen[:3]:
        bare.zero_grad()
        bare.loss((x, y)).backward()
        norms = {k: v + float(bare.net.get_submodule(k).weight.grad.norm()) for k, v in norms.items()}
    run(tmp_path, plain, methods.Plain(), data=vectors(images=True))
    product = net.net[4].adapters["product"], plain.net[4].adapters["product"]
    torch.testing.assert_close(product[0].A, product[1].A * norms["4"])
    assert torch.equal(product[0].B, product[1].B)


def test_calibration_is_skipped_on_a_resume_and_on_adapters_that_are_there(tmp_path: Path) -> None:
    for kind in ("shuffled", "stream"):
        EVENTS.clear()
        every = ModelCheckpoint(tmp_path / kind, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        whole = Watching(data=LOADERS[kind])
        fit_with(tmp_path, whole, methods.Calibrated(), every)
        assert len(EVENTS) == 3
        resumed = Watching(data=LOADERS[kind])
        fit_with(tmp_path, resumed, methods.Calibrated(), ckpt=tmp_path / kind / "step=4.ckpt")
        assert len(EVENTS) == 3
        assert all(torch.equal(a, b) for a, b in zip(trained(whole), trained(resumed), strict=True)), kind
    before = trained(whole)
    fit_with(tmp_path, whole, methods.Calibrated())
    moved = max(float((a - b).abs().max()) for a, b in zip(before, trained(whole), strict=True))
    assert len(EVENTS) == 3 and 0 < moved < 0.3  # Adam's steps of 0.01 from where they were, no new draw


def test_without_stats_the_structure_is_the_same_and_a_file_fills_it(tmp_path: Path) -> None:
    net = Watching(data=vectors)
    L.seed_everything(5, verbose=False)
    trainer(tmp_path, PEFT(methods.Calibrated(), calibration_batches=3)).fit(net)
    again = Watching(data=vectors)
    lp.load(again, tmp_path / "adapter", methods=[methods.Calibrated()])
    assert all(torch.equal(a, b) for a, b in zip(trained(net), trained(again), strict=True))
    assert all(bool(a.any()) for a in trained(again))


def test_calibration_is_refused_where_the_training_step_would_train(tmp_path: Path) -> None:
    net = Manual(own=False)
    start = [p.clone() for p in net.parameters()]
    with pytest.raises(ValueError, match="under manual optimization would already train"):
        run(tmp_path, net, methods.Calibrated())
    assert all(torch.equal(a, b) for a, b in zip(start, Net(smooth).parameters(), strict=True))

    class Skipping(Net):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...  # pyright: ignore

    with pytest.raises(ValueError, match="training_step returned None for a batch"):
        run(tmp_path, Skipping(), methods.Calibrated())


# ---- optimizers -----------------------------------------------------------------------------------------------------


def hand_loop(net: Net, optimizer: torch.optim.Optimizer, steps: int, after: Any = None) -> None:
    """A loop as anyone writes it, over the batches of ``run``."""
    batches = list(vectors(shuffle=False))
    for step in range(steps):
        optimizer.zero_grad()
        net.loss(batches[step % len(batches)]).backward()
        optimizer.step()
        if after is not None:
            after(step + 1)


def injected(make: Any = smooth) -> Net:
    """A module as ``run`` has it after injection: the same base, the same draws."""
    net = Net(make)
    L.seed_everything(5, verbose=False)
    lp.inject(net, methods.Plain())
    return net


def factors(net: Net, name: str) -> list[nn.Parameter]:
    return [getattr(a, name) for _, _, a in lp.adapters(net)]


def test_param_groups_train_with_options_of_their_own(tmp_path: Path) -> None:
    net = Net(smooth, optimizer=lambda n: torch.optim.AdamW(n.parameters(), 1e-2, weight_decay=0.5))
    fit = run(tmp_path, net, methods.Grouped())
    hand = injected()
    groups = [{"params": factors(hand, "A")}, {"params": factors(hand, "B"), "lr": 4e-2, "weight_decay": 0.0}]
    hand_loop(hand, torch.optim.AdamW(groups, 1e-2, weight_decay=0.5), 5)
    assert [g["weight_decay"] for g in fit.optimizers[0].param_groups] == [0.5, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(trained(net), trained(hand), strict=True))


def test_a_group_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    for options, message in [
        ((("momentun", 0.5),), "AdamW has no option 'momentun'"),
        ((("lr", 0.1), ("lr_scale", 2.0)), "takes 'lr' or 'lr_scale', got both"),
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
        assert all(torch.equal(a, b) for a, b in zip(trained(whole), trained(resumed), strict=True))
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


# ---- shapes ---------------------------------------------------------------------------------------------------------


PLAN = ((2, (2, 0)), (4, (0, -1, 1, -1)))


def adam(net: Net) -> Any:
    return torch.optim.AdamW(net.parameters(), 1e-2)


def test_ranks_shrink_and_grow_with_their_moments_as_in_a_loop_by_hand(tmp_path: Path) -> None:
    net = Net(smooth, optimizer=adam)
    run(tmp_path, net, methods.Resizing(plan=PLAN), max_steps=6)
    hand = Net(smooth)
    L.seed_everything(5, verbose=False)
    lp.inject(hand, methods.Plain(r=3))
    batches = list(vectors(shuffle=False))
    optimizer = torch.optim.AdamW([p for p in hand.parameters() if p.requires_grad], 1e-2)
    for step in range(1, 7):
        optimizer.zero_grad()
        hand.loss(batches[step - 1]).backward()
        optimizer.step()
        index = dict(PLAN).get(step)
        if index is None:
            continue
        states = {}
        for _, _, adapter in lp.adapters(hand):  # other Parameters, another optimizer: nothing of resize is used
            for name, dim in (("A", 0), ("B", 1)):
                old, count = getattr(adapter, name), index.count(-1)
                fresh = 0.3 * torch.randn(count, old.shape[1]) if name == "A" else torch.zeros(len(old), count)
                zeros, state = torch.zeros_like(fresh), optimizer.state[old]
                new = nn.Parameter(pick(old.detach(), dim, index, fresh))
                states[new] = {k: pick(state[k], dim, index, zeros) for k in ("exp_avg", "exp_avg_sq")}
                states[new]["step"] = state["step"]
                setattr(adapter, name, new)
        optimizer = torch.optim.AdamW(states, 1e-2)
        optimizer.state.update(states)
    assert [p.shape for p in trained(net)] == [(4, 8), (12, 4), (4, 12), (3, 4)]
    torch.testing.assert_close(trained(net), trained(hand), rtol=0, atol=1e-7)


def pick(t: Tensor, dim: int, index: tuple[int, ...], fresh: Tensor) -> Tensor:
    """``t`` at the places of ``index``, and where that is -1 the next of the ``fresh`` ones."""
    new = iter(fresh.unbind(dim))
    return torch.stack([t.select(dim, i) if i >= 0 else next(new) for i in index], dim)


class SaveAt(L.Callback):
    """Saves after given batches, also in the middle of an accumulation window."""

    def __init__(self, folder: Path, batches: Iterable[int], weights_only: bool = False) -> None:
        self.folder, self.batches, self.seen, self.weights_only = folder, set(batches), 0, weights_only

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        self.seen += 1
        if self.seen in self.batches:
            trainer.save_checkpoint(self.folder / f"{self.seen}.ckpt", self.weights_only)


def resized(root: Path, *more: L.Callback, ckpt: Path | None = None, **options: Any) -> Net:
    """Seven batches an epoch, four steps; ranks change at the end of the first epoch and inside the second."""
    net = Net(optimizer=adam)
    method = methods.Resizing(plan=((4, (2, 0)), (6, (0, -1, 1, -1))))
    common: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_steps": 10}
    run(root, net, method, *more, **common | options, data=vectors(56), ckpt_path=ckpt)
    return net


def test_a_fit_that_changes_ranks_resumes_bitwise_from_any_batch(tmp_path: Path) -> None:
    places = (5, 6, 7, 8, 10, 11, 12, 15)  # before, at and after both changes, whole and half windows
    whole = resized(tmp_path, SaveAt(tmp_path, places))
    for place in places:
        resumed = resized(tmp_path, ckpt=tmp_path / f"{place}.ckpt")
        assert resumed.losses == whole.losses[place:]
        assert all(torch.equal(a, b) for a, b in zip(trained(whole), trained(resumed), strict=True)), place
    ranks = [torch.load(tmp_path / f"{n}.ckpt")["state_dict"]["net.0.adapters.product.A"].shape[0] for n in places]
    assert ranks == [3, 3, 2, 2, 2, 4, 4, 4]


def test_weights_alone_of_a_resized_model_serve_other_stages(tmp_path: Path) -> None:
    whole = resized(tmp_path, SaveAt(tmp_path, [11], weights_only=True), max_steps=6)
    peft = PEFT(methods.Resizing(plan=((4, (2, 0)), (6, (0, -1, 1, -1)))), folder=None)
    data = vectors(8, shuffle=False)
    wanted = whole.eval().net(next(iter(data))[0])
    got = trainer(tmp_path, peft).predict(Net(), data, ckpt_path=tmp_path / "11.ckpt")
    again = lp.restore(Net(), tmp_path / "11.ckpt", methods=peft.methods).eval()
    assert torch.equal(torch.cat(got), wanted)
    assert torch.equal(again.net(next(iter(data))[0]), wanted)


# ---- the end, several methods ---------------------------------------------------------------------------------------


def test_finish_comes_before_folder_and_merge_and_the_proof_is_kept(tmp_path: Path) -> None:
    net, x = Net(smooth), next(iter(vectors(shuffle=False)))[0]
    peft = PEFT(methods.Rounding(), merge_at_end=True)
    trainer(tmp_path, peft).fit(net, vectors(shuffle=False))
    held = load_file(tmp_path / "adapter" / "adapter.safetensors")
    assert len(held) == 4 and all(torch.equal((v * 8).round(), v * 8) for v in held.values())
    base = Net(smooth).net
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for layer in ("0", "2"):
        A, B = (held[f"net.{layer}.adapters.product.{name}"] for name in "AB")
        wanted = base.get_submodule(layer).weight + B @ A
        torch.testing.assert_close(merged[f"net.{layer}.weight"], wanted)
        assert torch.equal(merged[f"net.{layer}.weight"], net.net.get_submodule(layer).weight)
    proof = json.loads((tmp_path / "merged" / "merge_proof.json").read_text())
    difference = (net.net(x) - lp.load(Net(smooth), tmp_path / "adapter", methods=peft.methods).net(x)).abs().max()
    assert proof["hosts"] == 2 and proof["outputs"] == 1
    assert proof["largest"] == pytest.approx(float(difference), abs=1e-6) and proof["relative"] < 1e-5


def test_a_merge_that_is_wrong_is_refused_and_the_folder_still_written(tmp_path: Path) -> None:
    net = Net(smooth)
    base = {k: v.clone() for k, v in net.net.state_dict().items()}
    with pytest.raises(ValueError, match="merging changes the outputs by .*; the model was left unmerged"):
        trainer(tmp_path, PEFT(methods.Lying(), merge_at_end=True)).fit(net, vectors())
    assert [n for n, _, _ in lp.adapters(net.net)] == ["0", "2"]
    assert all(torch.equal(net.net.state_dict()[k], v) for k, v in base.items())
    assert (tmp_path / "adapter" / "adapter.json").is_file() and not (tmp_path / "merged").exists()
    again = lp.load(Net(smooth), tmp_path / "adapter", methods=[methods.Lying()])
    assert all(torch.equal(a, b) for a, b in zip(trained(net), trained(again), strict=True))


VERBS = ("inject", "calibrate", "param_groups", "wrap_optimizer", "penalty", "before_step", "after_step", "finish")


def test_several_methods_run_in_their_order_under_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EVENTS.clear()
    def named(verb: str, old: Any) -> Any:
        def noted(self: Method, *args: Any) -> Any:
            EVENTS.append((self.name, verb))
            return old(self, *args)

        return noted

    for verb in VERBS:
        monkeypatch.setattr(methods.Recorder, verb, named(verb, getattr(methods.Recorder, verb)))
    net, two = Net(smooth), [methods.Recorder(name="one"), methods.Recorder(name="two")]
    trainer(tmp_path, PEFT(two), max_steps=1).fit(net, vectors())
    called = [e for e in EVENTS if isinstance(e, tuple)]
    assert [verb for _, verb in called[::2]] == ["inject", "calibrate", "inject", *VERBS[2:]]
    assert [name for name, _ in called] == ["one", "two"] * 9
    assert list(net.net[0].adapters) == ["one", "two"]
    keys = load_file(tmp_path / "adapter" / "adapter.safetensors").keys()
    assert keys == {f"net.{n}.adapters.{name}.{f}" for n in (0, 2) for name in ("one", "two") for f in "AB"}
    x = next(iter(vectors()))[0]
    weights = [
        layer.weight + sum(layer.adapters[n].B @ layer.adapters[n].A for n in ("one", "two")) for layer in net.net[::2]
    ]
    by_hand = (x @ weights[0].T + net.net[0].bias).tanh() @ weights[1].T + net.net[2].bias
    torch.testing.assert_close(net.net(x), by_hand)
