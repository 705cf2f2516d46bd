"""A host whose class is swapped for its adapted subclass stays what it was to the libraries around it."""

from typing import Any

import pytest

import lightning_peft as lp
from tests import nets
from tests.zoo import bases as zoo


class Through(lp.Adapter):
    def forward(self, base: lp.Base, *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs)


@pytest.mark.parametrize("where", ["", "model", "model.layers.0", "model.layers.0.self_attn"])
def test_transformers_records_hidden_states_and_attentions_all_the_same(where: str) -> None:
    model = nets.llama(attn_implementation="eager").eval()
    lp.attach(model.get_submodule(where), "through", Through())
    out = model(zoo.text()["input_ids"], output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2


def test_its_name_says_that_it_is_adapted() -> None:
    model = nets.mlp()
    lp.attach(model[0], "through", Through())
    assert type(model[0]).__name__ == "AdaptedLinear" and repr(model[0]).startswith("AdaptedLinear(")
