"""Where a run writes: one folder a run, never that of another; and what is found there afterwards.

<trainer.default_root_dir>/<name>/      "runs" unless configured; the name of the config file unless named
    config.yaml      all options of the run
    checkpoints/     *.ckpt
    adapter/         the adapter as of the last step
    merged/          the merged model and merge_proof.json, with merge_at_end
    metrics.csv      and TensorBoard's event files where it is installed
    summary.json     best checkpoint, metrics and seconds, once the fit has ended
    test/            the same of `lightning-peft test`; and validate/, predict/
"""

import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

CONFIG, SUMMARY, METRICS, CHECKPOINTS = "config.yaml", "summary.json", "metrics.csv", "checkpoints"
EVENTS = "events.out.tfevents"  # TensorBoard's
PROCESSES = "LIGHTNING_PEFT_RUN"  # tells the other processes of a distributed run which folder the first one took


@dataclass(frozen=True)
class Run:
    """The folder of one run.

    Args:
        folder: where it writes, absolute, as checkpoints remember it.
        claimed: True if it was made for this run.
        kept: where the metrics of a run that goes on were put out of the way; CSVLogger deletes what it finds.
        held: what was there before.
    """

    folder: Path
    claimed: bool = False
    kept: Path | None = None
    held: frozenset[str] = frozenset()

    def release(self) -> None:
        """After an error: take away what was made for a run that has not begun, and leave an older one as it was."""
        if self.kept is not None and not (self.folder / METRICS).exists():
            os.replace(self.kept, self.folder / METRICS)
            for file in self.folder.glob(f"{EVENTS}*"):
                if file.name not in self.held:
                    file.unlink()
        if self.claimed and not results(self.folder):
            shutil.rmtree(self.folder)

    def end(self, best: str, seconds: float, metrics: dict[str, float]) -> None:
        """Write summary.json at the end of a fit; the best checkpoint relative to the folder, which may be moved."""
        path = Path(best)
        best = str(path.relative_to(self.folder)) if path.is_relative_to(self.folder) else best
        told = {"best": best, "seconds": round(seconds, 1), "metrics": metrics}
        (self.folder / SUMMARY).write_text(json.dumps(told, indent=1) + "\n")

    def best(self) -> Path | None:
        """The best checkpoint of a fit that has ended, or else the newest; None where there is none."""
        file = self.folder / SUMMARY
        best = self.folder / json.loads(file.read_text())["best"] if file.is_file() else self.folder
        return best if best.is_file() else next(reversed(self.checkpoints()), None)

    def checkpoints(self) -> list[Path]:
        """Every checkpoint in the folder, the newest last."""
        return sorted((self.folder / CHECKPOINTS).glob("**/*.ckpt"), key=lambda p: p.stat().st_mtime)


def of_checkpoint(path: str | Path) -> Run | None:
    """The run whose folder a checkpoint or an adapter folder lies in; None where it lies elsewhere."""
    path = Path(path).absolute()
    found = next((p for p in path.parents if (p / CONFIG).is_file()), None)
    return Run(found) if found and found in path.parents[:2] else None


def results(folder: Path) -> list[str]:
    """Names of what a run left in a folder, its configuration and empty logs aside."""
    names = sorted(p.name for p in folder.iterdir() if not (p.is_dir() and not any(p.iterdir())))
    return [n for n in names if n not in (CONFIG, "hparams.yaml") and not n.startswith(EVENTS)]


def for_fit(root: Path, name: str | None, stem: str, resumed: str | None) -> Run:
    """The folder of a fit.

    Args:
        root: below which runs lie.
        name: of the folder; when None, the first of ``stem``, ``stem-2``, ... that is free.
        stem: name of the config file.
        resumed: checkpoint to go on from; without a name, its own run goes on.

    Raises:
        ValueError: the folder holds another run's results, or cannot be written.
    """
    root, own = root.absolute(), of_checkpoint(resumed) if resumed else None
    if own is not None and name in (None, own.folder.name):
        held = frozenset(p.name for p in own.folder.iterdir())
        return Run(own.folder, kept=_keep_metrics(own.folder), held=held)
    if name is None:
        return claim(root, stem)
    folder = root / name
    if folder.is_dir() and (held := results(folder)):
        raise ValueError(
            f"{short(folder)} holds another run's results ({', '.join(held[:4])}): choose another --name, or resume "
            f"that run with --ckpt_path {short(folder / CHECKPOINTS)}/FILE.ckpt"
        )
    made = not folder.exists()
    _make(folder)
    return Run(folder, made)


def for_evaluation(root: Path, name: str | None, stem: str, command: str, checkpoint: str | None) -> Run:
    """The folder of a `validate`, `test` or `predict`: within that of the run it measures, beside earlier ones."""
    root, own = root.absolute(), of_checkpoint(checkpoint) if checkpoint else None
    if own is None and name and (root / name).is_dir():
        own = Run(root / name)
    return claim(own.folder, command) if own else claim(root, f"{name or stem}-{command}")


def claim(root: Path, stem: str) -> Run:
    """Make and take the first of ``stem``, ``stem-2``, ... that does not exist yet."""
    _make(root)
    number = 1
    while True:
        folder = root / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir()
            return Run(folder, claimed=True)
        except FileExistsError:
            number += 1


def check_writable(folder: Path) -> None:
    """Raises ValueError where ``folder`` could not be made or written; leaves nothing behind."""
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    _make(folder)
    for path in made:
        path.rmdir()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as cause:
        raise ValueError(f"cannot write the folder {folder}: {cause.strerror}") from cause


def _keep_metrics(folder: Path) -> Path | None:
    if not (folder / METRICS).is_file():
        return None
    taken = [int(m[1]) for p in folder.iterdir() if (m := re.fullmatch(r"metrics-(\d+)\.csv", p.name))]
    kept = folder / f"metrics-{max(taken, default=0) + 1}.csv"
    os.replace(folder / METRICS, kept)
    return kept


def short(path: str | Path) -> str:
    """A path as one would type it here."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def nearest_file(path: Path) -> str:
    """The end of a message about a path that does not exist: "; nearest: runs/x/last.ckpt", or nothing."""
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, beside, 1)
    return f"; nearest: {path.with_name(near[0])}" if near else ""


def size(path: Path) -> str:
    """Bytes of a file or of all files in a folder, in decimal units."""
    total = float(sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file()))
    for unit in ("B", "kB", "MB"):
        if total < 1000:
            return f"{total:.3g} {unit}"
        total /= 1000
    return f"{total:.3g} GB"
