"""Run a function of a test module in several gloo processes: ``launch(function, 2, folder=...)``.

Each process gets the environment in which Lightning takes part in a group that somebody else started, so several
Trainers can follow one another inside one launch. Importing costs seconds a process: put many fits in one function.
"""

import importlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def launch(function: Callable[..., Any], processes: int = 2, timeout: float = 300.0, **kwargs: Any) -> list[Any]:
    """What the function returns in each process, by rank; arguments and results go through ``torch.save``.

    Args:
        function: at the top level of a module below tests/.
        processes: number of them, on this machine's CPU.
        timeout: seconds until all are killed.

    Raises:
        AssertionError: a process failed or the time was over, with the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(kwargs, Path(folder) / "kwargs.pt")
        command = [sys.executable, "-m", "tests.launch", function.__module__, function.__qualname__, folder]
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "GLOO_SOCKET_IFNAME": "lo",
            "WORLD_SIZE": str(processes),
            "NODE_RANK": "0",
        }
        logs = [Path(folder) / f"{rank}.log" for rank in range(processes)]
        running = []
        for rank, log in enumerate(logs):
            with log.open("wb") as out:
                more = {"LOCAL_RANK": str(rank)}
                running.append(subprocess.Popen(command, cwd=ROOT, env=env | more, stdout=out, stderr=out))
        try:
            _wait(running, logs, time.monotonic() + timeout)
        finally:
            for process in running:
                process.kill()
                process.wait()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _wait(running: list[subprocess.Popen], logs: list[Path], deadline: float) -> None:
    while True:
        codes = [p.poll() for p in running]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed or time.monotonic() > deadline:
            time.sleep(1.0)  # the others may be about to say why
            what = f"rank {failed[0]} failed" if failed else "the time is over"
            tails = "\n".join(f"--- rank {n}\n{log.read_text(errors='replace')[-3000:]}" for n, log in enumerate(logs))
            raise AssertionError(f"{what}\n{tails}")
        if all(code == 0 for code in codes):
            return
        time.sleep(0.05)


def _main(module: str, name: str, folder: str) -> None:
    torch.set_num_threads(1)
    function = getattr(importlib.import_module(module), name)
    result = function(**torch.load(Path(folder) / "kwargs.pt", weights_only=False))
    torch.save(result, Path(folder) / f"{os.environ['LOCAL_RANK']}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may still be running, and C++ ends a process whose threads outlive their owner


if __name__ == "__main__":
    _main(*sys.argv[1:])
