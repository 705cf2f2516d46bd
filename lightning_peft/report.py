"""The table of what was injected where."""

from rich.console import Console
from torch import nn


def show(model: nn.Module, console: Console | None = None) -> None:
    """Print hosts by role, ranks, trainable and total parameters, the share."""
