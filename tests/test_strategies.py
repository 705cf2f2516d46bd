"""Several processes: DDP with shapes that change, FSDP2, resume with random states of every rank; whole files."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, Subset

from lightning_peft import PEFT, Method
from tests import methods
from tests.launch import launch
from tests.nets import Net, trainer, vectors
from tests.test_contract import Handwritten, SaveAt, smooth, trained

TWO: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def run(root: Path, net: Net, method: Method, *more: L.Callback, ckpt: Any = None, data: Any = None, **options: Any) -> Any:
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


def ranks_change(strategy: str = "ddp", **options: Any) -> Any:
    plan = ((2, (2, 0)), (4, (0, -1, 1, -1)))
    net = Net(smooth, optimizer=lambda n: AdamW(n.parameters(), 1e-2))
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
    net = Net(optimizer=lambda n: SGD(n.parameters(), 0.1))
    run(root, net, methods.Handover())
    facts["handover"] = [net.net[0].bias.detach(), net.net[3].bias.detach()]
    facts["resume"] = _resume_in_ddp(root)
    calibrated = Net(smooth)
    run(root, calibrated, methods.Calibrated(), max_steps=1)
    facts["calibrated"] = trained(calibrated)
    return facts


def _resume_in_ddp(root: Path) -> list[tuple[list[float], list[float], bool]]:
    def fit(ckpt: Path | None, *more: L.Callback) -> Net:
        net = Ranked(optimizer=lambda n: AdamW(n.parameters(), 1e-2))
        method = methods.Resizing(plan=((2, (2, 0)), (4, (0, 1, -1))))
        data = vectors(56, 4)
        options = {"accumulate_grad_batches": 2, "max_steps": 7, "use_distributed_sampler": True}
        run(root, net, method, *more, ckpt=ckpt, data=data, **options)
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
    for key in ("penalty", "ddp", "ddp_find_unused_parameters_true", "handover", "calibrated"):
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
    torch.testing.assert_close(*first["penalty"], rtol=0, atol=0)
    net, method, options = ranks_change(devices=1, strategy="auto")
    run(tmp_path, net, method, data=vectors(batch_size=8, shuffle=False), **options)
    for strategy in ("ddp", "ddp_find_unused_parameters_true"):
        torch.testing.assert_close(first[strategy], trained(net), rtol=0, atol=1e-6)
    net = Net(optimizer=lambda n: SGD(n.parameters(), 0.1))
    run(tmp_path, net, methods.Handover(), data=vectors(batch_size=8, shuffle=False), devices=1, strategy="auto")
    start = Net()
    assert all(not torch.equal(net.net[i].bias, start.net[i].bias) for i in (0, 3))
    for facts in (first, second):
        for whole, resumed, equal in facts["resume"]:
            assert whole == resumed and equal
    assert [r[0] for r in first["resume"]] != [r[0] for r in second["resume"]]


# ---- FSDP2 ----------------------------------------------------------------------------------------------------------


class Sharded(Net):
    """Shards each layer, then the rest, as FSDP2's users do."""

    def configure_model(self) -> None:
        if isinstance(self.net, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def adam(net: Net) -> Any:
    return AdamW(net.parameters(), 1e-2)


def whole(net: Net) -> list[Tensor]:
    """What trains, gathered from all ranks."""
    return [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in net.parameters() if p.requires_grad]


def sharding(distributed: bool = False, **sizes: int) -> ModelParallelStrategy:
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1} | sizes
    return ModelParallelStrategy(**sizes, save_distributed_checkpoint=distributed)  # type: ignore[arg-type]


def fsdp(root: Path, net: Net, method: Method, *more: L.Callback, ckpt: Any = None, **options: Any) -> L.Trainer:
    L.seed_everything(5, verbose=False)
    common = TWO | {"max_steps": 6, "max_epochs": -1, "gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
    fit = trainer(root, PEFT(method), *more, **common | {"strategy": sharding()} | options)
    fit.fit(net, half(), ckpt_path=ckpt)
    return fit


def in_fsdp(root: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for method in (methods.Plain(), methods.Penalised(), methods.Grouped()):
        ends = []
        for name, net, strategy in (("ddp", Net(smooth, optimizer=adam), "ddp"), ("fsdp", Sharded(smooth, optimizer=adam), sharding())):
            fsdp(root / type(method).__name__ / name, net, method, strategy=strategy)
            ends.append(whole(net))
        facts[type(method).__name__] = ends
    for distributed in (True, False):
        facts[f"files {distributed}"] = _files_of_fsdp(root / str(distributed), distributed)
    facts["refused"] = _refused_in_fsdp(root)
    return facts


def _files_of_fsdp(root: Path, distributed: bool) -> dict[str, Any]:
    """A fit with dropout, its checkpoints in the middle of epochs and windows, and what becomes of them."""

    def module() -> Sharded:
        return Sharded(optimizer=adam)

    net, places, found = module(), (1, 2, 3, 6, 7), {}
    saved = SaveAt(root, places), SaveAt(root / "weights", [12], weights_only=True)
    fit = fsdp(root, net, methods.Plain(), *saved, strategy=sharding(distributed))
    data = vectors(8, shuffle=False)
    found["predicted"] = torch.cat(fit.predict(net, data))
    found["tested"] = torch.cat(fit.predict(net, data, ckpt_path=root / "weights" / "12.ckpt"))
    found["end"] = whole(net)
    for place in places:
        resumed = module()
        again = fsdp(root, resumed, methods.Plain(), ckpt=root / f"{place}.ckpt", strategy=sharding(distributed))
        assert again.global_step == 6
        found[place] = net.losses[place:], resumed.losses, whole(resumed)
    fresh = trainer(root, PEFT(methods.Plain(), folder=None), **TWO | {"strategy": sharding(distributed)})
    found["fresh"] = torch.cat(fresh.predict(module(), data, ckpt_path=root / "7.ckpt"))
    return found


class Late(Sharded):
    """Makes what it shards too late for adapters to be sharded with it."""

    def __init__(self) -> None:
        super().__init__(smooth, where="later")

    def configure_model(self) -> None:
        self.build()
        super().configure_model()


class Partly(Sharded):
    def configure_model(self) -> None:
        fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])


def _refused_in_fsdp(root: Path) -> list[str]:
    """What each thing that cannot work says; every one must be said on all ranks, before training."""
    full, weights = root / "False" / "2.ckpt", root / "False" / "weights" / "12.ckpt"
    (root / "cut.ckpt").write_bytes(full.read_bytes()[:2000])
    said = []
    for method, net, options in (
        (methods.Plain(), Net(smooth, optimizer=adam), {}),
        (methods.Plain(), Late(), {}),
        (methods.Plain(), Partly(smooth, optimizer=adam), {}),
        (methods.Plain(), Sharded(smooth), {"strategy": sharding(data_parallel_size=1, tensor_parallel_size=2)}),
        (methods.Calibrated(), Sharded(smooth), {}),
        (methods.Resizing(), Sharded(smooth), {}),
        (methods.Plain(r=3), Sharded(optimizer=adam), {"ckpt": full}),
        (methods.Plain(), Sharded(optimizer=adam), {"ckpt": weights}),
        (methods.Plain(), Sharded(optimizer=adam), {"ckpt": root / "cut.ckpt"}),
        (methods.Plain(), Sharded(optimizer=adam), {"ckpt": root / "none.ckpt"}),
        (methods.Resizing(), Sharded(), {"stage": "predict", "ckpt": root / "resized.ckpt"}),
    ):
        try:
            if options.pop("stage", "fit") == "predict":
                test = trainer(root, PEFT(method, folder=None), **TWO | {"strategy": sharding()})
                test.predict(net, vectors(8, shuffle=False), ckpt_path=options["ckpt"])
            else:
                fsdp(root / "refused", net, method, **options)
            said.append("")
        except ValueError as error:
            said.append(str(error))
        assert not net.losses
    return said


@pytest.mark.slow
def test_two_processes_in_fsdp2(tmp_path: Path) -> None:
    resized = Net(optimizer=adam)
    plan = methods.Resizing(plan=((1, (0, 1)),))
    run(tmp_path, resized, plan, SaveAt(tmp_path, [2]), data=vectors(), devices=1, strategy="auto")
    (tmp_path / "2.ckpt").rename(tmp_path / "resized.ckpt")
    first, second = launch(in_fsdp, root=tmp_path)
    for kind in ("Plain", "Penalised", "Grouped"):
        torch.testing.assert_close(*first[kind], rtol=0, atol=1e-6)
        torch.testing.assert_close(first[kind], second[kind], rtol=0, atol=0)
    for distributed in (True, False):
        _check_files(tmp_path / str(distributed), distributed, first[f"files {distributed}"])
    assert first["refused"] == second["refused"]
    for said, expected in zip(first["refused"], REFUSED, strict=True):
        assert expected in said


REFUSED = [
    "Net.__init__ and shard it in configure_model",
    "'net.0.weight' was sharded before methods could be injected",
    "2 trainable tensors, first 'net.2.adapters.product.A', lie outside of what configure_model shards",
    "tensor_parallel_size=2 splits the matrices",
    "['product'] calibrate on whole weights",
    "['product'] may change the shapes of parameters",
    "r=2 there, 3 now",
    "holds weights only, so no fit can be resumed",
    "is not a complete checkpoint",
    "no checkpoint at",
    "'net.0.adapters.product.A' of shape (2, 8), here it is (3, 8)",
]


def _check_files(root: Path, distributed: bool, found: dict[str, Any]) -> None:
    pass
