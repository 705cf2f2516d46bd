"""S4: its groups and who is in them, each part against itself in those layers, and the prefix in single layers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning_peft_plugins.additive.pfeiffer_adapter import PfeifferAdapter
from lightning_peft_plugins.additive.prefix_tuning import Prefix, PrefixTuning
from lightning_peft_plugins.hybrid.s4 import FIELDS, S4, spindle
from lightning_peft_plugins.reparameterized.lora import LoRA
from lightning_peft_plugins.selective.bitfit import BitFit
from torch import nn

import lightning_peft as lp
from tests import nets
from tests.soft_prompts import CAUSAL, P, close, generated, greedy, ids, lively, padded
from tests.zoo import bases as zoo
from tests.zoo.hybrid import deep_bert, deep_gpt2, deep_llama

PLAIN = PrefixTuning(num_tokens=P, reparam=False)
SMALL = S4(adapter=PfeifferAdapter(bottleneck=3), prefix=PLAIN, lora=LoRA(r=2, targets=("attention",)))


def moved(model: Any, methods: Any) -> Any:
    lp.inject(model, methods)
    torch.manual_seed(1)
    for _, _, a in lp.adapters(model):
        for p in a.parameters():
            nn.init.normal_(p, std=0.3)
    return model.eval()


# ---- groups --------------------------------------------------------------------------------------------------------


def test_the_spindle() -> None:
    assert [spindle(n) for n in (4, 5, 6, 12, 24)] == [
        (1, 1, 1, 1), (1, 2, 1, 1), (1, 2, 2, 1), (2, 4, 4, 2), (4, 8, 8, 4)
    ]  # fmt: skip
    for n in range(4, 60):
        groups = spindle(n)
        assert sum(groups) == n and min(groups) >= 1 and max(groups[0], groups[3]) <= min(groups[1:3])


def members(model: Any) -> list[set[str]]:
    """Of each layer of BERT the parts that are there."""
    found: list[set[str]] = [set() for _ in model.bert.encoder.layer]
    (prefix,) = [a for _, _, a in lp.adapters(model) if isinstance(a, Prefix)]
    for i in prefix.shapes:
        found[i].add("prefix")
    for name, p in model.named_parameters():
        if p.requires_grad and ".layer." in name:
            i = int(name.split(".layer.")[1].split(".")[0])
            found[i] |= {f for f in ("lora", "adapter") if f"s4_{'lora' if f == 'lora' else 'pfeiffer'}" in name}
            found[i] |= {"bitfit"} if "adapters" not in name and name.endswith("bias") else set()
    return found


@pytest.mark.parametrize("layers", [4, 6])
def test_who_is_in_which_layer(layers: int) -> None:
    model: Any = deep_bert()
    if layers == 6:
        model.bert.encoder.layer = nn.ModuleList([*model.bert.encoder.layer, *nets.bert().bert.encoder.layer])
        model.config.num_hidden_layers = 6
        for i, layer in enumerate(model.bert.encoder.layer):
            layer.attention.self.layer_idx = i
    lp.inject(model, SMALL)
    one, two = {"adapter", "lora"}, {"adapter", "prefix"}
    three, four = {"adapter", "prefix", "bitfit"}, {"prefix", "bitfit", "lora"}
    want = [one, two, three, four] if layers == 4 else [one, two, two, three, three, four]
    assert members(model) == want
    outside = [n for n, p in model.named_parameters() if p.requires_grad and ".layer." not in n]
    assert outside == ["bert.adapters.s4_prefix_tuning.prefix"]
    assert model.bert.adapters["s4_prefix_tuning"].prefix.shape == (P, (layers - 1) * 2 * 32)


def test_groups_of_the_user() -> None:
    model = lively(lambda: nets.llama(num_hidden_layers=5))
    lp.inject(model, replace(SMALL, bitfit=None, groups=(2, 1, 1, 1)))
    (prefix,) = [a for _, _, a in lp.adapters(model) if isinstance(a, Prefix)]
    assert list(prefix.shapes) == [2, 3, 4]
    with pytest.raises(ValueError, match=r"s4: groups \(2, 2, 1, 1\) are 6 layers, the model has 5"):
        lp.inject(lively(lambda: nets.llama(num_hidden_layers=5)), replace(SMALL, groups=(2, 2, 1, 1)))


@pytest.mark.parametrize("make", [deep_bert, deep_gpt2])
def test_it_is_its_parts_side_by_side(make: Any) -> None:
    batch = {"input_ids": ids(), "labels": torch.tensor([0, 1]) if make is deep_bert else ids()}
    united = moved(lively(make), SMALL)
    parts = [LoRA(r=2, targets=("attention",), layers="0,3"), replace(PLAIN, layers="1:"),
             PfeifferAdapter(bottleneck=3, layers=":3"), BitFit(layers="2:")]  # fmt: skip
    apart = moved(lively(make), parts)
    apart.load_state_dict({k.replace("s4_", ""): v for k, v in united.state_dict().items()})
    assert torch.equal(united(**batch).logits, apart(**batch).logits)
    trained = [{n.replace("s4_", "") for n, p in m.named_parameters() if p.requires_grad} for m in (united, apart)]
    assert trained[0] == trained[1]
    (group,) = SMALL.param_groups(united) or []
    biases = {id(p) for n, p in united.named_parameters() if p.requires_grad and "adapters" not in n}
    assert group["weight_decay"] == 0.0 and {id(p) for p in group["params"]} == biases


# ---- a prefix in single layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [zoo.bert, *CAUSAL.values()])
def test_layers_without_the_prefix_are_the_base_s(make: Any, attention: str) -> None:
    """With a prefix in the last layer alone, all before it computes what the base does (its positions moved)."""
    tokens, mask, alone = padded(left=False)
    model = moved(lively(make), replace(PLAIN, layers="-1"))
    model.set_attn_implementation(attention)
    with torch.no_grad():
        whole = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
        bare = model(input_ids=alone, output_hidden_states=True)
        with lp.disabled(model):
            moved_on = {"position_ids": (torch.arange(7) + P)[None]}
            base = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True, **moved_on)
    seen = mask == 1
    for i in range(2):
        close(whole.hidden_states[i][seen], base.hidden_states[i][seen])
    assert (whole.hidden_states[2][seen] - base.hidden_states[2][seen]).abs().max() > 1e-3
    close(whole.hidden_states[2][0, :4], bare.hidden_states[2][0])


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("layers", ["0", "1"])
def test_generation_and_causality_with_a_prefix_in_one_layer(name: str, layers: str) -> None:
    model, (tokens, mask, alone) = moved(lively(CAUSAL[name]), replace(PLAIN, layers=layers)), padded(left=True)
    want = torch.cat([greedy(model, alone, 5), greedy(model, tokens[1:], 5)])
    for cached in (True, False):
        options: dict[str, Any] = {"attention_mask": mask, "use_cache": cached, "eos_token_id": None}
        assert torch.equal(generated(model, tokens, **options), want)
    other = tokens.clone()
    other[:, 5:] = 9
    close(model(input_ids=other).logits[:, :5], model(input_ids=tokens).logits[:, :5], atol=1e-6)


def test_all_layers_named_are_all_layers_and_some_are_their_share() -> None:
    whole, named = (moved(lively(CAUSAL["llama"]), replace(PLAIN, layers=x)) for x in ("", "0,1"))
    assert torch.equal(whole(input_ids=ids()).logits, named(input_ids=ids()).logits)
    some = PrefixTuning(num_tokens=P, reparam_dim=8, layers="1")
    model = moved(lively(CAUSAL["llama"]), some)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == P * 32 + 33 * 8 + 9 * 2 * 16
    some.finish(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == P * 2 * 16
    start = lively(CAUSAL["llama"])
    lp.inject(start, PrefixTuning(num_tokens=2, reparam=False, init_ids=(5, 9), layers="1"))
    everything = lively(CAUSAL["llama"])
    lp.inject(everything, PrefixTuning(num_tokens=2, reparam=False, init_ids=(5, 9)))
    rows = everything.model.adapters["prefix_tuning"].prefix
    assert torch.equal(start.model.adapters["prefix_tuning"].prefix, rows[:, 32:])
    with pytest.raises(ValueError, match="keys and values of several sizes .* or layers without"):
        lp.hf.save(moved(lively(CAUSAL["llama"]), replace(PLAIN, layers="0")), "nowhere")


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": LoRA(layers="0")}, "groups say which layers 'lora' is in, so its own layers '0' have no place"),
        ({"groups": (1, 2, 3)}, r"groups are 4 numbers of at least 1, got \(1, 2, 3\)"),
        ({"groups": (1, 2, 3, 0)}, "groups are 4 numbers"),
        ({"adapter": None, "lora": None}, r"without \['adapter', 'lora'\] nothing would train in group 1"),
        ({"adapter": None, "prefix": None}, r"without \['adapter', 'prefix'\] nothing would train in group 2"),
        (dict.fromkeys(FIELDS), "are left out, so nothing would train"),
        ({"lora": LoRA(name="bitfit")}, "its parts need different names"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"s4: .*{message}"):
        S4(**options)


def test_bad_models() -> None:
    with pytest.raises(ValueError, match="s4: four groups need one number of at least 4 layers, this Bert.*has .*: 2"):
        lp.inject(zoo.bert(), SMALL)
    with pytest.raises(ValueError, match="s4: four groups need .* has none"):
        lp.inject(nn.Sequential(nn.Linear(2, 2)), SMALL)
    with pytest.raises(ValueError, match="s4_bitfit: this LlamaForCausalLM has no biases"):
        lp.inject(deep_llama(), SMALL)
    with pytest.raises(ValueError, match="takes its mask from the layer before"):
        lp.inject(zoo.t5(), replace(PLAIN, layers="1"))
    with pytest.raises(ValueError, match="layers '7' choose no block"):
        lp.inject(zoo.gpt2(), replace(PLAIN, layers="7"))
    with pytest.raises(ValueError, match="s4 cannot be merged"):
        lp.merge(moved(deep_gpt2(), SMALL))
