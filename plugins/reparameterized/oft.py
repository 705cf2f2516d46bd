"""OFT: blocks of rotations on each layer's input. Qiu et al. 2023, arXiv:2306.07280."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning_peft_plugins.reparameterized import dense, orthogonal
from torch import Tensor, nn

from lightning_peft import Base, Method, Step, Traits, WeightAdapter, attach, find, hf, hosts

# In peft module_dropout changes nothing, whatever it is.
HF_FIELDS = ("r", "oft_block_size", "block_share", "coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms",
             "module_dropout", "fan_in_fan_out", "init_weights")  # fmt: skip
NEUMANN_SINCE = (0, 18)  # version of peft from which on it computes its series as below


class OFTLinear(WeightAdapter):
    """``y = base(R^T x)``, R = (I - Q)(I + Q)^-1 in blocks (b, b), of which Q (blocks, b (b - 1) / 2) has the entries
    of a skew-symmetric matrix above its diagonal, row by row.

    No ``axes``: a block mixes its inputs, so channels cannot be cut out of the layer.
    """

    def __init__(self, width: int, b: int, method: "OFT") -> None:
        super().__init__()
        self.b, self.neumann, self.eps = b, method.neumann, method.eps
        self.Q = nn.Parameter(torch.empty(1 if method.share else width // b, b * (b - 1) // 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.Q)  # so training starts from the base model

    @torch.no_grad()
    def bounded(self) -> Tensor:
        """Q, with blocks beyond Frobenius norm eps / sqrt(blocks) drawn back to it."""
        assert self.eps is not None
        norm = math.sqrt(2) * torch.linalg.vector_norm(self.Q, dim=1, keepdim=True)  # each entry stands twice
        return self.Q * (self.eps / math.sqrt(len(self.Q)) / norm).clamp(max=1)

    def rotation(self) -> Tensor:
        """R - I, (blocks, b, b), or (1, b, b) for one block that all share."""
        Q = self.Q if self.eps is None else self.Q + (self.bounded() - self.Q.detach())
        rows, columns = torch.triu_indices(self.b, self.b, 1, device=Q.device)
        upper = Q.new_zeros(len(Q), self.b**2).index_copy(1, rows * self.b + columns, Q).unflatten(1, (self.b, self.b))
        skew = upper - upper.mT
        return orthogonal.series(skew, self.neumann) if self.neumann else orthogonal.cayley(skew)

    def weight(self, W: Tensor) -> Tensor:
        return W + orthogonal.blockwise(orthogonal.widen(W, self.Q), self.rotation().mT)  # W R^T

    def forward(self, base: Base, x: Tensor) -> Tensor:  # the same map, rotating the input instead of the weight
        return base(orthogonal.blockwise(x, orthogonal.with_identity(self.rotation())).to(x.dtype))


class OFTEmbedding(OFTLinear):
    """Rotates the vectors that are looked up: E R, here R^T W of the (dimension, vocabulary) matrix."""

    def weight(self, W: Tensor) -> Tensor:
        return W + orthogonal.blockwise(orthogonal.widen(W, self.Q).T, self.rotation()).T

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y = base(x)
        return orthogonal.blockwise(y, orthogonal.with_identity(self.rotation())).to(y.dtype)


class OFTConv(OFTLinear):
    """Rotates patches (in / groups * kernel), which overlap, so the kernel is rotated in their place."""

    def forward(self, base: Base, x: Tensor) -> Tensor:
        back = self.rotation().mT  # once, whereas dense builds the product again for backward
        return dense.forward(base, lambda: orthogonal.blockwise(orthogonal.widen(base.weight, self.Q), back), x)


@dataclass(frozen=True, kw_only=True)
class OFT(Method):
    """W R^T on every target, R a rotation in blocks along the diagonal, exactly orthogonal.

    Args:
        block_size: side of a block, or its divisor of the layer's inputs that lies nearest.
        blocks: number of blocks in every layer in place of their size; the other of the two is 0.
        share: one block for all of a layer's.
        neumann: 0 for exact rotations. 4 or more: terms of a series in place of the inverse, which is peft's default
            (5) and no rotation: entries of 0.1 in blocks of 8 put R R^T off by 3 %, and Q's sign means the other way.
        eps: bound on the rotation (COFT): after every step each block of Q is drawn back to norm eps / sqrt(blocks).
            None for no bound; peft's default is 6e-5.
        targets: names, patterns or roles of the layers to adapt; embeddings and convolutions by name.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="reparameterized",
        paper="Qiu et al. 2023, arXiv:2306.07280",
        parameters="in * (block_size - 1) / 2 a layer, in = channels / groups * kernel for a conv",
        hosts=("linear", "conv1d", "embedding", "conv"),
        merge=True,
        quantized=True,
        hf="OFT",
    )
    name: str = "oft"
    block_size: int = 32
    blocks: int = 0
    share: bool = False
    neumann: int = 0
    eps: float | None = None
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""

    def __post_init__(self) -> None:
        orthogonal.check_blocks(self)
        if self.neumann and self.neumann < 4:
            raise ValueError(f"OFT's neumann must be 0 (exact) or at least 4 terms, got {self.neumann}")
        if self.eps is not None and self.eps <= 0:
            raise ValueError(f"OFT's eps must be positive, or None for no bound, got {self.eps}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        kinds = {"embedding": OFTEmbedding, "conv": OFTConv}
        for name, host in find(model, self.targets, self.traits.hosts, exclude=self.exclude, layers=self.layers):
            kind, (out, fan_in) = hosts.kind(host) or "", hosts.shape(host)
            width = out if kind == "embedding" else fan_in
            wanted = orthogonal.nearest_divisor(name, width, self.block_size or self.blocks)
            b = wanted if self.block_size else width // wanted
            if b < 2:
                raise ValueError(f"{name}: blocks of side 1 of its {width} inputs have nothing to rotate; exclude it")
            if kind == "embedding" and host.max_norm is not None:
                raise ValueError(f"{name}: an embedding with max_norm rescales its rows; OFT cannot adapt it")
            attach(host, self.name, kinds.get(kind, OFTLinear)(width, b, self))

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: Step) -> None:
        if self.eps is not None:
            held: list[Any] = [a for _, _, a in self.adapters(model)]
            for a in held:
                a.Q.copy_(a.bounded())

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        held = orthogonal.in_peft(self, model)
        for name, (host, _) in held.items():
            if hosts.kind(host) == "conv" and (host.groups > 1 or {*host.kernel_size, *host.dilation} != {1}):
                raise ValueError(f"{name}: huggingface/peft computes something else for a convolution with a kernel "
                                 "beyond 1x1, or with groups")  # fmt: skip
        fields = {"r": self.blocks, "oft_block_size": self.block_size, "block_share": self.share, "bias": "none",
                  "coft": self.eps is not None, "eps": 6e-5 if self.eps is None else self.eps,
                  "use_cayley_neumann": self.neumann > 0, "num_cayley_neumann_terms": self.neumann or 5,
                  "peft_version": ".".join(map(str, NEUMANN_SINCE)) + ".0"}  # fmt: skip
        fields |= {"target_modules": hf.target_modules(model, held)}
        key = {True: "oft_embedding_R.weight", False: "oft_R.weight"}
        return fields, {f"{hf.PREFIX}{n}.{key[isinstance(a, OFTEmbedding)]}": a.Q for n, (_, a) in held.items()}

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "OFT":
        hf.check_fields(config, HF_FIELDS, "oft")
        series, terms = config.get("use_cayley_neumann", True), config.get("num_cayley_neumann_terms", 5)
        version = config.get("peft_version") or "0.0"
        if series and (terms < 3 or tuple(map(int, version.split(".")[:2])) < NEUMANN_SINCE):
            raise ValueError(f"adapter_config.json has use_cayley_neumann with {terms} terms, by peft {version}: 'oft' "
                             "computes the series of peft 0.18 and later, from 3 terms on")  # fmt: skip
        return cls(
            block_size=config.get("oft_block_size", 32),
            blocks=config.get("r", 0),
            share=config.get("block_share", False),
            neumann=max(terms, 4) if series else 0,  # peft's 3 terms are the same as its 4
            eps=config.get("eps", 6e-5) if config.get("coft") else None,
            targets=hf.targets(model, orthogonal.from_peft(tensors, model, "oft_R.weight", "oft_embedding_R.weight")),
        )
