"""The floor of any executor that gives each snippet a fresh process: how many bare forks a machine does.

Each forker is a process with the same modules loaded and the same huge pages as a worker; its children exit at
once. It is measured in processes of its own, since a fork's price is the memory of who forks.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ztrl_sandbox import linux

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
_WARM_UP_FORKS = 10


def forks_per_second(modules: Sequence[str], forkers: int, seconds: float) -> float:
    """``fork`` + ``_exit`` + ``waitpid`` of processes with ``modules`` loaded, by ``forkers`` at once."""
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
    command = [sys.executable, "-m", "ztrl_sandbox.bench.floor", str(forkers), str(seconds), *modules]
    finished = subprocess.run(
        command,
        env={**os.environ, **threads, "PYTHONPATH": _PACKAGE_ROOT},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(finished.stdout)


def _fork_once() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _forker(seconds: float, ready_fd: int, start_fd: int, result_fd: int) -> None:
    gc.freeze()
    linux.collapse_writable_memory()
    for _ in range(_WARM_UP_FORKS):
        _fork_once()
    os.write(ready_fd, b".")
    os.read(start_fd, 1)
    count = 0
    started_at = time.monotonic()
    while (elapsed_seconds := time.monotonic() - started_at) < seconds:
        _fork_once()
        count += 1
    os.write(result_fd, f"{count / elapsed_seconds}\n".encode())


def main() -> None:
    """``argv``: forkers, seconds, modules. Prints forks per second, of all forkers together."""
    forkers, seconds = int(sys.argv[1]), float(sys.argv[2])
    for name in sys.argv[3:]:
        importlib.import_module(name)
    gc.collect()
    (ready, ready_fd), (start_fd, start), (results, result_fd) = (os.pipe() for _ in range(3))
    for _ in range(forkers):
        if os.fork() == 0:
            try:
                _forker(seconds, ready_fd, start_fd, result_fd)
            finally:
                os._exit(0)
    os.close(ready_fd)  # so that a forker's death ends the reads below
    os.close(result_fd)
    for _ in range(forkers):
        os.read(ready, 1)
    os.write(start, b"." * forkers)
    with open(results) as lines:
        rates = [float(line) for line in lines]
    if len(rates) != forkers:
        raise RuntimeError(f"{forkers - len(rates)} of {forkers} forkers died")
    print(json.dumps(sum(rates)))


if __name__ == "__main__":
    main()
