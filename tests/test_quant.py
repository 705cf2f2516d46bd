"""One quantised layer: read, written, merged into, replaced. bitsandbytes on the CPU."""

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import hosts, quant
from lightning_peft.adapter import WeightAdapter
from lightning_peft.attach import attach

bnb = pytest.importorskip("bitsandbytes", reason="optional package bitsandbytes")

FORMATS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", True)]
# The 16 levels of NF4 to 4 digits, from code 0 to 15.
NF4 = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]


def layer_of(matrix: Tensor, kind: str, double_quant: bool = True, *, bias: bool = False) -> Any:
    """A layer quantised as a user of bitsandbytes would: made, filled, and moved to its device."""
    out, fan_in = matrix.shape
    host: Any
    if kind == "int8":
        host = bnb.nn.Linear8bitLt(fan_in, out, bias, has_fp16_weights=False, threshold=6.0)
        host.weight = bnb.nn.Int8Params(matrix.clone(), requires_grad=False)
    else:
        host = bnb.nn.Linear4bit(fan_in, out, bias, torch.float32, double_quant, kind)
        host.weight = bnb.nn.Params4bit(
            matrix.clone(), requires_grad=False, compress_statistics=double_quant, quant_type=kind, module=host
        )
    return host.requires_grad_(False).to("cpu")


def normal(out: int = 128, fan_in: int = 256, std: float = 1.0) -> Tensor:
    return torch.randn(out, fan_in, generator=torch.Generator().manual_seed(0)) * std


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_kind_of_every_layer() -> None:
    for kind, double_quant in FORMATS:
        assert quant.kind(layer_of(normal(), kind, double_quant)) == kind
    assert quant.kind(bnb.nn.LinearNF4(64, 64)) == "nf4"  # not moved to a device yet
    assert quant.kind(bnb.nn.LinearFP4(64, 64)) == "fp4"
    assert quant.kind(bnb.nn.Linear8bitLt(64, 64)) == "int8"
    assert quant.kind(nn.Linear(64, 64)) is None
    own = type("Linear4bit", (nn.Linear,), {})  # the name alone does not make one
    assert quant.kind(own(64, 64)) is None
    with pytest.raises(ValueError, match="Embedding4bit"):
        quant.kind(bnb.nn.Embedding4bit(64, 64))


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    host = layer_of(normal(), "nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert quant.kind(host) == "nf4" and quant.kind(nn.Linear(2, 2)) is None
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        quant.dequantize(host)


@pytest.mark.parametrize(
    ("kind", "double_quant", "mean_error", "relative_error"),
    [
        ("nf4", True, 0.073, 0.092),
        ("nf4", False, 0.073, 0.092),
        ("fp4", True, 0.097, 0.122),
        ("fp4", False, 0.097, 0.122),
    ],
)
def test_error_of_the_levels(kind: str, double_quant: bool, mean_error: float, relative_error: float) -> None:
    W = normal(256, 512)
    got = quant.dequantize(layer_of(W, kind, double_quant))
    assert got.shape == W.shape and got.dtype == W.dtype
    assert (got - W).abs().mean().item() == pytest.approx(mean_error, rel=0.02)
    assert relative(got, W) == pytest.approx(relative_error, rel=0.02)


def test_int8_error_is_that_of_rounding_to_127_steps() -> None:
    W = normal(256, 512)
    steps = W.abs().amax(1, keepdim=True) / 127  # uniform rounding: rms error = step / sqrt(12)
    got = quant.dequantize(layer_of(W, "int8"))
    assert (got - W).abs().max() <= steps.max() * 0.52  # the rest: bitsandbytes quantises in float16
    assert (got - W).square().mean().sqrt().item() == pytest.approx((steps / 12**0.5).mean().item(), rel=0.03)


def test_dequantize_decodes_the_bytes() -> None:
    host = layer_of(normal(), "nf4", double_quant=False)
    codes = host.weight.data.flatten().int()
    levels = torch.tensor(NF4)[torch.stack([codes >> 4, codes & 15], 1).flatten()]  # high half first, row-major
    expected = (levels.view(-1, 64) * host.weight.quant_state.absmax[:, None]).view(128, 256)
    torch.testing.assert_close(
        quant.dequantize(host), expected, atol=2.5e-4, rtol=0
    )  # levels to 5e-5, scales below 4.5


@pytest.mark.parametrize(("kind", "double_quant"), FORMATS)
def test_dequantize_is_the_layers_own_map(kind: str, double_quant: bool) -> None:
    host = layer_of(normal(), kind, double_quant).train()
    x = normal(5, 256).requires_grad_()
    y = host(x)
    W = quant.dequantize(host)
    torch.testing.assert_close(y, x @ W.T, atol=1e-4, rtol=1e-5)
    y.sum().backward()
    assert x.grad is not None and host.weight.grad is None
    torch.testing.assert_close(x.grad, W.sum(0).expand_as(x), atol=1e-4, rtol=1e-5)
    assert torch.equal(hosts.read(host), W)


def test_a_weight_that_the_cpu_misreads_is_refused() -> None:
    host = layer_of(normal(24, 96), "nf4")
    with pytest.raises(ValueError, match="in_features=96 is no multiple of blocksize=64"):
        quant.dequantize(host)
    with pytest.raises(ValueError, match="in_features=96"):
        quant.merge_loss(host, normal(24, 96))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_before_quantising_is_kept(dtype: torch.dtype) -> None:
    host = layer_of(normal().to(dtype), "nf4")
    assert quant.dequantize(host).dtype == dtype
    quant.requantize(host, normal())
    assert quant.dequantize(host).dtype == dtype


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_layer_not_yet_moved_is_read_and_written_as_it_is(kind: str) -> None:
    host = bnb.nn.LinearNF4(64, 64) if kind == "nf4" else bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    assert torch.equal(quant.dequantize(host), host.weight) and host.weight.is_floating_point()
    W = normal(64, 64)
    quant.requantize(host, W)
    assert torch.equal(host.weight, W) and quant.merge_loss(host, W) == 0
    host.to("cpu")
    assert relative(quant.dequantize(host), W) < 0.1


def packed(kind: str, double_quant: bool) -> tuple[Any, Tensor, Tensor]:
    """(layer after an evaluation forward, its weight before, its codes before)."""
    host = layer_of(normal(), kind, double_quant).eval()
    before, codes = quant.dequantize(copy.deepcopy(host)), host.weight.data.clone()
    with torch.no_grad():
        host(normal(3, 256))
    if not getattr(host.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes repacks weights only on CPUs with AVX512-BF16")
    return host, before, codes


@pytest.mark.parametrize(("kind", "double_quant"), FORMATS[:4])
def test_a_repacked_weight_is_read_right(kind: str, double_quant: bool) -> None:
    host, before, codes = packed(kind, double_quant)
    garbage = bnb.functional.dequantize_4bit(host.weight.data, host.weight.quant_state)
    assert relative(garbage, before) > 0.5  # else this test proves nothing
    assert relative(quant.dequantize(host), before) < 0.004  # scales went through bf16
    assert torch.equal(host.weight.data, codes)
    assert quant.dequantize(host).dtype == before.dtype
    with torch.no_grad():
        y = host(normal(3, 256))  # and it is not repacked again
    torch.testing.assert_close(y, normal(3, 256) @ quant.dequantize(host).T, atol=1e-4, rtol=1e-5)
    assert torch.equal(host.weight.data, codes)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_repacked_weight_that_bitsandbytes_unpacked_to_save_is_read_right(double_quant: bool) -> None:
    host, before, _ = packed("nf4", double_quant)
    host.state_dict()  # without double quantisation this leaves its scales in another order: errors of 22 %
    assert relative(quant.dequantize(host), before) < 0.004


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("double_quant", [True, False])
def test_keep_layout_brings_the_gradient_back(double_quant: bool) -> None:
    host, before, _ = packed("nf4", double_quant)
    x = normal(3, 256).requires_grad_()
    host.train()(x).sum().backward()
    assert x.grad is None  # bitsandbytes' packed product has no derivative
    quant.keep_layout(host)
    host(x).sum().backward()
    assert x.grad is not None and relative(x.grad[0], before.sum(0)) < 0.004


@pytest.mark.parametrize(("kind", "double_quant"), FORMATS)
def test_requantize_is_idempotent_and_keeps_the_format(kind: str, double_quant: bool) -> None:
    host = layer_of(normal(), kind, double_quant)
    if kind == "int8":
        host(normal(2, 256))  # the first forward moves codes and scales to another place
    before, codes = quant.dequantize(host).clone(), host.weight.data.clone()
    keys = {k: (v.shape, v.dtype) for k, v in host.state_dict().items()}
    quant.requantize(host, before)
    assert torch.equal(host.weight.data, codes) or kind == "fp4"  # which has two codes for zero
    exact = kind == "int8" or not double_quant  # the scales' own quantisation moves them by 3e-5
    assert relative(quant.dequantize(host), before) < (1e-7 if exact else 1e-4)
    assert {k: (v.shape, v.dtype) for k, v in host.state_dict().items()} == keys
    assert quant.kind(host) == kind


@pytest.mark.parametrize(("kind", "double_quant"), FORMATS)
def test_requantize_writes_what_every_reader_sees(kind: str, double_quant: bool) -> None:
    host = layer_of(normal(), kind, double_quant)
    host.train()(normal(2, 256))
    twin = copy.deepcopy(host)
    before, W = quant.dequantize(twin).clone(), -3 * normal()
    hosts.write(host, W)
    fresh = layer_of(W, kind, double_quant)
    assert torch.equal(host.weight.data, fresh.weight.data)
    assert torch.equal(quant.dequantize(host), quant.dequantize(fresh))
    x = normal(2, 256)
    assert torch.equal(host.train()(x), fresh.train()(x))
    assert torch.equal(quant.dequantize(twin), before)  # a copy has a weight of its own


def test_requantize_keeps_block_size_and_storage() -> None:
    host = bnb.nn.Linear4bit(256, 128, False, torch.float32, True, "nf4", torch.bfloat16)  # codes kept as bf16 (FSDP)
    host.weight = bnb.nn.Params4bit(normal(), blocksize=128, quant_type="nf4", quant_storage=torch.bfloat16)
    host.to("cpu")
    before = quant.dequantize(host).clone()
    quant.requantize(host, before)
    assert host.weight.dtype == torch.bfloat16 and host.weight.quant_state.blocksize == 128
    torch.testing.assert_close(quant.dequantize(host), before, rtol=1e-4, atol=1e-4)


def low_rank(size: float, W: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(1)
    delta = torch.randn(W.shape[0], 8, generator=g) @ torch.randn(8, W.shape[1], generator=g)
    return delta * (size * W.norm() / delta.norm())


@pytest.mark.parametrize(
    ("size", "survives"), [(0.001, 0.001), (0.01, 0.016), (0.03, 0.055), (0.1, 0.83), (0.3, 0.995)]
)
def test_merge_loss_of_small_updates(size: float, survives: float) -> None:
    W = normal(512, 512, 0.02)
    host = layer_of(W, "nf4")
    codes = host.weight.data.clone()
    delta = low_rank(size, W)
    loss = quant.merge_loss(host, delta)
    assert 1 - loss == pytest.approx(survives, abs=0.02)
    assert torch.equal(host.weight.data, codes)  # asking changes nothing
    before = quant.dequantize(host).clone()
    quant.requantize(host, before + delta)
    kept = ((quant.dequantize(host) - before) * delta).sum() / delta.square().sum()
    assert 1 - kept.item() == pytest.approx(loss, abs=1e-6)  # and foretells what writing does


def test_merge_loss_of_other_formats() -> None:
    W = normal(256, 256, 0.02)
    assert quant.merge_loss(layer_of(W, "nf4"), torch.zeros_like(W)) == 0
    fine = quant.merge_loss(layer_of(W, "int8"), low_rank(0.03, W))
    assert abs(fine) < 0.01 < quant.merge_loss(layer_of(W, "fp4"), low_rank(0.03, W))


class Net(nn.Module):
    """Uses one layer twice."""

    def __init__(self, host: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64, dtype=dtype)
        self.first, self.rest = host, nn.ModuleList([host])

    def forward(self, x: Tensor) -> Tensor:
        return self.rest[0](self.first(self.norm(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_replace_dequantized_keeps_the_trained_map(kind: str, dtype: torch.dtype) -> None:
    net = Net(layer_of(normal(64, 64, 0.1), kind, bias=True), dtype)
    x = normal(5, 64).to(dtype)
    host, expected = net.first, net(x)
    plain = quant.replace_dequantized(net, "first")
    assert net.first is plain and net.rest[0] is plain and type(plain) is nn.Linear
    assert plain.weight.dtype == dtype and not plain.weight.requires_grad
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(net(x), expected, atol=tolerance, rtol=tolerance)
    quant.swap(net, plain, host)
    assert torch.equal(net(x), expected)


def test_replace_dequantized_takes_a_merged_matrix_and_a_dtype() -> None:
    net = Net(layer_of(normal(64, 64), "nf4"))
    merged = quant.dequantize(net.first) + 0.001 * normal(64, 64)
    plain = quant.replace_dequantized(net, "first", merged, torch.float64)
    assert torch.equal(plain.weight, merged.double()) and plain.bias is None
    net = Net(layer_of(normal(64, 64), "nf4").eval())
    plain = quant.replace_dequantized(net, "first", merged)
    assert not plain.training
    merged.zero_()
    assert plain.weight.abs().sum() > 0  # a copy
    with pytest.raises(ValueError, match="'first' is Linear, so there is no quantised layer"):
        quant.replace_dequantized(net, "first")
    with pytest.raises(ValueError, match="the model itself"):
        quant.replace_dequantized(layer_of(normal(), "nf4"), "")


def test_replace_dequantized_goes_by_the_base_dtype() -> None:
    host, other = layer_of(normal(256, 64), "nf4", bias=True), layer_of(normal(256, 64), "nf4")
    host.bias.data = host.bias.data.half()  # 256 numbers in the layer's own dtype, 256 in the adapter's, 128 in bf16
    attach(other, "scaled", Scaled(256))
    model = nn.Sequential(nn.LayerNorm(64, dtype=torch.bfloat16), host, other)
    plain = quant.replace_dequantized(model, "1")
    assert plain.weight.dtype == plain.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_parameters_are_counted_as_weights(kind: str) -> None:
    host = layer_of(normal(128, 256), kind, bias=True)
    assert hosts.shape(host) == (128, 256)
    assert hosts.logical_numel(host.weight, host) == 128 * 256
    assert host.weight.numel() == 128 * 256 // (1 if kind == "int8" else 2)
    assert hosts.logical_numel(host.bias, host) == 128


class Scaled(WeightAdapter):
    axes = {"s": ("out",)}

    def __init__(self, out: int) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.full((out,), 2.0))

    def weight(self, W: Tensor) -> Tensor:
        return self.s[:, None] * W


@pytest.mark.parametrize(("kind", "double_quant"), FORMATS)
def test_an_adapter_that_reads_the_weight_compiles_whole(kind: str, double_quant: bool) -> None:
    host = layer_of(normal(), kind, double_quant)
    expected = 2 * normal(3, 256) @ quant.dequantize(host).T
    attach(host, "scaled", Scaled(128))
    x = normal(3, 256)
    torch.testing.assert_close(host(x), expected)
    compiled = torch.compile(host, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
