"""DEFT by the numbers of its card (methods/deft.md), against hooks of our own and dense float64 references."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_peft_plugins.additive.pfeiffer_adapter import PfeifferAdapter
from lightning_peft_plugins.additive.prompt_tuning import PromptTuning
from lightning_peft_plugins.lifecycle.deft import DEFT
from lightning_peft_plugins.lifecycle.density import SoftDensity
from lightning_peft_plugins.reparameterized.lora import LoRA
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import lightning_peft as lp
from lightning_peft import PEFT
from tests import nets
from tests.fits import SaveAt, same, trained
from tests.launch import launch
from tests.nets import HFNet, tokens, trainer
from tests.zoo import bases as zoo

CARD = torch.tensor([[[0, 0.5, -0.1], [1e-3, 0, 2]]], dtype=torch.float64)  # (B, T, d_ff) = (1, 2, 3)
QV = {"targets": ("attention",)}


class Net(nn.Module):
    """An activation function in a module of its own, between nothing."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.act, self.scale = act or nn.Identity(), nn.Parameter(torch.ones(()))

    def forward(self, a: Tensor) -> Tensor:
        return self.act(a * self.scale)


def watched(act: nn.Module | None = None, **options: Any) -> tuple[Any, DEFT]:
    model, method = Net(act).double(), DEFT(targets=("act",), **options)
    lp.inject(model, method, train=("scale",))
    return model, method


def phi(a: Tensor, eps: float = 1e-7) -> Tensor:
    return a.double().square() / (a.double().square() + eps)


def seen(model: nn.Module, names: list[str], batch: dict[str, Any], inputs: bool = False) -> list[Tensor]:
    """What the modules return, or take, in one forward, by hooks."""
    out: list[Tensor] = []
    handles = [
        model.get_submodule(n).register_forward_hook(lambda m, args, y: out.append(args[0] if inputs else y))
        for n in names
    ]
    with torch.no_grad():
        model(**batch)
    for h in handles:
        h.remove()
    return out


def term(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    model(**batch)
    value = lp.penalty(model)
    assert value is not None
    return value


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_2_worked_numbers_of_densities_and_gradient() -> None:
    model, method = watched(threshold=0.05)
    a = CARD.clone().requires_grad_()
    model(a)
    value: Any = lp.penalty(model)
    value.backward()
    assert value.item() == pytest.approx(0.651513, abs=1e-6)
    assert a.grad is not None
    want = torch.tensor([[[0.0, a.grad[0, 0, 1], -3.333e-05], [27.548, 0.0, a.grad[0, 1, 2]]]])
    torch.testing.assert_close(a.grad.float(), want.float(), rtol=1e-4, atol=1e-9)
    assert phi(CARD)[0, 1, 0].item() == pytest.approx(0.909091, abs=1e-6)
    report = {quantity: by_layer["act"] for quantity, by_layer in method.report(model).items()}
    assert report == pytest.approx({"soft": 0.651513, "hard": 4 / 6, "above": 3 / 6}, abs=1e-6)


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(), nn.ReLU(), nn.Tanh()])
@pytest.mark.parametrize("masked", [True, False])
def test_gradient_through_the_activation_is_that_of_the_dense_loss(act: nn.Module, masked: bool) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64).requires_grad_()
    weights = torch.rand(3, 4, dtype=torch.float64) if masked else None
    keeps = isinstance(act, nn.ReLU)
    got = SoftDensity.apply(act(x) if keeps else x, act(x).detach(), None if keeps else act, 1e-2, weights)
    each = phi(act(x), 1e-2)
    want = (each.mean(-1) * weights).sum() if weights is not None else each.mean((1, 2)).sum()
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    (a,), (b,) = torch.autograd.grad(got, x), torch.autograd.grad(want, x)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_3_4_and_7_where_nothing_or_all_fires() -> None:
    for fill, soft, hard in ((-1.0, 0.0, 0.0), (1.0, 0.9999999, 1.0)):
        model, method = watched(nn.ReLU())
        model(torch.full((2, 3, 4), fill, dtype=torch.float64))
        assert method.report(model)["soft"]["act"] == pytest.approx(soft, abs=1e-7)
        assert method.report(model)["hard"]["act"] == hard
    a = torch.randn(2, 3, 50, dtype=torch.float64) * 1e-3
    a[..., :20] = 0
    softs = []
    for eps in (1e-4, 1e-7, 1e-10):
        model, method = watched(eps=eps)
        model(a)
        softs.append(method.report(model)["soft"]["act"])
    assert softs == sorted(softs) and 0.59 < softs[-1] <= 0.6 and softs[0] < 0.01
    gelu, method = watched(nn.GELU())
    gelu.float()(torch.tensor([[[-6.0, -5.0, 1.0, 0.0]]]))
    assert method.report(gelu)["hard"]["act"] == 0.5


@pytest.mark.parametrize("base", ["bert", "gpt2", "t5", "llama", "vit", "bart"])
def test_what_is_watched_and_the_value(base: str) -> None:
    model, batch = getattr(zoo, base)(), {"bert": zoo.sentences, "vit": zoo.images}.get(base, zoo.text)()
    lp.inject(model, [LoRA(r=2), DEFT()])
    names = [n for n, _, a in lp.adapters(model) if a.watches]
    ends = {"bert": "intermediate_act_fn", "gpt2": "mlp.act", "t5": "DenseReluDense.act", "llama": "mlp.down_proj",
            "vit": "mlp.activation_fn", "bart": "activation_fn"}  # fmt: skip
    two = base in ("t5", "bart")
    assert len(names) == (4 if two else 2) and all(n.endswith(ends[base]) for n in names)
    acts = [phi(a).mean() for a in seen(model, names, batch, inputs=base == "llama")]
    want = sum(acts) / 2  # of two stacks a sum of means
    assert term(model, batch).item() == pytest.approx(float(want), rel=1e-6)


def test_of_gated_mlps_the_gate_or_the_product() -> None:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 1, "vocab_size": 64}
    flan = T5ForConditionalGeneration(T5Config(feed_forward_proj="gated-gelu", decoder_start_token_id=0, **sizes))
    for model, where, end in ((flan, "auto", "act"), (flan, "product", "wo"), (zoo.llama(), "activation", "act_fn")):
        lp.inject(model, [LoRA(r=2), DEFT(observe=where)])
        assert all(n.endswith(f".{end}") for n, _, a in lp.adapters(model) if a.watches)
        lp.remove(model)


def test_t5_is_watched_before_its_dropout() -> None:
    model: Any = zoo.t5()
    lp.inject(model, [LoRA(r=2), DEFT()])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    first = "encoder.block.0.layer.1.DenseReluDense"
    model.get_submodule(first).train()  # the layers before it stay as they are
    (a,) = seen(model, [f"{first}.act"], zoo.text())
    (dropped,) = seen(model, [f"{first}.wo"], zoo.text(), inputs=True)
    hard = DEFT().report(model)["hard"][f"{first}.act"]
    share = [float((t != 0).double().mean()) for t in (a, dropped)]
    assert hard == pytest.approx(share[0], abs=1e-6) and share[1] < 0.7 * share[0]


def test_1_a_weight_of_zero_measures_and_changes_no_bit() -> None:
    models = []
    for methods in ([LoRA(r=2)], [LoRA(r=2), DEFT(weight=0)]):
        torch.manual_seed(0)
        model = zoo.bert()
        lp.inject(model, methods)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(3):
            out = model(**zoo.sentences())
            extra = lp.penalty(model)
            assert extra is None
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append((model, out))
    (plain, a), (beside, b) = models
    assert torch.equal(a.loss, b.loss) and torch.equal(a.logits, b.logits) and same(trained(plain), trained(beside))
    assert set(DEFT().report(beside)) == {"eval_soft", "eval_hard", "eval_above"}


def test_5_which_layers_a_method_reaches_and_no_base_gradient() -> None:
    for method, first in ((LoRA(r=2, **QV), True), (PfeifferAdapter(bottleneck=4), False)):
        model = zoo.bert()
        lp.inject(model, [method, DEFT()])
        model(**zoo.sentences())
        held: list[Any] = [a for _, _, a in lp.adapters(model) if a.watches]
        assert [a.terms[0].requires_grad for a in held] == [first, True]
        value: Any = lp.penalty(model)
        value.backward()
        assert all(".adapters." in n for n in gradients(model)) and gradients(model)


def test_6_terms_are_taken_once_and_two_forwards_count_alike() -> None:
    model, batch = zoo.bert(), zoo.sentences()
    lp.inject(model, [LoRA(r=2), DEFT()])
    other = batch | {"input_ids": batch["input_ids"].flip(0)[:2], "attention_mask": None, "labels": None}
    values = [float(term(model, b)) for b in (batch, other)]
    held: list[Any] = [a for _, _, a in lp.adapters(model) if a.watches]
    assert len(held) == 2 and all(not a.terms for a in held)
    model(**batch)
    assert all(len(a.terms) == 1 for a in held)
    assert float(term(model, other)) == pytest.approx((4 * values[0] + 2 * values[1]) / 6, rel=1e-6)
    model(**batch)
    copy.deepcopy(model)  # with a graph in flight
    model.train()
    assert all(not a.terms for a in held)  # no loss followed


def test_padding_counts_or_not() -> None:
    model, batch = zoo.bert(), zoo.sentences()
    methods = [DEFT(name="all"), DEFT(name="real", count_padding=False)]
    lp.inject(model, [LoRA(r=2), *methods])
    names = [n for n, _, a in lp.adapters(model) if n.endswith("act_fn")]
    acts = [phi(a).mean(-1) for a in seen(model, names[::2], batch)]  # (B, T) each
    mask = batch["attention_mask"]
    real = sum(((a * mask).sum(1) / mask.sum(1)).mean() for a in acts) / 2
    all_of_them = sum(a.mean() for a in acts) / 2
    model(**batch)
    got = [float(m.penalty(model)) for m in methods]  # type: ignore[arg-type]
    assert got == pytest.approx([float(all_of_them), float(real)], rel=1e-6) and abs(got[0] - got[1]) > 1e-5
    longer = {k: nn.functional.pad(batch[k], (0, 5)) for k in ("input_ids", "attention_mask")}
    model(**longer)
    again = [float(m.penalty(model)) for m in methods]  # type: ignore[arg-type]
    assert again[1] == pytest.approx(got[1], rel=1e-5) and abs(again[0] - got[0]) > 1e-5


@pytest.mark.parametrize("first", [True, False])
def test_a_soft_prompt_is_no_padding(first: bool) -> None:
    model, batch = zoo.llama(), zoo.text()
    batch["attention_mask"][1:, :3] = 0
    methods = [PromptTuning(num_tokens=3), DEFT(count_padding=False)]
    lp.inject(model, methods if first else methods[::-1])
    names = [n for n, _, a in lp.adapters(model) if n.endswith("down_proj")]
    acts = [phi(a).mean(-1) for a in seen(model, names, batch, inputs=True)]
    mask = nn.functional.pad(batch["attention_mask"], (3, 0), value=1)
    want = sum(((a * mask).sum(1) / mask.sum(1)).mean() for a in acts) / 2
    assert term(model, batch).item() == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("masked", [True, False])
def test_9_with_gradient_checkpointing(masked: bool) -> None:
    grads, values = [], []
    for mode in (None, False, True):
        torch.manual_seed(0)
        model: Any = zoo.bert()
        lp.inject(model, [LoRA(r=2), DEFT(count_padding=not masked, eps=1e-2)])
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
        if mode is not None:
            model.gradient_checkpointing_enable({"use_reentrant": mode})
            model.enable_input_require_grads()
        if mode is True:
            model(**zoo.sentences())
            with pytest.raises(ValueError, match=r"intermediate_act_fn' and others \(2\).*use_reentrant': False"):
                lp.penalty(model)
            continue
        out = model(**zoo.sentences())
        value: Any = lp.penalty(model)
        (out.loss + value).backward()
        assert not any(a.terms for _, _, a in lp.adapters(model) if hasattr(a, "terms"))  # of the second run
        hard = DEFT().report(model)["hard"]
        grads.append(gradients(model))
        values.append((float(value), hard))
    assert values[0] == values[1]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("base", "options"), [("bert", QV), ("t5", {"targets": ("q", "v")}), ("llama", {})])
def test_nothing_of_an_activations_size_is_kept_for_backward(base: str, options: dict[str, Any]) -> None:
    sizes = []
    for methods in ([LoRA(r=2, **options)], [LoRA(r=2, **options), DEFT()]):
        model, batch = getattr(zoo, base)().train(), {"bert": zoo.sentences}.get(base, zoo.text)()
        lp.inject(model, methods)
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        kept: dict[int, Tensor] = {}

        def pack(t: Tensor, own: set[int] = own, kept: dict[int, Tensor] = kept) -> Tensor:
            if t.untyped_storage().data_ptr() not in own:
                kept[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(**batch).loss
            extra = lp.penalty(model)
        assert loss.requires_grad and (len(methods) == 1) == (extra is None)
        sizes.append(sum(t.untyped_storage().nbytes() for t in kept.values()))
    assert sizes[1] - sizes[0] < 4 * zoo.B * zoo.T * 48 / 2  # less than half of one activation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_float32_under_autocast(dtype: torch.dtype) -> None:
    model = zoo.t5()  # its ReLU gives exact zeros, at which a square plus a vanished eps would be 0 / 0
    lp.inject(model, [LoRA(r=2), DEFT(eps=1e-9)])
    with torch.autocast("cpu", dtype):
        value = term(model, zoo.text())
    value.backward()
    assert value.dtype == torch.float32 and 0.5 < float(value) < 1.5
    assert all(g.isfinite().all() for g in gradients(model).values())


def test_8_training_lowers_the_density() -> None:
    after = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        model, method = zoo.t5().train(), DEFT(weight=weight, eps=1e-2)
        lp.inject(model, [LoRA(r=4), method])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
        for _ in range(30):
            loss, extra = model(**zoo.text()).loss, lp.penalty(model)
            (loss if extra is None else loss + extra).backward()
            optimizer.step()
            optimizer.zero_grad()
        hard = method.report(model)["hard"]
        after.append(sum(hard.values()) / len(hard))
    assert after[1] < 0.8 * after[0], after


class Penalties(lp.PEFT):
    """Notes the factor of every micro-batch."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        pl_module.factors.append(next(float(a.factor) for _, _, a in lp.adapters(pl_module) if a.watches))


METHODS = [LoRA(r=2), DEFT(eps=1e-2, warmup=0.5)]


def fit(root: Any, *more: Any, ckpt: Any = None, **options: Any) -> HFNet:
    net: Any = HFNet(zoo.bert)
    net.factors = []
    torch.manual_seed(3)
    peft = Penalties(METHODS, folder=None)
    run = trainer(root, peft, *more, accumulate_grad_batches=2, **{"max_epochs": 3} | options)
    torch.manual_seed(3)
    run.fit(net, tokens(), ckpt_path=ckpt)
    net.logged = dict(run.callback_metrics)
    net.reported = METHODS[1].report(net)
    return net


def test_warm_up_and_bitwise_resume_in_the_middle(tmp_path: Path) -> None:
    whole = fit(tmp_path, SaveAt(tmp_path, (1, 3, 6, 9)))  # 12 batches, 6 steps, of which 3 warm up
    assert whole.factors == pytest.approx([0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3] + [1] * 6)  # type: ignore
    assert 0 < whole.logged["deft/penalty"] <= 1  # type: ignore
    for batch in (1, 3, 6, 9):
        resumed = fit(tmp_path, ckpt=tmp_path / f"{batch}.ckpt")
        assert same(trained(whole), trained(resumed)) and whole.reported == resumed.reported  # type: ignore


def resumed_in_two(folder: str) -> list[Any]:
    options = {"strategy": "ddp", "devices": 2}
    whole = fit(folder, SaveAt(Path(folder), (3,)), **options)
    resumed = fit(folder, ckpt=Path(folder) / "3.ckpt", **options)
    return [same(trained(whole), trained(resumed)), [t.clone() for t in trained(whole)], whole.factors]  # type: ignore


def test_two_processes_resume_bit_for_bit_and_agree(tmp_path: Path) -> None:
    (ok, first, factors), (ok_too, second, _) = launch(resumed_in_two, folder=str(tmp_path))
    assert ok and ok_too and same(first, second)
    assert factors[:2] == [0, 0] and 0 < factors[2] < 1 and factors[-1] == 1


def test_warm_up_needs_an_end_of_the_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the Trainer has no bound"):
        fit(tmp_path, max_epochs=-1, max_time={"seconds": 60})


def test_merge_and_undo_and_folder(tmp_path: Path) -> None:
    model = zoo.bert()
    lp.inject(model, METHODS)
    for _, _, a in lp.adapters(model, "lora"):
        nn.init.normal_(a.B, std=0.1)  # type: ignore[arg-type]
    want = model(**zoo.sentences()).logits
    lp.save(model, tmp_path / "folder")
    back = copy.deepcopy(model)
    lp.remove(back)
    lp.load(back, tmp_path / "folder")
    assert torch.equal(back(**zoo.sentences()).logits, want)
    merged = lp.merge(model)
    assert not list(lp.adapters(model))
    torch.testing.assert_close(model(**zoo.sentences()).logits, want, atol=1e-5, rtol=0)
    merged.undo()
    assert torch.equal(model(**zoo.sentences()).logits, want)
    assert len([a for _, _, a in lp.adapters(model) if a.watches]) == 2


def test_evaluation_is_measured_apart_until_the_next_step() -> None:
    model, method = zoo.bert(), DEFT()
    lp.inject(model, [LoRA(r=2), method])
    with torch.no_grad():
        for half in (slice(0, 1), slice(1, 4)):  # means over examples, not over batches
            model(**{k: v[half] for k, v in zoo.sentences().items()})
    got = method.report(model)["eval_soft"]
    names = list(got)
    want = {n: float(phi(a).mean()) for n, a in zip(names, seen(model, names, zoo.sentences()), strict=True)}
    assert got == pytest.approx(want, rel=1e-5) and "soft" not in method.report(model)
    model.train()
    term(model, zoo.sentences())
    assert method.report(model)["eval_soft"] == pytest.approx(want, rel=1e-5) and method.report(model)["soft"]
    method.forget(model)
    assert method.report(model) == {}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (zoo.bert, {"weight": -1.0}, "weight is a number of at least 0, got -1.0"),
        (zoo.bert, {"weight": math.nan}, "weight is a number"),
        (zoo.bert, {"eps": 0.0}, "eps is above 0"),
        (zoo.bert, {"warmup": 2.0}, r"warmup lies in \[0, 1\].*got 2.0"),
        (zoo.bert, {"threshold": -1.0}, "threshold is at least 0"),
        (zoo.bert, {"warmup": 0.5, "weight": 0.0}, "warmup has no effect"),
        (zoo.bert, {"observe": "gate"}, "observe is one of .*got 'gate'"),
        (zoo.bert, {"observe": "product", "targets": ("dense",)}, "observe has no effect"),
        (zoo.bert, {"targets": ("intermediate_fn",)}, "nearest: 'intermediate'"),
        (zoo.bert, {"layers": "5"}, "layers '5' choose no block"),
        (zoo.cnn, {}, "this Sequential has no MLP.*name modules by targets"),
        (zoo.vit, {"count_padding": False}, "has none: without padding leave count_padding=True"),
    ],
)
def test_bad_options_and_what_matches_nothing(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lp.inject(make(), [LoRA(r=2, targets=("all-linear",)), DEFT(**options)])


def test_a_loss_that_can_do_nothing_is_refused() -> None:
    model = zoo.bert()
    lp.inject(model, DEFT(), train=("classifier",))
    model(**zoo.sentences())
    with pytest.raises(ValueError, match=r"nothing that trains comes before.*\[LoRA\(\), DEFT\(\)\]"):
        lp.penalty(model)
    with pytest.raises(ValueError, match="no activation was seen since the last step"):
        lp.penalty(model)
    with torch.no_grad():
        assert lp.penalty(model) is None


def test_a_shared_activation_module_is_watched_behind() -> None:
    model: Any = zoo.bert()
    first, second = (layer.intermediate for layer in model.bert.encoder.layer)
    second.intermediate_act_fn = first.intermediate_act_fn
    lp.inject(model, [LoRA(r=2, **QV), DEFT()])
    names = [n for n, _, a in lp.adapters(model) if a.watches]
    assert [n[-13:] for n in names] == [".output.dense"] * 2
    lp.remove(model)
    with pytest.raises(ValueError, match="is no module of its own.*observe='auto'"):
        lp.inject(model, DEFT(observe="activation"))


def test_the_whole_through_a_trainer(tmp_path: Path) -> None:
    net = HFNet(nets.bert)  # in training mode
    run = trainer(tmp_path, PEFT([LoRA(r=2), DEFT(eps=1e-2)], merge_at_end=True, folder="adapter"), max_epochs=1)
    run.fit(net, tokens())
    assert not list(lp.adapters(net)) and (tmp_path / "history.csv").is_file()
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert any(line.startswith("deft/hard,4,net.bert.encoder.layer.1.") for line in lines)
