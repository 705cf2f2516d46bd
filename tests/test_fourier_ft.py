"""FourierFT: its card (methods/hf_peft_methods.md) by numbers, dense float64 references, peft as another oracle."""

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning_peft_plugins.reparameterized.fourier_ft import FourierFT, draw
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lightning_peft as lp
from lightning_peft import hf, hosts
from tests import in_peft, test_hf
from tests.nets import llama
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs

KINDS = ["Linear", "Linear, no bias", "Conv1D"]
SIZES = [(6, 8), (7, 9), (6, 9), (7, 8), (1, 5), (5, 1), (2, 2), (1, 1), (16, 24)]


def one(layer: nn.Module, dtype: torch.dtype = torch.float32, fill: bool = True, **options: Any) -> Any:
    """``layer`` with FourierFT of 30 coefficients; these away from zero if ``fill``."""
    model = One(layer)
    lp.inject(model, FourierFT(**{"n": 30, "targets": ("layer",)} | options), dtype=dtype)
    if fill:
        nn.init.normal_(adapter_of(model).c)
    return model


def dense(a: Any, scale: float) -> Tensor:
    """The card's definition as an (out, in) matrix, one cosine for each coefficient."""
    out, fan_in = a.size
    p, q = torch.arange(out, dtype=F64)[:, None], torch.arange(fan_in, dtype=F64)
    total = torch.zeros(out, fan_in, dtype=F64)
    for c, u, v in zip(a.c, *a.places.tolist(), strict=True):
        total = total + c * torch.cos(2 * math.pi * (u * p / out + v * q / fan_in))
    return scale * total / (out * fan_in)


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_the_base_bit_for_bit(kind: str) -> None:
    layer = HOSTS[kind]()
    x = inputs(layer, torch.float32)
    want = layer(x)
    model = one(layer, fill=False)
    assert torch.equal(model(x), want)
    model(x).pow(2).sum().backward()
    assert adapter_of(model).c.grad.abs().min() > 0
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["layer.adapters.fourier_ft.c"]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("out", "fan_in"), SIZES)
def test_the_change_by_half_a_spectrum_is_the_sum_of_cosines(out: int, fan_in: int, share: float) -> None:
    """Even and odd sides, places on the edges and in both halves; all of them where share is 1."""
    n = max(1, int(share * out * fan_in))
    a = adapter_of(one(nn.Linear(fan_in, out), F64, n=n, scale=2.0))
    want = dense(a, 2.0)
    close(a.change(), want, atol=1e-12)
    spectrum = torch.zeros(out, fan_in, dtype=F64)
    spectrum[tuple(a.places.long())] = a.c.detach()
    close(a.change(), torch.fft.ifft2(spectrum).real * 2, atol=1e-12)
    direction = torch.randn(out, fan_in, dtype=F64)
    (got,) = torch.autograd.grad((a.change() * direction).sum(), a.c)
    (slow,) = torch.autograd.grad((want * direction).sum(), a.c)
    close(got, slow, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_weight_gradients_and_merge_are_the_dense_map(kind: str) -> None:
    layer: Any = HOSTS[kind]().double()
    x, reference = inputs(layer).requires_grad_(True), copy.deepcopy(layer)
    model = one(layer, F64, scale=20.0)
    a = adapter_of(model)
    slow = hosts.run(layer, hosts.read(layer) + dense(a, 20.0), x)
    close(model(x), slow)
    grads = zip(*(torch.autograd.grad(y.sin().sum(), [x, a.c]) for y in (model(x), slow)), strict=True)
    for f, s in grads:
        close(f, s)
    with torch.no_grad():
        hosts.write(reference, hosts.read(reference) + dense(a, 20.0))
        assert (slow - layer.unadapted(x)).abs().max() > 1e-2
        before = layer.weight.clone()
        merged = lp.merge(model)
        close(layer.weight, reference.weight)
        close(model(x), slow)
        merged.undo()
        assert torch.equal(layer.weight, before)


def test_by_hand() -> None:
    """2 x 2, one coefficient 8 at (0, 1): columns 8/4 and -8/4, times the scale of a half."""
    layer = nn.Linear(2, 2, bias=False)
    model = one(layer, n=1, scale=0.5)
    a = adapter_of(model)
    with torch.no_grad():
        nn.init.zeros_(layer.weight)
        a.c.fill_(8.0)
        a.places.copy_(torch.tensor([[0], [1]]))
    close(a.weight(layer.weight), torch.tensor([[1.0, -1.0], [1.0, -1.0]]), atol=1e-6)
    close(model(torch.tensor([[3.0, 1.0]])), torch.tensor([[2.0, 2.0]]), atol=1e-6)


def test_the_size_of_the_change() -> None:
    """The card: coefficients of N(0, 1) give entries of scale * sqrt(n / 2) / (in * out)."""
    a = adapter_of(one(nn.Linear(200, 150), n=3000, scale=100.0))
    assert float(a.change().detach().std()) == pytest.approx(100 * math.sqrt(1500) / 30000, rel=0.1)


def test_places_come_from_the_seed_without_repetition() -> None:
    first, again, other = (adapter_of(one(nn.Linear(8, 6), n=48, seed=s)).places for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({tuple(p) for p in first.T.tolist()}) == 48
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = torch.random.get_rng_state()
        draw(5, 31, 17, 9)
        assert torch.equal(torch.random.get_rng_state(), before)


def test_the_file_holds_the_places(tmp_path: Path) -> None:
    """A torch that draws others from the seed still loads the same function."""
    base = llama()
    model = copy.deepcopy(base)
    lp.inject(model, FourierFT(n=20))
    test_hf.randomize(model)
    for i, (_, _, a) in enumerate(lp.adapters(model)):
        a.places.copy_(draw(20, *a.size, 1000 + i))  # type: ignore[union-attr, arg-type]
    x = test_hf.batch(base)
    want = test_hf.run(model.eval(), x)
    lp.save(model, tmp_path / "own")
    loaded = copy.deepcopy(base).eval()
    lp.load(loaded, tmp_path / "own")
    assert torch.equal(test_hf.run(loaded, x), want)
    with pytest.raises(ValueError, match="q_proj: huggingface/peft draws the places from the seed, and this torch"):
        hf.save(model, tmp_path / "theirs")


def test_places_outside_of_the_weight_are_refused() -> None:
    small, large = one(nn.Linear(4, 8)), one(nn.Linear(40, 80))
    with pytest.raises(ValueError, match="belong to a larger weight than 8 x 4: another base"):
        adapter_of(small).load_state_dict(adapter_of(large).state_dict())
    small.load_state_dict(one(nn.Linear(4, 8)).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_weights_size_is_kept_for_backward(dtype: torch.dtype) -> None:
    model = one(nn.Linear(300, 256).to(dtype))
    x = torch.randn(3, 300, dtype=dtype, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.extend([t.numel()] if t.untyped_storage().data_ptr() not in own else [])
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert kept and max(kept) <= 3 * 300
    y.float().sin().sum().backward()  # built a second time here
    assert adapter_of(model).c.grad.abs().max() > 0


def test_a_bf16_base_adds_the_change_with_a_product_of_its_own() -> None:
    """In bfloat16 1 + d is 1 for a small d: a sum of both weights would lose it."""
    layer = nn.Linear(4, 3, bias=False).to(torch.bfloat16)
    model = one(layer, n=1, scale=12.0)
    a = adapter_of(model)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        a.places.copy_(torch.tensor([[0], [2]]))  # columns of alternating sign
        a.c.fill_(2**-10)
    x = torch.tensor([[1.0, -1.0, 0.0, 0.0]], dtype=torch.bfloat16)
    close(model(x).float(), torch.full((1, 3), 2.0**-9), atol=1e-6)


def test_autocast() -> None:
    model, x = one(nn.Linear(300, 256), scale=3000.0), torch.randn(3, 300)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x), atol=0.1, rtol=0.05)


def test_parameter_counts() -> None:
    model = llama()
    lp.inject(model, FourierFT(n=100, n_pattern={"q_proj": 7}, targets=("q_proj", "v_proj")))
    held: dict[str, Any] = {n: a for n, _, a in lp.adapters(model)}
    assert {n.split(".")[-1]: len(a.c) for n, a in held.items()} == {"q_proj": 7, "v_proj": 100}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 107


# ---- against peft --------------------------------------------------------------------------------------------------

ENTRIES = {"n": 60, "n_pattern": {"*.1.*.q_proj": 9}}


@pytest.mark.parametrize("make", [llama, test_hf.gpt2])
def test_ours_to_peft_and_back(make: Any, tmp_path: Path) -> None:
    base = make()
    options = ENTRIES if make is llama else {"n": 60, "targets": ("c_attn", "mlp.c_proj"), "seed": 5}
    theirs = in_peft.ours_to_peft_and_back(base, FourierFT(**options), test_hf.batch(base), tmp_path)
    layers = [m for m in theirs.modules() if hasattr(m, "fourierft_spectrum")]
    assert {len(m.fourierft_spectrum["default"]) for m in layers} == ({9, 60} if make is llama else {60})


def test_peft_to_ours_and_back(tmp_path: Path) -> None:
    base = test_hf.still_bert()
    config = peft.FourierFTConfig(
        n_frequency=50,
        scaling=80.0,
        random_loc_seed=11,
        target_modules=["query", "dense"],
        n_frequency_pattern={"query": 20},
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    method = in_peft.peft_to_ours_and_back(base, config, test_hf.batch(base), tmp_path)
    assert isinstance(method, FourierFT)
    assert (method.n, method.scale, method.seed, method.n_pattern) == (50, 80.0, 11, {"query": 20})


@pytest.mark.parametrize(("out", "fan_in"), SIZES)
def test_peft_draws_the_same_places(out: int, fan_in: int) -> None:
    n = max(1, out * fan_in // 2)
    config = peft.FourierFTConfig(n_frequency=n, random_loc_seed=7, target_modules=["layer"])
    theirs: Any = peft.get_peft_model(One(nn.Linear(fan_in, out)), config)  # type: ignore[arg-type]
    theirs = theirs.base_model.model.layer.indices["default"]
    assert torch.equal(adapter_of(one(nn.Linear(fan_in, out), n=n, seed=7)).places.long(), theirs)


class Nested(nn.Module):
    """A layer whose name ends another one's."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"fc": nn.Linear(8, 8)})
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block["fc"](x).tanh())


def test_peft_finds_numbers_by_the_end_of_a_name(tmp_path: Path) -> None:
    """A whole name as key goes also for names that end in it from a dot on, and peft has no way to say otherwise."""
    base, x = Nested(), torch.randn(4, 8)
    in_peft.ours_to_peft_and_back(base, FourierFT(n=20, n_pattern={"block.fc": 9}, targets=("fc", "[f]c")), x, tmp_path)
    model = Nested()
    lp.inject(model, FourierFT(n=20, n_pattern={"[f]c": 9}, targets=("fc", "[f]c")))
    with pytest.raises(ValueError, match="block.fc: huggingface/peft would give it the n=9 of 'fc', not 20"):
        hf.save(model, tmp_path / "refused")


def test_peft_starts_elsewhere_unless_asked() -> None:
    """Its default draws the coefficients; ours are zero, so that the start is the base."""
    layer, x = nn.Linear(6, 10), torch.randn(3, 6)
    config = peft.FourierFTConfig(n_frequency=30, target_modules=["layer"])
    theirs: Any = peft.get_peft_model(One(copy.deepcopy(layer)), config)  # type: ignore[arg-type]
    assert (theirs(x) - layer(x)).abs().max() > 1e-2


def test_options() -> None:
    with pytest.raises(ValueError, match="FourierFT needs at least 1 coefficient, got n=0"):
        FourierFT(n=0)
    with pytest.raises(ValueError, match="at least 1 coefficient, got q_proj=-2"):
        FourierFT(n_pattern={"q_proj": -2})
    with pytest.raises(ValueError, match="FourierFT's scale must be positive, got 0"):
        FourierFT(scale=0.0)
    with pytest.raises(
        ValueError, match="layer: n=30 coefficients, but its weight 5 x 4 has 20 entries; set n_pattern"
    ):
        one(nn.Linear(4, 5))
    with pytest.raises(ValueError, match="n_pattern's 'key' matches none of the 1 target layers"):
        one(nn.Linear(8, 8), n_pattern={"key": 3})
    with pytest.raises(ValueError, match="no linear or conv1d matches 'layer'"):
        one(nn.Conv2d(4, 5, 3))
    assert adapter_of(one(Conv1D(5, 8))).size == (5, 8)


def test_a_file_of_another_base(tmp_path: Path) -> None:
    base = llama()
    config = peft.FourierFTConfig(n_frequency=20, target_modules=["q_proj"])
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="no tensor of the file belongs to a module of this GPT2LMHeadModel"):
        hf.load(test_hf.gpt2(), tmp_path)
