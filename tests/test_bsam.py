"""BSAM: worked numbers, the distance downhill along a schedule, a fit against the loop by hand, bad options."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_peft_plugins.lifecycle.bsam import BSAM
from torch import Tensor, nn

from lightning_peft import Step
from tests import methods
from tests.fits import adam, run, smooth, trained
from tests.nets import vectors
from tests.test_sam import INSIDE, Bowl, Shifted, by_hand, gradient


def test_the_worked_numbers() -> None:
    bowl = Bowl(1, 1)
    found, passes = gradient(BSAM(rho=0.05, rho_min_max=0.05), bowl)
    assert found == pytest.approx([0.90673668, 10.00934697], abs=1e-8) and passes == 3
    assert [1 - 0.01 * g for g in found] == pytest.approx([0.99093263, 0.89990653], abs=1e-8)
    assert [float(p) for p in bowl.parameters()] == [1, 1]
    told = BSAM().report(bowl)
    loss = bowl.loss((1, 10)).item()
    assert told["max_sharpness"]["loss"] == pytest.approx(0.5 * (1.00497519**2 + 10 * 1.04975186**2) - loss, abs=1e-6)
    assert told["min_sharpness"]["loss"] == pytest.approx(loss - 0.5 * (0.99502481**2 + 10 * 0.95024814**2), abs=1e-6)


def test_downhill_at_distance_zero_and_a_bounded_ratio() -> None:
    flat, _ = gradient(BSAM(rho_min_max=0.0), Bowl(1, 1))
    assert flat == pytest.approx([0.95565729, 10.00433968], abs=1e-8)
    bounded, _ = gradient(BSAM(ratio_clip=1.05), Bowl(1, 1))  # the ratio is 1.10372977
    low = (0.99502481, 9.50248140)
    assert bounded == pytest.approx([1.00497519 + 1 - 1.05 * low[0], 10.4975186 + 10 - 1.05 * low[1]], abs=1e-7)


def test_the_distance_downhill_follows_the_learning_rate() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.4)
    step = Step(index=0, optimizers=[optimizer])
    method = BSAM(rho_min_max=0.05, rho_min_min=0.01, lr_min=0.1)
    assert method.rho_min(step) == pytest.approx(0.05)  # no schedule
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)
    for rate, wanted in ((0.4, 0.05), (0.25, 0.03), (0.1, 0.01), (0.0, 0.01)):
        optimizer.param_groups[0]["lr"] = rate
        assert method.rho_min(step) == pytest.approx(wanted)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.8, total_steps=10)
    optimizer.param_groups[0]["lr"] = 0.45
    assert method.rho_min(step) == pytest.approx(0.03)
    assert BSAM(lr_min=0.9).rho_min(step) == 0.05  # a schedule that never falls


def by_definition(at: Callable[[], list[Tensor]], weights: list[nn.Parameter]) -> list[Tensor]:
    start, g = [p.detach().clone() for p in weights], at()
    n = torch.cat([x.double().flatten() for x in g]).norm()
    found = []
    for rho in (0.3, -0.2, 0.0):
        with torch.no_grad():
            for p, w, x in zip(weights, start, g, strict=True):
                p.copy_((w.double() + rho * x.double() / n).float())
        found.append(at())
    high, low, here = found
    norms = [torch.cat([x.flatten() for x in side]).norm() for side in (high, low)]
    return [h + x - norms[0] / norms[1] * m for h, x, m in zip(high, here, low, strict=True)]


def test_a_fit_with_accumulation_is_the_loop_by_hand(tmp_path: Path) -> None:
    net = Shifted(smooth, optimizer=adam)
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "max_steps": 2} | INSIDE
    run(tmp_path, net, [methods.Plain(), BSAM(rho=0.3, rho_min_max=0.2)], **options)
    batches = list(vectors(shuffle=False))
    torch.testing.assert_close(trained(net), trained(by_hand(by_definition, [batches], 3)), rtol=0, atol=5e-6)
    assert len(net.losses) == 3 * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -1.0}, "bsam: rho is a distance of at least 0"),
        ({"rho_min_max": float("nan")}, "bsam: rho_min_max is a distance"),
        ({"rho_min_min": 0.2}, r"rho_min falls from rho_min_max=0\.05 to rho_min_min=0\.2, which is larger"),
        ({"lr_min": -0.1}, "bsam: lr_min is "),
        ({"ratio_clip": 0.0}, r"ratio_clip is above 0, such as 2\.0, or None, got 0\.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BSAM(**options)
