"""Houlsby, Pfeiffer and parallel adapters and AdaptFormer, against blocks written out by hand and worked numbers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from lightning_peft_plugins.additive.adaptformer import AdaptFormer
from lightning_peft_plugins.additive.bottleneck import NONLINEARITIES, Bottleneck, Slot, Tap
from lightning_peft_plugins.additive.houlsby_adapter import HoulsbyAdapter
from lightning_peft_plugins.additive.parallel_adapter import ParallelAdapter
from lightning_peft_plugins.additive.pfeiffer_adapter import PfeifferAdapter
from lightning_peft_plugins.additive.sublayers import KINDS
from lightning_peft_plugins.reparameterized.lora import LoRA
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from tests.test_sublayers import IMAGE, OPT, PAIR, distil, torch_stack
from tests.zoo.bases import bart, bert, gpt2, llama, sentences, t5, text

F64 = torch.float64
METHODS: dict[str, Any] = {
    "houlsby": HoulsbyAdapter(bottleneck=3, train_norms=False),
    "pfeiffer": PfeifferAdapter(bottleneck=3),
    "parallel": ParallelAdapter(bottleneck=3),
    "adaptformer": AdaptFormer(r=3, dropout=0.0),
}


def filled(model: Any, method: lp.Method, dtype: torch.dtype = torch.float32) -> Any:
    """``model`` with the method, its tensors away from their start."""
    lp.inject(model, method, dtype=dtype)
    for _, _, adapter in lp.adapters(model):
        for p in adapter.parameters():
            nn.init.normal_(p, std=0.5)
    return model.eval()


def bottlenecks(model: nn.Module) -> dict[str, Any]:
    return {name: a for name, _, a in lp.adapters(model) if isinstance(a, Bottleneck)}


def delta(a: Any, z: Tensor, f: Callable[[Tensor], Tensor], s: float) -> Tensor:
    """The definition, written out."""
    return s * (f(z @ a.down.T + a.down_bias) @ a.up.T + a.up_bias)


# ---- blocks by hand ------------------------------------------------------------------------------------------------
# A block is (how to call it, attention, MLP, first norm, second norm) of a base without adapters.


class Plan:
    """Where each method acts in a block: ``a`` are its bottlenecks in the block, by name."""

    def __init__(self, method: Any, a: dict[str, Any]) -> None:
        self.f = NONLINEARITIES[getattr(method, "nonlinearity", "relu")]
        self.s, self.kind, self.a = method.scale, type(method), list(a.values())

    def sub(self, which: int, x: Tensor, h: Tensor) -> Tensor:
        """A sub-layer's output, from what it read and returned."""
        if self.kind is HoulsbyAdapter:
            return h + delta(self.a[which], h, self.f, self.s)
        last = which == 1 and self.kind is ParallelAdapter
        return h + delta(self.a[0], x, self.f, self.s) if last else h

    def stream(self, x: Tensor) -> Tensor | float:
        return delta(self.a[0], x, self.f, self.s) if self.kind is AdaptFormer else 0.0

    def end(self, v: Tensor) -> Tensor | float:
        return delta(self.a[0], v, self.f, self.s) if self.kind is PfeifferAdapter else 0.0


def pre_ln(plan: Plan, x: Tensor, attention: Any, mlp: Any, norm1: Any, norm2: Any) -> Tensor:
    x = x + plan.sub(0, norm1(x), attention(norm1(x)))
    z = x + plan.sub(1, norm2(x), mlp(norm2(x))) + plan.stream(x)
    return z + plan.end(z)


def post_ln(plan: Plan, x: Tensor, attention: Any, mlp: Any, norm1: Any, norm2: Any) -> Tensor:
    x = norm1(x + plan.sub(0, x, attention(x)))
    z = x + plan.sub(1, x, mlp(x)) + plan.stream(x)
    return norm2(z + plan.end(norm2(z)))


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def of_bert(m: Any) -> Any:
    b = m.bert.encoder.layer[1]
    attention = lambda x: b.attention.output.dense(b.attention.self(x)[0])  # noqa: E731
    mlp = lambda x: b.output.dense(b.intermediate(x))  # noqa: E731
    return "bert.encoder.layer.1", {}, attention, mlp, b.attention.output.LayerNorm, b.output.LayerNorm


def of_gpt2(m: Any) -> Any:
    b = m.transformer.h[1]
    return "transformer.h.1", {}, lambda x: b.attn(x)[0], b.mlp, b.ln_1, b.ln_2


def of_llama(m: Any) -> Any:
    b, at = m.model.layers[1], torch.arange(5)[None]
    call = {"position_embeddings": m.model.rotary_emb(torch.zeros(1, dtype=F64), at)}
    attention = lambda x: b.self_attn(hidden_states=x, attention_mask=None, **call)[0]  # noqa: E731
    return "model.layers.1", call, attention, b.mlp, b.input_layernorm, b.post_attention_layernorm


def of_t5(m: Any) -> Any:
    a, f = m.encoder.block[1].layer
    return "encoder.block.1", {}, lambda x: a.SelfAttention(x)[0], f.DenseReluDense, a.layer_norm, f.layer_norm


def of_pair(m: Any) -> Any:  # BART and mBART
    b = m.get_encoder().layers[-1]
    name = next(n for n, module in m.named_modules() if module is b)
    mlp = lambda x: b.fc2(b.activation_fn(b.fc1(x)))  # noqa: E731
    return name, {"attention_mask": None}, lambda x: b.self_attn(x)[0], mlp, b.self_attn_layer_norm, b.final_layer_norm


def of_opt(m: Any) -> Any:
    b = m.decoder.layers[0]
    mlp = lambda x: b.fc2(b.activation_fn(b.fc1(x)))  # noqa: E731
    return "decoder.layers.0", {}, lambda x: b.self_attn(x)[0], mlp, b.self_attn_layer_norm, b.final_layer_norm


def of_distil(m: Any) -> Any:
    b = m.transformer.layer[0]
    return "transformer.layer.0", {}, lambda x: b.attention(x)[0], b.ffn, b.sa_layer_norm, b.output_layer_norm


def of_vit(m: Any) -> Any:
    b = m.layers[0]
    return "layers.0", {}, lambda x: b.attention(x)[0], b.mlp, b.layernorm_before, b.layernorm_after


def of_torch(m: Any) -> Any:
    b = m.layers[1]
    mlp = lambda x: b.linear2(F.relu(b.linear1(x)))  # noqa: E731
    return "layers.1", {}, lambda x: b.self_attn(x, x, x)[0], mlp, b.norm1, b.norm2


BLOCKS: dict[str, Any] = {
    "bert": (bert, of_bert, post_ln),
    "distilbert": (distil, of_distil, post_ln),
    "bart": (bart, of_pair, post_ln),
    "torch-post": (lambda: torch_stack(False), of_torch, post_ln),
    "gpt2": (gpt2, of_gpt2, pre_ln),
    "llama": (llama, of_llama, pre_ln),
    "t5": (t5, of_t5, pre_ln),
    "mbart": (lambda: hf.MBartModel(hf.MBartConfig(**PAIR)), of_pair, pre_ln),
    "opt": (lambda: hf.OPTModel(hf.OPTConfig(**OPT)), of_opt, pre_ln),
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**IMAGE)), of_vit, pre_ln),
    "torch-pre": (lambda: torch_stack(True), of_torch, pre_ln),
}


def block_of(kind: str, method: Any) -> tuple[Any, Any, Tensor, Callable[[Plan], Tensor], dict[str, Any]]:
    """(adapted model, how to call the adapted block, input, the block by hand, its bottlenecks)."""
    make, of, style = BLOCKS[kind]
    if kind.startswith("torch") and isinstance(method, HoulsbyAdapter):  # its attention is opaque: by name
        method = HoulsbyAdapter(bottleneck=3, train_norms=False, targets=("self_attn", "dropout2"))
    base = make().double().eval()
    name, call, *pieces = of(base)
    model = filled(copy.deepcopy(base), method, F64)
    x = torch.randn(2, 5, 32, dtype=F64)
    held = {n: a for n, a in bottlenecks(model).items() if f"{n}.".startswith(f"{name}.")}
    run = lambda: first(model.get_submodule(name)(x, **call))  # noqa: E731
    return model, run, x, lambda plan: style(plan, x, *pieces), held


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_the_block_is_the_one_written_by_hand(kind: str, method: str) -> None:
    _, run, x, by_hand, held = block_of(kind, METHODS[method])
    assert len(held) == (2 if method == "houlsby" else 1)
    plan = Plan(METHODS[method], held)
    want = by_hand(plan)
    torch.testing.assert_close(run(), want, atol=1e-10, rtol=1e-10)
    parameters = [p for a in held.values() for p in a.parameters()]
    ours = torch.autograd.grad((run() * x).sum(), parameters)
    theirs = torch.autograd.grad((want * x).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
        assert a.abs().max() > 0


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_wrong_but_plausible_blocks_differ(kind: str) -> None:
    """The residual twice, the block's output adapted, or v as Pfeiffer's residual: the numbers tell them apart."""
    _, run, x, by_hand, held = block_of(kind, METHODS["houlsby"])
    plan = Plan(METHODS["houlsby"], held)
    ours, sub = run(), plan.sub
    plan.sub = lambda which, x, h: x + sub(which, x, h)  # type: ignore[method-assign]
    assert (by_hand(plan) - ours).abs().max() > 0.05
    _, run, x, by_hand, held = block_of(kind, METHODS["pfeiffer"])
    plan = Plan(METHODS["pfeiffer"], held)
    ours, end = run(), plan.end
    plan.end = lambda v: v + end(v)  # type: ignore[method-assign]
    assert (by_hand(plan) - ours).abs().max() > 0.05
    plan.end = lambda v: 0.0  # type: ignore[method-assign]
    inside = by_hand(plan)
    assert (inside + delta(plan.a[0], inside, plan.f, plan.s) - ours).abs().max() > 0.05 or kind == "llama"


@pytest.mark.parametrize("cross", [False, True])
def test_a_decoder_block_with_cross_attention(cross: bool) -> None:
    places = KINDS if cross else ("attention", "mlp")
    method = HoulsbyAdapter(bottleneck=3, train_norms=False, places=places)
    base = t5().double()
    model = filled(copy.deepcopy(base), method, F64)
    a = {n.rsplit(".")[4]: b for n, b in bottlenecks(model).items() if n.startswith("decoder.block.1.")}
    assert list(a) == (["0", "1", "2"] if cross else ["0", "2"])
    x, memory = torch.randn(2, 5, 32, dtype=F64), torch.randn(2, 3, 32, dtype=F64)
    mine, crossing, mlp = base.decoder.block[1].layer
    h = mine.SelfAttention(mine.layer_norm(x))[0]
    y = x + h + delta(a["0"], h, F.gelu, 1.0)
    h = crossing.EncDecAttention(crossing.layer_norm(y), key_value_states=memory)[0]
    y = y + h + (delta(a["1"], h, F.gelu, 1.0) if cross else 0.0)
    h = mlp.DenseReluDense(mlp.layer_norm(y))
    y = y + h + delta(a["2"], h, F.gelu, 1.0)
    torch.testing.assert_close(model.decoder.block[1](x, encoder_hidden_states=memory)[0], y, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", ["bert", "bart", "llama", "t5"])
def test_a_parallel_adapter_beside_attention_reads_what_attention_reads(kind: str) -> None:
    method = ParallelAdapter(bottleneck=3, places=("attention",))
    _, run, x, by_hand, held = block_of(kind, method)
    plan = Plan(method, held)
    plan.sub = lambda which, x, h: h if which else h + delta(plan.a[0], x, F.relu, 4.0)  # type: ignore[method-assign]
    torch.testing.assert_close(run(), by_hand(plan), atol=1e-10, rtol=1e-10)


# ---- start, counts, gradients --------------------------------------------------------------------------------------


OPEN = [(k, m) for k in BLOCKS for m in METHODS if not (k.startswith("torch") and m == "houlsby")]  # see block_of


@pytest.mark.parametrize(("kind", "method"), OPEN)
def test_the_start_is_the_base(kind: str, method: str) -> None:
    make, of, _ = BLOCKS[kind]
    base = make().eval()
    name, call, *_ = of(base)
    model = copy.deepcopy(base)
    lp.inject(model, METHODS[method])
    call = {k: tuple(t.float() for t in v) if isinstance(v, tuple) else v for k, v in call.items()}
    x = torch.randn(2, 5, 32)
    ours, theirs = (first(m.get_submodule(name)(x, **call)) for m in (model, base))
    far = 1e-6 if kind.startswith("torch") else 0.0  # torch's blocks have a fused path, which adapters turn off
    torch.testing.assert_close(ours, theirs, atol=far, rtol=far)
    assert all(a.up.abs().max() == 0 and a.down.abs().max() > 0 for a in bottlenecks(model).values())


def meta(make: Any, config: Any, method: lp.Method) -> int:
    with torch.device("meta"):
        model = make(config)
    lp.inject(model, method)
    return sum(p.numel() for _, _, a in lp.adapters(model) for p in a.parameters())


def test_counts_of_the_cards() -> None:
    assert meta(hf.BertModel, hf.BertConfig(), HoulsbyAdapter(bottleneck=64)) == 2_379_264 == 24 * 99_136
    assert meta(hf.BertModel, hf.BertConfig(), PfeifferAdapter()) == 894_528
    assert meta(hf.BertModel, hf.BertConfig(), ParallelAdapter(bottleneck=64)) == 12 * 99_136
    assert meta(hf.ViTModel, hf.ViTConfig(), AdaptFormer()) == 1_189_632 == 12 * 99_136
    assert meta(hf.BertModel, hf.BertConfig(), PfeifferAdapter(scale="channel")) == 894_528 + 12 * 768
    assert meta(hf.BertModel, hf.BertConfig(), PfeifferAdapter(scale="learned")) == 894_528 + 12
    assert meta(hf.ViTModel, hf.ViTConfig(), AdaptFormer(layer_norm="in")) == 12 * (99_136 + 2 * 768)


@pytest.mark.parametrize("method", METHODS)
def test_first_gradients(method: str) -> None:
    model, batch = bert(), sentences()
    lp.inject(model, METHODS[method])
    model(**batch).loss.backward()
    for a in bottlenecks(model).values():
        assert a.down.grad.abs().max() == 0 and a.down_bias.grad.abs().max() == 0  # behind U = 0
        assert a.up.grad.abs().max() > 0 and a.up_bias.grad.abs().max() > 0
    assert all(p.grad is None for n, p in model.named_parameters() if "adapters" not in n)
    with torch.no_grad():
        for a in bottlenecks(model).values():
            a.up.add_(a.up.grad)
    model(**batch).loss.backward()
    assert all(a.down.grad.abs().max() > 0 for a in bottlenecks(model).values())


@pytest.mark.parametrize(("std", "far"), [(1e-3, 1e-3), (1e-2, 1e-2)])
def test_near_identity_start(std: float, far: float) -> None:
    base = bert()
    model = copy.deepcopy(base)
    lp.inject(model, HoulsbyAdapter(init_std=std, bottleneck=16))
    for a in bottlenecks(model).values():
        assert 0.8 * std < float(a.down.std()) < std and float(a.up.abs().max()) <= 2 * std
        assert a.down_bias.abs().max() == a.up_bias.abs().max() == 0
    batch = {k: v for k, v in sentences().items() if k != "labels"}
    one, two = (m.bert(**batch).last_hidden_state for m in (base, model))
    assert 0 < (one - two).norm() / one.norm() < far


# ---- the bottleneck itself -----------------------------------------------------------------------------------------


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def one(method: lp.Method, width: int = 6, fill: bool = True) -> tuple[Any, Any, Tensor]:
    """(model, its bottleneck, input) in float64."""
    model = One(nn.Linear(width, width)).double()
    lp.inject(model, method, dtype=F64)
    (a,) = bottlenecks(model).values()
    for p in a.parameters() if fill else ():
        nn.init.normal_(p)
    return model.eval(), a, torch.randn(4, width, dtype=F64)


HERE: dict[str, Any] = {"targets": ("layer",), "bottleneck": 3}


@pytest.mark.parametrize("name", NONLINEARITIES)
def test_nonlinearities(name: str) -> None:
    f = {"relu": lambda x: x.clamp(min=0), "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
         "silu": lambda x: x / (1 + torch.exp(-x)), "tanh": torch.tanh}[name]  # fmt: skip
    model, a, x = one(PfeifferAdapter(**HERE, nonlinearity=name))
    y = model.layer.unadapted(x)
    torch.testing.assert_close(model(x), y + delta(a, y, f, 1.0))


def test_sequential_reads_the_output_parallel_the_input() -> None:
    for method, moves in ((HoulsbyAdapter(**HERE, train_norms=False), True), (ParallelAdapter(**HERE), False)):
        model, _, x = one(method)
        added = model(x) - model.layer.unadapted(x)
        with torch.no_grad():
            model.layer.weight.add_(1.0)
        again = model(x) - model.layer.unadapted(x)
        assert torch.allclose(added, again) is not moves


@pytest.mark.parametrize("cls", [ParallelAdapter, HoulsbyAdapter, PfeifferAdapter])
def test_scale_multiplies_all_that_is_added_its_bias_included(cls: Any) -> None:
    options = HERE | ({"train_norms": False} if cls is HoulsbyAdapter else {})
    added = {}
    for scale in (1.0, 2.0, "learned", "channel"):
        torch.manual_seed(0)
        model, a, x = one(cls(**options, scale=scale))
        with torch.no_grad():
            if isinstance(scale, str):
                assert a.scale.shape == ((1,) if scale == "learned" else (6,))
                a.scale.copy_(torch.tensor([2.0]) if scale == "learned" else torch.arange(6.0))
            for n, p in a.named_parameters():
                if n != "scale":
                    p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
            added[scale] = model(torch.ones_like(x)) - model.layer.unadapted(torch.ones_like(x))
    torch.testing.assert_close(added[2.0], 2 * added[1.0])
    torch.testing.assert_close(added["learned"], 2 * added[1.0])
    torch.testing.assert_close(added["channel"], added[1.0] * torch.arange(6.0, dtype=F64))
    model, a, _ = one(cls(**options, scale="channel"), fill=False)
    assert torch.equal(a.scale, torch.ones(6, dtype=F64))


def test_dropout_lies_in_the_middle_and_in_training_alone() -> None:
    model, a, x = one(ParallelAdapter(**HERE, scale=1.0, dropout=0.5, nonlinearity="gelu"))
    y = model.layer.unadapted(x)
    torch.testing.assert_close(model(x), y + delta(a, x, F.gelu, 1.0))
    model.train()
    torch.manual_seed(3)
    got = model(x)
    torch.manual_seed(3)
    h = F.dropout(F.gelu(x @ a.down.T + a.down_bias), 0.5)
    assert (h == 0).any()
    torch.testing.assert_close(got, y + h @ a.up.T + a.up_bias)


def test_size_by_reduction_factor_is_at_least_one() -> None:
    for width, want in ((32, 2), (8, 1), (40, 2)):
        _, a, _ = one(PfeifferAdapter(targets=("layer",)), width)
        assert a.down.shape == (want, width) and a.up.shape == (width, want)


def test_two_adapters_stack_in_the_order_they_were_attached() -> None:
    model = One(nn.Linear(6, 6)).double()
    lp.inject(model, [PfeifferAdapter(**HERE, name="inner"), PfeifferAdapter(**HERE, name="outer")], dtype=F64)
    a = model.layer.adapters
    for p in a.parameters():
        nn.init.normal_(p)
    x = torch.randn(4, 6, dtype=F64)
    y = model.layer.unadapted(x)
    y = y + delta(a["inner"], y, F.relu, 1.0)
    torch.testing.assert_close(model(x), y + delta(a["outer"], y, F.relu, 1.0))


def test_of_several_outputs_only_the_first_changes() -> None:
    base = gpt2()
    base.config._attn_implementation = "eager"
    model = filled(copy.deepcopy(base), HoulsbyAdapter(bottleneck=3, train_norms=False))
    ids = text()["input_ids"]
    ours, theirs = (m(ids, output_attentions=True, output_hidden_states=True) for m in (model, base))
    assert torch.equal(ours.attentions[0], theirs.attentions[0])
    assert not torch.allclose(ours.hidden_states[1], theirs.hidden_states[1], atol=1e-3)


@pytest.mark.parametrize("make", [bert, t5, gpt2])
def test_the_adapter_reads_what_comes_out_of_the_block_s_dropout(make: Any) -> None:
    """With everything dropped h is 0, and what the adapter adds is not dropped: f(b_D) U^T + b_U at every place."""
    model = make()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)  # biases too: no layer returns 0
    filled(model, HoulsbyAdapter(bottleneck=3, train_norms=False, places=("mlp",)))
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 1.0
    seen: dict[str, Tensor] = {}
    for name in bottlenecks(model):
        host = model.get_submodule(name)
        host.register_forward_hook(lambda m, i, o, n=name: seen.setdefault(n, o))
    model.train()(**(sentences() if make is bert else text()))
    for name, a in bottlenecks(model).items():
        want = F.gelu(a.down_bias) @ a.up.T + a.up_bias
        torch.testing.assert_close(seen[name], want.expand_as(seen[name]))


# ---- AdaptFormer's card --------------------------------------------------------------------------------------------


def worked(x: list[float], **options: Any) -> Tensor:
    """u of the card's worked example, in a block whose norm and MLP are arbitrary."""
    block = Block()
    lp.inject(block, AdaptFormer(r=2, dropout=0.0, targets=("norm",), **{"scale": 0.1} | options))
    (a,) = bottlenecks(block).values()
    with torch.no_grad():
        a.down.copy_(torch.tensor([[1.0, -1.0], [0.5, 0.5]]))
        a.up.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        x1 = torch.tensor([x])
        return block.inner(x1) - block.inner.unadapted(x1)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()


def test_adaptformer_by_hand() -> None:
    close = torch.testing.assert_close
    close(worked([2.0, 1.0]), torch.tensor([[0.4, 0.15]]), atol=1e-6, rtol=0)
    close(worked([20.0, 10.0]), torch.tensor([[4.0, 1.5]]), atol=1e-5, rtol=0)  # the norm's output would be the same
    close(worked([2.0, 1.0], scale=0.2), torch.tensor([[0.8, 0.3]]), atol=1e-6, rtol=0)


def test_adaptformer_sequential_reads_the_mlp_parallel_does_not() -> None:
    for option, moves in (("parallel", False), ("sequential", True)):
        vit = hf.ViTModel(hf.ViTConfig(**IMAGE)).eval()
        model = filled(vit, AdaptFormer(r=3, dropout=0.0, option=option, scale=1.0))
        block, x = model.layers[0], torch.randn(2, 5, 32)
        with torch.no_grad():
            added = []
            for _ in range(2):
                with lp.disabled(model):
                    plain = block(x)
                added.append(block(x) - plain)
                block.mlp.fc2.weight.add_(1.0)
        assert torch.allclose(*added, atol=1e-4) is not moves
    mlp, a = block.mlp, bottlenecks(block)["mlp"]
    h = mlp.unadapted(x)
    torch.testing.assert_close(mlp(x), h + delta(a, h, F.relu, 1.0))


@pytest.mark.parametrize("norm", ["in", "out"])
def test_adaptformer_s_own_layer_norm(norm: str) -> None:
    method = AdaptFormer(r=3, dropout=0.0, option="sequential", targets=("layer",), layer_norm=norm)
    model, a, x = one(method, fill=False)
    y = model.layer.unadapted(x)
    assert torch.equal(model(x), y)
    for p in a.parameters():
        nn.init.normal_(p)
    ln = lambda z: F.layer_norm(z, (6,)) * a.norm_weight + a.norm_bias  # noqa: E731
    want = delta(a, ln(y), F.relu, 0.1) if norm == "in" else ln(delta(a, y, F.relu, 0.1))
    torch.testing.assert_close(model(x), y + want)


def test_adaptformer_adds_behind_the_block_s_dropout() -> None:
    model = filled(hf.ViTModel(hf.ViTConfig(**IMAGE, hidden_dropout_prob=1.0)), METHODS["adaptformer"]).train()
    block, x = model.layers[0], torch.randn(2, 5, 32)
    (a,) = bottlenecks(block).values()
    torch.testing.assert_close(block(x), x + delta(a, x, F.relu, 0.1))  # attention and MLP are dropped, u is not


# ---- Houlsby's norms -----------------------------------------------------------------------------------------------


def test_houlsby_trains_the_norms_without_weight_decay() -> None:
    model = bert()
    method = HoulsbyAdapter(bottleneck=3)
    lp.inject(model, method)
    norms = {n: p for n, p in model.named_parameters() if "LayerNorm" in n}
    assert len(norms) == 10 and all(p.requires_grad for p in norms.values())
    others = [n for n, p in model.named_parameters() if p.requires_grad and n not in norms and "adapters" not in n]
    (group,) = method.param_groups(model) or []
    assert not others and group["weight_decay"] == 0.0
    assert {id(p) for p in group["params"]} == {id(p) for p in norms.values()}
    upper = bert()
    lp.inject(upper, HoulsbyAdapter(bottleneck=3, layers="1"))
    trained = {n for n, p in upper.named_parameters() if p.requires_grad and "adapters" not in n}
    assert trained == {n for n in norms if ".layer.1." in n}
    plain = bert()
    lp.inject(plain, METHODS["houlsby"])
    assert not any(p.requires_grad for n, p in plain.named_parameters() if "adapters" not in n)
    assert METHODS["houlsby"].param_groups(plain) is None


# ---- generation, checkpointing, copies -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [gpt2, llama, t5, bart])
def test_generation_with_a_cache_is_the_one_without(make: Any, method: str) -> None:
    base = make()
    model = filled(copy.deepcopy(base), METHODS[method])
    ids = torch.randint(3, 60, (2, 4))
    out = {}
    for cached in (True, False):
        out[cached] = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, do_sample=False,
            use_cache=cached, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
    assert torch.equal(out[True].sequences, out[False].sequences)
    torch.testing.assert_close(torch.stack(out[True].logits), torch.stack(out[False].logits), atol=1e-4, rtol=1e-4)
    with lp.disabled(model):
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, pad_token_id=0)
    assert torch.equal(plain, base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, pad_token_id=0))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [bert, llama, bart, t5])
def test_gradient_checkpointing(make: Any, method: str, reentrant: bool) -> None:
    model = filled(make(), METHODS[method])
    batch, grads = sentences() if make is bert else text(), {}
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    model.config.dropout = 0.0
    model.train()
    for m in model.modules():
        if isinstance(getattr(m, "dropout", None), float):
            m.dropout = 0.0
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**batch).loss.backward()
        grads[on] = [p.grad.clone() for a in bottlenecks(model).values() for p in a.parameters()]
    for a, b in zip(grads[False], grads[True], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    slots = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Slot)]
    assert all(s.seen is None for s in slots)
    copy.deepcopy(model)  # nothing of the graph is held


def test_a_copy_has_a_slot_of_its_own() -> None:
    model = filled(bart(), METHODS["parallel"])
    other = copy.deepcopy(model)
    batch = text()
    want = model(**batch).logits
    slots = [{id(v) for x in m.modules() for v in vars(x).values() if isinstance(v, Slot)} for m in (model, other)]
    assert not slots[0] & slots[1] and len(slots[0]) == len(slots[1]) == 4
    model.model.encoder.layers[0].fc1.adapters["parallel_adapter"] = Tap("input", Slot())  # the copy does not read it
    assert torch.equal(other(**batch).logits, want)


@dataclass(frozen=True, kw_only=True)
class Both(lp.Method):
    """Of methods as fields."""

    traits = lp.Traits(family="hybrid", hosts=("module", "linear"))
    name: str = "both"
    adapter: ParallelAdapter = field(default_factory=lambda: ParallelAdapter(bottleneck=3))
    lora: LoRA = field(default_factory=lambda: LoRA(r=2, targets=("attention",)))

    def inject(self, model: nn.Module, stats: Any = None) -> None:
        self.lora.inject(model)
        self.adapter.inject(model)


def test_a_method_made_of_others_is_these_side_by_side(tmp_path: Path) -> None:
    base, batch = bart(), text()
    both, apart = copy.deepcopy(base), copy.deepcopy(base)
    filled(both, Both())
    lp.inject(apart, [LoRA(r=2, targets=("attention",)), ParallelAdapter(bottleneck=3)])
    apart.load_state_dict(both.state_dict())
    assert torch.equal(apart(**batch).logits, both(**batch).logits)
    lp.save(both, tmp_path / "both")
    other = lp.load(copy.deepcopy(base), tmp_path / "both", methods=[Both()])
    assert torch.equal(other(**batch).logits, both(**batch).logits)


# ---- bad input -----------------------------------------------------------------------------------------------------

COMMON: list[tuple[dict[str, Any], str]] = [
    ({"bottleneck": 0}, "bottleneck is at least 1, got 0"),
    ({"reduction_factor": 0}, "reduction_factor is at least 1, got 0"),
    ({"bottleneck": 4, "reduction_factor": 3}, "bottleneck=4 says the size, so reduction_factor has no effect"),
    ({"nonlinearity": "relo"}, "nonlinearity 'relo' is none of .*nearest: 'relu'"),
    ({"scale": "learnt"}, "scale is a number or one of .*'learnt'; nearest: 'learned'"),
    ({"scale": 0.0}, "scale must be positive"),
    ({"dropout": 1.0}, "dropout is a probability below 1, got 1.0"),
    ({"init_std": -1.0}, "init_std is a standard deviation"),
]
PLACED: list[tuple[dict[str, Any], str]] = [
    ({"places": ()}, "places are some of .* got"),
    ({"places": ("mlps",)}, "places are some of .*'mlps'.*nearest: 'mlp'"),
    ({"places": ("attention",), "targets": ("x",)}, "targets say where, so places has no effect"),
]


BAD = [(c, *row) for c in (HoulsbyAdapter, PfeifferAdapter, ParallelAdapter) for row in COMMON]


@pytest.mark.parametrize(
    ("cls", "options", "message"), BAD + [(c, *r) for c in BAD[0][:1] + BAD[-1][:1] for r in PLACED]
)
def test_bad_options(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{cls.name}: {message}"):
        cls(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r is at least 1, got 0"),
        ({"scale": -0.1}, "scale must be positive"),
        ({"dropout": -0.1}, "dropout is a probability"),
        ({"option": "paralel"}, "option 'paralel' is none of .*nearest: 'parallel'"),
        ({"layer_norm": "inn"}, "layer_norm 'inn' is none of .*nearest: 'in'"),
    ],
)
def test_bad_options_of_adaptformer(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"adaptformer: {message}"):
        AdaptFormer(**options)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_blocks_and_a_target_that_matches_nothing(method: str) -> None:
    with pytest.raises(ValueError, match=f"{METHODS[method].name}: this Sequential has no stack of blocks"):
        lp.inject(nn.Sequential(nn.Linear(2, 2)), METHODS[method])
    cls = type(METHODS[method])
    with pytest.raises(ValueError, match="no Module matches '\\*.mlpp'; nearest: .*'mlp"):
        lp.inject(gpt2(), cls(targets=("*.mlpp",)))
    with pytest.raises(ValueError, match="layers '5' choose no block"):
        lp.inject(gpt2(), cls(layers="5"))


def test_targets_of_adaptformer_are_norms_in_a_block() -> None:
    with pytest.raises(ValueError, match="adaptformer: target 'transformer.h.0.mlp' is no norm inside a block"):
        lp.inject(gpt2(), AdaptFormer(targets=("*.mlp",)))
    with pytest.raises(ValueError, match="a Sequential, holds no linear layer or norm to tell its width by"):
        lp.inject(nn.Sequential(nn.Sequential(nn.ReLU())), PfeifferAdapter(targets=("0",)))


def test_attention_that_cannot_be_seen_is_named() -> None:
    with pytest.raises(ValueError, match="houlsby_adapter: no attention is recognised in 'layers.0' .*TransformerEnc"):
        lp.inject(torch_stack(False), HoulsbyAdapter())


def test_merging_is_refused() -> None:
    for method in METHODS.values():
        model = gpt2()
        lp.inject(model, method)
        with pytest.raises(ValueError, match=f"{method.name} cannot be merged"):
            lp.merge(model)
