"""LoRA on the projections of state-space models. Halloran, Gulati and Roysdon 2024, arXiv:2406.00209.

What the fused kernels read of an adapted layer is its adapted weight, for every method (``lightning_peft.reads``); this
one knows which layers to take. The paper adapts "memory buffers", the one weight that makes B, C and Delta of the
recurrence: x_proj in Mamba, in_proj in Mamba-2. Which layers its "all" has is taken from transformers' documentation.
"""

from dataclasses import dataclass, field
from typing import Any

from lightning_peft_plugins.reparameterized.lora import LoRA
from torch import Tensor, nn

from lightning_peft import Method, Traits, arch, find
from lightning_peft.find import exact

PRESETS = ("sll", "projectors", "all")


@dataclass(frozen=True, kw_only=True)
class MambaLoRA(Method):
    """LoRA on state-space mixers (Mamba, Mamba-2, Falcon Mamba, hybrids); attention and MLPs of a hybrid by ``also``.

    The conv1d, dt_proj, A_log and D of a mixer stay frozen. Keep a model's A_log and D in float32, and pad on the
    right: transformers' fused path ignores the attention mask. No dropout, which a weight that is read cannot have.

    Args:
        r: rank of the update.
        alpha: the update is scaled by alpha / r.
        rslora: scale by alpha / sqrt(r) instead.
        init: of A: "default" (Kaiming uniform) or "gaussian" (standard deviation 1 / r). B starts at zero.
        preset: "sll", the weight that makes B, C and Delta (x_proj; in_proj where there is none); "projectors", in_proj
            and out_proj; "all", those, x_proj and the token embeddings.
        also: further layers by name, pattern or role.
        exclude: patterns of layers to leave out.
        layers: blocks to adapt, as slices and numbers, which leaves out the embeddings; all when empty.
        rank_pattern, alpha_pattern: pattern -> r or alpha for the layers it names.
    """

    traits = Traits(
        family="reparameterized",
        paper="Halloran et al. 2024, arXiv:2406.00209",
        parameters="r * (in + out) a layer",
        hosts=("linear", "embedding"),
        merge=True,
        quantized=True,
        hf="LORA:",  # peft's folder says LoRA and no more
    )
    name: str = "mamba_lora"
    r: int = 8
    alpha: float = 16.0
    rslora: bool = False
    init: str = "default"
    preset: str = "all"
    also: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: str = ""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        self._lora(("all-linear",))  # which checks the rest

    def _lora(self, targets: tuple[str, ...]) -> LoRA:
        options = {k: getattr(self, k) for k in ("name", "r", "alpha", "rslora", "init", "exclude", "layers")}
        patterns = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        return LoRA(targets=targets, **options, **patterns)

    def inject(self, model: nn.Module, stats: None = None) -> None:
        self._lora((*self._targets(model), *self.also)).inject(model)

    def _targets(self, model: nn.Module) -> tuple[str, ...]:
        mixers = [n for n, m in model.named_modules() if hasattr(m, "A_log")]
        if not mixers:
            raise ValueError(
                f"{self.name} adapts state-space mixers (modules with an A_log), and this {type(model).__name__} has "
                f"none; for layers of other kinds use lora, roles here: {', '.join(arch.present_roles(model)) or '-'}"
            )
        wanted = {"projectors": ("in_proj", "out_proj"), "all": ("in_proj", "x_proj", "out_proj")}.get(self.preset)
        names = []
        for mixer in mixers:
            children = dict(model.get_submodule(mixer).named_children())
            memory = ("x_proj",) if "x_proj" in children else ("in_proj",)
            names += [f"{mixer}.{c}" if mixer else c for c in wanted or memory if c in children]
        if self.preset == "all" and not self.layers:
            names += [n for n, m in find(model, ("*",), nn.Embedding)]
        return tuple(exact(n) for n in names)

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return self._lora(()).to_hf(model)
