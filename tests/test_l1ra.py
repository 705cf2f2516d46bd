"""L1RA: the checks of its card by their numbers, dense references, and fits in which ranks move."""

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning_peft_plugins.additive.houlsby_adapter import HoulsbyAdapter
from lightning_peft_plugins.lifecycle.l1ra import L1RA
from lightning_peft_plugins.reparameterized.dora import DoRA
from lightning_peft_plugins.reparameterized.lora import LoRA
from torch import nn

import lightning_peft as lp
from lightning_peft import Step, hf
from lightning_peft.optim import regroup
from tests import test_hf
from tests.fits import SaveAt, run, same, smooth, trained
from tests.launch import launch
from tests.nets import HFNet, Net, llama, tokens, vectors
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs


def held(model: nn.Module) -> dict[str, Any]:
    return {name: a for name, _, a in lp.adapters(model)}


def three(gates: dict[str, list[float]], **options: Any) -> tuple[Any, L1RA]:
    """Layers a, b, c of rank 4 with these gates, and B away from zero."""
    model: Any = nn.ModuleDict({name: nn.Linear(8, 8) for name in gates})
    method = L1RA(r=4, l1=0.0, update_ratio=0.5, **options)
    lp.inject(model, method)
    with torch.no_grad():
        for name, a in held(model).items():
            nn.init.normal_(a.B)
            a.d.copy_(torch.tensor(gates[name]))
    return model.eval(), method


def update(model: Any, method: L1RA, *optimizers: Any, index: int = 5) -> list[int]:
    method.after_step(model, Step(index=index, planned=10, optimizers=list(optimizers)))
    return [len(a.d) for a in held(model).values()]


GATES = {"a": [0.9, 0.8, 0.0, 0.7], "b": [1.0, 1.0, 0.95, 0.9], "c": [0.5, 0.6, 0.7, 0.0]}


def test_2_by_hand() -> None:
    model = One(nn.Linear(3, 2, bias=False))
    lp.inject(model, L1RA(r=2, alpha=16.0, targets=("layer",)))
    a, W = adapter_of(model), model.layer.weight
    with torch.no_grad():
        a.A.copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
        a.B.copy_(torch.tensor([[1.0, 0], [0, 2]]))
        a.d.copy_(torch.tensor([0.5, 1.0]))
        x = torch.ones(1, 3)
        close(model.eval()(x) - x @ W.T, torch.tensor([[24.0, 240.0]]), atol=1e-4)
        close(a.weight(W) - W, torch.tensor([[4.0, 8, 12], [64, 80, 96]]), atol=1e-4)


@pytest.mark.parametrize("kind", ["Linear", "Linear, no bias", "Conv1D"])
def test_forward_gradient_and_merge_are_the_dense_map(kind: str) -> None:
    layer: Any = HOSTS[kind]().double()
    x, model = inputs(layer), One(layer)
    start = layer(x)
    lp.inject(model, L1RA(r=4, alpha=3.0, dropout=0.0, targets=("layer",)), dtype=F64)
    a = adapter_of(model)
    assert torch.equal(model(x), start) and abs(float(a.A.detach().std()) - 0.25) < 0.1 and bool((a.d == 1).all())
    nn.init.normal_(a.B)
    nn.init.uniform_(a.d)
    W = layer.weight if kind != "Conv1D" else layer.weight.T
    bias = 0 if layer.bias is None else layer.bias
    want = x @ (W + 0.75 * a.B @ torch.diag(a.d) @ a.A).T + bias
    close(model(x), want)
    for fast, slow in zip(
        *(torch.autograd.grad(y.sin().sum(), [a.A, a.d, a.B]) for y in (model(x), want)), strict=True
    ):
        torch.testing.assert_close(fast, slow, atol=1e-9, rtol=1e-9)
    lp.merge(model)
    close(model(x), want)


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ({}, [3, 6, 3]),
        ({"exclude_pruned": False}, [4, 5, 3]),
        ({"reassign": False}, [3, 4, 3]),
        ({"threshold": 0.75}, [2, 8, 1]),  # all of c's are below, so its last one stays; b is full then
        ({"threshold": 0.99}, [1, 2, 1]),  # all layers lose some: the spare ones wait
        ({"min_rank": 4}, [4, 4, 4]),
    ],
)
def test_5_ranks_move_as_by_hand(options: dict[str, Any], ranks: list[int]) -> None:
    model, method = three(GATES, **options)
    x = torch.randn(5, 8)
    before = {name: model[name](x).detach() for name in model}
    kept = {name: a.A[a.d > 0].detach().clone() for name, a in held(model).items()}
    assert update(model, method, index=4) == [4, 4, 4] and update(model, method) == ranks
    if method.threshold < 0.1:
        for name, a in held(model).items():
            close(model[name](x), before[name], atol=1e-6)  # 4: a rank that goes or comes changes nothing
            alike = min(len(a.A), len(kept[name]))
            assert torch.equal(a.A[:alike], kept[name][:alike]) or method.min_rank == 4
    scales = {a.scale for a in held(model).values()}
    assert scales == {4.0}  # alpha / r at the start, whatever the rank is now


def test_new_ranks_start_like_the_first_ones_and_alike_everywhere() -> None:
    fits = [three(GATES) for _ in range(2)]
    for seed, (model, method) in enumerate(fits):
        torch.manual_seed(seed)
        update(model, method)
    a, b = (held(model)["b"] for model, _ in fits)
    assert torch.equal(a.A[4:], b.A[4:]) and not a.B[:, 4:].any() and bool((a.d[4:] == 1).all())
    assert 0.1 < float(a.A[4:].std()) < 0.4 and not torch.equal(a.A[4], a.A[5])


def test_spare_ranks_wait_for_a_layer_that_can_take_them() -> None:
    model, method = three({name: [0.5, 0.5, 0.5, 0.0] for name in "abc"})
    assert update(model, method) == [3, 3, 3]
    assert update(model, method) == [4, 4, 4]
    small: Any = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(4, 8)})
    method = L1RA(r=4, l1=0.0, update_ratio=0.5)
    lp.inject(small, method)
    with torch.no_grad():
        held(small)["a"].d[:2] = 0.0
    assert update(small, method) == [2, 4]  # b is as wide as it can be


def test_the_last_step_changes_no_ranks() -> None:
    model, method = three(GATES)
    assert update(model, method, index=10) == [4, 4, 4]


@pytest.mark.parametrize("reset", [False, True])
def test_moments_follow_or_begin_anew(reset: bool) -> None:
    model, method = three(GATES, reset_optimizer=reset)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.0)
    sum(model[n](torch.randn(3, 8)).square().sum() for n in model).backward()
    optimizer.step()
    a = held(model)["a"]
    old = optimizer.state[a.A]["exp_avg"].clone()
    update(model, method, optimizer)
    if reset:
        assert not optimizer.state
    else:
        assert torch.equal(optimizer.state[a.A]["exp_avg"], old[[0, 1, 3]])
        assert not optimizer.state[held(model)["b"].A]["exp_avg"][4:].any()


def test_6_and_8_the_gates_fall_by_themselves_and_nothing_else_does() -> None:
    model = One(nn.Linear(3, 2))
    method = L1RA(r=2, targets=("layer",))
    lp.inject(model, method)
    a, W = adapter_of(model), model.layer.weight.clone()
    optimizer = torch.optim.AdamW([a.A, a.B, a.d], 0.1, weight_decay=0.5)
    regroup([optimizer], [], method, model)
    start = a.A.detach().clone()
    for p in a.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    method.after_step(model, Step(index=1, planned=100))
    close(a.d, torch.full((2,), 1 - 2e-5), atol=1e-7)
    close(a.A, start * (1 - 0.1 * 0.5), atol=1e-7)
    assert torch.equal(model.layer.weight, W) and lp.penalty(model) is None


def test_7_gates_stay_between_0_and_1() -> None:
    model, method = three({"a": [1.5, 0.5, -0.2, 1e-6], "b": [1.0] * 4})
    object.__setattr__(method, "l1", 1e-3)
    update(model, method, index=1)
    close(held(model)["a"].d, torch.tensor([1.0, 0.5 - 2e-5, 0.0, 0.0]), atol=1e-7)


# ---- through a Trainer ---------------------------------------------------------------------------------------------

METHOD = L1RA(r=3, alpha=3.0, l1=3.0, gate_lr=0.05, update_ratio=0.2, exclude_pruned=False)


def scheduled(net: Net) -> Any:
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def resumable(root: Path, *more: L.Callback, ckpt: Path | None = None, method: L1RA = METHOD, **options: Any) -> Net:
    net = Net(optimizer=scheduled)
    common: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_steps": 10}
    run(root, net, method, *more, **common | options, ckpt_path=ckpt)
    return net


def resumes(root: Path, places: tuple[int, ...], **options: Any) -> list[list[int]]:
    ranks = []
    whole = resumable(root, SaveAt(root / "mid", places), **options)
    for place in places:
        resumed = resumable(root, ckpt=root / "mid" / f"{place}.ckpt", **options)
        assert resumed.losses == whole.losses[place:] and same(trained(whole), trained(resumed)), place
        state = torch.load(root / "mid" / f"{place}.ckpt")["state_dict"]
        ranks.append([len(t) for k, t in state.items() if k.endswith(".d")])
    return ranks


def test_a_fit_resumes_bitwise_around_changes_of_ranks(tmp_path: Path) -> None:
    ranks = resumes(tmp_path, (4, 7, 10, 13, 15, 17), data=vectors(56))
    assert ranks[0] == [3, 3, 3] and len({tuple(r) for r in ranks}) > 1
    assert all(sum(r) <= 9 and min(r) >= 1 for r in ranks)


def in_ddp(root: Path) -> Any:
    method = dataclasses.replace(METHOD, l1=5.0, exclude_pruned=True)
    return resumes(root, (4, 13, 17), method=method, data=vectors(56, 4), strategy="ddp", devices=2)


@pytest.mark.slow
def test_two_processes_in_ddp(tmp_path: Path) -> None:
    first, second = launch(in_ddp, root=tmp_path)
    assert first == second and first[0] == [3, 3, 3] and len({tuple(r) for r in first}) > 1


def test_changes_are_said_and_the_gates_keep_their_rate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    net = Net(optimizer=scheduled)
    fit = run(tmp_path, net, METHOD, max_steps=10)
    said = [m for m in caplog.messages if m.startswith("step ")]
    assert any("l1ra/rank" in m for m in said) and any("trainable parameters" in m for m in said)
    gates = next(g for g in fit.optimizers[0].param_groups if "constant_lr" in g)
    assert (gates["constant_lr"], gates["weight_decay"]) == (0.05, 0.0)
    assert {id(p) for p in gates["params"]} == {id(a.d) for a in held(net).values()}


def test_a_fit_without_bound_asks_for_total_steps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass PEFT.*total_steps=N"):
        run(tmp_path, Net(smooth), METHOD, max_steps=-1, max_time="00:00:00:20")


@pytest.mark.parametrize("other", [LoRA(r=2), DoRA(r=2), HoulsbyAdapter()])
def test_others_beside_it_train_and_keep_their_shapes(other: lp.Method, tmp_path: Path) -> None:
    net = HFNet(llama, optimizer=scheduled)
    run(tmp_path, net, [other, METHOD], max_steps=8, data=tokens(lm=True), peft={"model": "net"})
    assert len({len(a.d) for _, _, a in lp.adapters(net.net, "l1ra")}) > 1
    x = next(iter(tokens(lm=True)))
    lp.save(net.net, tmp_path / "folder")
    torch.manual_seed(7)
    again: Any = lp.load(llama(), tmp_path / "folder")
    assert torch.equal(again.eval()(**x).logits, net.net.eval()(**x).logits)


def test_peft_and_a_plain_lora_compute_the_same(tmp_path: Path) -> None:
    base, x = llama().eval(), torch.randint(3, 64, (2, 6))
    ours: Any = copy.deepcopy(base)
    method = L1RA(r=4, alpha=8.0, rank_pattern={"0.mlp.up_proj": 6, "q_proj": 1})
    lp.inject(ours, method)
    test_hf.randomize(ours)
    lp.resize(held(ours)["model.layers.1.mlp.down_proj"], "rank", torch.tensor([2, 0]))
    hf.save(ours, tmp_path)
    with torch.no_grad():
        want = test_hf.run(ours.eval(), x)
        assert (want - test_hf.run(base, x)).abs().max() > 1e-2
        torch.testing.assert_close(test_hf.run(test_hf.in_peft(base, tmp_path).eval(), x), want, atol=1e-5, rtol=1e-5)
        assert isinstance(hf.load(copy.deepcopy(base), tmp_path).lightning_peft_record.methods[0], LoRA)  # type: ignore[union-attr]
        method.to_lora(ours)
        torch.testing.assert_close(test_hf.run(ours.eval(), x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "rank of at least 1"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"l1": -1.0}, "l1 >= 0; got {'l1': -1.0}"),
        ({"gate_lr": 0.0}, "gate_lr > 0"),
        ({"update_ratio": 0.0}, "0 < update_ratio <= 1"),
        ({"threshold": 1.0}, "0 <= threshold < 1"),
        ({"min_rank": 17}, "1 <= min_rank <= r; got {'min_rank': 17, 'r': 16}"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        L1RA(**options)
    assert message in str(raised.value)


def test_a_target_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="'query'"):
        lp.inject(llama(), L1RA(targets=("query",)))
