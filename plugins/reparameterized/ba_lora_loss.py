"""BA-LoRA's losses on the model's outputs, for any adapters. Chang, Chang, Wu 2024 (ICLR 2026), arXiv:2408.04556."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Adapter, Base, Method, Step, Traits, adapters, attach
from lightning_peft.attach import disabled, evaluating, modules
from lightning_peft.find import nearest

IGNORED = -100  # label of a token that is not learnt
ROWS = 512  # of more, as many are drawn for the dominance, whose cost grows with their square
LAST = 0.1  # share of lambda1 that the cosine schedule ends at
FORMS: dict[str, dict[str, Any]] = {
    "nlg": {"lambda1": 0.025, "lambda2": 0.005, "lambda3": 0.005, "k": 10, "svd_norm": "frobenius"},
    "nlu": {"lambda1": 0.15, "lambda2": 0.03, "lambda3": 0.03, "k": 5, "svd_norm": "nuclear"},
}
TERMS = ("consistency", "diversity", "dominance")
CHOICES = {"form": tuple(FORMS), "svd_norm": ("frobenius", "nuclear"), "lambda1_schedule": ("cosine", "none")}


def consistency(P: Tensor, Q: Tensor, temperature: float = 2.0) -> Tensor:
    """temperature^2 * mean over rows of KL(softmax(P / temperature) || softmax(Q / temperature)); both (rows, D)."""
    log_p, log_q = (F.log_softmax(z / temperature, -1) for z in (P, Q))
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def correlation(Q: Tensor) -> Tensor:
    """1 / D * the squares of the covariance between different columns of Q (N, D), summed; N is at least 2."""
    centred = Q - Q.mean(0)
    C = centred.T @ centred / (len(Q) - 1)  # (D, D)
    return (C.square().sum() - C.diagonal().square().sum()) / Q.shape[1]


def negative_entropy(Z: Tensor, top_k: int) -> Tensor:
    """Minus the mean entropy of softmax over the ``top_k`` largest of every row of Z (rows, V), renormalised."""
    log_p = F.log_softmax(Z.topk(min(top_k, Z.shape[1]), -1).values, -1)
    return (log_p.exp() * log_p).sum(-1).mean()


def dominance(Z: Tensor, k: int, norm: str) -> Tensor:
    """Minus the sum of the ``k`` largest singular values of Z (rows, D), over their "nuclear" or "frobenius" norm."""
    if norm == "nuclear":
        sigma = torch.linalg.svdvals(Z)
        return -sigma[:k].sum() / sigma.sum()
    gram = Z @ Z.T if len(Z) <= Z.shape[1] else Z.T @ Z  # many times faster than the singular values themselves
    top = torch.linalg.eigvalsh(gram)[-k:].clamp(min=1e-12)
    return -top.sqrt().sum() / Z.norm()


class Watch(Adapter):
    """Keeps what its host was called with and returned where gradients are taken, until the loss has used it."""

    watches = True
    progress: Tensor
    terms: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.seen: Any = None
        self.register_buffer("progress", torch.zeros(()))  # share of the fit's steps that are done
        self.register_buffer("terms", torch.zeros(3), persistent=False)  # last values, without the lambdas

    def reset_parameters(self) -> None:
        self.progress.zero_()
        self.terms.zero_()

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        output = base(*args, **kwargs)
        if torch.is_grad_enabled():  # not in validation; in training also where the user keeps the model in eval mode
            self.seen = args, kwargs, output
        return output

    def train(self, mode: bool = True) -> "Watch":
        if not mode:
            self.seen = None  # so that a graph nobody asked about does not outlive training
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"seen": None}  # a graph can be neither copied nor pickled


@dataclass(frozen=True, kw_only=True)
class BALoRALoss(Method):
    """lambda1 * consistency + lambda2 * diversity + lambda3 * dominance, beside adapters of other methods.

    Of the logits Q, and P of the model without adapters, which costs one more forward pass and no second model:

    - consistency: temperature^2 * KL(P || Q) of softmax at that temperature, mean over rows;
    - diversity: "nlu": squared covariance between classes; "nlg": minus the entropy among the ``top_k`` largest logits;
    - dominance: minus the sum of the ``k`` largest singular values of Q over its norm.

    Rows are the examples of a batch in one process ("nlu"), or its tokens that predict a label ("nlg"). Where a batch
    makes a term empty (one example, no token, ``k`` not below the rank under a nuclear norm) it is refused. Base
    parameters that train, such as a new head, are the same in P and Q.

    Args:
        form: "nlg" for logits (batch, time, vocabulary), "nlu" for logits (batch, classes).
        lambda1, lambda2, lambda3: weights; None is the paper's: 0.025, 0.005, 0.005 ("nlg"), 0.15, 0.03, 0.03 ("nlu").
        k: singular values that may be large; None is the paper's: 10 ("nlg"), 5 ("nlu").
        temperature: of the consistency.
        top_k: candidates in the entropy ("nlg").
        svd_norm: "frobenius" or "nuclear"; None is the paper's: "frobenius" ("nlg"), "nuclear" ("nlu").
        lambda1_schedule: "cosine", down to a tenth at the end of the fit, or "none".
        shift: a label is predicted one position before it; None asks the model: not in encoder-decoders ("nlg").
        watch: name of the module that returns the logits; the outermost transformers model, else the whole, when empty.
    """

    traits = Traits(
        family="reparameterized",
        paper="Chang, Chang, Wu 2024, arXiv:2408.04556",
        parameters="none of its own",
        hosts=("model",),
        merge=True,
    )
    name: str = "ba_lora_loss"
    form: str = "nlg"
    lambda1: float | None = None
    lambda2: float | None = None
    lambda3: float | None = None
    k: int | None = None
    temperature: float = 2.0
    top_k: int = 20
    svd_norm: str | None = None
    lambda1_schedule: str = "cosine"
    shift: bool | None = None
    watch: str = ""

    def __post_init__(self) -> None:
        for option, names in CHOICES.items():
            if (given := getattr(self, option)) not in names and (option, given) != ("svd_norm", None):
                near = nearest(str(given), names)
                raise ValueError(f"{self.name}: {option} is one of {names}, got {given!r}; nearest: {near}")
        first, second, third, k = self._own("lambda1", "lambda2", "lambda3", "k")
        good = min(first, second, third) >= 0 and first + second + third > 0
        _check(good, f"{self.name}: lambdas are at least 0, one is more; got {first}, {second} and {third}")
        _check(k >= 1 and self.top_k >= 2, f"{self.name}: k is at least 1, top_k 2, got {k} and {self.top_k}")
        _check(self.temperature > 0, f"{self.name}: temperature must be positive, got {self.temperature}")
        idle = [n for n in ("top_k", "shift") if self.form == "nlu" and getattr(self, n) != getattr(type(self), n)]
        _check(not idle, f"{self.name}: {' and '.join(idle)} would have no effect with form='nlu'")

    def _own(self, *options: str) -> list[Any]:
        """Options as given, or the form's."""
        return [FORMS[self.form][o] if getattr(self, o) is None else getattr(self, o) for o in options]

    def inject(self, model: nn.Module, stats: None = None) -> None:
        named = dict(modules(model))
        found = self.watch or next((n for n, m in named.items() if hasattr(m, "save_pretrained")), "")
        _check(found in named, f"{self.name}: no module {found!r} to watch; nearest: {nearest(found, named)}")
        attach(named[found], self.name, Watch())

    def penalty(self, model: nn.Module) -> Tensor | None:
        name, host, watch = self._watched(model)
        _check(watch.seen is not None, f"{self.name}: {name or 'the model itself'!r} was not called in this step, so "
               "its outputs are not known: name the module that returns the logits by watch")  # fmt: skip
        (args, kwargs, output), watch.seen = watch.seen, None
        P = self._teacher(model, host, args, kwargs) if self._own("lambda1")[0] else None
        with torch.autocast(watch.progress.device.type, enabled=False):
            terms = self._terms(*self._rows(host, kwargs, _logits(output, self.name), P))
            watch.terms.copy_(terms.detach())
            return self._weights(watch.progress) @ terms

    def _watched(self, model: nn.Module) -> tuple[str, Any, Any]:
        return next(iter(self.adapters(model)))

    def _teacher(self, model: nn.Module, host: Any, args: Any, kwargs: Any) -> Tensor:
        none = all(a.watches for _, _, a in adapters(model))
        _check(not none, f"{self.name}: no adapter is there to switch off, so lambda1 has no effect: set it 0")
        with torch.no_grad(), disabled(model), evaluating(host):  # which draws no random numbers
            return _logits(host(*args, **kwargs), self.name)

    def _rows(self, host: Any, kwargs: dict[str, Any], Q: Tensor, P: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(rows, D) each, in float32."""
        shape, (second, third) = tuple(Q.shape), self._own("lambda2", "lambda3")
        dims, other = {"nlg": (3, "nlu"), "nlu": (2, "nlg")}[self.form]
        _check(len(shape) == dims, f"{self.name}: form={self.form!r} does not fit logits {shape}; {other!r} may")
        if self.form == "nlu":
            enough = shape[1] > 1 and (shape[0] > 1 or not second + third)
            _check(enough, f"{self.name}: logits of shape {shape} leave a term empty: it takes two classes, and two "
                           "examples in a batch (drop_last=True), or lambda2=0 and lambda3=0")  # fmt: skip
            return Q.float(), None if P is None else P.float()
        labels = kwargs.get("labels")
        given = None if labels is None else tuple(labels.shape)
        _check(given == shape[:2], f"{self.name}: the watched module must be called with labels= of shape {shape[:2]}, "
               f"which say the tokens that count; got {given}")  # fmt: skip
        paired = getattr(getattr(host, "config", None), "is_encoder_decoder", False)
        shift = not paired if self.shift is None else self.shift
        kept = F.pad(kwargs["labels"][:, 1:], (0, 1), value=IGNORED) if shift else kwargs["labels"]
        kept = (kept != IGNORED).to(Q.device)
        Q, P = Q[kept].float(), None if P is None else P[kept].float()
        _check(len(Q) > bool(third), f"{self.name}: {len(Q)} tokens of this batch predict a label, which leaves a term "
               "empty: are prompts so long that nothing behind them is left?")  # fmt: skip
        return Q, P

    def _terms(self, Q: Tensor, P: Tensor | None) -> Tensor:
        """(3,): consistency, diversity, dominance; zero where its lambda is."""
        second, third, k, norm = self._own("lambda2", "lambda3", "k", "svd_norm")
        terms = [Q.new_zeros(()) if P is None else consistency(P, Q, self.temperature), *Q.new_zeros(2)]
        if second:
            terms[1] = correlation(Q) if self.form == "nlu" else negative_entropy(Q, self.top_k)
        if third:
            if self.form == "nlg" and len(Q) > ROWS:
                Q = Q[torch.randperm(len(Q), device=Q.device)[:ROWS]]
            few = min(Q.shape)
            what = f"{self.name}: the k={k} largest of {few} singular values are all, so the dominance is constant"
            _check(norm == "frobenius" or k < few, f"{what}: take a smaller k, or lambda3=0")
            terms[2] = dominance(Q, k, norm)
        return torch.stack(terms)

    def _weights(self, t: Tensor) -> Tensor:
        """(3,): the lambdas at a share ``t`` of the fit."""
        first, second, third = self._own("lambda1", "lambda2", "lambda3")
        if self.lambda1_schedule == "cosine":
            first = first * (LAST + (1 - LAST) * (1 + torch.cos(math.pi * t)) / 2)
        return torch.stack([torch.as_tensor(w, dtype=t.dtype, device=t.device) for w in (first, second, third)])

    def after_step(self, model: nn.Module, step: Step) -> None:
        if self.lambda1_schedule != "none":
            self._watched(model)[2].progress.fill_(step.index / step.total)

    def finish(self, model: nn.Module) -> None:
        self._watched(model)[2].progress.zero_()  # a later fit starts anew

    def report(self, model: nn.Module) -> dict[str, dict[str, float]]:
        name, _, watch = self._watched(model)
        return {term: {name or "model": float(value)} for term, value in zip(TERMS, watch.terms, strict=True)}


def _check(good: bool, text: str) -> None:
    if not good:
        raise ValueError(text)


def _logits(output: Any, by: str) -> Tensor:
    """Logits in what a model returns."""
    found: Any = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
    _check(isinstance(found, Tensor), f"{by}: a {type(output).__name__} holds no logits: watch the module that returns "
           "them, alone or as its output's 'logits'")  # fmt: skip
    return found
