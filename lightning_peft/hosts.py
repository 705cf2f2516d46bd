"""The layers an adapter can sit on, their weight seen as one (out, in) matrix whatever the layer stores.

Linear stores (out, in); transformers' Conv1D and Embedding store (in, out); a convolution stores
(out, in / groups, *kernel) and is seen as (out, in / groups * prod(kernel)). A method that is written for the matrix
therefore works on every host. Hosts are typed Any: torch types a module's attributes as Tensor or Module.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import quant

Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_conv1d(host: Any) -> bool:
    """True for transformers' Conv1D (GPT-2), a linear layer with its weight stored (in, out)."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(host).__mro__)


def kind(host: Any) -> str | None:
    """One of "linear", "conv1d" (transformers'), "embedding", "conv"; None where there is no weight we can adapt."""
    if isinstance(host, nn.Linear):
        return "linear"
    if is_conv1d(host):
        return "conv1d"
    if isinstance(host, nn.Embedding):
        return "embedding"
    return "conv" if isinstance(host, Conv) else None


def _transposed(host: Any) -> bool:
    return kind(host) in ("conv1d", "embedding")


def runs_plainly(cls: type[nn.Module]) -> bool:
    """True where the forward of a host's class is the one of torch or transformers, so that ``run`` stands for it."""
    plain = {c.forward for c in (nn.Linear, nn.Embedding, *Conv)}
    return cls.forward in plain or cls.__module__ == "transformers.pytorch_utils"


def stored(host: Any, name: str = "weight") -> Any:
    """The weight or bias that a host stores, which its attribute may not be (``attach.show``); None without one."""
    return host._parameters[name] if name in host._parameters else getattr(host, name, None)


def no_bias(host: Any) -> Tensor:
    """The bias (out,) of zeros that a host without one as good as has."""
    weight = stored(host)
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    return torch.zeros(shape(host)[0], dtype=dtype, device=weight.device)


def shape(host: Any) -> tuple[int, int]:
    """(out, in) of the weight as a matrix, right for quantised layers too, whose stored shape says nothing."""
    if isinstance(host, nn.Linear):
        return host.out_features, host.in_features
    out, fan_in = as_matrix(host, stored(host)).shape
    return out, fan_in


def as_matrix(host: Any, weight: Tensor) -> Tensor:
    """What has the shape of the stored weight, such as its gradient, as an (out, in) matrix; a view."""
    return weight.T if _transposed(host) else weight.flatten(1) if isinstance(host, Conv) else weight


def to_stored(host: Any, matrix: Tensor) -> Tensor:
    """An (out, in) matrix in the shape of the stored weight; a view."""
    return matrix.T if _transposed(host) else matrix.view_as(stored(host)) if isinstance(host, Conv) else matrix


def read(host: Any) -> Tensor:
    """The weight as an (out, in) matrix, dequantised; a view of the stored one where that is possible."""
    return as_matrix(host, quant.dequantize(host) if quant.kind(host) else stored(host))


def write(host: Any, matrix: Tensor) -> None:
    """Write an (out, in) matrix into the host's stored weight, cast once. Only merge and its undoing call this."""
    with torch.no_grad():
        if quant.kind(host):
            quant.requantize(host, matrix)
        else:
            stored(host).copy_(to_stored(host, matrix))


def output_scale(host: Any) -> float | Tensor:
    """Factor the host multiplies its look-up with (scaled word embeddings of Gemma 3, BART): 1 where there is none."""
    return getattr(host, "embed_scale", 1.0) if isinstance(host, nn.Embedding) else 1.0


def run(host: Any, matrix: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The host's own map with another (out, in) weight matrix; stride, padding and the like stay the host's.

    ``bias`` (out,) takes the place of the host's; None leaves the host's own, or none where it has none.
    """
    if isinstance(host, nn.Embedding):
        rows = F.embedding(
            x,
            to_stored(host, matrix.to(stored(host).dtype)),
            host.padding_idx,
            scale_grad_by_freq=host.scale_grad_by_freq,
        )  # not host.sparse: a sparse gradient cannot pass the transposition
        return rows * output_scale(host)
    matrix, bias = matrix.to(x.dtype), stored(host, "bias") if bias is None else bias
    bias = bias if bias is None else bias.to(x.dtype)
    if isinstance(host, Conv):
        return host._conv_forward(x, to_stored(host, matrix), bias)  # private, but the one that honours padding_mode
    return F.linear(x, matrix, bias)


def fan_in(host: Any) -> int:
    """Inputs that reach one output, the bound of Kaiming's initialisation."""
    return shape(host)[1]


def logical_numel(parameter: nn.Parameter, host: Any = None) -> int:
    """Number of weights a parameter stands for: two per stored byte for a 4-bit weight."""
    if host is not None and quant.kind(host) and parameter is stored(host):
        return math.prod(shape(host))
    return parameter.numel()
