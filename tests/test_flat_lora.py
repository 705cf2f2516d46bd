"""Flat-LoRA: the checks of its card by their numbers, dense references, and fits that never write the base weight."""

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning_peft_plugins.additive.houlsby_adapter import HoulsbyAdapter
from lightning_peft_plugins.lifecycle.flat_lora import FlatLoRA
from lightning_peft_plugins.lifecycle.sam import SAM
from lightning_peft_plugins.reparameterized.dora import DoRA
from lightning_peft_plugins.reparameterized.lora import LoRA
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_peft as lp
from lightning_peft import Step, hf
from tests import methods, test_hf
from tests.fits import SaveAt, adam, run, same, smooth, trained
from tests.launch import launch
from tests.nets import HFNet, Net, llama, tokens, vectors
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs
from tests.test_quant import layer_of, normal
from tests.test_sharded import Sharded, fsdp, sharding, whole

LINEAR = ("Linear", "Linear, no bias", "Conv1D")


def noisy_one(layer: nn.Module, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, FlatLoRA]:
    """``layer`` under Flat-LoRA with B away from zero, in a window at full strength."""
    model, method = One(layer), FlatLoRA(**{"r": 4, "rho": 0.2, "targets": ("layer",)} | options)
    lp.inject(model, method, dtype=dtype)
    nn.init.normal_(adapter_of(model).B)
    window(model, method, 10)
    return model.train(), method


def window(model: nn.Module, method: FlatLoRA, index: int) -> None:
    method.before_window(model, Step(index=index, planned=10))


def matrix(model: Any, fan_in: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The (out, in) matrix that a layer multiplies with, read off its outputs."""
    with torch.no_grad():
        x = torch.eye(fan_in, dtype=dtype)
        return (model(x) - model(0 * x)).T


def noise(model: Any, fan_in: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with_it = matrix(model.train(), fan_in, dtype)
    without = matrix(model.eval(), fan_in, dtype)
    model.train()
    return with_it - without


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_1_the_first_step_and_no_rho_are_lora_bit_for_bit() -> None:
    x = torch.randn(3, 6)
    for options, index in (({}, 0), ({"rho": 0.0}, 7), ({"schedule": "linear_up"}, 0), ({"period": 3}, 8)):
        torch.manual_seed(0)
        flat, method = noisy_one(nn.Linear(6, 10), **options)
        window(flat, method, index)
        torch.manual_seed(0)
        plain = One(nn.Linear(6, 10))
        lp.inject(plain, LoRA(r=4, targets=("layer",)))
        nn.init.normal_(adapter_of(plain).B)
        assert torch.equal(flat(x), plain.train()(x)), options
        window(flat, method, 9)
        assert torch.equal(flat(x), plain(x)) == (method.rho == 0)


@pytest.mark.parametrize("schedule", ["cosine_up", "linear_up", "constant"])
def test_strength_over_the_fit(schedule: str) -> None:
    wanted = {
        "cosine_up": [0, 0.1464466, 0.5, 0.8535534, 1],
        "linear_up": [0, 0.25, 0.5, 0.75, 1],
        "constant": [1] * 5,
    }[schedule]
    model, method = noisy_one(nn.Linear(6, 10), schedule=schedule)
    for index, f in zip(range(0, 41, 10), wanted, strict=True):
        method.before_window(model, Step(index=index, planned=40))
        assert adapter_of(model).deviation == pytest.approx(0.2 * f, abs=1e-6)


def test_period() -> None:
    model, method = noisy_one(nn.Linear(6, 10), period=3, schedule="constant")
    seen = []
    for index in range(7):
        window(model, method, index)
        seen.append(bool(noise(model, 6).any()))
    assert seen == [True, False, False, True, False, False, True]


def test_3_deviations_by_hand() -> None:
    model, method = noisy_one(nn.Linear(2, 2, bias=False), r=1, alpha=2.0, rho=0.05)
    a = adapter_of(model)
    with torch.no_grad():
        model.layer.weight.copy_(torch.tensor([[3.0, 4], [0, 1]]))
        a.A.copy_(torch.tensor([[0.0, 1]]))
        a.B.copy_(torch.tensor([[1.0], [0]]))
    model(torch.ones(1, 2))
    close(a.std, torch.tensor([0.05 * math.sqrt(45 / 2), 0.05 / math.sqrt(2)]), atol=1e-6)
    close(a.std, torch.tensor([0.23717, 0.03536]), atol=1e-5)
    assert method.report(model)["noise"]["layer"] == pytest.approx((0.23717 + 0.03536) / 2, abs=1e-5)


@pytest.mark.parametrize("fan_in", [64, 4096])
def test_4_and_7_a_row_s_noise_has_rho_of_the_row_s_length(fan_in: int) -> None:
    layer = nn.Linear(fan_in, 24, bias=False)
    with torch.no_grad():
        layer.weight.mul_(torch.arange(1.0, 25)[:, None]).mul_(torch.linspace(0, 2, fan_in))  # by row and by column
    model, method = noisy_one(layer, rho=0.05)
    W = adapter_of(model).weight(layer.weight).detach()
    rows, columns, count = torch.zeros(24), torch.zeros(fan_in), 8192 // fan_in + 2
    for index in range(count):
        method.before_window(model, Step(index=index + 1000, planned=1000))
        relative = (noise(model, fan_in) / W.norm(dim=1, keepdim=True)).square()
        rows += relative.sum(1) / count
        columns += relative.mean(0) / count
    assert float(rows.mean()) == pytest.approx(0.0025, rel=0.01)
    assert (rows / 0.0025 - 1).abs().max() < 0.1
    half = fan_in // 2
    assert float(columns[:half].sum() / columns[half:].sum()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("below", [False, True])
def test_5_and_8_gradients_are_those_of_the_noisy_matrix(kind: str, below: bool) -> None:
    layer: Any = HOSTS[kind]().double()
    x, model = inputs(layer).requires_grad_(), One(layer)
    fan_in = x.shape[-1]
    method = FlatLoRA(r=4, alpha=3.0, rho=0.3, targets=("layer",))
    lp.inject(model, [LoRA(r=2, targets=("layer",)), method] if below else method, dtype=F64)
    for _, _, a in lp.adapters(model):
        nn.init.normal_(a.B)  # type: ignore[arg-type]
    window(model.train(), method, 10)
    eps, a = noise(model, fan_in, F64), next(a for _, _, a in method.adapters(model))
    assert eps.dtype == F64 and eps.abs().max() > 0.01
    W = (layer.weight if kind != "Conv1D" else layer.weight.T).detach()
    merged = W
    for _, _, part in lp.adapters(model):
        merged = merged + part.scale * part.B @ part.A  # type: ignore[operator]
    close(a.std, 0.3 * merged.norm(dim=1).detach() / math.sqrt(fan_in))  # type: ignore[arg-type]
    want = x @ (merged + eps).T + (0 if layer.bias is None else layer.bias.detach())
    close(model(x), want)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    assert len(leaves) == (5 if below else 3)
    for fast, slow in zip(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (model(x), want)), strict=True):
        close(fast, slow, atol=1e-9)
    model(x).sum().backward()
    assert layer.weight.grad is None and a.A.grad is not None and a.B.grad is not None


def test_5_gradient_checkpointing_runs_again_under_the_same_noise() -> None:
    model, _ = noisy_one(nn.Linear(6, 10), dropout=0.3)
    x = torch.randn(4, 6, requires_grad=True)
    grads = []
    for rerun in (False, True):
        torch.manual_seed(1)
        y = checkpoint(model, x, use_reentrant=False) if rerun else model(x)
        grads.append(torch.autograd.grad(y.sin().sum(), [x, *adapter_of(model).parameters()]))
    assert same(*grads)


def test_nothing_as_large_as_the_weight_is_kept_for_backward() -> None:
    model, _ = noisy_one(nn.Linear(64, 96))
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(torch.randn(2, 64, requires_grad=True))
    own = {id(p) for p in adapter_of(model).parameters()}
    sizes = {t.numel() for t in kept if id(t) not in own and t.untyped_storage().nbytes() < 4 * 64 * 96}
    assert {96} < sizes and max(t.untyped_storage().nbytes() for t in kept) <= 4 * 96 * 4  # at most a factor


def test_6_one_noise_a_window_and_no_other_randomness() -> None:
    model, method = noisy_one(nn.Linear(6, 10), dropout=0.5, seed=3)
    before = torch.get_rng_state()
    model.layer.adapters["flat_lora"].dropout = 0.0
    first, again = noise(model, 6), noise(model, 6)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(first, again) and first.any()
    window(model, method, 9)
    assert not torch.equal(noise(model, 6), first)
    torch.manual_seed(99)
    window(model, method, 10)
    assert torch.equal(noise(model, 6), first)
    window(model, dataclasses.replace(method, seed=4), 10)
    assert not torch.equal(noise(model, 6), first)


def test_layers_draw_apart_and_whatever_else_is_adapted() -> None:
    nets: Any = [nn.ModuleDict({name: nn.Linear(6, 10) for name in names}) for names in ("ab", "cb")]
    drawn = []
    for net in nets:
        method = FlatLoRA(r=2, targets=tuple(net), schedule="constant")
        lp.inject(net, method)
        window(net.train(), method, 1)
        drawn.append({name: net[name].adapters["flat_lora"].seed for name in net})
    assert drawn[0]["b"] == drawn[1]["b"] and len({*drawn[0].values(), *drawn[1].values()}) == 3


# ---- precisions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_quantised_base_is_read_under_the_noise(kind: str) -> None:
    host = layer_of(normal(32, 64, 0.1), kind, bias=False)
    codes = host.weight.data.clone()
    W = lp.hosts.read(host).float().clone()
    model, _ = noisy_one(host)
    eps, a = noise(model, 64), adapter_of(model)
    want = W + (a.scale * a.B @ a.A).detach()
    assert ((want + eps) - matrix(model, 64)).abs().max() < (0.05 if kind == "int8" else 1e-5)
    x = torch.randn(5, 64, requires_grad=True)
    g = torch.randn(5, 32)
    (got,) = torch.autograd.grad(model(x), x, g)
    torch.testing.assert_close(got, g @ matrix(model, 64), atol=1e-4, rtol=1e-4)
    assert torch.equal(host.weight.data, codes)


def test_bf16_weights_get_their_noise_in_float32() -> None:
    layer = nn.Linear(64, 32).to(torch.bfloat16)
    model, _ = noisy_one(layer, rho=1e-3)
    x = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)
    y = model(x)
    assert y.dtype == torch.bfloat16 and adapter_of(model).std.dtype == torch.float32
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    assert grad.dtype == torch.bfloat16
    want = model.eval()(x).float()
    assert 0 < (y.float() - want).abs().max() < 0.1 * want.abs().max()
    a, W = adapter_of(model), layer.weight.detach().float()
    merged = W + (a.scale * a.B @ a.A).detach()
    torch.testing.assert_close(a.std, 1e-3 * merged.norm(dim=1) / 8, atol=0, rtol=5e-3)


def test_autocast() -> None:
    model, _ = noisy_one(nn.Linear(6, 10))
    x = torch.randn(3, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    std = adapter_of(model).std.clone()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x), atol=0.1, rtol=0.05)
    (half,), (full,) = (torch.autograd.grad(out.float().sum(), x, retain_graph=True) for out in (y, model(x)))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.2, rtol=0.05)
    adapter_of(model).fresh = False
    model(x)
    assert torch.equal(std, adapter_of(model).std)  # autocast does not round it


def test_compiled_steps_do_not_compile_anew_for_every_window() -> None:
    model, method = noisy_one(nn.Linear(6, 10))
    graphs, first, x = [], 0, torch.randn(3, 6)

    def backend(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    fast = torch.compile(model, backend=backend)
    for index in (10, 3, 4, 5):
        window(model, method, index)
        close(fast(x), model(x), atol=1e-6)
        first = first or len(graphs)
    assert 0 < first == len(graphs)


# ---- through a Trainer ---------------------------------------------------------------------------------------------

METHOD = FlatLoRA(r=2, rho=0.5)


def resumable(root: Path, *more: L.Callback, ckpt: Path | None = None, method: Any = METHOD, **options: Any) -> Net:
    net = Net(optimizer=adam)
    common: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_steps": 10}
    run(root, net, method, *more, **common | options, ckpt_path=ckpt)
    return net


def resumes(root: Path, places: tuple[int, ...], **options: Any) -> Net:
    fit = resumable(root, SaveAt(root / "mid", places), **options)
    for place in places:
        resumed = resumable(root, ckpt=root / "mid" / f"{place}.ckpt", **options)
        assert resumed.losses == fit.losses[place:] and same(trained(fit), trained(resumed)), place
    return fit


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}])
def test_a_fit_resumes_bitwise_and_never_writes_the_base(options: Any, tmp_path: Path) -> None:
    fit = resumes(tmp_path, (3, 4, 7, 13), data=vectors(56), **options)  # seven batches: the last window is short
    plain = resumable(tmp_path, method=LoRA(r=2), data=vectors(56), **options)
    silent = resumable(tmp_path, method=FlatLoRA(r=2, rho=0.0), data=vectors(56), **options)
    assert fit.losses[:2] == plain.losses[:2] and fit.losses[4] != plain.losses[4]
    assert silent.losses == plain.losses and same(trained(silent), trained(plain))
    start = Net()
    for name, p in start.named_parameters():
        assert torch.equal(fit.get_parameter(name), p)
        assert (
            fit.get_parameter(name)._version == p._version
        )  # since it was made, nothing wrote it, not even for a while
    keys = torch.load(tmp_path / "mid" / "13.ckpt")["state_dict"]
    assert {k.rpartition(".")[2] for k in keys} == {"A", "B"}


def in_two(root: Path) -> dict[str, Any]:
    two: dict[str, Any] = {"data": vectors(56, 4), "strategy": "ddp", "devices": 2}
    facts: dict[str, Any] = {}
    for ranks in ("per_rank", "shared"):
        method = dataclasses.replace(METHOD, rank_seeds=ranks)
        fit = resumes(root / ranks, (3, 13), method=method, **two)
        window(fit, method, 5)
        facts[ranks] = {"trained": trained(fit), "seeds": [a.seed for _, _, a in lp.adapters(fit)]}  # type: ignore
    ends = []
    for net, strategy in ((Net(smooth, optimizer=adam), "ddp"), (Sharded(smooth, optimizer=adam), sharding())):
        fsdp(root / type(net).__name__, net, dataclasses.replace(METHOD, dropout=0.0), strategy=strategy)
        ends.append(whole(net))
    plain = Net(smooth, optimizer=adam)
    fsdp(root / "plain", plain, LoRA(r=2), strategy="ddp")
    return facts | {"fsdp": ends, "plain": whole(plain)}


@pytest.mark.slow
def test_two_processes_in_ddp_and_fsdp2(tmp_path: Path) -> None:
    first, second = launch(in_two, root=tmp_path)
    for ranks in ("per_rank", "shared"):
        assert same(first[ranks]["trained"], second[ranks]["trained"])
    assert first["shared"]["seeds"] == second["shared"]["seeds"] == first["per_rank"]["seeds"]
    assert not set(first["per_rank"]["seeds"]) & set(second["per_rank"]["seeds"])
    assert not same(first["per_rank"]["trained"], first["shared"]["trained"])
    ddp, sharded = first["fsdp"]
    torch.testing.assert_close(sharded, ddp, atol=1e-5, rtol=1e-5)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(ddp, first["plain"], strict=True))


def test_the_end_has_no_noise_and_the_report_tells_it_by_layer(tmp_path: Path) -> None:
    net = Net(smooth, optimizer=adam)
    fit = run(tmp_path, net, METHOD, log_every_n_steps=1)
    history = fit.callbacks[0].history.values["flat_lora/noise"]  # type: ignore[attr-defined]
    means = [sum(now.values()) for now in history.values()]
    assert means[:2] == [0, 0] and means == sorted(means) and means[-1] > 0.05
    assert set(history[5]) == {"net.0", "net.2"} and len(set(history[5].values())) == 2
    assert float(fit.callback_metrics["flat_lora/noise"]) == pytest.approx(means[-1] / 2)
    x = torch.randn(3, 8)
    assert torch.equal(net.net.train()(x), net.net.eval()(x))


def test_a_fit_without_bound_asks_for_total_steps_before_its_first_step(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"max_steps": -1, "max_time": "00:00:00:20"}
    net = Net(smooth)
    with pytest.raises(ValueError, match="pass PEFT.*total_steps=N"):
        run(tmp_path, net, METHOD, **endless)
    assert not net.losses
    constant = dataclasses.replace(METHOD, schedule="constant")
    run(tmp_path, net := Net(smooth), constant, **endless | {"max_time": "00:00:00:01"})
    assert net.losses
    run(tmp_path, Net(smooth), METHOD, limit_train_batches=4, max_epochs=1, peft={"total_steps": 4})


def test_a_model_in_evaluation_mode_is_said_to_train_without_noise(tmp_path: Path) -> None:
    nets = [Net(smooth, optimizer=adam) for _ in range(2)]
    for net, method in zip(nets, (METHOD, LoRA(r=2)), strict=True):
        net.net.eval()
        if method is METHOD:
            with pytest.warns(UserWarning, match=r"2 layers, first 'net.0', train without the noise of flat_lora: .*"):
                run(tmp_path, net, method)
        else:
            run(tmp_path, net, method)
    assert nets[0].losses == nets[1].losses


# ---- company -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [LoRA(r=2), DoRA(r=2), HoulsbyAdapter()])
@pytest.mark.parametrize("first", [False, True])
def test_others_beside_it_train_under_the_noise(other: lp.Method, first: bool, tmp_path: Path) -> None:
    net = HFNet(llama, optimizer=adam)
    both = [METHOD, other] if first else [other, METHOD]
    run(tmp_path, net, both, max_steps=4, data=tokens(lm=True), peft={"model": "net"})
    held: list[Any] = [a for _, _, a in METHOD.adapters(net.net)]
    assert len(held) == 14 and all(a.std is not None for a in held)
    x = next(iter(tokens(lm=True)))
    lp.save(net.net, tmp_path / "folder")
    assert all(k.endswith((".A", ".B")) for k in load_file(tmp_path / "folder" / "adapter.safetensors") if "flat" in k)
    again: Any = lp.load(llama_of(7), tmp_path / "folder")
    assert torch.equal(again.eval()(**x).logits, net.net.eval()(**x).logits)


def llama_of(seed: int) -> Any:
    torch.manual_seed(seed)
    return llama()


def test_an_adapter_on_top_that_bypasses_the_noise_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="list flat_lora last"):
        run(tmp_path, Net(smooth), [METHOD, methods.Plain()])
    run(tmp_path, Net(smooth), [methods.Plain(), METHOD])


def test_sam_and_a_second_noise_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="flat_lora and sam both seek flat minima.*leave flat_lora out, or sam"):
        run(tmp_path, Net(smooth), [METHOD, SAM()])
    with pytest.raises(ValueError, match="0: 'flat_lora' and 'second' would both put noise on it"):
        lp.inject(smooth(), [METHOD, FlatLoRA(name="second", r=2)])


def test_lora_plus_is_lora_s(tmp_path: Path) -> None:
    net = Net(smooth, optimizer=adam)
    fit = run(tmp_path, net, dataclasses.replace(METHOD, lora_plus_ratio=16.0))
    rates = {id(p): g["lr"] for g in fit.optimizers[0].param_groups for p in g["params"]}
    held: list[Any] = [a for _, _, a in lp.adapters(net)]
    assert all(rates[id(a.B)] == pytest.approx(16 * rates[id(a.A)]) for a in held) and len(held) == 2


# ---- export --------------------------------------------------------------------------------------------------------


def test_merged_and_in_peft_it_is_a_plain_lora(tmp_path: Path) -> None:
    base, x = llama_of(7).eval(), torch.randint(3, 64, (2, 6))
    ours: Any = copy.deepcopy(base)
    method = FlatLoRA(r=4, alpha=8.0, rslora=True, rank_pattern={"q_proj": 2})
    lp.inject(ours, method)
    test_hf.randomize(ours)
    window(ours.train(), method, 10)  # in the middle of a noisy window
    with torch.no_grad():
        loud = ours(x).logits
        hf.save(ours, tmp_path)
        want = test_hf.run(ours.eval(), x)
        assert (want - loud).abs().max() > 1e-3 and (want - test_hf.run(base, x)).abs().max() > 1e-2
        torch.testing.assert_close(test_hf.run(test_hf.in_peft(base, tmp_path).eval(), x), want, atol=1e-5, rtol=1e-5)
        again: Any = hf.load(copy.deepcopy(base), tmp_path)
        assert type(again.lightning_peft_record.methods[0]) is LoRA
        assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
        lp.merge(ours.train())
        torch.testing.assert_close(ours(x).logits, want, atol=1e-5, rtol=1e-5)


def test_parameters_are_lora_s() -> None:
    model: Any = llama_of(7)
    lp.inject(model, FlatLoRA(r=2))
    shapes = [tuple(host.weight.shape) for _, host, _ in lp.adapters(model)]
    assert sum(p.numel() for p in trained(model)) == sum(2 * (a + b) for a, b in shapes) and len(shapes) == 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "rank of at least 1"),
        ({"rho": -0.1}, "rho must lie in [0, 1), got -0.1"),
        ({"rho": 1.0}, "rho must lie in"),
        ({"schedule": "cosine"}, "one of ['cosine_up', 'linear_up', 'constant'], got 'cosine'"),
        ({"period": 0}, "at least 1 optimizer step, got 0"),
        ({"rank_seeds": "same"}, "'per_rank' or 'shared', got 'same'"),
        ({"lora_plus_ratio": 0.0}, "lora_plus_ratio must be positive"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"init": "zeros"}, "'default' or 'gaussian'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        FlatLoRA(**options)
    assert message in str(raised.value)


def test_targets_that_match_nothing_or_are_embeddings_are_refused() -> None:
    with pytest.raises(ValueError, match="'query'"):
        lp.inject(llama(), FlatLoRA(targets=("query",)))
    with pytest.raises(ValueError, match="embed_tokens"):
        lp.inject(llama(), FlatLoRA(targets=("embed_tokens",)))
