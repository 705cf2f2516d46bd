"""Which tokens of the present batch are padding, for adapters that measure or penalise what they see."""

from typing import Any

from torch import Tensor, nn

from lightning_peft import arch
from lightning_peft.adapter import Adapter, Base
from lightning_peft.attach import accepts, attach, modules


class Padding:
    """(batch, time), 0 at padding, as the part of the model that runs was given it; None where all tokens are real."""

    mask: Tensor | None = None


class ReadPadding(Adapter):
    """Around a module that is given an attention mask: keeps it in ``padding``."""

    def __init__(self, position: int, padding: Padding) -> None:
        super().__init__()
        self.position, self.padding = position, padding

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask", args[self.position] if len(args) > self.position else None)
        if mask is None or mask.dim() == 2:  # one of four dimensions was made from what an outer module was given
            self.padding.mask = mask
        return base(*args, **kwargs)


def watch(model: nn.Module, tag: str) -> Padding:
    """Attach readers under ``tag`` to all modules around stacks of blocks that take an ``attention_mask``.

    Encoder and decoder have masks of their own: what is kept is that of the one that began last.
    """
    padding = Padding()
    around = {p for block in arch.blocks(model) for p in ("", *arch.parents(block))}
    for name, module in list(modules(model)):
        if name in around:
            takes = accepts(module)
            if "attention_mask" in takes:
                attach(module, tag, ReadPadding(takes.index("attention_mask"), padding))
    return padding
