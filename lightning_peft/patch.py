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

    def put(self, obj: Any, name: str, make: Callable[[Callable[..., Any]], Any]) -> None:
        """Set ``obj.name`` to ``make(the present bound method)``."""
        before = vars(obj).get(name, _ABSENT)
        setattr(obj, name, make(getattr(obj, name)))
        self._done.append((obj, name, before))

    def before(self, obj: Any, name: str, call: Callable[..., None]) -> None:
        """Run ``call`` with the method's positional arguments before it."""
        self.put(obj, name, lambda old: _both(call, old, first=True))

    def after(self, obj: Any, name: str, call: Callable[..., None]) -> None:
        """Run ``call`` with the method's positional arguments after it; what the method returns is returned."""
        self.put(obj, name, lambda old: _both(call, old, first=False))

    def undo(self) -> None:
        while self._done:
            obj, name, before = self._done.pop()
            if before is _ABSENT:
                delattr(obj, name)
            else:
                setattr(obj, name, before)


def _both(call: Callable[..., None], old: Callable[..., Any], first: bool) -> Callable[..., Any]:
    def patched(*args: Any) -> Any:  # not functools.wraps: Lightning would look through it and skip the hook
        if first:
            call(*args)
        result = old(*args)
        if not first:
            call(*args)
        return result

    return patched
