"""Shared set-up: one thread a process, for the suite runs in parallel, and no network."""

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # else Lightning sets the number of threads, for all tests that follow

import lightning as L
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _start_alike() -> Iterator[None]:
    L.seed_everything(1, verbose=False)
    yield
    if torch.distributed.is_initialized():  # a test with a Trainer of one DDP process; its port would stay taken
        torch.distributed.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
