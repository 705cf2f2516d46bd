"""The table of what was injected where."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_peft import arch, hosts
from lightning_peft.adapter import Adapter
from lightning_peft.attach import attached, is_adapted, modules
from lightning_peft.inject import find_record

TRAIN, OUTSIDE = "train", "-"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Layers of one name, numbers in it aside, that one method adapts or whose own parameters train.

    Args:
        method: name of the method; "train" for base parameters that ``train`` names, "-" for what trains outside of
            the model that was injected into.
        layers: dotted name, "*" for each number in it; with names of parameters where not all of a module's train.
        role: "attention", "mlp" or "mixer" in a block of the model, else the kind of layer.
        count: layers.
        out: smallest and largest number of outputs, None where there is no weight matrix.
        fan_in: smallest and largest number of inputs, None where there is no weight matrix.
        rank: smallest and largest rank of the adapters, None where they have none.
        trainable: parameters that train; a tensor that several layers share is counted with the first.
    """

    method: str
    layers: str
    role: str
    count: int
    out: tuple[int, int] | None
    fan_in: tuple[int, int] | None
    rank: tuple[int, int] | None
    trainable: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What trains in a model.

    Args:
        rows: by method, and in the model's order.
        trainable: parameters that train.
        total: all parameters, adapters included; two a byte for 4-bit weights.
    """

    rows: tuple[Row, ...]
    trainable: int
    total: int

    @property
    def share(self) -> float:
        """The part of all parameters that trains, 0 to 1."""
        return self.trainable / self.total if self.total else 0.0


@dataclass
class _Site:
    """One layer and one method, before they are put in a row."""

    method: str
    layers: str
    role: str
    shape: tuple[int, int] | None
    rank: int | None
    trainable: int


def summary(model: nn.Module) -> Summary:
    """Count what was injected into ``model``, or into a module below it, and what trains."""
    methods: dict[str, dict[tuple[str, str], list[_Site]]] = {}
    for site in _sites(model):
        methods.setdefault(site.method, {}).setdefault((site.layers, site.role), []).append(site)
    order = sorted(methods, key=lambda method: (TRAIN, OUTSIDE).index(method) if method in (TRAIN, OUTSIDE) else -1)
    rows = tuple(_row(sites) for method in order for sites in methods[method].values())
    owners = {p: m for m in model.modules() for p in m.parameters(recurse=False)}
    total = sum(hosts.logical_numel(p, m) for p, m in owners.items())
    return Summary(rows=rows, trainable=sum(r.trainable for r in rows), total=total)


def show(model: nn.Module, console: Console | None = None) -> None:
    """Print what trains where: methods, layers, shapes, ranks, parameters, and their share of the whole.

    Args:
        model: that methods were injected into, or that holds it.
        console: to print on; standard output when None.
    """
    console = console or Console()
    found = summary(model)
    gap = 1 if console.width >= 100 else 0
    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, show_footer=True)
    table.add_column("Method", "total", no_wrap=True)
    table.add_column("Layers", f"{found.share:.2%} of {found.total:,} parameters", overflow="fold")
    table.add_column("Role", no_wrap=True)
    for header in ("Count", "Out x in", "Rank"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("Trained", f"{found.trainable:,}", justify="right", no_wrap=True)
    above: tuple[str, str] = ("", "")
    for row in found.rows:
        stack, _, layer = row.layers.rpartition("*.")  # the blocks' name once, what is in them below it
        method = "" if row.method == above[0] else row.method
        if stack and (row.method, stack) != above:
            table.add_row(method, f"{stack}*")
            method = ""
        above = row.method, stack
        shape = f"{_span(row.out)} x {_span(row.fan_in)}" if row.out else ""
        trained, layer = f"{row.trainable:,}", f"  {layer}" if stack else layer
        table.add_row(method, layer, row.role, str(row.count), shape, _span(row.rank), trained)
    console.print(table)


def _sites(model: nn.Module) -> Iterator[_Site]:
    """Every adapter, and every module some of whose own parameters train."""
    counted: set[nn.Parameter] = set()

    def first_seen(parameters: Sequence[nn.Parameter]) -> int:
        new = {p for p in parameters if p.requires_grad and p not in counted}
        counted.update(new)
        return sum(p.numel() for p in new)

    roles = {n: r for r in arch.ROLES if r != "all-linear" for n in arch.role(model, r)}
    labels = _labels(model)
    for name, module in modules(model):
        kind = hosts.kind(module)
        role = roles.get(name) or kind or _class_name(module)
        shape = hosts.shape(module) if kind else None
        for tag, adapter in attached(module).items():
            yield _Site(tag, _wild(name), role, shape, _rank(adapter), first_seen([*adapter.parameters()]))
        own = dict(module.named_parameters(recurse=False))
        for label in dict.fromkeys(labels[p] for p in own.values() if p in labels):
            names = [n for n, p in own.items() if labels.get(p) == label]
            layers = name if len(names) == len(own) else ".".join(filter(None, (name, ", ".join(names))))
            matrix = shape if "weight" in names else None
            yield _Site(label, _wild(layers), role, matrix, None, first_seen([own[n] for n in names]))


def _labels(model: nn.Module) -> dict[nn.Parameter, str]:
    """Each base parameter that trains -> the method that chose it, TRAIN or OUTSIDE."""
    named = {n: p for name, m in modules(model) for n, p in _own(name, m) if p.requires_grad}
    held = find_record(model)
    if held is None:
        return dict.fromkeys(named.values(), OUTSIDE)
    owner, record = held
    chosen = {f"{owner}.{n}" if owner else n for n in record.train}
    selecting = [m.name for m in record.methods if not any(True for _ in m.adapters(model))]
    method = "+".join(selecting) or OUTSIDE
    inside = (owner + ".") if owner else ""
    return {p: TRAIN if n in chosen else method if n.startswith(inside) else OUTSIDE for n, p in named.items()}


def _own(name: str, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(f"{name}.{n}" if name else n, p) for n, p in module.named_parameters(recurse=False)]


def _row(sites: list[_Site]) -> Row:
    first, shapes = sites[0], [s.shape for s in sites if s.shape]
    return Row(
        method=first.method,
        layers=first.layers,
        role=first.role,
        count=len(sites),
        out=_extent([out for out, _ in shapes]),
        fan_in=_extent([fan_in for _, fan_in in shapes]),
        rank=_extent([s.rank for s in sites if s.rank is not None]),
        trainable=sum(s.trainable for s in sites),
    )


def _rank(adapter: Adapter) -> int | None:
    for name, axes in adapter.axes.items():
        if "rank" in axes:
            return getattr(adapter, name).shape[axes.index("rank")]
    return None


def _class_name(module: Any) -> str:
    return (type(module).__mro__[1] if is_adapted(module) else type(module)).__name__


def _wild(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _extent(numbers: list[int]) -> tuple[int, int] | None:
    return (min(numbers), max(numbers)) if numbers else None


def _span(extent: tuple[int, int] | None) -> str:
    return "" if extent is None else "..".join(map(str, dict.fromkeys(extent)))
