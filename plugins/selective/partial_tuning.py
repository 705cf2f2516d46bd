"""Partial tuning: train some of the model's own layers in full. Lee et al. 2022, arXiv:2210.11466.

Layers are chosen by place and role as in Kunz 2024 (arXiv:2412.12674).
"""

from dataclasses import dataclass

from torch import nn

from lightning_peft import Method, Traits, arch, find, unfreeze


@dataclass(frozen=True, kw_only=True)
class PartialTuning(Method):
    """The chosen weights and biases of the base train in full, all else stays frozen. Nothing is added.

    Weights train in the model's own dtype. Blocks below the first one that trains need no backward pass.

    Args:
        targets: what trains: roles of layers ("attention", "mlp", "all-linear"), names and patterns of modules or
            parameters. Everything that ``layers`` or ``last`` leaves when it is not given.
        exclude: patterns of modules or parameters to leave out.
        layers: blocks to train in, counted in each stack (an encoder and a decoder are two): "0:6", "-2:", ":-2",
            "0,2,11"; all when empty.
        last: train in the last so many blocks of each stack, as ``layers="-N:"`` does, but no stack may have fewer.
    """

    traits = Traits(
        family="selective",
        paper="Lee et al. 2022, arXiv:2210.11466",
        parameters="the chosen layers' own",
        hosts=("module",),
        merge=True,  # the trained weights are the model's own
        quantized=False,
    )
    name: str = "partial_tuning"
    targets: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    layers: str = ""
    last: int = 0

    def __post_init__(self) -> None:
        if self.last < 0:
            raise ValueError(
                f"last counts blocks from the end, so it must be at least 1 (0: not used), got {self.last}"
            )
        if self.last and self.layers:
            raise ValueError(f"give layers or last, not both: got {self.layers!r} and {self.last}")
        if self.targets == ("*",) and not (self.exclude or self.layers or self.last):
            raise ValueError("partial tuning of everything is full fine-tuning, which needs no method: say which part "
                             "trains, by targets, layers, last or exclude")  # fmt: skip

    def inject(self, model: nn.Module, stats: None = None) -> None:
        layers = self.layers
        if self.last:
            layers = f"-{self.last}:"
            stacks = [block.rpartition(".")[0] for block in arch.blocks(model)]
            if short := next((s for s in stacks if stacks.count(s) < self.last), None):
                raise ValueError(f"{self.name}: last={self.last}, but {short!r} has {stacks.count(short)} blocks")
        found = find(model, self.targets, nn.Parameter, exclude=self.exclude, layers=layers)
        unfreeze(model, [n for n, _ in found], self.name)
