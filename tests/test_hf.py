"""huggingface/peft's folder, both ways; peft itself is the oracle."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning_peft_plugins.reparameterized.lora import LoRA
from lightning_peft_plugins.reparameterized.rand_lora import RandLoRA
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

import lightning_peft as lp
from lightning_peft import hf, registry
from lightning_peft.io import describe
from tests.nets import bert, llama

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def still_bert() -> nn.Module:
    return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64,
            n_positions=32,
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )  # fmt: skip
    )


def gemma() -> nn.Module:
    """Its word embedding multiplies what it looks up by the square root of the width."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            head_dim=8,
            pad_token_id=0,
        )  # fmt: skip
    )


class Cnn(nn.Module):
    """A convolution with stride and padding, a 1x1 one, two linear layers of whose names one ends the other."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, (3, 5), stride=2, padding=1, **options)
        self.point = nn.Conv2d(6, 8, 1)
        self.block = nn.ModuleDict({"fc": nn.Linear(8, 8)})
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.conv(x).relu()).relu().mean((2, 3))
        return self.fc(self.block["fc"](x))


def batch(model: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(5)
    return torch.randn(2, 3, 8, 8, generator=g) if isinstance(model, Cnn) else torch.randint(1, 64, (2, 7), generator=g)


def run(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return getattr(out, "logits", out)


def randomize(model: nn.Module) -> None:
    """Every trained tensor away from its start, LoRA's zero factor first of all."""
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss that reaches every output; ours and peft's under one name."""
    model.train().zero_grad()
    run(model, x).pow(2).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    names = {n: n.removeprefix("base_model.model.").replace("modules_to_save.default.", "") for n in grads}
    names = {n: re.sub(r"\.default(\.weight)?$", "", short) for n, short in names.items()}
    return {re.sub(r"adapters\.\w+\.|lora_embedding_|lora_|vera_lambda_", "", names[n]): g for n, g in grads.items()}


def same_function(ours: nn.Module, theirs: nn.Module, base: nn.Module) -> None:
    """Equal logits, which are not the base's, and equal gradients of all that trains."""
    x = batch(base)
    with torch.no_grad():
        mine = run(ours.eval(), x)
        assert (mine - run(base.eval(), x)).abs().max() > 1e-2
        torch.testing.assert_close(mine, run(theirs.eval(), x), atol=1e-5, rtol=1e-5)
    got, want = gradients(ours, x), gradients(theirs, x)
    assert got.keys() == want.keys()
    for name, g in got.items():
        torch.testing.assert_close(g.flatten(), want[name].flatten(), atol=1e-5, rtol=1e-4, msg=name)


def peft_folder(base: nn.Module, folder: Path, **options: Any) -> Any:
    """A peft model around a copy of ``base``, random where it trains, and its folder."""
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))  # type: ignore[arg-type]
    randomize(theirs)
    theirs.save_pretrained(str(folder))
    return theirs


def in_peft(base: nn.Module, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder), is_trainable=True)  # type: ignore[arg-type]


def places(model: Any) -> list[tuple[str, int, float]]:
    """(module name, rank, scale) of every adapter, of ours or peft's."""
    theirs: list[Any] = [(n, m) for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    ours: list[Any] = [(n, a) for n, _, a in lp.adapters(model)]
    return [
        *((n.removeprefix("base_model.model."), m.r["default"], round(m.scaling["default"], 9)) for n, m in theirs),
        *((n, len(a.A), round(a.scale, 9)) for n, a in ours),
    ]


THEIRS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "head": (still_bert, {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "r": 4}),
    "all-linear": (
        llama,
        {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3},
    ),
    "wide": (llama, {"target_modules": ["q_proj", "down_proj"], "r": 40}),
    "regex": (llama, {"target_modules": r"model\.layers\.\d\.mlp\..*_proj", "exclude_modules": ["gate_proj"]}),
    "layer": (still_bert, {"target_modules": ["key"], "layers_to_transform": [1], "layers_pattern": "layer"}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "use_rslora": True,
            "r": 8,
            "lora_alpha": 5,
            "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2, "k_proj": 6},
            "alpha_pattern": {"^model.layers.1.mlp.down_proj": 3.5, "0.self_attn.*": 7},
        },
    ),
    "conv1d": (gpt2, {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "embedding": (gpt2, {"target_modules": ["wte", "wpe"], "r": 3, "lora_alpha": 2}),
    "scaled embedding": (gemma, {"target_modules": ["embed_tokens", "up_proj"], "r": 3}),
    "layer norm": (llama, {"target_modules": ["v_proj"], "modules_to_save": ["input_layernorm", "lm_head"]}),
    "conv": (Cnn, {"target_modules": ["conv", "point"], "r": 4, "modules_to_save": ["block.fc"]}),
    "suffix": (Cnn, {"target_modules": r"fc|conv", "r": 4}),
}


@pytest.mark.parametrize("case", THEIRS)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings", "ignore:Setting `save_embedding_layers`")
def test_peft_to_ours_and_back(case: str, tmp_path: Path) -> None:
    make, options = THEIRS[case]
    base = make()
    theirs = peft_folder(base, tmp_path / "theirs", **options)
    ours: Any = hf.load(copy.deepcopy(base), tmp_path / "theirs")
    same_function(ours, theirs, base)

    method = ours.lightning_peft_record.methods[0]
    again = copy.deepcopy(base)  # what the method says of itself is what was injected
    lp.inject(again, method)
    assert places(again) == places(ours) == places(theirs)

    hf.save(ours, tmp_path / "ours")
    back = in_peft(base, tmp_path / "ours")
    assert places(back) == places(theirs)
    same_function(ours, back, base)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("case", THEIRS)
def test_a_loaded_adapter_saves_as_our_own_folder(case: str, tmp_path: Path) -> None:
    make, options = THEIRS[case]
    base = make()
    peft_folder(base, tmp_path / "theirs", **options)
    ours = hf.load(copy.deepcopy(base), tmp_path / "theirs").eval()
    lp.save(ours, tmp_path / "own")
    again = lp.load(copy.deepcopy(base), tmp_path / "own").eval()
    x = batch(base)
    assert torch.equal(run(again, x), run(ours, x))
    assert describe(again)["methods"] == describe(ours)["methods"]


OURS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], tuple[str, ...]]] = {
    "head": (still_bert, {}, ("classifier",)),
    "no head": (still_bert, {"targets": ("attention",)}, ()),
    "head adapted": (still_bert, {"targets": ("classifier", "query")}, ()),
    "layers": (llama, {"layers": "1:", "exclude": ("mlp",), "rslora": True, "alpha": 3.0}, ()),
    "patterns": (llama, {"rank_pattern": {"*.1.*.q_proj": 3}, "alpha_pattern": {"*.1.mlp.*": 2.5}}, ()),
    "gpt2": (gpt2, {"targets": ("c_attn", "c_fc", "wpe"), "r": 3}, ("transformer.ln_f",)),
    "conv": (Cnn, {"targets": ("conv", "point", "[f]c")}, ("block.fc",)),
    "clamped": (Cnn, {"targets": ("block.fc", "[f]c", "conv"), "r": 12}, ()),
}


@pytest.mark.parametrize("case", OURS)
@pytest.mark.filterwarnings("ignore:.*clamped to its smaller side")
def test_ours_to_peft(case: str, tmp_path: Path) -> None:
    make, options, train = OURS[case]
    base = make()
    ours = copy.deepcopy(base)
    lp.inject(ours, LoRA(**options), train=train)
    randomize(ours)
    hf.save(ours, tmp_path / "folder")
    theirs = in_peft(base, tmp_path / "folder")
    same_function(ours, theirs, base)
    assert places(theirs) == places(ours)


def test_the_config_says_what_peft_writes(tmp_path: Path) -> None:
    base: Any = still_bert()
    base.config._name_or_path = "some/bert"
    lp.inject(base, LoRA(r=4, targets=("attention",), rank_pattern={"key": 2}, dropout=0.1), train=("classifier",))
    config = json.loads((hf.save(base, tmp_path / "folder") / CONFIG).read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": "some/bert",
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": ["attention.output.dense", "key", "query", "value"],
        "rank_pattern": {"key": 2},
        "alpha_pattern": {},
        "modules_to_save": ["classifier"],
    }
    keys = {
        k.removeprefix("base_model.model.bert.encoder.layer.0.attention.")
        for k in load_file(tmp_path / "folder" / TENSORS)
    }
    assert {"self.query.lora_A.weight", "output.dense.lora_B.weight", "base_model.model.classifier.weight"} <= keys


@pytest.mark.parametrize(
    ("make", "task", "train"),
    [
        (still_bert, None, ()),  # peft would train the head of a SEQ_CLS model, which is frozen here
        (still_bert, "SEQ_CLS", ("classifier",)),
        (llama, "CAUSAL_LM", ()),
        (gpt2, "CAUSAL_LM", ()),
        (Cnn, None, ()),
    ],
)
def test_task_type(make: Callable[[], nn.Module], task: str | None, train: tuple[str, ...], tmp_path: Path) -> None:
    base = make()
    lp.inject(base, LoRA(targets=("point",) if isinstance(base, Cnn) else ("all-linear",)), train=train)
    assert json.loads((hf.save(base, tmp_path / "folder") / CONFIG).read_text())["task_type"] == task


def test_names_of_which_one_ends_another_are_told_apart(tmp_path: Path) -> None:
    base = Cnn()
    ours = copy.deepcopy(base)
    lp.inject(ours, LoRA(r=2, targets=("[f]c",)))
    assert [n for n, _, _ in lp.adapters(ours)] == ["fc"]
    config = json.loads((hf.save(ours, tmp_path / "folder") / CONFIG).read_text())
    assert config["target_modules"] == "fc"  # a regex: as a list it would name block.fc too
    assert [n for n, _, _ in places(in_peft(base, tmp_path / "folder"))] == ["fc"]
    back: Any = hf.load(copy.deepcopy(base), tmp_path / "folder")
    assert [n for n, _, _ in lp.adapters(back)] == ["fc"]
    assert back.lightning_peft_record.methods[0].targets == ("[f]c",)


def test_a_trained_module_whose_name_another_ends_in_takes_that_along(tmp_path: Path) -> None:
    base = Cnn()
    ours = copy.deepcopy(base)
    lp.inject(ours, LoRA(targets=("point",)), train=("[f]c.*",))
    randomize(ours)
    with pytest.warns(UserWarning, match=r"by the ends of names, so \['block.fc'\]"):
        hf.save(ours, tmp_path / "folder")
    x = batch(base)
    theirs = in_peft(base, tmp_path / "folder").eval()
    torch.testing.assert_close(run(theirs, x), run(ours.eval(), x), atol=1e-5, rtol=1e-5)


def test_batch_norm_trained_in_full_brings_its_statistics(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    ours = copy.deepcopy(base)
    lp.inject(ours, LoRA(r=2, targets=("0",)), train=("1",))
    randomize(ours)
    x = torch.randn(9, 6)
    ours(x)  # moves the running statistics
    hf.save(ours, tmp_path / "folder")
    theirs, back = in_peft(base, tmp_path / "folder"), hf.load(copy.deepcopy(base), tmp_path / "folder")
    torch.testing.assert_close(theirs.eval()(x), ours.eval()(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(back.eval()(x), ours(x))


def test_adapters_on_a_submodule_are_saved_from_there(tmp_path: Path) -> None:
    outer = nn.ModuleDict({"net": Cnn()})
    lp.inject(outer["net"], LoRA(targets=("conv",)))
    with pytest.raises(ValueError, match="its submodule 'net' does: pass that"):
        hf.save(outer, tmp_path / "folder")
    hf.save(outer["net"], tmp_path / "folder")
    with pytest.raises(ValueError, match="call lightning_peft.inject first"):
        hf.save(Cnn(), tmp_path / "other")


def test_an_existing_adapter_is_kept_unless_told(tmp_path: Path) -> None:
    base = Cnn()
    lp.inject(base, LoRA(targets=("conv",)))
    (tmp_path / "tokenizer.json").write_text("{}")
    hf.save(base, tmp_path)
    with pytest.raises(ValueError, match="holds an adapter.*overwrite=True"):
        hf.save(base, tmp_path)
    randomize(base)
    hf.save(base, tmp_path, overwrite=True)
    assert load_file(tmp_path / TENSORS)["base_model.model.conv.lora_B.weight"].abs().max() > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, TENSORS, "tokenizer.json"]


@pytest.mark.parametrize("options", [{"groups": 3}, {"dilation": 2}, {"padding_mode": "reflect"}])
def test_convolutions_that_peft_computes_otherwise_are_refused_both_ways(options: Any, tmp_path: Path) -> None:
    ours = Cnn(**options)
    lp.inject(ours, LoRA(r=3, targets=("conv",)))
    with pytest.raises(ValueError, match="^conv: huggingface/peft computes something else for a convolution"):
        hf.save(ours, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    base = Cnn(**options)
    if "groups" not in options:  # its file would hold another A altogether
        peft_folder(base, tmp_path / "theirs", target_modules=["conv"], r=3)
        with pytest.raises(ValueError, match="computes something else"):
            hf.load(base, tmp_path / "theirs")
        assert not list(lp.adapters(base))


@pytest.mark.parametrize(
    ("train", "name"),
    [(("*.bias",), "bert.embeddings.LayerNorm.bias"), (("classifier.bias",), "classifier.bias")],
)
def test_what_modules_to_save_cannot_express_is_refused(train: Any, name: str, tmp_path: Path) -> None:
    ours = still_bert()
    lp.inject(ours, LoRA(targets=("query",)), train=train)
    with pytest.raises(ValueError, match=f"trained parameters cannot be expressed.*first '{name}'.*trained as a whole"):
        hf.save(ours, tmp_path / "folder")


def test_adapting_and_training_one_module_is_refused(tmp_path: Path) -> None:
    ours = still_bert()
    lp.inject(ours, LoRA(r=2, targets=("classifier", "query")), train=("classifier",))
    with pytest.raises(ValueError, match="cannot both adapt 'classifier' and train it"):
        hf.save(ours, tmp_path / "folder")


def test_a_parameter_on_the_model_itself_is_refused(tmp_path: Path) -> None:
    ours = Cnn()
    ours.register_parameter("token", nn.Parameter(torch.zeros(3)))
    lp.inject(ours, LoRA(targets=("conv",)), train=("token",))
    with pytest.raises(ValueError, match="first 'token'"):
        hf.save(ours, tmp_path / "folder")


def edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A plain peft folder for ``still_bert()``."""
    peft_folder(still_bert(), tmp_path / "theirs", target_modules=["query", "key"], r=4)
    return tmp_path / "theirs"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"use_dora": True}, "lacks 4 of 12 adapter tensors, first '.*lora_magnitude_vector'"),
        ({"use_qalora": True}, r"use_qalora=True.*plugin such as 'qalora' with Traits\(hf='LORA:use_qalora'\)"),
        ({"bias": "all"}, "bias='all'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"alora_invocation_tokens": [3]}, r"alora_invocation_tokens=\[3\]"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"an_option_of_tomorrow": 3}, "an_option_of_tomorrow=3"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "'olora'.*rewrites weights of the base"),
        ({"init_lora_weights": "corda"}, "'corda'"),
        ({"init_lora_weights": "loftq"}, "'loftq'"),
        ({"r": 5}, "'bert.encoder.layer.0.attention.self.key' the rank 5, its tensors have 4|query' the rank 5"),
        ({"peft_type": "LORO"}, "peft_type 'LORO'; nearest plugin: 'lora';.* 'lora' reads LORA"),
        ({"peft_type": None}, "names no peft_type"),
    ],
)
def test_configs_that_ours_does_not_compute_are_refused(theirs: Path, fields: Any, says: str) -> None:
    edit(theirs, **fields)
    base = still_bert()
    keys = set(base.state_dict())
    with pytest.raises(ValueError, match=says):
        hf.load(base, theirs)
    assert set(base.state_dict()) == keys and all(p.requires_grad for p in base.parameters())


def test_converted_pissa_loads(tmp_path: Path) -> None:
    base = still_bert()
    start: Any = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_modules=["query"], init_lora_weights="pissa")
    )
    start.peft_config["default"].init_lora_weights = True
    start.save_pretrained(str(tmp_path / "start"))
    start.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for n, p in start.named_parameters():
            if "lora_" in n:
                p.add_(torch.randn_like(p) * 0.1)
    start.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = hf.load(copy.deepcopy(base), tmp_path / "plain").eval()
    torch.testing.assert_close(run(ours, batch(base)), run(start.eval(), batch(base)), atol=1e-4, rtol=1e-4)
    assert {r for _, r, _ in places(ours)} == {16}


def test_bad_folders(theirs: Path, tmp_path: Path) -> None:
    def refused(folder: Path, says: str) -> None:
        base = still_bert()
        with pytest.raises(ValueError, match=says):
            hf.load(base, folder)
        assert not list(lp.adapters(base))

    refused(tmp_path / "nowhere", f"has no {CONFIG}")
    for name in (CONFIG, TENSORS):
        folder = shutil.copytree(theirs, tmp_path / f"without {name}")
        (folder / name).unlink()
        refused(folder, f"has no {name}")
    torch.save({}, tmp_path / f"without {TENSORS}" / "adapter_model.bin")
    refused(tmp_path / f"without {TENSORS}", "a pickle, which can run code.*save_pretrained it again")
    for name in (CONFIG, TENSORS):
        folder = shutil.copytree(theirs, tmp_path / f"short {name}")
        (folder / name).write_bytes((folder / name).read_bytes()[:-40])
        refused(folder, "damaged or truncated")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


QUERY = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(QUERY), f"lacks 1 of 8 adapter tensors, first '{QUERY}'"),
        (
            lambda t: t.update({QUERY.replace("lora_B", "lora_C"): t[QUERY].clone()}),
            "1 adapter tensors .of 9. that nothing here",
        ),
        (lambda t: t.update({QUERY.replace("query", "quary"): t.pop(QUERY)}), f"nothing here takes.*nearest '{QUERY}'"),
        (lambda t: t.update({QUERY: t[QUERY][:-1]}), r"shape \(31, 4\), but \(32, 4\) here"),
        (
            lambda t: t.update({"base_model.model.bert.pooler.dense.bias": torch.ones(32)}),
            "frozen 'bert.pooler.dense.b",
        ),
        (lambda t: t.update({"base_model.model.classifier.bias": torch.ones(4)}), r"has shape \(4,\), but \(3,\) here"),
    ],
)
def test_tensors_without_a_place_are_refused(theirs: Path, change: Any, says: str) -> None:
    rewrite(theirs, change)
    base = still_bert()
    with pytest.raises(ValueError, match=says):
        hf.load(base, theirs)
    assert not list(lp.adapters(base))


def test_copies_of_what_layers_share_are_read_once(tmp_path: Path) -> None:
    """peft writes RandLoRA's matrices again under every layer; a copy that differs is a tensor without a place."""
    base = still_bert()
    ours = copy.deepcopy(base)
    lp.inject(ours, RandLoRA(r=8, alpha=8.0, targets=("query",)))
    hf.save(ours, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    shared, below = "base_model.randlora_A", "base_model.model.bert.encoder.layer.0.attention.self.query.randlora_A"
    save_file(tensors | {below: tensors[shared].clone()}, tmp_path / TENSORS)
    hf.load(copy.deepcopy(base), tmp_path)
    save_file(tensors | {below: tensors[shared] + 1}, tmp_path / TENSORS)
    with pytest.raises(ValueError, match=r"holds 1 adapter tensors .* that nothing here takes, .*query.randlora_A"):
        hf.load(base, tmp_path)


def test_another_base_is_noticed(theirs: Path) -> None:
    with pytest.raises(ValueError, match="no tensor of the file belongs to a module of this LlamaForCausalLM"):
        hf.load(llama(), theirs)
    rewrite(theirs, lambda t: [t.pop(k) for k in list(t) if ".layer.1." in k])
    with pytest.warns(UserWarning, match="config and tensors disagree on 2 modules.*layer.1.*Is it the base"):
        hf.load(still_bert(), theirs)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings", "ignore:Setting `save_embedding_layers`")
def test_embeddings_that_peft_saved_along_must_be_the_base_s(tmp_path: Path) -> None:
    base = llama()
    peft_folder(base, tmp_path, target_modules=["embed_tokens"])
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(tmp_path / TENSORS)
    hf.load(copy.deepcopy(base), tmp_path)
    with pytest.raises(
        ValueError, match="other values of the frozen 'model.embed_tokens.weight': put them into the base"
    ):
        hf.load(llama(), tmp_path)


def test_half_precision_files_train_in_float32(theirs: Path) -> None:
    rewrite(theirs, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    ours = hf.load(still_bert(), theirs)
    assert {p.dtype for _, _, a in lp.adapters(ours) for p in a.parameters()} == {torch.float32}


def test_only_the_method_that_adapts_is_exported(tmp_path: Path) -> None:
    ours = still_bert()
    lp.inject(ours, [LoRA(targets=("query",)), LoRA(name="second", targets=("key",))])
    with pytest.raises(ValueError, match=r"holds one method, this model \['lora', 'second'\]"):
        hf.save(ours, tmp_path / "folder")


def test_pre_classifier_goes_along_with_the_classifier(tmp_path: Path) -> None:
    base = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=1, n_heads=4, max_position_embeddings=32)
    )
    ours = copy.deepcopy(base)
    lp.inject(ours, LoRA(targets=("q_lin",)), train=("classifier",))
    randomize(ours)
    with pytest.warns(UserWarning, match=r"\['pre_classifier'\] are saved too"):
        hf.save(ours, tmp_path / "folder")
    theirs, x = in_peft(base, tmp_path / "folder").eval(), batch(base)
    assert theirs.peft_config["default"].task_type == "SEQ_CLS"
    torch.testing.assert_close(run(theirs, x), run(ours.eval(), x), atol=1e-5, rtol=1e-5)


def test_tied_weights_trained_in_full(tmp_path: Path) -> None:
    base = gpt2()
    ours = copy.deepcopy(base)
    lp.inject(ours, LoRA(targets=("c_attn",)), train=("wte",))
    randomize(ours)
    hf.save(ours, tmp_path / "ours")
    x = batch(base)
    for other in (in_peft(base, tmp_path / "ours"), hf.load(copy.deepcopy(base), tmp_path / "ours")):
        torch.testing.assert_close(run(other.eval(), x), run(ours.eval(), x), atol=1e-5, rtol=1e-5)
    peft_folder(base, tmp_path / "theirs", target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="'lm_head.weight' apart from 'transformer.wte.weight', which is tied"):
        hf.load(base, tmp_path / "theirs")  # peft unties the head by copying it


@dataclass(frozen=True, kw_only=True)
class Biases(lp.Method):
    """Trains biases, which peft has no format for."""

    traits = lp.Traits(family="selective")
    name: str = "biases"

    def inject(self, model: nn.Module, stats: Any = None) -> None:
        for _, p in lp.find(model, ("query.bias",), nn.Parameter):
            p.requires_grad_(True)


@dataclass(frozen=True, kw_only=True)
class Scaled(lp.Method):
    """Attaches an adapter that peft has no format for."""

    traits = lp.Traits(family="additive")
    name: str = "scaled"

    def inject(self, model: nn.Module, stats: Any = None) -> None:
        for _, layer in lp.find(model, ("key",)):
            lp.attach(layer, self.name, Gain())


class Gain(lp.Adapter):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, base: lp.Base, x: Tensor) -> Tensor:
        return base(x) * self.g


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ([Scaled()], r"no counterpart of \['scaled'\]"),
        ([LoRA(targets=("query",)), Scaled()], r"no counterpart of \['scaled'\]"),
        ([Biases()], "holds one method, this model none that peft knows"),
        ([LoRA(targets=("query",)), Biases()], "2 trained parameters cannot be expressed.*query.bias"),
    ],
)
def test_methods_that_peft_does_not_have(methods: list[lp.Method], says: str, tmp_path: Path) -> None:
    ours = still_bert()
    lp.inject(ours, methods)
    with pytest.raises(ValueError, match=says):
        hf.save(ours, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_our_own_folder_trains_again_exactly_what_it_names(tmp_path: Path) -> None:
    """Its list of trained parameters holds whole names, one of which may end another's."""
    ours = Cnn()
    base = copy.deepcopy(ours)
    lp.inject(ours, LoRA(targets=("conv",)), train=("[f]c.*",))
    randomize(ours)
    lp.save(ours, tmp_path / "own")
    back: Any = lp.load(base, tmp_path / "own")
    assert back.lightning_peft_record.train == ("fc.weight", "fc.bias")
    assert torch.equal(back.fc.weight, ours.fc.weight)


def test_a_head_that_the_file_lacks_is_missed(tmp_path: Path) -> None:
    base = still_bert()
    peft_folder(base, tmp_path, task_type="SEQ_CLS", target_modules=["query"])
    rewrite(tmp_path, lambda t: t.pop("base_model.model.classifier.bias"))
    with pytest.raises(
        ValueError, match="lacks 'classifier.bias', although its modules_to_save are .'classifier', 'sc"
    ):
        hf.load(base, tmp_path)


class Asked(ValueError):
    """Which plugin ``hf.load`` turned to."""


def test_a_field_of_the_config_chooses_among_the_plugins_of_a_type(theirs: Path, monkeypatch: Any) -> None:
    kinds = {"plain": "LORA", "with_field": "LORA:use_dora", "other": "IA3", "none": ""}

    def plugin(name: str) -> Any:
        def from_hf(config: Any, tensors: Any, model: Any) -> None:
            assert tensors["bert.encoder.layer.0.attention.self.key"].keys() == {"lora_A.weight", "lora_B.weight"}
            raise Asked(name)

        return type(name, (), {"from_hf": staticmethod(from_hf)})

    monkeypatch.setattr(registry, "names", lambda: list(kinds))
    monkeypatch.setattr(registry, "describe", lambda name: registry.Info(name, "", "", traits={"hf": kinds[name]}))
    monkeypatch.setattr(registry, "load", plugin)
    with pytest.raises(Asked, match="plain"):
        hf.load(still_bert(), theirs)
    edit(theirs, use_dora=True)
    with pytest.raises(Asked, match="with_field"):
        hf.load(still_bert(), theirs)
    kinds["twin"] = "LORA:use_dora"
    with pytest.raises(ValueError, match=r"\['with_field', 'twin'\] all read a peft_type 'LORA'"):
        hf.load(still_bert(), theirs)


NAMES = [n for n, _ in still_bert().named_modules() if n] + [
    "fc",
    "block.fc",
    "block.prefc",
    "layers.1.fc",
    "x.layer.0.y.2.q",
]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["query", "0.output.dense", "fc"]},
        {"target_modules": r".*\.layer\.\d+\.(output|intermediate)\.dense|fc"},
        {"target_modules": ["dense", "q"], "exclude_modules": ["pooler.dense", "q"]},
        {"target_modules": ["dense"], "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["query", "fc", "q"], "layers_to_transform": 1},
        {"target_modules": ["query", "fc", "q"], "layers_to_transform": [0, 2]},
        {"target_modules": ["query", "fc", "q"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["query", "fc", "q"], "layers_to_transform": [0, 2], "layers_pattern": ["y", "layer"]},
        {"target_modules": ["query", "fc", "dense"], "modules_to_save": ["pooler", "attention.output", "block"]},
    ],
)
def test_targets_are_read_as_peft_reads_them(fields: Any) -> None:
    config = peft.LoraConfig(**fields)
    want = [n for n in NAMES if check_target_module_exists(config, n)]
    assert [n for n in NAMES if hf.targeted(fields, n)] == want and want


@pytest.mark.parametrize("seed", range(20))
def test_patterns_are_written_and_read_as_peft_reads_them(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    values = {n: int(torch.randint(1, 4, (), generator=g)) for n in NAMES}
    patterns = hf.patterns(values, 2)
    assert {n: patterns.get(get_pattern_key(list(patterns), n), 2) for n in NAMES} == values
    assert {n: hf.lookup(patterns, n, 2) for n in NAMES} == values
    mine = hf.patterns(values, 2, ours=True)
    assert {n: next((v for p, v in mine.items() if lp.matches(n, p)), 2) for n in NAMES} == values
    loose = {
        "ense": 5,
        "fc": 6,
        "layer.0.*dense": 7,
        "0.output.dense": 8,
        "query|key": 9,
    }  # regexes for ends from a dot on
    assert {n: hf.lookup(loose, n, 2) for n in NAMES} == {
        n: loose.get(get_pattern_key(list(loose), n), 2) for n in NAMES
    }
