"""VeRA: the checks of its card (methods/vera.md) by their numbers, dense float64 references, peft as an oracle."""

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning_peft_plugins.reparameterized.vera import VeRA
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

import lightning_peft as lp
from lightning_peft import hf, hosts
from tests import in_peft, test_hf
from tests.nets import llama
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs, same_as_dense

KINDS = ["Linear", "Linear, no bias", "Conv1D"]


class Two(nn.Module):
    """Two layers of unlike shapes: the largest input and the largest output do not belong together."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


def fill(model: nn.Module) -> None:
    for _, _, a in lp.adapters(model):
        for p in a.parameters():
            nn.init.normal_(p)


def one(layer: nn.Module, dtype: torch.dtype = torch.float32, filled: bool = True, **options: Any) -> Any:
    """``layer`` with VeRA of rank 12, above its sides; vectors away from their start if ``filled``."""
    model = One(layer)
    lp.inject(model, VeRA(**{"r": 12, "targets": ("layer",)} | options), dtype=dtype)
    if filled:
        fill(model)
    return model


def two(**options: Any) -> Any:
    model = Two()
    lp.inject(model, VeRA(**{"r": 16, "targets": ("up", "down")} | options))
    return model


def change(a: Any, like: Tensor) -> Tensor:
    """The card's definition, written out: the sum over ranks of outer products."""
    A, B = (t.to(like.dtype) for t in (a.shared.drawn["A"], a.shared.drawn["B"]))
    out, fan_in = like.shape
    return sum((torch.outer(a.b * B[:out, j], a.d[j] * A[j, :fan_in]) for j in range(len(a.d))), torch.zeros_like(like))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_1_the_start_is_the_base_bit_for_bit_and_b_moves_first(kind: str, dtype: torch.dtype) -> None:
    layer = HOSTS[kind]().to(dtype)
    x = inputs(layer, dtype)
    want = layer(x)
    model = one(layer, filled=False)
    assert torch.equal(model(x), want)
    a = adapter_of(model)
    assert a.d.unique().tolist() == [pytest.approx(0.1)] and a.b.dtype == a.d.dtype == torch.float32
    model(x).float().pow(2).sum().backward()
    assert a.d.grad.abs().max() == 0 and a.b.grad.abs().min() > 0
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "layer.adapters.vera.d",
        "layer.adapters.vera.b",
    }


def test_2_by_hand() -> None:
    layer = nn.Linear(2, 2)
    model = one(layer, filled=False, r=2)
    a = adapter_of(model)
    with torch.no_grad():
        a.shared.drawn["A"].copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        a.shared.drawn["B"].copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        a.b.copy_(torch.tensor([1.0, 2.0]))
    x = torch.tensor([[1.0, 1.0]])
    close(model(x) - layer.unadapted(x), torch.tensor([[0.5, 0.4]]), atol=1e-6)
    close(a.weight(torch.zeros(2, 2)), torch.tensor([[0.3, 0.2], [0.2, 0.2]]), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_weight_and_merge_are_the_dense_map(kind: str) -> None:
    layer: Any = HOSTS[kind]().double()
    x, reference = inputs(layer), copy.deepcopy(layer)
    model = one(layer, F64)
    a = adapter_of(model)
    with torch.no_grad():
        W = hosts.read(reference)
        hosts.write(reference, W + change(a, W))
    same_as_dense(model, layer, a, reference, x)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dense_map(kind: str) -> None:
    layer: Any = HOSTS[kind]().double()
    x = inputs(layer).requires_grad_(True)
    model = one(layer, F64)
    a = adapter_of(model)
    W = hosts.read(layer)
    fast = torch.autograd.grad(model(x).sin().sum(), (a.d, a.b, x))
    slow = torch.autograd.grad(F.linear(x, W + change(a, W), layer.bias).sin().sum(), (a.d, a.b, x))
    for f, s in zip(fast, slow, strict=True):
        assert s.abs().max() > 0.01
        torch.testing.assert_close(f, s, atol=1e-9, rtol=1e-9)


def test_dropout_is_on_the_update_alone() -> None:
    layer = nn.Linear(6, 10)
    model = one(layer, dropout=0.5).train()
    a, x = adapter_of(model), torch.randn(3, 6)
    torch.manual_seed(3)
    got = model(x)
    torch.manual_seed(3)
    want = layer.unadapted(x) + F.linear(F.dropout(x, 0.5), change(a, layer.weight))
    close(got, want, atol=1e-5)
    close(model.eval()(x), layer.unadapted(x) + F.linear(x, change(a, layer.weight)), atol=1e-5)


# ---- the shared matrices -------------------------------------------------------------------------------------------


def roberta(size: int, layers: int, heads: int) -> nn.Module:
    config = RobertaConfig(hidden_size=size, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=99)
    return RobertaForSequenceClassification(config)


def big_llama() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8, vocab_size=99))


@pytest.mark.parametrize(
    ("make", "targets", "r", "count", "shared"),
    [
        (lambda: roberta(768, 12, 12), ("query", "value"), 1024, 43_008, 1024 * 2 * 768),
        (lambda: roberta(1024, 24, 16), ("query", "value"), 256, 61_440, 256 * 2 * 1024),
        (big_llama, ("all-linear",), 256, 1_433_600, 7_340_032),
    ],
)
def test_3_counts(make: Any, targets: tuple[str, ...], r: int, count: int, shared: int) -> None:
    with torch.device("meta"):
        model = make()
        lp.inject(model, VeRA(r=r, targets=targets))
    if targets == ("all-linear",):
        assert not any("lm_head" in n for n, _, _ in lp.adapters(model))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    held: dict[str, Any] = {n: a for n, _, a in lp.adapters(model)}
    assert sum(t.numel() for t in next(iter(held.values())).shared.drawn.values()) == shared
    assert len({id(a.shared) for a in held.values()}) == 1
    assert {k.rpartition(".")[2] for a in held.values() for k in a.state_dict()} == {"d", "b", "checksum"}
    assert all(t.numel() == 1 for a in held.values() for t in a.buffers())  # nothing that DDP would send around


def test_4_one_storage_for_all_layers_whatever_is_done_to_the_model() -> None:
    def same(model: Any, like: Tensor | None = None) -> bool:
        up, down = model.up.adapters["vera"], model.down.adapters["vera"]
        views = zip(up.projections(up.d if like is None else like), down.projections(down.d), strict=True)
        at = [p.data_ptr() == q.data_ptr() for p, q in views]
        return all(at) and up.shared.on("A", up.d) is down.shared.on("A", down.d)

    model = two()
    fill(model)
    assert same(model)
    x = torch.randn(3, 64)
    want = model(x)
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert same(twin) and torch.equal(twin(x), want)
    assert same(twin.to(torch.bfloat16)) and twin.up.adapters["vera"].d.dtype == torch.float32
    torch.testing.assert_close(twin(x.bfloat16()).float(), want, atol=0.1, rtol=0.1)
    up, down = (m.adapters["vera"] for m in (twin.up, twin.down))
    y = x.bfloat16()
    assert up.projections(y)[0].dtype == torch.bfloat16
    assert up.projections(y)[0].data_ptr() == down.projections(y)[0].data_ptr()
    twin.to("meta")
    assert same(twin) and up.projections(up.d)[0].is_meta and not model.up.adapters["vera"].d.is_meta


def test_5_slices_of_the_largest_sizes() -> None:
    model = two()
    fill(model)
    shared = model.up.adapters["vera"].shared.drawn
    assert shared["A"].shape == (16, 128) and shared["B"].shape == (128, 16)
    A, B = model.down.adapters["vera"].projections(model.down.weight)
    assert torch.equal(A, shared["A"]) and torch.equal(B, shared["B"][:32])
    A, B = model.up.adapters["vera"].projections(model.up.weight)
    assert torch.equal(A, shared["A"][:, :64]) and torch.equal(B, shared["B"])
    for t, fan in zip(shared.values(), (128, 16), strict=True):  # gain sqrt(2), over the whole matrix's inputs
        assert 0.97 * math.sqrt(6 / fan) < float(t.abs().max()) <= math.sqrt(6 / fan)
        assert float(t.std()) == pytest.approx(math.sqrt(2 / fan), rel=0.05)
    x = torch.randn(5, 64)
    want = model(x)
    lp.merge(model)
    close(model(x), want, atol=2e-5)


def test_6_the_draw_hangs_on_the_seed_alone() -> None:
    first = two().up.adapters["vera"].shared
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with torch.device("meta"):
        again = two().up.adapters["vera"].shared
    assert torch.equal(torch.get_rng_state(), state)  # nothing of the run's
    assert all(torch.equal(first.drawn[n], again.drawn[n]) for n in "AB") and first.checksum == again.checksum
    k = math.sqrt(6 / 128)
    drawn = torch.rand(2, generator=torch.Generator().manual_seed(0))
    close(first.drawn["A"][0, :2], drawn * 2 * k - k, atol=1e-6)
    other = two(seed=1).up.adapters["vera"].shared
    assert not torch.equal(first.drawn["A"], other.drawn["A"]) and first.checksum != other.checksum


def test_7_a_file_from_another_seed_is_refused(tmp_path: Path) -> None:
    model = two(seed=5)
    fill(model)
    base = copy.deepcopy(model)
    lp.remove(base)
    lp.save(model, tmp_path / "a")
    saved = load_file(tmp_path / "a" / "adapter.safetensors")
    assert sum(t.numel() for t in saved.values()) == 2 * (16 + 1) + 128 + 32  # vectors and checksums
    x = torch.randn(3, 64)
    assert torch.equal(lp.load(copy.deepcopy(base), tmp_path / "a")(x), model(x))
    for wrong in ({"seed": 6}, {"r": 15}):
        with pytest.raises((ValueError, RuntimeError), match="trained beside other random matrices|size mismatch"):
            lp.load(base, tmp_path / "a", methods=[VeRA(**{"r": 16, "seed": 5, "targets": ("up", "down")} | wrong)])
    with pytest.raises(ValueError, match="vectors of VeRA were trained beside other random matrices .* another seed"):
        two(seed=6).load_state_dict(model.state_dict())


def test_9_a_file_from_other_targets_is_refused(tmp_path: Path) -> None:
    model = two(targets=("up",))  # its widest input is 64; beside "down" it would be 128
    base = copy.deepcopy(model)
    lp.remove(base)
    lp.save(model, tmp_path / "a")
    with pytest.raises(ValueError, match="trained beside other random matrices"):
        lp.load(base, tmp_path / "a", methods=[VeRA(r=16, targets=("up", "down"))])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = One(nn.Linear(64, 64))
    lp.quantize(model, kind, **({"compute_dtype": torch.float32} if kind == "nf4" else {}))
    x = torch.randn(3, 64)
    want = model(x)
    lp.inject(model, VeRA(r=8, targets=("layer",)))
    assert torch.equal(model(x), want)
    fill(model)
    a = adapter_of(model)
    torch.testing.assert_close(model(x), want + x @ change(a, torch.empty(64, 64)).T, atol=1e-4, rtol=1e-4)


def test_options() -> None:
    with pytest.raises(ValueError, match="VeRA needs a rank of at least 1, got r=0"):
        VeRA(r=0)
    with pytest.raises(ValueError, match="d_init must be positive, got 0.0: from d = b = 0 nothing would train"):
        VeRA(d_init=0.0)
    with pytest.raises(ValueError, match="VeRA's dropout must lie in"):
        VeRA(dropout=1.0)
    with pytest.raises(ValueError, match="no linear or conv1d matches 'q_pro'; nearest: 'q_proj'"):
        lp.inject(llama(), VeRA(targets=("q_pro",)))
    with pytest.raises(ValueError, match="no linear or conv1d matches 'embed_tokens'"):
        lp.inject(llama(), VeRA(targets=("embed_tokens",)))


# ---- against peft --------------------------------------------------------------------------------------------------

IN_PEFT: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "bert": (test_hf.still_bert, {"r": 8, "d_init": 0.3}, {"target_modules": ["query", "dense"]}),
    "llama": (llama, {"r": 40, "seed": 9}, {"target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "gpt2": (test_hf.gpt2, {"r": 8}, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}


def config(case: str, **options: Any) -> tuple[nn.Module, VeRA, peft.VeraConfig]:
    """(base, our method, peft's config) of one case."""
    make, own, places = IN_PEFT[case]
    theirs = {"r": own["r"], "d_initial": own.get("d_init", 0.1), "projection_prng_key": own.get("seed", 0)}
    return make(), VeRA(targets=tuple(places["target_modules"]), **own), peft.VeraConfig(**theirs, **places, **options)


@pytest.mark.parametrize("case", IN_PEFT)
def test_peft_starts_alike(case: str) -> None:
    base, method, theirs = config(case)
    ours = copy.deepcopy(base)
    lp.inject(ours, method)
    model: Any = peft.get_peft_model(copy.deepcopy(base), theirs)  # type: ignore[arg-type]
    tensors = {k.replace(".default", ""): t for k, t in model.state_dict().items() if "vera_" in k}
    mine = method.to_hf(ours)[1]
    for key, t in mine.items():
        torch.testing.assert_close(t, tensors[key], atol=3e-8, rtol=0)  # the last bit of A and B hangs on the processor
    assert {k for k in tensors if "lambda" in k} == {k for k in mine if "lambda" in k}


@pytest.mark.parametrize("case", IN_PEFT)
def test_peft_computes_the_same_both_ways(case: str, tmp_path: Path) -> None:
    base, method, theirs = config(case)
    x = test_hf.batch(base)
    in_peft.ours_to_peft_and_back(base, method, x, tmp_path / "one")
    back = in_peft.peft_to_ours_and_back(base, theirs, x, tmp_path / "two")
    assert isinstance(back, VeRA)
    assert (back.r, back.d_init, back.seed) == (method.r, method.d_init, method.seed) and back.save_projection


def test_a_peft_folder_without_matrices_is_read_aloud(tmp_path: Path) -> None:
    base, _, theirs = config("bert", save_projection=False)
    with pytest.warns(UserWarning, match="save_projection=False.*its seed 0 are taken.*nothing proves"):
        back: Any = in_peft.peft_to_ours_and_back(base, theirs, test_hf.batch(base), tmp_path)
    assert not back.save_projection
    for folder in ("theirs", "ours"):
        assert not any("vera_A" in k for k in load_file(tmp_path / folder / test_hf.TENSORS))


@pytest.mark.parametrize(
    ("change_of", "said"),
    [
        (lambda t: {**t, "base_model.vera_B": t["base_model.vera_B"] + 0.01}, "vera_B is another one"),
        (lambda t: {k: v for k, v in t.items() if k != "base_model.vera_A"}, "vera_A is missing"),
        (lambda t: {**t, "base_model.vera_A": t["base_model.vera_A"][:, :-1]}, r"another one, \(8, 47\)"),
    ],
)
def test_a_peft_folder_with_other_matrices_is_refused(tmp_path: Path, change_of: Any, said: str) -> None:
    base, method, _ = config("bert")
    ours = copy.deepcopy(base)
    lp.inject(ours, method)
    hf.save(ours, tmp_path / "a")
    file = tmp_path / "a" / test_hf.TENSORS
    save_file({k: v.contiguous() for k, v in change_of(load_file(file)).items()}, file)
    with pytest.raises(ValueError, match=f"{said}.*from its seed 0 follows"):
        hf.load(base, tmp_path / "a")
    with pytest.raises(ValueError, match="nothing to remove"):
        lp.remove(base)
