"""Bone: the checks of its card by their numbers, dense float64 references, peft's MiSS as an oracle."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning_peft_plugins.reparameterized.bone import Bone
from lightning_peft_plugins.reparameterized.lora import LoRA
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft import hf, hosts
from tests import test_hf
from tests.nets import llama
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs, same_as_dense

KINDS = ["Linear", "Linear, no bias", "Conv1D"]  # 10 x 6, 6 x 10, 10 x 6
VARIANTS: dict[str, dict[str, Any]] = {
    "shard": {"r": 4},  # 6 and 10 leave a narrow last shard
    "mini": {"variant": "mini", "r": 3, "mini_r": 2},
    "bat": {"variant": "bat", "r": 2},
    "bat_row": {"variant": "bat_row", "r": 2},
}
W = torch.arange(1, 17).view(4, 4) / 10
X = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
BLOCKS = torch.tensor([[[0.1, 0.2], [0.0, -0.1]], [[0.3, 0.0], [0.1, 0.2]]])


def one(layer: nn.Module, dtype: torch.dtype = torch.float32, fill: bool = True, **options: Any) -> Any:
    """``layer`` with Bone, its zeros filled."""
    model = One(layer)
    lp.inject(model, Bone(**{"targets": ("layer",)} | options), dtype=dtype)
    if fill:
        nn.init.normal_(adapter_of(model).D)
    return model


def linear(weight: Tensor) -> Any:
    layer = nn.Linear(*reversed(weight.shape), bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def dense(variant: str, W: Tensor, D: Tensor) -> Tensor:
    """The change of an (out, in) matrix, written out entry by entry or block by block."""
    out, fan_in = W.shape
    if variant in ("shard", "mini"):
        r, columns = D.shape
        entries = [[D[i % r, o % columns] for i in range(fan_in)] for o in range(out)]
        return torch.stack([torch.stack(row) for row in entries])
    r = D.shape[-1]
    rows = []
    for p in range(out // r):
        blocks = []
        for q in range(fan_in // r):
            block = W[p * r : (p + 1) * r, q * r : (q + 1) * r]
            d = D[p if variant == "bat" else q]
            blocks.append(block @ d + d)
        rows.append(torch.cat(blocks, dim=1))
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_1_the_start_is_the_base_and_learns_at_once(variant: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(12, 8, dtype=dtype)
    x = torch.randn(3, 5, 12, dtype=dtype)
    want = layer(x)
    model = one(layer, fill=False, **VARIANTS[variant])
    got = model(x)
    assert torch.equal(got, want) and got.dtype == dtype
    got.float().pow(2).sum().backward()
    a = adapter_of(model)
    assert a.D.dtype == torch.float32 and a.D.grad.abs().min() > 0
    assert layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_weight_and_merge_are_the_dense_map(variant: str, kind: str) -> None:
    layer: Any = HOSTS[kind]().double()
    x, reference = inputs(layer), copy.deepcopy(layer)
    model = one(layer, F64, **VARIANTS[variant])
    a = adapter_of(model)
    with torch.no_grad():
        matrix = hosts.read(reference)
        hosts.write(reference, matrix + dense(variant, matrix, a.D))
    same_as_dense(model, layer, a, reference, x)


@pytest.mark.parametrize("size", [(8, 12), (320, 256)])  # the larger weight is built twice, not kept for backward
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_the_dense_map(variant: str, size: tuple[int, int]) -> None:
    out, fan_in = size
    layer = nn.Linear(fan_in, out).double()
    x = torch.randn(3, fan_in, dtype=F64, requires_grad=True)
    model = one(layer, F64, **VARIANTS[variant] | ({"r": 64, "mini_r": 80} if out > 8 and variant == "mini" else {}))
    D = adapter_of(model).D
    got = torch.autograd.grad(model(x).sin().sum(), (D, x))
    if out == 8:
        y = F.linear(x, layer.weight + dense(variant, layer.weight, D), layer.bias)
    else:
        y = F.linear(x, adapter_of(model).weight(layer.weight), layer.bias)  # by entries it would take long
    for g, w in zip(got, torch.autograd.grad(y.sin().sum(), (D, x)), strict=True):
        torch.testing.assert_close(g, w, atol=1e-9, rtol=1e-9)


def test_2_shards_by_hand() -> None:
    model = one(linear(W), fill=False, r=2)
    a = adapter_of(model)
    with torch.no_grad():
        a.D.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.4], [-0.1, 0.0, 0.1, 0.2]]))
    close(model(X), torch.tensor([[2.8, 7.8, 12.8, 17.8]]), atol=1e-5)
    close(a.weight(torch.zeros(4, 4))[0], torch.tensor([0.1, -0.1, 0.1, -0.1]), atol=1e-7)


def test_3_a_narrow_last_shard_by_hand() -> None:
    model = one(linear(torch.zeros(4, 5)), fill=False, r=2)
    with torch.no_grad():
        adapter_of(model).D.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.4], [-0.1, 0.0, 0.1, 0.2]]))
    x, want = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), torch.tensor([[0.3, 1.8, 3.3, 4.8]])
    close(model(x), want, atol=1e-6)
    lp.merge(model)
    close(model(x), want, atol=1e-6)


def test_4_bat_by_hand() -> None:
    want = torch.tensor(
        [[0.11, 0.2, 0.13, 0.22], [0.05, -0.06, 0.07, -0.04], [0.67, 0.2, 0.75, 0.24], [0.63, 0.48, 0.71, 0.52]]
    )
    outputs = {}
    for variant in ("bat", "bat_row"):
        model = one(linear(W), fill=False, variant=variant, r=2)
        a = adapter_of(model)
        with torch.no_grad():
            a.D.copy_(BLOCKS)
        outputs[variant] = model(X)
        if variant == "bat":
            close(a.weight(W) - W, want, atol=1e-6)
    close(outputs["bat"], torch.tensor([[4.78, 6.98, 15.28, 20.8]]), atol=1e-5)
    close(outputs["bat_row"], torch.tensor([[5.12, 9.54, 14.96, 19.38]]), atol=1e-5)


def test_4_a_block_of_zeros_learns_too() -> None:
    model = one(linear(torch.zeros(4, 4)), fill=False, variant="bat", r=2)
    model(X).sum().backward()
    assert adapter_of(model).D.grad.abs().min() > 0


def test_5_rank_of_the_change() -> None:
    ranks = {}
    for variant in ("shard", "bat"):
        layer = nn.Linear(64, 64).double()
        a = adapter_of(one(layer, F64, variant=variant, r=8))
        ranks[variant] = int(torch.linalg.matrix_rank(a.weight(layer.weight) - layer.weight))
    assert ranks == {"shard": 8, "bat": 64}


def test_6_two_bats_compose_in_order() -> None:
    first, second = torch.randn(2, 2, 2, 2, dtype=F64)
    got = []
    for order in ((first, second), (second, first)):
        model = One(linear(W).double())
        methods = [Bone(variant="bat", r=2, targets=("layer",), name=n) for n in ("a", "b")]
        lp.inject(model, methods, dtype=F64)
        with torch.no_grad():
            for (_, _, a), D in zip(lp.adapters(model), order, strict=True):
                a.get_parameter("D").copy_(D)
        once = W.double() + dense("bat", W.double(), order[0])
        want = F.linear(X.double(), once + dense("bat", once, order[1]))
        close(model(X.double()), want)
        lp.merge(model)
        close(model(X.double()), want)
        got.append(want)
    assert (got[0] - got[1]).abs().max() > 0.1


def test_7_the_gradient_of_a_shard_is_of_its_sums() -> None:
    layer = nn.Linear(6, 3).double()
    model, x = one(layer, F64, r=2), torch.randn(5, 6, dtype=F64)
    y = model(x)
    y.sin().sum().backward()
    sums = x[:, :2] + x[:, 2:4] + x[:, 4:]  # neighbours make a shard; every third input would be another method
    close(adapter_of(model).D.grad, sums.T @ y.detach().cos())


@pytest.mark.parametrize(("variant", "count"), [("shard", 24), ("mini", 6), ("bat", 16), ("bat_row", 24)])
def test_parameter_counts(variant: str, count: int) -> None:
    options = {"shard": {"r": 3}, "mini": {"r": 3}}
    model = one(nn.Linear(12, 8), **VARIANTS[variant] | options.get(variant, {}))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_dropout_is_of_the_input_before_the_sums() -> None:
    layer = nn.Linear(6, 3).double()
    model, x = one(layer, F64, r=2, dropout=0.5).train(), torch.randn(5, 6, dtype=F64)
    torch.manual_seed(3)
    got = model(x)
    torch.manual_seed(3)
    D = adapter_of(model).D
    close(got, layer.unadapted(x) + F.linear(F.dropout(x, 0.5), dense("shard", layer.weight, D)))  # type: ignore[operator]
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_quantised_base(variant: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = One(nn.Linear(64, 64))
    lp.quantize(model, "nf4")
    x = torch.randn(3, 64)
    want = model(x)
    lp.inject(model, Bone(**VARIANTS[variant] | {"targets": ("layer",)}))
    a: Any = adapter_of(model)
    close(model(x), want, atol=1e-5)
    nn.init.normal_(a.D, std=0.3)
    base = hosts.read(model.layer).float()
    close(model(x), F.linear(x, base + dense(variant, base, a.D), model.layer.bias.float()), atol=0.05)


# ---- to LoRA and to peft -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"r": 5, "rank_pattern": {"k_proj": 20}},  # k_proj has 16 outputs: a rank that LoRA would clamp
        {"variant": "mini", "r": 3, "mini_r": 4},
    ],
)
def test_it_becomes_an_equal_lora(options: dict[str, Any], tmp_path: Path) -> None:
    base = llama()
    ours, x = copy.deepcopy(base), test_hf.batch(base)
    lp.inject(ours, method := Bone(**options), train=("lm_head",))
    test_hf.randomize(ours)
    want = test_hf.run(ours, x)
    lora = method.to_lora(ours)
    assert isinstance(lora, LoRA)
    torch.testing.assert_close(test_hf.run(ours, x), want, atol=1e-5, rtol=1e-5)
    hf.save(ours, tmp_path / "hf")
    theirs = test_hf.in_peft(base, tmp_path / "hf").eval()
    assert theirs.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(test_hf.run(theirs, x), want, atol=1e-5, rtol=1e-5)


def test_what_becomes_no_lora() -> None:
    model = llama()
    lp.inject(model, method := Bone(variant="bat", r=8))
    with pytest.raises(ValueError, match="bat changes the weight in full rank"):
        method.to_lora(model)
    lp.remove(model)
    lp.inject(model, [method := Bone(r=4), LoRA()])
    with pytest.raises(ValueError, match=r"alone; the methods of this model: \['bone', 'lora'\]"):
        method.to_lora(model)


IN_PEFT: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (test_hf.still_bert, {"r": 5}),
    "llama": (llama, {"r": 7, "targets": ("mlp", "q_proj"), "layers": "1:"}),
    "mini": (llama, {"variant": "mini", "r": 4, "mini_r": 8}),
    "bat": (llama, {"variant": "bat", "r": 8}),
    "two names, one the other's end": (test_hf.Cnn, {"r": 3, "targets": ("[f]c",)}),
}


@pytest.mark.parametrize("case", IN_PEFT)
def test_peft_computes_the_same_both_ways(case: str, tmp_path: Path) -> None:
    make, options = IN_PEFT[case]
    base = make()
    ours = copy.deepcopy(base)
    lp.inject(ours, Bone(**options))
    test_hf.randomize(ours)
    hf.save(ours, tmp_path / "ours")
    theirs = test_hf.in_peft(base, tmp_path / "ours")
    assert theirs.peft_config["default"].peft_type == "MISS"
    same_function(ours, theirs, base)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back: Any = hf.load(copy.deepcopy(base), tmp_path / "theirs")
    method = back.lightning_peft_record.methods[0]
    assert isinstance(method, Bone) and method.variant == options.get("variant", "shard")
    same_function(back, theirs, base)


def same_function(ours: nn.Module, theirs: nn.Module, base: nn.Module) -> None:
    """Equal outputs and gradients."""
    x = test_hf.batch(base)
    with torch.no_grad():
        mine = test_hf.run(ours.eval(), x)
        assert (mine - test_hf.run(base.eval(), x)).abs().max() > 1e-2
        torch.testing.assert_close(mine, test_hf.run(theirs.eval(), x), atol=1e-5, rtol=1e-5)
    got, want = test_hf.gradients(ours, x), test_hf.gradients(theirs, x)
    want = {n.replace("miss_block", "D"): g for n, g in want.items()}
    assert got.keys() == want.keys() and any(n.endswith(".D") for n in got)
    for name, g in got.items():
        torch.testing.assert_close(g, want[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_merge_of_mini_leaves_its_matrix_alone() -> None:
    """peft's in bfloat16 on the CPU writes the repeated matrix into the parameter."""
    base = llama().bfloat16()
    config = peft.MissConfig(r=4, mini_r=8, init_weights="mini", target_modules=["q_proj"])  # type: ignore[arg-type]
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config).bfloat16()
    theirs.merge_adapter()
    assert {tuple(p.shape) for n, p in theirs.named_parameters() if "miss_block" in n} == {(4, 32)}
    ours = copy.deepcopy(base)
    lp.inject(ours, Bone(variant="mini", r=4, mini_r=8, targets=("q_proj",)))
    held: list[Any] = [a for _, _, a in lp.adapters(ours)]
    lp.merge(ours)
    assert {tuple(a.D.shape) for a in held} == {(4, 8)}


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    def refused(model: nn.Module, match: str, **options: Any) -> None:
        lp.inject(model, Bone(**options))
        with pytest.raises(ValueError, match=match):
            hf.save(model, tmp_path)

    refused(llama(), "huggingface/peft has no bat_row", variant="bat_row", r=8)
    refused(test_hf.gpt2(), "c_attn: huggingface/peft's MiSS has no transformers' Conv1D", r=8)
    refused(llama(), "q_proj: huggingface/peft's MiSS has one r, here 8 and 4", r=8, rank_pattern={"q_proj": 4})


def test_options() -> None:
    for options, match in (
        ({"r": 0}, "Bone needs a rank of at least 1, got r=0"),
        ({"rank_pattern": {"q": -1}}, "rank of at least 1, got q=-1"),
        ({"dropout": 1.0}, "Bone's dropout must lie in"),
        ({"variant": "row"}, "variant must be one of shard, mini, bat, bat_row, got 'row'"),
        ({"variant": "bat", "dropout": 0.1}, "dropout has no place in it"),
        ({"mini_r": 8}, "mini_r is a positive number for variant='mini', got 8 for 'shard'"),
        ({"variant": "mini", "mini_r": 0}, "got 0 for 'mini'"),
    ):
        with pytest.raises(ValueError, match=match):
            Bone(**options)
    layer = nn.Linear(6, 10)
    for options, match in (
        ({}, "layer: r=64, but it has 6 inputs"),
        ({"r": 4, "variant": "bat"}, "layer: bat's r=4 must divide both sides of its 10 x 6 weight"),
        ({"r": 5, "variant": "bat_row"}, "layer: bat_row's r=5 must divide both sides"),
        ({"r": 2, "variant": "mini"}, "layer: mini_r=64 must divide its 10 outputs"),
        ({"r": 2, "rank_pattern": {"q": 1}}, "pattern 'q' matches none of the 1 target layers"),
        ({"r": 2, "targets": ("layr",)}, "no linear or conv1d matches 'layr'; nearest: 'layer'"),
    ):
        with pytest.raises(ValueError, match=match):
            one(layer, **options)
    with pytest.raises(ValueError, match="no linear or conv1d matches 'layer'"):
        one(nn.Conv2d(8, 8, 3))
