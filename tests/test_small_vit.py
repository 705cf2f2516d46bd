"""The small vision transformer and the images to try methods on it."""

from pathlib import Path

import pytest
import torch
from lightning_peft_plugins.additive.vpt import VPT

from lightning_peft.callback import PEFT
from lightning_peft.data import Bars
from lightning_peft.models import SmallViT
from tests import nets


def test_the_bars_are_the_same_every_time_and_lie_where_their_label_says() -> None:
    one, other = Bars().examples("val"), Bars().examples("val")
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(one, other, strict=True))
    assert [int(e["labels"]) for e in one[:5]] == [0, 1, 2, 3, 0] and len(one) == 128
    for e in one[:40]:
        image, label = e["pixel_values"][0], int(e["labels"])
        sums = [
            image.sum(1),
            image.sum(0),
            torch.stack([image.diagonal(i).sum() for i in range(-12, 13)]),
            torch.stack([image.flip(1).diagonal(i).sum() for i in range(-12, 13)]),
        ]
        assert label == max(range(4), key=lambda i: float(sums[i].max()))


def test_it_learns_them_in_full_and_a_method_trains_on_it(tmp_path: Path) -> None:
    model, data = SmallViT(learning_rate=5e-3), Bars()
    trainer = nets.trainer(tmp_path, max_epochs=6)
    trainer.fit(model, data)
    assert trainer.callback_metrics["val_accuracy"] > 0.4  # four classes: chance is 0.25
    peft = PEFT(VPT(), model="model", train=("classifier",), folder=None)
    nets.trainer(tmp_path, peft, max_steps=3).fit(model, data)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        *(f"model.vit.layers.{i}.adapters.vpt.prompt" for i in range(2)),
        "model.classifier.weight",
        "model.classifier.bias",
    }


def test_bad_options() -> None:
    with pytest.raises(
        ValueError, match="hidden_size is a multiple of 4 and image_size of patch_size, got 32 and 16, 5"
    ):
        SmallViT(patch_size=5)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Bars(batch_size=0)
