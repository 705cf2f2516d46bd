"""GaLore: by the plain loop of its definition, worked numbers, and what a fit keeps, restores and refuses."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning_peft_plugins.lifecycle import projected, projectors
from lightning_peft_plugins.lifecycle.galore import GaLore
from lightning_peft_plugins.lifecycle.natural_galore import NaturalGaLore
from lightning_peft_plugins.reparameterized.lora import LoRA
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import lightning_peft as lp
from lightning_peft import PEFT, Step
from lightning_peft.inject import find_record
from lightning_peft.io import TENSORS
from tests.fits import SaveAt, run, same, smooth, trained
from tests.launch import launch
from tests.nets import Net, mlp, vectors

FINE = torch.float64


def net(*shapes: tuple[int, int]) -> nn.ModuleList:
    """Layers of (out, in), in float64 and without biases."""
    torch.manual_seed(3)
    return nn.ModuleList(nn.Linear(i, o, bias=False) for o, i in shapes).to(FINE)


def gradients(model: nn.Module, steps: int) -> list[list[Tensor]]:
    g = torch.Generator().manual_seed(9)
    return [[torch.randn(p.shape, generator=g, dtype=FINE) for p in model.parameters()] for _ in range(steps)]


def loop(
    model: nn.Module, method: lp.Method, make: Callable[[Any], Optimizer], grads: list[list[Tensor]], first: int = 0
) -> Optimizer:
    """The host's loop with given gradients, after injection."""
    if find_record(model) is None:
        lp.inject(model, method)
    optimizer = method.wrap_optimizer(make([p for p in model.parameters() if p.requires_grad]), model)
    steps(model, method, optimizer, grads, first)
    return optimizer


def steps(model: nn.Module, method: lp.Method, optimizer: Optimizer, grads: list[list[Tensor]], first: int = 0) -> None:
    for index, step in enumerate(grads, first):
        for p, g in zip(model.parameters(), step, strict=True):
            p.grad = g.clone().to(p.dtype)
        method.before_step(model, Step(index=index, optimizers=[optimizer]))
        optimizer.step()
        method.after_step(model, Step(index=index + 1, optimizers=[optimizer]))
        optimizer.zero_grad()


def by_definition(
    W: Tensor, grads: list[Tensor], r: int, T: int, scale: float, lr: float, decay: float = 0.0
) -> Tensor:
    """The card's formulas, one weight: Adam on R, (0.9, 0.999), eps 1e-8; decoupled decay of the whole weight."""
    W, M, V, Q = W.clone(), 0.0, 0.0, None
    right = W.shape[0] >= W.shape[1]
    for t, G in enumerate(grads):
        if t % T == 0:
            U, _, Vh = torch.linalg.svd(G)
            Q = Vh[:r] if right else U[:, :r]
        R = G @ Q.T if right else Q.T @ G
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R * R
        N = (M / (1 - 0.9 ** (t + 1))) / ((V / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        W = W - lr * decay * W - lr * scale * (N @ Q if right else Q @ N)
    return W


SHAPES = [(9, 5), (5, 9), (6, 6)]


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_plain_loop_of_the_definition(decay: float) -> None:
    model = net(*SHAPES)
    start, grads = [p.detach().clone() for p in model.parameters()], gradients(model, 7)
    loop(model, GaLore(r=2, update_proj_gap=3, targets=("*",)), lambda p: AdamW(p, 0.05, weight_decay=decay), grads)
    for i, p in enumerate(model.parameters()):
        want = by_definition(start[i], [g[i] for g in grads], 2, 3, 0.25, 0.05, decay)
        torch.testing.assert_close(p.detach(), want, rtol=1e-9, atol=1e-9)


def test_worked_step_whatever_the_sign_of_a_singular_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    G = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=FINE)
    for sign in (1, -1):
        svd = torch.linalg.svd
        monkeypatch.setattr(
            torch.linalg, "svd", lambda G, s=sign, f=svd, **k: (s * (o := f(G, **k))[0], o[1], s * o[2])
        )
        model = net((3, 2))
        nn.init.zeros_(model[0].weight)
        loop(model, GaLore(r=1, targets=("*",)), lambda p: Adam(p, 0.1), [[G]])
        want = torch.zeros(3, 2, dtype=FINE)
        want[0, 0] = -0.025  # lr * scale
        torch.testing.assert_close(model[0].weight.detach(), want, rtol=0, atol=1e-9)
        monkeypatch.undo()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.1},
                                     {"momentum": 0.5, "weight_decay": 0.1, "maximize": True}])  # fmt: skip
def test_full_rank_sgd_is_sgd(options: dict[str, Any]) -> None:
    model = net(*SHAPES)
    plain, grads = copy.deepcopy(model), gradients(model, 6)
    with pytest.warns(UserWarning, match="saves nothing on '0'"):
        loop(model, GaLore(r=9, scale=1.0, targets=("*",)), lambda p: SGD(p, 0.1, **options), grads)
    optimizer = SGD(plain.parameters(), 0.1, **options)
    for step in grads:
        for p, g in zip(plain.parameters(), step, strict=True):
            p.grad = g
        optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-12)


def test_full_rank_adam_is_not_adam() -> None:
    model = net((6, 5))
    plain, grads = copy.deepcopy(model), gradients(model, 3)
    with pytest.warns(UserWarning, match="saves nothing"):
        loop(model, GaLore(r=5, scale=1.0, targets=("*",)), lambda p: Adam(p, 0.1), grads)
    optimizer = Adam(plain.parameters(), 0.1)
    for (g,) in grads:
        plain[0].weight.grad = g
        optimizer.step()
    assert (model[0].weight - plain[0].weight).abs().max() > 1e-2


def state_of(optimizer: Optimizer, i: int = 0) -> dict[str, Tensor]:
    return list(optimizer.state_dict()["state"].values())[i]


@pytest.mark.parametrize(
    ("proj_type", "shape", "moment", "P", "Q"),
    [
        ("std", (5, 9), (2, 9), (5, 2), None),
        ("std", (9, 5), (9, 2), None, (2, 5)),
        ("std", (6, 6), (6, 2), None, (2, 6)),
        ("reverse_std", (9, 5), (2, 5), (9, 2), None),
        ("left", (9, 5), (2, 5), (9, 2), None),
        ("right", (5, 9), (5, 2), None, (2, 9)),
        ("full", (5, 9), (2, 2), (5, 2), (2, 9)),
    ],
)
def test_shapes_of_the_state(proj_type: str, shape: Any, moment: Any, P: Any, Q: Any) -> None:
    model = net(shape)
    method = GaLore(r=2, proj_type=proj_type, targets=("*",))
    held = state_of(loop(model, method, lambda p: AdamW(p, 0.1), gradients(model, 2)))
    assert held["exp_avg"].shape == held["exp_avg_sq"].shape == moment
    assert (held["galore_P"].shape if "galore_P" in held else None) == P
    assert (held["galore_Q"].shape if "galore_Q" in held else None) == Q


def test_two_sided_is_adam_on_the_core() -> None:
    model = net((7, 6))
    W, (g0, g1) = model[0].weight.detach().clone(), (g[0] for g in gradients(model, 2))
    loop(model, GaLore(r=2, proj_type="full", scale=1.0, targets=("*",)), lambda p: Adam(p, 0.1), [[g0], [g1]])
    U, _, Vh = torch.linalg.svd(g0)
    P, Q = U[:, :2], Vh[:2]
    core = nn.Parameter(torch.zeros(2, 2, dtype=FINE))
    adam = Adam([core], 0.1)
    for g in (g0, g1):
        core.grad = P.T @ g @ Q.T
        adam.step()
    torch.testing.assert_close(model[0].weight.detach(), W + P @ core.detach() @ Q, rtol=0, atol=1e-9)


def test_memory_is_really_saved() -> None:
    def numbers(optimizer: Optimizer) -> int:
        return sum(t.numel() for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor) and t.dim())

    model = net((96, 64))
    plain = copy.deepcopy(model)
    ours = loop(model, GaLore(r=8, targets=("*",)), lambda p: AdamW(p, 0.1), gradients(model, 2))
    theirs = AdamW(plain.parameters(), 0.1)
    plain[0].weight.grad = torch.ones_like(plain[0].weight)
    theirs.step()
    assert numbers(theirs) == 2 * 96 * 64
    assert numbers(ours) == 2 * 96 * 8 + 8 * 64  # 0.167 of it
    assert [p.shape for g in ours.param_groups for p in g["params"]] == [(96, 64)]  # no proxy stays


def test_projectors_are_taken_at_0_T_2T_and_lie_still_between(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or svd(*a, **k))
    model = net((8, 5))
    method, grads, seen = GaLore(r=2, update_proj_gap=3, targets=("*",)), gradients(model, 8), []
    lp.inject(model, method)
    optimizer = method.wrap_optimizer(AdamW(model.parameters(), 0.1), model)
    for i, g in enumerate(grads):
        steps(model, method, optimizer, [g], i)
        seen.append((len(calls), state_of(optimizer)["galore_Q"].clone()))
    assert [n for n, _ in seen] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert all(torch.equal(seen[i][1], seen[i - i % 3][1]) for i in range(8))
    assert not torch.equal(seen[2][1], seen[3][1])


def test_rank_of_the_change_grows_by_r_a_refresh() -> None:
    for count, bound in ((4, 2), (8, 4)):
        model = net((9, 7))
        start = model[0].weight.detach().clone()
        method = GaLore(r=2, update_proj_gap=4, targets=("*",))
        loop(model, method, lambda p: AdamW(p, 0.1, weight_decay=0), gradients(model, count))
        assert torch.linalg.matrix_rank(model[0].weight - start, rtol=1e-9) == bound


def test_what_is_kept_of_the_gradient_is_told() -> None:
    model = net((9, 7))
    method, grads = GaLore(r=3, targets=("*",)), gradients(model, 1)
    loop(model, method, lambda p: AdamW(p, 0.1), grads)
    S = torch.linalg.svdvals(grads[0][0])
    want = math.sqrt(float(S[:3].square().sum() / S.square().sum()))
    assert method.report(model)["kept_gradient"]["0"] == pytest.approx(want, rel=1e-9)


def test_randomized_finds_the_same_space() -> None:
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 20, dtype=FINE)).Q for n in (60, 40))
    G = U @ torch.diag(2.0 ** -torch.arange(20, dtype=FINE)) @ V.T
    for found, exact in zip(projectors._singular(G, 4, 7), (U[:, :4], V[:, :4].T), strict=True):
        a, b = (f if f.shape[0] > f.shape[1] else f.T for f in (found, exact))
        torch.testing.assert_close(a @ a.T, b @ b.T, rtol=0, atol=1e-6)
    again = projectors._singular(G, 4, 7)
    torch.randn(3)  # the draw is not from torch's own generator, so that ranks and resumed fits agree
    assert all(torch.equal(a, b) for a, b in zip(again, projectors._singular(G, 4, 7), strict=True))


@pytest.mark.parametrize("on_refresh", projectors.REFRESHES)
def test_moments_at_a_refresh(on_refresh: str) -> None:
    model = net((8, 5))
    method, grads = GaLore(r=2, update_proj_gap=2, on_refresh=on_refresh, targets=("*",)), gradients(model, 3)
    optimizer = loop(model, method, lambda p: Adam(p, 0.1), grads[:2])
    old = {k: v.clone() for k, v in state_of(optimizer).items()}
    steps(model, method, optimizer, grads[2:], 2)
    new = state_of(optimizer)
    R = grads[2][0] @ new["galore_Q"].T
    turned = old["exp_avg"] @ old["galore_Q"] @ new["galore_Q"].T
    first = {"keep": old["exp_avg"], "reset": 0 * R, "rotate": turned}[on_refresh]
    second = old["exp_avg_sq"] if on_refresh == "keep" else 0 * R
    torch.testing.assert_close(new["exp_avg"], 0.9 * first + 0.1 * R)
    torch.testing.assert_close(new["exp_avg_sq"], 0.999 * second + 0.001 * R * R)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw-foreach": lambda p: AdamW(p, 0.05, foreach=True),
    "amsgrad": lambda p: Adam(p, 0.05, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.05, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": lambda p: torch.optim.RAdam(p, 0.05),
    "adamax": lambda p: torch.optim.Adamax(p, 0.05),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.005, momentum=0.5),
    "rprop": lambda p: torch.optim.Rprop(p, 0.05),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.05, weight_decay=0.1),
    "muon": lambda p: torch.optim.Muon([w for w in p if w.dim() == 2], 0.05),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_any_optimizer_descends_and_resumes_bitwise(kind: str) -> None:
    def fresh(method: lp.Method) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(10, 24, bias=False), nn.Tanh(), nn.Linear(24, 6, bias=False))
        lp.inject(model, method)
        return model, method.wrap_optimizer(OPTIMIZERS[kind](model.parameters()), model)

    def fit(model: nn.Module, optimizer: Optimizer, method: lp.Method, indices: range) -> list[float]:
        x, losses = torch.randn(32, 10, generator=torch.Generator().manual_seed(2)), []
        for index in indices:
            loss = (model(x) - x[:, :6]).square().mean()
            loss.backward()
            losses.append(float(loss))
            method.before_step(model, Step(index=index, optimizers=[optimizer]))
            optimizer.step()
            optimizer.zero_grad()
        return losses

    method = GaLore(r=3, update_proj_gap=4, scale=1.0)
    model, optimizer = fresh(method)
    losses = fit(model, optimizer, method, range(6))
    assert losses[-1] < losses[0]
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    fit(model, optimizer, method, range(6, 10))
    other, again = fresh(method)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    fit(other, again, method, range(6, 10))
    assert same(model.parameters(), other.parameters())


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SparseAdam, torch.optim.ASGD])
def test_optimizers_that_need_the_weight_are_refused(kind: Any) -> None:
    model, method = net((4, 3)), GaLore(r=1, targets=("*",))
    lp.inject(model, method)
    with pytest.raises(ValueError, match=rf"galore.*{kind.__name__} needs the weight itself.*AdamW"):
        method.wrap_optimizer(kind(model.parameters()), model)


def test_half_precision_weights_have_float32_moments_also_after_loading() -> None:
    model, method = nn.Sequential(nn.Linear(8, 6, bias=False)).bfloat16(), GaLore(r=2, targets=("0",))
    with pytest.warns(UserWarning, match="small steps round to nothing"):
        lp.inject(model, method)
    optimizer = method.wrap_optimizer(AdamW(model.parameters(), 0.1), model)
    g = torch.randn(6, 8)
    steps(model, method, optimizer, [[g]])
    held = {k: v.clone() for k, v in state_of(optimizer).items()}
    assert held["exp_avg"].dtype == held["galore_P"].dtype == torch.float32
    other = method.wrap_optimizer(AdamW(model.parameters(), 0.1), model)
    other.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(v, held[k]) for k, v in state_of(other).items())
    assert other.param_groups[0]["params"][0] is model[0].weight


def test_a_step_that_a_loss_scaler_skips_changes_nothing() -> None:
    model, method = net((6, 4)), GaLore(r=2, targets=("*",))
    grads = gradients(model, 2)
    plain = copy.deepcopy(model)
    lp.inject(model, method)
    optimizer = method.wrap_optimizer(AdamW(model.parameters(), 0.1), model)
    model[0].weight.grad = torch.full_like(model[0].weight, 3.0)
    method.before_step(model, Step(index=0, optimizers=[optimizer]))  # and no optimizer.step()
    assert torch.equal(model[0].weight, plain[0].weight)
    steps(model, method, optimizer, grads[1:], 0)
    loop(plain, method, lambda p: AdamW(p, 0.1), grads[1:])
    assert torch.equal(model[0].weight, plain[0].weight)


def test_under_a_loss_scaler() -> None:
    """What the scaler unscales are the weights' gradients, and a step with inf in them is skipped, decay and all."""
    model, method = net((6, 4)), GaLore(r=2, targets=("*",))
    plain, grads = copy.deepcopy(model), gradients(model, 3)
    loop(plain, method, lambda p: AdamW(p, 0.1, weight_decay=0.2), [grads[0], grads[2]])
    lp.inject(model, method)
    optimizer = method.wrap_optimizer(AdamW(model.parameters(), 0.1, weight_decay=0.2), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for index, (g,) in zip((0, 1, 1), grads, strict=True):
        broken = g is grads[1][0]
        loss = (model[0].weight * (g / 0 if broken else g)).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        method.before_step(model, Step(index=index, optimizers=[optimizer]))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    torch.testing.assert_close(model[0].weight, plain[0].weight, rtol=0, atol=1e-9)


def test_a_weight_without_a_gradient_is_left_alone() -> None:
    model, method = net((6, 4), (5, 4)), GaLore(r=2, targets=("*",))
    lp.inject(model, method)
    before = model[1].weight.detach().clone()
    optimizer = method.wrap_optimizer(AdamW(model.parameters(), 0.1, weight_decay=0.5), model)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    method.before_step(model, Step(index=0, optimizers=[optimizer]))
    optimizer.step()
    assert torch.equal(model[1].weight, before) and len(optimizer.param_groups) == 1


def test_two_of_them_side_by_side() -> None:
    model = net((6, 4), (5, 4))
    alone = copy.deepcopy(model)
    a, b = GaLore(r=2, targets=("0",)), NaturalGaLore(r=1, history=2, targets=("1",))
    lp.inject(model, [a, b])
    optimizer = b.wrap_optimizer(a.wrap_optimizer(AdamW(model.parameters(), 0.1), model), model)
    grads = gradients(model, 4)

    def go(model: nn.Module, methods: list[Any], optimizer: Optimizer, part: list[Any]) -> None:
        for index, step in part:
            for p, g in zip(model.parameters(), step, strict=True):
                p.grad = g.clone()
            for m in methods:
                m.before_step(model, Step(index=index, optimizers=[optimizer]))
            optimizer.step()

    go(model, [a, b], optimizer, list(enumerate(grads))[:2])
    order = [id(p) for p in optimizer.param_groups[0]["params"]]
    again = b.wrap_optimizer(a.wrap_optimizer(AdamW(model.parameters(), 0.1), model), model)
    again.load_state_dict(optimizer.state_dict())
    assert order == [id(p) for p in again.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    go(model, [a, b], again, list(enumerate(grads))[2:])
    loop(alone, a, lambda p: AdamW(p, 0.1), [[g[0], g[1]] for g in grads])
    assert torch.equal(model[0].weight, alone[0].weight)


def test_what_trains() -> None:
    model = mlp()
    lp.inject(model, GaLore(r=2, targets=("0",), rest=("*.bias", "3")))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "0.weight", "0.bias", "3.weight", "3.bias", "5.bias"
    }  # fmt: skip
    assert [n for n, _ in projected.targets(GaLore(targets=("0",)), model)] == ["0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r and update_proj_gap are at least 1"),
        ({"update_proj_gap": 0}, "r and update_proj_gap are at least 1"),
        ({"scale": 0.0}, "scale is positive"),
        ({"proj_type": "both"}, "proj_type must be one of std"),
        ({"svd": "fast"}, "svd must be one of full, randomized"),
        ({"on_refresh": "clear"}, "on_refresh must be one of keep"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    for method in (GaLore, NaturalGaLore):
        with pytest.raises(ValueError, match=message):
            method(**options)


def test_targets_that_match_nothing() -> None:
    with pytest.raises(ValueError, match=r"no linear or conv1d matches 'q_pro'"):
        lp.inject(mlp(), GaLore(targets=("q_pro",)))


# ---- fits ----------------------------------------------------------------------------------------------------------


def adamw(net: Net) -> Any:
    optimizer = AdamW(net.parameters(), 1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


METHODS: dict[str, Callable[[], Any]] = {
    "galore": lambda: GaLore(r=2, update_proj_gap=2, rest=("*.bias",)),
    "natural": lambda: NaturalGaLore(r=2, update_proj_gap=3, history=2, rest=("*.bias",)),
    "with-lora": lambda: [GaLore(r=2, targets=("0",), update_proj_gap=2), LoRA(r=2, targets=("2",))],
}


@pytest.mark.parametrize("kind", METHODS)
def test_bitwise_resume_before_at_and_after_a_refresh_inside_a_window(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 7, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    whole = Net(smooth, optimizer=adamw)
    last = run(tmp_path, whole, METHODS[kind](), SaveAt(tmp_path, range(1, 13)), data=vectors(), **options)
    for batch in (2, 3, 4, 5, 6, 9):
        resumed = Net(smooth, optimizer=adamw)
        again = run(tmp_path, resumed, METHODS[kind](), data=vectors(), ckpt_path=tmp_path / f"{batch}.ckpt", **options)
        assert same(trained(whole), trained(resumed)), batch
        pairs = zip(last.optimizers[0].state_dict()["state"].values(),
                    again.optimizers[0].state_dict()["state"].values(), strict=True)  # fmt: skip
        for mine, other in pairs:
            assert mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


def test_the_learning_rate_of_the_step_decays_and_clipping_bounds_the_projection(tmp_path: Path) -> None:
    """By hand: accumulation, a scheduler by steps and clipping of the projected gradients' norm."""
    fitted = Net(smooth, optimizer=adamw)
    options: dict[str, Any] = {"max_steps": 4, "accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
    run(tmp_path, fitted, GaLore(r=2, update_proj_gap=2), data=vectors(shuffle=False), **options)
    hand, batches = Net(smooth), list(vectors(shuffle=False))
    Ws = [hand.net[0].weight, hand.net[2].weight]
    M, V, Q = [0.0, 0.0], [0.0, 0.0], [None, None]
    for t in range(4):
        hand.zero_grad()
        for b in (2 * t, 2 * t + 1):
            (hand.loss(batches[b % len(batches)]) / 2).backward()
        Gs = [w.grad for w in Ws]
        Q = [_small(G) for G in Gs] if t % 2 == 0 else Q
        Rs = [G @ q.T if G.shape[0] >= G.shape[1] else q @ G for G, q in zip(Gs, Q, strict=True)]
        norm = math.sqrt(sum(float(R.square().sum()) for R in Rs))
        assert norm > 0.05
        lr = 1e-2 * (0.1 + 0.9 * t / 5)
        for i, (W, R) in enumerate(zip(Ws, Rs, strict=True)):
            R = R * 0.05 / (norm + 1e-6)
            M[i], V[i] = 0.9 * M[i] + 0.1 * R, 0.999 * V[i] + 0.001 * R * R
            N = M[i] / (1 - 0.9 ** (t + 1)) / ((V[i] / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
            step = N @ Q[i] if W.shape[0] >= W.shape[1] else Q[i].T @ N
            W.data = W.data * (1 - lr * 0.1) - lr * 0.25 * step
    for i, W in zip((0, 2), Ws, strict=True):
        torch.testing.assert_close(fitted.net[i].weight, W, rtol=0, atol=1e-5)


def _small(G: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return Vh[:2] if G.shape[0] >= G.shape[1] else U[:, :2].T


def test_the_folder_holds_the_weights_and_no_projector(tmp_path: Path) -> None:
    fitted = Net(smooth, optimizer=adamw)
    run(tmp_path, fitted, GaLore(r=2))
    lp.save(fitted, tmp_path / "adapter")
    other = lp.load(Net(smooth), tmp_path / "adapter")
    assert all(torch.equal(p, q) for p, q in zip(fitted.parameters(), other.parameters(), strict=True))
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    assert sorted(tensors) == ["net.0.weight", "net.2.weight"]
    lp.merge(other)
    assert torch.equal(other.net[0].weight, fitted.net[0].weight)


def test_bf16_mixed_and_validation_between(tmp_path: Path) -> None:
    fitted = Net(smooth, optimizer=adamw)
    before = fitted.net[0].weight.detach().clone()
    run(tmp_path, fitted, GaLore(r=2, update_proj_gap=2), precision="bf16-mixed", max_steps=4)
    assert torch.isfinite(fitted.net[0].weight).all() and not torch.equal(before, fitted.net[0].weight)


def two_processes(folder: str) -> list[Tensor]:
    """Fits under DDP: the methods' weights on this rank, and whether a resumed one ends at the same bits."""
    rank_out: list[Tensor] = []
    for kind in ("natural", "with-lora"):
        root = Path(folder, kind)
        fits: list[list[Tensor]] = []
        for ckpt in (None, root / "5.ckpt"):
            net = Net(smooth, optimizer=adamw)
            ddp = DDPStrategy(process_group_backend="gloo")
            options: dict[str, Any] = {"strategy": ddp, "devices": 2, "accumulate_grad_batches": 2, "max_steps": 5}
            save = [SaveAt(root, (5,))] if ckpt is None else []
            run(root, net, METHODS[kind](), *save, data=vectors(batch_size=4), ckpt_path=ckpt, **options)
            fits.append(trained(net))
        assert same(*fits), kind
        rank_out += fits[0]
    return rank_out


def test_two_processes_agree_and_resume_bitwise(tmp_path: Path) -> None:
    first, second = launch(two_processes, folder=str(tmp_path))
    assert len(first) > 4 and same(first, second)


def test_sharded_weights_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, method = net((4, 3)), GaLore(r=1, targets=("*",))
    lp.inject(model, method)
    monkeypatch.setattr(projected, "DTensor", nn.Parameter)
    with pytest.raises(ValueError, match=r"galore projects whole gradients.*ModelParallelStrategy shards.*'0'.*ddp"):
        method.wrap_optimizer(AdamW(model.parameters()), model)


def test_a_fit_logs_what_is_kept(tmp_path: Path) -> None:
    peft = PEFT(GaLore(r=2), model="net", folder=None)
    fitted = Net(smooth, optimizer=adamw)
    trainer = L.Trainer(callbacks=[peft], max_steps=3, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
                        default_root_dir=tmp_path, log_every_n_steps=1)  # fmt: skip
    trainer.fit(fitted, vectors(shuffle=False))
    assert any("kept_gradient" in k for k in trainer.callback_metrics)
