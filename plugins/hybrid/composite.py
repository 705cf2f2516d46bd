"""What methods whose fields are methods share: each verb goes on to the parts, under names of their own."""

import abc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_peft import Adapter, Method, adapters


@dataclass(frozen=True, kw_only=True)
class Composite(Method, abc.ABC):
    """A method made of others. Of those the adapters are named after both, ``mam_adapter_prefix_tuning``.

    The verbs that some part fills in are passed on here: a verb that is overridden costs (a second pass over the data,
    a strategy that is refused), so the others stay as they are.
    """

    @abc.abstractmethod
    def parts(self, model: nn.Module) -> list[Method]:
        """The parts as they are injected into this model, in order, each by ``part``."""

    def part(self, method: Any, **changes: Any) -> Any:
        """One of the fields under a name that is its own in the model."""
        return replace(method, name=f"{self.name}_{method.name}", **changes)

    def inject(self, model: nn.Module, stats: None = None) -> None:
        for part in self.parts(model):
            part.inject(model)

    def adapters(self, model: nn.Module) -> Iterator[tuple[str, Any, Adapter]]:
        for method in (self.name, *(part.name for part in self.parts(model))):
            yield from adapters(model, method)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        return [group for part in self.parts(model) for group in part.param_groups(model) or []] or None

    def finish(self, model: nn.Module) -> None:
        for part in self.parts(model):
            part.finish(model)


def check_distinct(name: str, fields: dict[str, Method | None]) -> None:
    """Refuse a method of nothing, and parts that share a name.

    Raises:
        ValueError: naming the method and the fields.
    """
    held = {field: part.name for field, part in fields.items() if part is not None}
    if not held:
        raise ValueError(f"{name}: all of {list(fields)} are left out, so nothing would train")
    if len(set(held.values())) < len(held):
        raise ValueError(f"{name}: its parts need different names, got {held}")
