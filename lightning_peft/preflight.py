"""Start-up checks of a fit: what cannot work with adapters is refused before training, by name.

The check functions raise ValueError for what cannot work and return texts to warn with for what may not be meant.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn

from lightning_peft import arch, quant, strategies
from lightning_peft.attach import attached, modules
from lightning_peft.inject import find_record
from lightning_peft.method import Method

SUPPORTED = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)
REFUSED = (DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy)  # subclasses of those in name only
REASONS = {"FSDPStrategy": "FSDP1 flattens frozen and trained weights into one tensor"}


def check_trainer(trainer: Trainer, pl_module: nn.Module, methods: Sequence[Method], merge_at_end: bool) -> list[str]:
    """Before injection: clashes with strategies, precision plugins and callbacks.

    Raises:
        ValueError: for what cannot work.
    """
    fit = trainer.state.fn == "fit"
    _check_strategy(trainer, methods if fit else (), merge_at_end and fit)
    _check_precision(trainer.precision_plugin, pl_module)
    _check_passes(trainer, pl_module, overriding(methods, "after_backward") if fit else [])
    return [*_check_averaging(trainer, methods), *_spawned(trainer)] if fit else []


def check_model(trainer: Trainer, pl_module: nn.Module, model: nn.Module, methods: Sequence[Method]) -> list[str]:
    """At the start of a fit, optimizers built: coverage, averaged copies, gradient checkpointing, frozen heads.

    Raises:
        ValueError: for what cannot work.
    """
    if find_record(model) is None or not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "nothing is left to train: the layers with their adapters were replaced after injection, as by a plugin "
            "that converts layers; convert the model first and fit without that plugin"
        )
    _check_optimizers(trainer, pl_module, model, methods)
    _check_averaged_copy(trainer, pl_module)
    _check_checkpointing(pl_module)
    return _frozen_heads(pl_module, model)


def overriding(methods: Sequence[Method], verb: str) -> list[str]:
    """Names of the methods that fill in an optional verb of the contract."""
    return [m.name for m in methods if getattr(type(m), verb) is not getattr(Method, verb)]


def _check_strategy(trainer: Trainer, methods: Sequence[Method], merge_at_end: bool) -> None:
    strategy = trainer.strategy
    name = type(strategy).__name__
    if not isinstance(strategy, SUPPORTED) or isinstance(strategy, REFUSED):
        raise ValueError(
            f"PEFT does not support {name} ({REASONS.get(name, 'not tested with adapters')}); use one device or "
            "strategy='ddp', and ModelParallelStrategy() (FSDP2) where the model must be sharded"
        )
    if not strategies.can_change_shapes(trainer) and (changing := overriding(methods, "after_step")):
        raise ValueError(
            f"{changing} may change the shapes of parameters during the fit (after_step), which {name} cannot follow: "
            "use one device or strategy='ddp'"
        )
    if merge_at_end and strategies.shards(trainer):
        raise ValueError(
            f"merge_at_end=True needs whole weights in each process, and {name} shards them: fit without it and merge "
            "the adapter folder afterwards with `lightning-peft merge`"
        )


def _spawned(trainer: Trainer) -> list[str]:
    if not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        return []
    return [
        "this strategy trains in worker processes, and the module in this process will not have the adapters "
        "afterwards: use strategy='ddp', or lightning_peft.load(model, folder) with the folder that the fit writes"
    ]


def _check_precision(plugin: Any, pl_module: nn.Module) -> None:
    linear = [m for m in pl_module.modules() if isinstance(m, nn.Linear)]
    if isinstance(plugin, BitsandbytesPrecision) and linear and not any(quant.kind(m) for m in linear):
        raise ValueError(
            "BitsandbytesPrecision would replace the linear layers after injection and drop their adapters: quantise "
            "first, lightning_peft.quantize(model, 'nf4'), and fit without this plugin"
        )
    if isinstance(plugin, TransformerEnginePrecision) and plugin.replace_layers is not False:
        raise ValueError(
            "TransformerEnginePrecision would replace the linear layers after injection and drop their adapters: use "
            "precision='bf16-mixed', or TransformerEnginePrecision(..., replace_layers=False)"
        )


def _check_passes(trainer: Trainer, pl_module: Any, owners: list[str]) -> None:
    if not owners:
        return
    if len(owners) > 1:
        raise ValueError(f"{owners} each make the gradient in several passes of their own (after_backward): keep one")
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"{owners} run training_step several times a batch, which cannot be done under the manual optimization of "
            f"{type(pl_module).__name__}: leave automatic_optimization on"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f"{owners} combine gradients of several passes, and precision='16-mixed' scales these: use 'bf16-mixed' or "
            "'32-true'"
        )
    if strategies.shards(trainer):
        raise ValueError(
            f"{owners} move whole weights between passes, and {type(trainer.strategy).__name__} shards them: use one "
            "device or strategy='ddp'"
        )


def _callbacks(trainer: Any) -> list[Any]:
    return trainer.callbacks


def _check_averaging(trainer: Trainer, methods: Sequence[Method]) -> list[str]:
    texts = []
    for callback in _callbacks(trainer):
        name = type(callback).__name__
        if isinstance(callback, WeightAveraging):
            raise ValueError(
                f"{name} wants the whole model in every checkpoint, where only the adapters are: its fit could not be "
                "resumed. StochasticWeightAveraging works, listed after PEFT"
            )
        if isinstance(callback, StochasticWeightAveraging):
            if changing := overriding(methods, "after_step"):
                raise ValueError(
                    f"{name} averages tensors of one shape, and {changing} may change shapes: leave it out"
                )
            texts.append(
                f"{name} holds a copy of the whole model, in memory and in every checkpoint: files will hold the "
                "frozen base beside the adapters"
            )
    return texts


def _check_averaged_copy(trainer: Trainer, pl_module: nn.Module) -> None:
    """StochasticWeightAveraging pairs parameters by position, with a copy it makes in its own setup."""
    names = [n for n, _ in pl_module.named_parameters()]
    for callback in _callbacks(trainer):
        if not isinstance(callback, StochasticWeightAveraging) or callback._average_model is None:
            continue
        if [n for n, _ in callback._average_model.named_parameters()] != names:
            raise ValueError(
                f"{type(callback).__name__} copied the module before it had its adapters: list PEFT before it in "
                "Trainer(callbacks=[...]) and build the model in __init__"
            )


def _check_optimizers(trainer: Trainer, pl_module: nn.Module, model: nn.Module, methods: Sequence[Method]) -> None:
    names = {p: n for n, p in pl_module.named_parameters()}
    held: set[nn.Parameter] = set()
    for optimizer in trainer.optimizers:
        counts = Counter(p for group in optimizer.param_groups for p in group["params"])
        if twice := [names.get(p, "a tensor outside the module") for p, n in counts.items() if n > 1]:
            raise ValueError(
                f"{twice[0]!r} stands more than once in the parameter groups of {type(optimizer).__name__} and would "
                "move more than once a step: let each parameter be in one group"
            )
        held |= set(counts)
    missing = [names[p] for p in model.parameters() if p.requires_grad and p not in held]
    wrapping = overriding(methods, "wrap_optimizer")
    stands_in = bool(wrapping) and any(p not in names for p in held)  # GaLore steps low-rank tensors in their place
    if missing and not stands_in:
        raise ValueError(
            f"{len(missing)} trainable tensors, first {missing[0]!r}, are in no optimizer and would not train: "
            + (f"wrap_optimizer of {wrapping} dropped them" if wrapping else "return them from configure_optimizers")
        )


def _frozen_heads(pl_module: nn.Module, model: nn.Module) -> list[str]:
    inside = {id(m) for m in model.modules()}
    frozen = [n for n in arch.heads(pl_module) if id(pl_module.get_submodule(n)) in inside and _frozen(pl_module, n)]
    if not frozen:
        return []
    train = tuple(f"{n}.*" for n in frozen)
    return [
        f"{frozen} stay frozen with the values they have; where these are new, train them: PEFT(..., train={train})"
    ]


def _frozen(pl_module: nn.Module, head: str) -> bool:
    """True where a matrix of the head neither trains nor has an adapter nor is tied to the body."""
    own = {id(m) for m in pl_module.get_submodule(head).modules()}
    body = {id(p) for m in pl_module.modules() if id(m) not in own for p in m.parameters(recurse=False)}
    return any(
        not p.requires_grad and p.dim() > 1 and id(p) not in body
        for _, m in modules(pl_module.get_submodule(head))
        if not attached(m)
        for p in m.parameters(recurse=False)
    )


def _check_checkpointing(pl_module: nn.Module) -> None:
    """Reentrant checkpoints give outputs without a gradient where no input needs one, whatever is inside."""
    named = dict(modules(pl_module))
    flagged = [n for n, m in named.items() if _reentrant(m)]
    layers = [n for n in flagged if not any(n in ("", *arch.parents(o)) for o in flagged if o != n)]
    inside = [p for n in layers for p in named[n].parameters()]
    if not any(p.requires_grad for p in inside) or _gradient_may_enter(named, layers[0], arch.heads(pl_module)):
        return
    owner = next((named[n] for n in arch.parents(layers[0]) if hasattr(named[n], "enable_input_require_grads")), None)
    verb = "activation" if hasattr(owner, "activation_checkpointing_enable") else "gradient"
    raise ValueError(
        f"gradient checkpointing with use_reentrant=True cuts the graph at {layers[0]!r}: its inputs need no gradient, "
        f"so no adapter inside would train. Call {verb}_checkpointing_enable({verb}_checkpointing_kwargs="
        '{"use_reentrant": False}) or enable_input_require_grads() on the model'
    )


def _reentrant(module: Any) -> bool:
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    if not getattr(module, "gradient_checkpointing", False) or not isinstance(checkpoint, functools.partial):
        return False
    return checkpoint.keywords.get("use_reentrant", True) in (True, None)  # torch's default is True


def _gradient_may_enter(named: dict[str, Any], layer: str, heads: list[str]) -> bool:
    """True where the input of ``layer`` may need a gradient.

    It may where something trains, or a hook changes an output, in modules that come earlier in the layer's own network
    or lie outside of it and are no heads.
    """
    around, network, reached = {"", *arch.parents(layer)}, layer.partition(".")[0], False
    for name, module in named.items():
        reached |= name == layer
        outside = name.partition(".")[0] != network and not any(h in (name, *arch.parents(name)) for h in heads)
        if reached and not outside:
            continue
        own = [*module.parameters(recurse=False), *(p for a in attached(module).values() for p in a.parameters())]
        if any(p.requires_grad for p in own) or (module._forward_hooks and name not in around):
            return True
    return False
