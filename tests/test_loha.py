"""LoHa: its card (methods/hf_peft_methods.md) by numbers, dense float64 references, peft as another oracle."""

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning_peft_plugins.reparameterized.loha import LoHa
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lightning_peft as lp
from lightning_peft import hf, hosts
from tests import in_peft, test_hf
from tests.nets import llama
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs

KINDS = [k for k, make in HOSTS.items() if not isinstance(make(), nn.Embedding)]
CONVOLVED = [k for k in KINDS if k.startswith("Conv") and k != "Conv1D"]
# (rank, core): a rank whose square is small against the layer takes another way through the forward than a large one.
WAYS = [(kind, r, core) for kind in KINDS for r, core in ((1, False), (4, False), (1, True), (3, True))
        if not core or kind in CONVOLVED]  # fmt: skip


def one(layer: nn.Module, dtype: torch.dtype = torch.float32, fill: bool = True, **options: Any) -> Any:
    """``layer`` with LoHa of rank 4; factors away from their start if ``fill``."""
    model = One(layer)
    lp.inject(model, LoHa(**{"r": 4, "targets": ("layer",)} | options), dtype=dtype)
    if fill:
        for p in adapter_of(model).parameters():
            nn.init.normal_(p, std=0.5)
    return model


def dense(host: Any, a: Any, scale: float) -> Tensor:
    """The card's definition as an (out, in) matrix."""
    if not hasattr(a, "T1"):
        first, second = (torch.einsum("oa,ai->oi", B, A) for B, A in ((a.B1, a.A1), (a.B2, a.A2)))
    else:
        first, second = (
            torch.einsum("pqk,op,qc->ock", T, B, A).flatten(1) for T, B, A in ((a.T1, a.B1, a.A1), (a.T2, a.B2, a.A2))
        )
    return scale * first * second


@pytest.mark.parametrize(("kind", "r", "core"), WAYS)
def test_the_start_is_the_base_bit_for_bit(kind: str, r: int, core: bool) -> None:
    layer = HOSTS[kind]()
    x = inputs(layer, torch.float32)
    want = layer(x)
    model = one(layer, fill=False, r=r, core=core)
    assert torch.equal(model(x), want)
    a = adapter_of(model)
    assert a.A2.abs().max() == 0 and all(p.abs().min() > 0 for n, p in a.named_parameters() if n != "A2")
    model(x).pow(2).sum().backward()  # one step moves the zero factor alone
    assert a.A2.grad.abs().max() > 0
    assert all(p.grad.abs().max() == 0 for n, p in a.named_parameters() if n != "A2")


@pytest.mark.parametrize(("kind", "r", "core"), WAYS)
def test_forward_weight_and_merge_are_the_dense_map(kind: str, r: int, core: bool) -> None:
    layer: Any = HOSTS[kind]().double()
    x, reference = inputs(layer), copy.deepcopy(layer)
    model = one(layer, F64, r=r, core=core, alpha=3.0)
    a = adapter_of(model)
    with torch.no_grad():
        hosts.write(reference, hosts.read(reference) + dense(layer, a, 3.0 / r))
        want, fast = reference(x), model(x)
        assert (want - layer.unadapted(x)).abs().max() > 1e-2
        close(fast, want)
        close(a.weight(hosts.read(layer)), hosts.read(reference))
        before = layer.weight.clone()
        merged = lp.merge(model)
        close(layer.weight, reference.weight)
        close(model(x), want)
        merged.undo()
        assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(("kind", "r", "core"), WAYS)
def test_gradients_are_those_of_the_dense_map(kind: str, r: int, core: bool) -> None:
    layer: Any = HOSTS[kind]().double()
    x = inputs(layer).requires_grad_(True)
    model = one(layer, F64, r=r, core=core)
    a = adapter_of(model)
    wanted = [x, *a.parameters()]
    assert len(wanted) == (7 if core else 5)
    fast = torch.autograd.grad(model(x).sin().sum(), wanted)
    W = hosts.read(layer) + dense(layer, a, a.scale)
    slow = torch.autograd.grad(hosts.run(layer, W, x).sin().sum(), wanted)
    for f, s in zip(fast, slow, strict=True):
        torch.testing.assert_close(f, s, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("r", [4, 32])
def test_both_ways_are_taken_and_equal_on_a_layer_of_some_size(r: int) -> None:
    """r^2 (out + in) against out in: 16 * 640 < 98304 < 1024 * 640."""
    layer: Any = nn.Linear(256, 384).double()
    model = one(layer, F64, r=r)
    a, x, seen = adapter_of(model), torch.randn(3, 256, dtype=F64), []
    a.update = lambda host, x, known=a.update: seen.append(1) or known(host, x)
    close(model(x), F.linear(x, layer.weight + dense(layer, a, a.scale), layer.bias), atol=1e-9)
    assert len(seen) == (r == 4)


def saved(model: nn.Module, x: Tensor) -> set[int]:
    """Sizes of what autograd keeps of a call, the model's own parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: set[int] = set()

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept.add(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return kept


@pytest.mark.parametrize("r", [4, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_weights_size_is_kept_for_backward(r: int, dtype: torch.dtype) -> None:
    layer = nn.Linear(256, 384).to(dtype)
    model = one(layer, r=r)
    x = torch.randn(3, 256, dtype=dtype, requires_grad=True)
    assert max(saved(model, x)) <= (16 * 384 if r == 4 else 3 * 384)


def test_by_hand() -> None:
    """([1; 2] [1, 1]) * ([1; 1] [3, -1]) = [[3, -1], [6, -2]], times alpha / r = 2."""
    layer = nn.Linear(2, 2, bias=False)
    model = one(layer, r=1, alpha=2.0, fill=False)
    a = adapter_of(model)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        a.B1.copy_(torch.tensor([[1.0], [2.0]]))
        a.A1.copy_(torch.tensor([[1.0, 1.0]]))
        a.B2.copy_(torch.tensor([[1.0], [1.0]]))
        a.A2.copy_(torch.tensor([[3.0, -1.0]]))
    assert model(torch.tensor([[1.0, 1.0]])).tolist() == [[7.0, 15.0]]  # [3, 7] + 2 [2, 4]
    lp.merge(model)
    assert layer.weight.tolist() == [[7.0, 0.0], [15.0, 0.0]]


def test_its_rank_is_the_square() -> None:
    model = one(nn.Linear(24, 16).double(), F64, r=3)
    assert int(torch.linalg.matrix_rank(adapter_of(model).change())) == 9


@pytest.mark.parametrize(
    ("make", "options", "count"),
    [
        (lambda: nn.Linear(24, 16), {"r": 3}, 240),
        (lambda: Conv1D(16, 24), {"r": 3}, 240),
        (lambda: nn.Conv2d(4, 6, (3, 5)), {"r": 2}, 2 * 2 * (60 + 6)),
        (lambda: nn.Conv2d(4, 6, (3, 5), groups=2), {"r": 2}, 2 * 2 * (30 + 6)),
        (lambda: nn.Conv2d(4, 6, (3, 5)), {"r": 2, "core": True}, 2 * 2 * (4 + 6) + 2 * 4 * 15),
    ],
)
def test_parameter_counts(make: Any, options: dict[str, Any], count: int) -> None:
    model = one(make(), **options)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_start_of_the_factors_and_scale() -> None:
    a = adapter_of(one(nn.Linear(400, 300), r=16, fill=False))
    for t, bound in ((a.A1, 1 / 20), (a.B1, 1 / 4), (a.B2, 1 / 4)):
        assert 0.9 * bound < t.abs().max() <= bound
    assert a.scale == 0.5  # alpha 8
    big = one(nn.Linear(64, 64), r=8, rank_pattern={"layer": 2}, alpha_pattern={"*": 3.0})
    assert adapter_of(big).scale == 1.5 and adapter_of(big).r == 2


@pytest.mark.parametrize("r", [4, 32])
def test_a_change_below_the_bases_precision_is_not_rounded_away(r: int) -> None:
    """In bfloat16 1 + 2^-10 and 1 - 2^-10 are 1: a sum of both weights would lose a change of that size."""
    layer = nn.Linear(256, 384, bias=False).to(torch.bfloat16)
    model = one(layer, r=r, alpha=float(r))
    a = adapter_of(model)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        for p, value in ((a.A1, 1.0), (a.B1, 1 / r), (a.A2, 1.0), (a.B2, 1 / r * 2**-10)):
            p.fill_(value)
        a.A1[:, 1] = -1.0
    x = torch.zeros(1, 256, dtype=torch.bfloat16)
    x[0, :2] = torch.tensor([1.0, -1.0])  # the base gives zero
    torch.testing.assert_close(model(x).float(), torch.full((1, 384), 2.0**-9), rtol=0.01, atol=0)


@pytest.mark.parametrize("r", [4, 32])
def test_autocast(r: int) -> None:
    model = one(nn.Linear(256, 384), r=r, alpha=0.5)
    x = torch.randn(3, 256)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x), atol=0.3, rtol=0.05)


# ---- against peft --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LoHa(r=2), LoHa(r=7, alpha=3.0, rank_pattern={"*.1.*.q_proj": 3})])
def test_ours_to_peft_and_back(method: LoHa, tmp_path: Path) -> None:
    base = llama()
    in_peft.ours_to_peft_and_back(base, method, test_hf.batch(base), tmp_path)


def test_peft_to_ours_and_back(tmp_path: Path) -> None:
    base = test_hf.still_bert()
    config = peft.LoHaConfig(
        r=6,
        alpha=5,
        target_modules=["query", "dense"],
        rank_pattern={"attention.*.dense": 2},
        alpha_pattern={"query": 2.5},
        modules_to_save=["classifier"],
    )
    method = in_peft.peft_to_ours_and_back(base, config, test_hf.batch(base), tmp_path)
    assert isinstance(method, LoHa) and (method.r, method.alpha, method.core) == (6, 5.0, False)


CONVS: list[tuple[Any, Any]] = [
    (nn.Conv2d, {"kernel_size": (3, 5), "stride": 2, "padding": 1}),
    (nn.Conv2d, {"kernel_size": 3, "groups": 2, "dilation": 2}),
    (nn.Conv2d, {"kernel_size": 1}),
    (nn.Conv1d, {"kernel_size": 3, "padding": 1}),
    (nn.Conv1d, {"kernel_size": 5, "groups": 4}),
]


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize(("kind", "options"), CONVS)
def test_convolutions_against_peft(kind: Any, options: dict[str, Any], core: bool, tmp_path: Path) -> None:
    """Its fault: behind a core it takes the other product's core for the gradients of the factors over outputs."""
    base = in_peft.Conv(kind(8, 12, **options))
    x = torch.randn(2, 8, *[9] * (2 if kind is nn.Conv2d else 1))
    config = peft.LoHaConfig(r=3, target_modules=["layer"], use_effective_conv2d=core)
    cored = core and options["kernel_size"] != 1
    wrong = ("hada_w1_a", "hada_w2_a") if cored else ()
    method = in_peft.peft_to_ours_and_back(base, config, x, tmp_path, wrong)
    assert isinstance(method, LoHa) and method.core == cored


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    for layer, message in (
        (Conv1D(10, 6), "peft's LoHa has no transformers' Conv1D"),
        (nn.Conv3d(2, 4, 3), "peft's LoHa has no Conv3d"),
        (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), "padding_mode='circular': it pads with zeros"),
    ):
        with pytest.raises(ValueError, match=f"layer: .*{message}"):
            hf.save(one(layer), tmp_path)
    assert not list(tmp_path.iterdir())


def test_peft_pads_what_it_adds_with_zeros(tmp_path: Path) -> None:
    """Its fault: the base's padding mode is lost on the change, so that merging changes the output."""
    layer = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
    theirs: Any = peft.get_peft_model(
        in_peft.Conv(layer),  # type: ignore[arg-type]
        peft.LoHaConfig(r=2, target_modules=["layer"], init_weights=False),
    )
    x = torch.randn(1, 3, 5, 5)
    before = theirs(x)
    assert (theirs.merge_and_unload()(x) - before).abs().max() > 1e-3
    mine = one(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"))
    before = mine(x)
    lp.merge(mine)
    close(mine(x), before, atol=1e-5)


def test_options() -> None:
    with pytest.raises(ValueError, match="LoHa needs a rank of at least 1, got r=0"):
        LoHa(r=0)
    with pytest.raises(ValueError, match="LoHa's alpha must be positive, got alpha=-1"):
        LoHa(alpha=-1.0)
    with pytest.raises(ValueError, match="core=True has no effect: no target is a convolution with a kernel beyond"):
        one(nn.Conv2d(4, 4, 1), core=True)
    with pytest.raises(ValueError, match="no linear or conv1d or conv matches 'nothing'"):
        lp.inject(llama(), LoHa(targets=("nothing",)))
    with pytest.raises(ValueError, match="no linear or conv1d or conv matches 'layer'"):
        one(nn.Embedding(9, 4))
    with pytest.warns(UserWarning, match="layer: r=8 clamped to its smaller side 5"):
        assert math.isclose(adapter_of(one(nn.Linear(9, 5), r=8)).scale, 8 / 5)


def test_options_of_peft_that_it_does_not_have(tmp_path: Path) -> None:
    base = llama()
    test_hf.peft.get_peft_model(
        copy.deepcopy(base), peft.LoHaConfig(target_modules=["q_proj"], module_dropout=0.1)
    ).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="sets module_dropout=0.1, which method 'loha' does not have"):
        hf.load(base, tmp_path)
