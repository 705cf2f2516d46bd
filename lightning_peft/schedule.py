"""Budget schedules for methods that move ranks or prune: the fraction of the extra budget still held at a step."""

from lightning_peft.method import Step


def steps(length: int | float, total: int) -> int:
    """A part of a fit in optimizer steps: an int counts them, a float is a share of all ``total``, rounded down."""
    return length if isinstance(length, int) else int(length * total)


def linear(step: Step, begin: int | float, end: int | float) -> float:
    """1 before ``begin``, 0 after ``end``, falling linearly between; see ``steps`` for both.

    Raises:
        ValueError: they do not follow one another within the fit.
    """
    first, last = steps(begin, step.total), steps(end, step.total)
    if not 0 <= first < last <= step.total:
        raise ValueError(f"a schedule needs 0 <= begin < end <= {step.total} steps, got begin={begin}, end={end}")
    return 1.0 - min(max((step.index - first) / (last - first), 0.0), 1.0)


def cubic(step: Step, begin: int | float, end: int | float) -> float:
    """``linear`` cubed: AdaLoRA's schedule, fast at first (Zhang et al. 2023, arXiv:2303.10512)."""
    return linear(step, begin, end) ** 3
