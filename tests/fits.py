"""Short fits of small methods, and the loops by hand that tests compare them with."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft import PEFT, Method
from tests import methods
from tests.nets import Net, trainer, vectors


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


def adam(net: Net) -> Any:
    return torch.optim.AdamW(net.parameters(), 1e-2)


def same(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    """Equal bit for bit, one by one."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class SaveAt(L.Callback):
    """Saves after given batches, also in the middle of an accumulation window."""

    def __init__(self, folder: Path, batches: Iterable[int], weights_only: bool = False) -> None:
        self.folder, self.batches, self.seen, self.weights_only = folder, set(batches), 0, weights_only

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        self.seen += 1
        if self.seen in self.batches:
            trainer.save_checkpoint(self.folder / f"{self.seen}.ckpt", self.weights_only)


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


def outputs(predicted: Any) -> Tensor:
    """What ``Trainer.predict`` returned, as one tensor."""
    return torch.cat(predicted)
