"""TeRA: frozen random tensors that layers share, scaled by small trained vectors to updates of full rank.

Gu, Zhou, Iacovides, Mandic 2025, arXiv:2509.03234 (ACL 2026). Inferred, for the paper's appendix was not at hand: the
distribution of the frozen tensors and their scale, sharing by shape, how sizes that are no power of a mode's are split.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_peft_plugins.reparameterized import dense
from lightning_peft_plugins.reparameterized.projections import Projections, generator, uniform
from torch import Tensor, nn

from lightning_peft import Base, Method, Traits, WeightAdapter, attach, find, hosts, matches

Modes = tuple[int, ...]


class Network(Projections):
    """The frozen part for one shape: core G (Q_out, Q_in) and a factor A_n (R_n, I_n) for each mode, uniform draws.

    Args:
        out, fan_in: sizes I_n of the modes that the two sides of the weight are split into, row-major.
        method: says the ranks R_n, the factors and the seed. Q is the product of a side's ranks.
    """

    def __init__(self, out: Modes, fan_in: Modes, method: "TeRA") -> None:
        self.sizes, self.split = (*out, *fan_in), len(out)
        self.ranks = tuple(min(size, method.max_rank or size) for size in self.sizes)
        q_out, q_in = math.prod(self.ranks[: self.split]), math.prod(self.ranks[self.split :])
        source = generator(method.seed)
        drawn = {"G": uniform((q_out, q_in), (3 / q_in) ** 0.5, source)}  # of variance 1 / Q_in
        for n, (r, size) in enumerate(zip(self.ranks, self.sizes, strict=True), 1):
            eye = method.factors == "identity"
            drawn[f"A{n}"] = (
                torch.eye(r, size, dtype=torch.float32, device="cpu")
                if eye
                else uniform((r, size), (3 / r) ** 0.5, source)
            )
        super().__init__(**drawn)
        ones = [torch.ones(r, device="cpu") for r in self.ranks]
        # Products of small random matrices differ in size by a factor of several from seed to seed.
        self.gain = math.prod(out) ** 0.5 / float(self.matrix(ones).norm())

    def sides(self, d: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Kronecker products (Q_out,), (Q_in,) of the vectors of either side."""
        out, fan_in = (functools.reduce(_kron, part) for part in (d[: self.split], d[self.split :]))
        return out, fan_in

    def factors(self, like: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """G and the factors of the out and in modes, on the device and in the precision of ``like``."""
        A = [self.on(f"A{n}", like) for n in range(1, len(self.ranks) + 1)]
        return self.on("G", like), A[: self.split], A[self.split :]

    def matrix(self, d: Sequence[Tensor]) -> Tensor:
        """A_out^T diag(s_out) G diag(s_in) A_in (out, in), without the gain."""
        (G, A_out, A_in), (s_out, s_in) = self.factors(d[0]), self.sides(d)
        half = _along((s_out[:, None] * G * s_in).unflatten(1, self.ranks[self.split :]), [A.mT for A in A_in])
        return _along(half.mT.unflatten(1, self.ranks[: self.split]), [A.mT for A in A_out]).mT

    def apply(self, x: Tensor, s_out: Tensor, s_in: Tensor) -> Tensor:
        """The same matrix on rows x (tokens, in), never built: (tokens, out)."""
        G, A_out, A_in = self.factors(x)
        h = _along(x.unflatten(1, self.sizes[self.split :]), A_in) * s_in.to(x.dtype)  # (tokens, Q_in)
        h = (h @ G.mT) * s_out.to(x.dtype)
        return _along(h.unflatten(1, self.ranks[: self.split]), [A.mT for A in A_out])


def _kron(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None] * b).flatten()


def _along(h: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """(rows, j_1, j_2, ...) with a matrix (k_n, j_n) for each mode -> (rows, k_1 * k_2 * ...)."""
    for M in matrices:
        h = h.movedim(1, -1) @ M.mT  # every mode comes to the front once, so the order is the old one at the end
    return h.flatten(1)


class TeRALinear(WeightAdapter):
    """``W + scale * gain * T`` with T the network of the shared tensors and this layer's d1, d2, ... (R_n,).

    The vectors stand between core and factors. No ``axes``: what the tensors hold follows positions.
    """

    checksum: Tensor
    gain: Tensor

    def __init__(self, shared: Network, zero: int, scale: float) -> None:
        super().__init__()
        for n, r in enumerate(shared.ranks, 1):
            self.register_parameter(f"d{n}", nn.Parameter(torch.empty(r)))
        self.register_buffer("checksum", torch.empty((), dtype=torch.long))
        self.register_buffer("gain", torch.empty(()))  # in the file: machines may sum a norm in another order
        self.shared, self.zero, self.scale = shared, zero, scale
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for n, d in enumerate(self.vectors(), 1):
            nn.init.constant_(d, float(n != self.zero))  # one zero starts from the base; with two nothing would train
        self.checksum.fill_(self.shared.checksum)
        self.gain.fill_(self.shared.gain)

    def vectors(self) -> list[Tensor]:
        return [self.get_parameter(f"d{n}") for n in range(1, len(self.shared.ranks) + 1)]

    def change(self) -> Tensor:
        """The update (out, in)."""
        return self.scale * self.gain * self.shared.matrix(self.vectors())

    def weight(self, W: Tensor) -> Tensor:
        return W + self.change()

    def forward(self, base: Base, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
        if len(rows) > max(hosts.shape(base.host)):  # from there on building the matrix costs less
            return dense.forward(base, self.change, x)
        y = base(x)
        s_out, s_in = self.shared.sides(self.vectors())
        return y + self.shared.apply(rows, self.scale * self.gain * s_out, s_in).view(y.shape).to(y.dtype)

    def check_state(self, state: dict[str, Tensor]) -> None:
        self.shared.check_state(state, "TeRA")


def _splits(n: int, parts: int, least: int = 2) -> Iterator[Modes]:
    """All ways to write n as a product of ``parts`` factors of at least ``least``, ascending."""
    if parts == 1:
        yield (n,)
        return
    for f in range(least, n):
        if f**parts > n:
            return
        if n % f == 0:
            yield from ((f, *rest) for rest in _splits(n // f, parts - 1, f))


@functools.cache
def modes(n: int, size: int) -> Modes:
    """n in factors near ``size`` as even as there are, larger ones first: 4096 is (8, 8, 8, 8); a prime is whole."""
    for parts in range(max(2, round(math.log(n, size))), 1, -1):
        if found := list(_splits(n, parts)):
            return min(found, key=sum)[::-1]
    return (n,)


@dataclass(frozen=True, kw_only=True)
class TeRA(Method):
    """W + a random tensor network whose only trained numbers are one short vector for each mode.

    The weight's one side is split into small modes, the other stays whole. The core and the factors are random, frozen
    and the same for all layers of one shape; they are drawn from the seed again when a file is loaded, and a checksum
    in it says whether they are the same. Few parameters at the price of time: training costs about three times the
    layer. The learning rate is far above LoRA's (1e-2 is ours; the paper's was not at hand). The paper adapts queries
    and values.

    Args:
        whole_side: that is not split, "in", "out", "min" (the smaller one) or "none", with which far fewer numbers
            train and quality falls (paper). A prime side stays whole and the other is split.
        mode_size: size that the modes should have.
        tensor_shapes: pattern -> sizes of all modes of the layers it names, those of the out side first.
        max_rank: of a mode; None is the size of the mode, as in the paper, with which the update can have full rank.
        zero_mode: number of the mode whose vector starts at zero, the others at one; None is the whole one.
        factors: "random", or "identity" (the paper's ablation, worse).
        scale: of the update; 1 in the paper.
        seed: of the frozen tensors.
        targets: names, patterns or roles of the layers to adapt.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="reparameterized",
        paper="Gu, Zhou, Iacovides, Mandic 2025, arXiv:2509.03234",
        parameters="sum of the modes' ranks a layer",
        hosts=("linear", "conv1d"),
        merge=True,
        quantized=True,
    )
    name: str = "tera"
    whole_side: str = "in"
    mode_size: int = 8
    tensor_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    max_rank: int | None = None
    zero_mode: int | None = None
    factors: str = "random"
    scale: float = 1.0
    seed: int = 0
    targets: tuple[str, ...] = ("attention",)
    exclude: tuple[str, ...] = ()
    layers: str = ""

    def __post_init__(self) -> None:
        for option, known in (("whole_side", ("in", "out", "min", "none")), ("factors", ("random", "identity"))):
            if (given := getattr(self, option)) not in known:
                raise ValueError(f"TeRA's {option} must be one of {', '.join(known)}; got {given!r}")
        for option, least in (("mode_size", 2), ("max_rank", 1), ("zero_mode", 1)):
            if (given := getattr(self, option)) is not None and given < least:
                raise ValueError(f"TeRA's {option} must be at least {least}, got {given}")
        if self.scale <= 0:
            raise ValueError(f"TeRA's scale must be positive, got {self.scale}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        targets = find(model, self.targets, self.traits.hosts, exclude=self.exclude, layers=self.layers)
        for pattern in self.tensor_shapes:
            if not any(matches(name, pattern) for name, _ in targets):
                raise ValueError(f"tensor_shapes pattern {pattern!r} matches none of the {len(targets)} target layers")
        drawn: dict[tuple[Modes, Modes], Network] = {}
        for name, host in targets:
            out, fan_in = self._modes(name, host)
            if (out, fan_in) not in drawn:
                drawn[out, fan_in] = Network(out, fan_in, self)
            count, default = len(out) + len(fan_in), 1 if len(out) == 1 or len(fan_in) > 1 else len(out) + 1
            if (self.zero_mode or default) > count:
                raise ValueError(f"{name}: zero_mode={self.zero_mode}, but its modes are {(*out, *fan_in)}")
            attach(host, self.name, TeRALinear(drawn[out, fan_in], self.zero_mode or default, self.scale))

    def _modes(self, name: str, host: Any) -> tuple[Modes, Modes]:
        out, fan_in = hosts.shape(host)
        given = next((tuple(s) for p, s in self.tensor_shapes.items() if matches(name, p)), None)
        if given is not None:
            cuts = [i for i in range(1, len(given)) if math.prod(given[:i]) == out and math.prod(given[i:]) == fan_in]
            if not cuts or min(given) < 2:
                raise ValueError(f"{name}: the tensor shape {given} does not split its ({out}, {fan_in}) weight")
            return given[: cuts[0]], given[cuts[0] :]
        split = modes(out, self.mode_size), modes(fan_in, self.mode_size)
        whole = ("out" if out < fan_in else "in") if self.whole_side == "min" else self.whole_side
        if whole == "in" and len(split[0]) > 1 or whole == "out" and len(split[1]) == 1:
            return split[0], (fan_in,)
        return ((out,), split[1]) if whole != "none" else split
