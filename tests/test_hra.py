"""HRA by the numbers of its card (methods/hf_peft_methods.md), products of reflections written out, and peft."""

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning_peft_plugins.reparameterized.hra import HRA
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft import hf, hosts
from tests import test_hf
from tests.nets import llama
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs

KINDS = [name for name, make in HOSTS.items() if not isinstance(make(), nn.Embedding)]
FEW = ["Linear", "Conv1D", "Conv2d, kernel (3, 5)", "Conv2d groups=2 padding=1"]


def one(layer: nn.Module, dtype: torch.dtype = torch.float32, fill: bool = True, **options: Any) -> Any:
    """``layer`` with four reflections, away from their start if ``fill``."""
    model = One(layer)
    lp.inject(model, HRA(**{"r": 4, "targets": ("layer",)} | options), dtype=dtype)
    if fill:
        nn.init.normal_(adapter_of(model).U)
    return model


def chain(U: Tensor) -> Tensor:
    """H_1 H_2 ... H_r, reflection by reflection."""
    H = torch.eye(len(U), dtype=U.dtype)
    for u in U.unbind(1):
        H = H @ (torch.eye(len(U), dtype=U.dtype) - 2 * torch.outer(u, u) / (u @ u))
    return H


@pytest.mark.parametrize("kind", KINDS)
def test_1_forward_weight_gradient_and_merge_are_the_dense_map(kind: str) -> None:
    layer: Any = HOSTS[kind]().double()
    x, before = inputs(layer).requires_grad_(), layer.weight.detach().clone()
    model = one(layer, F64)
    a = adapter_of(model)
    W = hosts.read(layer) @ chain(a.U)
    want = hosts.run(layer, W, x, layer.bias)
    got = model(x)
    assert (want - layer.unadapted(x)).abs().max() > 0.1
    close(got, want)
    close(lp.WeightAdapter.forward(a, lp.Base(layer), x), want)
    pairs = (torch.autograd.grad(y.sin().sum(), (a.U, x)) for y in (got, want))
    for g, w in zip(*pairs, strict=True):
        torch.testing.assert_close(g, w, atol=1e-9, rtol=1e-9)
    merged = lp.merge(model)
    close(hosts.read(layer), W)
    close(model(x), got)
    merged.undo()
    assert torch.equal(layer.weight, before) and torch.equal(model(x), got)


def test_1_by_hand_where_the_order_of_the_reflections_counts() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.bias.copy_(torch.tensor([10.0, 20.0]))
    model = one(layer, fill=False, r=2)
    with torch.no_grad():
        adapter_of(model).U.copy_(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))  # H = [[0, 1], [-1, 0]]
    close(model(torch.tensor([[1.0, 1.0]])), torch.tensor([[9.0, 19.0]]), 1e-6)
    lp.merge(model)
    close(layer.weight, torch.tensor([[-2.0, 1.0], [-4.0, 3.0]]), 1e-6)


def test_2_counts() -> None:
    for layer, count in ((nn.Linear(24, 16), 8 * 24), (nn.Conv2d(4, 6, (3, 5), groups=2), 8 * 2 * 15)):
        assert sum(p.numel() for p in one(layer, r=8).parameters() if p.requires_grad) == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FEW)
def test_3_the_start_is_the_base(kind: str, dtype: torch.dtype) -> None:
    layer = HOSTS[kind]().to(dtype)
    x = inputs(layer, dtype)
    want = layer(x)
    model = one(layer, fill=False)
    U = adapter_of(model).U
    assert torch.equal(U[:, ::2], U[:, 1::2]) and not torch.equal(U[:, 0], U[:, 2])
    assert U.dtype == torch.float32 and U.abs().max() <= 2**-0.5  # U(-1/sqrt(r/2), 1/sqrt(r/2))
    torch.testing.assert_close(model(x), want, atol=5e-7 if dtype == torch.float32 else 0.0, rtol=0)


@pytest.mark.parametrize("kind", FEW)
def test_3_the_first_step_parts_the_pairs(kind: str) -> None:
    layer: Any = HOSTS[kind]().double()
    model = one(layer, F64, fill=False)
    model(inputs(layer)).pow(2).sum().backward()
    grad = adapter_of(model).U.grad
    close(grad[:, ::2], -grad[:, 1::2])
    assert grad.abs().max() > 1e-2
    assert all(p.grad is None and not p.requires_grad for n, p in model.named_parameters() if "adapters" not in n)


@pytest.mark.parametrize("r", [2, 8, 48])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_4_singular_values_survive(r: int, spread: float) -> None:
    """Also with columns that nearly agree, as after the first steps."""
    model = one(nn.Linear(48, 40), r=r, fill=False)
    a, W = adapter_of(model), model.layer.weight.detach()
    with torch.no_grad():
        a.U.add_(torch.randn(48, r), alpha=spread)
        new = a.weight(W)
        H = a.weight(torch.eye(48))
    assert (H - torch.eye(48)).abs().max() > (1e-5 if spread < 1 else 0.1)
    close(H @ H.T, torch.eye(48), 1e-5)
    close(torch.linalg.svdvals(new), torch.linalg.svdvals(W), 1e-5)
    close(H.double(), chain(a.U.double()), 1e-5)


def test_4_autocast_leaves_the_chain_orthogonal() -> None:
    model = one(nn.Linear(48, 48), r=16)
    want = adapter_of(model).factor()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapter_of(model).factor(), want)


def test_adapters_asked_for_in_bfloat16_run() -> None:
    layer, x = nn.Linear(8, 6).bfloat16(), torch.randn(3, 8, dtype=torch.bfloat16)
    want = layer(x)
    model = one(layer, torch.bfloat16, fill=False)
    close(model(x), want, 1e-2)
    model(x).sin().sum().backward()
    assert adapter_of(model).U.grad.dtype == torch.bfloat16 and adapter_of(model).U.grad.abs().max() > 0


def test_the_length_of_a_column_says_nothing() -> None:
    model = one(nn.Linear(6, 10).double(), F64)
    x = torch.randn(3, 6, dtype=F64)
    before = model(x)
    with torch.no_grad():
        adapter_of(model).U.mul_(torch.tensor([3.0, 0.1, 20.0, 1.0]))
    close(model(x), before)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_6_a_quantised_base(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = One(nn.Linear(64, 64))
    lp.quantize(model, kind)
    x = torch.randn(3, 64)
    want = model(x)
    lp.inject(model, HRA(targets=("layer",)))
    torch.testing.assert_close(model(x), want, atol=1e-2, rtol=0)  # the base rounds an input that is off by 1e-7
    nn.init.normal_(adapter_of(model).U)
    got, W = model(x), hosts.read(model.layer).float() @ chain(adapter_of(model).U)
    torch.testing.assert_close(got, F.linear(x, W, model.layer.bias.float()), atol=0.05, rtol=0.02)
    lp.merge(model)
    close(model.layer.weight, W, 1e-5)  # type: ignore[arg-type]


def test_6_peft_reads_the_codes_of_an_8_bit_layer_as_weights() -> None:
    pytest.importorskip("bitsandbytes")
    model = One(nn.Linear(64, 64))
    lp.quantize(model, "int8")
    x = torch.randn(3, 64)
    want = model(x)
    theirs: Any = peft.get_peft_model(model, peft.HRAConfig(target_modules=["layer"]))  # type: ignore[arg-type]
    assert (theirs(x) - want).abs().max() > 10 * want.abs().max()


# ---- the penalty ---------------------------------------------------------------------------------------------------


def test_the_penalty_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    lp.inject(model, HRA(r=2, orthogonality=0.5, targets=("0", "1")))
    (_, _, first), (_, _, second) = lp.adapters(model)
    with torch.no_grad():
        first.U.copy_(torch.tensor([[5.0, 2.0], [0.0, 2.0]]))  # 45 degrees: 2 cos^2 = 1
        second.U.copy_(torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 0.0]]))
    close(lp.penalty(model), torch.tensor(0.5), 1e-6)
    assert HRA().penalty(model) is None


def test_the_penalty_draws_reflections_apart() -> None:
    ends = []
    for weight in (0.0, 1.0):
        torch.manual_seed(3)
        model = one(nn.Linear(12, 12), orthogonality=weight)
        optimizer, x = torch.optim.Adam([adapter_of(model).U], 0.02), torch.randn(8, 12)
        for _ in range(150):
            optimizer.zero_grad()
            loss = model(x).square().mean() + (lp.penalty(model) if weight else 0.0)
            loss.backward()
            optimizer.step()
        ends.append(adapter_of(model).overlap().item())
    assert ends[1] < 1e-3 < 1e-1 < ends[0]


# ---- huggingface/peft ----------------------------------------------------------------------------------------------


def same_function(ours: nn.Module, theirs: nn.Module, base: nn.Module, names: dict[str, str]) -> None:
    """Equal outputs, which are not the base's, and equal gradients; ``names`` is ours -> peft's of the tensors."""
    x = test_hf.batch(base)
    with torch.no_grad():
        mine = test_hf.run(ours.eval(), x)
        assert (mine - test_hf.run(base.eval(), x)).abs().max() > 1e-2
        torch.testing.assert_close(mine, test_hf.run(theirs.eval(), x), atol=1e-5, rtol=1e-5)
    got, want = test_hf.gradients(ours, x), test_hf.gradients(theirs, x)
    got = {re.sub(r"\w+$", lambda m: names.get(m[0], m[0]), n): g for n, g in got.items()}
    assert got.keys() == want.keys() and len(got) >= 2
    for name, g in got.items():
        w = want[name].flatten()
        torch.testing.assert_close(g.flatten() / w.abs().max(), w / w.abs().max(), atol=1e-5, rtol=1e-5, msg=name)


def both_ways(base: nn.Module, method: lp.Method, names: dict[str, str], folder: Path, std: float = 0.3) -> Any:
    """Our folder in peft and peft's of the same in ours compute the same; returns (ours, peft's)."""
    ours = copy.deepcopy(base)
    lp.inject(ours, method)
    for _, _, a in lp.adapters(ours):
        for p in a.parameters():
            with torch.no_grad():
                p.add_(torch.randn_like(p), alpha=std)
    hf.save(ours, folder / "ours")
    theirs = test_hf.in_peft(base, folder / "ours")
    same_function(ours, theirs, base, names)
    theirs.save_pretrained(str(folder / "theirs"))
    back: Any = hf.load(copy.deepcopy(base), folder / "theirs")
    assert type(back.lightning_peft_record.methods[0]) is type(method)
    same_function(back, theirs, base, names)
    return back, theirs


class Cnn(nn.Module):
    """What peft's methods compute right: one side for kernel, stride and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.point(self.conv(x).tanh()).tanh().mean((2, 3)))


def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``test_hf.batch`` give this network images."""
    batch = test_hf.batch
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(test_hf, "batch", lambda model: image if isinstance(model, Cnn) else batch(model))


IN_PEFT: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (test_hf.still_bert, {"r": 4}),
    "llama": (llama, {"targets": ("attention",), "layers": "1:"}),
    "cnn": (Cnn, {"r": 6, "targets": ("conv", "point", "fc")}),
}


@pytest.mark.parametrize("case", IN_PEFT)
def test_peft_computes_the_same_both_ways(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(monkeypatch)
    make, options = IN_PEFT[case]
    back, theirs = both_ways(make(), HRA(**options), {"U": "hra_u"}, tmp_path)
    assert {a.U.shape[1] for _, _, a in lp.adapters(back)} == {HRA(**options).r}
    assert theirs.peft_config["default"].r == HRA(**options).r


def test_peft_s_gram_schmidt_is_no_identity_and_refused(tmp_path: Path) -> None:
    base, x = One(nn.Linear(6, 4)), torch.randn(5, 6)
    config = peft.HRAConfig(r=2, target_modules=["layer"], apply_GS=True, init_weights=False)
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config)  # type: ignore[arg-type]
    assert (theirs(x) - base(x)).abs().max() > 0.1  # -1 twice among its eigenvalues, whatever the columns
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="apply_GS=True, another map of the same tensors"):
        hf.load(copy.deepcopy(base), tmp_path)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (nn.Conv2d(8, 8, 3, dilation=2), "layer: huggingface/peft fails or computes something else"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), "a padding mode"),
        (nn.Conv2d(8, 8, 3, groups=2), "with groups"),
        (nn.Conv2d(8, 8, 3, padding="same"), "something else"),
        (nn.Conv2d(8, 8, (3, 5)), "a kernel, stride or padding that is not the same"),
        (nn.Conv2d(8, 8, 3, stride=(1, 2)), "stride"),
        (nn.Conv1d(8, 8, 3), "layer: huggingface/peft's HRA has no Conv1d"),
        (nn.Conv3d(8, 8, 3), "no Conv3d"),
        (HOSTS["Conv1D"](), "no Conv1D of transformers"),
    ],
)
def test_layers_that_peft_gets_wrong_are_refused(layer: nn.Module, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        hf.save(one(layer), tmp_path)
    assert not list(tmp_path.iterdir())


def test_peft_drops_dilation_and_padding_mode() -> None:
    for options in ({"dilation": 2, "padding": 2}, {"padding_mode": "reflect", "padding": 1}):
        layer = nn.Conv2d(4, 4, 3, **options)  # type: ignore[arg-type]
        x = torch.randn(1, 4, 8, 8)
        want = layer(x)
        theirs: Any = peft.get_peft_model(One(copy.deepcopy(layer)), peft.HRAConfig(target_modules=["layer"]))  # type: ignore[arg-type]
        got = theirs(x)
        assert got.shape != want.shape or (got - want).abs().max() > 0.1
        close(one(layer, fill=False)(x), want, 1e-6)


def test_options() -> None:
    for r in (0, 3, -2):
        with pytest.raises(ValueError, match=f"even number of reflections.*got r={r}"):
            HRA(r=r)
    with pytest.raises(ValueError, match="orthogonality must not be negative, got -1"):
        HRA(orthogonality=-1.0)
    with pytest.raises(ValueError, match=r"'q_prj'; nearest: 'q_proj'"):
        lp.inject(llama(), HRA(targets=("q_prj",)))
    with pytest.raises(ValueError, match="no linear or conv1d or conv matches 'layer'"):
        one(nn.Embedding(9, 4))
    with pytest.raises(ValueError, match="no tensor of the file belongs to a module"):
        HRA.from_hf({"peft_type": "HRA"}, {}, llama())
    with pytest.raises(ValueError, match="sets bias='hra_only'"):
        HRA.from_hf({"peft_type": "HRA", "bias": "hra_only"}, {}, llama())
