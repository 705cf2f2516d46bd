"""The adapter folder and the checkpoint without a Trainer: round trips, and every way a file can be wrong."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_peft_plugins.reparameterized.lora import LoRA
from safetensors.torch import load_file, save_file
from torch import nn

import lightning_peft as lp
from lightning_peft import config, io
from lightning_peft.inject import find_record
from lightning_peft.resize import resize
from tests.nets import Net, bert, llama, mlp, trainer, vectors


def made(make: Callable[[], nn.Module] = bert, **changes: Any) -> nn.Module:
    torch.manual_seed(7)
    model = make()
    train = changes.pop("train", ("classifier",) if make is bert else ())
    lp.inject(model, LoRA(**{"r": 3} | changes), train=train)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.2)
    return model.eval()


def base(make: Callable[[], nn.Module] = bert) -> nn.Module:
    torch.manual_seed(7)
    return make().eval()


IDS = torch.arange(12).view(2, 6)


def test_folder_round_trip_is_bitwise(tmp_path: Path) -> None:
    model = made()
    lp.save(model, tmp_path / "a")
    again = lp.load(base(), tmp_path / "a")
    assert torch.equal(model(IDS).logits, again(IDS).logits)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter.json", "adapter.safetensors"]
    assert (tmp_path / "a" / "adapter.safetensors").stat().st_size < 60_000
    saved = load_file(tmp_path / "a" / "adapter.safetensors")
    assert {"classifier.weight", "classifier.bias"} <= saved.keys()
    assert {k for k in saved if "adapters" not in k} == {"classifier.weight", "classifier.bias"}


def test_folder_is_readable_and_names_methods_by_entry_point(tmp_path: Path) -> None:
    lp.save(made(rank_pattern={"*.query": 5}, layers="0"), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter.json").read_text())
    (method,) = config["methods"]
    assert method["method"] == "lora" and method["args"]["rank_pattern"] == {"*.query": 5}
    assert config["train"] == ["classifier.weight", "classifier.bias"] and config["base"]
    again = lp.load(base(), tmp_path / "a")
    assert find_record(again)[1].methods == (LoRA(r=3, rank_pattern={"*.query": 5}, layers="0"),)


def test_moved_ranks_come_back_from_the_file(tmp_path: Path) -> None:
    model = made()
    for n, (_, _, adapter) in enumerate(lp.adapters(model)):
        resize(adapter, "rank", torch.arange(n % 4))
    lp.save(model, tmp_path / "a")
    again = lp.load(base(), tmp_path / "a")
    ranks = [len(adapter.A) for _, _, adapter in lp.adapters(again)]
    assert ranks == [n % 4 for n in range(len(ranks))] and torch.equal(model(IDS).logits, again(IDS).logits)


def test_removed_adapters_stay_removed(tmp_path: Path) -> None:
    model = made()
    name, host, _ = next(iter(lp.adapters(model)))
    lp.detach(host, "lora")
    lp.save(model, tmp_path / "a")
    again = lp.load(base(), tmp_path / "a")
    assert name not in [n for n, _, _ in lp.adapters(again)] and torch.equal(model(IDS).logits, again(IDS).logits)


def test_saving_again_needs_leave_and_loses_nothing(tmp_path: Path) -> None:
    lp.save(made(), tmp_path / "a", run="one")
    before = (tmp_path / "a" / "adapter.safetensors").read_bytes()
    with pytest.raises(ValueError, match="another run's adapter.*overwrite=True"):
        lp.save(made(), tmp_path / "a", run="two")
    assert (tmp_path / "a" / "adapter.safetensors").read_bytes() == before
    lp.save(made(), tmp_path / "a", run="one")
    lp.save(made(), tmp_path / "a", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("do not lose me")
    with pytest.raises(ValueError, match="holds no adapter"):
        lp.save(made(), tmp_path / "mine")


def test_a_crash_while_writing_leaves_the_old_folder_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lp.save(made(), tmp_path / "a", run="one")

    def broken(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(io, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        lp.save(made(alpha=99.0), tmp_path / "a", run="one")
    monkeypatch.undo()
    lp.load(base(), tmp_path / "a")


def test_an_unwritable_place_is_refused_before_work() -> None:
    with pytest.raises(ValueError, match="not a writable directory"):
        io.check_folder(Path("/proc/version/adapter"), "")


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "adapter.json").read_text())
    change(config)
    (folder / "adapter.json").write_text(json.dumps(config))


def swap_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter.safetensors")
    digest = __import__("hashlib").sha256((folder / "adapter.safetensors").read_bytes()).hexdigest()
    edit(folder, lambda c: c.update(sha256=digest))


A_KEY = "bert.encoder.layer.0.attention.self.query.adapters.lora.A"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing file": (lambda f: (f / "adapter.json").unlink(), "is no adapter folder: it needs adapter.json"),
    "truncated tensors": (lambda f: os.truncate(f / "adapter.safetensors", 900), "damaged or truncated"),
    "truncated config": (lambda f: os.truncate(f / "adapter.json", 200), "damaged or truncated"),
    "tensors of another save": (
        lambda f: (f / "adapter.safetensors").write_bytes((f.parent / "b" / "adapter.safetensors").read_bytes()),
        "is not the file that adapter.json was written for",
    ),
    "newer format": (lambda f: edit(f, lambda c: c.update(format=7)), "has format 7"),
    "unknown method": (
        lambda f: edit(f, lambda c: c["methods"][0].update(method="lorra")),
        "no method 'lorra' is installed; nearest: 'lora'",
    ),
    "unknown option": (
        lambda f: edit(f, lambda c: c["methods"][0]["args"].update(alfa=1)),
        r"no option 'alfa' \(nearest: 'alpha'",
    ),
    "missing key": (
        lambda f: swap_tensors(f, lambda t: t.pop(A_KEY)),
        "lacks 1 of .* trained tensors, first '" + A_KEY,
    ),
    "extra key": (
        lambda f: swap_tensors(f, lambda t: t.update({A_KEY.replace("query", "quarry"): t[A_KEY].clone()})),
        "holds 1 adapter tensors that nothing here takes",
    ),
    "wrong width": (
        lambda f: swap_tensors(f, lambda t: t.update({A_KEY: t[A_KEY][:, :20].contiguous()})),
        "has in=32, but its adapter's A 20",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused_and_the_model_is_left_alone(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    lp.save(made(), tmp_path / "a")
    lp.save(made(alpha=1.0), tmp_path / "b")
    swap_tensors(tmp_path / "b", lambda t: t[A_KEY].add_(1))
    change(tmp_path / "a")
    model = base()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        lp.load(model, tmp_path / "a")
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_another_base_is_refused_by_content(tmp_path: Path) -> None:
    lp.save(made(), tmp_path / "a")
    other = base()
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight.mul_(1.01)
    with pytest.raises(
        ValueError, match="another base: 1 of .* differ in shape or values, first 'bert.encoder.layer.1.out"
    ):
        lp.load(other, tmp_path / "a")
    lp.load(other, tmp_path / "a", check_base=False)
    with pytest.raises(ValueError, match="another base"):
        lp.load(base(lambda: bert(type_vocab_size=3)), tmp_path / "a")
    with pytest.raises(ValueError, match="matches no parameter|another base"):
        lp.load(base(llama), tmp_path / "a")


def test_the_same_base_in_bfloat16_is_the_same_base(tmp_path: Path) -> None:
    lp.save(made(), tmp_path / "a")
    lp.load(base().to(torch.bfloat16), tmp_path / "a")


@dataclass(frozen=True, kw_only=True)
class Unregistered(LoRA):
    name: str = "mine"


def test_a_method_without_entry_point_must_be_passed(tmp_path: Path) -> None:
    model = base()
    lp.inject(model, Unregistered(r=2))
    lp.save(model, tmp_path / "a")
    with pytest.raises(ValueError, match="not registered as an entry point, so pass it"):
        lp.load(base(), tmp_path / "a")
    lp.load(base(), tmp_path / "a", methods=[Unregistered(r=2)])


def checkpoint(tmp_path: Path, **changes: Any) -> tuple[Net, Path]:
    net = Net()
    fit = trainer(tmp_path, lp.PEFT(LoRA(**{"r": 3} | changes), folder=None))
    fit.fit(net, vectors())
    fit.save_checkpoint(tmp_path / "c.ckpt")
    return net, tmp_path / "c.ckpt"


def test_restore_needs_no_trainer(tmp_path: Path) -> None:
    net, path = checkpoint(tmp_path)
    again = Net()
    lp.restore(again, path)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"r": 4}, "other hyper-parameters of 'lora': r=3 there, 4 now"),
        ({"r": 3, "alpha": 32.0}, "alpha=16.0 there, 32.0 now"),
        ({"r": 3, "name": "other"}, "name='lora' there, 'other' now"),
    ],
)
def test_resuming_with_changed_hyper_parameters_is_refused(now: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, path = checkpoint(tmp_path)
    net = Net()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "b", lp.PEFT(LoRA(**now), folder=None)).fit(net, vectors(), ckpt_path=path)
    assert not net.losses


def test_resuming_another_method_or_base_is_refused(tmp_path: Path) -> None:
    _, path = checkpoint(tmp_path)
    with pytest.raises(ValueError, match="holds adapters of .'lora'., but this run's methods are .*Unregistered"):
        trainer(tmp_path / "b", lp.PEFT(Unregistered(r=3), folder=None)).fit(Net(), vectors(), ckpt_path=path)
    net = Net(lambda: mlp().apply(lambda m: nn.init.ones_(m.weight) if isinstance(m, nn.Linear) else None))
    with pytest.raises(ValueError, match="another base: 3 of 6 frozen tensors differ"):
        trainer(tmp_path / "c", lp.PEFT(LoRA(r=3), folder=None)).fit(net, vectors(), ckpt_path=path)
    assert not net.losses


def test_a_plain_checkpoint_is_refused_with_the_way_to_use_it(tmp_path: Path) -> None:
    plain = trainer(tmp_path)
    plain.fit(Net(), vectors())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="written without lightning-peft.*load_state_dict"):
        trainer(tmp_path / "b", lp.PEFT(LoRA(), folder=None)).fit(Net(), vectors(), ckpt_path=tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="was not written with lightning-peft"):
        lp.restore(Net(), tmp_path / "plain.ckpt")


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_truncated_checkpoint_is_refused(size: int, tmp_path: Path) -> None:
    _, path = checkpoint(tmp_path)
    shutil.copy(path, tmp_path / "half.ckpt")
    os.truncate(tmp_path / "half.ckpt", size)
    with pytest.raises(ValueError, match="half.ckpt is not a complete checkpoint"):
        trainer(tmp_path / "b", lp.PEFT(LoRA(r=3), folder=None)).fit(Net(), vectors(), ckpt_path=tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match="half.ckpt is not a complete checkpoint"):
        lp.restore(Net(), tmp_path / "half.ckpt")


def test_fields_that_are_methods_survive_the_config() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Outer(LoRA):
        parts: tuple[lp.Method, ...] = ()

    data = json.loads(json.dumps(config.config_of(Outer(parts=(LoRA(r=2), LoRA(name="b", targets=("x", "y")))))))
    assert tuple(config.method_from(c) for c in data["args"]["parts"]) == (
        LoRA(r=2),
        LoRA(name="b", targets=("x", "y")),
    )
