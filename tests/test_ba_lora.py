"""BA-LoRA's losses and preset by the numbers of its card (methods/ba_lora.md), and beside other adapters."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning_peft_plugins.reparameterized import ba_lora_loss
from lightning_peft_plugins.reparameterized.ba_lora import BALoRA
from lightning_peft_plugins.reparameterized.ba_lora_loss import BALoRALoss
from lightning_peft_plugins.reparameterized.lora import LoRA
from lightning_peft_plugins.selective.bitfit import BitFit
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft import PEFT, Step
from lightning_peft.attach import Adapters
from lightning_peft.testing.case import train_mode
from tests import fits, nets
from tests.zoo import bases as zoo

P2, Q2 = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [0.0, 2.0]])
P3 = torch.tensor([[[5.0, 0, 0, 0], [2.0, 0, 0, 0], [0, 1.0, 0, 0]]])
Q3 = torch.tensor([[[0, 5.0, 0, 0], [1.0, 0, 0, -1.0], [0, 1.0, 1.0, -1.0]]])


class Says(nn.Module):
    """Returns given logits; its one layer adds what an adapter makes of nothing."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("given", logits)
        self.layer = nn.Linear(1, logits.shape[-1], bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, labels: Tensor | None = None, **more: Any) -> Any:
        return SimpleNamespace(logits=self.given + self.layer(torch.ones(*self.given.shape[:-1], 1)))


def terms(P: Tensor, Q: Tensor, labels: list[int] | None = None, **options: Any) -> tuple[list[float], float]:
    """(the three terms, the penalty) where the model without adapters says P and with them Q."""
    model, method = Says(P), BALoRALoss(**options)
    lp.inject(model, [LoRA(r=1, targets=("layer",)), method])
    watch = watch_of(model)
    model(labels=None if labels is None else torch.tensor([labels]))
    args, kwargs, output = watch.seen
    output.logits = Q + 0 * output.logits
    total = method.penalty(model)
    assert total is not None and watch.seen is None
    return watch.terms.tolist(), total.item()


def watch_of(model: nn.Module) -> Any:
    return next(a for _, _, a in lp.adapters(model) if a.watches)


def near(value: float) -> Any:
    return pytest.approx(value, abs=2e-5)


# ---- the terms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tau", "want"), [(1.0, 0.73448), (2.0, 0.79067)])
def test_2_classes(tau: float, want: float) -> None:
    found, total = terms(P2, Q2, form="nlu", k=1, temperature=tau, lambda1=0.5, lambda2=0.25, lambda3=0.125)
    assert found == [near(want), near(4.0), near(-0.76874)]
    assert total == near(0.5 * want + 0.25 * 4.0 - 0.125 * 0.76874)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"top_k": 2, "k": 1}, (0.16612, -0.63768, -0.85065)),
        ({"top_k": 4, "k": 2, "temperature": 1.0}, (0.13358, -1.16854, -1.37638)),
        ({"top_k": 2, "k": 1, "svd_norm": "nuclear"}, (0.16612, -0.63768, -0.61803)),
        ({"top_k": 9, "k": 9}, (0.16612, -1.16854, -1.37638)),  # more than there are
    ],
)
def test_3_tokens_whose_labels_count(options: dict[str, Any], want: tuple[float, ...]) -> None:
    found, _ = terms(P3, Q3, [-100, 1, 1], shift=False, **options)
    assert found == [near(w) for w in want]
    shifted = [torch.cat([z[:, 1:], z[:, :1]], 1) for z in (P3, Q3)]  # predicting positions lie one to the left
    assert terms(*shifted, [-100, 1, 1], **options, shift=False)[0][0] != near(want[0])
    assert terms(*shifted, [-100, 1, 1], **options)[0] == [near(w) for w in want]


def test_5_the_teacher_comes_first_in_the_divergence() -> None:
    by_hand = (P2.double().softmax(-1) * (P2.double().log_softmax(-1) - Q2.double().log_softmax(-1))).sum(-1).mean()
    assert float(ba_lora_loss.consistency(P2, Q2, 1.0)) == near(float(by_hand))
    P, Q = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    assert abs(float(ba_lora_loss.consistency(P, Q) - ba_lora_loss.consistency(Q, P))) > 0.01


def test_7_the_frobenius_form_is_least_where_k_values_are_equal() -> None:
    for sigma, k, norm, want in (
        ((1.0, 1.0), 2, "frobenius", -math.sqrt(2)),
        ((1.0, 0.0), 2, "frobenius", -1.0),
        ((1.0, 0.0), 1, "nuclear", -1.0),
    ):
        assert float(ba_lora_loss.dominance(torch.diag(torch.tensor(sigma)), k, norm)) == near(want)


@pytest.mark.parametrize("norm", ["frobenius", "nuclear"])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_10_gradients_of_the_singular_values(norm: str, shape: tuple[int, int]) -> None:
    Z = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sigma = torch.linalg.svdvals(Z)
    whole = sigma.sum() if norm == "nuclear" else sigma.square().sum().sqrt()
    got = ba_lora_loss.dominance(Z, 3, norm)
    assert float(got) == near(float(-sigma[:3].sum() / whole))
    assert torch.autograd.gradcheck(lambda z: ba_lora_loss.dominance(z, 3, norm), (Z,))


def test_10_half_precision_and_autocast_do_not_reach_the_terms() -> None:
    torch.manual_seed(0)
    P, Q = torch.randn(1, 9, 30), torch.randn(1, 9, 30)
    P, Q = P.bfloat16(), Q.bfloat16()
    want = terms(P.float(), Q.float(), [1] * 9)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert terms(P.float(), Q, [1] * 9)[0][1:] == [pytest.approx(w, abs=1e-6) for w in want[1:]]


def test_4_the_cosine_falls_to_a_tenth() -> None:
    model, method = zoo.llama(), BALoRALoss()
    lp.inject(model, [LoRA(r=1), method])
    watch, found = watch_of(model), []
    for index in range(5):
        method.after_step(model, Step(index=index, planned=4))
        found.append(method._weights(watch.progress)[0].item())
        assert method._weights(watch.progress)[1:].tolist() == [near(0.005), near(0.005)]
    assert found == [pytest.approx(w, abs=1e-6) for w in (0.025, 0.021705, 0.01375, 0.005795, 0.0025)]
    assert BALoRALoss(lambda1_schedule="none")._weights(watch.progress)[0].item() == near(0.025)
    method.finish(model)
    assert watch.progress == 0
    with pytest.raises(ValueError, match="needs the number of optimizer steps"):
        method.after_step(model, Step(index=1))


# ---- the teacher ---------------------------------------------------------------------------------------------------


def test_1_at_the_start_the_teacher_is_the_student() -> None:
    base = zoo.llama()
    want = base(**zoo.text()).logits
    model, method = copy.deepcopy(base), BALoRA(r=4, niter=0)
    lp.inject(model, method)
    assert torch.allclose(model(**zoo.text()).logits, want, rtol=1e-4, atol=1e-6)
    method.penalty(model)
    assert 0 <= float(watch_of(model).terms[0]) < 1e-6
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        4 * (m.in_features + m.out_features)
        for n, m in base.named_modules()
        if isinstance(m, nn.Linear) and "proj" in n
    )


def test_9_the_teacher_is_the_pretrained_model_not_its_residual() -> None:
    base = zoo.llama()
    model, method = copy.deepcopy(base), BALoRA(r=2)
    lp.inject(model, method)
    move(model)
    batch = zoo.text()
    Q, P = model(**batch).logits[:, :-1].flatten(0, 1), base(**batch).logits[:, :-1].flatten(0, 1)
    method.penalty(model)
    want = [
        4 * nn.functional.kl_div((Q / 2).log_softmax(-1), (P / 2).softmax(-1), reduction="batchmean"),
        -torch.distributions.Categorical(logits=Q.topk(20).values).entropy().mean(),
        -torch.linalg.svdvals(Q)[:10].sum() / Q.norm(),
    ]
    assert watch_of(model).terms.tolist() == [pytest.approx(float(w), rel=1e-4) for w in want] and want[0] > 1e-3


def move(model: nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


def test_6_the_teacher_draws_nothing_and_takes_no_gradient() -> None:
    model = nets.bert(hidden_dropout_prob=0.5)
    lp.inject(model, [LoRA(r=2, dropout=0.5), BALoRALoss(form="nlu", k=1)], train=("classifier",))
    move(model)
    model.train()
    modes = {m: m.training for m in model.modules()}
    torch.manual_seed(0)
    loss = model(**zoo.sentences()).loss
    before = torch.get_rng_state()
    term = lp.penalty(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert {m: m.training for m in model.modules()} == modes
    assert all(c.active for c in model.modules() if isinstance(c, Adapters))
    assert term is not None
    (loss + term).backward()
    # the gradient is that of the student alone: with a fixed teacher it is the same
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(0)
    output = model(**zoo.sentences())
    plain = nets.bert(hidden_dropout_prob=0.5).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    P, Q = plain(**zoo.sentences()).logits.detach(), output.logits
    C = torch.cov(Q.T)
    sigma = torch.linalg.svdvals(Q)
    dominance = -sigma[0] / sigma.sum()
    consistency = 4 * nn.functional.kl_div((Q / 2).log_softmax(-1), (P / 2).softmax(-1), reduction="batchmean")
    (output.loss + 0.15 * consistency + 0.03 * (C - C.diag().diag()).square().sum() / 3 + 0.03 * dominance).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(p.grad, got[name], atol=1e-6), name


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = zoo.llama()
        lp.inject(model, [LoRA(r=2), BALoRALoss()])
        move(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        train_mode(model)
        loss, term = model(**zoo.text()).loss, lp.penalty(model)
        assert term is not None
        (loss + term).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(a is not None and torch.allclose(a, b, atol=1e-7) for a, b in zip(*found, strict=True))


def test_nothing_is_kept_where_no_loss_asks() -> None:
    model = zoo.llama()
    lp.inject(model, [LoRA(r=2), BALoRALoss()])
    with torch.no_grad():
        model(**zoo.text())
    assert watch_of(model).seen is None
    model.train()
    model(**zoo.text())
    assert watch_of(model).seen is not None
    assert watch_of(copy.deepcopy(model)).seen is None
    model.eval()
    assert watch_of(model).seen is None


def test_encoder_decoders_are_not_shifted_and_padding_does_not_count() -> None:
    model, batch = zoo.t5(), zoo.text()
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, -2:] = -100
    lp.inject(model, [LoRA(r=2), BALoRALoss(lambda3=0.0)])
    logits = model(**batch).logits
    lp.penalty(model)
    want = -torch.distributions.Categorical(logits=logits[:, :-2].topk(20).values).entropy().mean()
    assert float(watch_of(model).terms[1]) == near(float(want))


# ---- in a fit ------------------------------------------------------------------------------------------------------


def test_11_the_task_loss_stays_as_it_is_and_the_schedule_runs(tmp_path: Path) -> None:
    module = nets.HFNet(zoo.bert)
    peft = PEFT(BALoRA(r=2, loss=BALoRALoss(form="nlu", k=1)), model="net", train=["classifier"], folder=None)
    trainer = nets.trainer(tmp_path, peft, max_steps=6, max_epochs=-1, log_every_n_steps=1)
    seen = []
    after = BALoRALoss.after_step

    def note(self: Any, model: Any, step: Step) -> None:
        after(self, model, step)
        seen.append(watch_of(model).progress.item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BALoRALoss, "after_step", note)
        trainer.fit(module, nets.tokens())
    assert seen == [near(i / 6) for i in range(1, 7)]
    history = peft.history.values
    assert {q for q in history} == {f"ba_lora/{t}" for t in ("consistency", "diversity", "dominance")}
    assert all(len(by_step) == 7 for by_step in history.values())
    assert min(history["ba_lora/consistency"][6].values()) > 0


def test_a_resumed_fit_goes_on_along_the_schedule(tmp_path: Path) -> None:
    def fit(seed: int, **options: Any) -> Any:
        module = nets.HFNet(zoo.bert, optimizer=fits.adam)
        method = [LoRA(r=2, dropout=0.2), BALoRALoss(form="nlu", k=1)]
        torch.manual_seed(seed)
        data, peft = nets.tokens(n=32), {"model": "net", "train": ["classifier"]}
        save = fits.SaveAt(tmp_path, (5, 8))
        fits.run(
            tmp_path, module, method, save, data=data, peft=peft, accumulate_grad_batches=2, max_steps=6, **options
        )
        return fits.trained(module)

    whole = fit(0)
    for batches in (5, 8):
        held = torch.load(tmp_path / f"{batches}.ckpt", weights_only=False)["state_dict"]
        assert held["net.adapters.ba_lora_loss.progress"] == near(batches // 2 / 6)
        assert fits.same(whole, fit(1, ckpt_path=tmp_path / f"{batches}.ckpt"))


def test_12_merged_beside_lora_and_undone(tmp_path: Path) -> None:
    model = zoo.llama()
    lp.inject(model, [LoRA(r=2), BALoRALoss()])
    move(model)
    with torch.no_grad():
        want = model(**zoo.text()).logits
        merged = lp.merge(model)
        assert not list(lp.adapters(model)) and type(model).__name__ == "LlamaForCausalLM"
        assert torch.allclose(model(**zoo.text()).logits, want, atol=1e-4)
        merged.undo()
        assert watch_of(model) is not None and torch.equal(model(**zoo.text()).logits, want)


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "nlgg"}, r"form is one of \('nlg', 'nlu'\), got 'nlgg'; nearest: 'nlg'"),
        ({"svd_norm": "nuclar"}, r"svd_norm is one of .* got 'nuclar'; nearest: 'nuclear'"),
        ({"lambda1_schedule": "linear"}, r"lambda1_schedule is one of"),
        ({"lambda1": -1.0}, r"lambdas are at least 0, one is more; got -1.0, 0.005 and 0.005"),
        ({"lambda1": 0.0, "lambda2": 0.0, "lambda3": 0.0}, r"one is more; got 0.0, 0.0 and 0.0"),
        ({"k": 0}, r"k is at least 1, top_k 2, got 0 and 20"),
        ({"top_k": 1}, r"k is at least 1, top_k 2, got 10 and 1"),
        ({"temperature": 0.0}, r"temperature must be positive, got 0.0"),
        ({"form": "nlu", "top_k": 5}, r"top_k would have no effect with form='nlu'"),
        ({"form": "nlu", "shift": False}, r"shift would have no effect"),
        ({"watch": "modle"}, r"no module 'modle' to watch; nearest: 'model'"),
    ],
)
def test_bad_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lp.inject(zoo.llama(), [LoRA(r=1), BALoRALoss(**options)])


@pytest.mark.parametrize(
    ("shape", "labels", "options", "message"),
    [
        ((1, 3), None, {"form": "nlu", "k": 1}, r"logits of shape \(1, 3\) leave a term empty"),
        ((4, 1), None, {"form": "nlu", "k": 1}, r"logits of shape \(4, 1\) leave a term empty: it takes two classes"),
        ((4, 3), None, {"form": "nlu"}, r"the k=5 largest of 3 singular values are all"),
        ((4, 3), None, {}, r"form='nlg' does not fit logits \(4, 3\); 'nlu' may"),
        ((1, 3, 4), [1, 1, 1], {"form": "nlu"}, r"form='nlu' does not fit logits \(1, 3, 4\); 'nlg' may"),
        ((1, 3, 4), [-100, -100, -100], {"lambda3": 0.0}, r"0 tokens of this batch predict a label"),
        ((1, 3, 4), [1, -100, -100], {"lambda3": 0.0}, r"0 tokens of this batch predict a label"),
        ((1, 3, 4), [-100, 1, -100], {}, r"1 tokens of this batch predict a label"),
        ((1, 3, 4), [1, 1], {}, r"labels= of shape \(1, 3\), which say the tokens that count; got \(1, 2\)"),
        ((1, 3, 4), None, {}, r"must be called with labels= .* got None"),
    ],
)
def test_8_batches_that_leave_a_term_empty_are_refused(
    shape: tuple[int, ...], labels: list[int] | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        terms(torch.randn(shape), torch.randn(shape), labels, **options)


def test_one_example_or_token_is_enough_for_the_other_terms() -> None:
    assert terms(P2[:1], Q2[:1], form="nlu", lambda2=0.0, lambda3=0.0)[0][0] > 0
    assert terms(P3, Q3, [-100, 1, -100], lambda3=0.0)[0][0] > 0


def test_a_teacher_that_would_be_the_student_and_an_unused_module_are_refused() -> None:
    model, method = zoo.llama(), BALoRALoss()
    model.model.norm.bias = nn.Parameter(torch.zeros(32))
    lp.inject(model, [BitFit(), method])
    model(**zoo.text())
    with pytest.raises(ValueError, match="no adapter is there to switch off, so lambda1 has no effect"):
        method.penalty(model)
    with pytest.raises(ValueError, match="'the model itself' was not called in this step"):
        method.penalty(model)
    model = zoo.llama()
    lp.inject(model, [LoRA(r=1), BALoRALoss(watch="model")])
    model(**zoo.text())
    with pytest.raises(ValueError, match="holds no logits: watch the module that returns them"):
        lp.penalty(model)
