"""Cut models as folders for from_pretrained, against the cut model in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft import parts, plain, surgery
from tests import test_surgery as cuts

SIZES = {
    "bert": {"intermediate_size": 31},
    "roberta": {"intermediate_size": 31},
    "opt": {"ffn_dim": 31},
    "gpt2": {"n_inner": 31},
    "vit": {"intermediate_size": 31},
    "whisper": {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
    "llama": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 31},
}


@pytest.mark.parametrize("family", SIZES)
def test_a_cut_model_as_a_folder_computes_the_same(family: str, tmp_path: Path) -> None:
    model: Any = cuts.made(cuts.FAMILIES[family])
    config = model.config.to_dict()
    record = surgery.cut(model, *cuts.choice(model))
    wanted = cuts.logits(model)
    assert plain.save(model, tmp_path) == SIZES[family]
    other = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(cuts.logits(other), wanted, rtol=0, atol=1e-10)
    assert torch.equal(cuts.logits(model), wanted) and surgery.record(model) == record  # as it was
    assert model.config.to_dict() == config
    sizes = [max(p.units for p in found(model)) for found in (parts.attentions, parts.mlps)]
    heads = sizes[0] if family == "llama" else 4
    assert {p.units for p in parts.attentions(other)} == {heads} and parts.mlps(other)[0].units == sizes[1]


def test_heads_that_differ_between_layers_go_by_the_largest(tmp_path: Path) -> None:
    model: Any = cuts.made(cuts.llama, num_key_value_heads=4)
    names = [a.name for a in parts.attentions(model)]
    surgery.cut(model, {names[0]: [1, 3], names[1]: [0, 2, 3]}, {parts.mlps(model)[1].name: [4, 7]})
    wanted = cuts.logits(model)
    assert plain.save(model, tmp_path) == {"intermediate_size": 48}  # three heads would not divide the width
    other: Any = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(cuts.logits(other), wanted, rtol=0, atol=1e-10)
    columns = other.get_submodule(parts.mlps(model)[1].down).weight.any(0)
    assert columns.nonzero()[:, 0].tolist() == [4, 7]  # in their old places


def test_heads_are_as_many_as_the_config_takes(tmp_path: Path) -> None:
    model: Any = cuts.made(cuts.llama, num_key_value_heads=4)
    names = [a.name for a in parts.attentions(model)]
    surgery.cut(model, {names[0]: [1, 3], names[1]: [2]})
    assert plain.save(model, tmp_path)["num_attention_heads"] == 2
    other: Any = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(cuts.logits(other), cuts.logits(model), rtol=0, atol=1e-10)


def test_what_no_config_can_say_is_refused(tmp_path: Path) -> None:
    model: Any = cuts.made(cuts.bert)
    surgery.cut(model, channels={"bert.encoder.layer.0": [1, 2]})
    model.classifier = torch.nn.Linear(32, 9)  # not as its config says
    with pytest.raises(ValueError, match="that no config of its class can say, .*: lightning_peft.save keeps it"):
        plain.save(model, tmp_path / "no")
    assert not (tmp_path / "no").exists()
