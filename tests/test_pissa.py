"""PiSSA: the checks of its card (methods/lora.md) by their numbers, dense float64 references, peft as an oracle."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning_peft_plugins.reparameterized import pissa, ranks
from lightning_peft_plugins.reparameterized.lora import LoRA
from lightning_peft_plugins.reparameterized.pissa import PiSSA, principal
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft import hf, hosts
from tests import test_hf
from tests.nets import llama
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs, same_as_dense

KINDS = ["Linear", "Linear, no bias", "Conv1D"]


def one(layer: nn.Module, dtype: torch.dtype = torch.float32, fill: bool = True, **options: Any) -> Any:
    """``layer`` with PiSSA of rank 4, away from its start if ``fill``."""
    model = One(layer)
    lp.inject(model, PiSSA(**{"r": 4, "targets": ("layer",)} | options), dtype=dtype)
    if fill:
        with torch.no_grad():
            for p in adapter_of(model).parameters():
                p.add_(torch.randn_like(p))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_1_the_start_is_the_base_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    layer: Any = HOSTS[kind]().to(dtype)
    x = inputs(layer, dtype)
    want, before = layer(x), layer.weight.clone()
    model = one(layer, fill=False, alpha=7.0)
    assert torch.equal(model(x), want) and torch.equal(layer.weight, before)
    assert adapter_of(model).A.abs().min() > 0 and adapter_of(model).B.abs().min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_1_forward_weight_and_merge_are_the_dense_map(kind: str) -> None:
    layer: Any = HOSTS[kind]().double()
    x, reference = inputs(layer), copy.deepcopy(layer)
    model = one(layer, F64, alpha=3.0)
    a = adapter_of(model)
    with torch.no_grad():
        change = 3.0 / 4 * (a.B @ a.A - a.B0 @ a.A0)
        hosts.write(reference, hosts.read(reference) + change)
    same_as_dense(model, layer, a, reference, x)


@pytest.mark.parametrize("kind", KINDS)
def test_1_gradients_are_those_of_the_dense_map(kind: str) -> None:
    layer: Any = HOSTS[kind]().double()
    x = inputs(layer).requires_grad_(True)
    model = one(layer, F64)
    a = adapter_of(model)
    fast = torch.autograd.grad(model(x).sin().sum(), (a.A, a.B, x))
    W = hosts.read(layer) + a.scale * (a.B @ a.A - a.B0 @ a.A0)
    slow = torch.autograd.grad(F.linear(x, W, layer.bias).sin().sum(), (a.A, a.B, x))
    for f, s in zip(fast, slow, strict=True):
        torch.testing.assert_close(f, s, atol=1e-9, rtol=1e-9)


def test_3_first_step_moves_both_factors() -> None:
    model = one(nn.Linear(6, 10), fill=False)
    model(torch.randn(3, 6)).pow(2).sum().backward()
    a = adapter_of(model)
    assert a.A.grad.abs().min() > 0 and a.B.grad.abs().min() > 0
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "layer.adapters.pissa.A",
        "layer.adapters.pissa.B",
    }


@pytest.mark.parametrize("niter", [0, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_5_what_is_left_has_the_next_singular_value(kind: str, niter: int) -> None:
    layer = HOSTS[kind]()
    a = adapter_of(one(layer, fill=False, alpha=3.0, niter=niter))
    W = hosts.read(layer).detach()
    sigma = torch.linalg.svdvals(W)
    part = a.scale * a.B0 @ a.A0
    assert float(torch.linalg.matrix_norm(W - part, 2)) == pytest.approx(float(sigma[4]), abs=1e-5)
    close(torch.linalg.svdvals(part)[:4], sigma[:4], atol=1e-5)
    roots = (sigma[:4] / a.scale).sqrt()  # A and B share each singular value equally
    close(a.A0.norm(dim=1), roots, atol=1e-5)
    close(a.B0.norm(dim=0), roots, atol=1e-5)


def test_by_hand() -> None:
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, -9.0], [4.0, 0.0]]))
    model = one(layer, fill=False, r=1)
    a = adapter_of(model)
    close(a.A, torch.tensor([[0.0, -3.0]]), atol=1e-6)  # -9 = 3 * -3, the left vector's largest entry positive
    close(a.B, torch.tensor([[3.0], [0.0]]), atol=1e-6)
    with torch.no_grad():
        a.B[1, 0] = 1.0
    close(model(torch.tensor([[1.0, 2.0]])), torch.tensor([[-18.0, 4.0 - 6.0]]), atol=1e-5)


def test_the_signs_are_the_same_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.randn(7, 5)
    want = principal(W, 3)
    svd = torch.linalg.svd
    flip = torch.tensor([-1.0, 1.0, -1.0, 1.0, 1.0])

    def other(*args: Any, **kwargs: Any) -> Any:
        U, S, Vh = svd(*args, **kwargs)
        return U * flip, S, Vh * flip[:, None]

    monkeypatch.setattr(torch.linalg, "svd", other)
    for got, same in zip(principal(W, 3), want, strict=True):
        assert torch.equal(got, same)


def test_the_randomised_one_draws_nothing_of_the_run_s() -> None:
    W = torch.randn(40, 30) @ torch.diag(torch.logspace(0, -3, 30))
    state = torch.get_rng_state()
    first = principal(W, 5, niter=16)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    for a, b, exact in zip(first, principal(W, 5, niter=16), principal(W, 5), strict=True):
        assert torch.equal(a, b)
        close(a, exact, atol=1e-4)


def test_a_load_takes_the_start_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama().eval()
    ours = copy.deepcopy(base)
    lp.inject(ours, PiSSA(r=2))
    test_hf.randomize(ours)
    lp.save(ours, tmp_path / "adapter")
    start = principal

    def elsewhere(W: Tensor, r: int, niter: int = 0) -> Any:  # another machine whose SVD gives another basis
        U, S, Vh = start(W, r, niter)
        return U.roll(1, 1), S, -Vh

    monkeypatch.setattr(pissa, "principal", elsewhere)
    other = lp.load(copy.deepcopy(base), tmp_path / "adapter")
    x = test_hf.batch(base)
    assert torch.equal(test_hf.run(other, x), test_hf.run(ours, x))
    lp.remove(ours)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), base.parameters(), strict=True))


def test_a_progress_bar_for_many_layers(capsys: pytest.CaptureFixture[str]) -> None:
    lp.inject(nn.ModuleDict({"few": nn.Linear(4, 4)}), PiSSA(r=2, targets=("few",)))
    assert not capsys.readouterr().out
    lp.inject(nn.Sequential(*[nn.Linear(4, 4) for _ in range(21)]), PiSSA(r=2, targets=("*",)))
    assert "PiSSA" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = One(nn.Linear(64, 64))
    lp.quantize(model, kind)
    x = torch.randn(3, 64)
    want = model(x)
    lp.inject(model, PiSSA(targets=("layer",)))
    a = adapter_of(model)
    assert torch.equal(model(x), want)
    rest = hosts.read(model.layer).float() - a.B0 @ a.A0
    assert float(torch.linalg.matrix_norm(rest, 2)) == pytest.approx(
        float(torch.linalg.svdvals(hosts.read(model.layer).float())[8]), abs=1e-4
    )


# ---- against peft --------------------------------------------------------------------------------------------------

IN_PEFT: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "bert": (test_hf.still_bert, {"r": 4}, {"target_modules": ["query", "dense"]}),
    "llama": (llama, {"r": 4, "alpha": 8.0}, {"target_modules": ["q_proj", "down_proj"]}),
    "gpt2": (test_hf.gpt2, {"r": 4}, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}


def both(case: str) -> tuple[Any, Any, Any]:
    """(base, ours, peft's own PiSSA) at their starts."""
    make, options, places = IN_PEFT[case]
    base = make()
    alpha = options.get("alpha", options["r"])
    config = peft.LoraConfig(r=options["r"], lora_alpha=alpha, init_lora_weights="pissa", **places)
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config)
    ours = copy.deepcopy(base)
    lp.inject(ours, PiSSA(targets=tuple(places["target_modules"]), **options))
    return base, ours, theirs


@pytest.mark.parametrize("case", IN_PEFT)
def test_peft_starts_and_trains_alike(case: str) -> None:
    base, ours, theirs = both(case)
    layers = {n: m for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    held = {n: a for n, _, a in lp.adapters(ours)}
    assert layers.keys() == held.keys()
    with torch.no_grad():
        for name, a in held.items():
            B, A = layers[name].lora_B["default"].weight, layers[name].lora_A["default"].weight
            close(B @ A, a.B @ a.A, atol=1e-4)
            for mine, other in zip((a.A, a.B), (A, B), strict=True):
                mine.add_(torch.randn_like(mine) * 0.1)
                other.copy_(mine)  # signs of the two SVDs differ, what was taken out of W does not
    x = test_hf.batch(base)
    with torch.no_grad():
        mine = test_hf.run(ours.eval(), x)
        assert (mine - test_hf.run(base.eval(), x)).abs().max() > 1e-2
        torch.testing.assert_close(mine, test_hf.run(theirs.eval(), x), atol=1e-5, rtol=1e-5)
    got, want = test_hf.gradients(ours, x), test_hf.gradients(theirs, x)
    assert got.keys() == want.keys()
    for name, g in got.items():
        torch.testing.assert_close(g, want[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("case", IN_PEFT)
def test_the_export_is_a_plain_lora_of_twice_the_rank(case: str, tmp_path: Path) -> None:
    base, ours, _ = both(case)
    test_hf.randomize(ours)
    hf.save(ours, tmp_path / "folder")
    x = test_hf.batch(base)
    with torch.no_grad():
        want = test_hf.run(ours.eval(), x)
        theirs = test_hf.in_peft(base, tmp_path / "folder").eval()
        torch.testing.assert_close(test_hf.run(theirs, x), want, atol=1e-5, rtol=1e-5)
        back: Any = hf.load(copy.deepcopy(base), tmp_path / "folder").eval()
        torch.testing.assert_close(test_hf.run(back, x), want, atol=1e-5, rtol=1e-5)
    method = back.lightning_peft_record.methods[0]
    assert isinstance(method, LoRA) and method.r == 8 and method.dropout == 0
    assert {len(a.A) for _, _, a in lp.adapters(back)} == {8}


def test_export_of_layers_with_ranks_of_their_own(tmp_path: Path) -> None:
    base = llama()
    ours = copy.deepcopy(base)
    lp.inject(
        ours,
        PiSSA(r=3, targets=("q_proj", "k_proj", "up_proj"), rank_pattern={"k_proj": 2}, alpha_pattern={"up_proj": 6.0}),
    )
    test_hf.randomize(ours)
    hf.save(ours, tmp_path / "folder")
    x = test_hf.batch(base)
    torch.testing.assert_close(
        test_hf.run(test_hf.in_peft(base, tmp_path / "folder").eval(), x),
        test_hf.run(ours.eval(), x),
        atol=1e-5,
        rtol=1e-5,
    )


def test_options() -> None:
    with pytest.raises(ValueError, match="PiSSA needs a rank of at least 1, got q=0"):
        PiSSA(rank_pattern={"q": 0})
    with pytest.raises(ValueError, match="PiSSA's alpha must be positive, got alpha=0.0"):
        PiSSA(alpha=0.0)
    with pytest.raises(ValueError, match="niter must be 0 .exact SVD. or more, got -1"):
        PiSSA(niter=-1)
    with pytest.raises(TypeError, match="dropout"):
        PiSSA(dropout=0.1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"layer: r=5, but its \(3, 20\) weight has fewer"):
        one(nn.Linear(20, 3), rank_pattern={"layer": 5})
    with pytest.warns(UserWarning, match="clamped to its smaller side 3"):
        assert adapter_of(one(nn.Linear(20, 3))).scale == 1.0
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match="layer: its weight is all zeros"):
        one(layer)
    with pytest.raises(ValueError, match="load the weights before injecting"):
        lp.inject(llama().to("meta"), PiSSA())


def test_large_thin_parts_are_found_at_random_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    lowrank, exact = torch.svd_lowrank, torch.linalg.svd
    monkeypatch.setattr(torch, "svd_lowrank", lambda *args: seen.append(args[2]) or lowrank(*args))
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: seen.append("exact") or exact(*a, **k))
    monkeypatch.setattr(pissa, "LARGE", 32)
    for side, r, how in ((32, 4, "exact"), (40, 5, 16), (40, 6, "exact")):
        seen.clear()
        principal(torch.randn(side, 50), r, None)
        assert seen[0] == how
    W = torch.randn(64, 8) @ torch.randn(8, 64) + 0.05 * torch.randn(64, 64)
    for a, b in zip(principal(W, 8, None), principal(W, 8), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_a_progress_bar_on_long_work_of_the_first_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[bool] = []
    monkeypatch.setattr(ranks, "track", lambda places, what, disable: shown.append(not disable) or places)
    for rank, sizes in (("0", [(4096, 4096)]), ("1", [(4096, 4096)]), ("0", [(32, 32)] * 9)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert list(ranks.bar([1, 2], "x", sizes)) == [1, 2]
    assert shown == [True, False, False]
