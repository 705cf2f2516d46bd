"""Start-up and run-time checks, each through a real fit: what is wrong is said, what is healthy is not."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_peft_plugins.reparameterized.lora import LoRA
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import watch
from lightning_peft.adapter import WeightAdapter
from lightning_peft.attach import attach
from lightning_peft.callback import PEFT
from lightning_peft.find import find
from lightning_peft.inject import inject
from lightning_peft.method import Method, Step, Traits
from lightning_peft.preflight import check_trainer
from lightning_peft.quantize import quantize
from lightning_peft.sentinel import PEFTWarning, Sentinel
from tests.launch import launch
from tests.nets import trainer

BODY = ("body.0", "body.2")


class Net(LightningModule):
    """Two layers and a head; tests change single methods."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr = lr
        self.body: Any = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head: Any = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., list[str]]:
    """fit(module, peft, **Trainer) -> texts of the PEFTWarnings."""

    def run(module: Any, peft: Any, *, callbacks: tuple[Any, ...] | None = None, **kwargs: Any) -> list[str]:
        torch.manual_seed(1)
        data = TensorDataset(torch.randn(24, 8), torch.randint(2, (24,)))
        fitting = make_trainer(tmp_path, callbacks or (peft,), **kwargs)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitting.fit(module, DataLoader(data, 2))  # 12 batches an epoch
        return [str(w.message) for w in caught if issubclass(w.category, PEFTWarning)]

    return run


def make_trainer(root: Path, callbacks: Any = (), **options: Any) -> Any:
    return trainer(root, *callbacks, **({"max_epochs": 1} | options))


def peft(methods: Any = None, **kwargs: Any) -> PEFT:
    return PEFT(methods or LoRA(r=2, targets=("all-linear",)), **({"folder": None, "watch_steps": 4} | kwargs))


# ---- healthy runs -------------------------------------------------------------------------------------------------


class Skipping(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 0 else super().training_step(batch, batch_idx)


class Compiled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.net(x))


class CompiledLate(Net):
    def configure_model(self) -> None:
        self.body = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), backend="eager")


class WarmUp(Net):
    """The first step's learning rate is 0."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 8, 1))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Turns(Net):
    """Two optimizers, of which the second alone trains adapters, and only in every sixth batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        turn = int(batch_idx % 6 == 5)
        optimizers: Any = self.optimizers()
        optimizers[turn].zero_grad()
        x = self.body(batch[0])
        self.manual_backward(F.cross_entropy(self.head(x if turn else x.detach()), batch[1]))
        optimizers[turn].step()

    def configure_optimizers(self) -> Any:
        body = [p for p in self.body.parameters() if p.requires_grad]
        return torch.optim.SGD(self.head.parameters(), 0.1), torch.optim.SGD(body, 0.1)


@pytest.mark.parametrize(
    "module, options",
    [
        (Net, {}),
        (Net, {"precision": "bf16-mixed"}),
        (Net, {"precision": "bf16-true"}),
        (Net, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        (Net, {"max_steps": 1}),  # fewer than the watch: a LoRA's A has gradient 0 in the first step
        (Net, {"fast_dev_run": True}),
        (WarmUp, {}),
        (Skipping, {}),
        (Compiled, {}),
        (CompiledLate, {}),
    ],
)
def test_a_healthy_run_gives_no_warning(fit: Any, module: type[Net], options: dict[str, Any]) -> None:
    callback, net = peft(), module()
    assert fit(net, callback, **options) == []
    moved = [n for n, p in net.named_parameters() if n.endswith("lora.B") and p.abs().sum() > 0]
    assert len(moved) == (5 if module is Compiled else 3)
    assert callback.sentinel._done == min(4, options.get("max_steps", 4), 1 if "fast_dev_run" in options else 4)


def test_a_compiled_lightning_module_gives_no_warning(fit: Any) -> None:
    assert fit(torch.compile(Net(), backend="eager"), peft()) == []


def test_several_optimizers_may_take_turns(fit: Any) -> None:
    def turns(steps: int) -> list[str]:
        return fit(Turns(), peft(LoRA(r=2, targets=BODY), train=("head.*",), watch_steps=steps))

    assert turns(12) == []
    assert len(turns(4)) == 1  # a warning, where with one optimizer it would be sure and an error


def test_the_watch_ends(fit: Any) -> None:
    """After it nothing is kept and nothing looked at, also where a second fit starts it again."""
    callback = peft(watch_steps=2)
    net = Net()
    for _ in range(2):
        assert fit(net, callback) == []
        assert (callback.sentinel._done, callback.sentinel._seen) == (2, {})


# ---- nothing matched, optimizers ------------------------------------------------------------------------------------


def test_nothing_matched_is_an_error_before_training(fit: Any) -> None:
    net = Net()
    net.training_step = lambda *args: pytest.fail("trained")  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no .* matches 'bodi.0'; nearest: .*'body.0'"):
        fit(net, peft(LoRA(targets=("bodi.0",))))


class OwnOptimizers(Net):
    """Optimizers made in __init__, over copies, before there are adapters."""

    def __init__(self, count: int) -> None:
        super().__init__()
        copies = [p.detach().clone().requires_grad_() for p in self.parameters()]
        self.made = [torch.optim.SGD(copies, 0.1) for _ in range(count)]
        self.automatic_optimization = count == 1

    def configure_optimizers(self) -> Any:
        return self.made


def test_the_only_optimizer_adopts_adapters_it_lacks(fit: Any) -> None:
    net = OwnOptimizers(1)
    assert fit(net, peft()) == []
    assert net.body[0].adapters["lora"].B.abs().sum() > 0


def test_adapters_in_none_of_several_optimizers_are_an_error(fit: Any) -> None:
    with pytest.raises(ValueError, match="6 trainable tensors, first 'body.0.adapters.lora.A'.* none of the 2 optimi"):
        fit(OwnOptimizers(2), peft())


@dataclass(frozen=True, kw_only=True)
class Wrapping(LoRA):
    """Gives the optimizer other groups, made by ``groups(optimizer, parameters of the adapters)``."""

    name: str = "wrapping"
    kind: str = ""

    def wrap_optimizer(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        group = optimizer.param_groups[0]
        if self.kind == "drop":
            del group["params"][0]
        elif self.kind == "twice":
            optimizer.param_groups.append({**group, "params": group["params"][:1]})
        else:  # low-rank tensors stand in for the first adapter's
            group["params"][0] = nn.Parameter(torch.zeros_like(group["params"][0]))
        return optimizer

    def before_step(self, model: nn.Module, step: Step) -> None:
        if self.kind == "proxy":
            real = next(self.adapters(model))[2].A
            step.optimizers[0].param_groups[0]["params"][0].grad = real.grad

    def after_step(self, model: nn.Module, step: Step) -> None:
        if self.kind == "proxy":
            next(self.adapters(model))[2].A.data += step.optimizers[0].param_groups[0]["params"][0].data


def test_a_tensor_that_a_method_drops_from_the_optimizer_is_an_error(fit: Any) -> None:
    with pytest.raises(
        ValueError, match=r"1 trainable tensors, first 'body.0.adapters.wrapping.A'.*\['wrapping'\] drop"
    ):
        fit(Net(), peft(Wrapping(r=2, kind="drop")))


def test_a_tensor_in_two_groups_is_an_error(fit: Any) -> None:
    with pytest.raises(ValueError, match="'body.0.adapters.wrapping.A' stands more than once in .* AdamW"):
        fit(Net(), peft(Wrapping(r=2, kind="twice")))


def test_tensors_that_stand_in_for_trainable_ones_are_allowed(fit: Any) -> None:
    assert fit(Net(), peft(Wrapping(r=2, kind="proxy"))) == []


# ---- gradients ------------------------------------------------------------------------------------------------------


class NoGrad(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.body(x)
        return self.head(x)


def test_no_gradient_for_any_adapter_is_an_error_in_the_first_step(fit: Any) -> None:
    net = NoGrad()
    with pytest.raises(ValueError, match=r"none of the 4 tensors of \['lora'\], first 'body.0.*no_grad.*use_reentrant"):
        fit(net, peft(LoRA(r=2, targets=BODY), train=("head.*",), watch_steps=100))
    assert torch.equal(net.head.weight, Net().head.weight)  # not one step was made


class Bypassing(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body[2](F.linear(x, self.body[0].weight)))


def test_no_gradient_for_one_adapter_is_an_error_at_the_end_of_the_watch(fit: Any) -> None:
    callback = peft(LoRA(r=2, targets=("body.0", "head")))
    with pytest.raises(
        ValueError, match="'body.0.adapters.lora.A', 'body.0.adapters.lora.B' in 4 optimizer steps: .*byp"
    ):
        fit(Bypassing(), callback)
    assert callback.sentinel._done == 4


class UnusedPooler(Net):
    def __init__(self) -> None:
        super().__init__()
        self.pooler = nn.Linear(8, 8)


def test_a_single_unused_layer_of_a_role_is_a_warning_that_says_how_to_leave_it_out(fit: Any) -> None:
    (text,) = fit(UnusedPooler(), peft(LoRA(r=2, targets=("all-linear",))))
    assert "'pooler.adapters.lora.A', 'pooler.adapters.lora.B'" in text and "left out" in text


def test_a_fit_shorter_than_the_watch_is_judged_at_its_end(fit: Any) -> None:
    with pytest.raises(ValueError, match="no gradient reached 'body.0.adapters.lora.A'.* in 3 optimizer steps"):
        fit(Bypassing(), peft(LoRA(r=2, targets=("body.0", "head"))), max_steps=3)


def test_zero_watch_steps_switch_the_watch_off(fit: Any) -> None:
    assert fit(Bypassing(), peft(LoRA(r=2, targets=("body.0", "head")), watch_steps=0)) == []


class Experts(Net):
    """``used(batch_idx)`` chooses one of three experts."""

    def __init__(self, used: Callable[[int], int]) -> None:
        super().__init__()
        self.used = used
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.head(self.experts[self.used(batch_idx)](batch[0])), batch[1])


def test_an_unused_branch_among_used_ones_is_a_warning(fit: Any) -> None:
    method = LoRA(r=2, targets=("experts.*", "head"))
    text = fit(Experts(lambda i: i % 2), peft(method))
    assert len(text) == 1 and "'experts.2.adapters.lora.A', 'experts.2.adapters.lora.B' in 4 optimizer" in text[0]
    with pytest.raises(ValueError, match="no gradient reached 'experts.0.adapters.lora.A'.* and 1 more in 4"):
        fit(Experts(lambda i: 2), peft(method))  # most of the branches are never used


def test_a_branch_that_is_used_now_and_then_is_healthy(fit: Any) -> None:
    assert fit(Experts(lambda i: i % 3), peft(LoRA(r=2, targets=("experts.*", "head")))) == []


def test_a_base_parameter_without_gradient_is_a_warning(fit: Any) -> None:
    net = Net()
    net.spare = nn.Linear(8, 8)
    text = fit(net, peft(LoRA(r=2, targets=BODY), train=("head.*", "spare.*")))
    assert len(text) == 1 and "no gradient reached 'spare.weight', 'spare.bias' in 4 optimizer steps" in text[0]


class ZeroAdapter(WeightAdapter):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.A, self.B = (nn.Parameter(torch.zeros(size, size)) for _ in range(2))

    def weight(self, W: Tensor) -> Tensor:
        return W + self.A @ self.B


@dataclass(frozen=True, kw_only=True)
class Zero(Method):
    """Two factors that both start at zero never leave it."""

    traits = Traits(family="reparameterized")
    name: str = "zero"

    def inject(self, model: nn.Module, stats: Any = None) -> None:
        for _, host in find(model, ("body.0",)):
            attach(host, self.name, ZeroAdapter(8))


def test_gradients_that_stay_zero_are_a_warning(fit: Any) -> None:
    text = fit(Net(), peft([Zero(), LoRA(r=2, targets=("head",))]))
    assert len(text) == 1 and "the gradient of 'body.0.adapters.zero' was exactly zero in 4 optimizer steps" in text[0]


# ---- movement -------------------------------------------------------------------------------------------------------


def test_a_learning_rate_of_zero_in_the_whole_watch_is_a_warning(fit: Any) -> None:
    text = fit(Net(lr=0.0), peft(watch_steps=3))
    assert len(text) == 1 and "did not move in 3 optimizer steps: the learning rate was 0 in all of them" in text[0]
    assert "'body.0.adapters.lora.B', 'body.2.adapters.lora.B', 'head.adapters.lora.B'" in text[0]  # A: gradient 0


class Idle(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return closure()


def test_tensors_that_do_not_move_are_a_warning(fit: Any) -> None:
    net = Net()
    net.configure_optimizers = lambda: Idle([p for p in net.parameters() if p.requires_grad], 0.1)  # type: ignore
    text = fit(net, peft())
    assert len(text) == 1 and "did not move in 4 optimizer steps though gradients came" in text[0]


def test_a_step_that_rounds_away_is_a_warning(fit: Any) -> None:
    """Near 0.1 the numbers of bfloat16 lie 5e-4 apart."""
    net = Net()
    net.configure_optimizers = lambda: torch.optim.AdamW(net.parameters(), 1e-5, weight_decay=0)  # type: ignore

    class Tenths(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            for p in pl_module.parameters():
                p.data.fill_(0.1) if p.requires_grad else p

    callback = peft(dtype="bfloat16")
    text = fit(net, callback, callbacks=(callback, Tenths()), precision="bf16-true")
    assert len(text) == 1 and "'body.0.adapters.lora.A', 'body.0.adapters.lora.B'" in text[0]


def test_what_was_seen_is_the_most_of_all_steps() -> None:
    seen = watch.Seen("w", torch.Size([2]), torch.tensor(0))
    for grad, rate in ((torch.tensor([0.0, -3.0]), 0.1), (torch.tensor([1.0, 0.0]), 0.0), (None, 0.0)):
        seen.note(grad, rate)
    assert (seen.gradients, seen.rate, seen.largest) == (2, 0.1, torch.tensor(3.0))
    sparse = watch.Seen("e", torch.Size([2]), torch.tensor(0))
    sparse.note(torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([2.0]), (4,), check_invariants=False), 0.1)
    sparse.note(torch.zeros(0, 3), 0.1)  # a rank of 0
    assert sparse.largest == 2


# ---- ranks ----------------------------------------------------------------------------------------------------------


def signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def exact_digest(values: list[int], chunk: int) -> int:
    total = 0
    for start in range(0, len(values), chunk):
        places = [signed((i + 1) * watch.GOLDEN) for i in range(chunk)]
        part = zip(values[start : start + chunk], places, strict=False)
        total = total * 31 + sum(value * (place ^ (place >> 32)) for value, place in part)
    return signed(total)


def test_digest_is_the_weighted_sum_of_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "CHUNK", 4)
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float64, torch.int64)):
        t = torch.randn(2, 5, dtype=dtype).T  # not contiguous
        assert watch.digest(t).item() == exact_digest(t.contiguous().view(bits).flatten().tolist(), 4)
    assert watch.digest(torch.zeros(0, 3)) == 0
    assert watch.digest(torch.tensor(2.0)) == exact_digest([0x40000000], 4)


def test_digest_tells_order_signs_and_last_bits() -> None:
    t = torch.tensor([1.0, 2.0, -3.0])
    others = [t.flip(0), -t, torch.nextafter(t, t + 1), t.roll(1)]
    assert len({int(watch.digest(x)) for x in [t, *others]}) == 5


@dataclass(frozen=True, kw_only=True)
class Noisy(LoRA):
    """Adds random numbers after each step, which differ between ranks where ``own`` is set."""

    own: bool = False

    def after_step(self, model: nn.Module, step: Step) -> None:
        torch.manual_seed(step.index + self.own * torch.distributed.get_rank())
        for _, _, adapter in list(self.adapters(model))[1:]:
            adapter.A.data += 1e-6 * torch.randn_like(adapter.A)


class Shifted(Net):
    def on_train_start(self) -> None:
        self.body[0].adapters["lora"].B.data += self.global_rank


def fit_in_two_processes(root: Path) -> list[Any]:
    """For each of four fits: the error, or the texts of the warnings."""
    out: list[Any] = []
    data = DataLoader(TensorDataset(torch.randn(16, 8), torch.randint(2, (16,))), 2)  # 4 steps on each rank
    for net, method, own in ((Net, LoRA, {}), (Net, Noisy, {}), (Net, Noisy, {"own": True}), (Shifted, LoRA, {})):
        ddp = make_trainer(root, [peft(method(r=2, **own), watch_steps=2)], strategy="ddp", devices=2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                ddp.fit(net(), data)
                out.append([str(w.message) for w in caught if issubclass(w.category, PEFTWarning)])
            except ValueError as error:
                out.append(f"{ddp.global_step}: {error}")
    return out


@pytest.mark.slow
def test_ranks_that_differ_are_an_error(tmp_path: Path) -> None:
    ranks = launch(fit_in_two_processes, 2, root=tmp_path)
    assert ranks[0] == ranks[1]  # all stop, none is left waiting
    healthy, seeded_alike, noisy, shifted = ranks[0]
    assert healthy == seeded_alike == []
    assert noisy.startswith("2: 'body.2.adapters.lora.A'") and "differ between ranks after 2 optimizer steps" in noisy
    assert shifted.startswith("0: 'body.0.adapters.lora.B' differ between ranks before the first optimizer step")


# ---- heads ----------------------------------------------------------------------------------------------------------


def sequence_classifier(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "vit":
        config = transformers.ViTConfig(**small, image_size=4, patch_size=2, num_channels=1)
        return transformers.ViTForImageClassification(config)
    config = transformers.BertConfig(**small, vocab_size=16, max_position_embeddings=8)
    return transformers.BertForSequenceClassification(config)


class Classifier(Net):
    """A transformers model on made-up inputs."""

    def __init__(self, kind: str = "bert") -> None:
        super().__init__()
        del self.body, self.head
        self.kind, self.model = kind, sequence_classifier(kind)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, labels = batch
        if self.kind == "vit":
            return self.model(x.repeat(1, 2).view(-1, 1, 4, 4), labels=labels).loss
        return self.model(x.abs().mul(4).long().clamp(max=15), labels=labels).loss


def test_a_frozen_head_of_a_transformers_model_is_a_warning(fit: Any) -> None:
    text = fit(Classifier(), peft())
    assert len(text) == 1 and text[0].endswith("PEFT(..., train=('model.classifier.*',))")
    assert fit(Classifier(), peft(train=("model.classifier.*",))) == []


def test_a_frozen_head_of_a_plain_module_is_a_warning(fit: Any) -> None:
    text = fit(Net(), peft(LoRA(r=2, targets=BODY)))
    assert len(text) == 1 and text[0].endswith("PEFT(..., train=('head.*',))")


@pytest.mark.parametrize("options", [{"train": ("head.*",)}, {"model": "body"}, {"methods": LoRA(r=2)}])
def test_a_head_that_trains_or_is_adapted_or_out_of_scope_is_silent(fit: Any, options: dict[str, Any]) -> None:
    method = LoRA(r=2, targets=("0", "2") if "model" in options else BODY)
    assert fit(Net(), peft(**({"methods": method} | options))) == []


def test_a_head_that_the_user_froze_outside_the_scope_is_silent(fit: Any) -> None:
    net = Net()
    net.head.requires_grad_(False)
    assert fit(net, peft(LoRA(r=2, targets=("0", "2")), model="body")) == []


def test_a_head_tied_to_the_body_is_silent(fit: Any) -> None:
    net = Net()
    net.head = nn.Linear(8, 8)
    net.head.weight = net.body[0].weight
    assert fit(net, peft(LoRA(r=2, targets=("body.2",)))) == []


# ---- gradient checkpointing -----------------------------------------------------------------------------------------


def reach(net: Any) -> bool:
    """Whether the first block's adapter gets a gradient: the truth that the check foretells."""
    net.train()
    loss = net.training_step((torch.randn(2, 8), torch.zeros(2, dtype=torch.long)), 0)
    loss.backward()
    first = next(p for n, p in net.named_parameters() if ".adapters." in n and ("layer.0" in n or "layers.0" in n))
    found = first.grad is not None
    net.zero_grad()
    return found


def checkpointing(net: Any, reentrant: bool) -> None:
    enable = getattr(net.model, "activation_checkpointing_enable", net.model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})


CHECKPOINTED = {
    "vit reentrant": ("vit", True, lambda net: None, ("all-linear",), False),
    "vit": ("vit", False, lambda net: None, ("all-linear",), True),
    "vit with input gradients": (
        "vit",
        True,
        lambda net: net.model.enable_input_require_grads(),
        ("all-linear",),
        True,
    ),
    "vit with adapted patches": ("vit", True, lambda net: None, ("all-linear", "projection"), True),
    "bert reentrant": ("bert", True, lambda net: net.model.disable_input_require_grads(), ("all-linear",), False),
    "bert": ("bert", True, lambda net: net.model.enable_input_require_grads(), ("all-linear",), True),
}


@pytest.mark.parametrize("case", CHECKPOINTED)
def test_gradient_checkpointing_that_cuts_the_graph_is_an_error(fit: Any, case: str) -> None:
    kind, reentrant, prepare, targets, trains = CHECKPOINTED[case]
    head, method = ("model.classifier.*",), LoRA(r=2, targets=targets)
    nets = [Classifier(kind), Classifier(kind)]
    for net in nets:
        checkpointing(net, reentrant)
        prepare(net)
    inject(nets[0], method, train=head)
    assert reach(nets[0]) is trains
    if trains:
        assert fit(nets[1], peft(method, train=head)) == []
    else:
        with pytest.raises(
            ValueError, match=r'graph at .*layers?\.0.*"use_reentrant": False.* or enable_input_require'
        ):
            fit(nets[1], peft(method, train=head))


# ---- averaging callbacks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [WeightAveraging, EMAWeightAveraging])
def test_averaging_that_cannot_be_resumed_is_refused(fit: Any, average: type[Callback]) -> None:
    callback = peft()
    with pytest.raises(ValueError, match=f"{average.__name__} wants the whole model.*StochasticWeightAveraging works"):
        fit(Net(), callback, callbacks=(callback, average()))


def test_stochastic_weight_averaging_works_after_peft_and_says_what_it_costs(fit: Any) -> None:
    seen: list[Tensor] = []

    class Snap(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(pl_module.get_parameter("body.0.adapters.lora.B").detach().clone())

    net, callback = Net(), peft()
    average = StochasticWeightAveraging(1e-2, swa_epoch_start=2)
    text = fit(net, callback, callbacks=(callback, average, Snap()), max_epochs=4)
    assert len(text) == 1 and "StochasticWeightAveraging holds a copy of the whole model" in text[0]
    torch.testing.assert_close(net.body[0].adapters["lora"].B.detach(), torch.stack(seen[1:]).mean(0))


def test_stochastic_weight_averaging_before_peft_is_refused(fit: Any) -> None:
    callback = peft()
    with pytest.raises(ValueError, match="copied the module before it had its adapters: list PEFT before it"):
        fit(Net(), callback, callbacks=(StochasticWeightAveraging(1e-2), callback))


def test_stochastic_weight_averaging_of_changing_shapes_is_refused(fit: Any) -> None:
    callback = peft(Wrapping(r=2, kind="proxy"))
    with pytest.raises(ValueError, match=r"averages tensors of one shape, and \['wrapping'\] may change"):
        fit(Net(), callback, callbacks=(callback, StochasticWeightAveraging(1e-2)))


# ---- precision plugins and strategies -------------------------------------------------------------------------------


def prepared(root: Path, strategy: Any = None, plugin: Any = None) -> Any:
    """A Trainer as at the start of a fit, with a part that this machine could not run."""
    made = make_trainer(root, [peft()])
    made.state.fn = TrainerFn.FITTING
    if strategy is not None:
        made._accelerator_connector.strategy = strategy
    if plugin is not None:
        made.strategy._precision_plugin = plugin
    return made


def test_a_plugin_that_quantises_adapted_layers_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plugin = BitsandbytesPrecision("nf4", dtype=torch.bfloat16)
    made, net = prepared(tmp_path, plugin=plugin), Net()
    with pytest.raises(ValueError, match=r"quantise first, lightning_peft.quantize\(model, 'nf4'\)"):
        made.fit(net, [])
    quantised = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 2))
    quantize(quantised, "nf4", blocksize=32)
    assert check_trainer(made, quantised, [LoRA()], False) == []  # the plugin leaves such a model alone
    assert check_trainer(made, nn.Module(), [LoRA()], False) == []  # and quantises what configure_model will make


def test_the_check_holds_where_lightning_converts(tmp_path: Path) -> None:
    """What the plugin does to an adapted layer, and that the start of the fit notices."""
    pytest.importorskip("bitsandbytes")
    net = Net()
    inject(net, LoRA(r=2))
    BitsandbytesPrecision("nf4").convert_module(net)
    assert not any("adapters" in n for n, _ in net.named_modules())
    with pytest.raises(ValueError, match="nothing is left to train"):
        Sentinel([LoRA(r=2)], 4).check_model(prepared(tmp_path), net, net)


def test_a_plugin_that_replaces_layers_is_refused(tmp_path: Path) -> None:
    plugin = object.__new__(TransformerEnginePrecision)
    plugin.replace_layers = None
    with pytest.raises(ValueError, match="TransformerEnginePrecision would replace"):
        check_trainer(prepared(tmp_path, plugin=plugin), Net(), [LoRA()], False)
    plugin.replace_layers = False
    assert check_trainer(prepared(tmp_path, plugin=plugin), Net(), [LoRA()], False) == []


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, XLAStrategy])
def test_strategies_that_do_not_work_are_refused_by_name(tmp_path: Path, strategy: Any) -> None:
    made = prepared(tmp_path, object.__new__(strategy))
    made.state.fn = TrainerFn.VALIDATING
    with pytest.raises(ValueError, match=f"{strategy.__name__}.*strategy='ddp', and ModelParallelStrategy"):
        check_trainer(made, Net(), [LoRA()], False)


def test_a_sharded_strategy_takes_neither_changing_shapes_nor_a_merge(tmp_path: Path) -> None:
    made = prepared(tmp_path, ModelParallelStrategy())
    assert check_trainer(made, Net(), [LoRA()], False) == []
    with pytest.raises(ValueError, match=r"\['wrapping'\] may change the shapes.*ModelParallelStrategy cannot follow"):
        check_trainer(made, Net(), [LoRA(), Wrapping()], False)
    with pytest.raises(ValueError, match="ModelParallelStrategy shards them: .*`lightning-peft merge`"):
        check_trainer(made, Net(), [LoRA()], True)
    made.state.fn = TrainerFn.TESTING
    assert check_trainer(made, Net(), [Wrapping()], True) == []


def test_worker_processes_that_keep_the_adapters_are_a_warning(tmp_path: Path) -> None:
    strategy = DDPStrategy()
    made = prepared(tmp_path, strategy)
    assert check_trainer(made, Net(), [LoRA()], False) == []
    strategy._launcher = _MultiProcessingLauncher(strategy, start_method="fork")
    (text,) = check_trainer(made, Net(), [LoRA()], False)
    assert "will not have the adapters afterwards: use strategy='ddp', or lightning_peft.load(model, folder)" in text


def test_peft_tells_its_sentinel_of_the_merge() -> None:
    assert PEFT(LoRA(), merge_at_end=True).sentinel.merge_at_end is True
