"""Natural GaLore: the inverse Fisher product against a dense solve, its precision, its history and its limits."""

import copy
from typing import Any

import pytest
import torch
from lightning_peft_plugins.lifecycle.galore import GaLore
from lightning_peft_plugins.lifecycle.natural_galore import NaturalGaLore
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

import lightning_peft as lp
from lightning_peft import Step
from tests.nets import mlp

FINE = torch.float64


def pushed(method: NaturalGaLore, gradients: list[Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """The last preconditioned gradient, and the state after all."""
    state: dict[str, Any] = {}
    out = [method.precondition(g, state) for g in gradients]
    return out[-1], state


def dense(gradients: list[Tensor], damping: float) -> Tensor:
    """(lambda I + sum g g^T)^-1 g for the last, by solving the whole system in float64."""
    G = torch.stack([g.flatten().double() for g in gradients], 1)
    return torch.linalg.solve(damping * torch.eye(len(G), dtype=FINE) + G @ G.T, G[:, -1])


@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_against_the_dense_solve(mode: str) -> None:
    torch.manual_seed(0)
    grads = list(torch.randn(7, 3, 4, dtype=FINE))
    method = NaturalGaLore(history=4, damping=1e-3, damping_mode=mode)
    got, state = pushed(method, grads)
    last = grads[-4:]  # the present one is among them
    damping = 1e-3 if mode == "absolute" else 1e-3 * float(sum(g.square().sum() for g in last)) / 4
    want = dense(last, damping)
    assert torch.linalg.vector_norm(got.flatten() - want) / torch.linalg.vector_norm(want) < 1e-11
    assert got.shape == (3, 4)
    history = torch.stack([g.flatten() for g in last])
    assert torch.equal(state["galore_history"], history)  # newest last
    torch.testing.assert_close(state["galore_gram"], history @ history.T)  # kept up to date by one row
    cosine = torch.nn.functional.cosine_similarity(want, grads[-1].flatten(), 0)
    torch.testing.assert_close(state["galore_cosine"], cosine)


def test_worked_numbers_of_two_equal_columns() -> None:
    """g = [3, 4] twice: (lambda I + 2 g g^T)^-1 g = g / (lambda + 2 * 25); a singular Gram matrix does not fail."""
    g = torch.tensor([[3.0, 4.0]], dtype=FINE)
    got, _ = pushed(NaturalGaLore(history=5, damping_mode="absolute"), [g, g])
    torch.testing.assert_close(got, g / (1e-3 + 50), rtol=1e-9, atol=0)
    got, _ = pushed(NaturalGaLore(history=5), [g, g, g])
    torch.testing.assert_close(got, g / (1e-3 * 25 + 75), rtol=1e-9, atol=0)


def test_zero_gradients_stay_zero() -> None:
    for mode in ("absolute", "relative"):
        got, _ = pushed(NaturalGaLore(history=3, damping_mode=mode), [torch.zeros(2, 3)] * 4)
        assert torch.equal(got, torch.zeros(2, 3))


def test_one_gradient_is_left_as_it_is_and_nothing_aliases_it() -> None:
    g = torch.randn(2, 3)
    kept = g.clone()
    got, state = pushed(NaturalGaLore(history=4), [g])
    assert torch.equal(got, kept)
    g.zero_()
    assert torch.equal(state["galore_history"][0], kept.flatten())
    assert not state["galore_history"].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_where_the_published_form_cancels(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    grads = [(0.1 * torch.randn(32, 32)).to(dtype).float() for _ in range(20)]
    got, _ = pushed(NaturalGaLore(history=20, damping_mode="absolute"), grads)
    want = dense(grads, 1e-3)
    error = torch.linalg.vector_norm(got.flatten() - want) / torch.linalg.vector_norm(want)
    assert error < 1e-5
    G, g = torch.stack([x.flatten() for x in grads], 1), grads[-1].flatten()
    z = torch.linalg.solve(torch.eye(20) + G.T @ G / 1e-3, G.T @ g)
    published = g / 1e-3 - G @ z / 1e-6
    assert torch.linalg.vector_norm(published - want) / torch.linalg.vector_norm(want) > 1e-3


def test_absolute_damping_is_plain_galore_at_the_usual_size_and_relative_is_not() -> None:
    torch.manual_seed(2)
    shared = torch.randn(8, 8)
    grads = [1e-5 * (shared + 0.5 * torch.randn(8, 8)) for _ in range(6)]
    got, state = pushed(NaturalGaLore(history=6, damping_mode="absolute"), grads)
    assert float(state["galore_cosine"]) > 0.999999
    torch.testing.assert_close(got, grads[-1] * 1000, rtol=1e-3, atol=0)
    assert float(pushed(NaturalGaLore(history=6), grads)[1]["galore_cosine"]) < 0.9
    scaled = pushed(NaturalGaLore(history=6), [1e4 * g for g in grads])[0]
    direction = pushed(NaturalGaLore(history=6), grads)[0]
    torch.testing.assert_close(scaled / scaled.norm(), direction / direction.norm(), rtol=1e-3, atol=1e-5)


# ---- in the loop ---------------------------------------------------------------------------------------------------


def layer() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 9, bias=False)).to(FINE)


def loop(model: nn.Module, method: lp.Method, make: Any, grads: list[Tensor]) -> Optimizer:
    lp.inject(model, method)
    optimizer = method.wrap_optimizer(make(model.parameters()), model)
    for index, g in enumerate(grads):
        model[0].weight.grad = g.clone()
        method.before_step(model, Step(index=index, optimizers=[optimizer]))
        optimizer.step()
    return optimizer


def adam(p: Any) -> Optimizer:
    return Adam(p, 0.05)


def gradients(n: int) -> list[Tensor]:
    return list(torch.randn(n, 9, 7, dtype=FINE, generator=torch.Generator().manual_seed(5)))


def options(**more: Any) -> dict[str, Any]:
    return {"r": 2, "targets": ("0",), "update_proj_gap": 100} | more


def test_adam_on_the_preconditioned_projection_by_hand() -> None:
    model, grads = layer(), gradients(5)
    W = model[0].weight.detach().clone()
    loop(model, NaturalGaLore(**options(history=3, damping=0.05, damping_mode="absolute")), adam, grads)
    Q = torch.linalg.svd(grads[0])[2][:2]
    proxy = nn.Parameter(torch.zeros(9, 2, dtype=FINE))
    optimizer, seen = Adam([proxy], 0.05), []
    for g in grads:
        seen = [*seen, g @ Q.T][-3:]
        proxy.grad = seen[0] if len(seen) == 1 else dense(seen, 0.05).view(9, 2)
        optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), W + 0.25 * proxy.detach() @ Q, rtol=0, atol=1e-9)


def test_a_history_of_one_is_galore() -> None:
    one, plain, grads = layer(), layer(), gradients(4)
    loop(one, NaturalGaLore(**options(history=1)), adam, grads)
    loop(plain, GaLore(**options()), adam, grads)
    assert torch.equal(one[0].weight, plain[0].weight)


def test_the_history_is_bounded_emptied_by_a_new_projector_and_in_the_state_dict() -> None:
    lengths = []
    for n in range(1, 7):
        model = layer()
        optimizer = loop(model, NaturalGaLore(**options(history=3, update_proj_gap=4)), adam, gradients(n))
        held = optimizer.state_dict()["state"][0]
        assert held["galore_history"].shape[1] == 9 * 2
        assert held["galore_gram"].shape == 2 * (len(held["galore_history"]),)
        lengths.append(len(held["galore_history"]))
    assert lengths == [1, 2, 3, 3, 1, 2]


def test_its_cosine_is_reported() -> None:
    model, method = layer(), NaturalGaLore(**options(history=3))
    assert method.report(model) == {}
    loop(model, method, adam, gradients(3))
    told = method.report(model)
    assert 0 < told["cosine_to_gradient"]["0"] < 1 and 0 < told["kept_gradient"]["0"] < 1


def test_descends() -> None:
    torch.manual_seed(0)
    model, method = mlp().eval(), NaturalGaLore(r=3, history=4, scale=1.0)
    start = copy.deepcopy(model)
    lp.inject(model, method)
    optimizer = method.wrap_optimizer(AdamW(model.parameters(), 0.02), model)
    x = torch.randn(32, 8)
    for index in range(20):
        (model(x) - x[:, :3]).square().mean().backward()
        method.before_step(model, Step(index=index, optimizers=[optimizer]))
        optimizer.step()
        optimizer.zero_grad()
    losses = [float((m(x) - x[:, :3]).square().mean().detach()) for m in (start, model)]
    assert losses[1] < 0.7 * losses[0]


def test_more_memory_than_adam_is_said() -> None:
    with pytest.warns(UserWarning, match=r"keeps 640 numbers of '0', and Adam's own moments would be 256"):
        lp.inject(mlp(), NaturalGaLore(r=2, targets=("0",)))  # 20 * 2 * 16 against 2 * 16 * 8


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"history": 0}, "history is at least 1"),
        ({"damping": 0.0}, "damping positive"),
        ({"damping_mode": "trace"}, "damping_mode must be 'relative' or 'absolute', got 'trace'"),
    ],
)
def test_bad_options(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NaturalGaLore(**bad)
