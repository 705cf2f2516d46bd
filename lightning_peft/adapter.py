"""What is attached to one module, and what it sees of the module it is attached to."""

import abc
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft import hosts


class Base:
    """The layer as it was before one adapter: the host, with the adapters that were attached earlier.

    ``base(x)`` runs it, ``base.weight`` reads its weight as an (out, in) matrix (dequantised, through the weight
    adapters below), ``base.host`` is the module itself.
    """

    def __init__(self, host: Any, below: "Base | None" = None, adapter: "Adapter | None" = None) -> None:
        self.host, self._below, self._adapter = host, below, adapter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._adapter is None or self._below is None:
            return self.host.unadapted(*args, **kwargs)
        return self._adapter(self._below, *args, **kwargs)

    def with_plain(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """(what a call returns, what the host without any adapter returned within it), to see what adapters change.

        The second has no gradient; where no adapter calls the host it is computed for the purpose.
        """
        chain, plain = [], self
        while plain._adapter is not None and plain._below is not None:
            chain.append(plain._adapter)
            plain = plain._below
        noting = top = _Noting(self.host)
        for adapter in reversed(chain):
            top = Base(self.host, top, adapter)
        y = top(*args, **kwargs)
        with torch.no_grad():
            return y, plain(*args, **kwargs) if noting.seen is None else noting.seen

    @property
    def weight(self) -> Tensor:
        if self._adapter is None or self._below is None:
            return hosts.read(self.host)
        below = self._below.weight
        return self._adapter.weight(below) if isinstance(self._adapter, WeightAdapter) else below

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias (out,), through the weight adapters below; None where it has none."""
        if self._adapter is None or self._below is None:
            return hosts.stored(self.host, "bias")
        below = self._below.bias
        return self._adapter.bias_of(self.host, below) if isinstance(self._adapter, WeightAdapter) else below

    @property
    def maps_weight(self) -> bool:
        """True where ``weight`` and ``bias`` say all about this layer: no adapter in it but maps on the weight."""
        if self._adapter is None or self._below is None:
            return True
        maps = isinstance(self._adapter, WeightAdapter) and not self._adapter.watches  # a watcher has to be called
        return maps and self._below.maps_weight


class _Noting(Base):
    """Keeps what the host returned last."""

    seen: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = super().__call__(*args, **kwargs)
        self.seen = tuple(_plain(t) for t in y) if isinstance(y, tuple) else _plain(y)
        return y


def _plain(t: Any) -> Any:
    return t.detach() if isinstance(t, Tensor) else t


class Adapter(nn.Module, abc.ABC):
    """What is attached to one host module. Its tensors are parameters and buffers of its own, never child layers.

    ``axes`` names every dimension of every tensor that resizing, surgery or a file may change, for example
    ``{"A": ("rank", "in"), "B": ("out", "rank")}``. Structure is read back from a file's shapes by it.
    """

    axes: ClassVar[dict[str, tuple[str, ...]]] = {}
    watches: ClassVar[bool] = False  # it returns what the host does, and only keeps what it saw: merging takes it off

    @abc.abstractmethod
    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        """Wraps the host's call: ``base(*args, **kwargs)`` is what the host would have returned."""

    def reset_parameters(self) -> None:
        """Set initial values, also after the adapter was made on the meta device (PyTorch's convention)."""

    def check_state(self, state: dict[str, Tensor]) -> None:
        """Called with what a file or a state dict holds for this adapter, by name, before it is taken.

        For an adapter whose function also depends on tensors that no file holds, such as random ones drawn from a
        seed: keep a checksum of those in a buffer and compare it here.

        Raises:
            ValueError: the tensors were trained beside others than this adapter has.
        """

    def _apply(self, fn: Any, recurse: bool = True) -> "Adapter":
        # Trained tensors keep their precision when the model is cast (bf16-true, half()), as torch's RNNs keep their
        # layout here: a float32 master rounded through bf16 would make a resumed run differ from its original.
        def keep_dtype(t: Tensor) -> Tensor:
            new = fn(t)
            return t.to(new.device) if new.dtype != t.dtype else new

        return super()._apply(keep_dtype, recurse)

    def cast(self, dtype: torch.dtype, device: torch.device | str | None) -> None:
        """Move to a device and set the dtype of the floating tensors, the one way to change it."""
        super()._apply(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, axes in self.axes.items():  # ranks may have moved before the file was written
            new, old = state_dict.get(prefix + name), getattr(self, name)
            if new is not None and new.shape != old.shape and len(new.shape) == len(axes):
                old.data = old.data.new_empty(new.shape)
        own = (*self._parameters, *self._buffers)
        self.check_state({name: state_dict[prefix + name] for name in own if prefix + name in state_dict})
        super()._load_from_state_dict(state_dict, prefix, *rest)


class WeightAdapter(Adapter):
    """A map on the host's weight matrix; only these merge.

    ``weight`` is the definition. ``forward`` defaults to the host's map with that weight; a subclass may add a faster
    one, and the conformance suite proves the two equal.
    """

    adds_bias: bool = False  # it shifts outputs where the host has no bias too; merging gives the host one

    @abc.abstractmethod
    def weight(self, W: Tensor) -> Tensor:
        """The adapted (out, in) matrix for the matrix below; differentiable in the adapter's parameters."""

    def bias(self, b: Tensor) -> Tensor:
        """The adapted bias (out,) for the one below, where the host has one; most methods leave it as it is."""
        return b

    def bias_of(self, host: Any, below: Tensor | None) -> Tensor | None:
        """``bias`` of the one below, of zeros where there is none and this adapter ``adds_bias``."""
        if below is None and self.adds_bias:
            below = hosts.no_bias(host)
        return None if below is None else self.bias(below)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        below = base.bias
        y = hosts.run(base.host, self.weight(base.weight), x, self.bias_of(base.host, below))
        if base.maps_weight:
            return y
        return base(x) + (y - hosts.run(base.host, base.weight, x, below))  # below lies no weight: add the change


def maps_of(held: dict[str, Adapter]) -> list[WeightAdapter]:
    """Those of a host's adapters that are maps on its weight."""
    return [a for a in held.values() if isinstance(a, WeightAdapter)]
