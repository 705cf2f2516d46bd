"""FISH mask by the numbers of its card (methods/sparse_selective.md), per-example gradients as oracle, and in a fit.

The sparse difference and the choice of the highest scores are tested in test_sparse_mask.py.
"""

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_peft_plugins.selective.fish_mask import FishMask, examples
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchEncoding
from transformers.pytorch_utils import Conv1D

import lightning_peft as lp
from lightning_peft import PEFT
from tests import nets
from tests.selective import moved_by_training
from tests.test_lora import One
from tests.test_sparse_mask import mask_of, oracle
from tests.zoo import bases as zoo

X, Y = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([0, 1])


def loss_of(model: nn.Module) -> Any:
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def scores(method: FishMask, model: nn.Module, batches: Any) -> dict[str, Tensor]:
    model.requires_grad_(False)
    return method.scores(model, batches, loss_of(model))


@pytest.mark.parametrize("batches", [[(X, Y)], [(X[:1], Y[:1]), (X[1:], Y[1:])]], ids=["one batch", "two"])
def test_2_by_hand(batches: Any) -> None:
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.eye(2)
    got = scores(FishMask(targets=("layer",)), One(layer), batches)["layer"]
    want = torch.tensor([[0.2672, 1.1051], [0.2672, 1.1051]])  # the square of the batch's gradient is .1336, .3559
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rule", ["fisher", "gradient", "snip"])
def test_2_scores_are_means_over_single_examples(rule: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Conv1D(3, 6))
    x, y = torch.randn(7, 4), torch.randint(0, 3, (7,))
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def one(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, p, (x[None],)), y[None])

    grads = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(parameters, x, y)
    found = scores(FishMask(rule=rule), model, [(x[:4], y[:4]), (x[4:], y[4:])])
    for name, stored in (("0", lambda t: t), ("2", lambda t: t.mT)):  # Conv1D stores (in, out)
        g, W = stored(grads[f"{name}.weight"]), stored(parameters[f"{name}.weight"])
        want = {"fisher": g.square().mean(0), "gradient": g.abs().mean(0), "snip": (g * W).abs().mean(0)}[rule]
        torch.testing.assert_close(found[name], want, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("scope", "density"), [("global", 0.1), ("layer", 0.1), ("global", 0.002)])
def test_3_exactly_the_highest_share_trains(scope: str, density: float) -> None:
    model, method = zoo.llama().requires_grad_(False), FishMask(density=density, scope=scope)
    batch, loss = zoo.text(), lambda b: model(**b).loss
    stats = method.calibrate(model, [batch], loss)
    found = method.scores(model, [batch], loss)
    groups = [list(found)] if scope == "global" else [[n] for n in found]
    for names in groups:
        k = int(density * sum(found[n].numel() for n in names))
        assert sum(len(stats[n]) for n in names) == k
        assert [stats[n].tolist() for n in names] == oracle([found[n] for n in names], k)
    lp.inject(model, method, stats={"fish_mask": stats})
    held = {n: mask_of(a) for n, _, a in lp.adapters(model)}
    assert held.keys() == {n for n, flat in stats.items() if len(flat)}  # none where nothing was chosen
    assert all(m.flatten().nonzero()[:, 0].tolist() == stats[n].tolist() for n, m in held.items())


def test_1_what_is_not_chosen_never_moves() -> None:
    model = zoo.bert().requires_grad_(False)
    method, batch = FishMask(density=0.02), zoo.sentences()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    want = model(**batch).logits
    stats = method.calibrate(model, [batch], lambda b: model(**b).loss)
    lp.inject(model, method, stats={"fish_mask": stats})
    assert torch.equal(model(**batch).logits, want)
    masks = {f"{n}.weight": mask_of(a) for n, _, a in lp.adapters(model)}
    assert moved_by_training(model, batch) == []
    lp.merge(model)
    for key, old in before.items():
        mask = masks.get(key, torch.zeros(old.shape, dtype=torch.bool))
        new = model.state_dict()[key]
        assert torch.equal(new[~mask], old[~mask]) and (new[mask] != old[mask]).all()


def test_it_looks_in_evaluation_mode_and_puts_modes_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).train()
    model[2].eval()
    batch = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    twice = [scores(FishMask(), model, [batch]) for _ in range(2)]
    assert all(torch.equal(twice[0][n], twice[1][n]) for n in twice[0])
    assert [m.training for m in model] == [True, True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_it_looks_at_no_more_examples_than_it_may() -> None:
    layer, seen = nn.Linear(2, 2), []
    model = One(layer).requires_grad_(False)
    loss = loss_of(model)

    def read() -> Any:
        for _ in range(10):
            seen.append("batch")
            yield X, Y

    method = FishMask(samples=3, targets=("layer",))
    got = method.scores(model, read(), lambda b: seen.append("example") or loss(b))["layer"]
    assert seen.count("example") == 3 and seen.count("batch") == 2
    want = FishMask(targets=("layer",)).scores(model, [(X, Y), (X[:1], Y[:1])], loss)["layer"]
    torch.testing.assert_close(got, want)


def test_batches_are_cut_into_examples_whatever_holds_them() -> None:
    Pair = namedtuple("Pair", "x y")
    nested = {"a": Pair(X, [Y, "name"]), "scale": torch.tensor(2.0), "none": None}
    first, second = examples(nested)
    assert isinstance(first["a"], Pair) and first["a"].y[1] == "name" and first["none"] is None
    assert torch.equal(second["a"].x, X[1:]) and torch.equal(first["a"].y[0], Y[:1]) and first["scale"] == 2
    encoded = list(examples(BatchEncoding({"input_ids": torch.arange(6).view(3, 2)})))
    assert len(encoded) == 3 and encoded[1].input_ids.tolist() == [[2, 3]]
    for bad, message in (((X, torch.zeros(3)), r"have \[2, 3\] entries"), ("text", "have no entries")):
        with pytest.raises(ValueError, match=message):
            list(examples(bad))


def test_the_padding_row_is_never_chosen() -> None:
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=2), nn.Flatten(), nn.Linear(12, 3)).requires_grad_(False)
    batch = torch.tensor([[0, 1, 2], [3, 2, 5]]), torch.tensor([0, 2])
    stats = FishMask(targets=("0",), density=1.0).calibrate(model, [batch], loss_of(model))
    assert len(stats["0"]) == 20 and not any(int(i) % 6 == 2 for i in stats["0"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"fish_mask: density is a share .* got 0.0"),
        ({"scope": "block"}, r"scope is 'layer' or 'global', got 'block'"),
        ({"rule": "random"}, r"rule is one of .*got 'random'; sparse_mask has those without data"),
        ({"samples": 0}, r"samples is at least 1, got 0"),
        ({"density": 1e-5}, r"density 1e-05 of 15360 weights of 14 layers is less than one entry"),
        ({"targets": ("q_prj",)}, r"'q_prj'; nearest: 'q_proj'"),
        ({"exclude": ("lm_head",)}, r"exclude 'lm_head' leaves out nothing"),
        ({"layers": "7"}, r"layers '7' choose no block"),
    ],
)
def test_bad_options_and_what_matches_nothing_raise(options: dict[str, Any], message: str) -> None:
    model = zoo.llama().requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        FishMask(**options).calibrate(model, [zoo.text()], lambda b: model(**b).loss)


def test_data_without_a_gradient_is_refused() -> None:
    model = One(nn.Linear(2, 2)).requires_grad_(False)
    method, loss = FishMask(targets=("layer",), density=0.5), loss_of(model)
    for batches, told in (([], "over 0 examples the loss has no gradient"), ([(X * 0, Y)], "over 2 examples"),
                          ([(X * torch.nan, Y)], "must be finite")):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            method.calibrate(model, batches, loss)


def test_quantised_layers_are_refused_by_name() -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match=r"which 'model.layers.0.self_attn.q_proj', stored quantised, has none of"):
        lp.inject(zoo.nf4_llama(), FishMask())
    model = zoo.nf4_llama().requires_grad_(False)
    FishMask(targets=("lm_head",)).calibrate(model, [zoo.text()], lambda b: model(**b).loss)


def test_training_without_having_looked_is_refused_and_evaluating_is_the_base() -> None:
    model = zoo.llama().requires_grad_(False)
    want = model(**zoo.text()).logits
    lp.inject(model, FishMask())
    assert torch.equal(model(**zoo.text()).logits, want)
    with pytest.raises(ValueError, match=r"no entries to train were chosen.*stats=\{name: method.calibrate"):
        model.train()(**zoo.text())


# ---- in a fit ------------------------------------------------------------------------------------------------------


def fit(root: Path, method: FishMask, **options: Any) -> tuple[nets.HFNet, PEFT]:
    module = nets.HFNet(zoo.bert)
    peft = PEFT(method, model="net", train=("net.classifier",), folder=None, calibration_batches=3)
    every = ModelCheckpoint(root, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = nets.trainer(root, peft, every, max_steps=4)
    trainer.fit(module, nets.tokens(shuffle=False), **options)
    return module, peft


def test_a_fit_chooses_by_its_first_batches_and_a_resume_keeps_the_choice(tmp_path: Path, monkeypatch: Any) -> None:
    method, seen = FishMask(density=0.01), []
    calibrate = FishMask.calibrate
    monkeypatch.setattr(FishMask, "calibrate", lambda *args: seen.append(1) or calibrate(*args))
    module, _ = fit(tmp_path, method)
    base = nets.HFNet(zoo.bert)
    batches = list(nets.tokens(shuffle=False))[:3]
    base.net.requires_grad_(False)
    want = calibrate(method, base.net, batches, lambda b: base.net(**b).loss)
    held = {n: a for n, _, a in lp.adapters(module.net)}
    assert seen == [1] and {n for n, flat in want.items() if len(flat)} == held.keys()
    for name, a in held.items():
        assert mask_of(a).flatten().nonzero()[:, 0].tolist() == want[name].tolist()
        assert (a.v != 0).all()  # pyright: ignore
    again, _ = fit(tmp_path, method, ckpt_path=tmp_path / "step=2.ckpt")
    assert seen == [1]
    state = again.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    restored = nets.HFNet(zoo.bert)
    lp.restore(restored, tmp_path / "step=4.ckpt")
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in restored.state_dict().items())
