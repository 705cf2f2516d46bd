"""`lightning-peft methods`: what is installed, read from metadata and source text; torch is never imported."""

import argparse
import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_peft import registry
from lightning_peft.registry import Info

# Defaults of method.Traits, which cannot be imported here without torch; a test compares the two.
TRAITS: dict[str, Any] = {"family": "", "hosts": ("linear",), "merge": False, "quantized": True}
NUMERIC = ("int", "float")


def run(args: Sequence[str], console: Console | None = None) -> int:
    """`methods` lists every plugin; `methods NAME` shows the options of one.

    Raises:
        ValueError: no method of that name is installed; the nearest is named.
    """
    parser = argparse.ArgumentParser("lightning-peft methods", description="List methods, or the options of one.")
    parser.add_argument("name", nargs="?", help="entry-point name or class name of a method, such as lora or LoRA")
    name = parser.parse_args(args[1:]).name
    console = console or Console()
    infos = [registry.describe(n) for n in registry.names()]
    if name is None:
        _list(infos, console)
        return 0
    by_class = {i.target.rpartition(":")[2]: i for i in infos}
    info = by_class[name] if name in by_class else registry.describe(name)
    if info.problem:
        raise ValueError(f"plugin {info.name!r} of {info.package} ({info.target}) is broken: {info.problem}")
    _show(info, console)
    return 0


def _list(infos: Sequence[Info], console: Console) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("method", style="cyan", no_wrap=True)
    table.add_column("what it trains", ratio=1)
    table.add_column("merges", no_wrap=True)
    table.add_column("4/8-bit base", no_wrap=True)
    table.add_column("sits on")
    families = sorted({(TRAITS | i.traits)["family"] for i in infos if not i.problem})
    for family in families:
        table.add_row(f"[dim]{escape(family)}[/]")
        for info in infos:
            traits = TRAITS | info.traits
            if not info.problem and traits["family"] == family:
                can = ["yes" if traits[k] is True else "no" for k in ("merge", "quantized")]
                table.add_row(f"  {info.name}", escape(headline(info)), *can, ", ".join(traits["hosts"]))
    for info in infos:
        if info.problem:
            table.add_row(f"[red]{escape(info.name)}", f"[red]broken ({escape(info.package)}): {escape(info.problem)}")
    console.print(table)
    console.print("\n`lightning-peft methods NAME` shows the options of one.", highlight=False)


def headline(info: Info) -> str:
    """What a method does: the clause of its summary before the paper, without its own name."""
    text = re.sub(r"^\w+: ", "", info.summary)
    return text.split(". ")[0].rstrip(".")


def _show(info: Info, console: Console) -> None:
    traits = TRAITS | info.traits
    cls = info.target.rpartition(":")[2]
    console.print(f"[bold cyan]{info.name}[/] ({cls}, from {escape(info.package)})", highlight=False)
    console.print(escape(info.summary), highlight=False)
    facts = {
        "family": traits["family"],
        "paper": traits.get("paper", ""),
        "trainable parameters": traits.get("parameters", ""),
        "sits on": ", ".join(traits["hosts"]),
        "merges into the base": "yes" if traits["merge"] is True else "no",
        "runs on a quantised base": "yes" if traits["quantized"] is True else "no",
    }
    grid = Table.grid(padding=(0, 2))
    for what, value in facts.items():
        if value:
            grid.add_row(f"[bold]{what}", escape(str(value)))
    console.print("", grid, "")
    console.print(_options(info))
    console.print("\n[bold]on the command line[/]")
    console.print(
        f"  lightning-peft fit --config FILE --peft.methods {info.name}{_example(info, ' --peft.methods.{} {}')}",
        highlight=False,
    )
    console.print("[bold]in Python[/]")
    console.print(f"  from lightning_peft import PEFT\n  from lightning_peft.methods import {cls}", highlight=False)
    console.print(f"  Trainer(callbacks=[PEFT({cls}({_example(info, '{}={}')}))])", highlight=False)


def _options(info: Info) -> Table:
    told = option_help(info.doc)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("option", style="cyan", no_wrap=True)
    table.add_column("type", no_wrap=True)
    table.add_column("default", no_wrap=True)
    table.add_column("what it does", ratio=1)
    for name, (kind, default) in info.fields.items():
        what = told.get(name, "tag of its adapters in the state dict" if name == "name" else "")
        table.add_row(name, escape(kind), escape(_default(default)), escape(what))
    return table


def _default(source: str) -> str:
    """`field(default_factory=dict)` as the value that it makes; everything else as it stands in the source."""
    made = re.fullmatch(r"field\(default_factory=(\w+)\)", source)
    return {"dict": "{}", "list": "[]", "tuple": "()"}.get(made[1], source) if made else source


def _example(info: Info, form: str) -> str:
    """The first number among the options with its default, in the given form."""
    for name, (kind, default) in info.fields.items():
        if kind in NUMERIC and default != "required":
            return form.format(name, default)
    return ""


def option_help(doc: str) -> dict[str, str]:
    """The Args section of a docstring as option -> help text, joined to one line.

    Entries are `name: text` or `a, b: text`, one level below "Args:"; deeper lines continue the text above.
    """
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", doc, re.M)
    lines = [x for x in section[1].splitlines() if x.strip()] if section else []
    indent = min((len(x) - len(x.lstrip()) for x in lines), default=0)
    told: dict[str, str] = {}
    names: list[str] = []
    for line in lines:
        start = re.match(r"(\w+(?:, \w+)*): (.*)", line[indent:])
        if start:
            names = start[1].split(", ")
            told |= dict.fromkeys(names, start[2].strip())
        else:
            told |= {n: f"{told[n]} {line.strip()}" for n in names}
    return told
