"""Roles, blocks, layer ranges, heads, attention and MLP facts, against lists written by hand for each architecture."""

import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers as hf
from lightning.pytorch import LightningModule
from torch import nn

from lightning_peft import arch, parts
from lightning_peft.adapter import Adapter, Base
from lightning_peft.attach import attach
from lightning_peft.find import find
from lightning_peft.parts import MLP, Attention

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TEXT: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
OPT: dict[str, Any] = {"ffn_dim": 48, "word_embed_proj_dim": 16, **{k: SIZES[k] for k in list(SIZES)[:3]}}
WHISPER: dict[str, Any] = {
    **{f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in (("layers", 2), ("attention_heads", 4))},
    **{"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 4, "max_source_positions": 6},
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    configs: dict[str, Any] = {
        "Bert": lambda: hf.BertConfig(**TEXT, **SIZES),
        "Roberta": lambda: hf.RobertaConfig(**TEXT, **SIZES),
        "GPT2": lambda: hf.GPT2Config(**TEXT, n_embd=32, n_layer=2, n_head=4, n_inner=48, add_cross_attention=True),
        "Llama": lambda: hf.LlamaConfig(**TEXT, **SIZES, num_key_value_heads=2),
        "T5": lambda: hf.T5Config(**TEXT, **T5, feed_forward_proj="gated-gelu"),
        "ViT": lambda: hf.ViTConfig(**SIZES, image_size=8, patch_size=4),
        "Whisper": lambda: hf.WhisperConfig(**TEXT, **WHISPER),
        "Mamba": lambda: hf.MambaConfig(**TEXT, hidden_size=32, num_hidden_layers=2, state_size=4),
        "OPT": lambda: hf.OPTConfig(**TEXT, **OPT),
        "Swin": lambda: hf.SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[1, 2]),
    }
    return getattr(hf, name)(next(make for family, make in configs.items() if name.startswith(family))())


def under(prefix: str, layers: str, blocks: int = 2) -> set[str]:
    return {f"{prefix}.{i}.{layer}" for i in range(blocks) for layer in layers.split()}


BERT_ATTENTION = "attention.self.query attention.self.key attention.self.value attention.output.dense"
PROJ = "{0}.q_proj {0}.k_proj {0}.v_proj {0}.out_proj"
SELF, CROSS, SWIGLU = PROJ.format("self_attn"), PROJ.format("encoder_attn"), "mlp.gate_proj mlp.up_proj mlp.down_proj"
GPT2_ATTENTION = "attn.c_attn attn.c_proj crossattention.c_attn crossattention.q_attn crossattention.c_proj"
T5_SELF, T5_CROSS = ("{0}.q {0}.k {0}.v {0}.o".format(f"layer.{n}") for n in ("0.SelfAttention", "1.EncDecAttention"))
T5_MLP = "layer.{0}.DenseReluDense.wi_0 layer.{0}.DenseReluDense.wi_1 layer.{0}.DenseReluDense.wo"

# model -> attention, mlp, mixer, the rest of all-linear, stacks, heads
FACTS: dict[str, tuple[set[str], set[str], set[str], set[str], list[str], list[str]]] = {
    "BertForSequenceClassification": (
        under("bert.encoder.layer", BERT_ATTENTION),
        under("bert.encoder.layer", "intermediate.dense output.dense"),
        set(),
        {"bert.pooler.dense"},
        ["bert.encoder.layer"],
        ["classifier"],
    ),
    "RobertaForSequenceClassification": (
        under("roberta.encoder.layer", BERT_ATTENTION),
        under("roberta.encoder.layer", "intermediate.dense output.dense"),
        set(),
        set(),
        ["roberta.encoder.layer"],
        ["classifier"],  # the whole module: dense and out_proj are both new
    ),
    "GPT2LMHeadModel": (
        under("transformer.h", GPT2_ATTENTION),
        under("transformer.h", "mlp.c_fc mlp.c_proj"),
        set(),
        set(),
        ["transformer.h"],
        [],
    ),
    "LlamaForCausalLM": (
        under("model.layers", SELF.replace("out_proj", "o_proj")),
        under("model.layers", SWIGLU),
        set(),
        set(),
        ["model.layers"],
        [],
    ),
    "T5ForConditionalGeneration": (
        under("encoder.block", T5_SELF) | under("decoder.block", f"{T5_SELF} {T5_CROSS}"),
        under("encoder.block", T5_MLP.format(1)) | under("decoder.block", T5_MLP.format(2)),
        set(),
        set(),
        ["encoder.block", "decoder.block"],
        [],
    ),
    "ViTForImageClassification": (
        under("vit.layers", PROJ.format("attention").replace("out_proj", "o_proj")),
        under("vit.layers", "mlp.fc1 mlp.fc2"),
        set(),
        set(),
        ["vit.layers"],
        ["classifier"],
    ),
    "WhisperForConditionalGeneration": (
        under("model.encoder.layers", SELF) | under("model.decoder.layers", f"{SELF} {CROSS}"),
        under("model.encoder.layers", "fc1 fc2") | under("model.decoder.layers", "fc1 fc2"),
        set(),
        set(),
        ["model.encoder.layers", "model.decoder.layers"],
        [],
    ),
    "MambaForCausalLM": (
        set(),
        set(),
        under("backbone.layers", "mixer.in_proj mixer.x_proj mixer.dt_proj mixer.out_proj"),
        set(),
        ["backbone.layers"],
        [],
    ),
    "OPTForCausalLM": (
        under("model.decoder.layers", SELF),
        under("model.decoder.layers", "fc1 fc2"),
        set(),
        {"model.decoder.project_in", "model.decoder.project_out"},
        ["model.decoder.layers"],
        [],
    ),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts_of_transformers_models(name: str) -> None:
    model = build(name)
    attention, mlp, mixer, rest, stacks, heads = FACTS[name]
    order = [n for n, _ in model.named_modules()]
    for role, expected in (("attention", attention), ("mlp", mlp), ("mixer", mixer)):
        assert arch.role(model, role) == sorted(expected, key=order.index), role
    assert arch.role(model, "all-linear") == sorted(attention | mlp | mixer | rest, key=order.index)
    held = {"attention": attention, "mlp": mlp, "mixer": mixer}
    assert arch.present_roles(model) == ["all-linear", *(role for role, names in held.items() if names)]
    assert arch.blocks(model) == {f"{stack}.{i}": i for stack in stacks for i in range(2)}
    assert arch.heads(model) == heads


@pytest.mark.parametrize("name", [n for n in FACTS if FACTS[n][0]])
def test_facts_hold_inside_a_wrapper_and_with_adapters(name: str) -> None:
    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = build(name)  # named like a head, but the body is inside
            self.other = build("ViTForImageClassification")
            self.score = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 2))

    module, attention, heads = Module(), FACTS[name][0], FACTS[name][5]
    for block in arch.blocks(module.classifier):
        attach(module.classifier.get_submodule(block), "around", Passing())
    vit_attention, vit_mlp = FACTS["ViTForImageClassification"][:2]
    wrapped = {f"classifier.{n}" for n in attention} | {f"other.{n}" for n in vit_attention}
    assert set(arch.role(module, "attention")) == wrapped
    assert {f"other.{n}" for n in vit_mlp} < set(arch.role(module, "mlp"))
    assert not {"score.0", "score.2", "other.classifier"} & set(arch.role(module, "all-linear"))
    assert arch.heads(module) == [*(f"classifier.{h}" for h in heads), "other.classifier", "score"]
    stacks = {n.rpartition(".")[0] for n in arch.blocks(module)}
    assert stacks == {f"classifier.{s}" for s in FACTS[name][4]} | {"other.vit.layers"}


class Passing(Adapter):
    """Holds a linear layer, which no fact may see."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs)


def test_find_says_which_roles_a_mamba_has() -> None:
    with pytest.raises(ValueError, match="no Linear matches 'attention'.*roles here: all-linear, mixer"):
        find(build("MambaForCausalLM"), ("attention",))
    with pytest.raises(ValueError, match="unknown role 'heads'; known: all-linear, attention, mlp, mixer"):
        arch.role(nn.Linear(2, 2), "heads")


def test_torch_transformer_encoder() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = nn.ModuleDict({"attention_net": nn.TransformerEncoder(layer, 3), "fc_out": nn.Linear(16, 2)})
    assert arch.role(model, "attention") == [f"attention_net.layers.{i}.self_attn.out_proj" for i in range(3)]
    mlp = [f"attention_net.layers.{i}.linear{n}" for i in range(3) for n in (1, 2)]
    assert arch.role(model, "mlp") == mlp
    assert set(arch.role(model, "all-linear")) == {*mlp, *arch.role(model, "attention"), "fc_out"}
    assert arch.blocks(model) == {f"attention_net.layers.{i}": i for i in range(3)}
    assert arch.heads(model) == ["fc_out"]
    assert parts.attentions(model) == []
    expected = {"rows": ("attention_net.layers.1.linear1",), "down": "attention_net.layers.1.linear2", "channels": 24}
    assert parts.mlps(model)[1] == MLP(name="attention_net.layers.1", **expected)


def test_plain_mlp_has_only_linear_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert arch.role(model, "all-linear") == ["0", "2", "4"]
    assert arch.present_roles(model) == ["all-linear"]
    assert (arch.blocks(model), arch.heads(model), parts.mlps(model)) == ({}, [], [])
    assert arch.present_roles(nn.Conv2d(1, 1, 1)) == []


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 2)
        self.experts = nn.ModuleList(Expert() for _ in range(2))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12)


class Block(nn.Module):
    """Attention that only its class, or only its projections' names, give away."""

    def __init__(self, by_class: bool) -> None:
        super().__init__()
        self.sa = CausalAttention() if by_class else Mix()
        self.ff = Experts()


class CausalAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)


class ManyHeads(nn.Module):
    """A list of single heads, which is no stack of blocks although each holds attention."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(Mix() for _ in range(2))


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(8, 8) for _ in range(4))
        self.n_head = 2


def test_own_blocks_with_experts() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(True), Block(False)]), "heads": nn.ModuleList([Experts()])})
    assert arch.blocks(model) == {"blocks.0": 0, "blocks.1": 1}  # neither experts nor a list of heads
    sa = ["0.sa.qkv", "0.sa.proj", "1.sa.query", "1.sa.key", "1.sa.value", "1.sa.dense"]
    assert arch.role(model, "attention") == [f"blocks.{n}" for n in sa]
    assert len(arch.role(model, "mlp")) == 2 * (1 + 2 * 3)
    assert arch.heads(model) == ["heads"]
    names = {"q": "blocks.1.sa.query", "k": "blocks.1.sa.key", "v": "blocks.1.sa.value", "o": "blocks.1.sa.dense"}
    expected = Attention(name="blocks.1.sa", **names, heads=2, kv_heads=2, head_dim=4)
    assert parts.attentions(model) == [expected]
    experts = [f"blocks.{b}.ff.experts.{e}" for b in range(2) for e in range(2)]
    assert parts.mlps(model) == [MLP(name=e, rows=(f"{e}.w1", f"{e}.w3"), down=f"{e}.w2", channels=12) for e in experts]


def test_a_list_of_heads_inside_a_block_is_no_stack() -> None:
    blocks = nn.ModuleList(nn.ModuleDict({"sa": ManyHeads(), "ff": Expert()}) for _ in range(2))
    model = nn.ModuleDict({"blocks": blocks})
    assert arch.blocks(model) == {"blocks.0": 0, "blocks.1": 1}
    assert len(arch.role(model, "attention")) == 2 * 2 * 4


def test_a_sequential_of_like_parts_is_a_stack_and_of_unlike_parts_is_not() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))

    pipeline = nn.Sequential(Layers(), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    assert arch.blocks(pipeline) == {f"0.stages.{i}": i for i in range(3)}
    vit = nn.ModuleDict(
        {"layers": nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8), nn.TransformerEncoderLayer(8, 2, 8))}
    )
    attach(vit.get_submodule("layers.1"), "around", Passing())  # changes the class of one of them
    assert arch.blocks(vit) == {"layers.0": 0, "layers.1": 1}


def test_attention_and_mlp_in_separate_lists() -> None:
    model = hf.XLMForSequenceClassification(hf.XLMConfig(vocab_size=40, emb_dim=8, n_layers=2, n_heads=2))
    attention = under("transformer.attentions", "q_lin k_lin v_lin out_lin")
    assert set(arch.role(model, "attention")) == attention
    assert set(arch.role(model, "mlp")) == under("transformer.ffns", "lin1 lin2")


def test_layers_of_a_hybrid_stack_differ_in_class() -> None:
    sizes = {**SIZES, "num_key_value_heads": 2, "mamba_dt_rank": 2, "mamba_d_state": 4}
    config = hf.JambaConfig(**TEXT, **sizes, attn_layer_period=2, attn_layer_offset=1, num_experts=1)
    model = hf.JambaForCausalLM(config)
    assert arch.blocks(model) == {"model.layers.0": 0, "model.layers.1": 1}
    assert {n.split(".")[2] for n in arch.role(model, "mixer")} == {"0"}
    assert {n.split(".")[2] for n in arch.role(model, "attention")} == {"1"}
    assert {n.split(".")[2] for n in arch.role(model, "mlp")} == {"0", "1"}


def test_stages_of_blocks_count_each_on_their_own() -> None:
    model = build("SwinForImageClassification")
    stages = "swin.encoder.layers"
    expected = {f"{stages}.0.blocks.0": 0, f"{stages}.1.blocks.0": 0, f"{stages}.1.blocks.1": 1}
    assert arch.blocks(model) == expected
    assert "swin.encoder.layers.0.downsample.reduction" not in arch.role(model, "mlp")


def chosen(model: nn.Module, spec: str) -> list[str]:
    return arch.select_layers(model, arch.role(model, "all-linear"), spec)


def test_select_layers() -> None:
    torch.manual_seed(0)
    body = nn.ModuleDict(
        {
            "encoder": nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(6)),
            "decoder": nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3)),
            "last": nn.Linear(2, 2),
        }
    )

    def at(encoder: list[int], decoder: list[int]) -> list[str]:
        return [f"encoder.{i}.0" for i in encoder] + [f"decoder.{i}.0" for i in decoder]

    assert chosen(body, "0:2") == at([0, 1], [0, 1])
    assert chosen(body, "-4:") == at([2, 3, 4, 5], [0, 1, 2])
    assert chosen(body, "-1") == at([5], [2])
    assert chosen(body, "0, 2 ,5") == at([0, 2, 5], [0, 2])  # 5 exists in one stack, which is enough
    assert chosen(body, "::2") == at([0, 2, 4], [0, 2])
    assert chosen(body, "4:,0") == at([0, 4, 5], [0])
    assert arch.select_layers(body, ["encoder.1", "encoder.1.0.weight", "encoder.10", "last"], "1") == [
        "encoder.1",
        "encoder.1.0.weight",
    ]
    for spec in ("6", "-7", "6:", "3:3", "0,9"):
        with pytest.raises(ValueError, match="there are 6 in 'encoder', 3 in 'decoder'"):
            chosen(body, spec)
    for spec in ("0-6", "", "a", "1,,2", "::0", "1:2:3:4", "1.5", "all"):
        with pytest.raises(ValueError, match="cannot read layers .*'0:6', '-4:', '0,2,11', '::2'"):
            chosen(body, spec)
    with pytest.raises(ValueError, match="this Linear has no stack of blocks"):
        arch.select_layers(nn.Linear(2, 2), ["weight"], "0")


def test_select_layers_counts_encoder_and_decoder_of_t5_alike() -> None:
    model = build("T5ForConditionalGeneration")
    assert {n.split(".layer.")[0] for n in chosen(model, "-1")} == {"encoder.block.1", "decoder.block.1"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BertForQuestionAnswering", ["qa_outputs"]),
        ("BertForMaskedLM", []),
        ("BertForPreTraining", []),
        ("BertForTokenClassification", ["classifier"]),
        ("BertModel", []),
        ("LlamaForSequenceClassification", ["score"]),
        ("T5ForQuestionAnswering", ["qa_outputs"]),  # its base model is itself
        ("T5ForSequenceClassification", ["classification_head"]),
        ("GPT2DoubleHeadsModel", ["multiple_choice_head"]),
    ],
)
def test_heads_that_a_fine_tune_makes_new(name: str, expected: list[str]) -> None:
    model = build(name)
    assert arch.heads(model) == expected
    heads_only = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[0] in expected}
    assert not heads_only & set(arch.role(model, "all-linear"))


def test_heads_by_name_outside_the_body() -> None:
    class Net(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1)
            self.neck = nn.ModuleDict({"cls_head": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
            self.classifier = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
            self.output = nn.Identity()  # nothing in it to train
            self.overhead = nn.Linear(8, 8)

    assert arch.heads(Net()) == ["neck.cls_head", "classifier"]


def test_attention_facts() -> None:
    def first(name: str, *ends: str) -> list[Attention]:
        return [a for a in parts.attentions(build(name)) if a.name.endswith(ends)]

    p = "bert.encoder.layer.0.attention"
    qkv = {"q": f"{p}.self.query", "k": f"{p}.self.key", "v": f"{p}.self.value"}
    expected = Attention(name=f"{p}.self", **qkv, o=f"{p}.output.dense", heads=4, kv_heads=4, head_dim=8)
    assert first("BertForMaskedLM", "0.attention.self") == [expected] and expected.units == 4

    p = "model.layers.1.self_attn"
    qkv = {"q": f"{p}.q_proj", "k": f"{p}.k_proj", "v": f"{p}.v_proj", "o": f"{p}.o_proj"}
    expected = Attention(name=p, **qkv, heads=4, kv_heads=2, head_dim=8)
    assert first("LlamaForCausalLM", "1.self_attn") == [expected]
    assert (expected.units, expected.width) == (2, 16)

    p = "transformer.h.0"
    fused = {x: f"{p}.attn.c_attn" for x in "qkv"} | {"o": f"{p}.attn.c_proj"}
    cross = {"q": f"{p}.crossattention.q_attn"} | {x: f"{p}.crossattention.c_attn" for x in "kv"}
    assert first("GPT2LMHeadModel", "0.attn", "0.crossattention") == [
        Attention(name=f"{p}.attn", **fused, heads=4, kv_heads=4, head_dim=8),
        Attention(name=f"{p}.crossattention", **cross, o=f"{p}.crossattention.c_proj", heads=4, kv_heads=4, head_dim=8),
    ]

    p = "decoder.block.1.layer.1.EncDecAttention"
    qkv = {x: f"{p}.{x}" for x in "qkvo"}
    assert first("T5ForConditionalGeneration", p) == [Attention(name=p, **qkv, heads=4, kv_heads=4, head_dim=8)]
    counts = {"T5ForConditionalGeneration": 6, "WhisperForConditionalGeneration": 6, "ViTForImageClassification": 2}
    for name in (*counts, "OPTForCausalLM", "RobertaForMaskedLM"):
        found = parts.attentions(build(name))
        assert {(a.heads, a.kv_heads, a.head_dim) for a in found} == {(4, 4, 8)} and len(found) == counts.get(name, 2)
    assert parts.attentions(build("MambaForCausalLM")) == []


def test_mlp_facts() -> None:
    def last(name: str) -> MLP:
        return parts.mlps(build(name))[-1]

    p = "decoder.block.1.layer.2.DenseReluDense"
    assert last("T5ForConditionalGeneration") == MLP(
        name=p, rows=(f"{p}.wi_0", f"{p}.wi_1"), down=f"{p}.wo", channels=48
    )
    p = "model.layers.1.mlp"
    assert last("LlamaForCausalLM") == MLP(
        name=p, rows=(f"{p}.gate_proj", f"{p}.up_proj"), down=f"{p}.down_proj", channels=48
    )
    p = "transformer.h.1.mlp"
    assert last("GPT2LMHeadModel") == MLP(name=p, rows=(f"{p}.c_fc",), down=f"{p}.c_proj", channels=48)
    p = "bert.encoder.layer.1"
    bert = MLP(name=p, rows=(f"{p}.intermediate.dense",), down=f"{p}.output.dense", channels=48)
    assert last("BertForMaskedLM") == bert
    p = "model.decoder.layers.1"
    assert last("OPTForCausalLM") == MLP(name=p, rows=(f"{p}.fc1",), down=f"{p}.fc2", channels=48)
    assert last("WhisperForConditionalGeneration").name == "model.decoder.layers.1"
    assert last("ViTForImageClassification").name == "vit.layers.1.mlp"
    assert parts.mlps(build("MambaForCausalLM")) == []


def test_square_layers_are_told_apart_by_name_or_order_or_not_at_all() -> None:
    def mlps(layers: dict[str, nn.Module]) -> list[tuple[tuple[str, ...], str]]:
        model = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict(layers)})])
        holder = nn.ModuleDict({"blocks": model})
        return [(m.rows, m.down) for m in parts.mlps(holder)]

    def square() -> nn.Linear:
        return nn.Linear(8, 8)

    p = "blocks.0.mlp"
    assert mlps({"a": square(), "b": square()}) == [((f"{p}.a",), f"{p}.b")]
    named = mlps({"w1": square(), "w2": square(), "w3": square()})
    assert named == [((f"{p}.w1", f"{p}.w3"), f"{p}.w2")]
    assert mlps({"a": square(), "b": square(), "c": square()}) == []
    assert mlps({"gate_up_proj": nn.Linear(8, 24), "down_proj": nn.Linear(12, 8)}) == []  # two channels in one


def test_phi3_fused_projections_are_in_roles_but_not_in_parts() -> None:
    model = hf.Phi3ForCausalLM(hf.Phi3Config(**TEXT, **SIZES))
    assert arch.role(model, "attention") == [
        f"model.layers.{i}.self_attn.{n}" for i in range(2) for n in ("o_proj", "qkv_proj")
    ]
    assert (parts.attentions(model), parts.mlps(model)) == ([], [])


def test_transformers_is_not_imported() -> None:
    code = """
import sys
from torch import nn
from lightning_peft import arch, parts, surgery
model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 1)
assert arch.present_roles(model) == ["all-linear", "attention", "mlp"] and arch.heads(model) == []
assert len(parts.mlps(model)) == 1 and surgery.record(model) == {}
assert "transformers" not in sys.modules and "lightning" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
