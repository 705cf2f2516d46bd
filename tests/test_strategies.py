"""Several processes: DDP with shapes that change, FSDP2, resume with random states of every rank; whole files."""

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import nn
from torch.utils.data import DataLoader, Subset

import lightning_peft as lp
from lightning_peft import PEFT, Method
from lightning_peft.strategies import AtomicCheckpointIO
from tests import methods
from tests.fits import SaveAt, adam, same, sgd, smooth, trained
from tests.launch import launch
from tests.nets import Net, trainer, vectors
from tests.test_contract import Handwritten

TWO: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}


ALONE: dict[str, Any] = {"devices": 1, "strategy": "auto"}


def run(
    root: Path, net: Any, method: Method, *more: L.Callback, ckpt: Any = None, data: Any = None, **options: Any
) -> Any:
    L.seed_everything(5, verbose=False)
    fit = trainer(root, PEFT(method, folder=None), *more, **TWO | {"max_steps": 6, "max_epochs": -1} | options)
    fit.fit(net, half() if data is None else data, ckpt_path=ckpt)
    return fit


def half() -> DataLoader:
    """This rank's half of every batch that one process alone would read."""
    held, rank = vectors().dataset, int(os.environ["LOCAL_RANK"])
    return DataLoader(Subset(held, range(rank, 48, 2)), 4)


# ---- DDP ------------------------------------------------------------------------------------------------------------


class Ranked(Net):
    """Dropout with random states that differ between ranks, as with data loading that draws per rank."""

    def on_train_start(self) -> None:
        torch.manual_seed(100 + self.global_rank)


def even() -> nn.Sequential:
    """Two layers with as many biases."""
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


HANDOVER = methods.Handover(layers=("net.0", "net.2"))
STATS: list[Any] = []


@dataclass(frozen=True, kw_only=True)
class Noted(methods.Calibrated):
    def inject(self, model: nn.Module, stats: Any = None) -> None:
        STATS.append(stats)
        methods.Calibrated.inject(self, model, stats)


def ranks_change(strategy: str = "ddp", **options: Any) -> Any:
    plan = ((2, (2, 0)), (4, (0, -1, 1, -1)))
    net = Net(smooth, optimizer=adam)
    return net, methods.Resizing(plan=plan), {"strategy": strategy} | options


def in_ddp(root: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    hand, ours = Handwritten(smooth), Net(smooth)
    run(root, hand, methods.Plain(), accumulate_grad_batches=2)
    run(root, ours, methods.Penalised(), accumulate_grad_batches=2)
    facts["penalty"] = trained(hand), trained(ours)
    for strategy in ("ddp", "ddp_find_unused_parameters_true"):
        net, method, options = ranks_change(strategy)
        run(root, net, method, **options)
        facts[strategy] = trained(net)
    net = Net(even, optimizer=sgd)
    run(root, net, HANDOVER)
    facts["handover"] = [net.net[0].bias.detach(), net.net[2].bias.detach()]
    facts["resume"] = _resume_in_ddp(root)
    run(root, Net(smooth), Noted(), max_steps=1)
    facts["stats"] = STATS[-1]
    return facts


IN_DDP = methods.Resizing(plan=((2, (2, 0)), (4, (0, 1, -1))))


def _resume_in_ddp(root: Path) -> list[tuple[list[float], list[float], bool]]:
    def fit(ckpt: Path | None, *more: L.Callback) -> Net:
        net = Ranked(optimizer=adam)
        data = vectors(56, 4)
        options = {"accumulate_grad_batches": 2, "max_steps": 7, "use_distributed_sampler": True}
        run(root, net, IN_DDP, *more, ckpt=ckpt, data=data, **options)
        return net

    places, found = (3, 4, 5, 7, 9, 11), []
    whole = fit(None, SaveAt(root / "mid", places))
    for place in places:
        resumed = fit(root / "mid" / f"{place}.ckpt")
        found.append((whole.losses[place:], resumed.losses, same(trained(whole), trained(resumed))))
    return found


@pytest.mark.slow
def test_two_processes_in_ddp(tmp_path: Path) -> None:
    first, second = launch(in_ddp, root=tmp_path)
    for key in ("penalty", "ddp", "ddp_find_unused_parameters_true", "handover", "stats"):
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
    torch.testing.assert_close(*first["penalty"], rtol=0, atol=0)
    net, method, options = ranks_change(devices=1, strategy="auto")
    run(tmp_path, net, method, data=vectors(batch_size=8, shuffle=False), **options)
    for strategy in ("ddp", "ddp_find_unused_parameters_true"):
        torch.testing.assert_close(first[strategy], trained(net), rtol=0, atol=1e-6)
    net = Net(even, optimizer=sgd)
    run(tmp_path, net, HANDOVER, data=vectors(batch_size=8, shuffle=False), **ALONE)
    start, biases = Net(even), [net.net[i].bias.detach() for i in (0, 2)]
    assert all(not torch.equal(bias, start.net[i].bias) for bias, i in zip(biases, (0, 2), strict=True))
    torch.testing.assert_close(first["handover"], biases, rtol=0, atol=1e-6)
    assert first["stats"].keys() == {"net.0", "net.2"}
    with pytest.warns(UserWarning, match="is of 2 processes and this fit has 1"):
        alone = Ranked(optimizer=adam)
        run(tmp_path, alone, IN_DDP, ckpt=tmp_path / "mid" / "5.ckpt", data=vectors(56), max_steps=7, **ALONE)
    for facts in (first, second):
        for whole, resumed, equal in facts["resume"]:
            assert whole == resumed and equal
    assert [r[0] for r in first["resume"]] != [r[0] for r in second["resume"]]


# ---- files ----------------------------------------------------------------------------------------------------------


class Blocks:
    """Its pickling begins and never ends."""

    def __init__(self, began: Path) -> None:
        self.began = began

    def __reduce__(self) -> Any:
        self.began.touch()
        time.sleep(600)
        return str, ()


def test_a_writer_that_is_killed_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path, began, writer = tmp_path / "last.ckpt", tmp_path / "began", AtomicCheckpointIO()
    writer.save_checkpoint({"step": 1, "weight": torch.ones(3)}, path)
    context = multiprocessing.get_context("fork")
    victim = context.Process(target=writer.save_checkpoint, args=({"step": 2, "rest": Blocks(began)}, path))
    victim.start()
    deadline = time.monotonic() + 60
    while not began.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.kill()
    victim.join()
    assert began.exists() and victim.exitcode == -signal.SIGKILL
    assert writer.load_checkpoint(path)["step"] == 1
    writer.save_checkpoint({"step": 3}, path)
    assert writer.load_checkpoint(path)["step"] == 3


@pytest.mark.parametrize("length", [0, 1, 100, 2000, -1])
def test_a_truncated_file_is_called_that_before_anything_is_loaded(length: int, tmp_path: Path) -> None:
    net = Net(smooth)
    run(tmp_path, net, methods.Plain(), SaveAt(tmp_path, [1]), data=vectors(), **ALONE, max_steps=1)
    whole_file = (tmp_path / "1.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole_file[:length])
    other = Net(smooth)
    for load in (
        lambda: run(tmp_path, other, methods.Plain(), ckpt=tmp_path / "cut.ckpt", data=vectors(), **ALONE),
        lambda: lp.restore(Net(smooth), tmp_path / "cut.ckpt", methods=[methods.Plain()]),
    ):
        with pytest.raises(ValueError, match=r"cut.ckpt is not a complete checkpoint: ."):
            load()
    assert not other.losses


class Counting(TorchCheckpointIO):
    saved = 0

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.saved += 1
        super().save_checkpoint(*args, **kwargs)


def test_a_writer_that_the_user_chose_stays_and_ours_replaces_only_the_default(tmp_path: Path) -> None:
    for chosen, writer in ((Counting(), Counting), (None, AtomicCheckpointIO)):
        options = {"plugins": [chosen] if chosen else [], "data": vectors(), "devices": 1, "strategy": "auto"}
        fit = run(tmp_path, Net(smooth), methods.Plain(), SaveAt(tmp_path, [2]), **options)
        assert type(fit.strategy.checkpoint_io) is writer
        if chosen:
            assert fit.strategy.checkpoint_io is chosen and chosen.saved == 1
        assert torch.load(tmp_path / "2.ckpt")["global_step"] == 2
    with pytest.raises(FileNotFoundError):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "nowhere.ckpt")
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "x", storage_options={"a": 1})
