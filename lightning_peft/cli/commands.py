"""`lightning-peft merge` and `lightning-peft export`: from an adapter folder or a training checkpoint."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import rich
from rich.markup import escape

from lightning_peft import hf, io
from lightning_peft.cli import errors, names, output, runs
from lightning_peft.cli.bases import Adapted, example_calls, move_record, rebuild
from lightning_peft.inject import find_record
from lightning_peft.models.source import load_tokenizer, resolve
from lightning_peft.proof import prove

PROOF = "merge_proof.json"


def run(args: Sequence[str]) -> int:
    """Run `merge` or `export`."""
    output.quieten()
    sys.path.insert(0, os.getcwd())  # a config.yaml may name a class in a file here
    names.short_names()
    return {"merge": _merge, "export": _export}[args[0]](_parse(args))


class _Parser(argparse.ArgumentParser):
    """Mistakes are told as everywhere here, in one line."""

    def error(self, message: str) -> NoReturn:
        if "required" in message:
            raise errors.Mistake(f"{message}, as in: {self.prog} runs/NAME/adapter --output FOLDER")
        raise errors.shortened(message, None, [o for a in self._actions for o in a.option_strings])


def _parse(args: Sequence[str]) -> argparse.Namespace:
    merging = args[0] == "merge"
    what = "Fold adapters into their base and prove it." if merging else "Write adapters in another format."
    parser = _Parser(f"lightning-peft {args[0]}", description=what)
    parser.add_argument("source", type=Path, help="adapter folder, or a .ckpt of a run")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; made if missing")
    parser.add_argument("--model", help="transformers model to take as the base: folder, hub name or package:NAME")
    parser.add_argument("--config", type=Path, help="config.yaml whose `model:` is the base; found beside the adapter")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier call wrote to --output")
    if merging:
        parser.add_argument("--tolerance", type=float, help="allowed difference, relative to the largest output")
    else:
        parser.add_argument("--format", choices=("hf", "lightning-peft"), default="hf", help="default: %(default)s")
    options = parser.parse_args(args[1:])
    if options.model and options.config:
        raise ValueError("give --model or --config, not both: each says what the base is")
    return options


def _merge(options: argparse.Namespace) -> int:
    _check_output(options.output, PROOF, options.overwrite)
    adapted = rebuild(options.source, options.model, options.config)
    _, proof = prove(adapted.target, example_calls(adapted), options.tolerance, keep=False)
    io.save_merged(adapted.target, options.output, asdict(proof))
    _add_tokenizer(adapted, options.output)
    _say(adapted, options.output, f"{proof.hosts} layers merged; outputs differ by at most {proof.largest:.2g}")
    return 0


def _export(options: argparse.Namespace) -> int:
    marker = hf.CONFIG if options.format == "hf" else io.CONFIG
    _check_output(options.output, marker, options.overwrite)
    adapted = rebuild(options.source, options.model, options.config)
    if options.format == "hf":
        hf.save(move_record(adapted), options.output, overwrite=options.overwrite)
    else:
        io.save(adapted.target, options.output, overwrite=options.overwrite)
    held = find_record(adapted.root)
    assert held is not None
    _say(adapted, options.output, f"{', '.join(m.name for m in held[1].methods)} in the format of {options.format}")
    return 0


def _check_output(folder: Path, marker: str, overwrite: bool) -> None:
    """Refuse, before any work, to write over what is there; with ``overwrite`` only over what this command wrote."""
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / marker).is_file():
            raise ValueError(f"{folder} is not empty and holds no {marker}: choose another --output")
        if not overwrite:
            raise ValueError(f"{folder} holds earlier results: choose another --output, or pass --overwrite")
    runs.check_writable(folder)


def _add_tokenizer(adapted: Adapted, folder: Path) -> None:
    """So that the merged folder is a model to use as it stands; nothing where the base came without a tokenizer."""
    inner = adapted.transformer()
    source = getattr(inner.config, "_name_or_path", "") if inner is not None else ""
    if source and Path(resolve(source), "tokenizer_config.json").is_file():
        load_tokenizer(source).save_pretrained(folder)


def _say(adapted: Adapted, folder: Path, what: str) -> None:
    rich.print(f"base       {escape(adapted.base)}")
    rich.print(f"written    {escape(str(folder))}  {runs.size(folder)}")
    rich.print(f"result     {escape(what)}")
