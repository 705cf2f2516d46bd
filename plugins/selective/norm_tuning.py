"""Norm tuning: train the normalisation layers the model already has. Zhao et al. 2023, arXiv:2312.11420."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # private, but the one parent of batch and instance norms

from lightning_peft import Method, Traits, find, hf, unfreeze
from lightning_peft.attach import Adapters, modules

TORCH = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def is_norm(module: nn.Module) -> bool:
    """torch's norms that have weights, and by structure those of others (RMSNorm of transformers): by a class's name,
    where the module holds vectors alone."""
    own = list(module.parameters(recurse=False))
    if not own or isinstance(module, TORCH):
        return bool(own)
    leaf = all(isinstance(c, Adapters) for c in module.children())
    return leaf and all(p.dim() == 1 for p in own) and any("Norm" in c.__name__ for c in type(module).__mro__)


@dataclass(frozen=True, kw_only=True)
class NormTuning(Method):
    """Weight and bias of normalisation layers train (layer, RMS, group, batch and instance norms). Nothing is added.

    They train without weight decay. A batch norm that trains also goes on counting its running statistics, which are
    saved with it.

    Args:
        targets: names and patterns of normalisation layers; all by default.
        exclude: patterns of normalisation layers, or of modules around them, to leave out.
        layers: blocks whose norms train, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty, those outside
            blocks included.
    """

    traits = Traits(
        family="selective",
        paper="Zhao et al. 2023, arXiv:2312.11420",
        parameters="channels a weight, and as many a bias, of each norm",
        hosts=("module",),
        merge=True,  # the trained weights are the model's own
        hf="LN_TUNING",
    )
    name: str = "norm_tuning"
    targets: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    layers: str = ""

    def inject(self, model: nn.Module, stats: None = None) -> None:
        names = [f"{n}.{p}" for n, m in self._norms(model) for p, _ in m.named_parameters(recurse=False)]
        unfreeze(model, names, self.name)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        own = {id(p): p for _, m in self._norms(model) for p in m.parameters(recurse=False)}
        return [{"params": list(own.values()), "weight_decay": 0.0}]  # decay pulls a scale to zero, not to one

    def _norms(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        types = tuple({type(m) for _, m in modules(model) if is_norm(m)})
        if not types:
            raise ValueError(f"{self.name}: this {type(model).__name__} has no normalisation layer with weights; "
                             "train its biases (bitfit) or some of its blocks (partial_tuning) instead")  # fmt: skip
        found = find(model, self.targets, types, exclude=self.exclude, layers=self.layers)
        return [(n, m) for n, m in found if is_norm(m)]  # one of the same class may be without weights

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """peft keeps a copy of each norm under ``ln_tuning_layers``; the views are the model's own tensors."""
        norms = dict(self._norms(model))
        held = {n: m.state_dict(keep_vars=True) for n, m in norms.items()}
        fields = {"target_modules": hf.target_modules(model, norms)}
        return fields, {f"{hf.PREFIX}{n}.ln_tuning_layers.{k}": t for n, s in held.items() for k, t in s.items()}

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "NormTuning":
        hf.check_fields(config, (), "norm_tuning")
        if other := [n for n in tensors if not n or not is_norm(model.get_submodule(n))]:
            raise ValueError(
                f"this LN_TUNING folder trains {other[0]!r} ({len(other)} such), which is no normalisation layer here "
                "(peft copies whatever it is told to): norm_tuning cannot take it"
            )
        return cls(targets=hf.targets(model, tensors))
