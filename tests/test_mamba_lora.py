"""Mamba: what the code of a model reads of an adapted layer without calling it is the adapted weight.

The fused CUDA kernels do not run here. Stand-ins in plain torch take their place, which see what the kernels would:
the tensors ``MambaMixer.forward`` and ``Mamba2Mixer.forward`` hand over; they return None nowhere.
"""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_peft_plugins.additive.ia3 import IA3
from lightning_peft_plugins.reparameterized.dora import DoRA
from lightning_peft_plugins.reparameterized.lora import LoRA
from lightning_peft_plugins.reparameterized.mamba_lora import MambaLoRA
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

import lightning_peft as lp
from lightning_peft import hf
from lightning_peft.attach import adapters
from tests.zoo import bases as zoo

IDS = zoo.text()["input_ids"]


def fused_mamba(
    xz: Tensor, conv: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor, out_proj: Tensor, out_bias: Any,
    A: Tensor, B: Any, C: Any, D: Tensor, delta_bias: Tensor, **rest: Any,
) -> Tensor:  # fmt: skip
    """mamba_inner_fn of mamba_ssm by its definition: xz (batch, 2 e, time) -> (batch, time, d)."""
    x, z = xz.chunk(2, dim=1)
    x = F.silu(F.conv1d(x, conv, conv_bias, padding=conv.shape[-1] - 1, groups=len(conv))[..., : x.shape[-1]])
    n = A.shape[1]
    low, B, C = (x_proj @ x).split([x_proj.shape[0] - 2 * n, n, n], dim=1)
    delta = F.softplus(dt_proj @ low + delta_bias[:, None])  # (batch, e, time)
    state, ys = torch.zeros(*x.shape[:2], n, dtype=x.dtype), []
    for t in range(x.shape[-1]):
        decay, entering = torch.exp(delta[..., t, None] * A), delta[..., t, None] * B[:, None, :, t] * x[..., t, None]
        state = decay * state + entering
        ys.append((state * C[:, None, :, t]).sum(-1) + D * x[..., t])
    return F.linear((torch.stack(ys, -1) * F.silu(z)).transpose(1, 2), out_proj, out_bias)


def fused_mamba2(zxbcdt: Tensor, conv: Tensor, conv_bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor,
                 rmsnorm_weight: Tensor, rmsnorm_eps: float, outproj_weight: Tensor, outproj_bias: Any, headdim: int,
                 ngroups: int, **rest: Any) -> Tensor:  # fmt: skip
    """mamba_split_conv1d_scan_combined of mamba_ssm by its definition."""
    heads, channels = len(A), len(conv)
    e = heads * headdim
    n = (channels - e) // (2 * ngroups)
    z, xbc, dt = zxbcdt.split([e, channels, heads], dim=-1)
    xbc = F.conv1d(xbc.transpose(1, 2), conv[:, None], conv_bias, padding=conv.shape[-1] - 1, groups=channels)
    x, B, C = F.silu(xbc[..., : z.shape[1]].transpose(1, 2)).split([e, ngroups * n, ngroups * n], dim=-1)
    x = x.unflatten(-1, (heads, headdim))
    B, C = (t.unflatten(-1, (ngroups, n)).repeat_interleave(heads // ngroups, 2) for t in (B, C))
    dt, state, ys = F.softplus(dt + dt_bias), torch.zeros(len(x), heads, headdim, n, dtype=x.dtype), []
    for t in range(x.shape[1]):
        entering = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + entering
        ys.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    y = (torch.stack(ys, 1).flatten(2) * F.silu(z)).unflatten(-1, (ngroups, -1))
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + rmsnorm_eps)).flatten(2) * rmsnorm_weight
    return F.linear(y, outproj_weight, outproj_bias)


KERNELS = {
    "mamba": (zoo.mamba, modeling_mamba, "mamba_inner_fn", fused_mamba, ("x_proj", "dt_proj", "out_proj")),
    "mamba2": (zoo.mamba2, modeling_mamba2, "mamba2_split_conv1d_scan_combined", fused_mamba2, ("out_proj",)),
}


def adapted(method: lp.Method, make: Any) -> nn.Module:
    torch.manual_seed(0)
    model = make().double()
    lp.inject(model, method, dtype=torch.float64)
    for _, _, adapter in adapters(model):
        for p in adapter.parameters():
            p.data += 0.1 * torch.randn_like(p)
    return model


def run(model: nn.Module, train: bool) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.train(train)
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("method", [LoRA(r=2, targets=("mixer",)), DoRA(r=2, targets=("mixer",))], ids=["lora", "dora"])
def test_the_adapter_acts_with_the_fused_path_taken_or_not(
    kind: str, method: lp.Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, library, kernel, stand_in, read = KERNELS[kind]
    model, calls = adapted(method, make), []
    slow, slow_grads = run(model, train=True)
    monkeypatch.setattr(library, kernel, lambda *a, **k: calls.append(1) or stand_in(*a, **k))
    fast, fast_grads = run(model, train=True)
    evaluated, _ = run(model, train=False)  # transformers takes the fused path in training alone
    assert len(calls) == 2  # one a layer
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)  # transformers scans and norms in float32
    torch.testing.assert_close(fast, evaluated, rtol=1e-4, atol=1e-5)
    assert slow_grads.keys() == fast_grads.keys()
    for name, grad in fast_grads.items():
        assert grad is not None and grad.abs().max() > 0, name
        assert (grad - slow_grads[name]).abs().max() < 1e-4 * grad.abs().max(), name
    assert {n.split(".")[-2 - 2] for n in fast_grads if ".adapters." in n} >= set(read)


@pytest.mark.parametrize("kind", KERNELS)
def test_merged_equals_unmerged_on_the_fused_path(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, library, kernel, stand_in, _ = KERNELS[kind]
    monkeypatch.setattr(library, kernel, stand_in)
    model = adapted(MambaLoRA(r=2), make)
    base = run_logits(make().double())
    before = run_logits(model)
    assert (before - base).abs().max() > 1e-3
    merged = lp.merge(model)
    torch.testing.assert_close(run_logits(model), before, rtol=1e-9, atol=1e-9)
    merged.undo()  # and the weight that the kernel reads is the adapted one again
    torch.testing.assert_close(run_logits(model), before, rtol=1e-9, atol=1e-9)


def run_logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.train()(input_ids=IDS).logits


def test_the_reader_sees_the_adapted_weight_and_the_layer_keeps_its_own() -> None:
    model: Any = adapted(LoRA(r=2, targets=("mixer",)), zoo.mamba)
    for name in KERNELS["mamba"][4]:
        host = model.get_submodule(f"backbone.layers.1.mixer.{name}")
        stored, a = host.state_dict()["weight"], host.adapters["lora"]
        expected = stored + 8 * a.B @ a.A  # alpha 16 / r 2
        torch.testing.assert_close(host.weight, expected)
        x = torch.randn(3, host.in_features, dtype=torch.float64)
        torch.testing.assert_close(host(x), F.linear(x, expected, host.bias))  # not added twice
        with lp.disabled(model):
            assert host.weight is host._parameters["weight"]
            assert torch.equal(host(x), F.linear(x, stored, host.bias))
    in_proj = model.get_submodule("backbone.layers.1.mixer.in_proj")
    assert isinstance(in_proj.weight, nn.Parameter)  # which is called


def test_copies_and_removal() -> None:
    model: Any = adapted(LoRA(r=2, targets=("x_proj",)), zoo.mamba)
    host = model.backbone.layers[0].mixer.x_proj
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.backbone.layers[0].mixer.x_proj.weight, host.weight)
    seen = host.weight.detach()
    lp.remove(model)
    assert type(host) is nn.Linear and not torch.equal(host.weight, seen)


def test_only_the_rows_of_B_are_adapted_where_the_factor_has_no_others() -> None:
    model: Any = adapted(LoRA(r=2, targets=("x_proj",)), zoo.mamba)
    host = model.backbone.layers[0].mixer.x_proj
    with torch.no_grad():
        host.adapters["lora"].B[:3] = 0  # dt rank 3, then 4 rows of B, then 4 of C
        host.adapters["lora"].B[7:] = 0
    moved = (host.weight - host.state_dict()["weight"]).abs().amax(1) > 0
    assert moved.tolist() == [False] * 3 + [True] * 4 + [False] * 4


def _off(model: nn.Module) -> Any:
    other = copy.deepcopy(model)
    lp.remove(other)
    return other


# ---- the presets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "preset", "names"),
    [
        (zoo.mamba, "sll", ["x_proj"] * 2),
        (zoo.mamba2, "sll", ["in_proj"] * 2),
        (zoo.mamba, "projectors", ["in_proj", "out_proj"] * 2),
        (zoo.mamba, "all", ["embeddings", *["in_proj", "x_proj", "out_proj"] * 2]),
        (zoo.mamba2, "all", ["embeddings", *["in_proj", "out_proj"] * 2]),
    ],
)
def test_presets(make: Any, preset: str, names: list[str]) -> None:
    model = make()
    lp.inject(model, MambaLoRA(r=2, preset=preset))
    held = list(adapters(model))
    assert sorted(n.rpartition(".")[2] for n, _, _ in held) == sorted(names)
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted == sum(2 * sum(lp.hosts.shape(h)) for _, h, _ in held)


def test_layers_exclude_and_also() -> None:
    model = zoo.mamba()
    lp.inject(model, MambaLoRA(r=2, layers="1:", also=("dt_proj",), exclude=("x_proj",)))
    assert {n for n, _, _ in adapters(model)} == {
        f"backbone.layers.1.mixer.{c}" for c in ("in_proj", "dt_proj", "out_proj")
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [({"preset": "al"}, "preset must be one of sll, projectors, all"), ({"r": 0}, "rank of at least 1"),
     ({"alpha": -1.0}, "alpha must be positive"), ({"init": "zero"}, "init must be")],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MambaLoRA(**options)


def test_a_model_without_mixers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mamba_lora adapts state-space mixers.*LlamaForCausalLM has none.*attention"):
        lp.inject(zoo.llama(), MambaLoRA())


def test_peft_reads_what_it_does_not_refuse(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = zoo.mamba()
    lp.inject(model, MambaLoRA(r=2, exclude=("out_proj",)))
    for _, _, adapter in adapters(model):
        for p in adapter.parameters():
            p.data += 0.1 * torch.randn_like(p)
    hf.save(model, tmp_path)
    other = zoo.mamba()
    other.load_state_dict(_off(model).state_dict())
    theirs = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
    whole = zoo.mamba()
    lp.inject(whole, MambaLoRA(r=2))
    with pytest.raises(ValueError, match="out_proj: huggingface/peft refuses LoRA there"):
        hf.save(whole, tmp_path / "whole")
    with pytest.raises(ValueError, match="incompatible with Mamba"):  # as it says itself
        peft.get_peft_model(zoo.mamba(), peft.LoraConfig(target_modules=["out_proj"]))


def test_peft_loses_its_adapter_on_the_fused_path_and_ours_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(modeling_mamba, "mamba_inner_fn", fused_mamba)
    theirs = peft.get_peft_model(zoo.mamba(), peft.LoraConfig(r=2, target_modules=["x_proj"], init_lora_weights=False))
    theirs.train()(input_ids=IDS, labels=IDS).loss.requires_grad_().backward()
    assert all(p.grad is None for p in theirs.parameters() if p.requires_grad)  # nothing learnt, and no error
    ours = zoo.mamba()
    lp.inject(ours, LoRA(r=2, targets=("x_proj",)))
    ours.train()(input_ids=IDS, labels=IDS).loss.backward()
    grads = [a.B.grad for _, _, a in adapters(ours)]
    assert all(g is not None and g.abs().max() > 0 for g in grads)


def test_another_method_on_a_read_layer() -> None:
    model: Any = zoo.mamba()
    lp.inject(model, IA3(target_output=("x_proj",)))
    host = model.backbone.layers[0].mixer.x_proj
    with torch.no_grad():
        next(host.adapters["ia3"].parameters()).fill_(2.0)
    torch.testing.assert_close(host.weight, 2 * host.state_dict()["weight"])
