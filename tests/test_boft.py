"""BOFT by the numbers of its card (methods/hf_peft_methods.md), butterflies written out as matrices, and peft."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning_peft_plugins.reparameterized.boft import BOFT
from lightning_peft_plugins.reparameterized.oft import OFT
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft import hf, hosts
from tests import test_hf
from tests.nets import llama
from tests.test_hra import Cnn, both_ways, pictures
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs

KINDS = [name for name, make in HOSTS.items() if not isinstance(make(), nn.Embedding)]
FEW = ["Linear", "Conv1D", "Conv2d, kernel (3, 5)", "Conv2d groups=2 padding=1"]


@pytest.fixture(autouse=True)
def _no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft looks for a compiler whenever it makes a layer; without one it goes on as here."""
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: None)


def one(layer: nn.Module, dtype: torch.dtype = torch.float32, fill: bool = True, **options: Any) -> Any:
    """``layer`` with one factor in blocks of 2, away from the start if ``fill``."""
    model = One(layer)
    lp.inject(model, BOFT(**{"block_size": 2, "targets": ("layer",)} | options), dtype=dtype)
    if fill:
        nn.init.normal_(adapter_of(model).X)
        nn.init.uniform_(adapter_of(model).s, 0.5, 2.0)
    return model


def butterfly(X: Tensor) -> Tensor:
    """The card's R, factor by factor: rows and columns of each block put where the butterfly has them."""
    _, count, b, _ = X.shape
    R, eye = torch.eye(count * b, dtype=X.dtype), torch.eye(b, dtype=X.dtype)
    for i, factor in enumerate(X):
        B = torch.zeros_like(R)
        for block, at in zip(factor, joined(count * b, b, 2**i), strict=True):
            Q = (block - block.T) / 2
            rows, columns = torch.meshgrid(torch.tensor(at), torch.tensor(at), indexing="ij")
            B = B.index_put((rows, columns), (eye - Q) @ torch.linalg.inv(eye + Q))
        R = B @ R
    return R


def joined(width: int, b: int, apart: int) -> list[list[int]]:
    """Inputs of each block: b neighbours, or two stretches of b / 2 that lie so many stretches apart."""
    if apart == 1:
        return [[*range(first, first + b)] for first in range(0, width, b)]
    half = b // 2
    firsts = [k * half for k in range(width // half) if k // apart % 2 == 0]
    return [[*range(f, f + half), *range(f + half * apart, f + half * apart + half)] for f in firsts]


def test_1_the_oracle_by_hand() -> None:
    """Two factors of 2 x 2 blocks that turn by a right angle: neighbours first, then stretches of one, two apart."""
    X = torch.zeros(2, 2, 2, 2)
    X[:, :, 0, 1], X[:, :, 1, 0] = 1.0, -1.0
    J = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    close(butterfly(X), torch.kron(J, torch.eye(2)) @ torch.kron(torch.eye(2), J), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_1_forward_weight_gradient_and_merge_are_the_dense_map(kind: str) -> None:
    layer: Any = HOSTS[kind]().double()
    x, before = inputs(layer).requires_grad_(), copy.deepcopy(layer.state_dict())
    model = one(layer, F64)
    a = adapter_of(model)
    W = a.s[:, None] * (hosts.read(layer) @ butterfly(a.X).T)
    want, got = hosts.run(layer, W, x, layer.bias), model(x)
    assert (want - layer.unadapted(x)).abs().max() > 0.1
    close(got, want)
    close(lp.WeightAdapter.forward(a, lp.Base(layer), x), want)
    pairs = (torch.autograd.grad(y.sin().sum(), (a.X, a.s, x)) for y in (got, want))
    for g, w in zip(*pairs, strict=True):
        torch.testing.assert_close(g, w, atol=1e-9, rtol=1e-9)
    merged = lp.merge(model)
    close(hosts.read(layer), W)
    close(model(x), got)
    merged.undo()
    state = layer.state_dict()
    assert all(torch.equal(state[k], v) for k, v in before.items()) and torch.equal(model(x), got)


@pytest.mark.parametrize(("b", "factors"), [(4, 1), (3, 1), (4, 2), (2, 4), (4, 4), (8, 3), (6, 2)])
@pytest.mark.parametrize("layer", [nn.Linear, nn.Conv1d])
def test_1_factors_reach_further_than_their_blocks(b: int, factors: int, layer: Any) -> None:
    width = 2 * b * 2 ** (factors - 1)
    host = nn.Linear(width, 6).double() if layer is nn.Linear else nn.Conv1d(width // 2, 6, 2).double()
    model = one(host, F64, block_size=b, factors=factors)
    a, x = adapter_of(model), torch.randn(2, *((width,) if layer is nn.Linear else (width // 2, 5)), dtype=F64)
    R = butterfly(a.X)
    close(a.weight(torch.eye(width, dtype=F64)[:6]), a.s[:, None] * R.T[:6])
    close(model(x), hosts.run(host, a.s[:, None] * (hosts.read(host) @ R.T), x, host.bias))
    reach = (R.detach() != 0).sum(0)
    assert (reach == b * 2 ** (factors - 1)).all()


def test_1_by_hand() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.bias.copy_(torch.tensor([10.0, 20.0]))
    model = one(layer, fill=False)
    a = adapter_of(model)
    with torch.no_grad():
        a.X.copy_(torch.tensor([[[[7.0, 2.0], [0.0, 5.0]]]]))  # of this (X - X^T) / 2 counts; R = [[0, -1], [1, 0]]
        a.s.copy_(torch.tensor([2.0, 3.0]))
    close(model(torch.tensor([[1.0, 1.0]])), torch.tensor([[8.0, 17.0]]), 1e-5)  # the bias is not scaled
    lp.merge(model)
    close(layer.weight, torch.tensor([[-4.0, 2.0], [-12.0, 9.0]]), 1e-5)
    close(layer.bias, torch.tensor([10.0, 20.0]), 0.0)


def test_2_counts() -> None:
    for layer, options, count in (
        (nn.Linear(24, 16), {"block_size": 4}, 112),
        (nn.Linear(24, 16), {"block_size": 4, "factors": 2}, 2 * 96 + 16),
        (nn.Linear(24, 16), {"block_size": 0, "blocks": 3}, 24 * 8 + 16),
        (nn.Conv2d(4, 6, (3, 5), groups=2), {"block_size": 5}, 30 * 5 + 6),
    ):
        assert sum(p.numel() for p in one(layer, **options).parameters() if p.requires_grad) == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factors", [1, 2])
@pytest.mark.parametrize("kind", FEW)
def test_3_the_start_is_the_base_bit_for_bit(kind: str, factors: int, dtype: torch.dtype) -> None:
    layer = HOSTS[kind]().to(dtype)
    x = inputs(layer, dtype)
    if hosts.shape(layer)[1] % 4:
        layer, x = nn.Linear(12, 10, dtype=dtype), torch.randn(3, 12, dtype=dtype)
    want = layer(x)
    model = one(layer, fill=False, factors=factors)
    a = adapter_of(model)
    assert torch.equal(model(x), want) and a.X.dtype == a.s.dtype == torch.float32
    model(x).sin().sum().backward()
    assert a.s.grad.abs().max() > 0 and a.X.grad.flatten(1).abs().amax(1).min() > 0
    assert all(p.grad is None and not p.requires_grad for n, p in model.named_parameters() if "adapters" not in n)


def test_adapters_asked_for_in_bfloat16_run() -> None:
    layer, x = nn.Linear(8, 6).bfloat16(), torch.randn(3, 8, dtype=torch.bfloat16)
    want = layer(x)
    model = one(layer, torch.bfloat16, fill=False, factors=2)
    assert torch.equal(model(x), want)
    model(x).sin().sum().backward()
    assert adapter_of(model).X.grad.dtype == torch.bfloat16 and adapter_of(model).X.grad.abs().max() > 0


@pytest.mark.parametrize("std", [0.2, 4.0])
def test_4_singular_values_survive_but_for_the_scale(std: float) -> None:
    a, W = adapter_of(one(nn.Linear(64, 48), block_size=8, factors=3, fill=False)), torch.randn(48, 64)
    nn.init.normal_(a.X, std=std)
    with torch.no_grad():
        close(torch.linalg.svdvals(a.weight(W)) / 10, torch.linalg.svdvals(W) / 10, 1e-5)
        a.s.mul_(3)
        close(torch.linalg.svdvals(a.weight(W)) / 30, torch.linalg.svdvals(W) / 10, 1e-5)
        assert (a.weight(W) - 3 * W).abs().max() > 0.1


def test_with_one_factor_it_is_oft_with_a_scale() -> None:
    layer, x = nn.Linear(12, 6), torch.randn(5, 12)
    oft, boft = One(copy.deepcopy(layer)), one(layer, block_size=4, fill=False)
    lp.inject(oft, OFT(block_size=4, targets=("layer",)))
    Q = adapter_of(oft).Q
    nn.init.normal_(Q)
    with torch.no_grad():
        rows, columns = torch.triu_indices(4, 4, 1)
        adapter_of(boft).X[0, :, rows, columns] = 2 * Q
    close(boft(x), oft(x), 1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_6_a_quantised_base(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = One(nn.Linear(64, 64))
    lp.quantize(model, kind)
    x = torch.randn(3, 64)
    want = model(x)
    lp.inject(model, BOFT(factors=2, targets=("layer",)))
    assert torch.equal(model(x), want)
    a = adapter_of(model)
    nn.init.normal_(a.X)
    nn.init.uniform_(a.s, 0.5, 2.0)
    W = a.s[:, None] * (hosts.read(model.layer).float() @ butterfly(a.X).T)
    torch.testing.assert_close(model(x), F.linear(x, W, model.layer.bias.float()), atol=0.05, rtol=0.02)
    lp.merge(model)
    close(model.layer.weight, W, 1e-5)  # type: ignore[arg-type]


# ---- dropout -------------------------------------------------------------------------------------------------------


def test_dropout_turns_blocks_off_in_training_alone() -> None:
    a = adapter_of(one(nn.Linear(400, 3), block_size=2, factors=2, dropout=0.3)).train()
    W = torch.randn(3, 400)
    with torch.no_grad():
        some, full = a.drawn(), a.rotations()
        off = some.flatten(2).abs().amax(2) == 0  # (m, blocks)
        assert ((off.float().mean(1) - 0.3).abs() < 0.1).all() and not torch.equal(off[0], off[1])
        assert torch.equal(some[~off], full[~off])  # kept ones are not rescaled
        assert (full.flatten(2).abs().amax(2) > 0).all()
        assert torch.equal(a.weight(W), a.weight(W))  # what merges is never drawn
        assert torch.equal(a.eval().drawn(), full)


@pytest.mark.parametrize("layer", [nn.Linear(64, 32), nn.Conv2d(64, 128, 3)])
def test_dropout_is_one_draw_for_forward_and_backward(layer: Any) -> None:
    """Also where the convolution's kernel is so large that it is built a second time for backward."""
    model = one(layer, block_size=4, dropout=0.5).train()
    a = adapter_of(model)
    x = torch.randn(2, 64) if isinstance(layer, nn.Linear) else torch.randn(1, 64, 5, 5)
    results = []
    for y in (lambda: model(x), lambda: hosts.run(layer, a.turned(hosts.read(layer), a.drawn()), x, layer.bias)):
        torch.manual_seed(7)
        out = y()
        torch.manual_seed(8)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (a.X, a.s))))
    assert not torch.allclose(results[0][0], hosts.run(layer, a.weight(hosts.read(layer)), x, layer.bias), atol=1e-2)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_the_scale_has_no_weight_decay() -> None:
    model = llama()
    lp.inject(model, BOFT())
    (group,) = BOFT().param_groups(model) or []
    assert group["weight_decay"] == 0.0
    held: list[Any] = [a for _, _, a in lp.adapters(model)]
    assert {id(p) for p in group["params"]} == {id(a.s) for a in held}


# ---- huggingface/peft ----------------------------------------------------------------------------------------------

NAMES = {"X": "boft_R", "s": "boft_s"}
IN_PEFT: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (test_hf.still_bert, {}),
    "llama": (llama, {"blocks": 4, "block_size": 0, "layers": "1:"}),
    "cnn": (Cnn, {"block_size": 4, "targets": ("point", "fc")}),
    "cnn, overlapping patches": (Cnn, {"block_size": 3, "targets": ("conv",)}),
}


@pytest.mark.parametrize("case", IN_PEFT)
def test_peft_computes_the_same_both_ways(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(monkeypatch)
    make, options = IN_PEFT[case]
    back, theirs = both_ways(make(), BOFT(**options), NAMES, tmp_path, 0.5)
    method = back.lightning_peft_record.methods[0]
    assert (method.block_size, method.blocks) == (BOFT(**options).block_size, BOFT(**options).blocks)
    assert theirs.peft_config["default"].boft_n_butterfly_factor == 1


class BlockDiagonal:
    """What peft's CUDA extension computes, without CUDA: (m, blocks, b, b) -> (m, in, in)."""

    @staticmethod
    def forward(x: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in x])]

    @staticmethod
    def backward(grad: Tensor, x: Tensor) -> list[Tensor]:
        b = x.shape[-1]
        corners = range(0, grad.shape[-1], b)
        return [torch.stack([torch.stack([g[i : i + b, i : i + b] for i in corners]) for g in grad])]


@pytest.mark.parametrize(("b", "factors"), [(4, 2), (4, 4), (2, 3)])
def test_peft_computes_the_same_butterfly(
    b: int, factors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By peft's own permutations, which it does on a GPU alone."""
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: BlockDiagonal)
    method = BOFT(block_size=b, factors=factors, targets=("attention",))
    back, theirs = both_ways(llama(), method, NAMES, tmp_path, 0.5)
    assert theirs.peft_config["default"].boft_n_butterfly_factor == factors
    assert {len(a.X) for _, _, a in lp.adapters(back)} == {factors}


def test_peft_without_a_gpu_makes_one_factor_of_several(tmp_path: Path) -> None:
    config = peft.BOFTConfig(target_modules=["layer"], boft_n_butterfly_factor=3)
    theirs: Any = peft.get_peft_model(One(nn.Linear(32, 8)), config)  # type: ignore[arg-type]
    assert len(theirs.base_model.model.layer.boft_R["default"]) == 1
    assert len(adapter_of(one(nn.Linear(32, 8), factors=3)).X) == 3


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (nn.Conv2d(8, 8, 3, dilation=2), "layer: huggingface/peft fails or computes something else"),
        (nn.Conv2d(8, 8, (1, 3)), "not the same on both sides"),
        (nn.Conv1d(8, 8, 3), "layer: huggingface/peft's BOFT has no Conv1d"),
        (HOSTS["Conv1D"](), "no Conv1D of transformers"),
    ],
)
def test_layers_that_peft_gets_wrong_are_refused(layer: nn.Module, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        hf.save(one(layer), tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"block_size": 0}, "BOFT needs block_size or blocks, .*got block_size=0, blocks=0"),
        ({"blocks": 4}, "got block_size=4, blocks=4"),
        ({"factors": 0}, "at least one factor, got factors=0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"block_size": 5}, "q_proj: its 32 inputs do not divide into blocks for block_size=5"),
        ({"block_size": 1}, "blocks of 2 or more"),
        ({"factors": 5}, "factors=5: .*divisible by 2"),
        ({"block_size": 3, "factors": 2, "targets": ("down_proj",)}, "48 inputs .* of an even side"),
        ({"block_size": 0, "blocks": 5}, "blocks=5"),
        ({"block_size": 0, "blocks": 32}, "blocks of 2 or more"),
        ({"targets": ("q_prj",)}, r"'q_prj'; nearest: 'q_proj'"),
    ],
    ids=str,
)
def test_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        lp.inject(llama(), BOFT(**options))
    with pytest.raises(ValueError, match="sets bias='boft_only'"):
        BOFT.from_hf({"peft_type": "BOFT", "bias": "boft_only"}, {}, llama())
    with pytest.raises(ValueError, match="no tensor of the file belongs to a module"):
        BOFT.from_hf({"peft_type": "BOFT"}, {}, llama())
