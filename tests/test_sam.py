"""SAM and ASAM: worked numbers, fits against loops by hand, and what its second pass must not leave behind."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning_peft_plugins.lifecycle.bsam import BSAM
from lightning_peft_plugins.lifecycle.sam import SAM
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

import lightning_peft as lp
from lightning_peft import PEFT, Method, Passes, Step, passes, strategies
from tests import methods
from tests.fits import SaveAt, adam, run, same, smooth, trained
from tests.launch import launch
from tests.nets import Net, cnn, trainer, vectors
from tests.test_strategies import TWO, half

Rule = Callable[[Callable[[], list[Tensor]], list[nn.Parameter]], list[Tensor]]


class Bowl(nn.Module):
    """0.5 w^T diag(d) w of a float64 vector, in two tensors: a norm for each alone would give other numbers."""

    def __init__(self, *w: float) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor([x], dtype=torch.float64)) for x in w)

    def loss(self, d: tuple[float, float], scale: float = 1.0) -> Tensor:
        return scale * 0.5 * (d[0] * self.a.square() + d[1] * self.b.square()).sum()


def gradient(method: Method, bowl: Bowl, d: tuple[float, float] = (1, 10), scale: float = 1.0, lr: float = 0.01) -> Any:
    """(gradient that the method makes, number of passes)."""
    seen = []

    def once() -> Tensor:
        bowl.zero_grad()
        with torch.enable_grad():
            (loss := bowl.loss(d, scale)).backward()
        seen.append(loss)
        return loss.detach()

    given = Passes(loss=once(), again=lambda replay=False: once(), average=lambda: None)
    method.after_backward(bowl, Step(index=0, optimizers=[torch.optim.SGD(bowl.parameters(), lr)]), given)
    return [float(p.grad) for p in bowl.parameters()], len(seen)  # type: ignore[arg-type]


def test_the_worked_numbers() -> None:
    bowl = Bowl(1, 1)
    found, count = gradient(SAM(rho=0.05), bowl)
    assert found == pytest.approx([1.00497519, 10.49751860], abs=1e-8) and count == 2
    assert [1 - 0.01 * g for g in found] == pytest.approx([0.98995025, 0.89502481], abs=1e-8)
    assert [float(p) for p in bowl.parameters()] == [1, 1]
    up = bowl.loss((1, 10)).item()
    higher = 0.5 * (1.00497519**2 + 10 * 1.04975186**2)
    assert SAM().report(bowl)["sharpness"]["loss"] == pytest.approx(higher - up, abs=1e-7)


def test_the_worked_numbers_of_asam() -> None:
    e = (0.08479983, 0.01324997)
    found, _ = gradient(SAM(rho=0.05, adaptive=True), Bowl(2, 0.5))
    assert found == pytest.approx([2 + e[0], 10 * (0.5 + e[1])], abs=1e-7)
    plain, _ = gradient(SAM(rho=0.05), Bowl(2, 0.5))
    assert [plain[0] - 2, plain[1] / 10 - 0.5] == pytest.approx([0.01856953, 0.04642383], abs=1e-8)


@pytest.mark.parametrize("method", [SAM(), SAM(adaptive=True), BSAM()], ids=repr)
def test_the_scale_of_the_loss_only_scales_the_gradient(method: Method) -> None:
    one, many = gradient(method, Bowl(1, 1))[0], gradient(method, Bowl(1, 1), scale=65536.0)[0]
    assert many == pytest.approx([65536 * g for g in one], rel=1e-9)


def test_each_batch_of_a_window_moves_on_its_own() -> None:
    found = [gradient(SAM(rho=0.05), Bowl(1, 1), d)[0] for d in ((2, 0), (0, 20))]
    assert [(a + b) / 2 for a, b in zip(*found, strict=True)] == pytest.approx([1.05, 10.5], abs=1e-9)


def test_a_gradient_of_zero_does_not_divide_by_it() -> None:
    assert gradient(SAM(), Bowl(0, 0))[0] == [0, 0] and gradient(BSAM(), Bowl(0, 0))[0] == [0, 0]


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_a_bad_distance_is_refused(rho: float) -> None:
    with pytest.raises(ValueError, match=r"sam: rho is a distance of at least 0, such as 0\.05, got "):
        SAM(rho=rho)


# ---- fits -----------------------------------------------------------------------------------------------------------


class Shifted(Net):
    """Trains a parameter outside of where methods are injected: the weights move as one vector with it."""

    def build(self) -> None:
        super().build()
        self.shift = nn.Parameter(torch.zeros(3))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x) + self.shift, y)


INSIDE: dict[str, Any] = {"peft": {"model": "net"}}


def hand() -> Shifted:
    net = Shifted(smooth)
    L.seed_everything(5, verbose=False)
    lp.inject(net.net, methods.Plain())
    return net


def sam(at: Callable[[], list[Tensor]], weights: list[nn.Parameter], rho: float = 0.3) -> list[Tensor]:
    """SAM's gradient, written down once more, in float64 where it divides."""
    g, start = at(), [p.detach().clone() for p in weights]
    n = torch.cat([x.double().flatten() for x in g]).norm()
    with torch.no_grad():
        for p, x in zip(weights, g, strict=True):
            p.copy_((p.double() + rho * x.double() / n).float())
    found = at()
    with torch.no_grad():
        for p, w in zip(weights, start, strict=True):
            p.copy_(w)
    return found


def by_hand(
    rule: Rule, batches: list[list[Any]], accumulate: int, clip: float | None = None, bf16: bool = False
) -> Net:
    """Steps of AdamW over windows; ``batches`` lists those of each process, whose gradients are averaged."""
    net = hand()
    optimizer, weights = adam(net), [p for p in net.parameters() if p.requires_grad]
    for start in range(0, len(batches[0]), accumulate):
        total = [torch.zeros_like(p) for p in weights]
        for batch in [b for held in batches for b in held[start : start + accumulate]]:

            def at(batch: Any = batch) -> list[Tensor]:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
                    loss = net.loss(batch)
                return list(torch.autograd.grad(loss / accumulate, weights))

            total = [t + x / len(batches) for t, x in zip(total, rule(at, weights), strict=True)]
        for p, t in zip(weights, total, strict=True):
            p.grad = t
        if clip:
            torch.nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()
    return net


def test_a_fit_with_accumulation_and_clipping_is_the_loop_by_hand(tmp_path: Path) -> None:
    net = Shifted(smooth, optimizer=adam)
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2, "max_steps": 3} | INSIDE
    run(tmp_path, net, [methods.Plain(), SAM(rho=0.3)], **options)
    batches = list(vectors(shuffle=False))
    torch.testing.assert_close(trained(net), trained(by_hand(sam, [batches], 2, 0.2)), rtol=0, atol=2e-6)
    other = by_hand(lambda at, _: at(), [batches], 2, 0.2)
    assert max(float((a - b).abs().max()) for a, b in zip(trained(net), trained(other), strict=True)) > 1e-4
    assert len(net.losses) == 2 * 6


def test_bf16_mixed_is_the_loop_by_hand(tmp_path: Path) -> None:
    net = Shifted(smooth, optimizer=adam)
    run(tmp_path, net, [methods.Plain(), SAM(rho=0.3)], precision="bf16-mixed", max_steps=6, **INSIDE)
    batches = list(vectors(shuffle=False))
    torch.testing.assert_close(trained(net), trained(by_hand(sam, [batches], 1, bf16=True)), rtol=0, atol=5e-4)


def test_a_penalty_is_part_of_both_passes(tmp_path: Path) -> None:
    def penalised(net: Net) -> Tensor:
        return 0.05 * sum((p.square().sum() for _, _, a in lp.adapters(net) for p in a.parameters()), torch.zeros(()))

    class Added(Net):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) + penalised(self)

    nets = [Net(smooth, optimizer=adam), Added(smooth, optimizer=adam)]
    run(tmp_path, nets[0], [methods.Penalised(weight=0.05), SAM(rho=0.3)])
    run(tmp_path, nets[1], [methods.Penalised(weight=0.0), SAM(rho=0.3)])
    torch.testing.assert_close(trained(nets[0]), trained(nets[1]), rtol=0, atol=1e-6)


def test_at_distance_zero_it_is_the_user_s_optimizer_bit_for_bit(tmp_path: Path) -> None:
    fits = []
    for more in ([], [SAM(rho=0.0)]):
        net = Net(smooth, optimizer=adam)
        run(tmp_path, net, [methods.Plain(), *more], accumulate_grad_batches=2)
        fits.append(trained(net))
    assert same(*fits)


# ---- what the second pass leaves ------------------------------------------------------------------------------------


class Measured(Net):
    """Logs a loss and metrics, trains a batch norm, and draws random numbers."""

    def build(self) -> None:
        super().build()
        self.mean, self.count, self.draws = MeanMetric(), SumMetric(), []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.draws.append(float(torch.rand(())))
        self.mean(loss.detach())
        self.count.update(len(batch[0]))
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"mean": self.mean, "examples": self.count}, on_step=False, on_epoch=True)
        return {"loss": loss, "extra": 1}


def measured(root: Path, *more: Method) -> tuple[Measured, dict[str, float]]:
    net = Measured(cnn, optimizer=lambda n: torch.optim.SGD(n.parameters(), 0.0))
    data, options = vectors(shuffle=False, images=True), {"peft": {"train": ("net.1.*",), "watch_steps": 0}}
    fit = run(
        root, net, [methods.Plain(), *more], data=data, max_epochs=1, max_steps=-1, log_every_n_steps=1, **options
    )
    return net, {k: float(v) for k, v in fit.callback_metrics.items() if not k.startswith(("sam", "bsam"))}


@pytest.mark.parametrize("method", [SAM(rho=0.7), BSAM(rho=0.7, rho_min_max=0.3)], ids=["sam", "bsam"])
def test_logs_metrics_statistics_and_weights_are_the_first_pass_s(method: Method, tmp_path: Path) -> None:
    plain, logged = measured(tmp_path)
    net, seen = measured(tmp_path, method)
    assert seen == logged and logged["examples"] == 48 and {"loss_step", "loss_epoch", "mean"} <= set(logged)
    assert same(trained(plain), trained(net))
    assert same(plain.net[1].buffers(), net.net[1].buffers()) and int(net.net[1].num_batches_tracked) == 6


@pytest.mark.parametrize("replay", [True, False])
def test_random_numbers_of_the_passes(replay: bool, tmp_path: Path) -> None:
    plain = measured(tmp_path)[0].draws
    draws = measured(tmp_path, SAM(replay_rng=replay))[0].draws
    assert [a == b for a, b in zip(draws[::2], draws[1::2], strict=True)] == [replay] * 6
    assert (draws[::2] == plain) == replay and len(set(draws)) == (6 if replay else 12)


def test_weights_come_back_when_a_pass_fails(tmp_path: Path) -> None:
    class Failing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if len(self.losses) == 3:
                self.before = before
                raise RuntimeError("out of memory")
            before.extend([] if before else trained(self))
            return super().training_step(batch, batch_idx)

    before: list[Tensor] = []
    net = Failing(smooth, optimizer=lambda n: torch.optim.SGD(n.parameters(), 0.0))
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, net, [methods.Plain(), SAM(rho=1.0)])
    assert before and same(before, trained(net))


def test_frozen_weights_stay_and_a_second_fit_finds_nothing_left(tmp_path: Path) -> None:
    net = Net(smooth, optimizer=adam)
    base = [net.net[i].weight.clone() for i in (0, 2)]
    fit = run(tmp_path, net, [methods.Plain(), SAM(rho=0.3)])
    assert same(base, [net.net[i].weight for i in (0, 2)]) and net.net[0].weight.grad is None
    assert "backward" not in vars(net) and "training_step" not in vars(fit.strategy) and "log" not in vars(net)


def test_a_fit_logs_the_sharpness(tmp_path: Path) -> None:
    fit = run(tmp_path, Net(smooth, optimizer=adam), [methods.Plain(), SAM(rho=0.3)], log_every_n_steps=1)
    assert fit.callback_metrics["sam/sharpness"] > 0


# ---- resume, processes ----------------------------------------------------------------------------------------------


def warm(net: Net) -> Any:
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("method", [SAM(rho=0.3), BSAM(replay_rng=True)], ids=["sam", "bsam"])
@pytest.mark.parametrize("saved", [1, 4, 5])
def test_resume_is_bitwise_also_inside_a_window(saved: int, method: Method, tmp_path: Path) -> None:
    fits = []
    for ckpt in (None, tmp_path / f"{saved}.ckpt"):
        net = Net(optimizer=warm)  # with dropout
        save = [SaveAt(tmp_path, (saved,))] if ckpt is None else []
        options: dict[str, Any] = {"data": vectors(), "accumulate_grad_batches": 2, "ckpt_path": ckpt}
        fit = run(tmp_path, net, [methods.Plain(), method], *save, **options)
        fits.append([*trained(net), *(t for s in fit.optimizers[0].state.values() for t in s.values())])
    assert len(fits[0]) > 4 and same(*fits)


RANKED: dict[str, Method] = {
    "sam": SAM(rho=0.3),
    "sam-joint": SAM(rho=0.3, sync_perturbation=True),
    "bsam": BSAM(rho=0.3, rho_min_max=0.2),
}


def two_processes(folder: str) -> dict[str, list[Tensor]]:
    """Fits under DDP: the weights on this rank, and that a resumed one ends at the same bits."""
    out: dict[str, list[Tensor]] = {}
    for kind, method in RANKED.items():
        root = Path(folder, kind)
        for ckpt in (None, root / "3.ckpt"):
            net = Shifted(smooth, optimizer=adam)
            options: dict[str, Any] = TWO | {"accumulate_grad_batches": 2, "max_steps": 3}
            save = [SaveAt(root, (3,))] if ckpt is None else []
            run(root, net, [methods.Plain(), method], *save, data=half(), ckpt_path=ckpt, **options | INSIDE)
            assert ckpt is None or same(out[kind], trained(net)), kind
            out[kind] = trained(net)
    return out | {"uneven": uneven()}


def uneven() -> list[Tensor]:
    """Means where a rank has no gradient: of the first tensor none has, of the second one, of the third both."""
    rank = int(os.environ["LOCAL_RANK"])
    held = [nn.Parameter(torch.zeros(n)) for n in (2, 3, 1)]
    held[1].grad = torch.arange(3.0) if rank else None
    held[2].grad = torch.tensor([float(1 + 4 * rank)])
    passes.Rerun._average(SimpleNamespace(_ddp=lambda: True), held)  # type: ignore[arg-type]
    return [torch.empty(0) if p.grad is None else p.grad for p in held]


def test_two_processes_average_and_agree_and_resume_bitwise(tmp_path: Path) -> None:
    first, second = launch(two_processes, folder=str(tmp_path))
    x, y = vectors().dataset.tensors  # type: ignore[attr-defined]
    shares = [[(x[r::2][i : i + 4], y[r::2][i : i + 4]) for i in range(0, 24, 4)] for r in range(2)]
    whole = [[(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in zip(*shares, strict=True)]]
    for kind in first:
        assert same(first[kind], second[kind])
    assert same(first["uneven"], [torch.empty(0), torch.tensor([0.0, 0.5, 1.0]), torch.tensor([3.0])])
    torch.testing.assert_close(first["sam"], trained(by_hand(sam, shares, 2)), rtol=0, atol=2e-6)
    # the mean of both shares' gradients moves the weights; each share's own gradient there is averaged again
    torch.testing.assert_close(first["sam-joint"], trained(by_hand(sam, whole, 2)), rtol=0, atol=2e-6)
    assert not torch.allclose(first["sam"][0], first["sam-joint"][0], rtol=0, atol=1e-5)


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(match: str, root: Path, held: list[Method], net: Net | None = None, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        run(root, Net(smooth, optimizer=adam) if net is None else net, held, **options)


class Manual(Net):
    def __init__(self) -> None:
        super().__init__(smooth)
        self.automatic_optimization = False


def test_what_cannot_work_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Method] = [methods.Plain(), SAM()]
    refused(r"\['sam', 'bsam'\] each make the gradient in several passes", tmp_path, [*held, BSAM()])
    refused(r"\['sam'\] run training_step several times.*manual optimization of Manual", tmp_path, held, Manual())
    half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    refused(r"\['sam'\].*precision='16-mixed' scales.*use 'bf16-mixed'", tmp_path, held, plugins=[half])
    with monkeypatch.context() as patch:
        patch.setattr(strategies, "shards", lambda trainer: True)
        refused(r"\['sam'\] move whole weights.*SingleDeviceStrategy shards.*'ddp'", tmp_path, held)
    bf16: dict[str, Any] = {"peft": {"dtype": "bfloat16"}}
    refused(r"sam moves each weight by far less than torch.bfloat16.*precision='bf16-mixed'", tmp_path, held, **bf16)


def test_alone_it_trains_nothing_and_says_so(tmp_path: Path) -> None:
    frozen = Net(smooth, optimizer=lambda n: torch.optim.SGD(n.parameters(), 0.1))
    fit = trainer(tmp_path, PEFT(SAM(), folder=None), max_steps=1)
    with pytest.raises(ValueError, match=r"sam trains nothing by itself: list it beside a method"):
        fit.fit(frozen, vectors())
