"""Sparse masks by the checks of their card (methods/sparse_selective.md): dense float64 references, and peft's SHiRA.

The sparse difference and the choice of entries (plugins/selective/sparse.py) are tested here for fish_mask too.
"""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning_peft_plugins.selective.bitfit import BitFit
from lightning_peft_plugins.selective.sparse import SparseLinear, highest
from lightning_peft_plugins.selective.sparse_mask import SparseMask
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft import hosts
from tests import nets
from tests.selective import assert_folders_agree, count, moved_by_training
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs
from tests.zoo import bases as zoo


def one(layer: nn.Module, dtype: torch.dtype = F64, **options: Any) -> Any:
    """``layer`` with half of its entries away from zero."""
    model = One(layer)
    lp.inject(model, SparseMask(**{"targets": ("layer",), "density": 0.5} | options), dtype=dtype)
    nn.init.normal_(adapter_of(model).v)
    return model


def mask_of(adapter: Any) -> Tensor:
    """(out, in), True at the chosen entries."""
    mask = torch.zeros(adapter.shape, dtype=torch.bool)
    for row, column in adapter.index.T.tolist():
        assert not mask[row, column]
        mask[row, column] = True
    return mask


@pytest.mark.parametrize("kind", HOSTS)
def test_6_forward_gradient_and_merge_are_the_dense_map(kind: str) -> None:
    layer: Any = HOSTS[kind]().double()
    x, before = inputs(layer), layer.weight.detach().clone()
    if x.is_floating_point():
        x.requires_grad_()
    model = one(layer)
    a = adapter_of(model)
    dense = torch.zeros(a.shape, dtype=F64)
    for (row, column), value in zip(a.index.T.tolist(), a.v.tolist(), strict=True):
        dense[row, column] = value
    stored = dense.T if hosts.kind(layer) in ("conv1d", "embedding") else dense.view(before.shape)
    W = (before + stored).requires_grad_()
    bare = copy.deepcopy(layer)
    lp.detach(bare, "sparse_mask")
    want, got = torch.func.functional_call(bare, {"weight": W}, (x,)), model(x)
    close(got, want)
    wrt = [x] if x.requires_grad else []
    dW, *dx = torch.autograd.grad(want.sin().sum(), [W, *wrt])
    dv, *mine = torch.autograd.grad(got.sin().sum(), [a.v, *wrt])
    matrix = dW.T if hosts.kind(layer) in ("conv1d", "embedding") else dW.flatten(1)
    close(dv, matrix[tuple(a.index)])
    assert all(torch.allclose(m, w, atol=1e-10) for m, w in zip(mine, dx, strict=True))
    mask = mask_of(a)
    mask = mask.T if hosts.kind(layer) in ("conv1d", "embedding") else mask.view(before.shape)
    merged = lp.merge(model)
    close(layer.weight, W)
    assert torch.equal(layer.weight[~mask], before[~mask]) and (layer.weight[mask] != before[mask]).all()
    merged.undo()
    assert torch.equal(layer.weight, before)


def test_6_first_and_second_derivatives_by_finite_differences() -> None:
    torch.manual_seed(0)
    index = torch.tensor([[0, 2, 2], [1, 0, 3]], dtype=torch.int32)
    x, W, b, v = (torch.randn(*s, dtype=F64, requires_grad=True) for s in ((2, 2, 4), (3, 4), (3,), (3,)))
    assert torch.autograd.gradcheck(SparseLinear.apply, (x, W, b, index, v))
    assert torch.autograd.gradcheck(SparseLinear.apply, (x, None, None, index, v, (3, 4)))
    assert torch.autograd.gradgradcheck(SparseLinear.apply, (x, W, b, index, v))


def test_no_layer_keeps_a_second_weight_for_the_backward_pass() -> None:
    layer = nn.Linear(64, 48)
    model, kept = one(layer, torch.float32, density=0.1), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(2, 64)).sum().backward()
    big = [t for t in kept if t.numel() >= 64 * 48]
    assert big and all(t.data_ptr() == layer.weight.data_ptr() for t in big)


@pytest.mark.parametrize("rule", ["random", "magnitude", "small_magnitude"])
def test_1_the_start_is_the_base_and_what_is_not_chosen_never_moves(rule: str) -> None:
    model = zoo.llama().requires_grad_(False)
    want, before = model(**zoo.text()).logits, {k: v.clone() for k, v in model.state_dict().items()}
    lp.inject(model, SparseMask(density=0.05, rule=rule))
    assert torch.equal(model(**zoo.text()).logits, want)
    masks = {n: mask_of(a) for n, _, a in lp.adapters(model)}
    assert moved_by_training(model, zoo.text()) == []  # AdamW with weight decay, 20 steps, given every parameter
    lp.merge(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and len(masks) == 14
    for key, old in before.items():
        mask = masks.get(key.removesuffix(".weight"), torch.zeros(old.shape, dtype=torch.bool))
        assert torch.equal(after[key][~mask], old[~mask])
        assert (after[key][mask] != old[mask]).all()


def oracle(scores: list[Tensor], k: int) -> list[list[int]]:
    """By sorting all scores at once, of equals the first."""
    order = sorted(((-float(s), i, j) for i, t in enumerate(scores) for j, s in enumerate(t.flatten())))[:k]
    return [sorted(j for _, i, j in order if i == which) for which in range(len(scores))]


@pytest.mark.parametrize("seed", range(4))
def test_3_exactly_the_highest_and_of_equals_the_first(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = [torch.randn(shape, generator=g).pow(5) for shape in ((7, 9), (30,), (4, 4))]
    scores[0][::2] = scores[0][1, 1]  # ties within a tensor and across two
    scores[1][3:20] = scores[0][1, 1]
    scores[2][:, 1] = -torch.inf
    scores[2][0, 0], scores[2][1, 0] = 0.0, -0.0
    for k in (1, 2, 30, 50, 60, 80, 105):
        got = [c.tolist() for c in highest(scores, k)]
        assert got == oracle(scores, k) and sum(map(len, got)) == k


def test_3_counts_by_layer_over_all_layers_and_by_rank() -> None:
    assert count(zoo.llama(), SparseMask(density=0.05)) == 2 * (2 * 51 + 2 * 25 + 3 * 76)  # 1024, 512, 1536 weights
    assert count(zoo.llama(), SparseMask(density=0.05, scope="global")) == int(0.05 * 2 * 7680)
    assert count(zoo.llama(), SparseMask(r=2)) == 2 * 2 * (2 * 64 + 2 * 48 + 3 * 80)
    assert count(One(nn.Linear(512, 512)), SparseMask(targets=("layer",), density=0.005)) == 1310
    model = zoo.llama()
    model.get_submodule("model.layers.0.mlp.up_proj").weight.data *= 100  # pyright: ignore
    lp.inject(model, SparseMask(density=0.05, scope="global", rule="magnitude"))
    assert [(n, len(a.v)) for n, _, a in lp.adapters(model)] == [("model.layers.0.mlp.up_proj", 768)]


@pytest.mark.parametrize(("rule", "want"), [("magnitude", [[0, 1], [1, 0]]), ("small_magnitude", [[0, 1], [0, 1]])])
def test_rules_by_hand(rule: str, want: list[list[int]]) -> None:
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[1.0, -4.0], [3.0, 2.0]])
    assert adapter_of(one(layer, rule=rule)).index.tolist() == want


def test_8_a_seed_gives_one_mask_and_each_layer_its_own() -> None:
    masks = []
    for seed, state in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(state)
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        lp.inject(model, SparseMask(density=0.2, seed=seed))
        masks.append([a.index.tolist() for _, _, a in lp.adapters(model)])
    assert masks[0] == masks[1] != masks[2]
    assert masks[0][0] != masks[0][1]  # with peft's random_seed all layers of a shape have the same


def test_8_a_file_keeps_its_entries_whatever_the_rule_would_choose(tmp_path: Path) -> None:
    model = zoo.llama()
    lp.inject(model, SparseMask(density=0.05))
    a = next(a for _, _, a in lp.adapters(model))
    a.index = torch.tensor([[0, 1, 2], [5, 6, 7]], dtype=torch.int32)  # other entries, and fewer
    a.v.data = torch.tensor([1.0, 2.0, 3.0])
    lp.save(model, tmp_path / "adapter")
    again = lp.load(zoo_copy(model), tmp_path / "adapter")
    b = next(b for _, _, b in lp.adapters(again))
    assert torch.equal(a.index, b.index) and torch.equal(a.v, b.v)
    torch.testing.assert_close(again(**zoo.text()).logits, model(**zoo.text()).logits, atol=0, rtol=0)


def zoo_copy(model: nn.Module) -> Any:
    base = copy.deepcopy(model)
    lp.remove(base)
    return base


def test_7_the_padding_row_is_never_chosen() -> None:
    layer = nn.Embedding(6, 4, padding_idx=2)
    a = adapter_of(one(layer, density=1.0))
    assert a.shape == (4, 6) and len(a.v) == 20 and 2 not in a.index[1]


def test_in_bfloat16_small_steps_add_up_and_are_rounded_once() -> None:
    layer = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    nn.init.ones_(layer.weight)
    model = one(layer, torch.float32, density=1.0)
    v = adapter_of(model).v
    nn.init.zeros_(v)
    for _ in range(16):
        v.data += 1e-3  # a bfloat16 weight of 1 would stay 1
    x = torch.eye(4, dtype=torch.bfloat16)
    assert v.dtype == torch.float32 and model(x).dtype == torch.bfloat16
    assert (model(x) == torch.tensor(1.016).to(torch.bfloat16)).all()
    lp.merge(model)
    assert (layer.weight == torch.tensor(1.016).to(torch.bfloat16)).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_under_autocast_and_beside_trained_biases_gradients_are_the_definitions(autocast: bool) -> None:
    layer = nn.Linear(6, 10)
    model = One(layer)
    lp.inject(model, [SparseMask(targets=("layer",), density=0.5), BitFit(targets=("layer",))])
    a = adapter_of(model)
    nn.init.normal_(a.v)
    x, grads = torch.randn(3, 6, requires_grad=True), []
    for run in (model, lambda x: F.linear(x, a.weight(layer.weight), layer.bias)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = run(x)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        grads.append(torch.autograd.grad(y.float().square().sum(), (a.v, layer.bias, x)))
    for got, want in zip(*grads, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, atol=0.05 if autocast else 1e-5, rtol=0.02 if autocast else 1e-5)


def test_on_a_quantised_base_the_difference_is_added_and_merges_by_dequantising() -> None:
    pytest.importorskip("bitsandbytes")
    model = zoo.nf4_llama()
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    W, x = hosts.read(layer).float().clone(), torch.randn(2, 32)
    plain = layer(x)
    lp.inject(model, SparseMask(density=0.1, rule="magnitude"))
    a: Any = layer.adapters["sparse_mask"]  # pyright: ignore
    assert torch.equal(layer(x), plain)
    nn.init.normal_(a.v)
    S = a.weight(torch.zeros(32, 32))
    torch.testing.assert_close(layer(x), plain + x @ S.T, atol=1e-5, rtol=1e-5)
    assert W.abs()[mask_of(a)].min() >= W.abs()[~mask_of(a)].max()
    lp.merge(model)
    merged: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    torch.testing.assert_close(merged.weight, W + S)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density is a share of the weights in \(0, 1\], got 0.0"),
        ({"density": 1.1}, r"density is a share .* got 1.1"),
        ({"density": 1e-4}, r"density 0.0001 of 1024 weights of 'model.layers.0.self_attn.q_proj' is less than one"),
        ({"density": 1e-5, "scope": "global"}, r"density 1e-05 of 15360 weights of 14 layers is less than one entry"),
        ({"scope": "model"}, r"scope is 'layer' or 'global', got 'model'"),
        ({"rule": "fisher"}, r"rule is one of .*got 'fisher'; fish_mask chooses by gradients"),
        ({"r": -1}, r"r is at least 1 \(0: not used\), got -1"),
        ({"r": 2, "density": 0.5}, r"density and scope have no effect"),
        ({"r": 2, "scope": "global"}, r"density and scope have no effect"),
        ({"r": 16, "targets": ("q_proj",)}, None),
        ({"r": 17, "targets": ("q_proj",)}, r"r=17 gives 'model.layers.0.self_attn.q_proj' 1088 entries, .* 1024 weig"),
        ({"targets": ("q_prj",)}, r"'q_prj'; nearest: 'q_proj'"),
        ({"exclude": ("lm_head",)}, r"exclude 'lm_head' leaves out nothing"),
        ({"layers": "7"}, r"layers '7' choose no block"),
        ({"targets": ("norm",)}, r"no linear or conv1d or embedding or conv matches 'norm'"),
    ],
)
def test_bad_options_and_what_matches_nothing_raise(options: dict[str, Any], message: str | None) -> None:
    if message is None:  # the bound itself is allowed
        lp.inject(zoo.llama(), SparseMask(**options))
        return
    with pytest.raises(ValueError, match=message):
        lp.inject(zoo.llama(), SparseMask(**options))


def test_weights_that_are_no_numbers_are_refused() -> None:
    layer = nn.Linear(4, 4)
    layer.weight.data[1, 1] = torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        one(layer, rule="magnitude")
    with pytest.raises(ValueError, match="sparse_mask starts from the base's values"), torch.device("meta"):
        one(nn.Linear(4, 4))


# ---- huggingface/peft ----------------------------------------------------------------------------------------------


def bert() -> nn.Module:
    return nets.bert(initializer_range=0.2)


@pytest.mark.parametrize("make", [zoo.llama, bert], ids=["llama", "bert"])
def test_peft_computes_the_same_and_folders_go_both_ways(make: Any, tmp_path: Path) -> None:
    base, batch = make().eval(), zoo.text() if make is zoo.llama else zoo.sentences()
    names = ["q_proj", "down_proj"] if make is zoo.llama else ["query", "intermediate.dense"]
    config = peft.ShiraConfig(r=2, target_modules=names, random_seed=3)
    ours = assert_folders_agree(base, config, batch, tmp_path)
    assert len(list(lp.adapters(ours))) == 4
    assert all(len(a.v) == 2 * sum(a.shape) for _, _, a in lp.adapters(ours))  # pyright: ignore


def test_what_peft_does_not_have_is_refused(tmp_path: Path) -> None:
    for make, options, message in (
        (zoo.llama, {"density": 0.05}, r"only sparse_mask\(r=...\) goes into its format"),
        (zoo.gpt2, {"r": 2}, r"transformer.h.0.attn.c_attn: huggingface/peft's SHiRA has linear layers alone"),
    ):
        model = make()
        lp.inject(model, SparseMask(**options))
        with pytest.raises(ValueError, match=message):
            lp.hf.save(model, tmp_path / "out")
    with pytest.raises(ValueError, match="other base"):
        SparseMask.from_hf({"peft_type": "SHIRA", "r": 2}, {}, zoo.llama())
