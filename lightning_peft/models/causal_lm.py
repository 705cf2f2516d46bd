"""CausalLM: a pretrained decoder that continues text."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from lightning_peft.models.base import DType, PretrainedModule
from lightning_peft.models.optimization import Schedule
from lightning_peft.models.source import load_tokenizer


class Perplexity(MeanMetric):
    """exp of the mean loss a token: update(loss, tokens), the loss a batch's mean over that many tokens."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class CausalLM(PretrainedModule):
    """Learns the next token. Logs train_loss, and for val and test: loss (the mean over tokens, not over batches) and
    perplexity, as "val_perplexity".

    Args:
        model: a local folder, a hub name, or package:NAME.
        tokenizer: for samples and predictions only; by default the model's own.
        sample_prompts: continued at the end of each validation, printed, and sent to loggers that take text.
        max_new_tokens: the most tokens that a sample or a prediction adds.
        learning_rate: AdamW's, at its highest.
        weight_decay: AdamW's.
        warmup_ratio: the share of the run's steps over which the rate rises.
        schedule: how it goes on: linear or cosine, to zero at the end of the run, or constant.
        dtype: of the weights; auto: as in the files.
        gradient_checkpointing: less memory for more time.
        pretrained: false for random weights.

    Batches hold input_ids, attention_mask and labels, each (batch, time); labels of -100 are not learnt. For
    predict_step they hold prompts, padded on the left; it returns their continuations, a list of strings.
    """

    auto_class = AutoModelForCausalLM

    def __init__(
        self,
        model: str,
        tokenizer: str | None = None,
        sample_prompts: Sequence[str] = (),
        max_new_tokens: int = 64,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.03,
        schedule: Schedule = "linear",
        dtype: DType = "float32",
        gradient_checkpointing: bool = False,
        pretrained: bool = True,
    ) -> None:
        super().__init__(
            model, learning_rate, weight_decay, warmup_ratio, schedule, dtype, gradient_checkpointing, pretrained
        )
        self.save_hyperparameters()
        self.tokenizer_source = tokenizer or model
        self.sample_prompts = list(sample_prompts)
        self.max_new_tokens = max_new_tokens

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.tokenizer_source)

    def adjust(self, config: PretrainedConfig) -> None:
        """A language model needs nothing else than its files say."""

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        self.build()
        self.val_metrics = MetricCollection({"loss": MeanMetric(), "perplexity": Perplexity()}, prefix="val_")
        self.test_metrics = self.val_metrics.clone(prefix="test_")

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss over the tokens to predict, a scalar."""
        return self.model(**batch, use_cache=False).loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.test_metrics)

    def _evaluate(self, batch: dict[str, Tensor], metrics: MetricCollection) -> None:
        tokens = (batch["labels"][:, 1:] != -100).sum()  # nothing comes before the first token to predict it from
        metrics.update(self(batch).float(), tokens)
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        if self.sample_prompts and not self.trainer.sanity_checking:
            self._show(self.continuations(self.sample_prompts))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[str]:
        return self._generate(batch["input_ids"], batch["attention_mask"])

    def continuations(self, prompts: list[str]) -> list[str]:
        """What the model adds to each prompt, by the likeliest token; call `eval()` before, as dropout would act."""
        encoded = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(self.device)
        return self._generate(encoded["input_ids"], encoded["attention_mask"])

    @torch.no_grad()
    def _generate(self, ids: Tensor, mask: Tensor) -> list[str]:
        longer = cast(Any, self.model).generate(  # (batch, prompt + new); on every rank, as shards need it
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return self.tokenizer.batch_decode(longer[:, ids.shape[1] :], skip_special_tokens=True)

    @rank_zero_only
    def _show(self, texts: list[str]) -> None:
        console = Console()
        for prompt, text in zip(self.sample_prompts, texts, strict=True):
            console.print(f"[bold]{escape(prompt)}[/bold]{escape(text)}")
        rows = [list(pair) for pair in zip(self.sample_prompts, texts, strict=True)]
        page = "\n\n".join(f"**{prompt}**{text}" for prompt, text in rows)
        for logger in self.loggers:
            log_text = getattr(logger, "log_text", None)  # Weights & Biases
            add_text = getattr(getattr(logger, "experiment", None), "add_text", None)  # TensorBoard
            if log_text is not None:
                log_text("val_samples", columns=["prompt", "text"], data=rows, step=self.global_step)
            elif add_text is not None:
                add_text("val_samples", page, self.global_step)
