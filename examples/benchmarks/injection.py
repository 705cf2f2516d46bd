"""How long injection takes where it decomposes weights, on random layers of Llama-7B's shapes, beside one product.

A row is one method: one 4096 x 4096 layer, and with --block a whole block (4 of them and 3 of 11008 x 4096). The last
row, a product of two 4096 x 4096 matrices, tells how fast the machine is just now.

    OMP_NUM_THREADS=2 python examples/benchmarks/injection.py --methods PiSSA "PMSS(r=256)" --block
"""

import argparse
import os
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import lightning_peft
from lightning_peft import methods

KNOWN = {
    "PiSSA": lambda: methods.PiSSA(r=16),
    "KaSA(niter=16)": lambda: methods.KaSA(r=8, niter=16),
    "KaSA": lambda: methods.KaSA(r=8),
    "SSVD(r=256)": lambda: methods.SSVD(r=256),
    "SSVD": lambda: methods.SSVD(),
    "PMSS(r=256)": lambda: methods.PMSS(r=256),
}


def seconds(name: str, shapes: list[tuple[int, int]]) -> float:
    """To inject the method into linear layers of these (out, in) shapes."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(fan_in, out, bias=False) for out, fan_in in shapes))
    start = time.perf_counter()
    lightning_peft.inject(model, KNOWN[name]())
    return time.perf_counter() - start


def product(side: int) -> float:
    W = torch.randn(side, side)
    start = time.perf_counter()
    torch.mm(W, W)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["PiSSA", "PMSS(r=256)"], choices=KNOWN)
    parser.add_argument("--block", action="store_true", help="a whole block too")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    options = parser.parse_args()
    layer = (options.hidden, options.hidden)
    wide = (options.intermediate, options.hidden)
    block = [*[layer] * 4, wide, wide, wide[::-1]]
    table = Table("method", "one layer, s", *(["one block, s"] if options.block else []))
    for name in options.methods:
        times = [seconds(name, shapes) for shapes in ([layer], block)[: 1 + options.block]]
        table.add_row(name, *(f"{t:.1f}" for t in times))
    table.add_row("one product", f"{product(options.hidden):.2f}")
    console = Console()
    console.print(table)
    console.print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
