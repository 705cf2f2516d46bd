"""ADA-DEFT in our reading (methods/deft.md): the weights' loss, folding, skipping, cutting; the rest is DEFT's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_peft_plugins.lifecycle.ada_deft import AdaDEFT
from lightning_peft_plugins.lifecycle.deft import DEFT
from lightning_peft_plugins.lifecycle.light_peft import LightPEFT
from lightning_peft_plugins.reparameterized.dora import DoRA
from lightning_peft_plugins.reparameterized.lora import LoRA
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

import lightning_peft as lp
from lightning_peft import parts, surgery
from tests import nets
from tests.fits import SaveAt, same, trained
from tests.launch import launch
from tests.nets import HFNet, tokens, trainer
from tests.zoo import bases as zoo

BATCHES = {"bert": zoo.sentences, "vit": zoo.images}


def gates(model: nn.Module) -> list[Any]:
    return [a for _, _, a in lp.adapters(model) if hasattr(a, "w")]


def with_gates(base: str, values: tuple[float, ...], **options: Any) -> tuple[Any, AdaDEFT, dict[str, Any]]:
    model, method = getattr(zoo, base)(), AdaDEFT(**options)
    lp.inject(model, [LoRA(r=2), method])
    for gate, value in zip(gates(model), values, strict=True):
        nn.init.constant_(gate.w, value)
    return model, method, BATCHES.get(base, zoo.text)()


@pytest.mark.parametrize("base", ["bert", "gpt2", "t5", "llama", "vit"])
def test_the_start_is_the_base_and_the_loss_is_defts(base: str) -> None:
    model, batch = getattr(zoo, base)().requires_grad_(False), BATCHES.get(base, zoo.text)()
    want, values = model(**batch).logits, []  # frozen, for torch folds a product by what needs gradients
    for method in (DEFT(), AdaDEFT()):
        torch.manual_seed(0)
        lp.inject(model, [LoRA(r=2), method])
        assert torch.equal(model(**batch).logits, want)
        values.append(float(lp.penalty(model)))  # type: ignore[arg-type]
        lp.remove(model)
    assert values[0] == values[1] > 0


@pytest.mark.parametrize("base", ["bert", "llama"])  # watched on the activation, and by the gate itself
def test_each_layers_density_counts_by_its_weight(base: str) -> None:
    model, method, batch = with_gates(base, (0.5, -2.0), weight=3.0)
    model(**batch)
    value: Any = lp.penalty(model)
    value.backward()
    d = list(method.report(model)["eval_soft"].values())
    assert value.item() == pytest.approx(3 * (0.5 * d[0] + 2.0 * d[1]) / 2, rel=1e-5)
    last = gates(model)[1]  # the last layer's density does not depend on its own weight
    assert last.w.grad.item() == pytest.approx(-3 * d[1] / 2, rel=1e-5)
    assert list(method.report(model)["gate"].values()) == [0.5, 2.0]


@pytest.mark.parametrize("base", ["bert", "gpt2", "t5", "llama", "vit"])
def test_the_weight_scales_what_the_mlp_returns_and_folds(base: str) -> None:
    model, _, batch = with_gates(base, (0.5, -2.0, 0.3, 0.7)[: len(gates_of(base))])
    for _, host, a in lp.adapters(model, "lora"):
        nn.init.normal_(a.B, std=0.05)  # type: ignore[arg-type]
        if getattr(host, "bias", None) is not None:
            nn.init.normal_(host.bias)  # the bias is scaled too
    want, gated = model(**batch).logits, [g.w.item() for g in gates(model)]
    downs = [m.down for m in parts.mlps(model)]
    scale = dict(zip(downs, gated, strict=True))
    merged = lp.merge(model)
    torch.testing.assert_close(model(**batch).logits, want, atol=1e-5, rtol=1e-5)
    merged.undo()
    for gate in gates(model):
        nn.init.ones_(gate.w)
    handles = [model.get_submodule(n).register_forward_hook(lambda m, args, y, n=n: y * scale[n]) for n in downs]
    torch.testing.assert_close(model(**batch).logits, want, atol=1e-6, rtol=1e-6)
    for h in handles:
        h.remove()


def gates_of(base: str) -> range:
    return range(4 if base == "t5" else 2)


@pytest.mark.parametrize("other", [LoRA(r=2), DoRA(r=2)])
@pytest.mark.parametrize("first", [True, False])
def test_a_method_on_the_same_layer_is_heard_and_watched(other: Any, first: bool) -> None:
    model, method = zoo.llama(), AdaDEFT()
    lp.inject(model, [other, method] if first else [method, other])
    model(**zoo.text())
    value: Any = lp.penalty(model)
    value.backward()
    assert all(g.w.grad is not None for g in gates(model))
    assert len(method.report(model)["eval_hard"]) == 2


@pytest.mark.parametrize("base", ["bert", "gpt2", "t5", "llama", "vit"])
@pytest.mark.parametrize("cut", [True, False])
def test_a_skipped_mlp_is_out_exactly_and_cut(base: str, cut: bool) -> None:
    values = (0.05, 0.7, 0.6, -0.01)[: len(gates_of(base))]
    model, method, batch = with_gates(base, values, cut=cut)
    mlps, size = parts.mlps(model), sum(p.numel() for p in model.parameters())
    for gate, value in zip(gates(model), values, strict=True):
        nn.init.constant_(gate.w, 0.0 if abs(value) < 0.1 else value)
    want = model(**batch).logits
    for gate, value in zip(gates(model), values, strict=True):
        nn.init.constant_(gate.w, value)
    method.finish(model)
    torch.testing.assert_close(model(**batch).logits, want, atol=1e-6, rtol=1e-6)
    assert [g.w.item() for g in gates(model)] == [0.0 if abs(v) < 0.1 else pytest.approx(v) for v in values]
    after = [m.channels for m in parts.mlps(model)]
    assert after == [1 if cut and abs(v) < 0.1 else m.channels for v, m in zip(values, mlps, strict=True)]
    assert (sum(p.numel() for p in model.parameters()) < size) == cut == bool(surgery.record(model))


def test_the_folder_of_a_cut_model_gives_it_back(tmp_path: Path) -> None:
    torch.manual_seed(5)
    base = zoo.bert()
    torch.manual_seed(5)
    model, method, batch = with_gates("bert", (0.01, 0.8))
    model.load_state_dict(base.state_dict(), strict=False)
    method.finish(model)
    lp.save(model, tmp_path / "folder")
    lp.load(base, tmp_path / "folder")
    assert torch.equal(base(**batch).logits, model(**batch).logits)
    assert [m.channels for m in parts.mlps(base)] == [1, 48]


def test_drop_takes_the_smallest_whatever_tau() -> None:
    model, method, _ = with_gates("t5", (0.5, -0.3, 0.9, 0.4), drop=2, tau=0.0)
    method.finish(model)
    assert [g.w.item() != 0 for g in gates(model)] == [True, False, True, False]


def test_a_quantised_mlp_is_skipped_whole() -> None:
    pytest.importorskip("bitsandbytes")
    model, method, batch = with_gates("nf4_llama", (0.01, 0.8))
    with pytest.warns(UserWarning, match="mlp' is skipped but not cut: .* is quantised by blocks"):
        method.finish(model)
    assert [m.channels for m in parts.mlps(model)] == [64, 64] and gates(model)[0].w.item() == 0
    assert model(**batch).logits.isfinite().all()


def test_light_peft_is_refused_by_name() -> None:
    model = nets.bert()
    with pytest.raises(ValueError, match="light_peft would thin out those weights.*leave light_peft out, or take deft"):
        lp.inject(model, [LoRA(r=2), AdaDEFT(), LightPEFT()])
    assert not list(lp.adapters(model))


def test_weights_have_no_weight_decay() -> None:
    model, method, _ = with_gates("bert", (1.0, 1.0))
    (group,) = method.param_groups(model) or []
    assert group["weight_decay"] == 0.0 and {id(p) for p in group["params"]} == {id(g.w) for g in gates(model)}


def test_a_norm_behind_the_mlp_is_refused() -> None:
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = Gemma2Config(num_attention_heads=4, num_key_value_heads=2, head_dim=8, **sizes)
    with pytest.raises(ValueError, match="post_feedforward_layernorm' normalises what the MLP returns.*use deft"):
        lp.inject(Gemma2ForCausalLM(config), AdaDEFT())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": -0.1}, "tau and drop are at least 0, got -0.1 and 0"),
        ({"drop": -1}, "got 0.1 and -1"),
        ({"targets": ("dense",)}, "targets have no effect"),
        ({"eps": 0.0}, "ada_deft: eps is above 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaDEFT(**options)


def fit(root: Path, *more: Any, ckpt: Any = None, **options: Any) -> HFNet:
    torch.manual_seed(3)
    net = HFNet(nets.bert)
    peft = lp.PEFT([LoRA(r=2), AdaDEFT(eps=1e-2, warmup=0.5, drop=1)], folder=None)
    run = trainer(root, peft, *more, accumulate_grad_batches=2, max_epochs=2, **options)
    torch.manual_seed(3)
    run.fit(net, tokens(), ckpt_path=ckpt)
    return net


def test_resume_is_bitwise_and_the_end_cuts_the_same(tmp_path: Path) -> None:
    whole = fit(tmp_path, SaveAt(tmp_path, (1, 3, 5)))
    assert sorted(m.channels for m in parts.mlps(whole)) == [1, 48]
    assert sum(g.w.item() == 0 for g in gates(whole)) == 1 and any(g.w.item() not in (0, 1) for g in gates(whole))
    for batch in (1, 3, 5):
        assert same(trained(whole), trained(fit(tmp_path, ckpt=tmp_path / f"{batch}.ckpt")))


def resumed_in_two(folder: str) -> list[Any]:
    options = {"strategy": "ddp", "devices": 2}
    whole = fit(Path(folder), SaveAt(Path(folder), (1, 2)), **options)
    resumed = [fit(Path(folder), ckpt=Path(folder) / f"{batch}.ckpt", **options) for batch in (1, 2)]
    kept = sorted(m.channels for m in parts.mlps(whole))
    return [all(same(trained(whole), trained(r)) for r in resumed), [t.clone() for t in trained(whole)], kept]


def test_two_processes_resume_bit_for_bit_and_cut_the_same(tmp_path: Path) -> None:
    (ok, first, kept), (ok_too, second, kept_too) = launch(resumed_in_two, folder=str(tmp_path))
    assert ok and ok_too and same(first, second)
    assert kept == kept_too == [1, 48]
