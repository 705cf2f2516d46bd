"""Structure-learnable adapters by the numbers of their card, the phases, and places that leave a running fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_peft_plugins.lifecycle.structure_learnable_adapter import StructureLearnableAdapter
from lightning_peft_plugins.reparameterized.dora import DoRA
from lightning_peft_plugins.reparameterized.lora import LoRA
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft import PEFT, Step
from lightning_peft.optim import regroup
from tests import fits, nets
from tests.launch import launch
from tests.zoo import bases as zoo

F64 = torch.float64
BLOCKS = [f"bert.encoder.layer.{i}" for i in range(2)]


def held(model: nn.Module, name: str = "structure_learnable_adapter") -> dict[str, Any]:
    return {n: a for n, _, a in lp.adapters(model, name)}


def blocks(width: int = 2, depth: int = 3) -> Any:
    """A stack whose blocks do nothing."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(width, width, bias=False)
            nn.init.zeros_(self.layer.weight)

        def forward(self, h: Tensor) -> Tensor:
            return h + self.layer(h)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(depth))

        def forward(self, h: Tensor) -> Tensor:
            for block in self.blocks:
                h = block(h)
            return h

    return Stack()


def stack(depth: int = 3, gates: list[float] | None = None, **options: Any) -> tuple[Any, StructureLearnableAdapter]:
    model, method = blocks(2, depth), StructureLearnableAdapter(**{"bottleneck": 2, "warmup": 0.0} | options)
    lp.inject(model, method, dtype=F64)
    model.double()
    for a, gate in zip(held(model).values(), gates or [0.0] * depth, strict=True):
        a.down.data = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=F64)
        a.up.data = torch.tensor([[0.5, 0.0], [0.0, 0.25]], dtype=F64)
        a.gate.data.fill_(gate)
    return model, method


def step(index: int, total: int, *optimizers: Any) -> Step:
    return Step(index=index, optimizers=list(optimizers), planned=total)


H = torch.tensor([[1.0, -1.0]], dtype=F64)


@pytest.mark.parametrize(("gate", "want"), [(0.0, (1.0, -0.75)), (-20.0, (1.0, -1.0)), (20.0, (1.0, -0.5))])
def test_2_and_3_the_gate_blends_the_adapter_with_its_input(gate: float, want: tuple[float, float]) -> None:
    model, _ = stack(1, [gate])
    torch.testing.assert_close(model(H), torch.tensor([want], dtype=F64), rtol=0, atol=1e-6)
    h, s = torch.randn(5, 2, dtype=F64), torch.tensor(gate, dtype=F64).sigmoid()
    a = held(model)["blocks.0"]
    a.up_bias.data, a.down_bias.data = torch.randn(2, dtype=F64), torch.randn(2, dtype=F64)
    adapter = h + (h @ a.down.T + a.down_bias).relu() @ a.up.T + a.up_bias
    torch.testing.assert_close(model(h), s * adapter + (1 - s) * h)  # as the paper writes it


def test_1_and_6_start_and_counts() -> None:
    base = zoo.bert()
    want = base(**zoo.sentences()).logits
    lp.inject(base, StructureLearnableAdapter(bottleneck=4))
    for a in held(base).values():
        a.live.fill_(1.0)
        nn.init.normal_(a.gate, std=5.0)
    assert torch.allclose(base(**zoo.sentences()).logits, want, rtol=0, atol=1e-6)
    assert list(held(base)) == BLOCKS
    assert sum(p.numel() for p in base.parameters() if p.requires_grad) == 2 * (2 * 32 * 4 + 4 + 32 + 1)


@pytest.mark.parametrize(("reduction", "factor"), [("mean", 1 / 3), ("sum", 1.0)])
def test_4_the_penalty_and_its_gradient(reduction: str, factor: float) -> None:
    model, method = stack(3, [2.0, -3.0, 0.0], lambda_struct=0.5, reduction=reduction)
    term = method.penalty(model)
    assert term is not None
    assert float(term.detach()) == pytest.approx(0.5 * factor * (0.880797 + 0.047426 + 0.5), abs=1e-6)
    term.backward()
    found = [a.gate.grad.item() for a in held(model).values()]
    assert found == [pytest.approx(0.5 * factor * g, abs=1e-6) for g in (0.104994, 0.045177, 0.25)]
    assert all(p.grad is None for a in held(model).values() for n, p in a.named_parameters() if n != "gate")


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_5_only_the_penalty_pulls_the_gates_and_decay_does_not(weight: float) -> None:
    model, method = stack(3, [2.0, -3.0, 0.0], lambda_struct=weight)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.9)
    regroup([optimizer], [], method, model)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert all(rates[id(a.gate)] == (pytest.approx(0.1), 0.0) for a in held(model).values())
    before = [a.gate.item() for a in held(model).values()]
    for _ in range(5):
        optimizer.zero_grad()
        term = method.penalty(model)
        (model(H).sum() * 0 + (0 if term is None else term)).backward()
        optimizer.step()
        after = [a.gate.item() for a in held(model).values()]
        assert all(y < x if weight else y == x for x, y in zip(before, after, strict=True))
        before = after


def test_gates_are_held_at_a_half_in_the_warm_up() -> None:
    model, method = blocks(), StructureLearnableAdapter(warmup=0.5, finetune=0.25, bottleneck=2)
    lp.inject(model, method)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
    for index in range(1, 6):
        optimizer.zero_grad()
        term = method.penalty(model)
        assert term is not None
        (model(torch.randn(4, 2)).square().sum() + term).backward()
        optimizer.step()
        assert all((a.gate.item() == 0) == (index <= 4) for a in held(model).values()), index
        assert (float(term.detach()) == 0) == (index <= 4)
        method.after_step(model, step(index, 8, optimizer))
    assert all(a.searching for a in held(model).values())
    with pytest.raises(ValueError, match="needs the number of optimizer steps"):
        method.after_step(model, Step(index=1))


def test_7_the_selection_removes_closed_adapters_and_their_moments() -> None:
    gates = [2.0, -3.0, -2.9]  # sigmoid: 0.88, 0.0474, 0.0522
    model, method = stack(3, gates, finetune=0.25)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.0)
    regroup([optimizer], [], method, model)
    model(H).square().sum().backward()
    optimizer.step()
    adapters, h = held(model), torch.randn(6, 2, dtype=F64)
    moments = optimizer.state[adapters["blocks.0"].up]["exp_avg"]
    adapters["blocks.1"].up.data.zero_()  # so that the function stays
    want = model(h)
    for index in (1, 5):
        method.after_step(model, step(index, 8, optimizer))
        assert list(held(model)) == ["blocks.0", "blocks.1", "blocks.2"]
    method.after_step(model, step(6, 8, optimizer))
    assert list(held(model)) == ["blocks.0", "blocks.2"] and not hasattr(model.blocks[1], "adapters")
    torch.testing.assert_close(model(h), want)
    left = {p for p in model.parameters() if p.requires_grad}
    grouped = [p for g in optimizer.param_groups for p in g["params"]]
    assert set(grouped) == left and len(grouped) == len(left) == 10 and optimizer.state.keys() <= left
    assert optimizer.state[adapters["blocks.0"].up]["exp_avg"] is moments
    assert [p.numel() for p in left if p.numel() == 0] == [0, 0]
    assert method.penalty(model) is None
    assert [a.opening.item() for a in held(model).values()] == [pytest.approx(0.880797), pytest.approx(0.0521536)]
    assert method.report(model)["adapters"] == {"blocks.0": 1, "blocks.2": 1}
    model(H).square().sum().backward()
    optimizer.step()
    method.after_step(model, step(7, 8, optimizer))
    method.finish(model)
    assert [a.opening.item() for a in held(model).values()] == [pytest.approx(0.880797), pytest.approx(0.0521536)]


def test_7_threshold_zero_keeps_the_soft_model_and_the_gate_folds() -> None:
    model, method = stack(3, [2.0, -30.0, 0.3], threshold=0.0)
    h = torch.randn(6, 2, dtype=F64)
    want = model(h)
    method.after_step(model, step(8, 8))
    assert len(held(model)) == 3
    torch.testing.assert_close(model(h), want)
    folded, other = stack(3, [20.0] * 3)
    for a, b in zip(held(model).values(), held(folded).values(), strict=True):
        b.up.data, b.up_bias.data = a.opening * a.up.data, a.opening * a.up_bias.data
    other.after_step(folded, step(8, 8))
    torch.testing.assert_close(folded(h), want, rtol=1e-6, atol=1e-6)


def test_hard_opens_the_rest_and_the_most_open_one_always_stays() -> None:
    model, method = stack(3, [-9.0, -5.0, -7.0], hard=True)
    method.after_step(model, step(8, 8))
    assert list(held(model)) == ["blocks.1"]
    torch.testing.assert_close(model(H), torch.tensor([[1.0, -0.5]], dtype=F64))


def test_a_fit_that_ends_early_selects_at_the_end_aloud() -> None:
    model, method = stack(3, [2.0, -9.0, -9.0])
    with pytest.warns(UserWarning, match="ended before its last share 0.1"):
        method.finish(model)
    assert list(held(model)) == ["blocks.0"]


def test_places_and_targets() -> None:
    for options, want in (
        ({"places": ("attention", "mlp"), "layers": "1:"}, ["1.attention.output.dropout", "1.output.dropout"]),
        ({"targets": ("intermediate",)}, ["0.intermediate", "1.intermediate"]),
        ({"exclude": ("*.0",)}, ["1"]),
    ):
        model = zoo.bert()
        lp.inject(model, StructureLearnableAdapter(**options))
        assert list(held(model)) == [f"bert.encoder.layer.{n}" for n in want]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "max"}, r"reduction is 'mean' or 'sum', got 'max'"),
        ({"lambda_struct": -1.0}, r"got -1.0, 10.0 and 0.05"),
        ({"gate_lr_scale": 0.0}, r"gate_lr_scale positive"),
        ({"threshold": 1.0}, r"threshold in \[0, 1\)"),
        ({"warmup": 0.6, "finetune": 0.4}, r"together below 1, got 0.6 and 0.4"),
        ({"warmup": -0.1}, r"shares of the fit"),
        ({"nonlinearity": "geluu"}, r"nearest: 'gelu'"),
        ({"dropout": 1.0}, r"dropout is a probability below 1"),
        ({"bottleneck": 0}, r"bottleneck is at least 1, got 0"),
        ({"places": ("mpl",)}, r"places are \('block',\), or some of .*; nearest: 'mlp'"),
        ({"places": ()}, r"places are \('block',\)"),
        ({"places": ("block", "mlp")}, r"places are \('block',\), or some of"),
        ({"places": ("mlp",), "targets": ("mlp",)}, r"targets say where, so places has no effect"),
        ({"targets": ("mpl",)}, r"'mpl'; nearest: 'mlp'"),
        ({"layers": "7"}, r"layers '7' choose no block"),
    ],
)
def test_bad_options_and_what_matches_nothing_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lp.inject(zoo.llama(), StructureLearnableAdapter(**options))


def test_a_model_without_blocks_and_a_merge_are_refused() -> None:
    with pytest.raises(ValueError, match="has no stack of blocks; name modules by targets"):
        lp.inject(nn.Linear(2, 2), StructureLearnableAdapter())
    model, _ = stack()
    with pytest.raises(ValueError, match="structure_learnable_adapter cannot be merged"):
        lp.merge(model)


# ---- whole fits ----------------------------------------------------------------------------------------------------

PLACES = (3, 5, 8, 12, 13, 14, 17)  # 2 batches a step: the gates' start is at 4 batches, the selection at 12
OPTIONS: dict[str, Any] = {"bottleneck": 3, "threshold": 0.49, "warmup": 0.2, "finetune": 0.4, "dropout": 0.1}


def spread(model: nn.Module) -> None:
    """One gate low and one high at the start, so that the selection has something to do whatever the task says."""
    for a, gate in zip(held(model).values(), (-1.0, 1.0), strict=False):
        a.gate.data.fill_(gate)


class Spread(nets.HFNet):
    def on_train_start(self) -> None:
        if self.trainer.global_step == 0:
            spread(self.net)


def fit(root: Path, *more: Any, beside: Any = None, **options: Any) -> Any:
    """Ten steps of two batches, six batches in an epoch on one process."""
    net, method = Spread(zoo.bert, optimizer=fits.adam), StructureLearnableAdapter(**OPTIONS)
    methods = [method] if beside is None else [method, beside]
    peft = {"model": "net", "train": ["classifier"]}
    common: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "max_steps": 10}
    fits.run(root, net, methods, *more, data=nets.tokens(n=24), peft=peft, **common | options)
    return net


def resumes(root: Path, beside: Any = None, places: tuple[int, ...] = PLACES, **options: Any) -> list[str]:
    """Names of what is left after a fit, which one from each of its checkpoints must equal bit for bit."""
    torch.manual_seed(1)
    whole = fit(root, fits.SaveAt(root, places), beside=beside, **options)
    for place in places:
        torch.manual_seed(2)
        again = fit(root, beside=beside, ckpt_path=root / f"{place}.ckpt", **options)
        assert list(held(again.net)) == list(held(whole.net)), place
        assert fits.same(fits.trained(whole), fits.trained(again)), place
        states = [n.trainer.optimizers[0].state_dict()["state"] for n in (whole, again)]
        assert states[0].keys() == states[1].keys()
        assert all(fits.same(a.values(), states[1][k].values()) for k, a in states[0].items()), place
    return list(held(whole.net))


@pytest.mark.parametrize("beside", [LoRA(r=2), DoRA(r=2)], ids=["lora", "dora"])
def test_it_resumes_bitwise_beside_others(beside: Any, tmp_path: Path) -> None:
    assert resumes(tmp_path, beside, (5, 12)) == BLOCKS[1:]


def test_it_resumes_bitwise_before_in_and_after_every_phase(tmp_path: Path) -> None:
    assert resumes(tmp_path) == BLOCKS[1:]
    tensors = {n: torch.load(tmp_path / f"{n}.ckpt", weights_only=False)["state_dict"] for n in PLACES}
    key = f"net.{BLOCKS[0]}.adapters.structure_learnable_adapter.gate"
    assert [key in tensors[n] for n in PLACES] == [n < 12 for n in PLACES]
    assert [float(tensors[n][key.replace(BLOCKS[0], BLOCKS[1]).replace(".gate", ".live")]) for n in PLACES] == [
        0, 1, 1, 1, 1, 1, 1
    ]  # fmt: skip


def in_ddp(root: str) -> list[str]:
    return resumes(Path(root), None, (5, 12, 15), strategy="ddp", devices=2, use_distributed_sampler=True)


@pytest.mark.slow
def test_it_resumes_bitwise_on_two_processes_that_agree(tmp_path: Path) -> None:
    first, second = launch(in_ddp, root=str(tmp_path))
    assert first == second == BLOCKS[1:]


def test_the_folder_holds_what_is_left_and_the_gates_are_reported(tmp_path: Path) -> None:
    net = Spread(zoo.bert, optimizer=fits.adam)
    peft = PEFT(StructureLearnableAdapter(**OPTIONS), model="net", train=["classifier"])
    nets.trainer(tmp_path, peft, max_steps=10, max_epochs=-1, log_every_n_steps=1).fit(net, nets.tokens())
    base = zoo.bert()
    base.load_state_dict({k: v for k, v in net.net.state_dict().items() if "adapters" not in k})
    again = lp.load(base, peft.written["adapter"])
    assert list(held(again)) == list(held(net.net)) == BLOCKS[1:]
    assert torch.equal(again.eval()(**zoo.sentences()).logits, net.net.eval()(**zoo.sentences()).logits)
    history = peft.history.values
    assert [sum(v.values()) for v in history["structure_learnable_adapter/adapters"].values()] == [2] * 6 + [1] * 5
    gates = history["structure_learnable_adapter/gate"]
    assert gates[1] == dict.fromkeys(BLOCKS, 0.5) != gates[2] and gates[6] == gates[10] and gates[5] != gates[6]
