"""FourierFT: a few trained coefficients of the weight change's Fourier transform. Gao et al. 2024, arXiv:2405.03003."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_peft_plugins.reparameterized import dense
from torch import Tensor, nn

from lightning_peft import Base, Method, Traits, WeightAdapter, attach, find, hf, hosts, matches

HF_FIELDS = {"n": "n_frequency", "scale": "scaling", "seed": "random_loc_seed"}


@functools.lru_cache(maxsize=64)  # layers of one shape have the same places, and drawing them is slow
def draw(n: int, out: int, fan_in: int, seed: int) -> Tensor:
    """(2, n) rows and columns in the spectrum (out, in), without repetition; peft draws the same from a seed."""
    places = torch.randperm(out * fan_in, generator=torch.Generator().manual_seed(seed), device="cpu")[:n]
    return torch.stack([places // fan_in, places % fan_in]).int()


class FourierFTLinear(WeightAdapter):
    """``y = base(x) + scale * Re(ifft2(F)) x``, F (out, in) zero but for c at ``places``; Linear and Conv1D.

    The places are in the file with c, so that another torch, which may draw others, loads them right. No ``axes``:
    every coefficient changes the whole matrix, so channels cannot be cut out of the layer.
    """

    places: Tensor

    def __init__(self, host: Any, n: int, scale: float, seed: int) -> None:
        super().__init__()
        self.size, self.scale, self.seed = hosts.shape(host), scale, seed
        self.c = nn.Parameter(torch.empty(n))
        self.register_buffer("places", torch.empty(2, n, dtype=torch.int32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.c)  # so training starts from the base model; the paper draws from N(0, 1)
        self.places.copy_(self.drawn())

    def drawn(self) -> Tensor:
        return draw(len(self.c), *self.size, self.seed)

    def change(self) -> Tensor:
        """By the inverse transform of real matrices, which takes the left half of a spectrum that mirrors itself.

        The real part halves each coefficient between (u, v) and (-u, -v); one of the two lies in the left half, on its
        edges both.
        """
        out, fan_in = self.size
        u, v = self.places.long()
        right = 2 * v > fan_in
        u, v, width = torch.where(right, -u, u) % out, torch.where(right, fan_in - v, v), fan_in // 2 + 1
        both = (v == 0) | (2 * v == fan_in)
        half = self.c.to(torch.promote_types(self.c.dtype, torch.float32)) * (self.scale / 2)  # no transform below that
        spectrum = half.new_zeros(out * width).index_add(0, u * width + v, half)
        spectrum = spectrum.index_add(0, -u % out * width + v, half * both)
        return torch.fft.irfft2(spectrum.view(out, width), s=(out, fan_in))

    def weight(self, W: Tensor) -> Tensor:
        return W + self.change()

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return dense.forward(base, self.change, x)

    def check_state(self, state: dict[str, Tensor]) -> None:
        places, size = state.get("places", self.places), self.size
        if any(int(p.max()) >= side for p, side in zip(places, size, strict=True) if not p.is_meta):
            raise ValueError(
                f"these coefficients of FourierFT belong to a larger weight than {size[0]} x {size[1]}: another base?"
            )


@dataclass(frozen=True, kw_only=True)
class FourierFT(Method):
    """W + scale * Re(ifft2(F)), F all zero but for n trained real coefficients at places that a seed draws.

    The paper scales by 300 or so (peft by 150), and trains with learning rates far above LoRA's.

    Args:
        n: coefficients of a layer.
        scale: of the change, whose entries are about sqrt(n / 2) / (in * out) of it for coefficients of one.
        seed: of their places, which layers of one shape share.
        targets: names, patterns or roles of the layers to adapt.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
        n_pattern: pattern -> n for the layers it names.
    """

    traits = Traits(
        family="reparameterized",
        paper="Gao et al. 2024, arXiv:2405.03003",
        parameters="n a layer",
        hosts=("linear", "conv1d"),
        merge=True,
        quantized=True,
        hf="FOURIERFT",
    )
    name: str = "fourier_ft"
    n: int = 1000
    scale: float = 150.0
    seed: int = 777
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str = ""
    n_pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for where, n in {"n": self.n, **self.n_pattern}.items():
            if n < 1:
                raise ValueError(f"FourierFT needs at least 1 coefficient, got {where}={n}")
        if self.scale <= 0:
            raise ValueError(f"FourierFT's scale must be positive, got {self.scale}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        targets = find(model, self.targets, self.traits.hosts, exclude=self.exclude, layers=self.layers)
        for pattern in self.n_pattern:
            if not any(matches(name, pattern) for name, _ in targets):
                raise ValueError(f"n_pattern's {pattern!r} matches none of the {len(targets)} target layers")
        for name, host in targets:
            n = next((n for p, n in self.n_pattern.items() if matches(name, p)), self.n)
            out, fan_in = hosts.shape(host)
            if n > out * fan_in:
                raise ValueError(
                    f"{name}: n={n} coefficients, but its weight {out} x {fan_in} has {out * fan_in} entries; "
                    "set n_pattern for it or exclude it"
                )
            attach(host, self.name, FourierFTLinear(host, n, self.scale, self.seed))

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        held: dict[str, tuple[Any, Any]] = {name: (host, a) for name, host, a in self.adapters(model)}
        if alien := [n for n, (_, a) in held.items() if not torch.equal(a.places.cpu(), a.drawn())]:
            raise ValueError(
                f"{alien[0]}: huggingface/peft draws the places from the seed, and this torch draws others than those "
                "that were trained"
            )
        sizes = {name: len(a.c) for name, (_, a) in held.items()}
        fields = {theirs: getattr(self, ours) for ours, theirs in HF_FIELDS.items()} | {
            "n_frequency_pattern": _patterns(sizes, self.n),
            "target_modules": hf.target_modules(model, held),
            "fan_in_fan_out": any(hosts.is_conv1d(host) for host, _ in held.values()),
            "init_weights": True,
            "bias": "none",
        }
        return fields, {f"{hf.PREFIX}{name}.fourierft_spectrum": a.c for name, (_, a) in held.items()}

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "FourierFT":
        more = ("n_frequency_pattern", "fan_in_fan_out", "init_weights")
        hf.check_fields(config, (*HF_FIELDS.values(), *more), "fourier_ft")
        sizes = {name: len(t["fourierft_spectrum"]) for name, t in tensors.items() if "fourierft_spectrum" in t}
        if not sizes:
            raise ValueError(f"no tensor of the file belongs to a module of this {type(model).__name__}: another base?")
        known = {ours: config[theirs] for ours, theirs in HF_FIELDS.items() if theirs in config}
        n = known.get("n", cls.n)
        return cls(targets=hf.targets(model, sizes), n_pattern=hf.patterns(sizes, n, ours=True), **known)


def _patterns(sizes: Mapping[str, int], n: int) -> dict[str, int]:
    """peft's n_frequency_pattern: whole names, of which a key also means the ends of others from a dot on.

    Raises:
        ValueError: a name that ends another layer's, which has another number.
    """
    keys = {name: size for name, size in sizes.items() if size != n}
    for name, size in sizes.items():
        key = next((k for k in keys if re.match(rf".*\.{k}$", name)), name)
        if keys.get(key, n) != size:
            raise ValueError(f"{name}: huggingface/peft would give it the n={keys[key]} of {key!r}, not {size}")
    return keys
