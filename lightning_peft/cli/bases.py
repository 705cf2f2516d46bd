"""Make the base model of an adapter folder or checkpoint again, and put the adapters on it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from lightning_peft import io
from lightning_peft.cli import runs
from lightning_peft.inject import RECORD, find_record
from lightning_peft.models.source import resolve
from lightning_peft.proof import Call, captured
from lightning_peft.quantize import quantize


@dataclass(frozen=True)
class Adapted:
    """A base with its adapters.

    Args:
        root: LightningModule, transformers model, or plain module that holds one; runs the base.
        target: the module within it that methods were injected into.
        base: where the base came from, for messages.
    """

    root: nn.Module
    target: nn.Module
    base: str

    def transformer(self) -> Any:
        """The transformers model that holds every adapter, None where there is none."""
        inner = (m for m in self.target.modules() if isinstance(m, transformers.PreTrainedModel))
        return next(inner, None)


def rebuild(source: Path, model: str | None = None, config: Path | None = None) -> Adapted:
    """The base of ``source``, with what ``source`` holds injected and loaded.

    Args:
        source: adapter folder or training checkpoint.
        model: folder or name of a transformers model to take as the base.
        config: config.yaml of the run, whose `model:` is the base. With neither, the config.yaml of the run that
            ``source`` lies in, or else the transformers model that ``source`` names.

    Raises:
        FileNotFoundError, ValueError: no such file, damaged, or a base that is missing or another one.
    """
    about = _about(source)
    if config is None and model is None and (run := runs.of_checkpoint(source)):
        config = run.folder / runs.CONFIG
    if config is not None:
        root, scope, base = *from_config(config, about), runs.short(config)
    else:
        root, base = from_transformers(model, about, source)
        scope = about.get("scope", "")
    target = root.get_submodule(scope)
    if source.is_dir():
        io.load(target, source)
    else:
        io.restore(root, source)  # pyright: ignore[reportArgumentType]  # a plain module holds the transformer as well
    return Adapted(root.eval(), target, base)


def _about(source: Path) -> dict[str, Any]:
    if source.is_dir():
        return io.read_folder(source)[0]
    if not source.is_file():
        raise FileNotFoundError(f"no adapter folder or checkpoint at {source}{runs.nearest_file(source)}")
    checkpoint = io.read_checkpoint(source)
    return checkpoint[io.KEY] | {"hyper_parameters": checkpoint.get("hyper_parameters", {})}


def from_config(file: Path, about: dict[str, Any]) -> tuple[LightningModule, str]:
    """(the LightningModule that `model:` of a config.yaml describes, the name of what was injected into)."""
    if not file.is_file():
        raise FileNotFoundError(f"no config file at {file}")
    given = yaml.safe_load(file.read_text()) or {}
    if not isinstance(given.get("model"), dict):
        raise ValueError(f"{file} has no section `model:` with a class_path, so it does not say what the base is")
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    options: Any = parser.parse_object({"model": given["model"]})
    known = dict(about.get("hyper_parameters", {}))
    if labels := (about.get("pretrained") or {}).get("labels"):
        known.setdefault("label_names", labels)
    for name, value in options.model.init_args.items():
        if value is None and name in known:
            options.model.init_args[name] = known[name]
    if (seed := given.get("seed_everything", False)) is not False:
        seed_everything(seed, verbose=False)  # as the run did, for a base that starts from random weights
    module = parser.instantiate_classes(options)["model"]
    module.configure_model()
    if given.get("quantize"):
        quantize(module, given["quantize"])
    return module, about.get("scope", given.get("peft", {}).get("model", ""))


def from_transformers(model: str | None, about: dict[str, Any], source: Path) -> tuple[nn.Module, str]:
    """(the transformers model in its place below plain modules, its name)."""
    origin = about.get("pretrained")
    if origin is None:
        raise ValueError(
            f"{source} was not trained on a transformers model: give --config config.yaml of its run, or in Python use "
            "lightning_peft.load or restore on your module, then lightning_peft.merge"
        )
    cls = getattr(transformers, origin["class"], None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"{source} was trained on a {origin['class']}, which the installed transformers does not have")
    name = model or origin["source"]
    labels = dict(enumerate(origin["labels"]))
    options = {"id2label": labels, "label2id": {v: k for k, v in labels.items()}} if labels else {}
    made = cls.from_pretrained(resolve(name), dtype=torch.float32, **options)
    path = ".".join(p for p in (about.get("scope", ""), origin["at"]) if p)
    return _below(path, made), name


def _below(path: str, module: nn.Module) -> nn.Module:
    """A plain module with ``module`` at the dotted name ``path``; ``module`` itself for an empty one."""
    for part in reversed(path.split(".") if path else []):
        outer = nn.Module()
        outer.add_module(part, module)
        module = outer
    return module


def move_record(adapted: Adapted) -> nn.Module:
    """The transformers model as if methods had been injected right into it, which is how huggingface/peft names things.

    Raises:
        ValueError: there is none.
    """
    inner = adapted.transformer()
    if inner is None:
        raise ValueError(
            f"huggingface/peft wraps a transformers model, but this {type(adapted.target).__name__} has none"
        )
    if inner is not adapted.target:
        held = find_record(adapted.target)
        assert held is not None
        prefix = next(f"{n}." for n, m in adapted.target.named_modules() if m is inner)
        own = {
            "train": tuple(n.removeprefix(prefix) for n in held[1].train),
            "base": {n.removeprefix(prefix): v for n, v in held[1].base.items()},
            "trainable_before": tuple(n.removeprefix(prefix) for n in held[1].trainable_before),
        }
        setattr(inner, RECORD, replace(held[1], **own))
        delattr(adapted.target, RECORD)
    return inner


@torch.no_grad()
def example_calls(adapted: Adapted) -> list[Call]:
    """Calls of the adapted part on made-up inputs: random tokens (2, 16), random images, or `example_input_array`.

    Raises:
        ValueError: nothing says what the model takes.
    """
    inner, example = adapted.transformer(), getattr(adapted.root, "example_input_array", None)
    with captured(adapted.target) as calls:
        if example is not None:
            adapted.root(*example) if isinstance(example, tuple) else adapted.root(example)
        elif inner is not None:
            inner(**_inputs(inner))
        else:
            raise ValueError(
                f"nothing says what {type(adapted.root).__name__} takes, so the merge cannot be proven: set its "
                "example_input_array, or train with --peft.merge_at_end true, which uses a training batch"
            )
    return calls


def _inputs(model: Any) -> dict[str, torch.Tensor]:
    config, draw = model.config.get_text_config(), torch.Generator().manual_seed(0)
    if model.main_input_name == "input_ids":
        length = min(16, getattr(config, "max_position_embeddings", None) or 16)
        ids = torch.randint(config.vocab_size, (2, length), generator=draw)
        more = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | more
    if model.main_input_name == "pixel_values":
        side = model.config.image_size
        return {"pixel_values": torch.randn(2, model.config.num_channels, side, side, generator=draw)}
    raise ValueError(
        f"{type(model).__name__} takes {model.main_input_name!r}, for which there are no made-up inputs to prove a "
        "merge with: train with --peft.merge_at_end true, which uses a training batch"
    )


def quantize_when_made(module: LightningModule, kind: str) -> None:
    """Quantise the linear layers of ``module`` now, or as soon as its `configure_model` has made them."""
    if any(isinstance(m, nn.Linear) for m in module.modules()):
        quantize(module, kind)
        return
    make, done = module.configure_model, False

    def configure_model() -> None:  # not functools.wraps: Lightning would look through it and skip the hook
        nonlocal done
        make()
        if not done:
            done = True
            quantize(module, kind)

    module.configure_model = configure_model
