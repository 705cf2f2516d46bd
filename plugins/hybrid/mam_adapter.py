"""MAM adapter: a prefix in every attention and a scaled adapter beside every MLP. He et al. 2021, arXiv:2110.04366."""

from dataclasses import dataclass

from lightning_peft_plugins.additive.parallel_adapter import ParallelAdapter
from lightning_peft_plugins.additive.prefix_tuning import PrefixTuning
from lightning_peft_plugins.hybrid.composite import Composite, check_distinct
from torch import nn

from lightning_peft import Method, Traits


@dataclass(frozen=True, kw_only=True)
class MAMAdapter(Composite):
    """Prefix tuning and parallel adapters together: the best of the paper's comparison ("mix and match").

    The defaults are the paper's for summarisation and translation; on GLUE it has 16 tokens, a bottleneck of 16 and a
    scale of 2. Of an encoder-decoder model the prefix is in the decoder's self-attention alone, as in
    ``prefix_tuning``, where the paper's is in all three attentions.

    Args:
        prefix: the prefix.
        parallel: the adapters.
    """

    traits = Traits(
        family="hybrid",
        paper="He et al. 2021, arXiv:2110.04366",
        parameters="those of prefix_tuning and of parallel_adapter",
        hosts=("model", "module"),
        identity_start=False,
    )
    name: str = "mam_adapter"
    prefix: PrefixTuning = PrefixTuning(num_tokens=30, reparam_dim=512)
    parallel: ParallelAdapter = ParallelAdapter(bottleneck=512, scale=4.0)

    def __post_init__(self) -> None:
        check_distinct(self.name, {"prefix": self.prefix, "parallel": self.parallel})

    def parts(self, model: nn.Module) -> list[Method]:
        return [self.part(self.prefix), self.part(self.parallel)]
