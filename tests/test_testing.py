"""The conformance suite itself: every check fails for a method with the fault it is there for, and only for that."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from lightning_peft_plugins.reparameterized.lora import LoRA
from torch import Tensor, nn

from lightning_peft import Adapter, Base, Method, Step, Traits, WeightAdapter, attach, find, inject, testing
from lightning_peft.testing import Case, Failed, Row
from tests import nets

CLEAN = Traits(family="reparameterized", merge=True)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batch() -> tuple[Tensor]:
    return (torch.randn(4, 8, generator=torch.Generator().manual_seed(1)),)


class Tilt(WeightAdapter):
    """W + u (v * sign)^T with signs drawn once: parameters, a buffer, and a forward of its own."""

    axes = {"u": ("out",), "v": ("in",), "sign": ("in",)}
    sign: Tensor

    def __init__(self, host: nn.Linear) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.empty(host.out_features))
        self.v = nn.Parameter(torch.empty(host.in_features))
        self.register_buffer("sign", torch.empty(host.in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.u)
        nn.init.normal_(self.v)
        self.sign.data.copy_(torch.randn(len(self.sign)).sign())

    def weight(self, W: Tensor) -> Tensor:
        return W + torch.outer(self.u, self.v * self.sign)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        u, v = self.u.to(x.dtype), (self.v * self.sign).to(x.dtype)
        return base(x) + (x @ v)[..., None] * u


@dataclass(frozen=True, kw_only=True)
class Clean(Method):
    """The twin without a fault.

    Args:
        targets: layers to adapt.
        pairs: plain data of another kind.
    """

    traits = CLEAN
    name: str = "tilt"
    targets: tuple[str, ...] = ("all-linear",)
    pairs: dict[str, float] = field(default_factory=dict)

    def adapter(self, host: nn.Linear) -> Adapter:
        return Tilt(host)

    def inject(self, model: nn.Module, stats: None = None) -> None:
        for _, host in find(model, self.targets):
            attach(host, self.name, self.adapter(host))

    def tilts(self, model: nn.Module) -> list[Tilt]:
        return [a for _, _, a in self.adapters(model) if isinstance(a, Tilt)]


# ---- faults, each with the check that must find it -----------------------------------------------------------------


class WritesBase(Clean):
    def inject(self, model: nn.Module, stats: None = None) -> None:
        super().inject(model)
        with torch.no_grad():
            model.get_parameter("0.weight").mul_(0.999)


class WritesBaseLater(Clean):
    @torch.no_grad()
    def after_step(self, model: nn.Module, step: Step) -> None:
        if step.index == 15:
            model.get_parameter("2.bias").add_(1e-3)


@dataclass(frozen=True, kw_only=True)
class MasksGradients(Clean):
    """Trains half of a weight by zeroing the other half's gradient: weight decay moves that too."""

    traits = Traits(family="selective")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        model.get_parameter("0.weight").requires_grad_(True)

    def before_step(self, model: nn.Module, step: Step) -> None:
        grad = model.get_parameter("0.weight").grad
        assert grad is not None
        grad[:4] = 0


class LeaksGradient(Clean):
    def inject(self, model: nn.Module, stats: None = None) -> None:
        super().inject(model)
        model.get_parameter("4.bias").requires_grad_(True)


class Unused(Tilt):
    def __init__(self, host: nn.Linear) -> None:
        super().__init__(host)
        self.spare = nn.Parameter(torch.zeros(2))


class Silent(Tilt):
    def forward(self, base: Base, x: Tensor) -> Tensor:
        return base(x) + 0 * super().forward(base, x)


class OtherForward(Tilt):
    def forward(self, base: Base, x: Tensor) -> Tensor:
        return base(x) + (x @ self.v)[..., None] * self.u  # forgets the signs


class OtherGradient(Tilt):
    def forward(self, base: Base, x: Tensor) -> Tensor:
        return base(x) + (x @ (self.v.detach() * self.sign))[..., None] * self.u + 0 * self.v.sum()


class NoMapOnAWeight(Adapter):
    """Claims by traits that it merges."""

    def __init__(self, host: nn.Linear) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.empty(host.out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.shift)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return base(x) + self.shift.to(x.dtype)


class ForgetsBuffer(Tilt):
    def __init__(self, host: nn.Linear) -> None:
        super().__init__(host)
        self.register_buffer("sign", self.sign, persistent=False)


class DrawsOutsideTensors(Tilt):
    def __init__(self, host: nn.Linear) -> None:
        super().__init__(host)
        del self.sign
        self.sign = torch.randn(host.in_features).sign()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.u)
        nn.init.normal_(self.v)


class RandomHosts(Clean):
    def inject(self, model: nn.Module, stats: None = None) -> None:
        hosts = find(model, self.targets)
        _, host = hosts[int(torch.randint(10**6, ())) % 3]
        attach(host, self.name, self.adapter(host))


class HidesTheBase(Clean):
    """Whatever the base was, it is zero now: no fingerprint tells one from another."""

    def inject(self, model: nn.Module, stats: None = None) -> None:
        super().inject(model)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()


class LeavesHook(Clean):
    def inject(self, model: nn.Module, stats: None = None) -> None:
        super().inject(model)
        model.get_submodule("2").register_forward_hook(lambda *_: None)


class LeavesAttribute(Clean):
    def inject(self, model: nn.Module, stats: None = None) -> None:
        super().inject(model)
        model.get_submodule("2").tilted = True  # type: ignore[assignment]


class Float32Output(Tilt):
    def forward(self, base: Base, x: Tensor) -> Tensor:
        return base(x) + (x.float() @ (self.v * self.sign))[..., None] * self.u


class ForgetsToReset(Tilt):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.u)
        nn.init.normal_(self.v)
        if not self.sign.is_meta and not hasattr(self, "made"):
            self.made = True
            self.sign.data.fill_(1.0)


class CountsOnItself(Clean):
    """Its place in a schedule is kept on the method, where no checkpoint looks."""

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: Step) -> None:
        seen = vars(self).get("seen", 0) + 1
        object.__setattr__(self, "seen", seen)
        for adapter in self.tilts(model):
            adapter.u.mul_(1 / seen)


class Closure(Tilt):
    """A function that holds on to a tensor is not copied with the module."""

    def __init__(self, host: nn.Linear) -> None:
        super().__init__(host)
        u = self.u
        self.read = lambda: u

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return base(x) + (x @ (self.v * self.sign))[..., None] * self.read()


class IgnoresBelow(Tilt):
    def forward(self, base: Base, x: Tensor) -> Tensor:
        return base.host.unadapted(x) + (x @ (self.v * self.sign))[..., None] * self.u


class DefaultForward(Tilt):
    """No fault: the forward that a weight adapter has when it writes none."""

    forward = WeightAdapter.forward


class BreaksGraph(Tilt):
    def forward(self, base: Base, x: Tensor) -> Tensor:
        return super().forward(base, x) if float(self.u.abs().sum()) >= 0 else base(x)


@dataclass(frozen=True, kw_only=True)
class HidesField(Clean):
    __doc__ = Clean.__doc__
    targets: tuple[str, ...] = field(default=("all-linear",), repr=False)


@dataclass(frozen=True, kw_only=True)
class KeepsASet(Clean):
    __doc__ = Clean.__doc__
    targets: Any = frozenset({"0", "2"})


@dataclass(frozen=True, kw_only=True)
class Untyped(Clean):
    __doc__ = Clean.__doc__
    targets: Any = ("0", "2")


@dataclass(frozen=True, kw_only=True)
class Undocumented(Clean):
    """Does something."""


@dataclass(frozen=True, kw_only=True)
class UnknownFamily(Clean):
    __doc__ = Clean.__doc__
    traits = Traits(family="magic", merge=True)


@dataclass(frozen=True, kw_only=True)
class StartsElsewhere(Clean):
    __doc__ = Clean.__doc__

    def inject(self, model: nn.Module, stats: None = None) -> None:
        super().inject(model)
        for adapter in self.tilts(model):
            nn.init.ones_(adapter.u)


@dataclass(frozen=True, kw_only=True)
class ClaimsAnotherStart(Clean):
    __doc__ = Clean.__doc__
    traits = replace(CLEAN, identity_start=False)


class RankNoise(Clean):
    """Draws from the process's own generator while training."""

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: Step) -> None:
        for adapter in self.tilts(model):
            adapter.u.add_(torch.rand_like(adapter.u))


def attaching(adapter: type[Adapter], **fields: Any) -> Method:
    """The clean method with another adapter."""
    cls: Any = type(f"With{adapter.__name__}", (Clean,), {"adapter": lambda self, host: adapter(host)})
    return cls(**fields)


FAULTS: dict[str, list[Method]] = {
    "description": [Undocumented(), UnknownFamily()],
    "hyperparameters": [
        HidesField(targets=("0",)),
        KeepsASet(),
        WritesBase(),
    ],  # the last for want of its own @dataclass
    "cli": [Untyped()],
    "start": [StartsElsewhere(), ClaimsAnotherStart()],
    "gradients": [LeaksGradient(), attaching(Unused)],
    "base_unchanged": [WritesBase(), WritesBaseLater(), MasksGradients()],
    "training_has_effect": [attaching(Silent)],
    "weight_is_forward": [attaching(OtherForward), attaching(OtherGradient)],
    "merge": [attaching(OtherForward), attaching(NoMapOnAWeight)],
    "bf16": [attaching(Float32Output, targets=("4",))],
    "save_load": [attaching(ForgetsBuffer), attaching(DrawsOutsideTensors), RandomHosts()],
    "wrong_base": [HidesTheBase()],
    "remove": [LeavesHook(), LeavesAttribute(), WritesBase()],
    "meta": [attaching(ForgetsToReset)],
    "resume": [CountsOnItself(), attaching(ForgetsBuffer)],
    "deepcopy": [attaching(Closure)],
    "stacking": [attaching(IgnoresBelow)],
    "compile": [attaching(BreaksGraph)],
    "two_processes": [RankNoise()],
}
CHECKS = {c.name: c for c in testing.checks(processes=True)}
PLANTED = [(name, method) for name, methods in FAULTS.items() for method in methods]


def test_there_is_a_planted_fault_for_every_check() -> None:
    assert {*FAULTS, "hf"} == set(CHECKS)


@pytest.mark.parametrize(("name", "method"), PLANTED, ids=[f"{n}-{type(m).__name__}" for n, m in PLANTED])
def test_a_check_finds_the_fault_it_is_there_for(name: str, method: Method) -> None:
    with pytest.raises((Failed, ValueError)) as found:
        CHECKS[name](Case(method, mlp, batch()))
    raised_by_the_core = {"RandomHosts", "RankNoise", "WithNoMapOnAWeight"}  # io.load, the sentinel, merge
    assert "measured" in str(found.value) or type(method).__name__ in raised_by_the_core


def test_the_check_of_peft_s_format_finds_a_wrong_field(monkeypatch: pytest.MonkeyPatch) -> None:
    case, right = Case(LoRA(r=2), nets.bert, tokens()), LoRA.to_hf
    CHECKS["hf"](case)

    def wrong(self: LoRA, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fields, tensors = right(self, model)
        return fields | {"lora_alpha": 3 * fields["lora_alpha"]}, tensors

    monkeypatch.setattr(LoRA, "to_hf", wrong)
    with pytest.raises(Failed, match="after loading peft's folder"):
        CHECKS["hf"](case)


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(3, 23).view(4, 5), "labels": torch.tensor([0, 1, 2, 0])}


@pytest.mark.parametrize("name", [n for n in CHECKS if n != "hf"])
def test_a_check_passes_for_the_clean_twin(name: str) -> None:
    CHECKS[name](Case(Clean(), mlp, batch()))


@pytest.mark.parametrize("name", ["weight_is_forward", "merge", "bf16", "stacking", "compile"])
def test_the_default_forward_is_as_good_as_one_of_its_own(name: str) -> None:
    CHECKS[name](Case(attaching(DefaultForward), mlp, batch()))


# ---- the doors -----------------------------------------------------------------------------------------------------


def test_check_method_tells_every_failure_with_what_was_measured_and_allowed() -> None:
    with pytest.raises(testing.ConformanceError) as found:
        testing.check_method(attaching(OtherForward), mlp(), batch(), compile=False)
    lines = str(found.value).splitlines()
    assert lines[0].startswith("WithOtherForward(") and lines[0].endswith("checks failed")
    told = {line.split(":")[0].removeprefix("- ") for line in lines if line.startswith("- ")}
    assert {"weight_is_forward", "merge"} <= told
    below = lines[[line.split(":")[0] for line in lines].index("- merge") + 1]
    assert "merged against unmerged outputs: measured a difference of" in below and "allowed 1e-05" in below


def test_check_method_goes_on_after_a_method_that_raises() -> None:
    class Raises(Clean):
        def before_step(self, model: nn.Module, step: Step) -> None:
            raise RuntimeError("broken here")

    with pytest.raises(testing.ConformanceError) as found:
        testing.check_method(Raises(), mlp, batch(), compile=False)
    assert "RuntimeError: broken here" in str(found.value) and "- base_unchanged" in str(found.value)


@dataclass(frozen=True, kw_only=True)
class Shifts(Clean):
    __doc__ = Clean.__doc__
    traits = Traits(family="additive")

    def adapter(self, host: nn.Linear) -> Adapter:
        return NoMapOnAWeight(host)


def test_check_method_leaves_the_model_and_random_numbers_alone_and_says_what_it_skipped() -> None:
    model = mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    results = {r.check.name: r for r in testing.check_method(Shifts(), model, batch(), train=("4",), compile=False)}
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert {n for n, r in results.items() if r.outcome == "skipped"} == {"hf", "weight_is_forward"}
    assert results["weight_is_forward"].reason == "its adapters are no maps on a weight"
    assert results["merge"].outcome == "passed"  # refused, by name


def test_one_pytest_id_a_property_that_applies_and_known_failures_as_pytest_shows_them() -> None:
    known = {"merge": "its forward forgets the signs"}
    rows = [Row("mine", Clean, mlp, batch), Row("bad", lambda: attaching(OtherForward), mlp, batch, known=known)]
    params = {p.id: p for p in testing.parametrize_with_checks(rows, compile=False).mark.args[1]}
    assert "mine-save_load" in params and "bad-save_load" in params and "mine-compile" not in params
    assert len(params) == 2 * (len(testing.checks(compile=False)) - 1) and "mine-hf" not in params
    params["mine-merge"].values[0]()
    with pytest.raises(Failed):
        params["bad-merge"].values[0]()
    (mark,) = params["bad-merge"].marks
    assert mark.name == "xfail" and mark.kwargs == {"reason": known["merge"], "strict": True}
    assert not params["mine-merge"].marks
    with pytest.raises(ValueError, match="no check .'merged'"):
        testing.parametrize_with_checks([Row("mine", Clean, mlp, batch, known={"merged": ""})])


def test_a_model_with_adapters_is_no_base_to_test_on() -> None:
    model = mlp()
    inject(model, Clean())
    with pytest.raises(ValueError, match="untouched base"):
        testing.check_method(Clean(), model, batch())


def test_a_pattern_of_train_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="'head'"):
        testing.check_method(Clean(), mlp, batch(), train=("head",))
