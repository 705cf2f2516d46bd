"""AdaLink: a low-rank residual map on the input embeddings of each modality. Wang et al. 2023, arXiv:2310.12100."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Adapter, Base, Method, Traits, WeightAdapter, attach, find, hosts
from lightning_peft.attach import accepts, by_name, modules
from lightning_peft.find import nearest

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda x: x, "gelu": F.gelu, "relu": F.relu}


class Link(Adapter):
    """``e + scale * U f(D e)`` of what a layer returns; down is D (r, hidden), up is U (hidden, r)."""

    axes = {"down": ("rank", "out"), "up": ("out", "rank")}

    def __init__(self, host: Any, method: "AdaLink") -> None:
        super().__init__()
        hidden = hosts.shape(host)[0]
        self.down = nn.Parameter(torch.empty(method.r, hidden))
        self.up = nn.Parameter(torch.empty(hidden, method.r))
        self.scale, self.activation, self.dropout = method.scale, method.activation, method.dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.zeros_(self.up)  # so training starts from the base model

    def link(self, e: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden)."""
        h = F.linear(F.dropout(e, self.dropout, self.training), self.down.to(e.dtype))  # (..., r)
        return e + F.linear(ACTIVATIONS[self.activation](h) * self.scale, self.up.to(h.dtype)).to(e.dtype)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return self.link(base(x))


class TableLink(Link, WeightAdapter):
    """On an embedding: each row of the table is mapped alone, so it merges whatever f is."""

    def __init__(self, host: Any, method: "AdaLink") -> None:
        super().__init__(host, method)
        linear = method.activation == "identity"  # which commutes with the factor that some embeddings return rows by
        self.factor = 1.0 if linear else float(hosts.output_scale(host))

    def weight(self, W: Tensor) -> Tensor:
        h = ACTIVATIONS[self.activation](self.down @ (self.factor * W))  # (r, tokens)
        return W + self.scale / self.factor * self.up @ h


class LinearLink(Link, WeightAdapter):
    """On a linear layer, such as the last one of a projector: (I + scale * U D) (W x + b)."""

    def weight(self, W: Tensor) -> Tensor:
        return W + self.scale * self.up @ (self.down @ W)

    def bias(self, b: Tensor) -> Tensor:
        return b + self.scale * self.up @ (self.down @ b)


class GivenLink(Adapter):
    """On the transformer: the same map on embeddings that the caller gives as ``inputs_embeds``."""

    def __init__(self, host: Any, link: Link) -> None:
        super().__init__()
        self.of = (link,)  # in a tuple, since its tensors are registered where it is attached
        self.names = accepts(host)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        call = by_name(self.names, args, kwargs)
        if call.get("inputs_embeds") is not None:
            call["inputs_embeds"] = self.of[0].link(call["inputs_embeds"])
        return base(**call)


@dataclass(frozen=True, kw_only=True)
class AdaLink(Method):
    """e + scale * U f(D e) for every token's embedding e; nothing inside the transformer changes. U starts at zero.

    It sits on the layer that makes the embeddings, in front of positions and norms: the token embedding, of an
    encoder-decoder model the encoder's. So it acts in ``generate``, and on ``inputs_embeds`` that were made by
    ``model.get_input_embeddings()``. Gradients pass the whole frozen model on their way to it.

    Args:
        r: rows of D.
        activation: f, "identity", "gelu" or "relu"; the identity can merge anywhere, the others on an embedding.
        scale: factor on what is added.
        dropout: probability on what D reads.
        modalities: name -> name or pattern of the one layer that makes that modality's embeddings, such as
            {"text": "*.embed_tokens", "image": "*.multi_modal_projector.linear_2"}; the token embedding when empty.
        shared: one map for all modalities instead of one each.
        decoder_input: also on the decoder's token embedding, with a map of its own.
        inputs_embeds: also map embeddings given as ``inputs_embeds``, which must then be the base's own or come from
            elsewhere: those that the adapted embedding layer made are mapped already. It cannot merge.
    """

    traits = Traits(
        family="additive",
        paper="Wang et al. 2023, arXiv:2310.12100",
        parameters="2 * r * hidden a modality",
        hosts=("embedding", "linear"),
        merge=True,
    )
    name: str = "adalink"
    r: int = 64
    activation: str = "identity"
    scale: float = 1.0
    dropout: float = 0.0
    modalities: dict[str, str] = field(default_factory=dict)
    shared: bool = False
    decoder_input: bool = False
    inputs_embeds: bool = False

    def __post_init__(self) -> None:
        by, m = self.name, self
        if m.r < 1 or not m.scale > 0 or not 0 <= m.dropout < 1:
            got = f"{m.r}, {m.scale} and {m.dropout}"
            raise ValueError(f"{by}: r is at least 1, scale positive and dropout a probability below 1, got {got}")
        if m.activation not in ACTIVATIONS:
            near = nearest(m.activation, ACTIVATIONS)
            raise ValueError(f"{by}: activation {m.activation!r} is none of {list(ACTIVATIONS)}; nearest: {near}")
        if m.shared and len(m.modalities) < 2:
            raise ValueError(f"{by}: shared has no effect with less than two modalities, got {len(m.modalities)}")
        if m.modalities and (m.decoder_input or m.inputs_embeds):
            raise ValueError(f"{by}: modalities say where, so decoder_input and inputs_embeds have no effect")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        links: list[Link] = []
        for host, around in self._named(model) if self.modalities else self._text(model):
            maps = hosts.kind(host) == "embedding" or self.activation == "identity"
            link = (TableLink if hosts.kind(host) == "embedding" else LinearLink if maps else Link)(host, self)
            if self.shared and links:
                if links[0].down.shape != link.down.shape:
                    widths = [x.down.shape[1] for x in (links[0], link)]
                    raise ValueError(f"{self.name}: shared needs modalities of one width, got {widths}")
                link.down, link.up = links[0].down, links[0].up
            links.append(link)
            attach(host, self.name, link)
            if self.inputs_embeds:
                attach(around, self.name, GivenLink(around, link))

    def _named(self, model: nn.Module) -> Iterator[tuple[Any, None]]:
        taken: dict[str, str] = {}
        for modality, pattern in self.modalities.items():
            found = [n for n, _ in find(model, (pattern,), self.traits.hosts)]
            if len(found) > 1 or found[0] in taken:
                what = f"names {found[:3]}" if len(found) > 1 else f"is the layer of {taken[found[0]]!r}"
                raise ValueError(f"{self.name}: {pattern!r} of {modality!r} {what}; each has one layer of its own")
            taken[found[0]] = modality
            yield model.get_submodule(found[0]), None

    def _text(self, model: nn.Module) -> Iterator[tuple[Any, Any]]:
        """(token embedding, the innermost module that takes inputs_embeds for it), of the stacks that read text."""
        named: list[tuple[str, Any]] = [(n, m) for n, m in modules(model) if hasattr(m, "get_input_embeddings")]
        outer = [(n, m) for n, m in named if not any(n != o and f"{n}.".startswith(o and f"{o}.") for o, _ in named)]
        if len(outer) != 1:
            names = [n for n, _ in outer]
            raise ValueError(f"{self.name}: one model that reads text is needed, found {names}; give modalities")
        top = outer[0][1]
        pair = getattr(getattr(top, "config", None), "is_encoder_decoder", False)
        if self.decoder_input and not pair:
            raise ValueError(
                f"{self.name}: decoder_input has no effect, {type(top).__name__} has no encoder before one"
            )
        stacks = [top.get_encoder(), top.get_decoder()] if pair else [top]
        tables = [s.get_input_embeddings() for s in stacks]
        if any(hosts.kind(t) != "embedding" for t in tables) or len({id(t) for t in tables}) < len(tables):
            what = [type(t).__name__ for t in tables]
            raise ValueError(f"{self.name}: a token embedding of its own is needed, found {what}; give modalities")
        for table in tables[: 1 + self.decoder_input]:
            takes = [m for _, m in named if m.get_input_embeddings() is table and "inputs_embeds" in accepts(m)]
            yield table, takes[-1] if takes else top
