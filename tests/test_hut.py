"""HUT: the checks of its card by their numbers, dense float64 references."""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_peft_plugins.additive.ia3 import IA3
from lightning_peft_plugins.reparameterized.hut import HUT, HUTLinear
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import lightning_peft as lp
from lightning_peft import biases, hosts, io
from lightning_peft.proof import captured, prove
from tests import test_hf
from tests.nets import llama
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs
from tests.zoo import bases as zoo

KINDS = ["Linear", "Linear, no bias", "Conv1D"]  # 10 x 6, 6 x 10, 10 x 6
FORMS: dict[str, dict[str, Any]] = {
    "block": {"r": 4},  # divides neither side
    "even": {"r": 2},
    "tile": {"r": 4, "expansion": "tile"},
    "tile, even": {"r": 2, "expansion": "tile"},
    "one": {"r": 1},
    "literal": {"r": 3, "expansion": "literal"},
    "power": {"r": 3, "expansion": "power"},
}


def one(layer: nn.Module, dtype: torch.dtype = torch.float32, fill: bool = True, **options: Any) -> Any:
    """``layer`` with HUT, away from its start if ``fill``."""
    model = One(layer)
    lp.inject(model, HUT(**{"targets": ("layer",)} | options), dtype=dtype)
    if fill:
        for p in adapter_of(model).parameters():
            nn.init.normal_(p, mean=0.5)
    return model


def dense(a: Any, W: Tensor, form: str) -> Tensor:
    """S_A * W * S_B, entry by entry."""
    out, fan_in = W.shape
    r, rows = a.r, []
    for o in range(out):
        row = []
        for i in range(fan_in):
            if form in ("block", "even", "one"):
                s_a, s_b = a.A[i, o * r // out], a.B[i * r // fan_in, o]
            elif form.startswith("tile"):
                s_a, s_b = a.A[i, o % r], a.B[i % r, o]
            elif form == "literal":
                s_a, s_b = (a.A @ torch.ones(r, out, dtype=a.A.dtype))[i, o], sum(a.B[j, o] for j in range(r))
            else:
                s_a, s_b = a.A[i, 0] ** r, a.B[0, o] ** r
            row.append(s_a * W[o, i] * s_b)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def by_definition(a: Any, layer: Any, x: Tensor, form: str) -> Tensor:
    inner = F.linear(x, dense(a, hosts.read(layer), form), layer.bias)
    inner = inner if a.gamma is None else a.gamma * inner
    return inner if a.beta is None else inner + a.beta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_1_and_7_the_start_is_the_base_and_all_learns(form: str, kind: str, dtype: torch.dtype) -> None:
    layer = HOSTS[kind]().to(dtype)
    x = inputs(layer, dtype)
    want = layer(x)
    model = one(layer, fill=False, **FORMS[form])
    got = model(x)
    torch.testing.assert_close(got, want, atol=1e-6 if dtype == torch.float32 else 0, rtol=0)
    got.float().pow(2).sum().backward()
    held = dict(adapter_of(model).named_parameters())
    assert held.keys() == {"A", "B", "gamma", "beta"}
    assert all(p.grad.abs().max() > 0 and p.dtype == torch.float32 for p in held.values())
    assert all(p.grad is None for n, p in model.named_parameters() if "adapters" not in n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_4_and_5_forward_weight_and_merge_are_the_dense_map(form: str, kind: str) -> None:
    layer: Any = HOSTS[kind]().double()
    x = inputs(layer)
    model = one(layer, F64, **FORMS[form])
    a = adapter_of(model)
    with torch.no_grad():
        want, fast = by_definition(a, layer, x, form), model(x)
        assert (want - layer.unadapted(x)).abs().max() > 0.1
        close(fast, want)
        close(lp.WeightAdapter.forward(a, lp.Base(layer), x), want)
        before, keys = copy.deepcopy(dict(layer.named_parameters())), set(model.state_dict())
        merged = lp.merge(model)
        close(model(x), want)
        bare = kind == "Linear, no bias"
        assert merged.biases == (["layer"] if bare else []) and layer.bias is not None
        merged.undo()
        assert set(model.state_dict()) == keys and (layer.bias is None) is bare and merged.biases == []
        assert all(torch.equal(p, before[n]) for n, p in layer.named_parameters() if "adapters" not in n)
        assert torch.equal(model(x), fast)


@pytest.mark.parametrize("large", [False, True])  # the larger weight is built twice, not kept for backward
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_dense_map(form: str, large: bool) -> None:
    layer = nn.Linear(*((300, 260) if large else (6, 10))).double()
    x = inputs(layer).requires_grad_(True)
    model = one(layer, F64, **FORMS[form])
    a = adapter_of(model)
    wanted = (a.A, a.B, a.gamma, a.beta, x)
    got = torch.autograd.grad(model(x).sin().sum(), wanted)
    y = lp.WeightAdapter.forward(a, lp.Base(layer), x) if large else by_definition(a, layer, x, form)
    for g, w in zip(got, torch.autograd.grad(y.sin().sum(), wanted), strict=True):
        torch.testing.assert_close(g, w, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"r": 2}, 2 * (4 + 2) + 2 * 2),
        ({"r": 2, "scale": False, "shift": False}, 2 * (4 + 2)),
        ({"r": 2, "scale": False}, 2 * (4 + 2) + 2),
        ({"r": 2, "expansion": "power"}, 4 + 3 * 2),
    ],
)
def test_2_parameter_counts(options: dict[str, Any], count: int) -> None:
    model = one(nn.Linear(4, 2), **options)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def worked(**options: Any) -> Any:
    layer = nn.Linear(4, 2)
    model = one(layer, fill=False, r=2, **options)
    a = adapter_of(model)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 9.0).view(2, 4))
        layer.bias.zero_()
        a.A.copy_(torch.tensor([[1.0, 2.0], [1.0, 1.0], [0.5, 1.0], [1.0, 1.0]]))
        a.B.copy_(torch.tensor([[1.0, 3.0], [2.0, 1.0]]))
        if a.gamma is not None:
            a.gamma.copy_(torch.tensor([2.0, 1.0]))
        if a.beta is not None:
            a.beta.copy_(torch.tensor([0.5, -0.5]))
    return model


def test_3_by_hand() -> None:
    new = torch.tensor([[1.0, 2.0, 3.0, 8.0], [30.0, 18.0, 7.0, 8.0]])
    a = adapter_of(worked(scale=False))
    assert torch.equal(a.weight(torch.arange(1.0, 9.0).view(2, 4)), new)
    model = worked()
    assert model(torch.ones(1, 4)).tolist() == [[28.5, 62.5]]
    with torch.no_grad():
        model.layer.bias.copy_(torch.tensor([10.0, 100.0]))
    assert model(torch.ones(1, 4)).tolist() == [[48.5, 162.5]]  # gamma scales the base's bias too
    lp.merge(model)
    assert model.layer.weight.tolist() == [[2.0, 4.0, 6.0, 16.0], [30.0, 18.0, 7.0, 8.0]]
    assert model.layer.bias.tolist() == [20.5, 99.5]


def test_6_zeros_of_the_weight_stay() -> None:
    layer = nn.Linear(6, 10)
    with torch.no_grad():
        layer.weight[2, 1:4] = 0
    for form in FORMS.values():
        W = adapter_of(one(copy.deepcopy(layer), **form)).weight(layer.weight)
        assert W[2, 1:4].abs().max() == 0 and W[2, 4:].abs().min() > 0


@pytest.mark.parametrize("form", FORMS)
def test_8_rank_of_the_multipliers(form: str) -> None:
    """Groups give outputs multipliers of their own; the printed formula at its word repeats one row."""
    a = adapter_of(one(nn.Linear(12, 8).double(), F64, **FORMS[form]))
    S = a.factor()
    apart = (S[0] / S[-1]).std() > 1e-6
    assert bool(apart) is (FORMS[form]["r"] > 1 and form not in ("literal", "power"))
    assert (int(torch.linalg.matrix_rank(S)) > 1) is (FORMS[form]["r"] > 1 and form not in ("literal", "power"))


def test_small_multipliers_count_in_half_precision() -> None:
    """1.003 rounds to 1 in bfloat16: on the activations' and on the weight's side it must not."""
    for form in ("block", "one"):
        layer = nn.Linear(256, 64, dtype=torch.bfloat16)
        model = one(layer, fill=False, **FORMS[form])
        a = adapter_of(model)
        x = torch.randn(64, 256, dtype=torch.bfloat16)
        before = model(x).float()
        with torch.no_grad():
            a.B.fill_(1.003)
        inner = before - layer.bias.float()
        slope = float(((model(x).float() - before) * inner).sum() / inner.square().sum())
        assert slope == pytest.approx(0.003, abs=0.001)


def test_above_another_kind_of_adapter_only_the_weights_part_is_scaled() -> None:
    class Plus(lp.Adapter):
        def forward(self, base: lp.Base, x: Tensor) -> Tensor:
            return base(x) + 7

    for form in ("block", "one"):
        model = One(layer := nn.Linear(6, 10).double())
        lp.attach(layer, "plus", Plus())
        lp.inject(model, HUT(targets=("layer",), **FORMS[form]), dtype=F64)
        a: Any = layer.adapters["hut"]  # type: ignore[index]
        for p in a.parameters():
            nn.init.normal_(p)
        x = inputs(layer)
        close(model(x), by_definition(a, layer, x, form) + 7)


def shifted(make: Any) -> tuple[Any, Any, Tensor]:
    """A model with HUT, its base, and what it computes."""
    base = make().eval()
    model = copy.deepcopy(base)
    lp.inject(model, HUT(r=2))
    for p in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(p, 1.0, 0.1)
    return model, base, test_hf.run(model, test_hf.batch(base)).detach()


def test_a_merged_llama_says_its_biases_in_the_config(tmp_path: Path) -> None:
    model, base, want = shifted(llama)
    with captured(model) as calls:
        model(test_hf.batch(base))
    merged, proof = prove(model, calls)
    assert len(proof.biases) == 14 and proof.biases == tuple(merged.biases)
    with pytest.warns(UserWarning, match="14 layers, first .*q_proj.* config sets attention_bias, mlp_bias"):
        io.save_merged(model, tmp_path / "merged", asdict(proof))
    held = json.loads((tmp_path / "merged" / "merge_proof.json").read_text())
    assert held["biases"] == list(proof.biases)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    close(test_hf.run(loaded, test_hf.batch(base)), want, atol=1e-5)
    merged.undo()
    assert not any(k.endswith("bias") for k in model.state_dict() if "adapters" not in k)
    close(test_hf.run(model, test_hf.batch(base)), want, atol=1e-6)


def test_a_switch_that_builds_more_biases_fills_them_with_zeros(tmp_path: Path) -> None:
    base = llama().eval()
    lp.inject(model := copy.deepcopy(base), HUT(r=2, targets=("q_proj",)))
    for p in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(p, 1.0, 0.1)
    x = test_hf.batch(base)
    want = test_hf.run(model, x).detach()
    with pytest.warns(UserWarning, match="2 layers, first"):
        io.save_merged(model, tmp_path / "merged", {"biases": lp.merge(model).biases})
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not loaded.model.layers[0].mlp.up_proj.bias.any()
    close(test_hf.run(loaded, x), want, atol=1e-5)


def test_a_merged_model_whose_config_knows_no_biases_is_a_state_dict(tmp_path: Path) -> None:
    base, batch = zoo.t5().eval(), zoo.text()
    model = copy.deepcopy(base)
    lp.inject(model, HUT(r=2))
    for p in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(p, 1.0, 0.1)
    want = model(**batch).logits.detach()
    merged = lp.merge(model)
    with pytest.warns(UserWarning, match="no config of T5ForConditionalGeneration can say: .*biases.load"):
        io.save_merged(model, tmp_path / "merged", {"biases": merged.biases})
    assert not (tmp_path / "merged" / "config.json").exists()  # from_pretrained would drop the biases
    loaded = biases.load(copy.deepcopy(base), tmp_path / "merged")
    close(loaded(**batch).logits, want, atol=1e-5)
    with pytest.raises(ValueError, match="is it another base"):
        biases.load(zoo.bert(), tmp_path / "merged")


def test_a_layer_that_may_not_use_a_bias_does_not_merge() -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight)

    model = one(Own(6, 10, bias=False), r=2)
    with pytest.raises(ValueError, match="'layer' has no bias, and a Own may not use one"):
        lp.merge(model)
    assert model.layer.bias is None and adapter_of(model).beta is not None


def test_an_added_bias_is_seen_from_above_and_no_embedding_takes_one() -> None:
    layer = nn.Linear(6, 10, bias=False).double()
    model = One(layer)
    lp.inject(model, [HUT(targets=("layer",), r=2), IA3(target_output=("layer",))], dtype=F64)
    for _, _, a in lp.adapters(model):
        for p in a.parameters():
            nn.init.normal_(p)
    x = inputs(layer)
    want = model(x).detach()
    lp.merge(model)
    close(layer(x), want)
    with pytest.raises(ValueError, match="a HUTLinear adds a bias, which an embedding cannot have"):
        lp.attach(nn.Embedding(10, 6), "hut", HUTLinear(layer, 2, "block", True, True))


def test_no_weight_decay() -> None:
    model = one(nn.Linear(6, 10), r=2)
    (group,) = HUT().param_groups(model) or []
    assert group["weight_decay"] == 0 and len(group["params"]) == 4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_base(form: str, bias: bool) -> None:
    pytest.importorskip("bitsandbytes")
    model = One(nn.Linear(64, 32, bias=bias))
    lp.quantize(model, "nf4")
    lp.inject(model, HUT(targets=("layer",), **FORMS[form]))
    a: Any = adapter_of(model)
    for p in a.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    x, W = torch.randn(3, 64), hosts.read(model.layer).float()
    want = F.linear(x, a.weight(W), a.bias(model.layer.bias.float() if bias else torch.zeros(32)))
    close = {"atol": 0.05 * float(want.detach().abs().max()), "rtol": 0}
    torch.testing.assert_close(model(x), want, **close)
    quantised, merged = model.layer, lp.merge(model)
    torch.testing.assert_close(model(x), want, **close)
    assert type(model.layer) is nn.Linear and merged.biases == ([] if bias else ["layer"])
    merged.undo()
    assert model.layer is quantised and (quantised.bias is None) is not bias


def test_options() -> None:
    with pytest.raises(ValueError, match="HUT needs a rank of at least 1, got r=0"):
        HUT(r=0)
    with pytest.raises(ValueError, match="expansion must be one of block, tile, literal, power, got 'outer'"):
        HUT(expansion="outer")
    with pytest.raises(ValueError, match=r"layer: r=7 groups, but its weight is \(10, 6\)"):
        one(nn.Linear(6, 10), rank_pattern={"layer": 7})
    with pytest.warns(UserWarning, match="clamped to its smaller side 6"):
        assert adapter_of(one(nn.Linear(6, 10))).r == 6
    with pytest.raises(ValueError, match="no linear or conv1d matches 'layr'; nearest: 'layer'"):
        one(nn.Linear(6, 10), targets=("layr",))
