"""Replace methods on single instances for the time of a fit, and put everything back."""

import weakref
from collections.abc import Callable
from typing import Any

_ABSENT = object()
_open: "weakref.WeakKeyDictionary[Any, weakref.ref[Patches]]" = weakref.WeakKeyDictionary()


class Patches:
    """Instance attributes that shadow methods; undone in reverse order."""

    def __init__(self) -> None:
        self._done: list[tuple[Any, str, Any]] = []

    def claim(self, owner: Any) -> None:
        """Undo what a fit that broke off left on ``owner``, for Lightning skips teardown then; be the next to undo."""
        if (last := _open.get(owner, lambda: None)()) is not None:
            last.undo()
        _open[owner] = weakref.ref(self)

    def put(self, obj: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Set ``obj.name`` to ``make(the present bound method)``."""
        before = vars(obj).get(name, _ABSENT)
        setattr(obj, name, make(getattr(obj, name)))
        self._done.append((obj, name, before))

    def undo(self) -> None:
        while self._done:
            obj, name, before = self._done.pop()
            if before is _ABSENT:
                delattr(obj, name)
            else:
                setattr(obj, name, before)
