"""OFT by the numbers of its card (methods/hf_peft_methods.md), block-diagonal matrices written out, and peft."""

import copy
import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning_peft_plugins.reparameterized import orthogonal
from lightning_peft_plugins.reparameterized.oft import OFT
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft import hf, hosts
from tests import test_hf
from tests.nets import llama
from tests.test_hra import Cnn, both_ways, pictures
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs

pytestmark = pytest.mark.filterwarnings("ignore:.*does not divide")
KINDS = list(HOSTS)
FEW = ["Linear", "Conv1D", "Embedding, padding_idx", "Conv2d, kernel (3, 5)", "Conv2d groups=2 padding=1"]


def one(layer: nn.Module, dtype: torch.dtype = torch.float32, std: float = 0.5, **options: Any) -> Any:
    """``layer`` with rotations in blocks of 4 inputs, or the divisor nearest to that; at the start if ``std`` is 0."""
    model = One(layer)
    lp.inject(model, OFT(**{"block_size": 4, "targets": ("layer",)} | options), dtype=dtype)
    if std:
        nn.init.normal_(adapter_of(model).Q, std=std)
    return model


def skew(entries: Tensor, b: int) -> Tensor:
    Q = torch.zeros(b, b, dtype=entries.dtype)
    for (i, j), q in zip(itertools.combinations(range(b), 2), entries, strict=True):
        Q = Q + torch.zeros_like(Q).index_put((torch.tensor([i, j]), torch.tensor([j, i])), torch.stack([q, -q]))
    return Q


def turned(a: Any, width: int) -> Tensor:
    """The card's R, written out block by block."""
    eye = torch.eye(a.b, dtype=a.Q.dtype)
    blocks = [(eye - Q) @ torch.linalg.inv(eye + Q) for Q in (skew(q, a.b) for q in a.Q)]
    return torch.block_diag(*blocks * (width // a.b // len(blocks)))


def dense(layer: Any, a: Any) -> Tensor:
    W = hosts.read(layer)
    return (W.T @ turned(a, len(W))).T if isinstance(layer, nn.Embedding) else W @ turned(a, W.shape[1]).T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [False, True])
def test_1_forward_weight_gradient_and_merge_are_the_dense_map(kind: str, share: bool) -> None:
    layer: Any = HOSTS[kind]().double()
    x, before = inputs(layer), layer.weight.detach().clone()
    model = one(layer, F64, share=share)
    a = adapter_of(model)
    W, got = dense(layer, a), model(x)
    want = hosts.run(layer, W, x)
    assert (want - layer.unadapted(x)).abs().max() > 0.1
    close(got, want)
    close(lp.WeightAdapter.forward(a, lp.Base(layer), x), want)
    wanted = [a.Q] + ([x.requires_grad_()] if x.is_floating_point() else [])
    pairs = (torch.autograd.grad(y.sin().sum(), wanted) for y in (model(x), hosts.run(layer, dense(layer, a), x)))
    for g, w in zip(*pairs, strict=True):
        torch.testing.assert_close(g, w, atol=1e-9, rtol=1e-9)
    merged = lp.merge(model)
    close(hosts.read(layer), W)
    close(model(x), got)
    merged.undo()
    assert torch.equal(layer.weight, before) and torch.equal(model(x), got)


def test_1_by_hand() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.bias.copy_(torch.tensor([10.0, 20.0]))
    model = one(layer, block_size=2)
    nn.init.ones_(adapter_of(model).Q)  # R = [[0, -1], [1, 0]]
    close(model(torch.tensor([[1.0, 1.0]])), torch.tensor([[9.0, 19.0]]), 1e-6)
    lp.merge(model)
    close(layer.weight, torch.tensor([[-2.0, 1.0], [-4.0, 3.0]]), 1e-6)


def test_2_counts() -> None:
    for options, count in (({"block_size": 8}, 84), ({"block_size": 8, "share": True}, 28), ({"blocks": 2}, 132)):
        options = {"block_size": 0} | options
        assert sum(p.numel() for p in one(nn.Linear(24, 16), **options).parameters() if p.requires_grad) == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"neumann": 5}, {"eps": 0.1}], ids=str)
@pytest.mark.parametrize("kind", FEW)
def test_3_the_start_is_the_base_bit_for_bit(kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    layer = HOSTS[kind]().to(dtype)
    x = inputs(layer, dtype)
    want = layer(x)
    model = one(layer, std=0.0, **options)
    assert torch.equal(model(x), want) and adapter_of(model).Q.dtype == torch.float32
    model(x).sin().sum().backward()  # of a rotated vector the sum of squares has no gradient
    assert adapter_of(model).Q.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for n, p in model.named_parameters() if "adapters" not in n)


@pytest.mark.parametrize("std", [0.1, 3.0])
def test_4_singular_values_survive_unless_the_inverse_is_a_series(std: float) -> None:
    layer = nn.Linear(64, 48)
    a, W = adapter_of(one(layer, std=std, block_size=16)), layer.weight.detach()
    with torch.no_grad():
        R = a.weight(torch.eye(64))
        close(R @ R.T, torch.eye(64), 1e-5)
        close(torch.linalg.svdvals(a.weight(W)), torch.linalg.svdvals(W), 1e-5)
        a.neumann = 5
        R = a.weight(torch.eye(64))
        assert (R @ R.T - torch.eye(64)).abs().max() > 1e-2
        assert (torch.linalg.svdvals(a.weight(W)) - torch.linalg.svdvals(W)).abs().max() > 1e-3


def test_4_by_how_much_the_series_is_off() -> None:
    a = adapter_of(one(nn.Linear(8, 8), block_size=8, neumann=5))
    nn.init.constant_(a.Q, 0.1)
    with torch.no_grad():
        R = a.weight(torch.eye(8))
    close((R @ R.T - torch.eye(8)).abs().max(), torch.tensor(0.0312), 1e-4)


@pytest.mark.parametrize("neumann", [0, 5])
def test_adapters_asked_for_in_bfloat16_run(neumann: int) -> None:
    layer, x = nn.Linear(8, 6).bfloat16(), torch.randn(3, 8, dtype=torch.bfloat16)
    want = layer(x)
    model = one(layer, torch.bfloat16, std=0.0, neumann=neumann)
    assert torch.equal(model(x), want)
    model(x).sin().sum().backward()
    assert adapter_of(model).Q.grad.dtype == torch.bfloat16 and adapter_of(model).Q.grad.abs().max() > 0


@pytest.mark.parametrize("neumann", [0, 5])
def test_4_autocast_leaves_the_rotation_alone(neumann: int) -> None:
    a = adapter_of(one(nn.Linear(48, 48), neumann=neumann, block_size=16))
    want = a.rotation()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(a.rotation(), want)


def test_4_the_series_nears_the_rotation_the_other_way_round() -> None:
    """So files of the two settings do not mean the same."""
    a, errors = adapter_of(one(nn.Linear(8, 8), std=0.05, block_size=8)), []
    with torch.no_grad():
        R = torch.eye(8) + a.rotation()[0]
        for a.neumann in (4, 5, 6, 12):
            errors.append(float((torch.eye(8) + a.rotation()[0] - R.T).abs().max()))
        assert (R - R.T).abs().max() > 0.1
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[3] < 1e-6


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_6_a_quantised_base(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = One(nn.Linear(64, 64))
    lp.quantize(model, kind)
    x = torch.randn(3, 64)
    want = model(x)
    lp.inject(model, OFT(targets=("layer",)))
    assert torch.equal(model(x), want)
    a = adapter_of(model)
    nn.init.normal_(a.Q, std=0.1)
    W = hosts.read(model.layer).float() @ turned(a, 64).T
    torch.testing.assert_close(model(x), F.linear(x, W, model.layer.bias.float()), atol=0.05, rtol=0.02)
    lp.merge(model)
    close(model.layer.weight, W, 1e-5)  # type: ignore[arg-type]


# ---- the bound (COFT) ----------------------------------------------------------------------------------------------


def test_a_step_ends_within_the_bound() -> None:
    model, method = One(nn.Linear(12, 6)), OFT(block_size=4, eps=0.3, targets=("layer",))
    lp.inject(model, method)
    a, x = adapter_of(model), torch.randn(8, 12)
    optimizer = torch.optim.Adam(a.parameters(), 0.05)
    for index in range(20):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        method.after_step(model, lp.Step(index=index))
        norms = torch.stack([skew(q, 4).norm() for q in a.Q.detach()])
        assert norms.max() <= 0.3 / 3**0.5 * (1 + 1e-6)
    assert norms.max() > 0.3 / 3**0.5 * (1 - 1e-6)  # reached, and not left by less than it may


def test_the_bound_draws_back_what_lies_beyond_it_alone() -> None:
    model = one(nn.Linear(8, 6), eps=0.5, std=0.0)
    a = adapter_of(model)
    with torch.no_grad():
        a.Q[0, 0], a.Q[1, 2] = 0.2, -0.9  # of the allowed 0.5 / sqrt(2) / sqrt(2) = 0.25
        want = torch.zeros(2, 6)
        want[0, 0], want[1, 2] = 0.2, -0.25
    close(a.bounded(), want, 1e-7)
    free = one(nn.Linear(8, 6), std=0.0)
    with torch.no_grad():
        adapter_of(free).Q.copy_(want)
    close(a.rotation(), adapter_of(free).rotation(), 1e-7)
    kept = OFT(targets=("layer",))
    kept.after_step(free, lp.Step(index=0))  # no bound, nothing to do
    assert torch.equal(adapter_of(free).Q, want)


# ---- huggingface/peft ----------------------------------------------------------------------------------------------

IN_PEFT: dict[str, tuple[Any, dict[str, Any], float]] = {
    "bert": (test_hf.still_bert, {"block_size": 8}, 0.3),
    "llama, its default series": (llama, {"block_size": 8, "neumann": 5}, 0.05),
    "llama, number of blocks": (llama, {"blocks": 4, "block_size": 0, "layers": "1:"}, 0.3),
    "llama, sizes that do not divide": (llama, {"block_size": 32, "neumann": 8}, 0.02),
    "bert, one shared block": (test_hf.still_bert, {"block_size": 8, "share": True, "targets": ("attention",)}, 0.3),
    "bert, bounded": (test_hf.still_bert, {"block_size": 8, "eps": 1.5}, 0.3),
    "embedding": (test_hf.gpt2, {"block_size": 8, "targets": ("wpe", "wte")}, 0.5),
    "cnn": (Cnn, {"block_size": 4, "targets": ("point", "fc")}, 0.5),
}


@pytest.mark.parametrize("case", IN_PEFT)
def test_peft_computes_the_same_both_ways(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(monkeypatch)
    make, options, std = IN_PEFT[case]
    names = {"Q": "oft_embedding_R" if case == "embedding" else "oft_R"}
    back, theirs = both_ways(make(), OFT(**options), names, tmp_path, std)
    method = back.lightning_peft_record.methods[0]
    for key in ("block_size", "blocks", "share", "neumann", "eps"):
        assert getattr(method, key) == getattr(OFT(**options), key)
    assert theirs.peft_config["default"].use_cayley_neumann == ("neumann" in options)


def their(layer: nn.Module, **options: Any) -> Any:
    config = peft.OFTConfig(target_modules=["layer"], **{"oft_block_size": 4} | options)
    return peft.get_peft_model(One(copy.deepcopy(layer)), config)  # type: ignore[arg-type]


def test_peft_folder_of_three_terms_is_read_as_the_four_that_it_computes(tmp_path: Path) -> None:
    layer, x = nn.Linear(8, 8), torch.randn(5, 8)
    theirs = their(layer, num_cayley_neumann_terms=3)
    nn.init.normal_(theirs.base_model.model.layer.oft_R["default"].weight, std=0.2)
    theirs.save_pretrained(str(tmp_path))
    ours: Any = hf.load(One(layer), tmp_path)
    assert ours.lightning_peft_record.methods[0].neumann == 4
    close(ours(x), theirs(x), 1e-5)


def test_peft_s_rotation_of_overlapping_patches_is_no_identity_and_refused(tmp_path: Path) -> None:
    layer, x = nn.Conv2d(4, 4, 3, padding=1), torch.randn(1, 4, 8, 8)
    want = layer(x)
    assert (their(layer)(x) - want).abs().max() > 1
    model = one(layer, std=0.0)
    assert torch.equal(model(x), want)
    with pytest.raises(ValueError, match="layer: huggingface/peft computes something else for a convolution with"):
        hf.save(model, tmp_path / "ours")
    their(nn.Conv2d(4, 4, 3)).save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(ValueError, match="layer: huggingface/peft computes something else"):
        hf.load(One(nn.Conv2d(4, 4, 3)), tmp_path / "theirs")


def test_peft_ignores_module_dropout_and_so_do_we(tmp_path: Path) -> None:
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    theirs = their(layer, module_dropout=0.9, use_cayley_neumann=False)
    nn.init.normal_(theirs.base_model.model.layer.oft_R["default"].weight)
    assert torch.equal(theirs.train()(x), theirs.eval()(x))
    theirs.save_pretrained(str(tmp_path))
    close(hf.load(One(layer), tmp_path).train()(x), theirs(x), 1e-5)


def test_peft_fails_on_images_in_a_linear_layer() -> None:
    layer, x = nn.Linear(8, 6), torch.randn(2, 3, 3, 8)
    with pytest.raises(RuntimeError, match="invalid for input of size 0"):
        their(layer)(x)
    model = one(layer)
    close(model(x).flatten(0, 2), model(x.flatten(0, 2)), 1e-6)


def test_divisors_are_the_ones_that_peft_takes() -> None:
    theirs: Any = peft.tuners.oft.layer.OFTLayer.adjust_oft_parameters
    for width, wanted in itertools.product(range(1, 61), range(1, 70)):
        assert orthogonal.nearest_divisor("x", width, wanted) == theirs(None, width, wanted)
    with pytest.warns(UserWarning, match="layer: 32 does not divide its 48 inputs, taking 24"):
        assert adapter_of(one(nn.Linear(48, 8), block_size=32)).b == 24


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (nn.Conv2d(8, 8, 1, groups=2), "or with groups"),
        (nn.Conv2d(8, 8, (1, 3)), "beyond 1x1"),
        (nn.Conv1d(8, 8, 1), "layer: huggingface/peft's OFT has no Conv1d"),
        (HOSTS["Conv1D"](), "no Conv1D of transformers"),
    ],
)
def test_layers_that_peft_has_not_are_refused(layer: nn.Module, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        hf.save(one(layer), tmp_path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"peft_version": "0.17.1"}, "by peft 0.17.1: 'oft' computes the series of peft 0.18 and later"),
        ({"peft_version": None}, "by peft 0.0"),
        ({"peft_version": "0.21.2", "num_cayley_neumann_terms": 2}, "with 2 terms"),
        ({"peft_version": "0.21.2", "bias": "oft_only"}, "sets bias='oft_only'"),
        ({"peft_version": "0.21.2"}, "no tensor of the file belongs to a module"),
        ({"use_cayley_neumann": False}, "no tensor of the file belongs to a module"),
    ],
    ids=str,
)
def test_folders_that_ours_does_not_compute_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        OFT.from_hf({"peft_type": "OFT", **fields}, {}, llama())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"block_size": 0}, r"OFT needs block_size or blocks, .*got block_size=0, blocks=0"),
        ({"blocks": 4}, r"got block_size=32, blocks=4"),
        ({"block_size": -2}, "got block_size=-2"),
        ({"neumann": 3}, "neumann must be 0 .exact. or at least 4 terms, got 3"),
        ({"neumann": -1}, "got -1"),
        ({"eps": 0.0}, "eps must be positive, or None for no bound, got 0.0"),
        ({"targets": ("q_prj",)}, r"'q_prj'; nearest: 'q_proj'"),
        ({"block_size": 1}, "blocks of side 1 of its 32 inputs have nothing to rotate"),
        ({"block_size": 0, "blocks": 32}, "have nothing to rotate; exclude it"),
    ],
    ids=str,
)
def test_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        lp.inject(llama(), OFT(**options))
    with pytest.raises(ValueError, match="layer: an embedding with max_norm rescales its rows; OFT cannot adapt it"):
        one(nn.Embedding(9, 4, max_norm=1.0))
