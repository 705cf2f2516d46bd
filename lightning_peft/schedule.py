"""Budget schedules for methods that move ranks or prune: the fraction of the extra budget still held at a step."""

from lightning_peft.method import Step


def linear(step: Step, begin: float, end: float) -> float:
    """1 before ``begin``, 0 after ``end``, falling linearly between; both are fractions of the fit's steps."""
    if not 0 <= begin < end <= 1:
        raise ValueError(f"a schedule needs 0 <= begin < end <= 1, got begin={begin}, end={end}")
    first, last = begin * step.total, end * step.total
    return 1.0 - min(max((step.index - first) / (last - first), 0.0), 1.0)


def cubic(step: Step, begin: float, end: float) -> float:
    """``linear`` cubed: AdaLoRA's schedule, fast at first (Zhang et al. 2023, arXiv:2303.10512)."""
    return linear(step, begin, end) ** 3
