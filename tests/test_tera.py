"""TeRA: the checks of its card (methods/tera.md) by their numbers, and dense float64 references."""

import copy
import math
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_peft_plugins.reparameterized.tera import Network, TeRA, modes
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft import hosts
from tests import test_hf
from tests.nets import llama
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs

KINDS = ["Linear", "Linear, no bias", "Conv1D"]  # 10 x 6, 6 x 10, 10 x 6
SHAPES: dict[str, dict[str, Any]] = {
    "whole in": {},
    "whole out": {"whole_side": "out"},
    "both split": {"whole_side": "none", "zero_mode": 3},
    "ranks": {"max_rank": 3, "scale": 0.5},
}


def one(layer: nn.Module, dtype: torch.dtype = torch.float32, fill: bool = True, **options: Any) -> Any:
    """``layer`` with TeRA in modes near 3, its vectors away from their start if ``fill``."""
    model = One(layer)
    lp.inject(model, TeRA(**{"mode_size": 3, "targets": ("layer",)} | options), dtype=dtype)
    if fill:
        with torch.no_grad():
            for d in adapter_of(model).vectors():
                nn.init.normal_(d)
    return model


def dense(a: Any, dtype: torch.dtype = F64) -> Tensor:
    """The update by the definition: one sum over all ranks, as an einsum over the order-N tensor."""
    shared, d = a.shared, a.vectors()
    N = len(d)
    ranks, sizes = string.ascii_lowercase[:N], string.ascii_uppercase[:N]
    terms = [ranks, *ranks, *(r + i for r, i in zip(ranks, sizes, strict=True))]
    A = [shared.drawn[f"A{n}"].to(dtype) for n in range(1, N + 1)]
    G = shared.drawn["G"].to(dtype).reshape([len(v) for v in d])
    T = torch.einsum(f"{','.join(terms)}->{sizes}", G, *d, *A)
    return a.scale * a.gain * T.reshape(math.prod(shared.sizes[: shared.split]), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_1_the_start_is_the_base_and_one_vector_wakes_first(kind: str, rows: int, dtype: torch.dtype) -> None:
    layer: Any = HOSTS[kind]().to(dtype)
    x = inputs(layer, dtype)[0].repeat(rows, 1)
    want = layer(x)
    model = one(layer, fill=False)
    a = adapter_of(model)
    assert torch.equal(model(x), want)
    model(x).float().square().sum().backward()
    N = len(a.vectors())
    assert [bool(v.grad.any()) for v in a.vectors()] == [False] * (N - 1) + [True]  # the whole side, last
    assert not a.vectors()[-1].any() and all(torch.equal(v, torch.ones_like(v)) for v in a.vectors()[:-1])
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        f"d{n}" for n in range(1, N + 1)
    }


@pytest.mark.parametrize("rows", [1, 30])  # beside the base, and built whole
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_2_and_8_forward_gradient_and_merge_are_the_dense_map(kind: str, shape: str, rows: int) -> None:
    layer: Any = HOSTS[kind]().double()
    x = inputs(layer).repeat(rows, 1, 1).requires_grad_(True)
    model = one(layer, F64, **SHAPES[shape])
    a, W = adapter_of(model), hosts.read(layer).detach().clone()
    assert rows == 1 or x.numel() // x.shape[-1] > max(W.shape)
    want = F.linear(x, W + dense(a), layer.bias)
    assert (want - layer.unadapted(x)).abs().max() > 0.05
    close(model(x), want)
    close(lp.WeightAdapter.forward(a, lp.Base(layer), x), want)
    trained = (*a.vectors(), x)
    fast, slow = (torch.autograd.grad(y.sin().sum(), trained) for y in (model(x), want))
    for f, s in zip(fast, slow, strict=True):
        torch.testing.assert_close(f, s, atol=1e-9, rtol=1e-9)
    with torch.no_grad():
        unmerged, before = model(x), layer.weight.clone()
        merged = lp.merge(model)
        close(layer(x), want)
        close(model(x), unmerged)
        merged.undo()
        assert torch.equal(layer.weight, before)


def network(G: list[list[float]], A: list[Any], out: tuple[int, ...], fan_in: tuple[int, ...]) -> Network:
    shared = Network(out, fan_in, TeRA())
    tensors = [torch.tensor(G, dtype=torch.float32), *(torch.tensor(a, dtype=torch.float32) for a in A)]
    shared.drawn = dict(zip(shared.drawn, tensors, strict=True))
    shared._copies.clear()
    return shared


def test_3_by_hand() -> None:
    A = [[[1, 0], [1, 1]], [[1, 2], [0, 1]], [[1, 0], [1, 1]]]
    shared = network([[1, 2, 3, 4], [5, 6, 7, 8]], A, (2,), (2, 2))
    d = [torch.tensor(v, dtype=F64) for v in ((1.0, -1.0), (1.0, 2.0), (1.0, 0.5))]
    close(shared.matrix(d), torch.tensor([[-6, -2, -24, -8], [-8, -3, -38, -14]], dtype=F64))
    y = shared.apply(torch.ones(1, 4, dtype=F64), *shared.sides(d))
    close(y, torch.tensor([[-40, -63]], dtype=F64))


@pytest.mark.parametrize(
    ("out", "fan_in"), [((6,), (2, 2)), ((4,), (3, 2)), ((2, 3), (4,)), ((8,), (2, 2, 2)), ((4, 4, 4), (64,))]
)
def test_4_the_rank_is_full(out: tuple[int, ...], fan_in: tuple[int, ...]) -> None:
    shared = Network(out, fan_in, TeRA())
    d = [torch.randn(r, dtype=F64) for r in shared.ranks]
    full = min(math.prod(out), math.prod(fan_in))
    assert int(torch.linalg.matrix_rank(shared.matrix(d))) == full
    assert sum(map(len, d)) < math.prod(out) * math.prod(fan_in)
    ranks = Network(out, fan_in, TeRA(max_rank=2)).ranks
    low = [torch.randn(r, dtype=F64) for r in ranks]
    bound = min(math.prod(ranks[: len(out)]), math.prod(ranks[len(out) :]))
    assert int(torch.linalg.matrix_rank(Network(out, fan_in, TeRA(max_rank=2)).matrix(low))) == bound


def test_4_trained_updates_have_full_rank_at_few_parameters() -> None:
    """A fit of a random full-rank target: 64 + 3 * 4 numbers move, the update's rank is 64."""
    layer = nn.Linear(64, 64, bias=False)
    model = one(layer, fill=False, mode_size=4)
    a, x = adapter_of(model), torch.randn(60, 64)
    assert sum(p.numel() for p in a.parameters()) == 76
    optimizer = torch.optim.Adam(a.parameters(), lr=0.05)
    target = layer.unadapted(x).detach() + torch.randn(60, 64)
    losses = []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all((v - 1).abs().min() > 1e-3 for v in a.vectors()[:-1]) and a.vectors()[-1].abs().min() > 1e-4
    assert int(torch.linalg.matrix_rank(a.change().detach().double())) == 64


@pytest.mark.parametrize(
    ("n", "size", "want"),
    [
        (4096, 8, (8, 8, 8, 8)),
        (4096, 64, (64, 64)),
        (4096, 16, (16, 16, 16)),
        (4096, 2, (2,) * 12),
        (1024, 8, (16, 8, 8)),
        (32, 8, (8, 4)),
        (11008, 8, (43, 8, 8, 4)),
        (6, 8, (3, 2)),
        (2, 8, (2,)),
        (1, 8, (1,)),
        (4099, 8, (4099,)),
    ],
)
def test_5_modes(n: int, size: int, want: tuple[int, ...]) -> None:
    assert modes(n, size) == want


def sizes(shape: tuple[int, int], **options: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return TeRA(**options)._modes("layer", nn.Linear(shape[1], shape[0], bias=False, device="meta"))


def test_5_sides_and_counts() -> None:
    assert sizes((4096, 4096)) == ((8, 8, 8, 8), (4096,)) and 64 * sum(sum(s) for s in sizes((4096, 4096))) == 264_192
    assert 64 * sum(sum(s) for s in sizes((4096, 4096), mode_size=64)) == 270_336
    given = sizes((4096, 4096), tensor_shapes={"layer": (64, 64, 64, 64)})
    assert given == ((64, 64), (64, 64))
    five = sizes((4096, 4096), tensor_shapes={"layer": (64, 64, 16, 16, 16)})
    assert five == ((64, 64), (16, 16, 16)) and 64 * sum(sum(s) for s in five) == 11_264
    assert sizes((4096, 1024), whole_side="out") == ((4096,), (16, 8, 8))
    assert sizes((1024, 4096), whole_side="min") == ((1024,), (8, 8, 8, 8))
    assert sizes((4096, 1024), whole_side="min") == ((8, 8, 8, 8), (1024,))
    assert sizes((64, 64), whole_side="none") == ((8, 8), (8, 8))
    assert sizes((7, 64)) == ((7,), (8, 8))  # a prime cannot be split, so the other side is
    assert sizes((64, 7), whole_side="out") == ((8, 8), (7,))
    assert sizes((7, 5)) == ((7,), (5,))


def test_5_where_zero_lies() -> None:
    for options, want in (({}, 3), ({"whole_side": "out"}, 1), ({"whole_side": "none"}, 1), ({"zero_mode": 2}, 2)):
        a = adapter_of(one(nn.Linear(12, 12), fill=False, mode_size=4, **options))
        assert [n for n, v in enumerate(a.vectors(), 1) if not v.any()] == [want]


def test_6_layers_of_one_shape_share_and_files_stay_small(tmp_path: Path) -> None:
    model = llama().eval()
    lp.inject(model, TeRA(targets=("q_proj", "o_proj", "down_proj")))
    held: dict[str, Any] = {n: a for n, _, a in lp.adapters(model)}
    kinds = {hosts.shape(h): id(a.shared) for _, h, a in lp.adapters(model)}
    assert len({id(a.shared) for a in held.values()}) == len(kinds) == 2 < len(held)
    first, second = (a for n, a in held.items() if n.endswith("q_proj"))
    assert first.shared.factors(first.d1)[0].data_ptr() == second.shared.factors(second.d1)[0].data_ptr()
    copied: Any = {n: a for n, _, a in lp.adapters(copy.deepcopy(model))}
    assert len({id(a.shared) for a in copied.values()}) == 2
    extra = sum(t.numel() for n, t in model.state_dict().items() if ".adapters." in n)
    assert extra == sum(sum(a.shared.ranks) + 2 for a in held.values())  # a checksum and a gain each
    lp.save(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter.safetensors").stat().st_size < 20_000


DRAW = """
import torch
from lightning_peft_plugins.reparameterized.tera import Network, TeRA
torch.manual_seed(99); torch.rand(7)
print(Network((3, 2), (10,), TeRA(seed=4)).checksum)
"""


def test_7_another_process_draws_the_same() -> None:
    mine = Network((3, 2), (10,), TeRA(seed=4))
    said = subprocess.run([sys.executable, "-c", DRAW], capture_output=True, text=True, check=True)
    assert int(said.stdout) == mine.checksum
    others = {Network((3, 2), (10,), TeRA(seed=s)).checksum for s in (0, 5)}
    assert len(others | {mine.checksum}) == 3
    state = torch.get_rng_state()
    Network((3, 2), (10,), TeRA())
    assert torch.equal(torch.get_rng_state(), state)


def test_7_a_load_refuses_other_tensors_and_keeps_the_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama().eval()
    ours = copy.deepcopy(base)
    lp.inject(ours, TeRA(mode_size=4))
    test_hf.randomize(ours)
    lp.save(ours, tmp_path / "adapter")
    x = test_hf.batch(base)
    want = test_hf.run(ours, x)
    assert (want - test_hf.run(base, x)).abs().max() > 1e-2
    matrix = Network.matrix
    with monkeypatch.context() as m:  # a machine that sums the norm in another order
        m.setattr(Network, "matrix", lambda self, d: matrix(self, d) * 1.01)
        other = lp.load(copy.deepcopy(base), tmp_path / "adapter")
    assert torch.equal(test_hf.run(other, x), want)
    with pytest.raises(ValueError, match="these vectors of TeRA were trained beside other random matrices"):
        lp.load(copy.deepcopy(base), tmp_path / "adapter", methods=[TeRA(mode_size=4, seed=1)])


@pytest.mark.parametrize("options", [{}, {"mode_size": 2}, {"whole_side": "none"}, {"factors": "identity"}])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_update_has_one_size_whatever_the_seed(seed: int, options: dict[str, Any]) -> None:
    a = adapter_of(one(nn.Linear(16, 32), fill=False, seed=seed, **options))
    with torch.no_grad():
        for d in a.vectors():
            nn.init.ones_(d)
    assert float(a.change().detach().norm()) == pytest.approx(32**0.5, rel=1e-4)


def test_draws_have_the_variances_of_the_docstring() -> None:
    shared = Network((16, 16), (256,), TeRA())
    assert float(shared.drawn["G"].var()) == pytest.approx(1 / 256, rel=0.05)
    assert float(shared.drawn["A3"].var()) == pytest.approx(1 / 256, rel=0.05)
    assert float(shared.drawn["A1"].var()) == pytest.approx(1 / 16, rel=0.3)
    eye = Network((4, 2), (8,), TeRA(factors="identity"))
    assert all(torch.equal(eye.drawn[f"A{n}"], torch.eye(k)) for n, k in ((1, 4), (2, 2), (3, 8)))


def test_inputs_of_any_number_of_dimensions() -> None:
    model = one(nn.Linear(6, 10).double(), F64)
    x = torch.randn(2, 3, 4, 6, dtype=F64)
    close(model(x)[1, 2, 3], model(x[1, 2, 3]))
    assert model(x[:0]).shape == (0, 3, 4, 10)


def test_options() -> None:
    for bad, said in (
        ({"whole_side": "left"}, "whole_side must be one of in, out, min, none; got 'left'"),
        ({"factors": "dct"}, "factors must be one of random, identity"),
        ({"mode_size": 1}, "mode_size must be at least 2, got 1"),
        ({"max_rank": 0}, "max_rank must be at least 1, got 0"),
        ({"zero_mode": 0}, "zero_mode must be at least 1, got 0"),
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
    ):
        with pytest.raises(ValueError, match=said):
            TeRA(**bad)
    with pytest.raises(ValueError, match=r"layer: zero_mode=4, but its modes are \(5, 2, 6\)"):
        one(nn.Linear(6, 10), zero_mode=4)
    for shape in ((5, 3, 6), (10, 6, 1), (60,)):
        with pytest.raises(ValueError, match=r"layer: the tensor shape .* does not split its \(10, 6\) weight"):
            one(nn.Linear(6, 10), tensor_shapes={"layer": shape})
    with pytest.raises(ValueError, match="tensor_shapes pattern 'other' matches none of the 1 target"):
        one(nn.Linear(6, 10), tensor_shapes={"other": (10, 6)})
    with pytest.raises(ValueError, match="no linear or conv1d matches 'nowhere'; nearest"):
        lp.inject(llama(), TeRA(targets=("nowhere",)))
