"""Bad input to the command line: one clear message, a code that is not 0, no traceback, and nothing lost."""

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertConfig, BertModel

from lightning_peft.__main__ import main
from tests.workplace import COMMAND, checkpoint, make_run

FIT = ("fit", "--config", "tiny.yaml")
LORA = "peft.methods"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def ran(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a workplace with a finished run, to be in."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with a digest of what is in it."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def refused(capsys: pytest.CaptureFixture[str], args: Sequence[str], *parts: str, code: int = 1) -> str:
    """The command fails with one message that holds every part, and leaves every file as it was."""
    before = contents(Path.cwd())
    capsys.readouterr()
    assert main(args) == code
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and "Traceback" not in err, err
    message = err[err.index("error: ") :]
    assert not [p for p in parts if p not in message], message
    assert len(message) < 600, message
    assert contents(Path.cwd()) == before
    return message


def edited(name: str, *path: str, value: Any = None) -> str:
    """A copy of tiny.yaml with one value set, or taken out where it is None."""
    config = yaml.safe_load(Path("tiny.yaml").read_text())
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner.pop(path[-1], None)
    if value is not None:
        inner[path[-1]] = value
    Path(name).write_text(yaml.safe_dump(config))
    return name


# ---- options -----------------------------------------------------------------------------------------------------

OPTIONS = {
    "command": (("fitt",), ("'fitt'", "nearest: fit"), 2),
    "method": ((*FIT, "--peft.methods", "lorra"), ("'lorra'", "nearest: 'lora'"), 1),
    "class": ((*FIT, "--peft.methods", "LoRRA"), ("'LoRRA'", "'LoRA'"), 1),
    "option": ((*FIT, "--peft.methods", "lora", "--peft.methods.alpa", "3"), ("LoRA", "'alpa'", "nearest: alpha"), 2),
    "kind": ((*FIT, "--peft.methods.r", "three"), ("peft.methods.r = three", "a whole number"), 2),
    "list": ((*FIT, "--peft.methods.targets", "query"), ("peft.methods.targets = query", "[a, b]"), 2),
    "rank": ((*FIT, "--peft.methods.r", "0"), ("rank of at least 1, got r=0",), 1),
    "targets": ((*FIT, "--peft.methods.targets", "[querry]"), ("'querry'", "nearest: 'query'"), 1),
    "train": ((*FIT, "--peft.train", "[clasifier]"), ("'clasifier'", "model.classifier"), 1),
    "model part": ((*FIT, "--peft.model", "modell"), ("'modell'", "nearest: 'model'"), 1),
    "typo": ((*FIT, "--peft.methdos", "lora"), ("--peft.methdos", "nearest: peft.methods"), 2),
    "choice": ((*FIT, "--quantize", "nf5"), ("quantize = nf5", "'nf4', 'fp4', 'int8'"), 2),
    "model class": ((*FIT, "--model", "TextClasifier"), ("'TextClasifier'", "nearest: TextClassifier"), 2),
    "model option": ((*FIT, "--model.learning_rat", "1"), ("TextClassifier", "nearest: learning_rate"), 2),
    "model path": ((*FIT, "--model.model", "./tinny"), ("./tinny", "nearest: 'tiny'"), 1),
    "accelerator": ((*FIT, "--trainer.accelerator", "cpux"), ("cpux",), 1),
    "config file": (("fit", "--config", "none.yaml"), ("no file", "none.yaml"), 2),
    "no config": (("fit",), ("is needed",), 2),
    "unknown method": (("methods", "lorra"), ("'lorra'", "nearest: 'lora'"), 1),
    "merge nothing": (("merge", "--output", "x"), ("required: source", "lightning-peft merge"), 2),
    "merge typo": (("merge", "x", "--outptu", "y"), ("required",), 2),
    "export format": (("export", "x", "--output", "y", "--format", "foo"), ("'foo'", "'hf'"), 2),
    "two bases": (("merge", "x", "--output", "y", "--model", "a", "--config", "b"), ("not both",), 1),
    "no adapter": (
        ("merge", "runs/tiny/adaptr", "--output", "y"),
        ("runs/tiny/adaptr", "nearest: runs/tiny/adapter"),
        1,
    ),
}


@pytest.mark.parametrize(("args", "parts", "code"), OPTIONS.values(), ids=OPTIONS)
def test_options(args: tuple[str, ...], parts: tuple[str, ...], code: int, ran: Path, capsys: Any) -> None:
    refused(capsys, args, *parts, code=code)


CONFIGS = {
    "method": ((LORA, "lorra"), ("'lorra'", "nearest: 'lora'")),
    "option": ((LORA, {"class_path": "lora", "init_args": {"rr": 1}}), ("LoRA has no option 'rr'", "nearest: r")),
    "kind": ((LORA, {"class_path": "lora", "init_args": {"r": "x"}}), ("peft.methods.r = x", "whole number")),
    "second of a list": ((LORA, ["lora", {"class_path": "LoRA", "init_args": {"rr": 1}}]), ("no option 'rr'",)),
    "no methods": ((LORA, None), ("peft.methods is needed",)),
    "no model": (("model", None), ("model is needed",)),
    "peft option": (("peft.trian", ["x"]), ("peft.trian", "nearest: peft.train")),
    "trainer option": (("trainer.max_epoch", 1), ("trainer.max_epoch", "nearest: trainer.max_epochs")),
    "section": (("pefft", {"a": 1}), ("pefft",)),
    "model's own": (("model.init_args.model", None), ("TextClassifier needs 'model'",)),
    "module": (("model.class_path", "no_module.Model"), ("No module named 'no_module'",)),
    "callback": (("trainer.callbacks", [{"class_path": "EarlyStoping"}]), ("nearest: EarlyStopping",)),
    "literal": (("model.init_args.schedule", "liner"), ("model.schedule = liner", "'linear'")),
}


@pytest.mark.parametrize(("change", "parts"), CONFIGS.values(), ids=CONFIGS)
def test_configs(change: tuple[str, Any], parts: tuple[str, ...], ran: Path, capsys: Any) -> None:
    file = edited("bad.yaml", *change[0].split("."), value=change[1])
    refused(capsys, ["fit", "--config", file], *parts, code=1 if change[1] == "lorra" else 2)


def test_a_config_that_is_no_yaml_names_the_line(ran: Path, capsys: Any) -> None:
    Path("bad.yaml").write_text("model:\n  a: [1,\ntrainer: 3\n")
    refused(capsys, ["fit", "--config", "bad.yaml"], "bad.yaml, line 2", "not YAML")


# ---- data --------------------------------------------------------------------------------------------------------

DATA = {
    "missing": ("train.cvs", None, ("train.cvs", "nearest: 'train.csv'")),
    "empty": ("empty.csv", "", ("empty.csv", "is empty")),
    "no label column": ("a.csv", "text,labels\ngood,yes\n", ("no column 'label'", "nearest: 'labels'")),
    "broken line": ("a.jsonl", '{"text": "good", "label": "yes"}\n{"text": "bad"\n', ("a.jsonl", "line 2")),
}


@pytest.mark.parametrize(("file", "text", "parts"), DATA.values(), ids=DATA)
def test_training_files(file: str, text: str | None, parts: tuple[str, ...], ran: Path, capsys: Any) -> None:
    if text is not None:
        Path(file).write_text(text)
    refused(capsys, [*FIT, "--data.train", file], *parts)


def test_a_label_that_was_never_trained(ran: Path, capsys: Any) -> None:
    Path("odd.csv").write_text("text,label\ngood,yes\nbad,nope\n")
    refused(capsys, [*FIT, "--data.val", "odd.csv"], "odd.csv", "row 2", "'nope'", "['no', 'yes']")


# ---- checkpoints and adapters ------------------------------------------------------------------------------------


def test_resuming_with_other_hyper_parameters(ran: Path, capsys: Any) -> None:
    resume = ["fit", "--config", "runs/tiny/config.yaml", "--trainer.max_epochs", "2", "--ckpt_path", checkpoint()]
    refused(capsys, [*resume, "--peft.methods.r", "3"], "'lora'", "r=8 there, 3 now")
    refused(capsys, [*resume, "--model.learning_rate", "0.5"], "model.learning_rate=0.02 there, 0.5 now")


def test_a_checkpoint_of_another_method(ran: Path, capsys: Any) -> None:
    args = [*FIT, "--peft.methods.name", "other", "--ckpt_path", checkpoint()]
    refused(capsys, args, "other")


def test_a_checkpoint_of_another_base(ran: Path, capsys: Any) -> None:
    torch.manual_seed(9)
    BertModel(BertConfig.from_pretrained("tiny")).save_pretrained("tiny")
    refused(capsys, ["test", "--config", "runs/tiny/config.yaml"], "another base", "first 'bert.embeddings")
    refused(capsys, ["merge", "runs/tiny/adapter", "--output", "out"], "runs/tiny/adapter", "another base")


def test_a_checkpoint_that_is_not_there(ran: Path, capsys: Any) -> None:
    wrong = checkpoint().replace("step", "stop")
    refused(capsys, ["test", "--config", "tiny.yaml", "--ckpt_path", wrong], wrong, f"nearest: {checkpoint()}")


def test_a_checkpoint_of_plain_lightning(ran: Path, capsys: Any) -> None:
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, "plain.ckpt")
    refused(capsys, [*FIT, "--ckpt_path", "plain.ckpt"], "plain.ckpt", "not written with lightning-peft")


def truncate(file: str) -> None:
    data = Path(file).read_bytes()
    Path(file).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("command", ["fit", "test", "merge", "export"])
def test_a_truncated_checkpoint(command: str, ran: Path, capsys: Any) -> None:
    truncate(checkpoint())
    use = ["--config", "runs/tiny/config.yaml", "--ckpt_path", checkpoint()]
    args = [command, *use] if command in ("fit", "test") else [command, checkpoint(), "--output", "out"]
    refused(capsys, args, checkpoint(), "not a complete checkpoint")


@pytest.mark.parametrize("command", ["merge", "export"])
def test_a_truncated_adapter(command: str, ran: Path, capsys: Any) -> None:
    truncate("runs/tiny/adapter/adapter.safetensors")
    refused(capsys, [command, "runs/tiny/adapter", "--output", "out"], "runs/tiny/adapter", "damaged or truncated")


def test_a_run_without_checkpoints_cannot_be_measured(ran: Path, capsys: Any) -> None:
    shutil.rmtree("runs/tiny/checkpoints")
    refused(capsys, ["test", "--config", "runs/tiny/config.yaml"], "runs/tiny holds no checkpoint", "--ckpt_path")


# ---- output ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["train.csv/runs", "/proc/no/runs"])
def test_a_folder_that_cannot_be_written(root: str, ran: Path, capsys: Any) -> None:
    refused(capsys, [*FIT, "--trainer.default_root_dir", root], f"{root}")
    refused(capsys, ["merge", "runs/tiny/adapter", "--output", f"{root}/out"], f"cannot write the folder {root}/out")


def test_a_folder_that_holds_another_run(ran: Path, capsys: Any) -> None:
    refused(capsys, [*FIT, "--name", "tiny"], "runs/tiny holds another run's results", "--name", "--ckpt_path")
    refused(capsys, ["fit", "--config", "runs/tiny/config.yaml"], "runs/tiny holds another run's results")


def test_a_folder_that_holds_other_files(ran: Path, capsys: Any) -> None:
    for command in ("merge", "export"):
        refused(capsys, [command, "runs/tiny/adapter", "--output", "tiny", "--overwrite"], "tiny is not empty")
    main(["merge", "runs/tiny/adapter", "--output", "out"])
    refused(capsys, ["merge", "runs/tiny/adapter", "--output", "out"], "out holds earlier results", "--overwrite")
    assert main(["merge", "runs/tiny/adapter", "--output", "out", "--overwrite"]) == 0


def test_a_run_that_fails_at_its_start_leaves_no_folder(ran: Path, capsys: Any) -> None:
    refused(capsys, [*FIT, "--peft.methods.targets", "[nothing]"], "'nothing'")
    assert [p.name for p in Path("runs").iterdir()] == ["tiny"]


# ---- as a program ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_program_says_it_on_stderr_and_shows_tracebacks_when_asked(
    ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*COMMAND, *FIT, "--peft.methods.r", "0"]
    done = subprocess.run(args, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == "error: LoRA needs a rank of at least 1, got r=0"
    monkeypatch.setenv("LIGHTNING_PEFT_DEBUG", "1")
    done = subprocess.run(args, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" in done.stderr and "__post_init__" in done.stderr


def test_an_error_nobody_foresaw_keeps_its_type(ran: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> int:
        raise RuntimeError("something inside")

    monkeypatch.setattr("lightning_peft.cli.listing.run", fails)
    refused(capsys, ["methods"], "RuntimeError: something inside", "LIGHTNING_PEFT_DEBUG=1")
