"""VB-LoRA: its card (methods/hf_peft_methods.md) by numbers, dense float64 references, peft as an oracle."""

import copy
import io
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning_peft_plugins.reparameterized.vb_lora import VBLoRA
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft import hf, hosts
from lightning_peft.optim import regroup
from tests import in_peft, test_hf
from tests.nets import llama
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs, same_as_dense
from tests.test_vera import Two, fill

KINDS = ["Linear", "Linear, no bias", "Conv1D"]  # of 6 and 10 channels


def one(layer: nn.Module, dtype: torch.dtype = torch.float32, filled: bool = True, **options: Any) -> Any:
    """``layer`` with VB-LoRA of 7 vectors of length 2; bank and logits of size one if ``filled``."""
    model = One(layer)
    method = VBLoRA(**{"r": 3, "vectors": 7, "length": 2, "topk": 3, "targets": ("layer",)} | options)
    lp.inject(model, method, dtype=dtype)
    if filled:
        fill(model)
    return model


def two(**options: Any) -> Any:
    model = Two()  # 64 -> 128 and 128 -> 32
    lp.inject(model, VBLoRA(**{"r": 2, "vectors": 9, "length": 16, "targets": ("up", "down")} | options))
    return model


def mix(logits: Tensor, bank: Tensor, topk: int) -> Tensor:
    """One piece: the vectors with the highest logits, weighted by the softmax of those alone."""
    best = sorted(range(len(bank)), key=lambda i: -float(logits[i].detach()))[:topk]
    weights = torch.stack([logits[i].exp() for i in best])
    return sum((w / weights.sum() * bank[i] for w, i in zip(weights, best, strict=True)), torch.zeros_like(bank[0]))


def change(a: Any, bank: Tensor, topk: int = 3) -> Tensor:
    """B A by the card, piece by piece."""
    A = torch.stack([torch.cat([mix(piece, bank, topk) for piece in row]) for row in a.A])
    columns = [torch.cat([mix(a.B[piece, k], bank, topk) for piece in range(len(a.B))]) for k in range(len(a.A))]
    return torch.stack(columns, 1) @ A


def test_by_hand() -> None:
    layer = nn.Linear(2, 4)
    model = one(layer, r=1, vectors=3, topk=2)
    a = adapter_of(model)
    with torch.no_grad():
        a.bank.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        a.A.copy_(torch.tensor([[[0.0, -9.0, math.log(3)]]]))  # a quarter of the first, three of the last
        a.B.copy_(torch.tensor([[[0.0, 0.0, -1.0]], [[-5.0, 0.0, math.log(4)]]]))
    A, B = torch.tensor([[4.0, 5.0]]), torch.tensor([[2.0], [3.0], [4.6], [5.6]])
    for got, want in zip(a.factors(), (A, B), strict=True):
        close(got, want, atol=1e-5)
    close(a.weight(torch.zeros(4, 2)), B @ A, atol=1e-4)
    x = torch.tensor([[1.0, 10.0]])
    close(model(x) - layer.unadapted(x), torch.tensor([[108.0, 162.0, 248.4, 302.4]]), atol=1e-3)


@pytest.mark.parametrize("topk", [2, 3, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_weight_and_merge_are_the_dense_map(kind: str, topk: int) -> None:
    layer: Any = HOSTS[kind]().double()
    x, reference = inputs(layer), copy.deepcopy(layer)
    model = one(layer, F64, topk=topk)
    a = adapter_of(model)
    with torch.no_grad():
        hosts.write(reference, hosts.read(reference) + change(a, a.bank, topk))
    same_as_dense(model, layer, a, reference, x)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dense_map(kind: str) -> None:
    layer: Any = HOSTS[kind]().double()
    x = inputs(layer).requires_grad_(True)
    model = one(layer, F64)
    a = adapter_of(model)
    wanted = (a.A, a.B, a.bank, x)
    fast = torch.autograd.grad(model(x).sin().sum(), wanted)
    W = hosts.read(layer) + change(a, a.bank)
    slow = torch.autograd.grad(F.linear(x, W, layer.bias).sin().sum(), wanted)
    for f, s in zip(fast, slow, strict=True):
        assert s.abs().max() > 1e-3
        torch.testing.assert_close(f, s, atol=1e-9, rtol=1e-9)
    assert bool(((fast[0] != 0).sum(-1) == 3).all())  # of a piece's logits those that were chosen alone


def test_the_bank_learns_from_every_layer() -> None:
    model = two(topk=3).double()
    fill(model)
    for _, _, a in lp.adapters(model):
        a.cast(F64, None)
    x = torch.randn(4, 64, dtype=F64)
    bank = model.up.adapters["vb_lora"].bank
    (got,) = torch.autograd.grad(model(x).sin().sum(), bank)
    up, down = model.up.adapters["vb_lora"], model.down.adapters["vb_lora"]
    h = F.linear(x, model.up.weight + change(up, bank), model.up.bias).tanh()
    y = F.linear(h, model.down.weight + change(down, bank), model.down.bias)
    (want,) = torch.autograd.grad(y.sin().sum(), bank)
    torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-8)


def test_the_start_is_near_the_base_and_all_of_it_trains() -> None:
    layer = nn.Linear(64, 96)
    model = one(layer, filled=False, r=4, vectors=50, length=32, topk=2)
    a = adapter_of(model)
    assert float(a.bank.abs().max()) == pytest.approx(0.02, rel=0.05) and float(a.bank.std()) < 0.013
    for logits in (a.A, a.B):
        assert float(logits.std()) == pytest.approx(0.1, rel=0.15)
    x = torch.randn(5, 64)
    off = float((model(x) - layer.unadapted(x)).abs().max().detach())
    assert 1e-5 < off < 2e-2
    model(x).sin().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in a.parameters())
    assert layer.weight.grad is None


def test_dropout_is_on_the_update_alone() -> None:
    layer = nn.Linear(6, 10)
    model = one(layer, dropout=0.5).train()
    a, x = adapter_of(model), torch.randn(3, 6)
    torch.manual_seed(3)
    got = model(x)
    torch.manual_seed(3)
    want = layer.unadapted(x) + F.linear(F.dropout(x, 0.5), change(a, a.bank))
    close(got, want, atol=1e-4)
    close(model.eval()(x), layer.unadapted(x) + F.linear(x, change(a, a.bank)), atol=1e-4)


# ---- the bank ------------------------------------------------------------------------------------------------------


def shared(model: Any) -> bool:
    """Both layers take what is in the one bank that the model has."""
    banks = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if n.endswith("bank")]
    return len(banks) == 1 and all(a.owner[0].bank is banks[0][1] for _, _, a in lp.adapters(model))


def test_counts() -> None:
    model = two(r=4, vectors=90, length=16)
    want = 90 * 16 + 4 * 90 * (64 + 128) // 16 + 4 * 90 * (128 + 32) // 16
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == want
    assert sum(t.numel() for n, t in model.state_dict().items() if "adapters" in n) == want


def test_one_bank_whatever_is_done_to_the_model(tmp_path: Path) -> None:
    model = two()
    fill(model)
    x = torch.randn(3, 64)
    want = model(x)
    assert shared(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert shared(twin) and torch.equal(twin(x), want)
        with torch.no_grad():
            twin.up.adapters["vb_lora"].bank.zero_()
        assert all(float(a.weight(torch.zeros(())).abs().max()) == 0 for _, _, a in lp.adapters(twin))
        assert torch.equal(model(x), want)
        twin.load_state_dict(model.state_dict())
        assert shared(twin) and torch.equal(twin(x), want)
        twin.to(torch.bfloat16)
        assert shared(twin) and twin.up.adapters["vb_lora"].bank.dtype == torch.float32
        half = twin(x.bfloat16()).float()
        assert float((half - want).norm() / want.norm()) < 0.05
    base = copy.deepcopy(model)
    lp.remove(base)
    lp.save(model, tmp_path / "a")
    assert sum(k.endswith("bank") for k in load_file(tmp_path / "a" / "adapter.safetensors")) == 1
    back = lp.load(base, tmp_path / "a")
    assert shared(back) and torch.equal(back(x), want)


def test_injected_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Two()
    lp.inject(model, VBLoRA(r=2, vectors=9, length=16, targets=("up", "down")))
    assert shared(model) and all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    assert shared(model)
    fill(model)
    twin = two()
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(twin.down.adapters["vb_lora"].factors()[0], model.down.adapters["vb_lora"].factors()[0])
    for _, _, a in lp.adapters(model):
        a.reset_parameters()
    assert shared(model) and float(model.up.adapters["vb_lora"].bank.abs().max()) <= 0.02


def test_logits_have_a_learning_rate_of_their_own() -> None:
    model = two(logits_lr_ratio=5.0)
    (method,) = model.lightning_peft_record.methods
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    regroup([optimizer], [], method, model)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    got = {n: rates[id(p)] for n, p in model.named_parameters() if p.requires_grad}
    assert len(got) == 5
    assert all(lr == pytest.approx(1e-3 if n.endswith("bank") else 5e-3) for n, lr in got.items())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = One(nn.Linear(64, 64))
    lp.quantize(model, kind, **({"compute_dtype": torch.float32} if kind == "nf4" else {}))
    x = torch.randn(3, 64)
    want = model(x)
    lp.inject(model, VBLoRA(r=2, vectors=9, length=32, topk=3, targets=("layer",)))
    fill(model)
    a = adapter_of(model)
    torch.testing.assert_close(model(x), want + x @ change(a, a.bank).T, atol=1e-3, rtol=1e-3)


def test_options() -> None:
    for field in ("r", "vectors", "length", "logits_lr_ratio", "bank_bound", "logits_std"):
        with pytest.raises(ValueError, match=f"VBLoRA's {field} must be positive, got 0"):
            VBLoRA(**{field: 0})
    for topk in (1, 257):
        with pytest.raises(ValueError, match=rf"topk must lie between 2 \(.*\) and vectors=256, got {topk}"):
            VBLoRA(topk=topk)
    with pytest.raises(ValueError, match="VBLoRA's dropout must lie in"):
        VBLoRA(dropout=1.0)
    with pytest.raises(ValueError, match=r"down: length=64 does not divide its \(32, 128\) weight; 32 is the longest"):
        two(length=64)
    with pytest.raises(ValueError, match="no linear or conv1d matches 'q_pro'; nearest: 'q_proj'"):
        lp.inject(llama(), VBLoRA(targets=("q_pro",)))


# ---- against peft --------------------------------------------------------------------------------------------------

IN_PEFT: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "bert": (test_hf.still_bert, {"r": 3, "length": 16, "topk": 3}, {"target_modules": ["query", "dense"]}),
    "llama": (llama, {"r": 4, "length": 8, "topk": 2}, {"target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "gpt2": (test_hf.gpt2, {"r": 2, "length": 32, "topk": 2},
             {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}  # fmt: skip


def config(case: str, **options: Any) -> tuple[nn.Module, VBLoRA, peft.VBLoRAConfig]:
    """(base, our method, peft's config) of one case."""
    make, own, places = IN_PEFT[case]
    method = VBLoRA(targets=tuple(places["target_modules"]), vectors=12, bank_bound=0.1, logits_std=0.3, **own)
    theirs = {"num_vectors": 12, "vector_length": own["length"], "r": own["r"], "topk": own["topk"]}
    start = {"init_vector_bank_bound": 0.1, "init_logits_std": 0.3}
    return make(), method, peft.VBLoRAConfig(**theirs, **start, **places, **options)


@pytest.mark.parametrize("case", IN_PEFT)
def test_peft_computes_the_same_both_ways(case: str, tmp_path: Path) -> None:
    base, method, theirs = config(case)
    x = test_hf.batch(base)
    in_peft.ours_to_peft_and_back(base, method, x, tmp_path / "one")
    back: Any = in_peft.peft_to_ours_and_back(base, theirs, x, tmp_path / "two")
    for field in ("r", "vectors", "length", "topk", "bank_bound", "logits_std", "dropout"):
        assert getattr(back, field) == getattr(method, field)
    saved = load_file(tmp_path / "two" / "ours" / test_hf.TENSORS)
    assert [k for k in saved if "bank" in k] == ["base_model.vblora_vector_bank"]


def test_a_peft_folder_without_all_logits_is_refused(tmp_path: Path) -> None:
    base, _, theirs = config("bert", save_only_topk_weights=True)
    peft.get_peft_model(copy.deepcopy(base), theirs).save_pretrained(str(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="save_only_topk_weights=True and lacks the other logits"):
        hf.load(base, tmp_path)
