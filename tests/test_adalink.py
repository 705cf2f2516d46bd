"""AdaLink: the checks of its card, by worked numbers and dense float64 references."""

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from lightning_peft_plugins.additive.adalink import AdaLink, LinearLink, Link, TableLink
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from tests.nets import llama as new_llama
from tests.zoo.bases import bart, bert, gpt2, llama, sentences, t5, t5_untied, text, vit

F64 = torch.float64
LLAVA = {"text": "*.embed_tokens", "image": "*.multi_modal_projector.linear_2"}
IMAGE_TOKEN = 63


def llava() -> Any:
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    lm = hf.LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    config = hf.LlavaConfig(vision_config=vision, text_config=lm, image_token_index=IMAGE_TOKEN, image_seq_length=4)
    return hf.LlavaForConditionalGeneration(config).eval()


def mixed() -> dict[str, Tensor]:
    ids = torch.tensor([[5, 63, 63, 63, 63, 7, 9], [63, 63, 63, 63, 8, 4, 6]])
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def links(model: nn.Module) -> dict[str, Any]:
    return {n: a for n, _, a in lp.adapters(model) if isinstance(a, Link)}


def filled(model: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """``model`` with maps away from their start."""
    lp.inject(model, AdaLink(**{"r": 4} | options), dtype=dtype)
    for a in links(model).values():
        for p in a.parameters():
            nn.init.normal_(p, std=0.3)
    return model


def embedded(model: Any, batch: dict[str, Any]) -> Tensor:
    """What enters the first block of a LLaVA's language model."""
    seen: list[Tensor] = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model(**batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("make", [llama, bert, gpt2, t5, bart, llava])
def test_1_the_start_is_the_base(make: Any) -> None:
    base = make()
    model = copy.deepcopy(base)
    lp.inject(model, AdaLink(r=4, modalities=LLAVA if make is llava else {}))
    batch = mixed() if make is llava else sentences() if make is bert else text()
    far = 1e-5 if make is t5 else 0.0  # attention rounds otherwise where its inputs need no gradient
    torch.testing.assert_close(model(**batch).logits, base(**batch).logits, atol=far, rtol=far)
    assert len(links(model)) == (2 if make is llava else 1)


def test_2_counts() -> None:
    model = llava()
    lp.inject(model, AdaLink(r=4, modalities=LLAVA))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 2 * 4 * 32
    with torch.device("meta"):
        wide = nn.ModuleDict({"text": nn.Embedding(10, 4096), "image": nn.Linear(8, 4096)})
    lp.inject(wide, AdaLink(modalities={"text": "text", "image": "image"}))
    assert sum(p.numel() for p in wide.parameters() if p.requires_grad) == 1_048_576  # the paper's PaLI-X


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_3_by_hand(scale: float) -> None:
    model = nn.Sequential(nn.Embedding(1, 3))
    lp.inject(model, AdaLink(r=2, scale=scale, modalities={"text": "0"}))
    (a,) = links(model).values()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
        a.down.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]))
        a.up.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    want = torch.tensor([[2.0, 7.0, 9.0]]) if scale == 1.0 else torch.tensor([[1.5, 4.5, 6.0]])
    assert torch.equal(model(torch.tensor([0])), want)


def test_4_modalities_do_not_meet() -> None:
    model, batch = filled(llava(), modalities=LLAVA), mixed()
    text_map = links(model)["model.language_model.embed_tokens"]
    image_map = links(model)["model.multi_modal_projector.linear_2"]
    is_image = batch["input_ids"] == IMAGE_TOKEN
    for changed, same, other in ((image_map, ~is_image, is_image), (text_map, is_image, ~is_image)):
        before = embedded(model, batch)
        with torch.no_grad():
            changed.up.add_(1.0)
        after = embedded(model, batch)
        assert torch.equal(before[same], after[same]) and not torch.allclose(before[other], after[other])
    only_text = {"input_ids": torch.tensor([[5, 7, 9]])}
    model(**only_text).logits.sum().backward()
    assert image_map.up.grad is None and text_map.up.grad.abs().max() > 0


def test_4_each_token_goes_through_its_own_map() -> None:
    base, batch = llava().double(), mixed()
    batch["pixel_values"] = batch["pixel_values"].double()
    model = filled(copy.deepcopy(base), F64, modalities=LLAVA)
    e, got = embedded(base, batch), embedded(model, batch)
    is_image = batch["input_ids"] == IMAGE_TOKEN
    for where, a in zip((~is_image, is_image), (links(model)[n] for n in sorted(links(model))), strict=True):
        torch.testing.assert_close(got[where], e[where] + e[where] @ a.down.T @ a.up.T)


def test_4_shared_is_one_map_and_stays_one() -> None:
    model = filled(llava(), modalities=LLAVA, shared=True)
    one, two = links(model).values()
    assert one.up is two.up and one.down is two.down
    other = copy.deepcopy(model)
    one, two = links(other).values()
    assert one.up is two.up and one.up is not next(iter(links(model).values())).up
    with pytest.raises(ValueError, match=r"adalink: shared needs modalities of one width, got \[32, 16\]"):
        unlike = LLAVA | {"image": "model.vision_tower.encoder.layers.0.mlp.fc2"}
        lp.inject(llava(), AdaLink(modalities=unlike, shared=True))


def test_5_length_mask_and_positions_are_as_before() -> None:
    model, batch = filled(llama()), text()
    out = model(**batch, use_cache=True)
    assert out.logits.shape[:2] == batch["input_ids"].shape
    assert out.past_key_values.get_seq_length() == batch["input_ids"].shape[1]


@pytest.mark.parametrize("activation", ["identity", "gelu", "relu"])
@pytest.mark.parametrize("make", [llama, bart])  # BART returns rows of its table times sqrt(hidden) if asked to
def test_6_the_merged_table(make: Any, activation: str) -> None:
    model = make().double()
    if make is bart:
        model.model.encoder.embed_tokens.weight = nn.Parameter(model.model.shared.weight.detach().clone())
        model.model.encoder.embed_tokens.embed_scale = 3.0
    filled(model, F64, activation=activation, scale=0.7)
    (name,), (a,) = links(model), links(model).values()
    table, batch = model.get_submodule(name).weight.detach().clone(), text()
    s, f = (3.0 if make is bart else 1.0), {"identity": lambda x: x, "gelu": F.gelu, "relu": F.relu}[activation]
    want = model(**batch).logits
    lp.merge(model)
    rows = torch.stack([e + 0.7 * a.up @ f(a.down @ e) for e in s * table]) / s
    torch.testing.assert_close(model.get_submodule(name).weight.data, rows)
    torch.testing.assert_close(model(**batch).logits, want)


def test_6_a_tied_head_would_change_too_so_merging_is_refused() -> None:
    model = filled(new_llama(use_cache=False, tie_word_embeddings=True).eval())
    ids = text()["input_ids"]
    want = model(ids).logits
    with pytest.raises(ValueError, match=r"the weight of 'model.embed_tokens' is tied .* untie them first"):
        lp.merge(model)
    assert torch.equal(model(ids).logits, want)
    naive = new_llama(use_cache=False, tie_word_embeddings=True).eval()
    with lp.disabled(model), torch.no_grad():
        state = {k: v for k, v in model.state_dict().items() if "adapters" not in k}
        naive.load_state_dict(state)
        table, (a,) = naive.model.embed_tokens.weight, links(model).values()
        table.add_(table @ a.down.T @ a.up.T)
    assert (naive(ids).logits - want).abs().max() > 0.1 * want.abs().max()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    lp.merge(model)
    torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)


def test_6_the_image_s_map_merges_into_the_projector_bias_included() -> None:
    model, batch = filled(llava(), modalities=LLAVA), mixed()
    a = links(model)["model.multi_modal_projector.linear_2"]
    assert isinstance(a, LinearLink)
    layer = model.model.multi_modal_projector.linear_2
    nn.init.normal_(layer.bias)
    whole = torch.eye(32) + a.up @ a.down
    want, W, b = model(**batch).logits, whole @ layer.weight, whole @ layer.bias
    lp.merge(model)
    torch.testing.assert_close(layer.weight, W)
    torch.testing.assert_close(layer.bias, b)
    torch.testing.assert_close(model(**batch).logits, want, atol=1e-5, rtol=1e-5)


def test_6_what_is_not_linear_merges_into_a_table_alone() -> None:
    model = filled(llava(), modalities=LLAVA, activation="gelu")
    kinds = {n.rpartition(".")[2]: type(a) for n, a in links(model).items()}
    assert kinds == {"embed_tokens": TableLink, "linear_2": Link}
    with pytest.raises(ValueError, match="'model.multi_modal_projector.linear_2' is a Link, which cannot be merged"):
        lp.merge(model)


def test_7_embeddings_made_by_the_model_s_own_layer_are_mapped_once() -> None:
    model, ids = filled(llama()), text()["input_ids"]
    e = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=e).logits, model(ids).logits)


@pytest.mark.parametrize("make", [llama, bert, t5_untied])
def test_7_embeddings_from_elsewhere_are_mapped_where_asked_for(make: Any) -> None:
    base = make()
    ids = text()["input_ids"]
    encoder = base.get_encoder() if base.config.is_encoder_decoder else base
    raw = encoder.get_input_embeddings()(ids)
    more = {"decoder_input_ids": ids} if base.config.is_encoder_decoder else {}
    torch.manual_seed(5)
    asked = filled(copy.deepcopy(base), inputs_embeds=True)
    torch.manual_seed(5)
    plain = filled(copy.deepcopy(base))
    want = plain(input_ids=ids, **more).logits
    torch.testing.assert_close(asked(input_ids=ids, **more).logits, want)
    torch.testing.assert_close(asked(inputs_embeds=raw, **more).logits, want)
    torch.testing.assert_close(plain(inputs_embeds=raw, **more).logits, base(input_ids=ids, **more).logits)
    (a,) = links(asked).values()
    asked(inputs_embeds=raw, **more).logits.sum().backward()
    assert a.up.grad.abs().max() > 0
    with pytest.raises(ValueError, match="is a GivenLink, which cannot be merged"):
        lp.merge(asked)


@pytest.mark.parametrize("make", [llama, gpt2, t5])
def test_7_generation_maps_every_new_token(make: Any) -> None:
    model, ids = filled(make()), torch.randint(3, 60, (2, 4))
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True, "attention_mask": torch.ones_like(ids)}
    cached, again = (model.generate(ids, use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached.sequences, again.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(again.logits), atol=1e-4, rtol=1e-4)
    if make is not t5:
        given = model.generate(inputs_embeds=model.get_input_embeddings()(ids), use_cache=True, **options)
        assert torch.equal(given.sequences, cached.sequences[:, 4:])


@pytest.mark.parametrize("reentrant", [False, True])
def test_8_gradient_checkpointing(reentrant: bool) -> None:
    model, batch, grads = filled(llama()).train(), text(), []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(**batch).loss.backward()
        grads.append([p.grad.clone() for a in links(model).values() for p in a.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 0


def test_8_first_gradients() -> None:
    model = llama()
    lp.inject(model, AdaLink(r=4))
    model(**text()).loss.backward()
    (a,) = links(model).values()
    assert a.down.grad.abs().max() == 0 and a.up.grad.abs().max() > 0
    assert all(p.grad is None for n, p in model.named_parameters() if "adapters" not in n)


def test_9_positions_that_come_from_the_ids_are_kept() -> None:
    """RoBERTa counts positions by the ids that are no padding: passing embeddings in their place would move them."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = hf.RobertaModel(hf.RobertaConfig(vocab_size=64, intermediate_size=48, pad_token_id=1, **sizes)).eval()
    ids = torch.tensor([[1, 1, 5, 9, 7], [4, 8, 5, 9, 7]])
    mask = (ids != 1).long()
    model = copy.deepcopy(base)
    lp.inject(model, AdaLink(r=4, inputs_embeds=True))
    assert torch.equal(model(ids, mask).last_hidden_state, base(ids, mask).last_hidden_state)


def test_the_encoder_alone_unless_the_decoder_is_asked_for() -> None:
    model = t5()
    lp.inject(model, AdaLink(r=4))
    assert list(links(model)) == ["encoder.embed_tokens"]
    both = t5()
    lp.inject(both, AdaLink(r=4, decoder_input=True))
    one, two = links(both).values()
    assert list(links(both)) == ["encoder.embed_tokens", "decoder.embed_tokens"] and one.up is not two.up
    bridged = bart()
    bridged.model.set_input_embeddings(bridged.model.shared)  # one layer for both, as transformers leaves it then
    with pytest.raises(ValueError, match="adalink: a token embedding of its own is needed, found .* give modalities"):
        lp.inject(bridged, AdaLink())


def test_dropout_is_on_what_the_map_reads() -> None:
    model = filled(nn.Sequential(nn.Embedding(8, 6)), dropout=0.5, modalities={"text": "0"})
    (a,), ids = links(model).values(), torch.tensor([1, 5])
    e = model[0].weight[ids]
    torch.manual_seed(3)
    got = model.train()(ids)
    torch.manual_seed(3)
    torch.testing.assert_close(got, e + F.dropout(e, 0.5) @ a.down.T @ a.up.T)
    torch.testing.assert_close(model.eval()(ids), e + e @ a.down.T @ a.up.T)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r is at least 1.* got 0, 1.0 and 0.0"),
        ({"scale": 0.0}, "scale positive"),
        ({"dropout": 1.0}, "dropout a probability below 1"),
        ({"activation": "gelo"}, "activation 'gelo' is none of .*nearest: 'gelu'"),
        ({"shared": True}, "shared has no effect with less than two modalities, got 0"),
        ({"modalities": {"text": "x"}, "decoder_input": True}, "modalities say where"),
        ({"modalities": {"text": "x"}, "inputs_embeds": True}, "modalities say where"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"adalink: .*{message}"):
        AdaLink(**options)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (llama, {"modalities": {"text": "*.embed_token"}}, "no embedding or linear matches .*nearest: .*embed_tokens"),
        (
            llama,
            {"modalities": {"text": "*proj"}},
            "'\\*proj' of 'text' names \\['model.*each has one layer of its own",
        ),
        (llama, {"modalities": {"a": "lm_head", "b": "lm_*"}}, "'lm_\\*' of 'b' is the layer of 'a'"),
        (llama, {"decoder_input": True}, "decoder_input has no effect, LlamaForCausalLM has no encoder before one"),
        (vit, {}, "a token embedding of its own is needed, found \\['ViTPatchEmbeddings'\\]; give modalities"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), {}, "one model that reads text is needed, found \\[\\]"),
        (lambda: nn.ModuleList([llama(), llama()]), {}, "one model that reads text is needed, found \\['0', '1'\\]"),
    ],
)
def test_what_matches_nothing_raises(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lp.inject(make(), AdaLink(**options))
