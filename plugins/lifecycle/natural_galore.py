"""Natural GaLore: GaLore behind a damped Fisher matrix of the last projected gradients. Das 2024, arXiv:2410.16029."""

import warnings
from dataclasses import dataclass

import torch
from lightning_peft_plugins.lifecycle import projected, projectors
from lightning_peft_plugins.lifecycle.galore import GaLore
from torch import Tensor, nn

from lightning_peft import Step, Traits, hosts

HISTORY, GRAM, COSINE = (projectors.OURS + n for n in ("history", "gram", "cosine"))


@dataclass(frozen=True, kw_only=True)
class NaturalGaLore(GaLore):
    """GaLore with (lambda I + sum of g g^T)^-1 g for each projected gradient g; the sum over the last ``history``.

    It is computed as a sum of the kept gradients themselves, G c with (lambda I + G^T G) c the last unit vector, which
    float32 carries; the published two terms cancel. Made for Adam-like optimizers: the result's size follows lambda.

    Args:
        r, update_proj_gap, scale, proj_type, svd, on_refresh: as of galore; "full" is what the authors' code does.
        history: projected gradients to keep, the newest included; each has as many entries as one of the moments.
        damping: lambda, relative or absolute.
        damping_mode: "relative", lambda = damping * mean square norm of the kept gradients; or "absolute", as
            published, far above gradients of the usual size, which makes this plain GaLore (see the reported cosine).
        targets, exclude, layers, rest: as of galore.
    """

    traits = Traits(
        family="lifecycle",
        paper="Das 2024, arXiv:2410.16029",
        parameters="the targets' own; beside GaLore's state history * r * max(out, in) a weight",
        hosts=("linear", "conv1d"),
        merge=True,  # the trained weights are the model's own
        quantized=False,
    )
    name: str = "natural_galore"
    history: int = 20
    damping: float = 1e-3
    damping_mode: str = "relative"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.history < 1 or self.damping <= 0:
            raise ValueError(f"history is at least 1 and damping positive, got {self.history} and {self.damping}")
        if self.damping_mode not in ("relative", "absolute"):
            raise ValueError(f"damping_mode must be 'relative' or 'absolute', got {self.damping_mode!r}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        for name, host in projected.train(self, model):
            out, fan_in = hosts.shape(host)
            r = min(self.r, out, fan_in)
            side = r if self.proj_type == "full" else max(out, fan_in)
            if self.history * r * side > 2 * out * fan_in:
                warnings.warn(
                    f"{self.name} keeps {self.history * r * side:,} numbers of {name!r}, and Adam's own moments would "
                    f"be {2 * out * fan_in:,}: a smaller r or history, or proj_type='full', saves memory",
                    stacklevel=2,
                )
                return

    def before_step(self, model: nn.Module, step: Step) -> None:
        def refresh(G: Tensor, state: projectors.State) -> None:
            if projectors.refreshed(self, step.index, G, state):  # what is kept lies in another basis
                for key in (HISTORY, GRAM):
                    state.pop(key, None)

        projected.enter(self, step, refresh, self.precondition)

    def precondition(self, R: Tensor, state: projectors.State) -> Tensor:
        """(lambda I + sum of g g^T)^-1 g in the shape of R; R joins what ``state`` keeps first."""
        g = R.flatten()
        kept = _last(state[HISTORY], self.history - 1) if HISTORY in state else g.new_empty(0, len(g))
        columns, m = torch.cat([kept, g[None]]), len(kept)  # (m + 1, k), newest last
        K = g.new_zeros(m + 1, m + 1)
        if m:
            K[:m, :m] = _last(_last(state[GRAM], m).T, m)  # symmetric
        K[m] = K[:, m] = columns @ g
        state[HISTORY], state[GRAM], state[COSINE] = columns, K, g.new_ones(())
        if m == 0:
            return R
        wide = K.double()
        damping = self.damping * (wide.trace() / len(K) if self.damping_mode == "relative" else wide.new_ones(()))
        unit = torch.eye(len(K), dtype=wide.dtype, device=R.device)
        natural = columns.T @ torch.linalg.solve(wide + damping.clamp(min=1e-30) * unit, unit[m]).to(R.dtype)
        state[COSINE] = torch.nn.functional.cosine_similarity(natural, g, 0, eps=1e-30)
        return natural.view_as(R)

    def report(self, model: nn.Module) -> dict[str, dict[str, float]]:
        return super().report(model) | projected.told(self, model, cosine_to_gradient="cosine")


def _last(t: Tensor, n: int) -> Tensor:
    return t[max(len(t) - n, 0) :]
