"""Light-PEFT: scores by hand, masks against cuts, the whole course of a fit, files, resume, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning_peft_plugins.additive.houlsby_adapter import HoulsbyAdapter
from lightning_peft_plugins.lifecycle.light_peft import Estimate, LightPEFT
from lightning_peft_plugins.reparameterized.dora import DoRA
from lightning_peft_plugins.reparameterized.lora import LoRA
from torch import Tensor, nn
from transformers import BertForSequenceClassification, LlamaForCausalLM

import lightning_peft as lp
from lightning_peft import PEFT, Step, io, parts, surgery
from lightning_peft.attach import attached
from lightning_peft.inject import penalty
from tests import nets
from tests.fits import SaveAt, run, same, trained
from tests.launch import launch
from tests.nets import HFNet, tokens, trainer
from tests.test_surgery import logits, made, masked, opt, roberta
from tests.zoo import bases

END = 3  # steps of the estimations below


def light(**options: Any) -> LightPEFT:
    return LightPEFT(**{"estimation_steps": END, "module_ratio": 0.5} | options)


def drawn(model: nn.Module, *more: Any) -> Any:
    """Injected with LoRA whose B is no longer zero, and masks in no order of position."""
    torch.manual_seed(3)
    method = more[0] if more else light()
    lp.inject(model, [LoRA(r=4), method], train=[n for n in ("classifier",) if hasattr(model, n)])
    with torch.no_grad():
        for _, _, adapter in lp.adapters(model, "lora"):
            adapter.B.normal_(std=0.1)  # type: ignore[union-attr]
        for _, _, a in method.adapters(model):
            if isinstance(a, Estimate) and a.mask is not None:
                a.mask.copy_(1 + 0.01 * torch.randn(len(a.mask)))
    return model


def estimates(model: nn.Module) -> dict[str, Estimate]:
    return {n: a for n, _, a in lp.adapters(model, "light_peft") if isinstance(a, Estimate)}


# ---- masks and scores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [nets.bert, roberta, opt, nets.llama])
def test_masks_of_one_change_nothing_and_masks_of_zero_are_the_cut(family: Any) -> None:
    model = made(family)
    before = logits(model)
    lp.inject(model, [LoRA(r=2), light()], dtype=torch.float64)
    assert torch.equal(logits(model), before)
    heads = {a.name: [0, 2] if a.units > 2 else [1] for a in parts.attentions(model)}
    channels = {m.name: list(range(0, 48, 5)) for m in parts.mlps(model)}
    bare = copy.deepcopy(model)
    for _, host, _ in list(lp.adapters(bare, "light_peft")):
        lp.detach(host, "light_peft")
    reference = logits(masked(bare, heads, channels))
    where = [(a.o, heads[a.name]) for a in parts.attentions(model)]
    for layer, keep in where + [(m.down, channels[m.name]) for m in parts.mlps(model)]:
        held: Any = estimates(model)[layer]
        held.mask.data = torch.tensor([float(i in keep) for i in range(len(held.mask))], dtype=torch.float64)
    assert (logits(model) - reference).abs().max() < 1e-12 < (reference - before).abs().max()


def scored(model: Any, batch: dict[str, Tensor]) -> dict[str, Estimate]:
    """After the scores of one step have been taken, the last of the estimation."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model(**batch).loss.backward()
    light().before_step(model, Step(index=END - 1, planned=9))
    return estimates(model)


def test_scores_of_modules_and_ranks_by_their_formulas_without_padding() -> None:
    model = drawn(nets.bert())
    model.config._attn_implementation = "eager"
    batch, seen = bases.sentences(), {}
    for name, host, _ in list(lp.adapters(model, "lora")):
        host.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
    got = scored(model, batch)
    real = batch["attention_mask"].bool()
    assert not real.all()
    for name, host, a in lp.adapters(model, "lora"):
        if "layer" not in name:
            assert name not in got  # the pooler lies in no block
            continue
        x, A, B = (t.detach().double() for t in (seen[name], a.A, a.B))  # type: ignore[union-attr]
        if got[name].mask is not None:
            x = x * got[name].mask.double().repeat_interleave(got[name].width)  # type: ignore[union-attr]
        delta = 4.0 * x @ A.T @ B.T  # alpha / r = 16 / 4
        plain = x @ host.weight.double().T + host.bias.double()
        score = (delta.norm(dim=-1) / plain.norm(dim=-1))[real].mean()
        torch.testing.assert_close(got[name].importance.double(), score.detach(), rtol=1e-5, atol=0)
        ranks = (a.A * a.A.grad).mean(1).abs() + (a.B * a.B.grad).mean(0).abs()  # type: ignore[union-attr]
        torch.testing.assert_close(got[name].scores("lora"), ranks.detach(), rtol=1e-6, atol=0)


def test_what_padding_holds_does_not_count() -> None:
    batch = bases.sentences()
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7)}
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    model = drawn(nets.bert())
    first, second = (scored(m, b) for m, b in ((model, batch), (copy.deepcopy(model), other)))
    for name, a in first.items():
        torch.testing.assert_close(a.importance, second[name].importance, rtol=1e-5, atol=0)


def test_a_fresh_lora_has_no_importance_and_ranks_that_come_from_B_alone() -> None:
    model = nets.bert()
    lp.inject(model, [LoRA(r=4), light()])
    for name, a in scored(model, bases.sentences()).items():
        assert a.importance == 0 and not a.scores("lora").any(), name  # B is zero, and with it dA and B * dB


def test_the_first_half_of_the_estimation_is_not_scored() -> None:
    model = drawn(nets.bert())
    model.train()
    model(**bases.sentences()).loss.backward()
    for index, counts in ((0, False), (1, True)):  # of three steps the first is dropped
        light().before_step(model, Step(index=index, planned=9))
        assert all(bool(a.importance) == counts for a in estimates(model).values())


def test_penalty_is_l1_of_all_masks() -> None:
    model = drawn(nets.bert(), light(l1_coef=0.5))
    masks = [a.mask.detach() for a in estimates(model).values() if a.mask is not None]
    assert sum(map(len, masks)) == 2 * (4 + 48)
    masks[0][0] = -2.0
    total = penalty(model)
    assert total is not None
    torch.testing.assert_close(float(total), 0.5 * sum(float(m.abs().sum()) for m in masks), rtol=1e-6, atol=0)


# ---- pruning --------------------------------------------------------------------------------------------------------


def prune(model: Any, method: LightPEFT) -> None:
    model(**bases.sentences()).loss.backward()
    method.before_step(model, Step(index=END - 1, planned=9))
    method.after_step(model, Step(index=END, planned=9))


def test_what_stays_is_what_has_the_largest_signed_masks() -> None:
    model, method = nets.bert(), light(module_ratio=0.0, rank_ratio=0.0, head_ratio=0.5, ffn_ratio=0.25)
    drawn(model, method)
    held, (first, second) = estimates(model), parts.attentions(model)
    held[first.o].mask.data = torch.tensor([1.1, -3.0, 0.9, 1.2])  # type: ignore[union-attr]
    held[second.o].mask.data = torch.tensor([0.1, 0.2, 0.3, 0.4])  # type: ignore[union-attr]
    wanted, (one, two) = {}, parts.mlps(model)
    held[two.down].mask.data += 0.004  # type: ignore[union-attr, operator]  # so that one layer loses more
    both = torch.cat([held[m.down].mask.detach() for m in (one, two)])  # type: ignore[union-attr]
    order = both.argsort(descending=True)[:72]  # of 96; the quantile lies between the 24th and the 25th
    for i, m in enumerate((one, two)):
        wanted[m.name] = sorted(int(j) - 48 * i for j in order if 48 * i <= j < 48 * (i + 1))
    assert len(wanted[one.name]) != 36
    prune(model, method)
    assert surgery.record(model) == {"heads": {first.name: [0, 3], second.name: [2, 3]}, "channels": wanted}


def test_the_pruned_model_is_the_cut_one_with_fewer_ranks_at_the_old_scale() -> None:
    method = light(rank_ratio=0.5)
    model = drawn(nets.bert(), method)
    model.train()
    full, method_ = copy.deepcopy(model), method
    prune(model, method_)
    left = {n for n, _, _ in lp.adapters(model, "lora")} - {"bert.pooler.dense"}
    total = sum(len(a.A) for n, _, a in lp.adapters(model, "lora") if n in left)  # type: ignore[arg-type]
    assert total == 12 * 4 // 2 // 2 and 0 < len(left) <= 6
    for _, host, _ in list(lp.adapters(full, "light_peft")):
        lp.detach(host, "light_peft")
    surgery.apply(full, surgery.record(model))
    for name, host, adapter in list(lp.adapters(full, "lora")):
        if name not in left | {"bert.pooler.dense"}:
            lp.detach(host, "lora")
        elif name in left:  # where B's columns of the ranks that went are zero, the scale stays alpha / 4
            mine: Any = attached(model.get_submodule(name))["lora"]
            gone = [j for j in range(4) if not any(torch.equal(adapter.A[j], a) for a in mine.A)]  # type: ignore
            assert len(gone) == 4 - len(mine.A)
            adapter.B.data[:, gone] = 0.0  # type: ignore[union-attr, operator]
    with torch.no_grad():
        a, b = (m.eval()(**bases.sentences()).logits for m in (model, full))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_parameters_that_are_left() -> None:
    model, method = nets.bert(), light(head_ratio=0.5, ffn_ratio=0.5, module_ratio=0.75)
    before = sum(p.numel() for p in model.parameters())
    drawn(model, method)
    prune(model, method)
    p, q, dh, d = 2 * 2, 48, 8, 32  # heads of both layers, channels of both
    own = sum(x.numel() for x in model.parameters()) - sum(
        x.numel() for _, _, a in lp.adapters(model) for x in a.parameters()
    )
    assert before - own == 4 * d * dh * p + 3 * dh * p + 2 * d * q + q
    assert len([n for n, _, _ in lp.adapters(model) if "layer" in n]) <= 3
    frozen = {n for n, x in model.named_parameters() if not x.requires_grad}
    assert {n for n, _ in model.named_parameters()} - frozen == {
        n for n, _ in model.named_parameters() if ".adapters.lora." in n or n.startswith("classifier")
    }
    assert not any(a is not None for a in method.adapters(model))
    assert method.report(model)["heads"] == dict.fromkeys((a.name for a in parts.attentions(model)), 2)


def test_grouped_queries_go_with_their_keys_and_gates_with_their_rows() -> None:
    model, method = nets.llama(), light(head_ratio=0.5, ffn_ratio=0.5, ffn_multiple=8, module_ratio=0, rank_ratio=0)
    lp.inject(model, [LoRA(r=2, targets=("attention",)), method])
    prune_text(model, method)
    for a, m in zip(parts.attentions(model), parts.mlps(model), strict=True):
        assert (a.heads, a.kv_heads) == (2, 1)
        gate, up = (model.get_submodule(r).weight for r in m.rows)
        assert gate.shape == up.shape == (m.channels, 32) and m.channels % 8 == 0  # type: ignore[union-attr]


def prune_text(model: Any, method: LightPEFT) -> None:
    model(**bases.text()).loss.backward()
    method.before_step(model, Step(index=END - 1, planned=9))
    method.after_step(model, Step(index=END, planned=9))


@pytest.mark.parametrize("other", [DoRA(r=4), HoulsbyAdapter(bottleneck=8, train_norms=False)])
def test_other_methods_lose_modules_and_ranks_too(other: Any) -> None:
    model, method = nets.bert(), light(module_ratio=0.5)
    lp.inject(model, [other, method])
    places = len([n for n, _, _ in lp.adapters(model, other.name) if "layer" in n])
    with torch.no_grad():
        for _, _, a in lp.adapters(model, other.name):
            for p in a.parameters():
                p.add_(0.1 * torch.randn_like(p))
    model.train()
    before = method.report(model)["rank"]
    prune(model, method)
    left = [n for n, _, _ in lp.adapters(model, other.name) if "layer" in n]
    assert 0 < len(left) <= places // 2
    after = {n: r for n, r in method.report(model)["rank"].items() if n in left}
    assert sum(after.values()) == sum(before[n] for n in before if "layer" in n) // 4
    model(**bases.sentences()).loss.backward()


# ---- a whole fit ----------------------------------------------------------------------------------------------------


class Scheduled(HFNet):
    """AdamW under a schedule that falls to zero over as many steps as the Trainer says; notes every rate."""

    def __init__(self, make: Any = nets.bert) -> None:
        super().__init__(make)
        self.asked: list[int] = []
        self.rates: list[float] = []

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        self.asked.append(steps)
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def fitted(root: Path, *more: L.Callback, ckpt: Path | None = None, **options: Any) -> Scheduled:
    """Five batches an epoch and windows of two: three steps, and the estimation of four ends within an epoch."""
    net = Scheduled()
    methods = [LoRA(r=4, dropout=0.1), LightPEFT(estimation_steps=4, ffn_mask_lr_mult=3.0)]
    common: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_steps": 9}
    run(root, net, methods, *more, **common | {"max_epochs": -1} | options, data=tokens(20), ckpt_path=ckpt)
    return net


def test_optimizers_and_schedules_begin_anew_with_the_small_model(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Look(L.Callback):
        def on_train_batch_end(self, fit: Any, net: Any, *rest: Any) -> None:
            if fit.global_step == 4 and not seen:
                state = fit.optimizers[0].state_dict()["state"]
                held = {id(p) for g in fit.optimizers[0].param_groups for p in g["params"]}
                seen.extend([state, held == {id(p) for p in net.parameters() if p.requires_grad}])

    net = fitted(tmp_path, Look())
    assert net.asked == [4, 5] and seen == [{}, True]
    torch.testing.assert_close(net.rates, [1e-2 * x for x in (1, 0.75, 0.5, 0.25, 1, 0.8, 0.6, 0.4, 0.2)])
    assert not estimates(net) and surgery.record(net)["heads"]


def test_a_fit_resumes_bitwise_from_any_batch(tmp_path: Path) -> None:
    places = (2, 3, 5, 6, 7, 8, 9, 10, 12, 14)  # in both halves of the estimation, at its end, half windows, and after
    whole = fitted(tmp_path, SaveAt(tmp_path, places))
    cut = []
    for place in places:
        resumed = fitted(tmp_path, ckpt=tmp_path / f"{place}.ckpt")
        assert resumed.losses == whole.losses[place:]
        assert resumed.rates == whole.rates[-len(resumed.rates) :]
        assert same(trained(whole), trained(resumed)), place
        cut.append(bool(torch.load(tmp_path / f"{place}.ckpt")["lightning_peft"]["cut"]))
    assert True in cut and False in cut and cut == sorted(cut)


def in_ddp(root: Path) -> list[Any]:
    two: dict[str, Any] = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 1, "max_steps": 7}
    places = (2, 4, 5)
    whole = fitted(root, SaveAt(root / "two", places), **two)
    found: list[Any] = [trained(whole), surgery.record(whole)]
    for place in places:
        resumed = fitted(root, ckpt=root / "two" / f"{place}.ckpt", **two)
        found.append((whole.losses[place:] == resumed.losses, same(trained(whole), trained(resumed))))
    return found


@pytest.mark.slow
def test_two_processes_prune_alike_and_resume_bitwise(tmp_path: Path) -> None:
    first, second = launch(in_ddp, root=tmp_path)
    assert same(first[0], second[0]) and first[1] == second[1] and first[1]["channels"]
    for facts in (first, second):
        assert facts[2:] == [(True, True)] * 3


def test_folder_and_checkpoint_rebuild_the_small_model_from_the_untouched_base(tmp_path: Path) -> None:
    net = fitted(tmp_path, SaveAt(tmp_path, [12]))
    net.eval()
    batch = next(iter(tokens(20)))
    wanted = net.net(**batch).logits
    io.save(net, tmp_path / "adapter")
    again: Any = lp.load(Scheduled(), tmp_path / "adapter").eval()
    assert torch.equal(again.net(**batch).logits, wanted)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in Scheduled().parameters())
    middle: Any = lp.restore(Scheduled(), tmp_path / "12.ckpt")
    assert surgery.record(middle) == surgery.record(net)
    wrong = Scheduled()
    with torch.no_grad():
        wrong.net.bert.encoder.layer[0].attention.self.query.weight.add_(1.0)
    with pytest.raises(ValueError, match=r"another base: 1 of .* 'net.bert.encoder.layer.0.attention.self.query"):
        lp.load(wrong, tmp_path / "adapter")
    assert surgery.record(wrong) == {}


def test_a_cut_model_takes_no_checkpoint_of_the_uncut_and_says_that_it_stays_cut(tmp_path: Path) -> None:
    net = fitted(tmp_path, SaveAt(tmp_path, [2]))
    peft = PEFT([LoRA(r=4, dropout=0.1), LightPEFT(estimation_steps=4, ffn_mask_lr_mult=3.0)], folder=None)
    with pytest.raises(ValueError, match="is of the uncut model, and heads or channels of this one are gone"):
        trainer(tmp_path, peft, max_steps=9, max_epochs=-1).fit(net, tokens(20), ckpt_path=tmp_path / "2.ckpt")
    with pytest.warns(UserWarning, match="were cut out of this model and stay away"):
        lp.remove(net)


def test_a_second_fit_goes_on_with_what_is_left(tmp_path: Path) -> None:
    net = fitted(tmp_path)
    record, asked = surgery.record(net), len(net.asked)
    run(tmp_path, net, [LoRA(r=4, dropout=0.1), LightPEFT(estimation_steps=4, ffn_mask_lr_mult=3.0)], data=tokens(20))
    assert surgery.record(net) == record and net.asked[asked:] == [5]


@pytest.mark.parametrize("make, cls", [(nets.bert, BertForSequenceClassification), (nets.llama, LlamaForCausalLM)])
def test_merged_it_is_a_folder_for_from_pretrained(make: Any, cls: Any, tmp_path: Path) -> None:
    net, data = HFNet(make), tokens(20, lm=cls is LlamaForCausalLM)
    L.seed_everything(5, verbose=False)
    peft = PEFT([LoRA(r=4), light(module_ratio=0.0, ffn_multiple=8)], model="net", merge_at_end=True)
    trainer(tmp_path, peft, max_steps=6, max_epochs=-1).fit(net, data)
    other = cls.from_pretrained(peft.written["merged"]).eval()
    batch = next(iter(data))
    with torch.no_grad():
        wanted = net.eval().net(**batch).logits
        torch.testing.assert_close(other(**batch).logits, wanted, rtol=0, atol=1e-5)
    assert max(m.channels for m in parts.mlps(net)) == parts.mlps(other)[0].channels < 48
    heads = {a.units for a in parts.attentions(other)}
    assert heads == ({4} if cls is BertForSequenceClassification else {1})


def test_cached_generation_after_pruning() -> None:
    model, method = nets.llama(), light()
    drawn(model, method)
    prune_text(model.train(), method)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = torch.tensor([[5, 6, 7, 8]])
    cached = model.eval().generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_estimates_are_no_change_of_a_weight_and_cannot_be_merged() -> None:
    with pytest.raises(ValueError, match="adapter 'light_peft' on .*, which cannot be merged"):
        lp.merge(drawn(nets.bert()))


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, match",
    [
        ({"estimation_steps": 0}, "a share of them below 1; got 0"),
        ({"estimation_steps": 2.5}, "got 2.5"),
        ({"head_ratio": 1.0}, r"ratios lie in \[0, 1\)"),
        ({"module_ratio": -0.1}, "ratios"),
        ({"head_ratio": 0, "ffn_ratio": 0, "module_ratio": 0, "rank_ratio": 0}, "one at least is above 0"),
        ({"ffn_scope": "all"}, "ffn_scope is one of .* got 'all'"),
        ({"l1_coef": -1}, "l1_coef is 0 or more"),
        ({"ffn_multiple": 0}, "ffn_multiple 1 or more"),
        ({"attn_mask_lr_mult": 0}, "learning rates above 0"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LightPEFT(**options)


@pytest.mark.parametrize(
    "make, methods, match",
    [
        (nets.bert, [light(), LoRA()], r"no adapter is there for module_ratio=0.5 .* list it after others"),
        (nets.bert, [LoRA(), light(exclude=("layer.7",))], "exclude 'layer.7' leaves nothing out; nearest"),
        (bases.t5, [LoRA(), light()], "cannot cut heads .* position bias .* set head_ratio=0, or exclude="),
        (bases.nf4_llama, [LoRA(), light()], "cannot cut .* quantised .* cut first, then quantise"),
        (nets.mlp, [LoRA(), light()], "no heads that can be cut are found in this Sequential; set head_ratio=0"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_the_fit(make: Any, methods: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        lp.inject(make(), methods)


def test_fits_that_are_too_short_or_listed_the_wrong_way_round(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would estimate for 200 steps, and the whole fit has 5"):
        run(tmp_path, HFNet(nets.bert), [LoRA(r=2), LightPEFT()], data=tokens())
    with pytest.raises(ValueError, match="needs the number of optimizer steps"):
        run(tmp_path, HFNet(nets.bert), [LoRA(r=2), LightPEFT()], data=tokens(), max_steps=-1)
    with pytest.raises(ValueError, match="must see what all other adapters on .* list it last"):
        methods = [LoRA(r=2), light(), LoRA(r=2, name="second")]
        run(tmp_path, HFNet(nets.bert), methods, data=tokens())
    with pytest.warns(UserWarning, match="ended within its estimation, so nothing was pruned"):
        net = HFNet(nets.bert)
        run(tmp_path, net, [LoRA(r=2), light()], data=tokens(), peft={"total_steps": 9}, max_steps=2)
    assert surgery.record(net) == {}


def test_steps_of_an_estimation_by_share() -> None:
    model = drawn(nets.bert())
    for share, total, steps in ((0.05, 10_000, 500), (0.05, 1_000, 200), (0.05, 100_000, 800), (0.5, 1_000, 500)):
        assert LightPEFT(estimation_steps=share).restarts(model, Step(index=0, planned=total)) == (steps,)
    assert LightPEFT(estimation_steps=3).restarts(model, Step(index=0)) == (3,)


def test_only_what_is_not_excluded_is_masked() -> None:
    model = nets.bert()
    lp.inject(model, [LoRA(r=2), light(exclude=("layer.0",))])
    with_mask = [n for n, a in estimates(model).items() if a.mask is not None]
    assert with_mask == ["bert.encoder.layer.1.attention.output.dense", "bert.encoder.layer.1.output.dense"]
