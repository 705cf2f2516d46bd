"""PMSS: the checks of its card (methods/pmss.md) by their numbers, and dense float64 references."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_peft_plugins.reparameterized import pmss
from lightning_peft_plugins.reparameterized.pmss import PMSS, pivots, select
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft import hf, hosts
from tests import test_hf
from tests.nets import llama
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs

KINDS = ["Linear", "Linear, no bias", "Conv1D"]
W3 = torch.tensor([[4.0, 1, 0, 2], [0, 3, 1, 0], [8, 2, 0, 4]], dtype=F64)


def one(layer: nn.Module, dtype: torch.dtype = torch.float32, fill: bool = True, **options: Any) -> Any:
    """``layer`` with PMSS of 4 rows, its core away from zero if ``fill``."""
    model = One(layer)
    lp.inject(model, PMSS(**{"r": 4, "targets": ("layer",)} | options), dtype=dtype)
    if fill:
        with torch.no_grad():
            nn.init.normal_(adapter_of(model).U)
    return model


def parts(a: Any, W: Tensor) -> tuple[Tensor, Tensor]:
    """C and R as the adapter holds their places; each divided by its own length if so asked."""
    return W[:, a.columns] / a.column_norms, W[a.rows] / a.row_norms[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_1_the_start_is_the_base_and_only_the_core_trains(kind: str, dtype: torch.dtype) -> None:
    layer: Any = HOSTS[kind]().to(dtype)
    x = inputs(layer, dtype)
    want, before = layer(x), layer.weight.clone()
    model = one(layer, fill=False)
    assert torch.equal(model(x), want) and torch.equal(layer.weight, before)
    model(x).square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"layer.adapters.pmss.U"}
    assert adapter_of(model).U.grad.abs().min() > 0


@pytest.mark.parametrize("options", [{}, {"normalize": "none", "alpha": 2.0}, {"c": 3, "selection": "cpqr"}])
@pytest.mark.parametrize("kind", KINDS)
def test_4_and_7_forward_gradient_and_merge_are_the_dense_map(kind: str, options: dict[str, Any]) -> None:
    layer: Any = HOSTS[kind]().double()
    x = inputs(layer).requires_grad_(True)
    model = one(layer, F64, **options)
    a, W = adapter_of(model), hosts.read(layer).detach().clone()
    C, R = parts(a, W)
    want = F.linear(x, W + options.get("alpha", 4) / 4 * C @ a.U @ R, layer.bias)
    assert (want - layer.unadapted(x)).abs().max() > 1e-3
    close(model(x), want)
    close(lp.WeightAdapter.forward(a, lp.Base(layer), x), want)
    fast, slow = (torch.autograd.grad(y.sin().sum(), (a.U, x)) for y in (model(x), want))
    for f, s in zip(fast, slow, strict=True):
        close(f, s, atol=1e-9)
    with torch.no_grad():
        unmerged, before = model(x), layer.weight.clone()
        merged = lp.merge(model)
        close(layer(x), want)
        close(model(x), unmerged)
        merged.undo()
        assert torch.equal(layer.weight, before)


def test_2_count() -> None:
    for shape in ((20, 30), (50, 9)):
        assert sum(p.numel() for p in adapter_of(one(nn.Linear(*shape), r=7)).parameters()) == 49
    assert sum(p.numel() for p in adapter_of(one(nn.Linear(20, 30), r=7, c=5)).parameters()) == 35


def test_3_by_hand() -> None:
    layer = nn.Linear(4, 3).double()
    with torch.no_grad():
        layer.weight.copy_(W3)
    model = one(layer, F64, fill=False, r=2, normalize="none", selection="cpqr")
    a = adapter_of(model)
    assert a.columns.tolist() == [0, 1] and a.rows.tolist() == [2, 1]
    with torch.no_grad():
        a.U.copy_(torch.tensor([[0.1, 0.0], [0.2, -0.1]]))
    change = torch.tensor([[4.8, 0.9, -0.1, 2.4], [4.8, 0.3, -0.3, 2.4], [9.6, 1.8, -0.2, 4.8]], dtype=F64)
    close(a.weight(W3) - W3, change, atol=1e-6)
    x = torch.ones(1, 4, dtype=F64)
    close(model(x) - layer.unadapted(x), torch.tensor([[8.0, 7.2, 16.0]], dtype=F64), atol=1e-6)


def test_3_unit_lengths_by_hand() -> None:
    layer = nn.Linear(4, 3, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(W3)
    a = adapter_of(one(layer, F64, fill=False, r=2, selection="cpqr"))
    close(a.column_norms, torch.tensor([80.0, 14.0], dtype=F64).sqrt(), atol=1e-5)
    close(a.row_norms, torch.tensor([84.0, 10.0], dtype=F64).sqrt(), atol=1e-5)
    C, R = parts(a, layer.weight.detach())
    close(C.norm(dim=0), torch.ones(2, dtype=F64), atol=1e-6)
    close(R.norm(dim=1), torch.ones(2, dtype=F64), atol=1e-6)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (30, 30)])
def test_3_pivots_are_those_of_lapack(shape: tuple[int, int]) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    M = torch.randn(*shape)
    want = linalg.qr(M.double().numpy(), pivoting=True, mode="economic")[2][: min(shape)].tolist()
    assert pivots(M, min(shape)).tolist() == want
    longest = M.norm(dim=0).argsort(descending=True)[: min(shape)].tolist()
    assert sorted(want) != sorted(longest) or want != longest  # without deflation it would be these


def test_3_of_equal_columns_the_first_and_deflated_ones_never() -> None:
    M = torch.tensor([[2.0, 0, 2, 0], [0, 1, 0, 2]])
    assert pivots(M, 2).tolist() == [0, 3]
    with pytest.raises(ValueError, match="only 2 of its"):
        pivots(M, 3)
    assert pivots(torch.tensor([[5.0, 4.9, 0], [0, 0, 1]]), 2).tolist() == [0, 2]  # by length it would be [0, 1]


def test_4_outputs_are_read_before_the_bias() -> None:
    layer = nn.Linear(6, 10)
    with torch.no_grad():
        layer.bias.fill_(300.0)
    x = torch.randn(3, 6)
    for dtype, atol in ((torch.float32, 5e-3), (torch.bfloat16, 0.05)):  # of outputs: bfloat16 has steps of 2 at 300
        half = copy.deepcopy(layer).to(dtype)
        model = one(half, selection="cpqr")
        a = adapter_of(model)
        W = half.weight.detach().float()
        with torch.no_grad():
            inner = a._inner(lp.Base(half), half.weight, x.to(dtype), half.unadapted(x.to(dtype)))
        close(inner.float(), F.linear(x.to(dtype).float(), W[a.rows]), atol=atol)


def test_4_under_an_adapter_that_is_no_weight() -> None:
    class Shift(lp.Adapter):
        def forward(self, base: lp.Base, x: Tensor) -> Tensor:
            return base(x) + 5.0

    layer = nn.Linear(6, 10).double()
    model = one(copy.deepcopy(layer), F64)
    x = torch.randn(3, 6, dtype=F64)
    alone = model(x)
    below = One(layer)
    lp.attach(layer, "shift", Shift(), dtype=F64)
    a = adapter_of(model)
    lp.attach(layer, "pmss", copy.deepcopy(a), dtype=F64)
    close(below(x), alone + 5.0)


def test_5_rank_and_places() -> None:
    W = torch.randn(40, 30, dtype=F64)
    for how in pmss.SELECTIONS:
        columns, rows = select(W, 11, 8, PMSS(selection=how))
        assert len(set(columns.tolist())) == 11 and len(set(rows.tolist())) == 8
        assert max(columns) < 30 and max(rows) < 40
    layer = nn.Linear(30, 40).double()
    a = adapter_of(one(layer, F64, r=8))
    change = a.weight(layer.weight.detach()) - layer.weight.detach()
    assert int(torch.linalg.matrix_rank(change)) == 8
    with torch.no_grad():
        a.U[:, 3:] = 0
    assert int(torch.linalg.matrix_rank(a.weight(layer.weight.detach()) - layer.weight.detach())) == 3


def quality(W: Tensor, places: tuple[Tensor, Tensor]) -> float:
    """What the best core leaves of W, relative."""
    C, R = W[:, places[0]], W[places[1]]
    best = torch.linalg.pinv(C) @ W @ torch.linalg.pinv(R)
    return float((W - C @ best @ R).norm() / W.norm())


def test_6_pivoted_picks_beat_random_ones() -> None:
    W = torch.randn(256, 64) @ torch.randn(64, 384) + 0.4 * torch.randn(256, 384)
    left = {how: quality(W, select(W, 64, 64, PMSS(selection=how))) for how in ("cpqr", "cpqr_sketch", "random")}
    assert left["cpqr"] < 0.75 * left["random"] and left["cpqr_sketch"] < 0.8 * left["random"]
    S = torch.linalg.svdvals(W)
    assert left["cpqr"] > float(S[64:].norm() / S.norm())  # nothing beats the singular vectors


def test_selections() -> None:
    W = torch.tensor([[9.0, 0, 0, 1], [0, 5, 0, 0], [0, 4, 3, 8]])
    assert [t.tolist() for t in select(W, 2, 2, PMSS(selection="norm"))] == [[0, 3], [2, 0]]
    assert [t.tolist() for t in select(W, 1, 1, PMSS(selection="norm_nested"))] == [[0], [0]]  # not row 2, the longest
    W = torch.ones(3, 40)
    W[:, 7] = 1e-6
    drawn = [select(W, 1, 1, PMSS(selection="inverse_norm", seed=s))[0].item() for s in range(5)]
    assert drawn == [7] * 5
    W = torch.randn(60, 50)
    first, same, other = (select(W, 9, 9, PMSS(selection="random", seed=s))[0].tolist() for s in (1, 1, 2))
    assert first == same and first != other
    state = torch.get_rng_state()
    select(W, 9, 9, PMSS())
    assert torch.equal(torch.get_rng_state(), state)


def test_7_a_load_takes_the_places_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama().eval()
    ours = copy.deepcopy(base)
    lp.inject(ours, PMSS(r=5))
    test_hf.randomize(ours)
    lp.save(ours, tmp_path / "adapter")

    def elsewhere(W: Tensor, c: int, r: int, method: PMSS) -> tuple[Tensor, Tensor]:
        return torch.arange(c), torch.arange(r).flip(0)

    monkeypatch.setattr(pmss, "select", elsewhere)
    other = lp.load(copy.deepcopy(base), tmp_path / "adapter")
    x = test_hf.batch(base)
    assert (test_hf.run(base, x) - test_hf.run(ours, x)).abs().max() > 1e-3
    assert torch.equal(test_hf.run(other, x), test_hf.run(ours, x))


@pytest.mark.parametrize("options", [{}, {"c": 3, "alpha": 9.0}, {"c": 7, "rank_pattern": {"*.v_proj": 2}}])
@pytest.mark.parametrize("make", [llama, test_hf.gpt2, test_hf.still_bert])
def test_8_export_is_a_plain_lora(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    if make is not llama and "rank_pattern" in options:
        options = options | {"rank_pattern": {}}
    base = make().eval()
    ours = copy.deepcopy(base)
    lp.inject(ours, PMSS(r=5, dropout=0.1, **options))
    for p in (p for p in ours.parameters() if p.requires_grad):
        nn.init.normal_(p, std=3.0)
    x = test_hf.batch(base)
    want = test_hf.run(ours, x)
    assert (want - test_hf.run(base, x)).abs().max() > 1e-2
    hf.save(ours, tmp_path / "peft")
    fields = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA" and fields["r"] == min(5, options.get("c") or 5)
    theirs = test_hf.in_peft(base, tmp_path / "peft").eval()
    close(test_hf.run(theirs, x), want, atol=2e-5)
    again = hf.load(copy.deepcopy(base), tmp_path / "peft")
    close(test_hf.run(again.eval(), x), want, atol=2e-5)
    assert next(iter(lp.adapters(again)))[1].adapters.keys() == {"lora"}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = One(nn.Linear(64, 64))
    lp.quantize(model, kind)
    lp.inject(model, PMSS(r=6, targets=("layer",)))
    a = adapter_of(model)
    nn.init.normal_(a.U)
    W = hosts.read(model.layer).detach().float()
    C, R = parts(a, W)
    x = torch.randn(3, 64)
    change = (model(x) - model.layer.unadapted(x)).float()
    want = F.linear(x, (C @ a.U @ R).detach())
    assert (change - want).norm() < 0.03 * want.norm()


def test_options() -> None:
    for bad, said in (
        ({"r": 0}, "PMSS needs a rank of at least 1, got r=0"),
        ({"c": 0}, "at least 1 column, got c=0"),
        ({"alpha": -1.0}, "alpha must be positive"),
        ({"selection": "svd"}, "selection must be one of cpqr, cpqr_sketch, norm.*; got 'svd'"),
        ({"normalize": "l1"}, "normalize must be one of unit, none; got 'l1'"),
        ({"oversample": -1}, "oversample must be 0 or more"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=said):
            PMSS(**bad)
    with pytest.raises(ValueError, match=r"layer: c=21, r=2, but its \(10, 20\) weight has fewer"):
        one(nn.Linear(20, 10), r=2, c=21)
    with pytest.warns(UserWarning, match="clamped to its smaller side 3"):
        assert adapter_of(one(nn.Linear(20, 3))).U.shape == (3, 3)
    layer = nn.Linear(6, 6)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match="layer: c=4, r=4, but only 0 of its columns or rows are independent"):
        one(layer)
    with pytest.raises(ValueError, match="layer: a picked column or row of its weight is all zeros"):
        one(layer, selection="random")
    with pytest.raises(ValueError, match="no linear or conv1d matches 'nowhere'; nearest"):
        lp.inject(llama(), PMSS(targets=("nowhere",)))
    with pytest.raises(ValueError, match="load the weights before injecting"):
        lp.inject(llama().to("meta"), PMSS())
