"""SSF against lightning-peft's conformance suite, and against numbers worked by hand."""

from collections.abc import Callable

import pytest
import torch
from lightning_peft_ssf.ssf import SSF, ScaleShift  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from lightning_peft import inject
from lightning_peft.testing import Row, parametrize_with_checks


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(4 * 16, 3))


def vectors() -> tuple[Tensor]:
    return (torch.randn(4, 6, generator=torch.Generator().manual_seed(1)),)


def images() -> tuple[Tensor]:
    return (torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(1)),)


ROWS = [
    Row("mlp", lambda: SSF(targets=("0", "2")), mlp, vectors),
    Row("cnn", lambda: SSF(targets=("0", "3"), std=0.1), cnn, images),
]


@parametrize_with_checks(ROWS)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def test_each_channel_is_scaled_then_shifted() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        layer.bias.copy_(torch.tensor([1.0, 0.0]))
    model = nn.Sequential(layer)
    method = SSF(targets=("0",))
    inject(model, method)
    (adapter,) = (a for _, _, a in method.adapters(model))
    assert isinstance(adapter, ScaleShift)
    adapter.gamma.data, adapter.beta.data = torch.tensor([2.0, 3.0]), torch.tensor([10.0, 20.0])
    assert model(torch.tensor([[1.0, 2.0]])).tolist() == [[14.0, 26.0]]  # 2 * (1 + 1) + 10 and 3 * 2 + 20


def test_a_negative_spread_is_refused() -> None:
    with pytest.raises(ValueError, match="std must not be negative, got -1"):
        SSF(std=-1)
