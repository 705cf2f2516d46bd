"""Scores of adapters and ranks, and the quantile rule, by numbers worked by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft import Adapter, Base, hosts, padding
from lightning_peft.importance import above, change, first_order, ranks
from tests import nets
from tests.methods import Product


class Factors(Adapter):
    axes = {"A": ("rank", "in"), "B": ("out", "rank"), "bias": ("rank",)}

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]]))
        self.B = nn.Parameter(torch.tensor([[0.1, 0.0, 0.2], [-0.1, 0.3, 0.4]]))
        self.bias = nn.Parameter(torch.full((3,), 9.0))

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs)


def test_ranks_by_first_order() -> None:
    a = Factors()
    a.A.grad = torch.tensor([[0.1, 0.1], [0.2, 0.6], [-1.0, 1.0]])
    a.B.grad = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.5]])
    a.bias.grad = torch.ones(3)  # of matrices only
    assert ranks(a) == 3
    torch.testing.assert_close(first_order(a), torch.tensor([0.15, 0.15, 0.20]))  # of means of |t g|: 0.25, 0.75, 0.70
    a.B.grad[0, 1] = float("inf")
    torch.testing.assert_close(first_order(a), torch.tensor([0.15, 0.0, 0.20]))
    a.B.grad = None
    torch.testing.assert_close(first_order(a), torch.tensor([0.15, 0.0, 0.0]))


def test_change_by_token() -> None:
    plain = torch.tensor([[[3.0, 4.0], [0.0, 5.0], [1.0, 1.0]]])
    delta = torch.tensor([[[0.3, 0.4], [0.0, 1.0], [9.0, 9.0]]])
    total, tokens = change(plain + delta, plain, torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(float(total / tokens), 0.15)
    flat = change((plain + delta).view(3, 2), plain.view(3, 2), torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(flat, torch.stack([total, tokens]))
    total, tokens = change((plain + delta, None), (plain, None))
    assert float(total) == pytest.approx(0.1 + 0.2 + 9.0) and tokens == 3
    assert change(plain[:, 0], plain[:, 0], torch.tensor([[1, 1, 0]])).tolist() == [0.0, 1.0]  # of a pooler


@pytest.mark.parametrize("ratio, count", [(0.333333333, 11), (1 / 3, 10), (0.5, 8), (0.25, 12), (0, 16)])
def test_heads_above_a_quantile(ratio: float, count: int) -> None:
    scores = torch.randperm(16, generator=torch.Generator().manual_seed(0)) * 1e-6 + 1.0
    kept = above({0: scores}, ratio)[0]
    assert kept.tolist() == sorted(scores.argsort(descending=True)[:count].tolist())


def test_units_of_all_layers_compete_or_each_layer_alone() -> None:
    draw = torch.Generator().manual_seed(1)
    channels = {i: torch.randn(4096, generator=draw) for i in range(24)}
    together, alone = above(channels, 1 / 3), above(channels, 1 / 3, alone=True)
    assert sum(map(len, together.values())) == 65_536
    assert {len(k) for k in alone.values()} == {2730} and len({len(k) for k in together.values()}) > 1
    modules = {i: torch.randn(1, generator=draw) for i in range(144)}
    stay = [i for i, k in above(modules, 0.75, least=0).items() if len(k)]
    assert len(stay) == 36
    of_ranks = {i: torch.randn(8, generator=draw) for i in stay}
    assert sum(map(len, above(of_ranks, 0.5, least=0).values())) == 144


def test_ties_and_what_stays_whatever_it_scores() -> None:
    same = {"a": torch.ones(4), "b": torch.ones(4)}
    assert [k.tolist() for k in above(same, 0.5).values()] == [[0], [0]]
    assert [k.tolist() for k in above(same, 0.5, least=0).values()] == [[0], []]
    low = {"a": torch.arange(4.0), "b": torch.arange(10.0, 14.0)}
    assert [k.tolist() for k in above(low, 0.5).values()] == [[3], [0, 1, 2, 3]]
    assert above({0: torch.tensor([-5.0, 1.0, 2.0])}, 0.5)[0].tolist() == [2]  # signed, and strictly above
    assert len(above({0: torch.arange(20.0)}, 0.5, multiple=8)[0]) == 16
    assert len(above({0: torch.arange(20.0)}, 0.1, multiple=8)[0]) == 20
    assert above({}, 0.5) == {}


class Sum(Adapter):
    def forward(self, base: Base, x: Tensor) -> Tensor:
        return base(x) + 1.0


class Seen(Adapter):
    def forward(self, base: Base, x: Tensor) -> Tensor:
        y, self.plain = base.with_plain(x)
        return y


@pytest.mark.parametrize("others", [(), ("sum",), ("product",), ("product", "sum")])
def test_an_adapter_sees_its_layer_with_and_without_the_others(others: tuple[str, ...]) -> None:
    host, x = nn.Linear(4, 3), torch.randn(5, 4)
    plain = host(x)
    for name in others:  # a product forms the weight and never calls its host
        lp.attach(host, name, Sum() if name == "sum" else Product(host, 2))
    wanted, seen = host(x), Seen()
    lp.attach(host, "seen", seen)
    torch.testing.assert_close(host(x), wanted)
    torch.testing.assert_close(seen.plain, plain)
    assert not seen.plain.requires_grad and hosts.kind(host) == "linear"


def test_padding_is_that_of_the_part_which_runs() -> None:
    model: Any = nets.bert()
    held = padding.watch(model, "padding")
    ids = torch.tensor([[5, 6, 7], [5, 6, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    seen: list[Any] = []
    model.bert.encoder.layer[0].register_forward_pre_hook(
        lambda _, args: seen.append((held.mask, held.of(args[0]), held.of(args[0].flatten(0, 1)), held.of(ids[:, 0])))
    )
    model(ids, mask)  # by position; BERT's encoder gets one of four dimensions
    assert seen[0][0] is mask and seen[0][1] is mask and seen[0][3] is None
    assert seen[0][2].tolist() == mask.flatten().tolist()
    model(input_ids=ids)
    assert seen[1] == (None, None, None, None)
    with pytest.raises(IndexError):
        model(ids + 10**6, mask)
    assert not held.calls and held.mask is None  # also after a call that failed
    assert [n for n, _, _ in lp.adapters(model, "padding")] == ["", "bert", "bert.encoder"]
