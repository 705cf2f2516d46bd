"""AdaLoRA: the checks of its card by their numbers, peft's update_and_allocate driven by hand as the oracle."""

import copy
import logging
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_peft_plugins.additive.houlsby_adapter import HoulsbyAdapter
from lightning_peft_plugins.lifecycle.adalora import AdaLoRA
from lightning_peft_plugins.reparameterized.dora import DoRA
from lightning_peft_plugins.reparameterized.lora import LoRA
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft import Step, hf, surgery
from tests import test_hf
from tests.fits import SaveAt, adam, run, same, smooth, trained
from tests.in_peft import ours_to_peft_and_back, peft_to_ours_and_back, same_function
from tests.launch import launch
from tests.nets import HFNet, Net, llama, tokens, vectors
from tests.test_lora import F64, HOSTS, One, adapter_of, close, delta, inputs

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCHES = list(tokens(64, lm=True, shuffle=False))


def batch(step: int) -> Any:
    return BATCHES[step % len(BATCHES)]


def held(model: nn.Module) -> dict[str, Any]:
    return {name: a for name, _, a in lp.adapters(model)}


def one_step(model: Any, method: AdaLoRA, loss: Tensor, optimizer: Any, t: int, total: int) -> None:
    """What the host does with a step."""
    optimizer.zero_grad()
    loss.backward()
    method.before_step(model, Step(index=t, optimizers=[optimizer], planned=total))
    optimizer.step()
    method.after_step(model, Step(index=t + 1, optimizers=[optimizer], planned=total))


# ---- beside peft ---------------------------------------------------------------------------------------------------


def in_peft(orth: float, folder: Path, **options: Any) -> tuple[Any, Any, AdaLoRA]:
    """(peft's model, ours of the same weights, our method)."""
    schedule: dict[str, Any] = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 4, "deltaT": 2, "total_step": 16}
    schedule |= {"task_type": "CAUSAL_LM"}  # without one, peft leaves its loss term out in silence
    config = peft.AdaLoraConfig(target_modules=LINEAR, orth_reg_weight=orth, **schedule | options)
    torch.manual_seed(0)
    base = llama()
    theirs = peft.get_peft_model(copy.deepcopy(base), config)  # type: ignore[arg-type]
    theirs.save_pretrained(str(folder))
    ours: Any = hf.load(base, folder)
    return theirs.train(), ours.train(), ours.lightning_peft_record.methods[0]


def peft_steps(theirs: Any, score: str, optimizer: Any, t: int) -> float:
    """A step as peft's documentation has it, or with its own scores taken before the optimizer moves the weights."""
    allocator = theirs.base_model.rankallocator
    optimizer.zero_grad()
    loss = theirs(**batch(t)).loss
    loss.backward()
    note = allocator.update_ipt
    if score == "before" and t < 12:
        note(theirs.base_model.model)
        allocator.update_ipt = lambda model: None
    optimizer.step()
    theirs.base_model.update_and_allocate(t)
    allocator.update_ipt = note
    return float(loss.detach())


def peft_tensors(theirs: Any, name: str) -> dict[str, Tensor]:
    layer = theirs.base_model.model.get_submodule(name)
    return {"A": layer.lora_A.default, "d": layer.lora_E.default[:, 0], "B": layer.lora_B.default}


@pytest.mark.parametrize("score", ["after", "before"])
@pytest.mark.parametrize("orth", [0.5, 0.0])
def test_every_step_is_that_of_pefts_update_and_allocate(score: str, orth: float, tmp_path: Path) -> None:
    theirs, ours, method = in_peft(orth, tmp_path)
    assert method.score == "after"
    object.__setattr__(method, "score", score)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 5e-3) for m in (theirs, ours)]
    ranks = []
    for t in range(16):
        loss = peft_steps(theirs, score, optimizers[0], t)
        mine = ours(**batch(t)).loss + (lp.penalty(ours) if orth else 0.0)
        assert mine.item() == pytest.approx(loss, abs=2e-5), t
        one_step(ours, method, mine, optimizers[1], t, 16)
        ranks.append(
            (sum(len(a.d) for a in held(ours).values()), sum(int(a.d.count_nonzero()) for a in held(ours).values()))
        )
        for name, a in held(ours).items():
            want = peft_tensors(theirs, name)
            kept = want["d"] != 0 if t >= 12 else torch.ones(4, dtype=torch.bool)
            for key, dim in (("A", 0), ("d", 0), ("B", 1)):
                alike = want[key].index_select(dim, kept.nonzero().flatten())
                torch.testing.assert_close(getattr(a, key), alike, atol=2e-5, rtol=1e-4, msg=f"{t} {name} {key}")
            average = theirs.base_model.rankallocator.exp_avg_unc.get(f"{name}.lora_B.default")
            if t < 12:
                torch.testing.assert_close(a.spread_B, average, atol=1e-9, rtol=1e-3)
        if orth and t == 12:
            break  # from here on what was removed is left out of our loss term, where peft goes on to pull on it
    assert ranks[0][0] == 56 and ranks[11][0] == 56 and ranks[12] == (28, 28)
    b = {t: method.budget(t, 16, 56, 28) for t in (4, 6, 8, 10)}
    assert {t: ranks[t][1] for t in b} == b and ranks[5][1] > b[4]  # masked, and some come back before the next time
    assert len({len(a.d) for a in held(ours).values()}) > 2


def test_the_orders_differ_by_the_weight_that_meets_the_gradient() -> None:
    """Paper and option "before": |w g| of one moment. peft: the gradient of the old weight times the new one."""
    for score in ("before", "after"):
        model = One(nn.Linear(3, 2))
        method = AdaLoRA(init_r=2, target_r=1, score=score, orth_reg_weight=0.0, targets=("layer",))
        lp.inject(model, method)
        a = adapter_of(model)
        with torch.no_grad():
            a.d.copy_(torch.tensor([1.0, -2.0]))
        loss = a.d @ torch.tensor([3.0, 5.0])
        one_step(model, method, loss, torch.optim.SGD([a.d], 0.1), 0, 100)
        now = torch.tensor([1.0 * 3, 2.0 * 5] if score == "before" else [0.7 * 3, 2.5 * 5])
        close(a.mean_d, 0.15 * now, atol=1e-6)
        close(a.spread_d, 0.15 * 0.85 * now, atol=1e-6)
        close(a.scores(), 0.15**2 * 0.85 * now**2, atol=1e-6)


@pytest.mark.parametrize("options", [{"tinit": 0, "tfinal": 0}, {"tinit": 3, "tfinal": 7}, {"tinit": 11, "tfinal": 20}])
def test_budgets_are_pefts(options: dict[str, int], tmp_path: Path) -> None:
    for total, deltaT, target in ((32, 1, 1), (101, 3, 3), (997, 10, 2)):
        theirs, _, method = in_peft(
            0.0, tmp_path / f"{total}", total_step=total, deltaT=deltaT, target_r=target, **options
        )
        allocator = theirs.base_model.rankallocator
        got = [method.budget(t, total, allocator.init_bgt, allocator.target_bgt) for t in range(total)]
        assert got == [allocator.budget_schedule(t)[0] for t in range(total)]


def test_2_and_3_the_budget_by_hand() -> None:
    method = AdaLoRA(init_r=6, target_r=4, tinit=10, tfinal=20)
    got = [method.budget(t, 100, 24, 16) for t in (0, 10, 11, 20, 30, 40, 60, 80, 99)]
    assert got == [24, 24, 23, 21, 18, 17, 16, 16, 16]  # the paper's print would have 33 at step 10
    shares = AdaLoRA(init_r=6, target_r=4, tinit=0.1, tfinal=0.2)
    assert [shares.budget(t, 100, 24, 16) for t in range(100)] == [method.budget(t, 100, 24, 16) for t in range(100)]


FOLDERS = {"llama": (llama, LINEAR), "gpt2": (test_hf.gpt2, ["c_attn", "c_proj", "c_fc"])}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_peft_folder_both_ways(name: str, tmp_path: Path) -> None:
    make, targets = FOLDERS[name]
    base, x = make().eval(), torch.randint(3, 64, (2, 6))
    options: dict[str, Any] = {"init_r": 5, "target_r": 2, "dropout": 0.0}
    theirs = ours_to_peft_and_back(base, AdaLoRA(**options, targets=tuple(targets), tinit=20), x, tmp_path / "1")
    config = theirs.peft_config["default"]
    assert (config.init_r, config.tinit, config.total_step) == (5, 20, 1028) and config.tfinal == 308
    fan = {"fan_in_fan_out": True} if name == "gpt2" else {}
    config = peft.AdaLoraConfig(
        target_modules=targets, total_step=9, tinit=1, init_r=3, target_r=2, lora_alpha=4, beta1=0.5, **fan
    )
    read: Any = peft_to_ours_and_back(base, config, x, tmp_path / "2")
    assert (read.init_r, read.alpha, read.tinit, read.beta1, read.beta2) == (3, 4.0, 1, 0.5, 0.85)


def test_a_cut_one_keeps_its_ranks_and_scale_in_a_peft_folder(tmp_path: Path) -> None:
    base, x = llama().eval(), torch.randint(3, 64, (2, 6))
    pattern = {"0.mlp.up_proj": 2, "q_proj": 1, "1.mlp.down_proj": 3}
    theirs = ours_to_peft_and_back(base, AdaLoRA(init_r=5, target_r=2, rank_pattern=pattern), x, tmp_path)
    ranks = {n: len(m.lora_E.default) for n, m in theirs.named_modules() if hasattr(m, "lora_E")}
    assert sorted(ranks.values()) == [1, 1, 2, 3] + [5] * 10
    back: Any = hf.load(copy.deepcopy(base), tmp_path / "theirs")
    assert sorted(len(a.d) for a in held(back).values()) == sorted(ranks.values())
    assert {a.scale for a in held(back).values()} == {16 / (5 + 1e-5)}


def test_a_layer_without_a_rank_in_a_peft_folder(tmp_path: Path) -> None:
    base, x = llama().eval(), torch.randint(3, 64, (2, 6))
    ours = copy.deepcopy(base)
    lp.inject(ours, AdaLoRA(init_r=5, target_r=2, rank_pattern={"0.mlp.up_proj": 0}))
    test_hf.randomize(ours)
    hf.save(ours, tmp_path)
    with torch.no_grad():
        want = test_hf.run(test_hf.in_peft(base, tmp_path), x)
        for model in (ours, hf.load(copy.deepcopy(base), tmp_path)):
            torch.testing.assert_close(test_hf.run(model, x), want, atol=1e-5, rtol=1e-5)


def test_peft_reads_what_a_fit_left_and_ours_what_pefts_left(tmp_path: Path) -> None:
    theirs, ours, method = in_peft(0.1, tmp_path / "start")
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 5e-2) for m in (theirs, ours)]
    for t in range(16):
        peft_steps(theirs, "after", optimizers[0], t)
        one_step(ours, method, ours(**batch(t)).loss + lp.penalty(ours), optimizers[1], t, 16)
    torch.manual_seed(0)
    base, x = llama().eval(), torch.randint(3, 64, (2, 6))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    read: Any = hf.load(copy.deepcopy(base), tmp_path / "theirs")
    assert sum(len(a.d) for a in held(read).values()) == 28
    hf.save(ours, tmp_path / "ours")
    written = test_hf.in_peft(base, tmp_path / "ours")
    with torch.no_grad():
        for a, b in ((read, theirs), (ours, written)):
            assert (test_hf.run(a.eval(), x) - test_hf.run(base, x)).abs().max() > 1e-3
            torch.testing.assert_close(test_hf.run(a.eval(), x), test_hf.run(b.eval(), x), atol=1e-5, rtol=1e-5)


def test_convolutions_are_pefts_where_it_has_them(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 8, 8)
    options: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2}
    base = nn.Sequential(nn.Conv2d(4, 6, **options), nn.Tanh(), nn.Flatten(), nn.Linear(54, 3))
    ours = copy.deepcopy(base)
    lp.inject(ours, AdaLoRA(init_r=3, target_r=2, targets=("0", "3")))
    test_hf.randomize(ours)
    hf.save(ours, tmp_path)
    same_function(ours, test_hf.in_peft(base, tmp_path), base, x)
    reflected = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"))
    lp.inject(reflected, AdaLoRA(init_r=3, target_r=2, targets=("0",)))
    with pytest.raises(ValueError, match="no convolution but Conv2d, padded with zeros"):
        hf.save(reflected, tmp_path / "other")


# ---- the map -------------------------------------------------------------------------------------------------------

KINDS = [k for k in HOSTS if "Embedding" not in k and "s" != k[-1] and "groups" not in k]


@pytest.mark.parametrize("kind", KINDS)
def test_forward_gradient_and_merge_are_the_dense_map(kind: str) -> None:
    layer: Any = HOSTS[kind]().double()
    x, reference = inputs(layer), copy.deepcopy(layer)
    model = One(layer)
    lp.inject(model, AdaLoRA(init_r=4, target_r=2, alpha=3.0, targets=("layer",)), dtype=F64)
    assert torch.equal(model(x), reference(x))
    a = adapter_of(model)
    for p in a.parameters():
        nn.init.normal_(p)
    change = delta(layer, a.A * a.d[:, None], a.B, 3.0 / (4 + 1e-5))
    with torch.no_grad():
        reference.weight.add_(change)
        want = reference(x)
        close(model(x), want)
        assert (want - layer.unadapted(x)).abs().max() > 0.1
    slow = torch.autograd.grad(lp.WeightAdapter.forward(a, lp.Base(layer), x).sin().sum(), [a.A, a.d, a.B])
    for fast, s in zip(torch.autograd.grad(model(x).sin().sum(), [a.A, a.d, a.B]), slow, strict=True):
        torch.testing.assert_close(fast, s, atol=1e-9, rtol=1e-9)
    lp.resize(a, "rank", torch.tensor([3, 1]))
    kept = model(x).detach()
    close(lp.WeightAdapter.forward(a, lp.Base(layer), x), kept)  # the divisor is still init_r
    lp.merge(model)
    close(model(x), kept)


def test_1_count_and_first_gradients() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    method = AdaLoRA(init_r=4, target_r=2)
    lp.inject(model, method)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 88
    model(torch.randn(3, 6)).square().sum().backward()
    for a in held(model).values():
        assert not a.A.grad.any() and not a.B.grad.any() and a.d.grad.all()


def test_the_penalty_by_hand() -> None:
    model = One(nn.Linear(2, 2))
    for form, want in (("norm", 0.5 * (3.0 + 2**0.5) / 2), ("square", 0.5 * (9.0 + 2.0))):
        method = AdaLoRA(init_r=2, target_r=1, orth_reg_weight=0.5, orth_form=form, targets=("layer",))
        lp.inject(model, method)
        a = adapter_of(model)
        with torch.no_grad():
            a.A.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))  # A A^T - 1 = diag(3, 0)
            a.B.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))  # B^T B - 1 is 1 off the diagonal
        assert float(lp.penalty(model)) == pytest.approx(want)  # type: ignore[arg-type]
        lp.remove(model)
    lp.inject(model, AdaLoRA(init_r=2, target_r=1, orth_reg_weight=0.0, targets=("layer",)))
    assert lp.penalty(model) is None


# ---- pruning -------------------------------------------------------------------------------------------------------


def scored(*scores: list[float], budget: int, cut: bool = False) -> list[list[float]]:
    """d of layers whose ranks have these scores, after pruning; d was the position."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in scores))
    method = AdaLoRA(init_r=len(scores[0]), target_r=1)
    lp.inject(model, method)
    for a, mine in zip(held(model).values(), scores, strict=True):
        a.forget(len(a.d))
        a.mean_d.copy_(torch.tensor(mine))
        a.spread_d.fill_(1.0)
        with torch.no_grad():
            a.d.copy_(torch.arange(1.0, len(mine) + 1))
    method._prune(held(model), budget, Step(index=1) if cut else None)
    assert not cut or all(len(a.A) == len(a.d) == a.B.shape[1] and not len(a.mean_d) for a in held(model).values())
    return [a.d.tolist() for a in held(model).values()]


def test_the_best_ranks_of_all_layers_stay() -> None:
    assert scored([5.0, 1.0, 4.0], [2.0, 3.0, 0.5], budget=3) == [[1, 0, 3], [0, 2, 0]]
    assert scored([5.0, 1.0, 4.0], [2.0, 3.0, 0.5], budget=3, cut=True) == [[1, 3], [2]]
    assert scored([5.0, 6.0, 4.0], [2.0, 3.0, 0.5], budget=3, cut=True) == [[1, 2, 3], []]


def test_8_ties_do_not_take_more_than_the_budget_says() -> None:
    """kthvalue and <=, as in peft, would leave 0 of the four that are equal."""
    assert scored([1.0, 1.0], [1.0, 1.0], budget=3) == [[1, 2], [1, 0]]
    assert scored([0.0, 0.0], [0.0, 0.0], budget=2) == [[1, 2], [1, 2]]  # nothing is known yet
    assert scored([0.0, 0.0], [0.0, 0.0], budget=2, cut=True) == [[1, 2], []]


def test_7_equal_ranks_prune_nothing(tmp_path: Path) -> None:
    net = Net(smooth, optimizer=adam)
    run(tmp_path, net, AdaLoRA(init_r=2, target_r=2))
    assert all(len(a.d) == 2 and a.d.all() and not len(a.mean_d) for a in held(net).values())


def test_4_a_pruned_value_has_a_gradient_and_comes_back_between_prunings(tmp_path: Path) -> None:
    alive = []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *rest: Any) -> None:
            alive.append(sum(int(a.d.count_nonzero()) for a in held(module).values()))

    net = Net(smooth, optimizer=adam)
    method = AdaLoRA(init_r=4, target_r=1, tinit=1, tfinal=2, delta_t=2)
    run(tmp_path, net, method, Count(), max_steps=10)
    budget = [method.budget(t, 10, 8, 2) for t in range(10)]
    assert [alive[t] for t in (2, 4, 6)] == [budget[t] for t in (2, 4, 6)] and alive[7] > budget[7]
    assert alive[8:] == [2, 2] and [sum(len(a.d) for a in held(net).values())] == [2]


# ---- through a Trainer ---------------------------------------------------------------------------------------------

METHOD = AdaLoRA(init_r=4, target_r=2, tinit=1, tfinal=4, delta_t=2)


def test_real_shapes_change_and_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    net = Net(smooth, optimizer=adam)
    fit = run(tmp_path, net, METHOD, max_steps=10)
    ranks = [len(a.d) for a in held(net).values()]
    assert sum(ranks) == 4
    sizes = [r * (i + o + 1) for r, (o, i) in zip(ranks, ((12, 8), (3, 12)), strict=True)]
    assert sum(p.numel() for p in trained(net)) == sum(sizes)
    share = 1 - sum(sizes) / 148
    assert f"step 7: 148 -> {sum(sizes)} trainable parameters, {share:.0%} fewer".replace("%", " %") in caplog.messages
    assert "step 7: adalora/rank 8 -> 4" in caplog.messages
    moments = [s[k].numel() for s in fit.optimizers[0].state.values() for k in ("exp_avg", "exp_avg_sq")]
    assert sum(moments) == 2 * sum(sizes)
    assert all(not b.numel() for b in net.buffers())


def test_6_averages_are_of_optimizer_steps(tmp_path: Path) -> None:
    """Four batches a step with accumulation, against a loop that adds their gradients up."""
    net, hand = Net(smooth, optimizer=adam), Net(smooth)
    method = AdaLoRA(init_r=4, target_r=2, tinit=1, tfinal=1)
    data = list(vectors(96, shuffle=False))
    run(
        tmp_path,
        net,
        method,
        max_steps=3,
        accumulate_grad_batches=4,
        data=vectors(96, shuffle=False),
        peft={"total_steps": 9},
    )
    L.seed_everything(5, verbose=False)
    lp.inject(hand, method)
    optimizer = torch.optim.AdamW([p for p in hand.parameters() if p.requires_grad], 1e-2)
    for t in range(3):
        losses = [hand.loss(b) + lp.penalty(hand) for b in data[4 * t : 4 * t + 4]]
        one_step(hand, method, sum(losses) / 4, optimizer, t, 9)
    for mine, want in zip(held(net).values(), held(hand).values(), strict=True):
        for name in ("mean_A", "spread_A", "mean_d", "spread_d", "mean_B", "spread_B"):
            assert getattr(want, name).any()
            torch.testing.assert_close(getattr(mine, name), getattr(want, name), atol=1e-9, rtol=1e-4)


def resumable(root: Path, *more: L.Callback, ckpt: Path | None = None, **options: Any) -> Net:
    net = Net(optimizer=adam)
    common: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_steps": 10}
    run(root, net, METHOD, *more, **common | options, ckpt_path=ckpt)
    return net


def resumes(root: Path, **options: Any) -> list[int]:
    """Ranks over all layers in checkpoints before, between and after prunings and the cut; resumes from each."""
    places, ranks = (3, 6, 9, 12, 13, 15, 17), []
    places = places[1::2] if options else places
    data = {"data": vectors(56, 4)} if options else {"data": vectors(56)}
    whole = resumable(root, SaveAt(root / "mid", places), **data, **options)
    for place in places:
        resumed = resumable(root, ckpt=root / "mid" / f"{place}.ckpt", **data, **options)
        assert resumed.losses == whole.losses[place:] and same(trained(whole), trained(resumed)), place
        state = torch.load(root / "mid" / f"{place}.ckpt")["state_dict"]
        ranks.append(sum(len(t) for k, t in state.items() if k.endswith(".d")))
    return ranks


def test_a_fit_resumes_bitwise_from_before_during_and_after_the_cut(tmp_path: Path) -> None:
    assert resumes(tmp_path) == [12, 12, 12, 12, 6, 6, 6]


def whole_layer(root: Path, **options: Any) -> Net:
    """Two layers, of which the first gets no part of the budget: hardly any gradient reaches it."""
    torch.manual_seed(3)
    net = Net(lambda: nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)), optimizer=adam)
    net.net[2].weight.data.mul_(1e-6)
    data = vectors(batch_size=8 if not options else 4, shuffle=False)
    run(root, net, AdaLoRA(init_r=3, target_r=1, tfinal=3, orth_reg_weight=0.0), max_steps=8, data=data, **options)
    return net


def in_ddp(root: Path) -> Any:
    ranks = resumes(root, strategy="ddp", devices=2)
    net = whole_layer(root, strategy="ddp", devices=2)
    return ranks, [len(a.d) for a in held(net).values()], trained(net)


@pytest.mark.slow
def test_two_processes_in_ddp(tmp_path: Path) -> None:
    first, second = launch(in_ddp, root=tmp_path)
    assert first[0] == second[0] == [12, 12, 6]
    assert first[1] == second[1] and same(first[2], second[2]) and first[1] == [0, 2]


def test_a_fit_without_bound_asks_for_total_steps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass PEFT.*total_steps=N"):
        run(tmp_path, Net(smooth), METHOD, max_steps=-1, max_time="00:00:00:20")
    net = Net(smooth, optimizer=adam)
    run(tmp_path, net, METHOD, max_steps=-1, max_epochs=2, peft={"total_steps": 10})
    assert sum(len(a.d) for a in held(net).values()) == 4


def test_a_fit_that_ends_early_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ended before its budget of 4 ranks, so all 8 are kept"):
        run(tmp_path, Net(smooth), METHOD, max_steps=3, peft={"total_steps": 10})


def test_a_schedule_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 <= begin < end <= 5 steps, got begin=3, end=2"):
        run(tmp_path, Net(smooth), AdaLoRA(init_r=4, target_r=2, tinit=3, tfinal=3))


def test_sharded_strategies_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'adalora'.*may change the shapes.*ModelParallelStrategy.*strategy='ddp'"):
        run(tmp_path, Net(smooth), METHOD, strategy=ModelParallelStrategy())


@pytest.mark.parametrize("other", [LoRA(r=2), DoRA(r=2), HoulsbyAdapter()])
@pytest.mark.parametrize("first", [True, False])
def test_others_beside_it_train_and_keep_their_shapes(other: lp.Method, first: bool, tmp_path: Path) -> None:
    net = HFNet(llama, optimizer=adam)
    both = [other, METHOD] if first else [METHOD, other]
    peft_options = {"model": "net"}
    run(tmp_path, net, both, max_steps=10, data=tokens(lm=True), peft=peft_options)
    mine = {n: a for n, _, a in lp.adapters(net.net, "adalora")}
    assert sum(len(a.d) for a in mine.values()) == 2 * len(mine)
    x = next(iter(tokens(lm=True)))
    lp.save(net.net, tmp_path / "folder")
    torch.manual_seed(7)
    again: Any = lp.load(llama(), tmp_path / "folder")
    assert torch.equal(again.eval()(**x).logits, net.net.eval()(**x).logits)


def test_heads_can_be_cut_while_it_prunes() -> None:
    model: Any = llama()
    method = AdaLoRA(init_r=4, target_r=2, tinit=0, tfinal=1)
    lp.inject(model, method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for t in range(8):
        one_step(model, method, model(**batch(t)).loss + lp.penalty(model), optimizer, t, 8)
        if t == 3:
            surgery.cut(model, {"model.layers.0.self_attn": [1]}, {"model.layers.1.mlp": range(9)}, [optimizer])
    a = held(model)["model.layers.1.mlp.down_proj"]
    assert a.A.shape == (len(a.d), 9) and sum(len(b.d) for b in held(model).values()) == 28


# ---- what is left --------------------------------------------------------------------------------------------------


def fitted(root: Path) -> Net:
    net = whole_layer(root)
    assert [len(a.d) for a in held(net).values()] == [0, 2]
    return net


def test_a_cut_one_is_saved_loaded_merged_and_turned_into_lora(tmp_path: Path) -> None:
    net = fitted(tmp_path).eval()
    x = torch.randn(5, 8)
    want = net.net(x).detach()
    lp.save(net, tmp_path / "folder")
    again: Any = Net(smooth)
    again.net[2].weight.data.mul_(1e-6)
    lp.load(again, tmp_path / "folder")
    assert torch.equal(again.net(x), want) and [len(a.d) for a in held(again).values()] == [0, 2]
    merged = lp.merge(again)
    close(again.net(x), want, atol=1e-6)
    merged.undo()
    lora = next(iter(again.lightning_peft_record.methods)).to_lora(again)
    close(again.net(x), want, atol=1e-6)
    assert isinstance(lora, LoRA) and {n: a.A.shape for n, a in held(again).items()} == {"net.2": (2, 12)}


def test_pruned_ranks_are_no_part_of_a_plain_lora() -> None:
    model, x = One(nn.Linear(6, 5)), torch.randn(2, 6)
    method = AdaLoRA(init_r=4, target_r=2, targets=("layer",))
    lp.inject(model, method)
    with pytest.raises(ValueError, match="'?adalora'? changes nothing yet"):
        method.to_lora(model)
    with torch.no_grad():
        adapter_of(model).d.copy_(torch.tensor([1.0, 0.0, -3.0, 0.0]))
    want = model(x)
    assert method.to_lora(model).r == 2
    close(model(x), want, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_r": 13}, "1 <= target_r <= init_r; got {'init_r': 12, 'target_r': 13}"),
        ({"target_r": 0}, "1 <= target_r <= init_r"),
        ({"tinit": -1}, "tinit and tfinal as steps, or shares below 1"),
        ({"tinit": 0.6, "tfinal": 0.4}, "tinit and tfinal as steps, or shares below 1"),
        ({"delta_t": 0}, "delta_t >= 1"),
        ({"alpha": -1.0}, "alpha and orth_reg_weight >= 0"),
        ({"orth_reg_weight": -1.0}, "alpha and orth_reg_weight >= 0"),
        ({"beta1": 1.0}, "beta1 and beta2 in"),
        ({"beta2": 0.0}, "beta1 and beta2 in"),
        ({"score": "Before"}, "score 'before' or 'after'"),
        ({"orth_form": "l2"}, "orth_form 'norm' or 'square'"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"rank_pattern": {"q": 13}}, "rank_pattern from 0 to init_r"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        AdaLoRA(**options)
    assert message in str(raised.value)


def test_what_matches_nothing_and_grouped_convolutions_are_refused() -> None:
    with pytest.raises(ValueError, match="'query'"):
        lp.inject(llama(), AdaLoRA(targets=("query",)))
    with pytest.raises(ValueError, match="rank pattern 'up' matches none of the 2 target layers"):
        lp.inject(llama(), AdaLoRA(targets=("q_proj",), rank_pattern={"up": 3}))
    with pytest.raises(ValueError, match="convolutions of one group, this has 2"):
        lp.inject(One(nn.Conv2d(4, 4, 3, groups=2)), AdaLoRA(targets=("layer",)))


def test_averages_are_in_full_precision(tmp_path: Path) -> None:
    """Of adapters in bfloat16 too, also where they come from a file."""
    nets = [Net(smooth, optimizer=adam) for _ in range(2)]
    options: dict[str, Any] = {"max_steps": 4, "peft": {"dtype": "bfloat16", "total_steps": 10}}
    run(tmp_path, nets[0], METHOD, SaveAt(tmp_path, [3]), **options)
    run(tmp_path, nets[1], METHOD, ckpt_path=tmp_path / "3.ckpt", **options)
    for a, b in zip(*(held(net).values() for net in nets), strict=True):
        assert a.A.dtype == torch.bfloat16 and a.mean_A.dtype == torch.float32
        assert same((a.A, a.mean_A, a.spread_d), (b.A, b.mean_A, b.spread_d))
