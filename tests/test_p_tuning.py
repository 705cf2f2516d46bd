"""P-tuning: its networks against nn.LSTM, nn.Linear and peft, and their end; where it acts is prompt tuning's test."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning_peft_plugins.additive.p_tuning import LSTM, LSTMPrompt, MLPPrompt, PTuning
from lightning_peft_plugins.additive.prompt_tuning import PromptTuning
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.callback import PEFT
from lightning_peft.io import read_folder
from tests import nets
from tests.soft_prompts import CAUSAL, P, adapter, bart, both_ways, close, ids, in_peft, injected, lively, padded
from tests.soft_prompts import generated as generate
from tests.zoo import bases as zoo

NETWORKS = [PTuning(num_tokens=P, encoder=e) for e in ("lstm", "mlp")]


def tuned(method: PTuning, make: Any = CAUSAL["llama"]) -> tuple[Any, Any]:
    model = injected(make, method)
    return model, adapter(model)


def modules_of(a: Any) -> tuple[nn.Module | None, nn.Sequential]:
    """(LSTM or none, MLP) of torch with the adapter's weights."""
    if isinstance(a, MLPPrompt):
        layers = [(a.W0, a.b0), (a.W1, a.b1), (a.W2, a.b2)]
        lstm = None
    else:
        layers = [(a.W0, a.b0), (a.W1, a.b1)]
        lstm = nn.LSTM(a.e.shape[1], a.weight_hh_l0.shape[1], 2, bidirectional=True, batch_first=True)
        lstm.load_state_dict({n: getattr(a, n).detach() for n in LSTM})
    parts: list[nn.Module] = []
    for weight, bias in layers:
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
        parts += [linear, nn.ReLU()]
    return lstm, nn.Sequential(*parts[:-1])


def by_torch(a: Any) -> Tensor:
    lstm, mlp = modules_of(a)
    return mlp(a.e if lstm is None else lstm(a.e[None])[0][0])


@pytest.mark.parametrize("hidden", [0, 6])
@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_the_networks_are_torch_s(encoder: str, hidden: int) -> None:
    _, a = tuned(PTuning(num_tokens=P, encoder=encoder, hidden=hidden))
    got, want = a.vectors(), by_torch(a)
    close(got, want, atol=1e-6)
    assert got.shape == (P, 32) and want.std() > 0.01
    d, h = 32, hidden or (16 if encoder == "lstm" else 32)
    lstm = sum(2 * 4 * h * (width + h + 2) for width in (d, 2 * h)) + (2 * h + 1) * 2 * h + (2 * h + 1) * d
    mlp = (d + 1) * h + (h + 1) * h + (h + 1) * d
    trained = sum(p.numel() for p in a.parameters() if p.requires_grad)
    assert trained == P * d + (lstm if encoder == "lstm" else mlp)
    seen = torch.autograd.grad(got.square().sum(), a.e)[0]
    close(seen, torch.autograd.grad(want.square().sum(), a.e)[0])


def test_the_lstm_ties_the_vectors_and_the_mlp_does_not() -> None:
    for method, tied in zip(NETWORKS, (True, False), strict=True):
        _, a = tuned(method)
        (grad,) = torch.autograd.grad(a.vectors()[0].sum(), a.e)
        assert bool(grad[1:].any()) is tied and grad[0].any()


def test_it_starts_as_torch_starts_its_layers() -> None:
    for method in NETWORKS:
        torch.manual_seed(0)
        _, a = tuned(method, lambda: nets.llama(hidden_size=128).eval())
        theirs = [m for m in modules_of(a) if m is not None]
        a.reset_parameters()
        for module in theirs:
            for part in module.modules():
                if isinstance(part, nn.Linear | nn.LSTM):
                    part.reset_parameters()
        names = list(LSTM) if isinstance(a, LSTMPrompt) else []
        ours = [getattr(a, n) for n in [*names, *(f"{w}{i}" for i in range(len(theirs[-1]) // 2 + 1) for w in "Wb")]]
        for mine, its in zip(ours, [p for m in theirs for p in m.parameters()], strict=True):
            assert mine.shape == its.shape
            assert float(mine.detach().abs().max()) == pytest.approx(float(its.detach().abs().max()), rel=0.1)
        assert abs(float(a.e.detach().std()) - 1) < 0.1


@pytest.mark.parametrize("method", NETWORKS, ids=lambda m: m.encoder)
@pytest.mark.parametrize("make", [*CAUSAL.values(), zoo.bert, zoo.t5, bart])
def test_the_model_is_that_of_prompt_tuning_with_these_vectors(make: Any, method: PTuning) -> None:
    model, a = tuned(method, make)
    plain = injected(make, PromptTuning(num_tokens=P))
    with torch.no_grad():
        adapter(plain).prompt.copy_(by_torch(a))
    tokens, mask, _ = padded(left=False)
    labels = torch.tensor([1, 2]) if make is zoo.bert else ids()
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    got, want = model(**batch), plain(**batch)
    close(got.logits, want.logits)
    close(got.loss, want.loss)
    got.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in a.parameters() if p.requires_grad)
    if make is not zoo.bert:
        options = {"attention_mask": mask, "eos_token_id": None}
        assert torch.equal(generate(model, tokens, **options), generate(plain, tokens, **options))


@pytest.mark.parametrize("method", NETWORKS, ids=lambda m: m.encoder)
def test_the_network_is_dropped_at_the_end_and_the_vectors_go_on(method: PTuning, tmp_path: Path) -> None:
    model, a = tuned(method)
    before, whole = model(input_ids=ids()).logits, {n: p.shape for n, p in a.named_parameters()}
    lp.save(model, tmp_path / "while")
    method.finish(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["model.adapters.p_tuning.prompt"]
    assert sum(p.numel() for p in a.parameters()) == P * 32
    close(model(input_ids=ids()).logits, before)
    method.finish(model)
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert a.prompt.grad.any()
    lp.save(model, tmp_path / "after")
    again = lp.load(lively(CAUSAL["llama"]), tmp_path / "while").eval()
    assert {n: p.shape for n, p in adapter(again).named_parameters()} == whole
    assert {n for n, p in adapter(again).named_parameters() if p.requires_grad} == whole.keys() - {"prompt"}
    close(again(input_ids=ids()).logits, before)
    again = lp.load(lively(CAUSAL["llama"]), tmp_path / "after").eval()
    assert [n for n, p in again.named_parameters() if p.requires_grad] == ["model.adapters.p_tuning.prompt"]
    close(again(input_ids=ids()).logits, before)


def test_a_fit_ends_with_a_folder_of_the_vectors(tmp_path: Path) -> None:
    module = nets.HFNet(zoo.llama)
    trainer = nets.trainer(tmp_path, PEFT(NETWORKS[0], model="net", folder=str(tmp_path / "adapter")), max_epochs=2)
    trainer.fit(module, nets.tokens(lm=True))
    tensors = read_folder(tmp_path / "adapter")[1]
    assert {n: t.numel() for n, t in tensors.items() if t.numel()} == {"model.adapters.p_tuning.prompt": P * 32}
    other = lp.load(nets.HFNet(zoo.llama).net, tmp_path / "adapter")
    close(other.eval()(input_ids=ids()).logits, module.net.eval()(input_ids=ids()).logits)
    trainer = nets.trainer(tmp_path, PEFT(NETWORKS[0], model="net", folder=None), max_epochs=1)
    before = adapter(module.net).prompt.detach().clone()
    trainer.fit(module, nets.tokens(lm=True))  # goes on from there
    assert (adapter(module.net).prompt - before).abs().max() > 1e-3


@pytest.mark.parametrize("method", NETWORKS, ids=lambda m: m.encoder)
def test_under_autocast_and_in_bf16(method: PTuning) -> None:
    model, a = tuned(method)
    want = model(input_ids=ids()).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=ids(), labels=ids())
    close(out.logits.float(), want, atol=0.3)
    out.loss.backward()
    assert a.e.grad.any()
    half = model.to(torch.bfloat16)
    assert {p.dtype for p in a.parameters()} == {torch.float32} and want.std() > 1
    close(half(input_ids=ids()).logits.float(), want, atol=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "num_tokens is at least 1, got 0"),
        ({"encoder": "gru"}, r"encoder is one of \('lstm', 'mlp', 'none'\), got 'gru'"),
        ({"hidden": -1}, "hidden is a width of the encoder 'lstm', got -1"),
        ({"hidden": 8, "encoder": "none"}, "hidden is a width of the encoder 'none', got 8"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PTuning(**options)


def test_where_it_cannot_stand() -> None:
    with pytest.raises(ValueError, match="p_tuning: nothing in this ViTForImageClassification takes token embeddings"):
        lp.inject(zoo.vit(), NETWORKS[0])
    with pytest.raises(ValueError, match="p_tuning: 'prompt_tuning' is a soft prompt on this model already"):
        lp.inject(nets.llama(), [PromptTuning(), NETWORKS[0]])


# ---- huggingface/peft ----------------------------------------------------------------------------------------------


def pair(make: Any, task: str, method: PTuning, hidden: int) -> tuple[Any, Any, Any, list[tuple[Tensor, Tensor]]]:
    """(base, ours, theirs, tensors of ours and of theirs), with the same weights; peft's LSTM is as wide each way."""
    base = lively(make)
    kind = method.encoder.upper()
    config = peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=P, encoder_reparameterization_type=kind, encoder_hidden_size=hidden,
        num_transformer_submodules=1,
    )  # fmt: skip
    theirs = in_peft(base, config).eval()
    ours = copy.deepcopy(base)
    lp.inject(ours, method)
    a, encoder = adapter(ours), theirs.prompt_encoder.default
    lstm = [(getattr(a, n), getattr(encoder.lstm_head, n)) for n in LSTM] if kind == "LSTM" else []
    mlp = [p for i in range(3 if kind == "MLP" else 2) for p in (getattr(a, f"W{i}"), getattr(a, f"b{i}"))]
    both = [(a.e, encoder.embedding.weight), *lstm, *zip(mlp, encoder.mlp_head.parameters(), strict=True)]
    with torch.no_grad():
        for mine, its in both:
            mine.copy_(its)
    return base, ours.eval(), theirs, both


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
@pytest.mark.parametrize("name", CAUSAL)
def test_peft_decoders(name: str, encoder: str, tmp_path: Path) -> None:
    base, ours, theirs, both = pair(CAUSAL[name], "CAUSAL_LM", PTuning(num_tokens=P, encoder=encoder, hidden=12), 12)
    labels = ids()
    labels[:, 0] = -100  # in peft the last virtual token's loss counts, see prompt tuning
    a, b = ours(input_ids=ids(), labels=labels), theirs(input_ids=ids(), labels=labels)
    close(a.logits, b.logits[:, P:])
    close(a.loss, b.loss)
    a.loss.backward()
    b.loss.backward()
    for mine, its in both:
        close(mine.grad, its.grad)
    lp.hf.save(ours, tmp_path)  # while the network is there
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    close(again(input_ids=ids()).logits, b.logits)


@pytest.mark.parametrize(("make", "task"), [(CAUSAL["gpt2"], "CAUSAL_LM"), (zoo.t5, "SEQ_2_SEQ_LM")])
def test_peft_s_folder_both_ways(make: Any, task: str, tmp_path: Path) -> None:
    base, ours, theirs, _ = pair(make, task, PTuning(num_tokens=P, encoder="mlp", hidden=12), 12)
    batch = {"input_ids": ids()} | ({"labels": ids(length=5)} if task == "SEQ_2_SEQ_LM" else {})
    cut = P if task == "CAUSAL_LM" else 0
    close(ours(**batch).logits, theirs(**batch).logits[:, cut:])
    both_ways(base, theirs, batch, cut, tmp_path)
    loaded = lp.hf.load(copy.deepcopy(base), tmp_path / "theirs")
    assert adapter(loaded).prompt.requires_grad


def test_what_peft_s_format_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="p_tuning: of a .*BertForSequenceClassification huggingface/peft reads other"):
        lp.hf.save(injected(zoo.bert, NETWORKS[0]), tmp_path)
    assert not any(tmp_path.iterdir())
