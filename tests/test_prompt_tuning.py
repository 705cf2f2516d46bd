"""Prompt tuning against hand-written models with longer inputs, against itself unpadded and uncached, and peft."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning_peft_plugins.additive.prompt_tuning import PromptTuning
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForSequenceClassification

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

METHOD = PromptTuning(num_tokens=P)


def prompted(make: Any) -> Any:
    return injected(make, METHOD)


def by_hand(model: Any, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Arguments of the plain model for the longer input."""
    x = model.get_input_embeddings()(tokens)
    x = torch.cat([adapter(model).prompt.expand(len(x), -1, -1), x], 1)
    mask = torch.ones_like(tokens) if mask is None else mask
    return {"inputs_embeds": x, "attention_mask": torch.cat([mask.new_ones(len(mask), P), mask], 1)}


# ---- what the model computes ---------------------------------------------------------------------------------------


def test_counts() -> None:
    for make in (*CAUSAL.values(), zoo.bert, zoo.t5, bart):
        model = prompted(make)
        assert {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}.popitem()[1] == P * 32
        assert sum(p.requires_grad for p in model.parameters()) == 1


@pytest.mark.parametrize("name", CAUSAL)
def test_logits_and_loss_are_those_of_the_longer_input_at_the_text(name: str) -> None:
    model, tokens = prompted(CAUSAL[name]), ids()
    labels = tokens.clone()
    labels[1, 2] = -100
    out = model(input_ids=tokens, labels=labels)
    with lp.disabled(model):
        long = model(**by_hand(model, tokens)).logits
    close(out.logits, long[:, P:])
    assert out.logits.shape == (2, 7, zoo.V)
    each = F.cross_entropy(long[:, P:-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    close(out.loss, each)
    out.loss.backward()
    prompt = adapter(model).prompt
    grad = torch.autograd.grad(each, prompt)[0]
    close(prompt.grad, grad)
    assert prompt.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters() if p is not prompt)


def test_the_encoder_s_pooler_reads_the_first_word_and_not_the_prompt() -> None:
    model, tokens = prompted(zoo.bert), ids()
    mask, kinds = torch.ones_like(tokens), torch.tensor([[0] * 3 + [1] * 4] * 2)
    mask[0, -2:] = 0
    out = model.bert(tokens, attention_mask=mask, token_type_ids=kinds)
    logits = model(tokens, mask, kinds).logits  # by place, as some callers do
    with lp.disabled(model):
        long = by_hand(model, tokens, mask) | {"token_type_ids": F.pad(kinds, (P, 0))}
        states = model.bert(**long).last_hidden_state[:, P:]
        pooled = model.bert.pooler(states)
        close(out.last_hidden_state, states)
        close(out.pooler_output, pooled)
        close(logits, model.classifier(pooled))


def test_a_decoder_as_classifier_reads_the_last_word_of_each_row() -> None:
    config = nets.llama().config
    config.num_labels, config.pad_token_id = 3, 0
    model = prompted(lambda: LlamaForSequenceClassification(config).eval())
    tokens, mask, alone = padded(left=False)
    got = model(input_ids=tokens, attention_mask=mask).logits
    close(got[:1], model(input_ids=alone).logits)
    with lp.disabled(model):
        long = by_hand(model, alone)
        close(got[:1], model.score(model.model(**long).last_hidden_state[:, -1]))


@pytest.mark.parametrize("make", [zoo.t5, bart])
def test_encoder_and_decoder(make: Any) -> None:
    """The prompt stands before the encoder's text, and the decoder reads its positions too."""
    model, (tokens, mask, alone), labels = prompted(make), padded(left=False), ids(length=5, seed=1)
    out = model(input_ids=tokens, attention_mask=mask, labels=labels)
    with lp.disabled(model):
        encoder = model.get_encoder()
        x = encoder.get_input_embeddings()(tokens)
        x = torch.cat([adapter(model).prompt.expand(2, -1, -1), x], 1)
        long = F.pad(mask, (P, 0), value=1)
        states = encoder(inputs_embeds=x, attention_mask=long)
        want = model(encoder_outputs=states, attention_mask=long, labels=labels)
    close(out.logits, want.logits)
    close(out.loss, want.loss)
    close(out.logits[:1], model(input_ids=alone, labels=labels[:1]).logits)
    out.loss.backward()
    assert adapter(model).prompt.grad.abs().sum() > 0
    with lp.disabled(model):
        assert (model(input_ids=tokens, attention_mask=mask, labels=labels).logits - out.logits).abs().max() > 1e-3


def test_roberta_s_positions_begin_at_two_given_or_not() -> None:
    model, tokens = prompted(roberta), ids()
    given = torch.arange(2, 9).expand(2, -1)
    close(model(tokens, position_ids=given).last_hidden_state, model(tokens).last_hidden_state)
    with lp.disabled(model):
        want = model(**by_hand(model, tokens)).last_hidden_state[:, P:]
    close(model(tokens, position_ids=given).last_hidden_state, want)


# ---- padding, masks, causality -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "left", "given"), [("llama", False, False), ("llama", True, False), ("llama", True, True),
                                ("gpt2", False, False), ("gpt2", True, True)],
)  # fmt: skip
def test_a_padded_row_equals_its_unpadded_run(name: str, left: bool, given: bool) -> None:
    """Rotary models need no position_ids for that; without ours in front they do not either."""
    model, (tokens, mask, alone) = prompted(CAUSAL[name]), padded(left)
    more = {"position_ids": positions_of(mask)} if given else {}
    got = model(input_ids=tokens, attention_mask=mask, **more).logits[0, mask[0] == 1]
    close(got, model(input_ids=alone).logits[0])


def test_no_mask_is_a_mask_of_ones() -> None:
    for make in (*CAUSAL.values(), zoo.bert):
        model = prompted(make)
        close(model(input_ids=ids()).logits, model(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits)


@pytest.mark.parametrize("name", CAUSAL)
def test_no_position_sees_later_ones_and_all_see_the_prompt(name: str) -> None:
    model, tokens = prompted(CAUSAL[name]), ids()
    other = tokens.clone()
    other[:, 4:] = 9
    before, after = model(input_ids=tokens).logits, model(input_ids=other).logits
    close(before[:, :4], after[:, :4], atol=1e-6)
    with torch.no_grad():
        adapter(model).prompt[-1, ::2] += 1
    assert ((model(input_ids=tokens).logits - before).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("make", [*CAUSAL.values(), zoo.bert, zoo.t5])
def test_sdpa_and_eager_agree(make: Any) -> None:
    model, (tokens, mask, _) = prompted(make), padded(left=False)
    batch = {"input_ids": tokens, "attention_mask": mask}
    batch |= {"labels": ids(length=5)} if make is zoo.t5 else {}
    seen = []
    for kind in ("sdpa", "eager"):
        model.set_attn_implementation(kind)
        seen.append(model(**batch).logits)
    close(*seen)


def test_all_outputs_have_the_text_s_positions() -> None:
    model = prompted(CAUSAL["llama"])
    model.set_attn_implementation("eager")
    options: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
    out = model(input_ids=ids(), **options)
    assert [t.shape[1] for t in out.hidden_states] == [7] * 3
    assert [tuple(t.shape) for t in out.attentions] == [(2, 4, 7, 7 + P)] * 2
    body = model.model(input_ids=ids())
    close(out.hidden_states[-1], body.last_hidden_state)
    plain = model.model(input_ids=ids(), return_dict=False)
    assert isinstance(plain, tuple)
    close(plain[0], body.last_hidden_state)


def test_embeddings_may_be_given() -> None:
    model = prompted(CAUSAL["llama"])
    close(model(inputs_embeds=model.get_input_embeddings()(ids())).logits, model(input_ids=ids()).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.ones(2, 7 + P)}, r"attention_mask is \(2, 11\), but the text has 7 positions"),
        ({"attention_mask": torch.ones(2, 1, 7, 7)}, r"attention_mask of \(batch, positions\) or none, got \(2, 1"),
        ({"attention_mask": {"full_attention": None}}, r"or none, got dict"),
    ],
)
def test_masks_that_would_be_read_wrongly_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompted(CAUSAL["llama"])(input_ids=ids(), **options)


# ---- generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", CAUSAL)
def test_generate_is_step_by_step_argmax_and_beam_search(name: str, cached: bool) -> None:
    model, (tokens, mask, alone) = prompted(CAUSAL[name]), padded(left=True)
    options: dict[str, Any] = {"attention_mask": mask, "use_cache": cached, "eos_token_id": None}
    want = torch.cat([greedy(model, alone, 5), greedy(model, tokens[1:], 5)])
    assert torch.equal(generated(model, tokens, **options), want)
    want = torch.cat([beams(model, alone, 4, 3), beams(model, tokens[1:], 4, 3)])
    assert torch.equal(generated(model, tokens, 4, num_beams=3, **options), want)


@pytest.mark.parametrize("make", [zoo.t5, bart])
def test_generate_with_encoder_and_decoder(make: Any) -> None:
    model, (tokens, mask, alone) = prompted(make), padded(left=False)
    options: dict[str, Any] = {"attention_mask": mask, "eos_token_id": None}
    start = torch.tensor([[model.config.decoder_start_token_id]])
    rows = [alone, tokens[1:]]
    want = []
    for row in rows:
        out = start
        for _ in range(5):
            out = torch.cat([out, model(input_ids=row, decoder_input_ids=out).logits[:, -1:].argmax(-1)], 1)
        want.append(out[:, 1:])
    for cached in (True, False):
        assert torch.equal(generated(model, tokens, use_cache=cached, **options), torch.cat(want))
    found = [generated(model, tokens, num_beams=3, use_cache=c, **options) for c in (True, False)]
    assert torch.equal(*found)


def test_a_cache_carried_on_by_hand() -> None:
    model, (tokens, mask, _) = prompted(CAUSAL["llama"]), padded(left=True)
    whole = model(input_ids=tokens, attention_mask=mask).logits
    first = model(input_ids=tokens[:, :5], attention_mask=mask[:, :5], use_cache=True)
    cache = first.cache
    assert cache.get_seq_length() == P + 5
    rest = model(input_ids=tokens[:, 5:], attention_mask=mask, cache=cache, use_cache=True)
    real = mask[:, :5] == 1
    close(first.logits[real], whole[:, :5][real])
    close(rest.logits, whole[:, 5:])
    with lp.disabled(model):
        foreign = model(input_ids=tokens[:, :5], attention_mask=mask[:, :5], use_cache=True).cache
    with pytest.raises(ValueError, match="its cache must come from calls with the adapter"):
        model(input_ids=tokens[:, 5:], attention_mask=mask, cache=foreign)


def test_a_cache_of_fixed_size_is_refused() -> None:
    with pytest.raises(ValueError, match="leave cache_implementation out"):
        generated(prompted(CAUSAL["llama"]), ids(), cache_implementation="static")


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*CAUSAL.values(), zoo.t5])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(make: Any, reentrant: bool) -> None:
    model = prompted(make).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):  # T5's attention
            module.dropout = 0.0
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(input_ids=ids(), labels=ids()).loss.backward()
        grads.append(adapter(model).prompt.grad.clone())
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    close(*grads)


def test_where_it_starts() -> None:
    model = prompted(CAUSAL["llama"])
    table = model.get_input_embeddings().weight
    assert all((row == table).all(1).any() for row in adapter(model).prompt)
    model = injected(CAUSAL["llama"], PromptTuning(num_tokens=5, init_ids=(7, 3)))
    assert torch.equal(adapter(model).prompt, model.get_input_embeddings().weight[[7, 3, 7, 3, 7]])
    model = injected(bart, PromptTuning(num_tokens=2, init_ids=(7, 3, 5)))
    assert torch.equal(adapter(model).prompt, model.get_input_embeddings().weight[[7, 3]] * 32**0.5)
    wide = adapter(injected(CAUSAL["llama"], PromptTuning(num_tokens=100, init="uniform"))).prompt
    assert wide.abs().max() <= 0.5 and abs(float(wide.detach().std()) - 1 / 12**0.5) < 0.02
    normal = adapter(injected(CAUSAL["llama"], PromptTuning(num_tokens=100, init="normal"))).prompt
    assert abs(float(normal.detach().std()) - 1) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "num_tokens is at least 1, got 0"),
        ({"init": "text"}, r"init is one of \('vocab', 'uniform', 'normal'\), got 'text'"),
        ({"init_ids": (1,), "init": "normal"}, "so init='normal' has no effect"),
        ({"init_ids": (-1,)}, "init_ids are ids of tokens, got -1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptTuning(**options)


def test_where_it_cannot_stand() -> None:
    with pytest.raises(ValueError, match="init_ids hold 64, but the vocabulary has 64"):
        lp.inject(CAUSAL["llama"](), PromptTuning(init_ids=(64,)))
    for make in (zoo.cnn, zoo.vit):
        with pytest.raises(ValueError, match="nothing in this .* takes token embeddings"):
            lp.inject(make(), METHOD)
    with pytest.raises(ValueError, match=r"prompt_tuning_2: 'prompt_tuning' is a soft prompt on this model already"):
        lp.inject(CAUSAL["llama"](), [METHOD, PromptTuning(name="prompt_tuning_2")])
    towers = torch.nn.ModuleDict({"one": zoo.bert(), "two": zoo.bert()})
    with pytest.raises(ValueError, match=r"\['one.bert', 'two.bert'\] could each .*model='one.bert'"):
        lp.inject(towers, METHOD)
    lp.inject(towers["one"], METHOD)


def test_the_body_itself_may_be_the_model() -> None:
    model = prompted(lambda: nets.llama().model.eval())
    assert [n for n, _, _ in lp.adapters(model)] == [""]
    assert model(ids()).last_hidden_state.shape == (2, 7, 32)


def test_under_autocast_and_in_bf16() -> None:
    model = prompted(CAUSAL["llama"])
    want = model(input_ids=ids()).logits
    with torch.autocast("cpu", torch.bfloat16):
        close(model(input_ids=ids()).logits.float(), want, atol=0.2)
    half = model.to(torch.bfloat16)
    assert adapter(half).prompt.dtype == torch.float32 and want.std() > 1
    close(half(input_ids=ids()).logits.float(), want, atol=0.2)
    assert generated(half, ids()).shape == (2, 5)


# ---- huggingface/peft ----------------------------------------------------------------------------------------------


def pair(make: Any, task: str) -> tuple[Any, Any, Any]:
    """(base, ours, theirs) with the same prompt."""
    base = lively(make)
    theirs = in_peft(base, peft.PromptTuningConfig(task_type=task, num_virtual_tokens=P)).eval()
    ours = copy.deepcopy(base)
    lp.inject(ours, METHOD)
    with torch.no_grad():
        adapter(ours).prompt.copy_(rows_of(theirs)[:P])
    return base, ours.eval(), theirs


@pytest.mark.parametrize("name", CAUSAL)
def test_peft_decoders(name: str, tmp_path: Path) -> None:
    base, ours, theirs = pair(CAUSAL[name], "CAUSAL_LM")
    tokens, mask, _ = padded(left=False)
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, 0] = -100  # see the next test
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    a, b = ours(**batch), theirs(**batch)
    close(a.logits[mask == 1], b.logits[:, P:][mask == 1])
    close(a.loss, b.loss)
    a.loss.backward()
    b.loss.backward()
    close(adapter(ours).prompt.grad, theirs.prompt_encoder.default.embedding.weight.grad)
    both_ways(base, theirs, {"input_ids": ids()}, P, tmp_path)
    options: dict[str, Any] = {"eos_token_id": None, "use_cache": False}  # peft 0.21.2 does not know "cache" (5.24)
    assert torch.equal(generated(ours, ids(), **options), generated(theirs, ids(), **options))


def test_peft_s_loss_has_one_term_more_a_row() -> None:
    """The first word from the last virtual token. Ours is the loss that the model has for these labels anywhere."""
    _, ours, theirs = pair(CAUSAL["llama"], "CAUSAL_LM")
    out = theirs(input_ids=ids(), labels=ids())
    first = F.cross_entropy(out.logits[:, P - 1], ids()[:, 0])
    close((ours(input_ids=ids(), labels=ids()).loss * 6 + first) / 7, out.loss)


@pytest.mark.parametrize("make", [zoo.t5, bart])
def test_peft_encoder_and_decoder(make: Any, tmp_path: Path) -> None:
    """peft holds twice the rows there and never reads the second half."""
    base, ours, theirs = pair(make, "SEQ_2_SEQ_LM")
    weight = theirs.prompt_encoder.default.embedding.weight
    assert weight.shape == (2 * P, 32)
    tokens, mask, _ = padded(left=False)
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": ids(length=5)}
    a, b = ours(**batch), theirs(**batch)
    close(a.logits, b.logits)
    a.loss.backward()
    b.loss.backward()
    close(adapter(ours).prompt.grad, weight.grad[:P])
    assert not weight.grad[P:].any()
    both_ways(base, theirs, batch, 0, tmp_path)


def test_peft_moves_the_prompt_away_from_a_left_padded_text() -> None:
    """In training, where no positions are given; ours is the unpadded run."""
    _, ours, theirs = pair(CAUSAL["llama"], "CAUSAL_LM")
    tokens, mask, alone = padded(left=True)
    want = ours(input_ids=alone).logits[0]
    close(want, theirs(input_ids=alone).logits[0, P:])
    close(ours(input_ids=tokens, attention_mask=mask).logits[0, 3:], want)
    assert (theirs(input_ids=tokens, attention_mask=mask).logits[0, P + 3 :] - want).abs().max() > 1e-4


def test_peft_classifies_by_the_first_virtual_token(tmp_path: Path) -> None:
    """Its pooler reads position 0 of the longer input: ours reads the text's, so such folders are refused."""
    base, ours, theirs = pair(zoo.bert, "SEQ_CLS")
    logits = theirs(input_ids=ids()).logits
    assert (ours(input_ids=ids()).logits - logits).abs().max() > 1e-3
    with lp.disabled(ours):
        close(base.classifier(base.bert(**by_hand(ours, ids())).pooler_output), logits)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(ValueError, match="task_type is 'SEQ_CLS', for which huggingface/peft reads other positions"):
        lp.hf.load(base, tmp_path / "theirs")
    with pytest.raises(ValueError, match="of a .*BertForSequenceClassification huggingface/peft reads other"):
        lp.hf.save(ours, tmp_path / "ours")
