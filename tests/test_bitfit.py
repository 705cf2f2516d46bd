"""BitFit by the numbers of its card, and what holds for every method that adds no tensors."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_peft_plugins.reparameterized.lora import LoRA
from lightning_peft_plugins.selective.bitfit import BitFit, is_bias
from lightning_peft_plugins.selective.norm_tuning import NormTuning
from lightning_peft_plugins.selective.partial_tuning import PartialTuning
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

import lightning_peft as lp
from lightning_peft.callback import PEFT
from lightning_peft.io import read_checkpoint, read_folder
from lightning_peft.proof import captured, prove
from lightning_peft.quantize import quantize
from tests import nets
from tests.selective import count, moved_by_training, trainable
from tests.zoo import bases as zoo

SELECTIVE = [BitFit(), NormTuning(), PartialTuning(last=1)]
LARGE: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
BERTS = {"base": {}, "large": LARGE | {"intermediate_size": 4096}}


def meta(make: Any, *args: Any, **options: Any) -> Any:
    with torch.device("meta"):
        return make(*args, **options)


@pytest.mark.parametrize(
    ("size", "whole", "biases", "subset"),
    [("base", 109_482_240, 102_912, 46_080), ("large", 335_141_888, 272_384, 122_880)],
)
def test_1_counts_of_bert(size: str, whole: int, biases: int, subset: int) -> None:
    config = BertConfig(**BERTS[size])
    assert sum(p.numel() for p in meta(BertModel, config).parameters()) == whole
    assert count(meta(BertModel, config), BitFit()) == biases
    assert count(meta(BertModel, config), BitFit(targets=("query", "intermediate"))) == subset


def test_1_counts_of_gpt2_and_vit() -> None:
    assert count(meta(GPT2LMHeadModel, GPT2Config()), BitFit()) == 102_144
    assert count(meta(ViTModel, ViTConfig(), add_pooling_layer=False), BitFit()) == 102_912


@pytest.mark.parametrize("method", SELECTIVE, ids=lambda m: m.name)
def test_2_nothing_else_moves_in_20_steps_with_weight_decay(method: lp.Method) -> None:
    model = zoo.bert()
    lp.inject(model, method)
    chosen = trainable(model)
    moved = set(moved_by_training(model, zoo.sentences()))
    assert moved and moved <= chosen
    keys = {n for n in chosen if n.endswith("key.bias")}  # the softmax does not depend on them
    assert chosen - keys <= moved


def test_3_a_key_bias_has_no_gradient_without_rotary_embeddings() -> None:
    model = nets.bert().double().eval()
    lp.inject(model, BitFit(targets=("query", "key")))
    model(**zoo.sentences()).loss.backward()
    sizes = {n: float(p.grad.abs().max()) for n, p in model.named_parameters() if p.grad is not None}
    assert len(sizes) == 4
    assert all((s < 1e-15) == n.endswith("key.bias") for n, s in sizes.items())


@pytest.mark.parametrize("make", [zoo.llama, zoo.t5])
def test_4_a_model_without_biases_raises_and_stays_as_it_was(make: Any) -> None:
    model = make()
    with pytest.raises(ValueError, match=r"(LlamaForCausalLM|T5For\w+) has no biases to train.*norm_tuning"):
        lp.inject(model, BitFit())
    assert trainable(model) == {n for n, _ in model.named_parameters()}


def test_5_what_counts_as_a_bias() -> None:
    one, two = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4, 4))
    yes = ["bias", "a.bias", "self_attn.in_proj_bias", "rnn.bias_ih_l0"]
    assert all(is_bias(n, one) for n in yes) and not any(is_bias(n, two) for n in yes)
    no = ["relative_attention_bias.weight", "relative_position_bias_table", "biases.scale"]
    assert not any(is_bias(n, one) for n in no)


def test_5_the_bias_that_multihead_attention_keeps_for_itself_trains() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False)
    lp.inject(model, BitFit(targets=("self_attn",)))
    assert trainable(model) == {"layers.0.self_attn.in_proj_bias", "layers.0.self_attn.out_proj.bias"}
    model.eval()(torch.randn(2, 3, 8)).sum().backward()
    assert model.layers[0].self_attn.in_proj_bias.grad is not None


@pytest.mark.parametrize(
    ("role", "ends"),
    [
        ("query", ["attention.self.query.bias"]),
        ("attention_output", ["attention.output.dense.bias"]),
        ("intermediate", ["intermediate.dense.bias"]),
        ("output", ["0.output.dense.bias", "1.output.dense.bias"]),  # the MLP's, not the attention's
        ("output.LayerNorm", ["output.LayerNorm.bias"]),
    ],
)
def test_roles_and_patterns(role: str, ends: list[str]) -> None:
    model = zoo.bert()
    lp.inject(model, BitFit(targets=(role,)))
    assert trainable(model) == {n for n, _ in model.named_parameters() if n.endswith(tuple(ends))}


def test_layers_and_exclude() -> None:
    model = zoo.bert()
    lp.inject(model, BitFit(layers="-1:", exclude=("LayerNorm",)))
    assert trainable(model) == {
        n for n, _ in model.named_parameters() if ".layer.1." in n and n.endswith("bias") and "LayerNorm" not in n
    }


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (zoo.bert, {"targets": ("qery",)}, r"'qery'; nearest: .*query"),
        (zoo.bert, {"targets": ("word_embeddings",)}, r"target 'word_embeddings' has no bias"),
        (zoo.bert, {"exclude": ("nothing",)}, r"exclude 'nothing' leaves out nothing"),
        (zoo.bert, {"layers": "7"}, r"layers '7' choose no block"),
        (zoo.gpt2, {"targets": ("query",)}, r"c_attn' is one layer for \['query', 'key', 'value'\].*add \['key'"),
        (zoo.cnn, {"targets": ("query",)}, r"'query' has no bias \(no such layer"),
    ],
)
def test_what_matches_nothing_raises(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lp.inject(make(), BitFit(**options))


def test_a_fused_bias_trains_where_all_of_it_is_asked_for() -> None:
    model = zoo.gpt2()
    lp.inject(model, BitFit(targets=("query", "key", "value")))
    assert trainable(model) == {f"transformer.h.{i}.attn.c_attn.bias" for i in (0, 1)}


def test_7_a_tied_bias_is_chosen_and_counted_once() -> None:
    config = nets.bert().config
    model = BertForMaskedLM(config)
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias
    assert count(model, BitFit(targets=("cls.predictions.bias", "cls.predictions.decoder.bias"))) == config.vocab_size
    with pytest.warns(UserWarning, match=r"and with it 'cls.predictions.decoder.bias': they are tied"):
        lp.inject(BertForMaskedLM(config), BitFit(targets=("cls.predictions.bias",)))


def quantised(kind: str) -> nn.Module:
    """Its layers of 48 inputs, which no block size divides, are left as they were in 4 bits."""
    model = zoo.bert()
    four = {"blocksize": 32, "compute_dtype": torch.float32, "exclude": ("output.dense",)}
    quantize(model, kind, **(four if kind == "nf4" else {}))
    return model


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_8_a_quantised_layer_trains_its_floating_bias_and_not_its_weight(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = quantised(kind)
    lp.inject(model, BitFit())
    assert trainable(model) == {n for n, _ in model.named_parameters() if n.endswith("bias")}
    moved = moved_by_training(model, zoo.sentences(), 2)
    assert any("intermediate.dense.bias" in n for n in moved) and not any("weight" in n for n in moved)
    with pytest.raises(ValueError, match=r"partial_tuning would train '.*weight', which is stored quantised"):
        lp.inject(quantised(kind), PartialTuning(last=1))


def test_biases_have_no_weight_decay() -> None:
    model = zoo.bert()
    lp.inject(model, BitFit())
    (group,) = BitFit().param_groups(model) or []
    assert group["weight_decay"] == 0.0 and {id(p) for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


def test_half_precision_weights_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"bitfit trains weights of the model as they are.*bfloat16"):
        lp.inject(zoo.bert().to(torch.bfloat16), BitFit())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lp.inject(zoo.bert(), BitFit())


# ---- methods without adapters: merge, folders, checkpoints ---------------------------------------------------------


@pytest.mark.parametrize("method", SELECTIVE, ids=lambda m: m.name)
def test_merge_leaves_the_trained_weights_and_undo_brings_the_method_back(method: lp.Method) -> None:
    model, batch = zoo.bert(), zoo.sentences()
    lp.inject(model, method)
    moved_by_training(model, batch, 2)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with captured(model) as calls:
        model(**batch)
    merged, proof = prove(model, calls)
    assert [c.module for c in calls] == [""]
    assert proof.largest == 0 and proof.hosts == 0 and proof.outputs > 0
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="nothing to merge: no adapter .* no method trains its weights"):
        lp.merge(model)
    merged.undo()
    lp.remove(model)


@pytest.mark.parametrize("method", SELECTIVE, ids=lambda m: m.name)
def test_a_fit_ends_in_a_folder_a_checkpoint_and_a_merged_model(method: lp.Method, tmp_path: Path) -> None:
    module = nets.HFNet(zoo.bert)
    peft = PEFT(method, model="net", train=("net.classifier",), folder=str(tmp_path / "adapter"), merge_at_end=True)
    trainer = nets.trainer(tmp_path, peft, max_epochs=1)
    trainer.fit(module, nets.tokens())
    tensors = read_folder(tmp_path / "adapter")[1]
    base = nets.HFNet(zoo.bert).net
    lp.inject(base, method, train=("classifier",))
    assert tensors.keys() == trainable(base)
    merged = type(base).from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(v, merged[k]) for k, v in tensors.items())
    lp.remove(base)
    lp.load(base, tmp_path / "adapter")
    assert all(torch.equal(v, module.net.state_dict()[k]) for k, v in base.state_dict().items())


@pytest.mark.parametrize("method", SELECTIVE, ids=lambda m: m.name)
def test_a_checkpoint_holds_the_trained_weights_alone_and_restores_them(method: lp.Method, tmp_path: Path) -> None:
    module = nets.HFNet(zoo.bert)
    trainer = nets.trainer(tmp_path, PEFT(method, model="net", folder=None), max_steps=2)
    trainer.fit(module, nets.tokens())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    held = set(read_checkpoint(tmp_path / "a.ckpt")["state_dict"])
    buffers = {n for n in held if re.search(r"position_ids|token_type_ids", n)}
    assert held - buffers == trainable(module)
    again = nets.HFNet(zoo.bert)
    lp.restore(again, tmp_path / "a.ckpt")
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in again.state_dict().items())
    with pytest.raises(ValueError, match="another base"):
        lp.restore(nets.HFNet(lambda: zoo.bert().apply(_shift)), tmp_path / "a.ckpt")


def _shift(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        module.weight.data += 1.0


def test_with_lora_beside_it_both_train_and_both_merge() -> None:
    model = zoo.bert()
    lp.inject(model, [LoRA(r=2), BitFit(targets=("intermediate",))])
    moved_by_training(model, zoo.sentences(), 3)
    want = model(**zoo.sentences()).logits
    assert {n.rpartition(".")[2] for n in trainable(model)} == {"A", "B", "bias"}
    lp.merge(model)
    torch.testing.assert_close(model(**zoo.sentences()).logits, want, atol=1e-5, rtol=0)
