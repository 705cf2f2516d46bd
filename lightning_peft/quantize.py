"""Quantise a model's linear layers with bitsandbytes, on the CPU or a GPU. Dettmers et al. 2023, arXiv:2305.14314.

bitsandbytes 0.50 has gaps that change a weight or lose a gradient in silence; ``_equip`` closes them, layer by layer:

* On CPUs with AVX512-BF16 the first forward in evaluation repacks a 4-bit weight: its scales are rounded to bf16, and
  from then on no gradient reaches the layer's input, in training neither (``quant.keep_layout``).
* A 4-bit layer saves its scales and never loads them; an int8 layer loads them only when strict.
* Moving a model to another device leaves an int8 layer's codes and scales behind.
* nn.TransformerEncoderLayer's fused path, which any forward hook turns off, would read the codes as weights.
"""

import difflib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track
from torch import nn

from lightning_peft import arch, quant
from lightning_peft.attach import is_adapted
from lightning_peft.find import matches, nearest

KINDS = ("nf4", "fp4", "int8")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@torch.no_grad()
def quantize(
    model: nn.Module,
    kind: str = "nf4",
    *,
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    exclude: Sequence[str] = (),
    blocksize: int = 64,
) -> list[str]:
    """Replace every nn.Linear but the output heads by a quantised layer, now and on the device it is on.

    Embeddings, norms and heads stay as they were, and so do layers that transformers keeps in float32 and those inside
    an nn.MultiheadAttention, whose weights are read without calling them. The state-dict key ``weight`` stays, with
    the scales beside it. Attach adapters afterwards.

    Args:
        model: with its weights loaded; it is changed in place.
        kind: "nf4", "fp4" (4 bits a weight), or "int8" (rows in 8 bits; in evaluation inputs too, but for columns
            beyond 6, so that outputs then differ from training's by about 1 %).
        double_quant: of 4-bit kinds, store the blocks' scales in 8 bits too: 4.127 instead of 4.5 bits a weight.
        compute_dtype: of 4-bit kinds, what inputs are cast to for the product, and outputs back from. Biases are
            stored in it, as bitsandbytes would cast them at the first forward.
        exclude: names, globs or name suffixes of layers, or of modules around them, to leave as they are.
        blocksize: of 4-bit kinds, weights that share a scale; on the CPU it must divide each layer's in_features.

    Returns:
        The names of the layers that were replaced.

    Raises:
        ValueError: unknown kind, option without effect, adapted or quantised model, layer that cannot be replaced.
    """
    _check_options(kind, double_quant, compute_dtype, blocksize)
    names = _targets(model, exclude)
    _check_layers(model, names, kind, blocksize)
    options = {} if kind == "int8" else {"double_quant": double_quant, "blocksize": blocksize}
    for name in track(names, f"quantising to {kind}", disable=len(names) <= 50):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        quant.swap(model, layer, _quantized(layer, kind, compute_dtype, options))
    return names


def _check_options(kind: str, double_quant: bool, compute_dtype: torch.dtype, blocksize: int) -> None:
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1, cutoff=0.2)
        raise ValueError(f"unknown kind {kind!r}; {f'nearest: {near[0]!r}; ' if near else ''}known: {', '.join(KINDS)}")
    if kind == "int8" and (not double_quant or compute_dtype != torch.bfloat16 or blocksize != 64):
        raise ValueError("double_quant, compute_dtype and blocksize have no effect on kind='int8': leave them out")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize {blocksize} does not exist; known: {', '.join(map(str, BLOCKSIZES))}")
    if compute_dtype not in DTYPES:
        raise ValueError(f"compute_dtype {compute_dtype} does not exist; known: {', '.join(map(str, DTYPES))}")
    quant.library()


def _targets(model: nn.Module, exclude: Sequence[str]) -> list[str]:
    modules = dict(model.named_modules())
    if adapted := [n for n, m in modules.items() if is_adapted(m)]:
        raise ValueError(f"{adapted[0]!r} holds adapters: quantise the model first, then inject")
    if done := [n for n, m in modules.items() if quant.kind(m)]:
        raise ValueError(f"the model is quantised already: {len(done)} layers, the first {done[0]!r}")
    kept = [k for m in modules.values() for k in getattr(m, "_keep_in_fp32_modules", None) or ()]
    heads = set(arch.heads(model))
    names = [
        n
        for n in arch.role(model, "all-linear")
        if isinstance(modules[n], nn.Linear)
        and not isinstance(modules[n.rpartition(".")[0]], nn.MultiheadAttention)
        and heads.isdisjoint((n, *arch.parents(n)))
        and not any(_covers(k, n) for k in kept)
    ]
    for pattern in exclude:
        left = [n for n in names if not _covers(pattern, n)]
        if len(left) == len(names):
            raise ValueError(f"exclude {pattern!r} leaves out nothing; nearest layer: {nearest(pattern, names)}")
        names = left
    if not names:
        raise ValueError(f"nothing to quantise: this {type(model).__name__} has no nn.Linear but heads and exclusions")
    return names


def _covers(pattern: str, name: str) -> bool:
    """True where ``pattern`` names the layer or a module around it."""
    return any(matches(n, pattern) for n in (name, *arch.parents(name)))


def _check_layers(model: nn.Module, names: Sequence[str], kind: str, blocksize: int) -> None:
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if layer.weight.is_meta:
            raise ValueError(f"{name!r} is on the meta device: load the weights first, then quantise")
        if type(layer).forward is not nn.Linear.forward or layer._forward_hooks or layer._forward_pre_hooks:
            what = "forward hooks" if type(layer).forward is nn.Linear.forward else "a forward of its own"
            raise ValueError(f"{name!r} has {what}, which quantising would lose: exclude=({name!r},)")
        if kind != "int8" and layer.weight.dtype not in DTYPES:
            raise ValueError(f"{name!r} is {layer.weight.dtype}: cast it to one of {', '.join(map(str, DTYPES))} first")
        if kind != "int8" and not quant.divides(layer, blocksize):
            raise ValueError(
                f"{name!r} has in_features={layer.in_features}, no multiple of blocksize={blocksize}, which "
                f"bitsandbytes needs on the CPU: exclude=({name!r},), another blocksize, kind='int8', or a GPU"
            )


def _quantized(layer: nn.Linear, kind: str, compute_dtype: torch.dtype, options: dict[str, Any]) -> nn.Module:
    bnb = quant.library()
    codes, state = quant.encode(layer.weight.detach(), kind, **options)
    shape = (layer.in_features, layer.out_features, layer.bias is not None)
    new: Any
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0, device="meta")
        new.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=state)
    else:
        new = bnb.nn.Linear4bit(*shape, compute_dtype, state.nested, kind, codes.dtype, device="meta")
        new.weight = bnb.nn.Params4bit(
            codes,
            requires_grad=False,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=kind,
            quant_storage=codes.dtype,
            bnb_quantized=True,
        )
        new.quant_state = state
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.to(compute_dtype)
    new.bias = layer.bias
    _equip(new)
    return new.train(layer.training)


def _equip(layer: Any) -> None:
    """Close the gaps listed at the top of this file."""
    quant.keep_layout(layer)
    layer.register_load_state_dict_pre_hook(_load)
    layer.register_forward_pre_hook(quant.bring_along)
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_no_cast_warning)


def _no_cast_warning(record: logging.LogRecord) -> bool:
    """int8 casts its inputs to float16 by design; bitsandbytes would log that at every call of every layer."""
    return "inputs will be cast" not in record.getMessage()


def _load(layer: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before loading: take the scales from the file, strict or not; torch copies the codes afterwards."""
    if quant.kind(layer) == "int8":
        if (scales := state_dict.pop(f"{prefix}SCB", None)) is not None:
            quant.bring_along(layer)
            quant.scales(layer).copy_(scales)
    elif saved := [k for k in state_dict if k.startswith(f"{prefix}weight.")]:
        names = {k.removeprefix(f"{prefix}weight."): state_dict.pop(k) for k in saved}
        state = quant.library().functional.QuantState.from_dict(names, layer.weight.device)
        layer.weight.quant_state = layer.quant_state = state
