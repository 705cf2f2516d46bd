"""The callback in a Trainer the user already has, with modules that know nothing of us."""

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from lightning_peft_plugins.reparameterized.lora import LoRA
from torch import nn

import lightning_peft as lp
from lightning_peft import PEFT
from tests.nets import HFNet, Net, bert, cnn, llama, mlp, tokens, trainer, vectors


def base_state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items() if "adapters" not in k}


def adapter_state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v for k, v in net.state_dict().items() if "adapters" in k}


def lora(**changes: Any) -> LoRA:
    return LoRA(**{"r": 4, "targets": ("all-linear",)} | changes)


@pytest.mark.parametrize("where", ["init", "setup", "configure_model"])
def test_base_stays_and_adapters_move_wherever_the_network_is_made(where: str, tmp_path: Any) -> None:
    torch.manual_seed(7)
    start = base_state(mlp())
    net = Net(where=where)
    trainer(tmp_path, PEFT(lora())).fit(net, vectors(), vectors())
    for key, value in base_state(net.net).items():
        assert torch.equal(value, start[key]), key
    moved = adapter_state(net.net)
    assert len(moved) == 6
    assert all(bool(v.any()) for k, v in moved.items() if k.endswith("B"))
    trainable = {n for n, p in net.named_parameters() if p.requires_grad}
    assert trainable == {f"net.{k}" for k in moved}


@pytest.mark.parametrize(
    ("make", "module", "data"),
    [(bert, HFNet, tokens), (llama, HFNet, lambda: tokens(lm=True)), (cnn, Net, lambda: vectors(images=True))],
    ids=["bert", "llama", "cnn"],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_models_and_precisions(make: Any, module: Any, data: Any, precision: str, tmp_path: Any) -> None:
    net = module(make)
    fit = trainer(tmp_path, PEFT(lora()), precision=precision, max_epochs=8, gradient_clip_val=1.0)
    fit.fit(net, data(), data())
    assert net.losses[-1] < net.losses[0]
    assert {v.dtype for v in adapter_state(net.net).values()} == {torch.float32}


def test_frozen_batchnorm_keeps_its_statistics(tmp_path: Any) -> None:
    net = Net(cnn)
    before = base_state(net.net)
    trainer(tmp_path, PEFT(lora())).fit(net, vectors(images=True), vectors(images=True))
    assert all(torch.equal(v, before[k]) for k, v in base_state(net.net).items())


def test_trained_batchnorm_updates_its_statistics_and_saves_them(tmp_path: Any) -> None:
    net = Net(cnn)
    before = base_state(net.net)
    trainer(tmp_path, PEFT(lora(), train=("net.1",))).fit(net, vectors(images=True))
    assert not torch.equal(net.net.state_dict()["1.running_mean"], before["1.running_mean"])
    again = Net(cnn)
    lp.load(again, tmp_path / "adapter")
    assert torch.equal(again.net.state_dict()["1.running_mean"], net.net.state_dict()["1.running_mean"])


def several_groups(net: Net) -> Any:
    return torch.optim.AdamW(
        [{"params": net.net[0].parameters()}, {"params": net.net[3:].parameters(), "lr": 1e-3}], 1e-2
    )


def filtered(net: Net) -> Any:
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)


def scheduled(net: Net) -> Any:
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=net.trainer.estimated_stepping_batches)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("optimizer", [several_groups, filtered, scheduled])
def test_user_optimizers_hold_every_adapter_once(optimizer: Any, tmp_path: Any) -> None:
    net = Net(optimizer=optimizer)
    fit = trainer(tmp_path, PEFT(lora()))
    fit.fit(net, vectors())
    held = [id(p) for o in fit.optimizers for g in o.param_groups for p in g["params"]]
    for p in net.parameters():
        if p.requires_grad:
            assert held.count(id(p)) == 1
    assert all(bool(v.any()) for k, v in adapter_state(net.net).items() if k.endswith("B"))


def test_optimizer_made_before_injection_gets_the_adapters_in_its_first_group(tmp_path: Any, caplog: Any) -> None:
    early: dict[str, Any] = {}

    def made_in_init(net: Net) -> Any:
        return early["optimizer"]

    net = Net(optimizer=made_in_init)
    early["optimizer"] = torch.optim.AdamW(net.parameters(), 1e-2)
    with caplog.at_level("INFO", logger="lightning_peft"):
        trainer(tmp_path, PEFT(lora())).fit(net, vectors())
    assert "to the first group of AdamW" in caplog.text and "added 6 trainable tensors" in caplog.text
    assert all(bool(v.any()) for k, v in adapter_state(net.net).items() if k.endswith("B"))


class TwoOptimizers(Net):
    def __init__(self, leave_out: bool) -> None:
        super().__init__()
        self.automatic_optimization, self.leave_out = False, leave_out

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for o in self.optimizers():
            o.zero_grad()
        self.manual_backward(self.loss(batch))
        for o in self.optimizers():
            o.step()

    def configure_optimizers(self) -> Any:
        first = [p for n, p in self.net[0].named_parameters() if not self.leave_out or "adapters" not in n]
        return torch.optim.SGD(first, 0.1), torch.optim.AdamW(self.net[3:].parameters(), 1e-2)


def test_several_optimizers_train_and_missing_parameters_are_refused(tmp_path: Any) -> None:
    net = TwoOptimizers(leave_out=False)
    trainer(tmp_path, PEFT(lora())).fit(net, vectors())
    assert all(bool(v.any()) for k, v in adapter_state(net.net).items() if k.endswith("B"))
    with pytest.raises(ValueError, match="which one should train them is not clear"):
        trainer(tmp_path / "b", PEFT(lora())).fit(TwoOptimizers(leave_out=True), vectors())


class Backbone(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = mlp(), nn.Linear(3, 3)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def test_model_and_train_limit_where_we_act(tmp_path: Any) -> None:
    module = Backbone()
    head = module.head.weight.clone()
    layer = module.backbone[3].weight.clone()
    peft = PEFT(lora(targets=("0", "5")), model="backbone", train=("head.*", "backbone.3.weight"))
    trainer(tmp_path, peft, ModelCheckpoint(tmp_path, filename="last")).fit(module, vectors())
    assert not torch.equal(module.head.weight, head)
    assert not torch.equal(module.backbone[3].weight, layer)
    assert not hasattr(module.backbone[3], "adapters")
    assert not any(p.requires_grad for p in (module.backbone[3].bias, module.backbone[0].weight))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {"head.weight", "head.bias", "backbone.3.weight"} <= saved.keys() and "backbone.0.weight" not in saved


def test_early_stopping_best_checkpoint_and_every_stage(tmp_path: Any) -> None:
    net = Net()
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    fit = trainer(tmp_path, PEFT(lora()), best, EarlyStopping("val_loss", patience=2), max_epochs=4)
    fit.fit(net, vectors(), vectors(shuffle=False))
    after_fit = fit.validate(net, vectors(shuffle=False), verbose=False)[0]["val_loss"]
    best_loss = fit.validate(net, vectors(shuffle=False), ckpt_path="best", verbose=False)[0]["val_loss"]
    assert best_loss == pytest.approx(float(best.best_model_score), abs=1e-6) and best_loss <= after_fit + 1e-6
    assert fit.test(net, vectors(shuffle=False), ckpt_path="best", verbose=False)[0]["test_loss"] == best_loss
    assert len(fit.predict(net, vectors(shuffle=False), ckpt_path="last")) == 6
    fresh = trainer(tmp_path / "other", PEFT(lora())).validate(
        Net(), vectors(shuffle=False), ckpt_path=best.best_model_path, verbose=False
    )
    assert fresh[0]["val_loss"] == best_loss


def test_weights_only_checkpoint_serves_every_stage_but_resume(tmp_path: Any) -> None:
    net = Net()
    fit = trainer(tmp_path, PEFT(lora()), ModelCheckpoint(tmp_path, filename="w", save_weights_only=True))
    fit.fit(net, vectors())
    want = torch.cat(fit.predict(net, vectors(shuffle=False)))
    other = Net()
    got = torch.cat(
        trainer(tmp_path / "b", PEFT(lora())).predict(other, vectors(shuffle=False), ckpt_path=tmp_path / "w.ckpt")
    )
    assert torch.equal(got, want)
    assert (tmp_path / "w.ckpt").stat().st_size < 20_000


def test_two_fits_in_a_row_go_on_with_the_same_adapters(tmp_path: Any) -> None:
    net, peft = Net(), PEFT(lora())
    trainer(tmp_path, peft, max_epochs=1).fit(net, vectors())
    first = {k: v.clone() for k, v in adapter_state(net.net).items()}
    trainer(tmp_path, peft, max_epochs=1).fit(net, vectors())
    assert first.keys() == adapter_state(net.net).keys()
    assert not any(torch.equal(v, first[k]) for k, v in adapter_state(net.net).items())
    with pytest.raises(ValueError, match="already holds other adapters"):
        trainer(tmp_path / "b", PEFT(lora(r=2))).fit(net, vectors())


def test_merge_at_end_is_proven_and_undone_for_what_follows(tmp_path: Any) -> None:
    net, peft = Net(), PEFT(lora(), merge_at_end=True)
    before = base_state(net.net)
    fit = trainer(tmp_path, peft, ModelCheckpoint(tmp_path, filename="last"))
    fit.fit(net, vectors(), vectors())
    assert not adapter_state(net.net) and type(net.net[0]) is nn.Linear
    merged = base_state(net.net)
    assert not torch.equal(merged["0.weight"], before["0.weight"]) and torch.equal(merged["0.bias"], before["0.bias"])
    outputs = torch.cat(trainer(tmp_path / "plain").predict(net, vectors(shuffle=False)))
    tested = torch.cat(fit.predict(net, vectors(shuffle=False), ckpt_path=tmp_path / "last.ckpt"))
    assert torch.allclose(outputs, tested, atol=1e-5)
    assert all(torch.equal(v, merged[k]) for k, v in base_state(net.net).items())  # merged again after the stage
    trainer(tmp_path, peft, max_epochs=1).fit(net, vectors())  # trains on from the same adapters, on the true base
    peft._merged.undo()
    assert all(torch.equal(v, before[k]) for k, v in base_state(net.net).items())


def test_checkpoints_saved_by_hand_after_the_fit(tmp_path: Any) -> None:
    net = Net()
    fit = trainer(tmp_path, PEFT(lora()))
    fit.fit(net, vectors())
    fit.save_checkpoint(tmp_path / "late.ckpt")
    again = lp.restore(Net(), tmp_path / "late.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    copied = copy.deepcopy(net)
    copied.net[0].adapters["lora"].B.data.add_(1)
    assert not torch.equal(copied.net[0].adapters["lora"].B, net.net[0].adapters["lora"].B)
    merged = Net()
    fit = trainer(tmp_path / "m", PEFT(lora(), merge_at_end=True))
    fit.fit(merged, vectors())
    fit.save_checkpoint(tmp_path / "merged.ckpt")  # a merged model is a plain one, and its checkpoint whole
    plain = Net.load_from_checkpoint(tmp_path / "merged.ckpt", weights_only=False)
    assert torch.equal(plain.net[0].weight, merged.net[0].weight)


def test_teardown_leaves_no_trace_on_the_module(tmp_path: Any) -> None:
    net = Net()
    attributes = set(vars(net))
    trainer(tmp_path, PEFT(lora())).fit(net, vectors())
    assert set(vars(net)) - attributes <= {
        "lightning_peft_record",
        "on_save_checkpoint",
        "_hparams",
    }  # the last is Lightning's own
    assert net.strict_loading


def test_lr_finder_leaves_the_adapters_as_they_were(tmp_path: Any) -> None:
    net = Net()
    fit = trainer(tmp_path, PEFT(lora()), enable_checkpointing=True, max_epochs=3)
    found = Tuner(fit).lr_find(net, vectors(160), num_training=20, attr_name="lr")
    assert found is not None and found.results["lr"]
    assert not any(bool(v.any()) for k, v in adapter_state(net.net).items() if k.endswith("B"))
    fit.fit(net, vectors())
    assert all(bool(v.any()) for k, v in adapter_state(net.net).items() if k.endswith("B"))


def test_more_of_the_model_made_later_is_injected_too(tmp_path: Any) -> None:
    class Late(Net):
        def configure_model(self) -> None:
            if len(self.net) == 6:
                self.net.append(nn.Linear(3, 3))

    net = Late()
    trainer(tmp_path, PEFT(lora())).fit(net, vectors())
    assert sorted(n for n, _, _ in lp.adapters(net.net)) == ["0", "3", "5", "6"]


def test_a_missing_target_and_a_missing_submodule_stop_before_training(tmp_path: Any) -> None:
    for peft, message in [
        (PEFT(lora(targets=("q_proj",))), "no .* matches 'q_proj'"),
        (PEFT(lora(), model="backbon"), "no such module; nearest"),
        (PEFT(lora(), train=("hed.*",)), r"train='hed.\*'\) matches no parameter"),
    ]:
        net = Net()
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, peft).fit(net, vectors())
        assert not net.losses


def test_an_output_folder_of_another_run_is_not_overwritten(tmp_path: Any) -> None:
    trainer(tmp_path, PEFT(lora())).fit(Net(), vectors())
    written = (tmp_path / "adapter" / "adapter.safetensors").read_bytes()
    net = Net()
    with pytest.raises(ValueError, match="holds another run's adapter"):
        trainer(tmp_path, PEFT(lora())).fit(net, vectors())
    assert not net.losses and (tmp_path / "adapter" / "adapter.safetensors").read_bytes() == written
    trainer(tmp_path, PEFT(lora(), overwrite=True)).fit(Net(), vectors())


def test_clamped_ranks_are_said(tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match="net.5: r=4 clamped to its smaller side 3"):
        trainer(tmp_path, PEFT(lora())).fit(Net(), vectors())
