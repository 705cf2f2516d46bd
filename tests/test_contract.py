"""Every verb of the contract as the callback runs it, by small methods and against loops by hand."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import lightning_peft as lp
from lightning_peft import PEFT, Method, callback
from tests import methods
from tests.fits import run, same, sgd, smooth, trained
from tests.methods import EVENTS
from tests.nets import Net, trainer, vectors

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
    forward = [f"before_window {index}/{total}", *["training_step", "penalty"] * 2]
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
    placed = ["inject None", "beside 0", "calibrate", "inject 3", "beside 0"]
    assert EVENTS == [*placed, *built, *epoch[0], *epoch[1], *end]
    EVENTS.clear()
    peft = PEFT(methods.Recorder(), merge_at_end=True, folder="resumed")
    trainer(tmp_path, peft, **options).fit(Verbose(), vectors(32), vectors(8), ckpt_path=tmp_path / "step=2.ckpt")
    assert [e for e in EVENTS if e != "validation_step"] == [
        *("inject None", "beside 0", "weights", *built, "moments"),
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
            yield from iter(vectors().dataset)  # pyright: ignore[reportArgumentType]


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
    assert same(trained(hand), trained(ours))
    automatic = Net(smooth)  # one that adds it itself under automatic optimization must not get it twice
    old = automatic.loss
    automatic.loss = lambda batch: old(batch) + torch.as_tensor(lp.penalty(automatic))
    run(tmp_path, automatic, methods.Penalised(), peft={"own_penalty": True})
    assert same(trained(hand), trained(automatic))


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
    assert same(*ends)


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
    unmerged: Any = lp.load(Net(smooth), tmp_path / "adapter", methods=peft.methods)
    difference = (net.net(x) - unmerged.net(x)).abs().max()
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
    assert same(trained(net), trained(again))


PLACED = ("inject", "beside")
VERBS = (*PLACED, "calibrate", "param_groups", "wrap_optimizer", "penalty", "before_step", "after_step", "finish")


def test_methods_belong_in_one_callback(tmp_path: Path) -> None:
    two = PEFT(methods.Plain(name="one")), PEFT(methods.Plain(name="two"))
    with pytest.raises(ValueError, match=r"give one of them all methods, PEFT\(\[A\(\), B\(\)\]\)"):
        trainer(tmp_path, *two).fit(Net(smooth), vectors())


def test_several_methods_run_in_their_order_under_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EVENTS.clear()

    def named(verb: str, old: Any) -> Any:
        def noted(self: Method, *args: Any) -> Any:
            EVENTS.append((self.name, verb))
            return old(self, *args)

        return noted

    for verb in VERBS:
        monkeypatch.setattr(methods.Recorder, verb, named(verb, getattr(methods.Recorder, verb)))
    two: list[Method] = [methods.Recorder(name="one"), methods.Recorder(name="two")]
    net = Net(smooth)
    trainer(tmp_path, PEFT(two), max_steps=1).fit(net, vectors())
    called = [e for e in EVENTS if isinstance(e, tuple)]
    assert [verb for _, verb in called[::2]] == [*PLACED, "calibrate", *PLACED, *VERBS[3:]]
    assert [name for name, _ in called] == ["one", "two"] * 11
    assert list(net.net[0].adapters) == ["one", "two"]
    keys = load_file(tmp_path / "adapter" / "adapter.safetensors").keys()
    assert keys == {f"net.{n}.adapters.{name}.{f}" for n in (0, 2) for name in ("one", "two") for f in "AB"}
    x = next(iter(vectors()))[0]
    weights = [
        layer.weight + sum(layer.adapters[n].B @ layer.adapters[n].A for n in ("one", "two")) for layer in net.net[::2]
    ]
    by_hand = (x @ weights[0].T + net.net[0].bias).tanh() @ weights[1].T + net.net[2].bias
    torch.testing.assert_close(net.net(x), by_hand)
