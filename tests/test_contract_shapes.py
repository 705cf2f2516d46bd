"""Ranks that move in after_step: moments follow, and files of any moment go on as if nothing had stopped."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft import PEFT
from tests import methods
from tests.fits import SaveAt, adam, outputs, run, same, smooth, trained
from tests.nets import Net, trainer, vectors

PLAN = ((2, (2, 0)), (4, (0, -1, 1, -1)))


def test_ranks_shrink_and_grow_with_their_moments_as_in_a_loop_by_hand(tmp_path: Path) -> None:
    net = Net(smooth, optimizer=adam)
    run(tmp_path, net, methods.Resizing(plan=PLAN), max_steps=6)
    hand = Net(smooth)
    L.seed_everything(5, verbose=False)
    lp.inject(hand, methods.Plain(r=3))
    batches = list(vectors(shuffle=False))
    optimizer = torch.optim.AdamW([p for p in hand.parameters() if p.requires_grad], 1e-2)
    for step in range(1, 7):
        optimizer.zero_grad()
        hand.loss(batches[step - 1]).backward()
        optimizer.step()
        index = dict(PLAN).get(step)
        if index is None:
            continue
        states = {}
        for _, _, adapter in lp.adapters(hand):  # other Parameters, another optimizer: nothing of resize is used
            for name, dim in (("A", 0), ("B", 1)):
                old, count = getattr(adapter, name), index.count(-1)
                fresh = 0.3 * torch.randn(count, old.shape[1]) if name == "A" else torch.zeros(len(old), count)
                zeros, state = torch.zeros_like(fresh), optimizer.state[old]
                new = nn.Parameter(pick(old.detach(), dim, index, fresh))
                states[new] = {k: pick(state[k], dim, index, zeros) for k in ("exp_avg", "exp_avg_sq")}
                states[new]["step"] = state["step"]
                setattr(adapter, name, new)
        optimizer = torch.optim.AdamW(states, 1e-2)
        optimizer.state.update(states)
    assert [p.shape for p in trained(net)] == [(4, 8), (12, 4), (4, 12), (3, 4)]
    torch.testing.assert_close(trained(net), trained(hand), rtol=0, atol=1e-7)


def test_a_graph_that_is_still_alive_does_not_hold_parameters_to_their_old_shapes() -> None:
    net = Net(smooth)
    lp.inject(net, methods.Plain(r=3))
    alive = net.loss(next(iter(vectors())))
    alive.backward()
    for _, _, adapter in lp.adapters(net):
        lp.resize(adapter, "rank", torch.tensor([2, 0]))
    net.zero_grad()
    net.loss(next(iter(vectors()))).backward()
    assert [p.grad.shape for p in net.parameters() if p.grad is not None] == [p.shape for p in trained(net)]
    assert alive.grad_fn is not None


def pick(t: Tensor, dim: int, index: tuple[int, ...], fresh: Tensor) -> Tensor:
    """``t`` at the places of ``index``, and where that is -1 the next of the ``fresh`` ones."""
    new = iter(fresh.unbind(dim))
    return torch.stack([t.select(dim, i) if i >= 0 else next(new) for i in index], dim)


def resized(root: Path, *more: L.Callback, ckpt: Path | None = None, **options: Any) -> Net:
    """Seven batches an epoch, four steps; ranks change at the end of the first epoch and inside the second."""
    net = Net(optimizer=adam)
    method = methods.Resizing(plan=((4, (2, 0)), (6, (0, -1, 1, -1))))
    common: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_steps": 10}
    run(root, net, method, *more, **common | options, data=vectors(56), ckpt_path=ckpt)
    return net


def test_a_fit_that_changes_ranks_resumes_bitwise_from_any_batch(tmp_path: Path) -> None:
    places = (5, 6, 7, 8, 10, 11, 12, 15)  # before, at and after both changes, whole and half windows
    whole = resized(tmp_path, SaveAt(tmp_path, places))
    for place in places:
        resumed = resized(tmp_path, ckpt=tmp_path / f"{place}.ckpt")
        assert resumed.losses == whole.losses[place:]
        assert same(trained(whole), trained(resumed)), place
    ranks = [torch.load(tmp_path / f"{n}.ckpt")["state_dict"]["net.0.adapters.product.A"].shape[0] for n in places]
    assert ranks == [3, 3, 2, 2, 2, 4, 4, 4]


def test_weights_alone_of_a_resized_model_serve_other_stages(tmp_path: Path) -> None:
    whole = resized(tmp_path, SaveAt(tmp_path, [11], weights_only=True), max_steps=6)
    peft = PEFT(methods.Resizing(plan=((4, (2, 0)), (6, (0, -1, 1, -1)))), folder=None)
    data = vectors(8, shuffle=False)
    wanted = whole.eval().net(next(iter(data))[0])
    got = trainer(tmp_path, peft).predict(Net(), data, ckpt_path=tmp_path / "11.ckpt")
    again: Any = lp.restore(Net(), tmp_path / "11.ckpt", methods=peft.methods)
    again.eval()
    assert torch.equal(outputs(got), wanted)
    assert torch.equal(again.net(next(iter(data))[0]), wanted)
