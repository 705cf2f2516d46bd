"""FSDP2 for real, over two gloo processes on the CPU: trained as under DDP, files whole and without the base."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_peft_plugins.reparameterized.lora import LoRA
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import lightning_peft as lp
from lightning_peft import PEFT, Method
from tests import methods
from tests.fits import SaveAt, adam, outputs, same, smooth, trained
from tests.launch import launch
from tests.nets import HFNet, Net, llama, tokens, trainer, vectors
from tests.test_strategies import ALONE, TWO, half, run


def _data_mesh(module: L.LightningModule) -> Any:
    mesh: Any = module.device_mesh
    return mesh["data_parallel"]


class Sharded(Net):
    """Shards the first layer, then all the rest as one: layers of both kinds at the end of a forward."""

    def configure_model(self) -> None:
        if isinstance(self.net, FSDPModule):
            return
        for module in (self.net[0], self.net):
            fully_shard(module, mesh=_data_mesh(self))


class ShardedLlama(HFNet):
    def configure_model(self) -> None:
        if not isinstance(self.net, FSDPModule):
            for module in (*self.net.model.layers, self.net):
                fully_shard(module, mesh=_data_mesh(self))


def whole(net: Net) -> list[Tensor]:
    """What trains, gathered from all ranks."""
    held = [p.detach() for p in net.parameters() if p.requires_grad]
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in held]


def sharding(distributed: bool = False, **sizes: int) -> ModelParallelStrategy:
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1} | sizes
    return ModelParallelStrategy(**sizes, save_distributed_checkpoint=distributed)  # type: ignore[arg-type]


def fsdp(root: Path, net: Any, method: Method, *more: L.Callback, ckpt: Any = None, **options: Any) -> L.Trainer:
    L.seed_everything(5, verbose=False)
    common = TWO | {"max_steps": 6, "max_epochs": -1, "gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
    peft, data = PEFT(method, **options.pop("peft", {})), options.pop("data", None)
    fit = trainer(root, peft, *more, **common | {"strategy": sharding()} | options)
    fit.fit(net, data or half(), ckpt_path=ckpt)
    return fit


def in_fsdp(root: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for method in (methods.Plain(), methods.Penalised(), methods.Grouped(), methods.Wrapped(), methods.Halving()):
        here, ends = root / type(method).__name__, []
        for net, strategy in ((Net(smooth, optimizer=adam), "ddp"), (Sharded(smooth, optimizer=adam), sharding())):
            fsdp(here / type(net).__name__, net, method, strategy=strategy)
            ends.append(whole(net))
        facts[type(method).__name__] = ends
    nets = HFNet(llama, optimizer=adam), ShardedLlama(llama, optimizer=adam)
    for net, strategy in zip(nets, ("ddp", sharding()), strict=True):
        options = {"strategy": strategy, "precision": "bf16-mixed", "data": tokens(16, 2, lm=True, shuffle=False)}
        fsdp(root / type(net).__name__, net, LoRA(r=2), **options)
    facts["llama"] = [whole(net) for net in nets]
    for distributed in (True, False):
        facts[f"files {distributed}"] = _files_of_fsdp(root / str(distributed), distributed)
    facts["refused"] = _refused_in_fsdp(root)
    return facts


def _files_of_fsdp(root: Path, distributed: bool) -> dict[str, Any]:
    """A fit with dropout, its checkpoints in the middle of epochs and windows, and what becomes of them."""

    def module() -> Sharded:
        return Sharded(optimizer=adam)

    found: dict[Any, Any] = {}
    net, places = module(), (2, 3, 6, 7)
    saved = SaveAt(root, (1, *places)), SaveAt(root / "weights", [12], weights_only=True)
    keys = Keys()
    fit = fsdp(root, net, methods.Plain(), keys, *saved, strategy=sharding(distributed))
    assert all(".adapters." in key for key in keys.seen)
    assert keys.seen or not (distributed or fit.is_global_zero)
    data = vectors(8, shuffle=False)
    found["predicted"] = outputs(fit.predict(net, data))
    found["tested"] = outputs(fit.predict(net, data, ckpt_path=root / "weights" / "12.ckpt"))
    found["end"] = whole(net)
    for place in places:
        resumed = module()
        again = fsdp(root, resumed, methods.Plain(), ckpt=root / f"{place}.ckpt", strategy=sharding(distributed))
        assert again.global_step == 6
        found[place] = net.losses[place:], resumed.losses, whole(resumed)
    fresh = trainer(root, PEFT(methods.Plain(), folder=None), **TWO | {"strategy": sharding(distributed)})
    found["fresh"] = outputs(fresh.predict(module(), data, ckpt_path=root / "7.ckpt"))
    return found


class Keys(L.Callback):
    """What the strategy hands over for a checkpoint, before anybody filters it."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen = list(trainer.strategy.lightning_module_state_dict())


class Late(Sharded):
    """Makes what it shards too late for adapters to be sharded with it."""

    def __init__(self) -> None:
        super().__init__(smooth, where="later")

    def configure_model(self) -> None:
        self.build()
        super().configure_model()


class Whole(L.LightningModule):
    """Has no configure_model at all, where Net has one."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.losses = smooth(), []

    def training_step(self, batch: Any) -> None: ...

    def configure_optimizers(self) -> None: ...


class Partly(Sharded):
    def configure_model(self) -> None:
        fully_shard(self.net[0], mesh=_data_mesh(self))


def _refused_in_fsdp(root: Path) -> list[str]:
    """What each thing that cannot work says; every one must be said on all ranks, before training."""
    full, weights = root / "False" / "2.ckpt", root / "False" / "weights" / "12.ckpt"
    (root / "cut.ckpt").write_bytes(full.read_bytes()[:2000])
    said: list[str] = []
    trials: list[tuple[Method, Any, dict[str, Any]]] = [
        (methods.Plain(), Whole(), {}),
        (methods.Plain(), Late(), {}),
        (methods.Plain(), Partly(smooth, optimizer=adam), {}),
        (methods.Plain(), Sharded(smooth), {"strategy": sharding(data_parallel_size=1, tensor_parallel_size=2)}),
        (methods.Calibrated(), Sharded(smooth), {}),
        (methods.Resizing(), Sharded(smooth), {}),
        (methods.Plain(), Sharded(smooth), {"peft": {"merge_at_end": True}}),
        (methods.Plain(r=3), Sharded(optimizer=adam), {"ckpt": full}),
        (methods.Plain(), Sharded(optimizer=adam), {"ckpt": weights}),
        (methods.Plain(), Sharded(optimizer=adam), {"ckpt": root / "True" / "1.ckpt"}),
        (methods.Plain(), Sharded(optimizer=adam), {"ckpt": root / "cut.ckpt"}),
        (methods.Plain(), Sharded(optimizer=adam), {"ckpt": root / "none.ckpt"}),
        (SHRINKING, Sharded(), {"stage": "predict", "ckpt": root / "resized.ckpt"}),
    ]
    for method, net, options in trials:
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
    run(tmp_path, resized, SHRINKING, SaveAt(tmp_path, [2]), data=vectors(), **ALONE)
    (tmp_path / "2.ckpt").rename(tmp_path / "resized.ckpt")
    first, second = launch(in_fsdp, root=tmp_path)
    for kind in ("Plain", "Penalised", "Grouped", "Wrapped", "Halving", "llama"):
        torch.testing.assert_close(*first[kind], rtol=0, atol=1e-6)
        torch.testing.assert_close(first[kind], second[kind], rtol=0, atol=0)
    config = json.loads((tmp_path / "ShardedLlama" / "adapter" / "adapter.json").read_text())
    assert config["pretrained"]["class"] == "LlamaForCausalLM"
    for distributed in (True, False):
        _check_files(tmp_path / str(distributed), distributed, first[f"files {distributed}"])
    assert first["refused"] == second["refused"]
    for said, expected in zip(first["refused"], REFUSED, strict=True):
        assert expected in said


SHRINKING = methods.Resizing(plan=((1, (0, 1)),))
REFUSED = [
    "Whole.__init__ and shard it in configure_model",
    "'net.0.weight' was sharded before methods could be injected",
    "2 trainable tensors, first 'net.2.adapters.product.A', lie outside of what configure_model shards",
    "tensor_parallel_size=2 splits the matrices",
    "['product'] calibrate on whole weights",
    "['product'] may change the shapes of parameters",
    "merge_at_end=True needs whole weights",
    "r=2 there, 3 now",
    "holds weights only, so no fit can be resumed",
    "which had not stepped yet",
    "is not a complete checkpoint",
    "no checkpoint at",
    "'net.0.adapters.product.A' of shape (2, 8), here it is (3, 8)",
]


def _check_files(root: Path, distributed: bool, found: dict[Any, Any]) -> None:
    """Files of the fit: checkpoints resumed bitwise and hold no base, and serve a process without any strategy."""
    for place in (2, 3, 6, 7):
        losses, resumed, end = found[place]
        assert losses == resumed and len(losses) > 0
        assert same(end, found["end"]), place
    keys = {f"net.{n}.adapters.product.{f}" for n in (0, 3, 5) for f in "AB"}
    for name in ("7.ckpt", "weights/12.ckpt"):
        held = stored(root / name)["state_dict"]
        assert held.keys() == keys
    assert (root / "7.ckpt").is_dir() == distributed
    assert not list(root.glob("**/*.part"))
    single: Any = lp.load(Net(), root / "adapter", methods=[methods.Plain()]).eval()
    torch.testing.assert_close(trained(single), found["end"], rtol=0, atol=0)
    x = next(iter(vectors(8, shuffle=False)))[0]
    for name in ("predicted", "tested"):
        torch.testing.assert_close(single.net(x), found[name])
    torch.save(stored(root / "7.ckpt"), root / "one.ckpt")
    fresh: Any = lp.restore(Net(), root / "one.ckpt", methods=[methods.Plain()]).eval()
    assert not torch.allclose(fresh.net(x), single.net(x), atol=1e-4)
    torch.testing.assert_close(fresh.net(x), found["fresh"])


def stored(path: Path) -> dict[str, Any]:
    """A checkpoint as one dictionary, as lightning.fabric.utilities.consolidate_checkpoint makes it."""
    if path.is_file():
        return torch.load(path)
    with pytest.raises(ValueError, match="make one file of it with `python -m lightning.fabric.utilities.consolidate"):
        lp.restore(Net(), path)
    return _load_distributed_checkpoint(path)
