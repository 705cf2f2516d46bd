"""`lightning-peft fit | validate | test | predict`: LightningCLI with a `peft:` section and one folder a run."""

import os
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

import lightning_peft.data
import lightning_peft.models
from lightning_peft.callback import PEFT
from lightning_peft.cli import errors, names, output, runs
from lightning_peft.cli.bases import quantize_when_made
from lightning_peft.cli.resume import take_hyperparameters
from lightning_peft.cli.runs import Run

COMMANDS = ("fit", "validate", "test", "predict")
SHORT = (lightning_peft.models, lightning_peft.data)  # imported, so that YAML may name their classes alone
ROOT = "runs"
SEED = 42


class Parser(LightningArgumentParser):
    """Says what was given, where and what would work, in place of the whole union of types."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        below = [p for a in self._actions if isinstance(a.choices, dict) for p in a.choices.values()]  # subcommands
        options = [o for p in (self, *below) for a in p._actions for o in a.option_strings]
        raise errors.shortened(message, ex, options) from ex


class SaveConfig(SaveConfigCallback):
    """Saves the config as it can be run again: without the checkpoint that this run went on from."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        config = config.clone()
        config["ckpt_path"] = None
        super().__init__(parser, config, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")  # not before: a checkpoint may be refused, whose run stays as it is


class PeftCLI(LightningCLI):
    """LightningCLI with `--name`, `--quantize` and `--peft.*`. Runs the command it is given."""

    run_folder: Run | None = None

    def __init__(self, args: Sequence[str]) -> None:
        options = {"exit_on_error": False, "parser_mode": names.MODE}
        try:
            super().__init__(
                save_config_callback=SaveConfig,
                save_config_kwargs={"overwrite": True},  # runs.py has made sure that it is this run's own
                trainer_defaults={"default_root_dir": ROOT, "enable_model_summary": False, "log_every_n_steps": 10},
                seed_everything_default=SEED,
                parser_class=Parser,
                parser_kwargs=options | {"prog": "lightning-peft"} | {c: dict(options) for c in COMMANDS},
                args=list(args),
            )
        except BaseException:
            if self.run_folder is not None and rank_zero_only.rank == 0:
                self.run_folder.release()  # a run that fails before it has results leaves no folder behind
            raise

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(PEFT, "peft", fail_untyped=False, sub_configs=True)
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help=f"folder of the run below trainer.default_root_dir ({ROOT!r}); by default the config file's name, "
            "with a number if that is taken",
        )
        parser.add_argument(
            "--quantize",
            type=Literal["nf4", "fp4", "int8"] | None,
            default=None,
            help="store the base's linear layers in 4 or 8 bits, before adapters are injected (QLoRA)",
        )

    @property
    def given(self) -> Namespace:
        """The options of the command that runs."""
        return self.config[str(self.subcommand)]

    # ---- before ----------------------------------------------------------------------------------------------------

    def _parse_ckpt_path(self) -> None:  # private: between parsing and instantiating LightningCLI has no other place
        command = self.config["subcommand"]
        options = self.config[command]
        if command != "fit" and options.ckpt_path is None:
            options["ckpt_path"] = self._own_checkpoint(command, options)
        if options.ckpt_path is not None:
            rank_zero_only(output.note)(f"checkpoint: {runs.short(options.ckpt_path)}")
            take_hyperparameters(options, refuse_changes=command == "fit")

    def _own_checkpoint(self, command: str, options: Namespace) -> str | None:
        """The checkpoint that a `test` without --ckpt_path is about: the best, or else the newest, of the named run."""
        folder = Path(_root(options)).absolute() / (options.name or "")
        if options.name is None or not folder.is_dir():
            rank_zero_only(output.note)(f"no --ckpt_path and no run named: {command} measures the untrained model")
            return None
        best = Run(folder).best()
        if best is None:
            raise ValueError(f"{runs.short(folder)} holds no checkpoint to {command}: give --ckpt_path FILE.ckpt")
        return str(best)

    def before_instantiate_classes(self) -> None:
        options = self.given
        if options.trainer.fast_dev_run:
            return
        if rank_zero_only.rank:  # started by the first process, which has made the folder and says which
            self.run_folder = Run(Path(os.environ.get(runs.PROCESSES, _root(options))))
            return
        stem = Path(str(options.config[-1])).stem if options.config else "run"
        root, checkpoint = Path(_root(options)), options.ckpt_path
        if self.subcommand == "fit":
            self.run_folder = runs.for_fit(root, options.name, stem, checkpoint)
            options["name"] = self.run_folder.folder.name
        else:
            self.run_folder = runs.for_evaluation(root, options.name, stem, str(self.subcommand), checkpoint)
        os.environ[runs.PROCESSES] = str(self.run_folder.folder)

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if kind := self.given.quantize:
            quantize_when_made(self.model, kind)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With PEFT before the configured callbacks, since some of them copy or count what it puts in."""
        made = self.config_init[str(self.subcommand)]
        peft, options = made.peft, made.trainer
        held = options.callbacks if isinstance(options.callbacks, list) else [c for c in [options.callbacks] if c]
        shown: list[Any] = [output.MetricLines()]
        if options.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in held):
            shown.append(output.Bar())
        kwargs["callbacks"] = [peft, *held, *shown]
        if self.run_folder is not None:
            kwargs["default_root_dir"] = str(self.run_folder.folder)
            if options.logger in (None, True):
                kwargs["logger"] = _loggers(self.run_folder.folder)
        return super().instantiate_trainer(**kwargs)

    # ---- LightningCLI calls these in place of the Trainer's methods ------------------------------------------------

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        began = time.monotonic()
        if self.trainer.is_global_zero:
            output.before_fit(self.trainer, model, self.datamodule, self.run_folder)
        try:
            self.trainer.fit(model, **kwargs)
        except SystemExit as stop:  # how Lightning ends after Ctrl-C
            if isinstance(stop.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt(output.last_checkpoint(self.run_folder)) from None
            raise
        if self.trainer.is_global_zero:
            callback = next(c for c in self.trainer.callbacks if isinstance(c, PEFT))  # pyright: ignore
            output.after_fit(self.trainer, self.datamodule, callback, self.run_folder, time.monotonic() - began)

    def validate(self, **kwargs: Any) -> None:
        self.trainer.validate(**kwargs)
        self._say_where()

    def test(self, **kwargs: Any) -> None:
        self.trainer.test(**kwargs)
        self._say_where()

    def predict(self, **kwargs: Any) -> None:
        found = self.trainer.predict(**kwargs)
        if self.run_folder is not None:
            output.write_predictions(found or [], self.run_folder.folder, self.trainer.global_rank)

    def _say_where(self) -> None:
        if self.trainer.is_global_zero and self.run_folder is not None:
            output.note(f"written to {runs.short(self.run_folder.folder)}")


def _root(options: Namespace) -> str:
    return options.trainer.default_root_dir or ROOT


def _loggers(folder: Path) -> list[Logger]:
    made: list[Logger] = [CSVLogger(folder, name="", version="")]
    if find_spec("tensorboard") or find_spec("tensorboardX"):
        made.append(TensorBoardLogger(folder, name="", version=""))
    return made


def run(args: Sequence[str]) -> int:
    """Run `fit`, `validate`, `test` or `predict`."""
    output.quieten()
    sys.path.insert(0, os.getcwd())  # `class_path: my_module.MyModel`, as `python -m` would find it
    paths, problems = names.short_names()
    for problem in problems:
        output.warn(problem)
    names.accept(paths)
    PeftCLI(names.in_arguments(args, paths))
    return 0
