"""The command `lightning-peft`: chooses what to import before anything slow is, and turns errors into one line."""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from lightning_peft import __version__

# command -> (module with a function `run(args) -> int`, what it does)
COMMANDS = {
    "methods": ("cli.listing", "list the installed methods, or the options of one: methods lora"),
    "fit": ("cli.training", "train: fit --config configs/quickstart.yaml"),
    "validate": ("cli.training", "measure on the validation split"),
    "test": ("cli.training", "measure on the test split"),
    "predict": ("cli.training", "predict for the rows given"),
    "merge": ("cli.commands", "fold an adapter into its base and prove the outputs equal"),
    "export": ("cli.commands", "write an adapter in another format, huggingface/peft's for one"),
}
DEBUG = "LIGHTNING_PEFT_DEBUG"
INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: what follows `lightning-peft`; taken from the command line when None.

    Returns:
        the exit code: 0, 1 after an error, 2 after a mistake on the command line, 130 after Ctrl-C.
    """
    args = sys.argv[1:] if argv is None else list(argv)
    try:
        return _dispatch(args)
    except KeyboardInterrupt as stop:
        _say("interrupted", str(stop) or "nothing was saved", style="yellow")
        return INTERRUPTED
    except SystemExit as stop:  # argparse after --help or --print_config
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if os.environ.get(DEBUG) == "1":
            raise
        return _report(error)


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        _usage()
        return 0
    if args[0] == "--version":
        print(f"lightning-peft {__version__}")
        return 0
    if args[0] not in COMMANDS:
        near = difflib.get_close_matches(args[0], COMMANDS, 1, cutoff=0.4)
        _say("error", f"no command {args[0]!r}; nearest: {near[0] if near else ', '.join(COMMANDS)}")
        return 2
    return importlib.import_module(f"lightning_peft.{COMMANDS[args[0]][0]}").run(args)


def _usage() -> None:
    print("usage: lightning-peft COMMAND ...\n")
    for name, (_, what) in COMMANDS.items():
        print(f"  {name:10}{what}")
    print("\n`lightning-peft COMMAND --help` tells more; start with `lightning-peft methods`.")


def _report(error: Exception) -> int:
    """One message on stderr. Errors that are not ours to foresee keep their type and a way to their traceback."""
    kind, text = type(error).__name__, str(error).strip()
    if isinstance(error, argparse.ArgumentError):
        _say("error", text)
        return 2
    if text.startswith("Does not validate"):  # what a class raised while jsonargparse was making it
        text = importlib.import_module("lightning_peft.cli.errors").unwrapped(error)
    foreseen = isinstance(error, ValueError | OSError) or kind == "MisconfigurationException"
    _say("error", text if foreseen and text else f"{kind}: {text}\n({DEBUG}=1 shows the traceback)")
    return 1


def _say(label: str, text: str, style: str = "red") -> None:
    rank = int(os.environ.get("LOCAL_RANK", 0))
    label += f" (process {rank})" if rank else ""
    Console(stderr=True, soft_wrap=True).print(Text.assemble((f"{label}: ", f"bold {style}"), text))


if __name__ == "__main__":
    sys.exit(main())
