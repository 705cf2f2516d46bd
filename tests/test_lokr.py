"""LoKr: its card (methods/hf_peft_methods.md) by numbers, dense float64 references, peft as another oracle."""

import copy
import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning_peft_plugins.reparameterized.lokr import LoKr, split
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lightning_peft as lp
from lightning_peft import hf, hosts
from tests import in_peft, test_hf
from tests.nets import llama
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs

KINDS = [k for k, make in HOSTS.items() if not isinstance(make(), nn.Embedding)]
CONVOLVED = [k for k in KINDS if k.startswith("Conv") and k != "Conv1D"]
FORMS: dict[str, dict[str, Any]] = {
    "two factors": {"r": 1},
    "whole w2": {"r": 8},
    "both": {"r": 1, "decompose_both": True, "decompose_factor": 3},
    "core": {"r": 1, "core": True, "decompose_factor": 2},
}
WAYS = [(kind, form) for kind in KINDS for form in FORMS if form != "core" or kind in CONVOLVED]


def one(layer: nn.Module, dtype: torch.dtype = torch.float32, fill: bool = True, **options: Any) -> Any:
    """``layer`` with LoKr; factors away from their start if ``fill``."""
    model = One(layer)
    lp.inject(model, LoKr(**{"targets": ("layer",)} | options), dtype=dtype)
    if fill:
        for p in adapter_of(model).parameters():
            nn.init.normal_(p, std=0.5)
    return model


def dense(a: Any, scale: float) -> Tensor:
    """The card's definition as an (out, in) matrix, block by block."""
    t = dict(a.named_parameters())
    w1 = t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]
    if "t2" in t:
        w2 = torch.einsum("pqK,kp,qn->knK", t["t2"], t["w2_a"], t["w2_b"]).flatten(1)
    else:
        w2 = t["w2"] if "w2" in t else t["w2_a"] @ t["w2_b"]
    return scale * torch.cat([torch.cat([w * w2 for w in row], dim=1) for row in w1])


@pytest.mark.parametrize("zero", ["w1", "w2"])
@pytest.mark.parametrize(("kind", "form"), WAYS)
def test_the_start_is_the_base_bit_for_bit(kind: str, form: str, zero: str) -> None:
    layer = HOSTS[kind]()
    x = inputs(layer, torch.float32)
    want = layer(x)
    model = one(layer, fill=False, zero=zero, **FORMS[form])
    assert torch.equal(model(x), want)
    model(x).pow(2).sum().backward()
    held = dict(adapter_of(model).named_parameters())
    still = next(n for n in ({"w1": ("w1", "w1_a"), "w2": ("w2", "w2_b")}[zero]) if n in held)
    for name, p in held.items():  # one step moves the zero factor alone
        assert (p.abs().max() == 0) == (name == still), name
        assert (p.grad.abs().max() > 0) == (name == still), name


@pytest.mark.parametrize(("kind", "form"), WAYS)
def test_forward_weight_and_merge_are_the_dense_map(kind: str, form: str) -> None:
    layer: Any = HOSTS[kind]().double()
    x, reference = inputs(layer), copy.deepcopy(layer)
    model = one(layer, F64, alpha=3.0, **FORMS[form])
    a = adapter_of(model)
    with torch.no_grad():
        hosts.write(reference, hosts.read(reference) + dense(a, 3.0 / FORMS[form]["r"]))
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


@pytest.mark.parametrize(("kind", "form"), WAYS)
def test_gradients_are_those_of_the_dense_map(kind: str, form: str) -> None:
    layer: Any = HOSTS[kind]().double()
    x = inputs(layer).requires_grad_(True)
    model = one(layer, F64, **FORMS[form])
    a = adapter_of(model)
    wanted = [x, *a.parameters()]
    fast = torch.autograd.grad(model(x).sin().sum(), wanted)
    slow = torch.autograd.grad(hosts.run(layer, hosts.read(layer) + dense(a, a.scale), x).sin().sum(), wanted)
    for f, s in zip(fast, slow, strict=True):
        torch.testing.assert_close(f, s, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(("fan_in", "out"), [(36, 7), (7, 36), (11, 13), (64, 64)])
@pytest.mark.parametrize("r", [1, 50])
def test_either_order_of_the_two_factors(fan_in: int, out: int, r: int) -> None:
    """A prime side is split as 1 x itself, where the order that does less work differs."""
    layer: Any = nn.Linear(fan_in, out).double()
    model = one(layer, F64, r=r)
    a, x = adapter_of(model), torch.randn(2, 3, fan_in, dtype=F64)
    close(model(x), nn.functional.linear(x, layer.weight + dense(a, a.scale), layer.bias), atol=1e-9)


@pytest.mark.parametrize("form", ["two factors", "whole w2", "core"])
def test_the_product_is_never_formed(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def kron(*_: Any) -> Tensor:
        raise AssertionError("the Kronecker product was formed")

    monkeypatch.setattr(torch, "kron", kron)
    layer = HOSTS["Conv2d, kernel (3, 5)"]() if form == "core" else nn.Linear(64, 32)
    model = one(layer, **FORMS[form])
    model(inputs(layer, torch.float32)).sum().backward()
    with pytest.raises(AssertionError, match="was formed"):
        lp.merge(model)


def test_a_single_image_without_batch() -> None:
    layer = nn.Conv2d(8, 12, 3, stride=2)
    model, x = one(layer, r=1), torch.randn(8, 9, 9)
    assert model(x).shape == (12, 4, 4)
    close(model(x), model(x[None])[0], atol=1e-5)


def test_by_hand() -> None:
    """kron([1, 2], [[1, 0], [3, 1]]) is two blocks side by side; alpha / r is a half."""
    layer = nn.Linear(4, 2, bias=False)
    model = one(layer, r=4, alpha=2.0, decompose_factor=2, fill=False)
    a = adapter_of(model)
    assert a.w1.shape == (2, 2) and a.w2.shape == (1, 2)
    model = one(layer := nn.Linear(4, 2, bias=False), r=4, alpha=2.0, fill=False)
    a = adapter_of(model)
    assert a.w1.shape == (1, 2) and a.w2.shape == (2, 2)
    with torch.no_grad():
        nn.init.zeros_(layer.weight)
        a.w1.copy_(torch.tensor([[1.0, 2.0]]))
        a.w2.copy_(torch.tensor([[1.0, 0.0], [3.0, 1.0]]))
    assert a.weight(layer.weight).tolist() == [[0.5, 0.0, 1.0, 0.0], [1.5, 0.5, 3.0, 1.0]]
    assert model(torch.tensor([[1.0, 1.0, 0.0, 2.0]])).tolist() == [[0.5, 4.0]]


def test_sizes_of_the_parts() -> None:
    """As peft splits, which files depend on."""
    assert split(768, -1) == (24, 32) and split(127, -1) == (1, 127) and split(768, 8) == (8, 96)
    assert split(32, 16) == (16, 2) and split(30, 4) == (3, 10)
    for size, factor in itertools.product(range(1, 200), (-1, *range(1, 30))):
        assert split(size, factor) == factorization(size, factor)


@pytest.mark.parametrize(
    ("make", "options", "count"),
    [
        (lambda: nn.Linear(24, 16), {"r": 2}, 4 * 4 + 2 * (6 + 4)),
        (lambda: Conv1D(16, 24), {"r": 2}, 36),
        (lambda: nn.Linear(24, 16), {"r": 3}, 4 * 4 + 6 * 4),  # half of w2's longer side: one matrix
        (lambda: nn.Linear(24, 16), {"r": 1, "decompose_both": True}, 4 + 4 + 6 + 4),
        (lambda: nn.Conv2d(24, 16, 3), {"r": 2}, 4 * 4 + 2 * (4 + 6 * 9)),
        (lambda: nn.Conv2d(24, 16, 3, groups=2), {"r": 1}, 4 * 3 + 4 + 4 * 9),
        (lambda: nn.Conv2d(24, 16, 3), {"r": 2, "core": True}, 4 * 4 + 2 * (4 + 6) + 4 * 9),
        (lambda: nn.Conv2d(24, 16, 3), {"r": 9}, 4 * 4 + 4 * 6 * 9),
    ],
)
def test_parameter_counts(make: Any, options: dict[str, Any], count: int) -> None:
    model = one(make(), **options)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_the_rank_is_not_clamped_since_w2_is_whole_then() -> None:
    a = adapter_of(one(nn.Linear(64, 5), r=8))
    assert a.scale == 1.0 and a.r == 8 and a.w2.shape == (5, 8)


def test_start_of_the_factors() -> None:
    a = adapter_of(one(nn.Linear(1600, 1600), r=16, fill=False))
    assert a.w2_a.shape == (40, 16)
    for t, bound in ((a.w2_a, 1 / 4), (a.w2_b, 40**-0.5)):
        assert 0.9 * bound < t.abs().max() <= bound


# ---- against peft --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        LoKr(r=2, alpha=3.0, decompose_both=True),
        LoKr(r=9, rank_pattern={"*.1.*.q_proj": 3}, alpha_pattern={"k_proj": 2.0}),
        LoKr(r=1, decompose_factor=4, zero="w2"),
    ],
)
def test_ours_to_peft_and_back(method: LoKr, tmp_path: Path) -> None:
    base = llama()
    theirs = in_peft.ours_to_peft_and_back(base, method, test_hf.batch(base), tmp_path)
    assert theirs.peft_config["default"].init_weights == ("lycoris" if method.zero == "w2" else True)


def test_peft_to_ours_and_back(tmp_path: Path) -> None:
    base = test_hf.still_bert()
    config = peft.LoKrConfig(
        r=6,
        alpha=5,
        target_modules=["query", "dense"],
        rank_pattern={"attention.*.dense": 2},
        alpha_pattern={"query": 2.5},
        decompose_factor=2,
        init_weights="lycoris",
        modules_to_save=["classifier"],
    )
    method = in_peft.peft_to_ours_and_back(base, config, test_hf.batch(base), tmp_path)
    assert isinstance(method, LoKr)
    assert (method.r, method.alpha, method.zero, method.decompose_factor) == (6, 5.0, "w2", 2)


CONVS: list[tuple[Any, Any]] = [
    (nn.Conv2d, {"kernel_size": (3, 5), "stride": 2, "padding": 1}),
    (nn.Conv2d, {"kernel_size": 3, "groups": 2, "dilation": 2}),
    (nn.Conv2d, {"kernel_size": 1}),
    (nn.Conv1d, {"kernel_size": 3, "padding": 1}),
    (nn.Conv1d, {"kernel_size": 5, "groups": 4}),
]


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("r", [1, 8])
@pytest.mark.parametrize(("kind", "options"), CONVS)
def test_convolutions_against_peft(kind: Any, options: dict[str, Any], r: int, core: bool, tmp_path: Path) -> None:
    base = in_peft.Conv(kind(8, 12, **options))
    x = torch.randn(2, 8, *[9] * (2 if kind is nn.Conv2d else 1))
    config = peft.LoKrConfig(r=r, target_modules=["layer"], use_effective_conv2d=core)
    if kind is nn.Conv1d and r == 8:
        with pytest.raises(ValueError, match="layer: .*whole w2 on a Conv1d.* with a rank below 2 w2 has two factors"):
            in_peft.peft_to_ours_and_back(base, config, x, tmp_path)
        return
    if kind is nn.Conv1d and core and "groups" not in options:
        with pytest.raises(RuntimeError, match="view size is not compatible"):  # its own forward fails on this shape
            in_peft.peft_to_ours_and_back(base, config, x, tmp_path)
        return
    method = in_peft.peft_to_ours_and_back(base, config, x, tmp_path)
    assert isinstance(method, LoKr) and method.core == (core and options["kernel_size"] != 1 and r == 1)


def test_peft_takes_places_for_channels_of_a_conv1d() -> None:
    """Its fault: with w2 (k, n, kernel) whole its matrix is no Kronecker product of the channels."""
    theirs: Any = peft.get_peft_model(
        in_peft.Conv(nn.Conv1d(8, 12, 3)),  # type: ignore[arg-type]
        peft.LoKrConfig(r=8, target_modules=["layer"], init_weights=False),
    ).base_model.model.layer
    w1, w2 = theirs.lokr_w1["default"], theirs.lokr_w2["default"]
    got = theirs.get_delta_weight("default")
    product = torch.einsum("lm,knK->lkmnK", w1, w2).reshape(12, 8, 3)
    assert (got - product).abs().max() > 0.1 * product.abs().max()


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    for layer, message in (
        (Conv1D(10, 6), "peft's LoKr has no transformers' Conv1D"),
        (nn.Conv3d(2, 4, 3), "peft's LoKr has no Conv3d"),
        (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), "padding_mode='circular': it pads with zeros"),
    ):
        with pytest.raises(ValueError, match=f"layer: .*{message}"):
            hf.save(one(layer), tmp_path)


def test_options() -> None:
    with pytest.raises(ValueError, match="LoKr needs a rank of at least 1, got r=0"):
        LoKr(r=0)
    with pytest.raises(ValueError, match="LoKr's alpha must be positive, got alpha=0"):
        LoKr(alpha=0.0)
    with pytest.raises(ValueError, match="decompose_factor must be at least 1, or -1, got 0"):
        LoKr(decompose_factor=0)
    with pytest.raises(ValueError, match="zero must be 'w1' or 'w2', got 'A'"):
        LoKr(zero="A")
    with pytest.raises(ValueError, match="core=True has no effect"):
        one(nn.Conv2d(8, 12, 1), r=1, core=True)
    with pytest.raises(ValueError, match="decompose_both=True has no effect: no side of a w1 is longer than 2 r = 16"):
        one(nn.Linear(16, 16), decompose_both=True)
    with pytest.raises(ValueError, match="no linear or conv1d or conv matches 'nothing'"):
        lp.inject(llama(), LoKr(targets=("nothing",)))


def test_options_of_peft_that_it_does_not_have(tmp_path: Path) -> None:
    base = llama()
    peft.get_peft_model(
        copy.deepcopy(base), peft.LoKrConfig(target_modules=["q_proj"], rank_dropout=0.1)
    ).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="sets rank_dropout=0.1, which method 'lokr' does not have"):
        hf.load(base, tmp_path)
