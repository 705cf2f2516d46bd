"""UniPELT against its parts, worked gates, a gated block by hand, padding, later tokens and step-by-step decoding."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_peft_plugins.additive.bottleneck import Bottleneck
from lightning_peft_plugins.additive.pfeiffer_adapter import PfeifferAdapter
from lightning_peft_plugins.additive.prefix_tuning import NetworkPrefix, Prefix, PrefixTuning
from lightning_peft_plugins.hybrid.unipelt import Gate, GatedLoRA, PrefixGate, UniPELT, Watch
from lightning_peft_plugins.reparameterized.lora import LoRA, LoRALinear
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, OPTConfig, OPTModel

import lightning_peft as lp
from lightning_peft.padding import Padding
from tests.soft_prompts import CAUSAL, P, close, generated, greedy, ids, lively, padded
from tests.zoo import bases as zoo

LORA = LoRA(r=2, alpha=2.0, targets=("query", "value", "q_proj", "v_proj", "c_attn"))
ADAPTER = PfeifferAdapter(bottleneck=3)
PLAIN = PrefixTuning(num_tokens=P, reparam=False)
ALL = UniPELT(lora=LoRA(r=2, alpha=2.0, targets=()), prefix=PLAIN, adapter=ADAPTER)
PARTS = ("lora", "prefix", "adapter")
ONE = {part: replace(ALL, **dict.fromkeys(set(PARTS) - {part})) for part in PARTS}
CLASSES = {"lora": GatedLoRA, "prefix": PrefixGate, "adapter": Bottleneck}


def filled(model: Any, method: Any, dtype: torch.dtype = torch.float32) -> Any:
    """With every tensor of the adapters away from its start."""
    lp.inject(model, method, dtype=dtype)
    torch.manual_seed(1)
    for _, _, adapter in lp.adapters(model):
        for p in adapter.parameters():
            nn.init.normal_(p, std=0.4)
    return model.eval()


def gates(model: nn.Module) -> list[Gate]:
    return [m for m in model.modules() if isinstance(m, Gate)]


def shut(model: nn.Module, to: float) -> None:
    """Fix every gate to 0 or 1: far enough for sigmoid to be exact."""
    for gate in gates(model):
        nn.init.constant_(gate.c, 200.0 if to else -200.0)
        if gate.g is not None:
            nn.init.zeros_(gate.g)


def plain(model: Any, method: UniPELT) -> Any:
    """A copy with the same parts and no gates."""
    bare = copy.deepcopy(model)
    lp.remove(bare)
    lp.inject(bare, replace(method, gated=()))
    state = {k: v for k, v in model.state_dict().items() if ".gate." not in k}
    bare.load_state_dict(state)
    return bare.eval()


# ---- 1 to 3: the gate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [zoo.bert, *CAUSAL.values(), zoo.t5])
def test_1_shut_gates_leave_the_prefix_alone_and_nothing_of_the_others(make: Any) -> None:
    batch = {"input_ids": ids(), "labels": torch.tensor([0, 1]) if make is zoo.bert else ids()}
    for part, method in ONE.items():
        model = filled(lively(make), method)
        with torch.no_grad():
            shut(model, 0)
            got = model(**batch).logits
            with lp.disabled(model):
                base = model(**batch).logits
        assert torch.equal(got, base) == (part != "prefix")


def test_1_keys_of_zero_still_take_attention() -> None:
    """Values [1, 3] of two equal keys, and one prefix slot of zeros: 4 / 3 and not 2."""
    scores, values = torch.zeros(3), torch.tensor([0.0, 1.0, 3.0])
    assert float(scores.softmax(0) @ values) == pytest.approx(4 / 3)
    model = filled(lively(zoo.bert), replace(ONE["prefix"], prefix=replace(PLAIN, num_tokens=1)))
    seen: dict[str, Tensor] = {}
    attention: Any = model.bert.encoder.layer[0].attention.self
    with torch.no_grad():
        shut(model, 0)
        for part in ("query", "key"):
            nn.init.zeros_(getattr(attention, part).weight)
            nn.init.zeros_(getattr(attention, part).bias)
    attention.value.register_forward_hook(lambda m, a, y: seen.update(v=y))
    attention.register_forward_hook(lambda m, a, y: seen.update(out=y[0]))
    model(input_ids=ids())
    close(seen["out"], (seen["v"].sum(1, keepdim=True) / 8).expand(2, 7, 32))


@pytest.mark.parametrize("make", [zoo.bert, *CAUSAL.values(), zoo.t5])
def test_2_open_gates_are_the_plain_parts(make: Any) -> None:
    batch = {"input_ids": ids(), "labels": torch.tensor([0, 1]) if make is zoo.bert else ids()}
    model = filled(lively(make), ALL)
    bare = plain(model, ALL)
    assert any(isinstance(a, LoRALinear) and a.scale == 1 for _, _, a in lp.adapters(bare))
    with torch.no_grad():
        assert (model(**batch).logits - bare(**batch).logits).abs().max() > 1e-3
        shut(model, 1)
    close(model(**batch).logits, bare(**batch).logits)


def test_3_a_gate_by_hand() -> None:
    x, mask = torch.tensor([[[2.0, 0.0], [1.0, 1.0], [-4.0, 0.0]]]), torch.tensor([[1, 1, 0]])
    padding = Padding()
    gate = Gate(2, "masked", padding).eval()
    with torch.no_grad():
        gate.c.zero_()
        gate.g.copy_(torch.tensor([1.0, -1.0]))  # type: ignore[union-attr]
    assert gate(x).shape == (1, 1, 1) and gate(x).item() == pytest.approx(0.4663, abs=1e-4)
    padding.calls.append({"attention_mask": mask})
    assert gate(x).item() == pytest.approx(0.6904, abs=1e-4)
    gate.mean = "all"
    assert gate(x).item() == pytest.approx(0.4663, abs=1e-4)
    gate.mean = "token"
    close(gate(x)[0, :, 0], torch.tensor([0.8808, 0.5, 0.0180]), atol=1e-4)
    single = Gate(0, "token", padding)
    assert single(x).item() == 0.5 and gate(torch.zeros(2, 3, 2)).shape == (2, 3, 1)


def test_3_where_the_gates_stand_and_what_they_read() -> None:
    """One layer of BERT written out in float64: q, v, the prefix and v = norm(h + r) of the adapter."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=12)
    model = filled(BertModel(config, add_pooling_layer=False).double(), ALL, torch.float64)
    tokens, mask, _ = padded(left=False)
    got = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    layer: Any = model.encoder.layer[0]
    with lp.disabled(model):
        x = model.embeddings(input_ids=tokens, position_ids=torch.arange(7)[None] + P)

        def opened(gate: Any, z: Tensor) -> Tensor:
            one = torch.sigmoid(z @ gate.g + gate.c)  # (batch, positions)
            return ((one * mask).sum(1) / mask.sum(1))[:, None, None]

        attention, held = layer.attention.self, {}
        for part in ("query", "value"):
            a = getattr(attention, part).adapters["unipelt_lora"]
            held[part] = getattr(attention, part)(x) + opened(a.gate, x) * (x @ a.A.T @ a.B.T)
        rows = model.adapters["unipelt_prefix_tuning"].prefix[None] * opened(attention.adapters["unipelt"].gate, x)
        k = torch.cat([rows[..., :8], attention.key(x)], 1)
        v = torch.cat([rows[..., 8:], held["value"]], 1)
        hidden = F.pad(mask, (P, 0), value=1)[:, None] == 0
        scores = (held["query"] @ k.mT / 8**0.5).masked_fill(hidden, -torch.inf)
        r = layer.attention.output.LayerNorm(layer.attention.output.dense(scores.softmax(-1) @ v) + x)
        norm, z = layer.output.LayerNorm, layer.output.dense(layer.intermediate(r)) + r
        a = norm.adapters["unipelt_pfeiffer_adapter"]
        delta = F.relu(norm(z) @ a.down.T + a.down_bias) @ a.up.T + a.up_bias
        want = norm(z + opened(a.gate, norm(z)) * delta)
    torch.testing.assert_close(got[mask == 1], want[mask == 1], atol=1e-9, rtol=1e-9)


# ---- 4 and 7: examples, padding, later tokens ----------------------------------------------------------------------


def test_4_examples_do_not_see_each_other_nor_their_padding() -> None:
    model = filled(lively(zoo.bert), ALL)
    tokens, mask, alone = padded(left=False)
    got = model(input_ids=tokens, attention_mask=mask).logits
    close(model(input_ids=tokens.flip(0), attention_mask=mask.flip(0)).logits, got.flip(0), atol=1e-6)
    close(got[:1], model(input_ids=alone).logits)
    assert {g.mean for g in gates(model)} == {"masked"}
    theirs = filled(lively(zoo.bert), replace(ALL, gate_mean="all"))  # as the authors' code, which counts pads
    got = theirs(input_ids=tokens, attention_mask=mask).logits
    assert (got[:1] - theirs(input_ids=alone).logits).abs().max() > 1e-4


def test_4_the_encoder_of_a_pair_has_means_and_its_decoder_has_none() -> None:
    model = filled(lively(zoo.t5), ALL)
    means = {n: m.mean for n, m in model.named_modules() if isinstance(m, Gate)}
    assert {m for n, m in means.items() if n.startswith("encoder")} == {"masked"}
    assert {m for n, m in means.items() if n.startswith("decoder")} == {"token"}
    tokens, mask, alone = padded(left=False)
    labels = ids(length=5, seed=1)
    got = model(input_ids=tokens, attention_mask=mask, labels=labels).logits
    close(got[:1], model(input_ids=alone, labels=labels[:1]).logits)
    other = labels.clone()
    other[:, 3:] = 9
    close(model(input_ids=tokens, attention_mask=mask, labels=other).logits[:, :4], got[:, :4], atol=1e-6)


@pytest.mark.parametrize("name", CAUSAL)
def test_7_no_position_sees_later_ones(name: str) -> None:
    model, tokens = filled(lively(CAUSAL[name]), ALL), ids()
    other = tokens.clone()
    other[:, 4:] = 9
    before = model(input_ids=tokens).logits
    close(model(input_ids=other).logits[:, :4], before[:, :4], atol=1e-6)
    assert {g.mean for g in gates(model)} == {"token"} and not [a for _, _, a in lp.adapters(model) if type(a) is Watch]
    for gate in gates(model):  # the mean over the text would leak
        gate.mean = "all"
    before = model(input_ids=tokens).logits
    assert (model(input_ids=other).logits[:, :4] - before[:, :4]).abs().max() > 1e-4
    for mean in ("all", "masked"):
        with pytest.raises(ValueError, match="unipelt: a .* may be causal .* gate_mean='" + mean + "' does not fit"):
            lp.inject(CAUSAL[name](), replace(ALL, gate_mean=mean))


@pytest.mark.parametrize("name", CAUSAL)
def test_7_generation_with_a_cache_is_step_by_step_argmax(name: str) -> None:
    model, (tokens, mask, alone) = filled(lively(CAUSAL[name]), ALL), padded(left=True)
    want = torch.cat([greedy(model, alone, 5), greedy(model, tokens[1:], 5)])
    for cached in (True, False):
        options: dict[str, Any] = {"attention_mask": mask, "use_cache": cached, "eos_token_id": None}
        assert torch.equal(generated(model, tokens, **options), want)


def test_7_what_does_not_say_that_it_looks_both_ways_is_taken_as_causal() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    lp.inject(model, replace(ONE["adapter"], adapter=ADAPTER))
    assert {g.mean for g in gates(model)} == {"token"}
    images = zoo.vit()
    lp.inject(images, replace(ALL, prefix=None))
    assert {g.mean for g in gates(images)} == {"masked"}
    assert not [a for _, _, a in lp.adapters(images) if isinstance(a, Watch)]  # images have no mask


# ---- 5 and 6: counts, start, the parts alone -----------------------------------------------------------------------


def test_5_counts() -> None:
    """BERT-base; LoRA 24 * 8 * 768 * 2 + 24 * 769, and so on."""
    want = {"lora": 313_368, "prefix": 9_866_252, "adapter": 903_756}
    for part in PARTS:
        with torch.device("meta"):
            model = BertModel(BertConfig(), add_pooling_layer=False)
        lp.inject(model, replace(UniPELT(), **dict.fromkeys(set(PARTS) - {part})))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == want[part]
    with torch.device("meta"):
        model = BertModel(BertConfig(), add_pooling_layer=False)
    lp.inject(model, UniPELT(prefix=PrefixTuning(num_tokens=10, reparam=False)))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_410_672


def test_5_the_start() -> None:
    model = lively(zoo.bert)
    lp.inject(model, ALL)
    batch = {"input_ids": ids(), "labels": torch.tensor([0, 1])}
    model(**batch).loss.backward()
    for _, _, a in lp.adapters(model):
        if isinstance(a, GatedLoRA | PrefixGate | Bottleneck):
            gate: Any = a.gate
            assert gate.g.grad.any() == isinstance(a, PrefixGate) == gate.c.grad.any()
            bound = 0.02 * 5 if isinstance(a, Bottleneck) else 32**-0.5
            assert 0 < gate.g.abs().max() <= bound and bool(gate.c) != isinstance(a, Bottleneck)
    assert all(0.2 < float(g.opening) < 0.8 for g in gates(model))


@pytest.mark.parametrize("part", PARTS)
def test_6_every_part_alone_is_its_own_plugin(part: str) -> None:
    own: Any = {"lora": replace(LORA, targets=("query", "value")), "prefix": PLAIN, "adapter": ADAPTER}[part]
    alone, united = filled(lively(zoo.bert), own), filled(lively(zoo.bert), replace(ONE[part], gated=()))
    assert torch.equal(alone(input_ids=ids()).logits, united(input_ids=ids()).logits)
    keys = {n.replace(f"unipelt_{own.name}", own.name) for n in united.state_dict()}
    assert keys == set(alone.state_dict())


def test_alpha_over_r_stays_a_factor_of_the_gate() -> None:
    """As in adapter-hub's checkpoints, whose alpha / r is not 1."""
    outs = []
    for alpha in (2.0, 6.0):
        model = filled(lively(zoo.bert), replace(ONE["lora"], lora=LoRA(r=2, alpha=alpha, targets=("query",))))
        if alpha == 2.0:
            with torch.no_grad():
                for _, _, a in lp.adapters(model):
                    if isinstance(a, GatedLoRA):
                        a.B.mul_(3)
        outs.append(model(input_ids=ids()).logits)
    close(*outs)


# ---- 8 and the rest ------------------------------------------------------------------------------------------------


def test_8_merging_is_refused_by_name() -> None:
    for method in (ALL, ONE["lora"]):
        model = filled(zoo.bert(), method)
        with pytest.raises(ValueError, match="unipelt cannot be merged"):
            lp.merge(model)


def test_the_network_of_the_prefix_is_dropped_and_the_gates_stay(tmp_path: Path) -> None:
    for make in (zoo.bert, CAUSAL["llama"]):
        method = replace(ALL, prefix=PrefixTuning(num_tokens=P, reparam_dim=8))
        model = filled(lively(make), method)
        before = model(input_ids=ids()).logits
        method.finish(model)
        (prefix,) = [a for _, _, a in method.adapters(model) if isinstance(a, Prefix)]
        assert isinstance(prefix, NetworkPrefix) and not prefix.e.numel() and prefix.prefix.requires_grad
        close(model(input_ids=ids()).logits, before)  # gated once, not twice
        lp.save(model, tmp_path / make().__class__.__name__)
        other = lp.load(lively(make), tmp_path / make().__class__.__name__).eval()
        assert torch.equal(other(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_lora_plus_reaches_the_gated_factors() -> None:
    lora = LoRA(r=2, alpha=2.0, lora_plus_ratio=16.0, targets=())
    method = replace(ALL, lora=lora)
    model = filled(zoo.bert(), method)
    (group,) = method.param_groups(model) or []
    factors = {id(a.B) for _, _, a in lp.adapters(model) if isinstance(a, GatedLoRA)}
    assert len(factors) == 4 and {id(p) for p in group["params"]} == factors and group["lr_scale"] == 16.0
    assert ALL.param_groups(model) is None


def test_the_report_tells_how_far_each_gate_is_open() -> None:
    model = filled(lively(zoo.bert), ALL)
    tokens, mask, _ = padded(left=False)
    model.train()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    model(input_ids=tokens, attention_mask=mask)
    told = ALL.report(model)
    assert {k: len(v) for k, v in told.items()} == {"gate_lora": 4, "gate_prefix": 2, "gate_adapter": 2}
    name = "bert.encoder.layer.0.attention.self"
    gate: Any = model.get_submodule(name).adapters["unipelt"].gate
    x = model.bert.embeddings(input_ids=tokens, position_ids=torch.arange(7)[None] + P)
    one = torch.sigmoid(x @ gate.g + gate.c)
    want = ((one * mask).sum(1) / mask.sum(1)).mean()
    assert told["gate_prefix"][name] == pytest.approx(float(want), abs=1e-6)
    model.eval()(input_ids=tokens[1:])
    assert ALL.report(model) == told  # of training alone
    assert replace(ALL, gated=()).report(plain(model, ALL)) == {}


def test_gradient_checkpointing_is_refused_only_where_the_mask_would_be_gone() -> None:
    batch = {"input_ids": ids(), "labels": torch.tensor([0, 1])}
    for method, message in ((ALL, "is gone"), (replace(ALL, prefix=None), "gate_mean='token' or 'all'")):
        model = filled(lively(zoo.bert), method).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with pytest.raises(ValueError, match=message):
            model(**batch, attention_mask=torch.ones_like(ids()))
    model = filled(lively(zoo.bert), replace(ALL, prefix=None, gate_mean="token"))
    wanted = {}
    for on in (False, True):
        model.zero_grad()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch, attention_mask=torch.ones_like(ids())).loss.backward()
        wanted[on] = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert wanted[True] and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*wanted.values(), strict=True))


def test_two_of_them_and_a_lora_of_its_own_do_not_mix() -> None:
    model = zoo.bert()
    lp.inject(model, [replace(ALL, prefix=None), LoRA(r=2, targets=("query",)), replace(ONE["adapter"], name="more")])
    count = {t: len(list(lp.adapters(model, t))) for t in ("lora", "unipelt_lora", "more_pfeiffer_adapter")}
    assert count == {"lora": 2, "unipelt_lora": 4, "more_pfeiffer_adapter": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gated": ("lorra",)}, "gated are some of .*'lorra'; nearest: 'lora'"),
        ({"gate_mean": "mask"}, "gate_mean is one of .*'mask'; nearest: 'masked'"),
        ({"gated": (), "gate_mean": "all"}, "no part has a gate, so gate_mean='all' has no effect"),
        ({"gated": ("lora",), "lora": None, "gate_mean": "all"}, "no part has a gate"),
        (dict.fromkeys(PARTS), r"all of \['lora', 'prefix', 'adapter'\] are left out"),
        ({"lora": LoRA(name="x"), "prefix": PrefixTuning(name="x")}, "its parts need different names"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"unipelt: {message}"):
        UniPELT(**options)


def test_bad_models() -> None:
    with pytest.raises(ValueError, match="unipelt: no query and value projections are recognised in this Sequential"):
        lp.inject(nn.Sequential(nn.Linear(2, 2)), ONE["lora"])
    with pytest.raises(ValueError, match="unipelt: a gate reads what a linear layer reads, .*word_embeddings"):
        lp.inject(zoo.bert(), replace(ONE["lora"], lora=LoRA(r=2, targets=("word_embeddings",))))
    with pytest.raises(ValueError, match="unipelt: nothing in this ViTFor.* takes token embeddings"):
        lp.inject(zoo.vit(), ONE["prefix"])
    with pytest.raises(ValueError, match="no .* matches 'quary'"):
        lp.inject(zoo.bert(), replace(ONE["lora"], lora=LoRA(r=2, targets=("quary",))))


def test_a_layer_that_flattens_positions_works_by_tokens() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    model = filled(OPTModel(OPTConfig(vocab_size=64, word_embed_proj_dim=32, **sizes)), ALL)
    assert model(input_ids=ids()).last_hidden_state.shape == (2, 7, 32)
