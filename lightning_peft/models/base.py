"""What the models share: a pretrained transformer, made once in `configure_model`, and its optimizer."""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from lightning_peft.models.optimization import Schedule, adamw
from lightning_peft.models.source import resolve

DType = Literal["float32", "bfloat16", "auto"]


class PretrainedModule(LightningModule, ABC):
    """Base of the models here; `model` is the transformer. It is made in `configure_model`, which does nothing if it
    exists, so a large one is made once and a strategy can shard it.

    Args: model, as in `models.source.resolve`; learning_rate, weight_decay, warmup_ratio and schedule, as in
        `models.optimization.adamw`; dtype of the weights, "auto" as in the files; gradient_checkpointing, less memory
        for more time; pretrained, False for random weights.
    `new_parameters` names what the files did not hold, as "model.classifier.weight": newly initialised, so it must be
    trained, with `PEFT(..., train=("*classifier*",))` or the like.
    """

    model: PreTrainedModel
    auto_class: type  # AutoModelFor...

    def __init__(
        self,
        model: str,
        learning_rate: float,
        weight_decay: float,
        warmup_ratio: float,
        schedule: Schedule,
        dtype: DType,
        gradient_checkpointing: bool,
        pretrained: bool,
    ) -> None:
        super().__init__()
        if not 0 <= warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is a share of the run, between 0 and 1, got {warmup_ratio}")
        self.source = model
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_ratio = warmup_ratio
        self.schedule: Schedule = schedule
        self.weight_dtype: DType = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.pretrained = pretrained
        self.new_parameters: tuple[str, ...] = ()

    @abstractmethod
    def adjust(self, config: PretrainedConfig) -> None:
        """Writes into the configuration what this task needs."""

    @abstractmethod
    def configure_model(self) -> None:
        """Makes `model` by `build`, and what depends on it."""

    @cached_property
    def config(self) -> PretrainedConfig:
        """The transformer's configuration, read before the transformer itself."""
        return AutoConfig.from_pretrained(resolve(self.source))

    def build(self) -> None:
        """Makes `model`, in training mode (transformers hands out models in evaluation mode, without dropout, and
        Lightning leaves the mode as it finds it)."""
        self.adjust(self.config)
        if self.pretrained:
            model, report = self.auto_class.from_pretrained(
                resolve(self.source), config=self.config, dtype=self.weight_dtype, output_loading_info=True
            )
            new = report["missing_keys"]
        else:
            dtype = self.config.dtype if self.weight_dtype == "auto" else getattr(torch, self.weight_dtype)
            model = self.auto_class.from_config(self.config, dtype=dtype)
            new = dict(model.named_parameters())
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # the reentrant kind needs trained inputs
        self.new_parameters = tuple(sorted(f"model.{name}" for name in new))
        self.model = model.train()

    def setup(self, stage: str) -> None:
        self.check_length(getattr(self.trainer.datamodule, "max_length", 0))  # pyright: ignore[reportAttributeAccessIssue]

    def check_length(self, length: int) -> None:
        """ValueError if examples of `length` tokens are longer than the model's position embeddings. A model with
        rotary positions has none, and gets a warning."""
        most = getattr(self.config, "max_position_embeddings", None)
        if most is None or length <= most:
            return
        message = (
            f"max_length={length}, but {self.source!r} was made for at most {most} tokens (max_position_embeddings)"
        )
        if getattr(self.config, "rope_parameters", None) is None:
            raise ValueError(message)
        rank_zero_warn(message)

    def configure_optimizers(self) -> dict[str, Any]:
        return adamw(self, self.learning_rate, self.weight_decay, self.warmup_ratio, self.schedule)
