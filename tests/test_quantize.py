"""A whole model quantised: what is replaced and what not, and that adapters train on top. bitsandbytes on the CPU."""

import copy
import io
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_peft import quant, quantize
from lightning_peft.adapter import Base, WeightAdapter
from lightning_peft.attach import attach, detach

bnb = pytest.importorskip("bitsandbytes", reason="optional package bitsandbytes")

FORMATS: list[dict[str, Any]] = [
    {"kind": "nf4"},
    {"kind": "nf4", "double_quant": False, "compute_dtype": torch.float32},
    {"kind": "fp4"},
    {"kind": "int8"},
]
IDS = ["nf4", "nf4-single-fp32", "fp4", "int8"]
every_format = pytest.mark.parametrize("options", FORMATS, ids=IDS)
PROJECTIONS = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
LAYERS = [f"model.layers.{i}.{p}" for i in range(2) for p in PROJECTIONS]


class LoRA(WeightAdapter):
    axes = {"A": ("rank", "in"), "B": ("out", "rank")}

    def __init__(self, out: int, fan_in: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(4, fan_in) / fan_in**0.5)
        self.B = nn.Parameter(torch.zeros(out, 4))

    def weight(self, W: Tensor) -> Tensor:
        return W + self.B @ self.A

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return base(x) + ((x.float() @ self.A.T) @ self.B.T).to(x.dtype)


def llama(cls: Any = LlamaForCausalLM, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    return cls(LlamaConfig(**sizes, **heads, **changes))


def tokens() -> Tensor:
    return torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(1))


def adapt(model: nn.Module, names: list[str]) -> list[LoRA]:
    torch.manual_seed(2)
    model.requires_grad_(False)
    out = []
    for name in names:
        host: Any = model.get_submodule(name)
        attach(host, "lora", adapter := LoRA(host.out_features, host.in_features))
        out.append(adapter)
    return out


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def saved(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if "adapters" not in k}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@every_format
def test_every_linear_but_the_head(options: dict[str, Any]) -> None:
    model = llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert quantize(model, **options) == LAYERS
    assert {n for n, m in model.named_modules() if quant.kind(m)} == set(LAYERS)
    assert all(quant.kind(model.get_submodule(n)) == options["kind"] for n in LAYERS)
    assert type(model.lm_head) is nn.Linear and before.keys() <= model.state_dict().keys()
    for key, value in model.state_dict().items():
        if key in before and key.removesuffix(".weight") not in LAYERS:
            assert torch.equal(value, before[key])
    for name in LAYERS:
        weight = quant.dequantize(model.get_submodule(name))
        assert relative(weight, before[f"{name}.weight"]) < 0.14 and weight.shape == before[f"{name}.weight"].shape
        assert not model.get_parameter(f"{name}.weight").requires_grad


@every_format
@pytest.mark.parametrize("amp", [False, True], ids=["32", "bf16-mixed"])
def test_forward_stays_near_the_dense_one(options: dict[str, Any], amp: bool) -> None:
    model = llama(attention_bias=True).eval()
    x = tokens()
    with torch.no_grad():
        dense = model(x).logits
        quantize(model, **options)
        assert not any(m.training for m in model.modules())
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            got = model(x).logits
            again = model.train()(x).logits
    assert got.dtype == (torch.bfloat16 if amp else torch.float32)
    assert relative(got, dense) < (0.02 if options["kind"] == "int8" else 0.25)
    # bitsandbytes quantises an int8 layer's inputs too in evaluation, and only there
    assert relative(again, got) < (0.02 if options["kind"] == "int8" else 1e-6)


def test_a_model_cast_after_quantising_still_runs() -> None:
    model = llama(attention_bias=True)
    names = quantize(model)
    before = model(tokens()).logits
    model.to(torch.bfloat16)
    got = model(tokens()).logits
    assert got.dtype == torch.bfloat16 and relative(got, before) < 0.02
    for name in names:
        quant.replace_dequantized(model, name)
    assert relative(model(tokens()).logits, got) < 0.02


def test_biases_are_cast_once_and_forwards_leave_them() -> None:
    model = llama(attention_bias=True)
    bias = model.model.layers[0].self_attn.q_proj.bias
    nn.init.normal_(bias)
    expected = bias.detach().to(torch.bfloat16)
    quantize(model)
    before = saved(model)
    model(tokens())
    assert model.model.layers[0].self_attn.q_proj.bias is bias and torch.equal(bias, expected)
    assert same(saved(model), before)


def test_task_heads_stay_and_train() -> None:
    model = llama(LlamaForSequenceClassification)
    assert quantize(model) == LAYERS
    assert type(model.score) is nn.Linear and model.score.weight.requires_grad
    own = nn.ModuleDict({"backbone": llama().model, "classifier": nn.Linear(64, 64)})
    assert "classifier" not in quantize(own)
    block = nn.ModuleDict({"attn": nn.Linear(64, 64), "out": nn.Linear(64, 64)})
    plain = nn.ModuleDict({"layers": nn.ModuleList([block, copy.deepcopy(block)]), "out": nn.Linear(64, 3)})
    assert quantize(plain) == ["layers.0.attn", "layers.0.out", "layers.1.attn", "layers.1.out"]  # a name is no pattern


def test_layers_kept_in_float32_by_transformers_stay() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=96, d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    model = T5ForConditionalGeneration(config).eval()
    dense = model(input_ids=tokens(), labels=tokens()).logits
    names = quantize(model)
    assert names and not any(n.endswith(".wo") for n in names)  # T5 casts what enters wo to its weight's dtype: uint8
    assert relative(model(input_ids=tokens(), labels=tokens()).logits, dense) < 0.4


def test_torch_encoder_runs_its_quantised_layers() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 64)
    model = nn.Sequential(layer).eval()
    dense = model(x)
    assert quantize(model) == ["0.linear1", "0.linear2"]  # the attention reads out_proj's weight itself
    with torch.no_grad():
        assert 0 < relative(model(x), dense) < 0.1


def test_a_shared_layer_is_replaced_wherever_it_is_used() -> None:
    shared = nn.Linear(64, 64)
    model: Any = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    assert quantize(model) == ["a"]
    assert quant.kind(model["a"]) == "nf4" and model["b"].get_submodule("0") is model["a"]


def test_exclude() -> None:
    names = quantize(llama(), exclude=("down_proj", "model.layers.0.self_attn", "*.1.mlp.up*"))
    left = {n for n in LAYERS if "down" in n or "0.self_attn" in n or n == "model.layers.1.mlp.up_proj"}
    assert names == [n for n in LAYERS if n not in left]
    with pytest.raises(ValueError, match="exclude 'q_pro' leaves out nothing; nearest layer: 'q_proj'"):
        quantize(llama(), exclude=("q_pro",))


class Own(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].register_forward_hook(lambda module, args, output: output)
    return model


def adapted() -> nn.Module:
    model = llama()
    adapt(model, LAYERS[:1])
    return model


def quantised() -> nn.Module:
    quantize(model := llama())
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (llama, {"kind": "nf5"}, "unknown kind 'nf5'; nearest: 'nf4'"),
        (llama, {"kind": "int8", "double_quant": False}, "no effect on kind='int8'"),
        (llama, {"blocksize": 48}, "blocksize 48 does not exist"),
        (llama, {"compute_dtype": torch.float64}, "compute_dtype torch.float64"),
        (llama, {"exclude": ("model",)}, "nothing to quantise"),
        (adapted, {}, "'model.layers.0.self_attn.q_proj' holds adapters: quantise the model first, then inject"),
        (quantised, {"kind": "int8"}, "quantised already: 14 layers"),
        (lambda: nn.Sequential(nn.Linear(96, 64)), {}, r"in_features=96, no multiple of blocksize=64"),
        (lambda: nn.Sequential(nn.Linear(64, 64)), {"blocksize": 128}, "in_features=64, no multiple of blocksize=128"),
        (
            lambda: nn.Sequential(nn.Linear(64, 64).double()),
            {},
            "'0' is torch.float64: cast it to one of torch.bfloat16",
        ),
        (lambda: nn.Sequential(nn.Linear(64, 64, device="meta")), {}, "meta device"),
        (lambda: nn.Sequential(Own(64, 64)), {}, "'0' has a forward of its own"),
        (hooked, {}, "'0' has forward hooks"),
        (lambda: nn.ReLU(), {}, "nothing to quantise: this ReLU"),
    ],
)
def test_refusals_leave_the_model_alone(model: Any, options: dict[str, Any], message: str) -> None:
    subject = model()
    before = saved(subject)
    with pytest.raises(ValueError, match=message):
        quantize(subject, **options)
    assert same(saved(subject), before) if "meta" not in message else all(v.is_meta for v in before.values())


@pytest.mark.parametrize(("fan_in", "out", "options"), [(96, 7, {"blocksize": 32}), (50, 7, {"kind": "int8"})])
def test_what_the_cpu_can_quantise_it_quantises_right(fan_in: int, out: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(fan_in, out))
    W, x = model[0].weight.detach().clone(), torch.randn(3, fan_in)
    quantize(model, **options)
    assert relative(quant.dequantize(model[0]), W) < 0.1
    for mode in (True, False):
        with torch.no_grad():
            y = model.train(mode)(x)
        assert relative(y, x @ quant.dequantize(model[0]).T + model[0].bias) < 0.02


@every_format
def test_state_is_saved_and_loaded_bit_for_bit(options: dict[str, Any]) -> None:
    model = llama(attention_bias=True).eval()
    names = quantize(model, **options)
    expected = model(tokens()).logits
    torch.save(model.state_dict(), file := io.BytesIO())
    for strict in (True, False):
        other = llama(attention_bias=True).eval()
        nn.init.normal_(other.model.layers[0].mlp.up_proj.weight)
        quantize(other, **options)
        assert not torch.equal(other(tokens()).logits, expected)  # and the layers have run before they are loaded
        file.seek(0)
        result = other.load_state_dict(torch.load(file, weights_only=True), strict=strict)
        assert not result.missing_keys and not result.unexpected_keys
        assert same(saved(other), saved(model))
        assert torch.equal(other(tokens()).logits, expected)
        assert torch.equal(
            quant.dequantize(other.get_submodule(names[5])), quant.dequantize(model.get_submodule(names[5]))
        )


@every_format
def test_deepcopy_is_a_model_of_its_own(options: dict[str, Any]) -> None:
    model = llama()
    quantize(model, **options)
    adapt(model, LAYERS)
    expected, before = model(tokens()).logits, saved(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens()).logits, expected)
    quant.requantize(twin.get_submodule(LAYERS[0]), torch.zeros(64, 64))
    assert not torch.equal(twin(tokens()).logits, expected)
    assert torch.equal(model(tokens()).logits, expected) and same(saved(model), before)


@every_format
def test_gradients_are_those_of_the_dequantised_model(options: dict[str, Any]) -> None:
    model = llama()
    quantize(model, **options)
    dense = copy.deepcopy(model)
    for name in LAYERS:
        quant.replace_dequantized(dense, name)
    pairs = list(zip(adapt(model, LAYERS), adapt(dense, LAYERS), strict=True))
    for m in (model, dense):
        m.eval()
        with torch.no_grad():
            m(tokens())  # a validation in between, where bitsandbytes would cut the layers off from their inputs
        m.train()(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "adapters" not in n)
    # bf16 products and their backward round by 2^-8 a step
    tolerance = 0.05 if options["kind"] != "int8" and "compute_dtype" not in options else 1e-3
    for a, b in pairs:
        assert a.B.grad is not None and b.B.grad is not None and b.B.grad.norm() > 0
        assert relative(a.B.grad, b.B.grad) < tolerance


@every_format
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(options: dict[str, Any], reentrant: bool) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    quantize(block, **options)
    loras = adapt(block, ["0", "2"])
    for lora in loras:
        nn.init.normal_(lora.B)
    found = []
    for use in (False, True):
        block.zero_grad()
        x = torch.linspace(-1, 1, 192).view(3, 64).requires_grad_()
        y = checkpoint(block, x, use_reentrant=reentrant) if use else block(x)
        assert isinstance(y, Tensor)
        y.square().sum().backward()
        found.append([x.grad, *(p.grad for lora in loras for p in (lora.A, lora.B))])
    for plain, again in zip(*found, strict=True):
        assert plain is not None and plain.norm() > 0 and torch.equal(plain, again)


def test_int8_layers_follow_a_move_to_another_device() -> None:
    model: Any = nn.Sequential(nn.Linear(64, 64))
    quantize(model, "int8")
    x = torch.ones(1, 64)
    expected = model(x)
    # What a move leaves behind: the weight is here, its aliases are on the device that it came from.
    model[0].state.CB = model[0].state.CB.to("meta")
    assert torch.equal(model(x), expected)
    model[0].state.CB = model[0].state.CB.to("meta")
    assert quant.dequantize(model[0]).device.type == "cpu" and not model[0].state.CB.is_meta


class Task(L.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.losses = model, list[float]()

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.model(batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.model(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


@every_format
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_adapters_train_in_a_trainer(options: dict[str, Any], precision: Any, tmp_path: Any) -> None:
    model = llama()
    names = quantize(model, **options)
    loras, base = adapt(model, names), saved(model)
    loader: DataLoader[Tensor] = DataLoader([tokens()[0]] * 6, batch_size=2)  # type: ignore[arg-type]
    task = Task(model)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cpu", max_steps=3, precision=precision, val_check_interval=1, default_root_dir=tmp_path, **quiet
    )
    trainer.fit(task, loader, loader)
    assert trainer.global_step == 3 and task.losses[0] > task.losses[1] > task.losses[2]
    assert all(lora.B.abs().sum() > 0 for lora in loras)
    after = saved(model)
    assert base.keys() == after.keys()
    for key, value in base.items():
        assert torch.equal(after[key], value.to(after[key].dtype))  # bf16-true casts embeddings and norms, nothing else
        assert after[key].dtype == value.dtype or precision == "bf16-true"
    for name in names:
        detach(model.get_submodule(name), "lora")
    assert same({k: v for k, v in saved(model).items() if "SCB" in k or "absmax" in k},
                {k: v for k, v in base.items() if "SCB" in k or "absmax" in k})  # fmt: skip


@every_format
def test_lightnings_plugin_recognises_the_layers(options: dict[str, Any]) -> None:
    # BitsandbytesPrecision (CUDA only) leaves a model alone that holds any instance of these two classes, and else
    # replaces every nn.Linear in it, adapted ones too.
    model = llama()
    quantize(model, **options)
    adapt(model, LAYERS)
    known = (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)
    assert sum(isinstance(m, known) for m in model.modules()) == len(LAYERS)


def test_int8_does_not_log_its_cast_at_every_call(caplog: pytest.LogCaptureFixture) -> None:
    quantize(model := nn.Sequential(nn.Linear(64, 64)), "int8")
    model.eval()(torch.ones(1, 64))
    assert not caplog.records


def test_a_progress_bar_from_50_layers_on(capsys: pytest.CaptureFixture[str]) -> None:
    few, many = (nn.Sequential(*(nn.Linear(32, 1) for _ in range(n))) for n in (50, 51))
    quantize(few, blocksize=32)
    assert capsys.readouterr().out == ""
    quantize(many, blocksize=32)
    assert "quantising to nf4" in capsys.readouterr().out
