"""What methods report by layer over a fit: logged, written, drawn, and kept by checkpoints."""

import csv
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_peft import PEFT
from lightning_peft.history import heat_map
from tests import methods
from tests.fits import SaveAt, adam, smooth
from tests.nets import Net, trainer, vectors

PLAN = ((3, (2, 0)), (6, (0, -1, 1, -1)))
LAYERS = ["net.0", "net.2"]


def fit(root: Path, *more: L.Callback, logger: Any = False, ckpt: Path | None = None, steps: int = 8) -> PEFT:
    L.seed_everything(5, verbose=False)
    peft = PEFT(methods.Resizing(plan=PLAN))
    run = trainer(root, peft, *more, max_steps=steps, max_epochs=-1, logger=logger, log_every_n_steps=2)
    run.fit(Net(smooth, optimizer=adam), vectors(shuffle=False), ckpt_path=ckpt)
    return peft


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def ranks(path: Path) -> dict[int, list[int]]:
    """step -> the rank of each layer, in the order of the file."""
    found: dict[int, list[int]] = {}
    for row in read(path):
        if row["quantity"] == "product/rank":
            found.setdefault(int(row["step"]), []).append(int(row["value"]))
    return found


def test_every_logged_step_and_every_change_is_in_the_csv(tmp_path: Path) -> None:
    peft = fit(tmp_path)
    rows = read(peft.written["history"])
    assert {r["layer"] for r in rows} == set(LAYERS) and {r["quantity"] for r in rows} == {
        "product/rank",
        "product/size",
    }
    three, two, four = [3, 3], [2, 2], [4, 4]
    assert ranks(peft.written["history"]) == {0: three, 2: three, 3: two, 4: two, 6: four, 8: four}
    assert peft.written["history"] == tmp_path / "history.csv"


def test_changes_of_whole_numbers_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fit(tmp_path)
    said = [m for m in caplog.messages if m.startswith("step ")]
    assert said == [
        "step 3: product/rank 6 -> 4",
        "step 3: 105 -> 70 trainable parameters, 33 % fewer",
        "step 6: product/rank 4 -> 8",
        "step 6: 70 -> 140 trainable parameters, 100 % more",
    ]


def test_any_logger_gets_the_means(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    peft = fit(tmp_path, logger=logger)
    logged = {int(r["step"]): float(r["product/rank"]) for r in read(tmp_path / "metrics.csv") if r["product/rank"]}
    assert logged == {1: 3.0, 3: 2.0, 5: 4.0, 7: 4.0}  # Lightning numbers the steps from 0
    assert peft.written["history"].is_file()


def test_each_quantity_is_a_picture_and_tensorboard_shows_it(tmp_path: Path) -> None:
    peft = fit(tmp_path, logger=TensorBoardLogger(tmp_path, name="", version=""))
    assert [p.name for p in peft.written.values() if p.suffix == ".png"] == ["product_rank.png", "product_size.png"]
    with Image.open(peft.written["product/rank"]) as picture:
        assert len(set(picture.convert("RGB").resize((90, 60)).getdata())) > 10  # colours, not an empty page
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"product/rank", "product/size"}


def test_the_picture_has_a_cell_a_layer_and_step_and_leaves_out_what_is_not_there() -> None:
    figure = heat_map("rank", {0: {"a": 4, "b": 4}, 10: {"a": 2, "b": 6}, 30: {"a": 1}})
    axes = figure.axes[0]
    (mesh,) = axes.collections
    values = mesh.get_array()
    assert values.shape == (2, 3) and values[:, :2].tolist() == [[4, 2], [4, 6]] and values[0, 2] == 1
    assert values.mask[1, 2] or values[1, 2] != values[1, 2]  # blank
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b"]
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 5, 20, 30]


def test_a_resumed_fit_goes_on_with_what_was_seen_before(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", SaveAt(tmp_path, [5]))
    resumed = fit(tmp_path / "resumed", ckpt=tmp_path / "5.ckpt")
    assert read(resumed.written["history"]) == read(whole.written["history"])
    assert "history" in torch.load(tmp_path / "5.ckpt")["callbacks"]["PEFT['product']"]


def test_a_method_without_a_report_writes_none(tmp_path: Path) -> None:
    peft = PEFT(methods.Plain())
    trainer(tmp_path, peft, max_steps=2).fit(Net(smooth), vectors(shuffle=False))
    assert set(peft.written) == {"adapter"} and not list(tmp_path.glob("*.csv"))
