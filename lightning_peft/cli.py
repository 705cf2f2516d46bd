"""`lightning-peft fit | validate | test | predict`: LightningCLI with a `peft:` section and one folder a run."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning_peft.data  # noqa: F401  # its classes go by short name in YAML
import lightning_peft.models  # noqa: F401
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_peft import cli_errors, cli_names, cli_output, cli_resume, runs
from lightning_peft.callback import PEFT
from lightning_peft.cli_base import quantize_when_made

COMMANDS = ("fit", "validate", "test", "predict")
ROOT = "runs"
