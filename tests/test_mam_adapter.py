"""MAM adapters against the two methods side by side, and counts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_peft_plugins.additive.parallel_adapter import ParallelAdapter
from lightning_peft_plugins.additive.prefix_tuning import PrefixTuning
from lightning_peft_plugins.hybrid.mam_adapter import MAMAdapter
from torch import nn
from transformers import RobertaConfig, RobertaModel

import lightning_peft as lp
from tests.soft_prompts import CAUSAL, bart, close, ids, lively, padded
from tests.zoo import bases as zoo

PREFIX = PrefixTuning(num_tokens=4, reparam_dim=8)
PARALLEL = ParallelAdapter(bottleneck=3, scale=4.0)
MAM = MAMAdapter(prefix=PREFIX, parallel=PARALLEL)


def moved(model: Any, methods: Any) -> Any:
    lp.inject(model, methods)
    torch.manual_seed(1)
    for _, _, a in lp.adapters(model):
        for p in a.parameters():
            nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.mark.parametrize("make", [zoo.bert, *CAUSAL.values(), zoo.t5, bart])
def test_it_is_its_two_parts_side_by_side(make: Any) -> None:
    batch = {"input_ids": ids(), "labels": torch.tensor([0, 1]) if make is zoo.bert else ids()}
    both, apart = moved(lively(make), MAM), moved(lively(make), [PREFIX, PARALLEL])
    state = {k.replace("mam_adapter_", ""): v for k, v in both.state_dict().items()}
    apart.load_state_dict(state)
    got, want = both(**batch), apart(**batch)
    assert torch.equal(got.logits, want.logits)
    for model, out in ((both, got), (apart, want)):
        out.loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    ours = {n.replace("mam_adapter_", ""): p.grad for n, p in both.named_parameters() if p.grad is not None}
    theirs = {n: p.grad for n, p in apart.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        close(grad, theirs[name], atol=1e-6)


def test_only_the_prefix_moves_the_output_at_the_start() -> None:
    model, start = lively(zoo.bert), lively(zoo.bert)
    lp.inject(model, MAM)
    torch.manual_seed(0)
    lp.inject(start, replace(PREFIX, name="mam_adapter_prefix_tuning"))
    start.load_state_dict({k: v for k, v in model.state_dict().items() if "parallel" not in k})
    got = model.eval()(input_ids=ids()).logits
    assert torch.equal(got, start.eval()(input_ids=ids()).logits)
    with lp.disabled(model):
        assert (model(input_ids=ids()).logits - got).abs().max() > 1e-3


def test_counts_of_the_defaults() -> None:
    """RoBERTa-base: 12 bottlenecks of 512, and a prefix of 30; while training its network of 512."""
    adapters, states = 12 * (2 * 768 * 512 + 512 + 768), 12 * 2 * 768
    for prefix, want in ((False, 30 * states), (True, 30 * 768 + 769 * 512 + 513 * states)):
        with torch.device("meta"):
            model = RobertaModel(RobertaConfig(), add_pooling_layer=False)
        default = MAMAdapter()
        lp.inject(model, replace(default, prefix=replace(default.prefix, reparam=prefix)))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapters + want


def test_padding_and_the_end_of_the_fit(tmp_path: Path) -> None:
    model, (tokens, mask, alone) = moved(lively(zoo.bert), MAM), padded(left=False)
    before = model(input_ids=tokens, attention_mask=mask).logits
    close(before[:1], model(input_ids=alone).logits)
    MAM.finish(model)
    held = {type(a).__name__: a for _, _, a in MAM.adapters(model)}
    assert held["NetworkPrefix"].prefix.requires_grad and not held["NetworkPrefix"].e.numel()
    close(model(input_ids=tokens, attention_mask=mask).logits, before)
    lp.save(model, tmp_path / "mam")
    other = lp.load(lively(zoo.bert), tmp_path / "mam").eval()
    close(other(input_ids=tokens, attention_mask=mask).logits, before)


def test_merging_and_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="mam_adapter cannot be merged"):
        lp.merge(moved(zoo.gpt2(), MAM))
    with pytest.raises(ValueError, match="mam_adapter: its parts need different names, got .*'x'"):
        MAMAdapter(prefix=PrefixTuning(name="x"), parallel=ParallelAdapter(name="x"))
    with pytest.raises(
        ValueError, match="mam_adapter_parallel_adapter: this Sequential|mam_adapter_prefix_tuning: noth"
    ):
        lp.inject(nn.Sequential(nn.Linear(2, 2)), MAM)
    with pytest.raises(ValueError, match="mam_adapter_prefix_tuning: nothing in this ViT"):
        lp.inject(zoo.vit(), MAM)
