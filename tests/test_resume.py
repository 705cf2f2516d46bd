"""Resume bit for bit, from any checkpoint, also one that a killed process left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_peft_plugins.reparameterized.lora import LoRA
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_peft import PEFT
from tests.nets import Net, trainer, vectors


class Noisy(TensorDataset):
    """Draws from torch's global generator for every example, as augmentation does."""

    def __getitem__(self, index: Any) -> tuple[torch.Tensor, ...]:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn_like(x), y


class Stream(IterableDataset):
    """No length, so Lightning fetches one batch ahead."""

    def __init__(self) -> None:
        self.data = vectors().dataset

    def __iter__(self) -> Any:
        for i in torch.randperm(48).tolist():
            x, y = self.data[i]
            yield x + 0.1 * torch.randn_like(x), y


def loader(kind: str) -> DataLoader:
    plain = vectors().dataset
    noisy = Noisy(*plain.tensors)
    return {
        "shuffled": lambda: DataLoader(plain, 8, shuffle=True),
        "augmented": lambda: DataLoader(noisy, 8, shuffle=True),
        "generator": lambda: DataLoader(noisy, 8, shuffle=True, generator=torch.Generator().manual_seed(9)),
        "workers": lambda: DataLoader(noisy, 8, shuffle=True, num_workers=2),
        "stream": lambda: DataLoader(Stream(), 8),
        "uneven": lambda: DataLoader(noisy, 7, shuffle=True),
    }[kind]()


def fit(root: Path, kind: str, ckpt: Path | None = None, **options: Any) -> tuple[Net, list[Path]]:
    L.seed_everything(11 if ckpt is None else 99, verbose=False)  # a resumed run must not depend on its own seed
    net = Net()
    peft = PEFT(LoRA(r=3, dropout=0.2, targets=("all-linear",)), folder=None)
    every = ModelCheckpoint(root / "ckpt", filename="{epoch}-{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(root, peft, every, **{"max_epochs": 3, "accumulate_grad_batches": 2} | options)
    run.fit(net, loader(kind), vectors(), ckpt_path=ckpt)
    return net, sorted((root / "ckpt").glob("*.ckpt"), key=lambda p: int(p.stem.split("step=")[1]))


def assert_same(a: Net, b: Net) -> None:
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("kind", ["shuffled", "augmented", "generator", "uneven", "stream"])
def test_every_checkpoint_resumes_bitwise(kind: str, tmp_path: Path) -> None:
    whole, ckpts = fit(tmp_path / "whole", kind)
    assert len(ckpts) >= 9
    for n, ckpt in enumerate(ckpts[:-1]):
        resumed, _ = fit(tmp_path / f"resumed{n}", kind, ckpt)
        assert_same(whole, resumed)
        assert whole.losses[-len(resumed.losses) :] == resumed.losses


@pytest.mark.slow
def test_resume_with_worker_processes(tmp_path: Path) -> None:
    whole, ckpts = fit(tmp_path / "whole", "workers", max_epochs=2)
    for n in (1, 3):
        assert_same(whole, fit(tmp_path / f"resumed{n}", "workers", ckpts[n], max_epochs=2)[0])


class SaveAt(L.Callback):
    """Saves after a given batch, also in the middle of an accumulation window."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch, self.seen = path, batch, 0

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        self.seen += 1
        if self.seen == self.batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7])
def test_an_open_accumulation_window_is_kept(batch: int, tmp_path: Path) -> None:
    def run(root: Path, ckpt: Path | None, *more: L.Callback) -> Net:
        L.seed_everything(1, verbose=False)
        net, peft = Net(), PEFT(LoRA(r=3, dropout=0.1), folder=None)
        trainer(root, peft, *more, accumulate_grad_batches=4).fit(net, vectors(64), ckpt_path=ckpt)
        return net

    whole = run(tmp_path / "a", None, SaveAt(tmp_path / "mid.ckpt", batch))
    assert_same(whole, run(tmp_path / "b", tmp_path / "mid.ckpt"))


def test_without_the_random_states_the_resumed_run_would_differ(tmp_path: Path) -> None:
    """The oracle of the tests above can fail: a checkpoint robbed of them does not resume bitwise."""
    whole, ckpts = fit(tmp_path / "whole", "augmented")
    ckpt = torch.load(ckpts[3], weights_only=True)
    del ckpt["lightning_peft"]["state"]
    torch.save(ckpt, tmp_path / "robbed.ckpt")
    resumed, _ = fit(tmp_path / "resumed", "augmented", tmp_path / "robbed.ckpt")
    assert any(not torch.equal(x, y) for x, y in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_validation_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    options: dict[str, Any] = {"val_check_interval": 2, "accumulate_grad_batches": 1}
    whole, ckpts = fit(tmp_path / "whole", "augmented", **options)
    for n in (2, 5, 6, 9):
        assert_same(whole, fit(tmp_path / f"resumed{n}", "augmented", ckpts[n], **options)[0])


VICTIM = """
import sys
from pathlib import Path
from tests.test_resume import fit
fit(Path(sys.argv[1]), "augmented", max_epochs=60)
"""


@pytest.mark.slow
def test_a_killed_run_resumes_from_what_it_left(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    victim = subprocess.Popen([sys.executable, "-c", VICTIM, str(tmp_path / "killed")], cwd=root, env=env)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "killed" / "ckpt").glob("*.ckpt"))) < 12 and time.monotonic() < deadline:
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    ckpts = sorted((tmp_path / "killed" / "ckpt").glob("*.ckpt"), key=lambda p: int(p.stem.split("step=")[1]))
    assert len(ckpts) >= 12
    for ckpt in ckpts:
        torch.load(ckpt, weights_only=True)  # whatever bears the name is whole
    whole, _ = fit(tmp_path / "whole", "augmented", max_epochs=6)
    resumed, _ = fit(tmp_path / "resumed", "augmented", ckpts[11], max_epochs=6)
    assert_same(whole, resumed)
