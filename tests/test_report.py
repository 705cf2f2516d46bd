"""The table of what was injected: numbers by hand, and what the print-out must show."""

import io
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lightning_peft_plugins.reparameterized.lora import LoRA
from rich.console import Console
from torch import nn

from lightning_peft.attach import adapters
from lightning_peft.find import find
from lightning_peft.inject import inject, remove
from lightning_peft.method import Method, Traits
from lightning_peft.quantize import quantize
from lightning_peft.report import Row, show, summary
from lightning_peft.resize import resize
from tests.nets import bert


@dataclass(frozen=True, kw_only=True)
class Biases(Method):
    """Trains what the model has, without adapters."""

    traits = Traits(family="selective")
    name: str = "biases"

    def inject(self, model: nn.Module, stats: Any = None) -> None:
        for _, p in find(model, ("*.query.bias", "*.pooler.dense.bias"), nn.Parameter):
            p.requires_grad_(True)


def counted(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, the plain way."""
    sizes = [(p.numel() * p.requires_grad, p.numel()) for p in model.parameters()]
    return sum(t for t, _ in sizes), sum(n for _, n in sizes)


def printed(model: nn.Module, width: int) -> list[str]:
    out = io.StringIO()
    show(model, Console(file=out, width=width))
    return out.getvalue().splitlines()


def row(layers: str, role: str, out: int, fan_in: int, rank: tuple[int, int], trainable: int) -> Row:
    """One of LoRA in both blocks."""
    sizes = {"out": (out, out), "fan_in": (fan_in, fan_in), "rank": rank}
    return Row(method="lora", layers=f"bert.encoder.layer.*.{layers}", role=role, count=2, trainable=trainable, **sizes)


def test_rows_of_a_transformers_model_with_a_trained_head() -> None:
    """Hidden 32, MLP 48, 3 classes, 2 blocks; a LoRA of rank r on (out, in) trains r * (out + in)."""
    model = bert()
    inject(model, LoRA(r=4, rank_pattern={"layer.1.attention.self.query": 2}), train=("classifier.*",))
    found = summary(model)
    attention = ("attention.self.key", "attention.self.value", "attention.output.dense")
    assert [r for r in found.rows if r.layers.startswith("bert.encoder.layer.*")] == [
        row("attention.self.query", "attention", 32, 32, (2, 4), 4 * 64 + 2 * 64),
        *(row(n, "attention", 32, 32, (4, 4), 512) for n in attention),
        row("intermediate.dense", "mlp", 48, 32, (4, 4), 2 * 4 * 80),
        row("output.dense", "mlp", 32, 48, (4, 4), 2 * 4 * 80),
    ]
    head = found.rows[-1]
    assert (head.method, head.layers, head.role, head.count) == ("train", "classifier", "linear", 1)
    assert (head.out, head.fan_in, head.rank, head.trainable) == ((3, 3), (32, 32), None, 3 * 32 + 3)
    assert (found.trainable, found.total) == counted(model)
    assert found.share == found.trainable / found.total


def test_methods_stand_apart_and_what_trains_comes_last() -> None:
    model = bert()
    methods = [LoRA(r=2, targets=("value",)), LoRA(name="second", r=1, targets=("value", "query")), Biases()]
    inject(model, methods, train=("classifier", "*.LayerNorm"))
    rows = summary(model).rows
    seen = [(r.method, r.layers.rpartition("layer.*.")[2], r.count, r.trainable) for r in rows]
    assert seen == [
        ("second", "attention.self.query", 2, 128),
        ("second", "attention.self.value", 2, 128),
        ("biases", "attention.self.query.bias", 2, 64),
        ("biases", "bert.pooler.dense.bias", 1, 32),
        ("lora", "attention.self.value", 2, 256),
        ("train", "bert.embeddings.LayerNorm", 1, 64),
        ("train", "attention.output.LayerNorm", 2, 128),
        ("train", "output.LayerNorm", 2, 128),
        ("train", "classifier", 1, 99),
    ]
    assert {r.role for r in rows if r.method == "train"} == {"LayerNorm", "linear"}
    assert [r.out for r in rows if r.method == "biases"] == [None, None]  # a bias is no matrix


def test_what_lies_outside_the_scope_stands_apart() -> None:
    outer = nn.ModuleDict({"net": bert(), "probe": nn.Linear(4, 2)})
    inject(outer["net"], LoRA(r=2, targets=("query",)), train=("classifier.*",))
    rows = summary(outer).rows
    assert [(r.method, r.layers, r.trainable) for r in rows] == [
        ("lora", "net.bert.encoder.layer.*.attention.self.query", 256),
        ("train", "net.classifier", 99),
        ("-", "probe", 10),
    ]
    assert summary(outer).total == counted(outer)[1]


def test_a_plain_or_restored_model_has_no_adapters() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    before = summary(model)
    assert [(r.method, r.layers, r.count, r.trainable) for r in before.rows] == [("-", "*", 2, 16 + 25)]
    assert before.rows[0].out == (4, 5) and before.rows[0].fan_in == (3, 4)
    inject(model, LoRA(r=2))
    assert summary(model) != before
    remove(model)
    assert summary(model) == before
    assert summary(model.requires_grad_(False)).rows == ()


def test_shared_and_tied_tensors_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    inject(model, LoRA(r=2, targets=("0", "1")))
    first, second = (adapter for _, _, adapter in adapters(model))
    second.A = first.A
    model[2].weight = model[1].weight
    found = summary(model)
    assert found.rows[0].trainable == found.trainable == 8 + 8 + 8  # A once, two B
    assert found.total == 2 * 16 + 3 * 4 + 24


def test_ranks_are_read_from_the_tensors() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    inject(model, LoRA(r=4))
    resize(next(adapters(model))[2], "rank", torch.tensor([1]))
    assert summary(model).rows[0].rank == (1, 4)
    assert summary(model).rows[0].trainable == 16 + 64


def test_four_bit_weights_count_two_a_byte() -> None:
    pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 128))
    before = counted(model)[1]
    assert before == 64 * 64 + 64 + 64 * 128 + 128
    quantize(model, "nf4")
    inject(model, LoRA(r=2))
    assert counted(model)[1] < before  # what a plain count would say
    found = summary(model)
    assert found.total - found.trainable == before
    assert found.rows[0].out == (64, 128)
    assert found.trainable == 2 * (128 + 192)


@pytest.mark.parametrize("width", [80, 120])
def test_print_out_holds_every_row_and_the_total(width: int) -> None:
    model = bert()
    inject(model, LoRA(r=4), train=("classifier.*",))
    found, lines = summary(model), printed(model, width)
    assert max(len(line) for line in lines) <= width
    text = "\n".join(lines)
    assert text.count("bert.encoder.layer.*") == 1  # the stack once, its layers below it
    query = next(line.split() for line in lines if "self.query" in line)
    assert query == ["attention.self.query", "attention", "2", "32", "x", "32", "4", "512"]
    head = next(line.split() for line in lines if "classifier" in line)
    assert head == ["train", "classifier", "linear", "1", "3", "x", "32", "99"]
    total = next(line for line in lines if "total" in line)
    assert f"{found.share:.2%} of {found.total:,} parameters" in total and total.split()[-1] == f"{found.trainable:,}"


def test_print_out_of_mixed_shapes_and_ranks_gives_spans() -> None:
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(4, 8)])
    inject(model, LoRA(r=4, rank_pattern={"1": 2}))
    line = next(line for line in printed(model, 80) if "linear" in line)
    assert "8 x 4..8" in line and "2..4" in line
