"""Norm tuning by the numbers of its card (methods/bitfit.md), batch norms in a fit, and peft's LN_TUNING.

What holds for every method without adapters (merge, folders, checkpoints, 20 steps) is in test_bitfit.py.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning_peft_plugins.selective.norm_tuning import NormTuning, is_norm
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.t5.modeling_t5 import T5LayerNorm

import lightning_peft as lp
from lightning_peft.adapter import Adapter, Base
from lightning_peft.callback import PEFT
from lightning_peft.optim import regroup
from tests import nets
from tests.selective import assert_folders_agree, count, moved_by_training, trainable
from tests.zoo import bases as zoo

LLAMA8B: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8}
LARGE: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096}


def test_1_counts() -> None:
    with torch.device("meta"):
        assert count(BertModel(BertConfig()), NormTuning()) == 38_400
        assert count(BertModel(BertConfig(num_attention_heads=16, **LARGE)), NormTuning()) == 100_352
        assert count(GPT2LMHeadModel(GPT2Config()), NormTuning()) == 38_400
        llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, num_attention_heads=32, **LLAMA8B))
        assert count(llama, NormTuning()) == (2 * 4 + 1) * 4096  # 266,240 with 32 layers
        t5 = T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))
        assert count(t5, NormTuning()) == (2 * 2 + 1 + 3 * 2 + 1) * 32


class ScaleNorm(nn.Module):
    """A norm as models write their own, and the same around a layer, which is none."""

    def __init__(self, *shape: int, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(shape))
        if inner is not None:
            self.inner = inner


class NormedLinear(nn.Linear):
    """Named like a norm, but its weight is a matrix."""


def test_5_what_counts_as_a_normalisation_layer() -> None:
    yes = [nn.LayerNorm(4), nn.LayerNorm((2, 4)), nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.BatchNorm2d(4), T5LayerNorm(4),
           nn.InstanceNorm1d(4, affine=True), nn.SyncBatchNorm(4), ScaleNorm(4)]  # fmt: skip
    no = [nn.InstanceNorm1d(4), nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 4), nn.PReLU(4),
          nn.Embedding(4, 1), NormedLinear(4, 4), ScaleNorm(4, inner=nn.Linear(4, 4)), ScaleNorm(4, 4)]  # fmt: skip
    assert [is_norm(m) for m in yes + no] == [True] * len(yes) + [False] * len(no)


@pytest.mark.parametrize(
    ("make", "options", "want"),
    [
        (zoo.llama, {"targets": ("input_layernorm",)}, [f"model.layers.{i}.input_layernorm.weight" for i in (0, 1)]),
        (
            zoo.llama,
            {"layers": "1", "exclude": ("input_layernorm",)},
            ["model.layers.1.post_attention_layernorm.weight"],
        ),
        (zoo.llama, {"exclude": ("model.layers",)}, ["model.norm.weight"]),
        (zoo.gpt2, {"targets": ("ln_f",)}, ["transformer.ln_f.weight", "transformer.ln_f.bias"]),
        (zoo.cnn, {}, ["1.weight", "1.bias"]),
    ],
)
def test_targets_layers_and_exclude(make: Any, options: dict[str, Any], want: list[str]) -> None:
    model = make()
    lp.inject(model, NormTuning(**options))
    assert trainable(model) == set(want)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (nets.mlp, {}, r"norm_tuning: this Sequential has no normalisation layer with weights; train its biases"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.InstanceNorm1d(4)), {}, "no normalisation layer with weights"),
        (zoo.bert, {"targets": ("LayerNrm",)}, r"no LayerNorm matches 'LayerNrm'; nearest: 'LayerNorm'"),
        (zoo.bert, {"targets": ("query",)}, r"no LayerNorm matches 'query'"),
        (zoo.bert, {"exclude": ("nothing",)}, r"exclude 'nothing' leaves out nothing"),
        (zoo.bert, {"exclude": ("*",)}, r"leave nothing: 5 matched, 5 excluded"),
        (zoo.bert, {"layers": "7"}, r"layers '7' choose no block"),
        (zoo.cnn, {"layers": "0"}, r"has no stack of blocks"),
    ],
)
def test_what_matches_nothing_raises(make: Any, options: dict[str, Any], message: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=message):
        lp.inject(model, NormTuning(**options))
    assert trainable(model) == {n for n, _ in model.named_parameters()}


class Twice(Adapter):
    def forward(self, base: Base, *args: Any) -> Any:
        return 2 * base(*args)


def test_a_norm_that_carries_an_adapter_is_still_one_and_none_is_decayed() -> None:
    model = zoo.bert()
    lp.inject(model, NormTuning())
    for name in ("bert.embeddings.LayerNorm", "bert.encoder.layer.0.output.LayerNorm"):
        lp.attach(model.get_submodule(name), "twice", Twice())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
    regroup([optimizer], [], NormTuning(), model)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decays) == 10 and set(decays.values()) == {0.0}


def test_a_tied_norm_trains_once() -> None:
    norm = nn.LayerNorm(4)
    model = nn.Sequential(norm, nn.Linear(4, 4), norm)
    with pytest.warns(UserWarning, match=r"trains '0.weight', and with it '2.weight': they are tied"):
        lp.inject(model, NormTuning())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 8
    (group,) = NormTuning().param_groups(model) or []
    assert len(group["params"]) == 2


def test_half_precision_weights_are_warned_of_and_quantised_models_train_their_norms() -> None:
    with pytest.warns(UserWarning, match=r"norm_tuning trains weights of the model as they are.*bfloat16"):
        lp.inject(zoo.llama().to(torch.bfloat16), NormTuning())
    pytest.importorskip("bitsandbytes")
    model = zoo.nf4_llama()
    lp.inject(model, NormTuning())
    moved = moved_by_training(model, zoo.text())
    assert set(moved) == trainable(model) and len(moved) == 5 and all("norm" in n for n in moved)


# ---- batch norms ---------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two batch norms behind a convolution; its inputs have mean 5."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.conv, self.b = nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, nets.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.conv(self.a(x + 5))).mean((2, 3)))


def test_a_frozen_batch_norm_keeps_its_statistics_and_a_chosen_one_counts_and_saves_them(tmp_path: Path) -> None:
    module = nets.Net(Two)
    start = {k: v.clone() for k, v in module.net.state_dict().items()}
    method = NormTuning(targets=("b",))
    trainer = nets.trainer(tmp_path, PEFT(method, model="net", folder=str(tmp_path / "adapter")), max_steps=6)
    trainer.fit(module, nets.vectors(images=True))
    after = module.net.state_dict()
    moved = {k for k in after if not torch.equal(after[k], start[k])}
    assert moved == {"b.weight", "b.bias", "b.running_mean", "b.running_var", "b.num_batches_tracked"}
    fresh = nets.Net(Two).net
    lp.load(fresh, tmp_path / "adapter")
    assert all(torch.equal(v, after[k]) for k, v in fresh.state_dict().items())


# ---- huggingface/peft ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "batch", "targets"),
    [
        (lambda: nets.bert(initializer_range=0.2), zoo.sentences, ["LayerNorm"]),
        (zoo.llama, zoo.text, ["input_layernorm", "post_attention_layernorm", "norm"]),
        (zoo.gpt2, zoo.text, ["ln_1", "ln_2", "ln_f"]),
        (zoo.llama, zoo.text, ["input_layernorm"]),
    ],
    ids=["bert", "llama", "gpt2", "subset"],
)
def test_peft_computes_the_same_and_folders_go_both_ways(make: Any, batch: Any, targets: Any, tmp_path: Path) -> None:
    base = make().eval()
    ours = assert_folders_agree(base, peft.LNTuningConfig(target_modules=targets), batch(), tmp_path)
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in trainable(ours)} == set(targets)


def test_a_folder_that_trains_something_else_is_refused(tmp_path: Path) -> None:
    base = zoo.llama()
    theirs = peft.get_peft_model(base, peft.LNTuningConfig(target_modules=["norm", "q_proj"]))
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"trains 'model.layers.0.self_attn.q_proj' \(2 such\), which is no norm"):
        lp.hf.load(zoo.llama(), tmp_path)
