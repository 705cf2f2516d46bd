"""Cut models against masked ones in float64, adapters, optimizer moments, records and cached generation included."""

import copy
import json
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.optim import AdamW

from lightning_peft import arch, hosts, parts, quant, surgery
from lightning_peft.adapter import Adapter, Base, WeightAdapter
from lightning_peft.attach import adapters, attach

VOCAB, WIDTH, HEADS, FFN = 40, 32, 4, 48
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
}
TEXT: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DEC: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": HEADS,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": FFN,
    "decoder_start_token_id": 0,
}
SPEECH: dict[str, Any] = {
    f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in (("layers", 2), ("attention_heads", HEADS))
}


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**TEXT, **SIZES, max_position_embeddings=16))


def roberta() -> nn.Module:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT, **SIZES, max_position_embeddings=24))


def opt() -> nn.Module:
    sizes = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
    return hf.OPTForCausalLM(
        hf.OPTConfig(**TEXT, **sizes, ffn_dim=FFN, word_embed_proj_dim=WIDTH, max_position_embeddings=32)
    )


def gpt2(**more: Any) -> nn.Module:
    config = hf.GPT2Config(**TEXT, n_embd=WIDTH, n_layer=2, n_head=HEADS, n_inner=FFN, n_positions=32, **more)
    return hf.GPT2LMHeadModel(config)


def llama(**more: Any) -> nn.Module:
    kv: dict[str, Any] = {"num_key_value_heads": 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, **SIZES, **{**kv, **more}, max_position_embeddings=32))


def t5(act: str = "relu") -> nn.Module:
    return hf.T5ForConditionalGeneration(hf.T5Config(**TEXT, **DEC, feed_forward_proj=act))


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**SIZES, image_size=8, patch_size=4))


def whisper() -> nn.Module:
    ffn: dict[str, Any] = {"encoder_ffn_dim": FFN, "decoder_ffn_dim": FFN}
    length: dict[str, Any] = {"max_source_positions": 6, "max_target_positions": 16}
    config = hf.WhisperConfig(
        **TEXT, **SPEECH, **ffn, **length, d_model=WIDTH, num_mel_bins=4, decoder_start_token_id=1
    )
    return hf.WhisperForConditionalGeneration(config)


def made(build: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """A model in float64 with every parameter drawn, the biases that start at zero included."""
    torch.manual_seed(0)
    model = build(*args, **kwargs).double().eval()
    for p in model.parameters():
        p.data = p.data + 0.2 * torch.randn_like(p.data)
    return model


def inputs(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, 7), generator=generator)
    if isinstance(model, hf.ViTForImageClassification):
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator).double()}
    if isinstance(model, hf.WhisperForConditionalGeneration):
        mel = torch.randn(2, 4, 12, generator=generator).double()
        return {"input_features": mel, "decoder_input_ids": ids[:, :5]}
    mask = torch.ones_like(ids).index_put((torch.tensor(1), torch.tensor(6)), torch.tensor(0))
    out = {"input_ids": ids, "attention_mask": mask}
    return out | {"decoder_input_ids": ids[:, :4]} if isinstance(model, hf.T5ForConditionalGeneration) else out


@torch.no_grad()
def logits(model: nn.Module, **more: Tensor) -> Tensor:
    return model(**inputs(model), **more).logits


class LoRALinear(WeightAdapter):
    axes = {"A": ("rank", "in"), "B": ("out", "rank")}

    def __init__(self, out: int, fan_in: int, r: int = 3) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(r, fan_in)), nn.Parameter(torch.randn(out, r))

    def weight(self, W: Tensor) -> Tensor:
        return W + 0.1 * self.B @ self.A


def adapt(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for name in arch.role(model, "all-linear"):
        host = model.get_submodule(name)
        attach(host, "lora", LoRALinear(*hosts.shape(host)), torch.float64)
    return model


def choice(model: nn.Module, drop_heads: bool = True) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Different units in every block, never a prefix or a suffix only."""
    units = [[0, 2, 3], [1], [1, 2], [0, 3]]
    heads, channels = {}, {}
    for i, a in enumerate(parts.attentions(model) if drop_heads else []):
        heads[a.name] = [u for u in units[i % 4] if u < a.units] if a.units > 2 else [(i + 1) % 2]
    for i, m in enumerate(parts.mlps(model)):
        channels[m.name] = [c for c in range(m.channels) if c % 3 != i % 3 and c != 5]
    return heads, channels


def masked(model: nn.Module, heads: dict[str, list[int]], channels: dict[str, list[int]]) -> nn.Module:
    """A copy that computes everything, with the weights of pruned units zeroed in the output projections."""
    model = copy.deepcopy(model)
    last = [(a.o, a.units, heads[a.name]) for a in parts.attentions(model) if a.name in heads]
    last += [(m.down, m.channels, channels[m.name]) for m in parts.mlps(model)]
    for name, units, keep in last:
        layer: Any = model.get_submodule(name)
        conv1d = hasattr(layer, "nf")
        fan_in = layer.nx if conv1d else layer.in_features
        mask = torch.tensor([float(u in keep) for u in range(units)]).repeat_interleave(fan_in // units).double()
        layer.weight.data *= mask[:, None] if conv1d else mask
        for _, _, adapter in adapters(layer):
            adapter.A.data *= mask  # type: ignore[operator]
    return model


FAMILIES = {"bert": bert, "roberta": roberta, "opt": opt, "gpt2": gpt2, "llama": llama, "vit": vit, "whisper": whisper}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_model_computes_what_the_masked_one_does(family: str, adapted: bool) -> None:
    model = made(FAMILIES[family])
    if adapted:
        adapt(model)
    heads, channels = choice(model)
    attentions = 6 if family == "whisper" else 2
    assert (len(heads), len(channels)) == (attentions, 4 if family == "whisper" else 2)
    full, reference = logits(model), logits(masked(model, heads, channels))
    record = surgery.cut(model, heads, channels)
    assert (logits(model) - reference).abs().max() < 1e-10
    assert (reference - full).abs().max() > 1e-2  # what was cut mattered
    assert record == {"heads": heads, "channels": channels}


@pytest.mark.parametrize("act", ["relu", "gated-gelu"])
def test_cut_t5_channels(act: str) -> None:
    model = adapt(made(t5, act))
    _, channels = choice(model, drop_heads=False)
    assert len(channels) == 4
    reference = logits(masked(model, {}, channels))
    surgery.cut(model, channels=channels)
    assert (logits(model) - reference).abs().max() < 1e-10


def test_cut_gpt2_cross_attention_where_keys_and_values_are_fused() -> None:
    model = adapt(made(gpt2, add_cross_attention=True))
    context = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    heads, channels = choice(model)
    assert [n for n in heads if "cross" in n] == ["transformer.h.0.crossattention", "transformer.h.1.crossattention"]
    reference = logits(masked(model, heads, channels), encoder_hidden_states=context)
    surgery.cut(model, heads, channels)
    assert (logits(model, encoder_hidden_states=context) - reference).abs().max() < 1e-10


def test_cut_llama_with_one_key_value_head_for_each_query_head() -> None:
    model = adapt(made(llama, num_key_value_heads=4, head_dim=6, attention_bias=True, mlp_bias=True))
    heads, channels = choice(model)
    reference = logits(masked(model, heads, channels))
    surgery.cut(model, heads, channels)
    assert (logits(model) - reference).abs().max() < 1e-10


def test_cut_torch_encoder_channels() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    channels = {"layers.0": [0, 3, 9], "layers.1": list(range(1, 24, 2))}
    with torch.no_grad():
        reference = masked(model, {}, channels)(x)
        surgery.cut(model, channels=channels)
        assert (model(x) - reference).abs().max() < 1e-10
    assert surgery.record(model) == {"heads": {}, "channels": channels}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parameters_removed_from_bert() -> None:
    model = made(bert)
    before = count(model)
    heads = {"bert.encoder.layer.0.attention.self": [0, 3], "bert.encoder.layer.1.attention.self": [2]}
    channels = {"bert.encoder.layer.0": list(range(10)), "bert.encoder.layer.1": [0]}
    surgery.cut(model, heads, channels)
    dh, p, q = 8, 2 + 3, 38 + 47  # the formula of the method's card
    assert before - count(model) == 4 * WIDTH * dh * p + 3 * dh * p + 2 * WIDTH * q + q
    held: Any = model.get_submodule("bert.encoder.layer.1.attention.self")
    assert (held.num_attention_heads, held.all_head_size, held.attention_head_size) == (1, 8, 8)
    assert (held.query.out_features, held.query.weight.shape) == (8, (8, WIDTH))
    output: Any = model.get_submodule("bert.encoder.layer.1.output.dense")
    assert (output.in_features, output.out_features) == (1, WIDTH)


def test_parameters_removed_from_llama_and_its_adapters() -> None:
    model = adapt(made(llama))
    before = count(model)
    held: Any = model.get_submodule("model.layers.1.self_attn")
    held.num_heads, held.num_key_value_heads = 4, 2  # as other models of the family count them
    surgery.cut(model, {"model.layers.1.self_attn": torch.tensor([1])}, {"model.layers.0.mlp": range(8)})
    base = WIDTH * 8 * (2 + 1 + 1 + 2) + 3 * WIDTH * 40  # q, k, v, o of one group; gate, up, down of 40 channels
    lora = 3 * (16 + 8 + 8 + 16) + 3 * 3 * 40
    assert before - count(model) == base + lora
    assert (held.num_heads, held.num_key_value_heads, held.num_key_value_groups) == (2, 1, 2)
    assert [held.get_submodule(f"{x}_proj").out_features for x in "qkv"] == [16, 8, 8]
    assert model.get_submodule("model.layers.0.mlp").intermediate_size == 8


def test_counters_of_gpt2_and_opt() -> None:
    model = made(gpt2)
    surgery.cut(model, {"transformer.h.0.attn": [1, 3]}, {"transformer.h.1.mlp": [4, 5, 6]})
    attn: Any = model.get_submodule("transformer.h.0.attn")
    assert (attn.num_heads, attn.split_size, attn.embed_dim, attn.head_dim) == (2, 16, 16, 8)
    assert (attn.c_attn.nf, attn.c_attn.nx, attn.c_proj.nf, attn.c_proj.nx) == (48, WIDTH, WIDTH, 16)
    mlp: Any = model.get_submodule("transformer.h.1.mlp")
    assert (mlp.c_fc.nf, mlp.c_proj.nx, tuple(mlp.c_proj.weight.shape)) == (3, 3, (3, WIDTH))
    model = made(opt)
    surgery.cut(model, {"model.decoder.layers.0.self_attn": [1, 2, 3]})
    attn = model.get_submodule("model.decoder.layers.0.self_attn")
    assert (attn.num_heads, attn.embed_dim) == (3, 24)


def trainer(model: nn.Module) -> AdamW:
    for name in ("layer.0.attention.self.query", "layer.0.output.dense", "layer.0.intermediate.dense"):
        for p in model.get_submodule(f"bert.encoder.{name}").parameters():
            p.requires_grad_(True)
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)


def step(model: nn.Module, optimizer: AdamW, label: int) -> None:
    optimizer.zero_grad()
    model(**inputs(model), labels=torch.full((2,), label)).loss.backward()
    optimizer.step()


def sliced(name: str, t: Tensor) -> Tensor:
    """By hand: the cut of ``test_moments_follow`` on one tensor of the full model."""
    if "layer.0." not in name:
        return t
    rows = [i for head in (0, 2, 3) for i in range(8 * head, 8 * head + 8)]
    channels = [1, 2, 3, 10, 40]
    if "attention.self" in name:
        return t if name.endswith("lora.A") else t[rows]
    if "intermediate" in name:
        return t if name.endswith("lora.A") else t[channels]
    if "bias" in name or "LayerNorm" in name or name.endswith("lora.B"):
        return t
    return t[:, rows] if "attention.output" in name else t[:, channels]


def test_moments_follow() -> None:
    heads, channels = {"bert.encoder.layer.0.attention.self": [0, 2, 3]}, {"bert.encoder.layer.0": [1, 2, 3, 10, 40]}
    model = adapt(made(bert))
    optimizer = trainer(model)
    for label in (0, 1, 1):
        step(model, optimizer, label)
    full = {n: (p.detach().clone(), copy.deepcopy(optimizer.state.get(p))) for n, p in model.named_parameters()}
    groups = [id(p) for p in optimizer.param_groups[0]["params"]]

    small = adapt(made(bert))
    surgery.cut(small, heads, channels)
    other = trainer(small)
    for name, p in small.named_parameters():
        value, state = full[name]
        p.data = sliced(name, value).clone()
        if state:
            moments = {k: sliced(name, state[k]).clone() for k in ("exp_avg", "exp_avg_sq")}
            other.state[p] = {"step": state["step"].clone(), **moments}
    surgery.cut(model, heads, channels, [optimizer])
    step(model, optimizer, 0)
    step(small, other, 0)

    assert [id(p) for p in optimizer.param_groups[0]["params"]] == groups
    moved = 0
    for (name, p), q in zip(model.named_parameters(), small.parameters(), strict=True):
        assert torch.equal(p, q), name
        moved += p.requires_grad and not torch.equal(p, sliced(name, full[name][0]))
    assert moved == sum(p.requires_grad for p in model.parameters())


def test_pending_gradients_are_cut_along() -> None:
    model = adapt(made(bert))
    trainer(model)
    model(**inputs(model), labels=torch.tensor([0, 1])).loss.backward()
    full = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    heads, channels = {"bert.encoder.layer.0.attention.self": [0, 2, 3]}, {"bert.encoder.layer.0": [1, 2, 3, 10, 40]}
    surgery.cut(model, heads, channels)
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name not in full)
        assert p.grad is None or torch.equal(p.grad, sliced(name, full[name])), name


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_record_rebuilds_the_cut_model(family: str) -> None:
    model = adapt(made(FAMILIES[family]))
    record = surgery.cut(model, *choice(model))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model)) and surgery.record(twin) == record

    fresh = adapt(FAMILIES[family]().double().eval())
    surgery.apply(fresh, json.loads(json.dumps(record)))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model)) and surgery.record(fresh) == record

    untouched = adapt(made(FAMILIES[family]))  # the same base and adapters as the model had
    surgery.apply(untouched, record)
    assert torch.equal(logits(untouched), logits(model))


def test_successive_cuts_are_recorded_in_positions_of_the_original() -> None:
    name, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    model = made(llama, num_key_value_heads=4)
    surgery.cut(model, {name: [0, 2, 3]}, {mlp: range(1, 48, 2)})
    record = surgery.cut(model, {name: [1, 2]}, {mlp: [0, 5, 23]})
    assert record == {"heads": {name: [2, 3]}, "channels": {mlp: [1, 11, 47]}}
    at_once = made(llama, num_key_value_heads=4)
    surgery.apply(at_once, record)
    assert torch.equal(logits(at_once), logits(model))

    surgery.apply(model, record)  # agrees already
    assert surgery.record(model) == record
    surgery.apply(model, {"heads": {name: [3]}})  # further down, in positions of the original
    assert surgery.record(model)["heads"] == {name: [3]}
    surgery.apply(at_once, surgery.record(model))
    assert torch.equal(logits(at_once), logits(model))
    with pytest.raises(ValueError, match=r"cut before and lacks \[2\]"):
        surgery.apply(model, {"heads": {name: [2, 3]}})


def test_uncut_model_has_an_empty_record() -> None:
    model = made(bert)
    assert surgery.record(model) == {}
    before = logits(model)
    surgery.apply(model, {"heads": {}, "channels": {}})
    assert torch.equal(logits(model), before) and surgery.record(model) == {}


def test_apply_on_the_meta_device() -> None:
    model = adapt(made(llama))
    record = surgery.cut(model, *choice(model))
    with torch.device("meta"):
        empty = adapt(llama().double())
    surgery.apply(empty, record)
    assert [tuple(p.shape) for p in empty.parameters()] == [tuple(p.shape) for p in model.parameters()]
    assert all(p.is_meta for p in empty.parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_cached_generation_of_a_cut_model(family: str) -> None:
    model: Any = adapt(made(FAMILIES[family]))
    surgery.cut(model, *choice(model))
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "attention_mask": mask}
    cached = model.generate(ids, use_cache=True, **options)
    assert cached.shape == (2, 14) and torch.equal(cached, model.generate(ids, use_cache=False, **options))


class Gain(Adapter):
    """On the layer's output: it names one side only."""

    axes = {"gain": ("out",)}

    def __init__(self, out: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(out))

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs) * self.gain


def test_adapters_that_live_on_one_side_or_around_a_block() -> None:
    model = made(llama)
    attach(model.get_submodule("model.layers.0.mlp.down_proj"), "gain", Gain(WIDTH), torch.float64)
    attach(model.get_submodule("model.layers.0.mlp.up_proj"), "gain", Gain(FFN), torch.float64)
    attach(model.get_submodule("model.layers.0.mlp"), "gain", Gain(WIDTH), torch.float64)
    attach(model.get_submodule("model.layers.0.self_attn.o_proj"), "gain", Gain(WIDTH), torch.float64)
    channels = {"model.layers.0.mlp": list(range(0, FFN, 5))}
    layer: Any = copy.deepcopy(model)
    layer.get_submodule("model.layers.0.mlp.down_proj").weight.data[:, [c for c in range(FFN) if c % 5]] = 0
    surgery.cut(model, {"model.layers.1.self_attn": [0, 1]}, channels)
    assert (logits(model) - logits(layer)).abs().max() < 1e-10
    shapes = [tuple(a.gain.shape) for _, _, a in adapters(model)]  # type: ignore[union-attr]
    assert shapes == [(WIDTH,), (WIDTH,), (10,), (WIDTH,)]


class Sparse(WeightAdapter):
    """A delta at flat positions of the weight, which a cut would move."""

    axes = {"values": ("kept",)}

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(4))

    def weight(self, W: Tensor) -> Tensor:
        return W.flatten().index_add(0, torch.arange(4), self.values).view_as(W)


ATTN, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


def refused(model: nn.Module, match: str, heads: Any = None, channels: Any = None) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        surgery.cut(model, heads, channels)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())
    assert surgery.record(model) == {}


def test_positions_and_names_are_checked_before_anything_changes() -> None:
    model = made(llama)
    good = {MLP: [0, 1]}
    refused(model, "nothing to cut")
    refused(model, "no attention module that can be cut is named 'self_atn'; nearest: 'self_attn'", {"self_atn": [0]})
    refused(model, "no MLP that can be cut is named 'model.layers.0'", channels={"model.layers.0": [0]})
    tensors = [torch.tensor(t) for t in ([True, False], [0.0], [[0]], 0)]
    for keep in ([], [1, 0], [0, 0], [-1], [0, 2], [0.5, 1.5], [False, True], *tensors):
        refused(model, "sorted and unique positions in 0..1, at least one", {ATTN: keep}, good)
    with pytest.raises(ValueError, match="a record of a cut has 'heads' and 'channels', not 'head'"):
        surgery.apply(model, {"head": {ATTN: [0]}})


def test_what_cannot_be_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refused(made(t5), "position bias of the first one", {"decoder.block.0.layer.1.EncDecAttention": [0]})

    model: Any = made(llama)
    assert all(surgery.obstacle(model, part) == "" for part in (*parts.attentions(model), *parts.mlps(model)))
    layers = model.model.layers
    layers[1].mlp.gate_proj.weight = layers[0].mlp.gate_proj.weight
    refused(model, "'model.layers.0.mlp.gate_proj' is shared with another layer", {ATTN: [0]}, {MLP: [0]})

    model = adapt(made(llama))
    layers = model.model.layers
    layers[1].mlp.down_proj.adapters["lora"].A = layers[0].mlp.down_proj.adapters["lora"].A
    refused(model, "'model.layers.0.mlp.down_proj' is shared with another layer", {ATTN: [0]}, {MLP: [0]})
    layers[1].self_attn.q_proj.adapters["lora"].A = layers[0].self_attn.q_proj.adapters["lora"].A
    surgery.cut(model, {ATTN: [0]})  # no side of the shared tensor is cut

    model = made(llama)
    attach(model.model.layers[0].mlp.up_proj, "sparse", Sparse(), torch.float64)
    refused(
        model, r"'sparse' on 'model.layers.0.mlp.up_proj' changes the weight but declares no axis", None, {MLP: [0]}
    )

    model = made(llama)
    attach(model.model.layers[0].mlp.up_proj, "lora", LoRALinear(FFN // 2, WIDTH), torch.float64)
    refused(model, "has 'B' of 24 along 'out', where the layer has 48", {ATTN: [0]}, {MLP: [0]})

    model = made(llama)
    down = model.model.layers[0].mlp.down_proj
    monkeypatch.setattr(quant, "kind", lambda layer: "nf4" if layer is down else None)
    refused(model, "'model.layers.0.mlp.down_proj' is quantised", {ATTN: [0]}, {MLP: [0]})


def test_parameters_with_a_size_for_each_head_are_refused() -> None:
    sizes: dict[str, Any] = SIZES | {"num_key_value_heads": 2, "head_dim": 6}
    olmo = made(lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**TEXT, **sizes)))  # one norm over all heads
    refused(olmo, r"its parameter 'q_norm.weight' \(\d+,\) may belong to single heads", {ATTN: [0]})
    qwen = made(lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT, **sizes)))  # one norm, the same for each head
    heads, channels = choice(qwen)
    reference = logits(masked(qwen, heads, channels))
    surgery.cut(qwen, heads, channels)
    assert (logits(qwen) - reference).abs().max() < 1e-10
    model: Any = made(llama, head_dim=4)  # as many as there are heads
    model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(HEADS))
    refused(model, r"its parameter 'sinks' \(4,\)", {ATTN: [0]})
    model = made(bert)
    model.bert.encoder.layer[0].norm = nn.LayerNorm(FFN)  # such as a norm between the two layers
    refused(model, r"its parameter 'norm.weight' \(48,\)", channels={"bert.encoder.layer.0": [0]})
