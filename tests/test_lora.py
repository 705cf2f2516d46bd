"""LoRA: the checks of its card (methods/lora.md) by their numbers, every host kind against dense float64 references."""

import copy
import functools
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning_peft_plugins.reparameterized.lora import LoRA
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import lightning_peft as lp
from lightning_peft.optim import regroup
from tests.nets import bert, llama

F64 = torch.float64
Make = Callable[[], nn.Module]

CONV_OPTIONS: tuple[dict[str, Any], ...] = (
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": 2, "bias": False},
    {"groups": 2, "padding": 1},
    {"groups": 4, "stride": 2, "dilation": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "circular", "groups": 2},
    {"padding": 1, "padding_mode": "replicate", "dilation": 2, "stride": 2},
    {"padding": "same", "padding_mode": "reflect"},
)
CONVS: dict[str, Make] = {
    f"{kind.__name__} {' '.join(f'{k}={v}' for k, v in options.items())}": functools.partial(kind, 8, 12, 3, **options)
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for options in CONV_OPTIONS
}
HOSTS: dict[str, Make] = {
    "Linear": lambda: nn.Linear(6, 10),
    "Linear, no bias": lambda: nn.Linear(10, 6, bias=False),
    "Conv1D": lambda: Conv1D(10, 6),
    "Embedding": lambda: nn.Embedding(20, 8),
    "Embedding, padding_idx": lambda: nn.Embedding(20, 8, padding_idx=0),
    "Gemma's": lambda: Gemma3TextScaledWordEmbedding(20, 8, padding_idx=0, embed_scale=8**0.5),
    "Bart's": lambda: BartScaledWordEmbedding(20, 8, padding_idx=1, embed_scale=3.0),
    "Conv2d, kernel (3, 5)": lambda: nn.Conv2d(8, 12, (3, 5), stride=(1, 2), padding=(2, 1)),
    **CONVS,
}


class One(nn.Module):
    """A model that is one layer, for targets go by name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


def one(layer: nn.Module, dtype: torch.dtype = torch.float32, fill: bool = True, **options: Any) -> Any:
    """``layer`` with LoRA of rank 4, its zero factor filled."""
    model = One(layer)
    lp.inject(model, LoRA(**{"r": 4, "targets": ("layer",)} | options), dtype=dtype)
    if fill:
        for _, _, adapter in lp.adapters(model):
            for p in adapter.parameters():
                nn.init.normal_(p)
    return model


def adapter_of(model: nn.Module) -> Any:
    return next(iter(lp.adapters(model)))[2]


def inputs(layer: Any, dtype: torch.dtype = F64) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.tensor([[0, 1, 5, 19], [7, 7, 0, 2]])
    if hasattr(layer, "kernel_size"):
        return torch.randn(2, 8, *[9] * len(layer.kernel_size), dtype=dtype)
    width = layer.in_features if isinstance(layer, nn.Linear) else layer.nx
    return torch.randn(2, 5, width, dtype=dtype)


def delta(layer: Any, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """What LoRA adds to the stored weight, written out group by group."""
    if isinstance(layer, nn.Linear):
        return scale * B @ A
    if not hasattr(layer, "groups"):
        return scale * (B @ A).T
    g, blocks = layer.groups, []
    for a, b in zip(A.chunk(g), B.chunk(g), strict=True):  # (r / g, in / g * kernel), (out / g, r / g)
        blocks.append(torch.einsum("or,ri->oi", b, a))
    return scale * torch.cat(blocks).reshape(layer.weight.shape)


def close(got: Tensor, want: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


@torch.no_grad()
def same_as_dense(model: nn.Module, layer: Any, adapter: Any, reference: nn.Module, x: Tensor) -> None:
    """The adapted ``layer`` in ``model`` is ``reference`` by its forward, its definition and merged; undone bitwise."""
    want, fast = reference(x), model(x)
    assert (want - layer.unadapted(x)).abs().max() > 0.1
    close(fast, want)
    close(lp.WeightAdapter.forward(adapter, lp.Base(layer), x), want)
    before = layer.weight.clone()
    merged = lp.merge(model)
    close(layer.weight, reference.weight)
    close(model(x), want)
    merged.undo()
    assert torch.equal(layer.weight, before) and torch.equal(model(x), fast)


@pytest.mark.parametrize("kind", HOSTS)
def test_1_the_start_is_the_base_bit_for_bit(kind: str) -> None:
    layer = HOSTS[kind]()
    x = inputs(layer, torch.float32)
    want = layer(x)
    model = one(layer, fill=False)
    assert torch.equal(model(x), want)
    zero, drawn = ("A", "B") if isinstance(layer, nn.Embedding) else ("B", "A")
    a = adapter_of(model)
    assert getattr(a, zero).abs().max() == 0 and getattr(a, drawn).abs().min() > 0
    if drawn == "A":  # U(-1/sqrt(fan-in), 1/sqrt(fan-in))
        assert 0.8 < getattr(a, drawn).abs().max() * math.sqrt(a.A.shape[1]) <= 1
    else:
        assert 0.8 < a.B.std() < 1.3


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("rslora", [False, True])
def test_1_forward_weight_and_merge_are_the_dense_map(kind: str, rslora: bool) -> None:
    layer: Any = HOSTS[kind]().double()
    x, reference = inputs(layer), copy.deepcopy(layer)
    model = one(layer, F64, alpha=3.0, rslora=rslora)
    a = adapter_of(model)
    with torch.no_grad():
        reference.weight += delta(layer, a.A, a.B, 3.0 / (2.0 if rslora else 4.0))
        want, fast = reference(x), model(x)
        assert (want - layer.unadapted(x)).abs().max() > 0.1
        close(fast, want)
        close(lp.WeightAdapter.forward(a, lp.Base(layer), x), want)  # by the definition, never the fast path
        before = layer.weight.clone()
        merged = lp.merge(model)
        assert not list(lp.adapters(model))
        close(layer.weight, reference.weight)
        close(model(x), want)
        merged.undo()
        assert torch.equal(layer.weight, before)
        assert torch.equal(model(x), fast)


@pytest.mark.parametrize("kind", HOSTS)
def test_1_gradients_are_those_of_the_dense_map(kind: str) -> None:
    layer = HOSTS[kind]().double()
    x = inputs(layer)
    model = one(layer, F64)
    if (pad := getattr(layer, "padding_idx", None)) is not None:
        nn.init.zeros_(adapter_of(model).A[:, pad])  # where it starts, and stays for want of a gradient
    factors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    tangible = [x.requires_grad_(True)] if x.is_floating_point() else []
    loss = model(x).sin().sum()
    fast = torch.autograd.grad(loss, [*factors.values(), *tangible])
    slow = torch.autograd.grad(
        lp.WeightAdapter.forward(adapter_of(model), lp.Base(layer), x).sin().sum(), [*factors.values(), *tangible]
    )
    assert len(factors) == 2
    for f, s in zip(fast, slow, strict=True):
        torch.testing.assert_close(f, s, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding", "Gemma's", *list(CONVS)[9:14]])
def test_1_gradients_by_finite_differences(kind: str) -> None:
    layer = HOSTS[kind]().double()
    x = inputs(layer)[1:] + 1 if isinstance(layer, nn.Embedding) else inputs(layer)[:1]  # ids without padding
    model = one(layer, F64, r=4 if hasattr(layer, "groups") else 2)
    factors = {n: p.detach().requires_grad_(True) for n, p in model.named_parameters() if p.requires_grad}

    def f(*values: Tensor) -> Tensor:
        return functional_call(model, dict(zip(factors, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, tuple(factors.values()), fast_mode=True)


def worked(**options: Any) -> Any:
    layer = nn.Linear(2, 2, bias=False)
    model = one(layer, **options)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        adapter_of(model).A.copy_(torch.tensor([[1.0, 0.0]]))
        adapter_of(model).B.copy_(torch.tensor([[0.5], [-1.0]]))
    return model


def test_2_by_hand() -> None:
    model = worked(alpha=2.0, r=1)
    x = torch.tensor([[1.0, 1.0]])
    assert model(x).tolist() == [[4.0, 5.0]]
    with lp.disabled(model):
        assert model(x).tolist() == [[3.0, 7.0]]
    assert adapter_of(model).weight(torch.zeros(2, 2)).tolist() == [[1.0, 0.0], [-2.0, 0.0]]
    lp.merge(model)
    assert model.layer.weight.tolist() == [[2.0, 2.0], [1.0, 4.0]]


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", *list(CONVS)[:4]])
def test_3_first_step(kind: str) -> None:
    layer = HOSTS[kind]()
    model = one(layer, fill=False)
    model(inputs(layer, torch.float32)).pow(2).sum().backward()
    a = adapter_of(model)
    assert a.A.grad.abs().max() == 0 and a.B.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for n, p in model.named_parameters() if "adapters" not in n)


def test_3_first_step_of_an_embedding_moves_the_other_factor() -> None:
    layer = nn.Embedding(20, 8, padding_idx=0)
    model = one(layer, fill=False)
    model(torch.tensor([[0, 3, 3]])).pow(2).sum().backward()
    a = adapter_of(model)
    assert a.B.grad.abs().max() == 0
    assert a.A.grad.abs().sum(0).nonzero().flatten().tolist() == [3]  # nothing for the padding row


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"alpha": 16.0, "r": 64}, 0.25),
        ({"alpha": 16.0, "r": 64, "rslora": True}, 2.0),
        ({"alpha": 32.0, "r": 64}, 0.5),
        ({}, 4.0),
        ({"r": 64, "rank_pattern": {"layer": 16}}, 1.0),
        ({"r": 64, "rank_pattern": {"layer": 16}, "rslora": True, "alpha_pattern": {"*": 2.0}}, 0.5),
    ],
)
def test_4_scale(options: Any, scale: float) -> None:
    assert adapter_of(one(nn.Linear(64, 64), **options)).scale == scale


def test_4_another_alpha_at_load_is_another_scale() -> None:
    old, new = worked(alpha=2.0, r=1), worked(alpha=6.0, r=1)
    new.load_state_dict(old.state_dict())
    assert new(torch.tensor([[1.0, 1.0]])).tolist() == [[6.0, 1.0]]  # base [3, 7] + 3 [1, -2]


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", *list(CONVS)[2:5]])
def test_6_dropout_rests_in_evaluation_and_never_reaches_the_base(kind: str) -> None:
    layer = HOSTS[kind]()
    x = inputs(layer, torch.float32)
    base: Any = layer(x)
    model = one(layer, dropout=0.9, fill=False).train()
    assert torch.equal(model(x), base)  # B is zero: what is left is the base path, undropped
    nn.init.ones_(adapter_of(model).B)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_6_dropout_scales_what_it_keeps() -> None:
    layer: Any = nn.Linear(8, 8, bias=False)
    model = one(layer, r=8, alpha=8.0, dropout=0.75).train()
    with torch.no_grad():
        adapter_of(model).A.copy_(torch.eye(8))
        adapter_of(model).B.copy_(torch.eye(8))
    x = torch.ones(500, 8)
    branch = model(x) - layer.unadapted(x)
    kept = branch > 2
    close(branch, 4.0 * kept, atol=1e-5)  # each element is 0 or x / (1 - p)
    assert 0.2 < kept.float().mean() < 0.3


@pytest.mark.parametrize(
    ("make", "r", "count"),
    [
        (lambda: nn.Linear(6, 10), 4, 64),
        (lambda: Conv1D(10, 6), 4, 64),
        (lambda: nn.Embedding(20, 8), 4, 112),
        (lambda: nn.Conv2d(4, 6, (3, 5)), 4, 264),
        (lambda: nn.Conv2d(4, 6, (3, 5), groups=2), 4, 4 * 2 * 15 + 6 * 2),
        (lambda: nn.Conv1d(8, 8, 3, groups=8), 8, 8 * 1 * 3 + 8 * 1),
    ],
)
def test_8_parameter_counts(make: Make, r: int, count: int) -> None:
    model = one(make(), r=r)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_8_llama_3_8b() -> None:
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    lp.inject(model, LoRA(r=16))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 41_943_040 and len(trained) == 2 * 32 * 7
    assert all(p.is_meta for p in trained)


def test_gaussian_start() -> None:
    a = adapter_of(one(nn.Linear(4000, 50), r=10, init="gaussian", fill=False))
    assert a.B.abs().max() == 0
    assert (
        float(a.A.detach().std()) == pytest.approx(0.1, rel=0.05) and float(a.A.detach().abs().max()) > 0.3
    )  # a uniform A would end at 0.17


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda o: None,
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=40),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5),
            torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=40),
        ],
        milestones=[5],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_lora_plus_keeps_its_ratio_under_a_scheduler(name: str) -> None:
    """Against an untouched optimizer under the same scheduler: B's rate is 16 times its, all else keeps it."""
    model = bert()
    method = LoRA(r=2, targets=("query", "word_embeddings"), lora_plus_ratio=16.0)
    lp.inject(model, method, train=("classifier",))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, plain = (
        torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.3),
        torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1e-3),
    )
    scheduler, reference = SCHEDULERS[name](optimizer), SCHEDULERS[name](plain)
    regroup([optimizer], [scheduler] if scheduler else [], method, model)

    groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(trained) == len(groups)
    assert all(g["weight_decay"] == 0.3 for g in optimizer.param_groups)
    held = {n: a for n, _, a in lp.adapters(model)}
    rates = []
    for _ in range(20):
        rate = plain.param_groups[0]["lr"]
        rates.append(rate)
        for n, a in held.items():
            want = (1e-6 * rate / 1e-3,) * 2 if "embeddings" in n else (rate, 16 * rate)
            if name == "one cycle" and "embeddings" in n:
                want = (1e-6 * rate / 1e-2,) * 2  # 1e-6 where the rate peaks
            assert (groups[id(a.A)]["lr"], groups[id(a.B)]["lr"]) == pytest.approx(want, rel=1e-6)
        assert groups[id(model.classifier.weight)]["lr"] == pytest.approx(rate)
        optimizer.step()
        plain.step()
        for s in (scheduler, reference):
            if s:
                s.step()
    assert name == "none" or len(set(rates)) == 20


def test_without_lora_plus_the_optimizer_is_left_alone() -> None:
    model = bert()
    lp.inject(model, method := LoRA(targets=("query",)))
    assert method.param_groups(model) is None


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding", "Gemma's", *list(CONVS)[8:12]])
def test_factors_stay_float32_over_a_bf16_base(kind: str) -> None:
    layer = HOSTS[kind]().to(torch.bfloat16)
    model = one(layer)
    x = inputs(layer, torch.bfloat16)
    for _ in range(2):
        assert {p.dtype for p in adapter_of(model).parameters()} == {torch.float32}
        y = model(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert adapter_of(model).A.grad.dtype == torch.float32
        model.to(torch.bfloat16)  # as Trainer(precision="bf16-true") does
    with torch.no_grad():
        reference: Any = copy.deepcopy(layer).float()
        assert (
            y.float() - reference(x if isinstance(layer, nn.Embedding) else x.float())
        ).abs().max() < 0.1 * y.abs().max()


def test_autocast() -> None:
    model = one(nn.Linear(6, 10))
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x), atol=0.1, rtol=0.05)


def ranks(model: nn.Module) -> dict[str, int]:
    held: list[tuple[str, Any]] = [(n, a) for n, _, a in lp.adapters(model)]
    return {n.removeprefix("model.layers."): len(a.A) for n, a in held}


def test_patterns_and_exclusions() -> None:
    model = llama()
    lp.inject(
        model,
        LoRA(
            r=4,
            exclude=("mlp", "k_proj"),
            rank_pattern={"*.1.*.v_proj": 6, "v_proj": 2},  # the first that matches counts
            alpha_pattern={"q_proj": 4.0},
        ),
    )
    ranks, scales = of_layers(model)
    assert ranks == {
        "0.self_attn.q_proj": 4,
        "0.self_attn.v_proj": 2,
        "0.self_attn.o_proj": 4,
        "1.self_attn.q_proj": 4,
        "1.self_attn.v_proj": 6,
        "1.self_attn.o_proj": 4,
    }
    assert scales["0.self_attn.q_proj"] == 1.0 and scales["0.self_attn.v_proj"] == 8.0
    assert scales["1.self_attn.o_proj"] == 4.0 and scales["1.self_attn.v_proj"] == 16 / 6


def of_layers(model: nn.Module) -> tuple[dict[str, int], dict[str, float]]:
    held: dict[str, Any] = {n.removeprefix("model.layers."): a for n, _, a in lp.adapters(model)}
    return {n: len(a.A) for n, a in held.items()}, {n: a.scale for n, a in held.items()}


def test_layer_ranges() -> None:
    model = llama()
    lp.inject(model, LoRA(targets=("q_proj",), layers="-1:"))
    assert of_layers(model)[0] == {"1.self_attn.q_proj": 8}


def test_a_rank_past_the_smaller_side_is_clamped_aloud() -> None:
    with pytest.warns(UserWarning, match="layer: r=8 clamped to its smaller side 3"):
        a = adapter_of(one(nn.Linear(20, 3), r=8))
    assert a.A.shape == (3, 20) and a.B.shape == (3, 3) and a.scale == 16 / 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(adapter_of(one(nn.Linear(20, 3), rank_pattern={"layer": 8})).A) == 8  # asked for by name


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"r": 0}, "rank of at least 1, got r=0"),
        ({"rank_pattern": {"q_proj": 0}}, "rank of at least 1, got q_proj=0"),
        ({"alpha": 0.0}, "alpha must be positive, got alpha=0.0"),
        ({"alpha_pattern": {"q_proj": -1.0}}, "alpha must be positive, got q_proj=-1.0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "dropout must lie in"),
        ({"init": "pissa"}, "init must be 'default' or 'gaussian', got 'pissa'"),
        ({"lora_plus_ratio": 0.0}, "lora_plus_ratio must be positive, got 0.0"),
    ],
)
def test_bad_hyper_parameters(options: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LoRA(**options)


@pytest.mark.parametrize(
    ("layer", "options", "says"),
    [
        (nn.Conv2d(8, 8, 3, groups=4), {"r": 6}, "layer: r=6 must be a multiple of its 4 groups"),
        (nn.Embedding(9, 4, max_norm=1.0), {}, "an embedding with max_norm rescales its rows"),
        (nn.Linear(8, 8), {"rank_pattern": {"lair": 2}}, "'lair' matches none of the 1 target layers"),
        (nn.Linear(8, 8), {"alpha_pattern": {"lair": 2.0}}, "'lair' matches none"),
        (nn.Linear(8, 8), {"targets": ("lair",)}, "matches 'lair'; nearest: 'layer'"),
        (nn.LSTM(4, 4), {}, "no linear or conv1d or embedding or conv matches 'layer'"),
        (nn.MultiheadAttention(8, 2), {}, "matches 'layer'"),
        (nn.MultiheadAttention(8, 2), {"targets": ("out_proj",)}, "never calls its projections"),
    ],
)
def test_layers_that_cannot_be_adapted(layer: nn.Module, options: Any, says: str) -> None:
    keys = set(layer.state_dict())
    with pytest.raises(ValueError, match=says):
        one(layer, **options)
    assert set(layer.state_dict()) == keys


def test_attention_of_torch_cannot_be_attached_to_by_hand() -> None:
    a = adapter_of(one(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match="MultiheadAttention has none of"):
        lp.attach(nn.MultiheadAttention(8, 2), "lora", a)


def test_tied_weights_do_not_merge() -> None:
    model = llama(tie_word_embeddings=True)
    lp.inject(model, LoRA(targets=("embed_tokens",)))
    before = model.lm_head.weight.clone()
    with pytest.raises(ValueError, match="'model.embed_tokens' is tied to another module's.*untie"):
        lp.merge(model)
    assert torch.equal(model.lm_head.weight, before) and len(list(lp.adapters(model))) == 1


@pytest.mark.parametrize("nested", [False, True])
def test_torch_s_fused_encoder_uses_the_adapters(nested: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x, hidden = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    with torch.no_grad():
        base = model(x, src_key_padding_mask=hidden)
        lp.inject(model, LoRA(targets=("linear1", "linear2")))
        for _, _, a in lp.adapters(model):
            for p in a.parameters():
                nn.init.normal_(p)
        adapted = model(x, src_key_padding_mask=hidden)
        lp.merge(model)
        merged = model(x, src_key_padding_mask=hidden)  # fused again, with the weights changed
    assert (adapted - base)[~hidden].abs().max() > 0.1
    close(adapted[~hidden], merged[~hidden], atol=1e-5)


def filled_bert(**options: Any) -> Any:
    model = bert()
    lp.inject(model, LoRA(**{"r": 4, "dropout": 0.1} | options), train=("classifier",))
    for _, _, a in lp.adapters(model):
        for p in a.parameters():
            nn.init.normal_(p, std=0.2)
    return model.eval()


IDS = torch.tensor([[1, 4, 9, 33], [2, 5, 5, 60]])


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save])
def test_copies_are_whole_and_apart(copied: Callable[[Any], Any]) -> None:
    model = filled_bert()
    want = model(IDS).logits
    twin = copied(model)
    assert torch.equal(twin(IDS).logits, want)
    assert [n for n, p in twin.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    for _, _, a in lp.adapters(twin):
        nn.init.zeros_(a.B)  # type: ignore[arg-type]
    assert torch.equal(model(IDS).logits, want) and not torch.equal(twin(IDS).logits, want)
    lp.remove(twin)
    assert type(twin) is type(bert()) and not list(lp.adapters(twin)) and list(lp.adapters(model))


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        *((kind, "aot_eager") for kind in ("Linear", "Gemma's", "Conv1D", *list(CONVS)[10:13])),
        *(pytest.param(kind, "inductor", marks=pytest.mark.slow) for kind in ("Linear", "Conv2d groups=2 padding=1")),
    ],
)
def test_compiled_whole(kind: str, backend: str) -> None:
    torch.compiler.reset()
    layer = HOSTS[kind]()
    model = one(layer, dropout=0.0)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = inputs(layer, torch.float32)
    got, want = compiled(x), model(x)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    a = adapter_of(model)
    mine, theirs = (torch.autograd.grad(y.pow(2).sum(), [a.A, a.B]) for y in (got, want))
    for g, w in zip(mine, theirs, strict=True):
        torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-4)


def test_a_sparse_embedding_trains() -> None:
    """nn.Embedding(sparse=True) asks for sparse gradients of what it looks up; A is looked up the same way."""
    layer = nn.Embedding(20, 8, sparse=True)
    model = one(layer)
    dense = one(nn.Embedding(20, 8))
    dense.load_state_dict(model.state_dict())
    for m in (model, dense):
        m(torch.tensor([3, 3, 7])).pow(2).sum().backward()
    grad = adapter_of(model).A.grad
    close(grad.to_dense() if grad.is_sparse else grad, adapter_of(dense).A.grad, atol=1e-6)
