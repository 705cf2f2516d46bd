"""Partial tuning: which layers train, by the cards methods/placement.md and methods/bitfit.md.

What holds for every method without adapters (merge, folders, checkpoints, 20 steps) is in test_bitfit.py.
"""

from typing import Any

import pytest
import torch
from lightning_peft_plugins.selective.partial_tuning import PartialTuning
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft as lp
from tests import nets
from tests.selective import count, moved_by_training, trainable
from tests.zoo import bases as zoo

BLOCK = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32  # q, o; k, v; gate, up, down; two norms


def names(model: nn.Module, *parts: str) -> set[str]:
    return {n for n, _ in model.named_parameters() if any(p in n for p in parts)}


def test_1_counts() -> None:
    assert count(zoo.llama(), PartialTuning(last=1)) == BLOCK
    assert count(zoo.llama(), PartialTuning(targets=("mlp",))) == 2 * 3 * 32 * 48
    assert count(zoo.llama(), PartialTuning(targets=("attention",), last=1)) == 2 * 32 * 32 + 2 * 16 * 32
    assert count(zoo.llama(), PartialTuning(targets=("lm_head",))) == 64 * 32
    sizes: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_attention_heads=32, num_key_value_heads=8, **sizes))
        block = 2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 2048 * 8192 + 2 * 2048
        assert count(model, PartialTuning(last=2)) == 2 * block
        assert {n.split(".")[2] for n in trainable(model)} == {"14", "15"}


def test_2_the_last_and_all_but_the_last_are_complements() -> None:
    chosen = []
    for options in ({"last": 1}, {"layers": ":-1"}, {"layers": ":"}):
        model = zoo.llama()
        lp.inject(model, PartialTuning(**options))
        chosen.append(trainable(model))
    assert chosen[0] == names(model, "layers.1.") and chosen[1] == names(model, "layers.0.")
    assert chosen[0] | chosen[1] == chosen[2]


def test_last_counts_in_encoder_and_decoder() -> None:
    model = zoo.t5()
    lp.inject(model, PartialTuning(last=1))
    assert trainable(model) == names(model, "encoder.block.1.", "decoder.block.1.")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"targets": ("classifier",)}, ["classifier"]),  # a linear probe
        ({"targets": ("*.intermediate.*",), "layers": "0"}, ["layer.0.intermediate"]),
        ({"exclude": ("bert.embeddings",)}, ["bert.encoder", "bert.pooler", "classifier"]),
        ({"targets": ("query", "classifier.bias")}, ["query", "classifier.bias"]),
        ({"targets": ("attention",), "exclude": ("*.bias",), "last": 1}, [f"layer.1.attention.{p}.weight" for p in
                                                                         ("self.query", "self.key", "self.value",
                                                                          "output.dense")]),
    ],
)  # fmt: skip
def test_targets_layers_and_exclude(options: dict[str, Any], parts: list[str]) -> None:
    model = zoo.bert()
    lp.inject(model, PartialTuning(**options))
    assert trainable(model) == names(model, *parts)


def test_7_below_the_first_block_that_trains_there_is_no_graph() -> None:
    model = zoo.llama()
    lp.inject(model, PartialTuning(last=1))
    inputs: dict[int, bool] = {}
    for i in (0, 1):
        block = model.get_submodule(f"model.layers.{i}")
        block.register_forward_hook(
            lambda m, args, out, i=i: inputs.update({i: (out[0] if isinstance(out, tuple) else out).requires_grad})
        )
    model(**zoo.text()).loss.backward()
    assert inputs == {0: False, 1: True}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == names(model, "layers.1.")


@pytest.mark.parametrize("options", [{"last": 1}, {"targets": ("mlp",)}, {"targets": ("lm_head", "embed_tokens")}])
def test_2_nothing_else_moves_in_20_steps_with_weight_decay(options: dict[str, Any]) -> None:
    model = zoo.llama()
    lp.inject(model, PartialTuning(**options))
    assert set(moved_by_training(model, zoo.text())) == trainable(model)


def test_7_tied_weights_train_once_aloud() -> None:
    config = zoo.llama().config
    config.tie_word_embeddings = True
    with pytest.warns(UserWarning, match=r"trains 'model.embed_tokens.weight', and with it 'lm_head.weight': they are"):
        assert count(LlamaForCausalLM(config), PartialTuning(targets=("embed_tokens",))) == 64 * 32


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (zoo.llama, {}, r"partial tuning of everything is full fine-tuning"),
        (zoo.llama, {"last": -1}, r"last counts blocks from the end, so it must be at least 1.*got -1"),
        (zoo.llama, {"last": 1, "layers": "0"}, r"give layers or last, not both: got '0' and 1"),
        (zoo.llama, {"last": 3}, r"last=3, but 'model.layers' has 2 blocks"),
        (nets.mlp, {"last": 1}, r"layers '-1:' were asked for, but this Sequential has no stack of blocks"),
        (zoo.llama, {"layers": "9"}, r"layers '9' choose no block; .* 2 in 'model.layers'"),
        (zoo.llama, {"layers": "one"}, r"cannot read layers 'one'"),
        (zoo.llama, {"targets": ("q_prj",)}, r"no Parameter matches 'q_prj'; nearest: 'q_proj'"),
        (zoo.llama, {"targets": ("lm_head",), "layers": "0"}, r"leave nothing: 1 matched, .*outside layers '0'"),
        (zoo.llama, {"targets": ("q_proj",), "exclude": ("v_proj",)}, r"exclude 'v_proj' leaves out nothing"),
        (zoo.llama, {"targets": ("mixer",)}, r"no Parameter matches 'mixer'"),
    ],
)
def test_bad_options_and_what_matches_nothing_raise(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lp.inject(make(), PartialTuning(**options))


def test_8_quantised_weights_cannot_train_and_what_is_not_quantised_can() -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(
        ValueError, match=r"would train 'model.layers.1.self_attn.q_proj.weight', which is stored quant"
    ):
        lp.inject(zoo.nf4_llama(), PartialTuning(last=1))
    model = zoo.nf4_llama()
    lp.inject(model, PartialTuning(targets=("embed_tokens",)))
    assert moved_by_training(model, zoo.text()) == ["model.embed_tokens.weight"]
