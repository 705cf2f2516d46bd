"""(IA)^3 by the numbers of its card (methods/ia3.md), every host against dense float64 references, and peft."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning_peft_plugins.additive.ia3 import IA3
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lightning_peft as lp
from lightning_peft import hosts
from tests import nets
from tests.selective import assert_folders_agree, count, moved_by_training
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs
from tests.zoo import bases as zoo

KINDS = [k for k, make in HOSTS.items() if not isinstance(make(), nn.Embedding)]
SIDES = ("target_output", "target_input")


def one(layer: nn.Module, side: str, dtype: torch.dtype = F64) -> Any:
    """``layer`` with (IA)^3 on one side, its factors away from one."""
    model = One(layer)
    lp.inject(model, IA3(**{side: ("layer",)}), dtype=dtype)
    nn.init.uniform_(adapter_of(model).l, 0.5, 2.0)
    return model


def scaled(layer: Any, side: str, l: Tensor) -> tuple[Tensor, Tensor | None]:  # noqa: E741
    """The card's stored weight and bias, written out."""
    W, bias = layer.weight.detach().clone(), layer.bias
    if not hasattr(layer, "groups"):
        rows = W if isinstance(layer, nn.Linear) else W.T
        new = l[:, None] * rows if side == "target_output" else rows * l[None, :]
        W = new if isinstance(layer, nn.Linear) else new.T
    elif side == "target_output":
        W = W * l.view(-1, *[1] * (W.dim() - 1))
    else:
        blocks = zip(W.chunk(layer.groups), l.chunk(layer.groups), strict=True)
        W = torch.cat([block * part.view(1, -1, *[1] * (W.dim() - 2)) for block, part in blocks])
    return W, l * bias if side == "target_output" and bias is not None else bias


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_6_forward_gradient_and_merge_are_the_dense_map(kind: str, side: str) -> None:
    layer: Any = HOSTS[kind]().double()
    x, plain, before = inputs(layer).requires_grad_(), copy.deepcopy(layer), copy.deepcopy(layer.state_dict())
    model = one(layer, side)
    l = adapter_of(model).l  # noqa: E741
    W, bias = scaled(layer, side, l)
    reference = copy.deepcopy(plain)
    want = torch.func.functional_call(reference, {"weight": W} | ({} if bias is None else {"bias": bias}), (x,))
    got = model(x)
    assert (want - plain(x)).abs().max() > 0.01
    close(got, want)
    for g, w in zip(torch.autograd.grad(got.sin().sum(), (l, x)), torch.autograd.grad(want.sin().sum(), (l, x)),
                    strict=True):  # fmt: skip
        close(g, w, 1e-9)
    merged = lp.merge(model)
    close(layer.weight, W)
    close(layer(x), got)
    merged.undo()
    state = layer.state_dict()
    assert all(torch.equal(state[k], v) for k, v in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["llama", "gpt2", "t5"])
def test_1_the_start_is_the_base_bit_for_bit(base: str, dtype: torch.dtype) -> None:
    model = getattr(zoo, base)().to(dtype).requires_grad_(False)  # torch folds a product by what needs gradients
    want = model(**zoo.text()).logits
    lp.inject(model, IA3())
    assert torch.equal(model(**zoo.text()).logits, want) and want.dtype == dtype
    assert all(a.l.dtype == torch.float32 for _, _, a in lp.adapters(model))


@pytest.mark.parametrize(("side", "want", "bias"), [("target_output", [8.0, 3.0], [2.0, -0.5]),
                                                    ("target_input", [4.0, 7.0], [1.0, -1.0])])  # fmt: skip
def test_2_and_4_by_hand_with_the_bias_scaled_on_the_output_side_alone(
    side: str, want: list[float], bias: list[float]
) -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.bias.copy_(torch.tensor([1.0, -1.0]))
    model = one(layer, side, torch.float32)
    with torch.no_grad():
        adapter_of(model).l.copy_(torch.tensor([2.0, 0.5]))
    x = torch.ones(1, 2)
    assert model(x).tolist() == [want]
    lp.merge(model)
    assert layer(x).tolist() == [want] and layer.bias.tolist() == bias


def test_3_counts() -> None:
    assert count(One(nn.Linear(64, 64)), IA3(target_output=("layer",))) == 64
    llama = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    t5 = {"d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "feed_forward_proj": "gated-gelu"}
    with torch.device("meta"):
        assert count(LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **llama)), IA3()) * 8 == 524_288
        small = T5ForConditionalGeneration(T5Config(num_layers=2, **t5))
        assert count(small, IA3()) * 12 == 1_081_344  # decoders' cross-attention included


@pytest.mark.parametrize("gated", [True, False])
def test_5_before_the_last_layer_is_where_the_inner_activations_are(gated: bool) -> None:
    """Behind the linear branch of a gated MLP it is the same; before an activation it is not."""
    torch.manual_seed(1)
    up, gate, down = (nn.Linear(*shape).double() for shape in ((6, 10), (6, 10), (10, 6)))
    x, l = torch.randn(4, 6, dtype=F64), torch.rand(10, dtype=F64) + 0.5  # noqa: E741

    def run() -> Tensor:
        return down(F.gelu(gate(x)) * up(x) if gated else F.gelu(up(x)))

    ys = []
    for layer, side in ((down, "target_input"), (up, "target_output")):
        model = one(layer, side)
        with torch.no_grad():
            adapter_of(model).l.copy_(l)
        ys.append(run())
        lp.remove(model)
    distance = (ys[0] - ys[1]).abs().max()
    assert distance < 1e-12 if gated else distance > 1e-2


def test_7_two_of_them_multiply_and_merge_in_either_order() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 10).double(), torch.randn(3, 6, dtype=F64)
    a, b = torch.rand(10, dtype=F64), torch.rand(10, dtype=F64)
    want = a * b * layer(x)
    for first, second in ((a, b), (b, a)):
        model = One(copy.deepcopy(layer))
        both = [IA3(name=n, target_output=("layer",)) for n in ("one", "two")]
        lp.inject(model, both, dtype=F64)
        with torch.no_grad():
            for name, l in (("one", first), ("two", second)):  # noqa: E741
                model.layer.adapters[name].l.copy_(l)
        close(model(x), want)
        lp.merge(model)
        close(model(x), want)


def test_8_a_merge_with_zeros_can_be_undone() -> None:
    layer = nn.Linear(6, 10)
    before = layer.weight.clone()
    model = one(layer, "target_output", torch.float32)
    nn.init.zeros_(adapter_of(model).l)
    merged = lp.merge(model)
    assert not layer.weight.any()
    merged.undo()
    assert torch.equal(layer.weight, before)


def sides(model: nn.Module) -> dict[str, tuple[str, int]]:
    return {n: (type(a).__name__, len(a.l)) for n, _, a in lp.adapters(model)}  # pyright: ignore


def test_what_is_scaled_in_a_bert() -> None:
    model = zoo.bert()
    lp.inject(model, IA3(layers="1"))
    at = "bert.encoder.layer.1."
    assert sides(model) == {
        f"{at}attention.self.key": ("IA3Output", 32),
        f"{at}attention.self.value": ("IA3Output", 32),
        f"{at}output.dense": ("IA3Input", 48),  # not attention.output.dense
    }


def test_what_is_scaled_with_grouped_queries_and_across_attention() -> None:
    model = zoo.llama()
    lp.inject(model, IA3())
    assert sum(n for _, n in sides(model).values()) == 2 * (16 + 16 + 48)
    model = zoo.t5()
    lp.inject(model, IA3(places=("key",)))
    blocks = [f"encoder.block.{i}.layer.0.SelfAttention.k" for i in (0, 1)]
    for i in (0, 1):
        blocks += [f"decoder.block.{i}.layer.0.SelfAttention.k", f"decoder.block.{i}.layer.1.EncDecAttention.k"]
    assert sides(model) == dict.fromkeys(blocks, ("IA3Output", 32))


@pytest.mark.parametrize(
    ("options", "first", "last"),
    [
        ({}, 32, 96),
        ({"places": ("value",)}, 64, 96),
        ({"places": ("key",)}, 32, 64),
        ({"target_output": ("c_attn",)}, 0, 96),
    ],
)
def test_of_a_fused_projection_only_the_chosen_rows_move(options: dict[str, Any], first: int, last: int) -> None:
    model = zoo.gpt2()
    layer: Any = model.get_submodule("transformer.h.0.attn.c_attn")
    nn.init.ones_(layer.bias)
    before = layer.weight.detach().clone()  # (in, out)
    lp.inject(model, IA3(**options))
    factors = layer.adapters["ia3"].l
    assert len(factors) == last - first
    nn.init.constant_(factors, 2.0)
    lp.merge(model)
    want = torch.ones(96)
    want[first:last] = 2.0
    assert torch.equal(layer.bias, want) and torch.equal(layer.weight, before * want)


def test_normalised_keys_are_warned_of() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    config = Qwen3Config(num_attention_heads=4, num_key_value_heads=2, **sizes)
    with pytest.warns(
        UserWarning, match=r"self_attn.k_norm normalises each head's keys.*'model.layers.0.self_attn.k_p"
    ):
        lp.inject(Qwen3ForCausalLM(config), IA3())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lp.inject(Qwen3ForCausalLM(config), IA3(places=("value", "mlp")))
        lp.inject(zoo.llama(), IA3())


def test_nothing_else_moves_in_20_steps_and_factors_have_no_weight_decay() -> None:
    model = zoo.llama()
    lp.inject(model, IA3())
    (group,) = IA3().param_groups(model) or []
    assert group["weight_decay"] == 0.0
    assert {id(p) for p in group["params"]} == {id(a.l) for _, _, a in lp.adapters(model)}
    assert moved_by_training(model, zoo.text()) == []
    assert all((a.l != 1).any() for _, _, a in lp.adapters(model))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (zoo.llama, {"places": ("query",)}, r"places are some of .*got \['query'\]"),
        (zoo.llama, {"places": ()}, r"places are some of .*got \(\)"),
        (zoo.llama, {"places": ("key",), "target_output": ("v_proj",)}, "places has no effect"),
        (zoo.llama, {"target_output": ("v_prj",)}, r"'v_prj'; nearest: 'v_proj'"),
        (zoo.llama, {"target_output": ("v_proj",), "target_input": ("v_proj",)}, "for its output and for its input"),
        (zoo.llama, {"exclude": ("lm_head",)}, r"exclude 'lm_head' leaves out nothing"),
        (zoo.llama, {"layers": "7"}, r"layers '7' choose no block"),
        (zoo.cnn, {}, r"ia3: this Sequential has no layer for 'key'.*target_output and target_input"),
        (zoo.bert, {"target_output": ("word_embeddings",)}, r"no linear or conv1d or conv matches"),
    ],
)
def test_bad_options_and_what_matches_nothing_raise(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lp.inject(make(), IA3(**options))


# ---- huggingface/peft ----------------------------------------------------------------------------------------------

DENSE = ["k_proj", "v_proj", "down_proj"]
SHIPS: dict[str, tuple[Any, Any, Any]] = {
    "llama": (zoo.llama, zoo.text, peft.IA3Config(target_modules=DENSE, feedforward_modules=["down_proj"])),
    "gpt2": (
        zoo.gpt2,
        zoo.text,
        peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
    ),
    "t5": (zoo.t5, zoo.text, peft.IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"])),
    "regex": (
        lambda: nets.bert(initializer_range=0.2),
        zoo.sentences,
        peft.IA3Config(target_modules=r".*\.(key|output\.dense)", feedforward_modules=r".*output\.dense"),
    ),
}


@pytest.mark.parametrize("case", SHIPS)
def test_peft_computes_the_same_and_folders_go_both_ways(case: str, tmp_path: Path) -> None:
    make, batch, config = SHIPS[case]
    assert_folders_agree(make().eval(), config, batch(), tmp_path)


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return type("Out", (), {"logits": self.b(self.a(x).tanh())})


def test_peft_computes_the_same_on_convolutions(tmp_path: Path) -> None:
    config = peft.IA3Config(target_modules=["a", "b"], feedforward_modules=["b"])
    ours = assert_folders_agree(Pictures(), config, {"x": torch.randn(2, 1, 8, 8)}, tmp_path)
    assert sides(ours) == {"a": ("IA3Output", 8), "b": ("IA3ConvInput", 8)}


def test_peft_reads_our_fused_rows_as_factors_of_one_for_the_queries(tmp_path: Path) -> None:
    base = zoo.gpt2()
    ours = copy.deepcopy(base)
    lp.inject(ours, IA3())
    for _, _, a in lp.adapters(ours):
        nn.init.uniform_(a.l, 0.5, 2.0)
    lp.hf.save(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours"))
    torch.testing.assert_close(theirs(**zoo.text()).logits, ours(**zoo.text()).logits, atol=1e-5, rtol=0)
    factors = [v.flatten() for k, v in theirs.state_dict().items() if "c_attn.ia3_l" in k]
    assert len(factors) == 2 and all((f[:32] == 1).all() and (f[32:] != 1).all() for f in factors)


def test_what_peft_does_not_have_is_refused(tmp_path: Path) -> None:
    model = one(nn.Conv1d(4, 4, 3), "target_output", torch.float32)
    with pytest.raises(ValueError, match=r"layer: huggingface/peft's IA3 has no Conv1d"):
        lp.hf.save(model, tmp_path / "flat")
    with pytest.raises(ValueError, match="other base"):
        IA3.from_hf({"peft_type": "IA3"}, {}, nets.mlp())
    with pytest.raises(ValueError, match="sets shiny='yes'"):
        IA3.from_hf({"peft_type": "IA3", "shiny": "yes"}, {}, nets.mlp())


def test_quantised_layers_merge_by_dequantising() -> None:
    pytest.importorskip("bitsandbytes")
    model = zoo.nf4_llama()
    layer = model.get_submodule("model.layers.0.self_attn.k_proj")
    W = hosts.read(layer).float().clone()
    lp.inject(model, IA3())
    for _, _, a in lp.adapters(model):
        nn.init.uniform_(a.l, 0.5, 2.0)
    l = layer.adapters["ia3"].l.detach()  # noqa: E741  # pyright: ignore
    want = model(**zoo.text()).logits
    lp.merge(model)
    got: Any = model.get_submodule("model.layers.0.self_attn.k_proj")
    torch.testing.assert_close(got.weight, l[:, None] * W)
    torch.testing.assert_close(model(**zoo.text()).logits, want, atol=1e-4, rtol=1e-4)
