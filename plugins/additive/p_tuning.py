"""P-tuning: vectors in front of the token embeddings, from an LSTM or an MLP. Liu et al. 2021, arXiv:2103.10385."""

import abc
from dataclasses import dataclass
from typing import Any

import torch
from lightning_peft_plugins.additive import soft, soft_network
from lightning_peft_plugins.additive.prompt_tuning import Prompt, attach_prompt, export, read
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import Method, Traits, hf

ENCODERS = ("lstm", "mlp", "none")
HF_FIELDS = (*soft.HF_FIELDS, "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers",
             "encoder_dropout")  # fmt: skip
LAYERS = 2  # of the LSTM, as in the paper
LSTM = tuple(f"{kind}_l{layer}{way}" for layer in range(LAYERS) for way in ("", "_reverse")
             for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))  # fmt: skip


class NetworkPrompt(Prompt, abc.ABC):
    """The prompt that a network computes from one trained vector ``e`` each; at the end of a fit only it is kept."""

    axes = Prompt.axes | {"e": ("length", "hidden")}

    def __init__(self, host: Any, num_tokens: int) -> None:
        super().__init__(host, num_tokens)
        self.prompt.requires_grad_(False)  # until the end
        self.e = nn.Parameter(torch.empty_like(self.prompt))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "e") and len(self.e):  # not yet in the parent's __init__
            nn.init.zeros_(self.prompt)
            nn.init.normal_(self.e)

    def check_state(self, state: dict[str, Tensor]) -> None:
        soft_network.read_form(self, "prompt", state)

    def vectors(self) -> Tensor:
        return self.network() if len(self.e) else self.prompt

    @abc.abstractmethod
    def network(self) -> Tensor:
        """(tokens, hidden)"""


class MLPPrompt(NetworkPrompt):
    """``W2 relu(W1 relu(W0 e + b0) + b1) + b2``"""

    axes = NetworkPrompt.axes | {"W0": ("mid", "hidden"), "b0": ("mid",), "W1": ("mid", "mid"), "b1": ("mid",),
                                 "W2": ("hidden", "mid"), "b2": ("hidden",)}  # fmt: skip

    def __init__(self, host: Any, num_tokens: int, mid: int) -> None:
        super().__init__(host, num_tokens)
        width = soft.width(host)
        mid = mid or width
        self.W0, self.b0 = nn.Parameter(torch.empty(mid, width)), nn.Parameter(torch.empty(mid))
        self.W1, self.b1 = nn.Parameter(torch.empty(mid, mid)), nn.Parameter(torch.empty(mid))
        self.W2, self.b2 = nn.Parameter(torch.empty(width, mid)), nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "b2"):
            for weight, bias in ((self.W0, self.b0), (self.W1, self.b1), (self.W2, self.b2)):
                soft_network.reset_linear(weight, bias)

    def network(self) -> Tensor:
        inner = F.linear(F.linear(self.e, self.W0, self.b0).relu(), self.W1, self.b1).relu()
        return F.linear(inner, self.W2, self.b2)


class LSTMPrompt(NetworkPrompt):
    """``W1 relu(W0 s + b0) + b1`` of the states s of an LSTM that reads all e, forwards and backwards."""

    axes = NetworkPrompt.axes | {n: ("gates", "states") if "weight" in n else ("gates",) for n in LSTM} | {
        "W0": ("both", "both"), "b0": ("both",), "W1": ("hidden", "both"), "b1": ("hidden",)}  # fmt: skip

    def __init__(self, host: Any, num_tokens: int, mid: int) -> None:
        super().__init__(host, num_tokens)
        width = soft.width(host)
        mid = mid or width // 2
        for name, p in nn.LSTM(width, mid, LAYERS, bidirectional=True).named_parameters():
            self.register_parameter(name, p)
        self.W0, self.b0 = nn.Parameter(torch.empty(2 * mid, 2 * mid)), nn.Parameter(torch.empty(2 * mid))
        self.W1, self.b1 = nn.Parameter(torch.empty(width, 2 * mid)), nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "b1"):
            for name in LSTM:  # as nn.LSTM starts, from -1 / sqrt(mid) to 1 / sqrt(mid)
                p = self.get_parameter(name)
                bound = max(len(p) // 4, 1) ** -0.5
                nn.init.uniform_(p, -bound, bound)
            soft_network.reset_linear(self.W0, self.b0)
            soft_network.reset_linear(self.W1, self.b1)

    def network(self) -> Tensor:
        start = self.e.new_zeros(2 * LAYERS, 1, self.get_parameter("weight_hh_l0").shape[1])
        weights: list[Tensor] = [self.get_parameter(n) for n in LSTM]
        # The function behind nn.LSTM: (input, states, weights, biases, layers, dropout, train, two ways, batch first).
        states = torch.lstm(self.e[None], (start, start), weights, True, LAYERS, 0.0, self.training, True, True)[0]
        return F.linear(F.linear(states[0], self.W0, self.b0).relu(), self.W1, self.b1)


@dataclass(frozen=True, kw_only=True)
class PTuning(Method):
    """Prompt tuning whose vectors come from a network while they train, which ties them to each other.

    Where they act, and what a caller sees, is as for ``prompt_tuning``. The paper puts them at places of a template
    between the words; these all stand in front, as in huggingface/peft.

    Args:
        num_tokens: how many vectors. The longest text gets shorter by as many.
        encoder: "lstm" (two layers, both ways, and an MLP of two layers), "mlp" (of three layers, one for each vector
            alone), or "none", which is prompt tuning from random vectors. It is dropped at the end.
        hidden: width of the LSTM in each way (0: half the model's) or of the MLP (0: the model's).
    """

    traits = Traits(
        family="additive",
        paper="Liu et al. 2021, arXiv:2103.10385",
        parameters="num_tokens * hidden, and while training the network's",
        hosts=("model",),
        identity_start=False,
        hf="P_TUNING",
    )
    name: str = "p_tuning"
    num_tokens: int = 20
    encoder: str = "lstm"
    hidden: int = 0

    def __post_init__(self) -> None:
        soft.check(self.num_tokens, (), self.name)
        if self.encoder not in ENCODERS:
            raise ValueError(f"{self.name}: encoder is one of {ENCODERS}, got {self.encoder!r}")
        if self.hidden < 0 or (self.hidden and self.encoder == "none"):
            raise ValueError(f"{self.name}: hidden is a width of the encoder {self.encoder!r}, got {self.hidden}")

    def inject(self, model: nn.Module, stats: None = None) -> None:
        encoder, decoder = soft.stacks(model, self.name)
        if self.encoder == "none":
            prompt = Prompt(encoder, self.num_tokens)
        else:
            kind = LSTMPrompt if self.encoder == "lstm" else MLPPrompt
            prompt = kind(encoder, self.num_tokens, self.hidden)
        attach_prompt(prompt, encoder, decoder, self.name)

    def finish(self, model: nn.Module) -> None:
        for _, _, adapter in self.adapters(model):
            if isinstance(adapter, NetworkPrompt):
                soft_network.settle(adapter, "prompt")

    def to_hf(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return export(self, model, {"encoder_reparameterization_type": "MLP"})  # its folders hold no network

    @classmethod
    def from_hf(cls, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]], model: nn.Module) -> "PTuning":
        hf.check_fields(config, HF_FIELDS, "p_tuning")
        return cls(num_tokens=len(read(config, tensors, "p_tuning")), encoder="none")
