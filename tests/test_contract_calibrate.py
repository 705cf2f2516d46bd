"""calibrate: what a method sees of the data, and that the fit does not notice that it looked."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from torchmetrics import SumMetric

import lightning_peft as lp
from lightning_peft import PEFT, Method
from tests import methods
from tests.fits import run, same, smooth, trained
from tests.methods import EVENTS
from tests.nets import Net, cnn, trainer, vectors
from tests.test_contract import Manual


class Watching(Net):
    """Keeps the batches it trains on and counts examples with a metric and in the log."""

    def __init__(self, *args: Any, data: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen, self.count, self.counts, self.data, self.moved = [], SumMetric(), [], data, 0

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
        self.count.update(1)
        self.log("examples", self.count, on_epoch=True, on_step=False)
        self.log_dict({"one": 1.0}, on_epoch=True, reduce_fx="sum")
        return loss

    def on_train_epoch_end(self) -> None:
        self.counts.append(int(self.count.compute()))


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
    data: Any = vectors().dataset
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
    assert calibrated.moved == without.moved + 3 and calibrated.counts == without.counts
    assert fits[1].callback_metrics == fits[0].callback_metrics
    assert not {"log", "log_dict"} & vars(calibrated).keys()
    assert not same(trained(calibrated), trained(without))


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
        assert same(trained(whole), trained(resumed)), kind
    before = trained(whole)
    fit_with(tmp_path, whole, methods.Calibrated())
    moved = max(float((a - b).abs().max()) for a, b in zip(before, trained(whole), strict=True))
    assert len(EVENTS) == 3 and 0 < moved < 0.3  # Adam's steps of 0.01 from where they were, no new draw


def test_calibration_keeps_to_the_batches_the_fit_is_limited_to(tmp_path: Path) -> None:
    for limit, seen in ((2, 2), (0.5, 3), (0, 0)):
        EVENTS.clear()
        run(tmp_path, Net(), methods.Calibrated(), limit_train_batches=limit, max_epochs=1, data=vectors())
        assert len(EVENTS) == seen


def test_without_stats_the_structure_is_the_same_and_a_file_fills_it(tmp_path: Path) -> None:
    net = Watching(data=vectors)
    L.seed_everything(5, verbose=False)
    trainer(tmp_path, PEFT(methods.Calibrated(), calibration_batches=3)).fit(net)
    again = Watching(data=vectors)
    lp.load(again, tmp_path / "adapter", methods=[methods.Calibrated()])
    assert same(trained(net), trained(again))
    assert all(bool(a.any()) for a in trained(again))


def test_calibration_is_refused_where_the_training_step_would_train(tmp_path: Path) -> None:
    net = Manual(own=False)
    start = [p.clone() for p in net.parameters()]
    with pytest.raises(ValueError, match="under manual optimization would already train"):
        run(tmp_path, net, methods.Calibrated())
    assert same(start, Net(smooth).parameters())

    class Skipping(Net):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...  # pyright: ignore

    with pytest.raises(ValueError, match="training_step returned None for a batch"):
        run(tmp_path, Skipping(), methods.Calibrated())
