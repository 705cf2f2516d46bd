"""jsonargparse's messages cut down to what was given, where, and what would work."""

import importlib
import inspect
import re
from argparse import ArgumentError
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_KINDS = {"tuple": "a list, such as [a, b]", "list": "a list, such as [a, b]", "dict": "a mapping, such as {a: 1}"}
_KINDS |= {"bool": "true or false", "int": "a whole number", "float": "a number", "NoneType": "null", "str": "text"}


class Mistake(ArgumentError):
    """A message that needs no more shortening."""

    def __init__(self, message: str) -> None:
        super().__init__(None, message)


def shortened(message: str, cause: Exception | None, options: Sequence[str]) -> Mistake:
    """The error to raise in place of ``message``.

    Args:
        message: jsonargparse's; of a class within a class, the inner part has been through here before.
        cause: what it was made from; a ``Mistake`` when the parser of a command has shortened it.
        options: the option strings of the parser, for near ones.
    """
    if isinstance(cause, Mistake):
        return cause
    if found := re.match(r"unrecognized arguments: (.*)", message):
        given = next((w for w in found[1].split() if w.startswith("-")), found[1]).partition("=")[0]
        return Mistake(f"no option {given}{_nearest(given, options)}")
    if found := re.match(r"Subcommand '\w+' does not accept option '([^']+)'", message):
        return Mistake(f"the config has {found[1]!r}, which is no option{_nearest('--' + found[1], options)}")
    if found := re.match(r"the following arguments are required: ([\w.]+)", message):
        name = re.sub(r"^(fit|validate|test|predict)\.", "", found[1])
        return Mistake(f"{name} is needed: give it in the config file or as --{name}")
    if found := re.match(r"Option '([^']+)' is not accepted", message):
        return Mistake(f"there is no option {found[1]!r}")
    if found := re.match(r'Parser key "([^"]+)":\s*(.*)', message, re.S):
        return Mistake(_about_key(found[1], found[2]))
    return Mistake(" ".join(message.split()))


def unwrapped(error: Exception) -> str:
    """The message of the error that a class raised while jsonargparse was making it, without the union around it."""
    inner: BaseException = error
    while str(inner).startswith("Does not validate") and isinstance(inner.__cause__, ValueError | OSError):
        inner = inner.__cause__
    return str(inner)


def _about_key(key: str, body: str) -> str:
    """The most telling of the ways in which the value of ``key`` could have been right."""
    if file := re.search(r"File does not exist: '([^']+)'", body):
        return f"{key}: no file {file[1]}"
    for path, told in re.findall(r"Problem with given class_path '([^']+)':\n\s+(.*)", body):
        return _within(key, path, told)
    if name := re.search(r"Expected a dot import path string: (\S+)", body):
        return f"{key}: no class {name[1]!r}{_nearest(name[1], _classes(key))}; your own go by their module, my.Class"
    value = re.search(r"(?:Got|Given) value: (.*)", body)
    given = f" = {value[1].strip()}" if value else ""
    literals = [x for x in re.findall(r"typing\.Literal\[([^\]]*)\]", body.partition("Errors:")[2] or body)]
    kinds = [_KINDS[k] for k in re.findall(r"Expected an? <class '([\w.]+)'>", body) if k in _KINDS]
    wanted = dict.fromkeys([f"one of {x}" for x in literals] + kinds)
    return f"{key}{given}: expected {' or '.join(wanted)}" if wanted else f"{key}: {' '.join(body.split())}"


def _within(key: str, path: str, told: str) -> str:
    """About an option of the class ``path`` that ``key`` names; ``told`` is shortened already."""
    cls = path.rpartition(".")[2]
    if option := re.match(r"there is no option '([^']+)'", told):
        known = [a for a in _arguments(path) if a != "name"]
        near = _nearest(option[1], known) or f"; it has {', '.join(known)}"
        return f"{key}: {cls} has no option {option[1]!r}{near}"
    if option := re.match(r"(\w+) is needed", told):
        return f"{key}: {cls} needs {option[1]!r}: give it in the config file or as --{key}.{option[1]}"
    inner = re.match(r"[\w.]+(?: = .*)?: ", told)
    return f"{key}.{told}" if inner and not told.startswith("No module") else f"{key}: {told}"


def _nearest(word: str, known: Iterable[str]) -> str:
    near = get_close_matches(word, list(known), 1, cutoff=0.6)
    return f"; nearest: {near[0].removeprefix('--')}" if near else ""


def _arguments(path: str) -> list[str]:
    """Options of a class; jsonargparse has imported it by now."""
    module, _, name = path.rpartition(".")
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)


def _classes(key: str) -> list[str]:
    """Names of the classes that an option takes, as far as they are imported."""
    bases = {"model": LightningModule, "data": LightningDataModule, "trainer.callbacks": Callback}
    bases |= {"optimizer": Optimizer, "lr_scheduler": LRScheduler}
    todo, names = [bases[key]] if key in bases else [], []
    while todo:
        cls = todo.pop()
        names.append(cls.__name__)
        todo += cls.__subclasses__()
    return names
