"""merge where an adapter adds a bias to a layer that has none: the outputs, the keys, the undoing."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.proof import captured, prove


class Shift(lp.WeightAdapter):
    """``y = 2 W x + (2 b + shift)``."""

    adds_bias = True

    def __init__(self, out: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.arange(1.0, out + 1))

    def weight(self, W: Tensor) -> Tensor:
        return 2 * W

    def bias(self, b: Tensor) -> Tensor:
        return 2 * b + self.shift


class Doubled(lp.WeightAdapter):
    """Changes a bias, but makes none."""

    def weight(self, W: Tensor) -> Tensor:
        return 2 * W

    def bias(self, b: Tensor) -> Tensor:
        return 2 * b


def net(bias: bool, dtype: torch.dtype) -> Any:
    return nn.Sequential(nn.Conv2d(1, 3, 2, bias=bias), nn.Flatten(), nn.Linear(12, 4, bias=bias)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_is_added_proven_and_taken_away_again(bias: bool, dtype: torch.dtype) -> None:
    model, x = net(bias, dtype), torch.randn(2, 1, 3, 3, dtype=dtype)
    base = copy.deepcopy(model)
    for i, out in ((0, 3), (2, 4)):
        lp.attach(model[i], "shift", Shift(out), dtype=torch.promote_types(dtype, torch.float32))
    plain = {k for k in model.state_dict() if "adapters" not in k}
    assert plain == set(base.state_dict())
    h = 2 * base[0](x) + torch.arange(1.0, 4).view(3, 1, 1)
    want = 2 * base[2](h.flatten(1).to(dtype)) + torch.arange(1.0, 5)
    with captured(model) as calls:
        got = model(x)
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=1e-12 if dtype == torch.float64 else 0.5)
    merged, proof = prove(model, calls)
    assert merged.biases == list(proof.biases) == ([] if bias else ["0", "2"])
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert all(m.bias.dtype == dtype and not m.bias.requires_grad for m in (model[0], model[2]) if not bias)
    torch.testing.assert_close(model(x), got, rtol=0, atol=1e-12 if dtype == torch.float64 else 0.5)
    merged.undo()
    assert {k for k in model.state_dict() if "adapters" not in k} == plain and torch.equal(model(x), got)
    for i in (0, 2):
        lp.detach(model[i], "shift")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in base.state_dict().items())
    assert type(model[0]) is nn.Conv2d and (model[0].bias is None) is not bias


@pytest.mark.parametrize("order", [(Doubled, Shift), (Shift, Doubled)])
def test_below_and_above_an_adapter_that_only_changes_one(order: Any) -> None:
    layer = nn.Linear(3, 4, bias=False).double()
    W, x = layer.weight.detach().clone(), torch.randn(5, 3).double()
    for kind in order:
        lp.attach(layer, kind.__name__, kind(4) if kind is Shift else kind(), dtype=torch.float64)
    factor = 1 if order[1] is Shift else 2  # a Doubled above doubles the shift
    want = 4 * x @ W.T + factor * torch.arange(1.0, 5).double()
    torch.testing.assert_close(layer(x), want)
    model = nn.Sequential(layer)
    lp.merge(model)
    torch.testing.assert_close(model(x), want)


def test_one_that_only_changes_a_bias_adds_none() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False))
    lp.attach(model[0], "doubled", Doubled())
    assert lp.merge(model).biases == [] and model[0].bias is None
