"""What the scripts of this folder share: quiet Trainers, tables that grow line by line, bytes kept for backward."""

import logging
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning_peft_plugins.lifecycle.deft import DEFT
from rich.console import Console
from torch import Tensor

QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
WATCH = DEFT(name="watch", weight=0.0)  # only measures densities


def silence() -> None:
    """Let a table have the terminal for itself."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning_peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def show(lines: Iterable[str], out: Path | None) -> None:
    """Print each line as soon as it is known, and write it to ``out``."""
    with out.open("w") if out else nullcontext() as file:
        for line in lines:
            Console().print(line, highlight=False, soft_wrap=True)
            if file:
                print(line, file=file, flush=True)


def kept_for_backward(model: Any, batch: dict[str, Tensor]) -> int:
    """Bytes of tensors that one forward keeps for its backward, weights not counted, storages counted once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.is_sparse:
            for part in (t._values(), t._indices()):  # private: the public ones want coalesced tensors
                pack(part)
        elif t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**batch).loss
    size = sum(t.untyped_storage().nbytes() for t in kept.values())
    del loss
    return size
