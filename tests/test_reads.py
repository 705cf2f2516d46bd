"""Layers that code reads without calling them: found in its source, and given their adapted weight there."""

import copy
from typing import Any

import pytest
import torch
from lightning_peft_plugins.reparameterized.hut import HUT
from lightning_peft_plugins.reparameterized.lora import LoRA
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.deberta.modeling_deberta import DisentangledSelfAttention
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.t5.modeling_t5 import T5DenseActDense

import lightning_peft as lp
from lightning_peft import reads
from lightning_peft.attach import adapters
from tests.methods import Plain
from tests.zoo import bases as zoo


def test_which_children_the_code_of_a_class_reads() -> None:
    assert set(reads.read_without_call(modeling_mamba.MambaMixer)) == {"conv1d", "x_proj", "dt_proj", "out_proj"}
    assert set(reads.read_without_call(modeling_mamba2.Mamba2Mixer)) == {"conv1d", "norm", "out_proj"}
    assert reads.read_without_call(nn.MultiheadAttention) == ()
    assert set(reads.read_without_call(DisentangledSelfAttention)) == {"in_proj"}
    assert reads.read_without_call(T5DenseActDense) == ()  # asks wo.weight for its dtype alone


class Reader(nn.Module):
    """Reads what it never calls, asks for facts of another layer, and one layer further down."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.inner = nn.Linear(4, 4), nn.Linear(4, 4), nn.Sequential()
        self.inner.c = nn.Linear(4, 4)
        self.init_scale = float(self.b.weight[0, 0])

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.b.weight, Tensor) and self.b.bias is not None
        x = self.b(x.to(self.b.weight.dtype))
        return F.linear(F.linear(x, self.a.weight, self.a.bias), self.inner.c.weight)


def test_a_module_of_ones_own_that_reads_weights() -> None:
    assert reads.read_without_call(Reader) == ("inner.c", "a") or set(reads.read_without_call(Reader)) == {
        "inner.c",
        "a",
    }
    model = Reader()
    lp.inject(model, LoRA(r=2, targets=("a", "b", "c")))
    for _, _, adapter in adapters(model):
        nn.init.normal_(adapter.B)
    x = torch.randn(2, 4)
    before = model(x)
    assert (before - Reader.forward(_off(model), x)).abs().max() > 1e-3
    lp.merge(model)
    torch.testing.assert_close(model(x), before)


def _off(model: nn.Module) -> Any:
    other = copy.deepcopy(model)
    lp.remove(other)
    return other


def test_dropout_and_what_is_no_weight_are_said() -> None:
    with pytest.warns(UserWarning, match=r"x_proj' \(2 such\) is read without calling.*the dropout of 'lora'"):
        lp.inject(zoo.mamba(), LoRA(r=2, dropout=0.1, targets=("x_proj",)))


class Through(lp.Adapter):
    def forward(self, base: lp.Base, *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs)


def test_an_adapter_that_is_no_map_on_the_weight_is_said() -> None:
    model = Reader()
    lp.attach(model.a, "through", Through())
    with pytest.warns(UserWarning, match=r"the weight of 'a' .*the adapter of 'through' acts only where"):
        lp.inject(model, Plain())


def test_an_adapted_bias_is_read_too() -> None:
    model = Reader()
    lp.inject(model, HUT(targets=("a",), shift=True))
    stored = model.a.state_dict()["bias"]
    with torch.no_grad():
        for _, _, adapter in adapters(model):
            for p in adapter.parameters():
                p.add_(0.5)
    assert not torch.equal(model.a.bias, stored)
    x = torch.randn(2, 4)
    torch.testing.assert_close(model.a(x), F.linear(x, model.a.weight, model.a.bias))
    before = model(x)
    lp.merge(model)
    torch.testing.assert_close(model(x), before)


def test_a_layer_with_a_forward_of_its_own_is_left_alone_aloud() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = Reader()
    model.a = Odd(4, 4)
    with pytest.warns(UserWarning, match=r"the weight of 'a' .*the adapter of 'product' acts only where"):
        lp.inject(model, Plain())
    assert isinstance(model.a.weight, nn.Parameter)
