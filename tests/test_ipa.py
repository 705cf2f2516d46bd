"""IPA: the checks of its card (methods/ipa.md) by their numbers, with batch PCA in float64 as oracle; in fits."""

import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_peft_plugins.reparameterized.ipa import IPA, Directions, Watch, join, projector
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

import lightning_peft as lp
from lightning_peft import hf, hosts
from tests import test_hf
from tests.fits import run, same, smooth, trained
from tests.launch import launch
from tests.nets import Net, vectors
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs
from tests.zoo import bases as zoo

KINDS = ["Linear", "Linear, no bias", "Conv1D"]


def watched(model: nn.Module, batches: Any, call: Any, **options: Any) -> dict[str, Any]:
    return IPA(**{"niter": 0, "targets": ("layer",)} | options).calibrate(model, batches, call)


def one(layer: Any, dtype: torch.dtype = torch.float32, fill: bool = True, **options: Any) -> Any:
    """``layer`` with IPA of rank 4 that saw 30 random rows; B away from zero if ``fill``."""
    model, method = One(layer), IPA(**{"r": 4, "targets": ("layer",), "niter": 0} | options)
    x = torch.randn(30, hosts.shape(layer)[1]) + torch.randn(hosts.shape(layer)[1])
    lp.inject(model, method, stats={"ipa": method.calibrate(model, [x.to(layer.weight.dtype)], model)}, dtype=dtype)
    if fill:
        nn.init.normal_(adapter_of(model).B)
    return model


def pca(X: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Singular values (r,) and directions (r, in) of the centred rows, the largest entries positive."""
    _, S, V = torch.linalg.svd(X.double() - X.double().mean(0), full_matrices=False)
    sign = torch.stack([v[v.abs().argmax()].sign() for v in V])
    return S[:r], (V * sign[:, None])[:r]


@pytest.mark.parametrize("kind", KINDS)
def test_1_the_start_is_the_base_and_7_b_alone_trains(kind: str) -> None:
    for both in (False, True):
        layer = HOSTS[kind]()
        x = inputs(layer, torch.float32)
        want = layer(x)
        model = one(layer, fill=False, train_projector=both)
        assert torch.equal(model(x), want)
        nn.init.normal_(adapter_of(model).B)
        model(x).square().sum().backward()
        assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.grad is not None} == (
            {"P", "B"} if both else {"B"}
        )
        out, fan_in = hosts.shape(layer)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert count == 4 * (out + fan_in if both else out)


@pytest.mark.parametrize("kind", KINDS)
def test_8_forward_gradient_and_merge_are_the_dense_map(kind: str) -> None:
    layer: Any = HOSTS[kind]().double()
    x = inputs(layer).requires_grad_(True)
    model = one(layer, F64, scale=0.7)
    a = adapter_of(model)
    want = F.linear(x, hosts.read(layer).detach() + 0.7 * a.B @ a.P, layer.bias)  # not centred, not over r
    assert (want - layer.unadapted(x)).abs().max() > 0.1
    close(model(x), want)
    close(lp.WeightAdapter.forward(a, lp.Base(layer), x), want)
    for fast, slow in zip(*(torch.autograd.grad(y.sin().sum(), (a.B, x)) for y in (model(x), want)), strict=True):
        close(fast, slow)
    with torch.no_grad():
        lp.merge(model)
        close(layer(x), want)


def test_2_rows_stay_orthonormal_and_order_canonical() -> None:
    model, gen = One(nn.Linear(20, 3)), torch.Generator().manual_seed(1)
    for niter in (0, 3):
        watch = Watch({"layer": 5}, niter, 8192, 0)
        with watch.on(model):
            for _ in range(4):
                model(torch.randn(40, 20, generator=gen) * torch.logspace(1, -1, 20))
                held: Any = watch.held["layer"]
                close(held.V @ held.V.T, torch.eye(5), atol=1e-5)
                assert (held.S.diff() <= 0).all() and (held.V.gather(1, held.V.abs().argmax(1)[:, None]) > 0).all()


def test_3_by_hand() -> None:
    model = One(nn.Linear(2, 3))
    rows = torch.tensor([[1.0, 0.0], [3.0, 0.5], [2.0, 1.0], [6.0, -1.0]])
    for batches in ([rows[:2], rows[2:]], [rows]):
        held = watched(model, batches, model, r=2)["layer"]
        close(held.mean, torch.tensor([3.0, 0.125], dtype=F64))
        close(held.S, torch.tensor([3.9022, 0.9800]), atol=1e-4)
        close(held.V, torch.tensor([[0.9560, -0.2933], [0.2933, 0.9560]]), atol=1e-4)
        assert held.n == 4


def test_4_any_split_is_batch_pca_and_processes_join() -> None:
    X, model = torch.randn(200, 6) @ torch.diag(torch.logspace(0, -1, 6)) + 3, One(nn.Linear(6, 8))
    S, V = pca(X, 6)
    method = IPA(r=6, niter=0, targets=("layer",))
    for cut in (1, 50, 199):
        halves = [method.calibrate(model, half, model) for half in (X[:cut].split(30), X[cut:].split(64))]
        for held in (watched(model, [X[:cut], X[cut:]], model, r=6)["layer"], method.combine(halves)["layer"]):
            assert held.n == 200
            close(held.S.double(), S, atol=1e-4)
            close(held.V.double(), V, atol=1e-5)
            close(held.mean, X.double().mean(0), atol=1e-6)
    truncated = watched(model, X.split(50), model, r=2)["layer"]
    close(truncated.S.double(), S[:2], atol=0.05)


def test_4_processes_that_saw_less_than_r_rows_join_to_r() -> None:
    X, model, method = torch.randn(6, 8), One(nn.Linear(8, 8)), IPA(r=4, niter=0, targets=("layer",))
    parts = [method.calibrate(model, [part], model) for part in X.split(2)]
    close(method.combine(parts)["layer"].V.double(), pca(X, 4)[1], atol=1e-5)
    parts[0]["layer"] = None  # saw nothing
    close(method.combine(parts)["layer"].V[:3].double(), pca(X[2:], 3)[1], atol=1e-5)


def test_5_keeps_more_of_unseen_inputs_than_random_directions() -> None:
    mix = torch.randn(32, 32) @ torch.diag(torch.logspace(0, -2, 32))
    X, held_out = torch.randn(300, 32) @ mix.T, torch.randn(300, 32) @ mix.T
    model = One(nn.Linear(32, 32))
    P, known = projector(watched(model, X.split(100), model, r=6, niter=3)["layer"], 6, 32, 0)
    assert P.shape == (6, 32) and known == 6

    def lost(P: Tensor) -> float:
        return float((held_out - held_out @ P.T @ P).square().sum())

    random = torch.linalg.qr(torch.randn(32, 6))[0].T
    assert lost(P) < 0.3 * lost(random)
    assert lost(P) < 1.1 * lost(pca(X, 6)[1].float())


class Caller(nn.Module):
    """Takes a mask like a model of transformers, and calls its layer on tokens in rows as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.flat, self.drop = nn.Linear(5, 5), nn.Linear(5, 5), nn.Dropout(0.5)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.flat(self.layer(self.drop(x)).flatten(0, 1)).view_as(x)


def test_9_padding_does_not_count_nor_dropout() -> None:
    model, x = Caller().train(), torch.randn(3, 6, 5)
    mask = torch.tensor([[1] * 6, [0] * 4 + [1] * 2, [1] * 3 + [0] * 3])
    for give in (lambda b: model(b, mask), lambda b: model(b, attention_mask=mask)):
        held = watched(model, [x], give, r=5, targets=("layer", "flat"))
        tokens = x[mask.bool()]
        for name, rows in (("layer", tokens), ("flat", model.layer(tokens).detach())):
            assert held[name].n == 11
            close(held[name].V.double(), pca(rows, 5)[1], atol=1e-4)
    assert model.training and model.drop.training and not model._forward_hooks and not model.layer._forward_pre_hooks
    assert watched(model, [x], model, r=5)["layer"].n == 18  # no mask, no padding
    assert watched(model, [x], lambda b: model(b, mask * 0), r=5)["layer"] is None


def test_9_an_encoder_s_mask_is_not_the_decoder_s() -> None:
    model, ids = zoo.t5().requires_grad_(False), zoo.text()["input_ids"]
    mask = zoo.sentences()["attention_mask"]
    batch = {"input_ids": ids, "labels": ids, "attention_mask": mask}  # as long as each other
    held = IPA(targets=("q", "k", "wo")).calibrate(model, [batch], lambda b: model(**b).loss)
    for name, summary in held.items():
        encoder = name.startswith("encoder") or name.endswith("EncDecAttention.k")
        assert summary.n == (int(mask.sum()) if encoder else ids.numel()), name
    batch = zoo.sentences()
    bert = zoo.bert().requires_grad_(False)
    held = IPA(targets=("all-linear",)).calibrate(bert, [batch], lambda b: bert(**b).loss)
    assert {n: s.n for n, s in held.items()} == {
        n: 4 if "pooler" in n else int(batch["attention_mask"].sum()) for n in held
    }


def test_layers_with_one_input_share_the_work() -> None:
    model, batch = zoo.llama().requires_grad_(False), zoo.text()
    held = IPA().calibrate(model, [batch, batch], lambda b: model(**b).loss)
    q, k, o, gate, up = (
        next(s for n, s in held.items() if n.endswith(end))
        for end in ("q_proj", "k_proj", "o_proj", "gate_proj", "up_proj")
    )
    assert q is k and gate is up and q is not o
    apart = IPA(rank_pattern={"*.k_proj": 3}).calibrate(model, [batch], lambda b: model(**b).loss)
    assert all(len(s.S) == (3 if "k_proj" in n else 8) for n, s in apart.items())


def test_rows_bound_what_a_layer_looks_at_and_the_draw_is_its_own() -> None:
    model, X = One(nn.Linear(6, 8)), torch.randn(500, 6)
    state = torch.get_rng_state()
    first, again, other = (watched(model, [X], model, r=3, rows=40, seed=s)["layer"] for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.n == 40 and torch.equal(first.V, again.V) and not torch.equal(first.V, other.V)


def test_half_precision_is_summed_up_in_float32() -> None:
    model, X = One(nn.Linear(6, 8)), torch.randn(100, 6) + 50
    with torch.autocast("cpu", torch.bfloat16):
        held = watched(model, [X], model, r=3)["layer"]
    close(held.V.double(), pca(X, 3)[1], atol=1e-3)


def test_few_inputs_are_filled_up_aloud() -> None:
    layer, method = nn.Linear(8, 8), IPA(r=4, niter=0, targets=("layer",))
    model = One(layer)
    rows = torch.randn(3, 8)  # two directions about their mean
    with pytest.warns(UserWarning, match="1 layers, first 'layer', saw inputs in fewer than r directions"):
        lp.inject(model, method, stats={"ipa": method.calibrate(model, [rows], model)})
    P = adapter_of(model).P
    close(P @ P.T, torch.eye(4), atol=1e-5)
    close(P[:2].double(), pca(rows, 2)[1], atol=1e-5)
    P, known = projector(None, 3, 8, 0)
    close(P @ P.T, torch.eye(3), atol=1e-5)
    assert known == 0


def test_training_without_calibration_is_refused() -> None:
    model = One(nn.Linear(8, 8))
    lp.inject(model, IPA(targets=("layer",)))
    model.eval()(torch.randn(2, 8))
    with pytest.raises(ValueError, match="projector was not learned: .*stats="):
        model.train()(torch.randn(2, 8))


def test_8_export_is_a_plain_lora(tmp_path: Path) -> None:
    base = zoo.llama()
    model, method = zoo.llama().requires_grad_(False), IPA(r=5, scale=0.3, rank_pattern={"*.v_proj": 2})
    model.load_state_dict(base.state_dict())
    batch = zoo.text()
    lp.inject(model, method, stats={"ipa": method.calibrate(model, [batch], lambda b: model(**b).loss)})
    test_hf.randomize(model)
    hf.save(model, tmp_path / "peft")
    x = test_hf.batch(base)
    want = test_hf.run(model.eval(), x)
    assert (want - test_hf.run(base, x)).abs().max() > 1e-3
    theirs = peft.PeftModel.from_pretrained(zoo_copy(base), str(tmp_path / "peft")).eval()
    close(test_hf.run(theirs, x), want, atol=1e-5)
    ours = hf.load(zoo_copy(base), tmp_path / "peft").eval()
    assert ours.lightning_peft_record.methods[0].name == "lora"  # type: ignore[attr-defined]
    close(test_hf.run(ours, x), want, atol=1e-5)


def zoo_copy(base: nn.Module) -> Any:
    copy = zoo.llama()
    copy.load_state_dict(base.state_dict())
    return copy


# ---- in a fit -------------------------------------------------------------------------------------------------------


def test_a_fit_learns_it_and_a_resume_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    calibrate = IPA.calibrate
    monkeypatch.setattr(IPA, "calibrate", lambda *args: seen.append(1) or calibrate(*args))
    method, keep = IPA(r=8, niter=0), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    whole, again = Net(smooth), Net(smooth)
    run(tmp_path, whole, method, keep)
    data = torch.cat([x for x, _ in vectors(shuffle=False)])
    a: Any = whole.net[0].adapters["ipa"]
    close(a.P.double(), pca(data, 8)[1], atol=1e-4)
    assert seen == [1] and bool(a.B.any())
    run(tmp_path, again, method, ckpt_path=tmp_path / "step=2.ckpt")
    assert seen == [1] and same(trained(whole), trained(again))
    assert torch.equal(again.net[0].adapters["ipa"].P, a.P)


def learned(net: Net) -> list[Tensor]:
    return [a.P.clone() for _, _, a in lp.adapters(net)]  # type: ignore[union-attr]


def in_ddp(root: Path) -> dict[str, Any]:
    rank, net = int(os.environ["LOCAL_RANK"]), Net(smooth)
    mine = DataLoader(Subset(vectors().dataset, range(rank, 48, 2)), 4)
    options: dict[str, Any] = {"strategy": "ddp", "accelerator": "cpu", "devices": 2, "use_distributed_sampler": False}
    run(root, net, IPA(r=8, niter=0), data=mine, **options)
    return {"P": learned(net), "trained": trained(net)}


@pytest.mark.slow
def test_two_processes_learn_from_all_data_the_same(tmp_path: Path) -> None:
    first, second = launch(in_ddp, root=tmp_path)
    assert same(first["P"], second["P"]) and same(first["trained"], second["trained"])
    net = Net(smooth)
    run(tmp_path, net, IPA(r=8, niter=0))
    data = torch.cat([x for x, _ in vectors(shuffle=False)])
    for P in (first["P"][0], learned(net)[0]):  # nothing is truncated: the PCA of both halves together
        close(P.double(), pca(data, 8)[1], atol=1e-4)


def test_options() -> None:
    with pytest.raises(ValueError, match="IPA needs a rank of at least 1, got r=0"):
        IPA(r=0)
    for bad in ({"niter": -1}, {"rows": 0}, {"scale": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}={next(iter(bad.values()))}"):
            IPA(**bad)
    with pytest.raises(ValueError, match="dropout must lie"):
        IPA(dropout=1.0)
    with pytest.raises(ValueError, match="layer: r=7, but its inputs have 6 directions"):
        lp.inject(One(nn.Linear(6, 10)), IPA(targets=("layer",), rank_pattern={"layer": 7}))
    with pytest.raises(ValueError, match="no linear or conv1d matches 'layr'; nearest: 'layer'"):
        lp.inject(One(nn.Linear(6, 10)), IPA(targets=("layr",)))


def test_join_of_nothing_new() -> None:
    old = Directions(2, 4, torch.zeros(3, dtype=F64), torch.tensor([2.0, 1.0]), torch.eye(3)[:2])
    new = join(old, 1, torch.zeros(3, dtype=F64), torch.zeros(1, 3), 2, 0)  # a row that is the mean
    assert new.n == 5
    close(new.S, old.S, atol=1e-6)
    close(new.V, old.V, atol=1e-6)
