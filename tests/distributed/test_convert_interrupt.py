"""Ctrl-C in the middle of a real conversion: one line, exit code 130, and nothing is left of it."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conversions import TOOL, convert
from safetensors.torch import save_file
from small_qwen2 import HF_CONFIG

from megatron_ztrl.weights.hf_mapping import Architecture, hf_tensor_shapes

LIMIT_SECONDS = 300
"""Of a process that imports Megatron first, on a machine that others keep busy."""
CHANCES = 5
"""To send a signal while the conversion is where it is wanted, which on a busy machine this process may sleep through.
"""
CONFIG = HF_CONFIG | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "vocab_size": 32768,
    "num_hidden_layers": 8,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quarter of a gigabyte, which takes long enough."""
    directory = tmp_path_factory.mktemp("large")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    shapes = hf_tensor_shapes(Architecture.from_hf_config(CONFIG))
    save_file(
        {name: torch.full(shape, 0.5) for name, shape in shapes.items()}, directory / "model.safetensors"
    )
    assert (directory / "model.safetensors").stat().st_size > 200e6
    return directory


def half_written(partial: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # it gets its own name
        return sum(path.stat().st_size for path in partial.iterdir()) > 20e6
    return False


def being_verified(partial: Path) -> bool:
    return (partial / "config.json").is_file()  # copied last


@pytest.mark.parametrize(
    ("number", "is_time"), [(signal.SIGINT, half_written), (signal.SIGTERM, being_verified)]
)
def test_a_signal_during_a_conversion_leaves_nothing(
    checkpoint: Path, tmp_path: Path, number: signal.Signals, is_time: Callable[[Path], bool]
) -> None:
    check_interrupted(tmp_path, number, is_time, "hf-to-megatron", checkpoint, "--tp", "2")


def test_the_way_back_leaves_nothing_either(checkpoint: Path, tmp_path: Path) -> None:
    megatron = tmp_path / "megatron"
    assert convert("hf-to-megatron", checkpoint, megatron, "--no-verify") == 0
    (tmp_path / "back").mkdir()
    check_interrupted(tmp_path / "back", signal.SIGINT, half_written, "megatron-to-hf", megatron)


def check_interrupted(
    directory: Path,
    number: signal.Signals,
    is_time: Callable[[Path], bool],
    direction: str,
    source: Path,
    *options: str,
) -> None:
    out = directory / "out"
    for _ in range(CHANCES):
        process = subprocess.Popen(
            [sys.executable, str(TOOL), direction, str(source), str(out), *options],
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + LIMIT_SECONDS
        while not any(map(is_time, directory.glob(".out.partial-*"))) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(number)
        _, error = process.communicate(timeout=LIMIT_SECONDS)
        if process.returncode != 0:
            break
        shutil.rmtree(out)  # it was all over
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == f"error: interrupted; {out} was not made"
    assert "Traceback" not in error
    assert list(directory.glob("*out*")) == []
