"""Parameter-efficient fine-tuning for any PyTorch Lightning module.

Names are resolved on first use, so that `lightning-peft methods` need not wait for torch to import.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_peft import arch, hf, hosts, parts, slices, surgery, testing
    from lightning_peft.adapter import Adapter, Base, WeightAdapter
    from lightning_peft.attach import adapters, attach, detach, disabled
    from lightning_peft.callback import PEFT
    from lightning_peft.find import find, matches
    from lightning_peft.inject import inject, penalty, remove, unfreeze
    from lightning_peft.io import load, restore, save
    from lightning_peft.merge import merge
    from lightning_peft.method import Method, Passes, Step, Traits
    from lightning_peft.quantize import quantize
    from lightning_peft.resize import resize
    from lightning_peft.schedule import cubic, linear

__version__ = "0.1.0.dev0"

_HOME = {
    "PEFT": "callback",
    "Method": "method",
    "Passes": "method",
    "Step": "method",
    "Traits": "method",
    "Adapter": "adapter",
    "Base": "adapter",
    "WeightAdapter": "adapter",
    "adapters": "attach",
    "attach": "attach",
    "detach": "attach",
    "disabled": "attach",
    "find": "find",
    "matches": "find",
    "inject": "inject",
    "remove": "inject",
    "merge": "merge",
    "save": "io",
    "load": "io",
    "restore": "io",
    "penalty": "inject",
    "quantize": "quantize",
    "resize": "resize",
    "unfreeze": "inject",
    "cubic": "schedule",
    "linear": "schedule",
}
_MODULES = ("arch", "hf", "hosts", "parts", "slices", "surgery", "testing")
__all__ = ["__version__", *_HOME, *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"lightning_peft.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'lightning_peft' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lightning_peft.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps `lightning_peft.attach` the function: importing the file attach.py would set the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
