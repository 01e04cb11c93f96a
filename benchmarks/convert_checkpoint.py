"""Speed and memory of tools/convert_checkpoint.py: a random 1B model from HF to TP2 x PP2 and back.

The model has the shape of Qwen2.5-1.5B with 16 of its 28 layers: 0.98B parameters, bfloat16, tied embeddings. Its
weights are random bits, written as a stream. Each conversion is a process of its own. Its peak memory and processor
time are the kernel's count of the whole process; the speed is of the conversion until its files are synced to the
disk, without the seconds that Python takes to import torch. Each runs without and with the tool's verification, which
reads source and result again. The result is also compared with the safetensors library, which the tool does not use.

    python benchmarks/convert_checkpoint.py [--repeats 3] [--json FILE] [--directory DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table
from safetensors import safe_open

from megatron_ztrl.weights.hf_checkpoint import HFCheckpointWriter
from megatron_ztrl.weights.hf_mapping import Architecture, hf_tensor_shapes

TOOL = Path(__file__).parents[1] / "tools" / "convert_checkpoint.py"
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "num_attention_heads": 12,
    "num_hidden_layers": 16,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LAYOUT = ("--tp", "2", "--pp", "2")
MIN_BYTES_PER_SECOND = 200e6
BLOCK_ROWS = 4096
COPIES = 3
"""On the disk at a time: the source, the Megatron checkpoint, the result."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One conversion."""

    direction: str
    verified: bool
    seconds: float
    """As the program says, without its start."""
    process_seconds: float
    cpu_seconds: float
    """Of the whole process."""
    peak_rss_bytes: int


def main() -> int:
    """Returns 0 if every target is met."""
    options = _parser().parse_args()
    console = Console()
    architecture = Architecture.from_hf_config(CONFIG)
    shapes = hf_tensor_shapes(architecture)
    model_bytes = sum(torch.Size(shape).numel() for shape in shapes.values()) * torch.bfloat16.itemsize
    free_bytes = shutil.disk_usage(options.directory or tempfile.gettempdir()).free
    if free_bytes < (COPIES + 1) * model_bytes:
        raise SystemExit(f"needs {(COPIES + 1) * model_bytes / 1e9:.0f} GB of disk; choose a --directory")
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        root = Path(name)
        make_model(root / "source", shapes)
        measurements = []
        for _ in range(options.repeats):
            for verify in ("--no-verify", "--verify"):
                for path in (root / "megatron", root / "result"):
                    shutil.rmtree(path, ignore_errors=True)
                measurements += [
                    measure("hf-to-megatron", verify, root / "source", root / "megatron", *LAYOUT),
                    measure("megatron-to-hf", verify, root / "megatron", root / "result"),
                ]
        is_equal = bitwise_equal(root / "source", root / "result", shapes)
    return report(console, measurements, model_bytes, is_equal, options.json)


def make_model(directory: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Random bits, a block at a time."""
    template = directory.with_name("template")
    template.mkdir()
    (template / "config.json").write_text(json.dumps(CONFIG))
    random = np.random.default_rng(0)
    writer = HFCheckpointWriter(directory, shapes, torch.bfloat16)
    for name, shape in shapes.items():
        for start in range(0, shape[0], BLOCK_ROWS):
            block_shape = (min(BLOCK_ROWS, shape[0] - start), *shape[1:])
            bits = np.frombuffer(random.bytes(2 * int(np.prod(block_shape))), dtype=np.int16).copy()
            writer.add(name, torch.from_numpy(bits).view(torch.bfloat16).reshape(block_shape))
    writer.close(template)


def measure(direction: str, verify: str, *arguments: str | Path) -> Measurement:
    """Runs the tool once."""
    started_seconds = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, TOOL, direction, verify, *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process_seconds = time.perf_counter() - started_seconds
    process.returncode = os.waitstatus_to_exitcode(status)
    took = re.search(r" in ([\d.]+) s ", said)
    if process.returncode != 0 or took is None:
        raise SystemExit(f"{direction} failed:\n{said}")
    return Measurement(
        direction=direction,
        verified=verify == "--verify",
        seconds=float(took[1]),
        process_seconds=process_seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_rss_bytes=usage.ru_maxrss * 1024,
    )


def bitwise_equal(a: Path, b: Path, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Compares all tensors of two checkpoints of one file."""
    with (
        safe_open(a / "model.safetensors", framework="pt") as left,
        safe_open(b / "model.safetensors", framework="pt") as right,
    ):
        if set(left.keys()) != set(right.keys()) or set(left.keys()) != set(shapes):
            return False
        return all(
            torch.equal(left.get_tensor(name).view(torch.int16), right.get_tensor(name).view(torch.int16))
            for name in shapes
        )


def report(
    console: Console,
    measurements: list[Measurement],
    model_bytes: int,
    is_equal: bool,
    path: Path | None,
) -> int:
    """Prints each direction's best run, and its worst time and memory; returns 0 if every target is met."""
    max_rss_bytes = 0.6 * model_bytes + 1e9
    table = Table(
        Column("direction", no_wrap=True), "best", "worst", "MB/s", "process", "CPU", "peak RSS", "targets"
    )
    all_met = is_equal
    for direction, verified in dict.fromkeys((m.direction, m.verified) for m in measurements):
        runs = [m for m in measurements if (m.direction, m.verified) == (direction, verified)]
        best, worst = min(runs, key=lambda m: m.seconds), max(runs, key=lambda m: m.seconds)
        speed, rss_bytes = model_bytes / best.seconds, max(m.peak_rss_bytes for m in runs)
        met = speed >= MIN_BYTES_PER_SECOND and rss_bytes <= max_rss_bytes
        all_met = all_met and met
        table.add_row(
            direction + (" *" if verified else ""),
            f"{best.seconds:.1f} s",
            f"{worst.seconds:.1f} s",
            f"{speed / 1e6:,.0f}",
            f"{best.process_seconds:.1f} s",
            f"{best.cpu_seconds:.1f} s",
            f"{rss_bytes / 1e9:.2f} GB",
            "met" if met else "[red]missed[/]",
        )
    console.print(f"model: {model_bytes / 2e9:.2f}B parameters, {model_bytes / 1e9:.2f} GB, TP2 x PP2")
    console.print(table)
    console.print("* with the tool's own verification; process, CPU, RSS: with the start of Python")
    console.print(f"round trip bitwise equal: {'yes' if is_equal else '[red]no[/]'}")
    console.print(
        f"targets: at least {MIN_BYTES_PER_SECOND / 1e6:.0f} MB/s, at most {max_rss_bytes / 1e9:.2f} GB"
        " (0.6 x the model + 1 GB)"
    )
    if path is not None:
        result = {
            "model_bytes": model_bytes,
            "bitwise_equal": is_equal,
            "targets_met": all_met,
            "runs": [asdict(m) for m in measurements],
        }
        path.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all_met else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="of each conversion (3)")
    parser.add_argument("--directory", type=Path, help="for the temporary files (the system's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
