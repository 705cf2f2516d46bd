"""BitFit: train the biases the model already has. Ben Zaken et al. 2021, arXiv:2106.10199."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft import Method, Traits, find, parts, unfreeze
from lightning_peft.find import exact, nearest

ATTENTION = {"query": "q", "key": "k", "value": "v", "attention_output": "o"}  # role -> field of parts.Attention
ROLES = (*ATTENTION, "intermediate", "output")


def is_bias(name: str, parameter: nn.Parameter) -> bool:
    """By its own name and a single dimension: T5's relative_attention_bias.weight is no bias, in_proj_bias is one."""
    last = name.rpartition(".")[2]
    return parameter.dim() == 1 and (last == "bias" or last.endswith("_bias") or last.startswith("bias_"))


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """b of every y = W x + b trains, and the biases of normalisation layers; W stays frozen. Nothing is added.

    Biases train in the model's own dtype, on a quantised base too, and without weight decay. A new head trains by
    ``train``, not by this.

    Args:
        targets: "all"; roles, found by structure: "query", "key", "value", "attention_output", "intermediate" (first
            layers of the MLP) and "output" (its last); or names and patterns of biases or of modules that hold some.
            The paper's small subset is ("query", "intermediate").
        exclude: patterns of biases or modules to leave out.
        layers: blocks whose biases train, as slices and numbers: "0:6", "-4:", "0,2,11"; all when empty.
    """

    traits = Traits(
        family="selective",
        paper="Ben Zaken et al. 2021, arXiv:2106.10199",
        parameters="out a layer that has a bias",
        hosts=("module",),
        merge=True,  # the trained biases are the model's own
    )
    name: str = "bitfit"
    targets: tuple[str, ...] = ("all",)
    exclude: tuple[str, ...] = ()
    layers: str = ""

    def inject(self, model: nn.Module, stats: None = None) -> None:
        unfreeze(model, [n for n, _ in self._biases(model)], self.name)

    def _biases(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        biases = [n for n, p in find(model, ("*",), nn.Parameter) if is_bias(n, p)]
        if not biases:
            raise ValueError(
                f"{self.name}: this {type(model).__name__} has no biases to train, as Llama, T5 and Gemma have none; "
                "train its normalisation layers (norm_tuning) or some of its blocks (partial_tuning) instead"
            )
        chosen = dict.fromkeys(n for target in self.targets for n in self._match(model, target, biases))
        return find(model, [exact(n) for n in chosen], nn.Parameter, exclude=self.exclude, layers=self.layers)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        return [{"params": list({id(p): p for _, p in self._biases(model)}.values()), "weight_decay": 0.0}]

    def _match(self, model: nn.Module, target: str, biases: list[str]) -> list[str]:
        if target == "all":
            return biases
        if target in ROLES:
            layers = self._in_role(model, target)
            found = [n for n in biases if n.rpartition(".")[0] in layers]
            what = f"{len(layers)} layers of this model in that role" if layers else "no such layer was found here"
        else:
            found = [n for n, _ in find(model, (target,), nn.Parameter) if n in biases]
            what = "what it names has none"
        if not found:
            near = nearest(target, [n for b in biases for n in (b, b.rpartition(".")[0])])
            raise ValueError(f"{self.name}: target {target!r} has no bias ({what}); nearest: {near}; roles: {ROLES}")
        return found

    def _in_role(self, model: nn.Module, role: str) -> set[str]:
        """Names of the layers in a role; of a fused projection only where all that it holds is asked for."""
        if role not in ATTENTION:
            mlps = parts.mlps(model)
            return {row for m in mlps for row in m.rows} if role == "intermediate" else {m.down for m in mlps}
        layers = set()
        for a in parts.attentions(model):
            layer = getattr(a, ATTENTION[role])
            inside = [r for r, field in ATTENTION.items() if getattr(a, field) == layer]
            if lacking := [r for r in inside if r not in self.targets]:
                raise ValueError(f"{self.name}: {layer!r} is one layer for {inside}, so its bias cannot train for "
                                 f"{role!r} alone: add {lacking} to the targets")  # fmt: skip
            layers.add(layer)
        return layers
