"""Diff pruning by the numbers of its card (methods/sparse_selective.md): gates, penalty, the pruning, a whole fit."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_peft_plugins.selective.diff_pruning import DiffPruning
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft import PEFT, Step
from lightning_peft.optim import regroup
from tests import nets
from tests.test_lora import F64, One, adapter_of, close
from tests.test_sparse_mask import mask_of
from tests.zoo import bases as zoo


def one(layer: nn.Module, dtype: torch.dtype = F64, **options: Any) -> Any:
    """``layer`` with a difference that is not zero, gates at all openings; in evaluation mode."""
    model = One(layer).eval()
    lp.inject(model, DiffPruning(**{"targets": ("layer",), "density": 0.25} | options), dtype=dtype)
    a = adapter_of(model)
    nn.init.normal_(a.w)
    nn.init.uniform_(a.alpha, -1, 1)
    nn.init.constant_(a.group, 0.5)
    return model


def gate(alpha: Tensor) -> Tensor:
    return (3 / (1 + torch.exp(-alpha)) - 1.5).clamp(0, 1)


def step(index: int, total: int, *optimizers: Any) -> Step:
    return Step(index=index, optimizers=list(optimizers), planned=total)


@pytest.mark.parametrize(("alpha", "opened", "mean"), [(5, 0.9933, 0.985), (0, 0.5, 0.333), (-5, 0.0067, 0.0035)])
def test_4_the_hard_concrete_distribution(alpha: float, opened: float, mean: float) -> None:
    torch.manual_seed(0)
    a = adapter_of(one(nn.Linear(4, 4))).train()
    z = a.gate(torch.full((400_000,), float(alpha)))
    assert 0 <= z.min() and z.max() <= 1
    assert abs(float((z > 0).float().mean()) - opened) < 2e-3 and abs(float(z.mean()) - mean) < 2e-3
    a.alpha.data, a.group.data = torch.full((16,), float(alpha)), torch.full((1,), 60.0)
    assert abs(float(a.open()) / 16 - opened) < 1e-4


def test_4_drawn_in_training_alone_and_never_by_a_merge() -> None:
    layer = nn.Linear(6, 10).double()
    model = one(layer)
    a, x, W = adapter_of(model), torch.randn(3, 6, dtype=F64), layer.weight.clone()
    z = gate(a.alpha) * gate(a.group)
    assert 0 < z.min() < z.max() < 1 or (z == 0).any()
    close(model(x), F.linear(x, W + (z * a.w).view(10, 6), layer.bias))
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    merged = lp.merge(model)
    close(layer.weight, W + (z * a.w).view(10, 6))
    merged.undo()
    assert torch.equal(layer.weight, W)


@pytest.mark.parametrize("grouped", [True, False])
def test_6_gradients_in_training_are_those_of_the_definition(grouped: bool) -> None:
    layer = nn.Linear(6, 10).double()
    model = one(layer, grouped=grouped).train()
    a, x = adapter_of(model), torch.randn(3, 6, dtype=F64)
    torch.manual_seed(1)
    got = torch.autograd.grad(model(x).sin().sum(), (a.w, a.alpha, a.group))
    torch.manual_seed(1)
    u = [torch.rand_like(t) * 0.9998 + 1e-4 for t in (a.alpha, a.group)]
    z, g = (gate(t + torch.log(v / (1 - v))) for t, v in zip((a.alpha, a.group), u, strict=True))
    factor = z * (g if grouped else 1.0)
    y = F.linear(x, layer.weight + (factor * a.w).view(10, 6), layer.bias)
    want = torch.autograd.grad(y.sin().sum(), (a.w, a.alpha, a.group), allow_unused=True)
    for mine, theirs in zip(got, want, strict=True):
        close(mine, torch.zeros_like(mine) if theirs is None else theirs, 1e-9)
    assert all(bool(mine.any()) for mine in got[: 2 + grouped])


@pytest.mark.parametrize("grouped", [True, False])
def test_the_penalty_counts_gates_of_which_both_are_open(grouped: bool) -> None:
    method = DiffPruning(targets=("layer",), density=0.5, l0_weight=0.1, grouped=grouped)
    model = one(nn.Linear(2, 1), grouped=grouped, l0_weight=0.1, density=0.5)
    a = adapter_of(model)
    a.alpha.data = torch.tensor([math.log(3.0), 0.0], dtype=F64)  # open with 3/4 and 1/2
    if grouped:
        a.group.data = torch.tensor([math.log(4.0)], dtype=F64)  # 4/5; the authors' code adds it
    term = method.penalty(model)
    assert term is not None and abs(float(term) - 0.1 * 1.25 * (0.8 if grouped else 1.0)) < 1e-12
    method.after_step(model, step(1, 2))
    assert method.penalty(model) is None


def test_1_start_and_counts() -> None:
    model = zoo.llama().requires_grad_(False)
    want = model(**zoo.text()).logits
    lp.inject(model, DiffPruning())
    assert torch.equal(model(**zoo.text()).logits, want)
    assert torch.equal(model.train()(**zoo.text()).logits, want)  # gates are drawn, but w is zero
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 15360 + 14
    DiffPruning().after_step(model, step(1, 2))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == int(0.005 * 15360)


def test_it_keeps_what_changes_the_weights_most_and_the_moments_follow() -> None:
    layer = nn.Linear(4, 3, bias=False).double()
    model = one(layer)
    a, W = adapter_of(model), layer.weight.clone()
    a.w.data = torch.arange(12.0, dtype=F64) - 6
    a.alpha.data[:3] = -5.0  # -6, -5, -4: the largest, but behind closed gates
    a.alpha.data[3:] = torch.linspace(0.2, 0.9, 9)
    optimizer = torch.optim.Adam([a.w, a.alpha, a.group], 0.0)
    model(torch.randn(5, 4, dtype=F64)).sin().sum().backward()
    optimizer.step()
    moments = optimizer.state[a.w]["exp_avg"].clone()
    change = (gate(a.alpha) * gate(a.group) * a.w).detach()
    kept = sorted(change.abs().argsort(descending=True)[:3].tolist())
    assert kept != sorted(a.w.abs().argsort(descending=True)[:3].tolist())
    parameters = [a.w, a.alpha, a.group]
    DiffPruning(targets=("layer",), density=0.25).after_step(model, step(5, 10, optimizer))
    assert all(p is q for p, q in zip(parameters, (a.w, a.alpha, a.group), strict=True))
    assert [tuple(t.shape) for t in (a.w, a.alpha, a.group, a.index)] == [(3,), (0,), (0,), (2, 3)]
    assert (a.index[0] * 4 + a.index[1]).tolist() == kept
    close(a.w, change[kept])
    close(optimizer.state[a.w]["exp_avg"], moments[kept])
    x = torch.randn(5, 4, dtype=F64)
    want = torch.zeros(12, dtype=F64).index_put((torch.tensor(kept),), change[kept]).view(3, 4)
    for mode in (True, False):
        close(model.train(mode)(x), x @ (W + want).T)
    dense = torch.autograd.grad((x @ (W + want.requires_grad_()).T).sin().sum(), want)[0]
    grads = torch.autograd.grad(model(x).sin().sum(), (a.w, a.alpha, a.group))
    close(grads[0], dense.flatten()[kept])
    assert [len(g) for g in grads[1:]] == [0, 0]


@pytest.mark.parametrize(("search", "total", "at"), [(0.5, 10, 5), (0.25, 10, 2), (0.01, 10, 1), (0.5, 1, 1)])
def test_the_search_ends_at_its_share_of_the_steps_and_only_once(search: float, total: int, at: int) -> None:
    model = one(nn.Linear(4, 3), search=search)
    a, method = adapter_of(model), DiffPruning(targets=("layer",), density=0.25, search=search)
    for index in range(1, total + 1):
        assert a.searching == (index <= at)
        method.after_step(model, step(index, total))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.finish(model)
    assert len(a.w) == 3


def test_a_fit_that_ends_in_the_search_chooses_at_the_end_aloud() -> None:
    model = one(nn.Linear(4, 3))
    with pytest.warns(UserWarning, match="ended before its share 0.5 for the search"):
        DiffPruning(targets=("layer",), density=0.25).finish(model)
    assert len(adapter_of(model).w) == 3


def test_3_the_share_is_of_all_layers_or_of_each() -> None:
    for scope, want in (("global", [0, 6]), ("layer", [2, 4])):
        model = nn.Sequential(nn.Linear(4, 2), nn.Linear(4, 4))
        lp.inject(model, DiffPruning(density=0.25, scope=scope))
        for i, (_, _, a) in enumerate(lp.adapters(model)):
            nn.init.normal_(a.w, std=1e-6 if i == 0 else 1.0)  # pyright: ignore
        DiffPruning(density=0.25, scope=scope).finish(model)
        assert [len(a.w) for _, _, a in lp.adapters(model)] == want  # pyright: ignore


def test_gates_have_their_own_learning_rate_and_no_decay() -> None:
    model = one(nn.Linear(4, 3))
    a = adapter_of(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5, weight_decay=0.1)
    regroup([optimizer], [], DiffPruning(targets=("layer",)), model)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found == {
        id(a.w): (1e-5, 0.1),
        id(a.alpha): (pytest.approx(0.1), 0.0),
        id(a.group): (pytest.approx(0.1), 0.0),
    }


def test_the_penalty_closes_gates() -> None:
    opened = []
    for weight in (0.0, 1.0):
        model = one(nn.Linear(4, 3), torch.float32).train()
        method = DiffPruning(targets=("layer",), l0_weight=weight)
        optimizer = torch.optim.Adam(adapter_of(model).parameters(), 0.1)
        for _ in range(60):
            optimizer.zero_grad()
            term = method.penalty(model)
            (model(torch.ones(1, 4)).sum() * 0 + term).backward()
            optimizer.step()
        opened.append(method.report(model)["density"]["layer"])
    assert opened[1] < 0.01 < 0.2 < opened[0]


@pytest.mark.parametrize("pruned", [False, True])
def test_a_folder_holds_either_stage(pruned: bool, tmp_path: Path) -> None:
    model, method = zoo.bert(), DiffPruning(density=0.05)
    lp.inject(model, method)
    for _, _, a in lp.adapters(model):
        nn.init.normal_(a.w, std=0.1)  # pyright: ignore
    if pruned:
        method.after_step(model, step(1, 2))
    lp.save(model, tmp_path / "adapter")
    base = zoo.bert()
    base.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    again = lp.load(base, tmp_path / "adapter")
    for (_, _, a), (_, _, b) in zip(lp.adapters(model), lp.adapters(again), strict=True):
        assert a.searching == b.searching != pruned  # pyright: ignore
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert torch.equal(again.eval()(**zoo.sentences()).logits, model.eval()(**zoo.sentences()).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.0}, r"density and search lie in \(0, 1\), got 1.0 and 0.5"),
        ({"density": 0.0}, r"density is a share of the weights"),
        ({"search": 0.0}, r"density and search lie in \(0, 1\), got 0.005 and 0.0"),
        ({"search": 1.0}, r"density and search lie in \(0, 1\)"),
        ({"scope": "all"}, r"scope is 'layer' or 'global', got 'all'"),
        ({"l0_weight": -1.0}, r"no less than 0, the rate positive; got l0_weight=-1.0 and alpha_lr=0.1"),
        ({"alpha_lr": 0.0}, r"got l0_weight=1.25e-07 and alpha_lr=0.0"),
        ({"targets": ("q_prj",)}, r"'q_prj'; nearest: 'q_proj'"),
        ({"exclude": ("lm_head",)}, r"exclude 'lm_head' leaves out nothing"),
        ({"layers": "7"}, r"layers '7' choose no block"),
    ],
)
def test_bad_options_and_what_matches_nothing_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lp.inject(zoo.llama(), DiffPruning(**options))


def test_too_low_a_density_and_a_fit_without_an_end_are_refused() -> None:
    model = one(nn.Linear(4, 3), density=0.01)
    with pytest.raises(ValueError, match=r"diff_pruning: density 0.01 of 12 weights of 'layer' is less than one entry"):
        DiffPruning(targets=("layer",), density=0.01).finish(model)
    with pytest.raises(ValueError, match="needs the number of optimizer steps"):
        DiffPruning(targets=("layer",)).after_step(model, Step(index=1))


def test_1_a_fit_ends_with_exactly_that_share_of_the_weights_changed(tmp_path: Path) -> None:
    module = nets.HFNet(zoo.bert, optimizer=lambda net: torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.1))
    before = {k: v.clone() for k, v in module.net.state_dict().items()}
    peft = PEFT(DiffPruning(density=0.02), model="net", folder=None)
    nets.trainer(tmp_path, peft, max_steps=20, max_epochs=-1).fit(module, nets.tokens())
    held = {f"{n}.weight": a for n, _, a in lp.adapters(module.net)}
    total = sum(math.prod(a.shape) for a in held.values())  # pyright: ignore
    assert sum(len(a.w) for a in held.values()) == int(0.02 * total)  # pyright: ignore
    assert all(torch.equal(v, before[k]) for k, v in module.net.state_dict().items() if k in before)
    masks = {k: mask_of(a) for k, a in held.items()}
    assert {k for _, values in peft.history.values["diff_pruning/density"].items() for k in values}
    lp.merge(module.net)
    for key, new in module.net.state_dict().items():
        mask = masks.get(key, torch.zeros(new.shape, dtype=torch.bool))
        assert torch.equal(new[~mask], before[key][~mask]) and (new[mask] != before[key][mask]).all()
