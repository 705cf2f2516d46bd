"""What a checkpoint says of its model, against what is configured now."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lightning_peft import io
from lightning_peft.cli import runs

NOT_FILES = ("best", "last", "hpc")  # words that Lightning itself resolves


def take_hyperparameters(options: Namespace, refuse_changes: bool) -> None:
    """Fill options of the model that are left open (null) from the checkpoint, such as the labels it learnt.

    Args:
        options: of the command, with ``ckpt_path`` and ``model``; changed in place.
        refuse_changes: refuse options that differ, as when resuming: the optimizer's state would win over them.

    Raises:
        FileNotFoundError: no such checkpoint; the nearest name beside it is given.
        ValueError: a damaged checkpoint, or one of another model class, or other hyper-parameters.
    """
    path = str(options.ckpt_path)
    if path in NOT_FILES or path.startswith("registry") or Path(path).is_dir():  # a sharded checkpoint is a folder
        return
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}{runs.nearest_file(Path(path))}")
    saved = dict(io.read_checkpoint(path).get("hyper_parameters", {}))
    if (cls := saved.pop("_class_path", None)) not in (None, options.model.class_path):
        raise ValueError(f"{path} was written by model {cls}, but the model here is {options.model.class_path}")
    mine = options.model.init_args
    changed = []
    for name, value in saved.items():
        if name not in mine:
            continue
        if mine[name] is None:
            mine[name] = value
        elif _plain(mine[name]) != _plain(value):
            changed.append(f"model.{name}={value!r} there, {mine[name]!r} now")
    if changed and refuse_changes:
        raise ValueError(f"{path} was trained with other options: {'; '.join(changed)}. Resume with the same")


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
