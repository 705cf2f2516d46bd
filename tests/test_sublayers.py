"""Where sub-layers read, end and are added: what the structure and the code tell, against what the numbers say."""

from typing import Any

import pytest
import torch
import transformers as hf
from lightning_peft_plugins.additive.pfeiffer_adapter import PfeifferAdapter
from lightning_peft_plugins.additive.sublayers import KINDS, Sublayer, calls, sublayers
from torch import Tensor, nn

import lightning_peft as lp
from tests.zoo.bases import bert, gpt2, t5

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
TEXT: dict[str, Any] = SIZES | {"vocab_size": 64, "pad_token_id": 0}
PAIR: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "pad_token_id": 0, "decoder_start_token_id": 1}
for side in ("encoder", "decoder"):
    PAIR |= {f"{side}_layers": 1, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
OPT: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
                       "ffn_dim": 48, "word_embed_proj_dim": 32}  # fmt: skip
IMAGE: dict[str, Any] = SIZES | {"image_size": 16, "patch_size": 8}
SOUND: dict[str, Any] = PAIR | {"num_mel_bins": 8, "max_source_positions": 8, "eos_token_id": 2, "bos_token_id": 1}
GPT2: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}
STAGES: dict[str, Any] = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}


def torch_stack(norm_first: bool, decoder: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def distil() -> nn.Module:
    return hf.DistilBertModel(hf.DistilBertConfig(vocab_size=64, dim=32, n_layers=1, n_heads=4, hidden_dim=48))


POST = {
    "bert": bert,
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**TEXT)),
    "deberta": lambda: hf.DebertaV2Model(hf.DebertaV2Config(**TEXT)),
    "mpnet": lambda: hf.MPNetModel(hf.MPNetConfig(**TEXT)),
    "albert": lambda: hf.AlbertModel(hf.AlbertConfig(**TEXT, embedding_size=16)),
    "distilbert": distil,
    "bart": lambda: hf.BartModel(hf.BartConfig(**PAIR)),
    "opt-350m": lambda: hf.OPTModel(hf.OPTConfig(**OPT, do_layer_norm_before=False)),
    "torch": lambda: torch_stack(norm_first=False),
}
PRE = {
    "gpt2": gpt2,
    "gpt2-cross": lambda: hf.GPT2Model(hf.GPT2Config(**GPT2, add_cross_attention=True)),
    "llama": lambda: hf.LlamaModel(hf.LlamaConfig(**TEXT)),
    "phi3": lambda: hf.Phi3Model(hf.Phi3Config(**TEXT)),  # queries, keys and values in one layer, gate and up too
    "t5": t5,
    "mbart": lambda: hf.MBartModel(hf.MBartConfig(**PAIR)),
    "whisper": lambda: hf.WhisperModel(hf.WhisperConfig(**SOUND)),
    "opt": lambda: hf.OPTModel(hf.OPTConfig(**OPT)),
    "esm": lambda: hf.EsmModel(hf.EsmConfig(**TEXT)),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**IMAGE)),
    "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**IMAGE)),
    "swin": lambda: hf.SwinModel(hf.SwinConfig(**STAGES, window_size=4)),
    "torch": lambda: torch_stack(norm_first=True),
}  # fmt: skip


def run(model: Any) -> None:
    """One forward, whatever it takes."""
    ids = torch.randint(3, 60, (2, 5))
    name = type(model).__name__
    if name == "TransformerEncoder":
        model(torch.randn(2, 5, 32))
    elif name in ("ViTModel", "SwinModel", "CLIPVisionModel"):
        model(pixel_values=torch.randn(2, 3, 16, 16))
    elif name == "WhisperModel":
        model(input_features=torch.randn(2, 8, 16), decoder_input_ids=ids)
    elif getattr(model.config, "add_cross_attention", False):
        model(input_ids=ids, encoder_hidden_states=torch.randn(2, 3, 32))
    else:
        model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))


def traced(model: Any, names: set[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """First input and first output of the named modules in one run."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def keep(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            x = [*args, *kwargs.values()][0]
            seen[name] = (x, output[0] if isinstance(output, tuple) else output)

        return keep

    handles = [model.get_submodule(n).register_forward_hook(hook(n), with_kwargs=True) for n in names if n]
    with torch.no_grad():
        run(model.eval())
    for h in handles:
        h.remove()
    return seen


def shaped(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(like.shape)


def check_numbers(model: Any, part: Sublayer) -> None:
    """The sum, the norm after it and the norm before the sub-layer are where ``part`` says."""
    io = traced(model, {part.reads, part.ends, part.adds, part.after, part.before, part.around, part.whole})
    h = io[part.ends][1]
    if part.after:  # z = h + residual goes into the norm, and the residual is what the sub-layer reads
        z, out = io[part.after]
        torch.testing.assert_close(shaped(z, h), h + shaped(io[part.reads][0], h))
        torch.testing.assert_close(shaped(io[part.adds][1], out), out)
    else:
        x, normed = io[part.before]
        torch.testing.assert_close(shaped(io[part.around][1], h), h + shaped(x, h))
        torch.testing.assert_close(shaped(io[part.reads][0], normed), normed)
    if part.whole:
        torch.testing.assert_close(io[part.whole][0], io[part.reads][0])


@pytest.mark.parametrize("name", POST)
def test_post_ln_blocks(name: str) -> None:
    model = POST[name]()
    parts = sublayers(model, ("mlp",), "test")
    assert parts and all(p.after and p.final and not p.before for p in parts)
    for part in parts:
        check_numbers(model, part)


@pytest.mark.parametrize("name", PRE)
def test_pre_ln_blocks(name: str) -> None:
    model = PRE[name]()
    parts = sublayers(model, ("mlp",), "test")
    assert parts and all(p.before and p.final and not p.after for p in parts)
    for part in parts:
        check_numbers(model, part)


@pytest.mark.parametrize("name", [n for n in POST if n != "torch"])
def test_attention_of_post_ln_blocks(name: str) -> None:
    model = POST[name]()
    for part in sublayers(model, ("attention",), "test"):
        norms = {n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) and n.startswith(part.block)}
        io = traced(model, {part.reads, part.ends} | norms)
        x, h = io[part.reads][0], io[part.ends][1]
        sums = [io[n][0] for n in norms if io[n][0].numel() == h.numel()]
        assert any(torch.allclose(z, shaped(x, z) + shaped(h, z), atol=1e-6) for z in sums)


def test_both_decoder_attentions_and_what_has_none() -> None:
    for model, cross in ((t5(), "EncDecAttention"), (POST["bart"](), "encoder_attn"), (PRE["gpt2-cross"](), "cross")):
        found = sublayers(model, ("cross_attention",), "test")
        assert found and all(cross in p.whole for p in found)
        assert not any(cross in p.reads for p in sublayers(model, ("attention", "mlp"), "test"))
    with pytest.raises(ValueError, match="test: no cross_attention is recognised in 'bert.encoder.layer.0'"):
        sublayers(bert(), ("cross_attention",), "test")


def test_the_dropout_behind_a_sublayer_belongs_to_it_where_it_is_a_module_of_its_own() -> None:
    ends = {p.kind: p.ends for p in sublayers(bert(), KINDS[::2], "test", layers="0")}
    assert ends == {k: f"bert.encoder.layer.0.{v}output.dropout" for k, v in (("attention", "attention."), ("mlp", ""))}
    assert sublayers(t5(), ("mlp",), "test")[0].ends == "encoder.block.0.layer.1.dropout"
    assert sublayers(gpt2(), ("mlp",), "test")[0].ends == "transformer.h.0.mlp"  # whose last module it is
    vit = sublayers(PRE["vit"](), ("mlp",), "test")[0]
    assert vit.ends == "layers.0.mlp"  # the block has one dropout for two sub-layers: it is no place


def test_layers_and_exclude() -> None:
    model = t5()
    assert {p.block for p in sublayers(model, ("mlp",), "test", layers="1")} == {"encoder.block.1", "decoder.block.1"}
    assert {p.block[:7] for p in sublayers(model, ("mlp",), "test", exclude=("encoder",))} == {"decoder"}
    with pytest.raises(ValueError, match="exclude 'nothing' leaves out nothing"):
        sublayers(model, ("mlp",), "test", exclude=("nothing",))
    with pytest.raises(ValueError, match="layers '7' choose no block"):
        sublayers(model, ("mlp",), "test", layers="7")


# ---- reading code --------------------------------------------------------------------------------------------------


class Flagged(nn.Module):
    """A block with a flag, methods of its own, a tuple sum and a call inside a call."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.norm, self.lin, self.out, self.drop = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5)
        self.stack = nn.ModuleList([nn.Linear(4, 4)])
        self.first = first

    def forward(self, x: Tensor) -> Any:
        if not self.first:
            y = self.norm(x + self._mlp(x))
        else:
            y = self._mlp(self.norm(x))
            y += x
        y = self.stack[0](y)
        return (y,) + (x,)

    def _mlp(self, x: Tensor) -> Tensor:
        return self.drop(self.out(self.lin(x)))


def test_calls_follow_methods_flags_and_the_order_of_evaluation() -> None:
    assert calls(Flagged(True)) == ["norm", "lin", "out", "drop", "+", "stack"]
    assert calls(Flagged(False)) == ["lin", "out", "drop", "+", "norm", "stack"]
    lp.attach(adapted := Flagged(True), "x", PfeifferLike())
    assert calls(adapted) == calls(Flagged(True))


class PfeifferLike(lp.Adapter):
    def forward(self, base: lp.Base, *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs)


CODE = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.ln = nn.LayerNorm(4)

    def forward(self, x):
        return x + self.mlp(self.ln(x + self.attn(x)))
"""


def test_code_that_cannot_be_read_is_refused_with_what_would_work() -> None:
    scope: dict[str, Any] = {"nn": nn, "__name__": "nowhere"}
    exec(CODE, scope)  # without a source file
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(scope["Block"](), scope["Block"]()))
    assert calls(model[1][0]) == []
    with pytest.raises(ValueError, match=r"the code of '1.0' does not tell .*'1.0.mlp.2'.*name the norms"):
        lp.inject(model, PfeifferAdapter())
    x = torch.randn(2, 4)
    before = model(x)
    lp.inject(model, PfeifferAdapter(targets=("1.*",), exclude=("1.*.*",), bottleneck=2))
    assert {n for n, _, _ in lp.adapters(model)} == {"1.0", "1.1"} and torch.equal(model(x), before)


class Odd(nn.Module):
    """Attention, and experts of which none is the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8)) for _ in range(2))
        self.norm = nn.LayerNorm(8)


def test_a_block_without_a_recognisable_place_is_named_with_what_it_holds() -> None:
    model = nn.ModuleList([Odd(), Odd()])
    want = (
        r"test: 2 mlp is recognised in '0' \(2 such blocks\), where one is needed, a Odd with .*'experts.0.1'.*targets"
    )
    with pytest.raises(ValueError, match=want):
        sublayers(model, ("mlp",), "test")
    with pytest.raises(ValueError, match="this Linear has no stack of blocks; name modules by targets"):
        sublayers(nn.Linear(2, 2), ("mlp",), "test")
