"""KaSA: the checks of its card by their numbers, dense float64 references, peft as another oracle."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning_peft_plugins.reparameterized.kasa import KaSA, least
from lightning_peft_plugins.reparameterized.lora import LoRA
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft import hf, hosts
from tests import test_hf
from tests.nets import llama
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs

KINDS = ["Linear", "Linear, no bias", "Conv1D"]


def one(layer: nn.Module, dtype: torch.dtype = torch.float32, fill: bool = True, **options: Any) -> Any:
    """``layer`` with KaSA of rank 4; its factors away from their start if ``fill``."""
    model = One(layer)
    lp.inject(model, KaSA(**{"r": 4, "targets": ("layer",)} | options), dtype=dtype)
    if fill:
        for p in adapter_of(model).parameters():
            nn.init.normal_(p)
    return model


def truncated(W: Tensor, r: int) -> Tensor:
    """The best approximation of rank min(out, in) - r."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    k = len(S) - r
    return (U[:, :k] * S[:k]) @ Vh[:k]


@pytest.mark.parametrize("shape", [(12, 16), (16, 12), (10, 10)])  # out below in: the authors' slice takes nothing out
def test_1_and_4_what_is_left_of_the_weight(shape: tuple[int, int]) -> None:
    layer = nn.Linear(*reversed(shape), bias=False)
    a, W, k = adapter_of(one(layer, fill=False)), layer.weight.detach(), min(shape)
    world = a.weight(W).detach()
    assert int(torch.linalg.matrix_rank(world, atol=1e-5)) == k - 4
    least = torch.linalg.svdvals(W.double())[-4:]
    assert float((W - world).norm()) == pytest.approx(float(least.square().sum().sqrt()), rel=1e-5)
    close(world, truncated(W.double(), 4).float(), atol=1e-6)
    again = nn.Linear(*reversed(shape), bias=False)
    with torch.no_grad():
        again.weight.copy_(world)  # r zero singular values: now there is nothing to take
    close(adapter_of(one(again, fill=False)).weight(world), world, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_2_the_start_is_the_truncated_base(kind: str, dtype: torch.dtype) -> None:
    layer: Any = HOSTS[kind]().to(dtype)
    x, before = inputs(layer, dtype), layer.weight.clone()
    base = layer(x)
    got = one(layer, fill=False)(x)
    world = truncated(hosts.read(layer).float(), 4)
    want = F.linear(x.float(), world, None if layer.bias is None else layer.bias.float())
    torch.testing.assert_close(got.float(), want, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=0)
    assert (got - base).abs().max() > 0.05 and torch.equal(layer.weight, before) and got.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_forward_weight_and_merge_are_the_dense_map(kind: str) -> None:
    layer: Any = HOSTS[kind]().double()
    x, reference = inputs(layer), copy.deepcopy(layer)
    model = one(layer, F64, alpha=3.0)
    a = adapter_of(model)
    with torch.no_grad():
        change = 3.0 / 4 * a.B @ torch.diag(a.s) @ a.A
        hosts.write(reference, truncated(hosts.read(reference), 4) + change)
        want, fast = reference(x), model(x)
        close(fast, want, atol=1e-5)  # the singular vectors are of float32
        close(lp.WeightAdapter.forward(a, lp.Base(layer), x), fast)
        before = layer.weight.clone()
        merged = lp.merge(model)
        close(layer.weight, reference.weight, atol=1e-6)
        close(model(x), fast)
        merged.undo()
        assert torch.equal(layer.weight, before) and torch.equal(model(x), fast)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dense_map(kind: str) -> None:
    layer: Any = HOSTS[kind]().double()
    x = inputs(layer).requires_grad_(True)
    model = one(layer, F64, alpha=3.0)
    a = adapter_of(model)
    wanted = (a.A, a.B, a.s, x)
    W = hosts.read(layer) - a.P @ a.Q + 3.0 / 4 * a.B @ torch.diag(a.s) @ a.A
    slow = torch.autograd.grad(F.linear(x, W, layer.bias).sin().sum(), wanted)
    for got, want in zip(torch.autograd.grad(model(x).sin().sum(), wanted), slow, strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    assert not a.P.requires_grad and not a.Q.requires_grad and not layer.weight.requires_grad


def test_3_counts_and_the_start() -> None:
    layer = nn.Linear(200, 120)
    model = one(layer, fill=False, r=64)
    a = adapter_of(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 64 * (200 + 120) + 64
    assert a.B.abs().max() == 0 and 0.9 < a.A.abs().max() * 200**0.5 <= 1
    assert 0.7 < a.s.std() < 1.3 and a.s.min() < 0  # no sign is asked of s
    model(torch.randn(3, 200)).pow(2).sum().backward()
    assert a.B.grad.abs().max() > 0 and a.A.grad.abs().max() == 0 and a.s.grad.abs().max() == 0
    (group,) = KaSA().param_groups(One(layer)) or []
    assert group["weight_decay"] == 0 and [p is a.s for p in group["params"]] == [True]


def test_5_by_hand() -> None:
    layer = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([5.0, 3.0, 1.0])))
    model = one(layer, fill=False, r=1, alpha=2.0)
    a = adapter_of(model)
    with torch.no_grad():
        a.A.copy_(torch.tensor([[1.0, 2.0, 2.0]]) / 3)
        a.B.copy_(torch.tensor([[0.0], [0.0], [1.0]]))
        a.s.fill_(0.5)
    close(model(torch.ones(3)), torch.tensor([5.0, 3.0, 5 / 3]), atol=1e-5)  # also of one dimension
    close(model(torch.ones(2, 1, 1, 3)), torch.tensor([5.0, 3.0, 5 / 3]).expand(2, 1, 1, 3), atol=1e-5)


def test_dropout_is_of_the_update_alone() -> None:
    layer = nn.Linear(6, 10).double()
    x = inputs(layer)
    model = one(layer, F64, dropout=0.5).train()
    a = adapter_of(model)
    torch.manual_seed(3)
    got = model(x)
    torch.manual_seed(3)
    update = F.linear(F.dropout(x, 0.5), a.scale * (a.B * a.s) @ a.A)
    close(got, F.linear(x, layer.weight - a.P @ a.Q, layer.bias) + update)
    model.eval()
    assert torch.equal(model(x), model(x))


# ---- the loss terms ------------------------------------------------------------------------------------------------


def two_layers(**options: Any) -> Any:
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 7))
    lp.inject(model, KaSA(**{"r": 3, "targets": ("*",)} | options))
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    return model


@pytest.mark.parametrize("gram", ["small", "large"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_penalty_is_the_papers_and_the_authors(gram: str, reduction: str) -> None:
    model = two_layers(beta=0.3, gamma=0.7, gram=gram, reduction=reduction)
    total = torch.zeros((), dtype=F64)
    for _, _, adapter in lp.adapters(model):
        A, B, s = (adapter.get_parameter(n).double() for n in "ABs")
        total += 0.3 * (s**2).sum()
        for M in (A @ A.T, B.T @ B) if gram == "small" else (A.T @ A, B @ B.T):
            total += 0.7 * torch.linalg.matrix_norm(M - torch.eye(len(M), dtype=F64))
    want = total / 2 if reduction == "mean" else total
    got = lp.penalty(model)
    assert got is not None and float(got) == pytest.approx(float(want.detach()), rel=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for g, w in zip(torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-4)


def test_7_the_penalty_at_its_corners() -> None:
    model = one(nn.Linear(8, 6), fill=False, beta=0.0, gamma=1.0)
    a = adapter_of(model)
    with torch.no_grad():
        a.A.copy_(torch.eye(8)[:4])
    got = lp.penalty(model)
    assert got is not None and float(got) == pytest.approx(4**0.5, abs=1e-5)  # |0 - 1| of B, nothing of A
    got.backward()
    assert a.B.grad.abs().max() == 0 and a.A.grad.isfinite().all() and a.A.grad.abs().max() < 1e-3


def test_the_penalty_is_of_full_precision_under_autocast() -> None:
    model = two_layers(gamma=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        got = lp.penalty(model)
    assert got is not None and got.dtype == torch.float32 and torch.equal(got, lp.penalty(model))  # type: ignore[arg-type]


def test_no_weights_no_penalty() -> None:
    assert lp.penalty(two_layers(beta=0.0, gamma=0.0)) is None


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = One(nn.Linear(64, 64))
    lp.quantize(model, kind)
    x = torch.randn(3, 64)
    lp.inject(model, KaSA(targets=("layer",)))
    base = hosts.read(model.layer).float()
    close(model(x), F.linear(x, truncated(base, 8), model.layer.bias.float()), atol=0.05)
    with pytest.raises(ValueError, match="layer: huggingface/peft's KaSA has no quantised layers"):
        hf.save(model, "nowhere")


@pytest.mark.parametrize("make", [llama, test_hf.gpt2])
def test_6_it_becomes_an_equal_lora_of_twice_the_rank(make: Any, tmp_path: Path) -> None:
    base = make()
    ours, x = copy.deepcopy(base), test_hf.batch(base)
    lp.inject(ours, method := KaSA(r=5, rank_pattern={"*.1.*": 12}))  # 2 x 12 is over a side that LoRA would clamp to
    test_hf.randomize(ours)
    want = test_hf.run(ours.eval(), x)
    lora = method.to_lora(ours)
    assert isinstance(lora, LoRA) and {len(a.get_parameter("A")) for _, _, a in lp.adapters(ours)} == {10, 24}
    torch.testing.assert_close(test_hf.run(ours, x), want, atol=1e-4, rtol=1e-4)
    hf.save(ours, tmp_path / "hf")
    theirs = test_hf.in_peft(base, tmp_path / "hf").eval()
    torch.testing.assert_close(test_hf.run(theirs, x), want, atol=1e-4, rtol=1e-4)


IN_PEFT: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (test_hf.still_bert, {"r": 4, "beta": 0.5}),
    "llama": (llama, {"r": 3, "alpha": 5.0, "gamma": 0.2, "rank_pattern": {"*.1.*.q_proj": 2}}),
    "a linear layer of a cnn": (test_hf.Cnn, {"r": 2, "targets": ("[f]c",)}),
}


@pytest.mark.parametrize("case", IN_PEFT)
def test_peft_computes_the_same_both_ways(case: str, tmp_path: Path) -> None:
    make, options = IN_PEFT[case]
    base = make()
    ours = copy.deepcopy(base)
    lp.inject(ours, KaSA(reduction="sum", **options))
    test_hf.randomize(ours)
    hf.save(ours, tmp_path / "ours")
    theirs = test_hf.in_peft(base, tmp_path / "ours")
    assert isinstance(theirs.peft_config["default"].kasa_config, peft.KasaConfig)
    same_function(ours, theirs, base)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back: Any = hf.load(copy.deepcopy(base), tmp_path / "theirs")
    method = back.lightning_peft_record.methods[0]
    assert isinstance(method, KaSA) and method.beta == options.get("beta", 1e-4)
    same_function(back, theirs, base)


def same_function(ours: nn.Module, theirs: Any, base: nn.Module) -> None:
    """Equal outputs, loss terms and gradients."""
    x = test_hf.batch(base)
    with torch.no_grad():
        mine = test_hf.run(ours.eval(), x)
        assert (mine - test_hf.run(base.eval(), x)).abs().max() > 1e-2
        torch.testing.assert_close(mine, test_hf.run(theirs.eval(), x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lp.penalty(ours), theirs.base_model._get_kasa_loss(), atol=1e-5, rtol=1e-5)
    got, want = test_hf.gradients(ours, x), test_hf.gradients(theirs, x)
    want = {n.replace("diag", "s"): g for n, g in want.items()}
    assert got.keys() == want.keys() and any(n.endswith(".s") for n in got)
    for name, g in got.items():
        torch.testing.assert_close(g, want[name], atol=1e-5, rtol=1e-4, msg=name)


def test_removing_it_gives_the_base_back() -> None:
    """peft's truncation stays in the base for good."""
    base = test_hf.still_bert()
    ours, x = copy.deepcopy(base.eval()), test_hf.batch(base)
    config = peft.LoraConfig(r=4, kasa_config=peft.KasaConfig(), target_modules=["query", "value"])
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config).unload().eval()
    lp.inject(ours, KaSA(r=4, targets=("query", "value")))
    with lp.disabled(ours):
        assert torch.equal(test_hf.run(ours, x), test_hf.run(base, x))
    lp.remove(ours)
    assert torch.equal(test_hf.run(ours, x), test_hf.run(base, x))
    assert (test_hf.run(theirs, x) - test_hf.run(base, x)).abs().max() > 1e-4


def test_options(tmp_path: Path) -> None:
    for options, match in (
        ({"r": 0}, "KaSA needs a rank of at least 1, got r=0"),
        ({"alpha": 0.0}, "KaSA's alpha must be positive"),
        ({"dropout": 1.0}, "KaSA's dropout must lie in"),
        ({"gram": "big"}, r"KaSA's gram must be one of \('small', 'large'\), got 'big'"),
        ({"reduction": "none"}, r"KaSA's reduction must be one of \('mean', 'sum'\)"),
        ({"beta": -1.0}, "beta and gamma must not be negative, got -1.0 and 0.001"),
    ):
        with pytest.raises(ValueError, match=match):
            KaSA(**options)
    with pytest.raises(ValueError, match=r"layer: r=4 leaves nothing of its \(4, 20\) weight; set rank_pattern"):
        one(nn.Linear(20, 4))
    with pytest.raises(ValueError, match="no linear or conv1d matches 'layr'; nearest: 'layer'"):
        one(nn.Linear(20, 4), targets=("layr",))
    with pytest.raises(ValueError, match="load the weights before injecting"):
        lp.inject(llama().to("meta"), KaSA())
    model = test_hf.gpt2()
    lp.inject(model, KaSA(r=4))
    with pytest.raises(ValueError, match="c_attn: huggingface/peft's KaSA has no transformers' Conv1D; to_lora"):
        hf.save(model, tmp_path)
    config = peft.LoraConfig(r=4, use_rslora=True, kasa_config=peft.KasaConfig(), target_modules=["q_proj"])
    peft.get_peft_model(llama(), config).save_pretrained(str(tmp_path / "rs"))
    with pytest.raises(ValueError, match="use_rslora or init_lora_weights, which method 'kasa' does not have"):
        hf.load(llama(), tmp_path / "rs")


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
def test_inverse_iterations_find_the_smallest_parts(shape: tuple[int, int]) -> None:
    torch.manual_seed(2)
    W = torch.randn(shape)
    for got, want in zip(least(W, 4, 60), least(W, 4, 0), strict=True):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=0)
    W[:, 3] = W[:, 7]  # of lower rank
    W[5] = W[9]
    U, S, Vh = least(W, 2, 40)
    S_all = torch.linalg.svdvals(W)
    torch.testing.assert_close(S, S_all[-2:], atol=1e-3, rtol=0)
    want = least(W, 2, 0)
    torch.testing.assert_close((U * S) @ Vh, (want[0] * want[1]) @ want[2], atol=1e-3, rtol=0)


def test_iterations_are_written_as_plain_lora_alone(tmp_path: Path) -> None:
    model = llama()
    method = KaSA(r=2, niter=8)
    lp.inject(model, method)
    with pytest.raises(ValueError, match="truncates the base by an exact SVD, this one by niter=8"):
        hf.save(model, tmp_path / "peft")
    assert method.to_lora(model).r == 4
    with pytest.raises(ValueError, match="KaSA's niter must be 0"):
        KaSA(niter=-1)
