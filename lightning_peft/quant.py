"""One quantised layer: its kind, its weight read and written, its way back to a plain layer (bitsandbytes, optional).

Every function takes any bitsandbytes linear layer, made by ``lightning_peft.quantize`` or not, and leaves alone the
bitsandbytes import until a layer of its own is at hand.
"""

from collections import Counter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = {"Linear4bit": "4-bit", "Linear8bitLt": "int8", "Embedding4bit": "", "Embedding8bit": ""}


def library() -> ModuleType:
    """bitsandbytes, imported at its first use.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as e:
        raise ValueError("quantised layers need the package bitsandbytes: pip install bitsandbytes") from e
    return bitsandbytes


def _family(host: nn.Module) -> str | None:
    for c in type(host).__mro__:
        if c.__name__ in FAMILIES and c.__module__.startswith("bitsandbytes."):
            if not FAMILIES[c.__name__]:
                raise ValueError(f"bitsandbytes' {c.__name__} cannot be read: leave embeddings unquantised")
            return FAMILIES[c.__name__]
    return None


def kind(host: nn.Module) -> str | None:
    """ "nf4", "fp4" or "int8" for a bitsandbytes linear layer, moved to its device or not yet; else None."""
    stored_as = _family(host)
    if stored_as != "4-bit":
        return stored_as
    state = _state(host)
    return host.weight.quant_type if state is None else state.quant_type  # type: ignore[union-attr]


def _state(host: Any) -> Any:
    """bitsandbytes' QuantState of a 4-bit layer, None before it was quantised."""
    state = getattr(host.weight, "quant_state", None)
    return host.quant_state if state is None else state  # the layer keeps it where FSDP made the weight a plain tensor


def scales(host: Any) -> Tensor:
    """(out,) largest absolute weight of each row of an int8 layer; the first forward moves it to ``host.state``."""
    return host.state.SCB if host.weight.SCB is None else host.weight.SCB


def bring_along(host: Any, args: Any = None) -> None:
    """Let an int8 layer's codes and scales follow its weight to the device it was moved to; a forward pre-hook."""
    if _family(host) == "int8":
        for holder in (host.weight, host.state):
            if holder.CB is not None and holder.CB.device != host.weight.device:
                holder.CB, holder.SCB = host.weight.data, holder.SCB.to(host.weight.device)


def keep_layout(host: Any) -> None:
    """Keep a 4-bit weight in the layout that can be trained, read and saved, on every CPU; nothing to do for int8.

    A weight that was repacked already gets its codes back exactly, its scales to 0.4 %: the rest was rounded away.
    Layers that ``lightning_peft.quantize`` made never need it again.
    """
    if _family(host) != "4-bit":
        return
    host.support_avx512bf16_for_cpu = False
    state = _state(host)
    if getattr(state, "packing_format_for_cpu", False):
        unpack = library().functional._convert_weight_packed_for_cpu_inverse
        host.weight.data, host.weight.quant_state = unpack(host.weight.data, state)
        host.quant_state = state = host.weight.quant_state
    if state is not None and state.absmax.dim() == 2:  # without double quantisation their inverse forgets the scales
        state.absmax = state.absmax.T.reshape(-1).float()


def _stored(host: Any) -> bool:
    """True once the weight is held as codes; False where bitsandbytes still waits for a move to a device."""
    return _state(host) is not None if _family(host) == "4-bit" else host.weight.dtype == torch.int8


def divides(layer: Any, blocksize: int) -> bool:
    """False where bitsandbytes' CPU kernel errs by 20 to 50 %: it needs whole blocks in each row of a 4-bit weight."""
    return layer.weight.device.type != "cpu" or layer.in_features % blocksize == 0


def dequantize(host: Any) -> Tensor:
    """The (out, in) weight of a quantised layer; the stored one where it is not quantised yet.

    The dtype is the one that a 4-bit weight had before, float32 for int8. A weight that bitsandbytes repacked for CPU
    inference is put back into its own layout first, for good (``keep_layout``).

    Raises:
        ValueError: a 4-bit weight on the CPU whose rows do not divide into blocks.
    """
    if not _stored(host):
        return host.weight
    keep_layout(host)
    bring_along(host)
    if _family(host) == "4-bit" and not divides(host, block := _state(host).blocksize):
        raise ValueError(
            f"in_features={host.in_features} is no multiple of blocksize={block}: bitsandbytes' CPU kernel may then "
            "take other blocks' scales, so neither this weight nor the layer's output can be trusted; use a GPU"
        )
    return _decode(host.weight.data, _state(host) if _family(host) == "4-bit" else scales(host))


def _decode(codes: Tensor, state: Any) -> Tensor:
    if isinstance(state, Tensor):
        return codes.float() * (state * (1 / 127)).unsqueeze(1)
    return library().functional.dequantize_4bit(codes, state)


def encode(matrix: Tensor, kind: str, *, blocksize: int = 64, double_quant: bool = True, **storage: Any) -> Any:
    """(codes, bitsandbytes' QuantState) of an (out, in) matrix, or for int8 (codes, (out,) scales)."""
    functional = library().functional
    if kind == "int8":
        return functional.int8_vectorwise_quant(matrix.to(torch.float16).contiguous())[:2]
    return functional.quantize_4bit(
        matrix.contiguous(), blocksize=blocksize, compress_statistics=double_quant, quant_type=kind, **storage
    )


def _encode_as(host: Any, matrix: Tensor) -> tuple[Tensor, Any]:
    """``matrix`` in the format that ``host`` is in: kind, block size, double quantisation, dtype of the codes."""
    keep_layout(host)
    state = _state(host) if _family(host) == "4-bit" else None
    if state is None:
        return encode(matrix, "int8")
    storage = {"blocksize": state.blocksize, "double_quant": state.nested, "quant_storage": host.weight.dtype}
    codes, new = encode(matrix.float(), state.quant_type, **storage)
    new.dtype = state.dtype
    return codes, new


@torch.no_grad()
def requantize(host: Any, matrix: Tensor) -> None:
    """Write an (out, in) matrix into the weight, quantised again in the same format.

    Lossy beyond the format's own error: the weight lies on the grid, so a change below half a step is rounded away as
    a whole. ``merge_loss`` tells how much of it.
    """
    if not _stored(host):
        host.weight.copy_(matrix)
        return
    bring_along(host)
    codes, state = _encode_as(host, matrix)
    host.weight.data.copy_(codes)
    if isinstance(state, Tensor):
        scales(host).copy_(state)
    else:
        host.weight.quant_state = host.quant_state = state


@torch.no_grad()
def merge_loss(host: Any, delta: Tensor) -> float:
    """Part of an (out, in) update that quantising the sum again would lose: 0 none, 1 all of it.

    It is measured along ``delta``: 1 - <what the weight moved by, delta> / <delta, delta>. The rounding across it,
    of the format's own size (9 % of the weight for NF4), comes on top.
    """
    before = dequantize(host).float()
    delta = delta.to(before)
    size = (delta * delta).sum().item()
    if not _stored(host) or size == 0:
        return 0.0
    moved = _decode(*_encode_as(host, before + delta)).float() - before
    return 1 - (moved * delta).sum().item() / size


def replace_dequantized(
    model: nn.Module, name: str, matrix: Tensor | None = None, dtype: torch.dtype | None = None
) -> nn.Linear:
    """Put a plain, frozen nn.Linear where the quantised layer ``name`` is, wherever the model uses that layer.

    Args:
        model: in which the layer lies; the layer itself stays untouched, so that it can be put back with ``swap``.
        name: its dotted name; its adapters are off already.
        matrix: (out, in) weight to hold, such as the dequantised one with an update; default the dequantised one.
        dtype: of weight and bias; default what most of the model's other parameters have, since a plain layer does
            not cast its input as a quantised one does.

    Raises:
        ValueError: the layer is not quantised, or is the model itself.
    """
    host: Any = model.get_submodule(name)
    if kind(host) is None or host is model:
        raise ValueError(f"{name!r} is {'the model itself' if host is model else type(host).__name__}, so there is no "
                         "quantised layer to replace in it")  # fmt: skip
    weight = (dequantize(host) if matrix is None else matrix).detach()
    dtype = dtype or _common_dtype(model) or weight.dtype
    plain = nn.Linear(host.in_features, host.out_features, bias=host.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.to(host.weight.device, dtype, copy=True), requires_grad=False)
    if host.bias is not None:  # another dtype needs a Parameter of its own: an undone merge gets the old one back
        same = host.bias.dtype == dtype
        plain.bias = host.bias if same else nn.Parameter(host.bias.detach().to(dtype), host.bias.requires_grad)
    swap(model, host, plain.train(host.training))
    return plain


def _common_dtype(model: nn.Module) -> torch.dtype | None:
    """The floating dtype of most base weights: quantised layers and adapters keep dtypes of their own."""
    count: Counter[torch.dtype] = Counter()
    for name, module in model.named_modules():
        if "adapters" not in name.split(".") and kind(module) is None:
            own = module.parameters(recurse=False)
            count.update({p.dtype: p.numel() for p in own if p.is_floating_point()})
    return count.most_common(1)[0][0] if count else None


def swap(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``model`` holds ``old``: ALBERT, for one, uses the same layer in many places."""
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is old:
                setattr(parent, child, new)
