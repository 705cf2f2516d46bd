"""Which tokens of the present batch are padding, for what measures, penalises or weighs what it sees."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lightning_peft import arch
from lightning_peft.adapter import Adapter, Base
from lightning_peft.attach import accepts, attach, by_name, detach_all, modules


class Padding:
    """The masks of the calls under way, for what runs inside of them.

    There is none outside, such as where a backward runs a checkpointed layer again.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []  # arguments by name, the innermost call last

    @property
    def mask(self) -> Tensor | None:
        """(batch, time), 0 at padding, as the innermost stack of blocks has it; None where all tokens are real.

        Encoder and decoder have masks of their own. What a stack makes of its mask for its layers, of four dimensions,
        is passed over; it is returned only where the outermost call was given such a one.
        """
        mask = None
        for call in reversed(self.calls):
            mask = call.get("attention_mask")
            if mask is None or mask.dim() == 2:
                return mask
        return mask

    def of(self, x: Tensor) -> Tensor | None:
        """The mask for the rows of x (batch, time, ...) or (batch * time, ...): the nearest one that has as many."""
        for call in reversed(self.calls):
            mask, states = call.get("attention_mask"), call.get("encoder_hidden_states")
            if states is not None and x is states:
                mask = call.get("encoder_attention_mask")
            elif states is not None and mask is None:
                return None  # a decoder's own tokens; the mask further out is the encoder's
            if isinstance(mask, Tensor) and mask.dim() == 2:
                if mask.shape == x.shape[:-1]:
                    return mask
                if (mask.numel(),) == x.shape[:-1]:
                    return mask.flatten()
        return None


class ReadPadding(Adapter):
    """Around a module that takes an attention mask: tells ``padding`` what the call under way was given."""

    watches = True

    def __init__(self, host: Any, padding: Padding) -> None:
        super().__init__()
        self.names, self.padding = accepts(host), padding

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name."""
        return by_name(self.names, args, kwargs)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        self.padding.calls.append(self.call(args, kwargs))
        try:
            return base(*args, **kwargs)
        finally:
            self.padding.calls.pop()


def watch(model: nn.Module, tag: str) -> Padding:
    """Attach readers under ``tag`` to all modules that take an ``attention_mask``, around stacks of blocks if any."""
    padding, blocks = Padding(), arch.blocks(model)
    around = {p for block in blocks for p in ("", *arch.parents(block))}
    for name, module in list(modules(model)):
        if (name in around or not blocks) and "attention_mask" in accepts(module):
            attach(module, tag, ReadPadding(module, padding))
    return padding


@contextlib.contextmanager
def reading(model: nn.Module) -> Iterator[Padding]:
    """``watch`` for as long as this is open."""
    tag = "padding"
    try:
        yield watch(model, tag)
    finally:
        detach_all(model, tag)
