"""SSVD: the checks of its card (methods/ssvd.md) by their numbers, and dense float64 references."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_peft_plugins.reparameterized.ssvd import SSVD
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft import hf, hosts
from tests import test_hf
from tests.nets import llama
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs

KINDS = ["Linear", "Linear, no bias", "Conv1D"]  # taller, wider, taller
ROTATIONS = ["first_order", "cayley", "matrix_exp"]


def one(layer: nn.Module, dtype: torch.dtype = torch.float32, fill: bool = True, **options: Any) -> Any:
    """``layer`` with SSVD of 3 vectors, away from its start if ``fill``."""
    model = One(layer)
    size = {} if "rotation_ratio" in options else {"r": 3}
    lp.inject(model, SSVD(**{"targets": ("layer",)} | size | options), dtype=dtype)
    if fill:
        with torch.no_grad():
            for p in adapter_of(model).parameters():
                nn.init.normal_(p, std=0.4)
    return model


def rotation(K: Tensor, kind: str) -> Tensor:
    """R from the vector, entry by entry in row-major order: the definition of the paper."""
    k = int((1 + math.isqrt(1 + 8 * len(K))) // 2)
    rows, place = [[torch.zeros((), dtype=K.dtype)] * k for _ in range(k)], 0
    for i in range(k):
        for j in range(i + 1, k):
            rows[i][j], rows[j][i] = K[place], -K[place]
            place += 1
    skew, eye = torch.stack([torch.stack(r) for r in rows]), torch.eye(k, dtype=K.dtype)
    if kind == "matrix_exp":
        return torch.linalg.matrix_exp(-2 * skew)
    return eye - 2 * skew if kind == "first_order" else torch.linalg.inv(eye + skew) @ (eye - skew)


def dense(a: Any, W: Tensor, kind: str = "first_order") -> Tensor:
    """U diag(S') Vh' with all singular triplets; the first k from the adapter, whose signs are its own."""
    U, S, Vh = (t.detach() for t in torch.linalg.svd(W.detach(), full_matrices=False))
    k = len(a.S)
    sign = (U[:, :k] * a.U).sum(0).sign()
    U, Vh = torch.cat([U[:, :k] * sign, U[:, k:]], 1), torch.cat([Vh[:k] * sign[:, None], Vh[k:]])
    values = torch.cat([S[:k] + torch.sigmoid(a.g) * a.s, S[k:]])
    return U @ torch.diag(values) @ torch.cat([rotation(a.K, kind) @ Vh[:k], Vh[k:]])


@pytest.mark.parametrize("form", ["branch", "weight"])
@pytest.mark.parametrize("kind", KINDS)
def test_1_the_start_is_the_base_bit_for_bit(kind: str, form: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer: Any = HOSTS[kind]().to(dtype)
        x = inputs(layer, dtype)
        want, before = layer(x), layer.weight.clone()
        for how in ROTATIONS:
            model = one(copy.deepcopy(layer), fill=False, form=form, rotation=how)
            assert torch.equal(model(x), want) and torch.equal(model.layer.weight, before)


def sharp(model: Any) -> None:
    """The singular triplets in float64, where injection keeps float32."""
    a, W = adapter_of(model), hosts.read(model.layer).detach()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    k = len(a.S)
    sign = (U[:, :k] * a.U).sum(0).sign()
    a.U, a.S, a.Vh = U[:, :k] * sign, S[:k], Vh[:k] * sign[:, None]


@pytest.mark.parametrize("form", ["branch", "weight"])
@pytest.mark.parametrize("how", ROTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_2_forward_gradient_and_merge_are_the_dense_map(kind: str, how: str, form: str) -> None:
    layer: Any = HOSTS[kind]().double()
    x = inputs(layer).requires_grad_(True)
    model = one(layer, F64, rotation=how, form=form)
    close(adapter_of(model).U.T @ adapter_of(model).U, torch.eye(3, dtype=F64), atol=1e-6)
    sharp(model)
    a = adapter_of(model)
    W, trained = hosts.read(layer).detach().clone(), (a.s, a.K, a.g, x)
    want = F.linear(x, dense(a, W, how), layer.bias)
    assert (want - layer.unadapted(x)).abs().max() > 0.05
    close(model(x), want)
    close(lp.WeightAdapter.forward(a, lp.Base(layer), x), want)
    fast, slow = (torch.autograd.grad(y.sin().sum(), trained) for y in (model(x), want))
    for f, s in zip(fast, slow, strict=True):
        assert s.abs().max() > 1e-4
        close(f, s, atol=1e-9)
    with torch.no_grad():
        before, unmerged = layer.weight.clone(), model(x)
        merged = lp.merge(model)
        close(hosts.read(layer), dense(a, W, how))
        close(model(x), unmerged)
        merged.undo()
        assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("how", "K", "want"),
    [
        ("first_order", (0.1,), [[1, -0.2], [0.2, 1]]),
        ("cayley", (0.1,), [[0.980198, -0.198020], [0.198020, 0.980198]]),
        ("matrix_exp", (0.1,), [[math.cos(0.2), -math.sin(0.2)], [math.sin(0.2), math.cos(0.2)]]),
        ("first_order", (0.1, -0.2, 0.05), [[1, -0.2, 0.4], [0.2, 1, -0.1], [-0.4, 0.1, 1]]),
        (
            "cayley",
            (0.1, -0.2, 0.05),
            [[0.904988, -0.171021, 0.389549], [0.209026, 0.976247, -0.057007], [-0.370546, 0.133017, 0.919240]],
        ),
    ],
)
def test_3_and_4_rotations_by_hand(how: str, K: tuple[float, ...], want: list[list[float]]) -> None:
    k = len(want)
    a = adapter_of(one(nn.Linear(5, 4).double(), F64, fill=False, r=k, rotation=how))
    with torch.no_grad():
        a.K.copy_(torch.tensor(K))
    R = torch.eye(k, dtype=F64) + a.turn().detach()
    close(R, torch.tensor(want, dtype=F64), atol=1e-6)
    error = float(torch.linalg.matrix_norm(R.T @ R - torch.eye(k, dtype=F64)))
    if how == "first_order":
        assert error == pytest.approx({2: 0.04 * 2**0.5, 3: 0.29698}[k], abs=1e-5)
    else:
        assert error < 1e-12


@pytest.mark.parametrize(
    ("how", "block", "values"),
    [
        ("first_order", [[3.2, -0.64], [0.38, 1.9]], (3.263372, 1.937627, 1)),
        ("cayley", [[3.136634, -0.633663], [0.376238, 1.862376]], (3.2, 1.9, 1)),
    ],
)
def test_4b_a_whole_layer_by_hand(how: str, block: list[list[float]], values: tuple[float, ...]) -> None:
    layer = nn.Linear(3, 4, bias=False).double()
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:3] = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    model = one(layer, F64, fill=False, r=2, rotation=how)
    a = adapter_of(model)
    with torch.no_grad():
        a.s.copy_(torch.tensor([0.4, -0.2]))
        a.K.fill_(0.1)
        W = a.weight(layer.weight)
        want = torch.zeros(4, 3, dtype=F64)
        want[:2, :2], want[2, 2] = torch.tensor(block), 1
        close(W, want, atol=1e-6)
        close(torch.linalg.svdvals(W), torch.tensor(values, dtype=F64), atol=1e-6)
        close(model(torch.ones(1, 3, dtype=F64)), want.sum(1)[None], atol=1e-6)


@pytest.mark.parametrize("how", ROTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_5_and_6_what_is_kept(kind: str, how: str) -> None:
    layer: Any = HOSTS[kind]().double()
    a = adapter_of(model := one(layer, F64, rotation=how))
    sharp(model)
    W = hosts.read(layer).detach()
    with torch.no_grad():
        new = a.weight(W)
        change = new - W
        assert change.abs().max() > 0.05
        close(a.U @ (a.U.T @ change), change)
        close((change @ a.Vh.T) @ a.Vh, change)
        gram = new @ new.T - W @ W.T  # output side: for a true rotation U stays, only values on it move
        values = torch.cat([(a.S + a.shift()).abs(), torch.linalg.svdvals(W)[3:]]).sort(descending=True).values
        off = (a.U.T @ gram @ a.U).fill_diagonal_(0).abs().max()
        if how == "first_order":
            assert (torch.linalg.svdvals(new) - values).abs().max() > 1e-2 and off > 1e-3
        else:
            close(torch.linalg.svdvals(new), values)
            assert off < 1e-10


def test_side_reference_turns_the_output_side_of_wide_layers_only() -> None:
    for shape, same in (((6, 10), True), ((10, 6), False)):
        layer = nn.Linear(*shape).double()
        ours, theirs = (
            one(copy.deepcopy(layer), F64, fill=False, rotation="cayley", side=s) for s in ("input", "reference")
        )
        for model in (ours, theirs):
            sharp(model)
            with torch.no_grad():
                adapter_of(model).K.copy_(torch.tensor([0.3, -0.2, 0.5]))
                adapter_of(model).s.fill_(0.2)
        W = layer.weight.detach()
        mine, other = (adapter_of(m).weight(W).detach() for m in (ours, theirs))
        if same:
            assert torch.equal(mine, other)
            continue
        flipped = One(nn.Linear(6, 10, bias=False).double())  # W^T with the method as it is, transposed back
        with torch.no_grad():
            flipped.layer.weight.copy_(W.T)
        lp.inject(flipped, SSVD(r=3, rotation="cayley", targets=("layer",)), dtype=F64)
        a, b = adapter_of(flipped), adapter_of(theirs)
        a.U, a.S, a.Vh = b.Vh.T, b.S, b.U.T
        a.load_state_dict(b.state_dict() | {n: getattr(a, n) for n in ("U", "S", "Vh")})
        close(other, a.weight(W.T).detach().T)
        assert (mine - other).abs().max() > 1e-2
        x = torch.randn(3, 10, dtype=F64)
        close(theirs(x), F.linear(x, other, layer.bias))


@pytest.mark.parametrize(("k", "count"), [(8, 37), (64, 2081), (256, 32897)])
def test_7_count(k: int, count: int) -> None:
    sides = (k, k + 3)
    a = adapter_of(one(nn.Linear(*sides), fill=False, r=k, niter=1))
    assert sum(p.numel() for p in a.parameters()) == count
    assert (
        sum(p.numel() for p in adapter_of(one(nn.Linear(*sides), r=k, niter=1, gate=False)).parameters()) == count - 1
    )


def test_7_the_fraction() -> None:
    assert len(adapter_of(one(nn.Linear(24, 30), rotation_ratio=0.4)).S) == 9
    assert len(adapter_of(one(nn.Linear(30, 24), rotation_ratio=1.0)).S) == 24
    model = One(nn.Linear(24, 30))
    lp.inject(model, SSVD(targets=("layer",)))
    assert len(adapter_of(model).S) == 9
    assert int(1024 * 0.4) == 409 and 409 + 409 * 408 // 2 + 1 == 83846


def test_7_first_gradients() -> None:
    model = one(nn.Linear(6, 10), fill=False)
    model(torch.randn(3, 6)).pow(2).sum().backward()
    a = adapter_of(model)
    assert a.s.grad.abs().min() > 0 and a.K.grad.abs().min() > 0 and not a.g.grad.any()
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.grad is not None} == {"s", "K", "g"}


def test_the_older_start() -> None:
    a = adapter_of(one(nn.Linear(60, 70), fill=False, r=54, init_s="kaiming"))
    bound = (6 / 54) ** 0.5
    assert 0.8 * bound < float(a.s.detach().abs().max()) <= bound and not a.K.any() and not a.g.any()
    close(a.shift(), a.s / 2, atol=1e-7)


def test_forms_by_size() -> None:
    a = adapter_of(one(nn.Linear(40, 50), r=10))
    bound = 2 * 40 * (10 + 50) // (40 + 50 + 10)  # 48 rows: there the branch costs what building twice does
    assert [a.whole(torch.empty(2, rows, 40)) for rows in (bound // 2, bound // 2 + 1)] == [False, True]
    assert not a.whole(torch.empty(1000, 40, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert not a.whole(torch.empty(1000, 40))
    assert adapter_of(one(nn.Linear(40, 50), r=4, form="weight")).whole(torch.empty(1, 40))
    assert not adapter_of(one(nn.Linear(40, 50), r=40, form="branch")).whole(torch.empty(1000, 40))


def test_the_core_keeps_its_precision_under_autocast() -> None:
    a = adapter_of(one(nn.Linear(6, 10), rotation="cayley"))
    want = a.core()
    with torch.autocast("cpu", torch.bfloat16):
        assert a.core().dtype == torch.float32 and torch.equal(a.core(), want)
        model = one(nn.Linear(6, 10), rotation="cayley", form="branch")
        assert model(torch.randn(2, 6)).dtype == torch.bfloat16


def test_a_load_takes_the_triplets_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama().eval()
    ours = copy.deepcopy(base)
    lp.inject(ours, SSVD(r=3))
    test_hf.randomize(ours)
    lp.save(ours, tmp_path / "adapter")
    svd = torch.linalg.svd

    def elsewhere(*args: Any, **kwargs: Any) -> Any:  # another machine, whose SVD gives another basis
        U, S, Vh = svd(*args, **kwargs)
        return U.roll(1, 1), S, Vh.roll(1, 0)

    monkeypatch.setattr(torch.linalg, "svd", elsewhere)
    other = lp.load(copy.deepcopy(base), tmp_path / "adapter")
    x = test_hf.batch(base)
    assert torch.equal(test_hf.run(other, x), test_hf.run(ours, x))


@pytest.mark.parametrize("make", [llama, test_hf.gpt2])
def test_the_export_is_a_plain_lora(make: Any, tmp_path: Path) -> None:
    base = make()
    ours = copy.deepcopy(base)
    lp.inject(ours, SSVD(rotation_ratio=0.2, rotation="cayley"))
    test_hf.randomize(ours)
    hf.save(ours, tmp_path / "folder")
    x = test_hf.batch(base)
    want = test_hf.run(ours.eval(), x)
    assert (want - test_hf.run(base.eval(), x)).abs().max() > 1e-2
    theirs = test_hf.in_peft(base, tmp_path / "folder").eval()
    torch.testing.assert_close(test_hf.run(theirs, x), want, atol=1e-5, rtol=1e-5)


def test_report() -> None:
    model = one(nn.Linear(5, 4), fill=False, r=2)
    with torch.no_grad():
        adapter_of(model).K.fill_(0.1)
    assert SSVD(r=2).report(model)["rotation_error"] == {"layer": pytest.approx(0.04)}
    assert SSVD(r=2, rotation="cayley").report(model) == {}


def test_options() -> None:
    for bad, said in (
        ({"rotation": "linear"}, "rotation must be one of first_order, cayley, matrix_exp; got 'linear'"),
        ({"side": "out"}, "side must be one of input, reference"),
        ({"init_s": "ones"}, "init_s must be one of zero, kaiming"),
        ({"form": "dense"}, "form must be one of auto, branch, weight"),
        ({"r": 2, "rotation_ratio": 0.1}, "r=2 or rotation_ratio=0.1, not both"),
        ({"r": 0}, "at least 1 vector, got r=0"),
        ({"rotation_ratio": 1.5}, r"in \(0, 1\], got 1.5"),
        ({"rotation_ratio": 0.0}, r"in \(0, 1\], got 0.0"),
        ({"niter": -1}, "niter must be 0"),
    ):
        with pytest.raises(ValueError, match=said):
            SSVD(**bad)
    with pytest.raises(ValueError, match="layer: r=5 asks for 5 of its 3 singular vectors"):
        one(nn.Linear(20, 3), r=5)
    with pytest.raises(ValueError, match="layer: rotation_ratio=0.2 asks for 0 of its 3"):
        one(nn.Linear(20, 3), rotation_ratio=0.2)
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match="layer: its weight is all zeros"):
        one(layer)
    with pytest.raises(ValueError, match="no linear or conv1d matches 'nowhere'; nearest"):
        lp.inject(llama(), SSVD(targets=("nowhere",)))
    with pytest.raises(ValueError, match="load the weights before injecting"):
        lp.inject(llama().to("meta"), SSVD())
