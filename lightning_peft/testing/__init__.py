"""The conformance suite: what every method must do, ours and third parties'.

All at once, with one error that lists every failure::

    lightning_peft.testing.check_method(MyMethod(r=2), model, batch)

or with pytest, one test a property::

    ROWS = [Row("mine", lambda: MyMethod(r=2), make_model, make_batch)]

    @parametrize_with_checks(ROWS)
    def test_conformance(check):
        check()
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lightning_peft.method import Method
from lightning_peft.resume import rng_state, set_rng_state
from lightning_peft.testing import company, declarations, numerics, persistence
from lightning_peft.testing.case import Batch, Build, Case
from lightning_peft.testing.compare import Failed, Skipped

__all__ = [
    "Batch",
    "Case",
    "Check",
    "ConformanceError",
    "Failed",
    "Result",
    "Row",
    "Skipped",
    "check_method",
    "checks",
    "parametrize_with_checks",
]


class ConformanceError(AssertionError):
    """A method lacks properties; the message lists all of them."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One property. Called with a case it returns when the property holds.

    Args:
        name: such as "save_load".
        property: what must hold, in a sentence.
        run: raises ``Failed`` where it does not, ``Skipped`` where that cannot be told.
        unless: why it does not apply to a case, or "".
    """

    name: str
    property: str
    run: Callable[[Case], None]
    unless: Callable[[Case], str] = lambda case: ""

    def __call__(self, case: Case) -> None:
        before = rng_state()
        try:
            if reason := self.unless(case):
                raise Skipped(reason)
            self.run(case)
        finally:  # unlike Lightning's isolate_rng, also after an error
            set_rng_state(before)


@dataclasses.dataclass(frozen=True)
class Result:
    """How one check ended: "passed", "failed" or "skipped", and why."""

    check: Check
    outcome: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line in a table of methods to test.

    Args:
        id: in the names of the tests.
        method, model, batch: functions that make them, called once a test; see ``check_method``.
        train, tolerance: see ``check_method``.
        known: name of a check that is known to fail -> why. A check that passes all the same fails the test.
    """

    id: str
    method: Callable[[], Method | Sequence[Method]]
    model: Build
    batch: Callable[[], Batch]
    train: tuple[str, ...] = ()
    tolerance: float = 1e-5
    known: dict[str, str] = dataclasses.field(default_factory=dict)

    def case(self) -> Case:
        return Case(self.method(), self.model, self.batch(), self.train, self.tolerance)


_CHECKS = (
    declarations.check_description,
    declarations.check_hyperparameters,
    declarations.check_cli,
    numerics.check_start,
    numerics.check_gradients,
    numerics.check_base_unchanged,
    numerics.check_training_has_effect,
    numerics.check_weight_is_forward,
    numerics.check_merge,
    numerics.check_bf16,
    persistence.check_save_load,
    persistence.check_hf,
    persistence.check_wrong_base,
    persistence.check_remove,
    persistence.check_meta,
    persistence.check_resume,
    company.check_deepcopy,
    company.check_stacking,
    company.check_compile,
    persistence.check_two_processes,
)


def checks(*, compile: bool = True, processes: bool = False) -> list[Check]:
    """All checks, cheap ones first.

    Args:
        compile: with torch.compile, which takes seconds a model.
        processes: with two-process training, which starts two processes once and takes about a second a method.
    """
    left_out = {"compile": not compile, "two_processes": not processes}
    return [c for c in map(_check, _CHECKS) if not left_out.get(c.name)]


def _check(run: Any) -> Check:
    told = {"unless": run.unless} if hasattr(run, "unless") else {}
    return Check(run.__name__.removeprefix("check_"), (run.__doc__ or "").strip().split("\n")[0], run, **told)


def check_method(
    method: Method | Sequence[Method],
    model: nn.Module | Build,
    batch: Batch,
    *,
    train: Sequence[str] = (),
    tolerance: float = 1e-5,
    compile: bool = True,
    processes: bool = False,
) -> list[Result]:
    """Run every check of the contract on a method.

    Args:
        method: with small hyper-parameters; or several methods that belong together.
        model: a small base without adapters, or a function that makes it. Copied for every run, never changed.
        batch: keyword arguments (dict) or arguments (tuple) of the model, with at least 2 examples along dimension 0;
            4 give the resumed fit an epoch to be broken off in. The loss is ``output.loss`` where the model gives one,
            else a squared distance of its first floating output.
        train: patterns of base parameters that train along.
        tolerance: allowed difference where outputs are equal up to rounding, relative to max(1, the largest output).
        compile, processes: see ``checks``.

    Returns:
        one result a check; those that do not apply by the method's traits are skipped with the reason.

    Raises:
        ConformanceError: listing every property that does not hold, what was measured and what was allowed.
    """
    case = Case(method, model, batch, train, tolerance)
    results = [_result(check, case) for check in checks(compile=compile, processes=processes)]
    failed = [r for r in results if r.outcome == "failed"]
    if failed:
        lines = [f"- {r.check.name}: {r.check.property}\n    {r.reason}" for r in failed]
        raise ConformanceError(f"{case.names}: {len(failed)} of {len(results)} checks failed\n" + "\n".join(lines))
    return results


def _result(check: Check, case: Case) -> Result:
    try:
        check(case)
    except Skipped as reason:
        return Result(check, "skipped", str(reason))
    except Failed as failure:
        return Result(check, "failed", str(failure))
    except Exception as error:  # a method that raises fails this check, and the others are still to be told
        return Result(check, "failed", f"{type(error).__name__}: {error}")
    return Result(check, "passed")


def parametrize_with_checks(rows: Sequence[Row], *, compile: bool = True, processes: bool = False) -> Any:
    """A decorator that makes one test of every row and check; the test function takes ``check`` and calls it.

    A check that does not apply to a row makes no test.
    """
    import pytest  # optional: needed by nothing else here

    def bind(row: Row, check: Check) -> Callable[[], None]:
        def run() -> None:
            try:
                check(row.case())
            except Skipped as reason:
                pytest.skip(str(reason))

        return run

    params = []
    for row in rows:
        found = checks(compile=compile, processes=processes)
        if unknown := row.known.keys() - {c.name for c in checks(processes=True)}:
            raise ValueError(f"row {row.id!r}: no check {sorted(unknown)}; there are {[c.name for c in found]}")
        case, before = row.case(), rng_state()
        applying = [c for c in found if not c.unless(case)]
        set_rng_state(before)
        for check in applying:
            marks = [pytest.mark.xfail(reason=row.known[check.name], strict=True)] if check.name in row.known else []
            params.append(pytest.param(bind(row, check), id=f"{row.id}-{check.name}", marks=marks))
    return pytest.mark.parametrize("check", params)
