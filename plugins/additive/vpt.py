"""VPT: trained tokens beside a vision transformer's patches. Jia et al. 2022, arXiv:2203.12119."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning_peft_plugins.selective.norm_tuning import is_norm
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Adapter, Base, Method, Traits, arch, attach, hosts
from lightning_peft.attach import modules


class VisualPrompt(Adapter):
    """On a block: ``num_tokens`` more tokens go in, and of what comes out only the image's are passed on.

    They go in front, not behind the class token as in the paper: they have no position, so attention does not care
    where they are, and models with other special tokens, or with rotary positions for the last ones, need no rule.
    Dropping them and putting the next block's in is what replacing them between blocks comes to.
    """

    axes = {"prompt": ("length", "hidden")}

    def __init__(self, num_tokens: int, width: int, bound: float, dropout: float, leave: bool) -> None:
        super().__init__()
        self.bound, self.dropout, self.leave = bound, dropout, leave
        self.prompt = nn.Parameter(torch.empty(num_tokens, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.prompt, -self.bound, self.bound)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        key = next(iter(kwargs), "")
        x = args[0] if args else kwargs.pop(key)  # (batch, tokens, hidden)
        _check_call(x, (*args[1:], *kwargs.values()))
        prompt = self.prompt.to(x.dtype).expand(len(x), -1, -1)
        x = torch.cat([F.dropout(prompt, self.dropout, self.training), x], 1)
        y = base(x, *args[1:], **kwargs) if args else base(**{key: x}, **kwargs)
        return without(y, len(self.prompt)) if self.leave else y


class Leave(Adapter):
    """On the last block where the prompt went in at the first: only the image's tokens are passed on."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return without(base(*args, **kwargs), self.num_tokens)


def without(y: Any, n: int) -> Any:
    """What a block returned, a tensor or a tuple that begins with it, without its first n tokens."""
    return (y[0][:, n:], *y[1:]) if isinstance(y, tuple) else y[:, n:]


def _check_call(x: Tensor, others: tuple[Any, ...]) -> None:
    if x.dim() != 3:
        raise ValueError(f"vpt: blocks take (batch, tokens, hidden), but this one was given {tuple(x.shape)}")
    if any(isinstance(o, Tensor) and o.dim() > 1 and o.shape[-1] == x.shape[1] for o in others):
        raise ValueError(
            f"vpt: a mask over the {x.shape[1]} tokens of the image leaves no place for more: leave it out"
        )


@dataclass(frozen=True, kw_only=True)
class VPT(Method):
    """Trained tokens among those of the image, in every block its own (deep) or from the first block on.

    Attention and MLPs see them; the class token, poolers and heads behind the blocks see the image's tokens alone. The
    authors keep the frozen backbone's dropout off while training, where it has some: put that part in ``eval()``.

    Args:
        num_tokens: how many tokens a block.
        deep: own tokens in every block, in place of those that come out of the block before; else only in the first,
            and hidden states asked for between blocks hold them too.
        dropout: probability on the tokens.
    """

    traits = Traits(
        family="additive",
        paper="Jia et al. 2022, arXiv:2203.12119",
        parameters="num_tokens * hidden * blocks; shallow num_tokens * hidden",
        hosts=("module",),
        identity_start=False,
    )
    name: str = "vpt"
    num_tokens: int = 5
    deep: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.num_tokens < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"{self.name}: num_tokens is at least 1 and dropout in [0, 1), got {self.num_tokens} and "
                             f"{self.dropout}")  # fmt: skip

    def inject(self, model: nn.Module, stats: None = None) -> None:
        blocks = [model.get_submodule(n) for n in _one_stack(model, self.name)]
        patch, width = _patches(model, self.name), _width(blocks[0], self.name)
        bound = math.sqrt(6 / (hosts.fan_in(patch) + width))  # Xavier's, of the patch embedding
        for i, block in enumerate(blocks):
            if self.deep or i == 0:
                leave = self.deep or len(blocks) == 1
                attach(block, self.name, VisualPrompt(self.num_tokens, width, bound, self.dropout, leave))
            elif i == len(blocks) - 1:
                attach(block, self.name, Leave(self.num_tokens))


def _one_stack(model: nn.Module, by: str) -> list[str]:
    """Names of the blocks of the one stack there is.

    Raises:
        ValueError: none, several, or blocks whose attention counts positions of the image.
    """
    names = list(arch.blocks(model))
    stacks = list(dict.fromkeys(n.rpartition(".")[0] for n in names))
    if len(stacks) != 1:
        raise ValueError(
            f"{by}: needs one stack of transformer blocks, this {type(model).__name__} has {stacks or 'none'}"
            + ("; inject into the part that sees images, if there is one: PEFT(..., model=...)" if stacks else "")
        )
    parts = {p for n in names for p in model.get_submodule(n).state_dict()}
    if table := next((p for p in parts if "relative_position" in p), None):
        raise ValueError(f"{by}: attention with a table of relative positions ({table!r}) has no place for more tokens")
    return names


def _patches(model: nn.Module, by: str) -> nn.Module:
    """The patch embedding: the convolution outside the blocks whose patches do not overlap."""
    inside = set(arch.blocks(model))
    for name, module in modules(model):
        outside = not any(p in inside for p in arch.parents(name))
        if outside and isinstance(module, hosts.Conv) and module.kernel_size == module.stride:
            return module
    raise ValueError(f"{by}: this {type(model).__name__} has no patch embedding (a convolution whose stride is its "
                     "kernel), so its blocks do not see images; for text there is prompt_tuning")  # fmt: skip


def _width(block: Any, by: str) -> int:
    """Of a token, from the block's norm."""
    if any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in block.modules()):
        raise ValueError(
            f"{by}: blocks take (batch, tokens, hidden); build nn.MultiheadAttention with batch_first=True"
        )
    norm = next((m for m in block.children() if is_norm(m)), None)
    if norm is None:
        raise ValueError(f"{by}: {type(block).__name__} has no norm of its own, by which a token's width is known")
    return len(next(norm.parameters()))
