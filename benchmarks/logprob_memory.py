"""Memory and time of log-probs with their gradients at a vocabulary of 152k: ours against all logits at once.

4,096 tokens, 40 % of them trained, hidden size 896 (Qwen2.5-0.5B), forward and backward. The plain path is what
trainers on transformers do: logits of all tokens, in float32, then `log_softmax`, `gather`, and a masked loss; it
makes no entropies, ours does. Each path runs once in a process of its own with one thread. Its peak is the largest
resident memory (VmHWM) less what was resident before: hidden states and weights are not counted, gradients are. Time
is CPU time of the process.

    python benchmarks/logprob_memory.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_ztrl.trainer.logprobs import linear_logprobs

VOCAB_SIZE = 151_936
TARGET = 1 / 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
"""Of the largest difference, relative to the largest value."""
RESULTS = ("logprobs", "grad_hidden", "grad_weight")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--trained-share", type=float, default=0.4)
    parser.add_argument("--hidden-size", type=int, default=896)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", nargs=3, metavar=("PATH", "DTYPE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        path, dtype, file = options.child
        torch.save(measure(path, DTYPES[dtype], options), file)
        return 0
    figures = {dtype: compare(dtype, sys.argv[1:]) for dtype in DTYPES}
    print_table(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if all(row["met"] for row in figures.values()) else 1


def compare(dtype: str, arguments: list[str]) -> dict[str, Any]:
    """Runs both paths, each in a child process."""
    found = {}
    for path in ("plain", "ours"):
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "result.pt"
            subprocess.run([sys.executable, __file__, *arguments, "--child", path, dtype, file], check=True)
            found[path] = torch.load(file)
    differences = {name: _difference(found["ours"][name], found["plain"][name]) for name in RESULTS}
    ratio = found["ours"]["peak_bytes"] / found["plain"]["peak_bytes"]
    return {
        **{path: {key: row[key] for key in ("peak_bytes", "cpu_seconds")} for path, row in found.items()},
        "peak_ratio": ratio,
        "largest_relative_differences": differences,
        "met": ratio <= TARGET and max(differences.values()) < TOLERANCES[dtype],
    }


def measure(path: str, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """One forward and backward pass in this process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    tokens, size = options.tokens, options.hidden_size
    hidden = torch.randn(tokens, size, dtype=dtype, requires_grad=True)
    weight = torch.empty(VOCAB_SIZE, size, dtype=dtype).normal_(0.0, 2 * size**-0.5).requires_grad_()
    targets = torch.randint(VOCAB_SIZE, (tokens,))
    advantages = torch.randn(tokens)
    trained = torch.rand(tokens).argsort()[: int(options.trained_share * tokens)].sort().values
    step = {"plain": _plain, "ours": _ours}[path]
    step(hidden[:8], weight[:128], targets[:8] % 128, advantages[:8], torch.arange(4))  # loads what it needs
    hidden.grad = weight.grad = None
    before = _reset_peak()
    started = time.process_time()
    logprobs = step(hidden, weight, targets, advantages, trained)
    seconds = time.process_time() - started
    return {
        "peak_bytes": _memory("VmHWM") - before,
        "cpu_seconds": seconds,
        "logprobs": logprobs,
        "grad_hidden": hidden.grad,
        # Every 64th row, and those that were targets: the whole gradient is half a gigabyte.
        "grad_weight": weight.grad[torch.cat((torch.arange(0, VOCAB_SIZE, 64), targets[trained]))],
    }


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor, trained: Tensor) -> Tensor:
    mask = torch.zeros_like(advantages).index_fill_(0, trained, 1.0)
    logits = torch.nn.functional.linear(hidden, weight).float()
    logprobs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    del logits
    (-(logprobs * advantages * mask).sum() / mask.sum()).backward()
    return logprobs.detach()[trained]


def _ours(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor, trained: Tensor) -> Tensor:
    logprobs, _entropies = linear_logprobs(
        hidden.index_select(0, trained),
        weight,
        targets[trained],
        vocab_size=weight.shape[0],
        temperature=1.0,
        group=dist.group.WORLD,
    )
    (-(logprobs * advantages[trained]).sum() / len(trained)).backward()
    return logprobs.detach()


def _reset_peak() -> int:
    """Makes the peak start from what is resident now, which it returns (see proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def _difference(ours: Tensor, plain: Tensor) -> float:
    return ((ours.float() - plain.float()).abs().max() / plain.float().abs().max()).item()


def print_table(figures: dict[str, dict[str, Any]]) -> None:
    table = Table("dtype", "path", "peak MB", "of plain", "target", "met", "CPU s", "differs by")
    for dtype, row in figures.items():
        plain, ours = row["plain"], row["ours"]
        table.add_row(
            dtype, "plain", f"{plain['peak_bytes'] / 1e6:,.0f}", *[""] * 3, f"{plain['cpu_seconds']:.1f}"
        )
        table.add_row(
            dtype,
            "ours",
            f"{ours['peak_bytes'] / 1e6:,.0f}",
            f"{row['peak_ratio']:.3f}",
            f"<= {TARGET}",
            "yes" if row["met"] else "NO",
            f"{ours['cpu_seconds']:.1f}",
            f"{max(row['largest_relative_differences'].values()):.0e}",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
