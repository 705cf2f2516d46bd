"""DoRA: the checks of its card (methods/lora.md) by their numbers, dense float64 references, peft as another oracle."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning_peft_plugins.reparameterized.dora import DoRA
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft import hf, hosts
from tests import test_hf
from tests.nets import llama
from tests.test_lora import F64, HOSTS, One, adapter_of, close, delta, inputs

KINDS = [name for name in HOSTS if "groups" not in name]


def one(layer: nn.Module, dtype: torch.dtype = torch.float32, fill: bool = True, **options: Any) -> Any:
    """``layer`` with DoRA of rank 4; factors and norms away from their start if ``fill``."""
    model = One(layer)
    lp.inject(model, DoRA(**{"r": 4, "targets": ("layer",)} | options), dtype=dtype)
    if fill:
        a = adapter_of(model)
        nn.init.normal_(a.A)
        nn.init.normal_(a.B)
        with torch.no_grad():
            a.m.mul_(torch.empty_like(a.m).uniform_(0.5, 2))
    return model


def dense(W: Tensor, change: Tensor, m: Tensor, detach: bool = True) -> Tensor:
    """The card's definition on (out, in) matrices, written out row by row."""
    rows = []
    for w, d, size in zip(W, change, m, strict=True):
        n = (w + d).square().sum().sqrt()
        rows.append(size / (n.detach() if detach else n) * (w + d))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_1_the_start_is_the_base_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    layer = HOSTS[kind]().to(dtype)
    x = inputs(layer, dtype)
    want = layer(x)
    model = one(layer, fill=False)
    assert torch.equal(model(x), want)
    a = adapter_of(model)
    assert a.m.dtype == torch.float32
    close(a.m, hosts.read(layer).float().norm(dim=1), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rslora", [False, True])
def test_1_forward_weight_and_merge_are_the_dense_map(kind: str, rslora: bool) -> None:
    layer: Any = HOSTS[kind]().double()
    x, reference = inputs(layer), copy.deepcopy(layer)
    model = one(layer, F64, alpha=3.0, rslora=rslora)
    a = adapter_of(model)
    with torch.no_grad():
        scale = 3.0 / (2.0 if rslora else 4.0)
        flat = delta(layer, a.A, a.B, scale)
        stored = flat.T if flat.shape != (len(a.m), a.A.shape[1]) and flat.dim() == 2 else flat.flatten(1)
        hosts.write(reference, dense(hosts.read(reference), stored, a.m))
        want, fast = reference(x), model(x)
        assert (want - layer.unadapted(x)).abs().max() > 0.1
        close(fast, want)
        close(lp.WeightAdapter.forward(a, lp.Base(layer), x), want)  # by the definition, never the fast path
        before = layer.weight.clone()
        merged = lp.merge(model)
        close(layer.weight, reference.weight)
        close(model(x), want)
        if getattr(layer, "bias", None) is not None:
            assert torch.equal(layer.bias, reference.bias)
        merged.undo()
        assert torch.equal(layer.weight, before) and torch.equal(model(x), fast)


@pytest.mark.parametrize("kind", KINDS)
def test_1_gradients_are_those_of_the_definition(kind: str) -> None:
    layer = HOSTS[kind]().double()
    x = inputs(layer)
    model = one(layer, F64)
    a = adapter_of(model)
    if (pad := getattr(layer, "padding_idx", None)) is not None:
        nn.init.zeros_(a.A[:, pad])  # where it starts, and stays for want of a gradient
    wanted = [a.A, a.B, a.m] + ([x.requires_grad_(True)] if x.is_floating_point() else [])
    fast = torch.autograd.grad(model(x).sin().sum(), wanted)
    slow = torch.autograd.grad(lp.WeightAdapter.forward(a, lp.Base(layer), x).sin().sum(), wanted)
    for f, s in zip(fast, slow, strict=True):
        if pad is not None and f.shape == a.m.shape:  # torch leaves the padding row's share of m out of a look-up
            continue
        torch.testing.assert_close(f, s, atol=1e-9, rtol=1e-9)


def test_2_by_hand() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.bias.copy_(torch.tensor([10.0, -20.0]))
    model = one(layer, fill=False, alpha=2.0, r=1)
    a = adapter_of(model)
    with torch.no_grad():
        a.A.copy_(torch.tensor([[1.0, 0.0]]))
        a.B.copy_(torch.tensor([[0.5], [-1.0]]))
    want = torch.tensor([[3.16228 + 10, 6.06339 - 20]])  # the bias is not scaled
    close(model(torch.tensor([[1.0, 1.0]])), want, atol=2e-5)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", KINDS[8]])
def test_3_first_step(kind: str) -> None:
    layer = HOSTS[kind]()
    model = one(layer, fill=False)
    model(inputs(layer, torch.float32)).pow(2).sum().backward()
    a = adapter_of(model)
    assert a.A.grad.abs().max() == 0 and a.B.grad.abs().max() > 0 and a.m.grad.abs().min() > 0
    assert all(p.grad is None and not p.requires_grad for n, p in model.named_parameters() if "adapters" not in n)


def test_6_the_norm_is_a_constant_for_autograd() -> None:
    layer = nn.Linear(6, 10).double()
    x = inputs(layer)
    model = one(layer, F64)
    a = adapter_of(model)
    grads = {}
    for detach in (True, False):
        W = dense(layer.weight, a.scale * a.B @ a.A, a.m, detach)
        grads[detach] = torch.autograd.grad(F.linear(x, W, layer.bias).sin().sum(), (a.A, a.B, a.m))
    mine = torch.autograd.grad(model(x).sin().sum(), (a.A, a.B, a.m))
    merged = torch.autograd.grad(F.linear(x, a.weight(layer.weight), layer.bias).sin().sum(), (a.A, a.B, a.m))
    for g, also, want, other in zip(mine, merged, grads[True], grads[False], strict=True):
        close(g, want, atol=1e-10)
        close(also, want, atol=1e-10)
        assert g.shape == a.m.shape or (g - other).abs().max() > 0.1 * g.abs().max()


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Linear, no bias", KINDS[8], KINDS[10]])
def test_6_dropout(kind: str) -> None:
    """Both products of the change see one dropped input, the base all of it."""
    layer: Any = HOSTS[kind]().double()
    x = inputs(layer)
    model = one(layer, F64, dropout=0.5).train()
    a = adapter_of(model)
    n = (hosts.read(layer) + a.scale * a.B @ a.A).norm(dim=1)
    torch.manual_seed(3)
    got = model(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    ratio = (a.m / n)[:, None]
    change = (ratio - 1) * hosts.read(layer) + ratio * a.scale * a.B @ a.A
    silent = copy.deepcopy(layer)
    if layer.bias is not None:
        nn.init.zeros_(silent.bias)
    with lp.disabled(silent):
        hosts.write(silent, change)
        want = layer.unadapted(x) + silent(dropped)
    close(got, want, atol=1e-9)
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: nn.Linear(6, 10), 64 + 10),
        (lambda: nn.Embedding(20, 8), 112 + 8),
        (lambda: nn.Conv2d(4, 6, (3, 5)), 264 + 6),
    ],
)
def test_8_parameter_counts(make: Any, count: int) -> None:
    assert sum(p.numel() for p in one(make()).parameters() if p.requires_grad) == count


def test_the_norm_by_its_parts_is_the_norm() -> None:
    model = one(nn.Linear(200, 120), alpha=1.0)
    a, W = adapter_of(model), model.layer.weight
    got, want = a.norms(W), (W.double() + a.scale * a.B.double() @ a.A.double()).norm(dim=1)
    assert not got.requires_grad
    assert float(((got - want) / want).abs().max()) < 5e-7


def test_the_norm_follows_the_weight() -> None:
    """Nothing of it is kept: twice the matrix has the same direction, so the output stays."""
    model = one(nn.Linear(6, 10, bias=False))
    x = torch.randn(3, 6)
    before = model(x)
    with torch.no_grad():
        model.layer.weight.mul_(2)
        adapter_of(model).B.mul_(2)
    close(model(x), before, atol=1e-5)


class Doubled(lp.WeightAdapter):
    def weight(self, W: Tensor) -> Tensor:
        return 2 * W


def test_m_starts_from_what_lies_below() -> None:
    model = One(nn.Linear(6, 10))
    lp.attach(model.layer, "doubled", Doubled())
    x = torch.randn(3, 6)
    want = model(x)
    lp.inject(model, DoRA(targets=("layer",)))
    assert torch.equal(model(x), want)


def test_a_row_of_zeros_stays_finite() -> None:
    """peft divides 0 by 0 there."""
    layer = nn.Linear(6, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    theirs: Any = peft.get_peft_model(
        One(copy.deepcopy(layer)),
        peft.LoraConfig(target_modules=["layer"], use_dora=True),  # type: ignore[arg-type]
    )
    x = torch.randn(4, 6)
    assert theirs(x)[:, 1].isnan().all()
    model = one(layer, fill=False)
    want = layer.unadapted(x)  # type: ignore[operator]
    assert torch.equal(model(x), want)
    model(x).pow(2).sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter_of(model).parameters())
    lp.merge(model)
    close(model(x), want, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = One(nn.Linear(64, 64))
    lp.quantize(model, kind)
    x = torch.randn(3, 64)
    want = model(x)
    lp.inject(model, DoRA(targets=("layer",)))
    a = adapter_of(model)
    close(a.m, hosts.read(model.layer).float().norm(dim=1), atol=1e-5)
    assert torch.equal(model(x), want)
    nn.init.normal_(a.B, std=0.3)
    W = a.weight(hosts.read(model.layer).float())
    close(model(x), F.linear(x, W, model.layer.bias.float()), atol=0.05)


# ---- against peft --------------------------------------------------------------------------------------------------

IN_PEFT: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (test_hf.still_bert, {"r": 4, "dropout": 0.0}),
    "llama": (llama, {"rslora": True, "alpha": 3.0, "rank_pattern": {"*.1.*.q_proj": 3}}),
    "gpt2": (test_hf.gpt2, {"targets": ("c_attn", "c_fc", "mlp.c_proj")}),
    "gpt2 embeddings": (test_hf.gpt2, {"targets": ("wpe",), "alpha": 4.0}),
    "cnn": (test_hf.Cnn, {"targets": ("conv", "point", "[f]c"), "rank_pattern": {"[f]c": 3}}),
}


@pytest.mark.parametrize("case", IN_PEFT)
def test_peft_computes_the_same_both_ways(case: str, tmp_path: Path) -> None:
    make, options = IN_PEFT[case]
    base = make()
    ours = copy.deepcopy(base)
    lp.inject(ours, DoRA(**{"r": 4} | options))
    test_hf.randomize(ours)
    hf.save(ours, tmp_path / "ours")
    theirs = test_hf.in_peft(base, tmp_path / "ours")
    assert theirs.peft_config["default"].use_dora
    same_function(ours, theirs, base)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back: Any = hf.load(copy.deepcopy(base), tmp_path / "theirs")
    assert isinstance(back.lightning_peft_record.methods[0], DoRA)
    same_function(back, theirs, base)


def same_function(ours: nn.Module, theirs: nn.Module, base: nn.Module) -> None:
    """Equal outputs and gradients."""
    x = test_hf.batch(base)
    with torch.no_grad():
        mine = test_hf.run(ours.eval(), x)
        assert (mine - test_hf.run(base.eval(), x)).abs().max() > 1e-2
        torch.testing.assert_close(mine, test_hf.run(theirs.eval(), x), atol=1e-5, rtol=1e-5)
    got, want = test_hf.gradients(ours, x), test_hf.gradients(theirs, x)
    want = {n.replace("magnitude_vector", "m"): g for n, g in want.items()}
    assert got.keys() == want.keys() and any(n.endswith(".m") for n in got)
    for name, g in got.items():
        torch.testing.assert_close(g.flatten(), want[name].flatten(), atol=1e-5, rtol=1e-4, msg=name)


def test_options() -> None:
    with pytest.raises(ValueError, match="DoRA needs a rank of at least 1, got r=0"):
        DoRA(r=0)
    with pytest.raises(ValueError, match="DoRA's dropout must lie in"):
        DoRA(dropout=1.0)
    with pytest.raises(ValueError, match="layer: DoRA adapts convolutions of one group, this has 2"):
        one(nn.Conv2d(8, 8, 3, groups=2))
    with pytest.raises(ValueError, match="max_norm rescales its rows on look-up; DoRA cannot"):
        one(nn.Embedding(9, 4, max_norm=1.0))
    with pytest.raises(ValueError, match="load the weights before injecting"):
        lp.inject(llama().to("meta"), DoRA())
