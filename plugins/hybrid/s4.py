"""S4: other mixtures of four methods in four groups of layers. Chen et al. 2023, arXiv:2301.01821."""

from collections import Counter
from dataclasses import dataclass

from lightning_peft_plugins.additive.pfeiffer_adapter import PfeifferAdapter
from lightning_peft_plugins.additive.prefix_tuning import PrefixTuning
from lightning_peft_plugins.hybrid.composite import Composite, check_distinct
from lightning_peft_plugins.reparameterized.lora import LoRA
from lightning_peft_plugins.selective.bitfit import BitFit
from torch import nn

from lightning_peft import Method, Traits, arch

FIELDS = ("adapter", "prefix", "bitfit", "lora")
PLAN = (("adapter", "lora"), ("adapter", "prefix"), ("adapter", "prefix", "bitfit"), ("prefix", "bitfit", "lora"))


def spindle(layers: int) -> tuple[int, ...]:
    """Sizes of four groups, the outer ones half as large as the inner: 12 layers are 2, 4, 4 and 2."""
    outer = max(1, layers // 6)
    inner = layers - 2 * outer
    return outer, inner - inner // 2, inner // 2, outer


@dataclass(frozen=True, kw_only=True)
class S4(Composite):
    """From the first layers to the last: adapters and LoRA; adapters and prefixes; these and biases; prefixes, biases
    and LoRA.

    The groups are spindle-shaped, with fewer layers in the outer two, and a method has one size in all of its layers.
    What the paper found on T5 by search is here for models whose attention can hide a prefix in single layers, which
    T5's cannot. Leave ``bitfit`` out of a model without biases.

    Args:
        adapter, prefix, bitfit, lora: the methods; null leaves one out. Their ``layers`` are S4's to choose.
        groups: layers in each group, from the first; as the class docstring says when empty.
    """

    traits = Traits(
        family="hybrid",
        paper="Chen et al. 2023, arXiv:2301.01821",
        parameters="those of pfeiffer_adapter, prefix_tuning, bitfit and lora in the layers of their groups",
        hosts=("model", "module", "linear", "conv1d"),
        identity_start=False,
    )
    name: str = "s4"
    adapter: PfeifferAdapter | None = PfeifferAdapter()
    prefix: PrefixTuning | None = PrefixTuning(num_tokens=10)
    bitfit: BitFit | None = BitFit()
    lora: LoRA | None = LoRA(targets=("attention",))
    groups: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        held = {field: getattr(self, field) for field in FIELDS}
        check_distinct(self.name, held)
        if given := [f for f, part in held.items() if part is not None and part.layers]:
            raise ValueError(f"{self.name}: groups say which layers {given[0]!r} is in, so its own layers "
                             f"{held[given[0]].layers!r} have no place: leave them empty")  # fmt: skip
        if self.groups and (len(self.groups) != len(PLAN) or min(self.groups) < 1):
            raise ValueError(f"{self.name}: groups are {len(PLAN)} numbers of at least 1, got {self.groups}")
        if bare := [i for i, fields in enumerate(PLAN) if all(held[f] is None for f in fields)]:
            raise ValueError(f"{self.name}: without {list(PLAN[bare[0]])} nothing would train in group {bare[0] + 1}")

    def parts(self, model: nn.Module) -> list[Method]:
        bounds = self.bounds(model)
        layers = {field: [str(i) for fields, span in zip(PLAN, bounds, strict=True) if field in fields for i in span]
                  for field in FIELDS}  # fmt: skip
        held = {field: getattr(self, field) for field in reversed(FIELDS)}
        return [self.part(part, layers=",".join(layers[f])) for f, part in held.items() if part is not None]

    def bounds(self, model: nn.Module) -> list[range]:
        """The layers of each group.

        Raises:
            ValueError: stacks of other sizes than each other or than ``groups``, or too few layers for four groups.
        """
        sizes = Counter(name.rpartition(".")[0] for name in arch.blocks(model))
        deep = set(sizes.values())
        if len(deep) != 1 or min(deep) < len(PLAN):
            raise ValueError(f"{self.name}: four groups need one number of at least 4 layers, this "
                             f"{type(model).__name__} has {dict(sizes) or 'none'}")  # fmt: skip
        groups = self.groups or spindle(min(deep))
        if sum(groups) != min(deep):
            raise ValueError(f"{self.name}: groups {groups} are {sum(groups)} layers, the model has {min(deep)}")
        ends = [sum(groups[: i + 1]) for i in range(len(groups))]
        return [range(end - size, end) for end, size in zip(ends, groups, strict=True)]
