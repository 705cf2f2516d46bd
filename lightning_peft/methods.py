"""Every installed method by the name of its class: ``from lightning_peft.methods import LoRA``.

Ours and third parties' classes are found by entry point and imported when asked for.
"""

from typing import Any

from lightning_peft import registry


def __getattr__(name: str) -> Any:
    for entry, point in registry.entry_points().items():
        if point.attr == name:
            return registry.load(entry)
    raise AttributeError(f"no installed method has a class {name!r}; nearest: {registry.nearest_class(name)}")


def __dir__() -> list[str]:
    return sorted(point.attr for point in registry.entry_points().values() if point.attr)
