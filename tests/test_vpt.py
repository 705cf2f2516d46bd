"""VPT against vision transformers written out with the paper's order of tokens, on every kind of them we can build."""

import math
from typing import Any

import pytest
import torch
from lightning_peft_plugins.additive.vpt import VPT, Leave, VisualPrompt
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPConfig,
    CLIPModel,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForMaskedImageModeling,
    ViTModel,
)

import lightning_peft as lp
from tests.soft_prompts import close, injected
from tests.zoo import bases as zoo

P, N = 3, 4  # tokens of ours, patches
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE: dict[str, Any] = {"image_size": 16, "patch_size": 8, "num_channels": 1}


class Own(nn.Module):
    """A vision transformer of torch's parts alone."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 8, stride=8)
        layer = nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=batch_first, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(pixel_values).flatten(2).mT).mean(1))


def pixels(n: int = 2) -> Tensor:
    return torch.randn(n, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def prompts(model: Any) -> list[Tensor]:
    return [a.prompt for _, _, a in lp.adapters(model) if isinstance(a, VisualPrompt)]


def by_hand(model: Any, deep: bool) -> Tensor:
    """[class token; prompts; patches], the prompts replaced before every later layer where deep. The class's state."""
    vit, own = model.vit, prompts(model)
    x = vit.embeddings(pixels())
    for i, layer in enumerate(vit.layers):
        if i == 0:
            x = torch.cat([x[:, :1], own[0].expand(2, -1, -1), x[:, 1:]], 1)
        elif deep:
            x = torch.cat([x[:, :1], own[i].expand(2, -1, -1), x[:, 1 + P :]], 1)
        assert x.shape == (2, 1 + P + N, 32)
        x = layer(x)
    return vit.layernorm(x)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("deep", [True, False])
def test_the_model_is_the_paper_s(deep: bool, kind: str) -> None:
    model = injected(zoo.vit, VPT(num_tokens=P, deep=deep))
    model.set_attn_implementation(kind)
    out = model(pixel_values=pixels(), labels=torch.tensor([0, 2]))
    with lp.disabled(model):
        states = by_hand(model, deep)
        want = nn.functional.cross_entropy(model.classifier(states[:, 0]), torch.tensor([0, 2]))
        assert (model(pixel_values=pixels()).logits - out.logits).abs().max() > 1e-2
    close(out.logits, model.classifier(states[:, 0]))
    close(out.loss, want)
    body = model.vit(pixels()).last_hidden_state
    close(body, torch.cat([states[:, :1], states[:, 1 + P :]], 1))
    out.loss.backward()
    for mine, its in zip([p.grad for p in prompts(model)], torch.autograd.grad(want, prompts(model)), strict=True):
        close(mine, its)
        assert mine.any()
    assert not any(p.grad is not None for n, p in model.named_parameters() if "prompt" not in n)


def test_counts_and_start_of_vit_base() -> None:
    with torch.device("meta"):
        model = ViTModel(ViTConfig())
    for deep, count in ((True, 92_160), (False, 7_680)):
        lp.inject(model, VPT(num_tokens=10, deep=deep))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
        assert all(a.bound == 0.0625 for _, _, a in lp.adapters(model) if isinstance(a, VisualPrompt))
        lp.remove(model)
    small = torch.cat(prompts(injected(zoo.vit, VPT(num_tokens=50)))).detach()
    bound = math.sqrt(6 / (8 * 8 + 32))
    assert bound * 0.98 < small.abs().max() <= bound and abs(float(small.mean())) < 0.02


def test_a_block_s_prompt_reaches_this_block_and_later_ones() -> None:
    """And the image's tokens go into the first block as they were."""
    model, states = injected(zoo.vit, VPT(num_tokens=P)), []
    for layer in model.vit.layers:
        layer.layernorm_before.register_forward_pre_hook(lambda m, args: states.append(args[0]))
    before = [model(pixel_values=pixels()).logits, *states]
    assert [tuple(s.shape) for s in states] == [(2, P + 1 + N, 32)] * 2
    assert torch.equal(states[0][:, P:], model.vit.embeddings(pixels()))
    assert torch.equal(states[1][:, :P], prompts(model)[1].expand(2, -1, -1))
    states.clear()
    with torch.no_grad():
        prompts(model)[1][:, ::2] += 1
    after = [model(pixel_values=pixels()).logits, *states]
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[2][:, P:], after[2][:, P:]) and (before[0] - after[0]).abs().max() > 1e-3


def test_outputs_have_the_image_s_tokens() -> None:
    model = injected(lambda: ViTModel(ViTConfig(**SIZES, **IMAGE)).eval(), VPT(num_tokens=P))
    out = model(pixels(), output_hidden_states=True)
    assert [t.shape[1] for t in out.hidden_states] == [1 + N] * 3
    close(out.pooler_output, model.pooler(out.last_hidden_state))
    shallow = injected(lambda: ViTModel(ViTConfig(**SIZES, **IMAGE)).eval(), VPT(num_tokens=P, deep=False))
    assert [type(a) for _, _, a in lp.adapters(shallow)] == [VisualPrompt, Leave]
    assert shallow(pixels()).last_hidden_state.shape == (2, 1 + N, 32)


def test_a_single_block_is_both_first_and_last() -> None:
    one = ViTConfig(**SIZES | {"num_hidden_layers": 1}, **IMAGE)
    deep, shallow = (injected(lambda: ViTModel(one).eval(), VPT(num_tokens=P, deep=d)) for d in (True, False))
    with torch.no_grad():
        prompts(shallow)[0].copy_(prompts(deep)[0])
    close(shallow(pixels()).last_hidden_state, deep(pixels()).last_hidden_state)


def make_clip() -> Any:
    vision = SIZES | IMAGE
    return CLIPModel(CLIPConfig(text_config={**SIZES, "vocab_size": 64}, vision_config=vision)).eval()


MODELS: dict[str, Any] = {
    "own": Own,
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**SIZES, **IMAGE, num_labels=3)),
    "deit": lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES, **IMAGE, num_labels=3)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, **IMAGE)),
    "clip": lambda: make_clip().vision_model,
    "masked": lambda: ViTForMaskedImageModeling(ViTConfig(**SIZES, **IMAGE, encoder_stride=8)),
}


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_other_vision_transformers(name: str, deep: bool) -> None:
    """Where the tokens stand makes no difference: behind those of the image gives the same."""
    model = injected(MODELS[name], VPT(num_tokens=P, deep=deep))
    shapes, base = [], []
    for kind, seen in (("with", shapes), ("without", base)):
        with lp.disabled(model) if kind == "without" else torch.no_grad():
            out = model(pixels())
        seen += [out.detach()] if isinstance(out, Tensor) else [v for v in out.values() if isinstance(v, Tensor)]
    assert [t.shape for t in shapes] == [t.shape for t in base]
    assert (shapes[0] - base[0]).abs().max() > 1e-3
    y = model(pixels())
    (y if isinstance(y, Tensor) else next(iter(y.values()))).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in prompts(model))


def test_behind_the_image_gives_the_same() -> None:
    model = injected(Own, VPT(num_tokens=P))
    got = model(pixels())
    with lp.disabled(model):
        x = model.patches(pixels()).flatten(2).mT
        for block, prompt in zip(model.blocks.layers, prompts(model), strict=True):
            x = block(torch.cat([x, prompt.expand(2, -1, -1)], 1))[:, :N]
        close(got, model.head(x.mean(1)))


def test_dropout_on_the_tokens_in_training_alone() -> None:
    model, states = injected(zoo.vit, VPT(num_tokens=P, dropout=0.5)), []
    model.vit.layers[0].layernorm_before.register_forward_pre_hook(lambda m, args: states.append(args[0][:, :P]))
    model(pixel_values=pixels())
    model.train()(pixel_values=pixels())
    close(states[0], prompts(model)[0].expand(2, -1, -1))
    kept = states[1] != 0
    close(states[1][kept], 2 * states[0][kept])
    assert 0.2 < kept.float().mean() < 0.8 and not torch.equal(kept[0], kept[1])


def test_gradient_checkpointing_changes_nothing() -> None:
    model, grads = injected(zoo.vit, VPT(num_tokens=P)).train(), []
    for _ in range(2):
        model.zero_grad()
        model(pixel_values=pixels(), labels=torch.tensor([0, 2])).loss.backward()
        grads += [torch.stack([p.grad for p in prompts(model)])]
        model.gradient_checkpointing_enable({"use_reentrant": False})
    close(*grads)


def test_under_autocast_and_in_bf16() -> None:
    model = injected(zoo.vit, VPT(num_tokens=P))
    want = model(pixel_values=pixels()).logits
    with torch.autocast("cpu", torch.bfloat16):
        close(model(pixel_values=pixels()).logits.float(), want, atol=0.3)
    half = model.to(torch.bfloat16)
    close(half(pixel_values=pixels()).logits.float(), want, atol=0.3)
    assert {p.dtype for p in prompts(half)} == {torch.float32} and want.std() > 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (zoo.cnn, "one stack of transformer blocks, this Sequential has none"),
        (zoo.bert, "BertForSequenceClassification has no patch embedding .* for text there is prompt_tuning"),
        (zoo.llama, "LlamaForCausalLM has no patch embedding"),
        (zoo.t5, r"T5ForConditionalGeneration has \['encoder.block', 'decoder.block'\]; inject into the part"),
        (make_clip, r"has \['text_model.encoder.layers', 'vision_model.encoder.layers'\]; inject into the part"),
        (lambda: Own(batch_first=False), "build nn.MultiheadAttention with batch_first=True"),
        (
            lambda: BeitModel(BeitConfig(**SIZES, **IMAGE, use_relative_position_bias=True)),
            "a table of relative positions",
        ),
        (
            lambda: SwinModel(SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2])),
            "needs one stack of transformer blocks, this SwinModel has",
        ),
    ],
)
def test_models_that_it_cannot_work_on(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lp.inject(make(), VPT())


@pytest.mark.parametrize("options", [{"num_tokens": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"num_tokens is at least 1 and dropout in \[0, 1\), got"):
        VPT(**options)


def test_a_mask_over_the_image_is_refused() -> None:
    model = injected(zoo.vit, VPT(num_tokens=P))
    mask = torch.ones(2, 1 + N, dtype=torch.long)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="a mask over the 5 tokens of the image leaves no place for more"):
        model(pixel_values=pixels(), attention_mask=mask)
