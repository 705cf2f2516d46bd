"""Attention modules and MLPs of a model as names of layers and sizes: what masking and surgery need to know."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_peft import arch, hosts
from lightning_peft.attach import modules

_OUTPUT = ("o_proj", "out_proj", "o", "out_lin", "dense", "c_proj", "to_out.0", "output.dense")
_HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_DOWN = ("down_proj", "wo", "w2", "fc2", "c_proj", "linear2", "lin2", "fc_out")


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention module.

    Args:
        name: the module that runs the heads and holds their counters (BERT's ``attention.self``).
        q, k, v: names of the projections. Two that are the same name are one fused layer, whose outputs are the
            parts stacked in the order q, k, v (GPT-2's ``c_attn`` is all three).
        o: name of the output projection; its inputs are the heads side by side.
        heads, kv_heads: query heads; key and value heads, each serving heads / kv_heads query heads in a row.
        head_dim: width of one head.
    """

    name: str
    q: str
    k: str
    v: str
    o: str
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def units(self) -> int:
        """What can be cut: key-value heads with the query heads they serve, which is heads where there are as many."""
        return self.kv_heads

    @property
    def width(self) -> int:
        """Inputs of ``o`` that one unit stands for."""
        return self.heads // self.kv_heads * self.head_dim

    def outputs(self, part: str) -> range:
        """Outputs of its layer that are the part's, "q", "k" or "v": all of them, unless the layer is fused."""
        widths = {"q": self.heads * self.head_dim} | dict.fromkeys("kv", self.kv_heads * self.head_dim)
        before = [p for p in "qkv"["qkv".index(part) :: -1] if p != part and getattr(self, p) == getattr(self, part)]
        start = sum(widths[p] for p in before)
        return range(start, start + widths[part])


@dataclass(frozen=True, kw_only=True)
class MLP:
    """One two-layer MLP, gated or not.

    Args:
        name: the innermost module around its projections, which may be the whole block (BERT, OPT).
        rows: names of the projections whose outputs are the channels: gate and up, or one.
        down: name of the projection whose inputs they are.
        channels: how many.
    """

    name: str
    rows: tuple[str, ...]
    down: str
    channels: int

    @property
    def units(self) -> int:
        """What can be cut: channels."""
        return self.channels

    @property
    def width(self) -> int:
        """Inputs of ``down`` that one unit stands for."""
        return 1


def attentions(model: nn.Module) -> list[Attention]:
    """The attention modules made of query, key, value and output layers, in the model's order.

    Those built otherwise (nn.MultiheadAttention, latent attention, other fused layouts) are not among them.
    """
    named = dict(modules(model))
    found = (_attention(named, name) for name in named)
    return [part for part in found if part is not None]


def mlps(model: nn.Module) -> list[MLP]:
    """The MLPs in the model's blocks whose channels go from one or two layers straight into another, in order.

    A layer that holds gate and up in one (Phi-3) does not make one.
    """
    named, layers = dict(modules(model)), arch.role(model, "mlp")
    inside = arch.blocks(model)
    held = Counter(p for n in layers for p in arch.parents(n))
    groups: dict[str, list[str]] = {}
    for layer in layers:
        around = arch.parents(layer)
        block = next(i for i, p in enumerate(around) if p in inside)
        owner = next((p for p in around[: block + 1] if held[p] > 1), layer)
        groups.setdefault(owner, []).append(layer)
    found = (_mlp(named, owner, group) for owner, group in groups.items())
    return [part for part in found if part is not None]


@dataclass(frozen=True, kw_only=True)
class Side:
    """Where the units of an attention or an MLP lie in one of its layers.

    Args:
        layer: its name.
        kind: "v", "o", "up" or "down".
        axis: 0 where units are rows of the layer's (out, in) matrix, 1 where they are columns.
        units: how many: key-value heads with the query heads they serve, or channels.
        width: rows or columns of one unit.
        start: where the first one begins, in a fused layer.
        last: the layer that takes the units' values in, "o" or "down".
    """

    layer: str
    kind: str
    axis: int
    units: int
    width: int
    start: int
    last: str

    def index(self, units: Tensor) -> Tensor:
        """Rows or columns of these units (n,), in their order: (n * width,)."""
        return (self.start + units[:, None] * self.width + torch.arange(self.width, device=units.device)).flatten()

    def norms(self, matrix: Tensor) -> Tensor:
        """(units,) L2 norm of each unit's rows or columns of an (out, in) matrix."""
        lengths = matrix.norm(dim=1 - self.axis)[self.start : self.start + self.units * self.width]
        return lengths.view(self.units, self.width).norm(dim=1)


def sides(model: nn.Module) -> list[Side]:
    """Both sides of every attention (``v``, ``o``) and every MLP (``up``, which is no gate, and ``down``)."""
    found = []
    for a in attentions(model):
        sizes = {"units": a.units, "last": a.o}
        found.append(Side(layer=a.v, kind="v", axis=0, width=a.head_dim, start=a.outputs("v").start, **sizes))
        found.append(Side(layer=a.o, kind="o", axis=1, width=a.width, start=0, **sizes))
    for m in mlps(model):
        sizes = {"units": m.units, "width": 1, "start": 0, "last": m.down}
        up = [r for r in m.rows if "gate" not in r.rpartition(".")[2]][-1]  # wi_0, wi_1 and w1, w3: the gate is first
        found.append(Side(layer=up, kind="up", axis=0, **sizes))
        found.append(Side(layer=m.down, kind="down", axis=1, **sizes))
    return found


def _join(*names: str) -> str:
    return ".".join(n for n in names if n)


def _size(module: nn.Module, names: tuple[str, ...]) -> int | None:
    return next((v for n in names if isinstance(v := getattr(module, n, None), int)), None)


def _attention(named: dict[str, nn.Module], name: str) -> Attention | None:
    qkv = next((q for q in arch.QKV if all(_layer(named, _join(name, n)) for n in q)), None)
    if qkv is None:
        return None
    q, k, v = (_join(name, n) for n in qkv)
    around = name.rpartition(".")[0]
    places = [*(_join(name, o) for o in _OUTPUT), _join(around, "output.dense")]
    o = next((o for o in places if _layer(named, o)), None)
    if o is None or (q == k and not hosts.is_conv1d(named[q])):  # an nn.Linear c_attn has another layout (GPTBigCode)
        return None
    q_out, k_out, v_out = (hosts.shape(named[n])[0] // (q, k, v).count(n) for n in (q, k, v))
    heads, head_dim = _size(named[name], _HEADS), _size(named[name], _HEAD_DIM)
    head_dim = head_dim or (q_out // heads if heads else 0)
    if not head_dim or q_out % head_dim or k_out % head_dim or k_out != v_out or q_out % k_out:
        return None
    if hosts.shape(named[o])[1] != q_out or heads not in (None, q_out // head_dim):
        return None
    return Attention(
        name=name, q=q, k=k, v=v, o=o, heads=q_out // head_dim, kv_heads=k_out // head_dim, head_dim=head_dim
    )


def _layer(named: dict[str, nn.Module], name: str) -> bool:
    return name in named and arch.is_linear(named[name])


def _mlp(named: dict[str, nn.Module], owner: str, layers: list[str]) -> MLP | None:
    if len(layers) not in (2, 3):
        return None
    downs = [d for d in layers if _fits([hosts.shape(named[n]) for n in layers if n != d], hosts.shape(named[d]))]
    if len(downs) > 1:  # square layers: shapes do not tell which comes last
        by_name = [d for d in downs if d.rpartition(".")[2] in _DOWN]
        downs = by_name or (layers[-1:] if len(layers) == 2 else [])
    if len(downs) != 1:
        return None
    rows = tuple(n for n in layers if n != downs[0])
    return MLP(name=owner, rows=rows, down=downs[0], channels=hosts.shape(named[downs[0]])[1])


def _fits(rows: list[tuple[int, int]], down: tuple[int, int]) -> bool:
    """Every row layer is (channels, hidden), the last is (hidden, channels)."""
    return all(row == (down[1], down[0]) for row in rows)
