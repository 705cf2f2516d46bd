"""Prefix tuning against attention written out by hand, real texts in front, itself unpadded and uncached, and peft."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from lightning_peft_plugins.additive.prefix_tuning import NetworkPrefix, Prefix, PrefixTuning
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertModel, MistralConfig, MistralForCausalLM

import lightning_peft as lp
from tests import nets
from tests.soft_prompts import (
    CAUSAL,
    P,
    adapter,
    bart,
    beams,
    both_ways,
    close,
    generated,
    greedy,
    ids,
    in_peft,
    injected,
    lively,
    padded,
    positions_of,
    roberta,
    rows_of,
)
from tests.zoo import bases as zoo

PLAIN = PrefixTuning(num_tokens=P, reparam=False)
NETWORK = PrefixTuning(num_tokens=P, reparam_dim=16)
SEQ2SEQ = [zoo.t5, bart]


def prefixed(make: Any, method: lp.Method = PLAIN) -> Any:
    return injected(make, method)


# ---- what the model computes ---------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """Of one head, (queries, width), a query at a time, as a mean of the attention to the text and to the prefix."""
    rows = []
    for one in q:
        text, front = ((one @ keys.T * scale).exp() for keys in (k, prefix[0]))
        lam = front.sum() / (front.sum() + text.sum())
        rows.append((1 - lam) * (text / text.sum()) @ v + lam * (front / front.sum()) @ prefix[1])
    return torch.stack(rows)


def test_1_attention_by_hand() -> None:
    def column(*x: float) -> Tensor:
        return torch.tensor(x, dtype=torch.float32).view(-1, 1)

    got = attend(column(1), column(0, 0), column(1, 3), (column(0), column(8)), 1.0)
    assert got.item() == pytest.approx(4)


def test_1_every_head_of_every_layer_is_that_mean() -> None:
    model, seen = prefixed(zoo.bert).double(), {}
    lp.remove(model)
    lp.inject(model, PLAIN, dtype=torch.float64)
    attentions = [layer.attention.self for layer in model.bert.encoder.layer]
    for i, module in enumerate(attentions):
        for part in ("query", "key", "value"):
            getattr(module, part).register_forward_hook(lambda m, a, y, at=(i, part): seen.update({at: y[0]}))
        module.register_forward_hook(lambda m, a, y, at=(i, "out"): seen.update({at: y[0][0]}))
    model(input_ids=ids(1))
    rows = adapter(model).prefix.view(P, 2, 2, 4, 8)  # tokens, layers, keys and values, heads, width
    for i in range(2):
        q, k, v = (seen[i, part].view(7, 4, 8) for part in ("query", "key", "value"))
        for h in range(4):
            want = attend(q[:, h], k[:, h], v[:, h], (rows[:, i, 0, h], rows[:, i, 1, h]), 8**-0.5)
            close(seen[i, "out"].view(7, 4, 8)[:, h], want, atol=1e-10)


@pytest.mark.parametrize("name", CAUSAL)
def test_2_states_of_a_real_text_are_that_text_in_front(name: str) -> None:
    text = (9, 30, 5, 41)
    model = prefixed(CAUSAL[name], PrefixTuning(num_tokens=P, reparam=False, init_ids=text))
    front = torch.tensor([text] * 2)
    tokens, mask, alone = padded(left=False)
    got = model(input_ids=tokens, attention_mask=mask).logits
    with lp.disabled(model):
        want = model(input_ids=torch.cat([front, tokens], 1)).logits[:, P:]
        close(got[mask == 1], want[mask == 1])
        continued = greedy(model, torch.cat([front[:1], alone], 1), 5)
    assert torch.equal(generated(model, alone, eos_token_id=None), continued)


def test_2_a_short_text_is_repeated() -> None:
    repeated, whole = (
        adapter(prefixed(CAUSAL["gpt2"], PrefixTuning(num_tokens=5, reparam=False, init_ids=text)))
        for text in ((9, 30), (9, 30, 9, 30, 9, 7))
    )
    assert repeated.prefix.shape == (5, 128) and torch.equal(repeated.prefix, whole.prefix)


def test_7_counts() -> None:
    """Grouped queries: llama here has 2 key and value heads of width 8, gpt2 has 4."""

    def count(model: Any) -> int:
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    assert count(prefixed(CAUSAL["llama"])) == 256
    assert count(prefixed(CAUSAL["llama"], NETWORK)) == P * 32 + 33 * 16 + 17 * 2 * 2 * 2 * 8
    for make in (CAUSAL["gpt2"], zoo.bert, zoo.t5, bart):
        assert count(prefixed(make)) == 512
    wide = lp.inject(model := lively(lambda: nets.llama(head_dim=12)), PLAIN)
    assert wide and count(model) == P * 2 * 2 * 2 * 12
    large = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    with torch.device("meta"):
        model = nets.llama(**large)
    lp.inject(model, PrefixTuning(num_tokens=20, reparam=False))
    assert count(model) == 1_310_720  # Llama-3-8B


@pytest.mark.parametrize("make", [*CAUSAL.values(), zoo.bert, *SEQ2SEQ])
def test_7_the_gradient_reaches_every_layer_and_nothing_of_the_base(make: Any) -> None:
    model = prefixed(make)
    batch = {"input_ids": ids(), "labels": torch.tensor([1, 2]) if make is zoo.bert else ids()}
    model(**batch).loss.backward()
    grad = adapter(model).prefix.grad.view(P, 4, -1)
    assert (grad.abs().amax(-1) > 1e-8).all()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


def test_6_each_call_starts_from_the_prefix_alone() -> None:
    model = prefixed(CAUSAL["llama"])
    assert torch.equal(model(input_ids=ids()).logits, model(input_ids=ids()).logits)
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert torch.equal(model(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_zero_states_still_take_attention() -> None:
    for reparam in (False, True):
        model = prefixed(CAUSAL["llama"], PrefixTuning(num_tokens=P, reparam=reparam, reparam_dim=8, init="zero"))
        assert not adapter(model).vectors().any()
        got = model(input_ids=ids()).logits
        with lp.disabled(model):
            assert (model(input_ids=ids()).logits - got).abs().max() > 1e-2


# ---- padding, masks, causality -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "left", "given"),
    [
        (CAUSAL["llama"], False, False), (CAUSAL["llama"], True, False), (CAUSAL["llama"], True, True),
        (CAUSAL["gpt2"], False, False), (CAUSAL["gpt2"], True, True), (lambda: zoo.bert().bert, False, False),
        (lambda: zoo.bert().bert, True, True), (roberta, False, False),
    ],
)  # fmt: skip
def test_4_a_padded_row_equals_its_unpadded_run(make: Any, left: bool, given: bool) -> None:
    model, (tokens, mask, alone) = prefixed(make), padded(left)
    more = {"position_ids": positions_of(mask)} if given else {}
    key = "logits" if hasattr(model, "lm_head") else "last_hidden_state"
    got = model(input_ids=tokens, attention_mask=mask, **more)[key][0, mask[0] == 1]
    close(got, model(input_ids=alone)[key][0])


@pytest.mark.parametrize("make", SEQ2SEQ)
def test_4_encoder_and_decoder(make: Any) -> None:
    model, (tokens, mask, alone), labels = prefixed(make), padded(left=False), ids(length=5, seed=1)
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    got = model(**batch).logits
    close(got[:1], model(input_ids=alone, labels=labels[:1]).logits)
    read = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    close(model(**batch, decoder_attention_mask=read).logits[0, :3], got[0, :3])
    with lp.disabled(model):
        assert (model(**batch).logits - got).abs().max() > 1e-2


def test_3_no_mask_is_a_mask_of_ones() -> None:
    for make in (*CAUSAL.values(), zoo.bert):
        model = prefixed(make)
        close(model(input_ids=ids()).logits, model(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits)


@pytest.mark.parametrize("name", CAUSAL)
def test_no_position_sees_later_ones_and_all_see_the_prefix(name: str) -> None:
    model, tokens = prefixed(CAUSAL[name]), ids()
    other = tokens.clone()
    other[:, 4:] = 9
    before = model(input_ids=tokens).logits
    close(before[:, :4], model(input_ids=other).logits[:, :4], atol=1e-6)
    with torch.no_grad():
        adapter(model).prefix[-1] += 1
    assert ((model(input_ids=tokens).logits - before).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("make", [*CAUSAL.values(), zoo.bert, zoo.t5])
def test_sdpa_and_eager_agree(make: Any) -> None:
    model, (tokens, mask, _) = prefixed(make), padded(left=False)
    batch = {"input_ids": tokens, "attention_mask": mask}
    batch |= {"labels": ids(length=5)} if make is zoo.t5 else {}
    seen = []
    for kind in ("sdpa", "eager"):
        model.set_attn_implementation(kind)
        seen.append(model(**batch).logits)
    close(*seen)


def test_masks_that_would_be_read_wrongly_are_refused() -> None:
    model = prefixed(CAUSAL["llama"])
    for mask, says in (
        (torch.ones(2, 7 + P), r"attention_mask is \(2, 11\), but the text has 7 positions"),
        (torch.ones(2, 1, 7, 7), r"or none, got \(2, 1, 7, 7\)"),
    ):
        with pytest.raises(ValueError, match=says):
            model(input_ids=ids(), attention_mask=mask)


# ---- generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", CAUSAL)
def test_5_generate_is_step_by_step_argmax_and_beam_search(name: str, cached: bool) -> None:
    model, (tokens, mask, alone) = prefixed(CAUSAL[name]), padded(left=True)
    options: dict[str, Any] = {"attention_mask": mask, "use_cache": cached, "eos_token_id": None}
    want = torch.cat([greedy(model, alone, 5), greedy(model, tokens[1:], 5)])
    assert torch.equal(generated(model, tokens, **options), want)
    want = torch.cat([beams(model, alone, 4, 3), beams(model, tokens[1:], 4, 3)])
    assert torch.equal(generated(model, tokens, 4, num_beams=3, **options), want)


@pytest.mark.parametrize("make", SEQ2SEQ)
def test_5_generate_with_encoder_and_decoder(make: Any) -> None:
    model, (tokens, mask, alone) = prefixed(make), padded(left=False)
    options: dict[str, Any] = {"attention_mask": mask, "eos_token_id": None}
    want = []
    for row in (alone, tokens[1:]):
        out = torch.tensor([[model.config.decoder_start_token_id]])
        for _ in range(5):
            out = torch.cat([out, model(input_ids=row, decoder_input_ids=out).logits[:, -1:].argmax(-1)], 1)
        want.append(out[:, 1:])
    for cached in (True, False):
        assert torch.equal(generated(model, tokens, use_cache=cached, **options), torch.cat(want))
    assert torch.equal(*(generated(model, tokens, num_beams=3, use_cache=c, **options) for c in (True, False)))


def test_5_a_cache_is_returned_where_one_is_asked_for_and_carries_on() -> None:
    model, (tokens, mask, _) = prefixed(CAUSAL["llama"]), padded(left=True)
    whole = model(input_ids=tokens, attention_mask=mask, use_cache=False)
    assert whole.cache is None
    cache = model(input_ids=tokens[:, :5], attention_mask=mask[:, :5], use_cache=True).cache
    assert cache.get_seq_length() == P + 5
    close(model(input_ids=tokens[:, 5:], attention_mask=mask, cache=cache).logits, whole.logits[:, 5:])
    with lp.disabled(model):
        foreign = model(input_ids=tokens[:, :5], attention_mask=mask[:, :5], use_cache=True).cache
    with pytest.raises(ValueError, match="its cache must come from calls with the adapter"):
        model(input_ids=tokens[:, 5:], attention_mask=mask, cache=foreign)
    with pytest.raises(ValueError, match="leave cache_implementation out"):
        generated(model, ids(), cache_implementation="static")


# ---- training ------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_is_refused_where_it_would_drop_the_prefix() -> None:
    model = prefixed(CAUSAL["llama"])
    want = model(input_ids=ids()).logits
    model.gradient_checkpointing_enable({"use_reentrant": False})
    close(model(input_ids=ids()).logits, want)
    with pytest.raises(ValueError, match="transformers leaves out under gradient checkpointing"):
        model.train()(input_ids=ids(), labels=ids())
    with torch.no_grad():
        close(model(input_ids=ids()).logits, want)


def test_the_network_is_dropped_at_the_end_and_the_rows_go_on(tmp_path: Path) -> None:
    model = prefixed(CAUSAL["llama"], NETWORK)
    a, before = adapter(model), model(input_ids=ids()).logits
    assert isinstance(a, NetworkPrefix)
    close(a.vectors(), torch.tanh(a.e @ a.W1.T + a.b1) @ a.W2.T + a.b2)
    lp.save(model, tmp_path / "while")
    NETWORK.finish(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"model.adapters.prefix_tuning.prefix"}
    assert sum(p.numel() for p in a.parameters()) == 256
    close(model(input_ids=ids()).logits, before)
    NETWORK.finish(model)  # a second fit ends with it again
    close(model(input_ids=ids()).logits, before)
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert a.prefix.grad.abs().sum() > 0
    lp.save(model, tmp_path / "after")
    for folder, trained in (("while", {"e", "W1", "b1", "W2", "b2"}), ("after", {"prefix"})):
        other = lp.load(lively(CAUSAL["llama"]), tmp_path / folder).eval()
        assert {n for n, p in adapter(other).named_parameters() if p.requires_grad} == trained
        close(other(input_ids=ids()).logits, before)


def test_dropout_of_states_in_training_alone() -> None:
    model = prefixed(CAUSAL["llama"], PrefixTuning(num_tokens=P, reparam=False, dropout=0.5))
    adapter(model).prefix.data.fill_(1)
    model.eval()
    assert torch.equal(model(input_ids=ids()).logits, model(input_ids=ids()).logits)
    model.train()
    cache = model(input_ids=ids(), use_cache=True).cache
    values = cache.layers[0].values[:, :, :P]
    assert set(values.unique().tolist()) == {0.0, 2.0} and not torch.equal(values[0], values[1])


def test_p_tuning_v2_is_a_preset() -> None:
    config = yaml.safe_load((Path(__file__).parent.parent / "configs/p_tuning_v2.yaml").read_text())["peft"]
    method = PrefixTuning(**config["methods"]["init_args"])
    model = injected(zoo.bert, method, train=config["train"])
    assert isinstance(adapter(model), Prefix) and not isinstance(adapter(model), NetworkPrefix)
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"bert", "classifier"}


def test_under_autocast_and_in_bf16() -> None:
    model = prefixed(CAUSAL["llama"])
    want = model(input_ids=ids()).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=ids(), labels=ids())
    close(out.logits.float(), want, atol=0.3)
    out.loss.backward()
    assert adapter(model).prefix.grad.abs().sum() > 0
    half = model.to(torch.bfloat16)
    assert adapter(half).prefix.dtype == torch.float32 and want.std() > 1
    close(half(input_ids=ids()).logits.float(), want, atol=0.3)


# ---- where it cannot stand -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "num_tokens is at least 1, got 0"),
        ({"init": "vocab"}, r"init is one of \('normal', 'zero'\), got 'vocab'"),
        ({"init_ids": (1,)}, "which needs reparam=False and no init"),
        ({"init_ids": (1,), "reparam": False, "init": "zero"}, "which needs reparam=False and no init"),
        ({"reparam_dim": 0}, "reparam_dim is at least 1 .* got 0"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\), got 512 and 1.0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixTuning(**options)


def test_models_that_it_cannot_work_on() -> None:
    small = DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    for make, says in (
        (zoo.vit, "takes token embeddings"),
        (lambda: DistilBertModel(small), "DistilBertModel takes no cache of keys and values"),
        (lambda: zoo.t5().encoder, "T5Stack keeps no keys and values of its attention; try prompt_tuning"),
    ):
        with pytest.raises(ValueError, match=says):
            lp.inject(make(), PLAIN)
    with pytest.raises(ValueError, match="'prefix_tuning' is a soft prompt on this model already"):
        lp.inject(nets.llama(), [PLAIN, PrefixTuning(name="second")])
    with pytest.raises(ValueError, match="init_ids hold 64"):
        lp.inject(nets.llama(), PrefixTuning(reparam=False, init_ids=(64,)))
    with pytest.raises(ValueError, match="init_ids start from the base's values"):
        lp.inject(nets.llama().to("meta"), PrefixTuning(reparam=False, init_ids=(6,)))


def test_asking_the_model_leaves_no_trace() -> None:
    model = nets.llama().train()
    model.model.layers[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    lp.inject(model, PrefixTuning(num_tokens=P, reparam=False, init_ids=(4,)))
    lp.remove(model)
    assert [m.training for m in model.modules()] == modes and nn.Dropout().training
    lp.inject(model, PrefixTuning(num_tokens=P, reparam=False, init="zero"))
    assert not torch.equal(torch.get_rng_state(), state) or adapter(model).prefix.sum() == 0


def test_a_sliding_window_is_warned_of() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    config = MistralConfig(**sizes, num_key_value_heads=2, intermediate_size=48, sliding_window=4)
    with pytest.warns(UserWarning, match=r"layers \[0, 1\] attend within a sliding window"):
        model = prefixed(lambda: MistralForCausalLM(config).eval(), PrefixTuning(num_tokens=3, reparam=False))
    before = model(input_ids=ids(1, 12)).logits
    with torch.no_grad():
        adapter(model).prefix += 1
    moved = (model(input_ids=ids(1, 12)).logits - before).abs().amax(-1)[0]
    assert moved[0] > 1e-3 and moved[-1] < 1e-5  # each layer reaches 3 positions further back


# ---- huggingface/peft ----------------------------------------------------------------------------------------------


def pair(make: Any, task: str, method: PrefixTuning = PLAIN, **options: Any) -> tuple[Any, Any, Any]:
    base = lively(make)
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P, **options)
    theirs = in_peft(base, config).eval()
    ours = copy.deepcopy(base)
    lp.inject(ours, method)
    return base, ours.eval(), theirs


@pytest.mark.parametrize("name", CAUSAL)
def test_peft_decoders(name: str, tmp_path: Path) -> None:
    base, ours, theirs = pair(CAUSAL[name], "CAUSAL_LM")
    with torch.no_grad():
        adapter(ours).prefix.copy_(rows_of(theirs))
    tokens, mask, _ = padded(left=True)
    batch = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions_of(mask)}
    labels = tokens.masked_fill(mask == 0, -100)
    a, b = ours(**batch, labels=labels), theirs(**batch, labels=labels)
    close(a.logits[mask == 1], b.logits[mask == 1])
    close(a.loss, b.loss)
    a.loss.backward()
    b.loss.backward()
    close(adapter(ours).prefix.grad, theirs.prompt_encoder.default.embedding.weight.grad)
    both_ways(base, theirs, {"input_ids": ids(), "attention_mask": torch.ones_like(ids())}, 0, tmp_path)


def test_peft_moves_a_left_padded_text_away_from_the_prefix() -> None:
    """Where no positions are given, as in training; ours is the unpadded run."""
    _, ours, theirs = pair(CAUSAL["llama"], "CAUSAL_LM")
    with torch.no_grad():
        adapter(ours).prefix.copy_(rows_of(theirs))
    tokens, mask, alone = padded(left=True)
    want = theirs(input_ids=alone).logits[0]
    close(ours(input_ids=tokens, attention_mask=mask).logits[0, 3:], want)
    assert (theirs(input_ids=tokens, attention_mask=mask).logits[0, 3:] - want).abs().max() > 1e-3


def test_peft_with_its_network(tmp_path: Path) -> None:
    base, ours, theirs = pair(CAUSAL["gpt2"], "CAUSAL_LM", NETWORK, prefix_projection=True, encoder_hidden_size=16)
    network = theirs.prompt_encoder.default
    parts = [network.embedding.weight, *network.transform.parameters()]
    a = adapter(ours)
    with torch.no_grad():
        for mine, its in zip((a.e, a.W1, a.b1, a.W2, a.b2), parts, strict=True):
            mine.copy_(its)
    close(ours(input_ids=ids()).logits, theirs(input_ids=ids()).logits)
    ours(input_ids=ids(), labels=ids()).loss.backward()
    theirs(input_ids=ids(), labels=ids()).loss.backward()
    for mine, its in zip((a.e, a.W1, a.b1, a.W2, a.b2), parts, strict=True):
        close(mine.grad, its.grad)
    lp.hf.save(ours, tmp_path)  # a fit that is still going on, too
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    close(again(input_ids=ids()).logits, ours(input_ids=ids()).logits)


def test_peft_counts_the_network_by_the_width_of_keys() -> None:
    """The card's 1424 for llama's 2 key heads of width 8; ours reads embeddings as wide as the model's, 32."""
    _, _, theirs = pair(CAUSAL["llama"], "CAUSAL_LM", prefix_projection=True, encoder_hidden_size=16)
    assert sum(p.numel() for p in theirs.prompt_encoder.parameters()) == 1424


def test_peft_gives_layers_of_t5_each_other_s_rows(tmp_path: Path) -> None:
    base, ours, theirs = pair(zoo.t5, "SEQ_2_SEQ_LM")
    batch = {"input_ids": ids(), "labels": ids(length=5)}
    theirs(**batch).loss.backward()
    grad = theirs.prompt_encoder.default.embedding.weight.grad.view(P, 4, 32)
    assert grad[:, :2].any() and not grad[:, 2:].any()  # the second layer's own rows are never read
    rows = rows_of(theirs).view(P, 4, 32)
    with torch.no_grad():
        adapter(ours).prefix.copy_(torch.cat([rows[:, :2], rows[:, :2]], 1).flatten(1))
    close(ours(**batch).logits, theirs(**batch).logits)  # both layers read the first's
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(ValueError, match="gives layer l the rows of layer 2 l"):
        lp.hf.load(base, tmp_path / "theirs")
    with pytest.raises(ValueError, match="gives a layer other rows than its own"):
        lp.hf.save(ours, tmp_path / "ours")


def test_what_peft_s_format_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not read back what is trained beside a soft prompt, here 'lm_head"):
        lp.hf.save(injected(CAUSAL["llama"], PLAIN, train=("lm_head",)), tmp_path)
    assert not any(tmp_path.iterdir())
