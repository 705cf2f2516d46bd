"""Run the quickstart for real and draw its terminal as docs/quickstart.svg, for the README.

python examples/record_quickstart.py [--output docs/quickstart.svg] [more options of `lightning-peft fit`]
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent
CONFIG = "configs/quickstart.yaml"
WIDTH = 100


def run(more: list[str]) -> str:
    """Everything the command prints on a terminal of 100 columns, with colours, without the moving progress bar."""
    plain = {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "0", "COLUMNS": str(WIDTH), "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory() as place:  # so that paths are as a newcomer sees them, and runs/ stays as it is
        Path(place, "configs").symlink_to(ROOT / "configs")
        args = [sys.executable, "-m", "lightning_peft", "fit", "--config", CONFIG, *more]
        done = subprocess.run(
            args, cwd=place, env=os.environ | plain, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    if done.returncode:
        raise SystemExit(done.stdout)
    return done.stdout


def draw(printed: str, more: list[str], output: Path) -> None:
    """Write the picture."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True)
        command = " ".join(["lightning-peft fit --config", CONFIG, *more])
        console.print(f"[bold green]$[/] [bold]{command}[/]", highlight=False, soft_wrap=True)
        console.print(Text.from_ansi(printed.replace("\x1b[?25l", "").replace("\x1b[?25h", "")))
        output.parent.mkdir(parents=True, exist_ok=True)
        console.save_svg(str(output), title="lightning-peft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "quickstart.svg")
    options, more = parser.parse_known_args()
    draw(run(more), more, options.output)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
